"""`Metric`: its values, and what its settings mean. Wrong settings are in test_errors.py."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import FORMS, draw

from idml_fast import Metric, pairwise


def test_the_default_is_the_papers():
    assert Metric() == Metric.paper() == Metric(tau=5.0, gamma=0.0, form="distance")
    assert Metric.paper("cosine") == Metric(5.0, 0.0, "cosine")


def test_named_metrics():
    assert Metric.plain() == Metric(math.inf, 0.0, "distance")
    assert Metric.plain("cosine") == Metric(math.inf, 0.0, "cosine")
    assert Metric.official() == Metric(5.0, 4.0, "official")


def test_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Metric().tau = 1.0
    assert len({Metric(), Metric(5), Metric(2)}) == 2


@pytest.mark.parametrize("tau", [2, np.float32(2), True + 1, np.int64(2)], ids=type)
def test_any_real_number_becomes_a_float(tau):
    metric = Metric(tau, gamma=tau)
    assert type(metric.tau) is type(metric.gamma) is float
    assert metric == Metric(2.0, 2.0)


@pytest.mark.parametrize("form", FORMS)
def test_only_a_finite_tau_reads_unc(form):
    assert Metric(form=form).reads_unc
    assert not Metric(math.inf, 0.0, form).reads_unc


def test_what_is_closer():
    assert [Metric(form=form).larger_is_closer for form in FORMS] == [False, True, True]
    assert [Metric(form=form).sign for form in FORMS] == [1, -1, -1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_score_of_a_pair(backend, form):
    """By hand: alpha = 5 (a 3-4-5 triangle), beta = 2, cos = 24 / 25."""
    sem, sem2 = torch.tensor([[7.0, 1.0]]), torch.tensor([[4.0, -3.0]])
    unc, unc2 = torch.tensor([[3.0]]), torch.tensor([[-1.0]])
    cos = (7 * 4 - 3) / (math.sqrt(50) * 5)
    expected = {
        "distance": 5 * math.exp(-(2 + 1) / (0.5 * 5)),
        "cosine": 1 - (1 - cos) * math.exp(-(2 + 1) / (0.5 * 5)),
        "official": 1 - (1 - cos) * math.exp(-(4 + 1) / (0.5 * 25)),
    }
    found = pairwise(sem, unc, sem2, unc2, metric=Metric(0.5, 1.0, form), backend=backend)
    assert found.item() == pytest.approx(expected[form], rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_larger_tau_comes_closer_to_the_plain_metric(form):
    inputs = draw(9, 8, 7, 5)
    plain = pairwise(**inputs, metric=Metric(math.inf, 0.0, form))
    gaps = [
        (pairwise(**inputs, metric=Metric(tau, 0.0, form)) - plain).abs().max().item()
        for tau in (1.0, 10.0, 100.0, 1e9)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-7


@pytest.mark.parametrize("form", FORMS)
def test_uncertainty_brings_items_closer(form):
    """A larger gamma, or longer uncertainty vectors, never push a pair apart."""
    inputs = draw(9, 8, 7, 5)
    closer = 1 if form != "distance" else -1
    scores = pairwise(**inputs, metric=Metric(form=form))
    offset = pairwise(**inputs, metric=Metric(gamma=1.0, form=form))
    longer = {k: 2 * x if k.startswith("unc") else x for k, x in inputs.items()}
    assert (closer * (offset - scores) > 0).all()
    assert (closer * (pairwise(**longer, metric=Metric(form=form)) - scores) > 0).all()


def test_the_official_form_is_the_released_expression():
    """The proxy has no uncertainty; squared norms everywhere."""
    inputs = draw(9, 8, 7, 5)
    inputs["unc2"].zero_()
    sem, unc, proxies, _ = inputs.values()
    cos = torch.cosine_similarity(sem[:, None], proxies, dim=2)
    numerator = unc.square().sum(1, keepdim=True) + 4
    expected = 1 - (1 - cos) * torch.exp(-numerator / (5 * torch.cdist(sem, proxies).square()))
    found = pairwise(**inputs, metric=Metric.official())
    assert (found - expected).abs().max() < 1e-10
