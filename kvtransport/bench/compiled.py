"""Programs in C that come as source and are compiled when they are first needed.

What is compiled is kept under the user's cache directory, named by a hash of the sources, the compiler and the
processor (``-march=native``): another version never runs by mistake, and a second start compiles nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from ..errors import ConfigError

SOURCES = resources.files(__package__) / "csrc"
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-Wall", "-Wextra", "-pthread")
LIBRARIES = ("-lm", "-ldl")


def cache_directory() -> Path:
    """Where compiled programs are kept: ``$XDG_CACHE_HOME/kvtransport``, by default under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvtransport"


def program(
    name: str, *, headers: tuple[str, ...] = (), shared: bool = False, folder: Traversable = SOURCES
) -> Path:
    """The executable (``shared``: the library) of ``NAME.c`` in ``folder``, with ``headers`` of ``csrc``, compiled if need be.

    Raises ConfigError when there is no compiler, or when it fails (with its words).
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise ConfigError(
            f"{name} is compiled when it is first used and there is no C compiler; install one: apt-get install gcc libc6-dev"
        )
    flags = (*FLAGS, "-shared", "-fPIC") if shared else FLAGS
    sources = {f"{name}.c": (folder / f"{name}.c").read_bytes()}
    sources |= {f: (SOURCES / f).read_bytes() for f in headers}
    key = hashlib.sha256()
    for file, text in sources.items():
        key.update(file.encode() + b"\0" + text)
    key.update(repr((flags, LIBRARIES, _version(compiler), _processor())).encode())
    kept = cache_directory() / f"{name}-{key.hexdigest()[:16]}"
    if kept.exists():
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as work:
            for file, text in sources.items():
                (Path(work) / file).write_bytes(text)
            made = Path(work) / name
            command = [compiler, *flags, str(Path(work) / f"{name}.c"), "-o", str(made), *LIBRARIES]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ConfigError(f"{compiler} could not compile {name}.c: {done.stderr.strip()[-800:]}")
            made.replace(kept)  # whole or not there, also when two processes compile at once
    except OSError as error:
        raise ConfigError(f"cannot keep the compiled {name} in {kept.parent}: {error.strerror or error}") from error
    return kept


def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"cannot run the C compiler {compiler!r}: {error.strerror or error}") from error
    return done.stdout.partition("\n")[0]


def _processor() -> str:
    """What ``-march=native`` depends on; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
