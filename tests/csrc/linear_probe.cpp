// The products of linear layers, for test_linear.py.
#include "linear.h"
#include "probe.h"
#define BEIT3_KERNEL "linear_tile.h"
#include "foreach_isa.h"

using namespace beit3_fast;

namespace {

using Kernel = void (*)(const ProductTask&, void* scratch);
using Pack = void (*)(const Product&, int64_t line, int64_t lines, void* to);

// In four tasks, as several threads would take them. Returns whether the kernels stayed in their memory.
bool run(Product& p, Kernel kernel, Pack pack, int64_t words, bool in_place) {
  p.left_stride = left_stride_of(words);
  const int64_t half = (p.columns / 2 + 63) / 64 * 64;
  const int64_t first_rows = packed_rows_of((p.rows + 1) / 2);
  const probe::Guarded memory(product_scratch(first_rows, p.depth));
  const probe::Guarded left(4 * packed_rows_of(first_rows) * p.left_stride), row_scales(4 * p.rows);
  p.row_scales = row_scales.get<float>();
  for (int64_t row = 0; row < p.rows; row += first_rows) {
    const int64_t count = p.rows - row < first_rows ? p.rows - row : first_rows;
    const void* const packed = in_place ? nullptr : left.get();
    const int64_t band = count < 64 ? count : 64;
    if (!in_place) pack(p, row, band, left.get());
    if (!in_place && band < count) pack(p, row + band, count - band, left.get<float>() + band * p.left_stride);
    const ProductTask tasks[] = {{&p, row, count, 0, half < p.columns ? half : p.columns, packed},
                                 {&p, row, count, half, p.columns - half, packed}};
    for (const ProductTask& task : tasks) {
      if (task.columns > 0) kernel(task, memory.get());
    }
  }
  return memory.is_intact() && left.is_intact() && row_scales.is_intact();
}

bool in_pairs(Isa isa, int dtype) { return dtype == 1 && isa == Isa::avx512_bf16; }

}  // namespace

extern "C" {

int product(int isa, int dtype, bool wide, int64_t rows, int64_t columns, int64_t depth, const void* a,
            int64_t a_stride, const int64_t* a_index, bool a_across, bool in_place, const void* b, int64_t b_stride,
            bool b_across, const void* bias, bool gelu, void* pre, const void* residual, void* out, int64_t out_stride,
            const int64_t* out_index) {
  Product p{};
  p.rows = rows;
  p.columns = columns;
  p.depth = depth;
  p.a = {a, a_stride, a_index};
  p.b = {b, b_stride, nullptr};
  p.a_across = a_across;
  p.b_across = b_across;
  p.bias = bias;
  p.gelu = gelu;
  p.pre = pre;
  p.residual = residual;
  p.out = out;
  p.out_stride = out_stride;
  p.out_index = out_index;
  const Isa at = static_cast<Isa>(isa);
  const auto kernel = dtype == 0 ? BEIT3_AT(at, product<float, float>)
                      : dtype == 1
                          ? (wide ? BEIT3_AT(at, product<bfloat16, float>) : BEIT3_AT(at, product<bfloat16, bfloat16>))
                          : (wide ? BEIT3_AT(at, product<float16, float>) : BEIT3_AT(at, product<float16, float16>));
  const int64_t words = in_pairs(at, dtype) ? (depth + 1) / 2 : depth;
  const int64_t stored_depth = dtype == 1 ? depth + depth % 2 : depth;
  const int64_t panel = stored_depth * widest_panel * (dtype == 0 ? 4 : 2);
  const probe::Guarded panels((columns + widest_panel - 1) / widest_panel * panel);
  if (a_across && b_across) {  // a gradient of weights
    p.panels = panels.get();
    for (int64_t column = 0; column < columns; column += widest_panel) {
      const int64_t count = columns - column < widest_panel ? columns - column : widest_panel;
      BEIT3_PROBE_KERNEL(at, dtype, pack_right)(p, column, count, panels.get<char>() + column / widest_panel * panel);
    }
  }
  return run(p, kernel, BEIT3_PROBE_KERNEL(at, dtype, pack_left), words, in_place) && panels.is_intact();
}

int packed_product(int isa, int dtype, int64_t rows, int64_t columns, int64_t depth, const void* a, const void* panels,
                   const float* column_scales, void* out, int64_t out_stride) {
  Product p{};
  p.rows = rows;
  p.columns = columns;
  p.depth = depth;
  p.a = {a, depth, nullptr};
  p.panels = panels;
  p.column_scales = column_scales;
  p.out = out;
  p.out_stride = out_stride;
  const Isa at = static_cast<Isa>(isa);
  if (column_scales != nullptr) {
    const auto kernel = dtype == 0   ? BEIT3_AT(at, quantized_product<float, float>)
                        : dtype == 1 ? BEIT3_AT(at, quantized_product<bfloat16, float>)
                                     : BEIT3_AT(at, quantized_product<float16, float>);
    return run(p, kernel, BEIT3_PROBE_KERNEL(at, dtype, quantize_left), (depth + 3) / 4, false);
  }
  const auto kernel = dtype == 0   ? BEIT3_AT(at, product<float, float>)
                      : dtype == 1 ? BEIT3_AT(at, product<bfloat16, float>)
                                   : BEIT3_AT(at, product<float16, float>);
  const int64_t words = in_pairs(at, dtype) ? (depth + 1) / 2 : depth;
  return run(p, kernel, BEIT3_PROBE_KERNEL(at, dtype, pack_left), words, false);
}

void gradients(int isa, int dtype, const void* dy, const void* pre, void* out, int64_t rows, int64_t columns,
               void* sums) {
  const Isa at = static_cast<Isa>(isa);
  BEIT3_PROBE_KERNEL(at, dtype, gelu_gradient)(dy, pre, out, rows * columns);
  BEIT3_PROBE_KERNEL(at, dtype, sum_rows)({dy, columns, nullptr}, rows, 0, columns, sums);
}

}  // extern "C"
