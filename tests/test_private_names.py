"""Names that others keep for themselves and this package uses all the same: an upgrade that moves one fails here.

What is listed is all there is: a use that is not listed fails too.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gpt2ft"
OURS = {"_handle"}  # of another object of the same class
OF_PYTHON = {"_exit", "_current_frames", "_actions", "_replace"}
# name -> where it must be: a module, and a class of it or an expression that must stand in its source
USED = {
    "_get_default_store": ("torch.distributed.distributed_c10d", None),
    "_world": ("torch.distributed.distributed_c10d", None),
    "_get_sequence_number_for_group": ("torch.distributed", "ProcessGroup"),
    "_rendezvous_handlers": ("torch.distributed.rendezvous", None),
    "_orig_mod": ("torch._dynamo.eval_frame", "OptimizedModule"),
    "_shared_state": ("accelerate.state", "PartialState"),
    "_hp_optimizer_states_linked": ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"),
    "_lazy_init_hp_params_optimizer_state": ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"),
    "_update_scale": ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"),
}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed warns of a machine without a GPU


def private_names(file):
    """Attributes that begin with an underscore, but those of self, cls and our own modules; strings that are one."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in OWNERS):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("gpt2ft"):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            yield getattr(node.args[1], "value", "")


OWNERS = ("self", "cls")


def test_every_private_name_is_listed():
    found = {name for file in PACKAGE.rglob("*.py") for name in private_names(file) if re.match("_[a-z]", str(name))}
    assert found == OURS | OF_PYTHON | USED.keys()


@pytest.mark.parametrize("name", USED)
def test_it_is_there(name):
    module, owner = USED[name]
    holder = importlib.import_module(module)
    if owner is None:
        assert hasattr(holder, name)
    else:
        kind = getattr(holder, owner)
        assert hasattr(kind, name) or f"self.{name}" in inspect.getsource(kind)


def test_torch_has_what_is_done_with_them():
    from torch.distributed import distributed_c10d

    assert list(distributed_c10d._world.pg_map) == []
    assert callable(importlib.import_module("torch.distributed.rendezvous")._rendezvous_handlers["env"])


def test_deepspeed_asks_before_it_updates():
    """In each stage a step asks `_update_scale`, and goes by `overflow` after that."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    asks = r"self\._update_scale\(self\.overflow\)(?s:.){0,200}\bif self\.overflow:"
    assert re.search(asks, inspect.getsource(DeepSpeedZeroOptimizer.step))
    stage3 = inspect.getsource(DeepSpeedZeroOptimizer_Stage3)
    assert re.search(asks, stage3)
    assert re.search(r"if self\._\w*overflow_cleanup\(\):", stage3)


def test_names_without_an_underscore_that_no_documentation_has():
    import deepspeed.comm  # noqa: F401
    from accelerate.commands.launch import launch_command_parser
    from deepspeed.runtime.zero import partition_parameters

    assert hasattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op")
    assert "ds_tensor" in inspect.getsource(partition_parameters)
    assert any(action.dest == "num_processes" for action in launch_command_parser()._actions)
