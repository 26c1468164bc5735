// What the forward and backward kernels share: which columns a lane holds, and an expert's parameters in shared memory.
#pragma once

#include "element.cuh"

namespace beit3_fast::cuda {

// The part of a row that a lane holds in registers: `count` vectors, each beside those of the warp's other lanes.
template <class T, Span span, Fit fit>
struct Lane {
  static constexpr int vector = fit == Fit::scalar ? 1 : 16 / static_cast<int>(sizeof(T));
  static constexpr int elements = lane_elements(span, fit);
  static constexpr int count = elements / vector;

  unsigned first;  // column
  unsigned width;

  __device__ explicit Lane(unsigned row_width)
      : first((span == Span::block ? threadIdx.x / warp_size * (warp_size * elements) : 0) +
              threadIdx.x % warp_size * vector),
        width(row_width) {}

  __device__ bool holds(int v) const { return fit == Fit::exact || first + v * (warp_size * vector) < width; }

  // How many columns a warp of the block holds.
  __device__ unsigned columns_of(unsigned warp) const {
    if constexpr (fit == Fit::exact) return warp_size * elements;
    const unsigned begin = span == Span::block ? warp * (warp_size * elements) : 0;
    return min(warp_size * elements, width - begin);
  }

  // The lane's vectors in a row of S: vector v is the element v * warp_size of what this points to.
  template <class S>
  __device__ const Packed<S, vector>* in(const void* matrix, int64_t row, int64_t stride) const {
    return reinterpret_cast<const Packed<S, vector>*>(static_cast<const S*>(matrix) + row * stride + first);
  }
  template <class S>
  __device__ Packed<S, vector>* in(void* matrix, int64_t row, int64_t stride) const {
    return reinterpret_cast<Packed<S, vector>*>(static_cast<S*>(matrix) + row * stride + first);
  }
};

// A row laid out as launch.h says, in shared or in global memory.
template <int vector>
class Plane {
 public:
  using Part = Packed<float, vector == 1 ? 1 : 4>;
  static constexpr int parts = vector == 8 ? 2 : 1;  // of a vector

  __device__ Plane(float* data, unsigned width, unsigned first)
      : data_(reinterpret_cast<Part*>(data) + first / vector), half_(half_quads(width, vector)) {}

  // The vectors of a lane whose row begins at column `first`.
  __device__ void load(float (&values)[vector], int v) const {
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      float some[vector / parts];
      unpack<float, vector / parts>(data_[v * warp_size + part * half_], some);
#pragma unroll
      for (int i = 0; i < vector / parts; ++i) values[part * (vector / parts) + i] = some[i];
    }
  }

  __device__ void store(const float (&values)[vector], int v) const {
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      float some[vector / parts];
#pragma unroll
      for (int i = 0; i < vector / parts; ++i) some[i] = values[part * (vector / parts) + i];
      data_[v * warp_size + part * half_] = pack<float, vector / parts>(some);
    }
  }

 private:
  Part* data_;
  int half_;
};

// The block copies an expert's row of a parameter to shared memory.
template <int vector, class S>
__device__ __forceinline__ void stage(float* plane, const void* parameter, int expert, unsigned width) {
  constexpr unsigned step = vector == 1 ? 1 : 4;
  const auto* from =
      reinterpret_cast<const Packed<S, step>*>(static_cast<const S*>(parameter) + static_cast<int64_t>(expert) * width);
  // A thread has every blockDim-th quad: an even number, so all of its quads are first or all are second halves.
  auto* to = reinterpret_cast<Packed<float, step>*>(plane) + place(threadIdx.x * step, width, vector) / step;
  const unsigned stride = vector == 8 ? blockDim.x / 2 : blockDim.x;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < width / step; i += blockDim.x, to += stride) {
    float values[step];
    unpack<S, step>(from[i], values);
    *to = pack<float, step>(values);
  }
}

template <int vector>
__device__ __forceinline__ void stage(float* plane, const void* parameter, DType type, int expert, unsigned width) {
  if (type == DType::float32) {
    stage<vector, float>(plane, parameter, expert, width);
  } else if (type == DType::bfloat16) {
    stage<vector, bfloat16>(plane, parameter, expert, width);
  } else {
    stage<vector, float16>(plane, parameter, expert, width);
  }
}

// Sum over the elements of a vector: a tree, so that the additions need not wait for one another.
template <int vector>
__device__ __forceinline__ float vector_sum(const float (&values)[vector]) {
  float sums[vector];
#pragma unroll
  for (int i = 0; i < vector; ++i) sums[i] = values[i];
#pragma unroll
  for (int step = vector / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
  }
  return sums[0];
}

// Launches, and says what became of it. Shared memory beyond 48 KiB has to be asked for.
template <class Arguments>
Error launch_kernel(void (*kernel)(Arguments), dim3 grid, dim3 block, int shared, Stream stream,
                    const Arguments& arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(arguments);
  return cudaGetLastError();
}

}  // namespace beit3_fast::cuda
