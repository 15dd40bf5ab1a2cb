"""Recording: a forward runs once, and what it does becomes an ``fx.Graph``.

A :class:`Recorder` is a mode in which every function and method of torch is seen, with the tensors
that it really gets. Modules with a rule are one operator each; others are read inside, call by
call, with their hooks. Tensors are known by identity, so a parameter is recognised wherever the
forward has it from, and what no operator has made is seen to be unknown.

Sizes keep where they come from (:mod:`torchcap.graph.sizes`), so that the graph computes them as
the forward does, for other batches and images too.
"""

from __future__ import annotations

import builtins
import contextlib
import math
import operator
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial, update_wrapper
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchcap.graph.calls import (
    SHOW_NOTHING,
    SHOW_VALUES,
    SIZES,
    assigned,
    canonical,
    follows_values,
)
from torchcap.graph.records import (
    Builder,
    Dimension,
    Entry,
    Frame,
    ModuleRun,
    Record,
    Seen,
    ValueRead,
)
from torchcap.graph.sizes import Formula, Place, Ratio, Shape, Size, true_value
from torchcap.graph.stand_ins import OPERATORS
from torchcap.graph.where import Where, here
from torchcap.nests import leaves_of, mapped, tensors_in

LeafRule = Callable[[nn.Module], bool]
NamedFunction = tuple[ModuleType, str, Callable[..., Any]]
CONSTANT = "_constant_of_the_recording_"
"""How names in a graph begin that stand for tensors which belong to no module."""
LOOKS_AT_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


class Recorder(TorchFunctionMode):
    """Records one forward of a model.

    Args:
        model: a copy, whose tensors may be fake; its forwards are wrapped while it records.
        owners: id of a parameter or buffer -> its place.
        is_leaf: which modules are one operator.
        unread: qualified names of the modules whose own forward is not read, but what they call.
        stand_ins: module class -> what runs in the place of its forward.
        functions: where Python functions are named that are one operator each.
        lies: keys of the sizes about which C is told another value.
        turned: places of comparisons whose outcome is turned round.
        longest: number of nodes after which a recording is broken off; None for no end.
        plain: whether sizes are plain integers, for forwards that tell kinds of integers apart.
    """

    def __init__(  # noqa: PLR0913 - what a recording may be told
        self,
        model: nn.Module,
        *,
        owners: Mapping[int, Place],
        is_leaf: LeafRule,
        unread: Collection[str] = (),
        stand_ins: Mapping[type[nn.Module], Callable[..., Any]] | None = None,
        functions: Collection[NamedFunction] = (),
        lies: Collection[tuple[Any, ...]] = (),
        turned: Collection[str] = (),
        longest: int | None = None,
        plain: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.owners, self.unread = model, owners, frozenset(unread)
        self.stand_ins, self.functions = stand_ins or {}, functions
        self.lies, self.turned = frozenset(lies), frozenset(turned)
        self.longest, self.plain = longest, plain
        self.record = Record()
        self.builder: Builder | None = None
        self.frames: list[str] = []
        self.calls: Counter[str] = Counter()
        self.hooked: set[int] = set()
        self.busy = 0  # how many operators deep: what runs inside of one is not seen
        self.paths = {id(m): path for path, m in model.named_modules()}
        self.leaves = {id(m) for path, m in model.named_modules() if is_leaf(m)}

    @property
    def here(self) -> str:
        """Qualified name of the module whose forward is running."""
        return self.frames[-1] if self.frames else ""

    # ----------------------------------------------------------------------------------------------
    # One forward

    def run_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Any]) -> Any:
        """Run the forward, and return what it gives.

        Args:
            args: of the forward, by position.
            kwargs: of the forward, by name.
            given: both, in the order of the graph's placeholders.
        """
        root = None if "" in self.unread else self._begin("", given)
        with self._wrapped(), self._watched(), self._replaced(), self:
            output = self.model(*args, **kwargs)
        if root is None:
            self._keep_all(output, "output of the model")
        else:
            self._end(root, output)
        return output

    def _begin(self, piece: str, given: Any) -> Builder:
        builder = Builder(piece)
        self.record.builders.append(builder)
        self.builder = builder
        for number, tensor in enumerate(tensors_in(given)):
            node = builder.graph.placeholder(f"input_{number}")
            self._describe(node, tensor)
            if builder.entry(tensor) is None:
                builder.know(tensor, node)
        return builder

    def _end(self, builder: Builder, output: Any) -> None:
        found = []
        for _, leaf in leaves_of(output):
            if isinstance(leaf, Tensor):
                found.append(self._node_of(builder, leaf))
            elif isinstance(leaf, Size | Ratio):
                node = self._node_of_size(builder, leaf)
                if isinstance(node, fx.Node):
                    builder.kept.setdefault(node, "output of the model")
        builder.end = builder.graph.output(tuple(found))

    @contextlib.contextmanager
    def _wrapped(self) -> Iterator[None]:
        """Let every module's forward tell when it begins and ends, for a while."""
        before: list[tuple[dict[str, Any], Any]] = []
        handles = []
        for path, module in self.model.named_modules():
            held, inner = vars(module), module.forward
            before.append((held, held.get("forward")))
            wrapper = partial(self._called, path, module, inner)
            held["forward"] = update_wrapper(wrapper, inner)
            handles.append(module.register_forward_pre_hook(self._note_hooked))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for held, forward in before:
                if forward is None:
                    held.pop("forward", None)
                else:
                    held["forward"] = forward

    def _note_hooked(self, module: nn.Module, _: Any) -> None:
        """Note that a module is called as such, so that hooks see it."""
        self.hooked.add(id(module))

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Note what forwards ask and change, and let some functions keep origins, for a while."""
        with (
            _patched(math, "sqrt", partial(_square_root, math.sqrt)),
            _patched(builtins, "len", partial(self._length, builtins.len)),
            _patched(torch, "is_grad_enabled", partial(self._grad_enabled, torch.is_grad_enabled)),
            _patched(nn.Module, "__getattribute__", self._getter(nn.Module.__getattribute__)),
            _patched(nn.Module, "__setattr__", self._setter(nn.Module.__setattr__)),
        ):
            yield

    def _length(self, plain: Callable[[Any], int], value: Any) -> int:
        """Return the length of anything; that of a tensor knows its origin."""
        if isinstance(value, Tensor) and not self.busy and value.dim() > 0:
            return self._shape(value)[0]
        return plain(value)

    def _setter(self, plain: Callable[[nn.Module, str, Any], None]) -> Callable[..., None]:
        def noted(module: nn.Module, name: str, value: Any) -> None:
            path = None if self.busy else self.paths.get(id(module))
            before = vars(module).get(name)
            if path is not None and not _is_alike(before, value):
                self._note_change(path, name)
            plain(module, name, value)

        return noted

    def _note_change(self, path: str, name: str) -> None:
        """Note that the running forward changes an attribute of a module."""
        self.record.changed.add(Place(path, name))
        for module in (path, self.here):
            self.record.moods.setdefault(module, f"it changes {str(Place(path, name))!r}")

    def _getter(self, plain: Callable[[nn.Module, str], Any]) -> Callable[[nn.Module, str], Any]:
        paths = self.paths

        def noted(module: nn.Module, name: str) -> Any:
            value = plain(module, name)
            if self.busy or name.startswith("_") or name == "forward":
                return value
            path = paths.get(id(module))
            if path is None or name not in plain(module, "__dict__"):
                return value
            return self._read(path, name, value)

        return noted

    def _read(self, path: str, name: str, value: Any) -> Any:
        """Note that the running forward reads an attribute of a module."""
        if name == "training":
            self.record.modal = True
            return value
        place = Place(path, name)
        self.record.reads.setdefault(place, set()).add(self.here)
        tracked = type(value) is int and self.builder is not None and not self.plain
        return self.size_at(place, value) if tracked else value

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        """Let the functions that are one operator be seen, for a while, wherever they are named."""
        with contextlib.ExitStack() as stack:
            for module, name, function in self.functions:
                seen = update_wrapper(partial(self._function, function), function)
                stack.enter_context(_patched(module, name, seen))
            yield

    def _function(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.busy:
            return function(*args, **kwargs)
        return self._run_function(function, args, kwargs)

    # ----------------------------------------------------------------------------------------------
    # Modules

    def _called(
        self,
        path: str,
        module: nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        seen_by_hooks = id(module) in self.hooked
        self.hooked.discard(id(module))
        if self.busy:
            output = forward(*args, **kwargs)
            self._note_run(path, args, kwargs, output)
            return output
        call = self.calls[path]
        self.calls[path] += seen_by_hooks
        outer = self.builder
        if fresh := outer is None and path not in self.unread:
            self._begin(path, (args, kwargs))
        builder = self.builder
        begun = None if builder is None else (builder.noted((args, kwargs)), builder.last())
        try:
            if path in self.unread or id(module) in self.leaves:
                output = self._run_whole(path, module, forward, args, kwargs)
            else:
                drawn, held = _random_state(), _containers(module)
                output = self._within(path, forward, args, kwargs)
                if drawn != _random_state():
                    self.record.moods.setdefault(path, "it draws random numbers of Python's")
                for name in _changed(module, held):
                    self._note_change(path, name)
                if builder is not None and begun is not None:
                    given, before = begun
                    frame = Frame(path, given, builder.noted(output), before, builder.last())
                    builder.frames.append(frame)
            self._note_run(path, args, kwargs, output)
            if builder is not None and seen_by_hooks and isinstance(output, Tensor):
                node = self._node_of(builder, output)
                builder.outputs.setdefault(node, []).append((path, call))
            if builder is not None and fresh:
                self._end(builder, output)
        finally:
            self.builder = outer
        return output

    def _run_whole(
        self,
        path: str,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a module that is one operator of the graph, or whose forward is not read."""
        builder, place = self.builder, here()
        asked: tuple[Any, Any] = (), {}
        if builder is not None:
            asked = self._argument(builder, args), self._argument(builder, kwargs)
        args, kwargs = mapped(args, true_value), mapped(kwargs, true_value)
        if path in self.unread:
            self.builder = None
            output = self._within(path, forward, args, kwargs)
            self._keep_all(output, f"put out by {path!r}")
        else:
            stand_in = self.stand_ins.get(type(module))
            run = forward if stand_in is None else partial(stand_in, module)
            with self._inside():
                output = run(*args, **kwargs)
        if builder is not None:
            self._append(builder, "call_module", path, *asked, output, place)
        return output

    def _within(
        self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the forward of a module, whose calls are looked at."""
        self.frames.append(path)
        try:
            return forward(*args, **kwargs)
        finally:
            self.frames.pop()

    def _note_run(self, path: str, args: Any, kwargs: Any, output: Any) -> None:
        with self._inside():
            seen = [mapped(part, _seen) for part in (args, kwargs, output)]
        self.record.ran.append(ModuleRun(path, *seen))

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    # ----------------------------------------------------------------------------------------------
    # Functions and methods

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.busy:
            return func(*args, **kwargs)
        name = func.__name__
        if name in _MOODS:
            self._note_mood(_MOODS[name])
        if name == "__get__":
            self._note_mood(_MOODS.get(func.__self__.__name__))
            return self._attribute(func, func.__self__.__name__, args[0])
        if name in SIZES and isinstance(args[0] if args else None, Tensor):
            return self._size(name, *args, **kwargs)
        if name in SHOW_NOTHING:
            return func(*mapped(args, true_value), **mapped(kwargs, true_value))
        return self._run_function(func, args, kwargs)

    def _note_mood(self, what: str | None) -> None:
        if what is not None:
            self.record.moods.setdefault(self.here, what)

    def _grad_enabled(self, plain: Callable[[], bool]) -> bool:
        """Return whether gradients are on, and note that somebody asks."""
        if not self.busy:
            self._note_mood("it asks whether gradients are on")
            self.record.graded = True
        return plain()

    def _run_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = here()
        if self.builder is None:
            self._note_outside((args, kwargs))
            asked: tuple[Any, Any] = (), {}
        else:
            asked = self._argument(self.builder, args), self._argument(self.builder, kwargs)
        plain_args, plain_kwargs = mapped(args, true_value), mapped(kwargs, true_value)
        shows = func.__name__ in SHOW_VALUES
        if torch.is_inference_mode_enabled():
            self._note_mood("it runs in inference mode")
        try:
            with self._inside():
                output = func(*plain_args, **plain_kwargs)
        except Exception as error:
            if shows or isinstance(error, LOOKS_AT_VALUES):
                self._note_value(func.__name__, place)
            raise
        if shows and not _is_fake(plain_args) and not _is_made(asked):
            self._note_value(func.__name__, place)
        if self.builder is not None and follows_values(func, plain_args):
            self.builder.strange = f"shapes follow values, at {place}"
        if self.builder is not None and _matters(args, kwargs, output):
            op, target, (args_asked, kwargs_asked) = canonical(func, *asked)
            if target is assigned or target is setattr:
                output = args[0]  # what is written to
            self._append(self.builder, op, target, args_asked, kwargs_asked, output, place)
            return None if target is assigned or target is setattr else output
        return output

    def unseen(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Note an operator of C that ran outside of every function that was seen."""
        if self.busy or self.builder is None or not _matters(args, kwargs, output):
            return
        with self._inside():
            asked = self._argument(self.builder, args), self._argument(self.builder, kwargs)
            op, target, (args, kwargs) = canonical(func, *asked)
            self._append(self.builder, op, target, args, kwargs, output, here())

    def _append(
        self,
        builder: Builder,
        op: str,
        target: Any,
        args: Any,
        kwargs: Any,
        output: Any,
        place: Where | None,
    ) -> fx.Node:
        if self.longest is not None and len(builder.graph.nodes) > self.longest:
            raise RecursionError(f"the forward has more than {self.longest} operators")
        node = builder.add(op, target, args, kwargs)
        node.meta["where"], node.meta["path"] = place, self.here
        node.meta["made"] = op != "call_module" and not _draws(target) and _is_made((args, kwargs))
        self._describe(node, output)
        for path, leaf in leaves_of(output):
            if isinstance(leaf, Tensor):
                builder.know(leaf, node, path)
        return node

    def _describe(self, node: fx.Node, value: Any) -> None:
        with self._inside():
            node.meta["val"] = mapped(value, _seen)

    def _note_value(self, name: str, place: Where | None) -> None:
        self.record.values.append(ValueRead(self.here, name, place))

    # ----------------------------------------------------------------------------------------------
    # Arguments

    def _argument(self, builder: Builder, value: Any) -> Any:
        """Return a nested argument with nodes in the place of tensors and sizes."""
        if isinstance(value, Tensor):
            return self._node_of(builder, value)
        if isinstance(value, Size | Ratio):
            return self._node_of_size(builder, value)
        if type(value) is dict:
            return {key: self._argument(builder, item) for key, item in value.items()}
        if type(value) in {list, tuple, Shape}:
            items = [self._argument(builder, item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return slice(*(self._argument(builder, part) for part in parts))
        return value if isinstance(value, fx.node.base_types) else self._taken_apart(builder, value)

    def _taken_apart(self, builder: Builder, value: Any) -> Any:
        """Return the tensors that an object of the user's own holds; else the object."""
        held = list(tensors_in(value))
        if not held:
            return value
        builder.strange = f"a {type(value).__name__} is handed on"
        return tuple(self._node_of(builder, tensor) for tensor in held)

    def _node_of(self, builder: Builder, tensor: Tensor) -> fx.Node:
        return self._entry(builder, tensor).at()

    def _entry(self, builder: Builder, tensor: Tensor) -> Entry:
        found = builder.entry(tensor)
        if found is not None:
            return found
        place = self.owners.get(id(tensor))
        if place is not None:
            return self._held(builder, tensor, place.path)
        for other in self.record.builders:
            known = other.entry(tensor) if other is not builder else None
            if known is not None:
                self._keep(known, f"used in the forward of {builder.piece!r} too")
                first = next(iter(builder.graph.nodes), None)
                with builder.graph.inserting_before(first):
                    node = builder.graph.placeholder(f"outside_{len(builder.entries)}")
                builder.strange = "it uses a tensor from outside"
                self._describe(node, tensor)
                return builder.know(tensor, node)
        name = f"{CONSTANT}{len(builder.constants)}"
        builder.constants[name] = tensor
        return self._held(builder, tensor, name)

    def _held(self, builder: Builder, tensor: Tensor, name: str) -> Entry:
        node = builder.held.get(name)
        if node is None:
            node = builder.held[name] = builder.add("get_attr", name, (), {})
            node.meta["path"] = self.here
            self._describe(node, tensor)
        return builder.know(tensor, node)

    def _keep(self, entry: Entry, reason: str) -> None:
        """Note that a tensor is used past the graph that it stands in."""
        entry.builder.kept.setdefault(entry.at(), reason)

    def _keep_all(self, value: Any, reason: str) -> None:
        """Note that the tensors in a value are used past the graphs that they stand in."""
        for tensor in tensors_in(value):
            for builder in self.record.builders:
                known = builder.entry(tensor)
                if known is not None:
                    self._keep(known, reason)

    def _note_outside(self, value: Any) -> None:
        """Note what the forward of a module that is not read does with what others hold."""
        reader = self.here
        for tensor in tensors_in(value):
            place = self.owners.get(id(tensor))
            if place is not None and place.module != reader:
                self.record.outside.setdefault(
                    place.module, f"a tensor of {place.module!r} is read in {reader!r}"
                )
        self._keep_all(value, f"used in the forward of {reader!r}")

    # ----------------------------------------------------------------------------------------------
    # Sizes

    def size_at(self, origin: Dimension | Place, value: int) -> Size:
        """Return an integer that knows its origin."""
        key = ("attribute", str(origin)) if isinstance(origin, Place) else origin.key
        return Size.of(value, origin, self, told=3 * value + 1 if key in self.lies else None)

    def _dimension(self, tensor: Tensor, dim: int | None) -> Dimension:
        assert self.builder is not None  # noqa: S101 - the callers have looked
        entry = self._entry(self.builder, tensor)
        if dim not in entry.dims:
            made = (entry.builder.piece, entry.node.name, entry.path)
            entry.dims[dim] = Dimension(entry, dim, (*made, dim), here())
            self.record.dimensions.append(entry.dims[dim])
        return entry.dims[dim]

    def _shape(self, tensor: Tensor) -> Any:
        with self._inside():
            sizes = tuple(tensor.shape)
        if self.builder is None:
            return torch.Size(sizes)
        if self.plain:
            args = (self._node_of(self.builder, tensor),)
            self._append(self.builder, "call_method", "size", args, {}, sizes, here())
            return torch.Size(sizes)
        return Shape(self.size_at(self._dimension(tensor, dim), n) for dim, n in enumerate(sizes))

    def _size(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if name in {"size", "__len__"}:
            dim = true_value(kwargs.get("dim", args[0] if args else None))
            shape = self._shape(tensor)
            return shape[0] if name == "__len__" else shape if dim is None else shape[dim]
        with self._inside():
            count = tensor.numel()
        if self.builder is None or self.plain:
            return count
        return self.size_at(self._dimension(tensor, None), count)

    def _attribute(self, func: Any, name: str, tensor: Tensor) -> Any:
        if name == "shape":
            return self._shape(tensor)
        with self._inside():
            value = func(tensor)
        if name not in SHOW_NOTHING and self.builder is not None and value is not None:
            args = (self._node_of(self.builder, tensor), name)
            self._append(self.builder, "call_function", getattr, args, {}, value, here())
        return value

    def _node_of_size(self, builder: Builder, size: Size | Ratio) -> Any:
        origin = size.origin
        if id(origin) in builder.sizes:
            return builder.sizes[id(origin)][1]
        if isinstance(origin, Dimension):
            if origin.entry.builder is not builder:
                self._keep(origin.entry, f"its size is used in {builder.piece!r}")
                return size.true
            name, rest = ("numel", ()) if origin.dim is None else ("size", (origin.dim,))
            node = builder.add("call_method", name, (origin.entry.at(), *rest), {})
        elif isinstance(origin, Place):
            node = builder.add("get_attr", origin.path, (), {})
            node.meta |= {"val": size.true, "place": origin}
            if origin.index is not None:
                node = builder.add("call_function", operator.getitem, (node, origin.index), {})
            node.meta["place"] = origin
        elif isinstance(origin, Formula):
            args = tuple(self._argument(builder, o) for o in origin.operands)
            node = builder.add("call_function", origin.operation, args, {})
        else:
            return size.true
        node.meta |= {"val": size.true, "where": here(), "path": self.here}
        builder.sizes[id(origin)] = origin, node
        return node

    def compared(
        self, operation: Callable[..., Any], operands: tuple[Any, ...], outcome: Any
    ) -> Any:
        """Take note of a comparison that the forward may branch on; return its outcome."""
        if self.busy or self.builder is None:
            return outcome
        place = here()
        with self._inside():
            args = tuple(self._argument(self.builder, o) for o in operands)
            if not any(isinstance(a, fx.Node) for a in args):
                return outcome
            node = self._append(self.builder, "call_function", operation, args, {}, outcome, place)
            node.meta["branch"] = True
        turned = str(place) in self.turned if self.turned else False
        self.record.branches.add(str(place))
        turned = turned and isinstance(outcome, bool) and any(map(_is_measured, operands))
        return not outcome if turned else outcome


class SeenByFakes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Fake tensors, which also tell a recorder what ran outside of the functions that it saw."""

    recorder: Recorder | None = None

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs or {})
        if self.recorder is not None:
            self.recorder.unseen(func, args, kwargs or {}, output)
        return output


class SeenByDispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The same for real tensors."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        stand_in = OPERATORS.get(str(func))
        run = func if stand_in is None else partial(stand_in, func)
        output = run(*args, **(kwargs or {}))
        self.recorder.unseen(func, args, kwargs or {}, output)
        return output


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let an attribute be another one for a while; it may have been patched by others too."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _is_alike(before: Any, value: Any) -> bool:
    """Whether an attribute is set to what it was; tensors are looked at elsewhere."""
    if before is value or isinstance(value, Tensor):
        return True
    if isinstance(before, tuple) and isinstance(value, tuple) and len(before) == len(value):
        return all(map(_is_alike, before, value))
    before, value = true_value(before), true_value(value)
    return (
        isinstance(value, bool | int | float | str)
        and type(before) is type(value)
        and (before == value)
    )


def _containers(module: nn.Module) -> dict[str, list[Any]]:
    """Return what the containers hold that are attributes of a module."""
    return {
        name: [*value.items()] if isinstance(value, dict) else [*value]
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, dict | list | set | deque)
    }


def _changed(module: nn.Module, before: dict[str, list[Any]]) -> Iterator[str]:
    """Yield the names of the containers of a module that hold something else by now."""
    for name, now in _containers(module).items():
        old = before.get(name, now)
        same = len(old) == len(now) and all(
            a is b or (isinstance(a, tuple) and all(x is y for x, y in zip(a, b, strict=False)))
            for a, b in zip(old, now, strict=True)
        )
        if not same:
            yield name


def _draws(target: Any) -> bool:
    """Whether an operator draws random numbers, which are others in every forward."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name.rstrip("_") in _DRAWS


_DRAWS = {
    "rand",
    "rand_like",
    "randn",
    "randn_like",
    "randint",
    "randint_like",
    "randperm",
    "bernoulli",
    "multinomial",
    "normal",
    "poisson",
    "uniform",
    "random",
    "exponential",
    "geometric",
    "cauchy",
    "log_normal",
}
_MOODS = {
    "dtype": "it asks for a dtype",
    "device": "it asks for a device",
    "is_cuda": "it asks for a device",
    "requires_grad": "it asks for gradients",
    "get_device": "it asks for a device",
    "type": "it asks for a dtype",
    "element_size": "it asks for a dtype",
    "is_floating_point": "it asks for a dtype",
    "_set_grad_enabled": "it turns gradients on or off",
    "_enter_autocast": "it changes the precision",
}
"""Functions and attributes that show or change what stands in no graph."""


def _random_state() -> int:
    """Return a number that changes when somebody draws from Python's or NumPy's generator."""
    numbers: Any = np.random.get_state()  # noqa: NPY002 - what users draw from
    return hash((random.getstate(), numbers[1].tobytes(), numbers[2:]))


def named_functions(functions: Collection[Callable[..., Any]]) -> list[NamedFunction]:
    """Return under which names some functions stand, in all modules of Python."""
    wanted = {id(function) for function in functions}
    found: list[NamedFunction] = []
    for module in list(sys.modules.values()) if wanted else ():
        names = getattr(module, "__dict__", {})
        if not wanted.isdisjoint(map(id, names.values())):
            found += [(module, n, v) for n, v in names.items() if id(v) in wanted]
    return found


def _square_root(plain: Callable[[Any], float], number: Any) -> Any:
    return number**0.5 if isinstance(number, Size | Ratio) else plain(number)


def _seen(value: Any) -> Any:
    return Seen(value) if isinstance(value, Tensor) else true_value(value)


def _is_fake(args: Any) -> bool:
    return any(hasattr(tensor, "fake_mode") for tensor in tensors_in(args))


def _is_made(arguments: Any) -> bool:
    """Whether arguments hold no tensor but those that are made of constants and sizes."""
    nodes = [leaf for _, leaf in leaves_of(arguments) if isinstance(leaf, fx.Node)]
    return all(
        node.meta.get("made")
        or not any(isinstance(v, Seen) for _, v in leaves_of(node.meta["val"]))
        for node in nodes
    )


def _is_measured(size: Any) -> bool:
    """Whether a size has been computed from those of tensors."""
    origin = getattr(size, "origin", None)
    if isinstance(origin, Formula):
        return any(map(_is_measured, origin.operands))
    return isinstance(origin, Dimension)


def _matters(args: Any, kwargs: Any, output: Any) -> bool:
    """Whether an operator reads tensors or sizes, or makes a tensor."""
    if any(True for _ in tensors_in(output)):
        return True
    given = (leaf for _, leaf in leaves_of((args, kwargs)))
    return any(isinstance(leaf, Tensor | Size | Ratio) for leaf in given)
