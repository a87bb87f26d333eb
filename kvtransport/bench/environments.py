"""A virtual environment for every peer, made when it is first needed and kept under the user's cache directory."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from .compiled import cache_directory

MADE = ".made"
INSTALL_S = 1_800.0


@dataclass(frozen=True, slots=True)
class Environment:
    """What a peer needs. ``alone``: packages installed without their dependencies, after the others.

    ``programs`` are looked up on the path; ``advice`` says how they, and shared libraries, get there.
    """

    name: str
    packages: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    advice: str = ""

    @property
    def path(self) -> Path:
        what = repr((self.packages, self.alone, sys.version_info[:2]))
        return cache_directory() / "peers" / f"{self.name}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"

    @property
    def python(self) -> str:
        return str(self.path / "bin" / "python")

    def make(self, say: Callable[[str], None] = lambda _: None) -> str:
        """Path of its Python, installing what is missing; ``say`` hears what is done.

        Raises ConfigError with the installer's last words when it cannot be installed.
        """
        for name in self.programs:
            if shutil.which(name) is None:
                raise ConfigError(f"{name} is not installed: {self.advice}")
        if (self.path / MADE).exists():
            return self.python
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        say(f"making the environment of {self.name}")
        try:
            self._run(sys.executable, "-m", "venv", str(self.path))
            for packages, options in ((self.packages, ()), (self.alone, ("--no-deps",))):
                if packages:
                    say(f"installing {', '.join(packages)}")
                    self._run(
                        self.python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *options, *packages
                    )
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        (self.path / MADE).touch()
        return self.python

    def _run(self, *command: str) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_S)
        except subprocess.TimeoutExpired:
            raise ConfigError(f"{self.name} was not installed within {INSTALL_S:g} s") from None
        if done.returncode:
            words = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise ConfigError(f"{self.name} cannot be installed: {words[-1] if words else 'no reason given'}")
