"""`tokens_per_micro_batch auto`: the largest that fits, a step of the same tokens, and then a number like any."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gpt2ft.data.chunks import chunk
from gpt2ft.data.kinds import PREFERENCES
from gpt2ft.data.packing import build_stream
from gpt2ft.data.pairs import PreferencePairs
from gpt2ft.data.reading import DataError
from gpt2ft.data.store import open_store
from gpt2ft.data.token_tree import weigh
from gpt2ft.errors import SettingsError
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.runs import micro_batch
from gpt2ft.runs.micro_batch import find_size, sizes, with_size_of
from gpt2ft.settings.layers import over
from gpt2ft.settings.parsing import refuse_problems
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.settings.training import TrainingSettings
from gpt2ft.training.memory_probe import fits

AUTO = {"tokens_per_micro_batch": "auto", "auto_from": 512, "micro_batches_per_step": 6}


def settings_of(**training):
    return SFTSettings(data={"train": ["quickstart"], "max_length": 256}, training=AUTO | training)


def size_of(settings):
    training = settings.training
    return training.tokens_per_micro_batch, training.micro_batches_per_step


@pytest.mark.parametrize(("processes", "longest"), [(1, 128), (2, 256), (8, 1024), (3, 128)])
def test_every_size_makes_up_the_step_and_is_shared_equally(processes, longest):
    training = TrainingSettings(tokens_per_micro_batch="auto", auto_from=6144, micro_batches_per_step=24)
    found = sizes(training, longest, processes)
    assert found[0] == (6144 * 24 // processes, processes)
    assert (6144, 24) in found
    assert [tokens for tokens, _ in found] == sorted({tokens for tokens, _ in found}, reverse=True)
    for tokens, count in found:
        assert (tokens * count, tokens % 128, count % processes, tokens >= longest) == (6144 * 24, 0, 0, True)


@pytest.fixture
def find(monkeypatch):
    """find(settings, most tokens that fit here, and on the other process, on which device): the size that is found."""

    def find(settings, here, elsewhere=None, device="cuda", streams=6, longest=256):
        processes = 1 if elsewhere is None else 2
        accelerator = SimpleNamespace(
            num_processes=processes, device=torch.device(device), is_main_process=False, gradient_accumulation_steps=0,
            state=SimpleNamespace(deepspeed_plugin=None),
        )  # fmt: skip
        tried = []

        def does_fit(model, accelerator, hardware, plan):
            tried.append(plan.tokens)
            return plan.tokens <= here

        def any_process(_, value):
            return [value + float(elsewhere is not None and tried[-1] > elsewhere)]

        def plan_of(sized):
            tokens, count = size_of(sized)
            if tokens < longest:
                raise DataError("a prompt and the two replies of a pair are longer")
            return SimpleNamespace(tokens=tokens, streams_per_step=min(count, streams))

        monkeypatch.setattr(micro_batch, "_fits", does_fit)
        monkeypatch.setattr(micro_batch, "global_sum", any_process)
        found = find_size(settings, None, accelerator, None, plan_of)
        assert accelerator.gradient_accumulation_steps == size_of(found)[1] // processes
        return size_of(found), tried

    return find


def test_the_largest_that_fits_on_all_processes_is_taken(find):
    assert find(settings_of(), here=1600) == ((1536, 2), [3072, 1536])
    assert find(settings_of(), here=9999) == ((3072, 1), [3072])
    assert find(settings_of(), here=9999, elsewhere=800) == ((768, 4), [1536, 768])
    assert find(settings_of(), here=600, elsewhere=9999) == ((512, 6), [1536, 768, 512])
    assert find(settings_of(), here=0) == ((256, 12), [3072, 1536, 1024, 768, 512, 384, 256])  # the probe refuses it


def test_no_size_is_tried_that_does_not_hold_the_data(find):
    assert find(settings_of(), here=0, longest=512) == ((512, 6), [3072, 1536, 1024, 768, 512])
    with pytest.raises(DataError, match="two replies"):
        find(settings_of(), here=9999, longest=600)


def test_data_that_no_stream_of_the_recipes_size_holds_are_told_the_setting_to_raise(tmp_path, tokenizer):
    text = "tea and rain " * 60
    file = tmp_path / "pair.jsonl"
    file.write_text(json.dumps({"prompt": "Tea?", "chosen": text, "rejected": text + "cup"}))
    store = open_store(str(file), FilterSettings(), tokenizer, tmp_path, kind=PREFERENCES)
    with pytest.raises(DataError, match=r"`auto_from` where it is auto"):
        chunk([store], np.array([[0, 0]]), PreferencePairs("all", "pair", 256, 256))


def test_larger_than_the_recipes_it_is_only_on_cuda_and_where_a_step_is_full(find):
    assert find(settings_of(), here=9999, device="cpu") == ((512, 6), [512])
    assert find(settings_of(), here=300, device="cpu") == ((256, 12), [512, 384, 256])
    assert find(settings_of(), here=9999, streams=4) == ((512, 6), [512])  # small data: of one stream it would be more


def test_a_step_is_that_of_the_recipe_whose_number_auto_replaces():
    recipe = {"training": {"tokens_per_micro_batch": 4096, "micro_batches_per_step": 4}}
    auto = {"training": {"tokens_per_micro_batch": "auto"}}
    assert over(recipe, auto)["training"] == recipe["training"] | auto["training"] | {"auto_from": 4096}
    own = {"training": {"tokens_per_micro_batch": "auto", "auto_from": 1024}}
    assert over(recipe, own)["training"]["auto_from"] == 1024
    assert over(own, auto)["training"]["auto_from"] == 1024
    assert "auto_from" not in over(own, {"training": {"tokens_per_micro_batch": 512}})["training"]
    assert over(own, {"training": {"steps": 3}})["training"] == own["training"] | {"steps": 3}


@pytest.mark.parametrize(
    ("training", "named"),
    [
        ({"auto_from": 128}, r"`training.auto_from` must be at least the longest path of 256"),
        ({"auto_from": 1000}, r"`training.auto_from` must be a multiple of 128"),
        ({"tokens_per_micro_batch": 512, "auto_from": 1024}, r"`training.auto_from` must be left out"),
    ],
)
def test_what_cannot_be_is_refused(training, named):
    with pytest.raises(SettingsError, match=named):
        refuse_problems(settings_of(**training).problems())
    refuse_problems(settings_of().problems())


def test_only_the_size_of_the_same_step_is_taken_over():
    earlier = settings_of(tokens_per_micro_batch=256, auto_from=8192, micro_batches_per_step=12)
    assert size_of(with_size_of(settings_of(), earlier)) == (256, 12)
    assert with_size_of(settings_of(), earlier).training == earlier.training
    assert with_size_of(settings_of(auto_from=1024), earlier).training.tokens_per_micro_batch == "auto"
    assert size_of(with_size_of(earlier, settings_of(tokens_per_micro_batch=512))) == (256, 12)


def test_what_does_not_fit_beside_what_is_taken_is_told(tiny_gpt2, make_tree, accelerator):
    model = TargetLogProbs(tiny_gpt2(4096, 64), 4096, "segments")
    stream = build_stream([weigh(make_tree(("user", 5, -1), ("assistant", 7, 0)), "once")], 64, 64)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert fits(model, accelerator, stream, 1000)
    assert not fits(model, accelerator, stream, 1 << 60)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(AttributeError):
        fits(model, accelerator, None, 1000)


def test_the_run_is_that_of_the_same_number_set_by_hand_and_keeps_it(run_sft, stopped_after, tmp_path, monkeypatch):
    """It goes on with the number of the first start where there is more memory later."""
    free = SimpleNamespace(available=300 / 0.9)
    monkeypatch.setattr(micro_batch.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(micro_batch, "memory_estimate", lambda gpt2, capacity, hardware: capacity)
    run_sft(tmp_path / "by_hand", 4, tokens_per_micro_batch=256, micro_batches_per_step=12)
    with stopped_after(3):
        run_sft(tmp_path / "auto", 4, **AUTO)
    free.available = 10**6
    run_sft(tmp_path / "auto", 4, **AUTO)
    runs = [tmp_path / "by_hand", tmp_path / "auto"]
    expected, found = (load_file(run / "model" / "model.safetensors") for run in runs)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [[json.loads(line).get("train/loss") for line in (run / "metrics.jsonl").open()] for run in runs]
    assert losses[0] == losses[1]
    manifests = [json.loads((run / "manifest.json").read_text()) for run in runs]
    assert manifests[0]["settings"]["training"] == manifests[1]["settings"]["training"]
    assert manifests[1]["settings"]["training"]["tokens_per_micro_batch"] == 256
    assert [start["step"] for start in manifests[1]["starts"]] == [0, 2]
    assert manifests[0]["plan"] == manifests[1]["plan"]
    with pytest.raises(SettingsError, match="`training.tokens_per_micro_batch` was 256 and is now auto"):
        run_sft(tmp_path / "auto", 4, **AUTO | {"auto_from": 1024})
