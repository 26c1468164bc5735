// Attention of one head of one sample. Included through foreach_isa.h, once for each instruction set: no include guard.
//
// The rows of the head are packed once, as the operands of small products that stay in the cache; scores of a block of
// queries (in the backward: of keys) against all that they see are in memory only for as long as the block is worked
// on. Every row of a result is written by one task, whatever the number of threads.
#include "exp.h"
#include "pack.h"
#include "small_gemm.h"

// The rows of one sample in a tensor, one head's part of them.
template <class T>
struct Sequence {
  T* first_row;  // of the tensor
  int64_t stride;
  const AttentionSample& sample;

  Sequence(T* first_row, int64_t stride, const AttentionSample& sample)
      : first_row(first_row), stride(stride), sample(sample) {}

  BEIT3_INLINE T* row(int64_t position) const { return first_row + sample.row(position) * stride; }

  // Bring `count` columns of a row into the cache. A head's part of a row is short and that of the next row far away:
  // too much for the processor's own prefetching.
  BEIT3_INLINE void prefetch(int64_t position, int64_t count) const {
    const char* const from = reinterpret_cast<const char*>(row(position));
    for (int64_t at = 0; at < count * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(from + at);
  }
};

constexpr int64_t depth_at_a_time = 64;  // of a long product: so much of a panel stays in the L1 cache
constexpr int64_t most_rows = most_attention_rows;
constexpr float infinity = __builtin_huge_valf();

// Hands out pieces of a buffer, or without one measures it.
struct Arena {
  uintptr_t base;
  int64_t used;

  template <class X>
  X* take(int64_t count) {
    X* const piece = reinterpret_cast<X*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(X)), 64);
    return piece;
  }

  template <class Word>
  Matrix<Word> rows(int64_t count, int64_t words) {
    const int64_t stride = round_up(words, lanes<float>);
    return rows_matrix(take<Word>(count * stride), stride);
  }

  template <class Word>
  Matrix<Word> panels(int64_t depth, int64_t columns) {
    return panels_matrix(take<Word>(depth * round_up(columns, panel_width)), depth);
  }
};

// C = alpha A B, or C += alpha A B, in steps of the depth.
template <class Word>
void multiply_deep(const Matrix<Word>& a, const Matrix<Word>& b, int64_t depth, float alpha, bool accumulate, float* c,
                   int64_t c_stride, int64_t rows, int64_t columns) {
  for (int64_t k = 0; k < depth; k += depth_at_a_time) {
    const int64_t step = depth - k < depth_at_a_time ? depth - k : depth_at_a_time;
    multiply(a.from_column(k), b.from_row(k), step, alpha, accumulate || k > 0, c, c_stride, rows, columns);
  }
}

// A row of a left operand.
BEIT3_INLINE void store_operand(float* to, const F32& value) { store(to, value); }

#ifdef BEIT3_BFLOAT16_DOT
BEIT3_INLINE void store_operand(bfloat16* to, const F32& value) {
  const __m256bh half = _mm512_cvtneps_pbh((__m512)value);
  std::memcpy(to, &half, sizeof(half));
}
#endif

BEIT3_INLINE void fill_row(float* row, int64_t begin, int64_t end, float value) {
  for (int64_t i = begin; i < end; ++i) row[i] = value;
}

BEIT3_INLINE float largest_of(const float* row, int64_t columns) {
  F32 value, largest[2];
  largest[0] = largest[1] = F32{} - infinity;
  int64_t i = 0;
  for (; i + 2 * lanes<float> <= columns; i += 2 * lanes<float>) {
    for (int64_t c = 0; c < 2; ++c) {
      load(value, row + i + c * lanes<float>);
      maximum(largest[c], largest[c], value);
    }
  }
  if (i < columns) {
    load(value, row + i);
    maximum(largest[0], largest[0], value);
  }
  maximum(largest[0], largest[0], largest[1]);
  return largest_lane(largest[0]);
}

// exp(score - shift) of a vector, as part of an operand; added to `sum`.
template <class Element>
BEIT3_INLINE void exponential(const float* scores, float shift, Element* out, F32& sum) {
  F32 value;
  load(value, scores);
  exp(value, value - shift);
  sum += value;
  store_operand(out, value);
}

// The same of a row; returns the sum. `out` may be the scores' own memory.
template <class Element>
BEIT3_INLINE float exponentials(const float* scores, float shift, Element* out, int64_t columns) {
  F32 even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * lanes<float> <= columns; i += 2 * lanes<float>) {
    exponential(scores + i, shift, out + i, even);
    exponential(scores + i + lanes<float>, shift, out + i + lanes<float>, odd);
  }
  if (i < columns) exponential(scores + i, shift, out + i, even);
  return sum_lanes<float>(even + odd);
}

// Head `head` of the sample's queries (part 0), keys (1) or values (2), or of their gradients.
template <class T, class Tensor>
BEIT3_INLINE Sequence<T> part_of(Tensor* tensor, int64_t part, const AttentionCall& call, const AttentionSample& sample,
                                 int64_t head) {
  return {static_cast<T*>(tensor) + (part * call.heads + head) * call.head_dim, 3 * call.heads * call.head_dim, sample};
}

// The same of a tensor of outputs.
template <class T, class Tensor>
BEIT3_INLINE Sequence<T> output_of(Tensor* tensor, const AttentionCall& call, const AttentionSample& sample,
                                   int64_t head) {
  return {static_cast<T*>(tensor) + head * call.head_dim, call.heads * call.head_dim, sample};
}

// A row of results, rounded to the type of the tensor.
template <class T>
BEIT3_INLINE void store_result(T* to, const float* from, float factor, int64_t width) {
  for (int64_t c = 0; c < width; c += lanes<float>) {
    F32 value;
    load(value, from + c);
    value *= factor;
    store_up_to(to + c, value, width - c);
  }
}

// Works on the tasks from `task` to `end`; returns the bytes of memory that this takes, whichever they are.
template <class T>
int64_t attention_forward(const AttentionCall& call, const AttentionTask* task, const AttentionTask* end,
                          void* memory) {
  using Word = word_t<T>;
  const int64_t width = call.head_dim;
  const int64_t words = ceil_div(width, elements<Word>);
  const int64_t most_keys = round_up(call.longest, lanes<float>);
  const int64_t out_columns = round_up(width, lanes<float>);

  Arena arena{reinterpret_cast<uintptr_t>(memory), 0};
  const auto queries = arena.rows<Word>(most_rows, words);
  const auto keys = arena.panels<Word>(words, most_keys);
  const auto values = arena.panels<Word>(most_keys / elements<Word>, width);
  float* const scores = arena.take<float>(most_rows * most_keys);
  // made in the memory of the scores: half of it, where they are bfloat16
  const auto weights = rows_matrix(reinterpret_cast<Word*>(scores), most_keys);
  float* const sums = arena.take<float>(most_rows * out_columns);

  for (const AttentionTask* packed = nullptr; task != end; ++task) {
    const AttentionSample& sample = call.samples[task->sample];
    const int64_t length = sample.length();
    if (packed == nullptr || packed->sample != task->sample || packed->head != task->head) {
      pack_columns(keys, part_of<const T>(call.qkv, 1, call, sample, task->head), 0, length, width);
      pack_pairs(values, part_of<const T>(call.qkv, 2, call, sample, task->head), 0, length,
                 round_up(length, lanes<float>), width);
      packed = task;
    }
    const int64_t rows = round_up(task->count, tile_rows);
    pack_rows(queries, part_of<const T>(call.qkv, 0, call, sample, task->head), task->first, task->count, rows, width);

    const int64_t columns = round_up(call.visible_keys(sample, task->first + task->count - 1), lanes<float>);
    multiply(queries, keys, words, call.scale, false, scores, most_keys, rows, columns);
    float total[most_rows];
    for (int64_t r = 0; r < task->count; ++r) {
      float* const row = scores + r * most_keys;
      const int64_t query = task->first + r;
      if (task->head + 1 < call.heads) {
        for (int64_t part = 0; part < 3; ++part) {
          part_of<const T>(call.qkv, part, call, sample, task->head + 1).prefetch(query, width);
        }
      }
      fill_row(row, call.visible_keys(sample, query), columns, -infinity);
      if (call.forbidden != nullptr) {
        const bool* const forbidden = call.forbidden + query * call.forbidden_size;
        for (int64_t k = 0; k < length; ++k) row[k] = forbidden[k] ? -infinity : row[k];
      }
      const float largest = largest_of(row, columns);
      const float shift = largest == -infinity ? 0 : largest;  // there may be no key at all
      total[r] = exponentials(row, shift, reinterpret_cast<element_t<Word>*>(weights.at(r, 0)), columns);
      if (call.lse != nullptr) call.lse[task->head * call.rows + sample.row(query)] = largest + std::log(total[r]);
    }
    multiply_deep(weights, values, columns / elements<Word>, 1, false, sums, out_columns, rows, out_columns);
    const auto out = output_of<T>(call.out, call, sample, task->head);
    for (int64_t r = 0; r < task->count; ++r) {
      store_result(out.row(task->first + r), sums + r * out_columns, total[r] == 0 ? 0 : 1 / total[r], width);
    }
  }
  return arena.used;
}

// ---- backward ----

// The sum of products of two rows of a head.
template <class T>
BEIT3_INLINE float dot(const T* a, const T* b, int64_t width) {
  F32 sum{}, x, y;
  for (int64_t c = 0; c < width; c += lanes<float>) {
    load_up_to(x, a + c, width - c);
    load_up_to(y, b + c, width - c);
    sum += x * y;
  }
  const F32 total = sum;
  return sum_lanes<float>(total);
}

// Rows of operands: p = exp(score - lse) and ds = p (dp - delta). They may be made in the memory of score and dp.
template <class Element>
BEIT3_INLINE void score_gradients(const float* scores, const float* dp, const float* lse, const float* delta,
                                  Element* p_out, Element* ds_out, int64_t columns) {
  F32 p, ds, value;
  for (int64_t i = 0; i < columns; i += lanes<float>) {
    load(p, scores + i);
    load(value, lse + i);
    exp(p, p - value);
    load(ds, dp + i);
    load(value, delta + i);
    ds = p * (ds - value);
    store_operand(p_out + i, p);
    store_operand(ds_out + i, ds);
  }
}

// The rows of a left operand as a right operand whose depth runs across them.
BEIT3_INLINE Matrix<float> across(const Matrix<float>& rows, const Matrix<float>&, int64_t, int64_t) { return rows; }

#ifdef BEIT3_BFLOAT16_DOT
inline Matrix<bfloat16_pair> across(const Matrix<bfloat16_pair>& rows, const Matrix<bfloat16_pair>& memory,
                                    int64_t count, int64_t columns) {
  for (int64_t r = 0; r < count; r += 2) {
    const bfloat16* const first = reinterpret_cast<const bfloat16*>(rows.at(r, 0));
    const bfloat16* const second = reinterpret_cast<const bfloat16*>(rows.at(r + 1, 0));
    for (int64_t i = 0; i < columns; i += lanes<float>) {
      U32 lower, upper{};
      widen(lower, first + i);
      if (r + 1 < count) widen(upper, second + i);
      lower |= upper << 16;
      std::memcpy(memory.at(r / 2, i), &lower, sizeof(lower));
    }
  }
  return memory;
}
#endif

// As attention_forward. A task is a whole head of a sample; scores are transposed, a block of keys against the queries
// that see it, so that both gradients with keys for rows come from left operands as they are stored.
template <class T>
int64_t attention_backward(const AttentionCall& call, const AttentionTask* task, const AttentionTask* end,
                           void* memory) {
  using Word = word_t<T>;
  using Element = element_t<Word>;
  const int64_t width = call.head_dim;
  const int64_t words = ceil_div(width, elements<Word>);
  const int64_t most_queries = round_up(call.longest, panel_width);
  const int64_t columns = round_up(width, lanes<float>);
  const int64_t width_rows = round_up(width, tile_rows);

  Arena arena{reinterpret_cast<uintptr_t>(memory), 0};
  const auto query_columns = arena.panels<Word>(words, most_queries);
  const auto query_pairs = arena.panels<Word>(most_queries / elements<Word>, width);
  const auto dout_columns = arena.panels<Word>(words, most_queries);
  const auto dout_pairs = arena.panels<Word>(most_queries / elements<Word>, width);
  const auto key_rows = arena.rows<Word>(most_rows, words);
  const auto key_columns = arena.rows<Word>(width_rows, ceil_div(most_rows, elements<Word>));
  const auto value_rows = arena.rows<Word>(most_rows, words);
  const auto ds_across = arena.panels<Word>(most_rows / elements<Word>, most_queries);
  float* const scores = arena.take<float>(most_rows * most_queries);
  float* const dp = arena.take<float>(most_rows * most_queries);
  const auto p = rows_matrix(reinterpret_cast<Word*>(scores), most_queries);
  const auto ds = rows_matrix(reinterpret_cast<Word*>(dp), most_queries);
  float* const lse = arena.take<float>(most_queries);
  float* const delta = arena.take<float>(most_queries);
  float* const dq = arena.take<float>(round_up(width_rows, lanes<float>) * most_queries);  // transposed
  float* const block = arena.take<float>(most_rows * columns);

  for (; task != end; ++task) {
    const AttentionSample& sample = call.samples[task->sample];
    const int64_t length = sample.length();
    const int64_t queries = round_up(length, lanes<float>);
    const auto qkv = [&](int64_t part) { return part_of<const T>(call.qkv, part, call, sample, task->head); };
    const auto dqkv = [&](int64_t part) { return part_of<T>(call.dqkv, part, call, sample, task->head); };
    const auto out = output_of<const T>(call.out, call, sample, task->head);
    const auto dout = output_of<const T>(call.dout, call, sample, task->head);
    pack_columns(query_columns, qkv(0), 0, length, width);
    pack_pairs(query_pairs, qkv(0), 0, length, queries, width);
    pack_columns(dout_columns, dout, 0, length, width);
    pack_pairs(dout_pairs, dout, 0, length, queries, width);
    for (int64_t i = 0; i < length; ++i) {
      const float sum = call.lse[task->head * call.rows + sample.row(i)];
      lse[i] = sum == -infinity ? infinity : sum;  // a query without keys has no weights
      delta[i] = dot(out.row(i), dout.row(i), width);
    }
    fill_row(lse, length, queries, infinity);
    fill_row(delta, length, queries, 0);

    const int64_t step = queries_per_task(length);
    for (int64_t first = 0; first < length; first += step) {
      const int64_t count = step < length - first ? step : length - first;
      const int64_t rows = round_up(count, tile_rows);
      const int64_t begin = call.first_query(sample, first) / panel_width * panel_width;
      const int64_t seen = queries - begin;
      pack_rows(key_rows, qkv(1), first, count, rows, width);
      pack_rows(value_rows, qkv(2), first, count, rows, width);
      pack_pair_columns(key_columns, qkv(1), first, count, width);
      multiply(key_rows, query_columns.from_column(begin), words, call.scale, false, scores, most_queries, rows, seen);
      multiply(value_rows, dout_columns.from_column(begin), words, 1, false, dp, most_queries, rows, seen);
      for (int64_t r = 0; r < count; ++r) {
        float* const row = scores + r * most_queries;
        fill_row(row, 0, call.first_query(sample, first + r) - begin, -infinity);
        fill_row(row, length - begin, seen, -infinity);  // not 0 if the key has a NaN
        if (call.forbidden != nullptr) {
          const bool* const forbidden = call.forbidden + first + r;
          for (int64_t i = 0; i < length; ++i) row[i] = forbidden[i * call.forbidden_size] ? -infinity : row[i];
        }
        score_gradients(row, dp + r * most_queries, lse + begin, delta + begin, reinterpret_cast<Element*>(p.at(r, 0)),
                        reinterpret_cast<Element*>(ds.at(r, 0)), seen);
      }
      const int64_t depth = seen / elements<Word>;
      multiply_deep(p, dout_pairs.from_row(begin / elements<Word>), depth, 1, false, block, columns, rows, columns);
      for (int64_t r = 0; r < count; ++r) store_result(dqkv(2).row(first + r), block + r * columns, 1, width);
      multiply_deep(ds, query_pairs.from_row(begin / elements<Word>), depth, call.scale, false, block, columns, rows,
                    columns);
      for (int64_t r = 0; r < count; ++r) store_result(dqkv(1).row(first + r), block + r * columns, 1, width);
      // the first block is seen by every query
      multiply(key_columns, across(ds, ds_across, count, seen), ceil_div(count, elements<Word>), call.scale, first > 0,
               dq + begin, most_queries, width_rows, seen);
    }

    for (int64_t i = 0; i < length; i += lanes<float>) {
      for (int64_t c = 0; c < width; c += lanes<float>) {
        U32 square[lanes<float>];
        for (int64_t t = 0; t < lanes<float>; ++t)
          std::memcpy(&square[t], dq + (c + t) * most_queries + i, sizeof(U32));
        transpose(square);
        for (int64_t t = 0; t < lanes<float> && i + t < length; ++t) {
          F32 value;
          bit_copy(value, square[t]);
          store_up_to(dqkv(0).row(i + t) + c, value, width - c);
        }
      }
    }
  }
  return arena.used;
}
