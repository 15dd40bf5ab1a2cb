"""Table 2 of the paper: a CIFAR-10 ResNet at half of its MACs, without and with fine-tuning.

    python examples/experiments/table2.py --data DIR --weights FILE --depth 56 --epochs 20

The paper's rows stand beside ours; it learnt from 50,000 labelled images. ``--ratios`` adds the
curve of its figure 6: accuracy over the share of channels that are kept.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

sys.path.append(str(Path(__file__).parents[1]))  # the examples are scripts, not a package
from protocol import Bars, Table, evaluate, load_splits, loader, parser, start

import torchcap
from benchmarks.measure import count_macs, outputs
from cifar_models import load_cifar_resnet

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from torch.utils.data import DataLoader

CALIBRATION = 2048  # images that the closed form looks at
PAPER = {  # accuracy before and after, labels used, MACs kept: Minnehan & Savakis 2019, table 2
    56: (("paper, without fine-tuning", 93.51, 92.92), ("paper, fine-tuned", 93.51, 93.22)),
    20: (),
}


def main() -> None:
    options = parse_options()
    start(options)
    teacher = load_cifar_resnet(options.depth, options.weights)
    train, scored = load_splits(options.data, seed=options.seed).of(options.split)
    logits = outputs(teacher, scored.images)
    original = evaluate(teacher, scored, logits).accuracy
    full = count_macs(teacher, scored.images[:1])
    table = Table(options)

    def record(name: str, small: nn.Module, labels: str, seconds: float) -> None:
        scores = evaluate(small, scored, logits)
        table.add(
            {
                "row": name,
                "images": len(train),
                "labels": labels,
                "MACs kept, %": 100 * count_macs(small, scored.images[:1]) / full,
                "accuracy, %": scores.accuracy,
                "drop, points": original - scores.accuracy,
                "agreement, %": scores.agreement,
                "seconds": seconds,
            }
        )

    for name, before, after in PAPER[options.depth]:
        table.add(
            {
                "row": name,
                "images": 50_000,
                "labels": "yes",
                "MACs kept, %": 50.2,
                "accuracy, %": after,
                "drop, points": before - after,
                "agreement, %": "-",
                "seconds": "-",
            }
        )
    record("original", teacher, "-", 0.0)
    for ratio in options.ratios:
        compress_in_steps(teacher, loader(train, batch=options.batch), ratio, options, record)
    print(table)


def compress_in_steps(
    teacher: nn.Module,
    batches: DataLoader,
    ratio: float,
    options: argparse.Namespace,
    record: Callable[..., None],
) -> None:
    """Take the steps of a recipe one by one, and record the network after each."""
    began = time.perf_counter()
    common = {"seed": options.seed, "on_progress": Bars()}
    closed = torchcap.Recipe(start=torchcap.ClosedForm(batches=CALIBRATION // options.batch))
    small = torchcap.compress(teacher, batches, ratio=ratio, recipe=closed, **common)
    record(f"closed form, ratio {ratio}", small, "no", time.perf_counter() - began)

    relaxation = torchcap.Recipe.minutes(options.epochs).relaxation
    torchcap.relax(small, teacher, batches, relaxation, **common)
    record(f"+ relaxation, ratio {ratio}", small, "no", time.perf_counter() - began)

    epochs = max(1, options.epochs // 8)
    augment = (torchcap.FlipAndShift(),)
    torchcap.fine_tune(small, teacher, batches, epochs=epochs, augment=augment, **common)
    record(f"+ fine-tuning, ratio {ratio}", small, "yes", time.perf_counter() - began)


def parse_options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--epochs", type=int, default=30, help="of the relaxation")
    options.add_argument("--ratios", type=float, nargs="+", default=[0.5])
    options.add_argument("--batch", type=int, default=64)
    return options.parse_args()


if __name__ == "__main__":
    main()
