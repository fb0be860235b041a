"""A Llama in 100 lines of torch, small enough to read in one sitting and to train on a laptop CPU.

The mathematics and the parameter names are those of Hugging Face's LlamaForCausalLM (rotate-half rope, grouped
key/value heads, SwiGLU, RMSNorm, tied embeddings), so that its state dictionary *is* the checkpoint.
It does not generate text: the trained checkpoint is converted to GGUF, and llama.cpp runs it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100  # a target that counts for nothing
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Shape:
    """The numbers of `config.json`; every row length is a multiple of 256, so that k-quants divide it."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 4,  # <|im_end|>, the fifth piece of the tokenizer
        }


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rope as Hugging Face stores it: element i of a head turns with element i + head_dim/2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):  # type: ignore[misc]
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        keys = shape.num_key_value_heads * shape.head_dim
        self.q_proj = linear(shape.hidden_size, shape.hidden_size)
        self.k_proj = linear(shape.hidden_size, keys)
        self.v_proj = linear(shape.hidden_size, keys)
        self.o_proj = linear(shape.hidden_size, shape.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        query, key, value = (
            projected.view(batch, length, -1, self.shape.head_dim).transpose(1, 2)  # (batch, heads, length, head_dim)
            for projected in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
        key, value = rotate(key, cos, sin).repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        mixed = F.scaled_dot_product_attention(rotate(query, cos, sin), key, value, attn_mask=visible)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, hidden))


class FeedForward(nn.Module):  # type: ignore[misc]
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = linear(shape.hidden_size, shape.intermediate_size)
        self.up_proj = linear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, shape: Shape, dropout: nn.Dropout) -> None:
        super().__init__()
        self.dropout = dropout
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, visible))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Body(nn.Module):  # type: ignore[misc]
    """Everything that Hugging Face names `model.*`: embedding, layers, last norm."""

    def __init__(self, shape: Shape, dropout: nn.Dropout) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)


class Llama(nn.Module):  # type: ignore[misc]
    """The whole model; the embedding is also the output head.

    Attributes:
        dropout: its `p` is the share of what the embedding and the halves of layers give that is left out in training.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = nn.Dropout(0.0)
        self.model = Body(shape, self.dropout)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # the matrices that write into the residual stream start smaller, the deeper the model (as in GPT-2)
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.num_hidden_layers) if writes else 0.02)

    def hidden(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """tokens (batch, length), visible (batch, 1, length, length) -> last hidden states (batch, length, hidden)."""
        steps = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32) / self.shape.head_dim
        angles = torch.outer(torch.arange(tokens.shape[1], dtype=torch.float32), self.shape.rope_theta**-steps)
        cos, sin = angles.cos(), angles.sin()  # (length, head_dim / 2)
        x = self.dropout(self.model.embed_tokens(tokens))
        for layer in self.model.layers:
            x = layer(x, cos, sin, visible)
        return self.model.norm(x)

    def loss(self, tokens: Tensor, visible: Tensor, wanted: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens marked in `wanted` (batch, length), each predicted from those before it."""
        # Logits are computed for all places, wanted or not: shapes that never change are what CPU kernels like.
        logits = F.linear(self.hidden(tokens, visible)[:, :-1], self.model.embed_tokens.weight)
        targets = tokens[:, 1:].masked_fill(~wanted[:, 1:], IGNORED)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def grown(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A state dictionary with more layers that computes the same.

    After each layer come copies of it whose outputs into the residual stream are zero, so that they add nothing until
    they are trained.

    Args:
        layers: a multiple of the layers that there are.
    """
    found: dict[str, Tensor] = {}
    count = 1 + max(int(match[1]) for match in map(LAYER.fullmatch, weights) if match)
    for name, weight in weights.items():
        match = LAYER.fullmatch(name)
        if match is None:
            found[name] = weight
            continue
        for copy in range(layers // count):
            silent = copy > 0 and match[2] in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            place = int(match[1]) * (layers // count) + copy
            found[f"model.layers.{place}.{match[2]}"] = torch.zeros_like(weight) if silent else weight.clone()
    return found
