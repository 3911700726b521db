"""Upstreams that answer oddly, or break in odd places, before the real client: a table of replies.

python3 .ci/odd_upstreams.py [scenario ...]
"""

import json
import tempfile

from harness import ccfix, check, claude, json_lines, run_table, wait_for
from real_client import STEP, STREAM_JSON, answers, blocks_of, extends, ran, seen, session
from session import bash, write
from upstream import Upstream, attempts, call, cut, cut_at, delta, end, fail, finish, payload
from upstream import rounds, say, think, wait

ARGUMENTS = json.dumps(STEP)
DONE = [say("ALL-DONE")]
UNEXPECTED = "The model produced output that does not match the expected format"
FAILURE = payload(error={"code": 500, "message": UNEXPECTED, "type": "server_error"})


def fragment(index=0, id="call_1", arguments=ARGUMENTS, name="Bash"):
    """An item of `tool_calls`; what is None is left out."""
    function = {"name": name, "arguments": arguments}
    if name is None:
        del function["name"]
    item = {"index": index, "id": id, "type": "function", "function": function}
    return {key: value for key, value in item.items() if value is not None}


def piece(*args, **fields):
    """A delta with a fragment of a tool call."""
    return delta(tool_calls=[fragment(*args, **fields)])


def untyped():
    item = fragment()
    del item["type"]
    return delta(tool_calls=[item])


def tagged():
    call_text = json.dumps({"name": "Bash", "arguments": STEP})
    return say("<tool_call>\n%s\n</tool_call>" % call_text)


def tool_calls():
    """Each first reply holds one Bash call, written oddly; the tool must run, and run once."""
    step = bash(STEP["command"])
    halves = [piece(arguments=ARGUMENTS[:20]), piece(arguments=ARGUMENTS[20:])]
    nulls = call("Bash", timeout=None, run_in_background=None, **STEP)
    strings = call("Bash", timeout="60000", run_in_background="false", **STEP)
    for name, *first in (
        ("finish reason `stop`", step, finish("stop")),
        ("finish reason `function_call`", step, finish("function_call")),
        ("no id", piece(id=None)),
        ("an empty id", piece(id="")),
        ("no index", piece(index=None)),
        ("no type", untyped()),
        ("arguments as an object", piece(arguments=dict(STEP))),
        ("the name again in each piece", *halves),
        ("null for an optional argument", nulls),
        ("a number and a truth value as strings", strings),
        ("empty text around it", say(""), delta(content=""), step, delta(content="")),
        ("text after it", step, say("I have called it.")),
        ("text in which it is tagged", tagged()),
        ("an id with odd characters", piece(id="functions.Bash:0|x y")),
    ):
        with tempfile.TemporaryDirectory() as work:
            run, requests = session(rounds(first, DONE), cwd=work)
            answers("a tool call with %s" % name, run, requests, "ALL-DONE", 2)
            ran("ran once", work, "ran\n", run, requests)


def two_calls():
    """Two calls in one reply, written oddly: both run."""
    one, two = (json.dumps(dict(STEP, command="echo %d > %d.txt" % (n, n))) for n in (1, 2))
    heads = [piece(0, "a", one[:9]), piece(1, "b", two[:9])]
    tails = [piece(n, None, words[9:], None) for n, words in enumerate((one, two))]
    both = delta(tool_calls=[fragment(0, "a", one), fragment(1, "b", two)])
    for name, *first in (
        ("interleaved", *heads + tails),
        ("with the same id", piece(0, "a", one), piece(1, "a", two)),
        ("with the same index", piece(0, "a", one), piece(0, "b", two)),
        ("with gaps in the index", piece(3, "a", one), piece(7, "b", two)),
        ("in one delta", both),
    ):
        with tempfile.TemporaryDirectory() as work:
            run, requests = session(rounds(first, DONE), cwd=work)
            answers("two calls %s" % name, run, requests, "ALL-DONE", 2)
            for file in ("1", "2"):
                ran("call %s ran" % file, work, file + "\n", run, requests, file + ".txt")


def broken_arguments():
    """Arguments that are not valid JSON: the model is told, and the session goes on."""
    run, requests = session(rounds([piece(arguments='{"command": "echo ran >> r')], DONE))
    answers("arguments that are cut off", run, requests, "ALL-DONE", 2)
    told = str(requests[-1].results).lower()
    check("    the model is told", "error" in told or "invalid" in told, told)
    back = [json.loads(c["function"]["arguments"]) for c in requests[-1].calls]
    good = back and all(isinstance(value, dict) for value in back)
    check("    what goes back is an object", good, back)
    run, requests = session(rounds([call("NoSuchTool", x=1)], DONE))
    answers("a tool that does not exist", run, requests, "ALL-DONE", 2)


def texts():
    """Each reply is an answer, oddly written; the text and the thinking are what arrives."""
    answer, thought = "It is 42.", "Hm, hm."
    fields = [delta(reasoning=thought, content=None), delta(content=answer, reasoning=None)]
    for name, reply, text, thinking in (
        ("<think> in the text", [say("<think>\nHm, hm.\n</think>\n\nIt is 42.")], answer, thought),
        ("reasoning instead of reasoning_content", fields, answer, thought),
        (
            "an emoji split over two deltas",
            [delta(content="It is \ud83d"), delta(content="\ude00.")],
            "It is \U0001f600.",
            "",
        ),
        ("content as parts", [delta(content=[{"type": "text", "text": answer}])], answer, ""),
        ("an unknown finish reason", [say(answer), finish("eos")], answer, ""),
        ("a usage that is null", [say(answer), payload(choices=[], usage=None)], answer, ""),
    ):
        run, requests = session(rounds(reply), *STREAM_JSON)
        got = "".join(b["thinking"] for b in blocks_of(run) if b["type"] == "thinking").strip()
        said = json_lines(run.out)[-1].get("result", "").strip()
        good = run.code == 0 and (said, got) == (text, thinking) and len(requests) == 1
        check(name, good, seen(run, requests))


def failures():
    """The first reply fails in some place; the session is completed, with few requests."""
    begun = say("The first half, ")
    for name, *first in (
        ("an error as the first event", FAILURE),
        ("an error in text", begun, FAILURE, end()),
        ("an end in text without a finish reason", begun, end()),
        ("an end in a thought without a finish reason", think("Hm, "), end()),
        ("an end before anything", end()),
        ("an empty answer", finish("stop")),
        ("a thought alone", think("Hm, hm.")),
        ("a page of HTML", payload(x="<html>")),
        ("an answer cut by the token limit", begun, finish("length")),
        ("content filtered", begun, finish("content_filter")),
        ("an overload that is gone at once", *fail(529, "Overloaded", "overloaded_error")),
    ):
        run, requests = session(attempts(first, DONE))
        answers(name + ", in at most 3 requests", run, requests, "ALL-DONE", most=3)


def failures_in_calls():
    """The first reply fails after a tool call has begun: the tool runs once, in the end."""
    begun = piece(arguments=ARGUMENTS[:20])
    for name, *first in (
        ("an error in a tool call", begun, FAILURE, end()),
        ("an end in a tool call", begun, end()),
        ("a tool call cut by the token limit", begun, finish("length")),
        ("text, then an end in a tool call", say("I will call it."), begun, end()),
        ("a thought, then a cut in a tool call", think("I will."), begun, cut()),
    ):

        def script(request):
            if request.number == 0:
                return first
            over = request.results and "error" not in str(request.results[-1]).lower()
            return DONE if over else [call("Bash", **STEP)]

        with tempfile.TemporaryDirectory() as work:
            run, requests = session(script, cwd=work)
            answers(name, run, requests, "ALL-DONE")
            ran("the tool ran once", work, "ran\n", run, requests)


def cuts():
    """The connection drops after so many bytes of a reply with a tool call: the tool runs once."""
    reply = [think("I will. "), say("Now. "), call("Bash", **STEP)]
    for size in (0, 40, 100, 400, 1200, 2400, 3600):

        def script(request):
            broken = [cut_at(size)] if request.number == 0 else []
            return DONE if request.results else broken + reply

        with tempfile.TemporaryDirectory() as work:
            run, requests = session(script, cwd=work)
            answers("a cut after %d bytes" % size, run, requests, "ALL-DONE", most=4)
            ran("the tool ran once", work, "ran\n", run, requests)


NATIVE = {"TARGET_FORMAT": "anthropic"}
OVERLOADED = payload(type="error", error={"type": "overloaded_error", "message": "Overloaded"})


def native_format():
    """The same on an upstream that speaks Anthropic's format itself."""
    step, words = bash(STEP["command"]), say("The first half, ")
    for name, *first in (
        ("a tool call", think("Hm. "), say("Now. "), step),
        ("a cut before the head", cut()),
        ("a cut in text", words, cut()),
        ("a cut in a tool call", cut_at(1000), step),
        ("a cut after a tool call", step, cut()),
        ("an error as the first event", OVERLOADED, end()),
        ("an error in text", words, OVERLOADED, end()),
        ("an overload that is gone at once", *fail(529, "Overloaded", "overloaded_error")),
    ):

        def script(request):
            return DONE if request.results else first if request.number == 0 else [step]

        with tempfile.TemporaryDirectory() as work:
            run, requests = session(script, settings=NATIVE, cwd=work)
            answers("native: " + name, run, requests, "ALL-DONE", most=4)
            ran("the tool ran once", work, "ran\n", run, requests)


def the_client_leaves():
    """The real client is ended while the upstream is silent: its call ends too."""
    for name, reply in (
        ("before the first byte", [wait(60), say("x")]),
        ("in text", [say("Once "), wait(60), say("x")]),
    ):
        with Upstream(rounds(reply)) as upstream, ccfix(upstream.url) as url:
            claude(url, "-p", "Do the task.", limit=8)
            wait_for(lambda: upstream.hangups, 5, "the end of the upstream call")
            told = "the client leaves %s: the upstream call ends" % name
            check(told, upstream.hangups == len(upstream.requests) == 1, upstream.hangups)


def long_session():
    """Twenty rounds of tools: each request extends the last, thoughts and words unchanged."""

    def script(request):
        n = request.round
        step = [think("Round %d." % n), say("Now %d." % n), bash("echo %d >> ran.txt" % n)]
        return DONE if n == 20 else step

    with tempfile.TemporaryDirectory() as work:
        run, requests = session(script, cwd=work)
        answers("twenty rounds of tools", run, requests, "ALL-DONE", 21)
        ran("all ran", work, "".join("%d\n" % n for n in range(20)), run, requests)
    extends("    each request extends the last", requests)


def changing_arguments():
    """The client rewrites arguments, but the upstream's prefix cache wants its own words."""
    with tempfile.TemporaryDirectory() as work:
        path = write(work, "notes.txt", "red\n")
        wrote = '{"file_path":%s,  "limit": "5"}' % json.dumps(path)
        run, requests = session(rounds([piece(arguments=wrote, name="Read")], DONE), cwd=work)
    name = "arguments with odd spaces and a number as a string"
    answers(name, run, requests, "ALL-DONE", 2)
    back = [c["function"]["arguments"] for c in requests[-1].calls]
    check("    the upstream gets back what it wrote", back == [wrote], (wrote, back))


if __name__ == "__main__":
    run_table(
        tool_calls,
        two_calls,
        broken_arguments,
        texts,
        failures,
        failures_in_calls,
        cuts,
        native_format,
        the_client_leaves,
        long_session,
        changing_arguments,
    )
