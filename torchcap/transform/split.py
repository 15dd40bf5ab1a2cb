"""``split_attention()``: from an attention that is one module to layers that can be compressed."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcap.errors import ModelError
from torchcap.graph.copies import copied, hand_over_
from torchcap.modes import outside_inference_mode

M = TypeVar("M", bound=nn.Module)


@outside_inference_mode
def split_attention(model: M) -> M:
    """Return a copy of a model whose ``nn.MultiheadAttention`` is made of layers of its own.

    An ``nn.MultiheadAttention`` computes with the weights of all its projections together, so its
    channels stay. The copy computes the same, and its heads can be compressed like those of timm's
    networks: queries with keys, and values, equally many channels of every head.

    Args:
        model: any module; it is not changed. Subclasses of ``nn.MultiheadAttention`` stay.

    Raises:
        ModelError: if there is no such attention, or one with ``add_bias_kv`` or ``add_zero_attn``.

    Examples:
        >>> import torchvision, torchcap
        >>> model = torchcap.split_attention(torchvision.models.vit_b_32())
        >>> type(model.encoder.layers[0].self_attention).__name__
        'SplitAttention'
    """
    found = [(p, m) for p, m in model.named_modules() if type(m) is nn.MultiheadAttention]
    if not found:
        raise ModelError(
            f"{type(model).__name__!r} has no nn.MultiheadAttention that could be split; compress "
            "it as it is"
        )
    for path, attention in found:
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ModelError(
                f"{path!r} adds entries of its own to keys and values (add_bias_kv, "
                "add_zero_attn), and cannot be split"
            )
    memo = {id(attention): SplitAttention(attention) for _, attention in found}
    split = copied(model, memo)
    hand_over_(split, model)
    return split


class SplitAttention(nn.Module):
    """Computes what an ``nn.MultiheadAttention`` does, by a linear layer for each projection.

    Args:
        attention: whose weights the layers start with.
    """

    in_proj_bias = None  # so that the layers of torch take no shortcut around this module

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.batch_first = attention.num_heads, attention.batch_first
        self.dropout = attention.dropout
        self.scale = attention.head_dim**-0.5  # of the original heads, whatever becomes of them
        if attention._qkv_same_embed_dim:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        whole = attention.in_proj_bias
        biases = (None, None, None) if whole is None else whole.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002 - as nn.MultiheadAttention has them
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and the weights, or None for them; see ``nn.MultiheadAttention``.

        Args:
            query: ``(batch, queries, width)`` with ``batch_first``, ``(queries, batch, width)``
                without, or ``(queries, width)`` of one sequence.
            key: likewise, of ``keys`` entries and a width of its own.
            value: likewise.
            key_padding_mask: ``(batch, keys)``, true where a key is left out, or numbers to add.
            need_weights: whether to return the weights, ``(batch, queries, keys)``.
            attn_mask: ``(queries, keys)`` or ``(batch * heads, queries, keys)``, likewise.
            average_attn_weights: whether weights are means over the heads; else they have an axis
                for them, behind the batch.
            is_causal: a hint that ``attn_mask`` is causal.
        """
        q = self._split(self.q_proj(query))
        k = self._split(self.k_proj(key))
        v = self._split(self.v_proj(value))
        mask = self._mask(attn_mask, key_padding_mask, like=q)
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            heads = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=is_causal and mask is None, scale=self.scale
            )
            return self.out_proj(self._joined(heads)), None
        scores = (q * self.scale) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout)
        shown = weights.mean(-3) if average_attn_weights else weights
        return self.out_proj(self._joined(weights @ v)), shown

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, *, like: Tensor
    ) -> Tensor | None:
        """Return one mask to add to scores ``(batch, heads, queries, keys)``."""
        mask = None if attn_mask is None else _added(attn_mask, like)
        if mask is not None and mask.dim() == 3:  # the heads of one image after the other
            mask = mask.unflatten(0, (-1, self.num_heads))  # type: ignore[no-untyped-call]
        if key_padding_mask is None:
            return mask
        padding = _added(key_padding_mask, like).unsqueeze(-2).unsqueeze(-2)
        return padding if mask is None else padding + mask

    def _split(self, x: Tensor) -> Tensor:
        """``(…, channels)`` to ``(batch, heads, positions, channels of a head)``."""
        x = x.unflatten(-1, (self.num_heads, -1))  # type: ignore[no-untyped-call]
        return x.transpose(-3, -2) if self.batch_first else x.movedim(0, -2)

    def _joined(self, x: Tensor) -> Tensor:
        x = x.transpose(-3, -2) if self.batch_first else x.movedim(-2, 0)
        return x.flatten(-2)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            copied = tensor.detach().clone()
            setattr(layer, name, nn.Parameter(copied, requires_grad=tensor.requires_grad))
    return layer


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as numbers to add; where it says "no" instead, minus infinity."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
