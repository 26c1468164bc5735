// Attention of a decoding step: the arguments, and the work of each thread.
#include "decode_attention.h"

#include "arguments.h"
#include "ops.h"

#define BEIT3_KERNEL "decode_attention_tile.h"
#include "foreach_isa.h"

namespace beit3_fast::cpu {

Tensor decode_attention(const Tensor& qkv, const Tensor& prefix, const Tensor& segments, const Tensor& words,
                        const Tensor& history, int64_t length, double scale, int64_t) {
  const ScalarType dtype = qkv.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "qkv must be float32, bfloat16 or float16, got ", dtype);
  STD_TORCH_CHECK(prefix.scalar_type() == dtype && words.scalar_type() == dtype,
                  "prefix and words must have the dtype of qkv, ", dtype, ", got ", prefix.scalar_type(), " and ",
                  words.scalar_type());
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) == 3, "qkv must have shape (rows, 3, heads, head_dim), got ",
                  shape_of(qkv));
  const int64_t heads = qkv.size(2), head_dim = qkv.size(3);
  STD_TORCH_CHECK(prefix.dim() == 4 && prefix.size(1) == 2 && prefix.size(2) == heads && prefix.size(3) == head_dim,
                  "prefix must have shape (rows, 2, ", heads, ", ", head_dim, "), got ", shape_of(prefix));
  STD_TORCH_CHECK(words.dim() == 5 && words.size(2) == 2 && words.size(3) == heads && words.size(4) == head_dim,
                  "words must have shape (places, slots, 2, ", heads, ", ", head_dim, "), got ", shape_of(words));
  const int64_t places = words.size(0), slots = words.size(1), batch = segments.size(0);
  STD_TORCH_CHECK(segments.dim() == 2 && segments.size(1) == 4 && segments.scalar_type() == ScalarType::Int,
                  "segments must be int32 of shape (samples, 4)");
  STD_TORCH_CHECK(batch > 0 && slots > 0 && slots % batch == 0 && qkv.size(0) % slots == 0,
                  "slots must be a multiple of the ", batch, " samples and divide the ", qkv.size(0),
                  " rows of qkv, got ", slots);
  STD_TORCH_CHECK(history.dim() == 2 && history.size(0) == places && history.size(1) == slots &&
                      history.scalar_type() == ScalarType::Int,
                  "history must be int32 of shape (", places, ", ", slots, ")");
  STD_TORCH_CHECK(length >= 0 && length <= places, "length must lie in [0, ", places, "], got ", length);

  const Tensor dense_qkv = torch::stable::contiguous(qkv), dense_prefix = torch::stable::contiguous(prefix);
  const Tensor dense_words = torch::stable::contiguous(words), dense_history = torch::stable::contiguous(history);
  const Tensor dense_segments = torch::stable::contiguous(segments);
  const Tensor out = torch::stable::new_empty(qkv, {qkv.size(0), heads * head_dim}, dtype);
  DecodeCall call{};
  call.samples = static_cast<const AttentionSample*>(dense_segments.const_data_ptr());
  call.batch = batch;
  call.heads = heads;
  call.head_dim = head_dim;
  call.beams = slots / batch;
  call.tokens = qkv.size(0) / slots;
  call.length = length;
  call.slots = slots;
  call.scale = static_cast<float>(scale);
  call.qkv = dense_qkv.const_data_ptr();
  call.prefix = dense_prefix.const_data_ptr();
  call.words = dense_words.const_data_ptr();
  call.history = dense_history.const_data_ptr<int32_t>();
  call.out = out.mutable_data_ptr();
  for (int64_t s = 0; s < batch; ++s) {
    const AttentionSample& sample = call.samples[s];
    const auto fits = [&](int64_t start, int64_t count) {
      return count == 0 || (count > 0 && start >= 0 && start + count <= prefix.size(0));
    };
    STD_TORCH_CHECK(fits(sample.vision_start, sample.vision_length) && fits(sample.text_start, sample.text_length),
                    "segments must lie in the ", prefix.size(0), " rows of prefix");
    call.longest = std::max(call.longest, sample.length());
  }
  STD_TORCH_CHECK(
      std::all_of(call.history, call.history + length * slots, [&](int32_t slot) { return slot >= 0 && slot < slots; }),
      "history must name slots in [0, ", slots, ")");
  if (out.numel() == 0) return out;

  const auto kernel = BEIT3_KERNEL_OF(decode_attention, dtype);
  const int64_t bytes = kernel(call, 0, 0, nullptr);
  torch::stable::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    const Scratch memory(bytes);
    kernel(call, begin, end, memory.get());
  });
  return out;
}

}  // namespace beit3_fast::cpu
