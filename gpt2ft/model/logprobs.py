"""Log-probability of each supervised target: the only thing that training asks of the model.

The vocabulary head runs on supervised positions alone, in chunks, and its logits live only as long as one
chunk: [N, V] is never built. The backward pass computes a chunk's logits again.

Shape letters: N tokens, S supervised targets, C one chunk of S, E embedding width, V rows of the vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from gpt2ft.model.attention import Backend, attention_for
from gpt2ft.model.compiled import CompiledBlocks
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.model.neftune import embedding_noise
from gpt2ft.stream import TokenStream

CHUNK = 1024
ROWS_AT_ONCE = 64  # of the table, for few hidden states on a CPU: one product with all of it takes twice as long
CHUNK_ON_CUDA = 4 * CHUNK  # too few rows leave much of a GPU idle


def chunk_size(device_type: str) -> int:
    """Return how many targets' logits are held at once."""
    return CHUNK_ON_CUDA if device_type == "cuda" else CHUNK


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
        scored = -(-stream.num_supervised // CHUNK) * CHUNK  # so that there are few shapes
        # The rest are entries of weight 0. They stay connected, so that a stream without supervision takes part
        # in the gradient all-reduce like any other.
        rest = hidden[scored:].float().sum(-1) * 0.0
        if not scored:
            return rest
        log_probs = _LogProbs.apply(hidden[:scored], weight, *rows, stream.targets[:scored], self.num_ids)
        return torch.cat([log_probs, rest])


class _LogProbs(torch.autograd.Function):
    """log softmax(h W^T)[target], [S]: products in the dtype of h, the sum of the logits in float32.

    d log p(t) / d logits = onehot(t) - softmax(logits)

    Of a frozen table, the rows `row_ids` may be trained alone (lora.py): `rows` holds them and takes the gradient.
    All chunks are in one function, so that the table is cast once and the chunks add to one gradient of it.
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
        table = write_trained_rows(weight, rows, row_ids).to(hidden.dtype)
        chunks = targets.unsqueeze(1).split(chunk_size(hidden.device.type))
        normalizers, log_probs = [], []
        for logits, ids in zip(_logits_of_chunks(hidden, table, num_ids), chunks, strict=True):
            normalizers.append(logits.logsumexp(-1, keepdim=True))  # [C, 1]
            log_probs.append(logits.gather(-1, ids) - normalizers[-1])
        ctx.save_for_backward(hidden, weight, rows, row_ids, targets, torch.cat(normalizers))
        ctx.num_ids = num_ids
        return torch.cat(log_probs).squeeze(1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        hidden, weight, rows, row_ids, targets, normalizers = ctx.saved_tensors
        needs_hidden, needs_weight, needs_rows, *_ = ctx.needs_input_grad
        table = write_trained_rows(weight, rows, row_ids).to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = d_rows = None
        per_target = (hidden, d_hidden, targets.unsqueeze(1), normalizers, gradient.unsqueeze(1))
        chunks = zip(*(each.split(chunk_size(hidden.device.type)) for each in per_target), strict=True)
        every_logits = _logits_of_chunks(hidden, table, ctx.num_ids)
        for logits, (states, d_states, ids, normalizer, upstream) in zip(every_logits, chunks, strict=True):
            d_logits = logits.sub_(normalizer).exp_()  # softmax [C, V]
            d_logits.mul_(-upstream)
            d_logits.scatter_add_(-1, ids, upstream)
            d_logits = d_logits.to(hidden.dtype)
            if needs_hidden:
                torch.mm(d_logits, table, out=d_states)
            if needs_weight:
                d_weight = _add_product(d_weight, d_logits.t(), states)
            if needs_rows:
                d_rows = _add_product(d_rows, d_logits.index_select(1, row_ids).t(), states)
        if needs_weight:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden if needs_hidden else None, d_weight, d_rows, None, None, None


def write_trained_rows(weight: Tensor, rows: Tensor | None, row_ids: Tensor | None) -> Tensor:
    """Return the table, after writing the rows that are trained alone into it, if there are any.

    Callers do so before each use: a table in shards was gathered for this use alone and lacks these rows. Within a step
    the same values are written each time, so the table that autograd keeps for the backward pass stays valid.
    """
    if rows is not None:
        weight.data[row_ids] = rows.data.to(weight.dtype)
    return weight


def head_table(weight: Tensor) -> Tensor:
    """Return the table for `head_logits`: in float32 where halves have no product in float32."""
    return weight if weight.is_cuda else weight.to(torch.promote_types(weight.dtype, torch.float32))


def head_logits(hidden: Tensor, table: Tensor) -> Tensor:
    """Return logits [B, V] of a few hidden states, in float32.

    GPT-2's logits lie around -100, where bfloat16 resolves steps of 0.5: their sum must not be rounded to it.
    """
    if hidden.is_cuda:
        return _multiply(hidden, table.to(hidden.dtype), len(table))
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.to(table.dtype)
        if len(table) % ROWS_AT_ONCE:
            return hidden @ table.t()
        blocks = table.unflatten(0, (-1, ROWS_AT_ONCE))
        return torch.bmm(blocks, hidden.t().expand(len(blocks), -1, -1)).permute(2, 0, 1).flatten(1)


def _logits_of_chunks(hidden: Tensor, table: Tensor, num_ids: int) -> Iterator[Tensor]:
    """Yield the logits [C, V] of each chunk of hidden states [S, E], all in the same memory."""
    products = _bfloat16_products if hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu" else nullcontext
    sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden, table = _factors(hidden, table)
    chunks = hidden.split(chunk_size(hidden.device.type))
    buffer = hidden.new_empty(len(chunks[0]), len(table), dtype=sum_dtype)
    for chunk in chunks:
        with products():
            logits = _multiply(chunk, table, num_ids, buffer.narrow(0, 0, len(chunk)))
        yield logits


def _factors(hidden: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return what logits are the product of: the same values, as float32 where halves have no product in float32."""
    if hidden.dtype in (torch.float32, torch.float64) or hidden.is_cuda:
        return hidden, table
    return hidden.float(), table.float()


def _multiply(hidden: Tensor, table: Tensor, num_ids: int, out: Tensor | None = None) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):  # which would round the sum after all
        if hidden.dtype in (torch.float32, torch.float64):
            logits = torch.mm(hidden, table.t(), out=out)
        else:
            logits = torch.mm(hidden, table.t(), out_dtype=torch.float32, out=out)
    logits.narrow(1, num_ids, len(table) - num_ids).fill_(-torch.inf)
    return logits


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Multiply float32 matrices as bfloat16 with sums in float32, where the CPU can: exact for values of bfloat16.

    The setting is the process's, so nothing else may multiply meanwhile: training and evaluation have one thread that
    does, the server's engines have several.
    """
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left @ right, the sum in float32; it takes the place of `total`."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right if total is None else total.addmm_(left, right)
    product = torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else (left @ right).float()
    return product if total is None else total.add_(product)
