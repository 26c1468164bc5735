// Matrix products cut into tasks, and the tasks into threads.
#include "products.h"

#include <atomic>
#include <optional>

#include "arguments.h"

#define BEIT3_KERNEL "linear_tile.h"
#include "foreach_isa.h"

namespace beit3_fast::cpu {
namespace {

using Kernel = void (*)(const ProductTask&, void* scratch);
using Pack = void (*)(const Product&, int64_t line, int64_t lines, void* to);

Kernel kernel_of(ScalarType operands, ScalarType out, bool quantized) {
  const Isa isa = native_isa();
  const bool wide = out == ScalarType::Float;
  if (operands == ScalarType::Float) {
    return quantized ? BEIT3_AT(isa, quantized_product<float, float>) : BEIT3_AT(isa, product<float, float>);
  }
  if (operands == ScalarType::BFloat16) {
    if (quantized) {
      return wide ? BEIT3_AT(isa, quantized_product<bfloat16, float>)
                  : BEIT3_AT(isa, quantized_product<bfloat16, bfloat16>);
    }
    return wide ? BEIT3_AT(isa, product<bfloat16, float>) : BEIT3_AT(isa, product<bfloat16, bfloat16>);
  }
  if (quantized) {
    return wide ? BEIT3_AT(isa, quantized_product<float16, float>) : BEIT3_AT(isa, quantized_product<float16, float16>);
  }
  return wide ? BEIT3_AT(isa, product<float16, float>) : BEIT3_AT(isa, product<float16, float16>);
}

// Whether two neighbours along the depth are one word of the multiply-adds.
bool in_pairs(ScalarType operands) { return operands == ScalarType::BFloat16 && native_isa() == Isa::avx512_bf16; }

// Whether the multiply-adds take rows of a as they lie in memory.
bool in_place(const Product& p, ScalarType operands) {
  if (p.a_across || p.a.index != nullptr || p.rows <= few_rows || p.column_scales != nullptr) return false;
  if (operands == ScalarType::Float) return true;
  return in_pairs(operands) && p.depth % 2 == 0 && p.a.stride % 2 == 0 &&
         reinterpret_cast<uintptr_t>(p.a.data) % 4 == 0;
}

// Bands of whole panels and vectors on all threads.
template <class Function>
void in_bands(int64_t lines, int64_t elements_of_line, const Function& function) {
  const int64_t bands = (lines + widest_panel - 1) / widest_panel;
  const int64_t grain =
      std::max<int64_t>(1, elements_per_thread / std::max<int64_t>(1, elements_of_line * widest_panel));
  torch::stable::parallel_for(0, bands, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * widest_panel; first < std::min(end * widest_panel, lines); first += widest_panel) {
      function(first, std::min(widest_panel, lines - first));
    }
  });
}

// Brings all rows of a into the form of the multiply-adds.
Scratch pack_rows(Product& p, ScalarType operands) {
  const int64_t words = packed_rows_of(p.rows) * p.left_stride;
  Scratch packed((words + packed_rows_of(p.rows)) * 4);
  p.row_scales = packed.get<float>() + words;
  const auto kernel =
      p.column_scales != nullptr ? BEIT3_KERNEL_OF(quantize_left, operands) : BEIT3_KERNEL_OF(pack_left, operands);
  in_bands(p.rows, p.depth,
           [&](int64_t row, int64_t rows) { kernel(p, row, rows, packed.get<float>() + row * p.left_stride); });
  return packed;
}

// Brings b into panels.
Scratch pack_panels(Product& p, ScalarType operands) {
  const int64_t depth = operands == ScalarType::BFloat16 ? p.depth + p.depth % 2 : p.depth;
  const int64_t panel = depth * widest_panel * (operands == ScalarType::Float ? 4 : 2);
  Scratch packed((p.columns + widest_panel - 1) / widest_panel * panel);
  p.panels = packed.get();
  const auto kernel = BEIT3_KERNEL_OF(pack_right, operands);
  in_bands(p.columns, p.depth, [&](int64_t column, int64_t columns) {
    kernel(p, column, columns, packed.get<char>() + column / widest_panel * panel);
  });
  return packed;
}

// Rows of a product that a task has at most.
int64_t rows_at_once(const Product& p) {
  if (p.panels == nullptr) return std::max<int64_t>(p.rows, 1);
  int64_t wanted = rows_in_cache;
  if (p.a_across) wanted = std::clamp(words_in_cache / std::max<int64_t>(p.left_stride, 1), few_rows, rows_in_cache);
  const int64_t blocks = std::max<int64_t>(1, (p.rows + wanted / 2) / wanted);
  return packed_rows_of(p.rows / blocks + 1);
}

// A thread's tasks. It takes them from the front; one that has finished its own takes from the back of others': cores
// are not equally fast, and not always there.
class Share {
 public:
  std::vector<ProductTask> tasks;

  void close() { left_ = tasks.size(); }

  // The first task that is left, or the last; null where none is.
  const ProductTask* take(bool from_front) {
    for (uint64_t left = left_;;) {
      const uint64_t first = left >> 32, end = left & 0xffffffffu;
      if (first == end) return nullptr;
      if (left_.compare_exchange_weak(left, from_front ? left + (uint64_t{1} << 32) : left - 1)) {
        return &tasks[from_front ? first : end - 1];
      }
    }
  }

 private:
  std::atomic<uint64_t> left_{0};  // the first task that is left, and in the lower half the end
};

// A task is a panel of b and all rows; or where no panel has to be brought into order first, few enough to stay in the
// second-level cache from panel to panel, and at the end of a share fewer still, so that all threads end at the same
// time. Where the shares of two threads meet, a task is cut between tiles.
std::vector<Share> shares_of(const std::vector<Product>& products, const std::vector<const char*>& lefts, int64_t total,
                             int64_t threads) {
  std::vector<Share> shares(threads);
  int64_t share = 0, work = total / threads;  // multiply-adds that the share still lacks
  for (size_t i = 0; i < products.size(); ++i) {
    const Product& p = products[i];
    const int64_t most = rows_at_once(p);
    for (int64_t first = 0; first < p.rows; first += most) {
      const int64_t end = std::min(first + most, p.rows);
      for (int64_t column = 0; column < p.columns; column += widest_panel) {
        const int64_t columns = std::min(widest_panel, p.columns - column);
        const int64_t cost = columns * std::max<int64_t>(p.depth, 1);  // of a row
        for (int64_t row = first; row < end;) {
          const int64_t tiles = (std::max<int64_t>(work / cost, 0) + product_tile_rows / 2) / product_tile_rows;
          int64_t rows = share == threads - 1 ? end - row : std::min(tiles * product_tile_rows, end - row);
          if (p.panels != nullptr)
            rows = std::min(rows, packed_rows_of(std::max(work / 2, work_per_thread) / cost + 1));
          const void* const left = lefts[i] == nullptr ? nullptr : lefts[i] + row * p.left_stride * 4;
          if (rows > 0) shares[share].tasks.push_back({&p, row, rows, column, columns, left});
          row += rows;
          work -= rows * cost;
          if (row < end && tiles == 0 && share < threads - 1) work += total / threads, ++share;
        }
      }
    }
  }
  for (Share& each : shares) each.close();
  return shares;
}

// What a thread computes in.
class Worker {
 public:
  Worker(const std::vector<Product>& products, Kernel kernel, Pack pack) : kernel_(kernel), pack_(pack) {
    int64_t bytes = 0, words = 0;
    for (const Product& p : products) {
      bytes = std::max(bytes, product_scratch(rows_at_once(p), p.depth));
      if (p.a_across) words = std::max(words, packed_rows_of(rows_at_once(p)) * p.left_stride);
    }
    scratch_.emplace(bytes);
    columns_of_a_.emplace(words * 4);
  }

  void run(ProductTask task) {
    if (task.product->a_across) {  // for all panels
      task.left = columns_of_a_->get();
      const bool again = packed_.product == task.product && packed_.row == task.row && packed_.rows == task.rows;
      if (!again) pack_(*task.product, task.row, task.rows, columns_of_a_->get());
      packed_ = task;
    }
    kernel_(task, scratch_->get());
  }

 private:
  Kernel kernel_;
  Pack pack_;
  std::optional<Scratch> scratch_, columns_of_a_;
  ProductTask packed_{};
};

}  // namespace

void run_products(std::vector<Product> products, ScalarType operands, ScalarType out) {
  std::vector<Scratch> packed;
  std::vector<const char*> lefts;  // of each product; null: in place, or packed by the tasks
  int64_t total = 0;
  for (Product& p : products) {
    total += p.rows * p.columns * std::max<int64_t>(p.depth, 1);
    const int64_t together = p.column_scales != nullptr ? 4 : in_pairs(operands) ? 2 : 1;
    p.left_stride = left_stride_of((p.depth + together - 1) / together);
    const bool by_tasks = p.a_across || in_place(p, operands);
    if (!by_tasks) packed.push_back(pack_rows(p, operands));
    lefts.push_back(by_tasks ? nullptr : packed.back().get<char>());
    if (p.a_across) packed.push_back(pack_panels(p, operands));
  }
  if (total == 0) return;
  const int64_t threads =
      std::clamp<int64_t>(total / work_per_thread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
  std::vector<Share> shares = shares_of(products, lefts, total, threads);
  const Kernel kernel = kernel_of(operands, out, products.front().column_scales != nullptr);
  const auto pack = BEIT3_KERNEL_OF(pack_left, operands);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    Worker worker(products, kernel, pack);
    for (int64_t s = begin; s < end; ++s) {
      while (const ProductTask* task = shares[s].take(true)) worker.run(*task);
    }
    for (int64_t s = end; s < end + threads; ++s) {
      while (const ProductTask* task = shares[s % threads].take(false)) worker.run(*task);
    }
  });
}

}  // namespace beit3_fast::cpu
