// Vectors as wide as the instruction set has them, in the extension that gcc and clang share. Included through
// foreach_isa.h, once for each instruction set: no include guard.
//
// Vectors go by reference, because by value they would have a calling convention that depends on the instruction set.

using F32 = float __attribute__((vector_size(BEIT3_VECTOR_BYTES)));
using F64 = double __attribute__((vector_size(BEIT3_VECTOR_BYTES)));
using I32 = int32_t __attribute__((vector_size(BEIT3_VECTOR_BYTES)));
using U32 = uint32_t __attribute__((vector_size(BEIT3_VECTOR_BYTES)));
using U16 = uint16_t __attribute__((vector_size(BEIT3_VECTOR_BYTES / 2)));  // as many lanes as U32

template <class A>
using Vector = std::conditional_t<std::is_same_v<A, double>, F64, F32>;

template <class A>
constexpr int64_t lanes = BEIT3_VECTOR_BYTES / sizeof(A);

template <class To, class From>
BEIT3_INLINE void bit_copy(To& to, const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
}

// From and to any address. A typed pointer would promise the alignment of its type, which a tensor need not have.
template <class V>
BEIT3_INLINE void load_bytes(V& out, const void* from) {
  std::memcpy(&out, from, sizeof(out));
}

template <class V>
BEIT3_INLINE void store_bytes(void* to, const V& value) {
  std::memcpy(to, &value, sizeof(value));
}

// each lane of mask is all ones or all zeros
BEIT3_INLINE void select(U32& out, const U32& mask, const U32& yes, const U32& no) {
  out = (mask & yes) | (~mask & no);
}

// ---- 16-bit lanes in memory, 32-bit lanes in a register ----

// The compilers' own code for a conversion from or to half a register goes through both of its halves.
#if BEIT3_VECTOR_BYTES == 64
// The maskz forms: in gcc 12 the plain ones warn of an uninitialised variable of their own.
constexpr __mmask16 all_lanes = 0xffff;

BEIT3_INLINE void widen(U32& out, const void* from) {
  bit_copy(out, _mm512_maskz_cvtepu16_epi32(all_lanes, _mm256_loadu_si256(static_cast<const __m256i*>(from))));
}

BEIT3_INLINE void narrow(void* to, const U32& value) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(all_lanes, (__m512i)value));
}
#elif BEIT3_VECTOR_BYTES == 32
BEIT3_INLINE void widen(U32& out, const void* from) {
  bit_copy(out, _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}

BEIT3_INLINE void narrow(void* to, const U32& value) {
  const __m128i lower = _mm256_castsi256_si128((__m256i)value);
  const __m128i upper = _mm256_extracti128_si256((__m256i)value, 1);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm_packus_epi32(lower, upper));
}
#else
BEIT3_INLINE void widen(U32& out, const void* from) {
  U16 half;
  std::memcpy(&half, from, sizeof(half));
  out = __builtin_convertvector(half, U32);
}

BEIT3_INLINE void narrow(void* to, const U32& value) {
  const U16 half = __builtin_convertvector(value, U16);
  std::memcpy(to, &half, sizeof(half));
}
#endif

// ---- load: as many elements as the vector has lanes, widened to the type of computation ----

BEIT3_INLINE void load(F32& out, const float* from) { load_bytes(out, from); }

BEIT3_INLINE void load(F64& out, const double* from) { load_bytes(out, from); }

BEIT3_INLINE void load(F32& out, const bfloat16* from) {
  U32 bits;
  widen(bits, from);
  bit_copy(out, bits << 16);
}

#if BEIT3_VECTOR_BYTES == 64
BEIT3_INLINE void load(F32& out, const float16* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  bit_copy(out, _mm512_maskz_cvtph_ps(all_lanes, half));
}
#elif BEIT3_VECTOR_BYTES == 32
BEIT3_INLINE void load(F32& out, const float16* from) {
  bit_copy(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
#else
BEIT3_INLINE void load(F32& out, const float16* from) {
  U32 wide;
  widen(wide, from);
  const U32 sign = (wide & 0x8000u) << 16;
  const U32 magnitude = wide & 0x7fffu;
  constexpr uint32_t rebias = (127 - 15) << 23;
  const U32 normal = (magnitude << 13) + rebias;
  // Through an integer conversion, so that the result is right also where subnormals are flushed to zero.
  U32 subnormal;
  bit_copy(subnormal, __builtin_convertvector((I32)magnitude, F32) * 0x1p-24f);
  U32 bits;
  select(bits, (U32)(magnitude >= 0x7c00u), normal + rebias, normal);  // infinity and NaN
  select(bits, (U32)(magnitude < 0x0400u), subnormal, bits);
  bit_copy(out, bits | sign);
}
#endif

// ---- store: rounded to nearest, ties to even, as PyTorch's own conversions are ----

BEIT3_INLINE void store(float* to, const F32& value) { store_bytes(to, value); }

BEIT3_INLINE void store(double* to, const F64& value) { store_bytes(to, value); }

BEIT3_INLINE void store(bfloat16* to, const F32& value) {
  U32 bits;
  bit_copy(bits, value);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  U32 result;
  select(result, (U32)(value != value), U32{} + 0x7fc0u, rounded);  // NaN would round to infinity, or wrap to zero
  narrow(to, result);
}

#if BEIT3_VECTOR_BYTES == 64
BEIT3_INLINE void store(float16* to, const F32& value) {
  const __m256i half = _mm512_maskz_cvtps_ph(all_lanes, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
}
#elif BEIT3_VECTOR_BYTES == 32
BEIT3_INLINE void store(float16* to, const F32& value) {
  const __m128i half = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
}
#else
BEIT3_INLINE void store(float16* to, const F32& value) {
  U32 bits;
  bit_copy(bits, value);
  const U32 magnitude = bits & 0x7fffffffu;
  const U32 sign = (bits >> 16) & 0x8000u;
  // A carry out of the mantissa moves into the exponent: that is how 65520 becomes infinity.
  constexpr uint32_t rebias = static_cast<uint32_t>(15 - 127) << 23;
  const U32 normal = (magnitude + rebias + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves the subnormal's mantissa, correctly rounded, in the low bits of the sum.
  F32 shifted;
  bit_copy(shifted, magnitude);
  shifted += 0.5f;
  U32 subnormal;
  bit_copy(subnormal, shifted);
  subnormal -= 0x3f000000u;
  U32 result;
  select(result, (U32)(magnitude < 0x38800000u), subnormal, normal);         // below 2^-14
  select(result, (U32)(magnitude >= 0x47800000u), U32{} + 0x7c00u, result);  // from 2^16 on
  select(result, (U32)(value != value), U32{} + 0x7e00u, result);
  narrow(to, result | sign);
}
#endif

// ---- the end of a row: the first `count` lanes; memory past them is not touched, lanes past them are zero ----

template <class V, class T>
BEIT3_INLINE void load_partial(V& out, const T* from, int64_t count) {
  T whole[lanes<accumulate_t<T>>] = {};
  std::memcpy(whole, static_cast<const void*>(from), count * sizeof(T));
  load(out, whole);
}

template <class V, class T>
BEIT3_INLINE void store_partial(T* to, const V& value, int64_t count) {
  T whole[lanes<accumulate_t<T>>];
  store(whole, value);
  std::memcpy(static_cast<void*>(to), whole, count * sizeof(T));
}

// ---- as many of the `count` elements that are left as the vector has lanes ----

template <class V, class T>
BEIT3_INLINE void load_up_to(V& out, const T* from, int64_t count) {
  if (count >= lanes<accumulate_t<T>>) {
    load(out, from);
  } else if (count > 0) {
    load_partial(out, from, count);
  } else {
    out = V{};
  }
}

template <class V, class T>
BEIT3_INLINE void store_up_to(T* to, const V& value, int64_t count) {
  if (count >= lanes<accumulate_t<T>>) {
    store(to, value);
  } else {
    store_partial(to, value, count);
  }
}

// ---- the sum over all lanes ----

template <class A, int64_t bytes>
struct Narrow {
  using type [[gnu::vector_size(bytes)]] = A;
};

// Halves by memcpy become register moves; element by element they would go through the stack, and wait for it.
template <class A, class V>
BEIT3_INLINE A sum_lanes(const V& value) {
  if constexpr (sizeof(V) > 16) {
    typename Narrow<A, sizeof(V) / 2>::type lower, upper;
    std::memcpy(&lower, &value, sizeof(lower));
    std::memcpy(&upper, reinterpret_cast<const char*>(&value) + sizeof(lower), sizeof(upper));
    lower += upper;
    return sum_lanes<A>(lower);
  } else if constexpr (sizeof(A) == 8) {
    return value[0] + value[1];
  } else {
    return (value[0] + value[2]) + (value[1] + value[3]);
  }
}

// ---- the largest lane, but for NaN, which it may or may not be ----

BEIT3_INLINE float largest_lane(const F32& value) {
  float largest = value[0];
  for (int64_t i = 1; i < lanes<float>; ++i) largest = value[i] > largest ? value[i] : largest;
  return largest;
}

BEIT3_INLINE void maximum(F32& out, const F32& a, const F32& b) { out = a > b ? a : b; }
