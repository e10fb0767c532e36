"""A worker's searches, in this process: batches, prompts of every kind, filters, traces and swaps."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from support import tiny_models
from support.serve_fakes import make_index
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import raddpo_ext as rx
from raddpo_ext.serve.config import ServeConfig
from raddpo_ext.serve.protocol import Answer, Query
from raddpo_ext.serve.search import Search

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("probed_once")]

WIDTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer whose words are the numbers of the tokens."""
    folder = tmp_path_factory.mktemp("model")
    tiny_models.seeded(tiny_models.qwen3).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(token): token for token in range(40)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def make_search(folder: Path, tmp_path: Path, index: rx.TrieIndex | None = None, **options: Any) -> Search:
    tmp_path.mkdir(exist_ok=True)
    rx.CatalogueStore(tmp_path / "store").publish(index or make_index(1))
    return Search(ServeConfig(model=folder, store=tmp_path / "store", **{"beam_width": WIDTH, **options}))


def body(answer: Answer) -> Any:
    assert answer.status == 200, answer
    return json.loads(answer.body)


def check(answer: Answer, search: Search, prompt: list[int], index: rx.TrieIndex, top_k: int = 10, **how: Any) -> None:
    """The answer is what a retriever of one's own finds for the prompt alone."""
    retriever = rx.SIDRetriever(search.model, index, beam_width=WIDTH, **how)
    found = retriever.retrieve(torch.tensor([prompt]), top_k=top_k)
    rows = found.items[0] >= 0
    got = body(answer)
    assert got["items"] == found.items[0, rows].tolist()
    assert got["sids"] == [[code for code in sid if code >= 0] for sid in found.sids[0, rows].tolist()]
    torch.testing.assert_close(torch.tensor(got["scores"]), found.scores[0, rows], rtol=0, atol=1e-5)
    assert got["catalogue_version"] == search.version


def test_a_batch_of_different_queries(folder: Path, tmp_path: Path) -> None:
    search, index = make_search(folder, tmp_path), make_index(1)
    prompts = [[3], [4, 5, 6, 7, 8], [9, 3], [3]]
    queries = [Query(prompt, top_k=top_k) for prompt, top_k in zip(prompts, (10, 3, 1, 12), strict=True)]
    answers = search.answer(queries)
    for query, answer in zip(queries, answers, strict=True):
        check(answer, search, query.input_ids, index, query.top_k)
    assert [len(body(answer)["items"]) for answer in answers] == [10, 3, 1, 12]


def test_empty_rows_are_left_out(folder: Path, tmp_path: Path) -> None:
    search = make_search(folder, tmp_path, make_index(1, items=4))
    got = body(search.answer([Query([3], top_k=12)])[0])
    assert sorted(got["items"]) == [1000, 1001, 1002, 1003]
    assert len(got["sids"]) == len(got["scores"]) == 4


def test_sids_of_different_lengths(folder: Path, tmp_path: Path) -> None:
    vocab = rx.SIDVocab([8, 8], offset=10, eos=2)
    index = rx.TrieIndex.build([[1, 0], [1, 3], [5, 0]], lengths=[1, 2, 1], item_ids=[7, 8, 9], vocab=vocab)
    search = make_search(folder, tmp_path, index)
    got = body(search.answer([Query([3])])[0])
    assert dict(zip(got["items"], got["sids"], strict=True)) == {7: [1], 8: [1, 3], 9: [5]}
    check_history(search, index, [8, 7], [1, 11, 21, 11])  # the beginning token, then codes without end tokens


def check_history(search: Search, index: rx.TrieIndex, items: list[int], prompt: list[int]) -> None:
    check(search.answer([Query(history=items)])[0], search, prompt, index)


@pytest.mark.parametrize("items", [2, 60])
def test_history(folder: Path, tmp_path: Path, items: int) -> None:
    """Every item of the catalogue, those that share a SID too, in any order and more than once."""
    index = make_index(1, items)
    search = make_search(folder, tmp_path, index)
    sid_of = {}
    for code in range(512):
        sid = [code // 64, code // 8 % 8, code % 8]
        sid_of |= dict.fromkeys(index.lookup([sid]).items.tolist(), sid)
    assert len(sid_of) == items
    for begin in range(0, items, 5):
        history = [1000 + (begin + step) % items for step in (0, 7, 1, 2, 0)]
        tokens = [10 + 8 * level + code for item in history for level, code in enumerate(sid_of[item])]
        check_history(search, index, history, [1, *tokens])


def test_history_of_codes_that_are_tokens(folder: Path, tmp_path: Path) -> None:
    index = rx.TrieIndex.build([[11, 20], [12, 21]], item_ids=[2**40, 5])
    check_history(make_search(folder, tmp_path, index), index, [2**40, 5], [1, 11, 20, 12, 21])


def test_unknown_items_of_a_history(folder: Path, tmp_path: Path) -> None:
    search = make_search(folder, tmp_path)
    for item in (0, 999, 1060, 2**31, 2**32 + 1000, 2**63 - 1):
        answers = search.answer([Query(history=[1000, item]), Query([3])])
        assert (answers[0].status, answers[0].code) == (422, "bad_field")
        assert answers[0].message == f"history[1] must be an item of the catalogue, got {item}"
        assert answers[1].status == 200
        assert search.answer([Query(history=[item])])[0].status == 422


def test_text(folder: Path, tmp_path: Path) -> None:
    search, index = make_search(folder, tmp_path), make_index(1)
    check(search.answer([Query(text="3 14 15")])[0], search, [3, 14, 15], index)
    (empty,) = search.answer([Query(text="")])
    assert (empty.status, empty.message) == (422, "text must give at least one token")
    (long,) = search.answer([Query(text="3 " * 47)])
    assert (long.status, long.message) == (422, "text must give at most 46 tokens, got 47")


def test_text_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    tiny_models.seeded(tiny_models.qwen3).save_pretrained(bare)
    (answer,) = make_search(bare, tmp_path).answer([Query(text="3")])
    assert (answer.status, answer.message) == (422, "text needs a tokenizer, which this model's folder lacks")


@pytest.mark.parametrize("make", [tiny_models.t5, tiny_models.gpt2])
def test_other_models(tmp_path: Path, make: Any) -> None:
    """An encoder-decoder has no window here; GPT-2's is 48, and its prompts begin with its own token."""
    model = tiny_models.seeded(make)
    model.save_pretrained(tmp_path / "model")
    search, index = make_search(tmp_path / "model", tmp_path, max_prompt=60), make_index(1)
    assert search.limits.longest_prompt == (46 if make is tiny_models.gpt2 else 60)
    check(search.answer([Query([3, 4])])[0], search, [3, 4], index)
    bos = [1] if make is tiny_models.gpt2 else []
    (sid,) = (code for code in search.answer([Query(history=[1002])]))
    codes = index.paths(torch.arange(index.num_nodes))[0]
    leaf = next(row for row in codes.tolist() if -1 not in row and 1002 in index.lookup([row]).items.tolist())
    check(sid, search, [*bos, *(10 + 8 * level + code for level, code in enumerate(leaf))], index)


def test_the_window_is_the_models(folder: Path, tmp_path: Path) -> None:
    search = make_search(folder, tmp_path)
    assert search.limits == (40, 46)  # 48 positions, of which two tokens of a SID take their part
    fits, beyond = search.answer([Query([3] * 46), Query([3] * 47)])
    assert fits.status == 200
    assert (beyond.status, beyond.message) == (422, "input_ids must give at most 46 tokens, got 47")
    (history,) = search.answer([Query(history=[1000] * 47)])
    assert (history.status, history.message) == (422, "history must have at most 46 items, got 47")


def test_a_guilty_query_fails_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, index = make_search(folder, tmp_path), make_index(1)
    retrieve = search.retriever.retrieve

    def fragile(input_ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if bool((input_ids == 13).any()):
            raise RuntimeError("secret")
        return retrieve(input_ids, *arguments, **options)

    monkeypatch.setattr(search.retriever, "retrieve", fragile)
    monkeypatch.setattr(search, "tokenizer", lambda text: {}[text])
    answers = search.answer([Query([3]), Query([4, 13]), Query([5, 6]), Query(text="a")])
    assert answers[1] == answers[3] == Answer(500, code="internal", message="the search failed")
    check(answers[0], search, [3], index)
    check(answers[2], search, [5, 6], index)


def test_swaps(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    search, store = make_search(folder, tmp_path), rx.CatalogueStore(tmp_path / "store")
    store.publish(make_index(2))
    check(search.answer([Query([3])])[0], search, [3], make_index(1))  # one version until it is told
    search.update()
    assert search.version == 2
    check(search.answer([Query([3])])[0], search, [3], make_index(2))
    assert caplog.records == []


@pytest.mark.parametrize("problem", ["tokens", "no vocab", "window", "damage", "unreadable"])
def test_versions_that_cannot_be_served(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    search, store = make_search(folder, tmp_path, normalize="level"), rx.CatalogueStore(tmp_path / "store")
    bad = {
        "tokens": rx.TrieIndex.build([[1]], vocab=rx.SIDVocab([2], offset=39)),
        "no vocab": rx.TrieIndex.build([[1, 2, 3]]),
        "window": rx.TrieIndex.build([[1, 2, 3]], vocab=rx.SIDVocab([8, 8, 8], offset=10)),
    }
    store.publish(bad.get(problem, make_index(2)), force=problem == "tokens")
    if problem == "window":  # SIDs that leave a prompt no room
        monkeypatch.setattr(search.model.config, "max_position_embeddings", 2)
    if problem == "damage":
        (store.path / "000002.trie").write_bytes(b"RADTRIE\0")
    if problem == "unreadable":
        monkeypatch.setattr(
            rx.TrieIndex, "load", lambda path: (_ for _ in ()).throw(OSError(24, "Too many open files"))
        )
    for _ in range(3):
        search.update()
        assert search.version == 1
        if problem != "window":  # the model itself is changed there
            check(search.answer([Query([3])])[0], search, [3], make_index(1), normalize="level")
    assert len(caplog.records) == (3 if problem == "unreadable" else 1)  # which may pass, so it is tried again
    monkeypatch.undo()
    store.publish(make_index(3))
    search.update()
    assert search.version == 3


def _no_more_files(path: Path) -> rx.TrieIndex:
    raise OSError(24, "Too many open files", str(path))


def test_filters(folder: Path, tmp_path: Path) -> None:
    search, index = make_search(folder, tmp_path), make_index(1)
    few, none = (1001, 1005, 1059, 2**40), (5,)
    queries = [
        Query([3]),
        Query([3], allowed_items=few),
        Query([4, 5], allowed_items=few),
        Query([3], allowed_items=none),
    ]
    answers = search.answer(queries)
    check(answers[0], search, [3], index)
    for answer, prompt in zip(answers[1:3], ([3], [4, 5]), strict=True):
        assert sorted(body(answer)["items"]) == [1001, 1005, 1059]
        check(answer, search, prompt, index.restrict(torch.tensor(few)))
    assert body(answers[3])["items"] == []
    assert body(search.answer([Query([3], allowed_items=())])[0])["items"] == []
    check(search.answer([Query([3])])[0], search, [3], index)
    (traced,) = search.answer([Query([3], allowed_items=none, trace=True)])
    assert body(traced)["beams"] == [[], [], []]


@pytest.mark.parametrize("lengths", [False, True])
def test_traces(folder: Path, tmp_path: Path, lengths: bool) -> None:
    """The beam tree: parents, prefixes and scores agree, and the living are the ancestors of the last level."""
    index = make_index(1)
    if lengths:
        vocab = rx.SIDVocab([8, 8], offset=10, eos=2)
        sids = [[a, b] for a in range(4) for b in range(5)]
        index = rx.TrieIndex.build([*sids, [5, 0], [1, 0]], lengths=[2] * 20 + [1, 1], vocab=vocab)
    search = make_search(folder, tmp_path, index, beam_width=4)
    trees = [trace(search, index, prompt) for prompt in range(3, 30)]
    assert any(not beam["alive"] for levels in trees for beam in levels[0])


def trace(search: Search, index: rx.TrieIndex, prompt: int) -> list[list[dict[str, Any]]]:
    """The checked beam tree of one prompt."""
    traced = search.answer([Query([prompt], top_k=4, trace=True)])[0]
    levels = body(traced)["beams"]
    assert body(traced) == {**body(search.answer([Query([prompt], top_k=4)])[0]), "beams": levels}
    assert len(levels) == index.levels == 3
    assert all(beam["alive"] for beam in levels[-1])
    for level, beams in enumerate(levels):
        assert 0 < len(beams) <= 4
        assert [beam["score"] for beam in beams] == sorted((beam["score"] for beam in beams), reverse=True)
        for slot, beam in enumerate(beams):
            if level == 0:
                assert (beam["parent"], len(beam["prefix"])) == (-1, 1)
            else:
                parent = levels[level - 1][beam["parent"]]
                assert beam["prefix"][: len(parent["prefix"])] == parent["prefix"]
                assert beam["score"] <= parent["score"]
            if level < 2:
                children = [child for child in levels[level + 1] if child["parent"] == slot]
                assert beam["alive"] == any(child["alive"] for child in children)
    assert [beam["prefix"] for beam in levels[-1]][:1] == body(traced)["sids"][:1]
    return levels


FOREIGN = rx.TrieIndex.build([[1]], vocab=rx.SIDVocab([2], offset=39))


def test_a_start_beside_versions_that_cannot_be_served(folder: Path, tmp_path: Path) -> None:
    """The newest that can be served is; what a service refuses makes none of them go, and the next start finds it."""
    store = rx.CatalogueStore(tmp_path / "store")
    store.publish(make_index(1))
    store.publish(FOREIGN)
    config = ServeConfig(model=folder, store=store.path, beam_width=WIDTH)
    search = Search(config)
    assert search.version == 1
    assert search.refused == "catalogue version 2: index must hold token ids below the model's vocab_size 40, got 40"
    check(search.answer([Query([3])])[0], search, [3], make_index(1))
    with pytest.raises(ValueError, match="token id 40, but the model of the service"):
        store.publish(FOREIGN)
    for number in (3, 4, 5):
        assert store.publish(FOREIGN, force=True) == number
        search.update()
        assert search.version == Search(config).version == 1
    assert search.refused.startswith("catalogue version 5: ")
    store.publish(make_index(6))
    search.update()
    assert (search.version, search.refused) == (6, None)
    assert Search(config).version == 6


def test_no_version_that_can_be_served(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="1 is refused: index must hold token ids below the model's vocab_size 40"
    ):
        make_search(folder, tmp_path, FOREIGN)
    assert not (tmp_path / "store/.service.json").exists()


def altered(folder: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the model whose weights are changed."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    shutil.copytree(folder, tmp_path / "altered")
    save_file(weights, tmp_path / "altered/model.safetensors", metadata={"format": "pt"})
    return tmp_path / "altered"


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NORM), f"the checkpoint lacks {NORM}$"),
        (lambda w: [w.pop(name) for name in list(w) if ".1." in name], r"lacks model\.layers\.1\..*, .* and 6 more$"),
        (lambda w: w.update(extra=torch.zeros(2)), "the checkpoint does not fit Qwen3ForCausalLM: extra$"),
        (lambda w: w[NORM].__setitem__(3, math.nan), f"the checkpoint's {NORM} holds NaN"),
        (lambda w: w["model.embed_tokens.weight"][39].fill_(math.nan), r"model\.embed_tokens\.weight holds NaN"),
        (
            lambda w: w[NORM].fill_(math.inf),
            "1 is refused: the model gives no item a finite score: its logits are NaN or -inf",
        ),
    ],
)
def test_checkpoints_that_are_not_sound(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_search(altered(folder, tmp_path, change), tmp_path)


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gpt2, tiny_models.t5])
def test_tied_weights_are_not_missing(tmp_path: Path, make: Any) -> None:
    tiny_models.seeded(make).save_pretrained(tmp_path / "model")
    assert make_search(tmp_path / "model", tmp_path).version == 1


def test_scores_that_are_no_numbers(folder: Path, tmp_path: Path) -> None:
    """Only the prompt that makes them so fails; it is no answer without items."""
    model = altered(folder, tmp_path, lambda w: w["model.embed_tokens.weight"][5].fill_(math.inf))
    search = make_search(model, tmp_path)
    answers = search.answer([Query([3]), Query([3, 5]), Query([5], allowed_items=(7,))])
    assert answers[1] == Answer(500, code="internal", message="the search failed")
    check(answers[0], search, [3], make_index(1))
    assert body(answers[2])["items"] == []  # no such item is in the catalogue


def test_the_largest_id(folder: Path, tmp_path: Path) -> None:
    index = rx.TrieIndex.build([[11, 20], [12, 21]], item_ids=[2**63 - 1, 5])
    search = make_search(folder, tmp_path, index)
    check_history(search, index, [2**63 - 1, 5], [1, 11, 20, 12, 21])
    assert body(search.answer([Query([3], allowed_items=(7, 2**63 - 1))])[0])["items"] == [2**63 - 1]


def test_a_store_that_takes_no_record(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As one that may not be written to: it is served all the same."""
    rx.CatalogueStore(tmp_path / "store").publish(make_index(1))
    for name in (".service.lock", ".service.json"):
        (tmp_path / "store" / name).mkdir()
    search = Search(ServeConfig(model=folder, store=tmp_path / "store", beam_width=WIDTH))
    for _ in range(3):
        search.update()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    check(search.answer([Query([3])])[0], search, [3], make_index(1))


def test_strings_in_and_strings_out(folder: Path, tmp_path: Path) -> None:
    """The same search as by integers, with ids and titles; an integer is no id of such a catalogue."""
    index = make_index(1)
    items = index.items.long().tolist()
    names = rx.IdMap([f"SKU-{item}" for item in items], [f"Title {item}" for item in items], items)
    rx.CatalogueStore(tmp_path / "store").publish(index, names=names)
    search = Search(ServeConfig(model=folder, store=tmp_path / "store", beam_width=WIDTH))
    plain = make_search(folder, tmp_path / "plain")
    history, allowed = items[:2], tuple(items[::2])
    queries = [
        Query(history=[f"SKU-{item}" for item in history]),
        Query(input_ids=[3, 4], allowed_items=(*(f"SKU-{item}" for item in allowed), "no such item")),
    ]
    for query, same in zip(
        queries, (Query(history=[*history]), Query(input_ids=[3, 4], allowed_items=allowed)), strict=True
    ):
        found, expected = body(search.answer([query])[0]), body(plain.answer([same])[0])
        assert found["items"] == [f"SKU-{item}" for item in expected["items"]]
        assert found["titles"] == [f"Title {item}" for item in expected["items"]]
        assert (found["sids"], found["scores"]) == (expected["sids"], expected["scores"])
        assert "titles" not in expected
    example = body(search.answer([Query(example=True)])[0])
    assert example["ids"] == "strings"
    assert body(search.answer([Query(history=example["history"])])[0])["items"]
    assert body(plain.answer([Query(example=True)])[0])["ids"] == "integers"
    refusals = [
        (search, Query(history=["SKU-x"]), "history[0] must be an item of the catalogue, got 'SKU-x'"),
        (
            search,
            Query(history=[f"SKU-{items[0]}", items[0]]),
            f"history[1] must be an item of the catalogue, got {items[0]}",
        ),
        (search, Query(input_ids=[3], allowed_items=(items[0],)), "allowed_items must hold strings, which this"),
        (plain, Query(history=[items[0], str(items[0])]), "history[1] must be an item of the catalogue, got '"),
        (plain, Query(input_ids=[3], allowed_items=("SKU-1",)), "allowed_items must hold integers, which this"),
    ]
    for searching, query, message in refusals:
        (answer,) = searching.answer([query])
        assert answer.status == 422
        assert answer.message.startswith(message)
