"""Compress a trained CIFAR-10 ResNet with real images, and print the accuracy after each step.

    python examples/cifar_resnet.py --data DIR --weights FILE --depth 20

``DIR`` holds ``train/`` and ``test/`` with a folder of images for every class; ``FILE`` is the
safetensors state dict of a network of `cifar_models`. Everything is learnt from ``train/``;
``test/`` only fills the table. Labels are not used unless ``--labels`` is given.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import torchcap
from benchmarks.measure import (
    accuracy,
    count_macs,
    count_parameters,
    largest_difference,
    latencies,
    outputs,
)
from benchmarks.table import format_table
from cifar_models import DEPTHS, load_cifar_resnet, load_images


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    model = load_cifar_resnet(options.depth, options.weights)
    images, labels = load_images(options.data / "train")
    test_images, test_labels = load_images(options.data / "test")
    print(f"{len(images):,} training and {len(test_images):,} test images")

    original = outputs(model, test_images)
    steps: list[tuple[str, str, str, str]] = []

    def record(step: str, network: nn.Module, start: float) -> None:
        seconds = time.perf_counter() - start
        logits = outputs(network, test_images)
        agreement = (logits.argmax(1) == original.argmax(1)).double().mean().item()
        score = accuracy(network, test_images, test_labels)
        steps.append((step, f"{100 * score:.2f} %", f"{100 * agreement:.2f} %", f"{seconds:.1f} s"))

    record("original", model, time.perf_counter())

    start = time.perf_counter()
    chosen = torch.randperm(len(images))[: options.calibration]
    student = torchcap.prepare(
        model, ratio=options.ratio, data=images[chosen].split(256), example_inputs=images[:1]
    )
    record("prepared: greedy selection", student, start)

    start = time.perf_counter()
    train_projections(student, images, labels, options)
    record("projections trained", student, start)

    start = time.perf_counter()
    small = torchcap.materialize(student)
    record("materialized", small, start)

    print(format_table(("step", "test accuracy", "agreement with original", "time"), steps))
    networks = {"original": model, "materialized": small}
    alone, many = (latencies(networks, test_images[:batch]) for batch in (1, 64))
    rows = [
        (
            name,
            f"{count_macs(network, test_images[:1]):,}",
            f"{count_parameters(network):,}",
            alone[name],
            many[name],
        )
        for name, network in networks.items()
    ]
    print(format_table(("network", "MACs", "parameters", "1 image", "64 images"), rows))
    absolute, relative = largest_difference(
        outputs(small, test_images), outputs(student, test_images)
    )
    print(f"largest difference to the student: {absolute:.1e} absolute, {relative:.1e} relative")


def train_projections(
    student: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace
) -> None:
    """Train the projections in place: block reconstruction, and the labels or teacher's logits."""
    student.train()
    optimizer = torch.optim.Adam(torchcap.projection_parameters(student), options.lr)
    steps = options.epochs * -(-len(images) // options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    with tqdm(total=steps, desc="train the projections") as bar:
        for _ in range(options.epochs):
            for index in torch.randperm(len(images)).split(options.batch):
                logits = student(images[index])
                targets = labels[index] if options.labels else None
                loss = torchcap.mixture_loss(student, logits, targets, gamma=options.gamma)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    student.eval()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE")
    parser.add_argument("--depth", type=int, default=20, choices=DEPTHS)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of channels kept")
    parser.add_argument("--calibration", type=int, default=1024, help="images for the selection")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--gamma", type=float, default=0.1, help="weight of the class loss")
    parser.add_argument("--labels", action="store_true", help="use the labels, not distillation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
