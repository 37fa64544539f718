// Code path of x86 processors with AVX2, FMA and F16C; compiled with these switched on, run where they are there.
#include <vector>

#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#include "kernels.inc"

namespace easyspec {
const Kernels* avx2_kernels() { return &KERNELS; }
}  // namespace easyspec
#else
namespace easyspec {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace easyspec
#endif
