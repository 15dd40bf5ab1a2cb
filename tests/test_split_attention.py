"""An attention of torch, taken apart: the same function, whose heads can be compressed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from proofs import (
    identity_error,
    materialize_error,
    permutation_error,
    random_plan,
    random_student,
    randomize_,
)
from torch import Tensor, nn

import torchcap
from torchcap import ModelError, analyze, compress, cost, materialize, split_attention
from torchcap.transform.split import SplitAttention

OPTIONS = [
    {"batch_first": first, "bias": bias, **widths}
    for first in (True, False)
    for bias in (True, False)
    for widths in ({}, {"kdim": 6, "vdim": 4})
]


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(8, 2, **options).double().eval()
    randomize_(made, torch.Generator().manual_seed(1))
    return made


def tensors(made: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of three images, with five queries and seven keys."""
    generator = torch.Generator().manual_seed(2)
    widths = {"generator": generator, "dtype": torch.float64}
    found = [
        torch.randn(3, count, width, **widths)
        for count, width in ((5, 8), (7, made.kdim), (7, made.vdim))
    ]
    q, k, v = found if made.batch_first else (x.transpose(0, 1) for x in found)
    return q, k, v


PADDING = torch.arange(7).expand(3, -1) > 4
CAUSAL = torch.ones(5, 7, dtype=torch.bool).triu(3)
MASKS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "padding": {"key_padding_mask": PADDING},
    "a mask": {"attn_mask": CAUSAL},
    "numbers to add": {"attn_mask": CAUSAL * torch.tensor(-2.0, dtype=torch.float64)},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
    "a hint": {"attn_mask": torch.ones_like(CAUSAL).triu(1), "is_causal": True},
    "one for each head": {"attn_mask": CAUSAL.expand(6, -1, -1)},
    "one for each head, and padding": {
        "attn_mask": CAUSAL.expand(6, -1, -1), "key_padding_mask": PADDING
    },
}  # fmt: skip


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("shown", ["nothing", "averages", "heads"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_is_computed(options: dict[str, Any], shown: str, masks: str) -> None:
    made = attention(**options)
    wishes = {"need_weights": shown != "nothing", "average_attn_weights": shown == "averages"}
    how = {**wishes, **MASKS[masks]}
    expected = made(*tensors(made), **how)
    found = SplitAttention(made)(*tensors(made), **how)
    torch.testing.assert_close(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)
    if shown != "nothing":
        torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("first", [True, False])
def test_one_sequence_without_a_batch(*, first: bool) -> None:
    made = attention(batch_first=first)
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(SplitAttention(made)(x, x, x), made(x, x, x))


def test_weights_drop_out_in_training_alone() -> None:
    made = attention(batch_first=True, dropout=0.5)
    split = SplitAttention(made).train()
    q, k, v = tensors(made)
    assert not torch.equal(split(q, k, v)[0], made(q, k, v)[0])
    torch.testing.assert_close(split.eval()(q, k, v), made(q, k, v))


class Network(nn.Module):
    """Torch's own encoder, a cross attention, and one that is registered twice."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.again = self.cross
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.head(self.cross(x[:, :2], x, x, need_weights=False)[0])


def inputs() -> tuple[Tensor]:
    return (torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64),)


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    made = Network().double().eval()
    randomize_(made, torch.Generator().manual_seed(1))
    return made


def test_networks_compute_the_same_and_keep_their_model(model: Network) -> None:
    before = copy.deepcopy(model.state_dict())
    split = split_attention(model)
    torch.testing.assert_close(split(*inputs()), model(*inputs()))
    with torch.no_grad():  # where torch takes a shortcut
        torch.testing.assert_close(split(*inputs()), model(*inputs()))
    assert split.cross is split.again
    assert type(model.cross) is nn.MultiheadAttention
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert not {p.data_ptr() for p in split.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }


def test_heads_are_compressed_and_proven(model: Network) -> None:
    del model.again
    split = split_attention(model)
    graph = analyze(split, inputs())
    free = {space.name for space in graph.free}
    assert {f"encoder.layers.{n}.self_attn.v_proj" for n in range(2)} <= free
    assert {"cross.q_proj", "cross.v_proj", "encoder.layers.0.self_attn.q_proj"} <= free
    student = random_student(split, random_plan(graph, 1), inputs())
    assert permutation_error(split, graph.free, inputs()) < 1e-10
    assert identity_error(split, inputs()) < 1e-10
    assert materialize_error(student, inputs()) < 1e-10
    assert materialize(student).cross.scale == 0.5  # of the original heads, of four channels
    assert cost(graph).macs == cost(analyze(model, inputs())).macs


def test_files_split_the_model_that_they_are_put_into(model: Network, tmp_path: Path) -> None:
    del model.again
    small = compress(split_attention(model), example_inputs=inputs(), ratio=0.5)
    torchcap.save(small, tmp_path / "small.safetensors")
    fresh = Network().double()
    del fresh.again
    loaded = torchcap.load(tmp_path / "small.safetensors", model=fresh)
    assert torch.equal(loaded(*inputs()), small(*inputs()))


def test_frozen_attention_stays_frozen() -> None:
    made = attention()
    made.requires_grad_(requires_grad=False)
    assert not any(p.requires_grad for p in SplitAttention(made).parameters())


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_entries_of_its_own_are_refused(options: dict[str, bool]) -> None:
    net = nn.ModuleDict({"attend": attention(**options)})
    with pytest.raises(ModelError, match="'attend' adds entries"):
        split_attention(net)


def test_model_without_such_attention_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'Linear' has no nn\.MultiheadAttention"):
        split_attention(nn.Linear(2, 2))


def test_reading_says_what_to_do(model: Network) -> None:
    graph = analyze(nn.Sequential(nn.Linear(8, 8), Wrapped()), torch.zeros(1, 5, 8))
    assert "torchcap.split_attention(model)" in graph["0"].reason


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x)[0]
