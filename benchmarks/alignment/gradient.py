"""What estimators of a policy gradient expect and how they vary: ``python -m benchmarks.alignment.gradient``.

The policy is a table of logits over 30 SIDs, so the true gradient is known. The result is written to
``benchmarks/results/alignment-gradient.jsonl``, and its table to ``docs/policy.md``. Nothing depends on the machine but
for rounding.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.alignment.table_policy import NUM_SIDS, Draws, Estimator, TablePolicy
from benchmarks.harness import results
from benchmarks.harness.report import RESULTS, ROOT, environment, markdown
from benchmarks.pages.page import fill
from raddpo_ext._files import replacing

RESULT = RESULTS / "alignment-gradient.jsonl"
PAGE = ROOT / "docs" / "policy.md"
RUN = "gradient"
SAMPLES = (4, 16)
CHUNK = 10_000  # groups at once
POLICY = TablePolicy()

ROLLOUTS = {
    "independent": "independent",
    "sample": "without replacement",
    "beams": "beams",
}
RLOO = {"scale": "none", "baseline": "loo"}
FROM_ELSEWHERE = POLICY.expected_reward  # b
#: By rollouts, the name in the table and how it is computed.
ESTIMATORS: dict[str, dict[str, Estimator]] = {
    "independent": {
        '`scale="none", baseline="loo"` (RLOO)': Estimator(RLOO),
        '`scale="none"` (Dr. GRPO)': Estimator({"scale": "none"}),
        '`scale="group"` (GRPO)': Estimator({}),
        "`rewards - b`": Estimator(baseline=FROM_ELSEWHERE),
        '`scale="none", baseline=b`': Estimator({"scale": "none", "baseline": True}, baseline=FROM_ELSEWHERE),
        '`credit="siblings"` (V-STAR)': Estimator({"credit": "siblings"}),
        'RLOO, `aggregate="sequence"`': Estimator(RLOO, {"aggregate": "sequence"}),
        'RLOO, `normalize="vocab"`': Estimator(RLOO, normalize="vocab"),
    },
    "sample": {
        "`rewards - b`": Estimator(baseline=FROM_ELSEWHERE),
        "`rewards - b`, weights divided by their sum": Estimator(baseline=FROM_ELSEWHERE, self_normalize=True),
        '`scale="none", baseline=b`': Estimator({"scale": "none", "baseline": True}, baseline=FROM_ELSEWHERE),
        '`scale="none"`': Estimator({"scale": "none"}),
        '`scale="none", baseline="loo"`': Estimator(RLOO),
        '`scale="group"`': Estimator({}),
        '`credit="siblings"`': Estimator({"credit": "siblings"}),
        '`scale="none"`, no weights': Estimator({"scale": "none"}, use_weights=False),
    },
    "beams": {
        '`scale="none"`': Estimator({"scale": "none"}),
        '`scale="group"` (MiniOneRec)': Estimator({}),
    },
}


def measure(groups: int) -> list[dict[str, Any]]:
    """A cell per kind of rollouts, number of samples and estimator."""
    cells = []
    for rollouts, estimators in ESTIMATORS.items():
        for samples in SAMPLES:
            chunks = 1 if rollouts == "beams" else -(-groups // CHUNK)
            draws = [POLICY.draw(rollouts, min(groups, CHUNK), samples, seed) for seed in range(chunks)]
            common = {"rollouts": rollouts, "samples": samples, **reach(draws)}
            for name, estimator in estimators.items():
                cells.append({**common, "estimator": name, **moments(draws, estimator)})
    return cells


def reach(draws: list[Draws]) -> dict[str, Any]:
    """The number of groups, and of one the mean number of different SIDs and of their probability together."""
    seen = torch.cat([torch.zeros(len(d.items), NUM_SIDS, dtype=torch.float64).scatter_(1, d.items, 1) for d in draws])
    mass = float((seen @ POLICY.probabilities).mean())
    return {"groups": len(seen), "distinct": round(float(seen.sum(1).mean()), 3), "mass": round(mass, 4)}


def moments(draws: list[Draws], estimator: Estimator) -> dict[str, float]:
    """Of one group's gradient, relative to the length of the true one.

    Returns:
        ``factor``: how long the mean is along the truth. ``bias``: how far the mean is from the truth, ``turned``: the
        same of the mean divided by the factor. ``sd``: the standard deviation divided by the factor. ``error``: of
        ``turned``.
    """
    truth, count = POLICY.truth, sum(len(d.items) for d in draws)
    total, squares = torch.zeros_like(truth), 0.0
    for one in draws:
        found = POLICY.estimates(one, estimator)
        total += found.sum(0)
        squares += float(found.square().sum())
    mean = total / count
    variance = (squares - count * float(mean @ mean)) / max(count - 1, 1)
    factor = float(mean @ truth / (truth @ truth))

    def distance(other: Tensor) -> float:
        """Of the expectation, of which the mean has an error."""
        squared = float((mean - other).square().sum()) - variance / count
        return max(squared, 0.0) ** 0.5 / float(truth.norm())

    sd = max(variance, 0.0) ** 0.5 / float(truth.norm())
    found_moments = {
        "factor": factor,
        "bias": distance(truth),
        "turned": distance(factor * truth) / abs(factor),
        "sd": sd / abs(factor),
        "error": sd / abs(factor) / count**0.5,
    }
    return {name: round(value, 5) for name, value in found_moments.items()}


def table(cells: list[dict[str, Any]]) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in cells:  # of few samples first
        row = rows.setdefault((ROLLOUTS[cell["rollouts"]], cell["estimator"]), [])
        row += [f"{cell[name]:.2f}" for name in ("bias", "turned", "sd")]
    head = [f"{name}, {samples}" for samples in SAMPLES for name in ("bias", "turned", "sd")]
    body = [[rollouts, name, *row] for (rollouts, name), row in rows.items()]
    return markdown(["rollouts", "advantages", *head], body)


def block(run: dict[str, Any]) -> str:
    """What the page shows of a result."""
    cells = run["results"]
    facts = {(cell["rollouts"], cell["samples"]): cell for cell in cells}
    independent, sample = (
        " and ".join(f"{facts[kind, n]['distinct']:.1f} ({facts[kind, n]['mass']:.0%} of the mass)" for n in SAMPLES)
        for kind in ("independent", "sample")
    )
    error, groups = (max(cell[name] for cell in cells) for name in ("error", "groups"))
    where = f"`{run['command']}` (commit {run['commit']}), {groups:,} groups per row"
    return (
        f"{table(cells)}\n\n{where}: the mean of a row is known to {error:.3f} or better. Of {NUM_SIDS} SIDs, "
        f"{SAMPLES[0]} and {SAMPLES[1]} independent draws are {independent}; without replacement {sample}."
    )


def render(page: str, run: dict[str, Any]) -> str:
    return fill(page, {"gradient": block(run)})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alignment.gradient", description="Bias and variance of policy gradients."
    )
    parser.add_argument("--quick", action="store_true", help="few groups, printed and not kept")
    options = parser.parse_args(arguments)
    run = environment("benchmarks.alignment.gradient") | {"results": measure(1_000 if options.quick else 100_000)}
    print(table(run["results"]))
    if not options.quick:
        results.write(RESULT, {RUN: run})
        text = render(PAGE.read_text(), run)
        with replacing(PAGE) as file:
            file.write(text.encode())
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
