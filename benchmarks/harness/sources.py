"""What the measured operators are built of: when it changes, their results are stale."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from benchmarks.harness.catalogues import ROOT

SUFFIXES = {".cpp", ".h", ".inl", ".cu", ".cuh", ".py"}

COMMON = ("csrc/common", "raddpo_ext/_check.py", "raddpo_ext/_autograd.py")
INDEX = (*COMMON, "csrc/trie", "csrc/trie_index", "raddpo_ext/index")
STEPS = ("csrc/beam_search", "csrc/child_logits", "csrc/row_lse", "raddpo_ext/decoding", "raddpo_ext/logps/head.py")
DECODING = (*INDEX, *STEPS)
LOGPS = (*COMMON, "csrc/token_logps", "csrc/row_lse", "raddpo_ext/logps", "raddpo_ext/index/vocab.py")
LOSSES = (*LOGPS, "csrc/session_loss", "raddpo_ext/losses")
PACKING = (*LOSSES, "csrc/pack_sessions", "raddpo_ext/data/pack_sessions.py", "raddpo_ext/integrations")
RETRIEVAL = (*DECODING, "raddpo_ext/integrations")
SERVICE = (*RETRIEVAL, "raddpo_ext/data/prompts.py", "raddpo_ext/serve")
OPERATORS = tuple(dict.fromkeys((*DECODING, *LOSSES, "csrc/pack_sessions", "raddpo_ext/data/pack_sessions.py")))


def digest(places: Iterable[str]) -> str:
    """A digest of the text of these files, and of the sources in these folders and their subfolders.

    It ignores the names of the files: moving a file is not an edit.
    """
    texts = set()
    for place in places:
        path = ROOT / place
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in SUFFIXES]
        if not files:
            raise FileNotFoundError(f"there are no sources at {place}")
        texts |= {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16]
