/* Products of many rows of x with an int4 or int8 weight, as in many_rows.c, on CPUs that multiply bytes: four at a
 * time with AVX-512 VNNI, 16 x 64 with 64 x 16 with AMX. Without VNNI the file is empty.
 *
 * A digit of x has 16 bits with a scale per block of columns, and is held as two signed bytes. A weight is one: an int4
 * one times 16, which is how a shift leaves it. VNNI wants one side unsigned, so there weights are 128 larger. What
 * this adds is the same for all rows of w, and sums start without it. Integers may wrap on the way: a block's sum fits
 * into 32 bits.
 *
 * Rows of w are broadcast and rows of x lie side by side in a vector: so w is unpacked in order, and only x, once, and
 * y are transposed. A tile of x has 16 rows.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common.h"

/* Not omp.h, which a compiler without its own OpenMP lacks. */
int omp_get_thread_num(void);

#ifdef VNNI

/* Rows of x in a tile, columns in a step, bytes in a step of a tile. */
#define TILE 16
#define STEP 64
#define BYTES (TILE * STEP)
/* Rows of w that one call multiplies, and that one task does; tiles of x in a pass over w. */
#define PANEL (2 * TILE)
#define TASK (2 * PANEL)
#define PASS 16
#define MOST_BLOCK 256
#define DIGIT 32768

typedef struct {
    const uint8_t *w;
    const void *scale, *from;
    int kind, from_kind, bits, digits, amx;
    /* x: bytes [k / block, tiles, digits, 2 (upper, lower), block / STEP, 16, TILE, 4]. x_offset: [k / block, tiles,
     * digits, 2, TILE], where sums start. x_scale: [k / block, tiles, TILE], of the first digit. */
    int8_t *x;
    int32_t *x_offset;
    float *x_scale, *y;
    long rows, tiles, n, k, group, block;
} many_t;

/* One call: 2 tiles of rows of w [2, steps, TILE, STEP] with a digit of a tile of x. y: [PANEL, TILE]. */
typedef struct {
    const uint8_t *w;
    const int8_t *x;
    const int32_t *offset;
    const float *w_scale;
    __m512 x_scale;
    long steps;
    float *y;
} call_t;

/* ---- x ---- */

ALWAYS __m512 sixteen_floats(const void *p, long i, int kind) {
    if (kind == FLOAT32) return _mm512_loadu_ps((const float *)p + i);
    __m256i halves = load((const uint16_t *)p + i);
    if (kind == FLOAT16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* Store a block of a row of a tile; a row behind the last one is zeros. */
static void fix_block(const many_t *a, long row, long b) {
    const long tile = row / TILE, r = row % TILE, place = b * a->tiles + tile, at = row * a->k + b * a->block;
    const int real = row < a->rows;
    const float unit = a->digits == 1 ? LARGEST : LARGEST * (float)DIGIT;
    __m512 largest = _mm512_setzero_ps(), finite = largest;
    if (real) for (long i = 0; i < a->block; i += 16) {
        __m512 v = sixteen_floats(a->from, at + i, a->from_kind);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
        /* 0 times a number that is not finite is NaN. */
        finite = _mm512_fmadd_ps(v, _mm512_setzero_ps(), finite);
    }
    const float most = _mm512_reduce_max_ps(largest);
    /* Smaller blocks count as zeros: the inverse would not be finite. */
    const __m512 inverse = _mm512_set1_ps(most > 1e-25f ? unit / most : 0.0f);
    a->x_scale[place * TILE + r] = (most > 1e-25f ? most / LARGEST : 0.0f) + _mm512_reduce_add_ps(finite);
    /* An int4 weight is unpacked to the even columns of a step and then the odd ones. */
    const __m128i evens_first = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m512i in_lane = _mm512_broadcast_i32x4(evens_first), zero = _mm512_setzero_si512();
    const __m512i lanes = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), ones = _mm512_set1_epi8(1);
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i every_row = _mm512_mullo_epi32(_mm512_set1_epi32(TILE), count);
    int8_t *to = a->x + place * a->digits * 2 * a->block * TILE;
    __m512i sums[2][2] = {{zero, zero}, {zero, zero}};
    for (long i = 0; i < a->block; i += STEP) {
        int8_t bytes[2][2][STEP] __attribute__((aligned(64)));
        for (int part = 0; part < STEP; part += 16) {
            __m512i v = zero, digit[2];
            if (real) {
                const __m512 numbers = sixteen_floats(a->from, at + i + part, a->from_kind);
                v = _mm512_cvtps_epi32(_mm512_mul_ps(numbers, inverse));
            }
            digit[0] = a->digits == 1 ? v : _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(DIGIT / 2)), 15);
            digit[1] = _mm512_sub_epi32(v, _mm512_slli_epi32(digit[0], 15));
            for (int d = 0; d < a->digits; d++) {
                const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(digit[d], _mm512_set1_epi32(128)), 8);
                _mm_store_si128((__m128i *)(bytes[d][0] + part), _mm512_cvtepi32_epi8(upper));
                _mm_store_si128((__m128i *)(bytes[d][1] + part), _mm512_cvtepi32_epi8(digit[d]));
            }
        }
        for (int d = 0; d < a->digits; d++) for (int low = 0; low < 2; low++) {
            __m512i v = _mm512_load_si512(bytes[d][low]);
            sums[d][low] = _mm512_dpbusd_epi32(sums[d][low], ones, v);
            if (a->bits == 4) v = _mm512_permutexvar_epi64(lanes, _mm512_shuffle_epi8(v, in_lane));
            _mm512_i32scatter_epi32(to + (d * 2 + low) * a->block * TILE + i * TILE + r * 4, every_row, v, 4);
        }
    }
    for (int d = 0; d < a->digits; d++) for (int low = 0; low < 2; low++)
        a->x_offset[((place * a->digits + d) * 2 + low) * TILE + r] = -128 * _mm512_reduce_add_epi32(sums[d][low]);
}

/* ---- w ---- */

/* Unpack block b of TASK rows of w from ``first`` on to [TASK / TILE, steps, TILE, STEP]; rows behind the last one
 * repeat it. */
static void unpack_task(const many_t *a, long first, long b, uint8_t *to) {
    const long bytes = a->k * a->bits / 8, step = STEP * a->bits / 8, steps = a->block / STEP;
    const __m512i upper = _mm512_set1_epi8((char)0xf0), flip = _mm512_set1_epi8((char)(a->amx ? 0 : 0x80));
    const __m512i shift = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_setzero_si256(), 0);
    for (long j = 0; j < TASK; j++) {
        const uint8_t *from = a->w + (first + j < a->n ? first + j : a->n - 1) * bytes + b * steps * step;
        uint8_t *out = to + (j / TILE * steps * TILE + j % TILE) * STEP;
        for (long s = 0; s < steps; s++, from += step, out += BYTES) {
            __m512i v;
            if (a->bits == 8) v = _mm512_loadu_si512(from);
            else v = _mm512_and_si512(_mm512_sllv_epi16(_mm512_broadcast_i64x4(load(from)), shift), upper);
            _mm512_store_si512(out, _mm512_xor_si512(v, flip));
            /* The next block of these columns. */
            _mm_prefetch((const char *)from + steps * step, _MM_HINT_T0);
        }
    }
}

/* ---- products ---- */

ALWAYS void add_row(const call_t *c, long j, __m512i upper, __m512i lower) {
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower);
    const __m512 by = _mm512_mul_ps(c->x_scale, _mm512_set1_ps(c->w_scale[j]));
    float *y = c->y + j * TILE;
    _mm512_store_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), by, _mm512_load_ps(y)));
}

#define AT_ONCE 8

static __attribute__((noinline)) void vnni_product(const call_t *c) {
    for (long first = 0; first < PANEL; first += AT_ONCE) {
        const uint8_t *w = c->w + (first / TILE * c->steps * TILE + first % TILE) * STEP;
        const int8_t *x = c->x;
        __m512i sum[AT_ONCE][2];
        UNROLL for (int j = 0; j < AT_ONCE; j++) UNROLL for (int low = 0; low < 2; low++)
            sum[j][low] = _mm512_load_si512(c->offset + low * TILE);
        for (long s = 0; s < c->steps; s++, w += BYTES) {
            _Pragma("GCC unroll 2") for (long i = 0; i < STEP; i += 4, x += TILE * 4) {
                const __m512i upper = _mm512_load_si512(x), lower = _mm512_load_si512(x + c->steps * BYTES);
                UNROLL for (int j = 0; j < AT_ONCE; j++) {
                    int32_t four;
                    memcpy(&four, w + j * STEP + i, 4);
                    const __m512i all = _mm512_set1_epi32(four);
                    sum[j][0] = _mm512_dpbusd_epi32(sum[j][0], all, upper);
                    sum[j][1] = _mm512_dpbusd_epi32(sum[j][1], all, lower);
                }
            }
        }
        UNROLL for (int j = 0; j < AT_ONCE; j++) add_row(c, first + j, sum[j][0], sum[j][1]);
    }
}

#ifdef AMX
/* Sums that are still to be added: of 2 tiles of rows of w, the upper and the lower bytes. */
typedef struct {
    int32_t sums[2][2][TILE][TILE];
    call_t call;
} late_t;

ALWAYS void add_two(const late_t *late, long j) {
    UNROLL for (long i = j; i < j + 2; i++) {
        const int32_t *upper = late->sums[i / TILE][0][i % TILE], *lower = late->sums[i / TILE][1][i % TILE];
        add_row(&late->call, i, _mm512_load_si512(upper), _mm512_load_si512(lower));
    }
}

/* Leave the sums of a call in ``late``. Those of the call before are added between the tiles' products, which take 16
 * cycles each; behind them they would wait, because a CPU has few tiles to look ahead with. */
static __attribute__((noinline)) void amx_product(const call_t *c, late_t *late) {
    const uint8_t *w = c->w, *other = w + c->steps * BYTES;
    const int8_t *upper = c->x, *lower = upper + c->steps * BYTES;
    /* Compilers do not know that tile instructions read memory. */
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    long j = 0;
    for (long s = 0; s < c->steps; s++, j += 8) {
        _tile_loadd(4, w + s * BYTES, STEP);
        _tile_loadd(6, upper + s * BYTES, STEP);
        _tile_dpbssd(0, 4, 6);
        add_two(late, j);
        _tile_loadd(7, lower + s * BYTES, STEP);
        _tile_dpbssd(1, 4, 7);
        add_two(late, j + 2);
        _tile_loadd(5, other + s * BYTES, STEP);
        _tile_dpbssd(2, 5, 6);
        add_two(late, j + 4);
        _tile_dpbssd(3, 5, 7);
        add_two(late, j + 6);
    }
    for (; j < PANEL; j += 2) add_two(late, j);
    __asm__ volatile("" ::: "memory");
    _tile_stored(0, late->sums[0][0], STEP);
    _tile_stored(1, late->sums[0][1], STEP);
    _tile_stored(2, late->sums[1][0], STEP);
    _tile_stored(3, late->sums[1][1], STEP);
    late->call = *c;
    __asm__ volatile("" ::: "memory");
}
#endif

ALWAYS void start_tiles(int amx) {
#ifdef AMX
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } all = {.palette = 1};
    for (int i = 0; i < 8; i++) all.bytes[i] = STEP, all.rows[i] = TILE;
    if (amx) _tile_loadconfig(&all);
#endif
}

ALWAYS void end_tiles(int amx) {
#ifdef AMX
    if (amx) _tile_release();
#endif
}

/* Write rows of x from tile ``start`` on from y [tiles, TASK, TILE] to ``columns`` columns of the result. */
static void write_task(const many_t *a, long first, long start, long end, long columns, const float *y) {
    for (long row = start * TILE; row < end * TILE && row < a->rows; row += 4) {
        const float *from = y + (row / TILE - start) * TASK * TILE + row % TILE;
        float *to = a->y + row * a->n + first;
        const long rest = a->rows - row < 4 ? a->rows - row : 4;
        long j = 0;
        if (rest == 4) for (; j + 4 <= columns; j += 4) {
            __m128 part[4];
            UNROLL for (int i = 0; i < 4; i++) part[i] = _mm_load_ps(from + (j + i) * TILE);
            _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
            UNROLL for (int i = 0; i < 4; i++) _mm_storeu_ps(to + i * a->n + j, part[i]);
        }
        for (; j < columns; j++) for (long i = 0; i < rest; i++) to[i * a->n + j] = from[j * TILE + i];
    }
}

/* Multiply TASK rows of w from row ``first`` on with rows of x from tile ``start`` on. */
static void task_product(const many_t *a, long first, long start, uint8_t *w, float *y) {
    const long end = start + PASS < a->tiles ? start + PASS : a->tiles, steps = a->block / STEP;
    const long columns = a->n - first < TASK ? a->n - first : TASK, groups = a->k / a->group;
    float scale[2][TASK] = {{0}};
#ifdef AMX
    late_t late __attribute__((aligned(64)));
    /* The first call adds nothing. */
    memset(&late, 0, sizeof(late));
    late.call.w_scale = scale[0], late.call.y = y;
#endif
    memset(y, 0, (end - start) * TILE * TASK * sizeof(float));
    for (long b = 0; b < a->k / a->block; b++) {
        const long group = b * a->block / a->group;
        /* Two, because sums of the block before may be added late. */
        float *of_group = scale[group % 2];
        if (b * a->block % a->group == 0) for (long j = 0; j < TASK; j++)
            of_group[j] = j < columns ? to_float(a->scale, (first + j) * groups + group, a->kind) : 0;
        unpack_task(a, first, b, w);
        for (long tile = start; tile < end; tile++) for (int d = 0; d < a->digits; d++) {
            const long place = b * a->tiles + tile, of_digit = (place * a->digits + d) * 2;
            /* An int4 weight is 16 times as large. */
            const float unit = (d ? 1.0f / DIGIT : 1) * (a->bits == 4 ? 1.0f / 16 : 1);
            const __m512 x_scale = _mm512_mul_ps(_mm512_loadu_ps(a->x_scale + place * TILE), _mm512_set1_ps(unit));
            for (long p = 0; p < columns; p += PANEL) {
                const call_t c = {w + p * a->block, a->x + of_digit * a->block * TILE, a->x_offset + of_digit * TILE,
                                  of_group + p, x_scale, steps, y + ((tile - start) * TASK + p) * TILE};
#ifdef AMX
                if (a->amx) amx_product(&c, &late);
                else
#endif
                vnni_product(&c);
            }
        }
    }
#ifdef AMX
    if (a->amx) for (long j = 0; j < PANEL; j += 2) add_two(&late, j);
#endif
    write_task(a, first, start, end, columns, y);
}

/* Arguments as in many_rows.c, but for block, a multiple of STEP, x [rows, k] of a kind of its own, and amx, 1 to use
 * it. Return 1 for lack of memory. */
int many_rows_512_product(const uint8_t *w, const void *scale, int kind, const void *x, float *y, long rows, long n,
                          long k, long group, long block, int bits, int precise, int threads, int x_kind, int amx) {
    const long tiles = (rows + TILE - 1) / TILE, blocks = k / block, digits = 1 + precise;
    many_t a = {w, scale, x, kind, x_kind, bits, digits, amx, 0, 0, 0, y, rows, tiles, n, k, group, block};
    const long w_bytes = TASK * MOST_BLOCK, y_bytes = PASS * TILE * TASK * sizeof(float);
    a.x = aligned_alloc(64, digits * 2 * tiles * TILE * k);
    a.x_offset = aligned_alloc(64, digits * 2 * tiles * TILE * blocks * sizeof(int32_t));
    a.x_scale = malloc(tiles * TILE * blocks * sizeof(float));
    char *scratch = aligned_alloc(64, threads * (w_bytes + y_bytes));
    const int failed = !a.x || !a.x_offset || !a.x_scale || !scratch;
    if (!failed) {
        #pragma omp parallel num_threads(threads)
        {
            char *own = scratch + omp_get_thread_num() * (w_bytes + y_bytes);
            #pragma omp for schedule(static)
            for (long at = 0; at < tiles * blocks; at++)
                for (long r = 0; r < TILE; r++) fix_block(&a, at / blocks * TILE + r, at % blocks);
            start_tiles(amx);
            #pragma omp for schedule(dynamic)
            for (long first = 0; first < n; first += TASK)
                for (long start = 0; start < tiles; start += PASS)
                    task_product(&a, first, start, (uint8_t *)own, (float *)(own + w_bytes));
            end_tiles(amx);
        }
    }
    free(a.x);
    free(a.x_offset);
    free(a.x_scale);
    free(scratch);
    return failed;
}

/* Ask Linux for AMX in this process; return 0 if it may be used. */
int request_amx(void) {
#ifdef AMX
    /* ARCH_REQ_XCOMP_PERM, for the state of the tiles. */
    return syscall(SYS_arch_prctl, 0x1023, 18) != 0;
#else
    return 1;
#endif
}

#endif
