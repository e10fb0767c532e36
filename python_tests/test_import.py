"""``import raddpo_ext as rx`` shows what a user needs, and loads none of the packages that are extras."""

import shutil
import subprocess
import sys
from pathlib import Path

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


def test_sources_that_are_not_compiled(tmp_path: Path) -> None:
    """As in a checkout from which the package was installed: the folder shadows what is installed."""
    shutil.copytree(ROOT / "raddpo_ext", tmp_path / "raddpo_ext", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    done = run("import raddpo_ext", tmp_path)
    assert done.returncode == 1
    message = f"ImportError: {tmp_path}/raddpo_ext holds sources without the compiled extension: run `make build` in"
    assert done.stderr.splitlines()[-1].startswith(message)


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
