"""A session check as text: its figures, and what they mean for training."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from raddpo_ext.data.session_check import Distribution, Found, SessionCheck

# From these figures on, meaning() has a sentence. docs/training.md lists them.
FEW_NEGATIVES = 4  # per session
RARELY_SHARED = 0.01  # of the negatives
CLOSE = 1.5  # times as many shared prefixes as by chance
TRIE_SAVES = 0.1  # of the packed tokens
TELLING = 0.25  # share by chance, above which first tokens tell little
POPULAR = 0.2  # of the negatives, by 1 % of the items
DISPUTED = 0.05  # of the sessions
FALSE_NEGATIVES = 0.01  # of the negatives
REPEATED = 0.01  # of the sessions
ENOUGH = 100  # sessions, negatives and different negatives, for a hint at what the negatives are
DEPTHS = 6  # first tokens of which a report shows how often they are shared
_WIDTH = 100


def report(check: SessionCheck) -> str:
    """The figures in aligned tables, and :func:`meaning` as a list."""
    lines = [
        f"{check.path}: {check.sessions:,} sessions in {check.rows:,} {check.place}s",
        "",
        *_aligned(_distributions(check)),
        "",
        *_aligned(_tallies(check)),
        "",
        *_aligned(_prefixes(check)),
        "",
        *_aligned(_tokens(check)),
        "",
        *_aligned(_faults(check), left=(0, 4)),
        "",
        "What this means",
        "",
    ]
    for text in meaning(check).values():
        lines += textwrap.wrap(text, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def meaning(check: SessionCheck) -> dict[str, str]:
    """A sentence or two for each figure that asks for it, by a short name."""
    return dict(_meaning(check))


def _meaning(check: SessionCheck) -> Iterator[tuple[str, str]]:
    yield from _about_rows(check)
    yield from _about_sides(check)
    yield from _about_negatives(check)
    yield from _about_prefixes(check)
    yield from _about_repeats(check)


def _about_rows(check: SessionCheck) -> Iterator[tuple[str, str]]:
    if check.skipped:
        rows = sum(found.count for found in check.skipped.values())
        yield (
            "skipped",
            f"Rows that are not sessions: {rows:,} of {check.rows:,}. No other figure counts them. read_sessions stops "
            'at the first one, and leaves them out with on_error="skip".',
        )
    unknown = check.unknown_candidates
    if unknown is not None and 0 < unknown.total == unknown.count:
        yield "unknown", "Not one candidate is in the index: it is the index of another catalogue, or other token ids."
    elif unknown is not None and unknown.count:
        yield (
            "unknown",
            f"{_percent(unknown.count, unknown.total)} of the candidates are not in the index. A search of the index "
            "never returns them, and read_sessions(index=...) refuses their sessions.",
        )


def _about_sides(check: SessionCheck) -> Iterator[tuple[str, str]]:
    no_positives, no_negatives = _none(check.positives_per_session), _none(check.negatives_per_session)
    if no_positives:
        yield (
            "no_positives",
            f"{_percent(no_positives, check.sessions)} of the sessions have no positives. They add nothing to any term "
            "of the loss.",
        )
    if no_negatives == check.sessions:
        yield "no_negatives", "No session has negatives: there is only the SFT term, and no preference to learn."
    elif no_negatives:
        yield (
            "no_negatives",
            f"{_percent(no_negatives, check.sessions)} of the sessions have no negatives. They train the SFT term "
            "only.",
        )
    if no_negatives < check.sessions and check.negatives_per_session.median < FEW_NEGATIVES:
        yield (
            "few_negatives",
            f"At least half of the sessions have fewer than {FEW_NEGATIVES} negatives. A list-wise loss (RAD-DPO, "
            "S-DPO) weighs a session's negatives against each other, and has little to choose from.",
        )
    if check.positives_per_session.max == 1:
        yield (
            "one_positive",
            'No session has a second positive: positives="each" and "pooled" give what "winner" gives.',
        )


def _about_negatives(check: SessionCheck) -> Iterator[tuple[str, str]]:
    """What kind of negatives they are, as far as the figures hint at it."""
    if not check.compared:
        return
    depth = _telling_depth(check)
    if depth and min(check.sessions, check.compared) >= ENOUGH:
        share, chance = check.shared[depth - 1] / check.compared, check.shared_by_chance[depth - 1]
        first = "first token" if depth == 1 else f"first {depth} tokens"
        figures = f"{_percent(share)} of the negatives share the winner's {first}; by chance {_percent(chance)} would"
        if share < CLOSE * chance:
            yield "far", f"{figures}. They look like draws that ignore the prompt, not like items shown for it."
        else:
            yield (
                "close",
                f"{figures}. They look like items shown for the prompt, or like mined siblings of the winner.",
            )
    if check.negatives.distinct >= ENOUGH and check.popular >= POPULAR:
        yield (
            "popular",
            f"1 % of the different negatives make up {_percent(check.popular)} of all: they look like draws by "
            "popularity, or like a page that shows many users the same items.",
        )
    yield (
        "exposure",
        "A log does not say which negatives were shown and passed over. Only these carry a user's choice: on the "
        "search shop of docs/alignment.md eight of them gained .022 NDCG@10, and eight random ones .003.",
    )
    if check.false_negatives.share >= FALSE_NEGATIVES:
        yield (
            "false_negatives",
            f"{_percent(check.false_negatives.share)} of the negatives are positives of another session with the same "
            "prompt. They are likely false negatives, and teach against what other sessions teach: remove them. On the "
            "search shop of docs/alignment.md 30 % of them took the gain from .022 to .014 NDCG@10.",
        )


def _about_prefixes(check: SessionCheck) -> Iterator[tuple[str, str]]:
    shared = check.shared[(_telling_depth(check) or 1) - 1] if check.shared else 0
    if check.compared and shared < RARELY_SHARED * check.compared:
        yield (
            "tlgd",
            f"{_percent(shared, check.compared)} of the negatives share a telling prefix with the winner. Token-level "
            f"gradient detachment (TLGD) {'has little to do' if shared else 'does nothing'} here.",
        )
    saved = (check.tokens_packed - check.tokens_trie) / check.tokens_packed
    if saved >= TRIE_SAVES:
        yield "trie", f'layout="trie" saves {_percent(saved)} of the tokens of layout="candidates".'


def _about_repeats(check: SessionCheck) -> Iterator[tuple[str, str]]:
    if check.several_winners.sessions >= DISPUTED * check.sessions:
        yield (
            "several_winners",
            f"{_percent(check.several_winners.sessions, check.sessions)} of the sessions have a prompt that other "
            "sessions answer with another winner. Merge the sessions of a prompt into one with all their positives, "
            "the strongest first.",
        )
    if check.repeated_sessions.share >= REPEATED:
        yield (
            "repeated_sessions",
            f"{_percent(check.repeated_sessions.share)} of the sessions repeat an earlier one. They count twice, and "
            "one copy can fall into the training set and the other into the validation set.",
        )
    if check.repeated_candidates.count:
        yield (
            "repeated_candidates",
            f"Sessions that hold a candidate twice: {check.repeated_candidates.sessions:,}. Each copy counts in the "
            "loss.",
        )


def _telling_depth(check: SessionCheck) -> int | None:
    """The least number of first tokens that candidates rarely share by chance, so not a token that opens every SID."""
    return next((depth for depth, chance in enumerate(check.shared_by_chance, 1) if chance < TELLING), None)


def _none(counts: Distribution) -> int:
    """How many sessions have none."""
    return counts.histogram.get(0, 0)


def _distributions(check: SessionCheck) -> Iterator[Sequence[str]]:
    yield "per session", "min", "median", "mean", "max", "sessions with none"
    for name, values in (
        ("prompt tokens", check.prompt_lengths),
        ("positives", check.positives_per_session),
        ("negatives", check.negatives_per_session),
    ):
        none = _percent(_none(values), check.sessions)
        yield name, str(values.min), f"{values.median:.1f}", f"{values.mean:.1f}", str(values.max), none


def _tallies(check: SessionCheck) -> Iterator[Sequence[str]]:
    yield "in the log", "number", "different"
    for name, tally in (("prompts", check.prompts), ("positives", check.positives), ("negatives", check.negatives)):
        yield name, f"{tally.count:,}", f"{tally.distinct:,}"


def _prefixes(check: SessionCheck) -> Iterator[Sequence[str]]:
    depths = range(min(len(check.shared), DEPTHS))
    yield "first tokens shared with the winner", *(f">= {depth + 1}" for depth in depths)
    yield "negatives that share them", *(_percent(check.shared[depth], check.compared) for depth in depths)
    yield "by chance", *(_percent(check.shared_by_chance[depth]) for depth in depths)


def _tokens(check: SessionCheck) -> Iterator[Sequence[str]]:
    yield "tokens that a model reads", "number", "of the first"
    for name, number in (
        ("one row per candidate", check.tokens_replicated),
        ('packed, layout="candidates"', check.tokens_packed),
        ('packed, layout="trie"', check.tokens_trie),
    ):
        yield name, f"{number:,}", _percent(number, check.tokens_replicated)


def _faults(check: SessionCheck) -> Iterator[Sequence[str]]:
    yield "faults", "number", "share", "sessions", f"first {check.place}s"
    both = "both positive and negative"
    rows = {f"rows skipped: {reason}": found for reason, found in check.skipped.items() if reason != both}
    faults = rows | {
        f"rows skipped: {both}": check.skipped.get(both, Found(0, check.rows, 0, [])),
        "negatives positive in another session of the prompt": check.false_negatives,
        "prompts with different winners": check.several_winners,
        "sessions repeated": check.repeated_sessions,
        "candidates repeated in a session": check.repeated_candidates,
        "candidates not in the index": check.unknown_candidates,
        "items not in the index": check.unknown_items,
    }
    for name, found in faults.items():
        if found is None:
            yield name, "no index", "", "", ""
        else:
            places = ", ".join(map(str, found.places)) + ", ..." * (found.sessions > len(found.places))
            yield name, f"{found.count:,}", _percent(found.share), f"{found.sessions:,}", places


def _percent(part: float, whole: float = 1) -> str:
    """A share, in which 0 % and 100 % are exact."""
    share = 100 * part / whole if whole else 0.0
    if share in (0, 100):
        return f"{share:.0f} %"
    return "<0.1 %" if share < 0.05 else ">99.9 %" if share > 99.95 else f"{share:.1f} %"


def _aligned(rows: Iterator[Sequence[str]], left: Sequence[int] = (0,)) -> Iterator[str]:
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
