#if FC_CONV || FC_LINEAR || FC_DEPTHWISE || FC_SPARSE || FC_SPARSE_LINE
/* A convolution or linear layer. Kinds of result: codes by integer multipliers, codes by float scales (where no
 * multiplier is exact for every sum), real values. */
#define FC_CODES 0u
#define FC_SCALED 1u
#define FC_REAL 2u

typedef struct {
#if FC_NUDGED
    int64_t offset;        /* of the requantization, with one half and the zero point in it */
#else
    int32_t offset;        /* its upper word: the lower is zero in every layer */
#endif
    const void *weight;    /* rows of words (dense), a stream of entries (sparse) or of digits (depthwise) */
    const void *scale;     /* int32_t multipliers or float scales, one a channel */
    const void *bias;      /* int16_t or int32_t, one a channel */
#if FC_FUSED
    const fc_add *add;     /* a fused addition or NULL */
#endif
#if FC_LATE
    const float *late;     /* what is added to real results, one a channel, or NULL */
#endif
#if FC_CODED
    const uint8_t *pairs;  /* how rows are coded; NULL: they are words */
    fc_place rows;         /* where they are decoded to, `block` channels at a time */
    uint16_t block;
#endif
    fc_place source, target, scratch;
    uint16_t in_c, out_c;
    fc_side in_h, in_w, out_h, out_w;
#if FC_GROUPS
    uint16_t groups;
#define FC_GROUPS_OF(layer) ((uint32_t)(layer)->groups)
#else
#define FC_GROUPS_OF(layer) 1u
#endif
    uint16_t taps, words;  /* products of a value; words of a patch (dense) or of a line of one channel (sparse) */
    int16_t lowest;        /* the weight that digit 0 stands for */
    uint8_t kernel_h, kernel_w, stride_h, stride_w, pad_t, pad_l;
#if FC_DILATED
    uint8_t dilation_h, dilation_w;
#define FC_DILATION_H(layer) ((uint32_t)(layer)->dilation_h)
#define FC_DILATION_W(layer) ((uint32_t)(layer)->dilation_w)
#else
#define FC_DILATION_H(layer) 1u
#define FC_DILATION_W(layer) 1u
#endif
    uint8_t bits, headroom, shift, trim, in_zero;
#if FC_PACKED
    uint8_t packed;        /* whether source and target are */
#endif
#if FC_RAISED
    uint8_t raise;         /* of biases, where a sum has too few bits for `trim` */
#endif
#if FC_REALS || FC_FLOATS
    uint8_t kind;
#endif
#if FC_WIDE_BIAS
    uint8_t wide;          /* int32_t biases */
#endif
#if FC_NARROW
    uint8_t narrow;        /* int16_t multipliers */
#endif
#if FC_SPARSE || FC_SPARSE_LINE
    uint8_t gap, form, split, absent; /* split: parts of each column of taps; absent: of the last line's pixels */
#endif
#if FC_WHOLE
    uint8_t whole;         /* all taps of a group of pixels are gathered one after the other */
#endif
#if FC_DEPTHWISE || FC_TURNED
    uint8_t turned;        /* the image is taken with its sides exchanged */
#endif
#if FC_MASKED
    uint8_t masked;        /* a depthwise layer's digits are those of weights that are not zero, a bit before each */
#endif
#if FC_FLOATS
    uint8_t out_zero;
#endif
#if FC_LIMITS
    uint8_t low, high;
#endif
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

FC_INLINE int32_t fc_raised_bias(const fc_layer *layer, uint32_t channel)
{
#if FC_RAISED
    return (int32_t)((uint32_t)fc_bias(layer, channel) << layer->raise);
#else
    return fc_bias(layer, channel);
#endif
}

/* A multiplier; of narrow ones the upper 16 bits are stored. */
FC_INLINE int32_t fc_multiplier(const fc_layer *layer, uint32_t channel)
{
#if FC_NARROW
    if (layer->narrow != 0u) {
        return (int32_t)((const int16_t *)layer->scale)[channel] * 65536;
    }
#endif
    return ((const int32_t *)layer->scale)[channel];
}

/* Where results go. Sums come in pairs whose values lie `row` apart, one pair `stride` after the other, in bytes. */
typedef struct {
    const fc_layer *layer;
    uint8_t *to;
    float *real;
    uint32_t row, stride, kind;
    uint32_t pixel; /* from one to the next, in bytes; of real values in numbers */
    int32_t unit; /* 1 << headroom: one multiplication and addition, which a shift would make two */
} fc_result;

#define FC_PLAIN 0u
#define FC_ADDED 1u
#define FC_FLOAT 2u
#define FC_VALUE 3u

static fc_result fc_into(const fc_layer *layer, uint8_t *arena, float *real)
{
    const uint32_t pixel = fc_pixel(layer->out_c, FC_PACK(layer->packed, FC_TARGET));
    fc_result result = {layer, &arena[layer->target], real, pixel, 2u * pixel, FC_PLAIN, pixel, 0};
    result.unit = (int32_t)(1ul << layer->headroom);
#if FC_FUSED
    result.kind = (layer->add == NULL) ? FC_PLAIN : FC_ADDED;
#endif
#if FC_FLOATS
    result.kind = (layer->kind == FC_SCALED) ? FC_FLOAT : result.kind;
#endif
#if FC_REALS
    result.kind = (layer->kind == FC_REAL) ? FC_VALUE : result.kind;
#endif
    return result;
}

/* What is left of a product's upper word: a code. Where all layers end alike, shift and clamp are one instruction. */
FC_INLINE int32_t fc_end(int32_t upper, uint32_t shift, uint32_t trim)
{
#if FC_EVEN
    (void)shift;
    (void)trim;
#if FC_DSP
    return (int32_t)__usat(upper >> FC_EVEN_SHIFT, FC_EVEN_BITS);
#else
    return fc_clamp(upper >> FC_EVEN_SHIFT, 0, (1 << FC_EVEN_BITS) - 1);
#endif
#else
    return fc_byte(upper >> shift) >> trim;
#endif
}

/* Pairs of sums to codes of a channel, from the pixel at `at` on. `how` is a constant where this is called. */
FC_INLINE void fc_put_as(const fc_result *result, const int32_t *sums, uint32_t pairs, uint32_t channel, uint32_t at,
                         uint32_t how)
{
    const fc_layer *const layer = result->layer;
    const int32_t unit = result->unit;
    const uint32_t stride = result->stride, row = result->row;
    const uint32_t shift = layer->shift, trim = layer->trim;
    const int32_t bias = fc_raised_bias(layer, channel);
    const int32_t multiplier = (how == FC_FLOAT) ? 0 : fc_multiplier(layer, channel);
#if FC_NUDGED
    const int64_t offset = layer->offset;
#else
    const int32_t offset = layer->offset;
#endif
#if FC_LIMITS
    const int32_t low = layer->low, high = layer->high;
#endif
#if FC_FLOATS
    const int32_t zero = layer->out_zero;
    const float factor = (how == FC_FLOAT) ? ((const float *)layer->scale)[channel] : 0.0f;
#endif
#if FC_PACKED
    const uint32_t packed = FC_PACK(layer->packed, FC_TARGET), up = 4u * (channel & packed);
    const uint32_t keep = (0u - packed) & (0xF0u >> up); /* the byte's other half */
#else
    const uint32_t packed = 0u;
#endif
#if FC_FUSED
    fc_add add = {0};
    const uint8_t *others = result->to;
#if FC_PACKED
    uint32_t other_packed = packed;
#endif
    if ((how != FC_PLAIN) && (layer->add != NULL)) {
        add = *layer->add;
        others += (int32_t)add.b - (int32_t)layer->target;
#if FC_PACKED
        other_packed = FC_PACK(add.packed, FC_OTHER);
#endif
    }
#if FC_PACKED /* of two that are not packed alike the channels are even */
    const uint32_t other_row = (row << packed) >> other_packed, other_stride = (stride << packed) >> other_packed;
    const uint32_t other_up = 4u * (channel & other_packed), other_mask = 0xFFu >> (4u * other_packed);
    others += ((at << packed) >> other_packed) + (channel >> other_packed);
#define FC_OTHERS(place) (int32_t)(((uint32_t)others[place] >> other_up) & other_mask)
#else
    const uint32_t other_row = row, other_stride = stride;
    others += at + channel;
#define FC_OTHERS(place) (int32_t)others[place]
#endif
#endif
    uint8_t *to = &result->to[at + (channel >> packed)];
    do {
        int32_t first, second, code, next;
        FC_LOAD2(first, second, sums);
        first = (first * unit) + bias;
        second = (second * unit) + bias;
#if FC_FLOATS
        if (how == FC_FLOAT) {
            code = fc_byte((fc_nearest((float)first * factor) + zero) * (int32_t)(1ul << trim)) >> trim;
            next = fc_byte((fc_nearest((float)second * factor) + zero) * (int32_t)(1ul << trim)) >> trim;
        } else
#endif
        {
#if FC_NUDGED
            code = (int32_t)((offset + ((int64_t)first * multiplier)) >> 32);
            next = (int32_t)((offset + ((int64_t)second * multiplier)) >> 32);
#else
            FC_UPPER(code, first, multiplier, offset);
            FC_UPPER(next, second, multiplier, offset);
#endif
            code = fc_end(code, shift, trim);
            next = fc_end(next, shift, trim);
        }
#if FC_LIMITS
        code = fc_clamp(code, low, high);
        next = fc_clamp(next, low, high);
#endif
#if FC_FUSED
        if ((how == FC_ADDED) || ((how == FC_FLOAT) && (layer->add != NULL))) {
            code = fc_sum(&add, code, FC_OTHERS(0));
            next = fc_sum(&add, next, FC_OTHERS(other_row));
            others += other_stride;
        }
#endif
        /* with a row of 0, what is not wanted comes first and is written over */
#if FC_PACKED
        to[row] = (uint8_t)((to[row] & keep) | ((uint32_t)next << up));
        to[0] = (uint8_t)((to[0] & keep) | ((uint32_t)code << up));
#else
        to[row] = (uint8_t)next;
        to[0] = (uint8_t)code;
#endif
        to += stride;
        pairs--;
    } while (pairs != 0u);
}

#if FC_REALS
FC_INLINE float fc_value(const fc_layer *layer, int32_t sum, uint32_t channel)
{
    float value = (float)((int32_t)((uint32_t)sum << layer->headroom) + fc_bias(layer, channel));
    value *= ((const float *)layer->scale)[channel];
#if FC_LATE
    value += (layer->late != NULL) ? layer->late[channel] : 0.0f;
#endif
    return value;
}
#endif

/* Pairs of a channel's sums to what is stored, from the pixel at `at` on; where `row` is 0 the first of each alone. */
FC_APART void fc_put(const fc_result *result, const int32_t *sums, uint32_t pairs, uint32_t channel, uint32_t at)
{
#if FC_REALS
    if (result->kind == FC_VALUE) {
        float *to = &result->real[at + channel];
        for (; pairs != 0u; pairs--) {
            for (uint32_t i = 2u; i != 0u; i--) { /* the first last, which is the right one where `row` is 0 */
                to[(i - 1u) * result->row] = fc_value(result->layer, sums[i - 1u], channel);
            }
            sums += 2;
            to += result->stride;
        }
        return;
    }
#endif
#if FC_FLOATS && defined(__OPTIMIZE_SIZE__)
    fc_put_as(result, sums, pairs, channel, at, result->kind);
#else
#if FC_FUSED
    if (result->kind == FC_ADDED) {
        fc_put_as(result, sums, pairs, channel, at, FC_ADDED);
        return;
    }
#endif
#if FC_FLOATS
    if (result->kind == FC_FLOAT) {
        fc_put_as(result, sums, pairs, channel, at, FC_FLOAT);
        return;
    }
#endif
    fc_put_as(result, sums, pairs, channel, at, FC_PLAIN);
#endif
}

#if FC_LINEAR || FC_SPARSE_LINE
/* The one sum of a channel, where there is one pixel. */
FC_INLINE void fc_put_one(const fc_result *result, int32_t sum, uint32_t channel)
{
    int32_t sums[2];
#if !FC_NUDGED
    if (result->kind == FC_PLAIN) {
        const fc_layer *const layer = result->layer;
        int32_t code = (sum * result->unit) + fc_raised_bias(layer, channel);
        const int32_t multiplier = fc_multiplier(layer, channel), offset = layer->offset;
        FC_UPPER(code, code, multiplier, offset);
        code = fc_end(code, layer->shift, layer->trim);
#if FC_LIMITS
        code = fc_clamp(code, (int32_t)layer->low, (int32_t)layer->high);
#endif
        result->to[channel] = (uint8_t)code;
        return;
    }
#endif
#if FC_REALS
    if (result->kind == FC_VALUE) {
        result->real[channel] = fc_value(result->layer, sum, channel);
        return;
    }
#endif
    sums[0] = sum;
    sums[1] = sum;
    fc_put(result, sums, 1u, channel, 0u);
}
#endif
#endif
