#!/usr/bin/env python3
"""A seeded fuzzer: hostile requests, upstream replies, raw HTTP, .env and settings.json, against ccfix in this process.

    python3 .ci/fuzz.py                          # about 30 s
    python3 .ci/fuzz.py --seconds 600 --seed 7   # longer, from another seed
    python3 .ci/fuzz.py --only replies --case 1234 --seed 7    # one case again

After each case: an answer in time, proper HTTP and Anthropic's stream grammar, no failure inside ccfix, no traceback in the
log, and no key in anything that came out: answers, log, log file, records, page, process title. A finding is printed with
what makes it again; exit code 1 if there is any. Standard library only, loopback only.
"""

import argparse
import copy
import glob
import io
import json
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.environ.get("CCFIX_FOLDER") or os.path.dirname(HERE))
sys.dont_write_bytecode = True
import ccfix  # noqa: E402

KEYS = {
    "upstream key": "sk-secret-upstream-0c1f",
    "proxy key": "sk-secret-proxy-77ab",
    "search password": "sk-secret-search-e2d9",
    "extra header": "sk-secret-extra-5b60",
}
PATIENCE = 5  # seconds for an answer
ODD = (
    None,
    True,
    False,
    0,
    -1,
    3,
    1e308,
    2**70,
    "",
    "x",
    "\ud83d",
    "\x00\r\n",
    "auto",
    "user",
    "system",
    "text",
    "tool_use",
    "tool_result",
    "image",
    [],
    {},
    [None],
    [[]],
    [{}],
    {"type": "text"},
    {"type": "text", "text": None},
    {"type": "tool_use", "id": 5},
    "a" * 3000,
    "<think>",
    "{\"a\":",
)
BODY = {
    "model": "claude-opus-4-5[1m]",
    "max_tokens": 32000,
    "stream": True,
    "temperature": 1,
    "top_p": 0.9,
    "stop_sequences": ["STOP"],
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=5a673;"},
        {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
    ],
    "thinking": {"type": "enabled", "budget_tokens": 8000},
    "metadata": {"user_id": "u"},
    "output_config": {
        "effort": "high",
        "format": {"type": "json_schema", "schema": {"type": "object"}},
    },
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "context_management": {"edits": []},
    "tools": [
        {
            "name": "Read",
            "description": "Reads",
            "input_schema": {
                "$schema": "x",
                "type": "object",
                "properties": {
                    "file_path": {"type": "string"},
                    "limit": {"type": ["integer", "null"]},
                    "deep": {"$ref": "#/$defs/d"},
                },
                "required": ["file_path"],
                "$defs": {"d": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/d"}]}},
            },
        },
        {"name": "mcp__a__" + "n" * 70, "input_schema": {}},
        {"name": "Late", "defer_loading": True, "input_schema": {"type": "object"}},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>2026-11-22</system-reminder>"},
                {"type": "text", "text": "read a file"},
                {
                    "type": "image",
                    "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
                },
                {
                    "type": "document",
                    "title": "t",
                    "source": {
                        "type": "base64",
                        "media_type": "application/pdf",
                        "data": "JVBERi0=",
                    },
                },
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "ccfix1.bG9jYWw.e30"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Yes."},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"file_path": "a"}},
                {
                    "type": "tool_use",
                    "id": "toolu_2",
                    "name": "Late",
                    "input": {"__unparsedToolInput": {"raw": "{"}},
                },
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [
                        {"type": "text", "text": "1"},
                        {"type": "image", "source": {"type": "url", "url": "http://x/"}},
                    ],
                },
                {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True, "content": ""},
                {"type": "text", "text": "go on"},
            ],
        },
        {"role": "system", "content": "<total_tokens>5</total_tokens>"},
        {"role": "user", "content": "and?"},
    ],
}
SEARCH = {
    "model": "m",
    "stream": True,
    "tools": [{"type": "web_search_20250305", "name": "web_search"}],
    "messages": [{"role": "user", "content": "Perform a web search for the query: x"}],
}


def chunk(finish=None, usage=None, **delta):
    body = {
        "id": "c",
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    return dict(body, usage=usage) if usage else body


def call(index, arguments, **more):
    return {
        "tool_calls": [
            dict(
                {
                    "index": index,
                    "type": "function",
                    "function": dict(
                        {"arguments": arguments},
                        **({"name": more.pop("name")} if "name" in more else {}),
                    ),
                },
                **more,
            )
        ]
    }


USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 5,
    "total_tokens": 15,
    "prompt_tokens_details": {"cached_tokens": 4},
}
REPLIES = (
    [
        chunk(role="assistant", content=""),
        chunk(content="Hel"),
        chunk(content="lo\n"),
        chunk("stop"),
        {"choices": [], "usage": USAGE},
    ],
    [
        chunk(reasoning_content="let me"),
        chunk(reasoning_content=" see"),
        chunk(content="Yes"),
        chunk(**call(0, "", id="call_1", name="Read")),
        chunk(**call(0, '{"file_')),
        chunk(**call(0, 'path": "a", "limit": null}')),
        chunk(**call(1, '{"file_path": "b"}', id="call_2", name="read")),
        chunk("tool_calls", usage=USAGE),
    ],
    [
        chunk(content="<think>a"),
        chunk(content="b</think>c"),
        chunk(
            content='<tool_call>\n{"name": "Read", "arguments": {"file_path": "x"}}\n</tool_call>'
        ),
        chunk("stop"),
    ],
    [
        chunk(
            reasoning="r", reasoning_details=[{"type": "reasoning.text", "text": "r", "index": 0}]
        ),
        chunk(
            content=[
                {"type": "thinking", "thinking": [{"text": "t"}]},
                {"type": "text", "text": "x"},
            ]
        ),
        chunk(refusal="no"),
        chunk(function_call={"name": "Read", "arguments": "{}"}),
        chunk("length"),
    ],
    [{"error": {"message": "Incorrect API key: KEY", "code": 401}}],
    [chunk(content="Hi"), {"error": {"message": "KEY overloaded", "code": 503}}],
    [
        {
            "choices": [
                {
                    "message": {
                        "role": "assistant",
                        "content": "whole",
                        "tool_calls": [
                            {"id": "a", "function": {"name": "Read", "arguments": "{}"}}
                        ],
                    },
                    "finish_reason": "stop",
                }
            ],
            "usage": USAGE,
        }
    ],
)
DOTENV = (
    'export TARGET_API_KEY="sk-secret-upstream-0c1f"\r\n',
    "TARGET_API_BASE=https://api.example.com/v1/chat/completions/\n",
    "TARGET_MODEL='a b'  # c\n",
    "PROXY_PORT=8080\n",
    "TARGET_TIMEOUT=5m\n",
    "EXTRA_BODY={\"a\": {\"b\": null}}\n",
    "EXTRA_HEADERS={\"x\": 1}\n",
    "ALLOWED_HOSTS=a,b c\n",
    "PRICES={\"m\": {\"input\": 1}}\n",
    "LOG_LEVEL=debug\n",
    "\ufeffCACHE_ENABLED=yes\n",
    "MAX_CONTEXT=1e9\n",
    "SEARCH_URL=http://u:sk-secret-search-e2d9@h/\n",
    "PROXY_HOST=::1\n",
    "CACHE_TTL=\n",
)
RAW = (
    b"POST /v1/messages?beta=true HTTP/1.1\r\nHost: localhost\r\nx-api-key: PROXYKEY\r\nContent-Type: application/json\r\nContent-Length: 68\r\n\r\n"
    b'{"model":"m","stream":true,"messages":[{"role":"user","content":"x"}]}',
    b"GET /v1/models/x%0d%0aa HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer PROXYKEY\r\nConnection: keep-alive\r\n\r\n",
    b"HEAD / HTTP/1.0\r\nHost: localhost\r\nAccept: text/html\r\n\r\n",
    b"GET http://localhost/stats HTTP/1.1\r\nHost: localhost\r\nx-api-key: PROXYKEY\r\n\r\n",
    b"POST /cache/clear HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nx-api-key: PROXYKEY\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
)
TOKENS = (
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\n\r\n",
    b"\x00",
    b" ",
    b"\t",
    b":",
    b"Content-Length: 5\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Host: evil.test\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: close\r\n",
    b"\xff\xfe",
    b"HTTP/0.9",
    b"//",
    b"http://",
    b"%00",
    b"data: ",
    b"[DONE]",
    b"event: error\n",
    b"\xef\xbb\xbf",
    b"{",
    b"[",
    b"\"",
    b"\\u",
    b"1e999",
    b"NaN",
    b"5\r\n",
    b"0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b";",
    b"A" * 5000,
)


# ---- mutations ---------------------------------------------------------------------------------------


def places(value, path=()):
    """Paths of all values in a JSON value."""
    for key, part in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value) if isinstance(value, list) else ()
    ):
        yield path + (key,)
        for deeper in places(part, path + (key,)):
            yield deeper


def mutated(rng, value):
    """A copy of a JSON value with one to four changes."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        paths = list(places(value))
        if not paths:
            return value
        path = rng.choice(paths)
        part = value
        for key in path[:-1]:
            part = part[key]
        key, what = path[-1], rng.randrange(7)
        if what == 0:
            del part[key]
        elif what == 1:
            part[key] = [part[key]]
        elif what == 2 and isinstance(part, list):
            part.insert(rng.randrange(len(part) + 1), copy.deepcopy(rng.choice(part)))
        elif what == 3 and isinstance(part, list):
            rng.shuffle(part)
        elif what == 4 and isinstance(part, dict):
            part[
                rng.choice(
                    (
                        "type",
                        "id",
                        "content",
                        "name",
                        "text",
                        "error",
                        "usage",
                        "\u2028",
                        "",
                        "role",
                    )
                )
            ] = copy.deepcopy(rng.choice(ODD))
        elif what == 5:
            other = value
            for step in rng.choice(paths):
                other = (
                    other[step]
                    if isinstance(other, (dict, list))
                    and (
                        step in other
                        if isinstance(other, dict)
                        else isinstance(step, int) and step < len(other)
                    )
                    else other
                )
            part[key] = copy.deepcopy(other)
        else:
            part[key] = copy.deepcopy(rng.choice(ODD))
    return value


def scratched(rng, raw):
    """Bytes with one to four changes."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, what = rng.randrange(len(raw) + 1), rng.randrange(6)
        end = min(len(raw), at + rng.choice((1, 1, 2, 8, 100)))
        if what == 0:
            del raw[at:end]
        elif what == 1:
            raw[at:end] = rng.choice(TOKENS)
        elif what == 2:
            raw[at:at] = rng.choice(TOKENS)
        elif what == 3:
            raw[at:at] = raw[at:end] * rng.choice((1, 2, 50))
        elif what == 4 and raw:
            raw[min(at, len(raw) - 1)] = rng.randrange(256)
        else:
            del raw[at:]
    return bytes(raw)


# ---- the oracle --------------------------------------------------------------------------------------


class Finding(Exception):
    """A case that must not be."""


def demand(condition, what):
    if not condition:
        raise Finding(what)


def stream_fault(raw):
    """What is wrong with an SSE body, or "". One that was cut is right only in a tool call."""
    state, open_kind, index, cut = "start", None, -1, raw.endswith(b"CUT")
    for part in (raw[:-3] if cut else raw).decode("ascii").split("\n\n")[:-1]:
        name, _, data = part.partition("\ndata: ")
        event = json.loads(data)
        kind = event["type"]
        if name != "event: " + kind or "\n" in data:
            return "bad framing of %r" % part[:100]
        if kind == "ping":
            continue
        steps = {
            "message_start": ("start", not open_kind),
            "content_block_start": ("open", not open_kind and event.get("index") == index + 1),
            "content_block_delta": ("open", open_kind and event.get("index") == index),
            "content_block_stop": ("open", open_kind and event.get("index") == index),
            "message_delta": ("open", not open_kind),
            "message_stop": ("ending", True),
            "error": ("open", not open_kind),
        }
        if kind not in steps or steps[kind][0] != state or not steps[kind][1]:
            return "%s in state %s, block %s" % (kind, state, open_kind)
        if kind == "content_block_start":
            open_kind, index = event["content_block"]["type"], index + 1
        elif kind == "content_block_stop":
            open_kind = None
        state = {
            "message_start": "open",
            "message_delta": "ending",
            "message_stop": "done",
            "error": "done",
        }.get(kind, state)
    if cut:
        return "" if open_kind == "tool_use" else "cut with block %s open" % open_kind
    return "" if state == "done" else "ends in state " + state


def answers_in(raw, heads=()):
    """[(status, headers, body)] of what a connection gave; Finding when that is no proper HTTP. heads: whether each request was a HEAD."""
    found = []
    while raw:
        head, mark, rest = raw.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        demand(
            mark and re.match(br"HTTP/1\.1 [1-5]\d\d [ -~]*\Z", lines[0]),
            "no status line: %r" % raw[:100],
        )
        demand(
            all(re.match(br"[A-Za-z-]+: [\t -~]*\Z", line) for line in lines[1:]),
            "odd header in %r" % head,
        )
        headers = {
            line.split(b": ")[0].lower().decode(): line.split(b": ", 1)[1].decode()
            for line in lines[1:]
        }
        status = int(lines[0][9:12])
        if status == 100:
            raw = rest
            continue
        demand(len(headers) == len(lines) - 1, "a header twice in %r" % head)
        demand(re.match(r"req_[0-9a-f]{24}\Z", headers.get("request-id", "")), "no request-id")
        body = rest
        if headers.get("transfer-encoding") == "chunked":
            body, rest = dechunked(rest)
        elif "content-length" in headers:
            size = int(headers["content-length"])
            is_head = rest[:size] and rest[:5] == b"HTTP/" or not rest
            body, rest = (b"", rest) if is_head else (rest[:size], rest[size:])
            demand(is_head or len(body) == size, "a short body")
        else:
            rest = b""
        found.append((status, headers, body))
        raw = rest
    return found


def dechunked(raw):
    """(body, what follows); the body ends with CUT when its end did not come."""
    body = b""
    while raw:
        line, _, raw = raw.partition(b"\r\n")
        size = int(line, 16)
        body, raw = body + raw[:size], raw[size + 2 :]
        if not size:
            return body, raw
    return body + b"CUT", b""


def judge(status, headers, body):
    """Finding unless an answer is as it should be."""
    demand(b"ccfix itself failed" not in body, "failed inside: %r" % body[:300])
    if headers.get("content-type", "").startswith("text/event-stream"):
        fault = stream_fault(body)
        demand(not fault, "stream: " + fault)
    elif status >= 400 and body:
        error = json.loads(body.decode("ascii"))
        demand(
            error["type"] == "error"
            and error["error"]["type"]
            and isinstance(error["error"]["message"], str)
            and error["request_id"] == headers["request-id"],
            "error of another shape: %r" % body[:300],
        )
    elif body and headers.get("content-type") == "application/json":
        json.loads(body.decode("ascii"))


# ---- what is tested ----------------------------------------------------------------------------------


class Bed:
    """ccfix, and an upstream that answers with self.reply, in this process."""

    FAST = {
        "IDLE_SECONDS": 0.5,
        "HEAD_SECONDS": 0.3,
        "BODY_SECONDS": 0.5,
        "LINGER_SECONDS": 0.1,
    }  # what a cut request is waited for

    def __init__(self):
        self.before = {name: getattr(ccfix, name) for name in self.FAST}
        vars(ccfix).update(self.FAST)
        self.folder = tempfile.mkdtemp()
        self.upstream = socket.socket()
        self.upstream.bind(("127.0.0.1", 0))
        self.upstream.listen(64)
        self.reply = b""
        threading.Thread(target=self.accept, daemon=True).start()
        values = {
            "TARGET_API_BASE": "http://127.0.0.1:%d/v1" % self.upstream.getsockname()[1],
            "TARGET_API_KEY": KEYS["upstream key"],
            "TARGET_MODEL": "m",
            "TARGET_RETRIES": "0",
            "ANTHROPIC_API_KEY": KEYS["proxy key"],
            "SEARCH_URL": "http://u:%s@127.0.0.1:9/s" % KEYS["search password"],
            "TARGET_TIMEOUT": "2",
            "EXTRA_HEADERS": json.dumps({"x-extra": KEYS["extra header"]}),
            "RECORD_DIR": os.path.join(self.folder, "records"),
            "LOG_FILE": os.path.join(self.folder, "log"),
            "LOG_LEVEL": "debug",
        }
        settings = ccfix.Settings([("the fuzzer", values)])
        self.out = io.StringIO()
        self.proxy = ccfix.Proxy(lambda: settings, ccfix.Log(settings, self.out))
        self.server = ccfix.Server(("127.0.0.1", 0), self.proxy)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def accept(self):
        while True:
            try:
                sock, _ = self.upstream.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        try:
            with sock, sock.makefile("rb") as file:
                length = 0
                for line in iter(file.readline, b"\r\n"):
                    length = (
                        int(line.split(b":")[1])
                        if line.lower().startswith(b"content-length")
                        else length
                    )
                file.read(length)
                sock.sendall(self.reply)
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(PATIENCE)
                sock.recv(1)
        except (OSError, ValueError):
            return

    def talk(self, raw):
        """All that comes back on one connection."""
        got = b""
        with socket.create_connection(("127.0.0.1", self.server.server_port), PATIENCE) as sock:
            try:
                sock.sendall(raw)
                if b"onnection: close" not in raw:
                    sock.sendall(
                        b"\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                        if b"Expect" not in raw
                        else b""
                    )
                while True:
                    block = sock.recv(1 << 16)
                    if not block:
                        return got
                    got += block
            except ConnectionError:
                return got
            except socket.timeout:
                raise Finding("hangs after %r" % got[-100:])

    def ask(self, body, path="/v1/messages"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = (
            "POST %s HTTP/1.1\r\nHost: localhost\r\nx-api-key: %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            % (path, KEYS["proxy key"], len(data))
        )
        answers = answers_in(self.talk(head.encode() + data))
        demand(len(answers) == 1, "%d answers to one request" % len(answers))
        judge(*answers[0])
        self.no_key(answers[0][2], "an answer")
        return answers[0]

    def no_key(self, data, where):
        for name, key in KEYS.items():
            demand(key.encode() not in data, "the %s in %s" % (name, where))

    def look_around(self):
        """The log since the last look, the records, the page and the figures."""
        log = self.out.getvalue()
        self.out.seek(0)
        self.out.truncate()
        demand("Traceback" not in log, "traceback: " + log[log.find("Traceback") :][:3000])
        self.no_key(log.encode(), "the log")
        for path in glob.glob(os.path.join(self.folder, "records", "*")):
            with open(path, "rb") as file:
                self.no_key(file.read(), "a record")
            os.remove(path)

    def look_at_pages(self):
        for headers in ("Accept: text/html", "x-api-key: " + KEYS["proxy key"]):
            raw = self.talk(
                (
                    "GET / HTTP/1.1\r\nHost: localhost\r\n%s\r\nConnection: close\r\n\r\n" % headers
                ).encode()
            )
            demand(raw.startswith(b"HTTP/1.1 200"), "no page: %r" % raw[:200])
            self.no_key(raw, "the page")
        with open(os.path.join(self.folder, "log"), "rb") as file:
            self.no_key(file.read(), "the log file")
        if os.path.exists("/proc/self/cmdline"):
            for name in ("cmdline", "comm"):
                with open("/proc/self/" + name, "rb") as file:
                    self.no_key(file.read(), "the process title")

    def close(self):
        vars(ccfix).update(self.before)
        self.server.shutdown()
        self.server.server_close()
        self.upstream.close()
        if self.proxy.wires:
            self.proxy.wires[1].close()
        shutil.rmtree(self.folder, ignore_errors=True)


def sse(chunks):
    return (
        b"".join(
            b"data: " + json.dumps(part).replace("KEY", KEYS["upstream key"]).encode() + b"\n\n"
            for part in chunks
        )
        + b"data: [DONE]\n\n"
    )


def framed(raw, status="200 OK", sizes=()):
    pieces, at = [], 0
    for size in sizes or (len(raw),):
        if raw[at : at + size]:
            pieces.append(b"%x\r\n%s\r\n" % (len(raw[at : at + size]), raw[at : at + size]))
        at += size
    if raw[at:]:
        pieces.append(b"%x\r\n%s\r\n" % (len(raw[at:]), raw[at:]))
    return (
        (
            "HTTP/1.1 %s\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            % status
        ).encode()
        + b"".join(pieces)
        + b"0\r\n\r\n"
    )


def requests(rng, bed):
    """A mutated request, with a good reply."""
    bed.reply = framed(sse(rng.choice(REPLIES[:3])))
    body = mutated(rng, rng.choice((BODY, BODY, BODY, SEARCH)))
    if isinstance(body, dict) and rng.random() < 0.2:
        body["stream"] = False
    body = json.dumps(body).encode()
    if rng.random() < 0.2:
        body = scratched(rng, body)
    status = bed.ask(
        body,
        rng.choice(("/v1/messages", "/v1/messages", "/v1/messages", "/v1/messages/count_tokens")),
    )[0]
    demand(status in (200, 400), "status %d" % status)


def replies(rng, bed):
    """A good request, with a mutated reply: its JSON, its bytes, its framing, its status."""
    chunks = rng.choice(REPLIES)
    if rng.random() < 0.7:
        chunks = mutated(rng, chunks)
    if not isinstance(chunks, list):
        chunks = [chunks]
    raw = sse(chunks)
    if rng.random() < 0.4:
        raw = scratched(rng, raw)
    if rng.random() < 0.15:
        raw = json.dumps(chunks[0] if chunks else None).encode()
    status = rng.choice(
        ("200 OK",) * 6
        + (
            "400 Bad",
            "401 No",
            "429 Slow",
            "500 Oh",
            "503 Busy",
            "404 Not",
            "302 Found",
            "999 Odd",
            "204 No",
            "100 Continue",
        )
    )
    bed.reply = framed(
        raw, status, [rng.randrange(1, 60) for _ in range(rng.choice((0, 0, 3, 30)))]
    )
    if rng.random() < 0.2:
        bed.reply = scratched(rng, bed.reply)
    bed.proxy.lessons.clear()
    bed.ask(dict(BODY, stream=rng.random() < 0.8))


def raw_http(rng, bed):
    """Mutated bytes on a connection."""
    bed.reply = framed(sse(REPLIES[0]))
    raw = b"".join(rng.choice(RAW) for _ in range(rng.choice((1, 1, 2, 3)))).replace(
        b"PROXYKEY", KEYS["proxy key"].encode()
    )
    raw = scratched(rng, raw)
    got = bed.talk(raw)
    for status, headers, body in answers_in(got):
        if body != b"" and not body.startswith(b"HTTP/"):
            judge(status, headers, body)
        demand(status < 500 or status == 505, "status %d: %r" % (status, body[:300]))
    bed.no_key(got.replace(raw, b""), "an answer")


def dotenv(rng, bed):
    """A mutated .env: settings, or an error that says no key."""
    text = scratched(rng, "".join(rng.choice(DOTENV) for _ in range(6)).encode()).decode(
        "utf-8", "replace"
    )
    found = ccfix.dotenv(text)
    strayed = any(
        "sk-secret" in value
        for name, value in found.items()
        if name not in ("TARGET_API_KEY", "SEARCH_URL")
    )
    try:
        shown = json.dumps(ccfix.Settings([(".env", found)]).shown())
    except ccfix.SettingError as error:
        shown = str(error)
    if not strayed and re.search("//u:[^/@]*@h", found.get("SEARCH_URL", "//u:@h")):
        bed.no_key(shown.encode("utf-8", "replace"), "what is said of .env")


def claude_settings(rng, bed):
    """A mutated settings.json of Claude Code."""
    text = json.dumps(
        mutated(
            rng,
            {
                "env": {
                    "ANTHROPIC_BASE_URL": "http://127.0.0.1:8080",
                    "ANTHROPIC_MODEL": "m",
                    "X": 1,
                },
                "permissions": {"allow": ["Bash"]},
            },
        )
    )
    text = scratched(rng, text.encode()).decode("utf-8", "replace") if rng.random() < 0.5 else text
    try:
        ccfix.Settings([("settings.json", ccfix.claude_layer(text))]).shown()
    except ccfix.SettingError:
        pass


TARGETS = {
    "requests": requests,
    "replies": replies,
    "raw": raw_http,
    "dotenv": dotenv,
    "claude": claude_settings,
}
ORDER = ("requests", "replies", "raw", "replies", "requests", "raw", "dotenv", "claude")


def run(seed, seconds, only="", case=None, most=None, tell=print):
    """(cases, findings) of one run; case: only that one."""
    bed, end, number, findings = Bed(), time.monotonic() + seconds, 0, []
    try:
        while (case is None and time.monotonic() < end and (most is None or number < most)) or (
            case is not None and not number
        ):
            number += 1
            which = number if case is None else case
            name = only or ORDER[which % len(ORDER)]
            rng, began = random.Random("%s %s %d" % (seed, name, which)), time.monotonic()
            try:
                TARGETS[name](rng, bed)
                bed.look_around()
                demand(
                    time.monotonic() - began < PATIENCE, "took %.1f s" % (time.monotonic() - began)
                )
            except Exception as error:
                findings.append(
                    "%s, --only %s --case %d --seed %s: %s: %s"
                    % (name, name, which, seed, type(error).__name__, error)
                )
                tell("FOUND " + findings[-1][:3500])
                bed.out.seek(0)
                bed.out.truncate()
                if len(findings) >= 20:
                    break
        try:
            bed.look_at_pages()
        except Finding as error:
            findings.append(str(error))
            tell("FOUND " + str(error))
    finally:
        bed.close()
    return number, findings


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--only", default="", choices=[""] + sorted(TARGETS))
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    cases, findings = run(options.seed, options.seconds, options.only, options.case)
    print("%d cases, seed %s, %d findings" % (cases, options.seed, len(findings)))
    print("%d passed, %d failed, 0 skipped" % (cases - len(findings), len(findings)))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
