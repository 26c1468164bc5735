// All that serves beit3_fast on CUDA devices from compiled code.
#include <torch/csrc/stable/library.h>

#include "cuda/build_info.h"
#include "cuda/ops.h"

// Defined here and not in Python, because without this library there is nothing to tell.
STABLE_TORCH_LIBRARY_FRAGMENT(beit3_fast, m) { m.def("cuda_build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(beit3_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&beit3_fast::cuda::build_info));
}

STABLE_TORCH_LIBRARY_IMPL(beit3_fast, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&beit3_fast::cuda::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&beit3_fast::cuda::layer_norm_backward));
}
