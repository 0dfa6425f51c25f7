"""Engine, API, door and server of one model, put together as the settings say."""

from dataclasses import fields

from gpt2ft.inference.generate import Decoder, suppressed_token_mask
from gpt2ft.inference.prompt_format import PromptFormat
from gpt2ft.inference.sampling import Sampling
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.server.engine import Engine
from gpt2ft.server.http.access import AccessPolicy, host_of
from gpt2ft.server.http.connection import Patience
from gpt2ft.server.http.server import Server
from gpt2ft.server.openai.conversion import Limits, RequestConverter
from gpt2ft.server.openai.routes import Served, create_app
from gpt2ft.settings.scripts import ServeSettings
from gpt2ft.text.tokenizer import ChatTokenizer

ServedModel = tuple[GPT2, ChatTokenizer, PromptFormat]


def create(settings: ServeSettings, speaking: ServedModel, served: Served, key: str | None) -> Server:
    """A server that starts its engine when it runs. `key` is what clients must give."""
    model, tokenizer, frame = speaking
    engine = _engine(settings, model, tokenizer, frame)
    converter = _interpreter(settings, model, tokenizer, frame)
    hosts = tuple(host for host in map(host_of, (settings.host, *settings.allowed_hosts)) if host)
    access = AccessPolicy(hosts, key, settings.body_bytes, settings.body_seconds)
    app = create_app(engine, converter, served, access)
    patience = Patience(settings.body_seconds, settings.write_timeout, settings.connections)
    return Server(app, engine, patience, settings.shutdown_timeout)


def _engine(settings: ServeSettings, model: GPT2, tokenizer: ChatTokenizer, frame: PromptFormat) -> Engine:
    """Chats end with a turn, documents with `<|endoftext|>`: the decoder knows both kinds of ends."""
    stop_ids = sorted({*frame.stop_ids, tokenizer.end_of_text_id})
    forbidden = suppressed_token_mask(tokenizer, model.wte.weight, stop_ids)

    def make_decoder() -> Decoder:
        return Decoder(model, stop_ids, forbidden, settings.slots, settings.prefill_chunk)

    return Engine(make_decoder, tokenizer.end_of_text_id, settings.slots + settings.queue, settings.request_timeout)


def _interpreter(
    settings: ServeSettings, model: GPT2, tokenizer: ChatTokenizer, frame: PromptFormat
) -> RequestConverter:
    n_positions = model.config.n_positions
    named = [field.name for field in fields(Sampling) if field.name != "seed"]
    sampling = Sampling(**{name: getattr(settings, name) for name in named})
    limits = Limits(settings.messages, settings.max_tokens or n_positions, settings.max_new_tokens)
    return RequestConverter(tokenizer, frame, n_positions, sampling, limits)
