"""The networks of `network_coverage`: their names, and each one untrained with a small example batch."""

from __future__ import annotations

import importlib
import io
from contextlib import redirect_stderr
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress import models
from flatcompress.errors import UserError

SIZES = (64, 96, 128, 224, 240, 256)
QUICK = ["mobilenetv3_small_050", "efficientnet_lite0", "ghostnet_100", "repvgg_a0", "lcnet_050", "tinynet_e"]
TIMM = [
    *QUICK, "mobilenetv3_small_100", "mobilenetv3_large_100", "mobilenetv2_100", "mobilenetv4_conv_small",
    "mobilenetv1_100", "efficientnet_b0", "tf_efficientnet_lite0", "efficientnet_es", "tf_mobilenetv3_small_100",
    "mnasnet_small", "mnasnet_100", "semnasnet_075", "fbnetc_100", "spnasnet_100", "hardcorenas_a", "mixnet_s",
    "tinynet_a", "lcnet_100", "ghostnetv2_100", "repghostnet_050", "rexnet_100", "mobileone_s0", "fastvit_t8",
    "mobilevit_xxs", "mobilevitv2_050", "edgenext_xx_small", "efficientformerv2_s0", "efficientvit_b0",
    "efficientvit_m0", "repvit_m0_9", "starnet_s1", "ese_vovnet19b_dw", "shvit_s1", "regnetx_002", "regnety_002",
    "regnetz_005", "resnet10t", "resnet18", "resnet26d", "resnext50_32x4d", "seresnet18", "ecaresnet26t",
    "skresnet18", "res2net50_14w_8s", "resnest14d", "densenet121", "dla34", "dpn48b", "vgg11_bn", "hrnet_w18_small",
    "cspresnet50", "darknet17", "selecsls42", "vovnet39a", "inception_v3", "xception41", "nf_resnet26",
    "dm_nfnet_f0", "resnetv2_50", "botnet26t_256", "halonet26t", "lambda_resnet26t", "gcresnet33ts", "bat_resnext26ts",
    "convnext_atto", "convnextv2_atto", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "mixer_s32_224",
    "gmlp_ti16_224", "resmlp_12_224", "poolformer_s12", "pvt_v2_b0", "swin_tiny_patch4_window7_224", "levit_128s",
    "coat_lite_tiny", "convit_tiny", "cait_xxs24_224", "twins_pcpvt_small", "xcit_nano_12_p16_224", "visformer_tiny",
    "crossvit_tiny_240", "maxvit_rmlp_pico_rw_256", "coatnet_pico_rw_224", "focalnet_tiny_srf", "davit_tiny",
]  # fmt: skip
TORCHVISION = ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "efficientnet_b0",
               "mnasnet0_5", "regnet_y_400mf", "convnext_tiny"]  # fmt: skip
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = {**_SMALL, "vocab_size": 500, "max_position_embeddings": 64, "pad_token_id": 0}
_SOUND = {**_SMALL, "conv_dim": (32, 32, 32), "conv_kernel": (10, 3, 3), "conv_stride": (5, 4, 4),
          "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
          "classifier_proj_size": 32, "mask_time_prob": 0.0}  # fmt: skip
IMAGE: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
    "mobilenet_v1": {}, "mobilenet_v2": {},
    "regnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
    "vit": _SMALL, "deit": _SMALL, "convnext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "beit": _SMALL,
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "bert": _TEXT, "roberta": _TEXT, "electra": {**_TEXT, "embedding_size": 32},
    "albert": {**_TEXT, "embedding_size": 32},
    "distilbert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 500},
}  # fmt: skip
AUDIO: dict[str, dict[str, Any]] = {
    "wav2vec2": _SOUND, "hubert": _SOUND,
    "audio-spectrogram-transformer": {**_SMALL, "max_length": 64, "num_mel_bins": 32},
}  # fmt: skip
LISTS = {"timm": TIMM, "torchvision": TORCHVISION, "transformers": [*IMAGE, *TEXT, *AUDIO]}


class Autoencoder(nn.Sequential):
    """MLPerf Tiny's anomaly detector: 640 features in and out, four layers of 128, a bottleneck of 8."""

    def __init__(self) -> None:
        widths, layers = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128], []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], 640))


def networks(quick: bool) -> list[str]:
    """The names of the networks, those of packages that cannot be imported left out with a word."""
    names = [*models.MODELS, "mlperf:autoencoder"]
    for package, listed in LISTS.items():
        if quick and package != "timm":
            continue
        try:
            importlib.import_module(package)
        except Exception as error:  # each has its own ways to fail
            print(f"{package} cannot be imported here ({type(error).__name__}: {error}): its networks are left out.")
            continue
        names += [f"{package}:{name}" for name in (QUICK if quick else listed)]
    return names


def everything() -> list[str]:
    """All names, whatever can be imported here."""
    own = [*models.MODELS, "mlperf:autoencoder"]
    return own + [f"{package}:{name}" for package, listed in LISTS.items() for name in listed]


def built(name: str, batch: int = 2) -> tuple[nn.Module, Any]:
    """The network and an example batch, as small as it takes: a tensor, or a dictionary for token ids and a mask."""
    torch.manual_seed(0)
    package, _, kind = name.partition(":")
    if name == "mlperf:autoencoder":
        return Autoencoder(), torch.randn(batch, 640)
    if package == "timm":
        return _timm(kind, batch)
    if package == "torchvision":
        size = 96 if kind == "googlenet" else 64
        options = {"aux_logits": False, "init_weights": False} if kind == "googlenet" else {}
        vision: Any = importlib.import_module("torchvision")
        return vision.models.get_model(kind, num_classes=10, **options), torch.randn(batch, 3, size, size)
    if package == "transformers":
        return _transformers(kind, batch)
    return models.build(name, num_classes=10, input_shape=(3, 32, 32), seed=0), torch.randn(batch, 3, 32, 32)


def _timm(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    timm: Any = importlib.import_module("timm")
    with redirect_stderr(io.StringIO()):
        for size in SIZES:
            for options in ({"img_size": size}, {}):  # transformers take the size of their images
                try:
                    model = timm.create_model(name, num_classes=10, **options)
                    model.eval()(torch.randn(1, 3, size, size))
                except Exception:
                    continue
                return model.train(), torch.randn(batch, 3, size, size)
    raise UserError(f"timm:{name} runs at none of the sizes {SIZES}")


def _transformers(name: str, batch: int) -> tuple[nn.Module, Any]:
    if name in IMAGE:
        options: dict[str, Any] = {"config": IMAGE[name]} if IMAGE[name] else {}
        shape = (3, 64, 64)
        return models.build(f"transformers:{name}", num_classes=10, input_shape=shape, seed=0, **options), torch.randn(
            batch, *shape
        )
    hub: Any = importlib.import_module("transformers")
    config = hub.AutoConfig.for_model(name, num_labels=10, **(TEXT.get(name) or AUDIO[name]))
    family = hub.AutoModelForSequenceClassification if name in TEXT else hub.AutoModelForAudioClassification
    model = family.from_config(config, attn_implementation="eager")
    if name in TEXT:
        mask = torch.ones(batch, 16, dtype=torch.int64)
        mask[:, 12:] = torch.randint(0, 2, (batch, 4))
        return model, {"input_ids": torch.randint(1, 500, (batch, 16)), "attention_mask": mask}
    if name == "audio-spectrogram-transformer":
        return model, {"input_values": torch.randn(batch, 64, 32)}
    return model, {"input_values": torch.randn(batch, 1600)}
