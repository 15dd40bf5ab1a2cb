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
from timm.layers import activations_me, evo_norm, norm_act, std_conv
from timm.layers import norm as timm_norm
from timm.layers.blur_pool import BlurPool2d
from timm.layers.filter_response_norm import FilterResponseNormAct2d, FilterResponseNormTlu2d
from timm.layers.grn import GlobalResponseNorm
from timm.layers.linear import Linear as TimmLinear
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from timm.models.vgg import ConvMlp
from torch import fx, nn
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

from torchcap.graph import heads
from torchcap.graph.attention import dot_product_attention, product
from torchcap.graph.heads import division, item, reshaping, splitting
from torchcap.graph.layers import (
    batch_norm,
    blur_pool,
    conv_mlp,
    convolution,
    global_response_norm,
    group_norm,
    instance_norm,
    layer_norm,
    layer_norm_2d,
    linear,
    prelu,
    response_norm,
    transposed_convolution,
)
from torchcap.graph.moving import (
    expansion,
    flattening,
    flipping,
    gathering,
    insertion,
    permutation,
    picking,
    relocation,
    removal,
    repetition,
    reshaping_as,
    spreading,
    stacking,
    transposition,
    unbinding,
)
from torchcap.graph.operators import (
    addition,
    along,
    attribute,
    chunk,
    concatenation,
    contraction,
    extreme,
    gated_halves,
    interpolation,
    multiplied_addition,
    packing,
    padding,
    plain_result,
    pointwise,
    reduction,
    refusal,
    scaling,
    size,
    spatial,
    together,
    unchanged,
)
from torchcap.graph.values import Rule
from torchcap.graph.weights import TRANSPOSED_CONVOLUTIONS

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
COUNTED: tuple[type[nn.Module], ...] = (
    *CONVOLUTIONS, *LINEARS, *TRANSPOSED_CONVOLUTIONS, nn.MultiheadAttention
)  # fmt: skip
"""The layers whose multiply-adds are counted."""

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
    tl.GELUTanh, tl.QuickGELU, nn.RReLU,
    activations_me.SwishMe, activations_me.MishMe, activations_me.HardSigmoidMe,
    activations_me.HardSwishMe, activations_me.HardMishMe,
)  # fmt: skip
_POINTWISE_FUNCTIONS = (
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish,
    F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.softplus, F.softsign, F.logsigmoid,
    F.hardshrink, F.softshrink, F.tanhshrink, F.threshold, F.rrelu,
    torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.exp, torch.sqrt, torch.rsqrt,
    torch.square, torch.abs, operator.neg, operator.pow, operator.invert,
    torch.neg, torch.pow, torch.reciprocal, torch.log, torch.log1p, torch.log2, torch.log10,
    torch.exp2, torch.expm1, torch.sin, torch.cos, torch.tan, torch.atan, torch.sinh, torch.cosh,
    torch.erf, torch.sign, torch.floor, torch.ceil, torch.round, torch.isnan, torch.isfinite,
    torch.nan_to_num, torch.logical_not, torch.zeros_like, torch.ones_like,
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "clamp", "clamp_", "exp", "exp_",
    "sqrt", "sqrt_", "rsqrt", "square", "abs", "neg", "pow", "reciprocal", "log", "log1p", "log2",
    "exp2", "expm1", "sin", "cos", "atan", "erf", "sign", "floor", "ceil", "round", "isnan",
    "isfinite", "nan_to_num", "logical_not", "clamp_min", "clamp_max", "bool", "long", "int",
)  # fmt: skip
_UNCHANGED = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    tl.DropPath, tl.DropBlock2d, torchvision.ops.StochasticDepth,
    nn.FeatureAlphaDropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
    F.feature_alpha_dropout, torchvision.ops.stochastic_depth, tl.drop_path,
    "contiguous", "clone", "detach", "float", "to", "type", "type_as", "double", "half", "bfloat16",
    "cpu", "cuda", torch.clone,
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
    norm_act.LayerNormAct, norm_act.LayerNormActFp32, norm_act.RmsNormAct, norm_act.RmsNormActFp32,
)  # fmt: skip
_NORMS_OF_AN_IMAGE = (
    tl.LayerNorm2d, timm_norm.LayerNorm2dFp32, TorchvisionLayerNorm2d, tl.LayerNormAct2d,
    timm_norm.RmsNorm2d, timm_norm.RmsNorm2dFp32, timm_norm.SimpleNorm2d,
    timm_norm.SimpleNorm2dFp32, timm_norm.LayerNormExp2d, norm_act.LayerNormAct2dFp32,
    norm_act.RmsNormAct2d, norm_act.RmsNormAct2dFp32,
)  # fmt: skip
_GROUP_NORMS = (
    nn.GroupNorm, tl.GroupNorm, tl.GroupNorm1, tl.GroupNormAct, norm_act.GroupNorm1Act,
)  # fmt: skip
_RESPONSE_NORMS = (
    FilterResponseNormAct2d, FilterResponseNormTlu2d,
    evo_norm.EvoNorm2dS0, evo_norm.EvoNorm2dS0a, evo_norm.EvoNorm2dS1, evo_norm.EvoNorm2dS1a,
    evo_norm.EvoNorm2dS2, evo_norm.EvoNorm2dS2a,
)  # fmt: skip
_EVO_NORMS_OF_BATCHES = (evo_norm.EvoNorm2dB0, evo_norm.EvoNorm2dB1, evo_norm.EvoNorm2dB2)
_COMPARISONS = (
    torch.maximum, "maximum", torch.minimum, "minimum", torch.where, "where",
    "masked_fill", "masked_fill_", torch.masked_fill,
    operator.gt, operator.ge, operator.lt, operator.le, operator.eq, operator.ne,
    torch.gt, torch.ge, torch.lt, torch.le, torch.eq, torch.ne,
    "gt", "ge", "lt", "le", "eq", "ne",
    operator.and_, operator.or_, torch.logical_and, torch.logical_or,
)  # fmt: skip
_PRODUCTS = (
    operator.mul, operator.imul, torch.mul, "mul", "mul_", torch.multiply, "multiply",
    operator.truediv, operator.itruediv, torch.div, "div", "div_", torch.divide, "divide",
)  # fmt: skip
_RESAMPLINGS = (
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.interpolate, F.grid_sample,
)  # fmt: skip
_NORMS_OF_VECTORS = (torch.norm, torch.linalg.norm, torch.linalg.vector_norm, "norm")
_SPREADS = (torch.std, "std", torch.var, "var", torch.std_mean, torch.var_mean)
_EXTREMES = (
    torch.amax, "amax", torch.amin, "amin", torch.argmax, "argmax", torch.argmin, "argmin",
    torch.prod, "prod", torch.logsumexp, "logsumexp", torch.median, "median",
)  # fmt: skip
_SOFTMAXES = (
    nn.Softmax, F.softmax, torch.softmax, "softmax",
    nn.LogSoftmax, F.log_softmax, torch.log_softmax, "log_softmax",
)  # fmt: skip
_TRANSPOSITIONS = (
    torch.transpose, "transpose", torch.swapaxes, "swapaxes", torch.swapdims, "swapdims",
)  # fmt: skip
_SPLITS = (
    torch.split, torch.functional.split, "split", torch.tensor_split, "tensor_split",
    "split_with_sizes",
)  # fmt: skip

_MATRIX_PRODUCTS = (operator.matmul, torch.matmul, "matmul", torch.bmm, "bmm")

RULES: Mapping[Target, Rule] = {
    **dict.fromkeys(CONVOLUTIONS, convolution),
    **dict.fromkeys(LINEARS, linear),
    **dict.fromkeys(BATCH_NORMS, batch_norm),
    **dict.fromkeys(_NORMS_OF_THE_LAST_DIMENSION, layer_norm),
    **dict.fromkeys(_NORMS_OF_AN_IMAGE, layer_norm_2d),
    **dict.fromkeys(_GROUP_NORMS, group_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), instance_norm),
    **dict.fromkeys(_RESPONSE_NORMS, response_norm),
    **dict.fromkeys(TRANSPOSED_CONVOLUTIONS, transposed_convolution),
    **dict.fromkeys(_EVO_NORMS_OF_BATCHES, refusal("measures every batch")),
    nn.MultiheadAttention: refusal(
        "computes with all of its weights together; torchcap.split_attention(model) takes it apart"
    ),
    GlobalResponseNorm: global_response_norm,
    ConvMlp: conv_mlp,
    BlurPool2d: blur_pool,
    nn.PReLU: prelu,
    tl.PReLU: prelu,
    **dict.fromkeys(_POINTWISE_MODULES, pointwise),
    **dict.fromkeys(_POINTWISE_FUNCTIONS, pointwise),
    **dict.fromkeys(_UNCHANGED, unchanged),
    **{t: spatial(dims) for dims, targets in _AVERAGE_POOLS.items() for t in targets},
    **{t: spatial(dims, bends=True) for dims, targets in _MAXIMUM_POOLS.items() for t in targets},
    **dict.fromkeys(_PADS, padding),
    **dict.fromkeys(_RESAMPLINGS, interpolation),
    **dict.fromkeys(_PRODUCTS, scaling),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), addition),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), addition),
    **dict.fromkeys((torch.addcmul, "addcmul"), multiplied_addition),
    **dict.fromkeys(_COMPARISONS, together),
    **dict.fromkeys((nn.GLU, F.glu), gated_halves),
    torch.functional.einsum: contraction,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), concatenation),
    **dict.fromkeys((torch.chunk, "chunk"), chunk),
    **dict.fromkeys((torch.mean, "mean", torch.sum, "sum"), reduction()),
    **dict.fromkeys(_EXTREMES + _SPREADS, reduction(bends=True)),
    **dict.fromkeys(_NORMS_OF_VECTORS, reduction(2, bends=True)),
    **dict.fromkeys((torch.max, "max", torch.min, "min"), extreme),
    **dict.fromkeys(_SOFTMAXES, along(1, bends=True)),
    nn.Softmax2d: refusal("acts along the channels"),
    F.normalize: along(2, default=1, bends=True),
    **dict.fromkeys((torch.topk, "topk"), along(2, default=-1, bends=True)),
    **dict.fromkeys(
        (torch.sort, "sort", torch.argsort, "argsort"), along(1, default=-1, bends=True)
    ),
    operator.getitem: item,
    getattr: attribute,
    "size": size,
    "dim": plain_result,
    **dict.fromkeys((torch.permute, "permute"), permutation),
    **dict.fromkeys(_TRANSPOSITIONS, transposition),
    **dict.fromkeys((torch.movedim, "movedim", torch.moveaxis, "moveaxis"), relocation),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze"), insertion),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten"), flattening),
    **dict.fromkeys((torch.reshape, "reshape", "view"), reshaping),
    **dict.fromkeys(("reshape_as", "view_as"), reshaping_as),
    **dict.fromkeys((nn.Unflatten, torch.unflatten, "unflatten"), heads.unflattening),
    **dict.fromkeys((nn.Unfold, F.unfold, nn.PixelUnshuffle, F.pixel_unshuffle), spreading),
    **dict.fromkeys((nn.Fold, F.fold, nn.PixelShuffle, F.pixel_shuffle), gathering),
    **dict.fromkeys((torch.squeeze, "squeeze"), removal),
    **dict.fromkeys(("expand", "expand_as"), expansion),
    **dict.fromkeys((torch.tile, "repeat", "tile"), repetition),
    **dict.fromkeys((torch.repeat_interleave, "repeat_interleave"), along(2)),
    **dict.fromkeys((torch.roll, "roll"), along(2, "dims")),
    **dict.fromkeys((torch.narrow, "narrow"), along(1)),
    "unfold": along(1, "dimension"),
    **dict.fromkeys((torch.flip, "flip"), flipping),
    **dict.fromkeys((torch.unbind, "unbind"), unbinding),
    **dict.fromkeys((torch.select, "select"), picking),
    **dict.fromkeys(_SPLITS, splitting),
    **dict.fromkeys((torch.stack,), stacking),
    **dict.fromkeys(_MATRIX_PRODUCTS, product),
    F.scaled_dot_product_attention: dot_product_attention,
    operator.floordiv: division,
}

RULES_ON_HEADS: Mapping[Target, Rule] = {
    **dict.fromkeys(_NORMS_OF_THE_LAST_DIMENSION, heads.norm_of_heads),
    **dict.fromkeys(_POINTWISE_MODULES, heads.pointwise),
    **dict.fromkeys(_POINTWISE_FUNCTIONS, heads.pointwise),
    **dict.fromkeys(_UNCHANGED, heads.unchanged),
    **dict.fromkeys(_PRODUCTS, heads.scaling),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), heads.addition),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), heads.addition),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), heads.joining),
    **dict.fromkeys((torch.chunk, "chunk", *_SPLITS), heads.cutting),
    **dict.fromkeys((torch.mean, "mean", torch.sum, "sum"), heads.reduction),
    **dict.fromkeys(_SOFTMAXES, heads.softmax),
    F.normalize: heads.normalization,
    operator.getitem: heads.item_of_heads,
    getattr: heads.attribute,
    "size": heads.size,
    **dict.fromkeys((torch.permute, "permute"), heads.permutation),
    **dict.fromkeys(_TRANSPOSITIONS, heads.transposition),
    **dict.fromkeys((torch.movedim, "movedim", torch.moveaxis, "moveaxis"), heads.relocation),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze"), heads.insertion),
    **dict.fromkeys((torch.flatten, "flatten"), heads.flattening),
    **dict.fromkeys((torch.reshape, "reshape", "view"), reshaping),
    **dict.fromkeys((torch.unbind, "unbind"), heads.unbinding),
    **dict.fromkeys(_MATRIX_PRODUCTS, product),
    F.scaled_dot_product_attention: dot_product_attention,
}
"""Rules for tensors whose channels are spread over heads; what is not here gives up on them."""

READS_SIZES: frozenset[Rule] = frozenset({item, size, attribute, reshaping, expansion, division})
"""Rules that know what to do with an :class:`Extent` among their arguments."""

READS_HELD: frozenset[Rule] = frozenset({scaling, addition})
"""Rules that know what to do with a :class:`~torchcap.graph.values.Held` among their arguments."""

BINDS_SIZES: frozenset[Rule] = frozenset(
    {reshaping, splitting, item, heads.cutting, heads.item_of_heads, heads.unflattening}
)
"""Rules that know what to do with a :class:`~torchcap.graph.sizes.Size` among their arguments."""


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
