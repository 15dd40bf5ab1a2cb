"""Sizes that a forward reads from its modules: ``self.head_dim`` and the like.

While a forward is traced, every integer that a module holds is a :class:`Size`, which knows where
it comes from. So a reshape shows which attribute says how many channels there are, and that
attribute is set when they become fewer. Any other use of a size (arithmetic, a comparison, a
branch) could not follow: it *pins* the size, and what it counts stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from torch import nn


@dataclass(frozen=True, slots=True)
class Place:
    """Where a size is held.

    Attributes:
        module: qualified name of the module, ``""`` for the model itself.
        name: of the attribute.
        index: of the size in the attribute, where that is a list or tuple of sizes.
    """

    module: str
    name: str
    index: int | None = None

    def get(self, model: nn.Module) -> int:
        """Return the size."""
        value: Any = getattr(model.get_submodule(self.module), self.name)
        return int(value if self.index is None else value[self.index])

    def set(self, model: nn.Module, size: int) -> None:
        """Replace the size."""
        owner = model.get_submodule(self.module)
        value: Any = size
        if self.index is not None:
            value = list(getattr(owner, self.name))
            value[self.index] = size
            value = type(getattr(owner, self.name))(value)
        setattr(owner, self.name, value)

    def __str__(self) -> str:
        index = "" if self.index is None else f"[{self.index}]"
        return f"{self.module}.{self.name}{index}" if self.module else f"{self.name}{index}"


class Size(int):
    """An integer that remembers which attributes it is the product of.

    Attributes:
        places: of its factors that are attributes.
        times: its other factor, a constant.
        pinned: attributes that are used in a way which could not follow a change; one set for all
            sizes of a trace.
    """

    places: tuple[Place, ...]
    times: int
    pinned: set[Place]

    @classmethod
    def of(cls, value: int, places: tuple[Place, ...], times: int, pinned: set[Place]) -> Self:
        """Make a size."""
        size = cls(value)
        size.places, size.times, size.pinned = places, times, pinned
        return size

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Size):
            places, times = (*self.places, *other.places), self.times * other.times
        elif type(other) is int:
            places, times = self.places, self.times * other
        else:
            return self._pin(int.__mul__, other)
        return Size.of(int.__mul__(self, other), places, times, self.pinned)

    __rmul__ = __mul__

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Any:
        return int, (self.plain,)

    @property
    def plain(self) -> int:
        """The integer alone."""
        return int.__pos__(self)

    def _pin(self, operation: Callable[..., Any], *others: Any) -> Any:
        for size in (self, *others):
            if isinstance(size, Size):
                self.pinned.update(size.places)
        return operation(self.plain, *(o.plain if isinstance(o, Size) else o for o in others))

    def __hash__(self) -> int:
        self.pinned.update(self.places)  # a set or mapping that it is looked up in
        return int.__hash__(self)


def _pinning(name: str) -> Callable[..., Any]:
    operation = getattr(int, name)

    def pinning(self: Size, *others: Any) -> Any:
        return self._pin(operation, *others)

    return pinning


for _name in (
    "__add__", "__radd__", "__sub__", "__rsub__", "__floordiv__", "__rfloordiv__", "__truediv__",
    "__rtruediv__", "__mod__", "__rmod__", "__divmod__", "__rdivmod__", "__pow__", "__rpow__",
    "__neg__", "__pos__", "__abs__", "__round__", "__ceil__", "__floor__", "__trunc__",
    "__str__", "__format__", "__float__", "__int__", "__index__", "__bool__", "__eq__", "__ne__",
    "__lt__", "__le__", "__gt__", "__ge__", "__lshift__", "__rshift__", "__and__", "__or__",
    "__xor__",
):  # fmt: skip
    setattr(Size, _name, _pinning(_name))


@contextlib.contextmanager
def reads_noted(model: nn.Module, note: Callable[[Place], None]) -> Iterator[None]:
    """Note, for a while, which attributes are read of a model's modules: their sizes and settings.

    Tensors and submodules are no such attributes; neither is what begins with an underscore.
    """
    paths = {id(module): path for path, module in model.named_modules()}

    def noted(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        path = paths.get(id(module))
        held = not name.startswith("_") and name not in {"training", "forward"}
        if path is not None and held and name in object.__getattribute__(module, "__dict__"):
            note(Place(path, name))
        return value

    nn.Module.__getattribute__ = noted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__


def track_sizes_(model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> set[Place]:
    """Let every integer that a module holds remember where it comes from, in place.

    Modules that are read as one operator keep theirs: their rules know them.

    Returns:
        the places that get pinned, from now on.
    """
    pinned: set[Place] = set()
    for path, module in model.named_modules():
        for name, value in () if is_leaf(module) else list(vars(module).items()):
            if type(value) is int:
                vars(module)[name] = Size.of(value, (Place(path, name),), 1, pinned)
            elif type(value) in {list, tuple} and all(type(size) is int for size in value):
                sizes = (
                    Size.of(size, (Place(path, name, index),), 1, pinned)
                    for index, size in enumerate(value)
                )
                vars(module)[name] = type(value)(sizes)
    return pinned
