#if FC_LINEAR
/* A linear layer of one input vector, read where it lies: rows of whole words of digits, whose taps are a multiple of
 * what a word of the narrowest plane holds. */
#define FC_HALF(SHIFT)                                                                                                 \
    {                                                                                                                  \
        uint32_t pair[3];                                                                                              \
        (void)fc_widen4(from, pair, wide, 0u);                                                                         \
        from += 4;                                                                                                     \
        sum = FC_PAIRS((word >> (SHIFT)) & mask, pair[0], sum);                                                        \
        sum = FC_PAIRS((word >> ((SHIFT) + FC_DIGIT)) & mask, pair[2], sum);                                           \
    }

#if FC_BITS_8
#define FC_DIGIT 8
FC_APART uint32_t fc_row_8(const uint32_t *weight, const uint8_t *from, const uint8_t *end)
{
    uint32_t sum = 0u, wide = 0x00FF00FFu, mask = wide;
    FC_HIDE(wide);
    do {
        const uint32_t word = *weight++;
        FC_HALF(0)
    } while (from != end);
    return sum;
}
#undef FC_DIGIT
#endif
#if FC_BITS_4
#define FC_DIGIT 4
FC_APART uint32_t fc_row_4(const uint32_t *weight, const uint8_t *from, const uint8_t *end)
{
    uint32_t sum = 0u, wide = 0x00FF00FFu, mask = 0x000F000Fu;
    FC_HIDE(wide);
    FC_HIDE(mask);
    do {
        const uint32_t word = *weight++;
        FC_HALF(0)
        FC_HALF(8)
    } while (from != end);
    return sum;
}
#undef FC_DIGIT
#endif
#if FC_BITS_2
#define FC_DIGIT 2
FC_APART uint32_t fc_row_2(const uint32_t *weight, const uint8_t *from, const uint8_t *end)
{
    uint32_t sum = 0u, wide = 0x00FF00FFu, mask = 0x00030003u;
    FC_HIDE(wide);
    FC_HIDE(mask);
    do {
        const uint32_t word = *weight++;
        FC_HALF(0)
        FC_HALF(4)
        FC_HALF(8)
        FC_HALF(12)
    } while (from != end);
    return sum;
}
#undef FC_DIGIT
#endif
#if FC_BITS_1
#define FC_DIGIT 1
FC_APART uint32_t fc_row_1(const uint32_t *weight, const uint8_t *from, const uint8_t *end)
{
    uint32_t sum = 0u, wide = 0x00FF00FFu, mask = 0x00010001u;
    FC_HIDE(wide);
    FC_HIDE(mask);
    do {
        const uint32_t word = *weight++;
        for (uint32_t shift = 0u; shift < 16u; shift += 2u) {
            FC_HALF(shift)
        }
    } while (from != end);
    return sum;
}
#undef FC_DIGIT
#endif

static void fc_linear(const fc_layer *layer, uint8_t *arena, float *real FC_RANGE_PARAMETERS)
{
    const uint8_t *const source = &arena[layer->source], *const end = &source[layer->taps];
    const uint32_t *weight = (const uint32_t *)layer->weight;
    fc_result result = fc_into(layer, arena, real);
    int32_t fixed = 0;
#if FC_RANGE
    (void)first;
    (void)pixels;
#endif
    for (const uint8_t *from = source; from != end; from++) {
        fixed += (int32_t)*from;
    }
    fixed *= layer->lowest;
    result.row = 0u;
    for (uint32_t channel = 0u; channel < layer->out_c; channel++) {
        uint32_t sum = 0u, place = 0u;
#define FC_ROW(BITS)                                                                                                   \
    if (((uint32_t)layer->bits & (BITS##u)) != 0u) {                                                                   \
        sum += fc_row_##BITS(weight, source, end) << place;                                                            \
        weight += ((uint32_t)layer->taps * (BITS##u)) / 32u;                                                           \
        place += (BITS##u);                                                                                            \
    }
#if FC_BITS_8
        FC_ROW(8)
#endif
#if FC_BITS_4
        FC_ROW(4)
#endif
#if FC_BITS_2
        FC_ROW(2)
#endif
#if FC_BITS_1
        FC_ROW(1)
#endif
        fc_put_one(&result, (int32_t)sum + fixed, channel);
    }
}
#endif
