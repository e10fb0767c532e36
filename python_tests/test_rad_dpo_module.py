"""RADDPOLoss: the composition of its parts, its metrics by brute force, and one big batch in pieces and on ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.distributed import on_ranks
from support.session_cases import common_prefix
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import raddpo_ext as rx
from raddpo_ext import reference

VOCAB = rx.SIDVocab([5, 5, 5], offset=4, eos=2)
COLUMNS, FEATURES = 24, 8


def random_sessions(counts: list[tuple[int, int]], seed: int) -> rx.SessionBatch:
    """SIDs of three levels over five codes, so that prefixes and whole SIDs repeat; some are shorter."""
    generator = torch.Generator().manual_seed(seed)
    candidates = sum(p + n for p, n in counts)
    codes = torch.randint(5, (candidates, 3), generator=generator)
    codes[:, 0] %= 2
    ends = torch.randint(1, 4, (candidates,), generator=generator).clamp(min=2)
    sizes = torch.tensor([0] + [p + n for p, n in counts])
    tokens = VOCAB.lookup(codes, ends)
    return rx.SessionBatch(tokens, ends + 1, sizes.cumsum(0), torch.tensor([p for p, _ in counts]))


def part(sessions: rx.SessionBatch, begin: int, end: int) -> tuple[slice, rx.SessionBatch]:
    """Sessions ``begin:end`` and their rows."""
    rows = slice(int(sessions.offsets[begin]), int(sessions.offsets[end]))
    offsets = sessions.offsets[begin : end + 1] - sessions.offsets[begin]
    return rows, rx.SessionBatch(
        sessions.tokens[rows], sessions.lengths[rows], offsets, sessions.num_positives[begin:end]
    )


@pytest.mark.parametrize("normalize", ["vocab", "level", "trie"])
@pytest.mark.parametrize("preset", rx.PRESETS)
def test_equals_the_composed_references(preset: str, normalize: str) -> None:
    sessions = random_sessions([(2, 4), (1, 0), (0, 3), (3, 5)], 1)
    generator = torch.Generator().manual_seed(2)
    hidden, weight, bias, embeddings = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((len(sessions.tokens), 4, FEATURES), (COLUMNS, FEATURES), (COLUMNS,), (len(sessions.tokens), 6))
    )
    ref_logps = -torch.rand(sessions.tokens.shape, generator=generator, dtype=torch.float64)
    index = rx.TrieIndex.build(
        torch.cat([torch.cartesian_prod(*[torch.arange(5)] * 3)] * 3),
        lengths=torch.tensor([1, 2, 3]).repeat_interleave(125),
        vocab=VOCAB,
    )
    weighting = rx.SimilarityWeighting(window=16)
    weighting.history.copy_(torch.linspace(-1, 1, 16))
    weighting.thresholds.copy_(torch.tensor([-0.3, 0.1, 0.5]))
    module = rx.RADDPOLoss(
        weighting.eval(),
        normalize=normalize,
        vocab=VOCAB if normalize == "level" else None,
        index=index if normalize == "trie" else None,
        temperature=0.8,
        **rx.PRESETS[preset],
    ).double()

    def ours(*inputs: Tensor) -> Tensor:
        output = module(inputs[0], inputs[1], sessions, bias=inputs[2], embeddings=embeddings, ref_logps=ref_logps)
        return output.loss

    def composed(*inputs: Tensor) -> Tensor:
        logps = reference.linear_token_logps(
            inputs[0],
            inputs[1],
            torch.where(sessions.mask(), sessions.tokens, -100),
            bias=inputs[2],
            normalize=normalize,
            vocab=VOCAB,
            index=index,
            nodes=index.nodes(sessions.tokens),
            temperature=0.8,
        )
        weights = weighting(embeddings, sessions)
        return reference.rad_dpo_loss(
            logps, sessions, ref_logps=ref_logps, pair_weights=weights, **rx.PRESETS[preset]
        ).loss

    results = []
    for function in (ours, composed):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        loss = function(*inputs)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_padding_is_not_read() -> None:
    sessions = random_sessions([(2, 3), (1, 4)], 3)
    hidden = torch.randn(len(sessions.tokens), 4, FEATURES)
    weight = torch.randn(COLUMNS, FEATURES)
    results = []
    for padding in (0.0, torch.nan):
        inputs = [
            hidden.masked_fill(~sessions.mask()[..., None], padding).requires_grad_(),
            weight.clone().requires_grad_(),
        ]
        output = rx.RADDPOLoss()(inputs[0], inputs[1], sessions)
        output.loss.backward()
        results.append([output.loss.detach(), *(x.grad for x in inputs), *output.metrics.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("positives", ["winner", "each", "pooled"])
@pytest.mark.parametrize("protect", ["winner", "positives", "none", "detach"])
def test_metrics_by_brute_force(protect: str, positives: str) -> None:
    sessions = random_sessions([(2, 6), (1, 0), (0, 3), (3, 9), (1, 5)], 4)
    generator = torch.Generator().manual_seed(5)
    weights = torch.where(torch.rand(sessions.num_pairs, generator=generator) < 0.2, 0.0, 0.7).double()
    detach = torch.rand(sessions.tokens.shape, generator=generator) < 0.5
    options: dict[str, Any] = {"positives": positives}
    if protect != "detach":
        options["protect"] = protect
    hidden = torch.randn(len(sessions.tokens), 4, FEATURES, generator=generator, dtype=torch.float64)
    head = torch.randn(COLUMNS, FEATURES, generator=generator, dtype=torch.float64)
    output = rx.RADDPOLoss(**options)(
        hidden, head, sessions, pair_weights=weights, detach=detach if protect == "detach" else None
    )
    result = reference.rad_dpo_loss(output.logps, sessions, pair_weights=weights, **options)

    sids = [tuple(row[:end]) for row, end in zip(sessions.tokens.tolist(), sessions.lengths.tolist(), strict=True)]
    margins, kept_weights, detached, tokens = [], [], 0, 0
    rewards: dict[bool, list[float]] = {True: [], False: []}
    numbers = {pair: i for i, pair in enumerate(zip(*(rows.tolist() for rows in sessions.pairs()), strict=True))}
    for first, last, count in zip(
        sessions.offsets[:-1].tolist(), sessions.offsets[1:].tolist(), sessions.num_positives.tolist(), strict=True
    ):
        for row in range(first, last):
            rewards[row < first + count].append(float(result.rewards[row]))
        ours = range(first, first + count)
        for n in range(first + count, last):
            drops = {p: sids[p] == sids[n] or weights[numbers[p, n]] == 0 for p in ours}
            for p in ours:
                in_loss = not drops[p] and (positives != "winner" or p == first)
                if not in_loss or (positives == "pooled" and any(drops.values())):
                    continue
                against = [p] if protect == "winner" and positives != "pooled" else list(ours)
                longest = max(common_prefix(sids[q], sids[n]) for q in against)
                margins.append(float(result.rewards[p] - result.rewards[n]))
                kept_weights.append(float(weights[numbers[p, n]]))
                masked = int(detach[n, : len(sids[n])].sum()) if protect == "detach" else longest
                detached += 0 if protect == "none" else masked
                tokens += len(sids[n])
    expected = {
        "loss": float(result.loss),
        "preference": float(result.preference),
        "sft": float(result.sft),
        "rewards/chosen": sum(rewards[True]) / len(rewards[True]),
        "rewards/rejected": sum(rewards[False]) / len(rewards[False]),
        "rewards/margins": sum(margins) / len(margins),
        "rewards/accuracies": sum(margin > 0 for margin in margins) / len(margins),
        "pair_weights": sum(kept_weights) / len(kept_weights),
        "detached": detached / tokens,
        "dropped_pairs": sum(not sids[p] or not sids[n] or sids[p] == sids[n] for p, n in numbers) / len(numbers),
    }
    got = {name: float(value) for name, value in output.metrics.items()}
    if protect == "detach":  # the reference above was not told; the values do not depend on it
        assert 0 < got["detached"] < 1
    assert got == pytest.approx(expected, rel=1e-10)
    assert not any(value.requires_grad for value in output.metrics.values())


def test_metrics_of_nothing_are_zero() -> None:
    sessions = random_sessions([(0, 2), (2, 0), (0, 0)], 6)
    output = rx.RADDPOLoss(sft_weight=0.0)(
        torch.randn(4, 4, FEATURES, requires_grad=True), torch.randn(COLUMNS, FEATURES), sessions
    )
    for name in ("loss", "preference", "rewards/margins", "rewards/accuracies", "pair_weights", "detached"):
        assert float(output.metrics[name]) == 0.0


class Policy(nn.Module):
    """A model whose hidden states depend on the tokens before each token, with its loss inside."""

    def __init__(self, window: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(COLUMNS, FEATURES)
        self.mix = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, COLUMNS, bias=False)
        self.loss = rx.RADDPOLoss(rx.SimilarityWeighting(window=window), sft_weight=0.3, beta=1.0)

    def forward(self, sessions: rx.SessionBatch, normalizer: tuple[float, float]) -> Tensor:
        tokens = sessions.tokens.clamp(min=0)
        states = torch.tanh(self.mix(self.embed(tokens).cumsum(1)))
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
        last = states.gather(1, (sessions.lengths - 1)[:, None, None].expand(-1, -1, FEATURES))[:, 0]
        return self.loss(before, self.head.weight, sessions, embeddings=last, normalizer=normalizer).loss


STEPS, WINDOW = 4, 24


def batches() -> list[rx.SessionBatch]:
    """Every session keeps a pair, so that the number of sessions is the divisor."""
    found = []
    seed = 0
    while len(found) < STEPS:
        sessions = random_sessions([(2, 3), (1, 4), (1, 2), (2, 5), (1, 3), (3, 2), (1, 6), (2, 2)], seed)
        seed += 1
        logps = -torch.rand(sessions.tokens.shape)
        if bool((rx.rad_dpo_loss(logps, sessions, sft_weight=0.0, reduction="none").loss > 0).all()):
            found.append(sessions)
    return found


def train(pieces: int, rank: int | None = None, ranks: int = 1) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Parameters and state of the weighting after a few steps, each batch in ``pieces * ranks`` pieces of sessions."""
    policy = Policy(WINDOW)
    model: nn.Module = policy if rank is None else DistributedDataParallel(policy)
    weighting = policy.loss.similarity_weighting
    assert weighting is not None
    weighting.commit()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    for sessions in batches():
        total = (sessions.num_sessions, float(sessions.lengths[positive_rows(sessions)].sum()))
        size = sessions.num_sessions // (pieces * ranks)
        for piece in range(pieces):
            begin = ((rank or 0) * pieces + piece) * size
            _, own = part(sessions, begin, begin + size)
            last = piece == pieces - 1
            if rank is not None and not last:
                with model.no_sync():
                    model(own, total).mul(ranks).backward()  # DistributedDataParallel averages, the loss is a sum
            else:
                model(own, total).mul(ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        weighting.commit()
    return [p.detach().clone() for p in policy.parameters()], {
        name: value for name, value in weighting.state_dict().items() if isinstance(value, Tensor)
    }


def positive_rows(sessions: rx.SessionBatch) -> Tensor:
    rows = torch.arange(sessions.num_candidates)
    session = torch.bucketize(rows, sessions.offsets[1:], right=True)
    return rows - sessions.offsets[session] < sessions.num_positives[session]


def train_on_rank() -> tuple[list[Tensor], dict[str, Tensor]]:
    return train(2, torch.distributed.get_rank(), 2)


@pytest.mark.slow
def test_accumulated_and_distributed_batches_equal_one_big_batch() -> None:
    parameters, state = train(1)
    assert not state["history"].isnan().any()  # so that weights below 1 have had a say
    runs = [train(2), train(4), *on_ranks(train_on_rank)]
    for got_parameters, got_state in runs:
        for got, expected in zip(got_parameters, parameters, strict=True):
            assert float((got - expected).norm() / expected.norm()) < 1e-6
        torch.testing.assert_close(got_state["history"], state["history"], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(runs[2][0], runs[3][0], strict=True))
    assert all(torch.equal(runs[2][1][name], runs[3][1][name]) for name in ("history", "thresholds"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bata": 2.0}, "options must be among .* got \\['bata'\\]"),
        ({"similarity_weighting": 3}, "similarity_weighting must be a SimilarityWeighting, got int"),
    ],
)
def test_bad_options_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        rx.RADDPOLoss(**arguments)


@pytest.mark.parametrize(
    ("weighting", "arguments", "message"),
    [
        (None, {"hidden": torch.zeros(6, 4)}, "hidden must have shape .* got \\(6, 4\\)"),
        (None, {"hidden": torch.zeros(5, 4, FEATURES)}, "hidden must have shape"),
        (None, {"embeddings": torch.zeros(6, 2)}, "embeddings must be None without similarity_weighting, got Tensor"),
        (True, {}, "embeddings must be given with similarity_weighting, got NoneType"),
        (True, {"embeddings": torch.zeros(6, 2), "pair_weights": torch.ones(8)}, "pair_weights must be None"),
        (None, {"weight": torch.zeros(COLUMNS, FEATURES + 1)}, "weight must have one column"),
        (None, {"weight": torch.zeros(5, FEATURES)}, "targets.* outside \\[0, 5\\)"),
        (None, {"normalizer": (0, 1)}, "normalizer\\[0\\] must be positive, got 0"),
    ],
)
def test_bad_arguments_are_named(weighting: bool | None, arguments: dict[str, Any], message: str) -> None:
    sessions = random_sessions([(2, 4)], 7)
    given = {"hidden": torch.zeros(6, 4, FEATURES), "weight": torch.zeros(COLUMNS, FEATURES), "sessions": sessions}
    module = rx.RADDPOLoss(None if weighting is None else rx.SimilarityWeighting())
    with pytest.raises(ValueError, match=message):
        module(**(given | arguments))


def test_state_dict_resumes_the_weighting() -> None:
    sessions = random_sessions([(2, 4), (3, 5)], 8)
    module = rx.RADDPOLoss(rx.SimilarityWeighting(window=8))
    hidden, weight = torch.randn(len(sessions.tokens), 4, FEATURES), torch.randn(COLUMNS, FEATURES)
    embeddings = torch.randn(len(sessions.tokens), 5)
    module(hidden, weight, sessions, embeddings=embeddings)
    resumed = rx.RADDPOLoss(rx.SimilarityWeighting(window=8))
    resumed.load_state_dict(module.state_dict())
    first, second = (m(hidden, weight, sessions, embeddings=embeddings) for m in (module, resumed))
    assert float(first.loss) == float(second.loss)
    assert float(first.metrics["pair_weights"]) < 1


def test_rows_share_the_states_of_a_packed_batch() -> None:
    """Prompt and prefixes once, from packing to the head: the loss and gradients of a state a token."""
    sessions = random_sessions([(2, 4), (1, 3)], 5)
    packed = rx.pack_sessions([[5, 6], [7]], sessions, layout="trie")
    generator = torch.Generator().manual_seed(6)
    states = torch.randn(*packed.input_ids.shape, FEATURES, generator=generator)
    weight = torch.randn(COLUMNS, FEATURES, generator=generator)

    def run(distinct: bool) -> tuple[Tensor, ...]:
        leaves = states.clone().requires_grad_(), weight.clone().requires_grad_()
        hidden = packed.distinct_hidden(leaves[0]) if distinct else packed.hidden(leaves[0])
        output = rx.RADDPOLoss()(hidden, leaves[1], sessions, rows=packed.rows if distinct else None)
        return output.loss.detach(), *torch.autograd.grad(output.loss, leaves)

    for got, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, expected)
