"""GPT-2's byte-level BPE, through tiktoken, with the four chat tokens.

Text tokens are the 256 bytes and then one token for each merge; a merge's place in the list is its rank, and
BPE joins the lowest rank first. An id is often the rank, but need not be: a table holds the difference.
Control tokens (`<|end|>` and the like) have ids only. The encoder has never heard of them, so no content can
produce one. Words that somebody added are found first, and BPE cuts what lies between them.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

from gpt2ft.conversation import Role
from gpt2ft.errors import NetworkError
from gpt2ft.text.added_tokens import WordFinder
from gpt2ft.text.chat_tokens import CHAT_TOKENS, CONTROL_TOKENS, END, END_OF_TEXT, ROLE_TOKENS, with_missing_tokens
from gpt2ft.text.vocabulary import PATTERN, Vocabulary, read_vocabulary

_LONGEST_SPACE = 900_000


class ChatTokenizer:
    """Text to ids and back.

    Attributes:
        known: the vocabulary before the missing control tokens were added.
        vocabulary: with `<|endoftext|>` and the chat tokens.
        role_ids: the id of each role's token, `<|user|>` for "user".
        end_id: the id of `<|end|>`, which closes every turn.
        end_of_text_id: the id of `<|endoftext|>`.
        control_ids: all ids that no content can produce: the above, and what else a folder declares.
        has_chat_tokens: the folder already held all four chat tokens, so their rows were trained.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Add `<|endoftext|>` and the chat tokens where they are missing, after the highest id."""
        import tiktoken

        self.has_chat_tokens = all(name in vocabulary.control_ids for name in CHAT_TOKENS)
        self.known = vocabulary
        ids = with_missing_tokens(vocabulary.control_ids, first_free_id=len(vocabulary))
        self.vocabulary = replace(vocabulary, control_ids=ids)
        self.role_ids: dict[Role, int] = {role: ids[name] for role, name in ROLE_TOKENS.items()}
        self.end_id = ids[END]
        self.end_of_text_id = ids[END_OF_TEXT]
        self.control_ids = frozenset(ids.values())
        self._spellings = self.vocabulary.spellings()
        self._words = WordFinder(vocabulary.words)
        self._ids_are_ranks = vocabulary.ids == list(range(len(vocabulary.ids)))
        ranks = {token: rank for rank, token in enumerate(vocabulary.tokens)}
        self._encoding = tiktoken.Encoding("gpt2ft", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

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
        ids = list(range(encoding.eot_token))
        tokens = [encoding.decode_single_token_bytes(id) for id in ids]
        return cls(Vocabulary(tokens, ids, {END_OF_TEXT: encoding.eot_token}))

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTokenizer":
        """The tokenizer of a model folder: vocab.json and merges.txt, or else tokenizer.json.

        Raises:
            ValueError: if a file is missing, damaged, contradicts another, or describes another kind of tokenizer.
        """
        return cls(read_vocabulary(Path(folder), reserved=CONTROL_TOKENS))

    def __len__(self) -> int:
        """Ids in use, control tokens included: 50261 for GPT-2."""
        return len(self._spellings)

    @property
    def padded_size(self) -> int:
        """Rows of the embedding table: the next multiple of 64, 50304 for GPT-2."""
        return -(-len(self) // 64) * 64

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that determines ids: the pattern, the tokens by rank, their ids, what was added."""
        tokens, ids = [token.hex() for token in self.vocabulary.tokens], self.vocabulary.ids
        content = [PATTERN, tokens, ids, sorted(self.vocabulary.control_ids.items())]
        if self.vocabulary.words:
            content.append({name: asdict(word) for name, word in sorted(self.vocabulary.words.items())})
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of content, never a control id. Lone surrogates become U+FFFD.

        Raises:
            ValueError: if `text` holds almost a million whitespace characters in a row, where tiktoken would crash.
        """
        _refuse_endless_space(text)
        if not self.vocabulary.words:
            return self._bpe(text)
        pieces = self._words.split(text)
        return [id for piece in pieces for id in ([piece] if isinstance(piece, int) else self._bpe(piece))]

    def _bpe(self, text: str) -> list[int]:
        ranks = self._encoding.encode_ordinary(text)
        return ranks if self._ids_are_ranks else [self.vocabulary.ids[rank] for rank in ranks]

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
        return b"" if id in self.control_ids else self._spelling(id)

    def _spelling(self, id: int) -> bytes:
        if not 0 <= id < len(self):
            raise ValueError(f"a token id must be from 0 to {len(self) - 1}, but is {id}")
        return self._spellings[id]

    def byte_lengths(self) -> list[int]:
        """By id: the UTF-8 bytes that it adds to the text, 0 for a control id."""
        return [len(self.token_bytes(id)) for id in range(len(self))]

    def as_trained(self) -> "ChatTokenizer":
        """The same tokenizer once its chat tokens have been trained, as it is read back from a saved folder."""
        return ChatTokenizer(self.vocabulary)


def _refuse_endless_space(text: str) -> None:
    """Raise ValueError where tiktoken would panic: its search for whitespace keeps a stack of a million characters."""
    if len(text) > _LONGEST_SPACE and any(len(run) > _LONGEST_SPACE for run in re.findall(r"\s+", text)):
        raise ValueError(f"`text` must hold at most {_LONGEST_SPACE:,} whitespace characters in a row, but holds more")
