"""SIDRetriever against ``generate`` of transformers, whole retrievals on one CPU thread::

    python -m benchmarks.peers.compare_retriever
    python -m benchmarks.peers.compare_retriever --quick --cases head

The model is a stock Qwen3 of transformers with random weights (hidden size 512, 4 layers, 8 heads of 64, as many for
keys and values, intermediate size 1536, V = 152k, float32), the catalogue the real ``industrial`` one. ``generate``
has the constraint in Python as its users write it (``prefix_allowed_tokens_fn`` over a dictionary of prefixes).
``reordered`` is SIDRetriever with a row of the KV cache a beam: ``shared_prefix=False``.

Cases run in fresh processes, methods take turns in them. Before, all are checked to give the same scores to 1e-5
relative and, but for items whose scores are that close, the same items. Times are medians over rounds, ratios medians
of each round's. Bytes of the cache are what its tensors hold after the last step; memory is the process's peak during a
call over what it held before. The floor is arithmetic: operations of the matrix products that shared beams need.

``head`` cases time one step alone, from hidden states: the product with the whole head and ``beam_step``, against
``linear_beam_step``. Their floor is the bare product with the rows that the softmax's support needs (with
``normalize="trie"`` the level's rows, of which only the children's are).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.harness import catalogues, report, results
from benchmarks.harness.report import MIB
from benchmarks.harness.timing import methods_costs
from raddpo_ext.bench.retriever import agree, children_of, generate, random_model
from raddpo_ext.integrations import decoders

MODULE = "benchmarks.peers.compare_retriever"
VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, HEAD_DIM = 151_936, 512, 1536, 4, 8, 64
CODES, FIRST = 256, 151_000  # of a level; token id of the first code
NORMALIZE = ("vocab", "level", "trie")
TOLERANCE = 1e-5  # relative


@dataclass(frozen=True)
class Case:
    """``batch`` prompts of ``prompt`` tokens and ``width`` beams; a case without a prompt is a step alone."""

    prompt: int
    width: int
    batch: int
    generate: bool = False
    dtype: str = "float32"

    @property
    def name(self) -> str:
        kind = f"prompt={self.prompt}" if self.prompt else f"head {self.dtype}"
        return f"{kind} W={self.width} batch={self.batch}"


CASES = [Case(256, 50, 4, generate=True)]
CASES += [Case(prompt, width, 1) for prompt in (64, 256, 1024) for width in (10, 50, 200)]
CASES += [Case(0, 50, 4, dtype=dtype) for dtype in ("float32", "bfloat16")]


def catalogue() -> rx.TrieIndex:
    sids = catalogues.real("industrial")
    return rx.TrieIndex.build(sids, vocab=rx.SIDVocab([CODES] * sids.shape[1], offset=FIRST))


class Search:
    """The model, the catalogue and prompts, and a retrieval by method: ``(scores [B, W], tokens or SIDs)``."""

    def __init__(self, case: Case) -> None:
        self.case, self.model, self.index = case, random_model(VOCAB, HIDDEN, LAYERS), catalogue()
        generator = torch.Generator().manual_seed(1)
        self.prompts = torch.randint(FIRST, (case.batch, case.prompt), generator=generator)
        assert self.index.vocab is not None
        self.children = children_of(self.index.vocab.encode(catalogues.real("industrial")).tolist())

    def retriever(self, normalize: str, shared: bool) -> rx.SIDRetriever:
        return rx.SIDRetriever(
            self.model, self.index, beam_width=self.case.width, normalize=normalize, shared_prefix=shared
        )

    def generate(self) -> tuple[Tensor, Tensor]:
        length = self.prompts.shape[1]
        found = generate(
            self.model,
            self.prompts,
            width=self.case.width,
            levels=self.index.levels,
            prefix_allowed_tokens_fn=lambda _, row: self.children[tuple(row[length:].tolist())],
            return_dict_in_generate=True,
            output_scores=True,
        )
        levels = torch.arange(self.index.levels)
        sids = found.sequences[:, length:] - FIRST - CODES * levels
        return found.sequences_scores.view(self.case.batch, -1), sids.view(self.case.batch, -1, len(levels))

    def operations(self, normalize: str) -> float:
        """Of the products that shared beams need; a position meets every key before it."""
        case, steps = self.case, self.index.levels - 1
        width = HEADS * HEAD_DIM
        layer = 4 * HIDDEN * width + 3 * HIDDEN * INTERMEDIATE
        tokens = case.prompt + steps * case.width
        keys = case.prompt * case.prompt / 2 + case.width * steps * (case.prompt + (steps + 1) / 2)
        rows = {"vocab": VOCAB, "level": CODES, "trie": 0}[normalize] * (1 + steps * case.width)
        return 2.0 * case.batch * (LAYERS * (tokens * layer + 2 * width * keys) + rows * HIDDEN)


def work(case: Case, rounds: int) -> dict[str, Any]:
    """One process's measurements: seconds by method, one a round."""
    return retrieval(case, rounds) if case.prompt else step(case, rounds)


@torch.no_grad()
def retrieval(case: Case, rounds: int) -> dict[str, Any]:
    search = Search(case)
    methods: dict[str, Callable[[], Any]] = {}
    held: dict[str, int] = {}
    for normalize in ("vocab", "level"):
        for shared in (True, False):
            retriever = search.retriever(normalize, shared)
            name = f"{'shared' if shared else 'reordered'} {normalize}"
            methods[name] = lambda retriever=retriever: retriever.retrieve(search.prompts)
            if normalize == "vocab":
                held[name.split()[0]] = cache_bytes(methods[name])
        ours, theirs = (methods[f"{kind} {normalize}"]() for kind in ("shared", "reordered"))
        agree((theirs.scores, theirs.sids), (ours.scores, ours.sids), TOLERANCE)
    if case.generate:
        methods["generate"] = search.generate
        found = methods["shared vocab"]()
        agree(search.generate(), (found.scores, found.sids), TOLERANCE)
    costs = methods_costs(methods, rounds)
    gflop = {normalize: search.operations(normalize) / 1e9 for normalize in ("vocab", "level")}
    return {**costs, "cache_bytes": held, "gflop": gflop}


def cache_bytes(retrieve: Callable[[], Any]) -> int:
    """Bytes of keys and values after the last step."""
    kept: list[Any] = []
    forward = decoders.Decoder.forward

    def watched(self: decoders.Decoder, *args: Any, **kwargs: Any) -> Tensor:
        states = forward(self, *args, **kwargs)
        kept[:] = self.cache.layers
        return states

    decoders.Decoder.forward = watched
    try:
        retrieve()
    finally:
        decoders.Decoder.forward = forward
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in kept)


@torch.no_grad()
def step(case: Case, rounds: int) -> dict[str, Any]:
    """Of the last level, whose beams are the best of the level before by random scores."""
    index, dtype = catalogue(), getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype)
    hidden = torch.randn(case.batch, case.width, HIDDEN, generator=generator).to(dtype)
    state = rx.BeamState.start(index, case.batch)
    for _ in range(index.levels - 1):
        logits = torch.randn(*state.nodes.shape, VOCAB, generator=generator)
        state = rx.beam_step(logits, state, index, case.width)
    rows = hidden.view(-1, HIDDEN)
    methods: dict[str, Callable[[], Any]] = {}
    for normalize in NORMALIZE:
        options = {"normalize": normalize}
        dense = lambda options=options: rx.beam_step(hidden @ weight.T, state, index, case.width, **options)  # noqa: E731
        fused = lambda options=options: rx.linear_beam_step(  # noqa: E731
            hidden, weight, state, index, case.width, level=index.levels - 1, **options
        )
        atol = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(fused().scores, dense().scores, rtol=0, atol=atol)
        needed = weight if normalize == "vocab" else weight[index.level_tokens(index.levels - 1)]
        out = torch.empty(len(rows), len(needed), dtype=dtype)
        methods[f"dense {normalize}"], methods[f"fused {normalize}"] = dense, fused
        methods[f"floor {normalize}"] = lambda needed=needed, out=out: torch.mm(rows, needed.T, out=out)
    return methods_costs(methods, 5 * rounds)


def summary(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds of all processes, ratios within each round first."""
    seconds = {name: [x for run in runs for x in run["seconds"][name]] for name in runs[0]["seconds"]}

    def ratio(slow: str, fast: str) -> dict[str, float]:
        ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
        return {"median": median(ratios), "least": min(ratios), "most": max(ratios)}

    found: dict[str, Any] = {"case": case.name}
    found["costs"] = {
        name: {
            "ms": 1e3 * median(times),
            "cpu_ms": 1e3 * median(run["cpu_seconds"][name] for run in runs),
            "peak_bytes": median(run["peak_bytes"][name] for run in runs),
        }
        for name, times in seconds.items()
    }
    pairs = []
    for normalize in ("vocab", "level") if case.prompt else NORMALIZE:
        if case.prompt:
            slower = ["generate"] * case.generate + [f"reordered {normalize}"]
            pairs += [(slow, f"shared {normalize}") for slow in slower]
        else:
            pairs += [(f"dense {normalize}", f"fused {normalize}"), (f"fused {normalize}", f"floor {normalize}")]
    if case.prompt:
        found |= {name: runs[0][name] for name in ("cache_bytes", "gflop")}
    found["ratios"] = {f"{slow} / {fast}": ratio(slow, fast) for slow, fast in pairs}
    return found


def is_retrieval(cell: dict[str, Any]) -> bool:
    """Else it is a step alone."""
    return "cache_bytes" in cell


def markdown(cells: list[dict[str, Any]]) -> str:
    """Tables of whole retrievals, and of steps."""
    tables = []
    searches = [cell for cell in cells if is_retrieval(cell)]
    if searches:
        head = ["case", "normalize", "ms", "generate / ours", "reordered / ours"]
        head += ["cache MiB", "reordered", "GFLOP", "GFLOP/s"]
        rows = []
        for result in searches:
            for normalize in ("vocab", "level"):
                ours = f"shared {normalize}"
                ms = result["costs"][ours]["ms"]
                rows.append(
                    [
                        result["case"] if normalize == "vocab" else "",
                        normalize,
                        f"{ms:.0f}",
                        times(result, f"generate / {ours}"),
                        times(result, f"reordered {normalize} / {ours}"),
                        f"{result['cache_bytes']['shared'] / MIB:.1f}",
                        f"{result['cache_bytes']['reordered'] / MIB:.1f}",
                        f"{result['gflop'][normalize]:.1f}",
                        f"{1e3 * result['gflop'][normalize] / ms:.0f}",
                    ]
                )
        tables += [report.markdown(head, rows), report.costs_markdown(searches)]
    steps = [cell for cell in cells if not is_retrieval(cell)]
    if steps:
        rows = [
            [
                result["case"] if normalize == "vocab" else "",
                normalize,
                f"{result['costs'][f'fused {normalize}']['ms']:.2f}",
                times(result, f"dense {normalize} / fused {normalize}"),
                times(result, f"fused {normalize} / floor {normalize}"),
            ]
            for result in steps
            for normalize in NORMALIZE
        ]
        tables.append(report.markdown(["case", "normalize", "ms", "dense step / ours", "ours / bare product"], rows))
        tables.append(report.costs_markdown(steps))
    return "\n\n".join(tables)


def times(result: dict[str, Any], name: str) -> str:
    if name not in result["ratios"]:
        return ""
    ratio = result["ratios"][name]
    return f"{ratio['median']:.2f}x ({ratio['least']:.2f}-{ratio['most']:.2f})"


def main() -> None:
    parser = report.parser(MODULE, __doc__, processes=2)
    parser.add_argument("--rounds", type=int, default=3, help="rounds a process (3)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # a case; JSON
    args = parser.parse_args()
    if args.worker is not None:
        torch.set_num_threads(1)
        print(json.dumps(work(CASES[args.worker], args.rounds)))
        return
    if not catalogues.present("industrial"):
        raise SystemExit(f"no industrial catalogue under {catalogues.DATA}; RADDPO_DATA names the folder")
    chosen = report.choose(parser, CASES, args.cases)[slice(1, 2) if args.quick else slice(None)]
    processes, rounds = (1, 1) if args.quick else (args.processes, args.rounds)
    environment = {**report.environment(MODULE), "threads": 1, "processes": processes, "rounds": rounds}
    cells: list[dict[str, Any]] = []
    for i in chosen:
        runs = [report.run_fresh(MODULE, "--worker", str(i), "--rounds", str(rounds)) for _ in range(processes)]
        cells.append(summary(CASES[i], runs))
        print(markdown(cells[-1:]), flush=True)
        if args.out:
            results.write(args.out, {MODULE: environment | {"results": cells}})
    print(markdown(cells))


if __name__ == "__main__":
    main()
