"""What stands in for modules while shapes are found: it has their shapes, and then it is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_map
from torchvision.ops import nms

from torchcap.graph.stand_ins import OPERATORS, SHAPES, plain_transformers

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "norm of features": (lambda: nn.BatchNorm1d(4), (3, 4)),
    "norm of images": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 6)),
    "norm of clips": (lambda: nn.BatchNorm3d(4), (3, 4, 2, 5, 6)),
    "norm with an activation": (lambda: BatchNormAct2d(4, act_layer=nn.GLU), (3, 4, 5, 6)),
    "recurrent": (lambda: nn.RNN(4, 5, 2), (7, 3, 4)),
    "recurrent, batch first": (lambda: nn.GRU(4, 5, batch_first=True), (3, 7, 4)),
    "recurrent both ways": (lambda: nn.LSTM(4, 5, 2, bidirectional=True), (7, 3, 4)),
    "recurrent, projected": (lambda: nn.LSTM(4, 5, proj_size=3, batch_first=True), (3, 7, 4)),
    "recurrent, one sequence": (lambda: nn.LSTM(4, 5), (7, 4)),
}


def shapes(value: Any) -> Any:
    return tree_map(lambda v: (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v, value)


@pytest.mark.parametrize("case", CASES)
def test_a_stand_in_gives_the_shapes_of_its_module(case: str) -> None:
    make, shape = CASES[case]
    module, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    expected = shapes(module(x))
    stand_in = SHAPES[type(module)]
    assert shapes(stand_in(module, x)) == expected
    named = {"input": x} if type(module).__module__.startswith("torch.") else {"x": x}
    assert shapes(stand_in(module, **named)) == expected


def test_packed_sequences_are_computed() -> None:
    module = nn.GRU(4, 5).eval()
    packed = pack_sequence([torch.randn(6, 4), torch.randn(3, 4)])
    expected, _ = module(packed)
    found, _ = SHAPES[nn.GRU](module, packed)
    assert torch.equal(found.data, expected.data)


def test_switches_are_as_before_after_an_error() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError), plain_transformers():
        _ = 1 / torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize(("count", "apart"), [(2500, 10.0), (1500, 1.0)])
def test_boxes_are_kept_as_if_many_of_them_did_not_overlap(count: int, apart: float) -> None:
    corner = apart * torch.arange(float(count))[:, None]
    boxes, scores = torch.cat([corner, corner, corner + 5, corner + 5], dim=1), torch.rand(count)
    found = OPERATORS["torchvision.nms.default"](nms, boxes, scores, 0.5)
    assert torch.equal(found, nms(boxes, scores, 0.5))
