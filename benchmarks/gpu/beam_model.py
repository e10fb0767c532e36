"""What a beam step does on a GPU, and how long that takes at least: ``python -m benchmarks.gpu.beam_model``.

Computed, not measured, and no GPU is needed. csrc/beam_search/workspace.cuh says how the work is cut, asked for by the
headers that stand for CUDA's in the tests. The time is that of the bytes, of the launches in a graph, and of the reads
of global memory that wait for one another, each as long as a read of DRAM; barriers, the sorting and everything in
shared memory come on top.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import gpu_environment
from benchmarks.harness import results
from benchmarks.harness.catalogues import ROOT
from benchmarks.harness.report import RESULTS, markdown

MODULE = "benchmarks.gpu.beam_model"
BYTES_PER_US = 4e6
LAUNCH_US = 1.2
READ_US = 0.5
#: The look-up of a beam's children, by the first kernel: its score and node, then twice hints, ranks and bits at most.
LOOKUP_READS = 7
#: Case, batch, width, vocab, bytes per logit, symbols per level, result, and a query's candidates in the run of
#: gpu_bench.jsonl, step by step.
CASES: list[tuple[str, int, list[int], int, int, int, int, list[int]]] = [
    ("20M items V2048 B2 W70 float32", 2, [1, 70, 70], 2048, 4, 2048, 70, [2048, 142_091, 331]),
    ("20M items V2048 B32 W70 bfloat16", 32, [1, 70, 70], 2048, 2, 2048, 70, [2048, 142_128, 340]),
    ("1M items V8192 B8 W128 bfloat16", 8, [1, 128, 128], 8192, 2, 8192, 128, [8192, 15_531, 129]),
    ("1M items V8192 B2 W1000 bfloat16", 2, [1, 1000, 1000], 8192, 2, 8192, 1000, [8192, 121_370, 1006]),
    ("1M items V8192 B1 W4096 bfloat16", 1, [1, 4096, 4096], 8192, 2, 8192, 4096, [8192, 495_906, 4132]),
]
_PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "csrc/beam_search/workspace.cuh"
using namespace raddpo;
void* cuda::dynamic_shared() { return nullptr; }
int main(int, char** words) {
  const auto number = [&](int i) { return std::atoll(words[i]); };
  BeamStepArgs a{};
  a.batch = number(1), a.width = number(2), a.vocab = number(3), a.beam_width = number(6);
  a.logit_type = number(4) == 4 ? LogitType::float32 : LogitType::bfloat16;
  a.trie.levels = 1, a.trie.num_symbols[0] = static_cast<std::int32_t>(number(5));
  const cuda::Workspace w = cuda::lay_out(a, nullptr);
  const std::int64_t candidates = number(7);
  const int team = candidates > w.few ? w.cluster : 1;
  const auto print = [](const char* name, long long value) { std::printf("\\"%s\\": %lld, ", name, value); };
  std::printf("{");
  print("splits", w.splits), print("blocks", a.batch * w.slices);
  print("team", team), print("teams", cuda::teams_of(w, candidates, team));
  print("tile", w.tile), print("capacity", w.capacity), print("in_shared", w.in_shared);
  print("shared_bytes", w.shared_bytes);
  std::printf("\\"workspace_bytes\\": %lld}", static_cast<long long>(w.bytes));
}
"""


def compiled(folder: Path) -> Path:
    source, program = folder / "layout.cpp", folder / "layout"
    source.write_text(_PROGRAM)
    includes = [f"-I{ROOT}", f"-I{ROOT / 'python_tests/support/cuda_on_cpu'}"]
    subprocess.run(["g++", "-std=c++17", "-w", *includes, source, "-o", program], check=True)
    return program


def dependent_reads(layout: dict[str, Any], width: int, beam_width: int, candidates: int) -> int:
    """Reads of global memory that wait for one another, of the block that has most."""
    loads = -(-width // layout["tile"])
    each = -(-candidates // (layout["team"] * layout["teams"]))
    rounds = -(-each // 2048)
    reads = LOOKUP_READS + loads + 2 * rounds  # symbols, then logits
    reads += loads if loads > 1 else 0
    if layout["teams"] > 1:  # the counter, the bounds, then counts and lists
        reads += 2 + 2 * -(-layout["teams"] // 16)
    written = -(-min(beam_width, candidates) // layout["team"])
    return reads + (loads if loads > 1 else 0) + 2 * -(-written // 512)


def cells(program: Path) -> list[dict[str, Any]]:
    found = []
    for case, batch, widths, vocab, size, symbols, beam_width, counts in CASES:
        for step, (width, candidates) in enumerate(zip(widths, counts, strict=True)):
            numbers = map(str, (batch, width, vocab, size, symbols, beam_width, candidates))
            output = subprocess.run([program, *numbers], check=True, capture_output=True, text=True).stdout
            layout = json.loads(output)
            read = batch * (width * vocab * size + 2 * candidates + 24 * width + 32 * beam_width)
            waits = dependent_reads(layout, width, beam_width, candidates)
            us = 2 * LAUNCH_US + read / BYTES_PER_US + waits * READ_US
            sizes = {"batch": batch, "width": width, "beam_width": beam_width, "candidates": candidates}
            model = {"launches": 2, "bytes": read, "dependent_reads": waits, "computed_us": round(us, 1)}
            found.append({"case": case, "step": step, **sizes, **layout, **model})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_beam_model.jsonl", help="where the result goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = cells(compiled(Path(folder)))
    columns = ["case", "step", "candidates", "team", "teams", "shared_bytes", "bytes", "dependent_reads", "computed_us"]
    print(markdown(columns, [[str(cell[column]) for column in columns] for cell in found]))
    constants = {"bytes_per_us": BYTES_PER_US, "launch_us": LAUNCH_US, "read_us": READ_US}
    results.write(arguments.out, {"gpu_beam_model": {**gpu_environment(MODULE), **constants, "results": found}})


if __name__ == "__main__":
    main()
