/* What a pass of the networks does between its matrix products, and its attention, over KV pages on a CPU.

   Written once over vectors of LANES floats (GCC's and Clang's vector extensions) and compiled once for each kind of
   CPU: -DPASS=name and that kind's flags give the functions of one kind, no PASS the part that chooses and calls them.

   A page holds `positions` positions of one sequence. Of each head it has the keys, then the values, in words of four
   bytes: one float32, or a pair of bfloat16. Keys lie channel by channel, [channels][positions], so that a vector meets
   one channel (or a pair) of several keys; values lie position by position, [positions][channels], in bfloat16 pairs of
   positions. Channels are padded to a multiple of 16, with zeros in the keys. So nothing is rearranged when it is read,
   and AVX512-BF16 and AMX take both as they are.

   What a row (a block of n positions) gets depends on that row alone: never on what else the pass holds, or on the
   number of threads. Rows see the keys before their end and no others; what was never written may be NaN. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { FLOAT32, BFLOAT16 };
enum { QUERIES = 16, TILE = 256, MOST_DIM = 256, MOST_POSITIONS = 64 }; /* TILE: keys between updates of the softmax */

/* x[r] += gate[index[r]] * y[r] (without y: nothing); out[r] = LayerNorm(x[r]) * scale[index[r]] + shift[index[r]]. */
typedef struct {
    float *x;
    const void *y; /* of the type of out; may be NULL */
    const float *gate, *scale, *shift; /* tables, rows at gate_row.. elements */
    int64_t gate_row, scale_row, shift_row;
    const int32_t *index;
    void *out;
    int64_t dim;
    float eps;
    int32_t type;
} Adaln;

/* Where the rows of a pass read and write; see `Rows` in cpu_kernels.py. */
typedef struct {
    const int32_t *tables, *table, *history, *own;
    int64_t pages; /* entries of a table */
    int64_t n, heads, head_dim, positions;
    void *memory; /* the pages of one layer */
    int32_t type;
} Pages;

/* Queries and keys normed and rotated, keys and values written to the pages. */
typedef struct {
    Pages at;
    const void *q, *k, *v; /* (R, heads, head_dim), positions at `row` elements; q may be NULL */
    int64_t row;
    const float *norm[4]; /* weight and bias of queries, then of keys; weights NULL: no affine */
    int64_t width;        /* channels that are normed together: 0 (none), head_dim, or all heads' */
    float eps, clip;      /* clip: largest absolute value of what comes in, before the norm */
    const float *rotary;  /* (R, 2, rope_dim / 2): cos, sin */
    int64_t rope_dim;
    int32_t halves; /* pairs of channels are (i, i + rope_dim / 2) instead of (2i, 2i + 1) */
    float *rotated; /* (R, heads, head_dim): queries */
} Qkv;

typedef struct {
    Pages at;
    const float *q; /* (R, heads, head_dim), not scaled */
    void *out;      /* (R, heads, head_dim), of the type of the pages */
} Attention;

typedef struct {
    void (*adaln)(const Adaln *, int64_t begin, int64_t end); /* rows */
    void (*qkv)(const Qkv *, int64_t row, int64_t head, int64_t heads);
    void (*attention)(const Attention *, int64_t row, int64_t head);
} Kernels;

#ifdef PASS

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16, MOST_ROWS = 8 };
#elif defined(__AVX2__)
enum { LANES = 8, MOST_ROWS = 4 };
#else
enum { LANES = 4, MOST_ROWS = 4 };
#endif

#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))
#define UNROLLED _Pragma("GCC unroll 16")
#define VECTOR(type, size) __attribute__((vector_size(LANES * size), aligned(size), may_alias)) type

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Shorts __attribute__((vector_size(LANES * 2)));
typedef VECTOR(float, 4) FloatsAt; /* in memory, at any address */
typedef VECTOR(uint32_t, 4) WordsAt;
typedef VECTOR(uint16_t, 2) ShortsAt;
typedef float Four __attribute__((vector_size(16)));

INLINE Floats splat(float x) { return x - (Floats){0}; }

INLINE Words splat_word(uint32_t x) { return x + (Words){0}; }

INLINE Floats choose(Words mask, Floats yes, Floats no) { return (Floats)((mask & (Words)yes) | (~mask & (Words)no)); }

/* The larger; y where one of them is NaN. */
INLINE Floats larger(Floats x, Floats y) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return choose((Words)(x > y), x, y);
#endif
}

INLINE float sum_of(Floats x) {
    Four parts[LANES / 4], sum;
    memcpy(parts, &x, sizeof x);
    sum = parts[0];
    UNROLLED for (int i = 1; i < LANES / 4; i++) sum += parts[i];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

INLINE float largest_of(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    UNROLLED for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

/* Lanes before `count`, zeros behind. */
INLINE Floats first(Floats x, int64_t count) {
    if (count >= LANES) return x;
    int32_t lanes[LANES];
    UNROLLED for (int i = 0; i < LANES; i++) lanes[i] = i < count ? -1 : 0;
    Words mask;
    memcpy(&mask, lanes, sizeof mask);
    return (Floats)((Words)x & mask);
}

INLINE Shorts rounded(Floats x) {
#if defined(__AVX512BF16__)
    return (Shorts)_mm512_cvtneps_pbh((__m512)x);
#else
    const Words bits = (Words)x, nan = (Words)(x != x);
    const Words even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & even), Shorts);
#endif
}

INLINE Floats widened(Shorts x) { return (Floats)(__builtin_convertvector(x, Words) << 16); }

/* Up to LANES elements from number `at` on, of which `count` are there; zeros behind. */
INLINE Floats load(const void *from, int64_t at, int64_t count, const int type) {
    if (type == FLOAT32) {
        const float *x = (const float *)from + at;
        if (count >= LANES) return *(const FloatsAt *)x;
        float some[LANES] = {0};
        for (int64_t i = 0; i < count; i++) some[i] = x[i];
        return *(const FloatsAt *)some;
    }
    const uint16_t *x = (const uint16_t *)from + at;
    if (count >= LANES) return widened(*(const ShortsAt *)x);
    uint16_t some[LANES] = {0};
    for (int64_t i = 0; i < count; i++) some[i] = x[i];
    return widened(*(const ShortsAt *)some);
}

INLINE void store(void *to, int64_t at, Floats x, int64_t count, const int type) {
    if (type == FLOAT32) {
        float *out = (float *)to + at;
        if (count >= LANES)
            *(FloatsAt *)out = x;
        else
            memcpy(out, &x, count * sizeof *out);
    } else {
        uint16_t *out = (uint16_t *)to + at;
        const Shorts y = rounded(x);
        if (count >= LANES)
            *(ShortsAt *)out = y;
        else
            memcpy(out, &y, count * sizeof *out);
    }
}

/* 2^x for x <= 0, to 1e-7 (a minimax polynomial); 0 below 2^-127; NaN stays NaN. */
INLINE Floats exp2_of(Floats x) {
    const Floats shift = splat(12582912.0f); /* 1.5 * 2^23: adding it leaves whole numbers */
    x = larger(splat(-127.0f), x);
    const Floats moved = x + shift, rest = x - (moved - shift);
    Floats y = splat(0.00132764641f);
    y = y * rest + 0.00967554127f;
    y = y * rest + 0.055507133f;
    y = y * rest + 0.240221197f;
    y = y * rest + 0.693146967f;
    y = y * rest + 1.00000007f;
    return y * (Floats)(((Words)moved << 23) + (127u << 23));
}

/* Mean and 1 / sqrt(variance + eps) of `count` floats. */
INLINE void moments(const float *x, int64_t count, float eps, float *mean, float *scale) {
    Floats sum = {0}, squares = {0};
    for (int64_t i = 0; i < count; i += LANES) sum += load(x, i, count - i, FLOAT32);
    *mean = sum_of(sum) / (float)count;
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats off = first(load(x, i, count - i, FLOAT32) - *mean, count - i);
        squares += off * off;
    }
    *scale = 1.0f / sqrtf(sum_of(squares) / (float)count + eps);
}

INLINE void adaln_row(const Adaln *a, int64_t r, const int type) {
    float *x = a->x + r * a->dim;
    const float *gate = a->gate + a->index[r] * a->gate_row, *scale = a->scale + a->index[r] * a->scale_row;
    const float *shift = a->shift + a->index[r] * a->shift_row;
    if (a->y)
        for (int64_t i = 0; i < a->dim; i += LANES) {
            const int64_t left = a->dim - i;
            const Floats y = load(a->y, r * a->dim + i, left, type);
            store(x, i, load(x, i, left, FLOAT32) + load(gate, i, left, FLOAT32) * y, left, FLOAT32);
        }
    float mean, by;
    moments(x, a->dim, a->eps, &mean, &by);
    for (int64_t i = 0; i < a->dim; i += LANES) {
        const int64_t left = a->dim - i;
        const Floats normed = (load(x, i, left, FLOAT32) - mean) * by;
        store(a->out, r * a->dim + i, normed * load(scale, i, left, FLOAT32) + load(shift, i, left, FLOAT32), left, type);
    }
}

static void adaln(const Adaln *a, int64_t begin, int64_t end) {
    if (a->type == FLOAT32)
        for (int64_t r = begin; r < end; r++) adaln_row(a, r, FLOAT32);
    else
        for (int64_t r = begin; r < end; r++) adaln_row(a, r, BFLOAT16);
}

INLINE int64_t padded(const Pages *p) { return (p->head_dim + 15) / 16 * 16; }

/* Words of one head's keys in a page, or of its values. */
INLINE int64_t page_words(const Pages *p) { return p->positions * padded(p) / (p->type == FLOAT32 ? 1 : 2); }

INLINE uint32_t *keys_of(const Pages *p, int64_t page, int64_t head) {
    return (uint32_t *)p->memory + (page * p->heads + head) * 2 * page_words(p);
}

/* Rotates `count` channels by cos and sin of each pair. */
INLINE void rotate(float *x, const float *cosine, const float *sine, int64_t count, int halves) {
    const int64_t pairs = count / 2;
    int64_t i = 0;
    if (halves) {
        for (; i + LANES <= pairs; i += LANES) {
            const Floats a = *(FloatsAt *)(x + i), b = *(FloatsAt *)(x + pairs + i);
            const Floats c = *(const FloatsAt *)(cosine + i), s = *(const FloatsAt *)(sine + i);
            *(FloatsAt *)(x + i) = a * c - b * s;
            *(FloatsAt *)(x + pairs + i) = b * c + a * s;
        }
    } else {
        typedef uint64_t Pairs __attribute__((vector_size(LANES * 4)));
        typedef uint32_t Half __attribute__((vector_size(LANES * 2)));
        typedef uint32_t HalfAt __attribute__((vector_size(LANES * 2), aligned(4), may_alias));
        const Pairs minus = (uint64_t)0x80000000u + (Pairs){0}; /* the sign of the even channels */
        for (; i + LANES / 2 <= pairs; i += LANES / 2) {
            const Pairs c = __builtin_convertvector((Half) * (const HalfAt *)(cosine + i), Pairs);
            const Pairs s = __builtin_convertvector((Half) * (const HalfAt *)(sine + i), Pairs);
            const Pairs both = (Pairs)(Floats) * (FloatsAt *)(x + 2 * i), swapped = both << 32 | both >> 32;
            *(FloatsAt *)(x + 2 * i) =
                (Floats)both * (Floats)(c | c << 32) + (Floats)swapped * (Floats)((s | s << 32) ^ minus);
        }
    }
    for (; i < pairs; i++) {
        float *one = x + (halves ? i : 2 * i), *two = halves ? one + pairs : one + 1;
        const float a = *one, b = *two;
        *one = a * cosine[i] - b * sine[i];
        *two = b * cosine[i] + a * sine[i];
    }
}

/* Channels of one position, of `heads` heads, clipped, normed and rotated; `x`: heads * head_dim of them. */
INLINE void prepare(const Qkv *a, float *x, const void *from, int64_t r, int64_t head, int64_t heads, int of_keys,
                    const int type) {
    const int64_t d = a->at.head_dim, count = heads * d;
    for (int64_t i = 0; i < count; i += LANES) {
        Floats some = load(from, r * a->row + head * d + i, count - i, type);
        if (a->clip < INFINITY) some = -larger(splat(-a->clip), -larger(splat(-a->clip), some));
        store(x, i, some, count - i, FLOAT32);
    }
    const float *weight = a->norm[2 * of_keys], *bias = a->norm[2 * of_keys + 1];
    for (int64_t at = 0; a->width && at < count; at += a->width) {
        float mean, by;
        moments(x + at, a->width, a->eps, &mean, &by);
        for (int64_t i = 0; i < a->width; i += LANES) {
            const int64_t left = a->width - i;
            Floats normed = (load(x + at, i, left, FLOAT32) - mean) * by;
            if (weight) normed = normed * load(weight, i, left, FLOAT32) + load(bias, i, left, FLOAT32);
            store(x + at, i, normed, left, FLOAT32);
        }
    }
    const float *cosine = a->rotary + r * a->rope_dim;
    for (int64_t h = 0; a->rope_dim && h < heads; h++)
        rotate(x + h * d, cosine, cosine + a->rope_dim / 2, a->rope_dim, a->halves);
}

/* Keys of one position and head into its column of a page. */
INLINE void write_key(const Pages *p, uint32_t *page, int64_t column, const float *x, const int type) {
    const int64_t width = padded(p), words = type == FLOAT32 ? width : width / 2;
    uint32_t channels[MOST_DIM];
    for (int64_t i = 0; i < width; i += LANES)
        store(channels, i, load(x, i, p->head_dim - i < 0 ? 0 : p->head_dim - i, FLOAT32), LANES, type);
    for (int64_t w = 0; w < words; w++) page[w * p->positions + column] = channels[w];
}

/* Values of one position and head into its place in a page. */
INLINE void write_value(const Pages *p, uint32_t *page, int64_t place, const void *from, int64_t at, const int type) {
    if (type == FLOAT32) {
        memcpy(page + place * padded(p), (const float *)from + at, p->head_dim * sizeof(float));
        return;
    }
    const uint16_t *x = (const uint16_t *)from + at;
    uint16_t *to = (uint16_t *)(page + place / 2 * padded(p)) + place % 2;
    for (int64_t i = 0; i < p->head_dim; i++) to[2 * i] = x[i];
}

INLINE void qkv_row(const Qkv *a, int64_t row, int64_t head, int64_t heads, const int type) {
    const Pages *p = &a->at;
    float x[MOST_DIM * heads] ALIGNED;
    const int64_t d = p->head_dim, begin = p->history[row] % p->positions;
    for (int64_t i = 0; i < p->n; i++) {
        const int64_t r = row * p->n + i;
        if (a->q) {
            prepare(a, x, a->q, r, head, heads, 0, type);
            memcpy(a->rotated + (r * p->heads + head) * d, x, heads * d * sizeof *x);
        }
        prepare(a, x, a->k, r, head, heads, 1, type);
        for (int64_t h = 0; h < heads; h++) {
            uint32_t *keys = keys_of(p, p->own[row], head + h);
            write_key(p, keys, begin + i, x + h * d, type);
            write_value(p, keys + page_words(p), begin + i, a->v, r * a->row + (head + h) * d, type);
        }
    }
}

static void qkv(const Qkv *a, int64_t row, int64_t head, int64_t heads) {
    if (a->at.type == FLOAT32)
        qkv_row(a, row, head, heads, FLOAT32);
    else
        qkv_row(a, row, head, heads, BFLOAT16);
}

/* How products come by: of float32; of bfloat16, widened to float32; by pairs of bfloat16; by tiles of bfloat16. */
enum { PLAIN, WIDENED, PAIRED, TILED };

/* One operand of a product is read word by word from memory that is not one matrix: part s of it, vector v of its words,
   begins at parts[s * part + v * across] + v * apart, and a row of words is `stride` words behind the one before.
   Meanwhile memory that is read later is fetched: for the first half of the queries from fetch[0][s] + skip[0] on, for
   the second from fetch[1][s] + skip[1], `some` words each. */
typedef struct {
    const uint32_t *const *parts;
    int64_t count, part, across, apart, stride, depth; /* depth: rows of words in each part */
    const uint32_t *const *fetch[2];
    int64_t skip[2], some;
} Spread;

/* c[q][v] = c[q][v] * factor[q] (0 without factors) + a[q] b[v], for Q rows and V vectors. */
INLINE void multiply(float *c, int64_t c_row, const float *factor, const void *a, int64_t a_row, const Spread *b, int q0,
                     int rows, const int Q, const int V, const int way) {
    const int half = 2 * q0 >= rows, share = 2 * Q < rows ? 2 * Q : rows;
    const int64_t skip = b->skip[half] + b->some * (2 * q0 - half * rows) / rows;
    const int64_t pace = b->some * 4 * share / rows / b->depth;
    Floats sum[MOST_ROWS][2];
    UNROLLED for (int q = 0; q < Q; q++)
        UNROLLED for (int v = 0; v < V; v++)
            sum[q][v] = factor ? *(Floats *)(c + q * c_row + v * LANES) * factor[q] : (Floats){0};
    int64_t k = 0;
    for (int64_t s = 0; s < b->count; s++) {
        const uint32_t *at[2];
        UNROLLED for (int v = 0; v < V; v++) at[v] = b->parts[s * b->part + v * b->across] + v * b->apart;
        const char *ahead = (const char *)(b->fetch[half][s] + skip);
        for (int64_t i = 0; i < b->depth; i++, k++) {
            Words word[2];
            __builtin_prefetch(ahead + i * pace, 0, 2);
            UNROLLED for (int v = 0; v < V; v++) word[v] = *(const WordsAt *)(at[v] + i * b->stride);
            if (way == PLAIN) {
                const float *channel = (const float *)a + k;
                UNROLLED for (int q = 0; q < Q; q++)
                    UNROLLED for (int v = 0; v < V; v++) sum[q][v] += splat(channel[q * a_row]) * (Floats)word[v];
            } else if (way == WIDENED) {
                const float *channel = (const float *)a + 2 * k;
                UNROLLED for (int q = 0; q < Q; q++)
                    UNROLLED for (int v = 0; v < V; v++) {
                        sum[q][v] += splat(channel[q * a_row]) * (Floats)(word[v] << 16);
                        sum[q][v] += splat(channel[q * a_row + 1]) * (Floats)(word[v] & 0xffff0000u);
                    }
#if defined(__AVX512BF16__)
            } else if (way == PAIRED) {
                const uint32_t *channel = (const uint32_t *)a + k;
                UNROLLED for (int q = 0; q < Q; q++)
                    UNROLLED for (int v = 0; v < V; v++)
                        sum[q][v] = (Floats)_mm512_dpbf16_ps((__m512)sum[q][v], (__m512bh)splat_word(channel[q * a_row]),
                                                             (__m512bh)word[v]);
#endif
            }
        }
    }
    UNROLLED for (int q = 0; q < Q; q++)
        UNROLLED for (int v = 0; v < V; v++) *(FloatsAt *)(c + q * c_row + v * LANES) = sum[q][v];
}

/* The same for any number of rows; a_row in elements of a: words where pairs are multiplied, else floats. */
INLINE void multiply_rows(float *c, int64_t c_row, const float *factor, const void *a, int64_t a_row, const Spread *b,
                          int rows, const int V, const int way) {
    int q = 0;
#define ROWS(Q)                                                                                                      \
    for (; rows - q >= Q; q += Q)                                                                                    \
        multiply(c + q * c_row, c_row, factor ? factor + q : NULL, (const uint32_t *)a + q * a_row, a_row, b, q, rows, Q, \
                 V, way);
    if (MOST_ROWS == 8) ROWS(8)
    ROWS(4)
    ROWS(1)
#undef ROWS
}

/* The pages that one row of queries sees, in parts of a page, and how far. */
typedef struct {
    const Pages *at;
    const int32_t *history; /* ids of the pages before the last */
    int64_t own, length, head;
} Seen;

INLINE const uint32_t *page_of(const Seen *s, int64_t number) {
    const int64_t before = (s->length - 1) / s->at->positions;
    return keys_of(s->at, number < before ? s->history[number] : s->own, s->head);
}

/* Keys from number `from` on, as many as two vectors have, one word of channels after the other: [words][2 * LANES]. */
INLINE void collect_keys(uint32_t *to, const Seen *s, int64_t from, int64_t words) {
    const int64_t positions = s->at->positions;
    for (int64_t j = 0; j < 2 * LANES && from + j < s->length;) {
        const int64_t column = (from + j) % positions;
        const int64_t some = positions - column < 2 * LANES - j ? positions - column : 2 * LANES - j;
        const uint32_t *keys = page_of(s, (from + j) / positions) + column;
        if (some == 4)
            for (int64_t w = 0; w < words; w++) memcpy(to + w * 2 * LANES + j, keys + w * positions, 16);
        else
            for (int64_t w = 0; w < words; w++)
                for (int64_t i = 0; i < some; i++) to[w * 2 * LANES + j + i] = keys[w * positions + i];
        j += some;
    }
}

/* Scores of all queries with the keys from..from + count: scores[q][key - from]; -inf behind the last key. */
INLINE void score(float *scores, const void *queries, int64_t q_row, const Seen *s, int64_t from, int64_t count, int rows,
                  const int way) {
    uint32_t collected[MOST_DIM * 2 * LANES] ALIGNED;
    const int64_t positions = s->at->positions, words = page_words(s->at) / positions;
    const uint32_t *parts[2] = {collected, collected + LANES}, *values[2];
    const int64_t stride = positions % LANES ? 2 * LANES : positions, some = (positions < LANES ? positions : LANES) * words;
    const Spread b = {parts, 1, 0, 1, 0, stride, words, {values, values + 1}, {0, 0}, some};
    for (int64_t j = 0; j < count; j += 2 * LANES) {
        const int64_t key = from + j;
        for (int v = 0; v < 2; v++) {
            const int64_t one = v && key + LANES < s->length ? key + LANES : key;
            const uint32_t *page = page_of(s, one / positions);
            values[v] = page + page_words(s->at) + one % positions * words;
            if (positions % LANES == 0) parts[v] = page + one % positions;
        }
        if (positions % LANES) collect_keys(collected, s, key, words);
        if (count - j > LANES)
            multiply_rows(scores + j, TILE, NULL, queries, q_row, &b, rows, 2, way);
        else
            multiply_rows(scores + j, TILE, NULL, queries, q_row, &b, rows, 1, way);
    }
    for (int q = 0; q < rows; q++)
        for (int64_t j = count; j % LANES; j++) scores[q * TILE + j] = -INFINITY;
}

/* Online softmax (Milakov and Gimelshein 2018) of one query: scores become weights, in bfloat16 if `pairs` are. */
INLINE void weigh(float *scores, uint16_t *pairs, int64_t count, float *top, float *total, float *factor) {
    Floats most = splat(*top), sum = {0};
    for (int64_t j = 0; j < count; j += LANES) most = larger(*(FloatsAt *)(scores + j), most);
    const float now = largest_of(most);
    *factor = exp2_of(splat(*top - now))[0];
    for (int64_t j = 0; j < count; j += LANES) {
        const Floats weight = exp2_of(*(FloatsAt *)(scores + j) - now);
        sum += weight;
        if (pairs)
            *(ShortsAt *)(pairs + j) = rounded(weight);
        else
            *(FloatsAt *)(scores + j) = weight;
    }
    *total = *total * *factor + sum_of(sum);
    *top = now;
}

/* output[q] = output[q] * factor[q] + weights[q] V, over `pages` pages of values; `next`: pages of keys read later. */
INLINE void mix(float *output, const float *factor, const void *weights, int64_t w_row, const uint32_t *const *values,
                const uint32_t *const *next, int64_t pages, const Pages *p, int rows, const int way) {
    const int64_t width = padded(p), depth = p->type == FLOAT32 ? p->positions : p->positions / 2;
    const uint32_t *parts[TILE];
    Spread b = {parts, pages, 1, 0, LANES, width, depth, {next, next}, {0, 0}, LANES * depth};
    for (int64_t c = 0; c < width; c += 2 * LANES) {
        b.skip[0] = c * depth, b.skip[1] = b.skip[0] + b.some;
        for (int64_t s = 0; s < pages; s++) parts[s] = values[s] + c;
        if (width - c > LANES)
            multiply_rows(output + c, MOST_DIM, factor, weights, w_row, &b, rows, 2, way);
        else
            multiply_rows(output + c, MOST_DIM, factor, weights, w_row, &b, rows, 1, way);
    }
}

/* The values of a page of which `count` positions are seen, zeros behind them. */
INLINE void complete(uint32_t *to, const uint32_t *values, int64_t count, const Pages *p) {
    const int64_t width = padded(p), whole = p->type == FLOAT32 ? count : count / 2;
    memset(to, 0, page_words(p) * sizeof *to);
    memcpy(to, values, whole * width * sizeof *to);
    if (p->type == BFLOAT16 && count % 2)
        for (int64_t c = 0; c < width; c++) to[whole * width + c] = values[whole * width + c] & 0xffff;
}

/* Queries times log2(e) / sqrt(head_dim), as products take them. */
INLINE void load_queries(void *to, const Attention *a, int64_t row, int64_t head, int64_t begin, int rows, const int way) {
    const Pages *p = &a->at;
    const int64_t d = p->head_dim, width = padded(p);
    const float scale = 1.44269504f / sqrtf((float)d);
    for (int q = 0; q < rows; q++)
        for (int64_t c = 0; c < width; c += LANES) {
            const float *from = a->q + ((row * p->n + begin + q) * p->heads + head) * d;
            const Floats x = load(from, c, d - c < 0 ? 0 : d - c, FLOAT32) * scale;
            store(to, q * width + c, x, LANES, way == PAIRED || way == TILED ? BFLOAT16 : FLOAT32);
        }
}

/* Up to 16 queries of one row and head, from number `begin` on. */
INLINE void attend(const Attention *a, int64_t row, int64_t head, int64_t begin, int rows, const int way) {
    const Pages *p = &a->at;
    const int64_t positions = p->positions, width = padded(p), tile = TILE / positions * positions;
    const int paired = way == PAIRED || way == TILED;
    float queries[QUERIES * MOST_DIM] ALIGNED, scores[QUERIES * TILE] ALIGNED, output[QUERIES * MOST_DIM] ALIGNED;
    uint16_t pairs[QUERIES * TILE] ALIGNED;
    uint32_t last[MOST_POSITIONS * MOST_DIM] ALIGNED;
    float top[QUERIES], total[QUERIES] = {0}, factor[QUERIES];
    const Seen seen = {p, p->tables + p->table[row] * p->pages, p->own[row], p->history[row] + p->n, head};
    load_queries(queries, a, row, head, begin, rows, way);
    memset(output, 0, sizeof output);
    for (int q = 0; q < rows; q++) top[q] = -INFINITY;

    for (int64_t from = 0; from < seen.length; from += tile) {
        const int64_t count = seen.length - from < tile ? seen.length - from : tile;
        const int64_t pages = (count + positions - 1) / positions;
        score(scores, queries, paired ? width / 2 : width, &seen, from, count, rows, way);
        for (int q = 0; q < rows; q++)
            weigh(scores + q * TILE, paired ? pairs + q * TILE : NULL, count, top + q, total + q, factor + q);
        const uint32_t *values[TILE], *next[TILE];
        for (int64_t s = 0; s < pages; s++) {
            const int64_t number = from / positions + s;
            values[s] = page_of(&seen, number) + page_words(p);
            next[s] = page_of(&seen, number + pages);
        }
        if (count % positions) {
            complete(last, values[pages - 1], count % positions, p);
            values[pages - 1] = last;
            for (int q = 0; q < rows; q++) /* of keys behind the last vector */
                for (int64_t j = (count + LANES - 1) / LANES * LANES; j < pages * positions; j++)
                    scores[q * TILE + j] = 0, pairs[q * TILE + j] = 0;
        }
        mix(output, factor, paired ? (void *)pairs : (void *)scores, paired ? TILE / 2 : TILE, values, next, pages, p,
            rows, way);
    }

    for (int q = 0; q < rows; q++)
        for (int64_t c = 0; c < p->head_dim; c += LANES)
            store(a->out, ((row * p->n + begin + q) * p->heads + head) * p->head_dim + c,
                  *(FloatsAt *)(output + q * MOST_DIM + c) / total[q], p->head_dim - c, p->type);
}

static void attention(const Attention *a, int64_t row, int64_t head) {
    for (int64_t begin = 0; begin < a->at.n; begin += QUERIES) {
        const int rows = a->at.n - begin < QUERIES ? (int)(a->at.n - begin) : QUERIES;
        if (a->at.type == FLOAT32)
            attend(a, row, head, begin, rows, PLAIN);
#if defined(__AVX512BF16__)
        else
            attend(a, row, head, begin, rows, PAIRED);
#else
        else
            attend(a, row, head, begin, rows, WIDENED);
#endif
    }
}

#define NAMED(pass) JOINED(pass)
#define JOINED(pass) colaserve_kernels_##pass
__attribute__((visibility("hidden"))) const Kernels NAMED(PASS) = {adaln, qkv, attention};

#else /* no PASS: choose and call */

extern const Kernels colaserve_kernels_plain;
#if defined(__x86_64__)
#include <cpuid.h>
extern const Kernels colaserve_kernels_avx2, colaserve_kernels_avx512, colaserve_kernels_bf16;
#endif

/* The best kind of this CPU and its operating system, at most `limit`: 0 plain, 1 AVX2 and FMA, 2 AVX-512, 3 that with
   BF16. On other machines 0. */
int colaserve_kernels_kind(int limit) {
    int kind = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kind = 1;
    if (kind == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        kind = 2;
    if (kind == 2 && __builtin_cpu_supports("avx512bf16")) kind = 3;
#endif
    return kind < limit ? kind : limit;
}

static const Kernels *kernels(int kind) {
#if defined(__x86_64__)
    if (kind == 1) return &colaserve_kernels_avx2;
    if (kind == 2) return &colaserve_kernels_avx512;
    if (kind == 3) return &colaserve_kernels_bf16;
#endif
    (void)kind;
    return &colaserve_kernels_plain;
}

enum { ALONE = 1 << 14 }; /* elements, up to which a second thread takes longer to begin than to help */

/* All arrays are C-contiguous, the tables' rows apart. */
void colaserve_adaln(int kind, const Adaln *a, int64_t rows) {
    const Kernels *k = kernels(kind);
    const int64_t step = 4; /* rows */
#pragma omp parallel for schedule(static) if (rows * a->dim > ALONE)
    for (int64_t r = 0; r < rows; r += step) k->adaln(a, r, r + step < rows ? r + step : rows);
}

void colaserve_qkv(int kind, const Qkv *a, int64_t rows) {
    const Kernels *k = kernels(kind);
    const int64_t heads = a->at.heads, together = a->width > a->at.head_dim ? heads : 1;
#pragma omp parallel for schedule(static) collapse(2) if (rows * a->at.n * heads * a->at.head_dim > ALONE)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head += together) k->qkv(a, row, head, together);
}

/* Rows of one history are neighbours: one head of all of them in a row finds keys and values in the core's own cache. */
void colaserve_attention(int kind, const Attention *a, int64_t rows) {
    const Kernels *k = kernels(kind);
#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int64_t head = 0; head < a->at.heads; head++)
        for (int64_t row = 0; row < rows; row++) k->attention(a, row, head);
}

#endif
