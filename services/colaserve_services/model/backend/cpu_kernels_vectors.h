/* Vectors of LANES floats, for one kind of CPU; see cpu_kernels.c. */

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
