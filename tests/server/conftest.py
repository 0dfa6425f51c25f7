"""A server in this process, on a port of its own, with a tiny model whose steps a test can hold up."""

import threading
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import pytest
from running_server import N_POSITIONS, TIMEOUT, Running


@pytest.fixture(scope="session")
def inference_model(lively, tokenizer):
    """In float64; its replies are lively and often end by themselves."""
    import torch

    from gpt2ft.inference.model import InferenceModel
    from gpt2ft.inference.prompt_format import ChatPromptFormat

    gpt2 = lively(tokenizer.padded_size, N_POSITIONS)
    with torch.no_grad():
        gpt2.wte.weight[tokenizer.end_id] *= 4
    return InferenceModel(gpt2, tokenizer, ChatPromptFormat(tokenizer), "tiny", "0123456789abcdef")


@pytest.fixture(scope="session")
def serving(inference_model):
    """with serving(slots=2, ...) as running: settings as on the command line."""
    pytest.importorskip("uvicorn", reason="needs the extra [serve]")
    from gpt2ft.server import service
    from gpt2ft.server.comparison import service as comparison
    from gpt2ft.server.comparison.vote_file import VoteFile
    from gpt2ft.server.http import connection
    from gpt2ft.settings.using import ServeSettings

    @contextmanager
    def serve(key=None, gpt2=None, ready=True, votes=None, **settings):
        """Beside another model that says other things where there is a file for `votes`."""
        given = ServeSettings(host="127.0.0.1", port=0, **settings)
        listening = connection.listen(given.host, given.port, given.write_timeout)
        model = replace(inference_model, gpt2=gpt2 or deepcopy(inference_model.gpt2))
        if votes is None:
            server = service.create(given, model, "tiny", key)
        else:
            models = [model, another(inference_model)]
            server = comparison.create(given, models, "comparison", key, VoteFile(votes))
        running = Running(server, listening, model)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            if ready:
                running.until_ready()
            yield running
        finally:
            running.gate.open()
            running.hook.remove()
            server.should_exit = True
            thread.join(TIMEOUT)
            listening.close()
            assert not thread.is_alive()

    return serve


def another(model):
    """A model in the same shape that says other things."""
    import torch

    gpt2 = deepcopy(model.gpt2)
    with torch.no_grad():
        gpt2.wpe.weight.neg_()
    return replace(model, gpt2=gpt2, source="another", digest="fedcba9876543210")


@pytest.fixture(scope="module")
def server(serving):
    """One for the tests of a module that leave it as it was."""
    with serving(slots=3, queue=8) as running:
        yield running


@pytest.fixture(autouse=True)
def idle_again(request):
    """Let the requests of one test end before the next one begins."""
    yield
    if "server" in request.fixturenames:
        running = request.getfixturevalue("server")
        running.gate.open()
        running.until(lambda: running.engine.num_unfinished == 0, "idleness")


@pytest.fixture(scope="session")
def alone(inference_model):
    """alone(turns, most, **sampling): the text that `generate` gives for a conversation by itself."""
    from gpt2ft.inference.generate import generate
    from gpt2ft.settings.sections import SamplingSettings

    tokenizer, prompt_format = inference_model.tokenizer, inference_model.prompt_format

    def text(turns, most, **sampling):
        prompt = [id for turn in prompt_format.render(turns) for id in turn] + prompt_format.generation_prompt
        decoder = inference_model.decoder(prompt_format.stop_ids)
        [reply] = generate(decoder, [prompt], most, SamplingSettings(**sampling))
        return tokenizer.decode(reply.ids), len(prompt), len(reply.ids), "stop" if reply.stopped else "length"

    return text
