"""The beam search of general engines on a catalogue, as plain torch, beside ours::

    python -m benchmarks.peers.compare_engines
    python -m benchmarks.peers.compare_engines --quick    # few cases

What runs is the *algorithm* that docs/engines.md describes, written here, not the engines. A step asks for the ``2 W``
likeliest tokens of each beam over the whole vocabulary. ``free`` keeps the best ``W`` of them all, and what is no item
is dropped at the end; ``filtered`` drops what the catalogue does not have behind a beam, then keeps the best ``W``.

Both, and ours, read the log-probs of one trained model, which keeps a prompt's keys and values once for all its beams.
Asked for all log-probs instead of ``2 W``, the filtered search finds what ours does; that is checked before anything is
measured. The model is the one of the alignment experiment, trained once (``benchmarks.alignment.sft``), in
``.alignment/``. It has seen every item; what a search is worth shows where the catalogue is not what the model was
trained on, so a share of the items, drawn at random, is all that may be retrieved, as under a filter or after a change
of the catalogue. The cases are purchases of an allowed item. Times are of one query at a time, the searches taking
turns, over the whole catalogue.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.alignment import sft
from benchmarks.alignment.data import Data, load
from benchmarks.harness import catalogues, report, results
from benchmarks.harness.timing import Cost, middle, timed
from demo.sft import HISTORY
from raddpo_ext.data.catalogue import Case
from raddpo_ext.integrations.decoders import SharedPrefixDecoder

MODULE = "benchmarks.peers.compare_engines"
WIDTHS = (10, 50)
EPOCHS = sft.EPOCHS
#: Epochs of training, and the share of the items that may be retrieved; the first is timed.
SETTINGS = ((EPOCHS, 1.0), (EPOCHS, 0.5), (EPOCHS, 0.1), (EPOCHS, 0.01), (1, 1.0))
CUTS = (10, 50)
BATCH = 32  # prompts of one length
ENTRY = 8  # bytes of a returned log-prob at least: a 4-byte token id and a 4-byte float

Logits = Callable[[Tensor, Tensor, int], Tensor]


class Found(NamedTuple):
    """Paths (see :class:`Paths`) ``[B, W]``, best first and -1 where there is none; by level, the beams that were kept
    ``[B, L]`` and those of them that lead to an item ``[B, L]``."""

    paths: Tensor
    kept: Tensor
    legal: Tensor


class Paths:
    """Which paths lead to an allowed item, without the index, and that index for ours. A path is the number that its
    tokens write in base V."""

    def __init__(self, data: Data, allowed: Tensor) -> None:
        self.base, self.levels = data.vocab_size, data.levels
        self.places = self.base ** torch.arange(self.levels - 1, -1, -1)
        self.sids = (data.tokens * self.places).sum(1)
        vocab = data.index.vocab
        self.index = rx.TrieIndex.build(data.sids[allowed], item_ids=allowed.nonzero()[:, 0], vocab=vocab)
        self.prefixes = [torch.unique(self.sids[allowed] // place) for place in self.places.tolist()]
        self.known = [set(prefixes.tolist()) for prefixes in self.prefixes]

    def has(self, paths: Tensor, level: int) -> Tensor:
        prefixes = self.prefixes[level]
        return prefixes[torch.searchsorted(prefixes, paths).clamp(max=len(prefixes) - 1)] == paths


def _kept_prompts(model: Any, prompts: Tensor) -> Logits:
    """A ``step_fn`` that keeps a prompt's keys and values once for all its beams."""
    return SharedPrefixDecoder(model, None, prompts, torch.ones_like(prompts, dtype=torch.bool))


class ResubmittedPrompts:
    """A ``step_fn`` that runs every beam's whole prompt at each step: an engine without a prefix cache."""

    def __init__(self, model: Any, prompts: Tensor) -> None:
        self.model, self.rows = model, prompts[:, None]

    def __call__(self, tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        if level > 0:
            rows = self.rows.gather(1, parents[..., None].expand(-1, -1, self.rows.shape[2]))
            self.rows = torch.cat([rows, tokens[..., None]], 2)
        logits = self.model(self.rows.flatten(0, 1), use_cache=False, logits_to_keep=1).logits
        return logits[:, -1].unflatten(0, self.rows.shape[:2])


def ours(logits: Logits, data: Data, paths: Paths, batch: int, width: int) -> Found:
    kept: list[Tensor] = []

    def step(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        kept.append((tokens >= 0).sum(1))
        return logits(tokens, parents, level)

    found = rx.beam_search(step, paths.index, batch_size=batch, beam_width=width)
    assert data.index.vocab is not None
    tokens = data.index.vocab.encode(found.sids.clamp(min=0).flatten(0, 1)).unflatten(0, found.items.shape)
    counts = torch.stack([*kept[1:], (found.items >= 0).sum(1)], 1)
    return Found((tokens * paths.places).sum(2).masked_fill(found.items < 0, -1), counts, counts)


def engine(logits: Logits, paths: Paths, batch: int, width: int, asked: int, filtered: bool) -> Found:
    """Beam search by the ``asked`` likeliest tokens of each beam."""
    tokens = parents = beams = torch.zeros(batch, 1, dtype=torch.int64)
    scores = torch.zeros(batch, 1)
    kept, legal = [], []
    for level in range(paths.levels):
        best, token = logits(tokens, parents, level).log_softmax(-1).topk(min(asked, paths.base))
        reached = beams[..., None] * paths.base + token
        totals = scores[..., None] + best
        if filtered:
            totals = totals.masked_fill(~paths.has(reached, level), -math.inf)
        scores, slot = totals.flatten(1).topk(min(width, totals[0].numel()))
        parents, tokens, beams = slot // token.shape[2], *(x.flatten(1).gather(1, slot) for x in (token, reached))
        alive = scores > -math.inf
        kept.append(alive.sum(1))
        legal.append((alive & paths.has(beams, level)).sum(1))
    beams = torch.nn.functional.pad(beams.masked_fill(~alive, -1), (0, width - beams.shape[1]), value=-1)
    return Found(beams, torch.stack(kept, 1), torch.stack(legal, 1))


def free(logits: Logits, data: Data, paths: Paths, batch: int, width: int) -> Found:
    return engine(logits, paths, batch, width, 2 * width, filtered=False)


def filtered(logits: Logits, data: Data, paths: Paths, batch: int, width: int) -> Found:
    return engine(logits, paths, batch, width, 2 * width, filtered=True)


def filtered_in_python(logits: Logits, data: Data, paths: Paths, batch: int, width: int) -> list[list[int]]:
    """``filtered`` for one query with a Python object a candidate, as the front end of an engine holds them."""
    beams: list[tuple[float, list[int], int, int]] = [(0.0, [0], 0, 0)]  # score, tokens, path, slot of the parent
    for level in range(paths.levels):
        last = torch.tensor([[tokens[-1] for _, tokens, _, _ in beams]])
        best, token = logits(last, torch.tensor([[beam[3] for beam in beams]]), level).log_softmax(-1).topk(2 * width)
        candidates = []
        for slot, (score, tokens, path, _) in enumerate(beams):
            returned = dict(zip(token[0, slot].tolist(), best[0, slot].tolist(), strict=True))
            for number, logp in returned.items():
                reached = path * paths.base + number
                if reached in paths.known[level]:
                    candidates.append((score + logp, [*tokens, number], reached, slot))
        beams = sorted(candidates, key=lambda beam: beam[0], reverse=True)[:width]
    return [tokens for _, tokens, _, _ in beams]


SEARCHES = {"ours": ours, "free": free, "filtered": filtered}
#: What is timed: the search, and how the model is asked.
TIMED: dict[str, tuple[Callable[..., Any], Callable[..., Logits]]] = {
    "ours": (ours, _kept_prompts),
    "free": (free, _kept_prompts),
    "filtered": (filtered, _kept_prompts),
    "filtered, an object a candidate": (filtered_in_python, _kept_prompts),
    "filtered, prompts run again": (filtered, ResubmittedPrompts),
}


@torch.no_grad()
def run(model: Any, data: Data, paths: Paths, cases: list[Case], width: int) -> dict[str, Found]:
    """What each search finds, in the order of the cases."""
    by_length: dict[int, list[int]] = {}
    for row, case in enumerate(cases):
        by_length.setdefault(min(len(case.history), HISTORY), []).append(row)
    order: list[int] = []
    parts: dict[str, list[Found]] = {name: [] for name in SEARCHES}
    for rows in by_length.values():
        for at in range(0, len(rows), BATCH):
            order += rows[at : at + BATCH]
            prompts = _prompts(data, [cases[row] for row in rows[at : at + BATCH]])
            for name, search in SEARCHES.items():
                parts[name].append(search(_kept_prompts(model, prompts), data, paths, len(prompts), width))
        _check(model, data, paths, prompts, width, parts["ours"][-1])
    back = torch.tensor(order).argsort()
    return {
        name: Found(*(torch.cat(field)[back] for field in zip(*found, strict=True))) for name, found in parts.items()
    }


def _check(model: Any, data: Data, paths: Paths, prompts: Tensor, width: int, expected: Found) -> None:
    """The filtered search that is given every log-prob finds what ours does, but for the order of near ties."""
    full = engine(_kept_prompts(model, prompts), paths, len(prompts), width, paths.base, filtered=True)
    same = (full.paths.sort(1).values == expected.paths.sort(1).values).float().mean()
    if same < 0.999:
        raise SystemExit(f"{MODULE}: the filtered search over all log-probs differs from ours: {float(same):.4f} equal")


def summary(found: Found, reference: Found, paths: Paths, cases: list[Case], width: int) -> dict[str, Any]:
    """Means over the cases. A row that is no item is left out before ranks are counted, as an application would do."""
    rows = _items_first(found, paths)
    wanted = paths.sids[torch.tensor([case.item for case in cases])]
    hits = rows == wanted[:, None]
    legal = found.legal.double()
    first, expected = (found_rows[:, :10].sort(1).values for found_rows in (rows, _items_first(reference, paths)))
    return {
        "beams_kept": found.kept.double().mean(0).tolist(),
        "legal_share": (legal.mean(0) / width).tolist(),
        "no_item": float((legal[:, -1] == 0).double().mean()),
        "under_10_items": float((legal[:, -1] < 10).double().mean()),
        **{f"recall@{k}": float(hits[:, :k].any(1).double().mean()) for k in CUTS},
        "same_first_10": float((first == expected).all(1).double().mean()),
        "requests": 1 + float(found.kept[:, :-1].sum(1).double().mean()),
    }


def _items_first(found: Found, paths: Paths) -> Tensor:
    """The paths that lead to an item, best first, and -1 for each that does not."""
    legal = paths.has(found.paths, paths.levels - 1)
    order = (~legal).long().argsort(dim=1, stable=True)
    return found.paths.masked_fill(~legal, -1).gather(1, order)


@torch.no_grad()
def times(model: Any, data: Data, paths: Paths, cases: list[Case], width: int) -> dict[str, Any]:
    """Milliseconds per query, and how many times ours: medians over the cases, the first of which is not counted."""
    costs: dict[str, list[Cost]] = {name: [] for name in TIMED}
    for case in cases:
        prompts = _prompts(data, [case])
        for name, (search, ask) in TIMED.items():
            costs[name].append(timed(lambda f=search, ask=ask, of=prompts: f(ask(model, of), data, paths, 1, width)))
    ours = [cost.wall for cost in costs["ours"][1:]]
    return {
        name: {
            "ms": 1e3 * middle(values[1:]).wall,
            "cpu_ms": 1e3 * middle(values[1:]).cpu,
            "times_ours": statistics.median(a.wall / b for a, b in zip(values[1:], ours, strict=True)),
        }
        for name, values in costs.items()
    }


def _prompts(data: Data, cases: list[Case]) -> Tensor:
    return torch.tensor(data.prompts(case.history for case in cases))


def _spread(cases: list[Case], most: int) -> list[Case]:
    return cases[:: math.ceil(len(cases) / most)]


def run_setting(data: Data, epochs: int, share: float, most: int) -> Iterator[dict[str, Any]]:
    """The measurements with one model and one part of the catalogue: a cell for each width."""
    state = sft.train(data, 0, report.ROOT / f".alignment/engines-{data.name}-{epochs}.pt", epochs)
    model = sft.make_model(data)
    model.load_state_dict(state["model"])
    model.eval()
    allowed = torch.rand(len(data.sids), generator=torch.Generator().manual_seed(0)) < share
    paths = Paths(data, allowed)
    cases = _spread([case for case in data.test if allowed[case.item]], most)
    setting = {"epochs": epochs, "loss": state["losses"][-1], "share": share, "cases": len(cases)}
    for width in WIDTHS:
        found = run(model, data, paths, cases, width)
        yield {
            **setting,
            "width": width,
            "searches": {name: summary(one, found["ours"], paths, cases, width) for name, one in found.items()},
            "times": times(model, data, paths, _spread(cases, 60), width) if (epochs, share) == SETTINGS[0] else {},
        }


def tables(cells: list[dict[str, Any]], vocab_size: int) -> dict[str, str]:
    found, cost, times_rows = [], [], []
    for cell in cells:
        width, epochs = cell["width"], cell["epochs"]
        setting = [f"{epochs} epoch{'s' * (epochs > 1)}, {cell['share']:.0%} of the items", str(width)]
        for name, row in cell["searches"].items():
            shares = " / ".join(f"{100 * share:.1f}" for share in row["legal_share"])
            recalls = [f"{row[f'recall@{k}']:.4f}" if k <= width else "-" for k in CUTS]
            dead = [f"{100 * row[key]:.1f} %" for key in ("no_item", "under_10_items", "same_first_10")]
            found.append([*setting, name, shares, *dead, *recalls])
            if cell["times"] and name != "ours":
                logps = row["requests"] * min(2 * width, vocab_size)
                cost.append([*setting, name, *(f"{count:,.0f}" for count in (row["requests"], logps, logps * ENTRY))])
        for name, row in cell["times"].items():
            ms = [f"{row['ms']:.1f}", f"{row['cpu_ms']:.1f}"]
            times_rows.append([*setting, name, *ms, f"{row['times_ours']:.2f}x"])
    recalls = [f"recall@{k}" for k in CUTS]
    shares = "beams that lead to an item, % of W by level"
    counts = ["requests a query", "log-probs returned", "bytes"]
    head = ["model and catalogue", "W", "search"]
    return {
        "found": report.markdown([*head, shares, "no item", "fewer than 10", "same first 10 as ours", *recalls], found),
        "cost": report.markdown([*head, *counts], cost),
        "times": report.markdown([*head, "ms a query", "CPU ms", "ours = 1"], times_rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Engines' beam search beside ours.")
    parser.add_argument(
        "--data", type=Path, default=catalogues.DATA / "instruments", help="a catalogue's folder, in LETTER's layout"
    )
    parser.add_argument("--quick", action="store_true", help="few cases")
    parser.add_argument("--out", type=Path, help="write the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(options.data)
    most = 200 if options.quick else 2000
    cells = [cell for setting in SETTINGS for cell in run_setting(data, *setting, most=most)]
    print("\n\n".join(tables(cells, data.vocab_size).values()))
    if options.out:
        head = {"threads": 1, "catalogue": data.name, "vocabulary": data.vocab_size}
        results.write(options.out, {MODULE: {**report.environment(MODULE), **head, "results": cells}})


if __name__ == "__main__":
    main()
