"""The search shop as tokens and sessions: what a model reads, and what a loss is given."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import raddpo_ext as rx
from demo.search.shop import CATEGORIES, COLOURS, STYLES, TIERS, Log, Queries, SearchShop
from demo.sft import START


class Tokens(NamedTuple):
    """Token ids: ``START``, the shopper's taste and budget, the words of a query, then the codes level by level.

    Attributes:
        vocab: of the SIDs.
        index: of the catalogue.
        of_item: int64 ``[N, L]``, with the end token where the vocab has one, padded with -1.
        lengths: int64 ``[N]``.
        firsts: the first token ids of tastes, budgets, categories, styles and colours.
        size: token ids there are.
    """

    vocab: rx.SIDVocab
    index: rx.TrieIndex
    of_item: Tensor
    lengths: Tensor
    firsts: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, shop: SearchShop, ragged: bool = False) -> Tokens:
        """A SID is category, style, tier x colour.

        With ``ragged`` it is category, style, tier, colour and an end token, and an item of an even colour leaves its
        colour out: SIDs differ in length, and items collide.
        """
        constants = shop.constants
        words = (constants.tastes, len(TIERS), constants.categories, constants.styles, len(COLOURS))
        firsts = tuple(int(first) for first in START + 1 + np.cumsum((0, *words)))
        category, style, tier, colour = shop.attributes.T
        lengths = None
        if ragged:
            sids = np.stack([category, style, tier, np.where(colour % 2, colour, -1)], 1)
            lengths = 3 + colour % 2
            sizes = (constants.categories, constants.styles, len(TIERS), len(COLOURS))
        else:
            sids = np.stack([category, style, tier * len(COLOURS) + colour], 1)
            sizes = (constants.categories, constants.styles, len(TIERS) * len(COLOURS))
        size = firsts[-1] + sum(sizes) + ragged
        vocab = rx.SIDVocab(sizes, offset=firsts[-1], eos=size - 1 if ragged else None)
        of_item = vocab.encode(sids, lengths)
        index = rx.TrieIndex.build(sids, lengths=lengths, vocab=vocab)
        return cls(vocab, index, of_item, (of_item >= 0).sum(1), firsts[:-1], size)

    def prompts(self, queries: Queries) -> list[list[int]]:
        columns = np.stack([queries.taste, queries.budget, queries.category, queries.style, queries.colour], 1)
        ids = np.where(columns >= 0, columns + self.firsts, -1)
        return [[START, *(token for token in row if token >= 0)] for row in ids.tolist()]

    def tokenizer(self, shop: SearchShop) -> PreTrainedTokenizerFast:
        """Splits a query's text (:meth:`SearchShop.text`) at spaces, behind the start token."""
        constants = shop.constants
        words = ["<s>", *(f"taste{taste}" for taste in range(constants.tastes))]
        words += [f"tier{tier}" for tier in range(len(TIERS))]
        words += [*CATEGORIES[: constants.categories], *STYLES[: constants.styles], *COLOURS]
        for level, size in enumerate(self.vocab.sizes):
            words += [f"<{'abcd'[level]}_{code}>" for code in range(size)]
        words += ["</s>"] * (self.vocab.eos is not None)
        splitter = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token="<s>"))
        splitter.pre_tokenizer = WhitespaceSplit()
        splitter.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
        return PreTrainedTokenizerFast(tokenizer_object=splitter, bos_token="<s>", pad_token="<s>")


class Sessions(NamedTuple):
    """``S`` sessions by item, for a preference loss; -1 pads.

    Attributes:
        queries: of the pages.
        positives: int64 ``[S, P]``, the winner first.
        negatives: int64 ``[S, N]``.
    """

    queries: Queries
    positives: Tensor
    negatives: Tensor

    @property
    def prompt_lengths(self) -> np.ndarray:
        """In words."""
        lengths: np.ndarray = sum((column >= 0).astype(np.int64) for column in self.queries)
        return lengths

    def rows(self, rows: slice | Tensor) -> Sessions:
        at = rows if isinstance(rows, slice) else rows.numpy()
        return Sessions(self.queries.rows(at), self.positives[rows], self.negatives[rows])

    def batch(self, tokens: Tokens, positives: int, negatives: int) -> tuple[list[list[int]], rx.SessionBatch]:
        """The prompts, and at most so many candidates of either kind per session."""
        items = torch.cat([self.positives[:, :positives], self.negatives[:, :negatives]], 1)
        real = items >= 0
        offsets = torch.zeros(len(items) + 1, dtype=torch.int64)
        torch.cumsum(real.sum(1), 0, out=offsets[1:])
        rows = items[real]
        num_positives = (self.positives[:, :positives] >= 0).sum(1)
        sessions = rx.SessionBatch(tokens.of_item[rows].clamp(min=0), tokens.lengths[rows], offsets, num_positives)
        return tokens.prompts(self.queries), sessions


def sessions_of(log: Log, rng: np.random.Generator, positives: int, negatives: int) -> Sessions:
    """The winner is an ordered item, or else a clicked one, at random among its like; further positives are what else
    was clicked; negatives are what was shown and not clicked, in random order."""
    order = rng.random(log.shown.shape)
    # By rank: ordered, clicked, neither; empty places last.
    rank = np.where(log.shown < 0, 3, 2 - log.clicked - 1 * log.ordered)
    best = np.argsort(rank + order, 1)
    items, kinds = np.take_along_axis(log.shown, best, 1), np.take_along_axis(rank, best, 1)
    liked = np.where(kinds < 2, items, -1)[:, :positives]
    skipped = np.argsort(np.where(kinds == 2, order, 2), 1, kind="stable")
    passed = np.take_along_axis(np.where(kinds == 2, items, -1), skipped, 1)[:, :negatives]
    return Sessions(log.queries, torch.from_numpy(liked), torch.from_numpy(passed))
