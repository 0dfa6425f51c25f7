"""The container: what its files promise, that serving needs no more than they install, and, as root, what they make.

No container engine is needed. The long test follows the Dockerfile line by line in a copy-on-write copy of this
machine's own root, and starts the entry point as an engine would: its user, no capability, a root that is read-only, no
network but the loopback.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from processes import ROOT, run, start, wait_until

CONTAINER = ROOT / "launch" / "container"
DOCKERFILE = CONTAINER / "Dockerfile"
TRAINING = {
    "accelerate", "datasets", "deepspeed", "pyarrow", "pandas", "tensorboard", "transformers", "peft", "trl",
    "prompt_toolkit", "psutil", "tqdm", "huggingface_hub", "gguf", "jinja2",
}  # fmt: skip
KEY = "a-key-for-the-tests-only"
ASK = """
import json, sys, urllib.request
body = {"messages": [{"role": "user", "content": "Tea?"}], "max_tokens": 3, "temperature": 0}
headers = {"Content-Type": "application/json", "Authorization": f"Bearer {sys.argv[2]}"}
request = urllib.request.Request(f"{sys.argv[1]}/v1/chat/completions", json.dumps(body).encode(), headers)
try:
    print(urllib.request.urlopen(request, timeout=60).read().decode())
except urllib.error.HTTPError as error:
    print(json.dumps({"status": error.code}))
"""


# --- what the files say ---------------------------------------------------------------------------------------------


def instructions():
    """(name, argument) of each instruction, lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, argument = line.strip().partition(" ")
            yield name, argument.strip()


def stage(wanted):
    """The instructions of one stage, without its FROM."""
    found, current = [], None
    for name, argument in instructions():
        if name == "FROM":
            current = argument.partition(" AS ")[2]
        elif current == wanted:
            found.append((name, argument))
    assert found
    return found


def entry_point():
    return json.loads(dict(stage("runtime"))["ENTRYPOINT"])


def test_the_image_runs_as_nobody_and_is_told_when_to_stop():
    runtime = dict(stage("runtime"))
    assert runtime["USER"] == "10001:10001"
    assert runtime["STOPSIGNAL"] == "SIGTERM"
    assert entry_point()[:2] == ["gpt2ft", "serve"]
    options, check = runtime["HEALTHCHECK"].split(" CMD ")
    assert "--start-period" in options
    assert json.loads(check)[:2] == ["python", "-c"]
    compile(json.loads(check)[2], "healthcheck", "exec")
    assert "HF_HUB_OFFLINE=1" in runtime["ENV"]


def test_the_base_image_is_one_argument_with_a_whole_version():
    base = next(argument for name, argument in instructions() if name == "ARG")
    assert re.fullmatch(r"BASE=python:3\.\d+\.\d+-slim-\w+", base)
    sources = [argument.split()[0] for name, argument in instructions() if name == "FROM"]
    assert sources == ["${BASE}", "${BASE}", "runtime", "runtime"]


def test_what_is_copied_is_there_and_not_ignored():
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text(encoding="utf-8").split("\n")
    copied = [word for name in ("build", "runtime") for kind, argument in stage(name) if kind == "COPY"
              for word in argument.split()[:-1] if not argument.startswith("--from")]  # fmt: skip
    assert set(copied) == {"pyproject.toml", "README.md", "LICENSE", "gpt2ft", "launch/recipes"}
    for path in copied:
        assert f"!{path}" in ignored
        assert (ROOT / path).exists()


def test_the_serving_group_has_the_versions_of_the_rest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rest = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["serve"]]
    serving = project["dependency-groups"]["serving"]
    assert set(serving) <= set(rest)
    assert set(project["project"]["optional-dependencies"]["serve"]) <= set(serving)
    assert not {re.split(r"[<>=]", name)[0] for name in serving} & TRAINING


def test_compose_serves_this_machine_alone_and_grants_nothing():
    service = yaml.safe_load((CONTAINER / "compose.yaml").read_text(encoding="utf-8"))["services"]["serve"]
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["read_only"]
    assert service["init"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(volume["read_only"] for volume in service["volumes"])
    assert service["volumes"][0]["target"] == entry_point()[2]
    assert (CONTAINER / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]) == DOCKERFILE


# --- what serving imports -------------------------------------------------------------------------------------------


def test_serving_needs_nothing_of_training(tiny_weights_folder):
    """The script itself, answering, where those packages cannot be imported."""
    blocked = f"""
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {TRAINING!r}:
            raise ModuleNotFoundError(f"serving imports {{name}}", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["serve.py", {str(tiny_weights_folder)!r}, "--port", "0"]
runpy.run_path({str(ROOT / "launch" / "serve.py")!r}, run_name="__main__")
"""
    with start(["python", "-c", blocked]) as server:
        address = server.wait_for(r"http://\S+:\d+")[0]
        said = run(["python", "-c", ASK, address, ""])
        assert json.loads(said.stdout)["usage"]["completion_tokens"] > 0
        server.send_signal(signal.SIGTERM)
        server.finish()


# --- what the image would be ----------------------------------------------------------------------------------------


class Machine:
    """A copy-on-write copy of this machine's root, in a mount namespace of its own that vanishes with it."""

    def __init__(self, folder):
        self.root = folder / "root"
        script = f"""
set -e
mount -t tmpfs none {folder}
mkdir {folder}/upper {folder}/work {self.root}
mount -t overlay overlay -o lowerdir=/,upperdir={folder}/upper,workdir={folder}/work {self.root}
for name in proc dev sys; do mount --rbind /$name {self.root}/$name; done
mount -t tmpfs -o mode=1777 none {self.root}/tmp
echo ready
exec sleep infinity"""
        command = ["unshare", "--mount", "--propagation", "private", "bash", "-c", script]
        self._holder = start(command)
        said = self._holder.wait_for(".*\n")[0].strip()
        if said != "ready":
            self.close()
            pytest.skip(f"needs a kernel that lets root mount an overlay: {said}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._holder.close()

    def command(self, *words, wrap=(), inside=True):
        """The words that run a command in here, and inside the root unless told otherwise."""
        enter = ["nsenter", "--target", self._holder.pid, "--mount", *wrap]
        return [*enter, *(["chroot", str(self.root)] if inside else []), *words]

    def run(self, *words, inside=True, code=0):
        return run(self.command(*words, inside=inside), code, seconds=600)


def in_environment(environment):
    """The words before a command that has these variables and no others."""
    return ["env", "-i", *(f"{name}={value}" for name, value in environment.items())]


class Build:
    """Follows the instructions of stages on one machine."""

    def __init__(self, machine, arguments):
        self.machine, self.arguments = machine, arguments
        self.folder = "/"
        prefix = Path(sys.base_prefix)  # stands for the base image's Python, and must be readable for everyone
        machine.run("chmod", "a+rx", *map(str, [prefix, *prefix.parents]))
        kept = ("PIP_", "SSL_", "HTTP", "http", "REQUESTS_")  # how this machine reaches its packages
        self.environment = {name: value for name, value in os.environ.items() if name.startswith(kept)}
        self.environment["PATH"] = f"{prefix}/bin:/usr/local/bin:/usr/bin:/bin"

    def follow(self, instructions):
        for name, argument in instructions:
            getattr(self, f"_{name.lower()}", lambda argument: None)(argument)

    def _arg(self, argument):
        name, _, default = argument.partition("=")
        self.environment[name] = self.arguments.get(name, default)

    def _env(self, argument):
        for word in shlex.split(argument):
            name, _, value = word.partition("=")
            self.environment[name] = value.replace("$PATH", self.environment["PATH"])

    def _workdir(self, argument):
        self.folder = argument
        self.machine.run("mkdir", "-p", argument)

    def _copy(self, argument):
        *sources, destination = argument.split()
        if sources[0].startswith("--from="):  # both stages are followed on the same machine
            assert sources[1:] == [destination]
            return
        target = f"{self.machine.root}{Path(self.folder) / destination}"
        self.machine.run("mkdir", "-p", str(Path(target).parent), inside=False)
        self.machine.run(
            "cp", "-rT" if len(sources) == 1 else "-r", *[str(ROOT / name) for name in sources], target, inside=False
        )

    def _run(self, argument):
        shell = ["sh", "-c", f"cd {self.folder} && {argument}"]
        self.machine.run(*in_environment(self.environment), *shell)


def torch_index():
    """PyTorch's own, as in the image, where it can be reached."""
    try:
        socket.getaddrinfo("download.pytorch.org", 443)
    except OSError:
        return {"TORCH_INDEX": "https://pypi.org/simple"}
    return {}


@pytest.fixture(scope="module")
def image(tiny_weights_folder, tmp_path_factory):
    """The image as the Dockerfile makes it, the model mounted, its root read-only."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount and to become the image's user")
    for tool in ("unshare", "nsenter", "setpriv", "ip"):
        if not shutil.which(tool):
            pytest.skip(f"needs the program {tool}")
    with Machine(tmp_path_factory.mktemp("machine")) as machine:
        build = Build(machine, torch_index())
        build.follow(stage("build"))
        build.follow(stage("runtime"))
        model = f"{machine.root}/model"
        machine.run("mkdir", model, inside=False)
        machine.run("mount", "--bind", str(tiny_weights_folder), model, inside=False)
        machine.run("mount", "-o", "remount,bind,ro", model, inside=False)
        machine.run("mount", "-o", "remount,ro", str(machine.root), inside=False)
        yield machine, build.environment


def as_the_images_user(machine, environment, *words):
    """The words that run a command as an engine runs the entry point, with no network but the loopback."""
    user, group = dict(stage("runtime"))["USER"].split(":")
    dropped = ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    who = ["setpriv", "--reuid", user, "--regid", group, *dropped]
    inside = shlex.join(["chroot", str(machine.root), *in_environment(environment), *who, *words])
    script = f"ip link set lo up && exec {inside}"
    return machine.command("bash", "-c", script, wrap=("unshare", "--net"), inside=False)


@pytest.mark.long
def test_the_image_holds_no_package_of_training(image):
    machine, environment = image
    list_them = "import importlib.metadata as m; print(*sorted(d.name.lower() for d in m.distributions()))"
    names = set(machine.run(*in_environment(environment), "python", "-c", list_them).stdout.split())
    assert {"gpt2ft", "torch", "fastapi", "uvicorn"} <= names
    assert not names & {name.replace("_", "-") for name in TRAINING - {"jinja2"}}  # which torch brings
    assert "pip" not in names
    size = machine.run("du", "-sm", "/opt/gpt2ft").stdout.split()[0]
    print(f"/opt/gpt2ft: {size} MB; {len(names)} packages")


@pytest.mark.long
def test_without_a_key_it_refuses_to_be_open(image):
    machine, environment = image
    refused = run(as_the_images_user(machine, environment, *entry_point()), code=2)
    assert "there must be a key" in refused.stderr


@pytest.mark.long
def test_the_entry_point_serves_and_stops_when_told(image):
    machine, environment = image
    environment = environment | {"GPT2FT_API_KEY": KEY}
    health = json.loads(dict(stage("runtime"))["HEALTHCHECK"].split(" CMD ")[1])
    with start(as_the_images_user(machine, environment, *entry_point())) as server:

        def beside(*words, code=0):
            """Runs a command in the server's container, as a health check is."""
            enter = ["nsenter", "--target", server.pid, "--mount", "--net", "chroot", machine.root]
            who = ["setpriv", "--reuid", "10001", "--regid", "10001", "--clear-groups"]
            return run([*enter, *in_environment(environment), *who, *words], code)

        assert server.wait_for(r"http://\S+:\d+")[0].endswith(":8000")
        wait_until(lambda: beside(*health, code=None).code == 0)
        here = "http://127.0.0.1:8000"
        assert json.loads(beside("python", "-c", ASK, here, KEY).stdout)["usage"]["completion_tokens"] > 0
        assert json.loads(beside("python", "-c", ASK, here, "another key, not that").stdout) == {"status": 401}
        status = Path(f"/proc/{server.pid}/status").read_text()
        assert re.search(r"^Uid:\t10001\t10001\t10001\t10001$", status, re.MULTILINE)
        assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
        for place in ("/opt/gpt2ft/x", "/model/x", "/x"):
            assert "Read-only file system" in machine.run("touch", place, code=1).stderr  # not even as root
        beside("touch", "/tmp/x")
        server.send_signal(signal.SIGTERM)
        server.finish()
