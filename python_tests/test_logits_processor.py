"""TrieLogitsProcessor by itself against sets of prefixes, and inside ``generate`` of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tolerances import close
from torch.utils._python_dispatch import TorchDispatchMode

import raddpo_ext as rx

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

VOCAB = 120
FIRST = 40  # the first SID token; prompts use the ids below
EOS = 2


def make_model(name: str = "qwen3", **generation):
    torch.manual_seed(1)
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.Qwen3Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, initializer_range=0.3,
        )  # fmt: skip
        model = transformers.Qwen3ForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=0, decoder_start_token_id=0 if name == "t5" else None, **generation
    )
    return model.eval()


def make_index(eos: int | None = None, lengths: bool = False) -> rx.TrieIndex:
    """Up to 400 SIDs of two levels, 40 children under the root."""
    rng = np.random.default_rng(0)
    vocab = rx.SIDVocab([40, 30], offset=FIRST, eos=eos)
    sids = np.stack([rng.integers(0, 40, 600), rng.integers(0, 30, 600)], 1)
    ends = None
    if lengths:
        ends = np.where(sids[:, 0] < 20, 1, 2) if eos is None else rng.integers(1, 3, 600)
    return rx.TrieIndex.build(sids, lengths=ends, vocab=vocab)


def prompts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, :3] = 0
    return {"input_ids": torch.randint(3, FIRST, (3, 6), generator=generator) * mask, "attention_mask": mask}


def start_of(model) -> int:
    return 1 if model.config.is_encoder_decoder else 6


def codes_of(sequences: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Generated rows as codes ``[N, 2]`` and lengths ``[N]``."""
    tokens = sequences[:, start : start + 2]
    return tokens - FIRST - torch.tensor([0, 40])[: tokens.shape[1]], (tokens >= FIRST).sum(1)


def prefix_allowed_tokens_fn(index: rx.TrieIndex, start: int):
    """The usual callback, for an index without eos."""

    def allowed(_, row):
        prefix = row[start:].tolist()
        codes = index.children([token - FIRST - 40 * level for level, token in enumerate(prefix)])
        return (codes + FIRST + 40 * len(prefix)).tolist() or [EOS]

    return allowed


def beams(model, width: int, new: int, **arguments):
    arguments = dict(num_beams=width, num_return_sequences=width, max_new_tokens=new, early_stopping=False) | arguments
    return model.generate(**prompts(), return_dict_in_generate=True, output_scores=True, **arguments)


@st.composite
def tries(draw):
    """A random catalogue and rows of random prefixes: token ids, the sets of SIDs as tokens, an index."""
    levels = draw(st.integers(1, 3))
    sizes = [draw(st.integers(1, 5)) for _ in range(levels)]
    eos = draw(st.sampled_from([None, EOS]))
    tables = [draw(st.permutations(range(5, 20)))[:size] for size in sizes]
    vocab = rx.SIDVocab(sizes, eos=eos, token_ids=tables)
    rows = draw(st.integers(1, 12))
    sids = [[draw(st.integers(0, size - 1)) for size in sizes] for _ in range(rows)]
    ends = [draw(st.integers(1, levels)) if eos else levels for _ in range(rows)]
    index = rx.TrieIndex.build(np.array(sids), lengths=ends, vocab=vocab)
    tokens = {
        tuple(table[code] for table, code in zip(tables, sid[:end], strict=False)) + ((eos,) if eos else ())
        for sid, end in zip(sids, ends, strict=True)
    }
    length = draw(st.integers(0, levels + 1))
    known = st.sampled_from([(*sid, *[0] * 9)[:length] for sid in sorted(tokens)])
    anything = st.tuples(*[st.integers(0, 20)] * length)
    prefixes = draw(st.lists(known | anything, min_size=1, max_size=6))
    return index, tokens, prefixes


@given(tries(), st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=150, deadline=None)
def test_allows_what_follows_the_prefix(case, prompt_length, dtype):
    index, sids, prefixes = case
    processor = rx.TrieLogitsProcessor(index, prompt_length, eos_token_id=EOS)
    input_ids = torch.tensor([[9] * prompt_length + list(prefix) for prefix in prefixes], dtype=torch.int64)
    scores = torch.randn(len(prefixes), 24).to(dtype)
    before = scores.clone()
    got = processor(input_ids, scores)
    assert torch.equal(scores, before)
    assert got.dtype == dtype
    for row, prefix in enumerate(prefixes):
        allowed = {sid[len(prefix)] for sid in sids if len(sid) > len(prefix) and sid[: len(prefix)] == prefix}
        expected = torch.full((24,), -torch.inf, dtype=dtype)
        expected[list(allowed)] = scores[row, list(allowed)]
        if not allowed:
            expected[EOS] = 0
        assert torch.equal(got[row], expected)


@pytest.mark.parametrize("name", ["qwen3", "t5"])
def test_beams_equal_the_callback_and_the_retriever(name):
    model, index, width = make_model(name), make_index(), 24
    start = start_of(model)
    processor = rx.TrieLogitsProcessor(index, start)
    got = beams(model, width, 2, length_penalty=0.0, logits_processor=[processor])
    callback = prefix_allowed_tokens_fn(index, start)
    expected = beams(model, width, 2, length_penalty=0.0, prefix_allowed_tokens_fn=callback)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(got.sequences_scores, expected.sequences_scores)
    own = rx.SIDRetriever(model, index, beam_width=width).retrieve(**prompts())
    assert torch.equal(codes_of(got.sequences, start)[0].view(3, width, 2), own.sids)


@pytest.mark.parametrize("eos", [None, EOS])
def test_lengths(eos):
    """SIDs of one and two tokens: with an end token of their own, or ended for free by that of ``generate``."""
    model, index = make_model(eos_token_id=EOS), make_index(eos=eos, lengths=True)
    width = index.num_sids + 3
    processor = rx.TrieLogitsProcessor(index, 6, eos_token_id=EOS)
    got = beams(model, width, 3, length_penalty=0.0, logits_processor=[processor])
    own = rx.SIDRetriever(model, index, beam_width=index.num_nodes).retrieve(**prompts())
    found = index.num_sids
    scores = got.sequences_scores.view(3, width)
    torch.testing.assert_close(scores[:, :found], own.scores[:, :found], **close("model"))
    sids, lengths = codes_of(got.sequences, 6)
    real = (scores > -1e8).view(-1)
    assert real.sum() == 3 * found
    assert index.contains(sids[real], lengths[real]).all()


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "t5"])
@pytest.mark.parametrize("lengths", [False, True])
def test_one_beam(name, do_sample, lengths):
    model, index = make_model(name, eos_token_id=EOS), make_index(eos=EOS, lengths=lengths)
    processor = rx.TrieLogitsProcessor(index, start_of(model))
    torch.manual_seed(0)
    rows = model.generate(
        **prompts(), max_new_tokens=3, do_sample=do_sample, num_return_sequences=20 if do_sample else 1,
        logits_processor=[processor],
    )  # fmt: skip
    assert index.contains(*codes_of(rows, start_of(model))).all()


# A checkpoint's generation_config (Qwen2.5-Instruct's) that a caller who asks for beams seldom thinks of.
FILTERS = dict(do_sample=True, temperature=0.7, top_k=20, top_p=0.8)


def survivors(index: rx.TrieIndex, out, width: int) -> list[int]:
    """Distinct SIDs of the catalogue among each query's beams."""
    sids, lengths = codes_of(out.sequences, 6)
    legal = index.contains(sids, lengths) & (out.sequences_scores > -1e8)
    return [len({tuple(sid) for sid in sids[q * width : (q + 1) * width][legal[q * width : (q + 1) * width]].tolist()})
            for q in range(3)]  # fmt: skip


def test_filters_of_the_generation_config():
    """They come behind every processor and kill beams, here as with the callback; neutral ones kill none."""
    model, index, width = make_model(**FILTERS), make_index(), 60
    processor = rx.TrieLogitsProcessor(index, 6)
    for constraint in (
        dict(prefix_allowed_tokens_fn=prefix_allowed_tokens_fn(index, 6)),
        dict(logits_processor=[processor]),
    ):
        torch.manual_seed(0)
        assert min(survivors(index, beams(model, width, 2, **constraint), width)) < width
    neutral = beams(model, width, 2, logits_processor=[processor], top_k=0, top_p=1.0)
    assert survivors(index, neutral, width) == [width] * 3


def test_do_sample_false_is_the_exact_search_whatever_the_generation_config():
    model, index, width = make_model(**FILTERS), make_index(), 60
    processors = [rx.TrieLogitsProcessor(index, 6)]
    got = beams(model, width, 2, do_sample=False, length_penalty=0.0, logits_processor=processors)
    own = rx.SIDRetriever(model, index, beam_width=width).retrieve(**prompts())
    assert torch.equal(codes_of(got.sequences, 6)[0].view(3, width, 2), own.sids)


SUPPRESSED = {"level 0": range(FIRST, FIRST + 40), "level 1": range(FIRST + 40, FIRST + 70)}
WAYS = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True),
    "samples": dict(do_sample=True, num_return_sequences=3),
    "beams": dict(do_sample=False, num_beams=4, num_return_sequences=4),
    "sampled beams": dict(do_sample=True, num_beams=4, num_return_sequences=4),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("level", SUPPRESSED)
@pytest.mark.parametrize("told", [False, True])
def test_nothing_is_allowed(way, level, told):
    """generate would go on with token 0."""
    options = WAYS[way]
    processor = rx.TrieLogitsProcessor(make_index(), 6, num_beams=options.get("num_beams", 1) if told else 1)
    with pytest.raises(
        ValueError, match=r"scores\[0\] \(query 0\) excludes every token that the catalogue allows after"
    ):
        make_model().generate(
            **prompts(),
            max_new_tokens=2,
            logits_processor=[processor],
            suppress_tokens=list(SUPPRESSED[level]),
            **options,
        )


class Overflow(transformers.LogitsProcessor):
    """Spoils the SIDs' scores in some rows, at one step or all."""

    def __init__(self, rows, width=None, value=-torch.inf):
        self.rows, self.width, self.value = rows, width, value

    def __call__(self, input_ids, scores):
        if self.width in (None, input_ids.shape[1]):
            self.tokens = input_ids[self.rows, -1].tolist()
            scores = scores.clone()
            scores[self.rows, FIRST:] = self.value
        return scores


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["qwen3", "t5"])
def test_nothing_is_allowed_to_one_query(name, value):
    """Also where another row has the same prompt."""
    model = make_model(name)
    same = {key: rows[[0, 2, 2]] for key, rows in prompts().items()}
    for row in range(3):
        processors = [Overflow([row], value=value), rx.TrieLogitsProcessor(make_index(), start_of(model))]
        with pytest.raises(ValueError, match=rf"scores\[{row}\] \(query {row}\) .* after \[\]"):
            model.generate(**same, max_new_tokens=2, do_sample=False, logits_processor=processors)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_beam_may_die(value):
    """Rows 4 to 7 are the beams of query 1: without its first the others live on, without all of them it has none."""
    model, index = make_model(), make_index()

    def search(spoil, num_beams):
        processors = [spoil, rx.TrieLogitsProcessor(index, 6, num_beams=num_beams)]
        return beams(model, 4, 2, do_sample=False, logits_processor=processors)

    spoil = Overflow([4], 7, value)
    got, whole = search(spoil, 4), search(Overflow([], 7), 4)
    sids, lengths = codes_of(got.sequences, 6)
    assert index.contains(sids, lengths).all()
    assert (got.sequences_scores > -1e8).all()
    assert spoil.tokens[0] in whole.sequences[4:8, 6].tolist()
    assert spoil.tokens[0] not in got.sequences[4:8, 6].tolist()
    assert got.sequences[[0, 1, 2, 3, 8, 9, 10, 11]].tolist() == whole.sequences[[0, 1, 2, 3, 8, 9, 10, 11]].tolist()
    with pytest.raises(ValueError, match=r"scores\[4\] \(query 1\) .* after \[\d+\]"):
        search(Overflow([4, 5, 6, 7], 7, value), 4)
    with pytest.raises(ValueError, match=r"scores\[4\] \(query 4\) .* or set num_beams"):
        search(Overflow([4], 7, value), 1)


def test_dead_beams_are_no_way_out():
    """Two SIDs, four beams: generate fills up with rows outside the catalogue, which do not save a query."""
    model = make_model()
    index = rx.TrieIndex.build([[1, 2], [3, 4]], vocab=rx.SIDVocab([40, 30], offset=FIRST))
    processor = rx.TrieLogitsProcessor(index, 6, num_beams=4)
    got = beams(model, 4, 2, do_sample=False, logits_processor=[processor])
    assert (got.sequences_scores > -1e8).sum() == 6
    with pytest.raises(ValueError, match="excludes every token"):
        beams(model, 4, 2, do_sample=False, logits_processor=[processor], suppress_tokens=list(SUPPRESSED["level 1"]))


def test_finished_rows_are_not_stuck():
    """SIDs of one token or two, ended by the end token: rows that are done wait for the others."""
    model, index = make_model(eos_token_id=EOS), make_index(eos=EOS, lengths=True)
    rows = model.generate(
        **prompts(), max_new_tokens=5, do_sample=True, num_return_sequences=20,
        logits_processor=[rx.TrieLogitsProcessor(index, 6)],
    )  # fmt: skip
    sids, lengths = codes_of(rows, 6)
    assert index.contains(sids, lengths).all()
    assert set(lengths.tolist()) == {1, 2}


def test_bad_construction():
    index = make_index()
    with pytest.raises(ValueError, match="prompt_length must be at least 0, got -1"):
        rx.TrieLogitsProcessor(index, -1)
    with pytest.raises(TypeError, match=r"prompt_length must be an integer, got 2\.5"):
        rx.TrieLogitsProcessor(index, 2.5)
    with pytest.raises(ValueError, match="eos_token_id must be at least 0, got -2"):
        rx.TrieLogitsProcessor(index, 1, eos_token_id=-2)
    with pytest.raises(ValueError, match="num_beams must be at least 1, got 0"):
        rx.TrieLogitsProcessor(index, 1, num_beams=0)
    with pytest.raises(ValueError, match="eos_token_id must be given for an index whose SIDs differ in length"):
        rx.TrieLogitsProcessor(make_index(lengths=True), 1)


def test_bad_calls():
    index, scores = make_index(), torch.zeros(1, VOCAB)
    ids = torch.full((1, 4), FIRST)
    with pytest.raises(
        ValueError, match=r"prompt_length must be at most the columns of input_ids, of shape \(1, 4\), got 5"
    ):
        rx.TrieLogitsProcessor(index, 5)(ids, scores)
    with pytest.raises(ValueError, match=r"max_new_tokens must be 2, .* generate asks for token 3"):
        rx.TrieLogitsProcessor(index, 2)(ids, scores)
    with pytest.raises(ValueError, match=r"more than 79 columns, .* got shape \(1, 70\)"):
        rx.TrieLogitsProcessor(index, 4)(ids, scores[:, :70])
    with pytest.raises(ValueError, match=r"scores must have 1 rows .* got shape \(2, 120\)"):
        rx.TrieLogitsProcessor(index, 4)(ids, scores.expand(2, -1))
    with pytest.raises(ValueError, match="num_beams must divide the 1 rows of scores, got 2"):
        rx.TrieLogitsProcessor(index, 4, num_beams=2)(ids, scores)
    with pytest.raises(ValueError, match="on one device, got cpu, meta, cpu"):
        rx.TrieLogitsProcessor(index, 4)(ids, scores.to("meta"))


def test_generate_beyond_a_whole_sid():
    model, index = make_model(), make_index()
    processors = [rx.TrieLogitsProcessor(index, 6)]
    with pytest.raises(ValueError, match="max_new_tokens must be 2"):
        model.generate(**prompts(), max_new_tokens=3, do_sample=False, logits_processor=processors)


class _Sizes(TorchDispatchMode):
    """The number of elements that each operator's result has, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None:
            self.sizes[func.name()] = max(self.sizes.get(func.name(), 0), result.numel())
        return result


def test_only_the_result_has_a_column_per_token() -> None:
    """Nothing else is as large as the scores, at the root and below it."""
    index = rx.TrieIndex.build([[4, 8], [4, 9], [5, 10]])
    processor, scores = rx.TrieLogitsProcessor(index, 1), torch.zeros(6, 5000)
    for ids in (torch.ones(6, 1, dtype=torch.int64), torch.tensor([[1, 4], [1, 5]] * 3)):
        with _Sizes() as recorder:
            processor(ids, scores)
        large = [name for name, size in recorder.sizes.items() if size >= scores.shape[1]]
        assert large == ["aten::full_like", "aten::index_put_"]
