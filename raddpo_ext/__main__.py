"""The command line: ``python -m raddpo_ext index build|info|lookup|publish``, ``serve`` and ``bench``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

import raddpo_ext
from raddpo_ext import _C
from raddpo_ext.bench.command import add_options as add_bench_options
from raddpo_ext.bench.command import bench
from raddpo_ext.catalogue_store import CatalogueStore
from raddpo_ext.readers import SIDTable, read_sids
from raddpo_ext.serve.options import add_options, config_of
from raddpo_ext.trie import TrieIndex
from raddpo_ext.vocab import SIDVocab

_BAR = 40  # characters
_CHUNK = 1 << 20  # nodes looked at together
_LARGEST = 2**31 - 2  # token id or code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; on bad input it prints one line to stderr and returns 2."""
    options = _parser().parse_args(arguments)
    raddpo_ext._load()
    try:
        code: int = options.run(options)
        return code
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (ValueError, TypeError) as error:
        message = str(error)
    _complain(message)
    return 2


def _build(options: argparse.Namespace) -> int:
    if not options.output.parent.is_dir():
        raise ValueError(f"{options.output.parent}: no such directory")
    if options.output.is_dir():
        raise ValueError(f"{options.output}: is a directory")
    table = read_sids(options.source)
    progress = _bar if sys.stderr.isatty() else None
    try:
        index = TrieIndex.build(
            table.sids,
            item_ids=table.item_ids,
            lengths=table.lengths,
            vocab=_vocab(options, table),
            progress=progress,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{options.source}: {error}") from None
    finally:
        if progress:
            print(file=sys.stderr)
    index.save(options.output)
    print(f"{options.output}: {index.num_items} items, {index.num_sids} SIDs, {index.nbytes} bytes")
    return 0


def _vocab(options: argparse.Namespace, table: SIDTable) -> SIDVocab | None:
    """None, a code is its token id, unless an option says where the tokens are."""
    if options.sizes is None and options.offset is None and options.eos is None:
        return None
    return SIDVocab(options.sizes or table.sizes, offset=options.offset or 0, eos=options.eos)


def _info(options: argparse.Namespace) -> int:
    index = TrieIndex.load(options.file)
    first = _C.HEADER["first_node"]
    starts = index.header[first + 1 : first + index.levels + 2]
    eos = None if index.vocab is None else index.vocab.eos
    sharing = 0
    for begin in range(0, index.num_nodes, _CHUNK):
        counts = index.item_ranges(torch.arange(begin, min(begin + _CHUNK, index.num_nodes)))[1]
        sharing += int(counts[counts > 1].sum())
    print(f"items           {index.num_items}")
    print(f"SIDs            {index.num_sids}")
    print(f"collisions      {sharing} items share their SID")
    print(f"levels          {index.sid_levels}" + ("" if eos is None else f", then the end token {eos}"))
    print(f"nodes per level {' '.join(str(count) for count in starts.diff().tolist())}")
    print(f"bytes           {index.nbytes}, {index.nbytes / index.num_items:.1f} an item")
    return 0


def _lookup(options: argparse.Namespace) -> int:
    items = TrieIndex.load(options.file).lookup([options.sid]).items.tolist()
    if not items:
        _complain(f"no item has the SID {','.join(map(str, options.sid))}")
        return 1
    print(*items, sep="\n")
    return 0


def _publish(options: argparse.Namespace) -> int:
    version = CatalogueStore(options.store).publish(options.file)
    print(f"{options.store}: version {version}")
    return 0


def _serve(options: argparse.Namespace) -> int:
    try:
        from raddpo_ext.serve.server import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"the service needs {error.name}: pip install 'raddpo_ext[serve]'") from None
    config = config_of(options)
    store = CatalogueStore(config.store)
    if options.index is not None:
        store.publish(options.index, unless_newest=True)
    elif not store.version:
        raise ValueError(f"{store.path}: no version of a catalogue in this folder; name a file to publish with --index")
    serve(config)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _complain(f"{message} (try {self.prog} --help)")
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m raddpo_ext", description="Generative retrieval with semantic IDs (SIDs).")
    groups = parser.add_subparsers(metavar="index|serve|bench", required=True)
    commands = groups.add_parser("index", help="build, inspect and publish an index").add_subparsers(
        metavar="build|info|lookup|publish", required=True
    )

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    build = command("build", _build, "Build an index from a catalogue's SIDs.")
    build.add_argument("source", type=Path, help="index.json ({'item': ['<a_12>', ...]}), .npy or .npz")
    build.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the index to write")
    build.add_argument("--eos", type=_integer, metavar="TOKEN", help="token id that ends every SID")
    build.add_argument(
        "--offset", type=_integer, metavar="TOKEN", help="token id of the first code of level 0 (default 0)"
    )
    build.add_argument("--sizes", type=_integers, metavar="K,K,...", help="codes of each level (default: as used)")
    build.epilog = "The levels follow one another from --offset. With none of the options a code is its token id."
    info = command("info", _info, "Describe an index.")
    info.add_argument("file", type=Path, help="an index")
    lookup = command("lookup", _lookup, "Print the items of a SID, one a line; exit code 1 when there is none.")
    lookup.add_argument("file", type=Path, help="an index")
    lookup.add_argument("sid", type=_integers, metavar="CODE,CODE,...", help="the SID's codes")
    publish = command("publish", _publish, "Make an index the newest version of a store, and so of its services.")
    publish.add_argument("file", type=Path, help="an index")
    publish.add_argument("--store", type=Path, default=Path("catalogue"), metavar="DIR", help="(default catalogue)")
    text = "Answer retrieval requests over HTTP with a model and the newest catalogue of a store."
    serve = groups.add_parser("serve", help="a retrieval service", description=text)
    serve.set_defaults(run=_serve)
    add_options(serve)
    text = "Time the operators beside their peers on this machine, once they are found to agree; exit code 1 if not."
    benchmark = groups.add_parser("bench", help="the core of the benchmarks", description=text)
    benchmark.set_defaults(run=bench)
    add_bench_options(benchmark)
    return parser


def _integer(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > _LARGEST:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {_LARGEST}, got {text!r}")
    return int(text)


def _integers(text: str) -> list[int]:
    return [_integer(part) for part in text.split(",")]


def _bar(share: float) -> None:
    filled = int(share * _BAR)
    print(f"\rbuilding {'#' * filled}{'.' * (_BAR - filled)} {share:4.0%}", end="", file=sys.stderr, flush=True)


def _complain(message: str) -> None:
    print("raddpo_ext: " + " ".join(message.split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
