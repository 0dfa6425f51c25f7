"""The same steps the usual way: one padded batch of paths after another, by transformers or by TRL's own steps.

It runs in a process of its own, where each step waits for ours: the steps are taken in turn, and each way has its own
peak of memory. A batch holds `batch_size` sequences in the order of the data, padded to the longest of them.
"""

import copy
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from gpt2ft.benchmark.machine import seconds_of
from gpt2ft.benchmark.work import Path, Work, compared, conversations, make_work
from gpt2ft.errors import SettingsError
from gpt2ft.model.gpt2 import GPT2Config
from gpt2ft.settings.measuring import BenchmarkSettings
from gpt2ft.settings.training import OptimizerSettings, PreferenceSettings
from gpt2ft.training.memory_probe import peak_memory

IGNORED = -100  # in labels
PAD = 0


@dataclass(frozen=True)
class Worker:
    """A process that takes a step whenever it is told to."""

    pipe: Any

    def step(self) -> float:
        """Return the seconds of the next step."""
        return self._ask("step")

    def peak_memory(self) -> int:
        return self._ask("peak_memory")

    def _ask(self, what: str) -> Any:
        try:
            self.pipe.send(what)
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            raise SettingsError(
                "`against`: its process has ended, of what it says above; where memory was short, a smaller "
                "`batch_size` takes less"
            ) from error


@contextmanager
def usual_way(
    settings: BenchmarkSettings, config: GPT2Config, device: torch.device, dtype: torch.dtype
) -> Iterator[Worker]:
    """Start the process; it ends with the block.

    Raises:
        SettingsError: within the block, if it ends before.
    """
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(theirs, settings, config, str(device), dtype), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process, which ends the other one
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    theirs.close()
    try:
        yield Worker(ours)
    finally:
        ours.close()
        process.terminate()
        process.join()


def serve(pipe: Any, settings: BenchmarkSettings, config: GPT2Config, device: str, dtype: torch.dtype) -> None:
    """Take steps as asked, until the other end is closed."""
    kind = {"transformers": Transformers, "trl": TRL}[settings.against]
    side = kind(settings, config, torch.device(device), dtype)
    work = make_work(settings, 1)
    step = 0
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        if asked == "peak_memory":
            pipe.send(peak_memory(side.device))
            continue
        pipe.send(seconds_of(side.device, partial(take_step, side, settings, work, step)))
        step += 1


def take_step(side: "Transformers", settings: BenchmarkSettings, work: Work, step: int) -> None:
    """Train on all paths of a step, or on all its pairs."""
    trees = [tree for number in range(work.micro_batches_per_step) for tree in work.trees(step, number)]
    if settings.compares:
        pairs = list(compared(trees))
        for first in range(0, len(pairs), settings.batch_size):
            chosen, rejected = zip(*pairs[first : first + settings.batch_size], strict=True)
            side.compare(chosen, rejected, len(pairs))
    else:
        paths = list(conversations(trees))
        targets = sum(sum(path.is_target) for path in paths)
        for first in range(0, len(paths), settings.batch_size):
            side.learn(paths[first : first + settings.batch_size], targets)
    if settings.what != "reference":
        side.update()


class Transformers:
    """GPT2LMHeadModel with full logits; for DPO with the reference model beside it."""

    def __init__(
        self, settings: BenchmarkSettings, config: GPT2Config, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.settings, self.device, self.dtype = settings, device, dtype
        self.model = gpt2_of_transformers(settings, config).to(device)
        self.reference = copy.deepcopy(self.model).eval() if settings.compares else None
        self.model.train()
        self.prepare()

    def prepare(self) -> None:
        """Make what trains the model."""
        if self.settings.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        rate = OptimizerSettings().learning_rate
        self.optimizer = torch.optim.AdamW(trained, lr=rate, fused=self.device.type == "cuda")
        if self.device.type == "cuda":
            self.model = torch.compile(self.model, dynamic=True)

    def learn(self, paths: Sequence[Path], targets: int) -> None:
        """Add the gradient of a batch's losses, of a step of so many targets."""
        ids, mask, is_target = self._padded(paths)
        labels = ids.masked_fill(~is_target, IGNORED)[:, 1:]
        logits = self._logits(self.model, ids, mask)[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        (loss / targets).backward()

    def compare(self, chosen: Sequence[Path], rejected: Sequence[Path], pairs: int) -> None:
        """Add the gradient of a batch's pairs, of a step of so many; for `reference` no more than its log-probs."""
        ids, mask, is_target = self._padded([*chosen, *rejected])
        with torch.no_grad():
            reference = self._log_probs(self.reference, ids, mask, is_target)
        if self.settings.what == "reference":
            return
        better, worse = (self._log_probs(self.model, ids, mask, is_target) - reference).chunk(2)
        loss = -logsigmoid(PreferenceSettings().beta * (better - worse)).sum()
        (loss / pairs).backward()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _logits(self, model: torch.nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def _log_probs(self, model: torch.nn.Module, ids: Tensor, mask: Tensor, is_target: Tensor) -> Tensor:
        logits = self._logits(model, ids, mask)[:, :-1].float()
        log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (log_probs * is_target[:, 1:]).sum(-1)

    def _padded(self, paths: Sequence[Path]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, attention mask and targets [B, longest]."""
        rows = [[torch.tensor(values) for values in (p.ids, [1] * len(p.ids), p.is_target)] for p in paths]
        padded = (torch.nn.utils.rnn.pad_sequence(column, True, PAD) for column in zip(*rows, strict=True))
        ids, mask, is_target = (column.to(self.device) for column in padded)
        return ids, mask, is_target


class TRL(Transformers):
    """The collators, losses and training steps of SFTTrainer and DPOTrainer, with their defaults."""

    def prepare(self) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

        given = {
            "output_dir": "unused", "save_strategy": "no", "report_to": "none", "max_length": None,
            "bf16": self.dtype == torch.bfloat16, "use_cpu": self.device.type == "cpu",
            "gradient_checkpointing": self.settings.activation_checkpointing,
            "learning_rate": OptimizerSettings().learning_rate,
        }  # fmt: skip
        tokenizer = any_tokenizer()
        if self.settings.compares:
            data = Dataset.from_dict({"prompt": ["a"], "chosen": ["a"], "rejected": ["a"]})
            self.trainer = DPOTrainer(
                self.model, self.reference, DPOConfig(**given), train_dataset=data, processing_class=tokenizer
            )
        else:
            data = Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})
            self.trainer = SFTTrainer(self.model, SFTConfig(**given), train_dataset=data, processing_class=tokenizer)
        self.model, self.optimizer = self.trainer.model, self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1

    def learn(self, paths: Sequence[Path], targets: int) -> None:
        rows = [
            {
                "input_ids": path.ids,
                "labels": [id if target else IGNORED for id, target in zip(path.ids, path.is_target, strict=True)],
            }
            for path in paths
        ]
        self.trainer.training_step(self.model, self.trainer.data_collator(rows), num_items_in_batch=targets)

    def compare(self, chosen: Sequence[Path], rejected: Sequence[Path], pairs: int) -> None:
        rows = []
        for better, worse in zip(chosen, rejected, strict=True):
            prompt = better.is_target.index(True)
            rows.append(
                {
                    "prompt_ids": better.ids[:prompt],
                    "chosen_ids": better.ids[prompt:],
                    "rejected_ids": worse.ids[prompt:],
                }
            )
        batch = self.trainer.data_collator(rows)
        if self.settings.what == "reference":
            on_device = {name: values.to(self.device) for name, values in batch.items()}
            self.trainer.compute_ref_log_probs(self.trainer.ref_model, on_device)
        else:
            self.trainer.training_step(self.model, batch)


def gpt2_of_transformers(settings: BenchmarkSettings, config: GPT2Config) -> Any:
    """Return a model of this shape with random weights."""
    import transformers

    torch.manual_seed(settings.seed)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    given = transformers.GPT2Config(vocab_size=config.vocab_size, n_positions=config.n_positions, **shape, **dropout)
    return transformers.GPT2LMHeadModel(given)


def any_tokenizer() -> Any:
    """Return a tokenizer, which TRL wants to see although it is given ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": PAD, "a": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
