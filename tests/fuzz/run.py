"""Runs the fuzz targets, Python (atheris) and C (libFuzzer with sanitizers), one after the other or --jobs side by side.

    python tests/fuzz/run.py --seconds 60 [--only NAME] [--json FILE] [--keep]
    python tests/fuzz/run.py --replay             only the corpora, every file once

Each target starts from its corpus in tests/fuzz/corpus/NAME and from what the code itself writes, and runs until it has had so many
seconds *of a processor*. ``--keep`` merges what found new coverage into the corpus. A finding is left as ``crash-*`` in --findings, and the exit status is 1.
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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CORPUS = HERE / "corpus"
PYTHON_TARGETS = ("frames", "handshake", "control", "manifests", "coded")
C_TARGETS = ("pages", "framing", "planes")
MOST_INPUT = 8192
MOST_FILES, MOST_BYTES = 200, 100_000
"""What of a target's corpus is kept in the repository, the smallest inputs first."""
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
        # One file that can be executed: a merge starts what it was started as.
        script = folder / f"fuzz_{name}"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "targets.py"}" {name} "$@"\n')
        script.chmod(0o755)
        environment["FUZZ_SELF"] = str(script)
        return [str(script)], environment
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


def run(name: str, seconds: int, findings: Path, *, hang_s: int, replay: bool, keep: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        begin, found = work / "begin", work / "found"
        begin.mkdir()
        found.mkdir()
        seeds = first_seeds(name)
        for data in [*seeds, *(f.read_bytes() for f in sorted((CORPUS / name).glob("*")))]:
            (begin / _name(data)).write_bytes(data)
        command, environment = command_of(name, work)
        row: dict[str, Any] = {
            "target": name,
            "seconds": 0,
            "cpu_seconds": 0,
            "executions": 0,
            "edges": 0,
            "edges_known": 0,
            "features": 0,
        }
        row |= {"new_inputs": 0, "finding": False}
        log = findings / f"{name}.log"
        log.unlink(missing_ok=True)
        started, used, left = time.monotonic(), 0.0, seconds
        # In rounds: libFuzzer knows only time on the wall, and others may have had the processor.
        while not row["finding"]:
            limits = ["-runs=0"] if replay else [f"-max_total_time={left}"]
            arguments = [
                *limits,
                "-print_final_stats=1",
                f"-timeout={hang_s}",
                "-rss_limit_mb=4096",
                f"-max_len={MOST_INPUT}",
                f"-artifact_prefix={findings}/{name}-",
            ]
            with log.open("ab") as out:
                start = out.tell()
                code, cpu_s = _wait(
                    subprocess.Popen(
                        [*command, *arguments, str(found), str(begin)],
                        cwd=ROOT,
                        env=environment,
                        stdout=out,
                        stderr=out,
                    )
                )
            used += cpu_s
            text = log.read_bytes()[start:].decode(errors="replace")
            row["executions"] += max(map(int, re.findall(r"^#(\d+)\s", text, re.M)), default=0)
            for key, pattern in (
                ("edges", r"cov: (\d+)"),
                ("features", r"ft: (\d+)"),
                ("edges_known", r"\((\d+) inline"),
            ):
                row[key] = max(row[key], *map(int, re.findall(pattern, text)), 0)
            row["seconds"], row["cpu_seconds"] = round(time.monotonic() - started), round(used)
            row["new_inputs"] = len(list(found.iterdir()))
            if code:
                row["finding"], row["output"] = True, text[-6000:]
            left = seconds - row["cpu_seconds"]
            if replay or left <= seconds // 50:
                break
        if keep and not row["finding"]:
            row["kept"] = _keep(name, command, environment, {_name(s) for s in seeds}, [found, begin], work / "merged")
        return row


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Exit status, and seconds of a processor: of this process alone, others may run beside it."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used.ru_utime + used.ru_stime


def _name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _keep(
    name: str, command: list[str], environment: dict[str, str], seeds: set[str], folders: list[Path], merged: Path
) -> dict[str, int]:
    """Replaces the kept corpus by libFuzzer's merge of all inputs: a small set of small ones with the same coverage."""
    merged.mkdir()
    arguments = [
        "-merge=1",
        f"-max_len={MOST_INPUT}",
        "-timeout=600",
        "-rss_limit_mb=4096",
        str(merged),
        *map(str, folders),
    ]
    subprocess.run([*command, *arguments], cwd=ROOT, env=environment, check=True, capture_output=True)
    kept = CORPUS / name
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    files = sorted(merged.iterdir(), key=lambda f: (f.stat().st_size, f.name))
    count = total = 0
    for data in (f.read_bytes() for f in files):
        if _name(data) in seeds or total + len(data) > MOST_BYTES or count == MOST_FILES:
            continue
        (kept / _name(data)).write_bytes(data)
        count, total = count + 1, total + len(data)
    return {"merged": len(files), "files": count, "bytes": total}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="of processor time, per target")
    parser.add_argument("--only", choices=[*PYTHON_TARGETS, *C_TARGETS], action="append")
    parser.add_argument("--jobs", type=int, default=1, help="targets side by side")
    parser.add_argument("--replay", action="store_true", help="run the corpora once, and nothing else")
    parser.add_argument("--keep", action="store_true", help="merge into the corpora what was found")
    parser.add_argument(
        "--hang", type=int, default=20, help="seconds on the wall that are a hang; more where processes are stopped"
    )
    parser.add_argument("--findings", type=Path, default=Path("."), help="folder for inputs that break something")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.findings.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def one(name: str) -> dict[str, Any]:
        return run(name, args.seconds, args.findings.resolve(), hang_s=args.hang, replay=args.replay, keep=args.keep)

    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(one, args.only or [*PYTHON_TARGETS, *C_TARGETS]):
            rows.append(row)
            edges = f"{row['edges']:>6} edges" + (f" of {row['edges_known']}" if row["edges_known"] else "")
            what = "FINDING" if row["finding"] else "no finding"
            print(
                f"{row['target']:10} {row['executions']:>10} executions in {row['cpu_seconds']} s  {edges}  {row['features']:>6} features  {what}",
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
