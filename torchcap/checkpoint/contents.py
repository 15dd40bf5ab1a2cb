"""What a saved file says of its model: plain data, checked when it is made.

Nothing in it is ever imported or called. Class names are compared with those of a freshly built
model, and a builder is looked up among those that timm and torchvision list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from math import isfinite
from typing import Any

from torchcap.plan.plan import Plan

Attribute = bool | int | float | str | tuple[int, ...]

# No size of a layer comes near; a larger number is damage, or a counter.
_LARGEST = 2**31
# No model has more classes, or larger images.
_MOST = 2**20
# What a builder may be told, so that no file reaches options that read other files.
ARGUMENTS = (
    "num_classes",
    "in_chans",
    "img_size",
    "image_size",
    "global_pool",
    "aux_logits",
    "transform_input",
    "init_weights",
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One module of a model.

    Attributes:
        kind: module and qualified name of its class.
        attributes: its plain attributes: sizes, numbers, flags and words.
    """

    kind: str
    attributes: Mapping[str, Attribute]

    def __post_init__(self) -> None:
        _check(isinstance(self.kind, str), f"class {self.kind!r}")
        attributes = {name: _frozen(value) for name, value in _items(self.attributes)}
        for name, value in attributes.items():
            _check(is_plain(value), f"attribute {name} = {value!r:.80}")
        object.__setattr__(self, "attributes", attributes)


@dataclass(frozen=True, slots=True)
class Builder:
    """The function of timm or torchvision that builds a model.

    Attributes:
        name: ``"timm:resnet18"`` or ``"torchvision:resnet50"``.
        arguments: what it is told, by name.
    """

    name: str
    arguments: Mapping[str, Attribute] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain = isinstance(self.name, str) and re.fullmatch(
            r"(timm|torchvision):[\w.-]+", self.name
        )
        _check(bool(plain), f"builder {self.name!r}; 'timm:NAME' or 'torchvision:NAME' is one")
        arguments = {name: _frozen(value) for name, value in _items(self.arguments)}
        for name, value in arguments.items():
            known = name in ARGUMENTS and is_plain(value)
            _check(known and _is_modest(value), f"builder's argument {name} = {value!r:.80}")
        object.__setattr__(self, "arguments", arguments)


@dataclass(frozen=True, slots=True)
class Teacher:
    """The model that a student came from.

    Attributes:
        digest: of its tensors, as the student held them.
        dtype: of its first parameter then.
        reading: digest of its channel spaces.
    """

    digest: str
    dtype: str
    reading: str

    def __post_init__(self) -> None:
        words = (self.digest, self.dtype, self.reading)
        _check(all(isinstance(word, str) for word in words), f"teacher {words!r:.80}")


@dataclass(frozen=True, slots=True)
class Contents:
    """What a saved file holds besides tensors.

    Attributes:
        structure: every module, by qualified name.
        builder: what builds it; None for a model of a class of one's own.
        plan: the ranks that it was made with, if they are known.
        notes: what the user wrote down.
        images: what timm's ``pretrained_cfg`` says of images and labels.
        aliases: tied tensors: name -> the name that the tensor is stored under.
        strides: of tensors that are not laid out in the order of their dimensions.
        packages: the versions that it was written with.
        teacher: of a student; None for a model.
    """

    structure: Mapping[str, Layer]
    builder: Builder | None = None
    plan: Plan | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        _check("" in self.structure, "structure without a root")
        _items(self.notes), _items(self.images)
        for name, word in chain(_items(self.aliases), _items(self.packages)):
            _check(isinstance(word, str), f"name of {name!r}: {word!r:.80}")
        strides = {name: _frozen(value) for name, value in _items(self.strides)}
        for name, value in strides.items():
            _check(isinstance(value, tuple) and is_plain(value), f"strides of {name!r}")
        object.__setattr__(self, "strides", strides)
        _check(self.teacher is None or self.plan is not None, "student without a plan")

    @property
    def model(self) -> str:
        """Name of the model's class."""
        return self.structure[""].kind.rpartition(".")[2]

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, for JSON."""
        structure = {path: [layer.kind, layer.attributes] for path, layer in self.structure.items()}
        return {
            **{entry.name: getattr(self, entry.name) for entry in fields(self)},
            "structure": structure,
            "builder": self.builder and asdict(self.builder),
            "plan": self.plan and self.plan.to_dict(),
            "teacher": self.teacher and asdict(self.teacher),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Contents:
        """Read what :meth:`to_dict` returned.

        Raises:
            ValueError, TypeError, KeyError: if it is none of that.
        """
        given = {name: value for name, value in _items(data) if value is not None}
        given["structure"] = {p: Layer(*entry) for p, entry in _items(given["structure"])}
        for name, read in {"builder": Builder, "teacher": Teacher}.items():
            if name in given:
                given[name] = read(**given[name])
        if "plan" in given:
            given["plan"] = Plan.from_dict(given["plan"])
        return cls(**given)


def is_plain(value: Any) -> bool:
    """Whether an attribute is written down: a size or several, a number, a flag, a word."""
    if type(value) in {list, tuple}:
        return bool(value) and all(type(size) is int and abs(size) < _LARGEST for size in value)
    if type(value) is int:
        return abs(value) < _LARGEST
    return type(value) in {bool, str} or (type(value) is float and isfinite(value))


def _is_modest(value: Attribute) -> bool:
    """Whether building with a size takes no more memory than a machine has."""
    sizes = value if isinstance(value, tuple) else (value,)
    return all(isinstance(size, str) or 0 <= size <= _MOST for size in sizes)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _items(data: Any) -> Any:
    """Return the entries of a mapping by name, or raise if it is none."""
    named = isinstance(data, Mapping) and all(isinstance(name, str) for name in data)
    _check(named, f"{data!r:.80} in place of a mapping")
    return data.items()


def _check(condition: bool, what: str) -> None:  # noqa: FBT001 - says what is wrong if it is not so
    if not condition:
        raise ValueError(f"unexpected {what}")
