// The attention kernels at a chosen instruction set, for test_attention.py: the library itself only ever runs the best
// one. Memory is handed to them full of NaN, and with a guard behind it.
#include <cstdlib>
#include <cstring>

#include "attention.h"
#define BEIT3_KERNEL "attention_tile.h"
#include "foreach_isa.h"

using namespace beit3_fast;

namespace {

using Kernel = int64_t (*)(const AttentionCall&, const AttentionTask*, const AttentionTask*, void*);

// Returns whether the kernel stayed in its memory.
bool run(Kernel kernel, const AttentionCall& call, int64_t samples, bool backward) {
  const auto tasks = attention_tasks(call, samples, backward);
  const int64_t bytes = kernel(call, nullptr, nullptr, nullptr);
  constexpr int64_t guard = 4096;
  char* const memory = static_cast<char*>(std::aligned_alloc(64, bytes + guard));
  std::memset(memory, 0xff, bytes + guard);
  kernel(call, tasks.data(), tasks.data() + tasks.size(), memory);
  bool intact = true;
  for (int64_t i = 0; i < guard; ++i) intact &= memory[bytes + i] == static_cast<char>(0xff);
  std::free(memory);
  return intact;
}

}  // namespace

extern "C" {

int native_isa() { return static_cast<int>(beit3_fast::native_isa()); }

// dtype: 0 float32, 1 bfloat16, 2 float16. mask: 0 full, 1 captioning, 2 causal. With dqkv it is the backward.
bool attention(int isa, int dtype, const void* samples, int64_t batch, int64_t rows, int64_t heads, int64_t head_dim,
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
  if (dqkv == nullptr) {
    return run(dtype == 0   ? BEIT3_AT(at, attention_forward<float>)
               : dtype == 1 ? BEIT3_AT(at, attention_forward<bfloat16>)
                            : BEIT3_AT(at, attention_forward<float16>),
               call, batch, false);
  }
  return run(dtype == 0   ? BEIT3_AT(at, attention_backward<float>)
             : dtype == 1 ? BEIT3_AT(at, attention_backward<bfloat16>)
                          : BEIT3_AT(at, attention_backward<float16>),
             call, batch, true);
}

}  // extern "C"
