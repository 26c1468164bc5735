// What the ops of both libraries do with tensors before a kernel sees them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace beit3_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d > 0 ? ", " : "") + std::to_string(tensor.size(d));
  return text + ")";
}

inline void check_offsets(const Tensor& expert_offsets, int64_t experts) {
  STD_TORCH_CHECK(expert_offsets.scalar_type() == ScalarType::Int, "expert_offsets must be int32, got ",
                  expert_offsets.scalar_type());
  STD_TORCH_CHECK(expert_offsets.dim() == 1 && expert_offsets.size(0) == experts + 1,
                  "expert_offsets must have shape (", experts + 1, ",), one more than weight has experts, got ",
                  shape_of(expert_offsets));
}

inline Tensor converted(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// Rows may lie apart from each other, the elements of one may not.
inline Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace beit3_fast
