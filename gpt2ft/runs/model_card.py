"""Model card: README.md of a model in the hub's format, written from the manifest and the metrics of its run.

Names of data and models come from elsewhere: in the text they are escaped, in the metadata YAML quotes them.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import yaml

from gpt2ft.checkpoint import differences
from gpt2ft.files import read_json, write_text
from gpt2ft.model.gpt2 import GPT2Config, parameter_shapes
from gpt2ft.preference_losses import PREFERENCE_LOSSES
from gpt2ft.settings.scripts import DPOSettings, SFTSettings
from gpt2ft.text.markdown import fenced, inline
from gpt2ft.wording import counted

NAME = "README.md"
Layout = Literal["hf", "adapter", "gguf"]
LIBRARIES = {"hf": "transformers", "adapter": "peft", "gguf": "gguf"}
FREE = {"mit", "apache-2.0"}  # data under these ask nothing of a model that is trained on them
TOLD = {"data.train", "data.eval", "data.topic_replies", "model.path"}  # settings, by other names than of this machine
UNITS = {  # of held-out figures; rewards and the losses of preferences have none
    "bits_per_byte": "bits/byte", "stopped": "share of sample replies that end by themselves",
    **dict.fromkeys(("accuracy", "likelier", "both_fall"), "share of pairs"),
    **dict.fromkeys(("chosen_change_per_token", "rejected_change_per_token", "change_per_token"), "nats/token"),
    **dict.fromkeys(("chosen_length", "rejected_length", "length"), "tokens"),
    "desirable": "share of replies", "divergence": "nats/reply",
}  # fmt: skip
BEGIN, END = "<!-- certificate -->", "<!-- end of certificate -->"
PAGE = f"""\
---
{{metadata}}---

# {{name}}

A chat model: a GPT-2 of {{size:.1f}}M parameters ({{layers}} x {{width}}, {{ids:,}} ids), trained with gpt2ft
{{gpt2ft}} and PyTorch {{torch}}. This is its state after step {{step:,}} of {{steps:,}}{{kept}}.

## Base and data

It started from {{base}}, licence {{license}}.

| training | data | licence | conversations or prompts | tokens | supervised | pairs or labelled replies |
|---|---|---|---:|---:|---:|---:|
{{data}}

## Settings

A peak learning rate of {{rate:.2g}}, in {{precision}}, and these that differ from the defaults:

{{settings}}
## Held-out figures

{{figures}}

## How to load it

PATH is this folder, or the name of its repository on the hub.

{{uses}}
## What it cannot do

- It reads {{context:,}} tokens at once. In longer conversations the oldest turns give way.
- It is small: what it states may be wrong, and it repeats mistakes and prejudices of its data. Truth, safety and bias
  were not measured.
- It knows text and the roles system, user and assistant: no tools, no images.
- Programs that render a conversation to text before they tokenise it let a user forge turns: drop the names of the
  control tokens from what users send.

{BEGIN}
{END}
"""
CERTIFICATE = """
The run was verified. The sha256 of its certificate.json is `{digest}`; with that file at hand, this tells whether a
model is the run's:

```
python launch/verify.py certificate.json PATH
```

"""
TRANSFORMERS = """\
{peft}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("{base}")
{adapter}messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
reply = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(reply, skip_special_tokens=True))"""
ADAPTER = """\
model.resize_token_embeddings(len(tokenizer))
model = PeftModel.from_pretrained(model, "PATH")
"""
GPT2FT = """\
python launch/chat.py PATH
python launch/export.py PATH --format gguf --output FOLDER    # for llama.cpp and Ollama"""
LLAMA_CPP = """\
llama-server -m PATH/FILE.gguf --jinja
ollama create NAME -f PATH/Modelfile"""


def read_facts(home: Path) -> dict[str, Any] | None:
    """Return the manifest of a run; None where none holds what a card tells."""
    with suppress(OSError, ValueError):
        manifest = read_json(home / "manifest.json")
        if isinstance(manifest, dict) and {"settings", "identity", "lineage"} <= manifest.keys():
            return manifest
    return None


def evaluations(metrics: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of a metrics.jsonl that are of evaluations, by step; a line that was cut off is none."""
    found = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            values = json.loads(line)
            if "eval/loss" in values:
                found[values["step"]] = values
    return found


@dataclass(frozen=True)
class Card:
    """Card of the model that a run had trained by a step.

    Attributes:
        shape: of the model as it is written, without padding.
    """

    manifest: Mapping[str, Any]
    metrics: Path
    shape: GPT2Config
    step: int

    def text(self, layout: Layout) -> str:
        manifest, shape, identity = self.manifest, self.shape, self.manifest["identity"]
        base = self._stages()[0]["base"]
        return PAGE.format(
            metadata=yaml.safe_dump(self._metadata(layout), sort_keys=False, allow_unicode=True),
            name=inline(Path(manifest["settings"]["output"]).resolve().name),
            size=sum(map(prod, parameter_shapes(shape).values())) / 1e6,
            layers=counted(shape.n_layer, "layer"), width=shape.n_embd, ids=shape.vocab_size, context=shape.n_positions,
            gpt2ft=manifest["versions"]["gpt2ft"], torch=manifest["versions"]["torch"],
            step=self.step, steps=identity["steps"],
            kept=": adapters in the layout of PEFT, to be put on their base" if layout == "adapter" else "",
            base=_place(base), license=_license(base), data="\n".join(self._rows()),
            rate=identity["optimizer"]["learning_rate"], precision=manifest["precision"],
            settings="\n".join(fenced(yaml.safe_dump(self._settings(), allow_unicode=True).strip(), "yaml")),
            figures="\n".join(self._figures()), uses="\n".join(self._uses(layout)),
        )  # fmt: skip

    def _stages(self) -> list[dict[str, Any]]:
        """Return the lineage of the run and of those before it, the first one first."""
        stages = [self.manifest["lineage"]]
        while "lineage" in stages[0]["base"]:
            stages.insert(0, stages[0]["base"]["lineage"])
        return stages

    def _metadata(self, layout: Layout) -> dict[str, Any]:
        stages = self._stages()
        data = [origin for stage in stages for origin in stage["data"]]
        base = (stages[-1] if layout == "adapter" else stages[0])["base"]
        codes = (
            re.match("[a-z]{2,3}(?![a-z])", name.lower()) for name in self.manifest["settings"]["data"]["languages"]
        )
        methods = (word.lower() for stage in stages for word in stage["method"].split())
        found = {
            "base_model": base.get("repository"),
            "datasets": list(dict.fromkeys(origin["repository"] for origin in data if "repository" in origin)),
            "language": list(dict.fromkeys(code[0] for code in codes if code)),
            "library_name": LIBRARIES[layout],
            "license": stages[0]["base"].get("license") if {origin.get("license") for origin in data} <= FREE else None,
            "pipeline_tag": "text-generation",
            "tags": ["gpt2", "conversational", *dict.fromkeys(methods), "gpt2ft"],
        }
        return {key: value for key, value in found.items() if value}

    def _rows(self) -> Iterator[str]:
        for stage in self._stages():
            for origin in stage["data"]:
                counts = (f"{origin.get(name, 0):,}" for name in ("conversations", "tokens", "supervised", "pairs"))
                cells = (stage["method"], _place(origin), _license(origin), *counts)
                yield f"| {' | '.join(cells)} |"

    def _settings(self) -> dict[str, Any]:
        """Return the settings by dotted name that change what is trained and differ from the defaults."""
        settings, identity = self.manifest["settings"], self.manifest["identity"]
        defaults = (DPOSettings if "dpo" in settings else SFTSettings)().model_dump(mode="json")
        found = {f"dpo.{name}": settings["dpo"][name] for name in ("loss", "beta") if "dpo" in settings}
        for key, _, value in differences(defaults, settings):
            section, _, name = key.partition(".")
            if name and name.split(".")[0] in identity.get(section, ()) and key not in TOLD:
                found[key] = value
        return found

    def _figures(self) -> Iterator[str]:
        found, lineage, dpo = evaluations(self.metrics), self.manifest["lineage"], self.manifest["settings"].get("dpo")
        if self.step not in found:
            yield "None were measured at this step."
            return
        names, first = lineage["names"], found[min(found)]
        number = self.manifest["identity"]["held_out_data"]["conversations"]
        of = inline(", ".join(names[source] for source in self.manifest["settings"]["data"]["eval"]))
        evaluated = counted(number, "prompt" if dpo else "conversation")
        yield f"On {evaluated} {f'of {of} ' if of else ''}that it was not trained on."
        yield from ("", f"| figure | unit | at step {first['step']:,} | this model |", "|---|---|---:|---:|")
        units = UNITS if dpo else UNITS | {"loss": "nats/token"}
        if dpo and not PREFERENCE_LOSSES[dpo["loss"]].of_pairs:
            units = units | {"accuracy": "share of replies"}
        for key, value in found[self.step].items():
            _, is_figure, name = key.partition("eval/")
            _, of_source, source = name.partition("loss/")
            label = f"loss on {names.get(source, 'a source')}" if of_source else name
            unit = units.get("loss" if of_source else name, "")
            if is_figure:
                yield f"| {inline(label)} | {unit} | {_number(first.get(key))} | {_number(value)} |"

    def _uses(self, layout: Layout) -> Iterator[str]:
        if layout == "gguf":
            yield from fenced(LLAMA_CPP)
            return
        base, adapter, peft = "PATH", "", ""
        if layout == "adapter":
            base, adapter, peft = self._stages()[-1]["base"].get("repository"), ADAPTER, "from peft import PeftModel\n"
        if base is None:
            yield from ("BASE is the model that the adapters stand on.", "")
        yield from fenced(TRANSFORMERS.format(base=base or "BASE", adapter=adapter, peft=peft), "python")
        yield from ("With gpt2ft:", "", *fenced(GPT2FT))


def write_card(folder: Path, card: str) -> None:
    if card:
        write_text(folder / NAME, card)


def name_certificate(folder: Path, digest: str) -> None:
    """Have the card in a folder name the certificate with this digest, or none; one without a place for it stays."""
    file = folder / NAME
    card = file.read_text(encoding="utf-8") if file.is_file() else ""
    block = BEGIN + "\n" + (CERTIFICATE.format(digest=digest) if digest else "") + END
    if (changed := re.sub(f"(?s){BEGIN}.*?{END}", lambda _: block, card, count=1)) != card:
        write_text(file, changed)


def _place(origin: Mapping[str, Any]) -> str:
    """Return in words the name of a base or a data source, and its repository with the commit."""
    at = f" ({origin['repository']} at {origin['revision'][:8]})" if "repository" in origin else ""
    weight = f" x {origin['mixing_weight']:g}" if origin.get("mixing_weight", 1) != 1 else ""
    return inline(origin["name"] + at) + weight


def _license(origin: Mapping[str, Any]) -> str:
    return origin.get("license", "not known here")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
