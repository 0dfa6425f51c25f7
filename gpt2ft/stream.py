"""TokenStream: packed token trees in one flat sequence, and the one rule of visibility.

    visible(q, k)  =  k <= q < horizons[k]

`horizons[k]` is the exclusive end of the subtree under the node that holds token k. A prompt P with the
replies A and B, then an unrelated conversation C, then one token of tail:

    index      0 1 2 3 4 5 6 7
    node       P P A A B C C .        q sees k
    position   0 1 2 3 2 0 1 0        A sees P and A, B sees P and B,
    horizon    5 5 4 4 5 7 7 8        C sees C, the tail sees itself

That rule alone gives causal masking, isolation of packed conversations, a prompt shared by its replies
and whole conversation trees.

Shape letters: N tokens in the stream, S supervised targets, R replies, P pairs of replies.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """The replies of a stream that are compared. `groups` of the stream are the numbers of its replies.

    Only the first `num_pairs` of P mean anything. The rest keeps the shapes fixed: pairs of weight 0, and replies that
    no target belongs to.
    """

    index: Tensor  # [P, 2] numbers of the chosen and of the rejected reply
    weights: Tensor  # [P] float32, how much each pair counts; of labelled replies, negative where undesirable
    reference: Tensor  # [R] float64, log-prob of each reply under the reference; NaN where none is known
    lengths: Tensor  # [R] float32, targets of each reply; 1 in the tail
    rankings: Tensor  # [P] number of the preference group that each pair is of
    num_pairs: int
    reference_tails: Tensor | None = None  # [P, 2] float64, of the tokens by which either reply is longer, for LD-DPO
    baseline: Tensor | float = 0.0  # [] float64, of the objective, where it has one: the same for all streams of a step


@dataclass(frozen=True)
class TokenStream:
    """One micro-batch, without a batch dimension and without padding between trees.

    Only the first `num_tokens` of N and the first `num_supervised` of S mean anything. The rest keeps
    the shapes fixed: tokens that see only themselves and targets of weight 0.
    """

    tokens: Tensor  # [N] input ids
    positions: Tensor  # [N] depth of the token on its own root-to-leaf path: what wpe sees
    horizons: Tensor  # [N] exclusive end of the subtree under the token's node
    supervised: Tensor  # [S] tokens whose next token is a target: indices into the stream
    targets: Tensor  # [S] the next token of the same node
    weights: Tensor  # [S] float32, how much each target counts
    groups: Tensor  # [S] number of the source, conversation or reply that a target counts for
    num_tokens: int
    num_supervised: int
    num_repeated: int = 0  # tokens of them that another stream holds too, where they are supervised if anywhere
    pairs: Pairs | None = None  # of preference data

    def to(self, device: torch.device, non_blocking: bool = False) -> "TokenStream":
        """Copy to a device; pairs, which are in float64, stay on the CPU where the device has none (Apple's GPUs)."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return self._map(copy, (lambda pairs: pairs) if torch.device(device).type == "mps" else copy)

    def pin_memory(self) -> "TokenStream":
        return self._map(torch.Tensor.pin_memory, torch.Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor], of_pairs: Callable[[Tensor], Tensor]) -> "TokenStream":
        pairs = self.pairs and replace(self.pairs, **_mapped(self.pairs, of_pairs))
        return replace(self, **_mapped(self, function), pairs=pairs)


def _mapped(value: TokenStream | Pairs, function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the tensors among the fields of a dataclass, each handed to `function`."""
    named = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: function(held) for name, held in named.items() if isinstance(held, Tensor)}


def visible(horizons: Tensor) -> Tensor:
    """Write the rule out as bool [N, N], rows being queries. For small streams and for tests."""
    index = torch.arange(len(horizons), device=horizons.device)
    query, key = index[:, None], index[None, :]
    return (key <= query) & (query < horizons[None, :])


@dataclass(frozen=True)
class Segment:
    """A run of tokens that share a horizon: nodes that follow each other without a branch.

    Within a segment attention is plainly causal; before it, a segment sees all of its ancestors.
    """

    length: int
    ancestors: tuple[int, ...]  # numbers of the segments above, root first


def segments(horizons: list[int], num_tokens: int) -> list[Segment]:
    """Cut the first `num_tokens` tokens into segments, in stream order."""
    found: list[Segment] = []
    above: list[tuple[int, int]] = []  # (number, horizon) of the open segments
    start = 0
    while start < num_tokens:
        horizon = horizons[start]
        end = start
        while end < num_tokens and horizons[end] == horizon:
            end += 1
        while above and above[-1][1] <= start:
            above.pop()
        above.append((len(found), horizon))
        found.append(Segment(end - start, tuple(number for number, _ in above[:-1])))
        start = end
    return found


def block_kinds(horizons: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Tell which blocks of the attention matrix hold anything, straight from the horizons.

    A key block may be seen by a query block if its largest horizon reaches beyond the query block's start;
    it is wholly seen if its smallest horizon reaches the query block's end and it lies strictly before.

    Returns:
        (some, full): bool [N / block, N / block], rows are query blocks. `full` implies `some`.
    """
    if len(horizons) % block:
        raise ValueError(f"the stream length must be a multiple of {block}, but is {len(horizons)}")
    by_block = horizons.view(-1, block)
    index = torch.arange(len(by_block), device=horizons.device)
    query, key = index[:, None], index[None, :]
    some = (key <= query) & (by_block.amax(1)[None, :] > query * block)
    full = (key < query) & (by_block.amin(1)[None, :] >= (query + 1) * block)
    return some, full
