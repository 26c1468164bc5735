// What attention.cpp and its kernels agree on; knows nothing of torch.
#pragma once

#include <cstdint>
#include <vector>

namespace beit3_fast {

enum class AttentionMask { full, captioning, causal };

// One sample: positions of its virtual sequence, vision before text, and the rows they lie in.
struct AttentionSample {
  int32_t vision_start, vision_length, text_start, text_length;

  int64_t length() const { return int64_t{vision_length} + text_length; }
  int64_t row(int64_t position) const {
    return position < vision_length ? vision_start + position : text_start + position - vision_length;
  }
};

// A call of the op. All rows are dense: qkv and dqkv are (rows, 3, heads, head_dim), out and dout (rows, heads,
// head_dim), lse (heads, rows).
struct AttentionCall {
  const AttentionSample* samples;
  int64_t rows, heads, head_dim;
  int64_t longest;  // positions of the longest sample
  AttentionMask mask;
  const bool* forbidden;  // (forbidden_size, forbidden_size) of query and key, in place of a mask; or null
  int64_t forbidden_size;
  float scale;
  const void* qkv;
  void* out;         // an input of the backward
  float* lse;        // an input of the backward; null in a forward that keeps nothing
  const void* dout;  // backward only
  void* dqkv;        // backward only

  // A query sees the keys at [0, visible_keys): every named mask is a prefix that never shrinks from query to query.
  int64_t visible_keys(const AttentionSample& sample, int64_t query) const {
    if (forbidden != nullptr || mask == AttentionMask::full) return sample.length();
    return mask == AttentionMask::captioning && query < sample.vision_length ? sample.vision_length : query + 1;
  }

  // So the queries that see a key are those from here on.
  int64_t first_query(const AttentionSample& sample, int64_t key) const {
    if (forbidden != nullptr || mask == AttentionMask::full) return 0;
    return mask == AttentionMask::captioning && key < sample.vision_length ? 0 : key;
  }
};

// Work that one thread does in one go: in a forward some queries of a sample's head, in a backward all of it.
struct AttentionTask {
  int64_t sample, head;
  int64_t first, count;  // queries
  int64_t cost;          // of this task and all before it
};

constexpr int64_t most_attention_rows = 48;  // of a block: whole tiles of six

// Queries of a task: the more, the less often keys and values are read; but their scores should stay in the L2 cache.
inline int64_t queries_per_task(int64_t length) {
  constexpr int64_t least = 12, scores = 96 * 1024;
  const int64_t fitting = scores / length / 6 * 6;
  return fitting > most_attention_rows ? most_attention_rows : fitting < least ? least : fitting;
}

inline std::vector<AttentionTask> attention_tasks(const AttentionCall& call, int64_t batch, bool backward) {
  std::vector<AttentionTask> tasks;
  int64_t cost = 0;
  for (int64_t s = 0; s < batch; ++s) {
    const int64_t length = call.samples[s].length();
    if (length == 0) continue;
    const int64_t step = backward ? length : queries_per_task(length);
    for (int64_t head = 0; head < call.heads; ++head) {
      for (int64_t first = 0; first < length; first += step) {
        const int64_t count = step < length - first ? step : length - first;
        cost += count * call.visible_keys(call.samples[s], first + count - 1);
        tasks.push_back({s, head, first, count, cost});
      }
    }
  }
  return tasks;
}

}  // namespace beit3_fast
