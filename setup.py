"""Builds kvtransport._native from native/ against the stable ABI; everything else stands in pyproject.toml."""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from wheel.bdist_wheel import bdist_wheel  # noqa: F401  (registers the command on older setuptools)


class OptionalBuildExt(build_ext):
    """Without a compiler the pure-Python twin serves; KVTRANSPORT_REQUIRE_NATIVE=1 makes that an error."""

    def run(self) -> None:
        try:
            super().run()
        except Exception:
            if os.environ.get("KVTRANSPORT_REQUIRE_NATIVE") == "1":
                raise
            self.warn("kvtransport._native was not built: the slower pure-Python twin will be used")


setup()
