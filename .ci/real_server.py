"""A real model server (llama.cpp), ccfix before it, and the real client through both.

The model is tiny: what it decides is never asserted, only that each protocol is kept.
"""

import json
import re
import socket
import time
import urllib.parse

import oracle
from harness import ccfix, check, claude, get, json_lines, llama, post, run_table, wait_for

MODEL = "smollm2-135m"
CAPITAL = "What is the capital of France?"
SYSTEM = "You are a helper. "
SYSTEM += "Answer in one short sentence, and stay friendly whatever is asked. " * 30
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
TITLE = {"type": "object", "additionalProperties": False, "required": ["title"]}
TITLE["properties"] = {"title": {"type": "string"}}


def question(*texts, **fields):
    """A request; the texts are user and assistant turns in alternation."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    body = {"model": "claude-opus-5-5", "max_tokens": 30, "system": SYSTEM, "messages": turns}
    return dict(body, **fields)


def ask(url, *texts, **fields):
    return post(url + "/v1/messages", question(*texts, **fields))


def is_message(answer):
    return answer.status == 200 and answer.body["type"] == "message"


def is_stream(answer):
    return answer.status == 200 and oracle.is_whole(answer.raw)


def message_of(answer):
    """The message of an error."""
    return (answer.body or {}).get("error", {}).get("message", "")


def real_client(url):
    args = ("--system-prompt", "You are a helper.", "--tools", "", "--output-format", "json")
    env = {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "150"}
    run = claude(url, "-p", "Say hello.", *args, env=env)
    result = (json_lines(run.out) or [{}])[-1]
    good = run.code == 0 and result.get("result") and not result.get("is_error")
    check("the real client gets the real model's answer", good, run.out + run.err)
    used = result.get("usage", {})
    asked = used.get("input_tokens", 0) + used.get("cache_read_input_tokens", 0)
    check("with usage", asked > 50 and used.get("output_tokens", 0) > 0, used)


def turns(url):
    first = ask(url, CAPITAL)
    good = is_message(first) and first.body["content"] and first.body["usage"]["output_tokens"] > 0
    check("not streamed: a message", good, first)
    said = first.body["content"][0].get("text") if good else ""
    second = ask(url, CAPITAL, said or "Paris.", "And of Spain?", stream=True)
    check("streamed: a whole message", is_stream(second), second.raw)
    events = oracle.sse_events(second.raw)
    told = [event["usage"] for event in events if event["type"] == "message_delta"] or [{}]
    name = "the second turn finds the first in the server's cache"
    check(name, told[-1].get("cache_read_input_tokens", 0) > 200, told)
    fresh = told[-1].get("input_tokens", 0)
    check("and cached tokens are not counted twice", 0 < fresh < 200, told)
    cut = ask(url, "Count from 1 to 100.", max_tokens=5)
    good = is_message(cut) and cut.body["stop_reason"] == "max_tokens"
    check("a cut answer says so", good, cut)


def tools(url):
    fields = {"tools": [TOOL], "system": "Be short.", "max_tokens": 60}
    named = {"type": "tool", "name": "get_weather"}
    for choice in ({"type": "auto"}, {"type": "any"}, named, {"type": "none"}):
        for how, stream in (("not streamed", False), ("streamed", True)):
            answer = ask(url, "The weather in Ulm?", tool_choice=choice, stream=stream, **fields)
            kept = is_stream(answer) if stream else is_message(answer)
            # llama.cpp answers 500 when the tiny model writes what its own grammar refuses: an
            # honest error is right then
            honest = answer.status >= 500 and answer.body["type"] == "error"
            check("tool choice %s, %s" % (json.dumps(choice), how), kept or honest, answer)
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Sunny."}
    answer = ask(url, "The weather in Ulm?", [call], [result], **fields)
    check("a turn with a tool result", is_message(answer), answer)


def overflow(url):
    for how, stream in (("not streamed", False), ("streamed", True)):
        answer = ask(url, "many words and more of them " * 3000, stream=stream)
        told = re.match(r"prompt is too long: \d+ tokens > \d+ maximum", message_of(answer))
        name = "a prompt too long for the real server, %s" % how
        check(name, answer.status == 400 and told, answer)


def json_reply(url):
    fields = {"output_config": {"format": {"type": "json_schema", "schema": TITLE}}}
    fields.update({"system": "Be short.", "max_tokens": 60})
    answer = ask(url, "Title this: the cat sat on the mat.", **fields)
    good = is_message(answer)
    if good and answer.body["stop_reason"] != "max_tokens":
        text = "".join(block.get("text", "") for block in answer.body["content"])
        good = isinstance(json.loads(text).get("title"), str)
    check("a reply in the form of a JSON schema", good, answer)


def native(upstream):
    """The server's own Anthropic API behind ccfix."""
    env = {"TARGET_FORMAT": "anthropic", "DISGUISE_MODEL": "claude-opus-5-5"}
    with ccfix(upstream, model=MODEL, env=env) as url:
        whole = ask(url, CAPITAL)
        good = is_message(whole) and whole.body["content"]
        good = good and whole.body["model"] == "claude-opus-5-5"
        check("native, not streamed: a message under the disguise", good, whole)
        streamed = ask(url, CAPITAL, stream=True)
        check("native, streamed: a whole message", is_stream(streamed), streamed.raw)
        count = post(url + "/v1/messages/count_tokens", question(CAPITAL))
        good = count.status == 200 and count.body["input_tokens"] > 100
        check("native: the server's own count", good, count)
        tools(url)
        overflow(url)


def is_busy(upstream):
    slots = get(upstream[: -len("/v1")] + "/slots").body
    return any(slot["is_processing"] for slot in slots)


def hang_up(url, upstream):
    """A client that leaves in the middle of a stream frees the server's slot."""
    fields = {"stream": True, "max_tokens": 3000, "system": "Write at length."}
    body = json.dumps(question("Write a long story about a ship.", **fields)).encode()
    where = urllib.parse.urlsplit(url)
    head = "POST /v1/messages HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n"
    head = head % where.netloc + "Content-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection((where.hostname, where.port)) as sock:
        sock.sendall(head.encode() + body)
        got, more = b"", b"-"
        while more and b"content_block_delta" not in got:
            more = sock.recv(65536)
            got += more
        works = b"content_block_delta" in got and is_busy(upstream)
        check("the server works while the client listens", works, got)
    start = time.monotonic()
    wait_for(lambda: not is_busy(upstream), 5, "a free slot")
    took = time.monotonic() - start
    check("a client that hangs up frees the slot (%.1f s)" % took, took < 5)


def with_one_server():
    with llama() as upstream:
        # A tiny model repeats its sentence until it is cut, and the client then asks again: end it
        # after the first.
        once = {"EXTRA_BODY": '{"stop": [".", "\\n\\n"]}'}
        with ccfix(upstream, model=MODEL, env=once) as url:
            real_client(url)
        with ccfix(upstream, model=MODEL) as url:
            for part in (turns, tools, json_reply, overflow):
                part(url)
            hang_up(url, upstream)
        native(upstream)


def wrong_key():
    with llama("--api-key", "the-right-key") as upstream:
        with ccfix(upstream, model=MODEL, key="a-wrong-key") as url:
            answer = ask(url, "Hello.")
        kind = (answer.body or {}).get("error", {}).get("type")
        good = answer.status == 401 and kind == "authentication_error"
        good = good and answer.headers.get("x-should-retry") == "false"
        good = good and "TARGET_API_KEY" in message_of(answer) and "a-wrong-key" not in answer.raw
        name = "a key that the real server refuses: 401, once, and which setting to fix"
        check(name, good, answer)
        with ccfix(upstream, model=MODEL, key="the-right-key") as url:
            answer = ask(url, "Hello.")
        check("and the right one is accepted", answer.status == 200, answer)


if __name__ == "__main__":
    run_table(with_one_server, wrong_key)
