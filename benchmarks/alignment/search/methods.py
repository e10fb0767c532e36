"""The rows of the search shop's table, each with the grid that it is tuned on."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import NamedTuple

from benchmarks.alignment import train
from benchmarks.alignment.train import Method

LEARNING_RATES = (1e-4, 3e-4, 1e-3)
SFT_LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 5e-3)
BETAS = (0.5, 2.0)
WIDE_BETAS = (0.25, 0.5, 1.0, 2.0)  # for methods without an SFT term, so that every grid has 12 settings
REFERENCE_BETAS = (0.03, 0.1, 0.3, 1.0)  # of summed log-probs against a reference, as DPO has them
SFT_WEIGHTS = (0.1, 1.0)


class Row(NamedTuple):
    """A method and its settings."""

    method: Method
    settings: list[dict[str, float]]


def _supervised(name: str) -> Row:
    return Row(train.METHODS[name], [{"lr": lr} for lr in SFT_LEARNING_RATES])


def _preference(method: Method, betas: tuple[float, ...]) -> Row:
    return Row(method, [{"lr": lr, "beta": beta} for lr, beta in product(LEARNING_RATES, betas)])


def _with_sft(name: str) -> Row:
    grid = product(LEARNING_RATES, BETAS, SFT_WEIGHTS)
    return Row(train.METHODS[name], [{"lr": lr, "beta": beta, "sft_weight": weight} for lr, beta, weight in grid])


_RAD_DPO = train.METHODS["rad_dpo"]

METHODS: dict[str, Row] = {
    "sft_continued": _supervised("sft_continued"),
    "sft_all_positives": _supervised("sft_all_positives"),
    "dpo": _preference(train.METHODS["dpo"], REFERENCE_BETAS),
    "s_dpo": _preference(train.METHODS["s_dpo"], REFERENCE_BETAS),
    "simpo": _preference(train.METHODS["simpo"], WIDE_BETAS),
    "simpo_all_negatives": _preference(train.METHODS["simpo_all_negatives"], WIDE_BETAS),
    "rad_dpo": _with_sft("rad_dpo"),
    "rad_dpo_no_sft": _preference(replace(_RAD_DPO, options={**_RAD_DPO.options, "sft_weight": 0.0}), WIDE_BETAS),
    "rad_dpo_no_tlgd": _with_sft("rad_dpo_no_tlgd"),
    "rad_dpo_no_rdrw": _with_sft("rad_dpo_no_rdrw"),
    "rad_dpo_no_positives": _with_sft("rad_dpo_no_positives"),
    "rad_dpo_margins": _with_sft("rad_dpo_margins"),
    "rad_dpo_each": _with_sft("rad_dpo_each"),
    "rad_dpo_pooled": _with_sft("rad_dpo_pooled"),
}
