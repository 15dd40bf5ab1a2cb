"""Sensitivity: what each space loses when it alone is compressed. Measurements, as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isfinite
from typing import Any, Literal, get_args

from torchcap.errors import PlanError
from torchcap.plan.documents import Entry, document, parsed

Metric = Literal["accuracy", "agreement"]

_FORMAT, _VERSION = "torchcap-sensitivity", 1


@dataclass(frozen=True, slots=True)
class Curve:
    """What one space loses, rank by rank, while all others keep their channels.

    Attributes:
        space: name of the space.
        channels: its number of channels.
        ranks: rising, the last one may be all channels.
        errors: mean square error of the features behind the space (at the next place where the
            features of teacher and student are compared), as a share of the features' own mean
            square.
        output_errors: the same of the model's output.
        scores: accuracy, or agreement with the full model, as a share of the images.
    """

    space: str
    channels: int
    ranks: tuple[int, ...]
    errors: tuple[float, ...]
    output_errors: tuple[float, ...]
    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        rows = (self.errors, self.output_errors, self.scores)
        rising = all(a < b for a, b in pairwise(self.ranks))
        within = all(1 <= rank <= self.channels for rank in self.ranks)
        if not self.ranks or not rising or not within:
            raise PlanError(
                f"the curve of space {self.space!r} needs rising ranks within 1..{self.channels}; "
                f"got {self.ranks}"
            )
        if any(len(row) != len(self.ranks) for row in rows):
            raise PlanError(
                f"the curve of space {self.space!r} has {len(self.ranks)} ranks, so it needs as "
                f"many errors, output errors and scores; got {[len(row) for row in rows]}"
            )
        if not all(isfinite(value) and value >= 0 for row in rows for value in row):
            raise PlanError(
                f"the curve of space {self.space!r} holds a number that is negative or not finite"
            )


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The curves of a model's free spaces.

    Attributes:
        model: name of the model's class.
        curves: one for every space, in the order of the forward.
        metric: what scores are: ``"accuracy"``, or without labels ``"agreement"`` with the model.
        baseline: score of the model itself.
        images: number of images that errors and scores were measured on.
        parameters: of the model at full width, its norms folded; 0 if that is not known.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 4.1, figures 4 and 5.
    """

    model: str
    curves: tuple[Curve, ...]
    metric: Metric
    baseline: float
    images: int
    parameters: int = 0

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise PlanError(f"the metric is 'accuracy' or 'agreement'; got {self.metric!r}")
        if not 0 <= self.baseline <= 1 or min(self.images, self.parameters) < 0:
            raise PlanError(
                "the baseline is a share within 0..1, and numbers of images and parameters are not "
                f"negative; got {self.baseline!r}, {self.images!r} and {self.parameters!r}"
            )
        spaces = [curve.space for curve in self.curves]
        if twice := sorted({space for space in spaces if spaces.count(space) > 1}):
            raise PlanError(f"space {twice[0]!r} has more than one curve")

    def __getitem__(self, space: str) -> Curve:
        for curve in self.curves:
            if curve.space == space:
                return curve
        raise KeyError(space)

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as plain dictionaries and lists, for JSON."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Make the measurements from what :meth:`to_dict` returned.

        Raises:
            PlanError: if the dictionary holds something else.
        """
        found = document(data, "sensitivity", _FORMAT, _VERSION)
        needed = ("format", "version", "model", "curves", "metric", "baseline", "images")
        found.check_keys(*needed, optional=("parameters", "of"))
        curves = tuple(
            _curve(found.entry(value, f"curve {number}"))
            for number, value in enumerate(found.sequence("curves"), 1)
        )
        metric: Any = found.text("metric")
        parameters = found.whole("parameters") if "parameters" in data else 0
        counts = found.whole("images"), parameters
        return cls(found.text("model"), curves, metric, found.number("baseline"), *counts)

    def to_json(self) -> str:
        """Return the measurements as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """Make the measurements from JSON text.

        Raises:
            PlanError: if the text is not JSON, or holds something else.
        """
        return cls.from_dict(parsed(text, "sensitivity"))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield (
            f"sensitivity of {self.model}: {self.metric} {self.baseline:.1%} of {self.images} "
            "images; below, where one space alone keeps a share of its channels"
        )
        width = max([len(curve.space) for curve in self.curves] + [5])
        yield f"{'space':{width}}  channels  kept: {self.metric} (error of the features behind)"
        for curve in self.curves:
            points = "  ".join(
                f"{rank / curve.channels:4.0%}: {score:5.1%} ({error:.3f})"
                for rank, error, score in zip(curve.ranks, curve.errors, curve.scores, strict=True)
            )
            yield f"{curve.space:{width}}  {curve.channels:8d}  {points}"


def _curve(entry: Entry) -> Curve:
    rows = ("errors", "output_errors", "scores")
    if isinstance(space := entry.values.get("space"), str):
        entry = entry.at(f"the curve of space {space!r}")
    entry.check_keys("space", "channels", "ranks", *rows)
    errors, output_errors, scores = (entry.numbers(row) for row in rows)
    sizes = entry.whole("channels"), entry.wholes("ranks")
    return Curve(entry.text("space"), *sizes, errors, output_errors, scores)
