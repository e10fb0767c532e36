"""Preference sessions out of purchases: what was bought next, and what could have been shown instead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import raddpo_ext as rx
from demo.purchases.model import Tokens
from demo.sft import HISTORY
from raddpo_ext.data.catalogue import Catalogue
from raddpo_ext.data.negatives import BeamNegatives, PopularityNegatives, SiblingNegatives, sample_negatives
from raddpo_ext.data.session_log import read_sessions, write_sessions

POSITIVES = 3  # at most: the winner is the next purchase, the further positives are the one or two after it
BEAM, SIBLINGS, POPULAR = 2, 3, 3  # negatives of each kind
BEAM_WIDTH = 20
ASIDE = 10  # sessions of every tenth shopper are kept from the alignment, to see what it does to them
BATCH = 512


class Session(NamedTuple):
    """Items: what was bought before, oldest first, and the positives, the winner first."""

    history: list[int]
    positives: list[int]


def cut_sessions(catalogue: Catalogue, count: int, count_aside: int, seed: int) -> tuple[list[Session], list[Session]]:
    """At most so many sessions to align on, and of other shoppers."""
    rng = np.random.default_rng(seed)
    seen = [items for shopper, items in enumerate(catalogue.train) if shopper % ASIDE]
    sessions, aside = cut(seen, count, rng), cut(catalogue.train[::ASIDE], count_aside, rng)
    if not sessions or not aside:
        raise ValueError(f"{catalogue.name}: too few shoppers with three purchases to mine sessions from")
    return sessions, aside


def cut(sequences: Sequence[list[int]], count: int, rng: np.random.Generator) -> list[Session]:
    """``count`` sessions, or as many as there are: each cuts a sequence at another place, behind at least one purchase
    and before at least two different items."""
    sessions = []
    for items in sequences:
        for place in range(1, len(items) - 1):
            positives = list(dict.fromkeys(items[place : place + POSITIVES]))
            if len(positives) > 1:
                sessions.append(Session(items[max(0, place - HISTORY) : place], positives))
    return [sessions[number] for number in rng.permutation(len(sessions))[:count]]


def mine(
    sessions: list[Session],
    path: Path,
    catalogue: Catalogue,
    tokens: Tokens,
    model: Any,
    index: rx.TrieIndex,
    seed: int,
) -> Any:
    """The sessions with their negatives as token ids, written to a session log and read from there."""
    generator = torch.Generator().manual_seed(seed)
    sold = np.bincount(np.concatenate([np.array(items) for items in catalogue.train]), minlength=len(catalogue.sids))
    samplers = [
        (BeamNegatives(rx.SIDRetriever(model, index, beam_width=BEAM_WIDTH), batch_size=16), BEAM),
        (SiblingNegatives(catalogue.sids), SIBLINGS),
        (PopularityNegatives(catalogue.sids, sold), POPULAR),
    ]
    rows = []
    for at in tqdm(range(0, len(sessions), BATCH), desc="mining", unit="batch", disable=None):
        batch = sessions[at : at + BATCH]
        prompts = [tokens.prompt(session.history).tolist() for session in batch]
        positives = [session.positives for session in batch]
        negatives = sample_negatives(samplers, catalogue.sids, prompts, positives, generator).tolist()
        rows += [
            {
                "prompt_ids": prompt,
                "positives": [tokens.of_item[item].tolist() for item in liked],
                "negatives": [tokens.of_item[item].tolist() for item in others if item >= 0],  # -1: there is no more
            }
            for prompt, liked, others in zip(prompts, positives, negatives, strict=True)
        ]
    write_sessions(path, rows)
    return read_sessions(path, vocab=tokens.vocab, index=index)
