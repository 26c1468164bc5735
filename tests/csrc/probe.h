// What the probes share. A probe is a library, compiled by the tests, that runs kernels of csrc/cpu at a chosen
// instruction set: the library itself only ever runs the best one. tests/csrc drives them from Python, probe_main.cpp
// without it. dtype is 0 for float32, 1 for bfloat16, 2 for float16.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "isa.h"

#if defined(__SANITIZE_ADDRESS__)
#define BEIT3_PROBE_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define BEIT3_PROBE_SANITIZED
#endif
#endif

// The copy of a kernel for a dtype.
#define BEIT3_PROBE_KERNEL(ISA, DTYPE, KERNEL)                    \
  ((DTYPE) == 0   ? BEIT3_AT(ISA, KERNEL<float>)                  \
   : (DTYPE) == 1 ? BEIT3_AT(ISA, KERNEL<::beit3_fast::bfloat16>) \
                  : BEIT3_AT(ISA, KERNEL<::beit3_fast::float16>))

namespace beit3_fast::probe {

// Memory for a kernel, full of NaN, with a guard behind it. An address sanitizer, which sees reads too, guards it
// better.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) : bytes_(bytes), data_(static_cast<char*>(::operator new(bytes + guard, alignment))) {
    std::memset(data_, 0xff, bytes + guard);
  }
  ~Guarded() { ::operator delete(data_, alignment); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <class T = void>
  T* get() const {
    return static_cast<T*>(static_cast<void*>(data_));
  }

  bool is_intact() const {
    for (int64_t i = bytes_; i < bytes_ + guard; ++i) {
      if (data_[i] != static_cast<char>(0xff)) return false;
    }
    return true;
  }

 private:
#ifdef BEIT3_PROBE_SANITIZED
  static constexpr int64_t guard = 0;
#else
  static constexpr int64_t guard = 4096;
#endif
  static constexpr std::align_val_t alignment{64};
  int64_t bytes_;
  char* data_;
};

}  // namespace beit3_fast::probe

extern "C" {

__attribute__((used)) inline int native_isa() { return static_cast<int>(beit3_fast::native_isa()); }

// ---- isa_probe.cpp ----

void widen_bfloat16(int isa, const void* row, float* out, int64_t width);
void widen_float16(int isa, const void* row, float* out, int64_t width);
void round_bfloat16(int isa, const float* row, void* out, int64_t width);
void round_float16(int isa, const float* row, void* out, int64_t width);

// One row; total may be null where residual is. scratch has room for the row.
#define BEIT3_PROBE_LAYER_NORM(NAME, A)                                                                             \
  void layer_norm_##NAME(int isa, const void* x, const void* residual, void* total, A* scratch, const void* weight, \
                         const void* bias, void* y, int64_t width, A eps, A* mean, A* rstd);                        \
  void layer_norm_gradient_##NAME(int isa, const void* dy, const void* total, const void* weight,                   \
                                  const void* dresidual, A mean, A rstd, void* dtotal, A* dweight, A* dbias,        \
                                  int64_t width);
BEIT3_PROBE_LAYER_NORM(float32, float)
BEIT3_PROBE_LAYER_NORM(float64, double)
BEIT3_PROBE_LAYER_NORM(bfloat16, float)
BEIT3_PROBE_LAYER_NORM(float16, float)
#undef BEIT3_PROBE_LAYER_NORM

// ---- linear_probe.cpp ----

// A Product; `wide`: C is float32. Returns whether the kernel stayed in its memory.
int product(int isa, int dtype, bool wide, int64_t rows, int64_t columns, int64_t depth, const void* a,
            int64_t a_stride, const int64_t* a_index, bool a_across, bool in_place, const void* b, int64_t b_stride,
            bool b_across, const void* bias, bool gelu, void* pre, const void* residual, void* out, int64_t out_stride,
            const int64_t* out_index);

// Rows times weights in panels of 64 columns, of int8 if there are column_scales; C is float32.
int packed_product(int isa, int dtype, int64_t rows, int64_t columns, int64_t depth, const void* a, const void* panels,
                   const float* column_scales, void* out, int64_t out_stride);

// out = dy * gelu'(pre), and the sums of the columns of dy
void gradients(int isa, int dtype, const void* dy, const void* pre, void* out, int64_t rows, int64_t columns,
               void* sums);

// ---- attention_probe.cpp: both return whether the kernel stayed in its memory ----

// mask: 0 full, 1 captioning, 2 causal. With dqkv it is the backward.
int attention(int isa, int dtype, const void* samples, int64_t batch, int64_t rows, int64_t heads, int64_t head_dim,
              int mask, const bool* forbidden, int64_t forbidden_size, float scale, const void* qkv, void* out,
              float* lse, const void* dout, void* dqkv);

// the scale is that of head_dim
int decode_attention(int isa, int dtype, const void* samples, int64_t batch, int64_t heads, int64_t head_dim,
                     int64_t beams, int64_t tokens, int64_t length, const void* qkv, const void* prefix,
                     const void* words, const int32_t* history, void* out);

}  // extern "C"
