#!/usr/bin/env python3
"""Load and injected faults: ccfix before an upstream that misbehaves, on loopback, with figures as
a Markdown table.

    python3 .ci/soak.py                     # 60 s of 200 streams, 10,000 requests, every fault
    python3 .ci/soak.py --seconds 15 --requests 2000
    python3 .ci/soak.py --only streams,faults

Linux (memory, threads and descriptors are read from /proc). The bounds on time hold on a machine
that others use too: the figures say how long it really took.
"""

import argparse
import contextlib
import gzip
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib

import harness
import oracle
from harness import CCFIX, PYTHON, Ccfix, wait_for
from upstream import SSE_HEAD, STATUS_LINE, Upstream, chat_chunk, chunked, cut, data, orders
from upstream import reset, sse, wait, whole

ROWS = []
SETTLED = 10  # seconds for what has to be gone after something ended
# MB of a process that waits: as a script it still holds what compiling the file took
SCRIPT_MOST, MODULE_MOST = 52, 32


def check(name, passed, **figures):
    """Count one check and keep its row of the table."""
    pairs = ("%s %s" % (key.replace("_", " "), value) for key, value in figures.items())
    ROWS.append((name, "ok" if passed else "FAILED", ", ".join(pairs)))
    harness.check("%s: %s" % (name, ROWS[-1][2]), passed)


# The upstream: the client's last message names one of these, with its arguments


def content(**change):
    return sse(chat_chunk(change))


END = chunked(sse(chat_chunk({}, "stop")) + sse("[DONE]")) + b"0\r\n\r\n"
STREAM = SSE_HEAD + chunked(content(content="Hello")) + END
ANSWER = {"role": "assistant", "content": "Hello"}
CHOICE = {"index": 0, "message": ANSWER, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 5, "completion_tokens": 1}
COMPLETION = json.dumps({"choices": [CHOICE], "usage": USAGE}).encode()
PLAIN_HEAD = (STATUS_LINE % 200).encode()


def hello():
    return [data(STREAM)]


def at_once():
    return [data(whole(COMPLETION))]


def slow(seconds, per_second="20"):
    """Text for so many seconds."""
    yield data(SSE_HEAD)
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        yield data(chunked(content(content="word ")))
        yield wait(1 / float(per_second))
    yield data(END)


def close():
    return [cut()]


def reset_it(where="start"):
    begun = [data(SSE_HEAD + chunked(content(content="Hello"))), wait(0.1)]
    return (begun if where == "middle" else []) + [reset()]


def stall(where="start"):
    begun = {"start": b"", "head": SSE_HEAD}
    begun["middle"] = SSE_HEAD + chunked(content(content="Hello"))
    return [data(begun[where]), wait(30), cut()]


def trickle(kind):
    """A byte now and then: of a head, of the stream, or comments without end."""
    head = b"" if kind == "head" else SSE_HEAD
    yield data(head)
    while kind == "comments":
        yield data(chunked(b": x\n\n"))
        yield wait(0.8)
    raw = STREAM[len(head) :]
    for at in range(10):
        yield data(raw[at : at + 1])
        yield wait(0.8)
    yield data(raw[10:])


def garbage(where):
    table = {
        "head": os.urandom(3000),
        "chunks": SSE_HEAD + os.urandom(3000),
        "json": whole(b'{"choices": [{"mess'),
        "sse": SSE_HEAD + chunked(os.urandom(9000)) + b"0\r\n\r\n",
        "html": whole(b"<html><body>It works!</body></html>", content_type="text/html"),
    }
    return [data(table[where]), cut()]


def line(where):
    """Lines that never end, 200 MB at most."""
    table = {
        "head": PLAIN_HEAD + b"X: ",
        "size": SSE_HEAD + b"1;",
        "sse": PLAIN_HEAD + b"\r\ndata: ",
        "json": PLAIN_HEAD + b"\r\n{\"choices\": \"",
    }
    yield data(table[where])
    for _ in range(200):
        yield data(b"a" * (1 << 20))
    yield cut()


def make_bomb():
    """300 MB of empty chunks, compressed."""
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    return b"".join(packer.compress(b"data: {}\n\n" * 100000) for _ in range(300)) + packer.flush()


PACKED = gzip.compress(COMPLETION)
PACKS = {"good": PACKED, "cut": PACKED[:-10], "false": COMPLETION, "bomb": make_bomb()}


def packed(how):
    return [data(whole(PACKS[how], content_encoding="gzip"))]


def length(how):
    table = {
        "short": whole(COMPLETION)[:-5],
        "long": whole(COMPLETION) + b"surplus",
        "none": PLAIN_HEAD + b"\r\n" + COMPLETION,
    }
    return [data(table[how]), cut()]


def big(kind, megabytes):
    """So many megabytes of one field."""
    field = {"thinking": "reasoning_content", "text": "content"}[kind]
    yield data(SSE_HEAD)
    block = chunked(content(**{field: "x" * 10000}) * 10)
    for _ in range(int(megabytes) * 10):
        yield data(block)
    yield data(END)


ORDERS = (hello, at_once, slow, close, reset_it, stall, trickle, garbage, line, packed, length, big)
SCRIPT = orders({function.__name__: function for function in ORDERS})


# ccfix and its clients


class Soaked(Ccfix):
    """ccfix before the upstream, observed from outside."""

    def __init__(self, url, descriptors=0, more=(), **settings):
        limits = (resource.RLIMIT_NOFILE, (descriptors, descriptors))
        limit = (lambda: resource.setrlimit(*limits)) if descriptors else None
        env = dict({"PYTHONDONTWRITEBYTECODE": "1", "TARGET_RETRIES": "0"}, **settings)
        Ccfix.__init__(self, url, env=env, preexec_fn=limit, **dict(more))

    def figures(self):
        """(RSS in MB, threads, descriptors)."""
        folder = "/proc/%d/" % self.process.pid
        with open(folder + "statm") as file:
            rss = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2.0**20
        return round(rss, 1), len(os.listdir(folder + "task")), len(os.listdir(folder + "fd"))

    def processor_time(self):
        """Seconds."""
        with open("/proc/%d/stat" % self.process.pid) as file:
            ticks = file.read().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def settled(self, threads=0):
        """figures(), once there are so few threads, or no more of them have ended for a second."""
        end, seen = time.monotonic() + SETTLED, []
        while time.monotonic() < end and seen[-20:-19] != seen[-1:] or not seen:
            seen.append(self.figures()[1])
            if seen[-1] <= threads:
                break
            time.sleep(0.05)
        return self.figures()

    def request(self, order, stream=True):
        body = {"model": "claude-x", "max_tokens": 100, "stream": stream}
        body["messages"] = [{"role": "user", "content": order}]
        raw = json.dumps(body).encode()
        head = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        return head % len(raw) + raw

    def connect(self):
        sock = socket.create_connection(("127.0.0.1", self.port), 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def ask(self, order, stream=True, sock=None):
        """What read_answer returns."""
        with contextlib.nullcontext(sock) if sock else self.connect() as used:
            used.sendall(self.request(order, stream))
            return read_answer(used)

    def is_fine(self):
        return self.ask("hello")[:2] == (200, True)


def read_answer(sock):
    """(status, ended well, bytes, last bytes) of the next answer on a connection.

    The status is 0 when none came. A short stream is held against the oracle.
    """
    head, tail, size, length = b"", b"", 0, None
    try:
        while True:
            block = sock.recv(1 << 18)
            size, tail = size + len(block), (tail + block)[-4000:]
            if b"\r\n\r\n" not in head:
                head += block
                fields = head.partition(b"\r\n\r\n")[0].lower()
                given = fields.partition(b"content-length: ")[2].split(b"\r\n")[0]
                length = len(fields) + 4 + int(given) if given else None
            complete = size >= length if length else tail.endswith(b"\r\n0\r\n\r\n")
            if complete or not block:
                break
    except ConnectionError:
        return 0, False, size, tail
    if complete and size < 4000 and b"text/event-stream" in fields:
        complete = not oracle.fault(dechunk(tail.partition(b"\r\n\r\n")[2]))
    return int(head[9:12] or 0), complete, size, tail[-400:]


def dechunk(raw):
    """A body that came in chunks."""
    body = b""
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        body, raw = body + raw[: int(size, 16)], raw[int(size, 16) + 2 :]
    return body


# Load


def starts(options, upstream):
    """The memory of a process that waits, by how it was started."""

    def measure(name, most, *command, **env):
        more = {"command": list(command)} if command else {}
        for _ in range(2):  # the second time there is byte code
            with Soaked(upstream.url, more=more, PYTHONDONTWRITEBYTECODE="", **env) as ccfix:
                fine, rss = ccfix.is_fine(), ccfix.settled()[0]
        check("waits, started " + name, fine and rss < most, RSS="%g MB" % rss)

    measure("as a script", SCRIPT_MOST)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(CCFIX, folder)
        measure("as python3 -m ccfix", MODULE_MOST, PYTHON, "-m", "ccfix", PYTHONPATH=folder)
    with tempfile.TemporaryDirectory() as folder:
        env = {"PATH": os.environ["PATH"], "HOME": folder}
        harness.run([PYTHON, CCFIX, "install", "--dir", folder], env=env)
        measure("by what install wrote", MODULE_MOST, os.path.join(folder, "ccfix"))


class Reader:
    """One client of a slow stream: its last bytes, words, and when it last got any."""

    def __init__(self):
        self.tail, self.words, self.gap, self.since = b"", 0, 0, time.monotonic()

    def feed(self, block):
        """Whether the answer ends here."""
        now = time.monotonic()
        self.gap, self.since = max(self.gap, now - self.since), now
        self.tail = (self.tail + block)[-200:]
        self.words += block.count(b"word ")
        return not block or self.tail.endswith(b"\r\n0\r\n\r\n")


def streams(options, upstream):
    """200 slow streams at once: all whole, and memory, threads and descriptors as before."""
    with Soaked(upstream.url) as ccfix:
        ccfix.ask("slow 2")
        before, began = ccfix.settled(), time.monotonic()
        spent = -ccfix.processor_time()
        waiting, readers = selectors.DefaultSelector(), [Reader() for _ in range(200)]
        for reader in readers:
            sock = ccfix.connect()
            sock.sendall(ccfix.request("slow %g" % options.seconds))
            sock.setblocking(False)
            waiting.register(sock, selectors.EVENT_READ, reader)
        peak, early = before, None
        while waiting.get_map() and time.monotonic() < began + options.seconds + 60:
            for key, _ in waiting.select(1):
                if key.data.feed(key.fileobj.recv(65536)):
                    waiting.unregister(key.fileobj)
                    key.fileobj.close()
            now = ccfix.figures()
            if not early and time.monotonic() > began + options.seconds / 3:
                early = now
            peak = tuple(map(max, peak, now))
        spent, took = spent + ccfix.processor_time(), time.monotonic() - began
        after = ccfix.settled()
        least = options.seconds * 5  # words: a quarter of what is sent where nobody disturbs
        done = sum(b"message_stop" in r.tail and r.words >= least for r in readers)
        early = early or peak
        steady = after[1] == before[1] and peak[0] - early[0] < 8 and after[2] < 150
        check(
            "200 streams for %g s" % options.seconds,
            done == 200 and steady and before[0] < SCRIPT_MOST and peak[0] < before[0] + 30,
            complete=done,
            RSS_before="%g MB" % before[0],
            after_a_third="%g MB" % early[0],
            at_most="%g MB" % peak[0],
            after="%g MB" % after[0],
            threads="%d -> %d -> %d" % (before[1], peak[1], after[1]),
            descriptors="%d -> %d -> %d" % (before[2], peak[2], after[2]),
            longest_gap="%.2f s" % max(reader.gap for reader in readers),
            CPU="%d %%" % (100 * spent / took),
        )


def requests(options, upstream):
    """Requests in a row, streamed and not, kept alive and not: nothing grows."""

    def run(ccfix, count):
        good, sock = 0, None
        for number in range(count):
            sock, stream = sock or ccfix.connect(), number % 2 == 1
            answer = ccfix.ask("hello" if stream else "at_once", stream, sock)
            good += answer[:2] == (200, True)
            if number % 50 == 49:
                sock.close()
                sock = None
        return good

    with Soaked(upstream.url, LOG_LEVEL="warning") as ccfix:
        run(ccfix, min(1200, options.requests) // 50 * 50)  # fills the ledger of 1,000 rows
        before, began = ccfix.settled(), time.monotonic()
        good = run(ccfix, options.requests // 50 * 50)
        took, after = time.monotonic() - began, ccfix.settled()
        check(
            "%d requests in a row" % options.requests,
            good == options.requests and after[0] - before[0] < 4 and after[1:] == before[1:],
            good=good,
            per_second=round(options.requests / took),
            RSS="%g -> %g MB" % (before[0], after[0]),
            threads="%d -> %d" % (before[1], after[1]),
            descriptors="%d -> %d" % (before[2], after[2]),
        )


# Faults

FAULTS = (
    # name, order to the upstream, statuses, text in the answer, seconds at most
    ("closes without an answer", "close", (502,), b"before it answered", 2),
    ("resets", "reset_it", (502,), b"before it answered", 2),
    ("resets in the middle", "reset_it middle", (200,), b"event: error", 2),
    ("stalls before the head", "stall", (504,), b"timeout_error", 3),
    ("stalls after the head", "stall head", (504,), b"timeout_error", 3),
    ("stalls in the middle", "stall middle", (200,), b"event: error", 3),
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
    ("endless JSON string", "line json", (502,), b"", 8),
    ("gzip", "packed good", (200,), b"Hello", 2),
    ("cut gzip", "packed cut", (502,), b"cut off", 2),
    ("false gzip", "packed false", (502,), b"damaged", 2),
    ("gzip bomb, 300 MB", "packed bomb", (502, 504), b"", 30),
    ("Content-Length too large", "length short", (502,), b"", 3),
    ("Content-Length too small", "length long", (200,), b"Hello", 2),
    ("no Content-Length", "length none", (200,), b"Hello", 2),
    ("100 MB of thinking", "big thinking 100", (200,), b"not a model's reply", 60),
    ("100 MB of text", "big text 100", (200,), b"not a model's reply", 60),
)


def one_fault(ccfix, name, order, statuses, words, seconds):
    began, seen, peak = time.monotonic(), [(0, False, 0, b"")], 0
    thread = threading.Thread(target=lambda: seen.append(ccfix.ask(order)), daemon=True)
    thread.start()
    while thread.is_alive() and time.monotonic() < began + seconds + 30:
        peak = max(peak, ccfix.figures()[0])
        thread.join(0.02)
    took, (status, ended, size, last) = time.monotonic() - began, seen[-1]
    good = status in statuses and ended and words in last and took < seconds
    good = good and peak < 400 and ccfix.is_fine()
    check(
        "upstream: " + name,
        good,
        status=status,
        ended="whole" if ended else "cut",
        bytes=size,
        took="%.2f s" % took,
        RSS_at_most="%g MB" % peak,
        **({} if good else {"last": last}),
    )


def faults(options, upstream):
    with Soaked(upstream.url, TARGET_TIMEOUT="1") as ccfix:
        ccfix.ask("hello")
        for row in FAULTS:
            one_fault(ccfix, *row)
        rss, threads, descriptors = ccfix.settled()
        good = rss < 200 and threads <= 3
        check(
            "after all of these",
            good,
            RSS="%g MB" % rss,
            threads=threads,
            descriptors=descriptors,
        )
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with Soaked("http://127.0.0.1:%d/v1" % nobody.getsockname()[1]) as ccfix:
            status, ended, _, last = ccfix.ask("hello")
            good = status == 502 and ended and b"cannot be reached" in last
            check("upstream: refuses", good, status=status)


def vanishing(options, upstream):
    """Clients that leave at every stage, and slow ones: the upstream calls end, nothing stays."""
    with Soaked(upstream.url) as ccfix:
        ccfix.ask("slow 2")
        before, clients, asked = ccfix.settled(), 40, ccfix.request("slow 30")
        stages = (
            ("before the head", b"", 0.1),
            ("in the head", asked[:30], 0.1),
            ("in the body", asked[:-5], 0.1),
            ("after the request", asked, 0.1),
            ("before the first content", ccfix.request("stall head"), 0.4),
            ("in the middle", asked, 0.6),
        )
        for name, raw, pause in stages:
            socks = [ccfix.connect() for _ in range(clients)]
            for sock in socks:
                sock.sendall(raw)
            time.sleep(pause)
            for number, sock in enumerate(socks):
                if number % 2:
                    now = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
                sock.close()
            began = time.monotonic()
            with contextlib.suppress(TimeoutError):
                gone = lambda: not upstream.open and ccfix.figures()[1] <= before[1]  # noqa: E731
                wait_for(gone, SETTLED, "their end")
            took = time.monotonic() - began
            check(
                "%d clients leave %s" % (clients, name),
                took < 1.5 and not upstream.open,
                upstream_calls_ended_after="%.2f s" % took,
                threads=ccfix.figures()[1],
            )
        slow_reader(ccfix)
        after = ccfix.settled(before[1])
        check(
            "after all of these",
            after[1:] == before[1:] and ccfix.is_fine(),
            RSS="%g -> %g MB" % (before[0], after[0]),
            threads="%d -> %d" % (before[1], after[1]),
            descriptors="%d -> %d" % (before[2], after[2]),
        )


def slow_reader(ccfix):
    with ccfix.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.sendall(ccfix.request("big text 20"))
        time.sleep(1.5)
        held = ccfix.figures()[0]
        status, ended, size, _ = read_answer(sock)
    good = status == 200 and ended and held < 120
    check("a slow reader gets all of 20 MB", good, bytes=size, RSS_while_it_waits="%g MB" % held)


def ending(options, upstream):
    """SIGTERM and Ctrl-C under load: every answer that the client was promised is finished."""
    for name, signum, order, words in (
        ("SIGTERM", signal.SIGTERM, "slow 2 50", b"message_stop"),
        ("Ctrl-C", signal.SIGINT, "slow 2 50", b"message_stop"),
        ("SIGTERM, streams longer than the grace", signal.SIGTERM, "slow 60", b"event: error"),
    ):
        with Soaked(upstream.url) as ccfix:
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
            told = sum(result[:2] == (200, True) and words in result[3] for result in results)
            check(
                name + " with 50 open streams",
                told == 50 and code == 0 and took < 8,
                ended_with=words.decode(),
                told="%d of 50" % told,
                exit_code=code,
                took="%.2f s" % took,
            )


def descriptors(options, upstream):
    """Out of descriptors: waiting connections are served when some are free again."""
    with Soaked(upstream.url, descriptors=64) as ccfix:
        ccfix.ask("hello")
        before, socks = ccfix.settled(), [ccfix.connect() for _ in range(200)]
        time.sleep(1)
        full, spent = ccfix.figures()[2], -ccfix.processor_time()
        time.sleep(1)
        spent += ccfix.processor_time()
        for sock in socks[:100]:
            sock.close()
        socks[150].sendall(ccfix.request("hello"))
        for sock in socks[100:150]:
            sock.close()
        status = read_answer(socks[150])[0]
        for sock in socks:
            sock.close()
        after = ccfix.settled(before[1])
        served = status in (200, 502) and ccfix.is_fine()
        check(
            "200 connections, 64 descriptors",
            served and after[1:] == before[1:] and spent < 0.5,
            open_at_once=full,
            CPU_while_full="%d %%" % (100 * spent),
            then=status,
            descriptors="%d -> %d" % (before[2], after[2]),
        )


def shared_cache(options, upstream):
    """Two proxies on one cache folder, each asked the same things at once."""
    good = []

    def run(ccfix):
        with ccfix.connect() as sock:
            for number in range(200):
                order, stream = "hello" if number % 2 else "at_once", number % 3 == 1
                good.append(ccfix.ask(order, stream, sock)[:2] == (200, True))

    with tempfile.TemporaryDirectory() as folder:
        settings = {"CACHE_ENABLED": "true", "CACHE_DIR": folder}
        settings.update({"CACHE_KEY_MODE": "full", "LEDGER": "true"})
        with Soaked(upstream.url, **settings) as one, Soaked(upstream.url, **settings) as two:
            threads = [threading.Thread(target=run, args=(ccfix,)) for ccfix in (one, two) * 4]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
            lines = (one.printed() + two.printed()).splitlines()
    warnings = [line for line in lines if " warning " in line or " error " in line]
    told = {"good": "%d of 1600" % sum(good), "warnings": len(warnings)}
    told.update({"first": warnings[0]} if warnings else {})
    check("two proxies on one cache folder", sum(good) == 1600 and not warnings, **told)


PARTS = (starts, streams, requests, faults, vanishing, ending, descriptors, shared_cache)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--seconds", type=float, default=60, help="how long the 200 streams last")
    parser.add_argument("--requests", type=int, default=10000, help="how many in a row (by 50)")
    names = ",".join(part.__name__ for part in PARTS)
    parser.add_argument("--only", default=names, help="some of: " + names)
    options = parser.parse_args()
    harness.end_well()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096) if hard > 0 else 4096, hard))
    with Upstream(SCRIPT, most=None) as upstream:
        for part in PARTS:
            if part.__name__ not in options.only.split(","):
                continue
            try:
                part(options, upstream)
            except Exception as error:
                told = "%s: %s" % (type(error).__name__, error)
                check(part.__name__ + " runs to its end", False, error=told)
    print("\n| what | result | figures |\n| --- | --- | --- |")
    for row in ROWS:
        print("| %s |" % " | ".join(row).replace("\n", " "))
    harness.finish()


if __name__ == "__main__":
    sys.exit(main())
