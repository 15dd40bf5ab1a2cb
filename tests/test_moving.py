"""Operators without parameters: followed beside the channels, or channel by channel, only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from between import IMAGE, Between, check_first_space, made
from proofs import materialize_error, permutation_error, random_plan, random_student, randomize_
from timm.layers import BlurPool2d, SelectAdaptivePool2d
from timm.layers.other_pool import LsePlus2d
from torch import Tensor, nn

from torchcap import analyze

MASK = torch.arange(36).reshape(1, 1, 6, 6) % 3 == 0
WIDE_MASK = torch.arange(6).reshape(1, 6, 1, 1) % 2 == 0
GRID = torch.linspace(-1, 1, 50, dtype=torch.float64).reshape(1, 5, 5, 2).expand(2, -1, -1, -1)
WEIGHTS = torch.arange(36, dtype=torch.float64).reshape(6, 6).cos()
GRIDS = {"align_corners": False}


def tokens_of(x: Tensor) -> Tensor:
    """Turn an image into tokens, ``(batch, positions, channels)``."""
    return x.flatten(2).transpose(1, 2)


LINEAR: dict[str, Between] = {
    "squeeze": lambda x: x.mean(3, keepdim=True).squeeze(3).unsqueeze(2),
    "squeeze of a larger dimension": lambda x: x.squeeze(2),
    "squeeze before the channels": lambda x: x[None].squeeze(0),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4),
    "expand by sizes": lambda x: x.mean(2, keepdim=True).expand(x.shape[0], x.shape[1], 4, 6),
    "expand with a new dimension": lambda x: x.mean(0).expand(2, -1, -1, -1),
    "expand_as": lambda x: x.mean((2, 3), keepdim=True).expand_as(x) + x * 0,
    "repeat": lambda x: x.repeat(1, 1, 2, 1),
    "repeat with a new dimension": lambda x: x.repeat(2, 1, 1, 1, 1)[0],
    "tile": lambda x: x.tile(2, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=2),
    "roll": lambda x: torch.roll(x, shifts=(1, -2), dims=(2, 3)),
    "flip": lambda x: x.flip(2, 3),
    "flip of a list": lambda x: torch.flip(x, [-1]),
    "unbind": lambda x: x.unbind(2)[1].unsqueeze(-1),
    "unbind of the batch": lambda x: torch.unbind(x)[0].unsqueeze(0),
    "split": lambda x: x.split(3, dim=2)[1],
    "split of sizes": lambda x: torch.split(x, [1, 5], dim=3)[1],
    "tensor_split": lambda x: x.tensor_split(4, dim=3)[0],
    "stack in front": lambda x: torch.stack((x, x * 2))[1],
    "sum": lambda x: x.sum((2, 3), keepdim=True),
    "sum of one dimension": lambda x: torch.sum(x, 2).unsqueeze(2),
    "narrow": lambda x: x.narrow(2, 1, 4).narrow(-1, 0, 3),
    "select": lambda x: x.select(2, 1).unsqueeze(2),
    "select of the batch": lambda x: torch.select(x, 0, 1)[None],
    "movedim": lambda x: x.movedim(1, -1).movedim((3, 1), (1, 3)),
    "swapaxes": lambda x: x.swapaxes(1, 3).swapdims(3, 1),
    "unflatten": lambda x: x.unflatten(2, (2, 3)).sum(3),
    "unflatten before the channels": lambda x: x.unflatten(0, (2, 1))[:, 0],
    "unflatten as a module": nn.Sequential(nn.Unflatten(3, (3, 2)), nn.Flatten(3)),
    "reshape_as": lambda x: (
        tokens_of(x).flatten(0, 1).reshape_as(tokens_of(x)).transpose(1, 2).unsqueeze(3)
    ),
    "windows": lambda x: x.unfold(2, 3, 2).unfold(3, 2, 1).mean((4, 5)),
    "unfold and fold": lambda x: F.fold(F.unfold(x, 3, padding=1), (6, 6), 3, padding=1),
    "unfold and fold as modules": nn.Sequential(
        nn.Unfold(2, stride=2), nn.Fold((6, 6), 2, 1, 0, 2)
    ),
    "pixels put beside each other": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2),
    "pixels as modules": nn.Sequential(nn.PixelUnshuffle(3), nn.PixelShuffle(3)),
    "grid_sample": lambda x: F.grid_sample(x, GRID, **GRIDS),
    "type": lambda x: x.type(torch.float64),
    "a mask with a type": lambda x: x * MASK.type_as(x),
    "addcmul of a mask": lambda x: torch.addcmul(x * 0, x, MASK, value=0.5),
    "einsum over positions": lambda x: torch.einsum("bchw,wv->bvch", x, WEIGHTS).movedim(1, 3),
    "einsum of one tensor": lambda x: torch.einsum("b c h w -> c b w", (x,)).transpose(0, 1)[
        ..., None
    ],
    "blur with one filter": BlurPool2d(),
}
BENT: dict[str, Between] = {
    "stack": lambda x: torch.stack([x, x.relu()], dim=2).mean(2),
    "amax": lambda x: x.amax((2, 3), keepdim=True),
    "amin": lambda x: torch.amin(x, -1).unsqueeze(-1),
    "maximum of everything else": lambda x: x.max(2)[0].unsqueeze(2),
    "values of a maximum": lambda x: torch.max(x, dim=2, keepdim=True).values,
    "places of a minimum": lambda x: x.min(3).indices.unsqueeze(3).double(),
    "median": lambda x: x.median(dim=-1, keepdim=True)[0],
    "norm": lambda x: x.norm(2, (2, 3), keepdim=True),
    "norm by name": lambda x: torch.norm(x, dim=2, keepdim=True),
    "linalg.norm": lambda x: torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True),
    "variance": lambda x: x.var((2, 3), keepdim=True, unbiased=False),
    "variance and mean": lambda x: torch.var_mean(x, 2, keepdim=True)[1],
    "logsumexp": lambda x: x.logsumexp((2, 3), keepdim=True),
    "softmax": lambda x: F.softmax(x, dim=2),
    "softmax as a method": lambda x: x.softmax(-1),
    "softmax as a module": nn.Softmax(dim=3),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "topk": lambda x: x.topk(2, dim=3)[0],
    "topk along the last": lambda x: torch.topk(x, 2).values,
    "sort": lambda x: x.sort(2, descending=True)[0],
    "glu beside the channels": lambda x: F.glu(x, dim=2),
    "sine": lambda x: torch.sin(x) + x.cos(),
    "error function": lambda x: torch.erf(x).exp().log1p(),
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 1).neg(),
    "truncation": lambda x: (9 * x).long().double(),
    "masked_fill": lambda x: x.masked_fill(MASK, -1.0),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "where as a method": lambda x: x.where(MASK, torch.zeros_like(x)),
    "where of a number": lambda x: torch.where(x.abs() < 0.5, 0.0, x),
    "maximum with itself": lambda x: torch.maximum(x, 0.2 * x),
    "max with itself": lambda x: torch.max(x, x.mean((2, 3), keepdim=True)),
    "minimum with a map": lambda x: torch.minimum(x, MASK.to(x)),
    "activation that draws": nn.RReLU(),
    "pooling by average and maximum": SelectAdaptivePool2d(pool_type="avgmax"),
    "fast pooling by average and maximum": SelectAdaptivePool2d(pool_type="fastavgmax"),
    "pooling by maximum": SelectAdaptivePool2d(2, pool_type="max"),
    "pooling by logarithms": LsePlus2d(flatten=False),
}
FOLLOWED = {
    **{("linear", case): between for case, between in LINEAR.items()},
    **{("stiefel", case): between for case, between in BENT.items()},
}
REFUSED: dict[str, tuple[Between, str]] = {
    "squeeze without a dimension": (lambda x: x.squeeze(), "squeezed without"),
    "expand to a number": (
        lambda x: x.mean((2, 3), keepdim=True).expand(2, 6, 4, 4),
        "fixed number of channels",
    ),
    "repeat of the channels": (lambda x: x.repeat(1, 2, 1, 1)[:, :6], "channels are repeated"),
    "interleaving of the channels": (
        lambda x: x.repeat_interleave(1, dim=1),
        "acts along the channels",
    ),
    "interleaving of everything": (
        lambda x: x.repeat_interleave(1).reshape(2, 6, 6, 6),
        "arguments that its rule does not know",
    ),
    "roll of the channels": (lambda x: x.roll(1, 1), "acts along the channels"),
    "flip of the channels": (lambda x: x.flip(1), "acts along the channels"),
    "unbind of the channels": (
        lambda x: torch.stack(x.unbind(1), 1),
        "channels are taken one by one",
    ),
    "split of the channels": (
        lambda x: torch.cat(x.split(3, dim=1), 1),
        "split into fixed numbers",
    ),
    "sum of the channels": (
        lambda x: x + x.sum(1, keepdim=True),
        "reduced over the channels",
    ),
    "sum of everything": (lambda x: x + x.sum(), "reduced over all dimensions"),
    "variance of everything": (lambda x: x * x.var(unbiased=False), "reduced over all"),
    "variance of everything by place": (lambda x: x * x.var(False), "reduced over all"),  # noqa: FBT003
    "norm of the channels": (lambda x: x / x.norm(dim=1, keepdim=True), "over the channels"),
    "norm of everything": (lambda x: x / x.norm(), "reduced over all dimensions"),
    "maximum of the channels": (lambda x: x + x.max(1)[0].unsqueeze(1), "over the channels"),
    "largest channels": (lambda x: x.topk(6, 1)[0], "acts along the channels"),
    "sorted channels": (lambda x: x.sort(1)[0], "acts along the channels"),
    "channels from a number": (lambda x: x.narrow(1, 0, 6), "acts along the channels"),
    "one channel": (lambda x: x + x.select(1, 2).unsqueeze(1), "indexed along the channels"),
    "windows of channels": (lambda x: x.unfold(1, 1, 1)[..., 0], "acts along the channels"),
    "unflatten of the channels": (
        lambda x: x.unflatten(1, (2, 3)).flatten(1, 2),
        "fixed number of channels",
    ),
    "reshape_as of an image": (
        lambda x: x.flatten(2).reshape_as(x),
        "reshaped across the channels",
    ),
    "reshape_as of what is not followed": (
        lambda x: x.reshape_as(torch.zeros(2, 6, 6, 6)),
        "arguments that its rule does not know",
    ),
    "pixels of several channels": (
        lambda x: F.pixel_shuffle(torch.cat([x, x], 1)[:, :, :3, :3].repeat(1, 2, 1, 1), 2),
        "channels are repeated",
    ),
    "grid from the channels": (
        lambda x: F.grid_sample(x, x.permute(0, 2, 3, 1)[..., :2], **GRIDS),
        "indexed along the channels",
    ),
    "grid beside the channels": (
        lambda x: F.grid_sample(x, x.mean((2, 3))[:, :, None, None].expand(-1, -1, 4, 2), **GRIDS),
        "arguments that its rule does not know",
    ),
    "mask of the channels": (
        lambda x: x.masked_fill(WIDE_MASK, 0.0),
        "a tensor whose channels are not followed",
    ),
    "choice between what is followed and what is not": (
        lambda x: torch.where(MASK, x, torch.ones(2, 6, 6, 6)),
        "a tensor whose channels are not followed",
    ),
    "maximum in another place": (
        lambda x: torch.maximum(x, x.transpose(1, 2)),
        "tensors with other channels",
    ),
    "addcmul of what is not followed": (
        lambda x: torch.addcmul(x, torch.ones(6, 1, 1), torch.ones(6, 1, 1)),
        "a tensor whose channels are not followed",
    ),
    "einsum over the channels": (
        lambda x: torch.einsum("bchw,cd->bdhw", x, WEIGHTS),
        "sums over the channels",
    ),
    "einsum that weights the channels": (
        lambda x: torch.einsum("bchw,ch->bchw", x, WEIGHTS),
        "a tensor whose channels are not followed",
    ),
    "einsum of two": (
        lambda x: torch.einsum("bchw,bchv->bchv", x, x),
        "several tensors with channels",
    ),
    "einsum without letters": (
        lambda x: torch.einsum("...w,wv->...v", x, WEIGHTS),
        "without letters for all dimensions",
    ),
    "softmax of an image": (nn.Softmax2d(), "acts along the channels"),
    "shuffled channels": (nn.ChannelShuffle(2), "no rule"),
    "response among neighbours": (nn.LocalResponseNorm(3), "no rule"),
    "softmax over the channels": (lambda x: x.softmax(1), "acts along the channels"),
}


@pytest.mark.parametrize(("freedom", "case"), FOLLOWED)
def test_channels_are_followed_beside_the_operator(freedom: str, case: str) -> None:
    check_first_space(made(FOLLOWED[freedom, case]), freedom)


@pytest.mark.parametrize("case", REFUSED)
def test_channels_that_an_operator_acts_along_stay(case: str) -> None:
    between, reason = REFUSED[case]
    graph = analyze(made(between), IMAGE)
    assert not graph.free
    assert reason in graph["first"].reason


class Larger(nn.Module):
    """Makes an image larger by channels that become pixels, as super-resolution does."""

    def __init__(self, shuffle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.wide, self.last = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 24, 3),
            nn.Conv2d(6, 3, 1),
        )
        self.shuffle = shuffle
        randomize_(self.double().eval(), torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shuffle(self.wide(self.first(x).relu()).relu()))


@pytest.mark.parametrize(
    "shuffle",
    [
        nn.PixelShuffle(2),
        lambda x: F.pixel_shuffle(x, 2),
        lambda x: F.fold(x.flatten(2), (2 * x.shape[2], 2 * x.shape[3]), 2, stride=2),
    ],
    ids=["module", "function", "fold"],
)
def test_channels_that_become_pixels_of_one_go_together(shuffle: Any) -> None:
    model = Larger(shuffle)
    image = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0)).double()
    graph = analyze(model, image)
    assert {(s.name, s.channels) for s in graph.free} == {("first", 4), ("wide", 6)}
    assert permutation_error(model, graph.free, (image,)) <= 1e-10
    student = random_student(model, random_plan(graph, 0), (image,))
    assert materialize_error(student, (image,)) <= 1e-10


def test_a_norm_over_channels_lets_them_be_dropped() -> None:
    model = made(F.normalize)
    graph = analyze(model, IMAGE)
    assert graph["first"].freedom == "selection"
    student = random_student(model, random_plan(graph, 0), (IMAGE,))
    assert materialize_error(student, (IMAGE,)) <= 1e-10


# --------------------------------------------------------------------------------------------------
# Several tensors, channel by channel


class Meeting(nn.Module):
    """Two layers whose outputs meet, with two vectors of parameters, before a third reads them."""

    def __init__(self, meet: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.twin, self.second = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 2, 1),
        )
        self.scale, self.shift = (
            nn.Parameter(torch.ones(6, 1, 1)),
            nn.Parameter(torch.ones(6, 1, 1)),
        )
        self.meet = meet

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.meet(self.first(x), self.twin(x), self.scale, self.shift))


MET: dict[str, Callable[..., Tensor]] = {
    "maximum": lambda a, b, *_: torch.maximum(a, b),
    "max": lambda a, b, *_: torch.max(a, b),
    "where": lambda a, b, *_: torch.where(MASK, a, b),
    "comparison": lambda a, b, *_: a * (a > b),
    "mask of the other": lambda a, b, *_: a.masked_fill(b < 0, 0.5),
    "glu": lambda a, b, *_: F.glu(torch.cat([a, b], 1), dim=1),
    "addcmul of a gate": lambda a, b, *_: torch.addcmul(0 * a, a, b.sigmoid()),
    "addcmul of parameters": lambda a, _, scale, shift: torch.addcmul(shift, scale, a, value=2),
    "a term for each channel": lambda a, _, scale, shift: a + shift,
    "a term for each channel of tokens": lambda a, _, scale, shift: (
        (tokens_of(a) - shift.flatten()).transpose(1, 2).unsqueeze(3)
    ),
}


def meeting(meet: Callable[..., Tensor]) -> nn.Module:
    model = Meeting(meet).double().eval()
    randomize_(model, torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("case", MET)
def test_tensors_that_meet_channel_by_channel_can_lose_channels_together(case: str) -> None:
    check_first_space(meeting(MET[case]), "selection")


def test_shape_of_another_layer_binds_their_widths() -> None:
    model = meeting(
        lambda a, b, *_: tokens_of(a).reshape_as(tokens_of(b)).transpose(1, 2)[..., None]
    )
    check_first_space(model, "linear")


def test_addcmul_of_two_features_joins_them() -> None:
    graph = analyze(meeting(lambda a, b, *_: torch.addcmul(a, MASK, b)), IMAGE)
    (space,) = graph.free
    assert {port.module for port in space.producers} == {"first", "twin"}


def test_addcmul_with_what_has_been_there_before_is_a_skip() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)
            self.last = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(torch.addcmul(x, MASK[..., :1, :1] * 1.0, self.second(x)))

    graph = analyze(Skip().eval(), IMAGE.float())
    assert not graph.free
    assert "residual stream" in graph["first"].reason


def test_halves_of_one_layer_keep_equally_many_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GLU(dim=1), nn.Conv2d(4, 2, 1)).double()
    randomize_(model, torch.Generator().manual_seed(1))
    graph = analyze(model, IMAGE)
    (space,) = graph.free
    assert (space.channels, space.freedom) == (4, "selection")
    assert permutation_error(model, graph.free, (IMAGE,)) < 1e-12
    student = random_student(model, random_plan(graph, 0), (IMAGE,))
    assert materialize_error(student, (IMAGE,)) < 1e-12
