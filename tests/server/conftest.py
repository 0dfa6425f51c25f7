"""A server in this process, on a port of its own, with a tiny model whose steps a test can hold up."""

import threading
from contextlib import contextmanager
from copy import deepcopy

import pytest
from tests_of_serving import N_POSITIONS, PATIENCE, Running, eventually


@pytest.fixture(scope="session")
def speaking(lively, tokenizer):
    """A model in float64 whose replies are lively and often end by themselves, its tokenizer and its frame."""
    import torch

    from gpt2ft.inference.prompt_format import ChatPromptFormat

    model = lively(tokenizer.padded_size, N_POSITIONS)
    with torch.no_grad():
        model.wte.weight[tokenizer.end_id] *= 4
    return model, tokenizer, ChatPromptFormat(tokenizer)


@pytest.fixture(scope="session")
def serving(speaking):
    """with serving(slots=2, ...) as running: settings as on the command line."""
    pytest.importorskip("uvicorn", reason="needs the extra [serve]")
    from gpt2ft.server import service
    from gpt2ft.server.http import connection
    from gpt2ft.settings.scripts import ServeSettings

    @contextmanager
    def serve(key=None, model=None, ready=True, **settings):
        given = ServeSettings(host="127.0.0.1", port=0, **settings)
        listening = connection.listen(given.host, given.port, given.write_timeout)
        parts = (model or deepcopy(speaking[0]), *speaking[1:])
        server = service.create(given, parts, service.Served.now("tiny", "0123456789abcdef"), key)
        running = Running(server, listening, parts)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            if ready:
                eventually(lambda: running.engine.is_ready, "readiness")
            yield running
        finally:
            running.gate.open()
            running.hook.remove()
            server.should_exit = True
            thread.join(PATIENCE)
            listening.close()
            assert not thread.is_alive()

    return serve


@pytest.fixture(scope="module")
def server(serving):
    """One for the tests of a module that leave it as it was."""
    with serving(slots=3, queue=8) as running:
        yield running


@pytest.fixture(autouse=True)
def idle_again(request):
    """What one test asked for is over before the next one begins."""
    yield
    if "server" in request.fixturenames:
        running = request.getfixturevalue("server")
        running.gate.open()
        eventually(lambda: running.engine.num_unfinished == 0, "idleness")


@pytest.fixture(scope="session")
def alone(speaking):
    """alone(turns, most, **sampling): the text that `generate` gives for a conversation by itself."""
    from gpt2ft.inference.generate import generate, suppressed_token_mask
    from gpt2ft.inference.sampling import Sampling

    model, tokenizer, frame = speaking

    def text(turns, most, **sampling):
        prompt = [id for turn in frame.render(turns) for id in turn] + frame.opening
        forbidden = suppressed_token_mask(tokenizer, model.wte.weight, frame.stop_ids)
        [reply] = generate(model, [prompt], most, frame.stop_ids, forbidden, Sampling(**sampling))
        return tokenizer.decode(reply.ids), len(prompt), len(reply.ids), "stop" if reply.stopped else "length"

    return text
