"""The device is the one that was asked for: no GPU stands by unused, none is asked for what it has not."""

import os
import sys
from contextlib import nullcontext

import pytest
import torch
from facts import tells
from processes import OF_LAUNCHERS, ON_CPU, run

from gpt2ft import device
from gpt2ft.device import (
    CACHES_OF_SHAPES,
    SHAPES_KEPT,
    DeviceError,
    available_cores,
    check_gpu,
    choose_precision,
    compiler_problem,
    find_gpu,
    on_cuda,
)

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update it.\nMore."


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    names = ("CUDA_VISIBLE_DEVICES", "CC", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "LOCAL_RANK")
    for name in [*names, *(name for name in os.environ if name.startswith(OF_LAUNCHERS))]:
        monkeypatch.delenv(name, raising=False)


def fail_with(sentence):
    def fail(*_, **__):
        raise RuntimeError(sentence)

    return fail


@pytest.fixture
def unusable_gpu(monkeypatch):
    """A card, PyTorch built for CUDA, and a driver too old for it."""
    monkeypatch.setattr(device, "find_gpu", lambda is_for_cpus: "/dev/nvidia0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail_with(TOO_OLD))


@pytest.fixture
def usable_gpu(monkeypatch):
    """make(name, has_bf16): a card that PyTorch uses."""

    def make(name="Tesla T4", has_bf16=False, capability=(7, 5)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        emulated = {True: True, False: has_bf16}
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: emulated[including_emulation]
        )

    return make


class TestGPU:
    @pytest.mark.parametrize(
        "file",
        [
            "dev/nvidia0",
            "proc/driver/nvidia/gpus/0000:00:1e.0/information",
            "usr/lib/wsl/lib/libcuda.so.1",
            "sys/bus/pci/devices/0000:00:1e.0/vendor",
        ],
    )
    def test_is_found_with_and_without_a_driver(self, file, tmp_path):
        assert find_gpu(tmp_path) is None
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("0x10de\n")
        (tmp_path / file).with_name("class").write_text("0x030200\n")
        assert find_gpu(tmp_path).startswith(str(tmp_path / file.split("/")[0]))
        assert (find_gpu(tmp_path, is_for_cpus=True) is None) == file.startswith(("proc", "sys"))

    @pytest.mark.parametrize(
        ("vendor", "kind"), [("0x8086", "0x030000"), ("0x10de", "0x040300"), ("0x10de", "0x0c0330")]
    )
    def test_is_not_what_has_another_maker_or_purpose(self, vendor, kind, tmp_path):
        """NVIDIA's cards are devices for sound and USB too."""
        folder = tmp_path / "sys/bus/pci/devices/0000:00:1e.1"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor)
        (folder / "class").write_text(kind)
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev" / "nvidiactl").touch()
        assert find_gpu(tmp_path) is None

    def test_is_not_left_unused_in_silence(self, unusable_gpu):
        with pytest.raises(DeviceError) as refusal:
            check_gpu()
        facts = "/dev/nvidia0 ... too old (found version 12020) ... CUDA 13.0 ... driver ... ACCELERATE_USE_CPU=true"
        assert tells(str(refusal.value), facts)
        assert "More" not in str(refusal.value)
        assert refusal.value.exit_code == 2

    @pytest.mark.parametrize("module", ["x86_64 Kernel Module  535.54.03", "Open Kernel Module for x86_64  535.54.03"])
    def test_has_a_driver_of_some_version(self, module, tmp_path):
        assert device._driver(tmp_path) is None
        (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
        text = f"NVRM version: NVIDIA UNIX {module}  Tue Jun 6 2023\nGCC version:  gcc version 12.2.0\n"
        (tmp_path / "proc/driver/nvidia/version").write_text(text)
        assert device._driver(tmp_path) == "535.54.03"

    def test_that_is_available_but_counts_none(self, unusable_gpu, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        with pytest.raises(DeviceError, match="/dev/nvidia0"):
            check_gpu()

    def test_beside_a_build_for_cpus(self, unusable_gpu, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        with pytest.raises(DeviceError) as refusal:
            check_gpu()
        assert tells(
            str(refusal.value), "/dev/nvidia0 ... built for CPUs ... build for CUDA ... ACCELERATE_USE_CPU=true"
        )

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("ACCELERATE_USE_CPU", value) for value in ("true", "On", "1")),
            *(("CUDA_VISIBLE_DEVICES", value) for value in ("", "-1")),
        ],
    )
    def test_may_stand_by_where_the_cpu_was_asked_for(self, name, value, unusable_gpu, monkeypatch):
        monkeypatch.setenv(name, value)
        check_gpu()
        assert not on_cuda()

    @pytest.mark.parametrize(("name", "value"), [("ACCELERATE_USE_CPU", "false"), ("CUDA_VISIBLE_DEVICES", "7")])
    def test_may_not_where_something_else_was(self, name, value, unusable_gpu, monkeypatch):
        monkeypatch.setenv(name, value)
        with pytest.raises(DeviceError) as refusal:
            check_gpu()
        assert (f"CUDA_VISIBLE_DEVICES is {value!r}" in str(refusal.value)) == (name == "CUDA_VISIBLE_DEVICES")

    def test_for_which_the_build_has_no_kernels(self, usable_gpu, monkeypatch):
        usable_gpu("Quadro K2000")
        monkeypatch.setattr(torch, "zeros", fail_with("CUDA error: no kernel image is available\nCompile with ..."))
        with pytest.raises(DeviceError) as refusal:
            check_gpu()
        assert tells(str(refusal.value), "Quadro K2000 ... no kernel image is available ... ACCELERATE_USE_CPU=true")

    def test_none_at_all_is_well(self, monkeypatch):
        monkeypatch.setattr(device, "find_gpu", lambda is_for_cpus: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        check_gpu()

    def test_is_not_left_unused_by_any_script(self, unusable_gpu):
        from gpt2ft.distributed.accelerator import start_accelerator
        from gpt2ft.runs.inference_model import load_inference_model
        from gpt2ft.settings.using import ChatSettings

        with pytest.raises(DeviceError):
            start_accelerator("auto")
        with pytest.raises(DeviceError):
            load_inference_model(ChatSettings(model="no/such/model"), seed=0)


class TestPrecision:
    @pytest.mark.parametrize(
        ("has_bf16", "asked", "found"),
        [
            (True, "auto", "bf16"),
            (True, "bf16", "bf16"),
            (True, "fp32", "fp32"),
            (False, "fp32", "fp32"),
            (False, "fp16", "fp16"),
        ],
    )
    def test_on_a_gpu(self, has_bf16, asked, found, usable_gpu, capsys):
        usable_gpu(has_bf16=has_bf16)
        assert choose_precision(asked) == found
        assert capsys.readouterr().err == ""

    def test_auto_without_bf16(self, usable_gpu, capsys):
        usable_gpu()
        assert torch.cuda.is_bf16_supported()  # emulated
        assert choose_precision("auto") == "fp16"
        assert tells(capsys.readouterr().err, "Tesla T4 ... no bf16 ... fp16")
        assert choose_precision("auto", without_bf16="fp32") == "fp32"  # under ZeRO
        assert tells(capsys.readouterr().err, "Tesla T4 ... no bf16 ... fp32 ... memory")

    def test_bf16_that_is_emulated(self, usable_gpu, capsys):
        usable_gpu()
        assert choose_precision("bf16") == "bf16"
        assert tells(capsys.readouterr().err, "Tesla T4 ... no bf16 ... emulated ... `precision fp16`")

    def test_shapes_of_products_take_no_more_and_more_memory(self):
        program = """
import psutil, torch
from gpt2ft.device import choose_precision
choose_precision("bf16")
torch.set_num_threads(1)
states, resident = torch.ones(700, 64, dtype=torch.bfloat16), []
for shape in range(1, 601):
    torch.mm(states[:shape], states[: shape + 100].t())
    if shape in (300, 600):
        resident.append(psutil.Process().memory_info().rss)
print(resident[1] - resident[0])
"""
        unset = dict.fromkeys(CACHES_OF_SHAPES)
        assert int(run([sys.executable, "-c", program], **ON_CPU, **unset).stdout) < 60 * 2**20

    def test_a_number_of_shapes_that_somebody_has_set_stays(self, monkeypatch):
        one, other = CACHES_OF_SHAPES
        monkeypatch.setenv(one, "7")
        monkeypatch.setenv(other, "")  # to be put back in the end
        monkeypatch.delenv(other)
        choose_precision("fp32")
        assert (os.environ[one], os.environ[other]) == ("7", str(SHAPES_KEPT))

    @pytest.mark.parametrize("asked", ["auto", "fp32", "bf16"])
    def test_float32_is_not_rounded_to_tf32(self, asked):
        """Nor in chat and server, which start no accelerator."""
        torch.set_float32_matmul_precision("high")  # as in vendors' images
        try:
            choose_precision(asked)
            assert torch.get_float32_matmul_precision() == "highest"
        finally:
            torch.set_float32_matmul_precision("highest")

    def test_on_a_cpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert [choose_precision(asked) for asked in ("auto", "fp32", "bf16", "fp16")] == [
            "fp32",
            "fp32",
            "bf16",
            "fp16",
        ]


class TestCompiling:
    @pytest.fixture
    def compiler(self, usable_gpu, tmp_path, monkeypatch):
        """compiler(script): a compiler that does what the script says."""
        usable_gpu()
        monkeypatch.setattr(device, "find_spec", lambda name: name)

        def make(script):
            (tmp_path / "mycc").write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "mycc").chmod(0o755)
            monkeypatch.setenv("CC", str(tmp_path / "mycc"))

        return make

    def test_with_compiler_and_headers(self, compiler):
        compiler('case "$*" in *-shared*-I*/include/*) exit 0;; esac; exit 1')
        assert compiler_problem() is None

    def test_without_a_compiler(self, compiler, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        assert tells(compiler_problem(), "no C compiler ... gcc")
        monkeypatch.setenv("CC", "mycc-9")
        assert tells(compiler_problem(), "no C compiler mycc-9 ... CC ... gcc")

    @pytest.mark.parametrize("header", ["Python.h", "stdlib.h"])
    def test_without_headers(self, header, compiler):
        compiler(f"echo 'In file included from m.c:1:\nm.c:1: fatal error: {header}: No such file' >&2; exit 1")
        assert tells(compiler_problem(), f"mycc ... {header}: No such file ... python3-dev")

    def test_that_is_switched_off(self, compiler, monkeypatch):
        compiler("exit 0")
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
        assert "TORCHDYNAMO_DISABLE=1" in compiler_problem()

    def test_without_triton(self, compiler, monkeypatch):
        compiler("exit 0")
        monkeypatch.setattr(device, "find_spec", lambda name: None)
        assert "pip install triton" in compiler_problem()

    def test_for_a_card_too_old_for_triton(self, compiler, usable_gpu):
        compiler("exit 0")
        usable_gpu("Tesla P100", capability=(6, 0))
        assert tells(compiler_problem(), "7.0 ... Tesla P100")


class TestCores:
    @pytest.fixture
    def machine(self, tmp_path, monkeypatch):
        """machine(membership, {file: text}): one of 16 cores, with these cgroups."""
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)

        def make(membership, **files):
            for name, text in {"proc/self/cgroup": membership, **files}.items():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_text(text)
            return tmp_path

        return make

    @pytest.mark.parametrize(
        ("quota", "cores"),
        [("max 100000", 16), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("3200000 100000", 16)],
    )
    def test_of_a_container(self, quota, cores, machine):
        assert available_cores(machine("0::/\n", **{"sys/fs/cgroup/cpu.max": f"{quota}\n"})) == cores

    def test_of_a_group_within_a_group(self, machine):
        """The path is the host's where the container sees only its own part of the tree."""
        quotas = {"sys/fs/cgroup/a/cpu.max": "300000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}
        assert available_cores(machine("0::/a/b\n", **quotas)) == 3
        quotas = {"sys/fs/cgroup/cpu.max": "200000 100000\n"}
        assert available_cores(machine("0::/docker/0123\n", **quotas)) == 2

    def test_of_version_1(self, machine):
        quota = {
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "600000\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
        }
        top = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}
        assert available_cores(machine("5:memory:/x\n4:cpu,cpuacct:/x\n", **quota, **top)) == 6

    def test_without_cgroups(self, tmp_path, machine):
        assert available_cores(tmp_path) == 16
