"""Log-probability of each supervised target: the only thing that training asks of the model.

The vocabulary head runs on supervised positions alone, in chunks, and its logits live only as long as one
chunk: [N, V] is never built. The backward pass computes a chunk's logits again.

Shape letters: N tokens, S supervised targets, C one chunk of S, E embedding width, V rows of the vocabulary.
"""

import torch
from torch import Tensor, nn

from gpt2ft.model.attention import Backend, attention_for
from gpt2ft.model.compiled import CompiledBlocks
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.model.neftune import embedding_noise
from gpt2ft.stream import TokenStream

CHUNK = 1024


class TargetLogProbs(nn.Module):
    """TokenStream -> log p(target | everything the target's token sees), float32 [S].

    Args:
        num_ids: ids in use. The rows of the table beyond them are padding, whose log-probability is minus infinity:
            they are left out of the normalisation, and no target may name them.
        neftune_alpha: of the noise on the embeddings in training, see neftune.py.
        compiles: have blocks compiled, see compiled.py.
    """

    def __init__(
        self, gpt2: GPT2, num_ids: int, backend: Backend, neftune_alpha: float = 0.0, compiles: bool = False
    ) -> None:
        super().__init__()
        self.gpt2 = gpt2
        self.num_ids = num_ids
        self.backend = backend
        self.neftune_alpha = neftune_alpha
        self.compiled = CompiledBlocks() if compiles else None

    def forward(self, stream: TokenStream) -> Tensor:
        attend = attention_for(stream.horizons, stream.num_tokens, self.backend)
        noise = None
        if self.training and self.neftune_alpha:
            width = self.gpt2.config.n_embd
            noise = embedding_noise(self.neftune_alpha, stream.positions, stream.horizons, width)
        hidden = self.gpt2(stream.tokens, stream.positions, attend, noise, self.compiled)
        hidden = hidden[stream.supervised]  # [S, E]
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        table = self.gpt2.wte
        weight = table.weight  # read on every process, even without targets: shards are gathered for it together
        rows = (getattr(table, "rows", None), getattr(table, "row_ids", None))  # trained alone, see lora.py
        log_probs = []
        for start in range(0, stream.num_supervised, CHUNK):
            chunk = slice(start, start + CHUNK)
            log_probs.append(_LogProbs.apply(hidden[chunk], weight, *rows, stream.targets[chunk], self.num_ids))
        computed = sum(map(len, log_probs))
        # The rest are entries of weight 0. They stay connected, so that a stream without supervision takes part
        # in the gradient all-reduce like any other.
        log_probs.append(hidden[computed:].float().sum(-1) * 0.0)
        return torch.cat(log_probs)


class _LogProbs(torch.autograd.Function):
    """log softmax(h W^T)[target] for one chunk: products in the dtype of h, the sum of the logits in float32.

    d log p(t) / d logits = onehot(t) - softmax(logits)

    Of a frozen table, the rows `row_ids` may be trained alone (lora.py): `rows` holds them and takes the gradient.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        row_ids: Tensor | None,
        targets: Tensor,
        num_ids: int,
    ) -> Tensor:
        logits = head_logits(hidden, write_trained_rows(weight, rows, row_ids), num_ids)
        normalizer = logits.logsumexp(-1)  # [C]
        ctx.save_for_backward(hidden, weight, rows, row_ids, targets, normalizer)
        ctx.num_ids = num_ids
        return logits.gather(-1, targets[:, None])[:, 0] - normalizer

    @staticmethod
    def backward(ctx, gradient: Tensor):
        hidden, weight, rows, row_ids, targets, normalizer = ctx.saved_tensors
        weight = write_trained_rows(weight, rows, row_ids)
        d_logits = head_logits(hidden, weight, ctx.num_ids).sub_(normalizer[:, None]).exp_()  # softmax [C, V]
        d_logits.mul_(-gradient[:, None])
        d_logits.scatter_add_(-1, targets[:, None], gradient[:, None])
        d_logits = d_logits.to(hidden.dtype)
        d_hidden = d_logits @ weight.to(hidden.dtype) if ctx.needs_input_grad[0] else None
        d_weight = (d_logits.t() @ hidden).to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_rows = (d_logits[:, row_ids].t() @ hidden).float() if ctx.needs_input_grad[2] else None
        return d_hidden, d_weight, d_rows, None, None, None


def write_trained_rows(weight: Tensor, rows: Tensor | None, row_ids: Tensor | None) -> Tensor:
    """Return the table, after writing the rows that are trained alone into it, if there are any.

    Callers do so before each use: a table in shards was gathered for this use alone and lacks these rows. Within a step
    the same values are written each time, so the table that autograd keeps for the backward pass stays valid.
    """
    if rows is not None:
        weight.data[row_ids] = rows.data.to(weight.dtype)
    return weight


def head_logits(hidden: Tensor, weight: Tensor, num_ids: int) -> Tensor:
    """Return logits [C, V] in float32, minus infinity in the padding columns.

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
    logits[:, num_ids:] = -torch.inf
    return logits
