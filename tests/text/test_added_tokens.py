"""Added tokens: words are read as tokenizers and transformers read them, and no text makes a control token."""

import codecs
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2ft.text.added_tokens import AddedToken, WordFinder
from gpt2ft.text.tokenizer import ChatTokenizer
from gpt2ft.text.tokenizer_export import save_tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

MERGES = ["t h", "th e", "Ġ t", "e a", "Ġt ea"]
TEXTS = [
    "the glorbnax tea",
    "glorbnaxglorbnax",
    "aglorbnax",
    " glorbnax\n",
    "theglorb nax",
    "",
    "tea the  the",
    "日本 ☕é",
]


def trained():
    """A tiny byte-level BPE: `<|endoftext|>`, the bytes, five merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", *alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    ids = {name: id for id, name in enumerate(names)}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [tuple(merge.split()) for merge in MERGES]))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    found.add_special_tokens(["<|endoftext|>"])
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(*added): the folder that transformers saves with these tokens, texts or `AddedToken`s of tokenizers."""

    def write(*added):
        folder = tmp_path_factory.mktemp("written")
        theirs = transformers.GPT2Tokenizer(*_lists(trained()))
        theirs.add_tokens(list(added))
        theirs.save_pretrained(folder)
        return folder

    return write


def _lists(found):
    model = json.loads(found.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def theirs_and_ours(folder):
    return transformers.AutoTokenizer.from_pretrained(folder), ChatTokenizer.from_folder(folder)


def write_lists(folder, ids, **files):
    """vocab.json with the bytes and merges of `trained` and more ids, merges.txt, and other files by their stems."""
    vocabulary, _ = _lists(trained())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary | ids), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


words = st.lists(
    st.tuples(st.text("ab_1ж☕ \u0300½", min_size=1, max_size=4), *[st.booleans()] * 4),
    min_size=1,
    max_size=5,
    unique_by=lambda word: word[0],
)


def test_words_are_found_where_tokenizers_finds_them():
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    bpe, met = trained(), dict.fromkeys(flags, 0)

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(words, st.lists(st.text("ab_1ж☕ \u0300½\x1c\u3000.", max_size=14), min_size=4, max_size=4))
    def check(drawn, texts):
        found = trained()
        found.add_tokens([tokenizers.AddedToken(text, **dict(zip(flags, on, strict=True))) for text, *on in drawn])
        listed = {token.pop("content"): token for token in json.loads(found.to_str())["added_tokens"][1:]}
        finder = WordFinder({name: AddedToken(**token) for name, token in listed.items()})
        for text in [*texts, "".join(texts)]:
            pieces = finder.split(text)
            ours = [id for piece in pieces for id in ([piece] if isinstance(piece, int) else bpe.encode(piece).ids)]
            assert ours == found.encode(text).ids
            for token in listed.values():
                for flag in flags:
                    met[flag] += token[flag] and token["id"] in pieces

    check()
    assert min(met.values()) > 20


@pytest.mark.parametrize("flags", [{}, {"single_word": True}, {"lstrip": True}, {"rstrip": True, "normalized": False}])
def test_a_folder_of_transformers_with_words_gives_its_ids_and_is_kept(flags, written, tmp_path):
    added = [tokenizers.AddedToken(text, **flags) for text in ("glorbnax", "glorb nax", "tea", "日本", "<think>")]
    theirs, ours = theirs_and_ours(written(*added))
    assert set(ours.vocabulary.words) == {"glorbnax", "glorb nax", "tea", "日本", "<think>"}
    assert len(ours.known) == len(theirs)
    draw = random.Random(0)
    texts = ["".join(draw.choices([*TEXTS, "<think>", "<", ">", "x", " "], k=6)) for _ in range(300)]
    assert [ours.encode(text) for text in texts] == [theirs(text).input_ids for text in texts]
    assert any(ours.vocabulary.words["<think>"].id in ours.encode(text) for text in texts)
    if not flags.keys() & {"lstrip", "rstrip"}:
        assert [ours.decode(ours.encode(text)) for text in texts] == texts
    save_tokenizer(ours, tmp_path, 64)
    for left_out in ([], ["tokenizer.json"], ["vocab.json", "merges.txt"]):
        for name in left_out:
            (tmp_path / name).rename(tmp_path / f"{name}.left-out")
        exported, again = theirs_and_ours(tmp_path)
        assert again.digest == ours.digest
        assert [exported(text).input_ids for text in texts] == [ours.encode(text) for text in texts]
        for name in left_out:
            (tmp_path / f"{name}.left-out").rename(tmp_path / name)


def test_a_word_is_said_as_it_is_read(written):
    """transformers spells é as half a character, as its decoder takes the letter for a byte."""
    ours = ChatTokenizer.from_folder(written("glorbnax", "café au lait", "Ġx"))
    for text in ("glorbnax", "café au lait", "Ġx"):
        (id,) = ours.encode(text)
        assert id not in ours.control_ids
        assert (ours.decode([id]), ours.token_bytes(id)) == (text, text.encode())
        assert ours.byte_lengths()[id] == len(text.encode())


LAYOUTS = {
    "added_tokens.json": {"added_tokens": {"glorbnax": 262}},
    "tokenizer_config.json": {
        "tokenizer_config": {
            "tokenizer_class": "GPT2Tokenizer",
            "added_tokens_decoder": {"262": {"content": "glorbnax", "special": False, "lstrip": True}},
        }
    },
    "both": {
        "added_tokens": {"glorbnax": 262},
        "tokenizer_config": {"added_tokens_decoder": {"262": {"content": "glorbnax", "rstrip": True}}},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_words_beside_vocab_json(layout, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs, ours = theirs_and_ours(write_lists(tmp_path, {}, **LAYOUTS[layout]))
    assert list(ours.vocabulary.words) == ["glorbnax"]
    assert [ours.encode(text) for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]


CONTROL = {
    "in brackets": {"added_tokens": {"<pad>": 262, "[MASK]": 263}},
    "named as special": {
        "added_tokens": {"PAD": 262, "MASK": 263},
        "special_tokens_map": {"pad_token": "PAD", "additional_special_tokens": [{"content": "MASK", "lstrip": True}]},
    },
    "special by its flag": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "262": {"content": "PAD", "special": True, "lstrip": True},
                "263": {"content": "MASK", "special": True},
            }
        }
    },
    "named in tokenizer_config.json": {
        "added_tokens": {"PAD": 262, "MASK": 263},
        "tokenizer_config": {
            "pad_token": {"content": "PAD"},
            "extra_special_tokens": {"mask": "MASK"},
            "eos_token": None,
        },
    },
}


@pytest.mark.parametrize("case", CONTROL)
def test_no_text_makes_a_control_token(case, tmp_path):
    ours = ChatTokenizer.from_folder(write_lists(tmp_path, {}, **CONTROL[case]))
    assert {262, 263} <= ours.control_ids
    assert not ours.vocabulary.words
    for name in ("PAD", "MASK", "<pad>", "[MASK]"):
        assert ours.decode(ours.encode(name)) == name
        assert not ours.control_ids & set(ours.encode(name))


def test_a_chat_token_is_never_a_word(written):
    ours = ChatTokenizer.from_folder(written("<|end|>", "<|user|>"))
    assert not ours.vocabulary.words
    assert not ours.control_ids & set(ours.encode("<|end|><|user|>"))
    assert (ours.end_id, ours.role_ids["user"]) == (262, 263)


UNDECLARED = ["<s>", "</s>", "[PAD]", "<|im_end|>", "a b", "日本", "the tea", "Ġ<s>"]


@pytest.mark.parametrize("name", UNDECLARED)
def test_a_name_that_no_merge_could_have_built_is_a_control_token(name, tmp_path):
    write_lists(tmp_path, {name: 262})
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs, ours = theirs_and_ours(tmp_path)
    assert 262 in ours.control_ids
    texts = [*TEXTS, name, f"a{name}b"]
    assert [ours.encode(text) for text in texts] == [theirs(text).input_ids for text in texts]


def test_names_before_the_bytes_are_control_tokens(tmp_path):
    """Training puts special tokens first, whatever they are called."""
    found = tokenizers.ByteLevelBPETokenizer()
    found.train_from_iterator(TEXTS * 9, vocab_size=290, special_tokens=["PAD", "EOS"], show_progress=False)
    found.save_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs, ours = theirs_and_ours(tmp_path)
    assert {"PAD": 0, "EOS": 1}.items() <= ours.known.control_ids.items()
    texts = [*TEXTS, "PAD EOS", "PADEOS"]
    assert [ours.encode(text) for text in texts] == [theirs(text).input_ids for text in texts]
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(merges[:-1]))
    with pytest.raises(ValueError, match="a merge must build .* either the merges are cut short"):
        ChatTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("file", ["special_tokens_map", "tokenizer_config"])
def test_a_special_purpose_declares_a_token_too(file, tmp_path):
    """Even one whose name may be text, but not one that is text."""
    purposes = {"pad_token": "PAD", "eos_token": {"content": "the"}, "bos_token": "BOS"}
    ours = ChatTokenizer.from_folder(write_lists(tmp_path, {"PAD": 262}, **{file: purposes}))
    assert ours.known.control_ids == {"<|endoftext|>": 0, "PAD": 262}
    assert ours.encode("the") == [258]


@pytest.mark.parametrize("name", ["he", "Ġteas", "</", "PAD", "ðŁ", "aÃ", "123", "ĠĠĠ", ""])
def test_a_name_that_a_lost_merge_may_have_built_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"merges.txt: a merge must build .*\(id 262\)"):
        ChatTokenizer.from_folder(write_lists(tmp_path, {name: 262}))


def config_of(**token):
    return {"tokenizer_config": {"added_tokens_decoder": {"262": {"content": "glorbnax"} | token}}}


DIFFERING = {
    "another id": ({"added_tokens": {"glorbnax": 263}} | config_of(), r"added_tokens.json: 'glorbnax'"),
    "a flag of another type": (config_of(lstrip="yes"), "tokenizer_config.json: `lstrip` of 'glorbnax'"),
    "a list": ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "tokenizer_config.json: `added_tokens_decoder`"),
    "an id that is none": (
        {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}},
        "tokenizer_config.json: the id of 'a'",
    ),
    "a name without letters": ({"added_tokens": {"": 262}}, "added_tokens.json: the name .* id 262"),
    "no name": (config_of(content=""), "tokenizer_config.json: the name .* id 262"),
    "special tokens that are no object": (
        {"special_tokens_map": []},
        "special_tokens_map.json must hold a JSON object",
    ),
    "the name of other bytes": ({"added_tokens": {"é": 166}}, "merges.txt: added token 'é' must have an id of its own"),
}


@pytest.mark.parametrize("case", DIFFERING)
def test_contradictions_are_refused_by_name(case, tmp_path):
    files, problem = DIFFERING[case]
    with pytest.raises(ValueError, match=problem) as refusal:
        ChatTokenizer.from_folder(write_lists(tmp_path, {}, **files))
    assert str(tmp_path) in str(refusal.value)


def test_two_files_that_flag_a_word_differently_are_refused(written):
    folder = written("glorbnax")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= config_of(special=False, single_word=True)["tokenizer_config"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tokenizer_config.json: 'glorbnax' must be declared alike"):
        ChatTokenizer.from_folder(folder)


def test_a_byte_order_mark_and_other_line_ends_are_harmless(written, tmp_path):
    ours = ChatTokenizer.from_folder(written("glorbnax"))
    save_tokenizer(ours, tmp_path, 64)
    (tmp_path / "added_tokens.json").write_text('{"glorbnax": 262}')
    for file in tmp_path.iterdir():
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes().replace(b"\n", b"\r\n"))
    assert ChatTokenizer.from_folder(tmp_path).digest == ours.digest
    (tmp_path / "tokenizer.json").unlink()
    assert ChatTokenizer.from_folder(tmp_path).digest == ours.digest


def test_the_digest_knows_words_and_their_flags(written):
    plain, ours = ChatTokenizer.from_folder(written()), ChatTokenizer.from_folder(written("glorbnax"))
    word = ours.known.words["glorbnax"]
    flagged = ChatTokenizer(replace(ours.known, words={"glorbnax": replace(word, lstrip=True)}))
    assert len({plain.digest, ours.digest, flagged.digest}) == 3
    assert ours.known.extends(plain.known)
    assert not plain.known.extends(ours.known)
    assert not flagged.known.extends(ours.known)
