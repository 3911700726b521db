"""The scripted upstream of all steps: an OpenAI-compatible server on loopback whose "model" is a
Python function.

    with Upstream(lambda request: [say("hello")]) as upstream:  # upstream.url, upstream.requests

A script takes a Request and returns a reply, an iterable of steps made by the functions below; it
may be a generator, which is asked for a step when the last one is done. `rounds`, `attempts` and
`orders` make scripts from plain tables. Requests are recorded in order of arrival. On /v1/messages
the same steps are told in Anthropic's format. Python 3.6 or newer.
"""

import collections
import itertools
import json
import socket
import struct
import threading
import time

STATUS_LINE = "HTTP/1.1 %d Scripted\r\n"
SSE_HEAD = (
    STATUS_LINE % 200
    + "Content-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
).encode()
LAST_CHUNK = b"0\r\n\r\n"
IDS = itertools.count(int(time.time() * 1e6))  # of tool calls; no two runs have one in common
FOUND = [
    ("Zebra facts", "https://zebra.example/facts", "Zebras have 44 teeth."),
    ("More zebras", "https://zebra.example/more", "They stand upright."),
]

Step = collections.namedtuple("Step", "kind value")


# Steps


def say(text):
    return Step("text", text)


def think(text):
    return Step("thinking", text)


def call(name, _upto=None, **arguments):
    """A tool call; with `_upto`, only the first so many characters of its arguments are written."""
    return Step("call", (name, json.dumps(arguments)[:_upto]))


def wait(seconds):
    return Step("wait", seconds)


def usage(prompt, completion, cached=0):
    return Step("usage", (prompt, completion, cached))


def finish(reason):
    """Use this finish reason instead of the right one."""
    return Step("finish", reason)


def end():
    """The body ends here in good order, but with neither a finish reason nor [DONE]."""
    return Step("end", None)


def cut():
    """The connection drops here, without an end of any kind; as the first step, before the head."""
    return Step("cut", None)


def cut_at(size):
    """The connection drops after so many bytes of the reply, its head included."""
    return Step("cut_at", size)


def reset():
    """The connection is reset here, by a TCP RST."""
    return Step("reset", None)


def delta(**fields):
    """A delta as it is, for what no other step writes."""
    return Step("delta", fields)


def payload(**fields):
    """A whole `data:` line as it is."""
    return Step("payload", fields)


def data(raw):
    """Bytes as they are; as the first step, they are the whole reply, head included."""
    return Step("data", raw)


def fail(status, message, type="invalid_request_error", code=None, **headers):
    """An HTTP error in OpenAI's envelope instead of a reply; header names are written with `_`."""
    body = {"error": {"message": message, "type": type, "param": None, "code": code}}
    return [Step("fail", (status, body, {k.replace("_", "-"): v for k, v in headers.items()}))]


# Scripts


def rounds(*replies):
    """The n-th reply in a conversation, counted by its assistant turns; the last one repeats."""
    return lambda request: replies[min(request.round, len(replies) - 1)]


def attempts(*replies):
    """The n-th reply of this server, whatever is asked; the last one repeats."""
    return lambda request: replies[min(request.number, len(replies) - 1)]


def orders(table):
    """The last message is an order: the name of a function in the table, and its arguments."""

    def script(request):
        name, *arguments = request.messages[-1]["content"].split()
        return table[name](*arguments)

    return script


# Bytes


def sse(body):
    return b"data: " + (body if body == "[DONE]" else json.dumps(body)).encode() + b"\n\n"


def chunked(raw):
    """The bytes as one chunk of a body."""
    return b"%x\r\n%s\r\n" % (len(raw), raw)


def whole(raw, status=200, **headers):
    """A reply with a length; header names are written with `_`."""
    fields = dict({"content_type": "application/json", "content_length": len(raw)}, **headers)
    lines = ["%s: %s\r\n" % (name.replace("_", "-"), value) for name, value in fields.items()]
    return ((STATUS_LINE % status) + "".join(lines) + "\r\n").encode() + raw


def chat_chunk(change, finish_reason=None, **fields):
    """A chunk of OpenAI's stream with one choice."""
    choice = {"index": 0, "delta": change, "logprobs": None, "finish_reason": finish_reason}
    return dict({"object": "chat.completion.chunk", "choices": [choice]}, **fields)


class Request:
    """One request: number (0, 1, ...), path, headers (lower case), raw (str), body (dict)."""

    def __init__(self, number, path, headers, raw):
        self.number, self.path, self.headers, self.raw = number, path, headers, raw
        self.native = path.partition("?")[0].endswith("/messages")  # in Anthropic's format
        self.body = json.loads(raw)
        self.messages = self.body["messages"]
        self.at = time.monotonic()

    @property
    def round(self):
        return sum(m["role"] == "assistant" for m in self.messages)

    @property
    def results(self):
        """The contents of all tool messages or results, in order."""
        blocks = [m for m in self.messages if m["role"] == "tool"]
        for message in self.messages if self.native else ():
            content = message["content"] if isinstance(message["content"], list) else ()
            blocks += [block for block in content if block["type"] == "tool_result"]
        return [block["content"] for block in blocks]

    @property
    def calls(self):
        """All tool calls in the conversation, in order."""
        return [c for m in self.messages for c in m.get("tool_calls") or ()]

    @property
    def tool_names(self):
        return [t.get("function", t)["name"] for t in self.body.get("tools", [])]

    def asks(self, words):
        """Whether the first user message (the task of this agent) contains the words."""
        return words in json.dumps(next(m for m in self.messages if m["role"] == "user"))


class Cut(Exception):
    """The script wants the connection to drop."""


def pieces(text, size=9):
    return [text[i : i + size] for i in range(0, len(text), size)]


class ChatWriter:
    """Writes steps as OpenAI does, in chunks or whole."""

    frame = staticmethod(sse)

    def __init__(self, request):
        self.request, self.calls, self.reason, self.tokens = request, 0, None, None
        self.message = {"role": "assistant", "content": None, "refusal": None}

    def start(self):
        yield self.chunk({"role": "assistant", "content": "", "refusal": None})

    def step(self, kind, value):
        """The payloads of one step; the whole message grows beside it."""
        if kind == "text":
            return self.add("content", value, ({"content": p} for p in pieces(value)))
        if kind == "thinking":
            changes = ({"reasoning_content": p, "content": None} for p in pieces(value))
            return self.add("reasoning_content", value, changes)
        if kind == "call":
            return map(self.chunk, self.call(*value))
        if kind == "delta":
            return [self.chunk(value)]
        if kind == "payload":
            return [value]
        if kind == "finish":
            self.reason = value
        if kind == "usage":
            self.tokens = value
        return []

    def add(self, field, text, changes):
        self.message[field] = (self.message.get(field) or "") + text
        return map(self.chunk, changes)

    def call(self, name, arguments):
        index, self.calls = self.calls, self.calls + 1
        whole_call = {
            "id": "call_%x" % next(IDS),
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        self.message.setdefault("tool_calls", []).append(whole_call)
        first = dict(whole_call, index=index, function={"name": name, "arguments": ""})
        yield {"content": None, "tool_calls": [first]}
        for piece in pieces(arguments):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}

    def finish_reason(self):
        return self.reason or ("tool_calls" if self.calls else "stop")

    def usage(self):
        prompt, completion, cached = self.tokens or (len(self.request.raw) // 4, 7, 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def finish(self):
        yield self.chunk({}, self.finish_reason())
        if (self.request.body.get("stream_options") or {}).get("include_usage"):
            yield dict(self.chunk({}, usage=self.usage()), choices=[])
        yield "[DONE]"

    def body(self):
        choice = {"index": 0, "message": self.message, "finish_reason": self.finish_reason()}
        return self.chunk({}, object="chat.completion", choices=[choice], usage=self.usage())

    def chunk(self, change, finish_reason=None, **fields):
        head = {"id": "chatcmpl-%d" % self.request.number, "created": 1750000000, "usage": None}
        head["model"] = self.request.body.get("model")
        return chat_chunk(change, finish_reason, **dict(head, **fields))


class MessagesWriter:
    """Writes steps as Anthropic does, in events or whole."""

    def __init__(self, request):
        self.request, self.content, self.reason = request, [], "end_turn"
        self.usage = {"input_tokens": len(request.raw) // 4, "output_tokens": 1}

    @staticmethod
    def frame(event):
        return b"event: %s\n" % event["type"].encode() + sse(event)

    def start(self):
        yield {"type": "message_start", "message": dict(self.body(), stop_reason=None)}

    def step(self, kind, value):
        if kind == "text":
            return self.block({"type": "text"}, "text", "text_delta", value)
        if kind == "thinking":
            return self.block({"type": "thinking"}, "thinking", "thinking_delta", value)
        if kind == "call":
            self.reason, (name, arguments) = "tool_use", value
            head = {"type": "tool_use", "id": "toolu_%x" % next(IDS), "name": name, "input": {}}
            return self.block(head, "partial_json", "input_json_delta", arguments)
        if kind == "finish":
            self.reason = value
        if kind == "usage":
            prompt, completion, cached = value
            self.usage = {"input_tokens": prompt - cached, "output_tokens": completion}
            self.usage["cache_read_input_tokens"] = cached
        return [value] if kind == "payload" else []

    def block(self, head, field, kind, text):
        index = len(self.content)
        self.content.append(dict(head, **{field: text}))
        first = head if "input" in head else dict(head, **{field: ""})
        yield {"type": "content_block_start", "index": index, "content_block": first}
        for piece in pieces(text):
            change = {"type": kind, field: piece}
            yield {"type": "content_block_delta", "index": index, "delta": change}
        yield {"type": "content_block_stop", "index": index}

    def finish(self):
        change = {"stop_reason": self.reason, "stop_sequence": None}
        yield {"type": "message_delta", "delta": change, "usage": self.usage}
        yield {"type": "message_stop"}

    def body(self):
        content = [dict(block) for block in self.content]
        for block in content:
            if "partial_json" in block:
                block["input"] = json.loads(block.pop("partial_json"))
        head = {"id": "msg_%x" % next(IDS), "type": "message", "role": "assistant"}
        told = {"content": content, "stop_reason": self.reason, "usage": self.usage}
        return dict(head, model=self.request.body.get("model"), stop_sequence=None, **told)


class Connection:
    """One connection to the upstream: request after request, until a script drops it."""

    def __init__(self, owner, sock):
        self.owner, self.sock, self.sent, self.most = owner, sock, 0, None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = sock.makefile("rb")

    def serve(self):
        try:
            while self.exchange():
                pass
        except (OSError, ValueError):
            pass  # the peer left, refused our certificate, or does not speak HTTP
        finally:
            self.file.close()
            self.sock.close()

    def exchange(self):
        words, headers = self.file.readline().split(), {}
        for line in iter(self.file.readline, b"\r\n"):
            if not line:
                return False
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        path = words[1].decode("latin-1")
        if words[0] != b"POST":
            self.sock.sendall(self.owner.look_up(path))
            return True
        raw = self.file.read(int(headers["content-length"])).decode("utf-8")
        if path.partition("?")[0].endswith("/count_tokens"):
            self.sock.sendall(whole(json.dumps({"input_tokens": len(raw) // 4}).encode()))
            return True
        self.owner.count(open=1)
        try:
            return self.answer(path, headers, raw)
        finally:
            self.owner.count(open=-1)

    def answer(self, path, headers, raw):
        """Whether the connection may be used again."""
        self.sent, self.most = 0, None
        try:
            request = self.owner.record(path, headers, raw)
            reply = iter(self.owner.script(request))
        except Exception as error:  # a mistake in the script: shown by what the client then says
            reply = iter(fail(418, "the script failed: %r" % error))
        try:
            self.write_reply(request, reply)
            return True
        except Cut:
            return False
        except OSError:
            self.owner.count(hangups=1)
            return False

    def write_reply(self, request, reply):
        writer = (MessagesWriter if request.native else ChatWriter)(request)
        first = next(reply, finish(None))
        while first.kind in ("wait", "cut_at"):  # silence before the first byte, head included
            self.act(*first)
            first = next(reply, finish(None))
        reply = itertools.chain([first], reply)
        if first.kind == "fail":
            status, body, headers = first.value
            body = dict(body, type="error") if request.native else body
            self.write(whole(json.dumps(body).encode(), status, **headers))
        elif first.kind in ("data", "cut", "reset"):
            for step in reply:
                self.act(*step)
        elif request.body.get("stream"):
            self.write_stream(writer, reply)
        else:
            self.write_whole(writer, reply)

    def write_stream(self, writer, reply):
        self.write(SSE_HEAD)
        self.write_payloads(writer, writer.start())
        for kind, value in reply:
            if kind == "end":
                return self.write(LAST_CHUNK)
            self.act(kind, value)
            self.write_payloads(writer, writer.step(kind, value))
        self.write_payloads(writer, writer.finish())
        self.write(LAST_CHUNK)

    def write_whole(self, writer, reply):
        for kind, value in reply:
            self.act(kind, value)
            list(writer.step(kind, value))
        self.write(whole(json.dumps(writer.body()).encode()))

    def write_payloads(self, writer, payloads):
        for body in payloads:
            self.write(chunked(writer.frame(body)))

    def act(self, kind, value):
        """A step that is about the connection, not about what is said."""
        if kind == "wait":
            self.pause(value)
        elif kind == "data":
            self.write(value)
        elif kind == "cut_at":
            self.most = value
        elif kind == "cut":
            self.sock.shutdown(socket.SHUT_RDWR)
            raise Cut
        elif kind == "reset":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise Cut

    def write(self, raw):
        left = len(raw) if self.most is None else self.most - self.sent
        self.sock.sendall(raw[:left])
        self.sent += len(raw)
        if left < len(raw):
            self.act("cut", None)

    def pause(self, seconds):
        """Wait, but notice a peer that hangs up meanwhile."""
        self.sock.settimeout(seconds)
        try:
            if not self.sock.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError("the peer hung up")
        except socket.timeout:
            pass
        finally:
            self.sock.settimeout(None)


class Upstream:
    """The server as a context manager; `script` may be replaced at any time.

    models   the ids that GET /v1/models lists; tls: an SSLContext
    host     the address that it listens on, and the name in its URL
    most     requests of one session; more is a loop. None: any number, and none is recorded
    hangups  replies that the peer did not wait for; open: replies under way; gets: paths of GET
    """

    def __init__(self, script, port=0, models=("scripted",), tls=None, most=60, host="127.0.0.1"):
        self.script, self.models, self.tls, self.most = script, models, tls, most
        self.requests, self.gets, self.hangups, self.open = [], [], 0, 0
        self.lock = threading.Lock()
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((host, port))
        self.listener.listen(1024)
        scheme = "https" if tls else "http"
        self.url = "%s://%s:%d/v1" % (scheme, host, self.listener.getsockname()[1])

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.listener.shutdown(socket.SHUT_RDWR)  # wakes up accept
        self.listener.close()

    def accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        try:
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)
        except OSError:
            return sock.close()  # it refuses the certificate
        Connection(self, sock).serve()

    def count(self, **changes):
        with self.lock:
            for name, change in changes.items():
                setattr(self, name, getattr(self, name) + change)

    def record(self, path, headers, raw):
        with self.lock:
            if self.most is None:
                return Request(0, path, headers, raw)
            if len(self.requests) >= self.most:
                raise ConnectionAbortedError("this session does not end")
            request = Request(len(self.requests), path, headers, raw)
            self.requests.append(request)
            return request

    def look_up(self, path):
        """The answer to a GET: the models, or a search as a SearXNG server answers it."""
        self.gets.append(path)
        if path.endswith("/models"):
            listed = [{"id": name, "object": "model"} for name in self.models]
            return whole(json.dumps({"object": "list", "data": listed}).encode())
        if "/broken" in path:
            return whole(b"rate limited", 429)
        if path.startswith("/search"):
            found = [dict(zip(("title", "url", "content"), row)) for row in FOUND]
            return whole(json.dumps({"query": "q", "results": found}).encode())
        return whole(json.dumps(fail(404, "Not Found")[0].value[1]).encode(), 404)
