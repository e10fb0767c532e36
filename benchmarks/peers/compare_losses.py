"""The speed and memory of the losses, ours against plain torch and other libraries, on one CPU thread::

    python -m benchmarks.peers.compare_losses
    python -m benchmarks.peers.compare_losses --quick --cases peers

Every number is a forward and a backward pass. Cases run in fresh processes. Within one, all methods of a case are first
checked to give the same values and gradients; then they take turns, in bursts whose first call is not counted, on the
same inputs. Before each call, untimed and alike for all, the last call's gradients are freed and logits that may have
been overwritten are restored. Memory is the process's peak during the check's call over what it held before. Times and
ratios are medians over the processes, the spread is their least and most. Calls of more than four seconds are timed in
the check itself. Cases where ours takes more than six, and methods that must be compiled, run in the first process
only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import report, results
from benchmarks.harness.report import MIB
from benchmarks.harness.results import milliseconds
from benchmarks.peers.token_logps import PEERS, methods
from benchmarks.peers.token_logps_timing import run_case
from raddpo_ext.bench import session_loss_cases, session_loss_peers, token_logps_cases
from raddpo_ext.bench.token_logps_cases import Case, Problem, Step
from raddpo_ext.bench.token_logps_peers import PLAIN

MODULE = "benchmarks.peers.compare_losses"
PACKAGES = ("trl", "liger_kernel", "verl", "transformers", "triton")
ROUNDS = 4
ONCE = ("compiled", "liger_compiled", "torch_lce_auto")  # methods of the first process only
SLOW = 6.0  # seconds
TITLES = {
    "logits": "`token_logps` from logits",
    "head": "`linear_token_logps` into `weight.grad`, against three bare GEMMs",
    "sweep": "`linear_token_logps` with a fresh dense gradient, against gather - logsumexp",
    "peers": "a SimPO loss over 16 candidates of L tokens, against other libraries' fused heads, fresh gradients",
    "level": 'one level\'s codes (`normalize="level"`), against plain torch over the vocabulary',
    "session": "`rad_dpo_loss`, against vectorised torch",
}


@dataclass(frozen=True)
class SessionCase:
    """A case of session_loss among the others."""

    case: session_loss_cases.Case
    section = group = "session"
    dtype = torch.float32
    huge_pages = beyond_budget = False

    @property
    def name(self) -> str:
        return f"session {self.case.name}"


class SessionProblem:
    """Its batch; the gradient is returned, and needs no leaf."""

    def __init__(self, case: SessionCase) -> None:
        self.case, self.batch = case, session_loss_cases.Batch(case.case)
        self.leaves: dict[str, Tensor] = {}

    def reset(self) -> None:
        pass

    clear = reset


AnyCase = Case | SessionCase
CASES: list[AnyCase] = [*token_logps_cases.CASES, *map(SessionCase, session_loss_cases.CASES)]


def problem_and_methods(case: AnyCase) -> tuple[Problem | SessionProblem, dict[str, Callable[[Any], Step]]]:
    if isinstance(case, Case):
        return Problem(case), methods(case)

    def called_once(method: Callable[..., Any], problem: SessionProblem) -> Step:
        step = method(problem.batch)
        step()  # compiles
        return step

    against = session_loss_peers.METHODS | {"bare_bytes": session_loss_peers.bare_bytes}
    return SessionProblem(case), {name: partial(called_once, method) for name, method in against.items()}


@dataclass(frozen=True)
class Ratio:
    """The least time of ``over`` to the least of ``under``, and what is asked of it."""

    name: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    least: float | None = None
    most: float | None = None

    def of(self, runs: list[dict[str, float]]) -> dict[str, Any] | None:
        """Over the processes' times; None where a side was not timed."""
        values, best = [], Counter[str]()
        for seconds in runs:
            over, under = ([name for name in side if name in seconds] for side in (self.over, self.under))
            if over and under:
                fastest = min(over, key=seconds.__getitem__)
                best[fastest] += 1
                values.append(seconds[fastest] / min(seconds[name] for name in under))
        if not values:
            return None
        result: dict[str, Any] = {
            "median": median(values),
            "least": min(values),
            "most": max(values),
            "processes": len(values),
        }
        if len(self.over) > 1:
            result["best"] = best.most_common(1)[0][0]
        return result

    def missed(self, found: float) -> str:
        """What was asked, where it is not so."""
        if self.least is not None and found < self.least:
            return f"target: at least {self.least}"
        return f"target: at most {self.most}" if self.most is not None and found > self.most else ""


def ratios(case: AnyCase) -> list[Ratio]:
    """The columns of the case's section and their targets."""
    low = case.dtype != torch.float32
    ours, in_place, log_softmax = ("ours",), ("ours_in_place",), ("log_softmax", "log_softmax_fp32")
    gemms = "ours / three GEMMs", ours, ("bare_gemms",)
    if case.section == "logits":
        return [
            Ratio("log_softmax / ours", log_softmax, ours, least=5 if low else 2.5),
            Ratio("log_softmax / in place", log_softmax, in_place, least=6 if low else 5),
            Ratio("best torch / ours", PLAIN, ours, least=2.8 if low else 1),
            Ratio("compiled / ours", ("compiled",), ours),
            Ratio("ours / two passes", ours, ("bare_passes",)),
            Ratio("in place / two passes", in_place, ("bare_passes_in_place",)),
            Ratio("in place / bytes", in_place, ("bytes",)),
        ]
    if case.section == "head":
        return [Ratio(*gemms, most=1.35 if low else 1.15)]
    if case.section == "sweep":
        within = None if case.beyond_budget else 1.03
        return [Ratio("ours / gather_lse", ours, ("gather_lse",), most=within), Ratio(*gemms)]
    if case.section == "level":
        whole = ("mask", "columns")
        return [
            Ratio("best full vocabulary / ours", whole, ours, least=15 if case.accumulate else 3),
            *(Ratio(f"{name} / ours", (name,), ours) for name in (*whole, "head_slices")),
            Ratio("ours / the level's GEMMs", ours, ("bare_level_gemms",)),
        ]
    if case.section == "session":
        return [
            Ratio("vectorised / ours", ("vectorised",), ours, least=5),
            *(Ratio(f"{name} / ours", (name,), ours) for name in ("loss_only", "prepared", "compiled", "loop")),
            Ratio("ours / bytes", ours, ("bare_bytes",)),
        ]
    return [
        Ratio("best peer / ours", tuple(PEERS), ours, least=2 if low else 1.3),
        *(Ratio(f"{name} / ours", (name,), ours) for name in PEERS),
        Ratio("best torch / ours", PLAIN, ours),
        Ratio(*gemms),
        Ratio("best peer / three GEMMs", tuple(PEERS), ("bare_gemms",)),
    ]


def summary(case: AnyCase, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One case's result from its processes."""
    times = [dict(run["seconds"]) for run in runs]
    for seconds in times:
        if "copy" in seconds:  # which moves every byte twice; reading twice and writing once moves it three times
            seconds["bytes"] = 1.5 * seconds["copy"]
    peaks = {
        name: median(r["peak_bytes"][name] for r in runs if name in r["peak_bytes"]) for name in runs[0]["seconds"]
    }
    ms = {name: 1e3 * median(s[name] for s in times if name in s) for name in times[0]}
    cpu = {name: 1e3 * median(r["cpu_seconds"][name] for r in runs if name in r["cpu_seconds"]) for name in peaks}
    return {
        "case": case.name,
        "section": case.section,
        "costs": {n: {"ms": ms[n], "cpu_ms": cpu[n], "peak_bytes": peaks[n]} for n in peaks},
        "ratios": {ratio.name: found for ratio in ratios(case) if (found := ratio.of(times))},
        "unavailable": runs[0]["unavailable"],
    }


def _ratio_cell(ratio: Ratio, found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    best = f" {found['best']}" if "best" in found else ""
    missed = ratio.missed(found["median"])
    spread = f"({found['least']:.2f}-{found['most']:.2f})"
    return f"{found['median']:.2f}x {spread}{best}" + (f" **!** ({missed})" if missed else "")


def _memory_cell(case: AnyCase, peak: float) -> str:
    if not isinstance(case, Case):
        return f"{peak / MIB:.0f}"
    if not case.beyond_budget:
        return f"{peak / MIB:.0f} (outputs {case.output_bytes / MIB:.0f}, logits {case.logit_bytes / MIB:.0f})"
    allowed = case.budget + case.output_bytes
    return f"{peak / MIB:.0f} (budget + outputs {allowed / MIB:.0f}){' **!**' if peak > allowed else ''}"


def table(cells: list[dict[str, Any]]) -> str:
    """A Markdown table of one section's cells, with an exclamation mark where a target is missed."""
    by_name = {case.name: case for case in CASES}
    columns = ratios(by_name[cells[0]["case"]])
    timed = milliseconds(cells[0])
    floors = [name for name in ("bytes", "bare_passes", "bare_gemms", "bare_level_gemms") if name in timed]
    rows = []
    for cell in cells:
        case, times = by_name[cell["case"]], milliseconds(cell)
        ms = [f"{times[name]:.3f}" if name in times else "-" for name in ("ours", *floors)]
        found = [_ratio_cell(ratio, cell["ratios"].get(ratio.name)) for ratio in ratios(case)]
        rows.append([cell["case"], *ms, *found, _memory_cell(case, cell["costs"]["ours"]["peak_bytes"])])
    head = [f"floor: {name}, ms" for name in floors] + [ratio.name for ratio in columns]
    return report.markdown(["case", "ours, ms", *head, "peak memory of ours, MiB"], rows)


def markdown(cells: list[dict[str, Any]]) -> str:
    """A table a section."""
    parts = []
    for section, title in TITLES.items():
        chosen = [cell for cell in cells if cell["section"] == section]
        if chosen:
            parts += [f"**{title}**\n", table(chosen) + "\n", report.costs_markdown(chosen) + "\n"]
    return "\n".join(parts)


def measure(chosen: list[int], processes: int, rounds: int, save: Callable[[list[dict[str, Any]]], None]) -> None:
    """Results of the cases, by their numbers."""
    runs: dict[int, list[dict[str, Any]]] = {i: [] for i in chosen}
    started = time.monotonic()
    for group in dict.fromkeys(CASES[i].group for i in chosen):
        members = [i for i in chosen if CASES[i].group == group]
        os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(CASES[members[0]].huge_pages))  # torch reads it as it starts
        for process in range(processes):
            again = ["--again"] if process else []
            left = [i for i in members if not process or runs[i][0]["seconds"]["ours"] < SLOW]
            numbers = [str(i) for i in left]
            if left:
                done = report.run_fresh(MODULE, "--worker", *numbers, "--rounds", str(rounds), *again)
                for i, run in zip(left, done, strict=True):
                    runs[i].append(run)
        print(f"{time.monotonic() - started:5.0f} s  {', '.join(CASES[i].name for i in members)}", flush=True)
        save([summary(CASES[i], runs[i]) for i in chosen if runs[i]])


def work(numbers: list[int], rounds: int, again: bool) -> list[dict[str, Any]]:
    """The runs of these cases in this process."""
    torch.set_num_threads(1)
    dtype = CASES[numbers[0]].dtype
    for small in (Case("sweep", 64, 1024, 512, dtype), Case("sweep", 64, 1024, 512, dtype, budget=2**15)):
        run_case(Problem(small), methods(small), rounds=1)  # loads what the first call ever loads
    runs = []
    for case in (CASES[i] for i in numbers):
        problem, available = problem_and_methods(case)
        wanted = {name: method for name, method in available.items() if not (again and name in ONCE)}
        runs.append(run_case(problem, wanted, rounds))
    return runs


def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = report.parser(MODULE, __doc__, processes=3)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs="+", type=int, help=argparse.SUPPRESS)  # runs these cases and prints JSON
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)  # in a worker: not the first
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args.worker, args.rounds, args.again)))
        return
    chosen = report.choose(parser, CASES, args.cases)
    processes, rounds = (1, 1) if args.quick else (args.processes, args.rounds)
    environment = {**report.environment(MODULE), "packages": packages(), "threads": 1}
    settings = {"processes": processes, "rounds": rounds}
    measured: list[dict[str, Any]] = []

    def save(cells: list[dict[str, Any]]) -> None:
        """After every group, so that a run cut short leaves what it has."""
        measured[:] = cells
        if args.out:
            results.write(args.out, {MODULE: environment | settings | {"results": cells}})

    measure(chosen, processes, rounds, save)
    print(markdown(measured))


if __name__ == "__main__":
    main()
