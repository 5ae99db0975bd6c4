"""A small GPT with pre-norm blocks, rotary position embeddings (RoPE) and tied input and output embeddings.

The model returns the loss of every token instead of a mean. Ranks and micro-batches may count different numbers of
tokens, so only the trainer can compute a correct mean. Price: the logits of one micro-batch, (B, T, vocab_size)
float32, stay in memory until the backward pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention

from mixtera_hpc.config.schema import TrainingConfig

__all__ = ["GPT", "GPTConfig", "build_model"]

INIT_STD = 0.02
"""Standard deviation of the initial weights, as in GPT-2."""

ROPE_BASE = 10_000.0
"""Base of the rotation frequencies (RoPE, arXiv 2104.09864, section 3.4.3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """Sizes of a `GPT`."""

    num_layers: int
    num_heads: int
    embedding_dim: int
    """Width of the residual stream; a multiple of 2 × `num_heads`."""
    vocab_size: int
    seq_len: int
    """Largest number of tokens that one sequence predicts."""


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary position embeddings."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embedding_dim, 3 * config.embedding_dim, bias=False)
        self.out = nn.Linear(config.embedding_dim, config.embedding_dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention output for `x` (B, T, embedding_dim).

        Args:
            rotation: of every position, (T, 2, head_dim / 2), or of every sequence, (B, 1, T, 2, head_dim / 2).
            mask: True where a token attends to another one, (B, 1, T, T); None: to all tokens before it.
        """
        batch_size, num_tokens, width = x.shape
        head_dim = width // self.num_heads

        # One projection computes queries, keys and values: (3, B, heads, T, head_dim).
        qkv = self.qkv(x).view(batch_size, num_tokens, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)
        query = _rotate(qkv[0], rotation)
        key = _rotate(qkv[1], rotation)
        value = qkv[2]

        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        merged: Tensor = self.out(attended.transpose(1, 2).reshape(batch_size, num_tokens, width))
        return merged


class Block(nn.Module):
    """One transformer layer: attention, then a feed-forward network; both read a layer norm and add to the residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.embedding_dim, bias=False)
        self.attention = Attention(config)
        self.norm_feed = nn.LayerNorm(config.embedding_dim, bias=False)
        self.up = nn.Linear(config.embedding_dim, 4 * config.embedding_dim, bias=False)
        self.down = nn.Linear(4 * config.embedding_dim, config.embedding_dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        """Return the residual stream after this layer, (B, T, embedding_dim)."""
        x = x + self.attention(self.norm_attention(x), rotation, mask)
        update: Tensor = self.down(gelu(self.up(self.norm_feed(x)), approximate="tanh"))
        return x + update


class GPT(nn.Module):
    """A decoder-only language model that maps tokens (B, T + 1) to the losses of its T predictions."""

    rotation: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.norm = nn.LayerNorm(config.embedding_dim, bias=False)
        # Computed from the sizes, therefore not part of a checkpoint.
        self.register_buffer("rotation", _rotation_table(config), persistent=False)

    def forward(self, tokens: Tensor, documents: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the cross-entropy of every predicted token in nats; int64 (B, T + 1) → float32 (B, T).

        Args:
            tokens: the sequences.
            documents: `document_ids` and `position_ids` of the batch, (B, T + 1) each: tokens then attend to their own
                document only. None: to the whole sequence.
        """
        inputs = tokens[:, :-1]
        targets = tokens[:, 1:]

        rotation = self.rotation[: inputs.shape[1]]
        mask: Tensor | None = None
        if documents is not None:
            document_ids, position_ids = (ids[:, :-1] for ids in documents)
            rotation = self.rotation[position_ids.long()][:, None]
            mask = (document_ids[:, :, None] == document_ids[:, None, :]).tril()[:, None]

        x = self.embedding(inputs)
        for block in self.blocks:
            x = block(x, rotation, mask)

        # The output projection reuses the embedding matrix (tied weights).
        logits = linear(self.norm(x), self.embedding.weight)
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    @property
    def num_parameters(self) -> int:
        """Number of trainable weights; tied embeddings count once."""
        return sum(parameter.numel() for parameter in self.parameters())


def build_model(training: TrainingConfig, vocab_size: int, seq_len: int) -> GPT:
    """Build a GPT on the CPU with reproducible initial weights.

    The weights depend only on `training.seed` and the sizes, so they are equal on all ranks and for all devices.
    """
    config = GPTConfig(
        num_layers=training.num_layers,
        num_heads=training.num_heads,
        embedding_dim=training.embedding_dim,
        vocab_size=vocab_size,
        seq_len=seq_len,
    )
    model = GPT(config)
    _initialize(model, training.seed, config.num_layers)
    return model


def _initialize(model: GPT, seed: int, num_layers: int) -> None:
    """Set the initial weights as GPT-2 does.

    Matrices are normal with standard deviation `INIT_STD`. The 2 × `num_layers` projections that add to the residual
    stream use a smaller one, so that the variance of their sum does not grow with depth. Gains of layer norms are 1.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = INIT_STD / (2 * num_layers) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
                continue
            adds_to_residual = name.endswith(("out.weight", "down.weight"))
            std = residual_std if adds_to_residual else INIT_STD
            parameter.normal_(0.0, std, generator=generator)


def _rotation_table(config: GPTConfig) -> Tensor:
    """Return cosine and sine of the rotation angles of every position (RoPE); shape (seq_len, 2, head_dim / 2)."""
    half = config.embedding_dim // config.num_heads // 2
    frequency = ROPE_BASE ** (-torch.arange(half) / half)
    angle = torch.arange(config.seq_len)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each feature pair (i, i + head_dim / 2) by the angle of its position; `x` is (B, heads, T, head_dim)."""
    cos = rotation[..., 0, :].to(x.dtype)
    sin = rotation[..., 1, :].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
