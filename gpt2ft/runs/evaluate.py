"""The score of a finished model on held-out conversations, as text and as report.json."""

from pathlib import Path

from gpt2ft.data.plan import Plan, cut_to_fit
from gpt2ft.files import write_json
from gpt2ft.model.attention import default_backend
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.runs.assemble import load_corpora, load_trained
from gpt2ft.settings import DataSettings, EvaluateSettings, SettingsError, refuse_problems, stream_problems
from gpt2ft.training import distributed
from gpt2ft.training.evaluate import Score, evaluate, total


def run(settings: EvaluateSettings) -> None:
    accelerator = distributed.start(settings.precision)
    policy, folder = load_trained(settings.model)
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
        cache=settings.cache,
    )
    corpus, _ = load_corpora(data, policy.tokenizer)
    pieces = cut_to_fit(corpus.stores, corpus.rows, "once", max_length, settings.tokens_per_micro_batch)
    plan = Plan(pieces, settings.tokens_per_micro_batch, 1, seed=0, shuffle=False)
    policy.gpt2.to(accelerator.device)
    backend = default_backend(accelerator.device, attention_dropout=0.0)
    model = TargetLogProbs(policy.gpt2, len(policy.tokenizer), backend)
    with accelerator.autocast():
        scores = evaluate(model, plan, policy.tokenizer.byte_lengths(), accelerator)
    if not accelerator.is_main_process:
        return
    by_source = {s.source: score for s, score in zip(corpus.stores, scores, strict=True) if score.tokens}
    print(table(by_source | ({"total": total(scores)} if len(by_source) > 1 else {})))
    if pieces.too_long:
        print(f"{pieces.too_long:,} messages were too long for {max_length} tokens and are not in these figures")
    report = {
        "model": policy.source,
        "weights": policy.digest,
        "precision": accelerator.mixed_precision,
        "max_length": max_length,
        "too_long": pieces.too_long,
        "total": _figures(total(scores)),
        "by_source": {name: _figures(score) for name, score in by_source.items()},
        "data": corpus.identity(),
    }
    file = Path(settings.report) if settings.report else (folder or Path()) / "report.json"
    write_json(file, report)
    print(f"written to {file}")


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
