"""Adapters in the layout of PEFT, which loads them onto the base model with nothing of ours installed.

    adapter_config.json          rank, alpha and targets
    adapter_model.safetensors    lora_A [r, in] and lora_B [out, r] for each matrix, and the trained rows of the table

PEFT knows one adapter for a matrix. So q, k and v become one of three times the rank: their A below each other, their
B along a diagonal of blocks, and alpha so much larger that the scaling stays what it was.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpt2ft.files import read_json, write_json, write_safetensors
from gpt2ft.hub import hub_model
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.model.lora import AdaptedProjection, adapted_projections, columns_of, scaling_of
from gpt2ft.model.pretrained import ModelError
from gpt2ft.settings.choices import LORA_TARGETS
from gpt2ft.settings.sections import LoRASettings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.transformer."
ROWS = f"{PREFIX}wte.token_adapter.trainable_tokens_delta"  # not a difference: the rows themselves
# Where the table was resized PEFT writes it whole as well, and everything of it once more for the tied head.
TABLES = (f"{PREFIX}wte.weight", f"{PREFIX}wte.token_adapter.base_layer.weight")
HEADS = {name.replace("transformer.wte", "lm_head"): name for name in (ROWS, *TABLES)}
_MODULES = "|".join(re.escape(module) for module in sorted({target.module for target in LORA_TARGETS.values()}))
_LORA = re.compile(re.escape(PREFIX) + rf"(h\.\d+\.(?:{_MODULES}))\.lora_(A|B)\.weight")


def write_adapter(folder: Path, gpt2: GPT2, settings: LoRASettings, base: str) -> None:
    """Write the adapters and rows of an adapted model, and read them back.

    Args:
        base: where PEFT finds the model that they stand on; on the hub with its revision, as OWNER/NAME@REVISION.

    Raises:
        OSError: if names or shapes are not the same when read back.
    """
    tensors, ranks = {ROWS: gpt2.wte.rows.detach()}, {}
    for name, module in adapted_projections(gpt2):
        A, B = _stacked(module)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
        ranks[".".join(name.split(".")[2:])] = len(A)
    write_safetensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, _peft_config(settings, ranks, gpt2.wte.row_ids.tolist(), base))
    found = {name: tensor.shape for name, tensor in load_file(folder / WEIGHTS).items()}
    if found != {name: tensor.shape for name, tensor in tensors.items()}:
        raise OSError(f"{folder / WEIGHTS} does not hold what was written to it")


def _stacked(module: AdaptedProjection) -> tuple[Tensor, Tensor]:
    """Return A [R, in] and B [out, R] of one adapter that computes the same as all adapters of a matrix."""
    A = torch.cat([adapter.A.detach() for adapter in module.adapters.values()])
    B = A.new_zeros(module.weight.shape[1], len(A))
    at = 0
    for target, adapter in module.adapters.items():
        rank = adapter.B.shape[1]
        B[columns_of(target, len(B)), at : at + rank] = adapter.B.detach()
        at += rank
    return A, B


def _peft_config(settings: LoRASettings, ranks: Mapping[str, int], row_ids: list[int], base: str) -> dict[str, Any]:
    def alpha(rank: int) -> float:
        return scaling_of(settings) * (math.sqrt(rank) if settings.rslora else rank)

    on_hub = hub_model(base)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": on_hub.repository if on_hub else base,
        **({"revision": on_hub.revision} if on_hub and on_hub.revision else {}),
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != settings.rank},
        "alpha_pattern": {module: alpha(rank) for module, rank in ranks.items() if rank != settings.rank},
        "lora_dropout": settings.dropout,
        "target_modules": sorted(ranks),
        "trainable_token_indices": row_ids,
        "fan_in_fan_out": True,  # GPT-2 stores its matrices [in, out]
        "use_rslora": settings.rslora,
        "bias": "none",
        "inference_mode": True,
    }


# --- reading --------------------------------------------------------------------------------------------------------


def read_base(folder: Path) -> str:
    """Return the name or path of the model that an adapter belongs to, from its config.

    Raises:
        ModelError: if it is no LoRA adapter for a GPT-2 that can be read here.
    """
    config = _read_config(folder)
    base, revision = (config.get(key) for key in ("base_model_name_or_path", "revision"))
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder / CONFIG}: `base_model_name_or_path` must name a model, but is {base!r}")
    return f"{base}@{revision}" if revision and hub_model(base) else base


def merge_adapter(folder: Path, weights: Mapping[str, Tensor], num_ids: int | None = None) -> dict[str, Tensor]:
    """Return the base's weights, by this package's names, with an adapter of ours or of PEFT's added, in float32.

    Args:
        num_ids: ids that the adapter's own tokenizer names, if it has one. The table grows to them, by rows of the
            adapter; what it holds beyond them is padding.

    Raises:
        ModelError: if it does not fit the base, or holds a tensor that has no place in it.
    """
    config = _read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS} is not a readable safetensors file ({error})") from error
    merged = dict(weights)
    table = _grown(folder, merged["wte.weight"].float(), tensors, num_ids)
    merged["wte.weight"] = _merged_table(folder, table, tensors, config.get("trainable_token_indices"))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in (ROWS, *TABLES, *HEADS)}
    unknown = [name for name in tensors if not _LORA.fullmatch(name)]
    if unknown:
        raise ModelError(f"{folder / WEIGHTS}: `{unknown[0]}` is nothing that an adapter of GPT-2 can have here")
    for module, A, B in _adapters(folder, tensors):
        if f"{module}.weight" not in merged:
            raise ModelError(f"{folder / WEIGHTS}: the base has no {module}: the adapter is for another model")
        weight = merged[f"{module}.weight"].float()
        if (A.shape[1], B.shape[0]) != tuple(weight.shape) or A.shape[0] != B.shape[1]:
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise ModelError(f"{folder / WEIGHTS}: the adapter of {module} has shapes {shapes}, which do not fit it")
        rank, scaling = _rank_and_scaling(config, module)
        if rank != len(A):
            raise ModelError(f"{folder}: the rank of {module} must be {rank}, as its config says, but is {len(A)}")
        merged[f"{module}.weight"] = weight + scaling * (B.float() @ A.float()).t()
    for name, tensor in merged.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{folder}: the adapter makes `{name}` hold values that are not finite")
    return merged


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError(str(error)) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f"{file}: `peft_type` must be LORA, but is not")
    off = (
        "use_dora", "lora_bias", "modules_to_save", "use_qalora", "alora_invocation_tokens", "megatron_config",
        "layer_replication", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
    )  # fmt: skip
    for key in off:
        if config.get(key):
            raise ModelError(f"{file}: `{key}` must be off, as it is not supported here, but is {config[key]!r}")
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "eva", "orthogonal"):
        raise ModelError(
            f"{file}: `init_lora_weights` must leave the base as it is, but is {config['init_lora_weights']!r}: "
            "convert the adapter to plain LoRA with PEFT first"
        )
    if type(config.get("r")) is not int:
        raise ModelError(f"{file}: `r` must be a whole number, but is {config.get('r')!r}")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{file}: `bias` must be none, as biases are not adapted here, but is {config['bias']!r}")
    return config


def _adapters(folder: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (module, A, B) for each adapted matrix."""
    modules = sorted({_LORA.fullmatch(name)[1] for name in tensors})  # type: ignore[index]
    for module in modules:
        names = [f"{PREFIX}{module}.lora_{letter}.weight" for letter in "AB"]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ModelError(f"{folder / WEIGHTS} lacks `{missing[0]}`")
        yield module, tensors[names[0]], tensors[names[1]]


def _rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Look up rank and scaling as PEFT does: patterns match the end of a module's name."""

    def of(pattern_key: str, default: float) -> float:
        for pattern, value in (config.get(pattern_key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", f"transformer.{module}"):
                return value
        return default

    rank, alpha = of("rank_pattern", config["r"]), of("alpha_pattern", config.get("lora_alpha", 8))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _grown(folder: Path, table: Tensor, tensors: Mapping[str, Tensor], num_ids: int | None) -> Tensor:
    """Return a table of at least `num_ids` rows, those that the base lacks not a number until the adapter fills them.

    Raises:
        ModelError: if the adapter has rows that no tokenizer names.
    """
    largest = max((len(tensors[name]) for name in TABLES if name in tensors), default=0)
    if num_ids is None and largest > len(table):
        raise ModelError(
            f"{folder / WEIGHTS}: its table must not have more rows than its base, {len(table)}, but has {largest}, "
            "and no tokenizer beside it says what they mean: put the tokenizer it was trained with into the folder"
        )
    missing = max((num_ids or 0) - len(table), 0)
    return torch.cat([table, table.new_full((missing, table.shape[1]), torch.nan)])


def _merged_table(folder: Path, table: Tensor, tensors: Mapping[str, Tensor], row_ids: Any) -> Tensor:
    """Return the table, grown from the base's, with the rows that the adapter holds: all, some, or none."""
    for head, name in HEADS.items():
        if head in tensors and not (name in tensors and torch.equal(tensors[head], tensors[name])):
            raise ModelError(f"{folder / WEIGHTS}: `{head}` must equal `{name}` (GPT-2's head is tied), but differs")
    for name in TABLES:
        if name in tensors:
            whole = tensors[name][: len(table)]
            if whole.shape[1:] != table.shape[1:]:
                raise ModelError(f"{folder / WEIGHTS}: `{name}` {tuple(whole.shape)} does not fit the base")
            table[: len(whole)] = whole.float()
    if ROWS in tensors:
        rows, ids = tensors[ROWS], row_ids["wte"] if isinstance(row_ids, dict) and "wte" in row_ids else row_ids
        fits = isinstance(ids, list) and all(type(id) is int and 0 <= id < len(table) for id in ids)
        if not fits or rows.shape != (len(ids), table.shape[1]):
            raise ModelError(
                f"{folder}: `trainable_token_indices` and the rows {tuple(rows.shape)} do not fit the base"
            )
        table[ids] = rows.float()
    without = table.isnan().all(1).nonzero()[:, 0].tolist()
    if without:
        raise ModelError(
            f"{folder}: the adapter must hold a row of the table for each token that its tokenizer adds, but lacks the "
            f"one of id {without[0]}"
        )
    return table
