"""Negatives for preference training: from the model's own beam search, from the winner's siblings, by popularity.

Items are *row numbers* of a catalogue's ``sids``, in arguments and results. If the catalogue has item ids, the id of an
item is ``item_ids[row]``. Only :class:`BeamNegatives` uses the item ids of its index: to mix it with other samplers,
build that index with row numbers as ids, which is the default of ``TrieIndex.build``. Every sampler here is a
:class:`NegativeSampler`, and :func:`sample_negatives` mixes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.data.prompts import pad_prompts
from raddpo_ext.data.sid_draws import SortedItems, distinct_sids, sid_numbers
from raddpo_ext.index.trie import TrieIndex

MOST_WEIGHT = 2**53  # draws use a float64, which is exact below this sum


class NegativeSampler(Protocol):
    """The interface of the samplers of negatives.

    Example:
        >>> class FirstItems:
        ...     def sample(self, prompts, positives, count, generator):
        ...         return torch.tensor([[item for item in range(9) if item not in row][:count] for row in positives])
        >>> FirstItems().sample([[5]], [[0, 2]], 3, torch.Generator())
        tensor([[1, 3, 4]])
    """

    def sample(
        self, prompts: Sequence[Any], positives: Sequence[Sequence[int]], count: int, generator: torch.Generator
    ) -> Tensor:
        """Draw negatives for each prompt.

        No negative has the SID of a positive or of another negative of its prompt. If fewer than ``count`` such items
        exist, the row ends in -1. A prompt without positives has no winner, and its row is all -1.

        Args:
            prompts: ``B`` sequences of token ids.
            positives: ``B`` sequences of items, the winner first: row numbers of ``sids``, not item ids.
            count: negatives per prompt.
            generator: a generator on the CPU. The draws depend on its state alone.

        Returns:
            int64 ``[B, count]`` on the CPU, row numbers of ``sids``.

        Raises:
            ValueError, TypeError: naming the argument and the value.
        """
        ...


class BeamNegatives:
    """Negatives that the model itself retrieves, drawn uniformly from the results of its constrained beam search.

    A narrower beam gives harder negatives, but more of them are items that the user takes later.

    Args:
        retriever: a :class:`raddpo_ext.SIDRetriever` with a model in evaluation mode. *Items are the ids of its index*,
            in positives and negatives; they are row numbers only if the index was built with row numbers. Of several
            items with the same SID it gives the first.
        batch_size: prompts per search.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> index = rx.TrieIndex.build([[0, 1], [2, 3]])
        >>> retriever = rx.SIDRetriever(LlamaForCausalLM(config).eval(), index, beam_width=2)
        >>> sampler = rx.negatives.BeamNegatives(retriever)
        >>> sampler.sample([[7, 7]], [[0]], 2, torch.Generator().manual_seed(0))
        tensor([[ 1, -1]])
    """

    def __init__(self, retriever: Any, batch_size: int = 64) -> None:
        if not hasattr(retriever, "retrieve") or not hasattr(retriever, "index"):
            raise TypeError(f"retriever must be a SIDRetriever, got {type(retriever).__name__}")
        self.retriever = retriever
        self.batch_size = _check.integer(batch_size, "batch_size", 1)
        index = retriever.index
        # The leaf of each item, sorted by item id, so that items can be looked up.
        nodes = torch.arange(index.node_bound, device=index.device)
        first, number = (tensor.cpu() for tensor in index.item_ranges(nodes))
        leaf = torch.repeat_interleave(number)
        place = first[leaf] + torch.arange(len(leaf)) - (number.cumsum(0) - number)[leaf]
        self._ids, order = index.items.cpu().long()[place].sort()
        self._leaves = leaf[order]  # the leaf of each id

    def sample(
        self, prompts: Sequence[Any], positives: Sequence[Sequence[int]], count: int, generator: torch.Generator
    ) -> Tensor:
        """See :meth:`NegativeSampler.sample`. A positive that is not in the index is not an error."""
        items = _checked(prompts, positives, count, generator)
        beam = self._search(prompts, [row for row, winner in enumerate(items[:, 0].tolist()) if winner >= 0])
        # Found items with the SID of a positive are not free; of the rest, the random keys choose.
        taken = self._leaves_of(items)
        free = (beam >= 0) & (self._leaves_of(beam)[:, :, None] != taken[:, None]).all(2)
        keys = torch.rand(beam.shape, generator=generator, dtype=torch.float64).masked_fill(~free, -1)
        order = keys.argsort(1, descending=True)[:, :count]
        chosen = beam.masked_fill(~free, -1).gather(1, order)
        return torch.nn.functional.pad(chosen, (0, count - chosen.shape[1]), value=-1)

    def _search(self, prompts: Sequence[Any], rows: list[int]) -> Tensor:
        """The items found for the prompts in ``rows``, best first: ``[B, R]``, -1 for other prompts."""
        for row in rows:
            if not len(prompts[row]):
                raise ValueError(f"prompts[{row}] must hold at least one token, got none")
        tokens = {row: _check.integer_tensor(prompts[row], f"prompts[{row}]", 1) for row in rows}
        rows = sorted(rows, key=lambda row: len(tokens[row]))  # so that batches need little padding
        device = self.retriever.index.device
        beam = torch.full((len(prompts), 0), -1)
        for at in range(0, len(rows), self.batch_size):
            batch = rows[at : at + self.batch_size]
            found = self.retriever.retrieve(*pad_prompts([tokens[row] for row in batch], device)).items.cpu()
            if not beam.shape[1]:
                beam = torch.full((len(prompts), found.shape[1]), -1)
            beam[batch] = found
        return beam

    def _leaves_of(self, items: Tensor) -> Tensor:
        """The SID of each item, as a node of the index; -1 for an item that it lacks."""
        place = torch.searchsorted(self._ids, items).clamp(max=len(self._ids) - 1)
        return torch.where(self._ids[place] == items, self._leaves[place], -1)


class SiblingNegatives:
    """Negatives whose SID shares its first codes with the winner's, drawn uniformly.

    A random item rarely shares a prefix with the winner, and without a shared prefix TLGD has nothing to protect.

    Args:
        sids: integer codes ``[N, L]``, -1 beyond a shorter SID's length.
        prefix: minimum number of shared codes, below ``L``; 0 draws from the whole catalogue. A winner with fewer codes
            has no siblings.

    Example:
        >>> sampler = rx.negatives.SiblingNegatives([[0, 1], [0, 2], [5, 5]], prefix=1)
        >>> sampler.sample([[9]], [[0]], 2, torch.Generator().manual_seed(0))
        tensor([[ 1, -1]])
    """

    def __init__(self, sids: Any, prefix: int = 1) -> None:
        distinct, of_item = distinct_sids(sids)
        self.prefix = _check.integer(prefix, "prefix", 0)
        if prefix >= distinct.shape[1]:
            raise ValueError(f"prefix must be below {distinct.shape[1]}, the number of levels, got {prefix}")
        self._items = SortedItems(of_item, torch.ones_like(of_item))
        # SIDs are sorted, so those that share a prefix are a range: its bounds, for each SID.
        head = distinct[:, :prefix]
        begins = torch.ones(len(head), dtype=torch.bool)
        begins[1:] = (head[1:] != head[:-1]).any(1)
        group = begins.cumsum(0) - 1
        bounds = torch.cat([begins.nonzero()[:, 0], torch.tensor([len(head)])])
        self._begin, self._end = bounds[group], bounds[group + 1]

    def sample(
        self, prompts: Sequence[Any], positives: Sequence[Sequence[int]], count: int, generator: torch.Generator
    ) -> Tensor:
        """See :meth:`NegativeSampler.sample`. Ignores the prompts."""
        taken = self._items.numbers(_checked(prompts, positives, count, generator))
        # Draw from the winner's range, which is empty without a winner.
        winner = taken[:, 0].clamp(min=0)
        end = torch.where(taken[:, 0] >= 0, self._end[winner], self._begin[winner])
        return self._items.draw(self._begin[winner], end, taken, count, generator)


class PopularityNegatives:
    """Negatives drawn in proportion to how often they were taken, one after another without replacement.

    Args:
        sids: integer codes ``[N, L]``, -1 beyond a shorter SID's length.
        counts: integers ``[N]``, ``>= 0``, with a sum from 1 to ``2**53 - 1``. An item with count 0 is never drawn. For
            another distribution, scale and round its weights.

    Example:
        >>> sampler = rx.negatives.PopularityNegatives([[0, 1], [0, 2], [5, 5]], counts=[5, 3, 0])
        >>> sampler.sample([[9]], [[0]], 2, torch.Generator().manual_seed(0))
        tensor([[ 1, -1]])
    """

    def __init__(self, sids: Any, counts: Any) -> None:
        _, of_item = distinct_sids(sids)
        weights = _check.integer_tensor(counts, "counts", 1).cpu()
        if len(weights) != len(of_item):
            raise ValueError(f"counts must have one entry per row of sids ({len(of_item)}), got {len(weights)}")
        _check.none(weights < 0, lambda item: f"counts[{item}] = {int(weights[item])} is negative")
        if not 0 < float(weights.double().sum()) < MOST_WEIGHT:
            raise ValueError(f"counts must have a sum from 1 to 2**53 - 1, got {float(weights.double().sum()):g}")
        self._items = SortedItems(of_item, weights)

    def sample(
        self, prompts: Sequence[Any], positives: Sequence[Sequence[int]], count: int, generator: torch.Generator
    ) -> Tensor:
        """See :meth:`NegativeSampler.sample`. Ignores the prompts."""
        taken = self._items.numbers(_checked(prompts, positives, count, generator))
        begin = torch.zeros(len(taken), dtype=torch.int64)
        return self._items.draw(begin, (taken[:, 0] >= 0) * self._items.num_sids, taken, count, generator)


def sample_negatives(
    samplers: Sequence[tuple[NegativeSampler, int]],
    sids: Any,
    prompts: Sequence[Any],
    positives: Sequence[Sequence[int]],
    generator: torch.Generator,
) -> Tensor:
    """Draw negatives from several samplers. All SIDs of a prompt are distinct.

    Each sampler gets the negatives of the samplers before it as further positives. An item with the SID of a positive,
    or of a negative in an earlier column, becomes -1 even if a sampler gives it.

    Args:
        samplers: pairs of a sampler and its number of negatives per prompt.
        sids: integer codes ``[N, L]``, -1 beyond a shorter SID's length; with the same rows as the samplers' SIDs.
        prompts, positives, generator: see :meth:`NegativeSampler.sample`.

    Returns:
        int64 ``[B, sum of the numbers]``, row numbers of ``sids``, with the columns of the samplers side by side; -1
        where a sampler had too few.

    Raises:
        ValueError: naming the argument and the value; also if :class:`BeamNegatives` gives an item whose SID in its
            index is not that in ``sids``, because the ids of the index are not row numbers.
        TypeError: naming the argument and the value.

    Example:
        >>> sids = [[0, 1], [0, 2], [5, 5]]
        >>> siblings = rx.negatives.SiblingNegatives(sids)
        >>> popular = rx.negatives.PopularityNegatives(sids, counts=[5, 3, 1])
        >>> generator = torch.Generator().manual_seed(0)
        >>> rx.negatives.sample_negatives([(siblings, 1), (popular, 1)], sids, [[9]], [[0]], generator)
        tensor([[1, 2]])
    """
    distinct, of_item = distinct_sids(sids)
    items = _checked(prompts, positives, 0, generator)
    empty = items[:, :1] < 0
    taken = sid_numbers(of_item, items, "positives")
    known = [list(row) for row in positives]
    columns = [items[:, :0]]
    for place, (sampler, count) in enumerate(samplers):
        name = f"samplers[{place}]"
        chosen = sampler.sample(prompts, known, count, generator)
        if chosen.shape != (len(items), count):
            raise ValueError(f"{name} must give shape {(len(items), count)}, got {tuple(chosen.shape)}")
        # By SID: neither a taken one nor one of an earlier column may be drawn.
        numbers = sid_numbers(of_item, chosen, name)
        if isinstance(sampler, BeamNegatives):
            _check_rows(sampler.retriever.index, chosen[chosen >= 0], distinct[numbers[chosen >= 0]], name)
        clash = (numbers[:, :, None] == taken[:, None]).any(2) | empty
        clash |= (numbers[:, :, None] == numbers[:, None]).tril(-1).any(2)
        columns.append(chosen.masked_fill(clash, -1))
        # The next sampler takes these negatives for positives.
        taken = torch.cat([taken, numbers.masked_fill(clash, -1)], 1)
        known = [
            [*before, *(item for item in row if item >= 0)]
            for before, row in zip(known, columns[-1].tolist(), strict=True)
        ]
    return torch.cat(columns, 1)


def _check_rows(index: TrieIndex, items: Tensor, codes: Tensor, name: str) -> None:
    """Raise ValueError unless the items ``[K]`` have the SIDs ``codes`` ``[K, L]`` in the index."""
    theirs = index.sids_of(items).cpu()
    columns = min(theirs.shape[1], codes.shape[1])
    wrong = (theirs[:, :columns] != codes[:, :columns]).any(1)
    _check.none(
        wrong,
        lambda place: (
            f"{name} gives item {int(items[place])}, whose SID is {theirs[place].tolist()} in its index but "
            f"{codes[place].tolist()} in sids: build the index with row numbers as item ids"
        ),
    )


def _checked(
    prompts: Sequence[Any], positives: Sequence[Sequence[int]], count: int, generator: torch.Generator
) -> Tensor:
    """The positives, int64 ``[B, P]`` with at least one column, padded with -1."""
    _check.integer(count, "count", 0)
    _check.instance(generator, "generator", torch.Generator)
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, got one on {generator.device}")
    if len(prompts) != len(positives):
        raise ValueError(f"positives must have one entry per prompt ({len(prompts)}), got {len(positives)}")
    for place, row in enumerate(positives):
        if not isinstance(row, Sequence):
            raise TypeError(f"positives[{place}] must be a sequence of items, got {row!r}")
    # From ragged lists to a padded table.
    flat = [item for row in positives for item in row]
    items = _check.integer_tensor(flat, "positives", 1) if flat else torch.empty(0, dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in positives], dtype=torch.int64)
    padded = torch.full((len(positives), max([1, *lengths.tolist()])), -1)
    padded[torch.arange(padded.shape[1]) < lengths[:, None]] = items
    _check.none(
        (padded < 0).sum(1) + lengths > padded.shape[1],
        lambda row: f"positives[{row}] holds an item below 0: {list(positives[row])}",
    )
    return padded
