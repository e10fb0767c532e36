"""SessionCollator: makes one packed batch from rows of a data set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.data.merged_ids import MergedIds
from raddpo_ext.data.pack_sessions import PackedSessions, pack_sessions
from raddpo_ext.data.session_sids import SIDCheck
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.integrations.preference_rows import TEXT, TOKENS, tokenize_row
from raddpo_ext.integrations.session_pages import SessionPages
from raddpo_ext.losses.session import SessionBatch

_logger = logging.getLogger(__name__)


class SessionCollator:
    """Packs rows of sessions into a batch, as the ``collate_fn`` of a ``DataLoader`` and in its workers.

    A row holds token ids: ``prompt_ids``, ``positives`` and ``negatives``. The latter two are lists of candidates, of
    any number and lengths, strongest positive first. With a ``tokenizer`` a row may instead hold TRL's columns
    ``prompt``, ``chosen`` and ``rejected``, as text or as messages; ``chosen`` and ``rejected`` are one completion or a
    list of them. A column ``items``, the item ids of the positives, is passed on for the evaluation.

    A prompt that does not fit loses its first tokens, which is logged once; candidates are never cut.

    With ``page`` the positives alone are learned, by next-token prediction (GenRec): ``batch["page"]`` has what is to
    be predicted, and ``negatives`` may be missing and are left out. A column ``tiers``, a number per positive of at
    least 0, weights them, such as 1 for an order and 0.1 for an exposure. The loss is a weighted mean::

        page = batch["page"]
        logps = rx.linear_token_logps(states.hidden, states.weight, page["tokens"], rows=page["rows"])
        loss = -(page["weights"] * logps).sum() / page["weights"].sum()

    Args:
        layout, padding_side, pad_token_id, pad_to_multiple_of, max_length, vocab, embeddings: see
            :func:`raddpo_ext.pack_sessions`. With ``vocab.eos``, candidates of text and of messages end in it.
        tokenizer: a tokenizer of ``transformers``, for rows of text.
        vocab_size: token ids must be below it; None: no limit.
        sids_only: refuse candidates that are not SIDs of ``vocab``: a token that its level lacks, too many codes, and
            with ``vocab.eos`` a candidate that does not end in it.
        page: ``"sequence"`` puts the positives of a row into one page, ``item <separator> item ...``, where each token
            sees the prompt and the page before it; for decoder-only models. ``"set"``: each positive sees the prompt
            only. Pages of one item are the same in both. None: positives and negatives, to be compared.
        separator: token id between two items of a page, or None.
        supervise_separator: also predict the separators, with the tier of the item before. This needs a softmax over
            the whole vocabulary.
        max_items: maximum number of positives of a row, the first ones; default: all. With ``page``.
        level_weights: weight of each token of a SID; default: 1 each. With ``page``.
        merge: put a merged id for each SID of a prompt, for a model with a :class:`raddpo_ext.TokenMerger`. Candidates
            keep their tokens. Needs ``vocab``, and as ``vocab_size`` the rows of the model's embedding table.

    Raises:
        ValueError, TypeError: naming the argument and the value; when called, the row in the batch and the value.

    Example:
        >>> from raddpo_ext.integrations.transformers import SessionCollator
        >>> rows = [{"prompt_ids": [1, 2], "positives": [[4, 8]], "negatives": [[4, 9], [5, 10]]}]
        >>> batch = SessionCollator()(rows)
        >>> batch["packed"].input_ids
        tensor([[ 1,  2,  4,  8,  4,  9,  5, 10]])
        >>> SessionCollator(layout="trie")(rows)["packed"].input_ids.shape
        torch.Size([1, 7])
    """

    def __init__(
        self,
        *,
        layout: str = "candidates",
        padding_side: str = "right",
        pad_token_id: int = 0,
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
        vocab: SIDVocab | None = None,
        embeddings: bool = True,
        tokenizer: Any = None,
        vocab_size: int | None = None,
        sids_only: bool = False,
        page: str | None = None,
        separator: int | None = None,
        supervise_separator: bool = True,
        max_items: int | None = None,
        level_weights: Sequence[float] | None = None,
        merge: bool = False,
    ) -> None:
        self.options: dict[str, Any] = {
            "layout": layout,
            "padding_side": padding_side,
            "pad_token_id": pad_token_id,
            "pad_to_multiple_of": pad_to_multiple_of,
            "max_length": max_length,
            "vocab": vocab,
            "embeddings": embeddings,
        }
        self.tokenizer = tokenizer
        self.vocab_size = None if vocab_size is None else _check.integer(vocab_size, "vocab_size", 1)
        if sids_only and vocab is None:
            raise ValueError("sids_only needs vocab, got None")
        self._merged: MergedIds | None = None
        if merge:
            if vocab is None or vocab_size is None:
                raise ValueError(f"merge needs vocab and vocab_size, got {vocab} and {vocab_size}")
            self._merged = MergedIds(vocab, vocab_size)
        self._sids = SIDCheck(vocab) if sids_only and vocab is not None else None
        self._has_logged = False
        self.pages = None
        if page is not None:
            self.pages = SessionPages(page, separator, supervise_separator, max_items, level_weights)
            self._check_separator(self.pages.separator, vocab)
            del self.options["embeddings"]  # of last tokens, which only comparisons need
        elif (separator, max_items, level_weights) != (None, None, None):
            raise ValueError("separator, max_items and level_weights need page, got None")
        # An empty batch makes packing check these options here, and not at the first batch.
        self([])

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pack some rows.

        Returns:
            ``packed``, the :class:`PackedSessions`; ``items``, int64 ``[S, P]`` padded with -1, if rows have them; with
            ``page`` also ``page``: ``tokens``, int64 ``[C, N]``, what is to be predicted of each item and -100
            elsewhere; ``rows``, int64 ``[C, N]``, the row of the states that predicts each; and ``weights``, float32
            ``[C, N]``. ``N`` is ``L``, or ``L + 1`` with supervised separators.
        """
        # Tokenize, flatten and pack.
        given, rows = rows, [self._merged_row(row, f"rows[{i}]") for i, row in enumerate(rows)]
        sessions = self._sessions(rows)
        batch: dict[str, Any] = {}
        if self.pages is None:
            packed = pack_sessions([row["prompt_ids"] for row in rows], sessions, **self.options)
        else:
            packed, batch["page"] = self.pages.pack(rows, sessions, self.options)
        # The checks name rows as the caller gave them.
        if self.vocab_size is not None:
            self._check_vocabulary(packed, self.vocab_size)
        if self._sids is not None:
            self._check_sids(sessions, given, self._sids)
        if packed.num_truncated and not self._has_logged:
            self._has_logged = True
            _logger.warning(
                "%d of %d prompts of a batch exceeded max_length = %d together with their candidates and lost their "
                "first tokens; this is logged once",
                packed.num_truncated,
                len(rows),
                self.options["max_length"],
            )
        batch["packed"] = packed
        if any("items" in row for row in rows):
            batch["items"] = _items(rows)
        return batch

    def num_tokens(self, row: dict[str, Any]) -> int:
        """The number of tokens of a row, prompt and candidates together; a merged SID counts as one."""
        row = self._merged_row(row, "row")
        separators = 0 if self.pages is None else self.pages.num_separators(len(row["positives"]))
        return len(row["prompt_ids"]) + separators + sum(len(ids) for column in TOKENS[1:] for ids in row[column])

    def named_candidates(
        self, sessions: SessionBatch, rows: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[str, list[int]]]:
        """Each candidate's place in the rows, as an error names it, and its tokens."""
        tokens, lengths = sessions.tokens.tolist(), sessions.lengths.tolist()
        offsets, positives = sessions.offsets.tolist(), sessions.num_positives.tolist()
        for i, row in enumerate(rows):
            columns = TOKENS[1:] if TOKENS[0] in row else TEXT[1:]
            for candidate in range(offsets[i], offsets[i + 1]):
                place = candidate - offsets[i]
                column, place = (columns[0], place) if place < positives[i] else (columns[1], place - positives[i])
                yield f"rows[{i}][{column!r}][{place}]", tokens[candidate][: lengths[candidate]]

    def _merged_row(self, row: Any, name: str) -> dict[str, Any]:
        """A row of token ids, its prompt merged if asked for; ``name`` is for errors."""
        row = self._tokens(row, name)
        if self._merged is None:
            return row
        return {**row, TOKENS[0]: self._merged.merge(row[TOKENS[0]], f"{name}[{TOKENS[0]!r}]")}

    def _tokens(self, row: Any, name: str) -> dict[str, Any]:
        """A row of token ids as it is, or a row of text tokenized; ``name`` is for errors. With ``page`` its items."""
        if not isinstance(row, dict):
            raise TypeError(f"{name} must be a dict, got {type(row).__name__}")
        if self.pages is None:
            return self._token_ids(row, name)
        return self.pages.cut(self._token_ids(row | {TOKENS[2] if TOKENS[0] in row else TEXT[2]: []}, name), name)

    def _token_ids(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        missing = [column for column in TOKENS if column not in row]
        if not missing:
            return row
        if TEXT[0] not in row:
            raise ValueError(f"{name} has no column {missing[0]!r}, only {sorted(row)}")
        if self.tokenizer is None:
            raise ValueError(f"{name} holds text ({sorted(row)}), which needs a tokenizer")
        vocab = self.options["vocab"]
        return tokenize_row(row, self.tokenizer, name, None if vocab is None else vocab.eos)

    def _sessions(self, rows: list[dict[str, Any]]) -> SessionBatch:
        """The candidates of the rows as a batch of sessions."""
        candidates: list[Any] = []
        positives, sizes = [], [0]
        for i, row in enumerate(rows):
            for column in TOKENS[1:]:
                if not hasattr(row[column], "__len__") or isinstance(row[column], (str, dict)):
                    raise TypeError(f"rows[{i}][{column!r}] must be a list of candidates, got {row[column]!r}")
                candidates.extend(row[column])
            positives.append(len(row["positives"]))
            sizes.append(len(row["positives"]) + len(row["negatives"]))
        # From ragged lists to a padded table.
        flat, lengths = _flatten(candidates, rows)
        tokens = np.zeros((len(candidates), lengths.max(initial=1)), np.int64)
        tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = flat
        return SessionBatch(
            torch.from_numpy(tokens),
            torch.from_numpy(lengths),
            torch.tensor(sizes).cumsum(0),
            torch.tensor(positives, dtype=torch.int64),
        )

    def _check_separator(self, separator: int | None, vocab: SIDVocab | None) -> None:
        """Raise ValueError for a separator that the model lacks, or that is a code's token."""
        if separator is None:
            return
        if self.vocab_size is not None and separator >= self.vocab_size:
            raise ValueError(f"separator must be below vocab_size = {self.vocab_size}, got {separator}")
        for level, tokens in enumerate(() if vocab is None else vocab.token_ids):
            if bool((tokens == separator).any()):
                raise ValueError(f"separator = {separator} is also the token of a code of level {level}")

    def _check_vocabulary(self, packed: PackedSessions, vocab_size: int) -> None:
        """Raise ValueError for a token id that the model lacks."""
        sessions = packed.sessions
        prompts = torch.arange(sessions.num_sessions)
        for tokens, rows in ((packed.input_ids, prompts), (sessions.tokens, sessions.owners())):
            merged = self._merged if tokens is packed.input_ids else None
            wrong = tokens >= vocab_size if merged is None else merged.wrong(tokens)
            if bool(wrong.any()):
                row = int(rows[wrong.any(1).nonzero()[0, 0]])
                token = int(tokens[wrong][0])
                why = (
                    f"outside [0, {vocab_size}), the vocabulary" if merged is None else f"which {merged.why_not(token)}"
                )
                raise ValueError(f"rows[{row}] holds token id {token}, {why}")

    def _check_sids(self, sessions: SessionBatch, given: Sequence[dict[str, Any]], sids: SIDCheck) -> None:
        """Raise ValueError for a candidate that is not a SID of the vocab."""
        for name, tokens in self.named_candidates(sessions, given):
            why = sids.why_not(tokens)
            if why is not None:
                read = "" if self.tokenizer is None else f" {self.tokenizer.convert_ids_to_tokens(tokens)}"
                raise ValueError(f"{name} = {tokens}{read} is not a SID of vocab: it {why}")


def _flatten(candidates: list[Any], rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """All candidates' tokens, int64, and the candidates' lengths."""
    try:
        lists = [ids.tolist() if hasattr(ids, "tolist") else ids for ids in candidates]
        lengths = np.array([len(ids) for ids in lists], np.int64)
        flat = np.array(list(chain.from_iterable(lists))) if lists else np.empty(0, np.int64)
        good = flat.ndim == 1 and flat.dtype.kind in "iu" and lengths.min(initial=1) > 0 and flat.min(initial=0) >= 0
    except (TypeError, ValueError):
        good = False
    if not good:
        _refuse(rows)
    return flat.astype(np.int64, copy=False), lengths


def _refuse(rows: list[dict[str, Any]]) -> NoReturn:
    """Raise an error that names the first candidate that is not a list of token ids."""
    for i, row in enumerate(rows):
        for column in TOKENS[1:]:
            for j, ids in enumerate(row[column]):
                name = f"rows[{i}][{column!r}][{j}]"
                if hasattr(ids, "__len__") and len(ids) == 0:
                    raise ValueError(f"{name} must have at least one token, got none")
                smallest = _check.integer_array(ids, name, 1).min()
                if smallest < 0:
                    raise ValueError(f"{name} must hold token ids of at least 0, got {smallest}")
    raise TypeError("rows must hold candidates of one type, got several that cannot be combined")


def _items(rows: list[dict[str, Any]]) -> Tensor:
    """The rows' item ids, int64 ``[S, P]``, padded with -1."""
    items = [torch.tensor(list(row.get("items", ())), dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=-1)
