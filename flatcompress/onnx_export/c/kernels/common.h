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

/* What compilers seldom form: two words and on, or two words at a distance (LDRD), and a product's upper word plus
 * another (SMMLA). Only optimizations; the other forms are plain C. */
#if FC_DSP && defined(__GNUC__)
#define FC_ODD(to, word) __asm__("sxtb16 %0, %1, ror #8" : "=r"(to) : "r"(word)) /* its second and fourth byte */
#define FC_LOAD2(x, y, from) __asm__ volatile("ldrd %0, %1, [%2], #8" : "=r"(x), "=r"(y), "+r"(from) : : "memory")
#define FC_AT2(x, y, from, bytes)                                                                                      \
    __asm__ volatile("ldrd %0, %1, [%2, %3]" : "=r"(x), "=r"(y) : "r"(from), "n"(bytes) : "memory")
#define FC_UPPER(to, x, y, plus) __asm__("smmla %0, %1, %2, %3" : "=r"(to) : "r"(x), "r"(y), "r"(plus))
#else
#define FC_AT2(x, y, from, bytes)                                                                                      \
    do {                                                                                                               \
        (x) = ((const uint32_t *)(const void *)(from))[(bytes) / 4];                                                   \
        (y) = ((const uint32_t *)(const void *)(from))[((bytes) / 4) + 1];                                             \
    } while (0)
#if FC_DSP
#define FC_ODD(to, word) ((to) = (int32_t)__sxtb16((int8x4_t)(((word) >> 8) | ((word) << 24))))
#endif
#define FC_UPPER(to, x, y, plus) ((to) = (int32_t)(((int64_t)(x) * (y)) >> 32) + (plus))
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
#define FC_HERE(value) __asm__ volatile("" : "+r"(value)) /* what is done with it comes after what is above */
#else
#define FC_HERE(value) ((void)0)
#define FC_INLINE static inline
#define FC_APART static
#define FC_HIDE(value) ((void)0)
#endif

/* A 16-bit number times half a word of two such, plus a sum. */
#if FC_DSP
#define FC_PLUS_LOW(x, word, sum) __smlabb((x), (int32_t)(word), (sum))
#define FC_PLUS_HIGH(x, word, sum) __smlabt((x), (int32_t)(word), (sum))
#else
#define FC_PLUS_LOW(x, word, sum) ((sum) + ((x) * (int32_t)((word) & 0xFFFFu)))
#define FC_PLUS_HIGH(x, word, sum) ((sum) + ((x) * (int32_t)((word) >> 16)))
#endif

#define FC_MAGIC 12582912.0f /* 1.5 * 2^23: adding it rounds a float below 2^22 half to even */

/* Where something lies in the arena. */
#if FC_SMALL
typedef uint16_t fc_place;
#else
typedef uint32_t fc_place;
#endif

/* Lines and columns of an image. */
#if FC_SHORT
typedef uint8_t fc_side;
#else
typedef uint16_t fc_side;
#endif

/* Where FC_PACKED, codes below 16 may lie two to a byte, the first in its lower half; every pixel begins with a byte.
 * Elsewhere what says so is 0 and none of this leaves an instruction. */
#if FC_PACKED
#define FC_PACK(flags, bit) (((uint32_t)(flags) >> (bit)) & 1u)
#define FC_PACKED_PARAMETER , uint32_t packed
#else
#define FC_PACK(flags, bit) 0u
#define FC_PACKED_PARAMETER
#endif
#define FC_SOURCE 0u /* bits of `packed`: of a source, of the target, of an addition's second operand */
#define FC_TARGET 1u
#define FC_OTHER 2u

/* Bytes of a pixel. */
FC_INLINE uint32_t fc_pixel(uint32_t channels, uint32_t packed)
{
    return (channels + packed) >> packed;
}

FC_INLINE uint32_t fc_code(const uint8_t *from, uint32_t index, uint32_t packed)
{
    return (packed == 0u) ? (uint32_t)from[index] : (((uint32_t)from[index / 2u] >> ((index & 1u) * 4u)) & 15u);
}

FC_INLINE void fc_store(uint8_t *to, uint32_t index, uint32_t packed, uint32_t code)
{
    if (packed == 0u) {
        to[index] = (uint8_t)code;
    } else {
        const uint32_t up = (index & 1u) * 4u;
        to[index / 2u] = (uint8_t)(((uint32_t)to[index / 2u] & (0xF0u >> up)) | (code << up));
    }
}

/* An addition of codes: (a * first + b * second + offset) >> shift, or in floats where no integers are exact. A fused
 * one adds the code of a convolution, a, to another, b. */
typedef struct {
    int32_t first, second, offset;
    fc_place b;
#if FC_ADD
    fc_place a, target;
    uint32_t count;
#endif
#if FC_FLOAT_ADD
    float ratio_first, ratio_second, fixed;
    uint8_t floats, base_a, base_b, base_out, swapped; /* swapped: a convolution's code is the second operand */
#endif
    uint8_t shift, trim;
#if FC_PACKED
    uint8_t packed;
#endif
#if FC_LIMITS || FC_FLOAT_ADD
    uint8_t low, high;
#endif
} fc_add;

FC_INLINE int32_t fc_clamp(int32_t value, int32_t low, int32_t high)
{
    int32_t result = (value < low) ? low : value;
    return (result > high) ? high : result;
}

/* The clamp to 0 .. 255. Where a grid ends at 2^n - 1, codes come with 8 - n bits more (`trim`), which go afterwards. */
FC_INLINE int32_t fc_byte(int32_t value)
{
#if FC_DSP
    return (int32_t)__usat(value, 8);
#else
    return fc_clamp(value, 0, 255);
#endif
}

#if FC_QUANTIZE || FC_FLOATS || FC_ROWS || FC_GATE
FC_INLINE uint32_t fc_bits_of(float value)
{
    union {
        float real;
        uint32_t bits;
    } same;
    same.real = value;
    return same.bits;
}

/* Of a float below 2^21 the nearest integer, ties to even. */
FC_INLINE int32_t fc_whole(float value)
{
#if FC_DSP && defined(__GNUC__) && defined(__ARM_FP)
    float whole;
    __asm__("vcvtr.s32.f32 %0, %1" : "=t"(whole) : "t"(value)); /* rounds as every operation on floats does */
    return (int32_t)fc_bits_of(whole);
#else
    return (int32_t)(value + FC_MAGIC) - (int32_t)FC_MAGIC;
#endif
}

/* The same within low..high; NaN gives low, as onnxruntime does. */
FC_INLINE int32_t fc_round(float value, float low, float high)
{
    float limited = (value > low) ? value : low;
    limited = (limited < high) ? limited : high;
    return fc_whole(limited);
}
#endif

#if FC_FLOATS
/* Of what is known to be below 2^21, or else far beyond any code. */
FC_INLINE int32_t fc_nearest(float value)
{
#if FC_FAR
    return fc_round(value, -512.0f, 512.0f);
#else
    return fc_whole(value);
#endif
}
#endif

#if FC_ADD || FC_FUSED
FC_INLINE int32_t fc_sum(const fc_add *add, int32_t a, int32_t b)
{
    int32_t code;
#if FC_FLOAT_ADD
    if (add->floats != 0u) { /* two fused multiply-adds; a double holds each product and sum before its rounding */
        const int32_t one = (add->swapped != 0u) ? b : a, other = (add->swapped != 0u) ? a : b;
        float inner = (float)(((double)(other + (int32_t)add->base_b) * (double)add->ratio_second) +
                              (double)add->fixed);
        float total = (float)(((double)(one + (int32_t)add->base_a) * (double)add->ratio_first) + (double)inner);
        code = fc_round(total, -1.0f, 256.0f) - (int32_t)add->base_out;
        return fc_clamp(code, (int32_t)add->low, (int32_t)add->high);
    }
#endif
    code = fc_byte(((a * add->first) + (b * add->second) + add->offset) >> add->shift) >> add->trim;
#if FC_LIMITS
    code = fc_clamp(code, (int32_t)add->low, (int32_t)add->high);
#endif
    return code;
}
#endif
