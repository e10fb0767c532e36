"""A small Qwen3 that reads a shopper's query and writes the SIDs of what was clicked."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

import raddpo_ext as rx
from demo import sft
from demo.search.data import Sessions, Tokens
from demo.search.shop import Queries
from raddpo_ext.integrations.transformers import session_states

BATCH = 256
EPOCHS = 8
LEARNING_RATE = 5e-3
AT_ONCE = 64  # queries


def make_model(tokens: Tokens, seed: int) -> Qwen3ForCausalLM:
    longest = tokens.of_item.shape[1]
    return sft.make_model(tokens.size, longest, 96, seed, tokens.vocab.eos, hidden_size=48, layers=2)


def train(
    model: Qwen3ForCausalLM,
    tokens: Tokens,
    sessions: Sessions,
    seed: int,
    epochs: int = EPOCHS,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> Qwen3ForCausalLM:
    """Supervised training in place: every positive of a session is predicted from its query.

    The sessions are packed: a query is read once for all that was clicked.
    """
    model.train()
    steps = epochs * math.ceil(len(sessions.positives) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=sft.WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: sft.rate(step, steps, sft.WARM_UP))
    loss_fn = rx.RADDPOLoss(sft_weight=1.0)  # no negatives: the supervised term alone
    rng, step = np.random.default_rng([seed, 0]), 0
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(sessions.positives)), steps // epochs):
            prompts, batch = sessions.rows(torch.from_numpy(rows)).batch(tokens, sessions.positives.shape[1], 0)
            packed = rx.pack_sessions(prompts, batch, layout="trie", embeddings=False)
            loss = loss_fn(sessions=packed.sessions, **session_states(model, packed)._asdict()).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            on_step(step, steps, float(loss.detach()))
    return model.eval()


def retrieve(model: Qwen3ForCausalLM, tokens: Tokens, queries: Queries, beams: int, top_k: int) -> Tensor:
    """The best items of each query by constrained beam search: int64 ``[B, top_k]``, padded with -1."""
    retriever = rx.SIDRetriever(model, tokens.index, beam_width=beams)
    prompts = tokens.prompts(queries)
    return sft.by_length(prompts, lambda ids: retriever.retrieve(ids, top_k=top_k).items, AT_ONCE)
