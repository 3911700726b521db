"""The real Claude Code client, through ccfix, on a scripted upstream: one function a scenario.

python3 .ci/real_client.py [scenario ...]      # all of them, or those named (with -, as in the output)
"""

import base64
import json
import os
import struct
import sys
import tempfile
import zlib

from harness import HERE, ccfix, check, claude, json_lines, run_table
from scripted_upstream import Scripted, attempts, call, cut, fail, rounds, say, think, usage, wait

SKIP_PERMISSIONS = "--dangerously-skip-permissions"
STREAM_JSON = ("--output-format", "stream-json", "--verbose")


# Helpers


def session(script, *args, prompt="Do the task.", settings=None, **client):
    """One run of the client in print mode; -> (Run, the requests that the upstream saw).

    `settings`: environment of ccfix; {upstream} in a value is the upstream's address."""
    with Scripted(script) as upstream, ccfix(
        upstream.url,
        env={
            name: value.replace("{upstream}", upstream.url[: -len("/v1")])
            for name, value in (settings or {}).items()
        },
    ) as url:
        run = claude(url, "-p", prompt, SKIP_PERMISSIONS, *args, **client)
    return run, upstream.requests


def seen(run, requests):
    """What to show of a session when a check fails."""

    def lines():
        yield "exit code %s after %.1f s" % (run.code, run.seconds)
        yield "stdout: " + run.out[-1200:]
        yield "stderr: " + run.err[-400:]
        for r in requests:
            yield "upstream request %d (+%.1f s): %d messages, %d tools, last: %s" % (
                r.number,
                r.at - requests[0].at,
                len(r.messages),
                len(r.tool_names),
                json.dumps(r.messages[-1])[:300],
            )

    return lambda: "\n".join(lines())


def answers(name, run, requests, text, count=None):
    """Check that the session ended well with this text (after so many upstream requests)."""
    ok = run.code == 0 and text in run.out and (count is None or len(requests) == count)
    return check(name, ok, seen(run, requests))


def extends(name, requests):
    """Check that each request's messages and tools begin with the earlier request's: the upstream's cache holds."""
    for old, new in zip(requests, requests[1:]):
        for part in ("messages", "tools"):
            before, after = old.body.get(part, []), new.body.get(part, [])
            for i, item in enumerate(before):
                if after[i : i + 1] != [item]:
                    return check(
                        name,
                        False,
                        "request %d, %s[%d]:\n%s\nwas\n%s"
                        % (
                            new.number,
                            part,
                            i,
                            json.dumps(after[i : i + 1])[:1500],
                            json.dumps(item)[:1500],
                        ),
                    )
    return check(name, len(requests) > 1, "only %d requests" % len(requests))


def write(folder, name, content):
    path = os.path.join(folder, name)
    with open(path, "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder, name):
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return f.read()
    except OSError as error:
        return str(error)


def bash(command):
    return call("Bash", command=command, description="a step of the task")


def png(red, green, blue):
    """A picture of 8 x 8 pixels in one colour."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = (b"\0" + bytes((red, green, blue)) * 8) * 8
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", 8, 8, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# Answers


def plain_text():
    run, requests = session(
        rounds([say("PONG with \u00fcml\u00e4ut and \U0001f600."), usage(1000, 7, 600)]),
        "--output-format",
        "json",
    )
    answers("a text answer arrives", run, requests, "PONG with", 1)
    result = json_lines(run.out)[-1]
    check(
        "it arrives byte for byte",
        result.get("result") == "PONG with \u00fcml\u00e4ut and \U0001f600.",
        run.out,
    )
    tokens = result["usage"]
    check(
        "usage: cached tokens are counted apart",
        (tokens["input_tokens"], tokens["cache_read_input_tokens"], tokens["output_tokens"])
        == (400, 600, 7),
        tokens,
    )
    sent = requests[0]
    check(
        "the upstream is asked for the target model, with its key",
        (sent.body["model"], sent.headers.get("authorization"))
        == ("scripted-model", "Bearer sk-upstream-secret"),
        sent.headers,
    )
    private = [
        w
        for w in (
            "cache_control",
            "device_id",
            "x-anthropic-billing-header",
            "context_management",
            "DeferredToolPlaceholder",
            "defer_loading",
        )
        if w in sent.raw
    ]
    check(
        "what is Claude Code's own stays behind",
        not private and "metadata" not in sent.body,
        private,
    )


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
        check(
            "%s: and the upstream sees its own model" % name,
            requests and requests[0].body["model"] == "scripted-model",
        )


def thinking():
    reply = [think("Let me weigh this: 6 times 7."), say("It is 42.")]
    run, requests = session(rounds(reply), *STREAM_JSON)
    answers("thinking: the answer arrives", run, requests, "It is 42.", 1)
    blocks = [
        b
        for line in json_lines(run.out)
        if line["type"] == "assistant"
        for b in line["message"]["content"]
    ]
    thoughts = [b["thinking"] for b in blocks if b["type"] == "thinking"]
    check(
        "thinking arrives as a thinking block",
        thoughts == ["Let me weigh this: 6 times 7."],
        seen(run, requests),
    )


def demo():
    with ccfix(None, "--demo") as url:
        run = claude(url, "-p", "hello", "--output-format", "json")
    answers(
        "--demo: the client gets an answer with no key and no network",
        run,
        [],
        '"subtype":"success"',
    )
    result = json_lines(run.out)[-1] if run.code == 0 else {}
    check("--demo: the answer is not empty", bool(result.get("result")), run.out)


# Tools


def tool_loop():
    with tempfile.TemporaryDirectory() as work:
        notes = write(work, "notes.txt", "colour: red\n")
        run, requests = session(
            rounds(
                [think("First look."), say("I read it."), call("Read", file_path=notes)],
                [call("Edit", file_path=notes, old_string="red", new_string="blue")],
                [say("Now a copy."), bash("cp notes.txt copy.txt && echo copied")],
                [say("LOOP-DONE")],
            ),
            cwd=work,
        )
        answers("tool loop: Read, Edit, Bash and an answer", run, requests, "LOOP-DONE", 4)
        check(
            "the file is changed on disk",
            read(work, "notes.txt") == read(work, "copy.txt") == "colour: blue\n",
            seen(run, requests),
        )
    extends("tool loop: each request extends the last", requests)
    results = requests[-1].results
    check(
        "the upstream gets the three results",
        len(results) == 3 and "colour: red" in results[0] and "copied" in results[2],
        results,
    )


def tool_loop_default_model():
    with tempfile.TemporaryDirectory() as work:
        run, requests = session(
            rounds(
                [think("Hm."), bash("echo one > made.txt")],
                [think("Hm hm."), say("So."), bash("echo two >> made.txt")],
                [say("LOOP-DONE")],
            ),
            cwd=work,
            model=None,
        )
        answers("tool loop with the default model", run, requests, "LOOP-DONE", 3)
        check("both commands ran once", read(work, "made.txt") == "one\ntwo\n", seen(run, requests))
    extends("tool loop with the default model: each request extends the last", requests)


def parallel_tools():
    with tempfile.TemporaryDirectory() as work:
        a, b = write(work, "a.txt", "ALPHA"), write(work, "b.txt", "BETA")
        run, requests = session(
            rounds(
                [
                    say("Three at once."),
                    bash("sleep 1; echo GAMMA"),
                    call("Read", file_path=a),
                    call("Read", file_path=b),
                ],
                [say("PARALLEL-DONE")],
            ),
            cwd=work,
        )
    answers("parallel tools: three calls in one reply", run, requests, "PARALLEL-DONE", 2)
    results = requests[-1].results
    check(
        "their results come in call order",
        len(results) == 3
        and all(word in result for word, result in zip(("GAMMA", "ALPHA", "BETA"), results)),
        results,
    )
    calls = [c["id"] for m in requests[-1].messages for c in m.get("tool_calls", [])]
    told = [m["tool_call_id"] for m in requests[-1].messages if m["role"] == "tool"]
    check("each result names its call", calls == told and len(set(calls)) == 3, (calls, told))


def subagent():
    task = {
        "description": "a small task",
        "prompt": "SUBTASK: say it.",
        "subagent_type": "general-purpose",
    }

    def script(request):
        if request.asks("SUBTASK"):
            return rounds([bash("echo from-the-subagent")], [say("SUB-ANSWER")])(request)
        if "SUB-ANSWER" in request.raw:
            return [say("MAIN-SAW-IT")]
        return [say("Waiting.")] if request.round else [call("Agent", **task)]

    run, requests = session(script)
    answers("a subagent works and its answer comes back", run, requests, "MAIN-SAW-IT")
    check(
        "the subagent's tool result reached the upstream",
        any("from-the-subagent" in "".join(map(str, r.results)) for r in requests),
        seen(run, requests),
    )


def image_read():
    with tempfile.TemporaryDirectory() as work:
        picture = png(250, 10, 10)
        path = write(work, "dot.png", picture)
        run, requests = session(
            rounds([call("Read", file_path=path)], [say("IMAGE-SEEN")]), cwd=work
        )
    answers("an image is read", run, requests, "IMAGE-SEEN", 2)
    last = requests[-1].messages
    place = next(
        (
            i
            for i, m in enumerate(last)
            if isinstance(m["content"], list)
            and any(p["type"] == "image_url" for p in m["content"])
        ),
        0,
    )
    check(
        "it follows its tool message, in a user message",
        place and last[place]["role"] == "user" and last[place - 1]["role"] == "tool",
        [m["role"] for m in last],
    )
    urls = (
        [p["image_url"]["url"] for p in last[place]["content"] if p["type"] == "image_url"]
        if place
        else []
    )
    check(
        "as a data URL with the picture's bytes",
        urls == ["data:image/png;base64," + base64.b64encode(picture).decode()],
        urls,
    )


def tool_search():
    run, requests = session(
        rounds([call("ToolSearch", query="select:WebFetch", max_results=5)], [say("TOOL-LOADED")])
    )
    answers("ToolSearch loads a deferred tool", run, requests, "TOOL-LOADED", 2)
    before, after = (r.tool_names for r in requests)
    check("the upstream sees it behind the others", after == before + ["WebFetch"], (before, after))
    check("the tool result names it", "WebFetch" in str(requests[-1].results), requests[-1].results)
    extends("ToolSearch: the second request extends the first", requests)


def web_search():
    def script(request):
        if request.asks("Perform a web search"):
            return [say("INVENTED: the result is 7.")]
        return rounds([call("WebSearch", query="what is new")], [say("SEARCH-OVER")])(request)

    run, requests = session(script, env={"ENABLE_TOOL_SEARCH": "false"})
    answers(
        "WebSearch without a search configured: the session goes on",
        run,
        requests,
        "SEARCH-OVER",
        2,
    )
    result = "".join(map(str, requests[-1].results))
    check(
        "the tool result says that there is none",
        "error" in result.lower() or "unavailable" in result.lower(),
        result,
    )
    check(
        "nothing is invented", not any("INVENTED" in r.raw for r in requests), seen(run, requests)
    )


def web_search_configured():
    run, requests = session(
        rounds([call("WebSearch", query="what is new")], [say("SEARCH-OVER")]),
        env={"ENABLE_TOOL_SEARCH": "false"},
        settings={"SEARCH_URL": "{upstream}/search"},
    )
    answers("WebSearch with a search configured", run, requests, "SEARCH-OVER", 2)
    result = "".join(map(str, requests[-1].results))
    check(
        "the tool result has the real page",
        "A real page" in result and "https://example.org/real" in result,
        result,
    )


def mcp_long_names():
    server = {
        "mcpServers": {
            "a_server_with_quite_a_long_name": {
                "command": sys.executable,
                "args": [os.path.join(HERE, "mcp_server.py")],
            }
        }
    }
    names = [
        "mcp__a_server_with_quite_a_long_name__" + name
        for name in (
            "look_up_the_answer_in_the_big_book_of_answers_one",
            "look_up_the_answer_in_the_big_book_of_answers_two",
        )
    ]

    def script(request):
        if request.round:
            return [say("MCP-DONE")]
        long = [
            t["function"]["name"]
            for t in request.body["tools"]
            if "book of answers" in t["function"].get("description", "")
        ]
        return [call(long[-1], question="why")]

    run, requests = session(
        script,
        "--mcp-config",
        json.dumps(server),
        *STREAM_JSON,
        env={"ENABLE_TOOL_SEARCH": "false"},
    )
    answers(
        "an MCP tool with a name of %d characters is called" % len(names[-1]),
        run,
        requests,
        "MCP-DONE",
        2,
    )
    check(
        "the upstream sees at most 64 characters, all different",
        all(len(n) <= 64 for n in requests[0].tool_names)
        and len(set(requests[0].tool_names)) == len(requests[0].tool_names),
        requests[0].tool_names,
    )
    check(
        "the client sees the call under its real name",
        '"name":"%s"' % names[-1] in run.out,
        seen(run, requests),
    )
    check(
        "and its result comes back",
        "two answers why" in str(requests[-1].results),
        requests[-1].results,
    )
    extends("MCP: the second request extends the first", requests)


def json_schema():
    schema = {
        "type": "object",
        "properties": {"colour": {"type": "string"}},
        "required": ["colour"],
    }
    run, requests = session(
        rounds([call("StructuredOutput", colour="blue")], [say("done")]),
        "--json-schema",
        json.dumps(schema),
        "--output-format",
        "json",
    )
    result = json_lines(run.out)[-1] if run.out else {}
    check(
        "--json-schema works",
        run.code == 0 and result.get("structured_output") == {"colour": "blue"},
        seen(run, requests),
    )


# Errors, as the user sees them


def errors():
    good = [say("RECOVERED")]
    table = (
        # name, replies, exit code, words shown, most upstream requests, most seconds
        (
            "401: shown at once, names the setting",
            [fail(401, "Incorrect API key provided: sk-up*cret.", code="invalid_api_key")],
            1,
            ["TARGET_API_KEY"],
            1,
            20,
        ),
        (
            "402: shown once",
            [fail(402, "Insufficient Balance", "unknown_error")],
            1,
            ["Insufficient Balance"],
            1,
            20,
        ),
        (
            "billing in a 429: shown once, never retried",
            [
                fail(
                    429,
                    "You exceeded your current quota, please check your plan "
                    "and billing details.",
                    "insufficient_quota",
                    "insufficient_quota",
                )
            ],
            1,
            ["quota"],
            1,
            20,
        ),
        (
            "404: the missing model is named",
            [
                fail(
                    404,
                    "The model `scripted-model` does not exist or you do not have access to it.",
                    code="model_not_found",
                )
            ],
            1,
            ["scripted-model", "does not exist"],
            2,
            20,
        ),
        (
            "an unknown 400 goes out once",
            [fail(400, "The moon is in the wrong phase.")],
            1,
            ["wrong phase"],
            1,
            20,
        ),
        (
            "an unknown 422 goes out once",
            [fail(422, "The moon is in the wrong phase.")],
            1,
            ["wrong phase"],
            1,
            20,
        ),
        (
            "403: shown at once",
            [
                fail(
                    403,
                    "Country, region, or territory not supported",
                    code="unsupported_country_region_territory",
                )
            ],
            1,
            ["not supported"],
            1,
            20,
        ),
        (
            "429 with Retry-After, then an answer",
            [
                fail(429, "Rate limit reached", "requests", "rate_limit_exceeded", retry_after=1),
                good,
            ],
            0,
            ["RECOVERED"],
            2,
            40,
        ),
        (
            "500, then an answer",
            [fail(500, "The server had an error", "server_error"), good],
            0,
            ["RECOVERED"],
            2,
            40,
        ),
        (
            "503, then an answer",
            [fail(503, "The engine is overloaded", "server_error"), good],
            0,
            ["RECOVERED"],
            2,
            40,
        ),
    )
    for name, replies, code, words, most, seconds in table:
        run, requests = session(attempts(*replies))
        text = run.out + run.err
        check(
            name,
            run.code == code
            and all(w in text for w in words)
            and len(requests) <= most
            and run.seconds < seconds
            and "sk-upstream-secret" not in text,
            seen(run, requests),
        )


def context_overflow():
    text = (
        "This model's maximum context length is 128000 tokens. However, your messages resulted in 130012 tokens. "
        "Please reduce the length of the messages."
    )

    def script(request):
        if "SUMMARY-9" in request.raw:
            return [say("AFTER-COMPACTION")]
        if request.number == 0:
            return [say("Earlier answer. " * 40)]
        return (
            fail(400, text, code="context_length_exceeded")
            if request.number == 1
            else [say("<summary>SUMMARY-9</summary>")]
        )

    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as home, Scripted(
        script
    ) as upstream, ccfix(upstream.url) as url:
        where = {"cwd": work, "home": home}
        claude(url, "-p", "first question", **where)
        run = claude(url, "-p", "second question", "--continue", **where)
    extends(
        "--continue in a new process: the request extends the last one's", upstream.requests[:2]
    )
    answers(
        "context overflow: the client compacts and goes on",
        run,
        upstream.requests,
        "AFTER-COMPACTION",
        4,
    )


def overflow_at_once():
    run, requests = session(
        attempts(
            fail(
                400,
                "This model's maximum context length is 4096 tokens. However, you requested 14012 tokens "
                "(13012 in the messages, 1000 in the completion).",
                code="context_length_exceeded",
            )
        )
    )
    check(
        "an overflow in the first turn is called too long",
        run.code == 1 and "too long" in run.out.lower() and len(requests) <= 4,
        seen(run, requests),
    )


# Upstreams that are slow, or die


def dies_in_text():
    run, requests = session(
        attempts([say("The first half of a story, "), cut()], [say("SECOND-HALF.")])
    )
    answers(
        "the upstream dies in a text: the session is completed", run, requests, "SECOND-HALF", 2
    )


def dies_in_thinking():
    run, requests = session(attempts([think("I was thinking of "), cut()], [say("SECOND-TRY.")]))
    answers(
        "the upstream dies while it thinks: the session is completed", run, requests, "SECOND-TRY"
    )
    check("with at most three requests", len(requests) <= 3, seen(run, requests))


def dies_in_tool_call():
    with tempfile.TemporaryDirectory() as work:
        step = {"command": "echo ran >> ran.txt", "description": "a step"}
        run, requests = session(
            attempts([call("Bash", 20, **step), cut()], [call("Bash", **step)], [say("CALL-DONE")]),
            cwd=work,
        )
        answers(
            "the upstream dies in a tool call: the client streams again",
            run,
            requests,
            "CALL-DONE",
            3,
        )
        check("the tool ran once", read(work, "ran.txt") == "ran\n", seen(run, requests))
        check(
            "the second try is streamed, and the same",
            requests[1].body.get("stream") is True and requests[1].messages == requests[0].messages,
            seen(run, requests),
        )


def dies_in_second_call():
    with tempfile.TemporaryDirectory() as work:
        first, second = (
            {"command": "echo %s >> ran.txt" % word, "description": "a step"}
            for word in ("step-1", "step-2")
        )

        def script(request):
            if request.number == 0:
                return [call("Bash", **first), call("Bash", 20, **second), cut()]
            if request.round and "step-2" in request.raw:
                return [say("CALLS-DONE")]
            return (
                [call("Bash", **second)]
                if request.round
                else [call("Bash", **first), call("Bash", **second)]
            )

        run, requests = session(script, cwd=work)
        answers(
            "the upstream dies in the second of two calls: the session is completed",
            run,
            requests,
            "CALLS-DONE",
        )
        check(
            "each tool ran once",
            read(work, "ran.txt") == "step-1\nstep-2\n",
            lambda: read(work, "ran.txt") + seen(run, requests)(),
        )


def dies_before_it_answers():
    run, requests = session(attempts([cut()], [say("SECOND-TRY.")]))
    answers(
        "the upstream dies before it says anything: the session is completed",
        run,
        requests,
        "SECOND-TRY",
    )


def silent_upstream():
    run, requests = session(rounds([wait(20), say("LATE"), wait(7), say(" BUT HERE")]))
    answers(
        "20 s of silence before the first byte, 7 s in the text", run, requests, "LATE BUT HERE", 1
    )


if __name__ == "__main__":
    run_table(
        [
            plain_text,
            model_names,
            thinking,
            demo,
            tool_loop,
            tool_loop_default_model,
            parallel_tools,
            subagent,
            image_read,
            tool_search,
            web_search,
            web_search_configured,
            mcp_long_names,
            json_schema,
            errors,
            context_overflow,
            overflow_at_once,
            dies_in_text,
            dies_in_thinking,
            dies_in_tool_call,
            dies_in_second_call,
            dies_before_it_answers,
            silent_upstream,
        ]
    )
