"""The cells of the experiment: which methods, settings and seeds, and what decides which of them."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.alignment.cells import Lab
from benchmarks.alignment.records import Cell
from benchmarks.alignment.statistics import Choice, choose, ndcg, unpack
from benchmarks.alignment.train import SFT_WEIGHTS

ARTICLE = "rad_dpo"  # negatives/loss/winner: the article's reading
OBJECTIVES = ("rad_dpo", "rad_dpo_margins", "rad_dpo_negatives_reward", "rad_dpo_margins_loss")
PROTECTIONS = ("rad_dpo", "rad_dpo_no_tlgd", "rad_dpo_protect_positives")
SFT_TERMS = ("rad_dpo", *SFT_WEIGHTS)
CANDIDATES = {"objective": OBJECTIVES, "protect": PROTECTIONS, "sft_weight": SFT_TERMS}
REPORTED = (  # on the test, whatever is chosen
    "sft_continued",
    "sft_all_positives",
    "dpo",
    "s_dpo",
    "simpo",
    "rad_dpo",
    "rad_dpo_margins",
    "rad_dpo_no_tlgd",
    "rad_dpo_no_rdrw",
    "rad_dpo_no_positives",
)
NOISY = ("rad_dpo", "rad_dpo_no_rdrw")  # trained on false negatives too


def stages(lab: Lab) -> Iterator[list[Cell]]:
    """The grid, in stages that need only the results of those before."""
    scale = lab.scale
    yield [Cell(f"sft-s{seed}", "sft", {"seed": seed}) for seed in scale.seeds]
    yield [Cell(f"mine-s{seed}", "mine", {"seed": seed}) for seed in scale.seeds]
    yield [cell for method in scale.methods for cell in tuning(lab, method)]
    named = dict.fromkeys(method for methods in CANDIDATES.values() for method in methods)
    candidates = [method for method in named if method in scale.methods]
    yield [validation(lab, method) for method in ("sft", *candidates)]
    chosen = {choice.chosen for choice in choices(lab).values()}
    tested = set(scale.methods) if scale.wide else {*REPORTED, *chosen}
    methods = ["sft", *(method for method in scale.methods if method in tested)]
    tests = [reporting(lab, method, seed, 0.0) for method in methods for seed in scale.seeds]
    noisy = [method for method in NOISY if method in scale.methods]
    yield tests + [
        reporting(lab, m, seed, share) for share in scale.false_shares for m in noisy for seed in scale.seeds
    ]


def tuning(lab: Lab, method: str) -> list[Cell]:
    seed = lab.scale.seeds[0]
    return [
        Cell(f"tune-{method}-{_text(setting)}", "tune", {"method": method, "setting": setting, "seed": seed})
        for setting in lab.settings(method)
    ]


def validation(lab: Lab, method: str) -> Cell:
    args = {"method": method, "setting": tuned(lab, method), "seed": lab.scale.seeds[0]}
    return Cell(f"validate-{method}", "validate", args)


def reporting(lab: Lab, method: str, seed: int, share: float) -> Cell:
    args = {"method": method, "setting": tuned(lab, method), "seed": seed, "share": share}
    return Cell(f"test-{method}-s{seed}{f'-false{share:g}' if share else ''}", "test", args)


def tuned(lab: Lab, method: str) -> dict[str, float]:
    """The setting of the highest validation NDCG@10."""
    if method == "sft":
        return {}
    cells = tuning(lab, method)
    scores = [lab.run(cell)["result"]["ndcg@10"] for cell in cells]
    best: dict[str, float] = cells[scores.index(max(scores))].args["setting"]
    return best


def choices(lab: Lab) -> dict[str, Choice]:
    """What the rule makes the defaults: aggregation and weighting, what is protected, the SFT weight."""
    chosen = {}
    for name, candidates in CANDIDATES.items():
        known = [method for method in candidates if method in lab.scale.methods]
        if len(known) < 2:
            continue
        records = {method: lab.run(validation(lab, method)) for method in known}
        scores = {method: ndcg(unpack(record["result"]["ranks"])) for method, record in records.items()}
        chosen[name] = choose(scores, ARTICLE, lab.scale.resamples)
    return chosen


def _text(setting: dict[str, float]) -> str:
    return "-".join(f"{name}{value:g}" for name, value in setting.items())
