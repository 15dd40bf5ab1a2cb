"""The example that takes small networks where they run: every way of it, and what it reports."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from subprocess import CalledProcessError

import pytest
import torch
from torch import Tensor, nn

import torchcap

pytest.importorskip("safetensors")  # of the extra that the examples need
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
sys.path.append(str(Path(__file__).parents[1] / "examples"))
import export
import runtimes

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    """Two convolutions and a linear layer, of enough weights that they outweigh a file's header."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 256, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(256)
        self.conv2 = nn.Conv2d(256, 64, 3, padding=1)
        self.linear = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.bn1(self.conv1(x)).relu()).relu()
        return self.linear(x.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return torchcap.materialize(torchcap.prepare(Tiny().eval(), example_inputs=IMAGES[:1])).eval()


@torch.no_grad()
def logits(way: runtimes.Way, model: nn.Module, stem: Path) -> tuple[Tensor, Path | None]:
    try:
        runtime = way(model, IMAGES, stem)
    except (ModuleNotFoundError, runtimes.UnavailableError) as error:
        pytest.skip(str(error))
    return runtime.run(IMAGES[:5]), runtime.file


@pytest.mark.parametrize("name", runtimes.FLOAT_WAYS)
def test_float_way_computes_what_pytorch_does(name: str, small: nn.Module, tmp_path: Path):
    values, _ = logits(runtimes.FLOAT_WAYS[name], small, tmp_path / "small")
    torch.testing.assert_close(values, small(IMAGES[:5]).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")  # inductor, of zero points
@pytest.mark.parametrize("name", runtimes.INT8_WAYS)
def test_int8_way_is_near_and_its_file_smaller(name: str, small: nn.Module, tmp_path: Path):
    values, file = logits(runtimes.INT8_WAYS[name], small, tmp_path / "small")
    expected = small(IMAGES[:5]).detach()
    assert 0 < (values - expected).abs().max() < 0.05 * expected.abs().max()
    weights = sum(4 * p.numel() for p in small.parameters())
    assert file.stat().st_size < 0.75 * weights


def test_new_process_stops_where_an_unwanted_module_is_imported(small: nn.Module, tmp_path: Path):
    file = runtimes.exported(small, IMAGES, tmp_path / "small").file
    with pytest.raises(CalledProcessError):
        runtimes.run_in_new_process(file, IMAGES, unwanted=["zipfile"])


def test_what_the_machine_lacks_is_named_and_the_other_ways_are_made(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delitem(export.FLOAT_WAYS, "onnxruntime")
    found, lacking = export.in_every_way(small, IMAGES, tmp_path / "small")
    assert list(found) == ["PyTorch", "torch.export, new process"]
    assert "C++" in lacking["torch.compile"]
    assert "torchao" in lacking["int8, PT2E + torch.compile"]
    assert "onnxruntime" in lacking["int8, onnxruntime"]


def task_and_runtimes(small: nn.Module, error: float = 0.0):
    """Both networks in PyTorch, and the small one in a way that is off by ``error``."""
    torch.manual_seed(0)
    model = Tiny().eval()
    made = {
        ("original", "PyTorch"): runtimes.Runtime(model),
        ("small", "PyTorch"): runtimes.Runtime(small),
        ("small", "onnxruntime"): runtimes.Runtime(lambda x: small(x) + error, timed=False),
    }
    return export.Task(model, IMAGES, IMAGES, model(IMAGES).argmax(1)), made


def test_results_compare_every_way_with_the_original_and_with_pytorch(small: nn.Module):
    task, made = task_and_runtimes(small, error=0.5)
    results = export.evaluate(made, task)
    with torch.no_grad():
        values = small(IMAGES)
    share = (values.argmax(1) == task.test_labels).double().mean().item()
    assert results["original", "PyTorch"] == export.Result(1.0, 1.0, 0.0)
    assert results["small", "PyTorch"] == export.Result(share, share, 0.0)
    off = results["small", "onnxruntime"].difference
    assert off == pytest.approx(0.5 / values.abs().max().item(), rel=1e-5)


def test_table_has_a_row_for_every_network_and_way(small: nn.Module):
    task, made = task_and_runtimes(small)
    lines = export.table(made, export.evaluate(made, task), IMAGES[:1], repeats=2).splitlines()
    assert len(lines) == 2 + len(made)
    assert "ms" in lines[3]
    assert lines[4].endswith("-")


@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_float_way_that_differs_stops_the_program(small: nn.Module, error: float):
    task, made = task_and_runtimes(small, error)
    with pytest.raises(SystemExit, match=r"small, onnxruntime"):
        export.check(export.evaluate(made, task))
