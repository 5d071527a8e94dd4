/* A step's attention and norms on a CPU: what kernels.py compiles, for one model on one processor.
 *
 * Given to the compiler: BFLOAT16 (else numbers are float32), HEAD_SIZE, a multiple of 32 (float32: 16), SHARED, the
 * queries that share a head of keys. Sums are float32. Vectors are GCC's and Clang's own: nothing here is for one
 * processor.
 */
#include <string.h>

#define LANES 16
#define TILE 64 /* tokens that are weighed at a time: their scores stay in the nearest cache */
#define UNROLL _Pragma("GCC unroll 16")

typedef float vector __attribute__((vector_size(64)));
typedef uint32_t bits __attribute__((vector_size(64)));

#ifdef BFLOAT16

typedef uint16_t real;
#define PARTS 2

static inline float widened(real x) {
    union { uint32_t bits; float number; } wide = {(uint32_t)x << 16};
    return wide.number;
}

static inline real narrowed(float x) { /* to the nearest, ties to even */
    union { float number; uint32_t bits; } wide = {x};
    if (x != x) return 0x7fc0;
    return (real)((wide.bits + 0x7fff + (wide.bits >> 16 & 1)) >> 16);
}

static inline void load(const real *x, vector out[PARTS]) {
    bits both;
    memcpy(&both, x, sizeof both);
    out[0] = (vector)(both << 16);
    out[1] = (vector)(both & 0xffff0000u);
}

#else

typedef float real;
#define PARTS 1
static inline float widened(real x) { return x; }
static inline real narrowed(float x) { return x; }
static inline void load(const real *x, vector out[PARTS]) { memcpy(out, x, sizeof *out); }

#endif

#define CHUNK (LANES * PARTS)       /* numbers that load() reads: of bfloat16 the even ones first, then the odd ones */
#define CHUNKS (HEAD_SIZE / CHUNK)
#define VECTORS (HEAD_SIZE / LANES)
#define PLACE(d) ((d) / CHUNK * CHUNK + (d) % PARTS * LANES + (d) % CHUNK / PARTS) /* where load() puts number d */

#ifdef __clang__
#define SHUFFLED __builtin_shufflevector
#else /* GCC has that since version 12, and this since 4.7 */
typedef int32_t places __attribute__((vector_size(64)));
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif
#define FOLD8(a, b)                                                                                                    \
    (SHUFFLED(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                                          \
     SHUFFLED(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define FOLD4(a, b)                                                                                                    \
    (SHUFFLED(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +                                        \
     SHUFFLED(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
#define FOLD2(a, b)                                                                                                    \
    (SHUFFLED(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +                                        \
     SHUFFLED(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#define FOLD1(a, b)                                                                                                    \
    (SHUFFLED(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +                                       \
     SHUFFLED(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))

static inline vector sums(vector v[LANES]) { /* lane i: the sum of v[i], which is written over */
    for (int i = 0; i < 8; i++) v[i] = FOLD8(v[i], v[i + 8]);
    for (int i = 0; i < 4; i++) v[i] = FOLD4(v[i], v[i + 4]);
    for (int i = 0; i < 2; i++) v[i] = FOLD2(v[i], v[i + 2]);
    return FOLD1(v[0], v[1]);
}

/* What the queries of a head have seen so far: the largest score, the sum of 2^(score - largest), and the values so
 * weighed (Milakov and Gimelshein, 2018: the softmax of a stream). */
typedef struct {
    float largest[SHARED], total[SHARED];
    vector mixed[SHARED][VECTORS];
} Seen;

static inline void see(Seen *seen, vector query[SHARED][VECTORS], const real *keys, const real *values, int64_t count) {
    for (int64_t first = 0; first < count; first += TILE) {
        int tokens = count - first < TILE ? (int)(count - first) : TILE;
        const real *key = keys + first * HEAD_SIZE, *value = values + first * HEAD_SIZE;
        float score[SHARED][TILE];
        for (int start = 0; start < tokens; start += LANES) {
            vector product[SHARED][LANES];
            for (int i = 0; i < LANES; i++) {
                int token = start + i < tokens ? start + i : tokens - 1;
                vector sum[SHARED] = {0};
                UNROLL for (int c = 0; c < CHUNKS; c++) {
                    vector part[PARTS];
                    load(key + token * HEAD_SIZE + c * CHUNK, part);
                    __builtin_prefetch(value + token * HEAD_SIZE + c * CHUNK);
                    UNROLL for (int p = 0; p < PARTS; p++)
                        UNROLL for (int j = 0; j < SHARED; j++) sum[j] += query[j][c * PARTS + p] * part[p];
                }
                UNROLL for (int j = 0; j < SHARED; j++) product[j][i] = sum[j];
            }
            UNROLL for (int j = 0; j < SHARED; j++) {
                vector scores = sums(product[j]);
                memcpy(&score[j][start], &scores, sizeof scores);
            }
        }
        for (int j = 0; j < SHARED; j++) {
            float largest = seen->largest[j], total = 0;
            for (int i = tokens; i < TILE; i++) score[j][i] = -INFINITY;
#pragma omp simd reduction(max : largest)
            for (int i = 0; i < TILE; i++) largest = score[j][i] > largest ? score[j][i] : largest;
#pragma omp simd reduction(+ : total)
            for (int i = 0; i < TILE; i++) {
                score[j][i] = power_of_two(score[j][i] - largest);
                total += score[j][i];
            }
            float kept = power_of_two(seen->largest[j] - largest);
            seen->largest[j] = largest;
            seen->total[j] = seen->total[j] * kept + total;
            for (int v = 0; v < VECTORS; v++) seen->mixed[j][v] *= kept;
        }
        for (int c = 0; c < CHUNKS; c++) {
            vector sum[SHARED][PARTS];
            UNROLL for (int j = 0; j < SHARED; j++)
                UNROLL for (int p = 0; p < PARTS; p++) sum[j][p] = seen->mixed[j][c * PARTS + p];
            for (int token = 0; token < tokens; token++) {
                vector part[PARTS];
                load(value + token * HEAD_SIZE + c * CHUNK, part);
                __builtin_prefetch(key + (token + TILE) * HEAD_SIZE + c * CHUNK);
                UNROLL for (int p = 0; p < PARTS; p++)
                    UNROLL for (int j = 0; j < SHARED; j++) sum[j][p] += score[j][token] * part[p];
            }
            UNROLL for (int j = 0; j < SHARED; j++)
                UNROLL for (int p = 0; p < PARTS; p++) seen->mixed[j][c * PARTS + p] = sum[j][p];
        }
    }
}

/* x turned by its position; before that normed, if norm is not null. The first half of sin is negative. */
static inline void turn(const real *x, const real *cos, const real *sin, const real *norm, float epsilon, float *out) {
    float head[HEAD_SIZE], squares = 0;
    for (int d = 0; d < HEAD_SIZE; d++) head[d] = widened(x[d]);
    if (norm) {
#pragma omp simd reduction(+ : squares)
        for (int d = 0; d < HEAD_SIZE; d++) squares += head[d] * head[d];
        float scale = 1.f / sqrtf(squares / HEAD_SIZE + epsilon);
        for (int d = 0; d < HEAD_SIZE; d++) head[d] *= scale * widened(norm[d]);
    }
    for (int d = 0; d < HEAD_SIZE / 2; d++) {
        float first = head[d], second = head[d + HEAD_SIZE / 2];
        out[d] = first * widened(cos[d]) + second * widened(sin[d]);
        out[d + HEAD_SIZE / 2] = second * widened(cos[d + HEAD_SIZE / 2]) + first * widened(sin[d + HEAD_SIZE / 2]);
    }
}

/* One token for every row: its key and value are written at ends[row] - 1 of the row's own, and its queries see the
 * prefix and the row's own tokens from starts[row] on.
 *
 * qkv: rows x (queries, keys, values); cos, sin: rows x HEAD_SIZE; keys, values: rows x groups x room x HEAD_SIZE;
 * prefix_keys, prefix_values: groups x prefix x HEAD_SIZE; norm: null, or a row for every head of queries and keys.
 */
void attend(int threads, int64_t rows, int64_t groups, int64_t room, int64_t prefix, float scaling, float epsilon,
            const int64_t *starts, const int64_t *ends, const real *qkv, const real *cos, const real *sin,
            const real *norm, real *keys, real *values, const real *prefix_keys, const real *prefix_values, real *out) {
    const int64_t heads = groups * SHARED;
    const float scale = scaling * 1.442695041f; /* weights are powers of two */
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic, 4) if (rows * groups >= 8)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t group = 0; group < groups; group++) {
            const real *own = qkv + row * (heads + 2 * groups) * HEAD_SIZE;
            const real *cosine = cos + row * HEAD_SIZE, *sine = sin + row * HEAD_SIZE;
            vector query[SHARED][VECTORS];
            float turned[HEAD_SIZE];
            for (int j = 0; j < SHARED; j++) {
                int64_t head = group * SHARED + j;
                turn(own + head * HEAD_SIZE, cosine, sine, norm ? norm + head * HEAD_SIZE : 0, epsilon, turned);
                for (int d = 0; d < HEAD_SIZE; d++) ((float *)query[j])[PLACE(d)] = turned[d] * scale;
            }
            real *key = keys + (row * groups + group) * room * HEAD_SIZE;
            real *value = values + (row * groups + group) * room * HEAD_SIZE;
            const int64_t at = (ends[row] - 1) * HEAD_SIZE, head = heads + group;
            turn(own + head * HEAD_SIZE, cosine, sine, norm ? norm + head * HEAD_SIZE : 0, epsilon, turned);
            for (int d = 0; d < HEAD_SIZE; d++) key[at + d] = narrowed(turned[d]);
            memcpy(value + at, own + (head + groups) * HEAD_SIZE, HEAD_SIZE * sizeof(real));

            Seen seen;
            memset(&seen, 0, sizeof seen);
            for (int j = 0; j < SHARED; j++) seen.largest[j] = -1e30f;
            const int64_t shared = group * prefix * HEAD_SIZE;
            see(&seen, query, prefix_keys + shared, prefix_values + shared, prefix);
            const int64_t start = starts[row] * HEAD_SIZE;
            see(&seen, query, key + start, value + start, ends[row] - starts[row]);
            for (int j = 0; j < SHARED; j++) {
                real *to = out + (row * heads + group * SHARED + j) * HEAD_SIZE;
                const float *mixed = (const float *)seen.mixed[j];
                for (int d = 0; d < HEAD_SIZE; d++) to[d] = narrowed(mixed[PLACE(d)] / seen.total[j]);
            }
        }
    }
}

/* Rows of x over their root mean square, times weight. */
void norm(int threads, int64_t rows, int64_t size, float epsilon, const real *x, const real *weight, real *out) {
/* less than this is done before all threads have begun */
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * size >= 1 << 18)
    for (int64_t row = 0; row < rows; row++) {
        const real *from = x + row * size;
        real *to = out + row * size;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < size; i++) squares += widened(from[i]) * widened(from[i]);
        const float scale = 1.f / sqrtf(squares / (float)size + epsilon);
        for (int64_t i = 0; i < size; i++) to[i] = narrowed(widened(from[i]) * scale * widened(weight[i]));
    }
}
