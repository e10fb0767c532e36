"""The CMake library: its C++ tests, and the example that links it as another project would."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cuda_on_cpu.ptx_kernels import nvcc

import raddpo_ext as rx

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cpp"
UNOPTIMIZED = ROOT / "python_tests" / "support" / "unoptimized-g++"


def run(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def configure(source: Path, build: Path, prefix: str, *options: str) -> None:
    # The compiler is named: CXX may be one that a test before has set.
    options = (f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_CXX_COMPILER={UNOPTIMIZED}", *options)
    run("cmake", "-G", "Ninja", "-S", source, "-B", build, *options)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library and its C++ tests; installed under ``installed``."""
    for program in ("cmake", "ninja", "g++"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    folder = tmp_path_factory.mktemp("cmake")
    options = ("-DRADDPO_CUDA=OFF", "-DRADDPO_TESTS=ON", f"-DCMAKE_INSTALL_PREFIX={folder / 'installed'}")
    configure(ROOT, folder, torch.utils.cmake_prefix_path, *options)
    run("cmake", "--build", folder)
    run("cmake", "--install", folder)
    return folder


@pytest.fixture(scope="module")
def example(build: Path) -> Path:
    """Linked against the installed package, by a linker that leaves out what a program refers to no symbol of."""
    folder = build / "example"
    prefix = f"{torch.utils.cmake_prefix_path};{build / 'installed'}"
    configure(EXAMPLE, folder, prefix, "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed")
    run("cmake", "--build", folder)
    return folder / "beam_search"


def test_cpp_tests(build: Path) -> None:
    assert ", 0 failed" in run(build / "cpp_tests" / "raddpo_cpp_tests")


def test_install_holds_nothing_else(build: Path) -> None:
    files = {str(path.relative_to(build / "installed")) for path in (build / "installed").rglob("*") if path.is_file()}
    package = {"Config.cmake", "Config-release.cmake", "ConfigVersion.cmake"}
    lib = next(name.split("/")[0] for name in files if name.endswith("libraddpo_ext.so"))  # lib or lib64
    expected = {f"{lib}/cmake/raddpo_ext/raddpo_ext{name}" for name in package}
    assert files == expected | {f"{lib}/libraddpo_ext.so", "include/raddpo_ext/trie.h"}


def test_subdirectory(build: Path, tmp_path: Path) -> None:
    """A project that has this one as a folder of its own."""
    text = (EXAMPLE / "CMakeLists.txt").read_text()
    found = "find_package(raddpo_ext REQUIRED)"
    assert found in text
    (tmp_path / "CMakeLists.txt").write_text(text.replace(found, f"add_subdirectory({ROOT} raddpo_ext)"))
    shutil.copy(EXAMPLE / "main.cpp", tmp_path)
    configure(tmp_path, tmp_path / "build", torch.utils.cmake_prefix_path, "-DRADDPO_CUDA=OFF")
    inputs = run("ninja", "-C", tmp_path / "build", "-t", "query", "beam_search")  # building takes as long again
    assert "raddpo_ext/libraddpo_ext.so" in inputs
    assert (tmp_path / "build" / "raddpo_ext" / "include" / "raddpo_ext" / "trie.h").exists()


TORCH_WITH_CUDA = """
include("{share}/public/utils.cmake")
include("{share}/public/cuda.cmake")
set(TORCH_FOUND TRUE)
set(TORCH_INCLUDE_DIRS "{share}")
"""
OURS = {"80,code=sm_80", "90,code=sm_90", "100,code=sm_100", "100,code=compute_100"}


@pytest.mark.parametrize(
    ("with_cuda", "options", "expected"),
    [
        (True, (), OURS),
        (True, ("-DTORCH_CUDA_ARCH_LIST=9.0",), {"90,code=sm_90"}),
        (False, (), OURS),
    ],
    ids=["cuda", "cuda_narrowed", "cpu"],
)
def test_kernels_are_compiled_for_our_architectures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_cuda: bool, options: tuple[str, ...], expected: set[str]
) -> None:
    """A torch with CUDA takes architectures its own way, which the one without holds too; here it has nothing else."""
    if shutil.which("cmake") is None or nvcc() is None:
        pytest.skip("needs cmake, and nvcc in CUDA_HOME or /usr/local/cuda")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    prefix = Path(torch.utils.cmake_prefix_path)
    if with_cuda:
        (tmp_path / "TorchConfig.cmake").write_text(TORCH_WITH_CUDA.format(share=prefix / "Caffe2"))
        options = (*options, f"-DTorch_DIR={tmp_path}", f"-DCUDA_TOOLKIT_ROOT_DIR={nvcc().parents[1]}")
    configure(ROOT, tmp_path / "build", str(prefix), f"-DCMAKE_CUDA_COMPILER={nvcc()}", *options)
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    kernels = [command["command"] for command in commands if command["file"].endswith(".cu")]
    assert len(kernels) == len(list((ROOT / "csrc").rglob("*.cu")))
    for command in kernels:
        text = re.sub(r"[\[\]\\\"]", "", command)
        found = re.findall(r"-gen(?:code |erate-code=)arch=compute_(\d+),code=([\w,]+)", text)
        assert {f"{arch},code={code}" for arch, codes in found for code in codes.split(",")} == expected


def shops() -> dict[str, rx.TrieIndex]:
    rng = np.random.default_rng(0)
    sids, lengths = rng.integers(0, 20, (300, 3)), rng.integers(1, 4, 300)
    tables = [3 + rng.permutation(20), 30 + rng.permutation(20), 60 + rng.permutation(20)]
    vocab = rx.SIDVocab([20] * 3, token_ids=tables, eos=1)
    ids = rng.permutation(300) + 2**40
    return {
        "plain": rx.TrieIndex.build(sids),
        "ragged": rx.TrieIndex.build(sids, lengths=lengths, vocab=vocab, item_ids=ids),
    }


@pytest.mark.parametrize("name", shops())
@pytest.mark.parametrize(("batch", "beam_width"), [(2, 5), (1, 400)])
def test_the_example_finds_what_python_finds(
    example: Path, tmp_path: Path, name: str, batch: int, beam_width: int
) -> None:
    index = shops()[name]
    index.save(tmp_path / "shop.trie")
    lines = run(example, tmp_path / "shop.trie", str(batch), str(beam_width), "7").splitlines()

    generator, columns = torch.Generator().manual_seed(7), max(index.max_tokens) + 1  # as in the example
    state, expected = rx.BeamState.start(index, batch), []
    for level in range(index.levels):
        state = rx.beam_step(torch.randn(*state.scores.shape, columns, generator=generator), state, index, beam_width)
        for query in range(batch):
            for slot in range(beam_width):
                token, parent = int(state.tokens[query, slot]), int(state.parents[query, slot])
                beam = f"step {level} query {query} slot {slot} token {token} parent {parent}"
                expected.append((beam, float(state.scores[query, slot])))
    first, count = index.item_ranges(state.nodes)
    for query, slot in (count > 0).nonzero().tolist():
        item = int(index.items[first[query, slot]])
        expected.append((f"query {query} item {item}", float(state.scores[query, slot])))

    got = [line.split(" score ") for line in lines]
    assert [beam for beam, _ in got] == [beam for beam, _ in expected]
    scores = np.array([score for _, score in got], np.float32)  # nine digits tell every float32 from the next
    assert scores.tolist() == [score for _, score in expected]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "truncated: 0 bytes"),
        (lambda content: b"no index\n" * 1000, "not a TrieIndex file"),
        (lambda content: content[:-1], "truncated or altered"),
        (lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "its checksum does not match"),
    ],
    ids=["empty", "text", "cut", "bit"],
)
def test_the_example_refuses_damaged_files(
    example: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "shop.trie"
    shops()["plain"].save(path)
    path.write_bytes(damage(path.read_bytes()))
    done = subprocess.run([example, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{path}: ")
    assert message in done.stderr
