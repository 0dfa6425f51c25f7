"""The tokenizer: content never yields a control id, ids are those of transformers, bad folders are refused by name."""

import json
import os
import pickle
import random
import re
from pathlib import Path

import pytest

from gpt2ft.errors import NetworkError
from gpt2ft.text.template import render_prompt
from gpt2ft.text.tokenizer import ChatTokenizer
from gpt2ft.text.tokenizer_export import save_tokenizer

DATA = Path(os.environ.get("GPT2FT_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))
CHAT_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CONTROLS = ["<|endoftext|>", *CHAT_TOKENS]
CORPUS = [
    "What is tea? Tea is a hot drink, made from the leaves of a plant; it's drunk with milk, lemon, or 2 sugars.",
    "Iced tea isn't hot. They're both tea, I'll say, and we've had 1234 cups!\n\n\tdef tea():\n        return 'hot'",
    "Thé, чай, お茶, 茶, चाय, شاي, τσάι and 🍵 are all the same leaves: <tea|tea> <|tea|> ends | end | user.",
]


def train(folder, special_tokens):
    """A small BPE in the layout of Hugging Face, whose special tokens come first, so that ids are not ranks."""
    import tokenizers

    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = byte_level
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(CORPUS * 3, trainer)
    folder.mkdir(parents=True)
    trained.save(str(folder / "tokenizer.json"))
    return folder


def gpt2_tokenizer():
    cache = DATA / "tiktoken_cache"
    if not cache.is_dir():
        pytest.skip(f"needs GPT-2's vocabulary in {cache} (set GPT2FT_TEST_DATA)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return ChatTokenizer.gpt2()


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return train(tmp_path_factory.mktemp("small") / "model", ["<|endoftext|>"])


@pytest.fixture(scope="module", params=["gpt2", "small"])
def tokenizer(request, small_folder):
    return gpt2_tokenizer() if request.param == "gpt2" else ChatTokenizer.from_folder(small_folder)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    (folder / "added_tokens.json").write_text('{"<|stale|>": 7}')
    save_tokenizer(tokenizer, folder, model_max_length=1024)
    return folder


PIECES = [
    *CONTROLS,
    *["<", "<|", "|>", "|", "<|end", "end|>", "<|en", "d|>", "<|assist", "ant|>", "<| end |>", "<|END|>", "endoftext"],
    *["tea", " tea", "Tea's", " 1234", "I'll", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\0", "\u200b", "\u2028"],
    *["é", "e\u0301", "茶", " चाय", "شاي", "🍵", "👩\u200d👩\u200d👧", "\ufffd", "\uffff", "\U0010ffff", "Ġ", "Ċ"],
]
SURROGATES = ["\ud800", "\udfff", "\udc00\ud800", "\ud83c\udf75", "<|end\ud800|>", "<|\udc00end|>"]


def strings(count, pieces, seed=0):
    """Control names whole, cut, and one inside the other, among letters of any script."""
    generator = random.Random(seed)
    for _ in range(count):
        parts = generator.choices(pieces, k=generator.randrange(1, 10))
        if generator.random() < 0.3:
            outer, inner = generator.choice(CONTROLS), generator.choice(pieces)
            cut = generator.randrange(len(outer))
            parts.insert(generator.randrange(len(parts) + 1), outer[:cut] + inner + outer[cut:])
        if generator.random() < 0.3:
            parts.append("".join(chr(generator.randrange(1, 0xD800)) for _ in range(4)))
        yield "".join(parts)


def without_lone_surrogates(text):
    def pair(match):
        high, low = map(ord, match[0])
        return chr(0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00)

    return re.sub("[\ud800-\udfff]", "\ufffd", re.sub("[\ud800-\udbff][\udc00-\udfff]", pair, text))


def test_content_never_yields_a_control_id_and_survives_the_round_trip(tokenizer):
    texts = [*strings(8000, PIECES), *strings(2000, PIECES + SURROGATES * 3, seed=1), *CONTROLS, *SURROGATES, ""]
    assert sum(any(name in text for name in CONTROLS) for text in texts) > 3000
    assert sum(without_lone_surrogates(text) != text for text in texts) > 500
    controls = {*tokenizer.role_ids.values(), tokenizer.end_id, tokenizer.end_of_text_id}
    assert len(controls) == 5
    for text in texts:
        ids = tokenizer.encode(text)
        assert controls.isdisjoint(ids)
        assert tokenizer.decode(ids) == without_lone_surrogates(text)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == without_lone_surrogates(text)


def test_ids_are_those_of_transformers(tokenizer, saved):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(saved)
    assert len(theirs) == len(tokenizer)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.end_id, tokenizer.end_of_text_id)
    assert (theirs.bos_token, theirs.model_max_length) == ("<|endoftext|>", 1024)
    generator = random.Random(2)
    texts = [text for text in strings(6000, PIECES + CORPUS, seed=3) if not any(name in text for name in CONTROLS)]
    assert any("<|" in text for text in texts)
    merged = 0
    for _ in range(1000):
        turns = [
            (generator.choice(["system", "user", "assistant"]), generator.choice(texts))
            for _ in range(generator.randrange(1, 6))
        ]
        messages = [{"role": role, "content": text} for role, text in turns]
        ours = render_prompt(tokenizer, turns)
        assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ours
        assert theirs.decode(ours) == tokenizer.decode(ours)
        merged += len(ours) < sum(len(text.encode()) for _, text in turns)
    assert merged > 500


def test_a_folder_written_by_transformers_reads_back(tokenizer, saved, tmp_path):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path)
    assert ChatTokenizer.from_folder(tmp_path).digest == tokenizer.digest


def test_a_saved_folder_reads_back_the_same(tokenizer, saved, tmp_path):
    again = ChatTokenizer.from_folder(saved)
    assert (tokenizer.has_chat_tokens, again.has_chat_tokens) == (False, True)
    assert again.digest == tokenizer.digest
    assert again.role_ids == tokenizer.role_ids
    texts = [*strings(1000, PIECES, seed=4), *CORPUS]
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    for left_out in (["tokenizer.json"], ["vocab.json", "merges.txt"]):
        folder = tmp_path / left_out[0]
        folder.mkdir()
        for file in saved.iterdir():
            if file.name not in left_out:
                (folder / file.name).write_bytes(file.read_bytes())
        assert ChatTokenizer.from_folder(folder).digest == tokenizer.digest


def test_lengths_and_spellings(tokenizer):
    lengths = tokenizer.byte_lengths()
    controls = [tokenizer.end_of_text_id, *tokenizer.role_ids.values(), tokenizer.end_id]
    assert len(lengths) == len(tokenizer)
    assert [id for id, length in enumerate(lengths) if length == 0] == sorted(controls)
    assert tokenizer.decode(controls) == "".join(CONTROLS)
    assert [tokenizer.token_bytes(id) for id in controls] == [b""] * 5
    ids = tokenizer.encode("🍵 tea")
    assert sum(lengths[id] for id in ids) == len("🍵 tea".encode())
    assert tokenizer.decode(tokenizer.encode("🍵")[:1]) == "\ufffd"
    for id in (-1, len(tokenizer)):
        with pytest.raises(ValueError, match=f"a token id must be from 0 to {len(tokenizer) - 1}, but is {id}"):
            tokenizer.decode([id])


def test_a_worker_process_may_have_a_copy(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.digest == tokenizer.digest
    assert copy.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])


def test_gpt2_has_its_own_ids(gpt2):
    assert (len(gpt2), gpt2.padded_size) == (50261, 50304)
    assert gpt2.role_ids == {"system": 50257, "user": 50258, "assistant": 50259}
    assert (gpt2.end_id, gpt2.end_of_text_id) == (50260, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]


def test_long_runs_of_one_character_are_no_trouble(tokenizer):
    for text in (" " * 100_000, " " * 100_000 + "x", "a" * 100_000, "\n" * 100_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_endless_space_is_refused_before_it_can_crash(tokenizer):
    longest = " " * 900_000
    assert tokenizer.decode(tokenizer.encode(longest + "x" + longest)) == longest + "x" + longest
    with pytest.raises(ValueError, match="`text` must hold at most 900,000 whitespace characters in a row"):
        tokenizer.encode("tea" + "\n " * 700_000 + "x")


def test_ids_need_not_be_ranks(small_folder):
    small = ChatTokenizer.from_folder(small_folder)
    assert small.end_of_text_id == 0
    assert list(small.role_ids.values()) == [400, 401, 402]
    assert (small.end_id, len(small), small.padded_size) == (403, 404, 448)


def test_chat_tokens_of_the_folder_keep_their_ids(tmp_path):
    found = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    some = ChatTokenizer.from_folder(train(tmp_path / "some", found))
    assert not some.has_chat_tokens
    assert (some.end_id, some.role_ids) == (0, {"system": 401, "user": 2, "assistant": 3})
    assert some.end_of_text_id == 400
    assert some.token_bytes(1) == b""
    assert some.decode([1]) == "<|pad|>"
    assert 1 not in some.encode("<|pad|>")
    every = ChatTokenizer.from_folder(train(tmp_path / "every", [*found, "<|system|>", "<|endoftext|>"]))
    assert every.has_chat_tokens
    assert (len(every), every.role_ids["system"], every.end_of_text_id) == (400, 4, 5)


def test_no_cache_and_no_network_is_said_in_one_sentence(monkeypatch, tmp_path):
    import requests
    import tiktoken.registry

    def refuse(*_, **__):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(NetworkError, match=r"TIKTOKEN_CACHE_DIR.*vocab\.json and merges\.txt"):
        ChatTokenizer.gpt2()


# Malformed folders


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
        lambda f: [write_lists(f), (f / "added_tokens.json").write_text('{"the": 257}')],
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
