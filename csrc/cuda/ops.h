// The CUDA implementations that register_cuda.cpp registers. Each is documented where its schema is defined, in
// beit3_fast/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace beit3_fast::cuda {

using torch::stable::Tensor;

// (x, residual, weight, bias, expert_offsets, eps) -> (y, total, mean, rstd)
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                                      const Tensor& weight, const Tensor& bias,
                                                      const Tensor& expert_offsets, double eps);

// (dy, total, weight, expert_offsets, mean, rstd, dresidual) -> (dtotal, dweight, dbias)
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& total, const Tensor& weight,
                                                       const Tensor& expert_offsets, const Tensor& mean,
                                                       const Tensor& rstd, const std::optional<Tensor>& dresidual);

}  // namespace beit3_fast::cuda
