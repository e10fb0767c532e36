"""Searches captured in a graph, played on the CPU (graph_tape): every input goes through the graph's own buffers."""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest
import torch
from support.tolerances import close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers")

from support.graph_tape import Tape, play_graphs
from test_retriever import VOCAB, make_index, make_model, prompts

import raddpo_ext as rx
from raddpo_ext.decoding.beam_search import head_beam_search
from raddpo_ext.integrations import graphed
from raddpo_ext.integrations.base_model import model_head
from raddpo_ext.integrations.graphed import CapturedDecoder

pytestmark = pytest.mark.slow

WIDTHS = [5, 20, 12]


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> type[Tape]:
    play_graphs(monkeypatch)
    return Tape


def calls() -> list[tuple[Tensor, Tensor]]:
    """Batches of three prompts of other tokens and lengths."""
    ids, mask = prompts()
    other = (ids + 11) % 50
    return [(ids, mask), (other, mask.flip(0)), (other, torch.ones_like(mask)), prompts("right")]


def assert_same(got: rx.BeamResult, expected: rx.BeamResult) -> None:
    assert got.items.tolist() == expected.items.tolist()
    assert got.sids.tolist() == expected.sids.tolist()
    torch.testing.assert_close(got.scores, expected.scores, **close("model"))


@pytest.mark.parametrize(
    ("name", "attention", "options"),
    [
        ("qwen3", "sdpa", {}),
        ("qwen3", "eager", {"normalize": "level", "length_penalty": 0.7}),
        ("llama", "sdpa", {"normalize": "trie"}),
        ("gpt2", "sdpa", {}),
        ("opt", "eager", {}),
    ],
)
def test_replays_equal_eager_searches(tape: type[Tape], name: str, attention: str, options: dict[str, Any]) -> None:
    model, index = make_model(name), make_index(300)
    model.set_attn_implementation(attention)
    eager = rx.SIDRetriever(model, index, beam_width=WIDTHS, **options)
    captured = rx.SIDRetriever(model, index, beam_width=WIDTHS, cuda_graph=True, **options)
    results = [captured.retrieve(*call) for call in calls()]
    for call, got in zip(calls(), results, strict=True):  # last, so that a result that a replay overwrote would show
        assert_same(got, eager.retrieve(*call))
    assert tape.replays == len(results)
    assert len(captured._graphs._graphs) == 1
    got, expected = (way.retrieve(*calls()[0], return_token_logps=True) for way in (captured, eager))
    assert got.token_logps is not None
    torch.testing.assert_close(got.token_logps, expected.token_logps, **close("model"))


def test_a_graph_for_each_shape(tape: type[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    model, index = make_model("qwen3"), make_index(300, eos=2, lengths=True)
    eager = rx.SIDRetriever(model, index, beam_width=9)
    captured = rx.SIDRetriever(model, index, beam_width=9, cuda_graph=True)
    monkeypatch.setattr(graphed, "COLUMNS", 4)
    monkeypatch.setattr(graphed, "MOST_GRAPHS", 2)
    ids, mask = prompts()
    shapes = [(ids, mask, None), (ids[:2], mask[:2], None), (ids[2:], mask[2:], None), (ids, mask, 7), (ids, mask, 7)]
    for (ids, mask, top_k), graphs in zip(shapes, [1, 2, 2, 2, 2], strict=True):
        assert_same(captured.retrieve(ids, mask, top_k), eager.retrieve(ids, mask, top_k))
        assert len(captured._graphs._graphs) == graphs
    assert [key[0] for key in captured._graphs._graphs] == [(1, 4), (3, 8)]


def test_changes_between_calls(tape: type[Tape]) -> None:
    """Of the catalogue, the settings, and the weights, in place and moved; in inference mode and out of it."""
    model, index = make_model("qwen3"), make_index(300)
    captured = rx.SIDRetriever(model, index, beam_width=6, cuda_graph=True)

    def check(**options: Any) -> None:
        eager = rx.SIDRetriever(model, captured.index, **{"beam_width": 6, **options})
        assert_same(captured.retrieve(*prompts()), eager.retrieve(*prompts()))

    with torch.inference_mode():
        check()
    check()
    captured.index = make_index(40)
    assert not captured._graphs._graphs
    check()
    captured.beam_width, captured.normalize = [3, 4, 5], "trie"
    check(beam_width=[3, 4, 5], normalize="trie")
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(-1)
    check(beam_width=[3, 4, 5], normalize="trie")
    weight.data = -2 * weight.data
    before = captured._graphs._graphs.copy()
    check(beam_width=[3, 4, 5], normalize="trie")
    assert [key for key, graph in captured._graphs._graphs.items() if before[key] is not graph]


def test_filters_share_a_graph(tape: type[Tape]) -> None:
    """Every filter of a catalogue replays one graph; that of the whole catalogue stays, and so does its result."""
    model, index = make_model("qwen3"), make_index(300)
    captured = rx.SIDRetriever(model, index, beam_width=WIDTHS, cuda_graph=True)
    whole = captured.retrieve(*prompts())
    (graph,) = captured._graphs._graphs.values()
    filters = [index.restrict(torch.arange(count)) for count in (150, 40, 0)]
    filters += [index.discard(torch.arange(7)), filters[0].restrict(torch.arange(100, 300))]
    results = [captured.retrieve(*prompts(), index=index) for index in filters]
    for index, got in zip(filters, results, strict=True):
        assert_same(got, rx.SIDRetriever(model, index, beam_width=WIDTHS).retrieve(*prompts()))
    assert (results[2].items == -1).all()
    assert len(captured._graphs._graphs) == 2
    assert captured._graphs._graphs[next(iter(captured._graphs._graphs))] is graph
    assert_same(captured.retrieve(*prompts()), whole)
    assert tape.replays == 2 + len(filters)


def test_graphs_of_another_catalogue(tape: type[Tape]) -> None:
    """It has its own, which keep it alive, and which go when the retriever's catalogue is replaced."""
    model = make_model("qwen3")
    captured = rx.SIDRetriever(model, make_index(300), beam_width=6, cuda_graph=True)
    for other in (make_index(40), make_index(41)):
        for index in (other, other.restrict(other.items[::2])):
            expected = rx.SIDRetriever(model, index, beam_width=6).retrieve(*prompts())
            assert_same(captured.retrieve(*prompts(), index=index), expected)
    del other, index
    assert len(captured._graphs._graphs) == 4
    captured.index = captured.index
    assert not captured._graphs._graphs


def assert_same_draws(got: rx.SampleResult, expected: rx.SampleResult) -> None:
    assert got.items.tolist() == expected.items.tolist()
    assert got.sids.tolist() == expected.sids.tolist()
    assert got.counts.tolist() == expected.counts.tolist()
    for name in ("logps", "token_logps", "log_weights", "threshold"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), **close("model"))


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_samples_are_captured(tape: type[Tape], name: str) -> None:
    """Other prompts, seeds, keys and filters replay one graph; another temperature or number has its own."""
    model, index = make_model(name), make_index(300)
    eager = rx.SIDRetriever(model, index, beam_width=5)
    captured = rx.SIDRetriever(model, index, beam_width=5, cuda_graph=True)
    results = [captured.sample(*call, 6, seed) for seed, call in enumerate(calls())]
    for seed, (call, got) in enumerate(zip(calls(), results, strict=True)):
        assert_same_draws(got, eager.sample(*call, 6, seed))
    keys = torch.tensor([5, 5, 7])
    assert_same_draws(captured.sample(*prompts(), 6, 1, keys=keys), eager.sample(*prompts(), 6, 1, keys=keys))
    assert tape.replays == len(results) + 1
    assert len(captured._graphs._graphs) == 1
    for few in (index.restrict(torch.arange(150)), index.discard(torch.arange(7))):
        assert_same_draws(captured.sample(*prompts(), 6, 1, index=few), eager.sample(*prompts(), 6, 1, index=few))
    assert len(captured._graphs._graphs) == 2
    for options in ({"samples": 5}, {"samples": 6, "temperature": 0.7}):
        assert_same_draws(captured.sample(*prompts(), seed=1, **options), eager.sample(*prompts(), seed=1, **options))
    assert_same(captured.retrieve(*prompts()), eager.retrieve(*prompts()))
    assert len(captured._graphs._graphs) == 5


@pytest.mark.parametrize("options", [{"replacement": True}, {"skip_forced": True}, {"on_step": lambda *given: None}])
def test_other_samples_are_not_captured(tape: type[Tape], options: dict[str, Any]) -> None:
    model, index = make_model("qwen3"), make_index(300)
    captured = rx.SIDRetriever(model, index, beam_width=5, cuda_graph=True)
    got = captured.sample(*prompts(), 6, 1, **options)
    assert tape.replays == 0
    assert_same_draws(got, rx.SIDRetriever(model, index, beam_width=5).sample(*prompts(), 6, 1, **options))


def test_on_step_is_not_captured(tape: type[Tape]) -> None:
    states: list[rx.BeamState] = []
    captured = rx.SIDRetriever(make_model("qwen3"), make_index(300), beam_width=6, cuda_graph=True)
    got = captured.retrieve(*prompts(), on_step=lambda level, state: states.append(state))
    assert len(states) == 3
    assert tape.replays == 0
    assert_same(captured.retrieve(*prompts()), got)


def test_a_forward_that_waits_is_refused(tape: type[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3")
    rotary = model.model.rotary_emb
    forward = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda x, ids: forward(x, ids) if int(ids.max()) < 999 else None)
    captured = rx.SIDRetriever(model, make_index(20), beam_width=4, cuda_graph=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cuda_graph = True, but a search with Qwen3ForCausalLM could not be"):
            captured.retrieve(*prompts())
    assert not captured._graphs._graphs


def test_refusals(tape: type[Tape]) -> None:
    index = make_index(20)

    def refuse(model: Any, message: str) -> None:
        with pytest.raises(ValueError, match="cuda_graph = True, but " + message):
            rx.SIDRetriever(model, index, beam_width=4, cuda_graph=True).retrieve(*prompts())

    refuse(make_model("t5"), "T5ForConditionalGeneration is an encoder-decoder")
    refuse(make_model("mistral"), "MistralForCausalLM cannot share a prompt of 7 tokens")
    refuse(torch.compile(make_model("qwen3"), backend="eager"), "the model is compiled")
    flexible = make_model("qwen3")
    flexible.set_attn_implementation("flex_attention")
    refuse(flexible, "the model's attention is 'flex_attention'")
    with torch.autocast("cpu", torch.bfloat16):
        refuse(make_model("qwen3"), "autocast is on")
    with pytest.raises(ValueError, match="cuda_graph = True needs beams that share their prompt"):
        rx.SIDRetriever(make_model("qwen3"), index, beam_width=4, cuda_graph=True, shared_prefix=False)
    captured = rx.SIDRetriever(make_model("qwen3"), index, beam_width=4, cuda_graph=True)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        captured.retrieve(*prompts(), top_k=0)
    with pytest.raises(ValueError, match=r"input_ids\[0, 0\] = 120 is outside"):
        captured.retrieve(torch.full((1, 3), VOCAB))


def test_refused_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="cuda_graph = True, but the model is on cpu"):
        rx.SIDRetriever(make_model("qwen3"), make_index(20), beam_width=4, cuda_graph=True).retrieve(*prompts())


class NoCopies(TorchDispatchMode):
    """An error for what a capture does not allow: a copy between the CPU and the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves([args, outputs]) if isinstance(x, Tensor)]
        if "copy" in func.overloadpacket.__name__ and len({x.device for x in tensors}) > 1:
            raise AssertionError(f"{func} between {[x.device for x in tensors]}")
        return outputs


@pytest.mark.parametrize("normalize", ["vocab", "level", "trie"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_no_value_is_needed(name: str, attention: str, normalize: str) -> None:
    """The code that a GPU runs, on tensors without values: everything lies on one device, and nothing looks at it."""
    model, index = make_model(name, torch.bfloat16).to("meta"), copy(make_index(300))
    index.data = index.data.to("meta")
    model.set_attn_implementation(attention)
    ids, mask = (torch.zeros(3, 64, dtype=dtype, device="meta") for dtype in (torch.int64, torch.bool))
    for top_k in (None, 7):
        for head in (model_head(model), None):
            with NoCopies(), torch.no_grad():
                got = head_beam_search(
                    CapturedDecoder(model, head, ids, mask, sum(WIDTHS[:-1])),
                    index,
                    head,
                    batch_size=3,
                    beam_width=WIDTHS,
                    normalize=normalize,
                    length_penalty=0.7,
                    top_k=top_k,
                    skip_forced=False,
                    return_token_logps=True,
                )
            rows = top_k or 12
            assert [tuple(part.shape) for part in got] == [(3, rows), (3, rows), (3, rows, 3), (3, rows, 3)]
            assert {part.device.type for part in got} == {"meta"}
