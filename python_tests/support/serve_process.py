"""The service in a process of its own, as a shop starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def serving(model: Path, store: Path, *options: str | Path) -> Iterator[str]:
    """Yields its address."""
    command = [sys.executable, "-m", "raddpo_ext", "serve", "--model", model, "--store", store, "--port", "0", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            yield service.stdout.readline().removeprefix("serving on ").strip()
        finally:
            service.send_signal(signal.SIGTERM)
            service.wait(60)
