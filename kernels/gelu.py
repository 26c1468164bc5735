"""The exact (erf) GELU and its derivative, in fp32, without branches: 13 instructions an element, 8 more for both.

``tl.erf`` is libdevice's branching erff, about 40 PTX instructions an element. Here the upper tail of the normal
distribution is one exponential of a polynomial:

    q(a) = 1 - Phi(a) = 2 ** P(a),  a = |x|        gelu(x) = x Phi(x) = max(x, 0) - a q(a)

P is a weighted minimax fit of degree 8 to log2(erfc(a / sqrt 2) / 2) on [0, 5.2] with P(0) = -1 exactly; its leading
coefficient is negative, so q falls to 0 beyond the fit and no clamp is needed. Largest errors in fp32 against
float64, over all x: gelu 0.8e-7 * max(1, |x|), derivative 1.2e-7.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def upper_tail(a):
    """1 - Phi(a) of the standard normal distribution, a >= 0."""
    p = a * -1.5485228459510836e-06 + 2.4448394469800405e-05
    p = p * a + -0.00011794179590651765
    p = p * a + -0.0002944191510323435
    p = p * a + 0.007258477620780468
    p = p * a + -0.052622705698013306
    p = p * a + -0.45917004346847534
    p = p * a + -1.151108980178833
    p = p * a + -1.0
    return tl.exp2(p)


@triton.jit
def gelu(x):
    """x Phi(x), x in fp32."""
    a = tl.abs(x)
    return tl.maximum(x, 0.0) - a * upper_tail(a)


@triton.jit
def gelu_and_derivative(x):
    """(x Phi(x), Phi(x) + x phi(x)), x in fp32; phi is the normal density."""
    a = tl.abs(x)
    q = upper_tail(a)
    density = tl.exp2(a * a * -0.7213475204444817)  # exp(-x^2 / 2)
    below = q - a * density * 0.3989422804014327  # the derivative at -a; at +a it is 1 minus that
    return tl.maximum(x, 0.0) - a * q, tl.where(x >= 0, 1.0 - below, below)
