"""Small helpers of the CI scripts: counted checks, servers, the real client, plain requests. Stdlib only."""

import collections
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
SHARED = os.path.join(os.path.dirname(TOP), "shared")
CACHE = os.path.join(os.path.expanduser("~"), ".cache", "ccfix-ci")
PYTHON = (
    os.environ.get("CCFIX_PYTHON") or sys.executable
)  # runs ccfix.py; the scripts run on any newer one
CCFIX = os.environ.get("CCFIX_FILE") or os.path.join(TOP, "ccfix.py")

COUNTS = collections.Counter()
Reply = collections.namedtuple("Reply", "status headers body raw")
Run = collections.namedtuple("Run", "code out err seconds")


# Checks


def check(name, condition, detail=""):
    """Count and print one check; `detail` (str, or a function that makes it) is shown on failure only."""
    COUNTS["passed" if condition else "failed"] += 1
    print("%-4s %s" % ("ok" if condition else "FAIL", name), flush=True)
    if not condition:
        text = str(detail() if callable(detail) else detail)
        print("     " + text[:4000].replace("\n", "\n     "), flush=True)
    return bool(condition)


def skip(name, why):
    COUNTS["skipped"] += 1
    print("skip %s: %s" % (name, why), flush=True)


def finish():
    """Print the sum, alone on the last line, and exit."""
    print(
        "%d passed, %d failed, %d skipped"
        % (COUNTS["passed"], COUNTS["failed"], COUNTS["skipped"]),
        flush=True,
    )
    sys.exit(1 if COUNTS["failed"] or not COUNTS["passed"] else 0)


def run_table(table):
    """Run functions in turn, or those named on the command line; an exception is a failed check."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("stopped")
    )  # so that the servers are ended too
    wanted = sys.argv[1:]
    for scenario in table:
        name = scenario.__name__.replace("_", "-")
        if wanted and name not in wanted:
            continue
        try:
            scenario()
        except Exception as error:
            check(name + ": runs to its end", False, "%s: %s" % (type(error).__name__, error))
    finish()


# Servers


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def stop(process, grace=8):
    """End one process that we started: by SIGTERM, or by force when it does not obey; return its exit code."""
    process.terminate()
    try:
        return process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def wait_for(condition, seconds, what):
    """Poll until the condition holds, and return its value; TimeoutError after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError("%s: not within %g s" % (what, seconds))
        time.sleep(0.05)


@contextlib.contextmanager
def ccfix(base=None, *options, key="sk-upstream-secret", model="scripted-model", env=None):
    """Run ccfix before an upstream (None: before nothing), in an empty folder, with a clean environment; yield its URL.

    What it printed is shown when it does not start, or when it printed a traceback."""
    with tempfile.TemporaryDirectory() as scratch, open(
        os.path.join(scratch, "output"), "w+"
    ) as output:
        port = free_port()
        url = "http://127.0.0.1:%d" % port
        target = ["-k", key, "-m", model, "-b", base] if base else []
        clean = {"PATH": os.environ["PATH"], "HOME": scratch, "LC_ALL": "C"}
        process = subprocess.Popen(
            [PYTHON, "-W", "error::SyntaxWarning", CCFIX, *target, "-p", str(port), *options],
            cwd=scratch,
            env=dict(clean, **(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        started = False
        try:
            wait_for(
                lambda: process.poll() is not None or get(url + "/health").status == 200,
                20,
                "GET /health",
            )
            if process.poll() is not None:
                raise RuntimeError("ccfix did not start")
            started = True
            yield url
        finally:
            code = stop(process)
            output.seek(0)
            text = output.read()
            if "Traceback" in text or code or not started:
                check(
                    "ccfix starts, and ends with exit code 0 and no traceback (was %s)" % code,
                    False,
                    text[-3000:],
                )


# The real client


def claude(url, *args, env=None, model="my-own-model", home=None, cwd=None, limit=120):
    """Run the real client against `url`; -> Run(code, out, err, seconds). `model=None` leaves its default model."""
    settings = dict({"CLAUDE_CODE_MAX_RETRIES": "2"}, **(env or {}))
    if model:
        settings["ANTHROPIC_MODEL"] = model
    command = [os.path.join(SHARED, "tools", "run_claude.sh"), "-t", str(limit)]
    for flag, folder in (("-H", home), ("-d", cwd)):
        command += [flag, folder] if folder else []
    for name, value in settings.items():
        command += ["-e", "%s=%s" % (name, value)]
    outer = dict(os.environ)
    outer.setdefault("CLAUDE_ROOT", os.path.join(CACHE, "claude"))
    start = time.monotonic()
    done = subprocess.run(
        command + [url, *args],
        env=outer,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=limit + 30,
    )
    return Run(done.returncode, done.stdout, done.stderr, time.monotonic() - start)


def json_lines(text):
    """The JSON objects of an output, one a line (stream-json, or one result); other lines are left out."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            found.append(json.loads(line))
    return found


# Plain requests


def get(url, headers=()):
    return ask(urllib.request.Request(url, headers=dict(headers)))


def post(url, body, headers=(), timeout=60):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = dict(
        {"Content-Type": "application/json", "anthropic-version": "2023-06-01", "x-api-key": "any"},
        **dict(headers),
    )
    return ask(urllib.request.Request(url, data, headers), timeout)


def ask(request, timeout=60):
    """-> Reply; status 0 when nobody answers. The body is parsed when it is JSON."""
    try:
        with DIRECT.open(request, timeout=timeout) as answer:
            status, headers, raw = answer.status, answer.headers, answer.read().decode("utf-8")
    except urllib.error.HTTPError as error:
        status, headers, raw = error.code, error.headers, error.read().decode("utf-8")
    except OSError as error:
        return Reply(0, {}, None, str(error))
    try:
        return Reply(status, headers, json.loads(raw), raw)
    except ValueError:
        return Reply(status, headers, None, raw)


DIRECT = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # loopback, whatever the machine's proxy is


def sse_events(raw):
    """The data objects of an event stream."""
    return [json.loads(line) for line in re.findall(r"^data: (.*)$", raw, re.M)]
