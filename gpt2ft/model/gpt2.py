"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") from scratch.

Pre-norm blocks, learned absolute positions, tanh GELU, head tied to the token embedding. Parameters have
the names and the layout of the Hugging Face checkpoints (matrices are stored [in, out]), so nothing is
renamed or transposed on the way in or out. The model knows nothing of chat, losses, adapters or ranks.

Shape letters: N tokens, E embedding width, H heads, D = E / H, V rows of the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2ft.model.attention import Attention
from gpt2ft.model.compiled import CompiledBlocks


@dataclass(frozen=True)
class GPT2Config:
    """Shape of a GPT-2.

    `vocab_size` counts rows of the table, padding included; `dropout` stands after the embeddings and on both residual
    branches.
    """

    vocab_size: int
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"`n_embd` must be a multiple of `n_head` = {self.n_head}, but is {self.n_embd}")


def parameter_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, without building the model."""
    E = config.n_embd
    matrices = {"attn.c_attn": (E, 3 * E), "attn.c_proj": (E, E), "mlp.c_fc": (E, 4 * E), "mlp.c_proj": (4 * E, E)}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, E), "wpe.weight": (config.n_positions, E)}
    for layer in range(config.n_layer):
        for name, shape in matrices.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[1:]}
        shapes |= {f"h.{layer}.{norm}.{kind}": (E,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    return shapes | {"ln_f.weight": (E,), "ln_f.bias": (E,)}


class Projection(nn.Module):
    """x W + b with W stored [in, out], as GPT-2's checkpoints have it."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_in, size_out))
        self.bias = nn.Parameter(torch.empty(size_out))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.t(), self.bias)


class SelfAttention(nn.Module):
    """Multi-head attention over the tokens that `attend` lets each token see, x [N, E] -> [N, E]."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.c_attn = Projection(config.n_embd, 3 * config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Attention) -> Tensor:
        qkv = self.c_attn(x).view(len(x), 3, self.n_head, -1)  # [N, 3, H, D]
        q, k, v = qkv.unbind(1)
        mixed = attend(q, k, v, self.layer).reshape(x.shape)
        return self.resid_dropout(self.c_proj(mixed))


class MLP(nn.Module):
    """Two projections with GELU between them, x [N, E] -> [N, E]."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Projection(config.n_embd, 4 * config.n_embd)
        self.c_proj = Projection(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """A transformer block: attention, then the MLP, each added to the residual stream, x [N, E] -> [N, E]."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = SelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Attention, compiled: CompiledBlocks | None = None) -> Tensor:
        return compiled(self, x, attend) if compiled else self.compute(x, attend)

    def compute(self, x: Tensor, attend: Attention) -> Tensor:
        x = x + self.attn(self.ln_1(x), attend)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """Tokens in, final hidden states out. The head is `wte` itself: see `logits` and model/logprobs.py.

    Attributes:
        activation_checkpointing: keep only the input of each block, and run the block again in the backward pass (Chen
            et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). Results are the same, dropout included.
    """

    activation_checkpointing = False

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attention,
        noise: Tensor | None = None,
        compiled: CompiledBlocks | None = None,
    ) -> Tensor:
        """Return hidden states [N, E] of tokens and positions [N].

        Args:
            attend: the attention of their stream.
            noise: [N, E] on the embeddings of the tokens.
            compiled: what computes the blocks, instead of themselves.
        """
        embeddings = self.wte(tokens) if noise is None else self.wte(tokens) + noise
        x = self.drop(embeddings + self.wpe(positions))
        activation_checkpointing = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.h:
            arguments = (x, attend, compiled)
            x = checkpoint(block, *arguments, use_reentrant=False) if activation_checkpointing else block(*arguments)
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [N, V] of hidden states [N, E]. For sampling and tests; training never builds them."""
        return hidden @ self.wte.weight.t()

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> "GPT2":
        """Draw weights as GPT-2 does: N(0, 0.02), positions N(0, 0.01), biases 0; residual projections scaled by
        1 / sqrt(2 layers)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                scale = (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                spread = 0.01 if name == "wpe.weight" else 0.02 * scale
                parameter.normal_(0.0, spread, generator=generator)
        return self
