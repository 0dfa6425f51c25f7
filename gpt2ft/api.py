"""The Python interface, for notebooks and programs: what the scripts use, under one name each.

import gpt2ft

model = gpt2ft.load("runs/quickstart")
session = gpt2ft.open_session(model, temperature=0)
session.say("How do I make pancakes?")
print("".join(session.reply()))

stream = gpt2ft.tokenise(model, [{"role": "user", "content": "What is tea?"},
                                 {"role": "assistant", "content": "A hot drink."}])
gpt2ft.reply_log_probs(model, [{"role": "user", "content": "What is tea?"}], ["A hot drink.", "A fish."])
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gpt2ft.chat.session import Session
from gpt2ft.conversation import CHAT_ROLES, ROLES, Message
from gpt2ft.data.formats.keys import weight_of
from gpt2ft.data.packing import build_stream
from gpt2ft.data.reading import Malformed
from gpt2ft.data.token_tree import TokenTree, is_supervised
from gpt2ft.errors import SettingsError
from gpt2ft.inference.model import InferenceModel
from gpt2ft.model.attention import FLEX_BLOCK
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.runs.inference_model import load_inference_model
from gpt2ft.settings.sections import SamplingSettings
from gpt2ft.settings.using import ChatSettings
from gpt2ft.stream import TokenStream
from gpt2ft.text.template import render_turn

Messages = Sequence[Mapping[str, Any]]  # {"role": "user", "content": "What is tea?"}, and what else weighs it in data


def load(model: str | None = None, precision: str = "auto") -> InferenceModel:
    """Load a run, a model folder, an adapter, a checkpoint or a published model; by default the newest finished run.

    Raises:
        DeviceError, ModelError, NetworkError: if it cannot be had, or its GPU cannot be used.
    """
    return load_inference_model(ChatSettings(model=model, precision=precision), seed=0)


def open_session(model: InferenceModel, max_new_tokens: int = 256, **sampling: Any) -> Session:
    """Open a conversation: `say` adds a message, `reply` yields the answer piece by piece.

    Args:
        sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed.
    """
    return Session(model, SamplingSettings(**sampling), max_new_tokens)


def tokenise(model: InferenceModel, messages: Messages) -> TokenStream:
    """Return a conversation as training sees it: ids, positions, horizons, targets of the assistant's tokens.

    Returns:
        One stream, its length N rounded up to a multiple of 128, the block of the attention mask.

    Raises:
        SettingsError: if a role is none of system, user and assistant, or a weight is none that data may have.
    """
    return _stream(_token_tree(model, _conversation(messages)))


def reply_log_probs(model: InferenceModel, messages: Messages, replies: Sequence[str]) -> list[float]:
    """Return the log-probability, in nats, of each of several replies to one conversation, its `<|end|>` included.

    The conversation is computed once, however many replies there are.

    Raises:
        SettingsError: if conversation and reply are longer than the context, or a role is unknown.
    """
    conversation = _conversation(messages)
    last = len(conversation) - 1
    branches = [Message("assistant", reply, parent=last) for reply in replies]
    tree = _token_tree(model, [*conversation, *branches])
    longest, context = int((tree.depths + tree.lengths).max()), model.gpt2.config.n_positions
    if longest > context:
        raise SettingsError(f"conversation and reply must fit the context of {context} tokens, but are {longest}")
    stream = _stream(tree)
    device = next(model.gpt2.parameters()).device
    # Not flex, which would be compiled for each length that a conversation has.
    target_log_probs = TargetLogProbs(model.gpt2, len(model.tokenizer), "segments")
    with torch.no_grad():
        log_probs = target_log_probs(stream.to(device))[: stream.num_supervised].cpu().double()
    node_of = np.repeat(np.arange(len(tree.lengths)), tree.lengths)[stream.supervised[: stream.num_supervised].numpy()]
    sums = np.bincount(node_of, log_probs.numpy(), minlength=len(tree.lengths))
    return sums[last + 1 :].tolist()


def _conversation(messages: Messages) -> list[Message]:
    found = []
    for index, message in enumerate(messages):
        if message["role"] not in CHAT_ROLES:
            raise SettingsError(f"a role must be one of {', '.join(CHAT_ROLES)}, but is {message['role']!r}")
        try:
            weight = weight_of(dict(message), message["role"])
        except Malformed as error:
            raise SettingsError(str(error)) from error
        found.append(Message(message["role"], message["content"], index - 1 if index else None, weight=weight))
    return found


def _token_tree(model: InferenceModel, messages: Sequence[Message]) -> TokenTree:
    turns = [render_turn(model.tokenizer, message.role, message.text) for message in messages]
    number = len(turns)
    roles = np.array([ROLES.index(message.role) for message in messages], np.int8)
    weights = np.array([message.weight for message in messages], np.float32)
    return TokenTree(
        tokens=np.concatenate([np.array(turn) for turn in turns]),
        lengths=np.array([len(turn) for turn in turns], np.int32),
        parents=np.array([-1 if message.parent is None else message.parent for message in messages], np.int32),
        roles=roles,
        weights=weights * is_supervised(roles),
        groups=np.zeros(number, np.int32),
        messages=np.arange(number, dtype=np.int32),
    )


def _stream(tree: TokenTree) -> TokenStream:
    return build_stream([tree], -(-len(tree.tokens) // FLEX_BLOCK) * FLEX_BLOCK, max(1, tree.num_supervised))
