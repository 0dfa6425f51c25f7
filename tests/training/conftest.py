"""One process, as training has it."""

import pytest

from gpt2ft.training import distributed


@pytest.fixture(scope="module")
def accelerator():
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return distributed.start("fp32")
