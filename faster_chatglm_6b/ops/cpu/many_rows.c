/* Products of many rows of x with an int4 or int8 weight [n, k] whose bytes stay as the checkpoint stores them.
 *
 * y = x w^T in float32, x [rows, k] float32. As in products.c, x is fixed point with a scale per block of columns, and
 * sums within a block are exact: x's rounding, 2^-16 of the block's largest or 2^-30 where the caller asks for a second
 * digit, is the only one before float32. A row of x that is not finite gives NaN. The caller checks the sizes.
 *
 * A block of w is unpacked to int16 once and stays in the cache for all rows of x. Its columns come in pairs, which one
 * instruction multiplies and adds. Two pairs p and q share a multiplication (Winograd 1968):
 *     (x_p + w_q) (x_q + w_p) = x_p w_p + x_q w_q + x_p x_q + w_p w_q
 * The last two terms belong to a row of x or of w alone, and are taken off. Integers may wrap on the way: the sum of a
 * block fits into 32 bits. Additions have more units than multiplications, so this is a quarter faster.
 */
#include <stdlib.h>
#include <string.h>

#include "common.h"

/* Not omp.h, which a compiler without its own OpenMP lacks. */
int omp_get_thread_num(void);

/* Rows of x in a tile; rows of w in a panel, and panels that one task multiplies; rows of x in a pass over w. */
#define TILE 4
#define PANEL 16
#define PANELS 4
#define PASS (64 * TILE)
#define MOST_BLOCK 256

#ifdef VNNI
ALWAYS __m256i multiply(__m256i sum, __m256i w, __m256i x) { return _mm256_dpwssd_epi32(sum, w, x); }
#else
ALWAYS __m256i multiply(__m256i sum, __m256i w, __m256i x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }
#endif

typedef struct {
    const uint8_t *w;
    const void *scale;
    int kind, bits, digits;
    /* x: int16 [digits, tiles, k / 2 pairs, TILE, 2]. x_scale: [tiles, k / block, TILE], of the first digit.
     * x_own: [digits, tiles, k / block, TILE], the products of a row's pairs. */
    int16_t *x;
    float *x_scale;
    uint32_t *x_own;
    float *y;
    long rows, tiles, n, k, group, block;
} many_t;

/* ---- x ---- */

#define DIGIT 32768

/* The columns of the four pairs that eight columns are unpacked to. */
static const int of_int4[4][2] = {{1, 5}, {0, 4}, {3, 7}, {2, 6}}, of_int8[4][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}};

/* Store a row of a tile; a row behind the last one, x = 0, is zeros. */
ALWAYS void fix_row(const many_t *a, const float *x, long tile, long r, const int columns[4][2]) {
    const long per_digit = a->tiles * a->k * TILE, blocks = a->k / a->block;
    const float unit = a->digits == 1 ? LARGEST : LARGEST * (float)DIGIT;
    for (long b = 0; b < blocks; b++) {
        const float *from = x + b * a->block;
        __m256 largest = _mm256_setzero_ps(), finite = largest;
        if (x) for (long i = 0; i < a->block; i += 8) {
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
        a->x_scale[(tile * blocks + b) * TILE + r] = (most > 1e-25f ? most / LARGEST : 0.0f) + sum_of(finite);
        int16_t *to = a->x + (tile * a->k + b * a->block) * TILE + r * 2;
        uint32_t own[2] = {0, 0};
        for (long i = 0; i < a->block; i += 8, to += 8 * TILE) {
            int32_t all[8] = {0}, digits[2][4][2];
            if (x) {
                __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + i), inverse));
                _mm256_storeu_si256((__m256i *)all, v);
            }
            for (int pair = 0; pair < 4; pair++) for (int side = 0; side < 2; side++) {
                const int32_t one = all[columns[pair][side]];
                digits[0][pair][side] = a->digits == 1 ? one : (one + DIGIT / 2) >> 15;
                digits[1][pair][side] = one - digits[0][pair][side] * DIGIT;
            }
            for (int d = 0; d < a->digits; d++)
            for (int pair = 0; pair < 4; pair++) for (int side = 0; side < 2; side++) {
                to[d * per_digit + pair * TILE * 2 + side] = (int16_t)digits[d][pair][side];
                if (pair % 2) own[d] += (uint32_t)(digits[d][pair][side] * digits[d][pair - 1][side]);
            }
        }
        uint32_t *sums = a->x_own + (tile * blocks + b) * TILE + r;
        for (int d = 0; d < a->digits; d++) sums[d * a->tiles * blocks * TILE] = own[d];
    }
}

/* ---- w ---- */

/* Unpack block b of the rows of w from ``first`` on to int16 [block / 2 pairs, PANEL, 2]; rows behind the last one
 * repeat it. own: [PANEL], the products of a row's pairs. */
ALWAYS void unpack_panel(const many_t *a, long first, long b, int16_t *to, uint32_t *own, const int bits) {
    const long bytes = a->k * bits / 8, words = a->block * bits / 32;
    const __m256i nibble = _mm256_set1_epi16(15), eight = _mm256_set1_epi16(8);
    for (int half = 0; half < 2; half++) {
        const uint8_t *row[8];
        __m256i products = _mm256_setzero_si256();
        for (int j = 0; j < 8; j++) {
            const long at = first + half * 8 + j;
            row[j] = a->w + (at < a->n ? at : a->n - 1) * bytes + b * words * 4;
        }
        for (long i = 0; i < words; i++) {
            int32_t word[8];
            for (int j = 0; j < 8; j++) memcpy(word + j, row[j] + i * 4, 4);
            __m256i all = _mm256_setr_epi32(word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]);
            __m256i *out = (__m256i *)(to + i * (16 / bits) * PANEL * 2) + half, wide[4];
            UNROLL for (int part = 0; part < 16 / bits; part++) {
                if (bits == 8) wide[part] = _mm256_srai_epi16(_mm256_slli_epi16(all, part ? 0 : 8), 8);
                else {
                    wide[part] = _mm256_and_si256(_mm256_srli_epi16(all, 4 * part), nibble);
                    wide[part] = _mm256_sub_epi16(_mm256_xor_si256(wide[part], eight), eight);
                }
                _mm256_store_si256(out + part * 2, wide[part]);
                if (part % 2) products = _mm256_add_epi32(products, _mm256_madd_epi16(wide[part], wide[part - 1]));
            }
        }
        _mm256_store_si256((__m256i *)own + half, products);
    }
}

/* ---- products ---- */

/* Add to y [TILE, PANELS * PANEL] what a block of a tile of x times a panel of w gives; pairs is even. */
static __attribute__((noinline)) void tile_product(const int16_t *x, const int16_t *w, long pairs,
                                                   const uint32_t *x_own, const uint32_t *w_own, const float *x_scale,
                                                   const float *w_scale, float unit, float *y) {
    __m256i sum[TILE][2];
    UNROLL for (int r = 0; r < TILE; r++) UNROLL for (int half = 0; half < 2; half++)
        sum[r][half] = _mm256_sub_epi32(_mm256_set1_epi32((int)-x_own[r]), load((const __m256i *)w_own + half));
    for (long i = 0; i < pairs; i += 2) {
        const __m256i *at = (const __m256i *)w;
        const __m256i p[2] = {load(at), load(at + 1)}, q[2] = {load(at + 2), load(at + 3)};
        UNROLL for (int r = 0; r < TILE; r++) {
            int32_t first, second;
            memcpy(&first, x + 2 * r, 4);
            memcpy(&second, x + 2 * (r + TILE), 4);
            const __m256i x_p = _mm256_set1_epi32(first), x_q = _mm256_set1_epi32(second);
            UNROLL for (int half = 0; half < 2; half++)
                sum[r][half] = multiply(sum[r][half], _mm256_add_epi16(x_p, q[half]), _mm256_add_epi16(x_q, p[half]));
            /* Keeps the order, in which sixteen registers are enough; the compiler's own needs more and spills sums. */
            __asm__ volatile("" ::: "memory");
        }
        w += PANEL * 4;
        x += TILE * 4;
    }
    UNROLL for (int r = 0; r < TILE; r++) {
        const __m256 factor = _mm256_set1_ps(x_scale[r] * unit);
        UNROLL for (int half = 0; half < 2; half++) {
            float *to = y + r * PANELS * PANEL + half * 8;
            const __m256 by = _mm256_mul_ps(factor, _mm256_load_ps(w_scale + half * 8));
            _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][half]), by, _mm256_load_ps(to)));
        }
    }
}

/* Multiply PANELS panels of w from row ``first`` on with rows of x from tile ``start`` on. */
static void panels_product(const many_t *a, long first, long start, int16_t *w, float *y) {
    const long end = start + PASS / TILE < a->tiles ? start + PASS / TILE : a->tiles;
    const long blocks = a->k / a->block;
    const long columns = a->n - first < PANELS * PANEL ? a->n - first : PANELS * PANEL;
    memset(y, 0, (end - start) * TILE * PANELS * PANEL * sizeof(float));
    for (long b = 0; b < blocks; b++) {
        float scale[PANELS * PANEL] __attribute__((aligned(32)));
        const long group = b * a->block / a->group, groups = a->k / a->group;
        for (long j = 0; j < PANELS * PANEL; j++)
            scale[j] = j < columns ? to_float(a->scale, (first + j) * groups + group, a->kind) : 0;
        for (long p = 0; p < columns; p += PANEL) {
            uint32_t w_own[PANEL] __attribute__((aligned(32)));
            if (a->bits == 4) unpack_panel(a, first + p, b, w, w_own, 4);
            else unpack_panel(a, first + p, b, w, w_own, 8);
            for (long tile = start; tile < end; tile++) for (int d = 0; d < a->digits; d++) {
                const long place = (tile * blocks + b) * TILE, of_digit = d * a->tiles * blocks * TILE + place;
                float *to = y + (tile - start) * TILE * PANELS * PANEL + p;
                tile_product(a->x + of_digit * a->block, w, a->block / 2, a->x_own + of_digit, w_own,
                             a->x_scale + place, scale + p, d ? 1.0f / DIGIT : 1, to);
            }
        }
    }
    for (long row = start * TILE; row < end * TILE && row < a->rows; row++)
        memcpy(a->y + row * a->n + first, y + (row - start * TILE) * PANELS * PANEL, columns * sizeof(float));
}

/* w: int8 [n, k * bits / 8]. scale: [n, k / group] of a kind. block: columns that share a scale of x, up to 256, a
 * multiple of 8 that divides group. precise: 1 for a second digit of x. x: [rows, k]. y: [rows, n].
 * Return 1 for lack of memory. */
int many_rows_product(const uint8_t *w, const void *scale, int kind, const float *x, float *y, long rows, long n,
                      long k, long group, long block, int bits, int precise, int threads) {
    many_t a = {w, scale, kind, bits, 1 + precise, 0, 0, 0, y, rows, (rows + TILE - 1) / TILE, n, k, group, block};
    const long w_bytes = PANEL * MOST_BLOCK * sizeof(int16_t), y_bytes = PASS * PANELS * PANEL * sizeof(float);
    a.x = malloc(a.digits * a.tiles * TILE * k * sizeof(int16_t));
    a.x_scale = malloc(a.tiles * TILE * (k / block) * sizeof(float));
    a.x_own = malloc(a.digits * a.tiles * TILE * (k / block) * sizeof(uint32_t));
    char *scratch = aligned_alloc(64, threads * (w_bytes + y_bytes));
    const int failed = !a.x || !a.x_scale || !a.x_own || !scratch;
    if (!failed) {
        #pragma omp parallel num_threads(threads)
        {
            char *own = scratch + omp_get_thread_num() * (w_bytes + y_bytes);
            #pragma omp for schedule(static)
            for (long row = 0; row < a.tiles * TILE; row++)
                fix_row(&a, row < rows ? x + row * k : 0, row / TILE, row % TILE, bits == 4 ? of_int4 : of_int8);
            #pragma omp for schedule(dynamic)
            for (long first = 0; first < n; first += PANELS * PANEL)
                for (long start = 0; start < a.tiles; start += PASS / TILE)
                    panels_product(&a, first, start, (int16_t *)own, (float *)(own + w_bytes));
        }
    }
    free(a.x);
    free(a.x_scale);
    free(a.x_own);
    free(scratch);
    return failed;
}
