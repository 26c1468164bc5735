// Multiway LayerNorm on CUDA devices: what is checked, allocated and launched. The kernels are in layer_norm_*.cu.
#include "layer_norm.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "../tensors.h"
#include "ops.h"

namespace beit3_fast::cuda {
namespace {

constexpr int64_t most_columns = int64_t{1} << 30;
constexpr int64_t most_experts = 65535;

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::Double:
      return DType::float64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

ScalarType scalar_of(DType dtype) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};
  return types[static_cast<int>(dtype)];
}

DType promote(DType a, DType b) {
  if (a == b) return a;
  return a == DType::float64 || b == DType::float64 ? DType::float64 : DType::float32;
}

// Rows of the shape of `like`, on its device.
void check_rows(const Tensor& rows, const char* name, const Tensor& like, const char* like_name) {
  dtype_of(rows, name);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == like.size(0) && rows.size(1) == like.size(1), name,
                  " must have the shape of ", like_name, ", ", shape_of(like), ", got ", shape_of(rows));
}

void check_device(const Tensor& tensor, const char* name, const Tensor& x, const char* x_name) {
  STD_TORCH_CHECK(tensor.device() == x.device(), name, " must be on the device of ", x_name,
                  ", cuda:", x.get_device_index(), ", and is not");
}

void check_x(const Tensor& x, const char* name) {
  dtype_of(x, name);
  STD_TORCH_CHECK(x.is_cuda(), name, " must be on a CUDA device");
  STD_TORCH_CHECK(x.dim() == 2, name, " must have shape (rows, width), got ", shape_of(x));
  STD_TORCH_CHECK(x.size(1) < most_columns, name, " must have fewer than ", most_columns, " columns, got ", x.size(1));
}

void check_parameters(const Tensor& x, const char* x_name, const Tensor& weight, const Tensor& expert_offsets) {
  dtype_of(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), "weight must have shape (experts, ", x.size(1),
                  "), got ", shape_of(weight));
  STD_TORCH_CHECK(weight.size(0) <= most_experts, "weight must be of at most ", most_experts, " experts, got ",
                  weight.size(0));
  check_device(weight, "weight", x, x_name);
  check_offsets(expert_offsets, weight.size(0));
  check_device(expert_offsets, "expert_offsets", x, x_name);
}

// Kernels in fp32 do not read fp64 parameters.
Tensor readable(const Tensor& parameter, DType dtype) {
  const bool narrow = dtype != DType::float64 && parameter.scalar_type() == ScalarType::Double;
  return torch::stable::contiguous(narrow ? converted(parameter, ScalarType::Float) : parameter);
}

// Whether `vector` elements from any multiple of `vector` columns on, 16 bytes at most, are one aligned access.
bool is_aligned(const Tensor& rows, int64_t vector) {
  const int64_t size = rows.element_size();
  const int64_t access = std::min<int64_t>(16, vector * size);
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % access == 0 &&
         (rows.size(0) <= 1 || rows.stride(0) * size % access == 0);
}

bool are_aligned(DType dtype, std::initializer_list<const Tensor*> operands) {
  const int64_t vector = dtype == DType::float32 ? 4 : 8;
  return std::all_of(operands.begin(), operands.end(),
                     [&](const Tensor* operand) { return operand == nullptr || is_aligned(*operand, vector); });
}

int element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// The device of a tensor as the current one, and its stream.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
    check(cuda::multiprocessors(index_, multiprocessors_));
  }

  Stream stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }
  void check(Error error) const { STD_TORCH_CHECK(error == 0, "layer_norm: ", describe(error, index_)); }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_ = nullptr;
  int multiprocessors_ = 0;
};

Tensor zeros(const Tensor& like, int64_t rows, int64_t columns, DType dtype) {
  Tensor result = torch::stable::new_empty(like, {rows, columns}, scalar_of(dtype));
  torch::stable::zero_(result);
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x_given,
                                                      const std::optional<Tensor>& residual_given,
                                                      const Tensor& weight_given, const Tensor& bias_given,
                                                      const Tensor& expert_offsets, double eps) {
  check_x(x_given, "x");
  if (residual_given) {
    check_rows(*residual_given, "residual", x_given, "x");
    check_device(*residual_given, "residual", x_given, "x");
  }
  check_parameters(x_given, "x", weight_given, expert_offsets);
  check_rows(bias_given, "bias", weight_given, "weight");
  check_device(bias_given, "bias", x_given, "x");

  // What no kernel reads directly is converted first. A sum has no order, so of two types the narrower is called x.
  Tensor x = x_given;
  std::optional<Tensor> residual = residual_given;
  DType dtype = dtype_of(x, "x");
  if (residual) {
    dtype = promote(dtype, dtype_of(*residual, "residual"));
    if (x.scalar_type() == scalar_of(dtype)) std::swap(x, *residual);
    residual = with_dense_rows(converted(*residual, scalar_of(dtype)));
  }
  if (dtype == DType::float64) x = converted(x, ScalarType::Double);
  x = with_dense_rows(x);
  const Tensor weight = readable(weight_given, dtype);
  const Tensor bias = readable(bias_given, dtype);
  const Tensor offsets = torch::stable::contiguous(expert_offsets);

  const Device device(x);
  const int64_t rows = x.size(0);
  const int64_t width = x.size(1);
  const ScalarType wide = scalar_of(dtype == DType::float64 ? DType::float64 : DType::float32);
  Tensor y = torch::stable::new_empty(x, {rows, width}, scalar_of(dtype));
  Tensor total = residual ? torch::stable::new_empty(x, {rows, width}, scalar_of(dtype))
                          : torch::stable::new_empty(x, {0}, scalar_of(dtype));
  Tensor mean = torch::stable::new_empty(x, {rows}, wide);
  Tensor rstd = torch::stable::new_empty(x, {rows}, wide);
  if (rows == 0) return {y, total, mean, rstd};
  if (width == 0) return {y, total, torch::stable::zero_(mean), torch::stable::zero_(rstd)};

  const bool aligned = are_aligned(dtype, {&x, residual ? &*residual : nullptr, &weight, &bias});
  const Launch launch = launch_rows(static_cast<int>(width), rows, element_size(dtype), aligned,
                                    device.multiprocessors(), /*backward=*/false);
  ForwardArguments arguments{};
  arguments.x = x.const_data_ptr();
  arguments.residual = residual ? residual->const_data_ptr() : nullptr;
  arguments.weight = weight.const_data_ptr();
  arguments.bias = bias.const_data_ptr();
  arguments.expert_offsets = offsets.const_data_ptr<int32_t>();
  arguments.y = y.mutable_data_ptr();
  arguments.total = residual ? total.mutable_data_ptr() : nullptr;
  arguments.mean = mean.mutable_data_ptr();
  arguments.rstd = rstd.mutable_data_ptr();
  arguments.rows = rows;
  arguments.x_stride = x.stride(0);
  arguments.residual_stride = residual ? residual->stride(0) : 0;
  arguments.eps = eps;
  arguments.width = static_cast<int32_t>(width);
  arguments.experts = static_cast<int32_t>(weight.size(0));
  arguments.rows_per_block = launch.rows_per_block;
  arguments.weight_type = dtype_of(weight, "weight");
  arguments.bias_type = dtype_of(bias, "bias");
  device.check(layer_norm_forward(launch, arguments, dtype_of(x, "x"), dtype, device.stream()));
  return {y, total, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy_given, const Tensor& total_given,
                                                       const Tensor& weight_given, const Tensor& expert_offsets,
                                                       const Tensor& mean_given, const Tensor& rstd_given,
                                                       const std::optional<Tensor>& dresidual_given) {
  check_x(total_given, "total");
  check_rows(dy_given, "dy", total_given, "total");
  check_device(dy_given, "dy", total_given, "total");
  if (dresidual_given) {
    check_rows(*dresidual_given, "dresidual", total_given, "total");
    check_device(*dresidual_given, "dresidual", total_given, "total");
  }
  check_parameters(total_given, "total", weight_given, expert_offsets);
  const DType dtype = dtype_of(total_given, "total");
  const DType wide = dtype == DType::float64 ? DType::float64 : DType::float32;
  const int64_t rows = total_given.size(0);
  const int64_t width = total_given.size(1);
  for (const auto& [statistic, name] : {std::pair(&mean_given, "mean"), std::pair(&rstd_given, "rstd")}) {
    STD_TORCH_CHECK(statistic->dim() == 1 && statistic->size(0) == rows && statistic->scalar_type() == scalar_of(wide),
                    name, " must be ", scalar_of(wide), " of shape (", rows, ",), got ", statistic->scalar_type(), " ",
                    shape_of(*statistic));
    check_device(*statistic, name, total_given, "total");
  }

  const Tensor total = with_dense_rows(total_given);
  const Tensor dy = with_dense_rows(converted(dy_given, scalar_of(dtype)));
  std::optional<Tensor> dresidual;
  if (dresidual_given) dresidual = with_dense_rows(converted(*dresidual_given, scalar_of(dtype)));
  const Tensor weight = readable(weight_given, dtype);
  const Tensor offsets = torch::stable::contiguous(expert_offsets);
  const Tensor mean = torch::stable::contiguous(mean_given);
  const Tensor rstd = torch::stable::contiguous(rstd_given);
  const DType weight_type = dtype_of(weight_given, "weight");
  const int64_t experts = weight.size(0);

  const Device device(total);
  Tensor dtotal = torch::stable::new_empty(total, {rows, width}, scalar_of(dtype));
  if (rows == 0 || width == 0) {
    return {dtotal, zeros(weight, experts, width, weight_type), zeros(weight, experts, width, weight_type)};
  }
  const bool aligned = are_aligned(dtype, {&dy, &total, dresidual ? &*dresidual : nullptr, &weight});
  const Launch launch = launch_rows(static_cast<int>(width), rows, element_size(dtype), aligned,
                                    device.multiprocessors(), /*backward=*/true);
  const bool loops = launch.span == Span::loop;
  const ColumnLaunch columns = launch_columns(static_cast<int>(width), rows);
  const int64_t row_blocks = loops ? columns.row_blocks : launch.blocks;
  const int vector = loops ? 1 : launch.vector;
  Tensor partials = torch::stable::new_empty(
      total, {row_blocks + experts - 1, 2, plane_size(static_cast<unsigned>(width), vector)}, scalar_of(wide));
  Tensor dweight = torch::stable::new_empty(weight, {experts, width}, scalar_of(weight_type));
  Tensor dbias = torch::stable::new_empty(weight, {experts, width}, scalar_of(weight_type));

  BackwardArguments arguments{};
  arguments.dy = dy.const_data_ptr();
  arguments.total = total.const_data_ptr();
  arguments.dresidual = dresidual ? dresidual->const_data_ptr() : nullptr;
  arguments.weight = weight.const_data_ptr();
  arguments.expert_offsets = offsets.const_data_ptr<int32_t>();
  arguments.mean = mean.const_data_ptr();
  arguments.rstd = rstd.const_data_ptr();
  arguments.dtotal = dtotal.mutable_data_ptr();
  arguments.partials = partials.mutable_data_ptr();
  arguments.rows = rows;
  arguments.dy_stride = dy.stride(0);
  arguments.total_stride = total.stride(0);
  arguments.dresidual_stride = dresidual ? dresidual->stride(0) : 0;
  arguments.width = static_cast<int32_t>(width);
  arguments.experts = static_cast<int32_t>(experts);
  arguments.rows_per_block = launch.rows_per_block;
  arguments.weight_type = dtype_of(weight, "weight");
  device.check(cuda::layer_norm_backward(launch, arguments, dtype, device.stream()));
  if (loops) {
    arguments.rows_per_block = columns.rows_per_block;
    device.check(layer_norm_parameters(columns, arguments, dtype, device.stream()));
  }

  ReduceArguments reduction{};
  reduction.partials = partials.const_data_ptr();
  reduction.expert_offsets = offsets.const_data_ptr<int32_t>();
  reduction.dweight = dweight.mutable_data_ptr();
  reduction.dbias = dbias.mutable_data_ptr();
  reduction.rows = rows;
  reduction.width = static_cast<int32_t>(width);
  reduction.vector = vector;
  reduction.rows_per_block = arguments.rows_per_block;
  reduction.dweight_type = weight_type;
  reduction.dbias_type = weight_type;
  if (experts > 0) {
    device.check(layer_norm_reduce(reduction, static_cast<int>(experts), dtype == DType::float64, device.stream()));
  }
  return {dtotal, dweight, dbias};
}

}  // namespace beit3_fast::cuda
