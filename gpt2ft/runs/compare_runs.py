"""Two runs side by side: what they were made of, and the first step at which they differ."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2ft.checkpoint import differences
from gpt2ft.errors import SettingsError
from gpt2ft.files import file_digest
from gpt2ft.runs.output import Output
from gpt2ft.runs.recompute import UNREPEATABLE
from gpt2ft.training.tracking import held_out_lines, training_lines

KINDS = {  # by how a key of the manifest begins; what is in none is not compared
    "settings.output": None, "settings.resume": None, "settings.data.cache": None,
    "settings.training.seed": "seed", "settings": "settings", "template": "template", "tokenizer": "tokenizer",
    "identity.initial_weights": "start", "identity.tokenised_data": "data", "identity.held_out_data": "data",
    "versions": "versions", "hardware": "hardware", "processes": "hardware", "strategy": "hardware",
}  # fmt: skip


def compare_runs(*folders: Path) -> str:
    """Print what two runs differ in; return the first step at which they do in one sentence, empty if there is none."""
    outputs = [Output(str(folder)) for folder in folders]
    manifests = [output.read_manifest() for output in outputs]
    if not all("settings" in manifest for manifest in manifests):
        raise SettingsError(f"{' and '.join(map(str, folders))} must both be runs of this version")
    for key, here, there in differences(*manifests):
        kind = next((kind for start, kind in KINDS.items() if f"{key}.".startswith(f"{start}.")), None)
        if kind:
            print(f"{kind:<11} `{key.removeprefix('settings.')}`: {here!r} and {there!r}")
    one, other = (training_lines(output.metrics) for output in outputs)
    common = sorted(one.keys() & other.keys())
    for step in common:
        found = [*differences({"data": one[step].get("data")}, {"data": other[step].get("data")})]
        found += [number for number in differences(one[step], other[step]) if number[0] not in UNREPEATABLE]
        for key, here, there in found[:1]:
            what = "what was trained on" if key == "data" else "numbers"
            return f"they differ first at step {step}, in {what}: `{key}` is {here} and {there}"
    if _held_out(manifests[0]) == _held_out(manifests[1]):
        one, other = (held_out_lines(output.metrics) for output in outputs)
        for step in sorted(one.keys() & other.keys()):
            for key in sorted(one[step].keys() & other[step].keys() - {*UNREPEATABLE}):  # samples may be of one alone
                if one[step][key] != other[step][key]:
                    numbers = f"`{key}` is {one[step][key]} and {other[step][key]}"
                    return f"they were trained alike and differ first at step {step}, in what was held out: {numbers}"
    digests = {file_digest(output.model / "model.safetensors") for output in outputs if output.is_finished}
    if not common or len(digests) > 1:
        return "their weights differ, and no line does" if common else "they have logged no step in common"
    print(f"the same    {len(common)} lines, the last of step {common[-1]}, and the weights where both have finished")
    return ""


def _held_out(manifest: Mapping[str, Any]) -> Any:
    return manifest.get("identity", {}).get("held_out_data")
