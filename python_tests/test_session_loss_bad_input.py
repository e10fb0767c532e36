"""What the session losses refuse: each error names the argument and the value."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from support.session_cases import build
from torch import Tensor

import raddpo_ext as rx

CASE = build([(2, 3), (1, 2)], 3, seed=0)  # 8 candidates, 8 pairs
SESSIONS = CASE.sessions
LOGPS = CASE.logps.nan_to_num(0.0)
WEIGHTS = torch.ones(8, dtype=torch.float64)


def changed(tensor: Tensor, value: float, *index: int) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


# Arguments that replace good ones, the error, and what it must say.
Case = tuple[dict[str, Any], type[Exception], list[str]]

BOTH: list[Case] = [
    ({"sessions": None}, TypeError, ["sessions", "SessionBatch", "NoneType"]),
    ({"sessions": SESSIONS.to("meta")}, ValueError, ["meta", "cpu"]),
    ({"pair_weights": [1.0] * 8}, TypeError, ["pair_weights", "list"]),
    ({"pair_weights": torch.ones(8, dtype=torch.int64)}, TypeError, ["pair_weights", "int64"]),
    ({"pair_weights": torch.ones(7)}, ValueError, ["pair_weights", "(8,)", "(7,)"]),
    ({"pair_weights": torch.ones(8, 1)}, ValueError, ["pair_weights", "(8,)", "(8, 1)"]),
    ({"pair_weights": WEIGHTS.to("meta")}, ValueError, ["pair_weights", "cpu", "meta"]),
    ({"pair_weights": changed(WEIGHTS, -0.5, 3)}, ValueError, ["pair_weights[3]", "-0.5"]),
    ({"pair_weights": changed(WEIGHTS, math.nan, 7)}, ValueError, ["pair_weights[7]", "nan"]),
    ({"pair_weights": changed(WEIGHTS, math.inf, 0)}, ValueError, ["pair_weights[0]", "inf"]),
    ({"pair_weights": changed(WEIGHTS, -math.inf, 1)}, ValueError, ["pair_weights[1]", "-inf"]),
    ({"reduction": "batchmean"}, ValueError, ["reduction", "'mean', 'sum', 'none'", "'batchmean'"]),
    ({"reduction": None}, ValueError, ["reduction", "None"]),
]

RAD_DPO: list[Case] = [
    ({"logps": LOGPS.tolist()}, TypeError, ["logps", "list"]),
    ({"logps": LOGPS.int()}, TypeError, ["logps", "int32"]),
    ({"logps": LOGPS.bfloat16()}, TypeError, ["logps", "bfloat16"]),
    ({"logps": LOGPS.half()}, TypeError, ["logps", "float16"]),
    ({"logps": LOGPS[:, 0]}, ValueError, ["logps", "(8,)"]),
    ({"logps": LOGPS[:7]}, ValueError, ["logps", "(8, 3)", "(7, 3)"]),
    ({"logps": LOGPS[:, :2]}, ValueError, ["logps", "(8, 3)", "(8, 2)"]),
    ({"logps": LOGPS.to("meta")}, ValueError, ["logps", "cpu", "meta"]),
    ({"logps": changed(CASE.logps, math.nan, 4, 0), "check": True}, ValueError, ["logps[4, 0]"]),
    ({"ref_logps": LOGPS.tolist()}, TypeError, ["ref_logps", "list"]),
    ({"ref_logps": LOGPS.long()}, TypeError, ["ref_logps", "int64"]),
    ({"ref_logps": LOGPS[:7]}, ValueError, ["ref_logps", "(8, 3)", "(7, 3)"]),
    ({"ref_logps": LOGPS.to("meta")}, ValueError, ["ref_logps", "cpu", "meta"]),
    ({"detach": [[True] * 3] * 8}, TypeError, ["detach", "list"]),
    ({"detach": LOGPS}, TypeError, ["detach", "bool", "float64"]),
    ({"detach": LOGPS[:, :2] > 0}, ValueError, ["detach", "(8, 3)", "(8, 2)"]),
    ({"detach": (LOGPS > 0).to("meta")}, ValueError, ["detach", "cpu", "meta"]),
    ({"beta": 0.0}, ValueError, ["beta", "0"]),
    ({"beta": -1}, ValueError, ["beta", "-1"]),
    ({"beta": math.nan}, ValueError, ["beta", "nan"]),
    ({"beta": math.inf}, ValueError, ["beta", "inf"]),
    ({"beta": "2"}, TypeError, ["beta", "'2'"]),
    ({"gamma": math.nan}, ValueError, ["gamma", "nan"]),
    ({"gamma": -math.inf}, ValueError, ["gamma", "-inf"]),
    ({"gamma": None}, TypeError, ["gamma", "None"]),
    ({"protect": "losers"}, ValueError, ["protect", "'winner', 'positives', 'none'", "'losers'"]),
    ({"protect": None}, ValueError, ["protect", "None"]),
    ({"aggregation": "sum"}, ValueError, ["aggregation", "'negatives', 'margins'", "'sum'"]),
    ({"weighting": "pair"}, ValueError, ["weighting", "'loss', 'reward'", "'pair'"]),
    ({"positives": "all"}, ValueError, ["positives", "'winner', 'each', 'pooled'", "'all'"]),
    ({"positives": "pooled", "aggregation": "margins"}, ValueError, ["aggregation", "'pooled'", "'margins'"]),
    ({"sft_weight": -0.1}, ValueError, ["sft_weight", "-0.1"]),
    ({"sft_weight": math.nan}, ValueError, ["sft_weight", "nan"]),
    ({"sft_weight": math.inf}, ValueError, ["sft_weight", "inf"]),
    ({"sft_weight": "1"}, TypeError, ["sft_weight", "'1'"]),
    ({"level_weights": [1.0, 1.0]}, ValueError, ["level_weights", "(3,)", "(2,)"]),
    ({"level_weights": torch.ones(3, 1)}, ValueError, ["level_weights", "(3,)", "(3, 1)"]),
    ({"level_weights": torch.ones(4)}, ValueError, ["level_weights", "(3,)", "(4,)"]),
    ({"level_weights": [1.0, -2.0, 1.0]}, ValueError, ["level_weights[1]", "-2"]),
    ({"level_weights": torch.tensor([1.0, 1.0, math.nan])}, ValueError, ["level_weights[2]", "nan"]),
    ({"level_weights": [math.inf, 1.0, 1.0]}, ValueError, ["level_weights[0]", "inf"]),
    ({"level_weights": ["a", "b", "c"]}, TypeError, ["level_weights", "'a'"]),
    ({"level_weights": 1.0}, TypeError, ["level_weights", "1.0"]),
    ({"level_weights": torch.ones(3, device="meta")}, ValueError, ["level_weights", "meta"]),
    ({"label_smoothing": -0.1}, ValueError, ["label_smoothing", "-0.1"]),
    ({"label_smoothing": 0.5}, ValueError, ["label_smoothing", "0.5"]),
    ({"label_smoothing": math.nan}, ValueError, ["label_smoothing", "nan"]),
    ({"label_smoothing": "no"}, TypeError, ["label_smoothing", "'no'"]),
    ({"normalizer": (1, 2), "reduction": "sum"}, ValueError, ["normalizer", "'sum'"]),
    ({"normalizer": (1, 2), "reduction": "none"}, ValueError, ["normalizer", "'none'"]),
    ({"normalizer": 3}, (TypeError, ValueError), ["normalizer", "3"]),
    ({"normalizer": (3,)}, ValueError, ["normalizer", "(3,)"]),
    ({"normalizer": (1, 2, 3)}, ValueError, ["normalizer", "(1, 2, 3)"]),
    ({"normalizer": (0, 2)}, ValueError, ["normalizer", "0"]),
    ({"normalizer": (1, -2.0)}, ValueError, ["normalizer", "-2.0"]),
    ({"normalizer": (1, math.nan)}, ValueError, ["normalizer", "nan"]),
    ({"normalizer": (math.inf, 1)}, ValueError, ["normalizer", "inf"]),
    ({"normalizer": ("1", 2)}, TypeError, ["normalizer", "'1'"]),
    ({"normalizer": (torch.tensor(0.0), 2)}, ValueError, ["normalizer", "0"]),
    ({"normalizer": (1, torch.tensor(-3))}, ValueError, ["normalizer", "-3"]),
    ({"normalizer": (1, torch.tensor(math.nan))}, ValueError, ["normalizer", "nan"]),
    ({"normalizer": (torch.ones(2), 1)}, ValueError, ["normalizer", "[1., 1.]"]),
    ({"normalizer": (1, torch.ones((), device="meta"))}, ValueError, ["normalizer", "meta"]),
]

SCORES = LOGPS[:, 0].contiguous()
MULTILABEL: list[Case] = [
    ({"scores": SCORES.tolist()}, TypeError, ["scores", "list"]),
    ({"scores": SCORES.long()}, TypeError, ["scores", "int64"]),
    ({"scores": SCORES.bfloat16()}, TypeError, ["scores", "bfloat16"]),
    ({"scores": LOGPS}, ValueError, ["scores", "(8, 3)"]),
    ({"scores": SCORES[:7]}, ValueError, ["scores", "8", "7"]),
    ({"scores": SCORES.to("meta")}, ValueError, ["scores", "cpu", "meta"]),
    ({"scores": changed(SCORES, math.nan, 5), "check": True}, ValueError, ["scores[5]"]),
    ({"temperature": 0}, ValueError, ["temperature", "0"]),
    ({"temperature": -1.5}, ValueError, ["temperature", "-1.5"]),
    ({"temperature": math.nan}, ValueError, ["temperature", "nan"]),
    ({"temperature": math.inf}, ValueError, ["temperature", "inf"]),
    ({"temperature": "hot"}, TypeError, ["temperature", "'hot'"]),
    ({"normalizer": 0}, ValueError, ["normalizer", "0"]),
    ({"normalizer": -2.5}, ValueError, ["normalizer", "-2.5"]),
    ({"normalizer": math.nan}, ValueError, ["normalizer", "nan"]),
    ({"normalizer": torch.tensor(-2.5)}, ValueError, ["normalizer", "-2.5"]),
    ({"normalizer": "3"}, TypeError, ["normalizer", "'3'"]),
    ({"normalizer": (3, 4)}, (TypeError, ValueError), ["normalizer", "3, 4"]),
    ({"normalizer": 3, "reduction": "sum"}, ValueError, ["normalizer", "'sum'"]),
]


def of_logps(**given: Any) -> object:
    arguments = {"logps": LOGPS, "sessions": SESSIONS} | given
    return rx.rad_dpo_loss(arguments.pop("logps"), arguments.pop("sessions"), **arguments)


def of_scores(**given: Any) -> object:
    arguments = {"scores": SCORES, "sessions": SESSIONS} | given
    return rx.multilabel_contrastive_loss(arguments.pop("scores"), arguments.pop("sessions"), **arguments)


def shown(given: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in given.items()).replace("\n", "")[:60]


@pytest.mark.parametrize(
    ("call", "given", "error", "says"),
    [pytest.param(of_logps, *case, id=f"rad_dpo: {shown(case[0])}") for case in BOTH + RAD_DPO]
    + [pytest.param(of_scores, *case, id=f"multilabel: {shown(case[0])}") for case in BOTH + MULTILABEL],
)
def test_is_refused(call: Any, given: dict[str, Any], error: type[Exception], says: list[str]) -> None:
    call()  # the rest is in order
    with pytest.raises(error) as raised:
        call(**given)
    for part in says:
        assert re.search(re.escape(part), str(raised.value)), f"{part!r} is not in {str(raised.value)!r}"


def test_what_is_not_read_is_not_checked() -> None:
    """NaN in padding, also under ``check``; NaN log-probs without it are no crash."""
    logps = CASE.logps.clone().requires_grad_()
    assert logps.isnan().any()
    rx.rad_dpo_loss(logps, SESSIONS, ref_logps=CASE.ref_logps, check=True).loss.backward()
    for bad in (math.nan, math.inf):
        rx.rad_dpo_loss(torch.full_like(LOGPS, bad).requires_grad_(), SESSIONS).loss.backward()
        rx.multilabel_contrastive_loss(torch.full_like(SCORES, bad).requires_grad_(), SESSIONS).backward()


def test_bounds_are_inclusive() -> None:
    """What is just allowed."""
    of_logps(label_smoothing=0.0, sft_weight=0.0, level_weights=[0, 0, 0], pair_weights=torch.zeros(8), gamma=-3)
    of_logps(label_smoothing=0.4999, beta=1e-30, normalizer=(1e-3, 1))
