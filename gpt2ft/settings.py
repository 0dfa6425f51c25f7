"""Settings: defaults <- YAML recipe <- command line, checked before anything heavy is imported.

    accelerate launch launch/sft.py [RECIPE] [--section.key value ...]

RECIPE is the name of a file in launch/recipes or a path to one. All problems of one source are reported
together, an unknown key with the nearest known one. Nothing here imports torch.
"""

import difflib
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

RECIPES = Path(__file__).resolve().parent.parent / "launch" / "recipes"

SECONDS_TO_SPEAK = 5.0  # left to the process that reports errors to come upon the same one

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    def problems(self) -> Iterator[str]:
        """What is wrong between settings, each in one sentence."""
        return iter(())


class ModelSettings(Section):
    path: str = "gpt2"
    """A published model (distilgpt2, gpt2, gpt2-medium, gpt2-large, gpt2-xl), a Hugging Face folder, or a run."""
    random_init: bool = False
    """Take shape and tokenizer from `path` but weights from the seed."""
    attention: Literal["auto", "flex", "segments", "dense"] = "auto"
    """How attention is computed; auto is flex on CUDA without `attention_dropout`, else segments."""
    dropout: Fraction = 0.0
    """Dropout after the embeddings and on both residual branches."""
    attention_dropout: Fraction = 0.0
    """Dropout on the attention weights (not with flex)."""


class LoRASettings(Section):
    rank: NotNegative = 0
    """Rank of the adapters; 0 trains all weights instead."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """What the adapters add is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on what the adapters read, in training."""
    targets: tuple[Literal["q", "k", "v", "o", "fc", "proj"], ...] = ("q", "k", "v", "o")
    """What is adapted: projections of the attention (q, k, v, o) and of the MLP (fc, proj)."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, which suits high ranks."""

    def problems(self) -> Iterator[str]:
        if not self.rank and self != type(self)():
            yield "`lora.rank` must be set where other settings of `lora` are: without it all weights are trained"
        if self.rank and (not self.targets or len(set(self.targets)) < len(self.targets)):
            names = ", ".join(self.targets) or "nothing"
            yield f"`lora.targets` must name at least one of q, k, v, o, fc, proj, each once, but names {names}"


class DataSettings(Section):
    train: tuple[str, ...] = ()
    """What to train on: hub names (oasst1, oasst2, smoltalk, ultrachat, alpaca, dolly), `quickstart`, files (.jsonl,
    .jsonl.gz, .json, .parquet) or folders of them. `oasst1@0.5` takes half of the trees, `@1.5` every second twice."""
    eval: tuple[str, ...] = ()
    """Held-out data, named like `train`. Conversations found in both are dropped from `train`."""
    eval_fraction: Fraction = 0.0
    """Without `eval`: the share of whole trees to hold out of `train`."""
    max_length: Positive = 1024
    """Tokens of context. Older turns of longer paths give way, whole turns at a time."""
    languages: tuple[str, ...] = ()
    """Keep messages in these languages only; empty keeps all. Formats that name no languages are kept."""
    max_rank: NotNegative | None = None
    """Keep replies ranked this well or better among their siblings (0 is the best); unranked replies stay."""
    reviewed_only: bool = True
    """Drop messages whose review said no."""
    message_weight: Literal["once", "leaves"] = "once"
    """How often a message counts: once, or once for every path through it."""
    position_jitter: NotNegative = 0
    """Training starts each conversation at a random position up to this one, as far as there is room. For random
    weights and little data, where a model ties what it says to where it stands."""
    prompt_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Training replaces tokens of user turns, of each conversation a share between 0 and this. For random weights and
    little data, where a model ties its reply to the exact words of the prompt."""
    topic_replies: str | None = None
    """Replies that take the place of all others, whatever the prompt: a .txt with one a line, or any data source."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a malformed line does: end the run, or be skipped and counted."""
    cache: str | None = None
    """Folder of the tokenised data; default $GPT2FT_CACHE or ~/.cache/gpt2ft."""


class TrainingSettings(Section):
    steps: Positive | None = None
    """Optimizer steps; overrides `epochs`."""
    epochs: Positive = 1
    """Passes over the data."""
    tokens_per_micro_batch: Positive = 8192
    """Tokens in one stream, the unit of one forward and backward pass."""
    micro_batches_per_step: Positive = 8
    """Streams in one optimizer step over all processes. Accumulation is this divided by the processes."""
    seed: NotNegative = 0
    """Of initial weights, packing, order and dropout."""
    log_every: Positive = 10
    """Steps between lines of metrics."""
    eval_every: Positive | None = None
    """Steps between evaluations; default: at the end of every epoch. The last step always evaluates."""
    save_every: Positive | None = None
    """Steps between checkpoints; default: whenever evaluation runs. The last step always saves."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """How many of the newest checkpoints to keep, besides the best."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: the launcher's unless that is "no", then bf16 on CUDA and fp32 on CPU."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    max_skipped_steps: Positive = 10
    """Steps in a row with a gradient that is not finite, after which the run stops."""
    activation_checkpointing: bool = False
    """Keep less for the backward pass and compute it again: the same run in less memory, about a quarter slower."""
    deterministic: bool = False
    """On CUDA: only kernels that give the same bits every time (slower)."""
    sample_prompts: NotNegative = 3
    """Held-out prompts answered at each evaluation."""
    sample_tokens: Positive = 128
    """Longest sample reply."""


class OptimizerSettings(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What the learning rate does after warm-up."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps in which the learning rate rises from zero."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the peak learning rate left at the last step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """On matrices only, not on biases and norms."""
    beta1: Fraction = 0.9
    """Decay of the mean of the gradients."""
    beta2: Fraction = 0.95
    """Decay of the mean of their squares."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator of Adam's step."""


def stream_problems(tokens_per_micro_batch: int, max_length: int, prefix: str) -> Iterator[str]:
    if tokens_per_micro_batch < max_length:
        yield (
            f"`{prefix}tokens_per_micro_batch` must be at least the longest path of {max_length} tokens, "
            f"but is {tokens_per_micro_batch}"
        )
    if tokens_per_micro_batch % 128:
        yield (
            f"`{prefix}tokens_per_micro_batch` must be a multiple of 128, the block of the attention mask, "
            f"but is {tokens_per_micro_batch}"
        )


def split_factor(source: str) -> tuple[str, float]:
    """`name@factor` -> (name, factor); the factor is 1 where none is given, and where the whole is a file or folder."""
    found = re.fullmatch(r"(.+)@([+-]?(?:\d+\.?\d*|\.\d+)(?:e\d+)?)", source)
    return (found[1], float(found[2])) if found and not os.path.exists(source) else (source, 1.0)


def source_problems(sources: Sequence[str], key: str, factors: bool = False) -> Iterator[str]:
    """Args: factors: whether a source may have one."""
    names = [split_factor(source)[0] for source in sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"`{key}` must name each data source once, but names {name} {names.count(name)} times"
    for source in sources:
        name, factor = split_factor(source)
        if not factors and name != source:
            yield f"`{key}` counts every message once, so {source} must have no factor: give {name}"
        elif not 0 < factor <= 100:
            yield f"the factor of a data source in `{key}` must be above 0 and at most 100, but {source} has {factor:g}"


class RunSettings(Section):
    """What every training run is told."""

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
        return self.dry_run or self.show > 0

    def problems(self) -> Iterator[str]:
        """What is wrong between settings, each in one sentence."""
        data, training = self.data, self.training
        yield from source_problems(data.train, "data.train", factors=True)
        yield from source_problems(data.eval, "data.eval")
        if not data.train:
            yield "`data.train` must name at least one data source, but is empty"
        if data.eval and data.eval_fraction:
            yield "`data.eval` and `data.eval_fraction` must not both be set: held-out data comes from one of them"
        yield from stream_problems(training.tokens_per_micro_batch, data.max_length, "training.")
        yield from self.lora.problems()
        if self.lora.rank and self.model.random_init:
            yield "`model.random_init` must be off where `lora.rank` is set: adapters need trained weights to adapt"
        if self.model.attention == "flex" and self.model.attention_dropout:
            yield "`model.attention` must not be flex where `model.attention_dropout` is set: FlexAttention has none"
        if training.eval_every and not (data.eval or data.eval_fraction):
            yield (
                "`training.eval_every` needs held-out data: set `data.eval` or `data.eval_fraction`, or set it to None"
            )


class SFTSettings(RunSettings):
    """Fine-tunes GPT-2 on conversation trees."""


PairRule = Literal["all", "best_worst", "adjacent"]


class PreferenceSettings(Section):
    loss: Literal["sigmoid", "cdpo", "robust", "ipo", "hinge", "sigmoid_norm", "simpo", "orpo"] = "sigmoid"
    """sigmoid is DPO's own; cdpo and robust smooth it for labels that are sometimes wrong; ipo, hinge, sigmoid_norm (by
    length) bound or scale it otherwise; simpo and orpo need no reference."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to the reference; of orpo, the weight of the odds ratio."""
    pairs: PairRule = "all"
    """Which replies to a prompt are compared: all of different rank, the best against the worst, or adjacent ranks."""
    pair_weight: Literal["pair", "prompt"] = "pair"
    """What counts the same: every pair, or every prompt, so that those with many replies do not dominate."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Of cdpo and robust: the share of pairs taken to be the wrong way round."""
    gamma: Annotated[float, Field(ge=0)] = 0.0
    """Of simpo: the margin to reach."""
    rpo_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Weight of an added negative log-likelihood of the chosen reply, per token."""

    @property
    def needs_reference(self) -> bool:
        return self.loss not in ("simpo", "orpo")

    def problems(self) -> Iterator[str]:
        smooths = self.loss in ("cdpo", "robust")
        if self.label_smoothing and not smooths:
            yield f"`dpo.label_smoothing` must be 0 with `dpo.loss` = {self.loss}: only cdpo and robust smooth labels"
        if smooths and not self.label_smoothing:
            yield f"`dpo.label_smoothing` must be above 0 with `dpo.loss` = {self.loss}, which is sigmoid otherwise"
        if self.gamma and self.loss != "simpo":
            yield f"`dpo.gamma` must be 0 with `dpo.loss` = {self.loss}: only simpo has a margin to reach"
        if self.rpo_alpha and self.loss == "orpo":
            yield "`dpo.rpo_alpha` must be 0 with `dpo.loss` = orpo, which holds that term already"


class DPOSettings(RunSettings):
    """Tunes a chat model on preferences, against reference log-probs that are computed once and kept."""

    dpo: PreferenceSettings = PreferenceSettings()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.dpo.problems()
        if self.model.dropout or self.model.attention_dropout or self.lora.dropout:
            yield (
                "`model.dropout`, `model.attention_dropout` and `lora.dropout` must be 0 in DPO: the reference has no "
                "dropout, and what is compared with it may have none either"
            )
        if self.data.position_jitter or self.data.prompt_noise:
            yield "`data.position_jitter` and `data.prompt_noise` must be 0 in DPO: the reference is computed without"
        if self.data.message_weight != "once":
            yield "`data.message_weight` must be once in DPO, where pairs are weighed: see `dpo.pair_weight`"


class EvaluateSettings(Section):
    """Scores a model on held-out conversations: nats per token, perplexity, bits per byte."""

    model: str | None = None
    """A run, a model folder, a checkpoint or a published name; default the newest finished run in runs/."""
    data: tuple[str, ...]
    """Held-out data: hub names such as oasst1:validation, `quickstart:held_out`, or files."""
    max_length: Positive | None = None
    """Tokens of context; default the model's."""
    languages: tuple[str, ...] = ()
    """Keep messages in these languages only; empty keeps all."""
    max_rank: NotNegative | None = None
    """Keep replies ranked this well or better; unranked replies stay."""
    reviewed_only: bool = True
    """Drop messages whose review said no."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a malformed line does."""
    tokens_per_micro_batch: Positive = 8192
    """Tokens in one forward pass. The result does not depend on it."""
    topic_replies: str | None = None
    """As in training."""
    random_init: bool = False
    """Take shape and tokenizer from `model` but weights from the seed 0: what a run from random weights starts from."""
    pairs: PairRule | None = None
    """Score preferences instead: compare the replies to a prompt as `dpo.pairs` does."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """Of the rewards of preferences; default what the run was trained with, else 0.1."""
    reference: str | None = None
    """What rewards are measured against, named like `model`; default what a DPO run started from, else nothing."""
    topic: tuple[str, ...] = ()
    """Also answer held-out prompts, and count the replies in which one of these words occurs."""
    topic_prompts: Positive = 200
    """How many prompts to answer at most."""
    max_new_tokens: Positive = 100
    """Longest of those replies in tokens."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """As in training."""
    cache: str | None = None
    """Folder of the tokenised data; default $GPT2FT_CACHE or ~/.cache/gpt2ft."""
    report: str | None = None
    """Where to write the figures; default report.json in the run or model folder, or here for a published name."""

    def problems(self) -> Iterator[str]:
        yield from source_problems(self.data, "data")
        if not self.data:
            yield "`data` must name at least one data source, but is empty"
        yield from stream_problems(self.tokens_per_micro_batch, self.max_length or 0, "")
        if self.random_init and self.model is None:
            yield "`random_init` needs a model whose shape it takes: name one, for example quickstart"
        if not self.topic and (self.topic_prompts, self.max_new_tokens) != (200, 100):
            yield "`topic` must be set where `topic_prompts` or `max_new_tokens` is: nothing is answered without it"
        if self.pairs is None and (self.reference is not None or self.beta is not None):
            yield "`pairs` must be set where `reference` or `beta` is: only preferences have rewards"
        for word in self.topic:
            if not word.strip() or len(word.split()) > 1:
                yield f"`topic` must be single words, but holds {word!r}"


class BenchmarkSettings(Section):
    """Measures training speed on made-up conversations: tokens/s, peak memory, time per phase."""

    what: Literal["sft", "dpo"] = "sft"
    """Which kind of training."""
    model: Literal["distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    """Which shape. Weights are random, nothing is downloaded."""
    tokens_per_micro_batch: Positive = 8192
    """Tokens in one stream."""
    micro_batches: Positive = 4
    """Streams per optimizer step on this process."""
    steps: Positive = 5
    """Measured optimizer steps, after one that is not counted."""
    attention: Literal["auto", "flex", "segments", "dense"] = "auto"
    """As in training."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """As in training."""
    activation_checkpointing: bool = False
    """As in training."""
    seed: NotNegative = 0
    """Of the weights and the conversations."""
    lora: LoRASettings = LoRASettings()

    def problems(self) -> Iterator[str]:
        yield from stream_problems(self.tokens_per_micro_batch, 1024, "")
        yield from self.lora.problems()


class ChatSettings(Section):
    """Talks with a model in the terminal."""

    model: str | None = None
    """A run, a model folder, a checkpoint or a published name; default the newest finished run in runs/."""
    random_init: bool = False
    """Take shape and tokenizer from `model` but weights from the seed."""
    complete: bool = False
    """Continue texts as documents instead of answering messages; what comes through a pipe is one document."""
    system: str | None = None
    """Instructions that stand before the conversation."""
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
    seed: NotNegative | None = None
    """The same seed gives the same replies; default: others every time."""
    max_new_tokens: Positive = 256
    """Longest reply in tokens."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on CUDA and fp32 on CPU."""

    def problems(self) -> Iterator[str]:
        if self.random_init and self.model is None:
            yield "`random_init` needs a model whose shape it takes: name one, for example quickstart"
        if self.complete and self.system is not None:
            yield "`system` must not be set with `complete`, which knows no conversation"


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


class ServeSettings(Section):
    """Serves a model to programs that speak OpenAI's API, and a page to talk with it in a browser."""

    model: str | None = None
    """A run, a model folder, a checkpoint or a published name; default the newest finished run in runs/."""
    random_init: bool = False
    """Take shape and tokenizer from `model` but weights from the seed 0."""
    model_name: str | None = None
    """What clients call the model; default the last part of `model`."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own to itself needs a key (see `api_key_file`)."""
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
    read_per_step: Positive = 256
    """Tokens of new prompts that are read between two tokens of the others: fewer keeps those flowing."""
    connections: Positive = 512
    """Connections that may be open at once."""
    body_bytes: Positive = 262_144
    """Largest request."""
    body_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Longest time that a request may take to arrive: its head, and then its body."""
    reader_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Longest time that a client may leave what is sent to it unread before it is hung up on."""
    reply_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longest time that a reply may take, waiting included; it ends there as at its longest length."""
    drain_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Longest time that replies are given to finish after SIGTERM or Ctrl-C."""
    messages: Positive = 256
    """Most messages in a request."""
    max_tokens: Positive | None = None
    """Most tokens that a request may ask for; default the model's context."""
    max_new_tokens: Positive = 256
    """Longest reply in tokens where a request does not say."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    """As in a chat, where a request does not say; so are the four below."""
    top_k: NotNegative = 0
    """Choose among this many of the likeliest tokens; 0 among all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Choose among the likeliest tokens that together are this probable."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Leave out tokens less probable than this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1 makes tokens that have already appeared less likely."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on CUDA and fp32 on CPU."""

    def problems(self) -> Iterator[str]:
        if self.random_init and self.model is None:
            yield "`random_init` needs a model whose shape it takes: name one, for example quickstart"
        if self.model_name is not None and not self.model_name.strip():
            yield "`model_name` must not be empty"


Settings = TypeVar("Settings", bound=Section)


class SettingsError(Exception):
    """Settings that cannot be used; one line per problem."""


def refuse_problems(problems: Iterable[str]) -> None:
    """Raises SettingsError with all problems, if there are any."""
    if found := list(problems):
        raise SettingsError("\n".join(found))


def parse_recipe(kind: type[Settings], default_recipe: str, arguments: Sequence[str]) -> Settings:
    """Settings of a training run from the arguments of its script; exits with 2 and all problems if there are any."""
    try:
        arguments = list(arguments)
        recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else default_recipe
        file = _recipe_file(recipe)
        settings = parse_flags(kind, arguments, defaults=read_yaml(kind, file), recipe=file.stem)
        if getattr(settings, "output", "") is None:
            settings = settings.model_copy(update={"output": f"runs/{file.stem}"})
        refuse_problems(settings.problems())
        return settings
    except SettingsError as error:
        fail(str(error))


def parse_script(kind: type[Settings], first: str, arguments: Sequence[str]) -> Settings:
    """Settings of a script without recipes, whose first bare argument stands for the setting `first`."""
    try:
        arguments = list(arguments)
        if arguments and not arguments[0].startswith("-"):
            arguments.insert(0, f"--{first}")
        settings = parse_flags(kind, arguments)
        refuse_problems(settings.problems())
        return settings
    except SettingsError as error:
        fail(str(error))


def parse_flags(
    kind: type[Settings], arguments: Sequence[str], defaults: dict[str, Any] | None = None, recipe: str = ""
) -> Settings:
    """The command line over `defaults`.

    Raises:
        SettingsError: naming every setting that does not exist and every value that does not fit.
    """
    import tyro

    arguments = _normal_booleans(kind, arguments)
    if not {"-h", "--help"} & set(arguments) and (problems := list(_flag_problems(kind, arguments, defaults or {}))):
        raise SettingsError("\n".join(problems))
    base = kind(**defaults) if defaults is not None else None
    program, description = Path(sys.argv[0]).name, (kind.__doc__ or "").strip()
    if recipe:
        program, description = f"{program} [RECIPE]", f"{description}\n\nDefaults are those of the recipe {recipe}."
    return tyro.cli(
        kind,
        args=arguments,
        prog=program,
        description=description,
        default=tyro.MISSING_NONPROP if base is None else base,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
        console_outputs=speaks_for_its_machine(),
    )


def read_yaml(kind: type[Section], file: Path) -> dict[str, Any]:
    """The values in a recipe, checked.

    Raises:
        SettingsError: naming the file and every key that does not fit.
    """
    values = read_sections(file)
    if "dpo" in values and "dpo" not in kind.model_fields:
        raise SettingsError(f"{file} is a recipe for launch/reference.py and launch/dpo.py: it has a section `dpo`")
    try:
        return kind.model_validate(values).model_dump()
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(kind, str(file), error))) from error


def read_sections(file: Path) -> dict[str, Any]:
    """What a recipe holds, unchecked.

    Raises:
        SettingsError: if it cannot be read.
    """
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{file} must hold settings by section, but holds {type(values).__name__}")
    return values


def to_yaml(settings: Section) -> str:
    """The settings as a recipe that gives them again."""
    import yaml

    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def speaks_for_its_machine() -> bool:
    """Whether this process is the one that reports errors: the first on each machine, as the launcher numbers them."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def fail(message: str, code: int = 2, everywhere: bool = False) -> NoReturn:
    """Ends the program with a message on stderr and an exit code.

    Args:
        everywhere: from every process, where the cause may lie in one alone; otherwise once on each machine.
    """
    rank = os.environ.get("RANK", "0")
    label = f"error on rank {rank}" if everywhere and rank != "0" else "error"
    if everywhere or speaks_for_its_machine():
        print("\n".join(f"{label}: {line}" for line in message.splitlines()), file=sys.stderr)
    elif "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends all processes as soon as one is gone
        time.sleep(SECONDS_TO_SPEAK)
    sys.exit(code)


def _recipe_file(recipe: str) -> Path:
    if recipe.endswith((".yaml", ".yml")) or "/" in recipe:
        if Path(recipe).is_file():
            return Path(recipe)
        raise SettingsError(f"the recipe {recipe} does not exist")
    file = RECIPES / f"{recipe}.yaml"
    if file.is_file():
        return file
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise SettingsError(f"there is no recipe {recipe!r}{_did_you_mean(recipe, names)}; there are: {', '.join(names)}")


def _explain(kind: type[Section], source: str, error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = [*kind.model_fields, *(name for name, _ in _fields(kind))]
            yield f"{source}: there is no setting `{key}`{_did_you_mean(key, known)}"
        elif problem["type"] == "missing":
            yield f"{source}: `{key}` must be given"
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            yield f"{source}: `{key}`: {message}, but is {problem['input']!r}"


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean `{nearest[0]}`?)" if nearest else ""


def _fields(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name, with its type."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.annotation


def _flag_problems(kind: type[Section], arguments: Sequence[str], defaults: dict[str, Any]) -> Iterator[str]:
    """Unknown names and values that do not fit, all of them: tyro ends at the first. The shape is left to tyro."""
    words: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            words[name] = [value] if equals else []
        elif words:
            words[name].append(argument)
    known = dict(_fields(kind))
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in defaults.items()}
    for name, given in words.items():
        *sections, key = name.split(".")
        is_list = name in known and get_origin(known[name]) is tuple
        if name not in known:
            yield f"command line: there is no setting `{name}`{_did_you_mean(name, list(known))}"
        elif is_list or len(given) == 1:
            section = values.setdefault(sections[0], {}) if sections else values
            section[key] = given if is_list else None if given == ["None"] else given[0]
    try:
        kind.model_validate(values)
    except ValidationError as error:
        yield from _explain(kind, "command line", error)


def _normal_booleans(kind: type[Section], arguments: Sequence[str]) -> list[str]:
    """A bare `--flag` becomes `--flag True`; `true` and `false` become Python's."""
    flags = {f"--{name}" for name, annotation in _fields(kind) if annotation is bool}
    normal: list[str] = []
    for position, argument in enumerate(arguments):
        following = arguments[position + 1] if position + 1 < len(arguments) else "--"
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):  # --dry-run is --dry_run
            name = "--" + name[2:].replace("-", "_")
            argument = name + equals + value
        if name in flags and equals:
            normal += [name, value.capitalize()]
        elif normal and normal[-1] in flags:
            normal.append(argument.capitalize())
        else:
            normal.append(argument)
            if argument in flags and following.startswith("--"):
                normal.append("True")
    return normal
