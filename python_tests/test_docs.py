"""Every Python block of the README and of docs/ runs, the blocks of a page one after another."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def names() -> dict[str, object]:
    """What a reader brings along: a model of the size that the README's vocab needs, and prompts."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.Qwen3Config(
        vocab_size=1768,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    input_ids = torch.randint(1000, (2, 6))
    model = transformers.Qwen3ForCausalLM(config).eval()
    return {"model": model, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.name
)
def test_blocks_run(page: Path) -> None:
    scope = names()
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), scope)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
