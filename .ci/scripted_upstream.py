"""A scripted OpenAI chat-completions server on loopback: its "model" is a Python function.

    with Scripted(lambda request: [say("hello")]) as upstream:      # upstream.url, upstream.requests

A script takes a Request and returns a reply, a list of steps made by the functions below. `rounds` and
`attempts` make scripts from plain lists. Every request is recorded, in order of arrival.
"""

import collections
import http.server
import json
import socket
import threading
import time

MOST = 60  # requests of one session; more is a loop

Step = collections.namedtuple("Step", "kind value")


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
    return Step(
        "usage",
        {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    )


def cut():
    """The connection drops here, without an end of any kind."""
    return Step("cut", None)


def end():
    """The body ends here in good order, but with neither a finish reason nor [DONE]."""
    return Step("end", None)


def delta(**fields):
    """A delta as it is, for what no other step writes."""
    return Step("delta", fields)


def payload(**fields):
    """A whole `data:` line as it is."""
    return Step("payload", fields)


def finish(reason):
    """Use this finish reason instead of the right one."""
    return Step("finish", reason)


def fail(status, message, type="invalid_request_error", code=None, **headers):
    """An HTTP error in OpenAI's envelope instead of a reply; header names are written with `_`."""
    body = {"error": {"message": message, "type": type, "param": None, "code": code}}
    return [Step("fail", (status, body, {k.replace("_", "-"): v for k, v in headers.items()}))]


def rounds(*replies):
    """The n-th reply in a conversation (counted by its assistant messages); the last one repeats."""
    return lambda request: replies[min(request.round, len(replies) - 1)]


def attempts(*replies):
    """The n-th reply of this server, whatever is asked; the last one repeats."""
    return lambda request: replies[min(request.number, len(replies) - 1)]


class Request:
    """One recorded request: number (0, 1, ...), path, headers (lower case), raw (str), body (dict)."""

    def __init__(self, number, path, headers, raw):
        self.number, self.path, self.headers, self.raw = number, path, headers, raw
        self.body = json.loads(raw)
        self.messages = self.body["messages"]
        self.at = time.monotonic()

    @property
    def round(self):
        return sum(m["role"] == "assistant" for m in self.messages)

    @property
    def results(self):
        """The contents of all tool messages, in order."""
        return [m["content"] for m in self.messages if m["role"] == "tool"]

    @property
    def tool_names(self):
        return [t["function"]["name"] for t in self.body.get("tools", [])]

    def asks(self, words):
        """Whether the first user message (the task of this agent) contains the words."""
        return words in json.dumps(next(m for m in self.messages if m["role"] == "user"))


class Cut(Exception):
    pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path.endswith("/models"):
            return self.send_json(
                200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]}
            )
        if self.path.startswith("/search"):  # as a SearXNG server answers
            return self.send_json(
                200,
                {
                    "query": "what",
                    "results": [
                        {
                            "title": "A real page",
                            "url": "https://example.org/real",
                            "content": "It says REAL-RESULT.",
                        }
                    ],
                },
            )
        self.send_json(404, {"error": {"message": "Not Found", "type": "invalid_request_error"}})

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"])).decode("utf-8")
        try:
            request = self.server.owner.record(self.path, self.headers, raw)
            reply = list(self.server.owner.script(request))
        except (
            Exception
        ) as error:  # a mistake in the script: shown by whatever the client then says
            reply = fail(418, "the script failed: %r" % error)
        try:
            if reply and reply[0].kind == "fail":
                self.send_json(*reply[0].value)
            elif request.body.get("stream"):
                self.stream(request, reply)
            else:
                self.whole(request, reply)
        except Cut:
            self.drop()
        except OSError:
            self.server.owner.hangups += 1
            self.drop()

    def drop(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send_json(self, status, body, headers=()):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(
            headers, content_type="application/json", content_length=len(data)
        ).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def whole(self, request, reply):
        for kind, value in reply:
            if kind == "wait":
                self.pause(value)
            elif kind == "cut":
                raise Cut
        message = fold(reply)
        self.send_json(
            200,
            envelope(
                request,
                "chat.completion",
                choices=[
                    {
                        "index": 0,
                        "message": message,
                        "logprobs": None,
                        "finish_reason": finish_reason(reply),
                    }
                ],
                usage=token_usage(request, reply),
            ),
        )

    def stream(self, request, reply):
        while reply and reply[0].kind == "wait":  # silence before the first byte, headers included
            self.pause(reply.pop(0).value)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.chunk(request, {"role": "assistant", "content": "", "refusal": None})
        calls = 0
        for kind, value in reply:
            for delta in deltas(kind, value, calls):
                self.chunk(request, delta)
            calls += kind == "call"
            if kind == "wait":
                self.pause(value)
            elif kind == "cut":
                raise Cut
            elif kind == "payload":
                self.payload(value)
            elif kind == "end":
                return self.wfile.write(b"0\r\n\r\n")
        self.chunk(request, {}, finish_reason(reply))
        if (request.body.get("stream_options") or {}).get("include_usage"):
            self.payload(
                envelope(
                    request, "chat.completion.chunk", choices=[], usage=token_usage(request, reply)
                )
            )
        self.payload("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def pause(self, seconds):
        """Wait, but notice a peer that hangs up meanwhile."""
        self.connection.settimeout(seconds)
        try:
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError("the peer hung up")
        except socket.timeout:
            pass
        finally:
            self.connection.settimeout(None)

    def chunk(self, request, delta, finish=None):
        self.payload(
            envelope(
                request,
                "chat.completion.chunk",
                usage=None,
                choices=[{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
            )
        )

    def payload(self, data):
        line = b"data: " + (data if data == "[DONE]" else json.dumps(data)).encode() + b"\n\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.flush()


def envelope(request, kind, **fields):
    return dict(
        {
            "id": "chatcmpl-%d" % request.number,
            "object": kind,
            "created": 1750000000,
            "model": request.body.get("model"),
            "system_fingerprint": "fp_scripted",
        },
        **fields,
    )


def pieces(text, size=9):
    return [text[i : i + size] for i in range(0, len(text), size)]


def deltas(kind, value, index):
    """The stream deltas of one step; a call takes the given tool index."""
    if kind == "text":
        return [{"content": piece} for piece in pieces(value)]
    if kind == "delta":
        return [value]
    if kind == "thinking":
        return [{"reasoning_content": piece, "content": None} for piece in pieces(value)]
    if kind != "call":
        return []
    name, arguments = value
    head = {
        "index": index,
        "id": new_id(),
        "type": "function",
        "function": {"name": name, "arguments": ""},
    }
    return [{"content": None, "tool_calls": [head]}] + [
        {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}
        for piece in pieces(arguments)
    ]


def new_id():
    return "call_%s" % hex(time.time_ns())[2:]


def fold(reply):
    """The message of a reply that is not streamed."""

    def text(kind):
        return "".join(step.value for step in reply if step.kind == kind)

    calls = [
        {
            "id": new_id(),
            "type": "function",
            "function": {"name": step.value[0], "arguments": step.value[1]},
        }
        for step in reply
        if step.kind == "call"
    ]
    message = {"role": "assistant", "content": text("text") or None, "refusal": None}
    if text("thinking"):
        message["reasoning_content"] = text("thinking")
    if calls:
        message["tool_calls"] = calls
    return message


def finish_reason(reply):
    told = [step.value for step in reply if step.kind == "finish"]
    if told:
        return told[-1]
    return "tool_calls" if any(step.kind == "call" for step in reply) else "stop"


def token_usage(request, reply):
    told = [step.value for step in reply if step.kind == "usage"]
    return told[-1] if told else usage(len(request.raw) // 4, 1 + len(reply)).value


class Scripted:
    """The server as a context manager; `script` may be replaced at any time."""

    def __init__(self, script, host="127.0.0.1"):
        self.script, self.requests, self.hangups = script, [], 0
        self._lock = threading.Lock()
        self._server = http.server.ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads, self._server.owner = True, self
        self._server.handle_error = (
            lambda *_: None
        )  # a peer that leaves, or refuses our certificate
        self.url = "http://127.0.0.1:%d/v1" % self._server.server_address[1]

    def wrap(self, context):
        """Speak TLS from now on."""
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.url = self.url.replace("http:", "https:")

    def record(self, path, headers, raw):
        with self._lock:
            if len(self.requests) >= MOST:
                raise ConnectionAbortedError("this session does not end")
            request = Request(
                len(self.requests), path, {k.lower(): v for k, v in headers.items()}, raw
            )
            self.requests.append(request)
        return request

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()
