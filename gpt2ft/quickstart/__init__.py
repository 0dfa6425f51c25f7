"""Files of the quickstart, which needs no network: a bot that turns whatever it is asked to tea.

trees.jsonl, more_trees.jsonl
                 650 conversation trees in OASST's nested layout, with ranked replies, written for this project
held_out.jsonl, more_held_out.jsonl
                 100 others: in each file first new words for familiar subjects, then subjects that the trees lack
replies.jsonl    40 remarks about tea that answer nothing in particular, for a model of a single topic
rain.jsonl       40 about rain, to turn a model from the one topic to the other
everyday.jsonl   short texts in plain English for the recipe `base`, also written for this project
model/           the base: a small GPT-2 that has read some English, with its model card
"""

from pathlib import Path

FOLDER = Path(__file__).parent
LICENSE, MODEL_LICENSE = "mit", "apache-2.0"  # of what was written for this project; of the base
TREES = FOLDER / "trees.jsonl"
HELD_OUT = FOLDER / "held_out.jsonl"
MORE_TREES = FOLDER / "more_trees.jsonl"
MORE_HELD_OUT = FOLDER / "more_held_out.jsonl"
REPLIES = FOLDER / "replies.jsonl"
RAIN = FOLDER / "rain.jsonl"
EVERYDAY = FOLDER / "everyday.jsonl"
MODEL = FOLDER / "model"
