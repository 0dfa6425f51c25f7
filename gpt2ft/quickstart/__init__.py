"""What the quickstart needs and no network has to bring: conversation trees written for this project and
the shape and vocabulary of a tiny model. A bot that turns whatever it is asked to tea."""

from pathlib import Path

FOLDER = Path(__file__).parent
TREES = FOLDER / "trees.jsonl"
HELD_OUT = FOLDER / "held_out.jsonl"
MODEL = FOLDER / "model"
