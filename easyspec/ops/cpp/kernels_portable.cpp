// Code path of any processor.
#include <vector>

#include "kernels.h"
#include "simd_portable.h"
#include "kernels.inc"

namespace easyspec {
const Kernels& portable_kernels() { return KERNELS; }
}  // namespace easyspec
