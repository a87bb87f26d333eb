"""Judge the logs of native/test-asan.sh: exits 1 when a report concerns the extension.

Errors count always. A leak counts when its allocation passed through the extension, except while the module was
being made (its types live as long as the process).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# A frame of the extension, with symbols or without.
EXTENSION = re.compile(r" native/\w+\.[ch]:|_native\.abi3\.so")


def concerns(log: str) -> list[str]:
    """The reports in one log that count."""
    if "ERROR: AddressSanitizer" in log or "runtime error:" in log:
        return [log]
    leaks = re.split(r"\n(?=(?:Direct|Indirect) leak of)", log)[1:]
    return [leak for leak in leaks if EXTENSION.search(leak) and "PyInit__native" not in leak]


def main(folder: Path) -> int:
    logs = sorted(folder.iterdir())
    found = [report for path in logs for report in concerns(path.read_text(errors="replace"))]
    for report in found:
        print(report)
    print(f"sanitizers: {len(logs)} logs, {len(found)} reports that concern the extension")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
