"""What each step of the method is worth, as in table 1 of the paper, on a CIFAR ResNet.

    python examples/experiments/ablation.py --data DIR --weights FILE --depth 20

All networks have half of the channels inside every block, and train for the same number of steps
on the same images without labels; only ``scratch``, the same small network from random weights, and
the fine-tuning have labels. Projections get a quarter of the epochs where kernels train after them.
``--rows`` picks rows by a part of their name.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))  # the examples are scripts, not a package
from protocol import (
    Bars,
    ClassLoss,
    Images,
    Table,
    distil,
    evaluate,
    load_splits,
    loader,
    parser,
    sgd,
    start,
)

import torchcap
from benchmarks.measure import count_macs, outputs
from cifar_models import CifarResNet, load_cifar_resnet

if TYPE_CHECKING:
    import argparse

BATCH = 64
CALIBRATION = 16  # batches that the closed forms look at


def main() -> None:
    options = parse_options()
    start(options)
    teacher = load_cifar_resnet(options.depth, options.weights)
    train, scored = load_splits(options.data, seed=options.seed).of(options.split)
    logits = outputs(teacher, scored.images)
    full = count_macs(teacher, scored.images[:1])
    print(f"ResNet-{options.depth}: {len(train):,} images to train on, {len(scored):,} to score")

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
    if not options.rows or any(part in "scratch" for part in options.rows):
        began = time.perf_counter()
        network = scratch(options, train)
        record("scratch, labels", network, time.perf_counter() - began)
    for name, recipe in recipes(options.epochs).items():
        if options.rows and not any(part in name for part in options.rows):
            continue
        began = time.perf_counter()
        small = torchcap.compress(
            teacher,
            loader(train, batch=BATCH),
            recipe=recipe,
            seed=options.seed,
            on_progress=Bars(),
        )
        record(name, small, time.perf_counter() - began)
    print(table)


def recipes(epochs: int) -> dict[str, torchcap.Recipe]:
    """Return the rows of the table, each with as many epochs of training in all."""
    some, rest = max(1, epochs // 4), max(1, epochs - epochs // 4)
    default = torchcap.Recipe.minutes(epochs)
    relaxation = default.relaxation
    assert relaxation is not None
    closed = torchcap.ClosedForm(batches=CALIBRATION)
    projections = torchcap.Projections(epochs=some, augment=(torchcap.FlipAndShift(),))
    random = torchcap.RandomOrthonormal(torch.Generator().manual_seed(0))
    greedy = torchcap.GreedySelection()
    tuning = relaxation.but(
        labels=1.0, reconstruction=0.1, augment=(torchcap.FlipAndShift(),), epochs=some
    )
    recipe = torchcap.Recipe
    return {
        "random P": recipe(start=random),
        "selection": recipe(start=greedy),
        "selection on own features + solve": recipe(start=closed),
        "P trained": recipe(start=greedy, projections=projections.but(epochs=epochs)),
        "random P + relaxation": recipe(start=random, relaxation=relaxation),
        "P trained + relaxation": recipe(
            start=greedy, projections=projections, relaxation=relaxation.but(epochs=rest)
        ),
        "P trained + solve": recipe(start=greedy, projections=projections, solve=closed),
        "selection + P trained + solve + relaxation": recipe(
            start=closed,
            projections=projections,
            solve=closed,
            relaxation=relaxation.but(epochs=rest),
        ),
        "selection + solve + relaxation": recipe(start=closed, relaxation=relaxation),
        "the same + fine-tuning, labels": recipe(
            start=closed, relaxation=relaxation.but(epochs=rest), fine_tuning=tuning
        ),
    }


def scratch(options: argparse.Namespace, train: Images) -> nn.Module:
    """Train the small network from random weights, with labels."""
    network = CifarResNet(options.depth, interior=0.5)
    distil(
        network,
        network,  # no teacher: its part of the loss has no weight
        loader(train, batch=BATCH),
        epochs=options.epochs,
        make_optimizer=sgd(0.1),
        loss=ClassLoss(distillation=0.0, labels=1.0),
    )
    return network


def parse_options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--epochs", type=int, default=20, help="of training in every row")
    options.add_argument("--rows", nargs="*", default=(), help="parts of the names of rows")
    return options.parse_args()


if __name__ == "__main__":
    main()
