"""What the demo measures: recall, validity and latency, each beside what one would do without the package."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3ForCausalLM

import raddpo_ext as rx
from demo.model import START, Tokens
from raddpo_ext.catalogue import Case, Catalogue

BEAMS = 50
CUTS = (5, 10, 50)
BATCH = 64


class Quality(NamedTuple):
    """Shares of the cases: the item among the first 5, 10, 50; and the mean of 1 / its rank, 0 beyond 50."""

    recall: tuple[float, ...]
    mrr: float

    def beats(self, other: Quality) -> bool:
        return self.mrr > other.mrr and all(a > b for a, b in zip(self.recall, other.recall, strict=True))

    def __str__(self) -> str:
        return "".join(f"{value:11.4f}" for value in (*self.recall, self.mrr))


def spread(cases: list[Case], most: int) -> list[Case]:
    """At most ``most`` of the cases, evenly spread: the first users of a file are seldom like the others."""
    return cases[:: math.ceil(len(cases) / most)]


def measure(retriever: rx.SIDRetriever, tokens: Tokens, cases: list[Case]) -> tuple[Quality, float]:
    """The quality over all cases, and the share of retrieved SIDs that are in the catalogue's index."""
    ranks, valid, rows = [], 0, 0
    ordered = sorted(cases, key=lambda case: len(case.history))  # prompts of like length together
    for at in tqdm(range(0, len(ordered), BATCH), desc="retrieving", unit="batch", disable=None):
        batch = ordered[at : at + BATCH]
        found = retriever.retrieve(*tokens.pad([case.history for case in batch]), top_k=max(CUTS))
        ranks.append(_ranks(found.items, torch.tensor([case.item for case in batch])))
        sids = found.sids[found.items >= 0]
        valid += int(retriever.index.contains(sids, (sids >= 0).sum(1)).sum())
        rows += len(sids)
    return _quality(torch.cat(ranks)), valid / rows


def measure_popularity(catalogue: Catalogue) -> Quality:
    """Everybody is shown what sold most in the training data."""
    sold = Counter(item for items in catalogue.train for item in items)
    best = torch.tensor([item for item, _ in sold.most_common(max(CUTS))])
    wanted = torch.tensor([case.item for case in catalogue.test])
    return _quality(_ranks(best.expand(len(wanted), -1), wanted))


def _ranks(items: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted item stands in its row of items, from 0; infinite where it does not."""
    hits = items == wanted[:, None]
    return torch.where(hits.any(1), hits.int().argmax(1).double(), torch.inf)


def _quality(ranks: Tensor) -> Quality:
    return Quality(tuple(float((ranks < cut).double().mean()) for cut in CUTS), float((1 / (ranks + 1)).mean()))


def share_of_items(model: Qwen3ForCausalLM, tokens: Tokens, cases: list[Case]) -> float:
    """The share of a plain beam search's top 10 that are items: what ``generate`` gives without a constraint."""
    items = {tuple(row.tolist()) for row in tokens.of_item}
    found = 0
    for at in tqdm(range(0, len(cases), 20), desc="generating freely", unit="batch", disable=None):
        batch = cases[at : at + 20]
        ids, mask = tokens.pad([case.history for case in batch])
        rows = _generate(model, tokens, ids, mask, num_return_sequences=10)
        found += sum(_until_end(row, tokens.vocab.eos) in items for row in rows.tolist())
    return found / (10 * len(cases))


def latencies(retriever: rx.SIDRetriever, tokens: Tokens, cases: list[Case]) -> tuple[float, float]:
    """Median seconds of one query at a time: the retriever, and ``generate`` that asks a Python function for the
    allowed tokens of every beam and masks the whole vocabulary with them."""
    follow: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for row in tokens.of_item:
        for level, token in enumerate(row.tolist()):
            follow[tuple(row[:level].tolist())].add(token)
    allowed = {prefix: sorted(after) for prefix, after in follow.items()}
    ours, theirs = [], []
    for case in tqdm(cases, desc="timing", unit="query", disable=None):
        ids, mask = tokens.pad([case.history])

        def after(query: int, row: Tensor, width: int = ids.shape[1]) -> list[int]:
            return allowed.get(tuple(row[width:].tolist()), [START])

        ours.append(_seconds(lambda ids=ids, mask=mask: retriever.retrieve(ids, mask)))
        theirs.append(
            _seconds(
                lambda ids=ids, mask=mask, after=after: _generate(
                    retriever.model, tokens, ids, mask, num_return_sequences=BEAMS, prefix_allowed_tokens_fn=after
                )
            )
        )
    return statistics.median(ours), statistics.median(theirs)


def _generate(model: Qwen3ForCausalLM, tokens: Tokens, ids: Tensor, mask: Tensor, **options: object) -> Tensor:
    """New tokens of a beam search by transformers' own ``generate``."""
    rows = model.generate(
        ids,
        attention_mask=mask,
        num_beams=BEAMS,
        do_sample=False,
        length_penalty=0.0,
        max_new_tokens=max(map(len, tokens.of_item)),
        **options,
    )
    return rows[:, ids.shape[1] :]


def _until_end(row: list[int], end: int | None) -> tuple[int, ...]:
    return tuple(row[: row.index(end) + 1] if end in row else row)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def examples(retriever: rx.SIDRetriever, tokens: Tokens, catalogue: Catalogue, cases: list[Case]) -> list[str]:
    """Lines that show what was bought, what was bought next and what is retrieved."""
    lines = []
    for case in cases:
        found = retriever.retrieve(*tokens.pad([case.history]), top_k=5)
        lines += ["", "  bought      " + _short(catalogue.titles[case.history[-1]])]
        lines += ["    before it " + _short(catalogue.titles[item]) for item in case.history[-2:-5:-1]]
        lines += ["  bought next " + _short(catalogue.titles[case.item])]
        for score, item in zip(found.scores[0].tolist(), found.items[0].tolist(), strict=True):
            mark = "*" if item == case.item else " "
            lines.append(f"    {score:7.2f} {mark} {_short(catalogue.titles[item])}")
    return lines


def _short(title: str) -> str:
    return title if len(title) <= 90 else title[:87] + "..."
