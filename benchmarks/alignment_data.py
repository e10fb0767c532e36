"""What the alignment experiment is trained and measured on: a split by leave-one-out, and cuts in training sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import raddpo_ext as rx
from demo.catalogue import Case, load_catalogue

START = 0  # opens every sequence, and pads it
HISTORY = 10  # purchases that the model looks back on


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

    def prompt(self, items: list[int]) -> np.ndarray:
        """Token ids of the last ``HISTORY`` items, after ``START``."""
        return self.sequence(items[-HISTORY:])

    def sequence(self, items: list[int]) -> np.ndarray:
        return np.concatenate([[START], self.tokens.numpy()[items].ravel()])


def load(folder: Path) -> Data:
    """Reads a catalogue in which each user's purchases are one sequence.

    Raises:
        ValueError, OSError: naming the file or folder and what is wrong.
    """
    catalogue = load_catalogue(folder, max_cases=2**31)
    if catalogue.lengths is not None:
        raise ValueError(f"{folder}: the experiment has no end token, so that all SIDs must be of one length")
    return make_data(catalogue.name, catalogue.sids, catalogue.sizes, [[*case.history, case.item] for case in catalogue.test])


def make_data(name: str, sids: np.ndarray, sizes: tuple[int, ...], purchases: list[list[int]]) -> Data:
    """Splits each user's purchases, at least three, in order of time."""
    vocab = rx.SIDVocab(sizes, offset=1 + START)
    train = [items[:-2] for items in purchases]
    return Data(
        name=name,
        sids=torch.from_numpy(sids),
        tokens=vocab.encode(sids),
        sizes=sizes,
        index=rx.TrieIndex.build(sids, vocab=vocab),
        train=train,
        validation=[Case(items[:-2], items[-2]) for items in purchases],
        test=[Case(items[:-1], items[-1]) for items in purchases],
        counts=torch.from_numpy(np.bincount(np.concatenate(train), minlength=len(sids))),
    )


def windows(data: Data) -> list[list[int]]:
    """The training sequences in pieces of at most ``HISTORY + 1`` purchases, each beginning with the last one's end."""
    return [items[at : at + HISTORY + 1] for items in data.train for at in range(0, max(1, len(items) - 1), HISTORY)]
