"""Blocks compiled: one graph for all layers and streams, the same numbers, and an error where another would be needed.

Graphs are traced here and computed by PyTorch's own kernels, which takes a second; that Inductor's are right is a
`long` test, and at every start of a run that has them.
"""

import numpy as np
import pytest
import torch
from facts import tells
from torch._dynamo.utils import counters

from gpt2ft.errors import SettingsError
from gpt2ft.model import compiled, logprobs
from gpt2ft.model.attention import attention_for
from gpt2ft.model.compiled import CompiledBlocks, Recompiled, choose_compiling
from gpt2ft.model.gpt2 import GPT2, Block, GPT2Config
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.lora import apply_lora
from gpt2ft.settings.sections import LoRASettings
from gpt2ft.training.preflight import PreflightError, check_compiled

VOCABULARY = 100
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
IN_FLOAT32 = torch.autocast("cpu", enabled=False)


@pytest.fixture(autouse=True)
def fresh():
    """Other tests count graphs too."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def graphs(monkeypatch):
    """graphs(): the number of graphs of blocks so far in a test. They are differentiated as Inductor's are."""
    monkeypatch.setattr(logprobs, "_softmax", lambda compiles: (logprobs._exponentiate, logprobs._gradient))
    traced = torch.compile(Block.compute, backend="aot_eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(compiled, "_compute", lambda: traced)
    return lambda: counters["stats"]["unique_graphs"]


@pytest.fixture
def streams(random_stream):
    random = np.random.default_rng(0)
    return [random_stream(random, VOCABULARY) for _ in range(3)]


def deep_gpt2(lora=None, activation_checkpointing=False):
    gpt2 = GPT2(GPT2Config(128, 384, 16, 12, 2)).initialize(torch.Generator().manual_seed(0))
    if lora:
        apply_lora(gpt2, LoRASettings(rank=2, **lora), [1, 2], torch.Generator().manual_seed(0))
    gpt2.activation_checkpointing = activation_checkpointing
    return gpt2


def results(model, stream):
    """The log-probs of a stream, then the gradients of all that is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    log_probs = model(stream)
    return [log_probs.detach(), *torch.autograd.grad((log_probs * stream.weights).sum(), trained)]


@pytest.mark.parametrize(
    "kind",
    [{}, {"activation_checkpointing": True}, {"lora": {}}, {"lora": {"dora": True, "targets": ["q", "v", "fc"]}}],
    ids=["all", "checkpointing", "lora", "dora"],
)
def test_one_graph_serves_all_layers_and_streams(kind, graphs, streams):
    gpt2 = deep_gpt2(**kind)
    plain, by_graph = (TargetLogProbs(gpt2, VOCABULARY, "dense", compiles=compiles) for compiles in (False, True))
    for stream in streams:
        for expected, found in zip(results(plain, stream), results(by_graph, stream), strict=True):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert graphs() == 1
    with torch.no_grad():
        for stream in streams:
            assert torch.allclose(by_graph(stream), plain(stream), atol=1e-5)
    assert graphs() == 2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_part_of_the_graph(graphs, random_horizons, monkeypatch):
    """Its backward pass needs a GPU; the graph of the forward pass is the same for all layers and streams."""
    traced = torch.compile(Block.compute, backend="eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(compiled, "_compute", lambda: traced)
    random, gpt2, blocks = np.random.default_rng(0), deep_gpt2(), CompiledBlocks()
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        horizons = random_horizons(random, 256, 250, longest=40)
        flex, dense = (attention_for(horizons, 250, backend) for backend in ("flex", "dense"))
        y = z = x
        with torch.no_grad():
            for block in gpt2.h:
                y, z = block(y, flex, blocks), block(z, dense)
        assert torch.allclose(y, z, atol=1e-5)
    assert graphs() - 1 <= 1  # on a CPU FlexAttention itself has one beside it


def test_what_would_be_compiled_anew_is_an_error(graphs, streams):
    model = TargetLogProbs(deep_gpt2(), VOCABULARY, "dense", compiles=True)
    results(model, streams[0])
    model.gpt2.h[3].double()
    with pytest.raises(Recompiled) as refusal:
        model(streams[1])
    assert "mlp" in str(refusal.value) or "ln_1" in str(refusal.value)  # what differs
    assert graphs() == 1


def test_held_out_streams_may_be_shorter(graphs, streams):
    blocks, gpt2 = CompiledBlocks(), deep_gpt2()

    def run(length):
        attend = attention_for(torch.arange(1, length + 1), length, "dense")
        gpt2(torch.zeros(length, dtype=torch.long), torch.arange(length), attend, compiled=blocks)

    run(128)
    with torch.no_grad():
        run(64)
        run(128)
    with pytest.raises(Recompiled):
        run(64)


def choose(asked, device, backend="dense", strategy="ddp"):
    return choose_compiling(asked, device, backend, strategy, "training.compile")


def test_blocks_are_compiled_by_default_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(compiled, "compiler_problem", lambda: None)
    monkeypatch.setattr(compiled, "cpp_compiler_problem", lambda: None)
    assert choose("auto", CUDA, "flex")
    assert choose("auto", CUDA, "dense", "fsdp2")
    assert not choose("auto", CUDA, "segments")
    assert not choose("auto", CUDA, "flex", "zero3")
    assert not choose("auto", CPU)
    assert not choose("false", CUDA, "flex")
    assert choose("true", CPU)


@pytest.mark.parametrize(
    ("device", "backend", "strategy", "reason"),
    [
        (CUDA, "dense", "ddp", "no C compiler"),
        (CUDA, "dense", "zero3", "ZeRO-3 ... fsdp2"),
        (CPU, "dense", "ddp", "no C++ compiler"),
        (CPU, "segments", "ddp", "segments ... dense"),
    ],
)
def test_blocks_that_cannot_be_compiled_but_are_to_be(device, backend, strategy, reason, monkeypatch):
    monkeypatch.setattr(compiled, "compiler_problem", lambda: "there is no C compiler")
    monkeypatch.setattr(compiled, "cpp_compiler_problem", lambda: "there is no C++ compiler")
    with pytest.raises(SettingsError) as refusal:
        choose("true", device, backend, strategy)
    assert tells(str(refusal.value), f"{reason} ... `--training.compile false`")
    assert not choose("auto", device, backend, strategy)


class TestCheck:
    def test_compiled_is_plain(self, graphs, streams):
        model = TargetLogProbs(deep_gpt2({"dora": True}).train(), VOCABULARY, "dense", compiles=True)
        of_log_probs, of_gradients = check_compiled(model, streams[0], IN_FLOAT32)
        assert max(of_log_probs, of_gradients) < 1e-5
        assert model.training
        assert graphs() == 2
        assert check_compiled(model, streams[0], torch.autocast("cpu", torch.bfloat16))[1] < 5e-2

    @pytest.mark.parametrize("what", ["output", "gradient"])
    def test_a_compiled_block_that_computes_something_else(self, what, streams, monkeypatch):
        def wrong(block, x, attend):
            output = block.compute(x, attend)
            if what == "gradient":
                return output.detach() + (output - output.detach()) * 1.1
            return output + 0.01 * torch.ones_like(x).cumsum(-1)

        monkeypatch.setattr(compiled, "_compute", lambda: wrong)
        model = TargetLogProbs(deep_gpt2(), VOCABULARY, "dense", compiles=True)
        with pytest.raises(PreflightError, match=r"compiled blocks or head differ .*--training.compile false"):
            check_compiled(model, streams[0], IN_FLOAT32)

    @pytest.mark.parametrize("what", ["log-probs", "gradient"])
    def test_a_compiled_head_that_computes_something_else(self, what, graphs, streams, monkeypatch):
        def off(logits, targets):
            log_probs, largest, sums = logprobs._exponentiate(logits, targets)
            return log_probs + 0.01, largest, sums

        def steeper(*arguments, dtype):
            return logprobs._gradient(*arguments, dtype=dtype) * 1.1

        passes = logprobs._exponentiate, logprobs._gradient
        wrong = (off, passes[1]) if what == "log-probs" else (passes[0], steeper)
        monkeypatch.setattr(logprobs, "_softmax", lambda compiles: wrong if compiles else passes)
        model = TargetLogProbs(deep_gpt2(), VOCABULARY, "dense", compiles=True)
        with pytest.raises(PreflightError, match=r"compiled blocks or head differ .*--training.compile false"):
            check_compiled(model, streams[0], IN_FLOAT32)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_inductor_makes_of_it_is_plain(dtype, streams):
    """On a CPU, by its C++ compiler."""
    model = TargetLogProbs(deep_gpt2(), VOCABULARY, "dense", compiles=True)
    of_log_probs, of_gradients = check_compiled(
        model, streams[0], torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    )
    assert of_log_probs < 1e-5
    assert of_gradients < (1e-5 if dtype == torch.float32 else 2e-2)
