"""The TokenMerger of a transformers model, and checks that the model can be run with it."""

from __future__ import annotations

from typing import Any

import torch

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
    embeddings = base.get_input_embeddings()
    if base.config.is_encoder_decoder:  # the encoder reads the prompts
        if isinstance(embeddings, TokenMerger):
            raise ValueError(
                "model is an encoder-decoder, whose TokenMerger must be the encoder's alone, or it cannot be saved: "
                "call model.get_encoder().set_input_embeddings(merger), not model.set_input_embeddings(merger)"
            )
        embeddings = base.get_encoder().get_input_embeddings()
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
        found = base(input_ids=ids, use_cache=False, **decoder).logits.float()
        expected = base(inputs_embeds=merger(ids), use_cache=False, **decoder).logits.float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{type(base).__name__} cannot read merged ids: {type(error).__name__}: {error}") from error
    finally:
        base.train(was_training)
    if not ratio(size(found - expected), size(expected)) <= tolerance(base).rounding:
        raise ValueError(
            f"{type(base).__name__} cannot read merged ids: it reads input_ids by more than its input embeddings"
        )
