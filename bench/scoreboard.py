"""What a run prints: a block a case with a line a contestant, and what became of the bars."""

import statistics

from machine import MIB
from race import Result

COLUMNS = ("median ms", "spread", "", "share", "extra MiB", "ours/it", "error")


def table(results: list[Result], rates: dict[str, dict[str, float]] | None = None) -> str:
    """One block a case, one line a contestant. The share is that of a device's ``rates``."""
    lines = []
    for result in results:
        unit = "GB/s" if result.case.bytes else "TFLOP/s"
        lines += ["", result.case.title]
        lines.append(line("", *(column or unit for column in COLUMNS), ""))
        verdicts = result.verdicts()
        for who, seconds in result.seconds.items():
            if not seconds:
                lines.append(f"  {who:12}  out of memory")
                continue
            bar, met = verdicts.get(who, ("", True))
            notes = [bar and f"{bar}: {'met' if met else 'MISSED'}", *notes_of(result, who)]
            if who == "product":
                notes.insert(0, f"ours reach {result.share():.0%} of its rate")
            cells = numbers(result, who, (rates or {}).get(result.case.device, {}))
            lines.append(line(who, *cells, ", ".join(filter(None, notes))))
    return "\n".join(lines)


def numbers(result: Result, who: str, rates: dict[str, float]) -> list[str]:
    """The cells of a contestant's line."""
    case, seconds = result.case, result.seconds[who]
    median = statistics.median(seconds)
    rate = case.count_of(who) / median
    peak = rates.get("copy" if case.bytes else f"{case.dtype} product")
    shown = rate / (1e9 if case.bytes else 1e12)
    error = result.errors.get(who)
    return [
        milliseconds(median),
        spread(seconds),
        (f"{shown:.3f}" if shown < 100 else f"{shown:.0f}") if rate else "",
        f"{rate / peak:.0%}" if rate and peak else "",
        f"{result.extra[who] / MIB:.1f}" if who in result.extra else "",
        f"{result.ratio(who):.2f}" if who != "ours" else "",
        "" if error is None else f"{error:.0e}" if error else "0",
    ]


def notes_of(result: Result, who: str) -> list[str]:
    notes = []
    if result.case.images is not None:
        median = statistics.median(result.seconds[who])
        notes.append(f"{result.case.images / median:.0f} images/s")
        if "network" in result.seconds and who != "network":
            notes.append(f"the loss {result.loss_share(who):.1%}")
    if result.is_chosen() and who == result.case.choice.peer:
        notes.append(f"ours are {result.gain():.2f} times as fast: to be chosen")
    if who in result.agreement:
        notes.append(f"finds {result.agreement[who]:.2%} of the columns")
    return notes


def line(who: str, *cells: str) -> str:
    *numbers, notes = cells
    widths = (11, 8, 9, 7, 11, 9, 8)
    padded = (f"{number:>{width}}" for number, width in zip(numbers, widths, strict=True))
    return f"  {who:12}{''.join(padded)}  {notes}".rstrip()


def summary(results: list[Result]) -> str:
    """One line a case: ours, the share of the product's rate, and what ours takes of each peer."""
    lines = []
    for result in results:
        median = statistics.median(result.seconds["ours"])
        rate = result.case.count_of("ours") / median
        cells = [f"{milliseconds(median)} ms"]
        cells.append(
            f"{rate / 1e9:.0f} GB/s" if result.case.bytes else f"{rate / 1e12:.1f} TFLOP/s"
        )
        if "product" in result.case.peers:
            cells.append(f"{result.share():.0%} of the product's")
        peers = [peer for peer in result.case.peers if peer != "product"]
        cells += [
            f"{result.ratio(peer):.2f} of {peer}" if result.seconds[peer] else f"{peer}: no room"
            for peer in peers
        ]
        if "ours" in result.extra:
            cells.append(f"{result.extra['ours'] / MIB:.0f} MiB")
        if result.is_chosen():
            cells.append(f"{result.gain():.2f} times as fast as {result.case.choice.peer}")
        cells += [f"MISSED: {bar}" for bar, met in result.verdicts().values() if not met]
        lines += [result.case.title, f"   {', '.join(cells)}"]
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds >= 1e-3 else f"{seconds * 1e3:.3f}"


def spread(seconds: list[float]) -> str:
    """The width of the middle half of the times, as a fraction of their median."""
    if len(seconds) < 2:
        return ""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{(high - low) / median:.0%}"


def medians(results: list[Result]) -> dict[str, tuple[str, bool]]:
    """In words, every median over cases, and whether it meets its bars; by title."""
    found = {}
    of = {result.case.median: None for result in results if result.case.median}
    for median in of:
        cases = [
            result
            for result in results
            if result.case.median == median and median.peer in result.seconds
        ]
        if not cases:
            continue
        ratios = {"time": (median.time, [case.ratio(median.peer) for case in cases])}
        if all(case.extra for case in cases):
            memory = [case.memory_ratio(median.peer) for case in cases]
            ratios["memory"] = (median.memory, memory)
        middle = {what: statistics.median(values) for what, (_, values) in ratios.items()}
        told = ", ".join(
            f"{what} {middle[what]:.2f} (bar {bar:.2f})" for what, (bar, _) in ratios.items()
        )
        met = all(middle[what] <= bar for what, (bar, _) in ratios.items())
        verdict = "met" if met else "MISSED"
        text = f"median over {len(cases)} {median.title}, ours to {median.peer}: {told}: {verdict}"
        found[median.title] = text, met
    return found


def choices(results: list[Result]) -> list[dict[str, str | float | bool]]:
    """Of every case that decides between backends: how many times as fast ours is, and whether that
    is enough."""
    return [
        {
            "op": result.case.choice.op,
            "dtype": result.case.choice.dtype,
            "width": result.case.choice.width,
            "case": result.case.title,
            f"{result.case.choice.peer}_to_ours": result.gain(),
            "chosen": result.is_chosen(),
        }
        for result in results
        if result.gain() is not None
    ]
