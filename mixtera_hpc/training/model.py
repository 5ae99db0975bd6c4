"""A small GPT: pre-norm blocks, rotary positions, tied embeddings; it returns the loss of every token, not a mean.

Which tokens count and how losses are averaged is the trainer's business: a mean taken here would be wrong as soon as ranks or
micro-batches count different numbers of tokens. Price: the logits of one micro-batch, (B, T, vocabulary) floats, are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention

from mixtera_hpc.config.schema import TrainingConfig

__all__ = ["GPT", "GPTConfig", "build_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """The sizes of a GPT."""

    num_layers: int
    num_heads: int
    embedding_dim: int
    """A multiple of 2 × `num_heads`."""
    vocab_size: int
    seq_len: int
    """Predicted tokens of the longest sequence."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, shape: GPTConfig) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.qkv = nn.Linear(shape.embedding_dim, 3 * shape.embedding_dim, bias=False)
        self.out = nn.Linear(shape.embedding_dim, shape.embedding_dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        b, t, d = x.shape
        heads = self.qkv(x).view(b, t, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = _rotate(heads[0], rotation), _rotate(heads[1], rotation)
        y = scaled_dot_product_attention(q, k, heads[2], is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to what came in."""

    def __init__(self, shape: GPTConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(shape.embedding_dim, bias=False)
        self.attention = Attention(shape)
        self.norm_feed = nn.LayerNorm(shape.embedding_dim, bias=False)
        self.up = nn.Linear(shape.embedding_dim, 4 * shape.embedding_dim, bias=False)
        self.down = nn.Linear(4 * shape.embedding_dim, shape.embedding_dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x), rotation)
        return x + self.down(gelu(self.up(self.norm_feed(x)), approximate="tanh"))


class GPT(nn.Module):
    """Tokens (B, T + 1) in, the loss of each of the T predictions out."""

    rotation: Tensor

    def __init__(self, shape: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.embedding_dim)
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape.num_layers)])
        self.norm = nn.LayerNorm(shape.embedding_dim, bias=False)
        self.register_buffer("rotation", _rotation(shape), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Plain cross-entropy in nats; int64 (B, T + 1) → float32 (B, T)."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.embedding(inputs)
        for block in self.blocks:
            x = block(x, self.rotation[: inputs.shape[1]])
        logits = linear(self.norm(x), self.embedding.weight)
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def build_model(training: TrainingConfig, vocab_size: int, seq_len: int) -> GPT:
    """A GPT whose initial weights depend on `training.seed` and its sizes alone: the same on every rank, on every device."""
    shape = GPTConfig(
        num_layers=training.num_layers,
        num_heads=training.num_heads,
        embedding_dim=training.embedding_dim,
        vocab_size=vocab_size,
        seq_len=seq_len,
    )
    model = GPT(shape)
    _initialise(model, training.seed, shape.num_layers)
    return model


def _initialise(model: GPT, seed: int, num_layers: int) -> None:
    """GPT-2's: normal with 0.02, and narrower by sqrt(2 × layers) where a block adds to the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    residual_std = 0.02 / (2 * num_layers) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
            else:
                std = residual_std if name.endswith(("out.weight", "down.weight")) else 0.02
                parameter.normal_(0.0, std, generator=generator)


def _rotation(shape: GPTConfig) -> Tensor:
    """Cosines and sines of every position's angles (RoPE, arXiv 2104.09864); shape (seq_len, 2, head_dim / 2)."""
    half = shape.embedding_dim // shape.num_heads // 2
    frequency = 10_000.0 ** (-torch.arange(half) / half)
    angle = torch.arange(shape.seq_len)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of (B, heads, T, head_dim) by their position's angles."""
    cos, sin = rotation[:, 0].to(x.dtype), rotation[:, 1].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
