"""Exports: weights, tokenizer, chat template and generation settings as other tools read them.

Folders in Hugging Face layout load in transformers, and in what reads its folders, with nothing of this package
installed; adapters in PEFT; GGUF files in llama.cpp and Ollama. Each is read back and compared before it gets its name.
"""

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gpt2ft.errors import SettingsError
from gpt2ft.files import complete_folder, write_json, write_text
from gpt2ft.hub import commit_of, hub_model
from gpt2ft.model.gguf import SHORT_NAMES, GGUFTokenizer, write_gguf
from gpt2ft.model.gpt2 import GPT2Config
from gpt2ft.model.lora import is_adapted, merged_weights
from gpt2ft.model.peft import merge_adapter, write_adapter
from gpt2ft.model.pretrained import ModelError, find_folder, write_model
from gpt2ft.runs.loaded_model import (
    LoadedModel,
    find_model,
    is_adapter,
    load_adapted,
    load_model,
    newest_run,
    read_run_settings,
)
from gpt2ft.settings.choices import PUBLISHED_MODELS
from gpt2ft.settings.scripts import ExportSettings, RunSettings
from gpt2ft.text.chat_tokens import END
from gpt2ft.text.display import print_row
from gpt2ft.text.template import CHAT_TEMPLATE, OLLAMA_TEMPLATE
from gpt2ft.text.tokenizer import ChatTokenizer
from gpt2ft.text.tokenizer_export import save_tokenizer

MODELFILE = '''\
# ollama create NAME -f Modelfile
FROM ./{file}
TEMPLATE """{template}"""
PARAMETER stop "{stop}"
PARAMETER num_ctx {context}
'''


def run(settings: ExportSettings) -> None:
    output = Path(settings.output)
    if os.path.lexists(output):
        raise SettingsError(f"`output` = {output} must not exist yet, but does: name another folder, or remove it")
    if output.suffix == ".gguf":
        folder = output.with_suffix("")
        raise SettingsError(f"`output` must be a folder for the .gguf file to lie in, but is {output}: give {folder}")
    if settings.format == "gguf" and importlib.util.find_spec("gguf") is None:
        raise SettingsError("`format` = gguf needs the package gguf: pip install -e '.[gguf]'")
    {"hf": _export_folder, "adapter": _export_adapter, "gguf": _export_gguf}[settings.format](settings, output)
    print_row("exported", f"{output}, read back and compared")


def _export_folder(settings: ExportSettings, output: Path) -> None:
    loaded = _chat_model(settings.model)
    dtype = getattr(torch, settings.dtype or "float32")
    write_folder(output, loaded.weights(), loaded.gpt2.config, loaded.tokenizer, dtype)


def _export_gguf(settings: ExportSettings, output: Path) -> None:
    loaded = _chat_model(settings.model)
    tokenizer, config, dtype = loaded.tokenizer, loaded.gpt2.config, getattr(torch, settings.dtype or "float16")
    file = f"{output.name}-{SHORT_NAMES[dtype]}.gguf"
    with complete_folder(output) as temporary:
        write_gguf(temporary / file, loaded.weights(), config, gguf_tokenizer(tokenizer), dtype)
        modelfile = MODELFILE.format(file=file, template=OLLAMA_TEMPLATE, stop=END, context=config.n_positions)
        write_text(temporary / "Modelfile", modelfile)


def gguf_tokenizer(tokenizer: ChatTokenizer) -> GGUFTokenizer:
    """A tokenizer, with the chat template, as a GGUF file holds it.

    Raises:
        ModelError: if it holds a word with a flag that the file cannot keep.
    """
    for name, word in tokenizer.vocabulary.words.items():
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if getattr(word, flag)]
        if flags:
            raise ModelError(
                f"the added word {name!r} must not be flagged `{flags[0]}` to be exported as GGUF, which cannot say "
                "so; export --format hf"
            )
    return GGUFTokenizer(
        names=tokenizer.vocabulary.names(),
        merges=tokenizer.vocabulary.merges(),
        control_ids=tokenizer.control_ids,
        word_ids=frozenset(word.id for word in tokenizer.vocabulary.words.values()),
        end_id=tokenizer.end_id,
        end_of_text_id=tokenizer.end_of_text_id,
        chat_template=CHAT_TEMPLATE,
    )


def _export_adapter(settings: ExportSettings, output: Path) -> None:
    """Write the adapter of a checkpoint or a copy of a finished run's, compared with the merged model either way."""
    folder = Path(settings.model or newest_run())
    if (folder / "state.json").is_file():
        adapted, run_settings = load_adapted(folder)
        if is_adapted(adapted.gpt2):
            base = run_settings.model.path
            if is_adapter(base):
                raise ModelError(f"{folder} stands on the adapter {base}: export the finished run, or use --format hf")
            write_adapter_folder(output, adapted, run_settings, merged_weights(adapted.gpt2), base)
            return
    elif is_adapter(folder):
        raise ModelError(f"{folder} is an adapter already: copy the folder")
    else:
        loaded, _ = find_model(str(folder))
        if is_adapter(folder / "adapter"):
            run_settings = read_run_settings(folder)
            with complete_folder(output) as temporary:
                shutil.copytree(folder / "adapter", temporary, dirs_exist_ok=True)
                _check_adapter(temporary, run_settings, loaded.weights())
            return
    raise ModelError(
        f"`format` = adapter needs a LoRA run or one of its checkpoints, but {folder} has no adapter: use --format hf"
    )


def _chat_model(model: str | None) -> LoadedModel:
    """Return the model to export, adapters merged.

    Raises:
        ModelError: if it cannot be had, or knows no chat tokens: their rows would be noise.
    """
    loaded, _ = find_model(model)
    if not loaded.tokenizer.has_chat_tokens:
        raise ModelError(f"only chat models can be exported, but {loaded.source} was never trained with chat tokens")
    return loaded


def write_adapter_folder(
    folder: Path, adapted: LoadedModel, settings: RunSettings, merged: Mapping[str, Tensor], base: str
) -> None:
    """Write a complete adapter folder in the layout of PEFT, with the tokenizer, or none.

    Args:
        settings: of the run that trained the adapters.
        merged: the weights that the adapter must make of its base.
        base: the whole model that it stands on: what `model.path` names, or a folder with the same weights.

    Raises:
        OSError: if it could not be written, or does not.
    """
    published = PUBLISHED_MODELS.get(base) if not Path(base).is_dir() else None
    on_hub = None if Path(base).exists() else hub_model(base)
    if published:
        place = published.repository
    elif on_hub:
        place = f"{on_hub.repository}@{commit_of(on_hub.repository, on_hub.revision, 'model')}"
    else:
        place = str(find_folder(base).resolve())
    with complete_folder(folder) as temporary:
        save_tokenizer(adapted.tokenizer, temporary, adapted.gpt2.config.n_positions)
        write_adapter(temporary, adapted.gpt2, settings.lora, place)
        _check_adapter(temporary, settings, merged)


def _check_adapter(folder: Path, settings: RunSettings, merged: Mapping[str, Tensor]) -> None:
    """Read an adapter folder back: on the base of its run it must make the merged weights.

    Raises:
        OSError: if it does not.
    """
    base = load_model(settings.model, settings.training.seed)
    for name, weight in merge_adapter(folder, base.weights()).items():
        if not torch.allclose(weight, merged[name], atol=1e-5, rtol=1e-4):
            raise OSError(f"the adapter does not make of {settings.model.path} what was trained: `{name}` differs")


def write_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: GPT2Config,
    tokenizer: ChatTokenizer,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a complete model folder, or none.

    Raises:
        ModelError: if a weight is too large for `dtype`.
        OSError: if it could not be written, or is not what was written when read back.
    """
    eos, pad = tokenizer.end_id, tokenizer.end_of_text_id
    token_ids = {"bos_token_id": pad, "eos_token_id": eos, "pad_token_id": pad}
    with complete_folder(folder) as temporary:
        save_tokenizer(tokenizer, temporary, config.n_positions)
        generation = token_ids | {"eos_token_id": [eos, pad], "do_sample": False}
        write_json(temporary / "generation_config.json", generation)
        write_model(temporary, weights, replace(config, vocab_size=len(tokenizer)), token_ids, dtype)
        if ChatTokenizer.from_folder(temporary).digest != tokenizer.digest:
            raise OSError(f"{folder} is not kept: its tokenizer is another when read back")
