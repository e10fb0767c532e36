"""The token log-probs that are timed, forward and backward: from logits, and from hidden states through an LM head.

Sections: ``logits`` (the fused op on given logits), ``head`` (against the bare GEMMs, into ``weight.grad``), ``sweep``
(from 1 to 8192 rows, against plain torch; beyond the logits budget the memory counts), ``peers`` (a SimPO loss over 16
candidates, against other libraries' fused heads), ``level`` (a softmax over one level's codes inside a big vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext.index.vocab import SIDVocab

Step = Callable[[], Tensor]
SPREAD = 3.0  # standard deviation of the logits: the softmax is then as peaked as that of a trained model
CANDIDATES = 16  # of a preference batch, the first half chosen, the second rejected
BETA, GAMMA = 2.0, 0.5
LEVELS = 3
BUDGET = 2**30  # bytes, the op's default


@dataclass(frozen=True)
class Case:
    """``rows`` log-probs over ``vocab`` tokens."""

    section: str
    rows: int
    vocab: int
    hidden: int = 0  # width of the hidden states; 0: the logits are given
    dtype: torch.dtype = torch.float32
    length: int = 0  # tokens per candidate of a SimPO loss; 0: each log-prob has a random gradient
    codes: int = 0  # codes per level, the last tokens of the vocabulary; 0: normalised over the vocabulary
    accumulate: bool = False  # the weight's gradient is added to an existing ``weight.grad``; False: it is fresh
    budget: int = BUDGET
    huge_pages: bool = False  # torch's allocator gives huge pages to every method

    @property
    def name(self) -> str:
        parts = [self.section, f"{self.rows}x{self.vocab}"]
        parts += [f"H{self.hidden}"] if self.hidden else []
        parts += [f"L{self.length}"] if self.length else []
        parts += [f"K{self.codes}"] if self.codes else []
        parts += [str(self.dtype).removeprefix("torch.")]
        parts += [f"budget{self.budget >> 20}MiB"] if self.budget != BUDGET else []
        parts += [("into" if self.accumulate else "fresh")] if self.codes else []
        parts += ["huge pages"] if self.huge_pages else []
        return " ".join(parts)

    @property
    def group(self) -> str:
        """Cases of one group share a process, and with it the weight."""
        shape = f"{self.rows}x" if self.section == "logits" else f"{self.hidden}x"
        return f"{self.section} {shape}{self.vocab} {self.dtype} {self.beyond_budget} {self.huge_pages}"

    @property
    def logit_bytes(self) -> int:
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def beyond_budget(self) -> bool:
        return bool(self.hidden) and not self.codes and self.logit_bytes > self.budget

    @property
    def output_bytes(self) -> int:
        """Bytes of the log-probs and gradients that every method returns."""
        if not self.hidden:
            return 4 * self.rows + self.logit_bytes
        weight = 0 if self.accumulate else self.vocab * self.hidden
        return 4 * self.rows + (self.rows * self.hidden + weight) * self.dtype.itemsize


LOW = torch.bfloat16
CASES = [
    *(Case("logits", rows, vocab) for rows, vocab in ((256, 32768), (64, 152064), (1024, 8192))),
    Case("logits", 256, 32768, dtype=LOW),
    *(
        Case("head", rows, vocab, hidden, dtype, accumulate=True)
        for dtype in (torch.float32, LOW)
        for hidden, vocab, counts in (
            (512, 32768, (64, 256, 1024)),
            (1024, 32768, (64, 256, 1024)),
            (2048, 32768, (64, 256, 1024)),
            (512, 152064, (64,)),
        )
        for rows in counts
    ),
    *(Case("sweep", rows, vocab, 512) for vocab in (1024, 8192, 32768, 152064) for rows in (1, 8, 64, 512, 4096, 8192)),
    *(Case("sweep", 4096, 8192, 512, budget=budget) for budget in (2**26, 2**24)),
    *(
        Case("peers", CANDIDATES * length, vocab, 512, dtype, length=length)
        for dtype in (torch.float32, LOW)
        for vocab in (32768, 152064)
        for length in (3, 4, 8)
    ),
    *(Case("level", 64 * LEVELS, 152064, 512, codes=8192, accumulate=accumulate) for accumulate in (True, False)),
]
CASES += [
    replace(case, huge_pages=True)
    for case in CASES
    if case.section == "logits"
    or (case.section in ("sweep", "peers") and case.rows == 64)
    or (case.section == "level" and not case.accumulate)
]


def _random(*shape: int, seed: int, spread: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(spread)


@lru_cache(maxsize=1)
def _weight(vocab: int, hidden: int, dtype: torch.dtype, device: str) -> Tensor:
    return _random(vocab, hidden, seed=0, spread=SPREAD * hidden**-0.5).to(device, dtype).requires_grad_()


class Problem:
    """A case's inputs. A method runs :meth:`reset`, untimed, before each of its calls."""

    def __init__(self, case: Case, device: torch.device | str = "cpu") -> None:
        self.case = case
        generator = torch.Generator().manual_seed(1)
        self.upstream = _random(case.rows, seed=2).to(device)
        self.targets = torch.randint(case.codes or case.vocab, (case.rows,), generator=generator)
        if case.codes:
            self.targets += case.vocab + self.codes_of_levels[self.levels]
        self.targets = self.targets.to(device)
        if case.hidden:
            self.weight = _weight(case.vocab, case.hidden, case.dtype, str(device))
            self.hidden = _random(case.rows, case.hidden, seed=3).to(device, case.dtype).requires_grad_()
            self.leaves = {"hidden": self.hidden, "weight": self.weight}
        else:
            self.values = _random(case.rows, case.vocab, seed=3, spread=SPREAD).to(device, case.dtype)
            self.given = self.values.clone().requires_grad_()
            self.leaves = {"logits": self.given}
        self.clear()

    @property
    def logits(self) -> Tensor:
        """The logits as plain torch has them."""
        return self.hidden @ self.weight.T if self.case.hidden else self.given

    @cached_property
    def levels(self) -> Tensor:
        return torch.arange(LEVELS).repeat(self.case.rows // LEVELS)

    @cached_property
    def codes_of_levels(self) -> Tensor:
        """Each level's first token, counted from the end of the vocabulary: negative."""
        return self.case.codes * torch.arange(-LEVELS, 0)

    @cached_property
    def sid_vocab(self) -> SIDVocab:
        return SIDVocab([self.case.codes] * LEVELS, offset=self.case.vocab - LEVELS * self.case.codes)

    def reset(self) -> None:
        """Drop the gradients, except a ``weight.grad`` to be added to, and restore logits that a call has overwritten.

        It is the same for every method, so all of them find the caches in the same state.
        """
        for leaf in self.leaves.values():
            if not (self.case.accumulate and leaf is self.leaves.get("weight")):
                leaf.grad = None
        if not self.case.hidden:
            with torch.no_grad():
                self.given.copy_(self.values)

    def clear(self) -> None:
        """As :meth:`reset`; also set a ``weight.grad`` to be added to to 0."""
        for leaf in self.leaves.values():
            leaf.grad = None
        if self.case.accumulate:
            self.weight.grad = torch.zeros_like(self.weight)
        self.reset()

    def backward(self, logps: Tensor) -> Tensor:
        """The backward pass from the log-probs; returns the values to be compared."""
        if self.case.length:
            loss = simpo(logps.view(CANDIDATES, self.case.length))
            loss.backward()
            return loss.detach()
        logps.backward(self.upstream.to(logps.dtype))
        return logps.detach()


def simpo(logps: Tensor) -> Tensor:
    """SimPO's loss of ``logps [CANDIDATES, L]``, chosen ones first."""
    chosen, rejected = logps.float().mean(1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()
