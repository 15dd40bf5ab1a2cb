"""Ranks for a budget, from measured curves, against the same share of every space.

    python examples/experiments/allocation.py --data DIR --weights FILE --depth 56 --split test

Every row is the closed form alone: no labels, no steps. A pair of rows has the same MACs: first
uniform ranks, then those that ``torchcap.allocate`` finds for what uniform ranks cost. The curves
are measured on images of ``train/`` only, and kept beside ``--out`` if that is given.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[1]))  # the examples are scripts, not a package
from protocol import Bars, Images, Table, evaluate, load_splits, loader, parser, start

import torchcap
from benchmarks.measure import outputs
from cifar_models import load_cifar_resnet

if TYPE_CHECKING:
    import argparse

    from torch import nn


def main() -> None:
    options = parse_options()
    start(options)
    teacher = load_cifar_resnet(options.depth, options.weights)
    train, scored = load_splits(options.data, seed=options.seed).of(options.split)
    graph = torchcap.analyze(teacher, scored.images[:1])
    logits = outputs(teacher, scored.images)
    began = time.perf_counter()
    curves = torchcap.sensitivity(
        teacher,
        loader(train, batch=options.batch),
        images=options.images,
        cache=None if options.out is None else options.out.with_suffix(".curves.json"),
        seed=options.seed,
        on_progress=Bars(),
    )
    measured = time.perf_counter() - began
    points = sum(len(curve.ranks) for curve in curves.curves)
    print(f"{len(curves.curves)} spaces, {points} points measured in {measured:.0f} s")
    table = Table(options)
    full = torchcap.cost(graph).macs
    for ratio in options.ratios:
        uniform = torchcap.Plan.uniform(graph, ratio)
        spent = torchcap.cost(graph, uniform).macs
        plans = {"uniform": uniform} | {
            f"allocated by {loss}": torchcap.allocate(graph, curves, macs=spent, loss=loss)
            for loss in options.losses
        }
        for name, plan in plans.items():
            began = time.perf_counter()
            small = closed_form(teacher, plan, train, options)
            scores = evaluate(small, scored, logits)
            shares = [choice.rank / choice.channels for choice in plan.choices.values()]
            table.add(
                {
                    "ranks": f"{name}, {ratio}",
                    "MACs kept, %": 100 * torchcap.cost(graph, plan).macs / full,
                    "channels kept, %": f"{100 * min(shares):.0f} to {100 * max(shares):.0f}",
                    "accuracy, %": scores.accuracy,
                    "agreement, %": scores.agreement,
                    "seconds": time.perf_counter() - began,
                }
            )
    print(table)


def closed_form(
    teacher: nn.Module, plan: torchcap.Plan, train: Images, options: argparse.Namespace
) -> nn.Module:
    batches = options.calibration // options.batch
    return torchcap.compress(
        teacher,
        loader(train, batch=options.batch),
        plan=plan,
        recipe=torchcap.Recipe(start=torchcap.ClosedForm(batches=batches)),
        seed=options.seed,
        on_progress=Bars(),
    )


def parse_options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.28])
    options.add_argument("--losses", nargs="+", default=["errors"])
    options.add_argument("--images", type=int, default=512, help="that curves are measured on")
    options.add_argument("--calibration", type=int, default=2048, help="images to compress with")
    options.add_argument("--batch", type=int, default=64)
    return options.parse_args()


if __name__ == "__main__":
    main()
