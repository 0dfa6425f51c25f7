"""Tokenizers as folders that transformers, and older readers of its layout, load without this package."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt2ft.files import write_json, write_text
from gpt2ft.text.added_tokens import AddedToken
from gpt2ft.text.chat_tokens import END, END_OF_TEXT
from gpt2ft.text.template import CHAT_TEMPLATE, TRAINING_TEMPLATE
from gpt2ft.text.tokenizer import ChatTokenizer
from gpt2ft.text.vocabulary import Vocabulary


def save_tokenizer(tokenizer: ChatTokenizer, folder: Path, model_max_length: int) -> None:
    """Write vocabulary, merges, control tokens and chat template; `ChatTokenizer.from_folder` reads the folder back.

    Args:
        folder: made if it does not exist; files of the same name are replaced.
        model_max_length: the model's context in tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges, control_ids = tokenizer.vocabulary.merges(), tokenizer.vocabulary.control_ids
    added_tokens = _listed(tokenizer.vocabulary)
    ids = {name: id for id, name in enumerate(tokenizer.vocabulary.names())}
    write_json(folder / "vocab.json", ids)
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    write_json(folder / "tokenizer.json", _pipeline(ids, merges, added_tokens))
    (folder / "added_tokens.json").unlink(missing_ok=True)  # would be stale: vocab.json holds every name
    write_json(folder / "tokenizer_config.json", _config(control_ids, added_tokens, model_max_length))
    write_json(folder / "special_tokens_map.json", _purposes(control_ids))
    write_text(folder / "chat_template.jinja", TRAINING_TEMPLATE)


def _listed(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The control tokens and added words as tokenizer.json lists them, by id."""
    control = {name: AddedToken(id, special=True, normalized=False) for name, id in vocabulary.control_ids.items()}
    added = sorted((control | dict(vocabulary.words)).items(), key=lambda item: item[1].id)
    return [{"content": name} | asdict(token) for name, token in added]


def _purposes(control_ids: Mapping[str, int]) -> dict[str, Any]:
    """The control token for each purpose that transformers knows."""
    named = {"bos_token": END_OF_TEXT, "eos_token": END, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    return named | {"additional_special_tokens": [name for name in control_ids if name not in named.values()]}


def _config(
    control_ids: Mapping[str, int], added_tokens: Sequence[Mapping[str, Any]], model_max_length: int
) -> dict[str, Any]:
    """tokenizer_config.json. The template stands in it too, for readers that know no chat_template.jinja, and so may
    not know all of its tags."""
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model_max_length,
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "added_tokens_decoder": {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"} for token in added_tokens
        },
        "chat_template": CHAT_TEMPLATE,
    } | _purposes(control_ids)


def _pipeline(ids: dict[str, int], merges: list[str], added_tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """tokenizer.json. Added tokens stand in the vocabulary too, which fixes their ids for every reader."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": ids,
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": model,
    }
