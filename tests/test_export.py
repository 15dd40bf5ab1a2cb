"""The small model leaves torchcap behind: compiled, exported, and run by another runtime."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_nets import Dense, Plain, Residual, Separable, SharedActivationBlock, built, images
from torch import Tensor, nn

import torchcap
from torchcap import RandomOrthonormal

NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Residual(SharedActivationBlock),
    "plain": Plain,
    "dense": Dense,
    "separable": Separable,
}
EVERY_NET = pytest.mark.parametrize("net", NETS)
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
X = images(dtype=torch.float32)


def small_model(net: str) -> tuple[nn.Module, Tensor]:
    """A small model in float32, from a student that has run in training mode, and its output."""
    model = built(NETS[net]).float()
    init = RandomOrthonormal(torch.Generator().manual_seed(0))
    student = torchcap.prepare(model, example_inputs=X, init=init).train()
    student(X)
    small = torchcap.materialize(student).eval()
    with torch.no_grad():
        return small, small(X)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@EVERY_NET
@torch.no_grad()
def test_compiled_whole_model_computes_the_same(net: str) -> None:
    small, expected = small_model(net)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not COMPILER, reason="inductor needs a C++ compiler on the CPU")
@torch.no_grad()
def test_inductor_compiles_the_whole_model() -> None:
    small, expected = small_model("separable")
    compiled = torch.compile(small, fullgraph=True)
    torch.testing.assert_close(compiled(X), expected, rtol=1e-5, atol=1e-5)


@EVERY_NET
def test_exported_program_computes_the_same_for_any_batch(net: str) -> None:
    small, expected = small_model(net)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(small, (X,), dynamic_shapes=({0: batch},))
    run = exported.module()
    torch.testing.assert_close(run(X), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(X[:3]), expected[:3], rtol=1e-5, atol=1e-5)


@EVERY_NET
def test_onnx_model_computes_the_same(net: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    small, expected = small_model(net)
    path = tmp_path / "small.onnx"
    torch.onnx.export(small, (X,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]
    (result,) = session.run(None, {name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-4, atol=1e-5)
