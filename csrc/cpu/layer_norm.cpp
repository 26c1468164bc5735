// Multiway LayerNorm forward, with the residual addition fused into it.
#include <optional>
#include <tuple>
#include <utility>

#include "arguments.h"
#include "forward.h"
#include "ops.h"

#define BEIT3_KERNEL "layer_norm_row.h"
#include "foreach_isa.h"

namespace beit3_fast::cpu {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Below this many elements a second thread costs more than it saves.
constexpr int64_t elements_per_task = 32 * 1024;

bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

void check_floating(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_floating(tensor.scalar_type()), name, " must be float32, float64, bfloat16 or float16, got ",
                  tensor.scalar_type());
}

void check_arguments(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& bias) {
  check_floating(x, "x");
  STD_TORCH_CHECK(x.dim() == 2, "x must have shape (rows, width), got ", shape_of(x));
  if (residual) {
    check_floating(*residual, "residual");
    STD_TORCH_CHECK(residual->dim() == 2 && residual->size(0) == x.size(0) && residual->size(1) == x.size(1),
                    "residual must have the shape of x, ", shape_of(x), ", got ", shape_of(*residual));
  }
  check_floating(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), "weight must have shape (experts, ", x.size(1),
                  "), got ", shape_of(weight));
  check_floating(bias, "bias");
  STD_TORCH_CHECK(bias.dim() == 2 && bias.size(0) == weight.size(0) && bias.size(1) == weight.size(1),
                  "bias must have the shape of weight, ", shape_of(weight), ", got ", shape_of(bias));
}

ScalarType promote(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A matrix as bytes: what is needed to walk its rows without knowing its type.
struct Rows {
  const char* data;
  int64_t stride;  // bytes

  explicit Rows(const Tensor& tensor)
      : data(static_cast<const char*>(tensor.const_data_ptr())),
        stride(tensor.stride(0) * static_cast<int64_t>(tensor.element_size())) {}
  Rows() : data(nullptr), stride(0) {}

  const char* operator[](int64_t row) const { return data + row * stride; }  // null stays null: its stride is 0
};

template <class A>
using RowStatistics = const A* (*)(const void* x, const void* residual, void* total, A* scratch, int64_t width, A eps,
                                   A* mean, A* rstd);

template <class A>
using RowAffine = void (*)(const A* values, A mean, A rstd, const void* weight, const void* bias, void* y,
                           int64_t width);

// The kernel for t of type T. float32 can also be the sum of a half-precision x and a float32 residual.
template <class T>
RowStatistics<accumulate_t<T>> statistics_kernel(ScalarType x, bool has_residual, Isa isa) {
  if (!has_residual) return BEIT3_AT(isa, row_statistics<T, none, T>);
  if constexpr (std::is_same_v<T, float>) {
    if (x == ScalarType::BFloat16) return BEIT3_AT(isa, row_statistics<bfloat16, float, float>);
    if (x == ScalarType::Half) return BEIT3_AT(isa, row_statistics<float16, float, float>);
  }
  return BEIT3_AT(isa, row_statistics<T, T, T>);
}

template <class T>
RowAffine<accumulate_t<T>> affine_kernel(ScalarType weight, Isa isa) {
  return weight == dtype_of<T> ? BEIT3_AT(isa, row_affine<T, T>) : BEIT3_AT(isa, row_affine<T, accumulate_t<T>>);
}

// T is the type of t and y.
template <class T>
Outputs run(Tensor x, std::optional<Tensor> residual, Tensor weight, Tensor bias, const std::vector<int64_t>& offsets,
            double eps) {
  using A = accumulate_t<T>;
  // What no kernel reads directly is converted first. A sum has no order, so of two types the narrower is called x.
  if (residual && x.scalar_type() == dtype_of<A>) std::swap(x, *residual);
  if (residual) residual = converted(*residual, dtype_of<T>);
  if (!residual || std::is_same_v<T, double>) x = converted(x, dtype_of<T>);
  const bool as_stored = weight.scalar_type() == dtype_of<T> && bias.scalar_type() == dtype_of<T>;
  weight = torch::stable::contiguous(converted(weight, as_stored ? dtype_of<T> : dtype_of<A>));
  bias = torch::stable::contiguous(converted(bias, as_stored ? dtype_of<T> : dtype_of<A>));
  x = with_dense_rows(x);
  if (residual) residual = with_dense_rows(*residual);

  const int64_t rows = x.size(0);
  const int64_t width = x.size(1);
  Tensor y = torch::stable::new_empty(x, {rows, width}, dtype_of<T>);
  Tensor total = residual ? torch::stable::new_empty(x, {rows, width}, dtype_of<T>)
                          : torch::stable::new_empty(x, {0}, dtype_of<T>);
  Tensor mean = torch::stable::new_empty(x, {rows}, dtype_of<A>);
  Tensor rstd = torch::stable::new_empty(x, {rows}, dtype_of<A>);

  const Isa isa = native_isa();
  const auto statistics = statistics_kernel<T>(x.scalar_type(), residual.has_value(), isa);
  const auto affine = affine_kernel<T>(weight.scalar_type(), isa);
  const Rows x_rows(x), weight_rows(weight), bias_rows(bias);
  const Rows residual_rows = residual ? Rows(*residual) : Rows();
  T* const y_data = static_cast<T*>(y.mutable_data_ptr());
  T* const total_data = residual ? static_cast<T*>(total.mutable_data_ptr()) : nullptr;
  A* const mean_data = static_cast<A*>(mean.mutable_data_ptr());
  A* const rstd_data = static_cast<A*>(rstd.mutable_data_ptr());

  const int64_t rows_per_task = std::max<int64_t>(1, elements_per_task / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows, rows_per_task, [&](int64_t begin, int64_t end) {
    const Scratch scratch(width * sizeof(A));
    int64_t expert = 0;
    for (int64_t r = begin; r < end; ++r) {
      const bool routed = r < offsets.back();
      const A* values = nullptr;
      if (routed || residual) {  // total is x + residual everywhere, also in the rows that no expert owns
        values = statistics(x_rows[r], residual_rows[r], total_data + (residual ? r * width : 0), scratch.get<A>(),
                            width, static_cast<A>(eps), mean_data + r, rstd_data + r);
      }
      if (routed) {
        while (r >= offsets[expert + 1]) ++expert;
        affine(values, mean_data[r], rstd_data[r], weight_rows[expert], bias_rows[expert], y_data + r * width, width);
      } else {
        std::fill_n(y_data + r * width, width, T{});
        mean_data[r] = rstd_data[r] = 0;
      }
    }
  });
  return {y, total, mean, rstd};
}

Outputs run(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& bias,
            const std::vector<int64_t>& offsets, double eps) {
  switch (residual ? promote(x.scalar_type(), residual->scalar_type()) : x.scalar_type()) {
    case ScalarType::Double:
      return run<double>(x, residual, weight, bias, offsets, eps);
    case ScalarType::BFloat16:
      return run<bfloat16>(x, residual, weight, bias, offsets, eps);
    case ScalarType::Half:
      return run<float16>(x, residual, weight, bias, offsets, eps);
    default:
      return run<float>(x, residual, weight, bias, offsets, eps);
  }
}

}  // namespace

Outputs layer_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& bias,
                   const Tensor& expert_offsets, double eps) {
  check_arguments(x, residual, weight, bias);
  return run(x, residual, weight, bias, read_offsets(expert_offsets, weight.size(0), x.size(0)), eps);
}

Tensor normalized(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::vector<int64_t>& offsets,
                  double eps) {
  check_arguments(x, std::nullopt, weight, bias);
  return std::get<0>(run(x, std::nullopt, weight, bias, offsets, eps));
}

}  // namespace beit3_fast::cpu
