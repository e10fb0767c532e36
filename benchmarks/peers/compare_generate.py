"""``generate`` of transformers under a catalogue's constraint, by several ways, against SIDRetriever, on one thread::

    python -m benchmarks.peers.compare_generate
    python -m benchmarks.peers.compare_generate --cases constraint

Model and catalogue are those of :mod:`benchmarks.peers.compare_retriever`, but with 2 heads for keys and values.
``generate`` runs with the constraint as a dictionary (``prefix_allowed_tokens_fn``), without one, with that of
MiniOneRec (``hash dict``: another log-softmax, then a string per beam as the key), and with ``TrieLogitsProcessor``.
``shared`` is SIDRetriever, over the vocabulary, the level or the trie. ``use_onednn`` says that the model's layers ran
by oneDNN (``rx.use_onednn``), in ``generate`` or in ours. All that are over the vocabulary are first
checked to find the same items with the same scores.

``constraint`` cases time what these constraints do to the scores of all steps of a search, without a model. They are
checked to give the same scores.
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness import report
from benchmarks.peers import compare_retriever
from benchmarks.peers.constraints import KINDS
from benchmarks.peers.onednn import SUFFIX
from benchmarks.peers.retriever_cases import GENERATE, NORMALIZE

MODULE = "benchmarks.peers.compare_generate"


def is_constraint(cell: dict[str, Any]) -> bool:
    return KINDS[0] in cell["costs"]


def floor_ms(cell: dict[str, Any], normalize: str) -> float:
    """The matrix products of a search at the best rate."""
    return 1e3 * float(cell["gflop"][normalize]) / float(cell["gflop_per_s"])


def markdown(cells: list[dict[str, Any]]) -> str:
    """What ``generate`` takes in each of its ways, and the constraints alone; empty if no cell has them."""
    ways = [cell for cell in cells if "generate, no constraint" in cell["costs"]]
    constraints = [cell for cell in cells if is_constraint(cell)]
    tables = []
    if ways:
        peers = [name for name in ways[0]["costs"] if name.startswith("generate") and not name.endswith(SUFFIX)]
        head = [
            "time of `generate` over ours",
            *(name.removeprefix("generate, ") for name in peers),
            "ours / its products",
        ]
        rows = [
            [
                f"{cell['case']}, ours over `{normalize}`",
                *(compare_retriever.times(cell, f"{name} / shared {normalize}") for name in peers),
                f"{cell['costs'][f'shared {normalize}']['ms'] / floor_ms(cell, normalize):.2f}x",
            ]
            for cell in ways
            for normalize in NORMALIZE
        ]
        rows += [
            [
                f"{cell['case']}, over `generate` with a dictionary",
                *(compare_retriever.times(cell, f"{name} / generate") for name in peers),
                "",
            ]
            for cell in ways
        ]
        head[1] = "a dictionary"
        tables.append(report.markdown(head, rows))
        rows = [
            [
                f"{cell['case']}, over `{normalize}`",
                *(compare_retriever.times(cell, f"generate{by} / shared {normalize}{SUFFIX}") for by in ("", SUFFIX)),
                f"{cell['costs'][f'shared {normalize}{SUFFIX}']['ms'] / floor_ms(cell, normalize):.2f}x",
            ]
            for cell in ways
            if f"generate{SUFFIX}" in cell["costs"]
            for normalize in NORMALIZE
        ]
        head = ["`generate` with a dictionary over ours with `use_onednn`", "without it", "with it too"]
        tables.append(report.markdown([*head, "ours / its products"], rows))
    if constraints:
        rows = [
            [
                cell["case"],
                *(f"{cell['costs'][kind]['ms']:.1f}" for kind in KINDS),
                compare_retriever.times(cell, f"{KINDS[2]} / {KINDS[0]}"),
            ]
            for cell in constraints
        ]
        head = ["the constraint alone, ms", "a dictionary", *KINDS[1:], f"{KINDS[2]} / a dictionary"]
        tables.append(report.markdown(head, rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    compare_retriever.run(MODULE, __doc__, GENERATE, markdown)
