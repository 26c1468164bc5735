// The gradients of layer_norm_forward.cu. With n = (t - mean) * rstd and g = dy * weight[e],
//
//   dt = (g - mean(g) - n * mean(g * n)) * rstd (+ dresidual)
//   dweight[e] = sum of dy * n, dbias[e] = sum of dy over the rows of e
//
// Main memory is read and written once. A block takes consecutive rows and keeps its part of the parameters' gradients
// in registers; what it has of an expert it writes down once (ReduceArguments), and a second kernel sums that in a
// fixed order: the result is the same every time. Rows too wide for registers are read twice for dt and once more for
// the parameters' gradients.
#include "rows.cuh"

namespace beit3_fast::cuda {
namespace {

// The sums of both numbers over a block. `slots` is the other one of two in every other call.
__device__ __forceinline__ float2 block_sums(float first, float second, float2* slots) {
  first = warp_sum(first);
  second = warp_sum(second);
  if (threadIdx.x % warp_size == 0) slots[threadIdx.x / warp_size] = make_float2(first, second);
  __syncthreads();
  float2 sums = make_float2(0, 0);
#pragma unroll 4
  for (unsigned warp = 0; warp < blockDim.x / warp_size; ++warp) {
    sums.x += slots[warp].x;
    sums.y += slots[warp].y;
  }
  return sums;
}

template <class T, Span span, Fit fit>
__global__ void __launch_bounds__(span == Span::warp ? warp_size * warps_of_rows : warp_size * backward_warps,
                                  span == Span::block ? 1 : 2) backward(const BackwardArguments a) {
  using L = Lane<T, span, fit>;
  constexpr int vector = L::vector;
  using Pack = Packed<T, vector>;
  extern __shared__ float4 dynamic_shared[];
  __shared__ float2 slots[2][backward_warps];
  float2* const statistics = reinterpret_cast<float2*>(dynamic_shared);
  float* const weight = reinterpret_cast<float*>(statistics + max_rows);
  const int plane = static_cast<int>(plane_size(a.width, vector));
  float* const sums = weight + plane;  // where a block has rows in several warps: their gradients meet here

  const L lane(a.width);
  const Plane<vector> weights(weight, lane.width, lane.first);
  const unsigned warp = threadIdx.x / warp_size;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.rows_per_block;
  const int count = static_cast<int>(min(static_cast<int64_t>(a.rows_per_block), a.rows - first));
  constexpr int step = span == Span::warp ? warps_of_rows : 1;
  const float inverse_width = 1 / static_cast<float>(a.width);

  Pack next_total[L::count], next_dy[L::count];
  const auto prefetch = [&](int row) {
    const auto* total = lane.template in<T>(a.total, first + row, a.total_stride);
    const auto* dy = lane.template in<T>(a.dy, first + row, a.dy_stride);
#pragma unroll
    for (int v = 0; v < L::count; ++v) {
      if (lane.holds(v)) {
        next_total[v] = total[v * warp_size];
        next_dy[v] = dy[v * warp_size];
      }
    }
  };

  int row = span == Span::warp ? warp : 0;
  if (row < count) prefetch(row);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    statistics[i] =
        make_float2(static_cast<const float*>(a.mean)[first + i], static_cast<const float*>(a.rstd)[first + i]);
  }
  const int owned = rows_before(a.expert_offsets, a.experts, first, count);
  int done = 0;
  for (int expert = 0; expert < a.experts; ++expert) {
    const int stop = rows_before(a.expert_offsets, expert + 1, first, count);
    if (stop <= done) continue;
    if (done > 0) __syncthreads();  // the weight of the expert before is in use until here
    done = stop;
    stage<vector>(weight, a.weight, a.weight_type, expert, a.width);
    __syncthreads();
    float dweight[L::count][vector] = {};
    float dbias[L::count][vector] = {};
    for (; row < stop; row += step) {
      float normed[L::count][vector];
      float g[L::count][vector];
      const float2 mean_rstd = statistics[row];
      float sum = 0;
      float product = 0;
#pragma unroll
      for (int v = 0; v < L::count; ++v) {
        if (lane.holds(v)) {
          float w[vector];
          unpack<T, vector>(next_total[v], normed[v]);
          unpack<T, vector>(next_dy[v], g[v]);
          weights.load(w, v);
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            normed[v][i] = (normed[v][i] - mean_rstd.x) * mean_rstd.y;
            dweight[v][i] = fmaf(g[v][i], normed[v][i], dweight[v][i]);
            dbias[v][i] += g[v][i];
            g[v][i] *= w[i];
            product = fmaf(g[v][i], normed[v][i], product);
          }
          sum += vector_sum(g[v]);
        }
      }
      if constexpr (span == Span::block) {
        const float2 both = block_sums(sum, product, slots[row % 2]);
        sum = both.x;
        product = both.y;
      } else {
        sum = warp_sum(sum);
        product = warp_sum(product);
      }
      const float rstd = mean_rstd.y;
      const float mean_sum = sum * inverse_width * rstd;
      const float mean_product = product * inverse_width * rstd;
      auto* dtotal = lane.template in<T>(a.dtotal, first + row, a.width);
      const auto* dresidual = lane.template in<T>(a.dresidual, first + row, a.dresidual_stride);
#pragma unroll
      for (int v = 0; v < L::count; ++v) {
        if (lane.holds(v)) {
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            g[v][i] = fmaf(normed[v][i], -mean_product, fmaf(g[v][i], rstd, -mean_sum));
          }
          if (a.dresidual != nullptr) {
            float more[vector];
            unpack<T, vector>(dresidual[v * warp_size], more);
#pragma unroll
            for (int i = 0; i < vector; ++i) g[v][i] += more[i];
          }
          dtotal[v * warp_size] = pack<T, vector>(g[v]);
        }
      }
      if (row + step < owned) prefetch(row + step);
    }

    float* const partials = static_cast<float*>(a.partials) + (static_cast<int64_t>(blockIdx.x) + expert) * 2 * plane;
    // One warp after the other adds to what those before have; the last writes the sum down.
    for (int turn = 0; turn < step; ++turn) {
      if (span == Span::block || turn == warp) {
        float* const to = turn == step - 1 ? partials : sums;
        const Plane<vector> before[] = {{sums, lane.width, lane.first}, {sums + plane, lane.width, lane.first}};
        const Plane<vector> after[] = {{to, lane.width, lane.first}, {to + plane, lane.width, lane.first}};
#pragma unroll
        for (int v = 0; v < L::count; ++v) {
          if (lane.holds(v)) {
            if (turn > 0) {
              float some[vector];
              before[0].load(some, v);
#pragma unroll
              for (int i = 0; i < vector; ++i) dweight[v][i] += some[i];
              before[1].load(some, v);
#pragma unroll
              for (int i = 0; i < vector; ++i) dbias[v][i] += some[i];
            }
            after[0].store(dweight[v], v);
            after[1].store(dbias[v], v);
          }
        }
      }
      if (turn < step - 1) __syncthreads();
    }
  }
  for (; row < count; row += step) {  // rows that no expert owns
    auto* dtotal = lane.template in<T>(a.dtotal, first + row, a.width);
    const auto* dresidual = lane.template in<T>(a.dresidual, first + row, a.dresidual_stride);
#pragma unroll
    for (int v = 0; v < L::count; ++v) {
      if (lane.holds(v)) dtotal[v * warp_size] = a.dresidual == nullptr ? Pack{} : dresidual[v * warp_size];
    }
  }
}

// Any width, and fp64: the rows' gradient.
template <class T, int vector>
__global__ void __launch_bounds__(loop_threads, 2) backward_loop(const BackwardArguments a) {
  using A = accumulate_t<T>;
  __shared__ A sums[2][2][loop_threads / warp_size];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.rows_per_block;
  const int count = static_cast<int>(min(static_cast<int64_t>(a.rows_per_block), a.rows - first));
  constexpr int part = vector < 4 ? vector : 4;
  int expert = 0;
  for (int row = 0; row < count; ++row) {
    while (expert < a.experts && rows_before(a.expert_offsets, expert + 1, first, count) <= row) ++expert;
    const T* total = static_cast<const T*>(a.total) + (first + row) * a.total_stride;
    const T* dy = static_cast<const T*>(a.dy) + (first + row) * a.dy_stride;
    const T* dresidual = static_cast<const T*>(a.dresidual) + (first + row) * a.dresidual_stride;
    T* dtotal = static_cast<T*>(a.dtotal) + (first + row) * a.width;
    const A mean = static_cast<const A*>(a.mean)[first + row];
    const A rstd = static_cast<const A*>(a.rstd)[first + row];
    const bool owned = expert < a.experts;
    const int64_t parameters = static_cast<int64_t>(expert) * a.width;
    const auto take = [&](A(&normed)[vector], A(&g)[vector], int column) {
      load<T, vector>(normed, total, column);
      load<T, vector>(g, dy, column);
#pragma unroll
      for (int from = 0; from < vector; from += part) {
        A w[part];
        load_parameter<part>(w, a.weight, a.weight_type, parameters + column + from);
#pragma unroll
        for (int i = 0; i < part; ++i) {
          normed[from + i] = (normed[from + i] - mean) * rstd;
          g[from + i] *= w[i];
        }
      }
    };

    A sum = 0;
    A product = 0;
    if (owned) {
      for (int column = threadIdx.x * vector; column < a.width; column += loop_threads * vector) {
        A normed[vector], g[vector];
        take(normed, g, column);
#pragma unroll
        for (int i = 0; i < vector; ++i) {
          sum += g[i];
          product += g[i] * normed[i];
        }
      }
      A(*const slots)[loop_threads / warp_size] = sums[row % 2];
      const int lane = threadIdx.x % warp_size;
      sum = warp_sum(sum);
      product = warp_sum(product);
      if (lane == 0) slots[0][threadIdx.x / warp_size] = sum, slots[1][threadIdx.x / warp_size] = product;
      __syncthreads();
      sum = warp_sum(lane < loop_threads / warp_size ? slots[0][lane] : A(0)) / a.width;
      product = warp_sum(lane < loop_threads / warp_size ? slots[1][lane] : A(0)) / a.width;
    }
    for (int column = threadIdx.x * vector; column < a.width; column += loop_threads * vector) {
      A values[vector] = {};
      if (owned) {
        A normed[vector], g[vector];
        take(normed, g, column);
#pragma unroll
        for (int i = 0; i < vector; ++i) values[i] = (g[i] - sum - normed[i] * product) * rstd;
      }
      if (a.dresidual != nullptr) {
        A more[vector];
        load<T, vector>(more, dresidual, column);
#pragma unroll
        for (int i = 0; i < vector; ++i) values[i] += more[i];
      }
      store<T, vector>(dtotal, column, values);
    }
  }
}

// Any width, and fp64: the partial sums of the parameters' gradients, a block for a few columns of consecutive rows.
template <class T>
__global__ void __launch_bounds__(reduce_columns* reduce_stripes) parameters_loop(const BackwardArguments a) {
  using A = accumulate_t<T>;
  __shared__ A sums[2][reduce_stripes][reduce_columns];
  const int column = blockIdx.x * reduce_columns + threadIdx.x;
  const int64_t plane = plane_size(a.width, 1);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * a.rows_per_block;
  const int count = static_cast<int>(min(static_cast<int64_t>(a.rows_per_block), a.rows - first));
  int done = 0;
  for (int expert = 0; expert < a.experts; ++expert) {
    const int stop = rows_before(a.expert_offsets, expert + 1, first, count);
    if (stop <= done) continue;
    A dweight = 0;
    A dbias = 0;
    if (column < a.width) {
      for (int row = done + threadIdx.y; row < stop; row += reduce_stripes) {
        A value[1], dy[1];
        load<T, 1>(value, static_cast<const T*>(a.total) + (first + row) * a.total_stride, column);
        load<T, 1>(dy, static_cast<const T*>(a.dy) + (first + row) * a.dy_stride, column);
        const A mean = static_cast<const A*>(a.mean)[first + row];
        const A rstd = static_cast<const A*>(a.rstd)[first + row];
        dweight += dy[0] * ((value[0] - mean) * rstd);
        dbias += dy[0];
      }
    }
    sums[0][threadIdx.y][threadIdx.x] = dweight;
    sums[1][threadIdx.y][threadIdx.x] = dbias;
    __syncthreads();
    if (threadIdx.y < 2 && column < a.width) {
      A sum = 0;
      for (int stripe = 0; stripe < reduce_stripes; ++stripe) sum += sums[threadIdx.y][stripe][threadIdx.x];
      const int64_t slot = (static_cast<int64_t>(blockIdx.y) + expert) * 2 + threadIdx.y;
      static_cast<A*>(a.partials)[slot * plane + column] = sum;
    }
    __syncthreads();
    done = stop;
  }
}

// The second stage: grid (pieces of columns, experts), block (columns, stripes of slots).
template <class A>
__global__ void __launch_bounds__(reduce_columns* reduce_stripes) reduce(const ReduceArguments a) {
  __shared__ A sums[2][reduce_stripes][reduce_columns];
  const int column = blockIdx.x * reduce_columns + threadIdx.x;
  const int expert = blockIdx.y;
  const int64_t begin = max(static_cast<int64_t>(a.expert_offsets[expert]), int64_t{0});
  const int64_t end = min(static_cast<int64_t>(a.expert_offsets[expert + 1]), a.rows);
  A dweight = 0;
  A dbias = 0;
  if (column < a.width && begin < end) {
    const int64_t plane = plane_size(a.width, a.vector);
    const A* const partials = static_cast<const A*>(a.partials) + place(column, a.width, a.vector);
    const int64_t last = (end - 1) / a.rows_per_block;
    for (int64_t block = begin / a.rows_per_block + threadIdx.y; block <= last; block += reduce_stripes) {
      dweight += partials[(block + expert) * 2 * plane];
      dbias += partials[((block + expert) * 2 + 1) * plane];
    }
  }
  sums[0][threadIdx.y][threadIdx.x] = dweight;
  sums[1][threadIdx.y][threadIdx.x] = dbias;
  __syncthreads();
  if (threadIdx.y < 2 && column < a.width) {
    A sum = 0;
    for (int stripe = 0; stripe < reduce_stripes; ++stripe) sum += sums[threadIdx.y][stripe][threadIdx.x];
    const int64_t at = static_cast<int64_t>(expert) * a.width + column;
    if (threadIdx.y == 0) {
      store_parameter(a.dweight, a.dweight_type, at, sum);
    } else {
      store_parameter(a.dbias, a.dbias_type, at, sum);
    }
  }
}

using Kernel = void (*)(BackwardArguments);

template <class T>
Kernel kernel_for(Span span, Fit fit) {
  if constexpr (std::is_same_v<T, double>) {
    return backward_loop<T, 1>;
  } else {
    static constexpr Kernel resident[2][3] = {
        {backward<T, Span::warp, Fit::exact>, backward<T, Span::warp, Fit::vector>,
         backward<T, Span::warp, Fit::scalar>},
        {backward<T, Span::block, Fit::exact>, backward<T, Span::block, Fit::vector>,
         backward<T, Span::block, Fit::scalar>},
    };
    if (span != Span::loop) return resident[static_cast<int>(span)][static_cast<int>(fit)];
    return fit == Fit::scalar ? backward_loop<T, 1> : backward_loop<T, 16 / static_cast<int>(sizeof(T))>;
  }
}

}  // namespace

Error layer_norm_backward(const Launch& launch, const BackwardArguments& arguments, DType total, Stream stream) {
  const Kernel kernel = total == DType::float64    ? kernel_for<double>(launch.span, launch.fit)
                        : total == DType::bfloat16 ? kernel_for<bfloat16>(launch.span, launch.fit)
                        : total == DType::float16  ? kernel_for<float16>(launch.span, launch.fit)
                                                   : kernel_for<float>(launch.span, launch.fit);
  return launch_kernel(kernel, dim3(launch.blocks), dim3(launch.threads), launch.shared, stream, arguments);
}

Error layer_norm_parameters(const ColumnLaunch& launch, const BackwardArguments& arguments, DType total,
                            Stream stream) {
  const Kernel kernel = total == DType::float64    ? parameters_loop<double>
                        : total == DType::bfloat16 ? parameters_loop<bfloat16>
                        : total == DType::float16  ? parameters_loop<float16>
                                                   : parameters_loop<float>;
  return launch_kernel(kernel, dim3(launch.column_blocks, launch.row_blocks), dim3(reduce_columns, reduce_stripes), 0,
                       stream, arguments);
}

Error layer_norm_reduce(const ReduceArguments& arguments, int experts, bool in_double, Stream stream) {
  const dim3 grid((arguments.width + reduce_columns - 1) / reduce_columns, experts);
  return launch_kernel(in_double ? reduce<double> : reduce<float>, grid, dim3(reduce_columns, reduce_stripes), 0,
                       stream, arguments);
}

}  // namespace beit3_fast::cuda
