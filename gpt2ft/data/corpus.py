"""Which conversations are trained on and which are held out: whole trees of several sources, none in both."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gpt2ft.data.mixing import Keys, first_of_each, is_held_out, sampled
from gpt2ft.data.plan import Rows
from gpt2ft.data.reading import DataError
from gpt2ft.data.store import TokenStore, open_store
from gpt2ft.data.topic import Topic
from gpt2ft.errors import SettingsError
from gpt2ft.files import cache_root
from gpt2ft.settings.sections import DataSettings, split_factor
from gpt2ft.text.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Corpus:
    """Tokenised sources and which of their trees are used, some of them more than once where a factor says so."""

    stores: list[TokenStore]
    factors: list[float]
    rows: Rows
    dropped: Counter[str]  # trees left out here, by reason
    is_whole: bool = True  # not a part held out of the sources of another, which tells what they dropped

    def identity(self) -> dict[str, str | int]:
        """What tells this corpus from another."""
        named = zip(self.stores, self.factors, strict=True)
        digests = {store.source + (f"@{factor:g}" if factor != 1 else ""): store.digest for store, factor in named}
        return digests | {"conversations": len(self.rows)}

    def content(self) -> str:
        """A digest of the tokens themselves and of which are used, to compare machines."""
        parts = [*(store.statistics.content.encode() for store in self.stores), self.rows.tobytes()]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def conversations(self) -> Keys:
        """Of which conversation each row is."""
        of_stores = enumerate(store.conversations() for store in self.stores)
        return np.concatenate([found[self.rows[self.rows[:, 0] == number, 1]] for number, found in of_stores])


def load_corpora(
    settings: DataSettings, tokenizer: ChatTokenizer, seed: int = 0, as_preferences: bool = False
) -> tuple[Corpus, Corpus | None]:
    """The training and the held-out conversations, by whole trees, none in both.

    A conversation met twice counts once; one that is held out is dropped from training. Factors come last.

    Args:
        seed: of what a source's factor leaves out or takes twice.
        as_preferences: whether they are read as prompts with replies to compare.
    """
    held_out, nothing = None, np.zeros(0, np.uint64)
    unit = "prompts" if as_preferences else "conversations"
    if settings.eval:
        stores = _open_stores(settings.eval, settings, tokenizer, as_preferences)
        held_out = _unique(stores, nothing, f"{unit} met before")
    kept_back = held_out.conversations() if held_out else nothing
    reason = f"{unit} met before" + (" or held out" if held_out else "")
    corpus = _unique(_open_stores(settings.train, settings, tokenizer, as_preferences), kept_back, reason)
    if settings.eval_fraction:
        chosen = is_held_out(corpus.conversations(), settings.eval_fraction)
        held_out = replace(corpus, rows=corpus.rows[chosen], dropped=Counter(), is_whole=False)
        corpus = replace(corpus, rows=corpus.rows[~chosen])
        if not len(held_out.rows):
            raise SettingsError(f"`data.eval_fraction` = {settings.eval_fraction} holds no conversation out: raise it")
    if not len(corpus.rows):
        raise DataError("no conversation is left to train on: all of them are held out")
    return _sampled(corpus, [split_factor(source)[1] for source in settings.train], seed), held_out


def _open_stores(
    sources: Sequence[str], settings: DataSettings, tokenizer: ChatTokenizer, as_preferences: bool
) -> list[TokenStore]:
    topic = Topic.read(settings.topic_replies) if settings.topic_replies else None
    names = [split_factor(source)[0] for source in sources]
    cache = cache_root(settings.cache)
    return [open_store(name, settings.filters, tokenizer, cache, topic, as_preferences) for name in names]


def _unique(stores: list[TokenStore], kept_back: Keys, reason: str) -> Corpus:
    """Every row once, none of a conversation that is kept back."""
    rows, seen = [], np.zeros(0, np.uint64)
    dropped: Counter[str] = Counter()
    for number, store in enumerate(stores):
        keys = store.keys()
        new = np.flatnonzero(first_of_each(keys, seen) & ~np.isin(store.conversations(), kept_back))
        dropped[reason] += len(keys) - len(new)
        seen = np.concatenate([seen, keys[new]])
        rows.append(np.stack([np.full(len(new), number), new], axis=1))
    return Corpus(stores, [1.0] * len(stores), np.concatenate(rows), +dropped)


def _sampled(corpus: Corpus, factors: list[float], seed: int) -> Corpus:
    rows = []
    for number, (store, factor) in enumerate(zip(corpus.stores, factors, strict=True)):
        here = corpus.rows[corpus.rows[:, 0] == number]
        rows.append(here[sampled(store.keys()[here[:, 1]], factor, seed)])
        if not len(rows[-1]) and len(here):
            raise SettingsError(f"the factor {factor:g} leaves nothing of {store.source}: raise it")
    return replace(corpus, rows=np.concatenate(rows), factors=factors)
