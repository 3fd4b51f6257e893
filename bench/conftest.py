"""The options, the table at the end and the record of `pytest bench/ --benchmark-only`."""

import json
import os
import re
from datetime import date
from pathlib import Path

import pytest
import race

RESULTS = pytest.StashKey[list[race.Result]]()
LOAD = pytest.StashKey[float]()


def pytest_addoption(parser):
    group = parser.getgroup("idml_fast benchmarks")
    group.addoption("--rows", type=int, default=4096, help="N = M of the dense cases (4096)")
    group.addoption("--rounds", type=int, default=5, help="rounds a case (5)")
    group.addoption("--full", action="store_true", help="also the cases that take minutes")
    group.addoption("--check", action="store_true", help="fail the cases that miss a bar")
    group.addoption(
        "--record",
        nargs="?",
        type=Path,
        const=race.ROOT / "bench" / "results",
        help="write the times as JSON into this folder (bench/results)",
    )


def pytest_configure(config):
    config.stash[RESULTS] = []
    config.stash[LOAD] = round(os.getloadavg()[0], 1)


@pytest.fixture
def rows(pytestconfig) -> int:
    return pytestconfig.getoption("--rows")


@pytest.fixture
def full(pytestconfig) -> bool:
    return pytestconfig.getoption("--full")


@pytest.fixture
def race_case(benchmark, pytestconfig):
    """Run a race.Case, keep its result for the table, and hold it to its bars under --check."""
    if benchmark.disabled:
        pytest.skip("benchmarks are disabled (by --benchmark-disable, or by more than one worker)")

    def run(case: race.Case) -> None:
        result = race.run(benchmark, case, pytestconfig.getoption("--rounds"))
        pytestconfig.stash[RESULTS].append(result)
        if pytestconfig.getoption("--check"):
            missed = {who: bar for who, (bar, met) in result.verdicts().items() if not met}
            assert not missed, f"{case.title}: ours misses {missed}"

    return run


def pytest_sessionfinish(session):
    """Under --check a median that misses its bar fails the run, as a case does."""
    missed = not all(met for _, met in race.medians(session.config.stash[RESULTS]).values())
    if missed and session.config.getoption("--check") and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter, config):
    results = config.stash[RESULTS]
    if not results:
        return
    # Of other processes, before this run: more than a few tenths, and its times are worth little.
    device = "cuda" if any(result.case.device == "cuda" for result in results) else "cpu"
    about = {**race.machine(device), "load before": config.stash[LOAD]}
    terminalreporter.section("idml_fast against its peers")
    terminalreporter.write_line(", ".join(f"{what} {value}" for what, value in about.items()))
    terminalreporter.write_line(race.table(results))
    for text, _ in race.medians(results).values():
        terminalreporter.write_line(f"\n{text}")
    folder = config.getoption("--record")
    if folder is not None:
        terminalreporter.write_line(f"\nrecorded in {record(results, about, folder)}")
    if device == "cuda":
        terminalreporter.section("in short")
        terminalreporter.write_line(race.summary(results))


def record(results: list[race.Result], about: dict[str, str | float], folder: Path) -> Path:
    """One file a run: bench/results/<date>-<device>-<commit>.json."""
    device = re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")
    path = folder / f"{date.today()}-{device}-{about['commit']}.json"
    cases = [
        {
            "case": result.case.title,
            "flop": result.case.flop,
            "seconds": result.seconds,
            "extra_bytes": result.extra,
            "ours_to": {
                who: result.ratio(who)
                for who, seconds in result.seconds.items()
                if who != "ours" and seconds
            },
            "bars": result.case.bars,
            "memory_bar_mib": result.case.memory_bar,
            "seconds_bar": result.case.seconds_bar,
            "share_bar": result.case.share_bar,
            "floor_bar": result.case.floor_bar,
        }
        for result in results
    ]
    folder.mkdir(parents=True, exist_ok=True)
    medians = [text for text, _ in race.medians(results).values()]
    choices = race.choices(results)
    found = {**about, "cases": cases, "medians": medians, "choices": choices}
    text = json.dumps(found, indent=1)
    path.write_text(text + "\n")
    return path
