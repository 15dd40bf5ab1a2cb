"""The command line: ``torchcap COMMAND …``, or ``python -m torchcap.cli COMMAND …``.

A command is a function of its arguments that returns what is to be printed; only this file writes.
Under ``torchrun`` all processes take part, and the first one writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from torchcap import processes
from torchcap.cli.arguments import parse
from torchcap.cli.console import Bars
from torchcap.cli.files import check_outputs, leftovers
from torchcap.errors import PlanError, TorchcapError

if TYPE_CHECKING:
    from argparse import Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        the exit status: 0; 1 for an error, whose message is on stderr; 130 if it was interrupted.

    Raises:
        SystemExit: with status 2 for arguments that cannot be used, and 0 behind ``--help``.
    """
    options = parse(argv)
    try:
        _run(options)
    except KeyboardInterrupt:
        _complain(f"interrupted{_advice(options)}")
        return 130
    except BrokenPipeError:  # whoever read has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (TorchcapError, OSError, torch.OutOfMemoryError) as error:
        if options.debug:
            raise
        kept = leftovers(options.state) if options.command == "compress" else []
        advice = f"; {str(kept[0])!r} is kept, and --resume goes on from it" if kept else ""
        _complain(f"error: {_message(error)}{advice if isinstance(error, PlanError) else ''}")
        return 1
    return 0


def _run(options: Namespace) -> None:
    check_outputs(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with _processes(options), Bars(quiet=options.quiet) as bars:
        if options.alone and processes.rank() > 0:
            return
        result = options.run(options, bars)
    if _rank() == 0:
        text = json.dumps(result.data, indent=2) if options.json else result.text
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


@contextlib.contextmanager
def _processes(options: Namespace) -> Iterator[None]:
    """Join the processes that ``torchrun`` has started, if there are others."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if options.device.type == "cuda":
        options.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(options.device)
    dist.init_process_group("nccl" if options.device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _advice(options: Namespace) -> str:
    """Say how to go on behind an interruption."""
    if options.command == "compress" and (kept := leftovers(options.state)):
        return f"; the same command with --resume goes on from {str(kept[0])!r}"
    if options.command == "sensitivity" and options.out.exists():
        return f"; the same command goes on from {str(options.out)!r}"
    return ""


def _message(error: BaseException) -> str:
    """Return what an error says; of one that a worker of a DataLoader has met, what that said."""
    text = str(error).strip() or type(error).__name__
    if "Original Traceback" in text:
        return text.splitlines()[-1].partition(": ")[2]
    return text


def _complain(message: str) -> None:
    process = f" (process {_rank()})" if _rank() > 0 else ""
    sys.stderr.write(f"torchcap{process}: {message}\n")
