/* One token per sequence by inverse CDF in vocabulary order, and what is recorded of it: what compiled_sampling.py
 * compiles, for a CPU. Supports and draws are computed in float64; what is recorded, as float32, in float32 where that
 * goes over a whole row.
 *
 * Every truncation keeps a prefix of the tokens sorted by logit, so that a support is a threshold, and the place from
 * which tokens that tie with it count. Blocks whose largest logit lies below the threshold are never looked into. */
#include <float.h>
#include <omp.h>
#include <string.h>

#define BLOCK 128
#define LOG2_E 1.4426950408889634
#define FIRST_PEAKS 32 /* a nucleus is first looked for among tokens that reach this many blocks' largest logits */

/* A row and a temperature. Sums over blocks, peaks and candidates live in the thread's own scratch memory. */
typedef struct {
    const float *logit;
    int64_t size, blocks;
    double most, scale; /* the largest logit; log2(e) / temperature */
    float *peak, *candidate;
    double *sum;
} Row;

/* Tokens above a logit, and those equal to it from an index on. */
typedef struct {
    float least;
    int64_t from;
} Support;

static inline double exact_power_of_two(double x) { /* x <= 0; to 1e-16 (5 - x), and 0 below 2^-1021 */
    const double shift = 6755399441055744.; /* 1.5 * 2^52: what is added to it is rounded, into its lowest bits */
    const double y = x < -1021. ? -1021. : x;
    union { double number; int64_t bits; } whole = {y + shift}, scale;
    const double rest = y - (whole.number - shift);
    double p = 7.072585949269223e-09; /* meets 2^rest at the Chebyshev nodes between -1/2 and 1/2 */
    p = p * rest + 1.0208690299958306e-07;
    p = p * rest + 1.321544258792169e-06;
    p = p * rest + 1.5252657260200837e-05;
    p = p * rest + 1.540353044173605e-04;
    p = p * rest + 1.3333558230164974e-03;
    p = p * rest + 9.618129107606888e-03;
    p = p * rest + 5.550410866444772e-02;
    p = p * rest + 2.4022650695910097e-01;
    p = p * rest + 6.9314718055995e-01;
    p = p * rest + 1.;
    scale.bits = (int64_t)((uint64_t)(whole.bits + 1023) << 52);
    return x < -1021. ? 0. : p * scale.number;
}

static inline float larger(float a, float b) { return a > b ? a : b; }

static inline double weight(const Row *row, float x, float least) {
    return x >= least ? exact_power_of_two(((double)x - row->most) * row->scale) : 0.;
}

static double mass(const Row *row, const float *x, int64_t count, float least) {
    const double most = row->most, scale = row->scale;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) {
        const double own = exact_power_of_two(((double)x[i] - most) * scale);
        sum += x[i] >= least ? own : 0.;
    }
    return sum;
}

static inline int64_t block_end(const Row *row, int64_t block) {
    return (block + 1) * BLOCK < row->size ? (block + 1) * BLOCK : row->size;
}

/* Sums the weights of a support over each block; returns that of all. */
static double sum_blocks(const Row *row, Support support) {
    double total = 0;
    for (int64_t block = 0; block < row->blocks; block++) {
        const int64_t begin = block * BLOCK, end = block_end(row, block);
        double sum = 0;
        if (row->peak[block] >= support.least) {
            int64_t middle = support.from < begin ? begin : support.from > end ? end : support.from;
            sum = mass(row, row->logit + middle, end - middle, support.least);
            if (middle > begin)
                sum += mass(row, row->logit + begin, middle - begin, nextafterf(support.least, INFINITY));
        }
        total += row->sum[block] = sum;
    }
    return total;
}

static int64_t inverse_cdf(const Row *row, Support support, double target) {
    double before = 0;
    int64_t block = 0, token = 0;
    for (int64_t i = 0; i < row->blocks; i++) { /* the last block that has weight, if rounding ends before target */
        if (row->sum[i] > 0) block = i;
        if (before + row->sum[i] > target) break;
        before += row->sum[i];
    }
    for (int64_t i = block * BLOCK; i < block_end(row, block); i++) {
        const double own = i < support.from && row->logit[i] == support.least ? 0. : weight(row, row->logit[i], support.least);
        if (own > 0) token = i;
        before += own;
        if (own > 0 && before > target) break;
    }
    return token;
}

/* Puts numbers above the pivot first and those below it last; [*equal, *below) are those equal to it. */
static void partition(float *x, int64_t low, int64_t high, float pivot, int64_t *equal, int64_t *below) {
    int64_t end = high;
    for (int64_t i = low; i < end;) {
        const float own = x[i];
        if (own > pivot) x[i++] = x[low], x[low++] = own;
        else if (own < pivot) x[i] = x[--end], x[end] = own;
        else i++;
    }
    *equal = low, *below = end;
}

/* The middle of three numbers from places that no order of the numbers is likely to be about: logits that rise and then
 * fall make the first, the middle and the last of them a bad choice every time. */
static float pivot_of(const float *x, int64_t low, int64_t high) {
    uint64_t mixed = (uint64_t)(high - low);
    float three[3];
    for (int i = 0; i < 3; i++) {
        mixed = mixed * 6364136223846793005u + 1442695040888963407u;
        three[i] = x[low + (int64_t)((mixed >> 33) % (uint64_t)(high - low))];
    }
    const float a = three[0], b = three[1], c = three[2];
    return a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
}

static float kth_largest(float *x, int64_t count, int64_t k) {
    for (int64_t low = 0, high = count, equal, below;;) {
        const float pivot = pivot_of(x, low, high);
        partition(x, low, high, pivot, &equal, &below);
        if (k <= equal) high = equal;
        else if (k > below) low = below;
        else return pivot;
    }
}

/* What the k-th largest of the blocks' peaks is, which k tokens at least reach; -inf where there are not so many. */
static float kth_peak(const Row *row, int64_t k) {
    if (k > row->blocks) return -INFINITY;
    memcpy(row->candidate, row->peak, row->blocks * sizeof(float));
    return kth_largest(row->candidate, row->blocks, k);
}

/* Writes the logits that reach a threshold to the candidates; returns how many. */
static int64_t gather(const Row *row, float least) {
    int64_t count = 0;
    for (int64_t block = 0; block < row->blocks; block++) {
        if (!(row->peak[block] >= least)) continue;
        for (int64_t i = block * BLOCK; i < block_end(row, block); i++) {
            row->candidate[count] = row->logit[i];
            count += row->logit[i] >= least;
        }
    }
    return count;
}

/* Cuts a support, of which all tokens from its threshold on count, to the largest that hold a share of its mass: of
 * tokens that tie, those with the highest index. */
static Support nucleus(const Row *row, Support support, double share) {
    const double target = (share > DBL_MIN ? share : DBL_MIN) * sum_blocks(row, support); /* at least one token */
    float least;
    int64_t count;
    for (int64_t peaks = FIRST_PEAKS;; peaks *= 8) {
        least = larger(kth_peak(row, peaks), support.least);
        count = gather(row, least);
        if (least == support.least || mass(row, row->candidate, count, least) >= target) break;
    }
    double above = 0;
    for (int64_t low = 0, high = count, equal, below; low < high;) {
        float *x = row->candidate;
        const float pivot = pivot_of(x, low, high);
        partition(x, low, high, pivot, &equal, &below);
        const double more = above + mass(row, x + low, equal - low, -INFINITY), own = weight(row, pivot, -INFINITY);
        if (more >= target) {
            high = equal;
            continue;
        }
        const double kept = ceil((target - more) / own);
        if (kept <= (double)(below - equal)) {
            int64_t dropped = below - equal - (int64_t)kept, index = 0;
            for (; dropped; index++) dropped -= row->logit[index] == pivot;
            return (Support){pivot, index};
        }
        above = more + own * (double)(below - equal);
        low = below;
    }
    return (Support){least, 0}; /* rounding: all of them */
}

/* Numbers as integers in the same order. */
static inline float number_of(int64_t key) {
    const int32_t rising = (int32_t)key;
    union { int32_t bits; float number; } x = {rising ^ (rising >> 31 & 0x7fffffff)};
    return x.number;
}

static inline int64_t key_of(float number) {
    union { float number; int32_t bits; } x = {number};
    return x.bits ^ (x.bits >> 31 & 0x7fffffff);
}

/* The least logit that min-p keeps: bisected, since rounding in float64 decides, which rises with the logit. */
static float min_p_threshold(const Row *row, double temperature, double min_p) {
    const double limit = log(min_p);
    int64_t below = key_of(-INFINITY), least = key_of((float)row->most);
    while (least - below > 1) {
        const int64_t middle = below + (least - below) / 2;
        if ((number_of(middle) - row->most) / temperature >= limit) least = middle;
        else below = middle;
    }
    return number_of(least);
}

/* The least logit within so many standard deviations (of the finite logits) of the largest. */
static float sigma_threshold(const Row *row, double sigma) {
    double sum = 0, count = 0, squares = 0;
#pragma omp simd reduction(+ : sum, count)
    for (int64_t i = 0; i < row->size; i++) {
        const int finite = fabsf(row->logit[i]) <= FLT_MAX;
        sum += finite ? row->logit[i] : 0., count += finite ? 1. : 0.;
    }
    const double mean = sum / count;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < row->size; i++) {
        const double around = fabsf(row->logit[i]) <= FLT_MAX ? row->logit[i] - mean : 0.;
        squares += around * around;
    }
    const double limit = row->most - sigma * sqrt(squares / count);
    const float x = (float)limit;
    return x < limit ? nextafterf(x, INFINITY) : x;
}

/* Fills the peaks of the row's blocks; returns the largest. */
static float find_peaks(const Row *row) {
    float most = -INFINITY;
    for (int64_t block = 0; block < row->blocks; block++) {
        float peak = -INFINITY;
#pragma omp simd reduction(max : peak)
        for (int64_t i = block * BLOCK; i < block_end(row, block); i++)
            peak = row->logit[i] > peak ? row->logit[i] : peak;
        row->peak[block] = peak;
        most = larger(most, peak);
    }
    return most;
}

static int64_t first_of(const Row *row, float x) {
    for (int64_t block = 0; block < row->blocks; block++)
        for (int64_t i = block * BLOCK; row->peak[block] == x && i < block_end(row, block); i++)
            if (row->logit[i] == x) return i;
    return 0;
}

/* Parameter sets as columns, as in policy.py; sigmas may be missing. */
typedef struct {
    const double *temperature;
    const int64_t *top_k;
    const double *top_p, *min_p, *sigma;
    int64_t min_p_first;
} Sets;

/* Which tokens of the row a set with a temperature above 0 keeps. */
static Support settle(Row *row, const Sets *sets, int64_t set) {
    const double temperature = sets->temperature[set], min_p = sets->min_p[set];
    const int64_t top_k = sets->top_k[set];
    row->scale = LOG2_E / (temperature < 1e-300 ? 1e-300 : temperature); /* no logits differ by less than 1e-45 */
    float least = -INFINITY;
    if (sets->sigma && sets->sigma[set] > 0) least = sigma_threshold(row, sets->sigma[set]);
    if (top_k > 0 && top_k < row->size) {
        const int64_t count = gather(row, kth_peak(row, top_k));
        if (count >= top_k) least = larger(least, kth_largest(row->candidate, count, top_k));
    }
    const float by_min_p = min_p > 0 ? min_p_threshold(row, temperature, min_p) : -INFINITY;
    if (sets->min_p_first) least = larger(least, by_min_p);
    Support support = {least, 0};
    if (sets->top_p[set] < 1) support = nucleus(row, support, sets->top_p[set]);
    if (by_min_p > support.least) support = (Support){by_min_p, 0};
    return support;
}

static inline int64_t bytes_of_scratch(int64_t vocabulary) {
    const int64_t blocks = (vocabulary + BLOCK - 1) / BLOCK;
    return (blocks * (sizeof(double) + sizeof(float) + BLOCK * sizeof(float)) + 63) / 64 * 64;
}

/* Bytes of memory that each thread needs. */
int64_t scratch(int64_t vocabulary) { return bytes_of_scratch(vocabulary); }

static Row row_of(const float *logit, int64_t vocabulary, char *memory) {
    const int64_t blocks = (vocabulary + BLOCK - 1) / BLOCK;
    double *sum = (double *)(memory + omp_get_thread_num() * bytes_of_scratch(vocabulary));
    float *peak = (float *)(sum + blocks);
    Row row = {logit, vocabulary, blocks, 0, 0, peak, peak + blocks, sum};
    row.most = find_peaks(&row);
    return row;
}

/* Whether there is nothing to weigh: the first largest logit is drawn, also where it is infinite. */
static inline int is_greedy(const Row *row, double temperature) {
    return temperature == 0 || !(fabs(row->most) <= FLT_MAX);
}

/* Of each sequence: its row, its set, its uniform, and the token drawn. `order` sorts the sequences by row and set: those
 * that share both follow each other, and the first of them settles the support for all. */
void draw(int64_t threads, int64_t vocabulary, int64_t stride, const float *logits, char *memory, const double *temperature,
          const int64_t *top_k, const double *top_p, const double *min_p, const double *sigma, int64_t min_p_first,
          int64_t sequences, const int64_t *order, const int64_t *rows, const int64_t *choices, const double *uniforms,
          int64_t *tokens) {
    const Sets sets = {temperature, top_k, top_p, min_p, sigma, min_p_first};
#pragma omp parallel for num_threads((int)threads) schedule(dynamic)
    for (int64_t n = 0; n < sequences; n++) {
        const int64_t at = rows[order[n]], set = choices[order[n]];
        if (n && rows[order[n - 1]] == at && choices[order[n - 1]] == set) continue;
        Row row = row_of(logits + at * stride, vocabulary, memory);
        const int greedy = is_greedy(&row, temperature[set]);
        const int64_t first = greedy ? first_of(&row, (float)row.most) : 0;
        const Support support = greedy ? (Support){0, 0} : settle(&row, &sets, set);
        const double total = greedy ? 0 : sum_blocks(&row, support);
        for (int64_t i = n; i < sequences && rows[order[i]] == at && choices[order[i]] == set; i++)
            tokens[order[i]] = greedy ? first : inverse_cdf(&row, support, uniforms[order[i]] * total);
    }
}

/* The sum of 2^x of x = (logit - most) scale over the whole row, and of x 2^x, in float32 by blocks. */
static double rough_mass(const float *logit, int64_t size, float most, float scale, double *moment) {
    double total = 0;
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
        const int count = (int)(size - begin < BLOCK ? size - begin : BLOCK);
        float sum = 0, product = 0;
        if (moment) {
#pragma omp simd reduction(+ : sum, product)
            for (int i = 0; i < count; i++) {
                const float x = (logit[begin + i] - most) * scale, own = power_of_two(x);
                sum += own;
                product += own * (x < -126.f ? -126.f : x); /* keeps 0 times -inf out */
            }
            *moment += product;
        } else {
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < count; i++) sum += power_of_two((logit[begin + i] - most) * scale);
        }
        total += sum;
    }
    return total;
}

static double log_of_mass(const Row *row, Support support) {
    const int is_whole = support.least == -INFINITY, fits = row->scale > 1e-30 && row->scale < 1e30; /* float32 */
    return log(is_whole && fits ? rough_mass(row->logit, row->size, (float)row->most, (float)row->scale, NULL)
                                : sum_blocks(row, support));
}

/* Of each sequence its token's log-probability under every set, -inf where it is excluded; `order` sorts by row. */
void log_probabilities(int64_t threads, int64_t vocabulary, int64_t stride, const float *logits, char *memory,
                       const double *temperature, const int64_t *top_k, const double *top_p, const double *min_p,
                       const double *sigma, int64_t min_p_first, int64_t sequences, const int64_t *order,
                       const int64_t *rows, int64_t count, const int64_t *tokens, float *results) {
    const Sets sets = {temperature, top_k, top_p, min_p, sigma, min_p_first};
#pragma omp parallel for num_threads((int)threads) schedule(dynamic)
    for (int64_t n = 0; n < sequences; n++) {
        const int64_t at = rows[order[n]];
        if (n && rows[order[n - 1]] == at) continue;
        Row row = row_of(logits + at * stride, vocabulary, memory);
        for (int64_t set = 0; set < count; set++) {
            const int greedy = is_greedy(&row, temperature[set]);
            const int64_t first = greedy ? first_of(&row, (float)row.most) : 0;
            const Support support = greedy ? (Support){0, 0} : settle(&row, &sets, set);
            const double log_total = greedy ? 0 : log_of_mass(&row, support);
            for (int64_t i = n; i < sequences && rows[order[i]] == at; i++) {
                const int64_t token = tokens[order[i]];
                const float x = row.logit[token];
                const int kept = greedy ? token == first : x > support.least || (x == support.least && token >= support.from);
                const double below = greedy ? 0 : (x - row.most) * row.scale / LOG2_E - log_total;
                results[order[i] * count + set] = kept ? (float)below : -INFINITY;
            }
        }
    }
}

/* Of each row: the largest logit, the sum of exp(logit - largest), and the entropy in nats. */
void entropies(int64_t threads, int64_t vocabulary, int64_t stride, const float *logits, char *memory, int64_t rows,
               float *largest, float *totals, float *results) {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        const Row row = row_of(logits + n * stride, vocabulary, memory);
        double moment = 0;
        const double total = rough_mass(row.logit, vocabulary, (float)row.most, (float)LOG2_E, &moment);
        const double entropy = log(total) - moment / LOG2_E / total;
        largest[n] = (float)row.most, totals[n] = (float)total;
        results[n] = entropy < 0 ? 0.f : (float)entropy;
    }
}
