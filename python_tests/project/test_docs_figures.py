"""The figures of docs/mathematics.md are those that their script draws, and the page shows every one."""

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from matplotlib.image import imread

from docs.figures import make_math

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_figures_are_up_to_date(tmp_path: Path) -> None:
    make_math.main(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (DOCS / "figures").glob("math-*.png"))
    assert drawn == sorted(re.findall(r"\]\(figures/(.*?)\)", (DOCS / "mathematics.md").read_text()))
    for name in drawn:
        new, committed = imread(tmp_path / name), imread(DOCS / "figures" / name)
        assert new.shape == committed.shape, name
        assert abs(new - committed).mean() < 0.005, name  # another font renderer moves a few pixels
