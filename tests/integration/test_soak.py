"""The soak of kvpoold (`make soak`), for half a minute; and that it would notice."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.soak.__main__ import Client, Corrupt


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_half_a_minute(tmp_path):
    argv = [sys.executable, "-m", "tests.soak", "--minutes", "0.5", "--json", str(tmp_path / "soak.json")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280)
    result = json.loads((tmp_path / "soak.json").read_text())
    checks = {name: good for name, good in result["checks"].items() if name != "memory flat"}  # caches still fill up
    assert all(checks.values()), (checks, result["failures"], done.stderr[-2000:])
    assert result["counts"]["reads"] > 50
    assert result["events"]


async def test_a_soak_notices_bytes_that_are_others():
    class Pool:
        async def get_objects(self, keys):
            return [(7).to_bytes(4, "little") + b"not what version 7 of it is"] * len(keys)

    client = Client(0, 1, 1)
    with pytest.raises(Corrupt):
        for _ in range(20):
            client.random.random = lambda: 0.9
            await client.flat(Pool())
