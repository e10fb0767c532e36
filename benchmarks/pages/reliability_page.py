"""``docs/reliability.md`` from the records of ``make mutants``, ``make fuzz`` and ``make sanitize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness.catalogues import ROOT
from benchmarks.harness.report import markdown
from benchmarks.pages.page import details, fill
from raddpo_ext._files import replacing

PAGE = ROOT / "docs" / "reliability.md"
NOT_YET = "Not run yet."


def mutants(record: dict[str, Any]) -> str:
    found = record["mutants"]
    caught = [mutant for mutant in found if mutant["caught"]]
    text = f"**{len(caught)} of {len(found)} are found** ({_where(record)})."
    return f"{text}\n\n{details('Each fault, and what finds it', mutant_table(found))}"


def mutant_table(found: list[dict[str, Any]]) -> str:
    rows = [[m["op"], m["fault"], f"`{m['by']}`" if m["caught"] else "**survived**"] for m in found]
    return markdown(["operator", "fault", "found by"], rows)


def fuzz(record: dict[str, Any]) -> str:
    head = ["target", "engine", "minutes", "CPU minutes", "inputs at the start", "executions", "new units", "crashes"]
    rows = [
        [
            f"`{target}`",
            run["engine"],
            f"{run['seconds'] / 60:.0f}",
            f"{run['cpu_seconds'] / 60:.0f}",
            f"{run['inputs']}",
            f"{run['executions']:,}",
            f"{run['new_units']}",
            f"{len(run['crashes'])}",
        ]
        for target, run in record.items()
    ]
    commits = ", ".join(dict.fromkeys(run["commit"] for run in record.values()))
    return f"{markdown(head, rows)}\n\nCommit {commits}; minutes are the wall's, on a machine with other work."


def sanitize(record: dict[str, Any]) -> str:
    rows = [[run["what"], run["sanitizer"], f"{run['tests']}", run["verdict"]] for run in record["runs"]]
    return f"{markdown(['what', 'sanitizer', 'tests', 'verdict'], rows)}\n\n{record['compiler']} ({_where(record)})."


def _where(record: dict[str, Any]) -> str:
    return f"commit {record['commit']}"


RECORDS = {
    "mutants": (ROOT / "mutants" / "results.json", mutants),
    "fuzz": (ROOT / "fuzz" / "results.json", fuzz),
    "sanitize": (ROOT / "cpp_tests" / "sanitize.json", sanitize),
}


def render(page: str) -> str:
    return fill(page, {name: _block(path, text) for name, (path, text) in RECORDS.items()})


def _block(path: Path, text: Any) -> str:
    return text(json.loads(path.read_text())) if path.exists() else NOT_YET


def write() -> None:
    text = render(PAGE.read_text())
    with replacing(PAGE) as file:
        file.write(text.encode())
