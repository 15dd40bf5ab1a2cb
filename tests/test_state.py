"""The saved state: an interrupted run ends, bit for bit, where an uninterrupted one ends."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import NETS, BottleneckBlock, Residual, built, images, values
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import torchcap
from torchcap import (
    Adam,
    ClosedForm,
    FlipAndShift,
    LargestNorm,
    Mix,
    Progress,
    Projections,
    Recipe,
    Relaxation,
    StateError,
    layer_by_layer,
)
from torchcap.training.state import _told

STEPS = Adam(1e-2)
MIXED = {"epochs": 2, "optimizer": STEPS, "healing": 1, "augment": (FlipAndShift(), Mix())}
RECIPE = Recipe(
    start=ClosedForm(ridge=1e-4),
    projections=Projections(**{**MIXED, "optimizer": Adam(1e-2, relative=False)}),
    solve=ClosedForm(ridge=1e-4),
    relaxation=Relaxation(**MIXED, batch_norm=True, batch_statistics=True),
    fine_tuning=Relaxation(**MIXED, batch_norm=False),
)


# --------------------------------------------------------------------------------------------------
# Data of several kinds


class Noisy(Dataset[Tensor]):
    """Images that come with other noise in every pass, drawn from the global generator."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        x = images(1, seed=index)[0]
        return x + 0.1 * torch.randn_like(x)


DATA: dict[str, Callable[[], Iterable[Any]]] = {
    "a list": lambda: [images(seed=seed) for seed in range(3)],
    "shuffled": lambda: DataLoader(Noisy(), 3, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(
        Noisy(), 3, shuffle=True, generator=torch.Generator().manual_seed(7)
    ),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": lambda: Residual(BottleneckBlock),
    "plain": NETS["plain"],  # its features are compared through lifts
    "dense": NETS["dense"],
}


def compress(net: str = "bottleneck", data: str = "a list", **how: Any) -> nn.Module:
    how = {"recipe": RECIPE, "save_every": 1, **how}
    return torchcap.compress(built(MODELS[net]), DATA[data](), **how)


@cache
def uninterrupted(net: str, data: str = "a list", recipe: Recipe = RECIPE) -> dict[str, Tensor]:
    return values(compress(net, data, recipe=recipe))


class Interruption(BaseException):
    """As if Ctrl-C were pressed."""


def interrupting(name: str, step: int, round_: int = 1) -> Callable[[Progress], None]:
    """Return a callback that interrupts at a step, of the n-th training of that name."""
    seen = 0

    def watch(progress: Progress) -> None:
        nonlocal seen
        seen += (progress.name, progress.step) == (name, step)
        if seen == round_:
            raise Interruption

    return watch


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    ours = values(model)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


# --------------------------------------------------------------------------------------------------
# Going on

Place = tuple[str, int, int]
PLACES: dict[str, Place] = {
    "selection": ("selection", 2, 1),
    "first round": ("projections", 2, 1),
    "second round": ("projections", 5, 2),
    "closed form": ("closed form", 3, 1),
    "relaxation": ("relaxation", 4, 1),
    "fine-tuning": ("fine-tuning", 6, 1),
}


def check(path: Path, place: Place, expected: dict[str, Tensor], **how: Any) -> None:
    """Interrupt a run, go on with it, and compare."""
    with pytest.raises(Interruption):
        compress(state=path, on_progress=interrupting(*place), **how)
    assert path.exists() == (place[0] != "selection")
    assert_same(compress(state=path, **how), expected)
    assert not path.exists()


@pytest.mark.parametrize("place", PLACES)
def test_interrupted_run_ends_where_an_uninterrupted_one_ends(tmp_path: Path, place: str) -> None:
    check(tmp_path / "state", PLACES[place], uninterrupted("bottleneck"))


@pytest.mark.parametrize("data", ["shuffled", "shuffled by a generator"])
@pytest.mark.parametrize("place", ["second round", "relaxation"])
def test_shuffled_data_goes_on_in_its_order(tmp_path: Path, data: str, place: str) -> None:
    check(tmp_path / "state", PLACES[place], uninterrupted("bottleneck", data), data=data)


@pytest.mark.parametrize("net", ["plain", "dense"])
@pytest.mark.parametrize("place", ["relaxation", "fine-tuning"])
def test_lifts_are_found_again_as_they_were(tmp_path: Path, net: str, place: str) -> None:
    recipe = RECIPE.but(relaxation=Relaxation(**MIXED, batch_norm=True), projections=None)
    expected = uninterrupted(net, recipe=recipe)
    check(tmp_path / "state", PLACES[place], expected, net=net, recipe=recipe)


def test_projections_one_by_one_go_on(tmp_path: Path) -> None:
    recipe = Recipe(projections=RECIPE.projections.but(rounds=layer_by_layer), name="paper")
    place = ("projections", 2, 3)
    check(
        tmp_path / "state", place, uninterrupted("plain", recipe=recipe), net="plain", recipe=recipe
    )


@pytest.mark.parametrize("every", [2, 100])
def test_steps_behind_the_last_state_are_taken_again(tmp_path: Path, every: int) -> None:
    path, place = tmp_path / "state", PLACES["relaxation"]
    check(path, place, uninterrupted("bottleneck"), save_every=every)


def test_run_may_be_interrupted_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "state"
    steps = [("selection", 6), ("projections", 1), ("projections", 6), ("closed form", 1)]
    for step in [*steps, *((name, i) for name in ("relaxation", "fine-tuning") for i in (1, 6))]:
        with pytest.raises(Interruption):
            compress(state=path, on_progress=interrupting(*step))
    assert_same(compress(state=path), uninterrupted("bottleneck"))


def test_steps_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    path, seen = tmp_path / "state", []
    with pytest.raises(Interruption):
        compress(state=path, on_progress=interrupting("relaxation", 4))
    compress(state=path, on_progress=lambda p: seen.append((p.name, p.step)))
    # The fourth step had been taken, and not saved yet, when its progress was told.
    expected = [("relaxation", step) for step in (4, 5, 6)]
    assert seen == expected + [("fine-tuning", step) for step in range(1, 7)]


def test_state_makes_no_difference_to_a_run_that_is_not_interrupted(tmp_path: Path) -> None:
    path, there = tmp_path / "state", []
    small = compress(state=path, on_progress=lambda _: there.append(path.exists()))
    assert_same(small, uninterrupted("bottleneck"))
    assert any(there)
    assert list(tmp_path.iterdir()) == []


def test_state_may_be_given_as_text_and_continued_as_a_path(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(Interruption):
        compress(state=str(path), on_progress=interrupting("relaxation", 2))
    assert_same(compress(state=path), uninterrupted("bottleneck"))


def test_state_holds_no_code(interrupted: Path) -> None:
    assert isinstance(torch.load(interrupted, weights_only=True), dict)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_state

def watch(progress):
    if (progress.name, progress.step) == ("relaxation", 4):
        os.kill(os.getpid(), signal.SIGKILL)

test_state.compress(data="shuffled", state={path!r}, on_progress=watch)
"""


def test_killed_process_is_continued_by_another_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert path.exists()
    assert_same(compress(data="shuffled", state=path), uninterrupted("bottleneck", "shuffled"))


# --------------------------------------------------------------------------------------------------
# States that are refused


@cache
def content_of_a_state(folder: Path) -> bytes:
    with pytest.raises(Interruption):
        compress(state=folder / "state", on_progress=interrupting("relaxation", 3))
    return (folder / "state").read_bytes()


@pytest.fixture
def interrupted(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a run that was interrupted in its relaxation."""
    path = tmp_path / "state"
    path.write_bytes(content_of_a_state(tmp_path_factory.getbasetemp()))
    return path


OTHER: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "recipe": ("recipe", lambda: {"recipe": RECIPE.but(fine_tuning=None)}),
    "step size": (
        "recipe",
        lambda: {"recipe": RECIPE.but(relaxation=Relaxation(epochs=2, optimizer=Adam(2e-2)))},
    ),
    "ratio": ("plan", lambda: {"ratio": 0.75}),
    "seed": ("seed", lambda: {"seed": 1}),
    "network": ("plan", lambda: {"net": "plain"}),
}


@pytest.mark.parametrize("case", OTHER)
def test_state_of_another_run_is_refused_by_what_differs(interrupted: Path, case: str) -> None:
    key, how = OTHER[case]
    before = interrupted.read_bytes()
    with pytest.raises(StateError, match=rf"(?s)another run: its {key} is.*Give another path"):
        compress(state=interrupted, **how())
    assert interrupted.read_bytes() == before


def test_other_ranks_are_named_a_few_of_them(interrupted: Path) -> None:
    model = built(MODELS["bottleneck"])
    name = next(space.name for space in torchcap.analyze(model, images()).free)
    with pytest.raises(StateError, match=rf"(?s)its plan is.*{name}: rank: 3, here 4\n") as caught:
        compress(state=interrupted, ratio=0.75)
    assert "channels" not in str(caught.value)  # which are the same
    plan = {"spaces": {f"layer{i}": {"rank": i} for i in range(20)}}
    told = _told(plan, {"spaces": {}})
    assert "layer4: {'rank': 4}, here missing" in told
    assert "layer5" not in told
    assert "15 more" in told


def test_state_of_other_weights_is_refused(interrupted: Path) -> None:
    model = built(MODELS["bottleneck"], seed=1)
    with pytest.raises(StateError, match=r"another run: its model is"):
        torchcap.compress(model, DATA["a list"](), recipe=RECIPE, state=interrupted)


def test_state_of_other_images_is_refused(interrupted: Path) -> None:
    others = [images(seed=seed) for seed in range(3, 6)]
    with pytest.raises(StateError, match=r"another run: its data is"):
        torchcap.compress(built(MODELS["bottleneck"]), others, recipe=RECIPE, state=interrupted)


@pytest.mark.parametrize("left", [0, 1, 100, 0.5, 0.99])
def test_truncated_state_is_refused(interrupted: Path, left: float) -> None:
    content = interrupted.read_bytes()
    interrupted.write_bytes(content[: int(left * len(content)) if 0 < left < 1 else int(left)])
    with pytest.raises(StateError, match=r"'.*state' cannot be read.*begin anew"):
        compress(state=interrupted)


class Intruder:
    """What, unpickled, leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_code_in_a_state_does_not_run(tmp_path: Path, save: Callable[..., Any]) -> None:
    path, trace = tmp_path / "state", tmp_path / "trace"
    save({"format": "torchcap-state", "version": 1, "identity": Intruder(trace)}, path)
    with pytest.raises(StateError, match="cannot be read"):
        compress(state=path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Intruder(trace)))  # it does work where it is let in
    assert trace.exists()


FOREIGN: dict[str, Any] = {
    "a tensor": torch.zeros(3),
    "weights": {"conv.weight": torch.zeros(3)},
    "a list": [1, 2],
    "another format": {"format": "other-state", "version": 1},
    "another version": {"format": "torchcap-state", "version": 2},
    "parts missing": {"format": "torchcap-state", "version": 1},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_file_is_refused_and_kept(tmp_path: Path, case: str) -> None:
    path = tmp_path / "state"
    torch.save(FOREIGN[case], path)
    before = path.read_bytes()
    with pytest.raises(StateError, match=r"'.*state' is"):
        compress(state=path)
    assert path.read_bytes() == before


def test_text_and_folders_are_no_states(tmp_path: Path) -> None:
    path = tmp_path / "state.txt"
    path.write_text("Dear diary")
    for wrong in (path, tmp_path):
        with pytest.raises(StateError, match="cannot be read"):
            compress(state=wrong)
    assert path.read_text() == "Dear diary"


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_folder_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, folder: str
) -> None:
    (tmp_path / "file").touch()
    seen: list[Progress] = []
    with pytest.raises(StateError, match=rf"{folder}"):
        compress(state=tmp_path / folder / "state", on_progress=seen.append)
    assert seen == []


# --------------------------------------------------------------------------------------------------
# A disk that is full


def failing(error: Exception, writes: int) -> Callable[..., None]:
    """Return a ``torch.save`` that fails half-way, after some writes went well."""
    save, left = torch.save, writes

    def saved(content: Any, file: Any) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            return save(content, file)
        file.write(b"half of a state")
        raise error

    return saved


FULL: dict[str, Exception] = {
    "OSError": OSError(errno.ENOSPC, "No space left on device"),
    "RuntimeError": RuntimeError("PytorchStreamWriter failed writing file: file write failed"),
}


@pytest.mark.parametrize(("kind", "writes"), [("OSError", 1), ("RuntimeError", 5), ("OSError", 16)])
def test_full_disk_keeps_the_state_before_and_the_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, writes: int
) -> None:
    path = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing(FULL[kind], writes))
        with pytest.raises(
            StateError, match=r"(No space|write failed).*before it is kept"
        ) as caught:
            compress(state=path)
    assert caught.value.__cause__ is FULL[kind]
    assert list(tmp_path.iterdir()) == [path]
    assert torch.load(path, weights_only=True)["format"] == "torchcap-state"
    assert_same(compress(state=path), uninterrupted("bottleneck"))


def test_full_disk_at_the_first_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", failing(FULL["OSError"], 0))
    with pytest.raises(StateError, match="no state is kept"):
        compress(state=tmp_path / "state", recipe=Recipe(start=LargestNorm()))
    assert list(tmp_path.iterdir()) == []


def test_folder_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, *_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(StateError, match=r"cannot be written to '.*state' .*Permission denied"):
        compress(state=tmp_path / "state", recipe=Recipe(start=LargestNorm()))


def test_half_a_state_beside_the_state_does_no_harm(interrupted: Path) -> None:
    beside = interrupted.with_name(interrupted.name + ".new")
    beside.write_bytes(b"half of a state")  # a process that was killed while it wrote
    assert_same(compress(state=interrupted), uninterrupted("bottleneck"))
    assert not beside.exists()
