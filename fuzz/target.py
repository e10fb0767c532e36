"""One Python target under atheris: ``python -m fuzz.target NAME [options of libFuzzer] [folders of inputs]``."""

from __future__ import annotations

import importlib
import logging
import sys

import atheris


def main() -> None:
    name = sys.argv.pop(1)
    logging.disable()  # what is skipped of a session log is said in a warning
    with atheris.instrument_imports(include=["raddpo_ext"]):
        module = importlib.import_module(f"fuzz.{name}")
    mutate = getattr(module, "mutate", None)
    atheris.Setup(sys.argv, module.run, **({"custom_mutator": mutate} if mutate else {}))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
