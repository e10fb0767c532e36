"""Searches with a model of Qwen3-0.6B's shapes and random weights on a GPU, a part of ``benchmarks.gpu.bench``.

``call_ms`` is the time of a whole ``retrieve`` on the host's clock: captured in a graph, launch by launch, and with a
row of the KV cache a beam, which follows the beams as in ``generate``; and of transformers' ``generate`` itself, with
our processor for the catalogue and without any constraint, which no constrained ``generate`` can be faster than.
``graph_ms`` is the search's on the GPU alone,
``model_ms`` that of the same forwards without a search, masks ready: the body over the prompt and over each level's
beams, and its head's product with the rows that the support needs, the vocabulary's or the level's. What is left is the
time outside the model. The floor is the larger of the bytes of weights over a copy's bandwidth and of the weights'
products over a large product's rate, for each forward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import raddpo_ext as rx
from benchmarks.gpu.timing import graph_us
from benchmarks.harness.report import markdown
from raddpo_ext.bench import catalogues
from raddpo_ext.bench.retriever import generate

PROMPT, LEVELS, CODES, ITEMS, TOP_K = 256, 3, 8192, 10_000_000, 10
VOCAB = 151_936
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
CASES = [
    *((batch, width, "vocab") for batch in (1, 8) for width in (50, 200, 512)),
    *((8, 512, normalize) for normalize in ("level", "trie")),
]
WAYS: dict[str, dict[str, Any]] = {
    "captured": {"cuda_graph": True},
    "eager": {},
    "reordered": {"shared_prefix": False},
}
GENERATE = 50  # beams, at most, that generate is measured with
CALLS = 5
TILES = {"tiles of 32 MiB": 1 << 25, "tiles of 256 MiB": 1 << 28}


def make_model() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("cuda"):
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE)).to(torch.bfloat16).eval()


def make_index() -> rx.TrieIndex:
    vocab = rx.SIDVocab([CODES] * LEVELS, offset=VOCAB - LEVELS * CODES)
    return rx.TrieIndex.build(catalogues.uniform(ITEMS, CODES, LEVELS), vocab=vocab).to("cuda")


def make_prompts(batch: int) -> tuple[Tensor, Tensor]:
    """Of one length, so that no way of decoding computes more than another."""
    ids = torch.randint(VOCAB - LEVELS * CODES, (batch, PROMPT), device="cuda")
    return ids, torch.ones_like(ids, dtype=torch.bool)


def call_ms(call: Callable[[], Any]) -> dict[str, Any]:
    """Median time of a call, and the memory that it needs beside what lay there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    try:
        for _ in range(2 + CALLS):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
    except torch.OutOfMemoryError:
        return {"ms": None, "peak_bytes": None}
    return {"ms": statistics.median(times[2:]), "peak_bytes": torch.cuda.max_memory_allocated() - before}


def generated(model: Any, index: rx.TrieIndex, ids: Tensor, width: int, constrained: bool) -> Tensor:
    processor = rx.TrieLogitsProcessor(index, prompt_length=ids.shape[1], num_beams=width)
    processors = [processor] if constrained else []
    return generate(model, ids, width=width, levels=LEVELS, top_k=TOP_K, logits_processor=processors)


def head_rows(normalize: str, level: int, weight: Tensor, index: rx.TrieIndex) -> Tensor:
    return weight if normalize == "vocab" else weight[index.level_tokens(level)]


def model_us(model: Any, index: rx.TrieIndex, ids: Tensor, mask: Tensor, width: int, normalize: str) -> float:
    """Time of a search's forwards and nothing else."""
    from raddpo_ext.integrations.base_model import model_head
    from raddpo_ext.integrations.graphed import CapturedDecoder

    head, fed = model_head(model), (LEVELS - 1) * width
    ready = CapturedDecoder(model, head, ids, mask, fed)
    options = {"dtype": torch.bool, "device": "cuda"}
    steps = [(ids, ready.prompt_mask(), torch.arange(PROMPT, device="cuda").expand_as(ids))]
    for level in range(1, LEVELS):
        sees = torch.ones(len(ids), width, PROMPT + (level - 1) * width, **options)
        sees = torch.cat([sees, torch.eye(width, **options).expand(len(ids), -1, -1)], 2)
        tokens = index.level_tokens(level - 1).start + torch.randint(CODES, (len(ids), width), device="cuda")
        steps.append((tokens, ready.attention_mask(sees), torch.full_like(tokens, PROMPT + level - 1)))

    def forwards(_: Tensor) -> None:
        decoder = CapturedDecoder(model, head, ids, mask, fed)
        for level, step in enumerate(steps):
            states = decoder.forward(*step)
            F.linear(states[:, -1:] if level == 0 else states, head_rows(normalize, level, head.weight, index))

    return graph_us(forwards, [ids], 1)


def search_us(model: Any, index: rx.TrieIndex, ids: Tensor, mask: Tensor, width: int, normalize: str) -> float:
    from raddpo_ext.integrations.base_model import model_head
    from raddpo_ext.integrations.graphed import CapturedDecoder

    head = model_head(model)
    options: dict[str, Any] = {"batch_size": len(ids), "beam_width": width, "normalize": normalize, "top_k": TOP_K}

    def search(_: Tensor) -> None:
        decoder = CapturedDecoder(model, head, ids, mask, (LEVELS - 1) * width)
        rx.beam_search(decoder, index, **options, **head._asdict())

    return graph_us(search, [ids], 1)


def floor_us(model: Any, batch: int, width: int, normalize: str, bandwidth: float, rate: float) -> float:
    weight = model.lm_head.weight
    body = sum(x.numel() for x in model.parameters()) - weight.numel()  # the embedding, which is the head too
    head = weight.shape[1] * (VOCAB if normalize == "vocab" else CODES)
    seconds = 0.0
    for fed, states in [(batch * PROMPT, batch)] + [(batch * width, batch * width)] * (LEVELS - 1):
        for parameters, rows in ((body, fed), (head, states)):
            seconds += max(weight.element_size() * parameters / bandwidth, 2 * parameters * rows / rate)
    return 1e6 * seconds


def measure_search(
    model: Any, index: rx.TrieIndex, case: tuple[int, int, str], bandwidth: float, rate: float
) -> dict[str, Any]:
    batch, width, normalize = case
    ids, mask = make_prompts(batch)
    arguments = (model, index, ids, mask, width, normalize)
    search, forwards = search_us(*arguments), model_us(*arguments)
    ways = {}
    for name, options in WAYS.items():
        retriever = rx.SIDRetriever(model, index, beam_width=width, normalize=normalize, **options)
        ways[name] = call_ms(partial(retriever.retrieve, ids, mask, TOP_K))
        del retriever
        torch.cuda.empty_cache()
    if width <= GENERATE:
        for name, constrained in (("generate", True), ("generate without a constraint", False)):
            ways[name] = call_ms(partial(generated, model, index, ids, width, constrained))
            torch.cuda.empty_cache()
    return {
        "batch": batch,
        "beam_width": width,
        "normalize": normalize,
        "call": ways,
        "graph_ms": 1e-3 * search,
        "model_ms": 1e-3 * forwards,
        "floor_ms": 1e-3 * floor_us(model, batch, width, normalize, bandwidth, rate),
    }


def measure_step(model: Any, index: rx.TrieIndex, batch: int, width: int, level: int) -> dict[str, Any]:
    """A beam step from hidden states in each way, beside the head's bare product and the step from its logits."""
    import sys

    module = sys.modules["raddpo_ext.decoding.linear_beam_step"]
    weight = model.lm_head.weight
    hidden = [torch.randn(batch, width, weight.shape[1], device="cuda", dtype=weight.dtype) for _ in range(4)]
    state = rx.BeamState.start(index, batch)
    for depth in range(level):
        states = torch.randn(*state.nodes.shape, weight.shape[1], device="cuda", dtype=weight.dtype)
        state = rx.linear_beam_step(states, weight, state, index, width, level=depth, normalize="trie")

    def linear(states: Tensor, normalize: str) -> rx.BeamState:
        return rx.linear_beam_step(states, weight, state, index, width, normalize=normalize, level=level)

    result: dict[str, Any] = {"batch": batch, "beam_width": width, "level": level}
    result["product_us"] = graph_us(lambda states: F.linear(states, weight), hidden, 4)
    result["dense_us"] = graph_us(lambda states: rx.beam_step(F.linear(states, weight), state, index, width), hidden, 4)
    saved = module._TILE_BYTES, module._level_is_cheaper, module._queries_at_once
    try:
        result["vocab"] = graph_us(partial(linear, normalize="vocab"), hidden, 4)
        module._queries_at_once = lambda *_: 0
        for name, size in TILES.items():
            module._TILE_BYTES = size
            result[f"vocab, {name}"] = graph_us(partial(linear, normalize="vocab"), hidden, 4)
        result["level support"] = graph_us(partial(linear, normalize="level"), hidden)
        for name, chosen in (("children", False), ("level's product", True)):
            module._level_is_cheaper = lambda *_, chosen=chosen: chosen
            result[f"trie, {name}"] = graph_us(partial(linear, normalize="trie"), hidden)
    finally:
        module._TILE_BYTES, module._level_is_cheaper, module._queries_at_once = saved
    return result | {"trie takes the level's": module._level_is_cheaper(hidden[0].flatten(0, 1), index, level)}


def search_table(rows: list[dict[str, Any]]) -> str:
    ways = list(dict.fromkeys(way for row in rows for way in row["call"]))
    head = ["B", "W", "support", *(f"{way} ms" for way in ways), "graph ms", "model ms", "outside", "floor ms"]
    head += [f"{way} GB" for way in WAYS]
    lines = []
    for row in rows:
        line = [str(row["batch"]), str(row["beam_width"]), row["normalize"]]
        for way in ways:
            ms = row["call"][way]["ms"] if way in row["call"] else 0
            line.append("" if ms == 0 else "no memory" if ms is None else f"{ms:.2f}")
        line += [f"{row['graph_ms']:.2f}", f"{row['model_ms']:.2f}", f"{1 - row['model_ms'] / row['graph_ms']:.1%}"]
        line += [f"{row['floor_ms']:.2f}"]
        line += [f"{(row['call'][way]['peak_bytes'] or 0) / 1e9:.2f}" for way in WAYS]
        lines.append(line)
    return markdown(head, lines)


def step_table(rows: list[dict[str, Any]]) -> str:
    return markdown(
        list(rows[0]), [[f"{x:.1f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    )


@torch.no_grad()
def measure_all(bandwidth: float, rate: float, result: dict[str, Any], write: Callable[[], None]) -> str:
    """Every case, written as it ends; the tables."""
    model, index = make_model(), make_index()
    searches: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    result |= {"retriever": searches, "linear_steps": steps}
    for case in CASES:
        searches.append(measure_search(model, index, case, bandwidth, rate))
        write()
        print(search_table(searches).splitlines()[-1], flush=True)
        torch.cuda.empty_cache()
    for batch, width, level in ((1, 50, 1), (1, 50, 2), (8, 512, 1), (8, 512, 2)):
        steps.append(measure_step(model, index, batch, width, level))
        write()
        print(step_table(steps).splitlines()[-1], flush=True)
    return f"{search_table(searches)}\n\n{step_table(steps)}"
