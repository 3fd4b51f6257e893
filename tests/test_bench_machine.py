"""What a benchmark run knows of its machine: how fast it is, who else is there, what it can run."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="benchmarks need pytest-benchmark")

RATES = {"fp32 product": 1.1e9, "bf16 product": 9e9, "copy": 1e9}  # the first is told from 2^30


def planned(race, rounds=5, spent=0.0, memory=1e9, full=False, **about):
    """What of a case fits: a second is a case's share of the run, and of one product."""
    budget = importlib.import_module("budget")
    monkeyed = budget.Budget(float(budget.CASES), RATES, memory, full)
    case = {"peers": ("eager", "floor"), "flop": 2.0**30 / 100, "pairs": 1e6, **about}
    found, told = monkeyed.fit(race.Case("a case", dict, (2, 2), **case), rounds, spent)
    return found and (found.peers, found.rounds), told


def test_what_fits_runs_whole(race):
    assert planned(race) == ((("eager", "floor"), 5), [])


def test_a_case_that_would_take_long_has_fewer_rounds_and_then_one(race):
    # Ours twice, eager and the floor: 7.4 times the products.
    assert planned(race, flop=2.0**30 / 30)[0] == (("eager", "floor"), 3)
    assert planned(race, flop=2.0**30 / 16)[0] == (("eager", "floor"), 0)
    assert planned(race, flop=2.0**30 / 16, rounds=1)[0] == (("eager", "floor"), 1)


def test_a_peer_that_would_take_too_long_is_left_out_and_named(race):
    found, told = planned(race, flop=2.0**30 / 5)
    assert found == (("floor",), 0)
    assert told == ["a case: no eager: a call would take about 1 seconds: --full"]
    assert planned(race, flop=2.0**30 / 5, full=True) == ((("eager", "floor"), 0), [])


def test_a_case_that_would_take_too_long_says_how_long(race):
    assert planned(race, flop=2.0**30 * 100) == (
        None,
        ["one round would take about 12 minutes: --full"],
    )
    assert planned(race, flop=2.0**30, peers=()) == (
        None,
        ["one round would take about 2 seconds: --full"],
    )


def test_a_peer_without_memory_is_left_out_and_a_case_without_memory_too(race):
    found, told = planned(race, memory=4e7)
    assert found == (("floor",), 5)
    assert told == ["a case: no eager: it would take about 0 GB, 0 GB are free"]
    assert planned(race, held=3e9) == (None, ["it would take about 3 GB, 1 GB are free"])


def test_a_run_whose_time_is_over_says_so(race):
    seconds = importlib.import_module("budget").CASES
    over = [f"the {seconds} seconds of this run are over: --budget"]
    assert planned(race, spent=seconds - 0.01) == (None, over)
    assert planned(race, spent=seconds - 0.01, full=True)[0] is not None


def test_a_peer_that_is_not_installed_is_left_out_and_named(race, monkeypatch):
    rivals = importlib.import_module("rivals")
    monkeypatch.setitem(rivals.PACKAGES, "floor", "no_such_package")
    assert planned(race) == ((("eager",), 5), ["no floor: no_such_package is not installed"])
    assert planned(race, device="cuda")[0] == (("eager",), None)


def machine():
    return importlib.import_module("machine")


def test_what_others_took_of_the_processors_is_told_if_it_is_much(race):
    moment = machine().Moment
    before, after = moment(10, 5, 1, 3), moment(20, 20, 1.1, 13)
    # 15 of 20 seconds were busy, 10 of them by us; 0.1 were stolen.
    assert before.taken(after, processors=2) == {"other processes": 0.25}
    assert before.taken(moment(20, 15, 3, 13), processors=2) == {"other guests of the host": 0.1}


@pytest.mark.skipif(
    not Path("/proc/stat").exists(), reason="processors tell of themselves on Linux"
)
def test_time_of_the_own_processes_is_counted(race):
    before = machine().now()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    after = machine().now()
    assert after.own - before.own >= 0.1
    assert after.busy - before.busy >= after.own - before.own - 0.1


def test_a_machine_that_becomes_slower_is_told(race):
    pace = machine().Pace
    first = pace({"copy": 1e10, "fp32 product": 2e11}, frequency=3.0, throttled=5)
    assert first.falls(pace({"copy": 1.05e10, "fp32 product": 1.9e11}, 2.9, 5)) == []
    slow = pace({"copy": 1e10, "fp32 product": 1.5e11}, 2.4, 7, ("its power limit",))
    assert first.falls(slow) == [
        "the rate of fp32 product went from 200 GFLOP/s to 150 GFLOP/s during the run",
        "the processors' frequency fell from 3.00 to 2.40 GHz during the run",
        "the processors were throttled 2 times: they were too hot",
        "the GPU is slowed by its power limit",
    ]


def test_what_slows_a_gpu_is_read_from_its_bits(race):
    assert machine().brakes_in("0x0000000000000005") == ("its power limit",)
    assert machine().brakes_in("0x0000000000000001") == machine().brakes_in("unknown") == ()


def test_rates_are_those_of_products_and_of_a_copy(race, monkeypatch):
    monkeypatch.setitem(machine().SIZES, "cpu", (64, 16))
    monkeypatch.setattr(machine(), "last_cache", lambda: 2**16)
    monkeypatch.setattr(machine(), "fastest", lambda call, device: call() is None or 1e-3)
    flop = 2 * 64 * 64 * 16 / 1e-3
    expected = {"fp32 product": flop, "bf16 product": flop, "copy": 2 * 2**17 / 1e-3}
    assert machine().rates("cpu") == pytest.approx(expected)
