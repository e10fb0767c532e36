"""A run killed while it writes a checkpoint, or whose disk is full, goes on from the last one that is whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from support.trainer_runs import assert_same, assert_same_history
from test_trainer import ROWS, qwen3, run, seeded

from raddpo_ext.integrations.checkpoints import last_whole_checkpoint

pytestmark = pytest.mark.slow

OPTIONS = {"batch": 4, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
STATE = "trainer_state.json"

# At its second checkpoint the run forks writers, each of which goes on in a copy of the run's folder and is killed once
# there are so many files.
KILLED = """
import os, shutil, signal, sys, time
from test_trainer import ROWS, qwen3, run, seeded
from test_faults_training import OPTIONS
from transformers import Trainer

folder, save = sys.argv[1], Trainer._save_checkpoint

def save_and_die(self, model, trial):
    if self.state.global_step == 3:
        return save(self, model, trial)
    for files in range(10):
        copy = f"{folder}-{files}"
        shutil.copytree(folder, copy)
        checkpoint = f"{copy}/checkpoint-6"
        child = os.fork()
        if not child:
            self.args.output_dir = copy
            save(self, model, trial)
            os._exit(0)
        end = time.monotonic() + 5  # a fork may wait for ever for a lock of a thread that it does not have
        while not os.path.isdir(checkpoint) or len(os.listdir(checkpoint)) < files:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) or time.monotonic() > end:
                break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os._exit(0)

Trainer._save_checkpoint = save_and_die
run(seeded(qwen3), ROWS, output_dir=folder, **OPTIONS)
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(seeded(qwen3), ROWS, output_dir=str(folder), **OPTIONS)


def assert_goes_on(folder: Path, unbroken: Any) -> None:
    again = run(seeded(qwen3), ROWS, output_dir=str(folder), resume=True, **OPTIONS)
    assert_same(again.parameters, unbroken.parameters, 0)
    assert_same_history(again.history[:-1], unbroken.history[:-1], 0)
    assert last_whole_checkpoint(str(folder)) == str(folder / "checkpoint-6")


def test_killed_while_writing_a_checkpoint(tmp_path: Path, unbroken: tuple[Path, Any]) -> None:
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        "OMP_NUM_THREADS": "1",  # a fork has none of its parent's threads
    }
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    broken = {}
    for folder in tmp_path.glob("run-*"):
        whole = last_whole_checkpoint(str(folder))
        assert whole is not None
        if whole.endswith("checkpoint-3"):
            broken[tuple(sorted(os.listdir(folder / "checkpoint-6")))] = folder
    assert broken, "no kill fell into the writing: the test has shown nothing"
    for folder in list(broken.values())[::3]:
        assert_goes_on(folder, unbroken[1])


def test_every_part_of_a_checkpoint(tmp_path: Path, unbroken: tuple[Path, Any]) -> None:
    """With the first files that are written, and half of the next one."""
    files = sorted((unbroken[0] / "checkpoint-6").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert files[-1].name == STATE, "another file is written after the one that tells that the checkpoint is whole"
    shutil.copytree(unbroken[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-6").mkdir()
    for file in files:
        content = file.read_bytes()
        (tmp_path / "checkpoint-6" / file.name).write_bytes(content[: len(content) // 2])
        assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3")
        (tmp_path / "checkpoint-6" / file.name).write_bytes(content)
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-6")


def test_a_checkpoint_that_is_written_again_is_not_whole_meanwhile(
    tmp_path: Path, unbroken: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    shutil.copytree(unbroken[0], tmp_path, dirs_exist_ok=True)
    seen = []

    def look(self: Any, *_: Any) -> None:
        seen.append(last_whole_checkpoint(str(tmp_path)))

    monkeypatch.setattr(Trainer, "_save_checkpoint", look)
    run(seeded(qwen3), ROWS, output_dir=str(tmp_path), resume=str(tmp_path / "checkpoint-3"), **OPTIONS)
    assert seen == [str(tmp_path / "checkpoint-3")]


def test_nothing_whole(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7").touch()
    for _ in range(2):
        with pytest.raises(ValueError, match="holds no complete checkpoint"):
            run(seeded(qwen3), ROWS, output_dir=str(tmp_path), resume=True, **OPTIONS)
        shutil.rmtree(tmp_path / "checkpoint-6", ignore_errors=True)


@pytest.mark.parametrize("room", [1, 9, 15])
def test_full_disk(small_disk: Callable[[int], Path], unbroken: tuple[Path, Any], room: int) -> None:
    """With room for so many pages of the second checkpoint the run ends with an error; with more it goes on."""
    files = list((unbroken[0] / "checkpoint-3").iterdir())
    size = sum(-(-file.stat().st_size // 4096) for file in files) * 4096
    disk = small_disk(size + room * 4096)
    with pytest.raises(RuntimeError, match=f"{disk}/checkpoint-6 could not be written: .*; is the disk full"):
        run(seeded(qwen3), ROWS, output_dir=str(disk), **OPTIONS)
    assert last_whole_checkpoint(str(disk)) == str(disk / "checkpoint-3")
    subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(disk)], check=True)
    assert_goes_on(disk, unbroken[1])


def test_what_fails_after_a_checkpoint_is_not_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    save = Trainer._save_checkpoint

    def push(*arguments: Any) -> None:
        save(*arguments)
        raise ConnectionError("the hub")

    monkeypatch.setattr(Trainer, "_save_checkpoint", push)
    with pytest.raises(ConnectionError, match="the hub"):
        run(seeded(qwen3), ROWS, output_dir=str(tmp_path), **OPTIONS)
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3")
