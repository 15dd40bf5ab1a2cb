"""Networks with odd code: hooks, caches, patches, branches, sizes and views as people write them.

A quirk stands between two layers of a small network: ``quirk(module, y)`` gets the features of the
first and gives those of the second. A setup may hang hooks on the module, patch its layers, or keep
things beside it. What is right is not written down for each: every network must pass the proofs of
:mod:`proofs`, and be left as it was. ``free`` says whether the space of the first layer should be
free; None where that is a matter of taste.
"""

from __future__ import annotations

import functools
import math
import random
import types
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import einops
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8
Act = Callable[["Quirky", Tensor], Any]


class Quirk(NamedTuple):
    """One way of writing code.

    Attributes:
        act: what is done to the features.
        setup: what is done to the module beforehand.
        free: whether the first layer's space should be free.
    """

    act: Act
    setup: Callable[[Quirky], None] | None = None
    free: bool | None = None


QUIRKS: dict[str, Quirk] = {}


def quirk(
    *, setup: Callable[[Quirky], None] | None = None, free: bool | None = None
) -> Callable[[Act], Act]:
    """Put a function into the table of quirks, under its name."""

    def add(act: Act) -> Act:
        QUIRKS[act.__name__] = Quirk(act, setup, free)
        return act

    return add


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Quirky(nn.Module):
    """Two layers with a quirk between them, and one behind."""

    def __init__(self, kind: str, channels: int = 6) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.c, self.b = conv(channels, WIDTH), conv(WIDTH, WIDTH), conv(WIDTH, channels)
        self.act = nn.ReLU()
        self.width = WIDTH
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.register_buffer("index", torch.arange(WIDTH).flip(0))
        self.norm = nn.BatchNorm2d(WIDTH)
        self.cache: dict[Any, Any] = {}
        self.calls = 0
        if QUIRKS[kind].setup is not None:
            QUIRKS[kind].setup(self)

    def forward(self, x: Tensor) -> Any:
        y = QUIRKS[self.kind].act(self, self.act(self.a(x)))
        return self.b(self.act(self.c(y)))


class Net(nn.Module):
    """A chain of quirky modules between a stem and a head."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 6), conv(6, 2)
        self.quirks = nn.ModuleList(Quirky(kind) for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for module in self.quirks:
            x = module(x)
        return self.head(torch.relu(x))


# --------------------------------------------------------------------------------------------------
# Modules that are reached in other ways than by their name


def layers_in_a_list(m: Quirky) -> None:
    m.layers = [m.c, m.norm, m.act]


@quirk(setup=layers_in_a_list, free=True)
def goes_through_a_list_of_layers(m: Quirky, y: Tensor) -> Tensor:
    for layer in m.layers:
        y = layer(y)
    return y


def norm_in_a_closure(m: Quirky) -> None:
    norm = m.norm
    m.normalize = lambda y: norm(m.c(y))


@quirk(setup=norm_in_a_closure, free=True)
def goes_through_a_closure(m: Quirky, y: Tensor) -> Tensor:
    return m.normalize(y)


def norm_under_two_names(m: Quirky) -> None:
    m.other = nn.ModuleDict({"norm": m.norm, "layer": m.c})


@quirk(setup=norm_under_two_names, free=True)
def goes_through_another_name(m: Quirky, y: Tensor) -> Tensor:
    return m.other["norm"](m.c(y))


def forward_of_a_norm(m: Quirky) -> None:
    m.normalize = m.norm.forward


@quirk(setup=forward_of_a_norm)
def calls_a_forward_that_is_kept(m: Quirky, y: Tensor) -> Tensor:
    return m.normalize(m.c(y))


# --------------------------------------------------------------------------------------------------
# Hooks


def hook(function: Callable[..., Any], *, on: str = "a", before: bool = False) -> Any:
    """Return a setup that hangs a hook on a layer."""

    def setup(module: Quirky) -> None:
        layer = module.get_submodule(on)
        bound = partial(function, module) if function.__code__.co_argcount > 3 else function
        (layer.register_forward_pre_hook if before else layer.register_forward_hook)(bound)

    return setup


@quirk(setup=hook(lambda m, i, o: o * 2), free=True)
def hook_scales_the_output(m: Quirky, y: Tensor) -> Tensor:
    return y


@quirk(setup=hook(lambda m, i, o: o.flip(1)), free=False)
def hook_flips_channels(m: Quirky, y: Tensor) -> Tensor:
    return y


@quirk(setup=hook(lambda m, i: (i[0] + 1,), on="c", before=True), free=True)
def hook_changes_the_input(m: Quirky, y: Tensor) -> Tensor:
    return y


@quirk(setup=hook(lambda m, i: (i[0].roll(1, 1),), on="c", before=True), free=False)
def hook_rolls_the_input(m: Quirky, y: Tensor) -> Tensor:
    return y


def _keep_in_closure(m: Quirky) -> None:
    kept = m.kept = {}
    m.a.register_forward_hook(lambda _m, _i, o: kept.update(a=o))


@quirk(setup=_keep_in_closure, free=False)
def hook_keeps_in_a_closure(m: Quirky, y: Tensor) -> Tensor:
    return y


@quirk(setup=_keep_in_closure, free=False)
def forward_reads_what_a_hook_keeps(m: Quirky, y: Tensor) -> Tensor:
    return y + m.kept["a"].mean((2, 3), keepdim=True)


def _keep_on_itself(m: Quirky) -> None:
    def keep(layer: nn.Module, _: Any, output: Tensor) -> None:
        layer.feature = output

    m.a.register_forward_hook(keep)


@quirk(setup=_keep_on_itself, free=False)
def hook_keeps_on_the_layer(m: Quirky, y: Tensor) -> Tensor:
    return y


GLOBAL: list[Tensor] = []


@quirk(setup=hook(lambda m, i, o: GLOBAL.append(o)), free=False)
def hook_keeps_in_a_global_list(m: Quirky, y: Tensor) -> Tensor:
    return y


def _measure(m: Quirky) -> None:
    def measure(layer: nn.Module, _: Any, output: Tensor) -> None:
        m.seen.copy_(output.detach().mean((0, 2, 3)))

    m.a.register_forward_hook(measure)


@quirk(setup=_measure, free=False)
def hook_measures_into_a_buffer(m: Quirky, y: Tensor) -> Tensor:
    return y * m.seen.sum().sigmoid()


def _renormalise(m: Quirky) -> None:
    def renorm(layer: nn.Module, _: Any) -> None:
        with torch.no_grad():
            layer.weight.copy_(torch.renorm(layer.weight, 2, 0, 0.2))

    m.c.register_forward_pre_hook(renorm)


@quirk(setup=_renormalise, free=False)
def hook_renormalises_weights(m: Quirky, y: Tensor) -> Tensor:
    return y


def _count(m: Quirky) -> None:
    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        layer.called = getattr(layer, "called", 0) + 1

    m.a.register_forward_hook(count)


@quirk(setup=_count, free=True)
def hook_counts_calls(m: Quirky, y: Tensor) -> Tensor:
    return y


@quirk(setup=lambda m: m.a.register_full_backward_hook(lambda *_: None), free=True)
def backward_hook(m: Quirky, y: Tensor) -> Tensor:
    return y


@quirk(setup=lambda m: m.a.register_forward_hook(lambda m, a, k, o: o * 0.5, with_kwargs=True))
def hook_with_names(m: Quirky, y: Tensor) -> Tensor:
    return y


@quirk(setup=hook(lambda m, i, o: o.mul_(0.5)), free=True)
def hook_writes_in_place(m: Quirky, y: Tensor) -> Tensor:
    return y


# --------------------------------------------------------------------------------------------------
# Patches


def _patch_standardise(m: Quirky) -> None:
    def standardised(layer: nn.Conv2d, x: Tensor) -> Tensor:
        w = layer.weight
        return F.conv2d(x, w - w.mean((1, 2, 3), keepdim=True), layer.bias, padding=1)

    m.c.forward = types.MethodType(standardised, m.c)


@quirk(setup=_patch_standardise, free=False)
def patched_forward(m: Quirky, y: Tensor) -> Tensor:
    return y


def _patch_around(m: Quirky) -> None:
    plain = m.c.forward
    m.c.forward = lambda x: plain(x) * 2


@quirk(setup=_patch_around, free=True)
def patched_around_the_old_forward(m: Quirky, y: Tensor) -> Tensor:
    return y


def _patch_flip(m: Quirky) -> None:
    plain = m.a.forward
    m.a.forward = lambda x: plain(x).flip(1)


@quirk(setup=_patch_flip, free=False)
def patched_to_flip(m: Quirky, y: Tensor) -> Tensor:
    return y


def _patch_inner(m: Quirky) -> None:
    def inner(self: nn.Conv2d, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w - w.mean(1, keepdim=True), b)

    m.c._conv_forward = types.MethodType(inner, m.c)


@quirk(setup=_patch_inner, free=False)
def patched_convolution(m: Quirky, y: Tensor) -> Tensor:
    return y


@quirk(setup=lambda m: setattr(m.act, "forward", lambda x: x.softmax(1)), free=False)
def patched_activation(m: Quirky, y: Tensor) -> Tensor:
    return y


class CalledOtherwise(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x).flip(1)


@quirk(setup=lambda m: setattr(m, "a", CalledOtherwise(6, WIDTH, 3, padding=1)), free=False)
def class_with_a_call_of_its_own(m: Quirky, y: Tensor) -> Tensor:
    return y


class Doubling(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@quirk(setup=lambda m: setattr(m, "c", Doubling(WIDTH, WIDTH, 3, padding=1)))
def subclass_around_its_base(m: Quirky, y: Tensor) -> Tensor:
    return y


# --------------------------------------------------------------------------------------------------
# Caches


@quirk(free=True)
def cache_by_size(m: Quirky, y: Tensor) -> Tensor:
    key = y.shape[2:]
    if key not in m.cache:
        m.cache[key] = torch.linspace(0, 1, y.shape[3]).to(y)
    return y + m.cache[key]


@quirk(free=False)
def cache_of_the_last_features(m: Quirky, y: Tensor) -> Tensor:
    m.last = y
    return y


@quirk()
def cache_of_a_weight(m: Quirky, y: Tensor) -> Tensor:
    if "w" not in m.cache:
        m.cache["w"] = m.c.weight.detach().abs().sum()
    return y * m.cache["w"].sigmoid()


@functools.lru_cache
def ramp(width: int) -> Tensor:
    return torch.linspace(0, 1, width, dtype=torch.float64)


@quirk()
def cached_function_of_the_image(m: Quirky, y: Tensor) -> Tensor:
    return y + ramp(y.shape[3]).to(y)


@quirk(free=False)
def cached_function_of_the_channels(m: Quirky, y: Tensor) -> Tensor:
    return y * ramp(y.shape[1]).to(y)[:, None, None]


@quirk(setup=lambda m: setattr(m, "before", None))
def average_over_calls(m: Quirky, y: Tensor) -> Tensor:
    m.before = y.mean((0, 2, 3)) if m.before is None else m.before
    return y


# --------------------------------------------------------------------------------------------------
# Branches


@quirk(free=False)
def branch_on_being_a_tensor(m: Quirky, y: Tensor) -> Tensor:
    return y.flip(1) if isinstance(y, Tensor) else y


@quirk(free=False)
def branch_on_the_exact_type(m: Quirky, y: Tensor) -> Tensor:
    return m.c(y).flip(1) + y if torch.is_tensor(y) and hasattr(y, "untyped_storage") else y


@quirk(free=False)
def attempt(m: Quirky, y: Tensor) -> Tensor:
    try:
        torch.zeros(1) + y
    except TypeError:
        return y
    return y[:, m.index]


@quirk()
def attempt_at_a_value(m: Quirky, y: Tensor) -> Tensor:
    try:
        return y * float(y.mean().sigmoid())
    except RuntimeError:
        return y


@quirk()
def branch_on_a_value(m: Quirky, y: Tensor) -> Tensor:
    return y * 2 if y.mean() > 0 else y.flip(1)


@quirk(free=True)
def branch_on_the_image(m: Quirky, y: Tensor) -> Tensor:
    return F.avg_pool2d(y, 2) if y.shape[-1] > 9 else y


@quirk(free=False)
def branch_on_the_image_to_a_flip(m: Quirky, y: Tensor) -> Tensor:
    return y.flip(1) if y.shape[-1] > 9 else y


@quirk(setup=lambda m: setattr(m, "d", conv(WIDTH, WIDTH)), free=True)
def branch_on_the_image_to_another_layer(m: Quirky, y: Tensor) -> Tensor:
    return m.d(y) if y.shape[-1] > 9 else y


@quirk(free=False)
def branch_on_the_batch(m: Quirky, y: Tensor) -> Tensor:
    return y[:, m.index] if len(y) > 2 else y


@quirk(free=False)
def branch_on_the_channels(m: Quirky, y: Tensor) -> Tensor:
    return y * 2 if y.shape[1] == WIDTH else y


@quirk(free=False)
def branch_on_fewer_channels(m: Quirky, y: Tensor) -> Tensor:
    return y if y.shape[1] > 5 else y * 3


@quirk(free=False)
def branch_on_all_entries(m: Quirky, y: Tensor) -> Tensor:
    return y * 2 if y.numel() > y[:, :1].numel() * 5 else y


@quirk(free=False)
def lookup_by_channels(m: Quirky, y: Tensor) -> Tensor:
    return y * {8: 2.0}.get(y.shape[1], 1.0)


@quirk(free=False)
def lookup_by_words(m: Quirky, y: Tensor) -> Tensor:
    return y * {"8": 2.0}.get(str(y.shape[1]), 1.0)


@quirk(free=False)
def kind_of_integer(m: Quirky, y: Tensor) -> Tensor:
    return y * 2 if type(y.shape[1]) is int and y.shape[1] == 8 else y


@quirk(free=True)
def loop_over_the_size(m: Quirky, y: Tensor) -> Tensor:
    while y.shape[-1] > 6:
        y = F.max_pool2d(y, 2)
    return y


@quirk()
def loop_over_the_batch(m: Quirky, y: Tensor) -> Tensor:
    return torch.cat([image[None] * 2 for image in y])


@quirk(free=False)
def loop_over_the_channels(m: Quirky, y: Tensor) -> Tensor:
    return torch.stack([y[:, i] * (i + 1) for i in range(y.shape[1])], 1)


@quirk(free=True)
def branch_on_dtype_and_device(m: Quirky, y: Tensor) -> Tensor:
    return y * 2 if y.is_floating_point() and y.dtype == m.c.weight.dtype else y.flip(1)


@quirk()
def branch_on_the_mode(m: Quirky, y: Tensor) -> Tensor:
    return y.flip(1) if m.training else y


@quirk(free=True)
def branch_on_a_flag(m: Quirky, y: Tensor) -> Tensor:
    return y.flip(1) if m.calls > 3 else y


@quirk(free=True)
def assertion(m: Quirky, y: Tensor) -> Tensor:
    torch._assert(y.shape[2] > 1, f"images of {y.shape[2]}")
    return y


# --------------------------------------------------------------------------------------------------
# Sizes


@quirk(free=False)
def counted_by_range(m: Quirky, y: Tensor) -> Tensor:
    return y / len(range(y.shape[1]))


@quirk(free=False)
def counted_by_a_list(m: Quirky, y: Tensor) -> Tensor:
    return y * torch.tensor([1.0 + i for i in range(y.shape[1])]).to(y).mean()


@quirk(free=False)
def counted_by_numpy(m: Quirky, y: Tensor) -> Tensor:
    return y * float(np.arange(y.shape[1]).mean())


@quirk(free=False)
def divided_by_channels(m: Quirky, y: Tensor) -> Tensor:
    return y / y.shape[1]


@quirk(free=False)
def divided_by_the_root_of_channels(m: Quirky, y: Tensor) -> Tensor:
    return y / math.sqrt(y.shape[1])


@quirk(free=False)
def logarithm_of_channels(m: Quirky, y: Tensor) -> Tensor:
    return y * math.log(y.size(1))


@quirk(free=False)
def tensor_of_channels(m: Quirky, y: Tensor) -> Tensor:
    return y / torch.tensor([y.shape[1], 1.0]).to(y).sum()


@quirk()
def scaled_by_an_attribute(m: Quirky, y: Tensor) -> Tensor:
    return y / m.width


@quirk(free=False)
def scaled_by_a_layers_attribute(m: Quirky, y: Tensor) -> Tensor:
    return y / m.c.in_channels


@quirk(free=True)
def viewed_by_a_layers_attribute(m: Quirky, y: Tensor) -> Tensor:
    return y.flatten(2).view(len(y), m.a.out_channels, *y.shape[2:])


@quirk(free=True)
def viewed_by_its_own_sizes(m: Quirky, y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y.reshape(n, c, h * w).view(n, c, h, w)


@quirk(free=True)
def viewed_by_an_attribute(m: Quirky, y: Tensor) -> Tensor:
    return y.flatten(2).view(y.shape[0], m.width, *y.shape[2:])


@quirk(free=True)  # the forward is rewritten
def viewed_by_a_number(m: Quirky, y: Tensor) -> Tensor:
    return y.flatten(2).view(y.shape[0], 8, *y.shape[2:])


@quirk(free=True)
def sizes_turned_into_integers(m: Quirky, y: Tensor) -> Tensor:
    return F.interpolate(y, size=(int(y.shape[2] / 2), int(float(y.shape[3]) // 2)))


@quirk(free=True)
def zeros_of_the_image(m: Quirky, y: Tensor) -> Tensor:
    n, _, h, w = y.shape
    return y + torch.zeros(n, 1, h, w).to(y) + y.new_ones(h, w)


@quirk(free=True)
def zeros_of_the_channels(m: Quirky, y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y + torch.zeros(n, c, h, w).to(y)


@quirk(free=True)
def ones_of_the_channels(m: Quirky, y: Tensor) -> Tensor:
    return y * torch.ones(y.shape[1], 1, 1).to(y) + torch.full(y.shape, 0.5).to(y)


@quirk(free=False)
def ramp_over_the_channels(m: Quirky, y: Tensor) -> Tensor:
    return y * torch.arange(y.shape[1]).to(y)[:, None, None]


@quirk(free=True)
def tensor_of_the_image(m: Quirky, y: Tensor) -> Tensor:
    return y / torch.tensor([y.shape[2], y.shape[3]]).to(y).sum()


@quirk(free=True)
def expanded(m: Quirky, y: Tensor) -> Tensor:
    return y + y.mean((2, 3), keepdim=True).expand(-1, -1, *y.shape[2:])


@quirk()
def expanded_by_numbers(m: Quirky, y: Tensor) -> Tensor:
    return y + y.mean((2, 3), keepdim=True).expand(len(y), 8, *y.shape[2:])


# --------------------------------------------------------------------------------------------------
# Weights that are read past their layer


@quirk(free=False)
def first_parameter(m: Quirky, y: Tensor) -> Tensor:
    return y * next(m.c.parameters()).sum().sigmoid()


@quirk(free=False)
def all_parameters(m: Quirky, y: Tensor) -> Tensor:
    return y * sum(p.pow(2).sum() for p in m.parameters()).sigmoid()


@quirk(setup=lambda m: setattr(m, "listed", [m.c.weight]), free=False)
def parameter_in_a_list(m: Quirky, y: Tensor) -> Tensor:
    return y * m.listed[0].mean().sigmoid()


@quirk(free=False)
def state_dict_of_a_layer(m: Quirky, y: Tensor) -> Tensor:
    return y * m.c.state_dict()["weight"].mean().sigmoid()


@quirk(free=False)
def weight_of_a_layer(m: Quirky, y: Tensor) -> Tensor:
    return y + F.conv2d(y, m.c.weight, padding=1)


@quirk(free=False)
def data_of_a_weight(m: Quirky, y: Tensor) -> Tensor:
    return y * m.c.weight.data.norm().sigmoid()


@quirk(free=True)
def dtype_of_a_weight(m: Quirky, y: Tensor) -> Tensor:
    return y.to(m.c.weight.dtype)


@quirk(free=False)
def shape_of_a_weight(m: Quirky, y: Tensor) -> Tensor:
    return y / m.c.weight.shape[1]


# --------------------------------------------------------------------------------------------------
# Functions with a layer's own weights, and buffers


@quirk(setup=lambda m: setattr(m, "d", conv(WIDTH, WIDTH)), free=True)
def functional_convolution(m: Quirky, y: Tensor) -> Tensor:
    return F.conv2d(y, m.d.weight, m.d.bias, padding=1).relu()


@quirk(setup=lambda m: setattr(m, "d", conv(WIDTH, WIDTH)))
def functional_convolution_of_another_stride(m: Quirky, y: Tensor) -> Tensor:
    return F.conv2d(y, m.d.weight, m.d.bias, padding=1, stride=2).relu()


@quirk(setup=lambda m: setattr(m, "d", nn.Linear(WIDTH, WIDTH)), free=True)
def functional_linear(m: Quirky, y: Tensor) -> Tensor:
    return F.linear(y.movedim(1, -1), m.d.weight, m.d.bias).movedim(-1, 1)


@quirk(setup=lambda m: setattr(m, "d", nn.Linear(WIDTH, WIDTH, bias=False)))
def functional_linear_with_a_strange_bias(m: Quirky, y: Tensor) -> Tensor:
    return F.linear(y.movedim(1, -1), m.d.weight, m.scale).movedim(-1, 1)


@quirk()
def functional_batch_norm(m: Quirky, y: Tensor) -> Tensor:
    n = m.norm
    return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)


@quirk(setup=lambda m: setattr(m, "d", nn.LayerNorm(WIDTH)))
def functional_layer_norm(m: Quirky, y: Tensor) -> Tensor:
    x = F.layer_norm(y.movedim(1, -1), (WIDTH,), m.d.weight, m.d.bias, m.d.eps)
    return x.movedim(-1, 1)


@quirk()
def functional_group_norm_without_weights(m: Quirky, y: Tensor) -> Tensor:
    return F.group_norm(y, 2)


@quirk(free=True)
def buffer_for_each_channel(m: Quirky, y: Tensor) -> Tensor:
    return y * m.scale.view(1, -1, 1, 1)


@quirk(free=True)
def frozen_norm_by_hand(m: Quirky, y: Tensor) -> Tensor:
    scale = m.norm.weight.reshape(1, -1, 1, 1) * (m.norm.running_var + 1e-5).rsqrt().reshape(
        1, -1, 1, 1
    )
    return y * scale


@quirk(free=False)
def gathered_by_an_index(m: Quirky, y: Tensor) -> Tensor:
    return y[:, m.index]


@quirk(free=False)
def selected_by_an_index(m: Quirky, y: Tensor) -> Tensor:
    return y.index_select(1, m.index)


# --------------------------------------------------------------------------------------------------
# Views, and writing in place


@quirk(free=True)
def chunks_in_a_list(m: Quirky, y: Tensor) -> Tensor:
    parts = list(y.chunk(2, 1))
    parts.append(parts[-1] * 0.5)
    return torch.cat([parts[0], parts[2]], 1)


@quirk()
def shift_by_assignment(m: Quirky, y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    out[:, :, 1:] = y[:, :, :-1]
    return out


@quirk(free=False)
def shift_of_some_channels(m: Quirky, y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    out[:, :4, 1:] = y[:, :4, :-1]
    out[:, 4:] = y[:, 4:]
    return out


@quirk()
def new_tensor_filled(m: Quirky, y: Tensor) -> Tensor:
    out = y.new_empty(y.shape)
    out[...] = y
    return out


@quirk()
def copied_into_a_view(m: Quirky, y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    out[:, :, ::2].copy_(y[:, :, ::2])
    return out


@quirk()
def added_to_a_view(m: Quirky, y: Tensor) -> Tensor:
    y = y.clone()
    part = y[:, :, 1:]
    part += 1
    return y


@quirk(free=False)
def added_to_some_channels(m: Quirky, y: Tensor) -> Tensor:
    y = y.clone()
    y[:, 2] += 1
    return y


@quirk()
def written_by_out(m: Quirky, y: Tensor) -> Tensor:
    out = torch.empty_like(y)
    torch.add(y, 1, out=out)
    return out


@quirk(free=True)
def activated_in_place(m: Quirky, y: Tensor) -> Tensor:
    kept = y
    y.tanh_()
    return kept + y


@quirk()
def swapped_by_unpacking(m: Quirky, y: Tensor) -> Tensor:
    left, right = y.chunk(2, dim=1)
    return torch.cat((right, left), dim=1)


@quirk()
def shuffled_channels(m: Quirky, y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@quirk(free=True)
def branch_on_a_size_far_below(m: Quirky, y: Tensor) -> Tensor:
    return y * 2 if y.numel() * 4 > 2**31 or y.shape[1] > 1000 else y


@quirk(free=False)
def branch_on_enough_channels(m: Quirky, y: Tensor) -> Tensor:
    return y * 2 if y.shape[1] >= 6 else y


@quirk(free=True)
def looks_at_its_kernel(m: Quirky, y: Tensor) -> Tensor:
    pad = m.c.weight.shape[-1] // 2
    return F.conv2d(y, m.c.weight, m.c.bias, padding=pad)


@quirk(free=True)
def views_that_drop_ones(m: Quirky, y: Tensor) -> Tensor:
    gate = y.mean((2, 3), keepdim=True).permute(0, 2, 3, 1).reshape(y.shape[0], 1, y.shape[1])
    return y * gate.sigmoid().view(y.shape[0], -1, 1, 1)


@functools.lru_cache
def ones(height: int, width: int) -> Tensor:
    return torch.ones(height, width, dtype=torch.float64)


@quirk(free=True)
def caches_a_table_and_may_refuse(m: Quirky, y: Tensor) -> Tensor:
    table = ones(y.shape[2], y.shape[3])
    if y.shape[2] > 1000:
        raise ValueError("the image is too large")
    return y * table


TABLES: dict[Any, Tensor] = {}


def table(height: int, width: int, tables: dict[Any, Tensor] = TABLES) -> Tensor:
    if (height, width) not in tables:
        tables[height, width] = torch.ones(height, width, dtype=torch.float64)
    return tables[height, width]


class Keeper:
    """Keeps what it has made, in an attribute that it gets when it is called first."""

    def __call__(self, height: int, width: int) -> Tensor:
        if not hasattr(self, "made"):
            self.made = {}
        return self.made.setdefault((height, width), table(height, width))


KEEPER = Keeper()


@quirk()
def tables_that_a_helper_keeps(m: Quirky, y: Tensor) -> Tensor:
    return y * table(y.shape[2], y.shape[3])


@quirk()
def tables_that_an_object_keeps(m: Quirky, y: Tensor) -> Tensor:
    return y * KEEPER(y.shape[2], y.shape[3])


@quirk(free=True)
def writes_into_its_input(m: Quirky, y: Tensor) -> Tensor:
    return m.c(y.mul_(0.5))


def returns_a_default(m: Quirky) -> None:
    nothing = None
    m.gate = lambda y, scale=None: y if scale is nothing else y * scale


@quirk(setup=returns_a_default, free=True)
def encloses_none(m: Quirky, y: Tensor) -> Tensor:
    return m.norm(m.gate(m.c(y)))


@quirk(free=True)
def pixel_shuffle(m: Quirky, y: Tensor) -> Tensor:
    return F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2)


@quirk(free=False)
def some_channels_by_number(m: Quirky, y: Tensor) -> Tensor:
    return torch.cat([y[:, :4], y[:, 4:] * 2], 1)


@quirk()
def some_channels_by_half(m: Quirky, y: Tensor) -> Tensor:
    half = y.shape[1] // 2
    return torch.cat([y[:, :half], y[:, half:] * 2], 1)


@quirk()
def split_in_halves(m: Quirky, y: Tensor) -> Tensor:
    left, right = y.split(y.shape[1] // 2, dim=1)
    return torch.cat([left, right.relu()], 1)


@quirk(free=True)
def moved_and_back(m: Quirky, y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1).contiguous().mT.mT.permute(0, 3, 1, 2)


@quirk(free=True)
def rolled_image(m: Quirky, y: Tensor) -> Tensor:
    return torch.roll(y, (1, 1), dims=(2, 3)).flip(2)


@quirk(free=False)
def mean_over_channels(m: Quirky, y: Tensor) -> Tensor:
    return y * y.mean(1, keepdim=True).sigmoid()


@quirk(free=False)
def softmax_over_channels(m: Quirky, y: Tensor) -> Tensor:
    return y.softmax(1)


@quirk(free=False)
def sorted_channels(m: Quirky, y: Tensor) -> Tensor:
    return y.sort(dim=1).values


@quirk(free=False)
def running_sum_over_channels(m: Quirky, y: Tensor) -> Tensor:
    return y.cumsum(1)


@quirk()
def masked(m: Quirky, y: Tensor) -> Tensor:
    return y.masked_fill(y > 1, 0.5) + torch.where(y > 0.5, y, torch.zeros_like(y))


# --------------------------------------------------------------------------------------------------
# einops


@quirk(free=True)
def einops_there_and_back(m: Quirky, y: Tensor) -> Tensor:
    h = y.shape[2]
    return einops.rearrange(
        einops.rearrange(y, "b c h w -> b (h w) c"), "b (h w) c -> b c h w", h=h
    )


@quirk()
def einops_groups(m: Quirky, y: Tensor) -> Tensor:
    return einops.rearrange(y, "b (g c) h w -> b (c g) h w", g=2)


@quirk(free=True)
def einops_mean(m: Quirky, y: Tensor) -> Tensor:
    return y + einops.reduce(y, "b c h w -> b c 1 1", "mean")


@quirk()
def einops_repeated(m: Quirky, y: Tensor) -> Tensor:
    return einops.repeat(y, "b c h w -> b c (h k) w", k=2)


# --------------------------------------------------------------------------------------------------
# Other ways to run


@quirk(free=True)
def checkpointed(m: Quirky, y: Tensor) -> Tensor:
    return checkpoint(lambda t: t.relu() * 2, y, use_reentrant=False)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Handed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@quirk(free=True)
def function_that_rounds(m: Quirky, y: Tensor) -> Tensor:
    return Rounded.apply(y)


@quirk()
def function_that_reverses(m: Quirky, y: Tensor) -> Tensor:
    return Reversed.apply(y)


@quirk()
def function_that_hands_on(m: Quirky, y: Tensor) -> Tensor:
    return Handed.apply(y) * 2


@quirk(setup=lambda m: nn.utils.parametrizations.weight_norm(m.c), free=False)
def parametrised_weight(m: Quirky, y: Tensor) -> Tensor:
    return y


@quirk(setup=lambda m: nn.utils.parametrizations.spectral_norm(m.a))
def spectral_weight(m: Quirky, y: Tensor) -> Tensor:
    return y


@quirk(free=True)
def without_gradients(m: Quirky, y: Tensor) -> Tensor:
    with torch.no_grad():
        gate = y.mean((2, 3), keepdim=True).sigmoid()
    return y * gate


@quirk(free=True)
def detached_twice(m: Quirky, y: Tensor) -> Tensor:
    return y.detach() + (y - y.detach())


@quirk()
def operators_of_aten(m: Quirky, y: Tensor) -> Tensor:
    return torch.ops.aten.relu(torch.ops.aten.mul.Tensor(y, torch.tensor(2.0).to(y)))


@quirk(free=True)
def layer_called_twice(m: Quirky, y: Tensor) -> Tensor:
    return m.act(m.act(y) - 1)


@quirk()
def layer_shared(m: Quirky, y: Tensor) -> Tensor:
    return m.c(m.c(y))


@quirk(free=True)
def forward_called_directly(m: Quirky, y: Tensor) -> Tensor:
    return m.act.forward(y) + m.act(y)


@quirk(setup=lambda m: setattr(m, "d", conv(WIDTH, WIDTH)), free=True)
def layer_called_by_its_forward(m: Quirky, y: Tensor) -> Tensor:
    return m.d.forward(y)


Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Parts:
    left: Tensor
    more: dict[str, Tensor]


@quirk(free=True)
def named_tuple_inside(m: Quirky, y: Tensor) -> Tensor:
    pair = Pair(y * 2, right=y)
    return pair.left - pair.right


@quirk(free=True)
def data_class_inside(m: Quirky, y: Tensor) -> Tensor:
    parts = Parts(y, {"twice": y * 2})
    return parts.left + parts.more["twice"]


class Output(OrderedDict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]


@quirk(free=True)
def ordered_dict_inside(m: Quirky, y: Tensor) -> Tensor:
    return Output(a=y, b=[y * 2]).b[0]


@quirk(free=True)
def cast_and_back(m: Quirky, y: Tensor) -> Tensor:
    return y.float().to(y.dtype)


@quirk(free=True)
def complex_and_back(m: Quirky, y: Tensor) -> Tensor:
    return y * 2.0 if not y.is_complex() else y.real


@quirk()
def fourier(m: Quirky, y: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(y), s=y.shape[-2:])


@quirk()
def windows(m: Quirky, y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    x = y.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
    x = x.softmax(1).view(n, h // 2, w // 2, 2, 2, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


@quirk()
def two_by_two_channels(m: Quirky, y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y.reshape(n, c // 2, 2, h, w).sum(2).repeat_interleave(2, 1)


@quirk()
def numbers_of_numpy(m: Quirky, y: Tensor) -> Tensor:
    return y * np.float64(0.5) + np.sqrt(2.0)


@quirk()
def hidden_in_an_object(m: Quirky, y: Tensor) -> Tensor:
    box = types.SimpleNamespace(y=y)
    return box.y + 1


@quirk()
def of_a_generator(m: Quirky, y: Tensor) -> Tensor:
    return sum((y * k for k in (1, 2)), start=torch.zeros(()).to(y))


@quirk(free=True)
def branch_on_gradients(m: Quirky, y: Tensor) -> Tensor:
    return m.c(y) if torch.is_grad_enabled() else m.c(y) * 2


@quirk(free=False)
def branch_on_gradients_that_holds_channels(m: Quirky, y: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        y = y + torch.arange(1.0, WIDTH + 1).to(y).view(1, -1, 1, 1)
    return y


class World:
    """What code reaches beside its model, and may change."""

    calls = 0
    number = random.Random(0)
    array = np.random.default_rng(0)
    tensor = torch.Generator().manual_seed(0)
    counts = np.zeros(2)
    mean = torch.zeros(2)

    def state(self) -> tuple[Any, ...]:
        states = self.number.getstate(), self.array.bit_generator.state
        tensors = self.tensor.get_state().tolist(), self.counts.tolist(), self.mean.tolist()
        beside = BESIDE.running_mean.tolist(), BESIDE.count, len(BESIDE.seen)
        return (
            *states,
            *tensors,
            *beside,
            World.calls,
            CALLS,
            "FIRST" in globals(),
            calls_of(doubled),
            noises(),
        )


def noises() -> tuple[Any, ...]:
    return SLOTTED.count, noise(8).tolist(), noise(12).tolist()


class Beside(nn.BatchNorm2d):
    """A module beside the model, which remembers what it is given."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.count, self.seen = 0, []


CALLS = 0
WORLD = World()
BESIDE = Beside().double()


def counts(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    calls = 0

    @functools.wraps(function)
    def counted(value: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return function(value)

    return counted


@counts
def doubled(value: Tensor) -> Tensor:
    return value * 2


def calls_of(function: Any) -> int:
    return next(c.cell_contents for c in function.__closure__ if type(c.cell_contents) is int)


@quirk(free=True)
def changes_the_world(m: Quirky, y: Tensor) -> Tensor:
    global CALLS, FIRST
    CALLS, FIRST = CALLS + 1, y.shape
    World.calls += 1
    WORLD.number.random(), WORLD.array.random(), torch.rand(1, generator=WORLD.tensor)
    WORLD.counts[0] += 1
    WORLD.mean.add_(1)
    WORLD.mean.data.add_(1)
    BESIDE.count += 1
    BESIDE.seen.append(y.shape)
    return doubled(y) + 0 * BESIDE(torch.ones(2, WIDTH, 1, 1, dtype=y.dtype)).mean()


def counts_its_calls(m: Quirky) -> None:
    m.calls = 0


@quirk(setup=counts_its_calls, free=False)
def later_calls_turn_the_channels(m: Quirky, y: Tensor) -> Tensor:
    m.calls += 1
    return y.flip(1) if m.calls > 1 else y


@quirk(setup=counts_its_calls, free=True)
def counts_and_does_the_same(m: Quirky, y: Tensor) -> Tensor:
    m.calls += 1
    return y


@quirk(free=False)
def turns_the_channels_by_chance(m: Quirky, y: Tensor) -> Tensor:
    return y.flip(1) if m.training and torch.rand(()) < 0.05 else y


@functools.lru_cache
def noise(width: int) -> Tensor:
    return torch.randn(width, dtype=torch.float64)


noise(8), noise(12)


@quirk(free=True)
def noise_of_a_cache(m: Quirky, y: Tensor) -> Tensor:
    return y + noise(y.shape[3])


@quirk(free=False)
def width_through_numpy(m: Quirky, y: Tensor) -> Tensor:
    return y * torch.from_numpy(np.array([1.0 / y.shape[1]]))


@quirk(free=False)
def width_in_a_constructor(m: Quirky, y: Tensor) -> Tensor:
    return y * torch.DoubleTensor([1.0 / y.shape[1]])


@quirk()
def asks_its_norm(m: Quirky, y: Tensor) -> Tensor:
    y = m.norm(m.c(y))
    return y.flatten(2).view(len(y), m.norm.num_features, *y.shape[2:]) * (m.norm.eps * 1e5)


KEPT: dict[str, Tensor] = {}


@quirk(setup=lambda m: m.c.register_forward_hook(lambda _m, _i, o: KEPT.update(o=o)) and None)
def features_before_a_norm(m: Quirky, y: Tensor) -> Tensor:
    return m.norm(m.c(y)).relu()


def has_run(m: Quirky) -> None:
    m.states = (torch.ones(2, WIDTH, 12, 12), torch.ones(1))


@quirk(setup=has_run, free=False)
def keeps_its_states_in_a_tuple(m: Quirky, y: Tensor) -> Tensor:
    m.states = y, y.mean()
    return y


class Slotted:
    """Counts in an attribute without a dictionary."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


SLOTTED = Slotted()


@quirk(free=True)
def counts_in_a_slot(m: Quirky, y: Tensor) -> Tensor:
    SLOTTED.count += 1
    return y


@quirk(free=False)
def flips_many_entries(m: Quirky, y: Tensor) -> Tensor:
    return y.flip(1) if y.numel() > 2000 else y


@quirk(free=True)
def asks_whether_it_is_a_norm(m: Quirky, y: Tensor) -> Tensor:
    y = m.norm(m.c(y))
    return 2 * y if hasattr(m.norm, "running_mean") else y


@quirk(free=True)
def asks_where_its_norm_is(m: Quirky, y: Tensor) -> Tensor:
    return m.norm(m.c(y)).to(m.norm.weight.device)


@quirk(setup=lambda m: m.c.register_parameter("bias", None), free=True)
def asks_for_a_bias(m: Quirky, y: Tensor) -> Tensor:
    y = m.norm(m.c(y))
    return y if m.c.bias is None else 2 * y


@quirk()
def counts_its_modules(m: Quirky, y: Tensor) -> Tensor:
    return m.c(y) / len([*m.modules(), *m.parameters()])


@quirk()
def asks_for_a_parameter(m: Quirky, y: Tensor) -> Tensor:
    return m.c(y) * (2 if isinstance(m.c.weight, nn.Parameter) else 1)


class Equalised(nn.Conv2d):
    """A convolution whose output is scaled by its own width."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / math.sqrt(self.in_channels)


def equalised(m: Quirky) -> None:
    m.c = Equalised(WIDTH, WIDTH, 3, padding=1)


@quirk(setup=equalised, free=False)
def scales_by_its_width(m: Quirky, y: Tensor) -> Tensor:
    return y


class Bounded(nn.Conv2d):
    """A convolution that looks at what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.in_channels:
            raise ValueError("other channels")
        return super().forward(x)


def bounded(m: Quirky) -> None:
    m.c = Bounded(WIDTH, WIDTH, 3, padding=1)


@quirk(setup=bounded, free=True)
def compares_with_its_width(m: Quirky, y: Tensor) -> Tensor:
    return y


def caches_its_table(m: Quirky) -> None:
    m.table = functools.lru_cache(maxsize=4)(types.MethodType(column, m))
    m.table(WIDTH)


def column(m: Quirky, width: int) -> Tensor:
    return m.c.weight.sum((1, 2, 3))[:width]


@quirk(setup=caches_its_table)
def reads_a_table_of_its_own(m: Quirky, y: Tensor) -> Tensor:
    return m.c(y) + m.table(y.shape[1])[:, None, None]
