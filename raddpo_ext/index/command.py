"""``python -m raddpo_ext index build|info|lookup|find|publish``."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raddpo_ext._command_line import bar, check_output, complain, integer, integers

# Each command imports what it needs when it runs, so that --help answers at once, without importing torch.
if TYPE_CHECKING:
    from raddpo_ext.index.id_map import IdMap
    from raddpo_ext.index.readers import SIDTable
    from raddpo_ext.index.trie import TrieIndex
    from raddpo_ext.index.vocab import SIDVocab


def add_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="build|info|lookup|find|publish", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    build = command("build", _build, "Build an index from the SIDs of a catalogue.")
    build.add_argument("source", type=Path, help="a table (.csv, .tsv, .parquet), index.json, .npy or .npz")
    build.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the index to write")
    build.add_argument("--eos", type=integer, metavar="TOKEN", help="token id that ends every SID (default: none)")
    build.add_argument("--offset", type=integer, metavar="TOKEN", help="token id of code 0 of level 0 (default: 0)")
    text = "number of codes per level (default: one more than the largest code of the level)"
    build.add_argument("--sizes", type=integers, metavar="K,K,...", help=text)
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
    info.set_defaults(loads_torch=False)
    info.add_argument("file", type=Path, help="an index")
    lookup = command("lookup", _lookup, "Print the items of a SID, one per line; exit code 1 if there are none.")
    lookup.add_argument("file", type=Path, help="an index")
    lookup.add_argument("sid", type=integers, metavar="CODE,CODE,...", help="the SID's codes")
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


def _build(options: argparse.Namespace) -> int:
    """``index build``."""
    from raddpo_ext.index.id_map import IdMap
    from raddpo_ext.index.readers import read_sids
    from raddpo_ext.index.trie import TrieIndex
    from raddpo_ext.index.trie_file import map_path

    # Check the output path before reading the source.
    check_output(options.output)
    check_output(map_path(options.output))
    # Read the SIDs and build the index, with a progress bar on a terminal.
    table = read_sids(options.source, item=options.item, sid=options.sid, title=options.title)
    progress = bar if sys.stderr.isatty() else None
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
            complain(str(warning.message))
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
    """``index info``, which does not import torch."""
    from raddpo_ext._libtorch import load_extension

    load_extension()
    from raddpo_ext import _C
    from raddpo_ext._files import mapped_by
    from raddpo_ext.index.id_map import IdMap
    from raddpo_ext.index.trie_file import items_that_share, mapped_block

    # Read the header of the checked index, and the id map if there is one.
    block = mapped_block(options.file, len(os.sched_getaffinity(0)))
    header = memoryview(block).cast("q")
    items, sids, levels, sid_levels, eos = (
        header[_C.HEADER[name]] for name in ("num_items", "num_sids", "levels", "sid_levels", "eos")
    )
    first_node = _C.HEADER["first_node"]
    starts = header[first_node + 1 : first_node + levels + 2]
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
        complain(
            f"{options.file}: mapped by process {readers}: do not overwrite this file in place (cp); "
            "replace it with a new file of the same name (index build -o, mv), or publish a new version"
        )
    return 0


def _lookup(options: argparse.Namespace) -> int:
    """``index lookup``; exit code 1 if no item has the SID."""
    index, names = _load(options.file)
    items = index.lookup([options.sid]).items.tolist()
    if not items:
        complain(f"no item has the SID {_written(options.sid)}")
        return 1
    print(*(items if names is None else names.ids_of(items)), sep="\n")
    return 0


def _find(options: argparse.Namespace) -> int:
    """``index find``; exit code 1 if the index lacks the item."""
    from raddpo_ext.index.item_ids import UnknownItem, integer_id

    index, names = _load(options.file)
    # The id is a string of the map or, without one, an integer.
    item: Any = options.item if names is not None and names.ids is not None else integer_id(options.item)
    try:
        if item is None:
            raise UnknownItem("ITEM", options.item, 0)
        sids = index.sids_of([item] if names is None else names.items_of([item]))
    except UnknownItem:
        complain(f"{options.file}: no item has the id {options.item}")
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
