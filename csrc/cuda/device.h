// What the host asks of the CUDA runtime; nothing at import, nothing that waits for a device.
#pragma once

#include <string>

namespace beit3_fast::cuda {

// A cudaError_t; 0 is success. The files that know torch need no CUDA headers.
using Error = int;
// A cudaStream_t.
using Stream = void*;

// How many multiprocessors the device has.
Error multiprocessors(int device, int& count);

// What went wrong, in words: for a GPU that this build has no code for, both of them.
std::string describe(Error error, int device);

}  // namespace beit3_fast::cuda
