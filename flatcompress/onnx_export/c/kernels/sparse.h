#if FC_SPARSE
/* A convolution that skips zeros. Weights are one stream of entries, a gap and a digit each, through all channels;
 * eight pixels share the decoding of one, their inputs in pairs in the halves of four words. Where every sum of a row
 * fits 16 bits (known when this was written) one multiplication serves two pixels. */
FC_INLINE void fc_pair(const fc_layer *layer, const uint8_t *a, uint32_t step_a, const uint8_t *b, uint32_t step_b,
                       uint32_t *to)
{
    for (uint32_t i = layer->in_c; i != 0u; i--) {
        *to = (uint32_t)*a | ((uint32_t)*b << 16);
        to += 4;
        a += step_a;
        b += step_b;
    }
}

/* The inputs of eight pixels, `count` of them real; the others repeat the last. */
static void fc_columns(const fc_layer *layer, const uint8_t *source, uint32_t pixel, uint32_t count, uint32_t *patch)
{
    for (uint32_t pair = 0u; pair < 4u; pair++) {
        uint32_t *to = &patch[pair];
        int32_t top[2], left[2];
        for (uint32_t i = 0u; i < 2u; i++) {
            const uint32_t each = (2u * pair) + i;
            const uint32_t at = pixel + ((each < count) ? each : (count - 1u));
            top[i] = (int32_t)((at / layer->out_w) * layer->stride_h) - (int32_t)layer->pad_t;
            left[i] = (int32_t)((at % layer->out_w) * layer->stride_w) - (int32_t)layer->pad_l;
        }
        for (uint32_t ky = 0u; ky < layer->kernel_h; ky++) {
            for (uint32_t kx = 0u; kx < layer->kernel_w; kx++) {
                const uint8_t *from[2];
                uint32_t step[2];
                for (uint32_t i = 0u; i < 2u; i++) {
                    const int32_t row = top[i] + (int32_t)(ky * layer->dilation_h);
                    const int32_t column = left[i] + (int32_t)(kx * layer->dilation_w);
                    if ((row >= 0) && (row < (int32_t)layer->in_h) && (column >= 0) &&
                        (column < (int32_t)layer->in_w)) {
                        from[i] = &source[(((uint32_t)row * layer->in_w) + (uint32_t)column) * layer->in_c];
                        step[i] = 1u;
                    } else {
                        from[i] = &layer->in_zero;
                        step[i] = 0u;
                    }
                }
                if ((step[0] & step[1]) != 0u) {
                    fc_pair(layer, from[0], 1u, from[1], 1u, to);
                } else {
                    fc_pair(layer, from[0], step[0], from[1], step[1], to);
                }
                to += 4u * layer->in_c;
            }
        }
    }
}

/* The products of one channel for eight pixels. `state` is where the stream stands: the tap of the next entry, which
 * lies beyond the row when the row is done. */
typedef struct {
    const uint8_t *next;
    uint32_t buffer, held, tap, digit;
} fc_entries;

FC_INLINE void fc_entry(fc_entries *state, uint32_t gap, uint32_t width)
{
    uint32_t entry;
    while (state->held < width) {
        state->buffer |= (uint32_t)*state->next << state->held;
        state->next++;
        state->held += 8u;
    }
    entry = state->buffer & ((1u << width) - 1u);
    state->buffer >>= width;
    state->held -= width;
    state->tap += (entry & ((1u << gap) - 1u)) + 1u;
    state->digit = entry >> gap;
}

#if FC_SPARSE_BYTES || FC_SPARSE_BITS
/* Sums of two pixels in a word to sums of each: the low half is signed, and what it borrowed goes back. */
FC_INLINE void fc_apart(uint32_t both, uint32_t *sums)
{
    const uint32_t low = ((both ^ 0x8000u) & 0xFFFFu) - 0x8000u;
    sums[0] = low;
    sums[1] = (uint32_t)((int32_t)(both - low) >> 16);
}
#endif

#if FC_SPARSE_BYTES
/* Entries of one byte: a weight of four bits, signed, in the lower half, the gap in the upper, where it counts the 16
 * bytes that a tap has in the patch. */
FC_APART void fc_bytes(const uint32_t *patch, const uint32_t *end, fc_entries *state, uint32_t *sums)
{
    const uint8_t *next = state->next;
    const uint32_t *at = &patch[4u * state->tap];
    uint32_t entry = state->digit, s0 = 0u, s1 = 0u, s2 = 0u, s3 = 0u;
    while (at < end) {
        const uint32_t weight = (uint32_t)((int32_t)(entry << 28) >> 28);
        uint32_t a, b, c, d;
        FC_LOAD2(a, b, at);
        FC_LOAD2(c, d, at);
        s0 += weight * a;
        s1 += weight * b;
        s2 += weight * c;
        s3 += weight * d;
        entry = *next;
        next++;
        at += (entry >> 4) * 4u;
    }
    state->next = next;
    state->digit = entry;
    state->tap = (uint32_t)(at - end) / 4u;
    fc_apart(s0, &sums[0]);
    fc_apart(s1, &sums[2]);
    fc_apart(s2, &sums[4]);
    fc_apart(s3, &sums[6]);
}
#endif

#if FC_SPARSE_BITS
FC_APART void fc_pairs(const fc_layer *layer, const uint32_t *patch, fc_entries *shared, uint32_t *sums)
{
    const uint32_t taps = layer->taps, gap = layer->gap, width = gap + layer->bits;
    const int32_t lowest = layer->lowest;
    fc_entries state = *shared;
    uint32_t s0 = 0u, s1 = 0u, s2 = 0u, s3 = 0u;
    while (state.tap < taps) {
        const uint32_t *const at = &patch[4u * state.tap];
        const uint32_t weight = (uint32_t)((int32_t)state.digit + lowest);
        s0 += weight * at[0];
        s1 += weight * at[1];
        s2 += weight * at[2];
        s3 += weight * at[3];
        fc_entry(&state, gap, width);
    }
    state.tap -= taps;
    *shared = state;
    fc_apart(s0, &sums[0]);
    fc_apart(s1, &sums[2]);
    fc_apart(s2, &sums[4]);
    fc_apart(s3, &sums[6]);
}
#endif

#if FC_SPARSE_WIDE
#define FC_LOW(word) ((int32_t)(int16_t)(uint16_t)((word) & 0xFFFFu)) /* inputs are bytes: this is SMLABB */
#define FC_HIGH(word) ((int32_t)(word) >> 16)

FC_APART void fc_singles(const fc_layer *layer, const uint32_t *patch, fc_entries *shared, uint32_t *sums)
{
    const uint32_t taps = layer->taps, gap = layer->gap, width = gap + layer->bits;
    const int32_t lowest = layer->lowest;
    fc_entries state = *shared;
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
    while (state.tap < taps) {
        const uint32_t *at = &patch[4u * state.tap];
        const int32_t weight = (int16_t)((int32_t)state.digit + lowest);
        uint32_t a, b;
        FC_LOAD2(a, b, at);
        s0 += weight * FC_LOW(a);
        s1 += weight * FC_HIGH(a);
        s2 += weight * FC_LOW(b);
        s3 += weight * FC_HIGH(b);
        FC_LOAD2(a, b, at);
        s4 += weight * FC_LOW(a);
        s5 += weight * FC_HIGH(a);
        s6 += weight * FC_LOW(b);
        s7 += weight * FC_HIGH(b);
        fc_entry(&state, gap, width);
    }
    state.tap -= taps;
    *shared = state;
    sums[0] = (uint32_t)s0;
    sums[1] = (uint32_t)s1;
    sums[2] = (uint32_t)s2;
    sums[3] = (uint32_t)s3;
    sums[4] = (uint32_t)s4;
    sums[5] = (uint32_t)s5;
    sums[6] = (uint32_t)s6;
    sums[7] = (uint32_t)s7;
}
#endif

FC_INLINE void fc_row_sums(const fc_layer *layer, const uint32_t *patch, fc_entries *state, uint32_t *sums)
{
#if FC_SPARSE_WIDE
    if (layer->pairs == 0u) {
        fc_singles(layer, patch, state, sums);
        return;
    }
#endif
#if FC_SPARSE_BYTES
    if (layer->pairs == 2u) {
        fc_bytes(patch, &patch[4u * layer->taps], state, sums);
        return;
    }
#endif
#if FC_SPARSE_BITS
    fc_pairs(layer, patch, state, sums);
#endif
}

/* The sums of up to eight pixels in one channel to codes, the plain way. */
FC_APART void fc_plain_row(const fc_result *result, const uint32_t *sums, uint32_t count, int32_t bias,
                           int32_t multiplier, uint8_t *to)
{
    const int64_t offset = result->offset;
    const int32_t low = result->low, high = result->high, scale = result->scale;
    const uint32_t shift = result->shift, stride = result->stride;
    for (; count != 0u; count--) {
        const int32_t sum = ((int32_t)*sums * scale) + bias;
        *to = (uint8_t)fc_clamp((int32_t)((offset + ((int64_t)sum * multiplier)) >> 32) >> shift, low, high);
        sums++;
        to += stride;
    }
}

static void fc_sparse(const fc_layer *layer, uint8_t *arena, float *real FC_RANGE_PARAMETERS)
{
#if !FC_RANGE
    const uint32_t first = 0u, pixels = (uint32_t)layer->out_h * layer->out_w;
#endif
    const uint32_t width = (uint32_t)layer->gap + layer->bits;
    uint32_t *const patch = (uint32_t *)(void *)&arena[layer->scratch];
    fc_result result = {layer->offset, layer->low, layer->high, layer->shift, layer->out_c, 0, {0, 0}};
#if FC_FUSED || FC_REALS || FC_FLOATS
    const uint32_t plain = ((layer->kind == FC_CODES) && (layer->add == NULL)) ? 1u : 0u;
#else
    (void)real;
#endif
    result.scale = (int32_t)(1ul << layer->headroom);
    for (uint32_t pixel = 0u; pixel < pixels; pixel += 8u) {
        const uint32_t count = ((pixel + 8u) <= pixels) ? 8u : (pixels - pixel);
        fc_entries state = {(const uint8_t *)layer->weight, 0u, 0u, 0xFFFFFFFFu, 0u};
        fc_columns(layer, &arena[layer->source], first + pixel, count, patch);
#if FC_SPARSE_BYTES
        if (layer->pairs == 2u) {
            state.digit = *state.next;
            state.next++;
            state.tap = state.digit >> 4;
        } else
#endif
        {
            fc_entry(&state, layer->gap, width);
        }
        for (uint32_t channel = 0u; channel < layer->out_c; channel++) {
            const int32_t bias = fc_bias(layer, channel);
            uint32_t sums[8];
            fc_row_sums(layer, patch, &state, sums);
#if FC_FUSED || FC_REALS || FC_FLOATS
            if (plain == 0u) {
                for (uint32_t i = 0u; i < count; i++) {
                    fc_finish(layer, arena, real, ((int32_t)sums[i] * result.scale) + bias, pixel + i, channel);
                }
                continue;
            }
#endif
            fc_plain_row(&result, sums, count, bias, fc_multiplier(layer, channel),
                         &arena[layer->target + (pixel * layer->out_c) + channel]);
        }
    }
}
#endif
