"""What a run leaves in bench/results/: the machine, and every round of every contestant."""

import math
from datetime import date

from race import Result
from scoreboard import choices, medians

NOISE = 0.10  # of ours beside itself: more is too much
MANY = 0.2  # of the cases that have too much: more are told


def record(
    results: list[Result],
    about: dict[str, str | float],
    kind: str,
    rates: dict[str, float],
    notes: list[str],
) -> dict:
    """As `idml_fast.benchmarks.records` writes it; bench/results/README.md tells the keys."""
    return {
        "date": str(date.today()),
        "kind": kind,
        **about,
        "rates": rates,
        "notes": notes,
        "cases": [case_of(result) for result in results],
        "medians": [text for text, _ in medians(results).values()],
        "choices": choices(results),
    }


def case_of(result: Result) -> dict:
    case = result.case
    return {
        "case": case.title,
        "op": case.op,
        "dtype": case.dtype,
        "flop": case.flop,
        "bytes": case.bytes,
        "product_flop": case.product_flop,
        "seconds": result.seconds,
        "extra_bytes": result.extra,
        "ours_to": {
            who: result.ratio(who)
            for who, seconds in result.seconds.items()
            if who != "ours" and seconds
        },
        "errors": {who: error for who, error in result.errors.items() if math.isfinite(error)},
        "agreement": result.agreement,
        "bars": case.bars,
        "memory_bar_mib": case.memory_bar,
        "seconds_bar": case.seconds_bar,
        "share_bar": case.share_bar,
        "floor_bar": case.floor_bar,
    }


def doubts(results: list[Result]) -> list[str]:
    """In words, what makes the numbers of a run worth less than they look."""
    found = []
    for who in sorted({who for result in results for who in result.taken}):
        shares = {x.case.title: x.taken[who] for x in results if who in x.taken}
        most = max(shares, key=shares.get)
        found.append(
            f"{who} took time of the processors in {len(shares)} of {len(results)} cases, "
            f"{shares[most]:.0%} in the worst: {most}"
        )
    found += [
        f"{result.case.title}: the results of {who} are not finite"
        for result in results
        for who, error in result.errors.items()
        if not math.isfinite(error)
    ]
    # Of one round each there is no median, and the ratio is that of two calls.
    noises = [result.noise() for result in results if len(result.seconds["ours"]) > 1]
    noisy = [noise for noise in noises if noise is not None and noise > NOISE]
    if len(noisy) > MANY * len(noises):
        found.append(
            f"ours, measured twice, differs from itself by more than {NOISE:.0%} in {len(noisy)} "
            f"of {len(noises)} cases"
        )
    return found
