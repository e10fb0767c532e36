"""A worker's searches: a batch of queries through one model, all on one version of the catalogue."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from raddpo_ext.data.prompts import pad_prompts
from raddpo_ext.decoding.beam_search import BeamResult
from raddpo_ext.decoding.beam_step import BeamState
from raddpo_ext.index.catalogue_store import CatalogueStore, CatalogueVersion
from raddpo_ext.index.id_map import IdMap
from raddpo_ext.index.item_ids import UnknownItem
from raddpo_ext.index.item_tokens import history_prompts
from raddpo_ext.index.store_service import StoreService
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.integrations.base_model import context
from raddpo_ext.integrations.retriever import SIDRetriever
from raddpo_ext.serve.config import ServeConfig
from raddpo_ext.serve.model import load_model, load_tokenizer
from raddpo_ext.serve.protocol import Answer, Limits, Query, ServiceError, bad_field

_FAILED = Answer(500, code="internal", message="the search failed")
_LOG = logging.getLogger(__name__)


class Search:
    """Loads the model once and searches the store's newest catalogue: see :meth:`update`.

    Raises:
        ValueError: the checkpoint is incomplete or holds wrong values, see :func:`load_model`.
        FileNotFoundError: the store holds no version, or none that the model can serve.
    """

    retriever: SIDRetriever
    limits: Limits
    names: IdMap | None

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.model = load_model(config)
        self.tokenizer = load_tokenizer(config.model)
        self.store = CatalogueStore(config.store)
        self.version = 0  # until _take sets one
        self.store.current(self._take)
        self._service = StoreService(config.store, self.limits.vocab_size)
        self._service.tell(self.version, [*self.store.refused])

    @property
    def refused(self) -> str | None:
        """The newest version that this model cannot serve, and why, if it is newer than the served version."""
        version = max(self.store.refused, default=0)
        return f"catalogue version {version}: {self.store.refused[version]}" if version > self.version else None

    def update(self) -> None:
        """Take the store's newest version that this model can serve, if it is newer than the served one."""
        try:
            self.store.current(self._take)
        except (OSError, MemoryError):
            _LOG.exception("the store cannot be read, still serving catalogue version %d", self.version)
            return
        self._service.tell(self.version, [*self.store.refused])

    def _take(self, found: CatalogueVersion) -> None:
        """Switch to a version. Raises an error if this model cannot serve it."""
        index = found.index.to(self.config.device)
        if not self.version:
            self.retriever = SIDRetriever(
                self.model,
                index,
                beam_width=self.config.beam_width,
                normalize=self.config.normalize,
                length_penalty=self.config.length_penalty,
            )
        self.limits = self._try_out(index)
        self.retriever.index, self.version, self.names = index, found.version, found.names

    def _try_out(self, index: TrieIndex) -> Limits:
        """Run one search, so that a bad index is refused before any request, and requests find everything warm."""
        prompt = torch.zeros(1, 1, dtype=torch.int64, device=index.device)
        found = self.retriever.retrieve(prompt, top_k=1, index=index)
        if int(found.items[0, 0]) < 0:
            raise ValueError("the model gives no item a finite score: its logits are NaN or -inf")
        text = self.model.config.get_text_config()
        longest = self.config.max_prompt
        if window := context(text):
            # The model never reads the last token of a SID. An encoder reads only the prompt.
            longest = min(longest, window - (0 if self.model.config.is_encoder_decoder else index.levels - 1))
        return Limits(text.vocab_size, longest)

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """One answer per query. A query that cannot be answered does not affect the others."""
        # Read the prompts. Queries with the same filter are searched together.
        answers: dict[int, Answer] = {}
        groups: dict[tuple[int, ...] | None, dict[int, list[int]]] = {}
        for number, query in enumerate(queries):
            try:
                if query.example:
                    answers[number] = self._example()
                else:
                    prompt = self._prompt(query)
                    groups.setdefault(self._allowed(query), {})[number] = prompt
            except ServiceError as error:
                answers[number] = Answer(error.status, code=error.code, message=error.message)
            except Exception:  # a tokenizer can raise any type
                _LOG.exception("a prompt could not be read")
                answers[number] = _FAILED
        # One search per filter; the answers go back to the order of the queries.
        for allowed, prompts in groups.items():
            group = [replace(queries[number], allowed_items=allowed) for number in prompts]
            answers.update(zip(prompts, self._answer_group(group, list(prompts.values())), strict=True))
        return [answers[number] for number in range(len(queries))]

    def _answer_group(self, queries: list[Query], prompts: list[list[int]]) -> list[Answer]:
        """Answer queries with the same filter in one search or, if that fails, one by one."""
        try:
            return self._search(queries, prompts)
        except Exception:
            _LOG.exception("a search for %d queries failed", len(queries))
        if len(queries) == 1:
            return [_FAILED]
        return [self._answer_group([query], [prompt])[0] for query, prompt in zip(queries, prompts, strict=True)]

    def _search(self, queries: list[Query], prompts: list[list[int]]) -> list[Answer]:
        """Search for queries with the same filter. A traced query is alone."""
        index = self.retriever.index
        # The filter and the trace are those of all queries of the group.
        if (allowed := queries[0].allowed_items) is not None:
            index = index.restrict(torch.tensor(allowed, dtype=torch.int64))
        steps: list[BeamState] = []
        input_ids, mask = pad_prompts([torch.tensor(prompt) for prompt in prompts], index.device)
        found = self.retriever.retrieve(
            input_ids,
            mask,
            top_k=max(query.top_k for query in queries),
            index=index,
            on_step=(lambda level, state: steps.append(state)) if queries[0].trace else None,
        )
        # The parts of the answers as JSON.
        beams = [_beams(index, steps)] if steps else None
        answers = [self._rows(found, row, query, beams) for row, query in enumerate(queries)]
        if index.num_items:  # then only scores of NaN or -inf leave a prompt without items
            for row in (found.items[:, 0] < 0).nonzero()[:, 0].tolist():
                _LOG.error("a prompt's scores are NaN or -inf")
                answers[row] = _FAILED
        return answers

    def _rows(self, found: BeamResult, row: int, query: Query, beams: list[Any] | None) -> Answer:
        """The first ``top_k`` items of a row as JSON, without empty ones."""
        count = int((found.items[row, : query.top_k] >= 0).sum())
        body = {
            **self._named(found.items[row, :count].tolist(), "items"),
            "sids": [_codes(sid) for sid in found.sids[row, :count].tolist()],
            "scores": found.scores[row, :count].tolist(),
            "catalogue_version": self.version,
        }
        if beams is not None:
            body["beams"] = beams[row]
        return _json(body)

    def _named(self, items: list[int], field: str) -> dict[str, Any]:
        """The items by their ids in the catalogue, with titles if it has any."""
        if self.names is None:
            return {field: items}
        titles = {} if self.names.titles is None else {"titles": self.names.titles_of(items)}
        return {field: self.names.ids_of(items), **titles}

    def _example(self) -> Answer:
        """A history of the catalogue's first items to try, empty if the model's window is too small for one."""
        index = self.retriever.index
        fitting = (self.limits.longest_prompt - (self._bos is not None)) // index.sid_levels
        items = index.items[: min(3, max(0, fitting))].tolist()
        strings = self.names is not None and self.names.ids is not None
        kind = {"ids": "strings" if strings else "integers"}
        return _json({**self._named(items, "history"), **kind, "catalogue_version": self.version})

    @property
    def _bos(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "bos_token_id", None)

    def _allowed(self, query: Query) -> tuple[int, ...] | None:
        """The items of the index that a query allows. Ids that the catalogue lacks are ignored."""
        if query.allowed_items is None:
            return None
        # Ids are of the catalogue's kind: its own strings, or integers.
        kind, called = (int, "integers") if self.names is None or self.names.ids is None else (str, "strings")
        if not all(isinstance(item, kind) for item in query.allowed_items):
            raise bad_field("allowed_items", f"must hold {called}, which this catalogue's item ids are")
        if self.names is None:
            return tuple(item for item in query.allowed_items if isinstance(item, int))
        return tuple(self.names.items_of([item for item in query.allowed_items if item in self.names]))

    def _prompt(self, query: Query) -> list[int]:
        """The token ids of a query's prompt; raises :class:`ServiceError` if the model does not accept it."""
        if query.input_ids is not None:
            name, prompt = "input_ids", query.input_ids
        elif query.text is not None:
            if self.tokenizer is None:
                raise bad_field("text", "needs a tokenizer, which this model's folder lacks")
            name, prompt = "text", self.tokenizer(query.text)["input_ids"]
        else:
            # A history becomes a prompt as in training.
            items: list[Any] = query.history or []
            if len(items) > self.limits.longest_prompt:
                raise bad_field("history", f"must have at most {self.limits.longest_prompt} items, got {len(items)}")
            try:
                if self.names is not None:
                    items = self.names.items_of(items)
                for position, item in enumerate(items):
                    if not isinstance(item, int):
                        raise UnknownItem("history", item, position)
                name, (prompt,) = "history", history_prompts(self.retriever.index, [items], bos_token_id=self._bos)
            except UnknownItem as error:
                problem = f"must be an item of the catalogue, got {error.item!r:.60}"
                raise bad_field(f"history[{error.position}]", problem) from None
        self.limits.check(prompt, name)
        return prompt


def _json(body: dict[str, Any]) -> Answer:
    return Answer(200, json.dumps(body, allow_nan=False, separators=(",", ":")).encode())


def _codes(sid: list[int]) -> list[int]:
    """The codes of a SID without its padding."""
    return [code for code in sid if code >= 0]


def _beams(index: TrieIndex, steps: list[BeamState]) -> list[list[dict[str, Any]]]:
    """The beams of each level, best first. A beam is alive if a beam of the last level descends from it."""
    # From the last level back, because a beam lives if its descendants do.
    levels: list[list[dict[str, Any]]] = []
    living: set[int] | None = None
    for level, state in reversed(list(enumerate(steps))):
        prefixes = index.paths(state.nodes[0])[0].tolist()
        scores, parents = state.scores[0].tolist(), state.parents[0].tolist()
        slots = [slot for slot, score in enumerate(scores) if score > -math.inf]  # empty slots come last
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
