"""GPT-2 as one GGUF file, for llama.cpp and what is built on it: weights, vocabulary, chat template.

There a matrix is the transpose of ours, [out, in]. Norms, biases and positions stay in float32, as llama.cpp adds them
to float32. The head is not written again: without one, llama.cpp takes the embedding for it, as GPT-2 has it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2ft.files import synced
from gpt2ft.model.gpt2 import GPT2Config
from gpt2ft.model.pretrained import HF_PREFIX, ModelError, cast_checked

SHORT_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

# Names in which llama.cpp sees more than the file says of them. The first end a reply, even where they are text here;
# with the second, `<|end|>` ends none, or text can spell control tokens.
ENDINGS = frozenset({
    "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<eos>",
    "<turn|>", "<|tool_response>", "<end_of_utterance>", "</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
})  # fmt: skip
OF_OTHER_MODELS = frozenset({
    "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>",
})  # fmt: skip


@dataclass(frozen=True)
class GGUFTokenizer:
    """Vocabulary and special tokens, as a GGUF file holds them.

    Attributes:
        names: of every id, by id, in GPT-2's printable symbols; of added words as they are.
        merges: by rank.
        control_ids: the ids that are no text.
        word_ids: the ids of added words, which are found before BPE.
        end_id: of the token that ends a turn.
        end_of_text_id: of the token before a text, which also pads.
        chat_template: in Jinja.
    """

    names: Sequence[str]
    merges: Sequence[str]
    control_ids: frozenset[int]
    word_ids: frozenset[int]
    end_id: int
    end_of_text_id: int
    chat_template: str


def write_gguf(
    file: Path, weights: Mapping[str, Tensor], config: GPT2Config, tokenizer: GGUFTokenizer, dtype: torch.dtype
) -> None:
    """Write a complete file, or none, and read it back.

    Args:
        dtype: of the matrices: float32, float16 or bfloat16.

    Raises:
        ModelError: if llama.cpp cannot express this model.
        OSError: if what is read back is not what was written.
    """
    import gguf

    _check_names(tokenizer)
    metadata = _metadata(config, tokenizer, dtype, name=file.stem)
    tensors = dict(_tensors(weights, config, len(tokenizer.names), dtype))
    with synced(file) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
        for key, value in metadata.items():
            _add(writer, key, value)
        for name, tensor in tensors.items():
            kind = gguf.GGMLQuantizationType[SHORT_NAMES[tensor.dtype].upper()]
            writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check(temporary, metadata, tensors)


def _check_names(tokenizer: GGUFTokenizer) -> None:
    """Raise ModelError unless llama.cpp reads the names as they are meant."""
    for id, name in enumerate(tokenizer.names):
        if name in (OF_OTHER_MODELS if id in tokenizer.control_ids else ENDINGS | OF_OTHER_MODELS):
            raise ModelError(
                f"the vocabulary must not hold {name} (id {id}) to be exported as GGUF: llama.cpp takes it for a "
                "control token of another model; export --format hf"
            )
    if not tokenizer.merges:
        raise ModelError("the vocabulary must have merges to be exported as GGUF, but has bytes only")


def _metadata(config: GPT2Config, tokenizer: GGUFTokenizer, dtype: torch.dtype, name: str) -> dict[str, Any]:
    """Return the metadata of the file, by llama.cpp's keys."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, Keys, LlamaFileType, TokenType

    architecture = MODEL_ARCH_NAMES[MODEL_ARCH.GPT2]
    file_type = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16}
    shape = {
        Keys.LLM.CONTEXT_LENGTH: config.n_positions,
        Keys.LLM.EMBEDDING_LENGTH: config.n_embd,
        Keys.LLM.BLOCK_COUNT: config.n_layer,
        Keys.LLM.FEED_FORWARD_LENGTH: 4 * config.n_embd,
        Keys.Attention.HEAD_COUNT: config.n_head,
        Keys.Attention.LAYERNORM_EPS: config.layer_norm_epsilon,
    }
    kinds = [TokenType.NORMAL] * len(tokenizer.names)
    for ids, kind in ((tokenizer.word_ids, TokenType.USER_DEFINED), (tokenizer.control_ids, TokenType.CONTROL)):
        for id in ids:
            kinds[id] = kind
    return {
        Keys.General.NAME: name,
        Keys.General.FILE_TYPE: int(file_type[SHORT_NAMES[dtype]]),
        **{key.format(arch=architecture): value for key, value in shape.items()},
        Keys.Tokenizer.MODEL: "gpt2",
        Keys.Tokenizer.PRE: "gpt-2",  # how text is cut before BPE: always as GPT-2 does, here
        Keys.Tokenizer.LIST: list(tokenizer.names),
        Keys.Tokenizer.TOKEN_TYPE: [int(kind) for kind in kinds],
        Keys.Tokenizer.MERGES: list(tokenizer.merges),
        Keys.Tokenizer.BOS_ID: tokenizer.end_of_text_id,
        Keys.Tokenizer.EOS_ID: tokenizer.end_id,
        Keys.Tokenizer.EOT_ID: tokenizer.end_id,
        Keys.Tokenizer.PAD_ID: tokenizer.end_of_text_id,
        Keys.Tokenizer.ADD_BOS: False,
        Keys.Tokenizer.ADD_EOS: False,
        Keys.Tokenizer.CHAT_TEMPLATE: tokenizer.chat_template,
    }


def _tensors(
    weights: Mapping[str, Tensor], config: GPT2Config, num_ids: int, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor by its name in GGUF, in the layout and the precision that it is written in."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for ours, weight in weights.items():
        name = names.get_name(HF_PREFIX + ours, try_suffixes=(".weight", ".bias"))
        tensor = weight.detach().float().cpu()
        if ours == "wte.weight":
            tensor = tensor[:num_ids]
        if tensor.ndim == 2 and ours != "wpe.weight":
            tensor = cast_checked(ours, tensor, dtype)
        yield name, (tensor if ours in ("wte.weight", "wpe.weight") else tensor.t()).contiguous()


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a value with the type that llama.cpp reads."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _check(file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise OSError unless a file holds exactly this."""
    import gguf

    reader = gguf.GGUFReader(file)
    of_container = ("GGUF.", gguf.Keys.General.ARCHITECTURE)
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith(of_container)}
    epsilon = gguf.Keys.Attention.LAYERNORM_EPS.format(arch="gpt2")
    expected = dict(metadata) | {epsilon: float(torch.tensor(metadata[epsilon], dtype=torch.float32))}
    wrong = [key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    read = {tensor.name: tensor for tensor in reader.tensors}
    for name in sorted(tensors.keys() | read.keys()):
        if name not in read or name not in tensors:
            wrong.append(name)
            continue
        values = torch.from_numpy(gguf.dequantize(read[name].data, read[name].tensor_type).copy())
        if not torch.equal(values, tensors[name].float()):
            wrong.append(name)
    if wrong:
        raise OSError(f"the GGUF file is not kept: `{wrong[0]}` is not what was written when read back")
