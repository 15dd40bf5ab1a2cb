"""Compress a trained network, and take it where it is to run: ONNX, torch.export, compiled, int8.

    python examples/export.py --out DIR
    python examples/export.py --out DIR --data DIR --weights FILE --depth 20

The first line trains a small network on scikit-learn's handwritten digits; the second reads a
CIFAR-10 ResNet, as ``cifar_resnet.py`` does. The network is compressed in closed form, without
labels; then it and the original are written to ``--out`` in every way of ``runtimes.py``, run from
there and compared with PyTorch. Everything is learnt from the training images: 512 of them also
calibrate the int8 networks. Test images only fill the table.

What a way needs and the machine lacks is named below the table: onnxruntime and onnxscript,
torchao, a C++ compiler.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import torchcap
from benchmarks.measure import count_macs, interleaved, largest_difference
from benchmarks.table import format_table
from cifar_models import DEPTHS, CifarResNet, load_cifar_resnet, load_images
from experiments.protocol import Bars
from quickstart import digits, train
from runtimes import FLOAT_WAYS, INT8_WAYS, Runtime, UnavailableError, Way

LARGEST_DIFFERENCE = 1e-4  # of a float way, as a share of the largest logit


@dataclass(frozen=True, slots=True)
class Task:
    """A trained network, images to learn from, and images with labels for the table."""

    model: nn.Module
    images: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True, slots=True)
class Result:
    """What one way makes of the test images.

    Attributes:
        accuracy, agreement: share of images that are classified as the labels and as the original
            network say.
        difference: largest difference to the same network in PyTorch, as a share of its largest
            logit.
    """

    accuracy: float
    agreement: float
    difference: float


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    task = cifar_task(options) if options.data else digits_task()
    calibration = task.images[: options.calibration]
    small = compress(task, options)
    kept = count_macs(small, calibration[:1]) / count_macs(task.model, calibration[:1])
    print(f"{len(task.test_images):,} test images; the small network keeps {kept:.1%} of the MACs")

    runtimes, lacking = {}, {}
    for network, model in {"original": task.model, "small": small}.items():
        found, without = in_every_way(model, calibration, options.out / network)
        runtimes |= {(network, way): runtime for way, runtime in found.items()}
        lacking |= without
    results = evaluate(runtimes, task)
    print(table(runtimes, results, task.test_images[:1], options.repeats))
    for way, reason in lacking.items():
        print(f"{way}: {reason}")
    check(results)


def cifar_task(options: argparse.Namespace) -> Task:
    model = load_cifar_resnet(options.depth, options.weights)
    images, _ = load_images(options.data / "train")
    return Task(model, images[torch.randperm(len(images))], *load_images(options.data / "test"))


def digits_task() -> Task:
    images, test_images, labels, test_labels = digits()
    model = train(CifarResNet(14, in_channels=1), images, labels, epochs=20)
    return Task(model, images, test_images, test_labels)


def compress(task: Task, options: argparse.Namespace) -> nn.Module:
    recipe = torchcap.Recipe.seconds()
    if options.epochs:
        recipe = torchcap.Recipe.minutes(options.epochs)
    batches = task.images[: options.images].split(64)
    return torchcap.compress(
        task.model,
        batches,
        ratio=options.ratio,
        recipe=recipe,
        seed=options.seed,
        on_progress=Bars(),
    )


def in_every_way(
    model: nn.Module, calibration: Tensor, stem: Path
) -> tuple[dict[str, Runtime], dict[str, str]]:
    """Return a network in every way that the machine has, and what it lacks for the others."""
    found, lacking = {}, {}
    ways: dict[str, Way] = FLOAT_WAYS | INT8_WAYS
    for name, way in tqdm(ways.items(), desc=f"export {stem.name}"):
        try:
            found[name] = way(model, calibration, stem)
        except (ModuleNotFoundError, UnavailableError) as error:
            lacking[name] = str(error)
    return found, lacking


@torch.no_grad()
def evaluate(
    runtimes: Mapping[tuple[str, str], Runtime], task: Task
) -> dict[tuple[str, str], Result]:
    """Run every network in every way on the test images."""
    logits = {
        key: runtime.run(task.test_images) for key, runtime in tqdm(runtimes.items(), desc="score")
    }
    original = logits["original", "PyTorch"].argmax(1)
    results = {}
    for (network, way), values in logits.items():
        predicted = values.argmax(1)
        results[network, way] = Result(
            accuracy=(predicted == task.test_labels).double().mean().item(),
            agreement=(predicted == original).double().mean().item(),
            difference=largest_difference(values, logits[network, "PyTorch"])[1],
        )
    return results


@torch.no_grad()
def table(
    runtimes: Mapping[tuple[str, str], Runtime],
    results: Mapping[tuple[str, str], Result],
    image: Tensor,
    repeats: int,
) -> str:
    """Return one row for each network and way, with the time of one image."""
    calls = {
        key: lambda r=runtime: r.run(image) for key, runtime in runtimes.items() if runtime.timed
    }
    timings = interleaved(calls, repeats=repeats, warmup=10)
    headers = (
        "network",
        "way",
        "accuracy",
        "agreement",
        "difference",
        "file",
        "1 image (quartiles)",
    )
    rows = [
        (
            *key,
            f"{100 * result.accuracy:.2f} %",
            f"{100 * result.agreement:.2f} %",
            f"{result.difference:.0e}",
            f"{file.stat().st_size / 1000:,.0f} kB" if (file := runtimes[key].file) else "-",
            timings.get(key, "-"),
        )
        for key, result in results.items()
    ]
    return format_table(headers, rows)


def check(results: Mapping[tuple[str, str], Result]) -> None:
    """Stop with an error if a float way does not compute what PyTorch does."""
    wrong = [
        f"{network}, {way}: {result.difference:.0e}"
        for (network, way), result in results.items()
        if way in FLOAT_WAYS and not result.difference <= LARGEST_DIFFERENCE
    ]
    if wrong:
        raise SystemExit(f"differs from PyTorch by more than {LARGEST_DIFFERENCE}: {wrong}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the files")
    parser.add_argument("--data", type=Path, metavar="DIR", help="holds train/ and test/")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of a CIFAR ResNet")
    parser.add_argument("--depth", type=int, default=20, choices=DEPTHS)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of channels kept")
    parser.add_argument(
        "--epochs", type=int, default=0, help="of relaxation, after the closed form"
    )
    parser.add_argument("--images", type=int, default=2048, help="to compress with")
    parser.add_argument(
        "--calibration", type=int, default=512, help="images, of the same, for int8"
    )
    parser.add_argument("--repeats", type=int, default=200, help="of the timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.data is None) != (options.weights is None):
        parser.error("--data and --weights go together; without both, digits are learnt")
    return options


if __name__ == "__main__":
    main()
