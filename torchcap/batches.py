"""Batches: what calibration data may look like, and how it runs through a model.

A batch is a tensor of images; a tuple that starts with one, labels second; or a mapping of
forward's arguments, with the labels under ``labels``, ``label``, ``targets`` or ``target``.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchcap import processes
from torchcap.errors import DataError, TorchcapError
from torchcap.nests import cloned

Batches = Iterable[Any]

LABELS = ("labels", "label", "targets", "target")
_MODULUS = 2**63 - 25  # a prime: seeds of different steps stay apart


@dataclass(frozen=True, slots=True)
class Batch:
    """The arguments of one forward, and the labels that came with them.

    Attributes:
        args, kwargs: what the model is called with.
        labels: class indices ``(N, …)``, if the data has any.
        number: of the batch in its pass, from 0, for messages.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: Tensor | None = None
    number: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]

    def named(self) -> dict[str, Tensor]:
        """Return the tensors and the labels, by name."""
        labels = {} if self.labels is None else {"labels": self.labels}
        return {str(number): tensor for number, tensor in enumerate(self.tensors)} | labels

    @property
    def inputs(self) -> tuple[Any, ...] | Mapping[str, Any]:
        """The arguments, as example inputs have them."""
        return self.args or self.kwargs

    def augmented(self, augment: Sequence[Callable[[Tensor], Tensor]]) -> Batch:
        """Return the batch with its images changed; they are the first tensor of four axes."""
        images = next((t for t in self.tensors if t.ndim == 4), None)
        if images is None:
            return self
        changed = images
        for change in augment:
            changed = change(changed)
        return Batch(
            tuple(changed if v is images else v for v in self.args),
            {name: changed if v is images else v for name, v in self.kwargs.items()},
            self.labels,
            self.number,
        )

    def to(self, device: torch.device | None) -> Batch:
        """Return the batch on a device."""
        return Batch(
            tuple(_moved(v, device) for v in self.args),
            {name: _moved(v, device) for name, v in self.kwargs.items()},
            _moved(self.labels, device),
            self.number,
        )

    def widened(self) -> Batch:
        """Return the batch with float32 in the place of float16."""
        return Batch(
            tuple(map(_widened, self.args)),
            {name: _widened(value) for name, value in self.kwargs.items()},
            self.labels,
            self.number,
        )

    def run(self, model: nn.Module) -> Any:
        """Return what a model makes of the batch.

        Raises:
            DataError: if the batch is not finite, or the model does not accept it.
        """
        with self.blamed(model):
            args, kwargs = cloned((self.args, dict(self.kwargs)))  # it may write into them
            return model(*args, **kwargs)

    @contextlib.contextmanager
    def blamed(self, model: nn.Module) -> Iterator[None]:
        """Check the batch, and turn what goes wrong while a model runs on it into a DataError."""
        for tensor in self.tensors:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise DataError(f"batch {self.number} of the data holds NaN or infinite values")
        try:
            yield
        except TorchcapError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in self.tensors)
            lines = str(error).strip().splitlines()
            raise DataError(
                f"batch {self.number} of the data, {shapes}, does not run through "
                f"{type(model).__name__!r}: {lines[0] if lines else type(error).__name__}; give "
                "batches that its forward accepts"
            ) from error


def as_batch(batch: Any, number: int = 0) -> Batch:
    """Sort a batch into the arguments of a forward, and the labels.

    Raises:
        DataError: if it is no tensor, no tuple that starts with one, and no mapping.
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Tensor):
        return Batch((batch,), {}, None, number)
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        second = batch[1] if len(batch) > 1 else None
        return Batch((batch[0],), {}, second if isinstance(second, Tensor) else None, number)
    if isinstance(batch, Mapping):
        named = {name: value for name, value in batch.items() if name not in LABELS}
        found = [batch[name] for name in LABELS if isinstance(batch.get(name), Tensor)]
        return Batch((), named, found[0] if found else None, number)
    raise DataError(
        "a batch must be a tensor of images, a tuple that starts with one, or a mapping of "
        f"forward's arguments; got {type(batch).__name__}"
    )


def check_iterable(data: Any) -> None:
    """Raise a :class:`DataError` if the data is no iterable of batches."""
    if isinstance(data, Tensor | str | bytes) or not isinstance(data, Iterable):
        raise DataError(
            f"data must be an iterable of batches, got {type(data).__name__}; wrap one batch into "
            "a list: data=[images]"
        )


class Source:
    """Data that is passed over many times, each time from a seed of its own.

    A pass draws its random numbers (the order of a ``DataLoader``, its transforms) from the seed
    and the pass's number, whatever happened before; the caller's random state is put back.

    Args:
        data: batches; an iterable that can be started again.
        seed: what all draws follow from.
        device: where batches are moved; None leaves them.
        limit: how many batches of a pass are looked at; None for all.
        widen: whether float16 images are given in float32.
        once: whether the data may be an iterator, which can be passed over only once.

    Raises:
        DataError: if the data can be passed over only once.
    """

    def __init__(
        self,
        data: Batches,
        *,
        seed: int = 0,
        device: torch.device | None = None,
        limit: int | None = None,
        widen: bool = False,
        once: bool = False,
    ) -> None:
        check_iterable(data)
        if isinstance(data, Iterator) and not once:
            raise DataError(
                f"the data is an iterator ({type(data).__name__}), which can be passed over only "
                "once; several passes are needed. Give a list of batches, a DataLoader, or an "
                "object whose __iter__ starts again"
            )
        self.data, self.seed, self.device, self.limit = data, seed, device, limit
        self.widen = widen
        self._length: int | None = None

    def __len__(self) -> int:
        """Number of batches of a pass; under ``torch.distributed`` the smallest of all processes.

        Data that does not know its length is passed over once to count.
        """
        if self._length is None:
            self._length = processes.smallest(self._counted())
        if self._length == 0:
            raise DataError("the data is empty: expected at least one batch of images")
        return self._length if self.limit is None else min(self._length, self.limit)

    def _counted(self) -> int:
        if isinstance(self.data, Sized):
            with contextlib.suppress(TypeError):  # a DataLoader of an iterable data set has none
                return len(self.data)
        with self._seeded(0):
            return sum(1 for _ in self.data)

    def first(self) -> Batch:
        """Return the first batch of the first pass.

        Raises:
            DataError: if the data is empty.
        """
        with self.passing(0) as batches:
            return next(batches)

    def limited(self, limit: int | None) -> Source:
        """Return the same data, of which a pass looks at the first batches alone."""
        return self._changed(limit=limit)

    def in_float32(self) -> Source:
        """Return the same data, with float32 in the place of float16."""
        return self._changed(widen=True)

    def _changed(self, **changes: Any) -> Source:
        settings: dict[str, Any] = {
            "seed": self.seed, "device": self.device, "limit": self.limit, "widen": self.widen
        }  # fmt: skip
        return Source(self.data, **(settings | changes))

    @contextlib.contextmanager
    def passing(self, number: int, *, skip: int = 0) -> Iterator[Iterator[Batch]]:
        """Open one pass.

        Args:
            number: of the pass; the same number gives the same batches.
            skip: how many batches to leave out at its beginning.
        """
        set_epoch = getattr(getattr(self.data, "sampler", None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(number)
        with self._seeded(number):
            yield self._batches(skip)

    def _batches(self, skip: int) -> Iterator[Batch]:
        count = 0
        for number, batch in enumerate(self.data):
            if self.limit is not None and number >= self.limit:
                return
            count += 1
            if number < skip:
                continue
            found = as_batch(batch, number)
            found = found.to(self.device)
            yield found.widened() if self.widen else found
        if count == 0:
            raise DataError(
                "the data is empty: expected at least one batch of images, and as many in every "
                "pass (an iterable that can be used up has to be made anew by its __iter__)"
            )

    @contextlib.contextmanager
    def _seeded(self, number: int) -> Iterator[None]:
        own = getattr(self.data, "generator", None)
        own = own if isinstance(own, torch.Generator) else None
        before = None if own is None else own.get_state()
        with seeded(self.seed, number):
            if own is not None:
                own.manual_seed(mixed_seed(self.seed, number))
            try:
                yield
            finally:
                if own is not None and before is not None:
                    own.set_state(before)


def as_source(data: Batches | Source, model: nn.Module, seed: int, *, once: bool = False) -> Source:
    """Return data as a source whose batches are on the device of a model.

    Args:
        data: batches.
        model: tells the device.
        seed: of all draws.
        once: whether a single pass is all that is wanted, so that an iterator will do.
    """
    if isinstance(data, Source):
        return data
    device = next((p.device for p in model.parameters()), None)
    return Source(data, seed=seed, device=device, once=once)


@contextlib.contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seed the global generators from some numbers for a while, then put their state back."""
    python = random.getstate()
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(mixed_seed(*parts))
        random.seed(mixed_seed(*parts))
        try:
            yield
        finally:
            random.setstate(python)


def mixed_seed(*parts: int) -> int:
    """Return one seed for a row of numbers."""
    seed = 0
    for part in parts:
        seed = (seed * 6364136223846793005 + part + 1442695040888963407) % _MODULUS
    return seed


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype == torch.float16
    return value.float() if half else value


def _moved(value: Any, device: torch.device | None) -> Any:
    """Return a value on a device (None: where it is), as a tensor that can be trained on."""
    if not isinstance(value, Tensor):
        return value
    if value.is_inference():
        value = value.clone()
    return value if device is None else value.to(device, non_blocking=True)
