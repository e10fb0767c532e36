"""Finds out what a model allows: runs a few tokens in each way, and compares with plain forwards without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raddpo_ext.integrations.base_model import (
    base_model,
    decoder_start,
    expert_capacities,
    forward_parameters,
)
from raddpo_ext.integrations.decoders import (
    Decoder,
    EncoderDecoder,
    GroupedDecoder,
    ReorderedDecoder,
    SharedPrefixDecoder,
    pad_left,
    pad_right,
)
from raddpo_ext.logps.head import Head

PROBE_BEAMS = 6  # beams that a probe feeds per prompt, over all steps
_MASKED_ATTENTIONS = ("eager", "sdpa", "flex_attention")  # other attentions take no custom mask


class Ways(NamedTuple):
    """The ways in which a search may run a model.

    Attributes:
        head: the head may run separately from the model.
        shared: the beams of a query may share their prompt's keys and values.
        padded: prompts of different lengths may be padded to one batch.
        positions: position ids are passed to the model.
    """

    head: bool
    shared: bool
    padded: bool
    positions: bool

    def kind(self, model: Any) -> Callable[..., Decoder]:
        """The decoder with one KV-cache row per beam; it groups prompts by length if padding is not allowed."""
        if base_model(model).config.is_encoder_decoder:
            kind: Callable[..., Decoder] = EncoderDecoder
        else:
            kind = partial(ReorderedDecoder, positions=self.positions)
        return kind if self.padded else partial(GroupedDecoder, kind)


class Tolerance(NamedTuple):
    """Tolerated differences of results that should be equal, relative to the effect of another token.

    Attributes:
        rounding: for the same values computed by other kernels.
        leak: for the same computation after a change of something that must not matter.
        wrong: a larger difference than this cannot be rounding.
    """

    rounding: float
    leak: float
    wrong: float


def tolerance(model: Any) -> Tolerance:
    """The tolerance for the precision that a model computes in."""
    device = model.device.type
    exact = model.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device)
    exact = exact and not (device == "cuda" and torch.backends.cuda.matmul.allow_tf32)
    return Tolerance(1e-4, 1e-5, 1e-3) if exact else Tolerance(0.02, 1e-5, 0.3)


def has_experts(model: Any) -> bool:
    """Whether a model has experts. Their rounding depends on how many tokens of the batch they get."""
    config = base_model(model).config.get_text_config(decoder=True).to_dict()
    return any("expert" in name and type(value) is int and value > 1 for name, value in config.items())


def probe_tokens(model: Any, count: int) -> list[int]:
    """``count`` tokens of a model's vocabulary that are not special; distinct if the vocabulary is large enough."""
    config = base_model(model).config.get_text_config(decoder=True)
    special = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        token = getattr(config, name, None)
        special |= set(token) if isinstance(token, list | tuple) else {token}
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(config.vocab_size, generator=generator).tolist()
    tokens = [token for token in order[: count + 8] if token not in special] or order
    return [tokens[i % len(tokens)] for i in range(count)]


def size(difference: Tensor) -> float:
    """The root mean square; inf for NaN. A leak changes many numbers; rounding may change a few numbers much."""
    value = float(difference.float().square().mean().sqrt())
    return value if value == value else float("inf")


class _Probe:
    """Two prompts of unequal length, padded as the retriever pads, each with three beams over two steps.

    Attributes:
        expected: the logits of plain forwards, see :meth:`plain`.
        spread: how much these logits differ between beams.
        ahead: how much the logits of a position change with later tokens; 0 for a causal model.
    """

    lengths = (6, 3)
    parents = torch.tensor([[[0, 0, 0], [0, 0, 0]], [[2, 0, 1], [1, 1, 2]]])

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base = base_model(model)
        tokens = torch.tensor(probe_tokens(model, 24), device=self.base.device)
        mask = torch.tensor([[i >= 6 - n for i in range(6)] for n in self.lengths], device=tokens.device)
        pad = pad_right if self.base.config.is_encoder_decoder else pad_left
        self.prompts, self.mask = pad(tokens[:12].view(2, 6), mask)
        self.steps = tokens[12:].view(2, 2, 3)
        others = tokens.roll(5)  # a different token in every place
        self.other_prompts, self.other_steps = others[:12].view(2, 6), others[12:].view(2, 2, 3)
        self.expected = self.plain()
        self.spread = size(self.expected[:, 1:] - self.expected[:, 1:].roll(1, 1))

    def plain(self) -> Tensor:
        """The logits of forwards without a cache, one prompt at a time: ``[2, 7, V]``."""
        rows, self.ahead = [], 0.0
        for query in range(2):
            prompt = self.prompts[query][self.mask[query]].expand(3, -1)
            first, second = self.steps[0, query, :, None], self.steps[1, query, :, None]
            # The second step's beams continue from their parents' tokens.
            one = self._forward(prompt, first)
            two = self._forward(prompt, torch.cat((first[self.parents[1, query]], second), 1))
            self.ahead = max(self.ahead, size(two[:, -2] - one[self.parents[1, query], -1]))
            rows.append(torch.cat((one[:1, -2], one[:, -1], two[:, -1])))
        return torch.stack(rows)

    def _forward(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        if self.base.config.is_encoder_decoder:
            start = torch.full_like(tokens[:, :1], decoder_start(self.base))
            tokens = torch.cat((start, tokens), 1)
            logits = self.model(input_ids=prompt, decoder_input_ids=tokens, use_cache=False).logits
        else:
            logits = self.model(input_ids=torch.cat((prompt, tokens), 1), use_cache=False).logits
        return logits.float()

    def outputs(
        self,
        kind: Callable[..., Decoder],
        head: Head | None,
        prompts: Tensor | None = None,
        steps: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The states or logits of a decoder: of the prompts, then of each step's beams, ``[2, 7, H or V]``.

        Args:
            kind: makes the decoder.
            head: see :class:`Decoder`.
            prompts, steps, mask: to use instead of the probe's.
        """
        mask = self.mask if mask is None else mask
        prompts = self.prompts.masked_fill(~mask, 0) if prompts is None else prompts
        steps = self.steps if steps is None else steps
        parents = self.parents.to(prompts.device)
        decoder = kind(self.model, head, prompts, mask)
        rows = [decoder(torch.full_like(steps[0, :, :1], -1), parents[0, :, :1], 0)]
        rows += [decoder(steps[level - 1], parents[level - 1], level) for level in (1, 2)]
        return torch.cat(rows, 1).float()

    def paths(self, mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Changed prompts and steps, each with one unchanged path, and the outputs of that path: bool ``[2, 7]``.

        A path is a prompt, a beam of the last step and this beam's parent. All other tokens are changed: those of its
        siblings and other beams, of the other query, and of the padding. Every slot of a step is on some path.
        """
        for query, last in ((0, 0), (0, 1), (0, 2), (1, 1)):
            prompts, steps = self.other_prompts.clone(), self.other_steps.clone()
            prompts[query] = torch.where(mask[query], self.prompts[query], prompts[query])
            first = int(self.parents[1, query, last])
            for level, beam in ((0, first), (1, last)):
                steps[level, query, beam] = self.steps[level, query, beam]
            kept = torch.zeros(2, 7, dtype=torch.bool, device=steps.device)
            for output in (0, 1 + first, 4 + last):
                kept[query, output] = True
            yield prompts, steps, kept

    def error(self, outputs: Tensor | None, head: Head | None) -> float:
        """The difference of a way's logits from the plain ones, relative to their spread; infinite if it failed."""
        if outputs is None:
            return float("inf")
        logits = outputs if head is None else head.logits(outputs.to(head.weight.dtype))
        if logits.shape != self.expected.shape:
            return float("inf")
        # A softmax ignores a constant that is added to all logits.
        difference = logits - self.expected
        return ratio(size(difference - difference.mean(-1, keepdim=True)), self.spread)

    def allows(self, kind: Callable[..., Decoder], head: Head | None, limit: float) -> bool:
        """Whether a way gives the plain logits up to ``limit``, and lets nothing leak."""
        outputs = attempt(lambda: self.outputs(kind, head))
        if outputs is None or self.error(outputs, head) > limit:
            return False
        return attempt(lambda: self.mixes(kind, head, outputs, self.mask)) is False

    def mixes(
        self, kind: Callable[..., Decoder], head: Head | None, before: Tensor, mask: Tensor, least: float = 0.0
    ) -> bool:
        """Whether outputs depend on another beam, the other query or the padding by more than ``least``.

        See :func:`leaked`. ``before``: the outputs with this ``mask``.
        """
        # Some kernels sum in any order, so repeating the same computation shows the differences that are not leaks.
        noise = size(self.outputs(kind, head, mask=mask) - before)
        if has_experts(self.base):
            # Experts round by how many tokens they get: change the other query only.
            prompts, steps = self.prompts.clone(), self.steps.clone()
            prompts[1], steps[:, 1] = self.other_prompts[1], self.other_steps[:, 1]
            noise = max(noise, size((self.outputs(kind, head, prompts, steps, mask) - before)[0]))
        changes = [
            (self.outputs(kind, head, prompts, steps, mask) - before, kept) for prompts, steps, kept in self.paths(mask)
        ]
        return any(leaked(self.base, change[kept], change[~kept], noise, least) for change, kept in changes)


def leaked(model: Any, others: Tensor, own: Tensor, noise: float, least: float = 0.0) -> bool:
    """Whether a change of tokens changed states that must not depend on them.

    It is measured relative to the change of the states that do depend on them. A leak that is faint only because the
    weights are small therefore counts like any other.

    Args:
        model: its precision sets the tolerance.
        others: changes of the states that must not depend on the tokens, ``[N, H]``.
        own: changes of the states that depend on the tokens, ``[M, H]``.
        noise: the size of changes without a leak. If it exceeds rounding, the result is True.
        least: smaller relative changes than this are not a leak.
    """
    limits = tolerance(model)
    noise = ratio(noise, size(own))
    worst = ratio(max(size(row) for row in others), size(own))
    return noise > limits.rounding or not worst <= max(least, limits.leak, min(8 * noise, limits.rounding))


def ratio(part: float, whole: float) -> float:
    """``part / whole``; infinite if ``whole`` is 0, because nothing was measured then."""
    return part / whole if whole > 0 else float("inf")


def attempt(run: Callable[[], Any]) -> Any:
    """``run()``, or None if it fails: a model that cannot do something may raise any exception."""
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


@torch.no_grad()
def rows_compete(model: Any) -> bool:
    """Whether experts with a capacity drop tokens of one row in favour of another row. Two equal rows then differ."""
    base = base_model(model)
    capacities = expert_capacities(base)
    if not capacities:
        return False
    # Long enough to exceed a capacity that counts tokens.
    columns = min(1024, max(8, *(int(value) for value in capacities.values())))
    tokens = torch.full((2, columns), probe_tokens(model, 1)[0], device=base.device)
    decoder = {"decoder_input_ids": tokens} if base.config.is_encoder_decoder else {}
    logits = base(input_ids=tokens, use_cache=False, **decoder).logits.float()
    return not bool(torch.allclose(logits[0], logits[1], rtol=1e-4, atol=tolerance(base).leak))


@torch.no_grad()
def verify(model: Any, head: Head | None, shared: Callable[..., Decoder] = SharedPrefixDecoder) -> Ways:
    """Find out in which ways a model gives its own logits.

    Some models ignore a mask or position ids, or count the columns of a batch, and some change the head's output in an
    unknown way. Each of them would silently give wrong scores. A model whose logits are not finite is run in the slow
    way: prompts grouped by length, one KV-cache row per beam, its own head.

    Raises:
        TypeError: the model gives its own logits in no way.
    """
    # Plain forwards: the logits that every way must give.
    base = base_model(model)
    name = type(base).__name__
    try:
        probe = _Probe(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise TypeError(f"model must take input_ids and give logits, {name} fails: {error}") from error
    if rows_compete(model):
        settings = ", ".join(f"{name} = {value}" for name, value in expert_capacities(base).items())
        raise TypeError(
            f"model must compute each row of a batch independently: the experts of {name} drop tokens of one row for "
            f"those of another ({settings})"
        )
    takes_positions = not base.config.is_encoder_decoder and "position_ids" in forward_parameters(model)
    if not bool(probe.expected.isfinite().all()):
        return Ways(False, False, False, True)  # nothing can be compared with such logits
    # The slow way, with position ids or without. It also shows how much the cache alone changes.
    limits = tolerance(base)
    for positions in (True, False) if takes_positions else (True,):
        ways = Ways(False, False, False, positions)
        alone = probe.error(attempt(partial(probe.outputs, ways.kind(model), None)), None)
        if alone <= limits.wrong:
            break
    else:
        # Neither works: name the reason.
        if probe.ahead > limits.wrong * probe.spread:
            raise TypeError(f"model must be causal: later tokens change the logits of {name}")
        what = "model must give the same logits with a KV cache, reordered from step to step, as without"
        try:
            probe.outputs(ways.kind(model), None)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise TypeError(f"{what}: {name} fails: {error}") from error
        raise TypeError(f"{what}: {name} does not")
    # There is no slower way, so only dependence on other rows beyond rounding is refused. Two prompts of one length
    # are one group: their rows are in one batch.
    whole = torch.ones_like(probe.mask)
    if probe.mixes(ways.kind(model), None, probe.outputs(ways.kind(model), None, mask=whole), whole, limits.rounding):
        raise TypeError(f"model must compute each row of a batch independently: logits of {name} depend on other rows")
    # The faster ways, each on top of those before: padding, a separate head, a shared prompt.
    limit = max(limits.rounding, 4 * alone)
    padded = ways._replace(padded=True)
    if probe.allows(padded.kind(model), None, limit):
        ways = padded
    if head is not None and probe.error(attempt(lambda: probe.outputs(ways.kind(model), head)), head) <= limit:
        ways = ways._replace(head=True)
    head = head if ways.head else None
    if base.config.is_encoder_decoder or base.config._attn_implementation not in _MASKED_ATTENTIONS:
        return ways
    if "position_ids" not in (attempt(lambda: forward_parameters(Decoder(model, head).inner)) or ()):
        return ways
    return ways._replace(shared=probe.allows(shared, head, limit))
