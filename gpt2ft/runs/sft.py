"""Supervised fine-tuning: the loss of every assistant turn, on everything above it."""

from gpt2ft.objectives.sft import SFT
from gpt2ft.runs.train import train
from gpt2ft.settings import SFTSettings


def run(settings: SFTSettings) -> None:
    train(settings, SFT())
