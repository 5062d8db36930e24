/* Real results may be wanted of some pixels alone, from the pixel `first` on; they lie from `real` on. */
#if FC_RANGE
#define FC_RANGE_PARAMETERS , uint32_t first, uint32_t pixels
#define FC_RANGE_ARGUMENTS , first, pixels
#else
#define FC_RANGE_PARAMETERS
#define FC_RANGE_ARGUMENTS
#endif

#if FC_CONV || FC_LINEAR
#if FC_DSP
#define FC_PAIRS(a, b, sum) ((uint32_t)__smlad((int16x2_t)(a), (int16x2_t)(b), (int32_t)(sum)))
#else
#define FC_PAIRS(a, b, sum) ((sum) + (((a) & 0xFFFFu) * ((b) & 0xFFFFu)) + (((a) >> 16) * ((b) >> 16)))
#endif

/* Four bytes as two words of two 16-bit numbers, in the order 0 2, 1 3; returns their sum. The patches of two pixels
 * alternate word by word, so that one load brings both. */
FC_INLINE uint32_t fc_widen4(const uint8_t *from, uint32_t *to, uint32_t mask, uint32_t sum)
{
#if FC_DSP
    const uint32_t four = ((const fc_word *)from)->value;
    to[0] = four & mask;
    to[2] = (four >> 8) & mask;
    return __usada8((uint8x4_t)four, (uint8x4_t)0u, sum);
#else
    const uint32_t a = from[0], b = from[1], c = from[2], d = from[3];
    (void)mask;
    to[0] = a | (c << 16);
    to[2] = b | (d << 16);
    return sum + a + b + c + d;
#endif
}

#endif

#if FC_CONV
/* A run of bytes, or of zeros where it lies outside of the image; returns where the next one goes. */
FC_INLINE uint8_t *fc_copy(uint8_t *to, const uint8_t *from, uint32_t count, uint8_t zero)
{
    uint32_t i = 0u;
    if (from == NULL) {
        for (; i < count; i++) {
            to[i] = zero;
        }
        return &to[count];
    }
#if FC_DSP
    for (; (i + 4u) <= count; i += 4u) {
        ((fc_word *)(void *)&to[i])->value = ((const fc_word *)(const void *)&from[i])->value;
    }
#endif
    for (; i < count; i++) {
        to[i] = from[i];
    }
    return &to[count];
}

#if FC_PACKED
/* The same of four codes in two bytes. */
FC_INLINE uint32_t fc_widen4_packed(const uint8_t *from, uint32_t *to, uint32_t sum)
{
    const uint32_t four = (uint32_t)from[0] | ((uint32_t)from[1] << 8), both = four | (four << 8);
    const uint32_t even = both & 0x000F000Fu, odd = (both >> 4) & 0x000F000Fu;
    to[0] = even;
    to[2] = odd;
    return FC_PAIRS(even + odd, 0x00010001u, sum);
}

/* A run of codes as bytes. */
FC_INLINE uint8_t *fc_unpack(uint8_t *to, const uint8_t *from, uint32_t first, uint32_t count, uint8_t zero)
{
    for (uint32_t i = 0u; i < count; i++) {
        to[i] = (from == NULL) ? zero : (uint8_t)fc_code(from, first + i, 1u);
    }
    return &to[count];
}
#endif

/* The inputs of one output pixel as 16-bit numbers; padding is the code of zero. Returns their sum. Runs that are no
 * multiple of four bytes long go through `bytes` first. */
FC_APART uint32_t fc_patch(const fc_layer *layer, uint8_t *arena, uint32_t y, uint32_t x, uint32_t group, uint32_t *patch)
{
    const uint8_t *const source = &arena[layer->source];
    uint8_t *const bytes = &arena[layer->scratch + (8u * layer->words)];
    const uint32_t depth = (uint32_t)layer->in_c / FC_GROUPS_OF(layer), skipped = group * depth;
    const uint32_t packed = FC_PACK(layer->packed, FC_SOURCE), pixel = fc_pixel(layer->in_c, packed);
    const int32_t top = (int32_t)(y * layer->stride_h) - (int32_t)layer->pad_t;
    const int32_t left = (int32_t)(x * layer->stride_w) - (int32_t)layer->pad_l;
    const int32_t right = left + (((int32_t)layer->kernel_w - 1) * (int32_t)FC_DILATION_W(layer));
    const uint32_t direct = ((depth & 3u) == 0u) ? 1u : 0u;
    uint32_t *to = patch;
    uint8_t *byte = bytes;
    uint32_t sum = 0u, mask = 0x00FF00FFu;
    FC_HIDE(mask);
    for (uint32_t ky = 0u; ky < layer->kernel_h; ky++) {
        const int32_t row = top + (int32_t)(ky * FC_DILATION_H(layer));
        const uint32_t inside = ((row >= 0) && (row < (int32_t)layer->in_h)) ? 1u : 0u;
        uint32_t whole = 0u, count = layer->kernel_w, run = depth;
        if ((inside != 0u) && (left >= 0) && (right < (int32_t)layer->in_w) && (FC_DILATION_W(layer) == 1u) &&
            (FC_GROUPS_OF(layer) == 1u) && ((packed & (direct ^ 1u)) == 0u)) {
            whole = 1u;
            run = depth * count;
            count = 1u;
        }
        for (uint32_t kx = 0u; kx < count; kx++) {
            const int32_t column = left + (int32_t)(kx * FC_DILATION_W(layer));
            const uint8_t *from = NULL;
            if ((whole != 0u) || ((inside != 0u) && (column >= 0) && (column < (int32_t)layer->in_w))) {
                from = source + ((((uint32_t)row * layer->in_w) + (uint32_t)column) * pixel);
            }
            if (direct == 0u) {
#if FC_PACKED
                if (packed != 0u) {
                    byte = fc_unpack(byte, from, skipped, run, layer->in_zero);
                } else
#endif
                {
                    byte = fc_copy(byte, (from == NULL) ? NULL : &from[skipped], run, layer->in_zero);
                }
            } else if (from != NULL) {
                from += skipped >> packed;
                const uint8_t *const stop = &from[run >> packed];
#if FC_PACKED
                if (packed != 0u) {
                    do {
                        sum = fc_widen4_packed(from, to, sum);
                        from += 2;
                        to += 4;
                    } while (from != stop);
                    continue;
                }
#endif
                do {
                    sum = fc_widen4(from, to, mask, sum);
                    from += 4;
                    to += 4;
                } while (from != stop);
            } else {
                const uint32_t zeros = (uint32_t)layer->in_zero | ((uint32_t)layer->in_zero << 16);
                for (uint32_t i = 0u; i < run; i += 2u) {
                    *to = zeros;
                    to += 2;
                }
                sum += run * layer->in_zero;
            }
        }
    }
    if (direct == 0u) {
        while ((((uint32_t)(byte - bytes)) & 3u) != 0u) {
            *byte = 0u;
            byte++;
        }
        for (const uint8_t *from = bytes; from < byte; from += 4) {
            sum = fc_widen4(from, to, mask, sum);
            to += 4;
        }
    }
    while (to < &patch[2u * layer->words]) { /* digits that fill a word up meet zeros */
        *to = 0u;
        to += 2;
    }
    return sum;
}

/* Two rows of weights times the patches of two pixels, digits of BITS bits in the halves of a word, added to sums. */
#define FC_DOT(BITS, MASK)                                                                                             \
    FC_APART void fc_dot_##BITS(const uint32_t *first, const uint32_t *second, const uint32_t *patch,                  \
                                const uint32_t *end, uint32_t *sums)                                                   \
    {                                                                                                                  \
        uint32_t s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3], mask = (MASK);                                \
        FC_HIDE(mask);                                                                                                 \
        do {                                                                                                           \
            const uint32_t a = *first++, b = *second++;                                                                \
            FC_STEPS_##BITS                                                                                            \
        } while (patch != end);                                                                                        \
        sums[0] = s0;                                                                                                  \
        sums[1] = s1;                                                                                                  \
        sums[2] = s2;                                                                                                  \
        sums[3] = s3;                                                                                                  \
    }
#define FC_STEP(SHIFT)                                                                                                 \
    {                                                                                                                  \
        uint32_t x, y;                                                                                                 \
        const uint32_t v = (a >> (SHIFT)) & mask, w = (b >> (SHIFT)) & mask;                                           \
        FC_LOAD2(x, y, patch);                                                                                         \
        s0 = FC_PAIRS(v, x, s0);                                                                                       \
        s1 = FC_PAIRS(v, y, s1);                                                                                       \
        s2 = FC_PAIRS(w, x, s2);                                                                                       \
        s3 = FC_PAIRS(w, y, s3);                                                                                       \
    }
#define FC_STEPS_8 FC_STEP(0) FC_STEP(8)
#define FC_STEPS_4 FC_STEP(0) FC_STEP(4) FC_STEP(8) FC_STEP(12)
#define FC_STEPS_2 FC_STEP(0) FC_STEP(2) FC_STEP(4) FC_STEP(6) FC_STEP(8) FC_STEP(10) FC_STEP(12) FC_STEP(14)
#define FC_STEPS_1                                                                                                     \
    FC_STEP(0) FC_STEP(1) FC_STEP(2) FC_STEP(3) FC_STEP(4) FC_STEP(5) FC_STEP(6) FC_STEP(7)                            \
    FC_STEP(8) FC_STEP(9) FC_STEP(10) FC_STEP(11) FC_STEP(12) FC_STEP(13) FC_STEP(14) FC_STEP(15)

#if FC_BITS_8
FC_DOT(8, 0x00FF00FFu)
#endif
#if FC_BITS_4
FC_DOT(4, 0x000F000Fu)
#endif
#if FC_BITS_2
FC_DOT(2, 0x00030003u)
#endif
#if FC_BITS_1
FC_DOT(1, 0x00010001u)
#endif

#define FC_PLANE(BITS)                                                                                                 \
    if (((uint32_t)layer->bits & (BITS##u)) != 0u) {                                                                   \
        const uint32_t length = ((uint32_t)layer->words * (BITS##u)) / 16u;                                            \
        uint32_t part[4] = {0u, 0u, 0u, 0u};                                                                           \
        fc_dot_##BITS(first, second, patch, end, part);                                                                \
        for (uint32_t i = 0u; i < 4u; i++) {                                                                           \
            sums[i] += part[i] << place;                                                                               \
        }                                                                                                              \
        first += length;                                                                                               \
        second += length;                                                                                              \
        place += (BITS##u);                                                                                            \
    }

/* Weights of 3, 5 and 6 bits are planes of 4, 2 and 1 bits, one after the other in a row. */
FC_INLINE void fc_products(const fc_layer *layer, const uint32_t *first, const uint32_t *second, const uint32_t *patch,
                           const uint32_t *end, uint32_t *sums)
{
#if FC_PLANES
    uint32_t place = 0u;
#if FC_BITS_8
    FC_PLANE(8)
#endif
#if FC_BITS_4
    FC_PLANE(4)
#endif
#if FC_BITS_2
    FC_PLANE(2)
#endif
#if FC_BITS_1
    FC_PLANE(1)
#endif
#else
    switch (layer->bits) {
#if FC_BITS_8
    case 8u:
        fc_dot_8(first, second, patch, end, sums);
        break;
#endif
#if FC_BITS_2
    case 2u:
        fc_dot_2(first, second, patch, end, sums);
        break;
#endif
#if FC_BITS_1
    case 1u:
        fc_dot_1(first, second, patch, end, sums);
        break;
#endif
    default:
#if FC_BITS_4
        fc_dot_4(first, second, patch, end, sums);
#endif
        break;
    }
#endif
}

#if FC_CODED
/* Two-bit digits of one to three bits each, the first in the lowest, become words of rows. `pairs`: of six bits, the two
 * digits that they begin with, and over them how many bits these take. */
typedef struct {
    const uint8_t *next, *pairs;
    uint32_t buffer, held;
} fc_coded;

FC_APART void fc_decode(fc_coded *coded, uint32_t *to, const uint32_t *end)
{
    const uint8_t *const pairs = coded->pairs, *next = coded->next;
    uint32_t buffer = coded->buffer, held = coded->held;
    do {
        uint32_t word = 0u;
        for (uint32_t step = 8u; step != 0u; step--) { /* a digit of each half comes in from above */
            uint32_t pair;
            if (held < 6u) {
                buffer |= ((uint32_t)next[0] | ((uint32_t)next[1] << 8)) << held;
                next += 2;
                held += 16u;
            }
            pair = pairs[buffer & 63u];
            word = (word >> 2) | ((pair & 3u) << 14) | ((pair & 12u) << 28);
            pair >>= 4;
            buffer >>= pair;
            held -= pair;
        }
        *to = word;
        to++;
    } while (to != end);
    coded->next = next;
    coded->buffer = buffer;
    coded->held = held;
}
#endif

/* `count` channels of every group, from the channel `begin` on, whose rows lie at `rows`, of all pixels. */
FC_INLINE void fc_channels(const fc_layer *layer, uint8_t *arena, fc_result *result, const uint32_t *rows,
                           uint32_t begin, uint32_t count FC_RANGE_PARAMETERS)
{
    const uint32_t row = ((uint32_t)layer->words * layer->bits) / 16u;
    const uint32_t width = layer->out_w, groups = FC_GROUPS_OF(layer);
#if FC_RANGE
    uint32_t y = first / width, x = first % width;
#else
    const uint32_t pixels = width * layer->out_h;
    uint32_t y = 0u, x = 0u;
#endif
    uint32_t *const patch = (uint32_t *)(void *)&arena[layer->scratch];
    const uint32_t *const finish = &patch[2u * layer->words];
    const int32_t least = layer->lowest;
    const uint32_t lowest = (uint32_t)least;
    uint32_t at = 0u;
    for (uint32_t pixel = 0u; pixel < pixels; pixel += 2u) {
        const uint32_t two = ((pixel + 1u) < pixels) ? 2u : 1u;
        const uint32_t *weight = FC_CODED ? rows : (const uint32_t *)layer->weight; /* which is no register more */
        uint32_t channel = FC_CODED ? begin : 0u, next_y = y, next_x = x;
        result->row = (two == 2u) ? result->pixel : 0u;
        for (uint32_t group = 0u; group < groups; group++) {
            const uint32_t end = channel + count;
            uint32_t fixed[2] = {0u, 0u};
            next_y = y;
            next_x = x;
            for (uint32_t i = 0u; i < two; i++) {
                fixed[i] = fc_patch(layer, arena, next_y, next_x, group, &patch[i]) * lowest;
                next_x++;
                if (next_x == width) {
                    next_x = 0u;
                    next_y++;
                }
            }
            while (channel < end) {
                const uint32_t pair = ((channel + 1u) < end) ? 2u : 1u;
                uint32_t sums[4] = {fixed[0], fixed[1], fixed[0], fixed[1]};
                fc_products(layer, weight, (pair == 2u) ? (weight + row) : weight, patch, finish, sums);
                for (uint32_t c = 0u; c < pair; c++) {
                    fc_put(result, (const int32_t *)&sums[2u * c], 1u, channel, at);
                    channel++;
                    weight += row;
                }
            }
        }
        at += 2u * result->pixel;
        y = next_y;
        x = next_x;
    }
}

static void fc_conv(const fc_layer *layer, uint8_t *arena, float *real FC_RANGE_PARAMETERS)
{
    const uint32_t outputs = (uint32_t)layer->out_c / FC_GROUPS_OF(layer);
    const uint32_t *rows = (const uint32_t *)layer->weight;
    fc_result result = fc_into(layer, arena, real);
#if FC_CODED
    fc_coded coded = {(const uint8_t *)layer->weight, layer->pairs, 0u, 0u};
    uint32_t begin = 0u, count = outputs;
    do {
        if (layer->pairs != NULL) {
            uint32_t *const decoded = (uint32_t *)(void *)&arena[layer->rows];
            count = ((begin + layer->block) < outputs) ? layer->block : (outputs - begin);
            fc_decode(&coded, decoded, &decoded[(count * layer->words) / 8u]);
            rows = decoded;
        }
        fc_channels(layer, arena, &result, rows, begin, count FC_RANGE_ARGUMENTS);
        begin += count;
    } while (begin < outputs);
#else
    fc_channels(layer, arena, &result, rows, 0u, outputs FC_RANGE_ARGUMENTS);
#endif
}
#endif
