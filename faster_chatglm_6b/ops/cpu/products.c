/* Products of a few rows of x with a weight [n, k] whose bytes stay as the checkpoint stores them: int4, int8, floats.
 *
 * y = x w^T in float32, x [rows, k] float32. Integer weights meet x as fixed point with a scale per block of columns.
 * Products and sums of its digits are exact integers, so x's rounding is the only one before float32: 2^-16 of the
 * block's largest, or 2^-24 where the caller asks for one more digit. A row of x that is not finite gives NaN. The
 * caller checks the sizes; ops/cpu/native.py compiles.
 *
 * Vectors have 32 bytes. VNNI only replaces how int4 digits are multiplied; everything else is AVX2.
 */
#include <math.h>
#include <stdlib.h>

#include "common.h"

/* Every row j of w and r of x in a tile. */
#define EACH UNROLL for (int j = 0; j < tile; j++) UNROLL for (int r = 0; r < rows; r++)
/* Rows of w in a tile, rows of x in a pass. */
#define TILE 4
#define PASS 4

/* How many bytes ahead of a row of w to fetch: the same place of the next tile, if the rows are short. */
ALWAYS long ahead(long row_bytes) { return row_bytes <= 4096 ? TILE * row_bytes : 768; }

ALWAYS void fetch(const void *p, long distance) { _mm_prefetch((const char *)p + distance, _MM_HINT_T0); }

/* ---- x as fixed point ---- */

#define MOST_DIGITS 3

/* Digits are signed, the most significant first: of 8 bits for int4 weights, of 16 for int8 ones.
 * int4: digits int8 [rows, k / block, 2 (even, odd columns), count, block / 2]. int8: int16 [count, rows, k].
 * scale: [rows, k / block], of the last two digits of int4, of the first one of int8.
 * offset: int32 [rows, k / block, 2, 8], because int4 weights are multiplied as 0..15: 8 times the block's sum of the
 * last two digits, and of the one before, each in the first of eight places. */
typedef struct {
    void *digits;
    float *scale;
    int32_t *offset;
    int count;
} fixed_t;

static void fix_for_int4(fixed_t *fixed, const int32_t *integers, long b, long block) {
    const long half = block / 2, count = fixed->count;
    int32_t sums[2] = {0, 0};
    for (long odd = 0; odd < 2; odd++) {
        int8_t *to = (int8_t *)fixed->digits + (b * 2 + odd) * count * half;
        for (long i = 0; i < half; i++) {
            int32_t all = integers[2 * i + odd], above = (all + 128) >> 8, top = (above + 128) >> 8;
            to[(count - 1) * half + i] = (int8_t)(all - above * 256);
            to[(count - 2) * half + i] = (int8_t)(count == 2 ? above : above - top * 256);
            if (count == 3) to[i] = (int8_t)top;
            sums[0] += count == 2 ? all : all - top * 65536;
            sums[1] += top;
        }
    }
    fixed->offset[b * 16] = 8 * sums[0];
    fixed->offset[b * 16 + 8] = 8 * sums[1];
}

static void fix_for_int8(fixed_t *fixed, const int32_t *integers, long first, long block, long all) {
    int16_t *to = (int16_t *)fixed->digits + first;
    for (long i = 0; i < block; i++) {
        int32_t above = fixed->count == 1 ? integers[i] : (integers[i] + 32768) >> 16;
        to[i] = (int16_t)above;
        if (fixed->count == 2) to[all + i] = (int16_t)(integers[i] - above * 65536);
    }
}

/* Return 1 for lack of memory. */
static int fix(fixed_t *fixed, const float *x, long rows, long k, long block, int bits, int precise) {
    const long blocks = rows * k / block;
    fixed->count = (bits == 4 ? 2 : 1) + precise;
    fixed->digits = malloc(rows * k * fixed->count * (bits == 4 ? 1 : 2));
    fixed->scale = malloc(blocks * sizeof(float));
    fixed->offset = calloc(bits == 4 ? blocks * 16 : 1, sizeof(int32_t));
    if (!fixed->digits || !fixed->scale || !fixed->offset) return 1;
    const float unit = !precise ? LARGEST : bits == 4 ? LARGEST * 256.0f : LARGEST * 65536.0f;
    for (long b = 0; b < blocks; b++) {
        const float *from = x + b * block;
        int32_t integers[256];
        __m256 largest = _mm256_setzero_ps(), finite = largest;
        for (long i = 0; i < block; i += 8) {
            __m256 v = _mm256_loadu_ps(from + i);
            largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v));
            /* 0 times a number that is not finite is NaN. */
            finite = _mm256_fmadd_ps(v, _mm256_setzero_ps(), finite);
        }
        float lanes[8], most = 0;
        _mm256_storeu_ps(lanes, largest);
        for (int i = 0; i < 8; i++) most = lanes[i] > most ? lanes[i] : most;
        /* Smaller blocks count as zeros: the inverse would not be finite. */
        const __m256 inverse = _mm256_set1_ps(most > 1e-25f ? unit / most : 0.0f);
        for (long i = 0; i < block; i += 8) {
            __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + i), inverse));
            _mm256_storeu_si256((__m256i *)(integers + i), v);
        }
        fixed->scale[b] = (most > 1e-25f ? most / (bits == 4 ? unit : LARGEST) : 0.0f) + sum_of(finite);
        if (bits == 4) fix_for_int4(fixed, integers, b, block);
        else fix_for_int8(fixed, integers, b * block, block, rows * k);
    }
    return 0;
}

static void release(fixed_t *fixed) {
    free(fixed->digits);
    free(fixed->scale);
    free(fixed->offset);
}

/* ---- int4 ---- */

/* Four digits 0..15 times four signed digits into each int32, or two into each int16, of which a block's sums are small
 * enough: 256 columns give 16 products of at most 15 * 128. */
#ifdef VNNI
ALWAYS __m256i multiply(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_epi32(sum, w, x); }
ALWAYS __m256i widen(__m256i sum) { return sum; }
#else
ALWAYS __m256i multiply(__m256i sum, __m256i w, __m256i x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); }
ALWAYS __m256i widen(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif

typedef struct {
    const uint8_t *w;
    const void *scale;
    int kind;
    fixed_t x;
    float *y;
    long rows, n, k, group;
} integers_t;

ALWAYS void int4_tile(const integers_t *a, long first, long row, const int tile, const int rows, const int steps,
                      const int count) {
    const long bytes = a->k / 2, half = steps * 32, blocks = bytes / half, groups = a->k / a->group;
    const long per_group = blocks / groups, distance = ahead(bytes);
    const __m256i nibble = _mm256_set1_epi8(15), eights = _mm256_set1_epi8((char)0x88);
    const uint8_t *w = a->w + first * bytes;
    const int8_t *x = (const int8_t *)a->x.digits + row * a->k * count;
    const float *x_scale = a->x.scale + row * blocks;
    const int32_t *offset = a->x.offset + row * blocks * 16;
    __m256 total[TILE][PASS];
    EACH total[j][r] = _mm256_setzero_ps();
    for (long group = 0; group < groups; group++) {
        float scale[TILE];
        UNROLL for (int j = 0; j < tile; j++) scale[j] = to_float(a->scale, (first + j) * groups + group, a->kind);
        for (long b = group * per_group; b < (group + 1) * per_group; b++) {
            __m256i sum[TILE][PASS][MOST_DIGITS];
            EACH UNROLL for (int d = 0; d < count; d++) sum[j][r][d] = _mm256_setzero_si256();
            _Pragma("GCC unroll 1") for (long step = 0; step < half; step += 32) {
                const uint8_t *from = w + b * half + step;
                const int8_t *digits = x + b * half * 2 * count + step;
                UNROLL for (int j = 0; j < tile; j++) {
                    __m256i pair = _mm256_xor_si256(load(from + j * bytes), eights);
                    fetch(from + j * bytes, distance);
                    __m256i even = _mm256_and_si256(_mm256_srli_epi16(pair, 4), nibble);
                    __m256i odd = _mm256_and_si256(pair, nibble);
                    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int d = 0; d < count; d++) {
                        const int8_t *at = digits + r * a->k * count + d * half;
                        sum[j][r][d] = multiply(sum[j][r][d], even, load(at));
                        sum[j][r][d] = multiply(sum[j][r][d], odd, load(at + count * half));
                    }
                }
            }
            EACH {
                const long place = r * blocks + b;
                __m256 factor = _mm256_set1_ps(scale[j] * x_scale[place]);
                __m256i last = _mm256_slli_epi32(widen(sum[j][r][count - 2]), 8);
                last = _mm256_sub_epi32(_mm256_add_epi32(last, widen(sum[j][r][count - 1])), load(offset + place * 16));
                total[j][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(last), factor, total[j][r]);
                if (count == 3) {
                    __m256i top = _mm256_sub_epi32(widen(sum[j][r][0]), load(offset + place * 16 + 8));
                    factor = _mm256_mul_ps(factor, _mm256_set1_ps(65536.0f));
                    total[j][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(top), factor, total[j][r]);
                }
            }
        }
    }
    EACH a->y[(row + r) * a->n + first + j] = sum_of(total[j][r]);
}

/* ---- int8 ---- */

ALWAYS void int8_tile(const integers_t *a, long first, long row, const int tile, const int rows, const int steps,
                      const int count) {
    const long block = steps * 16, blocks = a->k / block, groups = a->k / a->group;
    const long per_group = blocks / groups, distance = ahead(a->k);
    const uint8_t *w = a->w + first * a->k;
    const int16_t *x = (const int16_t *)a->x.digits + row * a->k;
    const float *x_scale = a->x.scale + row * blocks;
    __m256 total[TILE][PASS];
    EACH total[j][r] = _mm256_setzero_ps();
    for (long group = 0; group < groups; group++) {
        float scale[TILE];
        UNROLL for (int j = 0; j < tile; j++) scale[j] = to_float(a->scale, (first + j) * groups + group, a->kind);
        for (long b = group * per_group; b < (group + 1) * per_group; b++) {
            __m256i sum[TILE][PASS][MOST_DIGITS];
            EACH UNROLL for (int d = 0; d < count; d++) sum[j][r][d] = _mm256_setzero_si256();
            for (long at = b * block; at < (b + 1) * block; at += 16) {
                UNROLL for (int j = 0; j < tile; j++) {
                    const uint8_t *from = w + j * a->k + at;
                    fetch(from, distance);
                    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
                    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int d = 0; d < count; d++) {
                        __m256i digits = load(x + (d * a->rows + r) * a->k + at);
                        sum[j][r][d] = _mm256_add_epi32(sum[j][r][d], _mm256_madd_epi16(wide, digits));
                    }
                }
            }
            EACH {
                __m256 factor = _mm256_set1_ps(scale[j] * x_scale[r * blocks + b]);
                total[j][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[j][r][0]), factor, total[j][r]);
                if (count == 2) {
                    factor = _mm256_mul_ps(factor, _mm256_set1_ps(1.0f / 65536.0f));
                    total[j][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[j][r][1]), factor, total[j][r]);
                }
            }
        }
    }
    EACH a->y[(row + r) * a->n + first + j] = sum_of(total[j][r]);
}

/* ---- floats ---- */

typedef struct {
    const void *w;
    const float *x;
    float *y;
    long n, k;
} floats_t;

ALWAYS void float_tile(const floats_t *a, long first, long row, const int tile, const int rows, const int kind) {
    const long k = a->k, width = kind == FLOAT32 ? 4 : 2, distance = ahead(k * width);
    const char *w = (const char *)a->w + first * k * width;
    const float *x = a->x + row * k;
    __m256 total[TILE][PASS];
    EACH total[j][r] = _mm256_setzero_ps();
    long i = 0;
    for (; i + 8 <= k; i += 8) {
        UNROLL for (int j = 0; j < tile; j++) {
            const char *from = w + j * k * width;
            fetch(from + i * width, distance);
            __m256 wide = eight_floats(from, i, kind);
            UNROLL for (int r = 0; r < rows; r++)
                total[j][r] = _mm256_fmadd_ps(wide, _mm256_loadu_ps(x + r * k + i), total[j][r]);
        }
    }
    EACH {
        float sum = sum_of(total[j][r]);
        for (long rest = i; rest < k; rest++) sum += to_float(w + j * k * width, rest, kind) * x[r * k + rest];
        a->y[(row + r) * a->n + first + j] = sum;
    }
}

/* ---- which tile: its numbers are constants, and each is a function of its own, for the sake of its registers ---- */

#define TILES(name, tile_of, type, ...)                                                                   \
    static __attribute__((noinline)) void name##_41(const type *a, long first, long row) {                \
        tile_of(a, first, row, 4, 1, __VA_ARGS__);                                                        \
    }                                                                                                     \
    static __attribute__((noinline)) void name##_22(const type *a, long first, long row) {                \
        tile_of(a, first, row, 2, 2, __VA_ARGS__);                                                        \
    }                                                                                                     \
    static __attribute__((noinline)) void name##_14(const type *a, long first, long row) {                \
        tile_of(a, first, row, 1, 4, __VA_ARGS__);                                                        \
    }                                                                                                     \
    static __attribute__((noinline)) void name##_11(const type *a, long first, long row) {                \
        tile_of(a, first, row, 1, 1, __VA_ARGS__);                                                        \
    }                                                                                                     \
    static void name(const type *a, long rows, int threads) {                                             \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                 \
        for (long first = 0; first < a->n; first += TILE) {                                               \
            const long end = first + TILE < a->n ? first + TILE : a->n;                                   \
            long row = 0;                                                                                 \
            for (; row + 4 <= rows; row += 4) for (long j = first; j < end; j++) name##_14(a, j, row);    \
            for (; row + 2 <= rows && end == first + TILE; row += 2) {                                    \
                name##_22(a, first, row);                                                                 \
                name##_22(a, first + 2, row);                                                             \
            }                                                                                             \
            for (; row < rows; row++) {                                                                   \
                if (end == first + TILE) name##_41(a, first, row);                                        \
                else for (long j = first; j < end; j++) name##_11(a, j, row);                             \
            }                                                                                             \
        }                                                                                                 \
    }

TILES(int4_by_256, int4_tile, integers_t, 4, 2)
TILES(int4_by_256_precise, int4_tile, integers_t, 4, 3)
TILES(int4_by_64, int4_tile, integers_t, 1, 2)
TILES(int4_by_64_precise, int4_tile, integers_t, 1, 3)
TILES(int8_by_256, int8_tile, integers_t, 16, 1)
TILES(int8_by_256_precise, int8_tile, integers_t, 16, 2)
TILES(int8_by_16, int8_tile, integers_t, 1, 1)
TILES(int8_by_16_precise, int8_tile, integers_t, 1, 2)
TILES(of_float32, float_tile, floats_t, FLOAT32)
TILES(of_float16, float_tile, floats_t, FLOAT16)
TILES(of_bfloat16, float_tile, floats_t, BFLOAT16)

/* ---- what Python calls; integers return 1 for lack of memory ---- */

/* w: int8 [n, k * bits / 8]. scale: [n, k / group] of a kind. block: 256 or 64 columns (256 or 16 for int8) that
 * divide group. precise: 1 for one more digit of x. x: [rows, k]. y: [rows, n]. */
int integer_product(const uint8_t *w, const void *scale, int kind, const float *x, float *y, long rows, long n, long k,
                    long group, long block, int bits, int precise, int threads) {
    static void (*const serve[2][2][2])(const integers_t *, long, int) = {
        {{int4_by_64, int4_by_64_precise}, {int4_by_256, int4_by_256_precise}},
        {{int8_by_16, int8_by_16_precise}, {int8_by_256, int8_by_256_precise}},
    };
    integers_t a = {w, scale, kind, {0}, y, rows, n, k, group};
    const int failed = fix(&a.x, x, rows, k, block, bits, precise);
    if (!failed) serve[bits == 8][block == 256][precise](&a, rows, threads);
    release(&a.x);
    return failed;
}

/* w: [n, k] of a kind. x: [rows, k]. y: [rows, n]. */
void float_product(const void *w, int kind, const float *x, float *y, long rows, long n, long k, int threads) {
    const floats_t a = {w, x, y, n, k};
    (kind == FLOAT32 ? of_float32 : kind == FLOAT16 ? of_float16 : of_bfloat16)(&a, rows, threads);
}

/* Unpack int8 [n, k * bits / 8] to [n, k]: float32 values, or bfloat16 integers for scale 0 (they are exact). */
void unpack(const int8_t *w, const void *scale, int kind, void *out, long n, long k, long group, int bits, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < n; row++) {
        const int8_t *from = w + row * (k * bits / 8);
        for (long start = 0; start < k; start += group) {
            const float factor = scale ? to_float(scale, row * (k / group) + start / group, kind) : 1.0f;
            float wide[256];
            for (long at = start; at < start + group; at += 256) {
                const long count = start + group - at < 256 ? start + group - at : 256;
                if (bits == 8) for (long i = 0; i < count; i++) wide[i] = from[at + i] * factor;
                else for (long i = 0; i < count / 2; i++) {
                    const int8_t pair = from[at / 2 + i];
                    wide[2 * i] = (pair >> 4) * factor;
                    wide[2 * i + 1] = ((int8_t)((uint8_t)pair << 4) >> 4) * factor;
                }
                if (scale) for (long i = 0; i < count; i++) ((float *)out)[row * k + at + i] = wide[i];
                else for (long i = 0; i < count; i++) {
                    union { float value; uint32_t bits; } exact = {wide[i]};
                    ((uint16_t *)out)[row * k + at + i] = (uint16_t)(exact.bits >> 16);
                }
            }
        }
    }
}
