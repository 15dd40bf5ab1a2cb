"""The plan: how many channels every space keeps. Data to print, edit, save and apply again."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from operator import index
from types import MappingProxyType
from typing import Any

from torchcap.errors import NothingToCompressError, PlanError
from torchcap.graph.legend import hints
from torchcap.graph.spaces import ChannelSpace, SpaceGraph
from torchcap.plan.documents import document, parsed

_NAMED = 5  # differences, in a message
_SEE = "see its spaces: analyze(model), or `torchcap inspect`"


@dataclass(frozen=True, slots=True)
class Choice:
    """What happens to one space: ``rank`` of its ``channels`` are kept.

    Attributes:
        channels: that the space has.
        rank: how many of them are kept.
        reason: why, in words, for whoever reads the plan.
    """

    channels: int
    rank: int
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """Space name -> rank, for one model. Spaces that are not named stay as they are.

    Attributes:
        choices: the channels that each named space has, and the rank that it keeps.
        model: name of the model's class, for messages.
    """

    choices: Mapping[str, Choice]
    model: str = ""

    def __post_init__(self) -> None:
        choices = {}
        for name, choice in self.choices.items():
            channels, rank = _integer(choice.channels), _integer(choice.rank)
            if channels is None or channels < 1:
                raise PlanError(
                    f"space {name!r} must have a whole number of channels; got {choice.channels!r}"
                )
            if rank is None or not 1 <= rank <= channels:
                raise PlanError(
                    f"space {name!r} has {channels} channels, so its rank must be an integer "
                    f"within 1..{channels}; got {choice.rank!r}"
                )
            choices[name] = Choice(channels, rank, choice.reason)
        object.__setattr__(self, "choices", MappingProxyType(choices))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_dict, (self.to_dict(),)

    @classmethod
    def uniform(
        cls,
        graph: SpaceGraph,
        ratio: float | Mapping[str, float] = 0.5,
        *,
        multiple_of: int = 1,
    ) -> Plan:
        """Keep the same share of channels in every free space, or a share by name.

        Args:
            graph: what :func:`torchcap.analyze` found.
            ratio: share of the channels *kept*, ``0 < ratio <= 1``; or a mapping of space name to
                share, where spaces that are not named stay as they are.
            multiple_of: ranks are rounded up to a multiple of this, as far as the space has
                channels.

        Raises:
            PlanError: for a ratio outside of (0, 1] or an unknown or fixed space.
            NothingToCompressError: if the model has no free space.
        """
        if not graph.free:
            raise NothingToCompressError(_nothing(graph))
        if not isinstance(multiple_of, int) or multiple_of < 1:
            raise PlanError(f"multiple_of is a whole number from 1 on; got {multiple_of!r}")
        shares = ratio if isinstance(ratio, Mapping) else {s.name: ratio for s in graph.free}
        choices = {}
        for name, share in shares.items():
            space = _find(graph, name)
            _check_ratio(share, name)
            rank = _rank(space, share, multiple_of)
            choices[name] = Choice(space.channels, rank)
        return cls(choices, graph.model)

    @classmethod
    def of(cls, graph: SpaceGraph, ranks: Mapping[str, int]) -> Plan:
        """Make a plan from space name -> rank.

        Raises:
            PlanError: for an unknown or fixed space, or a rank that it cannot have.
        """
        choices = {name: Choice(_find(graph, name).channels, rank) for name, rank in ranks.items()}
        plan = cls(choices, graph.model)
        plan.check(graph)
        return plan

    @property
    def ranks(self) -> dict[str, int]:
        """Space name -> rank."""
        return {name: choice.rank for name, choice in self.choices.items()}

    def but(self, **ranks: int) -> Plan:
        """Return a copy with other ranks of some spaces: ``plan.but(**{"layer1.0.conv1": 8})``.

        Raises:
            PlanError: for a space that is not in the plan, or a rank that it cannot have.
        """
        for name in ranks:
            if name not in self.choices:
                raise PlanError(f"the plan has no space {name!r}; see print(plan)")
        changed = {
            name: Choice(self.choices[name].channels, rank, "by hand")
            for name, rank in ranks.items()
        }
        return Plan({**self.choices, **changed}, self.model)

    def differences(self, other: Plan) -> dict[str, tuple[Choice | None, Choice | None]]:
        """Return the spaces whose channels or ranks differ, with both choices (None: not there)."""
        names = dict.fromkeys([*self.choices, *other.choices])
        pairs = {name: (self.choices.get(name), other.choices.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if _sizes(pair[0]) != _sizes(pair[1])}

    def check(self, graph: SpaceGraph) -> None:
        """Raise a :class:`PlanError` if this plan does not fit the spaces of ``graph``."""
        if differences := list(self._differences_from(graph)):
            some = "\n".join(f"  {line}" for line in differences[:_NAMED])
            more = f"\n  … and {len(differences) - _NAMED} more" if differences[_NAMED:] else ""
            made = f"was made for a {self.model!r} and " if self.model != graph.model else ""
            raise PlanError(
                f"the plan {made if self.model else ''}does not fit this {graph.model!r}:\n"
                f"{some}{more}\nmend it, or make a plan for this model"
            )
        for name, choice in self.choices.items():
            space = _find(graph, name)
            if choice.rank % space.blocks:
                raise PlanError(
                    f"space {name!r} has {space.blocks} blocks of equal width, so its rank must be "
                    f"a multiple of {space.blocks}; got {choice.rank}"
                )
        if not self.choices:
            raise PlanError("the plan names no space; give at least one, or a ratio")

    def _differences_from(self, graph: SpaceGraph) -> Iterator[str]:
        there = {space.name: space.channels for space in graph.spaces}
        for name, choice in self.choices.items():
            if name not in there:
                yield f"there is no channel space {name!r}; {_hint(graph, name)}"
            elif there[name] != choice.channels:
                yield (f"space {name!r} has {there[name]} channels, {choice.channels} in the plan")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain dictionaries, for JSON."""
        spaces = {
            name: {"channels": choice.channels, "rank": choice.rank}
            | ({"reason": choice.reason} if choice.reason else {})
            for name, choice in self.choices.items()
        }
        return {"format": "torchcap-plan", "version": 1, "model": self.model, "spaces": spaces}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Make a plan from what :meth:`to_dict` returned.

        Raises:
            PlanError: if the dictionary is not a plan of a version that this library knows.
        """
        plan = document(data, "plan", "torchcap-plan", 1)
        plan.check_keys("format", "version", "spaces", optional=("model",))
        choices = {}
        for name, space in plan.entries("spaces", "space"):
            space.check_keys("channels", "rank", optional=("reason",))
            reason = space.text("reason") if "reason" in space.values else ""
            choices[name] = Choice(space.whole("channels"), space.whole("rank"), reason)
        return cls(choices, plan.text("model") if "model" in data else "")

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Make a plan from JSON text.

        Raises:
            PlanError: if the text is not JSON, or not a plan.
        """
        return cls.from_dict(parsed(text, "plan"))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        kept = sum(choice.rank for choice in self.choices.values())
        total = sum(choice.channels for choice in self.choices.values())
        yield f"plan for {self.model or 'a model'}: {kept} of {total} channels kept"
        width = max([len(name) for name in self.choices] + [5])
        yield f"{'space':{width}}  channels  rank   kept"
        for name, choice in self.choices.items():
            share = choice.rank / choice.channels
            row = f"{name:{width}}  {choice.channels:8d}  {choice.rank:4d}  {share:5.0%}"
            yield f"{row}  {choice.reason}".rstrip()


def _sizes(choice: Choice | None) -> tuple[int, int] | None:
    return None if choice is None else (choice.channels, choice.rank)


def _integer(value: Any) -> int | None:
    """Return an integer of any kind (NumPy's, say) as Python's, and None for what is none."""
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


def _find(graph: SpaceGraph, name: str) -> ChannelSpace:
    try:
        space = graph[name]
    except KeyError:
        raise PlanError(
            f"{graph.model!r} has no channel space {name!r}; {_hint(graph, name)}"
        ) from None
    if not space.free:
        raise PlanError(
            f"space {name!r} of {graph.model!r} is fixed ({space.reason}); leave it out of the plan"
        )
    return space


def _hint(graph: SpaceGraph, name: str) -> str:
    close = difflib.get_close_matches(str(name), [s.name for s in graph.free], n=3)
    return f"did you mean {', '.join(map(repr, close))}?" if close else _SEE


def _check_ratio(ratio: float, name: str) -> None:
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not number or not isfinite(ratio) or not 0 < ratio <= 1:
        raise PlanError(
            f"ratio is the share of channels that are kept, 0 < ratio <= 1; got {ratio!r} "
            f"for space {name!r}"
        )


def _rank(space: ChannelSpace, ratio: float, multiple_of: int) -> int:
    width = space.channels // space.blocks
    rank = max(1, round(ratio * width))
    # Each block is rounded by itself; one block of an ordinary space is all of its channels.
    rank = -(-rank // multiple_of) * multiple_of if space.blocks == 1 else rank
    return min(rank, width) * space.blocks


def _nothing(graph: SpaceGraph) -> str:
    every = {space.reason for space in graph.spaces}
    reasons = [
        f"  {space.name or 'the model itself'}: {space.reason}" for space in graph.spaces[:20]
    ]
    more = [f"  … and {len(graph.spaces) - 20} more"] if len(graph.spaces) > 20 else []
    found = "\n".join([*reasons, *more, *(f"  {note}" for note in graph.notes)])
    return (
        f"{graph.model!r} has no channel space that can be compressed:\n"
        f"{found or '  no layer was found'}" + "".join(f"\n{hint}" for hint in hints(every))
    )
