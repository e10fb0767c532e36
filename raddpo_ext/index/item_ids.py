"""Which item ids that are given as text are integers."""

from __future__ import annotations

import re

LARGEST_ITEM = 2**63 - 1  #: The maximum integer item id.


def integer_id(text: str) -> int | None:
    """The integer that a text spells, from 0 to :data:`LARGEST_ITEM` without a leading zero; else None."""
    if not re.fullmatch("0|[1-9][0-9]{0,18}", text):  # int() raises for very long digits
        return None
    return int(text) if int(text) <= LARGEST_ITEM else None
