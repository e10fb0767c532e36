"""Tests by running a model whether what it allows for a few tokens also holds for long prompts and packed rows.

A model's window may go by many names and count in different units: columns of a mask, chunks of positions, the best
keys of an index, a rope that changes. All of them have one effect: far tokens matter more or less than in a plain
forward. The probes measure that effect, so they need not know the setting.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext.integrations.base_model import base_model, decoder_start, forward_parameters
from raddpo_ext.integrations.decoders import Decoder
from raddpo_ext.integrations.probes import Ways, attempt, probe_tokens, ratio, size, tolerance
from raddpo_ext.logps.head import Head

PADDING = 3  # columns
FAR_OFF = 0.1  # tolerated change of the far tokens' effect, relative; a window removes a layer's whole part of it
_FEWEST = 64  # tokens; one probe of this length covers all shorter prompts


class ProvenLengths:
    """For each way to run a model: the longest length that a probe has shown right, and the shortest shown wrong."""

    def __init__(self) -> None:
        self._right: dict[Hashable, int] = {}
        self._wrong: dict[Hashable, int] = {}

    def longest(self, way: Hashable) -> int:
        """The longest length at which a way has been shown right; 0 for none."""
        return self._right.get(way, 0)

    def cover(self, way: Hashable, length: int, limit: int, is_right: Callable[[int], bool]) -> bool:
        """Whether a way is right at a length. A way that is right at one length is right at all shorter ones.

        The next power of two is tried first, so that growing lengths need few probes.

        Args:
            way: the way to run the model.
            length: in tokens.
            limit: the maximum length to try, unless ``length`` is longer.
            is_right: tries one length. If it raises an exception at ``length``, that exception is raised.
        """
        if length <= self.longest(way):
            return True
        ahead = min(max(_FEWEST, 1 << (length - 1).bit_length()), max(limit, length))
        for tried in (ahead, length):
            if tried >= self._wrong.get(way, tried + 1):
                continue
            try:
                holds = is_right(tried)
            except Exception:
                if tried == length:
                    raise
                continue  # a longer length than asked for may not fit in memory
            if holds:
                self._right[way] = tried
                return True
            self._wrong[way] = tried
        return False


@torch.no_grad()
def holds_at(
    model: Any,
    ways: Ways,
    shared: Callable[..., Decoder],
    head: Head | None,
    tokens: int,
    widths: list[int],
    padding: int = 0,
) -> bool:
    """Whether a way to search gives the model's own logits after a prompt of this many tokens.

    It costs about six such prompts: two prompts without a cache, two in the slow way, and two in this way.

    Args:
        model: the model, with the user's wrappers.
        ways: the way to test: shared, padded, or neither (the slow way).
        shared: makes the decoder whose beams share their prompt.
        head: see :class:`Decoder`.
        tokens: number of tokens of the prompt.
        widths: number of beams that each step feeds.
        padding: minimum number of padding columns of a shared prompt.
    """
    probe = LongProbe(model, tokens, len(widths), lambda **inputs: model(**inputs).logits)

    def error(kind: Callable[..., Decoder], head: Head | None, **options: Any) -> tuple[float, float]:
        return probe.error(lambda: probe.logits(kind, head, widths, **options))

    slow = not (ways.shared or ways.padded)
    # Nothing can be compared with logits that are not finite: only the slow way may be used.
    if not bool(probe.expected.isfinite().all()):
        return slow
    # The slow way first: it shows how much the cache alone changes.
    limits = tolerance(model)
    alone, noise = error(ways._replace(padded=False).kind(model), None, narrow=True)
    if slow or alone > limits.wrong:
        return alone <= limits.wrong
    if ways.shared:
        wrong, far = error(shared, head, padding=padding)
    else:
        wrong, far = error(ways.kind(model), head, narrow=True, padding=PADDING)
    return wrong <= max(limits.rounding, 4 * alone) and far <= max(FAR_OFF, 8 * noise)


class LongProbe:
    """Two versions of a long prompt, and the outputs of plain forwards over them.

    The far half of the prompt repeats one token; the second version repeats another one. The difference between the
    versions' outputs is the effect of the far tokens.

    Args:
        model: the model, with the user's wrappers.
        tokens: number of tokens of the prompt.
        levels: number of tokens after the prompt. Their outputs are compared, and that of the prompt's last token.
        outputs: runs a plain forward; returns ``[2, T, H]``.
    """

    def __init__(self, model: Any, tokens: int, levels: int, outputs: Callable[..., Tensor]) -> None:
        self.model = model
        self.base = base_model(model)
        self.levels = levels
        ids = torch.tensor(probe_tokens(model, 16), device=self.base.device)
        places = torch.arange(tokens, device=ids.device)
        near = ids[2 + places % 14]
        self.prompts = torch.stack([torch.where(places < tokens // 2, token, near) for token in ids[:2]])
        self.path = ids[2 + torch.arange(levels + 2, device=ids.device) % 14]
        self.outputs = outputs
        plain = self.plain()
        self.spread = size(plain - plain.roll(1, 1))
        self.expected = self.counted(plain)

    def counted(self, plain: Tensor) -> Tensor:
        """The plain outputs that correspond to the outputs of a way."""
        begin = 0 if self.base.config.is_encoder_decoder else plain.shape[1] - self.levels - 1
        return plain[:, begin : begin + self.levels + 1]

    def plain(self, padding: int = 0) -> Tensor:
        """The outputs of a forward without a cache, with two more tokens than the search has.

        The two extra outputs make sure that there are several to measure the spread of.

        Args:
            padding: number of masked padding columns to add on the right.
        """
        path = self.path.expand(2, -1)
        is_encoder_decoder = self.base.config.is_encoder_decoder
        tokens = self.prompts if is_encoder_decoder else torch.cat((self.prompts, path[:, : self.levels]), 1)
        inputs: dict[str, Any] = {"input_ids": F.pad(tokens, (0, padding)), "use_cache": False}
        if padding:
            inputs["attention_mask"] = F.pad(torch.ones_like(tokens), (0, padding))
        if is_encoder_decoder:
            start = torch.full_like(path[:, :1], decoder_start(self.base))
            return self.outputs(**inputs, decoder_input_ids=torch.cat((start, path), 1)).float()
        kept = self.levels + 3
        if "logits_to_keep" in forward_parameters(self.model):
            inputs["logits_to_keep"] = kept + padding
        rows = self.outputs(**inputs)
        return rows[:, : rows.shape[1] - padding][:, -kept:].float()

    def error(self, run: Callable[[], Tensor]) -> tuple[float, float]:
        """Compare a way with the plain forward.

        Returns:
            The difference of the outputs, relative to the spread of the plain ones; and the difference of the far
            tokens' effect, relative to their effect on the plain outputs. Both are infinite if ``run`` fails.
        """
        outputs = attempt(run)
        if outputs is None or outputs.shape != self.expected.shape:
            return float("inf"), float("inf")
        # A softmax ignores a constant that is added to all logits.
        difference, far = outputs - self.expected, self.expected[1] - self.expected[0]
        difference, far = (x - x.mean(-1, keepdim=True) for x in (difference, far))
        least = tolerance(self.base).rounding * self.spread  # keeps far tokens without any effect from dividing by 0
        return ratio(size(difference), self.spread), ratio(size(difference[1] - difference[0]), size(far) + least)

    def logits(
        self,
        kind: Callable[..., Decoder],
        head: Head | None,
        widths: list[int],
        *,
        narrow: bool = False,
        padding: int = 0,
    ) -> Tensor:
        """The logits of the prompt's last token, and of the last beam of each step: ``[2, 1 + len(widths), V]``.

        Args:
            kind: makes the decoder.
            head: see :class:`Decoder`.
            widths: number of beams that each step feeds.
            narrow: feed at most three beams per step; for decoders that use one row per beam.
            padding: number of padding columns to add.
        """
        # Encoders are padded on the right, decoders on the left.
        place = (0, padding) if self.base.config.is_encoder_decoder else (padding, 0)
        mask = F.pad(torch.ones_like(self.prompts, dtype=torch.bool), place)
        decoder = kind(self.model, head, F.pad(self.prompts, place), mask)
        tokens = parents = torch.zeros_like(self.prompts[:, :1])
        rows = [decoder(tokens - 1, parents, 0)]
        for level, width in enumerate(widths):
            last = tokens.shape[1] - 1
            # The last beam continues the last beam of the step before; the others are there to take up slots.
            tokens = self.path[level].expand(2, min(width, 3) if narrow else width).contiguous()
            parents = torch.zeros_like(tokens)
            parents[:, -1] = last
            rows.append(decoder(tokens, parents, level + 1)[:, -1:])
        outputs = torch.cat(rows, 1)
        return outputs.float() if head is None else head.logits(outputs.to(head.weight.dtype))
