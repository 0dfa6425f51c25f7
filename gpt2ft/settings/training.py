"""Settings of training alone: data, the loop, the optimizer, preferences."""

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gpt2ft.preference_losses import PREFERENCE_LOSSES
from gpt2ft.settings.choices import TRACKERS
from gpt2ft.settings.sections import (
    Compile,
    CorpusSettings,
    Fraction,
    NotNegative,
    PairRule,
    Positive,
    Section,
    StreamSettings,
)

MessageWeight = Literal["once", "leaves"]
TrainOn = Literal["all", "last"]
TrackerName = Literal[*TRACKERS]
LossName = Literal[*PREFERENCE_LOSSES]
PairWeight = Literal["pair", "prompt"]

MINUTES_BETWEEN_SAVES = 30.0

# What suits the bundled base, which is 256 wide.
QUICKSTART_WIDTH, QUICKSTART_RATE, QUICKSTART_STEPS = 256, 1e-3, 240


class DataSettings(CorpusSettings):
    """The conversations to train on and to evaluate on."""

    groups: ClassVar = {"how sources are read": tuple(CorpusSettings.model_fields)}
    train: tuple[str, ...] = ()
    """Data to train on: hub names (oasst1, oasst2, smoltalk, ultrachat, alpaca, dolly, or any
    owner/name[:split][@revision]), `quickstart`, files (.jsonl, .json, .csv, .tsv, .txt, .md, also with .gz, .parquet,
    .arrow) or folders of them. `oasst1@0.5` takes half of the trees, `@1.5` every second twice."""
    eval: tuple[str, ...] = ()
    """Held-out data, named like `train`. Conversations found in both are dropped from `train`."""
    eval_fraction: Fraction | None = 0.0
    """Without `eval`: the share of whole trees to hold out of `train`. none: about a twentieth, one conversation at
    least, but nothing of fewer than ten."""
    eval_limit: Positive | None = None
    """Most held-out conversations to evaluate on while training, chosen by their content: the same ones in every run.
    The others stay held out."""
    max_length: Positive = 1024
    """Tokens of context. Where a path is longer, its oldest turns give way, whole turns at a time."""
    train_on: TrainOn = "all"
    """Assistant turns that are learnt, and held-out ones that are scored: all, or the last of each path alone, which no
    other assistant turn follows."""
    message_weight: MessageWeight = "once"
    """A message counts once, or once for every path through it (leaves)."""
    share_prefixes: bool = False
    """Compute turns that conversations of a source open with alike once, also where the data are no trees. With `once`
    they then count once, and what opens with the same user turn is held out together."""

    @property
    def holds_out(self) -> bool:
        """True if there are held-out data, unless too few to spare any."""
        return bool(self.eval) or self.eval_fraction != 0


class TrainingSettings(StreamSettings):
    """Length of the run and its steps."""

    groups: ClassVar = {
        "evaluation": ("eval_every", "patience", "sample_prompts", "sample_tokens"),
        "checkpoints": ("save_every", "save_minutes", "keep_checkpoints", "keep_for_verification"),
        "computing": ("precision", "compile", "activation_checkpointing", "deterministic"),
    }
    tokens_per_micro_batch: Positive | Literal["auto"] = 8192
    """Most tokens in one stream, the unit of one pass through the model; auto: as many as memory holds, with fewer
    streams a step."""
    auto_from: Positive = 8192
    """With auto: a step has as many tokens as `micro_batches_per_step` streams of so many; default what the recipe has
    in place of auto."""
    steps: Positive | None = None
    """Optimizer steps; overrides `epochs` and `min_steps`."""
    epochs: Positive = 1
    """Passes over the data. The last step is short where they end within it."""
    min_steps: NotNegative | None = 0
    """Small data: where `epochs` are fewer steps than this, steps take fewer streams, down to one, and then as many
    passes are made as make up this many. none: 240 for models up to 256 wide, fewer in proportion for wider ones, which
    learn faster: 80 for gpt2."""
    micro_batches_per_step: Positive = 8
    """Most streams in one optimizer step over all processes. Accumulation is this divided by the processes."""
    seed: NotNegative = 0
    """Seed of initial weights, packing, order, dropout and noise."""
    log_every: Positive = 10
    """Steps between lines of metrics."""
    eval_every: Positive | None = None
    """Steps between evaluations; default: at the end of every epoch. The last step always evaluates."""
    patience: Positive | None = None
    """Evaluations in a row without a better held-out loss, after which the run ends; default: it never ends early. The
    learning rate follows its schedule for all steps, and best/ holds the best model either way."""
    save_every: Positive | None = None
    """Steps between checkpoints; default: whenever evaluation runs, and by time. The last step always saves."""
    save_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after a checkpoint at which another is saved, between evaluations too; default: 30, but none where
    `save_every` is set."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Number of newest checkpoints to keep, besides the best."""
    keep_for_verification: NotNegative = 0
    """Number of checkpoints to save and keep at equal distances over the run: steps from which it can be verified."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    max_skipped_steps: Positive = 10
    """Steps in a row with a gradient that is not finite, after which the run stops; in fp16 without those that a lower
    scale of the loss may mend."""
    compile: Compile = "auto"
    """Compile the blocks of the model: one graph for all layers and streams. auto: on CUDA, where a compiler is and the
    strategy is not ZeRO-3; true: also on a CPU, with `model.attention dense`; false: never."""
    activation_checkpointing: bool = False
    """Keep fewer activations and compute them again in the backward pass: same run, less memory, a quarter slower."""
    deterministic: bool = False
    """On CUDA: only kernels that give the same bits every time (slower)."""
    sample_prompts: NotNegative = 3
    """Held-out prompts answered at each evaluation."""
    sample_tokens: Positive = 128
    """Longest sample reply."""

    def for_width(self, width: int) -> "TrainingSettings":
        """Return these settings with a least number of steps."""
        steps = round(QUICKSTART_STEPS * min(1.0, QUICKSTART_WIDTH / width))
        return self if self.min_steps is not None else self.model_copy(update={"min_steps": steps})

    @property
    def seconds_between_saves(self) -> float:
        """Seconds after a checkpoint at which another one is due; infinite where steps alone count."""
        if self.save_minutes is None:
            return math.inf if self.save_every else MINUTES_BETWEEN_SAVES * 60
        return self.save_minutes * 60

    def steps_to_keep(self, steps: int) -> set[int]:
        """Return the steps of a run of `steps` whose checkpoints `keep_for_verification` keeps."""
        parts = self.keep_for_verification + 1
        return {steps * part // parts for part in range(1, parts)} - {0}


class OptimizerSettings(Section):
    """AdamW and its learning rate."""

    learning_rate: Annotated[float, Field(gt=0)] | None = 5e-5
    """Peak learning rate. none: 1e-3 for models up to 256 wide, less in proportion for wider ones: 3.3e-4 for gpt2."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
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

    def for_width(self, width: int) -> "OptimizerSettings":
        """Return these settings with a learning rate; where none is given, one in inverse proportion to the width.

        So Adam moves what a layer computes equally far at every width. Yang et al. 2022, "Tensor Programs V", table 3.
        """
        rate = QUICKSTART_RATE * min(1.0, QUICKSTART_WIDTH / width)
        return self if self.learning_rate else self.model_copy(update={"learning_rate": rate})


class PreferenceSettings(Section):
    """The loss on pairs of replies."""

    loss: Annotated[
        LossName,
        Field(description="; ".join(f"{name}: {loss.meaning}" for name, loss in PREFERENCE_LOSSES.items()) + "."),
    ] = "sigmoid"
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength with which the policy is held to the reference; of orpo, the weight of the odds ratio."""
    pairs: PairRule = "all"
    """Replies to a prompt that are compared: all of different rank, the best with the worst, or adjacent ranks."""
    pair_weight: PairWeight = "pair"
    """pair counts every pair the same; prompt counts every prompt the same, however many replies it has."""
    whole_trees: bool = False
    """Compute prompts of one conversation, at whatever depth, in one pass. Pairs and their weights stay the same."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs taken to be the wrong way round, of cdpo and robust."""
    gamma: Annotated[float, Field(ge=0)] = 0.0
    """Margin to reach, of simpo."""
    rpo_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Weight of an added negative log-likelihood of the chosen reply, per token."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Below 1: how much the tokens count by which a reply is longer than the other (LD-DPO, Liu et al. 2024)."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of desirable replies, of kto."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of undesirable replies, of kto."""

    @property
    def needs_reference(self) -> bool:
        return PREFERENCE_LOSSES[self.loss].needs_reference

    @property
    def is_list_wise(self) -> bool:
        return PREFERENCE_LOSSES[self.loss].is_list_wise

    def problems(self) -> Iterator[str]:
        taken = PREFERENCE_LOSSES[self.loss].parameters
        for name in dict.fromkeys(name for loss in PREFERENCE_LOSSES.values() for name in loss.parameters):
            default = type(self).model_fields[name].default
            if getattr(self, name) != default and name not in taken:
                takers = ", ".join(name_of for name_of, loss in PREFERENCE_LOSSES.items() if name in loss.parameters)
                yield f"`dpo.{name}` must be {default:g} with `dpo.loss` = {self.loss}: only {takers} have it"
        if self.is_list_wise and self.pairs != "all":
            yield f"`dpo.pairs` must be all with `dpo.loss` = {self.loss}, of whole rankings, but is {self.pairs}"
        if not PREFERENCE_LOSSES[self.loss].of_pairs:
            why = f"with `dpo.loss` = {self.loss}, which takes each reply by itself"
            if self.pairs == "adjacent":
                yield f"`dpo.pairs` must be best_worst or all {why} and of ranked ones the best and the worst"
            if self.pair_weight != "pair":
                yield f"`dpo.pair_weight` must be pair {why}, but is {self.pair_weight}"
            if self.whole_trees:
                yield f"`dpo.whole_trees` must be false {why}"
        if "label_smoothing" in taken and not self.label_smoothing:
            yield f"`dpo.label_smoothing` must be above 0 with `dpo.loss` = {self.loss}, which is sigmoid otherwise"


# --- rules that scripts share ---------------------------------------------------------------------------------------
