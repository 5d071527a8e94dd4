/* What a temperature makes of a vocabulary, by blocks: what sampling.py compiles, for a CPU. */
#define BLOCK 256

/* Of each pair of a row and a scale, with x = (logit - largest) scale: the row's largest logit, the sums of 2^x over
 * its blocks, and, unless moments is null, the sum of x 2^x. */
void weigh(int threads, int64_t pairs, int64_t vocabulary, int64_t stride, const float *logits, const int64_t *rows,
           const float *scales, float *largest, float *sums, double *moments) {
    const int64_t blocks = (vocabulary + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t pair = 0; pair < pairs; pair++) {
        const float *logit = logits + rows[pair] * stride, scale = scales[pair];
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < vocabulary; i++) most = logit[i] > most ? logit[i] : most;
        largest[pair] = most;
        double moment = 0;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = block * BLOCK, left = vocabulary - first;
            const int count = left < BLOCK ? (int)left : BLOCK;
            float sum = 0, product = 0;
            if (moments) {
#pragma omp simd reduction(+ : sum, product)
                for (int i = 0; i < count; i++) {
                    float x = (logit[first + i] - most) * scale, weight = power_of_two(x);
                    sum += weight;
                    product += weight * (x < -126.f ? -126.f : x); /* of -inf, too: 0 */
                }
            } else {
#pragma omp simd reduction(+ : sum)
                for (int i = 0; i < count; i++) sum += power_of_two((logit[first + i] - most) * scale);
            }
            sums[pair * blocks + block] = sum;
            moment += product;
        }
        if (moments) moments[pair] = moment;
    }
}
