"""The real Claude Code client, through ccfix, on a scripted upstream: one function a scenario.

python3 .ci/real_client.py [scenario ...]      # all, or those named (with -, as in the output)
"""

import base64
import json
import re
import tempfile

from harness import ccfix, check, claude, json_lines, run_table
from session import BOOK, DANGER, bash, book_of_answers, png, read, screenshot, write
from upstream import Upstream, attempts, call, cut, delta, fail, rounds, say, think, usage, wait

STREAM_JSON = ("--output-format", "stream-json", "--verbose")


# Helpers


def session(script, *args, settings=None, **client):
    """One run of the client in print mode -> (Run, the requests that the upstream saw).

    settings: environment of ccfix; client: as harness.claude says.
    """
    with Upstream(script) as upstream, ccfix(upstream.url, env=settings) as url:
        run = claude(url, "-p", "Do the task.", DANGER, *args, **client)
    return run, upstream.requests


def seen(run, requests):
    """What to show of a session when a check fails."""

    def lines():
        yield "exit code %s after %.1f s" % (run.code, run.seconds)
        yield "stdout: " + run.out[-1200:]
        yield "stderr: " + run.err[-400:]
        for r in requests:
            sizes = (r.number, r.at - requests[0].at, len(r.messages), len(r.tool_names))
            told = "upstream request %d (+%.1f s): %d messages, %d tools, last: " % sizes
            yield told + json.dumps(r.messages[-1])[:300]

    return lambda: "\n".join(lines())


def answers(name, run, requests, text, count=None, most=None):
    """Check that the session ended well with this text, after `count` (or `most`) requests."""
    good = run.code == 0 and text in run.out
    good = good and count in (None, len(requests)) and (not most or len(requests) <= most)
    return check(name, good, seen(run, requests))


def ran(name, work, wanted, run, requests, file="ran.txt"):
    """Check what a tool left in a file."""
    got = read(work, file)
    return check("    " + name, got == wanted, lambda: got + seen(run, requests)())


def blocks_of(run):
    """The content blocks of all answers, in stream-json."""
    lines = [line for line in json_lines(run.out) if line["type"] == "assistant"]
    return [block for line in lines for block in line["message"]["content"]]


def result_of(run):
    return (json_lines(run.out) or [{}])[-1]


def extends(name, requests):
    """Check that each request's messages and tools extend the last: the upstream's cache holds."""
    for old, new in zip(requests, requests[1:]):
        for part in ("messages", "tools"):
            before, after = old.body.get(part, []), new.body.get(part, [])
            for i, item in enumerate(before):
                if after[i : i + 1] != [item]:
                    pair = json.dumps(after[i : i + 1])[:1500], json.dumps(item)[:1500]
                    told = "request %d, %s[%d]:\n%s\nwas\n%s" % ((new.number, part, i) + pair)
                    return check(name, False, told)
    return check(name, len(requests) > 1, "only %d requests" % len(requests))


# Answers

PRIVATE = "cache_control device_id x-anthropic-billing-header context_management defer_loading"
PRIVATE = PRIVATE.split() + ["DeferredToolPlaceholder"]


def plain_text():
    text = "PONG with \u00fcml\u00e4ut and \U0001f600."
    reply = [say(text), usage(1000, 7, 600)]
    run, requests = session(rounds(reply), "--output-format", "json")
    answers("a plain answer arrives", run, requests, "PONG with", 1)
    check("it arrives byte for byte", result_of(run).get("result") == text, run.out)
    tokens = result_of(run)["usage"]
    names = ("input_tokens", "cache_read_input_tokens", "output_tokens")
    counted = [tokens[name] for name in names] == [400, 600, 7]
    check("usage: cached tokens are counted apart", counted, tokens)
    sent = requests[0]
    asked = sent.body["model"], sent.headers.get("authorization")
    good = asked == ("scripted-model", "Bearer sk-upstream-secret")
    check("the upstream is asked for the target model, with its key", good, sent.headers)
    private = [word for word in PRIVATE if word in sent.raw]
    good = not private and "metadata" not in sent.body
    check("what is Claude Code's own stays behind", good, private)


def model_names():
    for name, model, args in (
        ("the default model", None, ()),
        ("--model haiku", None, ("--model", "haiku")),
        ("--model sonnet", None, ("--model", "sonnet")),
        ("--model opus", None, ("--model", "opus")),
        ("claude-sonnet-4-5", "claude-sonnet-4-5", ()),
        ("Opus 4.8[1m]", "Opus 4.8[1m]", ()),
    ):
        run, requests = session(rounds([say("SERVED")]), *args, model=model)
        answers("%s is served" % name, run, requests, "SERVED", 1)
        asked = requests and requests[0].body["model"]
        check("%s: and the upstream sees its own model" % name, asked == "scripted-model", asked)


def thinking():
    thought = "Let me weigh this: 6 times 7."
    run, requests = session(rounds([think(thought), say("It is 42.")]), *STREAM_JSON)
    answers("thinking: the answer arrives", run, requests, "It is 42.", 1)
    thoughts = [b["thinking"] for b in blocks_of(run) if b["type"] == "thinking"]
    check("thinking arrives as a thinking block", thoughts == [thought], seen(run, requests))


def demo():
    with ccfix(None, "--demo") as url:
        run = claude(url, "-p", "hello", "--output-format", "json")
    name = "--demo: the client gets an answer with no key and no network"
    answers(name, run, [], '"subtype":"success"')
    check("--demo: the answer is not empty", bool(result_of(run).get("result")), run.out)


# Tools


def tool_loop():
    with tempfile.TemporaryDirectory() as work:
        notes = write(work, "notes.txt", "colour: red\n")
        script = rounds(
            [think("First look."), say("I read it."), call("Read", file_path=notes)],
            [call("Edit", file_path=notes, old_string="red", new_string="blue")],
            [say("Now a copy."), bash("cp notes.txt copy.txt && echo copied")],
            [say("LOOP-DONE")],
        )
        run, requests = session(script, cwd=work)
        answers("tool loop: Read, Edit, Bash and an answer", run, requests, "LOOP-DONE", 4)
        for name in ("notes.txt", "copy.txt"):
            ran("%s is changed on disk" % name, work, "colour: blue\n", run, requests, name)
    extends("tool loop: each request extends the last", requests)
    results = requests[-1].results
    good = len(results) == 3 and "colour: red" in results[0] and "copied" in results[2]
    check("the upstream gets the three results", good, results)


def tool_loop_default_model():
    script = rounds(
        [think("Hm."), bash("echo one > ran.txt")],
        [think("Hm hm."), say("So."), bash("echo two >> ran.txt")],
        [say("LOOP-DONE")],
    )
    with tempfile.TemporaryDirectory() as work:
        run, requests = session(script, cwd=work, model=None)
        answers("tool loop with the default model", run, requests, "LOOP-DONE", 3)
        ran("both commands ran once", work, "one\ntwo\n", run, requests)
    extends("tool loop with the default model: each request extends the last", requests)


def parallel_tools():
    with tempfile.TemporaryDirectory() as work:
        reads = [call("Read", file_path=write(work, w + ".txt", w)) for w in ("ALPHA", "BETA")]
        first = [say("Three at once."), bash("sleep 1; echo GAMMA")] + reads
        run, requests = session(rounds(first, [say("PARALLEL-DONE")]), cwd=work)
    answers("parallel tools: three calls in one reply", run, requests, "PARALLEL-DONE", 2)
    results = requests[-1].results
    inside = [word in result for word, result in zip(("GAMMA", "ALPHA", "BETA"), results)]
    check("their results come in call order", inside == [True] * 3, results)
    calls = [c["id"] for c in requests[-1].calls]
    told = [m["tool_call_id"] for m in requests[-1].messages if m["role"] == "tool"]
    check("each result names its call", calls == told and len(set(calls)) == 3, (calls, told))


def subagent():
    task = {"description": "a small task", "prompt": "SUBTASK: say it."}
    task["subagent_type"] = "general-purpose"

    def script(request):
        if request.asks("SUBTASK"):
            return rounds([bash("echo from-the-subagent")], [say("SUB-ANSWER")])(request)
        if "SUB-ANSWER" in request.raw:
            return [say("MAIN-SAW-IT")]
        return [say("Waiting.")] if request.round else [call("Agent", **task)]

    run, requests = session(script)
    answers("a subagent works and its answer comes back", run, requests, "MAIN-SAW-IT")
    found = any("from-the-subagent" in "".join(map(str, r.results)) for r in requests)
    check("the subagent's tool result reached the upstream", found, seen(run, requests))


def image_read():
    with tempfile.TemporaryDirectory() as work:
        picture = png(250, 10, 10)
        look = call("Read", file_path=write(work, "dot.png", picture))
        run, requests = session(rounds([look], [say("IMAGE-SEEN")]), cwd=work)
    answers("an image is read", run, requests, "IMAGE-SEEN", 2)
    last, place, urls = requests[-1].messages, 0, []
    for number, message in enumerate(last):
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image_url":
                place, urls = number, urls + [part["image_url"]["url"]]
    roles = [message["role"] for message in last]
    follows = place and roles[place - 1 : place + 1] == ["tool", "user"]
    check("it follows its tool message, in a user message", follows, roles)
    wanted = ["data:image/png;base64," + base64.b64encode(picture).decode()]
    check("as a data URL with the picture's bytes", urls == wanted, urls)


def images_count_as_images():
    """A screenshot, read twice, with a known window and a provider that tells no usage."""
    env = {"MAX_CONTEXT": "131072", "EXTRA_BODY": '{"stream_options": null}'}
    with tempfile.TemporaryDirectory() as work:
        path = write(work, "shot.png", screenshot())
        looks = [call("Read", file_path=path)], [call("Read", why="again", file_path=path)]
        script = rounds(*looks, [bash("echo more")], [say("SHOT-SEEN")])
        with Upstream(script) as upstream, ccfix(upstream.url, env=env) as url:
            run = claude(url, "-p", "Look.", DANGER, "--output-format", "json", cwd=work)
    requests = upstream.requests
    answers("images: a screenshot is read twice", run, requests, "SHOT-SEEN", 4)
    sizes, room = [len(r.raw) for r in requests], [r.body["max_tokens"] for r in requests]
    check("    both are large", sizes[-1] - sizes[0] > 2 * 400000, sizes)
    check("    they leave the output its room", room == [32000] * 4, room)
    counted, most = result_of(run)["usage"]["input_tokens"], 4 * (sizes[0] // 3) + 5 * 1600
    check("    without usage they count as images", 20000 < counted < most, (counted, most))
    labels = re.findall(r"\[image[^\]]*\]", requests[-1].raw)
    check("    they are labelled", labels == ["[image of Read shot.png]"] * 2, labels)
    own = requests[-1].calls[1]["function"]["arguments"]
    check("an argument too many: the call is run, and goes back as it was", "again" in own, own)
    extends("images: each request extends the last", requests)


def tool_search():
    search = call("ToolSearch", query="select:WebFetch", max_results=5)
    run, requests = session(rounds([search], [say("TOOL-LOADED")]))
    answers("ToolSearch loads a deferred tool", run, requests, "TOOL-LOADED", 2)
    before, after = (r.tool_names for r in requests)
    behind = after == before + ["WebFetch"]
    check("the upstream sees it behind the others", behind, (before, after))
    results = requests[-1].results
    check("the tool result names it", "WebFetch" in str(results), results)
    extends("ToolSearch: the second request extends the first", requests)


def web_search():
    asked = []

    def script(request):
        if request.asks("Perform a web search"):
            return [say("INVENTED: the result is 7.")]
        search = call("WebSearch", query="zebra teeth", **rules)
        return rounds([search], [say("SEARCH-OVER")])(request)

    found, facts = "/search?language=en", "https://zebra.example/facts"
    for name, path, words, rules in (
        ("real results", found, (facts, "44 teeth"), {}),
        ("an allowed domain", found, (facts, "44 teeth"), {"allowed_domains": ["ZEBRA.example"]}),
        ("another domain", found, ("other domains: 2",), {"allowed_domains": ["bra.example"]}),
        ("a blocked domain", found, ("other domains: 2",), {"blocked_domains": ["example"]}),
        ("a broken search", "/search/broken", ("failed",), {}),
        ("no search configured", "", ("not configured",), {}),
    ):
        with Upstream(script) as upstream:
            env = {"SEARCH_URL": upstream.url[: -len("/v1")] + path} if path else {}
            with ccfix(upstream.url, env=env) as url:
                plain = {"ENABLE_TOOL_SEARCH": "false"}
                run = claude(url, "-p", "How many teeth has a zebra?", DANGER, env=plain)
        requests, asked = upstream.requests, asked + upstream.gets
        answers("web search: %s" % name, run, requests, "SEARCH-OVER", 2)
        results = str(requests[-1].results)
        check("    the tool result says so", all(word in results for word in words), results)
        invented = any("INVENTED" in request.raw for request in requests)
        check("    nothing is invented", not invented, seen(run, requests))
    wanted = ("q=zebra+teeth", "format=json", "language=en")
    arrived = any(all(word in path for word in wanted) for path in asked)
    check("the query arrived", arrived, asked)


def mcp_long_names():
    server = "a_server_with_quite_a_long_name"
    servers = json.dumps({"mcpServers": {server: book_of_answers()}})
    name = "mcp__%s__%stwo" % (server, BOOK)

    def script(request):
        if request.round:
            return [say("MCP-DONE")]
        tools = [tool["function"] for tool in request.body["tools"]]
        known = [tool["name"] for tool in tools if "book of answers" in str(tool["description"])]
        return [call(known[-1], question="why")]

    plain = {"ENABLE_TOOL_SEARCH": "false"}
    run, requests = session(script, "--mcp-config", servers, *STREAM_JSON, env=plain)
    called = "an MCP tool with a name of %d characters is called" % len(name)
    answers(called, run, requests, "MCP-DONE", 2)
    names = requests[0].tool_names
    good = all(len(n) <= 64 for n in names) and len(set(names)) == len(names)
    check("the upstream sees at most 64 characters, all different", good, names)
    real = '"name":"%s"' % name in run.out
    check("the client sees the call under its real name", real, seen(run, requests))
    results = str(requests[-1].results)
    check("and its result comes back", "two answers why" in results, results)
    extends("MCP: the second request extends the first", requests)


def json_schema():
    schema = {"type": "object", "required": ["colour"]}
    schema["properties"] = {"colour": {"type": "string"}}
    script = rounds([call("StructuredOutput", colour="blue")], [say("done")])
    args = ("--json-schema", json.dumps(schema), "--output-format", "json")
    run, requests = session(script, *args)
    good = run.code == 0 and result_of(run).get("structured_output") == {"colour": "blue"}
    check("--json-schema works", good, seen(run, requests))


# Errors, as the user sees them

QUOTA = "You exceeded your current quota, please check your plan and billing details."
NO_MODEL = "The model `scripted-model` does not exist or you do not have access to it."
NO_COUNTRY = fail(
    403,
    "Country, region, or territory not supported",
    code="unsupported_country_region_territory",
)
SLOWER = fail(429, "Rate limit reached", "requests", "rate_limit_exceeded", retry_after=1)
MOON = "The moon is in the wrong phase."
BAD_KEY = fail(401, "Incorrect API key provided: sk-up*cret.", code="invalid_api_key")
GOOD = [say("RECOVERED")]
ERRORS = (
    # name, replies, exit code, words shown, most upstream requests
    ("401: shown at once, names the setting", [BAD_KEY], 1, ["TARGET_API_KEY"], 1),
    ("402: shown once", [fail(402, "Insufficient Balance", "unknown")], 1, ["Insufficient"], 1),
    (
        "billing in a 429: shown once, never retried",
        [fail(429, QUOTA, "insufficient_quota", "insufficient_quota")],
        1,
        ["quota"],
        1,
    ),
    (
        "404: the missing model is named",
        [fail(404, NO_MODEL, code="model_not_found")],
        1,
        ["scripted-model", "does not exist"],
        2,
    ),
    ("an unknown 400 goes out once", [fail(400, MOON)], 1, ["wrong phase"], 1),
    ("an unknown 422 goes out once", [fail(422, MOON)], 1, ["wrong phase"], 1),
    ("403: shown at once", [NO_COUNTRY], 1, ["not supported"], 1),
    ("429 with Retry-After, then an answer", [SLOWER, GOOD], 0, ["RECOVERED"], 2),
    ("500, then an answer", [fail(500, "An error", "server_error"), GOOD], 0, ["RECOVERED"], 2),
    ("503, then an answer", [fail(503, "Overloaded", "server_error"), GOOD], 0, ["RECOVERED"], 2),
)


def errors():
    for name, replies, code, words, most in ERRORS:
        run, requests = session(attempts(*replies))
        text = run.out + run.err
        good = run.code == code and all(w in text for w in words) and len(requests) <= most
        at_once = run.seconds < (20 if code else 40)
        safe = "sk-upstream-secret" not in text
        check(name, good and at_once and safe, seen(run, requests))


def overflow(limit, asked):
    """The refusal of a prompt that is too long, in OpenAI's words."""
    text = "This model's maximum context length is %d tokens. However, %s "
    return fail(400, text % (limit, asked), code="context_length_exceeded")


def context_overflow():
    refusal = overflow(
        128000, "your messages resulted in 130012 tokens. Please reduce the length of the messages."
    )

    def script(request):
        if "SUMMARY-9" in request.raw:
            return [say("AFTER-COMPACTION")]
        if request.number == 0:
            return [say("Earlier answer. " * 40)]
        return refusal if request.number == 1 else [say("<summary>SUMMARY-9</summary>")]

    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as home:
        with Upstream(script) as upstream, ccfix(upstream.url) as url:
            where = {"cwd": work, "home": home}
            claude(url, "-p", "first question", **where)
            run = claude(url, "-p", "second question", "--continue", **where)
    requests = upstream.requests
    extends("--continue in a new process: the request extends the last one's", requests[:2])
    name = "context overflow: the client compacts and goes on"
    answers(name, run, requests, "AFTER-COMPACTION", 4)


def overflow_at_once():
    words = "you requested 14012 tokens (13012 in the messages, 1000 in the completion)."
    run, requests = session(attempts(overflow(4096, words)))
    good = run.code == 1 and "too long" in run.out.lower() and len(requests) <= 4
    check("an overflow in the first turn is called too long", good, seen(run, requests))


# Upstreams that are slow, or die

STEP = {"command": "echo ran >> ran.txt", "description": "a step"}


def dies_in_words():
    again = [say("SECOND-TRY.")]
    for name, first in (
        ("in text", [say("The first half of a story, "), cut()]),
        ("while it thinks", [think("I was thinking of "), cut()]),
        ("before it says anything", [delta(), cut()]),
        ("before its head", [cut()]),
    ):
        run, requests = session(attempts(first, again))
        told = "the upstream dies %s: the session is completed" % name
        answers(told, run, requests, "SECOND-TRY", most=3)


def dies_in_tool_call():
    with tempfile.TemporaryDirectory() as work:
        first, again = [call("Bash", 20, **STEP), cut()], [call("Bash", **STEP)]
        run, requests = session(attempts(first, again, [say("CALL-DONE")]), cwd=work)
        name = "the upstream dies in a tool call: the client streams again"
        answers(name, run, requests, "CALL-DONE", 3)
        ran("the tool ran once", work, "ran\n", run, requests)
    same = requests[1].body.get("stream") and requests[1].messages == requests[0].messages
    check("    the second try is streamed, and the same", same, seen(run, requests))


def dies_in_second_call():
    first, second = (dict(STEP, command="echo step-%d >> ran.txt" % n) for n in (1, 2))

    def script(request):
        if request.number == 0:
            return [call("Bash", **first), call("Bash", 20, **second), cut()]
        if request.round and "step-2" in request.raw:
            return [say("CALLS-DONE")]
        return [call("Bash", **step) for step in ((first, second)[request.round > 0 :])]

    with tempfile.TemporaryDirectory() as work:
        run, requests = session(script, cwd=work)
        name = "the upstream dies in the second of two calls: the session is completed"
        answers(name, run, requests, "CALLS-DONE")
        ran("each tool ran once", work, "step-1\nstep-2\n", run, requests)


def silent_upstream():
    run, requests = session(rounds([wait(20), say("LATE"), wait(7), say(" BUT HERE")]))
    name = "20 s of silence before the first byte, 7 s in the text"
    answers(name, run, requests, "LATE BUT HERE", 1)


if __name__ == "__main__":
    run_table(
        plain_text,
        model_names,
        thinking,
        demo,
        tool_loop,
        tool_loop_default_model,
        parallel_tools,
        subagent,
        image_read,
        images_count_as_images,
        tool_search,
        web_search,
        mcp_long_names,
        json_schema,
        errors,
        context_overflow,
        overflow_at_once,
        dies_in_words,
        dies_in_tool_call,
        dies_in_second_call,
        silent_upstream,
    )
