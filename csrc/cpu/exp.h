// e^x, within about one unit in the last place. Included through foreach_isa.h, once for each instruction set: no
// include guard.

// x is at most 88. Below -87, where the result would be subnormal, it is zero; NaN stays NaN.
BEIT3_INLINE void exp(F32& out, const F32& x) {
  constexpr float to_integer = 0x1.8p23f;  // a sum with it is rounded to an integer, kept in its low bits
  const F32 shifted = x * 1.44269504088896341f + to_integer;
  const F32 n = shifted - to_integer;
  // x - n log(2), in two steps because the first product is exact
  F32 f = x - n * 0.693359375f;
  f = f - n * -2.12194440e-4f;
  // Cephes expf (S. L. Moshier)
  F32 p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  U32 exponent, bits;
  bit_copy(exponent, shifted);
  bit_copy(bits, p);
  bits += exponent << 23;
  bit_copy(p, bits);
  out = x < -87.0f ? F32{} : p;
}

// 2^x, likewise; x is at most 127, below -126 the result is zero.
BEIT3_INLINE void exp2(F32& out, const F32& x) {
  constexpr float to_integer = 0x1.8p23f;
  const F32 shifted = x + to_integer;
  const F32 f = x - (shifted - to_integer);                    // in [-1/2, 1/2], exactly
  F32 p = f * 0.0001535336188319500f + 0.001339887440266574f;  // Cephes exp2f
  p = p * f + 0.009618437357674640f;
  p = p * f + 0.05550332471162809f;
  p = p * f + 0.2402264791363012f;
  p = p * f + 0.6931472028550421f;
  p = p * f + 1.0f;
  U32 exponent, bits;
  bit_copy(exponent, shifted);
  bit_copy(bits, p);
  bits += exponent << 23;
  bit_copy(p, bits);
  out = x < -126.0f ? F32{} : p;
}
