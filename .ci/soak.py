#!/usr/bin/env python3
"""Load and injected faults: ccfix before an upstream that misbehaves, on loopback, with figures as a Markdown table.

    python3 .ci/soak.py                     # 60 s of 200 streams, 10,000 requests, every fault
    python3 .ci/soak.py --seconds 15 --requests 2000
    python3 .ci/soak.py --only streams,faults

Standard library only; Linux (memory, threads and descriptors are read from /proc). Ends only processes it started.
The last line is `N passed, N failed, N skipped`; the exit code is 0 only if nothing failed.
"""

import argparse
import contextlib
import gzip
import json
import os
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
CCFIX = os.environ.get("CCFIX_FILE") or os.path.join(os.path.dirname(HERE), "ccfix.py")
PYTHON = os.environ.get("CCFIX_PYTHON") or sys.executable
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
COUNTS, ROWS = {"passed": 0, "failed": 0}, []


def check(name_, passed, **figures):
    """Count one check and keep its row of the table."""
    COUNTS["passed" if passed else "failed"] += 1
    ROWS.append(
        (
            name_,
            "ok" if passed else "FAILED",
            ", ".join("%s %s" % (key.replace("_", " "), value) for key, value in figures.items()),
        )
    )
    print("%-6s %-48s %s" % (ROWS[-1][1], name_, ROWS[-1][2]), flush=True)
    return passed


# ---- the upstream ------------------------------------------------------------------------------------


def chunk(raw):
    return b"%x\r\n%s\r\n" % (len(raw), raw)


def event(finish=None, **delta):
    return (
        b"data: "
        + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode()
        + b"\n\n"
    )


END = chunk(event("stop") + b"data: [DONE]\n\n") + b"0\r\n\r\n"


def whole(raw, status="200 OK", extra=""):
    return (
        "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n"
        % (status, len(raw), extra)
    ).encode() + raw


COMPLETION = json.dumps(
    {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello"},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 1},
    }
).encode()
STREAM = HEAD + chunk(event(content="Hello")) + END


class Upstream:
    """A server that answers each request by what its last user message says: the name of a function below, and an argument."""

    def __init__(self):
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(1024)
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        self.open = 0  # replies under way
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            sock, _ = self.listener.accept()
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError, ValueError), sock, sock.makefile("rb") as file:
            while self.exchange(sock, file):
                pass

    def exchange(self, sock, file):
        line, length = file.readline(), 0
        for field in iter(file.readline, b"\r\n"):
            if not field:
                return False
            if field.lower().startswith(b"content-length:"):
                length = int(field.split(b":")[1])
        if line.startswith(b"GET") or not line:
            sock.sendall(whole(b"{}", "404 Not Found"))
            return bool(line)
        words = json.loads(file.read(length).decode())["messages"][-1]["content"].split()
        self.open += 1
        try:
            return globals()["up_" + words[0]](sock, *words[1:]) is not False
        finally:
            self.open -= 1


def up_hello(sock):
    sock.sendall(STREAM)


def up_whole(sock):
    sock.sendall(whole(COMPLETION))


def up_slow(sock, seconds, per_second="20"):
    """Text for so many seconds."""
    sock.sendall(HEAD)
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        sock.sendall(chunk(event(content="word ")))
        time.sleep(1 / float(per_second))
    sock.sendall(END)


def up_close(sock):
    return False


def up_reset(sock, after="0"):
    if after == "1":
        sock.sendall(HEAD + chunk(event(content="Hello")))
        time.sleep(0.1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


def up_stall(sock, after="0"):
    sock.sendall(
        b"" if after == "0" else HEAD + (chunk(event(content="Hello")) if after == "2" else b"")
    )
    with contextlib.suppress(OSError):
        sock.settimeout(30)
        sock.recv(1)
    return False


def up_trickle(sock, kind):
    """A byte now and then: of a head, of the stream, or comments without end."""
    if kind == "comments":
        sock.sendall(HEAD)
        while True:
            sock.sendall(chunk(b": x\n\n"))
            time.sleep(0.8)
    sock.sendall(HEAD if kind == "stream" else b"")
    raw = STREAM if kind == "head" else chunk(event(content="Hello")) + END
    for at in range(10):
        sock.sendall(raw[at : at + 1])
        time.sleep(0.8)
    sock.sendall(raw[10:])


def up_garbage(sock, where):
    sock.sendall(
        {
            "head": os.urandom(3000),
            "chunks": HEAD + os.urandom(3000),
            "json": whole(b'{"choices": [{"mess'),
            "sse": HEAD + chunk(os.urandom(9000)) + b"0\r\n\r\n",
            "html": whole(b"<html><body>It works!</body></html>"),
        }[where]
    )
    return False


def up_line(sock, where):
    """Lines that never end, 200 MB at most."""
    sock.sendall(
        {
            "head": b"HTTP/1.1 200 OK\r\nX: ",
            "size": HEAD + b"1;",
            "sse": b"HTTP/1.1 200 OK\r\n\r\ndata: ",
            "json": b"HTTP/1.1 200 OK\r\n\r\n{\"choices\": \"",
        }[where]
    )
    for _ in range(200):
        sock.sendall(b"a" * (1 << 20))
    return False


def bomb():
    """300 MB of empty chunks, compressed."""
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    return b"".join(packer.compress(b"data: {}\n\n" * 100000) for _ in range(300)) + packer.flush()


def up_gzip(sock, how):
    packed = gzip.compress(COMPLETION)
    packed = {"cut": packed[:-10], "false": COMPLETION, "bomb": BOMB}.get(how, packed)
    sock.sendall(whole(packed, extra="Content-Encoding: gzip\r\n"))


BOMB = bomb()


def up_length(sock, how):
    raw = {
        "short": whole(COMPLETION)[:-5],
        "long": whole(COMPLETION) + b"surplus",
        "none": b"HTTP/1.1 200 OK\r\n\r\n" + COMPLETION,
    }[how]
    sock.sendall(raw)
    return False


def up_big(sock, kind, megabytes):
    """So many megabytes of one field."""
    sock.sendall(HEAD)
    delta = {"thinking": {"reasoning_content": "x" * 10000}, "text": {"content": "x" * 10000}}.get(
        kind
    )
    block = chunk(event(**delta) * 10)
    for _ in range(int(megabytes) * 10):
        sock.sendall(block)
    sock.sendall(END)


# ---- ccfix and its clients ---------------------------------------------------------------------------


class Ccfix:
    """A ccfix process before an upstream."""

    def __init__(self, url, descriptors=0, **settings):
        self.folder = tempfile.TemporaryDirectory()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        env = dict(
            {
                "PATH": os.environ["PATH"],
                "HOME": self.folder.name,
                "LC_ALL": "C",
                "PYTHONDONTWRITEBYTECODE": "1",
                "TARGET_API_KEY": "sk-x",
                "TARGET_API_BASE": url + "/v1",
                "TARGET_MODEL": "m",
                "TARGET_RETRIES": "0",
            },
            **settings,
        )
        self.output = open(os.path.join(self.folder.name, "output"), "w+b")
        limit = (
            (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors)))
            if descriptors
            else None
        )
        self.process = subprocess.Popen(
            [PYTHON, CCFIX, "-p", str(self.port)],
            cwd=self.folder.name,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            preexec_fn=limit,
        )
        end = time.monotonic() + 20
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(
                ("127.0.0.1", self.port), 1
            ):
                return
            time.sleep(0.05)
        raise SystemExit("ccfix did not start:\n" + self.printed())

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        code = self.stop()
        text = self.printed()
        if code or "Traceback" in text or "Fatal" in text:
            check("exit code 0 and no traceback", False, code=code, printed=text[-1500:])
        self.output.close()
        self.folder.cleanup()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def printed(self):
        with open(self.output.name, "rb") as file:
            return file.read().decode("ascii", "replace")

    def figures(self):
        """(RSS in MB, threads, descriptors)."""
        with open("/proc/%d/statm" % self.process.pid) as file:
            rss = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2.0**20
        return (
            round(rss, 1),
            len(os.listdir("/proc/%d/task" % self.process.pid)),
            len(os.listdir("/proc/%d/fd" % self.process.pid)),
        )

    def settled(self, threads):
        """figures(), once the threads of earlier connections are gone."""
        end = time.monotonic() + 5
        while self.figures()[1] > threads and time.monotonic() < end:
            time.sleep(0.05)
        return self.figures()

    def request(self, order, stream=True):
        body = json.dumps(
            {
                "model": "claude-x",
                "max_tokens": 100,
                "stream": stream,
                "messages": [{"role": "user", "content": order}],
            }
        ).encode()
        return (
            b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
            % len(body)
            + body
        )

    def connect(self):
        sock = socket.create_connection(("127.0.0.1", self.port), 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def ask(self, order, stream=True, sock=None):
        """(status, whether it ended as it should, the size of what came, its last bytes)."""
        own = sock is None
        sock = sock or self.connect()
        try:
            sock.sendall(self.request(order, stream))
            return read_answer(sock)
        finally:
            if own:
                sock.close()


def read_answer(sock):
    """(status, ended well, bytes, last bytes) of the next answer on a connection; status 0 when none came."""
    head, tail, size = b"", b"", 0
    try:
        while True:
            block = sock.recv(1 << 18)
            size, tail = size + len(block), (tail + block)[-400:]
            head += block if b"\r\n\r\n" not in head else b""
            fields = head.partition(b"\r\n\r\n")[0]
            length = [
                int(line.split(b":")[1])
                for line in fields.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            ]
            complete = (
                size >= len(fields) + 4 + length[0] if length else tail.endswith(b"\r\n0\r\n\r\n")
            )
            if complete or not block:
                return int(head[9:12] or 0), complete, size, tail
    except ConnectionError:
        return 0, False, size, tail


# ---- load --------------------------------------------------------------------------------------------


def streams(options, upstream):
    """200 slow streams at once: all whole, and memory, threads and descriptors as before."""
    with Ccfix(upstream.url) as ccfix:
        ccfix.ask("slow 2")  # the first of these starts the thread that moves them all
        before = ccfix.settled(2)
        waiting, done, broken, began = selectors.DefaultSelector(), 0, 0, time.monotonic()
        for _ in range(200):
            sock = ccfix.connect()
            sock.sendall(ccfix.request("slow %g" % options.seconds))
            sock.setblocking(False)
            waiting.register(sock, selectors.EVENT_READ, [b"", 0, time.monotonic()])
        peak, gap, early = before, 0, None
        while waiting.get_map() and time.monotonic() < began + options.seconds + 60:
            for key, _ in waiting.select(1):
                block, state = key.fileobj.recv(65536), key.data
                state[0], state[1], gap = (
                    (state[0] + block)[-200:],
                    state[1] + block.count(b"word "),
                    max(gap, time.monotonic() - state[2]),
                )
                state[2] = time.monotonic()
                if not block or state[0].endswith(b"\r\n0\r\n\r\n"):
                    whole_ = b"message_stop" in state[0] and state[1] >= options.seconds * 5
                    done, broken = done + whole_, broken + (not whole_)
                    waiting.unregister(key.fileobj)
                    key.fileobj.close()
            now = ccfix.figures()
            early = early or (now if time.monotonic() > began + options.seconds / 3 else None)
            peak = tuple(map(max, peak, now))
        after = ccfix.settled(2)
        check(
            "200 streams for %g s" % options.seconds,
            done == 200
            and before[0] < 32
            and after[1] == before[1]
            and peak[0] - early[0] < 8
            and after[2] < 150
            and peak[0] < 60,
            complete=done,
            broken=broken,
            RSS_before="%g MB" % before[0],
            after_a_third="%g MB" % (early or peak)[0],
            at_most="%g MB" % peak[0],
            after="%g MB" % after[0],
            threads="%d -> %d -> %d" % (before[1], peak[1], after[1]),
            descriptors="%d -> %d -> %d" % (before[2], peak[2], after[2]),
            longest_gap="%.2f s" % gap,
        )


def requests(options, upstream):
    """Requests in a row, streamed and not, kept alive and not: nothing grows."""
    with Ccfix(upstream.url, LOG_LEVEL="warning") as ccfix:

        def run(count):
            good, sock = 0, None
            for number in range(count):
                sock = sock or ccfix.connect()
                good += ccfix.ask("hello" if number % 2 else "whole", number % 2 == 1, sock)[
                    :2
                ] == (200, True)
                if number % 50 == 49:
                    sock.close()
                    sock = None
            return good

        run(min(1200, options.requests))  # fills the ledger of 1,000 rows
        before, began = ccfix.settled(2), time.monotonic()
        good = run(options.requests)
        after = ccfix.settled(2)
        check(
            "%d requests in a row" % options.requests,
            good == options.requests and after[0] - before[0] < 4 and after[1:] == before[1:],
            good=good,
            per_second=round(options.requests / (time.monotonic() - began)),
            RSS="%g -> %g MB" % (before[0], after[0]),
            threads="%d -> %d" % (before[1], after[1]),
            descriptors="%d -> %d" % (before[2], after[2]),
        )


# ---- faults ------------------------------------------------------------------------------------------

FAULTS = (
    # name, order to the upstream, statuses, text in the answer, whether its framing ends well, seconds at most
    ("closes without an answer", "close", (502,), b"before it answered", 2),
    ("resets", "reset", (502,), b"before it answered", 2),
    ("resets in the middle", "reset 1", (200,), b"event: error", 2),
    ("stalls before the head", "stall", (504,), b"timeout_error", 3),
    ("stalls after the head", "stall 1", (504,), b"timeout_error", 3),
    ("stalls in the middle", "stall 2", (200,), b"event: error", 3),
    ("head, a byte now and then", "trickle head", (504,), b"timeout_error", 4),
    ("stream, a byte now and then", "trickle stream", (200,), b"message_stop", 14),
    ("comments without end", "trickle comments", (504,), b"no content", 14),
    ("garbage for a head", "garbage head", (502,), b"proper HTTP", 2),
    ("garbage for chunks", "garbage chunks", (502,), b"valid size", 2),
    ("garbage in the stream", "garbage sse", (502,), b"", 2),
    ("half of a JSON reply", "garbage json", (502,), b"", 2),
    ("a web page", "garbage html", (502,), b"web page", 2),
    ("endless header line", "line head", (502,), b"proper HTTP", 3),
    ("endless chunk size", "line size", (502,), b"valid size", 3),
    ("endless SSE line", "line sse", (502,), b"", 8),
    ("endless JSON text", "line json", (502,), b"", 8),
    ("gzip", "gzip good", (200,), b"Hello", 2),
    ("cut gzip", "gzip cut", (502,), b"cut off", 2),
    ("false gzip", "gzip false", (502,), b"damaged", 2),
    ("gzip bomb, 300 MB", "gzip bomb", (502, 504), b"", 30),
    ("Content-Length too large", "length short", (502,), b"", 3),
    ("Content-Length too small", "length long", (200,), b"Hello", 2),
    ("no Content-Length", "length none", (200,), b"Hello", 2),
    ("100 MB of thinking", "big thinking 100", (200,), b"message_stop", 60),
    ("100 MB of text", "big text 100", (200,), b"message_stop", 60),
)


def faults(options, upstream):
    with Ccfix(upstream.url, TARGET_TIMEOUT="1") as ccfix:
        ccfix.ask("hello")
        for name, order, statuses, words, seconds in FAULTS:
            began, seen = time.monotonic(), {}
            thread = threading.Thread(target=lambda: seen.update(answer=ccfix.ask(order)))
            thread.start()
            peak = (0, 0, 0)
            while thread.is_alive() and time.monotonic() < began + seconds + 30:
                peak = max(peak, ccfix.figures())
                thread.join(0.02)
            took, (status, ended, size, last) = time.monotonic() - began, seen.get(
                "answer", (0, False, 0, b"")
            )
            good = (
                status in statuses
                and ended
                and words in last
                and took < seconds
                and peak[0] < 400
                and ccfix.ask("hello")[:2] == (200, True)
            )
            check(
                "upstream: " + name,
                good,
                status=status,
                ended="whole" if ended else "cut",
                bytes=size,
                took="%.2f s" % took,
                RSS_at_most="%g MB" % peak[0],
                **({} if good else {"last": last}),
            )
        after = ccfix.settled(2)
        check(
            "after all of these",
            after[0] < 200 and after[1] <= 3,
            RSS="%g MB" % after[0],
            threads=after[1],
            descriptors=after[2],
        )
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with Ccfix("http://127.0.0.1:%d" % nobody.getsockname()[1]) as ccfix:
            began = time.monotonic()
            status, ended, _, last = ccfix.ask("hello")
            check(
                "upstream: refuses",
                status == 502 and ended and b"cannot be reached" in last,
                status=status,
                took="%.2f s" % (time.monotonic() - began),
            )


def vanishing(options, upstream):
    """Clients that leave at every stage, and slow ones: the upstream calls end, nothing stays behind."""
    with Ccfix(upstream.url) as ccfix:
        ccfix.ask("slow 2")
        before, rounds = ccfix.settled(2), 40
        asked = ccfix.request("slow 30")
        stages = (
            ("before the head", b"", 0),
            ("in the head", asked[:30], 0),
            ("in the body", asked[:-5], 0),
            ("after the request", asked, 0),
            ("before the first content", ccfix.request("stall 1"), 0.05),
            ("in the middle", asked, 0.3),
        )
        for name, raw, wait in stages:
            socks = [ccfix.connect() for _ in range(rounds)]
            for sock in socks:
                sock.sendall(raw)
            time.sleep(wait + (0.3 if wait else 0.1))
            for number, sock in enumerate(socks):
                if number % 2:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
            began = time.monotonic()
            while (
                upstream.open or ccfix.figures()[1] > before[1]
            ) and time.monotonic() < began + 10:
                time.sleep(0.01)
            took = time.monotonic() - began
            check(
                "%d clients leave %s" % (rounds, name),
                took < 1.5 and not upstream.open,
                upstream_calls_ended_after="%.2f s" % took,
                threads=ccfix.figures()[1],
            )
        with ccfix.connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            sock.sendall(ccfix.request("big text 20"))
            time.sleep(1.5)
            held = ccfix.figures()[0]
            status, ended, size, _ = read_answer(sock)
        check(
            "a slow reader gets all of 20 MB",
            status == 200 and ended and held < 100,
            bytes=size,
            RSS_while_it_waits="%g MB" % held,
        )
        after = ccfix.settled(before[1])
        check(
            "after all of these",
            after[1:] == before[1:] and ccfix.ask("hello")[:2] == (200, True),
            RSS="%g -> %g MB" % (before[0], after[0]),
            threads="%d -> %d" % (before[1], after[1]),
            descriptors="%d -> %d" % (before[2], after[2]),
        )


def ending(options, upstream):
    """SIGTERM and Ctrl-C under load: every answer that the client was promised is finished."""
    for name, signum, order in (
        ("SIGTERM", signal.SIGTERM, "slow 2 50"),
        ("Ctrl-C", signal.SIGINT, "slow 2 50"),
        ("SIGTERM, streams longer than the grace", signal.SIGTERM, "slow 60"),
    ):
        with Ccfix(upstream.url) as ccfix:
            results, begun = [], threading.Barrier(51)

            def run():
                with ccfix.connect() as sock:
                    sock.sendall(ccfix.request(order))
                    sock.recv(1, socket.MSG_PEEK)
                    begun.wait(20)
                    results.append(read_answer(sock))

            threads = [threading.Thread(target=run) for _ in range(50)]
            for thread in threads:
                thread.start()
            begun.wait(20)
            began = time.monotonic()
            ccfix.process.send_signal(signum)
            code = ccfix.process.wait(30)
            took = time.monotonic() - began
            for thread in threads:
                thread.join(10)
            words = b"message_stop" if "2" in order else b"event: error"
            told = sum(
                status == 200 and ended and words in last for status, ended, _, last in results
            )
            check(
                name + " with 50 open streams",
                told == 50 and code == 0 and took < 8,
                finished="%d of 50" % told if "2" in order else "told of the end: %d of 50" % told,
                exit_code=code,
                took="%.2f s" % took,
            )


def descriptors(options, upstream):
    """Out of descriptors: waiting connections are served when some are free again."""
    with Ccfix(upstream.url, descriptors=64) as ccfix:
        ccfix.ask("hello")
        before, socks = ccfix.settled(2), [ccfix.connect() for _ in range(200)]
        time.sleep(1)
        full = ccfix.figures()
        with open("/proc/%d/stat" % ccfix.process.pid) as file:
            spent = -sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
        time.sleep(1)
        with open("/proc/%d/stat" % ccfix.process.pid) as file:
            spent += sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
        for sock in socks[:100]:
            sock.close()
        socks[150].sendall(ccfix.request("hello"))
        for sock in socks[100:150]:
            sock.close()
        status = read_answer(socks[150])[0]
        for sock in socks:
            sock.close()
        after = ccfix.settled(before[1])
        check(
            "200 connections, 64 descriptors",
            status in (200, 502)
            and ccfix.ask("hello")[:2] == (200, True)
            and after[1:] == before[1:]
            and spent < 50,
            open_at_once=full[2],
            CPU_while_full="%d %%" % spent,
            then=status,
            descriptors="%d -> %d" % (before[2], after[2]),
        )


def shared_cache(options, upstream):
    """Two proxies on one cache folder, each asked the same things at once."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "CACHE_ENABLED": "true",
            "CACHE_DIR": folder,
            "CACHE_KEY_MODE": "full",
            "LEDGER": "true",
        }
        with Ccfix(upstream.url, **settings) as one, Ccfix(upstream.url, **settings) as two:
            good = []

            def run(ccfix):
                with ccfix.connect() as sock:
                    for number in range(200):
                        good.append(
                            ccfix.ask("hello" if number % 2 else "whole", number % 3 == 1, sock)[:2]
                            == (200, True)
                        )

            threads = [threading.Thread(target=run, args=(ccfix,)) for ccfix in (one, two) * 4]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            warnings = [
                line
                for ccfix in (one, two)
                for line in ccfix.printed().splitlines()
                if " warning " in line or " error " in line
            ]
            check(
                "two proxies on one cache folder",
                sum(good) == 1600 and not warnings,
                good="%d of 1600" % sum(good),
                warnings=len(warnings),
                **({"first": warnings[0]} if warnings else {}),
            )


PARTS = (streams, requests, faults, vanishing, ending, descriptors, shared_cache)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long the 200 streams last")
    parser.add_argument("--requests", type=int, default=10000, help="how many requests in a row")
    parser.add_argument(
        "--only", default="", help="some of: " + ",".join(part.__name__ for part in PARTS)
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096) if hard > 0 else 4096, hard))
    upstream = Upstream()
    for part in PARTS:
        if not options.only or part.__name__ in options.only.split(","):
            try:
                part(options, upstream)
            except Exception as error:
                check(
                    part.__name__ + " runs to its end",
                    False,
                    error="%s: %s" % (type(error).__name__, error),
                )
    print("\n| what | result | figures |\n| --- | --- | --- |")
    for row in ROWS:
        print("| %s |" % " | ".join(row).replace("\n", " "))
    print("\n%d passed, %d failed, 0 skipped" % (COUNTS["passed"], COUNTS["failed"]))
    return 1 if COUNTS["failed"] or not COUNTS["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
