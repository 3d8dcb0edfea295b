/* What stands before and behind a product of int8, and GELU behind others; see cpu_kernels.c. */

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

/* One row to whole numbers from -127 to 127, of which 128 more are written. */
INLINE void quantize_row(const Quantize *a, int64_t r, const int type) {
    const int64_t dim = a->dim, at = r * dim;
    Floats most = {0}, fault = {0}; /* fault: NaN where a number is not finite */
    for (int64_t i = 0; i < dim; i += LANES) {
        const Floats x = load(a->x, at + i, dim - i, type);
        fault += x - x;
        most = larger(larger(x, -x), most);
    }
    const float largest = largest_of(most), by = largest > 0 ? 127.0f / largest : 0.0f;
    a->scale[r] = largest / 127.0f + sum_of(fault);
    const Floats shift = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds, and leaves the number in the low bits */
    for (int64_t i = 0; i < dim; i += LANES) {
        const Words bits = (Words)(load(a->x, at + i, dim - i, type) * by + shift);
        const Bytes bytes = __builtin_convertvector((bits + 128) & 255, Bytes);
        memcpy(a->out + at + i, &bytes, dim - i < LANES ? dim - i : LANES);
    }
}

static void quantize(const Quantize *a, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
        if (a->type == FLOAT32)
            quantize_row(a, r, FLOAT32);
        else
            quantize_row(a, r, BFLOAT16);
}

/* GELU with its tanh: x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE Floats gelu_tanh(Floats x) {
    const Floats u = x * (0.044715f * x * x + 1.0f) * 2.302208198f; /* 2 sqrt(2 / pi) log2(e) */
    const Floats small = exp2_of(-larger(u, -u)), share = 1.0f / (1.0f + small);
    return x * choose((Words)(u >= 0), share, small * share);
}

INLINE void rescale_row(const Rescale *a, int64_t r, const int type) {
    const int64_t dim = a->dim, at = r * dim;
    const float scale = a->scale ? a->scale[r] : 1.0f;
    for (int64_t i = 0; i < dim; i += LANES) {
        Floats x = load(a->x, at + i, dim - i, type) * scale;
        if (a->bias) x += load(a->bias, i, dim - i, FLOAT32);
        store(a->x, at + i, a->gelu ? gelu_tanh(x) : x, dim - i, type);
    }
}

static void rescale(const Rescale *a, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
        if (a->type == FLOAT32)
            rescale_row(a, r, FLOAT32);
        else
            rescale_row(a, r, BFLOAT16);
}
