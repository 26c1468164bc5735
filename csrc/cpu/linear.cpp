// Linear layers with one weight per expert, forward and backward.
#include "linear.h"

#include <optional>
#include <tuple>
#include <utility>

#include "arguments.h"
#include "forward.h"
#include "ops.h"
#include "products.h"

#define BEIT3_KERNEL "linear_tile.h"
#include "foreach_isa.h"

namespace beit3_fast::cpu {
namespace {

std::vector<int64_t> read_index(const std::optional<Tensor>& row_index, int64_t rows) {
  if (!row_index) return {};
  const Tensor dense = torch::stable::contiguous(torch::stable::to(*row_index, ScalarType::Long));
  const int64_t* const first = dense.const_data_ptr<int64_t>();
  std::vector<int64_t> index(first, first + dense.numel());
  STD_TORCH_CHECK(static_cast<int64_t>(index.size()) == rows, "row_index must have one entry for each row of x");
  STD_TORCH_CHECK(std::all_of(index.begin(), index.end(), [&](int64_t r) { return r >= 0 && r < rows; }),
                  "row_index must lie in [0, ", rows, ")");
  return index;
}

// The rows of `tensor` from `first` on, through `index` if it is not empty.
RowSource rows_of(const Tensor& tensor, const std::vector<int64_t>& index, int64_t first) {
  const int64_t stride = tensor.size(0) > 1 ? tensor.stride(0) : tensor.size(1);
  const char* const data = static_cast<const char*>(tensor.const_data_ptr());
  if (!index.empty()) return {data, stride, index.data() + first};
  return {data + first * stride * tensor.element_size(), stride, nullptr};
}

// The rows of expert `e` of stacked matrices.
RowSource matrix_of(const Tensor& stacked, int64_t e) {
  const int64_t elements = stacked.size(1) * stacked.size(2);
  return {static_cast<const char*>(stacked.const_data_ptr()) + e * elements * stacked.element_size(), stacked.size(2),
          nullptr};
}

void check_operands(const Tensor& tensor, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must have the dtype of x, ", dtype, ", got ",
                  tensor.scalar_type());
}

void check_dtype(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "x must be float32, bfloat16 or float16, got ", dtype);
}

// What no expert computes, the rows from `first` on: zeros, or the rows of `source`.
void fill_rows(const Tensor& tensor, const std::vector<int64_t>& index, int64_t first, const Tensor* source = nullptr) {
  const int64_t bytes = tensor.size(1) * tensor.element_size();
  char* const data = static_cast<char*>(tensor.mutable_data_ptr());
  const char* const from = source == nullptr ? nullptr : static_cast<const char*>(source->const_data_ptr());
  for (int64_t r = first; r < tensor.size(0); ++r) {
    const int64_t at = (index.empty() ? r : index[r]) * bytes;
    if (from == nullptr) {
      std::fill_n(data + at, bytes, 0);
    } else {
      std::copy_n(from + at, bytes, data + at);
    }
  }
}

Tensor before_gelu(const Tensor& dy, const Tensor& pre) {
  Tensor out = torch::stable::empty_like(dy);
  const auto kernel = BEIT3_KERNEL_OF(gelu_gradient, dy.scalar_type());
  const int64_t bytes = dy.element_size();
  torch::stable::parallel_for(0, dy.numel(), elements_per_thread, [&](int64_t begin, int64_t end) {
    const auto at = [&](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()) + begin * bytes; };
    kernel(at(dy), at(pre), static_cast<char*>(out.mutable_data_ptr()) + begin * bytes, end - begin);
  });
  return out;
}

void sum_columns(const RowSource& source, int64_t rows, int64_t columns, ScalarType dtype, void* out) {
  const auto kernel = BEIT3_KERNEL_OF(sum_rows, dtype);
  constexpr int64_t band = widest_panel;
  const int64_t bands = (columns + band - 1) / band;
  const int64_t grain = std::max<int64_t>(1, elements_per_thread / std::max<int64_t>(1, rows * band));
  torch::stable::parallel_for(0, bands, grain, [&](int64_t begin, int64_t end) {
    kernel(source, rows, begin * band, std::min(columns, end * band) - begin * band, out);
  });
}

Tensor empty_of(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Weights& weights, const std::optional<Tensor>& bias,
                                          const std::vector<int64_t>& offsets, bool gelu,
                                          const std::optional<Tensor>& residual, const std::vector<int64_t>& index,
                                          bool save, const std::optional<Tensor>& into) {
  check_dtype(x);
  const ScalarType dtype = x.scalar_type();
  const int64_t rows = x.size(0), experts = weights.experts, width = weights.width;
  const Tensor dense_x = with_dense_rows(x);
  std::optional<Tensor> dense_bias, dense_residual;
  if (bias) {
    check_operands(*bias, "bias", dtype);
    STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == experts && bias->size(1) == width, "bias must have shape (",
                    experts, ", ", width, ")");
    dense_bias = torch::stable::contiguous(*bias);
  }
  ScalarType out_dtype = dtype;
  if (residual) {
    STD_TORCH_CHECK(residual->dim() == 2 && residual->size(0) == rows && residual->size(1) == width,
                    "residual must have shape (", rows, ", ", width, ")");
    if (residual->scalar_type() != dtype) out_dtype = ScalarType::Float;
    dense_residual = torch::stable::contiguous(torch::stable::to(*residual, out_dtype));
  }
  Tensor out = into ? *into : empty_of(x, {rows, width}, out_dtype);
  const bool keep = save && gelu;
  Tensor pre = empty_of(x, keep ? std::vector<int64_t>{rows, width} : std::vector<int64_t>{0}, dtype);

  std::vector<Product> products;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t first = offsets[e], count = offsets[e + 1] - first;
    if (count == 0) continue;
    Product p{};
    p.rows = count, p.columns = width, p.depth = x.size(1);
    p.a = rows_of(dense_x, index, first);
    weights.set(p, e);
    p.bias = dense_bias ? expert_part(*dense_bias, e) : nullptr;
    p.gelu = gelu;
    p.out_stride = width;
    const int64_t skipped = index.empty() ? first * width : 0;
    const auto part = [&](const Tensor& t) {
      return static_cast<char*>(t.mutable_data_ptr()) + skipped * t.element_size();
    };
    p.out_index = index.empty() ? nullptr : index.data() + first;
    p.pre = keep ? part(pre) : nullptr;
    p.residual = dense_residual ? part(*dense_residual) : nullptr;
    p.out = part(out);
    products.push_back(p);
  }
  run_products(std::move(products), dtype, out_dtype);
  fill_rows(out, index, offsets.back(), dense_residual ? &*dense_residual : nullptr);
  if (keep) fill_rows(pre, index, offsets.back());
  return {out, pre};
}

std::tuple<Tensor, Tensor> multiway_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                           const Tensor& expert_offsets, bool gelu,
                                           const std::optional<Tensor>& residual,
                                           const std::optional<Tensor>& row_index, bool save) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 3 && weight.size(2) == x.size(1),
                  "weight must have shape (experts, out, ", x.dim() == 2 ? x.size(1) : -1, ")");
  check_dtype(x);
  check_operands(weight, "weight", x.scalar_type());
  const Tensor dense = torch::stable::contiguous(weight);
  const Weights weights{weight.size(0), weight.size(1), [&](Product& p, int64_t e) { p.b = matrix_of(dense, e); }};
  const std::vector<int64_t> offsets = read_offsets(expert_offsets, weights.experts, x.size(0));
  const std::vector<int64_t> index = read_index(row_index, x.size(0));
  return linear_forward(x, weights, bias, offsets, gelu, residual, index, save, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> multiway_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                            const Tensor& expert_offsets,
                                                            const std::optional<Tensor>& pre_activation,
                                                            const std::optional<Tensor>& row_index, bool needs_x,
                                                            bool needs_parameters) {
  check_dtype(x);
  const ScalarType dtype = x.scalar_type();
  check_operands(dy, "dy", dtype);
  check_operands(weight, "weight", dtype);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 3 && weight.size(2) == x.size(1) && dy.dim() == 2 &&
                      dy.size(0) == x.size(0) && dy.size(1) == weight.size(1),
                  "x, weight and dy must have shapes (rows, in), (experts, out, in) and (rows, out)");
  const int64_t rows = x.size(0), experts = weight.size(0), out_width = weight.size(1), in_width = weight.size(2);
  const std::vector<int64_t> offsets = read_offsets(expert_offsets, experts, rows);
  const std::vector<int64_t> index = read_index(row_index, rows);
  const Tensor dense_x = with_dense_rows(x), dense_weight = torch::stable::contiguous(weight);
  Tensor upstream = with_dense_rows(dy);
  if (pre_activation) {
    check_operands(*pre_activation, "pre_activation", dtype);
    upstream = torch::stable::contiguous(upstream);
    upstream = before_gelu(upstream, torch::stable::contiguous(*pre_activation));
  }

  Tensor dx = empty_of(x, needs_x ? std::vector<int64_t>{rows, in_width} : std::vector<int64_t>{0}, dtype);
  Tensor dweight = empty_of(
      weight, needs_parameters ? std::vector<int64_t>{experts, out_width, in_width} : std::vector<int64_t>{0}, dtype);
  Tensor dbias =
      empty_of(weight, needs_parameters ? std::vector<int64_t>{experts, out_width} : std::vector<int64_t>{0}, dtype);

  std::vector<Product> of_x, of_weight;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t first = offsets[e], count = offsets[e + 1] - first;
    const RowSource dy_rows = rows_of(upstream, index, first);
    if (needs_x && count > 0) {
      Product p{};
      p.rows = count, p.columns = in_width, p.depth = out_width;
      p.a = dy_rows, p.b = matrix_of(dense_weight, e), p.b_across = true;
      p.out = static_cast<char*>(dx.mutable_data_ptr()) + (index.empty() ? first * in_width * dx.element_size() : 0);
      p.out_stride = in_width, p.out_index = index.empty() ? nullptr : index.data() + first;
      of_x.push_back(p);
    }
    if (needs_parameters) {  // without rows: sums of nothing, zeros
      Product p{};
      p.rows = out_width, p.columns = in_width, p.depth = count;
      p.a = dy_rows, p.b = rows_of(dense_x, index, first), p.a_across = p.b_across = true;
      p.out = expert_part(dweight, e), p.out_stride = in_width;
      of_weight.push_back(p);
      sum_columns(dy_rows, count, out_width, dtype, expert_part(dbias, e));
    }
  }
  run_products(std::move(of_x), dtype, dtype);
  run_products(std::move(of_weight), dtype, dtype);
  if (needs_x) fill_rows(dx, index, offsets.back());
  return {dx, dweight, dbias};
}

}  // namespace beit3_fast::cpu
