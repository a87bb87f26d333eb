"""Runs the fuzz targets, Python (atheris) and C (libFuzzer with sanitizers), one after the other.

    python tests/fuzz/run.py --seconds 60 [--only NAME] [--json FILE] [--keep]
    python tests/fuzz/run.py --replay             only the corpora, every file once

Each target starts from its corpus in tests/fuzz/corpus/NAME and from what the code itself writes. ``--keep`` adds some of what
found new coverage to the corpus. A finding is left as ``crash-*`` in --findings, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CORPUS = HERE / "corpus"
PYTHON_TARGETS = ("frames", "handshake", "control", "manifests")
C_TARGETS = ("pages", "framing")
MOST_FILES, MOST_BYTES = 48, 1024
"""What of a corpus is kept in the repository: few files, small ones."""
FLAGS = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1", "-std=c11", "-pthread"]


def build(name: str, folder: Path) -> Path:
    """Compile the extension and one harness into a fuzzer. Needs clang with its run-time libraries."""
    clang = os.environ.get("CLANG", "clang")
    if shutil.which(clang) is None:
        sys.exit(f"{clang} is missing: apt-get install clang libclang-rt-14-dev (or set CLANG)")
    setup = (ROOT / "setup.py").read_text()
    parts = re.search(r"^SOURCES = (.*(?:\nSOURCES \+= .*)*)", setup, re.M)
    assert parts is not None
    sources = [ROOT / "native" / f"{source}.c" for source in re.findall(r'"(\w+)"', parts[1])]
    paths = sysconfig.get_paths()
    lib = sysconfig.get_config_var("LIBDIR")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    out = folder / f"fuzz_{name}"
    link = [f"-L{lib}", f"-Wl,-rpath,{lib}", f"-l{version}", "-ldl", "-lm"]
    command = [
        clang,
        *FLAGS,
        f"-I{paths['include']}",
        *map(str, sources),
        str(ROOT / f"native/fuzz/{name}.c"),
        "-o",
        str(out),
        *link,
    ]
    subprocess.run(command, check=True)
    return out


def command_of(name: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    environment = dict(os.environ)
    if name in PYTHON_TARGETS:
        return [sys.executable, str(HERE / "targets.py"), name], environment
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(p for p in sys.path if "site-packages" in p)])
    environment["PYTHONMALLOC"] = "malloc"
    # Python leaves things of its own at exit; what an input leaves would show as growth (-rss_limit_mb).
    environment["ASAN_OPTIONS"] = "detect_leaks=0:allocator_may_return_null=1"
    return [str(build(name, folder))], environment


def first_seeds(name: str) -> list[bytes]:
    if name in C_TARGETS:
        golden = json.loads((ROOT / "tests/wire/golden.json").read_text()).values()
        heads = [bytes.fromhex(vector["hex"])[:64] for vector in golden]
        return [b"\0" + h for h in heads] + [b"\1" + h for h in heads] if name == "framing" else [bytes(range(1, 200))]
    said = subprocess.run(
        [sys.executable, "-c", f"import sys, json; sys.path.insert(0, {str(HERE)!r}); import targets; "
         f"print(json.dumps([s.hex() for s in targets.seeds({name!r})]))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [bytes.fromhex(s) for s in json.loads(said.stdout.splitlines()[-1])]


def run(name: str, seconds: int, findings: Path, *, replay: bool, keep: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        begin, found = work / "begin", work / "found"
        begin.mkdir(), found.mkdir()
        kept = CORPUS / name
        for data in [*first_seeds(name), *(f.read_bytes() for f in sorted(kept.glob("*")))]:
            (begin / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        command, environment = command_of(name, work)
        limits = ["-runs=0"] if replay else [f"-max_total_time={seconds}"]
        arguments = [
            *limits,
            "-print_final_stats=1",
            "-timeout=20",
            "-rss_limit_mb=4096",
            "-max_len=8192",
            f"-artifact_prefix={findings}/{name}-",
        ]
        done = subprocess.run(
            [*command, *arguments, str(found), str(begin)], cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace"
        )  # fmt: skip
        text = done.stdout + done.stderr
        runs = re.findall(r"^#(\d+)\s", text, re.M)
        row = {
            "target": name,
            "seconds": 0 if replay else seconds,
            "executions": max(map(int, runs), default=0),
            "edges": max(map(int, re.findall(r"cov: (\d+)", text)), default=0),
            "features": max(map(int, re.findall(r"ft: (\d+)", text)), default=0),
            "new_inputs": len(list(found.iterdir())),
            "finding": done.returncode != 0,
        }
        if done.returncode:
            row["output"] = text[-6000:]
        elif keep:
            _keep(kept, found)
        return row


def _keep(kept: Path, found: Path) -> None:
    """Of the inputs that reached something new, some of every size that is small enough."""
    files = sorted((f for f in found.iterdir() if f.stat().st_size <= MOST_BYTES), key=lambda f: (f.stat().st_size, f.name))
    step = max(1, len(files) // MOST_FILES)
    kept.mkdir(parents=True, exist_ok=True)
    for file in files[::step][:MOST_FILES]:
        (kept / file.name[:16]).write_bytes(file.read_bytes())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="per target")
    parser.add_argument("--only", choices=[*PYTHON_TARGETS, *C_TARGETS], action="append")
    parser.add_argument("--replay", action="store_true", help="run the corpora once, and nothing else")
    parser.add_argument("--keep", action="store_true", help="add to the corpora what was found")
    parser.add_argument("--findings", type=Path, default=Path("."), help="folder for inputs that break something")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.findings.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.only or [*PYTHON_TARGETS, *C_TARGETS]:
        row = run(name, args.seconds, args.findings.resolve(), replay=args.replay, keep=args.keep)
        rows.append(row)
        what = "FINDING" if row["finding"] else "no finding"
        print(
            f"{name:10} {row['executions']:>10} executions  {row['edges']:>6} edges  {row['features']:>6} features  {what}",
            flush=True,
        )
        if row["finding"]:
            print(row["output"], file=sys.stderr)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if any(row["finding"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
