"""Recorded benchmark runs: kept, compared, told; and that the README tells what was recorded."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT

from idml_fast.benchmarks import records
from idml_fast.benchmarks.check import check, compare
from idml_fast.benchmarks.records import RecordError, of, read, read_folder, write

RESULTS = ROOT / "bench" / "results"
OLD = sorted(x for x in RESULTS.glob("2*.json") if "date" not in json.loads(x.read_text()))


def made_up_run(
    cases: dict[str, dict[str, list[float]]] | None = None, **changes: Any
) -> dict[str, Any]:
    """A record as benchmarks write it: of each case the seconds of its contestants."""
    cases = cases or {"a case": {"ours": [1.0], "peer": [2.0]}}
    return {
        "device": "A (CPU)",
        "threads": 2,
        "instructions": "AVX512",
        "torch": "2.13.0+cpu",
        "commit": "0123abc",
        "date": "2026-11-22",
        "kind": "cpu",
        "rates": {"fp32 product": 4e9, "bf16 product": 8e9, "copy": 1e10},
        "notes": [],
        "cases": [
            {
                "case": title,
                "op": "pairwise",
                "flop": 2e9,
                "seconds": seconds,
                "extra_bytes": dict.fromkeys(seconds, 2**20),
                "errors": {"ours": 1e-7},
            }
            for title, seconds in cases.items()
        ],
    } | changes


def rounds(ratio: float, scatter: float, seed: int, number: int = 5, slower: float = 1.0) -> dict:
    """Seconds whose machine is at each round as fast as it likes, ours ``ratio`` times the peer."""
    draw = random.Random(seed)
    found: dict[str, list[float]] = {"ours": [], "ours again": [], "peer": []}
    for _ in range(number):
        moment = slower * math.exp(draw.gauss(0, 0.5))
        for who, usual in (("ours", ratio), ("ours again", ratio), ("peer", 1.0)):
            found[who].append(moment * usual * math.exp(draw.gauss(0, scatter)))
    return found


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_records_from_before_the_newer_keys_are_read(path):
    found, text = read(path), json.loads(path.read_text())
    assert (found.date, found.kind) == (path.name[:10], "cpu")
    assert len(found.cases) == len(text["cases"]) > 0
    for case in text["cases"]:
        told = found.cases[case["case"]]
        assert {peer: told.ratio(peer) for peer in told.peers} == {
            peer: pytest.approx(ratio) for peer, ratio in case["ours_to"].items()
            if peer != "ours again"
        }  # fmt: skip


def test_old_cases_are_of_the_benchmark_that_now_has_them():
    ops = {case.op: title for found in map(read, OLD) for title, case in found.cases.items()}
    assert {op for op in ops if not (ROOT / "bench" / f"bench_{op}.py").exists()} == set()
    assert len(ops) == 7


def test_a_record_of_a_gpu_has_another_kind_without_saying_so():
    found = made_up_run()
    del found["kind"]
    assert of(found).kind == "cpu"
    assert of(found | {"cuda": "13.0"}).kind == "cuda"


def test_a_record_is_named_by_what_it_is_of_and_overwrites_no_other(tmp_path):
    paths = [write(made_up_run(torch=version), tmp_path) for version in ("2.12", "2.13", "2.14")]
    assert [path.name for path in paths] == [
        "2026-11-22-a-cpu-0123abc.json",
        "2026-11-22-a-cpu-0123abc-2.json",
        "2026-11-22-a-cpu-0123abc-3.json",
    ]
    assert [read(path).torch for path in paths] == ["2.12", "2.13", "2.14"]
    assert paths[0].read_text().startswith('{\n "device": "A (CPU)",\n')


def test_the_index_is_in_the_order_of_recording_and_can_be_made_again(tmp_path):
    for commit, date in (("f", "2026-11-22"), ("b", "2026-11-22"), ("c", "2026-11-21")):
        write(made_up_run(commit=commit, date=date), tmp_path)
    (tmp_path / "gpu-errors.json").write_text("{}")  # beside them, and no record
    (tmp_path / "precision.json").write_text("{}")
    listed = json.loads((tmp_path / "index.json").read_text())
    assert [entry["commit"] for entry in listed] == ["c", "f", "b"]
    assert [found.commit for found in read_folder(tmp_path)] == ["c", "f", "b"]
    assert listed[1] == {
        "name": "2026-11-22-a-cpu-f.json",
        "date": "2026-11-22",
        "commit": "f",
        "device": "A (CPU)",
        "kind": "cpu",
        "threads": 2,
        "torch": "2.13.0+cpu",
        "cases": 1,
        "ops": ["pairwise"],
    }
    (tmp_path / "index.json").unlink()
    records.index(tmp_path)
    again = json.loads((tmp_path / "index.json").read_text())
    assert sorted(map(str, again)) == sorted(map(str, listed))  # those of one day by name


def test_a_run_that_cannot_be_written_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write(made_up_run(torch=object()), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", r"is no record of a benchmark run \(Expecting"),
        ("[]", r"is no record of a benchmark run \("),
        ('{"cases": [], "device": "x"}', "is no record of a benchmark run: it has no 'commit'"),
    ],
)
def test_what_is_no_record_is_said_in_a_sentence(tmp_path, text, told):
    path = tmp_path / "2026-11-22-x.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=told):
        read(path)
    with pytest.raises(RecordError, match=r"no.json cannot be read: No such file"):
        read(tmp_path / "no.json")
    (tmp_path / "index.json").write_text("<<<<<<< of two branches")
    with pytest.raises(RecordError, match=r"index.json is no index of records .*: it can be rem"):
        read_folder(tmp_path)


def test_the_index_of_the_repository_is_that_of_its_records(tmp_path):
    folder = shutil.copytree(RESULTS, tmp_path / "results")
    records.index(folder)
    assert (folder / "index.json").read_text() == (RESULTS / "index.json").read_text()


# ---- check


def lost(then: dict, now: dict, **changes: Any) -> list[str]:
    """The cases that a new run has lost."""
    before, after = of(made_up_run({"a case": then})), of(made_up_run({"a case": now}, **changes))
    return [loss.case for loss in compare(after, [before]).losses]


@pytest.mark.parametrize("loss", [1.2, 1.3, 2.0])
@pytest.mark.parametrize("slower", [0.3, 1.0])
def test_a_loss_is_found_however_fast_the_machine_is_now(loss, slower):
    found = [
        bool(lost(rounds(0.5, 0.005, seed), rounds(0.5 * loss, 0.005, seed + 1, slower=slower)))
        for seed in range(0, 200, 2)
    ]
    assert sum(found) >= 98


@pytest.mark.parametrize("scatter", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("number", [3, 5, 9])
def test_noise_alone_is_no_loss(scatter, number):
    found = [
        bool(lost(rounds(0.5, scatter, seed, number), rounds(0.5, scatter, seed + 1, number)))
        for seed in range(0, 600, 2)
    ]
    assert sum(found) <= 3  # of 300


def test_the_limit_is_the_margin_and_the_noise_of_both():
    steady = {"ours": [1.0] * 4, "ours again": [1.0] * 4, "peer": [2.0] * 4}
    (comparison,) = compare(
        of(made_up_run({"x": steady})), [of(made_up_run({"x": steady}))]
    ).compared
    assert (comparison.then, comparison.now) == (0.5, 0.5)
    assert comparison.limit == pytest.approx(0.575)
    # Half of the rounds within +-10 %, and ours is not the same when it is measured again.
    ours = [math.exp(x) for x in (-0.2, -0.1, 0.0, 0.1, 0.2)]
    noisy = {"ours": ours, "ours again": [x / 1.1 for x in ours], "peer": [2.0] * 5}
    (comparison,) = compare(
        of(made_up_run({"x": noisy})), [of(made_up_run({"x": steady}))]
    ).compared
    noise = math.hypot(1.57 * 0.2 / math.sqrt(5), math.log(1.1))
    assert comparison.limit == pytest.approx(0.5 * 1.15 * math.exp(noise))


def test_one_round_is_as_noisy_as_those_of_its_run():
    once = {"ours": [1.0], "peer": [2.0]}
    ours = [math.exp(x) for x in (-0.2, -0.1, 0.0, 0.1, 0.2)]
    run = of(made_up_run({"once": once, "several": {"ours": ours, "peer": [2.0] * 5}}))
    (comparison,) = compare(run, [of(made_up_run({"once": once}))]).compared
    assert comparison.limit == pytest.approx(0.5 * 1.15 * math.exp(1.57 * 0.2))


def test_each_ratio_is_compared_with_the_last_run_that_has_it():
    def run(commit: str, **ratios: float):
        seconds = {peer: [1 / ratio] for peer, ratio in ratios.items()}
        return of(made_up_run({"a case": {"ours": [1.0], **seconds}}, commit=commit))

    earlier = [run("a", eager=0.1, compile=0.9), run("b", eager=0.2)]
    outcome = compare(run("c", eager=0.2, compile=0.9, faiss=1.0), earlier)
    then = {found.peer: (found.before.commit, found.then) for found in outcome.compared}
    assert then == {"eager": ("b", pytest.approx(0.2)), "compile": ("a", pytest.approx(0.9))}
    assert outcome.losses == []
    assert outcome.new == ["a case, faiss"]


def test_a_peer_without_room_is_not_compared():
    full = {"ours": [1.0], "peer": [2.0], "eager": []}
    outcome = compare(of(made_up_run({"x": full})), [of(made_up_run({"x": full}))])
    assert [found.peer for found in outcome.compared] == ["peer"]


def test_what_the_check_says(tmp_path):
    steady = {"ours": [1.0] * 3, "peer": [2.0] * 3, "eager": [4.0] * 3}
    write(made_up_run({"kept": steady, "gone": steady, "slower": steady}), tmp_path / "results")
    slower = {"ours": [1.2] * 3, "peer": [2.0] * 3, "eager": [4.8] * 3}
    new = made_up_run(
        {"kept": steady, "slower": slower, "unknown": steady},
        commit="4567def", torch="2.14", notes=["The machine was busy."],
    )  # fmt: skip
    told, kept = check([write(new, tmp_path / "new")], tmp_path / "results")
    assert not kept
    assert told.splitlines() == [
        "2026-11-22-a-cpu-4567def.json, A (CPU), 2 threads, AVX512: 4 ratios of 2 cases compared, "
        "1 lost",
        "  slower",
        "    peer        0.600, at 0123abc 0.500, at most 0.575: LOST",
        "    eager       0.250, at 0123abc 0.250, at most 0.287",
        "  peers may be others: torch 2.14 now, 2.13.0+cpu before",
        "  noted in this run: The machine was busy.",
        "  not compared, no earlier run has it: unknown",
        "  not in this run: 1 recorded case",
    ]


def test_a_check_too_noisy_to_find_much_says_so(tmp_path):
    noisy = {"ours": [1.0] * 3, "ours again": [1.5] * 3, "peer": [2.0] * 3}
    write(made_up_run({"a case": {"ours": [1.0], "peer": [2.0]}}), tmp_path / "results")
    new = write(made_up_run({"a case": noisy}), tmp_path / "new")
    told, kept = check([new], tmp_path / "results")
    assert kept
    assert told.splitlines()[1:] == [
        "  so noisy that less than 1.5 times as much is no loss: 1 ratio"
    ]


def test_a_folder_is_checked_and_a_run_is_not_compared_with_itself(tmp_path):
    steady = {"ours": [1.0] * 3, "peer": [2.0] * 3}
    slower = {"ours": [2.0] * 3, "peer": [2.0] * 3}
    write(made_up_run({"a case": steady}, commit="a"), tmp_path)
    path = write(made_up_run({"a case": slower}, commit="b"), tmp_path)
    told, kept = check([path], tmp_path)
    assert not kept
    assert "1.000, at a 0.500" in told
    fine = write(made_up_run({"a case": slower}, commit="c"), tmp_path / "new")
    assert check([fine.parent], tmp_path)[1]  # as slow as the last one


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"device": "B"}, "no earlier run in .* is of B, 2 threads, AVX512"),
        ({"threads": 3}, "no earlier run in .* is of A .CPU., 3 threads, AVX512"),
        ({"instructions": "AVX2"}, "no earlier run in .* is of A .CPU., 2 threads, AVX2"),
        ({"kind": "cuda"}, "no earlier run in .* is of A"),
    ],
)
def test_nothing_to_compare_is_an_error(tmp_path, changes, why):
    write(made_up_run(), tmp_path)
    new = write(made_up_run(**changes), tmp_path / "new")
    with pytest.raises(RecordError, match=f"{new.name} can be compared with nothing: {why}"):
        check([new], tmp_path)


def test_other_cases_and_empty_folders_are_errors_too(tmp_path):
    write(made_up_run(), tmp_path)
    other = write(made_up_run({"another": {"ours": [1.0], "peer": [1.0]}}), tmp_path / "new")
    with pytest.raises(RecordError, match=r"no earlier run in .* has any of its cases"):
        check([other], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="empty holds no record of a benchmark run"):
        check([tmp_path / "empty"], tmp_path)
    with pytest.raises(RecordError, match="nowhere is no folder of recorded runs"):
        check([other], tmp_path / "nowhere")
    with pytest.raises(RecordError, match=r"index\.json is the index of records"):
        check([tmp_path / "index.json"], tmp_path)


def test_of_several_runs_what_all_have_lost_is_lost(tmp_path):
    def run(commit: str = "b", **ratios: float) -> dict:
        cases = {title: {"ours": [ratio], "peer": [1.0]} for title, ratio in ratios.items()}
        return made_up_run(cases, commit=commit)

    def kept(*runs: dict) -> bool:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        told, kept = check([write(new, folder) for new in runs], tmp_path / "results")
        assert ("in every run that has it lost" in told) == (len(runs) > 1)
        return kept

    write(run("a", x=0.5, y=0.5), tmp_path / "results")
    assert not kept(run(x=1.0, y=0.5))
    assert kept(run(x=1.0, y=0.5), run(x=0.5, y=1.0))
    assert not kept(run(x=1.0, y=0.5), run(x=1.0, y=1.0))
    assert not kept(run(x=1.0), run(y=0.5))  # the second has not looked at x
    assert not kept(run(x=1.0), run("c", x=0.5))  # another commit


# Stands for the Python that runs the benchmarks: leaves $NEW/1.json where it is asked to, and when
# it is called again $NEW/2.json.
BENCHMARKS = """#!/bin/sh
for word in "$@"; do case $word in --record=*)
	folder=${word#--record=}; next=$(($(ls "$folder" | wc -l) + 1))
	cp "$NEW/$next.json" "$folder/2026-11-22-a-cpu-b-$next.json"
esac; done
echo "called: $*"
exit $STATUS
"""
COMMAND = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from idml_fast.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("ratios", "status", "fine"),
    [([0.5], 0, True), ([1.0, 1.0], 0, False), ([1.0, 0.5], 0, True), ([0.5], 1, False)],
)
def test_make_bench_check(tmp_path, ratios, status, fine):
    write(made_up_run({"a case": {"ours": [0.5], "peer": [1.0]}}, commit="a"), tmp_path / "results")
    for name in ("bin", "new", "tmp"):
        (tmp_path / name).mkdir()
    for number, ratio in enumerate(ratios, 1):
        run = made_up_run({"a case": {"ours": [ratio], "peer": [1.0]}}, commit="b")
        (tmp_path / "new" / f"{number}.json").write_text(json.dumps(run))
    for name, text in (("python", BENCHMARKS), ("idml-fast", COMMAND)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "installed").touch()
    environment = {k: x for k, x in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    environment |= {
        "TMPDIR": str(tmp_path / "tmp"),
        "NEW": str(tmp_path / "new"),
        "STATUS": str(status),
    }
    ran = subprocess.run(
        [
            *("make", "bench-check", "ARGS=-k pairwise --rows=64", f"BIN={tmp_path / 'bin'}"),
            *(f"INSTALLED={tmp_path / 'installed'}", f"RESULTS={tmp_path / 'results'}"),
        ],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode == 0) == fine, ran.stdout + ran.stderr
    assert ran.stdout.count("called:") == len(ratios)
    called, *told = ran.stdout.splitlines()
    assert called.startswith("called: -m pytest bench/ --benchmark-only --record=")
    assert called.endswith(" -k pairwise --rows=64")
    assert ["compared" in line for line in told[:1]] == ([True] if status == 0 else [])
    assert ("LOST" in ran.stdout) == (ratios[0] == 1.0)
    assert list((tmp_path / "tmp").iterdir()) == []  # it cleans up after itself
    assert len(read_folder(tmp_path / "results")) == 1  # and records nothing
