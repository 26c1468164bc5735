// Inference with weights that are stored as the products read them: linear layers and the feed-forward block.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "forward.h"
#include "ops.h"
#include "products.h"

namespace beit3_fast::cpu {
namespace {

// Words of `weight` as pack_weight and quantize_weight return it: of one, two or four neighbours along the depth.
Weights packed_weights(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scales, const char* name) {
  const ScalarType dtype = scales ? ScalarType::Char : x.scalar_type();
  const int64_t in_word = scales ? 4 : dtype == ScalarType::BFloat16 ? 2 : 1;
  STD_TORCH_CHECK(x.dim() == 2 && weight.scalar_type() == dtype && weight.dim() == (in_word == 1 ? 4 : 5) &&
                      weight.size(2) * in_word == x.size(1) && weight.size(3) == widest_panel &&
                      (in_word == 1 || weight.size(4) == in_word),
                  name, " must be packed for the ", x.dim() == 2 ? x.size(1) : -1, " columns of x and its dtype, got ",
                  weight.scalar_type(), " ", shape_of(weight));
  const int64_t experts = weight.size(0), width = weight.size(1) * widest_panel;
  std::optional<Tensor> dense_scales;
  if (scales) {
    STD_TORCH_CHECK(scales->scalar_type() == ScalarType::Float && scales->dim() == 3 && scales->size(0) == experts &&
                        scales->size(1) == 2 && scales->size(2) == width,
                    "the scales of ", name, " must be float32 of shape (", experts, ", 2, ", width, "), got ",
                    shape_of(*scales));
    dense_scales = torch::stable::contiguous(*scales);
  }
  const Tensor dense = torch::stable::contiguous(weight);
  return {experts, width, [dense, dense_scales](Product& p, int64_t e) {
            p.panels = expert_part(dense, e);
            if (dense_scales) p.column_scales = reinterpret_cast<const float*>(expert_part(*dense_scales, e));
          }};
}

std::optional<Tensor> rows_of(const std::optional<Tensor>& tensor, int64_t first, int64_t count) {
  return tensor ? std::optional(torch::stable::narrow(const_cast<Tensor&>(*tensor), 0, first, count)) : std::nullopt;
}

}  // namespace

Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scales,
                     const std::optional<Tensor>& bias, const Tensor& expert_offsets, bool gelu,
                     const std::optional<Tensor>& residual) {
  const Weights weights = packed_weights(x, weight, scales, "weight");
  const std::vector<int64_t> offsets = read_offsets(expert_offsets, weights.experts, x.size(0));
  return std::get<0>(linear_forward(x, weights, bias, offsets, gelu, residual, {}, false, std::nullopt));
}

// So many rows at a time that what lies between the two layers stays in the cache, and its memory is used again.
Tensor packed_ffn(const Tensor& x, const Tensor& fc1_weight, const std::optional<Tensor>& fc1_scales,
                  const Tensor& fc1_bias, const std::optional<Tensor>& norm_weight,
                  const std::optional<Tensor>& norm_bias, const Tensor& fc2_weight,
                  const std::optional<Tensor>& fc2_scales, const Tensor& fc2_bias, const Tensor& expert_offsets,
                  const std::optional<Tensor>& residual, double eps) {
  const Weights first_layer = packed_weights(x, fc1_weight, fc1_scales, "fc1_weight");
  const std::vector<int64_t> offsets = read_offsets(expert_offsets, first_layer.experts, x.size(0));
  const int64_t rows = x.size(0), width = fc2_weight.size(1) * widest_panel;
  const bool wide = residual && residual->scalar_type() != x.scalar_type();
  const Tensor out = torch::stable::new_empty(x, {rows, width}, wide ? ScalarType::Float : x.scalar_type());

  const int64_t wanted = rows_in_cache * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t blocks = std::max<int64_t>(1, (rows + wanted / 2) / wanted);
  const int64_t most = packed_rows_of((rows + blocks - 1) / blocks);
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t count = std::min(most, rows - first);
    std::vector<int64_t> here;
    for (const int64_t offset : offsets) here.push_back(std::clamp<int64_t>(offset - first, 0, count));
    const Tensor block = *rows_of(x, first, count);
    Tensor hidden =
        std::get<0>(linear_forward(block, first_layer, fc1_bias, here, true, std::nullopt, {}, false, std::nullopt));
    if (norm_weight && norm_bias) hidden = normalized(hidden, *norm_weight, *norm_bias, here, eps);
    const Weights second_layer = packed_weights(hidden, fc2_weight, fc2_scales, "fc2_weight");
    linear_forward(hidden, second_layer, fc2_bias, here, false, rows_of(residual, first, count), {}, false,
                   rows_of(out, first, count));
  }
  return out;
}

}  // namespace beit3_fast::cpu
