"""Tools of the tests of verification: the script in this process, and ways to change what a run has left."""

import json

from safetensors.torch import load_file, save_file

from gpt2ft.checkpoint_verification import manifest_entry
from gpt2ft.files import write_json
from gpt2ft.runs import verify
from gpt2ft.settings.measuring import VerifySettings
from gpt2ft.training.tracking import line_digests

STEPS = 7


def check(*paths, steps=100, seed=0):
    """Run the script; return None, or the sentence by which it fails."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        verify.run(VerifySettings(paths=[str(path) for path in paths], steps=steps, seed=seed))
    except verify.NotVerified as error:
        return str(error)
    return None


def claims(folder):
    return {claim["name"]: claim for claim in read(folder / "certificate.json")["claims"]}


def failures(folder, **how):
    """Verify a run; return the claims that fail, with what is said of them."""
    said = check(folder, **how)
    found = {name: claim["detail"] for name, claim in claims(folder).items() if claim["result"] == "fails"}
    assert (said is None) == (not found)
    assert all(name in said for name in found)
    return found


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def change_json(file, change):
    value = read(file)
    change(value)
    write_json(file, value)


def nudge(file, by=1e-4):
    tensors = load_file(file)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[0] += by
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def renew(folder):
    """Have the manifest of a checkpoint state what lies beside it."""
    names = read(folder / "manifest.json")
    write_json(folder / "manifest.json", {name: manifest_entry(folder / name) for name in names})


def forge_checkpoint(run, step, by=1e-4):
    folder = run / "checkpoints" / f"step-{step:08d}"
    nudge(folder / "model.safetensors", by)
    renew(folder)


def edit_line(run, change, with_digests=False):
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    change(lines)
    file.write_text("".join(lines))
    if with_digests:
        change_json(run / "manifest.json", lambda manifest: manifest.update(metrics=line_digests(file)))


def replace_in(number, old, new):
    def change(lines):
        assert old in lines[number]
        lines[number] = lines[number].replace(old, new)

    return change


def other_held_out_loss(lines):
    line = json.loads(lines[-1])
    lines[-1] = json.dumps(line | {"eval/loss": line["eval/loss"] + 1e-6}) + "\n"


def other_loss(lines):
    line = json.loads(lines[-2])
    lines[-2] = json.dumps(line | {"train/loss": line["train/loss"] + 1e-6}) + "\n"
