// The decoding kernel at a chosen instruction set, for test_decode_attention.py: the library itself only ever runs the
// best one. Memory is handed to it full of NaN, and with a guard behind it.
#include <cstdlib>
#include <cstring>

#include "decode_attention.h"
#define BEIT3_KERNEL "decode_attention_tile.h"
#include "foreach_isa.h"

using namespace beit3_fast;

extern "C" {

int native_isa() { return static_cast<int>(beit3_fast::native_isa()); }

// dtype: 0 float32, 1 bfloat16, 2 float16. Returns whether the kernel stayed in its memory.
bool decode_attention(int isa, int dtype, const void* samples, int64_t batch, int64_t heads, int64_t head_dim,
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
  const Isa at = static_cast<Isa>(isa);
  const auto kernel = dtype == 0   ? BEIT3_AT(at, decode_attention<float>)
                      : dtype == 1 ? BEIT3_AT(at, decode_attention<bfloat16>)
                                   : BEIT3_AT(at, decode_attention<float16>);
  const int64_t bytes = kernel(call, 0, 0, nullptr);
  constexpr int64_t guard = 4096;
  char* const memory = static_cast<char*>(std::aligned_alloc(64, bytes + guard));
  std::memset(memory, 0xff, bytes + guard);
  kernel(call, 0, batch * heads, memory);
  bool intact = true;
  for (int64_t i = 0; i < guard; ++i) intact &= memory[bytes + i] == static_cast<char>(0xff);
  std::free(memory);
  return intact;
}

}  // extern "C"
