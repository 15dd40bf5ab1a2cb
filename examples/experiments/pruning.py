"""Half the channels inside every block of a CIFAR ResNet: torchcap beside Torch-Pruning.

    python examples/experiments/pruning.py --data DIR --weights FILE --depth 20

Torch-Pruning removes the least important channels of the first convolution of every block, and by
its dependency graph the BatchNorm and the inputs that go with them. (Its own choice of layers takes
in the residual stream, and fails on the shortcuts that pad with zeros.) So all networks of the
table have the same widths and MACs; and they train on the same images, for the same number of steps
and by the same loss, without labels and with them. ``--choose`` tries learning rates for the peers
on the validation part instead.

``l1`` and ``l2`` are norms of a channel's weights in both convolutions and the BatchNorm,
``filter-l1`` and ``filter-l2`` of those in the first convolution. Within one layer LAMP, and the
group norm, rank channels as ``l2`` does, so they share its row. ``taylor`` needs labels to choose
channels by, and only then.
"""

from __future__ import annotations

import copy
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))  # the examples are scripts, not a package
from protocol import (
    Bars,
    ClassLoss,
    Images,
    MakeOptimizer,
    Table,
    adam,
    distil,
    evaluate,
    load_splits,
    loader,
    parser,
    reestimate_statistics,
    sgd,
    start,
)

import torchcap
from benchmarks.measure import count_macs, outputs
from cifar_models import BasicBlock, CifarResNet, load_cifar_resnet

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

IMPORTANCES = {
    "l1": tp.importance.MagnitudeImportance(p=1),
    "l2": tp.importance.MagnitudeImportance(p=2),
    "lamp": tp.importance.LAMPImportance(p=2),
    "filter-l1": tp.importance.MagnitudeImportance(p=1, group_reduction="first"),
    "filter-l2": tp.importance.MagnitudeImportance(p=2, group_reduction="first"),
    "taylor": tp.importance.TaylorImportance(),
}
ROWS = [name for name in IMPORTANCES if name != "lamp"]
TAYLOR_BATCH, TAYLOR_BATCHES = 64, 16
CALIBRATION = 8  # batches that the closed form looks at
AUGMENT = {  # for all networks of the table; a mixed image has no label
    "no": (torchcap.FlipAndShift(), torchcap.Mix()),
    "yes": (torchcap.FlipAndShift(),),
}
LOSSES = {"no": ClassLoss(), "yes": ClassLoss(labels=1.0)}
OPTIMIZERS = {"sgd": sgd, "adam": adam}
TRIALS = (("sgd", 0.01), ("sgd", 0.03), ("sgd", 0.1), ("adam", 1e-3), ("adam", 3e-3))


class Candidate(NamedTuple):
    """A network for the table, how it was made, and in how many training steps and seconds."""

    method: str
    labels: str
    network: nn.Module
    steps: int = 0
    seconds: float = 0.0


def main() -> None:
    options = parse_options()
    start(options)
    teacher = load_cifar_resnet(options.depth, options.weights)
    splits = load_splits(options.data, seed=options.seed)
    train, scored = splits.of(options.split)
    print(f"ResNet-{options.depth}: {len(train):,} images to train on, {len(scored):,} to score")

    table, logits = Table(options), outputs(teacher, scored.images)
    full, half = (
        count_macs(CifarResNet(options.depth, interior=interior), scored.images[:1])
        for interior in (1.0, 0.5)
    )
    for candidate in candidates(teacher, train, options):
        macs = count_macs(candidate.network, scored.images[:1])
        assert macs == (full if candidate.network is teacher else half), candidate.method
        scores = evaluate(candidate.network, scored, logits)
        row = {
            "method": candidate.method,
            "labels": candidate.labels,
            "MACs kept, %": 100 * macs / full,
            "accuracy, %": scores.accuracy,
            "agreement, %": scores.agreement,
            "steps": candidate.steps,
            "seconds": candidate.seconds,
        }
        table.add(row)
    print(table)


def candidates(
    teacher: nn.Module, train: Images, options: argparse.Namespace
) -> Iterator[Candidate]:
    """Make what fills the table, one network after the other."""
    yield Candidate("original", "", teacher)
    if options.choose:
        yield from trials(teacher, train, options)
        return
    if not options.peers_only:
        yield from torchcap_rows(teacher, train, options)
    for name in options.importances:
        yield from peer_rows(name, teacher, train, options)


def torchcap_rows(
    teacher: nn.Module, train: Images, options: argparse.Namespace
) -> Iterator[Candidate]:
    """Compress without labels and with them, for as many steps as the peers train.

    The distillation is that of the peers; the reconstruction of features is torchcap's own.
    """
    began = time.perf_counter()
    batches = loader(train, batch=options.batch)
    closed = torchcap.compress(
        teacher,
        batches,
        recipe=torchcap.Recipe(start=torchcap.ClosedForm(batches=CALIBRATION)),
        seed=options.seed,
        on_progress=Bars(),
    )
    seconds = time.perf_counter() - began
    yield Candidate("torchcap, closed form", "no", closed, 0, seconds)
    if options.one_shot_only:
        return
    for labels, loss in LOSSES.items():
        small = copy.deepcopy(closed)
        began = time.perf_counter()
        torchcap.relax(
            small,
            teacher,
            batches,
            epochs=options.epochs,
            temperature=loss.temperature,
            labels=loss.labels,
            augment=AUGMENT[labels],
            seed=options.seed,
            on_progress=Bars(),
        )
        elapsed = seconds + time.perf_counter() - began
        steps = options.epochs * len(batches)
        yield Candidate("torchcap, trained", labels, small, steps, elapsed)


def peer_rows(
    name: str, teacher: nn.Module, train: Images, options: argparse.Namespace
) -> Iterator[Candidate]:
    """Prune by one importance: as it is, with statistics of its own, and trained."""
    began = time.perf_counter()
    pruned = prune(teacher, name, train)
    seconds = time.perf_counter() - began
    labels = "to choose" if name == "taylor" else "no"
    yield Candidate(f"{name}, one-shot", labels, pruned, 0, seconds)

    began = time.perf_counter()
    refreshed = copy.deepcopy(pruned)
    reestimate_statistics(refreshed, train.images)
    more = time.perf_counter() - began
    yield Candidate(f"{name}, one-shot, new statistics", labels, refreshed, 0, seconds + more)

    if not options.one_shot_only:
        make_optimizer = OPTIMIZERS[options.peer_optimizer](options.peer_lr)
        for row in trained(pruned, teacher, train, make_optimizer, options):
            labels = "yes" if row.labels == "yes" else labels
            yield Candidate(
                f"{name}, trained", labels, row.network, row.steps, seconds + row.seconds
            )


def trials(teacher: nn.Module, train: Images, options: argparse.Namespace) -> Iterator[Candidate]:
    """Train after the first importance with each of the optimizers and learning rates."""
    name = options.importances[0]
    pruned = prune(teacher, name, train)
    for optimizer, lr in TRIALS:
        for row in trained(pruned, teacher, train, OPTIMIZERS[optimizer](lr), options):
            yield row._replace(method=f"{name}, {optimizer} {lr}")


def trained(
    pruned: nn.Module,
    teacher: nn.Module,
    train: Images,
    make_optimizer: MakeOptimizer,
    options: argparse.Namespace,
) -> Iterator[Candidate]:
    """Train a copy without labels, and another with them; all see the batches in one order."""
    for labels, loss in LOSSES.items():
        network = copy.deepcopy(pruned)
        batches = loader(train, batch=options.batch, with_labels=labels == "yes")
        torch.manual_seed(options.seed)
        began = time.perf_counter()
        distil(
            network,
            teacher,
            batches,
            epochs=options.epochs,
            make_optimizer=make_optimizer,
            loss=loss,
            augment=partial(_changed, changes=AUGMENT[labels]),
        )
        seconds = time.perf_counter() - began
        yield Candidate("trained", labels, network, options.epochs * len(batches), seconds)


def _changed(images: Tensor, changes: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    for change in changes:
        images = change(images)
    return images


def prune(teacher: nn.Module, name: str, train: Images) -> nn.Module:
    """Return a copy of the network with half the channels inside every block."""
    scores = channel_scores(copy.deepcopy(teacher), name, train)
    network = copy.deepcopy(teacher)
    for group, score in zip(interior_groups(network, train.images[:1]), scores, strict=True):
        group.prune(score.argsort()[: len(score) // 2].tolist())
    return network


def channel_scores(network: nn.Module, name: str, train: Images) -> list[Tensor]:
    """Return the importance of the channels inside every block; changes the network's state."""
    groups = interior_groups(network, train.images[:1])
    importance = IMPORTANCES[name]
    if name != "taylor":
        return [importance(group) for group in groups]
    # One gradient of many images that the network has learnt is mostly noise. Scores averaged over
    # small batches, with BatchNorm in training mode, did best on the validation part.
    network.train()
    scores = []
    for index in torch.arange(TAYLOR_BATCH * TAYLOR_BATCHES).split(TAYLOR_BATCH):
        network.zero_grad()
        F.cross_entropy(network(train.images[index]), train.labels[index]).backward()
        scores.append([importance(group) for group in groups])
    return [torch.stack(values).mean(0) for values in zip(*scores, strict=True)]


def interior_groups(network: nn.Module, example: Tensor) -> list[tp.Group]:
    """Return what goes with all the channels between the convolutions of every block."""
    graph = tp.DependencyGraph().build_dependency(network, example_inputs=example)
    layers = [block.conv1 for block in network.modules() if isinstance(block, BasicBlock)]
    return [
        graph.get_pruning_group(
            layer, tp.prune_conv_out_channels, idxs=list(range(layer.out_channels))
        )
        for layer in layers
    ]


def parse_options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--importances", nargs="+", choices=IMPORTANCES, default=ROWS)
    options.add_argument("--one-shot-only", action="store_true", help="prune, and do not train")
    options.add_argument("--peers-only", action="store_true", help="leave torchcap's rows out")
    options.add_argument("--epochs", type=int, default=10, help="of all networks of the table")
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--peer-optimizer", choices=OPTIMIZERS, default="adam")
    options.add_argument("--peer-lr", type=float, default=3e-3)
    options.add_argument(
        "--choose",
        action="store_true",
        help="try learning rates for the first importance on the validation part",
    )
    chosen = options.parse_args()
    if chosen.choose:
        chosen.split = "validation"
    return chosen


if __name__ == "__main__":
    main()
