"""What the coverage sweep does with one model: build it, read it, compress it, and prove it.

All that is found goes into a plain dictionary, which is handed on after every step, so that what
is known of a model survives the end of its process.

Weights and norm statistics are random, for nothing here depends on what a model has learnt. The
proofs compare outputs in float64, in evaluation mode.
"""

from __future__ import annotations

import copy
import inspect
import io
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from math import inf, isfinite, prod
from typing import TYPE_CHECKING, Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

import torchcap
import zoos
from torchcap.nests import tensors_in
from torchcap.transform.fold import fold_

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torchcap.graph.spaces import ChannelSpace, Port, SpaceGraph
    from torchcap.projection.initialize import Initializer, SpaceContext

RATIO = 0.5
FAINT = 0.4  # of what it is to put out, a layer with small weights puts out less
WIDEST = 64  # channels of a block that proofs keep at most
TOLERANCE = 1e-8  # relative, of outputs in float64
NUDGE = 1e-13  # relative change of the inputs that shows how a model's own rounding grows
LOOSEST = 1e-4  # beyond this a comparison tells nothing
BATCHES = 4  # of data for closed forms
STARTS = 3  # random ones, and their mirrors, until every projection has had a gradient
VANISHED = 1e-20  # of the largest gradient
SOLVED = 1e-5  # relative, where a ridge regression is to find what there was
SECTION = {"segmentation": 224, "detection": 320, "optical_flow": 128}  # height and width
# What a detector is made of. Which boxes it puts out hangs on ties, which rounding breaks.
DETECTORS = {
    "backbone": ("backbone", "head"),
    "rpn.head": ("rpn.head",),
    **{
        f"roi_heads.{what}_head": (f"roi_heads.{what}_head", f"roi_heads.{what}_predictor")
        for what in ("box", "mask", "keypoint")
    },
}
COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

Record = dict[str, Any]
Inputs = tuple[Any, ...] | dict[str, Any]
Sections = dict[str, Inputs]


class Skip(Exception):  # noqa: N818 - not an error
    """A proof that a model does not allow, with the reason."""


class ProofError(Exception):
    """A proof that does not hold."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What to do: which proofs, none of them (``analyze_only``), and whether to let a peer try."""

    analyze_only: bool = False
    proofs: tuple[str, ...] = ()
    peer: bool = False


def examine(name: str, wishes: Wishes, keep: Callable[[Record], None]) -> None:
    """Find out all there is to say about one model.

    Args:
        name: ``timm:NAME``, ``tv:NAME`` or one of another zoo, such as ``smp:NAME``.
        wishes: what to do.
        keep: gets the record after every step; its ``status`` is empty until it is known.
    """
    record: Record = {"status": "", "message": "", "stage": "build", "proofs": {}}
    began = time.process_time()  # imports are no part of the work
    keep(record)
    try:
        record["message"] = _examine(name, wishes, record, keep)
        broken = any(proof["outcome"] == "failed" for proof in record["proofs"].values())
        passed = "read" if wishes.analyze_only else "proven"
        record["status"] = "failed" if broken else passed
    except torchcap.TorchcapError as error:
        record["status"] = "declined"
        record["message"] = f"{type(error).__name__}: {error}"[:2000]
    except Exception:  # the sweep goes on, whatever a model raises
        record["status"] = "failed"
        record["message"] = last_lines(traceback.format_exc())
    record["seconds"] = time.process_time() - began
    keep(record)
    if wishes.peer and not wishes.analyze_only:
        record["stage"] = "peer"
        keep(record)
        record["peer"] = try_peer(name)
        keep(record)


def _examine(name: str, wishes: Wishes, record: Record, keep: Callable[[Record], None]) -> str:
    """Fill in the record, and return a message if a proof failed."""
    if wishes.analyze_only:
        model, inputs = build_for_reading(name)
    else:
        model, inputs = build_for_proofs(name, record)
    record["stage"] = "analyze"
    keep(record)
    began = time.process_time()
    try:
        graph = torchcap.analyze(model, inputs)
    except torchcap.ExampleInputsError:
        if not inputs_are_meta(inputs):
            raise
        model = build(name)  # its forward looks at values
        inputs = example_inputs(name, model)
        began = time.process_time()
        graph = torchcap.analyze(model, inputs)
    record["analyze_seconds"] = time.process_time() - began
    record.update(facts(model, graph))
    keep(record)
    plan = torchcap.Plan.uniform(graph, RATIO)  # raises with the reasons where nothing is free
    record["macs_left"] = torchcap.cost(graph, plan).macs / max(1, torchcap.cost(graph).macs)
    if wishes.analyze_only:
        return ""
    subject = Subject(model, inputs, graph, narrowed(graph, plan))
    record["tolerance"] = subject.tolerance
    for title in wishes.proofs:
        record["stage"] = title
        keep(record)
        record["proofs"][title] = outcome(PROOFS[title], subject)
    failed = {t: p["detail"] for t, p in record["proofs"].items() if p["outcome"] == "failed"}
    return "\n".join(f"{title}: {detail}" for title, detail in failed.items())


def narrowed(graph: SpaceGraph, plan: torchcap.Plan) -> torchcap.Plan:
    """Cut wide spaces further: what holds for few channels holds for many, and takes less time."""
    ranks = {n: min(rank, WIDEST * graph[n].blocks) for n, rank in plan.ranks.items()}
    return torchcap.Plan.of(graph, ranks)


def last_lines(text: str, count: int = 6) -> str:
    """Return the end of a traceback."""
    return "\n".join(text.strip().splitlines()[-count:])[-2000:]


# --- building


def build(name: str) -> nn.Module:
    """Build a model without trained weights, and without anything that draws in training mode."""
    source, _, short = name.partition(":")
    with warnings.catch_warnings(action="ignore"):  # of deprecated names and slow initialisers
        if source in zoos.ZOOS:
            model = zoos.build(name)
        else:
            model = timm.create_model(short) if source == "timm" else _from_torchvision(short)
    for module in model.modules():
        if isinstance(module, _DropoutNd | torchvision.ops.StochasticDepth):
            module.p = 0.0
        elif isinstance(getattr(module, "drop_prob", None), float):  # a DropPath, of any library
            module.drop_prob = 0.0
    return model.eval()


def _from_torchvision(name: str) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if name in {"googlenet", "inception_v3"}:
        options["init_weights"] = False
    return torchvision.models.get_model(name, **options)


def example_inputs(name: str, model: nn.Module) -> Inputs:
    """Return random inputs of the size that a model was made for, those of timm of batch size one.

    They are the arguments of its forward, by position or by name.
    """
    source, _, short = name.partition(":")
    if source in zoos.ZOOS:
        return zoos.example_inputs(name)
    if source == "timm":
        config: Any = model.pretrained_cfg
        return (torch.randn(1, *config["input_size"]),)
    home = torchvision.models.get_model_builder(short).__module__.split(".")
    section = home[2]
    size = SECTION.get(section, 299 if section == "inception" else 224)
    size = getattr(model, "image_size", size) if section == "vision_transformer" else size
    if section == "detection":
        return ([torch.randn(3, size, size)],)
    if section == "optical_flow":
        return torch.randn(1, 3, size, size), torch.randn(1, 3, size, size)
    if section == "video":
        size = 112 if home[3] == "resnet" else 224
        return (torch.randn(1, 3, 16, size, size),)
    return (torch.randn(1, 3, size, size),)


def build_for_reading(name: str) -> tuple[nn.Module, Any]:
    """Build a model on the meta device, or where it cannot be built there, on the CPU.

    The models of the zoos are small enough for the CPU.
    """
    if name.partition(":")[0] in zoos.ZOOS:
        model = build(name)
        return model, example_inputs(name, model)
    try:
        with torch.device("meta"):
            model = build(name)
            return model, example_inputs(name, model)
    except Exception:  # a constructor that looks at values
        model = build(name)
        return model, example_inputs(name, model)


def inputs_are_meta(inputs: Any) -> bool:
    return any(tensor.is_meta for tensor in tensors_of(inputs))


def build_for_proofs(name: str, record: Record) -> tuple[nn.Module, Any]:
    """Build a model with weights that hide nothing, in float64 if it runs so.

    Some models compute with constants of single precision and cannot be made double; some without
    norms overflow, and get weights that differ less from those they are initialised with.
    """
    problem = ""
    for dtype in (torch.float64, torch.float32):
        for noise in (0.2, 0.02):
            torch.manual_seed(0)
            model = build(name).to(dtype)
            inputs = example_inputs(name, model)
            inputs = floats_mapped(lambda tensor: tensor.to(dtype), inputs)  # noqa: B023
            randomize_(model, torch.Generator().manual_seed(1), noise)
            try:
                found = tensors_of(look(model, inputs, sections_of(model, inputs)))
            except Exception as error:  # the model's own; the next attempt may do
                problem = f"{type(error).__name__}: {str(error)[:300]}"
                break  # of another noise it would not run either
            if (
                found
                and all(bool(t.isfinite().all()) for t in found)
                and any(map(torch.any, found))
            ):
                record["dtype"] = str(dtype).removeprefix("torch.")
                return model, inputs
            problem = "its output is not finite, or zero, or has no tensor"
    raise RuntimeError(f"the original model does not run: {problem}")


@torch.no_grad()
def randomize_(model: nn.Module, generator: torch.Generator, noise: float) -> None:
    """Give every parameter and statistic a value of its own, so that no symmetry hides a fault.

    Some libraries start from weights so small that nothing of the first layers is left in the
    output; these grow, until a layer puts out as much as it gets.
    """
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not tensor.is_floating_point() or not tensor.numel():
                continue
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name == "running_var":
                tensor.copy_(0.5 + drawn.abs())
            elif name in module._buffers and name != "running_mean":
                continue  # constants: windows, frequencies, filters
            elif tensor.numel() == max(tensor.shape, default=1):
                tensor.add_(noise * drawn.to(tensor.dtype))
            else:
                _spread_(tensor, drawn, noise)


def _spread_(weight: Tensor, drawn: Tensor, noise: float) -> None:
    """Change a weight that is constant, or so small that it lets little through."""
    inputs, aim = prod(weight.shape[1:]) ** 0.5, 5 * noise
    if bool((weight == weight.flatten()[0]).all()):  # initialised with zeros, say
        weight.add_((noise / inputs * drawn).to(weight.dtype))
    gain = float(weight.std()) * inputs
    if 0 < gain < FAINT * aim:
        weight.mul_(aim / gain)


# --- what a reading says


def facts(model: nn.Module, graph: SpaceGraph) -> Record:
    """Return what the spaces of a model amount to, with shares of its MACs."""
    classes = {type(module).__name__.lower() for module in model.modules()}
    attends = any("attention" in name or "attn" in name for name in classes)
    macs: Counter[str] = Counter()
    linear = 0
    for call in graph.calls:
        macs[call.module] += call.positions * prod(call.shape)
        linear += call.positions * prod(call.shape) if len(call.shape) == 2 else 0
    total = max(1, macs.total())
    return {
        "spaces": len(graph.spaces),
        "free": len(graph.free),
        "trained": sum(space.freedom in {"stiefel", "linear"} for space in graph.spaces),
        "macs": macs.total(),
        "reachable": graph.reachable,
        # Linear layers alone would not do: ConvNeXt and the mixers have as many.
        "kind": "transformer" if attends and 2 * linear > total else "cnn",
        "fixed": held_back(graph, macs)[:3],
        "lost": lost(graph)[:8],
        "notes": list(graph.notes[:5]),
    }


def held_back(graph: SpaceGraph, macs: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return the reasons of fixed spaces with the MACs of all layers that touch such a space."""
    layers: dict[str, set[str]] = {}
    inside = set()
    for space in graph.spaces:
        modules = {port.module for port in space.ports if port.parameter == "weight"}
        inside |= modules
        if not space.free:
            # Without names and numbers, the same reason in another layer is the same.
            reason = re.sub(r"\d+", "#", re.sub(r"'[^']*'", "…", space.reason))
            layers.setdefault(reason, set()).update(modules)
    outside = set(macs) - inside
    if outside:
        layers["in no channel space"] = outside
    found = [(reason, sum(macs[m] for m in modules)) for reason, modules in layers.items()]
    return sorted(found, key=lambda entry: -entry[1])


def lost(graph: SpaceGraph) -> list[Record]:
    """Return why layers are out of reach: fixed spaces by reason, those that cost most first.

    The same reason in several layers counts once. What is lost is the share of the MACs in layers
    that such a space touches, and no free one.
    """
    groups: dict[str, list[ChannelSpace]] = {}
    for space in graph.spaces:
        if not space.free:
            groups.setdefault(re.sub(r"[\w.]+\.\d+\b[\w.]*", "…", space.reason), []).append(space)
    found = [
        {
            "reason": spaces[0].reason,
            "first": spaces[0].name,
            "spaces": len(spaces),
            "share": graph.share(*spaces),
            "lost": graph.share(*spaces, *graph.free) - graph.reachable,
        }
        for spaces in groups.values()
    ]
    return sorted(found, key=lambda entry: (-entry["lost"], -entry["share"]))


# --- running models


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor of nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: mapped(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(function, item) for item in value)
    return value


def floats_mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to the floating-point tensors alone: not to indices and masks."""
    return mapped(lambda t: function(t) if t.is_floating_point() else t, value)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model, by position or by name. Inputs are copied: some forwards write on them.

    Others draw, from the same seed each time: the latent code of an autoencoder, say.
    """
    given = mapped(torch.clone, inputs)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return model(**given) if isinstance(given, Mapping) else model(*given)


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> Any:
    """Run a model without gradients."""
    return call(model, inputs)


def sections_of(model: nn.Module, inputs: Inputs) -> Sections:
    """Return the parts of a detector, with what the original gives to each; of others, none."""
    sections: Sections = {}
    handles = []
    if type(model).__module__.startswith("torchvision.models.detection"):
        for path, module in model.named_modules():
            if path in DETECTORS:
                keep = partial(_keep_arguments, sections, path)
                handles.append(module.register_forward_pre_hook(keep))
        run(model, inputs)
    for handle in handles:
        handle.remove()
    return sections


def _keep_arguments(sections: Sections, path: str, _: Any, args: tuple[Any, ...]) -> None:
    sections[path] = mapped(torch.clone, args)


def look(model: nn.Module, inputs: Inputs, sections: Sections) -> Any:
    """Return the outputs of all sections, or where there are none, of the model."""
    if not sections:
        return run(model, inputs)
    return [run(section(model, path), args) for path, args in sections.items()]


def section(model: nn.Module, path: str) -> nn.Module:
    """Return a part of a detector: a space may lead from a part to that which reads it."""
    modules = dict(model.named_modules())
    parts = [modules[part] for part in DETECTORS.get(path, (path,)) if part in modules]
    return parts[0] if len(parts) == 1 else InARow(*parts)


class InARow(nn.Sequential):
    """Parts of a detector, one after another."""

    def forward(self, x: Any) -> Any:
        for part in self:
            x = part(list(x.values()) if isinstance(x, Mapping) else x)
        return x


def tensors_of(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of a nested output, in order."""
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]


def difference(left: Any, right: Any) -> float:
    """Return the largest norm of a difference, relative to the norm on the right; inf for NaN."""
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm())
        if not torch.equal(a, b)
        else 0.0
        for a, b in zip(tensors_of(left), tensors_of(right), strict=True)
    ]
    return max(errors) if errors and all(map(isfinite, errors)) else inf


def count_macs(model: nn.Module, inputs: Inputs, names: set[str] | None = None) -> int:
    """Return the MACs of the convolutions and linear layers that are called in a forward."""
    found = []

    def count(module: Any, args: Any, named: Mapping[str, Any], result: Any) -> None:
        given = [*args, *(named[n] for n in ("input", "query", "key", "value") if n in named)]
        if isinstance(module, nn.MultiheadAttention):
            q, k, v = (x.numel() for x in given[:3])  # positions times channels
            found.append(module.embed_dim * (2 * q + k + v))  # and what is put out, like q
        elif isinstance(module, _ConvTransposeNd):
            found.append(given[0].numel() // module.in_channels * module.weight.numel())
        elif isinstance(result, Tensor):  # of a subclass, it may be a pair, say
            found.append(result.numel() // module.weight.shape[0] * module.weight.numel())

    kinds = (*COUNTED, _ConvTransposeNd, nn.MultiheadAttention)
    handles = [
        module.register_forward_hook(count, with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        # An attention whose keys are of another width is known by the layers that it holds.
        and (names is None or not names.isdisjoint({name, f"{name}.out_proj"}))
    ]
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return sum(found)


# --- the subject of the proofs


class Recorder:
    """Starts as another initialiser does, and remembers the channels that each space keeps."""

    def __init__(self, inner: Initializer) -> None:
        self.inner = inner
        self.kept: dict[str, Tensor] = {}

    def __call__(self, space: SpaceContext) -> Tensor:
        basis = self.inner(space)
        self.kept[space.name] = basis.sum(dim=-1).flatten() > 0.5
        return basis


@dataclass(frozen=True, slots=True)
class Mirrored:
    """Starts as another initialiser does, times a sign where projections are not selections."""

    inner: Initializer
    sign: int

    def __call__(self, space: SpaceContext) -> Tensor:
        basis = self.inner(space)
        return basis if space.selection else self.sign * basis


class Subject:
    """One model with its small model, made from random orthonormal projections when asked for."""

    def __init__(
        self, model: nn.Module, inputs: Any, graph: SpaceGraph, plan: torchcap.Plan
    ) -> None:
        self.model, self.inputs, self.graph, self.plan = model, inputs, graph, plan
        self.sections = sections_of(model, inputs)
        self.output = self.look(model)

    def look(self, model: nn.Module) -> Any:
        """Return what is compared: the outputs of a model, or of a detector's sections."""
        return look(model, self.inputs, self.sections)

    @cached_property
    def tolerance(self) -> float:
        """What may differ: ten times what a change of the inputs by ``NUDGE`` makes of itself.

        For all but a few models that is ``TOLERANCE``. Forwards that compute a part in single
        precision, or multiply rounding errors, are given what their own rounding makes.
        """
        inputs, sections = (
            floats_mapped(lambda tensor: tensor * (1 + NUDGE), given)
            for given in (self.inputs, self.sections)
        )
        single = any(tensor.dtype == torch.float32 for tensor in tensors_of(self.output))
        grown = 10 * difference(look(self.model, inputs, sections), self.output)
        return min(LOOSEST, max(LOOSEST if single else TOLERANCE, grown))

    @cached_property
    def student(self) -> nn.Module:
        start = torchcap.RandomOrthonormal(torch.Generator().manual_seed(0))
        return self.prepared(self.plan, start)

    @cached_property
    def small(self) -> nn.Module:
        return torchcap.materialize(self.student)

    @cached_property
    def small_output(self) -> Any:
        return self.look(self.small)

    @cached_property
    def dead(self) -> Dead:
        return deadened(self)

    def forget(self) -> None:
        """Free the student and the small model; they are made again where they are needed."""
        for name in ("student", "small"):
            self.__dict__.pop(name, None)

    def prepared(self, plan: torchcap.Plan, start: Initializer) -> nn.Module:
        return torchcap.prepare(self.model, plan=plan, example_inputs=self.inputs, init=start)

    def expect_equal(self, left: Any, right: Any) -> str:
        """Return the difference in words.

        Raises:
            ProofError: if it is larger than the tolerance.
        """
        error = difference(left, right)
        if error > self.tolerance:
            raise ProofError(f"outputs differ by {error:.1e}, more than {self.tolerance:.0e}")
        return f"{error:.0e}"


def outcome(proof: Callable[[Subject], str], subject: Subject) -> Record:
    """Run one proof and say how it went. What torchcap declines is handed on."""
    try:
        return {"outcome": "passed", "detail": proof(subject)}
    except Skip as reason:
        return {"outcome": "skipped", "detail": str(reason)}
    except ProofError as error:
        return {"outcome": "failed", "detail": str(error)}
    except torchcap.TorchcapError:
        raise
    except Exception:  # the other proofs can still be tried
        return {"outcome": "failed", "detail": last_lines(traceback.format_exc())}


# --- the proofs


def prove_permutation(subject: Subject) -> str:
    """Permuting the channels of every free space leaves the network what it is.

    It does not if the producers alone are permuted: otherwise the proof would tell nothing.
    """
    changed, spaces = copy.deepcopy(subject.model), subject.graph.free
    for space in spaces:
        _permute_(changed, space, space.producers)
    half = difference(subject.look(changed), subject.output)
    if half < 1e2 * subject.tolerance:
        raise ProofError(f"it tells nothing: by the producers alone outputs differ by {half:.1e}")
    for space in spaces:
        _permute_(changed, space, space.consumers + space.carriers)
    words = subject.expect_equal(subject.look(changed), subject.output)
    return f"{words}, by the producers alone {half:.0e}"


def _permute_(model: nn.Module, space: ChannelSpace, ports: Sequence[Port]) -> None:
    """Move every channel to another place of its block, always to the same one, in some ports."""
    generator = torch.Generator().manual_seed(0)
    size = space.channels // space.blocks
    order = torch.cat([b * size + _cycle(size, generator) for b in range(space.blocks)])
    for port in ports:
        for part, places, channels in _entries(model, port):
            source = places + (order[channels] - channels) * port.repeat
            part.index_copy_(port.axis, places, part.index_select(port.axis, source))


def _cycle(size: int, generator: torch.Generator) -> Tensor:
    """Return a random permutation that leaves nothing in its place."""
    walk = torch.randperm(size, generator=generator)
    return torch.empty_like(walk).index_copy_(0, walk, walk.roll(1))


def _entries(model: nn.Module, port: Port) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield where a port keeps its channels: parts of the tensor, the places in each, and channels.

    The input axis of a grouped layer is cut into groups: entry ``g * width + j`` is stored at
    position ``j`` of the rows of group ``g``. So it has one part for each group.
    """
    tensor = getattr(model.get_submodule(port.module), port.parameter).data
    places = torch.arange(port.channels * port.repeat)
    channels = port.start + places // port.repeat
    places += port.offset
    width, rows = tensor.shape[port.axis], tensor.shape[0] // port.groups
    for group in range(port.groups):
        own = places // width == group
        if own.any():
            part = tensor[group * rows : (group + 1) * rows] if port.groups > 1 else tensor
            yield part, places[own] - group * width, channels[own]


def prove_materialized(subject: Subject) -> str:
    """The small model computes what the prepared one computes."""
    return subject.expect_equal(subject.small_output, subject.look(subject.student))


def prove_cost(subject: Subject) -> str:
    """The small model has as many MACs as were predicted for it."""
    # How often the parts of a detector behind its boxes run hangs on the boxes.
    calls = tuple(c for c in subject.graph.calls if not c.module.startswith("roi_heads."))
    counted = count_macs(subject.small, subject.inputs, {call.module for call in calls})
    predicted = torchcap.cost(replace(subject.graph, calls=calls), subject.plan).macs
    if counted != predicted:
        raise ProofError(f"{counted:,} MACs counted, {predicted:,} predicted")
    return f"{counted:,} MACs"


def prove_gradients(subject: Subject) -> str:
    """One backward in training mode reaches every projection that is trained.

    A unit that a random projection leaves dead has no gradient. From another start it may have one,
    and most likely so where all its inputs change their signs.
    """
    parts = subject.sections or {"": subject.inputs}
    empty = [p for p, given in parts.items() if any(not t.numel() for t in tensors_of(given))]
    names = [space.name for space in subject.graph.free if space.freedom != "selection"]
    outside = [f"{part}." for path in empty for part in DETECTORS.get(path, (path,))]
    idle = {name for name in names if not any(map(name.startswith, outside))}
    if not names:
        raise Skip("every free space is a selection, which is not trained")
    for seed, sign in product(range(STARTS), (1, -1)):
        start = Mirrored(torchcap.RandomOrthonormal(torch.Generator().manual_seed(seed)), sign)
        plain = (seed, sign) == (0, 1)
        student = subject.student if plain else subject.prepared(subject.plan, start)
        try:
            gradients = _gradients(student, parts, torchcap.projection_parameters(student))
        except torchcap.StudentError as error:  # a reversible network computes under no_grad
            raise Skip(f"the projections cannot be trained: {error}") from None
        norms = [0.0 if gradient is None else float(gradient.norm()) for gradient in gradients]
        # Scores that softmax saturates move little; a NaN is not larger than anything.
        least = VANISHED * max(norms)
        idle -= {name for name, norm in zip(names, norms, strict=True) if norm > least}
        if not idle:
            return f"{len(names)} projections"
    idle -= set(_saturated(subject, parts, names))
    if idle:
        raise ProofError(f"no gradient, or none that is finite, in {len(idle)}: {sorted(idle)[:5]}")
    return f"{len(names)} projections, of which some have none in the original either"


def _saturated(subject: Subject, parts: Sections, names: Sequence[str]) -> Iterator[str]:
    """Yield the spaces whose writers have no gradient in the original: behind a gate, say.

    In a deep network without norms that are at work it may also vanish on the way.
    """
    original = copy.deepcopy(subject.model)
    for module in original.modules():
        if isinstance(module, _BatchNorm):  # those of a student keep their statistics
            module.train = lambda *_: None
    first = [subject.graph[name].producers[0] for name in names]
    weights = [getattr(original.get_submodule(p.module), p.parameter) for p in first]
    gradients = _gradients(original, parts, weights)
    norms = [0.0 if gradient is None else float(gradient.norm()) for gradient in gradients]
    for name, norm in zip(names, norms, strict=True):
        if norm <= 1e3 * VANISHED * max(norms):
            yield name


def _gradients(
    student: nn.Module, parts: Sections, proxies: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Differentiate a random function of what a student, or each of its sections, puts out."""
    student.train()
    try:
        output = [call(section(student, path), given) for path, given in parts.items()]
        generator = torch.Generator().manual_seed(0)
        loss = sum(
            (tensor * torch.randn(tensor.shape, generator=generator).to(tensor)).sum()
            for tensor in tensors_of(output)
        )
        return torch.autograd.grad(loss, proxies, allow_unused=True)
    finally:
        student.eval()


def prove_modes(subject: Subject) -> str:
    """The small model runs in training mode, and is the same in evaluation mode afterwards."""
    pair = mapped(lambda t: torch.cat([t, t.flip(-1)]) if t.ndim else t, subject.inputs)
    small, before = subject.small, copy.deepcopy(subject.small.state_dict())
    try:
        run(small.train(), pair)
    except Exception as error:
        try:
            run(copy.deepcopy(subject.model).train(), pair)
        except Exception:  # whatever the original raises, it is no fault of the small one
            kind = type(error).__name__
            raise Skip(f"the original does not run in training mode either ({kind})") from None
        raise
    finally:
        small.eval()
    small.load_state_dict(before)  # the statistics of norms that could not be folded have moved
    return subject.expect_equal(subject.look(small), subject.small_output)


def prove_state(subject: Subject) -> str:
    """The saved state of the small model makes an equal one of an empty copy."""
    file = io.BytesIO()
    torch.save(subject.small.state_dict(), file)
    file.seek(0)
    fresh = copy.deepcopy(subject.small)
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    fresh.load_state_dict(torch.load(file), strict=True)
    return subject.expect_equal(subject.look(fresh), subject.small_output)


def prove_masked(subject: Subject) -> str:
    """With selections, the small model is the folded original whose dropped channels are zero.

    Their columns in the consumers are zero, and their rows in the producers, where two spaces meet
    in a product. Where channels are normed together, those that are dropped would still count, so
    these spaces keep their width here.
    """
    subject.forget()
    graph, ranks = subject.graph, subject.plan.ranks
    normed = {space.name for space in graph.free if _is_normed(subject.model, space)}
    left = {name: rank for name, rank in ranks.items() if name not in normed}
    if not left:
        raise Skip(f"the channels of all {len(normed)} free spaces are normed together")
    recorder = Recorder(torchcap.LargestNorm())
    small = torchcap.materialize(subject.prepared(torchcap.Plan.of(graph, left), recorder))
    output = subject.look(small)
    del small
    masked = copy.deepcopy(subject.model)
    fold_(masked, graph.folds)
    folded = graph.after_folding()
    for name in left:
        for port in folded[name].producers + folded[name].consumers:
            for part, places, channels in _entries(masked, port):
                part.index_fill_(port.axis, places[~recorder.kept[name][channels]], 0.0)
    words = subject.expect_equal(output, subject.look(masked))
    return f"{words}, without {len(normed)} spaces that are normed" if normed else words


def _is_normed(model: nn.Module, space: ChannelSpace) -> bool:
    """Whether the statistics of a norm run over the channels of a space."""
    kinds = {type(model.get_submodule(port.module)).__name__ for port in space.carriers}
    alone = {kind for kind in kinds if "Norm" in kind and "BatchNorm" not in kind}
    return bool(alone) or re.search(r"\bnorm\b", space.reason) is not None


def prove_sizes(subject: Subject) -> str:
    """On a batch of three and on larger images, the small model equals the prepared one as well."""
    found = [_other_sizes(subject, "a batch of three", [_three])]
    found.append(_other_sizes(subject, "larger inputs", [_tall, _large]))
    if not any(found):
        raise Skip("the original takes inputs of no other size")
    return ", ".join(filter(None, found))


def _other_sizes(subject: Subject, words: str, changes: Sequence[Callable[[Any], Any]]) -> str:
    """Compare on the first of other inputs that the original takes; return nothing if none is."""
    for change in changes:
        inputs = change(subject.inputs)
        try:
            sections = sections_of(subject.model, inputs)
            original = look(subject.model, inputs, sections)
        except Exception:  # of the original: it takes no such inputs
            continue
        if not all(bool(tensor.isfinite().all()) for tensor in tensors_of(original)):
            continue
        expected = look(subject.student, inputs, sections)
        error = difference(look(subject.small, inputs, sections), expected)
        if error > subject.tolerance:
            raise ProofError(f"on {words}, outputs differ by {error:.1e}")
        return f"{words}: {error:.0e}"
    return ""


def _three(inputs: Any) -> Any:
    """Return a batch of three, or as many images more in a list."""
    if isinstance(inputs, tuple) and isinstance(inputs[0], list):
        return ([*inputs[0], inputs[0][0].flip(-1), inputs[0][0].flip(-2)], *inputs[1:])
    return mapped(lambda t: _extended(t, 0, 3 - len(t)) if t.ndim else t, inputs)


def _tall(inputs: Any) -> Any:
    """Return inputs that are longer along all their positions, by different lengths."""
    return _larger(inputs, (32, 64, 96))


def _large(inputs: Any) -> Any:
    """Return inputs that are longer along all their positions, by the same length."""
    return _larger(inputs, (32, 32, 32))


def _larger(inputs: Any, more: Sequence[int]) -> Any:
    """Lengthen the tensors with the most dimensions: images, and not the time steps beside them."""
    most = max(tensor.ndim for tensor in tensors_in(inputs))

    def longer(tensor: Tensor) -> Tensor:
        if tensor.ndim < most:
            return tensor
        first = min(2, tensor.ndim - 1) if most != 3 or tensor.shape[0] != 3 else 1
        for dim, count in zip(range(first, tensor.ndim), more, strict=False):
            size = tensor.shape[dim]
            tensor = _extended(tensor, dim, count if size % 32 == 0 else size)
        return tensor

    return mapped(longer, inputs)


def _extended(tensor: Tensor, dim: int, count: int) -> Tensor:
    """Continue a tensor by mirroring it."""
    while count > 0:
        part = tensor.flip(dim).narrow(dim, 0, min(count, tensor.shape[dim]))
        tensor, count = torch.cat([tensor, part], dim), count - part.shape[dim]
    return tensor


def prove_dead(subject: Subject) -> str:
    """Where half of the channels are zero, those go by their weights alone; nothing changes."""
    dead = subject.dead
    small = torchcap.compress(dead.model, plan=dead.plan, example_inputs=subject.inputs)
    return f"{subject.expect_equal(subject.look(small), dead.output)}{dead.words}"


def prove_dead_by_data(subject: Subject) -> str:
    """Closed forms leave out the channels that are zero, too, and change next to nothing.

    Where the data has fewer positions than a layer has inputs, one channel does as well as another
    on it: the spaces before such layers keep their width here.
    """
    if subject.sections:
        raise Skip("a detector is read in pieces, which have no closed form")
    dead, graph = subject.dead, subject.graph
    ranks = {name: rank for name, rank in dead.plan.ranks.items() if _is_shown(graph, name)}
    if not ranks:
        raise Skip("the data has fewer positions than every layer has inputs")
    plan, recipe = torchcap.Plan.of(graph, ranks), torchcap.Recipe.seconds()
    try:
        small = torchcap.compress(dead.model, _batches(subject), plan=plan, recipe=recipe)
    except torchcap.TraceError as error:
        if "closed forms need" not in str(error):
            raise
        raise Skip("only pieces of the model can be read, and closed forms need all") from None
    error = difference(subject.look(small), dead.output)
    if error > max(SOLVED, subject.tolerance):
        raise ProofError(f"outputs differ by {error:.1e}, more than {SOLVED:.0e}")
    left = len(dead.plan.ranks) - len(ranks)
    return f"{error:.0e}{dead.words}" + (f", without {left} that see little data" if left else "")


def _is_shown(graph: SpaceGraph, name: str) -> bool:
    """Whether the data has more positions than the readers of a space have inputs that live."""
    readers = {port.module for port in graph[name].consumers}
    inputs: dict[str, int] = {}
    positions: Counter[str] = Counter()
    for call in graph.calls:
        if call.module in readers:
            inputs[call.module] = prod(call.shape) // call.shape[call.axis]
            positions[call.module] += call.positions * BATCHES
    return all(positions[module] > count for module, count in inputs.items())


def _batches(subject: Subject) -> list[dict[str, Any]]:
    """Return the inputs by name, and as many others as make a few batches."""
    names, given = inspect.signature(subject.model.forward).parameters, subject.inputs
    inputs = given if isinstance(given, Mapping) else dict(zip(names, given, strict=False))
    generator = torch.Generator().manual_seed(3)

    def drawn(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        order = torch.randint(tensor.numel(), tensor.shape, generator=generator)
        return tensor.flatten()[order]

    return [dict(inputs), *(mapped(drawn, inputs) for _ in range(BATCHES - 1))]


@dataclass(frozen=True, slots=True)
class Dead:
    """A model in which half of the channels of some spaces are zero.

    Attributes:
        model: the model.
        plan: keeps as many channels of each of these spaces as are not zero.
        output: of the model.
        words: on the spaces that are left out, for messages.
    """

    model: nn.Module
    plan: torchcap.Plan
    output: Any
    words: str


def deadened(subject: Subject) -> Dead:
    """Make half of the channels of every free space zero, wherever they are read.

    A norm or a mean over the channels counts those that are zero too, and a function that is not
    zero at zero brings them back: these spaces are left out.

    Raises:
        Skip: if none is left.
    """
    generator = torch.Generator().manual_seed(2)
    zero = {space.name: _half(space, generator) for space in subject.graph.free}
    apart = {
        space.name
        for space in subject.graph.free
        if _is_normed(subject.model, space) or re.search(r"norm|mean", space.reason)
    }
    chosen = [s for s in subject.graph.free if s.name not in apart and bool(zero[s.name].any())]
    model = _with_zeros(subject.model, chosen, zero)
    alive = set(_alive(subject, model, chosen, zero))
    if alive:
        chosen = [space for space in chosen if space.name not in alive]
        model = _with_zeros(subject.model, chosen, zero)
    if not chosen:
        raise Skip("no space can have channels that are zero wherever they are read")
    ranks = {space.name: int((~zero[space.name]).sum()) for space in chosen}
    left = {"normed": len(apart), "not zero behind a function": len(alive)}
    words = "".join(f", without {count} {which}" for which, count in left.items() if count)
    return Dead(model, torchcap.Plan.of(subject.graph, ranks), subject.look(model), words)


def _half(space: ChannelSpace, generator: torch.Generator) -> Tensor:
    """Return a mask of a random half of the channels of every block."""
    size = space.channels // space.blocks
    order = torch.rand(space.blocks, size, generator=generator).argsort(1)
    return (order < size // 2).flatten()


def _with_zeros(
    model: nn.Module, spaces: Sequence[ChannelSpace], zero: Mapping[str, Tensor]
) -> nn.Module:
    """Return a copy in which nothing writes some channels of some spaces."""
    changed = copy.deepcopy(model)
    for space in spaces:
        for port in space.producers + space.carriers:
            if port.parameter != "running_var":
                _multiply_(changed, port, zero[space.name], 0.0)
    return changed


def _multiply_(model: nn.Module, port: Port, mask: Tensor, factor: float) -> None:
    """Multiply the entries of some channels in the tensor of a port."""
    for part, places, channels in _entries(model, port):
        chosen = places[mask[channels]]
        part.index_copy_(port.axis, chosen, factor * part.index_select(port.axis, chosen))


def _alive(
    subject: Subject, model: nn.Module, spaces: Sequence[ChannelSpace], zero: Mapping[str, Tensor]
) -> Iterator[str]:
    """Yield the spaces whose channels matter though nothing writes them.

    What is read of such a channel changes if it is read with another weight.
    """
    output = subject.look(model)
    waiting = [list(spaces)]
    while waiting:
        group = waiting.pop()
        for factor in (3.0, 1 / 3.0):  # there, and back again
            for space in group:
                for port in space.consumers:
                    _multiply_(model, port, zero[space.name], factor)
            if factor > 1:
                differs = difference(subject.look(model), output) > subject.tolerance
        if differs and len(group) > 1:
            waiting += [group[: len(group) // 2], group[len(group) // 2 :]]
        elif differs:
            yield group[0].name


def prove_export(subject: Subject) -> str:
    """The exported small model computes the same."""
    with warnings.catch_warnings(action="ignore"):
        try:
            exported = _exported(subject.small, subject.inputs)
        except Exception:
            try:
                _exported(subject.model, subject.inputs)
            except Exception as error:  # its forward branches on values, say
                kind = type(error).__name__
                raise Skip(f"the original cannot be exported either ({kind})") from error
            raise
    return subject.expect_equal(run(exported.module(), subject.inputs), subject.small_output)


def _exported(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    given = mapped(torch.clone, inputs)
    if isinstance(given, Mapping):
        return torch.export.export(model, (), given)
    return torch.export.export(model, given)


# --- the same by Torch-Pruning


def try_peer(name: str) -> Record:
    """Let Torch-Pruning take half of the channels of a model, all but those of the classifier."""
    import torch_pruning as tp  # noqa: PLC0415 - a development extra

    try:
        torch.manual_seed(0)
        model = build(name)
        inputs = example_inputs(name, model)
        before = count_macs(model, inputs)
        classes = tensors_of(run(model, inputs))[0].shape[1]
        # Heads are cut evenly only if they are named, and attention has to be told its new size.
        attentions = [m for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")]
        pruner = tp.pruner.BasePruner(
            model,
            inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs,
            tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=[
                module
                for module in model.modules()
                if isinstance(module, COUNTED) and module.weight.shape[0] == classes
            ],
            num_heads={m.qkv: m.num_heads for m in attentions if isinstance(m.qkv, COUNTED)},
        )
        pruner.step()
        for attention in attentions:
            if isinstance(attention.qkv, nn.Linear) and hasattr(attention, "head_dim"):
                attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        after = count_macs(model, inputs)
    except Exception:  # of another library: any
        return {"status": "failed", "message": last_lines(traceback.format_exc(), 2)}
    if after >= before:
        return {"status": "failed", "message": f"{after:,} MACs after, {before:,} before"}
    return {"status": "compressed", "macs_left": after / before}


PROOFS: dict[str, Callable[[Subject], str]] = {
    "permutation": prove_permutation,
    "materialized": prove_materialized,
    "cost": prove_cost,
    "gradients": prove_gradients,
    "modes": prove_modes,
    "state": prove_state,
    "masked": prove_masked,
    "sizes": prove_sizes,
    "dead": prove_dead,
    "dead-by-data": prove_dead_by_data,
    "export": prove_export,
}
"""All proofs; each returns what it measured, or raises."""
