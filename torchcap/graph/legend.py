"""The words of a printed reading, and what to do where channels stay."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

WORDS: Mapping[str, str] = {
    "stiefel": "free: channels may be mixed and dropped, by a projection with orthonormal columns",
    "linear": "free, and no nonlinearity stands between the layers: closed forms mix them exactly",
    "selection": "free, but channels are only kept or dropped: something counts each by itself",
    "fixed": "all channels stay, for the reason in brackets",
    "blocks": "parts of a space (groups, heads) that give up equally many channels each",
}
"""What the columns of a reading mean."""

HINTS: Mapping[str, str] = {
    "residual stream": "streams=True drops channels of residual streams too",
    "no rule for": "teach the operator: rules={Module or function: rule}",
    "in another way than it": "teach the module that calls the function: rules={Module: rule}",
    "MultiheadAttention": "torchcap.split_attention(model) gives attention layers of its own",
    "-1 would follow": "write -1, or a size read from a tensor, in place of the number",
    "used in other ways too": "read the number from a tensor's shape, or give each use its own",
    "leave no trace": "compute with the size itself, not with range(), int() or a list made of it",
    "branches on the number of channels": "compare with the width of a layer, or not at all",
    "whose channels are not followed": "see why the other tensor is not followed: its layer stays",
    "already parametrized": "torch.nn.utils.parametrize.remove_parametrizations() first",
    "shared with another layer": "untie the weights, if they need not be the same",
    "where to is not read": "make the module that is not read one operator, with a rule",
}
"""Part of a reason -> what may be done about it."""


def meanings(words: Collection[str]) -> Iterator[str]:
    """Yield a line for every word of a table that needs one."""
    for word, meaning in WORDS.items():
        if word in words:
            yield f"{word}: {meaning}"


def hints(reasons: Collection[str]) -> Iterator[str]:
    """Yield a line for everything that may be done about reasons for which channels stay."""
    for part, hint in HINTS.items():
        if any(part in reason for reason in reasons):
            yield f"[… {part} …]: {hint}"
