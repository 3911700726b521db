"""A real model server (llama.cpp), ccfix before it, and the real client through both.

The model is tiny: what it decides is never asserted, only that each protocol is kept.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.parse

from harness import (
    SHARED,
    ccfix,
    check,
    claude,
    get,
    json_lines,
    post,
    run_table,
    sse_events,
    stop,
    wait_for,
)

MODEL = "smollm2-135m"
SYSTEM = (
    "You are a helper. "
    + "Answer in one short sentence, and stay friendly whatever is asked. " * 30
)
TOOL = {
    "name": "get_weather",
    "description": "The weather at a place.",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "place": {"type": "string", "minLength": 1},
            "days": {"type": ["integer", "null"], "default": 1},
        },
        "required": ["place"],
    },
}


@contextlib.contextmanager
def llama(*options):
    """Run the server; yield its base URL (http://127.0.0.1:N/v1)."""
    command = [
        sys.executable,
        os.path.join(SHARED, "tools", "start_upstream.py"),
        "--model",
        MODEL,
        *options,
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, universal_newlines=True
    )
    try:
        url = process.stdout.readline().strip()
        if not url.startswith("http"):
            raise RuntimeError("the model server did not start")
        yield url
    finally:
        stop(process)
        process.stdout.close()


def question(*texts, **fields):
    """A request; the texts are user and assistant turns in alternation."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
    return dict(
        {"model": "claude-opus-5-5", "max_tokens": 30, "system": SYSTEM, "messages": messages},
        **fields,
    )


def in_grammar(events):
    """Whether events are one whole Anthropic message: start, blocks 0, 1, ... one at a time, delta, stop."""
    kinds = " ".join(
        "%s%s" % (e["type"], e.get("index", "")) for e in events if e["type"] != "ping"
    )
    blocks = len(set(re.findall(r"block_start(\d+)", kinds)))
    shape = "message_start " + "".join(
        "content_block_start%d (content_block_delta%d )*content_block_stop%d " % (i, i, i)
        for i in range(blocks)
    )
    return re.match(shape + "message_delta message_stop$", kinds) is not None


def messages(url, body, **options):
    return post(url + "/v1/messages", body, **options)


def real_client(url):
    run = claude(
        url,
        "-p",
        "Say hello.",
        "--system-prompt",
        "You are a helper.",
        "--tools",
        "",
        "--output-format",
        "json",
        env={"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "150"},
    )
    result = (json_lines(run.out) or [{}])[-1]
    check(
        "the real client gets the real model's answer",
        run.code == 0 and result.get("result") and not result.get("is_error"),
        run.out + run.err,
    )
    tokens = result.get("usage", {})
    check(
        "with usage",
        tokens.get("input_tokens", 0) + tokens.get("cache_read_input_tokens", 0) > 50
        and tokens.get("output_tokens", 0) > 0,
        tokens,
    )


def turns(url):
    first = messages(url, question("What is the capital of France?"))
    ok = check(
        "not streamed: a message",
        first.status == 200
        and first.body["type"] == "message"
        and first.body["content"]
        and first.body["usage"]["output_tokens"] > 0,
        first,
    )
    said = first.body["content"][0].get("text", "") if ok else "Paris."
    second = messages(
        url,
        question("What is the capital of France?", said or "Paris.", "And of Spain?", stream=True),
    )
    events = sse_events(second.raw)
    check("streamed: a whole message", second.status == 200 and in_grammar(events), second.raw)
    told = [e["usage"] for e in events if e["type"] == "message_delta"] or [{}]
    check(
        "the second turn finds the first in the server's cache",
        told[-1].get("cache_read_input_tokens", 0) > 200,
        told,
    )
    check(
        "and cached tokens are not counted twice", 0 < told[-1].get("input_tokens", 0) < 200, told
    )
    cut = messages(url, question("Count from 1 to 100.", max_tokens=5))
    check(
        "a cut answer says so", cut.status == 200 and cut.body["stop_reason"] == "max_tokens", cut
    )


def tools(url):
    for choice in (
        {"type": "auto"},
        {"type": "any"},
        {"type": "tool", "name": "get_weather"},
        {"type": "none"},
    ):
        for stream in (False, True):
            body = question(
                "What is the weather in Ulm?",
                tools=[TOOL],
                tool_choice=choice,
                stream=stream,
                max_tokens=60,
                system="Be short.",
            )
            answer = messages(url, body)
            kept = answer.status == 200 and (
                in_grammar(sse_events(answer.raw))
                if stream
                else answer.body["stop_reason"] in ("end_turn", "tool_use", "max_tokens")
            )
            # llama.cpp answers 500 when the tiny model writes what its own grammar refuses: an honest error is right then
            honest = answer.status >= 500 and answer.body["type"] == "error"
            check(
                "tool choice %s, %s"
                % (json.dumps(choice), "streamed" if stream else "not streamed"),
                kept or honest,
                answer,
            )
    history = [
        {"role": "user", "content": "What is the weather in Ulm?"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}}],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "Sunny."}],
        },
    ]
    answer = messages(url, question(messages=history, tools=[TOOL], system="Be short."))
    check(
        "a turn with a tool result",
        answer.status == 200 and answer.body["type"] == "message",
        answer,
    )


def overflow(url):
    for stream in (False, True):
        answer = messages(url, question("many words and more of them " * 3000, stream=stream))
        told = (answer.body or {}).get("error", {})
        check(
            "a prompt too long for the real server, %s"
            % ("streamed" if stream else "not streamed"),
            answer.status == 400
            and re.match(r"prompt is too long: \d+ tokens > \d+ maximum", told.get("message", "")),
            answer,
        )


def json_reply(url):
    schema = {
        "type": "object",
        "properties": {"title": {"type": "string"}},
        "required": ["title"],
        "additionalProperties": False,
    }
    answer = messages(
        url,
        question(
            "Title this: the cat sat on the mat.",
            system="Be short.",
            max_tokens=60,
            output_config={"format": {"type": "json_schema", "schema": schema}},
        ),
    )
    text = (
        "".join(block.get("text", "") for block in answer.body.get("content", ()))
        if answer.status == 200
        else ""
    )
    check(
        "a reply in the form of a JSON schema",
        answer.status == 200
        and (
            answer.body["stop_reason"] == "max_tokens"
            or isinstance(json.loads(text).get("title"), str)
        ),
        answer,
    )


def native(upstream):
    """The server's own Anthropic API behind ccfix."""
    with ccfix(
        upstream,
        model=MODEL,
        env={"TARGET_FORMAT": "anthropic", "DISGUISE_MODEL": "claude-opus-5-5"},
    ) as url:
        whole = messages(url, question("What is the capital of France?"))
        check(
            "native, not streamed: a message under the disguise",
            whole.status == 200
            and whole.body["type"] == "message"
            and whole.body["model"] == "claude-opus-5-5"
            and whole.body["content"],
            whole,
        )
        streamed = messages(url, question("What is the capital of France?", stream=True))
        check(
            "native, streamed: a whole message",
            streamed.status == 200 and in_grammar(sse_events(streamed.raw)),
            streamed.raw,
        )
        count = post(url + "/v1/messages/count_tokens", question("What is the capital of France?"))
        check(
            "native: the server's own count",
            count.status == 200 and count.body["input_tokens"] > 100,
            count,
        )
        tools(url)
        overflow(url)


def busy(upstream):
    slots = get(upstream[: -len("/v1")] + "/slots").body
    return any(slot["is_processing"] for slot in slots)


def hang_up(url, upstream):
    """A client that leaves in the middle of a stream frees the server's slot."""
    body = json.dumps(
        question(
            "Write a long story about a ship.",
            stream=True,
            max_tokens=3000,
            system="Write at length.",
        )
    ).encode()
    where = urllib.parse.urlsplit(url)
    with socket.create_connection((where.hostname, where.port)) as s:
        s.sendall(
            b"POST /v1/messages HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (where.netloc.encode(), len(body), body)
        )
        got = b""
        while b"content_block_delta" not in got:
            more = s.recv(65536)
            if not more:
                break
            got += more
        check(
            "the server works while the client listens",
            b"content_block_delta" in got and busy(upstream),
            got,
        )
    start = time.monotonic()
    try:
        wait_for(lambda: not busy(upstream), 2, "a free slot")
        check("a client that hangs up frees the slot (%.1f s)" % (time.monotonic() - start), True)
    except TimeoutError as error:
        check("a client that hangs up frees the slot", False, error)


def with_one_server():
    with llama() as upstream:
        # A tiny model repeats its sentence until it is cut, and the client then asks again: end it after the first.
        with ccfix(upstream, model=MODEL, env={"EXTRA_BODY": '{"stop": [".", "\\n\\n"]}'}) as url:
            real_client(url)
        with ccfix(upstream, model=MODEL) as url:
            for part in (turns, tools, json_reply, overflow):
                part(url)
            hang_up(url, upstream)
        native(upstream)


def wrong_key():
    with llama("--api-key", "the-right-key") as upstream:
        with ccfix(upstream, model=MODEL, key="a-wrong-key") as url:
            answer = messages(url, question("Hello."))
        told = (answer.body or {}).get("error", {})
        check(
            "a key that the real server refuses: 401, once, and which setting to mend",
            answer.status == 401
            and told.get("type") == "authentication_error"
            and "TARGET_API_KEY" in told.get("message", "")
            and answer.headers.get("x-should-retry") == "false"
            and "a-wrong-key" not in answer.raw,
            answer,
        )
        with ccfix(upstream, model=MODEL, key="the-right-key") as url:
            answer = messages(url, question("Hello."))
        check("and the right one is accepted", answer.status == 200, answer)


if __name__ == "__main__":
    run_table(with_one_server, wrong_key)
