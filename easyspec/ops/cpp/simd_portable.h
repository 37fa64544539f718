// Vectors of 8 floats in plain C++, which compilers turn into what the processor has.
#pragma once

#include <cmath>

#include "packed.h"

namespace {

using easyspec::bits_of_float;
using easyspec::float_of_bits;
using easyspec::NOISE_STEP;

constexpr int W = 8;
struct vf {
  float v[W];
};

#define EASYSPEC_EACH(expression) \
  vf r;                           \
  for (int i = 0; i < W; i++) r.v[i] = (expression); \
  return r

inline vf zero() { EASYSPEC_EACH(0.0f); }
inline vf set1(float x) { EASYSPEC_EACH(x); }
inline vf load(const float* p) { EASYSPEC_EACH(p[i]); }
inline void store(float* p, vf x) {
  for (int i = 0; i < W; i++) p[i] = x.v[i];
}
inline vf add(vf a, vf b) { EASYSPEC_EACH(a.v[i] + b.v[i]); }
inline vf sub(vf a, vf b) { EASYSPEC_EACH(a.v[i] - b.v[i]); }
inline vf mul(vf a, vf b) { EASYSPEC_EACH(a.v[i] * b.v[i]); }
inline vf div(vf a, vf b) { EASYSPEC_EACH(a.v[i] / b.v[i]); }
inline vf fma(vf a, vf b, vf c) { EASYSPEC_EACH(a.v[i] * b.v[i] + c.v[i]); }
inline vf fnma(vf a, vf b, vf c) { EASYSPEC_EACH(c.v[i] - a.v[i] * b.v[i]); }
inline vf vmax(vf a, vf b) { EASYSPEC_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline vf vmin(vf a, vf b) { EASYSPEC_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline vf vround(vf a) { EASYSPEC_EACH(std::nearbyint(a.v[i])); }
inline vf zero_below(vf value, vf x, float bound) { EASYSPEC_EACH(x.v[i] >= bound ? value.v[i] : 0.0f); }
inline vf scale_by_power(vf value, vf n) {
  EASYSPEC_EACH(value.v[i] * float_of_bits(uint32_t(int32_t(n.v[i]) + 127) << 23));
}
inline float sum(vf v) {
  float a = v.v[0] + v.v[4], b = v.v[1] + v.v[5], c = v.v[2] + v.v[6], d = v.v[3] + v.v[7];
  return (a + c) + (b + d);
}
inline float largest(vf v) {
  float m = v.v[0];
  for (int i = 1; i < W; i++) m = v.v[i] > m ? v.v[i] : m;
  return m;
}
inline void turn(const vf* rows, float* out) {
  for (int i = 0; i < W; i++)
    for (int j = 0; j < W; j++) out[i * W + j] = rows[j].v[i];
}
// 16 whole numbers, quads of them as 0, 2, 1, 3; returns their sum.
inline int32_t store_codes(const vf* codes, int16_t* out) {
  int32_t total = 0;
  for (int i = 0; i < 16; i++) {
    const int32_t code = int32_t(codes[i / W].v[i % W]);
    out[(i & ~3) | ((i & 1) << 1) | ((i & 2) >> 1)] = int16_t(code);
    total += code;
  }
  return total;
}
inline vf load_bfloat16(const uint16_t* p) { EASYSPEC_EACH(easyspec::from_bfloat16(p[i])); }
inline vf load_float16(const uint16_t* p) { EASYSPEC_EACH(easyspec::from_float16(p[i])); }
inline vf load_first_of_pairs(const uint16_t* p) { EASYSPEC_EACH(easyspec::from_bfloat16(p[2 * i])); }
inline vf load_second_of_pairs(const uint16_t* p) { EASYSPEC_EACH(easyspec::from_bfloat16(p[2 * i + 1])); }
inline uint32_t lanes_between(vf v, float low, float high) {
  uint32_t inside = 0;
  for (int i = 0; i < W; i++) inside |= uint32_t(v.v[i] >= low && v.v[i] < high) << i;
  return inside;
}
// Bit i: the noise of token i behind the one with `state` has at least `least` for its bits.
inline uint32_t lucky_lanes(uint64_t state, uint32_t least) {
  uint32_t lucky = 0;
  for (int i = 0; i < W; i++, state += uint64_t(NOISE_STEP)) lucky |= uint32_t(easyspec::noise_bits(state) >= least) << i;
  return lucky;
}
inline void prefetch(const void*) {}

#undef EASYSPEC_EACH

}  // namespace
