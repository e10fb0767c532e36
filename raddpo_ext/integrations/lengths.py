"""Whether what a model allows with a few tokens holds for as many as a search has, shown on the model itself.

Windows have many names and count in many units: a mask of the columns, a chunk of the positions, the best keys of an
index, a rope that changes. What all have in common is that far tokens count otherwise than in a plain forward.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext.integrations.base_model import base_model, decoder_start, forward_parameters, head_logits
from raddpo_ext.integrations.decoders import Decoder
from raddpo_ext.integrations.probes import Ways, attempt, probe_tokens, ratio, size, tolerance

_PADDING = 3  # columns
_FAR_OFF = 0.1  # of what the far tokens do: a window takes a layer's whole part of it away
_FEWEST = 64  # tokens: shorter prompts are probed once for all


class ProvenLengths:
    """Up to which length each way has been shown right, and from which on wrong."""

    def __init__(self) -> None:
        self._right: dict[Hashable, int] = {}
        self._wrong: dict[Hashable, int] = {}

    def cover(self, way: Hashable, length: int, limit: int, is_right: Callable[[int], bool]) -> bool:
        """Whether a way is right at a length. What is right at one is so at all shorter ones, so few are tried.

        Args:
            way: what is asked for.
            length: in tokens.
            limit: no longer ones are tried.
            is_right: tries one.
        """
        if length <= self._right.get(way, 0):
            return True
        ahead = min(max(_FEWEST, 1 << (length - 1).bit_length()), max(limit, length))
        for tried in (ahead, length):
            if tried >= self._wrong.get(way, tried + 1):
                continue
            if is_right(tried):
                self._right[way] = tried
                return True
            self._wrong[way] = tried
        return False


@torch.no_grad()
def holds_at(
    model: Any,
    ways: Ways,
    shared: Callable[..., Decoder],
    head: dict[str, Any],
    tokens: int,
    widths: list[int],
    padding: int = 0,
) -> bool:
    """Whether a way gives the model's own logits after a prompt of so many tokens.

    It costs about what six such prompts cost: twice each without a cache, in the slow way, and in this one.

    Args:
        model: as the user gave it.
        ways: what is asked for: shared, padded, or neither.
        shared: how beams share their prompt.
        head: see :class:`Decoder`.
        tokens: of the prompt.
        widths: how many beams' tokens each step feeds.
        padding: columns of it that a shared prompt has at least.
    """
    probe = _LongProbe(model, tokens, widths)
    slow = not (ways.shared or ways.padded)
    if not bool(probe.expected.isfinite().all()):
        return slow
    limits = tolerance(model)
    alone, noise = probe.error(ways._replace(padded=False).kind(model), {}, narrow=True)
    if slow or alone > limits.wrong:
        return alone <= limits.wrong
    if ways.shared:
        error, far = probe.error(shared, head, padding=padding)
    else:
        error, far = probe.error(ways.kind(model), head, narrow=True, padding=_PADDING)
    return error <= max(limits.rounding, 4 * alone) and far <= max(_FAR_OFF, 8 * noise)


class _LongProbe:
    """A prompt twice: its far half is one token over and over, and the second time another."""

    def __init__(self, model: Any, tokens: int, widths: list[int]) -> None:
        self.model = model
        self.base = base_model(model)
        self.widths = widths
        ids = torch.tensor(probe_tokens(model, 16), device=self.base.device)
        places = torch.arange(tokens, device=ids.device)
        near = ids[2 + places % 14]
        self.prompts = torch.stack([torch.where(places < tokens // 2, token, near) for token in ids[:2]])
        self.path = ids[2 + torch.arange(len(widths) + 2, device=ids.device) % 14]
        logits = self._plain()
        self.spread = size(logits - logits.roll(1, 1))
        begin = 0 if self.base.config.is_encoder_decoder else logits.shape[1] - len(widths) - 1
        self.expected = logits[:, begin : begin + len(widths) + 1]

    def _plain(self) -> Tensor:
        """Without a cache, and of two more tokens than the search has, so that there is a spread."""
        steps, path = len(self.widths), self.path.expand(2, -1)
        if self.base.config.is_encoder_decoder:
            start = torch.full_like(self.prompts[:, :1], decoder_start(self.base))
            return self.model(
                input_ids=self.prompts, decoder_input_ids=torch.cat((start, path), 1), use_cache=False
            ).logits.float()
        keep = {"logits_to_keep": steps + 3} if "logits_to_keep" in forward_parameters(self.model) else {}
        tokens = torch.cat((self.prompts, path[:, :steps]), 1)
        return self.model(input_ids=tokens, use_cache=False, **keep).logits[:, -steps - 3 :].float()

    def error(
        self, kind: Callable[..., Decoder], head: dict[str, Any], *, narrow: bool = False, padding: int = 0
    ) -> tuple[float, float]:
        """How far a way's logits are from the plain ones, relative to their spread; and how far what the far tokens do
        to them is from what they do to the plain ones, relative to this. Infinite where it fails.

        Args:
            kind: of decoder.
            head: see :class:`Decoder`.
            narrow: feed a few beams instead of all: each has a row of its own.
            padding: columns of it.
        """
        logits = attempt(lambda: self._logits(kind, head, narrow, padding))
        if logits is None or logits.shape != self.expected.shape:
            return float("inf"), float("inf")
        # A softmax does not see what is added to all logits.
        difference, far = logits - self.expected, self.expected[1] - self.expected[0]
        difference, far = (x - x.mean(-1, keepdim=True) for x in (difference, far))
        least = tolerance(self.base).rounding * self.spread  # beyond a window they do nothing at all
        return ratio(size(difference), self.spread), ratio(size(difference[1] - difference[0]), size(far) + least)

    def _logits(self, kind: Callable[..., Decoder], head: dict[str, Any], narrow: bool, padding: int) -> Tensor:
        """Of the prompt's last token, and of the last beam of each step: ``[2, levels, V]``."""
        place = (0, padding) if self.base.config.is_encoder_decoder else (padding, 0)
        mask = F.pad(torch.ones_like(self.prompts, dtype=torch.bool), place)
        decoder = kind(self.model, head, F.pad(self.prompts, place), mask)
        tokens = parents = torch.zeros_like(self.prompts[:, :1])
        rows = [decoder(tokens - 1, parents, 0)]
        for level, width in enumerate(self.widths):
            last = tokens.shape[1] - 1
            tokens = self.path[level].expand(2, min(width, 3) if narrow else width).contiguous()
            parents = torch.zeros_like(tokens)
            parents[:, -1] = last
            rows.append(decoder(tokens, parents, level + 1)[:, -1:])
        outputs = torch.cat(rows, 1)
        return head_logits(outputs.to(head["weight"].dtype), **head) if head else outputs.float()
