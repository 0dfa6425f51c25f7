"""Folders of vocabulary files: malformed ones are refused by name, and control tokens keep their ids."""

import json

import pytest

from gpt2ft.text.tokenizer import ChatTokenizer

MERGES = ["t h", "th e", "h e", "e n", "en d"]


def lists(merges=MERGES, **changes):
    """The tables of a tiny folder: all bytes, what the merges build, `<|endoftext|>`; None leaves a name out."""
    from tokenizers.pre_tokenizers import ByteLevel

    names = dict.fromkeys([*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)])
    ids = {name: id for id, name in enumerate([*names, "<|endoftext|>"])}
    ids |= changes
    return {name: id for name, id in ids.items() if id is not None}


def write_lists(folder, merges=MERGES, ids=None):
    (folder / "vocab.json").write_text(json.dumps(ids or lists(merges)), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def write_description(folder, **changes):
    """tokenizer.json for the same; a name with two underscores is one inside `model`."""
    description = {
        "added_tokens": [{"id": 261, "content": "<|endoftext|>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": lists(), "merges": [merge.split() for merge in MERGES]},
    }
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        if inner:
            description[outer][inner] = value
        else:
            description[outer] = value
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")


def cut(folder, name, keep):
    write_lists(folder)
    write_description(folder)
    (folder / "added_tokens.json").write_text('{"<|end|>": 262}', encoding="utf-8")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:keep])


def purpose(folder, **purposes):
    (folder / "special_tokens_map.json").write_text(json.dumps(purposes), encoding="utf-8")


def write_only(folder, name, content):
    write_lists(folder)
    (folder / name).write_bytes(content)


MALFORMED = {
    "empty folder": (lambda f: None, "must hold vocab.json and merges.txt, or tokenizer.json, but lacks"),
    "no merges": (lambda f: [write_lists(f), (f / "merges.txt").unlink()], "lacks merges.txt$"),
    "no vocabulary": (lambda f: [write_lists(f), (f / "vocab.json").unlink()], "lacks vocab.json$"),
    "cut vocab.json": (lambda f: cut(f, "vocab.json", 900), "vocab.json must be JSON, but is cut short"),
    "cut tokenizer.json": (lambda f: cut(f, "tokenizer.json", 900), "tokenizer.json must be JSON, but is cut short"),
    "cut added_tokens.json": (lambda f: cut(f, "added_tokens.json", 9), "added_tokens.json must be JSON, but is cut"),
    "empty vocab.json": (lambda f: write_only(f, "vocab.json", b""), "vocab.json must be JSON"),
    "deep vocab.json": (lambda f: write_only(f, "vocab.json", b"[" * 200_000), "vocab.json must be JSON"),
    "list for a table": (lambda f: write_only(f, "vocab.json", b"[1]"), "vocab.json: .* must give each token its id"),
    "merges not UTF-8": (lambda f: write_only(f, "merges.txt", b"\xff\xfe"), "merges.txt must be UTF-8"),
    "cut inside a merge": (lambda f: write_only(f, "merges.txt", b"t h\nth"), "merges.txt line 2: a merge must be two"),
    "cut between merges": (
        lambda f: write_only(f, "merges.txt", b"t h\nth e\n"),
        "merges.txt: a merge must build 'he' .*, but none does: either the merges are cut short",
    ),
    "three parts": (lambda f: write_only(f, "merges.txt", b"t h e\n"), "merges.txt line 1: a merge must be two"),
    "a token twice": (lambda f: write_lists(f, [*MERGES, "t he"]), "merge 6 .t he. builds 'the' a second time"),
    "a byte again": (lambda f: write_lists(f, MERGES, lists() | {"zq": 262}), "must build 'zq'"),
    "an unknown part": (
        lambda f: write_lists(f, [*MERGES, "q u", "qu e"], lists([*MERGES, "qu e"])),
        "merge 6 .q u. builds 'qu', which the vocabulary lacks",
    ),
    "a part of no vocabulary": (
        lambda f: write_lists(f, ["th e", "t h"], lists(["th e"])),
        "merge 1 .th e. joins 'th', which the vocabulary lacks",
    ),
    "a part built later": (
        lambda f: write_lists(f, ["th e", "t h"]),
        "merge 1 .th e. joins 'th', which no merge before it builds",
    ),
    "merges out of order": (
        lambda f: write_lists(f, ["h e", "t h", "th e"]),
        "merge 3 .th e. must join what the merges before it leave, but they leave t he",
    ),
    "merges that cannot happen": (
        lambda f: write_lists(f, ["e n", "h e", "n d", "he nd"]),
        "merges.txt: merge 4 .he nd. must join what the merges before it leave, but they leave h en d",
    ),
    "a byte missing": (lambda f: write_lists(f, MERGES, lists(Ġ=None)), "must hold all 256 bytes, but lacks 'Ġ'"),
    "a fractional id": (lambda f: write_lists(f, MERGES, lists(the=1.5)), "vocab.json: the id of 'the' must be"),
    "a textual id": (lambda f: write_lists(f, MERGES, lists(the="7")), "vocab.json: the id of 'the' must be"),
    "a boolean id": (lambda f: write_lists(f, MERGES, lists(the=True)), "vocab.json: the id of 'the' must be"),
    "a negative id": (lambda f: write_lists(f, MERGES, lists(the=-1)), "vocab.json: the id of 'the' must be"),
    "an id twice": (lambda f: write_lists(f, MERGES, lists(the=3)), "must run from 0 without a gap, but 3 comes twice"),
    "an id too far": (lambda f: write_lists(f, MERGES, lists(the=900)), "without a gap, but 257 is missing"),
    "an added token with two ids": (
        lambda f: [write_lists(f), (f / "added_tokens.json").write_text('{"<|endoftext|>": 262}')],
        "vocab.json: '<|endoftext|>' must have one id, but has 261 and, as an added token, 262",
    ),
    "a control token made of merges": (
        lambda f: [write_lists(f), (f / "added_tokens.json").write_text('{"the": 257}'), purpose(f, eos_token="the")],
        "control token 'the' must not be built by a merge",
    ),
    "two files that differ": (
        lambda f: [write_lists(f, ["t h", "h e", *MERGES[1:2], *MERGES[3:]]), write_description(f)],
        "tokenizer.json must say the same as vocab.json and merges.txt, but does not",
    ),
    "another model": (lambda f: write_description(f, model__type="Unigram"), "tokenizer.json must describe a BPE"),
    "no model": (lambda f: write_description(f, model=None), "tokenizer.json must describe a BPE"),
    "not an object": (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer.json must describe a BPE"),
    "no table": (lambda f: write_description(f, model__vocab=None), "tokenizer.json: .* must give each token its id"),
    "merges of numbers": (lambda f: write_description(f, model__merges=[[1, 2]]), "tokenizer.json merge 1: a merge"),
    "merges as a table": (lambda f: write_description(f, model__merges={}), "`model.merges` must be a list"),
    "dropout": (lambda f: write_description(f, model__dropout=0.1), "`model.dropout` must be off"),
    "whole words": (lambda f: write_description(f, model__ignore_merges=True), "`model.ignore_merges` must be off"),
    "a normalizer": (lambda f: write_description(f, normalizer={"type": "NFC"}), "`normalizer` must be null"),
    "a prefix space": (
        lambda f: write_description(f, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
        "`pre_tokenizer` must be GPT-2's",
    ),
    "another pattern": (
        lambda f: write_description(f, pre_tokenizer={"type": "Sequence", "pretokenizers": []}),
        "`pre_tokenizer` must be GPT-2's",
    ),
    "added tokens as a table": (lambda f: write_description(f, added_tokens={"a": 1}), "must be a list of objects"),
    "an added token without a name": (lambda f: write_description(f, added_tokens=[{"id": 1}]), "must have `content`"),
    "an added token without an id": (
        lambda f: write_description(f, added_tokens=[{"content": "<|end|>"}]),
        "tokenizer.json: the id of '<.end.>' must be a whole number",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_folder_is_refused_in_one_sentence(case, tmp_path):
    spoil, sentence = MALFORMED[case]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=sentence.replace("<|endoftext|>", r"<\|endoftext\|>")) as refusal:
        ChatTokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("write", [write_lists, write_description])
def test_the_folder_that_the_cases_spoil_is_sound(write, tmp_path):
    write(tmp_path)
    tokenizer = ChatTokenizer.from_folder(tmp_path)
    assert (tokenizer.end_of_text_id, tokenizer.end_id, len(tokenizer)) == (261, 265, 266)
    assert [tokenizer.token_bytes(id) for id in tokenizer.encode("then end")] == [b"the", b"n", b" ", b"end"]


def test_chat_tokens_named_in_added_tokens_json_keep_their_ids(tmp_path):
    write_lists(tmp_path)
    added = {"<|user|>": 262, "<|end|>": 263, "<|im_start|>": 264}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    tokenizer = ChatTokenizer.from_folder(tmp_path)
    assert (tokenizer.end_id, tokenizer.role_ids) == (263, {"system": 265, "user": 262, "assistant": 266})
    assert 264 not in tokenizer.encode("<|im_start|>")


def test_a_folder_without_end_of_text_is_given_one(tmp_path):
    write_lists(tmp_path, MERGES, lists(**{"<|endoftext|>": None}))
    tokenizer = ChatTokenizer.from_folder(tmp_path)
    assert (tokenizer.end_of_text_id, tokenizer.role_ids["system"]) == (261, 262)
