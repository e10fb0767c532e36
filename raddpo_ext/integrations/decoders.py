"""A transformers model as the ``step_fn`` of beam_search: one forward per step, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext.integrations.base_model import base_model, decoder_start, forward_parameters, head_scale
from raddpo_ext.logps.head import Head


def pad_left(prompts: Tensor, mask: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Move all padding to the left, and pad to the smallest possible multiple of ``multiple`` columns.

    Returns:
        The prompts and their mask.
    """
    longest = int(mask.sum(1).max())
    columns = -(-longest // multiple) * multiple
    order = mask.long().argsort(dim=1, stable=True)[:, -longest:]
    padding = (columns - longest, 0)
    return F.pad(prompts.gather(1, order), padding), F.pad(mask.gather(1, order), padding)


def pad_right(prompts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move all padding to the right, as encoders with learned positions need it; returns the prompts and their mask."""
    order = (~mask).long().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    return prompts.gather(1, order), mask.gather(1, order)


class Decoder:
    """Base class of the decoders: runs the model with a KV cache.

    Args:
        model: the model, with the user's wrappers.
        head: the model's head, if the search takes hidden states. None: the model runs its head and returns logits.
        positions: whether to pass position ids to a model that takes them.

    Attributes:
        skip_empty: whether slots without a token may be left out of a step, where that is free. Their states are then
            any finite ones. Synchronises.
    """

    skip_empty = False

    def __init__(self, model: Any, head: Head | None, positions: bool = True) -> None:
        self.model = model
        self.head = head
        self.inner = model if head is None else base_model(model).get_decoder()
        self.accepts = forward_parameters(self.inner)
        self.tells_positions = positions and "position_ids" in self.accepts
        self.cache: Any = None

    def __call__(self, tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        """See ``step_fn`` of :func:`raddpo_ext.beam_search`."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, mask: Any, positions: Tensor, **extra: Any) -> Tensor:
        """Run the model on the next tokens; returns hidden states or logits, ``[rows, columns, H or V]``."""
        if self.tells_positions:
            extra["position_ids"] = positions
        output = self.inner(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **extra,
        )
        self.cache = getattr(output, "past_key_values", None)
        return output.logits if self.head is None else output.last_hidden_state.to(self.head.weight.dtype)

    def check_cache(self) -> None:
        """Raise TypeError if the model returned no cache, or one that cannot be reordered by beam."""
        if not hasattr(self.cache, "reorder_cache"):
            raise TypeError(
                f"model must keep a KV cache that can be reordered, {type(self.model).__name__} gave "
                f"{type(self.cache).__name__}"
            )


class PromptDecoder(Decoder):
    """Base class of the decoders of a decoder-only model; its prompts are padded on the left."""

    def __init__(self, model: Any, head: Head | None, prompts: Tensor, mask: Tensor, *, positions: bool = True) -> None:
        super().__init__(model, head, positions)
        self.prompts = prompts
        self.mask = mask
        self.lengths = mask.sum(1)

    @cached_property
    def padded(self) -> bool:
        return not bool(self.mask.all())

    def prompt_mask(self) -> Any:
        return self.mask.long() if self.padded else None

    def read_prompts(self) -> Tensor:
        """Run the prompts; returns the states or logits of their last tokens, ``[B, 1, H or V]``."""
        # Most models can leave out the logits of the other tokens.
        last = {"logits_to_keep": 1} if "logits_to_keep" in self.accepts else {}
        positions = (self.mask.long().cumsum(1) - 1).clamp(min=0)
        return self.forward(self.prompts, self.prompt_mask(), positions, **last)[:, -1:]


class SharedPrefixDecoder(PromptDecoder):
    """Stores a prompt's keys and values once for all of its beams.

    All beams of a query are one row. Each step appends their tokens to the row's cache, and a mask lets each beam
    attend to the prompt and to its own ancestors. Nothing in the cache is reordered; after step ``level`` it holds
    ``T + W * level`` tokens per query, or less with ``skip_empty``.
    """

    def __init__(self, model: Any, head: Head | None, prompts: Tensor, mask: Tensor) -> None:
        from transformers import DynamicCache

        super().__init__(model, head, prompts, mask)
        self.cache = DynamicCache()  # without the model's config, so that no layer drops tokens outside of its window
        self.attention = base_model(model).config._attn_implementation
        self.sees = self.mask[:, None]  # [B, W, keys]

    def __call__(self, tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        if level == 0:
            return self.read_prompts()
        # A beam attends to what its parent attends to, and to itself.
        batch, width = tokens.shape
        slots = self._fed_slots(tokens)
        ancestors = self.sees.gather(1, parents[..., None].expand(-1, -1, self.sees.shape[2]))
        itself = slots[:, None, :] == torch.arange(width, device=tokens.device)[None, :, None]
        self.sees = torch.cat([ancestors, itself], 2)
        positions = (self.lengths[:, None] + (level - 1)).expand(-1, slots.shape[1])
        # Finished and empty slots (-1) feed token 0; the search ignores their output.
        fed = tokens.clamp(min=0)
        if slots.shape[1] == width:
            return self.forward(fed, self.attention_mask(self.sees), positions)
        sees = self.sees.gather(1, slots[..., None].expand(-1, -1, self.sees.shape[2]))
        states = self.forward(fed.gather(1, slots), self.attention_mask(sees), positions)
        places = slots[..., None].expand(-1, -1, states.shape[2])
        return states.new_zeros(batch, width, states.shape[2]).scatter_(1, places, states)

    def _fed_slots(self, tokens: Tensor) -> Tensor:
        """The slots that the model reads, int64 ``[B, W']``, as many for each query: all, or those with a token."""
        width = tokens.shape[1]
        if self.skip_empty:
            most = max(1, int((tokens >= 0).sum(1).max()))
            if most < width:
                return (tokens < 0).long().argsort(dim=1, stable=True)[:, :most]
        return torch.arange(width, device=tokens.device).expand(len(tokens), -1)

    def attention_mask(self, sees: Tensor) -> Any:
        """Convert ``sees``, bool ``[B, tokens, keys]``, to the form of mask that the model's attention takes."""
        if self.attention == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            def visible(query: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
                return sees[query, row, key]

            batch, width, keys = sees.shape
            return create_block_mask(visible, batch, None, width, keys, device=str(sees.device))
        if self.attention == "eager":  # adds the mask to its scores
            dtype = self.inner.dtype
            return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]
        return sees[:, None]


class ReorderedDecoder(PromptDecoder):
    """Uses one KV-cache row per beam, reordered at every step: for models that ignore a custom mask."""

    def __call__(self, tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        queries, width = tokens.shape
        if level == 0:
            states = self.read_prompts()
        else:
            # Each beam continues from its parent's row: cache, mask and length.
            rows = _rows(parents, len(self.mask) // queries)
            self.reorder(rows)
            self.mask = torch.cat([self.mask[rows], torch.ones_like(rows, dtype=torch.bool)[:, None]], 1)
            self.lengths = self.lengths[rows]
            mask = self.mask.long() if self.padded else None
            states = self.forward(tokens.clamp(min=0).view(-1, 1), mask, self.lengths[:, None] + (level - 1))
        self.check_cache()
        return states.view(queries, width, -1)

    def reorder(self, rows: Tensor) -> None:
        """Replace the rows of the cache by these of its rows."""
        self.cache.reorder_cache(rows)
        states = getattr(self.cache, "linear_cache", None)  # of MiniMax; its reorder_cache leaves it out
        if states is not None:
            states[:] = [state[rows] if isinstance(state, Tensor) else state for state in states]


class EncoderDecoder(Decoder):
    """Encodes each prompt once, and decodes with one KV-cache row per beam, reordered at every step."""

    def __init__(self, model: Any, head: Head | None, prompts: Tensor, mask: Tensor) -> None:
        super().__init__(model, head)
        self.scale = 1.0 if head is None else head_scale(base_model(model))
        self.mask = mask.long()
        self.encoded = model.get_encoder()(input_ids=prompts, attention_mask=self.mask, return_dict=True)
        self.start = torch.full((len(prompts), 1), decoder_start(model), dtype=torch.int64, device=prompts.device)

    def __call__(self, tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        queries, width = tokens.shape
        if level > 0:
            self._follow(_rows(parents, len(self.mask) // queries))
        states = self._decode(self.start if level == 0 else tokens.clamp(min=0).view(-1, 1))
        self.check_cache()
        return states[:, -1].view(queries, width, -1)

    def _follow(self, rows: Tensor) -> None:
        """Replace the rows of the cache by these of its rows."""
        if len(rows) == len(self.mask):
            # The beams of a query have equal keys and values of the prompt, so only those of the SID are reordered.
            self.cache.self_attention_cache.reorder_cache(rows)
        else:
            # The first step: one row per query becomes one row per beam.
            self.cache.reorder_cache(rows)
            self.mask = self.mask[rows]
            self.encoded.last_hidden_state = self.encoded.last_hidden_state[rows]

    def _decode(self, tokens: Tensor) -> Tensor:
        if self.head is not None:
            # The decoder alone, up to the states that the head reads.
            output = self.inner(
                input_ids=tokens,
                encoder_hidden_states=self.encoded.last_hidden_state,
                encoder_attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
            )
            states = output.last_hidden_state.to(self.head.weight.dtype) * self.scale
        else:
            # The whole model, with its own head.
            output = self.model(
                encoder_outputs=self.encoded,
                attention_mask=self.mask,
                decoder_input_ids=tokens,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
            )
            states = output.logits
        self.cache = getattr(output, "past_key_values", None)
        return states


class GroupedDecoder(Decoder):
    """Decodes prompts in groups of equal length, without padding: for models whose logits padding changes.

    Args:
        kind: makes the decoder of a group.
        model, head, prompts, mask: the arguments of ``kind``, for all prompts.
    """

    def __init__(
        self, kind: Callable[..., Decoder], model: Any, head: Head | None, prompts: Tensor, mask: Tensor
    ) -> None:
        super().__init__(model, head)
        lengths = mask.sum(1)
        self.groups = []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            group = prompts[rows][mask[rows]].view(len(rows), length)
            self.groups.append((rows, kind(model, head, group, torch.ones_like(group, dtype=torch.bool))))

    def __call__(self, tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        parts = [decoder(tokens[rows], parents[rows], level) for rows, decoder in self.groups]
        # Back from the groups to the order of the prompts.
        order = torch.cat([rows for rows, _ in self.groups]).argsort()
        return torch.cat(parts)[order]


def _rows(parents: Tensor, width: int) -> Tensor:
    """The row numbers ``[B * W]`` of beams ``parents [B, W]``, in a batch with ``width`` rows per query."""
    first_rows = torch.arange(0, len(parents) * width, width, device=parents.device)
    return (first_rows[:, None] + parents).view(-1)
