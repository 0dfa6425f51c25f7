"""Folder of a run: its layout, the lock that keeps other runs out, and when it is finished."""

import json
from pathlib import Path
from typing import Any

from gpt2ft.distributed.accelerator import global_sum
from gpt2ft.distributed.restarts import is_restart_of
from gpt2ft.distributed.shared_folder import check_shared
from gpt2ft.errors import SettingsError, reason
from gpt2ft.files import remove_leftovers, restore_replaced, write_json, write_text
from gpt2ft.runs.earlier_run import refuse_other_run
from gpt2ft.runs.loaded_model import RECIPE
from gpt2ft.runs.lock import NAME as LOCK
from gpt2ft.runs.lock import FolderLock
from gpt2ft.settings.recipes import to_yaml
from gpt2ft.settings.scripts import RunSettings
from gpt2ft.text.display import print_row


class Output:
    """recipe.yaml, manifest.json, metrics.jsonl, what trackers keep, checkpoints/, start/, adapter/, best/ and model/;
    the certificate once it was verified.

    `model/` is the last thing a run writes, so a folder with it is a finished run.
    """

    def __init__(self, path: str) -> None:
        self.folder = Path(path)
        self.checkpoints = self.folder / "checkpoints"
        self.metrics = self.folder / "metrics.jsonl"
        self.model = self.folder / "model"
        self.best = self.folder / "best"
        self.adapter = self.folder / "adapter"
        self.start = self.folder / "start"
        self.is_restart = False  # an earlier start of this very launch has begun the run that lies here
        self._lock = FolderLock()

    @property
    def is_finished(self) -> bool:
        return (self.model / "config.json").is_file()

    def is_of_this_launch(self) -> bool:
        """Return True if this process knows the run that lies here as one that its launch has begun."""
        return is_restart_of(self.read_manifest().get("launch", {}))

    def is_finished_by_this_launch(self) -> bool:
        """Return True if there is nothing left to do for a restart that comes too late."""
        return self.is_finished and self.is_restart

    def continues(self, settings: RunSettings) -> bool:
        """Return True if the run goes on from what lies here: by its settings, or because it is a restart."""
        return settings.resume == "auto" or self.is_restart

    def claim(self, settings: RunSettings) -> None:
        """Check that this run may train here, and keep others out; nothing is moved or removed yet. Main process only.

        A checkpoint that was being replaced when the run was killed gets its name back, before any process looks for
        it.

        Raises:
            SettingsError: if the run in it is finished or another, another trains in it, or it cannot be written to.
        """
        goes_on = self.is_finished or any(self.checkpoints.glob("step-*"))
        if settings.resume == "auto" and goes_on and not self.is_of_this_launch():
            refuse_other_run(self.folder, settings, self.is_finished)
        if Path(settings.model.path).resolve().is_relative_to(self.folder.resolve()):
            raise SettingsError(
                f"`model.path` = {settings.model.path} must not lie in `output` = {self.folder}: train into another"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / ".writable", "")
            (self.folder / ".writable").unlink(missing_ok=True)
            self._lock.hold(self.folder)
            restore_replaced(self.checkpoints)
        except OSError as error:
            raise SettingsError(f"`output` = {self.folder} cannot be written to: {reason(error)}") from error

    def begin(self, settings: RunSettings, manifest: dict[str, Any], accelerator: Any) -> None:
        """Write recipe and manifest, once the run is sure to train; an earlier run that it does not continue is moved
        aside. All processes call it together.

        The recipe is written with `resume: auto`: running it again continues.
        """
        if accelerator.is_main_process:
            self._begin(settings, manifest)
        accelerator.wait_for_everyone()

    def _begin(self, settings: RunSettings, manifest: dict[str, Any]) -> None:
        if not self.continues(settings):
            self._move_aside()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        remove_leftovers(self.checkpoints)
        write_text(self.folder / RECIPE, to_yaml(settings.model_copy(update={"resume": "auto"})))
        self.write_manifest(manifest)

    def read_manifest(self) -> dict[str, Any]:
        """Return what `write_manifest` wrote; nothing where it cannot be read."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        write_json(self.folder / "manifest.json", manifest)

    def _move_aside(self) -> None:
        if all(entry.name == LOCK for entry in self.folder.iterdir()):
            return
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        self.folder.rename(aside)
        self.folder.mkdir()
        self._lock.hold(self.folder)
        print(f"the earlier run is now in {aside}", flush=True)


def open_output(settings: RunSettings, accelerator: Any) -> Output:
    """Return the folder of this run, claimed for it and seen by all processes; with `--dry_run` or `--show` unclaimed.

    Where a launcher starts a process again, its run continues whatever `resume` says, and ends at once if an earlier
    start has finished it.

    Raises:
        SettingsError: if the run in it is finished, another trains in it, or it cannot be written to.
        LaunchError: if not all machines share it.
    """
    output = Output(settings.output)
    if settings.looks_only:
        return output
    if accelerator.is_main_process:
        output.claim(settings)
    accelerator.wait_for_everyone()
    check_shared(accelerator, output.folder)
    # A torchrun without an id is known on its own machine alone, and all must do the same.
    output.is_restart = any(global_sum(accelerator, float(output.is_of_this_launch())))
    if output.is_finished_by_this_launch() and accelerator.is_main_process:
        print_row("finished", f"{output.model}, by an earlier start of this launch")
    return output
