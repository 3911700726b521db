"""Auto permission mode in the real client's own screen, both ways: the client asks its own
classifier through ccfix, or ccfix has a model judge the calls.

python3 .ci/auto_mode.py [scenario ...]      # all, or those named (with -, as in the output)
"""

import contextlib
import json
import os
import tempfile

import tui
from harness import CCFIX, PYTHON, ccfix, check, run_table
from upstream import Upstream, call, fail, say, usage, wait

TASK = "Do the task."
DIALOG = "Auto mode can't check"
REASON = "zebras would be harmed"


def make(name):
    """A call that the client does not run unasked; it makes a file."""
    return call("Bash", command='python3 -c \'open("%s", "w")\'' % name, description=name)


def is_judge(request):
    return request.raw.count("Judge an agent's calls") == 1


def is_classifier(request):
    return "<transcript>" in request.raw


def model(names, judge, ask=is_judge):
    """A script: calls that make these files, then a word; judge(request): the other one's reply."""

    def reply(request):
        if ask(request):
            return judge(request)
        if request.results:
            return [say("ALL-DONE"), usage(1000, 5)]
        return [say("Here I go.")] + [make(name) for name in names] + [usage(1000, 20)]

    return reply


def verdicts(*dangerous):
    """The judge's reply: whether each call is dangerous."""
    rows = [
        {"call": number, "dangerous": value, "why": REASON}
        for number, value in enumerate(dangerous, 1)
    ]
    return lambda request: [say(json.dumps(rows)), usage(500, 20)]


@contextlib.contextmanager
def session(upstream, *argv, **env):
    """`ccfix run` before the upstream, its prompt on the screen; (terminal, folder to work in)."""
    with tempfile.TemporaryDirectory(prefix="auto-mode-") as home:
        work = tui.prepare(home)
        path = os.pathsep.join([os.path.dirname(tui.binary()), "/usr/bin", "/bin"])
        env = tui.environment(home, **dict({"PATH": path}, **env))
        target = ["-b", upstream.url, "-k", "sk-provider", "-m", "my-own-model"]
        command = [PYTHON, CCFIX, "run"] + target + list(argv)
        with tui.Terminal(command, env, work) as terminal:
            if not tui.ready(terminal, 60):
                raise RuntimeError("no prompt:\n" + terminal.screen()[-3000:])
            yield terminal, work


def task(name, script, made, told, *argv, **env):
    """A session: these files are made, each word is on the screen, and no dialog -> requests."""
    with Upstream(script) as upstream, session(upstream, *argv, **env) as (terminal, work):
        terminal.ask(TASK)
        ended = terminal.wait_for("ALL-DONE", 90)
        found = sorted(file for file in os.listdir(work) if file.endswith(".txt"))
        check(name, ended and found == made, (found, terminal.screen()[-3000:]))
        check(
            "%s: it is on the screen" % name, terminal.on_screen(*told), terminal.screen()[-3000:]
        )
        check("%s: no dialog" % name, not terminal.on_screen(DIALOG), terminal.screen()[-3000:])
        return upstream.requests


def results(requests):
    """All that the tools answered, as text."""
    return json.dumps(requests[-1].results)


def by_a_model():
    flags = ["--auto-mode", "judge"]
    requests = task(
        "not flagged: it runs", model(["a.txt"], verdicts(False)), ["a.txt"], [], *flags
    )
    asked = [request for request in requests if is_judge(request)]
    names = [request.body["model"] for request in asked]
    check("the model is asked once", names == ["judge"], names)
    words = [request.messages[-1]["content"] for request in asked]
    check("about the call, and what the user said", TASK in words[0] and "a.txt" in words[0], words)
    left = [word for word in ("auto-mode-", "git_state", "safeguards") if word in asked[0].raw]
    check("and told nothing of home, folder and git", not left, left)
    check("nor is the provider", not any("safeguards" in r.raw for r in requests))

    blocked = ["Blocked by auto mode", REASON]
    requests = task("flagged: blocked", model(["a.txt"], verdicts(True)), [], blocked, *flags)
    check("and the model hears why", REASON in results(requests), results(requests))

    script = model(["a.txt", "b.txt", "c.txt"], verdicts(False, True, False))
    blocked = ["blocked by auto mode", REASON]
    requests = task("of three calls one is blocked", script, ["a.txt", "c.txt"], blocked, *flags)
    check("in one question", sum(map(is_judge, requests)) == 1, len(requests))


def by_no_clear_answer():
    rows = (
        ("nonsense", lambda request: [say("I think that this is fine, go on.")]),
        ("half an answer", lambda request: [say('[{"call": 1, "dangerous": false')]),
        ("an answer about another call", lambda request: verdicts(True, False)(request)),
        ("an error", lambda request: fail(400, "no such model")),
    )
    for name, judge in rows:
        told = ["Blocked by auto mode", "no verdict"]
        requests = task(name + ": blocked", model(["a.txt"], judge), [], told, AUTO_MODE="judge")
        check(name + ": asked once", sum(map(is_judge, requests)) == 1, len(requests))


def while_the_judge_thinks():
    """The text is there before the verdict, and Esc ends the question."""

    def judge(request):
        yield wait(6)
        yield from verdicts(False)(request)

    with Upstream(model(["a.txt"], judge)) as upstream:
        with session(upstream, "--auto-mode", "judge") as (terminal, work):
            terminal.ask(TASK)
            check("the text comes first", terminal.wait_for("Here I go.", 20), terminal.screen())
            check("then the verdict", not os.listdir(work) and terminal.wait_for("ALL-DONE", 30))
            check("then it runs", os.listdir(work) == ["a.txt"], terminal.screen())
    with Upstream(model(["a.txt"], judge)) as upstream:
        with session(upstream, "--auto-mode", "judge") as (terminal, work):
            terminal.ask(TASK)
            terminal.wait_for("Here I go.", 20)
            terminal.press(tui.ESCAPE)
            check("Esc while it thinks", terminal.wait_for("Interrupted", 10), terminal.screen())
            check("and nothing ran", not os.listdir(work), os.listdir(work))


def by_the_client():
    """CLAUDE_CODE_AUTO_MODE_SERVER=0, which `run` sets: its classifier asks the sonnet family, of
    a model that the client does not know for <block>, at most 2,112 tokens."""

    def answer(words):
        return model(["a.txt"], lambda request: [say(words), usage(36000, 8)], is_classifier)

    env = {"AUTO_MODE": "client", "TARGET_MODEL_SONNET": "checker"}
    name = "its own classifier: "
    requests = task(name + "passed", answer("<block>no</block>"), ["a.txt"], [], **env)
    asked = [request.body for request in requests if is_classifier(request)]
    check(name + "asked once", [b["model"] for b in asked] == ["checker"], asked[1:])
    sent = [(b.get("stop"), b.get("max_tokens")) for b in asked]
    check(name + "its fields arrive", sent == [(["</block>"], 2112)], sent)

    words = "<block>yes</block><reason>%s</reason>" % REASON
    told = ["Blocked by auto mode", REASON]
    requests = task(name + "blocked", answer(words), [], told, **env)
    check(name + "the model hears why", REASON in results(requests), results(requests))

    told = ["had no usable answer"]
    requests = task(name + "nonsense does not pass", answer("Looks fine to me."), [], told, **env)
    asked = sum(map(is_classifier, requests))
    check(name + "it gives up after some tries", 1 < asked <= 12, asked)


def off():
    """Nothing set: `run` switches auto mode off, and says how it can be had."""
    with Upstream(model(["a.txt"], verdicts(False))) as upstream:
        with session(upstream) as (terminal, work):
            check("off: it is said", terminal.shows("auto permission mode is off"), terminal.text)
            terminal.ask(TASK)
            asks = terminal.wait_for("Do you want to proceed", 30, still=True)
            check("off: the client asks its user", asks, terminal.screen()[-3000:])
            check("off: nobody is asked", not any(map(is_judge, upstream.requests)))


def a_plain_proxy():
    """ccfix that serves always, and the client on it as the user starts it."""
    for native in (False, True):
        script = model(["a.txt", "b.txt"], verdicts(True, False))
        more = {"TARGET_FORMAT": "anthropic"} if native else {}
        name = "a provider that speaks Anthropic: " * native
        with Upstream(script) as upstream, tempfile.TemporaryDirectory() as home:
            with ccfix(upstream.url, env=dict(more, AUTO_MODE="judge")) as url, tui.client(
                url, home
            ) as it:
                it.ask(TASK)
                check(name + "serve: it ends", it.wait_for("ALL-DONE", 60), it.screen()[-3000:])
                made = os.listdir(os.path.join(home, "work"))
                check(name + "serve: one of two ran", made == ["b.txt"], made)
                check(name + "serve: the reason is shown", it.on_screen(REASON), it.screen())


run_table(by_a_model, by_no_clear_answer, while_the_judge_thinks, by_the_client, off, a_plain_proxy)
