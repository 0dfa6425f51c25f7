"""What every run puts together from the same parts: model and tokenizer, data and plan, folder and manifest."""

import importlib.metadata
import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gpt2ft import quickstart
from gpt2ft.data.plan import Row
from gpt2ft.data.sources import DataError, Filters
from gpt2ft.data.store import TokenStore, cache_root, open_store
from gpt2ft.model import pretrained
from gpt2ft.model.gpt2 import GPT2, GPT2Config
from gpt2ft.random import generator, seed_for
from gpt2ft.settings import DataSettings, ModelSettings, SettingsError, SFTSettings, read_yaml
from gpt2ft.text.tokenizer import ChatTokenizer
from gpt2ft.training import checkpoint


@dataclass(frozen=True)
class Policy:
    """A model that can be talked to: weights, and the tokenizer whose ids they know."""

    gpt2: GPT2
    tokenizer: ChatTokenizer
    source: str  # what the weights came from, for people
    digest: str  # of the weights

    def weights(self) -> dict[str, Tensor]:
        return dict(self.gpt2.named_parameters())


def load_policy(settings: ModelSettings, seed: int) -> Policy:
    """The model that `model.path` names, its table extended by the chat tokens if it does not know them yet.

    Raises:
        ModelError, ConnectionError: if it cannot be had.
    """
    random = torch.Generator().manual_seed(seed_for(seed, "weights"))
    config, tokenizer, folder = _shape_and_tokenizer(settings)
    config = replace(config, dropout=settings.dropout, attention_dropout=settings.attention_dropout)
    padded = replace(config, vocab_size=tokenizer.padded_size)
    gpt2 = GPT2(padded)
    if folder is None:
        gpt2.initialize(random)
        with torch.no_grad():
            gpt2.wte.weight[len(tokenizer) :] = 0
        source = f"random weights (seed {seed}) in the shape of {settings.path}"
    else:
        weights = pretrained.read_weights(folder, config)
        copies = {tokenizer.end_id: tokenizer.end_of_text_id}
        known = weights["wte.weight"][: tokenizer.num_known]
        weights["wte.weight"] = pretrained.extend_vocabulary(
            known, len(tokenizer), tokenizer.padded_size, copies, random
        )
        gpt2.load_state_dict(weights)
        source = str(settings.path)
    return Policy(gpt2, tokenizer, source, pretrained.weights_digest(dict(gpt2.named_parameters())))


def _shape_and_tokenizer(settings: ModelSettings) -> tuple[GPT2Config, ChatTokenizer, Path | None]:
    """The folder is None where the weights are to be random."""
    published = pretrained.HUB_MODELS.get(settings.path)
    if published and not Path(settings.path).is_dir():
        if settings.random_init:
            return published.config(), ChatTokenizer.gpt2(), None
        folder = pretrained.download(settings.path)
    else:
        folder = quickstart.MODEL if settings.path == "quickstart" else pretrained.find_folder(settings.path)
    try:
        tokenizer = ChatTokenizer.from_folder(folder)
    except ValueError as error:
        raise pretrained.ModelError(str(error)) from error
    config = pretrained.read_config(folder)
    if tokenizer.num_known > config.vocab_size:
        raise pretrained.ModelError(
            f"{folder}: the tokenizer has {tokenizer.num_known} ids, but the model's table {config.vocab_size} rows"
        )
    return config, tokenizer, None if settings.random_init else folder


def load_trained(path: str | None) -> tuple[Policy, Path | None]:
    """The model of a run, a model folder, a checkpoint or a published name; by default of the newest finished run.

    Returns:
        The model, and the folder that `path` stands for (None for a published name).
    """
    if path is None:
        finished = sorted(Path("runs").glob("*/model/config.json"), key=lambda file: file.stat().st_mtime)
        if not finished:
            raise pretrained.ModelError("there is no finished run in runs/: name a model, or train one first")
        path = str(finished[-1].parent.parent)
    folder = Path(path)
    if (folder / "state.json").is_file():
        return _load_checkpoint(folder), folder
    return load_policy(ModelSettings(path=path), seed=0), folder if folder.is_dir() else None


def _load_checkpoint(folder: Path) -> Policy:
    """Shape and tokenizer are those of the run's recipe, the weights the checkpoint's."""
    checkpoint.verify(folder)
    recipe = folder.parent.parent / "recipe.yaml"
    settings = ModelSettings(**read_yaml(SFTSettings, recipe)["model"])
    config, tokenizer, _ = _shape_and_tokenizer(settings)
    gpt2 = GPT2(replace(config, vocab_size=tokenizer.padded_size))
    gpt2.load_state_dict(checkpoint.read_weights(folder))
    return Policy(gpt2, tokenizer, str(folder), pretrained.weights_digest(dict(gpt2.named_parameters())))


@dataclass(frozen=True)
class Corpus:
    """Tokenised sources and which of their trees are used."""

    stores: list[TokenStore]
    rows: list[Row]
    dropped: Counter[str]  # trees left out here, by reason

    def identity(self) -> dict[str, str | int]:
        """What tells this corpus from another."""
        return {store.source: store.digest for store in self.stores} | {"conversations": len(self.rows)}


def load_corpora(settings: DataSettings, tokenizer: ChatTokenizer) -> tuple[Corpus, Corpus | None]:
    """The training and the held-out conversations, by whole trees, none in both.

    A conversation met twice counts once; one that is held out is dropped from training.
    """
    held_out = None
    if settings.eval:
        stores = open_stores(settings.eval, settings, tokenizer)
        held_out = Corpus(stores, *_unique(stores, seen=set(), reason="conversations met before"))
    seen = {held_out.stores[store].key(row) for store, row in held_out.rows} if held_out else set()
    stores = open_stores(settings.train, settings, tokenizer)
    reason = "conversations met before" + (" or held out" if held_out else "")
    rows, dropped = _unique(stores, seen, reason)
    if settings.eval_fraction:
        chosen = {row: _is_held_out(stores[row[0]].key(row[1])[0], settings.eval_fraction) for row in rows}
        held_out = Corpus(stores, [row for row in rows if chosen[row]], Counter())
        rows = [row for row in rows if not chosen[row]]
        if not held_out.rows:
            raise SettingsError(f"`data.eval_fraction` = {settings.eval_fraction} holds no conversation out: raise it")
    if not rows:
        raise DataError("no conversation is left to train on: all of them are held out")
    return Corpus(stores, rows, dropped), held_out


def open_stores(sources: Sequence[str], settings: DataSettings, tokenizer: ChatTokenizer) -> list[TokenStore]:
    filters = Filters(settings.languages, settings.max_rank, settings.reviewed_only, settings.on_error)
    return [open_store(source, filters, tokenizer, cache_root(settings.cache)) for source in sources]


def _unique(stores: Sequence[TokenStore], seen: set, reason: str) -> tuple[list[Row], Counter[str]]:
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for number, store in enumerate(stores):
        for row in range(len(store)):
            key = store.key(row)
            if key in seen:
                dropped[reason] += 1
            else:
                seen.add(key)
                rows.append((number, row))
    return rows, dropped


def _is_held_out(tree_id: str, fraction: float) -> bool:
    """The same answer for a tree in every run and every file."""
    return generator(0, f"held out {tree_id}").random() < fraction


def versions() -> dict[str, str]:
    names = ["gpt2ft", "torch", "accelerate", "tiktoken", "datasets", "safetensors"]
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version()} | found


def command() -> str:
    return " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
