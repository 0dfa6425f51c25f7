"""All machines must see the same output folder."""

from types import SimpleNamespace

import pytest

from gpt2ft.distributed import shared_folder
from gpt2ft.distributed.launch_checks import LaunchError
from gpt2ft.distributed.shared_folder import check_shared


@pytest.fixture
def accelerator(monkeypatch):
    """accelerator(what the other process says): of the first of two processes."""
    import accelerate.utils

    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", list)
    monkeypatch.setattr(shared_folder, "SECONDS_TO_APPEAR", 0.0)

    def make(other, is_main=True):
        monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine: [*mine, other])
        return SimpleNamespace(
            num_processes=2, is_main_process=is_main, process_index=1 - is_main, wait_for_everyone=lambda: None
        )

    return make


def test_a_folder_that_all_see_is_left_as_it_was(accelerator, tmp_path):
    check_shared(accelerator(None), tmp_path)
    assert not list(tmp_path.iterdir())
    check_shared(SimpleNamespace(num_processes=1), tmp_path / "none")


def test_a_machine_that_sees_another_is_named(accelerator, tmp_path):
    with pytest.raises(LaunchError, match=r"all machines share, but rank 1 \(host there\) does not find in /x"):
        check_shared(accelerator((1, "there", "/x")), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["", "none"])
def test_one_that_finds_nothing_says_where(folder, accelerator, tmp_path):
    """Not even the folder, perhaps."""
    with pytest.raises(LaunchError, match=rf"rank 1 \(host .*\) does not find in {tmp_path / folder} what"):
        check_shared(accelerator(None, is_main=False), tmp_path / folder)


def test_a_file_that_shows_late_is_waited_for(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "SECONDS_TO_APPEAR", 10.0)
    monkeypatch.setattr(shared_folder.uuid, "uuid4", lambda: SimpleNamespace(hex="x"))
    monkeypatch.setattr(shared_folder.time, "sleep", lambda seconds: (tmp_path / ".shared-x").touch())
    check_shared(accelerator(None, is_main=False), tmp_path)
    assert (tmp_path / ".shared-x").exists()
