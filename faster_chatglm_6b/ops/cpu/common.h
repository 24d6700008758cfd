/* What the kernels share: kinds of floats, how to read and write one, sums of a vector, and x's largest number in fixed point. */
#include <immintrin.h>
#include <stdint.h>

#define ALWAYS static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
/* Of 16 bits. */
#define LARGEST 32000

enum kind { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

ALWAYS float to_float(const void *p, long i, int kind) {
    if (kind == FLOAT32) return ((const float *)p)[i];
    if (kind == FLOAT16) return _cvtsh_ss(((const uint16_t *)p)[i]);
    union { uint32_t bits; float value; } wide = {(uint32_t)((const uint16_t *)p)[i] << 16};
    return wide.value;
}

ALWAYS __m256 eight_floats(const void *p, long i, int kind) {
    if (kind == FLOAT32) return _mm256_loadu_ps((const float *)p + i);
    __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)p + i));
    if (kind == FLOAT16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

ALWAYS float sum_of(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

ALWAYS __m256i load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

ALWAYS uint16_t to_bfloat16(float value) {
    union { float value; uint32_t bits; } wide = {value};
    if (value != value) return 0x7fc0;
    return (uint16_t)((wide.bits + 0x7fff + ((wide.bits >> 16) & 1)) >> 16);
}

ALWAYS void store(void *p, long i, int kind, float value) {
    if (kind == FLOAT32) ((float *)p)[i] = value;
    else ((uint16_t *)p)[i] = kind == FLOAT16 ? _cvtss_sh(value, 0) : to_bfloat16(value);
}

ALWAYS void store_eight(void *p, long i, int kind, __m256 v) {
    if (kind == FLOAT32) _mm256_storeu_ps((float *)p + i, v);
    else if (kind == FLOAT16) _mm_storeu_si128((__m128i *)((uint16_t *)p + i), _mm256_cvtps_ph(v, 0));
    else {
        /* As to_bfloat16. */
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i wide = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        wide = _mm256_blendv_epi8(wide, _mm256_set1_epi32(0x7fc0), nan);
        wide = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 8);
        _mm_storeu_si128((__m128i *)((uint16_t *)p + i), _mm256_castsi256_si128(wide));
    }
}
