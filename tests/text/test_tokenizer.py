"""The tokenizer: content never yields a control id, and ids are those of transformers."""

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
