"""SIDRetriever on a CUDA device: beams that share their prompt, and searches in a graph, against the CPU's result."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.on_gpu import NEEDS_GPU, REPEATS
from support.tolerances import close

pytest.importorskip("transformers")

from test_graphed import WIDTHS, calls
from test_retriever import make_index, make_model, prompts, shared_model
from transformers import Qwen3Config, Qwen3ForCausalLM

import raddpo_ext as rx

pytestmark = [*NEEDS_GPU, pytest.mark.usefixtures("probed_once")]


def assert_close(got: rx.BeamResult, expected: rx.BeamResult) -> None:
    """Up to near ties: the items at each rank may differ only where their scores do not."""
    assert got.items.device.type == "cuda"
    torch.testing.assert_close(got.scores.cpu(), expected.scores, rtol=1e-3, atol=1e-3)
    assert [len(set(row)) for row in got.items.tolist()] == [len(set(row)) for row in expected.items.tolist()]


def on_cpu(name: str, **options: Any) -> list[rx.BeamResult]:
    retriever = rx.SIDRetriever(shared_model(name), make_index(300), beam_width=WIDTHS, **options)
    return [retriever.retrieve(*call) for call in calls()]


def on_gpu(retriever: rx.SIDRetriever) -> list[rx.BeamResult]:
    return [retriever.retrieve(ids.cuda(), mask.cuda()) for ids, mask in calls()]


@pytest.mark.parametrize("normalize", ["vocab", "level", "trie"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("shared", [True, False])
def test_attention(attention: str, normalize: str, shared: bool) -> None:
    # FlexAttention's kernels take heads of 16 and more.
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=120, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    model, index = Qwen3ForCausalLM(config).eval(), make_index(300)
    ids, mask = prompts()
    expected = rx.SIDRetriever(model, index, beam_width=WIDTHS, normalize=normalize).retrieve(ids, mask)
    model = model.cuda()
    model.set_attn_implementation(attention)
    retriever = rx.SIDRetriever(model, index.to("cuda"), beam_width=WIDTHS, normalize=normalize, shared_prefix=shared)
    assert_close(retriever.retrieve(ids.cuda(), mask.cuda()), expected)


@pytest.mark.parametrize("options", [{}, {"normalize": "level", "length_penalty": 0.7}, {"normalize": "trie"}])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "opt"])
def test_graph(name: str, attention: str, options: dict[str, Any]) -> None:
    model = make_model(name).cuda()
    model.set_attn_implementation(attention)
    retriever = rx.SIDRetriever(model, make_index(300).to("cuda"), beam_width=WIDTHS, cuda_graph=True, **options)
    for got, expected in zip(on_gpu(retriever), on_cpu(name, **options), strict=True):
        assert_close(got, expected)
    assert len(retriever._graphs._graphs) == 1


def test_graph_of_samples() -> None:
    """One graph for all seeds and prompts."""
    model, index = make_model("qwen3"), make_index(300)
    ids, mask = prompts()
    batches = [(ids, mask), ((ids + 11) % 50, mask.flip(0))]
    eager = rx.SIDRetriever(model, index, beam_width=4)
    expected = [eager.sample(*batch, 6, seed) for seed, batch in enumerate(batches)]
    retriever = rx.SIDRetriever(make_model("qwen3").cuda(), index.to("cuda"), beam_width=4, cuda_graph=True)
    for seed, (batch, drawn) in enumerate(zip(batches, expected, strict=True)):
        got = retriever.sample(*(x.cuda() for x in batch), 6, seed)
        assert got.items.tolist() == drawn.items.tolist()
        torch.testing.assert_close(got.logps.cpu(), drawn.logps, rtol=1e-3, atol=1e-3)
    assert len(retriever._graphs._graphs) == 1


def test_graph_of_half_precision() -> None:
    model, index = make_model("qwen3", torch.bfloat16).cuda(), make_index(300).to("cuda")
    eager, captured = (rx.SIDRetriever(model, index, beam_width=12, cuda_graph=way) for way in (False, True))
    for one, other in zip(on_gpu(captured), on_gpu(eager), strict=True):
        torch.testing.assert_close(one.scores[:, 0], other.scores[:, 0], **close("model", torch.bfloat16))


def test_graphs_of_several_shapes_and_catalogues() -> None:
    """They share their memory; replays in any order, and with another catalogue, give each its own result."""
    model, ids, mask = make_model("qwen3"), *prompts()
    shapes = [(ids, mask, None), (ids[:1], mask[:1], 7), (ids.repeat(2, 8), mask.repeat(2, 8), None)]
    first, second = make_index(300), make_index(40)
    expected = [
        [rx.SIDRetriever(model, index, beam_width=9).retrieve(*shape) for shape in shapes] for index in (first, second)
    ]
    model = model.cuda()
    retriever = rx.SIDRetriever(model, first.to("cuda"), beam_width=9, cuda_graph=True)
    for index, results in ((first, expected[0]), (second, expected[1])):
        retriever.index = index.to("cuda")
        for turn in (0, 1, 2, 2, 0, 1):
            ids, mask, top_k = shapes[turn]
            assert_close(retriever.retrieve(ids.cuda(), mask.cuda(), top_k), results[turn])


def test_a_graph_keeps_the_current_stream() -> None:
    retriever = rx.SIDRetriever(
        make_model("qwen3").cuda(), make_index(300).to("cuda"), beam_width=WIDTHS, cuda_graph=True
    )
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results = on_gpu(retriever)
        assert torch.cuda.current_stream() == stream
    stream.synchronize()
    for got, expected in zip(results, on_cpu("qwen3"), strict=True):
        assert_close(got, expected)


def test_a_graph_among_threads() -> None:
    """Each on a stream of its own; the searches follow one another."""
    retriever = rx.SIDRetriever(
        make_model("qwen3").cuda(), make_index(300).to("cuda"), beam_width=WIDTHS, cuda_graph=True
    )
    expected = on_gpu(retriever)
    wrong: list[int] = []

    def work(turn: int) -> None:
        ids, mask = calls()[turn]
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(REPEATS // 2):
                got = retriever.retrieve(ids.cuda(), mask.cuda())
                if got.scores.tolist() != expected[turn].scores.tolist():
                    wrong.append(turn)

    torch.cuda.synchronize()
    workers = [threading.Thread(target=work, args=(turn,)) for turn in range(len(expected))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_filters_among_threads() -> None:
    """Each searches under filters of its own; one graph serves them all, and the whole catalogue's stays."""
    model, index, call = make_model("qwen3"), make_index(300), prompts()
    allowed = [torch.arange(20 * turn, 150 + 10 * turn) for turn in range(4)]
    expected = [rx.SIDRetriever(model, index.restrict(ids), beam_width=WIDTHS).retrieve(*call) for ids in allowed]
    whole = rx.SIDRetriever(model, index, beam_width=WIDTHS).retrieve(*call)
    ids, mask = (x.cuda() for x in call)
    retriever = rx.SIDRetriever(model.cuda(), index.to("cuda"), beam_width=WIDTHS, cuda_graph=True)
    assert_close(retriever.retrieve(ids, mask), whole)
    (first,) = retriever._graphs._graphs.values()
    wrong: list[Exception] = []

    def work(turn: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(REPEATS // 2):
                    filtered = retriever.index.restrict(allowed[turn])
                    assert_close(retriever.retrieve(ids, mask, index=filtered), expected[turn])
        except Exception as error:
            wrong.append(error)

    torch.cuda.synchronize()
    workers = [threading.Thread(target=work, args=(turn,)) for turn in range(len(allowed))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert len(retriever._graphs._graphs) == 2
    assert first in retriever._graphs._graphs.values()
    assert_close(retriever.retrieve(ids, mask), whole)
