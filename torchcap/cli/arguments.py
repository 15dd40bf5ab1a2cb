"""The arguments of the command line."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from importlib.metadata import version
from math import inf
from pathlib import Path

import torch

from torchcap.cli.commands import compare_command, export_command, inspect_command
from torchcap.cli.compressing import compress_command
from torchcap.cli.console import Bars, Result
from torchcap.cli.deciding import latency_command, plan_command, sensitivity_command

Run = Callable[[Namespace, Bars], Result]

_MODEL = (
    "a name of timm (resnet18, timm:resnet18, resnet18.a1_in1k) or of torchvision "
    "(torchvision:resnet18, tv:resnet18), or a file that torchcap has saved"
)
_DATA = (
    "images, in class folders or not; or folders train/ and val/ (or test/) of them. Without "
    "these two, a tenth is set aside to measure on"
)

_BUDGETS = ("macs", "params", "activations", "latency_ms")
_DEFAULTS = {"latency_batch": 1, "multiple_of": 1, "minimum": 0.05}  # None until they are checked


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Read the arguments.

    Raises:
        SystemExit: if they cannot be used.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if problem := _problem(options):
        parser.error(problem)
    for name, value in _DEFAULTS.items():
        if name in options and getattr(options, name) is None:
            setattr(options, name, value)
    if options.command == "compress" and options.state is None:
        options.state = Path(f"{options.out}.state")
    return options


def _problem(options: Namespace) -> str:
    """Say what is wrong with arguments that don't go together."""
    if options.weights is not None and options.random_weights:
        return "give --weights or --random-weights, not both"
    if options.command == "export" and options.onnx is None and options.pt2 is None:
        return "export writes --onnx FILE, --pt2 FILE, or both"
    if options.command == "plan":
        return _problem_of_plan(options) or _problem_of_budget(options)
    if options.command == "compress":
        return _problem_of_recipe(options) or _problem_of_budget(options)
    return ""


def _problem_of_recipe(options: Namespace) -> str:
    if options.epochs is not None and options.recipe == "seconds":
        return "--recipe seconds has no epochs; leave out --epochs, or take another --recipe"
    if options.labels is not None and options.recipe != "full":
        return "--labels is the weight of labels in the fine-tuning of --recipe full"
    if options.plan is not None and options.multiple_of is not None:
        return "--multiple-of is for making a plan; leave it out, or --plan"
    return ""


def _problem_of_plan(options: Namespace) -> str:
    if (options.model is None) == (options.diff is None):
        return "plan takes a MODEL, or --diff with two plans"
    making = ("ratio", *_BUDGETS, *_DEFAULTS, "curves", "latency", "data", "out", "plot")
    if options.diff is not None and (unused := _given(options, *making)):
        return f"--diff compares two plans that are there; leave out {unused}"
    if options.data is not None and (options.curves is not None or not _given(options, *_BUDGETS)):
        return "--data is for measuring curves for a budget; give one, and no --curves"
    return ""


def _problem_of_budget(options: Namespace) -> str:
    if not _given(options, *_BUDGETS) and (unused := _given(options, "curves", "minimum")):
        return f"{unused} is for a budget: --macs, --params, --activations or --latency-ms"
    # A plan shows the milliseconds that it leads to, whatever it was made by.
    timed = ("latency_batch",) if options.command == "plan" else ("latency_batch", "latency")
    if options.latency_ms is None and (unused := _given(options, *timed)):
        return f"{unused} is for a budget of milliseconds; give --latency-ms too"
    return ""


def _given(options: Namespace, *names: str) -> str:
    """Return the first of some arguments that was given; nothing if none was."""
    given = (name for name in names if getattr(options, name) is not None)
    return next((f"--{name.replace('_', '-')}" for name in given), "")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="torchcap",
        description="Make trained timm and torchvision networks smaller and dense.",
        epilog="torchcap COMMAND --help says more. Exit status: 0; 1 for an error; 2 for arguments "
        "that cannot be used; 130 if interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"torchcap {version('torchcap')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _inspect(_command(commands, "inspect", inspect_command, "show the channel spaces of a model"))
    _sensitivity(
        _command(
            commands,
            "sensitivity",
            sensitivity_command,
            "measure what each space loses when it alone is compressed",
            together=True,
        )
    )
    _latency(
        _command(commands, "latency", latency_command, "measure what a model's layers take here")
    )
    _plan(
        _command(
            commands, "plan", plan_command, "choose how many channels spaces keep", together=True
        )
    )
    _compress(_command(commands, "compress", compress_command, "compress a model", together=True))
    _compare(
        _command(commands, "compare", compare_command, "show what a small model costs and takes")
    )
    _export(_command(commands, "export", export_command, "write a saved model as ONNX or .pt2"))
    return parser


def _command(
    commands: argparse._SubParsersAction[ArgumentParser],
    name: str,
    run: Run,
    text: str,
    *,
    together: bool = False,
) -> ArgumentParser:
    """Add a command; under torchrun all processes work at it together, or the first one alone."""
    about = f"{text[0].upper()}{text[1:]}."
    parser = commands.add_parser(name, help=text, description=about, allow_abbrev=False)
    parser.set_defaults(run=run, alone=not together)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON document")
    group.add_argument("--quiet", action="store_true", help="draw no progress")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _inspect(parser: ArgumentParser) -> None:
    _add_model(parser)
    _add_reading(parser)


def _sensitivity(parser: ArgumentParser) -> None:
    _add_model(parser)
    _add_data(parser)
    _add_reading(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="JSON; goes on from it if there")
    add("--shares", type=_share, nargs="+", metavar="S", help="of the channels, kept in turn")
    add("--plot", type=Path, metavar="FILE", help="draw the curves, in the format of its ending")


def _latency(parser: ArgumentParser) -> None:
    _add_model(parser)
    _add_reading(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="the table, JSON")
    add("--batch", type=_count, default=1, metavar="N", help="images a forward (1)")


def _plan(parser: ArgumentParser) -> None:
    _add_model(parser, optional=True)
    _add_budget(parser)
    _add_data(parser, required=False)
    _add_reading(parser)
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE", help="the plan, JSON")
    add("--plot", type=Path, metavar="FILE", help="draw the plan, in the format of its ending")
    add("--diff", type=Path, nargs=2, metavar="PLAN", help="print how two plans differ")


def _compress(parser: ArgumentParser) -> None:
    _add_model(parser)
    _add_budget(parser).add_argument("--plan", type=Path, metavar="FILE", help="a saved plan")
    _add_data(parser)
    _add_reading(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="the small model, safetensors")
    recipes = ("seconds", "minutes", "full")
    add("--recipe", choices=recipes, default="minutes", help="what is done (minutes)")
    add("--epochs", type=_count, metavar="N", help="of relaxation, and of fine-tuning")
    add("--labels", type=float, metavar="WEIGHT", help="of the labels, with --recipe full")
    add("--state", type=Path, metavar="FILE", help="keeps the run (OUT.state)")
    add("--resume", action="store_true", help="go on from the state, if there is one")
    add("--amp", action="store_true", help="run networks in bfloat16 where autocast does")


def _compare(parser: ArgumentParser) -> None:
    _add_model(parser)
    add = parser.add_argument
    add("small", type=Path, metavar="SMALL", help="a file that torchcap has saved")
    add("--batch", type=_count, nargs="*", default=[1, 16], metavar="N", help="sizes timed (1 16)")
    add("--markdown", action="store_true", help="print tables in Markdown")


def _export(parser: ArgumentParser) -> None:
    _add_model(parser)
    add = parser.add_argument
    add("--onnx", type=Path, metavar="FILE", help="write an ONNX file")
    add("--pt2", type=Path, metavar="FILE", help="write a file of torch.export")


def _add_model(parser: ArgumentParser, *, optional: bool = False) -> None:
    if optional:
        parser.add_argument("model", nargs="?", metavar="MODEL", help=_MODEL)
    else:
        parser.add_argument("model", metavar="MODEL", help=_MODEL)
    group = parser.add_argument_group("the model")
    add = group.add_argument
    add("--weights", type=Path, metavar="FILE", help="safetensors or a state dict; not pretrained")
    add("--random-weights", action="store_true", help="no trained weights, to try out")
    add("--num-classes", type=_count, metavar="N", help="of --weights, or --random-weights")
    add("--image-size", type=_count, metavar="N", help="height and width, if not the usual")
    add("--device", type=_device, default=_usual_device(), help="cuda if there is one, or cpu")
    add("--threads", type=_count, metavar="N", help="of the CPU, for one operator")
    add("--seed", type=int, default=0, metavar="N", help="of everything drawn (0)")


def _add_data(parser: ArgumentParser, *, required: bool = True) -> None:
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--data", type=Path, required=required, metavar="DIR", help=_DATA)
    add("--images", type=_count, metavar="N", help="how many to use (all; for curves 1,024)")
    add("--batch", type=_count, default=64, metavar="N", help="images a forward (64)")
    add("--workers", type=_natural, default=0, metavar="N", help="processes that read images (0)")


def _add_reading(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("what is a channel space")
    add = group.add_argument
    add("--streams", action="store_true", help="residual streams are spaces too")
    add("--split-attention", action="store_true", help="take nn.MultiheadAttention apart")


def _add_budget(parser: ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    group = parser.add_argument_group("what is kept")
    group.add_argument("--curves", type=Path, metavar="FILE", help="of `torchcap sensitivity`")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--ratio", type=_share, metavar="R", help="share of channels, in all (0.5)")
    budgets = {
        "macs": "multiply-adds",
        "params": "parameters",
        "activations": "values that layers write",
    }
    for name, what in budgets.items():
        one.add_argument(
            f"--{name}", type=_positive, metavar="B", help=f"{what}: a share, or a number"
        )
    one.add_argument("--latency-ms", type=_positive, metavar="MS", help="milliseconds of a forward")
    add = group.add_argument
    add("--latency", type=Path, metavar="FILE", help="a table of `torchcap latency`")
    add("--latency-batch", type=_count, metavar="N", help="images of that forward (1)")
    add("--multiple-of", type=_count, metavar="N", help="what is kept is so (1)")
    add("--minimum", type=_share, metavar="S", help="least share that a space keeps (0.05)")
    return one


def _count(text: str) -> int:
    number = _natural(text)
    if number < 1:
        raise ArgumentTypeError(f"a number of at least 1 was expected; got {text!r}")
    return number


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"a whole number was expected; got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < inf:
        raise ArgumentTypeError(f"a number above 0 was expected; got {text!r}")
    return number


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ArgumentTypeError(f"a share of what is kept, 0 < share <= 1; got {text!r}")
    return share


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ArgumentTypeError(f"cuda or cpu was expected; got {text!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentTypeError("there is no CUDA device here; give --device cpu")
    return device


def _usual_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
