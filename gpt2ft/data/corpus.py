"""The conversations that are trained on and those that are held out: whole trees of several sources, none in both."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gpt2ft.data.chunks import Rows
from gpt2ft.data.kinds import CONVERSATIONS, DataKind
from gpt2ft.data.mixing import Keys, first_of_each, is_held_out, is_held_out_by_itself, is_within, sampled
from gpt2ft.data.prefixes import openings
from gpt2ft.data.reading import DataError
from gpt2ft.data.sources import Origin, read_trees
from gpt2ft.data.store import TokenStore, open_store
from gpt2ft.data.topic import Topic
from gpt2ft.errors import SettingsError, reason
from gpt2ft.files import cache_root, user_path
from gpt2ft.settings.sections import FilterSettings, split_mixing_weight
from gpt2ft.settings.training import DataSettings
from gpt2ft.text.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Corpus:
    """Tokenised sources and the rows of them that are used, some more than once where a mixing weight says so."""

    kind: DataKind
    stores: list[TokenStore]
    mixing_weights: list[float]
    rows: Rows
    dropped: Counter[str]  # rows left out here, by reason
    has_own_sources: bool = True  # False for what `eval_fraction` holds out: its sources are the training data's

    def identity(self) -> dict[str, str | int]:
        """Digests of the stores by name, and the number of rows: equal where corpora are."""
        named = zip(self.stores, self.mixing_weights, strict=True)
        digests = {store.source + (f"@{weight:g}" if weight != 1 else ""): store.digest for store, weight in named}
        return digests | {"conversations": len(self.rows)}

    def content(self) -> str:
        """Return a digest of the tokens themselves and of which are used, to compare machines."""
        contents = [*(store.statistics.content.encode() for store in self.stores), self.rows.tobytes()]
        return hashlib.sha256(b"".join(contents)).hexdigest()

    def conversations(self) -> Keys:
        """[n] key of the conversation of each row."""
        return self._of_rows(TokenStore.conversations)

    def openings(self) -> Keys:
        """[n] key of the first turn of each row that is no system turn."""
        return self._of_rows(openings)

    def _of_rows(self, keys: Callable[[TokenStore], Keys]) -> Keys:
        of_stores = enumerate(map(keys, self.stores))
        return np.concatenate([found[self.rows[self.rows[:, 0] == number, 1]] for number, found in of_stores])


def load_corpora(
    settings: DataSettings,
    tokenizer: ChatTokenizer,
    seed: int = 0,
    kind: DataKind = CONVERSATIONS,
    digest: Callable[[Origin], str] | None = None,
) -> tuple[Corpus, Corpus | None]:
    """Return the training and the held-out data, by whole trees, none in both.

    A conversation met twice counts once; one that is held out is dropped from training. Mixing weights come last.

    Args:
        seed: of what a mixing weight leaves out or takes once more.
        digest: as of `open_store`.

    Raises:
        DataError: if a source cannot be read or nothing is left to train on.
        SettingsError: if a setting leaves nothing of a source, or holds nothing out.
    """
    held_out, nothing = None, np.zeros(0, np.uint64)
    if settings.eval:
        stores = _open_stores(settings.eval, settings, tokenizer, kind, digest)
        held_out = _unique(kind, stores, nothing, f"{kind.unit} met before")
    kept_back = held_out.conversations() if held_out else nothing
    reason = f"{kind.unit} met before" + (" or held out" if held_out else "")
    corpus = _unique(kind, _open_stores(settings.train, settings, tokenizer, kind, digest), kept_back, reason)
    if settings.holds_out and not settings.eval:
        fraction = settings.eval_fraction
        keys = corpus.openings() if settings.share_prefixes else corpus.conversations()
        chosen = is_held_out_by_itself(keys) if fraction is None else is_held_out(keys, fraction)
        if fraction is not None and not chosen.any():
            together = ", or set `data.share_prefixes` to false, which holds out together what opens with the same turn"
            advice = together if settings.share_prefixes else ""
            raise SettingsError(f"`data.eval_fraction` = {fraction} holds no conversation out: raise it{advice}")
        if chosen.any():
            held_out = replace(corpus, rows=corpus.rows[chosen], dropped=Counter(), has_own_sources=False)
            corpus = replace(corpus, rows=corpus.rows[~chosen])
    if not len(corpus.rows):
        raise DataError("no conversation is left to train on: all of them are held out")
    if held_out and settings.eval_limit:  # what it leaves out is not trained on either
        held_out = _limited(held_out, settings.eval_limit)
    return _sampled(corpus, [split_mixing_weight(source)[1] for source in settings.train], seed), held_out


def read_topic(source: str, ignore_keys: tuple[str, ...] = ()) -> Topic:
    """Read the replies of a topic: one a line of a .txt file, or all that any other data source supervises.

    Raises:
        DataError: if it cannot be read or holds no reply.
    """
    if source.lower().endswith(".txt"):
        try:
            texts = user_path(source).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"`data.topic_replies` = {source} cannot be read: {reason(error)}") from error
    else:
        filters = FilterSettings(ignore_keys=ignore_keys)
        messages = (message for tree in read_trees(source, filters) for message in tree.messages)
        texts = [message.text for message in messages if message.is_supervised]
    replies = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not replies:
        raise DataError(f"`data.topic_replies` = {source} must hold replies, but holds none")
    return Topic(replies)


def _open_stores(
    sources: Sequence[str],
    settings: DataSettings,
    tokenizer: ChatTokenizer,
    kind: DataKind,
    digest: Callable[[Origin], str] | None,
) -> list[TokenStore]:
    topic = read_topic(settings.topic_replies, settings.ignore_keys) if settings.topic_replies else None
    names = [split_mixing_weight(source)[0] for source in sources]
    cache = cache_root(settings.cache)
    return [open_store(name, settings.filters, tokenizer, cache, topic, kind, digest) for name in names]


def _unique(kind: DataKind, stores: list[TokenStore], kept_back: Keys, reason: str) -> Corpus:
    """Return every row once, none of a conversation that is kept back."""
    rows, seen = [], np.zeros(0, np.uint64)
    dropped: Counter[str] = Counter()
    for number, store in enumerate(stores):
        keys = store.keys()
        new = np.flatnonzero(first_of_each(keys, seen) & ~np.isin(store.conversations(), kept_back))
        dropped[reason] += len(keys) - len(new)
        seen = np.concatenate([seen, keys[new]])
        rows.append(np.stack([np.full(len(new), number), new], axis=1))
    return Corpus(kind, stores, [1.0] * len(stores), np.concatenate(rows), +dropped)


def _limited(corpus: Corpus, limit: int) -> Corpus:
    chosen = is_within(corpus.conversations(), limit)
    over = Counter({f"{corpus.kind.unit} over the limit": int((~chosen).sum())})
    return replace(corpus, rows=corpus.rows[chosen], dropped=+(corpus.dropped + over))


def _sampled(corpus: Corpus, mixing_weights: list[float], seed: int) -> Corpus:
    rows = []
    for number, (store, weight) in enumerate(zip(corpus.stores, mixing_weights, strict=True)):
        here = corpus.rows[corpus.rows[:, 0] == number]
        rows.append(here[sampled(store.keys()[here[:, 1]], weight, seed)])
        if not len(rows[-1]) and len(here):
            raise SettingsError(f"the mixing weight {weight:g} leaves nothing of {store.source}: raise it")
    return replace(corpus, rows=np.concatenate(rows), mixing_weights=mixing_weights)
