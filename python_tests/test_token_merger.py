"""TokenMerger: merged ids, their embeddings, and the models that read them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tolerances import close
from torch import Tensor, nn

import raddpo_ext as rx
from raddpo_ext.data.merged_ids import MergedIds

ROWS, WIDTH, EOS = 40, 8, 30
VOCAB = rx.SIDVocab([4, 5, 4], offset=3)
SPARSE = rx.SIDVocab(
    [3, 4, 2], token_ids=[[20, -1, 21], [5, 20, -1, 9], [7, 6]], eos=EOS
)  # unused codes, shared tokens
VOCABS = [VOCAB, SPARSE]


def merger_for(vocab: rx.SIDVocab = VOCAB, dtype: torch.dtype = torch.float64, **options: Any) -> rx.TokenMerger:
    """With a random projection."""
    torch.manual_seed(0)
    merger = rx.TokenMerger(nn.Embedding(ROWS, WIDTH, dtype=dtype, **options), vocab)
    for parameter in merger.sid_projection.parameters():
        nn.init.normal_(parameter, std=0.5)
    return merger


def sids(vocab: rx.SIDVocab, count: int) -> list[list[int]]:
    """Random SIDs of 1 to L codes, as tokens."""
    draw = torch.Generator().manual_seed(1)
    codes = [ids[ids >= 0] for ids in vocab.token_ids]
    rows = [[int(ids[torch.randint(len(ids), (), generator=draw)]) for ids in codes] for _ in range(count)]
    return [row[: 1 + i % vocab.levels] for i, row in enumerate(rows)]


def plain(merger: rx.TokenMerger, ids: Tensor) -> Tensor:
    """The embeddings one id at a time, by the formula."""
    rows = []
    for number in ids.flatten().tolist():
        tokens = torch.tensor(merger.split([number]))
        parts = merger.weight[tokens] * torch.as_tensor(merger.embed_scale).to(merger.weight.dtype)
        if number >= merger.ids.vocab_size:
            whole = torch.cat([*parts, parts.new_zeros((merger.ids.vocab.levels - len(parts)) * parts.shape[1])])
            parts = merger.sid_projection(whole)[None]
        rows.append(parts[0])
    return torch.stack(rows).view(*ids.shape, -1)


def batch(merger: rx.TokenMerger, vocab: rx.SIDVocab, count: int) -> Tensor:
    """Merged ids and some tokens, ``[2, N]``."""
    ids = [number for tokens in sids(vocab, count) for number in merger.merge(tokens)]
    ids = [1, *ids, 2, 33, *ids[:2]]
    return torch.tensor(ids[: len(ids) // 2 * 2]).view(2, -1)


# Merged ids


# Half of the ids are codes of the small vocabs, so that SIDs occur.
ids_of_prompts = st.one_of(st.sampled_from([3, 7, 12, 20, 21, 5, 6]), st.integers(0, ROWS - 1))


@given(prompt=st.lists(ids_of_prompts, max_size=30), which=st.integers(0, 1))
def test_split_undoes_merge(prompt: list[int], which: int) -> None:
    ids = MergedIds(VOCABS[which], ROWS)
    merged = ids.merge(prompt)
    assert ids.split(merged) == prompt
    assert ids.merge(merged) == merged  # nothing is left to merge
    first = set(VOCABS[which].token_ids[0].tolist())
    assert not first & set(merged)
    if merged:
        assert not ids.wrong(torch.tensor(merged)).any()


def test_what_is_merged() -> None:
    ids = MergedIds(VOCAB, ROWS)
    a, b, c = ([int(VOCAB.token_ids[level][code]) for code in (0, 1)] for level in range(3))
    one, two = ids.merge([a[0], b[1], c[0]]), ids.merge([a[1], b[0], c[1]])
    assert len(one) == len(two) == 1
    # Text, end tokens and the rest of a SID stay; a SID may be short, and follow another at once.
    prompt = [b[0], c[1], 1, a[0], b[1], c[0], a[1], b[0], c[1], 2, a[0], b[0], 33, c[0]]
    assert ids.merge(prompt) == [b[0], c[1], 1, *one, *two, 2, *ids.merge([a[0], b[0]]), 33, c[0]]
    assert ids.merge(torch.tensor(prompt)) == ids.merge(prompt)
    # A merged id holds its codes + 1, the first level's first.
    assert one == [ROWS + (1 * 6 + 2) * 5 + 1]
    sparse = MergedIds(SPARSE, ROWS)
    assert sparse.split([*sparse.merge([21, 20, 6, EOS]), 20]) == [21, 20, 6, EOS, 20]
    assert len(sparse.merge([21, 20, 6, EOS])) == 2


@pytest.mark.parametrize("vocab", VOCABS, ids=["consecutive", "sparse"])
def test_every_other_id_is_wrong(vocab: rx.SIDVocab) -> None:
    ids = MergedIds(vocab, ROWS)
    every = torch.arange(-2, ids.end + 3)
    good = {*range(ROWS)}
    counts = [level[level >= 0].tolist() for level in vocab.token_ids]
    for length in range(1, vocab.levels + 1):
        for tokens in torch.cartesian_prod(*map(torch.tensor, counts[:length])).view(-1, length).tolist():
            good.update(ids.merge(tokens))
    assert every[~ids.wrong(every)].tolist() == sorted(good)
    assert ids.wrong(torch.tensor([[2**62, -(2**62)]])).all()


def test_workers_get_no_weights() -> None:
    merger = merger_for()
    assert len(pickle.dumps(merger.ids)) < 5000
    assert pickle.loads(pickle.dumps(merger.ids)).merge([3, 7, 12]) == merger.merge([3, 7, 12])


# Embeddings


@pytest.mark.parametrize("count", [2, 40])  # fewer codes than the tables have rows, and more
@pytest.mark.parametrize("vocab", VOCABS, ids=["consecutive", "sparse"])
@pytest.mark.parametrize("traced", [False, True])  # as on the CPU, and as on a GPU and under torch.compile
def test_equals_the_plain_form(vocab: rx.SIDVocab, count: int, traced: bool, monkeypatch: Any) -> None:
    merger = merger_for(vocab)
    ids = batch(merger, vocab, count)
    if traced:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found, expected = merger(ids), plain(merger, ids)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(merger.eval()(ids), expected, rtol=1e-6, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(merger(ids), expected, rtol=1e-6, atol=1e-12)
    seed = torch.randn_like(found)
    parameters = list(merger.parameters())
    for got, right in zip(
        torch.autograd.grad(found, parameters, seed), torch.autograd.grad(expected, parameters, seed), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype: torch.dtype, count: int) -> None:
    merger = merger_for(dtype=dtype)
    ids = batch(merger, VOCAB, count)
    expected = plain(copy.deepcopy(merger).double(), ids)
    for found in (merger(ids), merger(ids).detach()):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, **close("token_merger", dtype))
    with torch.autocast("cpu", torch.bfloat16):  # of no effect: embeddings have the type of their weight
        assert torch.equal(merger(ids), found)
    with torch.no_grad():
        torch.testing.assert_close(merger(ids).double(), expected, **close("token_merger", dtype))


@pytest.mark.parametrize("count", [2, 40])
def test_a_projection_of_another_precision(count: int) -> None:
    merger = merger_for(dtype=torch.bfloat16)
    merger.sid_projection.float()
    exact = copy.deepcopy(merger).float()
    ids = batch(merger, VOCAB, count)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            found = merger(ids)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), exact(ids), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("count", [1, 12])
def test_gradcheck(count: int) -> None:
    merger = merger_for(rx.SIDVocab([2, 2], offset=3))
    ids = batch(merger, rx.SIDVocab([2, 2], offset=3), count)

    def run(weight: Tensor, projection: Tensor, bias: Tensor) -> Tensor:
        values = {"weight": weight, "sid_projection.weight": projection, "sid_projection.bias": bias}
        return torch.func.functional_call(merger, values, (ids,))

    assert torch.autograd.gradcheck(
        run, tuple(parameter.detach().requires_grad_() for parameter in merger.parameters())
    )


def test_starts_as_the_mean() -> None:
    merger = rx.TokenMerger(nn.Embedding(ROWS, WIDTH), VOCAB)
    tokens = [4, 9, 13]
    torch.testing.assert_close(merger(torch.tensor(merger.merge(tokens)))[0], merger.weight[tokens].mean(0))
    # A short SID is a part of this sum.
    torch.testing.assert_close(merger(torch.tensor(merger.merge([4])))[0], merger.weight[4] / 3)


def test_tokens_are_read_as_before() -> None:
    embeddings = nn.Embedding(ROWS, WIDTH, padding_idx=1)
    merger = rx.TokenMerger(embeddings, VOCAB)
    assert merger.weight is embeddings.weight
    assert merger.padding_idx == 1
    assert [name for name, _ in merger.state_dict().items()] == [
        "weight",
        "sid_projection.weight",
        "sid_projection.bias",
    ]
    ids = torch.arange(ROWS).view(4, -1)
    assert torch.equal(merger(ids), embeddings(ids))
    merger(torch.tensor([1, 2, *merger.merge([4, 9])])).sum().backward()
    assert merger.weight.grad is not None
    assert merger.weight.grad[1].tolist() == [0.0] * WIDTH  # of the padding
    assert merger.weight.grad[2].tolist() == [1.0] * WIDTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma3", "bart"])
def test_scaled_embeddings(family: str, dtype: torch.dtype) -> None:
    if family == "gemma3":
        kind = pytest.importorskip("transformers.models.gemma3.modeling_gemma3").Gemma3TextScaledWordEmbedding
    else:
        kind = pytest.importorskip("transformers.models.bart.modeling_bart").BartScaledWordEmbedding
    embeddings = kind(ROWS, WIDTH, 0, embed_scale=WIDTH**0.5)
    embeddings.weight = nn.Parameter(embeddings.weight.to(dtype))  # the constant stays, as after from_pretrained
    merger = rx.TokenMerger(embeddings, VOCAB)
    tokens = torch.arange(ROWS)
    assert torch.equal(merger(tokens), embeddings(tokens))
    for ids in (batch(merger, VOCAB, 2), batch(merger, VOCAB, 40)):
        expected = plain(merger, ids).double()
        torch.testing.assert_close(merger(ids).double(), expected, **close("token_merger", dtype))
        with torch.no_grad():
            torch.testing.assert_close(merger(ids).double(), expected, **close("token_merger", dtype))


def _step(merger: rx.TokenMerger) -> rx.TokenMerger:
    optimizer = torch.optim.SGD(merger.parameters(), lr=0.5)
    with torch.enable_grad():
        merger(torch.tensor(merger.merge([3, 8, 12]))).square().sum().backward()
    optimizer.step()
    return merger


def _load(merger: rx.TokenMerger) -> rx.TokenMerger:
    merger.load_state_dict({name: 2 * value for name, value in merger.state_dict().items()})
    return merger


def _assign(merger: rx.TokenMerger) -> rx.TokenMerger:
    merger.load_state_dict({name: 2 * value for name, value in merger.state_dict().items()}, assign=True)
    return merger


def _in_place(name: str) -> Any:
    def change(merger: rx.TokenMerger) -> rx.TokenMerger:
        dict(merger.named_parameters())[name].add_(1.0)
        return merger

    return change


def _data(merger: rx.TokenMerger) -> rx.TokenMerger:
    merger.weight.data[VOCAB.token_ids[1][2]] += 1.0  # torch counts no version for it
    return merger


def _replace(merger: rx.TokenMerger) -> rx.TokenMerger:
    merger.sid_projection = nn.Linear(3 * WIDTH, WIDTH, dtype=torch.float64)
    return merger


CHANGES = {
    "step": _step,
    "load_state_dict": _load,
    "assign": _assign,
    "weight": _in_place("weight"),
    "projection": _in_place("sid_projection.weight"),
    "bias": _in_place("sid_projection.bias"),
    "data": _data,
    "replaced": _replace,
    "dtype": lambda merger: merger.to(torch.float32),
    "copy": lambda merger: _in_place("weight")(copy.deepcopy(merger)),
    "pickle": lambda merger: _in_place("weight")(pickle.loads(pickle.dumps(merger))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kept_tables_are_never_stale(mode: Any, change: str, monkeypatch: Any) -> None:
    merger = merger_for().eval()
    ids = batch(merger, VOCAB, 6)
    made = []
    table = rx.TokenMerger._table
    monkeypatch.setattr(rx.TokenMerger, "_table", lambda self, rows: made.append(1) or table(self, rows))  # type: ignore[func-returns-value]
    with mode():
        before = merger(ids)
        assert torch.equal(merger(ids), before)
        assert len(made) == 1  # kept
    with torch.no_grad():
        merger = CHANGES[change](merger)
        expected = plain(merger, ids)
    with mode():
        found = merger(ids)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 if change == "dtype" else 1e-12)
    assert change == "dtype" or not torch.allclose(found, before)


def test_made_in_inference_mode() -> None:
    with torch.inference_mode():
        merger = rx.TokenMerger(nn.Embedding(ROWS, WIDTH), VOCAB)
        ids = batch(merger, VOCAB, 6)
        torch.testing.assert_close(merger(ids), plain(merger, ids))
        merger.weight.mul_(2)
        torch.testing.assert_close(merger(ids), plain(merger, ids))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 40])
def test_compiles_in_one_graph(count: int) -> None:
    merger = merger_for(dtype=torch.float32)
    ids = batch(merger, VOCAB, count)
    compiled = torch.compile(merger, fullgraph=True)
    torch.testing.assert_close(compiled(ids), plain(merger, ids))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), plain(merger, ids))
        merger.weight.mul_(2)
        torch.testing.assert_close(compiled(ids), plain(merger, ids))


# Bad input


class _Doubled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) ** 2


class _Normed(nn.Embedding):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.norm = nn.RMSNorm(sizes[1])


def _hooked() -> nn.Embedding:
    embeddings = nn.Embedding(ROWS, WIDTH)
    embeddings.register_forward_hook(lambda module, args, output: None)
    return embeddings


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rx.TokenMerger(nn.Embedding(14, WIDTH), VOCAB), ValueError, "vocab must hold token ids below 14.* 15"),
        (lambda: rx.TokenMerger(nn.Embedding(EOS, WIDTH), SPARSE), ValueError, "token ids below 30.* got 30"),
        (lambda: rx.TokenMerger(nn.Embedding(ROWS, WIDTH), [4, 4]), TypeError, "vocab must be a SIDVocab, got list"),  # type: ignore[arg-type]
        (lambda: rx.TokenMerger(nn.Linear(2, 2), VOCAB), TypeError, "embeddings must be a torch.nn.Embedding"),  # type: ignore[arg-type]
        (lambda: rx.TokenMerger(merger_for(), VOCAB), TypeError, "as the model was made with, got .*TokenMerger"),
        (lambda: merger_for(max_norm=1.0), ValueError, "embeddings must have max_norm = None, got 1.0"),
        (lambda: merger_for(sparse=True), ValueError, "embeddings must have sparse = False, got True"),
        (lambda: rx.TokenMerger(_Doubled(ROWS, WIDTH), VOCAB), ValueError, "embed_scale times the rows.* _Doubled"),
        (lambda: rx.TokenMerger(_Normed(ROWS, WIDTH), VOCAB), ValueError, r"one parameter, weight.*norm.weight"),
        (lambda: rx.TokenMerger(_hooked(), VOCAB), ValueError, "embeddings have hooks"),
        (lambda: rx.TokenMerger(nn.Embedding(ROWS, WIDTH, device="meta"), VOCAB), ValueError, "on the meta device"),
        (
            lambda: MergedIds(rx.SIDVocab([2**16] * 4, offsets=[0] * 4), 2**16),
            ValueError,
            r"at most 2\*\*62 SIDs, got levels of \(65536",
        ),
        (lambda: MergedIds(VOCAB, 0), ValueError, "vocab_size must be at least 1, got 0"),
        (lambda: merger_for().merge([[1, 2]]), ValueError, r"prompt_ids must have 1 dimensions, got shape \(1, 2\)"),
        (lambda: merger_for().merge("3 8"), TypeError, "prompt_ids must hold integers"),
        (lambda: merger_for().split([3, ROWS]), ValueError, r"ids\[1\] = 40 merges the codes \[-1, -1, -1\]"),
        (lambda: merger_for().split([-1]), ValueError, r"ids\[0\] = -1 is outside \[0, 190\)"),
        (lambda: merger_for()(torch.tensor([[3, ROWS + 1]])), ValueError, r"input\[0, 1\] = 41 merges .*-1, -1, 0"),
        (lambda: merger_for()(torch.tensor([190])), ValueError, r"input\[0\] = 190 is outside \[0, 190\)"),
        (lambda: merger_for(SPARSE)(torch.tensor([70])), ValueError, r"input\[0\] = 70 merges the codes \[1, -1, -1\]"),
    ],
)
def test_bad_input(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_resized_table_is_refused() -> None:
    merger = merger_for()
    merger.weight = nn.Parameter(torch.zeros(ROWS + 8, WIDTH, dtype=torch.float64))
    with pytest.raises(ValueError, match="must have 40 rows, as when the TokenMerger was made, got 48"):
        merger(torch.tensor([1]))


def test_as_many_sids_as_fit() -> None:
    vocab = rx.SIDVocab([2**16 - 1] * 3 + [2**14 - 1], offsets=[0] * 4)  # 2**62 merged ids
    ids = MergedIds(vocab, 2**16)
    (last,) = ids.merge([2**16 - 2] * 3 + [2**14 - 2])
    assert last == ids.end - 1
    assert ids.split([last]) == [2**16 - 2] * 3 + [2**14 - 2]
