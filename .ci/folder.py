"""A cloned repository with a hostile .env: whatever the user starts in it, nothing arrives at a
sink that its lines name, nothing is written outside, and no door opens.

python3 .ci/folder.py [scenario ...]      # all, or those named (with -, as in the output)

Each hostile file is tried with every kind of user, for every command; the user's own provider is a
scripted one, and the client a script that asks for every family. Standard library only.
"""

import contextlib
import os
import shutil
import socketserver
import subprocess
import tempfile
import threading

import harness
from harness import CCFIX, PYTHON, check, free_port, get, post, run_table, stop, wait_for
from upstream import Upstream, say

KEY = "sk-users-own-key"
SUFFIXES = ("", "_OPUS", "_SONNET", "_HAIKU", "_FALLBACK", "_IMAGE")
# The client: asks for each family, and once with an image; what it was told goes to a file.
CLIENT = r"""#!%s
import json, os, sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
for model in "claude-opus", "claude-sonnet", "claude-haiku", os.environ["ANTHROPIC_MODEL"]:
    for content in "hello", [image]:
        body = {"model": model, "max_tokens": 9, "messages": [{"role": "user", "content": content}]}
        head = {"content-type": "application/json", "anthropic-version": "2023-06-01",
                "authorization": "Bearer " + os.environ["ANTHROPIC_AUTH_TOKEN"]}
        url = os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages"
        try:
            opener.open(urllib.request.Request(url, json.dumps(body).encode(), head), timeout=20)
        except OSError as error:
            print(error, file=sys.stderr)
print("the client ran")
"""


class Sink(socketserver.ThreadingTCPServer):
    """Takes every connection, and keeps what arrives."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), None)
        self.arrived = []
        self.url = "http://127.0.0.1:%d/v1" % self.server_address[1]

    def finish_request(self, request, client_address):
        request.settimeout(1)
        self.arrived.append(b"(a connection)")
        with contextlib.suppress(OSError):
            self.arrived[-1] = request.recv(65536)


@contextlib.contextmanager
def sink():
    with Sink() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@contextlib.contextmanager
def repository(text):
    """A home with a cloned folder in it whose .env is `text` -> the folder."""
    with tempfile.TemporaryDirectory(prefix="folder-") as home:
        home = os.path.realpath(home)
        work, programs = os.path.join(home, "code", "clone"), os.path.join(home, "bin")
        for folder in (work, programs, os.path.join(home, ".cache")):
            os.makedirs(folder)
        for path, content in (
            (os.path.join(work, ".env"), text),
            (os.path.join(home, ".bashrc"), "# the user's\n"),
            (os.path.join(programs, "claude"), CLIENT % shutil.which(PYTHON)),
        ):
            with open(path, "w", encoding="utf-8") as file:
                file.write(content)
        os.chmod(os.path.join(programs, "claude"), 0o755)
        os.symlink(os.path.join(home, ".cache"), os.path.join(work, ".cache"))
        yield work


def home_of(work):
    return os.path.dirname(os.path.dirname(work))


def environment(work, more):
    home = home_of(work)
    path = os.pathsep.join([os.path.join(home, "bin"), "/usr/bin", "/bin"])
    return dict({"PATH": path, "HOME": home, "LC_ALL": "C"}, **more)


def files_outside(work):
    """{path: content} of the user's home, but for the folder that was cloned."""
    found = {}
    for folder, _, names in os.walk(home_of(work)):
        for name in names:
            path = os.path.join(folder, name)
            if not path.startswith(work) and not name.endswith(".pyc"):
                with open(path, "rb") as file:
                    found[path] = file.read()
    return found


def start(work, env, *argv):
    """Run a command to its end; serving is asked for /health, and ended -> (exit code, output)."""
    command = [PYTHON, CCFIX] + list(argv)
    if argv[0] != "serve":
        done = harness.run(command, 60, cwd=work, env=environment(work, env))
        return done.code, done.out + done.err
    port = free_port()
    process = subprocess.Popen(
        command + ["-p", str(port)],
        cwd=work,
        env=environment(work, env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def is_settled():
        return get("http://127.0.0.1:%d/health" % port).status == 200 or process.poll() is not None

    try:
        wait_for(is_settled, 20, "serving, or an end")
        if process.poll() is None:
            for model in ("claude-opus-4", "claude-sonnet-4", "claude-haiku-4", "x"):
                body = {"model": model, "max_tokens": 9}
                body["messages"] = [{"role": "user", "content": "hello"}]
                post("http://127.0.0.1:%d/v1/messages" % port, body)
    finally:
        code = stop(process)
    return code, process.stdout.read().decode("ascii", "replace")


COMMANDS = (("run",), ("check",), ("serve",), ("open",), ("run", "--demo"))


def nothing_arrives(name, lines, users, commands=COMMANDS):
    """Try the commands, as each of the users, where the .env has these lines."""
    with sink() as trap:
        text = "\n".join(lines).replace("SINK", trap.url) + "\n"
        for user, env in users.items():
            for argv in commands:
                with repository(text) as work:
                    before = files_outside(work)
                    code, output = start(work, env, *argv)
                    label = "%s, %s: %s" % (name, user, " ".join(argv))
                    check(label + ": nothing arrives", not trap.arrived, (trap.arrived, output))
                    same = files_outside(work) == before
                    check(label + ": nothing is written outside", same, output)
                    check(label + ": no traceback", "Traceback" not in output, output)
                    del trap.arrived[:]


def users(provider):
    """{what a user has in his environment: the environment}."""
    own = {"TARGET_API_BASE": provider.url, "TARGET_API_KEY": KEY, "TARGET_MODEL": "m"}
    headers = {"EXTRA_HEADERS": '{"Authorization": "Bearer %s"}' % KEY}
    return {
        "a key": {"TARGET_API_KEY": KEY},
        "a key in headers": headers,
        "a whole target": own,
        "families": dict(own, TARGET_API_KEY_OPUS=KEY, TARGET_MODEL_OPUS="o"),
    }


def bases_alone():
    """A base URL without a key: of the main target, of a family, of the stand-ins, of all."""
    with Upstream(lambda request: [say("hello")], most=None) as provider:
        for suffix in SUFFIXES:
            lines = ["TARGET_API_BASE%s=SINK" % suffix, "TARGET_MODEL%s=m" % suffix]
            nothing_arrives("base" + suffix, lines, users(provider), COMMANDS[:3])
        lines = ["TARGET_API_BASE%s=SINK" % suffix for suffix in SUFFIXES]
        nothing_arrives("all bases", lines + ["SEARCH_URL=SINK"], users(provider))


def doors_and_files():
    """Lines that open doors, and lines that write files, one of which a shell would run."""
    code = '"x\\ntouch ../../PWNED #"'
    lines = ["TARGET_MODEL=" + code, "LOG_FILE=../../.bashrc", "RECORD_DIR=../../records"]
    lines += ["CACHE_ENABLED=true", "LEDGER=true", "CACHE_DIR=../../cache", "INSECURE=true"]
    lines += ["ALLOWED_HOSTS=evil.example.com", "PROXY_HOST=0.0.0.0", "EXTRA_BODY={\"x\": 1}"]
    lines += ["EXTRA_HEADERS={\"x-y\": \"z\"}", "DISGUISE_API_BASE=SINK", "PRICES=../../.bashrc"]
    lines += ["CA_BUNDLE=SINK", "CLIENT_CERT=SINK", "SEARCH_URL=SINK", "TARGET_FORMAT=anthropic"]
    with Upstream(lambda request: [say("hello")], most=None) as provider:
        nothing_arrives("doors", lines, users(provider))
        lines = [line for line in lines if "CACHE_DIR" not in line]
        nothing_arrives("a linked cache", lines, users(provider))


def foreign_lines():
    """The .env of another program: it neither ends nor changes a session of the user's own."""
    lines = ["LOG_LEVEL=WARN", "PROFILE=dev", "CACHE_TTL=1h", "ANTHROPIC_API_KEY=sk-ant-theirs"]
    for more in ([], ["TARGET_MODEL_OPUS=theirs", "MAX_OUTPUT=lots"]):
        with Upstream(lambda request: [say("hello")]) as provider:
            with repository("\n".join(lines + more) + "\n") as work:
                code, output = start(work, users(provider)["a whole target"], "run")
            name = "with a target's name" if more else "another program's"
            check(name + ": the session runs", code == 0 and "the client ran" in output, output)
            models = {request.body.get("model") for request in provider.requests if request.body}
            check(name + ": on the user's model alone", models == {"m"}, models)


def whole_target():
    """Model, base and key together may be chosen: the folder's key goes there, the user's not."""
    with Upstream(lambda request: [say("hello")]) as provider:
        lines = ["TARGET_API_BASE=%s" % provider.url, "TARGET_API_KEY=sk-folder"]
        with repository("\n".join(lines + ["TARGET_MODEL=theirs"]) + "\n") as work:
            code, output = start(work, {"TARGET_API_KEY": KEY}, "run")
        check("a whole target is taken", code == 0 and "the client ran" in output, output)
        told = output.find("the target is theirs at " + provider.url)
        check("and told first", told >= 0, output)
        keys = {request.headers.get("authorization") for request in provider.requests}
        check("the folder's key alone arrives", keys == {"Bearer sk-folder"}, keys)


def the_old_way():
    """ccfix.py copied into the folder, with a .env beside it, is the user's own."""
    with Upstream(lambda request: [say("hello")]) as provider:
        lines = ["TARGET_API_BASE=%s" % provider.url, "TARGET_API_KEY=" + KEY, "TARGET_MODEL=m"]
        for mode, counts in ((0o600, True), (0o622, False)):
            with repository("\n".join(lines + ["LOG_FILE=own.log"]) + "\n") as work:
                copy = os.path.join(work, "ccfix.py")
                shutil.copy(CCFIX, copy)
                os.chmod(copy, 0o644)
                os.chmod(os.path.join(work, ".env"), mode)
                env = environment(work, {})
                done = harness.run([PYTHON, "ccfix.py", "run"], 60, cwd=work, env=env)
                written = os.path.exists(os.path.join(work, "own.log"))
            check("mode %o: the session runs" % mode, done.code == 0, done)
            check("mode %o: LOG_FILE counts: %s" % (mode, counts), written == counts, done)


if __name__ == "__main__":
    run_table(bases_alone, doors_and_files, foreign_lines, whole_target, the_old_way)
