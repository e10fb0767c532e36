"""A whole retrieval, compared with ``generate`` of transformers with a constraint in Python."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from raddpo_ext._matmul import linear
from raddpo_ext.bench.compare import Comparison, Missing, require
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.integrations.retriever import SIDRetriever

CODES, LEVELS, HEAD_DIM = 256, 3, 64
TOLERANCE = 1e-4  # relative, of scores


def comparison(
    device: torch.device, *, items: int, vocab_size: int, hidden_size: int, layers: int, prompt: int, beam_width: int
) -> Comparison:
    """Retrieve for one prompt with a random Qwen3. The floor is the head's product with the states of every beam."""
    # The model, the catalogue and the prompt.
    model = random_model(vocab_size, hidden_size, layers).to(device)
    vocab = SIDVocab([CODES] * LEVELS, offset=vocab_size - LEVELS * CODES)
    sids = torch.randint(CODES, (items, LEVELS))
    retriever = SIDRetriever(model, TrieIndex.build(sids, vocab=vocab).to(device), beam_width=beam_width)
    prompts = torch.randint(vocab_size - LEVELS * CODES, (1, prompt), device=device)
    allowed = children_of(vocab.encode(sids).tolist())

    def ours() -> tuple[Tensor, Tensor]:
        found = retriever.retrieve(prompts)
        return found.scores, vocab.encode(found.sids[0].cpu())[None]

    def peer() -> tuple[Tensor, Tensor]:
        found = generate(
            model,
            prompts,
            width=beam_width,
            levels=LEVELS,
            prefix_allowed_tokens_fn=lambda _, row: allowed[tuple(row[prompt:].tolist())],
            return_dict_in_generate=True,
            output_scores=True,
        )
        return found.sequences_scores[None], found.sequences[None, :, prompt:].cpu()

    # One state for the prompt, and one per beam in each later step.
    rows = torch.randn(1 + (LEVELS - 1) * beam_width, hidden_size, device=device)
    logits = torch.empty(len(rows), vocab_size, device=device)
    weight = model.lm_head.weight.detach()
    return Comparison(
        f"retrieval, Qwen3 of {layers} layers H={hidden_size} V={vocab_size}, prompt of {prompt}, W={beam_width}",
        {"ours": torch.no_grad()(ours), "generate, prefix_allowed_tokens_fn": peer},
        {"the head's products": lambda: linear(rows, weight, out=logits)},
        agree=agree,
    )


def random_model(vocab_size: int, hidden_size: int, layers: int, kv_heads: int | None = None) -> Any:
    """A Qwen3 with random weights and heads of 64, in evaluation mode.

    Args:
        kv_heads: heads of keys and values; default: as many as heads.

    Raises:
        Missing: transformers cannot be imported.
    """
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError as error:
        raise Missing(f"transformers cannot be imported: {error}") from None
    torch.manual_seed(0)
    heads = hidden_size // HEAD_DIM
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def children_of(sids: Iterable[list[int]]) -> dict[tuple[int, ...], list[int]]:
    """The tokens that can follow each prefix of the SIDs, as a user keeps them for ``prefix_allowed_tokens_fn``."""
    following: dict[tuple[int, ...], dict[int, None]] = {}
    for tokens in sids:
        for level, token in enumerate(tokens):
            following.setdefault(tuple(tokens[:level]), {})[token] = None
    return {prefix: list(tokens) for prefix, tokens in following.items()}


def generate(model: Any, ids: Tensor, *, width: int, levels: int, top_k: int | None = None, **options: Any) -> Any:
    """Run transformers' own beam search on prompts of one length; ``options`` holds the constraint."""
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        num_beams=width,
        num_return_sequences=top_k or width,
        max_new_tokens=levels,
        do_sample=False,
        length_penalty=0.0,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )


def agree(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = TOLERANCE) -> None:
    """Raise AssertionError unless the scores, best first, and the SIDs are equal. SIDs of equal scores may swap."""
    (got, got_sids), (scores, sids) = result, expected
    near = tolerance * scores.abs()
    off = (got - scores).abs()
    require(bool((off <= near).all()), f"its scores are off by up to {float(off.max()):.2g}")
    # SIDs must be equal where the scores on both sides differ.
    gaps = (scores[:, :-1] - scores[:, 1:]).cpu() > 2 * near[:, 1:].cpu()
    edge = torch.zeros(len(gaps), 1, dtype=torch.bool)
    alone = torch.cat([~edge, gaps], 1) & torch.cat([gaps, edge], 1)  # the last may tie with one outside of the beam
    require(bool((got_sids == sids)[alone].all()), "it finds other SIDs")
