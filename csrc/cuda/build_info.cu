#include "build_info.h"

namespace beit3_fast::cuda {

std::string build_info() {
  return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + "." +
         std::to_string(__CUDACC_VER_BUILD__) + " for " BEIT3_FAST_CUDA_ARCHITECTURES;
}

}  // namespace beit3_fast::cuda
