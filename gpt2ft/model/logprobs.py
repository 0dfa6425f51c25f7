"""The only thing training ever asks of the model: the log-probability of each supervised target.

The vocabulary head runs on supervised positions alone, in chunks, and its logits live only as long as one
chunk: [N, V] is never built. The backward pass computes a chunk's logits again.

Shape letters: N tokens, S supervised targets, C one chunk of S, E embedding width, V rows of the vocabulary.
"""

import torch
from torch import Tensor, nn

from gpt2ft.model.attention import Backend, attention_for
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.stream import TokenStream

CHUNK = 1024


class TargetLogProbs(nn.Module):
    """TokenStream -> log p(target | everything the target's token sees), float32 [S].

    Args:
        vocabulary: ids in use. Rows of the table beyond it are padding; their log-probability is minus
            infinity (they are left out of the normalisation, and no target may name them).
    """

    def __init__(self, gpt2: GPT2, vocabulary: int, backend: Backend) -> None:
        super().__init__()
        self.gpt2 = gpt2
        self.vocabulary = vocabulary
        self.backend = backend

    def forward(self, stream: TokenStream) -> Tensor:
        dropout = self.gpt2.config.attention_dropout if self.training else 0.0
        attend = attention_for(stream.horizons, stream.num_tokens, self.backend, dropout)
        hidden = self.gpt2(stream.tokens, stream.positions, attend)[stream.supervised]  # [S, E]
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        table = self.gpt2.wte
        weight = table.weight  # of every process, whether it scores anything or not: shards are gathered for it
        rows = (getattr(table, "rows", None), getattr(table, "row_ids", None))  # trained alone, see lora.py
        parts = []
        for start in range(0, stream.num_supervised, CHUNK):
            chunk = slice(start, start + CHUNK)
            parts.append(_LogProbs.apply(hidden[chunk], weight, *rows, stream.targets[chunk], self.vocabulary))
        scored = sum(len(part) for part in parts)
        # The rest are entries of weight 0. They stay connected, so that a stream without supervision takes part
        # in the gradient all-reduce like any other.
        parts.append(hidden[scored:].float().sum(-1) * 0.0)
        return torch.cat(parts)


class _LogProbs(torch.autograd.Function):
    """log softmax(h W^T)[target] for one chunk: products in the dtype of h, the sum of the logits in float32.

    d log p(t) / d logits = onehot(t) - softmax(logits)

    Of a frozen table, the rows `row_ids` may be trained alone: `rows` are what stands there, and take the gradient.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        row_ids: Tensor | None,
        targets: Tensor,
        vocabulary: int,
    ) -> Tensor:
        logits = head_logits(hidden, with_rows(weight, rows, row_ids), vocabulary)
        normalizer = logits.logsumexp(-1)  # [C]
        ctx.save_for_backward(hidden, weight, rows, row_ids, targets, normalizer)
        ctx.vocabulary = vocabulary
        return logits.gather(-1, targets[:, None])[:, 0] - normalizer

    @staticmethod
    def backward(ctx, gradient: Tensor):
        hidden, weight, rows, row_ids, targets, normalizer = ctx.saved_tensors
        weight = with_rows(weight, rows, row_ids)
        d_logits = head_logits(hidden, weight, ctx.vocabulary).sub_(normalizer[:, None]).exp_()  # softmax [C, V]
        d_logits.mul_(-gradient[:, None])
        d_logits.scatter_add_(-1, targets[:, None], gradient[:, None])
        d_logits = d_logits.to(hidden.dtype)
        d_hidden = d_logits @ weight.to(hidden.dtype) if ctx.needs_input_grad[0] else None
        d_weight = (d_logits.t() @ hidden).to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_rows = (d_logits[:, row_ids].t() @ hidden).float() if ctx.needs_input_grad[2] else None
        return d_hidden, d_weight, d_rows, None, None, None


def with_rows(weight: Tensor, rows: Tensor | None, row_ids: Tensor | None) -> Tensor:
    """The table with the rows that are trained alone written into it, if there are any.

    Before each use: where the table lies in shards, it was gathered for this use alone and lacks them. What is written
    is what an earlier use has written, so autograd, which keeps the table for the backward pass, need not know.
    """
    if rows is not None:
        weight.data[row_ids] = rows.data.to(weight.dtype)
    return weight


def head_logits(hidden: Tensor, weight: Tensor, vocabulary: int) -> Tensor:
    """[C, V] in float32, minus infinity in the padding columns.

    GPT-2's logits lie around -100, where bfloat16 resolves steps of 0.5: their sum must not be rounded to it.
    """
    rows = weight.to(hidden.dtype).t()
    with torch.autocast(hidden.device.type, enabled=False):  # which would round the sum after all
        if hidden.dtype in (torch.float32, torch.float64):
            logits = hidden @ rows
        elif hidden.is_cuda:
            logits = torch.mm(hidden, rows, out_dtype=torch.float32)
        else:
            logits = hidden.float() @ rows.float()
    logits[:, vocabulary:] = -torch.inf
    return logits
