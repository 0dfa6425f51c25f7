"""Only a GPU can tell: each section in a process of its own, the most telling first, all within eight minutes."""

import pytest
from section_process import run_section
from sections import SECTIONS

LEAST_SECONDS = 20  # in which a section may come to figures


@pytest.mark.gpu
@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_holds_on_the_gpu(name, results, seconds_left):
    if name.endswith("_usual"):
        pytest.importorskip("transformers")
    seconds = min(SECTIONS[name].seconds, seconds_left())
    if seconds < LEAST_SECONDS:
        pytest.skip(f"the time for all sections is up: `pytest -m gpu tests/gpu -k {name}` runs this one")
    run_section(name, "cuda", results, seconds)
