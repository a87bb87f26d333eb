#!/bin/sh
# The I/O engine's tests under ThreadSanitizer. Usage as native/test-asan.sh; any report is a failure.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
python=${VENV:-$root/.venv}/bin/python
case $python in /*) ;; *) python=$root/$python ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

mkdir -p "$work/tests/unit" "$work/logs"
tar -C "$root" --exclude='*.so' --exclude=__pycache__ -cf - kvtransport kvpool | tar -C "$work" -xf -
cp "$root/pyproject.toml" "$work/"
cp "$root/tests/__init__.py" "$root/tests/conftest.py" "$root/tests/tlskit.py" "$work/tests/"
for test in test_native_engine test_native_engine_tls; do cp "$root/tests/unit/$test.py" "$work/tests/unit/"; done

sanitize="-fsanitize=thread -fno-omit-frame-pointer -g"
(
    cd "$root"
    CC=gcc CFLAGS="$sanitize -Wall -Wextra -Werror" LDFLAGS="$sanitize" KVTRANSPORT_REQUIRE_NATIVE=1 \
        "$python" setup.py -q build_ext --force --build-lib "$work" --build-temp "$work/build"
)

# Only what is compiled here is instrumented: reports of the interpreter and of numpy cannot arise. A child that forks while
# threads run is left out: ThreadSanitizer does not support it.
LD_PRELOAD="$(gcc -print-file-name=libtsan.so)"
export LD_PRELOAD
export KVTRANSPORT_REQUIRE_NATIVE=1 OPENBLAS_NUM_THREADS=1
export TSAN_OPTIONS="log_path=$work/logs/tsan:history_size=7:exitcode=0:die_after_fork=0"

status=0
cd "$work"
"$python" -m pytest tests/unit -q -p no:cacheprovider \
    --deselect tests/unit/test_native_engine.py::test_a_forked_child_leaves_the_engine_alone "$@" || status=$?

unset LD_PRELOAD
if grep -l . "$work"/logs/* >/dev/null 2>&1; then
    cat "$work"/logs/*
    status=1
fi
exit $status
