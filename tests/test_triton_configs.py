"""The table of configurations of the Triton kernels, the search for a better row, and how float32
is multiplied; under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
from conftest import draw, draw_upstream, evaluate
from idml_fast._triton import autotune, configs, tile

from idml_fast import Metric, backend, pairwise

pytestmark = pytest.mark.usefixtures("interpreter")

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture
def switch():
    """PyTorch's own, put back."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


# -------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("row", configs.TABLE)
def test_tiles_are_such_as_the_walk_can_take(row):
    for config in configs.TABLE[row]:
        for size in config[:4]:
            assert size == 2 ** (size.bit_length() - 1)
        assert config.rows % config.cols == 0  # a triangle's tiles are counted by whole rows
        assert min(config[:3]) >= 16  # the least that a product takes


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16, torch.float16], ids=str)
def test_every_width_has_a_row(dtype, architecture, monkeypatch):
    monkeypatch.setattr(configs, "architecture_of", lambda device: architecture)
    for width in (1, 16, 17, 64, 65, 128, 129, 512, 513, 4096):
        for precision in backend.PRECISIONS:
            config = configs.config_of("forward", width, dtype, precision, CPU)
            assert 16 <= config.width <= max(16, 2 * width - 1)


@pytest.mark.parametrize(
    ("capability", "row"),
    [((8, 0), 80), ((8, 6), 86), ((8, 9), 86), ((9, 0), 90), ((10, 0), 100), ((12, 0), 86)],
)
def test_a_chip_has_the_row_of_its_kind(capability, row, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert configs.architecture_of(torch.device("cuda", 0)) == row


# -------------------------------------------------------------------------------- precision


def test_precision_follows_the_switch_of_pytorch_unless_it_is_set(switch, monkeypatch):
    found = []
    for name in ("highest", "high", "medium"):
        switch(name)
        found.append(configs.precision_of(FLOAT))
    assert found == ["ieee", "tf32", "tf32"]
    for name in backend.PRECISIONS:
        monkeypatch.setattr(backend, "precision", name)
        assert configs.precision_of(FLOAT) == name
        assert configs.precision_of(torch.bfloat16) == "ieee"


@pytest.mark.parametrize("precision", backend.PRECISIONS)
def test_the_products_are_of_the_precision_that_is_set(precision, monkeypatch):
    """The kernel is told."""
    told = []

    def launch(kernel, programs, device, *arguments, **options):
        told.append(arguments)

    monkeypatch.setattr(tile, "launch", launch)
    monkeypatch.setattr(backend, "precision", precision)
    pairwise(**draw(8, 6, 3, 2, dtype=FLOAT), backend="triton")
    (arguments,) = told
    assert precision in arguments
    assert configs.near_of(FLOAT, precision) in arguments


@pytest.mark.parametrize("precision", backend.PRECISIONS)
def test_the_interpreter_rounds_as_the_precision_says(precision, monkeypatch):
    """Products of positive numbers, whose errors do not cancel: a cosine has the error of one."""
    monkeypatch.setattr(backend, "precision", precision)
    sem, sem2 = (draw(40, None, 64, 1, dtype=FLOAT, seed=seed)["sem"].abs() for seed in (0, 1))
    options = {"unc": None, "unc2": None, "metric": Metric.plain("cosine")}
    found = pairwise(sem, sem2=sem2, **options, backend="triton")
    truth = pairwise(sem.double(), sem2=sem2.double(), **options, backend="reference")
    error = (found - truth).abs().max().item()
    of_product, of_sum = configs.PRODUCT_ERRORS[precision], 2.0**-22
    assert of_product / 32 <= error <= of_product + of_sum


def test_an_unknown_precision_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "precision", "tf64")
    with pytest.raises(ValueError) as error:
        pairwise(torch.eye(3), torch.eye(3), backend="triton")
    told = (
        "idml_fast.backend.precision must be one of 'ieee', 'tf32x3', 'bf16x3', 'tf32', got 'tf64'"
    )
    assert str(error.value) == told


# -------------------------------------------------------------------------------- the search


@pytest.fixture
def searching(monkeypatch):
    """The search is on, of two candidates, with the seconds that each will take."""
    slow, fast = configs.Config(16, 16, 16, 4, 1), configs.Config(32, 16, 16, 4, 1)
    tiles = []

    def do_bench(run, *, return_mode):
        """What ran last is the walk whose tiles were asked for last."""
        assert return_mode == "median"
        run()
        if tiles[-1] == (64, 64):
            raise triton.OutOfResources(1, 0, "shared memory")
        return {(16, 16): 2.0, (32, 16): 1.0}[tiles[-1]]

    launch = tile.Walk.launch

    def observed(self, *arguments, **options):
        tiles.append((self.config.rows, self.config.cols))
        return launch(self, *arguments, **options)

    monkeypatch.setenv("IDML_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(configs, "TABLE", dict(configs.TABLE))
    monkeypatch.setattr(autotune, "searched", set())
    monkeypatch.setattr(autotune, "ITEMS", 40)
    monkeypatch.setattr(autotune, "CANDIDATES", [configs.Config(64, 64, 16, 4, 1), slow, fast])
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(tile.Walk, "launch", observed)
    return fast


def test_the_search_prints_the_row_to_add_and_takes_it(searching, capsys):
    inputs, metric = draw(30, None, 20, 5, dtype=FLOAT), Metric()
    with_table = evaluate(inputs, metric, draw_upstream(inputs), "reference")
    found = evaluate(inputs, metric, draw_upstream(inputs), "triton")
    for what, x in found.items():
        torch.testing.assert_close(x, with_table[what])
    key = "ieee", 64, 0
    expected = configs.INTERPRETED._replace(forward=searching, mirrored_backward=searching)
    assert configs.TABLE[key] == expected
    forward, backward = capsys.readouterr().out.splitlines()
    assert forward.startswith(
        "idml_fast: forward of width 20, torch.float32: 1.000 ms with Config("
    )
    assert "2.000 ms with the table's" in forward
    assert backward.endswith(f"The row to add: {key}: {expected}")


def test_a_row_is_searched_for_once_a_process(searching, capsys):
    for _ in range(2):
        pairwise(torch.eye(20), torch.eye(20), backend="triton")
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_nothing_is_searched_for_unless_it_is_asked_for(searching, capsys, monkeypatch):
    monkeypatch.delenv("IDML_FAST_AUTOTUNE")
    pairwise(torch.eye(20), torch.eye(20), backend="triton")
    assert capsys.readouterr().out == ""
    assert configs.TABLE["ieee", 64, 0] == configs.INTERPRETED
