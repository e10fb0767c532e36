"""Token log-probs in plain PyTorch, one target at a time; arguments as in raddpo_ext.token_logps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab: SIDVocab | None = None,
    levels: Tensor | None = None,
    index: TrieIndex | None = None,
    nodes: Tensor | None = None,
    normalize: str = "vocab",
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Log-probs of ``targets`` ``[...]`` in the dtype of ``logits`` ``[..., V]``, which may be any float type."""
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    logits = logits / temperature
    # One level and one node per target, as far as the support needs them.
    if normalize == "level":
        levels = torch.arange(targets.shape[-1]) if levels is None else levels
        levels = levels.expand(targets.shape).reshape(-1)
    if nodes is not None:
        nodes = nodes.reshape(-1)
    logps = []
    for row, (x, target) in enumerate(
        zip(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).tolist(), strict=True)
    ):
        if target == ignore_index:
            logps.append(x.new_zeros(()))
            continue
        # The columns that the softmax runs over.
        if normalize == "vocab":
            support = list(range(len(x)))
        elif normalize == "level":
            support = level_tokens(vocab, 0 if levels is None else int(levels[row]))
        else:
            support = child_tokens(index, -1 if nodes is None else int(nodes[row]))
        if target in support and bool((x[support] > -math.inf).any()):
            logps.append(x[target] - x[support].logsumexp(0))
        else:
            logps.append(x.new_full((), -math.inf))
    return torch.stack(logps).view(targets.shape) if logps else logits.new_zeros(targets.shape)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """:func:`token_logps` of the logits ``hidden @ weight.T + bias``.

    ``hidden`` is ``[..., H]`` and ``weight`` is ``[V, H]``. With ``rows``, ``hidden`` is ``[U, H]``, and ``rows`` has
    the row that predicts each target.
    """
    logits = (hidden if rows is None else hidden[rows]) @ weight.T
    return token_logps(logits if bias is None else logits + bias, targets, **options)


def legal_mass(logits: Tensor, index: TrieIndex, nodes: Tensor) -> Tensor:
    """See :func:`raddpo_ext.legal_mass`."""
    mass = []
    for x, node in zip(logits.reshape(-1, logits.shape[-1]), nodes.reshape(-1).tolist(), strict=True):
        children = child_tokens(index, node)
        possible = bool((x[children] > -math.inf).any())
        mass.append(x[children].logsumexp(0) - x.logsumexp(0) if possible else x.new_full((), -math.inf))
    return torch.stack(mass).view(nodes.shape) if mass else logits.sum(-1)


def level_tokens(vocab: SIDVocab | None, level: int) -> list[int]:
    """The tokens that are possible at a level: its codes and, after the first level, the end of the sequence."""
    assert vocab is not None
    codes = [] if level == vocab.levels else [token for token in vocab.token_ids[level].tolist() if token >= 0]
    return codes + ([vocab.eos] if vocab.eos is not None and level > 0 else [])


def child_tokens(index: TrieIndex | None, node: int) -> list[int]:
    """The tokens of a node's children, found by following its path from the root."""
    assert index is not None
    if node < 0:
        return []
    codes, depth = index.paths(torch.tensor([node]))
    level = int(depth[0])
    path = [code for code in codes[0, :level].tolist() if code >= 0]
    if len(path) < level:  # after the end of the sequence
        return []
    children = index.children(path)
    if index.vocab is None:
        return children.tolist()
    tokens = [] if level == index.vocab.levels else index.vocab.token_ids[level].tolist()
    return [tokens[code] if code >= 0 else index.vocab.eos or 0 for code in children.tolist()]
