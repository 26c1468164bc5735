// Elements in memory and in registers: `Packed<S, N>` is N of type S as one access moves them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "layer_norm.h"

namespace beit3_fast::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// The type that T is computed in.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class S, int N>
struct packed;
template <>
struct packed<float, 4> {
  using type = float4;
};
template <class S>
struct packed<S, 8> {
  using type = uint4;
};
template <class S>
struct packed<S, 4> {
  using type = uint2;
};
template <class S>
struct packed<S, 1> {
  using type = S;
};
template <class S, int N>
using Packed = typename packed<S, N>::type;

// Two 16-bit numbers in a word. In bfloat16 the upper half of a float is the number.
template <class S>
__device__ __forceinline__ void unpack_pair(unsigned word, float& low, float& high) {
  if constexpr (std::is_same_v<S, bfloat16>) {
    asm("shl.b32 %0, %1, 16;" : "=f"(low) : "r"(word));
    asm("and.b32 %0, %1, 0xffff0000;" : "=f"(high) : "r"(word));
  } else {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    low = pair.x;
    high = pair.y;
  }
}

template <class S>
__device__ __forceinline__ unsigned pack_pair(float low, float high) {
  if constexpr (std::is_same_v<S, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
}

template <class S, int N, class A>
__device__ __forceinline__ void unpack(Packed<S, N> from, A (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = static_cast<A>(from);
  } else if constexpr (std::is_same_v<S, float>) {
    values[0] = from.x, values[1] = from.y, values[2] = from.z, values[3] = from.w;
  } else {
    unpack_pair<S>(from.x, values[0], values[1]);
    unpack_pair<S>(from.y, values[2], values[3]);
    if constexpr (N == 8) {
      unpack_pair<S>(from.z, values[4], values[5]);
      unpack_pair<S>(from.w, values[6], values[7]);
    }
  }
}

template <class S, int N, class A>
__device__ __forceinline__ Packed<S, N> pack(const A (&values)[N]) {
  if constexpr (N == 1) {
    return static_cast<S>(values[0]);
  } else if constexpr (std::is_same_v<S, float>) {
    return make_float4(values[0], values[1], values[2], values[3]);
  } else if constexpr (N == 4) {
    return make_uint2(pack_pair<S>(values[0], values[1]), pack_pair<S>(values[2], values[3]));
  } else {
    return make_uint4(pack_pair<S>(values[0], values[1]), pack_pair<S>(values[2], values[3]),
                      pack_pair<S>(values[4], values[5]), pack_pair<S>(values[6], values[7]));
  }
}

template <class S, int N>
__device__ __forceinline__ Packed<S, N> fetch(const void* row, int64_t column) {
  return *reinterpret_cast<const Packed<S, N>*>(static_cast<const S*>(row) + column);
}

template <class S, int N, class A>
__device__ __forceinline__ void load(A (&values)[N], const void* row, int64_t column) {
  unpack<S, N>(fetch<S, N>(row, column), values);
}

template <class S, int N, class A>
__device__ __forceinline__ void store(void* row, int64_t column, const A (&values)[N]) {
  *reinterpret_cast<Packed<S, N>*>(static_cast<S*>(row) + column) = pack<S, N>(values);
}

// Parameters are read seldom, so their type is an argument and not a template: 1 or 4 elements at `index`.
template <int N, class A>
__device__ __forceinline__ void load_parameter(A (&values)[N], const void* data, DType type, int64_t index) {
  switch (type) {
    case DType::float32:
      return load<float, N>(values, data, index);
    case DType::bfloat16:
      return load<bfloat16, N>(values, data, index);
    case DType::float16:
      return load<float16, N>(values, data, index);
    case DType::float64:
      if constexpr (std::is_same_v<A, double>) load<double, N>(values, data, index);
  }
}

template <class A>
__device__ __forceinline__ void store_parameter(void* data, DType type, int64_t index, A value) {
  switch (type) {
    case DType::float32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
    case DType::bfloat16:
      static_cast<bfloat16*>(data)[index] = static_cast<bfloat16>(value);
      break;
    case DType::float16:
      static_cast<float16*>(data)[index] = static_cast<float16>(value);
      break;
    case DType::float64:
      static_cast<double*>(data)[index] = static_cast<double>(value);
      break;
  }
}

// How many of this block's rows, which begin at row `first`, belong to experts before `expert`.
__device__ __forceinline__ int rows_before(const int32_t* expert_offsets, int expert, int64_t first, int count) {
  const int begin = static_cast<int>(min(first, static_cast<int64_t>(INT32_MAX)));  // no offset is greater
  return min(max(expert_offsets[expert] - begin, 0), count);
}

// The sum over each `lanes` neighbouring lanes; all of them get the same bits: each step adds the same two numbers.
template <int lanes = warp_size, class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int apart = lanes / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffff, value, apart);
  return value;
}

// The sum over a block of at most 16 warps. `slots`, one a warp, may be used again after another barrier.
template <class A>
__device__ __forceinline__ A block_sum(A value, A* slots) {
  value = warp_sum(value);
  if (threadIdx.x % warp_size == 0) slots[threadIdx.x / warp_size] = value;
  __syncthreads();
  const unsigned slot = threadIdx.x % 16;
  return warp_sum<16>(slot < blockDim.x / warp_size ? slots[slot] : A(0));
}

// sum / count rounded once, given 1 / count.
__device__ __forceinline__ float quotient(float sum, float count, float inverse) {
  const float estimate = sum * inverse;
  return fmaf(fmaf(-estimate, count, sum), inverse, estimate);
}

}  // namespace beit3_fast::cuda
