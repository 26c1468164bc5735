// What the CPU ops do with their arguments before a kernel sees them.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "../tensors.h"
#include "element.h"

namespace beit3_fast::cpu {

template <class T>
constexpr ScalarType dtype_of = std::is_same_v<T, double>     ? ScalarType::Double
                                : std::is_same_v<T, float>    ? ScalarType::Float
                                : std::is_same_v<T, bfloat16> ? ScalarType::BFloat16
                                                              : ScalarType::Half;

// Rows [offsets[e], offsets[e + 1]) are expert e's.
inline std::vector<int64_t> read_offsets(const Tensor& expert_offsets, int64_t experts, int64_t rows) {
  check_offsets(expert_offsets, experts);
  const Tensor contiguous = torch::stable::contiguous(expert_offsets);
  const int32_t* first = contiguous.const_data_ptr<int32_t>();
  std::vector<int64_t> offsets(first, first + contiguous.numel());
  STD_TORCH_CHECK(offsets.front() == 0, "expert_offsets must begin with 0, got ", offsets.front());
  STD_TORCH_CHECK(std::is_sorted(offsets.begin(), offsets.end()), "expert_offsets must not decrease");
  STD_TORCH_CHECK(offsets.back() <= rows, "expert_offsets must end at or before the ", rows, " rows of x, got ",
                  offsets.back());
  return offsets;
}

// Memory that no vector load at a multiple of its size splits between two cache lines.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(::operator new(bytes, alignment)) {}

  template <class T = void>
  T* get() const {
    return static_cast<T*>(data_.get());
  }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(void* data) const { ::operator delete(data, alignment); }
  };
  std::unique_ptr<void, Free> data_;
};

}  // namespace beit3_fast::cpu

// The copy of a kernel for a type and this processor.
#define BEIT3_KERNEL_OF(KERNEL, DTYPE)                                          \
  ((DTYPE) == ScalarType::Float      ? BEIT3_AT(native_isa(), KERNEL<float>)    \
   : (DTYPE) == ScalarType::BFloat16 ? BEIT3_AT(native_isa(), KERNEL<bfloat16>) \
                                     : BEIT3_AT(native_isa(), KERNEL<float16>))
