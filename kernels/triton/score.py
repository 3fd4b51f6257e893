"""The score of a pair and its derivatives, in Triton: the twin of csrc/score.h, in float32.

    alpha = ||s_i - s_j||   beta = ||u_i + u_j||   versine = 1 - cos(s_i, s_j)

A metric is a tuple: 1 / tau and gamma, and the tensor [tau, gamma] in their place if they learn.
None are for a conventional metric, where 1 / tau is 0.
"""

import triton
import triton.language as tl

# The smallest normal float32: a square below it counts as 0.
TINY = tl.constexpr(2.0**-126)
# Larger r stay finite, so that exp(-r) * r is 0 and not NaN.
HUGE = tl.constexpr(1e30)


@triton.jit
def inverse_root(square):
    """``1 / sqrt(square)``, 0 for 0; NaN stays NaN."""
    return tl.where(square < TINY, 0.0, tl.rsqrt(square))


@triton.jit
def parameters(metric):
    """``1 / tau`` and ``gamma``."""
    inverse_tau, gamma, learned = metric
    if learned is not None:
        inverse_tau = 1 / tl.load(learned).to(tl.float32)
        gamma = tl.load(learned + 1).to(tl.float32)
    return inverse_tau, gamma


@triton.jit
def fade(inverse_alpha, beta2, metric, FORM: tl.constexpr):
    """r and exp(-r), and what r is made of: ``1 / beta``, beta (beta^2 in the official form), 1 /
    alpha (its square)."""
    inverse_beta = inverse_root(beta2)
    uncertainty = beta2
    inverse_length = inverse_alpha * inverse_alpha
    if FORM != "official":
        uncertainty = beta2 * inverse_beta
        inverse_length = inverse_alpha
    if metric[0] is None:
        r = tl.zeros_like(inverse_alpha)
        decay = r + 1
    else:
        inverse_tau, gamma = parameters(metric)
        # An infinite uncertainty must not come out as a score: inf - inf.
        above = (uncertainty + gamma + (uncertainty - uncertainty)) * inverse_tau
        r = above * inverse_length
        r = tl.where(r > HUGE, HUGE, r)
        decay = tl.exp(-r)
    return r, decay, inverse_beta, uncertainty, inverse_length


@triton.jit
def score(alpha2, beta2, versine, metric, FORM: tl.constexpr):
    """The score of pairs."""
    # Identical items have alpha and versine 0, so that their r does not matter.
    inverse_alpha = inverse_root(alpha2)
    decay = fade(inverse_alpha, beta2, metric, FORM)[1]
    if FORM == "distance":
        return alpha2 * inverse_alpha * decay
    else:
        return 1 - versine * decay


@triton.jit
def weights(alpha2, beta2, versine, inverse_row, inverse_col, metric, FORM: tl.constexpr):
    """What a pair's gradients are made of, for an upstream gradient of one.

    ``product``, ``row``, ``col``, ``sum``, ``of_gamma`` and ``uncertainty``::

        grad s_i += row s_i + product s_j     grad u_i += sum (u_i + u_j)
        grad s_j += col s_j + product s_i     grad u_j += sum (u_i + u_j)
        grad gamma += of_gamma                grad tau -= of_gamma (uncertainty + gamma) / tau

    ``inverse_row`` and ``inverse_col`` are ``1 / ||s||``, read by the cosine forms only.
    """
    inverse_alpha = inverse_root(alpha2)
    r, decay, inverse_beta, uncertainty, inverse_length = fade(inverse_alpha, beta2, metric, FORM)
    decay = tl.where(alpha2 < TINY, 0.0, decay)
    inverse_tau = 0.0
    if metric[0] is not None:
        inverse_tau = parameters(metric)[0]
    if FORM == "distance":
        row = decay * (1 + r) * inverse_alpha
        col = row
        product = -row
        of_gamma = -decay * inverse_tau
    else:
        pull = versine * decay
        a = -pull * r * inverse_alpha * inverse_alpha
        if FORM == "official":
            a = 2 * a
        along = decay * (1 - versine)  # the part of dC/dcos that only changes a vector's length
        row = a - along * inverse_row * inverse_row
        col = a - along * inverse_col * inverse_col
        product = decay * inverse_row * inverse_col - a
        of_gamma = pull * inverse_tau * inverse_length
    if FORM == "official":
        sum = tl.where(beta2 == 0, 0.0, 2 * of_gamma)
    else:
        sum = of_gamma * inverse_beta
    return product, row, col, sum, of_gamma, uncertainty
