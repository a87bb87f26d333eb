"""Builds kvtransport._native and kvpool._native from native/ against the stable ABI; everything else stands in pyproject.toml.

The extensions are optional: without a C compiler their pure-Python twins serve, slower. With
KVTRANSPORT_REQUIRE_NATIVE=1 a failed build is an error, here as well as when kvtransport is imported.
"""

import os
import sys

from setuptools import Extension, setup

SOURCES = ["arena", "cuda", "dlpack", "mapping", "memory", "module", "pages", "pieces", "sockets"]
SOURCES += ["planes", "prediction", "tls", "tls_records", "tls_stream"]
SOURCES += ["conn_type", "engine", "engine_types", "framing", "incoming_type", "maps", "outgoing_type"]
SOURCES += ["receiving", "sending", "stream"]
SOURCES += ["xxh3_baseline", "xxh3_avx2", "xxh3_avx512"]
HEADERS = ["engine", "engine_types", "kvnative", "mapping", "openssl", "tls", "xxh3", "xxh3_impl", "third_party/xxhash"]

native = Extension(
    "kvtransport._native",
    sources=[f"native/{name}.c" for name in SOURCES],
    depends=[f"native/{name}.h" for name in HEADERS],
    define_macros=[("Py_LIMITED_API", "0x030b0000")],
    extra_compile_args=["-std=c11", "-O3", "-fvisibility=hidden", "-pthread"],
    # glibc before 2.34 keeps dlopen and threads in libraries of their own
    extra_link_args=["-pthread"] + (["-ldl"] if sys.platform == "linux" else []),
    py_limited_api=True,
    optional=os.environ.get("KVTRANSPORT_REQUIRE_NATIVE") != "1",
)

table = Extension(
    "kvpool._native",
    sources=["native/flatkeys.c", "native/keytable.c", "native/keytable_py.c"],
    depends=["native/flatkeys.h", "native/keytable.h", "native/third_party/xxhash.h"],
    define_macros=[("Py_LIMITED_API", "0x030b0000")],
    extra_compile_args=["-std=c11", "-O3", "-fvisibility=hidden"],
    py_limited_api=True,
    optional=native.optional,
)

setup(ext_modules=[native, table], options={"bdist_wheel": {"py_limited_api": "cp311"}})
