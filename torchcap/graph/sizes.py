"""Sizes that remember where they come from.

While a forward is recorded, ``x.shape`` gives integers that know the tensor and the dimension, and
the integers that a module holds (``self.head_dim``) know their attribute. Arithmetic with them
makes integers that know their formula. To torch and to Python all of them are plain ``int``.

A comparison of sizes decides the way that a forward takes, so it is reported to the recorder. What
C makes of a size leaves no trace (``range(n)``, ``int(n)``, ``[0] * n``): a second recording, whose
sizes *lie* to C and to nobody else, shows whether the forward depends on it.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Place:
    """Where a size is held.

    Attributes:
        module: qualified name of the module, ``""`` for the model itself.
        name: of the attribute.
        index: of the size in the attribute, where that is a list or tuple of sizes.
        new: the size, where the module holds it only once its forward is rewritten.
    """

    module: str
    name: str
    index: int | None = None
    new: int | None = None

    def get(self, model: nn.Module) -> int:
        """Return the size."""
        value: Any = getattr(model.get_submodule(self.module), self.name, self.new)
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

    @property
    def path(self) -> str:
        """Qualified name of the attribute."""
        return f"{self.module}.{self.name}" if self.module else self.name

    def __str__(self) -> str:
        return self.path if self.index is None else f"{self.path}[{self.index}]"


class Witness(Protocol):
    """Who is told what a forward does with its sizes."""

    def compared(
        self, operation: Callable[..., Any], operands: tuple[Any, ...], outcome: Any
    ) -> Any:
        """Take note of a comparison that the forward may branch on; return its outcome."""


@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """How a size was computed from others.

    Attributes:
        operation: of the ``operator`` module, or ``math``.
        operands: sizes and plain numbers.
    """

    operation: Callable[..., Any]
    operands: tuple[Any, ...]


class _Sized:
    """What sizes of both kinds share: a true value, an origin, and who is told.

    Attributes:
        true: the value that arithmetic and comparisons go by.
        origin: where it comes from: a :class:`Place`, a :class:`Formula`, or what the witness has
            put there (a dimension of a tensor).
        witness: is told of comparisons.
    """

    true: Any
    origin: Any
    witness: Witness

    @classmethod
    def of(cls, true: Any, origin: Any, witness: Witness, *, told: Any = None) -> Self:
        """Make a size.

        Args:
            true: its value.
            origin: where it comes from.
            witness: is told of comparisons.
            told: what C is told instead of the value, in a recording that lies.
        """
        size: Self = cls.__new__(cls, true if told is None else told)  # type: ignore[call-arg]
        size.true, size.origin, size.witness = true, origin, witness
        return size

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.true

    def __copy__(self) -> Any:
        return self.true

    def __reduce__(self) -> Any:
        return type(self.true), (self.true,)

    def __hash__(self) -> int:
        if _caller_is_einops():  # keeps recipes by shape, unless shapes cannot be hashed
            raise TypeError(f"unhashable type: {type(self).__name__!r}")
        return hash(self.told)  # what is found by it is compared

    @property
    def told(self) -> Any:
        """What C sees."""
        return type(self.true)(super().__pos__())  # type: ignore[misc]


class Size(_Sized, int):
    """An integer that remembers where it comes from."""


class Ratio(_Sized, float):
    """A number computed from sizes that is no integer (``n ** 0.5``, ``h / 2``)."""


def true_value(value: Any) -> Any:
    """Return a number without its origin."""
    return value.true if isinstance(value, _Sized) else value


def computed(operation: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    """Apply an operation to sizes and numbers; the result remembers its formula."""
    result = operation(*map(true_value, operands))
    witness = next(o.witness for o in operands if isinstance(o, _Sized))
    if type(result) is int:
        kind: type[_Sized] = Size
    elif type(result) is float:
        kind = Ratio
    else:
        return result
    told = None
    if any(isinstance(o, _Sized) and o.told != o.true for o in operands):
        told = _lie(operation, operands)
    return kind.of(result, Formula(operation, operands), witness, told=told)


def _lie(operation: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    try:
        return operation(*(o.told if isinstance(o, _Sized) else o for o in operands))
    except (ArithmeticError, ValueError):
        return None


def _caller_is_einops() -> bool:
    frame = sys._getframe(2)
    return frame.f_globals.get("__name__", "").startswith("einops.")


def _arithmetic(name: str, operation: Callable[..., Any], *, swapped: bool = False) -> Any:
    plain: dict[type, Any] = {kind: getattr(kind, name, None) for kind in (int, float)}

    def method(self: _Sized, *others: Any) -> Any:
        if not all(type(o) in {int, float, bool} or isinstance(o, _Sized) for o in others):
            kind = int if isinstance(self, int) else float
            return plain[kind](self.true, *others)  # NotImplemented: the other side's turn
        operands = (*others, self) if swapped else (self, *others)
        return computed(operation, operands)

    return method


def _comparison(name: str, operation: Callable[..., Any]) -> Any:
    def method(self: _Sized, other: Any) -> Any:
        if not (type(other) in {int, float, bool} or isinstance(other, _Sized)):
            return getattr(type(self.true), name)(self.true, other)
        outcome = operation(self.true, true_value(other))
        return self.witness.compared(operation, (self, other), outcome)

    return method


def _truth(self: _Sized) -> bool:
    return bool(self.witness.compared(operator.ne, (self, 0), self.true != 0))


def _rounding(operation: Callable[..., Any]) -> Any:
    def method(self: _Sized, *digits: Any) -> Any:
        return computed(operation, (self, *digits))

    return method


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "truediv": operator.truediv, "mod": operator.mod, "pow": operator.pow,
    "lshift": operator.lshift, "rshift": operator.rshift, "and": operator.and_,
    "or": operator.or_, "xor": operator.xor,
}  # fmt: skip
_BITS = {"lshift", "rshift", "and", "or", "xor"}

_ROUNDINGS: dict[str, Any] = {
    "ceil": math.ceil, "floor": math.floor, "trunc": math.trunc, "round": round,
}  # fmt: skip

_kind: Any
for _kind in (Size, Ratio):
    for _name, _operation in _ARITHMETIC.items():
        if _kind is Ratio and _name in _BITS:
            continue
        setattr(_kind, f"__{_name}__", _arithmetic(f"__{_name}__", _operation))
        setattr(_kind, f"__r{_name}__", _arithmetic(f"__r{_name}__", _operation, swapped=True))
    for _name in ("neg", "pos", "abs"):
        setattr(
            _kind, f"__{_name}__", _arithmetic(f"__{_name}__", getattr(operator, f"__{_name}__"))
        )
    for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(_kind, f"__{_name}__", _comparison(f"__{_name}__", getattr(operator, _name)))
    _kind.__bool__ = _truth
    _kind.__hash__ = _Sized.__hash__
    for _name, _rounded in _ROUNDINGS.items():
        setattr(_kind, f"__{_name}__", _rounding(_rounded))


def _both(self: Any, other: Any) -> Any:
    return self // other, self % other


def _both_swapped(self: Any, other: Any) -> Any:
    return other // self, other % self


Size.__divmod__, Size.__rdivmod__ = _both, _both_swapped  # type: ignore[method-assign]


class Shape(tuple[Any, ...]):
    """What ``x.shape`` gives while a forward is recorded: a ``torch.Size`` of sizes with origins.

    A true ``torch.Size`` would turn its entries into plain integers.
    """

    __slots__ = ()
    __class__ = property(lambda _: torch.Size)

    def numel(self) -> Any:
        """Return the product of all sizes."""
        return math.prod(self)

    def __getitem__(self, index: Any) -> Any:
        found = tuple.__getitem__(self, index)
        return Shape(found) if isinstance(index, slice) else found

    def __add__(self, other: Any) -> Any:
        return Shape((*self, *other)) if isinstance(other, tuple) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return Shape((*other, *self)) if isinstance(other, tuple) else NotImplemented

    def __reduce__(self) -> Any:
        return torch.Size, (tuple(map(true_value, self)),)


def attribute_sizes(model: nn.Module, skipped: Callable[[nn.Module], bool]) -> Iterator[Place]:
    """Iterate over the integers that modules hold in lists and tuples, and by themselves.

    A list of hundreds is a table, not sizes.
    """
    for path, module in model.named_modules():
        for name, value in () if skipped(module) else list(vars(module).items()):
            if type(value) is int:
                yield Place(path, name)
            elif _are_sizes(value):
                yield from (Place(path, name, index) for index in range(len(value)))


def _are_sizes(value: Any) -> bool:
    return (
        type(value) in {list, tuple}
        and len(value) <= _MOST_SIZES
        and all(type(size) is int for size in value)
    )


_MOST_SIZES = 256


def put_sizes_(model: nn.Module, sizes: Sequence[tuple[Place, Size]]) -> None:
    """Let modules hold sizes that remember their place instead of plain integers, in place."""
    for place, size in sizes:
        held = vars(model.get_submodule(place.module))
        if place.index is None:
            held[place.name] = size
        else:
            value = list(held[place.name])
            value[place.index] = size
            held[place.name] = type(held[place.name])(value)
