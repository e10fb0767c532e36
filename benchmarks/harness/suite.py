"""Every benchmark of the CPU in one run, into one file, and the page that shows it::

    python -m benchmarks                       # what has not been measured since the sources changed; hours
    python -m benchmarks --only trie packing   # these, whatever there is
    python -m benchmarks --quick               # a minute a member, to see that all works: .benchmarks/, no page
    python -m benchmarks --report              # only docs/benchmarks.md, its figures and the README's table

``benchmarks/results/<machine>.jsonl`` holds a run for each member (:mod:`benchmarks.harness.results`): its command,
commit, machine and versions, the digest of the sources that the member's operators are built of, and under ``measured``
the wall time and CPU time of the whole member, its processes together, and the peak memory of the largest of them. It
is written after each member; a run that was stopped goes on where it was. A member that fails leaves what there was,
and the others run; then the exit code is 1. A name ``member/part`` is a part that was measured by itself; it goes when
the member is measured again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import catalogues, report, results, sources
from benchmarks.harness.catalogues import ROOT
from benchmarks.harness.results import Results
from benchmarks.pages import readme_page, reliability_page, scaling_page, suite_page


@dataclass(frozen=True)
class Member:
    """``python -m <command>``, which measures what is built of ``sources``; ``quick`` are its further options under
    ``--quick``."""

    name: str
    command: tuple[str, ...]
    minutes: float
    sources: tuple[str, ...]
    quick: tuple[str, ...] = ()
    data: tuple[str, ...] = ()  # real catalogues that it cannot do without

    @property
    def lacks(self) -> str:
        """Why it cannot run here, or nothing."""
        missing = [name for name in self.data if not catalogues.present(name)]
        return f"the catalogue {', '.join(missing)} is not under RADDPO_DATA" if missing else ""


MEMBERS = [
    Member("beam-search", ("benchmarks.peers.compare_beam_search",), 12, sources.DECODING, ("--cases", "V2048")),
    Member("trie", ("benchmarks.bench_trie",), 30, sources.INDEX, ("--cases", "uniform 1M")),
    Member("trie-live", ("benchmarks.bench_trie_live",), 6, sources.DECODING),
    Member("sids", ("benchmarks.bench_sids",), 10, sources.SIDS),
    Member("losses", ("benchmarks.peers.compare_losses",), 35, sources.LOSSES, ("--cases", "x1024 H512")),
    Member(
        "packing", ("benchmarks.peers.compare_packing",), 15, sources.PACKING, ("--cases", "prompt=32 candidates=4 ")
    ),
    Member("whole-steps", ("benchmarks.peers.compare_whole_steps",), 15, sources.PACKING, ("--cases", "V=8k")),
    Member("retriever", ("benchmarks.peers.compare_retriever",), 20, sources.RETRIEVAL, data=("industrial",)),
    Member("generate", ("benchmarks.peers.compare_generate",), 5, sources.RETRIEVAL, data=("industrial",)),
    Member("training-ops", ("benchmarks.peers.compare_training_ops",), 5, sources.POLICY, ("--cases", "512 rows")),
    Member("policy-steps", ("benchmarks.peers.compare_policy_steps",), 15, sources.POLICY, data=("instruments",)),
    Member("engines", ("benchmarks.peers.compare_engines",), 15, sources.RETRIEVAL, data=("instruments",)),
    Member("scaling", ("benchmarks.scaling",), 20, sources.OPERATORS),
    Member("load", ("benchmarks.load",), 10, sources.SERVICE, ("--cases", "small, 1 worker, max-batch 1")),
    Member("load-peer", ("benchmarks.load", "--mode", "peer"), 5, sources.SERVICE),
    Member("load-soak", ("benchmarks.load", "--mode", "soak"), 32, sources.SERVICE),
]


class Failed(Exception):
    """A member ended without a result."""


def machine_slug() -> str:
    """CPU model and cores as a file's name."""
    return re.sub("[^a-z0-9]+", "-", f"{report.cpu_model()} {os.cpu_count()} cores".lower()).strip("-")


def up_to_date(member: Member, found: Results) -> bool:
    """Whether its sources are those that were measured; where they are not known any more, they are not."""
    run = found.get(member.name, {})
    return "skipped" not in run and run.get("sources") == sources.digest(member.sources)


def run(member: Member, quick: bool = False) -> dict[str, Any]:
    """Its result, measured now."""
    with tempfile.TemporaryDirectory(prefix="suite-") as folder:
        out = Path(folder) / "result.jsonl"
        options = ("--quick", *member.quick) if quick else ()
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", *member.command, *options, "--out", str(out)],
            cwd=ROOT,
        )
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise Failed(f"exit code {process.returncode}")
        if not out.exists():
            raise Failed("no result was written")
        (result,) = results.read(out).values()
    whole = {
        "wall_s": time.monotonic() - start,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_bytes": 1024 * used.ru_maxrss,
    }
    command = " ".join(("python -m", *member.command, *options))
    return {**result, "command": command, "sources": sources.digest(member.sources), "measured": whole}


def put(found: Results, name: str, result: dict[str, Any], members: Sequence[Member]) -> Results:
    """The results with this one, in the members' order, parts after their member; its former parts are gone."""
    kept = {key: value for key, value in found.items() if key.split("/")[0] != name} | {name: result}
    order = {member.name: place for place, member in enumerate(members)}
    return dict(sorted(kept.items(), key=lambda item: (order.get(item[0].split("/")[0], len(order)), item[0])))


def run_all(members: Sequence[Member], only: Sequence[str], path: Path, quick: bool = False) -> list[str]:
    """Runs what is named, or else what is not up to date; returns a line for each that failed."""
    found = results.read(path)
    chosen = [m for m in members if (m.name in only if only else not up_to_date(m, found))]
    minutes = sum(found.get(m.name, {}).get("measured", {}).get("wall_s", 60 * m.minutes) / 60 for m in chosen)
    duration = f"about {len(chosen)} minutes" if quick else f"about {minutes:.0f} minutes"
    print(f"{len(chosen)} of {len(members)} members to run, {duration}: {', '.join(m.name for m in chosen)}")
    print(f"results: {path}; stopped, the same command goes on where it was", flush=True)
    failures = []
    for member in chosen:
        print(f"== {member.name}", flush=True)
        if member.lacks:
            print(f"skipped: {member.lacks}")
            if member.name in found:
                continue
            result = {**report.environment(member.command[0]), "skipped": member.lacks, "results": []}
        else:
            try:
                result = run(member, quick)
            except Failed as failed:
                failures.append(f"{member.name}: {failed}")
                continue
        found = put(results.read(path), member.name, result, members)
        results.write(path, found)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    names = [member.name for member in MEMBERS]
    parser.add_argument("--only", nargs="+", default=[], choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--machine", default=machine_slug(), help="name of the results' file (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="as short as it can be, into .benchmarks/")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the pages of the results")
    args = parser.parse_args()
    folder = ROOT / ".benchmarks" if args.quick else report.RESULTS
    path = folder / f"{args.machine}.jsonl"
    if args.report and not path.exists():
        parser.error(f"there is no {path}; --machine names another machine's results")
    failures = [] if args.report else run_all(MEMBERS, args.only, path, args.quick)
    if path.exists() and not args.quick:
        found = results.read(path)
        suite_page.write(found, path, names)
        if "scaling" in found:
            scaling_page.write(found["scaling"], ROOT / "docs")
        reliability_page.write()
        readme_page.write(found)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0
