/* Block-causal attention over caches in bfloat16, for CPUs with AVX512-BF16: softmax(q k^T / sqrt(head_dim)) v.

   Matrix libraries bring keys and values into a layout of their own at every call. With the few queries of a diffusion
   step that takes as long as the products. Here nothing is rearranged: a vector holds 16 queries and meets one pair of
   channels of one key at a time, read where the cache has it, and memory is fetched one chunk ahead of the arithmetic.
   The softmax is the online one (Milakov and Gimelshein 2018): one pass over the keys, a running maximum per query.
   Scores, exponentials and sums are float32; queries and weights are rounded to bfloat16 before their product. */

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define ALIGNED __attribute__((aligned(64)))
#define UNROLLED _Pragma("GCC unroll 16")

enum { LANES = 16, CHUNK = 128, LARGEST = 128 }; /* queries of a vector; keys of a chunk; largest head_dim */

/* Keys and values of one head: `row` elements from one position to the next. */
typedef struct {
    const uint16_t *first;
    int64_t row;
} Rows;

INLINE int32_t pair(const uint16_t *two) {
    int32_t both;
    memcpy(&both, two, sizeof both);
    return both;
}

/* The cache line of number `line` in rows of d elements. */
INLINE void fetch(Rows rows, int64_t line, const int d) {
    _mm_prefetch((const char *)(rows.first + line / (d / 32) * rows.row + line % (d / 32) * 32), _MM_HINT_T1);
}

/* 2^x to 1e-7 (a minimax polynomial), not below 2^-126; NaN stays NaN. */
INLINE __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(0.00132764641f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.00967554127f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.055507133f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.240221197f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.693146967f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.00000007f));
    return _mm512_scalef_ps(y, whole);
}

/* Queries times log2(e) / sqrt(d), by pairs of channels: pairs[c] has channels 2c and 2c + 1 of all of them. */
INLINE void load_queries(uint32_t pairs[][LANES], const float *q, int64_t row, int rows, const int d) {
    const __m512 scale = _mm512_set1_ps(1.44269504f / sqrtf((float)d));
    memset(pairs, 0, sizeof(uint32_t) * LANES * (d / 2));
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < d; c += 32) {
            const float *from = q + r * row + c;
            const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(from), scale);
            const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(from + 16), scale);
            uint32_t rounded[16] ALIGNED;
            _mm512_store_si512(rounded, (__m512i)_mm512_cvtne2ps_pbh(high, low));
            for (int i = 0; i < 16; i++) pairs[c / 2 + i][r] = rounded[i];
        }
}

/* Scores of `count` keys, at most 16, from number `j` on; -inf for the queries that see fewer. */
INLINE void score(float scores[][LANES], const uint32_t queries[][LANES], const uint16_t *k, int64_t row, Rows ahead,
                  __m512i seen, int j, const int count, int masked, __m512 *top, const int d) {
    __m512 sum[16];
    UNROLLED for (int i = 0; i < count; i++) sum[i] = _mm512_setzero_ps();
    for (int c = 0; c < d / 2; c++) {
        const __m512bh channels = (__m512bh)_mm512_load_si512(queries[c]);
        if (count == 16) fetch(ahead, c, d); /* d / 2 lines are 16 rows */
        UNROLLED for (int i = 0; i < count; i++)
            sum[i] = _mm512_dpbf16_ps(sum[i], channels, (__m512bh)_mm512_set1_epi32(pair(k + i * row + 2 * c)));
    }
    UNROLLED for (int i = 0; i < count; i++) {
        if (masked) {
            const __mmask16 sees = _mm512_cmplt_epi32_mask(_mm512_set1_epi32(j + i), seen);
            sum[i] = _mm512_mask_blend_ps(sees, _mm512_set1_ps(-INFINITY), sum[i]);
        }
        *top = _mm512_max_ps(*top, sum[i]);
        _mm512_store_ps(scores[i], sum[i]);
    }
}

/* 2^(score - top), 0 for the queries that do not see key j. */
INLINE __m512 weight(const float *score, __m512 top, __m512i seen, int j, int masked) {
    const __m512 w = exp2_of(_mm512_sub_ps(_mm512_load_ps(score), top));
    return masked ? _mm512_maskz_mov_ps(_mm512_cmplt_epi32_mask(_mm512_set1_epi32(j), seen), w) : w;
}

/* Up to 16 queries of one head. `seen`: for each, the number of keys before the first that it does not see; keys from
   `begin` on count. Rows of q and out are `row` elements apart. */
INLINE void attend_tile(const float *q, uint16_t *out, int64_t row, int rows, Rows k, Rows v, const int32_t *seen,
                        int32_t begin, const int d) {
    uint32_t queries[LARGEST / 2][LANES] ALIGNED;
    uint32_t weights[CHUNK / 2][LANES] ALIGNED; /* of two keys each */
    float scores[CHUNK][LANES] ALIGNED, output[LANES][LARGEST] ALIGNED, factors[LANES] ALIGNED;
    int32_t ends[LANES] ALIGNED;
    uint16_t zip[32] ALIGNED; /* of the elements of two halves, one from each in turn */
    int32_t least = INT32_MAX, most = begin;
    for (int r = 0; r < LANES; r++) {
        ends[r] = r < rows ? seen[r] : begin;
        if (r < rows && ends[r] < least) least = ends[r];
        if (r < rows && ends[r] > most) most = ends[r];
    }
    for (int i = 0; i < 16; i++) zip[2 * i] = i, zip[2 * i + 1] = 16 + i;
    const __m512i zipped = _mm512_load_si512(zip), end = _mm512_load_si512(ends);
    load_queries(queries, q, row, rows, d);
    memset(output, 0, sizeof output);

    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int32_t from = begin; from < most; from += CHUNK) {
        const int n = most - from < CHUNK ? most - from : CHUNK;
        const uint16_t *keys = k.first + from * k.row, *values = v.first + from * v.row;
        const int masked = from + n > least;
        const __m512 before = top;
        int j = 0;
        for (; j + 16 <= n; j += 16)
            score(scores + j, queries, keys + j * k.row, k.row, (Rows){values + j * v.row, v.row}, end, from + j, 16,
                  masked, &top, d);
        for (; j < n; j++)
            score(scores + j, queries, keys + j * k.row, k.row, v, end, from + j, 1, masked, &top, d);

        const __m512 factor = exp2_of(_mm512_sub_ps(before, top));
        total = _mm512_mul_ps(total, factor);
        _mm512_store_ps(factors, factor);
        for (j = 0; j < n; j += 2) {
            const __m512 first = weight(scores[j], top, end, from + j, masked);
            const __m512 second = j + 1 < n ? weight(scores[j + 1], top, end, from + j + 1, masked) : _mm512_setzero_ps();
            total = _mm512_add_ps(total, _mm512_add_ps(first, second));
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
            _mm512_store_si512(weights[j / 2], _mm512_permutexvar_epi16(zipped, both));
        }

        const Rows ahead = {keys + CHUNK * k.row, k.row};
        for (int c = 0; c < d; c += 16) {
            __m512 sum[LANES];
            UNROLLED for (int r = 0; r < LANES; r++)
                sum[r] = _mm512_mul_ps(_mm512_load_ps(output[r] + c), _mm512_set1_ps(factors[r]));
            for (j = 0; j < n; j += 2) {
                const uint16_t *value = values + j * v.row + c;
                const __m256i first = _mm256_loadu_si256((const __m256i *)value);
                const __m256i second =
                    j + 1 < n ? _mm256_loadu_si256((const __m256i *)(value + v.row)) : _mm256_setzero_si256();
                const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
                const __m512bh channels = (__m512bh)_mm512_permutexvar_epi16(zipped, both);
                fetch(ahead, c / 16 * (CHUNK / 2) + j / 2, d);
                UNROLLED for (int r = 0; r < LANES; r++)
                    sum[r] = _mm512_dpbf16_ps(sum[r], channels, (__m512bh)_mm512_set1_epi32((int)weights[j / 2][r]));
            }
            UNROLLED for (int r = 0; r < LANES; r++) _mm512_store_ps(output[r] + c, sum[r]);
        }
    }

    float totals[LANES] ALIGNED;
    _mm512_store_ps(totals, total);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < d; c += 16) {
            const __m512 mean = _mm512_div_ps(_mm512_load_ps(output[r] + c), _mm512_set1_ps(totals[r]));
            _mm256_storeu_si256((__m256i *)(out + r * row + c), (__m256i)_mm512_cvtneps_pbh(mean));
        }
}

/* One for each head_dim: its loops have fixed lengths. */
#define TILE(d)                                                                                                      \
    TARGET static void attend_##d(const float *q, uint16_t *out, int64_t row, int rows, Rows k, Rows v,              \
                                  const int32_t *seen, int32_t begin) {                                              \
        attend_tile(q, out, row, rows, k, v, seen, begin, d);                                                        \
    }
TILE(32)
TILE(64)
TILE(96)
TILE(128)

/* Whether this CPU, and its operating system, can run it. */
int colaserve_attention_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

/* All arrays are C-contiguous but keys and values: (sequences, heads, positions, head_dim), the last dimension alone
   contiguous, with the strides given in elements.
   q: float32 (sequences, n, heads, head_dim); out: bfloat16, likewise; seen: (sequences, n); see attend_tile.
   head_dim is 32, 64, 96 or 128. */
void colaserve_attention(const float *q, const uint16_t *k, const uint16_t *v, uint16_t *out, const int32_t *seen,
                         int32_t begin, int64_t sequences, int64_t n, int64_t heads, int64_t head_dim,
                         int64_t k_sequence, int64_t k_head, int64_t k_row, int64_t v_sequence, int64_t v_head,
                         int64_t v_row) {
    void (*const tile)(const float *, uint16_t *, int64_t, int, Rows, Rows, const int32_t *, int32_t) =
        head_dim == 32 ? attend_32 : head_dim == 64 ? attend_64 : head_dim == 96 ? attend_96 : attend_128;
    const int64_t tiles = (n + LANES - 1) / LANES;
#pragma omp parallel for schedule(dynamic)
    for (int64_t one = 0; one < sequences * heads * tiles; one++) {
        const int64_t s = one / (heads * tiles), h = one / tiles % heads, first = one % tiles * LANES;
        const int64_t query = s * n + first, at = (query * heads + h) * head_dim;
        const int rows = n - first < LANES ? (int)(n - first) : LANES;
        const Rows keys = {k + s * k_sequence + h * k_head, k_row}, values = {v + s * v_sequence + h * v_head, v_row};
        tile(q + at, out + at, heads * head_dim, rows, keys, values, seen + query, begin);
    }
}

#else

int colaserve_attention_supported(void) { return 0; }

#endif
