// Vectors of 16 floats: AVX512 F, BW, VL, DQ, VNNI.
#pragma once

#include <immintrin.h>

#include "packed.h"

namespace {

using easyspec::NOISE_FACTORS;
using easyspec::NOISE_STEP;

using vf = __m512;
using vi = __m512i;
constexpr int W = 16;

inline vf zero() { return _mm512_setzero_ps(); }
inline vf set1(float x) { return _mm512_set1_ps(x); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf vround(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf zero_below(vf value, vf x, float bound) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_GE_OQ), value);
}
inline vf scale_by_power(vf value, vf n) {
  vi exponent = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
  return _mm512_mul_ps(value, _mm512_castsi512_ps(exponent));
}
inline __m256 folded(vf v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
inline float sum(vf v) {
  __m256 whole = folded(v);
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest(vf v) {
  __m256 whole = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
// out[i] becomes lane i of each of the 16 vectors.
inline void turn(const vf* rows, float* out) {
  vf pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      const __m512d a = _mm512_castps_pd(pairs[i + j]), b = _mm512_castps_pd(pairs[i + 2 + j]);
      quads[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      quads[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int j = 0; j < 4; j++) {
    const vf even = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88), odd = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xdd);
    const vf even_behind = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
    const vf odd_behind = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xdd);
    store(out + j * W, _mm512_shuffle_f32x4(even, even_behind, 0x88));
    store(out + (4 + j) * W, _mm512_shuffle_f32x4(odd, odd_behind, 0x88));
    store(out + (8 + j) * W, _mm512_shuffle_f32x4(even, even_behind, 0xdd));
    store(out + (12 + j) * W, _mm512_shuffle_f32x4(odd, odd_behind, 0xdd));
  }
}
// 16 whole numbers, quads of them as 0, 2, 1, 3; returns their sum.
inline int32_t store_codes(const vf* codes, int16_t* out) {
  const vi whole = _mm512_cvtps_epi32(codes[0]);
  const __m256i words = _mm512_cvtepi32_epi16(whole);
  _mm256_storeu_si256((__m256i*)out, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
  return _mm512_reduce_add_epi32(whole);
}
// The same as bytes, in order.
inline int32_t store_codes(const vf* codes, int8_t* out) {
  const vi whole = _mm512_cvtps_epi32(codes[0]);
  _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(whole));
  return _mm512_reduce_add_epi32(whole);
}
inline vf load_bfloat16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline vf load_float16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// Of 16 pairs of neighbouring inputs in bfloat16.
inline vf load_first_of_pairs(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
inline vf load_second_of_pairs(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000u))));
}
inline uint32_t lanes_between(vf v, float low, float high) {
  return uint32_t(_mm512_cmp_ps_mask(v, set1(low), _CMP_GE_OQ) & _mm512_cmp_ps_mask(v, set1(high), _CMP_LT_OQ));
}
inline __m256i noise_bits_of_8(uint64_t state) {
  const __m512i lanes = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(NOISE_STEP));
  __m512i bits = _mm512_add_epi64(_mm512_set1_epi64(int64_t(state)), lanes);
  bits = _mm512_mullo_epi64(_mm512_xor_si512(bits, _mm512_srli_epi64(bits, 30)), _mm512_set1_epi64(NOISE_FACTORS[0]));
  bits = _mm512_mullo_epi64(_mm512_xor_si512(bits, _mm512_srli_epi64(bits, 27)), _mm512_set1_epi64(NOISE_FACTORS[1]));
  return _mm512_cvtepi64_epi32(_mm512_srli_epi64(_mm512_xor_si512(bits, _mm512_srli_epi64(bits, 31)), 32));
}
// Bit i: the noise of token i behind the one with `state` has at least `least` for its bits.
inline uint32_t lucky_lanes(uint64_t state, uint32_t least) {
  const __m256i low = noise_bits_of_8(state), high = noise_bits_of_8(state + 8 * uint64_t(NOISE_STEP));
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  return uint32_t(_mm512_cmpge_epu32_mask(both, _mm512_set1_epi32(int32_t(least))));
}
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

}  // namespace
