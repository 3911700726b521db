#!/usr/bin/env python3
"""Tests of ccfix: python3 test_ccfix.py. Standard library, loopback only, in the order of ccfix.py's sections.

Further real-server and real-client checks are in .ci/. With ../shared/vectors beside the project, its transcripts are replayed too.
"""
import ast
import base64
import copy
import email.message
import glob
import gzip
import http.client
import io
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zlib
from collections import namedtuple
from unittest import mock

import ccfix

HERE = os.path.dirname(os.path.abspath(__file__))
VECTORS = os.path.join(HERE, "..", "shared", "vectors")


# ======================================================================================================
# Tools of the tests
# ======================================================================================================

def pieces_of(raw, how):
    """Bytes whole, byte by byte, or cut in two at a position."""
    if how == "whole":
        return [raw]
    if how == "bytes":
        return [raw[i:i + 1] for i in range(len(raw))]
    return [raw[:how], raw[how:]]


def grammar(test, events):
    """The oracle: events obey Anthropic's stream grammar. Returns the state at the end: "done", "error" or "open"."""
    state, index, kind = "start", -1, None
    for event in events:
        what = event["type"]
        if what == "ping":
            continue
        test.assertNotIn(state, ("done", "error"), "an event after the end: %r" % event)
        if what == "message_start":
            test.assertEqual(state, "start")
            state = "open"
            test.assertEqual(event["message"]["content"], [])
        elif what == "error":
            test.assertIsNone(kind, "error inside an open block")
            state = "error"
        else:
            test.assertIn(state, ("open", "ending"), what)
            if what == "content_block_start":
                test.assertEqual((state, kind, event["index"]), ("open", None, index + 1))
                index, kind, text = event["index"], event["content_block"]["type"], []
            elif what == "content_block_delta":
                test.assertEqual(event["index"], index)
                wanted = {"text": ("text_delta",), "thinking": ("thinking_delta", "signature_delta"), "tool_use": ("input_json_delta",),
                          "server_tool_use": ("input_json_delta",)}[kind]
                test.assertIn(event["delta"]["type"], wanted)
            elif what == "content_block_stop":
                test.assertEqual(event["index"], index)
                test.assertIsNotNone(kind)
                kind = None
            elif what == "message_delta":
                test.assertIsNone(kind)
                test.assertEqual(state, "open")
                state = "ending"
            elif what == "message_stop":
                test.assertEqual(state, "ending")
                state = "done"
            else:
                test.fail("unknown event %r" % event)
    return "done" if state == "done" else state


def sse_events(text):
    """Event dicts of SSE text, strictly read: an event line, a data line, a blank line."""
    events = []
    for part in text.split("\n\n")[:-1]:
        name, data = part.split("\n")
        assert name.startswith("event: ") and data.startswith("data: "), part
        event = json.loads(data[6:])
        assert event["type"] == name[7:], part
        events.append(event)
    return events


class FakeReply(object):
    """What Upstream.open returns, without sockets."""

    def __init__(self, status, headers, pieces):
        self.status, self.pieces, self.closed = status, pieces, False
        self.headers = email.message.Message()
        for name, value in headers.items():
            self.headers[name] = value

    def blocks(self):
        return iter(self.pieces)

    def read(self, limit=0):
        return b"".join(self.pieces)

    def finish(self):
        self.closed = True

    def close(self):
        self.closed = True


class FakeWires(object):
    """Stands in for Upstream: answer(body) -> FakeReply or an exception. `sent` keeps the request bodies."""

    def __init__(self, answer):
        self.answer, self.sent, self.urls, self.headers, self.replies = answer, [], [], [], []

    def open(self, method, url, headers, body=None, wait=None, timeout=None):
        self.sent.append(json.loads(body.decode()) if body else None)
        self.urls.append(url)
        self.headers.append(headers)
        reply = self.answer(self.sent[-1])
        if isinstance(reply, Exception):
            raise reply
        self.replies.append(reply)
        return reply

    def close(self):
        """Nothing is open."""


def sse(*chunks, **kwargs):
    """The bytes of an OpenAI stream; kwargs: done=False leaves out [DONE]."""
    data = ["data: %s\n\n" % json.dumps(chunk) for chunk in chunks]
    return ("".join(data) + ("" if kwargs.get("done") is False else "data: [DONE]\n\n")).encode()


def delta(finish=None, **fields):
    """A chunk with one delta."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


HELLO_STREAM = sse(delta(content="Hello"), delta("stop"), {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})


def settings_of(**values):
    """Settings with the given values (ENV names), aimed at a loopback provider that nobody knows."""
    values = dict({"TARGET_API_BASE": "http://127.0.0.1:9/v1", "TARGET_MODEL": "m", "TARGET_RETRIES": "0"}, **values)
    return ccfix.Settings([("the test", values)])


def proxy_with(answer, **values):
    """A Proxy on a FakeWires."""
    settings, numbers = settings_of(**values), itertools.count(1)
    proxy = ccfix.Proxy(lambda: settings, lambda level, text: None, new_id=lambda: "%024d" % next(numbers))
    wires = FakeWires(answer)
    proxy.wires = ((settings.ca_bundle, settings.client_cert, settings.insecure), wires)
    return proxy, wires


def no_wait(sock, seconds):
    """A wait that takes no time."""
    return False


def ask(proxy, body, headers=None):
    """(events, error) of one exchange; error: the ProxyError that came before any event, or the Dropped."""
    exchange = ccfix.Exchange(proxy, body, headers or {}, no_wait)
    exchange.bytes_in = len(json.dumps(body))
    out = []
    try:
        if body.get("stream"):
            for text in exchange.batches():
                out.append(text)
        else:
            return list(ccfix.replay(exchange.message())), None
    except (ccfix.ProxyError, ccfix.Dropped) as error:
        return sse_events("".join(out)), error
    return sse_events("".join(out)), None


def request(*messages, **fields):
    """An Anthropic body; a str is a user message."""
    body = {"model": "claude-x", "max_tokens": 32000, "stream": True,
            "messages": [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages or ("hi",)]}
    body.update(fields)
    return body


def tool(name, required=(), **properties):
    """An Anthropic tool; properties: name="string" or a schema."""
    return {"name": name, "description": name, "input_schema": {
        "type": "object", "properties": {key: {"type": value} if isinstance(value, str) else value for key, value in properties.items()},
        "required": list(required)}}


def answered(answer, *messages, **fields):
    """The finished message for a reply's bytes."""
    proxy, _ = proxy_with(lambda sent: FakeReply(200, {"content-type": "text/event-stream"}, [answer]))
    events, error = ask(proxy, request(*messages, **fields))
    if error:
        raise error
    return ccfix.assemble(events)


# ======================================================================================================
# 6  Tool text: arguments
# ======================================================================================================

READ = {"type": "object", "required": ["file_path"], "additionalProperties": False, "properties": {
    "file_path": {"type": "string"}, "offset": {"type": "integer"}, "limit": {"type": "number"},
    "pages": {"type": "string"}}}
BASH = {"type": "object", "required": ["command"], "properties": {
    "command": {"type": "string"}, "timeout": {"type": "number"}, "run_in_background": {"type": "boolean"}}}
EDIT = {"type": "object", "required": ["file_path", "old_string", "new_string"], "properties": {
    "file_path": {"type": "string"}, "old_string": {"type": "string"}, "new_string": {"type": "string"},
    "replace_all": {"type": "boolean"}}}
MIXED = {"type": "object", "required": ["must"], "properties": {
    "must": {"type": "string"}, "i": {"type": "integer"}, "n": {"type": "number"}, "b": {"type": "boolean"},
    "s": {"type": "string"}, "list": {"type": "array", "items": {"type": "integer"}}, "o": {"type": "object"},
    "maybe": {"type": ["string", "null"]}, "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "free": {}, "ref": {"$ref": "#/$defs/x"}, "odd": 5, "both": {"type": ["integer", "string"]},
    "choice": {"enum": ["a", None]}}}
ARGUMENT_SCHEMAS = {"Read": READ, "Bash": BASH, "Edit": EDIT, "Mixed": MIXED, "None": None}

# text, tool -> dict, or None where nothing is certain
REPAIRS = [
    ("", "Bash", {}), (" \n", "Bash", {}), ("null", "Bash", {}), ('""', "Bash", {}),
    ('{"command": "ls"}', "Bash", {"command": "ls"}),
    (r'"{\"command\": \"ls\"}"', "Bash", {"command": "ls"}),
    (json.dumps(json.dumps(json.dumps({"command": 'a "b" \n'}))), "Bash", {"command": 'a "b" \n'}),
    ('{"command":"ls"}{"command":"ls"}', "Bash", {"command": "ls"}),
    ('{"command":"ls"}\n{"command":"l', "Bash", {"command": "ls"}),
    ('{}{"command":"ls"}', "Bash", {"command": "ls"}),
    ('{"command":"ls"}{}', "Bash", {"command": "ls"}), ('{"command":"ls"}{"command":"rm"}', "Bash", None),
    ('{"command":"ls",}', "Bash", {"command": "ls"}),
    ('{"list":[1,2,], "o":{"a":1,},\n}', "Mixed", {"list": [1, 2], "o": {"a": 1}}),
    ("{'command': 'say \"hi\"', 'run_in_background': True, 'timeout': None}", "Bash",
     {"command": 'say "hi"', "run_in_background": True, "timeout": None}),
    (r"""{'command': 'it\'s', "timeout": 5}""", "Bash", {"command": "it's", "timeout": 5}),
    (r"""{"command": "echo \'x\'"}""", "Bash", {"command": "echo 'x'"}),
    ("{'command': 'it's'}", "Bash", None),
    ('{command: "ls"}', "Bash", {"command": "ls"}),
    ('{"command": "a\nb\tc"}', "Bash", {"command": "a\nb\tc"}),
    ('```json\n{"command": "ls"}\n```', "Bash", {"command": "ls"}),
    ('{"command": "ls"}' + " \n" * 900, "Bash", {"command": "ls"}),
    ('{"command": "ls"}}', "Bash", {"command": "ls"}),
    ('{"command": "ls"}</tool_call> it\'s', "Bash", {"command": "ls"}),
    ("ls -la", "Bash", {"command": "ls -la"}), ('"ls -la"', "Bash", {"command": "ls -la"}),
    (r'"\"quoted\" words"', "Bash", {"command": '"quoted" words'}), ("/etc/hosts", "Read", {"file_path": "/etc/hosts"}),
    ("ls", "Edit", None), ('"ls"', "Edit", None), ("ls", "None", None),
    ('command": "ls"}', "Bash", None), ("command: ls", "Bash", None), ('mand": "ls", "timeout": 5', "Bash", None), ("<b>ls</b>", "Bash", None),
    ("true", "Bash", None), ("[1]", "Bash", None),
    ("{", "Bash", None), ('{"command', "Bash", None), ('{"command": "ls', "Bash", None), ('{"command": "ls"', "Bash", None),
    ("{'command': 'ls", "Bash", None), ('{"command": "ls",', "Bash", None), ('"{\\"command\\": \\"l', "Bash", None),
    (r'{"command": "\d+"}', "Bash", None), (r"{'command': '\x41'}", "Bash", None),
    ('{"command": "say "hi" now"}', "Bash", None), ('{"n": NaN}', "Mixed", None), ('{"n": 1e999}', "Mixed", None),
    ('{"i": %s}' % ("9" * 5000), "Mixed", None), ('{"free":' * 20000, "Mixed", None), ("[" * 20000, "Mixed", None),
    ('{"free":' + "[" * 20000 + "]" * 20000 + "}", "Mixed", None), ("'" * 1001, "Bash", None),
    (r'"{\"command\": \"ls\"', "Bash", None), ("{'a':1}" * 50, "Mixed", None),
]

# tool, arguments, coerced
COERCIONS = [
    ("Read", {"file_path": "a", "offset": None, "limit": None, "pages": ""}, {"file_path": "a"}),
    ("Read", {"file_path": "", "offset": "5", "limit": "2.5"}, {"file_path": "", "offset": 5, "limit": 2.5}),
    ("Read", {"file_path": 5, "offset": 3.0, "pages": "1-2"}, {"file_path": "5", "offset": 3, "pages": "1-2"}),
    ("Read", {"file_path": None, "unknown": None, "other": 1}, {"file_path": None, "other": 1}),
    ("Edit", {"file_path": "a", "old_string": "x", "new_string": "", "replace_all": "true"},
     {"file_path": "a", "old_string": "x", "new_string": "", "replace_all": True}),
    ("EnterWorktree", {"name": "", "path": "", "content": ""}, {"content": ""}), ("Write", {"content": ""}, {"content": ""}),
    ("Mixed", {"i": "5.5", "n": "abc", "b": "yes", "s": 1.1, "o": "[1]"},
     {"i": "5.5", "n": "abc", "b": "yes", "s": 1.1, "o": "[1]"}),
    ("Mixed", {"i": "12345678901234567890", "n": "007", "s": True}, {"i": "12345678901234567890", "n": "007", "s": "true"}),
    ("Mixed", {"i": 2.5, "n": 3.0, "b": 1}, {"i": 2.5, "n": 3.0, "b": 1}),
    ("Mixed", {"list": '["1", 2]', "o": '{"a": null}'}, {"list": [1, 2], "o": {"a": None}}),
    ("Mixed", {"list": "a, b"}, {"list": "a, b"}), ("Mixed", {"list": "[" * 20000}, {"list": "[" * 20000}),
    ("Mixed", {"maybe": None, "either": None, "choice": None, "odd": None, "new": None},
     {"maybe": None, "either": None, "choice": None, "odd": None, "new": None}),
    ("Mixed", {"free": None, "ref": None, "both": None, "s": None}, {}),
    ("Mixed", {"either": "5", "both": "5", "free": "5", "ref": "5", "odd": "5"},
     {"either": 5, "both": "5", "free": "5", "ref": "5", "odd": "5"}),
    ("None", {"a": None, "b": "5"}, {"a": None, "b": "5"}),
]
BAD_SCHEMAS = [None, [], 5, {}, {"properties": 5}, {"required": 5}, {"properties": {"a": 5}, "required": {}},
               {"properties": {"a": {"type": 5, "anyOf": 5}}, "required": [5, {}]}, {"properties": {"a": {"enum": 5}}},
               {"properties": {"a": {"type": [5, []]}}}, {"properties": {"a": {"type": "array", "items": 5}}}]

# tool, text, the joined output: byte by byte, also for each split
STREAMS = [
    ("Bash", "", ""), ("Bash", "  ", "{}"), ("Bash", "null", "{}"), ("Bash", "{}", "{}"), ("Bash", " { } ", " { }"),
    ("Bash", '{"command":"ls -la\\n\\u00e9","timeout":5}', '{"command":"ls -la\\n\\u00e9","timeout":5}'),
    ("Mixed", '{ "o" : {"a]": ["\\"", {}], "b": 1.50} ,\n "s": "x" }', '{ "o" : {"a]": ["\\"", {}], "b": 1.50} ,\n "s": "x" }'),
    ("Read", '{"file_path":"a","pages":"","offset":null}', '{"file_path":"a"}'),
    ("Read", '{"pages":"", "offset": null, "file_path": "a"}', '{ "file_path": "a"}'),
    ("Read", '{"pages":"","offset":null}', "{}"),
    ("Edit", '{"new_string":"","old_string":"\\ud83d\\ude00","replace_all":"false"}',
     '{"new_string":"","old_string":"\\ud83d\\ude00","replace_all":false}'),
    ("Bash", '{"command":"a\n\tb\x00"}', '{"command":"a\\n\\tb\\u0000"}'),
    ("Bash", r"""{"command":"it\'s"}""", '{"command":"it\'s"}'),
    ("Bash", '{"command":"ls",}', '{"command":"ls"}'), ("Bash", '{"command":"ls"}{"command":"ls"}', '{"command":"ls"}'),
    ("Bash", '{"command":"ls"}}', '{"command":"ls"}'), ("Bash", '{"command":"ls"}' + "\n " * 20, '{"command":"ls"}'),
    ("Bash", '{}{"command":"ls"}', '{"command": "ls"}'),
    ("Bash", '{"command":"ls"} {"command":"rm"}', '{"command":"ls"} {"command":"rm"}'),
    ("Bash", '{"command":"ls","timeout":\'5\'}', '{"command":"ls", "timeout": 5}'),
    ("Bash", "{'command': 'ls'}", '{"command": "ls"}'), ("Bash", '"{\\"command\\": \\"ls\\"}"', '{"command": "ls"}'),
    ("Bash", '{"command":"ls","run_in_background":True}', '{"command":"ls", "run_in_background": true}'),
    ("Mixed", '{"i":"1","i":"2"}', '{"i":1, "i": 2}'), ("Mixed", '{"list":["1"],"o":"{}"}', '{"list":[1],"o":{}}'),
    ("Mixed", '{"o":{"a":"x\ny"}}', '{"o":{"a": "x\\ny"}}'),
    ("Bash", '{"command":"ls', '{"command":"ls'), ("Bash", '{"command":"ls"', '{"command":"ls"'),
    ("Bash", '{"command":"\\d"}', '{"command":"\\d"}'), ("Bash", '{"command":"a "b" c"}', '{"command":"a "b" c"}'),
    ("Bash", '{"timeout":"5","command":"l', '{"timeout":5,"command":"l'), ("Bash", "ls", '{"command": "ls"}'),
    ("Bash", "{,}", "{}"), ("Bash", '{"timeout":NaN}', '{"timeout":NaN}'), ("Mixed", '{"o":{]}}', '{"o":{]}}'),
]


def streamed(tool, fragments, cut=False):
    stream = ccfix.ArgumentStream(tool, ARGUMENT_SCHEMAS.get(tool))
    text = "".join([stream.feed(fragment) for fragment in fragments]) + stream.finish(cut)
    return text, stream


def splits(text):
    """The text whole, cut in two at each place, and in single characters."""
    yield [text]
    for at in range(len(text) + 1):
        yield [text[:at], text[at:]]
    yield list(text)


class TestArgumentRepair(unittest.TestCase):
    def test_only_the_certain_is_repaired(self):
        for text, tool, wanted in REPAIRS:
            with self.subTest(text=text[:60]):
                self.assertEqual(ccfix.repair_arguments(text, ARGUMENT_SCHEMAS[tool]), wanted)

    def test_what_is_no_text_is_no_error(self):
        self.assertEqual([ccfix.repair_arguments(value, None) for value in (None, {"a": 1}, 5, [], b"{}")],
                         [{}, {"a": 1}, None, None, None])

    def test_broken_schemas_change_nothing(self):
        for schema in BAD_SCHEMAS:
            for text in ('{"a": "5"}', '{"a": null, "b": null}', '{"a": ["5"]}', "word", '"word"'):
                value = ccfix.repair_arguments(text, schema)
                self.assertIn(value, ({"a": "5"}, {"a": None, "b": None}, {"a": ["5"]}, None))
                kept = {key: item for key, item in (value or {}).items() if item is not None}
                self.assertIn(ccfix.coerce_arguments("T", value or {}, schema), (value or {}, kept, {"b": None}))


class TestArgumentCoercion(unittest.TestCase):
    def test_coercion_is_lossless_or_left_alone(self):
        for tool, arguments, wanted in COERCIONS:
            with self.subTest(tool=tool, arguments=str(arguments)[:80]):
                before = json.dumps(arguments)
                self.assertEqual(json.dumps(ccfix.coerce_arguments(tool, arguments, ARGUMENT_SCHEMAS.get(tool))), json.dumps(wanted))
                self.assertEqual(json.dumps(arguments), before)


class TestArgumentStream(unittest.TestCase):
    def test_any_split_gives_the_same_text(self):
        for tool, text, wanted in STREAMS:
            with self.subTest(text=text):
                for fragments in splits(text):
                    joined, stream = streamed(tool, fragments)
                    self.assertEqual((joined, stream.raw), (wanted, text), fragments)

    def test_each_repair_is_the_same_when_streamed(self):
        for text, tool, wanted in REPAIRS:
            with self.subTest(text=text[:60]):
                for fragments in splits(text) if len(text) < 100 else ([text], [text[:50], text[50:]]):
                    joined, stream = streamed(tool, fragments)
                    if wanted is None:
                        self.assertEqual(joined, text)
                    else:
                        self.assertEqual(json.loads(joined or "{}"), ccfix.coerce_arguments(tool, wanted, ARGUMENT_SCHEMAS[tool]))

    def test_cut_text_stays_as_it_is_unless_the_object_was_whole(self):
        for tool, text, wanted in [("Bash", "ls", "ls"), ("Bash", "{'command': 'ls'}", "{'command': 'ls'}"),
                                   ("Bash", '{"command": "ls"}  ', '{"command": "ls"}'), ("Bash", "", ""),
                                   ("Bash", '{"command": "ls"}{"comm', '{"command": "ls"}')]:
            for fragments in splits(text):
                self.assertEqual(streamed(tool, fragments, cut=True)[0], wanted)

    def test_strings_go_out_at_once_and_the_rest_when_whole(self):
        stream = ccfix.ArgumentStream("Bash", BASH)
        rows = [('{"timeout": "5', ""), ('0", "com', '{"timeout": 50'), ('mand": "', ""), ("l", ', "command": "l'), ("s\\", "s"),
                ("n\\u00", "\\n"), ("e9", "\\u00e9"), ('"', '"'), ("}", "}"), ("\n\n", ""), ("}", "")]
        self.assertEqual([stream.feed(fragment) for fragment, _ in rows], [out for _, out in rows])
        self.assertEqual((stream.complete, stream.finish(), stream.finish()), (True, "", ""))
        self.assertRaises(RuntimeError, stream.feed, "x")

    def test_complete_tells_whether_an_object_came(self):
        for text, during, after in [("{}", True, True), ('{"command":"l', False, False), ("{'a':1}", False, True),
                                    ("", False, False), ("null", False, True)]:
            stream = ccfix.ArgumentStream("Bash", BASH)
            stream.feed(text)
            seen = stream.complete
            stream.finish()
            self.assertEqual((seen, stream.complete), (during, after), text)

    def test_small_fragments_of_large_values_take_linear_time(self):
        for text in ('{"o":{"a":"%s"}}' % ("x" * 30000), '{"list":[%s1]}' % ("1," * 30000), '{"s":"%s"}' % ("\n" * 30000),
                     '{"i":%s5}' % (" " * 30000), '{"i":%s' % ("5" * 30000), '{"%s' % ("k" * 30000), "x" * 30000,
                     '{"s":"x"}' + " " * 30000):
            joined, stream = streamed("Mixed", [text[at:at + 3] for at in range(0, len(text), 3)])
            self.assertEqual(stream.raw, text)


LETTERS = ["a", "Z", " ", "\n", "\t", "\\", '"', "'", "/", "{", "}", "[", ",", ":", "\x00", "\x7f", "\u00e9", "\u2028", "\ud83d",
           "\ude00", "\U0001f600", "5", "true", "null"]
NAMES = ["must", "i", "n", "b", "s", "list", "o", "maybe", "either", "free", "ref", "odd", "both", "choice", "pages",
         "file_path", "command", "a,b", 'q"', "\u00e9", ""]
KINDS = ["string", "integer", "number", "boolean", "array", "object", "null", ["string", "null"], ["integer", "string"], 5, []]


def random_text(dice):
    return "".join(dice.choice(LETTERS) for _ in range(dice.randrange(8)))


def random_value(dice, depth=0):
    kind = dice.randrange(11 if depth < 3 else 8)
    if kind > 8:
        return {random_text(dice): random_value(dice, depth + 1) for _ in range(dice.randrange(4))}
    if kind == 8:
        return [random_value(dice, depth + 1) for _ in range(dice.randrange(4))]
    return [random_text(dice), random_text(dice), str(dice.randrange(-99, 99)), dice.randrange(-10 ** 6, 10 ** 6), None,
            dice.choice([True, False, "true", "false", 3.0, "[1]", '{"a": 1}']), dice.random(), ""][kind]


def random_schema(dice):
    if dice.random() < 0.3:
        return dice.choice([MIXED, READ, BASH, None])
    properties = {name: dice.choice([{}, 5, {"type": dice.choice(KINDS)}, {"type": dice.choice(KINDS)},
                                     {"anyOf": [{"type": "integer"}, dice.choice([{"type": "null"}, {}])]},
                                     {"type": "array", "items": {"type": dice.choice(KINDS)}}])
                  for name in dice.sample(NAMES, 12)}
    return {"properties": properties, "required": dice.sample(NAMES, 3), "additionalProperties": dice.random() < 0.5}


def random_fragments(dice, text):
    size, fragments, at = dice.choice([1, 3, 8, 40]), [], 0
    while at < len(text):
        end = at + dice.randint(1, size)
        fragments.append(text[at:end])
        at = end
    return fragments


def corrupted(dice, text):
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(text) + 1)
        text = dice.choice([text[:at], text[:at] + dice.choice(LETTERS) + text[at:], text[:at] + text[at + 1:],
                            text[:at] + text[at:].replace('"', "'"), text + text[:at], text[at:]])
    return text


class TestArgumentFuzz(unittest.TestCase):
    TOOLS = ["Read", "EnterWorktree", "Other"]

    def cases(self, seed, count):
        dice = random.Random(seed)
        for _ in range(count):
            value = {dice.choice(NAMES): random_value(dice) for _ in range(dice.randrange(7))}
            text = json.dumps(value, ensure_ascii=dice.random() < 0.5, indent=dice.choice([None, None, 1]),
                              separators=dice.choice([None, (",", ":"), (" , ", " : ")]))
            yield dice, dice.choice(self.TOOLS), random_schema(dice), value, text

    def run_stream(self, dice, tool, schema, text):
        stream = ccfix.ArgumentStream(tool, schema)
        sent = [stream.feed(fragment) for fragment in random_fragments(dice, text)]
        return "".join(sent) + stream.finish(), stream

    def test_whole_objects_come_out_coerced(self):
        for dice, tool, schema, value, text in self.cases(1, 1000):
            joined, stream = self.run_stream(dice, tool, schema, text)
            wanted = ccfix.coerce_arguments(tool, value, schema)
            self.assertEqual(json.dumps(json.loads(joined)), json.dumps(wanted), (tool, schema, text))
            self.assertTrue(stream.complete)
            if json.dumps(wanted) == json.dumps(value):
                self.assertEqual(joined, text)

    def test_corrupted_text_is_repaired_or_stays_bad(self):
        for dice, tool, schema, _, text in self.cases(2, 1000):
            text = corrupted(dice, text)
            joined, stream = self.run_stream(dice, tool, schema, text)
            found = ccfix.repair_arguments(text, schema)
            self.assertEqual(stream.raw, text)
            if found is None:
                self.assert_still_bad(joined, text)
            elif text:
                wanted = ccfix.coerce_arguments(tool, found, schema)
                self.assertTrue(joined == text or json.dumps(json.loads(joined), sort_keys=True)
                                == json.dumps(wanted, sort_keys=True), (tool, schema, text, joined))

    def assert_still_bad(self, joined, text):
        if joined != text:
            self.assertRaises(ValueError, json.loads, joined)


# ======================================================================================================
# 6  Tool text: calls written as text
# ======================================================================================================

WEATHER = {"type": "object", "required": ["city"], "properties": {
    "city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}, "deep": {"type": ["boolean", "null"]}}}
OFFERED = {"get_weather": WEATHER, "Bash": {"type": "object", "properties": {"command": {"type": "string"}}}, "now": None}

PARIS = ("get_weather", {"city": "Paris"})
PARIS_3 = ("get_weather", {"city": "Paris", "days": 3})
OSLO = ("get_weather", {"city": "Oslo"})
NOW = ("now", {})


def call(*made):
    return [("call", one) for one in made]


def plain_piece(text):
    return [("text", text)]


def wide(text):
    """DeepSeek's full-width bars and low blocks, typed as | and _ between angle brackets."""
    return text.replace("|", "\uff5c").replace("_", "\u2581")


HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
HERMES_OSLO = HERMES.replace("Paris", "Oslo")
QWEN = "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>"
GLM = ("<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
       "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>")
KIMI_ONE = '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>'
KIMI = "<|tool_calls_section_begin|>" + KIMI_ONE + "<|tool_calls_section_end|>"
DSML_ONE = ('<|DSML|invoke name="get_weather">\n<|DSML|parameter name="city" string="true">Paris</|DSML|parameter>\n'
            '<|DSML|parameter name="days" string="false">3</|DSML|parameter>\n</|DSML|invoke>').replace("|", "\uff5c")
DSML = "<\uff5cDSML\uff5cfunction_calls>\n" + DSML_ONE + "\n</\uff5cDSML\uff5cfunction_calls>"
DSML_JSON = '<\uff5cDSML\uff5cinvoke name="get_weather">{"city": "Paris"}</\uff5cDSML\uff5cinvoke>'
R1_ONE = (wide("<|tool_call_begin|>") + "function" + wide("<|tool_sep|>") + 'get_weather\n```json\n{"city": "Paris"}\n```'
          + wide("<|tool_call_end|>"))
R1 = wide("<|tool_calls_begin|>") + R1_ONE + "\n" + R1_ONE.replace("Paris", "Oslo") + wide("<|tool_calls_end|>")
V31_ONE = wide("<|tool_call_begin|>") + "get_weather" + wide("<|tool_sep|>") + '{"city": "Paris"}' + wide("<|tool_call_end|>")
V31 = wide("<|tool_calls_begin|>") + V31_ONE + wide("<|tool_calls_end|>")
MINIMAX = ('<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n</invoke>\n'
           '<invoke name="now">\n</invoke>\n</minimax:tool_call>')
HARMONY = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"Paris"}<|call|>'
JSON_CALL = '{"name": "get_weather", "%s": {"city": "Paris"}}'
FILE = 'print("</tool_call>")\n\nx = "<tool_call>"\n</parameter>\n`'

CALLS = [       # name, text, pieces
    ("hermes", HERMES, call(PARIS)),
    ("hermes after prose", "Sure.\n\n" + HERMES, plain_piece("Sure.") + call(PARIS)),
    ("two in a row", HERMES + "\n" + HERMES_OSLO, call(PARIS, OSLO)),
    ("two, no space", HERMES + HERMES_OSLO, call(PARIS, OSLO)),
    ("prose after", HERMES + "\n\nDone.", call(PARIS) + plain_piece("Done.")),
    ("indented", "List:\n  - a\n    " + HERMES, plain_piece("List:\n  - a") + call(PARIS)),
    ("arguments first", '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>', call(PARIS)),
    ("arguments as text", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
     call(PARIS)),
    ("no arguments", '<tool_call>{"name": "now"}</tool_call>', call(NOW)),
    ("a brace forgotten", HERMES.replace("}}", "}"), call(PARIS)),
    ("a trailing comma", HERMES.replace("}}", ",}}"), call(PARIS)),
    ("python quotes", HERMES.replace('"', "'"), call(PARIS)),
    ("a list", '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now"}]</tool_call>',
     call(PARIS, NOW)),
    ("stuttered opening", "<tool_call>\n" + HERMES, plain_piece("<tool_call>") + call(PARIS)),
    ("closing tag in a string", '<tool_call>{"name": "Bash", "arguments": {"command": %s}}</tool_call>' % json.dumps(FILE),
     call(("Bash", {"command": FILE}))),
    ("closing tag left out", HERMES.replace("</tool_call>", ""), call(PARIS)),
    ("after closed fence", "```\ncode\n```\n" + HERMES, plain_piece("```\ncode\n```") + call(PARIS)),
    ("after nested fences", "```markdown\n```python\nx\n```\n```\n" + HERMES,
     plain_piece("```markdown\n```python\nx\n```\n```") + call(PARIS)),
    ("after one-line fence", "```x = 1```\n" + HERMES, plain_piece("```x = 1```") + call(PARIS)),
    ("after open inline code", "a ` b\n" + HERMES, plain_piece("a ` b") + call(PARIS)),
    ("after prose about it", "<tool_call> is the tag.\n" + HERMES, plain_piece("<tool_call> is the tag.") + call(PARIS)),
    ("after a refused call", HERMES.replace("get_", "got_") + "\n" + HERMES, plain_piece(HERMES.replace("get_", "got_")) + call(PARIS)),
    ("qwen coder", QWEN, call(PARIS_3)),
    ("qwen coder, wrapped", "Ok\n<tool_call>\n" + QWEN + "\n</tool_call>", plain_piece("Ok") + call(PARIS_3)),
    ("qwen coder, wrapper unopened", QWEN + "\n" + QWEN, call(PARIS_3, PARIS_3)),
    ("qwen coder, file in a value", "<tool_call><function=Bash><parameter=command>\n" + FILE
     + "\n</parameter></function></tool_call>",
     call(("Bash", {"command": FILE}))),
    ("qwen coder, last wrapper left out", "<tool_call>\n" + QWEN, call(PARIS_3)),
    ("llama function", '<function=get_weather>{"city": "Paris"}</function>', call(PARIS)),
    ("glm", GLM, call(PARIS_3)),
    ("glm, no arguments", "<tool_call>now\n</tool_call>", call(NOW)),
    ("glm, file in a value", "<tool_call>Bash\n<arg_key>command</arg_key>\n<arg_value>" + FILE + "</arg_value>\n</tool_call>",
     call(("Bash", {"command": FILE}))),
    ("kimi", "Looking. " + KIMI, plain_piece("Looking.") + call(PARIS)),
    ("kimi, no section", KIMI_ONE, call(PARIS)),
    ("kimi, two", KIMI.replace(KIMI_ONE, KIMI_ONE + KIMI_ONE.replace(":0", ":1").replace("Paris", "Oslo")), call(PARIS, OSLO)),
    ("dsml", "Sure." + DSML, plain_piece("Sure.") + call(PARIS_3)),
    ("dsml v4", DSML.replace("function_calls", "tool_calls"), call(PARIS_3)),
    ("dsml, no wrapper", "Sure.\n" + DSML_ONE, plain_piece("Sure.") + call(PARIS_3)),
    ("dsml, json", DSML_JSON, call(PARIS)),
    ("deepseek r1, a fence inside", R1, call(PARIS, OSLO)),
    ("deepseek v3.1", V31, call(PARIS)),
    ("deepseek v3.1, no section", V31_ONE, call(PARIS)),
    ("minimax", "Ok." + MINIMAX, plain_piece("Ok.") + call(PARIS, NOW)),
    ("mistral list", "Ok[TOOL_CALLS][" + JSON_CALL % "arguments" + ', {"name": "now", "arguments": {}}]',
     plain_piece("Ok") + call(PARIS, NOW)),
    ("mistral args", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}', call(PARIS, NOW)),
    ("mistral, text behind", "[TOOL_CALLS][" + JSON_CALL % "arguments" + "]\nDone.", call(PARIS) + plain_piece("Done.")),
    ("llama tag", "<|python_tag|>" + JSON_CALL % "parameters", call(PARIS)),
    ("llama bare", JSON_CALL % "parameters", call(PARIS)),
    ("llama bare, two", "\n" + JSON_CALL % "parameters" + "; " + JSON_CALL % "arguments" + "\n", call(PARIS, PARIS)),
    ("openai bare", '{"type": "function", "function": ' + JSON_CALL % "arguments" + "}", call(PARIS)),
    ("harmony", "<|channel|>analysis<|message|>Need `weather.<|end|><|start|>assistant" + HARMONY,
     [("thinking", "Need `weather.")] + call(PARIS)),
    ("harmony, stop token eaten", HARMONY.replace("<|call|>", ""), call(PARIS)),
    ("harmony, recipient first", "<|start|>assistant to=functions.now<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
     call(NOW)),
    ("harmony final", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello <|x|>.<|return|>",
     [("thinking", "Hm."), ("text", "Hello <|x|>.")]),
    ("harmony preamble", "<|channel|>commentary<|message|>I look.<|end|>" + HARMONY, plain_piece("I look.") + call(PARIS)),
    ("lm studio", "[TOOL_REQUEST]" + JSON_CALL % "arguments" + "[END_TOOL_REQUEST]", call(PARIS)),
    ("lfm2", "<|tool_call_start|>[" + JSON_CALL % "arguments" + "]<|tool_call_end|>", call(PARIS)),
    ("cohere", '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "now", "parameters": {}}]<|END_ACTION|>', call(NOW)),
]

PROSE = [       # name, text that must come out as it came
    ("middle of a line", "Qwen emits " + HERMES + " blocks."),
    ("fence", "So:\n```\n" + HERMES + "\n```\nand so on\n"),
    ("fence with a language", "```xml\n" + QWEN + "\n```"),
    ("fence in a line", "So: ```xml\n" + QWEN + "\n" + KIMI + "\n```"),
    ("fence in a fence", "```markdown\n```xml\n" + HERMES + "\n```\n" + HERMES + "\n```"),
    ("longer fence", "````\n```\n" + HERMES + "\n```\n````"),
    ("inline code", "Kimi writes `" + KIMI + "` and DeepSeek ``" + DSML_ONE.replace("\n", "") + "``."),
    ("unknown name", HERMES.replace("get_weather", "foo_bar")),
    ("unknown name, qwen", QWEN.replace("get_weather", "foo_bar")),
    ("unknown name, kimi", KIMI.replace("get_weather", "foo_bar")),
    ("one of two unknown", KIMI.replace(KIMI_ONE, KIMI_ONE + KIMI_ONE.replace("get_weather", "foo_bar"))),
    ("arguments a list", '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>'),
    ("no json", "<tool_call>{get_weather Paris}</tool_call>"),
    ("cut off", HERMES[:-18]),
    ("cut off in a string", HERMES[:50]),
    ("cut off, a required parameter missing", "<function=get_weather>\n<parameter=days>\n3\n</parameter>\n"),
    ("cut off behind the opening", "Now.\n<tool_call>\n"),
    ("prose after the opening", "<tool_call> is a tag, </tool_call> ends it.\n<function=get_weather> too\n"),
    ("harmony prose", "The mark <|channel|>, <|end|> and <|start|>assistant."),
    ("mistral prose", "[TOOL_CALLS] is Mistral's token; [TODO] is not, [T"),
    ("json answer", '{"name": "Bob", "age": 3}\n'),
    ("json with text behind", JSON_CALL % "arguments" + "\nis what I would send."),
    ("json not alone", "I send " + JSON_CALL % "arguments"),
    ("json in a line of its own", "I send\n" + JSON_CALL % "arguments"),
    ("generics", "Vec<T>, a<b, List<Map<K, V>>,\n<div>\n  <function name='x'>\n<tool_call\n"),
    ("only white space", " \n\n\t"),
    ("white space around", "\n\n  a  \n\n b \n"),
    ("odd back-ticks", "`` ` ``` a\n`\n``"),
]

SOUP = (["<tool_call>", "</tool_call>", "<function=now>", "<function=", "</function>", "<parameter=city>", "</parameter>", "[TOOL_CALLS]",
         "[TOOL_REQUEST]", "[END_TOOL_REQUEST]", "[ARGS]", "<|python_tag|>", "now", "get_weather", '{"name": "now"', '"arguments": {}', "{", "}",
         "[", "]", '"', "`", "```", "```json\n", "\n", "\n\n", " ", "a", "Some words ", "\\", "<arg_key>", "</arg_key>", "<minimax:tool_call>",
         '<invoke name="now">', "</invoke>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "\u00e9\ud83d"]
        + [wide("<|tool_calls_begin|>"), wide("<|tool_sep|>"), DSML_ONE[:20], DSML_ONE[-20:]])


def joined(pieces):
    """Pieces with neighbours of a kind joined, and arguments read."""
    out = []
    for kind, value in pieces:
        value = (value[0], json.loads(value[1])) if kind == "call" else value
        if out and kind != "call" and out[-1][0] == kind:
            out[-1] = (kind, out[-1][1] + value)
        else:
            out.append((kind, value))
    return out


def scanned(deltas, tools=OFFERED):
    """What a caller makes of deltas who feeds only what may matter."""
    calls, out = ccfix.TextCalls(tools), []
    for delta in deltas:
        if calls.held or calls.TRIGGER(delta):
            out += calls.feed(delta)
        else:
            out.append(("text", delta))
    return joined(out + calls.finish())


def in_any_split(text):
    """The text whole, cut in two at each place, and in single characters."""
    yield [text]
    yield list(text)
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]


class TestTextCalls(unittest.TestCase):
    maxDiff = None

    def test_calls_are_found_in_any_split(self):
        for name, text, pieces in CALLS:
            with self.subTest(name):
                for deltas in in_any_split(text):
                    self.assertEqual(scanned(deltas), pieces, deltas)

    def test_prose_stays_as_it_is_in_any_split(self):
        for name, text in PROSE:
            with self.subTest(name):
                for deltas in in_any_split(text):
                    self.assertEqual(scanned(deltas), plain_piece(text), deltas)

    def test_values_take_the_type_of_their_schema(self):
        for key, written, value in [
            ("city", "\n01\n", "01"), ("city", "\n\n a \n\n", "\n a \n"), ("city", "true", "true"), ("city", "a\n", "a\n"),
             ("city", "\n", ""),
            ("days", "\n3\n", 3), ("days", "three", "three"), ("tags", '["a"]', ["a"]), ("deep", "true", True),
             ("deep", "null", None),
            ("other", "3", 3), ("other", "true", True), ("other", '{"a": 1}', {"a": 1}), ("other", "null", "null"), ("other",
             '"a"', '"a"'),
            ("other", "a <b>", "a <b>"), ("other", "NaN", "NaN"), ("city", "a</parameter>b", "a</parameter>b"),
        ]:
            with self.subTest(key, written=written):
                text = "<function=get_weather><parameter=%s>%s</parameter></function>" % (key, written)
                self.assertEqual(scanned([text]), call(("get_weather", {key: value})))

    def test_dsml_says_itself_what_is_a_string(self):
        parameter = '<\uff5cDSML\uff5cparameter name="days" string="%s">%s</\uff5cDSML\uff5cparameter>'
        for verbatim, written, value in [
            ("true", "\n3\n", "\n3\n"), ("false", "3", 3), ("false", '"a"', "a"), ("false", "a b", "a b"), ("false", "null", None),
        ]:
            text = '<\uff5cDSML\uff5cinvoke name="get_weather">' + parameter % (verbatim, written) + "</\uff5cDSML\uff5cinvoke>"
            self.assertEqual(scanned([text]), call(("get_weather", {"days": value})))

    def test_prose_is_not_held_longer_than_needed(self):
        calls = ccfix.TextCalls(OFFERED)
        for delta, out in [("Hi", plain_piece("Hi")), (" the", plain_piece(" the")), (" a < b", plain_piece(" a < b")), ("\n", []), ("b", plain_piece("\nb")),
                           ("\n<tool", []), (" x", plain_piece("\n<tool x")), ("\n<tool_call>no ", []), ("<b",
                            plain_piece("\n<tool_call>no <b"))]:
            self.assertEqual(joined(calls.feed(delta)), out, delta)
        self.assertFalse(calls.held)

    def test_prose_in_the_middle_of_a_line_need_not_be_fed(self):
        for text in ("word", " word", "a {b}", "x[0]", "\u00e9", " ~~~"):
            self.assertFalse(ccfix.TextCalls.TRIGGER(text), text)

    def test_a_call_without_an_end_is_let_go(self):
        calls, text = ccfix.TextCalls(OFFERED), '<tool_call>{"name": "now", "arguments": {"a": "'
        out = calls.feed(text)
        self.assertEqual(out, [])
        for _ in range(70):
            out += calls.feed("x" * 4096)
        self.assertEqual(joined(out)[0], ("text", text + "x" * len(joined(out)[0][1][len(text):])))
        self.assertGreater(len(joined(out)[0][1]), 1 << 18)
        self.assertFalse(calls.held)

    def test_any_soup_is_text_or_calls_and_no_split_changes_it(self):
        rng = random.Random(7)
        for _ in range(300):
            pieces = [rng.choice(SOUP) for _ in range(rng.randrange(1, 25))]
            text = "".join(pieces)
            whole = scanned([text])
            self.assertEqual(scanned(pieces), whole, text)
            self.assertEqual(scanned(list(text)), whole, text)
            if all(kind != "call" for kind, _ in whole):
                self.assertEqual(whole, plain_piece(text) if text else [])

    def test_cut_calls_are_text_or_whole(self):
        for name, text, pieces in CALLS:
            made = [value for kind, value in pieces if kind == "call"]
            for end in range(len(text)):
                found = [value for kind, value in scanned([text[:end]]) if kind == "call"]
                for (tool, arguments), (wanted, whole) in zip(found, made):     # GLM writes no end of the parameters
                    self.assertEqual((tool, dict(whole, **arguments)), (wanted, whole), (name, text[:end]))

    def test_time_grows_with_the_length_only(self):
        opening = '<tool_call>{"name": "now", "arguments": {"a": "'
        for piece in ("<tool_call>\n", "\n", " ", "`", "<", "[T", "\n<function=now>{", "</tool_call>", "<tool_call>x</tool_call>\n", opening, "{"):
            for head in ("", opening):
                text = head + piece * (12000 // len(piece))
                start = time.process_time()
                scanned([text[at:at + 5] for at in range(0, len(text), 5)])
                scanned([text])
                self.assertLess(time.process_time() - start, 2, (head, piece))


# ======================================================================================================
# 9  Upstream
# ======================================================================================================

CUT, RST, EARLY = "CUT", "RST", "EARLY"     # end the connection; the same with a reset; answer before the body is read
Request = namedtuple("Request", "method path headers body connection")


class FakeUpstream:
    """A scripted server on a free port of 127.0.0.1.

    script: one reply for each request in order of arrival, the last one for all that follow. A reply is a piece or a list of
    pieces: bytes; a float, seconds to wait; a threading.Event to wait for; CUT or RST; EARLY, first of all; or a function of
    the Request that returns a reply. The connection is then kept for the next request. tls: (cert, key) files.

    requests: what came, as Request; headers have lower-case names. connections: how many came.
    gone: an Event, set as soon as a client hangs up, also in the middle of a reply.
    """

    def __init__(self, *script, tls=None):
        self.script, self.requests, self.connections = script, [], 0
        self.gone, self.stopped, self.lock = threading.Event(), threading.Event(), threading.Lock()
        self.context = None
        if tls:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if hasattr(ssl, "PROTOCOL_TLS_SERVER") else ssl.PROTOCOL_TLS)
            self.context.load_cert_chain(*tls)
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(64)
        self.port = self.listener.getsockname()[1]
        self.url = "%s://127.0.0.1:%d" % ("https" if tls else "http", self.port)
        self.sockets = []
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        self.stopped.set()
        for sock in [self.listener] + self.sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()

    def accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.sockets.append(sock)
            with self.lock:
                self.connections += 1
            threading.Thread(target=self.serve, args=(sock, self.connections), daemon=True).start()

    def serve(self, sock, number):
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.context:
                sock = self.context.wrap_socket(sock, server_side=True)
                self.sockets.append(sock)
            with sock, sock.makefile("rb") as file:
                while self.exchange(sock, file, number):
                    pass
        except (OSError, ValueError):
            self.gone.set()

    def exchange(self, sock, file, number):
        """Answers one request; False when the connection is over."""
        line = file.readline().decode("latin-1").split()
        if not line:
            self.gone.set()
            return False
        headers = {}
        for field in iter(file.readline, b"\r\n"):
            name, _, value = field.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        with self.lock:
            request = Request(line[0], line[1], headers, b"", number)
            index = len(self.requests)
            reply = self.script[min(index, len(self.script) - 1)]
            self.requests.append(request)
        if not isinstance(reply, (list, tuple)) or EARLY not in reply:
            request = request._replace(body=file.read(int(headers.get("content-length", 0))))
            self.requests[index] = request
        return self.play(sock, reply, request)

    def play(self, sock, piece, request):
        if callable(piece):
            return self.play(sock, piece(request), request)
        if isinstance(piece, (list, tuple)):
            return all(self.play(sock, each, request) for each in piece)
        if isinstance(piece, bytes):
            sock.sendall(piece)
        elif isinstance(piece, float):
            return self.quiet(sock, threading.Event(), piece)
        elif isinstance(piece, threading.Event):
            return self.quiet(sock, piece, 10)
        elif piece == RST:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return piece not in (CUT, RST)

    def quiet(self, sock, event, seconds):
        """Waits for the event, at most `seconds`; False when the client hangs up meanwhile."""
        end = time.monotonic() + seconds
        while not event.is_set() and not self.stopped.is_set() and time.monotonic() < end:
            if select.select([sock], [], [], 0.002)[0] and not self.context and not sock.recv(1, socket.MSG_PEEK):
                self.gone.set()
                return False
        return not self.stopped.is_set()


def counted(body, status="200 OK", extra=""):
    head = "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n" % (status, len(body), extra)
    return head.encode() + body


def chunked(*pieces, end=b"0\r\n\r\n"):
    """A chunked reply of these chunks."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + end


class UpstreamCase(unittest.TestCase):
    def setUp(self):
        no_proxy = mock.patch.dict(os.environ)
        no_proxy.start()
        self.addCleanup(no_proxy.stop)
        for name in list(os.environ):
            if name.lower().endswith("_proxy"):
                del os.environ[name]

    def fake(self, *script, **kwargs):
        server = FakeUpstream(*script, **kwargs)
        self.addCleanup(server.close)
        return server

    def client(self, **settings):
        upstream = ccfix.Upstream(**settings)
        self.addCleanup(upstream.close)
        return upstream

    def ask(self, upstream, url, body=b"{}", method="POST", **kwargs):
        """(status, body) of a whole exchange."""
        reply = upstream.open(method, url, {"Content-Type": "application/json"}, body, **kwargs)
        try:
            return reply.status, reply.read()
        finally:
            reply.close()

    def failure(self, upstream, url, **kwargs):
        with self.assertRaises(ccfix.UpstreamError) as caught:
            self.ask(upstream, url, **kwargs)
        return caught.exception


class TestFraming(UpstreamCase):
    WHOLE = [
        ("content-length", [counted(b"hello")], b"hello"),
        ("content-length in two parts", [counted(b"hello")[:-3], 0.01, b"llo"], b"hello"),
        ("empty", [counted(b"")], b""),
        ("no content", [b"HTTP/1.1 204 No Content\r\n\r\n"], b""),
        ("chunked", [chunked(b"he", b"llo")], b"hello"),
        ("chunked with trailers", [chunked(b"hello", end=b"0\r\nX-Sum: 1\r\n\r\n")], b"hello"),
        ("chunk extension", [chunked(end=b"5;a=b\r\nhello\r\n0\r\n\r\n")], b"hello"),
        ("chunk size with zeros", [chunked(end=b"0005  \r\nhello\r\n0000\r\n\r\n")], b"hello"),
        ("line feeds only", [b"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n"], b"hello"),
        ("until close", [b"HTTP/1.1 200 OK\r\n\r\nhel", 0.01, b"lo", CUT], b"hello"),
        ("old server", [b"HTTP/1.0 200 OK\r\n\r\nhello", CUT], b"hello"),
        ("continue first", [b"HTTP/1.1 100 Continue\r\n\r\n" + counted(b"hello")], b"hello"),
        ("hints first", [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", 0.01, counted(b"hello")], b"hello"),
        ("gzip", [counted(gzip.compress(b"hello"), extra="Content-Encoding: gzip\r\n")], b"hello"),
        ("deflate", [counted(zlib.compress(b"hello"), extra="Content-Encoding: deflate\r\n")], b"hello"),
        ("raw deflate", [counted(zlib.compress(b"hello")[2:-4], extra="Content-Encoding: deflate\r\n")], b"hello"),
        ("gzip, empty", [counted(b"", extra="Content-Encoding: gzip\r\n")], b""),
    ]
    BROKEN = [
        ("cut between chunks", [chunked(b"hello", end=b""), CUT], "cut", "in the middle"),
        ("reset between chunks", [chunked(b"hello", end=b""), RST], "cut", "in the middle"),
        ("cut inside a chunk", [chunked(b"hello", end=b"9\r\nwor"), CUT], "cut", "in the middle"),
        ("cut before the last line break", [chunked(b"hello", end=b"0\r\n"), CUT], "cut", "in the middle"),
        ("short content-length", [counted(b"hello")[:-1], CUT], "cut", "in the middle"),
        ("cut head", [b"HTTP/1.1 200 OK\r\nServ", CUT], "cut", "in the middle"),
        ("no answer", [CUT], "cut", "before it answered"),
        ("reset", [RST], "cut", "before it answered"),
        ("bad chunk size", [chunked(b"hello", end=b"-5\r\n")], "cut", "valid size"),
        ("chunk longer than its size", [chunked(end=b"5\r\nhello!!\r\n0\r\n\r\n")], "cut", "valid size"),
        ("endless chunk extension", [chunked(end=b"5;" + b"a" * 40000)], "cut", "valid size"),
        ("garbage", [b"SSH-2.0-OpenSSH_9.6\r\n"], "cut", "SSH-2.0"),
        ("TLS alert", [b"\x15\x03\x01\x00\x02\x02\x0a", CUT], "cut", "https://"),
        ("bad status", [b"HTTP/1.1 abc OK\r\n\r\n"], "cut", "proper HTTP"),
        ("endless header", [b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200000], "cut", "proper HTTP"),
        ("header flood", [b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n"], "cut", "proper HTTP"),
        ("cut gzip", [counted(gzip.compress(b"hello")[:-9], extra="Content-Encoding: gzip\r\n")], "cut", "cut off"),
        ("false gzip", [counted(b"hello", extra="Content-Encoding: gzip\r\n")], "cut", "damaged"),
        ("brotli", [counted(b"hello", extra="Content-Encoding: br\r\n")], "body", "'br'"),
    ]

    def test_every_framing_is_read_whole(self):
        for name, reply, body in self.WHOLE:
            with self.subTest(name), self.fake(reply) as server:
                self.assertEqual(self.ask(self.client(), server.url)[1], body)

    def test_every_broken_reply_is_an_error(self):
        for name, reply, kind, words in self.BROKEN:
            with self.subTest(name), self.fake(reply) as server:
                error = self.failure(self.client(timeout=5), server.url)
                self.assertEqual(error.kind, kind, error.message)
                self.assertIn(words, error.message)
                self.assertEqual(server.connections, 1)

    def test_chunks_in_any_split_are_the_same(self):
        raw = b"5\r\nhello\r\n10;x=y\r\n0123456789\r\n\r\nab\r\n2\r\n\r\n\r\n0\r\nA: b\r\n\r\nnext"
        body, rest = b"hello0123456789\r\n\r\nab\r\n", b"next"
        splits = [[raw[:i], raw[i:]] for i in range(len(raw))] + [[raw[i:i + n] for i in range(0, len(raw), n)] for n in (1, 2, 3, 7)]
        for pieces in splits:
            dechunker, got, left = ccfix.Dechunker(), b"", list(pieces)
            while left and not dechunker.done:
                got += dechunker.feed(left.pop(0))
            self.assertEqual((got, dechunker.done, dechunker.rest + b"".join(left)), (body, True, rest), pieces)

    def test_chunks_that_come_together_are_one_block(self):
        with self.fake(chunked(*[b"data: x\n\n"] * 50)) as server:
            reply = self.client().open("POST", server.url, {}, b"{}")
            self.assertLessEqual(len(list(reply.blocks())), 3)
            reply.close()

    def test_blocks_come_as_they_arrive(self):
        go = threading.Event()
        with self.fake([chunked(b"one", end=b""), go, chunked(b"two")[len(chunked(end=b"")):]]) as server:
            reply = self.client().open("POST", server.url, {}, b"{}")
            blocks = reply.blocks()
            self.assertEqual(next(blocks), b"one")
            go.set()
            self.assertEqual(list(blocks), [b"two"])
            reply.close()

    def test_a_bomb_is_unpacked_in_small_blocks(self):
        bomb = gzip.compress(bytes(20000000))
        with self.fake(counted(bomb, extra="Content-Encoding: gzip\r\n")) as server:
            reply = self.client().open("POST", server.url, {}, b"{}")
            sizes = [len(block) for block in reply.blocks()]
            self.assertEqual((sum(sizes), max(sizes)), (20000000, ccfix.BLOCK_SIZE))
            reply.close()
            reply = self.client().open("POST", server.url, {}, b"{}")
            with self.assertRaisesRegex(ccfix.UpstreamError, "longer than 1000000 bytes"):
                reply.read(1000000)


class TestPool(UpstreamCase):
    def connections(self, server):
        return [request.connection for request in server.requests]

    def test_connections_are_reused_whatever_the_framing(self):
        replies = [counted(b"a"), chunked(b"b"), chunked(b"c", end=b""), counted(gzip.compress(b"d"), extra="Content-Encoding: gzip\r\n")]
        replies[2] = [replies[2], 0.005, b"0\r\n\r\n"]
        server, upstream = self.fake(*replies), self.client()
        self.assertEqual([self.ask(upstream, server.url)[1] for _ in range(5)], [b"a", b"b", b"c", b"d", b"d"])
        self.assertEqual(self.connections(server), [1] * 5)

    def test_not_reused(self):
        rows = [("asked to close", [counted(b"a", extra="Connection: close\r\n")]),
                ("old server", [b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na"]),
                ("more than announced", [counted(b"a") + b"HTTP/1.1 200 OK\r\n"]),
                ("more after the chunks", [chunked(b"a") + b"x"])]
        for name, reply in rows:
            with self.subTest(name), self.fake(reply, counted(b"b")) as server:
                upstream = self.client()
                self.assertEqual([self.ask(upstream, server.url)[1] for _ in range(2)], [b"a", b"b"])
                self.assertEqual(self.connections(server), [1, 2])

    def test_a_half_read_stream_is_ended_at_once(self):
        server, upstream = self.fake([chunked(b"one", end=b""), threading.Event()], counted(b"b")), self.client()
        reply = upstream.open("POST", server.url, {}, b"{}")
        next(reply.blocks())
        reply.close()
        reply.close()
        self.assertTrue(server.gone.wait(5))
        self.assertEqual(self.ask(upstream, server.url), (200, b"b"))
        self.assertEqual(server.connections, 2)

    def test_a_consumer_that_saw_the_end_saves_the_connection(self):
        for pause in ([], [0.01]):
            server = self.fake([chunked(b"data: [DONE]\n\n", end=b"")] + pause + [b"0\r\n\r\n"])
            upstream = self.client()
            for _ in range(2):
                reply = upstream.open("POST", server.url, {}, b"{}")
                for block in reply.blocks():
                    break
                reply.finish()
                reply.close()
            self.assertEqual(self.connections(server), [1, 1])

    def test_a_connection_closed_while_idle_is_replaced(self):
        server, upstream = self.fake([counted(b"a"), CUT], counted(b"b")), self.client()
        self.ask(upstream, server.url)
        self.assertTrue(ccfix.poll_socket(upstream.pool[upstream.route(server.url)][0].sock, 5))
        self.assertEqual(self.ask(upstream, server.url), (200, b"b"))
        self.assertEqual(self.connections(server), [1, 2])

    def test_a_reused_connection_that_fails_unheard_is_replaced_once(self):
        for end in (CUT, RST):
            server, upstream = self.fake(counted(b"a"), [end], counted(b"b")), self.client()
            self.ask(upstream, server.url)
            self.assertEqual(self.ask(upstream, server.url), (200, b"b"))
            self.assertEqual(self.connections(server), [1, 1, 2])
        server, upstream = self.fake(counted(b"a"), [CUT]), self.client()
        self.ask(upstream, server.url)
        self.assertEqual(self.failure(upstream, server.url).kind, "cut")
        self.assertEqual(self.connections(server), [1, 1, 2])

    def test_an_idle_connection_is_ended_after_its_time(self):
        server, upstream = self.fake(counted(b"a")), self.client(idle=-1.0)
        self.ask(upstream, server.url)
        self.ask(upstream, server.url)
        self.assertEqual(self.connections(server), [1, 2])

    def test_many_threads_share_the_pool(self):
        server, upstream, got = self.fake(chunked(b"a")), self.client(), []
        threads = [threading.Thread(target=lambda: [got.append(self.ask(upstream, server.url)) for _ in range(20)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(got, [(200, b"a")] * 160)
        self.assertLessEqual(server.connections, 8)
        self.assertEqual(len(upstream.live), sum(map(len, upstream.pool.values())))

    def test_close_ends_a_waiting_exchange(self):
        server, upstream = self.fake([chunked(b"one", end=b""), threading.Event()]), self.client()
        reply = upstream.open("POST", server.url, {}, b"{}")
        blocks = reply.blocks()
        next(blocks)
        threading.Timer(0.02, upstream.close).start()
        with self.assertRaises(ccfix.UpstreamError):
            list(blocks)
        self.assertTrue(server.gone.wait(5))
        self.assertIn("shutting down", self.failure(upstream, server.url).message)


class TestExchange(UpstreamCase):
    def test_the_request_arrives_as_given(self):
        server = self.fake(counted(b"a"))
        reply = self.client().open("POST", server.url.replace("//", "//me:p%40ss@") + "/v1/chat?api-version=1&x=%2F", {"X-A": "b"}, b"{1}")
        reply.close()
        request = server.requests[0]
        self.assertEqual(request[:2] + (request.body,), ("POST", "/v1/chat?api-version=1&x=%2F", b"{1}"))
        wanted = {"x-a": "b", "host": "127.0.0.1:%d" % server.port, "content-length": "3", "accept-encoding": "identity",
                  "authorization": "Basic " + base64.b64encode(b"me:p@ss").decode()}
        self.assertEqual(request.headers, wanted)

    def test_an_early_refusal_is_read_while_5_mb_are_being_sent(self):
        refusal = counted(b"too large", "413 Payload Too Large", "Connection: close\r\n")
        for reply in ([EARLY, refusal, CUT], [EARLY, refusal, threading.Event()]):
            with self.fake(reply) as server:
                self.assertEqual(self.ask(self.client(), server.url, body=bytes(5000000)), (413, b"too large"))

    def test_an_upstream_that_takes_no_bytes_times_out(self):
        server = self.fake([EARLY, threading.Event()])
        error = self.failure(self.client(timeout=0.2), server.url, body=bytes(20000000))
        self.assertEqual((error.kind, error.status, error.type), ("timeout", 504, "timeout_error"))

    def test_silence_times_out(self):
        for start in ([], [b"HTTP/1.1 200 OK\r\n"], [chunked(b"one", end=b"")]):
            server = self.fake(start + [threading.Event()])
            error = self.failure(self.client(timeout=0.05), server.url)
            self.assertEqual((error.kind, error.status, error.type, error.retry), ("timeout", 504, "timeout_error", False))
            self.assertTrue(server.gone.wait(5))

    def test_a_client_that_leaves_ends_the_upstream_call_at_once(self):
        for start in ([], [b"HTTP/1.1 200 OK\r\n"], [chunked(b"one", end=b"")]):
            server = self.fake(start + [threading.Event()])

            def wait(sock, seconds):
                """The client is gone as soon as nothing is there for a moment."""
                if ccfix.poll_socket(sock, 0.01):
                    return True
                raise ccfix.ClientGone()

            with self.assertRaises(ccfix.ClientGone):
                self.ask(self.client(), server.url, wait=wait)
            self.assertTrue(server.gone.wait(5))

    def test_redirects_stay_on_the_host(self):
        elsewhere = self.fake(counted(b"stolen"))
        def to(location, status="307 Temporary Redirect"):
            return counted(b"moved", status, "Location: %s\r\n" % location)
        rows = [("same host", "POST", [to("/v2"), counted(b"ok")], (200, b"ok"), ["/", "/v2"]),
                ("other port", "POST", [to(elsewhere.url)], (307, b"moved"), ["/"]),
                ("other host", "POST", [to("http://localhost/")], (307, b"moved"), ["/"]),
                ("nonsense", "POST", [to("http://127.0.0.1:x/")], (307, b"moved"), ["/"]),
                ("302 of a POST", "POST", [to("/v2", "302 Found")], (302, b"moved"), ["/"]),
                ("302 of a GET", "GET", [to("/v2", "302 Found"), counted(b"ok")], (200, b"ok"), ["/", "/v2"]),
                ("circle", "POST", [to("/")], (307, b"moved"), ["/"] * 4)]
        for name, method, script, answer, paths in rows:
            with self.subTest(name), self.fake(*script) as server:
                self.assertEqual(self.ask(self.client(), server.url + "/", method=method, body=b"{}"), answer)
                self.assertEqual([request.path for request in server.requests], paths)
                self.assertEqual({request.body for request in server.requests}, {b"{}"})
                self.assertEqual(server.connections, 1)
        self.assertEqual(elsewhere.requests, [])

    def test_what_http_forbids_is_refused_without_showing_it(self):
        rows = [("http://127.0.0.1:1/", {"Authorization": "Bearer sec\r\nret"}), ("http://127.0.0.1:1/", {"X-Key": "sec\u2019ret"}),
                ("http://127.0.0.1:1/a b", {}), ("ftp://me:secret@x/", {}), ("http://:secret@/", {}), ("http://h:secret/", {}),
                ("no url, secret", {}), ("http://127.0.0.1:1/", {"bad name\n": "x"})]
        for url, headers in rows:
            with self.subTest(url), self.assertRaises(ccfix.UpstreamError) as caught:
                self.client().open("POST", url, headers, b"")
            self.assertEqual((caught.exception.kind, caught.exception.retry), ("request", False))
            self.assertNotIn("sec", caught.exception.message.replace("https", ""))

    def test_an_unreachable_server_is_named(self):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        error = self.failure(self.client(), "http://me:secret@127.0.0.1:%d/" % port)
        self.assertEqual((error.kind, error.retry, error.status), ("connect", True, 502))
        self.assertIn("127.0.0.1:%d cannot be reached" % port, error.message)
        self.assertNotIn("secret", error.message)
        with mock.patch("socket.getaddrinfo", side_effect=socket.gaierror(-2, "Name or service not known")):
            self.assertIn("cannot be resolved (Name or service not known)", self.failure(self.client(), "http://nowhere.test/").message)


@unittest.skipUnless(shutil.which("openssl"), "needs the openssl command")
class TestTls(UpstreamCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        cls.pair = [os.path.join(cls.folder, name) for name in ("cert.pem", "key.pem")]
        config = os.path.join(cls.folder, "openssl.cnf")
        with open(config, "w", encoding="ascii") as file:
            file.write("[req]\ndistinguished_name=dn\nx509_extensions=ext\nprompt=no\n[dn]\nCN=127.0.0.1\n"
                       "[ext]\nsubjectAltName=IP:127.0.0.1,DNS:localhost\n")
        subprocess.check_call(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-config", config,
                               "-out", cls.pair[0], "-keyout", cls.pair[1]], stderr=subprocess.DEVNULL)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)

    def test_connections_are_reused(self):
        large = chunked(*[bytes(range(256)) * 20] * 40)
        server, upstream = self.fake([large], [chunked(b"a", end=b""), 0.01, b"0\r\n\r\n"], tls=self.pair), self.client(ca_bundle=self.pair[0])
        self.assertEqual(self.ask(upstream, server.url), (200, bytes(range(256)) * 800))
        self.assertEqual(self.ask(upstream, server.url, body=bytes(3000000)), (200, b"a"))
        self.assertEqual(self.ask(upstream, server.url), (200, b"a"))
        self.assertEqual(server.connections, 1)

    def test_a_silent_server_is_waited_for_without_spinning(self):
        calls = []

        def wait(sock, seconds):
            calls.append(seconds)
            return ccfix.poll_socket(sock, seconds)

        server = self.fake([0.1, counted(b"a")], tls=self.pair)
        self.assertEqual(self.ask(self.client(insecure=True), server.url, wait=wait), (200, b"a"))
        self.assertLess(len(calls), 8)

    def test_an_untrusted_certificate_says_what_to_set(self):
        error = self.failure(self.client(), self.fake(counted(b"a"), tls=self.pair).url)
        self.assertEqual((error.kind, error.retry), ("connect", False))
        for word in ("SSL_CERT_FILE", "--ca-bundle", "NODE_EXTRA_CA_CERTS"):
            self.assertIn(word, error.message)

    def test_the_client_certificate_is_sent(self):
        server = self.fake(counted(b"a"), tls=self.pair)
        server.context.verify_mode = ssl.CERT_REQUIRED
        server.context.load_verify_locations(self.pair[0])
        upstream = self.client(ca_bundle=self.pair[0], client_cert=",".join(self.pair))
        self.assertEqual(self.ask(upstream, server.url), (200, b"a"))
        self.assertEqual(self.failure(self.client(client_cert="/nowhere"), server.url).kind, "request")

    def test_the_wrong_scheme_is_named(self):
        plain, secret = TunnelProxy(answer=b"HTTP/1.1 400 Bad Request\r\n\r\n", end=b""), self.fake(counted(b"a"), tls=self.pair)
        self.addCleanup(plain.close)
        self.assertIn("write http://", self.failure(self.client(), "https://127.0.0.1:%d/" % plain.port).message)
        self.failure(self.client(), secret.url.replace("https", "http"))

    def test_https_goes_through_a_tunnel(self):
        server = self.fake(counted(b"a"), tls=self.pair)
        proxy = TunnelProxy(server.port)
        self.addCleanup(proxy.close)
        os.environ["HTTPS_PROXY"] = "me:p%%40ss@127.0.0.1:%d" % proxy.port
        upstream = self.client(insecure=True)
        for _ in range(2):
            self.assertEqual(self.ask(upstream, "https://provider.test:4430/v1"), (200, b"a"))
        self.assertEqual((len(proxy.heads), server.connections), (1, 1))
        self.assertIn(b"CONNECT provider.test:4430 HTTP/1.1\r\nHost: provider.test:4430\r\n", proxy.heads[0])
        self.assertIn(b"\r\nProxy-Authorization: Basic %s\r\n" % base64.b64encode(b"me:p@ss"), proxy.heads[0])
        self.assertEqual(server.requests[0].path, "/v1")
        self.assertNotIn("proxy-authorization", server.requests[0].headers)
        os.environ["NO_PROXY"] = "provider.test"
        with mock.patch("socket.getaddrinfo", side_effect=socket.gaierror(-2, "unknown")):
            self.assertIn("cannot be resolved", self.failure(self.client(), "https://provider.test/").message)


class TunnelProxy:
    """Answers CONNECT (or whatever comes up to `end`) with `answer`, or by joining the client to a port of this machine."""

    def __init__(self, port=0, answer=b"", end=b"\r\n\r\n"):
        self.end, self.target, self.answer, self.heads, self.sockets = end, port, answer, [], [socket.socket()]
        self.sockets[0].bind(("127.0.0.1", 0))
        self.sockets[0].listen(8)
        self.port = self.sockets[0].getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        try:
            client, _ = self.sockets[0].accept()
            self.sockets.append(client)
            head = client.recv(1000)
            while not head.endswith(self.end):
                head += client.recv(1000)
            self.heads.append(head)
            client.sendall(self.answer or b"HTTP/1.1 200 Connection established\r\n\r\n")
            if not self.answer:
                self.sockets.append(socket.create_connection(("127.0.0.1", self.target)))
                self.join(client, self.sockets[-1])
        except OSError:
            pass

    def join(self, one, other):
        while True:
            for source in select.select([one, other], [], [])[0]:
                data = source.recv(65536)
                if not data:
                    return
                (other if source is one else one).sendall(data)

    def close(self):
        for sock in self.sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()


class TestProxies(UpstreamCase):
    def test_http_goes_through_with_a_whole_url(self):
        for prefix in ("", "http://"):
            proxy, upstream = self.fake(counted(b"a")), self.client()
            os.environ["http_proxy"] = "%sme:secret@127.0.0.1:%d" % (prefix, proxy.port)
            for _ in range(2):
                self.assertEqual(self.ask(upstream, "http://provider.test:81/v1?x=y"), (200, b"a"))
            request = proxy.requests[1]
            self.assertEqual((request.path, request.connection), ("http://provider.test:81/v1?x=y", 1))
            self.assertEqual(request.headers["host"], "provider.test:81")
            self.assertEqual(request.headers["proxy-authorization"], "Basic " + base64.b64encode(b"me:secret").decode())

    def test_loopback_is_asked_directly(self):
        os.environ.update(http_proxy="http://127.0.0.1:1", all_proxy="socks5://127.0.0.1:1")
        server = self.fake(counted(b"a"))
        for host in ("127.0.0.1", "localhost"):
            self.assertEqual(self.ask(self.client(), "http://%s:%d/" % (host, server.port)), (200, b"a"))

    def test_refusals_say_what_to_do(self):
        rows = [(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "HTTPS_PROXY needs user:password@", False),
                (b"HTTP/1.1 403 Forbidden\r\n\r\n", "(403 Forbidden)", False), (b"HTTP/1.1 503 Busy\r\n\r\n", "(503 Busy)", True),
                (b"hello\r\n\r\n", "proper HTTP", True)]
        for answer, words, retry in rows:
            proxy = TunnelProxy(answer=answer)
            self.addCleanup(proxy.close)
            os.environ["https_proxy"] = "http://me:secret@127.0.0.1:%d" % proxy.port
            error = self.failure(self.client(), "https://provider.test/")
            self.assertEqual((error.kind, error.retry), ("connect", retry), error.message)
            self.assertIn(words, error.message)
            self.assertNotIn("secret", error.message)
        os.environ["http_proxy"] = self.fake(counted(b"", "407 No")).url
        self.assertIn("HTTP_PROXY needs user:password@", self.failure(self.client(), "http://provider.test/").message)

    def test_a_dead_or_strange_proxy_is_named(self):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        for value, words in (("http://me:secret@127.0.0.1:%d" % port, "the proxy 127.0.0.1:%d cannot be reached" % port),
                             ("socks5://me:secret@127.0.0.1:1", "socks5:// proxies are not supported"),
                             ("http://me:secret@host:port", "no valid host and port")):
            os.environ["https_proxy"] = value
            error = self.failure(self.client(), "https://provider.test/")
            self.assertEqual(error.kind, "connect")
            self.assertIn(words, error.message)
            self.assertNotIn("secret", error.message)


# ======================================================================================================
# 10  Cache, ledger, records
# ======================================================================================================

DATED = "<system-reminder>\n# currentDate\nToday's date is 2026-11-22.\n</system-reminder>\n"
TOOL = {"name": "Read", "description": "Reads", "input_schema": {"type": "object", "properties": {"path": {}}}}
TOOL_2 = {"name": "Bash", "description": "Runs", "input_schema": {"type": "object"}}
CALLED = [{"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"a": 1}},
                                            {"type": "tool_use", "id": "toolu_2", "name": "Read", "input": {"a": 2}}]}]


def results(first, second, **more):
    return {"role": "user", "content": [
        dict({"type": "tool_result", "tool_use_id": call_id, "content": text}, **more) for call_id, text in (first, second)]}


def image(data):
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def question(*messages, **fields):
    """A client's request like the recorded ones; a str is a user message."""
    body = {"model": "claude-x", "max_tokens": 32000, "stream": True,
            "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.330.581; cc_entrypoint=cli;"},
                       {"type": "text", "text": "You are a tool. /home/me"}],
            "tools": [TOOL, TOOL_2], "metadata": {"user_id": '{"session_id":"one"}'},
            "messages": [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]}
    body.update(fields)
    return copy.deepcopy(body)


def converted(body):
    """A rough stand-in for to_openai: what of the request is sent besides the messages."""
    sent = {"model": "target", "stream": True, "max_tokens": body.get("max_tokens"), "temperature": 1,
            "messages": [{"role": "user", "content": json.dumps(body.get("messages"))}], "tools": body.get("tools")}
    sent.update(body.get("sent", {}))
    return sent


def key_of(body, mode="prefix", model="target"):
    return ccfix.cache_key(body, converted(body), mode, model)


def assistant(text, *more):
    return {"role": "assistant", "content": [{"type": "text", "text": text}] + list(more)}


def marked(text):
    return {"role": "user", "content": [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]}


def system_turn(content, **more):
    return dict({"role": "system", "content": content}, **more)


HELLO = question(DATED + "Edit hello.txt please")
SHARED = (  # name, one request, another that may be answered alike
    ("same", HELLO, HELLO),
    ("billing line", HELLO, question(DATED + "Edit hello.txt please", system=[
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.168; cch=5a673;"},
        {"type": "text", "text": "You are a tool. /home/me"}])),
    ("no billing line, system a string", HELLO,
     question(DATED + "Edit hello.txt please", system="You are a tool. /home/me")),
    ("billing line in a string", HELLO, question(
        DATED + "Edit hello.txt please", system="x-anthropic-billing-header: a=b;\nYou are a tool. /home/me")),
    ("session id", HELLO, question(DATED + "Edit hello.txt please", metadata={"user_id": '{"session_id":"two"}'})),
    ("date", HELLO, question(DATED.replace("11-22", "11-23") + "Edit hello.txt please")),
    ("date in words", question("<system-reminder>Today's date: Sunday, November 22, 2026</system-reminder> Edit"),
     question("<system-reminder>Today's date: 1 Dec 2026</system-reminder> Edit")),
    ("date in a system turn", question("Edit", system_turn("Env\nToday's date is 2026-11-22.")),
     question("Edit", system_turn("Env\nToday's date is 2027-01-01."))),
    ("string or block list, moving cache_control", question("first", assistant("A"), "second"),
     question("first", assistant("A"), marked("second"))),
    ("cache_control on tools", HELLO, question(DATED + "Edit hello.txt please", tools=[
        dict(TOOL, cache_control={"type": "ephemeral"}), TOOL_2])),
    ("order of tools", HELLO, question(DATED + "Edit hello.txt please", tools=[TOOL_2, TOOL])),
    ("empty system turn", HELLO, question(DATED + "Edit hello.txt please", system_turn([]))),
    ("token counter", HELLO, question(
        {"role": "user", "content": [{"type": "text", "text": DATED + "Edit hello.txt please"},
                                     {"type": "text", "text": "<total_tokens>123 tokens left</total_tokens>"}]})),
    ("limits, stream, sampling", HELLO, question(DATED + "Edit hello.txt please", stream=False, max_tokens=64000,
                                                 temperature=0, sent={"stream": False, "seed": 4, "top_p": 0.5})),
    ("call ids in the history", question("a", *CALLED + [results(("toolu_1", "x"), ("toolu_2", "y")), assistant("B"), "go on"]),
     json.loads(json.dumps(question("a", *CALLED + [results(("toolu_1", "x"), ("toolu_2", "y")), assistant("B"), "go on"])
                           ).replace("toolu_1", "toolu_r").replace("toolu_2", "toolu_s"))),
    ("order of parallel results, is_error false",
     question("a", *CALLED + [results(("toolu_1", "x"), ("toolu_2", "y")), assistant("B"), "go on"]),
     question("a", *CALLED + [results(("toolu_2", "y"), ("toolu_1", "x"), is_error=False), assistant("B"), "go on"])),
    ("signature", question("a", assistant("B", {"type": "thinking", "thinking": "t", "signature": "1"}), "go on"),
     question("a", assistant("B", {"type": "thinking", "thinking": "t", "signature": "2"}), "go on")),
    ("same image", question({"role": "user", "content": [image("AAAA"), {"type": "text", "text": "What is it?"}]}),
     question({"role": "user", "content": [dict(image("AAAA"), cache_control={"type": "ephemeral"}),
                                           {"type": "text", "text": "What is it?"}]})),
)

SEPARATE = tuple(("bare %r in another history" % word, question("Delete it?", assistant("Shall I delete a.txt?"), word),
                  question("Delete it?", assistant("Shall I delete b.txt?"), word))
                 for word in ("continue", "yes", "go on", "ok", "1", "")) + (
    ("bare yes after another first question", question("Delete a?", assistant("Sure?"), "yes"),
     question("Delete b?", assistant("Sure?"), "yes")),
    ("bare yes, first turn or later", question("yes"), question("a", assistant("b"), "yes")),
    ("same question asked twice", question("run it"), question("run it", assistant("done"), "run it")),
    ("other tool result in the history",
     question("a", *CALLED + [results(("toolu_1", "x"), ("toolu_2", "y")), assistant("B"), "continue"]),
     question("a", *CALLED + [results(("toolu_1", "x"), ("toolu_2", "Z")), assistant("B"), "continue"])),
    ("results of the calls swapped",
     question("a", *CALLED + [results(("toolu_1", "x"), ("toolu_2", "y")), assistant("B"), "continue"]),
     question("a", *CALLED + [results(("toolu_2", "x"), ("toolu_1", "y")), assistant("B"), "continue"])),
    ("result was an error",
     question("a", *CALLED + [results(("toolu_1", "x"), ("toolu_2", "y")), assistant("B"), "continue"]),
     question("a", *CALLED + [results(("toolu_1", "x"), ("toolu_2", "y"), is_error=True), assistant("B"), "continue"])),
    ("another thought of number", question("a", assistant("B", {"type": "thinking", "thinking": "7"}), "Tell it"),
     question("a", assistant("B", {"type": "thinking", "thinking": "8"}), "Tell it")),
    ("redacted thought", question("a", assistant("B", {"type": "redacted_thinking", "data": "7"}), "Tell it"),
     question("a", assistant("B", {"type": "redacted_thinking", "data": "8"}), "Tell it")),
    ("asks for the date", question(DATED + "What day is it?"),
     question(DATED.replace("11-22", "11-23") + "What day is it?")),
    ("spoke of the date before", question(DATED + "What is the date?", assistant("Well"), "go on"),
     question(DATED.replace("11-22", "11-23") + "What is the date?", assistant("Well"), "go on")),
    ("asks for the date in Chinese", question(DATED + u"\u4eca\u5929\u51e0\u53f7"),
     question(DATED.replace("11-22", "11-23") + u"\u4eca\u5929\u51e0\u53f7")),
    ("date in the user's own text", question("Why 2026-11-22? Today's date is 2026-11-22"),
     question("Why 2026-11-22? Today's date is 2026-11-23")),
    ("counter in the user's own text", question("What is <total_tokens>5</total_tokens>"),
     question("What is <total_tokens>6</total_tokens>")),
    ("counter beside a reminder", question(DATED + "What is <total_tokens>5</total_tokens>"),
     question(DATED + "What is <total_tokens>6</total_tokens>")),
    ("thought kept only in the signature",
     question("a", assistant("B", {"type": "thinking", "thinking": "", "signature": "7"}), "Tell it"),
     question("a", assistant("B", {"type": "thinking", "thinking": "", "signature": "8"}), "Tell it")),
    ("other date in a reminder", question("<system-reminder>Release of 2026-11-22</system-reminder>Edit"),
     question("<system-reminder>Release of 2026-11-23</system-reminder>Edit")),
    ("unclosed reminder", question("<system-reminder>Today's date is 2026-11-22 Edit"),
     question("<system-reminder>Today's date is 2026-11-23 Edit")),
    ("image", question({"role": "user", "content": [image("AAAA"), {"type": "text", "text": "What?"}]}),
     question({"role": "user", "content": [image("BBBB"), {"type": "text", "text": "What?"}]})),
    ("reminder text", question("<system-reminder>git: clean</system-reminder>Edit"),
     question("<system-reminder>git: dirty</system-reminder>Edit")),
    ("system text", HELLO, question(DATED + "Edit hello.txt please", system="You are a tool. /home/you")),
    ("system turn", question("Edit", system_turn("cwd /a")), question("Edit", system_turn("cwd /b"))),
    ("effort of a turn", question("Edit", system_turn([], output_config={"effort": "low"})),
     question("Edit", system_turn([], output_config={"effort": "high"}))),
    ("role", question("a", assistant("b"), "c"), question("a", {"role": "system", "content": "b"}, "c")),
    ("tool added", HELLO, question(DATED + "Edit hello.txt please", tools=[TOOL])),
    ("tool edited", HELLO, question(DATED + "Edit hello.txt please", tools=[dict(TOOL, description="New"), TOOL_2])),
    ("no tools", HELLO, question(DATED + "Edit hello.txt please", tools=[])),
    ("effort", HELLO, question(DATED + "Edit hello.txt please", output_config={"effort": "low"})),
    ("format", HELLO, question(DATED + "Edit hello.txt please", output_config={"format": {"type": "json_schema"}})),
    ("thinking", HELLO, question(DATED + "Edit hello.txt please", thinking={"type": "disabled"})),
    ("tool choice", HELLO, question(DATED + "Edit hello.txt please", tool_choice={"type": "any"})),
    ("stop", HELLO, question(DATED + "Edit hello.txt please", stop_sequences=["</severity>"])),
    ("a field sent", HELLO, question(DATED + "Edit hello.txt please", sent={"reasoning_effort": "low"})),
    ("block borders", question({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
     question("ab")),
)

NOT_KEPT = (
    ("result", question("a", *CALLED + [results(("toolu_1", "x"), ("toolu_2", "y"))])),
    ("result and text", question("a", *CALLED + [dict(role="user", content=results(
        ("toolu_1", "x"), ("toolu_2", "y"))["content"] + [{"type": "text", "text": "Tool loaded."}])])),
    ("result, then a text", question("a", *CALLED + [results(("toolu_1", "x"), ("toolu_2", "y")), "continue"])),
    ("result, then a system turn", question("a", *CALLED + [results(("toolu_1", "x"), ("toolu_2", "y")), system_turn("s")])),
    ("answer begun", question("a", assistant("The answer is"))),
    ("nothing asked", question()),
    ("only a system turn", question("a", assistant("b"), system_turn("s"))),
)


class TestCacheKey(unittest.TestCase):
    def test_same_question_in_another_session_has_the_same_prefix_key(self):
        for name, one, other in SHARED:
            with self.subTest(name):
                self.assertEqual(len(key_of(one)), 64)
                self.assertEqual(key_of(one), key_of(other))

    def test_no_answer_is_shared_where_it_could_be_wrong(self):
        for name, one, other in SEPARATE:
            with self.subTest(name):
                self.assertIsNotNone(key_of(one))
                self.assertNotEqual(key_of(one), key_of(other))

    def test_prefix_keeps_nothing_after_a_tool_result(self):
        for name, body in NOT_KEPT:
            with self.subTest(name):
                self.assertIsNone(key_of(body))

    def test_mode_and_model_are_part_of_the_key(self):
        keys = [key_of(HELLO, mode, model) for mode in ("prefix", "full") for model in ("a", "b")]
        self.assertEqual(len(set(keys)), 4)
        self.assertIsNone(key_of(HELLO, "none"))
        self.assertIsNone(key_of(HELLO, "wrong"))

    def test_full_key_is_what_is_sent_but_for_ids_sampling_and_stream(self):
        def key(call="call_1", other="call_2", answer="call_1", text="x", **fields):
            sent = {"model": "m", "messages": [
                {"role": "assistant", "tool_calls": [{"id": call, "function": {"name": "f", "arguments": "{}"}},
                                                     {"id": other, "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": answer, "content": text}]}
            sent.update(fields)
            return ccfix.cache_key({}, sent, "full", "m")
        base = key()
        for fields in ({"call": "z", "answer": "z"}, {"stream": True, "stream_options": {}}, {"temperature": 1, "seed": 2},
                       {"max_completion_tokens": 5}, {"user": "me"}, {"ANTHROPIC_BASE_URL": "u"}):
            self.assertEqual(key(**fields), base, fields)
        for fields in ({"answer": "call_2"}, {"text": "y"}, {"stop": ["a"]}, {"tools": []}, {"reasoning_effort": "low"}):
            self.assertNotEqual(key(**fields), base, fields)

    def test_key_leaves_its_arguments_alone(self):
        body, sent = copy.deepcopy(HELLO), converted(HELLO)
        before = json.dumps([body, sent])
        for mode in "prefix", "full":
            ccfix.cache_key(body, sent, mode, "m")
        self.assertEqual(json.dumps([body, sent]), before)

    def test_odd_shapes_never_raise(self):
        deep = []
        for _ in range(3000):
            deep = [deep]
        odd = (None, 1, True, "text", u"\ud800", [], [None], [[1]], {}, {"type": []}, {"type": {}, "text": None}, deep,
               [{"type": "text"}], [{"type": "text", "text": {}}], [{"type": "tool_result", "content": {"a": 1}}],
               [{"type": "tool_use", "id": [], "input": deep}], [{"role": [], "content": 3}], [{"role": {}}, 7],
               [{"role": "user", "content": [1, None, "x", {"type": "image"}]}], float("nan"))
        for value in odd:
            for body in (value, {"messages": value}, {"system": value, "messages": [{"role": "user", "content": "a"}]},
                         {"messages": [{"role": "user", "content": value}]}, {"tools": value, "messages": HELLO["messages"]},
                         {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": value},
                                       {"role": "user", "content": "a"}]}):
                for sent in (value, {}, {"messages": value, "tools": value},
                             {"messages": [{"tool_calls": value, "tool_call_id": value}]}):
                    for mode in "prefix", "full":
                        key = ccfix.cache_key(body, sent, mode, "m")
                        self.assertTrue(key is None or len(key) == 64)

    def test_hostile_text_takes_linear_time(self):
        texts = ("<system-reminder>" * 20000, "today's date " * 20000, "<total_tokens>" * 20000, "\n" * 200000,
                 "<system-reminder>" + "today is 1 Jan " * 20000 + "</system-reminder>")
        start = time.perf_counter()
        for text in texts:
            key_of(question(text, {"role": "system", "content": text}))
        self.assertLess(time.perf_counter() - start, 4)


class Clock:
    def __init__(self):
        self.time = 1000000.0

    def __call__(self):
        return self.time


class CacheCase(unittest.TestCase):
    def setUp(self):
        self.folder = os.path.join(tempfile.mkdtemp(), "cache")
        self.file = os.path.join(self.folder, "responses.db")
        self.clock, self.told, self.opened = Clock(), [], []
        self.cache = self.open()

    def tearDown(self):
        for cache in self.opened:
            cache.close()
        shutil.rmtree(os.path.dirname(self.folder))

    def open(self, ttl=3600, max_bytes=10 ** 6, folder=None):
        cache = ccfix.Cache(self.folder if folder is None else folder, ttl, max_bytes, now=self.clock, log=self.told.append)
        self.opened.append(cache)
        return cache

    def healthy(self, cache):
        """After a trouble: the time of rest over, a put and a get go well."""
        self.clock.time += 10
        cache.put("after", {"a": 1}, 1)
        return cache.get("after") == ({"a": 1}, 1.0)


def noise(size):
    """A message that does not compress."""
    return {"text": os.urandom(size // 2).hex()}


class TestCache(CacheCase):
    def test_answers_come_back_with_their_cost(self):
        message = {"content": [{"type": "text", "text": u"caf\u00e9 \ud83d"}]}
        self.cache.put("k", message, 1234.5)
        self.assertEqual(self.cache.get("k"), (message, 1234.5))
        self.assertEqual(self.open().get("k"), (message, 1234.5))

    def test_nothing_is_written_before_the_first_use(self):
        self.assertFalse(os.path.exists(self.folder))

    def test_stats_count_what_happened(self):
        self.assertEqual(self.cache.stats(), {
            "hits": 0, "misses": 0, "inserts": 0, "evictions": 0, "saved_ms": 0, "entries": 0, "bytes": 0,
            "hit_rate": 0.0, "ttl": 3600, "max_bytes": 10 ** 6, "path": self.file, "error": None})
        self.cache.put("k", {"a": 1}, 100)
        self.cache.put("k", {"a": 2}, 250)
        for key in "k", "k", "k", "other":
            self.cache.get(key)
        self.cache.get(None)
        self.cache.put(None, {}, 0)
        stats = self.cache.stats()
        self.assertEqual([stats[name] for name in ("hits", "misses", "inserts", "entries", "hit_rate", "saved_ms")],
                         [3, 1, 2, 1, 0.75, 750])
        self.assertTrue(200 < stats["bytes"] < 300)

    def test_entries_expire(self):
        self.cache.put("k", {}, 0)
        self.clock.time += 3599
        self.cache.put("later", {}, 0)
        self.assertIsNotNone(self.cache.get("k"))
        self.clock.time += 1
        self.assertIsNone(self.cache.get("k"))
        self.assertIsNotNone(self.cache.get("later"))
        self.assertEqual((self.cache.clear_expired(), self.cache.stats()["entries"]), (1, 1))
        self.clock.time -= 10 ** 6
        self.assertIsNone(self.cache.get("later"), "born in a far future: the clock was wrong")
        self.assertIsNone(self.open(ttl=0).get("later"))

    def test_least_recently_used_go_first(self):
        cache = self.open(max_bytes=10000)
        for key in "abc":
            cache.put(key, noise(5000), 1)  # some 3 kB each
        self.assertEqual(cache.stats()["entries"], 3)
        cache.get("a")
        cache.put("d", noise(5000), 1)
        self.assertEqual([bool(cache.get(key)) for key in "abcd"], [True, False, True, True])
        cache.put("big", noise(12000), 1)
        stats = cache.stats()
        self.assertLessEqual(stats["bytes"], 10000)
        self.assertEqual(stats["evictions"] + stats["entries"], 5)
        self.assertIsNotNone(cache.get("big"))
        cache.put("huge", noise(50000), 1)
        self.assertEqual(cache.stats()["entries"], stats["entries"], "too big for the whole cache: left out")

    def test_file_stays_near_its_limit(self):
        cache = self.open(max_bytes=300000)
        for number in range(100):
            cache.put(str(number), noise(20000), 1)
        self.assertLess(os.path.getsize(self.file), 600000)
        self.assertTrue(cache.clear() > 10)
        self.assertEqual((cache.stats()["entries"], cache.stats()["bytes"]), (0, 0))
        self.assertLess(os.path.getsize(self.file), 100000)

    def test_reasoning_is_remembered_by_call_id(self):
        for call_id in "call_1", u"half \ud800", "null\0byte", "":
            self.cache.remember(call_id, {"id": call_id})
            self.assertEqual(self.cache.recall(call_id), {"id": call_id})
        self.cache.remember("call_1", ["again"])
        self.assertEqual(self.open().recall("call_1"), ["again"])
        self.assertIsNone(self.cache.recall("unknown"))
        self.assertIsNone(self.cache.recall({"odd": []}))
        self.assertEqual(self.told, [])

    def test_memory_is_bounded(self):
        for number in range(12):
            self.cache._append("memory", str(number), number, 10)
        self.assertEqual([self.cache.recall(str(number)) for number in (0, 1, 2, 11)], [None, None, 2, 11])

    def test_lessons_are_kept_and_forgotten(self):
        self.cache.save_lesson("host", "m", {"drop": ["x"]})
        self.cache.save_lesson("host", "m", {"drop": ["y"]})
        self.cache.save_lesson("host", "n", {})
        self.assertEqual(self.open().lessons(), {("host", "m"): {"drop": ["y"]}, ("host", "n"): {}})
        self.assertEqual((self.cache.forget_lessons(), self.cache.lessons()), (2, {}))

    def test_ledger_rows_outlive_a_restart(self):
        ledger = ccfix.Ledger(save=self.cache.save_row, now=self.clock)
        for number in range(3):
            ledger.add({"id": "same", "input": number})
        self.assertEqual([row["input"] for row in self.open().saved_rows(2)], [2, 1])

    def test_memory_only_cache_writes_no_file(self):
        cache = self.open(folder="")
        cache.put("k", {"a": 1}, 2)
        self.assertEqual((cache.get("k"), cache.stats()["path"]), (({"a": 1}, 2.0), ":memory:"))

    def test_threads_share_one_cache(self):
        def work(name):
            for number in range(30):
                self.cache.put("%s%d" % (name, number), {"n": number}, 1)
                self.cache.get("%s%d" % (name, number))
        threads = [threading.Thread(target=work, args=(name,)) for name in "abcdefgh"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = self.cache.stats()
        self.assertEqual((stats["entries"], stats["hits"], stats["error"]), (240, 240, None))

    @unittest.skipIf(os.name == "nt", "no modes")
    def test_only_the_owner_may_read(self):
        self.cache.put("k", {}, 1)
        self.assertEqual(stat.S_IMODE(os.stat(self.folder).st_mode), 0o700)
        for name in os.listdir(self.folder):
            self.assertEqual(stat.S_IMODE(os.stat(os.path.join(self.folder, name)).st_mode), 0o600, name)

    @unittest.skipIf(os.name == "nt", "no modes")
    def test_a_folder_of_others_keeps_its_mode(self):
        os.makedirs(self.folder)
        os.chmod(self.folder, 0o755)
        self.cache.put("k", {}, 1)
        self.assertEqual(stat.S_IMODE(os.stat(self.folder).st_mode), 0o755)


class TestCacheFaults(CacheCase):
    def assert_goes_without(self, cache, word):
        """Every call is a miss, nothing raises, the log hears once, stats say what is wrong."""
        for _ in range(3):
            cache.put("k", {"a": 1}, 1)
            cache.get("k")
            cache.remember("id", 1)
            self.assertIsNone(cache.recall("id"))
            cache.save_lesson("u", "m", 1)
            self.assertEqual(cache.lessons(), {})
            cache.clear_expired()
            self.assertIn(word, cache.stats()["error"])
            self.clock.time += 10
        self.assertEqual(len(self.told), 1, self.told)
        self.assertIn(word, self.told[0])

    def test_locked_database(self):
        self.cache.put("k", {"a": 1}, 1)
        other = sqlite3.connect(self.file, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        start = time.perf_counter()
        for _ in range(50):
            self.cache.put("j", {"a": 1}, 1)
        self.assertLess(time.perf_counter() - start, 2, "fifty requests must not wait one after the other")
        self.assertEqual((len(self.told), "locked" in self.told[0]), (1, True))
        self.assertIn("locked", self.cache.stats()["error"])
        other.execute("ROLLBACK")
        other.close()
        self.assertTrue(self.healthy(self.cache))
        self.assertEqual((self.cache.get("k"), self.cache.stats()["error"]), (({"a": 1}, 1.0), None))

    def test_database_that_another_process_keeps_to_itself(self):
        os.makedirs(self.folder)
        other = sqlite3.connect(self.file, isolation_level=None)
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        self.assertIsNone(self.cache.get("k"))
        self.assertEqual((len(self.told), "locked" in self.told[0]), (1, True))
        other.close()
        self.assertTrue(self.healthy(self.cache))

    def test_reading_goes_on_while_another_process_writes(self):
        self.cache.put("k", {"a": 1}, 1)
        other = sqlite3.connect(self.file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        self.assertEqual(self.cache.get("k"), ({"a": 1}, 1.0))
        other.close()

    def test_corrupt_file_is_moved_aside(self):
        os.makedirs(self.folder)
        with open(self.file, "wb") as file:
            file.write(b"this is no database, only text " * 500)
        self.cache.put("k", {"a": 1}, 1)
        self.assertIn("not a database", self.told[0])
        self.assertTrue(os.path.exists(self.file + ".broken"))
        self.cache.put("k", {"a": 1}, 1)
        self.assertEqual((self.cache.get("k"), len(self.told)), (({"a": 1}, 1.0), 1))

    def test_file_corrupted_in_the_middle_is_moved_aside(self):
        for number in range(60):
            self.cache.put(str(number), noise(6000), 1)
        self.cache.close()
        with open(self.file, "r+b") as file:
            file.seek(4096)
            file.write(b"\xa5" * (os.path.getsize(self.file) - 8192))
        cache = self.open()
        for number in range(60):
            cache.get(str(number))
            cache.put(str(number), {}, 1)
        self.assertIn("malformed", "".join(self.told))
        self.assertTrue(os.path.exists(self.file + ".broken"))
        self.assertTrue(self.healthy(cache))

    def test_database_of_another_program_is_moved_aside(self):
        os.makedirs(self.folder)
        other = sqlite3.connect(self.file)
        other.execute("CREATE TABLE responses (hash TEXT, body TEXT)")
        other.close()
        self.cache.get("k")
        self.assertIn("not a cache of this program", self.told[0])
        self.assertTrue(self.healthy(self.cache))

    def test_damaged_entry_is_a_miss(self):
        for blob in b"", b"no zlib", ccfix.packed(["no dict"]), ccfix.packed({"a": 1})[:-3]:
            self.cache.put("k", {"a": 1}, 1)
            self.cache._db.execute("UPDATE responses SET value = ?", (blob,))
            self.assertIsNone(self.cache.get("k"))
        self.assertEqual(self.told, [])

    def test_full_disk(self):
        self.cache.put("k", {"a": 1}, 1)
        self.cache._db.execute("PRAGMA max_page_count = 1")
        self.cache.put("big", noise(100000), 1)
        self.assertIn("full", self.told[0])
        self.assertTrue(self.healthy(self.cache))
        self.assertEqual((self.cache.get("k"), self.cache.get("big")), (({"a": 1}, 1.0), None))

    def test_a_file_in_place_of_the_folder(self):
        with open(self.folder, "w") as file:
            file.write("x")
        self.assert_goes_without(self.cache, "cache")

    def test_a_folder_in_place_of_the_file(self):
        os.makedirs(self.file)
        self.assert_goes_without(self.cache, "responses.db")

    @unittest.skipIf(os.name == "nt" or getattr(os, "geteuid", lambda: 0)() == 0, "root may write everywhere")
    def test_read_only_folder(self):
        os.makedirs(self.folder)
        os.chmod(self.folder, 0o500)
        self.assert_goes_without(self.cache, "responses.db")
        os.chmod(self.folder, 0o700)

    def test_database_that_turns_read_only(self):
        self.cache.put("k", {"a": 1}, 1)
        self.cache._db.execute("PRAGMA query_only = 1")
        self.assertEqual(self.cache.get("k"), ({"a": 1}, 1.0), "a hit that cannot be marked as used is a hit")
        self.assertIn("readonly", self.told[0])
        self.assertTrue(self.healthy(self.cache))

    def test_python_without_sqlite(self):
        hidden, sys.modules["sqlite3"] = sys.modules["sqlite3"], None
        try:
            self.assert_goes_without(self.cache, "sqlite3")
        finally:
            sys.modules["sqlite3"] = hidden

    def test_closed_cache_misses(self):
        self.cache.put("k", {}, 1)
        self.cache.close()
        self.cache.close()
        self.cache.put("k", {}, 1)
        self.assertEqual((self.cache.get("k"), self.cache.clear(), self.told), (None, 0, []))

    def test_what_json_cannot_hold_is_not_kept(self):
        self.cache.put("k", {"a": object()}, 1)
        self.cache.remember("k", object())
        self.assertEqual((self.cache.get("k"), self.cache.recall("k"), self.told), (None, None, []))


# A nursery loads the module once, forks writers and kills them: a whole interpreter each would take seconds.
KILLED_WRITERS = """
import os, random, signal, sqlite3, sys
sys.path.insert(0, sys.argv[1])
import ccfix
random.seed(4)
for _ in range(20):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        cache = ccfix.Cache(sys.argv[2], 3600, 200000)
        for number in range(100000):
            cache.put(str(number % 50), {"text": os.urandom(random.randrange(9000)).hex()}, 1)
            cache.remember(str(number), [number])
            os.write(writer, b".")
        os._exit(1)
    for _ in range(random.randrange(1, 12)):
        os.read(reader, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reader), os.close(writer)
    db = sqlite3.connect(os.path.join(sys.argv[2], "responses.db"))
    print(db.execute("PRAGMA integrity_check").fetchone()[0],
          db.execute("SELECT COALESCE(SUM(size), 0) - (SELECT value FROM counters) FROM responses").fetchone()[0])
    db.close()
"""

WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
import ccfix
cache = ccfix.Cache(sys.argv[2], 3600, 10 ** 6, log=print)
for number in range(100):
    cache.put(sys.argv[3] + str(number), {"n": number}, 1)
print(sum(bool(cache.get(sys.argv[3] + str(number))) for number in range(100)))
"""


class TestCacheProcesses(CacheCase):
    def command(self, code, *arguments):
        return [sys.executable, "-c", code, os.path.dirname(os.path.abspath(ccfix.__file__)), self.folder] + list(arguments)

    @unittest.skipUnless(hasattr(os, "fork"), "needs SIGKILL")
    def test_killed_writers_leave_a_sound_database(self):
        lines = subprocess.check_output(self.command(KILLED_WRITERS), timeout=60).decode().split("\n")
        self.assertEqual(lines, ["ok 0"] * 20 + [""])
        self.assertTrue(self.healthy(self.cache))
        self.assertFalse(glob.glob(self.file + ".broken*"))

    def test_two_processes_share_one_folder(self):
        self.cache.put("mine", {}, 1)
        writers = [subprocess.Popen(self.command(WRITER, name), stdout=subprocess.PIPE) for name in "ab"]
        self.assertEqual([writer.communicate(timeout=60)[0].split() for writer in writers], [[b"100"], [b"100"]])
        self.assertEqual(self.cache.stats()["entries"], 201)


PRICES = {"gpt-*": {"input": 9, "output": 9}, "gpt-5*": {"input": 1, "output": 2, "cache_read": 0.1},
          "gpt-5-pro": {"input": 10, "output": 20}}


class TestLedger(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        self.clock.time = 600030.0  # half past a minute
        self.ledger = ccfix.Ledger(size=3, prices=ccfix.prices_from(json.dumps(PRICES)), now=self.clock)

    def test_cost_by_exact_name_then_longest_pattern(self):
        row = {"input": 1000000, "output": 500000, "cache_read": 2000000, "cache_write": 1000000}
        for model, cost in (("gpt-5-pro", 10 + 10 + 20 + 10), ("gpt-5-mini", 1 + 1 + 0.2 + 1), ("gpt-4", 9 * 4.5),
                            ("other", None), (None, None)):
            self.assertEqual(self.ledger.add(dict(row, model=model))["cost"], cost, model)

    def test_newest_rows_come_first_and_old_ones_go(self):
        for number in range(5):
            self.ledger.add({"id": number})
        self.assertEqual([row["id"] for row in self.ledger.rows(10)], [4, 3, 2])
        self.assertEqual([row["id"] for row in self.ledger.rows(1)], [4])
        self.assertEqual(self.ledger.totals()["requests"], 5)

    def test_totals_count_all_requests(self):
        self.ledger.add({"model": "gpt-4", "status": 200, "input": 10, "output": 2, "cache_read": 4, "cache_write": 1})
        self.ledger.add({"model": "x", "status": 502, "input": None, "error": "gone"})
        self.ledger.add({"model": "x", "status": 200, "error": "cut"})
        self.assertEqual(self.ledger.totals(), {
            "requests": 3, "errors": 2, "input": 10, "output": 2, "cache_read": 4, "cache_write": 1,
            "cost": round(17 * 9 / 1e6, 6), "unpriced": 2})

    def test_cost_is_unknown_without_prices(self):
        for ledger in ccfix.Ledger(now=self.clock), self.ledger:
            ledger.add({"model": "unknown", "input": 5})
            self.assertEqual((ledger.totals()["cost"], ledger.series(1)[0]["cost"]), (None, None))

    def test_series_has_a_bucket_for_every_minute(self):
        for seconds, first_ms in ((-200, 5), (-60, 1), (-60, 9), (-60, 4), (0, None)):
            self.ledger.add({"time": self.clock.time + seconds, "first_ms": first_ms, "input": 3, "model": "gpt-4"})
        series = self.ledger.series(3)
        self.assertEqual([bucket["t"] for bucket in series], [599880, 599940, 600000])
        self.assertEqual([bucket["requests"] for bucket in series], [0, 3, 1])
        self.assertEqual([bucket["first_ms"] for bucket in series], [None, 4, None])
        self.assertEqual([bucket["cost"] for bucket in series], [0.0, 81e-6, 27e-6])
        self.assertEqual(sorted(series[0]), ["cache_read", "cache_write", "cost", "errors", "first_ms", "input", "output",
                                             "requests", "t", "unpriced"])
        self.assertEqual(len(self.ledger.series()), 60)

    def test_minutes_and_names_are_bounded(self):
        for number in range(2000):
            self.ledger.add({"time": number * 60, "model": "gpt-%d" % number})
        self.assertEqual((len(self.ledger._minutes), len(self.ledger._price_of)), (1440, 1000))
        self.assertEqual(self.ledger.add({"model": "gpt-late", "input": 1})["cost"], 9e-6)

    def test_adding_is_cheap(self):
        row = {"time": 600000, "model": "gpt-5-mini", "status": 200, "input": 9, "output": 5, "first_ms": 7, "error": ""}
        best = 1
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(100):
                self.ledger.add(row)
            best = min(best, (time.perf_counter() - start) / 100)
        self.assertLess(best, 50e-6)  # measured: 4; the rest is for slow machines

    def test_prices_come_from_text_or_file(self):
        self.assertEqual(ccfix.prices_from(" "), {})
        whole = {"m": {"input": 1.0, "output": 2.0, "cache_read": 1.0, "cache_write": 1.0}}
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "prices.json")
            with open(path, "w", encoding="utf-8-sig") as file:
                file.write('{"m": {"input": 1, "output": 2}}')
            self.assertEqual(ccfix.prices_from(path), whole)
        self.assertEqual(ccfix.prices_from('{"m": {"input": 1, "output": 2}}'), whole)

    def test_wrong_prices_are_refused_with_a_reason(self):
        for text, words in (("/no/such/file", "/no/such/file"), ("{", "not JSON"), ('{"m": 1}', "'m' needs input and output"),
                            ('{"m": {"input": 1}}', "needs input and output"), ('{"a*b": {}}', "only stand at the end"),
                            ('{"m": {"input": 1, "output": 2, "x": 3}}', "may have cache_read"),
                            ('{"m": {"input": -1, "output": 2}}', "input must be a price"),
                            ('{"m": {"input": true, "output": 2}}', "input must be a price"),
                            ('{"m": {"input": 1, "output": NaN}}', "output must be a price"),
                            ('{"m": {"input": "1", "output": 2}}', "not '1'")):
            with self.subTest(text):
                with self.assertRaises(ValueError) as caught:
                    ccfix.prices_from(text)
                self.assertIn(words, str(caught.exception))


def request_parts(system="s", tools="ab", messages="1234"):
    """Sections of a request in short: one letter a tool, one a message; roles alternate."""
    return ccfix.sections(
        [("system", system.encode())] + [("tool %s" % name.lower(), name.encode()) for name in tools]
        + [("message %d (%s)" % (place + 1, ("user", "assistant")[place % 2]), text.encode())
           for place, text in enumerate(messages)])


class TestWhyBroken(unittest.TestCase):
    def test_reasons(self):
        for new, reason in (
                (request_parts(), ""), (request_parts(messages="123456"), ""), (request_parts(messages="12"), ""),
                (request_parts(system="S"), "system text changed"),
                (request_parts(tools="ba"), "tools reordered"),
                (request_parts(tools="abc"), "tools changed (added c)"),
                (request_parts(tools="a"), "tools changed (removed b)"),
                (request_parts(tools="aB"), "tools changed (edited b)"),
                (request_parts(tools="aBcdefg"), "tools changed (added c, d, e and 2 more; edited b)"),
                (request_parts(messages="12x4"), "message 3 (user) changed"),
                (request_parts(messages="1x3456"), "message 2 (assistant) changed"),
                (request_parts(messages="12x"), "history was cut after message 2 (compaction)"),
                (request_parts(messages="xyz"), "history was replaced (compaction)"),
                (request_parts(system="S", tools="ba", messages="x2345"),
                 "system text changed; tools reordered; message 1 (user) changed")):
            self.assertEqual(ccfix.why_broken(request_parts(), new), reason)
        self.assertEqual(ccfix.why_broken([], request_parts()), "system text changed; tools changed (added a, b)")

    def test_sessions_are_compared_with_themselves(self):
        sessions = ccfix.Sessions(size=2)
        self.assertEqual(sessions.compare("a", request_parts(messages="1")), "")
        self.assertEqual(sessions.compare("b", request_parts(messages="9")), "")
        self.assertEqual(sessions.compare("a", request_parts(messages="123")), "")
        self.assertEqual(sessions.compare("a", request_parts(messages="x2345")), "message 1 (user) changed")
        self.assertEqual(sessions.compare("a", request_parts(messages="x234567")), "")
        sessions.compare("c", request_parts())
        self.assertEqual(sessions.compare("b", request_parts(messages="x234")), "", "forgotten: least recently used")

    def test_side_requests_do_not_look_like_a_loss(self):
        sessions = ccfix.Sessions()
        title, fetch = request_parts("title", "", "t"), request_parts("fetch", "", "f")
        for turn, page in ("1", "p"), ("123", "q"), ("12345", "r"):
            for listed in request_parts(messages=turn), title, fetch, request_parts("fetch", "", page):
                self.assertEqual(sessions.compare("a", listed), "")
        self.assertEqual(sessions.compare("a", request_parts(tools="ba", messages="1234567")), "tools reordered")
        self.assertEqual(sessions.compare("a", request_parts(tools="ba", messages="s12")), "history was replaced (compaction)")


class TestRecorder(unittest.TestCase):
    def setUp(self):
        self.top = tempfile.mkdtemp()
        self.folder = os.path.join(self.top, "records")

    def tearDown(self):
        shutil.rmtree(self.top)

    def test_secrets_are_hidden_everywhere(self):
        value = {"headers": {"Authorization": "Bearer sk-12345", "X-Api-Key": ["k"], "accept": "a"},
                 "pairs": [["Cookie", "c=1"], ("Accept", "b"), ["Proxy-Authorization", None]],
                 "body": b"raw sk-12345-long sk-12345 \xff", "sk-12345": 1, "number": 5, "none": None,
                 "schema": {"authorization": {"type": "string"}}}
        before = repr(value)
        self.assertEqual(ccfix.redact(value, ("sk-12345", "sk-12345-long", "", None, "a")), {
            "headers": {"Authorization": "<hidden>", "X-Api-Key": "<hidden>", "accept": "a"},
            "pairs": [["Cookie", "<hidden>"], ["Accept", "b"], ["Proxy-Authorization", "<hidden>"]],
            "body": u"raw <hidden> <hidden> \ufffd", "<hidden>": 1, "number": 5, "none": None,
            "schema": {"authorization": {"type": "string"}}})
        self.assertEqual(repr(value), before)

    def test_endless_depth_is_hidden(self):
        deep = "sk-12345"
        for _ in range(5000):
            deep = [deep]
        self.assertNotIn("sk-12345", json.dumps(ccfix.redact(deep)))

    def test_long_text_is_cut(self):
        self.assertEqual(ccfix.cut("abc", 3), "abc")
        self.assertEqual(ccfix.cut("abcde", 3), "abc... (2 more characters)")

    def test_replies_come_back_in_order_of_time(self):
        recorder = ccfix.Recorder(self.folder, ["sk-12345"])
        for when, replies in ((2.5, [{"status": 200, "headers": {"a": "b"}, "body": "three sk-12345"}]),
                              (2.25, [{"status": 400, "body": "one"}, {"status": 200, "headers": None, "body": u"two \u00e9"}])):
            self.assertTrue(recorder.write({"time": when, "id": "../evil id", "replies": replies}))
        self.assertEqual(ccfix.recorded_replies(self.folder), [
            {"status": 400, "headers": {}, "body": "one"}, {"status": 200, "headers": {}, "body": u"two \u00e9"},
            {"status": 200, "headers": {"a": "b"}, "body": "three <hidden>"}])
        self.assertEqual(sorted(os.listdir(self.folder))[0], "19700101-000002-250000-___evil_id.json")
        if os.name != "nt":
            modes = [stat.S_IMODE(os.stat(path).st_mode) for path in [self.folder] + glob.glob(self.folder + "/*")]
            self.assertEqual(modes, [0o700, 0o600, 0o600])

    def test_writing_never_raises(self):
        told = []
        with open(self.folder, "w") as file:
            file.write("in the way")
        recorder = ccfix.Recorder(self.folder, log=told.append)
        for exchange in ({"id": 1}, {"time": "odd"}, {"time": 1e30}, {"a": object()}):
            self.assertFalse(recorder.write(exchange))
        self.assertEqual(len(told), 1)

    def test_foreign_files_are_named(self):
        os.makedirs(self.folder)
        for text in "no json", "[]", "{}", '{"replies": [1]}', '{"replies": [{"status": "x"}]}', '{"replies": 5}':
            with open(os.path.join(self.folder, "bad.json"), "w") as file:
                file.write(text)
            with self.assertRaises(ValueError) as caught:
                ccfix.recorded_replies(self.folder)
            self.assertIn("bad.json", str(caught.exception))


# ======================================================================================================
# 13  Status page
# ======================================================================================================

class TestStatusPage(unittest.TestCase):
    """What can be seen without a browser; the rest is checked in a real one."""

    page = ccfix.status_page("NONCE").decode("ascii")       # decoding is a check: the source is ASCII

    def test_nonce_reaches_style_script_and_policy(self):
        self.assertEqual(re.findall(r"<(\w+) nonce=\"NONCE\">", self.page), ["style", "script"])
        self.assertEqual(len(re.findall(r"<(?:style|script)\b", self.page)), 2)
        self.assertNotIn("{nonce}", self.page)
        self.assertEqual(ccfix.page_policy("NONCE").count("'nonce-NONCE'"), 2)

    def test_policy_denies_all_that_is_not_named(self):
        policy = dict(part.split(" ", 1) for part in ccfix.page_policy("N").split("; "))
        self.assertEqual(policy, {
            "default-src": "'none'", "script-src": "'nonce-N'", "style-src": "'nonce-N'", "connect-src": "'self'",
            "img-src": "data:", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'"})

    def test_page_holds_nothing_that_the_policy_or_data_could_break(self):
        for name, pattern in [
                ("inline style", r"\sstyle="), ("inline handler", r"\son\w+\s*=\s*[\"']"), ("markup from text", r"innerHTML|outerHTML"),
                ("markup from text", r"insertAdjacentHTML|document\.write"), ("code from text", r"\beval\(|new Function"),
                ("outside resource", r"(?:src|href)=[\"'](?!data:)|url\(|@import")]:
            with self.subTest(name, pattern=pattern):
                self.assertIsNone(re.search(pattern, self.page))

    def test_ids_that_the_script_asks_for_exist_once(self):
        ids = re.findall(r"\sid=\"([\w-]+)\"", self.page)
        self.assertEqual(len(ids), len(set(ids)))
        asked = set(re.findall(r"(?:byId|put)\(\"([\w-]+)\"", self.page))
        self.assertLessEqual(asked, set(ids))
        self.assertLessEqual({"requests-total", "errors-total", "input-total", "output-total", "cache-clear", "cache-expired",
                              "requests", "lessons", "settings", "message"}, set(ids))


# ======================================================================================================
# The house
# ======================================================================================================

SOURCE_FILE = os.path.join(HERE, "ccfix.py")


class TestHouse(unittest.TestCase):
    """The rules of the house that a machine can check."""

    @classmethod
    def setUpClass(cls):
        with open(SOURCE_FILE, encoding="utf-8") as file:
            cls.source = file.read()
        cls.tree = ast.parse(cls.source)

    def test_only_the_standard_library_is_imported(self):
        allowed = set("""argparse ast base64 collections contextlib difflib functools getpass hashlib hmac http io itertools json math operator os platform
            random re secrets select shlex shutil signal socket socketserver sqlite3 ssl stat string subprocess sys tempfile textwrap threading time traceback
            typing urllib uuid webbrowser zlib""".split())
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                self.assertEqual(node.level, 0)
                found.add(node.module.split(".")[0])
        self.assertEqual(found - allowed, set())

    def test_source_is_ascii(self):
        self.source.encode("ascii")

    def test_pure_sections_do_no_input_or_output(self):
        sections = re.split(r"\n# ={90,}\n# (\d+)  .*\n# ={90,}\n", self.source)
        numbers = sections[1::2]
        self.assertEqual(numbers, [str(n) for n in range(1, 16)], "sections in order")
        for number, text in zip(numbers, sections[2::2]):
            if int(number) > 8:
                continue
            names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
            forbidden = {"socket", "sqlite3", "time", "print", "open", "threading", "select", "ssl", "random", "sys"}
            self.assertEqual(names & forbidden, set(), "section %s" % number)
            self.assertNotIn("urllib.request", text)

    def test_no_function_is_over_sixty_lines(self):
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef):
                lines = max(getattr(inner, "lineno", 0) for inner in ast.walk(node)) - node.lineno + 1
                self.assertLessEqual(lines, 60, node.name)

    def test_nothing_is_left_to_do(self):
        for word in ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented"):
            self.assertNotIn(word, self.source)

    def test_import_has_no_side_effect(self):
        code = ("import sys, threading; sys.path.insert(0, %r); import ccfix; "
                "print(threading.active_count(), 'sqlite3' in sys.modules)" % HERE)
        with tempfile.TemporaryDirectory() as folder:
            out = subprocess.check_output([sys.executable, "-W", "error", "-c", code], cwd=folder)
            self.assertEqual(out.split(), [b"1", b"False"])
            self.assertEqual(os.listdir(folder), [])

    def test_importers_may_rely_on_all(self):
        for name in ccfix.__all__:
            self.assertTrue(hasattr(ccfix, name), name)

    def test_no_visible_file_but_the_four(self):
        if not os.path.isdir(os.path.join(HERE, ".git")):
            self.skipTest("not a checkout")
        files = subprocess.check_output(["git", "ls-files"], cwd=HERE).decode().split()
        self.assertEqual(sorted(name for name in files if not name.startswith(".")), ["LICENSE", "README.md", "ccfix.py", "test_ccfix.py"])

    def test_every_test_method_runs(self):
        """Two methods of one name in a class, or a test outside one, would silently never run."""
        with open(os.path.abspath(__file__), encoding="utf-8") as file:
            tree = ast.parse(file.read())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        self.assertEqual(len({node.name for node in classes}), len(classes))
        for node in classes:
            names = [inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)]
            self.assertEqual(len(set(names)), len(names), node.name)
        loose = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]
        self.assertEqual(loose, [])


class Provider(object):
    """A vector's server: answers as recorded for as long as the request offends, and normally after that."""

    def __init__(self, row, how):
        self.row, self.how, self.offended = row, how, 0

    def __call__(self, sent):
        adapt = self.row["expect"].get("adapt")
        if adapt and "send_back" not in adapt and (self.offended == 0 or self.offends(sent, adapt)):
            self.offended += 1
            return self.recorded()
        if adapt and "send_back" not in adapt:
            return FakeReply(200, {}, [HELLO_STREAM])
        return self.recorded()

    def recorded(self):
        return FakeReply(self.row.get("status", 200), self.row.get("headers") or {}, pieces_of(self.row["raw"].encode("utf-8"), self.how))

    @staticmethod
    def offends(sent, adapt):
        limit = adapt.get("max_tokens_at_most")
        if limit and sent.get("max_tokens", sent.get("max_completion_tokens", 0)) > limit:
            return True
        if any(name in sent for name in list(adapt.get("drop", ())) + list(adapt.get("rename", ()))):
            return True
        if any(name not in sent for name in adapt.get("rename", {}).values()):
            return True
        if any(sent.get(name) != value for name, value in adapt.get("set", {}).items()):
            return True
        answers = [m for m in sent["messages"] if m["role"] == "assistant"]
        if any(name in m for m in answers for name in adapt.get("drop_message_fields", ())):
            return True
        if adapt.get("need_reasoning_content") and any(m.get("tool_calls") and not m.get("reasoning_content") for m in answers):
            return True
        return bool(adapt.get("strip_images")) and "image_url" in json.dumps(sent)


def vector_request(row):
    """A request that could offend in every way a vector knows."""
    names = row.get("tools") or ["Read", "Bash"]
    image_ = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    history = [
        {"role": "user", "content": [{"type": "text", "text": "look"}, image_]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ccfix.write_state("127.0.0.1", {})},
                                          {"type": "tool_use", "id": "toolu_h", "name": names[0], "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_h", "content": "ok"}]}]
    return request(*history, tools=[tool(name, city="string") for name in names], temperature=0, max_tokens=64000,
                   thinking={"type": "enabled", "budget_tokens": 20000})


@unittest.skipUnless(os.path.exists(os.path.join(VECTORS, "upstream_transcripts.jsonl")), "no ../shared/vectors here")
class TestVectors(unittest.TestCase):
    """Each recorded provider answer becomes what its row expects: fed whole and byte by byte, streamed."""

    def rows(self):
        with open(os.path.join(VECTORS, "upstream_transcripts.jsonl"), encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def test_every_transcript_whole_and_byte_by_byte(self):
        rows = self.rows()
        self.assertGreater(len(rows), 100)
        for row in rows:
            for how in ("whole", "bytes"):
                with self.subTest(row["id"], how=how):
                    self.check(row, how)

    def check(self, row, how):
        expect, provider = row["expect"], Provider(row, how)
        extra = {"PROFILE": "openrouter"} if "send_back" in expect.get("adapt", {}) else {}
        if "drop_message_fields" in expect.get("adapt", {}):
            extra = {"PROFILE": "kimi"}
        if row["id"].startswith("openrouter"):
            extra = {"PROFILE": "openrouter"}
        proxy, wires = proxy_with(provider, **extra)
        if expect.get("adapt", {}).get("set"):
            extra["PROFILE"] = "dashscope"
        body = vector_request(row)
        events, error = ask(proxy, body)
        self.assertTrue(all(reply.closed for reply in wires.replies))
        state = grammar(self, events)
        adapt = expect.get("adapt", {})
        if adapt and "send_back" not in adapt:
            self.assertIsNone(error)
            self.assertEqual(ccfix.assemble(events)["content"][0]["text"], "Hello")
            self.assertLessEqual(provider.offended, 1, "more than one extra request")
            events, error = ask(proxy, body)            # the lesson holds
            self.assertLessEqual(provider.offended, 1, "the lesson was not remembered")
        elif "error_type" in expect and not expect.get("mid_stream"):
            self.check_error(expect, error)
        elif expect.get("mid_stream"):
            self.check_broken(expect, events, state)
        elif error is None or not expect.get("or_error"):
            self.assertIsNone(error)
            self.assertEqual(state, "done")
            message = ccfix.assemble(events)
            self.check_message(expect, message)
            if "send_back" in adapt:
                ask(proxy, request("q", {"role": "assistant", "content": message["content"]}, "and?"))
                turn = next(m for m in wires.sent[-1]["messages"] if m["role"] == "assistant")
                for name, value in adapt["send_back"].items():
                    self.assertEqual(turn.get(name), value)

    def check_error(self, expect, error):
        self.assertIsNotNone(error)
        body = error.body()["error"]
        self.one_of(expect["error_type"], body["type"])
        statuses = expect["http_status"] if isinstance(expect["http_status"], list) else [expect["http_status"]]
        overflow = "prompt is too long" in expect.get("message_has", "")
        self.assertIn(error.status, statuses + ([424] if 400 in statuses and not overflow else []), body["message"])
        for word in [expect.get("message_has")] if isinstance(expect.get("message_has"), str) else expect.get("message_has") or ():
            self.assertIn(word.lower(), body["message"].lower())
        for word in [expect.get("message_lacks")] if isinstance(expect.get("message_lacks"), str) else expect.get("message_lacks") or ():
            self.assertNotIn(word.lower(), body["message"].lower())
        if expect.get("retry_after"):
            self.assertEqual(str(error.headers.get("retry-after")), str(expect["retry_after"]))

    def check_broken(self, expect, events, state):
        self.assertEqual(state, "error")
        text = "".join(e["delta"].get("text", "") for e in events if e["type"] == "content_block_delta")
        self.assertEqual(text.strip(), expect["text"].strip())
        self.one_of(expect["error_type"], events[-1]["error"]["type"])

    def check_message(self, expect, message):
        blocks = message["content"]
        self.assertEqual("".join(b["text"] for b in blocks if b["type"] == "text").strip(), expect["text"].strip())
        self.assertEqual("".join(b["thinking"] for b in blocks if b["type"] == "thinking").strip(), expect["thinking"].strip())
        calls = [b for b in blocks if b["type"] == "tool_use"]
        self.assertEqual([c["name"] for c in calls], [c["name"] for c in expect["tool_calls"]])
        for call, wanted in zip(calls, expect["tool_calls"]):
            self.assertRegex(call["id"], r"\A[A-Za-z0-9_-]+\Z")
            if "input" in wanted:
                self.assertEqual(call["input"], wanted["input"])
        self.assertEqual(len({c["id"] for c in calls}), len(calls))
        if message["stop_reason"] != "model_context_window_exceeded":
            self.one_of(expect["stop_reason"], message["stop_reason"])
        for name, value in (expect.get("usage") or {}).items():
            self.one_of(value, message["usage"][name])
        if "blocks" in expect:
            self.assertEqual([b["type"] for b in blocks], expect["blocks"])

    def one_of(self, allowed, value):
        self.assertIn(value, allowed if isinstance(allowed, list) else [allowed])


class Counted(unittest.TextTestResult):
    """Counts what passed, for the last line."""
    passed = 0

    def addSuccess(self, test):
        unittest.TextTestResult.addSuccess(self, test)
        self.passed += 1


def main():
    """Run all tests; the last line is `N passed, N failed, N skipped`."""
    runner = unittest.TextTestRunner(resultclass=Counted, verbosity=2 if "-v" in sys.argv else 1)
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    loader, module = unittest.defaultTestLoader, sys.modules[__name__]
    suite = loader.loadTestsFromNames(names, module) if names else loader.loadTestsFromModule(module)
    result = runner.run(suite)
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    sys.stderr.flush()
    print("%d passed, %d failed, %d skipped" % (result.passed, failed, len(result.skipped)))
    return 1 if failed or not result.testsRun else 0


if __name__ == "__main__":
    sys.exit(main())
