"""The replay shows every layer what hooks see there, in any amount of memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nets import NETS as READ_NETS
from small_nets import NETS, built, fingerprint, images
from strategies import Concat, Conv, Grouped, Network, Pool, networks
from torch import Tensor, nn

from torchcap import DataError, TraceError, analyze
from torchcap.batches import Source
from torchcap.graph.analyze import Reader
from torchcap.training.replay import Replay, Station
from torchcap.transform.fold import fold_

LARGE = 2**30
Pairs = list[tuple[Tensor, Tensor]]


class Downsampling(nn.Module):
    """Two convolutions are added, and the shortcut's comes last (torchvision's way)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(6, 10, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 10, 1, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.conv2(self.relu(self.conv1(x)))
        y += self.shortcut(x)
        return self.fc(self.relu(y).mean((2, 3)))


class PaddedShortcut(Downsampling):
    """What stands between a layer and its sum is no layer: it may run first."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.conv2(self.relu(self.conv1(x)))
        y = y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        return self.fc(self.relu(y).mean((2, 3)))


class WritesOver(nn.Module):
    """Nothing is safe from being written over, the sum and its terms included."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = (
            nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 6), (6, 8))
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skip = x.clone()
        x = F.relu(x, inplace=True)
        y = self.conv1(x)
        y *= 0.5
        skip += self.conv2(F.relu(y, inplace=True))
        skip.relu_()
        skip += 1.0
        return self.fc(skip.mean((2, 3)))


class GlobalContext(nn.Module):
    """What is added to every position is computed once for the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.context = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.last(F.relu(x + self.context(x.mean((2, 3), keepdim=True))))


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = (
            nn.Conv2d(i, o, 1) for i, o in ((3, 4), (4, 4), (4, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twice(F.relu(self.twice(F.relu(self.first(x))))))


SMALL: dict[str, Callable[[], nn.Module]] = {
    **NETS,
    "downsampling": Downsampling,
    "padded shortcut": PaddedShortcut,
    "writes over": WritesOver,
    "global context": GlobalContext,
    "called twice": CalledTwice,
}
LIBRARIES: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "densenet": partial(torchvision.models.DenseNet, 8, (2, 3)),
    "efficientnet_b0": partial(timm.create_model, "efficientnet_b0"),
    "convnext_atto": partial(timm.create_model, "convnext_atto"),
    "vit_tiny": partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, depth=2),
}
EVERY_NET = pytest.mark.parametrize("net", SMALL)


def made(net: str) -> nn.Module:
    return built(SMALL[net])


def batches(count: int = 3) -> list[Tensor]:
    return [images(2 + number, seed=number) for number in range(count)]


def folded(model: nn.Module, x: Any) -> nn.Module:
    fold_(model, analyze(model, x).folds)
    return model


def layers_of(model: nn.Module) -> set[str]:
    kinds = nn.Conv1d | nn.Conv2d | nn.Linear
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def replay_of(
    teacher: nn.Module, student: nn.Module | None = None, data: Any = None, memory: int = LARGE
) -> Replay:
    student = copy.deepcopy(teacher) if student is None else student
    source = Source(batches() if data is None else data)
    return Replay(teacher, student, source, memory=memory, reader=Reader())


def visited(replay: Replay, layers: set[str]) -> dict[str, Pairs]:
    """What every station shows of every batch."""
    return {
        station.name: [(x.clone(), t.clone()) for x, t in replay.visit(station)]
        for station in replay.stations(layers)
    }


@torch.no_grad()
def hooked(model: nn.Module, data: list[Tensor]) -> dict[str, Pairs]:
    """What hooks see at every layer that is called once, in the order of the calls."""
    model = copy.deepcopy(model).eval()
    seen: dict[str, Pairs] = {}

    def see(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.setdefault(name, []).append((args[0].clone(), output.clone()))

    for name in layers_of(model):
        model.get_submodule(name).register_forward_hook(partial(see, name))
    for x in data:
        model(x)
    return {name: pairs for name, pairs in seen.items() if len(pairs) == len(data)}


def assert_shows(found: dict[str, Pairs], expected: dict[str, Pairs], tolerance: float) -> None:
    assert list(found) == list(expected)
    for name, pairs in expected.items():
        assert len(found[name]) == len(pairs)
        for ours, theirs in zip(found[name], pairs, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                atol = tolerance * float(other.abs().max())
                torch.testing.assert_close(one, other, rtol=0, atol=atol, msg=f"at {name}: {{}}")


# --------------------------------------------------------------------------------------------------
# What a station shows

# Its first batch must go for a while, and comes back when the second one is waiting already.
LATE_FIRST_BATCH = Network(
    stages=(
        *(Conv(width=width, kernel=1, norm=False, act="none") for width in (2, 2, 3)),
        Grouped(groups=3, width=2),
        Pool(kind="max"),
        Concat(widths=(6, 4), dense=False),
    ),
    flat=False,
    seed=0,
)


@EVERY_NET
@pytest.mark.parametrize("memory", [LARGE, 20_000, 0])
def test_stations_of_a_student_that_is_its_teacher_show_what_hooks_see(
    net: str, memory: int
) -> None:
    model = folded(made(net), images())
    found = visited(replay_of(model, memory=memory), layers_of(model))
    assert_shows(found, hooked(model, batches()), 1e-12)


@pytest.mark.parametrize("net", LIBRARIES)
def test_stations_in_models_of_libraries_show_what_hooks_see(net: str) -> None:
    torch.manual_seed(0)
    data = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    model = folded(LIBRARIES[net]().eval(), data[0])
    found = visited(replay_of(model, data=data), layers_of(model))
    assert_shows(found, hooked(model, data), 1e-4)


@settings(
    deadline=None, max_examples=15, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(network=networks(), memory=st.sampled_from([LARGE, 20_000, 0]))
@example(network=LATE_FIRST_BATCH, memory=20_000)
def test_stations_in_random_networks_show_what_hooks_see(network: Network, memory: int) -> None:
    model = folded(network.build(), network.inputs())
    data = batches(2)
    found = visited(replay_of(model, data=data, memory=memory), layers_of(model))
    assert_shows(found, hooked(model, data), 1e-12)


@torch.no_grad()
def other_weights(model: nn.Module) -> nn.Module:
    """A student with weights of its own."""
    student = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for name in sorted(layers_of(model)):
        weight = student.get_submodule(name).weight
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return student


@EVERY_NET
def test_inputs_are_the_students_and_targets_the_teachers(net: str) -> None:
    teacher = folded(made(net), images())
    student = other_weights(teacher)
    replay = replay_of(teacher, student)
    ours, theirs = hooked(student, batches()), hooked(teacher, batches())
    for station in replay.stations(layers_of(teacher)):
        for number, (x, target) in enumerate(replay.visit(station)):
            torch.testing.assert_close(x, ours[station.name][number][0])
            if station.other is None:
                torch.testing.assert_close(target, theirs[station.name][number][1])


@pytest.mark.parametrize(
    ("net", "last", "skip"),
    [
        ("residual", "block1.conv2", "block1.conv1"),
        ("pre-activation", "block2.conv2", "block2.bn1"),
        ("downsampling", "shortcut", None),
        ("padded shortcut", "conv2", None),
    ],
)
def test_the_target_of_a_block_is_what_is_missing_from_the_teachers_sum(
    net: str, last: str, skip: str | None
) -> None:
    teacher = folded(made(net), images())
    student = other_weights(teacher)
    replay = replay_of(teacher, student)
    stations = {station.name: station for station in replay.stations(layers_of(teacher))}
    assert stations[last].other is not None

    def terms(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer puts out, and what is added to it."""
        (seen,) = hooked(model, [x])[last]
        if skip is not None:
            return seen[1], input_of(model, skip, x)
        if net == "downsampling":
            return seen[1], hooked(model, [x])["conv2"][0][1]
        stem = F.relu(hooked(model, [x])["stem"][0][1])
        return seen[1], F.pad(stem[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))

    found = visited(replay, layers_of(teacher))[last]
    for x, (_, target) in zip(batches(), found, strict=True):
        expected = sum(terms(teacher, x)) - terms(student, x)[1]
        torch.testing.assert_close(target, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def input_of(model: nn.Module, path: str, x: Tensor) -> Tensor:
    model, seen = copy.deepcopy(model).eval(), []
    model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    model(x)
    return seen[0]


def test_of_two_layers_in_one_sum_the_later_makes_up_for_both() -> None:
    replay = replay_of(made("downsampling"))
    others = {s.name: s.other for s in replay.stations(layers_of(made("downsampling")))}
    assert others["conv2"] is None
    assert others["shortcut"] is not None
    alone = {s.name: s.other for s in replay.stations({"conv2"})}  # the shortcut's stays as it is
    assert alone["conv2"] is not None


@EVERY_NET
@pytest.mark.parametrize("memory", [LARGE, 0])
@torch.no_grad()
def test_what_is_written_at_a_station_is_seen_behind_it(net: str, memory: int) -> None:
    teacher = folded(made(net), images())
    student = copy.deepcopy(teacher)
    replay = replay_of(teacher, student, memory=memory)
    for station in replay.stations(layers_of(teacher)):
        layer = student.get_submodule(station.name)
        expected = hooked(student, batches())[station.name]
        for (x, _), (ours, _) in zip(replay.visit(station), expected, strict=True):
            torch.testing.assert_close(x, ours, rtol=1e-10, atol=1e-10)
        layer.weight.mul_(1.1).add_(0.01)
        layer.bias.sub_(0.1) if layer.bias is not None else None


@EVERY_NET
def test_a_second_visit_shows_the_same(net: str) -> None:
    teacher = folded(made(net), images())
    replay = replay_of(teacher, other_weights(teacher), memory=20_000)
    for station in replay.stations(layers_of(teacher)):
        first, second = ([(x.clone(), t.clone()) for x, t in replay.visit(station)] for _ in "ab")
        torch.testing.assert_close(first, second, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------
# Which stations there are


@EVERY_NET
def test_stations_are_the_layers_asked_for_in_the_order_of_the_forward(net: str) -> None:
    model = made(net)
    order = list(hooked(model, batches()))
    replay = replay_of(model)
    assert [s.name for s in replay.stations(layers_of(model))] == order
    assert [s.name for s in replay.stations(set(order[1::2]) | {"none"})] == order[1::2]


def test_a_layer_that_is_called_twice_is_no_station() -> None:
    model = made("called twice")
    assert [s.name for s in replay_of(model).stations(layers_of(model))] == ["first", "last"]


def test_some_stations_may_be_passed_by() -> None:
    model = folded(made("residual"), images())
    replay, expected = replay_of(model), hooked(model, batches())
    for station in list(replay.stations(layers_of(model)))[1::2]:
        for (x, _), (theirs, _) in zip(replay.visit(station), expected[station.name], strict=True):
            torch.testing.assert_close(x, theirs)


# --------------------------------------------------------------------------------------------------
# Batches and memory


class Passes(list):
    """Counts how often its batches are read."""

    def __init__(self, data: list[Tensor]) -> None:
        super().__init__(data)
        self.read = 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in super().__iter__():
            self.read += 1
            yield batch


def test_batches_that_wait_are_not_read_again() -> None:
    data, model = Passes(batches()), made("residual")
    replay = replay_of(model, data=data)
    first, *rest = replay.stations(layers_of(model))
    list(replay.visit(first))
    data.read = 0
    for station in rest:
        list(replay.visit(station))
    assert data.read == 0
    assert replay.peak > sum(x.nbytes for x in batches())


@settings(deadline=None, max_examples=8, print_blob=True)
@given(memory=st.integers(0, 100_000))
def test_batches_that_wait_never_take_more_than_the_memory(memory: int) -> None:
    model = made("dense")  # its features grow on the way
    replay = replay_of(model, data=batches(5), memory=memory)
    for station in replay.stations(layers_of(model)):
        assert len(list(replay.visit(station))) == 5
        assert sum(lane.size for lane in replay._lanes.values()) <= memory
    assert replay.peak <= memory


def test_a_batch_that_starts_again_lets_go_of_what_it_has_passed() -> None:
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    def count(forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        output = forward(x)
        alive.append(weakref.ref(output))
        counts.append(sum(ref() is not None for ref in alive))
        return output

    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(9))).double().eval()
    replay = replay_of(model, data=batches(1), memory=0)
    for layer in replay.student.interpreter.module.children():
        layer.forward = partial(count, layer.forward)
    list(replay.visit(Station("8", 9, 9)))
    assert len(counts) == 8
    assert max(counts) <= 2  # what a layer reads and what it writes


def test_a_pass_that_is_cut_short_shows_as_many_batches() -> None:
    model = made("residual")
    source = Source(batches(4), limit=2)
    replay = Replay(model, copy.deepcopy(model), source, memory=LARGE, reader=Reader())
    found = visited(replay, layers_of(model))
    assert_shows(found, hooked(model, batches(4)[:2]), 1e-12)


def test_batches_may_name_the_arguments_of_forward() -> None:
    truth = READ_NETS["TwoInputs"]
    model, (image, vector) = truth.model(), truth.inputs()
    data = [{"vector": vector, "image": image, "labels": torch.zeros(2)}]
    found = visited(replay_of(model, data=data), {"conv", "embed"})
    torch.testing.assert_close(found["conv"][0][0], image)
    torch.testing.assert_close(found["embed"][0][0], vector)


@pytest.mark.parametrize(
    ("bad", "facts"),
    [
        (images()[:, :2], r"batch 1 .*\(4, 2, 8, 8\).*'Residual'"),
        (images(dtype=torch.float32), r"batch 1 .*float32.*'Residual'"),
        (images() * float("nan"), r"batch 1 .*NaN"),
    ],
)
def test_a_batch_that_does_not_run_is_refused_by_its_number(bad: Tensor, facts: str) -> None:
    replay = replay_of(made("residual"), data=[images(), bad])
    with pytest.raises(DataError, match=facts):
        visited(replay, {"block1.conv1"})


# --------------------------------------------------------------------------------------------------
# Models that cannot be replayed, and what must not change


@pytest.mark.parametrize("other", ["inline", "plain", "called twice"])
def test_a_student_of_another_structure_is_refused(other: str) -> None:
    with pytest.raises(TraceError, match=r"another structure.*\d+ nodes against \d+"):
        replay_of(made("residual"), made(other))


class Counting(nn.Module):
    """Its forward traces, and does something else in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * self.calls


class Remembering(nn.Module):
    """A value of an earlier forward, which a recording takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.scale = [torch.tensor(1.0)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) * self.scale[-1]
        self.scale.append(y.detach().abs().mean())
        return y


@pytest.mark.parametrize("kind", [Counting, Remembering])
def test_a_graph_that_computes_something_else_than_the_model_is_refused(
    kind: type[nn.Module],
) -> None:
    model = built(kind)
    model(images()), model(images())
    copied = copy.deepcopy(model)
    with pytest.raises(TraceError, match=rf"graph of '{kind.__name__}' computes something else"):
        replay_of(model, copied)


@EVERY_NET
def test_a_replay_changes_neither_models_nor_data(net: str) -> None:
    teacher, student = made(net).train(), made(net)
    next(student.children()).train()
    student.register_forward_hook(lambda module, args, output: None)
    data = batches()
    before = fingerprint(teacher), fingerprint(student)
    visited(replay_of(teacher, student, data, 20_000), layers_of(teacher))
    assert (fingerprint(teacher), fingerprint(student)) == before
    torch.testing.assert_close(data, batches(), rtol=0, atol=0)


def test_models_in_training_mode_are_replayed_in_evaluation_mode() -> None:
    model = made("residual")
    expected = hooked(model, batches())
    assert_shows(visited(replay_of(model.train()), layers_of(model)), expected, 1e-12)
