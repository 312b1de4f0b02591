import subprocess

import pytest

from torchtune_fused.build.report import find_violations, parse_report, summarise

# All 128 values are alive across the barrier, in a kernel that may use 64 registers.
SPILLS = """
__global__ void __launch_bounds__(1024) spilling(float* x) {
  float v[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i) x[threadIdx.x * 128 + i] = v[i] * v[127 - i];
}
"""
CLEAN = """
__global__ void clean(float* x) {
  __shared__ float tile[1024];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = tile[1023 - threadIdx.x];
}
"""


@pytest.fixture
def compiler_output(tmp_path, toolchain):
    def compile(source: str) -> str:
        path = tmp_path / "kernel.cu"
        path.write_text(source)
        archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("86", "90a")]
        done = subprocess.run(
            [toolchain.nvcc, "-Xptxas=-v", *archs, "-c", path, "-o", tmp_path / "kernel.o"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        return done.stdout

    return compile


def test_resources_of_each_kernel_on_each_architecture(compiler_output):
    text = compiler_output(CLEAN)
    reports = parse_report(text)
    assert [(kernel.name, kernel.arch) for kernel in reports] == [
        ("_Z5cleanPf", "86"),
        ("_Z5cleanPf", "90a"),
    ]
    for kernel in reports:
        assert kernel.static_shared == 4096
        assert kernel.spills == kernel.stack == 0
        assert 0 < kernel.registers <= 32
    assert find_violations(text) == []
    assert "sm_86: 1 kernels" in summarise(text)


def test_spills_are_found_and_named(compiler_output):
    violations = find_violations(compiler_output(CLEAN + SPILLS))
    assert len(violations) == 2
    assert violations[0].startswith("spilling(float*) on sm_86 spills ")
    assert violations[1].startswith("spilling(float*) on sm_90a spills ")


def test_warnings_are_violations(compiler_output):
    text = compiler_output("__global__ void idle() { int unused; }")
    assert any("unused" in line for line in find_violations(text))


def test_serialised_tensor_cores_are_violations():
    # What ptxas prints for wgmma instructions that it can't keep in flight: information, to it.
    line = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources for the wgmma pipeline crossing "
        "function boundary at a function call in the function '_Z4gemmv'"
    )
    assert line in find_violations(line)


def test_report_without_a_kernel_is_a_violation(compiler_output):
    assert find_violations(compiler_output("void host_only() {}")) == ["ptxas reported no kernel"]


def test_static_shared_memory_above_the_limit_is_found():
    text = (
        "ptxas info    : Compiling entry function '_Z3bigv' for 'sm_86'\n"
        "ptxas info    : Used 8 registers, used 1 barriers, 49153 bytes smem, 352 bytes cmem[0]\n"
    )
    assert find_violations(text) == ["big() on sm_86 declares 49153 bytes shared, above 49152"]
