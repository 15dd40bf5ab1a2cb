"""Two processes on the CPU compute what one process computes on the whole batch."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import small_nets
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_nets import PreActivationBlock, Residual, built, images, labels, values
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torchcap
from torchcap import (
    Adam,
    ClosedForm,
    FlipAndShift,
    GreedySelection,
    Progress,
    Projections,
    RandomOrthonormal,
    Recipe,
    Relaxation,
    TrainingError,
)

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
        found = findings(images(8)[PARTS[rank]])
        found |= compressed(rank, Path(directory) / "state")
        torch.save(found, f"{directory}/{rank}.pt")
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


# --------------------------------------------------------------------------------------------------
# What ``compress`` and its steps do in each process

STEPS = {"epochs": 1, "optimizer": Adam(1e-2), "healing": 1, "augment": (FlipAndShift(),)}
RECIPE = Recipe(
    projections=Projections(**STEPS | {"optimizer": Adam(1e-2, relative=False)}),
    solve=ClosedForm(),
    relaxation=Relaxation(**STEPS, batch_norm=False),
    fine_tuning=Relaxation(**STEPS, batch_norm=True, batch_statistics=True),
)
NETS = {name: small_nets.NETS[name] for name in ("residual", "plain", "dense")}


def half(net: str) -> tuple[nn.Module, nn.Module]:
    """A model, and half of it."""
    model = built(NETS[net])
    start = RandomOrthonormal(torch.Generator().manual_seed(0))
    return model, torchcap.materialize(torchcap.prepare(model, example_inputs=images(), init=start))


def solved(net: str, batches: list[Tensor]) -> nn.Module:
    model, small = half(net)
    torchcap.solve(small, model, batches, ridge=1e-4)
    return small


def uneven(rank: int) -> list[Tensor]:
    """Two batches for the first process, three for the second; the first of all is one image."""
    sizes = (1, 3) if rank == 0 else (5, 2, 4)
    return [images(size, seed=10 * rank + number) for number, size in enumerate(sizes)]


def compressed(rank: int, path: Path) -> dict[str, Any]:
    mine = images(8)[PARTS[rank]]
    found: dict[str, Any] = {
        "solved": {net: values(solved(net, [mine])) for net in NETS},
        "compressed": {
            net: values(torchcap.compress(built(NETS[net]), uneven(rank), recipe=RECIPE))
            for net in NETS
        },
        "resumed": resumed(rank, path),
    }
    model, small = half("residual")
    bad = [images(3), images(3) * (1e200 if rank == 1 else 1.0)]
    try:
        torchcap.relax(small, model, bad, epochs=1, batch_norm=False)
    except TrainingError as error:
        found["overflow"] = str(error)
    found["after overflow"] = values(small)
    return found


def resumed(rank: int, path: Path) -> dict[str, Tensor]:
    """Interrupt a run in its relaxation, in both processes, and go on."""

    def interrupt(progress: Progress) -> None:
        if (progress.name, progress.step) == ("relaxation", 2):
            raise KeyboardInterrupt

    how = {"recipe": RECIPE, "state": path, "save_every": 1}
    try:
        torchcap.compress(built(NETS["dense"]), uneven(rank), **how, on_progress=interrupt)
    except KeyboardInterrupt:
        return values(torchcap.compress(built(NETS["dense"]), uneven(rank), **how))
    raise AssertionError("the run was not interrupted")


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


@pytest.mark.parametrize("net", NETS)
def test_solution_is_that_of_one_process_on_all_data(ranks: list[dict[str, Any]], net: str) -> None:
    before = values(half(net)[1])
    expected = values(solved(net, [images(8)]))
    assert any(not torch.equal(value, before[name]) for name, value in expected.items())
    for found in ranks:
        for name, value in found["solved"][net].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("net", NETS)
def test_processes_with_uneven_data_compress_to_the_same_model(
    ranks: list[dict[str, Any]], net: str
) -> None:
    ours, theirs = (found["compressed"][net] for found in ranks)
    alone = values(torchcap.compress(built(NETS[net]), uneven(0), recipe=RECIPE))
    assert any(not torch.equal(value, alone[name]) for name, value in ours.items())
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)


def test_interrupted_processes_go_on_together(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for name, value in found["resumed"].items():
            torch.testing.assert_close(value, found["compressed"]["dense"][name], rtol=0, atol=0)


def test_processes_stop_together_where_one_of_them_diverges(ranks: list[dict[str, Any]]) -> None:
    assert "step 2 of 2 of the relaxation is not finite, in another process" in ranks[0]["overflow"]
    assert "step 2 of 2 of the relaxation is not finite, first at" in ranks[1]["overflow"]
    for name, value in ranks[0]["after overflow"].items():
        torch.testing.assert_close(value, ranks[1]["after overflow"][name], rtol=0, atol=0)
        assert value.isfinite().all()
