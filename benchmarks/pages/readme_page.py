"""The README's table of results, from those of a CPU and of a GPU."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.catalogues import ROOT
from benchmarks.harness.report import RESULTS, markdown
from benchmarks.harness.results import Results, read
from benchmarks.pages.page import fill
from benchmarks.pages.suite_page import Ratios, policy_floors, ratios, retrieval_floors, step_floors
from benchmarks.peers.onednn import SUFFIX
from raddpo_ext._files import replacing

PAGE = ROOT / "README.md"
GPU = RESULTS / "gpu_bench.jsonl"
MEMBERS = ("beam-search", "losses", "whole-steps", "retriever", "policy-steps")  # that the table is made of
_STEP, _LARGE_STEP = (f"V={size}k prompt=128 candidates=16 float32" for size in (32, 152))
_RETRIEVAL = "prompt=256 W=50 batch=4"
_POLICY_STEP = "live 2 of 2 prompt=40"
_FLOOR = "its matrix products"


def render(page: str, results: Results, gpu: Results) -> str:
    """The README with its table written anew."""
    return fill(page, {"results": table(results, gpu)})


def write(results: Results) -> None:
    """The README, if all that its table is made of has been measured."""
    if any("skipped" in results.get(name, {"skipped": ""}) for name in MEMBERS):
        return
    text = render(PAGE.read_text(), results, read(GPU))
    with replacing(PAGE) as file:
        file.write(text.encode())


def table(results: Results, gpu: Results) -> str:
    rows = [*_steps(results), _retrieval(results), _gpu_retrieval(gpu), _policy_step(results), *_operators(results)]
    return markdown(["", "compared with", "times as fast", "our time over the floor"], rows)


def _steps(results: Results) -> list[list[str]]:
    def over(peer: str, case: str, way: str = "ours") -> str:
        return _times(ratios(results, "whole-steps", f"{peer} / {way}")[case])

    def floor(case: str, way: str = "ours") -> str:
        return _times(step_floors(results, way)[case])

    kept = f"{_LARGE_STEP} memory kept"
    packed = (
        f"{over('packed', _STEP)}; at V = 152k {over('packed', _LARGE_STEP)}, {over('packed', kept)} if freed memory "
    )
    packed += f"is kept; over a level {over('packed', _LARGE_STEP, 'ours, level')}"
    floors = f"{floor(_STEP)}; {floor(_LARGE_STEP)}, {floor(kept)}; {floor(_LARGE_STEP, 'ours, level')}"
    return [
        [
            "whole training step, V = 32k, 16 candidates, one CPU thread",
            "a row per candidate, the head on what is needed",
            _link(over("replicated", _STEP), "benchmarks.md#whole-steps"),
            f"{floor(_STEP)}: {_FLOOR}",
        ],
        ["the same step", "the same packed rows in plain torch", _link(packed, "benchmarks.md#whole-steps"), floors],
    ]


def _retrieval(results: Results) -> list[str]:
    vocab, level = (
        ratios(results, "retriever", f"generate / shared {support}")[_RETRIEVAL] for support in ("vocab", "level")
    )
    found = retrieval_floors(results)
    times = f"{_times(vocab)}; {_times(level)} with log-probs over a level"
    return [
        "whole retrieval, one CPU thread, 4 prompts of 256",
        "`generate` with a constraint in Python",
        _link(times, "benchmarks.md#whole-retrievals"),
        f"{_times(found[f'{_RETRIEVAL} vocab'])}; {_times(found[f'{_RETRIEVAL} level'])}: {_FLOOR}",
    ]


def _gpu_retrieval(gpu: Results) -> list[str]:
    def row(batch: int) -> dict[str, Any]:
        rows = [row for row in gpu["gpu_bench"]["results"] if row["part"] == "retriever"]
        return next(row for row in rows if (row["batch"], row["beam_width"]) == (batch, 50))

    def per(batch: int, other: str) -> str:
        found = row(batch)
        return _times(found["call"]["captured"]["ms"] / found[other])

    times = [row(batch)["call"]["generate"]["ms"] / row(batch)["call"]["captured"]["ms"] for batch in (1, 8)]
    floors = f"{per(1, 'floor_ms')}, {per(8, 'floor_ms')}: its bytes and products; "
    return [
        "whole retrieval, H200, Qwen3-0.6B's shapes",
        "`generate` with a constraint in Python",
        _link(f"{_times(times[0])} at batch 1, {_times(times[1])} at batch 8", "gpu.md#what-was-measured"),
        f"{floors}{per(1, 'model_ms')}, {per(8, 'model_ms')}: the model's own forwards",
    ]


def _policy_step(results: Results) -> list[str]:
    def over(way: str) -> str:
        return _times(ratios(results, "policy-steps", f"peer / {way}")[_POLICY_STEP])

    times = f"{over('sample')}; {over(f'sample{SUFFIX}')} with `use_onednn` on an AMD processor"
    floors = (_times(policy_floors(results, way)[_POLICY_STEP]) for way in ("sample", f"sample{SUFFIX}"))
    return [
        "policy training step, one CPU thread, 2 prompts of 40 with 16 rollouts",
        "`generate` and a row per rollout",
        _link(times, "benchmarks.md#policy-training-steps"),
        f"{'; '.join(floors)}: {_FLOOR}",
    ]


def _operators(results: Results) -> list[list[str]]:
    def losses(ratio: str) -> Ratios:
        return {case: x for case, x in ratios(results, "losses", ratio, "peers").items() if "bfloat16" in case}

    products = losses("ours / three GEMMs")
    return [
        [
            "one operator: decoding step, one CPU thread",
            "STATIC",
            _link(_range(ratios(results, "beam-search", "static")), "benchmarks.md#decoding-step"),
            f"{_range(ratios(results, 'beam-search', 'bare_lse'))}: a log-sum-exp of the logits",
        ],
        [
            "one operator: SimPO from hidden states, bfloat16, one CPU thread",
            "Liger",
            _link(_range(losses("liger / ours")), "benchmarks.md#losses"),
            f"{_range(products)}: the three bare products",
        ],
        [
            "the same",
            "the best expression in plain torch",
            _link(_range(losses("best torch / ours")), "benchmarks.md#losses"),
            "the same",
        ],
    ]


def _range(values: Ratios) -> str:
    return f"{_times(min(values.values()))} to {_times(max(values.values()))}"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 2 else f"{value:.2g}"


def _link(text: str, target: str) -> str:
    return f"[{text}](docs/{target})"
