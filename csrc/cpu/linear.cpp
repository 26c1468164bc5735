// Linear layers with one weight per expert, forward and backward: the arguments, and the work of each thread.
#include "linear.h"

#include <optional>
#include <tuple>
#include <utility>

#include "arguments.h"
#include "ops.h"

#define BEIT3_KERNEL "linear_tile.h"
#include "foreach_isa.h"

namespace beit3_fast::cpu {
namespace {

using Kernel = void (*)(const ProductTask&, void* scratch);

// Multiply-adds below which a second thread costs more than it saves.
constexpr int64_t work_per_thread = 1024 * 1024;
constexpr int64_t elements_per_thread = 32 * 1024;
constexpr int64_t panel = 64;  // columns of a task, or a multiple: a panel of the widest vectors

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

char* expert_part(const Tensor& stacked, int64_t e) {
  return static_cast<char*>(stacked.mutable_data_ptr()) +
         e * (stacked.numel() / std::max<int64_t>(stacked.size(0), 1)) * stacked.element_size();
}

Kernel kernel_of(ScalarType operands, ScalarType out, Isa isa) {
  const bool wide = out == ScalarType::Float;
  if (operands == ScalarType::Float) return BEIT3_AT(isa, product<float, float>);
  if (operands == ScalarType::BFloat16) {
    return wide ? BEIT3_AT(isa, product<bfloat16, float>) : BEIT3_AT(isa, product<bfloat16, bfloat16>);
  }
  return wide ? BEIT3_AT(isa, product<float16, float>) : BEIT3_AT(isa, product<float16, float16>);
}

// Whether two neighbours along the depth are one word of the multiply-adds.
bool in_pairs(ScalarType operands) { return operands == ScalarType::BFloat16 && native_isa() == Isa::avx512_bf16; }

// Whether the multiply-adds take rows of a as they lie in memory.
bool in_place(const Product& p, ScalarType operands) {
  if (p.a_across || p.a.index != nullptr || p.rows <= few_rows) return false;
  if (operands == ScalarType::Float) return true;
  return in_pairs(operands) && p.depth % 2 == 0 && p.a.stride % 2 == 0 &&
         reinterpret_cast<uintptr_t>(p.a.data) % 4 == 0;
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

// Brings a into the form of the multiply-adds, once for all tasks.
Scratch pack(Product& p, ScalarType operands) {
  p.packed_stride = packed_stride_of(in_pairs(operands) ? (p.depth + 1) / 2 : p.depth);
  Scratch packed(packed_rows_of(p.rows) * p.packed_stride * 4);
  p.packed = packed.get();
  const auto kernel = BEIT3_KERNEL_OF(pack_left, operands);
  const int64_t bands = (p.rows + panel - 1) / panel;  // of columns of a, if across: whole vectors
  const int64_t grain = std::max<int64_t>(1, elements_per_thread / std::max<int64_t>(1, p.depth * panel));
  torch::stable::parallel_for(0, bands, grain, [&](int64_t begin, int64_t end) {
    kernel(p, begin * panel, std::min(end * panel, p.rows) - begin * panel);
  });
  return packed;
}

// Cuts products into tasks and runs them. An element of C is one thread's, and its sum has one order: results do not
// depend on the number of threads.
void run(std::vector<Product> products, ScalarType operands, ScalarType out) {
  std::vector<Scratch> packed;
  int64_t total = 0, deepest = 0;
  for (Product& p : products) {
    total += p.rows * p.columns * std::max<int64_t>(p.depth, 1);
    deepest = std::max(deepest, p.depth);
    if (!in_place(p, operands)) packed.push_back(pack(p, operands));
  }
  if (total == 0) return;
  const int64_t threads =
      std::clamp<int64_t>(total / work_per_thread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));

  std::vector<ProductTask> tasks;
  int64_t cost = 0;
  for (const Product& p : products) {
    // A panel of b and as many rows as leave every thread several tasks: each brings its panel into order anew.
    const int64_t panels = (p.columns + panel - 1) / panel;
    const int64_t cuts = std::clamp<int64_t>(4 * threads / std::max<int64_t>(panels, 1), 1, p.rows / few_rows + 1);
    const int64_t most = packed_rows_of((p.rows + cuts - 1) / cuts);
    for (int64_t column = 0; column < p.columns; column += panel) {
      for (int64_t row = 0; row < p.rows; row += most) {
        const int64_t rows = std::min(most, p.rows - row), columns = std::min(panel, p.columns - column);
        cost += rows * columns * std::max<int64_t>(p.depth, 1);
        tasks.push_back({&p, row, rows, column, columns, cost});
      }
    }
  }
  const Kernel kernel = kernel_of(operands, out, native_isa());
  const auto first_of = [&](int64_t share) {
    const auto before = [](const ProductTask& task, int64_t sum) { return task.cost <= sum; };
    return std::lower_bound(tasks.begin(), tasks.end(), cost / threads * share, before);
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(product_scratch(deepest));
    const auto last = end == threads ? tasks.end() : first_of(end);
    for (auto task = begin == 0 ? tasks.begin() : first_of(begin); task != last; ++task) kernel(*task, scratch.get());
  });
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
  const int64_t panels = (columns + panel - 1) / panel;
  const int64_t grain = std::max<int64_t>(1, elements_per_thread / std::max<int64_t>(1, rows * panel));
  torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    kernel(source, rows, begin * panel, std::min(columns, end * panel) - begin * panel, out);
  });
}

Tensor empty_of(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace

std::tuple<Tensor, Tensor> multiway_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                           const Tensor& expert_offsets, bool gelu,
                                           const std::optional<Tensor>& residual,
                                           const std::optional<Tensor>& row_index, bool save) {
  check_dtype(x);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 3 && weight.size(2) == x.size(1),
                  "weight must have shape (experts, out, ", x.dim() == 2 ? x.size(1) : -1, ")");
  check_operands(weight, "weight", dtype);
  const int64_t rows = x.size(0), experts = weight.size(0), width = weight.size(1);
  const std::vector<int64_t> offsets = read_offsets(expert_offsets, experts, rows);
  const std::vector<int64_t> index = read_index(row_index, rows);
  const Tensor dense_x = with_dense_rows(x), dense_weight = torch::stable::contiguous(weight);
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
  Tensor out = empty_of(x, {rows, width}, out_dtype);
  const bool keep = save && gelu;
  Tensor pre = empty_of(x, keep ? std::vector<int64_t>{rows, width} : std::vector<int64_t>{0}, dtype);

  std::vector<Product> products;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t first = offsets[e], count = offsets[e + 1] - first;
    if (count == 0) continue;
    Product p{};
    p.rows = count, p.columns = width, p.depth = x.size(1);
    p.a = rows_of(dense_x, index, first), p.b = matrix_of(dense_weight, e);
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
  run(products, dtype, out_dtype);
  fill_rows(out, index, offsets.back(), dense_residual ? &*dense_residual : nullptr);
  if (keep) fill_rows(pre, index, offsets.back());
  return {out, pre};
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
  run(std::move(of_x), dtype, dtype);
  run(std::move(of_weight), dtype, dtype);
  if (needs_x) fill_rows(dx, index, offsets.back());
  return {dx, dweight, dbias};
}

}  // namespace beit3_fast::cpu
