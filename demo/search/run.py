"""The search shop's demo: a log, SFT on its clicks, alignment on its pages, and retrieval against the truth."""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

import raddpo_ext as rx
from demo.measure import interval, latencies
from demo.search import align, report
from demo.search.data import Tokens, sessions_of
from demo.search.figure import draw
from demo.search.model import make_model, train
from demo.search.report import Ranking
from demo.search.shop import Queries, SearchShop

CLICKS, SESSIONS, CASES = 20_000, 5_000, 1_500
EPOCHS = 6  # of SFT; two less than in the experiment, for time
FULL = 3  # times as many of each
REAL_VOCABULARY = 151_936  # Qwen3's
TIMED = 10  # queries
ARTIFACTS = Path(".demo") / "search"


def run(options: argparse.Namespace) -> int:
    """Exit code 1 when the interval of RAD-DPO's gain over SFT holds 0."""
    started, more = time.perf_counter(), FULL if options.full else 1
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    clicks, sessions, cases = (
        given or more * default
        for given, default in ((options.clicks, CLICKS), (options.sessions, SESSIONS), (options.cases, CASES))
    )

    # The shop, and what it has logged.
    shop = SearchShop.make(options.seed)
    tokens = Tokens.of(shop)
    rng = np.random.default_rng([options.seed, 1])
    log, fresh = shop.log(clicks, rng), shop.log(sessions, rng)
    print(f"shop         {tokens.index.num_items:,} items; its old ranker showed {clicks + sessions:,} pages of 12,")
    print(f"             {log.clicked.sum(1).mean():.1f} clicks and {log.ordered.sum(1).mean():.2f} orders on each")

    # SFT on every click.
    begin = time.perf_counter()
    model = _fit(tokens, sessions_of(log, rng, shop.constants.page, 0), options)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"SFT          {size:,} parameters, on {log.clicked.sum():,} clicks{_since(begin)}")

    # Alignment on fresh pages: what was ordered or clicked, above what was shown and passed over.
    path = ARTIFACTS / "sessions.jsonl"
    pages = align.write_log(sessions_of(fresh, rng, align.POSITIVES, align.NEGATIVES), tokens, path)
    aligned = {}
    for name, settings in (("S-DPO", align.S_DPO), ("RAD-DPO", align.RAD_DPO)):
        begin = time.perf_counter()
        aligned[name], last = align.align(model, tokens, pages, settings, ARTIFACTS, options.seed)
        print(
            f"{name:13}{len(pages):,} pages, winner ahead in {last['rewards/accuracies']:.0%} of pairs{_since(begin)}"
        )

    # Against the truth.
    queries = shop.queries(cases, rng)
    truth = shop.order_probability(queries)
    rankings = {"old ranker": report.ranking(shop.pages(queries, rng), truth)}
    for name, trained in {"SFT": model, **aligned}.items():
        rankings[name] = report.rank(trained, tokens, queries, truth)
    print(f"\n{cases:,} new queries; orders: expected of whoever looks at the best ten; invalid: without the index")
    print("\n".join(report.table(rankings, "SFT")))
    _show_examples(shop, queries, truth, rankings)
    _show_latency(aligned["RAD-DPO"], tokens, queries)

    picture = ARTIFACTS / "result.png"
    draw(rankings, "SFT", picture)
    _save(aligned["RAD-DPO"], shop, tokens)
    print(f"\npicture      {picture}")
    print(f"serve it     python -m raddpo_ext serve --model {ARTIFACTS}/model --index {ARTIFACTS}/shop.index \\")
    print(f"               --store {ARTIFACTS}/catalogue")
    print(f'ask it       curl localhost:8000/retrieve -d \'{{"text": "{shop.text(queries.rows(slice(0, 1)))}"}}\'')
    print(f"in all       {time.perf_counter() - started:.0f} s")
    gain = rankings["RAD-DPO"].ndcg - rankings["SFT"].ndcg
    if interval(torch.from_numpy(gain))[0] <= 0:
        print("demo: the interval of RAD-DPO's gain holds 0", file=sys.stderr)
        return 1
    return 0


def _fit(tokens: Tokens, clicks: object, options: argparse.Namespace) -> Qwen3ForCausalLM:
    model = make_model(tokens, options.seed)
    with tqdm(desc="SFT", unit="step", disable=None) as bar:

        def show(step: int, steps: int, loss: float) -> None:
            bar.total = steps
            bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
            bar.update()

        return train(model, tokens, clicks, options.seed, options.epochs or EPOCHS, show)


def _show_examples(shop: SearchShop, queries: Queries, truth: np.ndarray, rankings: dict[str, Ranking]) -> None:
    print("\nthree of them, with the probability that a shopper who looks at the item orders it")
    columns = {"shown before": "old ranker", "SFT": "SFT", "RAD-DPO": "RAD-DPO"}
    for row in report.kinds(queries):
        found = {title: rankings[name].items[row] for title, name in columns.items()}
        print("\n" + "\n".join(report.example(shop, queries.rows(slice(row, row + 1)), truth[row], found)))


def _show_latency(model: Qwen3ForCausalLM, tokens: Tokens, queries: Queries) -> None:
    """With the token ids of a real vocabulary, most of which this shop has no use for."""
    large = copy.deepcopy(model)
    large.resize_token_embeddings(REAL_VOCABULARY, mean_resizing=False)
    retriever = rx.SIDRetriever(large, tokens.index, beam_width=report.BEAMS)
    prompts = tokens.prompts(queries.rows(slice(0, TIMED)))
    ours, theirs = latencies(retriever, prompts, rx.item_tokens(tokens.index, tokens.index.items), report.BEAMS)
    print(f"\nlatency of one query, {report.BEAMS} beams, {REAL_VOCABULARY:,} token ids")
    print(f"  SIDRetriever                            {1000 * ours:7.1f} ms")
    print(f"  generate with prefix_allowed_tokens_fn  {1000 * theirs:7.1f} ms, {theirs / ours:.1f} times as long")


def _save(model: Qwen3ForCausalLM, shop: SearchShop, tokens: Tokens) -> None:
    """The model with its tokenizer, and the index with the items' titles, as ``raddpo_ext serve`` takes them."""
    shutil.rmtree(ARTIFACTS / "catalogue", ignore_errors=True)  # the versions of an earlier run
    disable_progress_bar()
    model.save_pretrained(ARTIFACTS / "model")
    tokens.tokenizer(shop).save_pretrained(ARTIFACTS / "model")
    tokens.index.save(ARTIFACTS / "shop.index")
    rx.IdMap(titles=shop.titles()).save(ARTIFACTS / "shop.index")


def _since(begin: float) -> str:
    return f", {time.perf_counter() - begin:.0f} s"
