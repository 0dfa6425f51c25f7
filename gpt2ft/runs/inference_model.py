"""Load the model that a chat or a server uses, onto its device and in its precision."""

import torch

from gpt2ft.device import DTYPES, available_cores, check_gpu, choose_precision, device_type
from gpt2ft.inference.model import InferenceModel
from gpt2ft.inference.prompt_format import ChatPromptFormat, prompt_format_for
from gpt2ft.runs.loaded_model import find_model
from gpt2ft.settings.using import InferenceSettings


def load_inference_model(settings: InferenceSettings, seed: int) -> InferenceModel:
    """Load the model that `settings` name.

    Args:
        seed: of random weights, which get the chat template as if they had been trained with it.
    Raises:
        DeviceError: if there is a GPU that cannot be used.
        ModelError, NetworkError: if it cannot be had.
    """
    check_gpu()
    precision = choose_precision(settings.precision)
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))  # PyTorch knows nothing of quotas
    loaded, _ = find_model(settings.model, settings.random_init, seed)
    gpt2 = loaded.gpt2.to(device_type(), DTYPES[precision]).eval()
    tokenizer = loaded.tokenizer
    prompt_format = ChatPromptFormat(tokenizer) if settings.random_init else prompt_format_for(tokenizer)
    source = f"random {settings.model}" if settings.random_init else loaded.source
    return InferenceModel(gpt2, tokenizer, prompt_format, source, loaded.digest)
