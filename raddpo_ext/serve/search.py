"""A worker's searches: a batch of queries through one model, all of them on one version of the catalogue."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raddpo_ext.beam_search import BeamResult
from raddpo_ext.beam_step import BeamState
from raddpo_ext.catalogue_store import CatalogueStore
from raddpo_ext.integrations.retriever import SIDRetriever
from raddpo_ext.item_tokens import history_prompts
from raddpo_ext.serve.config import ServeConfig
from raddpo_ext.serve.model import load_model, load_tokenizer
from raddpo_ext.serve.protocol import Answer, Limits, Query, ServiceError, bad_field
from raddpo_ext.trie import TrieIndex
from raddpo_ext.trie_items import UnknownItem

_FAILED = Answer(500, code="internal", message="the search failed")
_LOG = logging.getLogger(__name__)


class Search:
    """Loads the model once and follows the store: see :meth:`update`."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.model = load_model(config)
        self.tokenizer = load_tokenizer(config.model)
        self.store = CatalogueStore(config.store)
        self._refused = 0  # the last version that this model cannot serve
        found = self.store.current()
        self.retriever = SIDRetriever(
            self.model,
            found.index.to(config.device),
            beam_width=config.beam_width,
            normalize=config.normalize,
            length_penalty=config.length_penalty,
        )
        self.version, self.limits = found.version, self._try_out()

    def update(self) -> None:
        """Takes the store's newest version, if this model can serve it; else goes on with the one at hand."""
        try:
            found = self.store.current()
        except (OSError, MemoryError):
            _LOG.exception("the store cannot be read, still serving catalogue version %d", self.version)
            return
        if found.version in (self.version, self._refused):
            return
        at_hand = self.retriever.index
        try:
            self.retriever.index = found.index.to(self.config.device)
            self.version, self.limits = found.version, self._try_out()
        except Exception:
            self.retriever.index = at_hand
            self._refused = found.version
            _LOG.exception("catalogue version %d is refused, still serving %d", found.version, self.version)

    def _try_out(self) -> Limits:
        """One search: what cannot be searched is refused here and not in a request, which finds everything warm."""
        index = self.retriever.index
        self.retriever.retrieve(torch.zeros(1, 1, dtype=torch.int64, device=index.device), top_k=1)
        text = self.model.config.get_text_config()
        longest = self.config.max_prompt
        if window := getattr(text, "max_position_embeddings", None):
            # The last token of a SID is never fed; an encoder reads the prompt alone.
            longest = min(longest, window - (0 if self.model.config.is_encoder_decoder else index.levels - 1))
        return Limits(text.vocab_size, longest)

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """One answer a query. A query that cannot be answered spoils no other's answer."""
        answers: dict[int, Answer] = {}
        groups: dict[tuple[int, ...] | None, dict[int, list[int]]] = {}
        for number, query in enumerate(queries):
            try:
                groups.setdefault(query.allowed_items, {})[number] = self._prompt(query)
            except ServiceError as error:
                answers[number] = Answer(error.status, code=error.code, message=error.message)
            except Exception:  # a tokenizer's
                _LOG.exception("a prompt could not be read")
                answers[number] = _FAILED
        for prompts in groups.values():
            group = [queries[number] for number in prompts]
            answers.update(zip(prompts, self._answer_group(group, list(prompts.values())), strict=True))
        return [answers[number] for number in range(len(queries))]

    def _answer_group(self, queries: list[Query], prompts: list[list[int]]) -> list[Answer]:
        """Answers queries of one filter in one search, or if that fails one by one."""
        try:
            return self._search(queries, prompts)
        except Exception:
            _LOG.exception("a search of %d queries failed", len(queries))
        if len(queries) == 1:
            return [_FAILED]
        return [self._answer_group([query], [prompt])[0] for query, prompt in zip(queries, prompts, strict=True)]

    def _search(self, queries: list[Query], prompts: list[list[int]]) -> list[Answer]:
        index = self.retriever.index
        if (allowed := queries[0].allowed_items) is not None:
            index = index.restrict(torch.tensor(allowed, dtype=torch.int64))
        steps: list[BeamState] = []
        input_ids, mask = _padded(prompts, index.device)
        with self._searching(index):
            found = self.retriever.retrieve(
                input_ids,
                mask,
                top_k=max(query.top_k for query in queries),
                on_step=(lambda level, state: steps.append(state)) if queries[0].trace else None,
            )
        beams = [_beams(index, steps)] if steps else None
        return [self._rows(found, row, query, beams) for row, query in enumerate(queries)]

    @contextmanager
    def _searching(self, index: TrieIndex) -> Iterator[None]:
        """Has the retriever search another index for a while."""
        whole, self.retriever.index = self.retriever.index, index
        try:
            yield
        finally:
            self.retriever.index = whole

    def _rows(self, found: BeamResult, row: int, query: Query, beams: list[Any] | None) -> Answer:
        """The first ``top_k`` of a row's items as JSON, empty ones left out."""
        count = int((found.items[row, : query.top_k] >= 0).sum())
        body = {
            "items": found.items[row, :count].tolist(),
            "sids": [_codes(sid) for sid in found.sids[row, :count].tolist()],
            "scores": found.scores[row, :count].tolist(),
            "catalogue_version": self.version,
        }
        if beams is not None:
            body["beams"] = beams[row]
        return Answer(200, json.dumps(body, allow_nan=False, separators=(",", ":")).encode())

    def _prompt(self, query: Query) -> list[int]:
        if query.input_ids is not None:
            name, prompt = "input_ids", query.input_ids
        elif query.text is not None:
            if self.tokenizer is None:
                raise bad_field("text", "needs a tokenizer, which this model's folder lacks")
            name, prompt = "text", self.tokenizer(query.text)["input_ids"]
        else:
            items = query.history or []
            if len(items) > self.limits.longest_prompt:
                raise bad_field("history", f"must have at most {self.limits.longest_prompt} items, got {len(items)}")
            bos = getattr(self.model.config.get_text_config(), "bos_token_id", None)
            try:
                name, (prompt,) = "history", history_prompts(self.retriever.index, [items], bos_token_id=bos)
            except UnknownItem as error:
                problem = f"must be an item of the catalogue, got {error.item}"
                raise bad_field(f"history[{error.position}]", problem) from None
        self.limits.check(prompt, name)
        return prompt


def _padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask ``[B, T]``, padded on the right."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return input_ids.to(device), (torch.arange(input_ids.shape[1]) < lengths[:, None]).to(device)


def _codes(sid: list[int]) -> list[int]:
    return [code for code in sid if code >= 0]


def _beams(index: TrieIndex, steps: list[BeamState]) -> list[list[dict[str, Any]]]:
    """For each level its beams, best first; one is alive while a beam of the last level comes from it."""
    levels: list[list[dict[str, Any]]] = []
    living: set[int] | None = None
    for level, state in reversed(list(enumerate(steps))):
        prefixes = index.paths(state.nodes[0])[0].tolist()
        scores, parents = state.scores[0].tolist(), state.parents[0].tolist()
        slots = [slot for slot, score in enumerate(scores) if score > -math.inf]  # the empty ones come last
        levels.append(
            [
                {
                    "prefix": _codes(prefixes[slot]),
                    "score": scores[slot],
                    "parent": parents[slot] if level else -1,
                    "alive": living is None or slot in living,
                }
                for slot in slots
            ]
        )
        living = {parents[slot] for slot in slots if living is None or slot in living}
    return levels[::-1]
