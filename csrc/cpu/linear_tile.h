// A linear layer's products, epilogue included. Included through foreach_isa.h, once for each instruction set: no
// include guard.
#include "exp.h"
#include "gelu.h"
#include "pack.h"
#include "small_gemm.h"

BEIT3_INLINE void multiply_add(F32& sum, const F32& a, const F32& b) { sum += a * b; }

#ifdef BEIT3_BFLOAT16_DOT
BEIT3_INLINE void multiply_add(F32& sum, const U32& a, const U32& b) {
  sum = (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

template <class T>
BEIT3_INLINE void load_words(F32& out, const T* from) {
  load(out, from);
}

BEIT3_INLINE void load_words(U32& out, const bfloat16* from) { load_bytes(out, from); }

// Rows with their type, as pack.h reads them, from column `first` on.
template <class T>
struct TypedRows {
  const RowSource& source;
  int64_t first = 0;

  BEIT3_INLINE const T* row(int64_t r) const { return source.row<T>(r) + first; }
};

// Takes rows `row` and following of C, `columns` columns from `column` on, out of a tile of sums.
template <class T, class Out>
void finish(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* tile) {
  const T* const bias = static_cast<const T*>(p.bias);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = p.out_row(row + r) + column;
    for (int64_t n = 0; n < columns; n += lanes<float>) {
      const int64_t count = columns - n;
      F32 value, other;
      load(value, tile + r * panel_width + n);
      if (p.column_scales != nullptr) {  // of a sum of (128 + a) b, 128 times that of b is too much
        load(other, p.column_scales + p.columns + column + n);
        value -= 128 * other;
        load(other, p.column_scales + column + n);
        value *= other * p.row_scales[row + r];
      }
      if (bias != nullptr) {
        load_up_to(other, bias + column + n, count);
        value += other;
      }
      if (p.pre != nullptr) store_up_to(static_cast<T*>(p.pre) + at + n, value, count);
      if (p.gelu) {
        other = value;
        gelu(value, other);
      }
      if (p.residual != nullptr) {
        load_up_to(other, static_cast<const Out*>(p.residual) + at + n, count);
        value += other;
      }
      store_up_to(static_cast<Out*>(p.out) + at + n, value, count);
    }
  }
}

// Sums of few rows: each word of B is used where it is found, for six rows at a time.
template <class Word, class T>
void multiply_few(const Matrix<Word>& a, const TypedRows<T>& b, int64_t column, int64_t columns, int64_t width,
                  float* tile) {
  constexpr int64_t together = 4;
  constexpr int64_t step = lanes<float> * elements<Word>;
  const int64_t whole = width / step * step;
  for (int64_t n = 0; n < columns; n += together) {
    const T* from[together];
    for (int64_t c = 0; c < together; ++c) from[c] = b.row(column + n + (n + c < columns ? c : 0));
    F32 sum[tile_rows][together] = {};
    const auto add = [&](const Words<Word>(&right)[together], int64_t at) __attribute__((always_inline)) {
#pragma GCC unroll 6
      for (int64_t r = 0; r < tile_rows; ++r) {
        Words<Word> left;
        std::memcpy(&left, a.data + r * a.stride + at / elements<Word>, sizeof(left));
#pragma GCC unroll 4
        for (int64_t c = 0; c < together; ++c) multiply_add(sum[r][c], left, right[c]);
      }
    };
    Words<Word> right[together];
    for (int64_t at = 0; at < whole; at += step) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < together; ++c) {
        __builtin_prefetch(from[c] + together * width + at);  // all of b passes by once: memory is the limit
        load_words(right[c], from[c] + at);
      }
      add(right, at);
    }
    if (whole < width) {
      for (int64_t c = 0; c < together; ++c) {
        words_along(right[c], b, column + n + (n + c < columns ? c : 0), whole / elements<Word>, width);
      }
      add(right, whole);
    }
#pragma GCC unroll 6
    for (int64_t r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < together; ++c) tile[r * panel_width + n + c] = sum_lanes<float>(sum[r][c]);
    }
  }
}

// Rows [row, row + rows) of C's left operand, for a task's `left`.
template <class T>
void pack_left(const Product& p, int64_t row, int64_t rows, void* left) {
  using Word = word_t<T>;
  const Matrix<Word> out = rows_matrix(static_cast<Word*>(left), p.left_stride);
  if (p.a_across) {
    pack_pair_columns(out, TypedRows<T>{p.a, row}, 0, p.depth, rows);
  } else {
    pack_rows(out, TypedRows<T>{p.a}, row, rows, rows, p.depth);
  }
}

// Neighbours along the depth that packed weights keep together.
template <class T>
constexpr int64_t stored_together = std::is_same_v<T, bfloat16> ? 2
                                    : std::is_same_v<T, int8_t> ? 4
                                                                : 1;

// `columns` of C's right operand, which lies across, into a panel as packed weights have it.
template <class T>
void pack_right(const Product& p, int64_t column, int64_t columns, void* panel) {
  constexpr int64_t together = stored_together<T>;
  using Line = std::conditional_t<together == 2, U32, F32>;  // of pairs, or of what a float holds
  constexpr int64_t step = sizeof(Line) / sizeof(T) / together;
  const TypedRows<T> source{p.b, column};
  T* to = static_cast<T*>(panel);
  for (int64_t k = 0; k < p.depth; k += together) {
    for (int64_t n = 0; n < widest_panel; n += step, to += step * together) {
      if constexpr (together == 2) {
        U32 pairs;
        words_across(pairs, source, k, p.depth, n, columns);
        store_bytes(to, pairs);
      } else {
        std::memset(static_cast<void*>(to), 0, sizeof(Line));
        const int64_t count = least(columns - n, step);
        if (count > 0)
          std::memcpy(static_cast<void*>(to), static_cast<const void*>(source.row(k) + n), count * sizeof(T));
      }
    }
  }
}

using U8 = uint8_t __attribute__((vector_size(BEIT3_VECTOR_BYTES / 4)));  // as many lanes as U32

// The same in eight bits: 127 steps to the largest magnitude of a row. NaN or infinity makes all of a row NaN.
template <class T>
void quantize_left(const Product& p, int64_t row, int64_t rows, void* left) {
  for (int64_t r = row; r < row + rows; ++r) {
    const T* const x = p.a.row<T>(r);
    F32 largest{}, nothing{};
    for (int64_t i = 0; i < p.depth; i += lanes<float>) {
      F32 value;
      load_up_to(value, x + i, p.depth - i);
      U32 magnitude;
      bit_copy(magnitude, value);
      bit_copy(value, magnitude & 0x7fffffffu);
      nothing += value * 0;
      largest = value > largest ? value : largest;
    }
    float most = 0;
    for (int64_t i = 0; i < lanes<float>; ++i) most = largest[i] > most ? largest[i] : most;
    const float steps = most > 0 ? 127 / most : 0;
    p.row_scales[r] = most / 127 + sum_lanes<float>(nothing);
    uint8_t* const to = static_cast<uint8_t*>(left) + (r - row) * p.left_stride * 4;
    for (int64_t i = 0; i < p.depth; i += lanes<float>) {
      F32 value;
      load_up_to(value, x + i, p.depth - i);
      value = value * steps + (0x1.8p23f + 128);  // the nearest integer, 128 added, is in the lowest bits
      U32 bits;
      bit_copy(bits, value);
      const U8 bytes = __builtin_convertvector(bits & 0xffu, U8);
      std::memcpy(to + i, &bytes, sizeof(bytes));
    }
  }
}

// Words of the depth that one chain of additions takes: a sum of such sums is more accurate than one chain of all. 128
// words are 3 % slower than 256, and 256 are as accurate as PyTorch's products. Those of int8 are then exact:
// 128 x 4 x 255 x 127 < 2^24.
template <class Word>
constexpr int64_t summed_at_once = std::is_same_v<Word, int8_quad> ? 128 : 256;

// What the columns from `column` on of a stored panel's `depth` rows are as floats.
BEIT3_INLINE void widen_panel(const Matrix<float>& panel, const float16* from, int64_t column, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t n = 0; n < panel_width; n += lanes<float>) {
      F32 value;
      load(value, from + k * widest_panel + column + n);
      store(panel.at(k, n), value);
    }
  }
}

BEIT3_INLINE void widen_panel(const Matrix<float>& panel, const bfloat16* from, int64_t column, int64_t depth) {
  for (int64_t k = 0; k < depth; k += 2) {
    for (int64_t n = 0; n < panel_width; n += lanes<float>) {
      U32 pairs;  // of row k in the lower half of a lane, of row k + 1 in the upper
      std::memcpy(&pairs, from + k * widest_panel + 2 * (column + n), sizeof(pairs));
      const U32 first = pairs << 16, second = pairs & 0xffff0000u;
      std::memcpy(panel.at(k, n), &first, sizeof(first));
      std::memcpy(panel.at(k + 1, n), &second, sizeof(second));
    }
  }
}

// Some of the depth of a panel of C's right operand, and what is needed after it, if that is known.
template <class Word>
struct Right {
  const Word* words;
  int64_t stride;
  const char* next;
  int64_t next_bytes;
};

// Words [begin, end) of the depth of `columns` columns: where they are stored, or brought into `panel`.
template <class T, class Word>
Right<Word> right_operand(const Product& p, const Matrix<Word>& panel, int64_t column, int64_t columns, int64_t begin,
                          int64_t end) {
  using Stored = std::conditional_t<std::is_same_v<Word, int8_quad>, int8_t, T>;
  const int64_t first = begin * elements<Word>, count = least(end * elements<Word>, p.depth) - first;
  Right<Word> right{panel.data, panel_width, reinterpret_cast<const char*>(panel.data), 0};
  if (p.panels != nullptr) {
    const int64_t stored_depth = round_up(p.depth, stored_together<Stored>);
    const Stored* const stored =
        static_cast<const Stored*>(p.panels) + (column / widest_panel * stored_depth + first) * widest_panel;
    right.next_bytes = count * widest_panel * sizeof(Stored);
    right.next = reinterpret_cast<const char*>(stored) + right.next_bytes;
    if constexpr (std::is_same_v<Stored, element_t<Word>>) {
      right.words = reinterpret_cast<const Word*>(stored) + column % widest_panel;
      right.stride = widest_panel;
    } else {
      widen_panel(panel, stored, column % widest_panel, end - begin);
    }
  } else if constexpr (!std::is_same_v<Word, int8_quad>) {
    if (p.b_across) {
      pack_pairs(panel, TypedRows<T>{p.b, column}, first, count, count, columns);
    } else {
      pack_columns(panel, TypedRows<T>{p.b, first}, column, columns, count);
    }
  }
  return right;
}

// C's lines lie apart: they come while its tile is computed.
template <class Out>
BEIT3_INLINE void fetch_out(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  for (int64_t r = row; r < row + rows; ++r) {
    const Out* const out = static_cast<const Out*>(p.out) + p.out_row(r) + column;
    for (int64_t n = 0; n < columns; n += 64 / static_cast<int64_t>(sizeof(Out))) __builtin_prefetch(out + n, 1);
  }
}

// One task; `scratch` has product_scratch(task.rows, depth) bytes.
template <class T, class Out, class Word = word_t<T>>
void product(const ProductTask& task, void* scratch) {
  const Product& p = *task.product;
  const TypedRows<T> source_a{p.a};
  const int64_t depth = ceil_div(p.depth, elements<Word>), block = least(round_up(depth, 2), depth_block);
  const Matrix<Word> panel = panels_matrix(static_cast<Word*>(scratch), block);
  const Matrix<Word> tail = rows_matrix(panel.data + block * panel_width, round_up(depth, lanes<float>));
  float* const sums = reinterpret_cast<float*>(tail.data + tile_rows * tail.stride);

  Matrix<Word> left = rows_matrix(static_cast<Word*>(const_cast<void*>(task.left)), p.left_stride);
  int64_t whole = task.rows;  // rows of `left` in tiles; fewer than a tile are packed behind each other
  if constexpr (!std::is_same_v<Word, int8_quad>) {
    if (task.left == nullptr) {
      left = rows_matrix(reinterpret_cast<Word*>(const_cast<T*>(source_a.row(task.row))), p.a.stride / elements<Word>);
      whole = task.rows / tile_rows * tile_rows;
      pack_rows(tail, source_a, task.row + whole, task.rows - whole, task.rows - whole, p.depth);
    }
  }
  const bool few = p.rows <= few_rows && !p.a_across && !p.b_across && p.panels == nullptr;
  const int64_t tiles = ceil_div(task.rows, tile_rows);
  for (int64_t column = task.column; column < task.column + task.columns; column += panel_width) {
    const int64_t columns = least(panel_width, task.column + task.columns - column);
    const auto multiply = tile_of<Word>(ceil_div(columns, lanes<float>));
    int64_t begin = 0;
    do {  // also where the depth is 0: sums of nothing
      const int64_t end = few ? depth : least(begin + depth_block, depth), steps = tiles * (end - begin);
      Right<Word> right{};
      if (!few) right = right_operand<T>(p, panel, column, columns, begin, end);
      const int64_t ahead_step = steps > 0 ? ceil_div(right.next_bytes, steps) : 0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t r = i * tile_rows, count = least(tile_rows, task.rows - r);
        const Matrix<Word> rows = r < whole ? left.from_row(r) : tail;
        float* const tile = sums + (depth > depth_block ? r * panel_width : 0);
        if (end == depth) fetch_out<Out>(p, task.row + r, count, column, columns);
        if (few) {
          if constexpr (!std::is_same_v<Word, int8_quad>) {
            multiply_few(rows, TypedRows<T>{p.b}, column, columns, p.depth, tile);
          }
        } else {
          int64_t k = begin;
          do {
            const Ahead ahead{right.next + ahead_step * (i * (end - begin) + k - begin), ahead_step};
            multiply(rows.data + k, rows.stride, right.words + (k - begin) * right.stride, right.stride,
                     least(summed_at_once<Word>, end - k), 1.0f, k > 0, tile, panel_width, ahead);
          } while ((k += summed_at_once<Word>) < end);
        }
        if (end == depth) finish<T, Out>(p, task.row + r, count, column, columns, tile);
      }
      begin = end;
    } while (begin < depth);
  }
}

template <class T, class Out>
void quantized_product(const ProductTask& task, void* scratch) {
  product<T, Out, int8_quad>(task, scratch);
}

// out[i] = dy[i] * gelu'(pre[i])
template <class T>
void gelu_gradient(const void* dy, const void* pre, void* out, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes<float>) {
    F32 gradient, x, slope;
    load_up_to(gradient, static_cast<const T*>(dy) + i, count - i);
    load_up_to(x, static_cast<const T*>(pre) + i, count - i);
    gelu_derivative(slope, x);
    store_up_to(static_cast<T*>(out) + i, gradient * slope, count - i);
  }
}

// out[n] = the sum of column n of `rows` rows, for `columns` columns; four sums of every fourth row, so that an
// addition need not wait for the one before it.
template <class T>
void sum_rows(const RowSource& source, int64_t rows, int64_t column, int64_t columns, void* out) {
  for (int64_t n = column; n < column + columns; n += lanes<float>) {
    const int64_t count = column + columns - n;
    F32 sum[4] = {};
    for (int64_t r = 0; r < rows; ++r) {
      F32 value;
      load_up_to(value, source.row<T>(r) + n, count);
      sum[r % 4] += value;
    }
    store_up_to(static_cast<T*>(out) + n, (sum[0] + sum[1]) + (sum[2] + sum[3]), count);
  }
}
