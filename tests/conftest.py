"""Shared fixtures: small layouts, random cache bytes, endpoints that leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil

import hypothesis
import numpy as np
import pytest

from kvtransport.bench import emulator
from kvtransport.buffers import PageList
from kvtransport.dialling import Dialling
from kvtransport.endpoint import Endpoint
from kvtransport.flow.addresses import Addresses
from kvtransport.layout import CacheGroup, CacheLayout, GroupKind, TensorSpec
from kvtransport.manifest import Manifest, new_transfer_id

# The same examples on every run: a property test that fails must fail again. Timing is the benchmarks' business.
hypothesis.settings.register_profile("project", derandomize=True, deadline=None)
hypothesis.settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without root or iperf3 a developer's run goes on without emulated links, and says so; in CI it fails."""
    reason = emulator.why_not() or (None if shutil.which("iperf3") else "iperf3 is missing: apt-get install iperf3")
    if reason is not None and not os.environ.get("CI"):
        for item in items:
            if item.get_closest_marker("netns"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def hybrid() -> CacheLayout:
    """A small hybrid with all three kinds of groups: 2 full, 2 sliding, 3 recurrent layers."""
    return CacheLayout(
        "test-hybrid",
        (
            CacheGroup(
                "linear",
                GroupKind.RECURRENT,
                (0, 2, 4),
                (TensorSpec("conv", "bfloat16", (3, 96)), TensorSpec("state", "float32", (4, 32, 32), 0)),
            ),
            CacheGroup(
                "window",
                GroupKind.SLIDING,
                (1, 3),
                (TensorSpec("k", "bfloat16", (2, 32), 0), TensorSpec("v", "bfloat16", (2, 32), 0)),
                window=64,
            ),
            CacheGroup(
                "full",
                GroupKind.FULL,
                (5, 6),
                (TensorSpec("kv_c", "bfloat16", (512,)), TensorSpec("k_pe", "bfloat16", (64,))),
            ),
        ),
    )


class Cache:
    """Random bytes for every extent of a manifest, contiguous or in shuffled pages."""

    def __init__(self, manifest: Manifest, *, seed: int = 0, page_bytes: int = 0, blank: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.pages: dict[tuple[int, int], PageList] = {}
        for slot, extent in manifest.by_slot.items():
            n = extent.nbytes
            if not page_bytes:
                base = np.zeros(n, np.uint8) if blank else rng.integers(0, 256, n, np.uint8)
                self.pages[slot] = PageList.of(base)
                continue
            count = -(-n // page_bytes)
            base = (
                np.zeros(2 * count * page_bytes, np.uint8)
                if blank
                else rng.integers(0, 256, 2 * count * page_bytes, np.uint8)
            )
            offsets = np.sort(rng.permutation(2 * count)[:count]) if count < 2 else rng.permutation(2 * count)[:count]
            self.pages[slot] = PageList.pages(base, offsets * page_bytes, page_bytes, n)

    def bytes(self) -> dict[tuple[int, int], bytes]:
        return {slot: pages.tobytes() for slot, pages in self.pages.items()}


@pytest.fixture
def make_cache():
    return Cache


@pytest.fixture
def make_manifest(hybrid):
    def make(boundary: int = 1000, **kwargs) -> Manifest:
        kwargs.setdefault("transfer", new_transfer_id())
        return Manifest.of_layout(kwargs.pop("layout", hybrid), boundary, **kwargs)

    return make


@pytest.fixture
def nothing_left_behind():
    """Fails the test when it leaves a task, a socket or a descriptor."""
    gc.collect()
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    yield
    gc.collect()
    if before:
        after = set(os.listdir("/proc/self/fd"))
        leaked = [f"{fd}: {_target(fd)}" for fd in after - before if "socket" in _target(fd)]
        assert not leaked, f"sockets left open: {leaked}"


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


async def no_tasks_left() -> None:
    """Assert that only the caller's task is running, after a moment for callbacks."""
    for _ in range(20):
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        if not others:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"tasks left running: {others}")


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    """A directory with an authority, a node "n1" (127.0.0.1, localhost), a client "alice" of tenant "acme", and "other",
    an authority of its own with a node of the same name."""
    from kvpool import certs

    directory = tmp_path_factory.mktemp("pki")
    subjects = [certs.Subject.node("n1=127.0.0.1,::1,localhost"), certs.Subject.client("alice=acme")]
    certs.make(directory, subjects)
    certs.make(directory / "other", subjects)
    return directory


async def dial_into(
    endpoint: Endpoint, address: tuple[str, int], link: bytes, *, index: int, peer: bytes | None = None
) -> None:
    """Dial a connection that claims to belong to ``link``, whosever that is. Raises what a refusal raises."""
    host, port = address
    dialling = Dialling(endpoint, Addresses([host]), port, 2)
    dialling._id, dialling._peer = link, peer
    await dialling.dial(index)
