"""Time the polar factor, forward and backward, against the other ways to an orthonormal matrix.

Each table row is the median of repeats that take turns with the other ways, in changing order, so
that a busy machine slows all of them alike. There are three kinds of input, for the time depends on
it: ``start`` is orthonormal, ``near`` deviates from that by about one per cent, ``random`` is a
matrix of normal numbers.

The errors compare with float64: of the factor and of the gradient, relative, in the Frobenius norm;
``PᵀP - I`` is the largest entry. The maps of ``torch.nn.utils.parametrizations.orthogonal`` are
other functions than the polar factor, so only the last applies to them.

    python examples/benchmarks/polar.py --threads 2 --sizes 256x128 512x256
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from tqdm import tqdm

from table import format_table
from torchcap.projection.polar import polar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SIZES = ("16x8", "64x32", "128x64", "256x128", "512x256", "1024x512", "2048x1024")
BATCH = "12x256x128"
INPUTS = ("start", "near", "random")
MOST_REPEATS = 25
OURS = "torchcap"
HEADERS = ("device, size, input, way", "ms", "of ours", "factor", "gradient", "PᵀP - I")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    slow = Slowness(arguments.seconds)
    cases = [
        (device, size, kind)
        for device in arguments.device
        for size in [*arguments.sizes, *arguments.batch]
        for kind in arguments.inputs
    ]
    for device, size, kind in (progress := tqdm(cases, leave=False)):
        progress.set_description(f"{device} {size} {kind}")
        rows += measure(device, size, kind, slow)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), float32")
    print(format_table(HEADERS, rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", nargs="+", default=devices, help="default: all there are")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="channels x rank")
    parser.add_argument("--batch", nargs="*", default=[BATCH], help="matrices x channels x rank")
    parser.add_argument("--inputs", nargs="+", default=INPUTS, choices=INPUTS)
    parser.add_argument("--seconds", type=float, default=3.0, help="budget of each table cell")
    return parser.parse_args()


# --- the ways


@dataclass
class Way:
    """One way to an orthonormal matrix: forward and backward of it, and how long they took."""

    step: Callable[[], tuple[Tensor, Tensor]]  # returns the matrix and the gradient
    is_polar: bool
    seconds: list[float] = field(default_factory=list)


def through(function: Callable[[Tensor], Tensor], X: Tensor, G: Tensor) -> Callable:
    X = X.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        P = function(X)
        return P, torch.autograd.grad(P, X, G)[0]

    return step


def through_parametrization(kind: str, X: Tensor, G: Tensor) -> Callable:
    module = nn.Module()
    module.weight = nn.Parameter(polar(X))
    orthogonal(module, orthogonal_map=kind)
    free = module.parametrizations.weight.original

    def step() -> tuple[Tensor, Tensor]:
        P = module.weight
        return P, torch.autograd.grad(P, free, G)[0]

    return step


def product_of_singular_vectors(X: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def make_ways(X: Tensor, G: Tensor) -> dict[str, Callable[[], Way]]:
    """Return what makes each way; setting some of them up is slow already."""
    polars = {OURS: polar, "autograd of linalg.svd": product_of_singular_vectors}
    if hasattr(torch.linalg, "polar"):  # not in older versions; an SVD on a CPU
        polars["torch.linalg.polar"] = lambda matrix: torch.linalg.polar(matrix)[0]
    makers = {
        name: lambda function=function: Way(through(function, X, G), is_polar=True)
        for name, function in polars.items()
    }
    for kind in ("householder", "cayley", "matrix_exp"):
        makers[f"orthogonal, {kind}"] = lambda kind=kind: Way(
            through_parametrization(kind, X, G), is_polar=False
        )
    return makers


# --- measuring


@dataclass
class Slowness:
    """What each way took at the size before, to leave out cells that would not end in time."""

    budget: float
    last: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def too_slow(self, device: str, name: str, work: float) -> bool:
        seconds, before = self.last.get((device, name), (0.0, work))
        return seconds * work / before > self.budget

    def note(self, device: str, name: str, work: float, seconds: float) -> None:
        self.last[device, name] = seconds, work


def measure(device: str, size: str, kind: str, slow: Slowness) -> list[list[str]]:
    *batch, channels, rank = (int(number) for number in size.split("x"))
    X, G = make_input(kind, *batch, channels, rank)
    work = torch.Size(batch).numel() * channels**2 * rank
    factor, gradient = reference(X.double(), G.double())

    ways, errors, rows = {}, {}, []
    makers = make_ways(X.to(device), G.to(device))
    for name, make in makers.items():
        if slow.too_slow(device, name, work):
            continue
        way = ways[name] = make()
        found = [tensor.detach().cpu().double() for tensor in way.step()]
        errors[name] = describe_errors(found, (factor, gradient) if way.is_polar else None)
    take_turns(list(ways.values()), device, slow.budget)

    medians = {name: statistics.median(way.seconds) * 1e3 for name, way in ways.items()}
    for name, median in medians.items():
        slow.note(device, name, work, median / 1e3)
    for name in makers:
        cells = ["-"] * 5
        if name in ways:
            ratio = f"{medians[name] / medians[OURS]:.2f}" if OURS in ways else "-"
            cells = [f"{medians[name]:.3f}", ratio, *errors[name]]
        rows.append([f"{device}  {size:10}  {kind:6}  {name}", *cells])
    return rows


def make_input(kind: str, *shape: int) -> tuple[Tensor, Tensor]:
    X, G = torch.randn(shape), torch.randn(shape)
    if kind == "random":
        return X, G
    # Normal numbers of this size have a spectral norm of about one per cent.
    deviation = 0.01 * torch.randn(shape) / (shape[-2] ** 0.5 + shape[-1] ** 0.5)
    Q = torch.linalg.qr(X)[0]
    return (Q + deviation if kind == "near" else Q), G


def reference(X: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Return the polar factor and its gradient from an SVD, by the closed form."""
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    A = U.mT @ G @ Vh.mT
    Y = (A - A.mT) / (s[..., :, None] + s[..., None, :])
    normal = (G - U @ (U.mT @ G)) @ Vh.mT / s[..., None, :]
    return U @ Vh, (U @ Y + normal) @ Vh


def describe_errors(found: Sequence[Tensor], truth: Sequence[Tensor] | None) -> list[str]:
    relative = ["-", "-"]
    if truth is not None:
        pairs = zip(found, truth, strict=True)
        relative = [f"{float((a - b).norm() / b.norm()):.0e}" for a, b in pairs]
    P = found[0]
    uneven = (P.mT @ P - torch.eye(P.shape[-1], dtype=P.dtype)).abs().max()
    return [*relative, f"{float(uneven):.0e}"]


def take_turns(ways: list[Way], device: str, budget: float) -> None:
    """Fill in the seconds of each way; those over the budget repeat no more."""
    generator = random.Random(0)
    for _ in range(MOST_REPEATS):
        # Shuffled, or one way would always run with the caches that the same other one left.
        for way in generator.sample(ways, len(ways)):
            if way.seconds and sum(way.seconds) + max(way.seconds) > budget:
                continue
            synchronize(device)
            began = time.perf_counter()
            way.step()
            synchronize(device)
            way.seconds.append(time.perf_counter() - began)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
