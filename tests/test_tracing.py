"""Tracing that does not give up: modules as one operator, pieces, and what goes past them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import conv
from proofs import (
    counted_cost,
    identity_error,
    materialize_error,
    permutation_error,
    random_plan,
    random_student,
    randomize_,
)
from small_nets import fingerprint
from torch import Tensor, fx, nn

from torchcap import (
    ClosedForm,
    NothingToCompressError,
    Recipe,
    TraceError,
    analyze,
    compress,
    cost,
)
from torchcap.graph.analyze import leaf_rule
from torchcap.graph.rules import OPERATORS
from torchcap.graph.stand_ins import NOISE
from torchcap.graph.trace import Tracer, Tracing

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    """Branches on a value, so it cannot be traced; what it calls can."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, width))
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale if bool(x.sum() > -1e9) else x


class Net(nn.Module):
    """A network around a middle part: its own interior space is that of ``head``."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.middle = middle
        self.head = nn.Sequential(conv(8, 5), nn.ReLU(), conv(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)))


class BodyCalledPast(Branch):
    """A layer inside the body is called once more, past the body's forward."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) if bool(x.sum() > -1e9) else x
        return y + self.body[3](self.body[0](x).relu())


class WeightReadPast(Branch):
    """A weight inside the body is read past its layer."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) if bool(x.sum() > -1e9) else x
        return y * self.body[0].weight.mean()


class Detector(nn.Module):
    """Takes a list of images, so that its own forward cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4))
        self.heads = nn.ModuleList([nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 2))])

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        features = [self.backbone(image[None]) for image in images]
        return [head(feature) for feature in features for head in self.heads]


class Hopeless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if bool(x.sum() > 0) else x


def made(model: nn.Module) -> nn.Module:
    randomize_(model, torch.Generator().manual_seed(1))
    return model.double().eval()


def free_of(model: nn.Module, inputs: Any) -> dict[str, int]:
    return {space.name: space.channels for space in analyze(model, inputs).free}


def traced(model: nn.Module, inputs: Any) -> Tracing:
    return Tracer(model, inputs, is_leaf=leaf_rule((), OPERATORS)).tracing()


def prove(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    graph = analyze(model, inputs)
    assert permutation_error(model, graph.free, inputs) < 1e-10
    assert identity_error(model, inputs) < 1e-10
    assert materialize_error(random_student(model, random_plan(graph, 0), inputs), inputs) < 1e-10


def test_module_that_cannot_be_traced_is_a_boundary_and_is_read_inside() -> None:
    model = made(Net(Branch()))
    graph = analyze(model, IMAGE.double())
    assert {space.name for space in graph.free} == {"middle.body.0", "head.0"}
    assert "middle" in graph["stem"].reason
    assert "leaves 'middle.body'" in graph["middle.body.3"].reason
    assert "bool(x.sum() > -1e9)" in graph["middle.body.3"].reason
    assert any("the forward of 'middle' is read in pieces" in note for note in graph.notes)
    prove(model, (IMAGE.double(),))


def test_reading_leaves_the_model_as_it_was() -> None:
    model = Net(Branch()).train()
    before = fingerprint(model)
    analyze(model, IMAGE)
    assert fingerprint(model) == before
    assert all(module.training for module in model.modules())


def test_layers_inside_of_unread_modules_count() -> None:
    model = Net(Branch()).eval()
    macs, _ = counted_cost(model, (IMAGE,))
    assert cost(analyze(model, IMAGE)).macs == macs


def test_norm_inside_of_an_unread_module_folds() -> None:
    graph = analyze(Net(Branch()), IMAGE)
    assert ("middle.body.0", "middle.body.1") in [(f.layer, f.norm) for f in graph.folds]


def test_layers_that_are_called_past_their_piece_stay() -> None:
    model = made(Net(BodyCalledPast()))
    graph = analyze(model, IMAGE.double())
    assert {space.name for space in graph.free} == {"head.0"}
    assert "leaves 'middle.body.0', and where to is not read" in graph["middle.body.0"].reason
    assert not any(fold.layer == "middle.body.0" for fold in graph.folds)
    prove(model, (IMAGE.double(),))


def test_weights_that_are_read_past_their_layer_stay() -> None:
    model = made(Net(WeightReadPast()))
    graph = analyze(model, IMAGE.double())
    assert {space.name for space in graph.free} == {"head.0"}
    assert "a tensor of 'middle.body.0' is read in 'middle'" in graph["middle.body.0"].reason
    prove(model, (IMAGE.double(),))


def test_model_that_takes_a_list_is_read() -> None:
    model = made(Detector())
    inputs = (list(IMAGE.double()),)
    assert free_of(model, inputs) == {"backbone.0": 8, "backbone.2": 4, "heads.0.0": 6}
    assert traced(model, inputs).whole is not None
    prove(model, inputs)


class Threshold(Detector):
    """Looks at the images, so that only pieces of it can be read."""

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return super().forward([image for image in images if bool(image.mean() > -1e9)])


def test_model_that_looks_at_values_is_read_in_pieces() -> None:
    model = made(Threshold())
    inputs = (list(IMAGE.double()),)
    assert free_of(model, inputs) == {"backbone.0": 8, "heads.0.0": 6}
    assert traced(model, inputs).whole is None
    assert any("pieces" in note for note in analyze(model, inputs).notes)
    prove(model, inputs)


def test_model_in_pieces_is_compressed_by_its_weights_alone() -> None:
    model, inputs = Threshold().eval(), (list(IMAGE),)
    small = compress(model, example_inputs=inputs)
    assert [tuple(layer.weight.shape[:2]) for layer in small.heads[0][::2]] == [(3, 4), (2, 3)]
    batches = [{"images": list(IMAGE)}]
    with pytest.raises(TraceError, match=r"(?s)only pieces of 'Threshold'.*LargestNorm"):
        compress(model, batches, recipe=Recipe(start=ClosedForm()), example_inputs=inputs)


def test_model_without_a_piece_that_can_be_read_is_refused_with_the_reason() -> None:
    (space,) = analyze(Hopeless(), IMAGE).spaces
    assert "bool(x.sum() > 0)" in space.reason
    with pytest.raises(NothingToCompressError, match=r"looks at the values of a tensor"):
        compress(Hopeless(), example_inputs=IMAGE)


def test_streams_are_spaces_if_asked_for() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.outer = conv(3, 8), conv(8, 6), conv(6, 8)
            self.head = conv(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.head(x + self.outer(self.inner(x).relu()))

    model = made(Block())
    assert free_of(model, IMAGE.double()) == {"inner": 6}
    graph = analyze(model, IMAGE.double(), streams=True)
    assert {s.name: s.freedom for s in graph.free} == {"stem": "selection", "inner": "stiefel"}
    assert permutation_error(model, graph.free, (IMAGE.double(),)) < 1e-10
    small = compress(model, example_inputs=IMAGE.double(), streams=True)
    assert [layer.out_channels for layer in (small.stem, small.inner, small.outer)] == [4, 3, 4]


def cut_to(sizes: list[int], limits: list[int]) -> list[int]:
    """Write into the list that is given, as torchvision's video transformers do."""
    for place, limit in enumerate(limits):
        sizes[place] = min(sizes[place], limit)
    return sizes


fx.wrap("cut_to")


class Windowed(nn.Module):
    """Asks a function of its own, which is not traced, how far to pool."""

    def __init__(self) -> None:
        super().__init__()
        self.window = [2, 64]
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        window = cut_to(self.window.copy(), [x.shape[2], x.shape[3]])
        return self.head(F.avg_pool2d(self.conv(x).relu(), window[0]))


def test_functions_may_write_into_the_lists_that_they_get() -> None:
    model = Windowed().eval()
    assert [space.name for space in analyze(model, torch.zeros(1, 3, 8, 8)).free] == ["conv"]
    small = compress(model, [torch.randn(4, 3, 8, 8)], recipe=Recipe.seconds())
    assert small.conv.out_channels == 2


def test_large_layers_are_stood_in_for_by_noise_of_their_size() -> None:
    large, small = nn.Conv2d(64, 128, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2)
    x = torch.randn(1, 64, 64, 64)
    found, expected = NOISE[nn.Conv2d](large, x), large(x)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert not torch.equal(found, expected)
    assert 0.5 <= float(found.detach().std() / expected.detach().std()) <= 2
    assert torch.equal(NOISE[nn.Conv2d](small, x[:, :3]), small(x[:, :3]))


class Foreign:
    """An object like those of compiled modules, whose class has no name of a module."""

    __module__ = property(lambda self: "elsewhere")  # type: ignore[assignment]

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x)


def test_objects_of_compiled_modules_are_passed_by() -> None:
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(conv(3, 8), conv(8, 4))
            self.act = Foreign()

        def forward(self, x: Tensor) -> Tensor:
            return self[1](self.act(self[0](x)))

    graph = analyze(Net(), torch.zeros(1, 3, 8, 8))
    assert [space.name for space in graph.free] == ["0"]


def test_threads_that_start_during_a_reading_stay_known() -> None:
    done, before = threading.Event(), threading.active_count()

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            threading.Thread(target=done.wait).start()
            return super().forward(x)

    analyze(Net(conv(3, 8), nn.ReLU(), conv(8, 4)), torch.zeros(1, 3, 8, 8))
    known = threading.active_count()
    done.set()
    assert known > before
