// Weights as the kernels read them: panels of 16 outputs, so that one load serves 16 sums that run along the inputs.
//
//   float32   [N/16][K][16]
//   bfloat16  [N/16][K/2][16][2]
//   float16   [N/16][K][16]
//   8 bit     [N/16][K/32] groups of { [8][16][4] code + 128, [16] scale, or one for each half of the group: [2][16],
//                                      [16] minimum if there is one }
//   4 bit     [N/16][K/32] groups of { [4][16][4] code of quad q in the low and of quad q + 4 in the high half,
//                                      [16] scale, [16] minimum if there is one, else the minimum is -8 * scale }
//   FP4       like 4 bit without minimum; a code stands for FP4_DOUBLED[code] * scale
//
// N and K are filled up with zero weights to whole panels, pairs and groups. Scales are float16, float32 or bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

namespace easyspec {

enum Format : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3, INT4 = 4, FP4 = 5 };

enum ScaleType : int32_t { HALF_SCALES = 0, WIDE_SCALES = 1, BFLOAT16_SCALES = 2 };

// Twice the numbers of four bits that MXFP4 has: a sign, two bits of exponent and one of fraction.
constexpr int8_t FP4_DOUBLED[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
// Added to them, so that they are unsigned.
constexpr int32_t FP4_OFFSET = 12;

constexpr int64_t PANEL = 16;
constexpr int64_t GROUP = 32;
// Rows of every activation buffer are filled up to whole groups, with zeros.
constexpr int64_t ROW_MULTIPLE = 32;

struct Packed {
  const uint8_t* data;
  int64_t num_outputs;
  int64_t num_inputs;
  int32_t format;
  int32_t scale_type;
  int32_t has_minimum;
  int32_t has_half_scales;  // 8 bit: a scale for 16 inputs instead of 32
  int32_t has_byte_inputs;  // integer weights: inputs are rounded to 8 bits instead of 16
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline int64_t num_panels(const Packed& w) { return (w.num_outputs + PANEL - 1) / PANEL; }

inline int64_t num_groups(const Packed& w) { return (w.num_inputs + GROUP - 1) / GROUP; }

inline int64_t scale_bytes(const Packed& w) { return PANEL * (w.scale_type == WIDE_SCALES ? 4 : 2); }

inline int64_t code_bytes(const Packed& w) { return PANEL * GROUP / (w.format == INT8 ? 1 : 2); }

inline int64_t group_bytes(const Packed& w) {
  return code_bytes(w) + scale_bytes(w) * (1 + (w.has_half_scales ? 1 : 0) + (w.has_minimum ? 1 : 0));
}

inline int64_t panel_bytes(const Packed& w) {
  switch (w.format) {
    case FLOAT32: return w.num_inputs * PANEL * 4;
    case BFLOAT16: return round_up(w.num_inputs, 2) * PANEL * 2;
    case FLOAT16: return w.num_inputs * PANEL * 2;
    default: return num_groups(w) * group_bytes(w);
  }
}

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bfloat16(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }

inline uint16_t to_bfloat16(float value) {
  uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);  // NaN stays one
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_float16(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 1023u;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact
    float value = float(fraction) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  return float_of_bits(sign | (exponent + 112u) << 23 | fraction << 13);
}

inline uint16_t to_float16(float value) {  // nearest, ties to even
  uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return uint16_t(sign | 0x7c00u | (magnitude > 0x7f800000u ? 0x200u : 0u));
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: adding 1/2 leaves the fraction, rounded, in the low bits
    return uint16_t(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f)));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return uint16_t(sign | (rounded - 0x38000000u) >> 13);
}

// The noise of tokens (easyspec/speculation/coupling.py): SplitMix64, a state that goes on by a step for each token, and
// the upper half of its mixed bits.
constexpr int64_t NOISE_STEP = int64_t(0x9E3779B97F4A7C15ull);
constexpr int64_t NOISE_FACTORS[] = {int64_t(0xBF58476D1CE4E5B9ull), int64_t(0x94D049BB133111EBull)};

inline uint64_t mixed(uint64_t bits) {
  bits = (bits ^ bits >> 30) * uint64_t(NOISE_FACTORS[0]);
  bits = (bits ^ bits >> 27) * uint64_t(NOISE_FACTORS[1]);
  return bits ^ bits >> 31;
}

inline uint32_t noise_bits(uint64_t state) { return uint32_t(mixed(state) >> 32); }

}  // namespace easyspec
