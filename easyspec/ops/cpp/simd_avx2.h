// Vectors of 8 floats: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include "packed.h"

namespace {

using easyspec::NOISE_STEP;

using vf = __m256;
using vi = __m256i;
constexpr int W = 8;

inline vf zero() { return _mm256_setzero_ps(); }
inline vf set1(float x) { return _mm256_set1_ps(x); }
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf vround(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf zero_below(vf value, vf x, float bound) {
  return _mm256_and_ps(value, _mm256_cmp_ps(x, _mm256_set1_ps(bound), _CMP_GE_OQ));
}
// value * 2^n for whole n, -126 to 127.
inline vf scale_by_power(vf value, vf n) {
  vi exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(value, _mm256_castsi256_ps(exponent));
}
inline float sum(vf v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest(vf v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
// out[i] becomes lane i of each of the 8 vectors.
inline void turn(const vf* rows, float* out) {
  vf pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
      quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
    }
  for (int j = 0; j < 4; j++) {
    store(out + j * W, _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x20));
    store(out + (4 + j) * W, _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x31));
  }
}
inline int32_t sum_of(vi v) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
// 16 whole numbers, quads of them as 0, 2, 1, 3; returns their sum.
inline int32_t store_codes(const vf* codes, int16_t* out) {
  const vi first = _mm256_cvtps_epi32(codes[0]), second = _mm256_cvtps_epi32(codes[1]);
  const vi words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
  _mm256_storeu_si256((vi*)out, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
  return sum_of(_mm256_add_epi32(first, second));
}
// The same as bytes, in order.
inline int32_t store_codes(const vf* codes, int8_t* out) {
  const vi first = _mm256_cvtps_epi32(codes[0]), second = _mm256_cvtps_epi32(codes[1]);
  const vi words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
  _mm_storeu_si128((__m128i*)out, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  return sum_of(_mm256_add_epi32(first, second));
}
inline vf load_bfloat16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline vf load_float16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
// Of 8 pairs of neighbouring inputs in bfloat16.
inline vf load_first_of_pairs(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const vi*)p), 16));
}
inline vf load_second_of_pairs(const uint16_t* p) {
  return _mm256_and_ps(_mm256_loadu_ps((const float*)p), _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000u))));
}
// Bit i: lane i is at least `low` and below `high`.
inline uint32_t lanes_between(vf v, float low, float high) {
  vf inside = _mm256_and_ps(_mm256_cmp_ps(v, set1(low), _CMP_GE_OQ), _mm256_cmp_ps(v, set1(high), _CMP_LT_OQ));
  return uint32_t(_mm256_movemask_ps(inside));
}
// Bit i: the noise of token i behind the one with `state` has at least `least` for its bits.
inline uint32_t lucky_lanes(uint64_t state, uint32_t least) {
  uint32_t lucky = 0;
  for (int i = 0; i < W; i++, state += uint64_t(NOISE_STEP)) lucky |= uint32_t(easyspec::noise_bits(state) >= least) << i;
  return lucky;
}
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

}  // namespace
