"""What uncertainties know: by hand, against scikit-learn, scipy and numpy, and by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the extra idml_fast[train] is not installed")

from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.utils.extmath import softmax
from torch.nn.functional import normalize

from idml_fast.evaluation import (
    CORRUPTIONS,
    alive_or_dead,
    aurc,
    bootstrap,
    brier,
    corrupted,
    corrupted_norms,
    ece,
    error_auroc,
    match_forecast,
    mc_dropout,
    ood_auroc,
    pair_auroc,
    pair_uncertainty,
    proxy_distance,
    reliability,
    risk_coverage,
    sampled_pairs,
    semantic_norm,
    severity_correlation,
    shuffled,
    softmax_entropy,
    uncertainty_table,
    wrong_answers,
)
from idml_fast.evaluation._weighted import mean

nan = math.nan


def drawn(count, levels=None, seed=0):
    """Uncertainties, with ties where there are few levels, and what is more often wrong if less
    certain."""
    draw = torch.Generator().manual_seed(seed)
    uncertainty = torch.rand(count, generator=draw)
    if levels:
        uncertainty = (uncertainty * levels).floor() / levels
    return uncertainty, torch.rand(count, generator=draw) < 0.2 + 0.5 * uncertainty


def repeated(weights, *vectors):
    """The items as often as their weights say."""
    return tuple(vector.repeat_interleave(weights.long()) for vector in vectors)


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(load_digits().images).float().div(16)[:200, None]


# Measures of a vector


@pytest.mark.parametrize("levels", [None, 4])
def test_error_auroc_is_that_of_scikit_learn(levels):
    uncertainty, wrong = drawn(200, levels)
    assert error_auroc(uncertainty, wrong).item() == pytest.approx(
        roc_auc_score(wrong, uncertainty)
    )


def test_error_auroc_of_no_information_and_of_nothing_to_rank():
    wrong = torch.tensor([True, False, False])
    assert error_auroc(torch.ones(3), wrong).item() == 0.5
    assert error_auroc(torch.tensor([3.0, 2.0, 1.0]), wrong).item() == 1
    assert error_auroc(torch.tensor([1.0, 2.0, 3.0]), wrong).item() == 0
    for all_alike in (torch.ones(3).bool(), torch.zeros(3).bool()):
        assert error_auroc(torch.rand(3), all_alike).isnan()


def test_risk_coverage_by_hand():
    coverage, risk = risk_coverage(
        torch.tensor([0.3, 0.1, 0.2, 0.4]), torch.tensor([True, False, False, True])
    )
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])


def test_risk_coverage_of_ties_is_the_mean_over_their_orders():
    uncertainty = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0])
    wrong = torch.tensor([False, True, False, True, False])
    _, risk = risk_coverage(uncertainty, wrong)
    curves = []
    for order in itertools.permutations([1, 2, 3]):
        hits = wrong[[0, *order, 4]].double().cumsum(0)
        curves.append(hits / torch.arange(1, 6))
    assert torch.allclose(risk, torch.stack(curves).mean(dim=0))


@pytest.mark.parametrize("levels", [None, 4, 1])
def test_aurc_is_the_mean_of_its_curve_in_any_order(levels):
    uncertainty, wrong = drawn(300, levels)
    area = aurc(uncertainty, wrong).item()
    assert area == pytest.approx(risk_coverage(uncertainty, wrong)[1].mean().item())
    order = torch.randperm(300)
    assert aurc(uncertainty[order], wrong[order]).item() == pytest.approx(area)
    if levels == 1:
        assert area == pytest.approx(wrong.double().mean().item())


def test_ood_auroc_is_that_of_scikit_learn():
    inside, outside = drawn(30, 5)[0], drawn(40, 5, seed=1)[0] + 0.2
    wanted = roc_auc_score([0] * 30 + [1] * 40, torch.cat([inside, outside]))
    assert ood_auroc(inside, outside).item() == pytest.approx(wanted)


def test_spearman_by_hand():
    one = pytest.approx(1)
    assert severity_correlation(torch.tensor([[1.0], [2.0], [40.0]])).item() == one
    assert -severity_correlation(torch.tensor([[3.0], [2.0], [1.0]])).item() == one
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * (1 + 1 + 1 + 1) / (4 * 15) = 0.6.
    found = severity_correlation(torch.tensor([[2.0], [1.0], [4.0], [3.0]]))
    assert found.item() == pytest.approx(0.6)


def test_spearman_with_two_images_pools_them():
    norms = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    # Severities 0 0 1 1 have ranks 1.5 1.5 3.5 3.5, the norms 1 3 2 4: covariance 0.5 over
    # sqrt(1 * 1.25), with everything divided by 4.
    assert severity_correlation(norms).item() == pytest.approx(0.5 / math.sqrt(1.25))


@pytest.mark.parametrize("levels", [None, 4])
def test_spearman_is_that_of_scipy(levels):
    norms = drawn(6 * 30, levels)[0].view(6, 30) + 0.1 * torch.arange(6)[:, None]
    wanted = spearmanr(np.repeat(np.arange(6), 30), norms.flatten()).statistic
    assert severity_correlation(norms).item() == pytest.approx(wanted)


def test_a_constant_uncertainty_has_no_correlation():
    assert severity_correlation(torch.ones(6, 10)).isnan()


@pytest.mark.parametrize("norms", [torch.ones(4), torch.ones(1, 4)])
def test_spearman_refuses(norms):
    with pytest.raises(ValueError, match=r"norms must have shape \[S, N\] with S >= 2, got \["):
        severity_correlation(norms)


def test_brier_is_that_of_scikit_learn():
    forecast, match = drawn(50)
    assert brier(forecast, match).item() == pytest.approx(brier_score_loss(match, forecast))


def test_ece_and_reliability_by_hand():
    forecast = torch.tensor([0.1, 0.2, 0.6, 1.0], dtype=torch.float64)
    match = torch.tensor([False, True, True, True])
    bins = reliability(forecast, match, bins=2)
    assert bins.forecast.tolist() == pytest.approx([0.15, 0.8])
    assert bins.observed.tolist() == [0.5, 1]
    assert bins.count.tolist() == [2, 2]
    assert ece(forecast, match, bins=2).item() == pytest.approx((0.35 + 0.2) / 2)
    assert ece(forecast, match, bins=1).item() == pytest.approx(0.75 - 1.9 / 4)


def test_equal_forecasts_share_a_bin():
    forecast, match = drawn(90, 5)
    order = torch.randperm(90)
    assert ece(forecast, match).item() == pytest.approx(ece(forecast[order], match[order]).item())
    assert sorted(set(reliability(forecast, match).count.tolist()) - {0}) == sorted(
        set(forecast.unique(return_counts=True)[1].tolist())
    )
    base_rate = torch.full((90,), match.double().mean(), dtype=torch.float64)
    assert ece(base_rate, match).item() == pytest.approx(0)


def test_a_bin_holds_as_many_pairs_as_any_other():
    assert reliability(*drawn(150)).count.tolist() == [10.0] * 15


def test_pair_auroc_is_that_of_the_best_threshold():
    beta, match = drawn(60)
    distance = drawn(60, 20, seed=1)[0] - 0.4 * match
    said = [distance <= threshold for threshold in [-9, *distance.unique().tolist()]]
    wrong = min((same != match for same in said), key=lambda wrong: int(wrong.sum()))
    assert 0 < wrong.sum() < match.sum()
    assert pair_auroc(beta, distance, match).item() == pytest.approx(roc_auc_score(wrong, beta))


def test_pairs_that_are_best_all_told_apart():
    # Every threshold would be wrong about more pairs than none at all.
    match = torch.tensor([False, False, True])
    found = pair_auroc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]), match)
    assert found.item() == 1


@pytest.mark.parametrize(
    ("measure", "arguments"),
    [
        (error_auroc, drawn(40, 8)),
        (aurc, drawn(40, 8)),
        (brier, drawn(40, 8)),
    ],
)
def test_weights_repeat_items(measure, arguments):
    weights = torch.randint(4, (40, 3), generator=torch.Generator().manual_seed(0)).double()
    found = measure(*arguments, weights)
    assert found.shape == (3,)
    for number, column in zip(found, weights.T, strict=True):
        wanted = measure(*repeated(column, *arguments)).item()
        assert number.item() == pytest.approx(wanted)
        assert measure(*arguments, column).item() == pytest.approx(wanted)


def test_weights_repeat_images_with_all_their_severities():
    norms = drawn(6 * 20, 30)[0].view(6, 20)
    weights = torch.randint(4, (20, 3), generator=torch.Generator().manual_seed(0)).double()
    for found, column in zip(severity_correlation(norms, weights), weights.T, strict=True):
        again = norms.repeat_interleave(column.long(), dim=1)
        assert found.item() == pytest.approx(severity_correlation(again).item())


def test_weights_of_other_measures():
    inside, outside = drawn(20)[0], drawn(20, seed=1)[0]
    weights = torch.randint(3, (40,), generator=torch.Generator().manual_seed(0)).double()
    both = repeated(weights[:20], inside) + repeated(weights[20:], outside)
    assert ood_auroc(inside, outside, weights).item() == pytest.approx(ood_auroc(*both).item())
    # Bins and threshold are those of the items once each.
    forecast, match = drawn(40)
    assert ece(forecast, match, weights, bins=1).item() == pytest.approx(
        abs((weights * (forecast - match.double())).sum() / weights.sum()).item(), rel=1e-5
    )
    beta = drawn(40, seed=2)[0]
    certain = (forecast <= 0.5) != match
    found = pair_auroc(beta, certain.float(), ~certain, weights)
    assert found.isnan()  # the distance tells them all
    assert mean(beta.double(), weights).item() == pytest.approx(
        np.average(beta.numpy(), weights=weights.numpy())
    )


@pytest.mark.parametrize("measure", [error_auroc, aurc, risk_coverage, ece, brier, reliability])
def test_measures_refuse(measure):
    values, truth = drawn(4)
    with pytest.raises(ValueError, match=r"must have shape \[3\] like \w+ \[3\], got \[4\]"):
        measure(values, truth[:3])
    with pytest.raises(TypeError, match="must be bool, got int64"):
        measure(values, truth.long())
    with pytest.raises(ValueError, match=r"must be numbers, got NaN at \[1\]"):
        measure(torch.tensor([0.0, nan, nan, 0.0]), truth)
    with pytest.raises(ValueError, match="must hold at least one item, got none"):
        measure(values[:0], truth[:0])


def test_weights_are_refused_that_fit_no_item():
    with pytest.raises(ValueError, match=r"weights must have shape \[4\] or \[4, B\], got \[3, 2"):
        error_auroc(*drawn(4), torch.ones(3, 2))


# Alive or dead


def responding(norms, slope):
    return {"blur": norms + slope * torch.arange(6)[:, None], "noise": norms.expand(6, -1)}


def test_alive_is_what_varies_and_responds():
    norms = 1 + drawn(500)[0]
    verdict = alive_or_dead(norms, responding(norms, -0.2))
    assert verdict.alive
    assert verdict.variation == pytest.approx((norms.std(correction=0) / norms.mean()).item())
    assert verdict.corruption == "blur"
    assert verdict.response < -0.5  # which way is another question
    still = alive_or_dead(norms, responding(norms, 0.0))
    assert (still.alive, still.response) == (False, pytest.approx(0))
    assert alive_or_dead(norms).alive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_normalised_uncertainty_is_dead(dtype):
    """As in the authors' released network: its length differs by rounding alone."""
    unc = normalize(torch.randn(500, 64, generator=torch.Generator().manual_seed(0)))
    norms = unc.to(dtype).float().norm(dim=1)
    assert 0 < alive_or_dead(norms).variation < 0.01
    assert not alive_or_dead(norms, responding(norms, 0.1)).alive


def test_an_uncertainty_of_nothing_is_dead():
    verdict = alive_or_dead(torch.zeros(9), {"blur": torch.zeros(6, 9)})
    assert (verdict.alive, verdict.variation, verdict.response) == (False, 0, 0)


# Pairs and what is forecast of them


def test_pairs_are_the_nearest_and_others():
    draw = torch.Generator().manual_seed(0)
    sem, labels = torch.randn(30, 3, generator=draw), torch.randint(4, (30,), generator=draw)
    pairs = sampled_pairs(sem, labels, k=4)
    assert torch.equal(pairs.rows, torch.arange(30).repeat_interleave(8))
    assert (pairs.rows != pairs.columns).all()
    assert torch.equal(pairs.match, labels[pairs.rows] == labels[pairs.columns])
    distances = torch.cdist(sem, sem)
    assert torch.allclose(pairs.distance, distances[pairs.rows, pairs.columns], atol=1e-5)
    near = distances.fill_diagonal_(torch.inf).topk(4, largest=False).indices
    columns = pairs.columns.view(30, 8)
    assert torch.equal(columns[:, :4], near)
    assert set(columns[:, 4:].flatten().tolist()) == set(range(30))
    again = sampled_pairs(sem, labels, k=4, seed=1)
    assert not torch.equal(again.columns, pairs.columns)


def test_pairs_with_a_gallery_and_with_few_others():
    sem, gallery = torch.tensor([[0.0], [5.0]]), torch.tensor([[0.0], [1.0], [9.0]])
    pairs = sampled_pairs(sem, torch.tensor([0, 1]), gallery, torch.tensor([0, 1, 1]), k=1)
    assert pairs.columns[::2].tolist() == [0, 1]  # 5 lies as far from 1 as from 9
    assert pairs.match[::2].tolist() == [True, True]
    assert len(sampled_pairs(sem, torch.tensor([0, 1])).rows) == 4  # one other, near and drawn


def test_beta_of_pairs():
    sem, labels = torch.randn(9, 2), torch.zeros(9).long()
    pairs, unc = sampled_pairs(sem, labels), torch.randn(9, 3)
    beta = pair_uncertainty(pairs, unc)
    wanted = [(unc[i] + unc[j]).norm() for i, j in zip(pairs.rows, pairs.columns, strict=True)]
    assert torch.allclose(beta, torch.stack(wanted))
    numbers, others = torch.rand(9), torch.rand(9)
    assert torch.equal(
        pair_uncertainty(pairs, numbers, others), numbers[pairs.rows] + others[pairs.columns]
    )


def test_forecasts_find_the_logistic_model():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(20_000, 2, generator=draw)
    truth = (0.5 - 2 * features[:, 0] + features[:, 1]).sigmoid()
    match = torch.rand(20_000, generator=draw) < truth
    query = torch.arange(20_000) // 10
    forecast = match_forecast(features, match, query)
    assert (forecast - truth).abs().max() < 0.05
    assert ece(forecast, match) < 0.02
    alone = match_forecast(features[:, :1], match, query)
    assert brier(forecast, match) < brier(alone, match) - 0.01
    assert torch.equal(forecast, match_forecast(features, match, query))


def test_a_query_is_not_forecast_from_itself():
    """Otherwise the model of either half would have learned these, and be sure of them."""
    query = torch.arange(100).repeat_interleave(4)
    names = torch.eye(100)[query]  # features that name the query, and nothing else
    match = torch.rand(100, generator=torch.Generator().manual_seed(0))[query] < 0.3
    forecast = match_forecast(names, match, query)
    assert len(forecast.unique().mul(1e6).round().unique()) == 2  # one for each half
    assert error_auroc(-forecast, match) < 0.6


def test_a_half_in_which_all_match_forecasts_a_match():
    forecast = match_forecast(torch.rand(8, 1), torch.ones(8).bool(), torch.arange(8))
    assert forecast.tolist() == [1.0] * 8


def test_forecasts_refuse():
    features, match, query = torch.rand(4, 2), torch.ones(4).bool(), torch.arange(4)
    with pytest.raises(ValueError, match=r"features must have shape \[P, F\], got \[4\]"):
        match_forecast(features[:, 0], match, query)
    with pytest.raises(ValueError, match=r"query must have shape \[4\] like features"):
        match_forecast(features, match, query[:2])
    with pytest.raises(ValueError, match="query must name at least two queries, got 1"):
        match_forecast(features, match, query * 0)


def test_wrong_answers_by_hand():
    sem = torch.tensor([[0.0], [1.0], [1.2], [9.0]])
    wrong, matched = wrong_answers(sem, torch.tensor([0, 0, 1, 2]))
    assert wrong.tolist() == [False, True, True, True]
    assert matched.tolist() == [True, True, False, False]
    wrong, matched = wrong_answers(
        sem, torch.tensor([0, 0, 1, 2]), torch.tensor([[0.0], [5.0]]), torch.tensor([0, 1])
    )
    assert wrong.tolist() == [False, False, True, True]
    assert matched.tolist() == [True, True, True, False]


# The bootstrap


def test_the_bootstrap_is_a_loop_over_samples():
    values = drawn(50)[0].double()
    found = bootstrap(lambda weights: mean(values, weights), 50, resamples=2000)
    draw = torch.Generator().manual_seed(7)
    loop = [values[torch.randint(50, (50,), generator=draw)].mean() for _ in range(2000)]
    low, high = np.quantile(torch.stack(loop).numpy(), [0.025, 0.975])
    assert found.value == pytest.approx(values.mean().item())
    width = high - low
    assert found.low == pytest.approx(low, abs=0.1 * width)
    assert found.high == pytest.approx(high, abs=0.1 * width)
    # About two standard errors either way.
    assert width == pytest.approx(2 * 1.96 * values.std().item() / 50**0.5, rel=0.15)


def test_the_bootstrap_covers_what_it_should():
    """Of the intervals of many small data sets, about nine in ten hold the true mean."""
    draw = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        values = torch.randn(40, generator=draw).double()
        found = bootstrap(lambda weights, v=values: mean(v, weights), 40, level=0.9)
        held += found.low <= 0 <= found.high
    assert 0.82 < held / 200 < 0.97


def test_the_bootstrap_is_seeded_and_many_items_are_drawn_in_parts():
    values = torch.rand(5000).double()
    seen = []

    def measure(weights):
        seen.append(tuple(weights.shape))
        assert (weights.sum(dim=0) == 5000).all()
        return mean(values, weights)

    one, other = (bootstrap(measure, 5000, resamples=40, seed=seed) for seed in (0, 1))
    assert one != other
    assert one == bootstrap(lambda weights: mean(values, weights), 5000, resamples=40)
    assert seen[:4] == [(5000, 16), (5000, 16), (5000, 8), (5000,)]


def test_samples_without_a_wrong_answer_are_left_out():
    uncertainty, wrong = torch.arange(6.0), torch.arange(6) == 5
    found = bootstrap(lambda weights: error_auroc(uncertainty, wrong, weights), 6)
    assert (found.value, found.low, found.high) == (1, 1, 1)
    nothing = bootstrap(lambda weights: error_auroc(uncertainty, wrong & False, weights), 6)
    assert all(math.isnan(x) for x in (nothing.value, nothing.low, nothing.high))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"items": 0}, "items must be >= 1, got 0"),
        ({"items": 3, "resamples": 0}, "resamples must be >= 1, got 0"),
        ({"items": 3, "level": 1.0}, "level must be > 0 and < 1, got 1.0"),
    ],
)
def test_the_bootstrap_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(lambda weights: weights[0], **settings)


# The table


@pytest.fixture(scope="module")
def blurred():
    """Embeddings that are off by as much as their uncertainty says, and labels."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat(40)
    unc = torch.rand(240, 1, generator=draw) * torch.ones(2)
    off = torch.randn(240, 6, generator=draw) * unc[:, :1]
    return torch.eye(6)[labels] + 0.7 * off, unc, labels


def test_the_table_knows_what_knows(blurred):
    sem, unc, labels = blurred
    nothing = torch.rand(240, generator=torch.Generator().manual_seed(2))
    table = uncertainty_table({"unc": unc, "nothing": nothing}, sem, labels)
    wrong, _ = wrong_answers(sem, labels)
    assert table.right.value == pytest.approx(1 - wrong.double().mean().item())
    assert table.right.low < table.right.value < table.right.high
    assert table.unmatched == 0
    names = ["error_auroc", "aurc", "pair_auroc", "ece", "brier"]
    assert [list(row) for row in table.rows.values()] == [names, names]
    known, unknown = table.rows["unc"], table.rows["nothing"]
    norm, pairs = unc.norm(dim=1), sampled_pairs(sem, labels)
    beta = pair_uncertainty(pairs, unc)
    told = match_forecast(torch.stack([pairs.distance, beta], 1), pairs.match, pairs.rows)
    wanted = {
        "error_auroc": error_auroc(norm, wrong),
        "aurc": aurc(norm, wrong),
        "pair_auroc": pair_auroc(beta, pairs.distance, pairs.match),
        "ece": ece(told, pairs.match),
        "brier": brier(told, pairs.match),
    }
    assert {name: known[name].value for name in names} == pytest.approx(
        {name: number.item() for name, number in wanted.items()}
    )
    assert known["error_auroc"].low > 0.55
    assert unknown["error_auroc"].low < 0.5 < unknown["error_auroc"].high
    assert known["pair_auroc"].low > 0.5
    assert known["aurc"].high < unknown["aurc"].value
    for row in (known, unknown, table.distance):
        for name, number in row.items():
            assert number.low < number.high
            # A resampled calibration error lies above the one it is of.
            assert number.low < number.value < number.high or name == "ece"


def test_the_table_of_images(blurred):
    sem, unc, labels = blurred
    norm = unc.norm(dim=1)
    rising = norm + 0.3 * torch.arange(6)[:, None]
    table = uncertainty_table(
        {"unc": unc},
        sem,
        labels,
        corrupted={"unc": {"blur": rising, "noise": norm.expand(6, -1)}},
        outside={"unc": norm[:100] + 1},
        resamples=50,
    )
    row = table.rows["unc"]
    assert row["spearman_blur"].value == pytest.approx(severity_correlation(rising).item())
    assert row["spearman_blur"].low > 0.3
    assert row["spearman_noise"].value == pytest.approx(0)
    assert row["ood_auroc"].value == pytest.approx(ood_auroc(norm, norm[:100] + 1).item())


def test_queries_without_a_match_are_counted_and_left_out(blurred):
    sem, unc, labels = blurred
    alone = labels.clone()
    alone[:3] = torch.tensor([97, 98, 99])
    table = uncertainty_table({"unc": unc}, sem, alone, resamples=20)
    wrong = wrong_answers(sem, alone)[0][3:]
    assert table.unmatched == 3
    assert table.right.value == pytest.approx(1 - wrong.double().mean().item())
    assert table.rows["unc"]["error_auroc"].value == pytest.approx(
        error_auroc(unc.norm(dim=1)[3:], wrong).item()
    )


def test_the_table_takes_what_is_wrong_and_a_gallery(blurred):
    sem, unc, labels = blurred
    wrong = torch.arange(240) % 3 == 0
    table = uncertainty_table({"unc": unc}, sem, labels, wrong=wrong, resamples=20)
    assert table.right.value == pytest.approx(2 / 3)
    sides = ({"unc": unc[:100]}, sem[:100], labels[:100])
    gallery = (sem[100:], labels[100:], {"unc": unc[100:]})
    table = uncertainty_table(*sides, *gallery, resamples=20)
    wrong, _ = wrong_answers(sem[:100], labels[:100], *gallery[:2])
    assert table.right.value == pytest.approx(1 - wrong.double().mean().item())
    pairs = sampled_pairs(sem[:100], labels[:100], *gallery[:2])
    beta = (unc[pairs.rows] + unc[100 + pairs.columns]).norm(dim=1)
    assert table.rows["unc"]["pair_auroc"].value == pytest.approx(
        pair_auroc(beta, pairs.distance, pairs.match).item()
    )


def test_collapsed_embeddings_are_seen_beside_their_recall():
    """Easy mistakes inflate R-AUROC: the table says how many there are."""
    labels = torch.arange(50).repeat_interleave(4)
    sem = torch.zeros(200, 2)
    sem[:20] = torch.eye(2)[0] * labels[:20, None]  # only five classes are told apart
    unc = 1.0 - (labels < 5).float()
    table = uncertainty_table({"unc": unc}, sem, labels, resamples=20)
    assert table.rows["unc"]["error_auroc"].value > 0.9
    assert table.right.high < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"candidates": {"u": torch.ones(3)}},
            r"candidates\['u'\] must have shape \[4\] or \[4, D",
        ),
        ({"candidates": {"u": torch.full((4,), nan)}}, r"candidates\['u'\] must be numbers, got N"),
        ({"labels": torch.arange(3)}, r"labels must have shape \[4\] like sem \[4, 2\]"),
        ({"labels": torch.arange(4)}, "labels must give some query another item of its class"),
        ({"sem2": torch.ones(3, 2)}, r"candidates2 must name \['u'\] like candidates, got \[\]"),
        (
            {"sem2": torch.ones(3, 2), "candidates2": {"u": torch.ones(3)}},
            "sem2 and labels2 must be given together",
        ),
        ({"corrupted": {}}, r"corrupted must name \['u'\] like candidates, got \[\]"),
        ({"outside": {"v": torch.ones(3)}}, r"outside must name \['u'\] like candidates, got \['v"),
        ({"wrong": torch.ones(3).bool()}, r"wrong must have shape \[4\] like sem, got \[3\]"),
        ({"sem": torch.tensor([[0, 0], [0, nan], [0, 0], [0, 0]])}, r"sem must be .* at \[1, 1\]"),
    ],
)
def test_the_table_refuses(change, message):
    given = {
        "candidates": {"u": torch.ones(4)},
        "sem": torch.rand(4, 2),
        "labels": torch.tensor([0, 0, 1, 1]),
    }
    with pytest.raises(ValueError, match=message):
        uncertainty_table(**(given | change))


def test_one_item_has_no_neighbour():
    for function in (wrong_answers, sampled_pairs):
        with pytest.raises(ValueError, match="sem must hold at least 2 items, got 1"):
            function(torch.ones(1, 2), torch.zeros(1).long())


# Images made worse


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_corruptions(name, channels, digits):
    images = digits[:20].repeat(1, channels, 2, 1)  # twice as high as wide
    before = images.clone()
    damaged = [CORRUPTIONS[name](images, severity) for severity in range(6)]
    assert torch.equal(images, before)  # not in place
    assert torch.equal(damaged[0], images)
    for image in damaged:
        assert image.shape == images.shape
        assert image.dtype == images.dtype
        assert -1e-6 <= image.min() <= image.max() <= 1 + 1e-6
    change = [(image - images).abs().mean().item() for image in damaged]
    assert change == sorted(set(change)), "every severity must change more than the one before"
    assert torch.equal(CORRUPTIONS[name](images, 5), damaged[5])


@pytest.mark.parametrize("name", ["blur", "crop", "contrast"])
def test_a_uniform_image_has_nothing_to_lose(name):
    grey = torch.full((2, 3, 8, 8), 0.3)
    assert torch.allclose(CORRUPTIONS[name](grey, 5), grey, atol=1e-6)


def test_blur_is_the_gaussian_by_hand():
    image = torch.zeros(1, 1, 9, 20)
    image[0, 0, 4, 10] = 1
    sigma = 0.1 * 9
    weight = torch.exp(-0.5 * (torch.arange(-3.0, 4.0) / sigma) ** 2)
    weight /= weight.sum()
    blurred = CORRUPTIONS["blur"](image, 3)[0, 0]
    assert torch.allclose(blurred[1:8, 7:14], weight[:, None] * weight, atol=1e-6)


def test_occlusion_is_a_black_rectangle_within_the_image():
    images = torch.ones(50, 1, 8, 16)
    black = (CORRUPTIONS["occlusion"](images, 3) == 0)[:, 0]  # half of either side: 4 x 8
    assert (black.sum(dim=(1, 2)) == 32).all()
    assert (black.any(dim=2).sum(dim=1) == 4).all()
    assert (black.any(dim=1).sum(dim=1) == 8).all()
    assert len(black.unique(dim=0)) > 10  # not always at the same place


def test_crop_is_the_centre_by_hand():
    row = torch.arange(8.0) / 10
    image = (row[:, None] + row).div(2).expand(1, 2, 8, 8)
    # Half of either side, from 1.5 to 5.5 (pixels are at whole numbers), in eight steps of 0.5.
    place = 1.75 + 0.5 * torch.arange(8.0)
    wanted = (place[:, None] + place) / 20
    assert torch.allclose(CORRUPTIONS["crop"](image, 5)[0, 1], wanted, atol=1e-6)


def test_contrast_by_hand():
    image = torch.tensor([0.0, 0.2, 0.4, 1.0]).view(1, 1, 2, 2)
    found = CORRUPTIONS["contrast"](image, 2).flatten()  # half of the difference from 0.4
    assert torch.allclose(found, torch.tensor([0.2, 0.3, 0.4, 0.7]))


def test_shuffled_images_keep_their_grey_levels_and_nothing_else(digits):
    found = shuffled(digits)
    assert torch.equal(found, shuffled(digits))
    assert torch.equal(found.flatten(1).sort().values, digits.flatten(1).sort().values)
    assert not torch.equal(found, digits)
    # The same order for all images and channels: none has lost what tells it from the others.
    assert torch.allclose(
        torch.cdist(*[found.flatten(1)] * 2), torch.cdist(*[digits.flatten(1)] * 2)
    )
    colour = shuffled(digits.repeat(1, 3, 1, 1))
    assert torch.equal(colour[:, 2:], found)


def test_corrupted_norms_of_an_embedding_that_sees_darkness():
    images = torch.rand(6, 1, 8, 8) / 2 + 0.5
    norms = corrupted_norms(lambda x: (x, 1 - x.flatten(1)), images)
    assert {name: list(norm.shape) for name, norm in norms.items()} == {
        name: [6, 6] for name in CORRUPTIONS
    }
    assert torch.equal(norms["noise"][0], (1 - images.flatten(1)).norm(dim=1))
    assert severity_correlation(norms["occlusion"]) > 0.9


def test_candidates_of_damaged_images_are_measured_together(digits):
    seen = []

    def measure(images):
        seen.append(images)
        return {"ink": images.mean(dim=(1, 2, 3)), "range": images.amax(dim=(1, 2, 3))}

    found = corrupted(measure, digits)
    assert len(seen) == 1 + 5 * 5  # the clean images once
    assert list(found) == ["ink", "range"]
    for kind, corrupt in CORRUPTIONS.items():
        for severity in range(6):
            assert torch.equal(
                found["range"][kind][severity], corrupt(digits, severity).amax(dim=(1, 2, 3))
            )


# Baselines


def test_norm_and_proxy_distance():
    draw = torch.Generator().manual_seed(0)
    sem, proxies = torch.randn(20, 4, generator=draw), torch.randn(5, 4, generator=draw)
    assert torch.equal(semantic_norm(sem), -torch.linalg.vector_norm(sem, dim=1))
    wanted = torch.cdist(sem, proxies).amin(dim=1)
    assert torch.allclose(proxy_distance(sem, proxies), wanted, atol=1e-6)


def test_entropy_is_that_of_the_definition():
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).double()
    share = softmax(logits.numpy())
    wanted = -(share * np.log(share)).sum(axis=1)
    assert softmax_entropy(logits).tolist() == pytest.approx(wanted.tolist())
    assert softmax_entropy(torch.zeros(1, 5)).item() == pytest.approx(math.log(5))
    assert softmax_entropy(torch.tensor([[900.0, -900.0]])).item() == 0


def test_mc_dropout_is_the_scatter_of_its_passes():
    draw = torch.Generator().manual_seed(0)
    features, weight = torch.rand(6, 10, generator=draw), torch.randn(3, 10, generator=draw)
    seen = []

    def head(kept):
        seen.append(normalize(kept @ weight.T))
        return seen[-1]

    found = mc_dropout(features, head, p=0.3, passes=7)
    assert len(seen) == 7
    passes = torch.stack(seen).double()
    wanted = (passes - passes.mean(dim=0)).square().sum(dim=2).mean(dim=0)
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    assert (found > 0).all()
    # An image's number depends on that image alone, and on the seed.
    assert torch.allclose(mc_dropout(features[2:3], head, p=0.3, passes=7), found[2:3])
    assert not torch.allclose(mc_dropout(features, head, p=0.3, passes=7, seed=1), found)


def test_mc_dropout_leaves_out_the_share_it_says_and_keeps_the_mean():
    kept = []
    mc_dropout(torch.ones(1, 50_000), lambda x: kept.append(x) or x, p=0.2, passes=2)
    for features in kept:
        assert (features == 0).double().mean().item() == pytest.approx(0.2, abs=0.01)
        assert features.mean().item() == pytest.approx(1, abs=0.01)
    assert mc_dropout(torch.rand(3, 4), lambda x: x, p=0.0).tolist() == [0, 0, 0]


def test_mc_dropout_refuses():
    with pytest.raises(ValueError, match="p must be >= 0 and < 1, got 1"):
        mc_dropout(torch.ones(2, 2), normalize, p=1)
    with pytest.raises(ValueError, match="passes must be >= 1, got 0"):
        mc_dropout(torch.ones(2, 2), normalize, passes=0)
