"""``materialize()``: from a prepared model to plain, smaller layers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from torchcap.graph.copies import HOOKS, copied, hand_over_, ready_copies
from torchcap.modes import outside_inference_mode
from torchcap.projection.maps import shared_bases
from torchcap.projection.parametrizations import ProjectAxis
from torchcap.transform.student import Student, attachments, student_of, unwrapped

M = TypeVar("M", bound=nn.Module)


@outside_inference_mode
@torch.no_grad()
def materialize(student: M) -> M:
    """Return a new model with plain, smaller layers that computes what the student computes.

    The student is not changed and can train on. The result is an instance of the user's class (of
    a ``GraphModule`` a ``GraphModule``, with the nodes of folded norms erased), in the student's
    mode; equal to the student in evaluation mode up to rounding. Nothing of torchcap is left in
    it. Its parameters are trainable where those of the original model were.

    Args:
        student: what :func:`torchcap.prepare` returned.

    Raises:
        StudentError: if the model is not a prepared one.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 3.3, eq. 8: the projections on
        both sides of a layer become part of its kernel, and no reprojection layer is left.
    """
    root = unwrapped(student)
    state = student_of(root)
    memo = ready_copies(root)
    hung = {id(a): a for module in root.modules() for a in attachments(module)}
    # A stand-in for each attachment, so that copying does not copy a teacher along.
    stand_ins = {key: object() for key in hung}
    memo.update(stand_ins)
    projected = [module for module in root.modules() if _is_projected(module)]
    for module in projected:  # all of them first: a hook of one may lead to the root, and to others
        memo[id(module)] = object.__new__(type(module).__bases__[0])
    with shared_bases(list(state.projections.values())):
        for module in projected:
            _fill_(memo[id(module)], module, memo)
    small = copied(root, memo)
    for module in small.modules():
        _strip(module, set(map(id, stand_ins.values())))
    hand_over_(small, root)
    _restore_flags_(small, state)
    erase_identities_(small, [f.norm for f in state.folds if f.norm is not None])
    return small  # type: ignore[return-value]


def _is_projected(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) and any(
        isinstance(parametrization, ProjectAxis)
        for chain in module.parametrizations.values()  # type: ignore[operator]
        for parametrization in chain
    )


def _fill_(plain: nn.Module, module: nn.Module, memo: dict[int, Any]) -> None:
    """Let a layer of the class that ``module`` had hold what that holds, and the projected tensors.

    Deep-copying a parametrized module would share the class that was injected into it, properties
    and all; so the layer is put together from its parts.
    """
    projected: Any = module.parametrizations
    plain.__dict__.update(
        {
            name: copy.deepcopy(value, memo)
            for name, value in module.__dict__.items()
            if name not in {"_parameters", "_buffers", "_modules"}
        }
    )
    children = [(n, child) for n, child in module._modules.items() if n != "parametrizations"]
    plain._modules = {name: copy.deepcopy(child, memo) for name, child in children}
    plain._parameters, plain._buffers = {}, {}
    names = [*module._parameters, *module._buffers, *projected]
    for name in sorted(names, key=lambda name: name != "weight"):  # torch's order, weight first
        if name in projected:
            original = projected[name].original
            value: Tensor | None = _laid_out(getattr(module, name), original)
            trained = isinstance(original, nn.Parameter)
            if "original" in projected[name]._non_persistent_buffers_set:
                plain._non_persistent_buffers_set.add(name)
            value = nn.Parameter(value) if trained else value  # type: ignore[arg-type]
        else:
            value = copy.deepcopy(getattr(module, name), memo)
            trained = name in module._parameters
        (plain._parameters if trained else plain._buffers)[name] = value  # type: ignore[assignment]


def _laid_out(tensor: Tensor, original: Tensor) -> Tensor:
    """Return a copy with the memory format of the tensor that it was projected from."""
    last = original.dim() == 4 and not original.is_contiguous()
    if last and original.is_contiguous(memory_format=torch.channels_last):
        return tensor.detach().clone(memory_format=torch.channels_last)
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _strip(module: nn.Module, stand_ins: set[int]) -> None:
    """Remove the hooks whose owner is a stand-in."""
    gone = {
        key
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in hooks.items()
        if id(getattr(hook, "__self__", None)) in stand_ins
    }
    for name in HOOKS:
        hooks: OrderedDict[int, Any] = getattr(module, name)
        for key in gone:
            hooks.pop(key, None)


def _restore_flags_(small: nn.Module, state: Student) -> None:
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(state.trainable.get(name, True))


def erase_identities_(graph_module: nn.Module, paths: Iterable[str]) -> None:
    """Erase the nodes of folded norms that left nothing behind, and the modules with them.

    A model that is no ``GraphModule`` keeps its identities: its forward calls them.
    """
    if not isinstance(graph_module, fx.GraphModule):
        return
    gone = {path for path in paths if isinstance(graph_module.get_submodule(path), nn.Identity)}
    for node in graph_module.graph.find_nodes(op="call_module"):
        if node.target in gone:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    for path in gone:
        graph_module.delete_submodule(path)
    graph_module.graph.lint()
    graph_module.recompile()
