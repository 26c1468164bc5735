// The products of linear layers at a chosen instruction set, for test_linear.py: the library itself only ever runs the
// best one. Scratch memory is handed to them full of NaN, and with a guard behind it.
#include <cstdlib>
#include <cstring>

#include "linear.h"
#define BEIT3_KERNEL "linear_tile.h"
#include "foreach_isa.h"

using namespace beit3_fast;

extern "C" {

int native_isa() { return static_cast<int>(beit3_fast::native_isa()); }

// dtype: 0 float32, 1 bfloat16, 2 float16; `wide`: C is float32. Returns whether the kernel stayed in its memory.
bool product(int isa, int dtype, bool wide, int64_t rows, int64_t columns, int64_t depth, const void* a,
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
  const auto pack = dtype == 0   ? BEIT3_AT(at, pack_left<float>)
                    : dtype == 1 ? BEIT3_AT(at, pack_left<bfloat16>)
                                 : BEIT3_AT(at, pack_left<float16>);
  constexpr int64_t guard = 4096;
  const auto allocate = [](int64_t bytes) {
    char* const memory = static_cast<char*>(std::aligned_alloc(64, (bytes + guard + 63) / 64 * 64));
    std::memset(memory, 0xff, bytes + guard);
    return memory;
  };
  const auto is_intact = [](const char* memory, int64_t bytes) {
    bool intact = true;
    for (int64_t i = 0; i < guard; ++i) intact &= memory[bytes + i] == static_cast<char>(0xff);
    return intact;
  };
  const int64_t bytes = product_scratch(depth);
  p.packed_stride = packed_stride_of(dtype == 1 && at == Isa::avx512_bf16 ? (depth + 1) / 2 : depth);
  const int64_t packed_bytes = 4 * packed_rows_of(rows) * p.packed_stride;
  char* const memory = allocate(bytes);
  char* const packed = allocate(packed_bytes);
  if (!in_place) {
    p.packed = packed;
    const int64_t band = rows < 64 ? rows : 64;  // two bands, as two threads would take them
    pack(p, 0, band);
    if (band < rows) pack(p, band, rows - band);
  }
  const int64_t half = (columns / 2 + 63) / 64 * 64;
  const int64_t first_rows = packed_rows_of((rows + 1) / 2);
  for (int64_t row = 0; row < rows; row += first_rows) {
    const int64_t count = rows - row < first_rows ? rows - row : first_rows;
    const ProductTask tasks[] = {{&p, row, count, 0, half < columns ? half : columns, 0},
                                 {&p, row, count, half, columns - half, 0}};
    for (const ProductTask& task : tasks) {
      if (task.columns > 0) kernel(task, memory);
    }
  }
  const bool intact = is_intact(memory, bytes) && is_intact(packed, packed_bytes);
  std::free(memory);
  std::free(packed);
  return intact;
}

// out = dy * gelu'(pre), and the sums of the columns of dy
void gradients(int isa, int dtype, const void* dy, const void* pre, void* out, int64_t rows, int64_t columns,
               void* sums) {
  const Isa at = static_cast<Isa>(isa);
  const auto slope = dtype == 0   ? BEIT3_AT(at, gelu_gradient<float>)
                     : dtype == 1 ? BEIT3_AT(at, gelu_gradient<bfloat16>)
                                  : BEIT3_AT(at, gelu_gradient<float16>);
  const auto sum = dtype == 0   ? BEIT3_AT(at, sum_rows<float>)
                   : dtype == 1 ? BEIT3_AT(at, sum_rows<bfloat16>)
                                : BEIT3_AT(at, sum_rows<float16>);
  slope(dy, pre, out, rows * columns);
  sum({dy, columns, nullptr}, rows, 0, columns, sums);
}

}  // extern "C"
