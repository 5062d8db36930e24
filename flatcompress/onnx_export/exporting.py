"""`export`: a trained model, quantized or not, as one ONNX file that stands alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import fx, nn

import flatcompress
from flatcompress.errors import UserError
from flatcompress.onnx_export.c import model as c_model
from flatcompress.onnx_export.emit.catalogue import PROFILES, emitters
from flatcompress.onnx_export.emit.profiles import Profile
from flatcompress.onnx_export.emit.writer import WEIGHTED, Writer
from flatcompress.onnx_export.litert import model as litert_model
from flatcompress.onnx_export.lower.lowering import lower
from flatcompress.storage import write_output


@dataclass
class Exported:
    """What `export` made. ``reference``: the torch module that the file must match; ``layers``: a row per layer.

    ``bytes``: of the file. ``theoretical_bytes``: of its weights, bits per weight or mask plus non-zeros. ``tensors``
    and ``paths``: the file's tensor and the module path of every quantized node of the reference; ``shifts``: what its
    codes there lack. ``c``, ``litert``: what the profiles of these names wrote beside the file.
    """

    path: Path
    profile: str
    reference: fx.GraphModule
    layers: list[dict[str, Any]]
    bytes: int
    theoretical_bytes: int
    opset: int
    tensors: dict[str, str] = field(default_factory=dict, repr=False)
    paths: dict[str, str] = field(default_factory=dict, repr=False)
    shifts: dict[str, int] = field(default_factory=dict, repr=False)
    c: c_model.CModel | None = None
    litert: litert_model.LiteRTModel | None = None


def export(
    model: nn.Module,
    example_input: Any,
    path: str | Path,
    profile: str = "packed",
    *,
    opset: int | None = None,
    metadata: dict[str, str] | None = None,
    class_names: list[str] | None = None,
    pack_activations: bool = False,
) -> Exported:
    """Write ``model`` (as it is in eval mode) to ``path``; the model is not changed.

    example_input: [B, ...], any B; a tuple of arguments or a dictionary of them for several (token ids, masks); the
    file takes any batch size. One input is called ``input``, one output ``output``; of several the inputs have the
    names of the model's arguments, the outputs the keys of its result, or numbers. opset: raise it above the lowest
    that the profile and the model's operators allow. metadata: text for the file's metadata_props, beside the writer's
    own ``flatcompress`` entries. class_names: of the outputs, in order, for the file's metadata. UserError when the
    model cannot be traced or written, or does not go with the profile; nothing is left at ``path`` then. Profile ``c``
    writes its sources into the folder ``c`` beside ``path``, or beside it where that is its folder. ``litert`` writes a
    .tflite file beside ``path``; UserError where ai-edge-litert is not installed. pack_activations: in the C, codes of
    up to 4 bits lie two to a byte in RAM; UserError with a profile that writes none.
    """
    chosen: Profile = PROFILES[profile]()
    if pack_activations and not chosen.c:
        raise UserError(
            f"pack_activations: profile {profile!r} writes no C, whose arena it is about: take profile 'c'."
        )
    reference = lower(model, example_input)
    _check_fits(reference, chosen)
    decided = c_model.prepare(reference, pack_activations) if chosen.c else None
    entries = _metadata(chosen, metadata, class_names)
    lite = litert_model.prepare(reference, entries, chosen.litert == 4) if chosen.litert else None
    writer, made = _write(reference, chosen, opset, entries)
    onnx.checker.check_model(made, full_check=True)
    target = Path(path)
    data = made.SerializeToString()
    write_output(target, data)
    theoretical = sum(row["theoretical_bytes"] for row in writer.layers)
    return Exported(
        target,
        profile,
        reference,
        writer.layers,
        len(data),
        round(theoretical),
        writer.builder.opset,
        *_quantized(writer),
        c=None if decided is None else c_model.write(decided, target),
        litert=None if lite is None else litert_model.write(lite, target),
    )


def check_c(model: nn.Module, example_input: torch.Tensor) -> None:
    """UserError, naming the module, when profile ``c`` could not write ``model``; nothing is written."""
    c_model.prepare(lower(model, example_input))


def _write(
    reference: fx.GraphModule, profile: Profile, opset: int | None, metadata: dict[str, str]
) -> tuple[Writer, onnx.ModelProto]:
    """Write once to learn which opset the operators need, and again where that is more than was assumed."""
    wanted = _opset(profile, opset)
    writer = Writer(reference, profile, wanted, emitters(profile))
    made = writer.write(metadata, flatcompress.__version__)
    if writer.builder.needed > wanted:
        writer = Writer(reference, profile, writer.builder.needed, emitters(profile))
        made = writer.write(metadata, flatcompress.__version__)
    made.metadata_props.add(key="flatcompress.layers", value=_layer_text(writer.layers))
    return writer, made


def _quantized(writer: Writer) -> tuple[dict[str, str], dict[str, str], dict[str, int]]:
    """Of the reference's nodes that put out codes: tensor names, module paths, shifts of codes."""
    nodes = {node: tensor for node, tensor in writer.env.items() if node.op == "call_module"}
    tensors = {node.name: tensor for node, tensor in nodes.items() if isinstance(tensor, str)}
    coded = {name: writer.coded.get(tensor, (tensor, 0)) for name, tensor in tensors.items()}
    paths = {node.name: node.meta.get("path") or node.name for node in nodes}
    return {name: codes for name, (codes, _) in coded.items()}, paths, {name: s for name, (_, s) in coded.items()}


def _opset(profile: Profile, opset: int | None) -> int:
    known = onnx.defs.onnx_opset_version()
    if opset is not None and not profile.opset <= opset <= known:
        raise UserError(f"opset {opset!r}: profile {profile.name!r} takes {profile.opset} to {known}.")
    return opset or profile.opset


def _check_fits(reference: fx.GraphModule, profile: Profile) -> None:
    integers = [m for m in reference.modules() if isinstance(m, WEIGHTED)]
    if profile.integer and not integers:
        raise UserError(
            f"profile {profile.name!r} stores integer weights, but no layer is quantized: add a quantize stage, or "
            "choose 'float32' or 'float16'."
        )
    if not profile.integer and integers:
        raise UserError(
            f"profile {profile.name!r} is for float models, but {len(integers)} layers are quantized: choose "
            "'packed', 'int8', 'int4' or 'qonnx'."
        )


def _metadata(profile: Profile, metadata: dict[str, str] | None, class_names: list[str] | None) -> dict[str, str]:
    found = {"flatcompress.version": flatcompress.__version__, "flatcompress.profile": profile.name}
    if class_names is not None:
        found["classes"] = json.dumps(class_names, ensure_ascii=False, separators=(",", ":"))
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UserError(f"metadata must map text to text, found {key!r}: {value!r}.")
        found[key] = value
    return found


def _layer_text(layers: list[dict[str, Any]]) -> str:
    """{name: [weight bits, activation bits, share of zeros]}, short because it is in every file."""
    rows = {r["name"]: [r["weight_bits"], r["activation_bits"], round(r["sparsity"], 3)] for r in layers}
    return json.dumps(rows, separators=(",", ":"))
