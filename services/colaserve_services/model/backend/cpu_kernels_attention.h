/* Attention of one row and head over its pages; see cpu_kernels.c. */

/* How products come by: of float32; of bfloat16, widened to float32; by pairs of bfloat16; by tiles of bfloat16. */
enum { PLAIN, WIDENED, PAIRED, TILED };

/* One operand of a product is read word by word from memory that is not one matrix: part s of it, vector v of its
   words, begins at parts[s * part + v * across] + v * apart; a row of words is `stride` words behind the one before.
   Meanwhile memory that is read later is fetched: for the first half of the queries from fetch[0][s] + skip[0] on, for
   the second from fetch[1][s] + skip[1], `some` words each. */
typedef struct {
    const uint32_t *const *parts;
    int64_t count, part, across, apart, stride, depth; /* depth: rows of words in each part */
    const uint32_t *const *fetch[2];
    int64_t skip[2], some;
} Spread;

/* c[q][v] = c[q][v] * factor[q] (0 without factors) + a[q] b[v], for Q rows and V vectors. */
INLINE void multiply(float *c, int64_t c_row, const float *factor, const void *a, int64_t a_row, const Spread *b,
                     int q0, int rows, const int Q, const int V, const int way) {
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
                        sum[q][v] = (Floats)_mm512_dpbf16_ps(
                            (__m512)sum[q][v], (__m512bh)splat_word(channel[q * a_row]), (__m512bh)word[v]);
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
        multiply(c + q * c_row, c_row, factor ? factor + q : NULL, (const uint32_t *)a + q * a_row, a_row, b, q,     \
                 rows, Q, V, way);
    if (MOST_ROWS == 8) ROWS(8)
    ROWS(4)
    ROWS(1)
#undef ROWS
}

INLINE void fetch(const uint32_t *from, int64_t words) {
    for (int64_t i = 0; i < words; i += 16) __builtin_prefetch(from + i, 0, 2);
}

#if defined(__AMX_BF16__)
/* Tiles: sums of 16 queries (0 to 3), 32 channels of the queries and of 16 keys, weights and 16 channels of 16 keys. */
#define QUERIES_TILE 4
#define KEYS_TILE 5
#define WEIGHTS_TILE 6
#define VALUES_TILE 7

INLINE void configure_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } ALIGNED tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 32, 64}, {16, 16, 16, 16, 16, 16, 16, 8}};
    _tile_loadconfig(&tiles);
}

/* `score` for 32 keys in two parts. */
INLINE void score_tiles(float *scores, const void *queries, int64_t q_row, const Spread *b) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t w = 0; w < b->depth; w += 16) {
        _tile_loadd(QUERIES_TILE, (const uint32_t *)queries + w, q_row * 4);
        _tile_loadd(KEYS_TILE, b->parts[0] + w * b->stride, b->stride * 4);
        _tile_dpbf16ps(0, QUERIES_TILE, KEYS_TILE);
        fetch(b->fetch[0][0] + w * 16, 256);
        _tile_loadd(KEYS_TILE, b->parts[1] + w * b->stride, b->stride * 4);
        _tile_dpbf16ps(1, QUERIES_TILE, KEYS_TILE);
        fetch(b->fetch[1][0] + w * 16, 256);
    }
    _tile_stored(0, scores, TILE * 4);
    _tile_stored(1, scores + 16, TILE * 4);
}

/* `mix` for 64 channels, or 32. */
INLINE void mix_tiles(float *output, const void *weights, const Spread *b, const int V) {
#define EACH(does)                                                                                                   \
    does(0) does(1) if (V == 4) { does(2) does(3) }
#define LOAD(v) _tile_loadd(v, output + v * 16, b->stride * 4);
#define STORE(v) _tile_stored(v, output + v * 16, b->stride * 4);
#define ADD(v)                                                                                                       \
    _tile_loadd(VALUES_TILE, b->parts[s] + i * b->stride + v * 16, b->stride * 4);                                   \
    _tile_dpbf16ps(v, WEIGHTS_TILE, VALUES_TILE);                                                                    \
    fetch(b->fetch[0][s] + b->skip[0] + (v * b->depth + i) * 8, 64);
    EACH(LOAD)
    for (int64_t s = 0; s < b->count; s++)
        for (int64_t i = 0; i < b->depth; i += 8) {
            _tile_loadd(WEIGHTS_TILE, (const uint32_t *)weights + s * b->depth + i, TILE * 2);
            EACH(ADD)
        }
    EACH(STORE)
#undef EACH
#undef LOAD
#undef STORE
#undef ADD
}
#else
INLINE void configure_tiles(void) {}
INLINE void score_tiles(float *scores, const void *queries, int64_t q_row, const Spread *b) {
    (void)scores, (void)queries, (void)q_row, (void)b;
}
INLINE void mix_tiles(float *output, const void *weights, const Spread *b, const int V) {
    (void)output, (void)weights, (void)b, (void)V;
}
#endif

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
INLINE void score(float *scores, const void *queries, int64_t q_row, const Seen *s, int64_t from, int64_t count,
                  int rows, const int way) {
    uint32_t collected[MOST_DIM * 2 * LANES] ALIGNED;
    const int64_t positions = s->at->positions, words = page_words(s->at) / positions;
    const uint32_t *parts[2] = {collected, collected + LANES}, *values[2];
    const int64_t stride = positions % LANES ? 2 * LANES : positions;
    const int64_t some = (positions < LANES ? positions : LANES) * words;
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
        if (way == TILED)
            score_tiles(scores + j, queries, q_row, &b);
        else if (count - j > LANES)
            multiply_rows(scores + j, TILE, NULL, queries, q_row, &b, rows, 2, way);
        else
            multiply_rows(scores + j, TILE, NULL, queries, q_row, &b, rows, 1, way);
    }
    for (int q = 0; q < rows; q++)
        for (int64_t j = count; j % LANES; j++) scores[q * TILE + j] = -INFINITY;
}

/* Online softmax (Milakov and Gimelshein 2018) of one query: scores become weights, in bfloat16 if `pairs` are. Memory
   from `next` on is fetched. */
INLINE void weigh(float *scores, uint16_t *pairs, int64_t count, float *top, float *total, float *factor,
                  const uint32_t *next) {
    Floats most = splat(*top), sum = {0};
    for (int64_t j = 0; j < count; j += LANES) most = larger(*(FloatsAt *)(scores + j), most);
    const float now = largest_of(most);
    *factor = exp2_of(splat(*top - now))[0];
    for (int64_t j = 0; j < count; j += LANES) {
        const Floats weight = exp2_of(*(FloatsAt *)(scores + j) - now);
        sum += weight;
        fetch(next + j * 32 / LANES, 32);
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
    if (way == TILED)
        for (int q = 0; q < rows; q++)
            for (int64_t c = 0; c < width; c += LANES) *(FloatsAt *)(output + q * width + c) *= factor[q];
    for (int64_t c = 0; c < width; c += 2 * LANES) {
        b.skip[0] = c * depth, b.skip[1] = b.skip[0] + b.some;
        for (int64_t s = 0; s < pages; s++) parts[s] = values[s] + c;
        if (way == TILED && width - c >= 64) {
            mix_tiles(output + c, weights, &b, 4);
            c += 2 * LANES;
        } else if (way == TILED)
            mix_tiles(output + c, weights, &b, 2);
        else if (width - c > LANES)
            multiply_rows(output + c, width, factor, weights, w_row, &b, rows, 2, way);
        else
            multiply_rows(output + c, width, factor, weights, w_row, &b, rows, 1, way);
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
INLINE void load_queries(void *to, const Attention *a, int64_t row, int64_t head, int64_t begin, int rows,
                         const int way) {
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
    for (int64_t s = 0; s < 4 && s * positions < seen.length; s++)
        for (int64_t w = 0; w < page_words(p); w += 16) __builtin_prefetch(page_of(&seen, s) + w);
    load_queries(queries, a, row, head, begin, rows, way);
    memset(output, 0, QUERIES * width * sizeof *output);
    for (int q = 0; q < rows; q++) top[q] = -INFINITY;

    for (int64_t from = 0; from < seen.length; from += tile) {
        const int64_t count = seen.length - from < tile ? seen.length - from : tile;
        const int64_t pages = (count + positions - 1) / positions;
        score(scores, queries, paired ? width / 2 : width, &seen, from, count, rows, way);
        const uint32_t *values[TILE], *next[TILE];
        for (int64_t s = 0; s < pages; s++) {
            const int64_t number = from / positions + s;
            values[s] = page_of(&seen, number) + page_words(p);
            next[s] = page_of(&seen, number + pages);
        }
        for (int q = 0; q < rows; q++)
            weigh(scores + q * TILE, paired ? pairs + q * TILE : NULL, count, top + q, total + q, factor + q,
                  next[q % pages]);
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
                  *(FloatsAt *)(output + q * width + c) / total[q], p->head_dim - c, p->type);
}

static void attention(const Attention *a, int64_t row, int64_t head) {
    const int tiled = a->at.positions % 16 == 0 && padded(&a->at) % 32 == 0;
    (void)tiled;
    for (int64_t begin = 0; begin < a->at.n; begin += QUERIES) {
        const int rows = a->at.n - begin < QUERIES ? (int)(a->at.n - begin) : QUERIES;
        if (a->at.type == FLOAT32)
            attend(a, row, head, begin, rows, PLAIN);
#if defined(__AMX_BF16__)
        else if (tiled) {
            configure_tiles();
            attend(a, row, head, begin, rows, TILED);
            _tile_release();
        }
#elif defined(__AVX512BF16__)
        else
            attend(a, row, head, begin, rows, PAIRED);
#endif
#if defined(__AMX_BF16__) || !defined(__AVX512BF16__)
        else /* where there are tiles this is the faster one too */
            attend(a, row, head, begin, rows, WIDENED);
#endif
    }
}
