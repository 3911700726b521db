"""Small helpers of the CI scripts: counted checks, ccfix as a process, the real client, plain
requests. Standard library only; Python 3.6 or newer.
"""

import collections
import contextlib
import json
import os
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
TOOLS = os.path.join(os.path.dirname(TOP), "shared", "tools")
CACHE = os.path.join(os.path.expanduser("~"), ".cache", "ccfix-ci")
PYTHON = os.environ.get("CCFIX_PYTHON") or sys.executable  # runs ccfix.py
CCFIX = os.environ.get("CCFIX_FILE") or os.path.join(TOP, "ccfix.py")
# loopback, whatever the machine's proxy is
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))

COUNTS = collections.Counter()
Reply = collections.namedtuple("Reply", "status headers body raw")
Run = collections.namedtuple("Run", "code out err seconds")


# Checks


def check(name, condition, detail=""):
    """Count and print one check; what `detail` is, or makes, is shown when it fails."""
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
    told = tuple(COUNTS[name] for name in ("passed", "failed", "skipped"))
    print("%d passed, %d failed, %d skipped" % told, flush=True)
    sys.exit(1 if COUNTS["failed"] or not COUNTS["passed"] else 0)


def end_well():
    """Let SIGTERM raise SystemExit, so that the servers that were started are ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))


def run_table(*table):
    """Run functions in turn, or those named on the command line; an exception is a failed check."""
    end_well()
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


# Processes


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def stop(process, grace=15):
    """End one process that we started, by force when it does not obey -> its exit code."""
    if process.poll() is None:
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


def run(command, limit=120, given="", **options):
    """Run a command to its end -> Run; what it prints is UTF-8."""
    begun = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.run(command, input=given.encode(), timeout=limit, **dict(pipes, **options))
    out, err = (part.decode("utf-8") if part else "" for part in (done.stdout, done.stderr))
    return Run(done.returncode, out, err, time.monotonic() - begun)


class Ccfix:
    """ccfix as a process before an upstream (None: before nothing).

    It has an empty folder and a clean environment. That it ends with exit code 0 and prints no
    traceback is a check of its own.

    command  how it is started, instead of as a script; port: a free one, if none is given;
             more: further arguments of Popen
    """

    def __init__(
        self, base, *options, key="sk-upstream-secret", model="scripted-model", env=None, **more
    ):
        self.folder = tempfile.TemporaryDirectory()
        self.port = more.pop("port", None) or free_port()
        self.url = "http://127.0.0.1:%d" % self.port
        target = ["-k", key, "-m", model, "-b", base] if base else []
        clean = {"PATH": os.environ["PATH"], "HOME": self.folder.name, "LC_ALL": "C"}
        script = [PYTHON, "-W", "error::SyntaxWarning", CCFIX]
        command = more.pop("command", script)
        self.output = open(os.path.join(self.folder.name, "output"), "w+b")
        self.process = subprocess.Popen(
            command + target + ["-p", str(self.port)] + list(options),
            cwd=self.folder.name,
            env=dict(clean, **(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            **more,
        )

    def __enter__(self):
        try:
            wait_for(self.answers, 30, "GET /health")
        except BaseException as error:
            stop(self.process)
            raise RuntimeError("ccfix did not start (%s):\n%s" % (error, self.printed()))
        return self

    def answers(self):
        if self.process.poll() is not None:
            raise RuntimeError("exit code %d" % self.process.returncode)
        return get(self.url + "/health").status == 200

    def __exit__(self, *exc):
        code, text = stop(self.process), self.printed()
        if code or "Traceback" in text or "Fatal" in text:
            name = "ccfix ends with exit code 0 and no traceback (was %s)" % code
            check(name, False, text[-3000:])
        self.output.close()
        self.folder.cleanup()

    def printed(self):
        with open(self.output.name, "rb") as file:
            return file.read().decode("ascii", "replace")


@contextlib.contextmanager
def ccfix(*args, **options):
    """Run ccfix; yield its URL."""
    with Ccfix(*args, **options) as running:
        yield running.url


@contextlib.contextmanager
def llama(*options, model="smollm2-135m"):
    """Run a real model server (llama.cpp); yield its base URL (http://127.0.0.1:N/v1)."""
    starter = [sys.executable, os.path.join(TOOLS, "start_upstream.py"), "--model", model]
    process = subprocess.Popen(
        starter + list(options),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        universal_newlines=True,
    )
    try:
        url = process.stdout.readline().strip()
        if not url.startswith("http"):
            raise RuntimeError("the model server did not start")
        yield url
    finally:
        stop(process)
        process.stdout.close()


# The real client


def claude(url, *args, env=None, model="my-own-model", home=None, cwd=None, limit=120):
    """Run the real client against `url` -> Run. `model=None` leaves its default model."""
    settings = dict({"CLAUDE_CODE_MAX_RETRIES": "2"}, **(env or {}))
    if model:
        settings["ANTHROPIC_MODEL"] = model
    command = [os.path.join(TOOLS, "run_claude.sh"), "-t", str(limit)]
    for flag, folder in (("-H", home), ("-d", cwd)):
        command += [flag, folder] if folder else []
    for name, value in settings.items():
        command += ["-e", "%s=%s" % (name, value)]
    outer = dict({"CLAUDE_ROOT": os.path.join(CACHE, "claude")}, **os.environ)
    return run(command + [url] + list(args), limit + 30, env=outer)


def json_lines(text):
    """The JSON objects of an output, one a line; other lines are left out."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


# Plain requests


def get(url, headers=()):
    return ask(urllib.request.Request(url, headers=dict(headers)))


def post(url, body, headers=(), timeout=60):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Content-Type": "application/json", "anthropic-version": "2023-06-01"}
    fields = dict(fields, **dict({"x-api-key": "any"}, **dict(headers)))
    return ask(urllib.request.Request(url, content, fields), timeout)


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
