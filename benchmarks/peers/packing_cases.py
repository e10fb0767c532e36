"""Sessions and the model that a training step is timed on, alike for every way to compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import raddpo_ext as rx
from benchmarks.harness import catalogues

LEVELS, CODES, FIRST = 4, 256, 1000  # of a SID, of a level; token id of the first code
HIDDEN, INTERMEDIATE, LAYERS, HEADS, HEAD_DIM = 512, 1536, 4, 8, 64
LAYOUTS = ("replicated", "candidates", "trie")


@dataclass(frozen=True)
class Case:
    """Sessions of ``candidates`` SIDs, two of them positives, behind a prompt of ``prompt`` tokens.

    Of the ``made`` ones a quarter of the negatives share the winner's first two codes and a quarter its first; the
    others are random. Those of ``instruments`` are items of the real catalogue: half of the negatives share the
    winner's first code, as far as there are so many, the others do not.
    """

    vocab_size: int
    prompt: int
    candidates: int
    source: str = "made"
    sessions: int = 1
    kv_heads: int = 2
    dtype: str = "float32"
    tied: bool = False  # whether the head's weight is the embeddings'

    @property
    def name(self) -> str:
        return f"V={self.vocab_size // 1000}k prompt={self.prompt} candidates={self.candidates} {self.source}"


class Problem:
    """The model, the sessions, and the parts of a step by layout."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=case.vocab_size,
                hidden_size=HIDDEN,
                intermediate_size=INTERMEDIATE,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=case.kv_heads,
                head_dim=HEAD_DIM,
                max_position_embeddings=4096,
                tie_word_embeddings=case.tied,
            )
        ).to(getattr(torch, case.dtype))
        rng = np.random.default_rng(0)
        self.prompts = torch.from_numpy(rng.integers(case.vocab_size, size=(case.sessions, case.prompt)))
        self.vocab = rx.SIDVocab([CODES] * LEVELS, offset=FIRST)
        self.sessions = rx.SessionBatch(
            self.vocab.encode(np.concatenate([_sids(case, rng) for _ in range(case.sessions)])),
            torch.full((case.sessions * case.candidates,), LEVELS),
            case.candidates * torch.arange(case.sessions + 1),
            torch.full((case.sessions,), 2),
        )

    def rows(self, layout: str, embeddings: bool = False) -> tuple[dict[str, Tensor], rx.PackedSessions | None]:
        """What the model reads, built anew as a collator does, and how it is packed.

        ``embeddings``: see :func:`raddpo_ext.pack_sessions`.
        """
        if layout == "replicated":
            prompts = self.prompts.repeat_interleave(self.case.candidates, 0)
            return {"input_ids": torch.cat([prompts, self.sessions.tokens], 1)}, None
        packed = self.pack(layout, embeddings)
        inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "attention_mask": packed.mask()}
        return inputs, packed

    def pack(self, layout: str, embeddings: bool = False) -> rx.PackedSessions:
        return rx.pack_sessions(list(self.prompts), self.sessions, layout=layout, embeddings=embeddings)

    def predictors(self, states: Tensor, packed: rx.PackedSessions | None) -> tuple[Tensor, Tensor | None]:
        """The states that predict the candidates' tokens, and ``rows`` of :func:`raddpo_ext.linear_token_logps`."""
        if packed is None:
            return states[:, self.case.prompt - 1 : -1], None
        return packed.distinct_hidden(states), packed.rows

    def states(self, inputs: dict[str, Any]) -> Tensor:
        """The model's last states."""
        found: Tensor = self.model.model(**inputs, use_cache=False).last_hidden_state
        return found

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten().float() for p in self.model.parameters() if p.grad is not None])

    def operations(self, tokens: int, rows: int, logits: int) -> dict[str, float]:
        """Of the products, forward and backward; every position of a row meets every other.

        Args:
            tokens: positions, in rows of one length.
            rows: number of rows.
            logits: of the head, in all its products.
        """
        width = HEADS * HEAD_DIM
        layer = HIDDEN * (2 * width + 2 * self.case.kv_heads * HEAD_DIM) + 3 * HIDDEN * INTERMEDIATE
        attention = 2 * width * tokens / rows
        return {"backbone": 6.0 * LAYERS * tokens * (layer + attention), "head": 6.0 * logits * HIDDEN}


def _sids(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Codes ``[C, L]`` of a session, the winner's first."""
    if case.source == "instruments":
        sids = np.unique(catalogues.real("instruments"), axis=0)
        winner = int(rng.integers(len(sids)))
        siblings = rng.permutation(np.flatnonzero((sids[:, 0] == sids[winner, 0]) & (np.arange(len(sids)) != winner)))
        others = rng.permutation(np.flatnonzero(sids[:, 0] != sids[winner, 0]))
        half = siblings[: (case.candidates - 1) // 2]
        return sids[np.concatenate([[winner], half, others])[: case.candidates]]
    sids = rng.integers(CODES, size=(case.candidates, LEVELS))
    sids[2::4, :2] = sids[0, :2]
    sids[3::4, :1] = sids[0, :1]
    return sids
