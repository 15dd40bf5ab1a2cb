"""Modules with a rewritten forward: what the new forward is, and the class that has it.

The class is made of the module's own one, as ``torch.nn.utils.parametrize`` does it: what asks for
that (``isinstance``), its methods and its state stay what they are.
"""

from __future__ import annotations

import copy
import linecache
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import fx, nn

from torchcap.graph.sizes import Place

Slot = tuple[str, int | str, int | None]
"""Where a number stands among the arguments of a node."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number in the code of a forward.

    Attributes:
        where: the expression.
        slot: the argument in its call.
        value: the number.
        place: the attribute that is read in its place.
    """

    where: str
    slot: Slot
    value: int
    place: Place


@dataclass(frozen=True, slots=True)
class Rewriting:
    """What a module's forward becomes, so that its channels can become fewer.

    Attributes:
        module: qualified name of the module.
        numbers: that become attributes.
        widths: the attributes that the forward reads in their place, those of modules inside too,
            named from the module on.
        graph: of the new forward, without values; it is not changed.
        code: of the new forward.
    """

    module: str
    numbers: tuple[Number, ...]
    widths: Mapping[str, int]
    graph: fx.Graph = field(compare=False, repr=False)
    code: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself: nothing in it changes."""
        return self

    def apply_(self, module: nn.Module) -> None:
        """Give a module the new forward, and the attributes that it reads."""
        for path, width in self.widths.items():
            owner, _, name = path.rpartition(".")
            vars(module.get_submodule(owner)).setdefault(name, width)
        module.__class__ = self.class_from(type(module))

    def class_from(self, kind: type[nn.Module]) -> type[nn.Module]:
        """Return a class with the new forward, and all else of another one."""
        original = original_class(kind)
        own = {
            "_original": original,
            "_rewriting": self,
            "forward": _compiled(original, self),
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
        }
        bases = (Rewritten, original)
        return types.new_class(original.__name__, bases, {}, lambda names: names.update(own))

    def module_from(self, module: nn.Module) -> nn.Module:
        """Return a module that holds what another one does, without its hooks, with the forward.

        Both hold the same modules, which get the attributes that the forward reads from them.
        """
        twin = object.__new__(type(module))
        nn.Module.__init__(twin)
        own = {n: v for n, v in vars(module).items() if "hook" not in n or n not in vars(twin)}
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            own[name] = own[name].copy()
        vars(twin).update(own)
        self.apply_(twin)
        return twin


class Rewritten:
    """The first base of the classes of modules with a rewritten forward."""

    _original: ClassVar[type[nn.Module]]
    _rewriting: ClassVar[Rewriting]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy what the module holds; the class stays the same."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        """Pickle the module's own class, what its forward has become, and what it holds."""
        return _blank, (self._original, self._rewriting), self.__getstate__()


def is_rewritten(module: nn.Module) -> bool:
    """Whether a module's forward is rewritten."""
    return isinstance(module, Rewritten)


def original_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before its forward was rewritten."""
    return kind._original if issubclass(kind, Rewritten) else kind


def _blank(kind: type[nn.Module], rewriting: Rewriting) -> nn.Module:
    """Return a module that holds nothing yet."""
    return object.__new__(rewriting.class_from(kind))


def _compiled(kind: type[nn.Module], rewriting: Rewriting) -> types.FunctionType:
    """Return a forward from its graph, with source code that tracebacks and inspection find."""
    code = rewriting.graph.python_code("self")
    name = f"<forward of {kind.__qualname__}, rewritten: {id(rewriting)}>"
    linecache.cache[name] = len(code.src), None, code.src.splitlines(keepends=True), name
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, name, "exec"), names)
    forward: types.FunctionType = names["forward"]
    return forward
