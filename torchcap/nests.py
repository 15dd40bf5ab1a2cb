"""Nested values: tensors inside of tuples, mappings, data classes and plain objects.

A forward may take and return any of these. They are walked in one way everywhere, so that what
reading, losses, closed forms and reports see of an output is the same list of tensors.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[str, Any]
"""One step into a nested value: ``("item", index or key)`` or ``("attribute", name)``."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in a nested value, in its own order."""
    for _, leaf in leaves_of(value):
        if isinstance(leaf, Tensor):
            yield leaf


def leaves_of(value: Any, path: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], Any]]:
    """Iterate over everything in a nested value that holds nothing else, with the way to it."""
    parts = _parts(value) if len(path) < _DEEPEST else None
    if parts is None:
        yield path, value
        return
    for key, part in parts:
        yield from leaves_of(part, (*path, key))


def mapped(value: Any, change: Callable[[Any], Any], depth: int = 0) -> Any:
    """Return a nested value with every leaf replaced by what ``change`` makes of it.

    Containers are copied, and keep their class; where no leaf changes, the value itself returns.
    """
    parts = _parts(value) if depth < _DEEPEST else None
    if parts is None:
        return change(value)
    found = [(key, part, mapped(part, change, depth + 1)) for key, part in parts]
    if all(new is old for _, old, new in found):
        return value
    if isinstance(value, slice):
        return slice(*(new for _, _, new in found))
    if isinstance(value, tuple):
        items = [new for _, _, new in found]
        return type(value)(*items) if hasattr(value, "_fields") else _tuple_like(value, items)
    if type(value) is list:
        return [new for _, _, new in found]
    twin = dict(value) if isinstance(value, MappingProxyType) else copy.copy(value)
    for (kind, name), _, new in found:
        if kind == "item":
            twin[name] = new
        else:
            object.__setattr__(twin, name, new)
    return twin


def cloned(value: Any) -> Any:
    """Return a nested value with clones of its tensors, for a function that may write into them."""
    return mapped(value, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def step_into(value: Any, key: Key) -> Any:
    """Return the part of a value that one step leads to."""
    return value[key[1]] if key[0] == "item" else getattr(value, key[1])


_DEEPEST = 12
"""How many levels are looked into: what is nested deeper, or in itself, is no output."""

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, Tensor)


def _parts(value: Any) -> list[tuple[Key, Any]] | None:
    """Return the parts of a value with the steps to them; None if it is a leaf."""
    if isinstance(value, (*_PLAIN, nn.Module, type)) or callable(value):
        return None
    if isinstance(value, Mapping):
        return [(("item", key), item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [(("item", index), item) for index, item in enumerate(value)]
    names = _names_in(value)
    if names is None:
        return None
    return [(("attribute", n), getattr(value, n)) for n in names if hasattr(value, n)]


def _names_in(value: Any) -> list[str] | None:
    """Return the attributes that are the parts of an object; None if it is a leaf."""
    if isinstance(value, slice):
        return ["start", "stop", "step"]
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    held = getattr(value, "__dict__", {})
    return list(held) if any(_holds_tensor(item) for item in held.values()) else None


def _holds_tensor(value: Any) -> bool:
    """Whether a value of an object's attribute is a tensor, or a container with one in sight."""
    if isinstance(value, Mapping):
        return any(isinstance(item, Tensor) for item in value.values())
    if isinstance(value, list | tuple):
        return any(isinstance(item, Tensor) for item in value)
    return isinstance(value, Tensor)


def _tuple_like(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    """Return a tuple of the same kind, as far as its class takes one iterable."""
    if type(value) is tuple:
        return tuple(items)
    try:
        return type(value)(items)
    except TypeError:  # a class with a constructor of its own
        return tuple(items)
