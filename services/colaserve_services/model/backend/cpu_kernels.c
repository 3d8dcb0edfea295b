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
enum { QUERIES = 16, TILE = 128, MOST_DIM = 256, MOST_POSITIONS = 64 }; /* TILE: keys between updates of the softmax */

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

/* Queries and keys normed over head_dim and rotated in pairs (2i, 2i + 1), keys and values written to the pages. */
typedef struct {
    Pages at;
    const void *q, *k, *v; /* (R, heads, head_dim), positions at `row` elements; q NULL: k is written as it is */
    int64_t row;
    const float *norm[4]; /* weight and bias of queries, then of keys */
    float eps;
    const float *rotary; /* (R, 2, rope_dim / 2): cos, sin */
    int64_t rope_dim;
    float *rotated; /* (R, heads, head_dim): queries */
} Qkv;

typedef struct {
    Pages at;
    const float *q; /* (R, heads, head_dim), not scaled */
    void *out;      /* (R, heads, head_dim), of the type of the pages */
} Attention;

/* Rows (R, dim) to bytes: out = 128 + round(x / scale[r]), scale[r] = the row's largest absolute value / 127. */
typedef struct {
    const void *x;
    uint8_t *out;
    float *scale; /* NaN for a row that holds a number that is not finite */
    int64_t dim;
    int32_t type; /* of x */
} Quantize;

/* x = x * scale[r] + bias, then GELU (with tanh) if wanted. */
typedef struct {
    void *x;
    const float *scale, *bias; /* NULL: 1 and 0 */
    int64_t dim;
    int32_t gelu, type;
} Rescale;

typedef struct {
    void (*adaln)(const Adaln *, int64_t begin, int64_t end); /* rows */
    void (*qkv)(const Qkv *, int64_t row, int64_t head);
    void (*attention)(const Attention *, int64_t row, int64_t head);
    void (*quantize)(const Quantize *, int64_t begin, int64_t end); /* rows */
    void (*rescale)(const Rescale *, int64_t begin, int64_t end);   /* rows */
} Kernels;

#ifdef PASS

#include "cpu_kernels_vectors.h"

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
        const Floats out = normed * load(scale, i, left, FLOAT32) + load(shift, i, left, FLOAT32);
        store(a->out, r * a->dim + i, out, left, type);
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

/* Pairs of neighbours rotated. */
INLINE Floats rotated(Floats x, const float *cosine, const float *sine) {
    typedef uint64_t Pairs __attribute__((vector_size(LANES * 4)));
    typedef uint32_t Half __attribute__((vector_size(LANES * 2)));
    typedef uint32_t HalfAt __attribute__((vector_size(LANES * 2), aligned(4), may_alias));
    const Pairs minus = (uint64_t)0x80000000u + (Pairs){0}; /* the sign of the even channels */
    const Pairs c = __builtin_convertvector((Half) * (const HalfAt *)cosine, Pairs);
    const Pairs s = __builtin_convertvector((Half) * (const HalfAt *)sine, Pairs);
    const Pairs swapped = (Pairs)x << 32 | (Pairs)x >> 32;
    return x * (Floats)(c | c << 32) + (Floats)swapped * (Floats)((s | s << 32) ^ minus);
}

/* Channels of one position and head, normed and rotated. */
INLINE void prepare(const Qkv *a, float *x, const void *from, int64_t r, int64_t head, int of_keys, const int type) {
    const int64_t d = a->at.head_dim;
    for (int64_t i = 0; i < d; i += LANES)
        store(x, i, load(from, r * a->row + head * d + i, d - i, type), d - i, FLOAT32);
    if (!a->q) return;
    const float *weight = a->norm[2 * of_keys], *bias = a->norm[2 * of_keys + 1], *cosine = a->rotary + r * a->rope_dim;
    float mean, by;
    moments(x, d, a->eps, &mean, &by);
    for (int64_t i = 0; i < d; i += LANES) {
        const Floats normed = (load(x, i, d - i, FLOAT32) - mean) * by;
        store(x, i, normed * load(weight, i, d - i, FLOAT32) + load(bias, i, d - i, FLOAT32), d - i, FLOAT32);
    }
    for (int64_t i = 0; i < a->rope_dim / 2; i++) {
        const float one = x[2 * i], two = x[2 * i + 1], c = cosine[i], s = cosine[a->rope_dim / 2 + i];
        x[2 * i] = one * c - two * s;
        x[2 * i + 1] = two * c + one * s;
    }
}

/* `prepare` where a head is V whole vectors, and what is rotated too. */
INLINE void prepare_vectors(const Qkv *a, float *x, const void *from, int64_t r, int64_t head, int of_keys,
                            const int type, const int V) {
    Floats some[V], sum = {0}, squares = {0};
    const float *weight = a->norm[2 * of_keys], *bias = a->norm[2 * of_keys + 1], *cosine = a->rotary + r * a->rope_dim;
    UNROLLED for (int v = 0; v < V; v++) {
        some[v] = load(from, r * a->row + (head * V + v) * LANES, LANES, type);
        sum += some[v];
    }
    const float mean = sum_of(sum) / (float)(V * LANES);
    UNROLLED for (int v = 0; v < V; v++) {
        some[v] -= mean;
        squares += some[v] * some[v];
    }
    const float by = 1.0f / sqrtf(sum_of(squares) / (float)(V * LANES) + a->eps);
    UNROLLED for (int v = 0; v < V; v++) {
        const int64_t i = v * LANES;
        some[v] = some[v] * by * load(weight, i, LANES, FLOAT32) + load(bias, i, LANES, FLOAT32);
        if (i < a->rope_dim) some[v] = rotated(some[v], cosine + i / 2, cosine + (i + a->rope_dim) / 2);
        store(x, i, some[v], LANES, FLOAT32);
    }
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

/* Values of two neighbours, the first in an even place. */
INLINE void write_pair(const Pages *p, uint32_t *page, int64_t place, const void *from, int64_t one, int64_t two) {
    const uint16_t *x = (const uint16_t *)from;
    uint32_t *to = page + place / 2 * padded(p);
    for (int64_t i = 0; i < p->head_dim; i += LANES) {
        const Words first = __builtin_convertvector((Shorts) * (const ShortsAt *)(x + one + i), Words);
        const Words second = __builtin_convertvector((Shorts) * (const ShortsAt *)(x + two + i), Words);
        *(WordsAt *)(to + i) = first | second << 16;
    }
}

INLINE void qkv_head(const Qkv *a, int64_t row, int64_t head, const int type, const int V) {
    const Pages *p = &a->at;
    float x[MOST_DIM] ALIGNED;
    const int64_t d = p->head_dim, begin = p->history[row] % p->positions;
    uint32_t *keys = keys_of(p, p->own[row], head);
    for (int64_t i = 0; i < p->n; i++) {
        const int64_t r = row * p->n + i, at = r * a->row + head * d, place = begin + i;
        float *q = a->rotated + (r * p->heads + head) * d;
        if (V) {
            prepare_vectors(a, q, a->q, r, head, 0, type, V);
            prepare_vectors(a, x, a->k, r, head, 1, type, V);
        } else {
            if (a->q) prepare(a, q, a->q, r, head, 0, type);
            prepare(a, x, a->k, r, head, 1, type);
        }
        write_key(p, keys, place, x, type);
        if (type == BFLOAT16 && V && place % 2 == 0 && i + 1 < p->n)
            write_pair(p, keys + page_words(p), place, a->v, at, at + a->row);
        else if (type == FLOAT32 || !V || place % 2 == 0 || i == 0)
            write_value(p, keys + page_words(p), place, a->v, at, type);
    }
}

INLINE void qkv_of(const Qkv *a, int64_t row, int64_t head, const int type) {
    const int whole = a->q && a->rope_dim % LANES == 0;
    if (whole && a->at.head_dim == 32)
        qkv_head(a, row, head, type, 32 / LANES);
    else if (whole && a->at.head_dim == 64)
        qkv_head(a, row, head, type, 64 / LANES);
    else if (whole && a->at.head_dim == 128)
        qkv_head(a, row, head, type, 128 / LANES);
    else
        qkv_head(a, row, head, type, 0);
}

static void qkv(const Qkv *a, int64_t row, int64_t head) {
    if (a->at.type == FLOAT32)
        qkv_of(a, row, head, FLOAT32);
    else
        qkv_of(a, row, head, BFLOAT16);
}

#include "cpu_kernels_attention.h"
#include "cpu_kernels_int8.h"

#define NAMED(pass) JOINED(pass)
#define JOINED(pass) colaserve_kernels_##pass
__attribute__((visibility("hidden"))) const Kernels NAMED(PASS) = {adaln, qkv, attention, quantize, rescale};

#else /* no PASS: choose and call */

#include <sys/mman.h>

extern const Kernels colaserve_kernels_plain;
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
extern const Kernels colaserve_kernels_avx2, colaserve_kernels_avx512, colaserve_kernels_bf16, colaserve_kernels_amx;

/* Whether there are tiles of bfloat16, and Linux lets this process use them. */
static int has_tiles(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18, BF16 = 1 << 22, TILE = 1 << 24 }; /* of arch_prctl; in edx of leaf 7 */
    unsigned int a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BF16) && (d & TILE) &&
           syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

#endif

/* The best kind of this CPU and its operating system, at most `limit`: 0 plain, 1 AVX2 and FMA, 2 AVX-512, 3 that with
   BF16, 4 that with AMX-BF16. On other machines 0. */
int colaserve_kernels_kind(int limit) {
    int kind = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kind = 1;
    if (kind == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        kind = 2;
    if (kind == 2 && __builtin_cpu_supports("avx512bf16")) kind = 3;
    if (kind == 3 && limit > 3 && has_tiles()) kind = 4;
#endif
    return kind < limit ? kind : limit;
}

/* Pages of KV lie in any order: with large pages of memory the CPU finds them faster. */
void colaserve_kernels_memory(void *memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t large = 2 << 20, begin = ((uintptr_t)memory + large - 1) & ~(large - 1);
    const uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) & ~(large - 1);
    if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE); /* as good without */
#else
    (void)memory, (void)bytes;
#endif
}

static const Kernels *kernels(int kind) {
#if defined(__x86_64__)
    if (kind == 1) return &colaserve_kernels_avx2;
    if (kind == 2) return &colaserve_kernels_avx512;
    if (kind == 3) return &colaserve_kernels_bf16;
    if (kind == 4) return &colaserve_kernels_amx;
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
    const int64_t heads = a->at.heads;
#pragma omp parallel for schedule(static) collapse(2) if (rows * a->at.n * heads * a->at.head_dim > ALONE)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++) k->qkv(a, row, head);
}

/* Rows of one history are neighbours: one head of them in turn finds keys and values in the core's own cache. */
void colaserve_attention(int kind, const Attention *a, int64_t rows) {
    const Kernels *k = kernels(kind);
#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int64_t head = 0; head < a->at.heads; head++)
        for (int64_t row = 0; row < rows; row++) k->attention(a, row, head);
}

void colaserve_quantize(int kind, const Quantize *a, int64_t rows) {
    const Kernels *k = kernels(kind);
#pragma omp parallel for schedule(static) if (rows * a->dim > ALONE)
    for (int64_t r = 0; r < rows; r++) k->quantize(a, r, r + 1);
}

void colaserve_rescale(int kind, const Rescale *a, int64_t rows) {
    const Kernels *k = kernels(kind);
#pragma omp parallel for schedule(static) if (rows * a->dim > ALONE)
    for (int64_t r = 0; r < rows; r++) k->rescale(a, r, r + 1);
}

#endif
