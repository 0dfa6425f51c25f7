"""The application where two models are compared: pairs and votes in the place of single replies.

POST /v1/pairs  two replies to a conversation, in random order
POST /v1/votes  which of them is better
"""

from collections.abc import Mapping, Sequence

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from gpt2ft.server.comparison.engines import Engines
from gpt2ft.server.comparison.pairs import Comparison, VoteRequest
from gpt2ft.server.errors import ApiError
from gpt2ft.server.http.streaming import several_replies
from gpt2ft.server.openai.requests import ChatRequest, json_body, parse, validated
from gpt2ft.server.openai.responses import Json, ServedModel, dumped
from gpt2ft.server.reply import Reply
from gpt2ft.server.routes import CHAT, COMPLETIONS, MODELS, add_models, bare_app

PAIRS = "/v1/pairs"
VOTES = "/v1/votes"
API_PATHS = frozenset({MODELS, CHAT, COMPLETIONS, PAIRS, VOTES})


def create_app(engines: Engines, comparison: Comparison, model: ServedModel, page: Mapping[str, Response]) -> FastAPI:
    """Return the application, without the access middleware; `model` stands for both."""
    app = bare_app(engines, page)
    add_models(app, model, lambda: {"votes": comparison.num_votes})
    _add_pairs(app, engines, comparison, model)
    return app


def _add_pairs(app: FastAPI, engines: Engines, comparison: Comparison, model: ServedModel) -> None:
    @app.post(PAIRS)
    async def pair(http_request: Request) -> Response:
        content_types, body = http_request.headers.getlist("content-type"), await http_request.body()
        request = parse(ChatRequest, content_types, body)
        model.refuse_another(request.model)
        engines.refuse_if_unavailable()
        asked = await run_in_threadpool(comparison.ask, request)

        def complete(replies: Sequence[Reply], texts: Sequence[str]) -> bytes:
            return dumped(comparison.offer(asked, replies, texts))

        return several_replies(asked.id, zip(engines.all, asked.requests, strict=True), complete)

    @app.post(VOTES)
    async def vote(http_request: Request) -> Json:
        given = json_body(http_request.headers.getlist("content-type"), await http_request.body())
        return await run_in_threadpool(comparison.vote, validated(VoteRequest, given))

    @app.post(CHAT)
    @app.post(COMPLETIONS)
    async def refuse() -> None:
        """A single reply could be compared with those of a pair, and would tell which model is which."""
        message = f"two models are compared here, whose replies come in pairs: POST {PAIRS}"
        raise ApiError(404, message, "not_found")
