"""The unit tests on a loaded machine: five runs in turn, while both processors are busy with nice
load. A test that looks at a clock fails here sooner or later.
"""

import os
import subprocess
import sys

from harness import PYTHON, TOP, check, run, run_table, stop

RUNS = 5
LONGEST = 400  # seconds of one run; more is a hang
BURN = "import time\nend = time.monotonic() + %d\nwhile time.monotonic() < end:\n    pass"
BURNERS = os.cpu_count() or 1  # at nice 5 each leaves the tests three quarters of a processor


def start_burner():
    """Load that ends by itself, whatever becomes of this script."""
    command = ["nice", "-n", "5", sys.executable, "-c", BURN % (RUNS * LONGEST)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def five_times():
    burners = [start_burner() for _ in range(BURNERS)]
    try:
        for number in range(RUNS):
            done = run([PYTHON, os.path.join(TOP, "test_ccfix.py")], LONGEST, cwd=TOP)
            told = (done.out.splitlines() or ["no sum"])[-1]
            name = "run %d of %d beside load: %s (%.0f s)" % (number + 1, RUNS, told, done.seconds)
            check(name, done.code == 0, done.err[-4000:])
    finally:
        for burner in burners:
            stop(burner)


if __name__ == "__main__":
    run_table(five_times)
