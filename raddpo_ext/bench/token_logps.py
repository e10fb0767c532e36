"""Token log-probs with their gradients: from logits, and from hidden states through a language model's head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext.bench.compare import Comparison, Missing, Run
from raddpo_ext.decoding.row_lse import row_lse
from raddpo_ext.logps.linear_token_logps import linear_token_logps
from raddpo_ext.logps.token_logps import token_logps

SPREAD = 3.0  # standard deviation of the logits: peaked as a trained model's, so that the softmax counts in gradients


def log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, 1).gather(1, targets[:, None]).squeeze(1)


def from_logits(device: torch.device, *, rows: int, vocab_size: int, compiled: bool = True) -> Comparison:
    """The floor reads the logits twice and writes as much once, into memory that is there: forward and backward."""
    values, upstream, targets = _random(device, rows, vocab_size)
    logits = values.mul_(SPREAD).requires_grad_()
    copied = torch.empty_like(values)

    def call(logps: Callable[[Tensor, Tensor], Tensor]) -> Run:
        return lambda: _differentiated(logps(logits, targets), upstream, logits)

    def compile_it() -> Run:
        try:
            run = call(torch.compile(log_softmax))
            run()
        except (RuntimeError, OSError) as error:
            raise Missing(f"torch.compile does not work here: {str(error).splitlines()[0]}") from None
        return run

    def passes() -> None:
        row_lse(logits.detach())
        copied.copy_(logits.detach())

    found = Comparison(
        f"token_logps and gradient, {rows} x {vocab_size} logits",
        {"ours": call(token_logps), "log_softmax, gather": call(log_softmax)},
        {"log-sum-exp and a copy": passes},
    )
    if compiled:
        found.offer("torch.compile of these", compile_it)
    return found


def from_hidden(device: torch.device, *, rows: int, vocab_size: int, hidden_size: int) -> Comparison:
    """The floor is the three products for logits and both gradients, into memory that is there."""
    hidden, upstream, targets = _random(device, rows, vocab_size, hidden_size)
    weight = torch.randn(vocab_size, hidden_size, device=device).mul_(SPREAD * hidden_size**-0.5).requires_grad_()
    hidden.requires_grad_()
    logits = torch.zeros(rows, vocab_size, device=device)
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def call(logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        return lambda: _differentiated(logps(hidden, weight, targets), upstream, hidden, weight)

    def chunked() -> Run:
        """One chunk: its default of a row or two each is many times slower on a CPU."""
        try:
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        except AttributeError:
            raise Missing(f"torch {torch.__version__} has no linear_cross_entropy") from None
        loss: Any = F.linear_cross_entropy
        return call(lambda *head: -loss(*head, reduction="none", options=options))

    def products() -> None:
        torch.mm(hidden.detach(), weight.detach().T, out=logits)
        torch.mm(logits, weight.detach(), out=grad_hidden)
        torch.mm(logits.T, hidden.detach(), out=grad_weight)

    found = Comparison(
        f"linear_token_logps and gradients, {rows} rows H={hidden_size} V={vocab_size}",
        {
            "ours": call(linear_token_logps),
            "matmul, log_softmax, gather": call(
                lambda hidden, weight, targets: log_softmax(hidden @ weight.T, targets)
            ),
        },
        {"three bare matmuls": products},
    )
    found.offer("F.linear_cross_entropy", chunked)
    return found


def _random(device: torch.device, rows: int, vocab_size: int, columns: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal values ``[rows, columns]``, by default ``vocab_size`` columns, a gradient and targets."""
    torch.manual_seed(0)
    values = torch.randn(rows, columns or vocab_size, device=device)
    return values, torch.randn(rows, device=device), torch.randint(vocab_size, (rows,), device=device)


def _differentiated(logps: Tensor, upstream: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """The log-probs and fresh gradients of the leaves."""
    return logps.detach(), *torch.autograd.grad(logps, leaves, upstream)
