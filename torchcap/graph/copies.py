"""Copies of models that share nothing with the original but what they are told to share.

``copy.deepcopy`` copies what a module holds, and hands functions on as they are: a hook that writes
into a dictionary beside it (``def hook(m, i, o): features["a"] = o``) would write into the user's
own one from the copy too, and a forward that was replaced by a function around the old one would
run the old module. Here functions are copied with what they enclose.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from torchcap.errors import ModelError
from torchcap.nests import tensors_in

M = TypeVar("M", bound=nn.Module)

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
"""Where a module keeps its forward hooks, and what it knows about them."""

CACHE: Any = type(functools.lru_cache(copy.copy))
"""The class of functions that keep what they have returned."""

MOST_SEEN = 5000
"""Objects that are looked at when something is searched for among what a model reaches."""


def copied(model: M, memo: dict[int, Any] | None = None) -> M:
    """Return a deep copy of a model, with copies of what its hooks and patched methods enclose.

    Args:
        model: any module; it is not changed.
        memo: what stands in for which object (by its id), as for ``copy.deepcopy``.

    Raises:
        ModelError: if the model cannot be copied.
    """
    memo = {} if memo is None else memo
    for label, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(
                f"{label!r} has no shape yet (a lazy module); run the model once on example inputs"
            )
    memo |= ready_copies(model) | memo
    try:
        with without_collections():
            twin = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a user's class cannot copy
        raise ModelError(
            f"{type(model).__name__!r} cannot be copied ({type(error).__name__}: {error}), and "
            f"copy.deepcopy(model) has to work{_uncopied(model)}"
        ) from error
    for module in model.modules():
        other = memo.get(id(module))
        if isinstance(module, fx.GraphModule) and isinstance(other, nn.Module):
            for name in HOOKS:  # their copies have none
                getattr(other, name).update(getattr(module, name))
    _copy_functions_(model, memo)
    return twin


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Let Python collect no garbage for a while: many new objects would make it look at all."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _uncopied(model: nn.Module) -> str:
    """Return, in words, which attribute of a model cannot be copied by itself."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                copy.deepcopy(value, {id(part): part for part in model.modules()})
            except Exception:
                whose = f"of {path!r}" if path else f"of the {type(model).__name__!r} itself"
                return f": the attribute {name!r} {whose}, a {type(value).__name__}, cannot"
    return ""


def ready_copies(model: nn.Module) -> dict[int, Any]:
    """Return copies of what ``copy.deepcopy`` refuses, or takes most of its time for, by the id.

    It refuses tensors with a history, and every module has a dozen empty mappings.
    """
    ready: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) is OrderedDict and not value:
                ready[id(value)] = OrderedDict()
            for tensor in () if name.startswith("_") else tensors_in(value):
                if not tensor.is_leaf:
                    ready[id(tensor)] = tensor.detach()
    return ready


def shadow(model: M, stand_in: Callable[[Tensor], Tensor] | None = None) -> M:
    """Copy a model's structure; the copy's tensors share the memory of the original's.

    Args:
        model: any module.
        stand_in: makes what stands in the place of each parameter and buffer.

    Raises:
        ModelError: if the model cannot be copied.
    """
    memo = _shared(model)
    if stand_in is not None:
        memo = {key: stand_in(tensor) for key, tensor in memo.items()}
    return copied(model, memo)


def _shared(model: nn.Module) -> dict[int, Any]:
    """Return a tensor that shares memory with each parameter and buffer, by the id of that."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False)
        for p in model.parameters()
        if not isinstance(p, UninitializedParameter)
    }
    memo.update({id(buffer): buffer.detach() for buffer in model.buffers()})
    return memo


def running(model: M, own: Collection[str] = ()) -> M:
    """Return a copy to run in evaluation mode, whose parameters share the original's memory.

    Args:
        model: any module; what a forward of the copy writes into buffers does not reach it.
        own: names of the parameters that forwards write into, which the copy has for itself.
    """
    copied_ones = {id(parameter) for n, parameter in model.named_parameters() if n in own}
    copied_ones |= {id(buffer) for buffer in model.buffers()}
    memo = {key: value for key, value in _shared(model).items() if key not in copied_ones}
    twin = copied(model, memo)
    set_mode(twin, training=False)
    return twin


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Set the mode flags, without calling a ``train()`` that a user has overridden."""
    for module in model.modules():
        module.training = training


# --------------------------------------------------------------------------------------------------
# Functions and what they enclose


def _copy_functions_(model: nn.Module, memo: dict[int, Any]) -> None:
    """Give every module of a copy its own functions, where the original has functions in place."""
    for module in model.modules():
        twin = memo.get(id(module))
        if not isinstance(twin, nn.Module) or twin is module:
            continue
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks: OrderedDict[int, Any] = getattr(module, name)
            for key, hook in hooks.items():
                if key in getattr(twin, name):
                    getattr(twin, name)[key] = _copied_function(hook, memo)
        for name, value in vars(module).items():
            function = isinstance(value, types.FunctionType | types.MethodType | partial | CACHE)
            if function and twin.__dict__.get(name) is not None:  # compiled calls are not copied
                twin.__dict__[name] = _copied_function(value, memo)


def hand_over_(twin: nn.Module, model: nn.Module) -> None:
    """Let the functions of a copy write where those of the original do, in place.

    Until then they write into containers of the copy's own. Hooks of a model that is given to the
    user shall fill the user's ``features`` again. What holds parts of the model stays a copy.

    Args:
        twin: a copy; it may have lost modules, and hooks.
        model: the original.
    """
    others = dict(twin.named_modules(remove_duplicate=False))
    memo: dict[int, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path in others:
            memo[id(module)] = others[path]
            for held in ("_parameters", "_buffers"):
                own = getattr(others[path], held)
                tensors = {n: t for n, t in getattr(module, held).items() if t is not None}
                for name, tensor in tensors.items():
                    memo |= {id(tensor): own[name]} if own.get(name) is not None else {}
            for name, value in vars(module).items():  # a dictionary that a hook fills
                if name in vars(others[path]) and isinstance(value, dict | list | set | deque):
                    memo[id(value)] = vars(others[path])[name]
    ours = {id(part) for part in (*model.parameters(), *model.buffers(), *model.modules())}
    _copy_functions_(model, _Sharing(memo, ours | memo.keys()))


class _Sharing(dict[int, Any]):
    """What stands for which object, where all that knows nothing of the model is shared."""

    def __init__(self, memo: dict[int, Any], ours: set[int]) -> None:
        super().__init__(memo)
        self.ours = ours


def _copied_function(function: Any, memo: dict[int, Any]) -> Any:  # noqa: PLR0911 - a kind each
    """Return a function whose cells hold copies; what needs none is returned itself."""
    if isinstance(function, types.MethodType):
        owner = _copied_value(function.__self__, memo)
        return types.MethodType(_copied_function(function.__func__, memo), owner)
    if isinstance(function, partial):
        args = tuple(_copied_value(value, memo) for value in function.args)
        named = {name: _copied_value(value, memo) for name, value in function.keywords.items()}
        return partial(_copied_function(function.func, memo), *args, **named)
    if isinstance(function, CACHE):  # what it has kept is of the original
        inner = _copied_function(function.__wrapped__, memo)
        return functools.lru_cache(**function.cache_parameters())(inner)
    if not isinstance(function, types.FunctionType):
        return _copied_value(function, memo)
    if id(function) in memo:
        return memo[id(function)]
    if not function.__closure__ and not function.__defaults__ and not function.__kwdefaults__:
        return function
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    twin = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, None, cells
    )
    memo[id(function)] = twin
    twin.__dict__.update(function.__dict__)
    twin.__qualname__, twin.__doc__ = function.__qualname__, function.__doc__
    twin.__module__ = function.__module__
    if function.__defaults__ is not None:
        twin.__defaults__ = tuple(_copied_value(v, memo) for v in function.__defaults__)
    if function.__kwdefaults__ is not None:
        named = function.__kwdefaults__
        twin.__kwdefaults__ = {n: _copied_value(v, memo) for n, v in named.items()}
    for cell, old in zip(cells, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that is empty
            cell.cell_contents = _copied_value(old.cell_contents, memo)
    return twin


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of what a function encloses; what cannot be copied is handed on."""
    if isinstance(value, types.FunctionType | types.MethodType | partial):
        return _copied_function(value, memo)
    if isinstance(value, type | types.ModuleType):
        return value
    if isinstance(memo, _Sharing) and not _knows(value, memo.ours):
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a file, a lock, a generator: it is the user's own in the copy too
        return value


def _knows(value: Any, ours: set[int]) -> bool:
    """Whether a value is, or holds, a part of a model, as far as one looks in no time."""
    waiting, seen = deque([value]), set[int]()
    while waiting and len(seen) < MOST_SEEN:
        item = waiting.popleft()
        if id(item) in ours:
            return True
        if id(item) in seen or isinstance(item, nn.Module | Tensor):
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            waiting += dict.values(item)
        elif isinstance(item, list | tuple | set | deque):
            waiting += item
        else:
            waiting += getattr(item, "__dict__", {}).values()
    return False
