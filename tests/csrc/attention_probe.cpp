// Attention and decoding attention, for test_attention.py and test_decode_attention.py.
#include "decode_attention.h"
#include "probe.h"
#define BEIT3_KERNEL "decode_attention_tile.h"
#include "foreach_isa.h"

using namespace beit3_fast;

extern "C" {

int attention(int isa, int dtype, const void* samples, int64_t batch, int64_t rows, int64_t heads, int64_t head_dim,
              int mask, const bool* forbidden, int64_t forbidden_size, float scale, const void* qkv, void* out,
              float* lse, const void* dout, void* dqkv) {
  AttentionCall call{};
  call.samples = static_cast<const AttentionSample*>(samples);
  call.rows = rows;
  call.heads = heads;
  call.head_dim = head_dim;
  call.mask = static_cast<AttentionMask>(mask);
  call.forbidden = forbidden;
  call.forbidden_size = forbidden_size;
  call.scale = scale;
  call.qkv = qkv;
  call.out = out;
  call.lse = lse;
  call.dout = dout;
  call.dqkv = dqkv;
  for (int64_t s = 0; s < batch; ++s) {
    const int64_t length = call.samples[s].length();
    call.longest = length > call.longest ? length : call.longest;
  }
  const Isa at = static_cast<Isa>(isa);
  const auto kernel = dqkv == nullptr ? BEIT3_PROBE_KERNEL(at, dtype, attention_forward)
                                      : BEIT3_PROBE_KERNEL(at, dtype, attention_backward);
  const auto tasks = attention_tasks(call, batch, dqkv != nullptr);
  const probe::Guarded memory(kernel(call, nullptr, nullptr, nullptr));
  kernel(call, tasks.data(), tasks.data() + tasks.size(), memory.get());
  return memory.is_intact();
}

int decode_attention(int isa, int dtype, const void* samples, int64_t batch, int64_t heads, int64_t head_dim,
                     int64_t beams, int64_t tokens, int64_t length, const void* qkv, const void* prefix,
                     const void* words, const int32_t* history, void* out) {
  DecodeCall call{};
  call.samples = static_cast<const AttentionSample*>(samples);
  call.batch = batch;
  call.heads = heads;
  call.head_dim = head_dim;
  call.beams = beams;
  call.tokens = tokens;
  call.length = length;
  call.slots = batch * beams;
  call.scale = 1 / std::sqrt(static_cast<float>(head_dim));
  call.qkv = qkv;
  call.prefix = prefix;
  call.words = words;
  call.history = history;
  call.out = out;
  for (int64_t s = 0; s < batch; ++s) {
    const int64_t prefix_length = call.samples[s].length();
    call.longest = prefix_length > call.longest ? prefix_length : call.longest;
  }
  const auto kernel = BEIT3_PROBE_KERNEL(static_cast<Isa>(isa), dtype, decode_attention);
  const probe::Guarded memory(kernel(call, 0, 0, nullptr));
  kernel(call, 0, batch * heads, memory.get());
  return memory.is_intact();
}

}  // extern "C"
