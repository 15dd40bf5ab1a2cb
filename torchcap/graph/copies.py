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
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from torchcap.errors import ModelError

M = TypeVar("M", bound=nn.Module)

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
"""Where a module keeps its forward hooks, and what it knows about them."""


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
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a user's class cannot copy
        raise ModelError(
            f"{type(model).__name__!r} cannot be copied ({type(error).__name__}: {error}); "
            "copy.deepcopy(model) has to work: replace torch.nn.utils.weight_norm by "
            "torch.nn.utils.parametrizations.weight_norm, for one"
        ) from error
    _copy_functions_(model, memo)
    return twin


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
            function = isinstance(value, types.FunctionType | types.MethodType | partial)
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


def _copied_function(function: Any, memo: dict[int, Any]) -> Any:
    """Return a function whose cells hold copies; what needs none is returned itself."""
    if isinstance(function, types.MethodType):
        owner = _copied_value(function.__self__, memo)
        return types.MethodType(_copied_function(function.__func__, memo), owner)
    if isinstance(function, partial):
        args = tuple(_copied_value(value, memo) for value in function.args)
        named = {name: _copied_value(value, memo) for name, value in function.keywords.items()}
        return partial(_copied_function(function.func, memo), *args, **named)
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


def _knows(value: Any, ours: set[int], depth: int = 6) -> bool:
    """Whether a value is, or holds, a part of a model."""
    if id(value) in ours or (isinstance(value, nn.Module | Tensor) or depth == 0):
        return id(value) in ours
    if isinstance(value, dict):
        held = list(dict.values(value))
    elif isinstance(value, list | tuple | set | deque):
        held = list(value)
    else:
        held = list(getattr(value, "__dict__", {}).values())
    return any(_knows(item, ours, depth - 1) for item in held)


# --------------------------------------------------------------------------------------------------
# What a forward may leave behind outside of its model


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back, after a forward of a copy, what user code may have changed outside of the copy.

    These are the states of random number generators, torch's global settings, and the containers
    that functions of the model name in their module (``features = {}`` beside a hook). Restoring
    needs no copy of the tensors.
    """
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - what users seed
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    kept = [(container, _entries(container)) for container in _named_containers(model)]
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if cuda else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)  # noqa: NPY002
            if torch.get_default_dtype() != dtype:
                torch.set_default_dtype(dtype)
            torch.set_grad_enabled(grad)
            for container, before in kept:
                _restore_(container, before)


def _named_containers(model: nn.Module) -> list[Any]:
    """Return the containers of modules' global names that functions of a model mention."""
    named: list[Any] = []
    for module in model.modules():
        named += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        named += [v for v in vars(module).values() if callable(v) and not isinstance(v, type)]
    found: dict[int, Any] = {}
    for kind in {type(module) for module in model.modules()}:
        named += _methods(kind)
        held = [value for base in kind.__mro__ for value in vars(base).values()]
        found |= {id(value): value for value in held if isinstance(value, _KEPT)}
    functions = {inner for value in named if (inner := _function_of(value)) is not None}
    for function in functions:
        for code in _codes(function.__code__):
            for name in code.co_names:
                value = function.__globals__.get(name)
                if isinstance(value, _KEPT):
                    found[id(value)] = value
    return list(found.values())


def _methods(kind: type) -> list[Any]:
    """Return the methods that a user's class defines; torch's own keep nothing."""
    return [
        value
        for base in kind.__mro__
        if not base.__module__.startswith(("torch.", "builtins"))
        for value in vars(base).values()
        if isinstance(value, types.FunctionType)
    ]


def _function_of(value: Any) -> types.FunctionType | None:
    while isinstance(value, types.MethodType | partial):
        value = value.__func__ if isinstance(value, types.MethodType) else value.func
    if not isinstance(value, types.FunctionType) and not isinstance(value, nn.Module):
        value = getattr(type(value), "__call__", None)  # noqa: B004  # the function, not whether
    return value if isinstance(value, types.FunctionType) else None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _entries(container: Any) -> list[Any]:
    """Return what a container holds, whatever its class makes of looking at it."""
    if isinstance(container, dict):
        return list(dict.items(container))
    kind = next(kind for kind in _CONTAINERS if isinstance(container, kind))
    return list(kind.__iter__(container))


def _restore_(container: Any, before: list[Any]) -> None:
    """Put a container's entries back, in place, if they are others now."""
    now = _entries(container)
    if isinstance(container, dict):
        pairs = [
            (part, other)
            for a, b in zip(now, before, strict=False)
            for part, other in zip(a, b, strict=True)
        ]
    else:
        pairs = list(zip(now, before, strict=False))
    if len(now) == len(before) and all(a is b for a, b in pairs):
        return
    if isinstance(container, dict):
        dict.clear(container)
        for key, value in before:
            dict.__setitem__(container, key, value)
        return
    kind = next(kind for kind in _CONTAINERS if isinstance(container, kind))
    kind.clear(container)
    (kind.update if kind is set else kind.extend)(container, before)


_CONTAINERS: tuple[Any, ...] = (list, set, deque)
_KEPT = (dict, *_CONTAINERS)


def forget_(tensors: Iterable[Tensor]) -> None:
    """Clear the caches of functions (``functools.lru_cache``) that hold some of the tensors."""
    wanted = {id(tensor) for tensor in tensors}
    if wanted:
        _clear_caches(lambda held: id(held) in wanted)


def forget_all_() -> None:
    """Clear the caches of functions that hold tensors: a recording shall see these being made."""
    _clear_caches(lambda held: issubclass(type(held), Tensor))


def _clear_caches(is_meant: Callable[[Any], bool]) -> None:
    for cache in gc.get_objects():
        if type(cache) is _CACHE and cache.cache_info().currsize and _reaches(cache, is_meant):
            cache.cache_clear()


_CACHE = type(functools.lru_cache(forget_))


def _reaches(holder: Any, is_meant: Callable[[Any], bool], depth: int = 5) -> bool:
    """Whether something is held by an object, or by the containers that it holds."""
    for held in gc.get_referents(holder):
        if is_meant(held):
            return True
        inner = isinstance(held, dict | list | tuple | set) or "lru_list" in type(held).__name__
        if depth and inner and _reaches(held, is_meant, depth - 1):
            return True
    return False
