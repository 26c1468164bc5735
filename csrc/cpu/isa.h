// The instruction sets that hot loops are compiled for: one binary serves every x86-64.
//
// A kernel header is compiled once for each of them, in a namespace of that name, by
//
//   #define BEIT3_KERNEL "layer_norm_row.h"
//   #include "foreach_isa.h"
//
// and BEIT3_AT(isa, function<...>) is the address of the copy that `isa` can run.
#pragma once

namespace beit3_fast {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// The best one that this processor and operating system can run.
inline Isa native_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      // every processor with the one has the other
      return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? Isa::avx512_bf16
                                                                                          : Isa::avx512;
    }
    // every processor with AVX2 has F16C
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2 : Isa::baseline;
  }();
  return isa;
#else
  return Isa::baseline;
#endif
}

template <class Function>
Function at_isa(Isa isa, Function baseline, Function avx2, Function avx512, Function avx512_bf16) {
  switch (isa) {
    case Isa::avx512_bf16:
      return avx512_bf16;
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace beit3_fast

#if defined(__x86_64__)
#define BEIT3_AT(isa, ...)                                                                            \
  ::beit3_fast::at_isa((isa), &::beit3_fast::baseline::__VA_ARGS__, &::beit3_fast::avx2::__VA_ARGS__, \
                       &::beit3_fast::avx512::__VA_ARGS__, &::beit3_fast::avx512_bf16::__VA_ARGS__)
#else
#define BEIT3_AT(isa, ...)                                                                                \
  ::beit3_fast::at_isa((isa), &::beit3_fast::baseline::__VA_ARGS__, &::beit3_fast::baseline::__VA_ARGS__, \
                       &::beit3_fast::baseline::__VA_ARGS__, &::beit3_fast::baseline::__VA_ARGS__)
#endif
