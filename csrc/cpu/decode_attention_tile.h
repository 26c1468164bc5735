// Attention of the new tokens of a sample's beams, one head. Included through foreach_isa.h, once for each instruction
// set: no include guard.
//
// All beams are one block of queries, so the prefix that they share is read once. The keys of the others are among a
// beam's too, and masked: words are few.
#include "attention_tile.h"

// Keys (part 0) or values (1) of a sample's head, as one sequence: the prefix, then beam after beam its words and its
// new tokens.
template <class T>
struct DecodeKeys {
  const DecodeCall& call;
  const AttentionSample& sample;
  int64_t first_slot, column, part;

  DecodeKeys(const DecodeCall& call, int64_t s, int64_t head, int64_t part)
      : call(call), sample(call.samples[s]), first_slot(s * call.beams), column(head * call.head_dim), part(part) {}

  BEIT3_INLINE const T* row(int64_t position) const {
    const int64_t width = call.heads * call.head_dim;
    const int64_t cached = part * width + column;
    if (position < sample.length()) {
      return static_cast<const T*>(call.prefix) + sample.row(position) * 2 * width + cached;
    }
    const int64_t own = position - sample.length();
    const int64_t slot = first_slot + own / call.own();
    const int64_t place = own % call.own();
    if (place < call.length) {
      const int64_t kept = place * call.slots + call.history[place * call.slots + slot];
      return static_cast<const T*>(call.words) + kept * 2 * width + cached;
    }
    return static_cast<const T*>(call.qkv) + (slot * call.tokens + place - call.length) * 3 * width + width + cached;
  }
};

template <class T>
struct DecodeQueries {
  const T* first;
  int64_t stride;

  BEIT3_INLINE const T* row(int64_t position) const { return first + position * stride; }
};

// Works on tasks [task, end), sample after sample and head after head; without memory, returns the bytes that it takes.
template <class T>
int64_t decode_attention(const DecodeCall& call, int64_t task, int64_t end, void* memory) {
  using Word = word_t<T>;
  const int64_t width = call.head_dim;
  const int64_t words = ceil_div(width, elements<Word>);
  const int64_t most_keys = round_up(call.longest + call.beams * call.own(), lanes<float>);
  const int64_t out_columns = round_up(width, lanes<float>);

  Arena arena{reinterpret_cast<uintptr_t>(memory), 0};
  const auto queries = arena.rows<Word>(most_rows, words);
  const auto keys = arena.panels<Word>(words, most_keys);
  const auto values = arena.panels<Word>(most_keys / elements<Word>, width);
  float* const scores = arena.take<float>(most_rows * most_keys);
  const auto weights = rows_matrix(reinterpret_cast<Word*>(scores), most_keys);
  float* const sums = arena.take<float>(most_rows * out_columns);
  if (memory == nullptr) return arena.used;

  for (; task < end; ++task) {
    const int64_t s = task / call.heads, head = task % call.heads;
    const int64_t prefix = call.samples[s].length();
    const int64_t length = prefix + call.beams * call.own();
    const int64_t columns = round_up(length, lanes<float>);
    pack_columns(keys, DecodeKeys<T>(call, s, head, 0), 0, length, width);
    pack_pairs(values, DecodeKeys<T>(call, s, head, 1), 0, length, columns, width);
    const int64_t all = call.beams * call.tokens, row_width = call.heads * width;
    const DecodeQueries<T> source{static_cast<const T*>(call.qkv) + s * all * 3 * row_width + head * width,
                                  3 * row_width};
    T* const out = static_cast<T*>(call.out) + s * all * row_width + head * width;
    for (int64_t first = 0; first < all; first += most_rows) {
      const int64_t count = least(most_rows, all - first);
      const int64_t rows = round_up(count, tile_rows);
      pack_rows(queries, source, first, count, rows, width);
      multiply(queries, keys, words, call.scale, false, scores, most_keys, rows, columns);
      float total[most_rows];
      for (int64_t r = 0; r < count; ++r) {
        float* const row = scores + r * most_keys;
        const int64_t own = prefix + (first + r) / call.tokens * call.own();
        fill_row(row, prefix, own, -infinity);
        fill_row(row, own + call.length + (first + r) % call.tokens + 1, columns, -infinity);
        auto* const weight = reinterpret_cast<element_t<Word>*>(weights.at(r, 0));
        total[r] = exponentials(row, largest_of(row, columns), weight, columns);
      }
      multiply_deep(weights, values, columns / elements<Word>, 1, false, sums, out_columns, rows, out_columns);
      for (int64_t r = 0; r < count; ++r) {
        store_result(out + (first + r) * row_width, sums + r * out_columns, 1 / total[r], width);
      }
    }
  }
  return arena.used;
}
