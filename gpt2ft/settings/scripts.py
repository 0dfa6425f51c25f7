"""The settings of each script: sections put together, and what must hold between them."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from gpt2ft.settings.columns import column_problems
from gpt2ft.settings.sections import (
    CorpusSettings,
    DataSettings,
    FilterSettings,
    LoRASettings,
    ModelSettings,
    NotNegative,
    OptimizerSettings,
    PairRule,
    Positive,
    PreferenceSettings,
    PublishedModel,
    SamplingDefaults,
    Section,
    StreamSettings,
    TrainingSettings,
    source_problems,
    stream_problems,
)


class RunSettings(Section):
    """Settings of every training run."""

    most_used: ClassVar = (
        "data.train",
        "data.eval",
        "model.path",
        "output",
        "training.epochs",
        "training.steps",
        "optimizer.learning_rate",
        "training.tokens_per_micro_batch",
        "training.micro_batches_per_step",
        "lora.rank",
        "dry_run",
        "show",
    )
    model: ModelSettings = ModelSettings()
    lora: LoRASettings = LoRASettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    output: str | None = None
    """Folder of the run; default runs/<recipe>."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues an interrupted run in `output`; never moves it aside and starts anew."""
    dry_run: bool = False
    """Print the plan and what the data are like: lengths, depths, duplicates, overlap. Trains nothing."""
    show: NotNegative = 0
    """Print this many examples as the model will see them. Trains nothing."""

    @property
    def looks_only(self) -> bool:
        """True if the run only prints its plan or examples."""
        return self.dry_run or self.show > 0

    def problems(self) -> Iterator[str]:
        data, training = self.data, self.training
        yield from source_problems(data.train, "data.train", weighted=True)
        yield from source_problems(data.eval, "data.eval")
        yield from column_problems(data.columns, "data.columns")
        if not data.train:
            yield "`data.train` must name at least one data source, but is empty: give `--data.train FILE`"
        if data.eval and data.eval_fraction:
            yield "`data.eval` and `data.eval_fraction` must not both be set: held-out data comes from one of them"
        yield from stream_problems(training.tokens_per_micro_batch, data.max_length, "training.")
        yield from self.lora.problems()
        if self.lora.rank and self.model.random_init:
            yield "`model.random_init` must be off where `lora.rank` is set: adapters need trained weights to adapt"
        if training.eval_every and not data.holds_out:
            yield (
                "`training.eval_every` needs held-out data: set `data.eval` or `data.eval_fraction`, or set it to none"
            )


class SFTSettings(RunSettings):
    """Fine-tunes GPT-2 on conversation trees."""


class DPOSettings(RunSettings):
    """Tunes a chat model on preferences, against reference log-probs that are computed once and kept."""

    most_used: ClassVar = ("dpo.loss", "dpo.beta", *RunSettings.most_used[:5], *RunSettings.most_used[-5:])
    dpo: PreferenceSettings = PreferenceSettings()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.dpo.problems()
        if self.model.dropout or self.lora.dropout:
            yield (
                "`model.dropout` and `lora.dropout` must be 0 in DPO: the reference has no dropout, and what is "
                "compared with it may have none either"
            )
        if self.data.message_weight != "once":
            yield "`data.message_weight` must be once in DPO, where pairs are weighed: see `dpo.pair_weight`"


class ReferenceSettings(DPOSettings):
    """Computes reference log-probs, and says what they tell of the pairs."""

    report: str | None = None
    """File, .json, for what the stored log-probs tell of the training pairs: also printed."""
    later: tuple[str, ...] = ()
    """Models that were trained from the start (runs, checkpoints), the last one last: how far each has gone from it."""
    margin: Annotated[float, Field(gt=0)] = 0.5
    """Nats per token by which the start must order a pair for it to be called easy, or likely mislabelled."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.report is None and (self.later or self.margin != type(self).model_fields["margin"].default):
            yield "`report` must be set where `later` or `margin` is: they are of the report alone"


class FinishedModelSettings(Section):
    """The model of a script that does not train."""

    model: str | None = None
    """A run, a model folder, a checkpoint or a published name; default the newest finished run in runs/."""
    random_init: bool = False
    """Take shape and tokenizer from `model` but weights from the seed, 0 where there is none."""

    def problems(self) -> Iterator[str]:
        if self.random_init and self.model is None:
            yield "`random_init` needs a model whose shape it takes: name one, for example quickstart"


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


class BenchmarkSettings(StreamSettings):
    """Measures training speed on made-up conversations: tokens/s, peak memory, time per phase."""

    what: Literal["sft", "dpo"] = "sft"
    """Kind of training."""
    model: PublishedModel = "gpt2"
    """Shape of the model. Weights are random, nothing is downloaded."""
    micro_batches: Positive = 4
    """Streams per optimizer step on this process."""
    steps: Positive = 5
    """Measured optimizer steps, after one that is not counted."""
    attention: Literal["auto", "flex", "segments", "dense"] = "auto"
    """Implementation of attention, as in training."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass, as in training."""
    seed: NotNegative = 0
    """Seed of the weights and the conversations."""
    lora: LoRASettings = LoRASettings()

    def problems(self) -> Iterator[str]:
        yield from stream_problems(self.tokens_per_micro_batch, 1024, "")
        yield from self.lora.problems()


class InferenceSettings(SamplingDefaults, FinishedModelSettings):
    """A model that replies, and how it does where nothing else is asked for."""

    max_new_tokens: Positive = 256
    """Longest reply in tokens."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on GPUs that have it, and fp32 otherwise."""


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


class ChatSettings(InferenceSettings):
    """Talks with a model in the terminal."""

    seed: NotNegative | None = None
    """The same seed gives the same replies; default: others every time."""
    complete: bool = False
    """Continue texts as documents instead of answering messages; what comes through a pipe is one document."""
    system: str | None = None
    """Instructions that stand before the conversation."""
    list: bool = False
    """Name the finished runs in runs/, newest first, and end."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.complete and self.system is not None:
            yield "`system` must not be set with `complete`, which knows no conversation"
        if self.list and self != type(self)(list=True):
            yield "`list` must stand alone: it only names the finished runs"


class ExportSettings(Section):
    """Writes a model as others read it, reads it back and compares."""

    model: str | None = None
    """A run, a model folder, a checkpoint, an adapter or a published name; default the newest finished run in runs/."""
    format: Literal["hf", "adapter", "gguf"]
    """hf: a folder for transformers, vLLM and lm-evaluation-harness, adapters merged; adapter: of a LoRA run, for PEFT;
    gguf: for llama.cpp and Ollama."""
    output: str
    """Folder to write, which must not exist yet."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the weights, in gguf of the matrices; default float32 in hf, float16 in gguf."""

    def problems(self) -> Iterator[str]:
        if self.format == "adapter" and self.dtype:
            yield "`dtype` must not be set where `format` is adapter: adapters are written as they were trained"


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


class ServeSettings(InferenceSettings):
    """Serves a model to programs that speak OpenAI's API, and a page to talk with it in a browser.

    Settings of replies hold where a request says nothing else.
    """

    most_used: ClassVar = (
        "model",
        "host",
        "port",
        "api_key_file",
        "temperature",
        "max_new_tokens",
        "model_name",
        "slots",
        "compare",
        "votes",
    )
    compare: tuple[str, ...] = ()
    """Two models in place of `model`: the page shows a reply of each, in random order, and asks which is better."""
    votes: str | None = None
    """File to which the votes on `compare` are added, .jsonl: preferences that launch/dpo.py reads as they are."""
    vote_timeout: Annotated[float, Field(gt=0)] = 3600.0
    """Longest time in seconds that a pair of replies waits for its vote."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    """Higher is more varied, lower more predictable; 0 always takes the likeliest token."""
    max_tokens: Positive | None = None
    """Most tokens that a request may ask for; default the model's context."""
    model_name: str | None = None
    """Name of the model for clients; default the last part of `model`."""
    host: str = "127.0.0.1"
    """Address to listen on. One that other machines can reach needs a key (see `api_key_file`)."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one. It is printed."""
    api_key_file: str | None = None
    """File with the key that clients must give; default the environment variable GPT2FT_API_KEY, else none."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients may know this server, beside localhost and its addresses."""
    slots: Positive = 16
    """Replies that are decoded together. Each can take the memory of one full context."""
    queue: NotNegative = 64
    """Requests that may wait for a slot; further ones are answered with 429."""
    prefill_chunk: Positive = 256
    """Tokens of new prompts that are read between two tokens of running replies; fewer keeps those flowing."""
    connections: Positive = 512
    """Connections that may be open at once."""
    messages: Positive = 256
    """Most messages in a request."""
    body_bytes: Positive = 262_144
    """Largest request."""
    body_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Longest time that a request may take to arrive: its head, and then its body."""
    write_timeout: Annotated[float, Field(gt=0)] = 30.0
    """Longest time that a client may leave what is sent to it unread before it is hung up on."""
    request_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Longest time that a reply may take, waiting included; it ends there as at its longest length."""
    shutdown_timeout: Annotated[float, Field(gt=0)] = 30.0
    """Longest time that replies are given to finish after SIGTERM or Ctrl-C."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.model_name is not None and not self.model_name.strip():
            yield "`model_name` must not be empty"
        if self.compare and (self.model is not None or self.random_init):
            yield "`model` and `random_init` must be left out where `compare` names the models"
        if self.compare and len(self.compare) != 2:
            yield f"`compare` must name two models, but names {len(self.compare)}"
        if self.compare and self.votes is None:
            yield "`compare` needs a file for the votes: name it in `votes`"
        if self.votes is not None and not self.votes.lower().endswith(".jsonl"):
            yield f"`votes` must be a file that training reads a line at a time, .jsonl, but is {self.votes!r}"
        if self.votes is not None and not self.compare:
            yield "`votes` needs two models to vote on: name them in `compare`"
