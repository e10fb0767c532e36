"""Measures a model: constrained retrieval, and what an unconstrained search makes up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.alignment.data import Data
from demo.sft import by_length
from raddpo_ext.data.metrics import retrieval_metrics

BATCH = 32  # prompts of one length; more leave the cache
KS = (5, 10, 50)


def retrieve(model: Any, data: Data, histories: Sequence[list[int]], beams: int) -> Tensor:
    """The best items of each history by constrained beam search: int64 ``[B, beams]``, padded with -1."""

    retriever = rx.SIDRetriever(model, data.index, beam_width=beams)
    return by_length(data.prompts(histories), lambda prompts: retriever.retrieve(prompts, top_k=beams).items, BATCH)


def ranks(found: Tensor, wanted: Sequence[int]) -> np.ndarray:
    """The place of each query's wanted item, from 1; 0 where it is not found: uint8 ``[B]``."""
    reciprocal = retrieval_metrics(found, torch.tensor(wanted)[:, None], ks=())["mrr"]
    return torch.where(reciprocal > 0, 1 / reciprocal, 0).round().to(torch.uint8).numpy()


def next_three(model: Any, data: Data, users: Sequence[int], beams: int) -> np.ndarray:
    """How many of each user's last three purchases are among the ten best items for the history before them: ``[B]``.

    The first of the three is in the training sequence, the others are the validation's and the test's.
    """
    purchases = [[*data.test[user].history, data.test[user].item] for user in users]
    found = retrieve(model, data, [items[:-3] for items in purchases], beams)
    recall = retrieval_metrics(found, torch.tensor([items[-3:] for items in purchases]), ks=(10,))["recall@10"]
    return (3 * recall).round().to(torch.uint8).numpy()
