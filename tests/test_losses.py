"""The losses: golden values, our own definitions, gradients, edges, what they promise."""

import copy
import inspect
import math

import pytest
import torch
from conftest import (
    assert_accurate,
    assert_equals_in_double,
    draw,
    golden_names,
    in_eager_pytorch,
    load_golden,
)
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import idml_fast
from idml_fast import DistanceWeighted, MemoryBank, Metric, losses, nearest, pairwise

# Every loss that has no proxies, and every way to mine: how to make it.
LOSSES = {
    "contrastive": losses.ContrastiveLoss,
    "fast_ap": losses.FastAPLoss,
    "margin": losses.MarginLoss,
    "margin_drawn": lambda **options: losses.MarginLoss(sampling="distance_weighted", **options),
    "margin_learned": lambda **options: losses.MarginLoss(
        learn_beta=True, num_classes=6, **options
    ),
    "multi_similarity": losses.MultiSimilarityLoss,
    "multi_similarity_mined": lambda **options: losses.MultiSimilarityLoss(
        **{"epsilon": 0.1} | options
    ),
    "nca": losses.NCALoss,
    "npairs": losses.NPairsLoss,
    "ntxent": losses.NTXentLoss,
    "supcon": losses.SupConLoss,
    "triplet_all": losses.TripletMarginLoss,
    "triplet_hard": lambda **options: losses.TripletMarginLoss(mining="hard", **options),
    "triplet_semihard": lambda **options: losses.TripletMarginLoss(mining="semihard", **options),
    "triplet_semihard_all": lambda **options: losses.TripletMarginLoss(
        mining="semihard_all", **options
    ),
}
WITH_PROXIES = {
    "proxy_anchor": lambda: losses.ProxyAnchorLoss(6, 8, 3),
    "proxy_anchor_learned": lambda: losses.ProxyAnchorLoss(6, 8, 3, proxy_unc="learned"),
    "proxy_nca": lambda: losses.ProxyNCALoss(6, 8, 3),
    "softmax": lambda: losses.IntrospectiveSoftmax(6, 8, 3),
}
ALL = LOSSES | WITH_PROXIES
# These list pairs, whose number depends on the labels.
DATA_DEPENDENT = {
    "margin_drawn",
    "npairs",
    "triplet_all",
    "triplet_semihard",
    "triplet_semihard_all",
}


def batch(n=24, dtype=torch.float64, seed=0):
    """Items of six classes: sem (of length 1), unc and labels."""
    drawn = draw(n, None, 8, 3, seed=seed)
    labels = torch.randint(6, (n,), generator=torch.Generator().manual_seed(seed))
    return normalize(drawn["sem"]).to(dtype), drawn["unc"].to(dtype), labels


def evaluate(loss, sem, unc, labels, *columns, seed=0):
    """The value, and the gradients of the embeddings and of the parameters."""
    leaves = {"sem": sem, "unc": unc}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    torch.manual_seed(seed)
    value = loss(leaves["sem"], leaves["unc"], labels, *columns)
    leaves |= dict(loss.named_parameters())
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    assert all(x is not None for x in gradients)
    return {"value": value.detach()} | dict(zip(leaves, gradients, strict=True))


def eager(*arguments, **options):
    """`evaluate` with the operations in eager PyTorch."""
    with in_eager_pytorch():
        return evaluate(*arguments, **options)


# ------------------------------------------------------------------------------------ golden values


GOLDEN = [name for name in golden_names("loss_*") if "proxy" not in name]


def golden_case(name, dtype=torch.float64):
    """(loss, sem, unc, labels, golden by name)."""
    meta, arrays = load_golden(name)
    name = name.removeprefix("loss_").split("_tau")[0]
    # The file that says "semihard" takes every semi-hard triplet.
    make = LOSSES["triplet_semihard_all" if name == "triplet_semihard" else name]
    settings = "pos_margin neg_margin num_bins margin beta alpha base epsilon softmax_scale"
    options = {k: meta[k] for k in [*settings.split(), "temperature"] if k in meta}
    loss = make(metric=Metric(meta["tau"], meta["gamma"], meta["form"]), **options)
    golden = {"value": arrays["value"], "sem": arrays["grad_sem"], "unc": arrays["grad_unc"]}
    return loss, arrays["sem"].to(dtype), arrays["unc"].to(dtype), arrays["labels"], golden


@pytest.mark.parametrize("tiles", ["whole", "small"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_in_double(name, tiles, request):
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    *case, golden = golden_case(name)
    found = evaluate(*case)
    assert found.keys() == golden.keys()
    for what, x in found.items():
        assert_equals_in_double(what, x, golden[what])


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_in_double_by_the_reference(name):
    *case, golden = golden_case(name)
    for what, x in eager(*case).items():
        assert_equals_in_double(what, x, golden[what])


def in_float(name, dtype=torch.float32):
    """Ours and eager in ``dtype``, and the truth for the same inputs."""
    loss, sem, unc, labels, _ = golden_case(name, dtype)
    truth = eager(loss, sem.double(), unc.double(), labels)
    return evaluate(loss, sem, unc, labels), eager(loss, sem, unc, labels), truth


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_gradients_in_float(name):
    ours, by_eager, truth = in_float(name)
    for what in ("sem", "unc"):
        assert_accurate(what, ours[what], by_eager[what], truth[what])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_golden_values_in_float(dtype):
    # One number is one draw of a rounding error: the losses are the sample for one another.
    found = [in_float(name, dtype) for name in GOLDEN]
    ours, by_eager, truth = (
        torch.stack([x["value"] / case[2]["value"] for x, case in zip(kind, found, strict=True)])
        for kind in zip(*found, strict=True)
    )
    assert_accurate("values", ours, by_eager, truth)


# ------------------------------------------------------------------------------ our own definitions


@pytest.mark.parametrize("m", [None, 17], ids=["itself", "columns"])
@pytest.mark.parametrize("form", ["distance", "cosine"])
def test_semihard_takes_the_closest_that_is_farther(form, m):
    sem, unc, labels = batch()
    columns = () if m is None else batch(m, seed=1)
    metric = Metric(1.0, 0.5, form)
    scores = pairwise(sem, unc, *columns[:2], metric=metric)
    labels2 = labels if m is None else columns[2]
    terms = []
    for i, row in enumerate(scores):
        for p in range(len(row)):
            if labels2[p] != labels[i] or (m is None and p == i):
                continue
            far = metric.sign * (row - row[p])
            far = far[(labels2 != labels[i]) & (far > 0)]
            if len(far) and 0.3 - far.min() > 0:
                terms.append(0.3 - far.min())
    loss = losses.TripletMarginLoss(margin=0.3, mining="semihard", metric=metric)
    assert len(terms) > 20
    assert_equals_in_double("loss", loss(sem, unc, labels, *columns), torch.stack(terms).mean())


@pytest.mark.parametrize("m", [None, 17], ids=["itself", "columns"])
def test_margin_draws_a_negative_for_every_positive(m):
    sem, unc, labels = batch()
    columns = () if m is None else batch(m, seed=1)
    sem2, labels2 = (sem, labels) if m is None else (columns[0], columns[2])
    same = labels[:, None] == labels2
    if m is None:
        same.fill_diagonal_(False)
    metric = Metric(1.0, 0.5)
    beta = torch.linspace(0.5, 0.8, 6, dtype=torch.float64)
    torch.manual_seed(3)
    _, drawn = nearest(
        sem,
        None,
        *(() if m is None else (sem2,)),
        k=int(same.sum(1).max()),
        metric=Metric.plain(),
        labels=labels,
        labels2=None if m is None else labels2,
        where="different",
        sample=DistanceWeighted(),
    )
    scores = pairwise(sem, unc, *columns[:2], metric=metric)
    terms = []
    for i, row in enumerate(scores):
        negatives = [j for j in drawn[i, : same[i].sum()] if j >= 0]
        if negatives:
            terms += [0.1 + x - beta[labels[i]] for x in row[same[i]]]
            terms += [0.1 + beta[labels[i]] - row[j] for j in negatives]
    terms = torch.stack(terms)
    terms = terms[terms > 0]
    assert len(terms) > 20
    loss = losses.MarginLoss(margin=0.1, sampling="distance_weighted", metric=metric)
    loss.beta = beta
    torch.manual_seed(3)
    assert_equals_in_double("loss", loss(sem, unc, labels, *columns), terms.mean())


@pytest.mark.parametrize("name", ALL)
def test_gradients(name):
    loss = ALL[name]().double()
    sem, unc, labels = batch(14)
    sem2, unc2, labels2 = batch(9, seed=1)
    inputs = [x.requires_grad_() for x in (sem, unc, sem2, unc2)]

    def value(sem, unc, sem2, unc2, *parameters):
        torch.manual_seed(0)
        return loss(sem, unc, labels, sem2, unc2, labels2)

    assert torch.autograd.gradcheck(value, [*inputs, *loss.parameters()])


@pytest.mark.parametrize("name", ALL)
def test_columns_without_a_gradient_are_those_of_a_memory_bank(name):
    loss = ALL[name]().double()
    sem, unc, labels = batch()
    old = [batch(7, seed=seed) for seed in (1, 2)]
    bank = MemoryBank(100, 8, 3, dtype=torch.float64)
    for items in old:
        bank.add(*items)
    found = evaluate(loss, sem, unc, labels, *bank.columns)
    columns = [torch.cat(x) for x in zip(*old, strict=True)]
    for what, x in evaluate(loss, sem, unc, labels, *columns).items():
        assert torch.equal(found[what], x), what


# -------------------------------------------------------------------------------------------- edges


NOTHING = {
    "no items": (batch(0), ()),
    "one item": (batch(1), ()),
    "no columns": (batch(), batch(0)),
}


def is_zero(found):
    return all(not x.any() for x in found.values())


@pytest.mark.parametrize("items, columns", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_compare(name, items, columns):
    assert is_zero(evaluate(LOSSES[name]().double(), *items, *columns))


@pytest.mark.parametrize("name", WITH_PROXIES)
def test_no_items(name):
    assert is_zero(evaluate(WITH_PROXIES[name]().double(), *batch(0)))


NEED_BOTH = {name for name in LOSSES if name.startswith(("triplet", "margin"))} | {"supcon"}
NEED_POSITIVES = NEED_BOTH | {"fast_ap", "nca", "npairs", "ntxent", "multi_similarity_mined"}
NEED_NEGATIVES = NEED_BOTH | {"npairs", "ntxent", "nca", "multi_similarity_mined"}


@pytest.mark.parametrize("name", LOSSES)
def test_no_positive_pair(name):
    sem, unc, _ = batch(6)
    found = evaluate(LOSSES[name]().double(), sem, unc, torch.arange(6))
    assert is_zero(found) == (name in NEED_POSITIVES)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("name", LOSSES)
def test_no_negative_pair(name):
    sem, unc, _ = batch(6)
    found = evaluate(LOSSES[name]().double(), sem, unc, torch.full((6,), 2))
    if name == "fast_ap":  # the sum of a histogram over the number of columns, up to rounding
        assert all(x.abs().max() < 1e-12 for x in found.values())
        return
    assert is_zero(found) == (name in NEED_NEGATIVES)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_identical_items(name, dtype):
    """All distances are 0, as of a collapsed network."""
    sem, unc, labels = batch()
    found = evaluate(ALL[name]().to(dtype), sem[:1].expand(24, 8).to(dtype), unc.to(dtype), labels)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("name", ALL)
def test_a_nan_comes_out(name):
    sem, unc, labels = batch()
    sem[3] = math.nan
    assert ALL[name]().double()(sem, unc, labels).isnan()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_labels_of_any_integer_dtype(name, dtype):
    loss = ALL[name]().double()
    sem, unc, labels = batch()
    columns = batch(9, seed=1)
    expected = evaluate(loss, sem, unc, labels, *columns)
    found = evaluate(loss, sem, unc, labels.to(dtype), *columns)
    assert all(torch.equal(found[what], x) for what, x in expected.items())


# ----------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("name", ALL)
def test_repeats_give_the_same_bits(name, threads):
    loss = ALL[name]()
    items = batch(200, torch.float32)
    first = evaluate(loss, *items)
    for _ in range(3):
        again = evaluate(loss, *items)
        assert all(torch.equal(again[what], x) for what, x in first.items())


@pytest.mark.parametrize("name", ALL)
def test_compiled(name):
    loss = ALL[name]().double()
    items = batch()
    fullgraph = name not in DATA_DEPENDENT
    torch._dynamo.reset()  # the losses share their forward, which it compiles a few times only
    compiled = torch.compile(loss, fullgraph=fullgraph, backend="aot_eager")
    expected, found = evaluate(loss, *items), evaluate(compiled, *items)
    for (what, x), y in zip(expected.items(), found.values(), strict=True):
        assert_equals_in_double(what, y, x)


def autocast(loss):
    def call(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*arguments)

    call.named_parameters = loss.named_parameters
    return call


def test_autocast_gives_float32_losses_by_the_rule():
    torch.manual_seed(0)
    values = []
    for make in ALL.values():
        loss = make()
        # Such that the cast changes nothing, and the truth is the same problem.
        items = [x.bfloat16().float() if x.is_floating_point() else x for x in batch()]
        truth = eager(copy.deepcopy(loss).double(), *map(wide, items))
        ours, by_eager = evaluate(autocast(loss), *items), eager(autocast(loss), *items)
        assert ours["value"].dtype == torch.float32
        assert all(x.dtype == torch.float32 for x in ours.values())
        values.append([x["value"] / truth["value"] for x in (ours, by_eager, truth)])
    ours, by_eager, truth = (torch.stack(x) for x in zip(*values, strict=True))
    assert_accurate("values", ours, by_eager, truth)


def wide(x):
    return x.double() if x.is_floating_point() else x


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.sem, self.unc = torch.nn.Linear(10, 8), torch.nn.Linear(10, 3)

    def forward(self, images):
        return normalize(self.sem(images)), self.unc(images)


def trained(make, dtype):
    """The parameters of a small network and of its loss after 32 steps."""
    torch.manual_seed(0)
    network, loss = Network(), make()
    images, labels = torch.randn(96, 10), torch.randint(6, (96,))
    network, loss, images = network.to(dtype), loss.to(dtype), images.to(dtype)
    parameters = [*network.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
    for step in range(32):
        chosen = slice(24 * (step % 4), 24 * (step % 4) + 24)
        optimizer.zero_grad()
        loss(*network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return torch.cat([x.detach().flatten() for x in parameters])


@pytest.mark.parametrize("name", ALL)
def test_training_ends_in_the_parameters_of_the_eager_loss(name):
    make = ALL[name]
    ours = {dtype: trained(make, dtype) for dtype in (torch.float64, torch.float32)}
    with in_eager_pytorch():
        by_eager = {dtype: trained(make, dtype) for dtype in (torch.float64, torch.float32)}
    assert_equals_in_double("parameters", ours[torch.float64], by_eager[torch.float64])
    assert_accurate(
        "parameters",
        ours[torch.float32],
        by_eager[torch.float32],
        by_eager[torch.float64],
    )


# --------------------------------------------------------------------------------------- the module


@pytest.mark.parametrize("name", LOSSES)
def test_a_module_is_its_function(name):
    loss = LOSSES[name]()
    items = batch(dtype=torch.float32)
    torch.manual_seed(0)
    value = loss(*items)
    torch.manual_seed(0)
    assert torch.equal(value, type(loss)._function(*items, **loss.settings()))


def test_print_shows_the_settings():
    metric = Metric(2.0, 0.5, "cosine")
    shown = repr(losses.NTXentLoss(temperature=0.2, metric=metric))
    assert shown == f"NTXentLoss(temperature=0.2, metric={metric})"


def test_help_shows_the_settings():
    signature = inspect.signature(losses.ContrastiveLoss)
    assert list(signature.parameters) == ["pos_margin", "neg_margin", "metric"]
    assert signature.parameters["neg_margin"].default == 1.0
    shown = list(inspect.signature(losses.ntxent_loss).parameters)
    assert shown == ["sem", "unc", "labels", "sem2", "unc2", "labels2", "temperature", "metric"]
    shown = list(inspect.signature(losses.ProxyNCALoss).parameters)
    assert shown[:3] == ["num_classes", "sem_dim", "unc_dim"]
    assert "softmax_scale" in shown
    assert "proxies" not in shown


def test_a_number_does_not_lose_digits_in_a_double_loss():
    loss = losses.MarginLoss(beta=0.7, metric=Metric.plain()).double()
    assert loss.beta == 0.7
    assert losses.MarginLoss(beta=0.7, num_classes=3, learn_beta=True).beta.shape == (3,)


@pytest.mark.parametrize("margin", ["all", "distance_weighted"])
def test_a_boundary_of_each_class_learns(margin):
    loss = losses.MarginLoss(num_classes=6, learn_beta=True, sampling=margin).double()
    sem, unc, labels = batch()
    labels = labels % 3
    gradient = evaluate(loss, sem, unc, labels)["beta"]
    assert gradient[:3].all()
    assert not gradient[3:].any()


@pytest.mark.parametrize("name", LOSSES)
def test_memory_does_not_hold_the_pairs(name):
    """Far fewer bytes than the N x N scores: 4000 x 4000 in float32 are 64 MB."""
    loss = LOSSES[name]()
    sem, unc, _ = batch(4000, torch.float32)
    labels = torch.arange(4000) // 4
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            for x in found if isinstance(found, (tuple, list)) else [found]:
                if isinstance(x, torch.Tensor):
                    sizes.append(x.numel() * x.element_size())
            return found

    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(idml_fast.backend, "workspace", 0)
        if name == "margin_learned":  # one class each, of six
            loss = losses.MarginLoss(learn_beta=True, num_classes=1000)
        loss(sem.requires_grad_(), unc, labels).backward()
    # Embeddings are the largest of what is left, and the statistics of each positive.
    assert 0 < max(sizes) < 4000 * 100 * 4
