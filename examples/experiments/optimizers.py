"""Which optimizer trains the projections best: SGD, Adam, with and without re-centring the proxy.

    python examples/experiments/optimizers.py --data DIR --weights FILE --depth 20 --epochs 3

Every row starts from the same greedy selection and trains for as many steps, without labels.
Re-centring writes ``P`` back into its proxy after every step, so that steps keep their relative
size, which the growth of the proxy under SGD would otherwise shrink.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[1]))  # the examples are scripts, not a package
from protocol import Bars, Table, evaluate, load_splits, loader, parser, start

import torchcap
from benchmarks.measure import outputs
from cifar_models import load_cifar_resnet

if TYPE_CHECKING:
    import argparse

CALIBRATION = 1024  # images that the selection looks at
OPTIMIZERS = {
    **{f"SGD {lr}": torchcap.SGD(lr) for lr in (0.003, 0.01, 0.03)},
    **{f"Adam {lr}": torchcap.Adam(lr, relative=False) for lr in (0.001, 0.003, 0.01)},
}


def main() -> None:
    options = parse_options()
    start(options)
    teacher = load_cifar_resnet(options.depth, options.weights)
    train, scored = load_splits(options.data, seed=options.seed).of(options.split)
    logits = outputs(teacher, scored.images)
    table = Table(options)
    for name, optimizer in OPTIMIZERS.items():
        for recentre in (False, True):
            student = torchcap.prepare(
                teacher,
                example_inputs=scored.images[:1],
                data=train.images[:CALIBRATION].split(options.batch),
            )
            began = time.perf_counter()
            torchcap.train_projections(
                student,
                loader(train, batch=options.batch),
                epochs=options.epochs,
                optimizer=optimizer,
                recentre=recentre,
                augment=(torchcap.FlipAndShift(),),
                seed=options.seed,
                on_progress=Bars(),
            )
            scores = evaluate(student, scored, logits)
            table.add(
                {
                    "optimizer": name,
                    "re-centred": "yes" if recentre else "no",
                    "accuracy, %": scores.accuracy,
                    "agreement, %": scores.agreement,
                    "seconds": time.perf_counter() - began,
                }
            )
    print(table)


def parse_options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--batch", type=int, default=64)
    return options.parse_args()


if __name__ == "__main__":
    main()
