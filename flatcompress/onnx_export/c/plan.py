"""One static arena: an offset for every tensor and every kernel's scratch, overlapping where the order allows it.

Two tensors that live at the same time lie apart, with two exceptions, both exact. An addition may be written over an
operand that dies there. And a step that reads its source for the last time and goes forward over it may write behind
itself into the bytes that it no longer needs (diagonal memory optimization, arXiv 2010.01668): `lead` computes by how
many bytes the source must lie ahead, from the very order in which the kernel reads and writes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from flatcompress.onnx_export.c import ir

ALIGNMENT = 8
TRIES = 400


@dataclass(eq=False)
class Block:
    """A tensor or a scratch buffer: alive from step ``first`` to step ``last``, at ``offset`` once it is placed."""

    name: str
    bytes: int
    first: int
    last: int
    alignment: int = 1
    offset: int = -1


@dataclass
class Plan:
    """``arena``: bytes. ``bound``: of the largest set of tensors alive at once if none overlapped and none were packed
    (no scratch).

    ``offsets``: of tensors, by name. ``scratch``: offset of each step's scratch, or 0.
    """

    arena: int
    bound: int
    offsets: dict[str, int]
    scratch: list[int]
    scratch_bytes: list[int]


def padded(taps: int, digits: int) -> int:
    """Taps filled up to whole words of weights."""
    return -(-taps // digits) * digits


def lead(step: ir.Step, source: ir.Tensor) -> int | None:
    """How far ahead of the output's first byte the source's must lie for the step to overwrite it; None: never.

    The step writes output up to some byte and still reads the source from some byte on; over all moments the largest
    difference between the two.
    """
    if (
        isinstance(step, ir.Conv)
        and isinstance(source, ir.Codes)
        and step.sources[0].name == source.name
        and step.pixels > 1  # else every output needs all of the source until the last one is written
    ):
        return _conv_lead(step, source)
    if isinstance(step, ir.Rows) and isinstance(step.begin, ir.Product) and isinstance(step.out, ir.Codes):
        others = [tensor.name for tensor in step.sources[1:]]
        if step.sources[0].name == source.name and source.name not in others and not step.mean:
            return _product_lead(step, step.begin, source)
    return None


def _product_lead(step: ir.Rows, product: ir.Product, source: ir.Tensor) -> int:
    """Of a product's first operand, a row of which is read whole before the row of the result is written."""
    first, head, row, deep = product.first
    needed = [source.bytes] * (step.rows + 1)
    for at in range(step.rows - 1, -1, -1):
        start = first + at % product.heads * head + at // product.heads * row
        needed[at] = min(needed[at + 1], start, start + (product.depth - 1) * deep)
    return max((at + 1) * step.columns - needed[at + 1] for at in range(step.rows))


def _conv_lead(step: ir.Conv, source: ir.Codes) -> int:
    row, pixels = source.width * source.pixel_bytes, step.height * step.width
    needed = [0] * (pixels + 1)
    needed[pixels] = source.bytes
    for pixel in range(pixels - 1, -1, -1):
        y, x = divmod(pixel, step.width)
        top = max(0, y * step.window.stride[0] - step.window.pads[0])
        left = max(0, x * step.window.stride[1] - step.window.pads[1])
        needed[pixel] = min(needed[pixel + 1], top * row + left * source.pixel_bytes)
    written = step.outputs if step.out is None else step.out.pixel_bytes
    ends = [*range(step.pixels, pixels, step.pixels), pixels]
    # Groups come one after the other: the last one reads the source when the others have written these pixels.
    reads = [0, *ends[:-1]] if step.groups > 1 else ends
    return max(end * written - needed[read] for end, read in zip(ends, reads))


def in_place(step: ir.Step, source: ir.Tensor) -> bool:
    """Whether the output may begin exactly where the source does, because what it overwrites has been read."""
    if isinstance(step, ir.Conv) and isinstance(source, ir.Codes):
        if step.out is not None and step.out.packed != source.packed:
            return False
        if step.add is not None and step.add.other.name == source.name and step.sources[0].name != source.name:
            return True
        whole = step.outputs == source.channels and step.height * step.width <= source.pixels
        return step.depthwise and step.sources[0].name == source.name and whole  # a channel is copied out first
    if isinstance(step, ir.Rows):
        return _row_by_row(step, source)
    if isinstance(step, ir.Add | ir.Table) and step.out is not None:
        return step.out.bytes == source.bytes
    return False


def _row_by_row(step: ir.Rows, source: ir.Tensor) -> bool:
    """Whether every row is read before it is written, and from its own place alone."""
    begins = step.begin is None and step.sources[0].name == source.name
    if step.out is None or step.mean or type(step.out) is not type(source) or step.out.bytes != source.bytes:
        return False
    if begins:
        return step.first == 0 and step.stride == step.columns
    begun = step.convolution.sources[:1] if step.convolution is not None else step.sources[:2] if step.begin else []
    return all(other.name != source.name for other in begun)


def lay_out(program: ir.Program, scratch: list[int]) -> Plan:
    """Place everything. scratch: bytes of each step's scratch."""
    blocks, related = _blocks(program, scratch)
    bound = _bound(program)
    best = _best(blocks, related)
    offsets = {block.name: offset for block, offset in zip(blocks, best) if not block.name.startswith("scratch ")}
    where = {block.name: offset for block, offset in zip(blocks, best)}
    placed = [where.get(f"scratch {index}", 0) for index in range(len(scratch))]
    size = max((offset + block.bytes for block, offset in zip(blocks, best)), default=0)
    return Plan(-(-size // ALIGNMENT) * ALIGNMENT, bound, offsets, placed, scratch)


def _lives(program: ir.Program) -> dict[str, tuple[int, int]]:
    lives = {}
    for index, step in enumerate(program.steps):
        if step.out is not None:
            lives[step.out.name] = (index, index)
        for source in step.sources:
            lives[source.name] = (lives[source.name][0], index)
    return lives


def alive(program: ir.Program, index: int) -> int:
    """Bytes of the tensors that a step reads, makes or lets live."""
    lives = _lives(program)
    return sum(tensor.bytes for tensor in program.tensors if lives[tensor.name][0] <= index <= lives[tensor.name][1])


def _bound(program: ir.Program) -> int:
    """The largest set of live tensors, additions not fused: what a plan without overlaps needs at least."""
    lives = _lives(program)
    sizes = {tensor.name: tensor.whole_bytes for tensor in program.tensors}
    most = 0
    for index, step in enumerate(program.steps):
        alive = sum(sizes[name] for name, (first, last) in lives.items() if first <= index <= last)
        if isinstance(step, ir.Conv) and step.add is not None:
            # First the convolution beside what it is added to, then the addition, when its source may be gone.
            source, between = step.sources[0], step.add.between.whole_bytes
            assert step.out is not None
            dead = lives[source.name][1] == index and source.name != step.add.other.name
            alive = max(alive - step.out.whole_bytes, alive - (source.whole_bytes if dead else 0)) + between
        most = max(most, alive)
    return most


Related = dict[tuple[int, int], tuple[int | None, bool]]


def _blocks(program: ir.Program, scratch: list[int]) -> tuple[list[Block], Related]:
    """The blocks, and of (source, output) pairs that may overlap: the lead and whether they may lie in one place."""
    lives = _lives(program)
    blocks = [Block(t.name, t.bytes, *lives[t.name], 4 if isinstance(t, ir.Real) else 1) for t in program.tensors]
    number = {block.name: index for index, block in enumerate(blocks)}
    related: Related = {}
    for index, step in enumerate(program.steps):
        if scratch[index]:
            blocks.append(Block(f"scratch {index}", scratch[index], index, index, ALIGNMENT))
        if step.out is None:
            continue
        for source in step.sources:
            if lives[source.name][1] == index:
                related[number[source.name], number[step.out.name]] = (lead(step, source), in_place(step, source))
    return blocks, related


def _best(blocks: list[Block], related: Related) -> list[int]:
    """Offsets by first fit, over several orders: the largest first, then shuffled ones (always the same)."""
    order = sorted(range(len(blocks)), key=lambda i: (-blocks[i].bytes, i))
    generator = random.Random(0)
    floor = max((block.bytes for block in blocks), default=0)
    # A source may have to begin a little behind an output that is placed later: blocks start there, or at 0.
    ahead = [0] * len(blocks)
    for (source, _), (gap, _) in related.items():
        ahead[source] = max(ahead[source], gap or 0)
    starts = [0] * len(blocks)
    best, least = _fit(blocks, related, order, starts)
    for _ in range(TRIES):
        if least <= floor:
            break
        swapped, moved = order.copy(), [start if generator.random() < 0.8 else 0 for start in ahead]
        for _ in range(generator.randint(1, 4)):
            a, b = generator.randrange(len(order)), generator.randrange(len(order))
            swapped[a], swapped[b] = swapped[b], swapped[a]
        found, size = _fit(blocks, related, swapped, moved)
        if size <= least:
            order = swapped
        if size < least:
            best, least = found, size
    return best


def _fit(blocks: list[Block], related: Related, order: list[int], starts: list[int]) -> tuple[list[int], int]:
    offsets = [-1] * len(blocks)
    placed: list[int] = []
    for index in order:
        taken: list[tuple[int, int]] = []
        exact: list[int] = []
        for other in placed:
            if blocks[other].first <= blocks[index].last and blocks[index].first <= blocks[other].last:
                span, same = _forbidden(blocks, related, index, other, offsets[other])
                taken.append(span)
                exact += [offsets[other]] if same else []
        start = _aligned(starts[index], blocks[index].alignment)
        choices = [start, *exact, *(_aligned(last, blocks[index].alignment) for _, last in taken)]
        offsets[index] = _lowest(choices, blocks, related, index, placed, offsets)
        placed.append(index)
    return offsets, max((o + b.bytes for o, b in zip(offsets, blocks)), default=0)


def _forbidden(blocks: list[Block], related: Related, index: int, other: int, at: int) -> tuple[tuple[int, int], bool]:
    """Offsets (first, last + 1) that ``index`` may not have because of ``other``; whether exactly ``at`` is allowed."""
    first, last = at - blocks[index].bytes + 1, at + blocks[other].bytes
    if (other, index) in related:  # `other` is the source of `index`
        ahead, same = related[other, index]
        if ahead is not None:
            first = max(first, at - ahead + 1)
    elif (index, other) in related:
        ahead, same = related[index, other]
        if ahead is not None:
            last = min(last, at + ahead)
    else:
        same = False
    return (first, max(first, last)), same


def _lowest(
    choices: list[int], blocks: list[Block], related: Related, index: int, placed: list[int], offsets: list[int]
) -> int:
    """The lowest offset that no placed block forbids."""
    for choice in sorted(set(choices)):
        if choice >= 0 and choice % blocks[index].alignment == 0:
            allowed = (_allowed(choice, blocks, related, index, other, offsets[other]) for other in placed)
            if all(allowed):
                return choice
    raise AssertionError("the end of the arena is always free")


def _allowed(choice: int, blocks: list[Block], related: Related, index: int, other: int, at: int) -> bool:
    if blocks[other].first > blocks[index].last or blocks[index].first > blocks[other].last:
        return True
    (first, last), same = _forbidden(blocks, related, index, other, at)
    return not first <= choice < last or (same and choice == at)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
