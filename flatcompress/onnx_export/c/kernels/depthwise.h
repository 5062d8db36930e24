#if FC_DEPTHWISE
#define FC_TOGETHER 144u /* pixels */

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

/* Bytes of four pixels as 16-bit numbers: the first and third, and the second and fourth. mask: 0x00FF00FF. */
FC_INLINE void fc_four(const uint8_t *from, uint32_t stride, uint32_t mask, uint32_t *odd, uint32_t *even)
{
#if FC_DSP
    if (stride == 1u) {
        const uint32_t four = ((const fc_word *)(const void *)from)->value;
        *odd = four & mask;
        *even = (four >> 8) & mask;
        return;
    }
    if (stride == 2u) {
        const uint32_t four = ((const fc_word *)(const void *)from)->value;
        const uint32_t next = ((const fc_word *)(const void *)&from[4])->value;
        *odd = ((four & 0xFFFFu) | (next << 16)) & mask;
        *even = ((four >> 16) | (next & 0xFFFF0000u)) & mask;
        return;
    }
#else
    (void)mask;
#endif
    *odd = (uint32_t)from[0] | ((uint32_t)from[2u * stride] << 16);
    *even = (uint32_t)from[stride] | ((uint32_t)from[3u * stride] << 16);
}

#if FC_DSP
#define FC_TAP(both) ((int32_t)(both)) /* SMLABB and SMLABT take the lower half */
#else
#define FC_TAP(both) ((int32_t)(int16_t)(uint16_t)((both) & 0xFFFFu))
#endif

/* Sums of one line of a channel, by the taps that are not zero: an offset in the plane and a weight each. */
FC_INLINE void fc_line(const uint8_t *from, const uint32_t *taps, const uint32_t *end, int32_t *sums, uint32_t length,
                       uint32_t stride)
{
    uint32_t mask = 0x00FF00FFu;
    FC_HIDE(mask);
    for (uint32_t x = 0u; x < length; x += 4u) {
        const uint32_t *tap = taps;
        int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        while (tap != end) {
            const uint32_t both = *tap;
            const int32_t weight = FC_TAP(both);
            uint32_t odd, even;
            tap++;
            fc_four(&from[both >> 16], stride, mask, &odd, &even);
            s0 = FC_PLUS_LOW(weight, odd, s0);
            s1 = FC_PLUS_LOW(weight, even, s1);
            s2 = FC_PLUS_HIGH(weight, odd, s2);
            s3 = FC_PLUS_HIGH(weight, even, s3);
        }
        sums[0] = s0;
        sums[1] = s1;
        sums[2] = s2;
        sums[3] = s3;
        sums += 4;
        from += 4u * stride;
    }
}

FC_APART void fc_line_1(const uint8_t *from, const uint32_t *taps, const uint32_t *end, int32_t *sums, uint32_t length)
{
    fc_line(from, taps, end, sums, length, 1u);
}

FC_APART void fc_line_n(const uint8_t *from, const uint32_t *taps, const uint32_t *end, int32_t *sums, uint32_t length,
                        uint32_t stride)
{
    fc_line(from, taps, end, sums, length, stride);
}

/* The weights of a channel that are not zero; returns where they end. */
FC_INLINE uint32_t *fc_taps(const fc_layer *layer, fc_stream *stream, uint32_t width, uint32_t *to)
{
    uint32_t line = 0u;
    for (uint32_t ky = 0u; ky < layer->kernel_h; ky++) {
        uint32_t place = line;
        for (uint32_t kx = 0u; kx < layer->kernel_w; kx++) {
            int32_t weight = 0;
#if FC_MASKED
            if ((layer->masked == 0u) || (fc_digit(stream, 1u) != 0u)) /* a bit says whether there is a weight */
#endif
            {
                weight = (int32_t)fc_digit(stream, layer->bits) + layer->lowest;
            }
            if (weight != 0) {
                *to = (place << 16) | ((uint32_t)weight & 0xFFFFu);
                to++;
            }
            place += FC_DILATION_W(layer);
        }
        line += FC_DILATION_H(layer) * width;
    }
    return to;
}

/* One channel of a line's pixels, `step` bytes apart; up, mask: where a packed code lies in its byte. */
FC_APART void fc_copied(uint8_t *to, const uint8_t *in, uint32_t step, uint32_t count, uint32_t up, uint32_t mask)
{
#if FC_PACKED
#define FC_FROM(code) (uint8_t)(((uint32_t)(code) >> up) & mask)
#else
#define FC_FROM(code) (code)
    (void)up;
    (void)mask;
#endif
    for (; (count & 3u) != 0u; count--) {
        *to = FC_FROM(*in);
        to++;
        in += step;
    }
    for (; count != 0u; count -= 4u) {
        to[0] = FC_FROM(*in);
        in += step;
        to[1] = FC_FROM(*in);
        in += step;
        to[2] = FC_FROM(*in);
        in += step;
        to[3] = FC_FROM(*in);
        in += step;
        to += 4;
    }
}

/* Channel by channel: its plane is copied, padded, so that the output may lie where the input was; zeros among the
 * weights are skipped. Sides may be exchanged (`turned`), so that the longer one is gone along. */
static void fc_depthwise(const fc_layer *layer, uint8_t *arena)
{
    const uint32_t width = layer->words; /* of a line of the plane */
    const uint32_t repeat = (uint32_t)layer->out_c / layer->in_c, length = layer->out_w;
    const uint32_t lines = ((layer->out_h - 1u) * layer->stride_h) + ((layer->kernel_h - 1u) * FC_DILATION_H(layer)) + 1u;
    const uint32_t line = (layer->turned != 0u) ? 1u : layer->in_w, pixel = (layer->turned != 0u) ? layer->in_h : 1u;
    const uint32_t packed = FC_PACK(layer->packed, FC_SOURCE), depth = fc_pixel(layer->in_c, packed);
    /* Sums of a small plane that lies line by line are handed over together, else a line's. */
    const uint32_t pixels = length * layer->out_h;
    const uint32_t together = ((layer->turned == 0u) && (pixels <= FC_TOGETHER)) ? 1u : 0u;
    int32_t *const sums = (int32_t *)(void *)&arena[layer->scratch];
    uint32_t *const taps = (uint32_t *)(void *)&sums[(together != 0u) ? (pixels + 3u) : ((length + 3u) & ~3u)];
    uint8_t *const plane = (uint8_t *)&taps[layer->taps];
    const uint32_t wide = (layer->in_w < (width - layer->pad_l)) ? layer->in_w : (width - layer->pad_l);
    const uint32_t high = (layer->in_h < (lines - layer->pad_t)) ? layer->in_h : (lines - layer->pad_t);
    fc_stream stream = {(const uint8_t *)layer->weight, 0u, 0u};
    fc_result result = fc_into(layer, arena, NULL);
    const uint32_t to_line = result.pixel * ((layer->turned != 0u) ? 1u : (uint32_t)layer->out_w);
    result.row = result.pixel * ((layer->turned != 0u) ? (uint32_t)layer->out_h : 1u);
    result.stride = 2u * result.row;
    for (uint32_t i = 0u; i < (lines * width); i++) {
        plane[i] = layer->in_zero;
    }
    for (uint32_t channel = 0u; channel < layer->out_c; channel++) {
        const uint32_t *const end = fc_taps(layer, &stream, width, taps);
        const uint32_t source = channel / repeat;
        const uint8_t *from = plane;
        uint32_t at = 0u, held = 0u;
        const uint32_t up = 4u * (source & packed), mask = 0xFFu >> (4u * packed);
        for (uint32_t y = (end != taps) ? 0u : high; y < high; y++) { /* without taps no input is wanted */
            fc_copied(&plane[((y + layer->pad_t) * width) + layer->pad_l],
                      &arena[layer->source + (source >> packed) + (y * line * depth)], pixel * depth, wide, up, mask);
        }
        for (uint32_t y = 0u; y < layer->out_h; y++) {
            if ((end == taps) && (y != 0u) && (together == 0u)) {
                /* a channel without taps: the sums are zero still */
            } else if (layer->stride_w == 1u) {
                fc_line_1(from, taps, end, &sums[held], length);
            } else {
                fc_line_n(from, taps, end, &sums[held], length, layer->stride_w);
            }
            from += layer->stride_h * width;
            held += length;
            if ((together != 0u) && (held != pixels)) {
                continue; /* what a line wrote beyond its end is written over */
            }
            if (held > 1u) {
                fc_put(&result, sums, held / 2u, channel, at);
            }
            if ((held & 1u) != 0u) {
                fc_result one = result;
                one.row = 0u;
                fc_put(&one, &sums[held - 1u], 1u, channel, at + ((held - 1u) * result.row));
            }
            held = 0u;
            at += to_line;
        }
    }
}
#endif
