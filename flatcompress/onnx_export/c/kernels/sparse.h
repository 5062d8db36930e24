#if FC_SPARSE || FC_SPARSE_LINE
/* Layers that skip zeros. Weights are one stream of entries through all channels: how far the next weight lies from the
 * last one, and the weight. Forms of the stream: */
#define FC_WIDE 0u  /* weights of 8 bits, and after every other one a byte of two distances of four bits */
#define FC_WORDS 1u /* words of entries of gap + bits bits, the first in the lowest; none is 0, as distances are not */
#define FC_BYTES 2u /* bytes: a signed weight of four bits, and above it the distance */

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

#if FC_SPARSE_WORDS
#if FC_WORD_BITS
#define FC_GAP(layer) ((uint32_t)FC_WORD_GAP)
#define FC_WORD_DIGIT(layer) ((uint32_t)FC_WORD_BITS)
#else
#define FC_GAP(layer) ((uint32_t)(layer)->gap)
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
#if FC_SPARSE_WORDS
    if (layer->form == FC_WORDS) {
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
#if FC_SPLIT
        walk->last++;
    }
#endif
}

/* All channels of two pixels into the halves of words, `step` words apart. */
FC_INLINE void fc_pair(const uint8_t *a, uint32_t step_a, const uint8_t *b, uint32_t step_b, uint32_t *to,
                       uint32_t step, uint32_t count)
{
    uint32_t i = count;
#if FC_DSP
    if ((step_a & step_b) != 0u) {
        uint32_t mask = 0x00FF00FFu;
        for (; i >= 4u; i -= 4u) {
            const uint32_t four = ((const fc_word *)(const void *)a)->value;
            const uint32_t other = ((const fc_word *)(const void *)b)->value;
            const uint32_t odd = four & mask, even = (four >> 8) & mask;
            const uint32_t odd_b = other & mask, even_b = (other >> 8) & mask;
            to[0] = (odd & 0xFFFFu) | (odd_b << 16);
            to[step] = (even & 0xFFFFu) | (even_b << 16);
            to += 2u * step;
            to[0] = (odd >> 16) | (odd_b & 0xFFFF0000u);
            to[step] = (even >> 16) | (even_b & 0xFFFF0000u);
            to += 2u * step;
            a += 4;
            b += 4;
        }
    }
#endif
    for (; i != 0u; i--) {
        *to = (uint32_t)*a | ((uint32_t)*b << 16);
        to += step;
        a += step_a;
        b += step_b;
    }
}

#if FC_PACKED
/* The same of packed codes; of a step of 0 both halves of the byte are one code. */
FC_INLINE void fc_pair_packed(const uint8_t *a, uint32_t step_a, const uint8_t *b, uint32_t step_b, uint32_t *to,
                              uint32_t step, uint32_t count)
{
    for (uint32_t i = count; i != 0u; i -= 2u) {
        const uint32_t first = *a, second = *b;
        *to = (first & 15u) | ((second & 15u) << 16);
        to += step;
        if (i == 1u) {
            break;
        }
        *to = (first >> 4) | ((second >> 4) << 16);
        to += step;
        a += step_a;
        b += step_b;
    }
}
#endif

/* The inputs of the lines y and y + 1, which are all read before one is written; zeros outside of the image. */
FC_APART void fc_gather(const fc_layer *layer, const uint8_t *source, uint32_t y, uint32_t *patch)
{
    const uint32_t words = layer->words, apart = words / layer->stride_w, depth = layer->in_c;
    const uint32_t packed = FC_PACK(layer->packed, FC_SOURCE), pixel = fc_pixel(depth, packed);
    const uint32_t down = pixel * ((FC_TURNED_OF(layer) != 0u) ? 1u : (uint32_t)layer->in_w); /* to the next line */
    const uint32_t across = pixel * ((FC_TURNED_OF(layer) != 0u) ? (uint32_t)layer->in_h : 1u); /* and column */
#if FC_PACKED
    const uint8_t outside = (uint8_t)((uint32_t)layer->in_zero * ((packed != 0u) ? 17u : 1u)); /* in both halves */
#else
    const uint8_t outside = layer->in_zero;
#endif
    const uint32_t columns = ((layer->out_w - 1u) * layer->stride_w) + ((layer->kernel_w - 1u) * FC_DILATION_W(layer)) + 1u;
    const int32_t last = (int32_t)layer->in_h - 1;
    int32_t row = (int32_t)(y * layer->stride_h) - (int32_t)layer->pad_t;
    for (uint32_t ky = 0u; ky < layer->kernel_h; ky++) {
        uint32_t *to = patch, phase = 0u, wide[2], column = 0u, run;
        const uint8_t *line[2];
        for (uint32_t i = 0u; i < 2u; i++) {
            const int32_t here = row + (int32_t)(i * layer->stride_h);
            const uint32_t inside = ((here >= 0) && (here <= last)) ? 1u : 0u;
            line[i] = (inside != 0u) ? &source[(uint32_t)here * down] : source;
            wide[i] = (inside == 0u) ? 0u : (layer->in_w - ((here == last) ? (uint32_t)layer->absent : 0u));
        }
        do { /* runs of columns that lie in both lines, in one or in none */
            const uint32_t x = column - layer->pad_l; /* far beyond the image where it is negative */
            const uint32_t step_a = (x < wide[0]) ? 1u : 0u, step_b = (x < wide[1]) ? 1u : 0u;
            const uint8_t *a = (step_a != 0u) ? &line[0][x * across] : &outside;
            const uint8_t *b = (step_b != 0u) ? &line[1][x * across] : &outside;
            const uint32_t next_a = step_a * across, next_b = step_b * across;
            run = (column < layer->pad_l) ? (layer->pad_l - column) : (columns - column);
            run = (step_a != 0u) ? (wide[0] - x) : run;
            run = ((step_b != 0u) && ((step_a == 0u) || (wide[1] < wide[0]))) ? (wide[1] - x) : run;
            run = (run < (columns - column)) ? run : (columns - column);
            column += run;
            do {
#if FC_PACKED
                if (packed != 0u) {
                    fc_pair_packed(a, step_a, b, step_b, &to[phase], words, depth);
                } else
#endif
                fc_pair(a, step_a, b, step_b, &to[phase], words, depth);
                a += next_a;
                b += next_b;
                phase += apart;
                if (phase == words) {
                    phase = 0u;
                    to++;
                }
                run--;
            } while (run != 0u);
        } while (column != columns);
        patch += words * depth;
        row += (int32_t)FC_DILATION_H(layer);
    }
}

static void fc_sparse(const fc_layer *layer, uint8_t *arena, float *real FC_RANGE_PARAMETERS)
{
    const uint32_t width = layer->out_w, words = layer->words;
    const uint32_t split = (layer->split > 1u) ? layer->split : 1u;
    const uint32_t once = (layer->form == FC_WIDE) ? 4u : 8u;
    const uint32_t length = (4u * layer->kernel_h * layer->in_c * words) / split;
    uint32_t *const parts = (uint32_t *)(void *)&arena[layer->scratch];
    uint32_t *const patch = &parts[layer->kernel_w * split];
    fc_walk walk;
    fc_result result = fc_into(layer, arena, real);
    const uint32_t line = result.pixel * ((FC_TURNED_OF(layer) != 0u) ? 1u : width);
    const uint32_t pixel = result.pixel * ((FC_TURNED_OF(layer) != 0u) ? (uint32_t)layer->out_h : 1u); /* to a column */
    uint32_t phase = 0u, place = 0u, at = 0u, *part = parts;
#if FC_RANGE
    uint32_t y = 0u, left = pixels;
    while (first != 0u) {
        first -= width;
        y++;
    }
#else
    uint32_t y = 0u, left = (width * layer->out_h) - layer->absent;
#endif
    walk.length = length;
    walk.step = 4u * words;
    result.stride = pixel;
    for (uint32_t kx = 0u; kx < layer->kernel_w; kx++) {
        uint32_t begin = 4u * ((phase * (words / layer->stride_w)) + place);
        for (uint32_t i = 0u; i < split; i++) {
            *part = begin;
            part++;
            begin += length;
        }
        phase += FC_DILATION_W(layer);
        while (phase >= layer->stride_w) {
            phase -= layer->stride_w;
            place++;
        }
    }
    while (left != 0u) {
        const uint32_t here = (left < (2u * width)) ? left : (2u * width);
        const uint32_t above = (here < width) ? here : width, below = here - above;
        fc_gather(layer, &arena[layer->source], y, patch);
        for (uint32_t x = 0u; x < above; x += once) {
            const uint32_t most = ((x + once) < above) ? once : (above - x);
            const uint32_t both = (below <= x) ? 0u : (((below - x) < most) ? (below - x) : most);
            fc_first(layer, &walk, walk.step);
            walk.base = (const uint8_t *)&patch[x];
            for (uint32_t channel = 0u; channel < layer->out_c; channel++) {
                const uint32_t place_of = at + (x * pixel);
                fc_sums(layer, &walk, parts, patch);
                if (both != 0u) {
                    result.row = line;
                    fc_put(&result, walk.sums, both, channel, place_of);
                }
                if (both != most) { /* columns of the upper line alone */
                    result.row = 0u;
                    fc_put(&result, &walk.sums[2u * both], most - both, channel, place_of + (both * pixel));
                }
            }
        }
        at += 2u * line;
        left -= here;
        y += 2u;
    }
}
#endif

#if FC_SPARSE_LINE
/* A linear layer's sparse rows, one input vector, read where it lies. Entries come in groups, of which none belongs to
 * two rows (entries of no distance and no weight fill up): four with their distances before them (WIDE), two (BYTES), or
 * what a word holds. Where the first of a group lies beyond the row, the row has ended. */
#define FC_ADD_ENTRY(distance, digit)                                                                                  \
    place += (distance);                                                                                               \
    sum += (digit) * (int32_t)source[place];

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
#define FC_TWO_BYTES(from) ((uint32_t)(from)[0] | ((uint32_t)(from)[1] << 8))

#if FC_SPARSE_BYTES
static void fc_rows_bytes(const fc_result *result, const uint8_t *source, uint32_t taps, uint32_t outputs)
{
    const uint8_t *next = (const uint8_t *)result->layer->weight;
    uint32_t two = FC_TWO_BYTES(next);
    FC_ROWS_OF((two >> 4) & 15u,
        sum += ((int32_t)(two << 28) >> 28) * (int32_t)source[here];
        place = here;
        FC_ADD_ENTRY(two >> 12, (int32_t)(two << 20) >> 28)
        next += 2;
        two = FC_TWO_BYTES(next);
    )
}
#endif

#if FC_SPARSE_WORDS
#define FC_WORD_ENTRY(k)                                                                                               \
    if (((k) * width) <= (32u - width)) {                                                                              \
        FC_ADD_ENTRY((word >> (((k) * width) & 31u)) & gaps, FC_WORD_WEIGHT(layer, word >> (((k) * width) & 31u)))     \
    }
static void fc_rows_words(const fc_result *result, const uint8_t *source, uint32_t taps, uint32_t outputs)
{
    const fc_layer *const layer = result->layer;
    const uint32_t *next = (const uint32_t *)layer->weight;
    const uint32_t width = FC_GAP(layer) + FC_WORD_DIGIT(layer), gaps = (1u << FC_GAP(layer)) - 1u;
    uint32_t word = *next;
    FC_ROWS_OF(word & gaps,
        sum += FC_WORD_WEIGHT(layer, word) * (int32_t)source[here];
        place = here;
        FC_WORD_ENTRY(1u)
        FC_WORD_ENTRY(2u)
        FC_WORD_ENTRY(3u)
        FC_WORD_ENTRY(4u)
        FC_WORD_ENTRY(5u)
        FC_WORD_ENTRY(6u)
        FC_WORD_ENTRY(7u)
        next++;
        word = *next;
    )
}
#endif

#if FC_SPARSE_WIDE
static void fc_rows_wide(const fc_result *result, const uint8_t *source, uint32_t taps, uint32_t outputs)
{
    const uint8_t *next = (const uint8_t *)result->layer->weight;
    uint32_t gaps = FC_TWO_BYTES(next);
#if FC_DSP
    FC_ROWS_OF(gaps & 15u,
        const uint32_t four = ((const fc_word *)(const void *)&next[2])->value;
        const int32_t even = (int32_t)__sxtb16((int8x4_t)four);
        const int32_t odd = (int32_t)__sxtb16((int8x4_t)((four >> 8) | (four << 24)));
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
        place = here;
        FC_ADD_ENTRY((gaps >> 4) & 15u, weight[1])
        FC_ADD_ENTRY((gaps >> 8) & 15u, weight[2])
        FC_ADD_ENTRY(gaps >> 12, weight[3])
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
#if FC_SPARSE_BYTES
    if (layer->form == FC_BYTES) {
        fc_rows_bytes(&result, source, layer->taps, layer->out_c);
    }
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
