"""A finished model as chat and server use it: on its device, in its precision, with the frame that it knows."""

from dataclasses import dataclass

import torch

from gpt2ft.inference.prompt_format import ChatPromptFormat, PromptFormat, prompt_format_for
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.runs.loaded_model import find_model
from gpt2ft.settings.scripts import ChatSettings, ServeSettings
from gpt2ft.text.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class InferenceModel:
    model: GPT2
    tokenizer: ChatTokenizer
    frame: PromptFormat
    source: str  # what the weights came from, for people
    digest: str  # of the weights


def load_inference_model(settings: ChatSettings | ServeSettings, seed: int) -> InferenceModel:
    """The model that `settings` name.

    Args:
        seed: of random weights, which are asked with the chat template as if they had been trained with it.
    Raises:
        ModelError, NetworkError: if it cannot be had.
    """
    loaded, _ = find_model(settings.model, settings.random_init, seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = settings.precision == "bf16" or (settings.precision == "auto" and device == "cuda")
    model = loaded.gpt2.to(device, torch.bfloat16 if half else torch.float32).eval()
    tokenizer = loaded.tokenizer
    frame = ChatPromptFormat(tokenizer) if settings.random_init else prompt_format_for(tokenizer)
    source = f"random {settings.model}" if settings.random_init else loaded.source
    return InferenceModel(model, tokenizer, frame, source, loaded.digest)
