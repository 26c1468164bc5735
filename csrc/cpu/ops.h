// The CPU implementations that register_cpu.cpp registers. Each is documented where its schema is defined, in
// beit3_fast/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace beit3_fast::cpu {

using torch::stable::Tensor;

// (x, residual, weight, bias, expert_offsets, eps) -> (y, total, mean, rstd)
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                                      const Tensor& weight, const Tensor& bias,
                                                      const Tensor& expert_offsets, double eps);

// (qkv, segments, forbidden, mask, scale, max_length, save) -> (out, lse)
std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const Tensor& segments, const std::optional<Tensor>& forbidden,
                                     std::string mask, double scale, int64_t max_length, bool save);

// (dout, qkv, out, lse, segments, forbidden, mask, scale, max_length) -> dqkv
Tensor attention_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                          const Tensor& segments, const std::optional<Tensor>& forbidden, std::string mask,
                          double scale, int64_t max_length);

}  // namespace beit3_fast::cpu
