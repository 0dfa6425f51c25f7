"""Evaluation of finished models on held-out data, side by side: for the terminal, as report.json and as a page."""

import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2ft.command_line import words_to_start
from gpt2ft.data.corpus import load_corpora
from gpt2ft.data.kinds import LABELLED, LEARNT, PREFERENCES, DataKind
from gpt2ft.data.reading import listed
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import precision_of, start_accelerator
from gpt2ft.distributed.agreement import check_agreement
from gpt2ft.errors import Gpt2ftError, SettingsError
from gpt2ft.files import read_json, user_path, write_json, write_text
from gpt2ft.model.attention import choose_backend
from gpt2ft.preference_losses import PREFERENCE_LOSSES
from gpt2ft.report import page
from gpt2ft.report.conversations import exchanges
from gpt2ft.report.facts import facts, settings_that_differ
from gpt2ft.report.losses import differences, held_out
from gpt2ft.report.overlap import TrainingData, supervised_texts
from gpt2ft.report.reference import read_report
from gpt2ft.report.replies import behaviour, holds_word
from gpt2ft.report.schema import Conversation, HeldOut, Loss, ModelReport, Report
from gpt2ft.report.table import as_terminal
from gpt2ft.report.warnings import warnings_of
from gpt2ft.runs.describe import parameter_counts
from gpt2ft.runs.identity import versions
from gpt2ft.runs.measurements import Bench, Measured, Subject, find_subjects, training_runs
from gpt2ft.runs.preference_scores import describe_preferences
from gpt2ft.runs.samples import answer, held_out_prompts
from gpt2ft.settings.measuring import EvaluateSettings
from gpt2ft.settings.scripts import DPOSettings, RunSettings
from gpt2ft.text.display import escape_control_characters

REPORT = "report.json"
SHOWN = 3  # conversations


@watchdog.announce_end()
def run(settings: EvaluateSettings) -> None:
    accelerator = start_accelerator(settings.precision)
    check_agreement(accelerator, settings.model_dump(exclude={"cache", "report", "output"}))
    pairs_at_start = read_report(user_path(settings.pairs_report)) if settings.pairs_report else None
    backend = choose_backend(settings.attention, accelerator.device, "attention")  # refused before anything is loaded
    subjects = find_subjects(settings, accelerator.is_main_process)
    bench = Bench(settings, accelerator, backend, subjects)
    weights = [subject.loaded and subject.loaded.digest for subject in subjects]
    check_agreement(accelerator, {"data_content": bench.content(), "initial_weights": weights})
    measured = [bench.measure(subject) for subject in subjects]
    if not accelerator.is_main_process:
        return
    report = report_of(bench, measured)
    if pairs_at_start:
        report["pairs_at_start"] = pairs_at_start
    for line in lines(report, bench):
        print(escape_control_characters(line))
    write(report, settings, subjects)


def report_of(bench: Bench, measured: list[Measured]) -> Report:
    """Put together what was measured, with all that one process finds alone."""
    settings, corpus = bench.settings, bench.first.corpora()[0]
    runs = {_data_of(run): run for subject in bench.subjects for run in training_runs(subject)}
    training = _scan_training_data(bench, measured, list(runs.values()))
    report: Report = {
        "models": [_model_report(bench, each) for each in measured],
        "data": bench.digests(),
        "left_out": bench.left_out().total(),
        "precision": precision_of(bench.accelerator),
        "max_length": bench.max_length,
        "seed": settings.seed,
        "commands": [command_of(settings)],
        "versions": versions(),
    }
    if bench.people:
        report["people"] = behaviour(bench.people, settings.seed)
    if bench.prompts:
        report["conversations"] = list(_conversations(bench, measured))
    if any(subject.trained for subject in bench.subjects):
        report["settings_that_differ"] = settings_that_differ([subject.trained for subject in bench.subjects])
    overlapping = None
    if training:
        report["overlap"], overlapping = training.overlap(len(corpus.rows))
    for each, entry in zip(measured, report["models"], strict=True):
        if each.sums is not None and not each.failed:
            entry["held_out"] = _held_out(bench, each, measured[0], overlapping)
        if training and each.replies:
            own = [list(runs).index(_data_of(run)) for run in training_runs(each.subject)]
            heart = training.learnt_by_heart(each.subject.name, settings.seed, own)
            entry |= {"learnt_by_heart": heart} if heart else {}
    report["warnings"] = warnings_of(report)
    return report


def _model_report(bench: Bench, measured: Measured) -> ModelReport:
    subject, settings = measured.subject, bench.settings
    entry: ModelReport = {"name": subject.name, "model": str(subject.folder)}
    if subject.loaded:
        entry |= {
            "model": subject.loaded.source,
            "weights": subject.loaded.digest,
            "tokenizer": subject.loaded.tokenizer.digest,
            "parameters": parameter_counts(subject.loaded.gpt2)[1],
        }
    if subject.trained and subject.home:
        manifest = read_json(subject.home / "manifest.json")
        entry["training"] = facts(subject.trained, manifest, subject.home / "metrics.jsonl")
    if measured.failed:
        return entry | {"failed": measured.failed}
    entry["plain_text"] = measured.texts
    if measured.preferences:
        entry["preferences"] = measured.preferences
    if measured.replies:
        said = exchanges(bench.prompts, measured.replies, settings.topic)
        entry["replies"] = behaviour(said, settings.seed)
    if settings.topic:
        entry["topic"] = _topic(bench, subject)
    return entry


def _held_out(bench: Bench, measured: Measured, first: Measured, overlapping: NDArray[np.bool_] | None) -> HeldOut:
    data = bench.data(measured.subject.loaded.tokenizer)
    rows, sources = data.conversations.rows, [store.source for store in data.conversations.stores]
    found = held_out(measured.sums, rows, sources, overlapping)
    if measured is not first and not first.failed:
        reference = bench.data(first.subject.loaded.tokenizer)
        if np.array_equal(rows, reference.conversations.rows):
            compared = differences(measured.sums, first.sums, data is reference, bench.settings.seed)
            found |= {"difference": compared} if compared else {}
    return found


def _conversations(bench: Bench, measured: list[Measured]) -> Iterator[Conversation]:
    """Yield the first prompts with the replies of all models beside each other."""
    for number, prompt in enumerate(bench.prompts[:SHOWN]):
        said = [each.replies[number] if each.replies else [None] * len(prompt.turns) for each in measured]
        by_turn = zip(prompt.turns, zip(*said, strict=True), strict=True)
        yield {"turns": [{"user": user, "replies": list(replies)} for user, replies in by_turn]}


def kind_of(run: RunSettings) -> DataKind:
    """Return as what a run has read its data."""
    if not isinstance(run, DPOSettings):
        return LEARNT[run.data.train_on]
    return PREFERENCES if PREFERENCE_LOSSES[run.dpo.loss].of_pairs else LABELLED


def _data_of(run: RunSettings) -> tuple[str, str]:
    """Return all that decides what a run was trained on."""
    return run.data.model_dump_json(), kind_of(run).name


def _scan_training_data(bench: Bench, measured: list[Measured], runs: Sequence[RunSettings]) -> TrainingData | None:
    """Return what the training data of some runs have in common with replies and held-out data; None without runs."""
    tokenizer, held_out = bench.tokenizer, bench.first.corpora()[0]
    if not runs:
        return None
    replies = {each.subject.name: [reply["text"] for said in each.replies for reply in said] for each in measured}
    training = TrainingData(replies, supervised_texts(held_out, tokenizer), len(runs))
    for run, settings in enumerate(runs):
        data = settings.data.model_copy(update={"cache": bench.settings.cache or settings.data.cache})
        print(f"training data: {', '.join(data.train)}", file=sys.stderr, flush=True)
        try:
            corpus, _ = load_corpora(data, tokenizer, settings.training.seed, kind_of(settings))
        except (Gpt2ftError, OSError) as error:
            training.leave_out(run, f"the training data {', '.join(data.train)} cannot be read: {error}")
            continue
        for _, text in supervised_texts(corpus, tokenizer):
            training.scan(text, run)
    return training


def _topic(bench: Bench, subject: Subject) -> dict[str, Any]:
    """Return how many replies to held-out prompts hold a word of the topic, and the first of them.

    Raises:
        SettingsError: if no prompt leaves room for a reply.
    """
    settings, loaded = bench.settings, subject.loaded
    corpus = bench.data(loaded.tokenizer).corpora()[0]
    prompts = held_out_prompts(corpus, loaded, settings.topic_prompts, settings.max_new_tokens)
    if not prompts:
        raise SettingsError(
            f"`topic` needs prompts that leave room for a reply of `max_new_tokens` = {settings.max_new_tokens}, but "
            f"{', '.join(settings.data)} has none: plain texts have no prompts"
        )
    samples = answer(loaded, prompts, settings.max_new_tokens)
    return {
        "words": settings.topic,
        "prompts": len(samples),
        "on_topic": sum(holds_word(sample.reply, settings.topic) for sample in samples),
        "stopped": sum(sample.stopped for sample in samples),
        "samples": [str(sample) for sample in samples[:SHOWN]],
    }


def command_of(settings: EvaluateSettings) -> str:
    """Return the command that gives the same figures again, wherever it writes them."""
    words = [*words_to_start("evaluate"), *settings.models]
    given = settings.model_dump(exclude_defaults=True, exclude={"model", "cache", "report", "output"})
    for name, value in given.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


# --- what is printed and written ------------------------------------------------------------------------------------


def lines(report: Report, bench: Bench) -> Iterator[str]:
    """Yield the report for the terminal: what must be known first, all models in short, then one model in full."""
    yield from (f"warning: {sentence}" for sentence in report["warnings"])
    yield as_terminal(report)
    first, *others = report["models"]
    if not others and "held_out" in first:
        sources = first["held_out"]["by_source"]
        yield "\n" + table(sources | ({"total": first["held_out"]["total"]} if len(sources) > 1 else {}))
    if not others and "preferences" in first:
        yield describe_preferences(first["preferences"])
    if left_out := bench.left_out():
        yield f"not in these figures: {listed(left_out)} of {bench.max_length} tokens"
    for model in report["models"]:
        if "topic" in model:
            yield f"{model['name']}: " * bool(others) + describe_topic(model["topic"])


def table(losses: dict[str, Loss]) -> str:
    width = max(len("source"), *map(len, losses))
    rows = [f"{'source':<{width}}  {'tokens':>10}  {'nats/token':>10}  {'perplexity':>10}  {'bits/byte':>9}"]
    for name, loss in losses.items():
        rows.append(
            f"{name:<{width}}  {loss['tokens']:>10,}  {loss.get('nats_per_token', math.nan):>10.4f}  "
            f"{loss.get('perplexity', math.nan):>10.2f}  {loss.get('bits_per_byte', math.nan):>9.4f}"
        )
    return "\n".join(rows)


def describe_topic(topic: dict[str, Any]) -> str:
    line = (
        f"topic: {topic['on_topic']:,} of {topic['prompts']:,} replies ({topic['on_topic'] / topic['prompts']:.0%}) "
        f"hold one of {', '.join(topic['words'])}; {topic['stopped']:,} ended by themselves"
    )
    return "\n\n".join([line, *topic["samples"], ""])


def write(report: Report, settings: EvaluateSettings, subjects: Sequence[Subject]) -> None:
    """Write the report where it was asked for, else beside the last model, under a name that is free."""
    content = dict(report)
    if len(report["models"]) == 1:  # as a script reads it that knows of one model
        content |= report["models"][0] | report["models"][0].get("held_out", {})
    file = _file(settings, subjects)
    if file is None:
        print("not written: name a file with `--report`, or a folder with `--output`")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)
    if not settings.report:
        write_text(file.with_suffix(".md"), page.markdown(report))
    if settings.output:
        try:
            write_text(file.with_suffix(".html"), page.html(report))
            file = file.with_suffix(".html")
        except ModuleNotFoundError as error:
            print(f"report.html is not written, for it needs {error.name}: pip install 'gpt2ft[report]'")
    print(f"written to {file}")


def _file(settings: EvaluateSettings, subjects: Sequence[Subject]) -> Path | None:
    if settings.report or settings.output:
        return user_path(settings.report) if settings.report else user_path(settings.output) / REPORT
    folders = [subject.home or subject.folder for subject in subjects if subject.home or subject.folder]
    if not folders:
        return None
    names = [REPORT, *(f"report-{number}.json" for number in range(2, 10_000))]
    return next(folders[-1] / name for name in names if not (folders[-1] / name).exists())
