// y = (t - mean) * rstd * weight[e] + bias[e], t = x (+ residual), e the expert of the row.
//
// Main memory is read and written once. A block takes consecutive rows: it copies the parameters of an expert to shared
// memory when it comes to the first row of it, and keeps a row in registers while mean, deviations and result are taken
// from it. The next row is on its way meanwhile. Rows too wide for that are walked three times, from the L2 cache after
// the first.
#include "rows.cuh"

namespace beit3_fast::cuda {
namespace {

// The mean of a row from that of every warp's part. Sums of what the means differ by, not of the whole: where a mean is
// far from zero that saves the digits that count.
template <class L>
__device__ __forceinline__ float block_mean(float part, const L& lane, float inverse_width, float* slots) {
  if (threadIdx.x % warp_size == 0) slots[threadIdx.x / warp_size] = part;
  __syncthreads();
  const unsigned slot = threadIdx.x % 16;
  const float apart = slot < blockDim.x / warp_size ? (slots[slot] - slots[0]) * lane.columns_of(slot) : 0.0f;
  return fmaf(warp_sum<16>(apart), inverse_width, slots[0]);
}

template <class X, class T, Span span, Fit fit>
__global__ void __launch_bounds__(span == Span::warp ? warp_size * warps_of_rows : warp_size * forward_warps,
                                  span == Span::block  ? 1
                                  : fit == Fit::vector ? 3
                                                       : 4) forward(const ForwardArguments a) {
  using L = Lane<T, span, fit>;
  constexpr int vector = L::vector;
  extern __shared__ float4 dynamic_shared[];
  __shared__ float slots[2][forward_warps];
  float2* const statistics = reinterpret_cast<float2*>(dynamic_shared);
  float* const weight = reinterpret_cast<float*>(statistics + max_rows);
  float* const bias = weight + plane_size(a.width, vector);

  const L lane(a.width);
  const Plane<vector> weights(weight, lane.width, lane.first);
  const Plane<vector> biases(bias, lane.width, lane.first);
  const unsigned lane_id = threadIdx.x % warp_size;
  const unsigned warp = threadIdx.x / warp_size;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.rows_per_block;
  const int count = static_cast<int>(min(static_cast<int64_t>(a.rows_per_block), a.rows - first));
  constexpr int step = span == Span::warp ? warps_of_rows : 1;
  const float inverse_width = 1 / static_cast<float>(a.width);
  const float columns = lane.columns_of(warp);
  const float inverse = 1 / columns;
  const float eps = static_cast<float>(a.eps);

  Packed<X, vector> next_x[L::count];
  Packed<T, vector> next_residual[L::count];
  const auto prefetch = [&](int row) {
    const auto* x = lane.template in<X>(a.x, first + row, a.x_stride);
#pragma unroll
    for (int v = 0; v < L::count; ++v) {
      if (lane.holds(v)) next_x[v] = x[v * warp_size];
    }
    if (a.residual == nullptr) return;
    const auto* residual = lane.template in<T>(a.residual, first + row, a.residual_stride);
#pragma unroll
    for (int v = 0; v < L::count; ++v) {
      if (lane.holds(v)) next_residual[v] = residual[v * warp_size];
    }
  };
  // The row that was fetched last, as it is stored.
  const auto take = [&](float (&values)[L::count][vector], int row) {
#pragma unroll
    for (int v = 0; v < L::count; ++v) {
      if (lane.holds(v)) unpack<X, vector>(next_x[v], values[v]);
    }
    if (a.residual == nullptr) return;
    auto* total = lane.template in<T>(a.total, first + row, a.width);
#pragma unroll
    for (int v = 0; v < L::count; ++v) {
      if (lane.holds(v)) {
        float residual[vector];
        unpack<T, vector>(next_residual[v], residual);
#pragma unroll
        for (int i = 0; i < vector; ++i) values[v][i] += residual[i];
        const Packed<T, vector> rounded = pack<T, vector>(values[v]);
        total[v * warp_size] = rounded;
        unpack<T, vector>(rounded, values[v]);
      }
    }
  };

  int row = span == Span::warp ? warp : 0;
  if (row < count) prefetch(row);
  const int owned = rows_before(a.expert_offsets, a.experts, first, count);
  const int readable = a.residual == nullptr ? owned : count;
  int done = 0;
  for (int expert = 0; expert <= a.experts; ++expert) {  // the last time for rows that no expert owns
    const bool is_owned = expert < a.experts;
    const int stop = is_owned ? rows_before(a.expert_offsets, expert + 1, first, count) : count;
    if (stop <= done) continue;
    if (is_owned) {
      if (done > 0) __syncthreads();  // the parameters of the expert before are in use until here
      stage<vector>(weight, a.weight, a.weight_type, expert, a.width);
      stage<vector>(bias, a.bias, a.bias_type, expert, a.width);
      __syncthreads();
    }
    done = stop;
    for (; row < stop; row += step) {
      float values[L::count][vector];
      take(values, row);  // of a row that is not readable nothing is used
      if (row + step < readable) prefetch(row + step);
      auto* y = lane.template in<T>(a.y, first + row, a.width);
      if (!is_owned) {
#pragma unroll
        for (int v = 0; v < L::count; ++v) {
          if (lane.holds(v)) y[v * warp_size] = Packed<T, vector>{};
        }
        if (lane_id == 0 && (span == Span::warp || warp == 0)) statistics[row] = make_float2(0, 0);
        continue;
      }
      float sum = 0;
#pragma unroll
      for (int v = 0; v < L::count; ++v) {
        if (lane.holds(v)) sum += vector_sum(values[v]);
      }
      float mean = quotient(warp_sum(sum), columns, inverse);
      if constexpr (span == Span::block) mean = block_mean(mean, lane, inverse_width, slots[0]);
      float squares[2] = {};
#pragma unroll
      for (int v = 0; v < L::count; ++v) {
        if (lane.holds(v)) {
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            values[v][i] -= mean;
            squares[i % 2] = fmaf(values[v][i], values[v][i], squares[i % 2]);
          }
        }
      }
      const float square = squares[0] + squares[1];
      const float variance = (span == Span::block ? block_sum(square, slots[1]) : warp_sum(square)) * inverse_width;
      const float rstd = rsqrtf(variance + eps);
      if (lane_id == 0 && (span == Span::warp || warp == 0)) statistics[row] = make_float2(mean, rstd);
#pragma unroll
      for (int v = 0; v < L::count; ++v) {
        if (lane.holds(v)) {
          float w[vector], b[vector];
          weights.load(w, v);
          biases.load(b, v);
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            values[v][i] = fmaf(values[v][i] * rstd, w[i], b[i]);
          }
          y[v * warp_size] = pack<T, vector>(values[v]);
        }
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    static_cast<float*>(a.mean)[first + i] = statistics[i].x;
    static_cast<float*>(a.rstd)[first + i] = statistics[i].y;
  }
}

// Any width, and fp64.
template <class X, class T, int vector>
__global__ void __launch_bounds__(loop_threads, 2) forward_loop(const ForwardArguments a) {
  using A = accumulate_t<T>;
  __shared__ A slots[2][loop_threads / warp_size];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.rows_per_block;
  const int count = static_cast<int>(min(static_cast<int64_t>(a.rows_per_block), a.rows - first));
  int expert = 0;
  for (int row = 0; row < count; ++row) {
    while (expert < a.experts && rows_before(a.expert_offsets, expert + 1, first, count) <= row) ++expert;
    const X* x = static_cast<const X*>(a.x) + (first + row) * a.x_stride;
    const T* residual = static_cast<const T*>(a.residual) + (first + row) * a.residual_stride;
    T* total = static_cast<T*>(a.total) + (first + row) * a.width;
    T* y = static_cast<T*>(a.y) + (first + row) * a.width;
    A* const mean_out = static_cast<A*>(a.mean) + first + row;
    A* const rstd_out = static_cast<A*>(a.rstd) + first + row;
    const auto take = [&](A(&values)[vector], int column) {
      if (a.residual == nullptr) {
        load<X, vector>(values, x, column);
      } else {
        load<T, vector>(values, total, column);
      }
    };

    A sum = 0;
    for (int column = threadIdx.x * vector; column < a.width; column += loop_threads * vector) {
      A values[vector];
      load<X, vector>(values, x, column);
      if (a.residual != nullptr) {
        A added[vector];
        load<T, vector>(added, residual, column);
#pragma unroll
        for (int i = 0; i < vector; ++i) values[i] += added[i];
        const Packed<T, vector> rounded = pack<T, vector>(values);
        *reinterpret_cast<Packed<T, vector>*>(total + column) = rounded;
        unpack<T, vector>(rounded, values);
      }
#pragma unroll
      for (int i = 0; i < vector; ++i) sum += values[i];
    }
    if (expert == a.experts) {  // nobody owns the row
      for (int column = threadIdx.x * vector; column < a.width; column += loop_threads * vector) {
        constexpr A zeros[vector] = {};
        store<T, vector>(y, column, zeros);
      }
      if (threadIdx.x == 0) *mean_out = *rstd_out = 0;
      continue;
    }
    const A mean = block_sum(sum, slots[0]) / a.width;
    A squares = 0;
    for (int column = threadIdx.x * vector; column < a.width; column += loop_threads * vector) {
      A values[vector];
      take(values, column);
#pragma unroll
      for (int i = 0; i < vector; ++i) squares += (values[i] - mean) * (values[i] - mean);
    }
    const A rstd = A(1) / sqrt(block_sum(squares, slots[1]) / a.width + A(a.eps));
    if (threadIdx.x == 0) *mean_out = mean, *rstd_out = rstd;
    const int64_t parameters = static_cast<int64_t>(expert) * a.width;
    for (int column = threadIdx.x * vector; column < a.width; column += loop_threads * vector) {
      A values[vector];
      take(values, column);
      constexpr int part = vector < 4 ? vector : 4;
#pragma unroll
      for (int from = 0; from < vector; from += part) {
        A w[part], b[part];
        load_parameter<part>(w, a.weight, a.weight_type, parameters + column + from);
        load_parameter<part>(b, a.bias, a.bias_type, parameters + column + from);
#pragma unroll
        for (int i = 0; i < part; ++i) values[from + i] = (values[from + i] - mean) * rstd * w[i] + b[i];
      }
      store<T, vector>(y, column, values);
    }
  }
}

using Kernel = void (*)(ForwardArguments);

template <class X, class T>
Kernel kernel_for(Span span, Fit fit) {
  if constexpr (std::is_same_v<T, double>) {
    return forward_loop<X, T, 1>;
  } else {
    static constexpr Kernel resident[2][3] = {
        {forward<X, T, Span::warp, Fit::exact>, forward<X, T, Span::warp, Fit::vector>,
         forward<X, T, Span::warp, Fit::scalar>},
        {forward<X, T, Span::block, Fit::exact>, forward<X, T, Span::block, Fit::vector>,
         forward<X, T, Span::block, Fit::scalar>},
    };
    if (span != Span::loop) return resident[static_cast<int>(span)][static_cast<int>(fit)];
    return fit == Fit::scalar ? forward_loop<X, T, 1> : forward_loop<X, T, 16 / static_cast<int>(sizeof(T))>;
  }
}

Kernel kernel_for(DType x, DType total, Span span, Fit fit) {
  switch (total) {
    case DType::float64:
      return kernel_for<double, double>(span, fit);
    case DType::bfloat16:
      return kernel_for<bfloat16, bfloat16>(span, fit);
    case DType::float16:
      return kernel_for<float16, float16>(span, fit);
    case DType::float32:
      break;
  }
  if (x == DType::bfloat16) return kernel_for<bfloat16, float>(span, fit);
  if (x == DType::float16) return kernel_for<float16, float>(span, fit);
  return kernel_for<float, float>(span, fit);
}

}  // namespace

Error layer_norm_forward(const Launch& launch, const ForwardArguments& arguments, DType x, DType total, Stream stream) {
  const Kernel kernel = kernel_for(x, total, launch.span, launch.fit);
  return launch_kernel(kernel, dim3(launch.blocks), dim3(launch.threads), launch.shared, stream, arguments);
}

}  // namespace beit3_fast::cuda
