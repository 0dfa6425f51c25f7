"""Measurements of finished models, each on the same data, by all processes together."""

import hashlib
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2ft import report as bundled
from gpt2ft.command_line import words_to_start
from gpt2ft.data.chunks import ChunkingRule, ConversationTrees, chunk
from gpt2ft.data.corpus import Corpus, load_corpora
from gpt2ft.data.pairs import PreferencePairs
from gpt2ft.data.plan import Plan
from gpt2ft.distributed.accelerator import autocast
from gpt2ft.errors import Gpt2ftError, SettingsError
from gpt2ft.files import read_text, user_path
from gpt2ft.model.attention import Backend
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.report.conversations import Prompt, converse, fits, greedy, read_prompts
from gpt2ft.report.losses import Tally, num_windows, plain_text, tally
from gpt2ft.report.replies import Exchange
from gpt2ft.report.schema import Loss, Reply
from gpt2ft.runs.loaded_model import LoadedModel, find_model, finished_runs, home_of, newest_run, read_run_settings
from gpt2ft.runs.preference_scores import score_preferences
from gpt2ft.runs.progress import counting
from gpt2ft.runs.run_setup import digest_of_sources
from gpt2ft.runs.samples import Turns, held_out_paths
from gpt2ft.settings.measuring import EvaluateSettings
from gpt2ft.settings.parsing import refuse_problems
from gpt2ft.settings.scripts import DPOSettings, RunSettings
from gpt2ft.settings.sections import CorpusSettings, stream_problems
from gpt2ft.settings.training import DataSettings
from gpt2ft.text.display import print_row
from gpt2ft.text.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Subject:
    """A model to be measured, and the run that it comes from, if any."""

    name: str  # unlike the others'
    loaded: LoadedModel | None  # None if it cannot be loaded
    problem: str | None  # a sentence: why not
    folder: Path | None  # that it lies in
    home: Path | None  # of its run
    trained: RunSettings | None


@dataclass
class Measured:
    """All that was measured of a model."""

    subject: Subject
    failed: str | None
    sums: Tally | None = None
    texts: dict[str, Loss] = field(default_factory=dict)
    preferences: dict[str, Any] = field(default_factory=dict)
    replies: list[list[Reply]] = field(default_factory=list)  # of each prompt, turn by turn


@dataclass(frozen=True)
class HeldOut:
    """Held-out data in the tokens of one tokenizer."""

    conversations: Corpus | None
    preferences: Corpus | None
    plan: Plan | None  # of the conversations
    pairs: Plan | None  # of the preferences

    def corpora(self) -> list[Corpus]:
        return [corpus for corpus in (self.conversations, self.preferences) if corpus is not None]


def find_subjects(settings: EvaluateSettings, is_main: bool) -> list[Subject]:
    """Load the models that are to be compared; without a name, the newest finished run, which is named.

    Raises:
        Gpt2ftError: if one is not there, or none can be loaded; one that is damaged does not keep the others from it.
    """
    paths = settings.models or (newest_run(),)
    if not settings.models and is_main:
        number = len(finished_runs())
        others = f" of {number}; `{shlex.join([*words_to_start('evaluate'), 'runs'])}` lists them" * (number > 1)
        print_row("model", f"{paths[0]}, the newest run{others}")
    subjects = []
    for name, path in zip(short_names(paths), paths, strict=True):
        loaded, folder, problem = None, Path(path), None
        try:
            loaded, folder = find_model(path, settings.random_init)
        except Gpt2ftError as error:
            is_last_hope = len(subjects) == len(paths) - 1 and not any(subject.loaded for subject in subjects)
            if is_last_hope or not folder.is_dir():
                raise
            problem = str(error)
        home = home_of(folder)
        subjects.append(Subject(name, loaded, problem, folder, home, read_run_settings(home) if home else None))
    return subjects


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the last part of each path, with those above it where it alone is no name or is another's."""
    names = []
    for path in paths:
        *above, last = Path(path).parts or (path,)
        if above and (last in ("model", "best", "adapter", "start") or last.startswith("step-")):
            last = "/".join([*[part for part in above if part != "checkpoints"][-1:], last])
        names.append(last)
    names = [path if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]
    return [
        f"{name} ({names[:number].count(name) + 1})" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]


class Bench:
    """The data, prompts and texts that every model is measured on.

    Raises:
        SettingsError, DataError: if they cannot be had, or do not fit the models.
    """

    def __init__(
        self, settings: EvaluateSettings, accelerator: Any, backend: Backend, subjects: Sequence[Subject]
    ) -> None:
        self.settings, self.accelerator, self.backend = settings, accelerator, backend
        self.subjects = subjects
        sound = [subject.loaded for subject in subjects if subject.loaded]
        context = min(loaded.gpt2.config.n_positions for loaded in sound)
        self.max_length = settings.max_length or context
        if self.max_length > context:
            raise SettingsError(
                f"`max_length` must be at most the model's context of {context}, but is {self.max_length}"
            )
        refuse_problems(stream_problems(settings.tokens_per_micro_batch, self.max_length, ""))
        files = list(settings.text) or sorted(map(str, bundled.TEXTS.glob("*.txt")))
        names = short_names([file.removesuffix(".txt") for file in files])
        self.texts = dict(zip(names, map(_read_text, files), strict=True))
        self._by_tokenizer: dict[str, HeldOut] = {}
        for loaded in sound:
            if loaded.tokenizer.digest not in self._by_tokenizer:
                self._by_tokenizer[loaded.tokenizer.digest] = self._held_out(loaded.tokenizer)
        first = sound[0]
        self.tokenizer, self.first = first.tokenizer, self.data(first.tokenizer)
        corpus = self.first.corpora()[0]
        shared = _prompts(settings)
        paths = held_out_paths(corpus, first, max(0, settings.num_prompts - len(shared)), settings.max_new_tokens)
        self.prompts = shared + [
            prompt
            for prompt in map(_held_out_prompt, paths)
            if all(fits(prompt, loaded.gpt2, loaded.tokenizer, settings.max_new_tokens) for loaded in sound)
        ]
        people = held_out_paths(corpus, first, settings.num_prompts, settings.max_new_tokens)
        self.people = [_of_people(path, settings, first.tokenizer) for path in people]

    def data(self, tokenizer: ChatTokenizer) -> HeldOut:
        return self._by_tokenizer[tokenizer.digest]

    def content(self) -> list[str]:
        """Return digests of the tokens, to compare machines."""
        return [corpus.content() for held_out in self._by_tokenizer.values() for corpus in held_out.corpora()]

    def digests(self) -> dict[str, str | int]:
        """Return digests of the data, prompts and texts by name, and the number of conversations."""
        found: dict[str, str | int] = {}
        for corpus in reversed(self.first.corpora()):
            found |= corpus.identity()
        asked = {"prompts": repr(self.prompts)} | {f"text {name}": text for name, text in self.texts.items()}
        return found | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in asked.items()}

    def left_out(self) -> Counter[str]:
        """Return what does not fit the context, by reason."""
        plans = [plan for plan in (self.first.plan, self.first.pairs) if plan is not None]
        return sum((plan.chunks.left_out for plan in plans), Counter())

    def measure(self, subject: Subject) -> Measured:
        """Measure a model; all processes call it together."""
        measured = Measured(subject, subject.problem)
        loaded, settings = subject.loaded, self.settings
        if loaded is None:
            return measured
        if self.backend == "flex":  # each model has shapes of its own, and of one function no more than 8 are compiled
            torch.compiler.reset()
        held_out = self.data(loaded.tokenizer)
        model = TargetLogProbs(loaded.gpt2, len(loaded.tokenizer), self.backend).to(self.accelerator.device)
        with autocast(self.accelerator):
            if held_out.plan and held_out.conversations:
                rows = held_out.conversations.rows
                with self._counting_streams(subject, "held-out streams", len(held_out.plan.streams)):
                    measured.sums = tally(model, held_out.plan, rows, loaded.tokenizer, self.accelerator)
                if not np.isfinite(measured.sums).all():
                    measured.failed = "its loss on held-out data is not finite"
            context = loaded.gpt2.config.n_positions
            windows = [num_windows(text, loaded.tokenizer, context) for text in self.texts.values()]
            with self._counting_streams(subject, "plain-text streams", *windows):
                for name, text in self.texts.items():
                    measured.texts[name] = plain_text(model, text, loaded.tokenizer, self.accelerator)
        if held_out.pairs:
            with self._counting_streams(subject, "preference streams", len(held_out.pairs.streams)):
                measured.preferences = score_preferences(
                    settings, loaded, subject.home, subject.trained, held_out.pairs, self.accelerator, self.backend
                )
            if not math.isfinite(measured.preferences["likelier"] + measured.preferences.get("loss", 0.0)):
                measured.failed = "its log-probs of preferences are not finite"
        if self.prompts and not measured.failed:
            measured.replies, measured.failed = self._replies(subject, loaded)
        model.cpu()
        return measured

    def _replies(self, subject: Subject, loaded: LoadedModel) -> tuple[list[list[Reply]], str | None]:
        """Return the replies to every prompt, shared out among the processes, or why there are none."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        own = self.prompts[rank::processes]
        found: list[list[Reply]] = []
        problem: Exception | None = None
        try:
            total = sum(len(prompt.turns) for prompt in own)
            with autocast(self.accelerator), self._counting(subject, "replies", total) as advance:
                answer = greedy(loaded.gpt2, loaded.tokenizer, self.settings.max_new_tokens, advance)
                found = converse(answer, own)
        except (ValueError, SettingsError) as error:
            problem = error
        everywhere = [(found, problem)]
        if processes > 1:
            from accelerate.utils import gather_object

            everywhere = gather_object(everywhere)
        for _, problem in everywhere:
            if isinstance(problem, SettingsError):
                raise problem
            if problem is not None:
                return [], str(problem)
        return [everywhere[number % processes][0][number // processes] for number in range(len(self.prompts))], None

    def _held_out(self, tokenizer: ChatTokenizer) -> HeldOut:
        """Return the held-out data in the tokens of a tokenizer.

        With `pairs` alone, all of them are preferences.
        """
        settings = self.settings
        capacity = settings.tokens_per_micro_batch
        rule = ConversationTrees("once", self.max_length, capacity)
        trained = [subject.trained for subject in self.subjects]
        pair_rule = PreferencePairs(settings.pairs or "all", "pair", self.max_length, capacity)
        if any(isinstance(run, DPOSettings) and run.dpo.is_list_wise for run in trained):
            pair_rule = replace(pair_rule, whole_rankings=True)
        sources = settings.preferences or (settings.data if settings.pairs else ())
        preferences, pairs = self._corpus(sources, pair_rule, tokenizer)
        conversations, plan = self._corpus(() if sources == settings.data else settings.data, rule, tokenizer)
        return HeldOut(conversations, preferences, plan, pairs)

    def _corpus(
        self, sources: Sequence[str], rule: ChunkingRule, tokenizer: ChatTokenizer
    ) -> tuple[Corpus | None, Plan | None]:
        if not sources:
            return None, None
        reading = self.settings.model_dump(include=set(CorpusSettings.model_fields))
        data = DataSettings(train=sources, max_length=self.max_length, **reading)
        corpus, _ = load_corpora(data, tokenizer, kind=rule.kind, digest=digest_of_sources(self.accelerator))
        return corpus, Plan(chunk(corpus.stores, corpus.rows, rule), rule.capacity, 1, seed=0)

    def _counting(self, subject: Subject, work: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Count the items of one part of the work on a model, shown by the main process, which has as many as any."""
        number = f" ({self.subjects.index(subject) + 1} of {len(self.subjects)})" if len(self.subjects) > 1 else ""
        return counting(f"{subject.name}{number}: {work}", total, self.accelerator.is_main_process)

    @contextmanager
    def _counting_streams(self, subject: Subject, work: str, *totals: int) -> Iterator[None]:
        """Count the streams that a model reads within the block, each of `totals` shared out among the processes."""
        rounds = sum(-(-total // self.accelerator.num_processes) for total in totals)
        with self._counting(subject, work, rounds) as advance:
            hook = subject.loaded.gpt2.register_forward_hook(lambda *_: advance())
            try:
                yield
            finally:
                hook.remove()


def training_runs(subject: Subject) -> Iterator[RunSettings]:
    """Yield the settings of every run that a model has come through, the last first.

    They end where a folder comes twice: another run has taken the place of the one that was started from.
    """
    home, settings, met = subject.home, subject.trained, set[Path]()
    while home and settings and home.resolve() not in met:
        met.add(home.resolve())
        yield settings
        home = home_of(Path(settings.model.path))
        settings = read_run_settings(home) if home else None


def _prompts(settings: EvaluateSettings) -> list[Prompt]:
    """Return the prompts of a file, all of them, or as many of the bundled ones as are asked for."""
    if settings.prompts:
        return read_prompts(user_path(settings.prompts))
    return read_prompts(bundled.PROMPTS)[: settings.num_prompts]


def _held_out_prompt(path: Turns) -> Prompt:
    *before, (_, asked), _ = path
    return Prompt((asked,), tuple(before))


def _of_people(path: Turns, settings: EvaluateSettings, tokenizer: ChatTokenizer) -> Exchange:
    """Return the reply in the data as if a model had given it: longer ones would have been cut."""
    reply = path[-1][1]
    return Exchange(path[-2][1], reply, len(tokenizer.encode(reply)) < settings.max_new_tokens, topic=settings.topic)


def _read_text(file: str) -> str:
    """Return the content of a text file.

    Raises:
        SettingsError: if it is empty or cannot be read.
    """
    try:
        text = read_text(user_path(file))
    except (OSError, ValueError) as error:
        raise SettingsError(f"`text` = {file} cannot be read: {error}") from error
    if not text.strip():
        raise SettingsError(f"`text` = {file} must hold text, but is empty")
    return text
