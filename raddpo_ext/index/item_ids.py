"""Item ids: which texts are integer ids, and the error for an id that an index lacks."""

from __future__ import annotations

import re

LARGEST_ITEM = 2**63 - 1  #: The maximum integer item id.


def integer_id(text: str) -> int | None:
    """The integer that a text spells, from 0 to :data:`LARGEST_ITEM` without a leading zero; else None."""
    if not re.fullmatch("0|[1-9][0-9]{0,18}", text):  # int() raises for very long digits
        return None
    return int(text) if int(text) <= LARGEST_ITEM else None


class UnknownItem(ValueError):
    """An item id that the index lacks, and its position in the argument."""

    def __init__(self, name: str, item: int | str, position: int) -> None:
        super().__init__(f"{name} = {item!r:.60} is no item of the index")
        self.name, self.item, self.position = name, item, position

    def __reduce__(self) -> tuple[type[UnknownItem], tuple[str, int | str, int]]:
        return type(self), (self.name, self.item, self.position)  # pickled between processes
