"""The options, the progress, the table and the record of `pytest bench/ --benchmark-only`."""

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import machine
import pytest
import race
import record
import scoreboard
from budget import Budget

from idml_fast.benchmarks import records


@dataclass
class Session:
    """What a run knows so far."""

    load: float  # of the machine, before it
    begun: float = field(default_factory=time.monotonic)
    paces: dict[str, machine.Pace] = field(default_factory=dict)  # by device, before its cases
    results: list[race.Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is left out of cases, and why

    @property
    def spent(self) -> float:
        return time.monotonic() - self.begun

    @property
    def device(self) -> str:
        on_gpu = any(result.case.device == "cuda" for result in self.results)
        return "cuda" if on_gpu else "cpu"


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser):
    group = parser.getgroup("idml_fast benchmarks")
    group.addoption("--rows", type=int, default=4096, help="N = M of the dense cases (4096)")
    group.addoption("--rounds", type=int, default=5, help="rounds a case, at most (5)")
    group.addoption(
        "--budget",
        type=float,
        default=600,
        metavar="SECONDS",
        help="that the run may take: what takes too large a part of it is left out (600)",
    )
    group.addoption("--full", action="store_true", help="also what takes minutes, and hours in all")
    group.addoption("--check", action="store_true", help="fail the cases that miss a bar")
    group.addoption(
        "--record",
        nargs="?",
        type=Path,
        const=machine.ROOT / "bench" / "results",
        help="write the times as JSON into this folder (bench/results)",
    )


def pytest_configure(config):
    config.stash[SESSION] = Session(round(os.getloadavg()[0], 1))
    # The table below says more; --benchmark-verbose still shows pytest-benchmark's own.
    config.option.benchmark_quiet = True
    # Of torch.compile's own doing.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")


@pytest.fixture
def rows(pytestconfig) -> int:
    return pytestconfig.getoption("--rows")


@pytest.fixture
def full(pytestconfig) -> bool:
    return pytestconfig.getoption("--full")


@pytest.fixture
def race_case(benchmark, pytestconfig, request):
    """Run a race.Case with what there is room for, keep its result for the table, and hold it to
    its bars under --check."""
    if benchmark.disabled:
        pytest.skip("benchmarks are disabled (by --benchmark-disable, or by more than one worker)")
    session, rounds = pytestconfig.stash[SESSION], pytestconfig.getoption("--rounds")

    def run(case: race.Case) -> None:
        case = replace(case, op=request.path.stem.removeprefix("bench_"))
        if case.device not in session.paces:
            session.paces[case.device] = machine.pace(case.device)
        seconds, full = (pytestconfig.getoption(x) for x in ("--budget", "--full"))
        rates = session.paces[case.device].rates
        budget = Budget(seconds, rates, machine.free_memory(), full)
        fitted, told = budget.fit(case, rounds, session.spent)
        if fitted is None:
            pytest.skip(f"{case.title}: {', '.join(told)}")
        session.notes += told
        tell_progress(request, session, case)
        result = race.run(benchmark, fitted, rounds)
        session.results.append(result)
        if pytestconfig.getoption("--check"):
            missed = {who: bar for who, (bar, met) in result.verdicts().items() if not met}
            assert not missed, f"{case.title}: ours misses {missed}"

    return run


def tell_progress(request, session: Session, case: race.Case) -> None:
    plugins = request.config.pluginmanager
    reporter, capture = (plugins.get_plugin(x) for x in ("terminalreporter", "capturemanager"))
    if reporter is None or capture is None:
        return
    items = request.session.items
    place = items.index(request.node) + 1
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        told = f"[{place}/{len(items)}, {session.spent:.0f} s] {case.title} "
        reporter.write(told, flush=True)


def pytest_sessionfinish(session):
    """Under --check a median that misses its bar fails the run, as a case does."""
    results = session.config.stash[SESSION].results
    missed = not all(met for _, met in scoreboard.medians(results).values())
    if missed and session.config.getoption("--check") and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    session = config.stash[SESSION]
    if not session.results:
        return
    results, device, write = session.results, session.device, terminalreporter.write_line
    about = {**machine.about(device), "load before": session.load}
    rates = {device: pace.rates for device, pace in session.paces.items()}
    notes = notes_of(session)
    if exitstatus == pytest.ExitCode.INTERRUPTED:
        notes.insert(0, "the run was interrupted: cases are missing")
    terminalreporter.section("idml_fast against its peers")
    write(", ".join(f"{what} {value}" for what, value in about.items()))
    write(", ".join(f"{what} {machine.told(what, x)}" for what, x in rates[device].items()))
    write(scoreboard.table(results, rates))
    for text, _ in scoreboard.medians(results).values():
        write(f"\n{text}")
    skipped = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", ())]
    notes += dict.fromkeys(reason.removeprefix("Skipped: ") for reason in skipped)
    if notes:
        terminalreporter.section("to be known")
        for note in notes:
            write(note)
    folder = config.getoption("--record")
    if folder is not None:
        found = record.record(results, about, device, rates[device], notes)
        write(f"\nrecorded in {records.write(found, folder)}")
    if device == "cuda":
        terminalreporter.section("in short")
        write(scoreboard.summary(results))


def notes_of(session: Session) -> list[str]:
    """That the machine was busy or grew slower, and what was left out."""
    notes = []
    if session.load > machine.LOAD:
        notes.append(f"the machine was busy before the run: its load was {session.load}")
    for device, pace in session.paces.items():
        notes += pace.falls(machine.pace(device))
    return notes + record.doubts(session.results) + list(dict.fromkeys(session.notes))
