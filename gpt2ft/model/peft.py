"""Adapters in the layout of PEFT, which loads them onto the base model with nothing of ours installed.

    adapter_config.json          rank, alpha and targets
    adapter_model.safetensors    lora_A [r, in] and lora_B [out, r] for each matrix, with DoRA the norms of its columns
                                 (lora_magnitude_vector [out]), and the trained rows of the table, or all of it

PEFT knows one adapter for a matrix. So q, k and v become one of the sum of their ranks: their A below each other, their
B along a diagonal of blocks, and alpha so much larger that the scaling stays what it was. Where q, k and v differ in
scaling, the matrix has that of the first of them, and the B of the others are multiplied.
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
from gpt2ft.model.lora import AdaptedProjection, adapted_projections, columns_of
from gpt2ft.model.pretrained import ADAPTER_CONFIG, ModelError
from gpt2ft.settings.choices import LORA_TARGETS
from gpt2ft.settings.sections import LoRASettings

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model.transformer."
ROWS = f"{PREFIX}wte.token_adapter.trainable_tokens_delta"  # not a difference: the rows themselves
# Where the table was resized PEFT writes it whole as well, and everything of it once more for the tied head.
TABLES = (f"{PREFIX}wte.weight", f"{PREFIX}wte.token_adapter.base_layer.weight")
HEAD = "base_model.model.lm_head.weight"
HEADS = {name.replace("transformer.wte", "lm_head"): name for name in (ROWS, *TABLES)}
_MODULES = "|".join(re.escape(module) for module in sorted({target.module for target in LORA_TARGETS.values()}))
_LORA = re.compile(re.escape(PREFIX) + rf"(h\.\d+\.(?:{_MODULES}))\.lora_(A\.weight|B\.weight|magnitude_vector)")


def write_adapter(folder: Path, gpt2: GPT2, settings: LoRASettings, base: str, num_ids: int) -> None:
    """Write the adapters and rows of an adapted model, and read them back.

    Args:
        gpt2: in float32, as DoRA's norms are those of its matrices.
        base: where PEFT finds the model that they stand on; on the hub with its revision, as OWNER/NAME@REVISION.
        num_ids: ids that the tokenizer names: the table has no more rows for PEFT.

    Raises:
        OSError: if names or shapes are not the same when read back.
    """
    table, modules = gpt2.wte, {}
    tensors = {TABLES[0]: table.weight.detach()[:num_ids]} if settings.embeddings else {ROWS: table.rows.detach()}
    row_ids = None if settings.embeddings else table.row_ids.tolist()
    for name, module in adapted_projections(gpt2):
        A, B, scaling = _stacked(module)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
        if settings.dora:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = module.magnitudes()
        modules[".".join(name.split(".")[2:])] = len(A), scaling
    write_safetensors(folder / WEIGHTS, tensors)
    write_json(folder / ADAPTER_CONFIG, _peft_config(settings, modules, row_ids, base))
    found = {name: tensor.shape for name, tensor in load_file(folder / WEIGHTS).items()}
    if found != {name: tensor.shape for name, tensor in tensors.items()}:
        raise OSError(f"{folder / WEIGHTS} does not hold what was written to it")


def _stacked(module: AdaptedProjection) -> tuple[Tensor, Tensor, float]:
    """Return A [R, in], B [out, R] and scaling of one adapter that computes the same as all adapters of a matrix."""
    A = torch.cat([adapter.A.detach() for adapter in module.adapters.values()])
    B = A.new_zeros(module.weight.shape[1], len(A))
    at, scaling = 0, next(iter(module.adapters.values())).scaling
    for target, adapter in module.adapters.items():
        block = columns_of(target, len(B)), slice(at, at + adapter.rank)
        B[block] = adapter.B.detach() * (adapter.scaling / scaling)
        at += adapter.rank
    return A, B, scaling


def _peft_config(
    settings: LoRASettings, modules: Mapping[str, tuple[int, float]], row_ids: list[int] | None, base: str
) -> dict[str, Any]:
    """Return PEFT's config.

    Args:
        modules: rank and scaling of the one adapter of each matrix.
    """
    ranks = {module: rank for module, (rank, _) in modules.items()}
    alphas = {m: scaling * (math.sqrt(rank) if settings.rslora else rank) for m, (rank, scaling) in modules.items()}
    on_hub = hub_model(base)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": on_hub.repository if on_hub else base,
        **({"revision": on_hub.revision} if on_hub and on_hub.revision else {}),
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != settings.rank},
        "alpha_pattern": {m: alpha for m, alpha in alphas.items() if not math.isclose(alpha, settings.alpha)},
        "lora_dropout": settings.dropout,
        "target_modules": sorted(ranks),
        "trainable_token_indices": row_ids,
        "fan_in_fan_out": True,  # GPT-2 stores its matrices [in, out]
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
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
        raise ModelError(f"{folder / ADAPTER_CONFIG}: `base_model_name_or_path` must name a model, but is {base!r}")
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
        tensors = _unwrapped(folder, load_file(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS} is not a readable safetensors file ({error})") from error
    merged = dict(weights)
    table = _grown(folder, merged["wte.weight"].float(), tensors, num_ids)
    merged["wte.weight"] = _merged_table(folder, table, tensors, config)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in (ROWS, *TABLES, *HEADS)}
    adapters = {name: tensor for name, tensor in tensors.items() if _LORA.fullmatch(name)}
    merged |= _trained_whole(folder, config, tensors, merged)
    for module, A, B, magnitudes in _adapters(folder, adapters, bool(config.get("use_dora"))):
        if f"{module}.weight" not in merged:
            raise ModelError(f"{folder / WEIGHTS}: the base has no {module}: the adapter is for another model")
        weight = merged[f"{module}.weight"].float()
        fits = (A.shape[1], B.shape[0]) == tuple(weight.shape) and A.shape[0] == B.shape[1]
        if not fits or (magnitudes is not None and magnitudes.shape != B.shape[:1]):
            shapes = " and ".join(str(tuple(t.shape)) for t in (A, B, magnitudes) if t is not None)
            raise ModelError(f"{folder / WEIGHTS}: the adapter of {module} has shapes {shapes}, which do not fit it")
        rank, scaling = _rank_and_scaling(config, module)
        if rank != len(A):
            raise ModelError(f"{folder}: the rank of {module} must be {rank}, as its config says, but is {len(A)}")
        merged[f"{module}.weight"] = weight = weight + scaling * (B.float() @ A.float()).t()
        if magnitudes is not None:
            merged[f"{module}.weight"] = weight * (magnitudes.float() / weight.norm(dim=0))
    for name, tensor in merged.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{folder}: the adapter makes `{name}` hold values that are not finite")
    return merged


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / ADAPTER_CONFIG
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError(str(error)) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f"{file}: `peft_type` must be LORA, but is not")
    off = (
        "lora_bias", "use_qalora", "alora_invocation_tokens", "megatron_config",
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
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise ModelError(f"{file}: `modules_to_save` must be a list of names, but is {saved!r}")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ModelError(f"{file}: `bias` must be none, all or lora_only, but is {config['bias']!r}")
    return config


def _unwrapped(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by the names that they have without PEFT's wrappers.

    A module that PEFT trains whole may be there twice, and once more as it was: with that copy nothing is computed.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = re.sub(r"\.modules_to_save(\.default)?\.", ".", name).replace(".base_layer.bias", ".bias")
        if own in found and not torch.equal(found[own], tensor):
            raise ModelError(f"{folder / WEIGHTS}: `{own}` must be there once, but is there twice and differs")
        if ".original_module." not in name:
            found[own] = tensor
    return found


def _trained_whole(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what an adapter holds in place of the base's, the table apart: biases, and `modules_to_save`.

    Raises:
        ModelError: if it is not just what the config says, in the base's shapes.
    """
    adapted = {f"{found[1]}.bias" for found in map(_LORA.fullmatch, tensors) if found}
    biases = {"none": set(), "lora_only": adapted, "all": {name for name in base if name.endswith(".bias")}}
    wanted = biases[config.get("bias", "none")] | {name for name in base if _is_saved(f"transformer.{name}", config)}
    wanted -= {"wte.weight"}
    found = {name.removeprefix(PREFIX): tensors[name] for name in tensors if not _LORA.fullmatch(name)}
    for name, tensor in found.items():
        if name not in wanted or tensor.shape != base[name].shape:
            raise ModelError(
                f"{folder / WEIGHTS}: `{name}` {tuple(tensor.shape)} is nothing that an adapter with this config can "
                "have here"
            )
    missing = sorted(wanted - found.keys())
    if missing:
        raise ModelError(f"{folder / WEIGHTS} lacks `{PREFIX}{missing[0]}`, which its config says was trained")
    return {name: tensor.float() for name, tensor in found.items()}


def _is_saved(name: str, config: Mapping[str, Any]) -> bool:
    """Return True if a parameter is of a module that was trained whole, by PEFT's rule: `modules_to_save` are ends of
    the names of modules."""
    parts = name.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(module.endswith(saved) for module in modules for saved in config.get("modules_to_save") or ())


def _adapters(
    folder: Path, tensors: Mapping[str, Tensor], is_dora: bool
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Yield (module, A, B, norms of the columns) for each adapted matrix, without DoRA None for the norms."""
    endings = ["A.weight", "B.weight", *(["magnitude_vector"] if is_dora else [])]
    modules = sorted({_LORA.fullmatch(name)[1] for name in tensors})  # type: ignore[index]
    names = {module: [f"{PREFIX}{module}.lora_{ending}" for ending in endings] for module in modules}
    odd = sorted({name for own in names.values() for name in own} ^ tensors.keys())
    if odd:
        does = "holds, without `use_dora`," if odd[0] in tensors else "lacks"
        raise ModelError(f"{folder / WEIGHTS} {does} `{odd[0]}`")
    for module, own in names.items():
        A, B, *magnitudes = (tensors[name] for name in own)
        yield module, A, B, magnitudes[0] if magnitudes else None


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


def _merged_table(folder: Path, table: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Return the table, grown from the base's, with the rows that the adapter holds: all, some, or none."""
    row_ids = config.get("trainable_token_indices")
    is_saved = _is_saved("transformer.wte.weight", config) or _is_saved("lm_head.weight", config)
    if is_saved and not {HEAD, TABLES[0]} <= tensors.keys():
        raise ModelError(
            f"{folder}: `modules_to_save` must not train one of wte and lm_head alone, as GPT-2's head is tied, but is "
            f"{config['modules_to_save']}"
        )
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
