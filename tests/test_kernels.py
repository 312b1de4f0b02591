"""All CUDA sources through the real compiler, which needs no GPU."""

import pytest

from torchtune_fused.build.compile import REPORT_NAME, build_library
from torchtune_fused.build.report import find_violations
from torchtune_fused.build.sources import kernel_dir
from torchtune_fused.build.target import ALL_ARCHS, Target
from torchtune_fused.build.toolchain import BuildError, find_toolchain


# Minutes from an empty cache, on two cores.
@pytest.mark.timeout(1800)
def test_every_kernel_compiles_for_every_architecture_without_spilling():
    try:
        toolchain = find_toolchain()
    except BuildError as error:
        pytest.skip(f"no CUDA compiler: {error}")
    library = build_library(kernel_dir(), Target.parse(ALL_ARCHS), toolchain)
    assert find_violations(library.with_name(REPORT_NAME).read_text()) == []
