/* Runs a model on an emulated Cortex-M or RV32, without a C library: prints the instructions of one inference (SysTick
 * or minstret under -icount shift=0), the stack it used, and the bits of every output, by semihosting. */
#include <stddef.h>
#include <stdint.h>

#include HOST_HEADER
#include "samples.h"

extern uint32_t stack_top[], stack_low[];
void *memcpy(void *to, const void *from, size_t count);
void *memset(void *to, int value, size_t count);
void reset(void);

static uint64_t arena[(HOST_ARENA_BYTES + 7u) / 8u];
static float out[HOST_OUTPUT_COUNT];

#if defined(__riscv)
__attribute__((section(".vectors"), used, naked)) static void start(void)
{
    __asm__ volatile("la sp, stack_top\n\tj reset");
}
#else
__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    (const void *)stack_top, (const void *)reset, (const void *)reset, (const void *)reset,
};
#endif

void *memcpy(void *to, const void *from, size_t count)
{
    for (size_t i = 0u; i < count; i++) {
        ((volatile uint8_t *)to)[i] = ((const uint8_t *)from)[i];
    }
    return to;
}

void *memset(void *to, int value, size_t count)
{
    for (size_t i = 0u; i < count; i++) {
        ((volatile uint8_t *)to)[i] = (uint8_t)value;
    }
    return to;
}

static void semihost(uint32_t operation, const void *argument)
{
#if defined(__riscv)
    register uint32_t a0 __asm__("a0") = operation;
    register const void *a1 __asm__("a1") = argument;
    __asm__ volatile(".option push\n\t.option norvc\n\t.balign 16\n\tslli zero, zero, 0x1f\n\tebreak\n\t"
                     "srai zero, zero, 7\n\t.option pop" : "+r"(a0) : "r"(a1) : "memory");
#else
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
#endif
}

static void word(const char *label, uint32_t value)
{
    static char line[32];
    char *to = line;
    while (*label != '\0') {
        *to++ = *label++;
    }
    for (int shift = 28; shift >= 0; shift -= 4) {
        *to++ = "0123456789abcdef"[(value >> shift) & 15u];
    }
    *to++ = '\n';
    *to = '\0';
    semihost(4u, line);
}

#define REGISTER(address) (*(volatile uint32_t *)(address))

/* A counter that goes up. */
static uint32_t counter(void)
{
#if defined(__riscv)
    uint32_t value;
    __asm__ volatile(".option push\n\t.option arch, +zicsr\n\tcsrr %0, minstret\n\t.option pop"
                     : "=r"(value) : : "memory");
    return value;
#else
    return 0xFFFFFFu - REGISTER(0xE000E018u);
#endif
}

#ifdef FC_TRACE
#define MARKS 512u
static uint32_t marks[MARKS], marked;

void host_mark(void)
{
    if (marked < MARKS) {
        marks[marked] = counter();
        marked++;
    }
}
#endif

__attribute__((noinline)) static uint32_t timed(const float *in)
{
    const uint32_t before = counter();
    (void)HOST_RUN(in, out, arena);
#if defined(__riscv)
    return counter() - before;
#else
    return (counter() - before) & 0xFFFFFFu;
#endif
}

void reset(void)
{
    uint32_t *low;
#if !defined(__riscv)
    REGISTER(0xE000ED88u) |= 0xF00000u; /* the FPU, where there is one */
    REGISTER(0xE000E014u) = 0xFFFFFFu;
    REGISTER(0xE000E018u) = 0u;
    REGISTER(0xE000E010u) = 5u;
#endif
    for (uint32_t sample = 0u; sample < SAMPLES; sample++) {
        volatile uint32_t *const here = (volatile uint32_t *)__builtin_frame_address(0) - 64;
        for (low = stack_low; low < (uint32_t *)here; low++) {
            *low = 0xA5A5A5A5u;
        }
        const uint32_t start = counter();
        word("ticks ", timed(samples[sample]));
#ifdef FC_TRACE
        for (uint32_t i = 0u; (sample == 0u) && (i < marked); i++) {
            word("mark ", (marks[i] - start) & 0xFFFFFFu);
        }
#else
        (void)start;
#endif
        for (low = stack_low; (low < (uint32_t *)here) && (*low == 0xA5A5A5A5u); low++) {
        }
        word("stack ", (uint32_t)((uintptr_t)__builtin_frame_address(0) - (uintptr_t)low));
        for (uint32_t i = 0u; i < HOST_OUTPUT_COUNT; i++) {
            uint32_t bits;
            __builtin_memcpy(&bits, &out[i], 4u);
            word("out ", bits);
        }
    }
    semihost(0x18u, (const void *)0x20026u);
    for (;;) {
    }
}
