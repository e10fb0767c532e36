"""The scripts of examples/ run and print what they should; the notebook is train.py cell by cell, and runs too.

``python -m python_tests.project.test_examples`` writes the notebook anew.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import raddpo_ext as rx

EXAMPLES = Path(__file__).parents[2] / "examples"
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder where train.py ran, and what it printed."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("train")
    return folder / "train_example", run("train.py", folder=folder)


def results(printed: str) -> dict[str, tuple[float, float]]:
    """Of each stage the recall and the accuracy."""
    line = r"(SFT|RAD-DPO): recall@10 (\d\.\d\d), accuracy (\d\.\d\d)"
    return {name: (float(recall), float(right)) for name, recall, right in re.findall(line, printed)}


def check_results(printed: str) -> None:
    """Of 200 items 10 at random are a recall of 0.05; an ordered item beats a seen one by chance half of the time."""
    found = results(printed)
    assert list(found) == ["SFT", "RAD-DPO"]
    for recall, accuracy in found.values():
        assert 0.1 < recall <= 1
        assert 0.55 < accuracy <= 1
    assert found["RAD-DPO"][1] >= found["SFT"][1]


def test_train(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    check_results(printed)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(log) == 220
    assert all(visit["ordered"] not in visit["seen"] for visit in log)


def test_retrieve(trained: tuple[Path, str]) -> None:
    """Items of the catalogue with their SIDs, best first, of the prompt's kind; scores are the model's own."""
    from transformers import AutoModelForCausalLM

    folder, _ = trained
    index = rx.TrieIndex.load(folder / "catalogue.index")
    visit = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    sids = index.sids_of(torch.tensor(visit["history"]))
    prompt = [0, *index.vocab.encode(sids).flatten().tolist()]
    words = [str(folder / "model"), str(folder / "catalogue.index"), *map(str, prompt)]
    lines = run("retrieve.py", *words, folder=folder).splitlines()
    found = [re.fullmatch(r"item (\d+)  SID (\[.*\])  log-prob (-\d+\.\d\d)", line).groups() for line in lines]
    items, codes = torch.tensor([int(item) for item, _, _ in found]), torch.tensor([json.loads(c) for _, c, _ in found])
    scores = torch.tensor([float(score) for _, _, score in found])
    assert len(set(items.tolist())) == 5
    assert torch.equal(index.sids_of(items), codes)
    assert torch.equal(scores, scores.sort(descending=True).values)
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokens = index.vocab.encode(codes)
    with torch.no_grad():
        logits = model(torch.cat((torch.tensor([prompt]).expand(5, -1), tokens), 1)).logits[:, len(prompt) - 1 : -1]
    own = logits.log_softmax(-1).gather(2, tokens[..., None]).sum((1, 2))
    torch.testing.assert_close(scores, own, rtol=0, atol=0.01)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its code cells, one after another, in one namespace."""
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    check_results(capsys.readouterr().out)
    assert rx.TrieIndex.load(tmp_path / "train_example/catalogue.index").num_items == len(names["sids"])


def test_the_notebook_is_the_script() -> None:
    assert json.loads(NOTEBOOK.read_text()) == notebook()


def test_loss_loop(tmp_path: Path) -> None:
    lines = run("loss_loop.py", folder=tmp_path).splitlines()
    losses = [float(re.fullmatch(r"step \d+: loss (\d\.\d+), accuracy \d\.\d\d", line)[1]) for line in lines]
    assert losses == sorted(losses, reverse=True)
    assert lines[-1].endswith("accuracy 1.00")


if __name__ == "__main__":
    NOTEBOOK.write_text(json.dumps(notebook(), indent=1) + "\n")
