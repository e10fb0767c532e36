"""Pages of docs/: the prose is their own, what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is
written from results."""

from __future__ import annotations

import re
from collections.abc import Mapping


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """The page with each block between its markers; ValueError unless it has exactly these, each once."""
    marks = re.findall(r"<!-- (begin|end) ([\w-]+) -->", page)
    if marks != [(which, name) for name in dict.fromkeys(name for _, name in marks) for which in ("begin", "end")]:
        raise ValueError("every block needs one begin and one end marker, in this order")
    if wrong := sorted({name for _, name in marks} ^ set(blocks)):
        raise ValueError(f"markers without a block, or the reverse: {', '.join(wrong)}")
    pattern = re.compile(r"<!-- begin ([\w-]+) -->.*?<!-- end \1 -->", re.DOTALL)
    return pattern.sub(lambda m: f"<!-- begin {m[1]} -->\n\n{blocks[m[1]]}\n\n<!-- end {m[1]} -->", page)


def details(title: str, text: str) -> str:
    """Folded on the site and on code hosts."""
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{text}\n\n</details>'
