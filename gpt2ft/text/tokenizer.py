"""GPT-2's byte-level BPE, through tiktoken, with the four chat tokens.

Text tokens are the 256 bytes and then one token for each merge; a merge's place in the list is its rank, and
BPE joins the lowest rank first. An id is often the rank, but need not be: a table holds the difference.
Control tokens (`<|end|>` and the like) have ids only. The encoder has never heard of them, so no content can
produce one. Folders are read and written in the layout of Hugging Face (vocabulary.py).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt2ft.conversation import Role
from gpt2ft.errors import NetworkError
from gpt2ft.files import write_json, write_text
from gpt2ft.text.template import CHAT_TEMPLATE, END, ROLE_TOKENS
from gpt2ft.text.vocabulary import (
    listed_control_tokens,
    names_and_merges,
    read_vocabulary,
    write_vocabulary,
)

END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = (*ROLE_TOKENS.values(), END)

# How GPT-2 cuts text before BPE: contractions, words, numbers, other signs (each with one space before it), spaces.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_LONGEST_SPACE = 900_000


class ChatTokenizer:
    """Text to ids and back.

    Attributes:
        role_ids: the id of each role's token, `<|user|>` for "user".
        end_id: the id of `<|end|>`, which closes every turn.
        end_of_text_id: the id of `<|endoftext|>`.
        has_chat_tokens: the folder already held all four chat tokens, so their rows were trained.
        num_known: ids that were there before the missing control tokens were added.
    """

    def __init__(self, tokens: Sequence[bytes], ids: Sequence[int], control_ids: dict[str, int]) -> None:
        """Adds `<|endoftext|>` and the chat tokens where they are missing, after the highest id.

        Args:
            tokens: the text tokens by rank.
            ids: the id of each of them.
            control_ids: the id of each control token, by name.
        Raises:
            ValueError: if the ids do not run from 0 without a gap.
        """
        import tiktoken

        self.has_chat_tokens = all(name in control_ids for name in CHAT_TOKENS)
        self._tokens = list(tokens)
        self._ids = list(ids)
        self.num_known = max([*ids, *control_ids.values()]) + 1
        self._control_ids = _with_chat_tokens(control_ids, first=self.num_known)
        self._spellings = _spellings(self._tokens, self._ids, self._control_ids)  # by id
        self._ids_are_ranks = self._ids == list(range(len(self._ids)))
        ranks = {token: rank for rank, token in enumerate(self._tokens)}
        self._encoding = tiktoken.Encoding("gpt2ft", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._controls = frozenset(self._control_ids.values())
        self.role_ids: dict[Role, int] = {role: self._control_ids[name] for role, name in ROLE_TOKENS.items()}
        self.end_id = self._control_ids[END]
        self.end_of_text_id = self._control_ids[END_OF_TEXT]

    @classmethod
    def gpt2(cls) -> "ChatTokenizer":
        """GPT-2's own vocabulary, from tiktoken's cache or a download.

        Raises:
            NetworkError: if it is in neither.
        """
        import tiktoken

        try:
            encoding = tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise NetworkError(
                "GPT-2's vocabulary is not in tiktoken's cache and could not be downloaded: connect to the network, or "
                "set TIKTOKEN_CACHE_DIR to a folder that tiktoken has filled, or put GPT-2's vocab.json and merges.txt "
                f"in the model folder ({type(error).__name__})"
            ) from error
        ranks = range(encoding.eot_token)
        tokens = [encoding.decode_single_token_bytes(rank) for rank in ranks]
        return cls(tokens, ranks, {END_OF_TEXT: encoding.eot_token})

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTokenizer":
        """The tokenizer of a model folder: vocab.json and merges.txt, or else tokenizer.json.

        Added tokens, and names that no merge builds, are control tokens.

        Raises:
            ValueError: if a file is missing, damaged, contradicts another, or describes another kind of tokenizer.
        """
        vocabulary = read_vocabulary(Path(folder), reserved=(END_OF_TEXT, *CHAT_TOKENS))
        try:
            return cls(vocabulary.tokens, vocabulary.ids, vocabulary.control_ids)
        except ValueError as error:
            raise ValueError(f"{vocabulary.source}: {error}") from error

    def __len__(self) -> int:
        """Ids in use, control tokens included: 50261 for GPT-2."""
        return len(self._spellings)

    @property
    def padded_size(self) -> int:
        """Rows of the embedding table: the next multiple of 64, 50304 for GPT-2."""
        return -(-len(self) // 64) * 64

    @property
    def control_ids(self) -> frozenset[int]:
        """All ids that no content can produce: `<|endoftext|>`, the chat tokens and what else a folder declares."""
        return self._controls

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that determines ids: the pattern, the tokens by rank, their ids, the control tokens."""
        tokens = [token.hex() for token in self._tokens]
        content = [PATTERN, tokens, self._ids, sorted(self._control_ids.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of content, never a control id. Lone surrogates become U+FFFD.

        Raises:
            ValueError: if `text` holds almost a million whitespace characters in a row, where tiktoken would crash.
        """
        _refuse_endless_space(text)
        return self._from_ranks(self._encoding.encode_ordinary(text))

    def _from_ranks(self, ranks: list[int]) -> list[int]:
        return ranks if self._ids_are_ranks else [self._ids[rank] for rank in ranks]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: control tokens by their names, bytes that are no UTF-8 as U+FFFD.

        Raises:
            ValueError: if an id is not in use.
        """
        return b"".join([self._spelling(id) for id in ids]).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that `id` adds to the text, none for a control id.

        Raises:
            ValueError: if the id is not in use.
        """
        return b"" if id in self._controls else self._spelling(id)

    def _spelling(self, id: int) -> bytes:
        if not 0 <= id < len(self):
            raise ValueError(f"a token id must be from 0 to {len(self) - 1}, but is {id}")
        return self._spellings[id]

    def byte_lengths(self) -> list[int]:
        """How many UTF-8 bytes each id adds to the text, 0 for a control id."""
        return [len(self.token_bytes(id)) for id in range(len(self))]

    def names_and_merges(self) -> tuple[list[str], list[str]]:
        """The name of every id, by id, and the merges by rank, as vocab.json and merges.txt spell them."""
        return names_and_merges(self._tokens, self._ids, self._control_ids)

    def as_trained(self) -> "ChatTokenizer":
        """The same tokenizer, once its chat tokens have been trained: what reading it back from `save` gives."""
        return ChatTokenizer(self._tokens, self._ids, self._control_ids)

    def save(self, folder: Path, model_max_length: int = 1024) -> None:
        """Writes what transformers, and older readers of its layout, need to load this tokenizer without us.

        Args:
            folder: made if it does not exist; files of the same name are replaced.
            model_max_length: the model's context in tokens.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_vocabulary(folder, self._tokens, self._ids, self._control_ids)
        write_json(folder / "tokenizer_config.json", self._config(model_max_length))
        write_json(folder / "special_tokens_map.json", self._named_tokens())
        write_text(folder / "chat_template.jinja", CHAT_TEMPLATE)

    def _named_tokens(self) -> dict[str, Any]:
        """What each control token is for, in the terms of transformers."""
        named = {"bos_token": END_OF_TEXT, "eos_token": END, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
        others = [name for name in self._control_ids if name not in named.values()]
        return named | {"additional_special_tokens": others}

    def _config(self, model_max_length: int) -> dict[str, Any]:
        """tokenizer_config.json. The template stands in it too, for readers that know no chat_template.jinja."""
        return {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": model_max_length,
            "add_prefix_space": False,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "added_tokens_decoder": {str(token.pop("id")): token for token in listed_control_tokens(self._control_ids)},
            "chat_template": CHAT_TEMPLATE,
        } | self._named_tokens()


def _refuse_endless_space(text: str) -> None:
    """tiktoken's search for whitespace keeps a stack of a million characters, and panics beyond it."""
    if len(text) > _LONGEST_SPACE and any(len(run) > _LONGEST_SPACE for run in re.findall(r"\s+", text)):
        raise ValueError(f"`text` must hold at most {_LONGEST_SPACE:,} whitespace characters in a row, but holds more")


def _with_chat_tokens(control_ids: dict[str, int], first: int) -> dict[str, int]:
    """The control tokens; those that are missing take the ids from `first` on."""
    missing = [name for name in (END_OF_TEXT, *CHAT_TOKENS) if name not in control_ids]
    return control_ids | {name: first + number for number, name in enumerate(missing)}


def _spellings(tokens: list[bytes], ids: list[int], control_ids: dict[str, int]) -> list[bytes]:
    """What each id stands for, by id: the bytes of a text token, the name of a control token."""
    pairs = [*zip(ids, tokens, strict=True), *((id, name.encode()) for name, id in control_ids.items())]
    pairs.sort()
    for expected, (id, spelling) in enumerate(pairs):
        if id != expected:
            found = f"{id} comes twice" if id < expected else f"{expected} is missing"
            raise ValueError(f"the token ids must run from 0 without a gap, but {found} (at {spelling!r})")
    return [spelling for _, spelling in pairs]
