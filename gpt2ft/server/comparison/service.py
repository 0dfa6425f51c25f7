"""The server on which people compare two models, put together as the settings say."""

from collections.abc import Sequence

from gpt2ft.inference.model import InferenceModel
from gpt2ft.server.comparison.engines import Engines
from gpt2ft.server.comparison.pairs import Comparison, Contestant
from gpt2ft.server.comparison.routes import API_PATHS, create_app
from gpt2ft.server.comparison.vote_file import VoteFile
from gpt2ft.server.http.access import AccessMiddleware
from gpt2ft.server.http.server import Server
from gpt2ft.server.openai.conversion import RequestConverter
from gpt2ft.server.openai.responses import render_error
from gpt2ft.server.page_files import read_page
from gpt2ft.server.service import access_policy, describe, make_engine
from gpt2ft.settings.using import ServeSettings


def create(
    settings: ServeSettings, models: Sequence[InferenceModel], name: str, key: str | None, votes: VoteFile
) -> Server:
    """Return a server that starts both engines when it runs; clients know both models by one name and one context.

    Args:
        key: what clients must give, if anything.
    """
    context = min(model.n_positions for model in models)
    settings = settings.model_copy(update={"max_tokens": min(settings.max_tokens or context, context)})
    contestants = [Contestant(make_engine(settings, model), RequestConverter(model, settings)) for model in models]
    engines, page = Engines([contestant.engine for contestant in contestants]), read_page()
    comparison = Comparison(contestants, votes, settings.vote_timeout)
    app = create_app(engines, comparison, describe(name, "", contestants[0].converter), page)
    policy = access_policy(settings, key, page.keys())
    return Server(AccessMiddleware(app, policy, API_PATHS, render_error), engines, settings, render_error)
