"""How much of transformers' vision models is within reach, at the sizes that they are used in.

    python examples/benchmarks/reach.py [NAME ...]

Every model has its default configuration (stacks of equal layers are cut to a few) and stands on
the meta device: nothing is downloaded, and no weights are made. So nothing is proven here; that is
what ``coverage.py --zoo transformers`` does, with small configurations. Needs transformers.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass, field
from importlib import import_module
from statistics import median
from typing import Any

import torch

import torchcap
from table import format_table

STAGES = ["stage1", "stage2", "stage3", "stage4"]


@dataclass(frozen=True, slots=True)
class Case:
    """A model class of transformers.

    Attributes:
        model: name of the class.
        config: name of its configuration.
        size: of the images.
        options: of the configuration, where they are not the default ones.
    """

    model: str
    config: str
    size: int = 224
    options: dict[str, Any] = field(default_factory=dict)


FEW = {"num_hidden_layers": 4}
CASES = {
    "ViT": Case("ViTForImageClassification", "ViTConfig", options=FEW),
    "DeiT": Case("DeiTForImageClassification", "DeiTConfig", options=FEW),
    "BEiT": Case(
        "BeitForImageClassification",
        "BeitConfig",
        options={**FEW, "use_relative_position_bias": True},
    ),
    "DINOv2": Case("Dinov2ForImageClassification", "Dinov2Config", options=FEW),
    "DINOv3": Case("DINOv3ViTModel", "DINOv3ViTConfig", options=FEW),
    "Swin": Case("SwinForImageClassification", "SwinConfig", options={"depths": [2, 2, 2, 2]}),
    "Swinv2": Case(
        "Swinv2ForImageClassification", "Swinv2Config", options={"depths": [2, 2, 2, 2]}
    ),
    "SegFormer": Case("SegformerForSemanticSegmentation", "SegformerConfig", 512),
    "ConvNeXtV2": Case("ConvNextV2ForImageClassification", "ConvNextV2Config"),
    "MobileViT": Case("MobileViTForImageClassification", "MobileViTConfig", 256),
    "CLIP": Case("CLIPVisionModelWithProjection", "CLIPVisionConfig", options=FEW),
    "SigLIP": Case("SiglipVisionModel", "SiglipVisionConfig", options=FEW),
    "ResNet": Case("ResNetForImageClassification", "ResNetConfig"),
    "RegNet": Case(
        "RegNetForImageClassification", "RegNetConfig", options={"depths": [1, 1, 2, 1]}
    ),
    "MobileNetV1": Case("MobileNetV1ForImageClassification", "MobileNetV1Config"),
    "MobileNetV2": Case("MobileNetV2ForImageClassification", "MobileNetV2Config"),
    "LeViT": Case("LevitForImageClassification", "LevitConfig"),
    "PVTv2": Case("PvtV2ForImageClassification", "PvtV2Config"),
    "PoolFormer": Case("PoolFormerForImageClassification", "PoolFormerConfig"),
    "DPT": Case(
        "DPTForDepthEstimation",
        "DPTConfig",
        384,
        {**FEW, "backbone_out_indices": [0, 1, 2, 3]},
    ),
    "YOLOS": Case("YolosForObjectDetection", "YolosConfig", 512, FEW),
    "EfficientNet": Case(
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        options={"width_coefficient": 1.0, "depth_coefficient": 0.3, "hidden_dim": 1280},
    ),
    "FocalNet": Case("FocalNetForImageClassification", "FocalNetConfig"),
    "SwiftFormer": Case("SwiftFormerForImageClassification", "SwiftFormerConfig"),
    "DETR": Case(
        "DetrForObjectDetection",
        "DetrConfig",
        480,
        {
            "use_timm_backbone": False,
            "backbone": None,
            "use_pretrained_backbone": False,
            "encoder_layers": 2,
            "decoder_layers": 2,
        },
    ),
    "UperNet": Case("UperNetForSemanticSegmentation", "UperNetConfig", 512),
    "Mask2Former": Case(
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerConfig",
        384,
        {"encoder_layers": 1, "decoder_layers": 2},
    ),
}
BACKBONES = {
    "DETR": ("ResNetConfig", {"out_features": ["stage4"]}),
    "UperNet": (
        "ConvNextConfig",
        {"out_features": STAGES, "hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]},
    ),
}


def built(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return a model on the meta device, and images for it."""
    transformers = import_module("transformers")

    case = CASES[name]
    options = dict(case.options)
    if name in BACKBONES:
        kind, given = BACKBONES[name]
        options["backbone_config"] = getattr(transformers, kind)(**given)
    config = getattr(transformers, case.config)(**options)
    with torch.device("meta"):
        model = getattr(transformers, case.model)(config).eval()
        images = torch.zeros(1, 3, case.size, case.size)
    return model, {"pixel_values": images}


def row(name: str) -> list[str]:
    """Read one model, and say how much of it is within reach and what keeps most of the rest."""
    model, inputs = built(name)
    start = time.process_time()
    graph = torchcap.analyze(model, inputs)
    seconds = time.process_time() - start
    fixed = [space for space in graph.spaces if not space.free]
    largest = max(fixed, key=graph.share, default=None)
    why = largest.reason if largest is not None and graph.reachable < 0.9 else ""
    spaces = f"{len(graph.free)} / {len(graph.spaces)}"
    return [name, f"{graph.reachable:.3f}", spaces, f"{seconds:.1f}", why[:90]]


def main(arguments: list[str] | None = None) -> None:
    """Read the models and print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(CASES), metavar="NAME")
    names = parser.parse_args(arguments).names
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in names:
        rows.append(row(name))
        print(*rows[-1], sep="  ", flush=True)
    print()
    print(format_table(["model", "within reach", "free / spaces", "seconds", "kept by"], rows))
    shares = [float(entry[1]) for entry in rows]
    print(f"\nmedian {median(shares):.3f}, {sum(s < 0.8 for s in shares)} below .8")


if __name__ == "__main__":
    main()
