from pathlib import Path

import pytest
import torch

from torchtune_fused.build.target import Target


@pytest.mark.parametrize(
    ("text", "native", "ptx"),
    [
        ("8.6", ("8.6",), None),
        ("8.0;8.6;8.9;9.0a", ("8.0", "8.6", "8.9", "9.0a"), None),
        ("9.0 8.0", ("8.0", "9.0a"), None),
        ("8.0+PTX,9.0", ("8.0", "9.0a"), "8.0"),
        ("8.6+PTX;8.9+PTX", ("8.6", "8.9"), "8.6"),
        ("9.0+PTX", ("9.0a",), "9.0"),
        ("10.0;12.0;8.0", ("8.0", "10.0", "12.0"), None),
        ("Ampere;Hopper+PTX", ("8.0", "8.6", "9.0a"), "9.0"),
        (" 8.6 ; 8.6; ", ("8.6",), None),
    ],
)
def test_parse(text, native, ptx):
    assert Target.parse(text) == Target(native, ptx)


@pytest.mark.parametrize("text", ["", "sm_80", "8", "8.0,native", "8.6+", "Volta"])
def test_parse_names_what_is_no_architecture(text):
    with pytest.raises(ValueError, match="is no GPU architecture"):
        Target.parse(text)


def test_parse_refuses_what_the_kernels_do_not_support():
    with pytest.raises(ValueError, match=r"need architecture 8\.0 or later, not '7\.5'"):
        Target.parse("7.5;8.0")


def test_machine_code_and_ptx_are_asked_for():
    flags = Target.parse("8.0+PTX;8.6;9.0").nvcc_flags(Path("norm/rms_norm.cu"))
    assert [flag for flag in flags if flag.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]


def test_hopper_files_are_compiled_for_hopper_alone():
    source = Path("attention/forward_sm90.cu")
    with_hopper = Target.parse("8.0+PTX;9.0")
    assert with_hopper.includes(source)
    assert [flag for flag in with_hopper.nvcc_flags(source) if flag.startswith("-gencode")] == [
        "-gencode=arch=compute_90a,code=sm_90a"
    ]
    # Every other file learns whether it may call them.
    assert "-DTTF_HAS_SM90" in with_hopper.nvcc_flags(Path("norm/norm.cpp"))
    without = Target.parse("8.0+PTX;8.6")
    assert not without.includes(source)
    assert without.includes(Path("norm/rms_norm.cu"))
    assert "-DTTF_HAS_SM90" not in without.nvcc_flags(Path("norm/norm.cpp"))


@pytest.mark.parametrize(
    ("text", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),  # machine code runs on later minor versions
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("8.0+PTX", (12, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),  # an `a` architecture is for that one alone
        ("8.9+PTX", (8, 6), False),
    ],
)
def test_which_gpus_can_run_it(text, capability, runs):
    assert Target.parse(text).runs_on(capability) is runs


@pytest.fixture
def two_gpus(monkeypatch):
    capabilities = [(9, 0), (8, 6)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)


def test_first_use_is_for_the_gpus_present(two_gpus):
    assert Target.for_this_machine() == Target(("8.6", "9.0a"))


def test_first_use_honours_torchs_list(two_gpus, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 7.5+PTX 8.6+PTX")
    assert Target.for_this_machine() == Target(("8.6",), "8.6")


def test_torchs_list_without_an_architecture_for_the_kernels_is_named(two_gpus, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 7.5+PTX")
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST is '7\.0 7\.5\+PTX', but .* 8\.0"):
        Target.for_this_machine()


def test_one_architectures_code_path_can_be_forced(two_gpus, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setenv("TORCHTUNE_FUSED_ARCH", "8.6")
    target = Target.for_this_machine()
    flags = target.nvcc_flags(Path("norm/rms_norm.cu"))
    # Only PTX, so that the driver of a newer GPU has nothing else to choose; and the host code
    # that picks a path and counts shared memory takes the GPU for an 8.6 one.
    assert flags == ["-DTTF_FORCED_ARCH=86", "-gencode=arch=compute_86,code=compute_86"]
    assert target.runs_on((9, 0))
    assert not target.includes(Path("attention/forward_sm90.cu"))
