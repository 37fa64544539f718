// A code path and the threads that run it.
#pragma once

#include <utility>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace easyspec {

inline const Kernels& kernels_of(Path path) {
  if (path == Path::AVX512_BF16 && avx512_bf16_kernels()) return *avx512_bf16_kernels();
  if (path == Path::AVX512 && avx512_kernels()) return *avx512_kernels();
  if (path == Path::AVX2 && avx2_kernels()) return *avx2_kernels();
  return portable_kernels();
}

// Memory of the choice rule, kept from row to row.
struct ChoiceScratch {
  std::vector<int32_t> found;
  std::vector<float> scores, masses, masked, block_tops;
  std::vector<std::pair<int64_t, float>> before;
};

struct Engine {
  ChoiceScratch scratch;
  const Kernels& kernels;
  ThreadPool threads;
  Engine(Path path, int num_threads) : kernels(kernels_of(path)), threads(num_threads) {}
};

}  // namespace easyspec
