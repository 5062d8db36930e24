#if FC_SPARSE || FC_SPARSE_LINE
/* Layers that skip zeros. Weights are one stream of entries through all channels: how far the next weight lies from the
 * last one, and the weight. Forms of the stream: */
#define FC_WIDE 0u  /* weights of 8 bits, and after every other one a byte of two distances of four bits */
#define FC_WORDS 1u /* words of entries of gap + bits bits, the first in the lowest; none is 0, as distances are not */
#define FC_BYTES 2u /* bytes: a signed weight of four bits, and above it the distance */

typedef struct {
    const uint8_t *next;
    uint32_t entry, carry; /* entry: what is decoded; carry: where its weight lies, from the end of the last row */
    uint32_t held;         /* WIDE: distances, a 1 above the last */
} fc_entries;

#if FC_SPARSE_WORDS
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

/* The first entry; step: from one weight's input to the next one's. */
static fc_entries fc_first(const fc_layer *layer, uint32_t step)
{
    fc_entries state = {(const uint8_t *)layer->weight, 0u, 0u, 0x10u};
    uint32_t distance = 0u;
#if FC_SPARSE_BYTES
    if (layer->form == FC_BYTES) {
        state.entry = *state.next;
        state.next++;
        distance = state.entry >> 4;
    }
#endif
#if FC_SPARSE_WORDS
    if (layer->form == FC_WORDS) {
        state.entry = *(const uint32_t *)layer->weight;
        state.next += 4;
        distance = state.entry & ((1u << layer->gap) - 1u);
    }
#endif
#if FC_SPARSE_WIDE
    if (layer->form == FC_WIDE) {
        int32_t weight;
        FC_NEXT_WIDE(weight, state.held, state.next);
        state.entry = (uint32_t)weight;
        distance = state.held & 15u;
    }
#endif
    state.carry = (distance - 1u) * step;
    return state;
}
#endif

#if FC_SPARSE
/* Sixteen pixels share the decoding of an entry, eight columns of two lines, or four columns of wide ones. The inputs of
 * two lines lie in the halves of a word, [tap line, channel, column], columns sorted by stride so that neighbours lie
 * side by side. Where every sum fits 16 bits (known when this was written; `split`: of each part of a row) one product
 * serves both lines. */
typedef struct {
    const uint8_t *base;
    const uint32_t *parts, *last; /* where each part of a row begins */
    uint32_t length, step;        /* of a part, and from weight to weight, in bytes */
} fc_walk;

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
    fc_apart(s0, &sums[0]);                                                                                            \
    fc_apart(s1, &sums[2]);                                                                                            \
    fc_apart(s2, &sums[4]);                                                                                            \
    fc_apart(s3, &sums[6]);                                                                                            \
    fc_apart(s4, &sums[8]);                                                                                            \
    fc_apart(s5, &sums[10]);                                                                                           \
    fc_apart(s6, &sums[12]);                                                                                           \
    fc_apart(s7, &sums[14]);

#if FC_SPARSE_BYTES
FC_APART void fc_bytes(const fc_walk *walk, fc_entries *state, int32_t *sums)
{
    const uint8_t *next = state->next;
    const uint32_t step = walk->step;
    uint32_t entry = state->entry, carry = state->carry;
    uint32_t s0 = 0u, s1 = 0u, s2 = 0u, s3 = 0u, s4 = 0u, s5 = 0u, s6 = 0u, s7 = 0u;
    for (const uint32_t *part = walk->parts; part != walk->last; part++) {
        const uint8_t *at = &walk->base[*part];
        const uint8_t *const end = &at[walk->length];
        at += carry;
        while (at < end) {
            const uint32_t weight = (uint32_t)((int32_t)(entry << 28) >> 28);
            FC_EIGHT(weight)
            entry = *next;
            next++;
            at += (entry >> 4) * step;
        }
        carry = (uint32_t)(at - end);
    }
    state->next = next;
    state->entry = entry;
    state->carry = carry;
    FC_ALL_APART
}
#endif

#if FC_SPARSE_WORDS
FC_APART void fc_words(const fc_walk *walk, fc_entries *state, int32_t *sums, const fc_layer *layer)
{
    const uint8_t *next = state->next;
    const uint32_t step = walk->step, gap = layer->gap, width = gap + layer->bits;
    const uint32_t gaps = (1u << gap) - 1u, digits = (1u << width) - 1u - gaps;
    const int32_t least = layer->lowest;
    const uint32_t lowest = (uint32_t)least;
    uint32_t word = state->entry, carry = state->carry;
    uint32_t s0 = 0u, s1 = 0u, s2 = 0u, s3 = 0u, s4 = 0u, s5 = 0u, s6 = 0u, s7 = 0u;
    for (const uint32_t *part = walk->parts; part != walk->last; part++) {
        const uint8_t *at = &walk->base[*part];
        const uint8_t *const end = &at[walk->length];
        at += carry;
        while (at < end) {
            const uint32_t weight = ((word & digits) >> gap) + lowest;
            FC_EIGHT(weight)
            FC_NEXT_WORD(word, next, width);
            at += (word & gaps) * step;
        }
        carry = (uint32_t)(at - end);
    }
    state->next = next;
    state->entry = word;
    state->carry = carry;
    FC_ALL_APART
}
#endif

#if FC_SPARSE_WIDE
FC_APART void fc_wide(const fc_walk *walk, fc_entries *state, int32_t *sums)
{
    const uint8_t *next = state->next;
    const uint32_t step = walk->step;
    uint32_t held = state->held, carry = state->carry;
    int32_t weight = (int32_t)state->entry, s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
    for (const uint32_t *part = walk->parts; part != walk->last; part++) {
        const uint8_t *at = &walk->base[*part];
        const uint8_t *const end = &at[walk->length];
        at += carry;
        while (at < end) {
            uint32_t a, b;
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
        }
        carry = (uint32_t)(at - end);
    }
    state->next = next;
    state->entry = (uint32_t)weight;
    state->held = held;
    state->carry = carry;
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
FC_INLINE void fc_sums(const fc_layer *layer, fc_walk *walk, fc_entries *state, int32_t *sums)
{
#if FC_SPARSE_WIDE
    if (layer->form == FC_WIDE) {
        fc_wide(walk, state, sums);
        return;
    }
#endif
#if FC_SPLIT
    const uint32_t *const first = walk->parts, *const last = walk->last;
    for (uint32_t i = 0u; i < 16u; i++) {
        sums[i] = 0;
    }
    walk->last = (layer->split != 0u) ? &first[1] : last;
    while (walk->parts != last) {
#endif
#if FC_SPARSE_BYTES
    if (layer->form == FC_BYTES) {
        fc_bytes(walk, state, sums);
    }
#endif
#if FC_SPARSE_WORDS
    if (layer->form == FC_WORDS) {
        fc_words(walk, state, sums, layer);
    }
#endif
#if FC_SPLIT
        walk->parts = walk->last;
        walk->last++;
    }
    walk->parts = first;
    walk->last = last;
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

/* The inputs of the lines y and y + 1, which are all read before one is written; zeros outside of the image. */
FC_APART void fc_gather(const fc_layer *layer, const uint8_t *source, uint32_t y, uint32_t *patch)
{
    const uint32_t words = layer->words, apart = words / layer->stride_w, depth = layer->in_c;
    const uint32_t columns = ((layer->out_w - 1u) * layer->stride_w) + ((layer->kernel_w - 1u) * FC_DILATION_W(layer)) + 1u;
    const int32_t last = (int32_t)layer->in_h - 1;
    int32_t row = (int32_t)(y * layer->stride_h) - (int32_t)layer->pad_t;
    for (uint32_t ky = 0u; ky < layer->kernel_h; ky++) {
        uint32_t *to = patch, phase = 0u, wide[2];
        const uint8_t *line[2];
        for (uint32_t i = 0u; i < 2u; i++) {
            const int32_t here = row + (int32_t)(i * layer->stride_h);
            const uint32_t inside = ((here >= 0) && (here <= last)) ? 1u : 0u;
            line[i] = (inside != 0u) ? &source[(uint32_t)here * layer->in_w * depth] : source;
            wide[i] = (inside == 0u) ? 0u : (layer->in_w - ((here == last) ? (uint32_t)layer->absent : 0u));
        }
        for (uint32_t column = 0u; column < columns; column++) {
            const uint32_t x = column - layer->pad_l; /* far beyond the image where it is negative */
            const uint32_t step_a = (x < wide[0]) ? 1u : 0u, step_b = (x < wide[1]) ? 1u : 0u;
            const uint8_t *const a = (step_a != 0u) ? &line[0][x * depth] : &layer->in_zero;
            const uint8_t *const b = (step_b != 0u) ? &line[1][x * depth] : &layer->in_zero;
            fc_pair(a, step_a, b, step_b, &to[phase], words, depth);
            phase += apart;
            if (phase == words) {
                phase = 0u;
                to++;
            }
        }
        patch += words * depth;
        row += (int32_t)FC_DILATION_H(layer);
    }
}

static void fc_sparse(const fc_layer *layer, uint8_t *arena, float *real FC_RANGE_PARAMETERS)
{
    const uint32_t width = layer->out_w, words = layer->words, line = width * layer->out_c, split = layer->split;
    const uint32_t once = (layer->form == FC_WIDE) ? 4u : 8u;
    const uint32_t length = (4u * layer->kernel_h * layer->in_c * words) / split;
    uint32_t *const parts = (uint32_t *)(void *)&arena[layer->scratch];
    uint32_t *const patch = &parts[layer->kernel_w * split];
    const fc_walk walk = {(const uint8_t *)patch, parts, patch, length, 4u * words};
    fc_result result = fc_into(layer, arena, real);
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
    result.stride = layer->out_c;
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
            fc_entries state = fc_first(layer, 4u * words);
            fc_walk here_walk = walk;
            here_walk.base = (const uint8_t *)&patch[x];
            for (uint32_t channel = 0u; channel < layer->out_c; channel++) {
                int32_t sums[16];
                const uint32_t place_of = at + (x * layer->out_c) + channel;
                fc_sums(layer, &here_walk, &state, sums);
                if (both != 0u) {
                    result.row = line;
                    fc_put(&result, sums, both, channel, place_of);
                }
                if (both != most) { /* columns of the upper line alone */
                    result.row = 0u;
                    fc_put(&result, &sums[2u * both], most - both, channel, place_of + (both * layer->out_c));
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
/* A linear layer's sparse rows, one input vector, read where it lies. */
static void fc_sparse_line(const fc_layer *layer, uint8_t *arena, float *real FC_RANGE_PARAMETERS)
{
    const uint8_t *const source = &arena[layer->source], *const end = &source[layer->taps];
    const uint8_t *at;
    fc_result result = fc_into(layer, arena, real);
    fc_entries state = fc_first(layer, 1u);
    result.row = 0u;
#if FC_RANGE
    (void)first;
    (void)pixels;
#endif
    at = &source[state.carry];
    for (uint32_t channel = 0u; channel < layer->out_c; channel++) {
        const uint8_t *next = state.next;
        uint32_t entry = state.entry;
        int32_t sums[2] = {0, 0}, sum = 0;
#if FC_SPARSE_BYTES
        if (layer->form == FC_BYTES) {
            while (at < end) {
                sum += ((int32_t)(entry << 28) >> 28) * (int32_t)*at;
                entry = *next;
                next++;
                at += entry >> 4;
            }
        }
#endif
#if FC_SPARSE_WORDS
        if (layer->form == FC_WORDS) {
            const uint32_t gap = layer->gap, width = gap + layer->bits, gaps = (1u << gap) - 1u;
            const uint32_t digits = (1u << width) - 1u - gaps;
            while (at < end) {
                sum += ((int32_t)((entry & digits) >> gap) + layer->lowest) * (int32_t)*at;
                FC_NEXT_WORD(entry, next, width);
                at += entry & gaps;
            }
        }
#endif
#if FC_SPARSE_WIDE
        if (layer->form == FC_WIDE) {
            int32_t weight = (int32_t)entry;
            while (at < end) {
                sum += weight * (int32_t)*at;
                FC_NEXT_WIDE(weight, state.held, next);
                at += state.held & 15u;
            }
            entry = (uint32_t)weight;
        }
#endif
        state.next = next;
        state.entry = entry;
        sums[0] = sum;
        fc_put(&result, sums, 1u, channel, channel);
        at = &source[at - end];
    }
}
#endif
