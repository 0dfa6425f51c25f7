"""A model with its tokenizer, from wherever it lies: a published name, a folder, an adapter, a run or a checkpoint.

Serving and exporting need this and nothing of data or training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2ft.hub import hub_model
from gpt2ft.model import pretrained
from gpt2ft.model.attention import dense_attention
from gpt2ft.model.gpt2 import GPT2, GPT2Config
from gpt2ft.model.lora import apply_lora, is_adapted, load_trainable_parameters, merged_weights
from gpt2ft.random import seed_for
from gpt2ft.settings.choices import PUBLISHED_MODELS
from gpt2ft.settings.sections import LoRASettings, ModelSettings
from gpt2ft.text.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from gpt2ft.settings.scripts import RunSettings

RECIPE = "recipe.yaml"  # of a run, in its folder
MODEL = "model/config.json"  # there too, once it is finished


@dataclass(frozen=True)
class LoadedModel:
    """A model and the tokenizer whose ids it knows."""

    gpt2: GPT2
    tokenizer: ChatTokenizer
    source: str  # origin of the weights, for people
    digest: str  # of the weights

    def weights(self) -> dict[str, Tensor]:
        return dict(self.gpt2.named_parameters())


def load_model(settings: ModelSettings, seed: int) -> LoadedModel:
    """Return the model that `model.path` names, its table extended by the chat tokens if it does not know them yet.

    Raises:
        ModelError, NetworkError: if it cannot be had.
    """
    stored = _read_adapter(settings) if is_adapter(settings.path) else _read_model(settings)
    random = torch.Generator().manual_seed(seed_for(seed, "weights"))
    tokenizer = stored.tokenizer
    gpt2 = GPT2(replace(stored.config, vocab_size=tokenizer.padded_size, dropout=settings.dropout))
    if stored.weights is None:
        gpt2.initialize(random)
        with torch.no_grad():
            gpt2.wte.weight[len(tokenizer) :] = 0
        source = f"random weights (seed {seed}) in the shape of {settings.path}"
    else:
        gpt2.load_state_dict(stored.weights | {"wte.weight": _extended_table(stored, random)})
        source = str(settings.path)
    return LoadedModel(gpt2, tokenizer, source, pretrained.weights_digest(dict(gpt2.named_parameters())))


def _extended_table(stored: "_StoredModel", random: torch.Generator) -> Tensor:
    """Return the table with rows for the tokens that were missing. Those that end a turn or a text start from the row
    of what ends a text there."""
    tokenizer = stored.tokenizer
    num_known = len(tokenizer.known)
    end = tokenizer.end_of_text_id if tokenizer.end_of_text_id < num_known else stored.eos_token_id
    is_control = end in tokenizer.known.control_ids.values()
    copies = dict.fromkeys((tokenizer.end_id, tokenizer.end_of_text_id), end) if is_control else {}
    known = stored.weights["wte.weight"][:num_known]
    return pretrained.extend_vocabulary(known, len(tokenizer), tokenizer.padded_size, copies, random)


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / pretrained.ADAPTER_CONFIG).is_file()


@dataclass(frozen=True)
class _StoredModel:
    """A model as its folder holds it, its table not yet extended.

    Attributes:
        weights: None where they are to be random.
        eos_token_id: the id that ends a text there, by its config.
    """

    config: GPT2Config
    tokenizer: ChatTokenizer
    weights: dict[str, Tensor] | None
    eos_token_id: int | None = None


def _read_adapter(settings: ModelSettings) -> _StoredModel:
    """Return the base of an adapter with the adapter merged into it.

    The tokenizer is that of the two that names more ids.
    """
    from gpt2ft.model import peft

    folder = Path(settings.path)
    if settings.random_init:
        raise pretrained.ModelError(f"{folder} is an adapter, which has no shape of its own: name its base instead")
    path = peft.read_base(folder)
    base_settings = settings.model_copy(update={"path": path})
    base = _read_adapter(base_settings) if is_adapter(base_settings.path) else _read_model(base_settings)
    tokenizer, num_ids = base.tokenizer, None
    if any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        own = _read_tokenizer(folder)
        num_ids = len(own.known)
        if own.known.extends(tokenizer.known):
            tokenizer = own
        elif not tokenizer.known.extends(own.known):
            raise pretrained.ModelError(
                f"{folder} comes with another tokenizer than its base {path}: the ids that both know must mean the same"
            )
    return replace(base, tokenizer=tokenizer, weights=peft.merge_adapter(folder, base.weights, num_ids))


def adapt(loaded: LoadedModel, settings: LoRASettings, seed: int) -> LoadedModel:
    """Return the model with fresh adapters; it trains them and the rows of the chat tokens alone."""
    tokenizer = loaded.tokenizer
    rows = [*tokenizer.role_ids.values(), tokenizer.end_id]
    if tokenizer.end_of_text_id >= len(tokenizer.known):  # the base has no row for it that an adapter could rely on
        rows.append(tokenizer.end_of_text_id)
    apply_lora(loaded.gpt2, settings, rows, torch.Generator().manual_seed(seed_for(seed, "adapters")))
    return loaded


def _read_tokenizer(folder: Path) -> ChatTokenizer:
    try:
        return ChatTokenizer.from_folder(folder)
    except ValueError as error:
        raise pretrained.ModelError(str(error)) from error


def _read_model(settings: ModelSettings) -> _StoredModel:
    names = {model.repository: name for name, model in PUBLISHED_MODELS.items()}
    path = names.get(settings.path, settings.path)
    on_hub = None if Path(path).exists() else hub_model(path)
    if path in PUBLISHED_MODELS and not Path(path).is_dir():
        if settings.random_init:
            return _StoredModel(pretrained.published_config(path), ChatTokenizer.gpt2(), weights=None)
        folder = pretrained.download(path)
    else:
        folder = pretrained.download_any(on_hub, not settings.random_init) if on_hub else pretrained.find_folder(path)
    config = pretrained.read_config(folder)
    tokenizer = _read_tokenizer(folder)
    if len(tokenizer.known) > config.vocab_size:
        raise pretrained.ModelError(
            f"{folder}: the tokenizer has {len(tokenizer.known)} ids, but the model's table {config.vocab_size} rows"
        )
    weights = None if settings.random_init else pretrained.read_weights(folder, config)
    return _StoredModel(config, tokenizer, weights, pretrained.read_eos_token_id(folder))


def find_model(path: str | None, random_init: bool = False, seed: int = 0) -> tuple[LoadedModel, Path | None]:
    """Return the model of a run, a folder, a checkpoint or a published name; by default of the newest finished run.

    Args:
        random_init: take the shape and the tokenizer only, and weights from `seed`.

    Returns:
        The model, and the folder that `path` stands for (None for a published name).
    """
    path = path or newest_run()
    folder = Path(path)
    if runs := finished_runs(folder):
        listed = ", ".join(map(str, reversed(runs)))
        raise pretrained.ModelError(f"{path} is a folder of runs: name one of them, the newest first: {listed}")
    if random_init:
        return load_model(ModelSettings(path=path, random_init=True), seed), None
    if (folder / "state.json").is_file():
        return _load_checkpoint(folder), folder
    return load_model(ModelSettings(path=path), seed=0), folder if folder.is_dir() else None


def newest_run() -> str:
    """Return the folder of the run in runs/ that finished last.

    Raises:
        ModelError: if there is none.
    """
    finished = finished_runs()
    if not finished:
        raise pretrained.ModelError("there is no finished run in runs/: name a model, or train one first")
    return str(finished[-1])


def finished_runs(folder: Path = Path("runs")) -> list[Path]:
    """Return the folders of the finished runs in a folder that is none itself, the newest last."""
    is_run = (folder / RECIPE).is_file()
    finished = () if is_run else sorted(folder.glob(f"*/{MODEL}"), key=lambda file: file.stat().st_mtime)
    return [file.parent.parent for file in finished]


def home_of(folder: Path | None) -> Path | None:
    """Return the folder of the run that a folder is, or a model or checkpoint of; None if of none."""
    homes = (folder, *folder.parents[:2]) if folder else ()
    return next((home for home in homes if (home / RECIPE).is_file()), None)


def _load_checkpoint(folder: Path) -> LoadedModel:
    """Return the model that the run starts from, with the checkpoint's trained weights."""
    adapted, _ = load_adapted(folder)
    return plain_model(adapted)


def load_adapted(folder: Path) -> tuple[LoadedModel, "RunSettings"]:
    """Return the model of a checkpoint as the run trains it, adapters not merged, and the settings of the run.

    Raises:
        CheckpointError, SettingsError, ModelError: if it is damaged or what it starts from is not what it was.
    """
    from gpt2ft import checkpoint  # by no one who loads a finished model

    checkpoint.verify(folder)
    settings = read_run_settings(folder.parent.parent)
    _, identity = checkpoint.read_state(folder)
    loaded = with_trained_weights(settings, checkpoint.read_weights(folder), identity.get("initial_weights"))
    return replace(loaded, source=str(folder), tokenizer=loaded.tokenizer.as_trained()), settings


def read_run_settings(folder: Path) -> "RunSettings":
    """Return the settings of the run in a folder.

    Raises:
        SettingsError: if there are none.
    """
    # A checkpoint needs them, a finished model does not.
    from gpt2ft.settings.recipes import read_recipe, read_sections
    from gpt2ft.settings.scripts import DPOSettings, SFTSettings

    recipe = folder / RECIPE
    kind = DPOSettings if "dpo" in read_sections(recipe) else SFTSettings
    return read_recipe(kind, recipe)


def with_trained_weights(
    settings: "RunSettings", trained: Mapping[str, Tensor], initial_digest: str | None
) -> LoadedModel:
    """Return the model that a run starts from, with adapters for LoRA, and with trained weights, all in float32.

    Args:
        initial_digest: of the weights that the run started from.

    Raises:
        ModelError: if the weights at `model.path` have changed, or the trained ones are of another run.
    """
    loaded = load_model(settings.model, settings.training.seed)
    if settings.lora.rank and loaded.digest != initial_digest:
        raise pretrained.ModelError(f"{settings.model.path} has changed since these adapters were trained on it")
    if settings.lora.rank:
        loaded = adapt(loaded, settings.lora, settings.training.seed)
    try:
        load_trainable_parameters(loaded.gpt2, trained)
    except ValueError as error:
        raise pretrained.ModelError(f"these weights do not belong to this run: {error}") from error
    return loaded


def plain_model(loaded: LoadedModel) -> LoadedModel:
    """Return the same model with its adapters merged, if it has any.

    Raises:
        ModelError: if the merged model does not compute the same as the adapted one.
    """
    adapted = loaded.gpt2
    if is_adapted(adapted):
        plain = GPT2(adapted.config)
        plain.load_state_dict(merged_weights(adapted))
        check_merged(plain, adapted, len(loaded.tokenizer))
        loaded = replace(loaded, gpt2=plain)
    return replace(loaded, digest=pretrained.weights_digest(loaded.weights()))


@torch.no_grad()
def check_merged(plain: GPT2, adapted: GPT2, vocabulary: int) -> None:
    """Raise ModelError unless both give the same log-probs to 64 ids from all over the vocabulary."""
    ids = torch.linspace(0, vocabulary - 1, min(64, adapted.config.n_positions)).long()
    positions = torch.arange(len(ids))
    found = []
    for gpt2 in (plain, adapted):
        gpt2.eval()
        hidden = gpt2(ids, positions, dense_attention(torch.full_like(ids, len(ids))))
        found.append(gpt2.logits(hidden)[:, :vocabulary].log_softmax(-1))
    worst = float((found[0] - found[1]).abs().max())
    if not worst < 1e-3:
        raise pretrained.ModelError(f"merging the adapters changes log-probs by {worst:.2g}, more than rounding does")
