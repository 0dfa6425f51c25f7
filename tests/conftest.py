"""What many tests share: the real data where it is there, the small tokenizer, tiny models, hand-made token trees."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

# Read when torch is imported, here and in what the tests start: there is a test for each core, and those who wait for
# others do not keep them from it.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
TEST_DATA = Path(os.environ.get("GPT2FT_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))
LENGTH_OF_A_MESSAGE = 1000  # in hand-made trees token m * 1000 + i is token i of message m


def pytest_xdist_auto_num_workers(config):
    """Folders are shared by two processes, but not the GPU, where speed is measured; a few files would be done before a
    second one has imported PyTorch."""
    files = all(Path(argument.partition("::")[0]).suffix == ".py" for argument in config.args)
    return 0 if files or config.option.markexpr == "gpu" else min(2, os.cpu_count())


def pytest_configure(config):
    """Hide GPUs unless their tests are asked for: a run must not be refused for one that it does not use."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, and -m gpu")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Tokenised data goes to a folder of this test run, never to the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GPT2FT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def test_data():
    """test_data("oasst/en_100_tree.jsonl") is the path of a real file; the test is skipped where it is missing."""

    def find(name):
        file = TEST_DATA / name
        if not file.exists():
            pytest.skip(f"needs the real data {file}: set GPT2FT_TEST_DATA")
        return file

    return find


@pytest.fixture(scope="session")
def tokenizer():
    """The small tokenizer that comes with the quickstart."""
    from gpt2ft import quickstart
    from gpt2ft.text.tokenizer import ChatTokenizer

    return ChatTokenizer.from_folder(quickstart.MODEL)


@pytest.fixture(scope="session")
def gpt2_tokenizer(test_data):
    """GPT-2's own."""
    from gpt2ft.text.tokenizer import ChatTokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(test_data("tiktoken_cache")))
        return ChatTokenizer.gpt2()


@pytest.fixture(scope="session")
def tiny_gpt2():
    """tiny_gpt2(vocab_size, n_positions): a GPT-2 of two small layers with seeded random weights."""
    import torch

    from gpt2ft.model.gpt2 import GPT2, GPT2Config

    def make(vocab_size, n_positions, n_embd=64, seed=0):
        config = GPT2Config(vocab_size, n_positions, n_embd=n_embd, n_layer=2, n_head=2)
        return GPT2(config).initialize(torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def lively(tiny_gpt2):
    """lively(vocab_size, n_positions): what it says depends on all before; float64, so rounding decides nothing."""
    import torch

    def make(vocab_size, n_positions, scale=12.0):
        model = tiny_gpt2(vocab_size, n_positions, n_embd=32).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        return model

    return make


@pytest.fixture(scope="session")
def make_tree():
    """make_tree(("user", 3, -1), ("assistant", 4, 0)): nodes of (role, tokens, parent)."""
    from gpt2ft.conversation import ROLES
    from gpt2ft.data.token_tree import TokenTree, is_supervised

    def make(*nodes, group=0):
        roles, lengths, parents = zip(*nodes, strict=True)
        tokens = [message * LENGTH_OF_A_MESSAGE + i for message, length in enumerate(lengths) for i in range(length)]
        roles = np.array([ROLES.index(role) for role in roles], np.int8)
        return TokenTree(
            tokens=np.array(tokens),
            lengths=np.array(lengths, np.int32),
            parents=np.array(parents, np.int32),
            roles=roles,
            weights=is_supervised(roles).astype(np.float32),
            groups=np.full(len(nodes), group, np.int32),
            messages=np.arange(len(nodes), dtype=np.int32),
        )

    return make


@pytest.fixture(scope="session")
def random_tree(make_tree):
    """random_tree(random): up to 24 nodes of up to 30 tokens, users and assistants in turn, often a system root."""

    def make(random):
        nodes = [("system" if random.random() < 0.3 else "user", int(random.integers(2, 12)), -1)]
        path = [0]
        for node in range(1, int(random.integers(2, 25))):
            path = path[: len(path) - min(int(random.geometric(0.6)) - 1, len(path) - 1)]
            above = nodes[path[-1]][0]
            role = "assistant" if above == "user" else "user"
            nodes.append((role, int(random.integers(2, 31)), path[-1]))
            path.append(node)
        return make_tree(*nodes)

    return make


@pytest.fixture(scope="session")
def one_thread():
    """Tensors this small gain nothing from a second thread, and on a busy machine wait for it most of the time."""
    from gpt2ft.distributed import accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerator, "available_cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def accelerator(one_thread):
    """One process, as training has it."""
    from accelerate.state import AcceleratorState, GradientState

    from gpt2ft.distributed.accelerator import start_accelerator

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return start_accelerator("fp32")


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory):
    """make_tiny_model(num_merges): a shape of 2 layers x 32 with so many of the quickstart's merges, None for all."""
    from gpt2ft import quickstart

    def make(num_merges):
        folder = tmp_path_factory.mktemp("tiny_model")
        version, *merges = (quickstart.MODEL / "merges.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
        del merges[num_merges or len(merges) :]
        built = {merge.replace(" ", "") for merge in merges}
        names = json.loads((quickstart.MODEL / "vocab.json").read_text(encoding="utf-8"))
        kept = [name for name in names if len(name) == 1 or name in built or name == "<|endoftext|>"]
        (folder / "merges.txt").write_text("\n".join([version, *merges, ""]), encoding="utf-8")
        (folder / "vocab.json").write_text(json.dumps({name: id for id, name in enumerate(kept)}), encoding="utf-8")
        config = json.loads((quickstart.MODEL / "config.json").read_text())
        config |= {"n_ctx": 256, "n_positions": 256, "n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": len(kept)}
        config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), len(kept) - 1)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture(scope="session")
def write_tiny_weights(tmp_path_factory):
    """write_tiny_weights(folder): another folder, with random weights in its shape."""
    from gpt2ft.runs.export import write_folder
    from gpt2ft.runs.loaded_model import load_model
    from gpt2ft.settings.sections import ModelSettings

    def write(shape):
        folder = tmp_path_factory.mktemp("tiny_weights") / "model"
        policy = load_model(ModelSettings(path=str(shape), random_init=True), seed=3)
        write_folder(folder, policy.weights(), policy.gpt2.config, policy.tokenizer)
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_model_folder(make_tiny_model):
    """A quarter of the quickstart's vocabulary: most of the time goes by its length."""
    return make_tiny_model(2000)


@pytest.fixture(scope="session")
def tiny_weights_folder(tiny_model_folder, write_tiny_weights):
    """The same shape with random weights in it."""
    return write_tiny_weights(tiny_model_folder)
