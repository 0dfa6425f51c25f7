"""Reference log-probs on disk, by the model that computed them and by the reply.

    <cache>/reference/<digest>/
        manifest.json          `computed_by`: digests of weights, tokenizer and template, precision, backend
        <digest>.parquet       some replies: key, log_prob, tokens, log_probs (of each token)

The folder is named by everything that determines a log-prob, so runs that differ in that never read each other's, and
runs that differ in anything else (adapters, learning rate, beta, the order of the data) share it. The key of a reply is
a digest of its ids, those of its prompt, and which of them are targets. A shard is complete or absent: a kill costs the
seconds since the last one. `reference_pass` computes the log-probs that are missing here, and checks those it reads.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt2ft.checkpoint import difference
from gpt2ft.data.plan import Plan
from gpt2ft.data.token_tree import TokenTree
from gpt2ft.errors import Gpt2ftError
from gpt2ft.files import synced, write_json
from gpt2ft.system import sync_folder
from gpt2ft.wording import counted

Key = bytes  # 16 of them


class ReferenceLogProbError(Gpt2ftError):
    """Reference log-probs that must not be trained against; the message names them and the reason."""


@dataclass(frozen=True)
class Row:
    """One reply in the store."""

    key: Key
    log_prob: float  # of all its tokens
    log_probs: list[float]  # of each


class ReferenceStore:
    """The shards of one reference model.

    Args:
        cache: folder of all references.
        computed_by: everything that determines a log-prob (digests, precision, backend); the folder is named by it.
        versions: of the libraries; they may differ, but then they are named where a check fails.

    Raises:
        ReferenceLogProbError: if the folder holds log-probs of another reference.
    """

    def __init__(self, cache: Path, computed_by: dict[str, str], versions: dict[str, str]) -> None:
        digest = hashlib.sha256(json.dumps(computed_by, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = cache / "reference" / digest
        self.computed_by = computed_by
        self.versions = versions
        self.manifest = self.folder / "manifest.json"
        if self.manifest.exists():
            self._check_manifest()

    def _check_manifest(self) -> None:
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
            changed = difference(manifest["computed_by"], self.computed_by)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReferenceLogProbError(f"{self.manifest} is damaged ({error}): remove {self.folder}") from error
        if changed:
            raise ReferenceLogProbError(
                f"the reference log-probs in {self.folder} are of another reference: {changed}; remove that folder"
            )

    def create(self) -> None:
        """Make the folder and its manifest where there are none yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.manifest.exists():
            self.write_manifest()

    def write_manifest(self) -> None:
        """Write the manifest anew, with the number of rows there are now."""
        manifest = {"computed_by": self.computed_by, "versions": self.versions, "rows": len(self._rows())}
        write_json(self.manifest, manifest)

    def differing_versions(self) -> str:
        """Return the first library whose version has changed since, in words; an empty string if none has."""
        then = json.loads(self.manifest.read_text(encoding="utf-8"))["versions"]
        return difference(then, self.versions) or ""

    def read(self, keys: Sequence[Key], tokens: Sequence[int]) -> NDArray[np.float64]:
        """Return the log-prob of each reply [n], NaN where the store has none.

        Args:
            tokens: number of targets of each reply.

        Raises:
            ReferenceLogProbError: if a shard is damaged, or holds a value that no model gives.
        """
        rows = self._rows()
        found = np.full(len(keys), np.nan)
        for number, (key, length) in enumerate(zip(keys, tokens, strict=True)):
            if key in rows:
                log_prob, stored_length, file = rows[key]
                if not math.isfinite(log_prob) or log_prob > 0 or stored_length != length:
                    raise ReferenceLogProbError(
                        f"{file} must hold the log-prob of {counted(length, 'token')}, "
                        f"but holds {log_prob} of {stored_length}: "
                        "remove that file, and its rows are computed again"
                    )
                found[number] = log_prob
        return found

    def read_tokens(self, keys: Sequence[Key]) -> list[list[float]]:
        """Return the log-prob of each token of replies.

        Raises:
            ReferenceLogProbError: if some are in the store of another machine.
        """
        found = self._tokens()
        if missing := set(keys) - found.keys():
            raise ReferenceLogProbError(
                f"{self.folder} must hold the log-probs of all replies, but lacks those of {len(missing):,}, "
                "which were computed on another machine: use one alone, or a `data.cache` that all share"
            )
        return [found[key] for key in keys]

    def read_tails(self, keys: Sequence[Key], firsts: Sequence[int]) -> NDArray[np.float64]:
        """Return [n] the log-prob of the tokens of each reply from number `first` on, NaN where the store has none."""
        found = self._tokens()
        return np.array(
            [math.fsum(found[key][n:]) if key in found else np.nan for key, n in zip(keys, firsts, strict=True)]
        )

    def _tokens(self) -> dict[Key, list[float]]:
        """Read the log-probs of every row."""
        import pyarrow.parquet

        found: dict[Key, list[float]] = {}
        for file in sorted(self.folder.glob("*.parquet")):
            table = pyarrow.parquet.read_table(file, columns=["key", "log_probs"], page_checksum_verification=True)
            found = dict(zip(*(column.to_pylist() for column in table.columns), strict=True)) | found
        return found

    def _rows(self) -> dict[Key, tuple[float, int, Path]]:
        """Read (log-prob, tokens, shard) of every row."""
        import pyarrow as pa
        import pyarrow.parquet

        rows: dict[Key, tuple[float, int, Path]] = {}
        for file in sorted(self.folder.glob("*.parquet")):
            try:
                columns = ["key", "log_prob", "tokens"]
                table = pyarrow.parquet.read_table(file, columns=columns, page_checksum_verification=True)
                values = [table.column(name).to_pylist() for name in columns]
            except (OSError, KeyError, pa.ArrowException) as error:
                raise ReferenceLogProbError(
                    f"{file} is damaged ({' '.join(str(error).split())}): remove it, and its rows are computed again"
                ) from error
            for key, log_prob, length in zip(*values, strict=True):
                rows.setdefault(key, (log_prob, length, file))
        return rows

    def write(self, rows: Sequence[Row]) -> None:
        """Write a new shard, named by the keys in it."""
        import pyarrow as pa
        import pyarrow.parquet

        table = pa.table(
            {
                "key": pa.array([row.key for row in rows], pa.binary(16)),
                "log_prob": pa.array([row.log_prob for row in rows], pa.float64()),
                "tokens": pa.array([len(row.log_probs) for row in rows], pa.int32()),
                "log_probs": pa.array([row.log_probs for row in rows], pa.list_(pa.float32())),
            }
        )
        name = hashlib.sha256(b"".join(row.key for row in rows)).hexdigest()[:32]
        with synced(self.folder / f"{name}.parquet") as temporary:
            pyarrow.parquet.write_table(table, temporary, write_page_checksum=True)
        sync_folder(self.folder)


# --- keys -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplyKeys:
    """Keys and lengths of the replies of a plan, in its order."""

    keys: list[Key]
    tokens: list[int]  # targets of each
    pairs: NDArray[np.int64]  # [P, 2] places of the chosen and of the rejected reply of each pair


def reply_keys(plan: Plan) -> ReplyKeys:
    """Return the key and the number of targets of every reply of a plan, and its pairs."""
    keys, tokens, pairs = [], [], []
    for index in range(len(plan.chunks)):
        tree = plan.chunks.tree(index)
        replies = np.flatnonzero(tree.weights > 0)
        pairs.append(len(keys) + np.searchsorted(replies, tree.pairs))
        for node in replies.tolist():
            keys.append(reply_key(tree, node))
            tokens.append(int(tree.lengths[node]) - 1)
    return ReplyKeys(keys, tokens, np.concatenate(pairs))


def reply_key(tree: TokenTree, node: int) -> Key:
    """Return a digest of the ids of the prompt, of the ids of the reply, and of which of these are targets."""
    parts = [tree.node_tokens(i) for i in tree.path_to(node)]
    prompt, reply = np.concatenate(parts[:-1]), parts[-1]
    is_target = np.arange(len(reply)) > 0
    digest = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=16)
    for values in (prompt.astype("<u4"), reply.astype("<u4"), is_target.astype("u1")):
        digest.update(values.tobytes())
    return digest.digest()
