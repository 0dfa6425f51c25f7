"""GPT-2's weights in and out: hub names and Hugging Face folders, safetensors only.

Nothing here executes anything it reads: safetensors and JSON, checked against the configuration before
they are used. Shape letters: V rows of the embedding table, E embedding width.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2ft import quickstart
from gpt2ft.errors import Gpt2ftError, NetworkError
from gpt2ft.files import read_json, write_json, write_safetensors
from gpt2ft.hub import HubName, commit_of, rely_on_cache_unless_reachable
from gpt2ft.model.gpt2 import GPT2Config, parameter_shapes
from gpt2ft.settings.choices import PUBLISHED_MODELS
from gpt2ft.wording import counted

HF_PREFIX = "transformer."  # of every parameter but the head, in files of transformers
HEAD = "lm_head.weight"
ADAPTER_CONFIG = "adapter_config.json"  # in folders of model/peft.py
_WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
_TOKENIZER_FILES = ("config.json", "vocab.json", "merges.txt", "tokenizer.json")
_TOKENIZER_FILES += ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")

# Names of one formula: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
# What config.json may call a size, where its own name is missing: of transformers, and of OpenAI's first files.
SIZES = {
    "vocab_size": (),
    "n_positions": ("max_position_embeddings", "n_ctx"),
    "n_embd": ("hidden_size",),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
}


class ModelError(Gpt2ftError):
    """A model folder that cannot be used; the message says why and what to do."""


def published_config(name: str) -> GPT2Config:
    """Return the shape of a published model, without downloading anything."""
    model = PUBLISHED_MODELS[name]
    return GPT2Config(vocab_size=50257, n_layer=model.n_layer, n_head=model.n_head, n_embd=model.n_embd)


def find_folder(path: str) -> Path:
    """Return the folder with `config.json` that `path` names: itself, the `model/` of a run, or the bundled model."""
    if path == "quickstart":
        return quickstart.MODEL
    folder = Path(path)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    if not folder.exists():
        raise ModelError(_no_model(folder))
    if folder.is_file():
        raise ModelError(f"{folder} is a file, but a model is a folder with config.json, a run or a published name")
    if (folder / "checkpoints").is_dir():
        raise ModelError(f"{folder} is a run that has not finished: run the same command again to finish it")
    if (folder / "state.json").is_file():
        command = f"python launch/export.py {folder} --format hf --output NAME"
        raise ModelError(f"{folder} is a checkpoint: `{command}` makes a model of it")
    raise ModelError(f"{folder} holds no config.json, so it is not a model folder")


def _no_model(folder: Path) -> str:
    """Say that there is no such model, and which is meant."""
    from gpt2ft.settings.suggestions import nearest_path

    names = ("quickstart", *PUBLISHED_MODELS)
    folders = [
        other for parent in (folder.parent, Path("runs")) for other in sorted(parent.glob("*")) if other.is_dir()
    ]
    meant = nearest_path(folder, [*names, *folders]) or " (a run must be trained first)"
    return (
        f"the model must be a folder or one of {', '.join(names)}, but '{folder}' is neither{meant}; any other GPT-2 "
        "on the hub is OWNER/NAME, with @REVISION where it is not the newest"
    )


def download(name: str) -> Path:
    """Return the local snapshot of a published model, downloaded at its pinned revision unless it is cached.

    Raises:
        ModelError: without a network and a cached copy.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    hub = PUBLISHED_MODELS[name]
    files = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
    cached = [try_to_load_from_cache(hub.repository, file, revision=hub.revision) for file in files]
    if all(isinstance(path, str) for path in cached):
        return Path(cached[0]).parent
    unreachable = rely_on_cache_unless_reachable()
    try:
        folder = Path(snapshot_download(hub.repository, revision=hub.revision, allow_patterns=files))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{name} is not in the cache and could not be downloaded ({unreachable or type(error).__name__}): put "
            f"{', '.join(files)} of huggingface.co/{hub.repository} into a folder and pass it as `model.path`, "
            "or train from random weights with `--model.random_init true`"
        ) from error
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ModelError(f"the cached copy of {name} in {folder} lacks {', '.join(missing)}: download it again")
    return folder


def download_any(name: HubName, with_weights: bool) -> Path:
    """Return the local snapshot of any GPT-2 on the hub; its weights are only downloaded once its config is read.

    Raises:
        ModelError, NetworkError: if it cannot be had, is no GPT-2, or has no weights in safetensors.
    """
    from huggingface_hub import snapshot_download

    commit, unreachable = commit_of(name.repository, name.revision, "model"), rely_on_cache_unless_reachable()
    files = _TOKENIZER_FILES + (_WEIGHT_FILES if with_weights else ())
    try:
        folder = Path(snapshot_download(name.repository, revision=commit, allow_patterns=["config.json"]))
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{name.repository}@{commit[:8]} holds no config.json, so it is no model but something else"
            )
        read_config(folder)
        folder = Path(snapshot_download(name.repository, revision=commit, allow_patterns=files))
    except (OSError, ValueError) as error:  # those of a network among them
        cause = unreachable or " ".join(str(error).split())
        raise NetworkError(f"{name.repository}@{commit[:8]} could not be downloaded: {cause}") from error
    if with_weights and not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{name.repository}@{commit[:8]} has no weights in safetensors, and a pickle (pytorch_model.bin) is never "
            "opened: see whether its Community tab has a pull request with some, and name that as "
            f"{name.repository}@refs/pr/NUMBER, or save it again with safe_serialization=True"
        )
    return folder


def read_config(folder: Path) -> GPT2Config:
    """Return the shape in a Hugging Face `config.json`.

    Raises:
        ModelError: if it is not a GPT-2 as this package computes it.
    """
    file = folder / "config.json"
    values = _read_object(file)
    of_gpt2 = all(str(name).startswith("GPT2") for name in values.get("architectures") or [""])
    expected = {
        "model_type": ("gpt2", None) if of_gpt2 else ("gpt2",),
        "activation_function": (*ACTIVATIONS, None),
        "scale_attn_weights": (True, None),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "add_cross_attention": (False, None),
        "tie_word_embeddings": (True, None),
    }
    for key, allowed in expected.items():
        if values.get(key) not in allowed:
            raise ModelError(f"{file}: `{key}` must be {allowed[0]!r}, but is {values.get(key)!r}")
    sizes = {name: _size(file, values, name) for name in SIZES}
    inner = 4 * sizes["n_embd"]
    if values.get("n_inner") not in (None, inner):
        raise ModelError(f"{file}: `n_inner` must be null or 4 `n_embd` = {inner}, but is {values['n_inner']!r}")
    epsilon = values.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) not in (int, float) or not epsilon > 0:
        raise ModelError(f"{file}: `layer_norm_epsilon` must be a positive number, but is {epsilon!r}")
    try:
        return GPT2Config(**sizes, layer_norm_epsilon=epsilon)
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from error


def _size(file: Path, values: Mapping[str, Any], name: str) -> int:
    """Return a size by its name or another that config.json gives it; GPT-2's own where it gives none."""
    found = [key for key in (name, *SIZES[name]) if key in values]
    size = values[found[0]] if found else getattr(published_config("gpt2"), name)
    if type(size) is not int or size < 1:
        raise ModelError(f"{file}: `{found[0]}` must be a positive whole number, but is {size!r}")
    for other in found:
        if values[other] != size and other != "n_ctx":  # which transformers does not read
            raise ModelError(f"{file}: `{other}` must be `{found[0]}` = {size}, but is {values[other]!r}")
    return size


def read_eos_token_id(folder: Path) -> int | None:
    """Return the id that ends a text, by `config.json`; the first where it names several."""
    ids = _read_object(folder / "config.json").get("eos_token_id")
    return next(iter(ids), None) if isinstance(ids, list) else ids


def _read_object(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError(str(error)) from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} must hold a JSON object, but holds a {type(values).__name__}")
    return values


def read_weights(folder: Path, config: GPT2Config) -> dict[str, Tensor]:
    """Return the parameters of a Hugging Face folder in float32, by this package's names.

    Accepts one file or shards, names with or without the `transformer.` prefix, and the constant
    attention buffers of old checkpoints.

    Raises:
        ModelError: on a missing, unknown, misshapen or non-finite tensor, or a head that is not the embedding.
    """
    shapes = parameter_shapes(config)
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        weights |= _read_tensors(file, shapes)
    head = weights.pop(HEAD, None)
    missing = sorted(shapes.keys() - weights.keys())
    if missing:
        raise ModelError(f"{folder} lacks {counted(len(missing), 'parameter')}, the first is `{missing[0]}`")
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{folder}: `{name}` holds values that are not finite")
    if head is not None and not torch.equal(head, weights["wte.weight"]):
        raise ModelError(f"{folder}: `{HEAD}` must equal `wte.weight` (GPT-2's head is tied), but differs")
    return weights


def _read_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The parameters in one file, and the head if it is there, in float32."""
    found = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a safetensors handle, not a dict)
                short = name.removeprefix(HF_PREFIX)
                if short.endswith((".attn.bias", ".attn.masked_bias")):
                    continue
                if short not in shapes and short != HEAD:
                    raise ModelError(f"{file}: `{name}` is not a parameter of this GPT-2")
                shape = tuple(tensors.get_slice(name).get_shape())
                if short != HEAD and shape != shapes[short]:
                    raise ModelError(f"{file}: `{name}` must have shape {shapes[short]}, but has {shape}")
                found[short] = tensors.get_tensor(name).float()
    except SafetensorError as error:
        raise ModelError(f"{file} is not a readable safetensors file ({error})") from error
    return found


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} must be JSON with a `weight_map`, but is not ({error!r})") from error
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ModelError(f"{index} names {name!r}, which is not a file of this folder")
        return [folder / name for name in names]
    hint = ""
    if (folder / "pytorch_model.bin").is_file():
        hint = ": pytorch_model.bin is a pickle and is never opened here, save it again with safe_serialization=True"
    raise ModelError(f"{folder} holds no model.safetensors{hint}")


def extend_vocabulary(
    table: Tensor, num_ids: int, num_rows: int, copies: Mapping[int, int], generator: torch.Generator
) -> Tensor:
    """Extend the embedding table [V, E] to [num_rows, E]: new ids up to `num_ids`, then padding rows of zero.

    A new row starts at the mean of the old ones: its logit is then about the average logit, so that the
    distribution over the old tokens hardly moves (Hewitt 2021, "Initializing New Word Embeddings for
    Pretrained Language Models"). A little noise, a tenth of the old rows' spread, tells the new rows apart.
    `copies` maps a new id to an old one whose row it starts from instead.
    """
    old = min(len(table), num_ids)
    extended = torch.zeros(num_rows, table.shape[1])
    extended[:old] = table[:old]
    if num_ids > old:
        known = table[:old]
        noise = torch.randn(num_ids - old, table.shape[1], generator=generator)
        extended[old:num_ids] = known.mean(0) + 0.1 * known.std(0) * noise
        for new, source in copies.items():
            if new >= old:
                extended[new] = table[source]
    return extended


def write_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: GPT2Config,
    token_ids: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `model.safetensors` and `config.json` as transformers, vLLM and llama.cpp read them, and read them back.

    The tied head is not written again.

    Args:
        config: its `vocab_size` counts the ids in use, without padding; the table is cropped to them.
        token_ids: holds `bos_token_id`, `eos_token_id` and `pad_token_id`.

    Raises:
        ModelError: if a weight is too large for `dtype`.
        OSError: if what is read back is not what was written.
    """
    cropped = dict(weights) | {"wte.weight": weights["wte.weight"][: config.vocab_size]}
    tensors = {name: cast_checked(name, tensor.detach().cpu(), dtype) for name, tensor in cropped.items()}
    write_safetensors(folder / "model.safetensors", {HF_PREFIX + name: tensor for name, tensor in tensors.items()})
    hugging_face = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "dtype": dtype_name(dtype),
        "embd_pdrop": config.dropout,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "n_ctx": config.n_positions,  # llama.cpp reads this one
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_inner": None,
        "n_layer": config.n_layer,
        "n_positions": config.n_positions,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    write_json(folder / "config.json", hugging_face | dict(token_ids))
    found = read_weights(folder, read_config(folder))
    wrong = [name for name, tensor in tensors.items() if not torch.equal(found[name], tensor.float())]
    if wrong:
        raise OSError(f"the model folder is not kept: `{wrong[0]}` is not what was written when read back")


def cast_checked(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in float32 or in half precision.

    Raises:
        ModelError: if it holds values that are too large for it.
    """
    converted = tensor.to(dtype)
    if dtype != torch.float32 and not converted.isfinite().all():
        raise ModelError(
            f"`{name}` must fit into {dtype_name(dtype)}, but holds {float(tensor.abs().max()):g}: "
            "export with --dtype float32 or bfloat16"
        )
    return converted


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, shapes and float32 values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().float().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()
