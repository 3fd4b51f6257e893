"""The benchmarks on a tiny shape: contestants agree, and what is measured is what is reported."""

import importlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from idml_fast import Metric

pytest.importorskip("pytest_benchmark", reason="benchmarks need pytest-benchmark")

MIB = 2**20
BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench_pairwise(race):
    return importlib.import_module("bench_pairwise")


@pytest.fixture
def uncompiled(monkeypatch):
    """`torch.compile` gives back what it is given: to compile takes seconds."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # which imports the compiler


@pytest.mark.parametrize("sets", ["two sets", "rows against themselves"])
def test_ours_and_its_peers_compute_the_same(bench_pairwise, uncompiled, monkeypatch, sets):
    monkeypatch.setattr(bench_pairwise, "CHUNK", 16)
    two_sets = sets == "two sets"
    peers = ("eager", "floor", "truth", *(("chunked", "cdist") if two_sets else ()))
    options = {"sets": sets, "passes": "forward + backward", "dtype": torch.float64}
    shape = (33, 17) if two_sets else (33, 33)
    found = bench_pairwise.contestants(*shape, peers, **options)
    found = {who: call() for who, call in found.items()}
    assert list(found) == ["ours", *peers]
    assert found.pop("floor") == ()
    options["dtype"] = torch.float32  # the dtype in which the inputs are drawn
    assert bench_pairwise.contestants(*shape, ("floor",), **options)["floor"]() == ()
    assert len(found["ours"]) == (5 if two_sets else 3)  # scores and gradients
    for results in found.values():
        torch.testing.assert_close(results, found["ours"])


# What builds the contestants of a file, its shape, the peers, the rest, and constants made small.
CASES = {
    "paired": (
        "contestants", (40, 90), ("eager", "compile", "truth"), {"passes": "forward + backward"}, {}
    ),
    "rowstats": (
        "multi_similarity", (48, 48), ("eager", "compile", "chunked", "truth"), {}, {"CHUNK": 16}
    ),
    "rowstats, Proxy-Anchor": (
        "proxy_anchor", (30, 22), ("eager", "compile", "chunked", "truth"), {}, {}
    ),
    "rowstats, as released": (
        "proxy_anchor", (30, 22), ("released", "truth"), {"metric": Metric.official()}, {}
    ),
    "nearest": ("contestants", (40, 90), ("eager", "truth"), {"metric": "introspective"}, {}),
    "nearest, plain": (
        "contestants",
        (40, 90),
        ("eager", "cdist", "faiss", "truth"),
        {"metric": "plain", "most": 10},
        {"CHUNK": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_peers_compute_the_same_as_float64(race, uncompiled, monkeypatch, name):
    build, shape, peers, options, constants = CASES[name]
    if "faiss" in peers:
        pytest.importorskip("faiss", reason="faiss is not installed")
    bench = importlib.import_module(f"bench_{name.partition(',')[0]}")
    for constant, value in constants.items():
        monkeypatch.setattr(bench, constant, value)
    found = getattr(bench, build)(*shape, peers, width=24, **options)
    found = {who: call() for who, call in found.items()}
    truth = found.pop("truth")
    assert list(found) == ["ours", *peers[:-1]]
    assert truth[0].dtype == torch.float64
    for results in found.values():
        assert len(results) == len(truth)
        assert measure().error(results, truth) < 1e-4
        assert measure().agreement(results, truth) in (None, 1)


def test_the_bare_products_return_nothing(race):
    bench = importlib.import_module("bench_rowstats")
    assert bench.proxy_anchor(30, 22, ("products",), width=24)["products"]() == ()
    assert bench.multi_similarity(30, 30, ("products",), width=24)["products"]() == ()


@pytest.mark.parametrize("name", ["Proxy-Anchor", "Multi-Similarity", "Triplet, hard", "N-pair"])
def test_losses_and_those_of_pytorch_metric_learning_compute_the_same(race, name):
    bench = importlib.import_module("bench_losses")
    found = bench.contestants(24, ("pml", "truth"), name=name)
    ours, theirs, truth = (found[who]() for who in ("ours", "pml", "truth"))
    assert len(ours) == len(truth)
    assert measure().error(ours, truth) < 1e-4
    assert measure().error(theirs[:3], truth) < 1e-3


@pytest.mark.parametrize("peer", ["nearest", "multi-similarity"])
def test_keops_computes_the_same(race, peer):
    pytest.importorskip("pykeops", reason="pykeops is not installed")
    if peer == "nearest":
        bench = importlib.import_module("bench_nearest")
        options = {"metric": "introspective", "width": 4, "most": 3}
        found = bench.contestants(9, 20, ("keops", "truth"), **options)
        assert measure().error(found["keops"](), found["truth"]()) < 1e-4
    else:  # forward: it takes minutes to compile its gradients
        bench = importlib.import_module("bench_rowstats")
        (sem, unc, labels), metric = bench.batch(12, 4), bench.METRIC
        with torch.no_grad():
            theirs = bench.rivals.keops_multi_similarity(sem, unc, labels, metric)
        torch.testing.assert_close(theirs, bench.by_rowstats(sem, unc, labels).detach())


def measure():
    return importlib.import_module("measure")


def test_retrieval_and_its_peer_find_the_same(race):
    pytest.importorskip("faiss", reason="faiss is not installed")
    evaluation = importlib.import_module("bench_evaluation")
    found = evaluation.retrievers(600, ("faiss + numpy", "truth"))
    ours, theirs, truth = (call() for call in found.values())
    assert len(ours) == len(theirs) + 2  # MRR and mAP
    for one, other in zip(ours, theirs, strict=False):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    ("peer", "metric"), [("released", Metric.official()), ("pml", Metric.plain("cosine"))]
)
def test_training_steps_compute_the_same(race, peer, metric):
    bench = importlib.import_module("bench_train_step")
    both = bench.steps(12, 5, (peer,), backbone="test_resnet", side=32, metric=metric)
    for _ in range(3):  # the second loss is of what the first gradients have made of the network
        torch.testing.assert_close(both["ours"](), both[peer](), rtol=1e-3, atol=1e-3)


def test_ours_and_the_usual_code_read_the_same_parts(race):
    bench = importlib.import_module("bench_train_step")
    root = Path(bench.photographs(320, 240).name)
    usual = bench.Usual(root)
    ours, _ = bench.transforms(256, 224)
    for index, path in enumerate(bench.PATHS):
        torch.manual_seed(index)
        image = ours(root / path) / 255
        torch.manual_seed(index)
        assert (image - usual[index][0]).abs().mean() < 0.02
    bench.readers(64, 64, ("usual",), workers=0)["ours"]()


def test_images_a_second_and_the_share_of_the_loss(race):
    case = race.Case("a step", dict, (2, 2), ("peer", "network"), flop=0, images=6)
    seconds = {"ours": [2.0, 8.0, 2.0], "peer": [4.0, 16.0, 4.0], "network": [1.0, 4.0, 1.0]}
    *_, ours, peer, network = board().table([race.Result(case, seconds, {})]).splitlines()
    assert ours.split()[:2] == ["ours", "2000.0"]
    assert ours.endswith("  3 images/s, the loss 50.0%")
    assert peer.endswith("  2 images/s, the loss 75.0%")
    assert network.endswith("  6 images/s")


BACKWARD = {"passes": "forward + backward"}
# What builds the contestants, its shape, the peers, and the rest.
GPU_CASES = {
    "rowstats": (
        "multi_similarity",
        (48, 48),
        ("truth", "product", "chunked", "in forward", "tiled", "eager"),
        BACKWARD | {"sets": "two sets"},
    ),
    "rowstats, self": (
        "multi_similarity",
        (48, 48),
        ("eager", "chunked", "in forward", "tiled"),
        BACKWARD | {"sets": "self"},
    ),
    "Proxy-Anchor": ("proxy_anchor", (30, 20), ("truth", "product", "eager", "in forward"), {}),
    "pairwise": ("scores", (30, 20), ("truth", "product", "eager"), BACKWARD),
    "paired": ("listed", (30, 90), ("truth", "eager"), BACKWARD),
    "nearest": ("search", (48, 30), ("truth", "product", "chunked"), {"k": 5, "chunk": 16}),
}


# What the CUDA kernels are measured on, and the peers beside Triton.
CUDA_CASES = {
    "rowstats": ("multi_similarity", (), BACKWARD | {"sets": "two sets"}),
    "pairwise": ("scores", ("store",), {"passes": "forward"}),
    "nearest": ("search", (), {"k": 5, "chunk": 16}),
}


@pytest.mark.parametrize("name", CUDA_CASES)
def test_backends_on_a_gpu_compute_the_same(race, uncompiled, monkeypatch, name):
    gpu = importlib.import_module("gpu_contestants")
    stand_ins = {"ours": "reference", "triton": "cpu"}
    for constant, value in {"DEVICE": "cpu", "PRODUCT": 64, "BACKENDS": stand_ins}.items():
        monkeypatch.setattr(gpu, constant, value)
    build, peers, options = CUDA_CASES[name]
    build = partial(getattr(gpu, build), width=24, dtype=torch.float64, **options)
    peers = "truth", "product", "triton", *peers
    found = {who: run() for who, run in gpu.by_backend(48, 30, peers, build=build).items()}
    assert list(found) == ["ours", *peers]
    assert found["product"] == found.get("store", ()) == ()
    torch.testing.assert_close(found["triton"], found["ours"])
    torch.testing.assert_close(found["truth"], found["ours"])


@pytest.mark.parametrize("name", GPU_CASES)
def test_contestants_on_a_gpu_compute_the_same(race, uncompiled, monkeypatch, name):
    gpu = importlib.import_module("gpu_contestants")
    small = {"DEVICE": "cpu", "PRODUCT": 64, "CHUNK": 16, "TILE": 16, "PROXY_CHUNK": 8}
    for constant, value in small.items():
        monkeypatch.setattr(gpu, constant, value)
    build, shape, peers, options = GPU_CASES[name]
    options = {"width": 24, "dtype": torch.float64, **options}
    found = {who: run() for who, run in getattr(gpu, build)(*shape, peers, **options).items()}
    assert list(found) == ["ours", *peers]
    assert found.pop("product", ()) == ()
    for results in found.values():
        torch.testing.assert_close(results, found["ours"])


def board():
    return importlib.import_module("scoreboard")


def result_of(race, ours, peer, extra, **bars):
    case = race.Case("a case", dict, shape=(2, 2), peers=("peer",), flop=4e9, **bars)
    extra = {"ours": extra * MIB, "peer": 0}
    return race.Result(case, {"ours": ours, "peer": peer}, extra)


def test_ratio_is_the_median_of_the_rounds(race):
    # The second round is slow for both, the third for the peer alone: neither moves the median.
    result = result_of(race, ours=[1.0, 9.0, 1.0], peer=[2.0, 18.0, 50.0], extra=0)
    assert result.ratio("peer") == 0.5


@pytest.mark.parametrize(("bar", "met"), [(0.51, True), (0.49, False)])
def test_time_bar(race, bar, met):
    result = result_of(race, ours=[0.001] * 3, peer=[0.002] * 3, extra=0, bars={"peer": bar})
    assert result.verdicts() == {"peer": (f"at most {bar}", met)}
    ours, peer = board().table([result]).splitlines()[-2:]
    assert ours.split() == ["ours", "1.0", "0%", "4.000", "0.0"]
    assert peer.split()[:6] == ["peer", "2.0", "0%", "2.000", "0.0", "0.50"]
    assert peer.endswith("met" if met else "MISSED")


@pytest.mark.parametrize(("extra", "met"), [(63, True), (64, False)])
def test_memory_bar(race, extra, met):
    result = result_of(race, ours=[1.0], peer=[1.0], extra=extra, memory_bar=64)
    assert result.verdicts() == {"ours": ("under 64 MiB", met)}


@pytest.mark.parametrize(
    ("times", "extra", "met"),
    [([1, 2, 9], [1, 1, 9], True), ([1, 9, 9], [1, 1, 1], False), ([1, 1, 1], [9, 9, 1], False)],
)
def test_the_median_over_cases(race, times, extra, met):
    median = race.Median("cases", "peer", time=0.25, memory=0.125)
    results = [
        race.Result(
            race.Case(str(k), dict, (2, 2), ("peer",), flop=1.0, median=median),
            {"ours": [float(seconds)], "peer": [10.0]},
            {"ours": mib, "peer": 10},
        )
        for k, (seconds, mib) in enumerate(zip(times, extra, strict=True))
    ]
    results.append(result_of(race, ours=[1.0], peer=[1.0], extra=1))  # part of no median
    ((text, found),) = board().medians(results).values()
    assert found == met
    middle = sorted(times)[1] / 10, sorted(extra)[1] / 10
    assert text == (
        f"median over 3 cases, ours to peer: time {middle[0]:.2f} (bar 0.25), "
        f"memory {middle[1]:.2f} (bar 0.12): {'met' if met else 'MISSED'}"
    )


def test_the_share_of_the_rate_of_a_product_and_a_peer_without_room(race):
    case = race.Case(
        "a case", dict, (2, 2), ("product", "eager"), flop=4e9, product_flop=8e9, share_bar=0.2,
        bars={"eager": 0.1}, seconds_bar=1,
    )  # fmt: skip
    seconds = {"ours": [0.004] * 3, "product": [0.002] * 3, "eager": []}
    result = race.Result(case, seconds, {"ours": 3 * MIB, "product": 0})
    assert result.share() == 0.25
    assert result.verdicts() == {"ours": ("under 1 s", True), "product": ("at least 20%", True)}
    ours, product, eager = board().table([result]).splitlines()[-3:]
    assert ours.split()[:4] == ["ours", "4.0", "0%", "1.000"]
    assert product.split()[:4] == ["product", "2.0", "0%", "4.000"]
    assert product.endswith("ours reach 25% of its rate, at least 20%: met")
    assert eager.split() == ["eager", "out", "of", "memory"]
    assert board().summary([result]).splitlines() == [
        "a case",
        "   4.0 ms, 1.0 TFLOP/s, 25% of the product's, eager: no room, 3 MiB",
    ]


@pytest.mark.parametrize(("store", "ratio"), [(0.001, 2.0), (0.004, 1.0)])
def test_the_longer_of_products_and_stores_is_the_floor(race, store, ratio):
    case = race.Case(
        "a case", dict, (2, 2), ("product", "store"), flop=4e9, product_flop=8e9, floor_bar=1.15
    )
    seconds = {"ours": [0.004] * 3, "product": [0.004] * 3, "store": [store] * 3}
    result = race.Result(case, seconds, {})
    assert result.floor_ratio() == ratio
    text = f"ours take {ratio:.2f} of the longer of both, at most 1.15"
    assert result.verdicts() == {"store": (text, ratio == 1)}


@pytest.mark.parametrize(
    ("triton", "gain"), [([0.012, 0.0105, 0.01], 1.05), ([0.01] * 3, 1.0), ([], None)]
)
def test_a_faster_backend_is_told_and_recorded_but_no_bar(race, triton, gain):
    choice = race.Choice("pairwise", "bf16", 512, "triton", 1.04)
    case = race.Case("a case", dict, (2, 2), ("triton",), flop=4e9, choice=choice)
    result = race.Result(case, {"ours": [0.01] * 3, "triton": triton}, {})
    assert result.verdicts() == {}
    assert ("1.05 times as fast" in board().table([result])) == (gain == 1.05)
    assert ("1.05 times as fast as triton" in board().summary([result])) == (gain == 1.05)
    about = {"op": "pairwise", "dtype": "bf16", "width": 512, "case": "a case"}
    found = {"triton_to_ours": pytest.approx(gain), "chosen": gain == 1.05}
    assert board().choices([result]) == ([] if gain is None else [about | found])


def test_on_a_gpu_a_peer_without_room_has_no_time_and_ours_must_have_some(race, monkeypatch):
    calls = []

    def no_room():
        raise torch.cuda.OutOfMemoryError

    def contestants(n, peers, ours):
        found = {"ours": ours, "eager": no_room, "product": lambda: calls.append("product")}
        return {who: found[who] for who in ("ours", *peers)}

    def case(ours):
        build = partial(contestants, ours=ours)
        return race.Case("a case", build, (2,), ("eager", "product"), flop=1.0, device="cuda")

    benchmark = SimpleNamespace(pedantic=lambda call, rounds: call(), extra_info={})
    monkeypatch.setattr(race, "peak_memory", lambda call, device: call() or 7)
    monkeypatch.setattr(race, "seconds_on_gpu", lambda call: call() or 0.5)
    result = race.run(benchmark, case(lambda: calls.append("ours")), rounds=3)
    times = [0.5] * 3
    assert result.seconds == {"ours": times, "ours again": times, "eager": [], "product": times}
    assert result.extra == {"ours": 7, "product": 7}
    assert calls[:4] == ["ours", "ours", "product", "product"]  # small, first, warm, memory
    with pytest.raises(torch.cuda.OutOfMemoryError):
        race.run(benchmark, case(no_room), rounds=3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read on Linux")
def test_memory_counts_what_is_dropped_but_not_results(race):
    def call():
        dropped = torch.ones(2048, 2048)  # 16 MiB
        return (dropped + 1,)

    assert 15 * MIB < measure().peak_memory(call) < 20 * MIB


def test_a_run_ends_with_the_table_and_leaves_a_record(tmp_path):
    chosen = f"{BENCH / 'bench_losses.py'}::test_loss[N-pair]"  # nothing is compiled
    options = ["--benchmark-only", "--rows=64", "--rounds=2", "--check", f"--record={tmp_path}"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", chosen, *options, "-p", "no:cacheprovider"],
        cwd=BENCH.parent,
        # Several workers disable benchmarks; this one is on its own.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    title = "N-pair, forward + backward, fp32, 64 items of 16 classes, D = 512"
    assert f"\n{title}\n" in ran.stdout  # the table
    assert re.search(rf"\[1/1, \d+ s\] {re.escape(title)} \.", ran.stdout)
    assert "Rounds" not in ran.stdout  # pytest-benchmark's own table
    path, index = sorted(tmp_path.iterdir())
    assert index.name == "index.json"
    record = json.loads(path.read_text())
    assert record["kind"] == "cpu"
    assert path.name.startswith(record["date"])
    assert set(record["rates"]) == {"fp32 product", "bf16 product", "copy"}
    (case,) = record["cases"]
    assert (case["case"], case["op"]) == (title, "losses")
    assert set(case["seconds"]) == {"ours", "ours again", "pml"}
    assert {len(seconds) for seconds in case["seconds"].values()} == {2}
    assert set(case["errors"]) == {"ours", "pml"}
    assert max(case["errors"].values()) < 1e-4
    assert case["bars"] == {}


def test_a_noisy_run_and_results_that_are_not_finite_are_told(race):
    case = race.Case("a case", dict, (2, 2), (), flop=1.0)
    noisy = {"ours": [1.0, 1.0], "ours again": [1.2, 1.2]}
    results = [race.Result(case, noisy, {}, {"ours": 1e-7, "eager": float("nan")})]
    results[0].taken["other processes"] = 0.25
    assert importlib.import_module("record").doubts(results) == [
        "other processes took time of the processors in 1 of 1 cases, 25% in the worst: a case",
        "a case: the results of eager are not finite",
        "ours, measured twice, differs from itself by more than 10% in 1 of 1 cases",
    ]
    assert importlib.import_module("record").case_of(results[0])["errors"] == {"ours": 1e-7}


def test_columns_of_a_case_that_memory_bounds(race):
    case = race.Case("a case", dict, (2, 2), ("peer",), flop=1.0, bytes=4e6)
    seconds = {"ours": [0.001] * 3, "peer": [0.002] * 3}
    result = race.Result(case, seconds, {}, {"ours": 3e-7}, {"peer": 0.995})
    _, _, header, ours, peer = board().table([result], {"cpu": {"copy": 8e9}}).splitlines()
    assert header.split() == [
        "median",
        "ms",
        "spread",
        "GB/s",
        "share",
        "extra",
        "MiB",
        "ours/it",
        "error",
    ]
    assert ours.split() == ["ours", "1.0", "0%", "4.000", "50%", "3e-07"]
    assert peer.split()[4:] == ["25%", "0.50", "finds", "99.50%", "of", "the", "columns"]
    assert len(ours) == len(header) < peer.index("finds")
    assert board().summary([result]).splitlines()[1] == "   1.0 ms, 4 GB/s, 0.50 of peer"


def test_errors_are_a_share_of_the_largest_number_and_columns_are_counted(race):
    truth = torch.tensor([1.0, -4.0]).double(), torch.tensor([[1, 2], [3, 4]])
    found = torch.tensor([1.0, -3.0]), torch.tensor([[2, 1], [3, 5]])
    assert measure().error(found, truth) == 0.25
    assert measure().agreement(found, truth) == 0.75
    assert measure().error((), truth) is measure().agreement((), truth) is None


def test_caches_are_emptied_before_quick_calls_alone(race, monkeypatch):
    emptied = []
    monkeypatch.setattr(race, "empty_caches", lambda: emptied.append("emptied"))
    played = {"ours": lambda: (emptied.append("ours"),), "slow": lambda: (emptied.append("slow"),)}

    def pedantic(call, setup, rounds):
        for _ in range(rounds):
            setup()
            call()

    stats = SimpleNamespace(stats=SimpleNamespace(data=[1.0]))
    benchmark = SimpleNamespace(pedantic=pedantic, stats=stats)
    race.times(benchmark, played, rounds=1, quick={"ours"})
    assert sorted(emptied) == ["emptied", "emptied", "ours", "ours", "slow"]
    assert emptied[-2:] == ["emptied", "ours"]
