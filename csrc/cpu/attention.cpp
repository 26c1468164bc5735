// Attention over two-part sequences, forward and backward: the arguments, and the work of each thread.
#include "attention.h"

#include <optional>
#include <tuple>

#include "arguments.h"
#include "ops.h"

#define BEIT3_KERNEL "attention_tile.h"
#include "foreach_isa.h"

namespace beit3_fast::cpu {
namespace {

using Kernel = int64_t (*)(const AttentionCall&, const AttentionTask*, const AttentionTask*, void*);

// Pairs of query and key below which a second thread costs more than it saves.
constexpr int64_t pairs_per_thread = 16 * 1024;

AttentionMask mask_of(const std::string& name) {
  STD_TORCH_CHECK(name == "full" || name == "captioning" || name == "causal",
                  "mask must be full, captioning or causal, got ", name);
  return name == "full" ? AttentionMask::full : name == "causal" ? AttentionMask::causal : AttentionMask::captioning;
}

// Contiguous arguments, as the kernels see them.
class Arguments {
 public:
  Arguments(const Tensor& qkv, const Tensor& segments, const std::optional<Tensor>& forbidden, const std::string& mask,
            double scale)
      : qkv_(torch::stable::contiguous(qkv)), segments_(torch::stable::contiguous(segments)) {
    STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) == 3, "qkv must have shape (rows, 3, heads, head_dim)");
    const ScalarType dtype = qkv.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                    "qkv must be float32, bfloat16 or float16, got ", dtype);
    STD_TORCH_CHECK(segments.dim() == 2 && segments.size(1) == 4 && segments.scalar_type() == ScalarType::Int,
                    "segments must be int32 of shape (samples, 4)");
    call.samples = static_cast<const AttentionSample*>(segments_.const_data_ptr());
    call.rows = qkv.size(0);
    call.heads = qkv.size(2);
    call.head_dim = qkv.size(3);
    call.qkv = qkv_.const_data_ptr();
    call.mask = mask_of(mask);
    call.scale = static_cast<float>(scale);
    covered_.resize(call.rows);
    for (int64_t s = 0; s < samples(); ++s) {
      const AttentionSample& sample = call.samples[s];
      cover(sample.vision_start, sample.vision_length);
      cover(sample.text_start, sample.text_length);
      call.longest = std::max(call.longest, sample.length());
    }
    if (forbidden) {
      forbidden_ = torch::stable::contiguous(*forbidden);
      STD_TORCH_CHECK(forbidden->scalar_type() == ScalarType::Bool && forbidden->dim() == 2 &&
                          forbidden->size(0) == forbidden->size(1) && forbidden->size(0) >= call.longest,
                      "forbidden must be bool of shape (S, S), S at least ", call.longest);
      call.forbidden = static_cast<const bool*>(forbidden_->const_data_ptr());
      call.forbidden_size = forbidden->size(1);
    }
  }

  int64_t samples() const { return segments_.size(0); }

  // Rows that are no sample's.
  void zero_others(void* tensor, int64_t row_bytes) const {
    for (int64_t r = 0; r < call.rows; ++r) {
      if (!covered_[r]) std::memset(static_cast<char*>(tensor) + r * row_bytes, 0, row_bytes);
    }
  }

  AttentionCall call{};

 private:
  void cover(int64_t start, int64_t count) {
    STD_TORCH_CHECK(count >= 0 && (count == 0 || (start >= 0 && start + count <= call.rows)),
                    "segments must lie in the ", call.rows, " rows of qkv, got ", count, " from ", start, " on");
    std::fill_n(covered_.begin() + (count > 0 ? start : 0), count, true);
  }

  Tensor qkv_, segments_;
  std::optional<Tensor> forbidden_;
  std::vector<bool> covered_;
};

void check_output(const Tensor& tensor, const char* name, const AttentionCall& call, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.numel() == call.rows * call.heads * call.head_dim, name,
                  " must have one element for each query element of qkv, and its dtype");
}

// Each thread takes consecutive tasks, all of about the same cost.
void run(Kernel kernel, const AttentionCall& call, const std::vector<AttentionTask>& tasks) {
  if (tasks.empty()) return;
  const int64_t cost = tasks.back().cost;
  const int64_t shares =
      std::clamp<int64_t>(cost / pairs_per_thread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
  const auto begin_of = [&](int64_t share) {
    const auto before = [](const AttentionTask& task, int64_t sum) { return task.cost <= sum; };
    return tasks.data() + (std::lower_bound(tasks.begin(), tasks.end(), cost * share / shares, before) - tasks.begin());
  };
  const int64_t bytes = kernel(call, nullptr, nullptr, nullptr);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const Scratch memory(bytes);
    kernel(call, begin_of(begin), begin_of(end), memory.get());
  });
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const Tensor& segments, const std::optional<Tensor>& forbidden,
                                     std::string mask, double scale, int64_t, bool save) {
  Arguments arguments(qkv, segments, forbidden, mask, scale);
  AttentionCall& call = arguments.call;
  Tensor out = torch::stable::new_empty(qkv, {call.rows, call.heads * call.head_dim});
  Tensor lse = save ? torch::stable::new_zeros(qkv, {call.heads, call.rows}, ScalarType::Float)
                    : torch::stable::new_empty(qkv, {0}, ScalarType::Float);
  call.out = out.mutable_data_ptr();
  call.lse = save ? lse.mutable_data_ptr<float>() : nullptr;
  arguments.zero_others(call.out, call.heads * call.head_dim * qkv.element_size());
  run(BEIT3_KERNEL_OF(attention_forward, qkv.scalar_type()), call, attention_tasks(call, arguments.samples(), false));
  return {out, lse};
}

Tensor attention_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                          const Tensor& segments, const std::optional<Tensor>& forbidden, std::string mask,
                          double scale, int64_t) {
  Arguments arguments(qkv, segments, forbidden, mask, scale);
  AttentionCall& call = arguments.call;
  const int64_t width = call.heads * call.head_dim;
  check_output(dout, "dout", call, qkv.scalar_type());
  check_output(out, "out", call, qkv.scalar_type());
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.numel() == call.heads * call.rows,
                  "lse must be float32 of shape (heads, rows), as a forward that saves returns it");
  const Tensor dense_dout = torch::stable::contiguous(dout), dense_out = torch::stable::contiguous(out);
  const Tensor dense_lse = torch::stable::contiguous(lse);
  Tensor dqkv = torch::stable::new_empty(qkv, {call.rows, 3, call.heads, call.head_dim});
  call.dout = dense_dout.const_data_ptr();
  call.out = const_cast<void*>(dense_out.const_data_ptr());
  call.lse = const_cast<float*>(dense_lse.const_data_ptr<float>());
  call.dqkv = dqkv.mutable_data_ptr();
  arguments.zero_others(call.dqkv, 3 * width * qkv.element_size());
  run(BEIT3_KERNEL_OF(attention_backward, qkv.scalar_type()), call, attention_tasks(call, arguments.samples(), true));
  return dqkv;
}

}  // namespace beit3_fast::cpu
