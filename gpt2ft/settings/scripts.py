"""The settings of each script: sections put together, and what must hold between them."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gpt2ft.settings.columns import column_problems
from gpt2ft.settings.sections import LoRASettings, ModelSettings, NotNegative, Section, source_problems, stream_problems
from gpt2ft.settings.training import DataSettings, OptimizerSettings, PreferenceSettings, TrackerName, TrainingSettings

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
