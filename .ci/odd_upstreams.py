"""Upstreams that answer oddly, or break in odd places, before the real client: a table of replies.

python3 .ci/odd_upstreams.py [scenario ...]
"""

import json
import tempfile
import time

from harness import ccfix, check, claude, json_lines, run_table
from real_client import STREAM_JSON, answers, bash, extends, read, seen, session, write
from scripted_upstream import (
    Scripted,
    attempts,
    call,
    cut,
    delta,
    end,
    fail,
    finish,
    payload,
    rounds,
    say,
    think,
    wait,
)

STEP = {"command": "echo ran >> ran.txt", "description": "a step"}
DONE = [say("ALL-DONE")]
FAILURE = payload(
    error={
        "code": 500,
        "message": "The model produced output that does not match the expected format",
        "type": "server_error",
    }
)


def one_call(id="call_1", index=0, arguments=json.dumps(STEP), name="Bash"):
    return delta(
        tool_calls=[
            {
                "index": index,
                "id": id,
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
        ]
    )


def without(step, *fields):
    """The first tool call of a delta step, without some fields."""
    item = {k: v for k, v in step.value["tool_calls"][0].items() if k not in fields}
    return delta(tool_calls=[item])


def tool_calls():
    """Each first reply holds one Bash call, written oddly; the tool must run, and run once."""
    table = (
        ("finish reason `stop`", [bash(STEP["command"]), finish("stop")]),
        ("finish reason `function_call`", [bash(STEP["command"]), finish("function_call")]),
        ("no id", [without(one_call(), "id")]),
        ("an empty id", [one_call(id="")]),
        ("no index", [without(one_call(), "index")]),
        ("no type", [without(one_call(), "type")]),
        ("arguments as an object", [one_call(arguments=dict(STEP))]),
        (
            "the name comes again with each piece",
            [one_call(arguments=json.dumps(STEP)[:20]), one_call(arguments=json.dumps(STEP)[20:])],
        ),
        (
            "null for an optional argument",
            [call("Bash", timeout=None, run_in_background=None, **STEP)],
        ),
        (
            "a number and a truth value as text",
            [call("Bash", timeout="60000", run_in_background="false", **STEP)],
        ),
        (
            "empty text around it",
            [say(""), delta(content=""), bash(STEP["command"]), delta(content="")],
        ),
        ("text after it", [bash(STEP["command"]), say("I have called it.")]),
        (
            "a text in which it is tagged",
            [
                say(
                    "<tool_call>\n%s\n</tool_call>"
                    % json.dumps({"name": "Bash", "arguments": STEP})
                )
            ],
        ),
        ("an id with odd characters", [one_call(id="functions.Bash:0|x y")]),
    )
    for name, first in table:
        with tempfile.TemporaryDirectory() as work:
            run, requests = session(rounds(first, DONE), cwd=work)
            answers("a tool call with %s" % name, run, requests, "ALL-DONE", 2)
            check(
                "    ran once",
                read(work, "ran.txt") == "ran\n",
                lambda: read(work, "ran.txt") + seen(run, requests)(),
            )


def two_calls():
    """Two calls in one reply, written oddly: both run."""

    def head(index, id, text):
        return one_call(id, index, text)

    def more(index, text):
        return delta(tool_calls=[{"index": index, "function": {"arguments": text}}])

    one, two = (
        json.dumps({"command": "echo %s > %s.txt" % (w, w), "description": "a step"})
        for w in ("one", "two")
    )
    table = (
        (
            "interleaved",
            [head(0, "a", one[:9]), head(1, "b", two[:9]), more(0, one[9:]), more(1, two[9:])],
        ),
        ("with the same id", [head(0, "a", one), head(1, "a", two)]),
        ("with the same index", [head(0, "a", one), head(0, "b", two)]),
        ("with gaps in the index", [head(3, "a", one), head(7, "b", two)]),
        (
            "in one delta",
            [
                delta(
                    tool_calls=[
                        head(0, "a", one).value["tool_calls"][0],
                        head(1, "b", two).value["tool_calls"][0],
                    ]
                )
            ],
        ),
    )
    for name, first in table:
        with tempfile.TemporaryDirectory() as work:
            run, requests = session(rounds(first, DONE), cwd=work)
            answers("two calls %s" % name, run, requests, "ALL-DONE", 2)
            check(
                "    both ran",
                (read(work, "one.txt"), read(work, "two.txt")) == ("one\n", "two\n"),
                seen(run, requests),
            )


def broken_arguments():
    """Arguments that are no JSON: the model is told, its own words go back to it, and the session goes on."""
    run, requests = session(rounds([one_call(arguments='{"command": "echo ran >> r')], DONE))
    answers("arguments that are cut off", run, requests, "ALL-DONE", 2)
    check(
        "    the model is told",
        "error" in str(requests[-1].results).lower()
        or "invalid" in str(requests[-1].results).lower(),
        requests[-1].results,
    )
    back = [
        c["function"]["arguments"] for m in requests[-1].messages for c in m.get("tool_calls", [])
    ]
    check(
        "    what goes back is an object",
        back and all(isinstance(json.loads(a), dict) for a in back),
        back,
    )
    run, requests = session(rounds([call("NoSuchTool", x=1)], DONE))
    answers("a tool that does not exist", run, requests, "ALL-DONE", 2)


def texts():
    """Each reply is an answer, oddly written; the text and the thinking are what arrives."""
    table = (
        (
            "<think> in the text",
            [say("<think>\nHm, hm.\n</think>\n\nIt is 42.")],
            "It is 42.",
            "Hm, hm.",
        ),
        (
            "reasoning instead of reasoning_content",
            [delta(reasoning="Hm, hm.", content=None), delta(content="It is 42.", reasoning=None)],
            "It is 42.",
            "Hm, hm.",
        ),
        (
            "an emoji split over two deltas",
            [delta(content="It is \ud83d"), delta(content="\ude00.")],
            "It is \U0001f600.",
            "",
        ),
        (
            "content as parts",
            [delta(content=[{"type": "text", "text": "It is 42."}])],
            "It is 42.",
            "",
        ),
        ("finish reason `length` that is none", [say("It is 42."), finish("eos")], "It is 42.", ""),
        (
            "a usage that is null",
            [
                say("It is 42."),
                payload(id="x", object="chat.completion.chunk", choices=[], usage=None),
            ],
            "It is 42.",
            "",
        ),
    )
    for name, reply, text, thought in table:
        run, requests = session(rounds(reply), *STREAM_JSON)
        lines = json_lines(run.out)
        blocks = [
            b for line in lines if line["type"] == "assistant" for b in line["message"]["content"]
        ]
        got = "".join(b["thinking"] for b in blocks if b["type"] == "thinking").strip()
        check(
            name,
            run.code == 0
            and lines[-1].get("result", "").strip() == text
            and got == thought
            and len(requests) == 1,
            seen(run, requests),
        )


def failures():
    """The first reply fails in some place; the session is completed all the same, with few requests."""
    table = (
        ("an error as the first event", [FAILURE], DONE, 3),
        ("an error in a text", [say("The first half, "), FAILURE, end()], DONE, 3),
        ("an end in a text without a finish reason", [say("The first half, "), end()], DONE, 3),
        ("an end in a thought without a finish reason", [think("Hm, "), end()], DONE, 3),
        ("an end before anything", [end()], DONE, 3),
        ("an empty answer", [finish("stop")], DONE, 3),
        ("a thought alone", [think("Hm, hm.")], DONE, 3),
        ("a page of HTML", [payload(x="<html>")], DONE, 3),
        ("an answer cut by the token limit", [say("The first half, "), finish("length")], DONE, 3),
        ("content filtered", [say("The first half, "), finish("content_filter")], DONE, 3),
        ("an overload that is gone at once", fail(529, "Overloaded", "overloaded_error"), DONE, 3),
    )
    for name, first, then, most in table:
        run, requests = session(attempts(first, then))
        answers(name, run, requests, "ALL-DONE")
        check("    in at most %d requests" % most, len(requests) <= most, seen(run, requests))


def failures_in_calls():
    """The first reply fails after a tool call has begun: the tool runs once, in the end."""
    begun = one_call(arguments=json.dumps(STEP)[:20])
    for name, first in (
        ("an error in a tool call", [begun, FAILURE, end()]),
        ("an end in a tool call", [begun, end()]),
        ("a tool call cut by the token limit", [begun, finish("length")]),
        ("a text, then an end in a tool call", [say("I will call it."), begun, end()]),
        ("a thought, then a cut in a tool call", [think("I will."), begun, cut()]),
    ):
        with tempfile.TemporaryDirectory() as work:

            def script(request):
                if request.number == 0:
                    return first
                return (
                    DONE
                    if request.results and "error" not in str(request.results[-1]).lower()
                    else [call("Bash", **STEP)]
                )

            run, requests = session(script, cwd=work)
            answers(name, run, requests, "ALL-DONE")
            check(
                "    the tool ran once",
                read(work, "ran.txt") == "ran\n",
                lambda: read(work, "ran.txt") + seen(run, requests)(),
            )


def the_client_leaves():
    """The real client is ended while the upstream is silent: its call ends too."""
    for name, reply in (
        ("before the first byte", [wait(60), say("x")]),
        ("in a text", [say("Once "), wait(60), say("x")]),
    ):
        with Scripted(rounds(reply)) as upstream, ccfix(upstream.url) as url:
            run = claude(url, "-p", "Do the task.", limit=5)
            left = time.monotonic()
            while not upstream.hangups and time.monotonic() - left < 2:
                time.sleep(0.05)
            check(
                "the client leaves %s: the upstream call ends (%.1f s)"
                % (name, time.monotonic() - left),
                upstream.hangups == 1,
                seen(run, upstream.requests),
            )


def long_session():
    """Twenty rounds of tools: each request extends the last, and what was thought and said goes back unchanged."""

    def script(request):
        n = request.round
        return (
            DONE
            if n == 20
            else [think("Round %d." % n), say("Now %d." % n), bash("echo %d >> log.txt" % n)]
        )

    with tempfile.TemporaryDirectory() as work:
        run, requests = session(script, cwd=work)
        answers("twenty rounds of tools", run, requests, "ALL-DONE", 21)
        check(
            "    all ran",
            read(work, "log.txt").split() == [str(n) for n in range(20)],
            seen(run, requests),
        )
    extends("    each request extends the last", requests)


def changing_arguments():
    """The client rewrites arguments before it echoes them; the upstream's prefix cache wants its own words."""
    with tempfile.TemporaryDirectory() as work:
        path = write(work, "notes.txt", "red\n")
        wrote = '{"file_path":%s,  "limit": "5"}' % json.dumps(path)
        run, requests = session(rounds([one_call(arguments=wrote, name="Read")], DONE), cwd=work)
        answers("arguments with odd spaces and a number as text", run, requests, "ALL-DONE", 2)
        back = [
            c["function"]["arguments"]
            for m in requests[-1].messages
            for c in m.get("tool_calls", [])
        ]
        check("    the upstream gets back what it wrote", back == [wrote], (wrote, back))


if __name__ == "__main__":
    run_table(
        [
            tool_calls,
            two_calls,
            broken_arguments,
            texts,
            failures,
            failures_in_calls,
            the_client_leaves,
            long_session,
            changing_arguments,
        ]
    )
