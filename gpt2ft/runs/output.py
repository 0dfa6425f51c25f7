"""The folder of a run: whose it is, whether it is finished, and what lies in it."""

import shutil
from pathlib import Path
from typing import Any

from gpt2ft.files import write_json, write_text
from gpt2ft.settings import SettingsError, SFTSettings, to_yaml


class Output:
    """recipe.yaml, manifest.json, metrics.jsonl, tensorboard/, checkpoints/, best/ and model/.

    `model/` is the last thing a run writes, so a folder with it is a finished run.
    """

    def __init__(self, path: str) -> None:
        self.folder = Path(path)
        self.checkpoints = self.folder / "checkpoints"
        self.model = self.folder / "model"
        self.best = self.folder / "best"

    def claim(self, settings: SFTSettings) -> None:
        """Makes the folder ready to train into. Main process only.

        Raises:
            SettingsError: if the run in it is finished, or it cannot be written to.
        """
        try:
            if settings.resume == "never":
                self._move_aside()
            elif (self.model / "config.json").is_file():
                raise SettingsError(f"the run in {self.folder} is finished: pass `--resume never` to train it anew")
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in self.checkpoints.glob(".step-*"):  # of a process that was killed while saving
                shutil.rmtree(leftover)
            write_text(self.folder / ".writable", "")
            (self.folder / ".writable").unlink()
        except OSError as error:
            raise SettingsError(f"`output` = {self.folder} cannot be written to: {error}") from error

    def record(self, settings: SFTSettings, manifest: dict[str, Any]) -> None:
        """What is trained here, once it is sure that it will be."""
        write_text(self.folder / "recipe.yaml", to_yaml(settings))
        write_json(self.folder / "manifest.json", manifest)

    def _move_aside(self) -> None:
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        self.folder.rename(aside)
        print(f"the earlier run is now in {aside}", flush=True)
