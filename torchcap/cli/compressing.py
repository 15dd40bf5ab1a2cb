"""The command ``compress``: a model, images and a budget in, one file out, checked and measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchcap import processes
from torchcap.batches import as_batch
from torchcap.checkpoint.load import load
from torchcap.checkpoint.save import save
from torchcap.cli.console import Bars, Result
from torchcap.cli.deciding import decide, given_times
from torchcap.cli.files import leftovers, read_document
from torchcap.cli.folders import open_data
from torchcap.cli.models import Network, open_network
from torchcap.errors import FileError, StateError
from torchcap.pipeline import compress
from torchcap.plan.plan import Plan
from torchcap.report import compare
from torchcap.training.recipe import Recipe

if TYPE_CHECKING:
    from argparse import Namespace
    from contextlib import AbstractContextManager

    from torchcap.batches import Batches

LARGEST_DIFFERENCE: Final = 1e-5
"""Of the outputs of a model and its file, as a share of the largest output."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How a small model does on images that it was not made with.

    Attributes:
        images: how many.
        agreement: share of them that the small model classifies as the original does.
        accuracy: shares that original and small model classify as the labels say; None without
            labels.
    """

    images: int
    agreement: float
    accuracy: tuple[float, float] | None

    def __str__(self) -> str:
        text = f"on {self.images:,} other images: agreement {self.agreement:.2%}"
        if self.accuracy is None:
            return text
        return f"{text}, accuracy {self.accuracy[0]:.2%} before, {self.accuracy[1]:.2%} after"


def compress_command(options: Namespace, bars: Bars) -> Result:
    """Compress a model, save it, load it again, and say what it costs and gives."""
    _check_state(options)
    recipe = recipe_of(options)
    network = open_network(options)
    train, held_out = open_data(options, network)
    plan = _plan(options, network, train, bars)
    with _autocast(options):
        small = compress(
            network.model,
            train,
            plan=plan,
            recipe=recipe,
            example_inputs=network.example,
            seed=options.seed,
            state=options.state,
            on_progress=bars,
            streams=options.streams,
        ).eval()
    difference = 0.0
    if processes.rank() == 0:
        notes = {
            "input_size": list(network.example.shape[1:]),
            "recipe": str(recipe),
            "seed": options.seed,
        }
        save(small, options.out, plan=plan, notes=notes)
        for file in leftovers(options.state):
            file.unlink()
        difference = _check_file(options.out, small, network)
    scores = measure(network.model, small, bars.over(held_out, "score"), options.device)
    if processes.rank() > 0:
        return Result("", {})
    report = compare(network.model, small, network.example)
    size = options.out.stat().st_size
    text = [
        str(plan),
        f"{options.out}: {size:,} bytes; verified: loaded again, its outputs differ by "
        f"{difference:.1g} of the largest",
        str(scores),
        str(report),
    ]
    data = {
        "file": str(options.out),
        "bytes": size,
        "verified": {"largest_difference": difference},
        "plan": plan.to_dict(),
        "scores": asdict(scores),
        "report": report.to_dict(),
    }
    return Result("\n\n".join(text), data)


def recipe_of(options: Namespace) -> Recipe:
    """Return the recipe that ``recipe``, ``epochs`` and ``labels`` name."""
    epochs = {} if options.epochs is None else {"epochs": options.epochs}
    if options.recipe == "seconds":
        return Recipe.seconds()
    if options.recipe == "minutes":
        return Recipe.minutes(**epochs)
    return Recipe.full(**epochs, labels=options.labels or 0.0)


@torch.no_grad()
def measure(
    model: nn.Module, small: nn.Module, batches: Iterable[Any], device: torch.device
) -> Scores:
    """Compare the answers of two classifiers, over the images of all processes."""
    sums = torch.zeros(5, dtype=torch.float64)
    for number, item in enumerate(batches):
        batch = as_batch(item, number).to(device)
        before, after = (batch.run(each).argmax(1) for each in (model, small))
        found = [len(before), _equal(before, after)]
        if batch.labels is not None:
            found += [len(before), _equal(before, batch.labels), _equal(after, batch.labels)]
        sums[: len(found)] += torch.tensor(found, dtype=torch.float64)
    count, agreed, labelled, right_before, right_after = processes.sum_(sums).tolist()
    accuracy = (right_before / labelled, right_after / labelled) if labelled else None
    return Scores(int(count), agreed / max(1, count), accuracy)


def _plan(options: Namespace, network: Network, train: Batches, bars: Bars) -> Plan:
    if options.plan is not None:
        return read_document(options.plan, Plan.from_json)
    return decide(options, network, train, given_times(options), bars, options.state)


def _check_state(options: Namespace) -> None:
    """Refuse to go on from an interrupted run, or to forget it, without being told."""
    kept = leftovers(options.state)
    if processes.count() > 1:
        dist.barrier()  # the first process may soon write them
    if kept and not options.resume:
        raise StateError(
            f"{str(kept[0])!r} is there from a run that was interrupted: go on from it with "
            "--resume, or remove it to begin anew"
        )


def _check_file(path: Path, small: nn.Module, network: Network) -> float:
    """Return how far the outputs of a saved model are off, as a share of the largest.

    Raises:
        FileError: if they are another model's.
    """
    loaded = load(path).to(network.example.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *network.example.shape[1:], generator=generator).to(network.example)
    with torch.no_grad():
        expected, found = small(images), loaded(images)
    difference = _largest(found - expected) / max(_largest(expected), 1e-12)
    if not difference <= LARGEST_DIFFERENCE:
        raise FileError(
            f"{str(path)!r} was written, but what is loaded from it puts out something else: the "
            f"outputs differ by {difference:.1g} of the largest one; do not use it"
        )
    return difference


def _autocast(options: Namespace) -> AbstractContextManager[Any]:
    if not options.amp:
        return contextlib.nullcontext()
    # Its cache would keep the weights of the first step for as long as the context is open.
    return torch.autocast(options.device.type, torch.bfloat16, cache_enabled=False)


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().max())


def _equal(one: Tensor, other: Tensor) -> int:
    return int((one == other).sum())
