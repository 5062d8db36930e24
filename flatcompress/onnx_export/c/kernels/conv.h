#if FC_CONV || FC_DEPTHWISE
/* A convolution or linear layer. Kinds of result: codes by integer multipliers, codes by float scales (where no
 * multiplier is exact for every sum), real values. */
#define FC_CODES 0u
#define FC_SCALED 1u
#define FC_REAL 2u

typedef struct {
    int64_t offset;        /* of the requantization, with one half and the zero point in it */
    const void *weight;    /* rows of words (conv), a stream of digits (depthwise) */
    const void *scale;     /* int32_t multipliers or float scales, one a channel */
    const void *bias;      /* int16_t or int32_t, one a channel */
    const fc_add *add;     /* a fused addition or NULL */
    uint32_t source, target, scratch; /* offsets in the arena */
    uint16_t in_h, in_w, in_c, out_h, out_w, out_c, groups;
    uint16_t taps, words;  /* products of a value; words of a patch of 16-bit numbers */
    int16_t lowest;        /* the weight that digit 0 stands for */
    uint8_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_t, pad_l;
    uint8_t bits, headroom, shift, kind, wide; /* wide: int32_t biases */
    uint8_t in_zero, out_zero, low, high;
} fc_layer;

FC_INLINE int32_t fc_bias(const fc_layer *layer, uint32_t channel)
{
#if FC_WIDE_BIAS
    if (layer->wide != 0u) {
        return ((const int32_t *)layer->bias)[channel];
    }
#endif
    return (int32_t)((const int16_t *)layer->bias)[channel];
}

/* A sum to a code of the layer's grid. */
FC_INLINE int32_t fc_requantize(const fc_layer *layer, int32_t sum, uint32_t channel)
{
    int32_t code;
#if FC_FLOATS
    if (layer->kind == FC_SCALED) {
        float product = (float)sum * ((const float *)layer->scale)[channel];
        code = fc_round(product, -512.0f, 512.0f) + (int32_t)layer->out_zero;
        return fc_clamp(code, (int32_t)layer->low, (int32_t)layer->high);
    }
#endif
    code = (int32_t)((layer->offset + ((int64_t)sum * ((const int32_t *)layer->scale)[channel])) >> 32);
    return fc_clamp(code >> layer->shift, (int32_t)layer->low, (int32_t)layer->high);
}
#endif

#if FC_CONV
#if FC_DSP
typedef struct {
    uint32_t value;
} __attribute__((packed, may_alias)) fc_word;
#define FC_PAIRS(a, b, sum) ((uint32_t)__smlad((int16x2_t)(a), (int16x2_t)(b), (int32_t)(sum)))
#else
#define FC_PAIRS(a, b, sum) ((sum) + (((a) & 0xFFFFu) * ((b) & 0xFFFFu)) + (((a) >> 16) * ((b) >> 16)))
#endif

/* Four bytes as two words of two 16-bit numbers, in the order 0 2, 1 3; returns their sum. */
FC_INLINE uint32_t fc_widen4(const uint8_t *from, uint32_t *to)
{
#if FC_DSP
    uint32_t four = ((const fc_word *)from)->value;
    to[0] = (uint32_t)__uxtb16((uint8x4_t)four);
    to[1] = (uint32_t)__uxtb16((uint8x4_t)((four >> 8) | (four << 24)));
    return (uint32_t)__usada8((uint8x4_t)four, (uint8x4_t)0u, 0u);
#else
    uint32_t a = from[0], b = from[1], c = from[2], d = from[3];
    to[0] = a | (c << 16);
    to[1] = b | (d << 16);
    return a + b + c + d;
#endif
}

/* The inputs of one output pixel as 16-bit numbers; padding is the code of zero. Returns their sum. Runs that are no
 * multiple of four bytes long go through `bytes` first. */
static uint32_t fc_patch(const fc_layer *layer, const uint8_t *source, uint32_t y, uint32_t x, uint32_t group,
                         uint32_t *patch, uint8_t *bytes)
{
    const uint32_t depth = (uint32_t)layer->in_c / layer->groups;
    const int32_t top = (int32_t)(y * layer->stride_h) - (int32_t)layer->pad_t;
    const int32_t left = (int32_t)(x * layer->stride_w) - (int32_t)layer->pad_l;
    const int32_t right = left + (((int32_t)layer->kernel_w - 1) * (int32_t)layer->dilation_w);
    const uint32_t direct = ((depth & 3u) == 0u) ? 1u : 0u;
    uint32_t *to = patch;
    uint8_t *byte = bytes;
    uint32_t sum = 0u;
    for (uint32_t ky = 0u; ky < layer->kernel_h; ky++) {
        const int32_t row = top + (int32_t)(ky * layer->dilation_h);
        const uint32_t inside = ((row >= 0) && (row < (int32_t)layer->in_h)) ? 1u : 0u;
        uint32_t whole = 0u, count = layer->kernel_w, run = depth;
        if ((inside != 0u) && (left >= 0) && (right < (int32_t)layer->in_w) && (layer->dilation_w == 1u) &&
            (layer->groups == 1u)) {
            whole = 1u;
            run = depth * count;
            count = 1u;
        }
        for (uint32_t kx = 0u; kx < count; kx++) {
            const int32_t column = left + (int32_t)(kx * layer->dilation_w);
            const uint8_t *from = NULL;
            if ((whole != 0u) || ((inside != 0u) && (column >= 0) && (column < (int32_t)layer->in_w))) {
                from = source + (((((uint32_t)row * layer->in_w) + (uint32_t)column) * layer->in_c) + (group * depth));
            }
            if (direct == 0u) {
                for (uint32_t i = 0u; i < run; i++) {
                    *byte = (from != NULL) ? from[i] : layer->in_zero;
                    byte++;
                }
            } else if (from != NULL) {
                for (uint32_t i = 0u; i < run; i += 4u) {
                    sum += fc_widen4(&from[i], to);
                    to += 2;
                }
            } else {
                const uint32_t zeros = (uint32_t)layer->in_zero | ((uint32_t)layer->in_zero << 16);
                for (uint32_t i = 0u; i < run; i += 2u) {
                    *to = zeros;
                    to++;
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
            sum += fc_widen4(from, to);
            to += 2;
        }
    }
    while (to < &patch[layer->words]) { /* digits that fill a word up meet zeros */
        *to = 0u;
        to++;
    }
    return sum;
}

/* Two rows of weights times two patches, digits of BITS bits in the halves of a word. */
#define FC_DOT(BITS, MASK)                                                                                             \
    static void fc_dot_##BITS(const uint32_t *first, const uint32_t *second, const uint32_t *p0, const uint32_t *p1,   \
                              const uint32_t *end, uint32_t *sums)                                                     \
    {                                                                                                                  \
        uint32_t s0 = 0u, s1 = 0u, s2 = 0u, s3 = 0u, mask = (MASK);                                                    \
        FC_HIDE(mask);                                                                                                 \
        while (p0 != end) {                                                                                            \
            const uint32_t a = *first++, b = *second++;                                                                \
            FC_STEPS_##BITS                                                                                            \
        }                                                                                                              \
        sums[0] = s0;                                                                                                  \
        sums[1] = s1;                                                                                                  \
        sums[2] = s2;                                                                                                  \
        sums[3] = s3;                                                                                                  \
    }
#define FC_STEP(SHIFT)                                                                                                 \
    {                                                                                                                  \
        const uint32_t x = *p0++, y = *p1++;                                                                           \
        const uint32_t v = (a >> (SHIFT)) & mask, w = (b >> (SHIFT)) & mask;                                           \
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
        uint32_t part[4];                                                                                              \
        fc_dot_##BITS(first, second, p0, p1, &p0[layer->words], part);                                                 \
        for (uint32_t i = 0u; i < 4u; i++) {                                                                           \
            sums[i] += part[i] << place;                                                                               \
        }                                                                                                              \
        first += length;                                                                                               \
        second += length;                                                                                              \
        place += (BITS##u);                                                                                            \
    }

/* Weights of 3, 5 and 6 bits are planes of 4, 2 and 1 bits, one after the other in a row. */
FC_INLINE void fc_products(const fc_layer *layer, const uint32_t *first, const uint32_t *second, const uint32_t *p0,
                           const uint32_t *p1, uint32_t *sums)
{
    uint32_t place = 0u;
    sums[0] = 0u;
    sums[1] = 0u;
    sums[2] = 0u;
    sums[3] = 0u;
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
    (void)first;
    (void)second;
    (void)place;
}

FC_INLINE void fc_store(const fc_layer *layer, uint8_t *arena, float *real, int32_t sum, uint32_t pixel,
                        uint32_t channel)
{
    const uint32_t at = (pixel * layer->out_c) + channel;
    int32_t code;
#if FC_REALS
    if (layer->kind == FC_REAL) {
        real[(channel * layer->out_h * layer->out_w) + pixel] = (float)sum * ((const float *)layer->scale)[channel];
        return;
    }
#else
    (void)real;
#endif
    code = fc_requantize(layer, sum, channel);
#if FC_FUSED
    if (layer->add != NULL) {
        const int32_t other = (int32_t)arena[layer->add->b + at];
        code = (layer->add->swapped != 0u) ? fc_sum(layer->add, other, code) : fc_sum(layer->add, code, other);
    }
#endif
    arena[layer->target + at] = (uint8_t)code;
}

static void fc_conv(const fc_layer *layer, uint8_t *arena, float *real)
{
    const uint32_t pixels = (uint32_t)layer->out_h * layer->out_w;
    const uint32_t outputs = (uint32_t)layer->out_c / layer->groups;
    const uint32_t row = ((uint32_t)layer->words * layer->bits) / 16u;
    const int32_t scale = (int32_t)(1ul << layer->headroom);
    uint32_t *const p0 = (uint32_t *)(void *)&arena[layer->scratch];
    uint32_t *const next = p0 + layer->words;
    uint8_t *const bytes = (uint8_t *)(next + layer->words);
    uint32_t y = 0u, x = 0u;
    for (uint32_t pixel = 0u; pixel < pixels; pixel += 2u) {
        const uint32_t two = ((pixel + 1u) < pixels) ? 1u : 0u;
        const uint32_t *const p1 = (two != 0u) ? next : p0;
        const uint32_t last_x = ((x + 1u) == layer->out_w) ? 0u : (x + 1u);
        const uint32_t last_y = (last_x == 0u) ? (y + 1u) : y;
        const uint32_t *weight = (const uint32_t *)layer->weight;
        uint32_t channel = 0u;
        for (uint32_t group = 0u; group < layer->groups; group++) {
            const uint32_t end = channel + outputs;
            const int32_t lift = layer->lowest;
            const int32_t c0 = lift * (int32_t)fc_patch(layer, &arena[layer->source], y, x, group, p0, bytes);
            int32_t c1 = c0;
            if (two != 0u) {
                c1 = lift * (int32_t)fc_patch(layer, &arena[layer->source], last_y, last_x, group, next, bytes);
            }
            while (channel < end) {
                const uint32_t pair = ((channel + 1u) < end) ? 1u : 0u;
                const uint32_t *const second = (pair != 0u) ? (weight + row) : weight;
                uint32_t sums[4];
                int32_t bias = fc_bias(layer, channel);
                fc_products(layer, weight, second, p0, p1, sums);
                fc_store(layer, arena, real, (((int32_t)sums[0] + c0) * scale) + bias, pixel, channel);
                if (two != 0u) {
                    fc_store(layer, arena, real, (((int32_t)sums[1] + c1) * scale) + bias, pixel + 1u, channel);
                }
                if (pair != 0u) {
                    bias = fc_bias(layer, channel + 1u);
                    fc_store(layer, arena, real, (((int32_t)sums[2] + c0) * scale) + bias, pixel, channel + 1u);
                    if (two != 0u) {
                        fc_store(layer, arena, real, (((int32_t)sums[3] + c1) * scale) + bias, pixel + 1u,
                                 channel + 1u);
                    }
                }
                channel += 1u + pair;
                weight += row + ((pair != 0u) ? row : 0u);
            }
        }
        x = ((last_x + 1u) == layer->out_w) ? 0u : (last_x + 1u);
        y = (x == 0u) ? (last_y + 1u) : last_y;
    }
}
#endif
