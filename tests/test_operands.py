"""What all operations have in common: certain items, and a metric that learns tau and gamma."""

import itertools

import pytest
import torch
from conftest import assert_accurate, assert_equals_in_double, draw, draw_upstream, to_double

import idml_fast
from idml_fast import Metric

FORMS = ["distance", "cosine", "official"]
each_form = pytest.mark.parametrize("form", FORMS)
two_sets_and_self = pytest.mark.parametrize("m", [23, None], ids=["two sets", "self"])
each_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ids=["fp32", "fp64", "bf16", "fp16"],
)


def learn(inputs, form, upstream, backend=None, tau=5.0, gamma=0.5):
    """The scores, and the gradients of all inputs, tau and gamma."""
    dtype = torch.promote_types(inputs["sem"].dtype, torch.float32)
    leaves = {
        name: x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x
        for name, x in inputs.items()
    }
    leaves |= {
        name: torch.tensor(value, dtype=dtype, requires_grad=True)
        for name, value in [("tau", tau), ("gamma", gamma)]
    }
    embeddings = {name: leaves[name] for name in inputs}
    metric = Metric(leaves["tau"], leaves["gamma"], form)
    scores = idml_fast.pairwise(**embeddings, metric=metric, backend=backend)
    given = {name: x for name, x in leaves.items() if isinstance(x, torch.Tensor)}
    gradients = torch.autograd.grad(scores, list(given.values()), upstream.to(scores.dtype))
    return {"scores": scores.detach()} | dict(zip(given, gradients, strict=True))


@pytest.mark.usefixtures("small_tiles")
@each_form
@two_sets_and_self
@each_dtype
def test_learned_tau_and_gamma_follow_the_rule(dtype, m, form):
    inputs = draw(37, m, 20, 9, dtype=dtype)
    inputs["sem"][3] = inputs["sem"][5]  # identical items
    upstream = draw_upstream(inputs)
    ours, eager = (learn(inputs, form, upstream, backend) for backend in (None, "reference"))
    truth = learn(to_double(inputs), form, upstream.double(), "reference")
    for name in ("tau", "gamma"):
        # One number is one draw of a rounding error: eager's may be zero by luck. What it sums up
        # is as large as the sum of the terms' sizes.
        terms = len(upstream.flatten()) ** 0.5 * torch.finfo(dtype).eps
        bound = max(2 * abs(eager[name] - truth[name]), terms)
        assert ours[name].dtype == torch.promote_types(dtype, torch.float32)
        assert abs(ours[name] - truth[name]) <= bound
        if dtype == torch.float64:
            assert_equals_in_double(name, ours[name], truth[name])


@each_form
@two_sets_and_self
def test_a_tensor_gives_what_its_number_gives(m, form):
    inputs = draw(37, m, 20, 9, dtype=torch.float32)
    upstream = draw_upstream(inputs)
    learned = learn(inputs, form, upstream)
    fixed = idml_fast.pairwise(**inputs, metric=Metric(5.0, 0.5, form))
    assert torch.equal(learned["scores"], fixed)


@each_form
@two_sets_and_self
@pytest.mark.parametrize("learned", ["tau", "gamma", "both"])
def test_gradcheck_of_tau_and_gamma(learned, m, form):
    inputs = draw(6, m, 4, 3)
    inputs["sem"][1] = inputs["sem"][0]

    def scores(value):
        tau = value if learned in ("tau", "both") else 2.0
        gamma = value / 3 if learned in ("gamma", "both") else 0.5
        return idml_fast.pairwise(**inputs, metric=Metric(tau, gamma, form))

    assert torch.autograd.gradcheck(scores, torch.tensor(2.0, dtype=torch.float64).requires_grad_())


@pytest.mark.usefixtures("small_tiles")
@each_form
@each_dtype
@pytest.mark.parametrize("certain", [("unc",), ("unc2",), ("unc", "unc2")], ids="+".join)
def test_zero_is_an_uncertainty_of_zeros(certain, dtype, form):
    inputs = draw(37, 23, 20, 9, dtype=dtype)
    zeros = inputs | {name: torch.zeros_like(inputs[name]) for name in certain}
    named = inputs | dict.fromkeys(certain, "zero")
    upstream = draw_upstream(inputs)
    ours, eager = learn(named, form, upstream), learn(zeros, form, upstream, "reference")
    truth = learn(to_double(zeros), form, upstream.double(), "reference")
    for name in ours.keys() - {"tau", "gamma"}:
        if dtype == torch.float64:
            assert_equals_in_double(name, ours[name], truth[name])
        else:
            assert_accurate(name, ours[name], eager[name], truth[name], by_row=name == "scores")


@each_form
def test_rows_that_are_certain_against_themselves(form):
    sem = draw(20, None, 8, 5)["sem"]
    metric = Metric(2.0, 0.5, form)
    zeros = torch.zeros(20, 5, dtype=sem.dtype)
    ours = idml_fast.pairwise(sem, "zero", metric=metric)
    torch.testing.assert_close(ours, idml_fast.pairwise(sem, zeros, metric=metric))


@pytest.mark.parametrize("certain", ["unc", "unc2"])
def test_compiled_with_zero_and_a_learned_metric(certain):
    inputs = draw(20, 15, 8, 5, dtype=torch.float32) | {certain: "zero"}
    tau = torch.tensor(4.0, requires_grad=True)

    def total(tau):
        return idml_fast.pairwise(**inputs, metric=Metric(tau)).square().sum()

    (expected,) = torch.autograd.grad(total(tau), tau)
    (found,) = torch.autograd.grad(torch.compile(total, fullgraph=True)(tau), tau)
    torch.testing.assert_close(found, expected)


def test_every_subset_of_learned_and_embeddings():
    inputs = draw(9, 7, 4, 3)
    everything = learn(inputs, "distance", draw_upstream(inputs))
    for chosen in itertools.product([False, True], repeat=3):
        names = ["sem2", "tau", "gamma"]
        leaves = dict(
            zip(names, (inputs["sem2"], torch.tensor(5.0), torch.tensor(0.5)), strict=True)
        )
        for name, wanted in zip(names, chosen, strict=True):
            leaves[name] = leaves[name].double().clone().requires_grad_(wanted)
        if not any(chosen):
            continue
        scores = idml_fast.pairwise(
            **inputs | {"sem2": leaves["sem2"]}, metric=Metric(leaves["tau"], leaves["gamma"])
        )
        scores.backward(draw_upstream(inputs))
        for name, wanted in zip(names, chosen, strict=True):
            assert (leaves[name].grad is not None) == wanted
            if wanted:
                torch.testing.assert_close(leaves[name].grad, everything[name])
