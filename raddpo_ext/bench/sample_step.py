"""A step of sampling, beside a step of beam search of the same width over the same beams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raddpo_ext.bench.compare import Comparison
from raddpo_ext.bench.searches import MILLION, QWEN_VOCAB, Case
from raddpo_ext.decoding.beam_step import BeamState, beam_step
from raddpo_ext.decoding.sample_step import SampleState, sample_step

CASES = [
    Case("clustered", QWEN_VOCAB, 4, 8, 17, 100_000, 256),  # 16 rollouts a prompt
    Case("uniform", 8192, 3, 8, 65, MILLION),
    Case("uniform", 2048, 8, 2, 257, MILLION),
]


@dataclass
class Level:
    """The beams before a step, and their logits."""

    logits: Tensor
    state: SampleState


class Steps:
    """The steps of one sampled search; :meth:`run` makes each of them once by a method."""

    def __init__(self, case: Case, device: torch.device | str = "cpu") -> None:
        self.case, self.index = case, case.index_of(case.sids()).to(device)
        self.seed, self.keys = torch.tensor(0, device=device), torch.arange(case.batch, device=device)
        generator = torch.Generator().manual_seed(0)
        state, self.levels = SampleState.start(self.index, case.batch), []
        for _ in range(self.index.levels):
            shape = (*state.nodes.shape, case.vocab)
            self.levels.append(Level(torch.randn(shape, generator=generator).to(device), state))
            state = self._sample(self.levels[-1])

    @property
    def methods(self) -> dict[str, Callable[[Level], BeamState]]:
        """``beam_step`` over the vocabulary reads all logits, over the trie those of the children, as sampling does."""
        return {
            "sample_step": self._sample,
            "beam_step trie": lambda level: self._search(level, "trie"),
            "beam_step vocab": lambda level: self._search(level, "vocab"),
        }

    def run(self, method: str) -> Callable[[], list[Tensor]]:
        step = self.methods[method]
        return lambda: [step(level).scores for level in self.levels]

    def _sample(self, level: Level) -> SampleState:
        """With the tensors that a search makes once."""
        beams = self.case.beams
        return sample_step(level.logits, level.state, self.index, beams, seed=self.seed, keys=self.keys)

    def _search(self, level: Level, normalize: str) -> BeamState:
        return beam_step(level.logits, level.state, self.index, self.case.beams, normalize=normalize)


def comparison(device: torch.device, *, case: Case) -> Comparison:
    steps = Steps(case, device)
    ours, *others = steps.methods
    return Comparison(
        f"sample_step, {case.name}",
        {"ours": steps.run(ours)},
        {name: steps.run(name) for name in others},
        steps=case.levels,
    )
