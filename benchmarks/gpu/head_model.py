"""The least time of the vocabulary's log-sum-exp of hidden states on a GPU: ``python -m benchmarks.gpu.head_model``.

Computed for an H200, not measured, and no GPU is needed. The logits are made tile by tile, each in a product and a
``row_lse`` (raddpo_ext/decoding/linear_beam_step.py). A product takes whole waves of blocks, at the rate of a large
product; what it writes is hidden behind it. Then the tile's logits are read, from the L2 cache if they fit it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.gpu.beam_model import BYTES_PER_US, LAUNCH_US
from benchmarks.gpu.report import gpu_environment
from benchmarks.harness import results
from benchmarks.harness.report import RESULTS, markdown
from raddpo_ext.decoding.linear_beam_step import _BLOCK, _TILE_BYTES, whole_waves

MODULE = "benchmarks.gpu.head_model"
FLOPS_PER_US = 780e6
PROCESSORS = 132
CACHE_BYTES = 50_000_000
#: Of logits that a kernel reads from the cache.
CACHE_BYTES_PER_US = 5.5e6
VOCAB, FEATURES, SIZE = 151_936, 1024, 2
ROWS = (512, 4096)
#: Bytes of a tile's logits, at most: in the cache, as linear_beam_step has them, more, and all at once.
TILES = (1 << 25, _TILE_BYTES, 1 << 30, 1 << 40)


def waves(rows: int, columns: int) -> int:
    """Of a product's blocks, one per multiprocessor at a time."""
    blocks = -(-rows // _BLOCK[0]) * -(-columns // _BLOCK[1])
    return -(-blocks // PROCESSORS)


def cell(rows: int, tile_bytes: int) -> dict[str, Any]:
    columns = min(VOCAB, whole_waves(rows, tile_bytes // (rows * SIZE), PROCESSORS))
    tiles = [min(columns, VOCAB - begin) for begin in range(0, VOCAB, columns)]
    held, read = rows * columns * SIZE, rows * VOCAB * SIZE
    cached = held <= CACHE_BYTES
    block_us = 2 * _BLOCK[0] * _BLOCK[1] * FEATURES / (FLOPS_PER_US / PROCESSORS)
    product_us = block_us * sum(waves(rows, tile) for tile in tiles)
    read_us = read / (CACHE_BYTES_PER_US if cached else BYTES_PER_US)
    launches = 2 * len(tiles) + (2 if len(tiles) > 1 else 0)  # the last two take the parts together
    return {
        "rows": rows,
        "columns": columns,
        "tiles": len(tiles),
        "held_bytes": held,
        "launches": launches,
        "product_us": round(product_us),
        "cached": cached,
        "read_us": round(read_us),
        "computed_us": round(product_us + read_us + launches * LAUNCH_US),
        "floor_us": round(2 * rows * VOCAB * FEATURES / FLOPS_PER_US),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_head_model.jsonl", help="where the result goes")
    arguments = parser.parse_args()
    found = [cell(rows, tile_bytes) for rows in ROWS for tile_bytes in TILES]
    print(markdown(list(found[0]), [list(map(str, row.values())) for row in found]))
    constants = {"flops_per_us": FLOPS_PER_US, "bytes_per_us": BYTES_PER_US, "cache_bytes_per_us": CACHE_BYTES_PER_US}
    constants |= {"launch_us": LAUNCH_US, "processors": PROCESSORS, "vocab": VOCAB, "features": FEATURES}
    results.write(arguments.out, {"gpu_head_model": {**gpu_environment(MODULE), **constants, "results": found}})


if __name__ == "__main__":
    main()
