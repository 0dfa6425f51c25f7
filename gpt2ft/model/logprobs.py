"""Log-probability of each supervised target: the only thing that training asks of the model.

The vocabulary head runs on supervised positions alone, in chunks: [N, V] is never built. As many logits are kept for
the backward pass as fit into 1 GiB, and those of one chunk in any case; it computes all others again.

Shape letters: N tokens, S supervised targets, C one chunk of S, E embedding width, V rows of the vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gpt2ft.model.attention import Backend, attention_for, compiled
from gpt2ft.model.compiled import CompiledBlocks
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.model.neftune import embedding_noise
from gpt2ft.stream import TokenStream

CHUNK = 1024
ROWS_AT_ONCE = 64  # of the table, for few hidden states on a CPU: one product with all of it takes twice as long
CHUNK_ON_CUDA = 4 * CHUNK  # too few rows leave much of a GPU idle
KEPT = 2**28  # logits, each 4 bytes


def chunk_size(device_type: str) -> int:
    """Return how many targets' logits are computed at once."""
    return CHUNK_ON_CUDA if device_type == "cuda" else CHUNK


def held_at_once(num_targets: int, num_rows: int, device_type: str, keeps: bool = True) -> int:
    """Return of how many targets the logits are held: whole chunks, at least one.

    Args:
        keeps: for a backward pass.
    """
    chunk = chunk_size(device_type)
    return min(num_targets, chunk * max(1, keeps * (KEPT // (chunk * num_rows))))


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
        return self.head(self.gpt2(stream.tokens, stream.positions, attend, noise, self.compiled), stream)

    def head(self, hidden: Tensor, stream: TokenStream) -> Tensor:
        """Return the log-probs [S] of a stream whose final hidden states are these, [N, E]."""
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
        log_probs = _LogProbs.apply(
            hidden[:scored], weight, *rows, stream.targets[:scored], self.num_ids, self.compiled is not None
        )
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
        compiles: bool = False,
    ) -> Tensor:
        table = write_trained_rows(weight, rows, row_ids).to(hidden.dtype)
        factor, ids = head_table(table), targets.unsqueeze(1)
        places = _places(hidden, table, keeps=ctx.needs_input_grad[0])
        results = []
        for number, (states, ids_of_chunk) in reversed([*enumerate(_chunks(hidden, ids))]):
            logits = _logits(states, factor, num_ids, _place(places, number, len(states)))
            results.append(_softmax(compiles)[0](logits, ids_of_chunk))
        log_probs, largest, sums = (torch.cat(parts[::-1]) for parts in zip(*results, strict=True))
        ctx.save_for_backward(hidden, weight, rows, row_ids, ids, largest, sums)
        ctx.num_ids, ctx.compiles = num_ids, compiles
        ctx.exponentials = places  # of the first chunks, which were computed last
        return log_probs.squeeze(1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        hidden, weight, rows, row_ids, *per_target = ctx.saved_tensors
        needs_hidden, needs_weight, needs_rows, *_ = ctx.needs_input_grad
        table = write_trained_rows(weight, rows, row_ids).to(hidden.dtype)
        kept, ctx.exponentials = ctx.exponentials, []  # written over below
        places, factor = kept or _places(hidden, table, keeps=False), None
        d_hidden = torch.empty_like(hidden)
        d_weight = d_rows = None
        chunks = _chunks(hidden, d_hidden, *per_target, gradient.unsqueeze(1))
        for number, (states, d_states, ids, largest, sums, upstream) in enumerate(chunks):
            exponentials = _place(places, number, len(states))
            if number >= len(kept):
                factor = head_table(table) if factor is None else factor
                exponentials = _logits(states, factor, ctx.num_ids, exponentials).sub_(largest).exp_()
            d_logits = _softmax(ctx.compiles)[1](exponentials, sums, ids, upstream, dtype=hidden.dtype)
            if needs_hidden:
                torch.mm(d_logits, table, out=d_states)
            if needs_weight:
                d_weight = _add_product(d_weight, d_logits.t(), states)
            if needs_rows:
                d_rows = _add_product(d_rows, d_logits.index_select(1, row_ids).t(), states)
        if needs_weight:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden if needs_hidden else None, d_weight, d_rows, None, None, None, None


def write_trained_rows(weight: Tensor, rows: Tensor | None, row_ids: Tensor | None) -> Tensor:
    """Return the table, after writing the rows that are trained alone into it, if there are any.

    Callers do so before each use: a table in shards was gathered for this use alone and lacks these rows. Within a step
    the same values are written each time, so the table that autograd keeps for the backward pass stays valid.
    """
    if rows is not None:
        weight.data[row_ids] = rows.data.to(weight.dtype)
    return weight


def head_table(weight: Tensor) -> Tensor:
    """Return the table as logits are multiplied with: in float32 where halves have no product in float32."""
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


def _chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return tensors [S, ...] of one device chunk by chunk."""
    return [*zip(*(tensor.split(chunk_size(tensor.device.type)) for tensor in tensors), strict=True)]


def _places(hidden: Tensor, table: Tensor, keeps: bool) -> list[Tensor]:
    """Return memory for the logits that are held at once: those of each of the first chunks."""
    num_targets = held_at_once(len(hidden), len(table), hidden.device.type, keeps)
    lengths = [len(states) for (states,) in _chunks(hidden.narrow(0, 0, num_targets))]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return [hidden.new_empty(length, len(table), dtype=dtype) for length in lengths]


def _place(places: list[Tensor], number: int, length: int) -> Tensor:
    """Return the place of a chunk, or, if it has none, as many rows of the first."""
    return places[number] if number < len(places) else places[0].narrow(0, 0, length)


def _logits(states: Tensor, factor: Tensor, num_ids: int, out: Tensor) -> Tensor:
    """Return the logits [C, V] of a chunk of hidden states, in `out`: a product with what `head_table` returned."""
    is_widened = factor.dtype != states.dtype == torch.bfloat16
    with _bfloat16_products() if is_widened else nullcontext():
        return _multiply(states.to(factor.dtype), factor, num_ids, out)


@cache
def _softmax(compiles: bool) -> tuple[Callable[..., Any], ...]:
    """Return what is computed of logits in each pass."""
    passes = (_exponentiate, _gradient)
    return tuple(map(_as_one_graph, passes)) if compiles else passes


def _as_one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile one graph for chunks of all lengths, to which views would look different."""
    graph = compiled(function, dynamic=True)

    def call(logits: Tensor, *per_target: Tensor, **constants: Any) -> Any:
        return graph(logits.data, *(tensor.clone() for tensor in per_target), **constants)

    return call


def _exponentiate(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Return log-probs of the targets, the largest logits and the sums of exp(logits - largest), each [C, 1]; these
    exponentials take the place of the logits."""
    largest, at_target = logits.amax(-1, keepdim=True), logits.gather(-1, targets)
    sums = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    return at_target - (largest + sums.log()), largest, sums


def _gradient(exponentials: Tensor, sums: Tensor, targets: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the logits, [C, V]; the exponentials are lost."""
    d_logits = exponentials.mul_(-upstream / sums)
    at_target = d_logits.gather(-1, targets) + upstream
    return d_logits.to(dtype).scatter_(-1, targets, at_target.to(dtype))


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
