"""Each step equals transformers' logits processor, and ids are drawn as often as their probability says."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as some
from torch.testing import assert_close

from gpt2ft.inference.sampling import GREEDY, Sampler, penalized, probabilities, sample, sample_by_inverse_cdf
from gpt2ft.settings.sections import SamplingSettings

VOCABULARY = 50
OFF = {"temperature": 1.0, "top_p": 1.0}
CONTENT = [3, 1, 4, 1, 5]


def random_logits(seed, rows=1, ties=False):
    logits = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    return logits.round() if ties else logits


def expected_probabilities(logits, sampling, content):
    """By transformers' own processors in the order of its `generate`."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    chain = [
        (sampling.repetition_penalty != 1, processors.RepetitionPenaltyLogitsProcessor, sampling.repetition_penalty),
        (sampling.temperature != 1, processors.TemperatureLogitsWarper, sampling.temperature),
        (sampling.top_k != 0, processors.TopKLogitsWarper, sampling.top_k),
        (sampling.top_p < 1, processors.TopPLogitsWarper, sampling.top_p),
        (sampling.min_p > 0, processors.MinPLogitsWarper, sampling.min_p),
    ]
    for is_on, processor, value in chain:
        if is_on:
            logits = processor(value)(torch.tensor([content]), logits)
    return logits.softmax(-1)


samplings = some.builds(
    SamplingSettings,
    temperature=some.floats(0.1, 3),
    top_k=some.integers(0, 2 * VOCABULARY),
    top_p=some.floats(0.01, 1),
    min_p=some.floats(0, 1),
    repetition_penalty=some.floats(0.5, 2),
)


class TestTransformers:
    @settings(max_examples=200, deadline=None)
    @given(some.lists(some.tuples(samplings, some.integers(0, 10**6)), min_size=1, max_size=4))
    @example([(SamplingSettings(**OFF), 0)])
    @example(
        [
            (SamplingSettings(**OFF, top_k=1), 1),
            (SamplingSettings(**OFF, min_p=1.0), 1),
            (SamplingSettings(temperature=1, top_p=0.01), 1),
        ]
    )
    def test_each_row_equals_their_processors(self, rows):
        logits = torch.cat([random_logits(seed) for _, seed in rows])
        samplers = [Sampler(sampling, CONTENT) for sampling, _ in rows]
        ours = probabilities(penalized(logits, samplers), [sampling for sampling, _ in rows])
        theirs = torch.cat([expected_probabilities(random_logits(seed), sampling, CONTENT) for sampling, seed in rows])
        assert torch.equal(ours > 0, theirs > 0)
        assert_close(ours, theirs)

    @pytest.mark.parametrize(
        "step", [{"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05}, {"temperature": 0.5, "top_p": 0.8}], ids=str
    )
    def test_each_step_alone_leaves_something_out(self, step):
        sampling = SamplingSettings(**OFF | step)
        ours = probabilities(random_logits(5), [sampling])
        assert 1 < (ours > 0).sum() < 10
        assert_close(ours, expected_probabilities(random_logits(5), sampling, CONTENT))

    def test_ids_that_equal_the_last_of_top_k_stay(self):
        logits = random_logits(0, ties=True)
        sampling = SamplingSettings(**OFF, top_k=5)
        ours = probabilities(logits, [sampling])
        assert (ours > 0).sum() > 5
        assert torch.equal(ours > 0, expected_probabilities(logits, sampling, CONTENT) > 0)

    def test_of_equal_scores_top_p_keeps_the_lower_ids(self):
        logits = torch.full((2, VOCABULARY), -torch.inf)
        logits[:, 10:20], logits[1, 30] = 0.0, 1.0  # the same ten, and in one row a likelier one
        kept = probabilities(logits, [SamplingSettings(**OFF | {"top_p": top_p}) for top_p in (0.35, 0.4)]) > 0
        assert kept[0].nonzero()[:, 0].tolist() == [10, 11, 12, 13]
        assert kept[1].nonzero()[:, 0].tolist() == [10, 11, 12, 30]

    def test_the_penalty_makes_content_less_likely_whatever_its_sign(self):
        logits = random_logits(2)
        assert (logits[0, CONTENT] > 0).any()
        assert (logits[0, CONTENT] < 0).any()
        changed = penalized(logits, [Sampler(SamplingSettings(repetition_penalty=1.5), CONTENT)])
        assert (changed[0, CONTENT] < logits[0, CONTENT]).all()
        others = sorted(set(range(VOCABULARY)) - set(CONTENT))
        assert torch.equal(changed[0, others], logits[0, others])


class TestDraws:
    @pytest.mark.parametrize(
        "sampling",
        [SamplingSettings(**OFF), SamplingSettings(), SamplingSettings(temperature=1.3, top_k=9, min_p=0.02)],
    )
    def test_frequencies(self, sampling):
        """20,000 sequences with the same logits and seeds of their own."""
        number = 20_000
        logits = random_logits(3).float().expand(number, -1)
        samplers = [Sampler(SamplingSettings(**sampling.model_dump() | {"seed": seed}), []) for seed in range(number)]
        counts = sample(logits, samplers).bincount(minlength=VOCABULARY).double()
        expected = expected_probabilities(random_logits(3), sampling, CONTENT)[0] * number
        assert (counts[expected == 0] == 0).all()
        likely = expected > 20
        assert likely.sum() > 4
        assert (((counts - expected) / expected.sqrt())[likely].abs() < 4.5).all()

    def test_a_seed_gives_one_row_the_same_ids_in_any_company(self):
        draws = [random_logits(step, rows=3) for step in range(20)]
        seeded = SamplingSettings(temperature=1.5, top_p=1.0, seed=11)
        alone = Sampler(seeded, [])
        first = [int(sample(logits[1:2], [alone])) for logits in draws]
        company = [Sampler(SamplingSettings(), []), Sampler(seeded, []), Sampler(GREEDY, [])]
        second = [int(sample(logits, company)[1]) for logits in draws]
        assert first == second
        assert first != [int(logits[1].argmax()) for logits in draws]

    def test_without_a_seed_draws_differ(self):
        draws = {
            tuple(sampler.uniform() for _ in range(3))
            for sampler in (Sampler(SamplingSettings(), []) for _ in range(5))
        }
        assert len(draws) == 5

    def test_temperature_0_takes_the_likeliest_in_any_company(self):
        logits = random_logits(4, rows=3)
        likeliest = logits.argmax(-1)
        assert torch.equal(sample(logits, [Sampler(GREEDY, [])] * 3), likeliest)
        mixed = sample(logits, [Sampler(GREEDY, []), Sampler(SamplingSettings(seed=1), []), Sampler(GREEDY, [])])
        assert mixed[::2].tolist() == likeliest[::2].tolist()

    def test_ids_without_probability_are_never_taken_even_at_the_ends(self):
        for dtype in (torch.float32, torch.float64):
            probabilities = torch.tensor([[0, 0.3, 0, 0.7, 0, 0]], dtype=dtype)
            taken = [int(sample_by_inverse_cdf(probabilities, [u])) for u in (0.0, 0.2999, 0.3001, 0.9999, 1 - 2**-53)]
            assert taken == [1, 1, 3, 3, 3]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        "extreme",
        [
            {"temperature": 5e-324},
            {"temperature": 1e308},
            {"top_p": 5e-324},
            {"top_k": 10**30},
            {"repetition_penalty": 5e-324},
            {"repetition_penalty": 1e308},
        ],
        ids=str,
    )
    def test_extreme_values_still_give_probabilities(self, extreme, dtype):
        logits = random_logits(6, rows=2).to(dtype)
        logits[:, :3] = -torch.inf
        logits[:, 10] = 0
        sampling = SamplingSettings(**extreme)
        samplers = [Sampler(sampling, range(VOCABULARY)), Sampler(sampling, [])]
        ours = probabilities(penalized(logits, samplers), [sampling] * 2)
        assert_close(ours.sum(-1), torch.ones(2, dtype=dtype))
        assert (ours[:, :3] == 0).all()
