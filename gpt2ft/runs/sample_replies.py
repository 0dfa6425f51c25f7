"""Preferences of a model's own making: several replies to each prompt, ranked by faults that are seen without a judge.

Each prompt is a piece of work of its own, with random numbers of its own and, on a CPU, one thread: the file is the
same on any number of processes, and after a kill, which costs the prompt under way. Until all is done, what is stands
beside the output in files with `.partial-` in their names, one for each process and start.
"""

import glob
import hashlib
import json
import shlex
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2ft.command_line import same_command, words_to_start
from gpt2ft.conversation import tidy
from gpt2ft.data.pairs import compared
from gpt2ft.data.reading import DataError
from gpt2ft.data.sources import read_trees
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import dtype_of, precision_of, start_accelerator
from gpt2ft.distributed.agreement import check_agreement
from gpt2ft.distributed.signals import Preempted, SignalHandler
from gpt2ft.errors import SettingsError, reason
from gpt2ft.files import failing_as, user_path, write_text
from gpt2ft.inference.decoder import Decoder, suppressed_token_mask
from gpt2ft.inference.generate import generate
from gpt2ft.inference.prompt_format import TooLong, Turn, chat_prompt, prompt_format_for, prompt_limit, reply_text
from gpt2ft.random import seed_for
from gpt2ft.report.faults import Rules, faults
from gpt2ft.report.instructions import obeys
from gpt2ft.report.replies import Exchange
from gpt2ft.report.schema import Reply
from gpt2ft.runs.loaded_model import LoadedModel, find_model
from gpt2ft.settings.measuring import SampleSettings
from gpt2ft.settings.sections import SamplingDefaults, SamplingSettings
from gpt2ft.text.display import print_row
from gpt2ft.wording import counted

Prompt = tuple[Turn, ...]  # the last turn is the user's
Done = dict[int, list[Reply] | None]  # by the number of the prompt; None where it leaves no room for a reply
Row = dict[str, Any]

CHANGES_LITTLE = 256 * 4e-5  # width times learning rate
_PARTIAL = ".partial-"
_DECIDE = {"replies", "max_new_tokens", "seed", *SamplingDefaults.model_fields}  # settings that choose the replies


@watchdog.announce_end()
def run(settings: SampleSettings) -> None:
    output = user_path(settings.output)
    if output.exists():
        raise SettingsError(f"`output` = {output} must not exist yet, but does: name another, or remove it")
    for check in settings.check:
        if obeys(check, "") is None:
            raise SettingsError(
                f"`check` = {check!r} is no instruction that can be checked, as are: in one sentence; in at most 20 "
                'words; use the word "kettle"; do not use the word "tea"; begin with "Dear"; as a list; as JSON'
            )
    accelerator = start_accelerator(settings.precision)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(1)  # how many threads share a sum decides how it is rounded
    loaded, _ = find_model(settings.model, settings.random_init)
    prompts = read_prompts(settings)
    work = _digest([loaded.digest, precision_of(accelerator), prompts, settings.model_dump(include=_DECIDE)])
    check_agreement(accelerator, {"settings": settings.model_dump(), "work": work})
    if accelerator.is_main_process:
        print_row("model", loaded.source)
        print_row("prompts", f"{len(prompts):,}, {counted(settings.replies, 'reply', 'replies')} to each")
    done = _sample_all(Sampling(loaded, settings, accelerator), prompts, output, work)
    if not accelerator.is_main_process:
        return
    judged = [judge(prompts[number], replies, settings) for number, replies in done.items()]
    rows = [row for each in judged for row in (each.best() if settings.best else each.pairs(settings))]
    _tell(judged, rows, settings)
    if not rows:
        raise DataError("nothing is left to write: ask for more `replies`, a higher `temperature` or other prompts")
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for file in _partial_files(output):
        file.unlink()
    print_row("written", f"{counted(len(rows), 'conversation' if settings.best else 'pair')} to {output}")
    script, recipe = ("sft", "my-data") if settings.best else ("dpo", "my-data-dpo")
    words = [*words_to_start(script), recipe, "--model.path", loaded.source, "--data.train", str(output)]
    if not settings.best:  # a model that replies already is to be changed little
        words += ["--optimizer.learning_rate", f"{CHANGES_LITTLE / max(256, loaded.gpt2.config.n_embd):.1g}"]
    print_row("next", shlex.join(words))


def read_prompts(settings: SampleSettings) -> list[Prompt]:
    """Return what leads to each user turn of the data, in their order, none twice; of a .txt each line.

    Raises:
        DataError: if there is none.
    """
    found: dict[Prompt, None] = {}
    for source in settings.data:
        found |= dict.fromkeys(_lines(source) if source.lower().endswith(".txt") else _user_turns(source, settings))
    if not found:
        raise DataError(f"{', '.join(settings.data)} must hold prompts, but holds none")
    return list(found)[: settings.num_prompts]


def _lines(source: str) -> Iterator[Prompt]:
    try:
        lines = user_path(source).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read: {reason(error)}") from error
    return ((("user", line.strip()),) for line in lines if line.strip())


def _user_turns(source: str, settings: SampleSettings) -> Iterator[Prompt]:
    for tree in read_trees(source, settings.filters):
        for index, message in enumerate(tree.messages):
            if message.role == "user":
                yield tuple((tree.messages[turn].role, tree.messages[turn].text) for turn in tree.path_to(index))


# --- replies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """Several replies of a model to one prompt."""

    loaded: LoadedModel
    settings: SampleSettings
    accelerator: Any

    def __call__(self, number: int, prompt: Prompt) -> list[Reply] | None:
        """Return the replies, or None where the prompt leaves no room for one."""
        gpt2, tokenizer, settings = self.loaded.gpt2, self.loaded.tokenizer, self.settings
        prompt_format = prompt_format_for(tokenizer)
        try:
            ids = chat_prompt(prompt_format, prompt, prompt_limit(gpt2.config.n_positions, settings.max_new_tokens)).ids
        except TooLong:
            return None
        suppressed = suppressed_token_mask(tokenizer, gpt2.wte.weight, prompt_format.stop_ids)
        decoder = Decoder(gpt2, prompt_format.stop_ids, suppressed, settings.replies)
        generate(decoder, [ids], 1)  # reads the prompt, once for all replies
        chosen = settings.model_dump(include=set(SamplingDefaults.model_fields))
        seeds = [seed_for(settings.seed, "reply", number, reply) for reply in range(settings.replies)]
        samplings = [SamplingSettings(**chosen, seed=seed) for seed in seeds]
        completions = generate(decoder, [ids] * settings.replies, settings.max_new_tokens, samplings)
        texts = [reply_text(tokenizer, prompt_format, each.ids, each.stopped) for each in completions]
        return [{"text": text, "stopped": stopped} for text, stopped in texts]


def _sample_all(sample: Sampling, prompts: Sequence[Prompt], output: Path, work: str) -> Done:
    """Return the replies to all prompts, on every process; those of an earlier start are read.

    Raises:
        Preempted: once the prompt under way is written.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    accelerator = sample.accelerator
    output.parent.mkdir(parents=True, exist_ok=True)
    sample.loaded.gpt2.to(accelerator.device, dtype_of(accelerator)).eval()
    done = _read_partial(output, work)
    (known,) = gather_object([sorted(done)])[:1]  # all have read before any writes, and share out the same rest
    left = [number for number in range(len(prompts)) if number not in known]
    mine = left[accelerator.process_index :: accelerator.num_processes]
    signals = SignalHandler()
    partial = output.with_name(f"{output.name}{_PARTIAL}{uuid.uuid4().hex}")
    with (
        signals.listening(),
        failing_as(f"{partial} could not be written"),
        open(partial, "w", encoding="utf-8") as file,
    ):
        print(json.dumps(work), file=file, flush=True)
        shown = accelerator.is_main_process and sys.stderr.isatty()
        for number in tqdm(mine, "sampling", unit="prompt", disable=not shown):
            if signals.was_signalled():
                break
            done[number] = sample(number, prompts[number])
            print(json.dumps([number, done[number]]), file=file, flush=True)
    if any(gather_object([signals.was_signalled()])):
        raise Preempted(f"told to stop; what was sampled is kept, and `{same_command()}` goes on from it")
    everywhere: Done = {}
    for part in gather_object([done]):
        everywhere |= part
    return dict(sorted(everywhere.items()))


def _partial_files(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"{glob.escape(output.name + _PARTIAL)}*"))


def _read_partial(output: Path, work: str) -> Done:
    """Return what earlier starts of the same work have done; a last line that a kill has cut is done again.

    Raises:
        SettingsError: if it is of other work.
    """
    done: Done = {}
    for file in _partial_files(output):
        whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        if whole and json.loads(whole[0]) != work:
            raise SettingsError(
                f"{file} was begun with another model, other prompts or other settings of sampling: remove it, or name "
                "another `output`"
            )
        done |= dict(map(json.loads, whole[1:]))
    return done


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- judging --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """The different replies to a prompt, those with the fewest faults first, and what was left out."""

    prompt: Prompt
    replies: list[tuple[str, list[str]]]  # text, faults
    left_out: Counter[str]

    def pairs(self, settings: SampleSettings) -> list[Row]:
        """Return a record for each two replies of which one has fewer faults; equal ones are no pair."""
        rows = []
        for better, worse in compared([len(found) for _, found in self.replies], settings.pairs):
            (chosen, few), (rejected, many) = self.replies[better], self.replies[worse]
            rows.append(
                {
                    "prompt": _messages(self.prompt),
                    "chosen": _messages([("assistant", chosen)]),
                    "rejected": _messages([("assistant", rejected)]),
                    "score_chosen": -len(few),
                    "score_rejected": -len(many),
                    "metadata": {"faults_of_chosen": few, "faults_of_rejected": many},
                }
            )
        return rows

    def best(self) -> list[Row]:
        """Return the conversation with the first reply that has no fault, if there is one."""
        return [
            {"messages": _messages([*self.prompt, ("assistant", text)])} for text, found in self.replies if not found
        ][:1]


def judge(prompt: Prompt, replies: Sequence[Reply] | None, settings: SampleSettings) -> Judged:
    """Rank the replies to a prompt by the number of their faults."""
    rules = Rules(settings.check, settings.min_words, settings.max_words)
    left_out: Counter[str] = Counter({"prompts that leave no room for a reply": replies is None})
    found: dict[str, list[str]] = {}
    for reply in replies or ():
        text = tidy(reply["text"])
        if not text or text in found:
            left_out["replies word for word as another" if text else "empty replies"] += 1
        else:
            found[text] = faults(Exchange(prompt[-1][1], text, reply["stopped"], topic=settings.topic), rules)
    return Judged(prompt, sorted(found.items(), key=lambda item: len(item[1])), left_out)


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def _tell(judged: Sequence[Judged], rows: Sequence[Row], settings: SampleSettings) -> None:
    """Print how often each fault was found, and what was left out."""
    found = [faults for each in judged for _, faults in each.replies]
    print_row(
        "replies", f"{len(found):,} different ones, {sum(not faults for faults in found):,} of them without a fault"
    )
    counts = Counter(fault for faults in found for fault in faults)
    print_row("faults", ", ".join(f"{number:,} {fault}" for fault, number in counts.most_common()) or "none")
    left_out = sum((each.left_out for each in judged), Counter())
    without = "prompts without a reply that has no fault" if settings.best else "prompts whose replies are equally good"
    left_out[without] = sum(
        not (each.best() if settings.best else each.pairs(settings)) for each in judged if each.replies
    )
    print_row(
        "left out", ", ".join(f"{number:,} {reason}" for reason, number in (+left_out).most_common()) or "nothing"
    )
