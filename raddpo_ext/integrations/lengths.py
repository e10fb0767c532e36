"""Whether what a model allows with a few tokens holds for as many as a search or a packed row has, shown on the model.

Windows have many names and count in many units: a mask of the columns, a chunk of the positions, the best keys of an
index, a rope that changes. What all have in common is that far tokens count otherwise than in a plain forward.
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
FAR_OFF = 0.1  # of what the far tokens do: a window takes a layer's whole part of it away
_FEWEST = 64  # tokens: shorter prompts are probed once for all


class ProvenLengths:
    """Up to which length each way has been shown right, and from which on wrong."""

    def __init__(self) -> None:
        self._right: dict[Hashable, int] = {}
        self._wrong: dict[Hashable, int] = {}

    def longest(self, way: Hashable) -> int:
        """Up to which length a way has been shown right."""
        return self._right.get(way, 0)

    def cover(self, way: Hashable, length: int, limit: int, is_right: Callable[[int], bool]) -> bool:
        """Whether a way is right at a length. What is right at one is so at all shorter ones, so few are tried.

        Args:
            way: what is asked for.
            length: in tokens.
            limit: no longer ones are tried.
            is_right: tries one. Its error counts at the length itself alone.
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
                continue  # no room for so many, which are not asked for
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
    probe = LongProbe(model, tokens, len(widths), lambda **inputs: model(**inputs).logits)

    def error(kind: Callable[..., Decoder], head: Head | None, **options: Any) -> tuple[float, float]:
        return probe.error(lambda: probe.logits(kind, head, widths, **options))

    slow = not (ways.shared or ways.padded)
    if not bool(probe.expected.isfinite().all()):
        return slow
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
    """A prompt twice: its far half is one token over and over, and the second time another.

    Args:
        model: as the user gave it.
        tokens: of the prompt.
        levels: tokens after it, whose outputs count as the prompt's last one does.
        outputs: of a plain forward, ``[2, T, H]``.
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
        """Of plain outputs those that a way's are held against."""
        begin = 0 if self.base.config.is_encoder_decoder else plain.shape[1] - self.levels - 1
        return plain[:, begin : begin + self.levels + 1]

    def plain(self, padding: int = 0) -> Tensor:
        """Without a cache, and of two more tokens than the search has, so that there is a spread.

        Args:
            padding: columns of it, on the right, behind a mask.
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
        """How far a way's outputs are from the plain ones, relative to their spread; and how far what the far tokens do
        to them is from what they do to the plain ones, relative to this. Infinite where it fails."""
        outputs = attempt(run)
        if outputs is None or outputs.shape != self.expected.shape:
            return float("inf"), float("inf")
        # A softmax does not see what is added to all logits.
        difference, far = outputs - self.expected, self.expected[1] - self.expected[0]
        difference, far = (x - x.mean(-1, keepdim=True) for x in (difference, far))
        least = tolerance(self.base).rounding * self.spread  # beyond a window they do nothing at all
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
        """Of the prompt's last token, and of the last beam of each step: ``[2, levels, V]``.

        Args:
            kind: of decoder.
            head: see :class:`Decoder`.
            widths: how many beams' tokens each step feeds.
            narrow: feed a few beams instead of all: each has a row of its own.
            padding: columns of it.
        """
        place = (0, padding) if self.base.config.is_encoder_decoder else (padding, 0)
        mask = F.pad(torch.ones_like(self.prompts, dtype=torch.bool), place)
        decoder = kind(self.model, head, F.pad(self.prompts, place), mask)
        tokens = parents = torch.zeros_like(self.prompts[:, :1])
        rows = [decoder(tokens - 1, parents, 0)]
        for level, width in enumerate(widths):
            last = tokens.shape[1] - 1
            tokens = self.path[level].expand(2, min(width, 3) if narrow else width).contiguous()
            parents = torch.zeros_like(tokens)
            parents[:, -1] = last
            rows.append(decoder(tokens, parents, level + 1)[:, -1:])
        outputs = torch.cat(rows, 1)
        return outputs.float() if head is None else head.logits(outputs.to(head.weight.dtype))
