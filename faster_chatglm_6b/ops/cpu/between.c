/* What stands between the products: GELU, rotary positions, attention of few rows, bias and residual.
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

/* e^v to a few units in the last place, from 2^-126 to 2^127. */
ALWAYS __m256 exponential(__m256 v) {
    v = _mm256_max_ps(_mm256_set1_ps(-87), _mm256_min_ps(_mm256_set1_ps(88), v));
    const __m256 power = _mm256_round_ps(_mm256_mul_ps(v, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    /* ln 2 in two parts, and the polynomial of Cephes for what is left. */
    __m256 rest = _mm256_fnmadd_ps(power, _mm256_set1_ps(0.693359375f), v), sum = _mm256_set1_ps(1.9875691500e-4f);
    rest = _mm256_fnmadd_ps(power, _mm256_set1_ps(-2.12194440e-4f), rest);
    const float factors[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                             5.0000001201e-1f, 1, 1};
    UNROLL for (int i = 0; i < 7; i++) sum = _mm256_fmadd_ps(sum, rest, _mm256_set1_ps(factors[i]));
    const __m256i scale = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(sum, _mm256_castsi256_ps(scale));
}

/* 0.5 x (1 + tanh u) = x / (1 + e^-2u), u = 0.79788456 (x + 0.044715 x^3). */
ALWAYS __m256 gelu_of(__m256 x) {
    const __m256 cubic = _mm256_fmadd_ps(_mm256_mul_ps(x, x), _mm256_set1_ps(0.044715f), _mm256_set1_ps(1));
    const __m256 power = exponential(_mm256_mul_ps(_mm256_mul_ps(x, cubic), _mm256_set1_ps(-2 * 0.79788456f)));
    return _mm256_div_ps(x, _mm256_add_ps(power, _mm256_set1_ps(1)));
}

/* x, out: [count] of a kind. */
void gelu(const void *x, int kind, void *out, long count, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (count > 65536)
    for (long first = 0; first < count; first += 4096) {
        const long end = first + 4096 < count ? first + 4096 : count;
        long i = first;
        for (; i + 8 <= end; i += 8) store_eight(out, i, kind, gelu_of(eight_floats(x, i, kind)));
        if (i < end) {
            float last[8] = {0};
            for (long j = i; j < end; j++) last[j - i] = to_float(x, j, kind);
            _mm256_storeu_ps(last, gelu_of(_mm256_loadu_ps(last)));
            for (long j = i; j < end; j++) store(out, j, kind, last[j - i]);
        }
    }
}

/* out = y + bias + beta * residual. y, out: [rows, n], which may be one. bias: [n] or 0. residual: [rows, n] or 0. */
void finish(const float *y, const void *bias, int bias_kind, const void *residual, int residual_kind, float beta,
            void *out, int kind, long rows, long n, int threads) {
    const __m256 factor = _mm256_set1_ps(beta);
    #pragma omp parallel for schedule(static) num_threads(threads) if (rows > 1)
    for (long row = 0; row < rows; row++) {
        long i = 0;
        for (; i + 8 <= n; i += 8) {
            __m256 v = _mm256_loadu_ps(y + row * n + i);
            if (bias) v = _mm256_add_ps(v, eight_floats(bias, i, bias_kind));
            if (residual) v = _mm256_fmadd_ps(factor, eight_floats(residual, row * n + i, residual_kind), v);
            store_eight(out, row * n + i, kind, v);
        }
        for (; i < n; i++) {
            float v = y[row * n + i] + (bias ? to_float(bias, i, bias_kind) : 0);
            store(out, row * n + i, kind, v + (residual ? beta * to_float(residual, row * n + i, residual_kind) : 0));
        }
    }
}

/* x: [batch, rows, heads, 3, width], of which ``index`` is rotated. positions: int64 [batch, parts, rows]. cos, sin:
 * [length, width / parts / 2]. out: [batch, heads, rows, width]. Return 1, with out unfinished, for a position that the
 * tables do not have. */
int rotary(const void *x, int kind, const int64_t *positions, const void *cos, const void *sin, void *out, long batch,
           long rows, long heads, long width, long parts, long length, long index, int threads) {
    const long half = width / parts / 2;
    for (long i = 0; i < batch * parts * rows; i++) if (positions[i] < 0 || positions[i] >= length) return 1;
    #pragma omp parallel for schedule(static) num_threads(threads) if (batch * rows > 1)
    for (long at = 0; at < batch * rows; at++) {
        const long b = at / rows, m = at % rows;
        for (long h = 0; h < heads; h++) for (long part = 0; part < parts; part++) {
            const long place = positions[(b * parts + part) * rows + m] * half;
            const long from = ((at * heads + h) * 3 + index) * width + part * half * 2;
            const long to = ((b * heads + h) * rows + m) * width + part * half * 2;
            long i = 0;
            for (; i + 8 <= half; i += 8) {
                const __m256 c = eight_floats(cos, place + i, kind), s = eight_floats(sin, place + i, kind);
                const __m256 first = eight_floats(x, from + i, kind), second = eight_floats(x, from + half + i, kind);
                store_eight(out, to + i, kind, _mm256_fmsub_ps(first, c, _mm256_mul_ps(second, s)));
                store_eight(out, to + half + i, kind, _mm256_fmadd_ps(second, c, _mm256_mul_ps(first, s)));
            }
            for (; i < half; i++) {
                const float c = to_float(cos, place + i, kind), s = to_float(sin, place + i, kind);
                const float first = to_float(x, from + i, kind), second = to_float(x, from + half + i, kind);
                store(out, to + i, kind, first * c - second * s);
                store(out, to + half + i, kind, second * c + first * s);
            }
        }
    }
    return 0;
}

typedef struct {
    const void *query, *key, *value, *bias;
    void *out;
    /* How far apart batches, heads and rows of query, key and value are, and batches, rows and keys of the bias. */
    const long *strides;
    long batch, heads, rows, keys, width;
    float scale;
} attention_t;

ALWAYS const void *item(const void *p, long i, int kind) { return (const char *)p + i * (kind == FLOAT32 ? 4 : 2); }

/* One row of a head: weights [keys] is scratch memory. */
ALWAYS void attend(const attention_t *a, long b, long h, long m, float *weights, const int kind, int bias_kind) {
    const long *s = a->strides, width = a->width;
    const void *query = item(a->query, b * s[0] + h * s[1] + m * s[2], kind);
    const void *key = item(a->key, b * s[3] + h * s[4], kind), *value = item(a->value, b * s[6] + h * s[7], kind);
    float most = -INFINITY, total = 0;
    for (long t = 0; t < a->keys; t++) {
        __m256 sum = _mm256_setzero_ps();
        for (long i = 0; i < width; i += 8)
            sum = _mm256_fmadd_ps(eight_floats(query, i, kind), eight_floats(item(key, t * s[5], kind), i, kind), sum);
        weights[t] = sum_of(sum) * a->scale;
        if (a->bias) weights[t] += to_float(a->bias, b * s[9] + m * s[10] + t * s[11], bias_kind);
        if (!(weights[t] <= most)) most = weights[t];
    }
    for (long t = 0; t < a->keys; t++) total += weights[t] = expf(weights[t] - most);
    const __m256 inverse = _mm256_set1_ps(1 / total);
    for (long first = 0; first < width; first += COLUMNS) {
        const long vectors = (width - first < COLUMNS ? width - first : COLUMNS) / 8;
        __m256 sum[COLUMNS / 8];
        UNROLL for (int j = 0; j < COLUMNS / 8; j++) sum[j] = _mm256_setzero_ps();
        for (long t = 0; t < a->keys; t++) {
            const void *from = item(value, t * s[8] + first, kind);
            const __m256 weight = _mm256_set1_ps(weights[t]);
            if (vectors == COLUMNS / 8) UNROLL for (int j = 0; j < COLUMNS / 8; j++)
                sum[j] = _mm256_fmadd_ps(weight, eight_floats(from, 8 * j, kind), sum[j]);
            else for (int j = 0; j < vectors; j++)
                sum[j] = _mm256_fmadd_ps(weight, eight_floats(from, 8 * j, kind), sum[j]);
        }
        void *to = (void *)item(a->out, ((b * a->rows + m) * a->heads + h) * width + first, kind);
        for (int j = 0; j < vectors; j++) store_eight(to, 8 * j, kind, _mm256_mul_ps(sum[j], inverse));
    }
}

/* query: [batch, heads, rows, width]. key, value: [batch, heads, keys, width]; width in multiples of 8. bias: floats
 * [batch, rows, keys] or 0. out: [batch, rows, heads, width]. Return 1 for lack of memory. */
int attention(const void *query, const void *key, const void *value, int kind, const void *bias, int bias_kind,
              void *out, const long *strides, long batch, long heads, long rows, long keys, long width, float scale,
              int threads) {
    const attention_t a = {query, key, value, bias, out, strides, batch, heads, rows, keys, width, scale};
    float *scratch = malloc(threads * keys * sizeof(float));
    if (!scratch) return 1;
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long at = 0; at < batch * heads; at++) {
        float *own = scratch + omp_get_thread_num() * keys;
        for (long m = 0; m < rows; m++) {
            if (kind == FLOAT32) attend(&a, at / heads, at % heads, m, own, FLOAT32, bias_kind);
            else if (kind == FLOAT16) attend(&a, at / heads, at % heads, m, own, FLOAT16, bias_kind);
            else attend(&a, at / heads, at % heads, m, own, BFLOAT16, bias_kind);
        }
    }
    free(scratch);
    return 0;
}
