"""The pure-Python twin carries the whole transport and pool, with one warning that says what is lost."""

from __future__ import annotations

import os
import subprocess
import sys

WITHOUT_NATIVE = "import sys; sys.modules['kvtransport._native'] = None; "


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "KVTRANSPORT_REQUIRE_NATIVE"}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_NATIVE + code],
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_transfers_and_daemon_run_over_the_twin():
    wanted = "every_byte or cancel or spill or put_match_get or layer_k or flat_objects"
    code = (
        "import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', "
        f"{wanted!r}, 'tests/integration/test_transfer.py', 'tests/integration/test_daemon.py']))"
    )
    done = run(code)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def test_one_warning_says_what_is_lost():
    done = run("import kvtransport, kvpool, kvtransport.sync; print(kvtransport.native_available)")
    assert done.stdout.strip() == "False"
    assert done.stderr.count("RuntimeWarning") == 1
    for lost in ("GIL", "huge pages", "CUDA", "To build it"):
        assert lost in done.stderr


def test_required_native_fails_and_says_how_to_build_it():
    done = run("import kvtransport", KVTRANSPORT_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "gcc, python3-dev" in done.stderr
