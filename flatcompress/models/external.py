"""Models from elsewhere: ``timm:NAME``, ``torchvision:NAME``, ``transformers:TYPE``, ``onnx:FILE`` and
``package.module:factory``.

Nothing here is imported before it is asked for; each library is an extra. ``package.module:factory`` imports
and runs the user's own code, with the current folder on the path.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError, unknown
from flatcompress.models.blocks import Shape
from flatcompress.modules import evaluating
from flatcompress.registry import Registry


def library(name: str) -> ModuleType:
    """Import an optional library; the error says how to install it, or why an installed one does not load."""
    extra = f"pip install 'flatcompress[{name}]'"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise UserError(f"models from {name} need it installed: {extra}") from error
        raise _broken(name, extra, error) from error
    except Exception as error:  # a build for another torch fails with RuntimeError, OSError, AttributeError ...
        raise _broken(name, extra, error) from error


def _broken(name: str, extra: str, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return UserError(
        f"{name} is installed but cannot be imported ({reason}). Most often it, or a library it needs, was built "
        f"for another torch than {torch.__version__}: install the build that was made for this torch, from the index "
        f"that this torch came from ({extra} alone keeps what is there), or use a built-in model."
    )


def timm(name: str, num_classes: int, input_shape: Shape, **options: Any) -> nn.Module:
    """`timm.create_model(name)`, sized for the data; ``options`` are timm's (``pretrained: true`` downloads)."""
    module = library("timm")
    if not module.is_model(name):
        raise unknown("timm model", name, module.list_models())
    sized = {"num_classes": num_classes, "in_chans": input_shape[0], **options}
    try:
        # Transformers need the image size, convolutional networks refuse it.
        return module.create_model(name, img_size=input_shape[1:], **sized)
    except TypeError:
        return _call(f"timm:{name}", module.create_model, name, **sized)


def torchvision(name: str, num_classes: int, input_shape: Shape, **options: Any) -> nn.Module:
    """`torchvision.models.get_model(name)`; the first convolution is replaced when the channels differ."""
    library("torchvision")
    models = library("torchvision.models")
    if name not in models.list_models(module=models):
        raise unknown("torchvision model", name, models.list_models(module=models))
    model = _call(f"torchvision:{name}", models.get_model, name, **{"num_classes": num_classes, **options})
    return _with_channels(model, input_shape[0])


def _with_channels(model: nn.Module, channels: int) -> nn.Module:
    name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels == channels:
        return model
    owner, _, leaf = name.rpartition(".")
    fresh = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    setattr(model.get_submodule(owner), leaf, fresh)
    return model


def onnx(name: str, num_classes: int, input_shape: Shape, **options: Any) -> nn.Module:
    """The network in an ONNX file, float or QDQ (dequantized); see `from_onnx`. It takes no options."""
    from flatcompress.models.from_onnx import from_onnx

    if options:
        raise UserError(f"onnx:{name} takes no options, found {next(iter(options))!r}")
    return from_onnx(Path(name).expanduser(), torch.zeros(2, *input_shape))


class Logits(nn.Module):
    """A Hugging Face classifier as a plain module: image batch in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found = self.model(pixel_values=x)
        return found.logits if "logits" in found else found[0]  # PP-LCNet calls them last_hidden_state


def transformers(
    name: str, num_classes: int, input_shape: Shape, config: dict[str, Any] | None = None, **options: Any
) -> nn.Module:
    """An image classifier of Hugging Face: a model type built from its default config, or a local folder with weights.

    ``config`` overrides keys of the config. Nothing is downloaded and no code of the folder is run.
    """
    if options:
        raise UserError(f"transformers:{name} takes its settings under 'config', found option {next(iter(options))!r}")
    hub = library("transformers")
    hub.logging.set_verbosity_error()
    folder = Path(name).expanduser()
    settings = {"num_labels": num_classes, "num_channels": input_shape[0], **(config or {})}
    if folder.is_dir() or os.sep in name:
        return Logits(_from_folder(hub, folder, settings))
    types = _classifier_types(hub)
    if name not in types:
        raise unknown("transformers model type", name, types)
    cfg = _call(f"transformers:{name}", hub.AutoConfig.for_model, name, **_sized(hub, name, input_shape, settings))
    if cfg.architectures is None:  # deit, levit, perceiver: where a type has several heads, this list is searched
        cfg.architectures = []
    build = hub.AutoModelForImageClassification.from_config
    # Attention written out as matmul and softmax, for pruning and quantizers to see.
    return Logits(_call(f"transformers:{name}", build, cfg, attn_implementation="eager"))


def _classifier_types(hub: ModuleType) -> list[str]:
    mapping = hub.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return sorted(mapping)


def _sized(hub: ModuleType, name: str, input_shape: Shape, settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` plus the image size, and a patch that divides it, where the type has such keys."""
    defaults = hub.AutoConfig.for_model(name)
    known = set(defaults.to_dict()) | {"num_labels"}
    for key in settings:
        if key not in known and key != "num_channels":
            raise unknown(f"config key of transformers:{name}", key, known)
    sized = {key: value for key, value in settings.items() if key in known}
    height, width = input_shape[1:]
    if "image_size" in known and "image_size" not in sized:
        pair = isinstance(defaults.image_size, (list, tuple)) or height != width
        sized["image_size"] = [height, width] if pair else height
    patch = getattr(defaults, "patch_size", None)
    if isinstance(patch, int) and "patch_size" not in sized and patch * 4 > min(height, width):
        sized["patch_size"] = next(p for p in (8, 4, 2, 1) if p * 4 <= min(height, width) or p == 1)
    return sized


def _from_folder(hub: ModuleType, folder: Path, settings: dict[str, Any]) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise UserError(f"transformers: {folder} is no model folder (it has no config.json)")
    keys = {key: value for key, value in settings.items() if key != "num_channels"}
    # Another number of classes gets a new head; every other tensor must fit or transformers says which does not.
    return _call(
        f"transformers:{folder}",
        hub.AutoModelForImageClassification.from_pretrained,
        str(folder),
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        attn_implementation="eager",
        **keys,
    )


def factory(
    path: str, num_classes: int, input_shape: Shape, more: Mapping[str, Any] | None = None, /, **options: Any
) -> nn.Module:
    """Call ``package.module:factory``; it gets ``num_classes``, ``input_shape`` and ``more`` where it takes them."""
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file lying here can hide an installed module
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(f"model {path!r}: no module {error.name!r} here or installed") from error
        raise UserError(f"model {path!r}: importing it failed: {error}") from error
    except Exception as error:
        raise UserError(f"model {path!r}: importing it failed: {type(error).__name__}: {error}") from error
    make = getattr(module, attribute, None)
    if not callable(make):
        public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise unknown(f"factory in {module_name}", attribute, public)
    offered = {"num_classes": num_classes, "input_shape": input_shape, **(more or {})}
    parameters = inspect.signature(make).parameters
    catch_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    accepted = {key: value for key, value in offered.items() if catch_all or key in parameters}
    return _call(path, make, **{**accepted, **options})


def _call(name: str, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return make(*args, **kwargs)
    except Exception as error:
        raise UserError(f"model {name!r} could not be built: {type(error).__name__}: {error}") from error


def checked(name: str, model: Any, num_classes: int | None, input_shape: Shape, tokens: bool = False) -> nn.Module:
    """``model`` if one image gives logits [1, num_classes] (None: anything), else a UserError: what came out."""
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name!r} is a {type(model).__name__}, not a torch.nn.Module")
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(torch.zeros(1, *input_shape, dtype=torch.int64 if tokens else torch.float32))
    except Exception as error:
        raise UserError(
            f"model {name!r} fails on an image of {input_shape}: {type(error).__name__}: {error}"
        ) from error
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if num_classes is not None and found != (1, num_classes):
        raise UserError(f"model {name!r} must give logits of shape (1, {num_classes}) for one image, gave {found}")
    return model


SOURCES = Registry("model source")
SOURCES.add("timm", timm, "any model of timm: timm:NAME")
SOURCES.add("torchvision", torchvision, "any classifier of torchvision: torchvision:NAME")
SOURCES.add("onnx", onnx, "a network read from an ONNX file, float or QDQ: onnx:FILE")
SOURCES.add("transformers", transformers, "any image classifier of transformers by type or local folder")
