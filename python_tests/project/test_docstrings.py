"""The examples in the docstrings of the public names: each runs, and prints what it shows."""

from __future__ import annotations

import doctest
import inspect
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import raddpo_ext as rx

GLOBALS = {"rx": rx, "torch": torch}  # docs/reference/index.md says that examples have these names
#: What an example needs beyond the dependencies of the package.
NEEDS = {
    "rx.SIDRetriever": "transformers",
    "rx.negatives.BeamNegatives": "transformers",
    "rx.read_sessions": "datasets",
}


def public_names() -> dict[str, Any]:
    """Every public name with what it is: those of ``rx.__all__``, of its modules, and of the training integration."""
    names = {f"rx.{name}": getattr(rx, name) for name in rx.__all__}
    for name, module in list(names.items()):
        if isinstance(module, ModuleType):
            del names[name]
            names |= {f"{name}.{member}": value for member, value in vars(module).items() if is_public(module, member)}
    if find_spec("transformers"):
        from raddpo_ext.integrations import transformers

        names |= {name: getattr(transformers, name) for name in transformers.__all__}
    return names


def is_public(module: ModuleType, name: str) -> bool:
    """Whether a module lists a name in ``__all__`` or, without that, defines a function or class of this name."""
    value = getattr(module, name)
    if hasattr(module, "__all__"):
        return name in module.__all__
    return not name.startswith("_") and callable(value) and value.__module__ == module.__name__


def examples_of(name: str, value: Any) -> list[doctest.DocTest]:
    """The examples of a name and, for a class, of its methods."""
    found = doctest.DocTestFinder(exclude_empty=True).find(value, name, globs=GLOBALS)
    return [test for test in found if test.examples]


EXAMPLES = {  # a constant has no docstring of its own
    name: examples_of(name, value)
    for name, value in public_names().items()
    if inspect.isclass(value) or inspect.isfunction(value)
}


@pytest.mark.parametrize("name", [name for name, found in EXAMPLES.items() if found])
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"the example of {name} needs {NEEDS[name]}")
    monkeypatch.chdir(tmp_path)  # for examples that write files
    report: list[str] = []
    for test in EXAMPLES[name]:
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert not report, "".join(report)


def test_a_wrong_example_is_told() -> None:
    def wrong() -> None:
        """One is not two.

        Example:
            >>> 1
            2
        """

    (test,) = examples_of("wrong", wrong)
    report: list[str] = []
    doctest.DocTestRunner().run(test, out=report.append)
    assert "Expected:\n    2\nGot:\n    1\n" in "".join(report)


def test_every_public_name_has_an_example() -> None:
    without = [name for name, found in EXAMPLES.items() if not found and not name.startswith("rx.reference.")]
    assert not without  # the functions of rx.reference have the examples of those that they explain
