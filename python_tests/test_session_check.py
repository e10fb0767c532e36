"""The diagnosis of a session log: figures against brute force, sentences at their thresholds, and the command."""

import dataclasses
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import raddpo_ext as rx
from raddpo_ext.__main__ import main
from raddpo_ext.data.session_check import Found, check_sessions
from raddpo_ext.data.session_report import _percent, meaning, report

VOCAB = rx.SIDVocab([3, 3, 3], offset=10, eos=5)  # levels are tokens 10 to 12, 13 to 15 and 16 to 18
INDEX = rx.TrieIndex.build(
    [[0, 1, 0], [0, 1, 2], [0, 2, 0], [2, 0, 0]], lengths=[3, 3, 2, 1], item_ids=[3, 5, 7, 2**40], vocab=VOCAB
)
KNOWN = [(10, 14, 16, 5), (10, 14, 18, 5), (10, 15, 5), (12, 5)]
GOOD = {"prompt_ids": [1, 2], "positives": [[10, 14]], "negatives": [[12, 16]]}


def write(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def begin_alike(one, other, depth):
    return len(one) >= depth and one[:depth] == other[:depth]


def places(numbers):
    return sorted(set(numbers))[:5]


def brute_force(rows):
    """Every figure that has a closed definition, from lists and sets; rows are numbered from 1."""
    bad = [i for i, row in enumerate(rows, 1) if {*map(tuple, row["positives"])} & {*map(tuple, row["negatives"])}]
    log = [
        (i, tuple(row["prompt_ids"]), [*map(tuple, row["positives"])], [*map(tuple, row["negatives"])], row["items"])
        for i, row in enumerate(rows, 1)
        if i not in bad
    ]
    negatives = [(i, prompt, sid) for i, prompt, _, sids, _ in log for sid in sids]
    all_of = [(i, sid) for i, _, ps, ns, _ in log for sid in ps + ns]
    longest = max((len(sid) for _, sid in all_of), default=0)
    pairs = [(ps[0], sid) for _, _, ps, ns, _ in log if ps for sid in ns]
    winners = {prompt: {ps[0] for _, other, ps, _, _ in log if ps and other == prompt} for _, prompt, *_ in log}
    disputed = [i for i, prompt, ps, _, _ in log if ps and len(winners[prompt]) > 1]
    liked = {(prompt, sid) for _, prompt, ps, _, _ in log for sid in ps}
    false = [i for i, prompt, sid in negatives if (prompt, sid) in liked]
    again = [row[0] for n, row in enumerate(log) if row[1:4] in [other[1:4] for other in log[:n]]]
    repeated = [i for i, _, ps, ns, _ in log for n, sid in enumerate(ps + ns) if sid in (ps + ns)[:n]]
    unknown = [i for i, sid in all_of if sid not in KNOWN]
    items = [(i, item) for i, *_, found in log for item in found]
    foreign = [i for i, item in items if item not in INDEX.items.tolist()]
    frequencies = sorted(Counter(sid for *_, sid in negatives).values(), reverse=True)
    prompt_tokens = sum(len(prompt) for _, prompt, *_ in log)
    return {
        "rows": len(rows),
        "skipped": {"both positive and negative": Found(len(bad), len(rows), len(bad), bad[:5])} if bad else {},
        "sessions": len(log),
        "compared": len(pairs),
        "shared": [sum(begin_alike(*pair, depth) for pair in pairs) for depth in range(1, longest)],
        "shared_by_chance": [
            sum(begin_alike(winner, sid, depth) for winner, _ in pairs for _, sid in pairs) / max(len(pairs), 1) ** 2
            for depth in range(1, longest)
        ],
        "popular": sum(frequencies[: -(-len(frequencies) // 100)]) / max(len(negatives), 1),
        "tokens_replicated": sum(len(prompt) + len(sid) for _, prompt, ps, ns, _ in log for sid in ps + ns),
        "tokens_packed": prompt_tokens + sum(len(sid) for _, sid in all_of),
        "tokens_trie": prompt_tokens + len({(i, sid[:n]) for i, sid in all_of for n in range(1, len(sid) + 1)}),
        "repeated_candidates": Found(len(repeated), len(all_of), len(set(repeated)), places(repeated)),
        "repeated_sessions": Found(len(again), len(log), len(again), places(again)),
        "several_winners": Found(
            sum(len(found) > 1 for found in winners.values()), len(winners), len(disputed), places(disputed)
        ),
        "false_negatives": Found(len(false), len(negatives), len(set(false)), places(false)),
        "unknown_candidates": Found(len(unknown), len(all_of), len(set(unknown)), places(unknown)),
        "unknown_items": Found(len(foreign), len(items), len(set(foreign)), places(foreign)),
    }


def statistics(values):
    return {
        "min": min(values),
        "median": pytest.approx(np.median(values)),
        "mean": pytest.approx(np.mean(values)),
        "max": max(values),
        "histogram": dict(Counter(values)),
    }


sids = st.sampled_from([*KNOWN, (10,), (10, 14), (10, 5), (11, 14, 16, 5), (12, 13, 5), (10, 14, 16, 5, 5)]).map(list)
rows = st.fixed_dictionaries(
    {
        "prompt_ids": st.sampled_from([[1], [2], [1, 2]]),
        "positives": st.lists(sids, max_size=3),
        "negatives": st.lists(sids, max_size=4),
        "items": st.lists(st.sampled_from([3, 7, 8, 2**40, 2**62]), max_size=2),
    }
)


@pytest.mark.parametrize("chunk", [2, 8192])
@given(log=st.lists(rows, min_size=1, max_size=12))
def test_against_brute_force(tmp_path_factory, chunk, log):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raddpo_ext.data.session_check._CHUNK", chunk)
        patch.setattr("raddpo_ext.data.session_rows.CHUNK", chunk)
        path = write(tmp_path_factory.mktemp("log") / "log.jsonl", log)
        expected = brute_force(log)
        if not expected["sessions"]:
            with pytest.raises(ValueError, match=r"holds no session; skipped .* both positive and negative"):
                check_sessions(path)
            return
        found = check_sessions(path, index=INDEX)
    assert {name: getattr(found, name) for name in expected} == {
        name: pytest.approx(value) if isinstance(value, float) else value for name, value in expected.items()
    } | {"shared_by_chance": pytest.approx(expected["shared_by_chance"])}
    kept = [row for row in log if not {*map(tuple, row["positives"])} & {*map(tuple, row["negatives"])}]
    for name, column in (
        ("prompt_lengths", "prompt_ids"),
        ("positives_per_session", "positives"),
        ("negatives_per_session", "negatives"),
    ):
        assert dataclasses.asdict(getattr(found, name)) == statistics([len(row[column]) for row in kept])
    for name, values in (
        ("prompts", [tuple(row["prompt_ids"]) for row in kept]),
        ("positives", [tuple(sid) for row in kept for sid in row["positives"]]),
        ("negatives", [tuple(sid) for row in kept for sid in row["negatives"]]),
    ):
        assert dataclasses.astuple(getattr(found, name)) == (len(values), len(set(values)))
    assert dataclasses.asdict(check_sessions(path)) == dataclasses.asdict(found) | {
        "unknown_candidates": None,
        "unknown_items": None,
    }
    report(found)  # any log has one


def test_parquet_and_other_reasons(tmp_path):
    """Rows of parquet are counted from 0; rows that are no sessions are in no figure."""
    pytest.importorskip("pyarrow")
    path = tmp_path / "log.parquet"
    rx.write_sessions(path, [GOOD, GOOD, {**GOOD, "items": [7]}])
    found = check_sessions(path, index=INDEX)
    assert (found.place, found.repeated_sessions) == ("row", Found(2, 3, 2, [1, 2]))
    assert (found.unknown_candidates, found.unknown_items) == (Found(6, 6, 3, [0, 1, 2]), Found(0, 1, 0, []))
    bad = ["{", {**GOOD, "prompt_ids": []}, {**GOOD, "negatives": [[]]}, {**GOOD, "positives": [[1.5]]}]
    rows = [*bad, GOOD, *["{"] * 9]
    found = check_sessions(write(tmp_path / "log.jsonl", rows))
    assert found.skipped == {
        "empty candidate": Found(1, 14, 1, [3]),
        "empty prompt": Found(1, 14, 1, [2]),
        "invalid JSON": Found(10, 14, 10, [1, 6, 7, 8, 9]),
        "not integers": Found(1, 14, 1, [4]),
    }
    assert (found.rows, found.sessions) == (14, 1)
    assert dataclasses.replace(found, path="", rows=1, skipped={}) == dataclasses.replace(
        check_sessions(write(tmp_path / "good.jsonl", [*["\n"] * 4, GOOD])), path=""
    )


def test_long_candidates(tmp_path):
    """Any token id and any length; nothing is padded to the longest candidate."""
    long = [2**31 - 2] * 5000
    rows = [{"prompt_ids": [0], "positives": [[*long, 1]], "negatives": [[*long, 2], [1]]}]
    found = check_sessions(write(tmp_path / "log.jsonl", [*rows, *[GOOD] * 3]))
    assert found.shared == [1] * 5000
    assert found.tokens_trie == 1 + 5000 + 3 + 3 * (2 + 4)
    assert "at least 7" not in report(found)


def test_prefixes_do_not_collide(tmp_path):
    """Of two prefixes, whichever pair of tokens follows: they would if numbers of prefixes and tokens overlapped."""
    sids = [[[5, 2**bit + 1], [6, 1]] for bit in range(1, 31)]
    found = check_sessions(
        write(tmp_path / "log.jsonl", [{"prompt_ids": [1], "positives": pair, "negatives": []} for pair in sids])
    )
    assert (found.positives.count, found.positives.distinct) == (60, 31)


def test_the_same_candidates_split_otherwise(tmp_path):
    """Are another session."""
    split = {"prompt_ids": [1, 2], "positives": [[10, 14], [12, 16]], "negatives": []}
    assert check_sessions(write(tmp_path / "log.jsonl", [GOOD, split])).repeated_sessions.count == 0
    assert check_sessions(write(tmp_path / "log.jsonl", [GOOD, split, GOOD])).repeated_sessions.places == [3]


@pytest.fixture
def log(tmp_path, monkeypatch):
    """200 sessions about which there is nothing to say, but what there always is: log.jsonl, with an index."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    sids = rng.permutation([[a, 20 + b] for a in range(10, 20) for b in range(100)]).tolist()
    rows = []
    for number in range(200):
        *negatives, winner, other = (sids[number * 5 + place] for place in range(5))
        negatives += [[winner[0], 200 + number], [other[0], 500 + number]]
        rows.append({"prompt_ids": [number] * 20, "positives": [winner, other], "negatives": negatives})
    rx.write_sessions("log.jsonl", rows)
    rx.TrieIndex.build([sid for row in rows for sid in row["positives"] + row["negatives"]]).save("shop.trie")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder.png").mkdir()
    return check_sessions("log.jsonl")


def changed(check, **figures):
    """A check with other figures; ``repeated_sessions=3`` is a number of faults or of their sessions."""
    for name, value in figures.items():
        if isinstance(getattr(check, name), Found) and not isinstance(value, Found):
            figures[name] = dataclasses.replace(getattr(check, name), count=value, sessions=value)
        elif isinstance(value, dict) and name != "skipped":
            figures[name] = dataclasses.replace(getattr(check, name), **value)
    return dataclasses.replace(check, **figures)


SENTENCES = [
    ("skipped", {"skipped": {}}, {"skipped": {"empty prompt": Found(2, 202, 2, [4, 9])}}, "2 of 200"),
    ("unknown", {"unknown_candidates": Found(0, 9, 0, [])}, {"unknown_candidates": Found(1, 9, 1, [3])}, "11.1 %"),
    ("unknown", {"unknown_candidates": Found(0, 0, 0, [])}, {"unknown_candidates": Found(9, 9, 1, [3])}, "another"),
    ("no_positives", {}, {"positives_per_session": {"histogram": {0: 1, 1: 199}}}, "0.5 % of the sessions have no"),
    ("no_negatives", {}, {"negatives_per_session": {"histogram": {0: 1, 5: 199}}}, "0.5 % of the sessions have no"),
    ("no_negatives", {}, {"negatives_per_session": {"histogram": {0: 200}}}, "No session has negatives"),
    (
        "few_negatives",
        {"negatives_per_session": {"median": 4.0}},
        {"negatives_per_session": {"median": 3.5}},
        "half",
    ),
    ("one_positive", {"positives_per_session": {"max": 2}}, {"positives_per_session": {"max": 1}}, '"pooled"'),
    (
        "far",
        {"shared_by_chance": [0.1], "shared": [151]},
        {"shared_by_chance": [0.11], "shared": [151]},
        "ignore the prompt",
    ),
    ("close", {"shared_by_chance": [0.2]}, {"shared_by_chance": [0.1], "shared": [151]}, "mined siblings"),
    ("close", {"shared_by_chance": [0.3, 0.3]}, {"shared_by_chance": [1, 0.2], "shared": [1000, 500]}, "first 2"),
    ("popular", {"popular": 0.199}, {"popular": 0.2}, "page that shows"),
    ("exposure", {"compared": 0}, {"compared": 1}, "docs/alignment.md"),
    ("false_negatives", {"false_negatives": 9}, {"false_negatives": 10}, "remove them"),
    ("tlgd", {"shared": [10]}, {"shared": [9]}, "0.9 % of the negatives share a telling prefix"),
    ("tlgd", {}, {"shared": [0]}, "does nothing here"),
    ("tlgd", {}, {"shared": [], "shared_by_chance": []}, "does nothing here"),
    ("trie", {"tokens_packed": 1000, "tokens_trie": 901}, {"tokens_packed": 1000, "tokens_trie": 900}, "10.0 %"),
    ("several_winners", {"several_winners": 9}, {"several_winners": 10}, "Merge the sessions"),
    ("repeated_sessions", {"repeated_sessions": 1}, {"repeated_sessions": 2}, "1.0 % of the sessions repeat"),
    ("repeated_candidates", {}, {"repeated_candidates": 1}, "twice: 1. Each copy"),
]


@pytest.mark.parametrize(("name", "below", "reached", "words"), SENTENCES)
def test_sentences_at_their_thresholds(log, name, below, reached, words):
    assert name not in meaning(changed(log, **below))
    check = changed(log, **reached)
    assert words in meaning(check)[name]
    assert words.split()[0] in report(check)


def test_the_docs_list_the_sentences():
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    table = page.split("| name | from | it means |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(dict.fromkeys(name for name, *_ in SENTENCES))


def test_a_log_with_little_to_say(log):
    assert set(meaning(log)) == {"close", "exposure"}
    assert {"far", "close"} & set(meaning(changed(log, sessions=99))) == set()
    assert set(meaning(changed(log, compared=0))) == set()


def test_shares_that_are_exact():
    shares = ((0, 9), (1, 3000), (1, 2000), (1, 3), (2999, 3000), (9, 9), (0, 0))
    assert [_percent(*share) for share in shares] == ["0 %", "<0.1 %", "0.1 %", "33.3 %", ">99.9 %", "100 %", "0 %"]


def run(capsys, *arguments):
    """Exit code, stdout, lines of stderr."""
    try:
        code = main(["sessions", *arguments])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def test_the_command(log, capsys):
    code, out, err = run(capsys, "check", "log.jsonl")
    assert (code, out, err) == (0, f"{report(log)}\n", [])
    assert out.startswith("log.jsonl: 200 sessions in 200 lines\n")
    code, out, err = run(capsys, "check", "log.jsonl", "--index", "shop.trie", "--json")
    expected = check_sessions("log.jsonl", index=rx.TrieIndex.load("shop.trie"))
    figures = json.loads(out)
    assert (code, err) == (0, [])
    assert figures.pop("meaning") == meaning(expected)
    assert figures == json.loads(json.dumps(dataclasses.asdict(expected)))
    assert figures["unknown_candidates"] == {"count": 0, "total": 1400, "sessions": 0, "places": []}


def test_lines_are_aligned(log):
    """Every table is as wide in each of its lines, but for the last column of the faults."""
    tables = report(log).split("\n\n")[1:5]
    assert [len({len(line) for line in table.splitlines()}) for table in tables] == [1, 1, 1, 1]


def test_the_picture(log, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    image = pytest.importorskip("matplotlib.image")
    before = matplotlib.get_backend(auto_select=False)
    assert run(capsys, "check", "log.jsonl", "--picture", "log.png")[0] == 0
    pixels = image.imread("log.png")
    assert pixels.shape[:2] == (720, 1200)
    for colour in ((0x2A, 0x9D, 0x8F), (0xE7, 0x6F, 0x51), (0x45, 0x7B, 0x9D), (0xB8, 0xB8, 0xB8)):  # of each panel
        assert (np.abs(pixels[..., :3] * 255 - colour).max(-1) < 1).sum() > 300
    assert matplotlib.get_backend(auto_select=False) == before
    # A log of one session, one token and no negative has a picture too; an old one is replaced.
    write(Path("$\\one$.jsonl"), [{**GOOD, "positives": [[10]], "negatives": []}])
    assert run(capsys, "check", "$\\one$.jsonl", "--picture", "log.png")[::2] == (0, [])
    assert (image.imread("log.png") != pixels).any()
    assert sorted(path.name for path in Path().glob("*.png")) == ["folder.png", "log.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "arguments are required: check"),
        ("check", "arguments are required: LOG"),
        ("check nowhere.jsonl", "nowhere.jsonl: No such file or directory"),
        ("check log.csv", "log.csv: not a kind of file that holds sessions: expected .jsonl or .parquet"),
        ("check empty.jsonl", "empty.jsonl: holds no session"),
        (
            "check bad.jsonl",
            "bad.jsonl: holds no session; skipped 1 invalid JSON (line 1); 1 both",
        ),
        ("check bad.parquet", "bad.parquet: damaged, or no parquet file"),
        ("check log.jsonl --index nowhere", "nowhere: No such file or directory"),
        ("check log.jsonl --index log.jsonl", "log.jsonl: not a TrieIndex file"),
        ("check nowhere.jsonl --picture nowhere/x.png", "nowhere: no such directory"),
        ("check nowhere.jsonl --picture folder.png", "folder.png: is a directory"),
    ],
)
def test_bad_input(log, capsys, arguments, message):
    write(Path("bad.jsonl"), ["{", {**GOOD, "negatives": GOOD["positives"]}])
    Path("bad.parquet").write_text("no")
    code, out, err = run(capsys, *arguments.split())
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith("raddpo_ext: ")
    assert message in err[0]


def test_without_matplotlib_or_pyarrow(log, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, out, (line,) = run(capsys, "check", "log.jsonl", "--picture", "log.png")
    assert (code, out) == (2, "")
    assert "a picture needs matplotlib, which `pip install matplotlib` brings" in line
    assert not Path("log.png").exists()
    Path("log.parquet").touch()
    assert "session logs need pyarrow.parquet" in run(capsys, "check", "log.parquet")[2][0]
    assert run(capsys, "check", "log.jsonl")[0] == 0


def test_an_index_that_is_none(log):
    with pytest.raises(TypeError, match="index must be a TrieIndex, got str"):
        check_sessions("log.jsonl", index="shop.trie")
