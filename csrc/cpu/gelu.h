// The exact (erf) GELU and its derivative, without branches. Included through foreach_isa.h after exp.h, once for each
// instruction set: no include guard.
//
// The upper tail of the normal distribution is one exponential of a polynomial,
//
//   q(a) = 1 - Phi(a) = 2^P(a), a = |x|        gelu(x) = x Phi(x) = max(x, 0) - a q(a)
//
// with P fitted as kernels/gelu.py tells. Largest error against float64: 0.8e-7 max(1, |x|).

BEIT3_INLINE void absolute(F32& out, const F32& x) {
  U32 bits;
  bit_copy(bits, x);
  bit_copy(out, bits & 0x7fffffffu);
}

BEIT3_INLINE void upper_tail(F32& q, const F32& a) {
  F32 p = a * -1.5485228459510836e-06f + 2.4448394469800405e-05f;
  p = p * a + -0.00011794179590651765f;
  p = p * a + -0.0002944191510323435f;
  p = p * a + 0.007258477620780468f;
  p = p * a + -0.052622705698013306f;
  p = p * a + -0.45917004346847534f;
  p = p * a + -1.151108980178833f;
  p = p * a + -1.0f;
  exp2(q, p);
}

BEIT3_INLINE void gelu(F32& out, const F32& x) {
  F32 a, q, positive;
  absolute(a, x);
  upper_tail(q, a);
  maximum(positive, x, F32{});
  out = positive - a * q;
}

// Phi(x) + x phi(x)
BEIT3_INLINE void gelu_derivative(F32& out, const F32& x) {
  F32 a, q, density;
  absolute(a, x);
  upper_tail(q, a);
  exp2(density, a * a * -0.7213475204444817f);              // exp(-x^2 / 2)
  const F32 below = q - a * density * 0.3989422804014327f;  // the derivative at -a
  out = x >= 0.0f ? 1.0f - below : below;
}
