// What the checks share: numbers from a seed, packed weights, and a complaint that ends the program.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "api.h"

#define CHECK(condition, ...)                              \
  do {                                                     \
    if (!(condition)) {                                    \
      std::fprintf(stderr, "%s:%d: ", __FILE__, __LINE__); \
      std::fprintf(stderr, __VA_ARGS__);                   \
      std::fprintf(stderr, " (%s)\n", #condition);         \
      std::exit(1);                                        \
    }                                                      \
  } while (false)

namespace easyspec {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}

  uint32_t bits() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return uint32_t(state_ >> 33);
  }
  int64_t below(int64_t bound) { return int64_t(bits()) % bound; }
  float number() { return float(bits()) * 0x1p-30f - 1.0f; }  // from -1 on, below 1

 private:
  uint64_t state_;
};

inline std::vector<float> numbers(Random& random, int64_t count) {
  std::vector<float> made(static_cast<size_t>(count));
  for (float& each : made) each = random.number();
  return made;
}

// A packed weight in memory that ends where it does.
struct Weight {
  Packed packed;
  std::vector<uint8_t> storage;

  Weight(Packed shape) : packed(shape), storage(size_t(easyspec_packed_bytes(&shape))) { packed.data = storage.data(); }
  Weight(Weight&&) = default;

  double at(int64_t output, int64_t input) const {
    std::vector<float> row(size_t(packed.num_inputs));
    easyspec_unpack_row(&packed, output, row.data());
    return double(row[size_t(input)]);
  }
};

inline Weight dense_weight(Random& random, int32_t format, int64_t num_outputs, int64_t num_inputs) {
  Weight weight({nullptr, num_outputs, num_inputs, format, 0, 0, 0});
  const std::vector<float> source = numbers(random, num_outputs * num_inputs);
  easyspec_pack_dense(&weight.packed, (const uint8_t*)source.data(), FLOAT32, num_inputs * 4);
  return weight;
}

// Codes over their whole range. With whole scales every scale is 1 and minima are whole numbers.
inline Weight coded_weight(Random& random, Packed shape, bool has_whole_scales) {
  const int64_t groups = num_groups(shape), per_group = shape.has_half_scales ? 2 : 1;
  std::vector<int8_t> codes(size_t(shape.num_outputs * shape.num_inputs));
  for (int8_t& code : codes) code = int8_t(shape.format == INT8 ? random.below(256) - 128 : random.below(16));
  // The first output has the largest codes there are.
  for (int64_t k = 0; k < shape.num_inputs; k++) codes[size_t(k)] = shape.format == INT8 ? -128 : 15;
  std::vector<float> scales(size_t(shape.num_outputs * groups * per_group)), minima(size_t(shape.num_outputs * groups));
  for (float& scale : scales) scale = has_whole_scales ? 1.0f : 0.01f + 0.01f * random.number();
  for (float& minimum : minima) minimum = has_whole_scales ? float(random.below(64)) : 0.1f * random.number();
  Weight weight(shape);
  easyspec_pack_codes(&weight.packed, codes.data(), scales.data(), shape.has_minimum ? minima.data() : nullptr);
  return weight;
}

inline Weight any_weight(Random& random, int32_t format, int64_t num_outputs, int64_t num_inputs) {
  if (format < INT8) return dense_weight(random, format, num_outputs, num_inputs);
  return coded_weight(random, {nullptr, num_outputs, num_inputs, format, 0, 1, 0}, false);
}

}  // namespace easyspec
