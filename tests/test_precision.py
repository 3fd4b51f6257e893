"""docs/precision.md: what it tells is what is recorded, and tiny problems follow its rule."""

import importlib
import itertools

import pytest
import torch
from conftest import ROOT

from idml_fast import backend

pytest.importorskip("jinja2", reason="the extra idml_fast[train] is not installed")


@pytest.fixture
def precision(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("precision")


def test_the_page_is_that_of_the_record(precision):
    assert precision.DOCUMENT.read_text() == precision.render(*precision.recorded())


def test_every_operation_has_a_row_in_every_way(precision):
    record, _ = precision.recorded()
    found = [(row["op"], row["backend"], row["dtype"], row["mode"]) for row in record["rows"]]
    ways = itertools.product(backend.OPERATIONS, precision.WAYS)
    assert found == [(op, *way) for op, way in ways]
    modes = [mode for _, served, dtype, mode in found if (served, dtype) == ("triton", "float32")]
    assert set(modes) == set(backend.PRECISIONS)
    names = [distribution.name for distribution in precision.DISTRIBUTIONS]
    for row in record["rows"]:
        assert list(row["errors"]) == names
        told = {what for errors in row["errors"].values() for what in errors}
        gradients = set() if row["op"] == "nearest" else {"sem", "unc", "sem2", "unc2"}
        assert told == {"values"} | gradients


def assert_follows_the_rule(precision, row):
    """A row's errors are as large as they may be, where that is promised."""
    way = precision.Way(row["backend"], row["dtype"], row["mode"])
    for distribution, errors in row["errors"].items():
        for what, error in errors.items():
            if precision.promises(way, what, distribution):
                told = f"{row['op']}, {way}, {what} of {distribution}: {error}"
                assert error["by the rule"] <= row["allowed"], told


def test_what_is_recorded_follows_the_rule(precision):
    record, _ = precision.recorded()
    for row in record["rows"]:
        if row["allowed"] is not None:
            assert_follows_the_rule(precision, row)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", backend.OPERATIONS)
def test_tiny_problems_on_the_cpu_follow_the_rule(precision, op, dtype):
    way, size = precision.Way("cpu", dtype, "own"), precision.Size(24, 48, 64, 16)
    assert_follows_the_rule(precision, precision.measure(op, way, size))


# An interpreted kernel takes its time: few features, and few distributions.
TINY = 6, 16, 32, 8


@pytest.mark.parametrize("mode", backend.PRECISIONS)
def test_tiny_problems_in_every_mode_follow_the_rule(precision, mode):
    way, size = precision.Way("triton", "float32", mode), precision.Size(*TINY)
    chosen = tuple(x for x in precision.DISTRIBUTIONS if x.name in ("ordinary", "0.01 apart"))
    assert_follows_the_rule(precision, precision.measure("pairwise", way, size, chosen))


def test_a_gpus_gradient_of_near_pairs_is_that_of_embeddings_rounded_once_more(precision):
    way, size = precision.Way("triton", "float32", "ieee"), precision.Size(*TINY)
    near = tuple(x for x in precision.DISTRIBUTIONS if not precision.promises(way, "sem", x.name))
    assert [x.name for x in near] == ["0.01 apart", "0.001 apart"]
    row = precision.measure("pairwise", way, size, near)
    for distribution in near:
        error = row["errors"][distribution.name]["sem"]["relative"]
        assert 0 < error <= 4 * torch.finfo(torch.float32).eps / distribution.apart


def test_what_breaks_the_rule_is_told(precision):
    record, of_gpu = precision.recorded()
    assert "Nothing." in precision.render(record | {"rows": kept(record, 2.0)}, of_gpu)
    page = precision.render(record | {"rows": kept(record, 2.1)}, of_gpu)
    assert "**1.0e-7 (3.0)**" in page
    assert "- CPU float32, `paired`, gradient of unc: ordinary" in page


def kept(record, by_the_rule):
    """The rows of a record as if nothing in it broke the rule but perhaps an error."""
    error = {"relative": 1e-7, "multiple": 3.0, "by the rule": 1.0}
    rows = []
    for row in record["rows"]:
        errors = {name: dict.fromkeys(found, error) for name, found in row["errors"].items()}
        if (row["op"], row["backend"], row["dtype"]) == ("paired", "cpu", "float32"):
            errors["ordinary"] |= {"unc2": error | {"by the rule": by_the_rule}}
        rows.append(row | {"errors": errors})
    return rows


def test_a_gpu_that_has_not_run_is_said_to_have_not(precision):
    record, _ = precision.recorded()
    assert "not yet run" in precision.render(record, None)
    multiples = {"values": 1.25, "sem": 1.5, "unc": 0.5}
    errors = {op: dict.fromkeys(backend.PRECISIONS, multiples) for op in backend.OPERATIONS}
    of_gpu = {"device": "a GPU", "torch": "2.13.0", "commit": "0123456", "errors": errors}
    page = precision.render(record, of_gpu)
    assert "not yet run" not in page
    assert "| `pairwise` | 1.25, 1.5 |" in page
