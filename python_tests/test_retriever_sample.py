"""SIDRetriever.sample: the draws of sample_search, from the log-probs of plain forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from support.tiny_models import VOCAB, llama, qwen3, t5
from support.tolerances import close

import raddpo_ext as rx
from raddpo_ext.integrations import retriever as module

pytestmark = pytest.mark.slow
MODELS = {"qwen3": qwen3, "llama": llama, "t5": t5}
PROMPTS = torch.tensor([[0, 0, 4, 7, 3], [5, 6, 3, 8, 4], [0, 3, 3, 9, 5]])


def make(name: str, eos: int | None = None) -> tuple[Any, rx.TrieIndex]:
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    sids = torch.cartesian_prod(torch.arange(4), torch.arange(4), torch.arange(4))[::3]
    lengths = None if eos is None else torch.arange(len(sids)) % 3 + 1
    return model, rx.TrieIndex.build(sids, lengths=lengths, vocab=rx.SIDVocab([4] * 3, offset=12, eos=eos))


def logps_of(model: Any, index: rx.TrieIndex, prompt: Tensor, codes: list[int], temperature: float) -> Tensor:
    """The log-prob of each token of a SID over the children of its prefix, by one plain forward."""
    assert index.vocab is not None
    tokens = [12 + 4 * level + code for level, code in enumerate(codes)] + ([] if index.eos is None else [index.eos])
    sid = torch.tensor(tokens)
    if model.config.is_encoder_decoder:
        logits = model(input_ids=prompt[None], decoder_input_ids=torch.cat([sid.new_zeros(1), sid])[None]).logits[0]
    else:
        logits = model(input_ids=torch.cat([prompt, sid])[None]).logits[0, len(prompt) - 1 :]
    found = []
    for level, token in enumerate(tokens):
        children = index.children(codes[:level])
        ids = [index.eos if code < 0 else 12 + 4 * level + code for code in children.tolist()]
        found.append((logits[level] / temperature)[ids].log_softmax(0)[ids.index(token)])
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eos", [None, 2])
@torch.no_grad()
def test_log_probs_are_those_of_plain_forwards(name: str, eos: int | None) -> None:
    """Of the whole catalogue, whose probabilities add up to 1; at a temperature."""
    model, index = make(name, eos)
    retriever = rx.SIDRetriever(model, index, beam_width=3)
    drawn = retriever.sample(PROMPTS, PROMPTS != 0, 30, 5, temperature=0.7)
    torch.testing.assert_close(drawn.logps.exp().sum(1), torch.ones(3), **close("model"))
    assert drawn.token_logps.shape == (3, 30, index.most_levels)
    for query, row in ((0, 0), (1, 3), (2, 6)):
        codes = [code for code in drawn.sids[query, row].tolist() if code >= 0]
        expected = logps_of(model, index, PROMPTS[query][PROMPTS[query] != 0], codes, 0.7)
        torch.testing.assert_close(drawn.token_logps[query, row, : len(expected)], expected, **close("model"))
        assert (drawn.token_logps[query, row, len(expected) :] == 0).all()


@pytest.mark.parametrize("way", ["shared", "reordered", "logits"])
@pytest.mark.parametrize("replacement", [False, True])
def test_every_way_draws_the_same(way: str, replacement: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams that share their prompt, a row per beam, or the model's own logits."""
    model, index = make("qwen3")
    expected = rx.SIDRetriever(model, index, beam_width=3).sample(PROMPTS, PROMPTS != 0, 6, 9, replacement, 1.5)
    if way == "logits":
        monkeypatch.setattr(module, "model_head", lambda model: None)
    retriever = rx.SIDRetriever(model, index, beam_width=3, shared_prefix=None if way != "reordered" else False)
    got = retriever.sample(PROMPTS, PROMPTS != 0, 6, 9, replacement, 1.5)
    assert got.items.tolist() == expected.items.tolist()
    assert got.counts.tolist() == expected.counts.tolist()
    torch.testing.assert_close(got.logps, expected.logps, **close("model"))
    assert got.counts.sum(1).tolist() == [6] * 3


def test_a_prompt_does_not_depend_on_the_batch() -> None:
    """By its key; fewer samples are the first of more; a filtered index draws from what it has."""
    model, index = make("qwen3")
    retriever = rx.SIDRetriever(model, index, beam_width=3)
    whole = retriever.sample(PROMPTS, PROMPTS != 0, 8, 9)
    one = retriever.sample(PROMPTS[1:2], None, 5, 9, keys=torch.tensor([1]))
    assert one.items[0].tolist() == whole.items[1, :5].tolist()
    other = retriever.sample(PROMPTS, PROMPTS != 0, 8, 10)
    assert other.items.tolist() != whole.items.tolist()
    allowed = [1, 4, 9]
    few = retriever.sample(PROMPTS, PROMPTS != 0, 5, 9, index=index.restrict(allowed))
    assert few.items[:, :3].sort(1).values.tolist() == [allowed] * 3
    assert (few.items[:, 3:] == -1).all()
    torch.testing.assert_close(few.log_weights.exp().sum(1), torch.ones(3), **close("model"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("replacement", [False, True])
def test_beams_without_a_choice_are_not_fed(name: str, replacement: bool) -> None:
    """The same draws; where beams share their prompt, the model reads no more beams than have a choice left."""
    model, index = make(name)
    retriever = rx.SIDRetriever(model, index, beam_width=3)
    options: dict[str, Any] = {"samples": 7, "seed": 5, "replacement": replacement}
    states: list[rx.SampleState] = []
    expected = retriever.sample(PROMPTS, PROMPTS != 0, on_step=lambda _, state: states.append(state), **options)
    widths: list[int] = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, args, output: widths.append(output.shape[1]))
    got = retriever.sample(PROMPTS, PROMPTS != 0, skip_forced=True, **options)
    handle.remove()
    assert got.sids.tolist() == expected.sids.tolist()
    for field in ("logps", "token_logps", "log_weights", "threshold"):
        torch.testing.assert_close(getattr(got, field), getattr(expected, field), **close("model"))
    free = [int((index.child_ranges(state.nodes)[1] > 1).sum(1).max()) for state in states[:2]]
    assert free[1] < states[1].nodes.shape[1]
    assert widths[-2:] == free or name == "t5"


def test_bad_input() -> None:
    model, index = make("qwen3")
    retriever = rx.SIDRetriever(model, index, beam_width=3)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        retriever.sample(PROMPTS, None, 0, 1)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        retriever.sample(PROMPTS, None, 2, 1, temperature=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        retriever.sample(PROMPTS, None, 2, -1)
    with pytest.raises(ValueError, match=r"keys must have shape \[B\] = \(3,\)"):
        retriever.sample(PROMPTS, None, 2, 1, keys=torch.arange(2))
    with pytest.raises(ValueError, match=f"outside .* {VOCAB}"):
        retriever.sample(PROMPTS + VOCAB, None, 2, 1)
    with pytest.raises(ValueError, match="training mode"):
        rx.SIDRetriever(model.train(), index, beam_width=3).sample(PROMPTS, None, 2, 1)
