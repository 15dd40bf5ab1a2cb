"""Compress a small ResNet to half its interior channels; no download, half a minute on two cores.

Run it from anywhere: ``python examples/quickstart.py``. It trains the network on scikit-learn's
handwritten digits, prepares it, trains the projections in a plain loop and materializes the result.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import trange

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
from cifar_models import CifarResNet

BATCH = 128
GAMMA = 0.1


def main() -> None:
    torch.manual_seed(0)
    images, test_images, labels, test_labels = digits()
    model = train(CifarResNet(14, in_channels=1), images, labels, epochs=20)
    small, student = compress(model, images, labels, epochs=15)

    timings = latencies({"original": model, "materialized": small}, test_images[:16])
    rows = [
        (
            name,
            f"{100 * accuracy(network, test_images, test_labels):.2f} %",
            f"{count_macs(network, test_images[:1]):,}",
            f"{count_parameters(network):,}",
            timings[name],
        )
        for name, network in (("original", model), ("materialized", small))
    ]
    headers = ("network", "test accuracy", "MACs", "parameters", "latency of 16 images (quartiles)")
    print(format_table(headers, rows))
    absolute, relative = largest_difference(
        outputs(small, test_images), outputs(student, test_images)
    )
    print(f"largest difference to the student: {absolute:.1e} absolute, {relative:.1e} relative")


def compress(
    model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int
) -> tuple[nn.Module, nn.Module]:
    """Return the materialized network and the student that it was made from."""
    calibration = images[:512].split(128)
    student = torchcap.prepare(model, ratio=0.5, data=calibration, example_inputs=images[:1])
    student.train()
    optimizer = torch.optim.Adam(torchcap.projection_parameters(student), 3e-3)
    for _ in trange(epochs, desc="train the projections"):
        for index in torch.randperm(len(images)).split(BATCH):
            logits = student(images[index])
            task = F.cross_entropy(logits, labels[index])
            loss = torchcap.reconstruction_loss(student) + GAMMA * task
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    student.eval()
    return torchcap.materialize(student), student


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int) -> nn.Module:
    """Train ``model`` in place and return it in eval mode."""
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for _ in trange(epochs, desc="train the original"):
        for index in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and test images `(n, 1, 8, 8)` and then their labels, a third held out."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    return train_test_split(
        images, torch.tensor(labels), test_size=1 / 3, random_state=0, stratify=labels
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
