"""Forwards in which numbers are written are rewritten, and compute what they did."""

from __future__ import annotations

import copy
import inspect
import io
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from proofs import permutation_error, random_plan, random_student, relative_difference
from small_nets import fingerprint
from torch import Tensor, fx, nn

import torchcap
from torchcap import Plan, Recipe, analyze, compress, load, materialize, prepare, save
from torchcap.errors import FileError
from torchcap.graph.rewritten import is_rewritten
from torchcap.graph.spaces import SpaceGraph

WIDTH, HEADS, TOKENS = 12, 3, 5


def tokens(count: int = 2, length: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, length, WIDTH, generator=generator, dtype=torch.float64)


class Attention(nn.Module):
    """Puts its heads side by side by the number of channels of its input, as most code does."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)
        self.label = ["kept"]

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)
        return self.drop(self.out(y.transpose(1, 2).reshape(B, N, C)))


class Called(Attention):
    """Is told how long its input is."""

    def forward(self, x: Tensor, length: int = 0, *, scale: float | None = None) -> Tensor:
        return super().forward(x)[:, :length] * (1.0 if scale is None else scale)


class Several(Attention):
    """Takes any number of arguments."""

    def forward(self, *x: Tensor) -> Tensor:
        return super().forward(x[0])


class Keeping(Attention):
    """Keeps what it has computed, for somebody who looks at it."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = super().forward(x)
        return self.seen * 1


class Writing(Attention):
    """Writes into its argument."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.add_(1)
        return y


class Looking(Attention):
    """Takes another way where its input is long."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if x.shape[1] > TOKENS + 1 else y


class AsksForDtype(Attention):
    """Makes a mask in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.zeros(x.shape[1], 1, dtype=x.dtype))


class Drops(Attention):
    """Draws from Python's generator whether to do anything."""

    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0 else super().forward(x)


class AsksForGradients(Attention):
    """Does something else where gradients are on."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if not torch.is_grad_enabled() else x


class Frozen(Attention):
    """Gives no gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Graphic(Attention):
    """Has attributes and parts with the names of those of a graph module."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = nn.Linear(WIDTH, WIDTH)
        self.code, self.meta = nn.Identity(), "of a place"

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self.graph(super().forward(x)))


class Own(Attention):
    """Has methods of its own, and is always in evaluation mode."""

    def widen(self, x: Tensor) -> Tensor:
        return x * 2

    def train(self, mode: bool = True) -> Own:  # noqa: FBT001, FBT002 - as in torch
        return super().train(False)  # noqa: FBT003

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 1}


class Scaled(Attention):
    """Has a parameter that runs along the channels of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH // HEADS) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v * self.gain)
        return self.out(y.transpose(1, 2).reshape(B, N, C))


class Parts(nn.Module):
    """Cuts what a layer puts out into pieces of written widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 10)
        self.left, self.right = nn.Linear(6, WIDTH), nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor | str]:
        left, right = self.first(x).relu().split([6, 4], dim=-1)
        return {"y": self.left(left) + self.right(right), "name": "parts"}


class Net(nn.Module):
    """A module between two layers."""

    def __init__(self, kind: Callable[[], nn.Module], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(WIDTH, WIDTH), kind(), nn.Linear(WIDTH, 4)
        self.args, self.kwargs = args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.stem(x), *self.args, **self.kwargs)
        return self.head(y["y"] if isinstance(y, dict) else y)


class Asking(Net):
    """Asks what its block is, and calls a method of it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block(x)
        return self.head(self.block.widen(x + y) if isinstance(self.block, Own) else y)


class Outer(nn.Module):
    """Holds a module with a number, and has one itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mix = Attention(), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.inner(x)).relu()
        return self.last(
            y.reshape(x.shape[0], -1, WIDTH // 2, 2).flatten(2).view(-1, TOKENS, WIDTH)
        )


def net(kind: Callable[[], nn.Module], *args: Any, outer: type[Net] = Net, **kwargs: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return outer(kind, *args, **kwargs).double().eval()


def free(graph: SpaceGraph) -> set[str]:
    return {space.name for space in graph.free}


def halved(model: nn.Module) -> nn.Module:
    return materialize(prepare(model, ratio=0.5, example_inputs=tokens()))


REWRITTEN: dict[str, tuple[Net, set[str]]] = {
    "heads side by side": (net(Attention), {"block.q", "block.v"}),
    "arguments": (net(Called, TOKENS, scale=2.0), {"block.q", "block.v"}),
    "pieces": (net(Parts), {"block.first", "block.first:2"}),
    "two of them": (net(lambda: nn.Sequential(Attention(), Attention())), {"block.1.v"}),
    "one in another": (net(Outer), {"block.inner.v"}),
    "names of graph modules": (net(Graphic), {"block.v"}),
    "a parameter along its heads": (net(Scaled), {"block.v"}),
    "asked what it is": (net(Own, outer=Asking), {"block.v"}),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_rewritten_forwards_compute_what_they_did(case: str) -> None:
    model, spaces = REWRITTEN[case]
    before = fingerprint(model)
    graph = analyze(model, tokens())
    assert spaces <= free(graph)
    assert permutation_error(model, graph.free, (tokens(),)) <= 1e-12
    student = random_student(model, random_plan(graph, 0), (tokens(),))
    small = materialize(student)
    for x in (tokens(), tokens(3), tokens(1)):
        assert relative_difference(small(x), student(x)) <= 1e-12
        assert relative_difference(copy.deepcopy(student)(x), student(x)) <= 1e-12
        assert relative_difference(pickled(small)(x), small(x)) <= 1e-12
    assert fingerprint(model) == before


def test_a_rewritten_module_is_of_its_own_class() -> None:
    model = net(Own, outer=Asking)
    small = halved(model)
    assert is_rewritten(small.block)
    for block in (small.block, pickled(small).block, copy.deepcopy(small).block):
        assert isinstance(block, Own)
        assert type(block).__name__ == "Own"
        assert not block.train().training
    assert torch.equal(small.block.widen(tokens()), 2 * tokens())
    assert small.state_dict().keys() == model.state_dict().keys()
    assert "width_0" in inspect.getsource(small.block.forward)
    small.block.label = "new"
    assert copy.deepcopy(small).block.label == "new"
    assert isinstance(small, Net)
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_other_lengths_are_no_matter() -> None:
    model = net(Attention)
    student = prepare(model, ratio=0.5, example_inputs=tokens())
    assert relative_difference(materialize(student)(tokens(2, 9)), student(tokens(2, 9))) <= 1e-12


def test_a_rewritten_module_keeps_what_it_holds_and_its_mode() -> None:
    model = net(Attention)
    model.block.q.bias.requires_grad_(requires_grad=False)
    small = halved(model)
    assert is_rewritten(small.block)
    assert small.block.label == ["kept"]
    assert not small.block.training
    assert not small.block.q.bias.requires_grad
    assert small.block.v.out_features == 6
    x = tokens()
    assert torch.equal(small(x), small(x))
    small.train()
    assert not torch.equal(small(x), small(x))  # dropout, in the attention and behind it
    with torch.no_grad():
        small.block.drop.p = 0.0
        assert not torch.equal(small(x), small(x))


def test_what_a_module_does_in_training_is_what_it_did() -> None:
    model = net(Attention)
    graph = analyze(model, tokens())
    (rewriting,) = graph.rewritings
    twin = rewriting.module_from(model.block)
    for training in (False, True):
        model.block.train(training), twin.train(training)
        torch.manual_seed(0)
        expected = model.block(tokens())
        torch.manual_seed(0)
        assert torch.equal(twin(tokens()), expected)
    model.eval()


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "way",
    [
        copy.deepcopy,
        pickled,
        lambda small: torch.compile(small, backend="eager"),
        lambda small: torch.export.export(small, (tokens(),)).module(),
        lambda small: fx.symbolic_trace(small.block) and small,
    ],
    ids=["copy", "pickle", "compile", "export", "trace"],
)
def test_a_small_model_goes_where_others_go(way: Callable[[nn.Module], nn.Module]) -> None:
    small = halved(net(Attention))
    torch.testing.assert_close(way(small)(tokens()), small(tokens()))


def test_a_small_model_can_be_compressed_again() -> None:
    once = halved(net(Attention))
    twice = halved(once)
    assert twice.block.v.out_features == 3
    student = prepare(once, ratio=0.5, example_inputs=tokens())
    assert relative_difference(materialize(student)(tokens()), student(tokens())) <= 1e-12


def test_an_argument_that_is_no_tensor_must_stay_what_it_was() -> None:
    small = halved(net(Called, TOKENS))
    x = small.stem(tokens())
    assert small.block(x, 3).shape[1] == 3  # an attribute of the model gave it, and still does
    with pytest.raises(AssertionError, match=r"argument scale had None in the example inputs"):
        small.block(x, TOKENS, scale=2.0)


def hooked() -> nn.Module:
    block = Attention()
    block.q.register_forward_hook(lambda module, args, output: None)
    return block


def patched() -> nn.Module:
    block = Attention()
    block.forward = block.forward  # type: ignore[method-assign]
    return block


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (hooked, r"'block\.q' has hooks"),
        (patched, "its forward has been replaced"),
        (Several, r"any number of arguments \(\*x\)"),
        (Keeping, r"is kept after the forward, as block\.seen"),
        (Writing, "writes into"),
        (Looking, "differs from call to call"),
        (AsksForDtype, "it asks for a dtype"),
        (Drops, "it draws random numbers of Python's"),
        (AsksForGradients, "it asks whether gradients are on"),
        (Frozen, "gradients are on|turns gradients on or off"),
    ],
)
def test_a_forward_that_cannot_be_rewritten_stays_and_says_why(
    kind: Callable[[], nn.Module], says: str
) -> None:
    model = net(kind)
    graph = analyze(model, tokens())
    assert "block.v" not in free(graph)
    (note,) = graph.notes
    assert note.startswith("the forward of 'block' cannot be rewritten: ")
    assert re.search(says, note)
    student = prepare(model, ratio=0.5, streams=True, example_inputs=tokens())
    small = materialize(student)
    assert type(small.block) is type(model.block)
    with torch.no_grad():
        assert relative_difference(small(tokens()), student(tokens())) <= 1e-12


def test_leaves_leave_a_forward_as_it_is() -> None:
    graph = analyze(net(Attention), tokens(), leaves=[Attention])
    assert not graph.rewritings
    assert free(graph) == set()


def test_a_new_forward_that_fails_a_proof_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = torchcap.graph.rewritten.Rewriting.module_from

    def broken(self: Any, module: nn.Module) -> nn.Module:
        twin = wrong(self, module)
        forward = twin.forward
        twin.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
        return twin

    monkeypatch.setattr(torchcap.graph.rewritten.Rewriting, "module_from", broken)
    graph = analyze(net(Attention), tokens())
    assert not graph.rewritings
    assert "it would compute something else in evaluation mode" in " ".join(graph.notes)


def test_closed_forms_solve_a_model_with_rewritten_forwards() -> None:
    model = net(Attention)
    data = [tokens(4) + n for n in range(4)]
    small = compress(model, data, ratio=0.5, recipe=Recipe.seconds())
    assert is_rewritten(small.block)
    by_weight = halved(model)
    expected = torch.cat([model(x) for x in data])
    errors = [
        relative_difference(torch.cat([m(x) for x in data]), expected) for m in (small, by_weight)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_a_file_of_a_model_with_rewritten_forwards(tmp_path: Path) -> None:
    small = halved(net(Attention))
    path = tmp_path / "small.safetensors"
    save(small, path)
    fresh = net(Attention)
    with pytest.raises(FileError, match=r"forward of 'block' was rewritten.*example_inputs="):
        load(path, fresh)
    loaded = load(path, fresh, example_inputs=tokens())
    assert torch.equal(loaded(tokens()), small(tokens()))
    assert type(fresh.block) is Attention
    with pytest.raises(FileError, match=r"holds another model"):
        load(path, net(Looking), example_inputs=tokens())


def test_a_copy_of_a_student_has_its_losses() -> None:
    student = prepare(net(Attention), ratio=0.5, example_inputs=tokens())
    twin = copy.deepcopy(student).train()
    twin(tokens())
    assert torchcap.reconstruction_loss(twin).item() > 0


def test_hooks_of_graph_modules_stay() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 4)))
    model.double().register_forward_hook(lambda module, args, output: 2 * output)
    student = prepare(model, ratio=1.0, example_inputs=tokens())
    assert relative_difference(student(tokens()), model(tokens())) <= 1e-12


def test_a_student_with_rewritten_forwards_comes_back(tmp_path: Path) -> None:
    model = net(Attention)
    student = prepare(model, ratio=0.5, example_inputs=tokens())
    save(student, tmp_path / "student.safetensors")
    loaded = load(tmp_path / "student.safetensors", model, example_inputs=tokens())
    assert torch.equal(loaded(tokens()), student.eval()(tokens()))


@pytest.mark.parametrize("name", ["stem", "m.qkv", ""])
def test_a_stream_may_be_cut_where_heads_are_not(name: str) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.m, self.head = nn.Linear(12, 12), Heads(), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((x + self.m(x)).mean(1))

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, 3, c // 3).permute(2, 0, 3, 1, 4)
            weights = (q @ k.mT * 0.5).softmax(-1)
            return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))

    model, x = Whole().double().eval(), torch.randn(2, 10, 12, dtype=torch.float64)
    graph = analyze(model, x, streams=True)
    plan = Plan.of(graph, {s.name: s.channels // 2 for s in graph.free if s.name.startswith(name)})
    student = prepare(model, plan=plan, streams=True, example_inputs=x).eval()
    assert relative_difference(materialize(student)(x), student(x)) <= 1e-12
    assert sum(p.numel() for p in materialize(student).parameters()) < 880


def test_a_file_of_a_model_that_lost_channels_of_its_streams(tmp_path: Path) -> None:
    model = net(Attention)
    student = prepare(model, ratio=0.5, streams=True, example_inputs=tokens())
    small = materialize(student)
    save(small, tmp_path / "small.safetensors")
    loaded = load(tmp_path / "small.safetensors", net(Attention), example_inputs=tokens())
    assert torch.equal(loaded(tokens()), small(tokens()))


def test_hooks_of_a_loaded_model_fill_what_those_of_the_fresh_one_do(tmp_path: Path) -> None:
    def hooked() -> tuple[Net, dict[str, Tensor]]:
        model, seen = net(Attention), {}
        model.head.register_forward_hook(lambda module, args, y: seen.update(y=y))
        return model, seen

    model, ours = hooked()
    small = materialize(prepare(model, ratio=0.5, example_inputs=tokens()))
    y = small(tokens())
    assert torch.equal(ours["y"], y)
    save(small, tmp_path / "small.safetensors")
    fresh, theirs = hooked()
    loaded = load(tmp_path / "small.safetensors", fresh, example_inputs=tokens())
    assert torch.equal(loaded(tokens()), y)
    assert torch.equal(theirs["y"], y)


class Divided(Attention):
    """Divides scores by the root of its width after the product, and drops whole blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = WIDTH // HEADS

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], HEADS, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1)) / self.head_dim**0.5
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        if self.training:
            y = y * torch.rand(y.shape[0], 1, 1).round()
        return self.out(y)


def test_scores_that_are_divided_later_are_so_in_both_modes() -> None:
    model = net(Divided)
    graph = analyze(model, tokens())
    assert "block.q" in free(graph), str(graph)
    student = random_student(model, random_plan(graph, 0), (tokens(),))
    assert relative_difference(materialize(student)(tokens()), student(tokens())) <= 1e-12
