"""``compare()``: what a compressed model costs beside the original, counted and measured.

Convention: one multiply-add counts as one, and only convolutions and linear layers count, in one
evaluation forward on the example inputs: what fvcore reports for its operators ``conv`` and
``linear``. Transposed convolutions, and what is called as a function (the projections inside of
``nn.MultiheadAttention``), are not counted. Layers are counted while they run, so a model that
cannot be traced has a report too; where it can, the figures are those of :func:`torchcap.cost`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchcap.errors import ExampleInputsError, ModelError
from torchcap.graph.inputs import ExampleInputs, Inputs, as_inputs, default_inputs
from torchcap.graph.rules import COUNTED
from torchcap.graph.spaces import LayerCall
from torchcap.graph.weights import layer_calls
from torchcap.nests import cloned
from torchcap.plan.cost import LayerCost, costs_of_calls
from torchcap.training.relax import evaluating

_WARM_UP = 3
_CONVENTION = (
    "MACs: one multiply-add counts as one, in the layers listed alone (convolutions and linear "
    "layers), in one forward on the example inputs. FLOPs, where named so, are 2 x MACs."
)
_STATE = "State: the bytes of a safetensors file with all parameters and buffers, header included."
_PEAK = "Peak memory: the tensors that a forward on the example inputs makes, while they are alive."

# The names of safetensors, in the order in which tensors stand in its files.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Rows = list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Latency:
    """How long one forward takes, in milliseconds, over the repeats.

    Attributes:
        batch: number of images.
        median: half of the repeats took less.
        low, high: the quartiles: a quarter of the repeats took less than ``low``, and a quarter
            more than ``high``.
    """

    batch: int
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one model costs.

    Attributes:
        model: name of its class.
        layers: the convolutions and linear layers that run, in the order of their first calls.
        parameters: number of values in all parameters, norms and unused layers among them.
        state_bytes: size of a safetensors file with its parameters and persistent buffers, without
            metadata: the bytes of the tensors, a tensor of several names once, and the header.
        peak_memory: most bytes that are alive at once of the tensors which a forward makes; the
            inputs and the model are not in it. On CUDA what the allocator says, so the workspaces
            of kernels too; elsewhere counted operator by operator, without what one uses inside.
        latencies: one for each batch size.
    """

    model: str
    layers: tuple[LayerCost, ...]
    parameters: int
    state_bytes: int
    peak_memory: int
    latencies: tuple[Latency, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions and linear layers; one multiply-add counts as one."""
        return sum(layer.macs for layer in self.layers)

    @property
    def flops(self) -> int:
        """Twice the multiply-adds."""
        return 2 * self.macs

    @property
    def activations(self) -> int:
        """Number of values that convolutions write; linear layers are left out."""
        return sum(layer.activations for layer in self.layers if layer.kind == "conv")

    @property
    def conv_parameters(self) -> int:
        """Number of parameters of the convolutions that run."""
        return sum(layer.parameters for layer in self.layers if layer.kind == "conv")

    @property
    def linear_parameters(self) -> int:
        """Number of parameters of the linear layers that run."""
        return sum(layer.parameters for layer in self.layers if layer.kind == "linear")

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain dictionaries and lists, for JSON."""
        return {
            "model": self.model,
            "macs": self.macs,
            "parameters": self.parameters,
            "conv_parameters": self.conv_parameters,
            "linear_parameters": self.linear_parameters,
            "conv_activations": self.activations,
            "state_bytes": self.state_bytes,
            "peak_memory_bytes": self.peak_memory,
            "latencies_ms": [asdict(latency) for latency in self.latencies],
            "layers": [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers],
        }


@dataclass(frozen=True, slots=True)
class Report:
    """What a compressed model costs beside the original; ``print()`` shows it as tables.

    Multiply-adds count as one each, convolutions and linear layers alone.

    Attributes:
        model: the original.
        small: the compressed model.
        inputs: shape and type of the tensors that the forwards were given.
        device: where they ran, for example ``"cpu"`` or ``"cuda:0"``.
        threads: number of threads that PyTorch may use for one operator on the CPU.
        repeats: number of forwards behind each latency.
    """

    model: ModelCost
    small: ModelCost
    inputs: tuple[str, ...]
    device: str
    threads: int
    repeats: int

    @property
    def layers(self) -> tuple[tuple[LayerCost | None, LayerCost | None], ...]:
        """Every layer before and after, by its name; None in the model that has it not."""
        before = {layer.layer: layer for layer in self.model.layers}
        after = {layer.layer: layer for layer in self.small.layers}
        return tuple((before.get(name), after.get(name)) for name in {**before, **after})

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dictionaries and lists, for JSON."""
        return {
            "format": "torchcap-report",
            "version": 1,
            "convention": _CONVENTION,
            "inputs": list(self.inputs),
            "device": self.device,
            "threads": self.threads,
            "repeats": self.repeats,
            "model": self.model.to_dict(),
            "small": self.small.to_dict(),
        }

    def to_markdown(self) -> str:
        """Return the report as two tables in Markdown: of the models, and of their layers."""
        tables = ("\n".join(_markdown(rows)) for rows in (self._totals(), self._layer_rows()))
        return "\n\n".join([self._title(), *tables, "\n".join(f"- {n}" for n in self._notes())])

    def __str__(self) -> str:
        tables = ("\n".join(_aligned(rows)) for rows in (self._totals(), self._layer_rows()))
        return "\n\n".join([self._title(), *tables, "\n".join(self._notes())])

    def _title(self) -> str:
        threads = f" with {self.threads} thread(s)" if self.device == "cpu" else ""
        return f"{self.model.model} on {', '.join(self.inputs)}, {self.device}{threads}"

    def _totals(self) -> Rows:
        before, after = self.model, self.small
        figures = [
            ("MACs", before.macs, after.macs),
            ("parameters", before.parameters, after.parameters),
            ("parameters of convolutions", before.conv_parameters, after.conv_parameters),
            ("parameters of linear layers", before.linear_parameters, after.linear_parameters),
            ("activations of convolutions", before.activations, after.activations),
            ("state, bytes", before.state_bytes, after.state_bytes),
            ("peak memory, bytes", before.peak_memory, after.peak_memory),
        ]
        return [
            ("", "original", "small", "kept"),
            *((name, f"{a:,}", f"{b:,}", _kept(a, b)) for name, a, b in figures),
            *(
                (f"latency, batch of {a.batch}, ms", str(a), str(b), _kept(a.median, b.median))
                for a, b in zip(before.latencies, after.latencies, strict=True)
            ),
        ]

    def _layer_rows(self) -> Rows:
        figures = ("weight", "small", "MACs", "small", "kept", "parameters", "small")
        return [("layer", "kind", *figures), *(_layer_row(*pair) for pair in self.layers)]

    def _notes(self) -> Iterator[str]:
        yield from (_CONVENTION, _STATE, _PEAK)
        if self.model.latencies:
            yield f"Latency: median of {self.repeats} forwards, the models in turns (quartiles)."


def _layer_row(before: LayerCost | None, after: LayerCost | None) -> tuple[str, ...]:
    known = [layer for layer in (before, after) if layer is not None]

    def cells(of: Callable[[LayerCost], str]) -> list[str]:
        return ["-" if side is None else of(side) for side in (before, after)]

    return (
        known[0].layer or "(model)",
        known[0].kind,
        *cells(lambda layer: "x".join(map(str, layer.shape))),
        *cells(lambda layer: f"{layer.macs:,}"),
        _kept(before.macs, after.macs) if before is not None and after is not None else "-",
        *cells(lambda layer: f"{layer.parameters:,}"),
    )


def _kept(before: float, after: float) -> str:
    return f"{after / before:.1%}" if before else "-"


def _aligned(rows: Rows) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])


def _markdown(rows: Rows) -> Iterator[str]:
    header, *body = rows
    rule = ("---", *("---:" for _ in header[1:]))
    for row in (header, rule, *body):
        yield f"| {' | '.join(row)} |"


# --------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def compare(
    model: nn.Module,
    small: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 16),
    repeats: int = 20,
) -> Report:
    """Measure what a compressed model costs beside the original. The models are not changed.

    Both run in evaluation mode and without gradients, on the device of the example inputs; their
    modes are put back. Everything but the latencies is counted, and the same in every run (on CUDA
    the peak memory depends on the kernels that are chosen).

    Args:
        model: the original; any module that accepts the example inputs.
        small: the compressed model, of the same class or another.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments. May be left out for timm models with a ``pretrained_cfg`` and for
            torchvision's models. Costs are those of one forward on them.
        batch_sizes: how many images the timed forwards get: every tensor whose first dimension is
            that of the first one is repeated along it. Empty: nothing is timed.
        repeats: number of timed forwards of each model and batch size, after a few that are not.

    Returns:
        The figures of both models, in all and for each layer.

    Raises:
        ModelError: if the layers of a model cannot be counted: it is scripted, or has parameters
            without a shape.
        ExampleInputsError: if the example inputs are missing, cannot be repeated, or one of the
            models does not run on them.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        >>> report = compare(net, small, torch.zeros(1, 3, 8, 8), batch_sizes=())
        >>> report.model.macs, report.small.macs, report.small.parameters
        (12384, 6192, 260)

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, table 3: its FLOPs are ``flops``, its
        memory is ``activations / 4e6``.
    """
    _check(model, small, batch_sizes, repeats)
    inputs = default_inputs(model) if example_inputs is None else as_inputs(example_inputs)
    inputs = Inputs(*cloned((inputs.args, dict(inputs.kwargs))))  # a forward may write into them
    tensors = [leaf for leaf in tree_leaves(list(_values(inputs))) if isinstance(leaf, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    with evaluating(model), evaluating(small):
        costs = [_counted(each, inputs, device) for each in (model, small)]
        for batch in batch_sizes:
            timed = _latencies((model, small), _repeated(inputs, batch), device, repeats)
            costs = [
                replace(cost, latencies=(*cost.latencies, _latency(batch, milliseconds)))
                for cost, milliseconds in zip(costs, timed, strict=True)
            ]
    return Report(
        model=costs[0],
        small=costs[1],
        inputs=tuple(_described(tensor) for tensor in tensors),
        device=str(device),
        threads=torch.get_num_threads(),
        repeats=repeats,
    )


def _check(model: nn.Module, small: nn.Module, batch_sizes: Sequence[int], repeats: int) -> None:
    for each in (model, small):
        if not isinstance(each, nn.Module):
            raise ModelError(f"compare() takes two torch.nn.Modules; got {type(each).__name__!r}")
        for path, module in each.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ModelError(
                    f"{path or type(each).__name__!r} is scripted, so its layers cannot be "
                    "counted; compare what it was made from"
                )
        for name, parameter in each.named_parameters():
            if isinstance(parameter, UninitializedParameter):
                raise ModelError(f"{name!r} has no shape yet; run the model once before")
    if min([repeats, *batch_sizes]) < 1:
        raise ExampleInputsError(
            "repeats and every batch size must be at least 1; got "
            f"repeats={repeats}, batch_sizes={tuple(batch_sizes)}. With batch_sizes=() nothing is "
            "timed"
        )


def _counted(model: nn.Module, inputs: Inputs, device: torch.device) -> ModelCost:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return ModelCost(
        model=type(model).__name__,
        layers=costs_of_calls(_calls(model, inputs), shapes),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        state_bytes=_state_bytes(model),
        peak_memory=_peak_memory(model, inputs, device),
    )


def _run(model: nn.Module, inputs: Inputs) -> Any:
    try:
        return model(*inputs.args, **inputs.kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        lines = str(error).strip().splitlines()
        given = ", ".join(_described(v) for v in _values(inputs) if isinstance(v, Tensor))
        raise ExampleInputsError(
            f"{type(model).__name__!r} does not run on inputs of {given or 'no tensor'}: "
            f"{lines[0] if lines else type(error).__name__}; both models must accept the example "
            "inputs, on their device and at every batch size"
        ) from error


def _calls(model: nn.Module, inputs: Inputs) -> list[LayerCall]:
    """Run a model once and return the calls of its convolutions and linear layers."""
    calls: list[LayerCall] = []

    def note(path: str, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.extend(layer_calls(path, layer, args, kwargs, output))

    with contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            if isinstance(module, COUNTED):
                # Before the hooks of others, which may change what the layer gives.
                handle = module.register_forward_hook(
                    partial(note, path), prepend=True, with_kwargs=True
                )
                hooks.callback(handle.remove)
        _run(model, inputs)
    return calls


def _values(inputs: Inputs) -> Iterator[Any]:
    yield from inputs.args
    yield from inputs.kwargs.values()


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


# --------------------------------------------------------------------------------------------------
# Bytes


def _state_bytes(model: nn.Module) -> int:
    """Return the size of the safetensors file, as its format lays it out."""
    named: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):  # modules may put anything into their state
            named.setdefault(id(tensor), (name, tensor))
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, tensor in sorted(named.values(), key=lambda item: (_place(item[1]), item[0])):
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _DTYPES.get(tensor.dtype, str(tensor.dtype)),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end  # a length, the padded header, the tensors


def _place(tensor: Tensor) -> int:
    order = list(_DTYPES)
    return order.index(tensor.dtype) if tensor.dtype in order else len(order)


def _peak_memory(model: nn.Module, inputs: Inputs, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _run(model, inputs)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        _run(model, inputs)
    return live.peak


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the memory that operators have made, for as long as a tensor holds it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._bytes: WeakKeyDictionary[UntypedStorage, int] = WeakKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for storage in _storages((args, dict(kwargs or {}))):
            self._bytes.setdefault(storage, 0)  # was there before: a parameter, an input
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._bytes.setdefault(storage, storage.nbytes())  # no new one for views, in-place
        self.peak = max(self.peak, sum(self._bytes.values()))
        return result


def _storages(values: Any) -> Iterator[UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.layout is torch.strided:
            yield value.untyped_storage()


# --------------------------------------------------------------------------------------------------
# Time


def _repeated(inputs: Inputs, batch: int) -> Inputs:
    """Return inputs of another batch size, made of the examples one after the other."""
    sizes = [len(v) for v in _values(inputs) if isinstance(v, Tensor) and v.dim() and len(v)]
    if not sizes:
        raise ExampleInputsError(
            "no tensor among the example inputs has a batch dimension to repeat; pass images as "
            "one tensor, or batch_sizes=() to time nothing"
        )

    def repeat(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != sizes[0]:
            return value
        return torch.cat([value] * -(-batch // sizes[0]))[:batch]  # keeps the memory format

    args = tuple(map(repeat, inputs.args))
    return Inputs(args, {name: repeat(value) for name, value in inputs.kwargs.items()})


def _latencies(
    models: Sequence[nn.Module], inputs: Inputs, device: torch.device, repeats: int
) -> list[list[float]]:
    """Time the models in turns, so that a slow spell meets them all; milliseconds of each."""
    timed: list[list[float]] = [[] for _ in models]
    for turn in range(_WARM_UP + repeats):
        pairs = list(zip(models, timed, strict=True))
        for model, milliseconds in pairs if turn % 2 else reversed(pairs):
            elapsed = _elapsed(model, inputs, device)
            if turn >= _WARM_UP:
                milliseconds.append(elapsed)
    return timed


def _elapsed(model: nn.Module, inputs: Inputs, device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    _run(model, inputs)
    _wait_for(device)
    return 1e3 * (time.perf_counter() - start)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _latency(batch: int, milliseconds: Sequence[float]) -> Latency:
    low, median, high = map(float, np.percentile(milliseconds, (25, 50, 75)))
    return Latency(batch, median, low, high)
