"""beam_step, token_logps and whole searches on a GPU: ``python -m benchmarks.gpu.bench``.

Each step of a search is captured in a CUDA graph over several sets of logits, together larger than the L2 cache, and
the graph is replayed: a step's time is the median replay's over its number of steps. Beside it stands the floor, the
bytes of logits read over the bandwidth of a large copy, and row_lse, which reads every row whole and does nothing else.
``warm`` is the time over one set of logits, which stay in the cache as they do right behind a model's last layer.
token_logps is timed likewise, forward and backward, the gradient in storage of its own and in place; its floors are the
bytes that each must read and write. Searches with a model: gpu_retriever; whole losses beside TRL: gpu_losses.
The result is written after every step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.gpu import losses as gpu_losses
from benchmarks.gpu import retriever as gpu_retriever
from benchmarks.gpu.report import gpu_environment, kernel_name, require_gpu
from benchmarks.gpu.timing import STEPS, copy_bandwidth, graph_us, product_rate
from benchmarks.harness import results
from benchmarks.harness.report import RESULTS, markdown
from raddpo_ext.bench import catalogues
from raddpo_ext.decoding.row_lse import row_lse

QWEN_VOCAB = 151_936
PARTS = ("steps", "token_logps", "retriever", "linear_steps", "session_losses", "losses")


@dataclass(frozen=True)
class Case:
    """A uniform catalogue and the search over it; ``vocab`` is the logits' width, whose last columns are the SIDs'."""

    items: int
    codes: int
    levels: int
    batch: int
    beams: int
    dtype: torch.dtype = torch.float32
    vocab: int = 0
    normalize: str = "vocab"

    @property
    def name(self) -> str:
        items = f"{self.items // 10**6}M" if self.items >= 10**6 else str(self.items)
        shape = f"{items} items V{self.vocab or self.codes} L{self.levels} B{self.batch} W{self.beams}"
        return f"{shape} {str(self.dtype).removeprefix('torch.')} {self.normalize}"


MILLION = 1_000_000
BF16 = torch.bfloat16
CASES = [
    Case(20 * MILLION, 2048, 8, 2, 70),
    Case(20 * MILLION, 2048, 8, 2, 70, BF16),
    Case(20 * MILLION, 2048, 8, 32, 70, BF16),
    Case(MILLION, 8192, 3, 8, 128, BF16),
    Case(MILLION, 8192, 3, 8, 128),
    Case(MILLION, 8192, 3, 8, 128, BF16, normalize="trie"),
    Case(MILLION, 8192, 3, 2, 1000, BF16),
    Case(MILLION, 8192, 3, 1, 4096, BF16),
    *(Case(3_686, 256, 3, batch, 50, BF16, QWEN_VOCAB + 768) for batch in (1, 8, 32)),
    Case(3_686, 256, 3, 8, 50, BF16, QWEN_VOCAB + 768, normalize="level"),
    Case(100_000, 100_000, 1, 4, 100, BF16),
]


@cache
def index_of(items: int, codes: int, levels: int, vocab: int) -> rx.TrieIndex:
    sids = np.arange(items)[:, None] if levels == 1 else catalogues.uniform(items, codes, levels)
    offset = vocab - codes * levels if vocab else 0
    tokens = rx.SIDVocab([codes] * levels, offset=offset) if vocab else rx.SIDVocab([codes] * levels, [0] * levels)
    return rx.TrieIndex.build(sids, vocab=tokens).to("cuda")


def kernels_us(step: Callable[[Tensor], Any], sets: list[Tensor]) -> dict[str, float]:
    """Mean time of each kernel, by torch's profiler; empty where it sees none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for logits in [*sets, *sets][:STEPS]:
            step(logits)
        torch.cuda.synchronize()
    found = {}
    for event in profile.key_averages():
        if "raddpo" in event.key:
            found[kernel_name(event.key)] = round(event.device_time_total / event.count, 2)
    return found


def measure(case: Case, add: Callable[[dict[str, Any]], None]) -> None:
    """Every step of one search with standard normal logits."""
    index = index_of(case.items, case.codes, case.levels, case.vocab)
    state = rx.BeamState.start(index, case.batch)
    for depth in range(case.levels):
        shape = (*state.nodes.shape, case.vocab or case.codes)
        size = int(np.prod(shape)) * case.dtype.itemsize
        cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        count = max(2, min(512, -(-3 * cache_bytes // size)))
        sets = [torch.randn(shape, device="cuda", dtype=case.dtype) for _ in range(count)]
        options = {"normalize": case.normalize, "length_penalty": 0.0}

        def step(logits: Tensor, state: rx.BeamState = state, options: dict[str, Any] = options) -> rx.BeamState:
            return rx.beam_step(logits, state, index, case.beams, **options)

        _, children = torch.ops.raddpo.trie_children(state.nodes.flatten(), *index.block)
        live = state.nodes.flatten() >= 0
        rows, offered = int(live.sum()), int(children[live].sum())
        logits_read = {"vocab": rows * shape[2], "level": rows * case.codes, "trie": offered}[case.normalize]
        begin = time.perf_counter()
        for _ in range(100):
            step(sets[0])
        call_us = 1e4 * (time.perf_counter() - begin)
        torch.cuda.synchronize()
        add(
            {
                "case": case.name,
                "step": depth,
                "rows": rows,
                "children": offered,
                "logits_bytes": logits_read * case.dtype.itemsize,
                "sets": count,
                "row_lse_us": graph_us(lambda logits: row_lse(logits.view(-1, logits.shape[2])), sets),
                "us": graph_us(step, sets),
                "warm_us": graph_us(step, sets[:1]),
                "python_call_us": call_us,
                "kernels_us": kernels_us(step, sets),
            }
        )
        state = step(sets[0])


@dataclass(frozen=True)
class LogitsCase:
    """Logits ``[rows, cols]``; ``support``: the width of a level in their last columns, 0 for all of them."""

    rows: int
    cols: int
    dtype: torch.dtype
    support: int = 0

    @property
    def name(self) -> str:
        level = f" level of {self.support}" if self.support else ""
        return f"token_logps {self.rows} x {self.cols} {str(self.dtype).removeprefix('torch.')}{level}"


LOGITS_CASES = [
    *(
        LogitsCase(rows, cols, dtype)
        for rows, cols in [(256, 32_768), (64, QWEN_VOCAB), (1024, 8192), (4096, QWEN_VOCAB)]
        for dtype in (torch.float32, BF16)
    ),
    LogitsCase(256, QWEN_VOCAB, BF16, 8192),
]


def measure_token_logps(case: LogitsCase, bandwidth: float) -> dict[str, Any]:
    size = case.rows * case.cols * case.dtype.itemsize
    count = max(2, -(-3 * torch.cuda.get_device_properties(0).L2_cache_size // size))
    sets = [torch.randn(case.rows, case.cols, device="cuda", dtype=case.dtype) for _ in range(count)]
    support = case.support or case.cols
    targets = torch.randint(case.cols - support, case.cols, (case.rows,), device="cuda")
    columns = begin = counts = None
    if case.support:
        columns = torch.arange(case.cols - support, case.cols, device="cuda", dtype=torch.int32)
        begin, counts = torch.zeros_like(targets), torch.full_like(targets, support)
    options = (columns, begin, counts, 1.0, 0.0, -100, 0, case.cols)
    grad = torch.randn(case.rows, device="cuda")
    _, lse = torch.ops.raddpo.token_logps(sets[0], targets, *options)
    gradients: dict[int, Tensor] = {}  # one for each set, as they must not stay in the cache either

    def forward(logits: Tensor) -> None:
        torch.ops.raddpo.token_logps(logits, targets, *options)

    def fresh(logits: Tensor) -> None:
        gradients[logits.data_ptr()] = torch.ops.raddpo.token_logps_backward(grad, logits, targets, lse, *options)

    def inplace(logits: Tensor) -> None:
        torch.ops.raddpo.token_logps_backward_(grad, logits, targets, lse, *options[:3], None, *options[3:])

    def cross_entropy(logits: Tensor) -> None:
        torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    floor = 1e6 * size / bandwidth
    share = support / case.cols
    result = {"case": case.name, "sets": count, "forward_floor_us": share * floor}
    result |= {"backward_floor_us": (1 + share) * floor, "cross_entropy_us": graph_us(cross_entropy, sets)}
    result |= {"forward_us": graph_us(forward, sets), "fresh_us": graph_us(fresh, sets)}
    gradients.clear()
    return {**result, "inplace_us": graph_us(inplace, sets)}  # last: afterwards these are no logits


def token_logps_table(rows: list[dict[str, Any]]) -> str:
    head = ["case", "forward us", "of floor", "fresh us", "of floor", "in place us", "of floor", "cross_entropy us"]
    lines = []
    for row in rows:
        line = [row["case"]]
        for name, floor in (("forward", "forward"), ("fresh", "backward"), ("inplace", "backward")):
            line += [f"{row[f'{name}_us']:.1f}", f"{row[f'{floor}_floor_us'] / row[f'{name}_us']:.0%}"]
        lines.append([*line, f"{row['cross_entropy_us']:.1f}"])
    return markdown(head, lines)


def table(steps: list[dict[str, Any]], bandwidth: float) -> str:
    """The floor is the bytes of logits over the copy's bandwidth."""
    head = ["case", "step", "children", "floor us", "row_lse us", "us", "warm us", "GB/s"]
    rows = [
        [
            step["case"],
            str(step["step"]),
            str(step["children"]),
            f"{1e6 * step['logits_bytes'] / bandwidth:.1f}",
            *(f"{step[key]:.1f}" for key in ("row_lse_us", "us", "warm_us")),
            f"{1e-3 * step['logits_bytes'] / step['us']:.0f}",
        ]
        for step in steps
    ]
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_bench.jsonl", help="where the result goes")
    parser.add_argument(
        "--cases", default="", help="only the cases whose name contains this; retriever, losses: those parts"
    )
    parser.add_argument("--seconds", type=float, default=400, help="start no case after this long")
    arguments = parser.parse_args()
    require_gpu()
    begin = time.perf_counter()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    steps: list[dict[str, Any]] = []
    token_logps: list[dict[str, Any]] = []
    tables: list[str] = []
    result = {**gpu_environment("benchmarks.gpu.bench"), "copy_bytes_per_second": bandwidth}
    result |= {"product_flops_per_second": (rate := product_rate()), "steps": steps, "token_logps": token_logps}
    print(f"copy: {bandwidth / 1e12:.2f} TB/s, bfloat16 product: {rate / 1e12:.0f} TFLOP/s", flush=True)

    def write() -> None:
        run = {key: value for key, value in result.items() if key not in PARTS}
        cells = [{"part": part} | cell for part in PARTS for cell in result.get(part, ())]
        results.write(arguments.out, {"gpu_bench": run | {"results": cells}})

    def more() -> bool:
        return time.perf_counter() - begin < arguments.seconds

    def add(step: dict[str, Any]) -> None:
        steps.append(step)
        write()
        print(table(steps, bandwidth).splitlines()[-1], flush=True)

    if "retriever" in arguments.cases or not arguments.cases:
        tables.append(gpu_retriever.measure_all(bandwidth, rate, result, write))
    for logits_case in LOGITS_CASES:
        if arguments.cases in logits_case.name:
            token_logps.append(measure_token_logps(logits_case, bandwidth))
            write()
            print(token_logps_table(token_logps).splitlines()[-1], flush=True)
            torch.cuda.empty_cache()
    for case in CASES:
        if arguments.cases in case.name and more():
            measure(case, add)
            torch.cuda.empty_cache()
    if "losses" in arguments.cases or not arguments.cases:
        tables.append(gpu_losses.measure_all(bandwidth, rate, result, write, more))
    print(token_logps_table(token_logps), table(steps, bandwidth), *tables, sep="\n\n")


if __name__ == "__main__":
    main()
