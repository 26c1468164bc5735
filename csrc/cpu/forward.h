// The forward passes that more than one op is made of.
#pragma once

#include <functional>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "linear.h"

namespace beit3_fast::cpu {

// What the experts of a linear layer multiply with: `set(product, expert)` enters it into a product.
struct Weights {
  int64_t experts, width;
  std::function<void(Product&, int64_t expert)> set;
};

// Expert `e`'s part of stacked parameters.
inline char* expert_part(const Tensor& stacked, int64_t e) {
  return static_cast<char*>(stacked.mutable_data_ptr()) +
         e * (stacked.numel() / std::max<int64_t>(stacked.size(0), 1)) * stacked.element_size();
}

// The output, in `into` if it is given, and, if `save`, what GELU is applied to. `index` is empty where rows are in
// expert order. linear.cpp
std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Weights& weights, const std::optional<Tensor>& bias,
                                          const std::vector<int64_t>& offsets, bool gelu,
                                          const std::optional<Tensor>& residual, const std::vector<int64_t>& index,
                                          bool save, const std::optional<Tensor>& into);

// y of layer_norm without a residual. layer_norm.cpp
Tensor normalized(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::vector<int64_t>& offsets,
                  double eps);

}  // namespace beit3_fast::cpu
