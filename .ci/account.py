"""Commands on a bare account: the poorest locale, a terminal with its keys, servers found, real
servers.

python3 .ci/account.py [scenario ...]      # all, or those named (with -, as in the output)
"""

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import tempfile
import time

import harness
import tui
from harness import CCFIX, PYTHON, ccfix, check, free_port, get, llama, run_table, skip, stop
from harness import wait_for
from upstream import Upstream, call, fail, rounds, say, usage, wait

CLIENT = os.path.dirname(tui.binary())
COMMANDS = ("serve", "run", "check", "init", "install", "uninstall", "open")
NOBODY = "http://127.0.0.1:1"
OWN_NAME = socket.gethostname()


# Helpers


@contextlib.contextmanager
def account():
    """An empty home; yields its path. The current folder of commands is work, in it."""
    with tempfile.TemporaryDirectory(prefix="account-") as home:
        home = os.path.realpath(home)
        os.mkdir(os.path.join(home, "work"))
        yield home


def environment(home, **more):
    path = os.pathsep.join([CLIENT, os.path.dirname(PYTHON), "/usr/bin", "/bin"])
    return dict({"PATH": path, "HOME": home, "TMPDIR": os.path.join(home, "work")}, **more)


def command(home, *argv, python=PYTHON, **env):
    """Run ccfix.py as a new user would -> Run. given, limit: as harness.run says."""
    options = {name: env.pop(name) for name in ("given", "limit") if name in env}
    env, work = environment(home, **env), os.path.join(home, "work")
    return harness.run([python, CCFIX] + list(argv), cwd=work, env=env, **options)


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


def all_works(name, run, *secrets):
    check(name, run.code == 0 and not any(secret in run.out for secret in secrets), run.out)


def answered(name, run, text):
    """Check that the client printed this, and nothing else."""
    return check(name, (run.code, run.out.strip()) == (0, text), run)


def nothing_left(home, name="nothing of ours is left behind"):
    left = os.listdir(os.path.join(home, "work"))
    check(name, not [name for name in left if name.startswith("ccfix")], left)


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
        calls = [call("get_weather", place=place) for place in ("Paris", "Rome")]
        return calls + [usage(100, 20, 64)]
    words = re.findall("ZEBRA-42", json.dumps(last))[:1]
    said = " ".join(["The picture is red. 1 2 3"] + words)
    return [say(said), usage(len(request.raw) // 4, 12, 64)]


def text_of(*path):
    with open(os.path.join(*path), encoding="utf-8") as file:
        return file.read()


def write(content, *path):
    path = os.path.join(*path)
    with open(path, "w", encoding="utf-8") as file:
        file.write(content if isinstance(content, str) else json.dumps(content))
    return path


# The commands without a client

EXIT_CODES = (
    (("chekc",), 2),
    (("--nosuch",), 2),
    (("check",), 2),
    (("init",), 2),
    (("open", "-p", str(free_port())), 1),
    (("uninstall",), 0),
    (("--version",), 0),
)


def help_and_errors():
    for name, python, env in pythons():
        with account() as home:
            for word in ("",) + COMMANDS:
                argv = [word] * bool(word) + ["--help"]
                run = command(home, *argv, python=python, COLUMNS="80", **env)
                wide = [line for line in run.out.splitlines() if len(line) > 80]
                good = run.code == 0 and run.out.isascii() and not wide and not run.err
                check("help of %s%s" % (word or "ccfix", name), good, run.out + run.err)
            run = command(home, python=python, **env)
            said = all(word in run.err for word in ("init", "--demo", "Ollama"))
            good = run.code == 2 and not run.out and said
            check("nothing configured: the three ways to go on, exit code 2" + name, good, run)
            for argv, code in EXIT_CODES:
                run = command(home, *argv, python=python, **env)
                good = run.code == code and "Traceback" not in run.err
                check("exit code %d of `%s`%s" % (code, argv[0], name), good, run)
            left = os.listdir(home) + os.listdir(os.path.join(home, "work"))
            check("nothing was written" + name, left == ["work"], left)


def each_command():
    for name, python, env in pythons():
        with account() as home, Upstream(rounds([say("SERVED")])) as upstream:
            env = dict(env, python=python)
            told = json.loads(command(home, "check", "--demo", "--json", **env).out)
            good = told["ok"] is True and len(told["checks"]) == 15
            check("check --demo --json" + name, good, told)
            target = ("-b", upstream.url, "-k", "sk-very-secret", "-m", "my-model")
            run = command(home, "init", *target, **env)
            served = json.loads(run.out)["env"]["ANTHROPIC_BASE_URL"] if run.out else run
            check("init" + name, run.code == 0 and served == "http://127.0.0.1:8080", run)
            mode = stat.S_IMODE(os.stat(os.path.join(home, "work", ".env")).st_mode)
            check("its .env is private" + name, mode == 0o600, mode)
            answered("run takes it" + name, command(home, "run", "--", "-p", "hi", **env), "SERVED")
            key = upstream.requests[-1].headers["authorization"]
            check("and its key" + name, key == "Bearer sk-very-secret", key)
            installation(name, home, **env)


def installation(name, home, python, **env):
    """install, what it installed, and uninstall."""
    run = command(home, "install", python=python, **env)
    folder = os.path.join(home, ".local", "bin")
    good = run.code == 0 and {"ccf", "ccfix"} <= set(os.listdir(folder)) and "PATH" in run.err
    check("install" + name, good, run)
    path = os.pathsep.join([folder, os.path.dirname(python), "/usr/bin", "/bin"])
    for argv, code, said in (
        (["ccfix", "--version"], 0, "ccfix "),
        (["ccf", "check", "--demo"], 0, "can work"),
        (["ccf"], 1, "no ccfix is running"),
    ):
        # the command is found on the PATH of the account, not on ours
        found = [os.path.join(folder, argv[0])] + argv[1:]
        run = harness.run(found, env=environment(home, **dict(env, PATH=path)), cwd=home)
        good = run.code == code and said in run.out + run.err
        check("installed: %s%s" % (" ".join(argv), name), good, run)
    run = command(home, "uninstall", python=python, **env)
    left = [path for path in glob.glob(home + "/.local/**", recursive=True) if os.path.isfile(path)]
    check("uninstall" + name, run.code == 0 and not left, (run, left))


def opened():
    with account() as home, ccfix(None, "--demo") as url:
        seen = os.path.join(home, "seen")
        browser = write('#!/bin/sh\necho "$1" > %s\n' % seen, home, "browser")
        os.chmod(browser, 0o755)
        run = command(home, "open", "-p", url.rsplit(":", 1)[1], BROWSER=browser + " %s")
        wait_for(lambda: os.path.exists(seen) and text_of(seen), 20, "the browser")
        good = run.code == 0 and run.out == text_of(seen) == url + "/\n"
        check("open opens the status page", good, run)


def local_discovery():
    """A scripted server on LM Studio's port is found."""
    script, models = rounds([say("FROM LM STUDIO")]), ("text-embedding-x", "qwen")
    try:
        upstream = Upstream(script, 1234, models)
    except OSError:
        return skip("a local server is found", "port 1234 is taken")
    with upstream, account() as home:
        run = command(home, "run", "--", "-p", "hello")
        answered("with nothing configured, a local server is used", run, "FROM LM STUDIO")
        words = "at http://127.0.0.1:1234/v1 with qwen, text-embedding-x; using qwen"
        check("and said so, with its model", words in run.err, run.err)
        run, wanted = command(home, "init"), "TARGET_API_BASE=http://127.0.0.1:1234/v1\n"
        check("init takes it", run.code == 0 and wanted in text_of(home, "work", ".env"), run)


# run, with the real client


def run_in_pipes():
    with account() as home, Upstream(rounds([say("PONG"), usage(1000, 2)])) as upstream:

        def client(*argv, **env):
            target = ("-b", upstream.url, "-k", "sk-very-secret", "-m", "my-model")
            return command(home, "run", *target, "--", *argv, **env)

        run = client("-p", "--output-format", "json", given="piped words")
        good = run.code == 0 and json.loads(run.out)["result"] == "PONG"
        check("run in a pipe", good and "piped words" in upstream.requests[-1].raw, run)
        run = client("-p", "hello", "--model", "haiku", TARGET_MODEL_HAIKU="small-model")
        asked = upstream.requests[-1].body["model"]
        check("a family goes to its own model", run.code == 0 and asked == "small-model", run)
        run = client("-p", "hi", "--output-format", "json", MAX_CONTEXT="70000")
        told = json.loads(run.out)["modelUsage"]
        window = told["my-model"]["contextWindow"]
        check("the client knows the model's window", window == 70000, told)
        check("and assumes none", "assumes" not in run.err, run.err)
        check("exit code of the client", client("--no-such-option").code == 1)
        run = client("mcp", "list")
        check("other commands of the client", "No MCP servers" in run.out, run)
        upstream.script = lambda request: fail(402, "Insufficient Balance")
        run = client("-p", "hello")
        good = run.code == 1 and "Insufficient Balance" in run.out
        check("a provider's error arrives", good, run)
        nothing_left(home)


def run_beside_another_setup():
    with account() as home, Upstream(rounds([say("PONG"), usage(1000, 2)])) as upstream:
        elsewhere = {"ANTHROPIC_BASE_URL": NOBODY, "ANTHROPIC_AUTH_TOKEN": "elsewhere"}
        elsewhere.update({"ANTHROPIC_MODEL": "other", "CLAUDE_CODE_USE_BEDROCK": "1"})
        os.mkdir(os.path.join(home, ".claude"))
        settings = {"env": elsewhere, "apiKeyHelper": "echo helper"}
        path = write(settings, home, ".claude", "settings.json")
        before = text_of(path)
        env = {"ANTHROPIC_API_KEY": "sk-real", "CLAUDE_CODE_USE_VERTEX": "1"}
        env.update({"HTTP_PROXY": NOBODY, "HTTPS_PROXY": NOBODY})
        target = ("-b", upstream.url, "-k", "sk", "-m", "my-model")
        run = command(home, "run", *target, "--", "-p", "hello", **env)
        answered("settings, variables and a proxy of another setup do not matter", run, "PONG")
        check("the user's file is as it was", text_of(path) == before)
        nothing_left(home, "the file with the key is gone again")


def run_in_a_terminal():
    with account() as home:
        work = tui.prepare(home)
        env = environment(home, TERM="xterm-256color", PS1="sh> ", LANG="C.UTF-8")
        with tui.Terminal(["/bin/bash", "--norc", "-i"], env, work) as terminal:
            use(terminal, work)
        nothing_left(home)


def use(terminal, work):
    terminal.type("%s %s run --demo; echo code=$?\n" % (PYTHON, CCFIX))
    started = "the session starts; auto mode is off, and why is said"
    terminal.see(started, "autopermissionmodeisoff", "manualmode")
    time.sleep(1)
    terminal.type("run touch made.txt")
    terminal.see("typing reaches it", "made.txt")
    terminal.type("\r")
    terminal.see("a tool asks for permission", "Doyouwanttoproceed")
    check("no dialog about auto mode", "Automodecan" not in terminal.text, terminal.text[-2000:])
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
        terminal.press(tui.CTRL_C)
        time.sleep(0.4)
    terminal.see("Ctrl-C twice ends it", "sh>")
    terminal.type("echo raw=$(stty -a | grep -c -- -icanon)\n")
    terminal.see("the terminal is as it was", "raw=0")


def leave(terminal):
    """Ctrl-C twice -> the exit code."""
    for _ in range(2):
        terminal.press(tui.CTRL_C)
        time.sleep(0.4)
    return terminal.wait()


def settings_of(home):
    return json.loads(text_of(home, ".claude", "settings.json"))


def run_and_the_users_model():
    """A pick of /model under `run`, and how the session goes on."""
    for model, shown in (({"model": "sonnet"}, "Sonnet"), ({}, "Opus")):
        with account() as home:
            work, started = tui.prepare(home), [PYTHON, CCFIX, "run", "--demo"]
            env = environment(home, TERM="xterm-256color", LANG="C.UTF-8")
            before = dict(model, permissions={"deny": ["WebFetch"]})
            os.mkdir(os.path.join(home, ".claude"))
            write(before, home, ".claude", "settings.json")
            with tui.Terminal(started, env, work) as terminal:
                session = pick_a_model(terminal, home, model.get("model", "default"))
            found = settings_of(home)
            kept = {name: found[name] for name in ("permissions", "model") if name in found}
            check("settings.json names what it named before", kept == before, found)
            with tui.client(NOBODY, home, model=None) as terminal:
                good = terminal.on_screen(shown)
                check("plain claude starts with %s" % shown, good, terminal.screen())
            with tui.Terminal(started + ["--", "--resume", session], env, work) as terminal:
                terminal.see("the session goes on as told", "Yourwords:helloyou")
            nothing_left(home)


def pick_a_model(terminal, home, model):
    """Talk, pick Fable in /model, and leave -> the session's id."""
    tui.ready(terminal, 60)
    terminal.ask("hello you")
    terminal.see("the session answers", "Yourwords:helloyou")
    terminal.ask("/model")
    terminal.see("the menu of models", "Selectmodel")
    time.sleep(1)
    terminal.type("3")
    terminal.see("one is picked, and saved", "savedasyourdefault")
    picked = settings_of(home).get("model")
    check("settings.json holds it meanwhile", picked == "fable", picked)
    check("the session ends well", leave(terminal) == 0)
    ours = r"resume:python3ccfix\.pyrun----resume([0-9a-f-]{36})"
    terminal.see("that the model is put back is said", "settings.json:modelis%sagain" % model)
    terminal.see("the last line says how to resume", ours)
    told = re.findall("claude--resume([0-9a-f-]{36})", terminal.text)
    found = re.findall(ours, terminal.text)
    check("with the id that the client tells", told == found and len(found) == 1, terminal.text)
    return found[0]


BROKEN = (
    ("gone.json", None),
    ("broken.json", '{"permissions":{"deny":["Bash"]'),
    ("list.json", '[{"permissions":{"deny":["Bash"]}}]'),
)


def run_and_the_users_settings():
    with account() as home:
        work = os.path.join(home, "work")

        def client(*argv):
            words = ("-p", "--dangerously-skip-permissions", "run touch made.txt") + argv
            return command(home, "run", "--demo", "--", *words, IS_SANDBOX="1")

        for name, text in BROKEN:
            write(text, work, name) if text else None
            for given in (name, os.path.join(work, name)):
                run = client("--settings", given)
                good = run.code == 1 and not run.out and given in run.err
                check("--settings %s is told, exit code 1" % given, good, run)
        run = client("--settings", "/dev/null")
        check("and so is a device", run.code == 1 and "/dev/null" in run.err, run)
        run = client("--settings")
        check("a missing value too", run.code == 1 and "--settings" in run.err, run)
        made = os.path.join(work, "made.txt")
        check("nothing ran", not os.path.exists(made))
        deny = {"permissions": {"deny": ["Bash"]}}
        write(deny, work, "deny.json")
        for given in ("deny.json", json.dumps(deny)):
            run = client("--settings=" + given)
            check("a rule that denies holds", run.code == 0 and not os.path.exists(made), run)
        write({"permissions": {"deny": 5}}, work, "schema.json")
        run = client("--settings", "schema.json")
        good = "permissions.deny" in run.err
        check("what is wrong in an object the client tells itself", good, run)
        run = client("--settings", "")
        check("and none is none", run.code == 0 and os.path.exists(made), run)


def run_and_signals():
    with account() as home, Upstream(lambda request: [wait(60)]) as upstream:
        for number in (signal.SIGTERM, signal.SIGHUP):
            seen = len(upstream.requests)
            child = subprocess.Popen(
                [PYTHON, CCFIX, "run", "-b", upstream.url, "-m", "m", "--", "-p", "hello"],
                cwd=home,
                env=environment(home),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            wait_for(lambda: len(upstream.requests) > seen, 60, "the request")
            child.send_signal(number)
            code = child.wait(30)
            name = "%s ends the session, with exit code %d" % (number.name, 128 + number)
            check(name, code == 128 + number, code)
            left = harness.run(["ps", "-o", "pid,args", "-s", str(child.pid)]).out
            check("%s leaves no process" % number.name, len(left.splitlines()) <= 1, left)


# check, before real servers and proxies

REAL_ROWS = "reachable, key accepted, model exists, plain reply, stream, usage in stream, "
REAL_ROWS += "cached tokens, speed"


def check_a_real_server():
    with llama() as url, account() as home:
        run = command(home, "check", "-b", url, "-m", "smollm2-135m", limit=600)
        for name in REAL_ROWS.split(", "):
            has_row("llama.cpp: " + name, run, name, "ok")
        words = ("8192 tokens", "llama.cpp: -c")
        has_row("llama.cpp: its small window is named", run, "long prompt", "FAIL", *words)
        check("llama.cpp: so Claude Code cannot work with it", run.code == 1, run.out)


def check_an_able_provider():
    with account() as home, Upstream(able) as upstream:
        run = command(home, "check", "-b", upstream.url, "-m", "scripted")
        bad = {name: seen for name, seen in checklist(run).items() if seen[0] not in ("ok", "--")}
        check("an able provider passes in every row", run.code == 0 and not bad, run.out)
        with ccfix(upstream.url, env={"ANTHROPIC_API_KEY": "proxy-key"}) as url:
            ours = ("check", "--base-url", url)
            run = command(home, *ours, ANTHROPIC_AUTH_TOKEN="proxy-key")
            all_works("and so does ccfix before it", run)
            has_row("its event order", run, "event order", "ok")
            run = command(home, *ours, "-k", "wrong")
            has_row("a wrong proxy key is named", run, "key accepted", "FAIL", "proxy key")


CERTIFICATE = "[req]\ndistinguished_name=dn\n[dn]\n[v3]\nsubjectAltName=%s\n"
CERTIFICATE += "basicConstraints=critical,CA:true\n"


@contextlib.contextmanager
def over_tls(script, names, host="127.0.0.1"):
    """A scripted provider behind a certificate that nobody trusts -> (base URL, certificate)."""
    with tempfile.TemporaryDirectory() as folder:
        config = write(CERTIFICATE % names, folder, "openssl.cnf")
        cert, key = (os.path.join(folder, name) for name in ("cert.pem", "key.pem"))
        request = "openssl req -x509 -newkey rsa:2048 -nodes -days 3 -subj /CN=test -extensions v3"
        files = ["-config", config, "-keyout", key, "-out", cert]
        subprocess.check_call(request.split() + files, stderr=subprocess.DEVNULL)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        with Upstream(script, tls=context, host=host) as upstream:
            yield upstream.url, cert


def check_over_tls():
    with account() as home, over_tls(able, "IP:127.0.0.1") as (base, cert):

        def checked(*argv, **env):
            return command(home, "check", "-b", base, "-m", "scripted", *argv, **env)

        name = "an untrusted certificate is named, with its fix"
        words = ("not trusted", "--ca-bundle", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")
        has_row(name, checked(), "reachable", "FAIL", *words)
        for name, run in (
            ("--ca-bundle", checked("--ca-bundle", cert)),
            ("SSL_CERT_FILE", checked(SSL_CERT_FILE=cert)),
        ):
            has_row("%s fixes it" % name, run, "reachable", "ok", "TLS verified")
            all_works("%s: and all works" % name, run)
        run = checked("--insecure")
        has_row("--insecure is loud", run, "reachable", "ok", "TLS NOT verified")


PROXY = 'Port %d\nListen 127.0.0.1\nTimeout 60\nMaxClients 50\nLogFile "%s"\nLogLevel Connect\n'
PROXY += "Allow 127.0.0.1\n"


@contextlib.contextmanager
def tinyproxy(folder, password=""):
    """A forward proxy on loopback -> (its address, its log)."""
    port, log = free_port(), os.path.join(folder, "tinyproxy.log")
    asked = "BasicAuth user %s\n" % password if password else ""
    path = write(PROXY % (port, log) + asked, folder, "tinyproxy.conf")
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen(["tinyproxy", "-d", "-c", path], **quiet)
    try:
        wait_for(lambda: get("http://127.0.0.1:%d/" % port).status, 20, "tinyproxy")
        yield "127.0.0.1:%d" % port, log
    finally:
        stop(process)


def proxies(address):
    return dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://" + address)


def check_through_a_proxy():
    """The provider goes by this machine's own name: with one of loopback, no proxy is asked."""
    if not shutil.which("tinyproxy"):
        return skip("a real forward proxy", "tinyproxy is not installed")
    with account() as home, Upstream(able, host=OWN_NAME) as upstream:
        with over_tls(able, "DNS:" + OWN_NAME, OWN_NAME) as (secure, cert):
            bases = upstream.url, secure

            def checked(base, **env):
                target = ("-b", base, "-m", "scripted", "-k", "k", "--ca-bundle", cert)
                return command(home, "check", *target, **env)

            through_proxies(home, bases, checked)
            gone = {"HTTP_PROXY": "http://127.0.0.1:%d" % free_port()}
            run, words = checked(bases[0], **gone), "fix: check HTTPS_PROXY and HTTP_PROXY"
            name, proxy = "a proxy that is not there is named", "the proxy 127.0.0.1:"
            has_row(name, run, "reachable", "FAIL", proxy, words)
            all_works("NO_PROXY goes past it", checked(bases[0], NO_PROXY=OWN_NAME, **gone))


def through_proxies(home, bases, checked):
    with tinyproxy(home) as (address, log):
        for base in bases:
            name, run = base.partition(":")[0], checked(base, **proxies(address))
            words = "through the proxy " + address
            has_row("%s through a proxy" % name, run, "reachable", "ok", words)
            all_works("%s: and all works" % name, run)
        seen = text_of(log)
        both = "CONNECT %s:" % OWN_NAME in seen and "http://%s:" % OWN_NAME in seen
        check("the proxy saw both", both, seen[-2000:])
    with tinyproxy(home, "s3cret") as (address, log):
        for base in bases:
            name, run = base.partition(":")[0], checked(base, **proxies(address))
            asks, words = "%s: a proxy that wants a password is named", ("407", "user:password@")
            has_row(asks % name, run, "reachable", "FAIL", *words)
            run = checked(base, **proxies("user:s3cret@" + address))
            all_works("%s: with the password all works" % name, run, "s3cret")


if __name__ == "__main__":
    run_table(
        help_and_errors,
        each_command,
        opened,
        local_discovery,
        run_in_pipes,
        run_beside_another_setup,
        run_in_a_terminal,
        run_and_the_users_model,
        run_and_the_users_settings,
        run_and_signals,
        check_an_able_provider,
        check_over_tls,
        check_through_a_proxy,
        check_a_real_server,
    )
