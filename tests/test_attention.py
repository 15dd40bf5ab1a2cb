"""Attention: heads that lose channels evenly, queries and keys that meet in dot products."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from proofs import (
    identity_error,
    materialize_error,
    permutation_error,
    random_plan,
    random_student,
    randomize_,
    relative_difference,
)
from torch import Tensor, nn

import torchcap
from torchcap import LargestNorm, Plan, SpaceGraph, analyze, materialize, prepare
from torchcap.transform.balance import balance_, balanced

WIDTH, HEADS, SIZE = 10, 3, 8
TOKENS = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(0)).double()
IMAGE = TOKENS.transpose(1, 2).reshape(2, WIDTH, 7, 1)


class Attention(nn.Module):
    """Attention in the usual form: one layer for queries, keys and values, sizes as attributes."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, SIZE
        self.attn_dim = HEADS * SIZE
        self.scale = SIZE**-0.5
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * SIZE)
        self.proj = nn.Linear(HEADS * SIZE, WIDTH)
        for name, part in parts.items():
            self.add_module(name, part)
        randomize_(self.double(), torch.Generator().manual_seed(1))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, x: Tensor) -> Tensor:
        batch, _, tokens, _ = x.shape
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, self.attn_dim))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        return x + self.merge(self.attend(query, key, value))


class Unfused(Attention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * self.scale) @ key.transpose(-2, -1)
        return scores.softmax(dim=-1) @ value


class OwnScale(Attention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=self.scale)


class Biased(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, HEADS, 7, 7).double())

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)


class Normed(Attention):
    def __init__(self) -> None:
        super().__init__(q_norm=nn.LayerNorm(SIZE), k_norm=nn.RMSNorm(SIZE))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend(self.q_norm(query), self.k_norm(key), value)


class Cosine(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(HEADS, 1, 1).double())

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        return (scores * self.logit_scale).softmax(-1) @ value


class OpenSizes(Attention):
    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, _ = x.shape
        return self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.split(x)
        return x + self.merge(self.attend(qkv[0], qkv[1], qkv[2]))

    def merge(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(1, 2).flatten(2))


class Chunked(Attention):
    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, self.num_heads, self.head_dim * 3)
        return qkv.transpose(1, 2).chunk(3, dim=3)


class WiderValues(Attention):
    def __init__(self) -> None:
        super().__init__(
            qkv=nn.Linear(WIDTH, HEADS * (2 * 4 + SIZE)), proj=nn.Linear(HEADS * SIZE, WIDTH)
        )
        self.key_dim, self.val_dim = 4, SIZE

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
        return qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=3)

    def merge(self, x: Tensor) -> Tensor:
        batch, _, tokens, _ = x.shape
        x = x.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.val_dim)
        return self.proj(x)


class Separate(Attention):
    def __init__(self) -> None:
        width = HEADS * SIZE
        super().__init__(q=nn.Linear(WIDTH, width), kv=nn.Linear(WIDTH, 2 * width))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, _ = x.shape
        query = self.q(x[:, :3]).reshape(batch, 3, self.num_heads, self.head_dim)
        pair = self.kv(x).reshape(batch, tokens, 2, self.num_heads, self.head_dim)
        key, value = pair.permute(2, 0, 3, 1, 4).unbind(0)
        return query.permute(0, 2, 1, 3), key, value

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        return self.merge(self.attend(query, key, value))


class OfImages(Attention):
    def __init__(self) -> None:
        width = HEADS * SIZE
        super().__init__(qkv=nn.Conv2d(WIDTH, 3 * width, 1), proj=nn.Conv2d(width, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        image = x.transpose(1, 2).reshape(batch, width, tokens, 1)
        qkv = self.qkv(image).reshape(batch, 3, self.num_heads, self.head_dim, -1)
        query, key, value = qkv.unbind(1)
        scores = (key.transpose(-2, -1) @ query * self.scale).softmax(dim=-2)
        image = (value @ scores).reshape(batch, -1, tokens, 1)
        return x + self.proj(image).flatten(2).transpose(1, 2)


class OneHead(Attention):
    def __init__(self) -> None:
        super().__init__(
            q=nn.Linear(WIDTH, 6), k=nn.Linear(WIDTH, 6), v=nn.Linear(WIDTH, SIZE * HEADS)
        )

    def forward(self, x: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return x + self.proj(attended)


class PrefixTokens(Attention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key = torch.cat([key[:, :, :1], key[:, :, 1:] * 0.5], dim=2)
        return super().attend(query.contiguous(), key, value)


class SelectedKernels(nn.Module):
    """Attention over branches: heads that are mixed by a softmax and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.num_paths = 2
        self.first, self.second = nn.Conv2d(WIDTH, 8, 1), nn.Conv2d(WIDTH, 8, 1)
        self.select = nn.Conv2d(8, 16, 1)
        self.last = nn.Conv2d(8, 5, 1)
        randomize_(self.double(), torch.Generator().manual_seed(1))

    def forward(self, x: Tensor) -> Tensor:
        paths = torch.stack([self.first(x), self.second(x)], dim=1)
        weights = self.select(paths.sum(1).mean((2, 3), keepdim=True))
        batch, channels, _, _ = weights.shape
        weights = weights.view(batch, self.num_paths, channels // self.num_paths, 1, 1)
        return self.last((paths * weights.softmax(dim=1)).sum(dim=1))


FORMS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    cls.__name__: (cls, TOKENS)
    for cls in (
        Attention, Unfused, OwnScale, Biased, Normed, Cosine, OpenSizes, Chunked, WiderValues,
        Separate, OfImages, OneHead, PrefixTokens,
    )
} | {"SelectedKernels": (SelectedKernels, IMAGE)}  # fmt: skip
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def made(form: str) -> tuple[nn.Module, tuple[Tensor]]:
    build, x = FORMS[form]
    torch.manual_seed(0)
    return build().eval(), (x,)


def spaces_of(graph: SpaceGraph) -> dict[str, tuple[int, int, str]]:
    return {s.name: (s.channels, s.blocks, s.freedom) for s in graph.free}


# --------------------------------------------------------------------------------------------------
# What is found


@pytest.mark.parametrize(
    ("form", "spaces"),
    [
        ("Attention", {"qkv": (48, 6, "linear")}),
        ("Normed", {"qkv": (32, 4, "selection")}),
        ("Cosine", {"qkv": (48, 6, "selection")}),
        ("WiderValues", {"qkv": (12, 3, "linear"), "qkv:2": (24, 3, "linear")}),
        ("Separate", {"q": (48, 6, "linear")}),
        ("OneHead", {"q": (6, 1, "linear"), "v": (24, 1, "linear")}),
        ("SelectedKernels", {"first": (8, 1, "selection")}),
    ],
)
def test_spaces_of_attention(form: str, spaces: dict[str, tuple[int, int, str]]) -> None:
    model, inputs = made(form)
    assert spaces_of(analyze(model, inputs)) == spaces


def test_queries_and_keys_are_known_from_values() -> None:
    model, inputs = made("Attention")
    space = analyze(model, inputs)["qkv"]
    assert space.products == (0, 1, 2)  # a block for each head; values are the other three


@EVERY_FORM
def test_permuting_spaces_leaves_the_output_unchanged(form: str) -> None:
    model, inputs = made(form)
    assert permutation_error(model, analyze(model, inputs).free, inputs) <= 1e-10


# --------------------------------------------------------------------------------------------------
# What becomes of it


@EVERY_FORM
def test_materialized_is_prepared_and_full_width_is_the_original(form: str) -> None:
    model, inputs = made(form)
    assert identity_error(model, inputs) <= 1e-10
    student = random_student(model, random_plan(analyze(model, inputs), 0), inputs)
    assert materialize_error(student, inputs) <= 1e-10


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"Normed", "Cosine"}))
def test_dropped_channels_count_nothing(form: str) -> None:
    """Scores keep the scale of the original heads, whatever their size becomes."""
    model, inputs = made(form)
    graph = analyze(model, inputs)
    kept: dict[str, Tensor] = {}

    def remember(space: torchcap.SpaceContext) -> Tensor:
        basis = LargestNorm()(space)
        kept[space.name] = basis.sum(-1).flatten() > 0.5
        return basis

    student = prepare(model, ratio=0.5, example_inputs=inputs, init=remember)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for space in graph.free:
            for port in space.producers:
                tensor = getattr(masked.get_submodule(port.module), port.parameter)
                gone = ~kept[space.name][port.start : port.start + port.channels]
                tensor[port.offset : port.offset + port.channels][gone] = 0
    assert relative_difference(materialize(student)(*inputs), masked(*inputs)) <= 1e-10
    assert relative_difference(masked(*inputs), model(*inputs)) > 1e-3


def test_sizes_that_the_forward_reads_follow() -> None:
    model, inputs = made("WiderValues")
    graph = analyze(model, inputs)
    small = materialize(
        prepare(model, plan=Plan.of(graph, {"qkv": 6, "qkv:2": 9}), example_inputs=inputs)
    )
    assert (small.key_dim, small.val_dim, small.num_heads) == (2, 3, HEADS)
    assert small.qkv.weight.shape == (2 * 6 + 9, WIDTH)
    assert small(TOKENS[:1, :4]).shape == (1, 4, WIDTH)  # another batch, another number of tokens
    assert (model.key_dim, model.val_dim) == (4, SIZE)


def test_a_list_of_sizes_follows() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.splits = [6, 4]
            self.first = nn.Conv2d(WIDTH, 10, 1)
            self.left, self.right = nn.Conv2d(6, 3, 1), nn.Conv2d(4, 3, 1)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            left, right = torch.split(self.first(x).relu(), self.splits, dim=1)
            return self.left(left) + self.right(right)

    model = Mixed().eval()
    graph = analyze(model, IMAGE)
    assert spaces_of(graph) == {"first": (6, 1, "stiefel"), "first:2": (4, 1, "stiefel")}
    assert permutation_error(model, graph.free, (IMAGE,)) <= 1e-10
    small = materialize(prepare(model, ratio=0.5, example_inputs=IMAGE))
    assert small.splits == [3, 2]
    assert small(IMAGE).shape == (2, 3, 7, 1)


def test_scores_choose_the_channels_that_matter() -> None:
    """Greedy selection sees which channels the scores are made of, not which are large."""
    model = OneHead().eval()
    with torch.no_grad():
        model.q.bias.zero_(), model.k.bias.zero_()
        model.q.weight[1::2] *= 1e2  # large queries, and no keys that they could meet
        model.k.weight[1::2] *= 1e-4
    plan = Plan.of(analyze(model, TOKENS), {"q": 3})
    greedy = torchcap.GreedySelection()
    student = prepare(model, plan=plan, data=[TOKENS], example_inputs=TOKENS, init=greedy)
    assert relative_difference(student(TOKENS), model(TOKENS)) <= 1e-2


DATA = [torch.randn(16, 7, WIDTH, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("form", ["Attention", "Unfused", "WiderValues", "Separate", "OfImages"])
def test_new_coordinates_leave_the_network_what_it_is(form: str) -> None:
    model, inputs = made(form)
    graph = analyze(model, inputs)
    changed = copy.deepcopy(model)
    plan = Plan.uniform(graph, 0.5)
    assert balance_(changed, graph, plan, DATA).keys() == plan.ranks.keys()
    assert relative_difference(changed(*inputs), model(*inputs)) <= 1e-10
    assert relative_difference(changed.proj.weight, model.proj.weight) > 0.1


@pytest.mark.parametrize("form", ["Normed", "Cosine"])
def test_coordinates_of_channels_that_are_told_apart_stay(form: str) -> None:
    model, inputs = made(form)
    graph = analyze(model, inputs)
    assert balance_(copy.deepcopy(model), graph, Plan.uniform(graph, 0.5), DATA) == {}


def test_keeping_the_first_balanced_channels_is_the_best_approximation() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.randn(200, 6, generator=generator).double()
        @ torch.randn(6, 6, generator=generator).double()
        for _ in range(2)
    )
    T, inverse = balanced(queries.mT @ queries, keys.mT @ keys)
    assert torch.allclose(T @ inverse, torch.eye(6).double(), atol=1e-9)
    for rank in range(1, 6):
        scores = (queries @ T)[:, :rank] @ (keys @ inverse.mT)[:, :rank].mT
        _, values, _ = torch.linalg.svd(queries @ keys.mT)
        best = values[rank:].norm()  # Eckart and Young: no matrix of this rank is nearer
        assert float((scores - queries @ keys.mT).norm() / best) <= 1 + 1e-4


def test_linear_spaces_start_better_than_any_selection() -> None:
    model, inputs = made("Attention")
    with torch.no_grad():  # heads whose channels are alike, as those of trained networks are
        for rows in model.qkv.weight.chunk(9):
            rows.copy_(rows[:3].mT.repeat(1, 3)[:, :SIZE].mT + 0.1 * rows)
    target = model(TOKENS)
    plan = Plan.of(analyze(model, inputs), {"qkv": 18})
    errors = []
    for init in (None, torchcap.GreedySelection()):
        student = prepare(model, plan=plan, example_inputs=inputs, data=DATA, init=init)
        errors.append(relative_difference(student(TOKENS), target))
    assert errors[0] < 0.5 * errors[1]


def test_compress_with_the_closed_form() -> None:
    model, inputs = made("Attention")
    recipe = torchcap.Recipe.seconds()
    small = torchcap.compress(model, DATA, ratio=0.75, recipe=recipe, example_inputs=inputs)
    assert small.head_dim == 6
    start = materialize(prepare(model, ratio=0.75, example_inputs=inputs))
    target = model(TOKENS)
    errors = [relative_difference(net(TOKENS), target) for net in (small, start)]
    assert errors[0] < errors[1]


# --------------------------------------------------------------------------------------------------
# What stays, and why


class FixedWidth(Attention):
    def merge(self, x: Tensor) -> Tensor:
        batch, _, tokens, _ = x.shape
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, HEADS * SIZE))


class ScaledTwice(Attention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * self.head_dim**-0.25) @ key.transpose(-2, -1)
        return (scores / self.head_dim).softmax(-1) @ value


class QueriesUsedTwice(Attention):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        first = super().attend(query, key, value)
        return x + self.merge(first + super().attend(query, key, value).relu())


class Rotary(Attention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        turned = torch.stack([-query[..., 1::2], query[..., ::2]], dim=-1).reshape(query.shape)
        return super().attend(query + turned, key, value)


class Grouped(Attention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key[:, :1], value[:, :1], enable_gqa=True)


class RectifiedQueries(Attention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend(query.relu(), key, value)


class RelativePositions(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(SIZE, 7).double())

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-2, -1) + query @ self.positions
        return scores.softmax(-1) @ value


class ScaleOfTheLayer(Attention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * self.qkv.out_features**-0.5) @ key.transpose(-2, -1)
        return scores.softmax(-1) @ value


class ScaleInOneMode(Attention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = self.scale if self.training else None
        return F.scaled_dot_product_attention(query, key, value, scale=scale)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (ScaleOfTheLayer, "qkv.out_features is read, and computed with"),
        (ScaleInOneMode, "scaled in one mode and not in the other"),
        (FixedWidth, "reshaped to a fixed number of channels"),
        (ScaledTwice, "counted by head_dim, which is used in other ways too"),
        (QueriesUsedTwice, "is read in several places"),
        (Rotary, "indexed along the channels"),
        (Grouped, "arguments that its rule does not know"),
        (RectifiedQueries, "computed with, on the way to 'scaled_dot_product_attention'"),
        (RelativePositions, "multiplied along the channels"),
    ],
)
def test_what_cannot_follow_stays_with_a_reason(cls: type[nn.Module], reason: str) -> None:
    graph = analyze(cls().eval(), TOKENS)
    assert not graph.free
    assert any(reason in space.reason for space in graph.spaces)


def _in_place(change: Callable[[Tensor], object]) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        change(query)
        return F.scaled_dot_product_attention(query, key, value)

    return attend


ENTANGLED: dict[str, Callable[..., Tensor]] = {
    "added to in place": _in_place(lambda q: q.add_(0.7)),
    "bent in place": _in_place(lambda q: F.silu(q, inplace=True)),
    "bent as a view": _in_place(lambda q: q[:, :, :1].add_(1.0)),
    "multiplied with themselves": _in_place(lambda q: q.mul_(q)),
    "keys too": lambda q, k, v: F.scaled_dot_product_attention(q, q * 2, v),
    "a part of the keys": lambda q, k, v: F.scaled_dot_product_attention(q, k + q, v),
    "a gate of the keys": lambda q, k, v: F.scaled_dot_product_attention(q, k * q.sigmoid(), v),
    "beside the keys": lambda q, k, v: F.scaled_dot_product_attention(
        q, torch.cat([k, q], 2), torch.cat([v, v], 2)
    ),
}


@pytest.mark.parametrize("case", ENTANGLED)
def test_queries_that_are_read_besides_are_not_scaled(case: str) -> None:
    class Entangled(Attention):
        def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return ENTANGLED[case](query, key, value)

    graph = analyze(Entangled().eval(), TOKENS)
    assert not graph.scaled
    assert not graph["qkv"].free


def test_a_norm_without_bias_can_be_scaled() -> None:
    class RootNormed(Attention):
        def __init__(self) -> None:
            super().__init__(q_norm=nn.RMSNorm(SIZE), k_norm=nn.RMSNorm(SIZE))

        def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return super().attend(self.q_norm(query), self.k_norm(key), value)

    model = RootNormed().eval()
    assert identity_error(model, (TOKENS,)) <= 1e-10
    small = materialize(prepare(model, ratio=0.5, example_inputs=TOKENS))
    start = prepare(model, ratio=1.0, example_inputs=TOKENS).q_norm.weight.detach()
    kept = [float((start * 0.5**0.5 - w).abs().min()) for w in small.q_norm.weight.detach()]
    assert max(kept) <= 1e-10


# --------------------------------------------------------------------------------------------------
# Positions: parameters of several dimensions that meet the residual stream


class Tokens(nn.Module):
    """Tokens with learnt positions, through one block of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, 7, WIDTH))
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.block = Attention()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.positions
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1)
        return self.head(self.norm(self.block(x))[:, 0])


class PositionsReadTwice(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.positions.mean()


FEATURES = TOKENS[..., :5]


def test_streams_with_positions_lose_channels_too() -> None:
    model = Tokens().eval()
    graph = analyze(model, FEATURES, streams=True)
    assert {space.name for space in graph.free} == {"embed", "block.qkv"}
    assert permutation_error(model, graph.free, (FEATURES,)) <= 1e-10
    student = prepare(model, ratio=0.5, example_inputs=FEATURES, streams=True)
    assert materialize_error(student, (FEATURES,)) <= 1e-10
    small = materialize(student)
    assert small.positions.shape == (1, 7, 5)
    assert small.first.shape == (1, 1, 5)


def test_positions_that_are_read_in_another_way_stay() -> None:
    graph = analyze(PositionsReadTwice().eval(), FEATURES, streams=True)
    assert graph["embed"].reason == "positions is used in other ways too"


def test_streams_with_positions_stay_unless_asked_for() -> None:
    graph = analyze(Tokens().eval(), FEATURES)
    assert [space.name for space in graph.free] == ["block.qkv"]
    assert "residual stream" in graph["embed"].reason


class ByEinsum(Attention):
    """Attention written in einsums, with the dimensions in orders of their own."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("bhqc,bhkc->bqhk", query, key) * self.scale
        return torch.einsum("bqhk,bhkc->bhqc", scores.softmax(-1), value)


class OneHeadByEinsum(nn.Module):
    """Queries that are multiplied with all places of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.image = nn.Linear(WIDTH, SIZE), nn.Conv2d(3, SIZE, 3)
        randomize_(self.double(), torch.Generator().manual_seed(1))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return torch.einsum("bqc,bchw->bqhw", self.query(x), self.image(image).relu())


@pytest.mark.parametrize("model", [ByEinsum(), OneHeadByEinsum()])
def test_einsums_are_the_products_that_they_write(model: nn.Module) -> None:
    image = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0)).double()
    inputs = (TOKENS,) if isinstance(model, ByEinsum) else (TOKENS, image)
    graph = analyze(model, inputs)
    names = {space.name for space in graph.free}
    assert names == ({"qkv"} if isinstance(model, ByEinsum) else {"query"})
    assert permutation_error(model, graph.free, inputs) <= 1e-10
    student = random_student(model, random_plan(graph, 0), inputs)
    assert materialize_error(student, inputs) <= 1e-10
