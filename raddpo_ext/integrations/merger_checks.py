"""The TokenMerger of a transformers model, and checks that the model can be run with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.integrations.base_model import base_model
from raddpo_ext.integrations.probes import probe_tokens, ratio, size, tolerance
from raddpo_ext.integrations.token_merger import TokenMerger


def merger_of(model: Any) -> TokenMerger | None:
    """The TokenMerger that a transformers model reads its ids with, or None.

    Raises:
        ValueError: PEFT adapts the merger in a way that does not know merged ids, or an encoder-decoder's decoder
            has the merger, too.
    """
    base = base_model(model)
    embeddings = _embeddings(base)
    if base.config.is_encoder_decoder:  # the encoder reads the prompts
        if isinstance(embeddings, TokenMerger):
            raise ValueError(
                "model is an encoder-decoder, whose TokenMerger must be the encoder's alone, or it cannot be saved: "
                "call model.get_encoder().set_input_embeddings(merger), not model.set_input_embeddings(merger)"
            )
        embeddings = _embeddings(base.get_encoder())
    if embeddings is None:
        return None
    active = getattr(embeddings, "modules_to_save", None)  # of PEFT's ModulesToSaveWrapper: whole copies
    if active is not None and embeddings.active_adapters:
        embeddings = active[embeddings.active_adapters[0]]
    if isinstance(embeddings, TokenMerger):
        return embeddings
    if any(isinstance(module, TokenMerger) for module in embeddings.modules()):
        kind = f"{type(embeddings).__module__}.{type(embeddings).__name__}"
        raise ValueError(
            f"model has an adapter ({kind}) on its TokenMerger, which does not know merged ids: leave the embeddings "
            "out of target_modules and of trainable_token_indices, or train them whole with modules_to_save"
        )
    return None


def _embeddings(model: Any) -> Any:
    """The input embeddings of a model, or None if transformers does not know them."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def shared_vocab(model: Any, ref_model: Any, vocab: SIDVocab | None) -> SIDVocab | None:
    """The vocab of a trainer: that of the model's TokenMerger, if it has one.

    Raises:
        ValueError: ``vocab`` is another one, or the reference cannot read the model's merged ids.
    """
    merger = merger_of(model)
    if merger is None:
        return vocab
    if vocab is not None and vocab != merger.ids.vocab:
        raise ValueError(f"vocab must be the TokenMerger's, {merger.ids.vocab}, got {vocab}")
    other = None if ref_model is None else merger_of(ref_model)
    same = other is not None and (other.ids.vocab, other.ids.vocab_size) == (merger.ids.vocab, merger.ids.vocab_size)
    if ref_model is not None and not same:
        raise ValueError("ref_model must have a TokenMerger of the model's vocab and table size, to read its prompts")
    return merger.ids.vocab


@torch.no_grad()
def verify_merger(model: Any) -> None:
    """Check that a model with a TokenMerger reads its ids through it alone, by two small forwards.

    Some models look ids up elsewhere too (Gemma 3n has embeddings per layer), where a merged id means nothing.

    Raises:
        ValueError: merged ids and their embeddings give different logits, or the model fails.
    """
    merger, base = merger_of(model), base_model(model)
    if merger is None or hasattr(merger.weight, "placements"):  # shards cannot be read outside of the model
        return
    # Tokens, some of which may be merged, and two SIDs.
    levels = merger.ids.tokens[1:].split(merger.ids.counts)
    tokens = [*probe_tokens(base, 8), *(int(ids[0]) for ids in levels), *(int(ids[-1]) for ids in levels)]
    ids = torch.tensor([merger.merge(tokens)], device=base.device)
    decoder = {"decoder_input_ids": torch.zeros_like(ids)} if base.config.is_encoder_decoder else {}
    was_training = base.training
    base.eval()
    try:
        found, reads = _run(base, merger, input_ids=ids, **decoder)
        expected, others = _run(base, merger, inputs_embeds=merger(ids), **decoder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{type(base).__name__} cannot read merged ids: {type(error).__name__}: {error}") from error
    finally:
        base.train(was_training)
    # A table may add nothing yet at a model's initialization, so the look-ups themselves are compared, too.
    if reads != others or not ratio(size(found - expected), size(expected)) <= tolerance(base).rounding:
        raise ValueError(
            f"{type(base).__name__} cannot read merged ids: it reads input_ids by more than its input embeddings"
        )


def _run(base: Any, merger: TokenMerger, **inputs: Tensor) -> tuple[Tensor, list[tuple[int, list[int]]]]:
    """The logits of some inputs, and what the model looked up in embeddings other than the merger."""
    reads: list[tuple[int, list[int]]] = []
    modules = [module for module in base.modules() if isinstance(module, nn.Embedding) and module is not merger]
    hooks = [
        module.register_forward_pre_hook(lambda module, args: reads.append((id(module), args[0].flatten().tolist())))
        for module in modules
    ]
    try:
        return base(**inputs, use_cache=False).logits.float(), reads
    finally:
        for hook in hooks:
            hook.remove()
