"""The settings of scripts that measure: finished models, speed, replies, runs."""

import warnings
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from gpt2ft.settings.columns import column_problems
from gpt2ft.settings.sections import (
    Compile,
    CorpusSettings,
    FilterSettings,
    LoRASettings,
    NotNegative,
    PairRule,
    Positive,
    PublishedModel,
    Section,
    StreamSettings,
    source_problems,
    stream_problems,
)
from gpt2ft.settings.using import FinishedModelSettings, InferenceSettings


def _one_or_many(value: Any) -> Any:
    """Return the only value of a list in its place: one model is named as in other scripts."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


class EvaluateSettings(StreamSettings, CorpusSettings, FinishedModelSettings):
    """Scores models on held-out conversations, and compares them with the first: loss, replies, forgetting.

    The figures do not depend on the length of a stream.
    """

    most_used: ClassVar = (
        "data",
        "model",
        "max_rank",
        "languages",
        "pairs",
        "reference",
        "preferences",
        "topic",
        "prompts",
        "report",
        "output",
        "precision",
    )
    model: Annotated[tuple[str, ...] | str | None, BeforeValidator(_one_or_many)] = None
    """Runs, model folders, checkpoints or published names: the others are compared with the first; default the newest
    finished run in runs/."""
    data: tuple[str, ...]
    """Held-out data: hub names such as oasst1:validation, `quickstart:held_out`, or files."""
    max_length: Positive | None = None
    """Tokens of context; default the smallest of the models'."""
    pairs: PairRule | None = None
    """Score preferences instead: compare the replies to a prompt as `dpo.pairs` does."""
    preferences: tuple[str, ...] = ()
    """Held-out preferences to score too, beside the conversations in `data`."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """Factor of the rewards of preferences; default what the run was trained with, else 0.1."""
    reference: str | None = None
    """Model that rewards are measured against, named like `model`; default what a DPO run started from, if any."""
    num_prompts: NotNegative = 30
    """Prompts that every model answers: first the bundled ones, or all of `prompts`, then held-out ones; 0: none."""
    prompts: str | None = None
    """File of prompts: a line of text each, or a .jsonl of {"turns": ["...", ...]}. The first three are shown."""
    text: tuple[str, ...] = ()
    """Plain texts on which forgetting is measured; default two bundled pages."""
    topic: tuple[str, ...] = ()
    """Also answer held-out prompts, and count the replies in which one of these words occurs."""
    topic_prompts: Positive = 200
    """Most prompts to answer for `topic`."""
    max_new_tokens: Positive = 100
    """Longest reply in tokens."""
    attention: Literal["auto", "flex", "segments", "dense"] = "auto"
    """Implementation of attention, as in training."""
    seed: NotNegative = 0
    """Seed of the intervals; the same one gives the same report."""
    pairs_report: str | None = None
    """File of `launch/reference.py --report`, which becomes a section of the report."""
    report: str | None = None
    """File for the figures; default report.json in the folder of the last model, under a name that is free."""
    output: str | None = None
    """Folder for report.json, report.md and the page report.html."""

    @property
    def models(self) -> tuple[str, ...]:
        """The models that were named."""
        return self.model if isinstance(self.model, tuple) else (self.model,) if self.model else ()

    def problems(self) -> Iterator[str]:
        yield from source_problems(self.data, "data")
        yield from column_problems(self.columns, "columns")
        yield from source_problems(self.preferences, "preferences")
        if not self.data:
            yield "`data` must name at least one data source, but is empty"
        yield from stream_problems(self.tokens_per_micro_batch, self.max_length or 0, "")
        yield from super().problems()
        if not self.topic and self.topic_prompts != 200:
            yield "`topic` must be set where `topic_prompts` is: they are answered for it alone"
        if self.pairs is None and not self.preferences and (self.reference is not None or self.beta is not None):
            yield "`pairs` must be set where `reference` or `beta` is: only preferences have rewards"
        if self.prompts and not self.num_prompts:
            yield "`num_prompts` must be above 0 where `prompts` is set: without it nothing is answered"
        if self.report and self.output:
            yield "`report` and `output` must not both be set: the folder holds a report.json"
        for word in self.topic:
            if not word.strip() or len(word.split()) > 1:
                yield f"`topic` must be single words, but holds {word!r}"


warnings.filterwarnings("ignore", 'Field name "json"')  # pydantic's method of that name is not used here


class BenchmarkSettings(StreamSettings):
    """Measures speed and memory on made-up conversations or data, beside the usual way where one is asked for."""

    what: Literal["sft", "dpo", "reference", "generate"] = "sft"
    """Kind of work: steps of training, of preferences with their reference, that alone, or replies."""
    model: PublishedModel = "gpt2"
    """Shape of the model. Weights are random, nothing is downloaded."""
    data: tuple[str, ...] = ()
    """Conversations, or preferences, to take instead of made-up ones: files, folders or hub names."""
    against: Literal["transformers", "trl"] | None = None
    """Do the same the usual way too, in turn: padded batches of every path, full logits. By default only ours."""
    batch_size: Positive = 8
    """Sequences in a batch of the usual way; pairs of them of preferences."""
    micro_batches: Positive = 4
    """Streams per optimizer step on this process."""
    steps: Positive = 5
    """Measured optimizer steps, after one that is not counted."""
    new_tokens: Positive = 100
    """Tokens of each reply of `generate`."""
    attention: Literal["auto", "flex", "segments", "dense"] = "auto"
    """Implementation of attention, as in training."""
    compile: Compile = "auto"
    """Compile the blocks of the model, as in training."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass, as in training."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Peak that MFU is a share of; default the published one of the card, if it is known."""
    json: str | None = None
    """File for all figures as one object."""
    seed: NotNegative = 0
    """Seed of the weights and the conversations."""
    lora: LoRASettings = LoRASettings()

    @property
    def compares(self) -> bool:
        """True if replies are compared, by their reference at least."""
        return self.what in ("dpo", "reference")

    def problems(self) -> Iterator[str]:
        yield from stream_problems(self.tokens_per_micro_batch, 1024, "")
        yield from source_problems(self.data, "data")
        yield from self.lora.problems()
        if self.lora.rank and (self.against or self.what == "generate"):
            yield "`lora.rank` must be 0 with `against` or for `generate`: adapters are measured training alone"
        if self.what == "generate" and self.data:
            yield "`data` must be empty for `generate`, whose prompts are made up"
        if self.what == "generate" and self.against == "trl":
            yield "`against` must be transformers for `generate`: TRL has no decoder of its own"


class SampleSettings(InferenceSettings, FilterSettings):
    """Makes preferences without a judge: samples replies to prompts and ranks them by the faults that can be checked.

    A reply is at fault if it does not stop, repeats itself, writes the user's turn, copies the prompt, does not do what
    the prompt asks in words that can be checked, or breaks one of the rules below. The fewer faults, the better.
    """

    data: tuple[str, ...]
    """Prompts: any data source, of which each user turn is one with all above it, or a .txt with one a line."""
    output: str
    """File to write, .jsonl, which must not exist yet: `prompt`, `chosen`, `rejected`."""
    replies: Annotated[int, Field(ge=1)] = 8
    """Replies to each prompt."""
    num_prompts: Positive | None = None
    """Most prompts, the first ones; default all."""
    pairs: PairRule = "best_worst"
    """Replies that make a pair: each with every worse one (all), the best with the worst, or with the next worse."""
    best: bool = False
    """Rejection sampling: write the best reply to each prompt, if it has no fault, as a conversation for SFT."""
    topic: tuple[str, ...] = ()
    """A reply must hold one of these words."""
    check: tuple[str, ...] = ()
    """Instructions that every reply must obey, given or not: "in one sentence", "do not use the word tea"."""
    min_words: NotNegative = 0
    """Words that a reply must have."""
    max_words: Positive | None = None
    """Most words that a reply may have."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Higher is more varied: replies that are all alike make no pairs."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Choose among the likeliest tokens that together are this probable; 1 samples from the model as it is."""
    max_new_tokens: Positive = 100
    """Longest reply in tokens; one that has not ended by then does not stop."""
    seed: NotNegative = 0
    """The same seed gives the same file."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from source_problems(self.data, "data")
        if not self.data:
            yield "`data` must name at least one data source, but is empty"
        yield from column_problems(self.columns, "columns")
        if not self.output.lower().endswith(".jsonl"):
            yield f"`output` must be a file that training reads a line at a time, .jsonl, but is {self.output!r}"
        if self.best and self.pairs != type(self).model_fields["pairs"].default:
            yield "`pairs` must not be set with `best`, which writes conversations"
        if self.replies < 2 and not self.best:
            yield "`replies` must be at least 2 where pairs are made of them, but is 1"
        if self.temperature == 0 and self.replies > 1:
            yield "`temperature` must be above 0 where `replies` is: all replies to a prompt would be the same"
        if self.max_words is not None and self.max_words < self.min_words:
            yield f"`max_words` must be at least `min_words` = {self.min_words}, but is {self.max_words}"
        for word in self.topic:
            if not word.strip() or len(word.split()) > 1:
                yield f"`topic` must be single words, but holds {word!r}"


class VerifySettings(Section):
    """Checks a finished run and writes its certificate; tells whether a model is a certificate's; compares two runs."""

    paths: tuple[str, ...] = ()
    """A finished run; a certificate and a model; or two runs. Default the newest finished run in runs/."""
    steps: Positive = 100
    """Most steps of the run to compute again: the last ones, then random ones, each from a checkpoint before it."""
    seed: NotNegative | None = None
    """Seed of the choice of steps; default: others every time."""

    def problems(self) -> Iterator[str]:
        if len(self.paths) > 2:
            yield f"`paths` must be one or two, but are {len(self.paths)}"
