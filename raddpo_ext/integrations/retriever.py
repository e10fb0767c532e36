"""SIDRetriever: items from a Hugging Face model, by beam search over the catalogue with a KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.beam_search import BeamResult, beam_search
from raddpo_ext.trie import TrieIndex


class SIDRetriever:
    """Retrieves items with a causal or encoder-decoder language model of ``transformers``.

    Each prompt runs through the model once; then every step feeds one token a beam, with the KV cache following the
    beams. It is ``model.generate`` with a trie constraint and ``do_sample=False``, but a finished SID waits within the
    beam, and the model's ``generation_config`` has no say (only ``decoder_start_token_id`` is read).

    Args:
        model: a model with a language modelling head, ``torch.compile``\\ d or not, of any size and float type up to 32
            bits. It must be in evaluation mode when it retrieves; its mode is never changed.
        index: the catalogue, on the model's device. Its token ids are the model's.
        beam_width: beams a query: one width, or one for each of the ``index.levels`` steps.
        normalize, length_penalty: see :func:`raddpo_ext.beam_step`.

    Raises:
        ValueError, TypeError: naming the argument and the value; also where ``index`` holds a token id that the model
            does not have.
    """

    def __init__(
        self,
        model: Any,
        index: TrieIndex,
        *,
        beam_width: int | Sequence[int],
        normalize: str = "vocab",
        length_penalty: float = 0.0,
    ) -> None:
        if not hasattr(model, "config"):
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
        _check.choice(normalize, "normalize", _check.NORMALIZE)
        self.model = model
        self.index = index
        self.beam_width = _check.widths(beam_width, index.levels)
        self.normalize = normalize
        self.length_penalty = length_penalty
        config = model.config.get_text_config()
        self._vocab_size: int = config.vocab_size
        self._window: int | None = getattr(config, "max_position_embeddings", None)
        if max(index.max_tokens) >= self._vocab_size:
            raise ValueError(
                f"index holds token id {max(index.max_tokens)}, which a model of vocab_size {self._vocab_size} lacks"
            )

    @torch.no_grad()
    def retrieve(self, input_ids: Tensor, attention_mask: Tensor | None = None, top_k: int | None = None) -> BeamResult:
        """The best items of each prompt.

        Args:
            input_ids: int64 ``[B, T]`` token ids, padded on either side; ids under the mask are not looked at.
            attention_mask: bool or integer ``[B, T]``, 0 on padding. Default: no padding.
            top_k: return this many items a query, a collided SID repeated for each of its items. Default: one row a SID
                of the last width, with its first item.

        Returns:
            :class:`raddpo_ext.BeamResult`: ``scores`` float32 ``[B, R]``, ``sids`` int64 ``[B, R, L]``, ``items`` int64
            ``[B, R]``, best first; ``R`` is ``top_k``, or the last width.

        Raises:
            ValueError: a prompt without a token, a token id that the model lacks, a prompt that together with the SID
                exceeds ``config.max_position_embeddings``, tensors on another device than the index, or a model in
                training mode, whose dropout would make the result random.
            TypeError: not integers, or a model without a KV cache that can follow beams.
        """
        if self.model.training:
            raise ValueError("model is in training mode, call model.eval() before retrieving")
        mask = self._check_prompts(input_ids, attention_mask)
        prompts = input_ids.long().masked_fill(~mask, 0)
        decoder = _EncoderDecoder if self.model.config.is_encoder_decoder else _DecoderOnly
        return beam_search(
            decoder(self.model, prompts, mask),
            self.index,
            batch_size=len(prompts),
            beam_width=self.beam_width,
            normalize=self.normalize,
            length_penalty=self.length_penalty,
            top_k=top_k,
        )

    def _check_prompts(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The mask of real tokens, bool ``[B, T]``."""
        if not isinstance(input_ids, Tensor):
            raise TypeError(f"input_ids must be an integer tensor, got {type(input_ids).__name__}")
        _check.integer_tensor(input_ids, "input_ids", 2)
        if input_ids.numel() == 0:
            raise ValueError(
                f"input_ids must hold at least one prompt of one token, got shape {tuple(input_ids.shape)}"
            )
        if not input_ids.device == self.index.device == self.model.device:
            raise ValueError(
                f"input_ids, index and model must be on one device, got {input_ids.device}, {self.index.device}, "
                f"{self.model.device}"
            )
        if attention_mask is None:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        else:
            mask = _as_mask(attention_mask, input_ids)
        lengths = mask.sum(1)
        _check.none(lengths == 0, lambda row: f"attention_mask[{row}] leaves the prompt no token")
        outside = mask & ((input_ids < 0) | (input_ids >= self._vocab_size))
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(
                f"input_ids[{row}, {column}] = {int(input_ids[row, column])} is outside [0, {self._vocab_size}), the "
                "model's vocabulary"
            )
        if self._window is not None:
            # The last token of a SID is never fed; an encoder reads the prompt alone.
            steps = 0 if self.model.config.is_encoder_decoder else self.index.levels - 1
            _check.none(
                lengths + steps > self._window,
                lambda row: (
                    f"input_ids[{row}] has {int(lengths[row])} tokens, and {steps} more of the SID exceed the "
                    f"model's window of {self._window} (max_position_embeddings)"
                ),
            )
        return mask


class _Decoder:
    """A model as the ``step_fn`` of :func:`beam_search`: one forward a step, the KV cache following the beams."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None
        self.width = 1

    def __call__(self, tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        queries, width = tokens.shape
        if level == 0:
            output = self.first()
        else:
            first_rows = torch.arange(0, queries * self.width, self.width, device=parents.device)
            # Finished and empty slots (-1) feed token 0; what it gives is ignored.
            output = self.next(tokens.clamp(min=0).view(-1, 1), (first_rows[:, None] + parents).view(-1))
        self.width = width
        self.cache = getattr(output, "past_key_values", None)
        if not hasattr(self.cache, "reorder_cache"):
            raise TypeError(
                f"model must keep a KV cache that can be reordered, {type(self.model).__name__} gave "
                f"{type(self.cache).__name__}"
            )
        return output.logits[:, -1].unflatten(0, (queries, width))

    def first(self) -> Any:
        """The prompts' output, one row a query."""
        raise NotImplementedError

    def next(self, tokens: Tensor, rows: Tensor) -> Any:
        """The output for one more token ``[B * W, 1]`` a beam, which extends row ``rows`` ``[B * W]`` of the cache."""
        raise NotImplementedError


class _DecoderOnly(_Decoder):
    def __init__(self, model: Any, prompts: Tensor, mask: Tensor) -> None:
        super().__init__(model)
        # Padding goes to the left, wherever it was: then the last column is every prompt's last token.
        lengths = mask.sum(1)
        order = mask.long().argsort(dim=1, stable=True)[:, -int(lengths.max()) :]
        self.prompts = prompts.gather(1, order)
        self.mask = mask.gather(1, order).long()
        self.lengths = lengths
        self.padded = bool((self.mask == 0).any())
        self.accepts = _parameters(model)

    def first(self) -> Any:
        last = {"logits_to_keep": 1} if "logits_to_keep" in self.accepts else {}
        return self.forward(self.prompts, (self.mask.cumsum(1) - 1).clamp(min=0), **last)

    def next(self, tokens: Tensor, rows: Tensor) -> Any:
        self.cache.reorder_cache(rows)
        self.mask = torch.cat([self.mask[rows], torch.ones_like(tokens)], 1)
        position = self.lengths[rows]
        self.lengths = position + 1
        return self.forward(tokens, position[:, None])

    def forward(self, tokens: Tensor, positions: Tensor, **extra: Any) -> Any:
        if "position_ids" in self.accepts:
            extra["position_ids"] = positions
        return self.model(
            input_ids=tokens,
            attention_mask=self.mask if self.padded else None,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **extra,
        )


class _EncoderDecoder(_Decoder):
    def __init__(self, model: Any, prompts: Tensor, mask: Tensor) -> None:
        super().__init__(model)
        self.mask = mask.long()
        self.encoded = model.get_encoder()(input_ids=prompts, attention_mask=self.mask, return_dict=True)
        start = _decoder_start(model)
        self.start = torch.full((len(prompts), 1), start, dtype=torch.int64, device=prompts.device)

    def first(self) -> Any:
        return self.forward(self.start)

    def next(self, tokens: Tensor, rows: Tensor) -> Any:
        if len(rows) == len(self.mask):
            # Every beam of a query shares the prompt's keys and values, so that only the SID's move.
            self.cache.self_attention_cache.reorder_cache(rows)
        else:
            self.cache.reorder_cache(rows)
            self.mask = self.mask[rows]
            self.encoded.last_hidden_state = self.encoded.last_hidden_state[rows]
        return self.forward(tokens)

    def forward(self, tokens: Tensor) -> Any:
        return self.model(
            encoder_outputs=self.encoded,
            attention_mask=self.mask,
            decoder_input_ids=tokens,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )


def _as_mask(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point():
        got = attention_mask.dtype if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise TypeError(f"attention_mask must be a bool or integer tensor, got {got}")
    if attention_mask.shape != input_ids.shape or attention_mask.device != input_ids.device:
        raise ValueError(
            f"attention_mask must have the shape and device of input_ids, {tuple(input_ids.shape)} on "
            f"{input_ids.device}, got {tuple(attention_mask.shape)} on {attention_mask.device}"
        )
    return attention_mask != 0


def _decoder_start(model: Any) -> int:
    """The token that opens the decoder's side, as ``generate`` finds it."""
    for config in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(config, name, None)
            if token is not None:
                return int(token)
    raise ValueError("model has no decoder_start_token_id, set it in model.generation_config")


def _parameters(model: Any) -> set[str]:
    """Names of the forward's arguments, behind the wrappers of ``torch.compile`` and of PEFT adapters."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return set(inspect.signature(model.forward).parameters)
