#if FC_SPARSE || FC_SPARSE_LINE
/* Layers that skip zeros. Weights are one stream of entries through all channels: how far the next weight lies from the
 * last one, and the weight. Forms of the stream: */
#define FC_WIDE 0u  /* weights of 8 bits, and after every other one a byte of two distances of four bits */
#define FC_WORDS 1u /* words of entries of gap + bits bits, the first in the lowest; none is 0, as distances are not */
#define FC_BYTES 2u /* bytes: a signed weight of four bits, and above it the distance */
#define FC_ENDED 3u /* words as above, but distances begin anew with every row, and an entry without one ends it */

#if FC_SPARSE
typedef struct {
    const uint8_t *next;
    uint32_t entry, carry; /* entry: what is decoded; carry: where its weight lies, from the end of the last row */
    uint32_t held;         /* WIDE: distances, a 1 above the last */
    const uint8_t *base;
    const uint32_t *part, *last; /* where each part of a row begins; `last`: behind those that are added now */
    uint32_t length, step;       /* of a part, and from weight to weight, in bytes */
    int32_t sums[16];
} fc_walk;
#endif

#if FC_SPARSE_WORDS || FC_SPARSE_ENDED
#if FC_WORD_GAP
#define FC_GAP(layer) ((uint32_t)FC_WORD_GAP)
#else
#define FC_GAP(layer) ((uint32_t)(layer)->gap)
#endif
#if FC_WORD_BITS
#define FC_WORD_DIGIT(layer) ((uint32_t)FC_WORD_BITS)
#else
#define FC_WORD_DIGIT(layer) ((uint32_t)(layer)->bits)
#endif
#define FC_WORD_WEIGHT(layer, word)                                                                                    \
    ((int32_t)((word) << (32u - FC_GAP(layer) - FC_WORD_DIGIT(layer))) >> (32u - FC_WORD_DIGIT(layer)))

/* On to the next entry of a word. */
#define FC_NEXT_WORD(word, next, width)                                                                                \
    do {                                                                                                               \
        (word) >>= (width);                                                                                            \
        if ((word) == 0u) {                                                                                            \
            (word) = *(const uint32_t *)(const void *)(next);                                                          \
            (next) += 4;                                                                                               \
        }                                                                                                              \
    } while (0)
#endif

#if FC_SPARSE_WIDE
/* On to the next weight; `held & 15` is the distance to it, which then goes. */
#define FC_NEXT_WIDE(weight, held, next)                                                                               \
    do {                                                                                                               \
        (held) >>= 4;                                                                                                  \
        if ((held) == 1u) {                                                                                            \
            (held) = (uint32_t)*(next) | 0x100u;                                                                       \
            (next)++;                                                                                                  \
        }                                                                                                              \
        (weight) = (int32_t)(int8_t)*(next);                                                                           \
        (next)++;                                                                                                      \
    } while (0)
#endif

#if FC_SPARSE
/* The first entry; step: from one weight's input to the next one's. */
static void fc_first(const fc_layer *layer, fc_walk *walk, uint32_t step)
{
    uint32_t distance = 0u;
    walk->next = (const uint8_t *)layer->weight;
    walk->held = 0x10u;
#if FC_SPARSE_BYTES
    if (layer->form == FC_BYTES) {
        walk->entry = *walk->next;
        walk->next++;
        distance = walk->entry >> 4;
    }
#endif
#if FC_SPARSE_WORDS || FC_SPARSE_ENDED
    if ((layer->form == FC_WORDS) || (layer->form == FC_ENDED)) {
        walk->entry = *(const uint32_t *)layer->weight;
        walk->next += 4;
        distance = walk->entry & ((1u << FC_GAP(layer)) - 1u);
    }
#endif
#if FC_SPARSE_WIDE
    if (layer->form == FC_WIDE) {
        int32_t weight;
        FC_NEXT_WIDE(weight, walk->held, walk->next);
        walk->entry = (uint32_t)weight;
        distance = walk->held & 15u;
    }
#endif
    walk->carry = (distance - 1u) * step;
}
#endif
#endif

#if FC_SPARSE
#if FC_TURNED
#define FC_TURNED_OF(layer) (layer)->turned
#else
#define FC_TURNED_OF(layer) 0u
#endif

/* Sixteen pixels share the decoding of an entry, eight columns of two lines, or four columns of wide ones. The inputs of
 * two lines lie in the halves of a word, [tap line, channel, column], columns sorted by stride so that neighbours lie
 * side by side; sides may be exchanged (`turned`). Where every sum fits 16 bits (known when this was written; `split`:
 * of each part of a row) one product serves both lines. */

/* Sums of two lines in a word to sums of each: the low half is signed, and what it borrowed goes back. */
FC_INLINE void fc_apart(uint32_t both, int32_t *sums)
{
    const int32_t low = (int32_t)(int16_t)(uint16_t)(both & 0xFFFFu);
#if FC_SPLIT
    sums[0] += low;
    sums[1] += (int32_t)(both - (uint32_t)low) >> 16;
#else
    sums[0] = low;
    sums[1] = (int32_t)(both - (uint32_t)low) >> 16;
#endif
}

#define FC_TWO(weight, first, second, bytes)                                                                           \
    FC_AT2(a, b, at, bytes);                                                                                           \
    (first) += (weight) * a;                                                                                           \
    (second) += (weight) * b;
#define FC_EIGHT(weight)                                                                                               \
    {                                                                                                                  \
        uint32_t a, b;                                                                                                 \
        FC_TWO(weight, s0, s1, 0)                                                                                      \
        FC_TWO(weight, s2, s3, 8)                                                                                      \
        FC_TWO(weight, s4, s5, 16)                                                                                     \
        FC_TWO(weight, s6, s7, 24)                                                                                     \
    }
#define FC_ALL_APART                                                                                                   \
    {                                                                                                                  \
        int32_t *const sums = walk->sums;                                                                              \
        fc_apart(s0, &sums[0]);                                                                                        \
        fc_apart(s1, &sums[2]);                                                                                        \
        fc_apart(s2, &sums[4]);                                                                                        \
        fc_apart(s3, &sums[6]);                                                                                        \
        fc_apart(s4, &sums[8]);                                                                                        \
        fc_apart(s5, &sums[10]);                                                                                       \
        fc_apart(s6, &sums[12]);                                                                                       \
        fc_apart(s7, &sums[14]);                                                                                       \
    }

/* Through the parts of a row. The loop inside needs every register that there is, so the rest is said to be volatile:
 * compilers keep it in memory then, and not the sums. */
#define FC_WALK(BODY)                                                                                                  \
    fc_walk *volatile home = walk;                                                                                     \
    do {                                                                                                               \
        const fc_walk *const here = home;                                                                              \
        const uint8_t *at = &here->base[*here->part];                                                                  \
        const uint8_t *volatile end = &at[here->length];                                                               \
        at += here->carry;                                                                                             \
        if (at < end) {                                                                                                \
            do {                                                                                                       \
                BODY                                                                                                   \
            } while (at < end);                                                                                        \
        }                                                                                                              \
        walk = home;                                                                                                   \
        walk->carry = (uint32_t)(at - end);                                                                            \
        walk->part++;                                                                                                  \
    } while (walk->part != walk->last);                                                                                \
    walk->next = next;

#if FC_SPARSE_BYTES
FC_APART void fc_bytes(fc_walk *walk)
{
    const uint8_t *next = walk->next;
    const uint32_t step = walk->step;
    uint32_t entry = walk->entry;
    uint32_t s0 = 0u, s1 = 0u, s2 = 0u, s3 = 0u, s4 = 0u, s5 = 0u, s6 = 0u, s7 = 0u;
    FC_WALK(
        const uint32_t weight = (uint32_t)((int32_t)(entry << 28) >> 28);
        FC_EIGHT(weight)
        entry = *next;
        next++;
        at += (entry >> 4) * step;
    )
    walk->entry = entry;
    FC_ALL_APART
}
#endif

#if FC_SPARSE_WORDS
FC_APART void fc_words(fc_walk *walk, const fc_layer *layer)
{
    const uint8_t *next = walk->next;
    const uint32_t step = walk->step;
    uint32_t word = walk->entry;
    uint32_t s0 = 0u, s1 = 0u, s2 = 0u, s3 = 0u, s4 = 0u, s5 = 0u, s6 = 0u, s7 = 0u;
    (void)layer; /* where all layers have words of one kind */
    FC_WALK(
        const uint32_t weight = (uint32_t)FC_WORD_WEIGHT(layer, word);
        FC_EIGHT(weight)
        FC_NEXT_WORD(word, next, FC_GAP(layer) + FC_WORD_DIGIT(layer));
        at += (word & ((1u << FC_GAP(layer)) - 1u)) * step;
    )
    walk->entry = word;
    FC_ALL_APART
}
#endif

#if FC_SPARSE_ENDED
/* A row with an end of its own: neither where it ends nor what is left of a distance has to be known. Its taps lie eight
 * words apart. */
FC_APART void fc_ended(fc_walk *walk, const fc_layer *layer)
{
    fc_walk *volatile home = walk; /* in memory, as in FC_WALK */
    const uint8_t *next = walk->next, *at = walk->base - 32;
    uint32_t word = walk->entry;
    uint32_t s0 = 0u, s1 = 0u, s2 = 0u, s3 = 0u, s4 = 0u, s5 = 0u, s6 = 0u, s7 = 0u;
    (void)layer; /* where all layers have words of one kind */
    for (;;) {
        uint32_t weight = word & ((1u << FC_GAP(layer)) - 1u);
        if (weight == 0u) {
            break;
        }
        at += weight * 32u;
        weight = (uint32_t)FC_WORD_WEIGHT(layer, word);
        FC_EIGHT(weight)
        FC_HERE(word);
        FC_NEXT_WORD(word, next, FC_GAP(layer) + FC_WORD_DIGIT(layer));
    }
    FC_HERE(word);
    FC_NEXT_WORD(word, next, FC_GAP(layer) + FC_WORD_DIGIT(layer));
    walk = home;
    walk->entry = word;
    walk->next = next;
    FC_ALL_APART
}
#endif

#if FC_SPARSE_WIDE
FC_APART void fc_wide(fc_walk *walk)
{
    const uint8_t *next = walk->next;
    const uint32_t step = walk->step;
    uint32_t held = walk->held;
    int32_t weight = (int32_t)walk->entry, s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
    int32_t *sums;
    FC_WALK(
        uint32_t a;
        uint32_t b;
        FC_AT2(a, b, at, 0);
        s0 = FC_PLUS_LOW(weight, a, s0);
        s1 = FC_PLUS_HIGH(weight, a, s1);
        s2 = FC_PLUS_LOW(weight, b, s2);
        s3 = FC_PLUS_HIGH(weight, b, s3);
        FC_AT2(a, b, at, 8);
        s4 = FC_PLUS_LOW(weight, a, s4);
        s5 = FC_PLUS_HIGH(weight, a, s5);
        s6 = FC_PLUS_LOW(weight, b, s6);
        s7 = FC_PLUS_HIGH(weight, b, s7);
        FC_NEXT_WIDE(weight, held, next);
        at += (held & 15u) * step;
    )
    walk->entry = (uint32_t)weight;
    walk->held = held;
    sums = walk->sums;
    sums[0] = s0;
    sums[1] = s1;
    sums[2] = s2;
    sums[3] = s3;
    sums[4] = s4;
    sums[5] = s5;
    sums[6] = s6;
    sums[7] = s7;
}
#endif

/* The sums of one channel: of the first column in both lines, and on. */
FC_INLINE void fc_sums(const fc_layer *layer, fc_walk *walk, const uint32_t *parts, const uint32_t *last)
{
    walk->part = parts;
    walk->last = last;
#if FC_SPARSE_WIDE
    if (layer->form == FC_WIDE) {
        fc_wide(walk);
        return;
    }
#endif
#if FC_SPLIT
    for (uint32_t i = 0u; i < 16u; i++) {
        walk->sums[i] = 0;
    }
    walk->last = (layer->split != 0u) ? &parts[1] : last;
    while (walk->part != last) {
#endif
#if FC_SPARSE_BYTES
    if (layer->form == FC_BYTES) {
        fc_bytes(walk);
    }
#endif
#if FC_SPARSE_WORDS
    if (layer->form == FC_WORDS) {
        fc_words(walk, layer);
    }
#endif
#if FC_SPARSE_ENDED
    if (layer->form == FC_ENDED) {
        fc_ended(walk, layer);
        walk->part = last;
    }
#endif
#if FC_SPLIT
        walk->last++;
    }
#endif
}
#endif
