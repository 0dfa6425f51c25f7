"""Exports tell other trainers what we supervise: TRL's loss on the assistant alone counts the same tokens."""

import random

import numpy as np
import pytest

from gpt2ft.conversation import ROLES
from gpt2ft.data.packing import build_stream
from gpt2ft.data.token_tree import TokenTree, is_supervised
from gpt2ft.text.template import render_turn
from gpt2ft.text.tokenizer_export import save_tokenizer

transformers = pytest.importorskip("transformers")
template_checks = pytest.importorskip("trl.chat_template_utils")

PIECES = [
    "",
    " ",
    "\n\n",
    "\t",
    "tea",
    " Tea's",
    " 1234",
    "I'll",
    "é",
    "e\u0301",
    "茶",
    " चाय",
    "🍵",
    "👩\u200d👧",
    "{{ x }}",
    "<|",
]


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    save_tokenizer(tokenizer, folder, 1024)
    return transformers.AutoTokenizer.from_pretrained(folder)


def conversations(count):
    draw = random.Random(0)
    for _ in range(count):
        roles = draw.choices(["system", "user", "assistant", "assistant"], k=draw.randrange(1, 7))
        yield [(role, "".join(draw.choices(PIECES, k=draw.randrange(6)))) for role in roles]


def supervised_mask(tokenizer, turns):
    """The ids of a conversation, and 1 for each that training predicts."""
    rendered = [render_turn(tokenizer, role, text) for role, text in turns]
    tokens = np.concatenate(rendered)
    roles = np.array([ROLES.index(role) for role, _ in turns], np.int8)
    tree = TokenTree(
        tokens=tokens,
        lengths=np.array([len(ids) for ids in rendered], np.int32),
        parents=np.arange(-1, len(turns) - 1, dtype=np.int32),
        roles=roles,
        weights=is_supervised(roles).astype(np.float32),
        groups=np.zeros(len(turns), np.int32),
        messages=np.arange(len(turns), dtype=np.int32),
    )
    stream = build_stream([tree], len(tokens), len(tokens))
    mask = np.zeros(len(tokens), int)
    mask[stream.supervised[stream.weights > 0] + 1] = 1
    return tokens.tolist(), mask.tolist()


def test_the_assistants_mask_is_what_we_supervise(exported, tokenizer):
    num_supervised, num_empty = 0, 0
    for turns in conversations(500):
        found = exported.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = supervised_mask(tokenizer, turns)
        assert found["input_ids"] == ids
        assert found["assistant_masks"] == mask
        num_supervised += sum(mask)
        num_empty += ("assistant", "") in turns
    assert num_supervised > 1000
    assert num_empty > 20


def test_trl_finds_what_it_asks_of_a_template(exported):
    assert template_checks.has_generation_markers(exported.chat_template)
    assert template_checks.is_chat_template_stop_token_trained(exported)
