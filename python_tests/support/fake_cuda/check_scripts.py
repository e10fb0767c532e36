"""The scripts of a GPU at tiny sizes on the fake device; run by test_fake_cuda.py."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import bench as gpu_bench
from benchmarks.gpu import losses as gpu_losses
from benchmarks.gpu import report, timing
from benchmarks.gpu import retriever as gpu_retriever
from benchmarks.harness import results
from python_tests.gpu import gpu_sanitize, gpu_suite
from raddpo_ext.bench.session_loss_cases import Case as SessionCase
from raddpo_ext.bench.token_logps_cases import Case as LossCase

SMALL = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True, "max_position_embeddings": 64,
}  # fmt: skip
BF16 = torch.bfloat16


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every constant that is a size."""
    for module, values in (
        (timing, {"COPY_BYTES": 1 << 12, "PRODUCT_SIZE": 16, "REPLAYS": 2, "STEPS": 2}),
        (gpu_bench, {"STEPS": 2}),
        (gpu_retriever, {"PROMPT": 8, "CODES": 8, "ITEMS": 200, "VOCAB": 120, "SHAPE": SMALL, "TOP_K": 3, "CALLS": 1}),
        (gpu_retriever, {"CASES": [(2, 5, "vocab"), (1, 5, "trie")]}),
        (gpu_bench, {"LOGITS_CASES": [gpu_bench.LogitsCase(4, 100, BF16), gpu_bench.LogitsCase(4, 100, BF16, 20)]}),
        (
            gpu_bench,
            {"CASES": [gpu_bench.Case(200, 8, 3, 2, 5, BF16), gpu_bench.Case(50, 8, 3, 1, 4, BF16, 60, "level")]},
        ),
        (gpu_losses, {"SESSION_CASES": [SessionCase("winner", sessions=4)]}),
        (
            gpu_losses,
            {"CASES": [LossCase("peers", 64, 90, 16, torch.float32, length=4), LossCase("sft", 8, 90, 16, BF16)]},
        ),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


def run(monkeypatch: pytest.MonkeyPatch, module: Any, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


def test_gpu_bench(tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, gpu_bench, "--out", str(tmp_path / "bench.jsonl"))
    result = results.read(tmp_path / "bench.jsonl")["gpu_bench"]
    parts = Counter(cell["part"] for cell in result["results"])
    expected = {"retriever": 2, "linear_steps": 4, "steps": 6, "token_logps": 2, "session_losses": 1, "losses": 2}
    assert parts == expected
    step = next(cell for cell in result["results"] if cell["part"] == "steps")
    assert len(step["kernels_us"]) >= 2, "kernels were merged under one name"
    assert result["gpu"]["name"] == "fake"


def test_measure_step_asks_for_rows_of_states(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["raddpo_ext.decoding.linear_beam_step"]
    shapes = []
    real = module._level_is_cheaper
    monkeypatch.setattr(
        module, "_level_is_cheaper", lambda hidden, *rest: shapes.append(hidden.shape) or real(hidden, *rest)
    )
    gpu_retriever.measure_step(gpu_retriever.make_model(), gpu_retriever.make_index(), 2, 5, 1)
    assert shapes[-1] == (10, 32)


def test_gpu_sanitize_drives_every_kernel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, gpu_sanitize, "--drive")
    assert gpu_sanitize.DRIVEN in capsys.readouterr().out


def test_gpu_suite_runs_the_tests_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        pytest, "main", lambda arguments, plugins: given.append(arguments) or plugins[0].pytest_sessionfinish(0) or 0
    )
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, gpu_suite, "--out", str(tmp_path / "suite.jsonl"))
    files = [Path(argument).name for argument in given[0] if argument.endswith(".py")]
    assert files[0] == "test_gpu.py"
    assert all(name.startswith("test_gpu") for name in files)
    assert results.read(tmp_path / "suite.jsonl")["gpu_test"]["finished"]


def test_gpu_report() -> None:
    assert report.gpu_environment("x")["gpu"]["capability"] == "9.0"
    report.require_gpu()
