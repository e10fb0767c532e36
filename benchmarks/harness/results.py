"""Result files: a line of JSON for each run, then a line for each of its cells.

A run's line holds its name under ``run``, and its command, commit, machine and versions; a cell has no key ``run``.
What can be computed from the cells is not in the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raddpo_ext._files import replacing

Results = dict[str, dict[str, Any]]  # by run; its cells are under "results"


def read(path: Path) -> Results:
    """What :func:`write` wrote; nothing where there is no file. Raises ValueError for a cell before the first run."""
    found: Results = {}
    cells: list[dict[str, Any]] | None = None
    for line in path.read_text().splitlines() if path.exists() else ():
        value = json.loads(line)
        if "run" in value:
            name, cells = value.pop("run"), []
            found[name] = value | {"results": cells}
        elif cells is None:
            raise ValueError(f"{path}: the first line must have the key 'run', got {line[:80]}")
        else:
            cells.append(value)
    return found


def write(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the file whole or not at all. Raises ValueError for a cell with the key ``run``."""
    lines: list[Mapping[str, Any]] = []
    for name, run in results.items():
        lines.append({"run": name} | {key: value for key, value in run.items() if key != "results"})
        for cell in run["results"]:
            if "run" in cell:
                raise ValueError(f"a cell of {name} must not have the key 'run', got {cell['run']!r}")
            lines.append(cell)
    write_lines(path, lines)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def milliseconds(cell: Mapping[str, Any]) -> dict[str, float]:
    """A cell's wall times by method. A copy moves every byte twice; reading twice and writing once, a loss's floor,
    moves it three times."""
    found = {name: cost["ms"] for name, cost in cell["costs"].items()}
    return found | ({"bytes": 1.5 * found["copy"]} if "copy" in found else {})
