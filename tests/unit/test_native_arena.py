"""Arenas of the C extension and of its pure-Python twin: one suite over both."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import re
import resource
import subprocess
import sys
import sysconfig
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvtransport import _native, _pure
from kvtransport._pure_arena import memory_available

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=[_native, _pure], ids=["native", "pure"])
def impl(request):
    return request.param


def child(code, *args, **options):
    """Run ``code`` in a fresh interpreter; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def mapped(name):
    return f"/memfd:{name}" in Path("/proc/self/maps").read_text()


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_arena_is_rounded_writable_zeroed_memory(impl):
    with impl.Arena(5000, name="kv-basic") as arena:
        assert arena.nbytes == len(arena) == len(memoryview(arena)) == 8192
        assert arena.info["requested"] == 5000
        assert arena.info["nbytes"] == 8192
        assert not arena.closed
        assert not arena.readonly
        view = memoryview(arena)
        assert bytes(view) == bytes(8192)
        view[8191] = 7
        assert bytes(arena.view(8190, 2)) == b"\0\7"
        del view
    assert arena.closed
    assert not mapped("kv-basic")


def test_closed_arena_lends_nothing(impl):
    arena = impl.Arena(4096)
    arena.close()
    arena.close()
    assert arena.live_views == 0
    assert arena.info["fd"] == -1
    with pytest.raises(ValueError, match="closed"):
        arena.view(0, 1)
    with pytest.raises(ValueError, match="closed"):
        memoryview(arena)
    with pytest.raises(ValueError, match="closed"):
        _ = arena.fd
    with pytest.raises(ValueError, match="closed"), arena:
        pass


@pytest.mark.parametrize(("offset", "length"), [(0, 4097), (4097, 0), (4096, 1), (1, sys.maxsize), (sys.maxsize, 1)])
def test_views_outside_the_arena_are_refused(impl, offset, length):
    with impl.Arena(4096) as arena, pytest.raises(ValueError, match="does not fit an arena of 4096 bytes"):
        arena.view(offset, length)


def test_negative_view_is_refused(impl):
    with impl.Arena(4096) as arena:
        with pytest.raises(ValueError, match="negative"):
            arena.view(-1, 1)
        with pytest.raises(ValueError, match="negative"):
            arena.view(0, -1)


def test_empty_view(impl):
    with impl.Arena(4096) as arena:
        view = arena.view(4096, 0)
        assert len(view) == view.nbytes == len(memoryview(view)) == 0


def test_view_attributes(impl):
    with impl.Arena(8192) as arena:
        view = arena.view(100, 50)
        assert (view.offset, view.nbytes, len(view), view.readonly) == (100, 50, 50, False)
        memoryview(view)[:3] = b"abc"
        assert bytes(memoryview(arena)[100:103]) == b"abc"
        assert view.__dlpack_device__() == (1, 0)


def holders_of(arena, impl):
    """Name -> something that keeps the arena's bytes 4096.. alive."""
    view = arena.view(4096, 4096)
    held = {
        "view": view,
        "memoryview of a view": memoryview(arena.view(4096, 4096)),
        "numpy over dlpack": np.from_dlpack(arena.view(4096, 4096)),
        "numpy over the buffer": np.frombuffer(arena.view(4096, 4096), np.uint8),
    }
    if impl is _native:  # the twin keeps the memory of such a one until the arena object goes
        held["memoryview of the arena"] = memoryview(arena)[4096:]
    return held


def check_release_order(arena, held, order, name):
    assert mapped(name)
    arena.close()
    for key in order:
        assert mapped(name), f"unmapped while {key} lives"
        assert arena.live_views == len(held)
        for item in held.values():
            assert bytes(memoryview(item)[:5]) == b"alive"
        del held[key], item
    assert arena.live_views == 0
    assert not mapped(name)


def test_memory_lives_as_long_as_its_last_user(impl):
    with impl.Arena(8192) as probe:
        keys = list(holders_of(probe, impl))
    before = open_descriptors()
    for i, order in enumerate(itertools.permutations(keys)):
        name = f"kv-order-{i}"
        arena = impl.Arena(8192, name=name, lock="off", cuda="off", huge="off")
        memoryview(arena)[4096:4101] = b"alive"
        check_release_order(arena, holders_of(arena, impl), order, name)
    assert open_descriptors() == before


@pytest.mark.torch
def test_torch_tensor_keeps_the_memory(impl):
    import torch

    arena = impl.Arena(8192, name="kv-torch")
    tensor = torch.from_dlpack(arena.view(4096, 4096))
    other = torch.frombuffer(arena.view(4096, 4096), dtype=torch.uint8)
    tensor[:5] = torch.tensor(list(b"alive"), dtype=torch.uint8)
    assert bytes(memoryview(arena)[4096:4101]) == b"alive"
    assert tensor.shape == (4096,)
    assert tensor.data_ptr() == other.data_ptr()
    arena.close()
    del other
    gc.collect()
    half = tensor[:100].view(torch.bfloat16)
    del tensor
    assert mapped("kv-torch")
    assert arena.live_views == 1
    assert bytes(half.view(torch.uint8)[:5].numpy()) == b"alive"
    del half
    gc.collect()
    assert not mapped("kv-torch")


def test_arena_object_may_go_before_its_views(impl):
    arena = impl.Arena(4096, name="kv-orphan")
    view = arena.view(0, 4)
    memoryview(view)[:] = b"left"
    del arena
    gc.collect()
    assert bytes(view) == b"left"
    del view
    gc.collect()
    assert not mapped("kv-orphan")


def test_slices_of_views_keep_the_memory(impl):
    arena = impl.Arena(4096, name="kv-slices")
    part = np.from_dlpack(arena.view(0, 100))[10:20].reshape(2, 5)[1]
    memoryview(arena)[15:17] = b"ok"
    arena.close()
    assert bytes(part[:2]) == b"ok"
    assert mapped("kv-slices")
    del part
    assert not mapped("kv-slices")


def test_capsule_that_nobody_takes_lets_go(impl):
    arena = impl.Arena(4096, name="kv-capsule")
    capsules = [arena.view(0, 8).__dlpack__(), arena.view(0, 8).__dlpack__(max_version=(1, 0))]
    arena.close()
    assert mapped("kv-capsule")
    capsules.clear()
    assert not mapped("kv-capsule")


def test_dlpack_deleter_needs_no_gil_and_no_thread_of_its_own():
    class Managed(ctypes.Structure):  # DLManagedTensor: 48 bytes of DLTensor, context, deleter
        _fields_ = [("tensor", ctypes.c_char * 48), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]

    arena = _native.Arena(4096, name="kv-deleter")
    capsule = arena.view(0, 4096).__dlpack__()
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
    pointer = api.PyCapsule_GetPointer(capsule, b"dltensor")
    used = b"used_dltensor"
    api.PyCapsule_SetName(capsule, used)
    arena.close()
    assert mapped("kv-deleter")
    deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(Managed.from_address(pointer).deleter)  # releases the GIL
    thread = threading.Thread(target=deleter, args=(pointer,))
    thread.start()
    thread.join()
    assert not mapped("kv-deleter")
    del capsule


def test_dlpack_refuses_what_it_cannot_give(impl):
    with impl.Arena(4096) as arena:
        view = arena.view(0, 16)
        with pytest.raises((BufferError, ValueError)):
            view.__dlpack__(dl_device=(2, 0))
        with pytest.raises((ValueError, RuntimeError)):
            view.__dlpack__(stream=1)
        assert "dltensor_versioned" in repr(view.__dlpack__(max_version=(1, 0), dl_device=(1, 0), copy=False))
        assert '"dltensor"' in repr(view.__dlpack__(max_version=(0, 8)))


def test_dlpack_never_copies_natively():
    with _native.Arena(4096) as arena, pytest.raises(BufferError, match="never copied"):
        arena.view(0, 16).__dlpack__(copy=True)


def test_another_process_attaches_read_only(impl):
    with impl.Arena(10_000, name="kv-share") as arena:
        memoryview(arena)[5000:5005] = b"hello"
        out = child(
            f"""
            import sys
            from kvtransport import {impl.__name__.split(".")[1]} as impl
            arena = impl.Arena.attach(int(sys.argv[1]), 9000)
            view = memoryview(arena)
            assert len(view) == len(arena) == arena.nbytes == 9000 and view.readonly and arena.readonly
            print(bytes(view[5000:5005]).decode())
            try:
                view[0] = 1
            except TypeError:
                print("read-only")
            """,
            arena.fd,
            pass_fds=[arena.fd],
        )
        assert out.split() == ["hello", "read-only"]


def test_nobody_maps_the_memfd_writable_or_cuts_it(impl):
    import mmap

    with impl.Arena(4096) as arena:
        with pytest.raises(PermissionError):
            mmap.mmap(arena.fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, 0)
        with pytest.raises(PermissionError):
            os.pwrite(arena.fd, b"x", 0)


def test_attached_memory_is_read_only_everywhere(impl):
    with impl.Arena(4096) as arena:
        memoryview(arena)[:2] = b"ro"
        with impl.Arena.attach(arena.fd, 4096) as attached:
            view = attached.view(0, 2)
            assert view.readonly
            assert memoryview(view).readonly
            with pytest.raises(BufferError):
                view.__dlpack__()
            tensor = np.from_dlpack(view)
            assert not tensor.flags.writeable
            assert tensor.tobytes() == b"ro"
            with pytest.raises(BufferError):
                impl.recv_pages(0, view, None, 0)
            memoryview(arena)[:2] = b"RO"
            assert tensor.tobytes() == b"RO"
            del view, tensor


def test_attach_outlives_the_owner_and_its_descriptor(impl):
    owner = impl.Arena(4096)
    memoryview(owner)[:4] = b"stay"
    fd = os.dup(owner.fd)
    attached = impl.Arena.attach(fd, 4096)
    os.close(fd)
    owner.close()
    assert bytes(memoryview(attached)[:4]) == b"stay"
    attached.close()


def test_attach_refuses_what_could_kill_the_reader(impl, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    with path.open("rb") as file, pytest.raises(ValueError, match="not sealed against shrinking"):
        impl.Arena.attach(file.fileno(), 4096)
    with impl.Arena(4096) as arena:
        with pytest.raises(ValueError, match=r"asked for 4097 bytes, descriptor \d+ has 4096"):
            impl.Arena.attach(arena.fd, 4097)
        with pytest.raises(ValueError, match="asked for 0 bytes"):
            impl.Arena.attach(arena.fd, 0)
        closed = os.dup(arena.fd)
    os.close(closed)
    with pytest.raises(OSError, match="Bad file descriptor"):
        impl.Arena.attach(closed, 4096)
    with pytest.raises(ValueError, match="negative"):
        impl.Arena.attach(-1, 4096)


def test_too_much_memory_is_refused_before_it_is_touched(impl):
    before = open_descriptors()
    with pytest.raises(MemoryError, match=r"asked for an arena of 109951162777600 bytes, but only (\d+)") as caught:
        impl.Arena(100 << 40)
    found = re.search(r"only (\d+) bytes", str(caught.value))
    assert found is not None
    # Both count the same things, a moment apart.
    assert int(found[1]) == pytest.approx(memory_available()[0], rel=0.25)
    with pytest.raises(MemoryError):
        impl.Arena(100 << 40, memfd=False, populate=False)
    assert open_descriptors() == before


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 63, sys.maxsize])
def test_impossible_sizes(impl, nbytes):
    with pytest.raises((ValueError, OverflowError, MemoryError)):
        impl.Arena(nbytes)


def test_address_space_limit_is_an_error(impl):
    out = child(
        f"""
        import resource
        from kvtransport import {impl.__name__.split(".")[1]} as impl
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)
        for memfd in True, False:
            try:
                impl.Arena(128 << 20, memfd=memfd)
            except (MemoryError, OSError) as error:
                print(type(error).__name__, getattr(error, "errno", None) in (None, 12))
        """
    )
    assert len(out.splitlines()) == 2
    assert "False" not in out


def test_wrong_choices_are_refused(impl):
    for option in ("huge", "lock", "cuda"):
        with pytest.raises(ValueError, match='expected "auto", "require" or "off"'):
            impl.Arena(4096, **{option: "yes"})


def test_require_huge_fails_with_the_reason():
    # Smaller than any huge page: impossible whatever the system offers.
    for memfd in (True, False):
        with pytest.raises(OSError, match=r'huge="require", but no huge pages: .* smaller than one huge page'):
            _native.Arena(4096, huge="require", memfd=memfd)


def test_huge_pages_are_used_or_their_lack_is_noted():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    with _native.Arena(4 << 20, memfd=False, lock="off", cuda="off") as arena:
        if "[never]" in setting:
            assert arena.info["huge"] == "none"
            assert "transparent_hugepage" in arena.info["notes"][0]
        else:
            assert arena.info["huge"] == "thp"
            assert arena.info["notes"] == []
            view = arena.view(0, 1)
            assert np.from_dlpack(view).ctypes.data % (2 << 20) == 0
    with _native.Arena(4 << 20, lock="off", cuda="off") as arena:
        assert arena.info["huge"] in {"hugetlb", "thp", "none"}
        assert arena.info["huge"] == "hugetlb" or any("no hugetlb pages" in note for note in arena.info["notes"])
    with _native.Arena(4 << 20, huge="off", lock="off", cuda="off") as arena:
        assert (arena.info["huge"], arena.info["notes"]) == ("none", [])


def test_anonymous_arena_has_no_descriptor(impl):
    with impl.Arena(4096, memfd=False, populate=False) as arena:
        assert arena.fd == arena.info["fd"] == -1
        memoryview(arena)[:] = bytes(range(256)) * 16
        assert xxhash.xxh3_64_intdigest(memoryview(arena)) == impl.hash_pages(arena, None)


def test_populated_memory_is_resident():
    resident = re.compile(r"Rss:\s+(\d+) kB")
    for populate, expected in ((True, 1024), (False, 0)):
        with _native.Arena(1 << 20, populate=populate, lock="off", cuda="off", huge="off", name="kv-rss"):
            smaps = Path("/proc/self/smaps").read_text()
            found = resident.search(smaps, smaps.index("/memfd:kv-rss"))
            assert found is not None
            assert int(found[1]) == expected


def test_lock_failure_is_noted_or_raised():
    out = child(
        """
        import os, resource
        from kvtransport import _native
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        if os.geteuid() == 0:
            os.setuid(65534)  # root may lock whatever the limit
        arena = _native.Arena(1 << 20, cuda="off", huge="off")
        print(arena.info["locked"], arena.info["notes"][0])
        try:
            _native.Arena(1 << 20, lock="require", cuda="off", huge="off")
        except (OSError, MemoryError) as error:
            print(error)
        print(_native.Arena(1 << 20, lock="off", cuda="off", huge="off").info["notes"])
        """
    ).splitlines()
    assert out[0].startswith("False not locked: 1048576 bytes cannot be locked")
    for word in ("RLIMIT_MEMLOCK is 0 bytes", "ulimit -l", "LimitMEMLOCK=infinity", "CAP_IPC_LOCK"):
        assert word in out[0]
    assert 'lock="require", but 1048576 bytes cannot be locked' in out[1]
    assert out[2] == "[]"


def test_lock_is_reported():
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    with _native.Arena(4096, lock="auto", cuda="off", huge="off") as arena:
        if os.geteuid() == 0 or limit == resource.RLIM_INFINITY:
            assert arena.info["locked"]
        assert arena.info["locked"] or "not locked" in arena.info["notes"][0]


def test_twin_refuses_what_needs_the_extension():
    for option in ("huge", "lock", "cuda"):
        with pytest.raises(OSError, match="not possible without the native extension"):
            _pure.Arena(4096, **{option: "require"})
    with _pure.Arena(4096) as arena:
        assert len(arena.info["notes"]) == 3


FAKE_CUDA = """
#include <stdio.h>
#include <stdlib.h>
static int context = 42, depth = 0;
static void say(const char *what) { printf("%s\\n", what); fflush(stdout); }
static int result(const char *what) {
    const char *bad = getenv("FAKE_CUDA_FAIL");
    say(what);
    if (!bad) return 0;
    for (const char *a = bad, *b = what;; a++, b++) { if (*a != *b) return 0; if (!*a) return 304; }
}
int cuInit(unsigned f) { (void)f; return result("init"); }
int cuCtxGetCurrent(void **c) { *c = getenv("FAKE_CUDA_CURRENT") ? &context : 0; return 0; }
int cuDeviceGet(int *d, int n) { *d = n; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { (void)d; *c = &context; return result("retain"); }
int cuDevicePrimaryCtxRelease_v2(int d) { (void)d; say("release"); return 0; }
int cuCtxPushCurrent_v2(void *c) { if (c != &context) abort(); depth++; return 0; }
int cuCtxPopCurrent_v2(void **c) { if (!depth--) abort(); *c = &context; return 0; }
int cuMemHostRegister_v2(void *p, size_t n, unsigned f) {
    if (!p || f != 1 || !depth) abort();
    printf("register %zu\\n", n);
    return result("registered");
}
int cuMemHostUnregister(void *p) { if (!*(volatile char *)p) say("unregister"); return depth ? 0 : 201; }
int cuGetErrorName(int r, const char **s) { *s = r == 304 ? "CUDA_ERROR_OPERATING_SYSTEM" : 0; return 0; }
"""

USE_CUDA = """
import sys
from kvtransport import _native
try:
    arena = _native.Arena(8192, cuda=sys.argv[1], lock="off", huge="off")
except OSError as error:
    sys.exit(print("refused:", error))
print(arena.info["cuda"], arena.info["notes"])
view = arena.view(0, 1)
arena.close()
print("view goes")
del view
print("gone")
"""


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory):
    """A directory with a libcuda.so.1 that says what is called."""
    place = tmp_path_factory.mktemp("cuda")
    (place / "fake.c").write_text(FAKE_CUDA)
    compiler = sysconfig.get_config_var("CC").split()
    subprocess.run([*compiler, "-shared", "-fPIC", "-o", place / "libcuda.so.1", place / "fake.c"], check=True)
    return place


def cuda_child(choice, place, **env):
    path = {"LD_LIBRARY_PATH": str(place)} if place else {}
    return child(USE_CUDA, choice, env={**os.environ, **path, "PYTHONUNBUFFERED": "1", **env}).splitlines()


def test_cuda_registration_ends_before_the_memory(fake_cuda):
    assert cuda_child("auto", fake_cuda) == [
        "init", "retain", "register 8192", "registered", "True []", "view goes", "unregister", "release", "gone",
    ]  # fmt: skip


def test_cuda_uses_the_current_context(fake_cuda):
    lines = cuda_child("require", fake_cuda, FAKE_CUDA_CURRENT="1")
    assert lines == ["init", "register 8192", "registered", "True []", "view goes", "unregister", "gone"]


def test_cuda_failure_is_noted_or_raised(fake_cuda):
    reason = "cuMemHostRegister: CUDA_ERROR_OPERATING_SYSTEM (CUresult 304)"
    lines = cuda_child("auto", fake_cuda, FAKE_CUDA_FAIL="registered")
    assert lines[4:] == ["release", f"False ['not registered with CUDA: {reason}']", "view goes", "gone"]
    lines = cuda_child("require", fake_cuda, FAKE_CUDA_FAIL="registered")
    assert lines[-1].startswith("refused: ")
    assert f'cuda="require", but the arena cannot be registered with CUDA: {reason}' in lines[-1]
    lines = cuda_child("auto", fake_cuda, FAKE_CUDA_FAIL="init")
    assert lines[1] == "False ['not registered with CUDA: cuInit: CUDA_ERROR_OPERATING_SYSTEM (CUresult 304)']"
    assert cuda_child("off", fake_cuda) == ["False []", "view goes", "gone"]


def test_library_that_is_not_cuda_is_noted(tmp_path):
    (tmp_path / "libcuda.so.1").write_text("no library")
    assert "libcuda.so.1 cannot be loaded" in cuda_child("auto", tmp_path)[0]
