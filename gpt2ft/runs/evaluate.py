"""The score of a finished model on held-out conversations, as text and as report.json."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2ft.data.plan import Plan, cut_to_fit
from gpt2ft.files import write_json
from gpt2ft.model.attention import default_backend
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.runs.assemble import Corpus, Policy, load_corpora, load_trained
from gpt2ft.runs.samples import Sample, Turns, answer, held_out_prompts
from gpt2ft.settings import DataSettings, EvaluateSettings, SettingsError, refuse_problems, stream_problems
from gpt2ft.training import distributed
from gpt2ft.training.evaluate import Score, evaluate, total


def run(settings: EvaluateSettings) -> None:
    accelerator = distributed.start(settings.precision)
    policy, folder = load_trained(settings.model, settings.random_init)
    context = policy.gpt2.config.n_positions
    max_length = settings.max_length or context
    if max_length > context:
        raise SettingsError(f"`max_length` must be at most the model's context of {context}, but is {max_length}")
    refuse_problems(stream_problems(settings.tokens_per_micro_batch, max_length, ""))
    data = DataSettings(
        train=settings.data,
        max_length=max_length,
        languages=settings.languages,
        max_rank=settings.max_rank,
        reviewed_only=settings.reviewed_only,
        on_error=settings.on_error,
        topic_replies=settings.topic_replies,
        cache=settings.cache,
    )
    corpus, _ = load_corpora(data, policy.tokenizer)
    distributed.check_agreement(accelerator, 0, corpus.content())
    prompts = topic_prompts(policy, corpus, settings) if settings.topic else []
    pieces = cut_to_fit(corpus.stores, corpus.rows, "once", max_length, settings.tokens_per_micro_batch)
    plan = Plan(pieces, settings.tokens_per_micro_batch, 1, seed=0, shuffle=False)
    policy.gpt2.to(accelerator.device)
    backend = default_backend(accelerator.device, attention_dropout=0.0)
    model = TargetLogProbs(policy.gpt2, len(policy.tokenizer), backend)
    with accelerator.autocast():
        scores = evaluate(model, plan, policy.tokenizer.byte_lengths(), accelerator)
    if not accelerator.is_main_process:
        return
    adherence = Adherence(settings.topic, answer(policy, prompts, settings.max_new_tokens)) if prompts else None
    by_source = {s.source: score for s, score in zip(corpus.stores, scores, strict=True) if score.tokens}
    print(table(by_source | ({"total": total(scores)} if len(by_source) > 1 else {})))
    if pieces.left_out:
        print(f"{pieces.left_out:,} messages do not fit {max_length} tokens and are not in these figures")
    if adherence:
        print(adherence)
    report = {
        "model": policy.source,
        "weights": policy.digest,
        "precision": accelerator.mixed_precision,
        "max_length": max_length,
        "left_out": pieces.left_out,
        "total": _figures(total(scores)),
        "by_source": {name: _figures(score) for name, score in by_source.items()},
        "data": corpus.identity(),
    }
    if adherence:
        report["topic"] = adherence.figures()
    file = Path(settings.report) if settings.report else (folder or Path()) / "report.json"
    write_json(file, report)
    print(f"written to {file}")


@dataclass(frozen=True)
class Adherence:
    """How many replies to held-out prompts speak of a topic: hold one of its words, as a whole word."""

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


def topic_prompts(policy: Policy, corpus: Corpus, settings: EvaluateSettings) -> list[Turns]:
    """Held-out prompts that leave room for a reply.

    Raises:
        SettingsError: if there is none.
    """
    longest = settings.max_new_tokens
    prompts = held_out_prompts(corpus, policy, settings.topic_prompts, longest)
    if not prompts:
        raise SettingsError(
            f"`topic` needs prompts that leave room for a reply of `max_new_tokens` = {longest}, but "
            f"{', '.join(settings.data)} has none: plain texts have no prompts"
        )
    return prompts


def table(scores: dict[str, Score]) -> str:
    width = max(len("source"), *map(len, scores))
    lines = [f"{'source':<{width}}  {'tokens':>10}  {'nats/token':>10}  {'perplexity':>10}  {'bits/byte':>9}"]
    for name, score in scores.items():
        lines.append(
            f"{name:<{width}}  {score.tokens:>10,}  {score.nats_per_token:>10.4f}  "
            f"{score.perplexity:>10.2f}  {score.bits_per_byte:>9.4f}"
        )
    return "\n".join(lines)


def _figures(score: Score) -> dict[str, float]:
    return {
        "tokens": score.tokens,
        "nats_per_token": score.nats_per_token,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
