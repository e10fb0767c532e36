"""What the alignment experiment is trained and measured on: a catalogue, its purchases and their tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import raddpo_ext as rx
from demo.sft import HISTORY, START
from raddpo_ext.data.catalogue import Case, Catalogue, load_catalogue


@dataclass(frozen=True)
class Data:
    """Items are rows of ``sids``.

    Attributes:
        name: of the catalogue.
        sids: int64 codes ``[N, L]``.
        tokens: their token ids, int64 ``[N, L]``.
        sizes: codes of each level.
        index: of the catalogue.
        train: each user's purchases but the last two.
        validation: the purchase before the last.
        test: the last purchase.
        counts: int64 ``[N]``, purchases of each item in ``train``.
    """

    name: str
    sids: Tensor
    tokens: Tensor
    sizes: tuple[int, ...]
    index: rx.TrieIndex
    train: list[list[int]]
    validation: list[Case]
    test: list[Case]
    counts: Tensor

    @property
    def levels(self) -> int:
        return self.sids.shape[1]

    @property
    def vocab_size(self) -> int:
        """Token ids there are, ``START`` among them."""
        return 1 + START + sum(self.sizes)

    def prompts(self, histories: Iterable[list[int]]) -> list[list[int]]:
        """Token ids of the last ``HISTORY`` items of each, after ``START``."""
        return rx.history_prompts(self.index, [items[-HISTORY:] for items in histories], bos_token_id=START)


def load(folder: Path) -> Data:
    """Reads a catalogue of which each user's last purchase is the test and the one before it the validation.

    Raises:
        ValueError, OSError: naming the file or folder and what is wrong.
    """
    catalogue = load_catalogue(folder)
    if catalogue.lengths is not None:
        raise ValueError(f"{folder}: SIDs must be of one length, for the experiment's model has no end token")
    if not len(catalogue.train) == len(catalogue.valid) == len(catalogue.test):
        raise ValueError(f"{folder}: expected a split that leaves out every user's last two purchases")
    return make_data(catalogue)


def make_data(catalogue: Catalogue) -> Data:
    vocab = rx.SIDVocab(catalogue.sizes, offset=1 + START)
    return Data(
        name=catalogue.name,
        sids=torch.from_numpy(catalogue.sids),
        tokens=vocab.encode(catalogue.sids),
        sizes=catalogue.sizes,
        index=rx.TrieIndex.build(catalogue.sids, vocab=vocab),
        train=catalogue.train,
        validation=catalogue.valid,
        test=catalogue.test,
        counts=torch.from_numpy(np.bincount(np.concatenate(catalogue.train), minlength=len(catalogue.sids))),
    )


def windows(data: Data) -> list[list[int]]:
    """The training sequences in pieces of at most ``HISTORY + 1`` purchases, each beginning with the last one's end."""
    return [items[at : at + HISTORY + 1] for items in data.train for at in range(0, max(1, len(items) - 1), HISTORY)]
