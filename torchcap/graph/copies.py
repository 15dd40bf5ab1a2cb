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
from torch import Tensor, fx, nn
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
    for module in model.modules():
        other = memo.get(id(module))
        if isinstance(module, fx.GraphModule) and isinstance(other, nn.Module):
            for name in HOOKS:  # their copies have none
                getattr(other, name).update(getattr(module, name))
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


def _knows(value: Any, ours: set[int]) -> bool:
    """Whether a value is, or holds, a part of a model, as far as one looks in no time."""
    waiting, seen = deque([value]), set[int]()
    while waiting and len(seen) < _MOST_SEEN:
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


# --------------------------------------------------------------------------------------------------
# What a forward may leave behind outside of its model


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back, after a forward of a copy, what user code may have changed outside of the copy.

    These are the states of random number generators, torch's global settings, and the containers
    that functions of the model reach (``features = {}`` beside a hook, a helper's cache). Restoring
    needs no copy of the tensors; what is written into a tensor outside of the model stays written.
    """
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - what users seed
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    strict, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    kept = [(container, _entries(container)) for container in _reached_containers(model)]
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
            if torch.are_deterministic_algorithms_enabled() != strict:
                torch.use_deterministic_algorithms(strict)
            torch.backends.cudnn.benchmark = benchmark
            for container, before in kept:
                _restore_(container, before)


def _reached_containers(model: nn.Module) -> list[Any]:
    """Return the containers that functions of a model reach, by names, cells, defaults or objects.

    What libraries hold is left out, and of what is reached only so much is looked at.
    """
    waiting: deque[Any] = deque()
    for module in model.modules():
        waiting += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        waiting += [v for v in vars(module).values() if callable(v) and not isinstance(v, type)]
    waiting += {type(module): None for module in model.modules()}
    found: dict[int, Any] = {}
    seen = {id(module) for module in model.modules()}
    while waiting and len(seen) < _MOST_SEEN:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, _PLAIN):
            continue
        seen.add(id(value))
        if isinstance(value, _KEPT):
            found[id(value)] = value
        elif isinstance(getattr(value, "__dict__", None), dict) and not _is_library(value):
            found[id(value.__dict__)] = value.__dict__  # attributes of functions and objects
        waiting += _within(value)
    return list(found.values())


_MOST_SEEN = 5000
_PLAIN = (str, bytes, int, float, complex, bool, type(None), Tensor, nn.Module, types.ModuleType)
_LIBRARIES = (
    "torch",
    "torchcap",
    "torchvision",
    "timm",
    "numpy",
    "einops",
    "builtins",
    "collections",
    "abc",
)


def _within(value: Any) -> list[Any]:
    """Return what functions may reach through a value, if it is a user's own."""
    found: list[Any] = []
    if isinstance(value, dict | list | tuple | set | deque):
        items = dict.values(value) if isinstance(value, dict) else value
        found = list(items) if len(value) < _MOST_SEEN else []
    elif isinstance(value, types.MethodType):
        found = [value.__func__, value.__self__]
    elif isinstance(value, partial):
        found = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.FunctionType):
        found = [] if _of_a_library(value.__module__) else _reached_by(value)
    elif isinstance(value, type):
        own = [vars(base).values() for base in value.__mro__ if not _of_a_library(base.__module__)]
        found = [item for values in own for item in values]
    elif not _of_a_library(type(value).__module__):
        found = [type(value), *getattr(value, "__dict__", {}).values()]
    else:
        found = [getattr(value, "__wrapped__", None)]  # a function that functools has wrapped
    return found


def _is_library(value: Any) -> bool:
    is_function = isinstance(value, types.FunctionType)
    return _of_a_library(value.__module__ if is_function else type(value).__module__)


def _of_a_library(name: str | None) -> bool:
    return (name or "").partition(".")[0] in _LIBRARIES


def _reached_by(function: types.FunctionType) -> list[Any]:
    """Return what a function encloses, has as defaults, and names."""
    cells = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a cell that is empty
            cells.append(cell.cell_contents)
    names = [name for code in _codes(function.__code__) for name in code.co_names]
    spaces = [function.__globals__]
    spaces += [vars(v) for n in names if isinstance(v := spaces[0].get(n), types.ModuleType)]
    own = [space for space in spaces if not _of_a_library(space.get("__name__"))]
    named = [space[name] for space in own for name in names if name in space]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*cells, *named, *defaults, *vars(function).values()]


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
