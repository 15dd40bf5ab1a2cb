"""Which normalisations can be folded into the layer before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence, Set

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from torchcap.graph.rules import STANDARDIZED, Target, find_operator
from torchcap.graph.spaces import Fold
from torchcap.graph.trace import Traced
from torchcap.graph.values import Operator
from torchcap.graph.weights import output_axis

Operators = Mapping[Target, Operator]


def find_folds(
    graphs: Sequence[Traced],
    entangled: Collection[str],
    asked: Collection[str],
    operators: Operators,
) -> tuple[Fold, ...]:
    """Find the batch norms that fold into a layer, and the layers with weight standardisation.

    A batch norm folds where in every graph it directly follows its layer, is the layer's only
    reader, and both are called once: then the pair is one affine map per output channel.

    Args:
        graphs: the graphs of one model.
        entangled: modules whose tensors have another owner or another reader; they don't fold.
        asked: modules whose attributes others read; they don't become something else.
        operators: what is known of operators.
    """
    entangled, asked = set(entangled), set(asked)
    pairs = [dict(_pairs(graph, entangled, asked, operators)) for graph in graphs]
    used = [_calls(graph) for graph in graphs]
    folds: dict[str, Fold] = {}
    for graph, found in zip(graphs, pairs, strict=True):
        for layer, norm in found.items():
            agree = all(
                other.get(layer) == norm or not (calls[layer] or calls[norm])
                for other, calls in zip(pairs, used, strict=True)
            )
            if agree:
                folds[layer] = Fold(layer, norm, output_axis(graph.model.get_submodule(layer)))
        for node in graph.graph.find_nodes(op="call_module"):
            layer = str(node.target)
            module = graph.module(node)
            known = find_operator(node, module, operators)
            standard = isinstance(module, STANDARDIZED) and _foldable(module)
            own = layer not in entangled | asked
            if standard and own and known and known.kind == "convolution":
                folds.setdefault(layer, Fold(layer, None))
    return tuple(folds.values())


def _calls(graph: Traced) -> Counter[str]:
    return Counter(str(node.target) for node in graph.graph.find_nodes(op="call_module"))


def _pairs(
    graph: Traced, entangled: Set[str], asked: Set[str], operators: Operators
) -> Iterator[tuple[str, str]]:
    calls = _calls(graph)
    for node in graph.graph.find_nodes(op="call_module"):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        names = {str(node.target), str(source.target)}
        if names & entangled or str(node.target) in asked or source in graph.kept:
            continue
        norm, layer = graph.module(node), graph.module(source)
        if calls[str(node.target)] > 1 or calls[str(source.target)] > 1:
            continue
        kinds = [
            None if found is None else found.kind
            for found in (find_operator(n, graph.module(n), operators) for n in (source, node))
        ]
        if kinds[1] != "batch norm" or not _has_statistics(norm):
            continue
        result = source.meta.get("val")
        flat = kinds[0] == "linear" and isinstance(result, Tensor) and result.dim() == 2
        single = kinds[0] == "transposed convolution" and getattr(layer, "groups", 0) == 1
        if (kinds[0] == "convolution" or single or flat) and _foldable(layer):
            yield str(source.target), str(node.target)


def _has_statistics(norm: nn.Module | None) -> bool:
    return _foldable(norm) and getattr(norm, "running_mean", None) is not None


def _foldable(module: nn.Module | None) -> bool:
    """Whether a module's tensors are its own, not computed by a parametrization or a hook."""
    if module is None:
        return False
    held = {**module._parameters, **module._buffers}
    own = all(getattr(module, n, None) is held.get(n) for n in ("weight", "bias"))
    return own and not parametrize.is_parametrized(module)
