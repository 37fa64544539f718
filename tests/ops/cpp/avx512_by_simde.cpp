// The AVX512 code path on a processor that has AVX2 alone: Intel's names stand for SIMDe's functions. For tests only.
#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

namespace {

// What SIMDE 0.7.4 lacks, half by half.
inline __m256i half_of(__m512i v, int i) { return _mm512_extracti64x4_epi64(v, i); }

inline __m256 half_of(__m512 v, int i) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), i)); }

inline __m512i joined(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline __m512 joined(__m256 low, __m256 high) {
  return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_castps_pd(low)), _mm256_castps_pd(high), 1));
}

inline __m512 cvtepi32_ps(__m512i v) {
  return joined(_mm256_cvtepi32_ps(half_of(v, 0)), _mm256_cvtepi32_ps(half_of(v, 1)));
}

inline __m512i cvtps_epi32(__m512 v) {
  return joined(_mm256_cvtps_epi32(half_of(v, 0)), _mm256_cvtps_epi32(half_of(v, 1)));
}

inline __m512i cvtepu16_epi32(__m256i v) {
  return joined(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)));
}

inline __m512 cvtph_ps(__m256i v) {
  return joined(_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}

}  // namespace

#define _mm512_cvtepi32_ps cvtepi32_ps
#define _mm512_cvtps_epi32 cvtps_epi32
#define _mm512_cvtepu16_epi32 cvtepu16_epi32
#define _mm512_cvtph_ps cvtph_ps
#define _mm512_extractf32x8_ps half_of
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#define __AVX512VNNI__ 1
#define __AVX512BF16__ 1
#include "kernels_avx512_bf16.cpp"
