"""A finished model served to programs that speak OpenAI's API, and to a browser."""

import logging
import os
import socket
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2ft.errors import SettingsError, reason
from gpt2ft.files import user_path
from gpt2ft.model.pretrained import ModelError
from gpt2ft.runs.inference_model import load_inference_model
from gpt2ft.settings.using import ServeSettings

if TYPE_CHECKING:
    from gpt2ft.server.http.server import Server

EXTRA = ("fastapi", "starlette", "uvicorn", "h11")  # of `pip install .[serve]`
KEY_VARIABLE = "GPT2FT_API_KEY"
MIN_KEY_LENGTH = 16  # characters


def run(settings: ServeSettings) -> None:
    try:
        from gpt2ft.server import service
        from gpt2ft.server.http import connection
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise SettingsError(f"serving needs {error.name}, which is not installed: pip install -e '.[serve]'") from error
    key = read_key(settings)
    require_key(settings.host, key)
    with _listening(settings, connection.listen) as listening:
        if settings.votes is None:
            model = load_inference_model(settings, seed=0)
            what, name = model.source, settings.model_name or Path(settings.model or model.source).resolve().name
            server = service.create(settings, model, name, key)
        else:
            what, name = " beside ".join(settings.compare), settings.model_name or "comparison"
            server = comparing_server(settings, settings.votes, name, key)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        print(f"{what} is served at {address(listening)} as {name}; Ctrl-C ends it", flush=True)
        server.run(sockets=[listening])
    if server.has_failed:
        raise ModelError(f"{what} cannot say a single token: its weights are damaged")


def comparing_server(settings: ServeSettings, votes: str, name: str, key: str | None) -> "Server":
    """Return the server of two models; raise SettingsError unless their votes can be added to the file."""
    from gpt2ft.server.comparison import service
    from gpt2ft.server.comparison.vote_file import VoteFile

    try:
        vote_file = VoteFile(user_path(votes))
    except (OSError, ValueError) as error:
        raise SettingsError(f"`votes` = {votes} cannot be used: {reason(error)}") from error
    each = [settings.model_copy(update={"model": model, "compare": (), "votes": None}) for model in settings.compare]
    models = [load_inference_model(one, seed=0) for one in each]
    return service.create(settings, models, name, key, vote_file)


def read_key(settings: ServeSettings) -> str | None:
    """Return the key from the file or the environment; it never stands on the command line, which others can see.

    Raises:
        SettingsError: if there are two, or one that would be easy to guess or hard to send.
    """
    file, key = settings.api_key_file, os.environ.get(KEY_VARIABLE)
    if file is not None and key is not None:
        raise SettingsError(f"the key must come from `api_key_file` or from {KEY_VARIABLE}, but both are set")
    if file is not None:
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"`api_key_file` = {file} cannot be read: {reason(error)}") from error
    if key is None:
        return None
    if len(key) < MIN_KEY_LENGTH or not (key.isascii() and key.isprintable()) or " " in key:
        raise SettingsError(
            f"the key must be at least {MIN_KEY_LENGTH} letters, digits or signs without a space: make one with "
            "`openssl rand -hex 32`"
        )
    return key


def require_key(host: str, key: str | None) -> None:
    """Raise SettingsError if other machines could come in without a key."""
    if key is None and not is_loopback(host):
        raise SettingsError(
            f"`host` = {host} lets other machines in, so there must be a key: put one into {KEY_VARIABLE} or a file "
            "that `api_key_file` names"
        )


def is_loopback(host: str) -> bool:
    """True if only this machine can reach the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(settings: ServeSettings, listen: Callable[[str, int, float], socket.socket]) -> socket.socket:
    try:
        return listen(settings.host, settings.port, settings.write_timeout)
    except OSError as error:
        raise SettingsError(
            f"`host` = {settings.host} and `port` = {settings.port} cannot be listened on: {error.strerror or error}; "
            "--port 0 takes a free port"
        ) from error


def address(listening: socket.socket) -> str:
    """Return http://127.0.0.1:8000, as it is listened on."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
