"""Model and adapter folders in Hugging Face layout: weights, tokenizer, chat template and generation settings.

They load in transformers, and in what reads its folders, with nothing of this package installed.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gpt2ft.files import complete_folder, write_json
from gpt2ft.model.gpt2 import GPT2, GPT2Config
from gpt2ft.model.lora import LoRAConfig
from gpt2ft.model.peft import merge_adapter, write_adapter
from gpt2ft.model.pretrained import HUB_MODELS, find_folder, write_model
from gpt2ft.runs.assemble import Policy
from gpt2ft.text.tokenizer import ChatTokenizer


def write_adapter_folder(folder: Path, gpt2: GPT2, lora: LoRAConfig, model_path: str, tokenizer: ChatTokenizer) -> None:
    """Writes a complete adapter folder in the layout of PEFT, with the tokenizer, or none.

    Args:
        gpt2: adapted.
        model_path: what was adapted: a published model or a folder.
    """
    published = HUB_MODELS.get(model_path) if not Path(model_path).is_dir() else None
    base = published.repository if published else str(find_folder(model_path).resolve())
    with complete_folder(folder) as temporary:
        tokenizer.save(temporary, model_max_length=gpt2.config.n_positions)
        write_adapter(temporary, gpt2, lora, base)


def check_adapter(folder: Path, base: Policy, merged: Mapping[str, Tensor]) -> None:
    """Reads an adapter folder back: on its base it must make the merged weights.

    Raises:
        OSError: if it does not.
    """
    for name, weight in merge_adapter(folder, base.weights()).items():
        if not torch.allclose(weight, merged[name], atol=1e-5, rtol=1e-4):
            raise OSError(f"{folder} was written, but does not give `{name}` as it was trained")


def write_folder(folder: Path, weights: Mapping[str, Tensor], config: GPT2Config, tokenizer: ChatTokenizer) -> None:
    """Writes a complete model folder, or none.

    Raises:
        OSError: if it could not be written.
    """
    eos, pad = tokenizer.end_id, tokenizer.end_of_text_id
    token_ids = {"bos_token_id": pad, "eos_token_id": eos, "pad_token_id": pad}
    with complete_folder(folder) as temporary:
        tokenizer.save(temporary, model_max_length=config.n_positions)
        generation = token_ids | {"eos_token_id": [eos, pad], "do_sample": False}
        write_json(temporary / "generation_config.json", generation)
        write_model(temporary, weights, config, len(tokenizer), token_ids)
