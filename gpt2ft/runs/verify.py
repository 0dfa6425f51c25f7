"""Check a finished run: it is what it says it was made of, and steps of it come out the same when computed again.

verify.py RUN                  checks it, claim by claim, and writes its certificate
verify.py CERTIFICATE MODEL    tells whether a model is that run's
verify.py RUN_A RUN_B          names the first step at which two runs differ, and in what
"""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import ValidationError

from gpt2ft import checkpoint
from gpt2ft.checkpoint import TrainState, difference, differences
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import precision_of, start_accelerator
from gpt2ft.distributed.agreement import check_agreement
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.errors import Gpt2ftError, SettingsError
from gpt2ft.model.lora import load_trainable_parameters
from gpt2ft.runs.certificate import Claim, check_model, write_certificate
from gpt2ft.runs.compare_runs import compare_runs
from gpt2ft.runs.finish import export
from gpt2ft.runs.identity import facts_of
from gpt2ft.runs.loaded_model import RECIPE, newest_run, read_run_settings
from gpt2ft.runs.manifest import environment, manifest_of
from gpt2ft.runs.output import Output
from gpt2ft.runs.recompute import Recomputation, choose, largest_difference
from gpt2ft.runs.run_setup import cast_to_precision, load_start, set_up, target_log_probs
from gpt2ft.runs.train_dpo import PreferenceTuning
from gpt2ft.runs.train_sft import FineTuning
from gpt2ft.settings.measuring import VerifySettings
from gpt2ft.settings.refusals import explain
from gpt2ft.settings.scripts import DPOSettings, SFTSettings
from gpt2ft.training.tracking import line_digests, training_lines
from gpt2ft.wording import counted

# Elsewhere sums are rounded in another order. What that may change of metrics, relative, and of weights, in learning
# rates for each step computed again; in float32 and in half precision.
TOLERANCES = {"metrics": (1e-3, 0.02), "weights": (0.1, 1.0)}
PARTS = {  # claims about what the manifest says, and the identity in it: what they need, and the keys
    "template": (("setup",), ("template",)),
    "tokenizer": (("setup",), ("tokenizer",)),
    "start": (("setup",), ("initial_weights",)),
    "data": (("template", "tokenizer"), ("tokenised_data", "held_out_data", "sources", "dropped", "dropped_held_out")),
    "plan": (("data", "start"), ("plan", "identity")),
}
EXPORTS = ("model", "best", "adapter", "start")
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)  # files of another shape than any run's


class NotVerified(Gpt2ftError):
    """Something that is not what the run says it is."""

    exit_code = 1


@watchdog.announce_end()
def run(settings: VerifySettings) -> None:
    paths = [Path(path) for path in settings.paths or (newest_run(),)]
    if len(paths) == 1:
        problem = Verification(paths[0], settings).run()
    else:
        problem = (check_model if paths[0].is_file() else compare_runs)(*paths)
    refuse("", problem)


def refuse(place: Any, problem: str | None) -> None:
    if problem:
        raise NotVerified(f"{place}: {problem}" if place else problem)


def compare(place: Any, then: Mapping[Any, Any], now: Mapping[Any, Any], prefix: str = "") -> str:
    """Return in words what is the same; raise NotVerified with the first five keys that differ."""
    found = ("`{}` was {!r} and is now {!r}".format(*each) for each in islice(differences(then, now, prefix), 5))
    refuse(place, "; ".join(found))
    return (
        f"the same: {', '.join(map(str, then)) if len(then) <= len(PARTS) else counted(len(then), 'entry', 'entries')}"
    )


class Verification:
    """One finished run, and the claims about it."""

    def __init__(self, folder: Path, asked: VerifySettings) -> None:
        from accelerate.utils import broadcast_object_list

        self.most, self.output, self.claims = asked.steps, Output(str(folder)), list[Claim]()
        self.saved = {int(path.name[5:]): path for path in checkpoint.folders(self.output.checkpoints)}  # by step
        self.manifest = self.output.read_manifest()
        keys = ("settings", "precision", "starts", "finished", "metrics", "identity")
        if lacking := ", ".join(f"`{key}`" for key in keys if key not in self.manifest):
            why = f"has no {lacking}" if self.manifest else "is missing or cannot be read"
            raise SettingsError(f"{folder} must be a finished run of this version, but its manifest.json {why}")
        given = self.manifest["settings"]
        is_dpo = isinstance(given, dict) and "dpo" in given
        kind, task = (DPOSettings, PreferenceTuning) if is_dpo else (SFTSettings, FineTuning)
        try:
            self.settings = kind.model_validate(given)
        except ValidationError as error:
            raise SettingsError("\n".join(explain(kind, f"{folder / 'manifest.json'}", error))) from error
        self.task, training, precision = task(self.settings), self.settings.training, self.manifest["precision"]
        self.accelerator = start_accelerator(precision, training.micro_batches_per_step, training.deterministic)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        self.random = np.random.default_rng(broadcast_object_list([seed])[0])

    def run(self) -> str:
        """Check all claims and write the certificate; return which do not hold in one sentence, empty if all do."""
        self.check("recipe", self.recipe)
        self.check("metrics", self.metrics)
        self.check("checkpoints", self.checkpoints)
        self.check("setup", self.set_up)
        for name, (needs, keys) in PARTS.items():
            self.check(name, lambda keys=keys: self.part(keys), *needs)
        self.check("order", self.order, "plan")
        if "reference" in self.manifest:
            self.check("reference", self.reference, "start", "data")
        self.check("steps", self.steps, "start", "order", "checkpoints", "reference")
        if self.accelerator.is_main_process:  # alone, from here on
            self.check("models", self.models, "setup")
            write_certificate(self.output, self.claims, environment(self.accelerator))
        self.accelerator.end_training()
        failed = ", ".join(claim["name"] for claim in self.claims if claim["result"] != "holds")
        return failed and f"{self.output.folder} does not verify: {failed}"

    def check(self, name: str, find: Callable[[], str], *needs: str) -> None:
        """Make and print a claim: `find` returns what was found, or raises an error where it does not hold."""
        missing = [claim["name"] for claim in self.claims if claim["name"] in needs and claim["result"] != "holds"]
        try:
            result, detail = ("not checked", f"needs {', '.join(missing)}") if missing else ("holds", find())
        except (Gpt2ftError, OSError) as error:
            result, detail = "fails", str(error)
        except UNREADABLE as error:
            result, detail = "fails", f"the files of the run cannot be read: {error!r}"
        self.claims.append({"name": name, "result": result, "detail": detail})
        if self.accelerator.is_main_process:
            print(f"{result:<12}{name:<12}{detail}", flush=True)

    def recipe(self) -> str:
        found = read_run_settings(self.output.folder).model_dump(mode="json")
        return compare(self.output.folder / RECIPE, self.manifest["settings"] | {"resume": "auto"}, found)

    def metrics(self) -> str:
        then, now = (dict(enumerate(each, 1)) for each in (self.manifest["metrics"], line_digests(self.output.metrics)))
        return compare(self.output.metrics, then, now, "line ")

    def checkpoints(self) -> str:
        for folder in self.saved.values():
            checkpoint.verify(folder)
            compare(f"{folder} is of another run", self.manifest["identity"], checkpoint.read_state(folder)[1])
        folder, state = self.last()
        compare(f"{folder} is not where the run ended", self.manifest["finished"] | {"sums": {}}, asdict(state))
        return f"of steps {', '.join(map(str, sorted(self.saved)))}: whole, and of this run"

    def last(self) -> tuple[Path, TrainState]:
        """Return the checkpoint that was exported, and its state."""
        folder = self.saved[max(self.saved)]
        return folder, replace(checkpoint.read_state(folder)[0], sums={})

    def set_up(self) -> str:
        self.setup = set_up(self.settings, self.task, self.accelerator)
        check_agreement(self.accelerator, facts_of(self.setup))
        self.now = json.loads(json.dumps(manifest_of(self.setup, self.setup.backend)))
        return "model and data are there"

    def part(self, keys: tuple[str, ...]) -> str:
        then, now = ({key: (found | found["identity"]).get(key) for key in keys} for found in (self.manifest, self.now))
        return compare("now", then, now)

    def order(self) -> str:
        lines = training_lines(self.output.metrics)
        planned = {step: self.setup.plan.digest(step) for step in lines}
        found = {step: line["data"] for step, line in lines.items()}
        return compare(self.output.metrics, planned, found, "what was trained on until step ")

    def reference(self) -> str:
        """Compute the reference of a step's replies again, and compare all with what the run was trained against."""
        model, last = cast_to_precision(self.setup, target_log_probs(self.setup)), self.setup.steps
        now = self.task.prepare_reference(self.setup, model, SignalHandler())["reference"]
        changed = difference(self.manifest["reference"] | {"folder": now["folder"]}, now)
        refuse(now["folder"], None if self.elsewhere(last - 1, last) else changed)
        step = int(self.random.integers(last))
        worst = self.task.check_start(self.setup, model, step)
        return f"{'others' if changed else 'the same'}, those of step {step} within {worst:.1g} nats/token"

    def elsewhere(self, first: int, last: int) -> str | None:
        """Return in words why bits may differ from those of a stretch of the run; None if they must be the same."""
        starts, now = self.manifest["starts"], environment(self.accelerator)
        for start, end in zip(starts, [*(start["step"] for start in starts[1:]), np.inf], strict=True):
            found = difference({key: start[key] for key in now}, now)
            if found and start["step"] < last and first < end:
                return found
        is_inexact = self.accelerator.device.type != "cpu" and not self.settings.training.deterministic
        return "a GPU adds up in any order unless `deterministic`" if is_inexact else None

    def steps(self) -> str:
        """Compute steps again: the lines must come out the same, and the weights of checkpoints."""
        lines = training_lines(self.output.metrics)
        stretches = choose(lines, self.saved, self.most, self.random)
        if not stretches:
            raise SettingsError(f"no line is within `steps` = {self.most} of a checkpoint before it: raise it")
        # All first, on all processes, as the main one alone may find a difference.
        found = [Recomputation(self.setup, self.task, stretch, self.saved, lines) for stretch in stretches]
        told = [f"from {stretch.first} to {stretch.last} {self.judge(stretch)}" for stretch in found]
        return f"{sum(stretch.last - stretch.first for stretch in found)} computed again: {'; '.join(told)}"

    def judge(self, found: Recomputation) -> str:
        """Tell how close a stretch has come out; raise NotVerified if not to the bit or, elsewhere, not near enough."""
        settings = self.setup.settings
        reason, is_half = self.elsewhere(found.first, found.last), precision_of(self.accelerator) != "no"
        highest = settings.optimizer.learning_rate * max(1.0, settings.lora.plus_ratio)
        rates, told = highest * (found.last - found.first), []
        for name, deviations, unit in (("metrics", found.metrics, 1.0), ("weights", found.weights, rates)):
            tolerance = TOLERANCES[name][is_half] * unit if reason else 0.0
            refuse(name, next((sentence for size, sentence in deviations if size > tolerance), None))
            if deviations:
                worst, _ = max(deviations)
                told.append(f"{name} within {worst:.1g} (tolerance {tolerance:.1g})" if worst else f"{name} to the bit")
        return ", ".join(told) + (f" ({reason})" if reason else "")

    def models(self) -> str:
        """Export the last and the best checkpoint again, merging adapters: the same files must come of it."""
        (folder, state), loaded = self.last(), load_start(self.settings)
        load_trainable_parameters(loaded.gpt2, checkpoint.read_weights(folder))
        with TemporaryDirectory() as temporary:
            again = Output(str(Path(temporary).resolve()))
            again.checkpoints, again.metrics = self.output.checkpoints, self.output.metrics
            export(again, self.settings, loaded, state, self.manifest)
            rounding = 1e-5 if self.settings.lora.rank and self.elsewhere(state.step - 1, state.step) else 0.0
            trained_in = str(Path(self.settings.output).resolve())
            folders = [root / name for root in (self.output.folder, again.folder) for name in EXPORTS]
            files = {file.relative_to(folder.parent) for folder in folders for file in folder.rglob("*")}
            for name in sorted(file for file in files if file.suffix != ".md"):
                problem = export_problem(self.output.folder / name, again.folder / name, trained_in, rounding)
                refuse(self.output.folder / name, problem)
        return f"{len(files)} files as the checkpoints are exported"


def export_problem(file: Path, again: Path, trained_in: str, rounding: float) -> str | None:
    """Return how a file differs from the same exported again into another folder; None if it does not."""
    if not (file.is_file() and again.is_file()):
        return "is missing" if again.is_file() else "is no file of the run"
    if file.suffix == ".safetensors":
        size, name = largest_difference(checkpoint.read_tensors(file), checkpoint.read_tensors(again))
        return f"`{name}` differs by {size:.2g} from the checkpoint" if size > rounding else None
    text = again.read_text(encoding="utf-8").replace(str(again.parents[1]), trained_in)
    return None if file.read_text(encoding="utf-8") == text else "is not what the run exports"
