"""``prepare()``: the model stays as it is, and a student comes out, or an error that helps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from small_nets import (
    EVERY_NET,
    EXACT,
    NETS,
    Block,
    Plain,
    Residual,
    built,
    fingerprint,
    images,
    labels,
    values,
)
from torch import Tensor, fx, nn

import torchcap
from torchcap import (
    DataError,
    ExampleInputsError,
    GreedySelection,
    LargestNorm,
    ModelError,
    NothingToCompressError,
    Plan,
    PlanError,
    PrincipalComponents,
    RandomOrthonormal,
    StudentError,
    TorchcapError,
)

UNFOLDED = pytest.mark.parametrize("net", ["pre-activation", "dense"])


def made(net: str = "residual") -> nn.Module:
    return built(NETS[net])


def prepared(model: nn.Module, **kwargs: Any) -> Any:
    return torchcap.prepare(model, example_inputs=images(), **kwargs)


def bases(student: nn.Module) -> dict[str, Tensor]:
    """Space -> the proxy, or what a selection keeps."""
    found = {}
    for name, value in student.state_dict().items():
        path, _, last = name.rpartition(".")
        if last in {"proxy", "kept"}:
            found[path] = value.detach().clone()
    return found


def assert_same_bases(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = bases(left), bases(right)
    assert ours.keys() == theirs.keys()
    assert ours
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------
# The user's model


@EVERY_NET
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("with_data", [False, True])
def test_model_is_untouched(net: str, *, training: bool, with_data: bool) -> None:
    model = made(net).train(training)
    next(model.parameters()).requires_grad_(requires_grad=False)
    model.register_forward_hook(lambda *_: None)
    next(model.children()).register_forward_pre_hook(lambda *_: None)
    before, numbers = fingerprint(model), values(model)
    student = prepared(model, data=[images()] if with_data else None)
    student.train()(images())

    assert fingerprint(model) == before
    for name, value in values(model).items():
        torch.testing.assert_close(value, numbers[name], rtol=0, atol=0)


def test_model_is_untouched_by_what_becomes_of_the_student() -> None:
    model = made("pre-activation")
    before, numbers = fingerprint(model), values(model)
    student = prepared(model).train()
    optimizer = torch.optim.SGD(torchcap.projection_parameters(student), 0.1)
    student(images())
    torchcap.reconstruction_loss(student).backward()
    optimizer.step()
    torchcap.materialize(student).train()(images())
    student.float()
    student(images(dtype=torch.float32))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()

    assert fingerprint(model) == before
    for name, value in values(model).items():
        torch.testing.assert_close(value, numbers[name], rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------
# The student


@EVERY_NET
def test_student_at_full_width_computes_what_the_model_computes(net: str) -> None:
    model = made(net)
    with torch.no_grad():
        torch.testing.assert_close(prepared(model, ratio=1.0)(images()), model(images()), **EXACT)


@EVERY_NET
@pytest.mark.parametrize("training", [False, True])
def test_student_has_the_classes_and_the_mode_of_the_model(net: str, *, training: bool) -> None:
    model = made(net).train(training)
    next(model.children()).eval()
    student = prepared(model)

    assert type(student) is type(model)
    ours = dict(student.named_modules())
    for path, module in model.named_modules():
        assert isinstance(ours[path], type(module) | nn.Identity), path
        assert ours[path].training == module.training, path


@EVERY_NET
def test_only_proxies_are_trainable(net: str) -> None:
    model = made(net)
    graph = torchcap.analyze(model, images())
    student = prepared(model)
    trainable = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    proxies = torchcap.projection_parameters(student)

    assert {id(p) for _, p in trainable} == {id(p) for p in proxies}
    assert all(name.endswith(".proxy") for name, _ in trainable)
    rotated = [space for space in graph.free if space.freedom != "selection"]
    assert sorted(p.shape[1] for p in proxies) == sorted(space.channels for space in rotated)


@EVERY_NET
def test_each_projection_stands_once_in_the_state_dict(net: str) -> None:
    student = prepared(made(net))
    assert len(bases(student)) == len(torchcap.analyze(made(net), images()).free)


@EVERY_NET
def test_size_attributes_follow_the_tensors(net: str) -> None:
    student = prepared(made(net))
    for path, module in student.named_modules():
        if isinstance(module, nn.Conv2d):
            out, width, *_ = module.weight.shape
            assert module.out_channels == out, path
            assert module.in_channels == width * module.groups, path
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape, path
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.running_mean), path


def test_size_attributes_are_the_ranks() -> None:
    plain = prepared(made("plain"))
    assert plain.features[0].out_channels == plain.features[3].in_channels == 3
    assert plain.classifier[0].in_features == 4 * 4
    assert plain.classifier[0].out_features == plain.classifier[2].in_features == 5
    separable = prepared(made("separable"))
    depthwise = separable.depthwise
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == 4
    assert prepared(made("dense")).norm3.num_features == 3 + 2 + 2


@pytest.mark.parametrize(
    ("ratio", "ranks"),
    [
        (0.5, (3, 4)),
        (1, (6, 8)),
        (0.01, (1, 1)),
        ({"block2.conv1": 0.25}, (6, 2)),
        ({"block1.conv1": 1.0, "block2.conv1": 0.75}, (6, 6)),
    ],
)
def test_ratio_is_the_share_that_is_kept(
    ratio: float | dict[str, float], ranks: tuple[int, int]
) -> None:
    student = prepared(made(), ratio=ratio)
    blocks = student.block1, student.block2
    assert tuple(block.conv1.weight.shape[0] for block in blocks) == ranks
    assert tuple(block.conv2.weight.shape[1] for block in blocks) == ranks


def test_ratio_gives_the_same_student_as_its_plan() -> None:
    model = made("plain")
    plan = Plan.uniform(torchcap.analyze(model, images()), 0.5)
    left, right = prepared(model, ratio=0.5), prepared(model, plan=plan)
    torch.testing.assert_close(left(images()), right(images()), rtol=0, atol=0)


def test_plan_sets_the_ranks_that_it_names() -> None:
    model = made("plain")
    plan = Plan.of(torchcap.analyze(model, images()), {"features.3": 5, "classifier.0": 2})
    student = prepared(model, plan=plan)
    assert student.features[0].weight.shape[0] == 6
    assert student.features[3].weight.shape[0] == 5
    assert student.classifier[0].weight.shape == (2, 5 * 4)
    assert len(torchcap.projection_parameters(student)) == 2


def test_graph_module_gives_a_graph_module() -> None:
    graph_module = fx.symbolic_trace(made())
    before, code = fingerprint(graph_module), graph_module.code
    student = prepared(graph_module)
    assert isinstance(student, fx.GraphModule)
    assert (fingerprint(graph_module), graph_module.code) == (before, code)
    torch.testing.assert_close(student(images()), prepared(made())(images()), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_proxies_of_a_half_precision_model_are_float32(dtype: torch.dtype) -> None:
    model = made("plain").to(dtype)
    student = torchcap.prepare(model, example_inputs=images(dtype=dtype))
    assert {p.dtype for p in torchcap.projection_parameters(student)} == {torch.float32}
    assert student(images(dtype=dtype)).dtype == dtype


class Branch(nn.Module):
    """A forward that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class BranchOfItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if bool(x.sum() > 0) else x


def with_branch() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(6, 4, 1), Branch(), nn.Conv2d(4, 4, 1)
    )


def test_modules_that_cannot_be_traced_may_be_leaves() -> None:
    student = prepared(built(with_branch), leaves=[Branch])
    assert [m.out_channels for m in student if isinstance(m, nn.Conv2d)] == [3, 4, 4]


def test_example_inputs_of_torchvision_models_may_be_left_out() -> None:
    student = torchcap.prepare(torchvision.models.squeezenet1_1(num_classes=3).eval())
    assert student.features[0].out_channels == 32


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.last = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        both = torch.cat([F.relu(self.left(x)), F.relu(self.right(y)) * scale], 1)
        return {"out": self.last(both).mean((2, 3)), "input": x}


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_models_of_several_inputs_and_outputs_are_prepared(form: str) -> None:
    model, pair = built(TwoInputs), (images(), images(seed=5))
    inputs = pair if form == "tuple" else {"y": pair[1], "x": pair[0]}
    student = torchcap.prepare(model, ratio=1.0, example_inputs=inputs).train()
    ours, theirs = student(pair[0], y=pair[1]), model(*pair)

    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, **EXACT)
    assert torchcap.reconstruction_loss(student) < 1e-20


# --------------------------------------------------------------------------------------------------
# Where training starts


def test_without_data_the_channels_of_largest_norm_are_kept() -> None:
    model = made()
    proxies = torchcap.projection_parameters(prepared(model))
    for block, proxy in zip((model.block1, model.block2), proxies, strict=True):
        scale = block.bn1.weight * (block.bn1.running_var + block.bn1.eps).rsqrt()
        norms = (block.conv1.weight * scale[:, None, None, None]).abs().sum((1, 2, 3))
        best = norms.topk(len(norms) // 2).indices.sort().values
        identity = torch.eye(len(norms), dtype=torch.float64)
        torch.testing.assert_close(proxy[0], identity[:, best], **EXACT)


def channel_net() -> nn.Module:
    """A space of eight channels between layers that look at single pixels."""
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 4, 1))


def pixels(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model[1](model[0](x)).movedim(1, -1).flatten(0, 2)


def proxy_of(student: nn.Module) -> Tensor:
    (proxy,) = torchcap.projection_parameters(student)
    return proxy[0].detach()


def test_with_data_the_channel_that_the_reader_misses_least_goes_first() -> None:
    model, x = built(channel_net), images(8)
    features = pixels(model, x)
    output = features @ model[2].weight.detach().flatten(1).mT
    errors = []
    for channel in range(8):
        rest = [c for c in range(8) if c != channel]
        best = torch.linalg.lstsq(features[:, rest], output).solution
        errors.append((features[:, rest] @ best - output).square().sum())
    least = int(torch.stack(errors).argmin())
    P = proxy_of(prepared(model, ratio=7 / 8, data=[x]))

    kept = [c for c in range(8) if c != least]
    torch.testing.assert_close(P, torch.eye(8, dtype=torch.float64)[:, kept], **EXACT)


def test_principal_components_span_the_directions_of_most_energy() -> None:
    model, x = built(channel_net), images(8)
    P = proxy_of(prepared(model, data=[x], init=PrincipalComponents()))
    Vh = torch.linalg.svd(pixels(model, x), full_matrices=False).Vh[:4]
    torch.testing.assert_close(P @ P.mT, Vh.mT @ Vh, rtol=1e-9, atol=1e-9)


def test_random_start_is_orthonormal_and_drawn_from_its_generator_alone() -> None:
    model, state = built(channel_net), torch.get_rng_state()
    first, again, other = (
        proxy_of(prepared(model, init=RandomOrthonormal(torch.Generator().manual_seed(seed))))
        for seed in (0, 0, 1)
    )
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).norm() > 0.1
    torch.testing.assert_close(first.mT @ first, torch.eye(4, dtype=torch.float64), **EXACT)
    assert torch.equal(torch.get_rng_state(), state)


INITIALIZERS: dict[str, Callable[[], Any]] = {
    "default": lambda: None,
    "largest": LargestNorm,
    "greedy": GreedySelection,
    "components": PrincipalComponents,
    "random": lambda: RandomOrthonormal(torch.Generator().manual_seed(0)),
}


@EVERY_NET
@pytest.mark.parametrize("init", INITIALIZERS)
def test_every_start_is_orthonormal_and_a_selection_where_it_has_to_be(net: str, init: str) -> None:
    student = prepared(made(net), data=[images()], init=INITIALIZERS[init]())
    for basis in bases(student).values():
        if basis.is_floating_point():
            identity = torch.eye(basis.shape[2], dtype=torch.float64).expand(len(basis), -1, -1)
            torch.testing.assert_close(basis.mT @ basis, identity, **EXACT)
        else:
            assert all(len(set(row)) == len(row) for row in basis.tolist())
    assert student(images()).isfinite().all()


def test_data_alone_means_greedy_selection() -> None:
    model = made()
    default = prepared(model, data=[images()])
    assert_same_bases(default, prepared(model, data=[images()], init=GreedySelection()))


BATCHES: dict[str, Callable[[Tensor], list[Any]]] = {
    "one batch": lambda x: [x],
    "two batches": lambda x: [x[:5], x[5:]],
    "with labels": lambda x: [(x, labels(len(x)))],
    "lists": lambda x: [[x[:3], None, "name"], [x[3:], None, "name"]],
    "by name": lambda x: [{"x": x}],
}


@pytest.mark.parametrize("form", BATCHES)
@pytest.mark.parametrize("net", ["residual", "plain", "dense"])
def test_start_does_not_depend_on_how_the_data_is_batched(net: str, form: str) -> None:
    model, x = made(net), images(8)
    assert_same_bases(prepared(model, data=BATCHES[form](x)), prepared(model, data=[x]))


def test_every_batch_is_looked_at_once() -> None:
    taken = []

    def loader() -> Iterator[Tensor]:
        for seed in range(3):
            taken.append(seed)
            yield images(seed=seed)

    prepared(made(), data=loader())
    assert taken == [0, 1, 2]


@UNFOLDED
def test_data_is_read_in_evaluation_mode(net: str) -> None:
    model = made(net)
    expected = prepared(model, data=[images()])
    student = prepared(model.train(), data=[images()])
    assert_same_bases(student, expected)
    for name, value in values(student).items():
        torch.testing.assert_close(value, values(expected)[name], rtol=0, atol=0)
    assert all(module.training for module in student.modules())


# --------------------------------------------------------------------------------------------------
# Norms that could not fold


def norm_values(student: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in student.named_buffers() if "running" in n or "num_batch" in n}


@UNFOLDED
def test_norms_keep_their_statistics_while_the_student_trains(net: str) -> None:
    student = prepared(made(net)).train()
    before = norm_values(student)
    trained = student(images())

    assert before
    for name, value in norm_values(student).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    torch.testing.assert_close(trained, student.eval()(images()), **EXACT)


@UNFOLDED
def test_norms_have_their_mode_again_after_a_forward_and_after_an_error(net: str) -> None:
    student = prepared(made(net)).train()
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[-1].eval()
    expected = [norm.training for norm in norms]
    student(images())
    assert [norm.training for norm in norms] == expected

    def fail(*_: Any) -> None:
        raise KeyError

    norms[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        student(images())
    assert [norm.training for norm in norms] == expected


# --------------------------------------------------------------------------------------------------
# Bad input


@dataclass
class Bad:
    """A call that must be refused: what it does to a model, and what the error must say."""

    call: Callable[[nn.Module], Any]
    error: type[TorchcapError]
    says: str
    make: Callable[[], nn.Module] = made
    change: Callable[[nn.Module], Any] = lambda model: model


def graph_of(model: nn.Module) -> torchcap.SpaceGraph:
    return torchcap.analyze(model, images())


def ratio(value: Any) -> Callable[[nn.Module], Any]:
    return lambda model: prepared(model, ratio=value)


def ranks(**by_name: Any) -> Callable[[nn.Module], Any]:
    named = {name.replace("_", "."): rank for name, rank in by_name.items()}
    return lambda model: prepared(model, plan=Plan.of(graph_of(model), named))


def example(value: Any) -> Callable[[nn.Module], Any]:
    return lambda model: torchcap.prepare(model, example_inputs=value)


def data(value: Any, init: Any = None) -> Callable[[nn.Module], Any]:
    return lambda model: prepared(model, data=value, init=init)


def plan_of(make: Callable[[], nn.Module]) -> Callable[[nn.Module], Any]:
    return lambda model: prepared(model, plan=Plan.uniform(graph_of(built(make))))


def spoil(path: str, value: float) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        model.state_dict()[path].flatten()[0] = value
        return model

    return change


def trained(model: nn.Module) -> nn.Module:
    return prepared(model).train()


def evaluated(model: nn.Module) -> nn.Module:
    student = prepared(model).eval()
    student(images())
    return student


ZEROS = torch.zeros(2, *images().shape[1:], dtype=torch.float64)
BAD: dict[str, Bad] = {
    # ratios and plans
    "ratio 0": Bad(ratio(0), PlanError, r"ratio.*0 < ratio <= 1.*got 0\b"),
    "ratio -1": Bad(ratio(-1), PlanError, r"ratio.*0 < ratio <= 1.*got -1"),
    "ratio 1.5": Bad(ratio(1.5), PlanError, r"ratio.*0 < ratio <= 1.*got 1\.5"),
    "ratio nan": Bad(ratio(math.nan), PlanError, r"ratio.*0 < ratio <= 1.*got nan"),
    "ratio 'a'": Bad(ratio("a"), PlanError, r"ratio.*0 < ratio <= 1.*got 'a'"),
    "ratio True": Bad(ratio(value=True), PlanError, r"ratio.*0 < ratio <= 1.*got True"),
    "ratio of a space": Bad(
        ratio({"block2.conv1": 2}), PlanError, r"0 < ratio <= 1.*got 2.*block2\.conv1"
    ),
    "ratio of no space": Bad(ratio({}), PlanError, r"names no space"),
    "unknown space": Bad(
        ratio({"block1.conf1": 0.5}), PlanError, r"'Residual'.*'block1\.conf1'.*'block1\.conv1'"
    ),
    "fixed space": Bad(
        ratio({"conv": 0.5}), PlanError, r"'conv'.*fixed.*residual stream.*leave it out"
    ),
    "rank above": Bad(ranks(block1_conv1=7), PlanError, r"'block1\.conv1'.*6 chan.*1\.\.6.*got 7"),
    "rank 0": Bad(ranks(block1_conv1=0), PlanError, r"'block1\.conv1'.*1\.\.6.*got 0"),
    "rank 2.5": Bad(ranks(block1_conv1=2.5), PlanError, r"'block1\.conv1'.*integer.*got 2\.5"),
    "rank of an unknown space": Bad(
        ranks(block1_conv3=2), PlanError, r"no channel space 'block1\.conv3'.*did you mean"
    ),
    "rank of a fixed space": Bad(ranks(conv=2), PlanError, r"'conv'.*fixed.*leave it out"),
    "plan of another class": Bad(
        plan_of(Plain), PlanError, r"'Residual'.*'features\.0'.*analyze\(model\)"
    ),
    "plan of other widths": Bad(
        plan_of(lambda: Residual(width=12)), PlanError, r"'block1\.conv1'.*\b6\b.*\b12\b.*make a"
    ),
    "plan that is none": Bad(
        lambda m: prepared(m, plan={"conv": 3}), PlanError, r"Plan.*got dict.*Plan\.of"
    ),
    # models
    "forward that cannot be traced": Bad(
        prepared,
        torchcap.NothingToCompressError,
        r"(?s)'BranchOfItsOwn'.*looks at the values of a tensor.*test_prepare.py",
        lambda: built(BranchOfItsOwn),
    ),
    "nothing to compress": Bad(
        lambda m: torchcap.prepare(m, example_inputs=torch.zeros(1, 4)),
        NothingToCompressError,
        r"'Sequential'.*\n.*0: output of the model",
        lambda: nn.Sequential(nn.Linear(4, 4)),
    ),
    "no parameters": Bad(prepared, NothingToCompressError, r"'ReLU' has no parameters", nn.ReLU),
    "frozen model": Bad(
        prepared,
        ModelError,
        r"17 parameters of 'Residual' are frozen.*requires_grad_\(True\)",
        change=lambda model: model.requires_grad_(requires_grad=False),
    ),
    "already prepared": Bad(
        prepared, ModelError, r"'Residual' is already prepared.*original model", change=prepared
    ),
    "NaN weight": Bad(
        prepared,
        ModelError,
        r"'block1\.conv2\.weight'.*NaN",
        change=spoil("block1.conv2.weight", math.nan),
    ),
    "infinite statistics": Bad(
        prepared,
        ModelError,
        r"'bn\.running_var'.*infinite",
        change=spoil("bn.running_var", math.inf),
    ),
    "meta device": Bad(
        prepared, ModelError, r"'conv\.weight'.*meta device.*load", change=lambda m: m.to("meta")
    ),
    "scripted": Bad(
        prepared,
        ModelError,
        r"ScriptModule'.*torch\.nn\.Module.*made from",
        change=torch.jit.script,
    ),
    "not a module": Bad(lambda _: prepared(F.relu), ModelError, r"torch\.nn\.Module.*a function"),
    # example inputs
    "example of other channels": Bad(
        example(torch.zeros(1, 4, 8, 8)), ExampleInputsError, r"'Residual'.*\(1, 4, 8, 8\).*pass"
    ),
    "example of two dimensions": Bad(
        example(torch.zeros(8, 8)), ExampleInputsError, r"'Residual'.*\(8, 8\).*pass"
    ),
    "two examples": Bad(example((ZEROS, ZEROS)), ExampleInputsError, r"Residual\.forward\(x: .*\)"),
    "example by a wrong name": Bad(example({"y": ZEROS}), ExampleInputsError, r"Residual.*'x'"),
    "example that is none": Bad(example("cat"), ExampleInputsError, r"a tensor.*got a str"),
    "missing example": Bad(
        torchcap.prepare, ExampleInputsError, r"'Residual'.*pass example_inputs=torch\.zeros"
    ),
    # data
    "no data": Bad(data([]), DataError, r"data is empty.*at least one batch"),
    "empty batch": Bad(data([ZEROS[:0]]), DataError, r"empty"),
    "NaN data": Bad(data([ZEROS, ZEROS + math.nan]), DataError, r"batch 1 .*NaN"),
    "infinite data": Bad(data([(ZEROS + math.inf, labels(2))]), DataError, r"batch 0 .*infinite"),
    "NaN data by name": Bad(data([{"x": ZEROS + math.nan}]), DataError, r"NaN"),
    "data of strings": Bad(data(["cat.png"]), DataError, r"batch must be a tensor.*got str"),
    "data that cannot be iterated": Bad(data(7), DataError, r"data.*int"),
    "data that is one tensor": Bad(data(ZEROS), DataError, r"batch"),
    "data of other channels": Bad(data([ZEROS[:, :2]]), DataError, r"batch 0.*\(2, 2, 8, 8\)"),
    "components without data": Bad(
        data(None, PrincipalComponents()), DataError, r"block1\.conv1.*Give data.*LargestNorm"
    ),
    "greedy without data": Bad(
        data(None, GreedySelection()), DataError, r"block1\.conv1.*data.*LargestNorm"
    ),
    # losses and results
    "loss before any forward": Bad(
        torchcap.reconstruction_loss, StudentError, r"run student\(x\) in training", change=trained
    ),
    "loss after an evaluation": Bad(
        torchcap.reconstruction_loss, StudentError, r"eval mode", change=evaluated
    ),
    "distillation before any forward": Bad(
        lambda m: torchcap.distillation_loss(m, ZEROS), StudentError, r"run student", change=trained
    ),
    "mixture before any forward": Bad(
        lambda m: torchcap.mixture_loss(m, torch.zeros(4, 5), labels()),
        StudentError,
        r"run student",
        change=trained,
    ),
    "loss of an unprepared model": Bad(
        torchcap.reconstruction_loss, StudentError, r"'Residual'.*torchcap\.prepare"
    ),
    "materialize an unprepared model": Bad(
        torchcap.materialize, StudentError, r"'Residual'.*torchcap\.prepare"
    ),
    "projections of an unprepared model": Bad(
        torchcap.projection_parameters, StudentError, r"'Residual'.*torchcap\.prepare"
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*:DeprecationWarning")
def test_masks_and_bounds_may_be_infinite() -> None:
    class Bounded(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
            self.register_buffer("bound", torch.tensor(math.inf))

        def forward(self, x: Tensor) -> Tensor:
            return torch.minimum(super().forward(x), self.bound)

    student = torchcap.prepare(Bounded().double(), example_inputs=images())
    assert torchcap.materialize(student)[0].out_channels == 2


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(case: str) -> None:
    bad = BAD[case]
    model = bad.change(bad.make())
    before = fingerprint(model)
    numbers = {} if "meta" in case else values(model)

    with pytest.raises(bad.error, match=f"(?s){bad.says}"):
        bad.call(model)
    assert fingerprint(model) == before
    for name, value in numbers.items():
        torch.testing.assert_close(value, values(model)[name], rtol=0, atol=0, equal_nan=True)


class WrongRank:
    def __call__(self, space: Any) -> Tensor:
        return torch.eye(space.channels, dtype=torch.float64)[None]


class NotOrthonormal:
    def __call__(self, space: Any) -> Tensor:
        return torch.ones(1, space.channels, space.rank, dtype=torch.float64)


@pytest.mark.parametrize("init", [WrongRank, NotOrthonormal])
def test_start_that_is_no_basis_of_the_planned_rank_is_refused(init: type) -> None:
    with pytest.raises(TorchcapError, match=r"block1\.conv1"):
        prepared(made(), init=init())


def test_every_error_is_also_the_builtin_that_a_user_would_catch() -> None:
    for error, builtin in [
        (torchcap.TraceError, RuntimeError),
        (ExampleInputsError, ValueError),
        (ModelError, ValueError),
        (NothingToCompressError, ModelError),
        (PlanError, ValueError),
        (DataError, ValueError),
        (StudentError, RuntimeError),
    ]:
        assert issubclass(error, builtin)
        assert issubclass(error, TorchcapError)


def test_deep_copy_of_a_student_is_refused_as_prepared_too() -> None:
    with pytest.raises(ModelError, match="already prepared"):
        prepared(copy.deepcopy(prepared(built(lambda: Residual(Block)))))
