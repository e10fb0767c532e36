"""The site: every page is in its navigation, every public name in its reference, and it builds without a warning."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Modules whose names are imported from them, beside the package's own `__all__` and those of the modules below.
MODULES = ("index/readers", "data/catalogue", "data/session_log", "data/negatives", "data/metrics", "serve/ray")
MODULES += ("policy/rewards", "data/session_check", "data/session_report", "integrations/preference_rows")
EXPORTS = ("_public", "integrations/transformers", "reference/__init__")


def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / "raddpo_ext" / f"{module}.py").read_text())


def exported(module: str) -> set[str]:
    """Where each name of a module's ``__all__`` is defined, as ``module.name``."""
    tree = tree_of(module)
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    origin = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return {origin[name] for name in names if not is_module(origin[name])}  # modules have pages of their own


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def defined(module: str) -> set[str]:
    """The public functions and classes that a module defines."""
    return {
        f"raddpo_ext.{module.replace('/', '.')}.{node.name}"
        for node in tree_of(module).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    }


def test_reference_has_every_public_name_once() -> None:
    public = set().union(*map(exported, EXPORTS), *map(defined, MODULES))
    pages = [path.read_text() for path in (DOCS / "reference").glob("*.md")]
    shown = Counter(name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    missing = sorted(public - set(shown))
    assert not missing, f"docs/reference/ lacks {missing}"
    repeated = [name for name, count in shown.items() if count > 1]
    assert not repeated, f"docs/reference/ has more than once {repeated}"


def test_navigation_has_every_page() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text()
    pages = re.findall(r"^ +- (?:.+: )?(\S+\.md)$", configuration[configuration.index("\nnav:") :], re.MULTILINE)
    assert sorted(pages) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_builds_without_a_warning(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: pip install -r docs/requirements.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
    for path in tmp_path.rglob("*.html"):
        page, name = path.read_text(), path.relative_to(tmp_path).as_posix()
        loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?:[^\">\s]+)", page)
        assert not loaded, f"{name} loads something from elsewhere"
        left = re.findall(r'class="arithmatex"|<mi>\\[^<]*|<mi>&amp;', page)
        assert not left, f"{name} has a formula that is no MathML"
