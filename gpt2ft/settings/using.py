"""The settings of scripts that use a finished model: talking, serving, exporting."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gpt2ft.settings.sections import NotNegative, Positive, Precision, SamplingDefaults, Section


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
