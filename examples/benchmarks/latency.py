"""The latency of materialized networks, against the same networks built by hand at those widths.

    python examples/benchmarks/latency.py --threads 2

The network built by hand has half the channels inside every block (and in ResNet-50's stem) and no
BatchNorm, which is folded into the convolutions. It takes over the weights of the materialized one,
so the run stops unless both have the same layers and give the same output.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torchvision.models import resnet50
from tqdm import tqdm

import torchcap
from measure import count_macs, count_parameters, keep_freed_memory, latencies, outputs
from table import format_table

sys.path.append(str(Path(__file__).parents[1]))  # the examples are scripts, not a package
from cifar_models import CifarResNet

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    options = parse_options()
    keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, torch {torch.__version__}; median of {options.repeats}")
    rows = [
        *measure("CIFAR ResNet-56", lambda: CifarResNet(56), cifar_by_hand, 32, options),
        *measure("ResNet-50", resnet50, resnet50_by_hand, 224, options),
    ]
    headers = ("network", "batch", "", "MACs", "parameters", "latency (quartiles)", "/ by hand")
    print(format_table(headers, rows))


def measure(
    name: str,
    build: Callable[[], nn.Module],
    build_by_hand: Callable[[], nn.Module],
    size: int,
    options: argparse.Namespace,
) -> list[tuple[object, ...]]:
    """Return the rows of one network: original, materialized and built by hand, per batch size."""
    original = build().eval()
    example = torch.randn(1, 3, size, size)
    student = torchcap.prepare(original, ratio=0.5, example_inputs=example)
    small = torchcap.materialize(student).eval()
    by_hand = build_by_hand().eval()
    by_hand.load_state_dict(small.state_dict())
    torch.testing.assert_close(outputs(by_hand, example), outputs(small, example))

    networks = {"original": original, "materialized": small, "built by hand": by_hand}
    rows: list[tuple[object, ...]] = []
    for batch in options.batches:
        images = torch.randn(batch, 3, size, size)
        progress = partial(tqdm, desc=f"{name}, batch {batch}")
        timings = latencies(networks, images, repeats=options.repeats, progress=progress)
        reference = timings["built by hand"].median
        rows.extend(
            (
                name,
                batch,
                label,
                f"{count_macs(network, example):,}",
                f"{count_parameters(network):,}",
                timings[label],
                f"{timings[label].median / reference:.3f}",
            )
            for label, network in networks.items()
        )
    return rows


def cifar_by_hand() -> nn.Module:
    return without_batchnorm(CifarResNet(56, interior=0.5))


def resnet50_by_hand() -> nn.Module:
    # A block's interior is planes * width_per_group / 64 channels wide, in both of its spaces.
    model = resnet50(width_per_group=32)
    # The stem is a space of its own, which the first block and its shortcut read.
    first = model.layer1[0]
    model.conv1 = nn.Conv2d(3, 32, 7, stride=2, padding=3)
    first.conv1 = nn.Conv2d(32, first.conv1.out_channels, 1)
    first.downsample[0] = nn.Conv2d(32, first.downsample[0].out_channels, 1)
    return without_batchnorm(model)


def without_batchnorm(model: nn.Module) -> nn.Module:
    """Put an identity in the place of every BatchNorm and a bias on every convolution, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d):
                child.bias = nn.Parameter(torch.zeros(child.out_channels))
    return model


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
