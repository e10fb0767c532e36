"""``import raddpo_ext as rx`` shows what a user needs, and loads none of the packages that are extras."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import raddpo_ext as rx

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys
import raddpo_ext as rx

rx.read_sids, rx.read_sessions, rx.write_sessions, rx.metrics.retrieval_metrics, rx.negatives.sample_negatives
extras = ("accelerate", "datasets", "fastapi", "pandas", "pyarrow", "ray", "transformers", "trl", "uvicorn")
print([name for name in extras if name in sys.modules], [name for name in rx.__all__ if not hasattr(rx, name)])
"""


def test_import() -> None:
    assert run(SCRIPT, ROOT).stdout == "[] []\n"


def test_names() -> None:
    """``dir`` shows the public names, each of which is there, and nothing else; a star import brings the same."""
    scope: dict[str, object] = {}
    exec("from raddpo_ext import *", scope)
    assert dir(rx) == sorted(rx.__all__) == sorted(name for name in scope if name != "__builtins__")
    assert all(getattr(rx, name) is value for name, value in scope.items() if name != "__builtins__")
    assert not [name for name in dir(rx) if name.startswith("_")]


@pytest.mark.slow
def test_operators_are_registered_whichever_comes_first() -> None:
    use = "print(torch.ops.raddpo.trie_walk(*[torch.zeros(1, 4, device='meta')] * 3, None).shape)"
    for imports in ("import raddpo_ext, torch", "import torch, raddpo_ext"):
        assert run(f"{imports}; {use}", ROOT).stdout == "torch.Size([1, 5])\n"


@pytest.mark.slow
def test_the_command_line_starts_without_torch() -> None:
    """``python -m raddpo_ext`` alone: another program that Python runs by ``-m`` finds everything loaded."""
    start = "import sys; sys.argv, sys.orig_argv = ['-m', '--help'], ['python', '-m', {!r}, '--help']; "
    start += "import raddpo_ext as rx; print('torch' in sys.modules, rx.__version__); "
    later = "import raddpo_ext.decoding.beam_search; rx._load(); print(rx.beam_search.__name__, 'torch' in sys.modules)"
    done = run(start.format("raddpo_ext") + later, ROOT)
    assert done.stdout == f"False {rx.__version__}\nbeam_search True\n"
    assert run(start.format("raddpo_ext.bench"), ROOT).stdout == f"True {rx.__version__}\n"
    longer = "import sys; sys.argv = ['-m'] + ['x'] * 9; "  # set by a program, such as one that runs others
    assert run(longer + "import raddpo_ext; print('torch' in sys.modules)", ROOT).stdout == "True\n"


def test_sources_that_are_not_compiled(tmp_path: Path) -> None:
    """As in a checkout from which the package was installed: the folder shadows what is installed."""
    shutil.copytree(ROOT / "raddpo_ext", tmp_path / "raddpo_ext", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    done = run("import raddpo_ext", tmp_path)
    assert done.returncode == 1
    message = f"ImportError: {tmp_path}/raddpo_ext holds sources without the compiled extension: run `make build` in"
    assert done.stderr.splitlines()[-1].startswith(message)


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
