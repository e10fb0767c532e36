"""Groups of rollouts: draws them by constrained decoding, joins them with the ground truth, and rewards them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor

from raddpo_ext.data.pack_sessions import PackedSessions
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.integrations.retriever import SIDRetriever
from raddpo_ext.losses.session import SessionBatch
from raddpo_ext.policy.group_advantages import Advantages, group_advantages

#: What a reward function may also ask for, by these names.
EXTRAS = ("sessions", "targets")


class Rollouts(NamedTuple):
    """The rollouts of a batch of prompts, ``N`` in all, prompt by prompt, on the CPU.

    Attributes:
        owners: int64 ``[N]``, the prompt of each.
        codes: int64 ``[N, sid_levels]``, padded with -1.
        items: int64 ``[N]``, the first item of each SID.
        logps: float64 ``[N]``, the log-prob of each SID.
        weights: float64 ``[N]``: what a mean over the policy gives each rollout, 1 on average; None for 1 each.
    """

    owners: Tensor
    codes: Tensor
    items: Tensor
    logps: Tensor
    weights: Tensor | None


class Groups(NamedTuple):
    """Groups of experts and rollouts, on the CPU. Rows are those of ``sessions``.

    Attributes:
        sessions: the groups, ``[C, index.levels]`` tokens.
        targets: the ground truth of each group, experts or not.
        codes, items: see :class:`Rollouts`.
        logps: float64 ``[C]``, NaN for experts.
        weights: float64 ``[C]``, 1 for experts; or None.
    """

    sessions: SessionBatch
    targets: SessionBatch
    codes: Tensor
    items: Tensor
    logps: Tensor
    weights: Tensor | None


def draw(
    retriever: SIDRetriever,
    prompts: Tensor,
    mask: Tensor,
    *,
    kind: str,
    count: int,
    temperature: float,
    skip_forced: bool,
    seed: int,
    keys: Tensor,
) -> Rollouts:
    """Draw rollouts with a model.

    Args:
        retriever: a retriever whose model is in evaluation mode; for beams, of width ``count``.
        prompts, mask: see :meth:`SIDRetriever.retrieve`. More prompts than ``keys`` draw nothing.
        kind: ``"sample"``, ``"independent"`` or ``"beams"``.
        count: number of rollouts per prompt. Beams and samples without replacement may be fewer.
        temperature, seed, keys: see :meth:`SIDRetriever.sample`. Beams need none.
        skip_forced: do not run the model where only one way is left. Sharded models run equally often on every rank.
    """
    if kind == "beams":
        found: Any = retriever.retrieve(prompts, mask, skip_forced=skip_forced and retriever.normalize == "trie")
        logps, log_weights, counts = found.scores, None, (found.items >= 0).long()
    else:
        found = retriever.sample(
            prompts,
            mask,
            count,
            seed=seed,
            keys=F.pad(keys, (0, len(prompts) - len(keys))),
            replacement=kind == "independent",
            temperature=temperature,
            skip_forced=skip_forced,
        )
        logps, counts = found.logps, found.counts
        log_weights = found.log_weights if kind == "sample" else None
    # A SID that was drawn several times is several rollouts.
    counts = counts[: len(keys)].cpu().flatten()
    rows = torch.repeat_interleave(counts)
    owners = torch.div(rows, found.items.shape[1], rounding_mode="floor")
    sizes = owners.bincount(minlength=len(keys))
    weights = None
    if log_weights is not None:
        weights = log_weights.cpu().double().flatten()[rows].exp() * sizes[owners]
    return Rollouts(
        owners,
        found.sids.cpu().flatten(0, 1)[rows],
        found.items.cpu().flatten()[rows],
        logps.cpu().double().flatten()[rows],
        weights,
    )


def group(drawn: Sequence[Rollouts], batches: Sequence[PackedSessions], index: TrieIndex, experts: bool) -> Groups:
    """Join the rollouts of some batches, and the ground truth of their rows, to groups.

    Args:
        drawn: the rollouts of each batch.
        batches: the batches of :class:`PromptCollator`.
        index: the catalogue, on the CPU.
        experts: whether the ground truth joins the groups.

    Raises:
        ValueError: a prompt has no rollout, or its ground truth is not in the catalogue.
    """
    first = torch.tensor([0, *(len(packed.prompt_lengths) for packed in batches)]).cumsum(0)
    # The rollouts of all batches.
    owners = torch.cat([part.owners + begin for part, begin in zip(drawn, first, strict=False)])
    codes, items, logps = (torch.cat([part[i] for part in drawn]) for i in (1, 2, 3))  # type: ignore[misc]
    weights = None if drawn[0].weights is None else torch.cat([part.weights for part in drawn])  # type: ignore[misc]
    empty = owners.bincount(minlength=int(first[-1])) == 0
    if bool(empty.any()):
        row = int(empty.nonzero()[0, 0])
        raise ValueError(f"row {row} of the batch has no rollout: the model's log-probs are not finite")
    tokens, lengths = _tokens(index, codes)
    # The ground truth of all batches.
    targets = _targets(batches, index.levels)
    nodes, truth = _leaves(index, targets), targets.owners()
    if not experts:
        nodes, truth = nodes[:0], truth[:0]
    count = len(truth)
    begins, _ = index.item_ranges(nodes)
    # Experts before rollouts, group by group.
    order = torch.cat((2 * truth, 2 * owners + 1)).argsort(stable=True)

    def joined(of_experts: Tensor, of_rollouts: Tensor) -> Tensor:
        return torch.cat((of_experts[:count], of_rollouts))[order]

    sizes = torch.cat((truth, owners)).bincount(minlength=int(first[-1]))
    sessions = SessionBatch(
        joined(targets.tokens, tokens),
        joined(targets.lengths, lengths),
        F.pad(sizes.cumsum(0), (1, 0)),
        truth.bincount(minlength=int(first[-1])),
    )
    ones = torch.ones(count, dtype=torch.float64)
    return Groups(
        sessions=sessions,
        targets=targets,
        codes=joined(index.paths(nodes)[0], codes),
        items=joined(index.items_at(begins), items),
        logps=joined(ones.fill_(torch.nan), logps),
        weights=None if weights is None else joined(torch.ones_like(ones), weights),
    )


def reward(reward_fn: Callable[..., Any], groups: Groups, rows: Sequence[Any], device: torch.device) -> Tensor:
    """Call a user's reward function, and check what it returns.

    Args:
        reward_fn: see :class:`PolicyTrainer`.
        groups: the groups.
        rows: the row of each group.
        device: where the function gets its tensors.

    Returns:
        float32 or float64 ``[C]``, on the CPU.

    Raises:
        ValueError: the function raises, or returns something else than a finite number per candidate.
    """
    named = inspect.signature(reward_fn).parameters
    extras = {name: getattr(groups, name).to(device) for name in EXTRAS if name in named}
    repeated = [rows[owner] for owner in groups.sessions.owners().tolist()]
    try:
        given = reward_fn(groups.items.to(device), groups.codes.to(device), repeated, **extras)
    except Exception as error:
        raise ValueError(f"reward_fn raised {type(error).__name__}: {error}") from error
    try:
        rewards = given.detach().cpu() if isinstance(given, Tensor) else torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"reward_fn must return a number per candidate, got {type(given).__name__}") from None
    if rewards.shape != groups.items.shape or rewards.is_complex():
        raise ValueError(
            f"reward_fn must return one number per candidate ({len(groups.items)}), got shape {tuple(rewards.shape)}"
        )
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    wrong = (~rewards.isfinite()).nonzero()
    if len(wrong):
        place = int(wrong[0, 0])
        raise ValueError(
            f"reward_fn must return finite numbers, got {float(rewards[place])} for candidate {place} (item "
            f"{int(groups.items[place])})"
        )
    return rewards


def advantages_of(rewards: Tensor, groups: Groups, options: dict[str, Any], accelerator: Any) -> Advantages:
    """The advantages of groups.

    Args:
        rewards: ``[C]``.
        groups: the groups.
        options: of :func:`raddpo_ext.group_advantages`. The batch of ``scale="batch"`` is that of all processes.
        accelerator: the trainer's ``Accelerator``.
    """
    sessions, weights = groups.sessions, groups.weights
    if options["scale"] != "batch" or accelerator.num_processes == 1:
        targets = groups.targets if options["credit"] == "marginal" else None
        return group_advantages(rewards, sessions, weights=weights, targets=targets, **options)
    own = (sessions.tokens, sessions.lengths, sessions.offsets.diff(), sessions.num_positives, rewards, weights)
    every = gather_object([own])
    tokens, lengths, sizes, positives, rewards = (torch.cat([part[i] for part in every]) for i in range(5))
    weights = None if weights is None else torch.cat([part[5] for part in every])
    whole = SessionBatch(tokens, lengths, F.pad(sizes.cumsum(0), (1, 0)), positives)
    found = group_advantages(rewards, whole, weights=weights, **options)
    before = every[: accelerator.process_index]
    first, row = sum(len(part[2]) for part in before), sum(len(part[1]) for part in before)
    rows = slice(row, row + sessions.num_candidates)
    return Advantages(found.values[rows], found.active[first : first + sessions.num_sessions], None)


def kept_rows(sessions: SessionBatch, kept: Tensor) -> tuple[SessionBatch, Tensor]:
    """The sessions with some of their rows, and the numbers of these rows; a session may lose all of its rows."""
    rows = kept.nonzero()[:, 0]
    owners, count = sessions.owners()[rows], sessions.num_sessions
    positives = owners[sessions.is_positive()[rows]].bincount(minlength=count)
    offsets = F.pad(owners.bincount(minlength=count).cumsum(0), (1, 0))
    return SessionBatch(sessions.tokens[rows], sessions.lengths[rows], offsets, positives), rows


def _tokens(index: TrieIndex, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The token ids ``[N, index.levels]`` of SIDs, 0 beyond their lengths, and these lengths."""
    ends = (codes >= 0).sum(1)
    tokens = codes if index.vocab is None else index.vocab.lookup(codes, ends)
    return tokens[:, : index.levels].clamp(min=0), ends + (index.eos is not None)


def _targets(batches: Sequence[PackedSessions], levels: int) -> SessionBatch:
    """The ground truth of the rows of some batches, one session per row, as ``[P, levels]`` tokens."""
    tokens, lengths, sizes = [], [], []
    for packed in batches:
        sessions = packed.sessions.to("cpu")
        rows = sessions.is_positive()
        of_rows = sessions.tokens[rows][:, :levels]
        tokens.append(F.pad(of_rows, (0, levels - of_rows.shape[1])))
        lengths.append(sessions.lengths[rows])
        sizes.append(sessions.num_positives)
    number = torch.cat(sizes)
    too_long = torch.cat(lengths) > levels
    if bool(too_long.any()):
        place = int(too_long.nonzero()[0, 0])
        raise ValueError(f"positives must be SIDs of the index, got one of {int(torch.cat(lengths)[place])} tokens")
    return SessionBatch(torch.cat(tokens), torch.cat(lengths), F.pad(number.cumsum(0), (1, 0)), number)


def _leaves(index: TrieIndex, sids: SessionBatch) -> Tensor:
    """The node at the end of each SID, int64 ``[P]``."""
    tokens = F.pad(sids.tokens.masked_fill(~sids.mask(), -1), (0, 1), value=-1)
    nodes = index.nodes(tokens).gather(1, sids.lengths[:, None])[:, 0]
    missing = index.item_ranges(nodes)[1] == 0
    if bool(missing.any()):
        place = int(missing.nonzero()[0, 0])
        row = int(sids.owners()[place])
        raise ValueError(
            f"row {row} of the batch has a positive that is not in the index: "
            f"{sids.tokens[place, : sids.lengths[place]].tolist()}"
        )
    return nodes
