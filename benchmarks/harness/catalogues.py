"""The real catalogues that the benchmarks search, where their files are at hand; synthetic ones are in
:mod:`raddpo_ext.bench.catalogues`.

Real catalogues are read from the folder that the environment variable RADDPO_DATA names, by default ``../shared/data``
beside the repository. They are not part of the project.
"""

import json
import os
import re
from pathlib import Path

import numpy as np

from raddpo_ext.bench.compare import Missing

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("RADDPO_DATA", ROOT.parent / "shared" / "data"))
INDEX_FILES = {
    "industrial": "industrial/Industrial_and_Scientific.index.json",
    "instruments": "instruments/Instruments.index.json",
}


def present(name: str) -> bool:
    return (DATA / INDEX_FILES[name]).exists()


def real(name: str) -> np.ndarray:
    """int32 ``[items, levels]`` codes of a real catalogue in the layout ``{"item": ["<a_12>", "<b_7>", ...]}``."""
    if not present(name):
        raise Missing(f"the catalogue {name!r} is not at {INDEX_FILES[name]} under RADDPO_DATA")
    sids = json.loads((DATA / INDEX_FILES[name]).read_text(encoding="utf-8")).values()
    return np.array([[int(re.search(r"_(\d+)>$", token)[1]) for token in sid] for sid in sids], np.int32)
