"""Fixtures of the whole suite and hypothesis' profile."""

from __future__ import annotations

import fcntl
import gc
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from support.cuda_on_cpu.ptx_kernels import compiled_ptx, nvcc
from support.cuda_on_cpu.shim import SANITIZE, Shim, compiler
from support.instruction_sets import ISAS

from raddpo_ext import _C

# Examples differ in cost by 100x, and fixtures that choose an instruction set or a thread count hold for all examples.
# A failure is cut down to its least example only where somebody waits for it: that takes minutes.
CI = bool(os.environ.get("CI"))
settings.register_profile(
    "raddpo",
    deadline=None,
    max_examples=40,
    derandomize=CI,
    phases=[Phase.explicit, Phase.generate] if CI else list(Phase),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("raddpo")


# Files that take longest, longest first: pytest-xdist hands files out in this order, so that no core idles at the end.
SLOWEST = (
    *("test_cuda_on_cpu", "test_cpp", "test_packaging", "test_fake_cuda", "test_ray_serve", "test_session_loss_cuda"),
    *("test_beam_step", "test_linear_beam_step", "test_model_families", "test_docs", "test_sample_step", "test_serve"),
    *("test_policy_trainer_distributed", "test_demo", "test_alignment", "test_demo_purchases"),
    *("test_trainer_distributed", "test_page", "test_examples", "test_retriever", "test_policy_trainer"),
    *("test_trie_live", "test_catalogue_store", "test_bench", "test_serve_names", "test_graphed", "test_import"),
    *("test_trainer", "test_trainer_adapters", "test_token_logps_cuda", "test_serve_search", "test_faults_training"),
    *("test_trainer_habits", "test_probes", "test_leaks", "test_session_loss"),
)
SLOW_FOLDERS = ("gpu", "project")
SLOW_FILE = re.compile(r"^pytestmark = (\[[^]]*)?pytest\.mark\.slow\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What ``-m "not slow"`` leaves out as a whole is not imported: that alone takes longer than many a test."""
    if "not slow" not in config.option.markexpr:
        return None
    slow = collection_path.suffix == ".py" and SLOW_FILE.search(collection_path.read_text())
    return True if slow or collection_path.name in SLOW_FOLDERS else None


# The modules and tests that are loaded live to the end: to go through them again and again, as they come and at each of
# a Trainer's `gc.collect()`, takes a tenth of the time.
gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slowest files first, and marks what a test's folder or fixtures say of it."""
    place = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "browser" in fixtures:
            item.add_marker(pytest.mark.browser)
        if "shim" in fixtures or item.path.parent.name in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set."""
    if ISAS.index(request.param) > ISAS.index(_C.best_isa()):
        pytest.skip(f"this CPU has no {request.param}")
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test on one thread and on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


_WAYS: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


@pytest.fixture
def probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes a model once, however many retrievers are made for it: for tests that leave their models as they are."""
    from raddpo_ext.integrations import retriever

    verify = retriever.verify

    def remembered(model: Any, head: Any, shared: Any) -> Any:
        key = (model.device, model.config._attn_implementation, head is None, getattr(shared, "func", shared))
        found = _WAYS.setdefault(model, {})
        if key not in found:
            found[key] = verify(model, head, shared)
        return found[key]

    monkeypatch.setattr(retriever, "verify", remembered)


@pytest.fixture(scope="session")
def shim_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the CUDA kernels' source is compiled for the CPU, once for all of pytest-xdist's workers."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent
    folder /= "cuda_on_cpu"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", params=["source", "ptx"])
def shim(request: pytest.FixtureRequest, shim_folder: Path) -> Shim:
    """The CUDA kernels, compiled for the CPU: from their source, and from what nvcc makes of it."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler (g++, or the one named by CXX)")
    if request.param == "ptx":
        if SANITIZE in os.environ:
            pytest.skip("the compiled PTX is not sanitized")
        if nvcc() is None:
            pytest.skip("needs nvcc, in CUDA_HOME or /usr/local/cuda")
    with (shim_folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker compiles, the others wait
        return Shim(shim_folder, compiled_ptx(shim_folder) if request.param == "ptx" else ())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive a browser")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium: no chromium, chromium-browser or google-chrome in PATH")
    quiet = ("quic", "background-networking", "component-update", "sync")
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes the one disk of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs to mount a small disk: {error}")
        return folder

    yield make
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def data_dir() -> Path:
    """The folder of the public catalogues."""
    path = Path(os.environ.get("RADDPO_DATA", Path(__file__).parents[2] / "shared/data"))
    if not path.is_dir():
        pytest.skip(f"no public catalogues at {path}; RADDPO_DATA names their folder")
    return path
