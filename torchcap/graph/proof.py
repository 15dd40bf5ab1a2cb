"""The proof that comes with a reading: the graph runs, and gives what the model gives.

A copy of the model, with all parameters changed, and the graph run on the same random inputs: of
another batch size than the example, and of another image size where the model takes one. So no
constant hides in the graph, and no operator has been missed. Where a graph holds for the sizes of
the example alone, the forward is recorded for the others too, and both are read.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchcap.graph.copies import set_mode, shadow
from torchcap.graph.inputs import Inputs, flattened
from torchcap.graph.rewritten import Rewriting
from torchcap.graph.stand_ins import plain_transformers
from torchcap.graph.trace import GraphRunner, Traced, Tracer, Tracing, first_line
from torchcap.nests import cloned, mapped, tensors_in

Change = Callable[[nn.Module], object]
Changes = Mapping[str, Change]
"""How modules of a model are changed, by their names, in place."""

_MOST_KEPT = 2**26
"""Entries of module outputs that are kept for the comparison; further ones are not compared."""

_SEED = 20_190_616
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Proof:
    """What a proof has found.

    Attributes:
        graphs: recorded for other sizes, where the graph of the example does not hold for them.
        mismatch: where a graph computes something else than the model; None if none does.
        values: whether the forward looks at values for other sizes than those of the example, so
            that it has to be read on real tensors.
        missing: a sentence that says why nothing could be compared; None if something was.
        run: whether the model has been run.
    """

    graphs: tuple[Traced, ...] = ()
    mismatch: str | None = None
    values: bool = False
    missing: str | None = None
    run: bool = True

    @property
    def holds(self) -> bool:
        """Whether something was compared, and was the same."""
        return self.mismatch is None and self.missing is None


def prove(tracer: Tracer, tracing: Tracing, changes: Changes = MappingProxyType({})) -> Proof:
    """Run the evaluation graphs beside the model; the model is not changed.

    Args:
        tracer: has recorded the model.
        tracing: what it has recorded.
        changes: how modules will be changed.
    """
    whole = tracing.whole
    if whole is None:
        model = _changed(tracer.model, changes)
        return Proof(mismatch=_compare_pieces(model, tracer, tracing))
    if whole.strange is not None:
        return Proof(missing=f"not proven: {whole.strange}")
    model = probe(tracer, changes)
    if tracer.real:
        return Proof(mismatch=_compared(tracer, model, whole, tracer.inputs) or None)
    for inputs in other_inputs(tracer):
        mismatch = _compared(tracer, model, whole, inputs)
        if mismatch is None:  # the model is made for other sizes
            continue
        if not mismatch:
            return Proof()
        again = tracer.record(inputs=inputs).graphs[:1]  # none if the forward looks at values
        mismatch = None
        for graph in again:
            mismatch = _compared(tracer, model, graph, inputs) or None
        graphs = tuple(replace(graph, turned=True) for graph in again)
        return Proof(() if mismatch else graphs, mismatch, values=not again)
    return Proof(missing="not proven: the forward fails if all parameters are a bit different")


def _compared(tracer: Tracer, model: nn.Module, traced: Traced, inputs: Inputs) -> str | None:
    """Return where a graph computes something else than its model: "" for nowhere.

    None if the model does not run on the inputs.
    """
    names = set(traced.written()) | {name for name, _ in model.named_buffers()}
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    kept = [(held[name], held[name].clone()) for name in names & held.keys()]
    seen: dict[tuple[str, int], Tensor] = {}
    with _outputs_noted(model, traced, seen):
        expected = output_of(tracer, model, inputs)
    if expected is None:
        return None
    for tensor, before in kept:
        tensor.copy_(before)
    runner = _Comparison(model, traced, seen)
    try:
        found = _quietly(tracer, lambda: runner.run(*flattened(model, inputs)))
    except Exception as error:  # a constant of the example's sizes does not fit
        return runner.last + f" ({first_line(error)})"
    if runner.first is not None:
        return runner.first
    return "" if same(found, expected) else "the output"


def untrue(tracer: Tracer, rewritings: Iterable[Rewriting]) -> dict[str, str]:
    """Return the modules whose new forward does something else than theirs, with the reason.

    Both are given the same arguments, in both modes, in a forward on other sizes.

    Args:
        tracer: has recorded the model; it is not changed.
        rewritings: new forwards.
    """
    found: dict[str, str] = {}
    checks: list[tuple[str, _Check]] = []
    model = probe(tracer)
    for rewriting in rewritings:
        module = model.get_submodule(rewriting.module)
        check = _Check(rewriting.module_from(module), partial(found.setdefault, rewriting.module))
        checks.append((rewriting.module, check))
        module.register_forward_pre_hook(check.before, with_kwargs=True)
        module.register_forward_hook(check.after)
    for training in (False, True):
        set_mode(model, training=training)
        next((i for i in other_inputs(tracer) if output_of(tracer, model, i) is not None), None)
    never = {path: "it could not be compared with the old one" for path, c in checks if not c.count}
    return never | found


@dataclass(slots=True)
class _Check:
    """Runs a new forward beside that of its module, by hooks.

    Attributes:
        twin: the module with the new forward.
        report: is told what is wrong.
        expected: what the new forward put out, or how it failed.
        count: how often they were compared.
    """

    twin: nn.Module
    report: Callable[[str], Any]
    expected: list[Tensor] | str = ""
    count: int = 0

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.twin.training = module.training
        with torch.random.fork_rng(devices=()):
            try:
                given, named = cloned((args, kwargs))
                self.expected = [t.clone() for t in tensors_in(self.twin(*given, **named))]
            except Exception as error:  # whatever does not hold for other sizes
                self.expected = first_line(error)

    def after(self, module: nn.Module, _args: Any, output: Any) -> None:
        mode = "training" if module.training else "evaluation"
        self.count += 1
        if isinstance(self.expected, str):
            self.report(f"on other sizes it fails ({self.expected})")
        elif not same(list(tensors_in(output)), self.expected):
            self.report(f"it would compute something else in {mode} mode")


class _Comparison(GraphRunner):
    """Runs a graph, and compares what modules put out with what has been seen of them.

    Attributes:
        first: the first difference; None if there is none.
        last: the node that has run last.
    """

    def __init__(
        self, model: nn.Module, traced: Traced, seen: Mapping[tuple[str, int], Tensor]
    ) -> None:
        super().__init__(model, traced, keep=False)
        self.outputs, self.seen = traced.outputs, seen
        self.first: str | None = None
        self.last = "the first operator"

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        self.last = f"{n.name!r}, at {n.meta.get('where')}"
        result = super().run_node(n)
        for key in self.outputs.get(n, ()):
            expected = self.seen.get(key)
            if self.first is None and expected is not None and not same([result], [expected]):
                self.first = f"the output of {key[0]!r}"
        return result


@contextlib.contextmanager
def _outputs_noted(
    model: nn.Module, traced: Traced, seen: dict[tuple[str, int], Tensor]
) -> Iterator[None]:
    """Keep what some modules put out, for a while: those that follow each other in the graph."""
    wanted = {path for calls in traced.outputs.values() for path, _ in calls if path}
    count: Counter[str] = Counter()
    total = 0

    def note(path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, Tensor) and total < _MOST_KEPT:
            seen[path, count[path]] = output.clone()
            total += output.numel()
        count[path] += 1

    handles = [
        module.register_forward_hook(partial(note, path), prepend=True)
        for path, module in model.named_modules()
        if path in wanted
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probe(tracer: Tracer, changes: Changes = MappingProxyType({})) -> nn.Module:
    """Return a copy of a model, in evaluation mode, to run beside something else.

    Its floating-point tensors have other values, but where sizes follow values.

    Args:
        tracer: has recorded the model.
        changes: how modules of the copy are changed.
    """
    if tracer.real:
        return _in_evaluation(shadow(tracer.model, torch.clone), changes)
    return _changed(tracer.model, changes)


def output_of(tracer: Tracer, model: nn.Module, inputs: Inputs) -> list[Tensor] | None:
    """Return the tensors that a model puts out; None if it fails: it may be made for one size."""
    try:
        args, kwargs = cloned((inputs.args, dict(inputs.kwargs)))  # it may write into them
        return _quietly(tracer, partial(model, *args, **kwargs))
    except Exception:
        return None


def _changed(model: nn.Module, changes: Changes) -> nn.Module:
    """Return a copy in evaluation mode whose floating-point tensors have other values."""
    number = 0

    def other(tensor: Tensor) -> Tensor:
        nonlocal number
        number += 1
        if not tensor.is_floating_point() and not tensor.is_complex():
            return tensor.clone()
        return tensor * (1 + 0.01 * (number % 7 + 1))

    return _in_evaluation(shadow(model, lambda t: _like(t, other(t.detach()))), changes)


def _in_evaluation(model: nn.Module, changes: Changes) -> nn.Module:
    for path, change in changes.items():
        change(model.get_submodule(path))
    set_mode(model, training=False)
    return model


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=False)
    return value


def other_inputs(tracer: Tracer) -> Iterator[Inputs]:
    """Yield random inputs, first of other sizes: another batch and image, another batch.

    Where sizes follow values, these are those of the example alone.
    """
    inputs = tracer.inputs
    if tracer.real:
        yield inputs
        return
    tensors = list(tensors_in((inputs.args, inputs.kwargs)))
    if any(t.dim() >= 4 and t.is_floating_point() for t in tensors):
        yield _redrawn(inputs, batch=True, image=True)
    if any(t.dim() > 1 for t in tensors):
        yield _redrawn(inputs, batch=True)
    yield _redrawn(inputs)
    yield inputs  # it may refuse random values


def _redrawn(inputs: Inputs, *, batch: bool = False, image: bool = False) -> Inputs:
    """Return inputs of the same structure with random values, and perhaps other sizes."""
    generator = torch.Generator().manual_seed(_SEED)

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        shape = list(value.shape)
        if batch and value.dim() > 1:
            shape[0] = 2 if shape[0] != 2 else 1
        if image and value.dim() >= 4:
            shape[-2:] = [max(32, size * 3 // 4 // 32 * 32) for size in shape[-2:]]
        if not value.is_floating_point():
            rows = value.repeat(shape[0], *[1] * (value.dim() - 1)) if batch else value
            return rows[: shape[0]]
        drawn = torch.randn(shape, generator=generator)
        return drawn.to(device=value.device, dtype=value.dtype)

    args, kwargs = mapped((inputs.args, dict(inputs.kwargs)), other)
    return Inputs(args, kwargs)


def _quietly(tracer: Tracer, run: Callable[[], Any]) -> list[Tensor]:
    with (
        torch.inference_mode(mode=False),
        torch.no_grad(),
        tracer.surroundings.undisturbed(),
        plain_transformers(),
    ):
        torch.manual_seed(_SEED)
        return list(tensors_in(run()))


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors agree up to rounding, or are not numbers in the same places."""
    return len(found) == len(expected) and all(
        f.shape == e.shape and _close(f, e) for f, e in zip(found, expected, strict=True)
    )


def _close(found: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return bool(torch.equal(found, expected))
    scale = float(expected.double().nan_to_num(0, 0, 0).abs().amax()) if expected.numel() else 0.0
    return torch.allclose(
        found.double(), expected.double(), rtol=_TOLERANCE, atol=1e-6 + _TOLERANCE * scale,
        equal_nan=True,
    )  # fmt: skip


def _compare_pieces(model: nn.Module, tracer: Tracer, tracing: Tracing) -> str | None:
    """Return where a piece computes something else than its module does in a forward."""
    pieces = {t.piece: t for t in reversed(tracing.evaluations) if t.strange is None}
    for path, (given, expected) in _first_calls(tracer, model, pieces).items():
        piece = model.get_submodule(path)
        try:
            runner = GraphRunner(model, pieces[path], keep=False)
            found = _quietly(tracer, partial(runner.run, *flattened(piece, given)))
        except Exception:  # its sizes follow values
            continue
        shapes = [e.shape for e in expected]
        if [f.shape for f in found] == shapes and not same(found, expected):
            return f"the output of {path!r}"
    return None


def _first_calls(
    tracer: Tracer, model: nn.Module, paths: Iterable[str]
) -> dict[str, tuple[Inputs, list[Tensor]]]:
    """Return what a copy's modules are given, and what they put out, when they are called first.

    Nothing if the model does not run.
    """
    given: dict[str, Inputs] = {}
    calls: dict[str, tuple[Inputs, list[Tensor]]] = {}

    def before(path: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if path not in given:
            given[path] = Inputs(*cloned((args, dict(kwargs))))

    def after(path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if path not in calls:
            calls[path] = given[path], [tensor.clone() for tensor in tensors_in(output)]

    handles = []
    for path in paths:
        piece, seen = model.get_submodule(path), partial(before, path)
        handles.append(piece.register_forward_pre_hook(seen, with_kwargs=True))
        handles.append(piece.register_forward_hook(partial(after, path), prepend=True))
    try:
        args, kwargs = cloned((tracer.inputs.args, dict(tracer.inputs.kwargs)))
        _quietly(tracer, partial(model, *args, **kwargs))
    except Exception:  # with other weights it takes a way that fails
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return calls
