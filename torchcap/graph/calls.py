"""How torch's functions and methods are named in a graph, and what they show of a tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from torchcap.nests import tensors_in

SIZES = frozenset({"size", "numel", "nelement", "__len__"})
"""Methods that give the sizes of a tensor."""

SHOW_NOTHING = frozenset(
    {
        "dim", "ndimension", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda",
        "is_cpu", "is_meta", "is_leaf", "is_sparse", "is_quantized", "is_floating_point",
        "is_complex", "is_signed", "is_contiguous", "element_size", "itemsize", "get_device",
        "is_inference", "requires_grad_", "retain_grad", "grad_fn", "grad", "_version",
        "is_nested", "is_mkldnn", "is_mps", "is_xla", "is_xpu", "is_shared", "is_pinned", "names",
        "has_names", "output_nr", "__repr__", "__format__", "__hash__", "register_hook",
        "result_type", "can_cast", "promote_types", "_is_view", "is_conj", "is_neg",
        "__deepcopy__", "untyped_storage", "storage", "data_ptr", "storage_offset",
        "_backward_hooks", "retains_grad", "is_grad_enabled", "_assert", "is_tensor",
        "is_storage",
    }
)  # fmt: skip
"""Attributes and methods that show neither the channels of a tensor nor its values."""

SHOW_VALUES = frozenset(
    {
        "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__",
        "__array__", "__contains__", "equal", "allclose", "is_nonzero", "__dlpack__",
    }
)  # fmt: skip
"""Functions and methods that show a program the values of a tensor."""

_BINARY = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor",
    "lshift", "rshift",
)  # fmt: skip
_OTHERS = ("getitem", "eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert")
_OPERATORS: Mapping[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, f"__{name}__") for name in (*_BINARY, *_OTHERS)
}
_SWAPPED: Mapping[str, Callable[..., Any]] = {
    **{f"__r{name}__": getattr(operator, f"__{name}__") for name in _BINARY},
    "__rdiv__": operator.truediv,
}


_FOLLOW_VALUES = frozenset(
    {
        "nonzero", "argwhere", "unique", "unique_consecutive", "unique_dim", "masked_select",
        "bincount", "nms",
    }
)  # fmt: skip


def follows_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the shape of a function's result depends on the values of a tensor."""
    name = func.__name__
    if name == "__getitem__":
        return any(t.dtype in {torch.bool, torch.uint8} for t in tensors_in(args[1:]))
    if name == "where":
        return len(args) == 1
    repeats = name == "repeat_interleave" and len(args) > 1 and isinstance(args[1], Tensor)
    return repeats or name in _FOLLOW_VALUES


def assigned(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """Write into a part of a tensor, in place, and return it: ``tensor[index] = value``."""
    tensor[index] = value
    return tensor


def canonical(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, Any, tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Return how a graph names a function or method: kind of node, target, arguments."""
    name: str = func.__name__
    if isinstance(func, OpOverload | OpOverloadPacket):
        packet = func.overloadpacket if isinstance(func, OpOverload) else func
        known = getattr(torch, packet.__name__, None)
        named = str(packet).startswith("aten.") and callable(known)
        return "call_function", known if named else func, (args, kwargs)
    if name == "__set__":
        return "call_function", setattr, ((args[0], func.__self__.__name__, args[1]), {})
    return _named(func, name, args, kwargs)


def _named(
    func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, Any, tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Return how a graph names a function or method of Python: methods by name."""
    if not func.__qualname__.startswith(("Tensor.", "TensorBase.", "_TensorBase.")):
        return "call_function", func, (args, kwargs)
    if name in _SWAPPED and len(args) == 2:
        return "call_function", _SWAPPED[name], ((args[1], args[0]), kwargs)
    if name == "__setitem__":
        return "call_function", assigned, (args, kwargs)
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name], (args, kwargs)
    return "call_method", name, (args, kwargs)


def written_by(node: fx.Node, module: nn.Module | None) -> fx.Node | None:
    """Return the node whose tensor a node writes into; None if it writes into none."""
    if "out" in node.kwargs:
        out = node.kwargs["out"]
        return out if isinstance(out, fx.Node) else None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = name.endswith("_") and not name.endswith("__")
    if node.op == "call_module":
        writes = bool(getattr(module, "inplace", False))
    elif node.op == "call_function":
        writes = writes or node.target in {assigned, setattr}
        writes = writes or bool(node.kwargs.get("inplace"))
        writes = writes or (True in node.args[1:] and name in _SWITCHED)
    first = node.args[0] if node.args else None
    return first if writes and isinstance(first, fx.Node) else None


_SWITCHED = frozenset({"relu", "relu6", "silu", "selu", "elu", "celu", "leaky_relu", "hardswish"})
"""Functions that may be told by place to work in place."""
