/* Runs a model on an emulated Cortex-M, without a C library: prints the instructions of one inference (SysTick under
 * -icount shift=0), the stack it used, and the bits of every output, by semihosting. */
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

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    (const void *)stack_top, (const void *)reset, (const void *)reset, (const void *)reset,
};

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
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
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

__attribute__((noinline)) static uint32_t timed(const float *in)
{
    const uint32_t before = REGISTER(0xE000E018u);
    (void)HOST_RUN(in, out, arena);
    return (before - REGISTER(0xE000E018u)) & 0xFFFFFFu;
}

void reset(void)
{
    uint32_t *low;
    REGISTER(0xE000ED88u) |= 0xF00000u; /* the FPU, where there is one */
    REGISTER(0xE000E014u) = 0xFFFFFFu;
    REGISTER(0xE000E018u) = 0u;
    REGISTER(0xE000E010u) = 5u;
    for (uint32_t sample = 0u; sample < SAMPLES; sample++) {
        volatile uint32_t *const here = (volatile uint32_t *)__builtin_frame_address(0) - 64;
        for (low = stack_low; low < (uint32_t *)here; low++) {
            *low = 0xA5A5A5A5u;
        }
        word("ticks ", timed(samples[sample]));
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
