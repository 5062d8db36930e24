#if FC_QUANTIZE
/* Real values [channels, pixels] to bytes [pixels, channels]. */
static void fc_quantize(const float *from, uint8_t *to, uint32_t pixels, uint32_t channels, float scale, int32_t low,
                        int32_t high, int32_t zero FC_PACKED_PARAMETER)
{
    for (uint32_t channel = 0u; channel < channels; channel++) {
        uint8_t *at = to;
        for (uint32_t pixel = 0u; pixel < pixels; pixel++) {
            const int32_t code = fc_round(*from / scale, (float)(low - zero), (float)(high - zero)) + zero;
            fc_store(at, channel, FC_PACK(packed, FC_SOURCE), (uint32_t)code);
            at += fc_pixel(channels, FC_PACK(packed, FC_SOURCE));
            from++;
        }
    }
}
#endif

#if FC_DEQUANTIZE
static void fc_dequantize(const uint8_t *from, float *to, uint32_t pixels, uint32_t channels, float scale, int32_t zero)
{
    for (uint32_t channel = 0u; channel < channels; channel++) {
        const uint8_t *at = &from[channel];
        for (uint32_t pixel = 0u; pixel < pixels; pixel++) {
            *to = (float)((int32_t)*at - zero) * scale;
            at += channels;
            to++;
        }
    }
}
#endif

#if FC_ADD
static void fc_addition(const fc_add *add, uint8_t *arena)
{
    for (uint32_t i = 0u; i < add->count; i++) {
        const uint32_t a = fc_code(&arena[add->a], i, FC_PACK(add->packed, FC_SOURCE));
        const uint32_t b = fc_code(&arena[add->b], i, FC_PACK(add->packed, FC_OTHER));
        const uint32_t code = (uint32_t)fc_sum(add, (int32_t)a, (int32_t)b);
        fc_store(&arena[add->target], i, FC_PACK(add->packed, FC_TARGET), code);
    }
}
#endif

#if FC_POOL
/* The mean of each channel: its sum is requantized like a convolution's. */
typedef struct {
    int64_t offset;
    uint32_t source, target, pixels, channels;
    int32_t multiplier, start; /* start: of a sum, minus the zero points of all pixels */
    float factor;
    uint8_t shift, low, high, zero, floats;
#if FC_PACKED
    uint8_t packed;
#endif
} fc_mean;

static void fc_pool(const fc_mean *mean, uint8_t *arena)
{
    for (uint32_t channel = 0u; channel < mean->channels; channel++) {
        const uint8_t *from = &arena[mean->source];
        int32_t sum = mean->start, code;
        for (uint32_t pixel = 0u; pixel < mean->pixels; pixel++) {
            sum += (int32_t)fc_code(from, channel, FC_PACK(mean->packed, FC_SOURCE));
            from += fc_pixel(mean->channels, FC_PACK(mean->packed, FC_SOURCE));
        }
#if FC_FLOATS
        if (mean->floats != 0u) {
            code = fc_round((float)sum * mean->factor, -512.0f, 512.0f) + (int32_t)mean->zero;
        } else
#endif
        {
            code = (int32_t)((mean->offset + ((int64_t)sum * mean->multiplier)) >> 32) >> mean->shift;
        }
        code = fc_clamp(code, (int32_t)mean->low, (int32_t)mean->high);
        fc_store(&arena[mean->target], channel, FC_PACK(mean->packed, FC_TARGET), (uint32_t)code);
    }
}
#endif

#if FC_MAX
typedef struct {
    uint32_t source, target;
    uint16_t in_h, in_w, channels, out_h, out_w;
    uint8_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_t, pad_l;
#if FC_PACKED
    uint8_t packed;
#endif
} fc_window;

static void fc_max_pool(const fc_window *window, uint8_t *arena)
{
    const uint32_t packed = FC_PACK(window->packed, FC_SOURCE), depth = fc_pixel(window->channels, packed);
    const uint32_t wanted = FC_PACK(window->packed, FC_TARGET);
    uint8_t *to = &arena[window->target];
    for (uint32_t pixel = 0u; pixel < ((uint32_t)window->out_h * window->out_w); pixel++) {
        const int32_t top = (int32_t)((pixel / window->out_w) * window->stride_h) - (int32_t)window->pad_t;
        const int32_t left = (int32_t)((pixel % window->out_w) * window->stride_w) - (int32_t)window->pad_l;
        for (uint32_t channel = 0u; channel < window->channels; channel++) {
            uint32_t most = 0u;
            for (uint32_t tap = 0u; tap < ((uint32_t)window->kernel_h * window->kernel_w); tap++) {
                const int32_t y = top + (int32_t)((tap / window->kernel_w) * window->dilation_h);
                const int32_t x = left + (int32_t)((tap % window->kernel_w) * window->dilation_w);
                if ((y >= 0) && (y < (int32_t)window->in_h) && (x >= 0) && (x < (int32_t)window->in_w)) {
                    const uint32_t place = (((uint32_t)y * window->in_w) + (uint32_t)x) * depth;
                    const uint32_t value = fc_code(&arena[window->source + place], channel, packed);
                    most = (value > most) ? value : most;
                }
            }
            fc_store(to, channel, wanted, most);
        }
        to += fc_pixel(window->channels, wanted);
    }
}
#endif

#if FC_TABLE
static void fc_table(const uint8_t *table, const uint8_t *from, uint8_t *to, uint32_t count FC_PACKED_PARAMETER)
{
    for (uint32_t i = 0u; i < count; i++) {
        const uint32_t code = table[fc_code(from, i, FC_PACK(packed, FC_SOURCE))];
        fc_store(to, i, FC_PACK(packed, FC_TARGET), code);
    }
}
#endif

#if FC_CONCAT
/* One operand's channels into their place in every pixel. */
static void fc_concat(const uint8_t *from, uint8_t *to, uint32_t pixels, uint32_t channels, uint32_t first,
                      uint32_t stride FC_PACKED_PARAMETER)
{
    for (uint32_t pixel = 0u; pixel < pixels; pixel++) {
        for (uint32_t channel = 0u; channel < channels; channel++) {
            const uint32_t code = fc_code(from, channel, FC_PACK(packed, FC_SOURCE));
            fc_store(to, first + channel, FC_PACK(packed, FC_TARGET), code);
        }
        from += fc_pixel(channels, FC_PACK(packed, FC_SOURCE));
        to += stride;
    }
}
#endif
