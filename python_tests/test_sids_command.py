"""``python -m raddpo_ext sids build``, and the files it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
import raddpo_ext as rx
from raddpo_ext.__main__ import main


@pytest.fixture
def x() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (4 * rng.standard_normal((20, 6))[np.arange(300) % 20] + rng.standard_normal((300, 6))).astype(np.float32)


def test_from_embeddings_to_an_index(x: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "catalogue"
    build = ["sids", "build", str(tmp_path / "x.npy"), "--sizes", "16", "8", "8", "--out", str(out)]
    assert main(build) == 0
    printed = capsys.readouterr().out.splitlines()
    table = rx.read_sids(out / "index.json")
    books = rx.sids.Codebooks.load(out / "codebooks.safetensors")
    encoded = rx.sids.encode(x, books)
    resolved = rx.sids.resolve_collisions(encoded, x, books)
    assert np.array_equal(table.sids, resolved.sids)
    report = json.loads((out / "report.json").read_text())
    counts = encoded.unique(dim=0, return_counts=True)[1]
    assert report["collisions"] == int(counts[counts > 1].sum())
    assert report["used"] == [len(encoded[:, level].unique()) for level in range(3)]
    assert [sum(level) for level in report["counts"]] == [300] * 3
    shares = torch.bincount(encoded[:, 0], minlength=16) / 300
    assert report["entropy"][0] == pytest.approx(float(-(shares * shares.log2().nan_to_num(neginf=0)).sum()), abs=1e-5)
    left = np.square(x - books.decode(encoded).numpy()).sum() / np.square(x - x.mean(0)).sum()
    assert report["error"] == pytest.approx(float(left), rel=1e-4)
    assert (report["longest"], report["purity"]) == (table.sids.shape[1], None)
    assert printed[0] == "items        300"
    assert f"collisions   {report['collisions']} items shared" in "\n".join(printed)
    first = {file.name: file.read_bytes() for file in out.iterdir()}
    assert main(build) == 0
    names = ("index.json", "codebooks.safetensors", "report.json")
    assert all((out / name).read_bytes() == first[name] for name in names)
    assert main(["index", "build", str(out / "index.json"), "-o", str(tmp_path / "x.trie")]) == 0
    assert rx.TrieIndex.load(tmp_path / "x.trie").num_items == 300


def test_the_picture(x: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    np.save(tmp_path / "x.npy", x)
    assert main(["sids", "build", str(tmp_path / "x.npy"), "--sizes", "4", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/report.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_with_categories(x: np.ndarray, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kinds = ["shoe", "hat", "bag"]
    names = [f"item {row}" for row in range(300)]
    category = [kinds[row % 3] for row in range(300)]
    table = pyarrow.table({"embedding": x.tolist(), "sku": names, "kind": category})
    parquet.write_table(table, tmp_path / "x.parquet")
    build = ["sids", "build", str(tmp_path / "x.parquet"), "--sizes", "8", "8", "--item", "sku", "--category", "kind"]
    build += ["--force-category", "--layout", "onerec", "--collisions", "extra_level"]
    assert main([*build, "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out/index.json").read_text())
    assert list(written) == names
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["categories"] == sorted(kinds)
    assert [sid[0] for sid in written.values()] == [f"<s_a_{sorted(kinds).index(kind)}>" for kind in category]
    assert report["purity"] == [1.0, 1.0, 1.0]
    assert main([*build[:10], "--out", str(tmp_path / "free")]) == 0
    free = json.loads((tmp_path / "free/report.json").read_text())
    sids = np.array(
        [
            [int(token[3:-1]) for token in sid[:2]]
            for sid in json.loads((tmp_path / "free/index.json").read_text()).values()
        ]
    )
    books = rx.sids.Codebooks.load(tmp_path / "free/codebooks.safetensors")
    first = rx.sids.encode(x, books)[:, 0].numpy()
    most = sum(
        max(sum(first[row] == code and category[row] == kind for row in range(300)) for kind in kinds)
        for code in range(8)
    )
    assert free["purity"][0] == pytest.approx(most / 300)
    assert len(sids) == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.npy", "--sizes", "4"], "none.npy: No such file or directory"),
        (["bad.npy", "--sizes", "4"], "bad.npy: not a numpy file of plain numbers, or damaged"),
        (["ints.npy", "--sizes", "4"], "x must hold floating-point numbers, got int64"),
        (["x.npy", "--sizes", "400"], "sizes must be at most the number of rows of x, 300, got 400"),
        (["x.npy", "--sizes", "4", "--category", "kind"], "--item and --category name columns of a .parquet file"),
        (["x.npy", "--sizes", "4", "--force-category"], "--force-category needs --category COLUMN"),
        (
            ["x.npy", "--sizes", "4", "--collisions", "drop"],
            "--collisions must be one of 'nearest_free', 'extra_level'",
        ),
        (["x.npy", "--sizes", "4", "--layout", "tiger"], "--layout must be one of 'lc_rec', 'onerec', got 'tiger'"),
        (["x.csv", "--sizes", "4"], "x.csv: expected a .npy or .parquet file"),
        (["x.parquet", "--sizes", "4", "--item", "sku"], "x.parquet: has no column 'sku', only embedding"),
        (["x.parquet", "--sizes", "4"], "x.parquet: column 'embedding' must hold lists of one length"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, x: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "ints.npy", x.astype(int))
    (tmp_path / "bad.npy").write_bytes(b"no")
    parquet.write_table(pyarrow.table({"embedding": [[1.0, 2.0], [1.0]]}), tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("a,b\n")
    file, *rest = arguments
    assert main(["sids", "build", str(tmp_path / file), *rest, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(re.escape(message), error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "out/index.json").exists()


def test_layouts_are_read_back(tmp_path: Path) -> None:
    sids, lengths = [[3, 1], [2, 0], [3, 7]], [2, 1, 2]
    for name, layout in (("a.json", "lc_rec"), ("b.json", "onerec"), ("c.npz", "lc_rec")):
        rx.write_sids(tmp_path / name, sids, lengths=lengths, items=[5, 9, 2], layout=layout)
        table = rx.read_sids(tmp_path / name)
        assert table.item_ids is not None
        assert table.lengths is not None
        assert (table.item_ids.tolist(), table.lengths.tolist()) == ([5, 9, 2], lengths)
        assert [row[:length].tolist() for row, length in zip(table.sids, lengths, strict=True)] == [[3, 1], [2], [3, 7]]
    rx.write_sids(tmp_path / "d.json", sids, items=["x", "y", "z"])
    assert rx.read_sids(tmp_path / "d.json").ids == ["x", "y", "z"]
    rx.write_sids(tmp_path / "e.npz", torch.tensor(sids))
    assert rx.read_sids(tmp_path / "e.npz").item_ids is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(sids=[[0, -1]]), ValueError, "sids[0, 1] must be from 0 to 2147483646, got -1"),
        (dict(sids=np.zeros((0, 2), int)), ValueError, "sids must have at least one row and level, got shape (0, 2)"),
        (dict(sids=[[0.5]]), TypeError, "sids must hold integers"),
        (dict(lengths=[3]), ValueError, "lengths[0] = 3 is outside [1, 2]"),
        (dict(items=[1, 2]), ValueError, "items must have one id per row of sids (1), all different"),
        (dict(layout="tiger"), ValueError, "layout must be one of 'lc_rec', 'onerec', got 'tiger'"),
        (dict(path="x.txt"), ValueError, "x.txt: expected a .json or .npz file"),
        (dict(sids=[[0] * 27]), ValueError, "sids must have at most 26 levels in a .json file, got 27"),
        (dict(path="x.npz", items=["a"]), TypeError, "items must hold integers"),
    ],
)
def test_bad_arguments_of_write(
    arguments: dict[str, object], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(message)):
        rx.write_sids(**{"path": "x.json", "sids": [[0, 1]]} | arguments)
    assert not [*tmp_path.iterdir()]
