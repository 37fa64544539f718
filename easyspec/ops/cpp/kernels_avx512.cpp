// Code path of x86 processors with AVX512 F, BW, VL, DQ and VNNI; compiled with these switched on.
#include <vector>

#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include "simd_avx512.h"
#include "kernels.inc"

namespace easyspec {
const Kernels* avx512_kernels() { return &KERNELS; }
}  // namespace easyspec
#else
namespace easyspec {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace easyspec
#endif
