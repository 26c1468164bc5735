// Multiway LayerNorm backward. The gradients of weight and bias are summed over blocks of rows, then over blocks: the
// blocks follow from the shapes alone, so the result does not depend on the number of threads.
#include <optional>
#include <tuple>

#include "arguments.h"
#include "ops.h"

#define BEIT3_KERNEL "layer_norm_gradient_row.h"
#include "foreach_isa.h"

namespace beit3_fast::cpu {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t least_block = 32, most_blocks = 64;  // of rows; of an expert

// Rows of one expert whose parameter gradients are summed together.
struct Block {
  int64_t expert, first, end;
};

std::vector<Block> blocks_of(const std::vector<int64_t>& offsets) {
  std::vector<Block> blocks;
  for (size_t e = 0; e + 1 < offsets.size(); ++e) {
    const int64_t rows = offsets[e + 1] - offsets[e];
    const int64_t size = std::max(least_block, (rows + most_blocks - 1) / most_blocks);
    for (int64_t first = offsets[e]; first < offsets[e + 1]; first += size) {
      blocks.push_back({static_cast<int64_t>(e), first, std::min(first + size, offsets[e + 1])});
    }
  }
  return blocks;
}

template <class T>
Outputs run(const Tensor& dy, const Tensor& total, const Tensor& weight, const std::vector<int64_t>& offsets,
            const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& dresidual) {
  using A = accumulate_t<T>;
  const int64_t rows = total.size(0), width = total.size(1), experts = weight.size(0);
  const bool as_stored = weight.scalar_type() == dtype_of<T>;
  const Tensor weights = torch::stable::contiguous(as_stored ? weight : converted(weight, dtype_of<A>));
  const Tensor upstream = torch::stable::contiguous(dy), values = torch::stable::contiguous(total);
  const Tensor means = torch::stable::contiguous(mean), rstds = torch::stable::contiguous(rstd);
  const Tensor past = dresidual ? torch::stable::contiguous(*dresidual) : Tensor();
  const Tensor dtotal = torch::stable::new_empty(total, {rows, width}, dtype_of<T>);
  const Isa isa = native_isa();
  const auto kernel = as_stored ? BEIT3_AT(isa, row_gradient<T, T>) : BEIT3_AT(isa, row_gradient<T, A>);

  const std::vector<Block> blocks = blocks_of(offsets);
  const int64_t padded = (width + 63) / 64 * 64;
  const int64_t count = static_cast<int64_t>(blocks.size());
  const Scratch sums(std::max<int64_t>(count, 1) * 2 * padded * sizeof(A));
  const T* const dy_data = static_cast<const T*>(upstream.const_data_ptr());
  const T* const t_data = static_cast<const T*>(values.const_data_ptr());
  const T* const past_data = dresidual ? static_cast<const T*>(past.const_data_ptr()) : nullptr;
  const char* const weight_data = static_cast<const char*>(weights.const_data_ptr());
  const A* const mean_data = static_cast<const A*>(means.const_data_ptr());
  const A* const rstd_data = static_cast<const A*>(rstds.const_data_ptr());
  T* const out = static_cast<T*>(dtotal.mutable_data_ptr());

  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      A* const block_sums = sums.get<A>() + b * 2 * padded;
      std::fill_n(block_sums, 2 * padded, A{0});
      const char* const expert_weight = weight_data + blocks[b].expert * width * weights.element_size();
      for (int64_t r = blocks[b].first; r < blocks[b].end; ++r) {
        const int64_t at = r * width;
        kernel(dy_data + at, t_data + at, expert_weight, past_data == nullptr ? nullptr : past_data + at, mean_data[r],
               rstd_data[r], out + at, block_sums, block_sums + padded, width);
      }
    }
  });
  // rows that no expert owns do not depend on the norm
  const int64_t used = offsets.back() * width;
  if (past_data != nullptr) {
    std::copy(past_data + used, past_data + rows * width, out + used);
  } else {
    std::fill(out + used, out + rows * width, T{});
  }

  Tensor gradients[2];
  for (int64_t which = 0; which < 2; ++which) {
    const Tensor summed = torch::stable::new_empty(weight, {experts, width}, dtype_of<A>);
    A* const data = static_cast<A*>(summed.mutable_data_ptr());
    std::fill_n(data, experts * width, A{0});
    for (int64_t b = 0; b < count; ++b) {
      const A* const from = sums.get<A>() + (2 * b + which) * padded;
      A* const to = data + blocks[b].expert * width;
      for (int64_t i = 0; i < width; ++i) to[i] += from[i];
    }
    gradients[which] = converted(summed, weight.scalar_type());
  }
  return {dtotal, gradients[0], gradients[1]};
}

}  // namespace

Outputs layer_norm_backward(const Tensor& dy, const Tensor& total, const Tensor& weight, const Tensor& expert_offsets,
                            const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& dresidual) {
  STD_TORCH_CHECK(total.dim() == 2, "total must have shape (rows, width), got ", shape_of(total));
  const int64_t rows = total.size(0), width = total.size(1);
  const ScalarType dtype = total.scalar_type();
  const auto check_rows = [&](const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(
        tensor.scalar_type() == dtype && tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == width, name,
        " must have the shape and dtype of total, ", shape_of(total), " ", dtype, ", got ", shape_of(tensor), " ",
        tensor.scalar_type());
  };
  check_rows(dy, "dy");
  if (dresidual) check_rows(*dresidual, "dresidual");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == width, "weight must have shape (experts, ", width, "), got ",
                  shape_of(weight));
  const ScalarType wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      mean.numel() == rows && rstd.numel() == rows && mean.scalar_type() == wide && rstd.scalar_type() == wide,
      "mean and rstd must be ", wide, " of shape (", rows, ",)");
  const std::vector<int64_t> offsets = read_offsets(expert_offsets, weight.size(0), rows);
  switch (dtype) {
    case ScalarType::Double:
      return run<double>(dy, total, weight, offsets, mean, rstd, dresidual);
    case ScalarType::BFloat16:
      return run<bfloat16>(dy, total, weight, offsets, mean, rstd, dresidual);
    case ScalarType::Half:
      return run<float16>(dy, total, weight, offsets, mean, rstd, dresidual);
    case ScalarType::Float:
      return run<float>(dy, total, weight, offsets, mean, rstd, dresidual);
    default:
      STD_TORCH_CHECK(false, "total must be float32, float64, bfloat16 or float16, got ", dtype);
  }
}

}  // namespace beit3_fast::cpu
