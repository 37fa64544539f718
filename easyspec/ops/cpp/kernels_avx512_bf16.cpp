// Code path of x86 processors with AVX512 F, BW, VL, DQ, VNNI and BF16; compiled with these switched on.
#include <vector>

#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#include "simd_avx512.h"
#include "kernels.inc"

namespace easyspec {
const Kernels* avx512_bf16_kernels() { return &KERNELS; }
}  // namespace easyspec
#else
namespace easyspec {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace easyspec
#endif
