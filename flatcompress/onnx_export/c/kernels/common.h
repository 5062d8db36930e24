/* Kernels of flatcompress models: C99, integers, no allocation, no library. Everything here is static: a model's C
 * file says which parts it uses (FC_...) and includes this once, so that two models never share a symbol.
 *
 * Bytes in the arena are codes counted from the lowest of their grid, channels last. Right shifts of negative numbers
 * are arithmetic in every compiler that this is meant for; the check below refuses the others. */
#include <float.h>
#include <stddef.h>
#include <stdint.h>

#if (-1 >> 1) != -1
#error "flatcompress: this compiler does not shift negative numbers arithmetically"
#endif
#if defined(__FAST_MATH__)
#error "flatcompress: -ffast-math changes roundings; compile this file without it"
#endif
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "flatcompress: floats must be computed as floats (on 32-bit x86: -msse2 -mfpmath=sse)"
#endif

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF /* gcc does so by itself at -std=c99 */
#endif

#if defined(__ARM_FEATURE_DSP) && !defined(FC_PORTABLE)
#include <arm_acle.h>
#define FC_DSP 1
#else
#define FC_DSP 0
#endif

#if FC_DSP
typedef struct {
    uint32_t value;
} __attribute__((packed, may_alias)) fc_word; /* four bytes at any address */
#endif

/* Two words and on: one LDRD, which compilers seldom form. Only an optimization; the other form is plain C. */
#if FC_DSP && defined(__GNUC__)
#define FC_LOAD2(x, y, from) __asm__ volatile("ldrd %0, %1, [%2], #8" : "=r"(x), "=r"(y), "+r"(from) : : "memory")
#else
#define FC_LOAD2(x, y, from)                                                                                           \
    do {                                                                                                               \
        (x) = (from)[0];                                                                                               \
        (y) = (from)[1];                                                                                               \
        (from) += 2;                                                                                                   \
    } while (0)
#endif

#if defined(__GNUC__)
#define FC_INLINE static inline __attribute__((always_inline))
#define FC_APART static __attribute__((noinline))
#define FC_HIDE(value) __asm__("" : "+r"(value)) /* the compiler would spell the mask out in every instruction */
#else
#define FC_INLINE static inline
#define FC_APART static
#define FC_HIDE(value) ((void)0)
#endif

#define FC_MAGIC 12582912.0f /* 1.5 * 2^23: adding it rounds a float below 2^22 half to even */

/* An addition of codes: (a * first + b * second + offset) >> shift, or in floats where no integers are exact. */
typedef struct {
    int32_t first, second, offset;
    uint32_t b; /* offsets in the arena; a is the convolution's result in a fused addition */
#if FC_ADD
    uint32_t a, target, count;
#endif
#if FC_FLOAT_ADD
    float ratio_first, ratio_second, fixed;
    uint8_t floats, base_a, base_b, base_out;
#endif
    uint8_t shift, low, high, swapped;
} fc_add;

FC_INLINE int32_t fc_clamp(int32_t value, int32_t low, int32_t high)
{
    int32_t result = (value < low) ? low : value;
    return (result > high) ? high : result;
}

#if FC_QUANTIZE || FC_FLOATS || FC_ROWS || FC_GATE
/* A float to the nearest integer, ties to even, within low..high; NaN gives low, as onnxruntime does. */
FC_INLINE int32_t fc_round(float value, float low, float high)
{
    float limited = (value > low) ? value : low;
    limited = (limited < high) ? limited : high;
    return (int32_t)(limited + FC_MAGIC) - (int32_t)FC_MAGIC;
}
#endif

#if FC_ADD || FC_FUSED
FC_INLINE int32_t fc_sum(const fc_add *add, int32_t a, int32_t b)
{
#if FC_FLOAT_ADD
    if (add->floats != 0u) { /* two fused multiply-adds; a double holds each product and sum before its rounding */
        float inner = (float)(((double)(b + (int32_t)add->base_b) * (double)add->ratio_second) + (double)add->fixed);
        float total = (float)(((double)(a + (int32_t)add->base_a) * (double)add->ratio_first) + (double)inner);
        int32_t code = fc_round(total, -1.0f, 256.0f) - (int32_t)add->base_out;
        return fc_clamp(code, (int32_t)add->low, (int32_t)add->high);
    }
#endif
    return fc_clamp(((a * add->first) + (b * add->second) + add->offset) >> add->shift, (int32_t)add->low,
                    (int32_t)add->high);
}
#endif
