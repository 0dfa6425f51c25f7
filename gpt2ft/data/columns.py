"""Records as their layouts know them: keys passed over, columns by other names, records that hold several.

Names are told without capitals where a layout knows them so: `Question` is `question`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from gpt2ft.data.blocks import Parsed
from gpt2ft.data.formats import AnyFormat, columns_to_read
from gpt2ft.data.reading import DataError, Malformed, ReadContext, Record, nearest, objects, show
from gpt2ft.settings.columns import keys_and_columns
from gpt2ft.settings.sections import FilterSettings


@dataclass(frozen=True)
class Columns:
    """The keys of one source: those to pass over, and what the others are called in its layout."""

    filters: FilterSettings
    formats: tuple[AnyFormat, ...]

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(key for format in self.formats for key in (*format.columns, *format.passed_over))

    @cached_property
    def _given(self) -> dict[str, str]:
        """Names in layouts, by column."""
        return {column: key for key, column in keys_and_columns(self.filters.columns)}

    @property
    def names_any(self) -> bool:
        return bool(self._given)

    def check(self, found: Collection[str], place: str) -> None:
        """Raise DataError if `data.columns` names a column that is not among those found, or a key of no layout."""
        for column, key in self._given.items():
            if column not in found:
                known = ", ".join(map(show, found)) or "none"
                raise DataError(
                    f"{place}: `data.columns` names {show(column)}, but the columns are {known}{nearest(column, found)}"
                )
            if key not in self._known:
                raise DataError(
                    f"{place}: `data.columns` must give columns the names of keys that a layout reads, but {show(key)} "
                    f"is none{nearest(key, sorted(self._known))}"
                )

    def key_of(self, column: str) -> str:
        """Return the name of a column in layouts."""
        if column in self._given or column in self._known:
            return self._given.get(column, column)
        folded = column.strip().lower()
        return folded if folded in self._known else column

    def to_read(self, names: list[str]) -> list[str]:
        """Return those of the columns of a table that its format reads, or must refuse."""
        kept = [name for name in names if name not in self.filters.ignore_keys]
        keys = set(columns_to_read([self.key_of(name) for name in kept], self.formats))
        return [name for name in kept if self.key_of(name) in keys]

    def parse(self, parse: Callable[[ReadContext], Parsed], context: ReadContext) -> Parsed:
        """Yield the records that `parse` finds, as layouts know them."""
        for where, record in parse(context):
            _remove(record, self.filters.ignore_keys)
            try:
                yield from _unfolded(where, self._renamed(record))
            except Malformed as malformed:
                context.refuse(where, str(malformed), malformed.reason)

    def _renamed(self, record: Record) -> Record:
        keys = self._keys_by_columns(tuple(record))
        return dict(zip(keys, record.values(), strict=True)) if keys else record

    @cached_property
    def _keys_by_columns(self) -> Callable[[tuple[str, ...]], tuple[str, ...] | None]:
        """Function from the columns of a record to its keys, None where they are the same; most records have those of
        the one before."""
        return lru_cache(1024)(self._keys)

    def _keys(self, columns: tuple[str, ...]) -> tuple[str, ...] | None:
        found = [(self.key_of(column), column) for column in columns]
        keys = tuple(column if key in columns and column not in self._given else key for key, column in found)
        for key in keys:
            if keys.count(key) > 1:
                alike = " and ".join(show(column) for other, column in zip(keys, columns, strict=True) if other == key)
                raise Malformed(f"must hold one column for `{key}`, but holds {alike}", "repeated key")
        return None if keys == columns else keys


def _unfolded(where: str, record: Record) -> Iterator[tuple[str, Record]]:
    """Yield a record, or one for each of its `instances`: self-instruct's, of one instruction."""
    if not ("instruction" in record and record.get("instances")):
        yield where, record
        return
    rest = {key: value for key, value in record.items() if key != "instances"}
    for number, instance in enumerate(objects(record, "instances"), start=1):
        if both := rest.keys() & instance.keys():
            raise Malformed(f"`instances` must hold no `{min(both)}` where the record does, but instance {number} does")
        yield f"{where}, instance {number}", rest | instance


def _remove(record: Record, keys: Sequence[str]) -> None:
    """Take these keys out of a record and of all that it holds."""
    waiting: list[Any] = [record] if keys else []
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            for key in keys:
                found.pop(key, None)
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
