"""The command line: ``python -m raddpo_ext index build|info|lookup|find|publish``, ``sids build``, ``sessions check``,
``serve`` and ``bench``."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import raddpo_ext

# Each command imports what it needs when it runs, so that --help answers at once, without importing torch.
if TYPE_CHECKING:
    from raddpo_ext.index.id_map import IdMap
    from raddpo_ext.index.readers import SIDTable
    from raddpo_ext.index.trie import TrieIndex
    from raddpo_ext.index.vocab import SIDVocab

_BAR = 40  # characters
_LARGEST = 2**31 - 2  # the maximum token id and code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Bad input prints one line to stderr and returns 2."""
    options = _parser().parse_args(arguments)
    if options.run is not _info:
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
    """``index build``."""
    from raddpo_ext.index.id_map import IdMap
    from raddpo_ext.index.readers import read_sids
    from raddpo_ext.index.trie import TrieIndex
    from raddpo_ext.index.trie_file import map_path

    # Check the output path before reading the source.
    _check_output(options.output)
    _check_output(map_path(options.output))
    # Read the SIDs and build the index, with a progress bar on a terminal.
    table = read_sids(options.source, item=options.item, sid=options.sid, title=options.title)
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
    # Save the index and, beside it, the map of string ids and titles.
    index.save(options.output)
    print(f"{options.output}: {index.num_items} items, {index.num_sids} SIDs, {index.nbytes} bytes")
    names = IdMap.of(table)
    if names is None:
        map_path(options.output).unlink(missing_ok=True)  # the id map of the index that was overwritten
    else:
        names.save(options.output)
        print(f"{map_path(options.output)}: {_described(names)}")
    return 0


def _vocab(options: argparse.Namespace, table: SIDTable) -> SIDVocab | None:
    """The vocab that the options describe. None if no option is given: a code is its own token id."""
    from raddpo_ext.index.vocab import SIDVocab

    # The tokenizer knows all token ids. What the vocab leaves out is told as a message, not as a warning.
    if options.tokenizer is not None:
        if options.sizes is not None or options.offset is not None:
            raise ValueError("--tokenizer gives the token ids: leave out --offset and --sizes")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            vocab = SIDVocab.from_tokenizer(_tokenizer(options.tokenizer), eos=options.eos)
        for warning in caught:
            _complain(str(warning.message))
        return vocab
    if options.sizes is None and options.offset is None and options.eos is None:
        return None
    return SIDVocab(options.sizes or table.sizes, offset=options.offset or 0, eos=options.eos)


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a local folder."""
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise ValueError(f"--tokenizer needs {error.name}: pip install 'raddpo_ext[transformers]'") from None
    if not folder.is_dir():
        raise ValueError(f"--tokenizer {folder}: no such directory")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged folder can make transformers raise any type
        raise ValueError(f"--tokenizer {folder}: {type(error).__name__}: {error}") from None


def _described(names: IdMap) -> str:
    """What an id map holds, in words."""
    kinds = [kind for kind, there in (("ids are strings", names.ids), ("titles", names.titles)) if there is not None]
    return ", ".join(kinds)


def _load(file: Path) -> tuple[TrieIndex, IdMap | None]:
    """An index and its id map, if there is one."""
    from raddpo_ext.index.id_map import IdMap
    from raddpo_ext.index.trie import TrieIndex

    return TrieIndex.load(file), IdMap.load(file)


def _info(options: argparse.Namespace) -> int:
    """``index info``. Without an id map, it does not import torch."""
    from raddpo_ext._libtorch import load_extension

    load_extension()
    from raddpo_ext import _C
    from raddpo_ext._files import mapped_by
    from raddpo_ext.index.trie_file import items_that_share, map_path, mapped_block

    # Read the header of the checked index, and the id map if there is one.
    block = mapped_block(options.file, len(os.sched_getaffinity(0)))
    header = memoryview(block).cast("q")
    items, sids, levels, sid_levels, eos = (
        header[_C.HEADER[name]] for name in ("num_items", "num_sids", "levels", "sid_levels", "eos")
    )
    first_node = _C.HEADER["first_node"]
    starts = header[first_node + 1 : first_node + levels + 2]
    names = None
    if os.path.lexists(map_path(options.file)):
        raddpo_ext._load()
        from raddpo_ext.index.id_map import IdMap

        names = IdMap.load(options.file)
    # Print what they say.
    print(f"items           {items}" + ("" if names is None else f", {_described(names)}"))
    print(f"SIDs            {sids}")
    print(f"collisions      {items_that_share(block)} items share their SID")
    print(f"levels          {sid_levels}" + ("" if eos < 0 else f", then the end token {eos}"))
    print("nodes per level", *(last - first for first, last in itertools.pairwise(starts)))
    print(f"bytes           {len(block)}, {len(block) / items:.1f} per item")
    # Overwriting a mapped file would change, or end, the processes that use it.
    if processes := mapped_by(options.file):
        readers = ", ".join(map(str, processes[:5]))
        _complain(
            f"{options.file}: mapped by process {readers}: do not overwrite this file in place (cp); "
            "replace it with a new file of the same name (index build -o, mv), or publish a new version"
        )
    return 0


def _lookup(options: argparse.Namespace) -> int:
    """``index lookup``; exit code 1 if no item has the SID."""
    index, names = _load(options.file)
    items = index.lookup([options.sid]).items.tolist()
    if not items:
        _complain(f"no item has the SID {_written(options.sid)}")
        return 1
    print(*(items if names is None else names.ids_of(items)), sep="\n")
    return 0


def _find(options: argparse.Namespace) -> int:
    """``index find``; exit code 1 if the index lacks the item."""
    from raddpo_ext.index.item_ids import integer_id
    from raddpo_ext.index.trie_items import UnknownItem

    index, names = _load(options.file)
    # The id is a string of the map or, without one, an integer.
    item: Any = options.item if names is not None and names.ids is not None else integer_id(options.item)
    try:
        if item is None:
            raise UnknownItem("ITEM", options.item, 0)
        sids = index.sids_of([item] if names is None else names.items_of([item]))
    except UnknownItem:
        _complain(f"{options.file}: no item has the id {options.item}")
        return 1
    print(_written(sids[0][sids[0] >= 0].tolist()))
    return 0


def _written(sid: Sequence[int]) -> str:
    """A SID as the options take it."""
    return ",".join(map(str, sid))


def _publish(options: argparse.Namespace) -> int:
    """``index publish``."""
    from raddpo_ext.index.catalogue_store import CatalogueStore

    version = CatalogueStore(options.store).publish(options.file, force=options.force)
    print(f"{options.store}: version {version}")
    return 0


def _build_sids(options: argparse.Namespace) -> int:
    """``sids build``."""
    from raddpo_ext.sids.command import build

    _check_parent(options.out)
    try:
        return build(options, _bar if sys.stderr.isatty() else None)
    except ImportError as error:  # safetensors
        raise ValueError(str(error)) from None


def _check_sessions(options: argparse.Namespace) -> int:
    from raddpo_ext.data.session_check import check_sessions
    from raddpo_ext.data.session_picture import draw
    from raddpo_ext.data.session_report import meaning, report

    if options.picture is not None:
        _check_output(options.picture)
    index = None if options.index is None else _load(options.index)[0]
    try:
        check = check_sessions(options.log, index=index)
        if options.picture is not None:
            draw(check, options.picture)
    except ImportError as error:  # pyarrow or matplotlib
        raise ValueError(str(error)) from None
    print(json.dumps(asdict(check) | {"meaning": meaning(check)}) if options.json else report(check))
    return 0


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such directory")


def _check_output(path: Path) -> None:
    _check_parent(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a directory")


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
        _complain(f"{message} (try {self.prog} --help)")
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="python -m raddpo_ext", description="Generative retrieval with semantic IDs (SIDs).")
    parser.add_argument("--version", action="version", version=f"raddpo_ext {raddpo_ext.__version__}")
    groups = parser.add_subparsers(metavar="index|sids|sessions|serve|bench", required=True)
    _add_index_commands(groups.add_parser("index", help="build, inspect and publish an index"))
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


def _add_index_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="build|info|lookup|find|publish", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    build = command("build", _build, "Build an index from the SIDs of a catalogue.")
    build.add_argument("source", type=Path, help="a table (.csv, .tsv, .parquet), index.json, .npy or .npz")
    build.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the index to write")
    build.add_argument("--eos", type=_integer, metavar="TOKEN", help="token id that ends every SID (default: none)")
    build.add_argument("--offset", type=_integer, metavar="TOKEN", help="token id of code 0 of level 0 (default: 0)")
    text = "number of codes per level (default: one more than the largest code of the level)"
    build.add_argument("--sizes", type=_integers, metavar="K,K,...", help=text)
    text = "folder of the model's tokenizer; its tokens <a_12> or <s_a_12> give the token ids"
    build.add_argument("--tokenizer", type=Path, metavar="DIR", help=text)
    text = "in a table, the column of the item ids (default: item_id, id, asin, ...)"
    build.add_argument("--item", metavar="COLUMN", help=text)
    text = "in a table, the column of the SID or the columns of its codes (default: sid, or code_0, code_1, ...)"
    build.add_argument("--sid", type=lambda text: text.split(","), metavar="COLUMN,...", help=text)
    build.add_argument("--title", metavar="COLUMN", help="in a table, the column of the titles (default: title)")
    build.epilog = (
        "Token ids start at --offset, one level after the other. Without --eos, --offset, --sizes and --tokenizer, a "
        "code is its own token id. Titles, and item ids that are not integers, are written to FILE.idmap."
    )
    info = command("info", _info, "Describe an index.")
    info.add_argument("file", type=Path, help="an index")
    lookup = command("lookup", _lookup, "Print the items of a SID, one per line; exit code 1 if there are none.")
    lookup.add_argument("file", type=Path, help="an index")
    lookup.add_argument("sid", type=_integers, metavar="CODE,CODE,...", help="the SID's codes")
    find = command("find", _find, "Print the SID of an item; exit code 1 if the index has no such item.")
    find.add_argument("file", type=Path, help="an index")
    find.add_argument("item", metavar="ITEM", help="the item's id, an integer or a string")
    publish = command(
        "publish", _publish, "Publish an index as the newest version of a store; services on this store pick it up."
    )
    publish.add_argument("file", type=Path, help="an index")
    text = "publish even if the model of the store's running service lacks some of the index's tokens"
    publish.add_argument("--force", action="store_true", help=text)
    publish.add_argument(
        "--store", type=Path, default=Path("catalogue"), metavar="DIR", help="folder of the store (default: catalogue)"
    )


def _add_sids_commands(parser: argparse.ArgumentParser) -> None:
    text = "Make SIDs of embeddings: codebooks by residual k-means, codes, and a report of what they are like."
    build = parser.add_subparsers(metavar="build", required=True).add_parser("build", help=text, description=text)
    build.set_defaults(run=_build_sids)
    build.add_argument("embeddings", type=Path, help="a .npy file of floats [items, dimensions], or a .parquet table")
    build.add_argument("--sizes", type=_integer, nargs="+", required=True, metavar="K", help="codes per level")
    build.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for what is written")
    build.add_argument("--seed", type=_integer, default=0, help="of the codebooks (default: 0)")
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


def _integer(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > _LARGEST:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {_LARGEST}, got {text!r}")
    return int(text)


def _integers(text: str) -> list[int]:
    return [_integer(part) for part in text.split(",")]


def _bar(share: float) -> None:
    """Redraw the progress bar on standard error."""
    filled = int(share * _BAR)
    print(f"\rbuilding {'#' * filled}{'.' * (_BAR - filled)} {share:4.0%}", end="", file=sys.stderr, flush=True)


def _complain(message: str) -> None:
    """Print a message on standard error, in one line."""
    print("raddpo_ext: " + " ".join(message.split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
