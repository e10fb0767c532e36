"""What the measured operators are built of: when it changes, their results are stale."""

from __future__ import annotations

import ast
import hashlib
import io
import re
import tokenize
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness.catalogues import ROOT

SUFFIXES = {".cpp", ".h", ".inl", ".cu", ".cuh", ".py"}
_BODIES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)  # have docstrings

COMMON = ("csrc/common", "raddpo_ext/_check.py", "raddpo_ext/_choices.py", "raddpo_ext/_autograd.py")
PRODUCTS = ("raddpo_ext/_matmul.py",)
INDEX = (*COMMON, "csrc/trie", "csrc/trie_index", "raddpo_ext/index", "raddpo_ext/_command_line.py")
STEPS = (
    "csrc/beam_search",
    "csrc/child_logits",
    "csrc/row_lse",
    "raddpo_ext/decoding",
    "raddpo_ext/logps/head.py",
    *PRODUCTS,
)
DECODING = (*INDEX, *STEPS)
SIDS = (*COMMON, *PRODUCTS, "csrc/assign_balanced", "raddpo_ext/sids", "raddpo_ext/index/writers.py")
LOGPS = (*COMMON, *PRODUCTS, "csrc/token_logps", "csrc/row_lse", "raddpo_ext/logps", "raddpo_ext/index/vocab.py")
LOSSES = (*LOGPS, "csrc/session_loss", "raddpo_ext/losses")
PROMPTS = ("raddpo_ext/data/merged_ids.py", "raddpo_ext/integrations")
PACKING = (*LOSSES, "csrc/pack_sessions", "raddpo_ext/data/pack_sessions.py", "raddpo_ext/data/pack_pages.py", *PROMPTS)
RETRIEVAL = (*DECODING, *PROMPTS)
POLICY = (
    *dict.fromkeys((*PACKING, *DECODING)),
    *("csrc/sample_step", "csrc/group_advantages", "csrc/policy_loss", "raddpo_ext/policy"),
)
SERVICE = (*RETRIEVAL, "raddpo_ext/data/prompts.py", "raddpo_ext/serve")
OPERATORS = tuple(dict.fromkeys((*DECODING, *LOSSES, "csrc/pack_sessions", "raddpo_ext/data/pack_sessions.py")))


def digest(places: Iterable[str]) -> str:
    """A digest of the code of these files, and of the sources in these folders and their subfolders.

    It ignores what does not run: the names of the files, comments, docstrings and layout.
    """
    texts = set()
    for place in places:
        path = ROOT / place
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in SUFFIXES]
        if not files:
            raise FileNotFoundError(f"there are no sources at {place}")
        texts |= {hashlib.sha256(code_of(file).encode()).hexdigest() for file in files}
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16]


def code_of(file: Path) -> str:
    """A source's text without comments, docstrings and layout.

    By position and not as a syntax tree, whose text differs from one Python to the next.
    """
    text = file.read_text()
    if file.suffix != ".py":
        kept = re.sub(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', r"\1", text, flags=re.DOTALL)
        return "\n".join(line for line in map(str.strip, kept.splitlines()) if line)
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        first = node.body[0] if isinstance(node, _BODIES) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            for row in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())
