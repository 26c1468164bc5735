// Conversions and LayerNorm rows, for test_isa.py.
#include "probe.h"
#define BEIT3_KERNEL "isa_probe_row.h"
#include "foreach_isa.h"

using beit3_fast::Isa;

extern "C" {

void widen_bfloat16(int isa, const void* row, float* out, int64_t width) {
  BEIT3_AT(static_cast<Isa>(isa), widen_row<beit3_fast::bfloat16>)(row, out, width);
}

void widen_float16(int isa, const void* row, float* out, int64_t width) {
  BEIT3_AT(static_cast<Isa>(isa), widen_row<beit3_fast::float16>)(row, out, width);
}

void round_bfloat16(int isa, const float* row, void* out, int64_t width) {
  BEIT3_AT(static_cast<Isa>(isa), round_row<beit3_fast::bfloat16>)(row, out, width);
}

void round_float16(int isa, const float* row, void* out, int64_t width) {
  BEIT3_AT(static_cast<Isa>(isa), round_row<beit3_fast::float16>)(row, out, width);
}

#define BEIT3_PROBE_LAYER_NORM(NAME, T, A)                                                                          \
  void layer_norm_##NAME(int isa, const void* x, const void* residual, void* total, A* scratch, const void* weight, \
                         const void* bias, void* y, int64_t width, A eps, A* mean, A* rstd) {                       \
    const Isa at = static_cast<Isa>(isa);                                                                           \
    const auto statistics =                                                                                         \
        residual ? BEIT3_AT(at, row_statistics<T, T, T>) : BEIT3_AT(at, row_statistics<T, beit3_fast::none, T>);    \
    const A* values = statistics(x, residual, total, scratch, width, eps, mean, rstd);                              \
    BEIT3_AT(at, row_affine<T, T>)(values, *mean, *rstd, weight, bias, y, width);                                   \
  }                                                                                                                 \
  void layer_norm_gradient_##NAME(int isa, const void* dy, const void* total, const void* weight,                   \
                                  const void* dresidual, A mean, A rstd, void* dtotal, A* dweight, A* dbias,        \
                                  int64_t width) {                                                                  \
    BEIT3_AT(static_cast<Isa>(isa), row_gradient<T, T>)                                                             \
    (dy, total, weight, dresidual, mean, rstd, dtotal, dweight, dbias, width);                                      \
  }

BEIT3_PROBE_LAYER_NORM(float32, float, float)
BEIT3_PROBE_LAYER_NORM(float64, double, double)
BEIT3_PROBE_LAYER_NORM(bfloat16, beit3_fast::bfloat16, float)
BEIT3_PROBE_LAYER_NORM(float16, beit3_fast::float16, float)

}  // extern "C"
