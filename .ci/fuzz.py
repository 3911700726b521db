#!/usr/bin/env python3
"""A seeded fuzzer: hostile requests, replies, raw HTTP, .env and settings.json, and sessions that
must not mix, against ccfix in this process.

    python3 .ci/fuzz.py                          # about 30 s
    python3 .ci/fuzz.py --seconds 600 --seed 7   # longer, from another seed
    python3 .ci/fuzz.py --only replies --case 1234 --seed 7    # one case again

After each case: an answer in time, proper HTTP and Anthropic's stream grammar, no failure inside
ccfix, no traceback in the log, and no key in anything that came out: answers, log, log file,
records, page, process title; and floods cost time, output and memory in proportion to their length.
A finding is printed with what makes it again; the exit code is then 1. Standard library only,
loopback only, Python 3.6 or newer: test_ccfix.py runs a slice of it.
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
import tracemalloc

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.environ.get("CCFIX_FOLDER") or os.path.dirname(HERE), HERE]
sys.dont_write_bytecode = True
import ccfix  # noqa: E402
import oracle  # noqa: E402
from upstream import Upstream, chat_chunk, chunked, cut, data, sse  # noqa: E402

KEYS = {
    "upstream key": "sk-secret-upstream-0c1f",
    "proxy key": "sk-secret-proxy-77ab",
    "search password": "sk-secret-search-e2d9",
    "extra header": "sk-secret-extra-5b60",
}
PATIENCE = 5  # seconds for a case; more is a hang
ODD = (
    None,
    True,
    False,
    0,
    -1,
    3,
    1e308,
    2**70,
    10**400,
    10**4000,
    float("inf"),
    "",
    "x",
    "\ud83d",
    "\x00\r\n",
    "a" * 3000,
)
ODD += ("auto", "user", "system", "text", "tool_use", "tool_result", "image", "<think>", "{\"a\":")
ODD += ([], {}, [None], [[]], [{}], {"type": "text"}, {"type": "text", "text": None})
ODD += ({"type": "tool_use", "id": 5},)
FIELDS = ("type", "id", "content", "name", "text", "error", "usage", "\u2028", "", "role")
BODY = json.loads("""
{"model": "claude-opus-4-5[1m]", "max_tokens": 32000, "stream": true, "temperature": 1,
 "top_p": 0.9, "stop_sequences": ["STOP"], "metadata": {"user_id": "u"},
 "context_management": {"edits": []},
 "thinking": {"type": "enabled", "budget_tokens": 8000},
 "output_config": {"effort": "high", "format":
  {"type": "json_schema", "schema": {"type": "object"}}},
 "tool_choice": {"type": "auto", "disable_parallel_tool_use": true},
 "system": [
  {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=5a673;"},
  {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}}],
 "tools": [
  {"name": "Read", "description": "Reads", "input_schema": {
   "$schema": "x", "type": "object", "required": ["file_path"],
   "properties": {"file_path": {"type": "string"}, "limit": {"type": ["integer", "null"]},
    "deep": {"$ref": "#/$defs/d"}},
   "$defs": {"d": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/d"}]}}}},
  {"name": "mcp__a__LONG", "input_schema": {}},
  {"name": "Late", "defer_loading": true, "input_schema": {"type": "object"}},
  {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
 "messages": [
  {"role": "user", "content": [
   {"type": "text", "text": "<system-reminder>2026-11-22</system-reminder>"},
   {"type": "text", "text": "read a file"},
   {"type": "image", "source":
    {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
   {"type": "document", "title": "t", "source":
    {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}}]},
  {"role": "assistant", "content": [
   {"type": "thinking", "thinking": "hm", "signature": "ccfix1.bG9jYWw.e30"},
   {"type": "redacted_thinking", "data": "x"},
   {"type": "text", "text": "Yes."},
   {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"file_path": "a"}},
   {"type": "tool_use", "id": "toolu_2", "name": "Late",
    "input": {"__unparsedToolInput": {"raw": "{"}}}]},
  {"role": "user", "content": [
   {"type": "tool_result", "tool_use_id": "toolu_1", "content": [
    {"type": "text", "text": "1"},
    {"type": "image", "source": {"type": "url", "url": "http://x/"}}]},
   {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": true, "content": ""},
   {"type": "text", "text": "go on"}]},
  {"role": "system", "content": "<total_tokens>5</total_tokens>"},
  {"role": "user", "content": "and?"}]}
""".replace("LONG", "n" * 70))
SEARCH = {
    "model": "m",
    "stream": True,
    "tools": [{"type": "web_search_20250305", "name": "web_search"}],
    "messages": [{"role": "user", "content": "Perform a web search for the query: x"}],
}


def say(finish=None, usage=None, **change):
    body = chat_chunk(change, finish, id="c")
    return dict(body, usage=usage) if usage else body


def call(index, arguments, name=None, **more):
    """A chunk with a piece of a tool call."""
    function = dict({"arguments": arguments}, **({"name": name} if name else {}))
    return say(
        tool_calls=[dict({"index": index, "type": "function", "function": function}, **more)]
    )


USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
USAGE["prompt_tokens_details"] = {"cached_tokens": 4}
TAGGED = '<tool_call>\n{"name": "Read", "arguments": {"file_path": "x"}}\n</tool_call>'
DETAILS = [{"type": "reasoning.text", "text": "r", "index": 0}]
PARTS = [{"type": "thinking", "thinking": [{"text": "t"}]}, {"type": "text", "text": "x"}]
MESSAGE = {"role": "assistant", "content": "whole"}
MESSAGE["tool_calls"] = [{"id": "a", "function": {"name": "Read", "arguments": "{}"}}]
REPLIES = (
    [
        say(role="assistant", content=""),
        say(content="Hel"),
        say(content="lo\n"),
        say("stop"),
        {"choices": [], "usage": USAGE},
    ],
    [
        say(reasoning_content="let me"),
        say(reasoning_content=" see"),
        say(content="Yes"),
        call(0, "", "Read", id="call_1"),
        call(0, '{"file_'),
        call(0, 'path": "a", "limit": null}'),
        call(1, '{"file_path": "b"}', "read", id="call_2"),
        say("tool_calls", usage=USAGE),
    ],
    [say(content="<think>a"), say(content="b</think>c"), say(content=TAGGED), say("stop")],
    [
        say(reasoning="r", reasoning_details=DETAILS),
        say(content=PARTS),
        say(refusal="no"),
        say(function_call={"name": "Read", "arguments": "{}"}),
        say("length"),
    ],
    [{"error": {"message": "Incorrect API key: KEY", "code": 401}}],
    [say(content="Hi"), {"error": {"message": "KEY overloaded", "code": 503}}],
    [{"choices": [{"message": MESSAGE, "finish_reason": "stop"}], "usage": USAGE}],
)
STATUSES = ("200 OK",) * 6 + ("400 Bad", "401 No", "429 Slow", "500 Oh", "503 Busy", "404 Not")
STATUSES += ("302 Found", "999 Odd", "204 No", "100 Continue")
DOTENV = """\
export TARGET_API_KEY="sk-secret-upstream-0c1f"\r
TARGET_API_BASE=https://api.example.com/v1/chat/completions/
TARGET_MODEL='a b'  # c
PROXY_PORT=8080
TARGET_TIMEOUT=5m
EXTRA_BODY={"a": {"b": null}}
EXTRA_HEADERS={"x": 1}
ALLOWED_HOSTS=a,b c
PRICES={"m": {"input": 1}}
LOG_LEVEL=debug
\ufeffCACHE_ENABLED=yes
MAX_CONTEXT=1e9
SEARCH_URL=http://u:sk-secret-search-e2d9@h/
PROXY_HOST=::1
CACHE_TTL=
""".splitlines(True)
CLAUDE = {"ANTHROPIC_BASE_URL": "http://127.0.0.1:8080", "ANTHROPIC_MODEL": "m", "X": 1}
CLAUDE = {"env": CLAUDE, "permissions": {"allow": ["Bash"]}}
HOST, KEYED = b"Host: localhost\r\n", b"x-api-key: PROXYKEY\r\n"
QUESTION = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"x"}]}'
RAW = (
    b"POST /v1/messages?beta=true HTTP/1.1\r\n%s%sContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (HOST, KEYED, len(QUESTION), QUESTION),
    b"POST /v1/messages HTTP/1.1\r\n%s%sTransfer-Encoding: chunked\r\n\r\n%s0\r\n\r\n"
    % (HOST, KEYED, chunked(QUESTION[:30]) + chunked(QUESTION[30:])),
    b"GET /v1/models/x%%0d%%0aa HTTP/1.1\r\n%sAuthorization: Bearer PROXYKEY\r\n"
    b"Connection: keep-alive\r\n\r\n" % HOST,
    b"HEAD / HTTP/1.0\r\n%sAccept: text/html\r\n\r\n" % HOST,
    b"GET http://localhost/stats HTTP/1.1\r\n%s%s\r\n" % (HOST, KEYED),
    b"POST /cache/clear HTTP/1.1\r\n%sOrigin: http://localhost\r\n%s"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % (HOST, KEYED),
)
TOKENS = (b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\x00", b" ", b"\t", b":", b"\xff\xfe", b"A" * 5000)
TOKENS += (b"//", b"http://", b"%00", b"data: ", b"[DONE]", b"event: error\n", b"\xef\xbb\xbf")
TOKENS += (b"{", b"[", b"\"", b"\\u", b"1e999", b"NaN", b"5\r\n", b"0\r\n\r\n", b";", b"HTTP/0.9")
TOKENS += (b"Content-Length: 5\r\n", b"Content-Length: 99999999999999999999\r\n", HOST)
TOKENS += (b"Transfer-Encoding: chunked\r\n", b"Host: evil.test\r\n", b"Connection: close\r\n")
TOKENS += (b"Expect: 100-continue\r\n", b"ffffffffffffffff\r\n")


# Mutations


def paths_in(value, path=()):
    """Paths of all values in a JSON value."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield path + (key,)
            for deeper in paths_in(part, path + (key,)):
                yield deeper


def value_at(value, path):
    for key in path:
        value = value[key]
    return value


def mutate(rng, value):
    """A copy of a JSON value with one to four changes."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        paths = list(paths_in(value))
        if not paths:
            return value
        path, what = rng.choice(paths), rng.randrange(7)
        part, key = value_at(value, path[:-1]), path[-1]
        if what == 0:
            del part[key]
        elif what == 1:
            part[key] = [part[key]]
        elif what == 2 and isinstance(part, list):
            part.insert(rng.randrange(len(part) + 1), copy.deepcopy(rng.choice(part)))
        elif what == 3 and isinstance(part, list):
            rng.shuffle(part)
        elif what == 4 and isinstance(part, dict):
            part[rng.choice(FIELDS)] = copy.deepcopy(rng.choice(ODD))
        elif what == 5:
            part[key] = copy.deepcopy(value_at(value, rng.choice(paths)))
        else:
            part[key] = copy.deepcopy(rng.choice(ODD))
    return value


def scratch(rng, raw):
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


# What must hold


class Finding(Exception):
    """A case that must not be."""


def demand(condition, what):
    if not condition:
        raise Finding(what)


def answers_in(raw):
    """[(status, headers, body, whether it was cut)] of what a connection gave; Finding when that is
    not proper HTTP."""
    found = []
    while raw:
        head, mark, rest = raw.partition(b"\r\n\r\n")
        status_line, *lines = head.split(b"\r\n")
        proper = mark and re.match(br"HTTP/1\.1 [1-5]\d\d [ -~]*\Z", status_line)
        demand(proper, "no status line: %r" % raw[:100])
        for line in lines:
            demand(re.match(br"[A-Za-z-]+: [\t -~]*\Z", line), "odd header in %r" % head)
        pairs = (line.decode().split(": ", 1) for line in lines)
        headers = {name.lower(): value for name, value in pairs}
        status = int(status_line[9:12])
        if status == 100:
            raw = rest
            continue
        demand(len(headers) == len(lines), "a header twice in %r" % head)
        demand(re.match(r"req_[0-9a-f]{24}\Z", headers.get("request-id", "")), "no request-id")
        body, raw, is_cut = split_body(headers, rest)
        found.append((status, headers, body, is_cut))
    return found


def split_body(headers, rest):
    """(body, what follows, whether it was cut)."""
    if headers.get("transfer-encoding") == "chunked":
        return dechunk(rest)
    if "content-length" not in headers:
        return rest, b"", False
    size = int(headers["content-length"])
    if not rest or rest[:size] and rest[:5] == b"HTTP/":  # the answer to a HEAD has no body
        return b"", rest, False
    demand(len(rest) >= size, "a short body")
    return rest[:size], rest[size:], False


def dechunk(raw):
    body = b""
    while raw:
        line, _, raw = raw.partition(b"\r\n")
        size = int(line, 16)
        body, raw = body + raw[:size], raw[size + 2 :]
        if not size:
            return body, raw, False
    return body, b"", True


def judge(status, headers, body, is_cut, any_input=False):
    """Finding unless an answer is as it should be; any_input: as the oracle says."""
    demand(b"ccfix itself failed" not in body, "failed inside: %r" % body[:300])
    if headers.get("content-type", "").startswith("text/event-stream"):
        fault = oracle.fault(body, is_cut, any_input)
        demand(not fault, "stream: " + fault)
    elif status >= 400 and body:
        error = json.loads(body.decode("ascii"))
        good = error["type"] == "error" and error["request_id"] == headers["request-id"]
        good = good and error["error"]["type"] and isinstance(error["error"]["message"], str)
        demand(good, "error of another shape: %r" % body[:300])
    elif body and headers.get("content-type") == "application/json":
        json.loads(body.decode("ascii"))


# What is tested


class Bed:
    """ccfix, and an upstream that answers with the bytes self.reply, in this process."""

    # seconds that a request which was cut is waited for
    FAST = {"IDLE_SECONDS": 0.5, "HEAD_SECONDS": 0.3, "BODY_SECONDS": 0.5, "LINGER_SECONDS": 0.1}

    def __init__(self):
        self.before = {name: getattr(ccfix, name) for name in self.FAST}
        vars(ccfix).update(self.FAST)
        self.folder = tempfile.mkdtemp()
        self.reply = b""
        self.upstream = Upstream(lambda request: [data(self.reply), cut()], most=None).__enter__()
        values = {
            "TARGET_API_BASE": self.upstream.url,
            "TARGET_API_KEY": KEYS["upstream key"],
            "TARGET_MODEL": "m",
            "TARGET_RETRIES": "0",
            "TARGET_TIMEOUT": "2",
            "ANTHROPIC_API_KEY": KEYS["proxy key"],
            "SEARCH_URL": "http://u:%s@127.0.0.1:9/s" % KEYS["search password"],
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

    def talk(self, raw):
        """All that comes back on one connection."""
        got, last = b"", b"GET /health HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST
        with socket.create_connection(("127.0.0.1", self.server.server_port), PATIENCE) as sock:
            try:
                sock.sendall(raw)
                if b"onnection: close" not in raw and b"Expect" not in raw:
                    sock.sendall(b"\r\n\r\n" + last)
                for block in iter(lambda: sock.recv(1 << 16), b""):
                    got += block
            except ConnectionError:
                pass
            except socket.timeout:
                raise Finding("hangs after %r" % got[-100:])
        return got

    def ask(self, body, path="/v1/messages", any_input=False):
        """The one answer to a request, judged -> status."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = "POST %s HTTP/1.1\r\nHost: localhost\r\nx-api-key: %s\r\nConnection: close\r\n"
        head = head % (path, KEYS["proxy key"]) + "Content-Length: %d\r\n\r\n" % len(content)
        answers = answers_in(self.talk(head.encode() + content))
        demand(len(answers) == 1, "%d answers to one request" % len(answers))
        judge(*answers[0], any_input=any_input)
        self.no_key(answers[0][2], "an answer")
        return answers[0][0]

    def no_key(self, raw, where):
        for name, key in KEYS.items():
            demand(key.encode() not in raw, "the %s in %s" % (name, where))

    def no_key_in_file(self, path, where):
        with open(path, "rb") as file:
            self.no_key(file.read(), where)

    def look_around(self):
        """The log since the last look, and the records."""
        log = self.out.getvalue()
        self.out.seek(0)
        self.out.truncate()
        demand("Traceback" not in log, "traceback: " + log[log.find("Traceback") :][:3000])
        self.no_key(log.encode(), "the log")
        for path in glob.glob(os.path.join(self.folder, "records", "*")):
            self.no_key_in_file(path, "a record")
            os.remove(path)

    def look_at_pages(self):
        for field in ("Accept: text/html", "x-api-key: " + KEYS["proxy key"]):
            asked = "GET / HTTP/1.1\r\nHost: localhost\r\n%s\r\nConnection: close\r\n\r\n" % field
            raw = self.talk(asked.encode())
            demand(raw.startswith(b"HTTP/1.1 200"), "no page: %r" % raw[:200])
            self.no_key(raw, "the page")
        self.no_key_in_file(os.path.join(self.folder, "log"), "the log file")
        for path in ("/proc/self/cmdline", "/proc/self/comm"):
            if os.path.exists(path):
                self.no_key_in_file(path, "the process title")

    def close(self):
        vars(ccfix).update(self.before)
        self.server.shutdown()
        self.server.server_close()
        self.upstream.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)


def write_sse(chunks):
    raw = b"".join(map(sse, chunks + ["[DONE]"]))
    return raw.replace(b"KEY", KEYS["upstream key"].encode())


def frame(raw, status="200 OK", sizes=()):
    """A whole HTTP reply, its body in chunks of these sizes."""
    head = "HTTP/1.1 %s\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    parts, at = [], 0
    for size in list(sizes) + [len(raw)]:
        parts += [chunked(raw[at : at + size])] if raw[at : at + size] else []
        at += size
    return (head % status).encode() + b"".join(parts) + b"0\r\n\r\n"


def requests(rng, bed):
    """A mutated request, with a good reply."""
    bed.reply = frame(write_sse(rng.choice(REPLIES[:3])))
    body = mutate(rng, rng.choice((BODY, BODY, BODY, SEARCH)))
    if isinstance(body, dict) and rng.random() < 0.2:
        body["stream"] = False
    body = json.dumps(body).encode()
    if rng.random() < 0.2:
        body = scratch(rng, body)
    path = rng.choice(("/v1/messages",) * 3 + ("/v1/messages/count_tokens",))
    status = bed.ask(body, path)
    demand(status in (200, 400), "status %d" % status)


def replies(rng, bed):
    """A good request, with a mutated reply: its JSON, its bytes, its framing, its status."""
    chunks = rng.choice(REPLIES)
    if rng.random() < 0.7:
        chunks = mutate(rng, chunks)
    raw = write_sse(chunks)
    if rng.random() < 0.4:
        raw = scratch(rng, raw)
    if rng.random() < 0.15:
        raw = json.dumps(chunks[0] if chunks else None).encode()
    sizes = [rng.randrange(1, 60) for _ in range(rng.choice((0, 0, 3, 30)))]
    bed.reply = frame(raw, rng.choice(STATUSES), sizes)
    if rng.random() < 0.2:
        bed.reply = scratch(rng, bed.reply)
    bed.proxy.lessons.clear()
    bed.ask(dict(BODY, stream=rng.random() < 0.8), any_input=True)


def raw_http(rng, bed):
    """Mutated bytes on a connection."""
    bed.reply = frame(write_sse(REPLIES[0]))
    raw = b"".join(rng.choice(RAW) for _ in range(rng.choice((1, 1, 2, 3))))
    raw = scratch(rng, raw.replace(b"PROXYKEY", KEYS["proxy key"].encode()))
    got = bed.talk(raw)
    for status, headers, body, is_cut in answers_in(got):
        if body and not body.startswith(b"HTTP/"):
            judge(status, headers, body, is_cut)
        demand(status < 500 or status == 505, "status %d: %r" % (status, body[:300]))
    bed.no_key(got.replace(raw, b""), "an answer")


def dotenv(rng, bed):
    """A mutated .env: settings, or an error that says no key."""
    text = scratch(rng, "".join(rng.choice(DOTENV) for _ in range(6)).encode())
    found = ccfix.dotenv(text.decode("utf-8", "replace"))
    homes = ("TARGET_API_KEY", "SEARCH_URL")
    strayed = any("sk-secret" in value for name, value in found.items() if name not in homes)
    try:
        shown = json.dumps(ccfix.Settings([(".env", found)]).shown())
    except ccfix.SettingError as error:
        shown = str(error)
    if not strayed and re.search("//u:[^/@]*@h", found.get("SEARCH_URL", "//u:@h")):
        bed.no_key(shown.encode("utf-8", "replace"), "what is said of .env")


def claude_settings(rng, bed):
    """A mutated settings.json of Claude Code."""
    text = json.dumps(mutate(rng, CLAUDE))
    text = scratch(rng, text.encode()).decode("utf-8", "replace") if rng.random() < 0.5 else text
    try:
        ccfix.Settings([("settings.json", ccfix.claude_layer(text))]).shown()
    except ccfix.SettingError:
        pass


# Two sessions of one proxy, before a provider that repeats its tool ids


class Wires:
    """Stands for ccfix.Upstream. secret: of the session whose turn it is; reply: bytes to come."""

    status, headers = 200, {}

    def open(self, method, url, headers, body=None, wait=None, timeout=None):
        self.sent, self.raw = json.loads(body.decode()), self.reply(self.secret)
        return copy.copy(self)

    def blocks(self):
        return iter(self.raw)

    def finish(self):
        pass

    close = finish


def thoughtful_chat(rng, secret, ids):
    """A chat reply that thinks of the secret in any field that a provider has for it."""
    detail = {"type": rng.choice(("reasoning.text", "reasoning.encrypted")), "index": 0}
    detail["text" if detail["type"] == "reasoning.text" else "data"] = "details of " + secret
    told = [
        say(reasoning_content="thought of " + secret),
        say(reasoning="thought of " + secret),
        say(reasoning_details=[detail]),
        say(content="<think>thought of %s</think>" % secret),
    ]
    chunks = rng.sample(told, rng.randrange(1, 4))
    if rng.random() < 0.5 or not ids:
        chunks += [say(content="Done."), say(reasoning_details=[dict(detail, index=1)])]
    for index, given in enumerate(ids):
        more = {"id": given} if given else {}
        if rng.random() < 0.7:
            more["extra_content"] = {"google": {"thought_signature": "signed " + secret}}
        chunks.append(call(index, '{ "file_path": "a" }', "Read", **more))
    return [sse(chunk) for chunk in chunks + [say("tool_calls" if ids else "stop"), "[DONE]"]]


def thoughtful_messages(rng, secret, ids):
    """The same from a provider that speaks Anthropic."""
    thinking = {"type": "thinking", "thinking": "thought of " + secret, "signature": "s" + secret}
    blocks = [thinking, {"type": "text", "text": "Done."}][rng.randrange(2) :]
    blocks += [
        {"type": "tool_use", "id": given, "name": "Read", "input": {"file_path": "a"}}
        for given in ids
    ]
    reason = "tool_use" if ids else "end_turn"
    message = {"type": "message", "id": "m", "role": "assistant", "usage": {}}
    events = ccfix.unfold(dict(message, content=blocks, stop_reason=reason))
    return [ccfix.encode_event(event).encode() for event in events]


class Session:
    """A client's conversation. It keeps thinking, drops it, or moves text before calls."""

    def __init__(self, rng, proxy, wires, secret, first, headers, more):
        self.rng, self.proxy, self.wires, self.secret = rng, proxy, wires, secret
        self.headers, self.sent, self.calls = headers, [], []
        self.body = dict(BODY, messages=[{"role": "user", "content": first}], **more)
        del self.body["output_config"]  # Claude Code wants JSON of a side request alone

    def turn(self):
        """A turn, a step at each next()."""
        body = copy.deepcopy(dict(self.body, stream=self.rng.random() < 0.8))
        exchange = ccfix.Exchange(self.proxy, body, self.headers, lambda sock, seconds: False)
        batches, events = exchange.event_batches(), []
        while True:
            self.wires.secret = self.secret
            batch = next(batches, None)
            if not events and exchange.sent:
                self.sent.append(exchange.sent)
            if batch is None:
                break
            events += batch
            yield
        self.go_on(ccfix.fold(events)["content"])

    def go_on(self, content):
        how = self.rng.randrange(3)
        if how:
            content = [block for block in content if "thinking" not in block["type"]]
        if how == 2:
            content.sort(key=lambda block: block["type"] == "tool_use")
        ids = [block["id"] for block in content if block["type"] == "tool_use"]
        self.calls += ids
        demand(len(set(self.calls)) == len(self.calls), "an id twice: %s" % self.calls)
        results = [
            {"type": "tool_result", "tool_use_id": given, "content": "read by " + self.secret}
            for given in ids
        ]
        self.rng.shuffle(results)
        turns = [("assistant", content), ("user", results or "go on")]
        self.body["messages"] += [dict(role=role, content=said) for role, said in turns]


def check_sent(session, foreign):
    """Finding unless a session's requests are its own, each goes on from the one before, and each
    call has its result."""
    before = []
    for sent in session.sent:
        demand(foreign not in json.dumps(sent), "%s in the request of another" % foreign)
        messages, asked = sent["messages"], []
        demand(messages[: len(before)] == before, "no prefix: %r, %r" % (before, messages))
        for message in messages:
            asked += [made["id"] for made in message.get("tool_calls") or ()]
            if message["role"] == "tool":
                demand(message["tool_call_id"] == asked.pop(0), "a result of another call")
        demand(not asked, "calls without a result: %s" % asked)
        before = messages


def sessions(rng, bed):
    """Two sessions in turns, also at the same time: what one thinks never reaches the other."""
    profile = rng.choice(ccfix.PROFILES)
    values = {"TARGET_API_BASE": "http://127.0.0.1:9", "TARGET_MODEL": "m", "TARGET_RETRIES": "0"}
    settings = ccfix.Settings([("the fuzzer", dict(values, PROFILE=profile.name))])
    proxy, wires = ccfix.Proxy(lambda: settings, lambda level, text: None), Wires()
    proxy.wires = ({name: getattr(settings, name) for name in ccfix.TLS_SETTINGS}, wires)
    pool = rng.choice((["call_0"], ["call_0", "call_1"], ["tool_0_Read", "call_1", ""], ["x" * 70]))
    write = thoughtful_chat if profile.format == "chat" else thoughtful_messages
    how, header, pair = rng.randrange(6), "x-claude-code-session-id", []
    wires.reply = lambda secret: write(
        rng, secret, [rng.choice(pool) for _ in range(rng.choice((how == 5, 1, 1, 2)))]
    )
    for name in "ab":
        secret, first, headers, more = "SECRET-" + name, "read", {}, {"metadata": {}}
        if how == 0:
            headers = {header: name}
        elif how == 1:
            more = {"metadata": {"user_id": json.dumps({"session_id": name})}}
        elif how == 2:
            more = {"metadata": {}, "system": "You work for " + name}
        elif how < 5:  # at 5, only what they read tells them apart
            first, headers = "read " + name, {header: "claimed"} if how == 3 else {}
        pair.append(Session(rng, proxy, wires, secret, first, headers, more))
    running = {}
    for _ in range(rng.randrange(8, 40)):
        session = rng.choice(pair)
        turn = running.pop(session, None) or session.turn()
        if next(turn, turn) is None:
            running[session] = turn
    for turn in running.values():
        list(turn)
    check_sent(pair[0], pair[1].secret)
    check_sent(pair[1], pair[0].secret)


def digest(blocks, kind):
    """What the readers make of a reply's bytes -> how many go out."""
    readers, tools = {"chat": ccfix.ChatReader, "anthropic": ccfix.MessagesReader}, {}
    tools["Read"] = "Read", {"type": "object", "properties": {"file_path": {"type": "string"}}}
    writer = ccfix.MessageWriter("m", "c", lambda: "%x" % random.getrandbits(64), tools=tools)
    reader, size = readers[kind](writer, ccfix.DEFAULT), 0
    try:
        for payload in ccfix.sse_payloads(blocks):
            if payload:
                events = reader.feed(ccfix.parse_payload(payload))
                size += sum(len(ccfix.encode_event(event)) for event in events)
        size += sum(len(ccfix.encode_event(event)) for event in reader.finish())
    except (ccfix.UpstreamError, ccfix.Dropped):
        pass
    return size


def dechunk_all(blocks, kind):
    """Bytes through the two machines under the readers -> how many come out."""
    dechunker, size = ccfix.Dechunker(), 0
    try:
        for block in blocks:
            size += len(dechunker.feed(block)) if not dechunker.done else 0
        size += sum(map(len, ccfix.inflate(blocks)))
    except (ValueError, ccfix.zlib.error):
        pass
    return size


def seconds_of(act, *given):
    began = time.process_time()
    act(*given)
    return time.process_time() - began


def floods(rng, bed):
    """A few pieces of a reply again and again: time grows as they do, output and memory stay a
    small multiple of what came."""
    if rng.random() < 0.5:
        act, chunks = digest, [mutate(rng, rng.choice(rng.choice(REPLIES))) for _ in "123"]
        unit = write_sse(chunks[: rng.randrange(1, 4)]).replace(b"data: [DONE]\n\n", b"")
    else:
        act, unit = rng.choice((digest, dechunk_all)), b"".join(
            rng.choice(TOKENS) for _ in range(rng.choice((1, 1, 2, 3)))
        )
    front = rng.choice((b"", b"data: ", b"1;", b"5\r\n", write_sse(rng.choice(REPLIES))[:-14]))
    step, kind = rng.choice((1, 7, 16384)), rng.choice(("chat", "chat", "anthropic"))

    def blocks(size):
        raw = front + unit * (size // len(unit) + 1)
        return [raw[at : at + step] for at in range(0, len(raw), step)]

    size = 100000 if step > 1 else 20000
    for _ in range(3):
        large = seconds_of(act, blocks(4 * size), kind)
        small = seconds_of(act, blocks(size), kind) if large > 0.3 else large
        if large <= 6 * small:
            break
    demand(large <= 6 * small, "%.2f s, then %.2f s for 4 times %r" % (small, large, unit[:200]))
    given = blocks(4 * size)
    came = sum(map(len, given))
    tracemalloc.start()
    try:
        out = act(given, kind)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    demand(out <= 10 * came + 1000000, "%d bytes made of %d of %r" % (out, came, unit[:200]))
    demand(peak <= 20 * came + 5000000, "%d bytes kept of %d of %r" % (peak, came, unit[:200]))


TARGETS = {"requests": requests, "replies": replies, "raw": raw_http, "floods": floods}
TARGETS.update({"dotenv": dotenv, "claude": claude_settings, "sessions": sessions})
ORDER = ("requests", "replies", "raw", "replies", "requests", "raw", "dotenv")
ORDER += ("claude",) + ORDER + ("sessions",)
ORDER = ORDER * 2 + ("floods",)


def numbers(case, seconds, most):
    """The cases to run: one, or as many as the time and the limit allow."""
    if case is not None:
        yield case
        return
    number, end = 0, time.monotonic() + seconds
    while time.monotonic() < end and (most is None or number < most):
        number += 1
        yield number


def run(seed, seconds, only="", case=None, most=None, tell=print):
    """(how many cases, findings) of one run; case: only that one."""
    bed, cases, findings = Bed(), 0, []

    def note(words):
        findings.append(words)
        tell("FOUND " + words[:3500])

    try:
        for number in numbers(case, seconds, most):
            cases += 1
            name = only or ORDER[number % len(ORDER)]
            rng, began = random.Random("%s %s %d" % (seed, name, number)), time.monotonic()
            try:
                TARGETS[name](rng, bed)
                bed.look_around()
                took = time.monotonic() - began
                demand(took < PATIENCE, "took %.1f s" % took)
            except Exception as error:
                again = "%s, --only %s --case %d --seed %s" % (name, name, number, seed)
                note("%s: %s: %s" % (again, type(error).__name__, error))
                bed.out.seek(0)
                bed.out.truncate()
                if len(findings) >= 20:
                    break
        try:
            bed.look_at_pages()
        except Finding as error:
            note(str(error))
    finally:
        bed.close()
    return cases, findings


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
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
