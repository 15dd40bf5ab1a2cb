"""Operator rules: what each operator does to the channels of the tensors it reads.

A rule is a function ``rule(call) -> value``. It sees the operator's arguments as abstract values
and answers with the abstract value of the result, joining, fixing or restricting channels on the
way (:mod:`torchcap.graph.values`).

``OPERATORS`` maps a module class, a function or a method name to the one record of all that is
known of it. A class that inherits the ``forward`` of one in the table has the same record. **An
operator without one is a boundary**: every channel that enters it stays as it is, and what comes
out of it is opaque.
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

from torchcap.graph import heads, moving
from torchcap.graph.attention import (
    added_product,
    dot_product_attention,
    product,
    scaling,
)
from torchcap.graph.calls import assigned
from torchcap.graph.einsum import contraction
from torchcap.graph.factories import assignment, made
from torchcap.graph.functional import (
    FUNCTIONAL_CONVOLUTIONS,
    batch_norm_function,
    convolution_function,
    group_norm_function,
    layer_norm_function,
    linear_function,
)
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
    count,
    extreme,
    gated_halves,
    interpolation,
    multiplied_addition,
    normalization,
    padding,
    pointwise,
    reduction,
    refusal,
    size,
    spatial,
    together,
    unchanged,
)
from torchcap.graph.values import Extent, Held, Kind, Operator, Root, Rule, Setting
from torchcap.graph.weights import TRANSPOSED_CONVOLUTIONS

Target = type[nn.Module] | Callable[..., Any] | str
Rules = Mapping[Target, Operator | Rule]
"""What a user says of operators; a rule by itself is an operator of no special kind."""

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
LAYERS: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, *LINEARS, *TRANSPOSED_CONVOLUTIONS)
COUNTED: tuple[type[nn.Module], ...] = (*LAYERS, nn.MultiheadAttention)
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
_SPLITS = (torch.split, torch.functional.split, "split", "split_with_sizes")

_MATRIX_PRODUCTS = (operator.matmul, torch.matmul, "matmul", torch.bmm, "bmm")

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_SUBTRACTIONS = (
    operator.sub, operator.isub, torch.sub, "sub", "sub_", torch.subtract, "subtract",
)  # fmt: skip


def _operator(
    channels: Rule, heads: Rule | None = None, kind: Kind = "other", *knows: type
) -> Operator:
    return Operator(channels, heads, kind, frozenset(knows))


_POINTWISE = _operator(pointwise, heads.pointwise, "pointwise")
_SAME = _operator(unchanged, heads.unchanged, "unchanged")
_CONVOLUTION = _operator(convolution, kind="convolution")
_LINEAR = _operator(linear, heads.linear, "linear")
_TRANSPOSED = _operator(transposed_convolution, kind="transposed convolution")
_BATCH_NORM = _operator(batch_norm, kind="batch norm")
_LAYER_NORM = _operator(layer_norm, heads.norm_of_heads, "norm")
_PRODUCT = _operator(scaling, scaling, "product", Held, Root)
_MATRIX_PRODUCT = _operator(product, product)

LAYER_FUNCTIONS: Mapping[Target, Operator] = {
    F.linear: _operator(linear_function, linear_function),
    **dict.fromkeys(FUNCTIONAL_CONVOLUTIONS, _operator(convolution_function)),
    **dict.fromkeys(
        (F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm),
        _operator(layer_norm_function, None, "other", Extent, Setting),
    ),
    F.batch_norm: _operator(batch_norm_function),
    F.group_norm: _operator(group_norm_function),
}
"""Functions that may be given a layer's own weights, and then are that layer."""

OPERATORS: Mapping[Target, Operator] = {
    **dict.fromkeys(CONVOLUTIONS, _CONVOLUTION),
    **dict.fromkeys(LINEARS, _LINEAR),
    **dict.fromkeys(BATCH_NORMS, _BATCH_NORM),
    **dict.fromkeys(_NORMS_OF_THE_LAST_DIMENSION, _LAYER_NORM),
    **dict.fromkeys(_NORMS_OF_AN_IMAGE, _operator(layer_norm_2d, kind="norm")),
    **dict.fromkeys(_GROUP_NORMS, _operator(group_norm, kind="norm")),
    **dict.fromkeys(
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        _operator(instance_norm, kind="norm"),
    ),
    **dict.fromkeys(_RESPONSE_NORMS, _operator(response_norm, kind="norm")),
    **dict.fromkeys(TRANSPOSED_CONVOLUTIONS, _TRANSPOSED),
    **dict.fromkeys(_EVO_NORMS_OF_BATCHES, _operator(refusal("measures every batch"))),
    nn.MultiheadAttention: _operator(
        refusal(
            "computes with all of its weights together; "
            "torchcap.split_attention(model) takes it apart"
        )
    ),
    GlobalResponseNorm: _operator(global_response_norm, kind="norm"),
    ConvMlp: _operator(conv_mlp, kind="layers"),
    BlurPool2d: _operator(blur_pool),
    nn.PReLU: _operator(prelu),
    tl.PReLU: _operator(prelu),
    **dict.fromkeys(_POINTWISE_MODULES, _POINTWISE),
    **dict.fromkeys(_POINTWISE_FUNCTIONS, _POINTWISE),
    **dict.fromkeys(_UNCHANGED, _SAME),
    **{t: _operator(spatial(dims)) for dims, targets in _AVERAGE_POOLS.items() for t in targets},
    **{
        t: _operator(spatial(dims, bends=True))
        for dims, targets in _MAXIMUM_POOLS.items()
        for t in targets
    },
    **dict.fromkeys(_PADS, _operator(padding)),
    **dict.fromkeys(_RESAMPLINGS, _operator(interpolation)),
    **dict.fromkeys(_PRODUCTS, _PRODUCT),
    **dict.fromkeys(_ADDITIONS, _operator(addition, heads.addition, "sum", Held)),
    **dict.fromkeys(_SUBTRACTIONS, _operator(addition, heads.addition, "difference", Held)),
    **dict.fromkeys((torch.addcmul, "addcmul"), _operator(multiplied_addition)),
    **dict.fromkeys(_COMPARISONS, _operator(together)),
    **dict.fromkeys((nn.GLU, F.glu), _operator(gated_halves)),
    torch.functional.einsum: _operator(contraction, contraction),
    **dict.fromkeys(
        (torch.cat, torch.concat, torch.concatenate), _operator(concatenation, heads.joining)
    ),
    **dict.fromkeys((torch.chunk, "chunk"), _operator(chunk, heads.chunking_of_heads, "chunk")),
    **dict.fromkeys(
        (torch.mean, "mean", torch.sum, "sum"), _operator(reduction(), heads.reduction)
    ),
    **dict.fromkeys(_EXTREMES + _SPREADS, _operator(reduction(bends=True))),
    **dict.fromkeys(_NORMS_OF_VECTORS, _operator(reduction(2, bends=True))),
    **dict.fromkeys((torch.max, "max", torch.min, "min"), _operator(extreme)),
    **dict.fromkeys(_SOFTMAXES, _operator(along(1, bends=True), heads.softmax)),
    nn.Softmax2d: _operator(refusal("acts along the channels")),
    F.normalize: _operator(normalization, heads.normalization),
    **dict.fromkeys((torch.topk, "topk"), _operator(along(2, default=-1, bends=True))),
    **dict.fromkeys(
        (torch.sort, "sort", torch.argsort, "argsort"),
        _operator(along(1, default=-1, bends=True)),
    ),
    operator.getitem: _operator(heads.item, heads.item_of_heads, "move", Extent, Setting),
    getattr: _operator(attribute, heads.attribute, "move"),
    "size": _operator(size, heads.size),
    **dict.fromkeys(("numel", "nelement"), _operator(count)),
    **dict.fromkeys((torch.permute, "permute"), _operator(permutation, heads.permutation, "move")),
    **dict.fromkeys(_TRANSPOSITIONS, _operator(transposition, heads.transposition, "move")),
    **dict.fromkeys(
        (torch.movedim, "movedim", torch.moveaxis, "moveaxis"),
        _operator(relocation, heads.relocation, "move"),
    ),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze"), _operator(insertion, heads.insertion, "move")),
    **dict.fromkeys(
        (nn.Flatten, torch.flatten, "flatten"), _operator(flattening, heads.flattening, "move")
    ),
    **dict.fromkeys(
        (torch.reshape, "reshape", "view"),
        _operator(heads.reshaping, heads.reshaping, "move", Extent, Setting),
    ),
    **dict.fromkeys(("reshape_as", "view_as"), _operator(reshaping_as, kind="move")),
    **dict.fromkeys(
        (nn.Unflatten, torch.unflatten, "unflatten"),
        _operator(heads.unflattening, None, "move", Extent, Setting),
    ),
    **dict.fromkeys(
        (nn.Unfold, F.unfold, nn.PixelUnshuffle, F.pixel_unshuffle), _operator(spreading)
    ),
    **dict.fromkeys((nn.Fold, F.fold, nn.PixelShuffle, F.pixel_shuffle), _operator(gathering)),
    **dict.fromkeys((torch.squeeze, "squeeze"), _operator(removal, kind="move")),
    **dict.fromkeys(("expand", "expand_as"), _operator(expansion, None, "other", Extent)),
    **dict.fromkeys((torch.tile, "repeat", "tile"), _operator(repetition)),
    **dict.fromkeys((torch.repeat_interleave, "repeat_interleave"), _operator(along(2))),
    **dict.fromkeys((torch.roll, "roll"), _operator(along(2, "dims"))),
    **dict.fromkeys((torch.narrow, "narrow"), _operator(along(1))),
    "unfold": _operator(along(1, "dimension")),
    **dict.fromkeys((torch.flip, "flip"), _operator(flipping)),
    **dict.fromkeys((torch.unbind, "unbind"), _operator(unbinding, heads.unbinding, "move")),
    **dict.fromkeys((torch.select, "select"), _operator(picking, kind="move")),
    **dict.fromkeys(
        _SPLITS,
        _operator(heads.splitting, heads.splitting_of_heads, "split", Setting, Extent),
    ),
    **dict.fromkeys((torch.tensor_split, "tensor_split"), _operator(moving.splitting)),
    **dict.fromkeys((torch.stack,), _operator(stacking)),
    **dict.fromkeys(_MATRIX_PRODUCTS, _MATRIX_PRODUCT),
    **dict.fromkeys((torch.addmm, "addmm", torch.baddbmm, "baddbmm"), _operator(added_product)),
    **LAYER_FUNCTIONS,
    **dict.fromkeys((torch.zeros, torch.ones), _operator(made(0), None, "other", Extent)),
    torch.full: _operator(made(0), None, "other", Extent),
    **dict.fromkeys(
        ("new_zeros", "new_ones", "new_full"), _operator(made(1), None, "other", Extent)
    ),
    **dict.fromkeys(
        (torch.empty, torch.rand, torch.randn),
        _operator(made(0, constant=False), None, "other", Extent),
    ),
    assigned: _operator(assignment),
    F.scaled_dot_product_attention: _operator(dot_product_attention, dot_product_attention),
}

_COMPUTATION = ("forward", "_conv_forward", "_check_input_dim")
"""The methods by which a class computes what the rule of its base is about."""


def is_patched(module: nn.Module) -> bool:
    """Whether a module's computation has been replaced on the instance."""
    return any(name in vars(module) for name in _COMPUTATION)


def find_module_operator(
    module: nn.Module, operators: Mapping[Target, Operator], *, patched: bool = False
) -> Operator | None:
    """Return the record of a module's class, or of the class whose computation it inherits.

    A module whose methods have been replaced on the instance computes what nobody knows.

    Args:
        module: the module.
        operators: what is known of operators.
        patched: whether the record is wanted all the same, of a class that computes otherwise too.
    """
    if is_patched(module) and not patched:
        return None
    for base in type(module).__mro__:
        found = operators.get(base)
        if found is not None:
            same = all(getattr(type(module), m, 0) is getattr(base, m, 0) for m in _COMPUTATION)
            return found if same or patched else None
    return None


def find_operator(
    node: fx.Node, module: nn.Module | None, operators: Mapping[Target, Operator]
) -> Operator | None:
    """Return the record of a graph node, if there is one."""
    if module is not None:
        return find_module_operator(module, operators)
    return operators.get(node.target) if node.op in {"call_function", "call_method"} else None
