"""Where a target puts the bytes that it is given: readers take paths."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

FOLDER = Path(tempfile.mkdtemp(prefix="raddpo-fuzz-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


def names(error: Exception, path: Path) -> None:
    """Fails unless the error says which file is wrong, and in words that can be logged."""
    message = str(error)
    assert message.startswith(str(path)), message
    message.encode()
