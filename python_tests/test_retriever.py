"""SIDRetriever against ``generate`` of transformers and against scoring every SID of the catalogue."""

from __future__ import annotations

import inspect
from functools import cache

import numpy as np
import pytest
import torch
from support.tolerances import close

import raddpo_ext as rx
from raddpo_ext.integrations import decoders
from raddpo_ext.integrations import retriever as retrievers

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

VOCAB = 120
FIRST = 50  # the first SID token; prompts use the ids below
EOS = 2
CAUSAL = ("qwen3", "llama", "gpt2", "opt", "mistral")
MODELS = (*CAUSAL, "t5")


def make_model(name: str, dtype: torch.dtype = torch.float32, layers: int = 2):
    torch.manual_seed(1)
    shape = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4)
    ids = dict(bos_token_id=1, eos_token_id=EOS, pad_token_id=0)
    gated = dict(shape, intermediate_size=64, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, **ids)
    t = transformers
    make = {
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**gated, initializer_range=0.3)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**gated, initializer_range=0.3)),
        # A window shorter than the prompts: its cache keeps the last tokens only.
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**gated, initializer_range=0.3, sliding_window=4)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=VOCAB, n_embd=32, n_layer=layers, n_head=4, n_positions=64, initializer_range=0.3, **ids
            )
        ),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(**shape, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.3, **ids)
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=layers, num_heads=4,
                       decoder_start_token_id=0, eos_token_id=EOS, pad_token_id=0)
        ),
    }[name]  # fmt: skip
    return make().to(dtype).eval()


@cache
def shared_model(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None):
    """One for all tests that leave it as it is."""
    model = make_model(name, dtype)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


PROBED_ONCE = pytest.mark.usefixtures("probed_once")


def make_index(rows: int, eos: int | None = None, lengths: bool = False, size: int = 12) -> rx.TrieIndex:
    rng = np.random.default_rng(0)
    vocab = rx.SIDVocab([size] * 3, offset=FIRST, eos=eos)
    ends = rng.integers(1, 4, rows) if lengths else None
    return rx.TrieIndex.build(rng.integers(0, size, (rows, 3)), lengths=ends, vocab=vocab)


def prompts(side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 7, 4 and 2 tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, FIRST, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :5] = 0
    if side == "right":
        order = mask.argsort(dim=1, descending=True, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    return ids * mask, mask


def tokens_of(index: rx.TrieIndex) -> list[list[int]]:
    """The tokens of every SID, its end token included."""
    nodes = torch.arange(index.num_nodes)
    codes, depths = index.paths(nodes)
    leaves = (index.item_ranges(nodes)[1] > 0).nonzero()[:, 0].tolist()
    eos = [] if index.vocab.eos is None else [index.vocab.eos]
    sids = [codes[node, : int(depths[node]) - len(eos)] for node in leaves]
    return [[int(index.vocab.token_ids[level][code]) for level, code in enumerate(sid)] + eos for sid in sids]


def generate(model, index: rx.TrieIndex, ids, mask, width: int, new: int):
    """What the users of today write: a dict of prefixes behind ``prefix_allowed_tokens_fn``."""
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    children: dict[tuple[int, ...], set[int]] = {}
    for tokens in tokens_of(index):
        for end, token in enumerate(tokens):
            children.setdefault(tuple(tokens[:end]), set()).add(token)
    model.generation_config.eos_token_id = index.vocab.eos
    out = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=width, num_return_sequences=width, max_new_tokens=new,
        do_sample=False, length_penalty=0.0, early_stopping=False, return_dict_in_generate=True, output_scores=True,
        prefix_allowed_tokens_fn=lambda _, row: sorted(children.get(tuple(row[start:].tolist()), {EOS})),
    )  # fmt: skip
    return out.sequences[:, start:].view(len(ids), width, -1), out.sequences_scores.view(len(ids), width)


@torch.no_grad()
def brute_force(model, index: rx.TrieIndex, ids, mask) -> list[dict[tuple[int, ...], float]]:
    """For each prompt the score of every SID's tokens, by teacher forcing: rows of one length, without padding."""
    by_length: dict[int, list[list[int]]] = {}
    for tokens in tokens_of(index):
        by_length.setdefault(len(tokens), []).append(tokens)
    result = []
    for row, real in zip(ids, mask.bool(), strict=True):
        scores = {}
        for sids in map(torch.tensor, by_length.values()):
            prompt = row[real].expand(len(sids), -1)
            if model.config.is_encoder_decoder:
                start = torch.full((len(sids), 1), model.config.decoder_start_token_id)
                before = torch.cat([start, sids], 1)
                logits = model(input_ids=prompt, decoder_input_ids=before, use_cache=False).logits[:, :-1]
            else:
                logits = model(input_ids=torch.cat([prompt, sids], 1)).logits[:, prompt.shape[1] - 1 : -1]
            logps = logits.float().log_softmax(-1).gather(2, sids[:, :, None]).sum((1, 2))
            scores |= zip(map(tuple, sids.tolist()), logps.tolist(), strict=True)
        result.append(scores)
    return result


def codes_of(sequences: torch.Tensor, index: rx.TrieIndex) -> torch.Tensor:
    """Generated tokens as codes ``[..., 3]`` padded with -1."""
    codes = sequences[..., :3] - FIRST - len(index.vocab.token_ids[0]) * torch.arange(3)
    return torch.where(sequences[..., :3] < FIRST, -1, codes)


@PROBED_ONCE
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_generate(name, side):
    model, index, width = shared_model(name), make_index(300), 12
    got = rx.SIDRetriever(model, index, beam_width=width).retrieve(*prompts(side))
    # generate() itself needs decoder-only prompts padded on the left.
    sequences, scores = generate(model, index, *prompts("left"), width, new=3)
    torch.testing.assert_close(got.scores, scores, **close("model"))
    assert torch.equal(got.sids, codes_of(sequences, index))
    items, offsets = index.lookup(got.sids.view(-1, 3))
    assert torch.equal(got.items.view(-1), items[offsets[:-1]])


@PROBED_ONCE
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "t5"])
def test_equals_generate_with_eos(name):
    model, index, width = shared_model(name), make_index(300, eos=EOS), 12
    got = rx.SIDRetriever(model, index, beam_width=width).retrieve(*prompts())
    sequences, scores = generate(model, index, *prompts(), width, new=4)
    torch.testing.assert_close(got.scores, scores, **close("model"))
    assert torch.equal(got.sids, codes_of(sequences, index))


@PROBED_ONCE
@pytest.mark.parametrize("name", ["qwen3", "t5"])
def test_equals_generate_with_lengths(name):
    # generate() holds finished SIDs outside its beam, so that the two are equal where both are exact.
    model, index = shared_model(name), make_index(25, eos=EOS, lengths=True)
    width = index.num_nodes
    got = rx.SIDRetriever(model, index, beam_width=width).retrieve(*prompts())
    sequences, scores = generate(model, index, *prompts(), width, new=4)
    found = index.num_sids
    torch.testing.assert_close(got.scores[:, :found], scores[:, :found], **close("model"))
    assert torch.equal(got.sids[:, :found], codes_of(sequences, index)[:, :found])
    assert (got.items[:, found:] == -1).all()
    assert got.scores[:, found:].isneginf().all()
    assert (scores[:, found:] < -1e8).all()


@PROBED_ONCE
@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "t5"])
def test_equals_brute_force(name, eos):
    model, index = shared_model(name), make_index(40, eos=eos, lengths=eos is not None)
    got = rx.SIDRetriever(model, index, beam_width=60).retrieve(*prompts("right"))
    end = [] if eos is None else [eos]
    for row, expected in enumerate(brute_force(model, index, *prompts("right"))):
        found = {}
        for sid, score in zip(got.sids[row].tolist(), got.scores[row].tolist(), strict=True):
            codes = [code for code in sid if code >= 0]
            if codes:
                found[tuple(FIRST + 12 * level + code for level, code in enumerate(codes)) + tuple(end)] = score
        assert found == pytest.approx(expected, abs=2e-4)
        assert list(found.values()) == sorted(found.values(), reverse=True)


@PROBED_ONCE
@pytest.mark.parametrize("widths", [[3, 20, 7], [12, 5, 12]])
@pytest.mark.parametrize("name", ["qwen3", "t5"])
def test_width_of_each_step(name, widths):
    model, index = shared_model(name), make_index(300)
    got = rx.SIDRetriever(model, index, beam_width=widths).retrieve(*prompts())

    def from_scratch(tokens, parents, level):
        """Every beam's whole prefix anew, without a cache."""
        nonlocal history
        queries, width = tokens.shape
        if level == 0:
            history = torch.empty(queries, 1, 0, dtype=torch.int64)
        else:
            history = torch.cat([history.gather(1, parents[..., None].expand(-1, -1, level - 1)), tokens[..., None]], 2)
        logits = []
        for row, real, beams in zip(*prompts(), history, strict=True):
            prompt = row[real.bool()].expand(width, -1)
            with torch.no_grad():
                if name == "t5":
                    start = torch.zeros(width, 1, dtype=torch.int64)
                    logits.append(model(input_ids=prompt, decoder_input_ids=torch.cat([start, beams], 1)).logits[:, -1])
                else:
                    logits.append(model(input_ids=torch.cat([prompt, beams], 1)).logits[:, -1])
        return torch.stack(logits)

    history = torch.empty(0)
    expected = rx.beam_search(from_scratch, index, batch_size=3, beam_width=widths)
    assert torch.equal(got.sids, expected.sids)
    torch.testing.assert_close(got.scores, expected.scores, **close("model"))


@PROBED_ONCE
@pytest.mark.parametrize("name", ["qwen3", "t5"])
def test_empty_beams(name):
    """More beams than SIDs: the empty slots change nothing."""
    model, index = shared_model(name), make_index(5)
    wide = rx.SIDRetriever(model, index, beam_width=50).retrieve(*prompts())
    narrow = rx.SIDRetriever(model, index, beam_width=5).retrieve(*prompts())
    assert torch.equal(wide.sids[:, :5], narrow.sids)
    torch.testing.assert_close(wide.scores[:, :5], narrow.scores, rtol=0, atol=1e-5)
    assert (wide.items[:, 5:] == -1).all()


@PROBED_ONCE
def test_finished_beams():
    """SIDs of one to three tokens without an end token: the short ones wait."""
    model, vocab = shared_model("qwen3"), rx.SIDVocab([12] * 3, offset=FIRST)
    sids = np.array([[0, 0, 0], [1, 5, 0], [2, 5, 1], [2, 5, 2], [3, 1, 1]])
    index = rx.TrieIndex.build(sids, lengths=[1, 2, 3, 3, 3], vocab=vocab)
    got = rx.SIDRetriever(model, index, beam_width=6).retrieve(*prompts())
    for row, expected in enumerate(brute_force(model, index, *prompts())):
        assert got.scores[row, :5].tolist() == pytest.approx(sorted(expected.values(), reverse=True), abs=2e-4)


@PROBED_ONCE
def test_padding_anywhere():
    """Holes in the prompts, and ids under the mask that are no tokens at all."""
    retriever = rx.SIDRetriever(shared_model("qwen3"), make_index(300), beam_width=8)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [-100, 11, 12, 999, 13, -1]], dtype=torch.int32)
    mask = torch.tensor([[True] * 6, [False, True, True, False, True, False]])
    got = retriever.retrieve(ids, mask)
    for row, prompt in enumerate(([5, 6, 7, 8, 9, 10], [11, 12, 13])):
        alone = retriever.retrieve(torch.tensor([prompt]))
        assert torch.equal(got.sids[row], alone.sids[0])
        torch.testing.assert_close(got.scores[row], alone.scores[0], **close("model"))


@PROBED_ONCE
@pytest.mark.parametrize("normalize", ["vocab", "level", "trie"])
def test_normalize_length_penalty_and_top_k(normalize):
    model, index = shared_model("llama"), make_index(60, eos=EOS, lengths=True)
    ids = prompts()[0][:1]

    def logits(tokens, parents, level):
        """Scores are added up in the same order, one SID a beam: the retriever without a model's cache."""
        nonlocal history
        history = [[]] if level == 0 else [history[p] + [t] for p, t in zip(parents[0], tokens[0], strict=True)]
        rows = torch.stack([torch.cat([ids[0], torch.tensor(row, dtype=torch.int64).clamp(min=0)]) for row in history])
        with torch.no_grad():
            return model(input_ids=rows).logits[None, :, -1]

    history = []
    arguments = dict(beam_width=9, normalize=normalize, length_penalty=0.7)
    expected = rx.beam_search(logits, index, batch_size=1, top_k=15, **arguments)
    got = rx.SIDRetriever(model, index, **arguments).retrieve(ids, top_k=15)
    assert torch.equal(got.items, expected.items)
    torch.testing.assert_close(got.scores, expected.scores, **close("model"))


@PROBED_ONCE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen3", "t5"])
def test_half_precision(name, dtype):
    index = make_index(300)
    got = rx.SIDRetriever(shared_model(name, dtype), index, beam_width=12).retrieve(*prompts())
    full = rx.SIDRetriever(shared_model(name), index, beam_width=12).retrieve(*prompts())
    assert index.contains(got.sids.view(-1, 3)).all()
    torch.testing.assert_close(got.scores[:, 0], full.scores[:, 0], **close("model", torch.bfloat16))


def test_compiled_model():
    """Finds what the plain one finds, and makes the last position's logits only."""
    model, index, shapes = make_model("qwen3", layers=1), make_index(300), []
    plain = rx.SIDRetriever(model, index, beam_width=6).retrieve(*prompts())
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    retriever = rx.SIDRetriever(torch.compile(model, backend="eager"), index, beam_width=6)
    first = retriever.retrieve(*prompts())  # looks what the model allows
    shapes.clear()
    second = retriever.retrieve(*prompts())
    assert torch.equal(first.sids, plain.sids)
    assert torch.equal(second.sids, plain.sids)
    assert shapes == [(3, 1, VOCAB), (3, 6, VOCAB), (3, 6, VOCAB)]


def test_computes_no_more_than_it_must():
    """The last position's logits only, and no column that is padding in every row."""
    model, shapes = make_model("qwen3"), []
    ids, mask = prompts()
    for options, expected in [
        ({}, [(2, 4, 32), (2, 6, 32), (2, 6, 32)]),
        ({"shared_prefix": False}, [(2, 4, 32), (12, 1, 32), (12, 1, 32)]),
    ]:
        retriever = rx.SIDRetriever(model, make_index(300), beam_width=6, **options)
        retriever.retrieve(ids, mask)  # looks what the model allows
        shapes.clear()
        for module in (model.model.embed_tokens, model.lm_head):
            module.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
        retriever.retrieve(ids[1:], mask[1:])
        assert shapes == expected
        model.model.embed_tokens._forward_hooks.clear()


@PROBED_ONCE
@pytest.mark.parametrize("normalize", ["vocab", "level", "trie"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "opt"])
def test_a_shared_prefix_changes_nothing(name, attention, normalize):
    model, index = shared_model(name, attention=attention), make_index(300)
    shared, alone = (
        rx.SIDRetriever(model, index, beam_width=[5, 20, 12], normalize=normalize, shared_prefix=way).retrieve(
            *prompts()
        )
        for way in (True, False)
    )
    assert torch.equal(shared.items, alone.items)
    torch.testing.assert_close(shared.scores, alone.scores, rtol=0, atol=1e-5)


@PROBED_ONCE
def test_the_cache_holds_the_prompt_once(monkeypatch):
    """Prompt + W (L - 1) tokens a query, where a row of the cache a beam holds W (prompt + L - 1)."""
    kept, build = [], decoders.SharedPrefixDecoder.__init__

    def keep(self, *args):
        build(self, *args)
        kept.append(self)

    retriever = rx.SIDRetriever(shared_model("qwen3"), make_index(300), beam_width=6)
    retriever.retrieve(*prompts())
    monkeypatch.setattr(decoders.SharedPrefixDecoder, "__init__", keep)
    retriever.retrieve(*prompts())
    keys = [layer.keys for layer in kept[-1].cache.layers]
    assert [tuple(key.shape) for key in keys] == [(3, 2, 7 + 2 * 6, 8)] * 2


@pytest.mark.parametrize("window", [4, 7])  # shorter than what looks at the model, and than the prompt and its SID
def test_a_window_shorter_than_the_prompt_is_not_shared(window):
    model, index = make_model("mistral"), make_index(300)
    model.config.sliding_window = window
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    ids, mask = prompts()
    with pytest.raises(ValueError, match="MistralForCausalLM cannot share a prompt of 7 tokens"):
        rx.SIDRetriever(model, index, beam_width=6, shared_prefix=True).retrieve(ids, mask)
    got = rx.SIDRetriever(model, index, beam_width=400).retrieve(ids, mask)
    best = [max(scores.values()) for scores in brute_force(model, index, ids, mask)]
    assert got.scores[:, 0].tolist() == pytest.approx(best, abs=2e-4)


@PROBED_ONCE
def test_beams_that_are_too_many_are_not_shared(monkeypatch):
    """The last mask has a row per beam fed, and a column for the prompt and each beam fed so far."""
    need = 4 * 3 * 20 * (7 + 5 + 20)
    model, index, built = shared_model("qwen3"), make_index(300), []
    build = decoders.SharedPrefixDecoder.__init__
    monkeypatch.setattr(
        decoders.SharedPrefixDecoder, "__init__", lambda self, *args: built.append(len(args[2])) or build(self, *args)
    )
    found = []
    for most, shared in ((need, True), (need - 1, False)):
        monkeypatch.setattr(retrievers, "MOST_MASK_BYTES", most)
        retriever = rx.SIDRetriever(model, index, beam_width=[5, 20, 12])
        retriever.retrieve(*prompts())
        built.clear()
        found.append(retriever.retrieve(*prompts()))
        assert bool(built) == shared
    assert torch.equal(found[0].items, found[1].items)
    with pytest.raises(ValueError, match=rf"beam_width = \[5, 20, 12\] need an attention mask of {need:,} bytes"):
        rx.SIDRetriever(model, index, beam_width=[5, 20, 12], shared_prefix=True).retrieve(*prompts())


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_run_apart(name):
    model, calls = make_model(name), []
    retriever = rx.SIDRetriever(model, make_index(300), beam_width=6)
    retriever.retrieve(*prompts())
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    retriever.retrieve(*prompts())
    assert not calls


@pytest.mark.parametrize("name", ["qwen3", "t5"])
@pytest.mark.parametrize("fault", ["head", "mask"])
def test_a_model_that_is_not_what_it_seems(name, fault, monkeypatch):
    """One that scales its logits unseen, or looks past a mask, is run as it stands."""
    model, index = make_model(name), make_index(300)
    if fault == "head":
        forward = model.forward

        def scaled(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.logits = 3 * output.logits
            return output

        monkeypatch.setattr(model, "forward", scaled)
        if name == "qwen3":
            scaled.__signature__ = inspect.signature(forward)
    elif name == "qwen3":
        body = model.model.forward

        def unmasked(*args, attention_mask=None, **kwargs):
            seen = None if attention_mask is not None and attention_mask.dim() == 4 else attention_mask
            return body(*args, attention_mask=seen, **kwargs)

        unmasked.__signature__ = inspect.signature(body)
        monkeypatch.setattr(model.model, "forward", unmasked)
    got = rx.SIDRetriever(model, index, beam_width=40).retrieve(*prompts())
    best = [max(scores.values()) for scores in brute_force(model, index, *prompts())]
    assert got.scores[:, 0].tolist() == pytest.approx(best, abs=2e-4)


def test_a_window_is_no_window_for_short_prompts():
    model, index = make_model("mistral"), make_index(300)
    model.config.sliding_window = 64
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 64
    shared, alone = (
        rx.SIDRetriever(model, index, beam_width=6, shared_prefix=way).retrieve(*prompts()) for way in (True, False)
    )
    assert torch.equal(shared.items, alone.items)


@PROBED_ONCE
def test_the_catalogue_may_be_replaced():
    model, first, second = shared_model("qwen3"), make_index(300), make_index(40)
    retriever = rx.SIDRetriever(model, first, beam_width=6)
    before = retriever.retrieve(*prompts())
    retriever.index = second
    got, expected = retriever.retrieve(*prompts()), rx.SIDRetriever(model, second, beam_width=6).retrieve(*prompts())
    assert torch.equal(got.items, expected.items)
    assert not torch.equal(got.items, before.items)
    with pytest.raises(ValueError, match="index must hold token ids below the model's vocab_size 120, got 127"):
        retriever.index = make_index(200, size=26)
    assert retriever.index is second


@PROBED_ONCE
def test_one_call_may_have_another_catalogue():
    model, first = shared_model("qwen3"), make_index(300)
    retriever = rx.SIDRetriever(model, first, beam_width=[4, 5, 6])
    before = retriever.retrieve(*prompts())
    for other in (make_index(40), first.restrict(torch.arange(60)), first.restrict([])):
        got = retriever.retrieve(*prompts(), top_k=5, index=other)
        expected = rx.SIDRetriever(model, other, beam_width=[4, 5, 6]).retrieve(*prompts(), top_k=5)
        assert torch.equal(got.items, expected.items)
        assert torch.equal(got.scores, expected.scores)
    assert retriever.index is first
    assert torch.equal(retriever.retrieve(*prompts()).items, before.items)
    with pytest.raises(ValueError, match="index must hold token ids below the model's vocab_size 120, got 127"):
        retriever.retrieve(*prompts(), index=make_index(200, size=26))
    with pytest.raises(TypeError, match="index must be a TrieIndex, got Tensor"):
        retriever.retrieve(*prompts(), index=torch.arange(3))


@PROBED_ONCE
def test_on_step_shows_the_beams():
    index, states = make_index(300), []
    got = rx.SIDRetriever(shared_model("qwen3"), index, beam_width=[4, 6, 8]).retrieve(
        *prompts(), on_step=lambda level, state: states.append(state)
    )
    assert [tuple(state.nodes.shape) for state in states] == [(3, 4), (3, 6), (3, 8)]
    assert torch.equal(index.paths(states[-1].nodes)[0], got.sids)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "t5"])  # beams that share the prompt, and one row per beam
def test_forced_tails_do_not_run_the_model(name):
    """A catalogue in which the first two codes decide, so that the model runs twice for SIDs of four tokens."""
    codes = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    sids = torch.cat([codes, codes.sum(1, keepdim=True)], 1)
    index = rx.TrieIndex.build(sids, vocab=rx.SIDVocab([6, 6, 12], offset=FIRST, eos=EOS))
    model, calls = make_model(name), []
    retriever = rx.SIDRetriever(model, index, beam_width=5, normalize="trie")
    expected = retriever.retrieve(*prompts(), top_k=3, return_token_logps=True)
    last = (model.get_decoder() or model).layers[-1] if name != "t5" else model.decoder.block[-1]
    last.register_forward_hook(lambda *_: calls.append(1))
    got = retriever.retrieve(*prompts(), top_k=3, skip_forced=True, return_token_logps=True)
    assert len(calls) == 2
    assert all(map(torch.equal, got, expected))
    assert (got.token_logps[..., 2:] == 0).all()
    torch.testing.assert_close(got.token_logps.sum(2), got.scores, **close("beam_search"))


@PROBED_ONCE
def test_skip_forced_says_what_it_needs():
    retriever = rx.SIDRetriever(shared_model("qwen3"), make_index(300), beam_width=4, cuda_graph=True, normalize="trie")
    with pytest.raises(ValueError, match="skip_forced = True needs cuda_graph = False"):
        retriever.retrieve(*prompts(), skip_forced=True)
    with pytest.raises(ValueError, match="skip_forced = True needs normalize = 'trie', got 'vocab'"):
        rx.SIDRetriever(shared_model("qwen3"), make_index(300), beam_width=4).retrieve(*prompts(), skip_forced=True)


def test_the_prompt_is_encoded_once():
    model, calls = make_model("t5"), []
    model.encoder.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
    retriever = rx.SIDRetriever(model, make_index(300), beam_width=6)
    retriever.retrieve(*prompts())
    calls.clear()
    retriever.retrieve(*prompts())
    assert calls == [3]


def test_leaves_the_model_alone():
    model = make_model("qwen3")
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.1)
    retriever = rx.SIDRetriever(model, make_index(300), beam_width=6)
    first, second = retriever.retrieve(*prompts()), retriever.retrieve(*prompts())
    assert torch.equal(first.scores, second.scores)
    assert not first.scores.requires_grad
    assert not model.training
    model.train()
    with pytest.raises(ValueError, match="model is in training mode"):
        retriever.retrieve(*prompts())
    assert model.training


def _bad_inputs():
    ids, mask = prompts()
    empty = mask.clone()
    empty[1] = 0
    high, low = ids.clone(), ids.clone()
    high[1, 6], low[2, 5] = VOCAB, -1
    return {
        "list": (TypeError, "input_ids must be an integer tensor, got list", [[1, 2]], None),
        "float": (TypeError, "input_ids must hold integers, got torch.float32", ids.float(), mask),
        "dims": (ValueError, r"input_ids must have 2 dimensions, got shape \(7,\)", ids[0], None),
        "no prompt": (ValueError, r"input_ids must hold at least one prompt .* \(0, 7\)", ids[:0], mask[:0]),
        "no token": (ValueError, r"input_ids must hold at least one prompt .* \(3, 0\)", ids[:, :0], mask[:, :0]),
        "mask type": (TypeError, "attention_mask must be a bool or integer tensor, got torch.float32", ids, mask / 1),
        "mask shape": (ValueError, r"attention_mask must have the shape .* got \(3, 6\)", ids, mask[:, 1:]),
        "empty prompt": (ValueError, r"attention_mask\[1\] must keep at least one token", ids, empty),
        "high id": (ValueError, r"input_ids\[1, 6\] = 120 is outside \[0, 120\)", high, mask),
        "low id": (ValueError, r"input_ids\[2, 5\] = -1 is outside", low, mask),
        "window": (ValueError, r"input_ids\[0\] has 63 tokens, and with 2 more of the SID exceeds .* window of 64",
                   torch.ones(2, 63, dtype=torch.int64), None),
        "meta": (ValueError, "on one device, got meta, cpu, cpu", ids.to("meta"), mask.to("meta")),
    }  # fmt: skip


@PROBED_ONCE
@pytest.mark.parametrize("case", _bad_inputs())
def test_bad_input(case):
    error, message, ids, mask = _bad_inputs()[case]
    with pytest.raises(error, match=message):
        rx.SIDRetriever(shared_model("qwen3"), make_index(20), beam_width=4).retrieve(ids, mask)


@PROBED_ONCE
def test_the_window_counts_real_tokens():
    ids = torch.ones(1, 90, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    mask[0, :62] = 1
    retriever = rx.SIDRetriever(shared_model("gpt2"), make_index(20), beam_width=4)
    padded, plain = retriever.retrieve(ids, mask), retriever.retrieve(ids[:, :62])
    assert torch.equal(padded.sids, plain.sids)


@PROBED_ONCE
def test_bad_construction():
    model, index = shared_model("qwen3"), make_index(20)
    with pytest.raises(ValueError, match="index must hold token ids below the model's vocab_size 120, got 127"):
        rx.SIDRetriever(model, make_index(200, size=26), beam_width=4)
    with pytest.raises(ValueError, match="beam_width must be at least 1, got 0"):
        rx.SIDRetriever(model, index, beam_width=0)
    with pytest.raises(ValueError, match=r"beam_width must be an integer or have one entry per level \(3\)"):
        rx.SIDRetriever(model, index, beam_width=[4, 4])
    with pytest.raises(ValueError, match=r"normalize must be one of .* got 'all'"):
        rx.SIDRetriever(model, index, beam_width=4, normalize="all")
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        rx.SIDRetriever(torch.nn.Linear(2, 2), index, beam_width=4)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        rx.SIDRetriever(model, index, beam_width=4).retrieve(*prompts(), top_k=0)


def test_a_model_without_a_cache():
    class Bare(transformers.Qwen3ForCausalLM):
        def forward(self, input_ids, **kwargs):
            return transformers.modeling_outputs.CausalLMOutput(logits=torch.zeros(*input_ids.shape, VOCAB))

    with pytest.raises(TypeError, match="model must keep a KV cache that can be reordered, Bare gave NoneType"):
        rx.SIDRetriever(Bare(make_model("qwen3").config).eval(), make_index(20), beam_width=4).retrieve(*prompts())
