"""One training run, however many processes it is on and however model and optimizer lie on them.

Every topology trains the same small runs, in one launch each, and continues runs that itself or another has left
half done. All are compared with one process. Conversations are of very uneven length, dropout is on, the last step of
the run is short, and one run stops in the second epoch.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from processes import ON_CPU, run, torchrun
from safetensors.torch import load_file

STEPS = 5  # two epochs, the first of which ends within the third step and the second within the last
STOP_AFTER = 4
MICRO_BATCHES = 12
LEARNING_RATE = 1e-2
ENVIRONMENTS = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
MOMENTS_ON_CPU = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
WEIGHTS_TOO = MOMENTS_ON_CPU | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
ENVIRONMENTS |= {
    "zero2-offload": ENVIRONMENTS["zero2"] | MOMENTS_ON_CPU,
    "zero3-offload": ENVIRONMENTS["zero3"] | WEIGHTS_TOO,
}
ALONE = "ddp 1"
SAMPLE = ["fsdp2 2"]
LONG = ["zero3 2", "ddp 3", "zero2 3"]
CAMPAIGN = [
    "ddp 2",
    "zero2 2",
    "fsdp2 3",
    "zero3 3",
    "ddp 4",
    "fsdp2 4",
    "zero2 4",
    "zero3 4",
    "zero2-offload 2",
    "zero3-offload 2",
]

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["q", "v", "o", "fc"]}
DORA = LORA | {"dropout": 0.0, "dora": True, "plus_ratio": 2.0, "rank_per_target": ["v=6"]}
KINDS = ["sft", "sft lora", "dpo", "dpo lora", "dpo kto", "sometimes nan"]
FEW = [
    "sft",
    "sft stopped",
    "sft continued",
    "dpo lora",
    "sometimes nan",
    "impatient",
]  # with these the plain tests make do
REST = ["sft lora", "sft lora stopped", "sft lora continued", "dpo", "dpo kto"]
BF16, FP16 = (
    [f"{run}{how}" for run in kinds for how in ("", " stopped", " continued")]
    for kinds in (("bf16", "bf16 lora"), ("fp16",))
)
COMPILED = ["compiled", "bf16 compiled"]  # but on one process plain


def cases(runs, topologies=(*SAMPLE, *LONG, *CAMPAIGN)):
    """Each run on each topology, in its tier."""
    for topology in topologies:
        for name in runs:
            is_plain = topology in SAMPLE and name in FEW
            tier = pytest.mark.campaign if topology in CAMPAIGN else () if is_plain else pytest.mark.long
            yield pytest.param(name, topology, marks=tier, id=f"{name}-{topology}")


def everywhere(runs, topologies=(*SAMPLE, *LONG, *CAMPAIGN)):
    return pytest.mark.parametrize(("run", "topology"), list(cases(runs, topologies)))


def sources(topology):
    """Where a topology goes on: where one process has stopped, and the one before it in its list."""
    (group,) = [group for group in (SAMPLE, LONG, CAMPAIGN) if topology in group]
    before = group[group.index(topology) - 1 : group.index(topology)]
    return [ALONE, *before]


@dataclass
class Runs:
    """Output folders by (topology, run); a topology is launched when it is first asked for."""

    root: Path
    shape: Path
    weights: Path
    launched: set = field(default_factory=set)

    def get(self, topology, run):
        if (topology, run) not in self.launched:
            goes_on = topology == ALONE and run.startswith("from ")
            self.launch(topology, self.left_by_others() if goes_on else self.launched_with(topology, run))
        return self.root / topology / run

    def launched_with(self, topology, run):
        """The runs that share the launch of this one."""
        few, rest = list(FEW), list(REST)
        if topology != ALONE:
            few += [f"from {source}" for source in sources(topology)]
        launches = [few, rest] if topology in (ALONE, *SAMPLE) else [few + rest]
        if topology in CAMPAIGN:
            launches = [few + rest + BF16 + ([] if topology.startswith("zero") else FP16)]
        return next((runs for runs in [*launches, COMPILED] if run in runs), [run])

    def left_by_others(self):
        """What one process can go on from by now."""
        topologies = dict.fromkeys(topology for topology, _ in self.launched if topology != ALONE)
        left = [f"from {topology}" for topology in topologies]
        return [run for run in left if (ALONE, run) not in self.launched]

    def launch(self, topology, runs):
        strategy, processes = topology.split()
        folder = self.root / topology
        folder.mkdir(exist_ok=True)
        cases = folder / "cases.json"
        cases.write_text(json.dumps([self.case(topology, run) for run in runs]))
        script = Path(__file__).parent / "many_processes.py"
        run([*torchrun(processes), script, cases], seconds=900, **(ON_CPU | ENVIRONMENTS[strategy]))
        self.launched |= {(topology, run) for run in runs}

    def case(self, topology, run):
        """What the driver is told."""
        case = {}
        output = self.root / topology / run
        if run.startswith("from "):
            case["goes_on_from"] = str(self.get(run.removeprefix("from "), "sft stopped"))
            run = "sft"
        elif run.endswith(" continued"):
            run = run.removesuffix(" continued")
            case["goes_on_from"] = str(self.root / topology / f"{run} stopped")
        elif run.endswith(" stopped"):
            run = run.removesuffix(" stopped")
            case["stop_after"] = STOP_AFTER
        kind = "dpo" if run.startswith("dpo") else run if run in (*KINDS, "impatient") else "sft"
        settings = self.settings(run, kind) | {"output": str(output)}
        if run in COMPILED:  # dropout's noise would be the graphs' own
            settings["model"] |= {"dropout": 0.0, "neftune_alpha": 0.0, "attention": "dense"}
            settings["training"] |= {"steps": 2, "compile": "true" if topology != ALONE else "false"}
        return case | {"kind": kind.removesuffix(" lora"), "settings": settings}

    def settings(self, run, kind):
        adapts, compares = run.endswith("lora"), kind == "dpo"
        from_weights = {"path": str(self.weights)}
        random = {"path": str(self.shape), "random_init": True}
        dropout = {} if compares else {"dropout": 0.1, "neftune_alpha": 1.0}
        impatient = run == "impatient"
        return {
            "model": (from_weights if adapts or compares else random) | dropout,
            "lora": (DORA if compares else LORA) if adapts else {},
            "data": {
                "train": ["quickstart@0.28" if compares else "quickstart@0.4"],
                "eval": [],
                "eval_fraction": 0.05,
                "max_length": 256,
                "max_rank": None if compares else 1,
                "cache": str(self.root / "cache"),
            },
            "training": {
                "epochs": 2,
                "tokens_per_micro_batch": 256,
                "micro_batches_per_step": MICRO_BATCHES,
                "eval_every": 1 if impatient else 3,
                "patience": 1 if impatient else None,
                "save_every": 2,
                "log_every": 1,
                "sample_prompts": 1,
                "sample_tokens": 4,
                "max_grad_norm": 0.5,
                "precision": run[:4] if run.startswith(("bf16", "fp16")) else "fp32",
                "activation_checkpointing": adapts,
            },
            # The gradients of KTO are small: some are rounding, which Adam would learn as if it were something.
            "optimizer": {"learning_rate": LEARNING_RATE} | ({"epsilon": 1e-6} if run == "dpo kto" else {}),
        } | ({"dpo": {"loss": "kto", "undesirable_weight": 1.5}} if run == "dpo kto" else {})


@pytest.fixture(scope="module")
def runs(make_tiny_model, write_tiny_weights, tmp_path_factory):
    shape = make_tiny_model(None)  # STEPS, and where its epochs end, go by the tokens of this one
    return Runs(tmp_path_factory.mktemp("runs"), shape, write_tiny_weights(shape))


def logged(folder, key):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: math.nan if line[key] is None else line[key] for line in lines if key in line}


def weights(folder):
    adapter = folder / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model" / "model.safetensors")


def assert_the_same_run(found, expected):
    tolerances = {"train/loss": 1e-5, "eval/loss": 1e-5, "eval/accuracy": 1e-5, "train/grad_norm": 1e-4}
    for key, tolerance in tolerances.items():
        assert logged(found, key) == pytest.approx(logged(expected, key), rel=tolerance, nan_ok=True), key
    assert len(logged(found, "train/loss")) == STEPS
    assert_close(found, expected)


def assert_close(found, expected):
    """Adam divides by the gradient's own size, so where that is rounding, rounding is what it learns."""
    one, other = weights(found), weights(expected)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert float((one[name] - tensor).abs().max()) <= 0.01 * LEARNING_RATE, name


def assert_equal_in_every_bit(found, expected):
    one, other = weights(found), weights(expected)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for key in ("train/loss", "eval/loss"):
        assert logged(found, key) == logged(expected, key)


@everywhere(KINDS)
def test_it_is_the_run_of_one_process(run, topology, runs):
    assert_the_same_run(runs.get(topology, run), runs.get(ALONE, run))
    manifest = json.loads((runs.get(topology, run) / "manifest.json").read_text())
    assert f"{manifest['strategy']} {manifest['processes']}" == topology.replace("-offload", "")


@everywhere(["sometimes nan"])
def test_steps_without_a_finite_gradient_are_left_out_alike(run, topology, runs):
    skipped = logged(runs.get(topology, run), "train/skipped_steps")
    assert 0 < skipped[STEPS] < STEPS
    assert skipped == logged(runs.get(ALONE, run), "train/skipped_steps")


@everywhere(["impatient"])
def test_all_processes_end_early_together(run, topology, runs):
    found, alone = (
        json.loads((runs.get(name, run) / "manifest.json").read_text())["finished"] for name in (topology, ALONE)
    )
    assert (found["step"], found["best_step"]) == (alone["step"], alone["best_step"]) == (2, 1)


@everywhere(["sft", "sft lora"])
def test_going_on_gives_the_same_bits(run, topology, runs):
    assert_equal_in_every_bit(runs.get(topology, f"{run} continued"), runs.get(topology, run))


HALF = [
    *cases(["bf16", "bf16 lora"], CAMPAIGN),
    *cases(["fp16"], [topology for topology in CAMPAIGN if not topology.startswith("zero")]),
]
in_half_precision = pytest.mark.parametrize(("run", "topology"), HALF)


@in_half_precision
def test_half_precision_is_that_of_one_process(run, topology, runs):
    """As near as it is to itself, whose rounding is not float32's."""
    found, expected = (logged(runs.get(name, run), "train/loss") for name in (topology, ALONE))
    assert found == pytest.approx(expected, rel=1e-3)
    assert found != pytest.approx(logged(runs.get(ALONE, run.replace(run[:4], "sft")), "train/loss"), rel=1e-6)


@in_half_precision
def test_going_on_in_half_precision_gives_the_same_bits(run, topology, runs):
    assert_equal_in_every_bit(runs.get(topology, f"{run} continued"), runs.get(topology, run))


@pytest.mark.long
@pytest.mark.parametrize("run", COMPILED)
@pytest.mark.parametrize("topology", ["ddp 2", "fsdp2 2", "zero2 2"])
def test_compiled_blocks_give_the_run_of_plain_ones(run, topology, runs):
    found, plain = (runs.get(name, run) for name in (topology, ALONE))
    for key in ("train/loss", "eval/loss"):
        assert logged(found, key) == pytest.approx(logged(plain, key), rel=1e-3 if "bf16" in run else 1e-5), key
    assert len(logged(found, "train/loss")) == 2
    if "bf16" not in run:
        assert_close(found, plain)


@everywhere(["sft"])
def test_it_goes_on_from_what_others_have_left(run, topology, runs):
    for source in sources(topology):
        assert_the_same_run(runs.get(topology, f"from {source}"), runs.get(ALONE, run))


@everywhere(["sft", "sft lora", "dpo"])
def test_transformers_loads_the_model_with_its_table_tied(run, topology, runs):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(runs.get(topology, run) / "model")
    assert model.lm_head.weight is model.transformer.wte.weight


@everywhere(["sft"])
def test_one_process_goes_on_from_what_many_have_left(run, topology, runs):
    runs.get(topology, "sft stopped")
    assert_the_same_run(runs.get(ALONE, f"from {topology}"), runs.get(ALONE, run))
