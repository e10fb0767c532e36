"""How long a query takes, beside what one would do without the package."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from torch import Tensor
from tqdm import tqdm

import raddpo_ext as rx
from demo.model import Tokens, generate
from demo.sft import START
from raddpo_ext.bench.retriever import children_of
from raddpo_ext.data.catalogue import Case


def latencies(retriever: rx.SIDRetriever, tokens: Tokens, cases: list[Case], beams: int) -> tuple[float, float]:
    """Median seconds of one query at a time: the retriever, and ``generate`` that asks a Python function for the
    allowed tokens of every beam and masks the whole vocabulary with them."""
    allowed = children_of(row.tolist() for row in tokens.of_item)
    ours, theirs = [], []
    for case in tqdm(cases, desc="timing", unit="query", disable=None):
        ids, mask = tokens.pad([case.history])

        def after(query: int, row: Tensor, width: int = ids.shape[1]) -> list[int]:
            return allowed.get(tuple(row[width:].tolist()), [START])

        ours.append(_seconds(lambda ids=ids, mask=mask: retriever.retrieve(ids, mask)))
        options = {"num_beams": beams, "num_return_sequences": beams, "prefix_allowed_tokens_fn": after}
        theirs.append(
            _seconds(
                lambda ids=ids, mask=mask, options=options: generate(retriever.model, tokens, ids, mask, **options)
            )
        )
    return statistics.median(ours), statistics.median(theirs)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
