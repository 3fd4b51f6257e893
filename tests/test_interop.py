"""pytorch-metric-learning with our distances: its contract, its losses and miners, its numbers."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    assert_equals_in_double,
    draw,
    golden_names,
    load_golden,
)
from pytorch_metric_learning import losses, miners, reducers, regularizers
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, MatchFinder
from torch import Tensor, nn
from torch.nn import functional as F

import idml_fast
from idml_fast import Metric, interop, reference
from idml_fast.interop import (
    IntrospectiveDistance,
    IntrospectiveSimilarity,
    Joined,
    join,
    split,
)

DS, DU = 7, 4
WIDTH = DS + DU
CLASSES = 5
LABELS = torch.arange(CLASSES).repeat_interleave(5)  # SmoothAPLoss wants as many items of a class
METRIC = {"distance": Metric(1.5, 0.25), "cosine": Metric(1.5, 0.25, "cosine")}
DISTANCE = {"distance": IntrospectiveDistance, "cosine": IntrospectiveSimilarity}
THEIRS = {"distance": LpDistance, "cosine": CosineSimilarity}

PARTS = slice(DS), slice(DS, None)

each_form = pytest.mark.parametrize("form", METRIC)


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes what a loss creates in the default dtype, or rounds to float32, float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(before)


def embed(n: int = len(LABELS), seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normally distributed joint embeddings."""
    drawn = draw(n, None, DS, DU, seed=seed, dtype=dtype)
    return join(drawn["sem"], drawn["unc"])


def ours(form: str, **options: Any) -> BaseDistance:
    """Our distance of this form."""
    return DISTANCE[form](DS, **{"metric": METRIC[form], **options})


class Eager:
    """The definition, `idml_fast.reference`, as a distance."""

    def __init__(self, form: str, **options: Any) -> None:
        super().__init__(**options)
        self.metric = METRIC[form]

    def normalize(self, embeddings: Tensor, dim: int = 1, **options: Any) -> Tensor:
        sem, unc = embeddings.narrow(dim, 0, DS), embeddings.narrow(dim, DS, DU)
        return torch.cat([F.normalize(sem, dim=dim, **options), unc], dim=dim)

    def get_norm(self, embeddings: Tensor, dim: int = 1) -> Tensor:
        return embeddings.narrow(dim, 0, DS).norm(dim=dim)

    def compute_mat(self, query: Tensor, ref: Tensor) -> Tensor:
        if query.ndim == 3:
            return torch.stack([self.compute_mat(*pair) for pair in zip(query, ref, strict=True)])
        sets = query[:, :DS], query[:, DS:], ref[:, :DS], ref[:, DS:]
        return reference.pairwise(*sets, metric=self.metric)

    def pairwise_distance(self, query: Tensor, ref: Tensor) -> Tensor:
        sets = query[:, :DS], query[:, DS:], ref[:, :DS], ref[:, DS:]
        return reference.paired(*sets, metric=self.metric)


class EagerDistance(Eager, LpDistance):
    pass


class EagerSimilarity(Eager, CosineSimilarity):
    pass


def eager(form: str, **options: Any) -> BaseDistance:
    """The eager distance of this form."""
    return {"distance": EagerDistance, "cosine": EagerSimilarity}[form](form, **options)


# -------------------------------------------------------------------- the contract of BaseDistance


def assert_conforms(make: Callable[..., BaseDistance]) -> None:
    """What every loss and miner relies on; ``make(**options)`` is any distance of width WIDTH."""
    query, ref = embed(9), embed(6, seed=1)
    for power in (1, 2):
        distance = make(power=power)
        assert isinstance(distance, BaseDistance)
        assert (distance.p, distance.power) == (2, power)
        assert isinstance(distance, CosineSimilarity if distance.is_inverted else LpDistance)
        before = query.clone(), ref.clone()
        mat = distance(query, ref)
        assert mat.shape == (9, 6)
        assert torch.equal(query, before[0])
        assert torch.equal(ref, before[1])
        normalized = [distance.maybe_normalize(x) for x in (query, ref)]
        expected = distance.compute_mat(*normalized) ** power
        torch.testing.assert_close(mat, expected, rtol=0, atol=1e-12)
        # F.pairwise_distance adds 1e-6 to every component.
        rows, cols = torch.cartesian_prod(torch.arange(9), torch.arange(6)).T
        listed = distance.pairwise_distance(normalized[0][rows], normalized[1][cols]) ** power
        torch.testing.assert_close(listed.view(9, 6), mat, rtol=0, atol=1e-4)
        # A batch against itself, however it is said.
        itself = distance(query)
        assert itself.shape == (9, 9)
        for other in (distance(query, query), distance(query, query.clone())):
            torch.testing.assert_close(itself, other, rtol=0, atol=1e-7)
        near = normalized[0]
        torch.testing.assert_close(distance.compute_mat(near, near) ** power, itself)
        closest, columns = distance.smallest_dist(itself, dim=1)
        assert torch.equal(columns, torch.arange(9))
        torch.testing.assert_close(closest, itself.diag())
        farthest = distance.largest_dist(itself, dim=1).values
        assert (distance.margin(farthest, closest) > 0).all()
        best = torch.amax if distance.is_inverted else torch.amin
        assert distance.smallest_dist(itself) == best(itself)
        # Gradients, also by the contract's own way through compute_mat.
        leaves = query.clone().requires_grad_(), ref.clone().requires_grad_()
        assert torch.autograd.gradcheck(distance, leaves)

    distance = make(collect_stats=True)
    unit = distance.maybe_normalize(query)
    torch.testing.assert_close(distance.get_norm(unit), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(distance.maybe_normalize(unit), unit)
    torch.testing.assert_close(distance.normalize(query.T, dim=0), unit.T)
    torch.testing.assert_close(distance.get_norm(query.T, dim=0), distance.get_norm(query))
    distance(query, ref)
    for side, x in {"query": query, "ref": ref}.items():
        for when, y in {"initial": x, "final": distance.maybe_normalize(x)}.items():
            recorded = getattr(distance, f"{when}_avg_{side}_norm")
            assert recorded == pytest.approx(distance.get_norm(y).mean().item())
    distance(query)
    assert distance.initial_avg_ref_norm == distance.initial_avg_query_norm
    for wrong in ([query[0]], [query[None]], [query, ref[0]], [query, ref[None]]):
        with pytest.raises(ValueError, match="embeddings must be a 2D tensor of shape"):
            distance(*wrong)
    assert list(distance.parameters()) == []
    for copied in (copy.deepcopy(distance), pickle.loads(pickle.dumps(distance))):
        assert torch.equal(copied(query, ref), distance(query, ref))
    assert distance(query[:0], ref).shape == (0, 6)
    assert distance(query, ref[:0]).shape == (9, 0)


def make_ours(form: str) -> Callable[..., BaseDistance]:
    return lambda **options: ours(form, **options)


CONFORMING = {
    "LpDistance": LpDistance,
    "CosineSimilarity": CosineSimilarity,
    "IntrospectiveDistance": make_ours("distance"),
    "IntrospectiveSimilarity": make_ours("cosine"),
    "official": lambda **options: ours("cosine", metric=Metric.official(), **options),
    "plain": lambda **options: ours("distance", metric=Metric.plain(), **options),
    "reference": lambda **options: ours("distance", backend="reference", **options),
}


@pytest.mark.parametrize("make", CONFORMING.values(), ids=CONFORMING)
def test_contract(make):
    assert_conforms(make)


class WithoutPower(IntrospectiveDistance):
    def forward(self, query_emb, ref_emb=None):
        return super().forward(query_emb, ref_emb) ** (1 / self.power)


class WithTheMarginTurned(IntrospectiveSimilarity):
    def margin(self, x, y):
        return x - y


class WithoutNormalizing(IntrospectiveDistance):
    def normalize(self, embeddings, dim=1, **kwargs):
        return embeddings


@pytest.mark.parametrize("broken", [WithoutPower, WithTheMarginTurned, WithoutNormalizing])
def test_the_contract_refuses_what_breaks_it(broken):
    with pytest.raises(AssertionError):
        assert_conforms(lambda **options: broken(DS, **options))


@each_form
def test_normalizing_leaves_the_uncertainty_alone(form):
    x = embed()
    sem, unc = split(ours(form).normalize(x), DS)
    assert torch.equal(sem, F.normalize(x[:, :DS]))
    assert torch.equal(unc, x[:, DS:])
    raw = ours(form, normalize_embeddings=False, collect_stats=True)
    raw(x)
    assert raw.final_avg_query_norm == pytest.approx(x[:, :DS].norm(dim=1).mean().item())


@each_form
@pytest.mark.parametrize("other", [True, False], ids=["two sets", "self"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_scores_and_gradients_are_those_of_the_operations(form, other, normalize, dtype):
    x, y = (embed(9, seed, dtype).requires_grad_() for seed in (0, 1))
    y = y if other else None
    distance = ours(form, normalize_embeddings=normalize)
    pairs = []
    for leaf in (x, y):
        if leaf is not None:
            sem, unc = leaf[:, :DS], leaf[:, DS:]
            pairs += [F.normalize(sem) if normalize else sem, unc]
    expected = idml_fast.pairwise(*pairs, metric=METRIC[form])
    mat = distance(x, y)
    assert torch.equal(mat, expected)
    if other:
        listed = idml_fast.paired(*pairs, metric=METRIC[form])
        found = distance.pairwise_distance(*map(distance.maybe_normalize, (x, y)))
        assert torch.equal(found, listed)
    else:
        assert (mat.diag() == (0 if form == "distance" else 1)).all()
    leaves = [leaf for leaf in (x, y) if leaf is not None]
    upstream = torch.randn(mat.shape, dtype=mat.dtype)
    gradients = (torch.autograd.grad(scores, leaves, upstream) for scores in (mat, expected))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
        assert (a[:, :DS] != 0).any()
        assert (a[:, DS:] != 0).any()


def test_a_batch_against_itself_is_multiplied_once_and_read_where_it_is(monkeypatch):
    calls = []

    def pairwise(*arguments, **options):
        calls.append(arguments)
        return idml_fast.pairwise(*arguments, **options)

    monkeypatch.setattr(interop, "pairwise", pairwise)
    x, y = embed(9), embed(6, seed=1)
    distance = ours("distance", normalize_embeddings=False)
    for arguments in ([x], [x, x]):
        distance(*arguments)
        sem, unc, sem2, unc2 = calls.pop()
        assert sem2 is unc2 is None
        assert sem.data_ptr() == x.data_ptr()
        assert unc.data_ptr() == x[:, DS:].data_ptr()
    distance(x, y)
    assert calls.pop()[2].data_ptr() == y.data_ptr()
    ours("distance")(x, x)
    assert calls.pop()[2:] == (None, None)


@each_form
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
def test_autocast(form, normalize):
    """As pytorch-metric-learning's LpDistance, it returns the dtype of the embeddings: some losses
    put numbers of that dtype into the matrix."""
    distance = ours(form, normalize_embeddings=normalize)
    x, y = embed(9, dtype=torch.float32).requires_grad_(), embed(6, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mat, listed = distance(x, y), distance.pairwise_distance(x[:6], y)
        halves = distance(x.bfloat16(), y.bfloat16())
    pairs = [*split(distance.maybe_normalize(x), DS), *split(distance.maybe_normalize(y), DS)]
    expected = idml_fast.pairwise(*(z.bfloat16() for z in pairs), metric=METRIC[form])
    assert mat.dtype == listed.dtype == torch.float32
    assert torch.equal(mat, expected.float())
    pairs = [z.bfloat16() for z in (*split(x[:6], DS), *split(y, DS))]
    assert torch.equal(listed, idml_fast.paired(*pairs, metric=METRIC[form]).float())
    assert halves.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(mat.sum(), x)
    assert gradient.dtype == torch.float32
    assert (gradient != 0).any(0).all()


# ------------------------------------------------------------- what the conventional distances give


@each_form
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("other", [True, False], ids=["two sets", "self"])
def test_without_uncertainty_it_is_their_distance(form, normalize, other):
    options = {"normalize_embeddings": normalize} if form == "distance" else {}
    theirs, unclear = THEIRS[form](**options), embed(12)
    certain = join(unclear[:, :DS], torch.zeros(12, DU, dtype=torch.float64))
    large, plain = Metric(1e15, 0.0, form), Metric.plain(form)
    cases = {
        "no uncertainty": (ours(form, metric=large, **options), certain),
        "a large tau": (ours(form, metric=large, **options), unclear),
        "the plain metric": (ours(form, metric=plain, **options), unclear),
        "the plain metric, sem alone": (ours(form, metric=plain, **options), unclear[:, :DS]),
    }
    upstream = torch.randn(12, 5 if other else 12, dtype=torch.float64).fill_diagonal_(0)
    for what, (distance, x) in cases.items():
        found = []
        for measure, z in [(distance, x), (theirs, x[:, :DS])]:
            leaf = z.clone().requires_grad_()
            mat = measure(leaf, leaf[:5].detach() if other else None)
            if other:
                mat = mat * upstream.ne(0)  # cdist has no gradient of 0 there; nor a cosine of 1
            (gradient,) = torch.autograd.grad(mat, leaf, upstream)
            found.append((mat.detach(), gradient))
        (mat, gradient), (expected, expected_gradient) = found
        assert_equals_in_double(what, mat, expected)
        assert_equals_in_double(what, gradient[:, :DS], expected_gradient)
        assert (gradient[:, DS:].abs() < 1e-10).all()


# ------------------------------------------------------------------ every loss, miner and reducer


class Case:
    """A loss as pytorch-metric-learning makes it, for the forms it can take, and its call."""

    def __init__(self, make, forms=("distance", "cosine"), call=None):
        self.make, self.forms = make, forms
        self.call = call or (lambda loss, x: loss(x, LABELS))


COSINE, LP = ("cosine",), ("distance",)
PROXIES = {"num_classes": CLASSES, "embedding_size": WIDTH}


def simple(kind: type, *forms: str, **options: Any) -> Case:
    return Case(lambda distance: kind(distance=distance, **options), forms or tuple(METRIC))


def wrapped(distance: BaseDistance) -> nn.Module:
    miner = miners.MultiSimilarityMiner(distance=distance)
    loss = losses.ContrastiveLoss(0.2, 0.9, distance=distance)
    return losses.CrossBatchMemory(loss, WIDTH, 40, miner=miner)


def several(distance: BaseDistance) -> nn.Module:
    both = [losses.TripletMarginLoss(distance=distance), losses.NTXentLoss(distance=distance)]
    return losses.MultipleLosses(both, miners=[miners.BatchHardMiner(distance=distance), None])


def self_supervised(symmetric: bool) -> Case:
    return Case(
        lambda distance: losses.SelfSupervisedLoss(
            losses.NTXentLoss(distance=distance), symmetric=symmetric
        ),
        call=lambda loss, x: loss(x, x.flip(0)),
    )


def regular_faces(distance: BaseDistance) -> nn.Module:
    faces = regularizers.RegularFaceRegularizer(distance=distance)
    return losses.CosFaceLoss(distance=distance, weight_regularizer=faces, **PROXIES)


def sparse_centers(distance: BaseDistance) -> nn.Module:
    sparse = regularizers.SparseCentersRegularizer(CLASSES, 3, distance=distance)
    return losses.SoftTripleLoss(
        distance=distance, centers_per_class=3, weight_regularizer=sparse, **PROXIES
    )


LOSSES = {
    "ArcFaceLoss": simple(losses.ArcFaceLoss, *COSINE, **PROXIES),
    "CircleLoss": simple(losses.CircleLoss, *COSINE),
    "ContrastiveLoss": simple(losses.ContrastiveLoss, pos_margin=0.3, neg_margin=0.9),
    "CosFaceLoss": simple(losses.CosFaceLoss, *COSINE, **PROXIES),
    "CosFaceLoss, regular faces": Case(regular_faces, COSINE),
    "CrossBatchMemory": Case(wrapped),
    "DynamicSoftMarginLoss": simple(losses.DynamicSoftMarginLoss, *LP),
    "FastAPLoss": simple(losses.FastAPLoss, *LP),
    "GeneralizedLiftedStructureLoss": simple(losses.GeneralizedLiftedStructureLoss),
    "HistogramLoss": simple(losses.HistogramLoss, *COSINE),
    "InstanceLoss": simple(losses.InstanceLoss, *COSINE),
    "IntraPairVarianceLoss": simple(losses.IntraPairVarianceLoss),
    "LargeMarginSoftmaxLoss": simple(losses.LargeMarginSoftmaxLoss, *COSINE, **PROXIES),
    "LiftedStructureLoss": simple(losses.LiftedStructureLoss),
    "ManifoldLoss": Case(
        lambda distance: losses.ManifoldLoss(l=WIDTH, K=CLASSES, distance=distance),
        COSINE,
        lambda loss, x: loss(x),
    ),
    "MarginLoss": simple(losses.MarginLoss),
    "MarginLoss, learned": simple(
        losses.MarginLoss, learn_beta=True, num_classes=CLASSES, nu=0.1, beta=0.9
    ),
    "MultipleLosses": Case(several),
    "MultiSimilarityLoss": simple(losses.MultiSimilarityLoss),
    "NCALoss": simple(losses.NCALoss, softmax_scale=3),
    "NormalizedSoftmaxLoss": simple(losses.NormalizedSoftmaxLoss, **PROXIES),
    "NPairsLoss": simple(losses.NPairsLoss),
    "NTXentLoss": simple(losses.NTXentLoss),
    "PNPLoss": simple(losses.PNPLoss, *COSINE),
    "ProxyAnchorLoss": simple(losses.ProxyAnchorLoss, **PROXIES),
    "ProxyNCALoss": simple(losses.ProxyNCALoss, softmax_scale=3, **PROXIES),
    "RankedListLoss": simple(losses.RankedListLoss, *LP, margin=0.4, Tn=1, Tp=0.5),
    "SelfSupervisedLoss": self_supervised(symmetric=True),
    "SelfSupervisedLoss, one-sided": self_supervised(symmetric=False),
    "SmoothAPLoss": simple(losses.SmoothAPLoss, *COSINE),
    "SoftTripleLoss": simple(losses.SoftTripleLoss, *COSINE, **PROXIES),
    "SoftTripleLoss, sparse centers": Case(sparse_centers, COSINE),
    "SphereFaceLoss": simple(losses.SphereFaceLoss, *COSINE, **PROXIES),
    "SubCenterArcFaceLoss": simple(losses.SubCenterArcFaceLoss, *COSINE, **PROXIES),
    "SupConLoss": simple(losses.SupConLoss),
    "TripletMarginLoss": simple(losses.TripletMarginLoss, margin=0.2),
    "TripletMarginLoss, swapped": simple(losses.TripletMarginLoss, swap=True, smooth_loss=True),
    "TupletMarginLoss": simple(losses.TupletMarginLoss, *COSINE),
}
NOT_LOSSES = {
    "AngularLoss": "takes dot products of the embeddings itself; the distance only normalizes them",
    "P2SGradLoss": "takes cosines of the embeddings itself",
    "SignalToNoiseRatioContrastiveLoss": "divides variances over components, and demands its own",
    "ThresholdConsistentMarginLoss": "takes cosines of the embeddings itself",
    "VICRegLoss": "refuses a distance",
    "BaseLossWrapper": "a base",
    "BaseMetricLossFunction": "a base",
    "GenericPairLoss": "a base",
}


def run(case: Case, distance: BaseDistance, x: Tensor) -> dict[str, Tensor]:
    """The loss, and its gradients with respect to the embeddings and to what it learns."""
    torch.manual_seed(0)
    np.random.seed(0)
    loss, leaf = case.make(distance), x.clone().requires_grad_()
    value = case.call(loss, leaf)
    value.sum().backward()
    learned = {name: p.grad for name, p in loss.named_parameters()}
    return {"value": value.detach(), "embeddings": leaf.grad, **learned}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In float64; and there is something to compare."""
    assert found.keys() == expected.keys()
    assert found["value"].abs().sum() > 0
    for name, x in found.items():
        assert x.abs().sum() > 0, f"no gradient of {name}"
        assert_equals_in_double(name, x, expected[name])


each_of_them = pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, case in LOSSES.items() for form in case.forms]
)


@pytest.mark.usefixtures("in_double")
@each_of_them
@pytest.mark.parametrize("power", [1, 2], ids=["", "squared"])
def test_losses(name, form, power):
    case, x = LOSSES[name], embed()
    mine, definition = (run(case, d(form, power=power), x) for d in (ours, eager))
    assert_same(mine, definition)
    assert all((mine["embeddings"][:, part] != 0).any() for part in PARTS)


@each_of_them
def test_losses_under_autocast(name, form):
    x = embed(dtype=torch.float32).requires_grad_()
    loss = LOSSES[name].make(ours(form))
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSSES[name].call(loss, x)
    value.sum().backward()
    assert value.isfinite()
    assert x.grad.dtype == torch.float32
    assert x.grad.isfinite().all()
    assert all((x.grad[:, part] != 0).any() for part in PARTS)


def classes_of(module: Any) -> set[str]:
    """The classes of modules that a user finds there."""
    kinds = inspect.getmembers(module, inspect.isclass)
    return {name for name, kind in kinds if issubclass(kind, nn.Module)}


def test_no_loss_is_forgotten():
    tested = {name.split(",")[0] for name in LOSSES}
    assert tested | set(NOT_LOSSES) == classes_of(losses)


MINERS = {
    "AngularMiner": (miners.AngularMiner, {}),
    "BatchEasyHardMiner": (miners.BatchEasyHardMiner, {}),
    "BatchEasyHardMiner, all": (
        miners.BatchEasyHardMiner,
        {"pos_strategy": "hard", "neg_strategy": "all"},
    ),
    "BatchHardMiner": (miners.BatchHardMiner, {}),
    "DistanceWeightedMiner": (miners.DistanceWeightedMiner, {}),
    "HDCMiner": (miners.HDCMiner, {}),
    "MultiSimilarityMiner": (miners.MultiSimilarityMiner, {}),
    "PairMarginMiner": (miners.PairMarginMiner, {"pos_margin": 0.5, "neg_margin": 0.9}),
    "TripletMarginMiner": (miners.TripletMarginMiner, {"margin": 0.3}),
    "TripletMarginMiner, semihard": (
        miners.TripletMarginMiner,
        {"margin": 0.3, "type_of_triplets": "semihard"},
    ),
    "UniformHistogramMiner": (miners.UniformHistogramMiner, {"num_bins": 10}),
}
NOT_MINERS = {
    "BaseMiner": "a base",
    "EmbeddingsAlreadyPackagedAsTriplets": "looks at no embedding",
}
ONLY_LP = "AngularMiner", "DistanceWeightedMiner"


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("other", [False, True], ids=["self", "two sets"])
@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in MINERS for form in (LP if name in ONLY_LP else METRIC)],
)
def test_miners(name, form, other):
    kind, options = MINERS[name]
    x, more = embed(), (embed(seed=1), LABELS.flip(0)) if other else ()
    found = []
    for distance in (ours(form), eager(form)):
        torch.manual_seed(0)
        np.random.seed(0)
        leaf = x.clone().requires_grad_()
        mined = kind(distance=distance, collect_stats=True, **options)(leaf, LABELS, *more)
        loss = losses.TripletMarginLoss(margin=1.0, distance=distance)
        value = loss(leaf, LABELS, mined, *more)
        value.backward()
        found.append((mined, {"value": value.detach(), "embeddings": leaf.grad}))
    (mined, results), (expected, definition) = found
    assert sum(len(indices) for indices in mined) > 0
    for a, b in zip(as_sets(mined), as_sets(expected), strict=True):
        assert a == b
    assert_same(results, definition)


def test_no_miner_is_forgotten():
    tested = {name.split(",")[0] for name in MINERS}
    assert tested | set(NOT_MINERS) == classes_of(miners)


def weighted() -> nn.Module:
    return reducers.ClassWeightedReducer(torch.rand(CLASSES, dtype=torch.float64))


REDUCERS = {
    "AvgNonZeroReducer": reducers.AvgNonZeroReducer,
    "ClassWeightedReducer": weighted,
    "DivisorReducer": reducers.DivisorReducer,
    "MeanReducer": reducers.MeanReducer,
    "MultipleReducers": lambda: reducers.MultipleReducers({"neg_loss": reducers.SumReducer()}),
    "PerAnchorReducer": reducers.PerAnchorReducer,
    "SumReducer": reducers.SumReducer,
    "ThresholdReducer": lambda: reducers.ThresholdReducer(low=0.05, high=0.8),
}


@pytest.mark.usefixtures("in_double")
@each_form
@pytest.mark.parametrize("name", REDUCERS)
def test_reducers(name, form):
    kind, margins = losses.ContrastiveLoss, {"pos_margin": 0.5, "neg_margin": 0.5}
    if name == "DivisorReducer":
        kind, margins = losses.MarginLoss, {}
    case = Case(lambda distance: kind(distance=distance, reducer=REDUCERS[name](), **margins))
    assert_same(*(run(case, d(form), embed()) for d in (ours, eager)))


@each_form
def test_losses_that_are_not_reduced(form):
    found = []
    for distance in (ours(form), eager(form)):
        loss = losses.TripletMarginLoss(distance=distance, reducer=reducers.DoNothingReducer())
        found.append(loss(embed(), LABELS)["loss"]["losses"])
    assert_equals_in_double("losses", *found)


def test_no_reducer_is_forgotten():
    assert {*REDUCERS, "DoNothingReducer", "BaseReducer"} == classes_of(reducers)


@pytest.mark.usefixtures("in_double")
@each_form
@pytest.mark.parametrize("mined", [False, True], ids=["all pairs", "mined"])
@pytest.mark.parametrize(
    "name", sorted(set(losses.CrossBatchMemory.supported_losses()) - set(NOT_LOSSES))
)
def test_cross_batch_memory(name, mined, form):
    if form not in LOSSES[name].forms:
        form = LOSSES[name].forms[0]
    found = []
    for distance in (ours(form), eager(form)):
        miner = miners.MultiSimilarityMiner(distance=distance) if mined else None
        # Not a multiple of the batch: the fourth batch is written over the end of the first.
        memory = losses.CrossBatchMemory(LOSSES[name].make(distance), WIDTH, 60, miner=miner)
        batches = [embed(seed=k).requires_grad_() for k in range(4)]
        values = torch.stack([memory(x, LABELS) for x in batches])
        values.sum().backward()
        found.append({"value": values.detach(), **{str(k): x.grad for k, x in enumerate(batches)}})
    assert_same(*found)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("name", ["TripletMarginLoss", "MultiSimilarityLoss", "NCALoss"])
@each_form
def test_identical_items_have_finite_gradients(form, name, normalize):
    x = embed(1).expand(len(LABELS), WIDTH)
    for degenerate in (x, torch.cat([x[:5], embed()[5:]]), torch.zeros_like(x)):
        result = run(LOSSES[name], ours(form, normalize_embeddings=normalize), degenerate)
        assert all(gradient.isfinite().all() for gradient in result.values())


def test_the_scores_may_be_overwritten_where_a_loss_does_it():
    """Without labels, DynamicSoftMarginLoss fills the diagonal of what the distance returned."""
    x = embed().requires_grad_()
    values = []
    for distance in (ours("distance", power=2), eager("distance", power=2)):
        value = losses.DynamicSoftMarginLoss(distance=distance)(x, ref_emb=embed(seed=1))
        values.append(torch.autograd.grad(value, x)[0])
    assert_equals_in_double("gradient", *values)


def test_a_metric_that_learns():
    tau = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    distance = ours("distance", metric=Metric(tau, 0.25))
    value = losses.TripletMarginLoss(distance=distance)(embed(), LABELS)
    value.backward()
    fixed = losses.TripletMarginLoss(distance=ours("distance"))(embed(), LABELS)
    assert_equals_in_double("value", value.detach(), fixed)
    assert tau.grad.abs() > 0


# --------------------------------------------------------------------------------- other's numbers

GOLDEN = {
    "contrastive": (losses.ContrastiveLoss, ("pos_margin", "neg_margin")),
    "fast_ap": (losses.FastAPLoss, ("num_bins",)),
    "margin": (losses.MarginLoss, ("margin", "beta")),
    "multi_similarity": (losses.MultiSimilarityLoss, ("alpha", "beta", "base")),
    "multi_similarity_mined": (losses.MultiSimilarityLoss, ("alpha", "beta", "base")),
    "nca": (losses.NCALoss, ("softmax_scale",)),
    "npairs": (losses.NPairsLoss, ()),
    "ntxent": (losses.NTXentLoss, ("temperature",)),
    "proxy_anchor": (losses.ProxyAnchorLoss, ("margin", "alpha")),
    "proxy_anchor_live_proxies": (losses.ProxyAnchorLoss, ("margin", "alpha")),
    "proxy_nca": (losses.ProxyNCALoss, ("softmax_scale",)),
    "supcon": (losses.SupConLoss, ("temperature",)),
    "triplet_all": (losses.TripletMarginLoss, ("margin",)),
    "triplet_hard": (losses.TripletMarginLoss, ("margin",)),
    "triplet_semihard": (losses.TripletMarginLoss, ("margin",)),
}


def golden_miner(loss: str, meta: dict[str, Any], distance: BaseDistance) -> nn.Module | None:
    """What chose the pairs of a golden file."""
    if loss == "multi_similarity_mined":
        return miners.MultiSimilarityMiner(epsilon=meta["epsilon"], distance=distance)
    if loss == "triplet_hard":
        return miners.BatchHardMiner(distance=distance)
    if loss == "triplet_semihard":
        options = {"margin": meta["margin"], "type_of_triplets": "semihard"}
        return miners.TripletMarginMiner(distance=distance, **options)
    return None


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("name", golden_names("loss_*"))
def test_golden_losses(name):
    meta, arrays = load_golden(name)
    loss_name = name.removeprefix("loss_").split("_tau")[0]
    kind, settings = GOLDEN[loss_name]
    sem_dim, unc_dim = arrays["sem"].shape[1], arrays["unc"].shape[1]
    metric = Metric(meta["tau"], meta["gamma"], meta["form"])
    distance = DISTANCE[meta["form"]](sem_dim, metric=metric, power=meta.get("power", 1))
    options = {k: meta[k] for k in settings}
    if "proxy_sem" in arrays:
        options |= {"num_classes": len(arrays["proxy_sem"]), "embedding_size": sem_dim + unc_dim}
    loss = kind(distance=distance, **options)
    # The golden gradients are those of embeddings as they are; FastAPLoss must not see it sooner.
    distance.normalize_embeddings = False
    leaves = {"": join(arrays["sem"], arrays["unc"]).requires_grad_()}
    if "proxy_sem" in arrays:
        leaves["proxy_"] = loss.proxies
        loss.proxies.data = join(arrays["proxy_sem"], arrays["proxy_unc"])
    mined, miner = None, golden_miner(loss_name, meta, distance)
    if miner is not None:
        mined = miner(leaves[""], arrays["labels"])
        listed = [arrays[f"tuple{k}"] for k in range(len(mined))]
        for found, expected in zip(as_sets(mined), as_sets(listed), strict=True):
            assert found == expected
    value = loss(leaves[""], arrays["labels"], mined)
    assert_equals_in_double("value", value.detach(), arrays["value"])
    value.backward()
    for side, leaf in leaves.items():
        for part, found in zip(("sem", "unc"), split(leaf.grad, sem_dim), strict=True):
            assert_equals_in_double(side + part, found, arrays[f"grad_{side}{part}"])


def as_sets(indices: Any) -> list[set[tuple[int, ...]]]:
    """Triplets, or positive and negative pairs, in any order."""
    size = 3 if len(indices) == 3 else 2
    groups = [indices[k : k + size] for k in range(0, len(indices), size)]
    return [set(zip(*(x.tolist() for x in group), strict=True)) for group in groups]


# ------------------------------------------------------------------------------ the joint embedding


class TwoHeaded(nn.Module):
    def __init__(self):
        super().__init__()
        self.sem, self.unc = nn.Linear(3, DS), nn.Linear(3, DU)

    def forward(self, x, *, double=False):
        sem, unc = self.sem(x), self.unc(x)
        return (sem, 2 * unc) if double else (sem, unc)


def test_join_and_split_undo_each_other():
    sem, unc = torch.randn(4, DS), torch.randn(4, DU)
    joint = join(sem, unc)
    assert all(map(torch.equal, split(joint, DS), (sem, unc)))
    assert all(part.data_ptr() >= joint.data_ptr() for part in split(joint, DS))
    assert all(map(torch.equal, split(joint.T, DS, dim=0), (sem.T, unc.T)))
    assert torch.equal(split(sem, DS)[0], sem)
    # A normalized part is float32 under autocast, beside one that is not.
    assert join(sem, unc.bfloat16()).dtype == torch.float32


def test_joined_returns_what_the_model_returns_and_trains_both_heads():
    model = Joined(TwoHeaded())
    x = torch.randn(6, 3)
    sem, unc = model.model(x, double=True)
    assert torch.equal(model(x, double=True), join(sem, unc))
    loss = losses.TripletMarginLoss(margin=1.0, distance=ours("distance"))
    loss(model(x), torch.tensor([0, 0, 1, 1, 2, 2])).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@each_form
def test_accuracy_calculator_and_match_finder(form):
    x, y = embed(40), embed(30, seed=1)
    labels, labels2 = torch.arange(40) % 4, torch.arange(30) % 4
    scores = eager(form)(x, y)
    best = scores.max(1) if form == "cosine" else scores.min(1)
    expected = (labels2[best.indices] == labels).double().mean()
    for size in (None, 7):
        knn = CustomKNN(ours(form), batch_size=size)
        found = AccuracyCalculator(include=("precision_at_1",), knn_func=knn).get_accuracy(
            x, labels, y, labels2
        )
        assert found["precision_at_1"] == pytest.approx(expected.item())
    threshold = scores.flatten().sort().values[599:601].mean().item()
    finder = MatchFinder(ours(form), threshold)
    matches = scores >= threshold if form == "cosine" else scores <= threshold
    assert np.array_equal(finder.get_matching_pairs(x, y), matches.numpy())
    raw = eager(form).pairwise_distance(x[:30], y)
    matched = (raw >= threshold if form == "cosine" else raw <= threshold).numpy()
    assert np.array_equal(finder.is_match(x[:30], y), matched)


# ----------------------------------------------------------------------------------------- mistakes

JOINT = torch.ones(4, WIDTH)


# what is wrong: (the call, the error, its whole message)
MISTAKES = {
    "a width without uncertainty": (
        lambda: ours("distance")(JOINT[:, :DS]),
        ValueError,
        f"query_emb must be wider than sem_dim = {DS}, [sem | unc], got [4, {DS}]",
    ),
    "a reference without uncertainty": (
        lambda: ours("cosine")(JOINT, JOINT[:, :DS]),
        ValueError,
        f"ref_emb must be wider than sem_dim = {DS}, [sem | unc], got [4, {DS}]",
    ),
    "a pair without uncertainty": (
        lambda: ours("cosine").pairwise_distance(JOINT, JOINT[:, :DS]),
        ValueError,
        f"ref_emb must be wider than sem_dim = {DS}, [sem | unc], got [4, {DS}]",
    ),
    "a width below sem_dim": (
        lambda: ours("distance", metric=Metric.plain())(JOINT[:, :3]),
        ValueError,
        f"query_emb must be at least as wide as sem_dim = {DS}, got [4, 3]",
    ),
    "uncertainties of different widths": (
        lambda: ours("distance")(JOINT, JOINT[:, :-1]),
        ValueError,
        f"unc2 must have shape [4, {DU}] like sem2 and unc [4, {DS}], got [4, {DU - 1}]",
    ),
    "other dtypes": (
        lambda: ours("distance")(JOINT, JOINT.double()),
        TypeError,
        "sem2 must be float32 like sem, got float64",
    ),
    "pairs of different numbers": (
        lambda: ours("distance").pairwise_distance(JOINT, JOINT[:3]),
        ValueError,
        "sem2 must have 4 rows like sem when index is None, got 3",
    ),
    "a cosine form for a distance": (
        lambda: IntrospectiveDistance(DS, metric=Metric.paper("cosine")),
        ValueError,
        "metric must be of form 'distance' for IntrospectiveDistance, got 'cosine'",
    ),
    "a distance for a similarity": (
        lambda: IntrospectiveSimilarity(DS, metric=Metric()),
        ValueError,
        "metric must be of form 'cosine' or 'official' for IntrospectiveSimilarity, got 'distance'",
    ),
    "no metric": (
        lambda: IntrospectiveDistance(DS, metric=5.0),
        TypeError,
        "metric must be an idml_fast.Metric, got float",
    ),
    "sem_dim no integer": (
        lambda: IntrospectiveDistance(7.0),
        TypeError,
        "sem_dim must be an integer, got float",
    ),
    "sem_dim 0": (
        lambda: IntrospectiveSimilarity(0),
        ValueError,
        "sem_dim must be >= 1, got 0",
    ),
    "another norm": (
        lambda: IntrospectiveDistance(DS, p=1),
        ValueError,
        "p must be 2, since the metric's distances are Euclidean, got 1",
    ),
    "an unknown backend": (
        lambda: ours("distance", backend="abacus")(JOINT),
        ValueError,
        None,  # in the words of idml_fast.backend
    ),
    "join no tensor": (
        lambda: join(JOINT, "zero"),
        TypeError,
        "unc must be a torch.Tensor, got str",
    ),
    "join a vector": (
        lambda: join(JOINT[0], JOINT),
        ValueError,
        f"sem must have shape [items, width], got [{WIDTH}]",
    ),
    "join other items": (
        lambda: join(JOINT, JOINT[:3]),
        ValueError,
        f"unc must have shape [4, Du] like sem [4, {WIDTH}], got [3, {WIDTH}]",
    ),
    "split too narrow": (
        lambda: split(JOINT, WIDTH + 1),
        ValueError,
        f"embeddings must be at least as wide as sem_dim = {WIDTH + 1}, got [4, {WIDTH}]",
    ),
    "split no tensor": (
        lambda: split(None, DS),
        TypeError,
        "embeddings must be a torch.Tensor, got None",
    ),
    "a model with one head": (
        lambda: Joined(nn.Identity())(JOINT),
        TypeError,
        "what the model returns must be a pair (sem, unc), got Tensor",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message is None or str(raised.value) == message


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_the_package_does_not_import_pytorch_metric_learning():
    done = python("import sys, idml_fast; print('pytorch_metric_learning' in sys.modules)")
    assert done.stdout == "False\n"


def test_without_pytorch_metric_learning_the_error_says_what_to_install():
    missing = "import sys; sys.modules['pytorch_metric_learning'] = None; "
    done = python(missing + "import idml_fast.interop")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "ImportError: idml_fast.interop needs pytorch-metric-learning: "
        "pip install 'idml_fast[pml]'\n"
    )
