/* Attention of a decode step on a cache that is written in place, a prompt's append to it, and the sampler's noise.
 *
 * Numbers are read in their own kind, computed in float32, and rounded once. The caller checks shapes and kinds.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

/* Columns of values that are summed up at a time: eight vectors. */
#define COLUMNS 64

int omp_get_thread_num(void);

/* The angles of one row: where its tables start for each part of a head, of which ``half`` pairs turn. */
typedef struct {
    const void *cos, *sin;
    long half, first, second;
} angles_t;

static long clamped(long position, long positions) {
    return position < 0 ? 0 : position < positions ? position : positions - 1;
}

/* Rotate a head of ``width`` numbers. */
ALWAYS void turn(const angles_t *a, const void *from, void *to, long width, int kind) {
    for (long start = 0, part = 0; start < width; start += 2 * a->half, part++) {
        const long place = (part ? a->second : a->first) * a->half;
        for (long i = 0; i < a->half; i++) {
            const float c = to_float(a->cos, place + i, kind), s = to_float(a->sin, place + i, kind);
            const float one = to_float(from, start + i, kind), other = to_float(from, start + a->half + i, kind);
            store(to, start + i, kind, one * c - other * s);
            store(to, start + a->half + i, kind, other * c + one * s);
        }
    }
}

typedef struct {
    const void *qkv;
    void *keys, *values;
    /* Numbers between sequences or pages, heads and slots of the cache. */
    const long *strides;
    /* int32 [batch, pages_per_row], or 0; page: slots of a page. */
    const int32_t *table;
    long pages_per_row, page;
    /* int32 [batch] each; limit may be 0. */
    const int32_t *limit, *length, *finished, *first_key, *position, *sop_index;
    const void *cos, *sin;
    long positions, half;
    void *out;
    long batch, rows, heads, width, capacity;
    float scale;
} step_t;

ALWAYS long slot_of(const step_t *a, long b, long h, long t) {
    const long *s = a->strides;
    if (!a->table) return b * s[0] + h * s[1] + t * s[2];
    return a->table[b * a->pages_per_row + t / a->page] * s[0] + h * s[1] + t % a->page * s[2];
}

ALWAYS float dot(const void *x, const void *y, long width, int kind) {
    __m256 sum = _mm256_setzero_ps();
    long i = 0;
    for (; i + 8 <= width; i += 8) sum = _mm256_fmadd_ps(eight_floats(x, i, kind), eight_floats(y, i, kind), sum);
    float total = sum_of(sum);
    for (; i < width; i++) total += to_float(x, i, kind) * to_float(y, i, kind);
    return total;
}

/* One head of one sequence. own: scratch of rows * width * 2 numbers of ``kind``; weights and where: of each key. */
ALWAYS void step_head(const step_t *a, long b, long h, void *own, float *weights, const void **where, const int kind) {
    const long width = a->width, end = a->length[b], size = kind == FLOAT32 ? 4 : 2;
    const int done = a->finished[b] != 0;
    /* Rows that are done see their new keys only. */
    const long first = done ? end : a->first_key[b], old = end > first ? end - first : 0;
    const long bound = a->limit && a->limit[b] < a->capacity ? a->limit[b] : a->capacity;
    char *query = own, *key = query + a->rows * width * size;
    const char *packed = (const char *)a->qkv + (b * a->rows * a->heads + h) * 3 * width * size;
    const long step = a->heads * 3 * width * size;
    for (long m = 0; m < a->rows; m++) {
        const char *from = packed + m * step;
        const angles_t angles = {a->cos, a->sin, a->half, clamped(a->position[b], a->positions),
                                 clamped(end + m - a->sop_index[b] + 1, a->positions)};
        turn(&angles, from, query + m * width * size, width, kind);
        turn(&angles, from + width * size, key + m * width * size, width, kind);
        if (done || end + m >= bound) continue;
        const long to = slot_of(a, b, h, end + m) * size;
        memcpy((char *)a->keys + to, key + m * width * size, width * size);
        memcpy((char *)a->values + to, from + 2 * width * size, width * size);
    }
    for (long t = 0; t < old; t++) where[t] = (const char *)a->values + slot_of(a, b, h, first + t) * size;
    for (long m = 0; m < a->rows; m++) where[old + m] = packed + m * step + 2 * width * size;
    for (long m = 0; m < a->rows; m++) {
        const long keys = old + m + 1;
        float most = -INFINITY, total = 0;
        for (long t = 0; t < keys; t++) {
            const char *from = t < old ? (const char *)a->keys + ((const char *)where[t] - (const char *)a->values)
                                       : key + (t - old) * width * size;
            weights[t] = dot(query + m * width * size, from, width, kind) * a->scale;
            if (!(weights[t] <= most)) most = weights[t];
        }
        for (long t = 0; t < keys; t++) total += weights[t] = expf(weights[t] - most);
        const float inverse = 1 / total;
        void *to = (char *)a->out + ((b * a->rows + m) * a->heads + h) * width * size;
        long start = 0;
        for (; start + 8 <= width; start += COLUMNS) {
            const long vectors = (width - start < COLUMNS ? width - start : COLUMNS) / 8;
            __m256 sum[COLUMNS / 8];
            UNROLL for (int j = 0; j < COLUMNS / 8; j++) sum[j] = _mm256_setzero_ps();
            for (long t = 0; t < keys; t++) {
                const __m256 weight = _mm256_set1_ps(weights[t]);
                if (vectors == COLUMNS / 8) UNROLL for (int j = 0; j < COLUMNS / 8; j++)
                    sum[j] = _mm256_fmadd_ps(weight, eight_floats(where[t], start + 8 * j, kind), sum[j]);
                else for (int j = 0; j < vectors; j++)
                    sum[j] = _mm256_fmadd_ps(weight, eight_floats(where[t], start + 8 * j, kind), sum[j]);
            }
            for (int j = 0; j < vectors; j++)
                store_eight(to, start + 8 * j, kind, _mm256_mul_ps(sum[j], _mm256_set1_ps(inverse)));
        }
        for (start = width / 8 * 8; start < width; start++) {
            float sum = 0;
            for (long t = 0; t < keys; t++) sum += weights[t] * to_float(where[t], start, kind);
            store(to, start, kind, sum * inverse);
        }
    }
}

/* Attention of ``rows`` new tokens of each sequence, whose keys and values are appended to the cache. qkv: [batch, rows,
 * heads, 3, width]. out: [batch, rows, heads, width]. Return 1 for lack of memory. */
int step_attention(const void *qkv, int kind, void *keys, void *values, const long *strides, const int32_t *table,
                   const int32_t *limit, const int32_t *length, const int32_t *finished, const int32_t *first_key,
                   const int32_t *position, const int32_t *sop_index, const void *cos, const void *sin, void *out,
                   const long *sizes, float scale, int threads) {
    const step_t a = {qkv, keys, values, strides, table, sizes[0], sizes[1], limit, length, finished, first_key,
                      position, sop_index, cos, sin, sizes[2], sizes[3], out, sizes[4], sizes[5], sizes[6], sizes[7],
                      sizes[8], scale};
    long most = 0;
    for (long b = 0; b < a.batch; b++) if (!finished[b] && length[b] > most) most = length[b];
    most += a.rows;
    const long own = (a.rows * a.width * 8 + 63) / 64 * 64;
    const long all = own + (most * (sizeof(float) + sizeof(void *)) + 127) / 64 * 64;
    char *scratch = malloc(threads * all);
    if (!scratch) return 1;
    #pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long at = 0; at < a.batch * a.heads; at++) {
        char *mine = scratch + omp_get_thread_num() * all;
        const void **where = (const void **)(mine + own);
        float *weights = (float *)(where + most);
        const long b = at / a.heads, h = at % a.heads;
        if (kind == FLOAT32) step_head(&a, b, h, mine, weights, where, FLOAT32);
        else if (kind == FLOAT16) step_head(&a, b, h, mine, weights, where, FLOAT16);
        else step_head(&a, b, h, mine, weights, where, BFLOAT16);
    }
    free(scratch);
    return 0;
}

/* Rotate queries and keys of rows and append keys and values to a cache. qkv: [rows, heads, 3, width]. query: [rows,
 * heads, width]. offsets: where a row's slot of the first head starts in the cache; rows below 0 are left. first,
 * second: int32 [rows], positions. */
void rotate_append(const void *qkv, int kind, void *query, void *keys, void *values, const int64_t *offsets,
                   const int32_t *first, const int32_t *second, const void *cos, const void *sin, long positions,
                   long half, long rows, long heads, long width, long stride, int threads) {
    const long size = kind == FLOAT32 ? 4 : 2;
    #pragma omp parallel for schedule(static) num_threads(threads) if (rows > 1)
    for (long m = 0; m < rows; m++) {
        if (offsets[m] < 0) continue;
        const angles_t angles = {cos, sin, half, clamped(first[m], positions), clamped(second[m], positions)};
        for (long h = 0; h < heads; h++) {
            const char *from = (const char *)qkv + (m * heads + h) * 3 * width * size;
            const long to = (offsets[m] + h * stride) * size;
            turn(&angles, from, (char *)query + (m * heads + h) * width * size, width, kind);
            turn(&angles, from + width * size, (char *)keys + to, width, kind);
            memcpy((char *)values + to, from + 2 * width * size, width * size);
        }
    }
}

/* Philox 4x32-10 (Salmon et al. 2011), of which the first number is returned. */
static uint32_t philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

/* Fill ``noise`` [n] with standard Gumbel noise of the scores ``index`` [n], as the Triton kernel draws it. */
void gumbel(const int64_t *index, float *noise, long n, uint64_t seed, uint32_t lane, uint32_t step, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (n > 1024)
    for (long i = 0; i < n; i++) {
        const float u = ((float)philox(seed, (uint32_t)index[i], lane, step, 0) + 0.5f) * (1.0f / 4294967296.0f);
        const float exponential = u < 1e-3f ? u * (1 + u * (0.5f + u * (1.0f / 3.0f))) : -logf(1 - u);
        noise[i] = -logf(exponential);
    }
}
