"""An index's life, step by step, beside a plain dictionary of item id to SID."""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.agreement import assert_values_close

import raddpo_ext as rx

SIZES = (3, 2, 4)
TOKENS = 16
MASK = 100  # entries of an item mask
VOCABS = {
    "none": None,
    "consecutive": rx.SIDVocab(SIZES, offset=2),
    "scattered": rx.SIDVocab(SIZES, token_ids=[[7, 2, 9], [9, 1], [3, 15, 0, 8]]),
    "eos": rx.SIDVocab(SIZES, eos=5, token_ids=[[7, 2, 9], [9, 1], [3, 15, 0, 8]]),
}
SID = tuple[int, ...]
FULL = [*itertools.product(*map(range, SIZES))]
ALL = [sid[:length] for length in range(1, 4) for sid in sorted({sid[:length] for sid in FULL})]
ITEM = st.one_of(st.integers(0, 40), st.integers(2**31 - 2, 2**31 + 2), st.just(2**62))
ROWS = st.lists(st.tuples(ITEM, st.sampled_from(ALL)), min_size=1, max_size=8, unique_by=lambda row: row[0])


def arrays(rows: list[tuple[int, SID]], columns: int) -> dict[str, np.ndarray]:
    """As build and add take them; what lies beyond a SID's length is never read."""
    sids = [sid + (99,) * (columns - len(sid)) for _, sid in rows]
    return {
        "sids": np.array(sids, np.int64).reshape(-1, columns),
        "lengths": np.array([len(sid) for _, sid in rows], np.int64),
        "item_ids": np.array([item for item, _ in rows], np.int64),
    }


class IndexLife(RuleBasedStateMachine):
    @initialize(name=st.sampled_from([*VOCABS]), whole=st.booleans(), small=st.booleans(), rows=ROWS)
    def build(self, name: str, whole: bool, small: bool, rows: list[tuple[int, SID]]) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.store = rx.CatalogueStore(self.folder / "store")
        self.vocab = VOCABS[name]
        self.whole = whole  # every SID has all its codes
        self.small = small  # so have item ids, and a mask by item id can be had
        rows = self.shaped(rows)
        self.model: dict[int, SID] = {}
        while self.clashes(rows):
            with pytest.raises(ValueError, match="is a proper prefix of"):
                rx.TrieIndex.build(**arrays(rows, 3), vocab=self.vocab)
            rows.pop()
        self.index = rx.TrieIndex.build(**arrays(rows, 3), vocab=self.vocab)
        self.model = dict(rows)

    def shaped(self, rows: list[tuple[int, SID]]) -> list[tuple[int, SID]]:
        named = {item % MASK if self.small else item: sid for item, sid in rows}
        return [(item, sid + (0,) * (3 - len(sid)) if self.whole else sid) for item, sid in named.items()]

    def clashes(self, rows: list[tuple[int, SID]]) -> bool:
        """Whether a SID would be a prefix of another, with nothing to tell them apart."""
        sids = {*self.model.values(), *(sid for _, sid in rows)}
        prefixes = {sid[:length] for sid in sids for length in range(len(sid))}
        return bool(sids & prefixes) and (self.vocab is None or self.vocab.eos is None)

    @rule(rows=ROWS)
    def add(self, rows: list[tuple[int, SID]]) -> None:
        rows = self.shaped(rows)
        if any(item in self.model for item, _ in rows):
            with pytest.raises(ValueError, match=r"which is an item of the index already|is a proper prefix of"):
                self.index.add(**arrays(rows, 3))
            rows = [row for row in rows if row[0] not in self.model]
        if self.clashes(rows):
            with pytest.raises(ValueError, match="is a proper prefix of"):
                self.index.add(**arrays(rows, 3))
            return
        self.index = self.index.add(**arrays(rows, 3))
        self.model |= dict(rows)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        gone = data.draw(self.some())
        self.index = self.index.discard(gone)
        self.model = {item: sid for item, sid in self.model.items() if item not in gone}

    @rule(stranger=ITEM)
    def discard_a_stranger(self, stranger: int) -> None:
        if stranger not in self.model:
            with pytest.raises(ValueError, match=f"item_ids hold {stranger}, which is no item of the index"):
                self.index.discard([*self.model, stranger])

    @rule(data=st.data(), strangers=st.lists(ITEM, max_size=2))
    def restrict(self, data: st.DataObject, strangers: list[int]) -> None:
        kept = {*data.draw(self.some()), *strangers}
        if self.small and data.draw(st.booleans()):
            mask = np.zeros(MASK, bool)
            mask[[item for item in kept if item < MASK]] = True
            self.index = self.index.restrict(mask)
        else:
            self.index = self.index.restrict([*kept])
        self.model = {item: sid for item, sid in self.model.items() if item in kept}

    def some(self) -> st.SearchStrategy[list[int]]:
        return st.lists(st.sampled_from([*self.model]), unique=True) if self.model else st.just([])

    @rule()
    def save_and_load(self) -> None:
        path = self.folder / "shop.trie"
        if not self.model:
            with pytest.raises(ValueError, match="an index without items cannot be saved"):
                self.index.save(path)
            return
        self.index.save(path)
        self.index = rx.TrieIndex.load(path)
        assert self.index.live is None

    @rule()
    def publish(self) -> None:
        if self.model:
            before = self.store.version
            assert self.store.publish(self.index) == before + 1
            current = self.store.current()
            assert current.version == before + 1
            self.index = current.index

    def tokens(self, sid: SID) -> SID:
        if self.vocab is None:
            return sid
        end = () if self.vocab.eos is None else (self.vocab.eos,)
        return tuple(int(self.vocab.token_ids[level][code]) for level, code in enumerate(sid)) + end

    def order(self, sids: set[SID]) -> list[SID]:
        """Breadth first, then by token ids."""
        return sorted(sids, key=lambda sid: (len(sid), self.tokens(sid)))

    def items(self, sid: SID) -> list[int]:
        return [item for item, other in self.model.items() if other == sid]

    @invariant()
    def holds_the_items(self) -> None:
        sids = self.order({*self.model.values()})
        assert (self.index.num_items, self.index.num_sids) == (len(self.model), len(sids))
        assert self.index.items.tolist() == [item for sid in sids for item in self.items(sid)]
        queries = arrays([(0, sid) for sid in ALL], 3)
        found, offsets = self.index.lookup(queries["sids"], queries["lengths"])
        bounds = itertools.pairwise(offsets.tolist())
        assert [found[begin:end].tolist() for begin, end in bounds] == [self.items(sid) for sid in ALL]
        contained = self.index.contains(queries["sids"], queries["lengths"]).tolist()
        assert contained == [bool(self.items(sid)) for sid in ALL]

    @invariant()
    def holds_the_children(self) -> None:
        for prefix in [(), *ALL]:
            longer = {sid[: len(prefix) + 1] for sid in self.model.values() if sid[: len(prefix)] == prefix}
            ends = longer & {prefix}
            codes = [(self.tokens(sid)[len(prefix)], sid[len(prefix)]) for sid in longer - ends]
            if ends and self.vocab is not None and self.vocab.eos is not None:
                codes.append((self.vocab.eos, -1))
            assert self.index.children(prefix).tolist() == [code for _, code in sorted(codes)]

    @invariant()
    def is_what_build_gives(self) -> None:
        if self.model:
            rows = [*self.model.items()]
            built = rx.TrieIndex.build(**arrays(rows, 3), vocab=self.vocab)
            assert self.index._compact().tobytes() == built.data.numpy().tobytes()

    @invariant()
    def is_searched_exactly(self) -> None:
        logits = torch.randn(4, TOKENS, generator=torch.Generator().manual_seed(len(self.model)))
        logps = logits.double().log_softmax(-1)
        score = {sid: sum(float(logps[level, token]) for level, token in enumerate(self.tokens(sid))) for sid in ALL}
        expected = [
            (score[sid], sid, item)
            for sid in sorted({*self.model.values()}, key=lambda sid: -score[sid])
            for item in self.items(sid)
        ]
        found = rx.beam_search(
            lambda tokens, parents, level: logits[level].expand(*tokens.shape, TOKENS),
            self.index,
            batch_size=1,
            beam_width=100,
            top_k=len(expected) + 1,
        )
        assert found.items[0].tolist() == [item for *_, item in expected] + [-1]
        assert found.sids[0].tolist() == [[*sid, -1, -1][:3] for _, sid, _ in expected] + [[-1] * 3]
        assert_values_close(found.scores[0].tolist(), [value for value, *_ in expected] + [-math.inf], "beam_search")

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


TestIndexLife = IndexLife.TestCase
TestIndexLife.settings = settings(max_examples=40, stateful_step_count=10)


@pytest.mark.parametrize("others", [[1], [2**31, 2**40, 2**62]])
def test_the_largest_id(tmp_path: Path, others: list[int]) -> None:
    """2**63 - 1 is an id as any other."""
    last = 2**63 - 1
    ids = [*others, last]
    index = rx.TrieIndex.build([[0, i] for i in range(len(ids))], item_ids=ids)
    index.save(tmp_path / "last.trie")
    for given in (index, rx.TrieIndex.load(tmp_path / "last.trie")):
        assert given.lookup([[0, len(others)]]).items.tolist() == [last]
        assert given.sids_of([last, others[0]]).tolist() == [[0, len(others)], [0, 0]]
        assert given.restrict([last]).items.tolist() == [last]
        assert given.restrict([last, 5]).items.tolist() == [last]
        assert given.restrict([0, 5]).num_items == 0
        assert given.discard([last]).items.tolist() == others
        assert given.discard(ids).num_items == 0
        assert (
            given.discard([last])
            .add([[1, 1]], item_ids=[last])
            .data.equal(rx.TrieIndex.build([[0, i] for i in range(len(others))] + [[1, 1]], item_ids=ids).data)
        )
        with pytest.raises(ValueError, match=f"item_ids hold {last}, which is an item of the index already"):
            given.add([[1, 1]], item_ids=[last])
        with pytest.raises(ValueError, match=f"few ids are left above the largest, {last}"):
            given.add([[1, 1]])
        with pytest.raises(ValueError, match=r"item_ids\[0\] = 9223372036854775808 exceeds 2\*\*63 - 1"):
            given.discard(np.array([2**63], np.uint64))
    small = rx.TrieIndex.build([[0], [1]])
    assert small.restrict([last, 1]).items.tolist() == [1]
    with pytest.raises(ValueError, match=f"item_ids hold {last}, which is no item of the index"):
        small.discard([last])
    with pytest.raises(ValueError, match=f"item_ids = {last}|{last} is no item"):
        small.sids_of([last])
    assert small.add([[2]], item_ids=[last]).items.tolist() == [0, 1, last]
    assert small.add([[2]], item_ids=[last - 1]).add([[3]]).items.tolist() == [0, 1, last - 1, last]
