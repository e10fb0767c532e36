"""``docs/benchmarks.md`` from a machine's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import bench_sids, bench_trie_live
from benchmarks.harness.catalogues import ROOT
from benchmarks.harness.report import markdown
from benchmarks.harness.results import Results, milliseconds
from benchmarks.load import tables as load_tables
from benchmarks.pages.figures import cases, figure, has_figure, rates, save
from benchmarks.pages.page import fill
from benchmarks.peers import compare_generate, compare_policy_steps, compare_training_ops, compare_whole_steps
from benchmarks.peers.onednn import SUFFIX
from raddpo_ext._files import replacing

PAGE = ROOT / "docs" / "benchmarks.md"
DATA = "../benchmarks/results"  # from the page
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {  # of members whose figure, if any, does not say all
    "generate": lambda run: compare_generate.markdown(run["results"]),
    "whole-steps": lambda run: compare_whole_steps.markdown(run["results"]),
    "sids": lambda run: bench_sids.tables(run["results"]),
    "trie-live": lambda run: bench_trie_live.tables(run["results"]),
    "training-ops": lambda run: compare_training_ops.markdown(run["results"]),
    "policy-steps": lambda run: compare_policy_steps.markdown(run["results"]),
    "load": lambda run: load_tables.summary(run["results"], run["floors_ms"]),
    "load-peer": lambda run: load_tables.peer(run["results"]),
    "load-soak": lambda run: load_tables.soak(run["results"][0]),
}
ITEM_BYTES = 4  # what an item id takes beside a peer's index that has none
Ratios = dict[str, float]  # by case


def render(page: str, results: Results, path: Path, members: Sequence[str]) -> str:
    """The page with what stands between its markers written anew; ValueError unless each block has its markers."""
    blocks = {
        "machine": machine(results, path),
        "summary": summary(results),
        "floors": floors(results),
    }
    return fill(page, blocks | {name: member(results, name) for name in members})


def write(results: Results, path: Path, members: Sequence[str]) -> None:
    """The page and its figures."""
    text = render(PAGE.read_text(), results, path, members)
    for name in members:
        if has_figure(results, name):
            save(figure(results, name), PAGE.parent / "figures" / f"bench-{name}.png")
    with replacing(PAGE) as file:
        file.write(text.encode())


# What is measured, by case.


def ratios(results: Results, name: str, ratio: str, start: str = "", without: str = "\n") -> Ratios:
    """Medians, of the cases whose name starts so."""
    found = {case: row["ratios"][ratio] for case, row in cases(results, name).items() if ratio in row["ratios"]}
    return {case: r["median"] for case, r in found.items() if case.startswith(start) and without not in case}


def of_peers(results: Results, peer: str, key: str) -> Ratios:
    """An index peer's number over ours."""
    peers = {case: (row, row.get("peers", {}).get(peer, {})) for case, row in cases(results, "trie").items()}
    return {case: theirs[key] / row[key] for case, (row, theirs) in peers.items() if theirs.get(key)}


def packed(results: Results, layout: str, key: str) -> Ratios:
    """A row a candidate over a packed row."""
    rows = {case: row["layouts"] for case, row in cases(results, "packing").items()}
    return {case: row["replicated"][key] / row[layout][key] for case, row in rows.items()}


def lines(results: Results) -> list[tuple[str, str, Ratios]]:
    """What, against whom, and their time (or bytes) over ours."""

    def loss(ratio: str, start: str, without: str = "\n") -> Ratios:
        return ratios(results, "losses", ratio, start, without)

    def step_of(ratio: str) -> Ratios:
        return ratios(results, "whole-steps", ratio)

    def generate_over(support: str) -> Ratios:
        members = (ratios(results, name, f"generate / shared {support}") for name in ("retriever", "generate"))
        return {case: value for found in members for case, value in found.items()}

    step, retrieval, onednn = "decoding step", "whole retrieval", "with `use_onednn`"
    tokens, head, session = "log-probs from logits", "loss with the head fused in", "session loss"
    packing, index, pages = "packed training step", "index", "huge pages"
    whole, policy = "whole training step", "policy training step, rollouts and update"
    loop, clipping = (ratios(results, "whole-steps", f"trainer / ten lines{clips}") for clips in ("", " that clip"))
    best = loss("best torch / ours", "logits")
    size, found = of_peers(results, "marisa", "index_bytes_per_item"), of_peers(results, "marisa", "found_per_s")
    stored = {case: row["index_bytes_per_item"] for case, row in cases(results, "trie").items()}
    with_ids = {case: ratio + ITEM_BYTES / stored[case] for case, ratio in size.items()}
    return [
        (step, "STATIC", ratios(results, "beam-search", "static")),
        (step, "a Python dict trie", ratios(results, "beam-search", "dict_trie")),
        (step, "the same, batched in numpy", ratios(results, "beam-search", "dict_trie_batched")),
        (step, "what HF `generate` does", ratios(results, "beam-search", "hf_style")),
        (retrieval, "HF `generate`", generate_over("vocab")),
        (retrieval, "HF `generate`, ours over a level", generate_over("level")),
        (retrieval, f"HF `generate`, ours {onednn}", ratios(results, "generate", f"generate / shared vocab{SUFFIX}")),
        (retrieval, "the same, both", ratios(results, "generate", f"generate{SUFFIX} / shared vocab{SUFFIX}")),
        (retrieval, "ours, a row of the cache a beam", ratios(results, "retriever", "reordered vocab / shared vocab")),
        ("service, requests/s", "FastAPI and `generate`", ratios(results, "load-peer", "ours / peer")),
        (tokens, "torch, `log_softmax`", loss("log_softmax / ours", "logits", pages)),
        (tokens, "torch, its best expression", loss("best torch / ours", "logits", pages)),
        (tokens, "the same, huge pages for both", {k: v for k, v in best.items() if pages in k}),
        (tokens, "torch.compile", loss("compiled / ours", "logits")),
        (head, "TRL", loss("trl / ours", "peers")),
        (head, "Liger", loss("liger / ours", "peers")),
        (head, "Liger, compiled", loss("liger_compiled / ours", "peers")),
        (head, "torch `linear_cross_entropy`", loss("torch_lce / ours", "peers")),
        (head, "verl", loss("verl / ours", "peers")),
        (head, "torch, its best expression", loss("best torch / ours", "peers")),
        (session, "vectorised torch", loss("vectorised / ours", "session")),
        (session, "torch.compile", loss("compiled / ours", "session")),
        (packing, "a row a candidate", packed(results, "candidates", "seconds")),
        (packing, "the same, ours as a trie", packed(results, "trie", "seconds")),
        (f"{packing}, peak memory", "a row a candidate", packed(results, "trie", "peak_bytes")),
        (whole, "plain torch, a row per candidate, all logits", step_of("replicated, all logits / ours")),
        (whole, "plain torch, a row per candidate", step_of("replicated / ours")),
        (whole, "plain torch, the same packed rows", step_of("packed / ours")),
        (whole, "the same, ours over a level", step_of("packed / ours, level")),
        (whole, "the same, both over a level", step_of("packed, level / ours, level")),
        ("`RADDPOTrainer`", "ten lines of a loop", {case: 1 / value for case, value in loop.items()}),
        ("`RADDPOTrainer`", "the same with clipping", {case: 1 / value for case, value in clipping.items()}),
        (policy, "HF `generate`, a row a rollout", ratios(results, "policy-steps", "peer / sample")),
        (policy, f"the same, ours {onednn}", ratios(results, "policy-steps", f"peer / sample{SUFFIX}")),
        (policy, "the same, both", ratios(results, "policy-steps", f"peer{SUFFIX} / sample{SUFFIX}")),
        (policy, "HF `generate`, ours over the same beams", ratios(results, "policy-steps", "peer / beams")),
        (f"{index}, build", "STATIC", of_peers(results, "static", "build_s")),
        (f"{index}, build", "marisa-trie", of_peers(results, "marisa", "build_s")),
        (f"{index}, bytes", "STATIC", of_peers(results, "static", "index_bytes_per_item")),
        (f"{index}, bytes", "marisa-trie", size),
        (
            f"{index}, bytes",
            "marisa-trie with 4 for an item id",
            with_ids,
        ),
        (f"{index}, time to find a SID", "marisa-trie", {case: 1 / value for case, value in found.items()}),
    ]


def step_floors(results: Results, way: str) -> Ratios:
    """Whole steps over their matrix products at the best rate."""
    rows = {case: row for case, row in cases(results, "whole-steps").items() if "parts" in row}
    return {case: row["costs"][way]["ms"] / compare_whole_steps.floor_ms(row, way) for case, row in rows.items()}


def retrieval_floors(results: Results) -> Ratios:
    """Whole retrievals, by case and support, over their matrix products at the best rate."""
    _, operations = rates(results)
    return {
        f"{case} {support}": row["costs"][f"shared {support}"]["ms"] * operations / (1e12 * row["gflop"][support])
        for case, row in cases(results, "retriever").items()
        if "gflop" in row
        for support in ("vocab", "level")
    }


def policy_floors(results: Results, way: str) -> Ratios:
    """Policy training steps over their matrix products at the best rate."""
    rows = {case: row for case, row in cases(results, "policy-steps").items() if compare_policy_steps.has_floor(row)}
    return {case: row["costs"][way]["ms"] / compare_policy_steps.floor_ms(row, way) for case, row in rows.items()}


# Blocks.


def machine(results: Results, path: Path) -> str:
    found = [result["machine"] for result in results.values()]
    names = list(dict.fromkeys(f"{one['cpu']}, {one['cores']} cores" for one in found)) or ["no machine yet"]
    link = f"[`benchmarks/results/{path.name}`]({DATA}/{path.name})"
    return f"Measured on: {'; '.join(names)}. All figures, a line for each case: {link}."


def _times(value: float) -> str:
    return f"{value:.3g}x" if value < 1000 else f"{value:.0f}x"


def _spread(values: Ratios) -> list[str]:
    least, most = min(values.values()), max(values.values())
    return [_times(median(values.values())), f"{_times(least)} to {_times(most)}" if len(values) > 1 else ""]


def summary(results: Results) -> str:
    rows, before = [], ""
    for what, peer, values in lines(results):
        if not values:
            continue
        better = [case for case in values if values[case] < 1]
        middle, spread = _spread(values)
        lost = "no"
        if better:
            worst = min(better, key=values.__getitem__)
            lost = f"**in {len(better)} of {len(values)}**, at worst {_times(values[worst])}: {worst}"
            middle = f"**{middle}**" if median(values.values()) < 1 else middle
        rows.append([what if what != before else "", peer, middle, spread, str(len(values)), lost])
        before = what
    return markdown(["", "against", "theirs / ours", "from case to case", "cases", "they beat us"], rows)


def floors(results: Results) -> str:
    _, operations = rates(results)
    packing = {
        case: row["layouts"]["trie"]["seconds"] * operations / (1e9 * row["layouts"]["trie"]["gflop"])
        for case, row in cases(results, "packing").items()
    }
    losses = {case: milliseconds(row) for case, row in cases(results, "losses").items()}
    logits = {case: times["ours"] / times["bytes"] for case, times in losses.items() if "bytes" in times}
    rows = [
        ["decoding step", "bare log-sum-exp of the logits", ratios(results, "beam-search", "bare_lse")],
        ["whole retrieval", "its matrix products at the best rate", retrieval_floors(results)],
        ["log-probs from logits", "their bytes, read twice and written once", logits],
        [
            "loss with the head fused in",
            "the three bare matrix products",
            ratios(results, "losses", "ours / three GEMMs", "peers"),
        ],
        ["session loss", "its bytes", ratios(results, "losses", "ours / bytes", "session")],
        ["packed training step, as a trie", "its matrix products at the best rate", packing],
        ["whole training step", "its matrix products at the best rate", step_floors(results, "ours")],
        ["the same, over a level", "its matrix products at the best rate", step_floors(results, "ours, level")],
        ["policy training step", "its matrix products at the best rate", policy_floors(results, "sample")],
    ]
    rows = [[*names, *_spread(values)] for *names, values in rows if values and not isnan(sum(values.values()))]
    return markdown(["", "floor", "ours / floor", "from case to case"], rows)


def member(results: Results, name: str) -> str:
    """The figure, or a table where there is none, and where it was measured."""
    parts = [key for key in results if key.split("/")[0] == name]
    if not parts:
        return f"Not measured yet: `python -m benchmarks --only {name}`."
    text = []
    if has_figure(results, name):
        text.append(f"![{name}](figures/bench-{name}.png)")
    for key in parts:
        result = results[key]
        if "skipped" in result:
            text.append(f"Skipped: {result['skipped']}.")
            continue
        if name in TABLES:
            text.append(TABLES[name](result))
        text.append(_origin(key, result))
    return "\n\n".join(filter(None, text))


def _origin(name: str, result: dict[str, Any]) -> str:
    facts = [
        result["machine"]["cpu"],
        f"torch {result['versions']['torch']}",
        result["versions"]["isa"],
        f"commit {result['commit']}",
    ]
    if "processes" in result:
        facts.insert(0, f"{result['processes']} processes" if result["processes"] > 1 else "one process")
    if "measured" in result:
        took = result["measured"]
        facts.append(f"{took['wall_s'] / 60:.0f} minutes, {took['cpu_s'] / 60:.0f} of CPU")
        facts.append(f"{took['peak_bytes'] / 2**30:.1f} GiB at the peak")
    part = "/" in name  # which may be history
    command = f"Measured apart: *{result['command']}*" if part else f"`python -m benchmarks --only {name}`"
    return f"{command} ({', '.join(facts)})."
