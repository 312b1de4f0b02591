"""The one thing that pyproject.toml can't say: what platform a wheel with the kernels is for."""

from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel


class MaybeCompiled(Distribution):
    """A distribution that is for one platform if it holds the compiled kernels."""

    def has_ext_modules(self):
        return any(Path(__file__).parent.glob("kernels/*.abi3.so"))


class WheelForAnyPython(bdist_wheel):
    """Tags the wheel ``py3-none-<platform>``, or ``py3-none-any`` without compiled kernels.

    They hold no Python, so one file serves every version of it.
    """

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(distclass=MaybeCompiled, cmdclass={"bdist_wheel": WheelForAnyPython})
