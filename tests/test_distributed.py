"""Two processes on the CPU compute what one process computes on the whole batch."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_nets import PreActivationBlock, Residual, built, images, labels
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torchcap
from torchcap import GreedySelection, RandomOrthonormal

WORLD = 2
LIMIT = timedelta(seconds=120)
# The first process gets fewer images than the second: norms are those of the whole batch.
PARTS = (slice(0, 3), slice(3, 8))
GAMMA = 0.3

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)


def student(**kwargs: Any) -> nn.Module:
    model = built(lambda: Residual(PreActivationBlock))
    init = kwargs.pop("init", RandomOrthonormal(torch.Generator().manual_seed(0)))
    return torchcap.prepare(model, example_inputs=images(), init=init, **kwargs).train()


def proxies(model: nn.Module) -> list[Tensor]:
    return torchcap.projection_parameters(model)  # type: ignore[return-value]


def work(rank: int, directory: str) -> None:
    """What each process does; it leaves its findings in a file."""
    torch.set_num_threads(1)
    rendezvous = f"file://{directory}/rendezvous"
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=LIMIT
    )
    try:
        torch.save(findings(images(8)[PARTS[rank]]), f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def findings(mine: Tensor) -> dict[str, Any]:
    ours = student()
    parallel = DistributedDataParallel(ours)
    parallel(mine)
    loss = torchcap.reconstruction_loss(parallel)
    loss.backward()
    found = {"loss": loss.detach(), "gradients": [p.grad.clone() for p in proxies(parallel)]}

    # A few steps of a user's loop, on equal parts, so that the mean of means is the mean.
    optimizer = torch.optim.SGD(proxies(parallel), 0.05)
    half = images(8)[dist.get_rank() :: WORLD]
    for _ in range(3):
        output = parallel(half)
        truth = labels(8)[dist.get_rank() :: WORLD]
        optimizer.zero_grad()
        torchcap.mixture_loss(parallel, output, truth, gamma=GAMMA).backward()
        optimizer.step()
    found["proxies"] = [p.detach().clone() for p in proxies(parallel)]
    small = torchcap.materialize(parallel)
    found["wrapped"] = isinstance(small, DistributedDataParallel)
    with torch.no_grad():
        found["output"] = small.eval()(images(8))
    found["start"] = [p.detach() for p in proxies(student(init=GreedySelection(), data=[mine]))]
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the processes found, in one run for all tests."""
    directory = tmp_path_factory.mktemp("distributed")
    context = mp.spawn(work, (str(directory),), nprocs=WORLD, join=False)
    assert context is not None
    deadline = time.monotonic() + LIMIT.total_seconds()
    try:
        # Returns when one of them has ended, and raises what it raised.
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, f"still running after {LIMIT}"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def test_mean_of_the_losses_is_the_loss_of_one_process(ranks: list[dict[str, Any]]) -> None:
    alone = student()
    alone(images(8))
    mean = torch.stack([found["loss"] for found in ranks]).mean()
    assert ranks[0]["loss"] != ranks[1]["loss"]
    torch.testing.assert_close(
        mean, torchcap.reconstruction_loss(alone).detach(), rtol=1e-10, atol=0
    )


def test_gradients_are_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    alone = student()
    alone(images(8))
    torchcap.reconstruction_loss(alone).backward()
    expected = [p.grad for p in proxies(alone)]
    assert len(expected) == 2
    for found in ranks:
        for ours, theirs in zip(found["gradients"], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_training_leads_where_one_process_leads(ranks: list[dict[str, Any]]) -> None:
    alone = student()
    optimizer = torch.optim.SGD(proxies(alone), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        output = alone(images(8))
        torchcap.mixture_loss(alone, output, labels(8), gamma=GAMMA).backward()
        optimizer.step()
    with torch.no_grad():
        expected = torchcap.materialize(alone).eval()(images(8))
    for found in ranks:
        for ours, theirs in zip(found["proxies"], proxies(alone), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-10)
        assert not found["wrapped"]
        torch.testing.assert_close(found["output"], expected, rtol=1e-8, atol=1e-9)


def test_start_from_data_is_that_of_all_processes_data(ranks: list[dict[str, Any]]) -> None:
    alone = student(init=GreedySelection(), data=[images(8)])
    for found in ranks:
        for ours, theirs in zip(found["start"], proxies(alone), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=0)
