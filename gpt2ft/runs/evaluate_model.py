"""Evaluation of a finished model on held-out data, as text and as report.json."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2ft.data.chunks import ChunkingRule, ConversationTrees, chunk
from gpt2ft.data.corpus import Corpus, load_corpora
from gpt2ft.data.pairs import PreferencePairs
from gpt2ft.data.plan import Plan
from gpt2ft.data.reading import listed
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import autocast, precision_of, start_accelerator
from gpt2ft.distributed.agreement import check_agreement
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.errors import SettingsError
from gpt2ft.files import write_json
from gpt2ft.model.attention import Backend, choose_backend
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.pretrained import ModelError
from gpt2ft.objectives.dpo import DPO
from gpt2ft.runs.loaded_model import RECIPE, LoadedModel, find_model, load_model, read_run_settings
from gpt2ft.runs.run_setup import digest_of_sources
from gpt2ft.runs.samples import Sample, Turns, answer, held_out_prompts
from gpt2ft.runs.train_dpo import store_for
from gpt2ft.settings.parsing import refuse_problems
from gpt2ft.settings.scripts import DPOSettings, EvaluateSettings
from gpt2ft.settings.sections import CorpusSettings, DataSettings, PreferenceSettings, stream_problems
from gpt2ft.training.evaluate import LossSums, evaluate_by_source, evaluate_objective, sum_over_sources
from gpt2ft.training.reference_pass import attach_reference


@watchdog.announce_end()
def run(settings: EvaluateSettings) -> None:
    accelerator = start_accelerator(settings.precision)
    check_agreement(accelerator, settings.model_dump(exclude={"cache", "report"}))
    _backend(settings, accelerator)  # refused, if it is, before anything is loaded
    loaded, folder = find_model(settings.model, settings.random_init)
    context = loaded.gpt2.config.n_positions
    max_length = settings.max_length or context
    if max_length > context:
        raise SettingsError(f"`max_length` must be at most the model's context of {context}, but is {max_length}")
    refuse_problems(stream_problems(settings.tokens_per_micro_batch, max_length, ""))
    reading = settings.model_dump(include=set(CorpusSettings.model_fields))
    data = DataSettings(train=settings.data, max_length=max_length, **reading)
    capacity = settings.tokens_per_micro_batch
    rule: ChunkingRule = ConversationTrees("once", max_length, capacity)
    if settings.pairs:
        rule = PreferencePairs(settings.pairs, "pair", max_length, capacity)
    corpus, _ = load_corpora(data, loaded.tokenizer, kind=rule.kind, digest=digest_of_sources(accelerator))
    check_agreement(accelerator, {"data_content": corpus.content(), "initial_weights": loaded.digest})
    prompts = topic_prompts(loaded, corpus, settings) if settings.topic else []
    chunks = chunk(corpus.stores, corpus.rows, rule)
    plan = Plan(chunks, capacity, 1, seed=0)
    if settings.pairs:
        text, figures = evaluate_preferences(settings, loaded, folder, plan, accelerator)
    else:
        text, figures = evaluate_conversations(settings, loaded, corpus, plan, accelerator)
    if not accelerator.is_main_process:
        return
    adherence = Adherence(settings.topic, answer(loaded, prompts, settings.max_new_tokens)) if prompts else None
    print(text)
    if chunks.left_out:
        print(f"not in these figures, in a context of {max_length:,}: {listed(chunks.left_out)}")
    if adherence:
        print(adherence)
    report = {
        "model": loaded.source,
        "weights": loaded.digest,
        "precision": precision_of(accelerator),
        "max_length": max_length,
        "left_out": chunks.left_out.total(),
        "data": corpus.identity(),
    } | figures
    if adherence:
        report["topic"] = adherence.figures()
    file = Path(settings.report) if settings.report else (folder or Path()) / "report.json"
    write_json(file, report)
    print(f"written to {file}")


TextAndFigures = tuple[str, dict[str, Any]]  # for people, for the report


def evaluate_conversations(
    settings: EvaluateSettings, loaded: LoadedModel, corpus: Corpus, plan: Plan, accelerator: Any
) -> TextAndFigures:
    """Return the loss on every source and on all together."""
    model = _on_device(loaded, settings, accelerator)
    with autocast(accelerator):
        losses = evaluate_by_source(model, plan, loaded.tokenizer.byte_lengths(), accelerator)
    by_source = {store.source: loss for store, loss in zip(corpus.stores, losses, strict=True) if loss.tokens}
    text = table(by_source | ({"total": sum_over_sources(losses)} if len(by_source) > 1 else {}))
    figures = {name: _figures(loss) for name, loss in by_source.items()}
    return text, {"total": _figures(sum_over_sources(losses)), "by_source": figures}


def evaluate_preferences(
    settings: EvaluateSettings, loaded: LoadedModel, folder: Path | None, plan: Plan, accelerator: Any
) -> TextAndFigures:
    """Return the share of pairs whose better reply is rewarded more, or is likelier where there is no reference."""
    started_from, trained_beta = _reference(settings, loaded, folder)
    beta = settings.beta or trained_beta
    if started_from is not None:
        model = _on_device(started_from, settings, accelerator)
        store = store_for(started_from, model, accelerator, settings.cache)
        signals = SignalHandler()
        with signals.listening():
            attach_reference([plan], store, model, accelerator, signals)
        model.cpu()
    config = PreferenceSettings(loss="simpo" if started_from is None else "sigmoid", beta=beta)
    with autocast(accelerator):
        means = evaluate_objective(_on_device(loaded, settings, accelerator), plan, DPO(config), accelerator)
    chunks = plan.chunks
    lines = [
        f"pairs     {chunks.pairs.sum():,} of {chunks.replies.sum():,} replies to {len(chunks):,} prompts",
        f"likelier  {means['likelier']:.1%} of chosen replies have the higher log-prob per token",
    ]
    if started_from is not None:
        lines += [
            f"accuracy  {means['accuracy']:.1%} of chosen replies have the higher reward against {started_from.source}",
            f"margin    {means['margin']:.4f} (chosen {means['reward_chosen']:.4f}, rejected "
            f"{means['reward_rejected']:.4f}; beta {beta:g})",
        ]
        means |= {"reference": started_from.source, "reference_weights": started_from.digest, "beta": beta}
    else:
        lines.append("rewards   none: they need `--reference`, the model that this one was trained from")
        means = {name: means[name] for name in ("likelier", "chosen_length", "rejected_length")}
    return "\n".join(lines), {"preferences": means | {"pairs": int(chunks.pairs.sum())}}


def _reference(
    settings: EvaluateSettings, loaded: LoadedModel, folder: Path | None
) -> tuple[LoadedModel | None, float]:
    """Return the model that rewards are measured against, if there is one, and the beta of the run.

    Raises:
        ModelError: if it is not what the run started from, or knows other ids.
    """
    homes = [home for home in (folder, *(folder.parents[:2] if folder else ())) if home and (home / RECIPE).is_file()]
    trained = read_run_settings(homes[0]) if homes else None
    beta = trained.dpo.beta if isinstance(trained, DPOSettings) else PreferenceSettings().beta
    if settings.reference is not None:
        found, _ = find_model(settings.reference)
    elif isinstance(trained, DPOSettings):
        found = load_model(trained.model, trained.training.seed)
        manifest = json.loads((homes[0] / "manifest.json").read_text(encoding="utf-8"))
        if manifest["identity"]["initial_weights"] != found.digest:
            raise ModelError(
                f"{trained.model.path} has changed since {homes[0]} was trained from it: name what it was with "
                "`--reference`"
            )
    else:
        return None, beta
    if found.tokenizer.digest != loaded.tokenizer.digest:
        raise ModelError(f"the reference {found.source} must have the tokenizer of {loaded.source}, but has another")
    return found, beta


def _backend(settings: EvaluateSettings, accelerator: Any) -> Backend:
    return choose_backend(settings.attention, accelerator.device, "attention")


def _on_device(loaded: LoadedModel, settings: EvaluateSettings, accelerator: Any) -> TargetLogProbs:
    backend = _backend(settings, accelerator)
    return TargetLogProbs(loaded.gpt2, len(loaded.tokenizer), backend).to(accelerator.device)


@dataclass(frozen=True)
class Adherence:
    """Replies to held-out prompts, and the words by which one counts as on the topic."""

    words: tuple[str, ...]
    samples: list[Sample]

    def holds_word(self, sample: Sample) -> bool:
        pattern = "|".join(re.escape(word) for word in self.words)
        return re.search(rf"(?<!\w)(?:{pattern})(?!\w)", sample.reply, re.IGNORECASE) is not None

    def figures(self) -> dict[str, Any]:
        on_topic = sum(map(self.holds_word, self.samples))
        stopped = sum(sample.stopped for sample in self.samples)
        return {"words": self.words, "prompts": len(self.samples), "on_topic": on_topic, "stopped": stopped}

    def __str__(self) -> str:
        figures = self.figures()
        share = figures["on_topic"] / figures["prompts"]
        lines = [
            f"topic: {figures['on_topic']:,} of {figures['prompts']:,} replies ({share:.0%}) hold one of "
            f"{', '.join(self.words)}; {figures['stopped']:,} ended by themselves"
        ]
        return "\n\n".join([*lines, *map(str, self.samples[:3]), ""])


def topic_prompts(loaded: LoadedModel, corpus: Corpus, settings: EvaluateSettings) -> list[Turns]:
    """Return held-out prompts that leave room for a reply.

    Raises:
        SettingsError: if there is none.
    """
    longest = settings.max_new_tokens
    prompts = held_out_prompts(corpus, loaded, settings.topic_prompts, longest)
    if not prompts:
        raise SettingsError(
            f"`topic` needs prompts that leave room for a reply of `max_new_tokens` = {longest}, but "
            f"{', '.join(settings.data)} has none: plain texts have no prompts"
        )
    return prompts


def table(losses: dict[str, LossSums]) -> str:
    width = max(len("source"), *map(len, losses))
    lines = [f"{'source':<{width}}  {'tokens':>10}  {'nats/token':>10}  {'perplexity':>10}  {'bits/byte':>9}"]
    for name, loss in losses.items():
        lines.append(
            f"{name:<{width}}  {loss.tokens:>10,}  {loss.nats_per_token:>10.4f}  "
            f"{loss.perplexity:>10.2f}  {loss.bits_per_byte:>9.4f}"
        )
    return "\n".join(lines)


def _figures(loss: LossSums) -> dict[str, float]:
    return {
        "tokens": loss.tokens,
        "nats_per_token": loss.nats_per_token,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
    }
