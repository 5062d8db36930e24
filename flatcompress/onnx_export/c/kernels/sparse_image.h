#if FC_SPARSE
#if FC_DEEP
/* All channels of two pixels into the halves of words, `step` words apart. Of a step of 0 a pixel is one code. */
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
#endif

#if FC_RUNS
/* Two lines of a channel into the halves of words. mask: of a code, in both halves; up: of packed ones, where it lies. */
FC_INLINE void fc_pairs(const uint8_t *a, uint32_t next_a, const uint8_t *b, uint32_t next_b, uint32_t *to, uint32_t count,
                        uint32_t up, uint32_t mask)
{
#if FC_PACKED
#define FC_BOTH(i) (((((uint32_t)a[(i) * next_a]) | ((uint32_t)b[(i) * next_b] << 16)) >> up) & mask)
#else
#define FC_BOTH(i) ((uint32_t)a[(i) * next_a] | ((uint32_t)b[(i) * next_b] << 16))
    (void)up;
    (void)mask;
#endif
    const uint32_t *const end = &to[count];
    if ((count & 1u) != 0u) {
        *to = FC_BOTH(0u);
        to++;
        a += next_a;
        b += next_b;
    }
    while (to != end) {
        const uint32_t first = FC_BOTH(0u), second = FC_BOTH(1u);
        to[0] = first;
        to[1] = second;
        to += 2;
        a += 2u * next_a;
        b += 2u * next_b;
    }
}

#endif

/* The inputs of the lines y and y + 1, which are all read before one is written; zeros outside of the image. */
FC_APART void fc_gather(const fc_layer *layer, const uint8_t *source, uint32_t y, uint32_t *patch)
{
    const uint32_t words = layer->words, stride = layer->stride_w, apart = words / stride, depth = layer->in_c;
    const uint32_t packed = FC_PACK(layer->packed, FC_SOURCE), pixel = fc_pixel(depth, packed);
#if FC_RUNS
    const uint32_t mask = (packed != 0u) ? 0x000F000Fu : 0x00FF00FFu;
#endif
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
        uint32_t wide[2], column = 0u, run;
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
#if FC_DEEP
            if ((FC_RUNS == 0) || ((packed == 0u) && (depth >= 4u))) { /* pixel by pixel, four channels at a time */
                uint32_t *to = &patch[column / stride], phase = (column % stride) * apart;
                column += run;
                do {
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
                continue;
            }
#endif
#if FC_RUNS
            for (uint32_t i = 0u; (i < stride) && (i < run); i++) { /* every stride-th column lies side by side */
                const uint32_t place = column + i, count = (run - i + stride - 1u) / stride;
                uint32_t *to = &patch[((place % stride) * apart) + (place / stride)];
                const uint8_t *from_a = a, *from_b = b;
                for (uint32_t channel = 0u; channel < depth; channel++) {
                    const uint32_t onward = ((channel & packed) == packed) ? 1u : 0u;
                    fc_pairs(from_a, stride * next_a, from_b, stride * next_b, to, count, 4u * (channel & packed), mask);
                    from_a += step_a & onward;
                    from_b += step_b & onward;
                    to += words;
                }
                a += next_a;
                b += next_b;
            }
            column += run;
#endif
        } while (column != columns);
        patch += words * depth;
        row += (int32_t)FC_DILATION_H(layer);
    }
}

#if FC_WHOLE
/* All taps of a group of columns one after the other, so that a row has one part. */
FC_INLINE void fc_together(const fc_layer *layer, const uint32_t *parts, const uint32_t *lines, uint32_t *to, uint32_t once)
{
    typedef struct {
        uint32_t words[4];
    } four;
    for (uint32_t kx = 0u; kx < layer->kernel_w; kx++) {
        const uint32_t *from = &lines[parts[kx] / 4u];
        for (uint32_t i = (uint32_t)layer->kernel_h * layer->in_c; i != 0u; i--) {
            for (uint32_t column = 0u; column < once; column += 4u) {
                *(four *)(void *)to = *(const four *)(const void *)&from[column];
                to += 4;
            }
            from += layer->words;
        }
    }
}
#endif

static void fc_sparse(const fc_layer *layer, uint8_t *arena, float *real FC_RANGE_PARAMETERS)
{
    const uint32_t width = layer->out_w, words = layer->words;
    const uint32_t split = (layer->split > 1u) ? layer->split : 1u;
    const uint32_t once = (layer->form == FC_WIDE) ? 4u : 8u;
    const uint32_t length = (4u * layer->kernel_h * layer->in_c * words) / split;
    uint32_t *const parts = (uint32_t *)(void *)&arena[layer->scratch];
    uint32_t *const patch = &parts[layer->kernel_w * split];
    fc_walk walk;
#if FC_WHOLE
    const uint32_t start = 0u, whole = layer->whole, *const begin = (whole != 0u) ? &start : parts;
    const uint32_t *const last = (whole != 0u) ? &begin[1] : patch;
    uint32_t *const together = &patch[layer->kernel_h * layer->in_c * words];
#else
    const uint32_t *const begin = parts, *const last = patch;
#endif
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
#if FC_WHOLE
    if (whole != 0u) {
        walk.length = 4u * layer->taps * once;
        walk.step = 4u * once;
    }
#endif
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
#if FC_WHOLE
            if (whole != 0u) {
                fc_together(layer, parts, &patch[x], together, once);
                walk.base = (const uint8_t *)together;
            }
#endif
            for (uint32_t channel = 0u; channel < layer->out_c; channel++) {
                const uint32_t place_of = at + (x * pixel);
                fc_sums(layer, &walk, begin, last);
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
