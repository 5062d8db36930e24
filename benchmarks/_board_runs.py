"""MLPerf Tiny's four networks as recipes train them on stand-in data, for `benchmarks.microcontroller`."""

from __future__ import annotations

from pathlib import Path

from flatcompress import Pipeline
from flatcompress.recipe import identity

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "microcontroller"
FOUR = ("stages.2.quantize.weight_bits=4",)  # activations at 8, as the recipes have them
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "resnet8": ("quickstart", ()),  # 4 bits both
    "ds_cnn": ("task-keywords", FOUR),
    "mobilenet_v1_025": ("task-person", FOUR),
    "autoencoder": ("task-autoencoder", FOUR),
}


def finished(net: str) -> Path:
    """The folder of a finished run of the recipe of ``net``; one that is finished is not trained again."""
    recipe, settings = RECIPES[net]
    pipeline = Pipeline.from_yaml(ROOT / "configs" / f"{recipe}.yaml", list(settings))
    folder = FOLDER / f"{recipe}-{identity.digest(pipeline.recipe)[:12]}"
    if not (folder / "certificate.json").exists():
        pipeline.run(folder)
    return folder
