"""The made-up streams that the benchmark trains on: of both kinds, full, and always of the same shapes."""

import pytest
import torch
from accelerate.state import AcceleratorState

from gpt2ft.errors import SettingsError
from gpt2ft.objectives.dpo import DPO
from gpt2ft.runs import benchmark, evaluate_model
from gpt2ft.runs.benchmark import Streams
from gpt2ft.settings.measuring import BenchmarkSettings, EvaluateSettings
from gpt2ft.settings.sections import PreferenceSettings


@pytest.mark.parametrize(
    ("work", "settings"),
    [
        (benchmark, BenchmarkSettings(attention="flex")),
        (evaluate_model, EvaluateSettings(model="no/such/model", data=("quickstart",), attention="flex")),
    ],
)
def test_an_attention_that_does_not_work_here(work, settings, one_thread):
    """Told before anything is loaded, as training does."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SettingsError, match=r"FlexAttention .* CPU .* `--attention segments`"):
        work.run(settings)


@pytest.mark.parametrize("what", ["sft", "dpo"])
def test_streams_are_full_and_of_one_shape(what):
    settings = BenchmarkSettings(what=what, tokens_per_micro_batch=2048, micro_batches=2)
    made = Streams(settings, rank=0)
    streams = [made.next() for _ in range(4)]
    assert {len(stream.tokens) for stream in streams} == {2048}
    assert len({len(stream.targets) for stream in streams}) == 1
    assert min(stream.num_tokens for stream in streams) > 0.8 * 2048
    other = Streams(settings, rank=1).next()
    assert not torch.equal(other.tokens, streams[0].tokens)


def test_pairs_are_of_replies_in_their_stream():
    made = Streams(BenchmarkSettings(what="dpo", tokens_per_micro_batch=2048, micro_batches=2), rank=0)
    objective = DPO(PreferenceSettings())
    for stream in (made.next() for _ in range(3)):
        real = stream.pairs.weights > 0
        assert real.sum() >= 3
        targets = torch.bincount(stream.groups[: stream.num_supervised])
        assert stream.pairs.lengths[stream.pairs.index[real]].tolist() == targets[stream.pairs.index[real]].tolist()
        loss = objective.loss(-torch.rand(len(stream.targets)), stream)
        assert torch.isfinite(loss)
        assert objective.normalizer(stream) == real.sum()
