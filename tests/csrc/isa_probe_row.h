// What isa_probe.cpp exports, once for each instruction set.
#include "layer_norm_gradient_row.h"
#include "layer_norm_row.h"

template <class T>
void widen_row(const void* row, float* out, int64_t width) {
  const T* from = static_cast<const T*>(row);
  F32 vector;
  int64_t i = 0;
  for (; i + lanes<float> <= width; i += lanes<float>) {
    load(vector, from + i);
    store(out + i, vector);
  }
  if (i < width) {
    load_partial(vector, from + i, width - i);
    store_partial(out + i, vector, width - i);
  }
}

template <class T>
void round_row(const float* row, void* out, int64_t width) {
  T* to = static_cast<T*>(out);
  F32 vector;
  int64_t i = 0;
  for (; i + lanes<float> <= width; i += lanes<float>) {
    load(vector, row + i);
    store(to + i, vector);
  }
  if (i < width) {
    load_partial(vector, row + i, width - i);
    store_partial(to + i, vector, width - i);
  }
}
