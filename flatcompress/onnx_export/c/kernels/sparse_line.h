#if FC_SPARSE_LINE
/* A linear layer's sparse rows, one input vector, read where it lies. Entries come in groups, of which none belongs to
 * two rows (entries of no distance and no weight fill up): distances of four bits, and behind them as many weights. Where
 * the first of a group lies beyond the row, the row has ended. */
#define FC_NIBBLES 0x0F0F0F0Fu

/* A number plus the byte `k` of a word. */
#if FC_DSP && defined(__GNUC__)
#define FC_PLUS_BYTE(to, plus, word, k)                                                                                \
    __asm__("uxtab %0, %1, %2, ror %3" : "=r"(to) : "r"(plus), "r"(word), "n"(8 * (k)))
#else
#define FC_PLUS_BYTE(to, plus, word, k) ((to) = (plus) + (((word) >> (8 * (k))) & 255u))
#endif

/* Every channel: groups (FIRST: the distance to the next one) as long as they lie within the row. */
#define FC_ROWS_OF(FIRST, BODY)                                                                                        \
    uint32_t channel = 0u, place = 0u - 1u; /* the place of the last entry: before the first one there is */           \
    do {                                                                                                               \
        int32_t sum = 0;                                                                                               \
        uint32_t here = place + (FIRST);                                                                               \
        if ((int32_t)(here - taps) < 0) { /* not spelt as below: compilers would jump to one test for both */          \
            do {                                                                                                       \
                BODY                                                                                                   \
                here = place + (FIRST);                                                                                \
            } while (here < taps);                                                                                     \
        }                                                                                                              \
        fc_put_one(result, sum, channel);                                                                              \
        place -= taps;                                                                                                 \
        channel++;                                                                                                     \
    } while (channel < outputs);

#if FC_SPARSE_WORDS
#define FC_ROW_GAP 4u
#define FC_ROW_GROUP (32u / (FC_ROW_GAP + FC_WORD_DIGIT(layer)))
#define FC_ROW_WEIGHT(k)                                                                                               \
    ((int32_t)(word << ((32u - (FC_ROW_GAP * group) - (((k) + 1u) * digit)) & 31u)) >> (32u - digit))
#define FC_ROW_ENTRY(k, half)                                                                                          \
    FC_PLUS_BYTE(here, here, half, (k) / 2u);                                                                          \
    sum += FC_ROW_WEIGHT(k) * (int32_t)source[here];

FC_APART void fc_rows_words(const fc_result *result, const uint8_t *source, uint32_t taps, uint32_t outputs)
{
    const fc_layer *const layer = result->layer;
    const uint32_t *next = (const uint32_t *)layer->weight;
    const uint32_t digit = FC_WORD_DIGIT(layer), group = FC_ROW_GROUP;
    uint32_t word = *next;
    FC_ROWS_OF(word & 15u,
        const uint32_t even = word & FC_NIBBLES;
        const uint32_t odd = (word >> 4) & FC_NIBBLES;
        sum += FC_ROW_WEIGHT(0u) * (int32_t)source[here];
        FC_ROW_ENTRY(1u, odd)
        FC_ROW_ENTRY(2u, even)
        FC_ROW_ENTRY(3u, odd)
        if (group == 5u) {
            FC_ROW_ENTRY(4u, even)
        }
        place = here;
        next++;
        word = *next;
    )
}
#endif

#if FC_SPARSE_WIDE
#define FC_TWO_BYTES(from) ((uint32_t)(from)[0] | ((uint32_t)(from)[1] << 8))
FC_APART void fc_rows_wide(const fc_result *result, const uint8_t *source, uint32_t taps, uint32_t outputs)
{
    const uint8_t *next = (const uint8_t *)result->layer->weight;
    uint32_t gaps = FC_TWO_BYTES(next);
#if FC_DSP
    FC_ROWS_OF(gaps & 15u,
        const uint32_t four = ((const fc_word *)(const void *)&next[2])->value;
        const int32_t even = (int32_t)__sxtb16((int8x4_t)four);
        int32_t odd;
        FC_ODD(odd, four);
        sum = __smlabb((int32_t)source[here], even, sum);
        here += (gaps >> 4) & 15u;
        sum = __smlabb((int32_t)source[here], odd, sum);
        here += (gaps >> 8) & 15u;
        sum = __smlabt((int32_t)source[here], even, sum);
        place = here + (gaps >> 12);
        sum = __smlabt((int32_t)source[place], odd, sum);
        next += 6;
        gaps = FC_TWO_BYTES(next);
    )
#else
    FC_ROWS_OF(gaps & 15u,
        const int8_t *const weight = (const int8_t *)&next[2];
        sum += weight[0] * (int32_t)source[here];
        here += (gaps >> 4) & 15u;
        sum += weight[1] * (int32_t)source[here];
        here += (gaps >> 8) & 15u;
        sum += weight[2] * (int32_t)source[here];
        place = here + (gaps >> 12);
        sum += weight[3] * (int32_t)source[place];
        next += 6;
        gaps = FC_TWO_BYTES(next);
    )
#endif
}
#endif

static void fc_sparse_line(const fc_layer *layer, uint8_t *arena, float *real FC_RANGE_PARAMETERS)
{
    const uint8_t *const source = &arena[layer->source];
    fc_result result = fc_into(layer, arena, real);
    result.row = 0u;
#if FC_RANGE
    (void)first;
    (void)pixels;
#endif
#if FC_SPARSE_WORDS
    if (layer->form == FC_WORDS) {
        fc_rows_words(&result, source, layer->taps, layer->out_c);
    }
#endif
#if FC_SPARSE_WIDE
    if (layer->form == FC_WIDE) {
        fc_rows_wide(&result, source, layer->taps, layer->out_c);
    }
#endif
}
#endif
