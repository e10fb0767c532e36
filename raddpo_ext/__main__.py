"""The command line: ``python -m raddpo_ext index build|info|lookup|find|publish``, ``sids build``, ``sessions check``,
``serve`` and ``bench``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import raddpo_ext
from raddpo_ext._command_line import bar, check_output, check_parent, complain, integer
from raddpo_ext.index.command import add_commands

# Each command imports what it needs when it runs, so that --help answers at once, without importing torch.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Bad input prints one line to stderr and returns 2."""
    options = _parser().parse_args(arguments)
    if options.loads_torch:
        raddpo_ext._load()
    try:
        code: int = options.run(options)
        return code
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (ValueError, TypeError) as error:
        message = str(error)
    complain(message)
    return 2


def _build_sids(options: argparse.Namespace) -> int:
    """``sids build``."""
    from raddpo_ext.sids.command import build

    check_parent(options.out)
    try:
        return build(options, bar if sys.stderr.isatty() else None)
    except ImportError as error:  # safetensors
        raise ValueError(str(error)) from None


def _check_sessions(options: argparse.Namespace) -> int:
    from raddpo_ext.data.session_check import check_sessions
    from raddpo_ext.data.session_picture import draw
    from raddpo_ext.data.session_report import meaning, report

    if options.picture is not None:
        check_output(options.picture)
    index = None if options.index is None else raddpo_ext.TrieIndex.load(options.index)
    try:
        check = check_sessions(options.log, index=index)
        if options.picture is not None:
            draw(check, options.picture)
    except ImportError as error:  # pyarrow or matplotlib
        raise ValueError(str(error)) from None
    print(json.dumps(asdict(check) | {"meaning": meaning(check)}) if options.json else report(check))
    return 0


def _serve(options: argparse.Namespace) -> int:
    """``serve``: publish the given index, if any, and run the service."""
    from raddpo_ext.index.catalogue_store import CatalogueStore
    from raddpo_ext.serve.options import config_of

    try:
        from raddpo_ext.serve.server import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"the service needs {error.name}: pip install 'raddpo_ext[serve]'") from None
    config = config_of(options)
    store = CatalogueStore(config.store)
    if options.index is not None:
        store.publish(options.index, unless_newest=True)
    elif not store.version:
        raise ValueError(f"{store.path}: the store holds no catalogue version; publish one with --index FILE")
    serve(config)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from raddpo_ext.bench.command import bench

    return bench(options)


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    from raddpo_ext.serve.options import add_options

    add_options(parser)


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    from raddpo_ext.bench.options import add_options

    add_options(parser)


class _Parser(argparse.ArgumentParser):
    """A parser that adds its options when it parses, so that the modules of other commands are not imported."""

    add_options: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.add_options is not None:
            add, self.add_options = self.add_options, None
            add(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (try {self.prog} --help)")
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="python -m raddpo_ext", description="Generative retrieval with semantic IDs (SIDs).")
    parser.set_defaults(loads_torch=True)
    parser.add_argument("--version", action="version", version=f"raddpo_ext {raddpo_ext.__version__}")
    groups = parser.add_subparsers(metavar="index|sids|sessions|serve|bench", required=True)
    add_commands(groups.add_parser("index", help="build, inspect and publish an index"))
    _add_sids_commands(groups.add_parser("sids", help="make SIDs of embeddings"))
    _add_session_commands(groups.add_parser("sessions", help="check a session log"))
    # serve and bench, whose options are in their own modules
    text = "Answer retrieval requests over HTTP with a model and the newest catalogue version of a store."
    serve = groups.add_parser("serve", help="run a retrieval service", description=text)
    serve.set_defaults(run=_serve)
    serve.add_options = _add_serve_options
    text = "Time the operators and their peers on this machine. Results are compared first; exit code 1 if they differ."
    benchmark = groups.add_parser("bench", help="run the core benchmarks", description=text)
    benchmark.set_defaults(run=_bench)
    benchmark.add_options = _add_bench_options
    return parser


def _add_sids_commands(parser: argparse.ArgumentParser) -> None:
    text = "Make SIDs of embeddings: codebooks by residual k-means, codes, and a report of what they are like."
    build = parser.add_subparsers(metavar="build", required=True).add_parser("build", help=text, description=text)
    build.set_defaults(run=_build_sids)
    build.add_argument("embeddings", type=Path, help="a .npy file of floats [items, dimensions], or a .parquet table")
    build.add_argument("--sizes", type=integer, nargs="+", required=True, metavar="K", help="codes per level")
    build.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for what is written")
    build.add_argument("--seed", type=integer, default=0, help="of the codebooks (default: 0)")
    text = "nearest_free (default), extra_level or keep: what becomes of SIDs that several items share"
    build.add_argument("--collisions", default="nearest_free", metavar="MODE", help=text)
    build.add_argument("--layout", default="lc_rec", help="of index.json: lc_rec (default) or onerec")
    build.add_argument("--embedding", metavar="COLUMN", default="embedding", help="in a table (default: embedding)")
    build.add_argument("--item", metavar="COLUMN", help="in a table, the item ids (default: the row numbers)")
    build.add_argument("--category", metavar="COLUMN", help="in a table, what the report measures the purity of")
    build.add_argument("--force-category", action="store_true", help="make the category the first code of every SID")
    build.epilog = (
        "FOLDER gets index.json, which `index build` reads, codebooks.safetensors, with which new items are encoded, "
        "report.json and, if matplotlib is installed, report.png."
    )


def _add_session_commands(parser: argparse.ArgumentParser) -> None:
    text = "Describe a session log: what it holds, what is wrong with it, and what this means for training."
    check = parser.add_subparsers(metavar="check", required=True).add_parser("check", help=text, description=text)
    check.set_defaults(run=_check_sessions)
    check.add_argument("log", type=Path, metavar="LOG", help="a .jsonl or .parquet file that read_sessions reads")
    check.add_argument("--index", type=Path, metavar="FILE", help="also look up every candidate in this index")
    check.add_argument("--picture", type=Path, metavar="PNG", help="also draw histograms; needs matplotlib")
    check.add_argument("--json", action="store_true", help="print one JSON object instead of the text")


if __name__ == "__main__":
    sys.exit(main())
