// Includes simd.h and BEIT3_KERNEL once for each instruction set; see isa.h. Once in a translation unit. A kernel
// header includes no other than kernel headers: a standard header first seen here would be compiled for AVX-512.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "element.h"
#include "isa.h"

#define BEIT3_INLINE inline __attribute__((always_inline))

#define BEIT3_VECTOR_BYTES 16  // x86-64: SSE2; aarch64: NEON
namespace beit3_fast::baseline {
#include "simd.h"
#include BEIT3_KERNEL
}  // namespace beit3_fast::baseline
#undef BEIT3_VECTOR_BYTES

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define BEIT3_VECTOR_BYTES 32
namespace beit3_fast::avx2 {
#include "simd.h"
#include BEIT3_KERNEL
}  // namespace beit3_fast::avx2
#undef BEIT3_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define BEIT3_VECTOR_BYTES 64
namespace beit3_fast::avx512 {
#include "simd.h"
#include BEIT3_KERNEL
}  // namespace beit3_fast::avx512
#undef BEIT3_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(                                                                          \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")
#endif
#define BEIT3_VECTOR_BYTES 64
#define BEIT3_BFLOAT16_DOT
#define BEIT3_INT8_DOT
namespace beit3_fast::avx512_bf16 {
#include "simd.h"
#include BEIT3_KERNEL
}  // namespace beit3_fast::avx512_bf16
#undef BEIT3_INT8_DOT
#undef BEIT3_BFLOAT16_DOT
#undef BEIT3_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

#undef BEIT3_INLINE
#undef BEIT3_KERNEL
