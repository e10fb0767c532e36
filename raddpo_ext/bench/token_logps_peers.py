"""Token log-probs, forward and backward, by each method that needs only torch.

Each method here is called once with a problem, prepares what it may prepare (not timed), and returns the call to be
timed: it leaves the gradients in the problem's leaves and returns the log-probs, or the loss made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext._matmul import linear
from raddpo_ext.bench.compare import Missing
from raddpo_ext.bench.token_logps_cases import LEVELS, Problem, Step
from raddpo_ext.decoding.row_lse import row_lse
from raddpo_ext.logps.linear_token_logps import linear_token_logps
from raddpo_ext.logps.token_logps import token_logps

Method = Callable[[Problem], Step]


def ours(problem: Problem) -> Step:
    case = problem.case
    if not case.hidden:
        return lambda: problem.backward(token_logps(problem.logits, problem.targets))
    options: dict[str, Any] = {"accumulate_grad": case.accumulate, "logits_budget": case.budget}
    if case.codes:
        options |= {"normalize": "level", "vocab": problem.sid_vocab, "levels": problem.levels}
    head = problem.hidden, problem.weight, problem.targets
    return lambda: problem.backward(linear_token_logps(*head, **options))


def ours_in_place(problem: Problem) -> Step:
    """Ours with the gradient written over the logits."""
    return lambda: problem.backward(token_logps(problem.logits, problem.targets, inplace_backward=True))


# Plain torch. At bfloat16 the plain forms return bfloat16, too coarse for a preference loss; those named fp32 do not.


def _pick(values: Tensor, targets: Tensor) -> Tensor:
    return values.gather(1, targets[:, None]).squeeze(1)


def log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    return _pick(torch.log_softmax(logits, 1), targets)


def log_softmax_fp32(logits: Tensor, targets: Tensor) -> Tensor:
    return _pick(torch.log_softmax(logits, 1, dtype=torch.float32), targets)


def gather_lse(logits: Tensor, targets: Tensor) -> Tensor:
    return _pick(logits, targets) - torch.logsumexp(logits, 1)


def gather_lse_fp32(logits: Tensor, targets: Tensor) -> Tensor:
    return gather_lse(logits.float(), targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(logits, targets, reduction="none")


def cross_entropy_fp32(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float(), targets)


def plain(expression: Callable[[Tensor, Tensor], Tensor]) -> Method:
    """The method that evaluates an expression of logits and targets."""
    return lambda problem: lambda: problem.backward(expression(problem.logits, problem.targets))


def compiled(problem: Problem) -> Step:
    """``torch.compile`` of log_softmax and gather."""
    step = plain(torch.compile(log_softmax_fp32))(problem)
    try:
        step()
    except RuntimeError as error:
        raise Missing(f"torch.compile does not work here: {str(error).splitlines()[0]}") from None
    return step


# Under normalize="level" people multiply by the whole head and then keep the level's columns.


def mask(problem: Problem) -> Step:
    """Plain torch that computes all logits and masks the other levels' columns."""
    case = problem.case
    column = torch.arange(case.vocab) - case.vocab - problem.codes_of_levels[:, None]
    outside = (column < 0) | (column >= case.codes)

    def step() -> Tensor:
        logits = problem.logits.view(-1, LEVELS, case.vocab).masked_fill(outside, -torch.inf)
        return problem.backward(log_softmax(logits.flatten(0, 1), problem.targets))

    return step


def _levels(problem: Problem) -> tuple[list[slice], Tensor]:
    """Each level's columns, and the targets' codes ``[rows / LEVELS, LEVELS]``."""
    case = problem.case
    first = [case.vocab + code for code in problem.codes_of_levels.tolist()]
    return [slice(f, f + case.codes) for f in first], problem.targets.view(-1, LEVELS) - torch.tensor(first)


def columns(problem: Problem) -> Step:
    """Plain torch that computes all logits and keeps the level's columns."""
    levels, codes = _levels(problem)

    def step() -> Tensor:
        logits = problem.logits.view(-1, LEVELS, problem.case.vocab)
        logps = [log_softmax(logits[:, i, level], codes[:, i]) for i, level in enumerate(levels)]
        return problem.backward(torch.stack(logps, 1).flatten())

    return step


def head_slices(problem: Problem) -> Step:
    """Plain torch that multiplies each level's rows of the weight only."""
    levels, codes = _levels(problem)

    def step() -> Tensor:
        hidden = problem.hidden.view(-1, LEVELS, problem.case.hidden)
        logps = [log_softmax(hidden[:, i] @ problem.weight[level].T, codes[:, i]) for i, level in enumerate(levels)]
        return problem.backward(torch.stack(logps, 1).flatten())

    return step


def _torch_lce(problem: Problem, **options: Any) -> Step:
    try:
        chunked = torch.nn.LinearCrossEntropyOptions(**options)
    except AttributeError:
        raise Missing(f"torch {torch.__version__} has no linear_cross_entropy") from None
    head = problem.hidden, problem.weight, problem.targets
    return lambda: problem.backward(-F.linear_cross_entropy(*head, reduction="none", options=chunked))


def torch_lce(problem: Problem) -> Step:
    """torch's chunked linear cross-entropy, all rows in one chunk."""
    return _torch_lce(problem, batch_chunk_size=problem.case.rows)


def torch_lce_auto(problem: Problem) -> Step:
    """torch's chunked linear cross-entropy with the chunks that it chooses, of one or two rows here."""
    case = problem.case
    if (case.length, case.vocab) != (4, 32768):
        raise Missing("measured at 64 rows of 32768 logits only: it takes seconds per call, minutes at bfloat16")
    return _torch_lce(problem)


# Floors: they compute no log-probs.


def copy(problem: Problem) -> Step:
    """The logits read and written once. Forward and backward must read them twice and write them once."""
    to = torch.zeros_like(problem.values)
    return lambda: to.copy_(problem.values)


def bare_passes(problem: Problem) -> Step:
    """The rows' log-sum-exp, then one pass that reads the logits and writes fresh memory."""

    def step() -> Tensor:
        row_lse(problem.given.detach())
        return problem.given.detach().clone()

    return step


def bare_passes_in_place(problem: Problem) -> Step:
    """The rows' log-sum-exp, then one pass that overwrites the logits."""

    def step() -> Tensor:
        row_lse(problem.given.detach())
        return problem.given.detach().neg_()

    return step


def bare_gemms(problem: Problem) -> Step:
    """The products for logits and both gradients, by the faster library, into memory that exists already."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = hidden.new_zeros(len(hidden), len(weight))
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def step() -> Tensor:
        linear(hidden, weight, out=logits)
        linear(logits, weight.T, out=grad_hidden)
        return linear(logits.T, hidden.T, out=grad_weight)

    return step


def bare_level_gemms(problem: Problem) -> Step:
    """The products of :func:`bare_gemms` for each level's rows of the weight; a fresh gradient is zeroed first."""
    levels, _ = _levels(problem)
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    by_level = hidden.view(-1, LEVELS, problem.case.hidden).transpose(0, 1).contiguous()
    logits = hidden.new_zeros(len(by_level[0]), problem.case.codes)
    grad_hidden, kept = torch.zeros_like(by_level), torch.zeros_like(weight)

    def step() -> Tensor:
        grad_weight = kept if problem.case.accumulate else torch.zeros_like(weight)
        for i, level in enumerate(levels):
            linear(by_level[i], weight[level], out=logits)
            linear(logits, weight[level].T, out=grad_hidden[i])
            linear(logits.T, by_level[i].T, out=grad_weight[level])
        return grad_weight

    return step


FLOORS = ("copy", "bare_passes", "bare_passes_in_place", "bare_gemms", "bare_level_gemms", "bare_bytes")
EXPRESSIONS = {f.__name__: plain(f) for f in (log_softmax, gather_lse, cross_entropy)}
FP32_EXPRESSIONS = {f.__name__: plain(f) for f in (log_softmax_fp32, gather_lse_fp32, cross_entropy_fp32)}
PLAIN = (*EXPRESSIONS, *FP32_EXPRESSIONS)
