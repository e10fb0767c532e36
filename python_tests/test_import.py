"""``import raddpo_ext as rx`` shows what a user needs, and loads none of the packages that are extras."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import raddpo_ext as rx

rx.read_sids, rx.read_sessions, rx.write_sessions, rx.metrics.retrieval_metrics, rx.negatives.sample_negatives
extras = ("accelerate", "datasets", "fastapi", "pandas", "pyarrow", "ray", "transformers", "trl", "uvicorn")
print([name for name in extras if name in sys.modules], [name for name in rx.__all__ if not hasattr(rx, name)])
"""


def test_import() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n"
