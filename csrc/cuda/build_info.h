#pragma once

#include <string>

namespace beit3_fast::cuda {

// The compiler and the GPU architectures that this library was built with and for.
std::string build_info();

}  // namespace beit3_fast::cuda
