#!/bin/sh
# The native tests under AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer, warnings as errors.
# Usage: native/test-asan.sh [pytest arguments]; VENV names the virtual environment (default .venv). Needs gcc.
# Exits non-zero when a test fails or a sanitizer reports something that passes through the extension.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
python=${VENV:-$root/.venv}/bin/python
case $python in /*) ;; *) python=$root/$python ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

# A copy of what the tests need, so that the instrumented extension never lies in the working tree.
mkdir -p "$work/tests/unit" "$work/logs"
tar -C "$root" --exclude='*.so' --exclude=__pycache__ -cf - kvtransport kvpool | tar -C "$work" -xf -
cp "$root/pyproject.toml" "$work/"
cp "$root/tests/__init__.py" "$root/tests/conftest.py" "$root/tests/tlskit.py" "$work/tests/"
for test in test_native test_native_arena test_native_engine test_native_engine_tls test_tls_records test_buffers test_pool_table; do cp "$root/tests/unit/$test.py" "$work/tests/unit/"; done

sanitize="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
(
    cd "$root"
    CC=gcc CFLAGS="$sanitize -Wall -Wextra -Werror" LDFLAGS="$sanitize" KVTRANSPORT_REQUIRE_NATIVE=1 \
        "$python" setup.py -q build_ext --force --build-lib "$work" --build-temp "$work/build"
)

# The interpreter is not instrumented: the run-time libraries must be there before it, and libstdc++ with them, or
# the interceptor of C++ exceptions (numpy throws) finds nothing to call.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)"
export LD_PRELOAD
export PYTHONMALLOC=malloc KVTRANSPORT_REQUIRE_NATIVE=1 OPENBLAS_NUM_THREADS=1
# Leaks are judged below: CPython and numpy leave many of their own at exit.
export ASAN_OPTIONS="log_path=$work/logs/asan:detect_leaks=1:allocator_may_return_null=1:fast_unwind_on_malloc=0:malloc_context_size=10"
export LSAN_OPTIONS="exitcode=0:log_path=$work/logs/asan"
export UBSAN_OPTIONS="print_stacktrace=1:log_path=$work/logs/ubsan"

status=0
cd "$work"
# Left out: AddressSanitizer itself needs terabytes of address space, and it makes mlock do nothing.
"$python" -m pytest tests/unit -q -p no:cacheprovider -m "not torch" --deselect \
    tests/unit/test_native_arena.py::test_address_space_limit_is_an_error --deselect \
    tests/unit/test_native_arena.py::test_lock_failure_is_noted_or_raised "$@" || status=$?

unset LD_PRELOAD PYTHONMALLOC
"$python" "$root/native/sanitizer_reports.py" "$work/logs" || status=1
exit $status
