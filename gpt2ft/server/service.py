"""The server of one model, put together as the settings say."""

from collections.abc import Set
from functools import partial

from gpt2ft.inference.model import InferenceModel
from gpt2ft.server import routes
from gpt2ft.server.engine import Engine
from gpt2ft.server.http.access import AccessMiddleware, AccessPolicy, host_of
from gpt2ft.server.http.server import Server
from gpt2ft.server.openai.conversion import RequestConverter
from gpt2ft.server.openai.responses import ServedModel, render_error
from gpt2ft.server.page_files import read_page
from gpt2ft.settings.using import ServeSettings


def create(settings: ServeSettings, inference_model: InferenceModel, name: str, key: str | None) -> Server:
    """Return a server that starts its engine when it runs.

    Args:
        name: what clients call the model.
        key: what they must give, if anything.
    """
    engine, page = make_engine(settings, inference_model), read_page()
    converter = RequestConverter(inference_model, settings)
    app = routes.create_app(engine, converter, describe(name, inference_model.digest, converter), page)
    policy = access_policy(settings, key, page.keys())
    return Server(AccessMiddleware(app, policy, routes.API_PATHS, render_error), engine, settings, render_error)


def describe(name: str, digest: str, converter: RequestConverter) -> ServedModel:
    """Return the model as clients know it."""
    return ServedModel.now(name, digest, converter.defaults, {"max_tokens": converter.most_tokens})


def access_policy(settings: ServeSettings, key: str | None, page_paths: Set[str]) -> AccessPolicy:
    """Return the rules for whoever comes; the page, and whether the server is there, are open to all."""
    hosts = tuple(host for host in map(host_of, (settings.host, *settings.allowed_hosts)) if host)
    open_paths = frozenset({routes.HEALTH, routes.READY, *page_paths})
    return AccessPolicy(hosts, key, open_paths, settings.body_bytes, settings.body_seconds)


def make_engine(settings: ServeSettings, inference_model: InferenceModel) -> Engine:
    """Chats end with a turn, documents with `<|endoftext|>`: the decoder knows both kinds of ends."""
    end_of_text_id = inference_model.tokenizer.end_of_text_id
    stop_ids = sorted({*inference_model.prompt_format.stop_ids, end_of_text_id})
    make_decoder = partial(inference_model.decoder, stop_ids, settings.slots, settings.prefill_chunk)
    return Engine(make_decoder, end_of_text_id, settings.slots + settings.queue, settings.request_timeout)
