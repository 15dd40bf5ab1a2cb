"""The command line: every command on tiny networks and generated images, without a network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import torchcap
from torchcap import budget
from torchcap.checkpoint.load import describe, load
from torchcap.cli import deciding, main
from torchcap.cli.arguments import parse
from torchcap.cli.compressing import _autocast, measure
from torchcap.cli.console import Bars
from torchcap.cli.folders import Images, read_folders
from torchcap.cli.models import load_weights_, open_network

CLASSES, EACH = 5, 4
TINY = ("test_resnet", "--random-weights", "--num-classes", str(CLASSES), "--image-size", "32")
USUAL = ("--quiet", "--device", "cpu")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"a connection to {args[1:]} was tried")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw(
        folder, [f"class{label}/{number}.png" for label in range(CLASSES) for number in range(EACH)]
    )
    return folder


@pytest.fixture(scope="module")
def curves(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("curves") / "curves.json"
    measured = ("--data", str(pictures), "--batch", "8", "--shares", "0.25", "0.6")
    assert main(["sensitivity", *TINY, *USUAL, *measured, "--out", str(file)]) == 0
    return file


def draw(folder: Path, names: list[str]) -> None:
    random = np.random.default_rng(0)
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(file)


def compress_arguments(pictures: Path, out: Path, *more: str) -> list[str]:
    data = ("--data", str(pictures), "--batch", "6", "--out", str(out))
    return ["compress", *TINY, *USUAL, *data, *more]


def parsed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> Any:
    """Run a command and return its JSON."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that has to fail and return its message."""
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("torchcap: error: ")
    assert "Traceback" not in captured.err
    return captured.err


# --------------------------------------------------------------------------------------------------
# inspect, sensitivity, latency, plan


def test_inspect_prints_what_analyze_finds(capsys):
    assert main(["inspect", "timm:test_resnet"]) == 0
    model = timm.create_model("test_resnet")
    assert capsys.readouterr().out == f"{torchcap.analyze(model)}\n"


def test_inspect_takes_attention_apart_if_told(capsys):
    vit = ["inspect", "torchvision:vit_b_32", "--random-weights"]
    plain, split = (parsed(capsys, [*vit, *flag]) for flag in ([], ["--split-attention"]))
    assert plain["macs"] == split["macs"]
    assert sum(space["name"].endswith(".v_proj") for space in plain["spaces"]) == 0
    assert sum(space["name"].endswith(".v_proj") for space in split["spaces"]) == 12


def test_model_without_such_attention_cannot_be_split(capsys):
    assert main(["inspect", *TINY, "--split-attention"]) == 1
    assert "has no nn.MultiheadAttention" in capsys.readouterr().err


def test_inspect_reads_residual_streams_if_told(capsys):
    plain = parsed(capsys, ["inspect", *TINY])
    streams = parsed(capsys, ["inspect", *TINY, "--streams"])
    free = [sum(s["freedom"] != "fixed" for s in found["spaces"]) for found in (plain, streams)]
    assert free[0] < free[1]
    assert 0 < plain["spaces"][0]["share_of_macs"] <= plain["reachable"]


@pytest.mark.parametrize("model", ["test_vit", "tv:squeezenet1_1"])
def test_image_size_and_classes_reach_the_model(model, capsys):
    small = parsed(capsys, ["inspect", model, "--image-size", "64", "--num-classes", "7"])
    usual = parsed(capsys, ["inspect", model])
    assert small["macs"] < usual["macs"]
    assert 7 in {space["channels"] for space in small["spaces"]}


def test_sensitivity_keeps_its_curves_and_goes_on_from_them(curves, pictures, capsys):
    before = curves.read_bytes()
    data = ("--data", str(pictures), "--batch", "8", "--shares", "0.25", "0.6")
    found = parsed(capsys, ["sensitivity", *TINY, *USUAL, *data, "--out", str(curves)])
    assert curves.read_bytes() == before
    kept = torchcap.Sensitivity.from_json(before.decode())
    assert torchcap.Sensitivity.from_dict(found) == kept
    assert kept.metric == "accuracy"
    assert all(len(curve.ranks) == 2 for curve in kept.curves)


def test_sensitivity_is_drawn(curves, pictures, tmp_path):
    pytest.importorskip("matplotlib")
    data = ("--data", str(pictures), "--batch", "8", "--shares", "0.25", "0.6")
    plot = tmp_path / "curves.png"
    arguments = ["sensitivity", *TINY, *USUAL, *data, "--out", str(curves), "--plot", str(plot)]
    assert main(arguments) == 0
    with Image.open(plot) as picture:
        assert picture.format == "PNG"


def test_plan_of_a_budget_predicts_what_the_small_model_costs(curves, tmp_path, capsys):
    file = tmp_path / "plan.json"
    budget = ("--macs", "0.6", "--curves", str(curves), "--out", str(file))
    found = parsed(capsys, ["plan", *TINY, *USUAL, *budget])
    plan = torchcap.Plan.from_json(file.read_text())
    assert plan.to_dict() == found["plan"]
    network = open_network(parse(["inspect", *TINY]))
    graph = torchcap.analyze(network.model, network.example)
    predicted = {name: costs["planned"] for name, costs in found["predicted"].items()}
    cost = torchcap.cost(graph, plan)
    assert predicted == {"macs": cost.macs, "parameters": cost.parameters} | {
        "activations": cost.activations
    }
    assert cost.macs <= 0.6 * graph.macs


def test_latency_table_prices_a_plan(tmp_path, capsys, monkeypatch):
    quick = partial(torchcap.measure_latency, widths=(0.5,), seconds=1e-4)
    monkeypatch.setattr(deciding, "measure_latency", quick)
    file = tmp_path / "table.json"
    found = parsed(capsys, ["latency", *TINY, *USUAL, "--batch", "2", "--out", str(file)])
    table = torchcap.LatencyTable.from_json(file.read_text())
    assert (found["milliseconds"], found["batch"]) == (table.whole, 2)
    assert found["layers"].keys() == table.layers.keys()
    priced = parsed(capsys, ["plan", *TINY, *USUAL, "--ratio", "1", "--latency", str(file)])
    assert priced["predicted"]["milliseconds"]["planned"] == pytest.approx(table.whole)


def test_plans_differ_where_their_ranks_do(tmp_path, capsys):
    files = [str(tmp_path / f"{name}.json") for name in "ab"]
    for file, ratio in zip(files, ("0.5", "0.25"), strict=True):
        assert main(["plan", *TINY, "--ratio", ratio, "--out", file]) == 0
    found = parsed(capsys, ["plan", "--diff", *files])["differences"]
    assert found["conv1.0"] == {"channels": 16, "ranks": [8, 4]}
    assert parsed(capsys, ["plan", "--diff", files[0], files[0]]) == {"differences": {}}


def test_plan_says_that_its_parameters_are_those_of_the_folded_model(capsys):
    assert main(["plan", *TINY]) == 0
    assert "parameters, norms folded" in capsys.readouterr().out


def test_least_share_of_a_space_holds(curves, capsys):
    wide = ("--macs", "0.8", "--curves", str(curves), "--minimum", "0.7")
    plan = torchcap.Plan.from_dict(parsed(capsys, ["plan", *TINY, *USUAL, *wide])["plan"])
    assert all(choice.rank >= 0.7 * choice.channels for choice in plan.choices.values())
    cheap = ("--macs", "0.2", "--curves", str(curves), "--minimum", "0.7")
    message = failure(capsys, ["plan", *TINY, *USUAL, *cheap])
    assert "cannot be reached" in message
    assert "(minimum)" in message
    assert "=" not in message


@pytest.mark.parametrize("command", ["plan", "sensitivity"])
def test_ending_of_no_picture_is_found_before_any_work(
    command, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(deciding, "open_network", lambda *_, **__: pytest.fail("work was done"))
    out, plot = tmp_path / "out.json", tmp_path / "picture.xyz"
    data = ("--data", str(pictures)) if command == "sensitivity" else ()
    arguments = [command, *TINY, *USUAL, *data, "--out", str(out), "--plot", str(plot)]
    message = failure(capsys, arguments)
    assert "picture.xyz" in message
    assert ".png" in message


# --------------------------------------------------------------------------------------------------
# compress


def test_budget_out_of_reach_leaves_nothing(pictures, tmp_path, capsys):
    arguments = compress_arguments(pictures, tmp_path / "small.safetensors", "--macs", "0.001")
    assert "cannot be reached" in failure(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


def test_measured_times_are_given_to_compress(pictures, tmp_path, capsys, monkeypatch):
    quick = partial(torchcap.measure_latency, widths=(0.5,), seconds=1e-4)
    monkeypatch.setattr(deciding, "measure_latency", quick)
    monkeypatch.setattr(budget, "measure_latency", lambda *_, **__: pytest.fail("it was timed"))
    monkeypatch.setattr(budget, "sensitivity", lambda *_, **__: pytest.fail("it was measured"))
    file, other = tmp_path / "table.json", tmp_path / "other.json"
    assert main(["latency", *TINY, *USUAL, "--out", str(file)]) == 0
    text = file.read_text()
    other.write_text(text.replace('"conv1.0"', '"conv9.0"'))
    out = tmp_path / "small.safetensors"
    for table, limit, problem in ((file, "1e9", "already"), (other, "1", "not in the latency")):
        more = ("--latency", str(table), "--latency-ms", limit)
        assert problem in failure(capsys, compress_arguments(pictures, out, *more))
    assert sorted(tmp_path.iterdir()) == [other, file]


def test_what_is_kept_is_said_where_a_budget_is_out_of_reach(
    pictures, tmp_path, capsys, monkeypatch
):
    quick = partial(torchcap.measure_latency, widths=(0.5,), seconds=1e-4)
    monkeypatch.setattr(budget, "measure_latency", quick)
    arguments = compress_arguments(pictures, tmp_path / "small", "--latency-ms", "1e9")
    assert "small.state.latency' is kept, and --resume goes on" in failure(capsys, arguments)


def test_labels_are_refused_where_folders_are_no_classes(pictures, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    arguments = compress_arguments(pictures, out, "--recipe", "full", "--labels", "1")
    arguments[arguments.index("--num-classes") + 1] = "7"
    message = failure(capsys, arguments)
    assert "5 class folders" in message
    assert "7 classes" in message


def test_small_model_of_another_builder_is_refused(tmp_path, capsys):
    small = tmp_path / "small.safetensors"
    torchcap.save(timm.create_model("test_resnet").eval(), small)
    message = failure(capsys, ["compare", "tv:resnet18", str(small), *USUAL])
    assert "timm:test_resnet" in message
    assert "torchvision:resnet18" in message
    tagged = ("test_resnet.r160_in1k", "--random-weights", "--image-size", "32")
    assert main(["compare", *tagged, str(small), "--batch", *USUAL]) == 0


def test_compressed_file_is_the_small_model_of_the_library(pictures, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    found = parsed(capsys, compress_arguments(pictures, out, "--recipe", "seconds"))
    plan = torchcap.Plan.from_dict(found["plan"])
    small, contents = load(out), describe(out)
    assert contents.plan == plan
    assert contents.builder.name == "timm:test_resnet"
    graph = torchcap.analyze(small)  # the file knows how large its images are
    assert {name: graph[name].channels for name in plan.ranks} == plan.ranks
    assert found["report"]["small"]["macs"] == graph.macs
    assert found["verified"]["largest_difference"] == 0.0
    assert found["scores"]["images"] == CLASSES * EACH // 10
    assert len(found["scores"]["accuracy"]) == 2
    assert list(tmp_path.iterdir()) == [out]  # the state is gone


def test_a_saved_model_can_be_a_model_again(pictures, tmp_path, capsys):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert main(compress_arguments(pictures, first, "--recipe", "seconds")) == 0
    again = [
        "compress",
        str(first),
        *USUAL,
        "--data",
        str(pictures),
        "--recipe",
        "seconds",
        "--amp",
    ]
    found = parsed(capsys, [*again, "--ratio", "0.5", "--out", str(second)])
    assert found["report"]["small"]["macs"] < found["report"]["model"]["macs"]
    compared = parsed(capsys, ["compare", *TINY, str(second), "--batch", *USUAL])
    assert compared["small"]["macs"] == found["report"]["small"]["macs"]
    assert main(["compare", *TINY, str(second), "--batch", "--markdown"]) == 0
    assert "| MACs |" in capsys.readouterr().out


def test_torchvision_model_keeps_the_size_of_its_images(pictures, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    tiny = ("tv:squeezenet1_1", "--random-weights", "--num-classes", "5", "--image-size", "48")
    data = ("--data", str(pictures), "--out", str(out), "--recipe", "seconds", "--ratio", "0.25")
    assert main(["compress", *tiny, *USUAL, *data]) == 0
    network = open_network(parse(["inspect", str(out)]))
    assert network.builder.startswith("torchvision:squeezenet")
    assert network.example.shape == (1, 3, 48, 48)


def steps_of(
    patch: pytest.MonkeyPatch, *, stop_at: str = "", step: int = 0
) -> list[torchcap.Progress]:
    """Note the progress of a run in a list; stop it at a step, as Ctrl-C would."""
    steps: list[torchcap.Progress] = []

    def note(_: Bars, progress: torchcap.Progress) -> None:
        steps.append(progress)
        if (progress.name, progress.step) == (stop_at, step):
            raise KeyboardInterrupt

    patch.setattr(Bars, "__call__", note)
    return steps


@pytest.mark.parametrize(
    ("more", "stop_at", "done"),
    [
        (("--recipe", "minutes", "--epochs", "2"), "relaxation", "selection"),
        (("--recipe", "seconds", "--macs", "0.6"), "sensitivity", ""),
    ],
)
def test_interrupted_run_goes_on_to_the_same_file(
    pictures, tmp_path, capsys, monkeypatch, more, stop_at, done
):
    monkeypatch.setattr(deciding, "sensitivity", partial(torchcap.sensitivity, shares=(0.3, 0.7)))
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    assert main(compress_arguments(pictures, whole, *more)) == 0
    arguments = compress_arguments(pictures, broken, *more)
    with monkeypatch.context() as patch:
        steps_of(patch, stop_at=stop_at, step=3)
        capsys.readouterr()
        assert main(arguments) == 130
    assert "--resume goes on from" in capsys.readouterr().err
    assert not broken.exists()
    assert "--resume" in failure(capsys, arguments)  # nothing is overwritten unasked
    with monkeypatch.context() as patch:
        steps = steps_of(patch)
        assert main([*arguments, "--resume"]) == 0
    assert done not in {progress.name for progress in steps}
    assert (stop_at, 1) not in {(p.name, p.step) for p in steps} or stop_at == "relaxation"
    assert broken.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == [broken, whole]


def test_autocast_sees_weights_that_change_meanwhile():
    layer, images = nn.Linear(3, 3), torch.ones(1, 3)
    with _autocast(parse(["compress", *TINY, "--data", "x", "--out", "x", "--amp"])):
        before = layer(images)
        with torch.no_grad():
            layer.weight.zero_(), layer.bias.fill_(7.0)
        after = layer(images)
    assert before.dtype == torch.bfloat16
    assert after.tolist() == [[7.0, 7.0, 7.0]]


def test_two_processes_write_one_file(pictures, tmp_path):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    out = tmp_path / "small.safetensors"
    command = [sys.executable, "-m", "torchcap.cli"]
    command += compress_arguments(pictures, out, "--recipe", "seconds", "--json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    (first, problem), (second, problem_too) = (
        process.communicate(timeout=300) for process in started
    )
    assert [process.returncode for process in started] == [0, 0], problem + problem_too
    assert second == ""
    found = json.loads(first)
    assert found["scores"]["images"] == CLASSES * EACH // 10  # of both
    assert list(tmp_path.iterdir()) == [out]
    assert describe(out).plan.to_dict() == found["plan"]


def test_measure_counts_agreement_and_accuracy():
    class Constant(nn.Module):
        def __init__(self, answer: int) -> None:
            super().__init__()
            self.answer = answer

        def forward(self, images):
            return nn.functional.one_hot(torch.full((len(images),), self.answer), 3).float()

    batches = [(torch.zeros(4, 1), torch.tensor([0, 0, 1, 2])), (torch.zeros(1, 1), torch.ones(1))]
    scores = measure(Constant(0), Constant(1), batches, torch.device("cpu"))
    assert (scores.images, scores.agreement, scores.accuracy) == (5, 0.0, (0.4, 0.4))
    unlabelled = measure(Constant(0), Constant(0), [torch.zeros(4, 1)], torch.device("cpu"))
    assert (unlabelled.agreement, unlabelled.accuracy) == (1.0, None)


def test_exported_files_are_checked(pictures, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    onnx, pt2 = tmp_path / "small.onnx", tmp_path / "small.pt2"
    found = parsed(capsys, ["export", *TINY, "--onnx", str(onnx), "--pt2", str(pt2)])
    assert found.keys() == {str(onnx), str(pt2)}
    assert all(0 <= entry["largest_difference"] < 1e-4 for entry in found.values())
    network = open_network(parse(["inspect", *TINY]))
    images = torch.randn(3, *network.example.shape[1:])
    with torch.no_grad():  # of another number than it was exported with
        torch.testing.assert_close(
            torch.export.load(pt2).module()(images), network.model(images), rtol=1e-4, atol=1e-4
        )


# --------------------------------------------------------------------------------------------------
# Images


def test_folders_are_classes_only_where_there_is_one_for_each(tmp_path):
    draw(tmp_path, ["b/0.png", "b/1.JPEG", "a/inner/2.png", "a/notes.txt.png"])
    split = read_folders(tmp_path, classes=2)
    both = [split.train, split.held_out]
    found = {f: label for s in both for f, label in zip(s.files, s.labels, strict=True)}
    assert {file.name: label for file, label in found.items()} == {
        "0.png": 1,
        "1.JPEG": 1,
        "2.png": 0,
        "notes.txt.png": 0,
    }
    assert read_folders(tmp_path, classes=3).train.labels is None


def test_images_without_folders_have_no_labels(tmp_path):
    draw(tmp_path, ["0.png", "1.png"])
    split = read_folders(tmp_path, classes=0)
    assert split.train.labels is None
    assert (len(split.train), len(split.held_out)) == (1, 1)


def test_validation_folder_is_measured_on(tmp_path):
    draw(tmp_path, ["train/a/0.png", "train/b/1.png", "val/b/2.png", "test/a/3.png"])
    split = read_folders(tmp_path, classes=2)
    assert {file.name for file in split.train.files} == {"0.png", "1.png"}
    assert [file.name for file in split.held_out.files] == ["2.png"]
    assert split.held_out.labels == (1,)


@settings(
    deadline=None,
    print_blob=True,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(count=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_every_image_is_compressed_with_or_measured_on(tmp_path_factory, count, seed):
    folder = tmp_path_factory.mktemp("images")
    files = {folder / f"{number}.png" for number in range(count)}
    for file in files:
        file.touch()
    split = read_folders(folder, 3, seed)
    assert {*split.train.files, *split.held_out.files} == files
    assert len(split.train) + len(split.held_out) == count
    assert len(split.held_out) == max(1, round(0.1 * count))
    assert read_folders(folder, 3, seed) == split


def test_slices_of_images_keep_their_labels():
    images = Images(tuple(map(Path, "abcd")), (0, 1, 2, 3))
    assert images[1::2] == Images((Path("b"), Path("d")), (1, 3))


# --------------------------------------------------------------------------------------------------
# Models


def test_transform_is_that_of_the_library():
    picture = Image.fromarray(np.arange(300 * 260 * 3, dtype=np.uint8).reshape(300, 260, 3))
    timms = open_network(parse(["inspect", "test_resnet", "--random-weights"]))
    config = timm.data.resolve_model_data_config(timms.model)
    expected = timm.data.create_transform(**config)(picture)
    torch.testing.assert_close(timms.transform()(picture), expected)
    torchvisions = open_network(parse(["inspect", "tv:squeezenet1_1", "--random-weights"]))
    from torchvision.models import SqueezeNet1_1_Weights  # noqa: PLC0415

    preset = SqueezeNet1_1_Weights.DEFAULT.transforms()
    torch.testing.assert_close(torchvisions.transform()(picture), preset(picture))


def test_weights_are_read_from_every_kind_of_file(tmp_path):
    source, target = (nn.Sequential(nn.Linear(2, 3)) for _ in range(2))
    wrapped = {"state_dict": {f"module.{n}": t for n, t in source.state_dict().items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "wrapped.pth")
    save_file(source.state_dict(), tmp_path / "plain.safetensors")
    for name in ("wrapped.pth", "plain.safetensors"):
        nn.init.zeros_(target[0].weight)
        load_weights_(target, tmp_path / name)
        torch.testing.assert_close(target[0].weight, source[0].weight)


def test_random_weights_are_those_of_the_seed():
    def first(*more: str) -> torch.Tensor:
        return next(open_network(parse(["inspect", *TINY, *more])).model.parameters())

    torch.manual_seed(1)
    one = first()
    torch.manual_seed(2)
    assert torch.equal(first(), one)
    assert not torch.equal(first("--seed", "5"), one)


# --------------------------------------------------------------------------------------------------
# Errors


def test_failing_download_says_what_to_do_instead(pictures, tmp_path, capsys, monkeypatch):
    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    out = str(tmp_path / "small.safetensors")
    arguments = ["compress", "test_resnet", *USUAL, "--data", str(pictures), "--out", out]
    message = failure(capsys, arguments)
    for fact in ("timm:test_resnet", "not known", "--weights FILE", "--random-weights"):
        assert fact in message


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["inspect", "resnet81"], ["resnet81", "did you mean"]),
        (["inspect", "tv:resnet81"], ["tv:resnet81", "torchvision"]),
        (["inspect", "missing.safetensors"], ["missing.safetensors"]),
        (["inspect", "test_resnet", "--weights", "missing.pth"], ["missing.pth", "--weights"]),
        (["compress", *TINY, "--data", "nowhere", "--out", "x"], ["nowhere"]),
        (["compress", *TINY, "--data", ".", "--out", "no/x"], ["'no'", "--out"]),
        (["compress", *TINY, "--data", ".", "--out", "x"], ["no images", ".png"]),
        (["plan", *TINY, "--macs", "0.5"], ["--curves", "--data"]),
        (["plan", *TINY, "--macs", "0.5", "--curves", "nothing.json"], ["nothing.json"]),
        (["plan", "--diff", "a.json", "b.json"], ["a.json"]),
    ],
)
def test_what_is_missing_is_named(arguments, facts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = failure(capsys, arguments)
    for fact in facts:
        assert fact in message


@pytest.mark.parametrize(
    ("option", "text", "facts"),
    [
        ("--plan", '{"format": "torchcap-plan", "version": 1, "spaces": {"a": 1}}', ["space 'a'"]),
        ("--curves", "no JSON", ["not a sensitivity"]),
        ("--latency", '{"wole": 1}', ["not a latency table"]),
    ],
)
def test_file_with_a_slip_is_named(option, text, facts, pictures, tmp_path, capsys):
    file = tmp_path / "edited.json"
    file.write_text(text)
    more = {"--plan": (), "--curves": ("--macs", "0.5"), "--latency": ("--latency-ms", "5")}[option]
    out = tmp_path / "small.safetensors"
    message = failure(capsys, compress_arguments(pictures, out, option, str(file), *more))
    for fact in ("edited.json': ", *facts):
        assert fact in message


def test_weights_of_another_model_are_refused(tmp_path, capsys):
    file = tmp_path / "other.pth"
    torch.save(nn.Linear(2, 3).state_dict(), file)
    message = failure(capsys, ["inspect", "test_resnet", "--weights", str(file)])
    assert "is missing" in message
    assert "--num-classes" in message
    file.write_bytes(b"damaged")
    assert "cannot be read" in failure(capsys, ["inspect", "test_resnet", "--weights", str(file)])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_broken_image_is_named(tmp_path, capsys, workers):
    draw(tmp_path, [f"{number}.png" for number in range(4)])
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    out = tmp_path / "small.safetensors"
    arguments = compress_arguments(tmp_path, out, "--workers", workers, "--recipe", "seconds")
    message = failure(capsys, arguments)
    assert ".png' cannot be read as an image" in message


def test_debug_shows_where_it_came_from(capsys):
    with pytest.raises(torchcap.ModelError, match="resnet81"):
        main(["inspect", "resnet81", "--debug"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["shrink"],
        ["inspect"],
        ["plan"],
        ["plan", "resnet18", "--ratio", "1.5"],
        ["plan", "resnet18", "--ratio", "0.5", "--macs", "0.5"],
        ["compress", "resnet18", "--data", "x"],
        [
            "compress",
            "resnet18",
            "--data",
            "x",
            "--out",
            "y",
            "--recipe",
            "seconds",
            "--epochs",
            "2",
        ],
        ["compress", "resnet18", "--data", "x", "--out", "y", "--labels", "1"],
        ["compress", "resnet18", "--data", "x", "--out", "y", "--images", "0"],
        ["inspect", "resnet18", "--weights", "x", "--random-weights"],
        ["inspect", "resnet18", "--device", "abacus"],
        ["export", "small.safetensors"],
        ["inspect", "resnet18", "--stream"],
        ["plan", "resnet18", "--curves", "x"],
        ["plan", "resnet18", "--ratio", "0.5", "--curves", "x"],
        ["plan", "resnet18", "--ratio", "0.5", "--minimum", "0.1"],
        ["plan", "resnet18", "--macs", "0.5", "--latency-batch", "2"],
        ["plan", "resnet18", "--latency", "x", "--latency-batch", "2"],
        ["plan", "resnet18", "--data", "x"],
        ["plan", "resnet18", "--macs", "0.5", "--data", "x", "--curves", "x"],
        ["plan", "resnet18", "--macs", "-1", "--curves", "x"],
        ["plan", "resnet18", "--macs", "nan", "--curves", "x"],
        ["plan", "--diff", "a.json", "b.json", "--out", "x"],
        ["compress", "resnet18", "--data", "x", "--out", "y", "--curves", "x"],
        ["compress", "resnet18", "--data", "x", "--out", "y", "--latency", "x"],
        ["compress", "resnet18", "--data", "x", "--out", "y", "--macs", "0.5", "--latency", "x"],
        ["compress", "resnet18", "--data", "x", "--out", "y", "--latency-batch", "2"],
        ["compress", "resnet18", "--data", "x", "--out", "y", "--plan", "x", "--multiple-of", "2"],
    ],
)
def test_arguments_that_cannot_be_used_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: torchcap")
