"""What the demo measures: retrieval and validity before and after the alignment, beside what sold most."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import Qwen3ForCausalLM

import raddpo_ext as rx
from demo.measure import interval
from demo.purchases.model import Tokens, generate
from raddpo_ext.data.catalogue import Case, Catalogue
from raddpo_ext.data.metrics import invalid_share, retrieval_metrics

BEAMS = 50
CUTS = (5, 10, 50)
SHOWN = ("recall@5", "recall@10", "recall@50", "ndcg@10", "mrr")
BATCH = 8  # more at once are slower: their keys and values leave the cache


def spread(cases: list[Case], most: int) -> list[Case]:
    """At most ``most`` of the cases, evenly spread: the first users of a file are seldom like the others."""
    return cases[:: math.ceil(len(cases) / most)]


def measure(retriever: rx.SIDRetriever, tokens: Tokens, cases: list[Case]) -> dict[str, Tensor]:
    """Each metric of each case, ``[B]``, with 50 beams over the catalogue."""
    order = np.argsort([len(case.history) for case in cases], kind="stable")  # prompts of like length together
    items, sids = [], []
    for at in tqdm(range(0, len(cases), BATCH), desc="retrieving", unit="batch", disable=None):
        histories = [cases[row].history for row in order[at : at + BATCH]]
        found = retriever.retrieve(*tokens.pad(histories), top_k=max(CUTS))
        items.append(found.items)
        sids.append(found.sids)
    back = torch.from_numpy(np.argsort(order))
    metrics = retrieval_metrics(torch.cat(items)[back], _wanted(cases), CUTS)
    return {name: metrics[name] for name in SHOWN} | {
        "invalid@50, by the index": invalid_share(retriever.index, torch.cat(sids)[back])
    }


def measure_popularity(catalogue: Catalogue, cases: list[Case]) -> dict[str, Tensor]:
    """The same where everybody is shown what sold most in the training data."""
    sold = np.bincount(np.concatenate([np.array(items) for items in catalogue.train]), minlength=len(catalogue.sids))
    best = torch.from_numpy(np.argsort(-sold, kind="stable")[: max(CUTS)].copy())
    best = pad(best, (0, max(CUTS) - len(best)), value=-1)
    metrics = retrieval_metrics(best.expand(len(cases), -1), _wanted(cases), CUTS)
    return {name: metrics[name] for name in SHOWN}


def measure_freely(model: Qwen3ForCausalLM, tokens: Tokens, index: rx.TrieIndex, cases: list[Case]) -> Tensor:
    """The share of each case's top 10 that is no item when ``generate`` searches without the index: ``[B]``."""
    levels = tokens.vocab.levels
    starts = torch.tensor([int(ids[0]) for ids in tokens.vocab.token_ids])
    shares = []
    for at in tqdm(range(0, len(cases), BATCH), desc="generating freely", unit="batch", disable=None):
        batch = cases[at : at + BATCH]
        rows = generate(
            model, tokens, *tokens.pad([case.history for case in batch]), num_beams=BEAMS, num_return_sequences=10
        )
        lengths = torch.full((len(rows),), levels)
        if tokens.vocab.eos is not None:
            ended = rows == tokens.vocab.eos
            lengths = torch.where(ended.any(1), ended.int().argmax(1), levels)
            # Nothing but the end, or no end at all, is no item.
            rows = rows.masked_fill((~ended.any(1) | ended[:, 0])[:, None], tokens.size)
        codes = pad(rows, (0, max(0, levels - rows.shape[1])))[:, :levels] - starts
        shape = (len(batch), 10)
        shares.append(invalid_share(index, codes.unflatten(0, shape), lengths.clamp(min=1).view(shape)))
    return torch.cat(shares)


def table(before: dict[str, Tensor], after: dict[str, Tensor], popular: dict[str, Tensor]) -> list[str]:
    """A line a metric: its means, and the mean difference with its interval."""
    lines = []
    for name in before:
        low, high = interval(after[name] - before[name])
        first = f"{float(popular[name].mean()):9.4f}" if name in popular else " " * 9
        old, new = float(before[name].mean()), float(after[name].mean())
        lines.append(f"  {name:<26}{first}{old:10.4f}{new:10.4f}{new - old:+10.4f}  [{low:+.4f}, {high:+.4f}]")
    return lines


def beats(metrics: dict[str, Tensor], popular: dict[str, Tensor]) -> bool:
    """In every metric."""
    return all(bool(metrics[name].mean() > popular[name].mean()) for name in popular)


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


def _wanted(cases: list[Case]) -> Tensor:
    return torch.tensor([[case.item] for case in cases])


def _short(title: str) -> str:
    return title if len(title) <= 90 else title[:87] + "..."
