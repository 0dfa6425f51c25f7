"""Who is lost, and who stands still, from what all processes say of themselves: no threads, no clock, no network."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Patience:
    """Seconds until something is named, all derived from one.

    Attributes:
        standing: in which no process gets on, where it has got on before, and faster.
    """

    standing: float = 60.0

    @property
    def interval(self) -> float:
        """Between two words of a process."""
        return self.standing / 30

    @property
    def ended(self) -> float:
        """After a process has ended with an error, until the others do: their launcher is faster if it is its too."""
        return self.standing / 6

    @property
    def silence(self) -> float:
        """Of a process that is frozen, or whose machine is gone."""
        return self.standing / 3

    @property
    def long_silence(self) -> float:
        """Where one call may let no other thread run: reading data, writing a checkpoint."""
        return self.standing * 5

    @property
    def first(self) -> float:
        """In which no process gets on with what it does for the first time: kernels are compiled there."""
        return self.standing * 10

    @property
    def long(self) -> float:
        """In which no process gets on with what may take as long as it likes."""
        return self.standing * 30


@dataclass(frozen=True)
class Word:
    """What a process says of itself.

    Attributes:
        number: one more each time.
        position: how often it has got on. Equal on all processes at the same place of the program.
        place: that place, for people.
        limit: seconds in which it should get on.
        is_long: whether a call there may let no other thread run.
        within: what its main thread is in, where it has stood for a while.
        state: whether it is still at work.
        why: what it has failed of.
    """

    number: int
    position: int
    place: str
    limit: float
    is_long: bool
    host: str
    within: str = ""
    state: Literal["working", "finished", "failed"] = "working"
    why: str = ""

    def to_bytes(self) -> bytes:
        return json.dumps(list(asdict(self).values())).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Word":
        return cls(*json.loads(data))


@dataclass
class Verdict:
    sentence: str
    accused: list[int]  # ranks


@dataclass
class Vigil:
    """What one process makes of the words of all. Time is counted in the rounds in which it has listened."""

    rank: int
    patience: Patience
    _words: list[Word] = field(default_factory=list)
    _silent: list[float] = field(default_factory=list)
    _still: list[float] = field(default_factory=list)

    def hear(self, words: Sequence[Word], seconds: float) -> Verdict | None:
        """One round.

        Args:
            words: of each rank.
            seconds: since the last round.

        Returns:
            What is wrong, if anything is.
        """
        before = self._words or words
        self._silent = self._silent or [0.0] * len(words)
        self._still = self._still or [0.0] * len(words)
        for rank, (old, new) in enumerate(zip(before, words, strict=True)):
            self._silent[rank] = self._silent[rank] + seconds if new.number == old.number else 0.0
            self._still[rank] = self._still[rank] + seconds if new.position == old.position else 0.0
        self._words = list(words)
        return self._lost() or self._ended() or self._standing()

    def _working(self) -> list[int]:
        return [rank for rank, word in enumerate(self._words) if word.state == "working"]

    def _lost(self) -> Verdict | None:
        patience = self.patience
        lost = [
            rank
            for rank in self._working()
            if rank != self.rank
            and self._silent[rank] > (patience.long_silence if self._words[rank].is_long else patience.silence)
        ]
        if not lost:
            return None
        seconds = min(self._silent[rank] for rank in lost)
        has, was = ("has", "it was") if len(lost) == 1 else ("have", "the first was")
        place = self._words[lost[0]].place
        return Verdict(f"{self._name(lost)} {has} not been heard of for {seconds:.0f} s; {was} last at {place}", lost)

    def _ended(self) -> Verdict | None:
        """`silent` is also how long ago a process has said that it ends."""
        ended = [rank for rank, word in enumerate(self._words) if word.state == "failed"]
        if not ended or self._silent[ended[0]] <= self.patience.ended:
            return None
        word = self._words[ended[0]]
        return Verdict(f"{self._name(ended[:1])} has ended at {word.place} ({word.why})", ended)

    def _standing(self) -> Verdict | None:
        working = self._working()
        if len(working) < 2:  # nobody waits for the last one
            return None
        lowest = min(self._words[rank].position for rank in working)
        slowest = [rank for rank in working if self._words[rank].position == lowest]
        seconds = min(self._still[rank] for rank in working)
        if seconds <= max(self._words[rank].limit for rank in slowest):
            return None
        word = self._words[slowest[0]]
        within = f" (in {word.within})" if word.within else ""
        if len(slowest) == len(working):
            return Verdict(f"no process has got on for {seconds:.0f} s; all stand at {word.place}{within}", slowest)
        stand = "stands" if len(slowest) == 1 else "stand"
        return Verdict(
            f"{self._name(slowest)} {stand} at {word.place}{within}; no process has got on for {seconds:.0f} s", slowest
        )

    def _name(self, ranks: Sequence[int]) -> str:
        named = " and ".join(f"rank {rank} (host {self._words[rank].host})" for rank in ranks[:3])
        return f"{named} and {len(ranks) - 3} others" if len(ranks) > 3 else named

    def speaks(self, verdict: Verdict) -> bool:
        """Whether this process says so: the first on its machine that is not accused, or else the first."""
        if not self._words:
            return True
        host = self._words[self.rank].host
        here = [rank for rank in self._working() if self._words[rank].host == host]
        others = [rank for rank in here if rank not in verdict.accused]
        return self.rank == min(others or here, default=self.rank)
