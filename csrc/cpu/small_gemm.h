// Products of matrices that lie in the cache: C = alpha A B, or C += A B. Included through foreach_isa.h after pack.h,
// once for each instruction set: no include guard.
//
// A tile of C, six rows by a panel of B, stays in registers: with 32 of them (AVX-512) six rows of four vectors, with
// 16 six rows of two. Each step of the depth loads a row of B's panel and broadcasts six words of A.

constexpr int64_t tile_rows = 6;

BEIT3_INLINE void multiply_add(F32& sum, float a, const F32& b) { sum += a * b; }

#ifdef BEIT3_BFLOAT16_DOT
BEIT3_INLINE void multiply_add(F32& sum, bfloat16_pair a, const U32& b) {
  sum = (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a.bits), (__m512bh)b);
}
#endif

#ifdef BEIT3_INT8_DOT
BEIT3_INLINE void multiply_add(I32& sum, int8_quad a, const U32& b) {
  sum = (I32)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(a.bits), (__m512i)b);
}
#else
BEIT3_INLINE void multiply_add(I32& sum, int8_quad a, const U32& b) {
#pragma GCC unroll 4
  for (int shift = 0; shift < 32; shift += 8) {
    sum += static_cast<int32_t>(a.bits >> shift & 0xff) * ((I32)(b << (24 - shift)) >> 24);
  }
}
#endif

BEIT3_INLINE void to_float(F32& out, const F32& sum) { out = sum; }

BEIT3_INLINE void to_float(F32& out, const I32& sum) { out = __builtin_convertvector(sum, F32); }

// Memory that is needed soon: one address each step, brought into the second-level cache. All at once they would keep
// the products' own loads waiting.
struct Ahead {
  const char* next;
  int64_t step;
};

template <int64_t vectors, class Word>
void multiply_tile(const Word* a, int64_t a_stride, const Word* b, int64_t b_stride, int64_t depth, float alpha,
                   bool accumulate, float* c, int64_t c_stride, Ahead ahead) {
  std::conditional_t<std::is_same_v<Word, int8_quad>, I32, F32> sum[tile_rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(ahead.next, 0, 2);
    ahead.next += ahead.step;
    Words<Word> row[vectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) std::memcpy(&row[v], b + v * lanes<float>, sizeof(row[v]));
#pragma GCC unroll 6
    for (int64_t r = 0; r < tile_rows; ++r) {
      Word left;  // A may be a tensor's own memory, aligned or not
      load_bytes(left, a + r * a_stride);
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) multiply_add(sum[r][v], left, row[v]);
    }
    a += 1;
    b += b_stride;
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) {
      float* const to = c + r * c_stride + v * lanes<float>;
      F32 value;
      to_float(value, sum[r][v]);
      value *= alpha;
      if (accumulate) {
        F32 before;
        load(before, to);
        value += before;
      }
      store(to, value);
    }
  }
}

// The tile of `vectors` vectors, at most panel_vectors.
template <class Word>
auto tile_of(int64_t vectors) {
  if constexpr (panel_vectors == 4) {
    if (vectors == 3) return &multiply_tile<3, Word>;
    if (vectors == 2) return &multiply_tile<2, Word>;
  }
  return vectors == 1 ? &multiply_tile<1, Word> : &multiply_tile<panel_vectors, Word>;
}

// C's rows are a multiple of tile_rows, its columns whole vectors.
template <class Word>
void multiply(const Matrix<Word>& a, const Matrix<Word>& b, int64_t depth, float alpha, bool accumulate, float* c,
              int64_t c_stride, int64_t rows, int64_t columns) {
  for (int64_t n = 0; n < columns; n += panel_width) {
    const auto tile = tile_of<Word>(least(panel_width, columns - n) / lanes<float>);
    for (int64_t r = 0; r < rows; r += tile_rows) {
      tile(a.at(r, 0), a.stride, b.at(0, n), b.stride, depth, alpha, accumulate, c + r * c_stride + n, c_stride,
           {reinterpret_cast<const char*>(b.at(0, n)), 0});
    }
  }
}
