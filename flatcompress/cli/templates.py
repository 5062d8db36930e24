"""Starter recipes that `flatcompress init` writes."""

from __future__ import annotations

_STAGES = """\
stages:
  - train:                  # into a flat minimum
      method: sam           # none | sam | asam | sagm ...: flatcompress list methods
      rho: 0.05             # radius of the perturbation
      epochs: {train}
      optimizer: {{name: adamw, lr: 3.0e-3, weight_decay: 1.0e-4}}
  - prune:                  # channels, while training goes on
      method: adasap        # flatcompress list prune-methods
      ratio: 0.5            # share of channels to remove; or a budget: macs: 0.5 (share to keep)
      epochs: {prune}
  - quantize:               # quantization-aware training
      method: gaqat         # flatcompress list qat-methods
      weight_bits: 4        # 2 to 8
      activation_bits: 4
      epochs: {quantize}
  - export:                 # the ONNX file and its certificate
      profile: packed       # flatcompress list profiles
"""

_HEAD = """\
# flatcompress run THIS_FILE        all keys: flatcompress schema
name: {name}
seed: 0
output_dir: runs            # results go to runs/{name}
device: auto                # auto | cpu | cuda | cuda:1
"""


def _starter(name: str, data: str, model: str, train: int, prune: int, quantize: int) -> str:
    return _HEAD.format(name=name) + data + model + _STAGES.format(train=train, prune=prune, quantize=quantize)


STARTERS: dict[str, str] = {
    "quickstart": _starter(
        "quickstart",
        'data: {name: rotated-digits, held_out: "75", batch_size: 64}   # 75 degrees stays unseen\n',
        "model: {name: resnet8}      # flatcompress list models\n",
        12,
        6,
        6,
    ),
    "folder": _starter(
        "my-images",
        "data: {name: folder, path: path/to/images, size: 64, batch_size: 64}   # images/CLASS/*.png\n",
        "model: {name: mobilenet_v2}\n",
        60,
        30,
        30,
    ),
    "domains": _starter(
        "my-domains",
        "data: {name: domains, path: path/to/data, held_out: sketch, size: 224, batch_size: 32}  # DOMAIN/CLASS/*\n",
        "model: {name: resnet18}     # weights: a safetensors file or a state dict\n",
        60,
        30,
        30,
    ),
    "cifar10": _starter(
        "cifar10",
        "data: {name: cifar10, path: path/to/cifar-10-batches-bin, batch_size: 128}\n",
        "model: {name: resnet20}\n",
        160,
        60,
        60,
    ),
}
