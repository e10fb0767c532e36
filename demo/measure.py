"""Measures that both demos and the experiments share: intervals, searches without the index, and latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import raddpo_ext as rx
from demo.sft import START, by_length
from raddpo_ext.bench.retriever import children_of
from raddpo_ext.data.metrics import invalid_share
from raddpo_ext.integrations.decoders import SharedPrefixDecoder

RESAMPLES = 2000
AT_ONCE = 32  # prompts of one length; more leave the cache


def interval(differences: Tensor) -> tuple[float, float]:
    """The 95 % interval of a mean, by the paired bootstrap: what it would be with other users, drawn from these."""
    values = differences.numpy()
    rng = np.random.default_rng(0)  # the same users for every metric
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


@torch.no_grad()
def retrieve_freely(model: Any, prompts: Sequence[list[int]], levels: int, beams: int) -> Tensor:
    """The best token ids of each prompt by beam search over the whole vocabulary: int64 ``[B, beams, levels]``."""

    def search(prompts: Tensor) -> Tensor:
        decoder = SharedPrefixDecoder(model, None, prompts, torch.ones_like(prompts, dtype=torch.bool))
        tokens = parents = torch.zeros(len(prompts), 1, dtype=torch.int64)
        scores = torch.zeros(len(prompts), 1)
        rows = torch.zeros(len(prompts), 1, 0, dtype=torch.int64)
        for level in range(levels):
            totals = scores[..., None] + decoder(tokens, parents, level).log_softmax(-1)
            scores, best = totals.flatten(1).topk(beams)
            parents, tokens = best // totals.shape[2], best % totals.shape[2]
            rows = torch.cat([rows.gather(1, parents[..., None].expand(-1, -1, level)), tokens[..., None]], 2)
        return rows

    return by_length(prompts, search, AT_ONCE)


def invalid_shares(index: rx.TrieIndex, rows: Tensor) -> Tensor:
    """The share of each query's token id rows ``[B, R, L]`` that are no item's SID: ``[B]``."""
    vocab = index.vocab
    assert vocab is not None
    sizes, starts = torch.tensor(vocab.sizes), torch.tensor([int(ids[0]) for ids in vocab.token_ids])
    codes = rows - starts
    codes = codes.masked_fill((codes < 0) | (codes >= sizes), int(sizes.max()))  # not a code of any level
    return invalid_share(index, codes, torch.full(codes.shape[:2], len(sizes)))


def latencies(
    retriever: rx.SIDRetriever, prompts: Sequence[list[int]], sids: Iterable[list[int]], beams: int
) -> tuple[float, float]:
    """Median seconds of one query at a time: the retriever, and ``generate`` that asks a Python function for the
    allowed tokens of every beam and masks the whole vocabulary with them."""
    rows = list(sids)
    allowed, longest = children_of(rows), max(map(len, rows))
    ours, theirs = [], []
    for prompt in tqdm(prompts, desc="timing", unit="query", disable=None):
        ids = torch.tensor([prompt])

        def after(query: int, row: Tensor, width: int = len(prompt)) -> list[int]:
            return allowed.get(tuple(row[width:].tolist()), [START])

        options = {"num_beams": beams, "num_return_sequences": beams, "prefix_allowed_tokens_fn": after}
        options |= {"do_sample": False, "length_penalty": 0.0, "max_new_tokens": longest}
        options["attention_mask"] = torch.ones_like(ids)
        ours.append(_seconds(lambda ids=ids: retriever.retrieve(ids)))
        theirs.append(_seconds(lambda ids=ids, options=options: retriever.model.generate(ids, **options)))
    return statistics.median(ours), statistics.median(theirs)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
