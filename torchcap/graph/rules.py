"""Operator rules: what each operator does to the channels of the tensors it reads.

A rule is a function ``rule(call) -> value``. It sees the operator's arguments as abstract values
and answers with the abstract value of the result, joining, fixing or restricting channels on the
way (:mod:`torchcap.graph.values`).

``RULES`` maps a module class, a function or a method name to its rule. A class that inherits the
``forward`` of one in the table has the same rule. **An operator without a rule is a boundary**:
every channel that enters it stays as it is, and what comes out of it is opaque.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import timm.layers as tl
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import norm as timm_norm
from timm.layers import std_conv
from timm.layers.grn import GlobalResponseNorm
from timm.layers.linear import Linear as TimmLinear
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from timm.models.vgg import ConvMlp
from torch import fx, nn
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

from torchcap.graph.layers import (
    batch_norm,
    conv_mlp,
    convolution,
    global_response_norm,
    group_norm,
    layer_norm,
    layer_norm_2d,
    linear,
    prelu,
)
from torchcap.graph.moving import (
    expansion,
    flattening,
    flipping,
    insertion,
    interleaving,
    permutation,
    removal,
    repetition,
    reshaping,
    rolling,
    splitting,
    stacking,
    transposition,
    unbinding,
)
from torchcap.graph.operators import (
    addition,
    attribute,
    averaging,
    chunk,
    concatenation,
    interpolation,
    item,
    maximum,
    packing,
    padding,
    plain_result,
    pointwise,
    scaling,
    size,
    softmax,
    spatial,
    unchanged,
)
from torchcap.graph.values import Rule

Target = type[nn.Module] | Callable[..., Any] | str

CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    tl.Conv2dSame,
    std_conv.StdConv2d,
    std_conv.StdConv2dSame,
    std_conv.ScaledStdConv2d,
    std_conv.ScaledStdConv2dSame,
)
STANDARDIZED: tuple[type[nn.Module], ...] = CONVOLUTIONS[4:]
LINEARS: tuple[type[nn.Module], ...] = (nn.Linear, TimmLinear)
BATCH_NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    tl.BatchNormAct2d,
    tl.SyncBatchNormAct,
    tl.FrozenBatchNormAct2d,
    torchvision.ops.FrozenBatchNorm2d,
)

_POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus,
    nn.Softsign, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold,
    tl.Swish, tl.Mish, tl.Sigmoid, tl.Tanh, tl.HardSwish, tl.HardSigmoid, tl.HardMish, tl.GELU,
    tl.GELUTanh, tl.QuickGELU,
)  # fmt: skip
_POINTWISE_FUNCTIONS = (
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish,
    F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.softplus, F.softsign, F.logsigmoid,
    torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.exp, torch.sqrt, torch.rsqrt,
    torch.square, torch.abs, operator.neg, operator.pow,
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "clamp", "clamp_", "exp", "sqrt", "rsqrt",
    "square", "abs", "neg", "pow",
)  # fmt: skip
_UNCHANGED = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    tl.DropPath, tl.DropBlock2d, torchvision.ops.StochasticDepth,
    F.dropout, F.dropout2d, F.dropout3d, torchvision.ops.stochastic_depth, tl.drop_path,
    "contiguous", "clone", "detach", "float", "to", "type_as", "double", "half",
)  # fmt: skip
_AVERAGE_POOLS = {
    1: (nn.AvgPool1d, nn.AdaptiveAvgPool1d, F.avg_pool1d, F.adaptive_avg_pool1d),
    2: (nn.AvgPool2d, nn.AdaptiveAvgPool2d, AvgPool2dSame, F.avg_pool2d, F.adaptive_avg_pool2d),
    3: (nn.AvgPool3d, nn.AdaptiveAvgPool3d, F.avg_pool3d, F.adaptive_avg_pool3d),
}
_MAXIMUM_POOLS = {
    1: (nn.MaxPool1d, nn.AdaptiveMaxPool1d, F.max_pool1d, F.adaptive_max_pool1d),
    2: (nn.MaxPool2d, nn.AdaptiveMaxPool2d, MaxPool2dSame, F.max_pool2d, F.adaptive_max_pool2d),
    3: (nn.MaxPool3d, nn.AdaptiveMaxPool3d, F.max_pool3d, F.adaptive_max_pool3d),
}
_PADS = (
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.ReplicationPad3d, F.pad,
)  # fmt: skip

_NORMS_OF_THE_LAST_DIMENSION = (
    nn.LayerNorm, tl.LayerNorm, timm_norm.LayerNormFp32, nn.RMSNorm,
    timm_norm.RmsNorm, timm_norm.RmsNormFp32, timm_norm.SimpleNorm, timm_norm.SimpleNormFp32,
)  # fmt: skip
_NORMS_OF_AN_IMAGE = (
    tl.LayerNorm2d, timm_norm.LayerNorm2dFp32, TorchvisionLayerNorm2d, tl.LayerNormAct2d,
    timm_norm.RmsNorm2d, timm_norm.RmsNorm2dFp32, timm_norm.SimpleNorm2d,
    timm_norm.SimpleNorm2dFp32,
)  # fmt: skip

RULES: Mapping[Target, Rule] = {
    **dict.fromkeys(CONVOLUTIONS, convolution),
    **dict.fromkeys(LINEARS, linear),
    **dict.fromkeys(BATCH_NORMS, batch_norm),
    **dict.fromkeys(_NORMS_OF_THE_LAST_DIMENSION, layer_norm),
    **dict.fromkeys(_NORMS_OF_AN_IMAGE, layer_norm_2d),
    **dict.fromkeys((nn.GroupNorm, tl.GroupNorm, tl.GroupNorm1, tl.GroupNormAct), group_norm),
    GlobalResponseNorm: global_response_norm,
    ConvMlp: conv_mlp,
    nn.PReLU: prelu,
    tl.PReLU: prelu,
    **dict.fromkeys(_POINTWISE_MODULES, pointwise),
    **dict.fromkeys(_POINTWISE_FUNCTIONS, pointwise),
    **dict.fromkeys(_UNCHANGED, unchanged),
    **{t: spatial(dims) for dims, targets in _AVERAGE_POOLS.items() for t in targets},
    **{t: spatial(dims, bends=True) for dims, targets in _MAXIMUM_POOLS.items() for t in targets},
    **dict.fromkeys(_PADS, padding),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, F.interpolate), interpolation),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), scaling),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), scaling),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), addition),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), addition),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), concatenation),
    **dict.fromkeys((torch.chunk, "chunk"), chunk),
    **dict.fromkeys((torch.mean, "mean", torch.sum, "sum"), averaging),
    **dict.fromkeys((torch.amax, "amax", torch.max, "max"), maximum),
    **dict.fromkeys((nn.Softmax, F.softmax, torch.softmax, "softmax"), softmax),
    operator.getitem: item,
    getattr: attribute,
    "size": size,
    "dim": plain_result,
    **dict.fromkeys((torch.permute, "permute"), permutation),
    **dict.fromkeys((torch.transpose, "transpose", torch.swapaxes), transposition),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze"), insertion),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten"), flattening),
    **dict.fromkeys((torch.reshape, "reshape", "view"), reshaping),
    **dict.fromkeys((torch.squeeze, "squeeze"), removal),
    **dict.fromkeys(("expand", "expand_as"), expansion),
    **dict.fromkeys((torch.tile, "repeat", "tile"), repetition),
    **dict.fromkeys((torch.repeat_interleave, "repeat_interleave"), interleaving),
    **dict.fromkeys((torch.roll, "roll"), rolling),
    **dict.fromkeys((torch.flip, "flip"), flipping),
    **dict.fromkeys((torch.unbind, "unbind"), unbinding),
    **dict.fromkeys((torch.split, torch.functional.split, "split"), splitting),
    **dict.fromkeys((torch.stack,), stacking),
}

READS_SIZES: frozenset[Rule] = frozenset({item, size, attribute, reshaping, expansion})
"""Rules that know what to do with an :class:`Extent` among their arguments."""


def find_module_rule(module: nn.Module, rules: Mapping[Target, Rule]) -> Rule | None:
    """Return the rule of a module's class, or of the class whose computation it inherits."""
    for base in type(module).__mro__:
        rule = rules.get(base)
        if rule is not None:
            methods = ("forward", "_conv_forward", "_check_input_dim")
            same = all(getattr(type(module), m, 0) is getattr(base, m, 0) for m in methods)
            return rule if same else None
    return None


def find_rule(node: fx.Node, module: nn.Module | None, rules: Mapping[Target, Rule]) -> Rule | None:
    """Return the rule of a graph node, if there is one."""
    if module is not None:
        return find_module_rule(module, rules)
    if isinstance(node.target, type) and issubclass(node.target, tuple) and not node.kwargs:
        return packing
    return rules.get(node.target) if node.op in {"call_function", "call_method"} else None
