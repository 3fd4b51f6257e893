"""The introspective softmax: its logits, its loss, and that it learns to classify."""

import pytest
import torch
from conftest import assert_equals_in_double, draw
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from idml_fast import Metric, losses, pairwise
from idml_fast.losses import IntrospectiveSoftmax


def problem(metric=None, **options):
    """(head, sem, unc, labels) of nine items and four classes, in float64."""
    torch.manual_seed(0)
    metric = Metric(1.0, 0.5, "cosine") if metric is None else metric
    head = IntrospectiveSoftmax(4, 6, 3, metric=metric, **options).double()
    sem, unc = (draw(9, None, 6, 3)[name].requires_grad_() for name in ("sem", "unc"))
    return head, sem, unc, torch.arange(9) % 4


@pytest.mark.parametrize("proxy_unc", ["zero", "learned"])
@pytest.mark.parametrize("metric", [Metric(1.0, 0.5, "cosine"), Metric.plain("cosine")], ids=str)
def test_the_loss_is_the_cross_entropy_of_the_logits(metric, proxy_unc):
    head, sem, unc, labels = problem(metric, proxy_unc=proxy_unc)
    leaves = [sem, head.proxies]
    if metric.reads_unc:
        leaves += [unc, *([head.proxies_unc] if proxy_unc == "learned" else [])]
    found = head(sem, unc, labels)
    expected = cross_entropy(head.logits(sem, unc), labels)
    assert_equals_in_double("loss", found, expected.detach())
    for x, y in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert_equals_in_double("gradient", x, y)


def test_logits_in_training_are_weakened():
    """Equation by equation: x = 1 - (1 - z) exp(-r), the class being certain."""
    head, sem, unc, _ = problem()
    directions = normalize(head.proxies)
    z = cosine_similarity(sem[:, None], directions, dim=2)
    r = (unc.norm(dim=1)[:, None] + 0.5) / (sem[:, None] - directions).norm(dim=2)
    assert_equals_in_double(
        "logits", head.logits(sem, unc), 16 * (1 - (1 - z) * (-r).exp()).detach()
    )


def test_logits_in_evaluation_are_plain():
    head, sem, unc, _ = problem()
    z = cosine_similarity(sem[:, None], head.proxies, dim=2).detach()
    head.eval()
    assert_equals_in_double("logits", head.logits(sem), 16 * z)
    assert torch.equal(head.logits(sem, unc), head.logits(sem))


def test_a_certain_item_and_a_large_tau_are_the_plain_softmax():
    head, sem, unc, labels = problem(Metric(1e12, 0.0, "cosine"))
    plain = problem(Metric.plain("cosine"))[0]
    assert_equals_in_double("loss", head(sem, unc, labels), plain(sem, None, labels).detach())


def test_an_uncertain_item_learns_more_slowly():
    head, sem, unc, labels = problem(softmax_scale=1.0)
    slow, fast = (
        torch.autograd.grad(head(sem, scale * unc, labels), sem)[0].norm(dim=1)
        for scale in (3.0, 0.0)
    )
    assert (slow < fast).all()


def test_items_further_on_are_items():
    head, sem, unc, labels = problem()
    apart = head(sem[:5], unc[:5], labels[:5], sem[5:], unc[5:], labels[5:])
    assert torch.equal(apart, head(sem, unc, labels))


def test_scores_are_those_of_pairwise():
    head, sem, unc, labels = problem()
    proxies = normalize(head.proxies)
    scores = 16 * pairwise(sem, unc, proxies, "zero", metric=head.metric)
    found = losses.introspective_softmax_loss(sem, unc, labels, proxies=proxies, metric=head.metric)
    assert_equals_in_double("loss", found, cross_entropy(scores, labels).detach())


@pytest.mark.parametrize("metric", [Metric.paper("cosine"), Metric.plain("cosine")], ids=str)
def test_it_learns_to_classify(metric):
    torch.manual_seed(0)
    labels = torch.arange(60) % 4
    items = torch.randn(4, 10)[labels] + 0.3 * torch.randn(60, 10)
    sem, unc = torch.nn.Linear(10, 6), torch.nn.Linear(10, 3)
    head = IntrospectiveSoftmax(4, 6, metric=metric)
    parameters = [*sem.parameters(), *unc.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        head(normalize(sem(items)), unc(items), labels).backward()
        optimizer.step()
    right = head.eval().logits(normalize(sem(items))).argmax(1) == labels
    assert right.float().mean() > 0.95
