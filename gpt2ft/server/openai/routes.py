"""The routes of OpenAI's API, as far as one model serves them, and the page.

GET  /                     the page, and its files
GET  /health               whether the process answers; no work of the model is ever done here
GET  /ready                whether the model does
GET  /v1/models            its name
POST /v1/chat/completions  a reply to a conversation
POST /v1/completions       how a text goes on
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from fastapi import APIRouter, FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gpt2ft.server.engine import Engine, GenerationRequest
from gpt2ft.server.errors import FAILED, ApiError
from gpt2ft.server.http.access import AccessMiddleware, AccessPolicy, App
from gpt2ft.server.http.streaming import ReplyResponse, ReplyStream, StreamBridge
from gpt2ft.server.openai.conversion import RequestConverter
from gpt2ft.server.openai.requests import BaseRequest, ChatRequest, CompletionRequest, parse
from gpt2ft.server.openai.responses import Json, ResponseBuilder, Shape, model_object
from gpt2ft.server.page_files import read_page

OPEN = ("/health", "/ready")
MODELS = "/v1/models"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Served:
    """The one model: its name for clients, a fingerprint of its weights, when it was loaded (seconds since 1970)."""

    name: str
    fingerprint: str
    created: int

    @classmethod
    def now(cls, name: str, digest: str) -> "Served":
        return cls(name, f"fp_{digest[:10]}", int(time.time()))

    def refuse_another(self, name: str | None) -> None:
        """Raises ApiError if a request names another model; one that names none means this one."""
        if name not in (None, self.name):
            raise ApiError(404, f"there is no such model here: this is `{self.name}`", "model_not_found", "model")


def create_app(engine: Engine, converter: RequestConverter, served: Served, access: AccessPolicy) -> App:
    """The whole application. The open paths of `access` are completed here: the page, health and readiness."""
    page = read_page()
    open_paths = frozenset({*OPEN, *page})
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    for router in (_states(engine), _models(served), _replies(engine, converter, served), _files(page)):
        api.include_router(router)
    api.add_exception_handler(ApiError, _refused)
    api.add_exception_handler(HTTPException, _not_routed)
    api.add_exception_handler(Exception, _failed)
    return AccessMiddleware(api, replace(access, open_paths=open_paths), open_paths | {MODELS, CHAT, COMPLETIONS})


def _states(engine: Engine) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Json:
        return {"status": "ok", "running": engine.num_running, "waiting": engine.num_waiting}

    @router.get("/ready")
    async def ready() -> Json:
        engine.refuse_if_unavailable()
        return {"status": "ready"}

    return router


def _models(served: Served) -> APIRouter:
    router = APIRouter()
    described = model_object(served.name, served.created)

    @router.get(MODELS)
    async def models() -> Json:
        return {"object": "list", "data": [described]}

    @router.get(MODELS + "/{name:path}")
    async def model(name: str) -> Json:
        served.refuse_another(name)
        return described

    return router


def _replies(engine: Engine, converter: RequestConverter, served: Served) -> APIRouter:
    router = APIRouter()

    @router.post(CHAT)
    async def chat(request: Request) -> Response:
        return await reply(request, ChatRequest, converter.chat, "chat")

    @router.post(COMPLETIONS)
    async def completion(request: Request) -> Response:
        return await reply(request, CompletionRequest, converter.completion, "text")

    async def reply(
        request: Request, kind: type[BaseRequest], interpret: Callable[..., GenerationRequest], shape: Shape
    ) -> Response:
        asked = parse(kind, request.headers.getlist("content-type"), await request.body())
        served.refuse_another(asked.model)
        engine.refuse_if_unavailable()
        order = await run_in_threadpool(interpret, asked)
        response_builder = ResponseBuilder(shape, served.name, served.fingerprint, asked.includes_usage)
        return (ReplyStream if asked.stream else ReplyResponse)(StreamBridge(engine, order), response_builder)

    return router


def _files(page: Mapping[str, Response]) -> APIRouter:
    router = APIRouter()
    for path, response in page.items():
        router.add_api_route(path, partial(_same, response), methods=["GET", "HEAD"])
    return router


async def _same(response: Response) -> Response:
    return response


async def _refused(request: Request, error: ApiError) -> Response:
    return Response(error.content(), error.status, error.headers())


async def _not_routed(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another")
        refused = ApiError(405, f"the method here must be {allowed}", "method_not_allowed")
    else:
        refused = ApiError(error.status_code, "there is nothing at this path", "not_found")
    return await _refused(request, refused)


async def _failed(request: Request, error: Exception) -> Response:
    """Answers; the door, which the error reaches too, writes the log."""
    return await _refused(request, ApiError(500, FAILED, "internal_error"))
