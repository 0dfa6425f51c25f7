"""Files of a report.

prompts.jsonl    conversations that every model has, written for this project: the first three are shown first
texts/           plain texts in the public domain, on which forgetting is measured: Abraham Lincoln's address at
                 Gettysburg (1863, the Bliss copy) and the beginning of the Declaration of Independence (1776)
"""

from pathlib import Path

FOLDER = Path(__file__).parent
PROMPTS = FOLDER / "prompts.jsonl"
TEXTS = FOLDER / "texts"
