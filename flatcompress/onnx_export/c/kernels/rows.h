#if FC_ROWS
/* Rows of real values between codes. Every routine fixes the order of its additions and uses no library, so all boards
 * give the same bits. */
#if FC_ROW_SOFTMAX || FC_ROW_GELU || FC_ROW_SIGMOID || FC_ROW_TANH || FC_ROW_NORM
typedef union {
    float real;
    uint32_t bits;
} fc_bits;
#endif

#if FC_ROW_SOFTMAX || FC_ROW_GELU || FC_ROW_SIGMOID || FC_ROW_TANH
/* e^x: 2^n times the Taylor polynomial of degree 7 of what is left, |r| <= ln 2 / 2; 0 below -87. */
FC_APART float fc_exp(float x)
{
    fc_bits power;
    float limited = (x < 88.0f) ? x : 88.0f, n, r, p;
    if (!(limited > -87.0f)) {
        return 0.0f;
    }
    n = ((limited * 1.44269504f) + FC_MAGIC) - FC_MAGIC;
    r = (limited - (n * 0.693359375f)) + (n * 2.12194440e-4f); /* ln 2 in two parts, the first of few bits */
    p = 1.98412698e-4f;
    p = (p * r) + 1.38888889e-3f;
    p = (p * r) + 8.33333333e-3f;
    p = (p * r) + 4.16666667e-2f;
    p = (p * r) + 1.66666667e-1f;
    p = (p * r) + 0.5f;
    p = (p * r) + 1.0f;
    p = (p * r) + 1.0f;
    power.bits = (uint32_t)((int32_t)n + 127) << 23;
    return p * power.real;
}
#endif

#if FC_ROW_CODES
static void fc_row_codes(const uint8_t *from, float *row, uint32_t count, float scale, int32_t zero)
{
    for (uint32_t i = 0u; i < count; i++) {
        row[i] = (float)((int32_t)from[i] - zero) * scale;
    }
}
#endif

#if FC_ROW_COPY
static void fc_row_copy(const float *from, float *to, uint32_t count)
{
    for (uint32_t i = 0u; i < count; i++) {
        to[i] = from[i];
    }
}
#endif

#if FC_ROW_PRODUCT
/* A row of a product of two tensors of codes; strides in bytes. */
typedef struct {
    uint32_t a, b;
    int32_t a_head, a_row, a_step, b_head, b_column, b_step;
    uint32_t heads, columns, depth;
    float factor;
    uint8_t a_zero, b_zero;
} fc_product;

static void fc_row_product(const fc_product *product, const uint8_t *arena, uint32_t at, float *row)
{
    const int32_t head = (int32_t)(at % product->heads), a_zero = product->a_zero, b_zero = product->b_zero;
    const int32_t a_step = product->a_step, b_step = product->b_step;
    const uint8_t *const a = &arena[product->a] + (head * product->a_head) +
                             ((int32_t)(at / product->heads) * product->a_row);
    const uint8_t *b = &arena[product->b] + (head * product->b_head);
    for (uint32_t column = 0u; column < product->columns; column++) {
        const uint8_t *left = a, *right = b;
        int32_t sum = 0;
        for (uint32_t i = product->depth; i != 0u; i--) {
            sum += ((int32_t)*left - a_zero) * ((int32_t)*right - b_zero);
            left += a_step;
            right += b_step;
        }
        row[column] = (float)sum * product->factor;
        b += product->b_column;
    }
}
#endif

#if FC_ROW_SCALE
static void fc_row_scale(float *row, uint32_t count, float factor)
{
    for (uint32_t i = 0u; i < count; i++) {
        row[i] *= factor;
    }
}
#endif

#if FC_ROW_DIVIDE
static void fc_row_divide(float *row, uint32_t count, float divisor)
{
    for (uint32_t i = 0u; i < count; i++) {
        row[i] /= divisor;
    }
}
#endif

#if FC_ROW_ADD
static void fc_row_add(float *row, const float *other, uint32_t count)
{
    for (uint32_t i = 0u; i < count; i++) {
        row[i] += other[i];
    }
}
#endif

#if FC_ROW_TIMES
static void fc_row_times(float *row, const float *other, uint32_t count)
{
    for (uint32_t i = 0u; i < count; i++) {
        row[i] *= other[i];
    }
}
#endif

#if FC_ROW_NORM
/* A layer norm: less the mean, over the root of the mean square, times weights, plus biases. */
static void fc_row_norm(float *row, uint32_t count, const float *weight, const float *bias, float epsilon)
{
    float mean = 0.0f, square = 0.0f, half, root;
    fc_bits guess;
    for (uint32_t i = 0u; i < count; i++) {
        mean += row[i];
    }
    mean /= (float)count;
    for (uint32_t i = 0u; i < count; i++) {
        row[i] -= mean;
        square += row[i] * row[i];
    }
    guess.real = (square / (float)count) + epsilon;
    half = 0.5f * guess.real;
    guess.bits = 0x5F3759DFu - (guess.bits >> 1); /* one over the root to 4 %, and Newton's steps from there */
    root = guess.real;
    for (uint32_t i = 0u; i < 4u; i++) {
        root *= 1.5f - ((half * root) * root);
    }
    for (uint32_t i = 0u; i < count; i++) {
        row[i] = ((row[i] * root) * weight[i]) + bias[i];
    }
}
#endif

#if FC_ROW_SOFTMAX
static void fc_row_softmax(float *row, uint32_t count)
{
    float most = row[0], sum = 0.0f;
    for (uint32_t i = 1u; i < count; i++) {
        most = (row[i] > most) ? row[i] : most;
    }
    for (uint32_t i = 0u; i < count; i++) {
        row[i] = fc_exp(row[i] - most);
        sum += row[i];
    }
    for (uint32_t i = 0u; i < count; i++) {
        row[i] /= sum;
    }
}
#endif

#if FC_ROW_SIGMOID || FC_ROW_TANH
FC_INLINE float fc_sigmoid(float x)
{
    return 1.0f / (1.0f + fc_exp(-x));
}
#endif

#if FC_ROW_GELU
/* x times the normal distribution, its error function by Abramowitz and Stegun 7.1.26, which is off by 1.5e-7. */
static void fc_row_gelu(float *row, uint32_t count)
{
    for (uint32_t i = 0u; i < count; i++) {
        const float x = row[i], z = ((x < 0.0f) ? -x : x) * 0.707106781f, t = 1.0f / (1.0f + (0.3275911f * z));
        float p = 1.061405429f;
        p = (p * t) - 1.453152027f;
        p = (p * t) + 1.421413741f;
        p = (p * t) - 0.284496736f;
        p = (p * t) + 0.254829592f;
        p = 0.5f * ((p * t) * fc_exp(-(z * z))); /* the tail beyond |x| */
        row[i] = x * ((x < 0.0f) ? p : (1.0f - p));
    }
}
#endif

#if FC_ROW_SIGMOID
static void fc_row_sigmoid(float *row, uint32_t count, uint32_t times)
{
    for (uint32_t i = 0u; i < count; i++) {
        row[i] = fc_sigmoid(row[i]) * ((times != 0u) ? row[i] : 1.0f);
    }
}
#endif

#if FC_ROW_TANH
/* gelu: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as torch's approximation; else the tangent itself. */
static void fc_row_tanh(float *row, uint32_t count, uint32_t gelu)
{
    for (uint32_t i = 0u; i < count; i++) {
        const float x = row[i], inner = 0.797884561f * (x + (0.044715f * ((x * x) * x)));
        row[i] = (gelu != 0u) ? (x * fc_sigmoid(2.0f * inner)) : ((2.0f * fc_sigmoid(2.0f * x)) - 1.0f);
    }
}
#endif

#if FC_ROW_RELU
static void fc_row_relu(float *row, uint32_t count)
{
    for (uint32_t i = 0u; i < count; i++) {
        row[i] = (row[i] > 0.0f) ? row[i] : 0.0f;
    }
}
#endif

#if FC_ROW_HARD
static void fc_row_hard(float *row, uint32_t count, uint32_t times)
{
    for (uint32_t i = 0u; i < count; i++) {
        float gate = row[i] + 3.0f;
        gate = (gate > 0.0f) ? gate : 0.0f;
        gate = ((gate < 6.0f) ? gate : 6.0f) / 6.0f;
        row[i] = (times != 0u) ? (row[i] * gate) : gate;
    }
}
#endif

#if FC_ROW_PLANES
static void fc_row_planes(const float *row, float *to, uint32_t count, uint32_t stride)
{
    for (uint32_t i = 0u; i < count; i++) {
        *to = row[i];
        to += stride;
    }
}
#endif

#if FC_ROW_QUANTIZE
static void fc_row_quantize(const float *row, uint8_t *to, uint32_t count, float scale, int32_t low, int32_t high,
                            int32_t zero)
{ /* of rows that are in steps already, the scale is 1 */
    for (uint32_t i = 0u; i < count; i++) {
        to[i] = (uint8_t)(fc_round(row[i] / scale, (float)(low - zero), (float)(high - zero)) + zero);
    }
}
#endif
#endif

#if FC_GATE
/* Codes times codes; strides are of a pixel and of a channel. */
typedef struct {
    uint32_t a, b, target, pixels, channels;
    int32_t a_pixel, a_channel, b_pixel, b_channel;
    float factor;
    uint8_t a_zero, b_zero, zero, low, high;
} fc_gate;

static void fc_gates(const fc_gate *gate, uint8_t *arena)
{
    uint8_t *to = &arena[gate->target];
    for (uint32_t pixel = 0u; pixel < gate->pixels; pixel++) {
        const uint8_t *a = &arena[gate->a] + ((int32_t)pixel * gate->a_pixel);
        const uint8_t *b = &arena[gate->b] + ((int32_t)pixel * gate->b_pixel);
        for (uint32_t channel = 0u; channel < gate->channels; channel++) {
            const int32_t product = ((int32_t)*a - (int32_t)gate->a_zero) * ((int32_t)*b - (int32_t)gate->b_zero);
            const int32_t code = fc_round((float)product * gate->factor, -512.0f, 512.0f) + (int32_t)gate->zero;
            *to = (uint8_t)fc_clamp(code, (int32_t)gate->low, (int32_t)gate->high);
            to++;
            a += gate->a_channel;
            b += gate->b_channel;
        }
    }
}
#endif

#if FC_MOVE
/* Bytes in another order: up to six loops, the innermost last. */
typedef struct {
    uint32_t source, target;
    uint32_t sizes[6];
    int32_t strides[6];
} fc_loops;

static void fc_move(const fc_loops *loops, uint8_t *arena)
{
    uint32_t at[6] = {0u, 0u, 0u, 0u, 0u, 0u}, from = loops->source, depth;
    uint8_t *to = &arena[loops->target];
    do {
        for (uint32_t i = 0u; i < loops->sizes[5]; i++) {
            *to = arena[from];
            to++;
            from += (uint32_t)loops->strides[5];
        }
        from -= loops->sizes[5] * (uint32_t)loops->strides[5];
        depth = 5u;
        while (depth != 0u) { /* on in the loop around it; of one that is done, back to its start */
            depth--;
            from += (uint32_t)loops->strides[depth];
            at[depth]++;
            if (at[depth] < loops->sizes[depth]) {
                break;
            }
            from -= loops->sizes[depth] * (uint32_t)loops->strides[depth];
            at[depth] = 0u;
        }
    } while ((depth != 0u) || (at[0] != 0u));
}
#endif
