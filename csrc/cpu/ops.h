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

// (dy, total, weight, expert_offsets, mean, rstd, dresidual) -> (dtotal, dweight, dbias)
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& total, const Tensor& weight,
                                                       const Tensor& expert_offsets, const Tensor& mean,
                                                       const Tensor& rstd, const std::optional<Tensor>& dresidual);

// (x, weight, bias, expert_offsets, gelu, residual, row_index, save) -> (out, pre_activation)
std::tuple<Tensor, Tensor> multiway_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                           const Tensor& expert_offsets, bool gelu,
                                           const std::optional<Tensor>& residual,
                                           const std::optional<Tensor>& row_index, bool save);

// (x, weight, scales, bias, expert_offsets, gelu, residual) -> out
Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scales,
                     const std::optional<Tensor>& bias, const Tensor& expert_offsets, bool gelu,
                     const std::optional<Tensor>& residual);

// (x, fc1_weight, fc1_scales, fc1_bias, norm_weight, norm_bias, fc2_weight, fc2_scales, fc2_bias, expert_offsets,
// residual, eps) -> out
Tensor packed_ffn(const Tensor& x, const Tensor& fc1_weight, const std::optional<Tensor>& fc1_scales,
                  const Tensor& fc1_bias, const std::optional<Tensor>& norm_weight,
                  const std::optional<Tensor>& norm_bias, const Tensor& fc2_weight,
                  const std::optional<Tensor>& fc2_scales, const Tensor& fc2_bias, const Tensor& expert_offsets,
                  const std::optional<Tensor>& residual, double eps);

// (dy, x, weight, expert_offsets, pre_activation, row_index, needs_x, needs_parameters) -> (dx, dweight, dbias)
std::tuple<Tensor, Tensor, Tensor> multiway_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                            const Tensor& expert_offsets,
                                                            const std::optional<Tensor>& pre_activation,
                                                            const std::optional<Tensor>& row_index, bool needs_x,
                                                            bool needs_parameters);

// (qkv, prefix, segments, words, history, length, scale, max_prefix) -> out
Tensor decode_attention(const Tensor& qkv, const Tensor& prefix, const Tensor& segments, const Tensor& words,
                        const Tensor& history, int64_t length, double scale, int64_t max_prefix);

}  // namespace beit3_fast::cpu
