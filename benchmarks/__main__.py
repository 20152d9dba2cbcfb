"""Every benchmark, each in a process of its own, one after the other; then the table.

python -m benchmarks [--toy]
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import table
from benchmarks.measure import RESULTS

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[ce][0-9]*.py"))


def main() -> int:
    """How many failed. The table is made when none did."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure everything, half an hour.")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, nothing kept: to see that it runs")
    toy = ["--toy"] if parser.parse_args().toy else []
    failed = []
    for name in NAMES:
        print(f"== python -m benchmarks.{name}", flush=True)
        began = time.monotonic()
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *toy], check=False).returncode:
            failed.append(name)
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        print(f"failed, and the table is as it was: {', '.join(failed)}")
    elif not toy:
        table.main()
        print(f"{table.PAGE} is made from {RESULTS}")
    return len(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(f"\nStopped; what was measured is in {RESULTS}, the table is as it was.")
