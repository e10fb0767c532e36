"""SIDRetriever: items from a Hugging Face model, by beam search over the catalogue with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.beam_search import BeamResult, beam_search
from raddpo_ext.beam_step import BeamState
from raddpo_ext.integrations.base_model import head_arguments, windows
from raddpo_ext.integrations.decoders import Decoder, EncoderDecoder, ReorderedDecoder, SharedPrefixDecoder, verify
from raddpo_ext.trie import TrieIndex


class SIDRetriever:
    """Retrieves items with a causal or encoder-decoder language model of ``transformers``.

    Each prompt runs through the model once and its keys and values are kept once; then every step feeds one token a
    beam, all beams of a query as one row, where each sees the prompt and its own ancestors. The head meets only the
    tokens that the step needs (:func:`raddpo_ext.linear_beam_step`). It is ``model.generate`` with a trie constraint
    and ``do_sample=False``, but a finished SID waits within the beam, and the model's ``generation_config`` has no say
    (only ``decoder_start_token_id`` is read).

    What a model allows is found out at the first call, by a few tokens. One that cannot share a prefix (an
    encoder-decoder, flash attention, a window shorter than the prompt, positions worked out from the mask) has a row of
    the KV cache a beam, which follows the beams; one whose head cannot be taken apart (behind ``torch.compile``, with
    adapters) makes its logits itself.

    Args:
        model: a model with a language modelling head, ``torch.compile``\\ d or not, of any size and float type up to 32
            bits. It must be in evaluation mode when it retrieves; its mode is never changed.
        index: the catalogue, on the model's device. Its token ids are the model's.
        beam_width: beams a query: one width, or one for each of the ``index.levels`` steps.
        normalize, length_penalty: see :func:`raddpo_ext.beam_step`.
        shared_prefix: whether beams share their prompt's keys and values. Default: where the model allows.

    Attributes:
        index: the catalogue; may be replaced between calls.

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
        shared_prefix: bool | None = None,
    ) -> None:
        if not hasattr(model, "config"):
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
        _check.choice(normalize, "normalize", _check.NORMALIZE)
        self.model = model
        self.beam_width = beam_width
        self.normalize = normalize
        self.length_penalty = length_penalty
        self.shared_prefix = shared_prefix
        config = model.config.get_text_config()
        self._vocab_size: int = config.vocab_size
        self._window: int | None = getattr(config, "max_position_embeddings", None)
        self._ways: tuple[bool, bool] | None = None  # whether the head runs apart, and a prefix can be shared
        self.index = index

    @property
    def index(self) -> TrieIndex:
        return self._index

    @index.setter
    def index(self, index: TrieIndex) -> None:
        _check.instance(index, "index", TrieIndex)
        _check.widths(self.beam_width, index.levels)
        if max(index.max_tokens) >= self._vocab_size:
            raise ValueError(
                f"index holds token id {max(index.max_tokens)}, which a model of vocab_size {self._vocab_size} lacks"
            )
        self._index = index

    @torch.no_grad()
    def retrieve(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        top_k: int | None = None,
        *,
        on_step: Callable[[int, BeamState], None] | None = None,
    ) -> BeamResult:
        """The best items of each prompt.

        Args:
            input_ids: int64 ``[B, T]`` token ids, padded on either side; ids under the mask are not looked at.
            attention_mask: bool or integer ``[B, T]``, 0 on padding. Default: no padding.
            top_k: return this many items a query, a collided SID repeated for each of its items. Default: one row a SID
                of the last width, with its first item.
            on_step: see :func:`raddpo_ext.beam_search`.

        Returns:
            :class:`raddpo_ext.BeamResult`: ``scores`` float32 ``[B, R]``, ``sids`` int64 ``[B, R, L]``, ``items`` int64
            ``[B, R]``, best first; ``R`` is ``top_k``, or the last width.

        Raises:
            ValueError: a prompt without a token, a token id that the model lacks, a prompt that together with the SID
                exceeds ``config.max_position_embeddings``, tensors on another device than the index, or a model in
                training mode, whose dropout would make the result random.
            TypeError: not integers, or a model without a KV cache that can follow beams.
            With ``shared_prefix=True`` ValueError for a model that cannot share a prompt of that length.
        """
        if self.model.training:
            raise ValueError("model is in training mode, call model.eval() before retrieving")
        mask = self._check_prompts(input_ids, attention_mask)
        decoder = self._decoder(input_ids.long().masked_fill(~mask, 0), mask)
        return beam_search(
            decoder,
            self.index,
            batch_size=len(input_ids),
            beam_width=self.beam_width,
            normalize=self.normalize,
            length_penalty=self.length_penalty,
            top_k=top_k,
            on_step=on_step,
            **decoder.head,
        )

    def _decoder(self, prompts: Tensor, mask: Tensor) -> Decoder:
        head = head_arguments(self.model)
        if self._ways is None:
            self._ways = verify(self.model, head)
        fuses, shares = self._ways
        head = head if fuses else {}
        if self.model.config.is_encoder_decoder:
            return EncoderDecoder(self.model, head, prompts, mask)
        # Beams that share a prompt see all of it, whatever slides over a beam of its own.
        tokens = int(mask.sum(1).max())
        shares = shares and all(tokens + self.index.levels - 1 <= window for window in windows(self.model).values())
        if self.shared_prefix and not shares:
            raise ValueError(
                f"shared_prefix = True, but {type(self.model).__name__} cannot share a prompt of {tokens} tokens: it "
                "looks past a mask, or at a window of the last tokens"
            )
        shares = shares and self.shared_prefix is not False
        return (SharedPrefixDecoder if shares else ReorderedDecoder)(self.model, head, prompts, mask)

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
