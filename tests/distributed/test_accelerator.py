"""What a launch may ask of the accelerator, and what processes must agree on before they train together."""

import os
from types import SimpleNamespace

import accelerate.utils
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from facts import tells
from processes import OF_LAUNCHERS

from gpt2ft.checkpoint_verification import CheckpointError
from gpt2ft.distributed.accelerator import LaunchError, loss_scale, once_a_machine, start_accelerator, sum_and_any

# --- a launch ------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(monkeypatch):
    """start(micro-batches a step, **environment): the accelerator that this process would train with."""
    for name in [name for name in os.environ if name.startswith(OF_LAUNCHERS)]:
        monkeypatch.delenv(name)

    def start(micro_batches_per_step, **environment):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        threads = torch.get_num_threads()
        try:
            return start_accelerator("fp32", micro_batches_per_step)
        finally:
            torch.set_num_threads(threads)

    return start


@pytest.fixture
def refusal(start):
    """refusal(micro-batches a step, **environment): why such a launch is refused."""

    def refusal(micro_batches_per_step, **environment):
        with pytest.raises(LaunchError) as error:
            start(micro_batches_per_step, **environment)
        return str(error.value)

    return refusal


def test_accumulation_follows_from_the_micro_batches(start):
    assert start(6).gradient_accumulation_steps == 6


def test_ddp_keeps_gradients_in_its_buckets_alone(start):
    assert start(1).ddp_handler.gradient_as_bucket_view


@pytest.mark.parametrize(
    ("micro_batches", "processes", "instead"), [(6, 4, "4 or 8"), (3, 8, "8"), (1, 2, "2"), (7, 3, "6 or 9")]
)
def test_micro_batches_that_the_processes_cannot_share_equally(refusal, micro_batches, processes, instead):
    said = refusal(micro_batches, WORLD_SIZE=str(processes))
    facts = f"`training.micro_batches_per_step` ... {processes} processes ... is {micro_batches} ... {instead}"
    assert tells(said, facts)


def test_float32_is_not_rounded_to_tf32(start, monkeypatch):
    """Where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 is set, as in vendors' images, PyTorch starts like this."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert torch.get_float32_matmul_precision() == "high"
        start(1)
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_the_launcher_has_no_say_in_accumulation(refusal, start):
    said = refusal(6, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert tells(said, "gradient_accumulation_steps ... is 4 ... 6 follow")
    assert tells(
        refusal(6, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1"), "gradient_accumulation_steps ... is 1 ... 6 follow"
    )
    assert start(4, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4").gradient_accumulation_steps == 4


def test_a_precision_that_is_not_ours_is_refused(refusal):
    assert "mixed_precision must be no, bf16 or fp16, but is fp8" in refusal(1, ACCELERATE_MIXED_PRECISION="fp8")


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_of_mpirun_or_srun_are_refused(refusal, name):
    assert "4 processes were started by mpirun or srun, but each would train alone" in refusal(4, **{name: "4"})


# --- sums ----------------------------------------------------------------------------------------------------------


def test_sums_and_flags_of_all_processes_in_one_exchange():
    """The other process has the sums 10 and 20, and the second flag."""
    other, exchanged = torch.tensor([10.0, 20.0, 0.0, 1.0], dtype=torch.float64), []

    def reduce(local, reduction):
        exchanged.append(reduction)
        return local + other

    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=reduce)
    mine = torch.tensor([1.0, 2.0], dtype=torch.float64)
    sums, flags = sum_and_any(two, mine, False, False)
    assert (sums.tolist(), flags) == ([11.0, 22.0], [False, True])
    assert sum_and_any(two, mine, True, True)[1] == [True, True]
    assert exchanged == ["sum", "sum"]
    alone = SimpleNamespace(num_processes=1)
    assert sum_and_any(alone, mine, True, False) == (mine, [True, False])


def test_the_loss_scale_undoes_what_others_divide_by():
    four = SimpleNamespace(num_processes=4, gradient_accumulation_steps=3)
    scales = [loss_scale(four, torch.tensor(normalizer, dtype=torch.float64)) for normalizer in (7.0, 0.0)]
    assert [float(scale) for scale in scales] == [float(np.float32(12 / 7)), 0.0]
    assert {scale.dtype for scale in scales} == {torch.float32}  # a float64 would make the loss one


# --- what one process does for those beside it ----------------------------------------------------------------------


@pytest.fixture
def on_rank(monkeypatch):
    """on_rank(rank, others): `once_a_machine` on one of four processes of two machines; how often it worked."""

    def on_rank(rank, others):
        worked = []
        accelerator = SimpleNamespace(
            num_processes=4, process_index=rank, local_process_index=rank % 2, is_local_main_process=rank % 2 == 0
        )
        monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine: others[:rank] + mine + others[rank + 1 :])
        return once_a_machine(accelerator, lambda: worked.append(rank) or f"seen by {rank}"), len(worked)

    return on_rank


def test_the_first_of_each_machine_works_for_all_of_it(on_rank):
    others = [("seen by 0", None), (None, None), ("seen by 2", None), (None, None)]
    assert [on_rank(rank, others) for rank in range(4)] == [
        ("seen by 0", 1), ("seen by 0", 0), ("seen by 2", 1), ("seen by 2", 0),
    ]  # fmt: skip


def test_what_fails_on_one_machine_fails_everywhere(on_rank):
    others = [("seen by 0", None), (None, None), (None, CheckpointError("step-00000004 is damaged")), (None, None)]
    for rank in (0, 1, 3):
        with pytest.raises(CheckpointError, match="step-00000004"):
            on_rank(rank, others)


def test_a_process_that_trains_alone_does_it_itself():
    assert once_a_machine(SimpleNamespace(num_processes=1), lambda: "seen") == "seen"
