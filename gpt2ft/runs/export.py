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

from gpt2ft import checkpoint
from gpt2ft.errors import SettingsError
from gpt2ft.files import complete_folder, write_json, write_text
from gpt2ft.hub import commit_of, hub_model, push, push_target
from gpt2ft.model.gguf import SHORT_NAMES, GGUFTokenizer, write_gguf
from gpt2ft.model.gpt2 import GPT2Config
from gpt2ft.model.lora import is_adapted, merged_weights
from gpt2ft.model.peft import merge_adapter, read_base, write_adapter
from gpt2ft.model.pretrained import ModelError, find_folder, write_model
from gpt2ft.runs.loaded_model import (
    LoadedModel,
    find_model,
    home_of,
    is_adapter,
    load_adapted,
    load_model,
    newest_run,
    read_run_settings,
)
from gpt2ft.runs.model_card import NAME as CARD
from gpt2ft.runs.model_card import Card, Layout, read_facts, write_card
from gpt2ft.settings.choices import PUBLISHED_MODELS
from gpt2ft.settings.scripts import RunSettings
from gpt2ft.settings.using import ExportSettings
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
    repository = None if settings.push is None else push_target(settings.push, settings.public)
    model = settings.model or newest_run()
    if repository and settings.format == "adapter":
        _check_base_is_on_hub(Path(model))
    {"hf": _export_folder, "adapter": _export_adapter, "gguf": _export_gguf}[settings.format](model, settings, output)
    print_row("exported", f"{output}, read back and compared")
    if repository:
        print_row("pushed", push(output, repository, settings.public))


def _check_base_is_on_hub(model: Path) -> None:
    """Raise SettingsError where the adapter of a run, or of its checkpoint, stands on a folder of this machine."""
    home = home_of(model)
    if home is None:
        return
    adapter = home / "adapter"
    base = read_base(adapter) if is_adapter(adapter) else read_run_settings(home).model.path
    if Path(base).exists() or not (base in PUBLISHED_MODELS or hub_model(base)):
        raise SettingsError(
            f"`push` needs an adapter whose base others can have, but that of {home} stands on {base}, which is on "
            "this machine alone: push the whole model with --format hf"
        )


def _export_folder(model: str, settings: ExportSettings, output: Path) -> None:
    loaded = _chat_model(model)
    dtype = getattr(torch, settings.dtype or "float32")
    write_folder(output, loaded.weights(), loaded.gpt2.config, loaded.tokenizer, dtype, _card(model, loaded, "hf"))


def _card(model: str, loaded: LoadedModel, layout: Layout) -> str:
    """Return the card of a model that a run has trained: its own, if it is for this layout; empty for any other."""
    home = home_of(folder := Path(model))
    facts = home and read_facts(home)
    place = folder.relative_to(home).parts[:1] if facts else ("start",)
    if place not in ((), ("model",), ("best",), ("adapter",), ("checkpoints",)):
        return ""
    written = (home / "model" if folder == home else folder) / CARD
    if layout == "hf" and place != ("adapter",) and written.is_file():
        return written.read_text(encoding="utf-8")
    if place == ("checkpoints",):
        step = checkpoint.read_state(folder)[0].step
    else:
        step = facts["finished"]["best_step" if place == ("best",) else "step"]
    shape = replace(loaded.gpt2.config, vocab_size=len(loaded.tokenizer))
    return Card(facts, home / "metrics.jsonl", shape, step).text(layout)


def _export_gguf(model: str, settings: ExportSettings, output: Path) -> None:
    loaded = _chat_model(model)
    tokenizer, config, dtype = loaded.tokenizer, loaded.gpt2.config, getattr(torch, settings.dtype or "float16")
    file = f"{output.name}-{SHORT_NAMES[dtype]}.gguf"
    with complete_folder(output) as temporary:
        write_gguf(temporary / file, loaded.weights(), config, gguf_tokenizer(tokenizer), dtype)
        modelfile = MODELFILE.format(file=file, template=OLLAMA_TEMPLATE, stop=END, context=config.n_positions)
        write_text(temporary / "Modelfile", modelfile)
        write_card(temporary, _card(model, loaded, "gguf"))


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


def _export_adapter(model: str, settings: ExportSettings, output: Path) -> None:
    """Write the adapter of a checkpoint or a copy of a finished run's, compared with the merged model either way."""
    folder = Path(model)
    if (folder / "state.json").is_file():
        adapted, run_settings = load_adapted(folder)
        if is_adapted(adapted.gpt2):
            base = run_settings.model.path
            if is_adapter(base):
                raise ModelError(f"{folder} stands on the adapter {base}: export the finished run, or use --format hf")
            card = _card(model, adapted, "adapter")
            write_adapter_folder(output, adapted, run_settings, merged_weights(adapted.gpt2), base, card)
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


def _chat_model(model: str) -> LoadedModel:
    """Return the model to export, adapters merged.

    Raises:
        ModelError: if it cannot be had, or knows no chat tokens: their rows would be noise.
    """
    loaded, _ = find_model(model)
    if not loaded.tokenizer.has_chat_tokens:
        raise ModelError(f"only chat models can be exported, but {loaded.source} was never trained with chat tokens")
    return loaded


def write_adapter_folder(
    folder: Path, adapted: LoadedModel, settings: RunSettings, merged: Mapping[str, Tensor], base: str, card: str = ""
) -> None:
    """Write a complete adapter folder in the layout of PEFT, with the tokenizer, or none.

    Args:
        settings: of the run that trained the adapters.
        merged: the weights that the adapter must make of its base.
        base: the whole model that it stands on: what `model.path` names, or a folder with the same weights.
        card: README.md; none is written where it is empty.

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
        write_adapter(temporary, adapted.gpt2, settings.lora, place, len(adapted.tokenizer))
        write_card(temporary, card)
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
    card: str = "",
) -> None:
    """Write a complete model folder, or none; `card` is its README.md, which is left out where it is empty.

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
        write_card(temporary, card)
        if ChatTokenizer.from_folder(temporary).digest != tokenizer.digest:
            raise OSError(f"{folder} is not kept: its tokenizer is another when read back")
