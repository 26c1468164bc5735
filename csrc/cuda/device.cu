#include "device.h"

#include "build_info.h"

namespace beit3_fast::cuda {

Error multiprocessors(int device, int& count) {
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

std::string describe(Error error, int device) {
  const auto code = static_cast<cudaError_t>(error);
  if (code != cudaErrorNoKernelImageForDevice && code != cudaErrorUnsupportedPtxVersion &&
      code != cudaErrorInvalidDeviceFunction) {
    return std::string(cudaGetErrorName(code)) + ": " + cudaGetErrorString(code);
  }
  int major = 0;
  int minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return "this build of beit3_fast (" + build_info() + ") has no code that GPU " + std::to_string(device) + ", an sm_" +
         std::to_string(major) + std::to_string(minor) + ", and its driver can run (" + cudaGetErrorString(code) +
         "); set TORCH_CUDA_ARCH_LIST and build again";
}

}  // namespace beit3_fast::cuda
