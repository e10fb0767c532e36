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
call over what it held before. The floor is the operations of the matrix products that shared beams need, at the rate
of the faster of two bare products, a layer's and the head's.

``head`` cases time one step alone, from hidden states: the product with the whole head and ``beam_step``, against
``linear_beam_step``. Their floor is the bare product with the rows that the softmax's support needs (with
``normalize="trie"`` the level's rows, of which only the children's are).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from torch import Tensor

from benchmarks.harness import cases as harness
from benchmarks.harness import catalogues, report
from benchmarks.harness.report import MIB
from benchmarks.harness.timing import methods_costs
from benchmarks.peers.constraints import KINDS
from benchmarks.peers.onednn import SUFFIX, by_onednn
from benchmarks.peers.retriever_cases import CASES, NORMALIZE, Case, Search, constraint_methods, head_methods
from raddpo_ext.bench.retriever import agree
from raddpo_ext.integrations import decoders

MODULE = "benchmarks.peers.compare_retriever"
TOLERANCE = 1e-5  # relative


def work(case: Case, rounds: int) -> dict[str, Any]:
    """One process's measurements: seconds by method, one a round."""
    if case.kind == "retrieval":
        return retrieval(case, rounds)
    methods = head_methods(case) if case.kind == "head" else constraint_methods(case)
    return methods_costs(methods, 5 * rounds)


@torch.no_grad()
def retrieval(case: Case, rounds: int) -> dict[str, Any]:
    search = Search(case)
    methods: dict[str, Callable[[], Any]] = {}
    held: dict[str, int] = {}
    for normalize in case.supports:
        for shared in (True, False):
            retriever = search.retriever(normalize, shared)
            name = f"{'shared' if shared else 'reordered'} {normalize}"
            methods[name] = lambda retriever=retriever: retriever.retrieve(search.prompts)
            if normalize == "vocab":
                held[name.split()[0]] = cache_bytes(methods[name])
        ours, theirs = (methods[f"{kind} {normalize}"]() for kind in ("shared", "reordered"))
        agree((theirs.scores, theirs.sids), (ours.scores, ours.sids), TOLERANCE)
    for name, kind in case.peers.items():
        methods[name] = lambda kind=kind: search.generate(kind)
        if kind:
            found = methods["shared vocab"]()
            agree(search.generate(kind), (found.scores, found.sids), TOLERANCE)
    for name in case.onednn:
        methods[name + SUFFIX] = by_onednn(search.model, methods[name])
    costs = methods_costs(methods, rounds)
    gflop = {normalize: search.operations(normalize) / 1e9 for normalize in case.supports}
    return {**costs, "cache_bytes": held, "gflop": gflop, "gflop_per_s": search.product_rate() / 1e9}


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
    if case.kind == "retrieval":
        found |= {name: runs[0][name] for name in ("cache_bytes", "gflop")}
        found["gflop_per_s"] = max(run["gflop_per_s"] for run in runs)
    pairs = _pairs(case)
    found["ratios"] = {f"{slow} / {fast}": ratio(slow, fast) for slow, fast in pairs}
    return found


def _pairs(case: Case) -> list[tuple[str, str]]:
    """What is divided by what."""
    if case.kind == "constraint":
        return [(kind, KINDS[0]) for kind in KINDS[1:]]
    pairs = [(f"generate{with_it}", name + SUFFIX) for name in case.onednn[1:] for with_it in ("", SUFFIX)]
    for normalize in case.supports:
        if case.kind == "retrieval":
            pairs += [(slow, f"shared {normalize}") for slow in (*case.peers, f"reordered {normalize}")]
        else:
            pairs += [(f"dense {normalize}", f"fused {normalize}"), (f"fused {normalize}", f"floor {normalize}")]
    return pairs + [(name, "generate") for name in case.peers if name != "generate"]


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
            for normalize in result["gflop"]:
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


def run(module: str, text: str, cases: list[Case], tables: Callable[[list[dict[str, Any]]], str]) -> None:
    """The program of ``python -m <module>``, whose documentation is ``text``."""

    def check() -> None:
        if not catalogues.present("industrial"):
            raise SystemExit(f"no industrial catalogue under {catalogues.DATA}; RADDPO_DATA names the folder")

    harness.run(
        module,
        text,
        cases,
        work=work,
        summary=summary,
        tables=tables,
        processes=2,
        quick=slice(1, 2),
        check=check,
    )


if __name__ == "__main__":
    run(MODULE, __doc__, CASES, markdown)
