"""A browser, its tabs, and the server that they visit."""

import pytest
from browser import TIMEOUT, open_browser


@pytest.fixture(scope="package")
def browser():
    """For this package alone."""
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="package")
def profile(browser):
    """Storage and settings that tabs share."""
    with browser.new_context() as profile:
        profile.set_default_timeout(TIMEOUT)
        yield profile


@pytest.fixture(scope="package")
def scripted_server(tiny_gpt2, tokenizer):
    pytest.importorskip("fastapi", reason="the server's extra is missing: pip install -e '.[serve]'")
    from gpt2ft.inference.model import InferenceModel

    from .scripted import ScriptedDecoder, ScriptedServer

    server = ScriptedServer(tiny_gpt2(len(tokenizer), 1024), tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InferenceModel, "decoder", lambda *_: ScriptedDecoder(server.scripts))
        server.start()
        yield server
        server.stop()


@pytest.fixture
def server(scripted_server):
    return scripted_server


@pytest.fixture(autouse=True)
def idle_again(server):
    """In place of that of the other servers."""
    yield
    server.start_over()


@pytest.fixture(scope="package")
def tabs():
    """Those that no test is using now: to open one takes longer than most tests."""
    return []


@pytest.fixture
def new_visit(profile, tabs, server):
    """new_visit() opens another tab."""
    from .visit import Visit

    visits = []

    def begin():
        visits.append(tabs.pop() if tabs else Visit(profile.new_page()))
        return visits[-1].begin(server.url)

    yield begin
    tabs.extend(visits)
    for visit in visits:
        visit.end()


@pytest.fixture
def visit(new_visit):
    return new_visit()
