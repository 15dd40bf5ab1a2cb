"""The commands that look at one model or two, or take one elsewhere: inspect, compare, export."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from torchcap.checkpoint.builders import images_of
from torchcap.checkpoint.load import describe, load
from torchcap.cli.console import Bars, Result
from torchcap.cli.models import Network, open_network
from torchcap.errors import FileError, MissingPackageError, ModelError
from torchcap.graph.analyze import analyze
from torchcap.report import compare

if TYPE_CHECKING:
    from argparse import Namespace

    from torch.export import ExportedProgram

LARGEST_DIFFERENCE: Final = 1e-4
"""Of the outputs of an exported model, as a share of the largest output of PyTorch."""


def inspect_command(options: Namespace, bars: Bars) -> Result:  # noqa: ARG001 - as all commands
    """Show the channel spaces of a model."""
    network = open_network(options, trained=False)
    graph = analyze(network.model, network.example, streams=options.streams)
    spaces = [asdict(space) | {"share_of_macs": graph.share(space)} for space in graph.spaces]
    data = {
        "model": graph.model,
        "macs": graph.macs,
        "reachable": graph.reachable,
        "spaces": spaces,
        "notes": list(graph.notes),
    }
    return Result(str(graph), data)


def compare_command(options: Namespace, bars: Bars) -> Result:  # noqa: ARG001 - as all commands
    """Show what a small model costs beside the original."""
    network = open_network(options, trained=False)
    _check_original(options, network)
    small = load(options.small).to(options.device)
    report = compare(network.model, small, network.example, batch_sizes=options.batch)
    text = report.to_markdown() if options.markdown else str(report)
    return Result(text, report.to_dict())


def _check_original(options: Namespace, network: Network) -> None:
    """Refuse a small model that was made from another one than the original given."""
    builder = describe(options.small).builder
    name = network.builder.partition(".")[0]  # what follows names weights
    known = {name, f"timm:{images_of(network.model).get('architecture')}"}  # of an old name, too
    if builder is not None and name and builder.name not in known:
        raise ModelError(
            f"{str(options.small)!r} was made from {builder.name!r}, and {options.model!r} is "
            f"{name!r}; compare it with the model that it was made from"
        )


def export_command(options: Namespace, bars: Bars) -> Result:  # noqa: ARG001 - as all commands
    """Write a model for another runtime, and check what that makes of it."""
    network = open_network(options)
    program = _program(network)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *network.example.shape[1:], generator=generator).to(network.example)
    with torch.no_grad():
        expected = network.model(images)
    lines, data = [], {}
    for path, way in ((options.pt2, _pt2), (options.onnx, _onnx)):
        if path is None:
            continue
        found = way(program, images, path)
        difference = None if found is None else _check(path, found, expected)
        checked = (
            "not checked: pip install onnxruntime"
            if difference is None
            else f"verified: its outputs differ by {difference:.1g} of the largest"
        )
        lines.append(f"{path}: {path.stat().st_size:,} bytes; {checked}")
        data[str(path)] = {"bytes": path.stat().st_size, "largest_difference": difference}
    return Result("\n".join(lines), data)


def _program(network: Network) -> ExportedProgram:
    """Export a model for any number of images."""
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        with torch.no_grad():
            return torch.export.export(network.model, (network.batch(2),), dynamic_shapes=shapes)
    except Exception as error:  # torch.export has no base for what it cannot do
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{type(network.model).__name__!r} cannot be exported ({type(error).__name__}: "
            f"{reason}); see --debug"
        ) from error


def _pt2(program: ExportedProgram, images: Tensor, path: Path) -> Tensor:
    torch.export.save(program, path)
    with torch.no_grad():
        return torch.export.load(path).module()(images)


def _onnx(program: ExportedProgram, images: Tensor, path: Path) -> Tensor | None:
    if find_spec("onnxscript") is None:
        raise MissingPackageError("ONNX files are written by onnxscript; pip install onnxscript")
    torch.onnx.export(
        program, f=path, input_names=["images"], dynamo=True, external_data=False, verbose=False
    )
    if find_spec("onnxruntime") is None:
        return None
    # It need not be installed.
    session: Any = import_module("onnxruntime").InferenceSession(
        path, providers=["CPUExecutionProvider"]
    )
    (found, *_) = session.run(None, {"images": images.cpu().numpy()})
    return torch.from_numpy(found).to(images.device)


def _check(path: Path, found: Tensor, expected: Tensor) -> float:
    largest = max(float(expected.abs().max()), 1e-12)
    difference = float((found - expected).abs().max()) / largest
    if not difference <= LARGEST_DIFFERENCE:
        raise FileError(
            f"{str(path)!r} was written, but puts out something else than PyTorch: the outputs "
            f"differ by {difference:.1g} of the largest one; do not use it"
        )
    return difference
