"""Certificate of a run: certificate.json, to be signed, and certificate.md, the same to read."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from gpt2ft.checkpoint_verification import read_json
from gpt2ft.command_line import full_command
from gpt2ft.files import file_digest, write_json, write_text
from gpt2ft.model.pretrained import dtype_name, weights_digest
from gpt2ft.runs.loaded_model import find_model
from gpt2ft.runs.model_card import NAME as CARD
from gpt2ft.runs.model_card import name_certificate
from gpt2ft.runs.output import Output
from gpt2ft.text.markdown import inline

FORMAT, NAME = 1, "certificate.json"
Claim = dict[str, str]  # name, result (holds, fails or not checked) and detail of one thing that was checked
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in which models are exported
PAGE = """\
# Certificate of {run}

{verdict}, by `{command}` on {date}, with

```
{environment}```

| claim | result | |
|---|---|---|
{claims}

Digests find mistakes and damage. **They are no signature**: whoever can write the run can write a certificate. To vouch
for it, sign it with a key that others know to be yours, by one of

```
ssh-keygen -Y sign -f ~/.ssh/id_ed25519 -n gpt2ft {name}    # ssh-keygen -Y verify
gpg --armor --detach-sign {name}                            # gpg --verify
minisign -Sm {name}                                         # minisign -V
```

The sha256 of {name} is `{digest}`; there are those of all files of the run but its model cards.
"""


def write_certificate(output: Output, claims: Sequence[Claim], environment: Mapping[str, Any]) -> None:
    """Write the certificate of a run into its folder, with digests of all that the run has left."""
    is_verified = all(claim["result"] == "holds" for claim in claims)
    files = (file.relative_to(output.folder) for file in sorted(output.folder.rglob("*")) if file.is_file())
    of_others = (".", "tensorboard", "wandb", "certificate")
    files = [file for file in files if not str(file).startswith(of_others) and file.name != CARD]
    folders = [folder for folder in (output.model, output.best, output.adapter) if folder.is_dir()]
    about = {"run": str(output.folder.resolve()), "verified": is_verified, "command": full_command()}
    about |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment, "claims": claims}
    of_models = {folder.name: _digests(folder) for folder in folders if is_verified}
    digests = {str(file): file_digest(output.folder / file) for file in files}
    write_json(output.folder / NAME, {"format": FORMAT, **about, "models": of_models, "files": digests})
    page = about | {"name": NAME, "digest": file_digest(output.folder / NAME)}
    page["verdict"] = "Verified" if is_verified else "**Not verified**"
    page["environment"] = yaml.safe_dump(dict(environment), sort_keys=False)
    page["claims"] = "\n".join(f"| {' | '.join(map(inline, claim.values()))} |" for claim in claims)
    write_text(output.folder / "certificate.md", PAGE.format_map(page))
    for folder in folders:
        name_certificate(folder, page["digest"] if is_verified else "")
    print(f"certificate {output.folder / NAME}, sha256 {page['digest']}", flush=True)


def _digests(folder: Path) -> dict[str, str]:
    """Return digests of a model's weights in each precision, and of its tokenizer."""
    loaded, _ = find_model(str(folder))
    casts = {dtype: {name: weight.to(dtype) for name, weight in loaded.weights().items()} for dtype in DTYPES}
    found = {dtype_name(dtype): weights_digest(weights) for dtype, weights in casts.items()}
    return found | {"tokenizer": loaded.tokenizer.digest}


def check_model(file: Path, model: Path) -> str:
    """Tell whether a model is one of a certificate's; return why not in one sentence, empty if it is."""
    certificate, found = read_json(file), _digests(model)
    try:
        if (certificate["format"], certificate["verified"]) != (FORMAT, True):
            raise ValueError
        run = certificate["run"]
        for name, digests in certificate["models"].items():
            dtype = next((key for key, digest in digests.items() if digest == found["float32"]), None)
            if dtype and digests["tokenizer"] != found["tokenizer"]:
                return f"{model} has the weights of {name}/ of {run}, but another tokenizer"
            if dtype:
                print(f"{model} is {name}/ of {run} in {dtype}, weights and tokenizer")
                return ""
    except (ValueError, LookupError, TypeError, AttributeError):  # of another shape than any that is written here
        return f"{file} is not the certificate of a run that verifies"
    return f"{model} is no model of {run}: its weights have the digest {found['float32']}"
