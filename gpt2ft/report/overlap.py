"""What stands in the training data word for word, or almost: pieces of a model's replies, and held-out replies.

Texts are compared as words and punctuation marks in lower case (replies.pieces), so models with different tokenizers
are measured alike. n-grams are numbers of 64 bits, the same in every process.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gpt2ft.data.corpus import Corpus
from gpt2ft.report.intervals import bootstrap
from gpt2ft.report.replies import pieces
from gpt2ft.report.schema import Heart, Overlap
from gpt2ft.text.tokenizer import ChatTokenizer

HEART = (8, 13)  # lengths of the n-grams of replies; 13 is that of Brown et al. 2020, "GPT-3", appendix C
SHINGLE = 5
NEAR = 0.8  # Jaccard similarity of the sets of n-grams
PERMUTATIONS = 128
SHORTEST = 8  # pieces; shorter replies are alike by chance

Grams = NDArray[np.uint64]


def word_codes(text: str) -> Grams:
    """Return the words and punctuation marks of a text as numbers."""
    return np.array([_code(piece) for piece in pieces(text)], np.uint64)


def grams(codes: Grams, n: int) -> Grams:
    """Return the n-grams of words as numbers, in their order."""
    found = np.zeros(max(0, len(codes) - n + 1), np.uint64)
    for place in range(n):  # a polynomial, modulo 2^64
        found = found * np.uint64(0x9E3779B97F4A7C15) + codes[place : place + len(found)]
    return found


@lru_cache(1_000_000)
def _code(piece: str) -> int:
    return zlib.crc32(piece.encode("utf-8", "surrogatepass")) + 1


def supervised_texts(corpus: Corpus, tokenizer: ChatTokenizer) -> Iterator[tuple[int, str]]:
    """Yield (number of the conversation, text) of all replies and plain texts of a corpus."""
    for number, (store, row) in enumerate(corpus.rows.tolist()):
        tree = corpus.stores[store].tree(row, store)
        for node in np.flatnonzero(tree.weights > 0).tolist():
            start, end = int(tree.starts[node]) + 1, int(tree.starts[node] + tree.lengths[node]) - 1
            yield number, tokenizer.decode(tree.tokens[start:end].tolist())


class TrainingData:
    """Everything that is asked of training data, found in one pass over their texts.

    Args:
        replies: of each model, whose n-grams are looked for.
        held_out: (number of the conversation, text) of held-out replies.
        num_runs: whose data are scanned.
    """

    def __init__(
        self, replies: Mapping[str, Sequence[str]], held_out: Iterable[tuple[int, str]], num_runs: int = 1
    ) -> None:
        self._replies = {
            (model, n): [grams(word_codes(text), n) for text in texts]
            for model, texts in replies.items()
            for n in HEART
        }
        self._wanted = {
            n: _union(*(each for (_, m), of in self._replies.items() if m == n for each in of)) for n in HEART
        }
        self._found = {n: np.zeros((num_runs, len(self._wanted[n])), bool) for n in HEART}
        coded = [(number, word_codes(text)) for number, text in held_out]
        self._held_out = [(number, grams(codes, SHINGLE)) for number, codes in coded if len(codes) >= SHORTEST]
        self._whole = {found.tobytes(): [] for _, found in self._held_out}
        for index, (_, found) in enumerate(self._held_out):
            self._whole[found.tobytes()].append(index)
        self._shingles = _union(*(found for _, found in self._held_out))
        self._exact, self._near = set[int](), set[int]()  # numbers of conversations
        self._index = _near_index([found for _, found in self._held_out])
        self._num_runs, self._unread = num_runs, set[int]()
        self.problems: list[str] = []  # what could not be scanned, in sentences
        if self._index is None:
            self.problems.append("near copies of held-out replies are not looked for: pip install 'gpt2ft[report]'")

    def leave_out(self, run: int, problem: str) -> None:
        """Note that the data of a run cannot be read: nothing is then known of what it has learnt by heart."""
        self._unread.add(run)
        self.problems.append(problem)

    def scan(self, text: str, run: int = 0) -> None:
        codes = word_codes(text)
        for n, wanted in self._wanted.items():
            places, are_there = _places(wanted, grams(codes, n))
            self._found[n][run, places[are_there]] = True
        shingles = grams(codes, SHINGLE)
        same = self._whole.get(shingles.tobytes(), [])
        self._exact.update(self._held_out[index][0] for index in same)
        # Whatever is as near as that has most of its n-grams in common with the held-out replies together.
        if self._index is None or not len(shingles) or _places(self._shingles, shingles)[1].mean() < NEAR:
            return
        for index in self._index.query(_min_hash(shingles)):
            number, found = self._held_out[index]
            if _jaccard(found, shingles) >= NEAR:
                self._near.add(number)

    def learnt_by_heart(self, model: str, seed: int, runs: Sequence[int] = ()) -> Heart:
        """Return the share of the n-grams in a model's replies that stand in the data of some runs, or of all.

        It is empty if those of one could not be read.
        """
        heart: Heart = {}
        if self._unread.intersection(runs or range(self._num_runs)):
            return heart
        for n in HEART:
            found = self._found[n][list(runs)] if runs else self._found[n]
            known = self._wanted[n][found.any(axis=0)]
            said = [each for each in self._replies[model, n] if len(each)]
            columns = np.array([[np.isin(each, known).sum(), len(each)] for each in said], np.float64)
            if said:
                share = bootstrap(columns, lambda sums: sums[..., 0] / sums[..., 1], seed)
                heart[f"grams_{n}"] = {**share, "count": int(columns[:, 1].sum())}
        return heart

    def overlap(self, conversations: int) -> tuple[Overlap, NDArray[np.bool_]]:
        """Return how many held-out conversations overlap with what was scanned, and [conversations] which."""
        overlapping = np.zeros(conversations, bool)
        overlapping[sorted(self._exact | self._near)] = True
        found: Overlap = {"conversations": conversations, "problems": self.problems}
        if len(self._unread) < self._num_runs:
            found["exact"] = len(self._exact)
            if self._index is not None:
                found["near"] = len(self._near | self._exact)
        return found, overlapping


def _union(*arrays: Grams) -> Grams:
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *arrays]))


def _places(known: Grams, values: Grams) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return where each value stands among known ones, ascending, and true where it does."""
    if not len(known):
        return np.zeros(len(values), np.int64), np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return places, known[places] == values


def _jaccard(one: Grams, other: Grams) -> float:
    shared = len(np.intersect1d(one, other))
    return shared / (len(np.unique(one)) + len(np.unique(other)) - shared)


def _near_index(texts: Sequence[Grams]):
    """Return the MinHash index of some texts (Broder 1997); None if the library is not installed."""
    try:
        from datasketch import MinHashLSH
    except ModuleNotFoundError:
        return None
    index = MinHashLSH(NEAR, PERMUTATIONS, weights=(0.1, 0.9))  # what it proposes too much is measured
    for number, shingles in enumerate(texts):
        index.insert(number, _min_hash(shingles))
    return index


def _min_hash(shingles: Grams):
    from datasketch import MinHash

    found = MinHash(PERMUTATIONS, hashfunc=int)
    found.update_batch((np.unique(shingles) >> np.uint64(32)).tolist())
    return found
