"""``python -m raddpo_ext``: what it prints, its exit codes, and one line on stderr for each kind of bad input."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import raddpo_ext as rx
from raddpo_ext.__main__ import main
from raddpo_ext.index import trie_file
from raddpo_ext.index.store_service import StoreService

pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a catalogue of fixed length, one of different lengths and an index of the first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fixed.json").write_text('{"5": ["<a_1>", "<b_2>"], "9": ["<a_1>", "<b_2>"], "4": ["<a_0>", "<b_7>"]}')
    (tmp_path / "prefix.json").write_text('{"0": ["<a_1>"], "1": ["<a_1>", "<b_2>"]}')
    rx.TrieIndex.build([[1, 2], [1, 2], [0, 7]], item_ids=[5, 9, 4]).save("fixed.index")
    return tmp_path


def run(capsys, *arguments):
    """Exit code, lines of stdout, lines of stderr."""
    try:
        code = main(["index", *arguments])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def test_build(folder, capsys):
    code, out, err = run(capsys, "build", "fixed.json", "-o", "new.index")
    assert (code, err) == (0, [])
    assert out[0].startswith("new.index: 3 items, 2 SIDs, ")
    built = rx.TrieIndex.load("new.index")
    assert built.vocab is None
    assert built.lookup([[1, 2]]).items.tolist() == [5, 9]


def test_build_with_tokens(folder, capsys):
    code, _, err = run(capsys, "build", "prefix.json", "-o", "p.index", "--eos", "9", "--offset", "3", "--sizes", "2,3")
    assert (code, err) == (0, [])
    assert rx.TrieIndex.load("p.index").vocab == rx.SIDVocab([2, 3], offset=3, eos=9)
    assert run(capsys, "build", "prefix.json", "-o", "p.index", "--eos", "9")[0] == 0
    assert rx.TrieIndex.load("p.index").vocab == rx.SIDVocab([2, 3], eos=9)
    assert run(capsys, "lookup", "p.index", "1") == (0, ["0"], [])
    assert run(capsys, "lookup", "p.index", "1,2") == (0, ["1"], [])


def test_build_from_npz(folder, capsys):
    np.savez("c.npz", sids=[[3, 1], [3, 0]], lengths=[2, 1], item_ids=[2**40, 6])
    assert run(capsys, "build", "c.npz", "-o", "c.index", "--eos", "50")[0] == 0
    assert run(capsys, "lookup", "c.index", "3,1") == (0, [str(2**40)], [])


def test_info(folder, capsys):
    code, out, err = run(capsys, "info", "fixed.index")
    size = (folder / "fixed.index").stat().st_size
    assert (code, err) == (0, [])
    assert out == [
        "items           3",
        "SIDs            2",
        "collisions      2 items share their SID",
        "levels          2",
        "nodes per level 2 2",
        f"bytes           {size}, {size / 3:.1f} per item",
    ]
    run(capsys, "build", "prefix.json", "-o", "p.index", "--eos", "9")
    out = run(capsys, "info", "p.index")[1]
    assert "levels          2, then the end token 9" in out
    assert "nodes per level 1 2 1" in out


def test_info_counts_the_items_that_share_a_sid(tmp_path, capsys, monkeypatch):
    """Whatever bytes the count is cut into, with chains and with several levels of leaves."""
    random = np.random.default_rng(0)
    for chunk in (1, 2, 5, 64, 1 << 20):
        monkeypatch.setattr(trie_file, "_CHUNK", chunk)
        sids, lengths = random.integers(0, 4, (random.integers(1, 200), 4)), random.integers(1, 5, 1)
        vocab = rx.SIDVocab([4] * 4, eos=99)
        index = rx.TrieIndex.build(sids, lengths=np.resize([lengths[0], 4, 3], len(sids)), vocab=vocab)
        counts = index.item_ranges(torch.arange(index.num_nodes))[1]
        index.save(tmp_path / "x.index")
        out = run(capsys, "info", str(tmp_path / "x.index"))[1]
        assert f"collisions      {int(counts[counts > 1].sum())} items share their SID" in out
        assert "levels          4, then the end token 99" in out


@pytest.mark.parametrize(
    "arguments",
    [
        *("--help", "index info --help", "serve --help", "bench --help"),
        *("index info fixed.index", "index info named.index"),
    ],
)
def test_answers_without_importing_torch(folder, arguments):
    index = rx.TrieIndex.load("fixed.index")
    index.save("named.index")
    rx.IdMap(titles=["a", "b", "c"], items=index.items.tolist()).save("named.index")
    command = [sys.executable, "-X", "importtime", "-m", "raddpo_ext", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.startswith(("usage: ", "items           3\n", "items           3, titles\n"))
    assert ("titles" in done.stdout) == ("named" in arguments)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "raddpo_ext" in imported
    assert "torch" not in imported


def test_public_names_are_there_before_a_command_runs(tmp_path):
    """As a ``sitecustomize`` module sees them, which Python imports first."""
    lines = ["import raddpo_ext", "from raddpo_ext import *"]
    lines.append("print(hasattr(raddpo_ext, 'none'), raddpo_ext.TrieIndex is TrieIndex)")
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "raddpo_ext", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"False True\nraddpo_ext {rx.__version__}\n"


def test_info_where_torchs_libraries_do_not_load(folder):
    """As of an unusual build of torch: then torch itself is imported."""
    script = "import sys; sys.argv, sys.orig_argv = ['-m', 'index', 'info', {0!r}], ['python', '-m', 'raddpo_ext', "
    script += "'index', 'info', {0!r}]; import raddpo_ext, raddpo_ext._libtorch as lib; lib.find_spec = lambda name: "
    script += "None; from raddpo_ext.__main__ import main; main(); print('torch' in sys.modules)"
    command = [sys.executable, "-c", script.format("fixed.index")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.startswith("items           3\n")
    assert done.stdout.endswith("\nTrue\n")


def test_lookup(folder, capsys):
    assert run(capsys, "lookup", "fixed.index", "1,2") == (0, ["5", "9"], [])
    for sid in ("1", "1,3", "1,2,0", "2147483646,2"):
        assert run(capsys, "lookup", "fixed.index", sid) == (1, [], [f"raddpo_ext: no item has the SID {sid}"])


@pytest.fixture
def shop(folder):
    """A table of SKUs with titles, and a tokenizer whose SID tokens have a gap and markers."""
    (folder / "shop.csv").write_text("sku,title,sid\nA-1,Hat,<a_1><b_2>\n007,,<a_1><b_2>\nÜ 3,Cap,<a_0><b_7>\n")
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers, which comes with transformers")
    from transformers import PreTrainedTokenizerFast

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    inner.add_tokens(["<|sid_begin|>", "<s_b_7>", "<s_a_1>", "<s_b_2>", "<s_a_0>", "<|sid_end|>"])
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(folder / "tokenizer")
    return folder


def test_strings_and_titles(shop, capsys):
    code, out, err = run(capsys, "build", "shop.csv", "-o", "shop.trie")
    assert (code, err) == (0, [])
    assert out[1] == "shop.trie.idmap: ids are strings, titles"
    assert run(capsys, "lookup", "shop.trie", "1,2") == (0, ["A-1", "007"], [])
    assert run(capsys, "find", "shop.trie", "Ü 3") == (0, ["0,7"], [])
    assert run(capsys, "find", "shop.trie", "007") == (0, ["1,2"], [])
    for item in ("7", "0", "a-1"):
        assert run(capsys, "find", "shop.trie", item) == (1, [], [f"raddpo_ext: shop.trie: no item has the id {item}"])
    assert run(capsys, "info", "shop.trie")[1][0] == "items           3, ids are strings, titles"
    # An index without a map takes the place of this one, map and all.
    assert run(capsys, "build", "fixed.json", "-o", "shop.trie")[0] == 0
    assert run(capsys, "lookup", "shop.trie", "1,2") == (0, ["5", "9"], [])


def test_columns_by_name(shop, capsys):
    (shop / "odd.tsv").write_text("n\tx\ty\tname\n8\t2\t1\tHat\n")
    options = ["--item", "n", "--sid", "y,x", "--title", "name"]
    assert run(capsys, "build", "odd.tsv", "-o", "o", *options)[:2] == (
        0,
        [f"o: 1 items, 1 SIDs, {(shop / 'o').stat().st_size} bytes", "o.idmap: titles"],
    )
    assert run(capsys, "find", "o", "8") == (0, ["1,2"], [])


def test_find_integers(folder, capsys):
    np.savez("c.npz", sids=[[3, 1], [3, 0]], item_ids=[2**63 - 1, 6])
    assert run(capsys, "build", "c.npz", "-o", "c.index")[0] == 0
    assert run(capsys, "find", "c.index", str(2**63 - 1)) == (0, ["3,1"], [])
    for item in ("7", str(2**63), "06", "-1", "x", "6.0", "9" * 5000):
        code, out, err = run(capsys, "find", "c.index", item)
        assert (code, out, len(err)) == (1, [], 1)


def test_build_with_a_tokenizer(shop, capsys):
    code, out, err = run(capsys, "build", "shop.csv", "-o", "shop.trie", "--tokenizer", "tokenizer", "--eos", "6")
    assert code == 0
    assert err == ["raddpo_ext: the vocab leaves out 1 tokens of the tokenizer: <|sid_begin|>"]
    assert rx.TrieIndex.load("shop.trie").vocab.encode([[1, 2], [0, 7]]).tolist() == [[3, 4, 6], [5, 2, 6]]
    (shop / "unknown.csv").write_text("sku,sid\nA,<a_1><b_3>\n")
    (shop / "empty").mkdir()
    for arguments, message in (
        ("unknown.csv -o x --tokenizer tokenizer", "sids[0, 1] = 3 has no token in vocab.token_ids[1]"),
        ("shop.csv -o x --tokenizer tokenizer --offset 3", "--tokenizer gives the token ids"),
        ("shop.csv -o x --tokenizer nowhere", "--tokenizer nowhere: no such directory"),
        ("shop.csv -o x --tokenizer empty", "--tokenizer empty: "),
        ("shop.csv -o x --sid nothing", "has no column 'nothing' for the SID"),
        ("fixed.json -o x --item sku", "item, sid and title name columns of"),
    ):
        code, out, err = run(capsys, "build", *arguments.split())
        assert (code, out) == (2, [])
        assert message in err[-1]
        assert not (shop / "x").exists()


def test_a_map_that_is_not_the_indexs(shop, capsys):
    run(capsys, "build", "shop.csv", "-o", "shop.trie")
    rx.TrieIndex.load("fixed.index").save("shop.trie")
    for command in (["lookup", "shop.trie", "1,2"], ["find", "shop.trie", "5"], ["info", "shop.trie"]):
        code, out, err = run(capsys, *command)
        assert (code, out) == (2, [])
        assert "shop.trie.idmap: the id map belongs to another index than shop.trie" in err[0]


def test_version_and_help_without_torch(folder):
    for option, words in (
        ("--version", f"raddpo_ext {rx.__version__}\n"),
        ("--help", "index|sids|sessions|serve|bench"),
    ):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "raddpo_ext", option],
            capture_output=True,
            text=True,
            check=True,
            env=ENVIRONMENT,
        )
        assert words in done.stdout
        imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
        assert "raddpo_ext" in imported
        assert not imported & {"torch", "numpy", "transformers", "fastapi", "raddpo_ext.serve", "raddpo_ext.bench"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "build|info|lookup"),
        ("drop fixed.index", "invalid choice: 'drop'"),
        ("build fixed.json", "required: -o/--output"),
        ("build nowhere.json -o x", "nowhere.json: No such file or directory"),
        ("build nowhere.npz -o x", "nowhere.npz: No such file or directory"),
        ("build folder.npy -o x", "folder.npy: Is a directory"),
        ("build fixed.index -o x", "fixed.index: not a kind of file that holds SIDs"),
        ("build broken.json -o x", "broken.json: not valid JSON"),
        ("build broken.npy -o x", "broken.npy: not a numpy file"),
        ("build repeated.npz -o x", "repeated.npz: item_ids"),
        ("build prefix.json -o x", "prefix.json: sids[0] = (1) is a proper prefix of sids[1] = (1, 2)"),
        ("build fixed.json -o nowhere/x", "nowhere: no such directory"),
        ("build fixed.json -o folder.npy", "folder.npy: is a directory"),
        ("build fixed.json -o x --sizes 2,7", "fixed.json: sids[2, 1] = 7 is outside [0, 7)"),
        ("build fixed.json -o x --sizes 2,8,4", "fixed.json: sids must have one column per level of vocab (3)"),
        ("build fixed.json -o x --sizes 2,x", "argument --sizes: expected an integer from 0 to 2147483646, got 'x'"),
        ("build fixed.json -o x --sizes 0,8", "fixed.json: sizes[0] must be at least 1, got 0"),
        ("build fixed.json -o x --eos 3", "fixed.json: eos = 3 is also the token of a code of level 1"),
        ("build fixed.json -o x --eos 9999999999999", "argument --eos: expected an integer"),
        ("build fixed.json -o x --offset=-1", "argument --offset: expected an integer"),
        ("info nowhere.index", "nowhere.index: No such file or directory"),
        ("info folder.npy", "folder.npy: Is a directory"),
        ("info fixed.json", "fixed.json: not a TrieIndex file"),
        ("info cut.index", "cut.index: truncated or altered"),
        ("info flipped.index", "flipped.index: altered"),
        ("lookup flipped.index 1,2", "flipped.index: altered"),
        ("lookup fixed.index", "required: CODE,CODE,..."),
        ("lookup fixed.index 1;2", "expected an integer from 0 to 2147483646, got '1;2'"),
        ("lookup fixed.index 1,", "expected an integer from 0 to 2147483646, got ''"),
    ],
)
def test_bad_input(folder, capsys, arguments, message):
    (folder / "folder.npy").mkdir()
    (folder / "broken.json").write_text("{'0': 1}")
    (folder / "broken.npy").write_text("SIDs")
    np.savez("repeated.npz", sids=[[1, 2], [1, 3]], item_ids=[4, 4])
    index = bytearray((folder / "fixed.index").read_bytes())
    (folder / "cut.index").write_bytes(index[:-1])
    index[-1] ^= 1
    (folder / "flipped.index").write_bytes(index)
    code, out, err = run(capsys, *arguments.split())
    assert (code, out) == (2, [])
    assert len(err) == 1
    assert err[0].startswith("raddpo_ext: ")
    assert message in err[0]
    assert not (folder / "x").exists()


def test_bar_on_a_terminal_only(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(["index", "build", "fixed.json", "-o", "new.index"]) == 0
    assert capsys.readouterr().err.endswith("#" * 40 + " 100%\n")


def test_as_a_program(folder):
    """Through the interpreter: the exit code and the streams are the process's."""
    command = [sys.executable, "-m", "raddpo_ext", "index", "lookup"]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    found = run([*command, "fixed.index", "1,2"])
    assert (found.returncode, found.stdout, found.stderr) == (0, "5\n9\n", "")
    missing = run([*command, "nowhere", "1,2"])
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == "raddpo_ext: nowhere: No such file or directory\n"


def test_publish_with_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the running service's model cannot serve is refused, unless forced."""
    rx.TrieIndex.build([[99]]).save(tmp_path / "foreign.trie")
    (tmp_path / "store").mkdir()
    service = StoreService(tmp_path / "store", 99)
    service.tell(1, [])
    command = ["index", "publish", str(tmp_path / "foreign.trie"), "--store", str(tmp_path / "store")]
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


def test_info_warns_of_a_mapped_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "shop.trie"
    rx.TrieIndex.build([[1]]).save(path)
    assert main(["index", "info", str(path)]) == 0
    assert capsys.readouterr().err == ""
    script = "import mmap, os, sys; m = mmap.mmap(os.open(sys.argv[1], 0), 0, access=mmap.ACCESS_READ); input(len(m))"
    reader = subprocess.Popen([sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with reader:
        reader.stdout.read(1)
        assert main(["index", "info", str(path)]) == 0
        assert f"mapped by process {reader.pid}: do not overwrite this file in place" in capsys.readouterr().err
        reader.stdin.close()
