"""The cost of a training step of a prepared ResNet-50, against its parts done by hand.

    python examples/benchmarks/step.py --batch 32 --size 224 --threads 2

The prepared network runs the teacher beside the student, compares their features and trains the
projections. The yardstick is a forward of the teacher without gradients and then a step of the
plain small network, all of whose parameters train. Both run in turns in this one process.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50
from tqdm import tqdm

import torchcap
from measure import count_parameters, interleaved, keep_freed_memory
from table import format_table

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    options = parse_options()
    kept = not options.page_faults and keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.randint(1000, (options.batch,))
    teacher = resnet50().eval()
    start = time.perf_counter()
    student = torchcap.prepare(teacher, ratio=options.ratio, example_inputs=images[:1])
    small = torchcap.materialize(student)
    print(f"prepare and materialize: {time.perf_counter() - start:.2f} s")

    calls = {
        "teacher forward": teacher_forward(teacher, images),
        "plain small step": plain_step(small.train(), images, labels),
        "prepared step": prepared_step(student.train(), images, labels),
    }
    timings = interleaved(
        calls, repeats=options.repeats, warmup=1, progress=partial(tqdm, desc="rounds")
    )
    by_hand = timings["teacher forward"].median + timings["plain small step"].median
    rows = [(name, timing) for name, timing in timings.items()]
    rows.append(("teacher forward + plain small step", f"{by_hand:.2f} ms"))
    trained = sum(parameter.numel() for parameter in torchcap.projection_parameters(student))
    print(
        f"ResNet-50, ratio {options.ratio}, batch {options.batch} of {options.size} px, "
        f"{options.threads} threads, torch {torch.__version__}; parameters: "
        f"teacher {count_parameters(teacher):,}, small {count_parameters(small):,}, "
        f"projections {trained:,}; freed memory is {'kept' if kept else 'returned'}"
    )
    print(format_table(("median of interleaved repeats (quartiles)", "time"), rows))
    print(f"prepared step / by hand: {timings['prepared step'].median / by_hand:.3f}")


def teacher_forward(teacher: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        return teacher(images)

    return call


def plain_step(small: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    for parameter in small.parameters():
        parameter.requires_grad_()
    optimizer = torch.optim.SGD(small.parameters(), 1e-6, momentum=0.9)

    def call() -> None:
        loss = F.cross_entropy(small(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


def prepared_step(student: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(torchcap.projection_parameters(student), 1e-6, momentum=0.9)

    def call() -> None:
        logits = student(images)
        loss = torchcap.reconstruction_loss(student) + F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of channels kept")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--page-faults", action="store_true", help="leave the system's allocator as it is"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
