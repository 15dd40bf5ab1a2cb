"""Arithmetic on sizes: numbers of the forward that follow channels, or that modules hold."""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from torchcap.graph.values import Call, Extent, Root, Setting, Value, flat, followed_ids


def arithmetic(call: Call) -> Value:
    """A function of numbers alone, none of them a tensor."""
    values = list(flat((call.args, call.kwargs)))
    if any(isinstance(v, Extent | Root) for v in values):
        return _of_extents(call)
    target = call.node.target
    if target is operator.pow and isinstance(call.args[0], Setting) and call.args[1] in _HALVES:
        return Root(*call.args)
    if target is operator.mul and all(isinstance(v, int) for v in call.args):
        return _product(*call.args)
    pin_settings(call)
    return call.result


def pin_settings(call: Call) -> None:
    """Note that an operator uses attributes in a way that cannot follow channels."""
    for value in flat((call.args, call.kwargs)):
        held = value.size if isinstance(value, Root) else value
        if isinstance(held, Setting):
            call.table.pin(held.places)


def _product(left: int, right: int) -> int:
    places = tuple(place for v in (left, right) if isinstance(v, Setting) for place in v.places)
    if not places:
        return left * right
    times = 1
    for v in (left, right):
        times *= v.times if isinstance(v, Setting) else v
    return Setting.of(left * right, places, times)


def _of_extents(call: Call) -> Value:
    target: Callable[..., Any] = call.node.target  # type: ignore[assignment]
    left, right = call.args if len(call.args) == 2 else (call.args[0], None)
    rule = _RULES.get(target)
    found = None if rule is None else rule(call, left, right)
    if found is None and all(followed_ids(v) is None for v in call.args):
        pin_settings(call)  # the root of what a module holds
        return call.result
    if found is None:
        return call.give_up(_BRANCH if call.node.meta.get("branch") else _COMPUTED)
    return found


_HALVES = (0.5, -0.5)
_BRANCH = "the forward branches on the number of channels"
_COMPUTED = "its number of channels is computed with"


def _multiplied(call: Call, left: Value, right: Value) -> Value | None:
    x, factor = (left, right) if isinstance(left, Extent) else (right, left)
    if not isinstance(x, Extent) or type(factor) not in {int, Setting} or factor < 1:
        return None
    pin_settings(call)
    return x.scaled(int(factor))


def _divided(call: Call, left: Value, right: Value) -> Value | None:
    if not isinstance(left, Extent) or type(right) not in {int, Setting} or right < 1:
        return None
    if left.number % right:
        return None
    pin_settings(call)
    return left.scaled(1, int(right))


def _summed(_: Call, left: Value, right: Value) -> Value | None:
    pair = left, right
    if not all(isinstance(x, Extent) and x.parts == x.times == 1 for x in pair):
        return None
    return left.joined(right)


def _remainder(call: Call, left: Value, right: Value) -> Value | None:
    """What is left of a division; a number of channels that divides evenly goes on doing so."""
    plain = isinstance(left, Extent) and left.parts == left.times == 1
    if not plain or type(right) not in {int, Setting} or right < 1 or len(left.ids) % right:
        return None
    pin_settings(call)
    call.table.balance(left.ids.reshape(int(right), -1), call.at("does not divide evenly"))
    return 0


def _rooted(_: Call, left: Value, right: Value) -> Value | None:
    return Root(left, right) if isinstance(left, Extent) and right in _HALVES else None


def _inverted(_: Call, left: Value, right: Value) -> Value | None:
    return Root(right.size, -right.power) if left == 1 and isinstance(right, Root) else None


def _compared(call: Call, left: Value, right: Value) -> Value | None:
    """Whether two sizes are equal: those that are now must stay so."""
    if isinstance(right, Extent) and not isinstance(left, Extent):
        left, right = right, left
    if isinstance(left, Extent) and isinstance(right, Extent) and left.number == right.number:
        call.agree(left, right)
    elif isinstance(left, Extent) and isinstance(right, Setting) and left.number == right:
        if Fraction(left.times, left.parts) != 1:
            return None
        call.table.bind(right.places, left.ids[None])
    else:
        return None
    return call.result


def _ordered(call: Call, left: Value, right: Value) -> Value | None:
    """Whether a size is below another: what is small enough stays so with fewer channels."""
    target = call.node.target
    if isinstance(left, Extent) and type(right) in {int, float}:
        below = target in {operator.lt, operator.le}
    elif isinstance(right, Extent) and type(left) in {int, float}:
        below = target in {operator.gt, operator.ge}
    else:
        return None
    return call.result if call.result is below else None


_RULES: dict[Any, Callable[[Call, Value, Value], Value | None]] = {
    operator.mul: _multiplied,
    operator.floordiv: _divided,
    operator.add: _summed,
    operator.mod: _remainder,
    operator.pow: _rooted,
    operator.truediv: _inverted,
    operator.eq: _compared,
    operator.ne: _compared,
    **dict.fromkeys((operator.lt, operator.le, operator.gt, operator.ge), _ordered),
}
