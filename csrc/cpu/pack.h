// Operands of a matrix product, gathered from the rows of a sample. Included through foreach_isa.h, once for each
// instruction set: no include guard.
//
// A word is what one multiply-add of a lane takes from an operand: a float, or two bfloat16 that are neighbours along
// the depth of the product. Depth runs along the width of a row (q k^T) or across rows (p v), so words are gathered
// from one row or from two.

#if BEIT3_VECTOR_BYTES == 64
constexpr int64_t panel_vectors = 4;
#else
constexpr int64_t panel_vectors = 2;
#endif
constexpr int64_t panel_width = panel_vectors * lanes<float>;

// What products of T are made of: bfloat16 pairs where the processor multiplies them, floats elsewhere.
#ifdef BEIT3_BFLOAT16_DOT
template <class T>
using word_t = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16_pair, float>;
#else
template <class T>
using word_t = float;
#endif

template <class Word>
using element_t = std::conditional_t<std::is_same_v<Word, float>, float,
                                     std::conditional_t<std::is_same_v<Word, int8_quad>, int8_t, bfloat16>>;

template <class Word>
constexpr int64_t elements = sizeof(Word) / sizeof(element_t<Word>);

template <class Word>
using Words = std::conditional_t<std::is_same_v<Word, float>, F32, U32>;

BEIT3_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

BEIT3_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

BEIT3_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Words in panels of panel_width columns: within a panel row after row, one panel after the other. A left operand is
// stored row after row instead, which is the same with `panel` = panel_width.
template <class Word>
struct Matrix {
  Word* data;
  int64_t stride;  // from row to row
  int64_t panel;   // from panel to panel

  BEIT3_INLINE Word* at(int64_t row, int64_t column) const {
    return data + column / panel_width * panel + row * stride + column % panel_width;
  }
  Matrix from_row(int64_t row) const { return {data + row * stride, stride, panel}; }
  Matrix from_column(int64_t column) const { return {at(0, column), stride, panel}; }  // whole panels
};

template <class Word>
Matrix<Word> rows_matrix(Word* data, int64_t stride) {
  return {data, stride, panel_width};
}

template <class Word>
Matrix<Word> panels_matrix(Word* data, int64_t depth) {
  return {data, panel_width, depth * panel_width};
}

// ---- gathering a vector of words; what lies outside is zero ----

// words `at` and following of a row
template <class Source>
BEIT3_INLINE void words_along(F32& out, const Source& source, int64_t position, int64_t at, int64_t width) {
  load_up_to(out, source.row(position) + at, width - at);
}

template <class Source>
BEIT3_INLINE void words_along(U32& out, const Source& source, int64_t position, int64_t at, int64_t width) {
  const int64_t count = width - 2 * at;
  if (count >= 2 * lanes<float>) {
    load_bytes(out, source.row(position) + 2 * at);
  } else {
    out = U32{};
    if (count > 0) std::memcpy(&out, static_cast<const void*>(source.row(position) + 2 * at), count * sizeof(bfloat16));
  }
}

// columns `at` and following of `elements` rows
template <class Source>
BEIT3_INLINE void words_across(F32& out, const Source& source, int64_t position, int64_t, int64_t at, int64_t width) {
  words_along(out, source, position, at, width);
}

template <class Source>
BEIT3_INLINE void words_across(U32& out, const Source& source, int64_t position, int64_t end, int64_t at,
                               int64_t width) {
  F32 first, second{};  // widened, a bfloat16 is the upper half of the lane
  load_up_to(first, source.row(position) + at, width - at);
  if (position + 1 < end) load_up_to(second, source.row(position + 1) + at, width - at);
  out = ((U32)first >> 16) | (U32)second;
}

// ---- transposition of a square of words ----

// even lanes from the front (`half` 0) or back half of a, odd lanes from that of b
BEIT3_INLINE void interleave(U32& out, const U32& a, const U32& b, int64_t half) {
#if defined(__clang__)
  for (int64_t i = 0; i < lanes<float>; ++i) out[i] = (i % 2 ? b : a)[half * lanes<float> / 2 + i / 2];
#else
  I32 order;
  for (int64_t i = 0; i < lanes<float>; ++i) order[i] = half * lanes<float> / 2 + i / 2 + i % 2 * lanes<float>;
  out = __builtin_shuffle(a, b, order);
#endif
}

BEIT3_INLINE void transpose(U32 (&square)[lanes<float>]) {
  U32 next[lanes<float>];
#pragma GCC unroll 4
  for (int64_t step = 1; step < lanes<float>; step *= 2) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes<float>; ++i) {
      interleave(next[i], square[i / 2], square[i / 2 + lanes<float> / 2], i % 2);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes<float>; ++i) square[i] = next[i];
  }
}

// ---- the four forms of an operand ----

// Row i of `out` holds the words of position first + i, along its width. Rows from `count` to `padded` are zeros.
template <class Word, class Source>
void pack_rows(const Matrix<Word>& out, const Source& source, int64_t first, int64_t count, int64_t padded,
               int64_t width) {
  for (int64_t i = 0; i < padded; ++i) {
    for (int64_t w = 0; w * elements<Word> < width; w += lanes<float>) {
      Words<Word> words{};
      if (i < count) words_along(words, source, first + i, w, width);
      std::memcpy(out.at(i, w), &words, sizeof(words));
    }
  }
}

// The transpose: row w holds word w of every position. Columns from `count` to the next whole vector are zeros.
template <class Word, class Source>
void pack_columns(const Matrix<Word>& out, const Source& source, int64_t first, int64_t count, int64_t width) {
  constexpr int64_t ahead = 64;
  const int64_t depth = ceil_div(width, elements<Word>);
  for (int64_t i = 0; i < count; i += lanes<float>) {
    for (int64_t w = 0; w < depth; w += lanes<float>) {
      U32 square[lanes<float>];
      for (int64_t t = 0; t < lanes<float>; ++t) {
        Words<Word> words{};
        if (i + t < count) {
          // sixteen rows at once are more than the processor fetches ahead by itself
          __builtin_prefetch(source.row(first + i + t) + (w + ahead) * elements<Word>);
          words_along(words, source, first + i + t, w, width);
        }
        bit_copy(square[t], words);
      }
      transpose(square);
      for (int64_t t = 0; t < lanes<float> && w + t < depth; ++t) {
        std::memcpy(out.at(w + t, i), &square[t], sizeof(U32));
      }
    }
  }
}

// Row r holds columns 0 .. width of the positions that make up word r. Rows up to `padded` positions are zeros.
template <class Word, class Source>
void pack_pairs(const Matrix<Word>& out, const Source& source, int64_t first, int64_t count, int64_t padded,
                int64_t width) {
  constexpr int64_t ahead = 16;
  for (int64_t i = 0; i < padded; i += elements<Word>) {
    // rows lie apart, so the processor fetches none of them ahead by itself
    for (int64_t r = i + ahead; r < least(i + ahead + elements<Word>, count); ++r) {
      const char* const row = reinterpret_cast<const char*>(source.row(first + r));
      for (int64_t at = 0; at < width * static_cast<int64_t>(sizeof(*source.row(0))); at += 64)
        __builtin_prefetch(row + at);
    }
    for (int64_t n = 0; n < width; n += lanes<float>) {
      Words<Word> words{};
      if (i < count) words_across(words, source, first + i, first + count, n, width);
      std::memcpy(out.at(i / elements<Word>, n), &words, sizeof(words));
    }
  }
}

// Its transpose: row n holds column n of all positions. Words past `count` positions are zeros.
template <class Word, class Source>
void pack_pair_columns(const Matrix<Word>& out, const Source& source, int64_t first, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; i += lanes<float> * elements<Word>) {
    for (int64_t n = 0; n < width; n += lanes<float>) {
      U32 square[lanes<float>];
      for (int64_t t = 0; t < lanes<float>; ++t) {
        const int64_t position = i + t * elements<Word>;
        Words<Word> words{};
        if (position < count) words_across(words, source, first + position, first + count, n, width);
        bit_copy(square[t], words);
      }
      transpose(square);
      for (int64_t t = 0; t < lanes<float> && n + t < width; ++t) {
        std::memcpy(out.at(n + t, i / elements<Word>), &square[t], sizeof(U32));
      }
    }
  }
}
