"""Which kernel a layer gets: dense or sparse, for images or for one vector, by what instructions and bytes it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flatcompress.onnx_export.c import ir, weights

CONV, LINEAR, DEPTHWISE, SPARSE, LINE = "conv", "linear", "depthwise", "sparse", "sparse_line"
# Instructions on an emulated Cortex-M4: a product of the dense kernels; of the sparse ones, where a weight is not zero.
DENSE, ENTRY = 1.2, {weights.WIDE: 3.0, weights.WORDS: 2.2, weights.BYTES: 1.6, weights.ENDED: 1.5}
VECTOR, VECTOR_ENTRY = 2.2, {weights.WIDE: 5.4, weights.WORDS: 5.4}
SMALLER = 0.7  # of the dense bytes: flash that is worth half as many instructions again
FEW = 0.02  # of all products: a layer of so few takes the kernel that is there anyway

COLUMNS = 8  # that the sparse kernel makes at once, of two lines; four of wide sums
WHOLE = 1280  # bytes of all taps of a group of pixels, at most, for them to be gathered one after the other
SHARE = 0.05  # of all products: less is not worth the code of another way to gather inputs
CODE = {SPARSE: 1200, LINE: 400}  # bytes of flash that a kernel takes
DEPTH = 4  # channels of which pixel by pixel is the shorter way
PART, COPY = 20, 7  # instructions to begin a column of taps in a row of weights; to copy a tap of a group

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
    chosen = _without_lone(convs, chosen, total)
    kernels = {kernel for kernel, _ in chosen}
    last = SPARSE if SPARSE in kernels else LINE
    if last in kernels:  # the last dense layers, so that no dense kernel is needed
        dense = [i for i, (kernel, _) in enumerate(chosen) if kernel in {CONV, LINEAR, LINE} - {last}]
        streams = {i: _entries(*convs[i], rows=last == LINE) for i in dense}
        few = sum(convs[i][0].macs for i in dense) <= FEW * total
        if few and all(stream is not None for stream in streams.values()):
            chosen = [(last, streams[i]) if i in streams else choice for i, choice in enumerate(chosen)]
    if CONV in {kernel for kernel, _ in chosen}:
        for i, (kernel, _) in enumerate(chosen):
            if kernel == LINEAR and convs[i][0].macs <= FEW * total:
                chosen[i] = CONV, None
    chosen = _one_gap(convs, [(kernel, _worth(*conv, made, total)) for conv, (kernel, made) in zip(convs, chosen)])
    for (step, _), (kernel, entries) in zip(convs, chosen):
        at_once = 2 * (COLUMNS if flat(step) else step.width)
        step.pixels = {CONV: 2, SPARSE: at_once}.get(kernel, 1)
        if entries is not None and entries.turned:
            step.pixels = 1  # columns first: the source is needed until the end
    return chosen


def _without_lone(convs: Sequence[tuple[ir.Conv, weights.Digits]], chosen: list[Choice], total: int) -> list[Choice]:
    """Dense layers for sparse ones of so few products that they save neither time nor the bytes of their kernel."""
    for kernel, code in CODE.items():
        mine = [i for i, (name, _) in enumerate(chosen) if name == kernel]
        saved = sum(weights.rows(convs[i][1]).nbytes - made.stream.nbytes for i in mine if (made := chosen[i][1]))
        if sum(convs[i][0].macs for i in mine) <= FEW * total and saved < code:
            chosen = [
                (_dense(convs[i][0], convs[i][1].bits), None) if i in mine else choice
                for i, choice in enumerate(chosen)
            ]
    return chosen


def _worth(step: ir.Conv, found: weights.Digits, made: weights.Entries | None, total: int) -> weights.Entries | None:
    """The stream without what is not worth its code beside ``total`` products, and with what is."""
    if made is None:
        return None
    much = step.macs >= SHARE * total
    if made.whole and not much:
        made = _entries(step, found, turned=made.turned, apart=True)
        assert made is not None
    made.runs = much and step.sources[0].channels < DEPTH
    return made


def _one_gap(convs: Sequence[tuple[ir.Conv, weights.Digits]], chosen: list[Choice]) -> list[Choice]:
    """Words of one kind in every layer whose weights have the same bits: a constant takes no register."""
    words = {
        i: made
        for i, (kernel, made) in enumerate(chosen)
        if made is not None and kernel == SPARSE and made.form in (weights.WORDS, weights.ENDED)
    }
    for bits in {made.bits for made in words.values()}:
        same = [i for i, made in words.items() if made.bits == bits]
        gaps = {words[i].gap for i in same}
        made = {gap: [_entries(*convs[i], (gap,), apart=not words[i].whole) for i in same] for gap in gaps}
        best = min(made, key=lambda gap: sum(weights.price(one) for one in made[gap] if one is not None))
        for i, one in zip(same, made[best]):
            assert one is not None
            one.runs = words[i].runs
            chosen[i] = chosen[i][0], one
    return chosen


def _entries(
    step: ir.Conv,
    found: weights.Digits,
    gaps: Iterable[int] = weights.GAPS,
    rows: bool = False,
    turned: bool = False,
    apart: bool = False,
) -> weights.Entries | None:
    """The stream of a layer that has one. rows: for the kernel of one vector. apart: taps are never gathered whole."""
    if step.groups > 1 or (rows and not _vector(step)):
        return None
    if rows:
        return weights.row_entries(step, found)
    whole = _whole(step, turned) and not apart
    made = weights.entries(step, found, step.sources[0].high, gaps, turned=turned, ended=flat(step) or whole)
    made.turned, made.whole = turned, whole and made.parts == 0
    return made


def _whole(step: ir.Conv, turned: bool) -> bool:
    """Whether it pays to gather all taps of a group of pixels one after the other, so that a row has one column."""
    columns = step.window.kernel[0 if turned else 1]
    fits = 4 * COLUMNS * step.taps <= WHOLE
    return fits and (columns - 1) * PART * step.outputs > COPY * step.taps


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
    made = _entries(step, found, rows=vector)
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
                made = _entries(step, found, turned=True)
            return (LINE if vector else SPARSE), made
    return plain, None
