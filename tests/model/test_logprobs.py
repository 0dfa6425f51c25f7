"""Target log-probs and their gradients are those of the whole softmax in float64, whatever the chunks are."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2ft.device import cpp_compiler_problem
from gpt2ft.model import logprobs
from gpt2ft.model.attention import attention_for
from gpt2ft.model.logprobs import TargetLogProbs, head_logits, head_table

VOCABULARY, ROWS = 90, 128


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2):
    """Weights large enough for a distribution that is far from even, padding rows that would win if they counted."""
    model = tiny_gpt2(ROWS, 384)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter *= 5
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
        model.wte.weight[VOCABULARY:] *= 20
    return model


@pytest.fixture(scope="module")
def streams(random_stream):
    """Random trees, their first and last id among the targets; the second without a tail of targets."""
    random = np.random.default_rng(3)
    streams = [random_stream(random, VOCABULARY) for _ in range(2)]
    for number, stream in enumerate(streams):
        stream.targets[:2] = torch.tensor([0, VOCABULARY - 1])
        if number % 2:
            scored = {name: getattr(stream, name)[: stream.num_supervised] for name in per_target()}
            streams[number] = replace(stream, **scored)
    assert all(stream.num_tokens < len(stream.tokens) for stream in streams)
    assert [stream.num_supervised < len(stream.targets) for stream in streams] == [True, False]
    assert all(80 < stream.num_supervised < 300 for stream in streams)
    return streams


def per_target():
    return ("supervised", "targets", "weights", "groups")


def upstream_for(stream, seed=0):
    """What a loss could send back: any number for what is supervised, nothing for the tail."""
    upstream = torch.randn(len(stream.targets), generator=torch.Generator().manual_seed(seed))
    upstream[stream.num_supervised :] = 0
    return upstream


def ours(model, stream, upstream):
    """Log-probs [S], the gradient of the hidden states [N, E], and of every parameter."""
    kept = []
    hook = model.register_forward_hook(lambda module, inputs, hidden: kept.append(hidden))
    found = TargetLogProbs(model, VOCABULARY, "segments")(stream)
    hook.remove()
    hidden, *parameters = torch.autograd.grad(found, [kept[0], *model.parameters()], upstream)
    return found.detach(), hidden, parameters


def in_float64(model, stream, upstream):
    """The same, by the whole softmax over the ids in use and the mask written out."""
    model = deepcopy(model).double()
    hidden = model(stream.tokens, stream.positions, attention_for(stream.horizons, stream.num_tokens, "dense"))
    logits = model.logits(hidden)[:, :VOCABULARY]
    expected = logits.log_softmax(-1)[stream.supervised, stream.targets]
    gradients = torch.autograd.grad(expected, [hidden, *model.parameters()], upstream.double())
    return expected.detach(), gradients[0], gradients[1:]


@pytest.mark.parametrize("kept", [0, 100 * ROWS, logprobs.KEPT])
@pytest.mark.parametrize("chunk", [1, 64, 1024])
def test_values_and_gradients_are_those_of_the_whole_softmax(chunk, kept, gpt2, streams, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    monkeypatch.setattr(logprobs, "KEPT", kept)
    for seed, stream in enumerate(streams):
        upstream = upstream_for(stream, seed)
        found, hidden, parameters = ours(gpt2, stream, upstream)
        expected, expected_hidden, expected_parameters = in_float64(gpt2, stream, upstream)
        scored = slice(0, stream.num_supervised)
        assert found.dtype == torch.float32
        assert found.shape == stream.targets.shape
        assert_close(found[scored].double(), expected[scored], rtol=1e-5, atol=1e-5)
        assert expected[scored].std() > 0.5
        assert_close(hidden.double(), expected_hidden, rtol=1e-4, atol=1e-5)
        assert (hidden[stream.num_tokens :] == 0).all()
        for (name, _), one, other in zip(gpt2.named_parameters(), parameters, expected_parameters, strict=True):
            assert other.abs().max() > 1e-3, name
            assert (one - other).norm() <= 1e-5 * other.norm(), name


def test_chunks_make_no_difference(gpt2, streams, monkeypatch):
    stream, upstream = streams[0], upstream_for(streams[0])
    found = {}
    for chunk in (3, 100, stream.num_supervised, 4096):
        monkeypatch.setattr(logprobs, "CHUNK", chunk)
        found[chunk] = ours(gpt2, stream, upstream)
    for values, hidden, parameters in found.values():
        scored = slice(0, stream.num_supervised)
        assert_close(values[scored], found[3][0][scored])
        assert_close(hidden, found[3][1])
        assert_close(parameters, found[3][2], rtol=1e-4, atol=1e-4)


class TestHead:
    """The head alone, against gradients by finite differences."""

    @pytest.mark.parametrize("seed", [0, 1, 2])
    @pytest.mark.filterwarnings("ignore:Input #")  # gradcheck would rather have float64
    def test_gradients_are_slopes(self, seed):
        """The head's numbers are float32 by contract, so the step is large and the tolerance that of float32."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(5, 4, generator=generator, requires_grad=True)
        weight = torch.randn(11, 4, generator=generator, requires_grad=True)
        targets = torch.randint(9, (5,), generator=generator)
        head = logprobs._LogProbs.apply
        assert torch.autograd.gradcheck(
            lambda h, w: head(h, w, None, None, targets, 9),
            (hidden, weight),
            eps=1e-2,
            atol=2e-3,
            rtol=1e-2,
            nondet_tol=0.0,
        )

    def test_what_needs_no_gradient_gets_none(self):
        hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(11, 4)
        logprobs._LogProbs.apply(hidden, weight, None, None, torch.zeros(5, dtype=torch.long), 9).sum().backward()
        assert hidden.grad is not None
        assert weight.grad is None


class Recorded(TorchDispatchMode):
    """Results of operators: name, shape, dtype; and the precision in which a CPU multiplies float32 just then."""

    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            precision = torch.backends.mkldnn.matmul.fp32_precision
            self.results.append((func.overloadpacket.__name__, tuple(result.shape), result.dtype, precision))
        return result


class TestChunks:
    """All chunks in one function: S targets, E wide, V rows, of which the last 8 are padding."""

    S, E, V = 300, 32, 1000

    def head(self, dtype=torch.bfloat16, device="cpu"):
        generator = torch.Generator().manual_seed(0) if device == "cpu" else None
        hidden = torch.randn(self.S, self.E, generator=generator, device=device).to(dtype).requires_grad_()
        weight = torch.randn(self.V, self.E, generator=generator, device=device).to(dtype).float().requires_grad_()
        targets = torch.randint(self.V - 8, (self.S,), generator=generator, device=device)
        return hidden, weight, targets

    def apply(self, hidden, weight, targets, rows=None, row_ids=None):
        return logprobs._LogProbs.apply(hidden, weight, rows, row_ids, targets, self.V - 8)

    @pytest.mark.parametrize("chunk", [4, 64, 1024])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
    def test_add_to_one_gradient_in_float32(self, dtype, tolerance, chunk, monkeypatch):
        monkeypatch.setattr(logprobs, "CHUNK", chunk)
        hidden, weight, targets = self.head(dtype)
        rows, row_ids = weight.detach()[[3, 500]].requires_grad_(), torch.tensor([3, 500])
        upstream = torch.randn(self.S, generator=torch.Generator().manual_seed(1))
        found = torch.autograd.grad(self.apply(hidden, weight, targets), (hidden, weight), upstream)
        of_rows = torch.autograd.grad(self.apply(hidden, weight.detach(), targets, rows, row_ids), rows, upstream)
        exact = hidden.double(), weight.double()
        expected = (exact[0] @ exact[1][: self.V - 8].t()).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        expected = torch.autograd.grad(expected, (hidden, weight), upstream.double())
        assert [gradient.dtype for gradient in (*found, *of_rows)] == [dtype, torch.float32, torch.float32]
        for one, other in zip((*found, *of_rows), (*expected, expected[1][row_ids]), strict=True):
            assert (one.double() - other).norm() < tolerance * other.norm()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_have_the_bits_of_those_that_are_computed_again(self, dtype, monkeypatch):
        """In every pass after the first, too, for which nothing is kept."""
        monkeypatch.setattr(logprobs, "CHUNK", 64)
        hidden, weight, targets = self.head(dtype)
        upstream = torch.randn(self.S, generator=torch.Generator().manual_seed(1), dtype=dtype).to(torch.float32)
        results = []
        for kept in (0, 150 * self.V, 1000 * self.V):
            monkeypatch.setattr(logprobs, "KEPT", kept)
            found = self.apply(hidden, weight, targets)
            for retain_graph in (True, True, False):
                gradients = torch.autograd.grad(found, (hidden, weight), upstream.to(found.dtype), retain_graph)
                results.append((found.detach(), *gradients))
        for result in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))

    @pytest.mark.parametrize(
        ("kept", "again"), [(0, 4), (2 * 64 * 1000, 3), (3 * 64 * 1000 - 1, 3), (300 * 1000, 1), (320 * 1000, 0)]
    )
    def test_are_computed_once_as_far_as_they_are_kept(self, kept, again, monkeypatch):
        monkeypatch.setattr(logprobs, "CHUNK", 64)
        monkeypatch.setattr(logprobs, "KEPT", kept)
        hidden, weight, targets = self.head()
        with Recorded() as forward:
            found = self.apply(hidden, weight, targets)
        with Recorded() as backward:
            found.sum().backward()
        for recorded, expected in ((forward, 5), (backward, again)):
            products = [shape for name, shape, *_ in recorded.results if name == "mm" and shape[1] == self.V]
            assert len(products) == expected
        with torch.no_grad(), Recorded() as evaluated:
            self.apply(hidden.detach(), weight, targets)
        assert max(np.prod(shape) for _, shape, *_ in evaluated.results) == 64 * self.V

    def test_cast_the_table_once_a_pass(self, monkeypatch):
        monkeypatch.setattr(logprobs, "CHUNK", 64)
        monkeypatch.setattr(logprobs, "KEPT", 0)
        hidden, weight, targets = self.head()
        with Recorded() as forward:
            found = self.apply(hidden, weight, targets)
        with Recorded() as backward:
            found.sum().backward()
        for recorded, chunks in ((forward, 5), (backward, 4)):  # the first is kept
            of_table = [
                dtype for name, shape, dtype, _ in recorded.results if (name, shape) == ("_to_copy", weight.shape)
            ]
            assert of_table.count(torch.bfloat16) == 1
            products = [name for name, shape, *_ in recorded.results if name == "mm" and shape[1] == self.V]
            assert len(products) == chunks

    def test_hold_the_logits_of_one_alone(self, monkeypatch):
        """Where more are not to be kept."""
        monkeypatch.setattr(logprobs, "CHUNK", 64)
        monkeypatch.setattr(logprobs, "KEPT", 0)
        hidden, weight, targets = self.head()
        with Recorded() as recorded:
            self.apply(hidden, weight, targets).sum().backward()
        sizes = [np.prod(shape) for _, shape, *_ in recorded.results]
        assert max(sizes) == 64 * self.V
        buffers = [
            name for name, shape, *_ in recorded.results if shape == (64, self.V) and name in ("empty", "new_empty")
        ]
        assert len(buffers) == 1  # in both passes

    def test_multiply_in_bfloat16_with_sums_in_float32_where_the_cpu_can(self):
        matmul = torch.backends.mkldnn.matmul
        before = matmul.fp32_precision
        for dtype, expected in ((torch.bfloat16, "bf16"), (torch.float16, before), (torch.float32, before)):
            with Recorded() as recorded, torch.no_grad():
                self.apply(*self.head(dtype))
            precisions = [precision for name, *_, precision in recorded.results if name == "mm"]
            assert precisions == [expected]
            assert [precision for name, *_, precision in recorded.results if name == "gather"] == [before]
        hidden, weight, targets = self.head()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            self.apply(hidden[:, 1:], weight, targets)
        assert matmul.fp32_precision == before != "bf16"

    @pytest.mark.skipif(cpp_compiler_problem() is not None, reason="there is no C++ compiler")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_all_lengths_have_one_graph_in_each_pass(self, dtype, monkeypatch):
        """Where blocks are compiled, what is computed of logits is too."""
        monkeypatch.setattr(logprobs, "CHUNK", 64)
        torch.compiler.reset()
        logprobs._softmax.cache_clear()
        for number_of_targets, kept in ((64, logprobs.KEPT), (300, 0), (150, logprobs.KEPT), (40, 0)):
            monkeypatch.setattr(TestChunks, "S", number_of_targets)
            monkeypatch.setattr(logprobs, "KEPT", kept)
            hidden, weight, targets = self.head(dtype)
            upstream = torch.randn(self.S, generator=torch.Generator().manual_seed(1))
            results = []
            for compiles in (False, True):
                graphs = counters["stats"]["unique_graphs"]
                found = logprobs._LogProbs.apply(hidden, weight, None, None, targets, self.V - 8, compiles)
                results.append((found, *torch.autograd.grad(found, (hidden, weight), upstream)))
            assert counters["stats"]["unique_graphs"] - graphs == (2 if self.S == 64 else 0)
            for plain, compiled in zip(*results, strict=True):
                assert (compiled - plain).norm() < (1e-5 if dtype == torch.float32 else 4e-3) * plain.norm()

    @pytest.mark.parametrize(("limit", "first_again"), [(0, 1), (logprobs.KEPT, 2)])
    def test_on_cuda_are_larger_and_give_float32_at_once(self, limit, first_again, monkeypatch):
        """Shapes and dtypes alone, without a GPU."""
        monkeypatch.setattr(logprobs, "KEPT", limit)
        monkeypatch.setattr(TestChunks, "S", 5000)
        with FakeTensorMode():
            hidden, weight, targets = (tensor.detach() for tensor in self.head(device="cuda"))
            ctx = SimpleNamespace(
                needs_input_grad=(True, True, False), save_for_backward=lambda *saved: kept.extend(saved)
            )
            kept = []
            with Recorded() as forward:
                found = logprobs._LogProbs.forward(ctx, hidden, weight, None, None, targets, self.V - 8)
            ctx.saved_tensors = kept
            with Recorded() as backward:
                d_hidden, d_weight, *_ = logprobs._LogProbs.backward(ctx, torch.ones_like(found))
        assert (found.shape, found.dtype, found.device.type) == ((5000,), torch.float32, "cuda")
        assert (d_hidden.shape, d_hidden.dtype) == (hidden.shape, torch.bfloat16)
        assert (d_weight.shape, d_weight.dtype) == (weight.shape, torch.float32)
        logits = [((size, self.V), torch.float32) for size in (4096, 904)]
        products = [(shape, dtype) for name, shape, dtype, _ in forward.results if name == "mm"]
        assert products == logits[::-1]
        products = [(shape, dtype) for name, shape, dtype, _ in backward.results if name == "mm"]
        assert [product for product in products if product[0][1] == self.V] == logits[first_again:]
        assert products.count((weight.shape, torch.float32)) == 2


class TestPadding:
    def test_columns_have_probability_zero(self, gpt2, streams):
        """Every id in use as the target of one and the same token: their probabilities make 1."""
        stream = streams[0]
        everywhere = replace(
            stream,
            supervised=torch.full((VOCABULARY,), 7),
            targets=torch.arange(VOCABULARY),
            weights=torch.ones(VOCABULARY),
            groups=torch.zeros(VOCABULARY, dtype=torch.long),
            num_supervised=VOCABULARY,
        )
        with torch.no_grad():
            found = TargetLogProbs(gpt2, VOCABULARY, "segments")(everywhere)
            unmasked = TargetLogProbs(gpt2, ROWS, "segments")(everywhere)
        assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
        assert unmasked.exp().sum() < 0.5  # or else the padding had nothing to win

    def test_rows_get_a_gradient_of_zero(self, gpt2, streams):
        for stream in streams:
            _, _, parameters = ours(gpt2, stream, upstream_for(stream))
            table = parameters[0]
            assert table.shape == (ROWS, 64)
            assert (table[VOCABULARY:] == 0).all()
            assert (table[:VOCABULARY] != 0).any(-1).all()


class TestTail:
    def test_of_targets_counts_nothing_and_is_finite(self, gpt2, streams):
        stream = streams[0]
        with torch.no_grad():
            found = TargetLogProbs(gpt2, VOCABULARY, "segments")(stream)
        assert found.isfinite().all()
        assert (stream.weights[stream.num_supervised :] == 0).all()
        cut = replace(stream, **{name: getattr(stream, name)[: stream.num_supervised] for name in per_target()})
        upstream = upstream_for(stream)
        long, short = ours(gpt2, stream, upstream), ours(gpt2, cut, upstream[: stream.num_supervised])
        assert_close(long[2], short[2])

    def test_of_tokens_changes_nothing(self, gpt2, streams):
        stream = streams[1]
        other = replace(stream, tokens=stream.tokens.clone())
        other.tokens[stream.num_tokens :] = 5
        with torch.no_grad():
            model = TargetLogProbs(gpt2, VOCABULARY, "segments")
            assert torch.equal(model(stream), model(other))

    @pytest.mark.parametrize("num_tokens", [0, 200])
    def test_alone_still_gives_every_parameter_a_gradient(self, num_tokens, gpt2, streams):
        """As the gradient all-reduce of several processes wants it: there, and zero."""
        empty = replace(streams[0], num_supervised=0, num_tokens=num_tokens)
        empty.weights.zero_()
        if num_tokens == 0:
            empty = replace(empty, horizons=torch.arange(1, 385))
        model = deepcopy(gpt2)
        found = TargetLogProbs(model, VOCABULARY, "segments")(empty)
        assert found.shape == (300,)
        (found * empty.weights).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad == 0).all(), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_backend_gives_the_same(gpt2, streams):
    with torch.no_grad():
        expected = TargetLogProbs(gpt2, VOCABULARY, "segments")(streams[0])
        for backend in ("dense", "flex"):
            found = TargetLogProbs(gpt2, VOCABULARY, backend)(streams[0])
            assert_close(found, expected, rtol=1e-4, atol=1e-4)


class TestBfloat16:
    """Autocast rounds what is multiplied and never the logits, which in GPT-2 lie around -100."""

    @pytest.fixture(scope="class")
    def far_off(self, gpt2):
        """The model with all logits near -100, where bfloat16 knows only every second of them."""
        model = deepcopy(gpt2)
        with torch.no_grad():
            model.wte.weight[:, 0] = 4.0
            model.ln_f.bias[0] = -30.0
        return model

    def under_autocast(self, model, stream):
        kept = []
        hook = model.register_forward_hook(lambda module, inputs, hidden: kept.append(hidden))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = TargetLogProbs(model, VOCABULARY, "segments")(stream)
        hook.remove()
        return found, kept[0][stream.supervised]

    def test_only_what_is_multiplied_is_rounded(self, far_off, streams):
        stream = streams[1]
        with torch.no_grad():
            found, hidden = self.under_autocast(far_off, stream)
            logits = hidden.bfloat16().double() @ far_off.wte.weight[:VOCABULARY].bfloat16().double().t()
        expected = logits.log_softmax(-1).gather(-1, stream.targets[:, None])[:, 0]
        rounded = logits.bfloat16().float().log_softmax(-1).gather(-1, stream.targets[:, None])[:, 0]
        assert logits.mean().item() == pytest.approx(-100, abs=15)
        assert found.dtype == torch.float32
        assert (rounded - expected).abs().max() > 0.1  # or else there was nothing to lose
        assert (found - expected).abs().max() < 1e-3

    def test_values_and_gradients_are_close_to_float32(self, gpt2, streams):
        for stream in streams:
            upstream = upstream_for(stream)
            expected, _, expected_parameters = ours(gpt2, stream, upstream)
            found, _ = self.under_autocast(gpt2, stream)
            parameters = torch.autograd.grad(found, list(gpt2.parameters()), upstream)
            assert (found - expected).abs().mean() < 0.02
            for (name, _), one, other in zip(gpt2.named_parameters(), parameters, expected_parameters, strict=True):
                assert one.dtype == torch.float32
                assert (one - other).norm() < 0.05 * other.norm(), name


class TestHeadOfFew:
    @pytest.mark.parametrize("rows", [ROWS, ROWS - 7])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("number", [1, 3])
    def test_logits_are_the_product_with_the_table(self, number, dtype, rows):
        """By blocks of the table or all at once; of halves without rounding."""
        draw = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, 32, dtype=torch.float64, generator=draw).to(dtype) for n in (number, rows))
        found = head_logits(hidden, head_table(weight))
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert_close(found.double(), hidden.double() @ weight.double().t(), rtol=0, atol=1e-4)
