"""Every Python block of the README and of docs/ runs, the blocks of a page one after another; every command exists.

A block that needs a package beyond requirements.txt says so, ```python {requires=trl}: without that package it is
reported as skipped, and the page's other blocks run. Each asserts what it made, or ``docs_checks.CHECKS`` has a
check of it. A ```text right behind a block is what it prints; a ```console is a sample that depends on the machine.
"""

import ast
import importlib.util
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.docs_checks import CHECKS

from raddpo_ext.__main__ import _parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python(?: \{requires=(\w+)\})?\n(.*?)^```", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"\n\n```text\n(.*?)```", re.DOTALL)
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```", re.MULTILINE)
PROGRAMS = "\n".join(path.read_text() for folder in ("benchmarks", "demo") for path in (ROOT / folder).rglob("*.py"))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def checked_blocks(page: Path) -> list[tuple[re.Match[str], Callable[[SimpleNamespace], None] | None]]:
    blocks = list(BLOCK.finditer(page.read_text()))
    checks = CHECKS.get(name_of(page), [None] * len(blocks))
    assert len(checks) == len(blocks), (
        f"docs_checks.CHECKS has {len(checks)} checks for the {len(blocks)} blocks of {page}"
    )
    return list(zip(blocks, checks, strict=True))


def tokenizer() -> object:
    """A tokenizer of words with the tokens of the README's SIDs: ``<a_0>`` is 1000, ``<b_0>`` 1256."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "\n", "###", "Response:", *(f"word{i}" for i in range(994))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\S+"), "removed", invert=True)
    found = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    found.add_tokens([f"<{level}_{code}>" for level in "abc" for code in range(256)])
    return found


def names() -> dict[str, object]:
    """What a reader brings along: a model of the size that the README's vocab needs, its tokenizer, and prompts."""
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
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).eval()
    input_ids = torch.randint(1000, (2, 6))
    return {
        "model": model,
        "tokenizer": tokenizer(),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
    }


PAGES_WITH_BLOCKS = [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS, ids=name_of)
def test_blocks_run(
    page: Path,
    subtests: pytest.Subtests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = page.read_text()
    assert len(BLOCK.findall(text)) == len(re.findall(r"^```python\b", text, re.MULTILINE)), "a fence is not understood"
    monkeypatch.chdir(tmp_path)  # blocks may write files,
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # and start the package's programs
    scope = names()
    for block, check in checked_blocks(page):
        line = text.count("\n", 0, block.start(2))
        if block[1] and importlib.util.find_spec(block[1]) is None:
            with subtests.test(f"line {line}"):
                pytest.skip(f"{name_of(page)}, line {line}: needs {block[1]}")
            continue
        capsys.readouterr()
        before = {name: value.clone() for name, value in scope["model"].state_dict().items()}
        exec(compile("\n" * line + block[2], str(page), "exec"), scope)
        printed = PRINTED.match(text, block.end())
        assert printed is None or capsys.readouterr().out == printed[1]
        if check is not None:
            check(SimpleNamespace(**scope, weights_before=before))


def asserts(code: str) -> bool:
    """Whether a block has an ``assert`` or one of ``torch.testing``."""
    calls = ("torch.testing.assert_close(", "torch.testing.assert_equal(")
    return any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(code))) or any(
        call in code for call in calls
    )


@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS, ids=name_of)
def test_every_block_is_asserted(page: Path) -> None:
    for block, check in checked_blocks(page):
        line = page.read_text().count("\n", 0, block.start(2))
        assert check is not None or asserts(block[2]), f"{name_of(page)}, line {line}: nothing asserts what it makes"


def test_checks_belong_to_pages() -> None:
    assert set(CHECKS) <= set(map(name_of, PAGES_WITH_BLOCKS))


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command line, in a fence of a shell or indented as a block."""
    shell = "".join(block for language, block in FENCE.findall(text) if language in ("", "bash"))
    shell += "".join(re.findall(r"^ {4}(\S.*\n)", FENCE.sub("", text), re.MULTILINE))
    for line in re.sub(r"\\\n", " ", shell).splitlines():
        if re.match(r"(\w+=\S* )*(python3? -m|make) ", line):
            yield shlex.split(line, comments=True)


def check_program(module: str, options: list[str]) -> None:
    """A program of the repository is there and has the options."""
    if module.split(".")[0] in ("benchmarks", "demo"):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"there is no {module}"
        for option in options:
            assert not option.startswith("--") or f'"{option.split("=")[0]}"' in PROGRAMS, f"{module} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    """Programs and make's targets are there; the package's own command lines are parsed whole."""
    text = page.read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(text):
        while "=" in words[0]:
            del words[0]
        if words[0] == "make":
            wanted = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
            assert wanted <= set(targets), f"make has no target {wanted - set(targets)}"
        elif words[2] == "raddpo_ext":
            if "--help" not in words:
                _parser().parse_args(words[3:])  # exits with an error of its own
        else:
            check_program(words[2], words[3:])
    for code in re.findall(r"`python -m ([^`]+)`", text):
        check_program(*code.split()[:1], code.split()[1:])


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"
