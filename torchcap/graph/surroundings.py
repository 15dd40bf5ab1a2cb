"""What a forward may leave behind outside of its model, and how it is put back.

A copy of a model is run to be read and proven. Its forward is the user's code, and that may reach
beyond the copy: a hook fills a dictionary beside it, a helper counts its calls or keeps what it has
computed, noise is drawn from a generator of the user's own.
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import setitem
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from torchcap.graph.copies import CACHE, MOST_SEEN


class Surroundings:
    """What the functions and classes of a model reach outside of it, in the state in which it is.

    These are containers (``features = {}`` beside a hook, a helper's cache), objects, counters,
    generators, tensors and arrays, reached by names, cells, defaults or objects. What libraries
    hold is left out, and of what is reached only so much is looked at.

    Args:
        model: the original, of which copies are run.

    Attributes:
        undo: what puts things back.
        bypass: what lets caches of functions that hold something be neither asked nor filled.
    """

    def __init__(self, model: nn.Module) -> None:
        self.undo: list[Callable[[], object]] = []
        self.bypass: list[Callable[[], object]] = []
        self.waiting: deque[Any] = deque()
        self.copied = 0
        for module in model.modules():
            hooks = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
            held = (v for v in vars(module).values() if callable(v) and not isinstance(v, type))
            self.waiting += [*hooks, *held]
        self.waiting += [*_global_forward_hooks.values(), *_global_forward_pre_hooks.values()]
        self.waiting += {type(module): None for module in model.modules()}
        own = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
        seen: set[int] = set()
        while self.waiting and len(seen) < MOST_SEEN:
            value = self.waiting.popleft()
            if id(value) not in seen and id(value) not in own and not isinstance(value, _PLAIN):
                seen.add(id(value))
                self._look_at(value)
        self.waiting.clear()

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Put back, after a forward of a copy, what user code may have changed.

        That is all of this, the states of random number generators, and torch's global settings.
        """
        python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - users seed it
        dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
        strict = torch.are_deterministic_algorithms_enabled()
        benchmark = torch.backends.cudnn.benchmark
        cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = list(range(torch.cuda.device_count())) if cuda else []
        with torch.random.fork_rng(devices):
            try:
                for step in self.bypass:
                    step()
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
                for restore in self.undo:
                    with contextlib.suppress(Exception):  # a class may forbid to set its attributes
                        restore()

    def _look_at(self, value: Any) -> None:
        """Note how to put something back, and what is reached through it."""
        if isinstance(value, nn.Module):  # beside the model, a frozen network say
            self.undo.append(partial(_restore_, vars(value), _entries(vars(value))))
            self.undo.append(partial(_restore_, value._buffers, _entries(value._buffers)))
            self.waiting += [v for name, v in vars(value).items() if not name.startswith("_")]
            self.waiting += [*value._buffers.values(), *value.children()]
            return
        if isinstance(value, Tensor | np.ndarray):
            self.copied += int(np.prod(value.shape))
            restore = _array_restorer(value) if self.copied <= _MOST_COPIED else None
        else:
            restore = _restorer(value)
        if restore is not None:
            self.undo.append(restore)
        if isinstance(value, types.FunctionType):
            if not _of_a_library(value.__module__):
                self._look_into(value)
        elif isinstance(value, type):
            for base in value.__mro__:
                if not _of_a_library(base.__module__):
                    self.undo.append(partial(_restore_class_, base, dict(vars(base))))
                    self.waiting += vars(base).values()
                    for name, cache in _warm(vars(base)):
                        self.bypass.append(partial(setattr, base, name, cache.__wrapped__))
        else:
            self.waiting += _parts(value)

    def _look_into(self, function: types.FunctionType) -> None:
        """Note what a function encloses, has as defaults, and names."""
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is empty
                content = cell.cell_contents
                self.undo.append(partial(setattr, cell, "cell_contents", content))
                self.waiting.append(content)
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        globe = function.__globals__
        modules = [vars(v) for n in names if isinstance(v := globe.get(n), types.ModuleType)]
        for space in (globe, *modules):
            if not _of_a_library(space.get("__name__")):
                named = {name: space.get(name, _NOTHING) for name in names}
                self.undo.append(partial(_restore_names_, space, named))
                for name, cache in _warm(named):
                    self.bypass.append(partial(setitem, space, name, cache.__wrapped__))
                self.waiting += named.values()
        self.waiting += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        self.waiting += vars(function).values()


def _parts(value: Any) -> Iterable[Any]:
    """Return what an object holds that functions may reach through it."""
    if isinstance(value, dict | list | tuple | set | deque):
        items = dict.values(value) if isinstance(value, dict) else value
        return items if len(value) < MOST_SEEN else ()
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values()
    if not _of_a_library(type(value).__module__):
        return type(value), *getattr(value, "__dict__", {}).values()
    return (getattr(value, "__wrapped__", None),)  # a function that functools has wrapped


_PLAIN = (str, bytes, int, float, complex, bool, type(None), types.ModuleType)
_NAMESPACES = {"types", "argparse"}  # of the standard library, with objects of users' own
_LIBRARIES = {"torch", "torchcap", "torchvision", "timm", "numpy", "einops"} | (
    sys.stdlib_module_names - _NAMESPACES
)


def _of_a_library(name: object) -> bool:
    """Whether a module is a library's, by the ``__module__`` of what it defines."""
    if name is not None and not isinstance(name, str):  # of what C code defines
        return True
    return (name or "").partition(".")[0] in _LIBRARIES


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


# --------------------------------------------------------------------------------------------------
# How it is put back


def _restorer(value: Any) -> Callable[[], object] | None:
    """Return what puts an object back into its present state; None for what has none to keep."""
    if isinstance(value, (dict, *_CONTAINERS)):
        return partial(_restore_, value, _entries(value))
    for kind, (state, set_state) in _STATES.items():
        if isinstance(value, kind):
            return partial(set_state, value, state(value))
    owner = value if isinstance(value, types.FunctionType) else type(value)
    return None if _of_a_library(owner.__module__) else _object_restorer(value)


def _object_restorer(value: Any) -> Callable[[], object] | None:
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict):
        return partial(_restore_, held, _entries(held))
    slots = [name for base in type(value).__mro__ for name in _names(vars(base).get("__slots__"))]
    kept = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return partial(_restore_slots_, value, kept) if kept else None


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots or ())


def _array_restorer(value: Tensor | np.ndarray[Any, Any]) -> Callable[[], object] | None:
    if isinstance(value, np.ndarray):
        return partial(np.copyto, value, value.copy()) if value.flags.writeable else None
    if type(value) not in {Tensor, nn.Parameter} or value.is_inference():
        return None
    return partial(_restore_tensor_, value, value.detach().clone(), value._version)


_STATES: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], object]]] = {
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: (
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
}
_MOST_COPIED = 2**24
"""Entries of all tensors and arrays that are copied; what further ones hold is not put back."""
_MOST_COMPARED = 2**16
"""Entries of a tensor whose values are compared behind a forward."""
_NOTHING = object()
_CONTAINERS: tuple[Any, ...] = (list, set, deque)


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


def _restore_slots_(value: Any, before: Mapping[str, Any]) -> None:
    """Put back the attributes that an object has without a dictionary."""
    for name, old in before.items():
        if getattr(value, name, None) is not old:
            setattr(value, name, old)


def _restore_tensor_(tensor: Tensor, before: Tensor, version: int) -> None:
    """Put a tensor's values back, if it has been written into.

    What is written by ``tensor.data`` does not count as a new version.
    """
    if tensor._version != version or (
        before.numel() <= _MOST_COMPARED and not torch.equal(tensor, before)
    ):
        with torch.no_grad():
            tensor.detach().copy_(before)


def _restore_names_(space: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Put back what some names of a module stand for; what has been imported since stays."""
    for name, value in before.items():
        now = space.get(name, _NOTHING)
        if now is value or isinstance(now, types.ModuleType):
            continue
        if value is _NOTHING:
            del space[name]
        else:
            space[name] = value


def _restore_class_(kind: type, before: Mapping[str, Any]) -> None:
    """Put back the attributes of a class that are others now."""
    for name, value in dict(vars(kind)).items():
        if name not in before:
            delattr(kind, name)
        elif value is not before[name]:
            setattr(kind, name, before[name])


# --------------------------------------------------------------------------------------------------
# Caches of functions


def forget_(tensors: Iterable[Tensor]) -> bool:
    """Clear the caches of functions (``functools.lru_cache``) that hold some of the tensors.

    Returns:
        Whether there were any.
    """
    wanted = {id(tensor) for tensor in tensors}
    holders = [cache for cache in _caches() if _reaches(cache, wanted)] if wanted else []
    for cache in holders:
        cache.cache_clear()
    return bool(holders)


def _warm(names: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the caches among some names that hold something."""
    return [(n, v) for n, v in names.items() if type(v) is CACHE and v.cache_info().currsize]


def _caches() -> Iterator[Any]:
    """Yield the caches of functions that hold something, wherever they are."""
    for cache in gc.get_referrers(CACHE):
        if type(cache) is CACHE and cache.cache_info().currsize:
            yield cache


def _reaches(holder: Any, wanted: set[int], depth: int = 5) -> bool:
    """Whether some of the objects are held by another, or by the containers that it holds."""
    for held in gc.get_referents(holder):
        if id(held) in wanted:
            return True
        inner = isinstance(held, dict | list | tuple | set) or "lru_list" in type(held).__name__
        if depth and inner and _reaches(held, wanted, depth - 1):
            return True
    return False
