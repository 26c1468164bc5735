// The products of linear layers, for test_linear.py.
#include "linear.h"
#include "probe.h"
#define BEIT3_KERNEL "linear_tile.h"
#include "foreach_isa.h"

using namespace beit3_fast;

namespace {

using Kernel = void (*)(const ProductTask&, void* scratch);
using Pack = void (*)(const Product&, int64_t row, int64_t rows);

// In four tasks, as several threads would take them. Returns whether the kernels stayed in their memory.
bool run(Product& p, Kernel kernel, Pack pack, int64_t words, bool in_place) {
  p.packed_stride = packed_stride_of(words);
  const int64_t half = (p.columns / 2 + 63) / 64 * 64;
  const int64_t first_rows = packed_rows_of((p.rows + 1) / 2);
  const probe::Guarded memory(product_scratch(first_rows, p.depth));
  const probe::Guarded packed(4 * packed_rows_of(p.rows) * p.packed_stride), row_scales(4 * p.rows);
  if (!in_place) {
    p.packed = packed.get();
    p.row_scales = static_cast<float*>(row_scales.get());
    const int64_t band = p.rows < 64 ? p.rows : 64;
    pack(p, 0, band);
    if (band < p.rows) pack(p, band, p.rows - band);
  }
  for (int64_t row = 0; row < p.rows; row += first_rows) {
    const int64_t count = p.rows - row < first_rows ? p.rows - row : first_rows;
    const ProductTask tasks[] = {{&p, row, count, 0, half < p.columns ? half : p.columns},
                                 {&p, row, count, half, p.columns - half}};
    for (const ProductTask& task : tasks) {
      if (task.columns > 0) kernel(task, memory.get());
    }
  }
  return memory.is_intact() && packed.is_intact() && row_scales.is_intact();
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
  return run(p, kernel, BEIT3_PROBE_KERNEL(at, dtype, pack_left), words, in_place);
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
