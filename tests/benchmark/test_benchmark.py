"""The benchmark as it is called: what it measures, prints and writes, and what it refuses."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from gpt2ft.benchmark import machine, made_up, training, work
from gpt2ft.benchmark.figures import lines
from gpt2ft.benchmark.training import Recompiled, Training
from gpt2ft.benchmark.work import make_work
from gpt2ft.distributed.accelerator import start_accelerator
from gpt2ft.errors import SettingsError
from gpt2ft.model.gpt2 import GPT2Config
from gpt2ft.runs import benchmark, evaluate_model
from gpt2ft.settings.measuring import BenchmarkSettings, EvaluateSettings

SMALL = {"tokens_per_micro_batch": 1024, "micro_batches": 2, "steps": 1, "precision": "fp32"}


@pytest.fixture(autouse=True)
def small_models(monkeypatch, one_thread):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(machine, "ROWS", 64)
    monkeypatch.setattr(
        benchmark, "published_config", lambda name: GPT2Config(benchmark.ROWS, n_embd=16, n_layer=2, n_head=2)
    )


@pytest.fixture
def small_vocabulary(monkeypatch):
    """Almost all of the time goes by its length."""
    monkeypatch.setattr(benchmark, "ROWS", 512)
    for module in (made_up, training, work):
        monkeypatch.setattr(module, "VOCABULARY", 500)


def measured(tmp_path, **settings):
    file = tmp_path / "figures.json"
    benchmark.run(BenchmarkSettings(json=str(file), **(SMALL | settings)))
    return json.loads(file.read_text())


@pytest.mark.parametrize("what", ["sft", "dpo", "reference"])
def test_the_figures_of_steps(tmp_path, capsys, what, small_vocabulary):
    found = measured(tmp_path, what=what, peak_tflops=1.0)
    assert found.keys() == {"ours"}
    ours = found["ours"]
    rates = {"path_tokens_per_second", "supervised_tokens_per_second"} | (
        {"pairs_per_second"} if what != "sft" else set()
    )
    assert all(ours[rate] > 0 for rate in rates)
    assert ("pairs_per_second" in ours) == (what != "sft")
    assert ours["path_tokens_per_second"] > ours["tokens_per_second"]
    assert ours["peak_memory_bytes"] > 2**20
    assert ours["mfu"] == pytest.approx(ours["flops_6n"] / 1e12)
    assert ours["flops_6n"] < ours["flops_6n_and_attention"]
    phases = {"forward", "the rest"} | ({"backward", "optimizer"} if what != "reference" else set())
    assert ours["seconds_by_phase"].keys() == phases
    assert ours["graphs_compiled"] == 0
    printed = capsys.readouterr().out
    assert f"{what}, gpt2" in printed
    assert "path tokens/s" in printed


def test_adapters_count_what_they_train_and_no_peak_is_made_up(tmp_path, small_vocabulary):
    whole = measured(tmp_path)["ours"]
    assert "mfu" not in whole
    AcceleratorState._reset_state(reset_partial_state=True)
    adapted = measured(tmp_path, lora={"rank": 2})["ours"]
    per_token = [ours["flops_6n"] / ours["tokens_per_second"] for ours in (whole, adapted)]
    assert per_token[0] > 1.2 * per_token[1]


def test_replies_one_at_a_time_and_together_beside_those_of_transformers(tmp_path):
    found = measured(tmp_path, what="generate", against="transformers", new_tokens=8)
    assert found["ours"].keys() == {"tokens_per_second", "tokens_per_second_of_16_together"}
    assert found["ratio"] == {
        "tokens_per_second": found["ours"]["tokens_per_second"] / found["usual"]["tokens_per_second"]
    }


@pytest.mark.long
@pytest.mark.parametrize(("what", "against"), [("sft", "transformers"), ("dpo", "trl")])
def test_steps_in_turn_with_the_usual_way(tmp_path, what, against):
    found = measured(tmp_path, what=what, against=against)
    rates = {"path_tokens_per_second", "supervised_tokens_per_second", "peak_memory_bytes"}
    rates |= {"pairs_per_second"} if what == "dpo" else set()
    assert found["usual"].keys() == rates | {"seconds"}
    assert found["ratio"] == {name: found["ours"][name] / found["usual"][name] for name in rates}


def test_the_steps_are_those_of_the_loop(small_vocabulary):
    settings = BenchmarkSettings(**SMALL)
    accelerator = start_accelerator("fp32", 2)
    trained = Training(settings, benchmark.published_config("gpt2"), accelerator, make_work(settings, 1))
    before = trained.inputs.strategy.full_model().h[0].mlp.c_fc.weight.clone()
    trained.advance()
    trained.advance()
    assert trained.state.step == trained.state.updates == 2
    assert not before.equal(trained.inputs.strategy.full_model().h[0].mlp.c_fc.weight)


def test_what_is_compiled_after_the_first_step_ends_it(monkeypatch, small_vocabulary):
    settings = BenchmarkSettings(**SMALL)
    trained = Training(
        settings, benchmark.published_config("gpt2"), start_accelerator("fp32", 2), make_work(settings, 1)
    )
    graphs = iter([3, 3, 4])
    monkeypatch.setattr(training, "graphs_compiled", lambda: next(graphs))
    trained.step()
    trained.step()
    with pytest.raises(Recompiled, match=r"step 3 compiled 1 "):
        trained.step()


def test_a_gpu_times_the_phases_by_its_own_events(monkeypatch):
    """Which are read once it has come to all of them; to time each would have it wait."""
    clock = iter(range(10, 100, 10))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)  # milliseconds

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    owner = SimpleNamespace(
        forward=lambda x: x + 1, backward=None, update=None, device=torch.device("cuda"), model=None
    )
    owner.model = owner
    with training.recorded(owner, owner) as spans:
        assert [owner.forward(x) for x in (1, 2)] == [2, 3]
    assert [training.seconds_between(span) for span in spans["forward"]] == [0.01, 0.01]
    assert not spans["backward"]


@pytest.mark.parametrize(
    ("work", "settings"),
    [
        (benchmark, BenchmarkSettings(attention="flex")),
        (evaluate_model, EvaluateSettings(model="no/such/model", data=("quickstart",), attention="flex")),
    ],
)
def test_an_attention_that_does_not_work_here(work, settings):
    """Told before anything is loaded, as training does."""
    with pytest.raises(SettingsError, match=r"FlexAttention .* CPU .* `--attention segments`"):
        work.run(settings)


def test_what_the_usual_way_lacks_is_told_at_once(monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install trl"):
        benchmark.run(BenchmarkSettings(against="trl"))


def test_the_usual_way_has_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="one process, but there are 2"):
        benchmark.run(BenchmarkSettings(against="trl"))


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": {"rank": 2}, "against": "trl"},
        {"lora": {"rank": 2}, "what": "generate"},
        {"what": "generate", "against": "trl"},
        {"what": "generate", "data": ["quickstart"]},
        {"data": [""]},
    ],
)
def test_what_cannot_be_measured_is_refused(settings):
    assert len(list(BenchmarkSettings(**settings).problems())) == 1


def test_small_rates_are_not_rounded_to_nothing_and_both_sides_have_the_same_units():
    ours = {"pairs_per_second": 0.4669, "path_tokens_per_second": 1234.5, "peak_memory_bytes": 3 * 2**29}
    usual = {"pairs_per_second": 0.0668, "peak_memory_bytes": 2**30, "seconds": 1.0}
    told = lines({"ours": ours, "usual": usual, "ratio": {"pairs_per_second": 6.99, "peak_memory_bytes": 1.5}})
    assert [" ".join(line.split()) for line in told] == [
        "pairs/s 0.47",
        "path tokens/s 1,234",
        "peak memory 1.50 GiB",
        "usual: pairs/s 0.07",
        "usual: peak memory 1.00 GiB",
        "ratio: pairs/s 6.99 times",
        "ratio: peak memory 1.50 times",
    ]
