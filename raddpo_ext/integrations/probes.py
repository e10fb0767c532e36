"""What a model allows: a few tokens run through it in each way, against plain forwards without a cache."""

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

PROBE_BEAMS = 6  # tokens that a probe feeds for each prompt
_MASKED_ATTENTIONS = ("eager", "sdpa", "flex_attention")  # the others take no mask of their own


class Ways(NamedTuple):
    """How a model may be searched with.

    Attributes:
        head: its head may be run apart from it.
        shared: the beams of a query may share their prompt's keys and values.
        padded: prompts of several lengths may be padded to one batch.
        positions: it is told the tokens' positions.
    """

    head: bool
    shared: bool
    padded: bool
    positions: bool

    def kind(self, model: Any) -> Callable[..., Decoder]:
        """A row of the cache a beam, in the way that gives the model's own scores."""
        if base_model(model).config.is_encoder_decoder:
            kind: Callable[..., Decoder] = EncoderDecoder
        else:
            kind = partial(ReorderedDecoder, positions=self.positions)
        return kind if self.padded else partial(GroupedDecoder, kind)


class Tolerance(NamedTuple):
    """How far two results that should be equal may be apart, relative to what another token changes.

    Attributes:
        rounding: where the same values go through other kernels.
        leak: where the very same computation is repeated, and something that must not matter was changed.
        wrong: by more than this a result is not a rounded one.
    """

    rounding: float
    leak: float
    wrong: float


def tolerance(model: Any) -> Tolerance:
    """By the precision that a model computes in."""
    device = model.device.type
    exact = model.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device)
    exact = exact and not (device == "cuda" and torch.backends.cuda.matmul.allow_tf32)
    return Tolerance(1e-4, 1e-5, 1e-3) if exact else Tolerance(0.02, 1e-5, 0.3)


def has_experts(model: Any) -> bool:
    """Whether a model sorts its tokens by experts, which then round by how many they are given."""
    config = base_model(model).config.get_text_config(decoder=True).to_dict()
    return any("expert" in name and type(value) is int and value > 1 for name, value in config.items())


def probe_tokens(model: Any, count: int) -> list[int]:
    """Ordinary tokens of a model's vocabulary: each another, while there are enough of them."""
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
    """The root of the mean square: a leak changes many numbers, and rounding that tips over a few."""
    value = float(difference.float().square().mean().sqrt())
    return value if value == value else float("inf")


class _Probe:
    """Two prompts of unequal length, padded as the retriever does, and three beams of each over two steps.

    Attributes:
        spread: how much the model's logits differ between beams.
        ahead: how much they change with the token that follows.
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
        others = tokens.roll(5)  # another token in every place
        self.other_prompts, self.other_steps = others[:12].view(2, 6), others[12:].view(2, 2, 3)
        self.expected = self.plain()
        self.spread = size(self.expected[:, 1:] - self.expected[:, 1:].roll(1, 1))

    def plain(self) -> Tensor:
        """The logits of a forward without a cache, each prompt alone: ``[2, 7, V]``."""
        rows, self.ahead = [], 0.0
        for query in range(2):
            prompt = self.prompts[query][self.mask[query]].expand(3, -1)
            first, second = self.steps[0, query, :, None], self.steps[1, query, :, None]
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
    ) -> Tensor:
        """States, or logits, of every step: ``[2, 7, H or V]``: of the prompts, and of each step's beams.

        Args:
            kind: of decoder.
            head: see :class:`Decoder`.
            prompts, steps: in place of the probe's.
        """
        prompts = self.prompts.masked_fill(~self.mask, 0) if prompts is None else prompts
        steps = self.steps if steps is None else steps
        parents = self.parents.to(prompts.device)
        decoder = kind(self.model, head, prompts, self.mask)
        rows = [decoder(torch.full_like(steps[0, :, :1], -1), parents[0, :, :1], 0)]
        rows += [decoder(steps[level - 1], parents[level - 1], level) for level in (1, 2)]
        return torch.cat(rows, 1).float()

    def paths(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Prompts and steps where only one path is as it was, and which outputs are its own: bool ``[2, 7]``.

        The path is a prompt and a last beam with its parent. All other beams, those of its siblings too, the other
        query, and what is under the padding are other tokens. Every slot of a step is on some path.
        """
        for query, last in ((0, 0), (0, 1), (0, 2), (1, 1)):
            prompts, steps = self.other_prompts.clone(), self.other_steps.clone()
            prompts[query] = torch.where(self.mask[query], self.prompts[query], prompts[query])
            first = int(self.parents[1, query, last])
            for level, beam in ((0, first), (1, last)):
                steps[level, query, beam] = self.steps[level, query, beam]
            kept = torch.zeros(2, 7, dtype=torch.bool, device=steps.device)
            for output in (0, 1 + first, 4 + last):
                kept[query, output] = True
            yield prompts, steps, kept

    def error(self, kind: Callable[..., Decoder], head: Head | None) -> float:
        """How far a way's logits are from the plain ones, relative to their spread; infinite for one that fails."""
        outputs = attempt(lambda: self.outputs(kind, head))
        if outputs is None:
            return float("inf")
        logits = outputs if head is None else head.logits(outputs.to(head.weight.dtype))
        if logits.shape != self.expected.shape:
            return float("inf")
        # A softmax does not see what is added to all logits.
        difference = logits - self.expected
        return ratio(size(difference - difference.mean(-1, keepdim=True)), self.spread)

    def leaks(self, kind: Callable[..., Decoder], head: Head | None, least: float = 0.0) -> bool:
        """Whether outputs depend on another beam, on the other query, or on what is under the padding, by more than
        ``least``."""
        found = attempt(lambda: self.mixes(kind, head, least))
        return found is None or found

    def mixes(self, kind: Callable[..., Decoder], head: Head | None, least: float) -> bool:
        """:meth:`leaks`, but an error of the model stays one."""
        before = self.outputs(kind, head)
        # The same computation on the same tokens: what it changes is no leak, as a kernel that sums in any order.
        noise = size(self.outputs(kind, head) - before)
        if has_experts(self.base):
            prompts, steps = self.prompts.clone(), self.steps.clone()
            prompts[1], steps[:, 1] = self.other_prompts[1], self.other_steps[:, 1]
            noise = max(noise, size((self.outputs(kind, head, prompts, steps) - before)[0]))
        changes = [(self.outputs(kind, head, *tokens) - before, kept) for *tokens, kept in self.paths()]
        return any(leaked(self.base, change[kept], change[~kept], noise, least) for change, kept in changes)


def leaked(model: Any, others: Tensor, own: Tensor, noise: float, least: float = 0.0) -> bool:
    """Whether changed tokens changed the states of those that must not see them.

    The measure is what they changed in the states that are to see them, so that a leak that is faint only because the
    weights are small is as large as any.

    Args:
        model: whose precision tells what rounding may do.
        others: changes of the states that must stay, ``[N, H]``.
        own: changes of those that must not, ``[M, H]``.
        noise: a change without a leak; more than rounding is none.
        least: a smaller part than this is not called a leak.
    """
    limits = tolerance(model)
    noise = ratio(noise, size(own))
    worst = ratio(max(size(row) for row in others), size(own))
    return noise > limits.rounding or not worst <= max(least, limits.leak, min(8 * noise, limits.rounding))


def ratio(part: float, whole: float) -> float:
    """``part / whole``; infinite where nothing can be told, as ``whole`` is 0."""
    return part / whole if whole > 0 else float("inf")


def attempt(run: Callable[[], Any]) -> Any:
    """``run()``, or None where it fails: a model that cannot do something says so by any error."""
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


@torch.no_grad()
def rows_compete(model: Any) -> bool:
    """Whether experts with a capacity drop tokens of one row for those of another: two equal rows then differ."""
    base = base_model(model)
    capacities = expert_capacities(base)
    if not capacities:
        return False
    columns = min(1024, max(8, *(int(value) for value in capacities.values())))
    tokens = torch.full((2, columns), probe_tokens(model, 1)[0], device=base.device)
    decoder = {"decoder_input_ids": tokens} if base.config.is_encoder_decoder else {}
    logits = base(input_ids=tokens, use_cache=False, **decoder).logits.float()
    return not bool(torch.allclose(logits[0], logits[1], rtol=1e-4, atol=tolerance(base).leak))


@torch.no_grad()
def verify(model: Any, head: Head | None, shared: Callable[..., Decoder] = SharedPrefixDecoder) -> Ways:
    """Finds out in which ways a model gives its own logits.

    Some models look past a mask, at no position ids, or at the columns of a batch, and some do more after the head than
    its arguments say; each would give wrong scores without a sign of it. A model whose logits are not finite takes the
    slow way: each prompt length by itself, a row of the cache per beam, its own head.

    Raises:
        TypeError: it gives them in none.
    """
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
        return Ways(False, False, False, True)  # nothing can be told by such logits: the slow way is the model's own
    limits = tolerance(base)
    for positions in (True, False) if takes_positions else (True,):
        # The slow way first: it tells how much rounding there is.
        ways = Ways(False, False, False, positions)
        alone = probe.error(ways.kind(model), None)
        if alone <= limits.wrong:
            break
    else:
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
    # There is no slower way: one that rounds by its neighbours is its own, one that mixes them has none.
    if probe.mixes(ways.kind(model), None, limits.rounding):
        raise TypeError(f"model must compute each row of a batch independently: logits of {name} depend on other rows")
    limit = max(limits.rounding, 4 * alone)
    padded = ways._replace(padded=True)
    if probe.error(padded.kind(model), None) <= limit and not probe.leaks(padded.kind(model), None):
        ways = padded
    if head is not None and probe.error(ways.kind(model), head) <= limit:
        ways = ways._replace(head=True)
    head = head if ways.head else None
    if base.config.is_encoder_decoder or base.config._attn_implementation not in _MASKED_ATTENTIONS:
        return ways
    if "position_ids" not in (attempt(lambda: forward_parameters(Decoder(model, head).inner)) or ()):
        return ways
    return ways._replace(shared=probe.error(shared, head) <= limit and not probe.leaks(shared, head))
