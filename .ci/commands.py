"""The commands of ccfix, each as a new user runs it: an empty HOME, no configuration, the real client where it is started.

    python3 .ci/commands.py [scenario ...]
"""
import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import ssl
import subprocess
import tempfile
import time

from harness import CACHE, CCFIX, PYTHON, Run, ccfix, check, free_port, run_table, stop, wait_for
from real_client import answers, bash, read, seen
from scripted_upstream import Scripted, attempts, call, fail, rounds, say

VERSION = os.environ.get("CLAUDE_VERSION", "2.1.330")
CLIENT = os.path.join(os.environ.get("CLAUDE_ROOT") or os.path.join(CACHE, "claude"), VERSION, "node_modules", ".bin")
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
QUIET = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1", "IS_SANDBOX": "1", "CLAUDE_CODE_MAX_RETRIES": "1"}


# Helpers

def clean(home, **more):
    """The environment of a bare account."""
    return dict({"PATH": SYSTEM_PATH, "HOME": home, "LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1"}, **more)


def command(*args, home, cwd=None, limit=120, given="", **env):
    """Run ccfix with these arguments; -> Run(code, out, err, seconds)."""
    start = time.monotonic()
    done = subprocess.run([PYTHON, CCFIX, *args], cwd=cwd or home, env=clean(home, **env), input=given, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=limit, encoding="utf-8")
    return Run(done.returncode, done.stdout, done.stderr, time.monotonic() - start)


def with_client(*args, **options):
    return command(*args, **dict(dict(QUIET, PATH=CLIENT + ":" + SYSTEM_PATH), **options))


def target(upstream, key="sk-upstream-secret"):
    return ["-b", upstream.url, "-k", key, "-m", "scripted-model"]


def shown(run):
    return "exit code %s after %.1f s\nstdout: %s\nstderr: %s" % (run.code, run.seconds, run.out[-2500:], run.err[-1500:])


# run

def run_command():
    with tempfile.TemporaryDirectory() as home:
        run = with_client("run", "--demo", "--", "-p", "hello", home=home)
        check("run --demo -- -p hello: an answer, and nothing else on stdout", run.code == 0 and run.out.startswith("I am the demo model"),
              shown(run))
        left = sorted(name for name in os.listdir(home) if not name.startswith((".claude", ".npm", ".local", ".cache", ".config")))
        check("run leaves nothing of its own behind", not left, left)
    with tempfile.TemporaryDirectory() as home, Scripted(rounds([bash("echo ran >> ran.txt")], [say("RUN-DONE")])) as upstream:
        run = with_client("run", *target(upstream), "--", "-p", "Do it.", "--dangerously-skip-permissions", home=home,
                          ANTHROPIC_API_KEY="of-another-service", ANTHROPIC_BASE_URL="http://127.0.0.1:9")
        answers("run: a tool is used, whatever the environment said before", run, upstream.requests, "RUN-DONE", 2)
        check("run: the tool ran in the current folder", read(home, "ran.txt") == "ran\n", seen(run, upstream.requests))
    with tempfile.TemporaryDirectory() as home, Scripted(attempts(fail(401, "Bad key", code="invalid_api_key"))) as upstream:
        run = with_client("run", *target(upstream), "--", "-p", "Do it.", home=home)
        check("run passes the client's exit code on", run.code == 1 and "TARGET_API_KEY" in run.out, shown(run))
        run = command("run", *target(upstream), "--", "-p", "Do it.", home=home)
        check("run without Claude Code says how to get it", run.code not in (0, 1) and "claude" in run.err.lower()
              and "Traceback" not in run.err, shown(run))


def run_in_a_terminal():
    """The interactive client under a pseudo-terminal: a prompt is typed, the answer appears, it is left by Ctrl-C."""
    with tempfile.TemporaryDirectory() as home, Scripted(rounds([say("PTY-ANSWER")])) as upstream:
        with open(os.path.join(home, ".claude.json"), "w", encoding="utf-8") as f:
            json.dump({"hasCompletedOnboarding": True, "theme": "dark", "projects": {home: {"hasTrustDialogAccepted": True}}}, f)
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(home)
            os.execve(PYTHON, [PYTHON, CCFIX, "run", *target(upstream)],
                      clean(home, **dict(QUIET, PATH=CLIENT + ":" + SYSTEM_PATH, TERM="xterm-256color")))
        screen = bytearray()

        def see(words, seconds):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if select.select([terminal], [], [], 0.2)[0]:
                    try:
                        screen.extend(os.read(terminal, 65536))
                    except OSError:
                        break
                if words and words in re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]|\s", b"", screen):
                    return True
            return False

        try:
            see(None, 5)
            os.write(terminal, b"say it")
            see(None, 1)
            os.write(terminal, b"\r")
            ok = see(b"PTY-ANSWER", 20)
            check("run in a terminal: the answer appears", ok, bytes(screen[-3000:]).decode("utf-8", "replace"))
            for _ in range(2):
                os.write(terminal, b"\x03")
                see(None, 0.3)
            see(None, 3)
            wait_for(lambda: os.waitpid(pid, os.WNOHANG)[0], 5, "the end after Ctrl-C twice")
            check("run in a terminal: Ctrl-C twice ends it", True)
        except TimeoutError as error:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            check("run in a terminal: Ctrl-C twice ends it", False, error)
        finally:
            os.close(terminal)


# check

def checks():
    def model(request):
        """A model that can do all that `check` asks for, as far as a script can."""
        if request.results:
            return [say("It is sunny.")]
        names = request.tool_names
        return [call(names[0], **arguments(request.body["tools"][0]["function"]["parameters"]))] if names else [say("OK")]

    def arguments(schema):
        samples = {"string": "Ulm", "integer": 1, "number": 1, "boolean": True, "array": [], "object": {}}
        return {name: samples.get(part.get("type"), "Ulm") for name, part in schema.get("properties", {}).items()}

    with tempfile.TemporaryDirectory() as home:
        run = command("check", "--demo", home=home)
        check("check --demo: all is well", run.code == 0 and run.out and run.out.isascii(), shown(run))
        with Scripted(model) as upstream:
            run = command("check", *target(upstream), home=home)
            check("check: a good server", run.code == 0, shown(run))
            run = command("check", *target(upstream), "--json", home=home)
            check("check --json: one JSON object on stdout", run.code == 0 and isinstance(json.loads(run.out), dict), shown(run))
            check("check never shows the key", "sk-upstream-secret" not in run.out + run.err, shown(run))
            with ccfix(upstream.url) as url:
                run = command("check", "--base-url", url, home=home)
                check("check --base-url: ccfix itself is a good server", run.code == 0, shown(run))
        for name, reply, words in (
                ("a key that is refused", fail(401, "Incorrect API key", code="invalid_api_key"), ["TARGET_API_KEY"]),
                ("a model that does not exist", fail(404, "The model `x` does not exist", code="model_not_found"), ["-m", "scripted"]),
                ("no credit", fail(402, "Insufficient Balance"), ["credit"])):
            with Scripted(attempts(reply)) as upstream:
                run = command("check", *target(upstream), home=home)
                check("check: %s" % name, run.code == 1 and all(w in run.out for w in words) and "Traceback" not in run.err, shown(run))
        run = command("check", "-b", "http://127.0.0.1:%d/v1" % free_port(), "-k", "x", "-m", "x", home=home)
        check("check: nobody listens", run.code == 1 and "refused" in (run.out + run.err).lower(), shown(run))
        run = command("check", "-b", "http://no-such-host.invalid/v1", "-k", "x", "-m", "x", home=home)
        check("check: a name that does not exist", run.code == 1 and "no-such-host.invalid" in run.out + run.err, shown(run))


# Certificates and proxies

def certificates():
    with tempfile.TemporaryDirectory() as home, Scripted(rounds([say("TLS-ANSWER")])) as upstream:
        key, cert = os.path.join(home, "key.pem"), os.path.join(home, "cert.pem")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
                        "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, stderr=subprocess.DEVNULL)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        upstream.wrap(context)
        run = command("check", *target(upstream), home=home)
        check("an untrusted certificate: refused, and the setting is named", run.code == 1 and "certificate" in run.out
              and "ca-bundle" in (run.out + run.err).lower(), shown(run))
        for name, options, env in (("--ca-bundle", ["--ca-bundle", cert], {}), ("SSL_CERT_FILE", [], {"SSL_CERT_FILE": cert}),
                                   ("--insecure", ["--insecure"], {})):
            run = with_client("run", *target(upstream), *options, "--", "-p", "hi", home=home, **env)
            answers("a certificate of one's own, with %s" % name, run, [], "TLS-ANSWER")


@contextlib.contextmanager
def tinyproxy(folder, *lines):
    """A real forward proxy; yield its port."""
    port = free_port()
    path = os.path.join(folder, "proxy.conf")
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(("Port %d" % port, "Listen 127.0.0.1", "Timeout 60", "MaxClients 20", 'LogFile "%s/proxy.log"' % folder) + lines) + "\n")
    process = subprocess.Popen(["tinyproxy", "-d", "-c", path], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def listens():
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0
    try:
        wait_for(listens, 10, "tinyproxy")
        yield port
    finally:
        stop(process)


def forward_proxies():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:    # this machine's own address; nothing is sent
        s.connect(("192.0.2.1", 9))
        here = s.getsockname()[0]
    with tempfile.TemporaryDirectory() as home, Scripted(rounds([say("PROXIED")]), "0.0.0.0") as upstream:
        base = upstream.url.replace("127.0.0.1", here)
        options = ["-b", base, "-k", "x", "-m", "scripted-model"]
        for name, lines, user, code in (("a forward proxy", (), "", 0), ("with a password", ("BasicAuth me secret",), "me:secret@", 0),
                                        ("with a wrong password", ("BasicAuth me secret",), "me:wrong@", 1)):
            with tinyproxy(home, *lines) as port:
                run = with_client("run", *options, "--", "-p", "hi", home=home, HTTP_PROXY="http://%s127.0.0.1:%d" % (user, port),
                                  http_proxy="http://%s127.0.0.1:%d" % (user, port))
                log = read(home, "proxy.log")
            check(name, run.code == code and ("PROXIED" in run.out) == (code == 0) and (code or here in log),
                  shown(run) + log[-800:])
            check("    its password is never shown", "wrong" not in run.out + run.err and "secret" not in run.out + run.err, shown(run))


# init, install

def init_and_install():
    with tempfile.TemporaryDirectory() as home:
        flags = ["init", "-b", "http://127.0.0.1:9/v1", "-k", "sk-very-secret", "-m", "my-model"]
        run = command(*flags, home=home)
        text = read(home, ".env")
        check("init writes .env for its owner only", run.code == 0 and "my-model" in text
              and os.stat(os.path.join(home, ".env")).st_mode & 0o777 == 0o600, shown(run))
        again = command(*flags, home=home)
        check("init never overwrites it", again.code not in (0, None) and read(home, ".env") == text, shown(again))
        check("init does not show the key", "sk-very-secret" not in run.out + run.err, shown(run))
        run = command("install", home=home)
        installed = os.path.join(home, ".local", "bin", "ccfix")
        check("install", run.code == 0 and os.access(installed, os.X_OK), shown(run))
        done = subprocess.run([installed, "--version"], env=clean(home, PATH=os.path.dirname(PYTHON) + ":" + SYSTEM_PATH),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, timeout=20)
        check("what is installed runs", done.returncode == 0, done.stdout)
        run = command("uninstall", home=home)
        check("uninstall", run.code == 0 and not os.path.exists(installed), shown(run))
        run = command("no-such-command", home=home)
        check("a command that does not exist: exit code 2", run.code == 2 and "Traceback" not in run.err, shown(run))


if __name__ == "__main__":
    run_table([run_command, run_in_a_terminal, checks, certificates, forward_proxies, init_and_install])
