"""Checks before step 1. Each refuses one way in which runs have trained on the wrong thing.

They look at finished streams and at the model itself, and use nothing of the code that built them.
"""

import torch
from torch import Tensor, nn

from gpt2ft.conversation import SUPERVISED_ROLES
from gpt2ft.errors import Gpt2ftError
from gpt2ft.model.attention import attention_for
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.stream import TokenStream
from gpt2ft.text.tokenizer import ChatTokenizer


class PreflightError(Gpt2ftError):
    """A run that would train on something else than it should."""


def check_supervision(
    stream: TokenStream, tokenizer: ChatTokenizer, cut_at: int | None = None, last_only: bool = False
) -> int:
    """Check that only assistant turns and plain text are supervised, and that every assistant turn teaches `<|end|>`.

    All targets of a turn must have the same weight, finite and above 0.

    Args:
        cut_at: the context length at which turns may be cut: a turn that reaches it has no `<|end|>`. None where turns
            are never cut.
        last_only: no assistant turn may follow a supervised one.

    Returns:
        The number of supervised turns.

    Raises:
        PreflightError: naming the first token that breaks a rule.
    """
    tokens = stream.tokens[: stream.num_tokens].tolist()
    horizons = stream.horizons[: stream.num_tokens].tolist()
    roles = {id: role for role, id in tokenizer.role_ids.items()}
    turn_of = []  # the number of each token's turn
    turns = ["stray"]  # the role of each turn; number 0 stands for tokens before any role token
    for index, id in enumerate(tokens):
        if id in roles:
            turns.append(roles[id])
        elif id == tokenizer.end_of_text_id and (index == 0 or horizons[index - 1] == index):
            turns.append("text")  # only where a tree begins, as the same token ends a text
        turn_of.append(len(turns) - 1)
    real = slice(stream.num_supervised)
    supervised, targets, weights = (x[real].tolist() for x in (stream.supervised, stream.targets, stream.weights))
    taught = set()  # (number of the turn, True for its `<|end|>`)
    weight_of: dict[int, float] = {}  # by the number of the turn
    for index, target, weight in zip(supervised, targets, weights, strict=True):
        if not 0 <= weight < float("inf"):
            raise PreflightError(f"the weight of token {index} of a stream is {weight:g}")
        if not weight:
            continue
        following = index + 1
        if following >= len(tokens) or tokens[following] != target or turn_of[following] != turn_of[index]:
            raise PreflightError(f"the target of token {index} of a stream is not the next token of the same turn")
        role = turns[turn_of[index]]
        if role not in SUPERVISED_ROLES:
            raise PreflightError(f"the {role} token at {index} of a stream is supervised; only assistant turns may be")
        if weight_of.setdefault(turn_of[index], weight) != weight:
            raise PreflightError(f"turn {turn_of[index]} of a stream has targets of weight {weight:g} and of another")
        taught.add((turn_of[index], target == tokenizer.end_id))
    supervised_turns = {turn for turn, _ in taught}
    last = {turn: index for index, turn in enumerate(turn_of)}
    for turn in sorted(supervised_turns):
        is_cut = cut_at is not None and int(stream.positions[last[turn]]) == cut_at - 1
        if turns[turn] == "assistant" and (turn, True) not in taught and not is_cut:
            raise PreflightError(f"assistant turn {turn} of a stream teaches no <|end|>: the model would not stop")
        below = turn_of[last[turn] + 1 : horizons[last[turn]]]
        if last_only and any(turns[other] == "assistant" for other in below):
            raise PreflightError(f"turn {turn} of a stream is supervised, but is not the last assistant turn of a path")
    return len(supervised_turns)


@torch.no_grad()
def check_isolation(model: TargetLogProbs, stream: TokenStream, paths: int = 4) -> float:
    """Check that log-probs in a packed stream equal those of single conversation paths, on this backend and data.

    The model is run in float32 without dropout, before it is wrapped for training.

    Args:
        paths: number of conversation paths compared, spread over the stream.

    Returns:
        The largest difference found.

    Raises:
        PreflightError: if it is beyond rounding.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False):
        packed = model(stream.to(device)).cpu()
        differences = [0.0]
        for target in _spread(stream.num_supervised, paths):
            # Of the same size, so that a compiled backend is tried as it will train, and compiles nothing more.
            alone, indices = path_alone(stream, int(stream.supervised[target]), len(stream.tokens))
            expected = model(alone.to(device)).cpu()[: alone.num_supervised]
            differences.append(float((packed[indices] - expected).abs().max()))
    model.train(was_training)
    worst = float(torch.tensor(differences).max())  # NaN if one of them is
    tolerance = 1e-4 if device.type == "cpu" else 1e-3
    if not worst <= tolerance:
        raise PreflightError(
            f"log-probs in a packed stream differ from those of a conversation alone by {worst:.2g} "
            f"(more than {tolerance}): the attention backend {model.backend} does not isolate conversations here; "
            "try `--model.attention dense`"
        )
    return worst


def check_compiled(model: TargetLogProbs, stream: TokenStream, precision: torch.autocast) -> tuple[float, float]:
    """Check that compiled blocks and head give the log-probs of plain ones, and a block and the head the gradients, on
    this data.

    Without dropout, whose noise a compiled block draws in its own way.

    Args:
        precision: of training, in which gradients are compared; log-probs are in float32.

    Returns:
        The largest difference of a log-prob, and of the gradient of a parameter as a share of its norm.

    Raises:
        PreflightError: if one is beyond rounding.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    stream, compiled = stream.to(device), model.compiled
    found = []
    for model.compiled in (None, compiled):
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            log_probs = model(stream)[: stream.num_supervised]
        with precision:
            is_mixed = torch.is_autocast_enabled(device.type)
            found.append((log_probs, _gradients_of_block_and_head(model, stream)))
    model.train(was_training)
    (plain, plain_gradients), (log_probs, gradients) = found
    of_log_probs = float((log_probs - plain).abs().max()) if len(plain) else 0.0
    pairs = zip(gradients, plain_gradients, strict=True)
    shares = [float((gradient - as_plain).norm() / as_plain.norm().clamp_min(1e-30)) for gradient, as_plain in pairs]
    of_gradients = float(torch.tensor(shares).max())  # NaN if one of them is
    most = (1e-4 if device.type == "cpu" else 1e-3, 5e-2 if is_mixed else 1e-3)
    if not (of_log_probs <= most[0] and of_gradients <= most[1]):
        raise PreflightError(
            f"compiled blocks or head differ from plain ones: log-probs by {of_log_probs:.2g} (at most {most[0]}), "
            f"gradients by {of_gradients:.2g} of their norm (at most {most[1]}); use `--training.compile false`"
        )
    return of_log_probs, of_gradients


def _gradients_of_block_and_head(model: TargetLogProbs, stream: TokenStream) -> list[Tensor]:
    """Return the gradients of the first block's input and trained parameters, of its squared output, and of what the
    head reads, of the sum of its log-probs.

    The former sum is divided so that neither its gradients nor their sums over tokens leave the range of fp16.
    """
    gpt2, block = model.gpt2, model.gpt2.h[0]
    attend = attention_for(stream.horizons, stream.num_tokens, model.backend)
    x = (gpt2.wte(stream.tokens) + gpt2.wpe(stream.positions)).detach().requires_grad_()
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    loss = block(x, attend, model.compiled).square().sum() / len(x) ** 0.5
    read = gpt2.ln_f(x).detach().requires_grad_()
    of_head = torch.autograd.grad(model.head(read, stream).sum(), [read])
    return [*torch.autograd.grad(loss, [x, *trained]), *of_head]


def path_alone(stream: TokenStream, index: int, size: int = 0) -> tuple[TokenStream, Tensor]:
    """Return the root-to-leaf path that token `index` lies on as a stream of its own.

    The path is found from positions alone, not from the horizons that are to be checked. In depth-first order the token
    one position up is the nearest one before it: whatever stands between (a sibling's subtree) lies deeper.

    Args:
        size: least number of tokens, tail included; rounded up to a multiple of 128.

    Returns:
        The stream, and the entries of [S] in the packed stream that its targets correspond to.
    """
    tokens, positions = stream.tokens.tolist(), stream.positions.tolist()
    last = index
    while last + 1 < stream.num_tokens and positions[last + 1] == positions[last] + 1:
        last += 1
    path, wanted = [], positions[last]
    for candidate in range(last, -1, -1):
        if positions[candidate] == wanted:
            path.append(candidate)
            wanted -= 1
        if wanted < 0:
            break
    path.reverse()
    place = {old: new for new, old in enumerate(path)}
    real = stream.supervised[: stream.num_supervised].tolist()
    entries = [entry for entry, old in enumerate(real) if old in place]
    size = -(-max(size, len(path)) // 128) * 128
    horizons = torch.arange(1, size + 1)
    horizons[: len(path)] = len(path)
    padded = torch.zeros(size, dtype=torch.long)
    padded[: len(path)] = torch.tensor([tokens[old] for old in path])
    places = torch.zeros(size, dtype=torch.long)
    places[: len(path)] = torch.arange(len(path))
    alone = TokenStream(
        tokens=padded,
        positions=places,
        horizons=horizons,
        supervised=torch.tensor([place[real[entry]] for entry in entries]),
        targets=stream.targets[entries],
        weights=stream.weights[entries],
        groups=stream.groups[entries],
        num_tokens=len(path),
        num_supervised=len(entries),
    )
    return alone, torch.tensor(entries)


def check_tied(model: TargetLogProbs) -> None:
    """Check that the head is the embedding: one parameter holds the table.

    Raises:
        PreflightError: if there is a second table.
    """
    shape = model.gpt2.wte.weight.shape
    same_shape = [name for name, parameter in model.named_parameters() if parameter.shape == shape]
    # Positions and matrices of blocks may have that shape by chance.
    tables = [name for name in same_shape if not name.startswith(("gpt2.wpe.", "gpt2.h."))]
    if tables != ["gpt2.wte.weight"]:
        raise PreflightError(f"embedding and head must be one parameter, but these have its shape: {', '.join(tables)}")


def check_same_parameters(model: TargetLogProbs, prepared: nn.Module) -> None:
    """Check that wrapping for training kept every parameter: optimizer, head and export must see the same ones.

    Raises:
        PreflightError: if some were replaced.
    """
    before = {id(parameter) for parameter in model.parameters()}
    after = {id(parameter) for parameter in prepared.parameters()}
    if before != after:
        raise PreflightError("wrapping the model for training replaced some of its parameters")


def _spread(total: int, number: int) -> list[int]:
    """Return up to `number` indices spread over `range(total)`."""
    return sorted({round(i * (total - 1) / max(1, number - 1)) for i in range(number)}) if total else []
