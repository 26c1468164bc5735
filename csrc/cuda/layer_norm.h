// The LayerNorm kernels as the host sees them. Nothing here knows of torch or CUDA.
#pragma once

#include <cstdint>

#include "device.h"
#include "launch.h"

namespace beit3_fast::cuda {

enum class DType : int { float32, bfloat16, float16, float64 };

// Rows lie `*_stride` elements apart; outputs are dense. A parameter row is `width` elements.
struct ForwardArguments {
  const void* x;
  const void* residual;  // or null; of the type of total
  const void* weight;
  const void* bias;
  const int32_t* expert_offsets;
  void* y;
  void* total;  // written where there is a residual
  void* mean;   // fp32; fp64 for fp64 rows
  void* rstd;
  int64_t rows;
  int64_t x_stride;
  int64_t residual_stride;
  double eps;
  int32_t width;
  int32_t experts;
  int32_t rows_per_block;
  DType weight_type;
  DType bias_type;
};

struct BackwardArguments {
  const void* dy;
  const void* total;
  const void* dresidual;  // or null: added to the gradient of the rows
  const void* weight;
  const int32_t* expert_offsets;
  const void* mean;
  const void* rstd;
  void* dtotal;
  void* partials;  // see ReduceArguments
  int64_t rows;
  int64_t dy_stride;
  int64_t total_stride;
  int64_t dresidual_stride;
  int32_t width;
  int32_t experts;
  int32_t rows_per_block;
  DType weight_type;
};

// Block b of the backward kernel leaves what the rows of expert e add to the gradients in slot b + e, which no other
// pair of a block and an expert it meets shares: rows are in expert order. A slot is a plane for the weight, then one
// for the bias. Slots that nobody writes are not read.
struct ReduceArguments {
  const void* partials;
  const int32_t* expert_offsets;
  void* dweight;
  void* dbias;
  int64_t rows;
  int32_t width;
  int32_t vector;
  int32_t rows_per_block;
  DType dweight_type;
  DType dbias_type;
};

// One launch each; the error is that of the launch. x and residual of the types (T, T), or x bfloat16 or float16 and
// residual and total float32.
Error layer_norm_forward(const Launch& launch, const ForwardArguments& arguments, DType x, DType total, Stream stream);
Error layer_norm_backward(const Launch& launch, const BackwardArguments& arguments, DType total, Stream stream);
// For Span::loop, whose backward kernel leaves no partial sums.
Error layer_norm_parameters(const ColumnLaunch& launch, const BackwardArguments& arguments, DType total, Stream stream);
Error layer_norm_reduce(const ReduceArguments& arguments, int experts, bool in_double, Stream stream);

}  // namespace beit3_fast::cuda
