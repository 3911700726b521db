"""Commands on a bare account: the poorest locale, a terminal with its keys, servers found, real servers.

python3 .ci/account.py [scenario ...]      # all of them, or those named (with -, as in the output)
"""

import contextlib
import fcntl
import glob
import http.server
import json
import os
import pty
import re
import select
import shutil
import signal
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time

from harness import (
    CACHE,
    CCFIX,
    PYTHON,
    SHARED,
    Run,
    ccfix,
    check,
    claude,
    free_port,
    get,
    run_table,
    skip,
    stop,
    wait_for,
)
from scripted_upstream import Scripted, call, fail, rounds, say, usage

VERSION = os.environ.get("CLAUDE_VERSION", "2.1.330")
CLIENT = os.path.join(
    os.environ.get("CLAUDE_ROOT") or os.path.join(CACHE, "claude"), VERSION, "node_modules", ".bin"
)
COMMANDS = ("serve", "run", "check", "init", "install", "uninstall", "open")


# Helpers


@contextlib.contextmanager
def account():
    """An empty home; yields its path. The current folder of commands is work, in it."""
    with tempfile.TemporaryDirectory(prefix="account-") as home:
        home = os.path.realpath(home)
        os.mkdir(os.path.join(home, "work"))
        yield home


def environment(home, **more):
    found = {
        "PATH": os.pathsep.join([CLIENT, os.path.dirname(PYTHON), "/usr/bin", "/bin"]),
        "HOME": home,
        "TMPDIR": os.path.join(home, "work"),
    }
    return dict(found, **more)


def command(home, *argv, python=PYTHON, given="", limit=120, **env):
    """Run ccfix.py as a new user would -> Run."""
    begun = time.monotonic()
    done = subprocess.run(
        [python, CCFIX, *argv],
        cwd=os.path.join(home, "work"),
        env=environment(home, **env),
        input=given.encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=limit,
    )
    return Run(
        done.returncode,
        done.stdout.decode("utf-8"),
        done.stderr.decode("utf-8"),
        time.monotonic() - begun,
    )


def checklist(run):
    """{row: (mark, what was seen and the fix)} of the output of `check`."""
    found, name = {}, ""
    for line in run.out.splitlines():
        row = re.match(r"(ok|no|--|FAIL) +(\S.*?)  +(.*)", line)
        if row:
            name = row.group(2)
            found[name] = (row.group(1), row.group(3))
        elif name and "fix: " in line:
            found[name] = (found[name][0], found[name][1] + " " + line.strip())
    return found


def has_row(name, run, wanted, mark, *words):
    """Check one line of a checklist."""
    found = checklist(run).get(wanted, ("", ""))
    check(name, found[0] == mark and all(word in found[1] for word in words), run.out + run.err)


def pythons():
    """(name, interpreter, environment): ours, and the oldest under the poorest locale."""
    yield "", PYTHON, {}
    oldest = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.6.*/bin/python")))
    if oldest:
        yield " (Python 3.6, LC_ALL=C)", oldest[0], {"LC_ALL": "C"}
    else:
        skip("Python 3.6 under LC_ALL=C", "no Python 3.6 under ~/.pyenv")


def able(request):
    """A provider that can do what `check` asks for."""
    last = request.messages[-1]
    if last["role"] == "tool":
        return [say("11 degrees and rain."), usage(100, 6)]
    if request.body.get("tools"):
        return [
            call("get_weather", place="Paris"),
            call("get_weather", place="Rome"),
            usage(100, 20, 64),
        ]
    return [
        say("The picture is red. 1 2 3 " + " ".join(re.findall("ZEBRA-42", json.dumps(last))[:1])),
        usage(len(request.raw) // 4, 12, 64),
    ]


def text_of(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


# The commands without a client


def help_and_errors():
    for name, python, env in pythons():
        with account() as home:
            for word in ("",) + COMMANDS:
                run = command(
                    home, *[word] * bool(word), "--help", python=python, COLUMNS="80", **env
                )
                wide = [line for line in run.out.splitlines() if len(line) > 80]
                check(
                    "help of %s%s" % (word or "ccfix", name),
                    run.code == 0 and run.out.isascii() and not wide and not run.err,
                    run.out + run.err,
                )
            run = command(home, python=python, **env)
            check(
                "nothing configured: the three ways to go on, exit code 2" + name,
                run.code == 2
                and not run.out
                and all(word in run.err for word in ("init", "--demo", "Ollama")),
                run,
            )
            for argv, code in (
                (("chekc",), 2),
                (("--nosuch",), 2),
                (("check",), 2),
                (("init",), 2),
                (("open", "-p", str(free_port())), 1),
                (("uninstall",), 0),
                (("--version",), 0),
            ):
                run = command(home, *argv, python=python, **env)
                check(
                    "exit code %d of `%s`%s" % (code, " ".join(argv[:1]), name),
                    run.code == code and "Traceback" not in run.err,
                    run,
                )
            check(
                "nothing was written" + name,
                os.listdir(home) == ["work"] and not os.listdir(os.path.join(home, "work")),
            )


def each_command():
    for name, python, env in pythons():
        with account() as home, Scripted(rounds([say("SERVED")])) as upstream:
            told = json.loads(command(home, "check", "--demo", "--json", python=python, **env).out)
            check(
                "check --demo --json" + name, told["ok"] is True and len(told["checks"]) == 15, told
            )
            run = command(
                home,
                "init",
                "-b",
                upstream.url,
                "-k",
                "sk-very-secret",
                "-m",
                "my-model",
                python=python,
                **env,
            )
            check(
                "init" + name,
                run.code == 0
                and json.loads(run.out)["env"]["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8080",
                run,
            )
            check(
                "its .env is private" + name,
                stat.S_IMODE(os.stat(os.path.join(home, "work", ".env")).st_mode) == 0o600,
            )
            run = command(home, "run", "--", "-p", "hello", python=python, **env)
            check(
                "run takes it" + name,
                (run.code, run.out.strip()) == (0, "SERVED")
                and upstream.requests[-1].headers["authorization"] == "Bearer sk-very-secret",
                run,
            )
            folder = os.path.join(home, ".local", "bin")
            run = command(home, "install", python=python, **env)
            check(
                "install" + name,
                run.code == 0
                and sorted(os.listdir(folder)) == ["ccf", "ccfix"]
                and "PATH" in run.err,
                run,
            )
            path = os.pathsep.join([folder, os.path.dirname(python), "/usr/bin", "/bin"])
            for argv, code, said in (
                (["ccfix", "--version"], 0, "ccfix "),
                (["ccf", "check", "--demo"], 0, "can work"),
                (["ccf"], 1, "no ccfix is running"),
            ):
                done = subprocess.run(
                    argv,
                    env=environment(home, **dict(env, PATH=path)),
                    cwd=home,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
                check(
                    "installed: %s%s" % (" ".join(argv), name),
                    done.returncode == code and said in done.stdout.decode(),
                    done,
                )
            run = command(home, "uninstall", python=python, **env)
            check("uninstall" + name, run.code == 0 and not os.listdir(folder), run)


def opened():
    with account() as home, ccfix(None, "--demo") as url:
        browser, seen = os.path.join(home, "browser"), os.path.join(home, "seen")
        with open(browser, "w") as f:
            f.write("#!/bin/sh\necho \"$1\" > %s\n" % seen)
        os.chmod(browser, 0o755)
        run = command(home, "open", "-p", url.rsplit(":", 1)[1], BROWSER=browser + " %s")
        wait_for(lambda: os.path.exists(seen) and text_of(seen), 10, "the browser")
        check(
            "open opens the status page",
            run.code == 0 and run.out == text_of(seen) == url + "/\n",
            run,
        )


def local_discovery():
    """A scripted server on LM Studio's port is found."""
    script = Scripted(rounds([say("FROM LM STUDIO")]))
    listing = {
        "object": "list",
        "data": [{"id": "text-embedding-x", "object": "model"}, {"id": "qwen", "object": "model"}],
    }
    handler = type(
        "Listing",
        (script._server.RequestHandlerClass,),
        {"do_GET": lambda self: self.send_json(200, listing)},
    )
    try:
        place = http.server.ThreadingHTTPServer(("127.0.0.1", 1234), handler)
    except OSError:
        return skip("a local server is found", "port 1234 is taken")
    place.daemon_threads, place.owner = True, script
    threading.Thread(target=place.serve_forever, args=(0.05,), daemon=True).start()
    try:
        with account() as home:
            run = command(home, "run", "--", "-p", "hello")
            check(
                "with nothing configured, a local server is used",
                (run.code, run.out.strip()) == (0, "FROM LM STUDIO"),
                run,
            )
            check(
                "and said so, with its model",
                "found LM Studio at http://127.0.0.1:1234/v1, using its model qwen" in run.err,
                run.err,
            )
            run = command(home, "init")
            check(
                "init takes it",
                run.code == 0
                and "TARGET_API_BASE=http://127.0.0.1:1234/v1\n"
                in text_of(os.path.join(home, "work", ".env")),
                run,
            )
    finally:
        place.shutdown()
        place.server_close()


# run, with the real client


def run_in_pipes():
    with account() as home, Scripted(rounds([say("PONG"), usage(1000, 2)])) as upstream:
        target = ("-b", upstream.url, "-k", "sk-very-secret", "-m", "my-model")
        run = command(
            home, "run", *target, "--", "-p", "--output-format", "json", given="piped words"
        )
        check(
            "run in a pipe",
            run.code == 0
            and json.loads(run.out)["result"] == "PONG"
            and "piped words" in upstream.requests[-1].raw,
            run,
        )
        run = command(
            home,
            "run",
            *target,
            "--",
            "-p",
            "hello",
            "--model",
            "haiku",
            TARGET_MODEL_HAIKU="small-model",
        )
        check(
            "a family goes to its own model",
            run.code == 0 and upstream.requests[-1].body["model"] == "small-model",
            run,
        )
        run = command(
            home, "run", *target, "--", "-p", "hi", "--output-format", "json", MAX_CONTEXT="70000"
        )
        told = json.loads(run.out)["modelUsage"]
        check(
            "the client knows the model's window", told["my-model"]["contextWindow"] == 70000, told
        )
        check("and assumes none", "assumes" not in run.err, run.err)
        check(
            "exit code of the client",
            command(home, "run", *target, "--", "--no-such-option").code == 1,
        )
        check(
            "other commands of the client",
            "No MCP servers" in command(home, "run", *target, "--", "mcp", "list").out,
        )
        upstream.script = lambda request: fail(402, "Insufficient Balance")
        run = command(home, "run", *target, "--", "-p", "hello")
        check(
            "a provider's error arrives", run.code == 1 and "Insufficient Balance" in run.out, run
        )
        check(
            "nothing of ours is left behind",
            not glob.glob(os.path.join(home, "work", "ccfix*")),
            os.listdir(os.path.join(home, "work")),
        )


def run_beside_another_setup():
    with account() as home, Scripted(rounds([say("PONG"), usage(1000, 2)])) as upstream:
        path = os.path.join(home, ".claude", "settings.json")
        os.mkdir(os.path.dirname(path))
        with open(path, "w") as f:
            json.dump(
                {
                    "env": {
                        "ANTHROPIC_BASE_URL": "http://127.0.0.1:1",
                        "ANTHROPIC_AUTH_TOKEN": "elsewhere",
                        "ANTHROPIC_MODEL": "other",
                        "CLAUDE_CODE_USE_BEDROCK": "1",
                    },
                    "apiKeyHelper": "echo helper",
                },
                f,
            )
        before = text_of(path)
        run = command(
            home,
            "run",
            "-b",
            upstream.url,
            "-k",
            "sk",
            "-m",
            "my-model",
            "--",
            "-p",
            "hello",
            ANTHROPIC_API_KEY="sk-real",
            CLAUDE_CODE_USE_VERTEX="1",
            HTTP_PROXY="http://127.0.0.1:1",
            HTTPS_PROXY="http://127.0.0.1:1",
        )
        check(
            "settings.json, variables and a proxy of another setup do not matter",
            (run.code, run.out.strip()) == (0, "PONG"),
            run,
        )
        check("the user's file is as it was", text_of(path) == before)
        check(
            "the file with the key is gone again",
            not glob.glob(os.path.join(home, "work", "ccfix*")),
        )


class Terminal:
    """A shell under a pseudo-terminal: type(text), see(name, patterns) waits for them on the screen, blanks left out: the
    client draws those by moving the cursor."""

    def __init__(self, home):
        self.text = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(os.path.join(home, "work"))
            os.execve(
                "/bin/bash",
                ["bash", "--norc", "-i"],
                environment(home, TERM="xterm-256color", PS1="sh> ", LANG="C.UTF-8"),
            )
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))

    def read(self, seconds=0.1):
        while select.select([self.fd], [], [], seconds)[0]:
            data = os.read(self.fd, 65536).decode("utf-8", "replace")
            self.text += re.sub(
                r"\x1b(\[[0-9;?<>=]*[ -/]*[@-~]|\][^\x07]*\x07|[()].|.)|\s", "", data
            )
            seconds = 0.05

    def type(self, text):
        self.text = ""
        os.write(self.fd, text.encode())

    def see(self, name, *patterns, seconds=30):
        """Check that the patterns come to the screen."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not all(
            re.search(pattern, self.text) for pattern in patterns
        ):
            self.read()
        return check(
            name, all(re.search(pattern, self.text) for pattern in patterns), self.text[-3000:]
        )

    def close(self):
        os.close(self.fd)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def run_in_a_terminal():
    with account() as home:
        work = os.path.join(home, "work")
        with open(os.path.join(home, ".claude.json"), "w") as f:
            json.dump(
                {
                    "hasCompletedOnboarding": True,
                    "theme": "dark",
                    "projects": {work: {"hasTrustDialogAccepted": True}},
                },
                f,
            )
        terminal = Terminal(home)
        try:
            terminal.type("%s %s run --demo; echo code=$?\n" % (PYTHON, CCFIX))
            terminal.see(
                "the session starts; auto mode is off, and why is said",
                "autopermissionmodeisoff",
                "manualmode",
            )
            time.sleep(1)
            terminal.type("run touch made.txt")
            terminal.see("typing reaches it", "made.txt")
            terminal.type("\r")
            terminal.see("a tool asks for permission", "Doyouwanttoproceed")
            check(
                "no dialog about auto mode",
                not re.search("Automodecan", terminal.text),
                terminal.text[-2000:],
            )
            time.sleep(1)  # the dialog takes no key at once, so that nobody agrees by accident
            terminal.type("\r")
            terminal.see("the tool's result comes back", "Thetoolanswered")
            check("the tool ran", os.path.exists(os.path.join(work, "made.txt")))
            terminal.type("\x1a")
            terminal.see("Ctrl-Z gives the shell back", "Stopped|sh>")
            terminal.type("echo shell-$((40+2))\n")
            terminal.see("and it works", "shell-42")
            terminal.type("fg\n")
            time.sleep(1)
            terminal.type("once more")
            terminal.see("fg brings the session back", "oncemore")
            terminal.type("\r")
            terminal.see("and it goes on", "Yourwords:oncemore")
            for _ in range(2):
                os.write(terminal.fd, b"\x03")
                time.sleep(0.4)
            terminal.see("Ctrl-C twice ends it", "sh>")
            terminal.type("echo raw=$(stty -a | grep -c -- -icanon)\n")
            terminal.see("the terminal is as it was", "raw=0")
        finally:
            terminal.close()
        check(
            "nothing of ours is left behind",
            not glob.glob(os.path.join(work, "ccfix*")),
            os.listdir(work),
        )


def run_and_signals():
    with account() as home, Scripted(lambda request: time.sleep(60) or []) as upstream:
        for number in (signal.SIGTERM, signal.SIGHUP):
            child = subprocess.Popen(
                [PYTHON, CCFIX, "run", "-b", upstream.url, "-m", "m", "--", "-p", "hello"],
                cwd=home,
                env=environment(home),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            seen = len(upstream.requests)
            wait_for(lambda: len(upstream.requests) > seen, 30, "the request")
            child.send_signal(number)
            child.communicate(timeout=30)
            check(
                "%s ends the session, with exit code %d" % (number.name, 128 + number),
                child.returncode == 128 + number,
                child.returncode,
            )
            left = subprocess.run(
                ["ps", "-o", "pid,args", "-s", str(child.pid)],
                stdout=subprocess.PIPE,
                universal_newlines=True,
            ).stdout
            check("%s leaves no process" % number.name, len(left.splitlines()) <= 1, left)


# check, before real servers and proxies


def check_a_real_server():
    process = subprocess.Popen(
        [
            sys.executable,
            os.path.join(SHARED, "tools", "start_upstream.py"),
            "--model",
            "smollm2-135m",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        universal_newlines=True,
    )
    try:
        url = process.stdout.readline().strip()
        with account() as home:
            run = command(home, "check", "-b", url, "-m", "smollm2-135m", limit=600)
            for name in (
                "reachable",
                "key accepted",
                "model exists",
                "plain reply",
                "stream",
                "usage in stream",
                "cached tokens",
                "speed",
            ):
                has_row("llama.cpp: " + name, run, name, "ok")
            has_row(
                "llama.cpp: its small window is named",
                run,
                "long prompt",
                "FAIL",
                "8192 tokens",
                "llama.cpp: -c",
            )
            check("llama.cpp: so Claude Code cannot work with it", run.code == 1, run.out)
    finally:
        stop(process)
        process.stdout.close()


def check_an_able_provider():
    with account() as home, Scripted(able) as upstream:
        run = command(home, "check", "-b", upstream.url, "-m", "scripted")
        bad = {name: seen for name, seen in checklist(run).items() if seen[0] not in ("ok", "--")}
        check("an able provider passes in every row", run.code == 0 and not bad, run.out)
        with ccfix(upstream.url, env={"ANTHROPIC_API_KEY": "proxy-key"}) as url:
            run = command(home, "check", "--base-url", url, ANTHROPIC_AUTH_TOKEN="proxy-key")
            check("and so does ccfix before it", run.code == 0, run.out)
            has_row("its event order", run, "event order", "ok")
            has_row(
                "a wrong proxy key is named",
                command(home, "check", "--base-url", url, "-k", "wrong"),
                "key accepted",
                "FAIL",
                "proxy key",
            )


@contextlib.contextmanager
def over_tls(script, names):
    """A scripted provider behind a certificate that nobody trusts -> (base URL, the certificate)."""
    with tempfile.TemporaryDirectory() as folder:
        cert, key, config = (
            os.path.join(folder, name) for name in ("cert.pem", "key.pem", "openssl.cnf")
        )
        with open(config, "w") as f:
            f.write(
                "[req]\ndistinguished_name=dn\n[dn]\n[v3]\nsubjectAltName=%s\nbasicConstraints=critical,CA:true\n"
                % names
            )
        subprocess.check_call(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "3",
                "-subj",
                "/CN=ccfix test",
                "-config",
                config,
                "-extensions",
                "v3",
                "-keyout",
                key,
                "-out",
                cert,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        upstream = Scripted(script)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        server = upstream._server
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # a client that refuses the certificate
        with upstream:
            yield re.sub("^http:", "https:", upstream.url), cert


def check_over_tls():
    with account() as home, over_tls(able, "IP:127.0.0.1") as (base, cert):
        target = ("-b", base, "-m", "scripted")
        has_row(
            "an untrusted certificate is named, with its fix",
            command(home, "check", *target),
            "reachable",
            "FAIL",
            "not trusted",
            "--ca-bundle",
            "SSL_CERT_FILE",
            "NODE_EXTRA_CA_CERTS",
        )
        for name, more, env in (
            ("--ca-bundle", ("--ca-bundle", cert), {}),
            ("SSL_CERT_FILE", (), {"SSL_CERT_FILE": cert}),
        ):
            run = command(home, "check", *target, *more, **env)
            has_row("%s mends it" % name, run, "reachable", "ok", "TLS verified")
            check("%s: and all works" % name, run.code == 0, run.out)
        has_row(
            "--insecure is loud",
            command(home, "check", *target, "--insecure"),
            "reachable",
            "ok",
            "TLS NOT verified",
        )


@contextlib.contextmanager
def tinyproxy(folder, password=""):
    """A forward proxy on loopback -> (port, its log)."""
    port, path, log = (
        free_port(),
        os.path.join(folder, "tinyproxy.conf"),
        os.path.join(folder, "tinyproxy.log"),
    )
    with open(path, "w") as f:
        f.write(
            "Port %d\nListen 127.0.0.1\nTimeout 60\nMaxClients 50\nLogFile \"%s\"\nLogLevel Connect\nAllow 127.0.0.1\n%s"
            % (port, log, "BasicAuth user %s\n" % password if password else "")
        )
    process = subprocess.Popen(
        ["tinyproxy", "-d", "-c", path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: get("http://127.0.0.1:%d/" % port).status, 10, "tinyproxy")
        yield port, log
    finally:
        stop(process)


def check_through_a_proxy():
    """The provider is called 127.1, which resolves to loopback, but is no name that goes past a proxy."""
    if not shutil.which("tinyproxy"):
        return skip("a real forward proxy", "tinyproxy is not installed")
    with account() as home, Scripted(able) as upstream, over_tls(able, "DNS:127.1") as (
        secure,
        cert,
    ):
        options = ("-m", "scripted", "-k", "k", "--ca-bundle", cert)
        bases = [
            (base.partition(":")[0], base.replace("127.0.0.1", "127.1"))
            for base in (upstream.url, secure)
        ]
        with tinyproxy(home) as (port, log):
            env = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:%d" % port)
            for name, base in bases:
                run = command(home, "check", "-b", base, *options, **env)
                has_row(
                    "%s through a proxy" % name,
                    run,
                    "reachable",
                    "ok",
                    "through the proxy 127.0.0.1:%d" % port,
                )
                check("%s: and all works" % name, run.code == 0, run.out)
            seen = text_of(log)
            check(
                "the proxy saw both",
                "CONNECT 127.1:" in seen and "http://127.1:" in seen,
                seen[-2000:],
            )
        with tinyproxy(home, "s3cret") as (port, log):
            for name, base in bases:
                env = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:%d" % port)
                has_row(
                    "%s: a proxy that wants a password is named" % name,
                    command(home, "check", "-b", base, *options, **env),
                    "reachable",
                    "FAIL",
                    "407",
                    "user:password@",
                )
                env = {key: value.replace("//", "//user:s3cret@") for key, value in env.items()}
                run = command(home, "check", "-b", base, *options, **env)
                check(
                    "%s: with the password all works" % name,
                    run.code == 0 and "s3cret" not in run.out,
                    run.out,
                )
        gone = {"HTTP_PROXY": "http://127.0.0.1:%d" % free_port()}
        has_row(
            "a proxy that is not there is named",
            command(home, "check", "-b", bases[0][1], *options, **gone),
            "reachable",
            "FAIL",
            "the proxy 127.0.0.1:",
            "fix: check HTTPS_PROXY and HTTP_PROXY",
        )
        check(
            "NO_PROXY goes past it",
            command(home, "check", "-b", bases[0][1], *options, NO_PROXY="127.1", **gone).code == 0,
        )


# The web search of the real client


class SearxNG(http.server.BaseHTTPRequestHandler):
    """A search endpoint; asked: the paths it was asked for."""

    asked = []

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.asked.append(self.path)
        broken = "broken" in self.path
        data = (
            b"rate limited"
            if broken
            else json.dumps(
                {
                    "query": "q",
                    "results": [
                        {
                            "title": "Zebra facts",
                            "url": "https://zebra.example/facts",
                            "content": "Zebras have 44 teeth.",
                        },
                        {
                            "title": "More zebras",
                            "url": "https://zebra.example/more",
                            "content": "They stand upright.",
                        },
                    ],
                }
            ).encode()
        )
        self.send_response(429 if broken else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def web_search():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SearxNG)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    base = "http://127.0.0.1:%d/search" % server.server_address[1]
    script = rounds([call("WebSearch", query="zebra teeth")], [say("44.")])
    for name, env, words in (
        (
            "real results",
            {"SEARCH_URL": base + "?language=en"},
            ("https://zebra.example/facts", "44 teeth"),
        ),
        ("a broken search", {"SEARCH_URL": base + "/broken"}, ("failed",)),
        ("no search configured", {}, ("not configured",)),
    ):
        with Scripted(script) as upstream, ccfix(upstream.url, env=env) as url:
            run = claude(url, "-p", "How many teeth has a zebra?", "--allowedTools", "WebSearch")
            results = json.dumps([r.results for r in upstream.requests])
            check(
                "web search: %s" % name,
                run.code == 0 and "44." in run.out and all(word in results for word in words),
                results + run.out + run.err,
            )
    check(
        "the query arrived",
        any(
            "q=zebra+teeth" in path and "format=json" in path and "language=en" in path
            for path in SearxNG.asked
        ),
        SearxNG.asked,
    )
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    run_table(
        [
            help_and_errors,
            each_command,
            opened,
            local_discovery,
            run_in_pipes,
            run_beside_another_setup,
            run_in_a_terminal,
            run_and_signals,
            check_an_able_provider,
            check_over_tls,
            check_through_a_proxy,
            check_a_real_server,
            web_search,
        ]
    )
