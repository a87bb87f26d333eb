"""The README's examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=[str(i) for i in range(len(BLOCKS))])
def test_example_runs(block):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        cwd=README.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_the_examples_print():
    outputs = [
        subprocess.run(
            [sys.executable, "-c", b], cwd=README.parent, capture_output=True, text=True, timeout=60, check=True
        ).stdout
        for b in BLOCKS
    ]
    assert len(outputs) == 3
    assert outputs[1].count("is verified and in place") == 27
    assert "length=960, restorable=(512, 960)" in outputs[2]
