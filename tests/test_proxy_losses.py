"""The losses with proxies: golden values, gradients, edges."""

import pytest
import torch
from conftest import assert_accurate, assert_equals_in_double, draw, golden_names, load_golden

from idml_fast import Metric, backend, pairwise
from idml_fast.losses import ProxyAnchorLoss, ProxyNCALoss, proxy_anchor_loss, proxy_nca_loss

RENAMED = {"proxies": "proxy_sem", "proxies_unc": "proxy_unc"}
MODULES = {proxy_anchor_loss: ProxyAnchorLoss, proxy_nca_loss: ProxyNCALoss}


def golden_case(name, dtype=torch.float64):
    """(function, its settings, inputs by argument name, labels, golden by argument name)."""
    meta, arrays = load_golden(name)
    if name.startswith("official"):
        metric = Metric.official()
        assert (metric.tau, metric.gamma) == (meta["tau"], meta["gamma"])
        names = {k: k for k in ("sem", "unc", "proxies")}
    else:
        metric = Metric(meta["tau"], meta["gamma"], meta["form"])
        names = {k: RENAMED.get(k, k) for k in ("sem", "unc", "proxies", "proxies_unc")}
    inputs = {k: arrays[v].to(dtype) for k, v in names.items()}
    golden = {k: arrays[f"grad_{v}"] for k, v in names.items()} | {"value": arrays["value"]}
    function = proxy_nca_loss if "nca" in name else proxy_anchor_loss
    settings = {k: meta[k] for k in ("margin", "alpha", "softmax_scale", "power") if k in meta}
    return function, settings | {"metric": metric}, inputs, arrays["labels"], golden


def loss_and_gradients(function, settings, inputs, labels):
    leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}
    value = function(labels=labels, **leaves, **settings)
    value.backward()
    return {"value": value.detach(), **{k: x.grad for k, x in leaves.items()}}


def by_eager_scores(monkeypatch, *arguments):
    """The same loss on the row statistics of the reference."""
    with monkeypatch.context() as patch:
        patch.setattr(backend, "choose", lambda *_: "reference")
        return loss_and_gradients(*arguments)


GOLDEN_LOSSES = [*golden_names("loss_proxy_*"), *golden_names("official_*")]


@pytest.mark.parametrize("name", GOLDEN_LOSSES)
def test_golden_in_double(name, monkeypatch):
    *case, golden = golden_case(name)
    for found in (loss_and_gradients(*case), by_eager_scores(monkeypatch, *case)):
        assert found.keys() == golden.keys()
        for what, x in found.items():
            assert_equals_in_double(what, x, golden[what])


def float_ours_and_eager(name, monkeypatch):
    """Ours and eager in float32, and the truth for the same inputs."""
    function, settings, inputs, labels, _ = golden_case(name, torch.float32)
    ours = loss_and_gradients(function, settings, inputs, labels)
    eager = by_eager_scores(monkeypatch, function, settings, inputs, labels)
    doubles = {k: x.double() for k, x in inputs.items()}
    return ours, eager, by_eager_scores(monkeypatch, function, settings, doubles, labels)


@pytest.mark.parametrize("name", GOLDEN_LOSSES)
def test_golden_gradients_in_float(name, monkeypatch):
    ours, eager, truth = float_ours_and_eager(name, monkeypatch)
    for what in ours.keys() - {"value"}:
        assert_accurate(what, ours[what], eager[what], truth[what])


def test_golden_values_in_float(monkeypatch):
    # One number is one draw of a rounding error: the losses are the sample for one another.
    values = [
        [found["value"] / truth["value"] for found in (ours, eager, truth)]
        for ours, eager, truth in (
            float_ours_and_eager(name, monkeypatch) for name in GOLDEN_LOSSES
        )
    ]
    ours, eager, truth = (torch.stack(x) for x in zip(*values, strict=True))
    assert_accurate("values", ours, eager, truth)


@pytest.mark.parametrize("name", GOLDEN_LOSSES)
def test_the_module_gives_the_golden_values_too(name):
    function, settings, inputs, labels, golden = golden_case(name)
    classes, sem_dim = inputs["proxies"].shape
    learned = "proxies_unc" in inputs
    loss = MODULES[function](
        classes,
        sem_dim,
        inputs["unc"].shape[1],
        proxy_unc="learned" if learned else "zero",
        normalize_proxies=False,
        **settings,
    ).double()
    loss.load_state_dict({k: x for k, x in inputs.items() if k.startswith("proxies")})
    sem, unc = (inputs[k].clone().requires_grad_() for k in ("sem", "unc"))
    value = loss(sem, unc, labels)
    value.backward()
    assert_equals_in_double("value", value, golden["value"])
    assert_equals_in_double("sem", sem.grad, golden["sem"])
    assert_equals_in_double("unc", unc.grad, golden["unc"])
    for what, parameter in loss.named_parameters():
        assert_equals_in_double(what, parameter.grad, golden[what])
    assert dict(loss.named_parameters()).keys() == golden.keys() - {"value", "sem", "unc"}


# ----------------------------------------------------------------------------------- the definition


def by_loops(scores, labels, margin, alpha):  # [C, N], [N]
    """Proxy-Anchor, literally."""
    pull, push, present = 0.0, 0.0, 0
    for c, row in enumerate(scores):
        positives = [torch.exp(-alpha * (x - margin)) for x in row[labels == c]]
        negatives = [torch.exp(alpha * (x + margin)) for x in row[labels != c]]
        present += bool(positives)
        pull = pull + torch.log(1 + sum(positives, torch.zeros((), dtype=scores.dtype)))
        push = push + torch.log(1 + sum(negatives, torch.zeros((), dtype=scores.dtype)))
    return pull / max(present, 1) + push / len(scores)


LABELS = {
    "all classes": [0, 1, 2, 3, 0, 1, 2, 3, 2],
    "some classes without an item": [1, 1, 3, 3, 3, 1, 1, 3, 1],
    "one class": [2] * 9,
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("metric", [Metric.paper("cosine"), Metric.plain("cosine")], ids=str)
def test_against_the_definition(metric, labels):
    labels = torch.tensor(labels)
    sem, unc, proxies, proxies_unc = draw(9, 4, 6, 3).values()
    found = proxy_anchor_loss(
        sem,
        unc,
        labels,
        proxies=proxies,
        proxies_unc=proxies_unc,
        metric=metric,
        margin=0.2,
        alpha=16.0,
    )
    scores = pairwise(proxies, proxies_unc, sem, unc, metric=metric)
    assert_equals_in_double("loss", found, by_loops(scores, labels, 0.2, 16.0))


def test_gradients_of_all_inputs():
    labels = torch.tensor(LABELS["some classes without an item"])
    inputs = [x.requires_grad_() for x in draw(9, 4, 6, 3).values()]

    def loss(sem, unc, proxies, proxies_unc):
        return proxy_anchor_loss(
            sem, unc, labels, proxies=proxies, proxies_unc=proxies_unc, alpha=4.0
        )

    assert torch.autograd.gradcheck(loss, inputs)


def test_absent_proxy_uncertainties_are_zeros():
    labels = torch.tensor(LABELS["all classes"])
    sem, unc, proxies, proxies_unc = draw(9, 4, 6, 3).values()
    absent = proxy_anchor_loss(sem, unc, labels, proxies=proxies)
    assert torch.equal(
        absent, proxy_anchor_loss(sem, unc, labels, proxies=proxies, proxies_unc=0 * proxies_unc)
    )


def test_a_plain_metric_needs_no_uncertainties():
    labels = torch.tensor(LABELS["all classes"])
    sem, unc, proxies, _ = draw(9, 4, 6, 3).values()
    metric = Metric.plain("cosine")
    without = proxy_anchor_loss(sem, None, labels, proxies=proxies, metric=metric)
    assert torch.equal(without, proxy_anchor_loss(sem, unc, labels, proxies=proxies, metric=metric))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_exponents_stay_finite(dtype):
    """alpha (x + margin) of 300 overflows a naive exp."""
    labels = torch.tensor(LABELS["all classes"])
    inputs = [x.requires_grad_() for x in draw(9, 4, 6, 3, dtype=dtype).values()]
    sem, unc, proxies, proxies_unc = inputs
    loss = proxy_anchor_loss(
        sem, unc, labels, proxies=proxies, proxies_unc=proxies_unc, alpha=300.0
    )
    assert loss > 100
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss, inputs))


# --------------------------------------------------------------------------------------- the module


def test_proxies_are_normalised_unless_told_otherwise():
    labels = torch.tensor(LABELS["all classes"])
    sem, unc, _, _ = draw(9, 4, 6, 3, dtype=torch.float32).values()
    loss = ProxyAnchorLoss(4, 6)
    raw = ProxyAnchorLoss(4, 6, normalize_proxies=False)
    raw.load_state_dict(loss.state_dict())
    with torch.no_grad():
        raw.proxies /= raw.proxies.norm(dim=1, keepdim=True)
    torch.testing.assert_close(loss(sem, unc, labels), raw(sem, unc, labels), rtol=1e-6, atol=0)


def test_parameters():
    torch.manual_seed(0)
    zero, learned = ProxyAnchorLoss(4, 600), ProxyAnchorLoss(4, 600, 5, proxy_unc="learned")
    assert {k: tuple(x.shape) for k, x in zero.named_parameters()} == {"proxies": (4, 600)}
    shapes = {k: tuple(x.shape) for k, x in learned.named_parameters()}
    assert shapes == {"proxies": (4, 600), "proxies_unc": (4, 5)}
    assert zero.proxies_unc is None
    assert ProxyAnchorLoss(4, 6, proxy_unc="learned").proxies_unc.shape == (4, 6)
    assert zero.proxies.norm(dim=1).min() > 0


def test_repr_names_the_settings():
    metric = Metric(2.0, 0.5, "cosine")
    shown = repr(ProxyAnchorLoss(4, 6, metric=metric, margin=0.25, alpha=16.0))
    assert shown == f"ProxyAnchorLoss(4, 6, margin=0.25, alpha=16.0, metric={metric})"


def test_a_few_steps_lower_it():
    torch.manual_seed(0)
    labels = torch.arange(32) % 4
    sem = torch.nn.functional.normalize(torch.randn(32, 6)).requires_grad_()
    unc = torch.randn(32, 3, requires_grad=True)
    loss = ProxyAnchorLoss(4, 6, 3, proxy_unc="learned")
    optimizer = torch.optim.SGD([sem, unc, *loss.parameters()], lr=0.05)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(sem, unc, labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


def test_items_of_a_memory_bank_are_items():
    labels = torch.tensor(LABELS["all classes"])
    sem, unc, proxies, _ = draw(9, 4, 6, 3).values()
    for function in (proxy_anchor_loss, proxy_nca_loss):
        metric = Metric(1.0, 0.5, "cosine")
        together = function(sem, unc, labels, proxies=proxies, metric=metric)
        columns = sem[5:], unc[5:], labels[5:]
        apart = function(sem[:5], unc[:5], labels[:5], *columns, proxies=proxies, metric=metric)
        assert torch.equal(together, apart)


def test_a_label_without_a_proxy_is_an_error_in_the_bank_too():
    sem, unc, proxies, _ = draw(9, 4, 6, 3).values()
    labels = torch.tensor(LABELS["all classes"])
    with pytest.raises(ValueError, match=r"^labels must be in \[0, 4\), got values from 0 to 7"):
        proxy_nca_loss(sem, unc, labels, sem, unc, labels + 4, proxies=proxies)
