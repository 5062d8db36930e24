#if FC_DEPTHWISE
/* The next digits of a stream, the first in the lowest bits of a byte. */
typedef struct {
    const uint8_t *next;
    uint32_t buffer, held;
} fc_stream;

FC_INLINE uint32_t fc_digit(fc_stream *stream, uint32_t bits)
{
    uint32_t digit;
    if (stream->held < bits) {
        stream->buffer |= (uint32_t)*stream->next << stream->held;
        stream->next++;
        stream->held += 8u;
    }
    digit = stream->buffer & ((1u << bits) - 1u);
    stream->buffer >>= bits;
    stream->held -= bits;
    return digit;
}

/* One channel of one input row as 16-bit numbers, zero point taken off; a row outside of the image is zeros. */
FC_INLINE void fc_row(const fc_layer *layer, const uint8_t *source, int32_t y, uint32_t channel, int16_t *row)
{
    int16_t *to = &row[layer->pad_l];
    if ((y < 0) || (y >= (int32_t)layer->in_h)) {
        for (uint32_t i = 0u; i < layer->in_w; i++) {
            to[i] = 0;
        }
    } else {
        const int32_t zero = (int32_t)layer->in_zero;
        const uint32_t step = layer->in_c;
        const uint8_t *from = &source[((uint32_t)y * layer->in_w * step) + channel];
        for (uint32_t i = layer->in_w; i != 0u; i--) {
            *to = (int16_t)((int32_t)*from - zero);
            to++;
            from += step;
        }
    }
}

#if FC_THREE
/* One channel of a layer of three by three: three rows take turns, weights stay in registers. */
FC_APART void fc_three(const fc_layer *layer, uint8_t *arena, const int16_t *taps, uint32_t channel, uint32_t input,
                       int16_t *ring)
{
    int16_t *a = ring, *b = &ring[layer->words], *c = &ring[2u * layer->words];
    const int32_t scale = (int32_t)(1ul << layer->headroom), bias = fc_bias(layer, channel);
    const uint32_t stride = layer->stride_w, step = layer->out_c, width = layer->out_w;
#if FC_DSP
    const uint32_t a01 = ((const fc_word *)(const void *)&taps[0])->value;
    const uint32_t b01 = ((const fc_word *)(const void *)&taps[3])->value;
    const uint32_t c01 = ((const fc_word *)(const void *)&taps[6])->value;
#endif
    const int32_t a2 = taps[2], b2 = taps[5], c2 = taps[8];
    const int64_t offset = layer->offset;
    const int32_t multiplier = fc_multiplier(layer, channel);
    const uint32_t shift = layer->shift;
    const int32_t low = layer->low, high = layer->high;
    int32_t row = -(int32_t)layer->pad_t;
    uint32_t fresh = 3u;
    uint8_t *to = &arena[layer->target + channel];
    for (uint32_t y = layer->out_h; y != 0u; y--) {
        const int16_t *from[3];
        for (; fresh != 0u; fresh--) {
            int16_t *const oldest = a;
            a = b;
            b = c;
            c = oldest;
            fc_row(layer, &arena[layer->source], row, input, c);
            row++;
        }
        fresh = layer->stride_h;
        from[0] = a;
        from[1] = b;
        from[2] = c;
        for (uint32_t x = width; x != 0u; x--) {
            int32_t sum = ((int32_t)from[0][2] * a2) + ((int32_t)from[1][2] * b2) + ((int32_t)from[2][2] * c2), code;
#if FC_DSP
            sum = __smlad((int16x2_t)a01, (int16x2_t)((const fc_word *)(const void *)from[0])->value, sum);
            sum = __smlad((int16x2_t)b01, (int16x2_t)((const fc_word *)(const void *)from[1])->value, sum);
            sum = __smlad((int16x2_t)c01, (int16x2_t)((const fc_word *)(const void *)from[2])->value, sum);
#else
            sum += ((int32_t)from[0][0] * taps[0]) + ((int32_t)from[0][1] * taps[1]);
            sum += ((int32_t)from[1][0] * taps[3]) + ((int32_t)from[1][1] * taps[4]);
            sum += ((int32_t)from[2][0] * taps[6]) + ((int32_t)from[2][1] * taps[7]);
#endif
            sum = (sum * scale) + bias;
#if FC_FLOATS
            if (layer->kind == FC_SCALED) {
                code = fc_requantize(layer, sum, channel);
            } else
#endif
            {
                code = fc_clamp((int32_t)((offset + ((int64_t)sum * multiplier)) >> 32) >> shift, low, high);
            }
            *to = (uint8_t)code;
            to += step;
            from[0] += stride;
            from[1] += stride;
            from[2] += stride;
        }
    }
}
#endif

/* Channel by channel: the weights are unpacked once, and a ring of rows holds the input, so that the output may lie
 * where the input was. */
static void fc_depthwise(const fc_layer *layer, uint8_t *arena)
{
    const uint32_t span = ((layer->kernel_h - 1u) * layer->dilation_h) + 1u;
    const uint32_t width = layer->words; /* of a row, padded at both ends */
    const uint32_t repeat = (uint32_t)layer->out_c / layer->in_c;
    const int32_t scale = (int32_t)(1ul << layer->headroom);
    const uint8_t *const source = &arena[layer->source];
    int16_t *const ring = (int16_t *)(void *)&arena[layer->scratch];
    int16_t *const taps = ring + (span * width);
#if FC_THREE
    const uint32_t three = ((layer->kernel_h == 3u) && (layer->kernel_w == 3u) && (layer->dilation_h == 1u) &&
                            (layer->dilation_w == 1u) && (layer->stride_h <= 3u))
                               ? 1u
                               : 0u;
#endif
    fc_stream stream = {(const uint8_t *)layer->weight, 0u, 0u};
    for (uint32_t i = 0u; i < (span * width); i++) {
        ring[i] = 0;
    }
    for (uint32_t channel = 0u; channel < layer->out_c; channel++) {
        const int32_t bias = fc_bias(layer, channel);
        int32_t ready = -(int32_t)layer->pad_t; /* the first input row that is not in the ring */
        uint8_t *to = &arena[layer->target + channel];
        for (uint32_t tap = 0u; tap < layer->taps; tap++) {
            taps[tap] = (int16_t)((int32_t)fc_digit(&stream, layer->bits) + layer->lowest);
        }
#if FC_THREE
        if (three != 0u) {
            fc_three(layer, arena, taps, channel, channel / repeat, ring);
            continue;
        }
#endif
        for (uint32_t y = 0u; y < layer->out_h; y++) {
            const int32_t top = (int32_t)(y * layer->stride_h) - (int32_t)layer->pad_t;
            if (ready < top) {
                ready = top;
            }
            while (ready < (top + (int32_t)span)) {
                const uint32_t place = (uint32_t)(ready + (int32_t)layer->pad_t) % span;
                fc_row(layer, source, ready, channel / repeat, &ring[place * width]);
                ready++;
            }
            for (uint32_t x = 0u; x < layer->out_w; x++) {
                const int16_t *weight = taps;
                int32_t sum = 0;
                for (uint32_t ky = 0u; ky < layer->kernel_h; ky++) {
                    const uint32_t place =
                        (uint32_t)(top + (int32_t)(ky * layer->dilation_h) + (int32_t)layer->pad_t) % span;
                    const int16_t *from = &ring[(place * width) + (x * layer->stride_w)];
                    for (uint32_t kx = 0u; kx < layer->kernel_w; kx++) {
                        sum += (int32_t)*from * (int32_t)*weight;
                        from += layer->dilation_w;
                        weight++;
                    }
                }
                *to = (uint8_t)fc_requantize(layer, (sum * scale) + bias, channel);
                to += layer->out_c;
            }
        }
    }
}
#endif
