"""Documents: JSON texts that say what they are, and of which version: plans and measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torchcap.errors import PlanError


def parsed(text: str, what: str) -> Mapping[str, Any]:
    """Return the JSON object in a text.

    Args:
        text: to read.
        what: it should be, for messages: ``"plan"``.

    Raises:
        PlanError: if the text is not JSON, or holds something else than an object.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(f"not a {what}: the text is not JSON ({error})") from error
    if not isinstance(data, Mapping):
        raise PlanError(f"not a {what}: expected a JSON object, got {type(data).__name__}")
    return data


def check_kind(data: Mapping[str, Any], what: str, kind: str, version: int) -> None:
    """Raise a PlanError if an object is not of a kind and version that is known."""
    if data.get("format") != kind or data.get("version") != version:
        raise PlanError(
            f"not a {what}: format {data.get('format')!r} version {data.get('version')!r}, "
            f"expected {kind!r} version {version}"
        )
