// The CPU implementations that register_cpu.cpp registers. Each is documented where its schema is defined, in
// beit3_fast/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace beit3_fast::cpu {

using torch::stable::Tensor;

// (x, residual, weight, bias, expert_offsets, eps) -> (y, total, mean, rstd)
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                                      const Tensor& weight, const Tensor& bias,
                                                      const Tensor& expert_offsets, double eps);

}  // namespace beit3_fast::cpu
