"""docs/models.md says of every family what is found with the installed transformers, and the scores are right."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")
from support import model_families  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("family", "name"), model_families.FAMILIES)
def test_page_says_what_is_found(family: str, name: str) -> None:
    page = model_families.PAGE.read_text()
    if f"{model_families.heading()}:" not in page:
        pytest.skip(f"docs/models.md was made with another transformers than the installed {transformers.__version__}")
    found = model_families.look(family, name)
    assert model_families.right(family, found), found
    assert model_families.line(family, name, found) in page.splitlines()
