/* What stands before all C that compiled.py compiles. */
#include <math.h>
#include <stdint.h>

static inline float power_of_two(float x) { /* x <= 0; within 2e-7 of the result, and 0 below 2^-126 */
    float whole = rintf(x < -126.f ? -126.f : x), rest = x - whole, p = 1.535336188e-4f;
    p = p * rest + 1.339887440e-3f;
    p = p * rest + 9.618437357e-3f;
    p = p * rest + 5.550332548e-2f;
    p = p * rest + 2.402264791e-1f;
    p = p * rest + 6.931472028e-1f;
    p = p * rest + 1.f;
    union { uint32_t bits; float number; } scale = {(uint32_t)((int)whole + 127) << 23};
    return x < -126.f ? 0.f : p * scale.number;
}

