"""Item ids as text: which of them are integers."""

from __future__ import annotations

import re

LARGEST_ITEM = 2**63 - 1  #: The largest item id that is an integer, everywhere.


def integer_id(text: str) -> int | None:
    """An item id that is an integer: from 0 to :data:`LARGEST_ITEM`, without a leading zero. None for any other."""
    if not re.fullmatch("0|[1-9][0-9]{0,18}", text):  # int() refuses much longer ones
        return None
    return int(text) if int(text) <= LARGEST_ITEM else None
