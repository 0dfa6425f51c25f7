"""The application: the paths of OpenAI's API as far as one model serves them, the server's states, and the page.

GET  /                     the page, and its files
GET  /health               the process answers; the model does no work for it
GET  /ready                the model answers; 503 if not
GET  /v1/models            its name
POST /v1/chat/completions  a reply to a conversation
POST /v1/completions       the continuation of a text
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gpt2ft.server.engine import Engine
from gpt2ft.server.errors import ApiError, internal
from gpt2ft.server.http.refusal import refusal
from gpt2ft.server.http.streaming import StreamBridge, reply_stream, whole_reply
from gpt2ft.server.openai.conversion import RequestConverter
from gpt2ft.server.openai.requests import BaseRequest, ChatRequest, CompletionRequest, parse
from gpt2ft.server.openai.responses import Json, Kind, OpenAIResponseBuilder, ServedModel, render_error
from gpt2ft.server.reply import GenerationRequest

if TYPE_CHECKING:
    from gpt2ft.server.comparison.engines import Engines

HEALTH = "/health"
READY = "/ready"
MODELS = "/v1/models"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
API_PATHS = frozenset({MODELS, CHAT, COMPLETIONS})


def create_app(
    engine: Engine, converter: RequestConverter, model: ServedModel, page: Mapping[str, Response]
) -> FastAPI:
    """Return the application, without the access middleware; `page` holds a response for each path."""
    app = bare_app(engine, page)
    add_models(app, model)
    _add_replies(app, engine, converter, model)
    return app


def bare_app(engine: "Engine | Engines", page: Mapping[str, Response]) -> FastAPI:
    """Return the application without any model's paths."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _add_states(app, engine)
    for path, response in page.items():
        app.add_api_route(path, partial(_same, response), methods=["GET", "HEAD"])
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_unrouted)
    app.add_exception_handler(Exception, _answer_failure)
    return app


def _add_states(app: FastAPI, engine: "Engine | Engines") -> None:
    @app.get(HEALTH)
    async def health() -> Json:
        return {"status": "ok", "running": engine.num_running, "waiting": engine.num_waiting}

    @app.get(READY)
    async def ready() -> Json:
        engine.refuse_if_unavailable()
        return {"status": "ready"}


def add_models(app: FastAPI, model: ServedModel, more: Callable[[], Json] = dict) -> None:
    """Add the paths that describe the model; `more` is said of it each time."""

    @app.get(MODELS)
    async def list_models() -> Json:
        return {"object": "list", "data": [model.describe() | more()]}

    @app.get(MODELS + "/{name:path}")
    async def describe_model(name: str) -> Json:
        model.refuse_another(name)
        return model.describe() | more()


def _add_replies(app: FastAPI, engine: Engine, converter: RequestConverter, model: ServedModel) -> None:
    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        return await reply(request, "chat", ChatRequest, converter.chat)

    @app.post(COMPLETIONS)
    async def completion(request: Request) -> Response:
        return await reply(request, "text", CompletionRequest, converter.completion)

    async def reply(
        http_request: Request, kind: Kind, shape: type[BaseRequest], convert: Callable[[Any], GenerationRequest]
    ) -> Response:
        request = parse(shape, http_request.headers.getlist("content-type"), await http_request.body())
        model.refuse_another(request.model)
        engine.refuse_if_unavailable()
        bridge = StreamBridge(engine, await run_in_threadpool(convert, request))
        builder = OpenAIResponseBuilder(kind, model, request.includes_usage)
        return (reply_stream if request.stream else whole_reply)(bridge, builder)


async def _same(response: Response) -> Response:
    return response


async def _answer_error(request: Request, error: ApiError) -> Response:
    return refusal(error, render_error)


async def _answer_unrouted(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another")
        return refusal(ApiError(405, f"the method here must be {allowed}", "method_not_allowed"), render_error)
    return refusal(ApiError(error.status_code, "there is nothing at this path", "not_found"), render_error)


async def _answer_failure(request: Request, error: Exception) -> Response:
    """Answer; the access middleware, which the error reaches too, writes the log."""
    return refusal(internal(), render_error)
