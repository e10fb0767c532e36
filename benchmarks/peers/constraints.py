"""A catalogue's constraint inside ``generate`` of transformers, as users of public code have it, and ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PrefixConstrainedLogitsProcessor

import raddpo_ext as rx

Processor = Callable[[Tensor, Tensor], Tensor]


class HashDictProcessor:
    """The constraint of MiniOneRec: log-softmax once more, then per beam a string of its last tokens as a key.

    Written to its description; the key of a prompt is its last three tokens, that of later tokens those that were
    generated. One object serves one call of ``generate``.
    """

    PROMPT_TOKENS = 3

    def __init__(self, following: dict[str, list[int]], prompts: Tensor) -> None:
        self.following, self.step = dict(following), 0
        for prompt in prompts[:, -self.PROMPT_TOKENS :].tolist():
            self.following[_key(prompt)] = following[""]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = torch.log_softmax(scores, -1)
        mask = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(input_ids):
            allowed = self.following[_key(tokens[-(self.step or self.PROMPT_TOKENS) :].tolist())]
            mask[row, allowed] = 0
        self.step += 1
        return scores + mask


def _key(tokens: list[int]) -> str:
    return "-".join(map(str, tokens))


def hash_dict(children: dict[tuple[int, ...], list[int]]) -> dict[str, list[int]]:
    """The tokens that may follow each prefix, by the prefix as a string."""
    return {_key(list(prefix)): tokens for prefix, tokens in children.items()}


class Constraints:
    """Makes a fresh processor of each kind for prompts of one length."""

    def __init__(self, index: rx.TrieIndex, children: dict[tuple[int, ...], list[int]], width: int) -> None:
        self.index, self.children, self.width = index, children, width
        self._by_string = hash_dict(children)

    def make(self, kind: str, prompts: Tensor) -> Processor:
        length = prompts.shape[1]
        if kind == "dict":
            found: Any = PrefixConstrainedLogitsProcessor(
                lambda _, row: self.children[tuple(row[length:].tolist())], self.width
            )
            return found
        if kind == "hash dict":
            return HashDictProcessor(self._by_string, prompts)
        return rx.TrieLogitsProcessor(self.index, length, num_beams=self.width)


KINDS = ("dict", "hash dict", "TrieLogitsProcessor")
