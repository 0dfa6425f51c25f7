"""Everything that can be set, by section: names, defaults, ranges and meanings. Needs pydantic alone.

A section is used as it is by whatever it sets, so no default and no range stands in a second place. The docstring of a
setting is its help on the command line.
"""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from gpt2ft.settings.choices import LORA_TARGETS, PUBLISHED_MODELS
from gpt2ft.settings.columns import column_words
from gpt2ft.settings.per_target import by_target, per_target

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

PublishedModel = Literal[*PUBLISHED_MODELS]
LoRATarget = Literal[*LORA_TARGETS]
PairRule = Literal["all", "best_worst", "adjacent"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

RENAMED = {  # old name -> new name, with their sections: the old one is refused with the new one named
    "read_per_step": "prefill_chunk",
    "reader_seconds": "write_timeout",
    "reply_seconds": "request_timeout",
    "drain_seconds": "shutdown_timeout",
}


class Section(BaseModel):
    """Some settings.

    Attributes:
        most_used: dotted names of the settings that help shows first.
        groups: settings that help shows together, by title; those in none come before them.
    """

    most_used: ClassVar[tuple[str, ...]] = ()
    groups: ClassVar[dict[str, tuple[str, ...]]] = {}
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, values: Any) -> Any:
        """Read a single value as a list of one, `none` as no value or choice, an empty section as its defaults."""
        if not isinstance(values, dict):
            return values
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        return {name: _meant(kinds[name], value) if name in kinds else value for name, value in values.items()}

    def problems(self) -> Iterator[str]:
        """Yield each contradiction between settings as one sentence."""
        return iter(())


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def names_of(kind: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting."""
    for name, field in kind.model_fields.items():
        if is_section(field.annotation):
            yield from names_of(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def field_of(kind: type[Section], name: str) -> FieldInfo:
    """Return the setting of a dotted name."""
    *sections, last = name.split(".")
    for section in sections:
        kind = kind.model_fields[section].annotation
    return kind.model_fields[last]


def _meant(kind: Any, value: Any) -> Any:
    if is_section(kind):
        return {} if value is None else value
    if (
        get_origin(kind) is tuple
        and get_origin(get_args(kind)[0]) is Literal
        and value in ("none", ("none",), ["none"])
    ):
        return ()  # which is no choice
    if get_origin(kind) is tuple:
        return (value,) if isinstance(value, str | int | float) else value
    if isinstance(value, str) and value.lower() == "none" and type(None) in get_args(kind):
        return None
    if isinstance(value, bool) and {int, float, "true"} & _types(kind):
        return str(value).lower()  # else true would be 1; and YAML has no other word for it
    return value


def _types(kind: Any) -> set[Any]:
    """Return the types that a value may have, without limits."""
    if get_origin(kind) is Annotated:
        return _types(get_args(kind)[0])
    return {one for part in get_args(kind) for one in _types(part)} or {kind}


class ModelSettings(Section):
    """The model to start from."""

    path: Annotated[
        str,
        Field(
            description=f"A published model ({', '.join(PUBLISHED_MODELS)}), any other GPT-2 on the hub "
            "(owner/name[@revision]), the bundled one (quickstart), a Hugging Face folder, or a run."
        ),
    ] = "gpt2"
    random_init: bool = False
    """Take shape and tokenizer from `path` but weights from the seed."""
    attention: Literal["auto", "flex", "segments", "dense"] = "auto"
    """Implementation of attention; auto is flex on CUDA, else segments."""
    dropout: Fraction = 0.0
    """Dropout after the embeddings and on both residual branches."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Of SFT: noise on the embeddings in training, 5 is usual (NEFTune, Jain et al. 2023). It is divided by the square
    root of the width times the tokens of the longest path through a token."""


class LoRASettings(Section):
    """Low-rank adapters instead of all weights (Hu et al. 2021)."""

    rank: NotNegative = 0
    """Rank of the adapters; 0 trains all weights instead."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The output of the adapters is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the input of the adapters, in training."""
    targets: tuple[LoRATarget, ...] = ("q", "k", "v", "o")
    """Projections that get an adapter: of the attention (q, k, v, o) and of the MLP (fc, proj)."""
    rank_per_target: Annotated[tuple[str, ...], BeforeValidator(per_target(int))] = ()
    """Other ranks for some targets: q=16 v=4."""
    alpha_per_target: Annotated[tuple[str, ...], BeforeValidator(per_target(float))] = ()
    """Other alphas for some targets: q=32 v=8."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, which suits high ranks (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the norms of the adapted matrices' columns too (DoRA, Liu et al. 2024)."""
    embeddings: bool = False
    """Train all rows of the table of embeddings, which is the head too, and not those of the chat tokens alone."""
    plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the adapters' second matrix, B, over that of all else (LoRA+, Hayou et al. 2024)."""

    def rank_of(self, target: str) -> int:
        return int(by_target(self.rank_per_target).get(target, self.rank))

    def alpha_of(self, target: str) -> float:
        return float(by_target(self.alpha_per_target).get(target, self.alpha))

    def problems(self) -> Iterator[str]:
        if not self.rank and self != type(self)():
            yield "`lora.rank` must be set where other settings of `lora` are: without it all weights are trained"
        if self.rank and (not self.targets or len(set(self.targets)) < len(self.targets)):
            known, given = ", ".join(LORA_TARGETS), ", ".join(self.targets) or "nothing"
            yield f"`lora.targets` must name at least one of {known}, each once, but names {given}"
        for name in ("rank_per_target", "alpha_per_target"):
            odd = [target for target in by_target(getattr(self, name)) if target not in self.targets]
            if odd:
                yield f"`lora.{name}` must name targets that `lora.targets` names, but names {', '.join(odd)}"


class FilterSettings(Section):
    """The messages that are kept of a data source, and how it is read."""

    languages: tuple[str, ...] = ()
    """Keep messages in these languages only, as the data call them; empty keeps all. Records that name none are kept,
    but not OASST's messages."""
    max_rank: NotNegative | None = None
    """Keep replies ranked this well or better among their siblings (0 is the best); unranked replies stay."""
    reviewed_only: bool = True
    """Drop messages whose review said no."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of records and messages that are passed over, whatever they hold: else those that no layout reads, and that
    do not merely describe, are malformed."""
    columns: Annotated[tuple[str, ...], BeforeValidator(column_words)] = ()
    """What columns of other names are in a known layout: prompt=question,completion=answer. They must be there in all
    files and unpinned hub data."""
    documents: Literal["file", "line"] = "file"
    """What is one document of a .txt or .md file: all of it, or each line that is not blank."""
    on_error: Literal["fail", "skip"] = "fail"
    """fail ends the run at a malformed record; skip leaves it out and counts it by reason."""

    @property
    def filters(self) -> "FilterSettings":
        """These settings alone."""
        return FilterSettings(**{name: getattr(self, name) for name in FilterSettings.model_fields})


class CorpusSettings(FilterSettings):
    """Reading of data sources, whatever they are used for."""

    topic_replies: str | None = None
    """Replies that take the place of all others, whatever the prompt: a .txt with one a line, or any data source."""
    cache: str | None = None
    """Folder of the tokenised data; default $GPT2FT_CACHE or ~/.cache/gpt2ft."""


class SamplingDefaults(Section):
    """Choice of the tokens of replies, where nothing else is asked for."""

    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Higher is more varied, lower more predictable; 0 always takes the likeliest token."""
    top_k: NotNegative = 0
    """Choose among this many of the likeliest tokens; 0 among all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Choose among the likeliest tokens that together are this probable."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Leave out tokens less probable than this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1 makes tokens that have already appeared less likely."""


class SamplingSettings(SamplingDefaults):
    """Choice of the tokens of one reply."""

    seed: int | None = None
    """The same seed gives the same reply; default: another every time."""


Compile = Literal["auto", "true", "false"]


class StreamSettings(Section):
    """Streams of tokens and the precision of computing on them."""

    tokens_per_micro_batch: Positive = 8192
    """Most tokens in one stream, the unit of one pass through the model."""
    precision: Precision = "auto"
    """auto: the launcher's unless that is "no", then bf16 on GPUs that have it, fp16 on other NVIDIA GPUs (under ZeRO
    fp32), and fp32 on CPUs and Apple's GPUs."""


STREAM_BLOCK = 128  # tokens of a block of the attention mask


def stream_problems(
    tokens_per_micro_batch: int, max_length: int, prefix: str, name: str = "tokens_per_micro_batch"
) -> Iterator[str]:
    """Yield what is wrong with the length of a stream.

    Args:
        prefix: of the setting: `training.` or nothing.
    """
    key = f"`{prefix}{name}`"
    if tokens_per_micro_batch < max_length:
        yield f"{key} must be at least the longest path of {max_length} tokens, but is {tokens_per_micro_batch}"
    if tokens_per_micro_batch % STREAM_BLOCK:
        what = f"a multiple of {STREAM_BLOCK}, the block of the attention mask"
        yield f"{key} must be {what}, but is {tokens_per_micro_batch}"


def split_mixing_weight(source: str) -> tuple[str, float]:
    """Split `name@0.5` into name and mixing weight; 1 where none is given, or a file or folder has the whole name."""
    found = re.fullmatch(r"(.+)@([+-]?(?:\d+\.?\d*|\.\d+)(?:e\d+)?)", source)
    return (found[1], float(found[2])) if found and not os.path.exists(source) else (source, 1.0)


def source_problems(sources: Sequence[str], key: str, weighted: bool = False) -> Iterator[str]:
    """Yield what is wrong with the names of data sources.

    Args:
        weighted: a source may have a mixing weight.
    """
    names = [split_mixing_weight(source)[0] for source in sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"`{key}` must name each data source once, but {name} stands there {names.count(name)} times"
    for source in sources:
        name, weight = split_mixing_weight(source)
        if not name.strip():
            yield f"`{key}` must name data sources, but holds an empty name"
        if not weighted and name != source:
            yield f"`{key}` counts every message once, so {source} must have no mixing weight: give {name}"
        elif not 0 < weight <= 100:
            yield f"mixing weights in `{key}` must be above 0 and at most 100, but {source} has {weight:g}"
