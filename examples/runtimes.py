"""Ways to run a trained network outside of the program that made it, each checked by its caller.

A way takes a network in eval mode, images to calibrate on and the start of a file name, writes its
file and returns a `Runtime`. It raises `UnavailableError` or ``ModuleNotFoundError`` where the
machine lacks what it needs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.export import ExportedProgram

if TYPE_CHECKING:
    from onnxruntime.quantization import CalibrationDataReader

CALIBRATION_BATCH = 64
ONNX_INPUT = "images"

NEW_PROCESS = """
import sys, torch
program, images, result, *unwanted = sys.argv[1:]
run = torch.export.load(program).module()
with torch.no_grad():
    torch.save(run(torch.load(images)), result)
if found := set(unwanted) & set(sys.modules):
    raise SystemExit(f"the exported program has imported {found}")
"""


class UnavailableError(RuntimeError):
    """The machine cannot run a network in this way; the message says what it lacks."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """A network in the form in which it runs somewhere.

    Attributes:
        run: takes images `(n, channels, h, w)` and returns the logits `(n, classes)`.
        file: what is shipped; None where the network stays in this process.
        timed: whether the time of ``run`` is that of the network alone.
    """

    run: Callable[[Tensor], Tensor]
    file: Path | None = None
    timed: bool = True


Way = Callable[[nn.Module, Tensor, Path], Runtime]


def eager(model: nn.Module, images: Tensor, stem: Path) -> Runtime:  # noqa: ARG001 - as all ways
    """Run the module as it is; the file holds its weights."""
    file = stem.with_suffix(".safetensors")
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, file)
    return Runtime(model, file)


def exported(model: nn.Module, images: Tensor, stem: Path) -> Runtime:
    """Save a ``.pt2`` file; a new process runs it that imports neither torchcap nor the class."""
    file = stem.with_suffix(".pt2")
    torch.export.save(_program(model, images), file)
    unwanted = {"torchcap", type(model).__module__.partition(".")[0]} - {"torch"}
    return Runtime(partial(run_in_new_process, file, unwanted=unwanted), file, timed=False)


def compiled(model: nn.Module, images: Tensor, stem: Path) -> Runtime:  # noqa: ARG001 - as all ways
    """Compile by inductor into C++, for one image at a time."""
    return Runtime(_compiled(model, images))


def onnx(model: nn.Module, images: Tensor, stem: Path) -> Runtime:
    """Save an ``.onnx`` file and run it in onnxruntime."""
    file = stem.with_suffix(".onnx")
    _save_onnx(model, images, file)
    return Runtime(_onnx_session(file), file)


def int8_onnx(model: nn.Module, images: Tensor, stem: Path) -> Runtime:
    """Quantise the ONNX graph statically: int8 weights per channel, uint8 activations."""
    from onnxruntime.quantization import QuantType, quantize_static  # noqa: PLC0415
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    file = stem.with_suffix(".int8.onnx")
    with TemporaryDirectory() as folder:
        plain, folded = (Path(folder, name) for name in ("plain.onnx", "folded.onnx"))
        _save_onnx(model, images, plain)
        quant_pre_process(plain, folded, skip_symbolic_shape=True)
        quantize_static(
            folded,
            file,
            _calibration_reader(images),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return Runtime(_onnx_session(file), file)


def int8_compiled(model: nn.Module, images: Tensor, stem: Path) -> Runtime:
    """Quantise the exported graph by PT2E (torchao), save it, load it, and compile it."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # noqa: PLC0415
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (  # noqa: PLC0415
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    file = stem.with_suffix(".int8.pt2")
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    observed = prepare_pt2e(_program(model, images).module(), quantizer)
    with torch.no_grad():
        for batch in images.split(CALIBRATION_BATCH):
            observed(batch)
    quantized = convert_pt2e(observed)
    _drop_unused_weights_(quantized)
    torch.export.save(_program(quantized, images), file)
    return Runtime(_compiled(torch.export.load(file).module(), images), file)


FLOAT_WAYS: dict[str, Way] = {
    "PyTorch": eager,
    "torch.export, new process": exported,
    "torch.compile": compiled,
    "onnxruntime": onnx,
}
INT8_WAYS: dict[str, Way] = {
    "int8, onnxruntime": int8_onnx,
    "int8, PT2E + torch.compile": int8_compiled,
}


def run_in_new_process(file: Path, images: Tensor, *, unwanted: Iterable[str] = ()) -> Tensor:
    """Return the outputs of an exported program in a process that must not import some modules.

    Raises:
        subprocess.CalledProcessError: if it does, or if the program fails.
    """
    with TemporaryDirectory() as folder:
        given, result = (str(Path(folder, name)) for name in ("images.pt", "logits.pt"))
        torch.save(images, given)
        # -P: what lies in the current folder cannot be imported either.
        command = [sys.executable, "-P", "-c", NEW_PROCESS, str(file), given, result, *unwanted]
        subprocess.run(command, check=True)
        return torch.load(result)


def _program(model: nn.Module, images: Tensor) -> ExportedProgram:
    # The file keeps the example and, of a view, all of the images that it is a view of.
    example = images[:2].clone()
    with torch.no_grad():
        return torch.export.export(
            model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )


def _compiled(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    if not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")):
        raise UnavailableError("no C++ compiler")
    module = torch.compile(model, fullgraph=True, dynamic=False)

    def run(batch: Tensor) -> Tensor:
        return torch.cat([module(image) for image in batch.split(1)])

    # Freezing makes the weights constants, which quantised kernels need and all others gain by.
    with torch.no_grad(), inductor.patch(freezing=True):
        run(images[:1])
    return run


def _save_onnx(model: nn.Module, images: Tensor, file: Path) -> None:
    torch.onnx.export(
        _program(model, images),
        f=file,
        input_names=[ONNX_INPUT],
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _onnx_session(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        (logits,) = session.run(None, {ONNX_INPUT: batch.numpy()})
        return torch.from_numpy(logits)

    return run


def _calibration_reader(images: Tensor) -> CalibrationDataReader:
    from onnxruntime.quantization import CalibrationDataReader  # noqa: PLC0415

    batches = iter(images.split(CALIBRATION_BATCH))

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, object] | None:
            batch = next(batches, None)
            return None if batch is None else {ONNX_INPUT: batch.numpy()}

    return Reader()


def _drop_unused_weights_(graph: torch.fx.GraphModule) -> None:
    """Delete the float weights that ``convert_pt2e`` leaves beside the quantised ones."""
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name in set(graph.state_dict()) - used:
        owner, _, attribute = name.rpartition(".")
        delattr(graph.get_submodule(owner), attribute)
