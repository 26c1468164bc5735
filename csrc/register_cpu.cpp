// All that serves the ops of beit3_fast on the CPU. The schemas are defined in Python (beit3_fast/ops): a library that
// is missing takes nothing but speed away.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(beit3_fast, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&beit3_fast::cpu::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&beit3_fast::cpu::layer_norm_backward));
  m.impl("multiway_linear_cpu", TORCH_BOX(&beit3_fast::cpu::multiway_linear));
  m.impl("multiway_linear_cpu_backward", TORCH_BOX(&beit3_fast::cpu::multiway_linear_backward));
  m.impl("packed_ffn", TORCH_BOX(&beit3_fast::cpu::packed_ffn));
  m.impl("packed_linear", TORCH_BOX(&beit3_fast::cpu::packed_linear));
  m.impl("decode_attention_cpu", TORCH_BOX(&beit3_fast::cpu::decode_attention));
  m.impl("attention_cpu", TORCH_BOX(&beit3_fast::cpu::attention));
  m.impl("attention_cpu_backward", TORCH_BOX(&beit3_fast::cpu::attention_backward));
}
