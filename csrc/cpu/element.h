// The element types of tensors as the kernels see them. Kernel headers know nothing of torch: a bfloat16 or float16 is
// its bits.
#pragma once

#include <cstdint>

namespace beit3_fast {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// Two neighbours along the depth of a product.
struct bfloat16_pair {
  uint32_t bits;
};

// Four neighbours along the depth of a product: of its left operand 128 more than what they stand for, without a sign.
struct int8_quad {
  uint32_t bits;
};

// An operand that is absent.
struct none {};

// The type that T is computed in.
template <class T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename accumulate<T>::type;

}  // namespace beit3_fast
