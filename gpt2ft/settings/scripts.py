"""The settings of each script: sections put together, and what must hold between them."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gpt2ft.settings.columns import column_problems
from gpt2ft.settings.sections import (
    DataSettings,
    LoRASettings,
    ModelSettings,
    NotNegative,
    OptimizerSettings,
    Positive,
    Precision,
    PreferenceSettings,
    SamplingDefaults,
    Section,
    TrackerName,
    TrainingSettings,
    source_problems,
    stream_problems,
)

WITHOUT_EFFECT = ("output", "resume", "tracking", "dry_run", "show")  # on what is trained


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
    tracking: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers that are shown curves and sample replies, beside metrics.jsonl; or none."""
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
        if training.tokens_per_micro_batch == "auto":
            yield from stream_problems(training.auto_from, data.max_length, "training.", "auto_from")
        else:
            yield from stream_problems(training.tokens_per_micro_batch, data.max_length, "training.")
            if training.auto_from != type(training).model_fields["auto_from"].default:
                yield "`training.auto_from` must be left out unless `training.tokens_per_micro_batch` is auto"
        yield from self.lora.problems()
        if len(set(self.tracking)) < len(self.tracking):
            yield f"`tracking` must name each tracker once, but names {', '.join(self.tracking)}"
        if self.lora.rank and self.model.random_init:
            yield "`model.random_init` must be off where `lora.rank` is set: adapters need trained weights to adapt"
        needing = {"training.eval_every": training.eval_every, "training.patience": training.patience}
        for name, value in (needing | {"data.eval_limit": data.eval_limit}).items():
            if value and not data.holds_out:
                yield f"`{name}` needs held-out data: set `data.eval` or `data.eval_fraction`, or set it to none"


class SFTSettings(RunSettings):
    """Fine-tunes GPT-2 on conversation trees."""


class DPOSettings(RunSettings):
    """Tunes a chat model on preferences, against reference log-probs that are computed once and kept."""

    most_used: ClassVar = (
        "dpo.loss",
        "dpo.beta",
        "data.train",
        "data.eval",
        "model.path",
        "output",
        "training.epochs",
        "optimizer.learning_rate",
        "training.micro_batches_per_step",
        "lora.rank",
        "dry_run",
        "show",
    )
    dpo: PreferenceSettings = PreferenceSettings()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.dpo.problems()
        if self.model.dropout or self.lora.dropout or self.model.neftune_alpha:
            yield (
                "`model.dropout`, `lora.dropout` and `model.neftune_alpha` must be 0 in DPO: the reference has no "
                "dropout and no noise, and what is compared with it may have none either"
            )
        if self.data.message_weight != "once":
            yield "`data.message_weight` must be once in DPO, where pairs are weighed: see `dpo.pair_weight`"
        if self.data.train_on != "all":
            yield "`data.train_on` must be all in DPO, where replies to one prompt are compared: see `dpo.pairs`"


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
        if self.report is not None and self.dpo.loss == "kto":
            yield "`report` must not be set with `dpo.loss` = kto: it tells of pairs"
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


class InferenceSettings(SamplingDefaults, FinishedModelSettings):
    """A model that replies, and how it does where nothing else is asked for."""

    max_new_tokens: Positive = 256
    """Longest reply in tokens."""
    precision: Precision = "auto"
    """auto is bf16 on GPUs that have it, fp16 on other NVIDIA GPUs, and fp32 on CPUs and Apple's GPUs."""


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
    push: str | None = None
    """Name on the Hugging Face hub, owner/name or a name of your own, to upload the folder to once it is written."""
    public: bool = False
    """Show what `push` uploads to everybody; otherwise to you, or your organisation, alone."""

    def problems(self) -> Iterator[str]:
        if self.public and self.push is None:
            yield "`public` needs a name on the hub: give it in `push`"
        if self.format == "adapter" and self.dtype:
            yield "`dtype` must not be set where `format` is adapter: adapters are written as they were trained"


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
