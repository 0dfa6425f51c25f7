"""Files of the quickstart, which needs no network: a bot that turns whatever it is asked to tea.

trees.jsonl      150 conversation trees in OASST's nested layout, with ranked replies, written for this project
held_out.jsonl   44 more: first new words for familiar subjects, then subjects that trees.jsonl does not have
more_trees.jsonl, more_held_out.jsonl
                 500 and 56 more of both, which no recipe uses: the tiny model learns by heart what it has, and these
                 would take it longer than a first run may take
replies.jsonl    40 remarks about tea that answer nothing in particular, for a model of a single topic
rain.jsonl       40 about rain, to turn a model from the one topic to the other
model/           a tiny shape, and a byte-level BPE trained on trees.jsonl in which every word is one token
"""

from pathlib import Path

FOLDER = Path(__file__).parent
TREES = FOLDER / "trees.jsonl"
HELD_OUT = FOLDER / "held_out.jsonl"
MORE_TREES = FOLDER / "more_trees.jsonl"
MORE_HELD_OUT = FOLDER / "more_held_out.jsonl"
REPLIES = FOLDER / "replies.jsonl"
RAIN = FOLDER / "rain.jsonl"
MODEL = FOLDER / "model"
