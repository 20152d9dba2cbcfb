"""Every benchmark, each in a process of its own, one after the other; then the table.

python -m benchmarks [--toy]
"""

import subprocess
import sys
import time
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[ce][0-9]*.py"))


def main() -> int:
    """How many failed."""
    failed = []
    for name in NAMES:
        print(f"== python -m benchmarks.{name}", flush=True)
        began = time.monotonic()
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=False).returncode:
            failed.append(name)
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
    if "--toy" not in sys.argv:
        subprocess.run([sys.executable, "-m", "benchmarks.table"], check=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
