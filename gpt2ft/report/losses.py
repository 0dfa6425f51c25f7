"""Loss on held-out conversations and on plain text, as sums by conversation, from which every figure is made."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2ft.data.chunks import Chunks, Rows
from gpt2ft.data.plan import Plan
from gpt2ft.data.token_tree import ASSISTANT
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import as_sums, device_sum, on_device
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.report.intervals import FEWEST, bootstrap
from gpt2ft.report.schema import Estimate, HeldOut, Loss
from gpt2ft.stream import TokenStream
from gpt2ft.text.tokenizer import ChatTokenizer
from gpt2ft.training.evaluate import LossSums, evaluating, items_of_rank
from gpt2ft.training.prefetch import build_ahead

DEPTHS = ("1", "2", "3 or more")  # replies on the path, the reply itself included
PLACES = ("first token", "next 15", "rest")
PLACES_FROM = (0, 1, 16)
NATS, TOKENS, BYTES = range(3)

Tally = NDArray[np.float64]  # [conversations, depths, places, 3] nats, tokens, bytes


def tally(model: TargetLogProbs, plan: Plan, rows: Rows, tokenizer: ChatTokenizer, accelerator: Any) -> Tally:
    """Return the loss on every target of a plan, added up by conversation, depth and place. Collective.

    Args:
        rows: [conversations, 2] of the corpus, in its order.
    """
    bytes_of = on_device(accelerator, *tokenizer.byte_lengths())
    shape = (len(rows), len(DEPTHS), len(PLACES), 3)
    total = torch.zeros(shape, dtype=torch.float64, device=bytes_of.device).view(-1, 3)
    number_of = {row: number for number, row in enumerate(map(tuple, rows.tolist()))}

    def build(micro_batch: list[int] | None) -> tuple[torch.Tensor, list[TokenStream]]:
        chunks = micro_batch or []
        cells = [_cells(plan.chunks, chunk, number_of[tuple(plan.chunks.rows[chunk].tolist())]) for chunk in chunks]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *cells])), [plan.stream(chunks)]

    micro_batches = items_of_rank(plan.streams, accelerator.process_index, accelerator.num_processes)
    with evaluating(model):
        for number, (cells, (stream,)) in enumerate(build_ahead(build, micro_batches, accelerator.device)):
            watchdog.mark_progress("held-out stream", number)
            real = slice(stream.num_supervised)
            nats = -as_sums(accelerator, model(stream)[real])
            num_bytes = bytes_of[stream.targets[real].to(total.device)]
            columns = torch.stack([nats, torch.ones_like(nats), num_bytes], dim=1)
            total.index_add_(0, cells.to(total.device), columns)
    return device_sum(accelerator, total).view(shape).cpu().numpy()


def _cells(chunks: Chunks, chunk: int, conversation: int) -> NDArray[np.int64]:
    """Return [S] the cell of the tally for each target of a chunk, in the order of `build_stream`."""
    tree = chunks.tree(chunk)
    store, row = chunks.rows[chunk].tolist()
    whole = chunks.chunking.whole(chunks.stores[store], row, store)
    replies = np.zeros(len(whole.parents), np.int64)
    for node, parent in enumerate(whole.parents.tolist()):
        replies[node] = (replies[parent] if parent >= 0 else 0) + (whole.roles[node] == ASSISTANT)
    depths = np.clip(replies[np.searchsorted(whole.messages, tree.messages)], 1, len(DEPTHS)) - 1
    within = np.arange(len(tree.tokens)) - np.repeat(tree.starts, tree.lengths)
    scored = (np.repeat(tree.weights, tree.lengths) > 0) & (within < np.repeat(tree.lengths, tree.lengths) - 1)
    places = np.searchsorted(PLACES_FROM, within, side="right") - 1
    return ((conversation * len(DEPTHS) + np.repeat(depths, tree.lengths)) * len(PLACES) + places)[scored]


def loss_of(sums: NDArray[np.float64]) -> Loss:
    """Return the figures of sums [..., 3]; those that are not finite are absent."""
    nats, tokens, num_bytes = sums.reshape(-1, 3).sum(axis=0).tolist()
    losses = LossSums(nats, round(tokens), round(num_bytes))
    means = {
        "nats_per_token": losses.nats_per_token,
        "perplexity": losses.perplexity,
        "bits_per_byte": losses.bits_per_byte,
    }
    finite = {name: value for name, value in means.items() if np.isfinite(value)}
    return {"tokens": losses.tokens, "bytes": losses.bytes, **finite}


def held_out(sums: Tally, rows: Rows, sources: Sequence[str], overlapping: NDArray[np.bool_] | None) -> HeldOut:
    """Return the loss in all, and by source, depth and place.

    Args:
        overlapping: [conversations] true where one stands in training data too; None where there are none.
    """
    by_source = {source: loss_of(sums[rows[:, 0] == number]) for number, source in enumerate(sources)}
    found: HeldOut = {
        "total": loss_of(sums),
        "by_source": _measured(by_source),
        "by_depth": _measured({depth: loss_of(sums[:, number]) for number, depth in enumerate(DEPTHS)}),
        "by_place": _measured({place: loss_of(sums[:, :, number]) for number, place in enumerate(PLACES)}),
    }
    if overlapping is not None and overlapping.any() and not overlapping.all():
        found["clean"] = loss_of(sums[~overlapping])
    return found


def _measured(losses: dict[str, Loss]) -> dict[str, Loss]:
    return {name: loss for name, loss in losses.items() if loss["tokens"]}


def differences(sums: Tally, first: Tally, same_tokens: bool, seed: int) -> dict[str, Estimate]:
    """Return how much higher the loss is than that of the first model, paired by conversation.

    Conversations count of which both models read the same: what is too long for one tokenizer may fit in another's. Of
    fewer than FEWEST there is no difference that an interval could tell from chance.

    Args:
        same_tokens: both models have the same tokenizer, without which nats per token mean two things.
    """
    columns = np.concatenate([each.sum(axis=(1, 2)) for each in (sums, first)], axis=1)  # [conversations, 6]
    columns = columns[(columns[:, BYTES] > 0) & (columns[:, BYTES] == columns[:, 3 + BYTES])]
    if len(columns) < FEWEST:
        return {}

    def difference(unit: int, factor: float) -> Estimate:
        return bootstrap(columns, lambda s: factor * (s[..., NATS] / s[..., unit] - s[..., 3] / s[..., 3 + unit]), seed)

    per_token = {"nats_per_token": difference(TOKENS, 1.0)} if same_tokens else {}
    return per_token | {"bits_per_byte": difference(BYTES, 1 / np.log(2))}


def plain_text(model: TargetLogProbs, text: str, tokenizer: ChatTokenizer, accelerator: Any) -> Loss:
    """Return the loss on a text as if nothing stood before it. Collective.

    It is read in windows of the context as lm-evaluation-harness reads it (`loglikelihood_rolling`), so that the two
    agree: each begins with the last token of the one before, and the last window is filled up from there.
    """
    device, context = accelerator.device, model.gpt2.config.n_positions
    bytes_of = on_device(accelerator, *tokenizer.byte_lengths())
    windows = list(_windows([tokenizer.end_of_text_id, *tokenizer.encode(text)], context))
    total = on_device(accelerator, 0.0, 0.0, 0.0)
    with evaluating(model):
        for window in items_of_rank(windows, accelerator.process_index, accelerator.num_processes):
            if window is None:
                continue
            nats = -as_sums(accelerator, model(window.to(device))[: window.num_supervised])
            num_bytes = bytes_of[window.targets[: window.num_supervised].to(total.device)].sum()
            total += torch.stack([nats.sum(), torch.ones_like(nats).sum(), num_bytes])
    return loss_of(device_sum(accelerator, total).cpu().numpy())


def num_windows(text: str, tokenizer: ChatTokenizer, context: int) -> int:
    """Return how many streams `plain_text` reads."""
    return -(-len(tokenizer.encode(text)) // context)


def _windows(ids: list[int], context: int) -> Iterator[TokenStream]:
    """Yield streams whose targets are the ids but the first, each of them once and `context` in each stream."""
    size = -(-context // 128) * 128  # the block of the attention mask
    for start in range(0, len(ids) - 1, context):
        end = min(start + context, len(ids) - 1)
        first = max(0, end - context)
        count, num_targets = end - first, end - start
        tokens, positions = torch.zeros(2, size).long()
        tokens[:count], positions[:count] = torch.tensor(ids[first:end]), torch.arange(count)
        horizons = torch.arange(1, size + 1)
        horizons[:count] = count
        yield TokenStream(
            tokens=tokens, positions=positions, horizons=horizons, supervised=torch.arange(start - first, count),
            targets=torch.tensor(ids[start + 1 : end + 1]), weights=torch.ones(num_targets),
            groups=torch.zeros(num_targets).long(), num_tokens=count, num_supervised=num_targets,
        )  # fmt: skip
