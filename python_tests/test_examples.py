"""The loop of examples/ runs and prints what it should; the notebook is train.py cell by cell.

``python -m python_tests.test_examples`` writes the notebook anew.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "train.ipynb"


def notebook() -> dict[str, Any]:
    """train.py in nbformat 4.5: a text and a code cell for each of its ``# %%``."""
    about, *parts = re.split(r"^# %% (.*)\n", (EXAMPLES / "train.py").read_text(), flags=re.MULTILINE)
    cells = [("markdown", about.strip().strip('"'))]
    for title, code in zip(parts[::2], parts[1::2], strict=True):
        cells += [("markdown", title), ("code", code.strip())]
    return {
        "cells": [
            {"cell_type": kind, "id": f"cell{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
            | ({"execution_count": None, "outputs": []} if kind == "code" else {})
            for number, (kind, text) in enumerate(cells)
        ],
        "metadata": {"language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def run(*words: str, folder: Path) -> str:
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES.parent)!r}); sys.argv = {list(words)!r}; "
    code += f"import runpy; runpy.run_path({str(EXAMPLES / words[0])!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_notebook_is_the_script() -> None:
    assert json.loads(NOTEBOOK.read_text()) == notebook()


def test_loss_loop(tmp_path: Path) -> None:
    lines = run("loss_loop.py", folder=tmp_path).splitlines()
    losses = [float(re.fullmatch(r"step \d+: loss (\d\.\d+), accuracy \d\.\d\d", line)[1]) for line in lines]
    assert losses == sorted(losses, reverse=True)
    assert lines[-1].endswith("accuracy 1.00")


if __name__ == "__main__":
    NOTEBOOK.write_text(json.dumps(notebook(), indent=1) + "\n")
