import os
import re
import signal
import subprocess
import time

import pytest

from torchtune_fused.build.compile import REPORT_NAME, BuildInfo, build_library, cached_library
from torchtune_fused.build.sources import source_hash
from torchtune_fused.build.target import Target
from torchtune_fused.build.toolchain import BuildError, Toolchain

TARGET = Target.parse("8.0")


def test_library_depends_on_torch_alone(kernels, toolchain):
    library = build_library(kernels, TARGET, toolchain)
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    # Without the entry for libtorch_cuda, its symbols are not there when the library is loaded.
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= set(needed)
    assert not [name for name in needed if "cudart" in name or "python" in name]
    assert "RUNPATH" not in dynamic  # torch is found in the process, not where it was built
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True).stdout
    # The CUDA runtime inside must neither be seen from outside nor be replaced by torch's.
    assert not re.findall(r"\b(?:cuda[A-Z]|__cuda|Py)\w+", symbols)


def test_library_says_what_it_was_built_from(kernels, toolchain):
    target = Target.parse("8.0+PTX;8.6")
    info = BuildInfo.read(build_library(kernels, target, toolchain))
    assert info == BuildInfo(source_hash(kernels), toolchain.cuda, target)
    assert BuildInfo.read(kernels / "scale.cu") is None


def test_edit_recompiles_what_includes_the_edited_file(kernels, watched):
    first = build_library(kernels, TARGET, watched.toolchain)
    assert watched.compiled() == ["caller.cpp", "scale.cu"]
    assert build_library(kernels, TARGET, watched.toolchain) == first
    assert watched.compiled() == []

    with (kernels / "caller.cpp").open("a") as file:
        file.write("// edited\n")
    second = build_library(kernels, TARGET, watched.toolchain)
    assert second != first
    assert watched.compiled() == ["caller.cpp"]

    with (kernels / "common" / "scale.h").open("a") as file:
        file.write("// edited\n")
    build_library(kernels, TARGET, watched.toolchain)
    assert watched.compiled() == ["caller.cpp", "scale.cu"]


def test_cache_key_follows_sources_torch_cuda_and_architectures(kernels, monkeypatch):
    toolchain = Toolchain(kernels / "nvcc", "13.0.88")
    seen = {cached_library(kernels, TARGET, toolchain)}
    assert cached_library(kernels, TARGET, toolchain) in seen
    (kernels / "common" / "new.cuh").write_text("")
    seen.add(cached_library(kernels, TARGET, toolchain))
    seen.add(cached_library(kernels, Target.parse("8.6"), toolchain))
    seen.add(cached_library(kernels, Target((), "8.6", forced=True), toolchain))
    seen.add(cached_library(kernels, TARGET, Toolchain(toolchain.nvcc, "12.9.86")))
    monkeypatch.setattr("torch.__version__", "2.10.0")
    seen.add(cached_library(kernels, TARGET, toolchain))
    assert len(seen) == 6


def test_processes_that_start_at_once_compile_once(kernels, watched):
    builds = [watched.start_build(kernels) for _ in range(2)]
    results = [build.communicate(timeout=120) for build in builds]
    assert [build.returncode for build in builds] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert watched.compiled() == ["caller.cpp", "scale.cu"]


def test_killed_build_is_continued(kernels, watched, empty_cache):
    (watched.home / "hang").touch()
    build = watched.start_build(kernels)
    deadline = time.monotonic() + 60
    while not (watched.home / "hanging").exists():
        assert build.poll() is None and time.monotonic() < deadline, build.communicate()
        time.sleep(0.05)
    os.killpg(build.pid, signal.SIGKILL)
    build.communicate()
    library = cached_library(kernels, TARGET, watched.toolchain)
    assert not library.exists()
    assert list(library.parent.glob("work-*"))

    (watched.home / "hang").unlink()
    watched.calls.write_text("")
    assert build_library(kernels, TARGET, watched.toolchain) == library
    assert watched.compiled() == ["caller.cpp"]  # the other was ready before the kill
    assert {path.name for path in library.parent.iterdir()} == {"lock", library.name, REPORT_NAME}


def test_error_of_the_compiler_is_told(kernels, toolchain, empty_cache):
    good = (kernels / "scale.cu").read_text()
    (kernels / "scale.cu").write_text(good.replace("x[i] *= by", "x[i] *= factor"))
    with pytest.raises(BuildError, match=r"scale\.cu\(5\): error.*factor.*failed\.log"):
        build_library(kernels, TARGET, toolchain)
    assert "scale.cu" in (empty_cache / "failed.log").read_text()
    (kernels / "scale.cu").write_text(good)
    assert build_library(kernels, TARGET, toolchain).is_file()


def test_function_that_nobody_defines_fails_the_build(kernels, toolchain):
    (kernels / "scale.cu").unlink()
    with pytest.raises(BuildError, match="launch_scale"):
        build_library(kernels, TARGET, toolchain)


def test_hopper_files_are_left_out_without_hopper(kernels, watched):
    (kernels / "scale_sm90.cu").write_text("void launch_sm90() {}\n")
    (kernels / "scale.cu").write_text(
        (kernels / "scale.cu").read_text()
        + "#ifdef TTF_HAS_SM90\nvoid launch_sm90();\nvoid f() { launch_sm90(); }\n#endif\n"
    )
    build_library(kernels, TARGET, watched.toolchain)
    assert watched.compiled() == ["caller.cpp", "scale.cu"]
    build_library(kernels, Target.parse("8.0;9.0"), watched.toolchain)
    assert watched.compiled() == ["caller.cpp", "scale.cu", "scale_sm90.cu"]
