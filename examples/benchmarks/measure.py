"""What the examples measure: accuracy, MACs, parameters, time, and how far outputs differ."""

from __future__ import annotations

import ctypes
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

with warnings.catch_warnings():  # fvcore's import calls torch.jit.script, which is deprecated
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import FlopCountAnalysis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

COUNTED = ("conv", "linear", "addmm", "matmul", "bmm")


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for the next allocation, as GPU allocators do.

    By default every large tensor is a fresh mapping, and its page faults are timed with it: on
    virtual machines they can take longer than the arithmetic. Returns whether glibc agreed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    no_mapping, no_trimming = (-4, 0), (-1, 2**31 - 1)
    return mallopt is not None and all(mallopt(*option) for option in (no_mapping, no_trimming))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, batch: int = 500) -> float:
    """Return the share of ``images`` that ``model`` classifies as ``labels`` say, in eval mode."""
    logits = outputs(model, images, batch=batch)
    return (logits.argmax(dim=1) == labels).double().mean().item()


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, *, batch: int = 500) -> Tensor:
    """Return the outputs of ``model`` in eval mode, batch by batch; its mode is put back."""
    was_training = model.training
    model.eval()
    try:
        return torch.cat([model(chunk) for chunk in images.split(batch)])
    finally:
        model.train(was_training)


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Return the multiply-adds (one each) of the convolutions and linear layers, in eval mode."""
    was_training = model.training
    model.eval()
    try:
        analysis = FlopCountAnalysis(model, example)
        analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False)
        by_operator = analysis.by_operator()
    finally:
        model.train(was_training)
    return int(sum(by_operator[name] for name in COUNTED))


def count_parameters(model: nn.Module) -> int:
    """Return the number of values in the parameters of ``model``."""
    return sum(parameter.numel() for parameter in model.parameters())


def largest_difference(value: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the largest absolute difference, and the same over the largest absolute reference."""
    absolute = (value.double() - reference.double()).abs().max().item()
    return absolute, absolute / reference.double().abs().max().item()


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call, over the repeats: the median and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ms ({self.low:.2f}-{self.high:.2f})"


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 2,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, Timing]:
    """Time every call once a round, in alternating order, so that a slow spell meets them all."""
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_index in progress(range(warmup + repeats)):
        order = list(calls) if round_index % 2 else list(reversed(calls))
        for name in order:
            start = time.perf_counter()
            calls[name]()
            elapsed = 1e3 * (time.perf_counter() - start)
            if round_index >= warmup:
                milliseconds[name].append(elapsed)
    return {name: _timing(values) for name, values in milliseconds.items()}


def latencies(
    models: Mapping[str, nn.Module],
    example: Tensor,
    *,
    repeats: int = 50,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, Timing]:
    """Time a forward of every model without gradients, interleaved; the models are in eval mode."""

    def forward(model: nn.Module) -> Callable[[], object]:
        return lambda: model(example)

    calls = {name: forward(model.eval()) for name, model in models.items()}
    with torch.inference_mode():
        return interleaved(calls, repeats=repeats, warmup=3, progress=progress)


def _timing(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)
