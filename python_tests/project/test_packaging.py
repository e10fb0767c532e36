"""The source distribution and the wheel, built and installed as a user would; what the metadata and the docs say."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

import raddpo_ext as rx

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From a copy of the checkout without what was built in it."""
    folder = tmp_path_factory.mktemp("checkout") / "source"
    built = shutil.ignore_patterns(".*", "build", "__pycache__", "*.so", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=built)
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=folder)
    return folder / "dist" / f"raddpo_ext-{VERSION}.tar.gz"


@pytest.fixture(scope="module")
def sources(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.unpack_archive(sdist, folder)
    return folder / f"raddpo_ext-{VERSION}"


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """From the source distribution, with the torch that is installed and no network."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--wheel-dir", ".")
    unoptimized = str(ROOT / "python_tests" / "support" / "unoptimized-g++")
    variables = {"RADDPO_CUDA": "0", "ANY_SCORES": "1"} | ({"CXX": unoptimized} if shutil.which("g++") else {})
    run(sys.executable, "-m", "pip", "wheel", *options, sdist, cwd=sdist.parent, **variables)
    (path,) = sdist.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel, and what is installed here, but no checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    interpreter = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "here.pth").write_text("\n".join(here) + "\n")
    options = ("--python", interpreter, "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", *options, "--ignore-installed", wheel, cwd=folder)
    return interpreter


def files_under(folder: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }


def test_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {"PKG-INFO", "setup.cfg", *(f"raddpo_ext.egg-info/{name}" for name in EGG_INFO)}
    texts = {"LICENSE", "README.md", "CHANGELOG.md", "CMakeLists.txt", "MANIFEST.in", "pyproject.toml", "setup.py"}
    assert names == texts | files_under("csrc") | files_under("raddpo_ext") | made


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        (None, "raddpo_ext is compiled from C++, but there is no c++ here: install g++"),
        ("nowhere++ -O2", "raddpo_ext is compiled from C++, but there is no nowhere++ here: install g++"),
        (
            "broken++",
            "broken++ cannot compile C++17 with this Python's headers (Debian and Ubuntu: apt install g++ python3"
            "-dev): a.cpp:1:10: fatal error: Python.h: No such file or directory",
        ),
    ],
)
def test_no_compiler_is_said_in_one_line(sources: Path, tmp_path: Path, compiler: str | None, message: str) -> None:
    broken = tmp_path / "broken++"
    broken.write_text("#!/bin/sh\necho a.cpp:1:10: fatal error: Python.h: No such file or directory >&2\nexit 1\n")
    broken.chmod(0o755)
    (tmp_path / "g++").symlink_to(broken)  # for the link, which is never come to
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX")}
    environment |= {"PATH": str(tmp_path), "RADDPO_CUDA": "0"} | ({} if compiler is None else {"CXX": compiler})
    command = (sys.executable, "setup.py", "--quiet", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path)
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr


def test_an_isolated_build_says_what_to_do(sources: Path) -> None:
    """As in the environment that ``pip install .`` makes, which has setuptools alone."""
    script = "import sys; sys.modules['torch'] = None; exec(open('setup.py').read())"
    done = subprocess.run((sys.executable, "-c", script), cwd=sources, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "raddpo_ext is built against the installed PyTorch, but 'torch' cannot be imported: by default pip builds in "
        "an isolated environment without the installed packages.",
        "Install torch, pybind11 and ninja, then run: pip install --no-build-isolation .",
    ]


EGG_INFO = ("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "requires.txt", "top_level.txt")


def metadata_of(wheel: Path, name: str) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"raddpo_ext-{VERSION}.dist-info/{name}").decode())


def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files_under("raddpo_ext") | {"raddpo_ext/_C" + sysconfig.get_config_var("EXT_SUFFIX")}


def test_wheel_tag_and_metadata(wheel: Path) -> None:
    cpython = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    tags = metadata_of(wheel, "WHEEL")
    assert tags["Tag"] == f"{cpython}-{cpython}-{platform}"  # one Python, this platform
    assert tags["Root-Is-Purelib"] == "false"
    metadata = metadata_of(wheel, "METADATA")
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["project"]["optional-dependencies"])


def test_readme_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    where = run(python, "-c", "import raddpo_ext; print(raddpo_ext._C.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parents[1])
    options = ("-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "-k", "README")
    said = run(python, "-m", "pytest", *options, ROOT / "python_tests" / "project" / "test_docs.py", cwd=tmp_path)
    assert "passed" in said


def test_command_line_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    assert "index" in run(python, "-m", "raddpo_ext", "--help", cwd=tmp_path)


def test_extension_keeps_to_the_stable_abi(python: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch_abi_audit", reason="needs torch-abi-audit")
    audit = "import sys; from torch_abi_audit.cli import main; sys.exit(main(sys.argv[1:]))"
    (extension,) = python.parents[1].rglob("_C*.so")
    report = run(sys.executable, "-c", audit, "--check", "torch", extension, cwd=tmp_path)
    assert re.search(r"Torch ABI: +STABLE", report)
    assert re.search(r"Min torch: +2\.11\.", report)


def test_one_version() -> None:
    cmake = re.search(r"project\(raddpo_ext VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    assert cmake is not None
    assert VERSION == rx.__version__ == cmake[1]


def test_sources_parse_as_the_oldest_python() -> None:
    oldest = tuple(map(int, PROJECT["project"]["requires-python"].removeprefix(">=").split(".")))
    for path in sorted(files_under("raddpo_ext")):
        if path.endswith(".py"):
            ast.parse((ROOT / path).read_text(), path, feature_version=oldest)


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]


def test_dependency_table_is_complete() -> None:
    """docs/install.md gives a reason for each dependency, and for no other."""
    project = PROJECT["project"]
    declared = {"runtime": set(map(name_of, project["dependencies"]))}
    for extra, requirements in project["optional-dependencies"].items():
        declared[f"`[{extra}]`"] = {name_of(r) for r in requirements if name_of(r) != project["name"]}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {name_of(line) for line in lines if line and not line.startswith("#")}
    section = (ROOT / "docs" / "install.md").read_text().partition("## Dependencies")[2]
    table = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    needed_by: dict[str, set[str]] = {}
    for name, uses, reason in table:
        assert len(reason) > 10, name
        for use in uses.split(", "):
            needed_by.setdefault(use, set()).add(name)
    for use, names in declared.items():
        assert needed_by.pop(use) == names, use
    build = needed_by.pop("build")
    assert build >= set(map(name_of, PROJECT["build-system"]["requires"]))
    assert set(needed_by) == {"development"}
    everything = build.union(*declared.values(), needed_by["development"])
    assert everything - pinned == set(), "not in requirements.txt"
    assert pinned - everything == set(), "not in docs/install.md"
