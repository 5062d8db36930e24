"""Which kernel a layer gets: dense or sparse, for images or for one vector, by what instructions and bytes it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flatcompress.onnx_export.c import ir, weights

CONV, LINEAR, DEPTHWISE, SPARSE, LINE = "conv", "linear", "depthwise", "sparse", "sparse_line"
# Instructions on an emulated Cortex-M4: a product of the dense kernels; of the sparse ones, where a weight is not zero.
DENSE, ENTRY = 1.2, {weights.WIDE: 3.0, weights.WORDS: 2.2, weights.BYTES: 1.6}
VECTOR, VECTOR_ENTRY = 2.2, {weights.WIDE: 5.4, weights.WORDS: 5.8, weights.BYTES: 6.0}
SMALLER = 0.7  # of the dense bytes: flash that is worth half as many instructions again
FEW = 0.02  # of all products: a layer of so few takes the kernel that is there anyway

COLUMNS = 8  # that the sparse kernel makes at once, of two lines; four of wide sums

Choice = tuple[str, weights.Entries | None]


def flat(step: ir.Conv) -> bool:
    """A pointwise layer, to whose kernel the image is one line of pixels."""
    window = step.window
    return (window.kernel, window.stride, window.pads) == ((1, 1), (1, 1), (0, 0))


def shape(step: ir.Conv) -> tuple[int, int]:
    """Lines and columns of the result as the sparse kernel takes them: a flat image has lines of eight pixels."""
    pixels = step.height * step.width
    return (-(-pixels // COLUMNS), COLUMNS) if flat(step) else (step.height, step.width)


def turns(step: ir.Conv) -> bool:
    """Whether four columns of two lines fill an image much better with its sides exchanged."""

    def groups(lines: int, columns: int) -> int:
        return -(-lines // 2) * -(-columns // (COLUMNS // 2))

    return step.out is not None and not flat(step) and groups(step.width, step.height) < 0.9 * groups(*shape(step))


def choose(convs: Sequence[tuple[ir.Conv, weights.Digits]]) -> list[Choice]:
    """A kernel for every layer, and its stream where that is sparse; sets how many pixels a layer makes at once."""
    chosen = [_alone(step, found) for step, found in convs]
    total = sum(step.macs for step, _ in convs)
    kernels = {kernel for kernel, _ in chosen}
    if SPARSE in kernels:  # the last dense layers, so that no dense kernel is needed
        dense = [i for i, (kernel, _) in enumerate(chosen) if kernel in (CONV, LINEAR, LINE)]
        streams = {i: _entries(*convs[i]) for i in dense}
        few = sum(convs[i][0].macs for i in dense) <= FEW * total
        if few and all(stream is not None for stream in streams.values()):
            chosen = [(SPARSE, streams[i]) if i in streams else choice for i, choice in enumerate(chosen)]
    if CONV in {kernel for kernel, _ in chosen}:
        for i, (kernel, _) in enumerate(chosen):
            if kernel == LINEAR and convs[i][0].macs <= FEW * total:
                chosen[i] = CONV, None
    chosen = _one_gap(convs, chosen)
    for (step, _), (kernel, entries) in zip(convs, chosen):
        at_once = 2 * (COLUMNS if flat(step) else step.width)
        step.pixels = {CONV: 2, SPARSE: at_once}.get(kernel, 1)
        if entries is not None and entries.turned:
            step.pixels = 1  # columns first: the source is needed until the end
    return chosen


def _one_gap(convs: Sequence[tuple[ir.Conv, weights.Digits]], chosen: list[Choice]) -> list[Choice]:
    """Words of one kind in every layer whose weights have the same bits: a constant takes no register."""
    words = {i: made for i, (_, made) in enumerate(chosen) if made is not None and made.form == weights.WORDS}
    for bits in {made.bits for made in words.values()}:
        same = [i for i, made in words.items() if made.bits == bits]
        gaps = {words[i].gap for i in same}
        made = {gap: [_entries(*convs[i], (gap,), chosen[i][0] == LINE) for i in same] for gap in gaps}
        best = min(made, key=lambda gap: (sum(one.stream.nbytes for one in made[gap] if one is not None), gap))
        for i, one in zip(same, made[best]):
            chosen[i] = chosen[i][0], one
    return chosen


def _entries(
    step: ir.Conv, found: weights.Digits, gaps: Iterable[int] = weights.GAPS, rows: bool = False
) -> weights.Entries | None:
    """The stream of a layer that has one."""
    if step.groups > 1:
        return None
    return weights.entries(step, found, step.sources[0].high, gaps, rows)


def dense(steps: Sequence[ir.Conv], bits: Sequence[int]) -> list[str]:
    """The kernel of every layer where none skips zeros. bits: of the digits."""
    chosen = [_dense(step, width) for step, width in zip(steps, bits)]
    total = sum(step.macs for step in steps)
    if CONV in chosen:
        few = [kernel == LINEAR and step.macs <= FEW * total for kernel, step in zip(chosen, steps)]
        chosen = [CONV if one else kernel for kernel, one in zip(chosen, few)]
    return chosen


def _dense(step: ir.Conv, bits: int) -> str:
    if step.depthwise:
        return DEPTHWISE
    return LINEAR if _vector(step) and step.taps % weights.unit(bits) == 0 else CONV


def _vector(step: ir.Conv) -> bool:
    return step.height * step.width == 1 and step.groups == 1 and step.window.kernel == (1, 1)


def _alone(step: ir.Conv, found: weights.Digits) -> Choice:
    """What suits a layer by itself."""
    plain = _dense(step, found.bits)
    if plain == DEPTHWISE:
        return plain, None
    vector, whole = _vector(step), plain == LINEAR
    made = _entries(step, found, *((weights.ROW_GAPS, True) if vector else ()))
    if made is not None:
        lines, columns = shape(step)
        once = COLUMNS // 2 if made.form == weights.WIDE else COLUMNS
        waste = (-(-lines // 2) * 2 * -(-columns // once) * once) / (step.height * step.width)
        sparse = made.count * (VECTOR_ENTRY[made.form] if vector else ENTRY[made.form] * waste)
        dense = (VECTOR if whole else DENSE) * step.weight.size
        stored = weights.rows(found).nbytes
        worth = 1.5 if made.stream.nbytes < SMALLER * stored else 1.0
        if made.stream.nbytes <= stored and sparse < worth * dense:
            if not vector and made.form == weights.WIDE and turns(step):
                made = weights.entries(step, found, step.sources[0].high, turned=True)
                made.turned = True
            return (LINE if vector else SPARSE), made
    return plain, None
