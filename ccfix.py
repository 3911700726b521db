#!/usr/bin/env python3
"""ccfix: let Claude Code use any model behind an OpenAI-compatible API.

One file, standard library only, Python 3.6 to 3.14. Start it, point Claude Code at it, work.

    python3 ccfix.py -k KEY -m MODEL -b https://api.example.com/v1
    python3 ccfix.py --demo                  # no key, no network: an embedded model answers

How a request travels:

    Claude Code --HTTP--> Handler -> Proxy -> to_openai -> Upstream --HTTP--> provider
                                       |                      |
    Claude Code <--SSE--- encode_event <- StreamTranslator <- sse_payloads <- blocks

One direction in, one direction out; nothing calls backwards, but for one: whoever waits, waits through
the client's `wait`, which notices a client that hung up and writes the pings that keep a silent stream alive.
Each connection has a thread; streams that flow are moved by one thread for all of them, the Pump.

Words: a *block* is Anthropic content, a *chunk* an OpenAI stream object, an *event* an Anthropic stream
event, a *payload* the data string of an SSE event, a *profile* what is special about a provider, a *lesson*
a change of the profile that the provider's own errors taught us, the *target* the model that is really
called, the *disguise* the model name that Claude Code is shown.

    1 Vocabulary    tables that both directions share
    2 Errors        what went wrong, whose fault it is, and how Claude Code is told
    3 Settings      one row a setting; command line > environment > .env > Claude's settings > default
    4 Providers     one row a provider: how it differs from the default
    5 Request       Anthropic body -> OpenAI body
    6 Tool text     tool calls that a model wrote as text; arguments mended against the tool's schema
    7 Stream        SSE bytes -> chunks -> Anthropic events -> SSE bytes
    8 Learning      a provider's error -> a lesson
    9 Upstream      connections to the provider, kept alive
   10 Cache         stored replies, memory and ledger in SQLite
   11 Proxy         joins the above: body in, events out; knows no client socket
   12 HTTP          handler, routes, the one error funnel, server
   13 Status page   what a browser sees at /
   14 Demo          the embedded model
   15 Commands      serve, run, check, init, install, uninstall, open

Sections 1 to 8 are pure: bytes and dicts in, bytes and dicts out; no sockets, files, clocks or printing.
"""

import argparse
import base64
import collections
import contextlib
import hashlib
import hmac
import http.client
import http.server
import io
import itertools
import json
import operator
import os
import random
import re
import select
import selectors
import shutil
import signal
import socket
import socketserver
import ssl
import sys
import threading
import time
import traceback
import urllib.parse
import urllib.request
import zlib
from typing import NamedTuple

__version__ = "1.0.0"
__all__ = [
    "main",
    "to_openai",
    "sse_payloads",
    "StreamTranslator",
    "encode_event",
    "fold",
    "unfold",
    "upstream_error",
    "Settings",
    "Profile",
    "Proxy",
    "Server",
]


# ======================================================================================================
# 1  Vocabulary: tables that both directions share
# ======================================================================================================

STOP_REASONS = {
    # OpenAI's finish_reason -> Anthropic's stop_reason. Any tool call makes it "tool_use", whatever this says.
    "stop": "end_turn",
    "end": "end_turn",
    "eos": "end_turn",
    "tool_calls": "end_turn",
    "function_call": "end_turn",
    "repetition_truncation": "end_turn",  # MiMo
    "length": "max_tokens",
    "model_length": "max_tokens",
    "max_tokens": "max_tokens",
    "content_filter": "refusal",
    "sensitive": "refusal",  # sensitive: Z.ai
}

FINISH_ERRORS = {
    # A finish_reason that is no finish: (Anthropic error type, sentence).
    "insufficient_system_resource": (
        "overloaded_error",
        "The provider ran out of resources in the middle of the reply.",
    ),
    "error": ("api_error", "The provider reported an error in the middle of the reply."),
    "network_error": (
        "api_error",
        "The provider lost its own connection in the middle of the reply.",
    ),
    "abort": ("api_error", "The model server aborted the reply."),
}

BLOCKS = {
    # kind: (content_block of content_block_start, delta type, field of the delta and of the finished block)
    "text": ({"type": "text", "text": ""}, "text_delta", "text"),
    "thinking": (
        {"type": "thinking", "thinking": "", "signature": ""},
        "thinking_delta",
        "thinking",
    ),
    "tool_use": (
        {"type": "tool_use", "id": "", "name": "", "input": {}},
        "input_json_delta",
        "partial_json",
    ),
}

ERROR_TYPES = {
    # HTTP status -> Anthropic's error type; anything else is api_error
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    411: "invalid_request_error",
    413: "request_too_large",
    408: "timeout_error",
    414: "invalid_request_error",
    415: "invalid_request_error",
    417: "invalid_request_error",
    422: "invalid_request_error",
    424: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    504: "timeout_error",
    529: "overloaded_error",
}

FAMILIES = ("opus", "sonnet", "haiku")

# Models reply in these fields, in this order of trust; the first that holds text counts (both are sent by some).
REASONING_FIELDS = ("reasoning_content", "reasoning", "reasoning_text")

BILLING_LINE = "x-anthropic-billing-header:"  # first system block of Claude Code; changes, and describes the client


def compact_json(value, _encode=json.JSONEncoder(separators=(",", ":")).encode):
    """value as JSON text, ASCII (half a surrogate pair could not be encoded otherwise), without spaces."""
    return _encode(value)


def as_dict(value):
    """value if it is a dict, else an empty one: for walking replies that may hold anything."""
    return value if isinstance(value, dict) else {}


def as_list(value):
    """value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


MAX_DIGITS = 300  # of a number; Python before 3.11 takes hours for a million


def parse_integer(digits):
    if len(digits) > MAX_DIGITS:
        raise ValueError("a number has %d digits" % len(digits))
    return int(digits)


def parse_float(digits):
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError("%s is too large" % digits[:20])
    return value


def refuse_constant(name):
    """NaN and Infinity are no JSON."""
    raise ValueError("%s is no JSON number" % name)


JSON_HOOKS = {
    "parse_int": parse_integer,
    "parse_float": parse_float,
    "parse_constant": refuse_constant,
}
STRICT = json.JSONDecoder(**JSON_HOOKS)  # Python's own takes NaN, 1e999 and numbers without end


# ======================================================================================================
# 2  Errors: what went wrong, whose fault it is, and how Claude Code is told
# ======================================================================================================


class ProxyError(Exception):
    """An error that the client is shown.

    status: HTTP status; type: Anthropic's error type; headers: extra reply headers; kind: what ccfix itself
    decides by ("overflow", "billing", "auth", "connect", "timeout", "cut", ...); retry: worth another try
    before any content went out.
    """

    default = 500

    def __init__(self, message, status=None, type=None, headers=(), kind="", retry=False):
        Exception.__init__(self, message)
        self.message, self.status = message, status or self.default
        self.type = type or ERROR_TYPES.get(self.status, "api_error")
        self.headers, self.kind, self.retry = dict(headers), kind, retry

    def body(self, request_id=""):
        """Anthropic's error object (https://docs.anthropic.com/en/api/errors)."""
        return {
            "type": "error",
            "error": {"type": self.type, "message": self.message},
            "request_id": request_id,
        }


class BadRequest(ProxyError):
    """The client's request cannot be served as it is."""

    default = 400


class UpstreamError(ProxyError):
    """The provider, or the way to it, failed. numbers: what an overflow text said (prompt, output, limit);
    text: the provider's own words, for learning."""

    default = 502
    numbers, text = (0, 0, 0), ""


class ClientGone(Exception):
    """The client hung up: nobody waits for the answer any more."""


def error_fields(raw):
    """(message, code, type) found in an error body of any of the shapes that providers use.

    {error:{message,type,code}} . [{error:{..}}] (Gemini) . {error:"text",code} (xAI, LM Studio) . flat {message,..}
    (Mistral, Cerebras, SiliconFlow) . {base_resp:{status_msg}} (MiniMax) . {detail:..} (FastAPI) . RFC 7807 . HTML .
    plain text. A JSON text inside (OpenRouter's metadata.raw) is looked into.
    """
    text = raw.decode("utf-8", "replace").strip() if isinstance(raw, bytes) else raw.strip()
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return readable_text(text), "", ""
    if isinstance(body, list):
        body = body[0] if body else {}
    if not isinstance(body, dict):
        return str(body), "", ""
    return error_body_fields(body)


def error_body_fields(body):
    """(message, code, type) of an error body that is a JSON object."""
    error = body.get("error")
    if isinstance(error, dict):
        inner = as_dict(error.get("metadata")).get("raw")
        message = error_words(error.get("message") or error)
        if isinstance(inner, str) and inner.strip():
            message += ": " + error_fields(inner[:10000])[0]
        return (
            message,
            str(error.get("code") or error.get("status") or ""),
            str(error.get("type") or ""),
        )
    base = as_dict(body.get("base_resp"))
    for value in (
        error,
        body.get("message"),
        base.get("status_msg"),
        body.get("detail"),
        body.get("msg"),
    ):
        if value:
            code = body.get("code") or base.get("status_code") or body.get("status") or ""
            return error_words(value), str(code), str(body.get("type") or body.get("title") or "")
    return error_words(body), "", ""


def error_words(value):
    """An error's message, whatever it is, as text."""
    if isinstance(value, str):
        return value.strip()
    return compact_json(value)


def readable_text(text):
    """Text, or the title and heading of an HTML page, without tags; at most 1000 characters."""
    if re.match(r"(?is)\s*(<!doctype|<html|<head|<body|<\?xml)", text):
        found = re.findall(r"(?is)<(title|h1)[^>]*>(.*?)</\1", text[:20000])
        text = (
            " - ".join(
                dict.fromkeys(re.sub(r"<[^>]*>|\s+", " ", part).strip() for _, part in found)
            )
            or "an HTML page"
        )
    return text[:1000]


# Patterns of error texts are compiled when the first error comes, not at each start.
OVERFLOW = (
    r"(?i)context[_ ](?:length|window|size|limit)|maximum (?:prompt|context|model) ?(?:length)?|prompt.{0,40}too (?:long|large)"
    r"|too long|too large for model|input token count|exceed\w*.{0,40}(?:token limit|limit of \d|context|maximum|max length)"
    r"|reduce the (?:length|size) of the (?:messages|input|prompt)|Range of input length|tokens to keep"
    r"|Request (?:body )?too large|tokens? exceed|longer than the model"
)
NO_OVERFLOW = (
    r"(?i)(?:image|file) exceeds|\d ?MB\b|pixels|connections|retries|rate limit|too many requests|throttl|per minute|(?:string|array) too long"
    r"|(?:took|taking|waited|waiting) too long|too long to|tool_calls?\[|Invalid 'messages"
)
TPM = r"(?s)Request too large for .*?Limit (\d+), Requested (\d+)"

# Numbers in overflow texts, most telling first: p(rompt), c(ompletion), m(aximum), t(otal).
OVERFLOW_NUMBERS = (
    r"maximum context length (?:is|of) (?P<m>\d+) tokens.*?total of (?P<t>\d+) tokens: (?P<p>\d+) tokens.*?and (?P<c>\d+) tokens",
    r"maximum context length (?:is|of) (?P<m>\d+) tokens.*?requested (?P<c>\d+) output tokens.*?at least (?P<p>\d+) input tokens",
    r"maximum context length (?:is|of) (?P<m>\d+) tokens.*?requested (?:about )?(?P<t>\d+) tokens \((?P<p>\d+) (?:in the messages|of text input)"
    r".*?(?P<c>\d+) in the (?:completion|output)",
    r"exceed context limit: (?P<p>\d+) \+ (?P<c>\d+) > (?P<m>\d+)",
    r"(?P<p>\d+) tokens > (?P<m>\d+) maximum",
    r"Limit (?P<m>\d+), Requested (?P<p>\d+)",
    r"model token limit: (?P<m>\d+) \(requested: (?P<p>\d+)\)",
    r"(?:maximum )?(?:context|prompt) length (?:is|of) (?:only )?(?P<m>\d+)(?: tokens)?\D.*?(?:resulted in|contains(?: at least)?|requested) (?P<p>\d+)",
    r"configured limit of (?P<m>\d+) tokens\D*?(?P<p>\d+) tokens",
    r"\((?P<p>\d+) tokens\).*?\((?P<m>\d+) tokens\)",
    r"token count (?:\()?(?:of )?(?P<p>\d+)\)? exceeds the (?:maximum number of tokens allowed \(?|limit of )(?P<m>\d+)",
    r"first (?P<p>\d+) tokens.*?context length of only (?P<m>\d+) tokens",
    r"(?:contains|have|got) (?:at least )?(?P<p>\d+) (?:input )?tokens?\b.*?(?:with|limit|maximum|length)\D{0,40}?(?P<m>\d{3,})",
    r"Max size: (?P<m>\d+) tokens",
    r"length should be \[1, (?P<m>\d+)\]",
)


def overflow_numbers(text, body=None):
    """(prompt, output, limit) in tokens as an overflow text tells them; 0 where it does not."""
    error = as_dict(as_dict(body).get("error"))
    if isinstance(error.get("n_prompt_tokens"), int) and isinstance(
        error.get("n_ctx"), int
    ):  # llama.cpp
        return error["n_prompt_tokens"], 0, error["n_ctx"]
    for pattern in OVERFLOW_NUMBERS:
        found = re.search(pattern, text, re.I | re.S)
        if found:
            number = {key: int(value) for key, value in found.groupdict().items() if value}
            return number.get("p", 0), number.get("c", 0), number.get("m", 0)
    return 0, 0, 0


def is_overflow(status, text, code=""):
    """Whether an error says that the prompt, or prompt and output together, do not fit the context."""
    if status in (400, 413, 429) and re.search(TPM, text):
        return True  # Groq, OpenAI: one request above the tokens per minute; waiting never helps
    if status not in (200, 400, 413, 422, 500):
        return False
    telling = code in (
        "context_length_exceeded",
        "model_max_prompt_tokens_exceeded",
        "exceed_context_size_error",
    )
    return (
        (telling or bool(re.search(OVERFLOW, text)))
        and not re.search(NO_OVERFLOW, text)
        and not re.match(OUTPUT_LIMIT, text)
    )


OUTPUT_LIMIT = (
    r"(?s)(?=.*?max(?:imum)?_?(?:completion_|output_|new_)?tokens)(?!.*?(?:context length|context limit))"
    r".*?(?:at most|less than or equal to|<=|\[\d+,\s*|> )\s*`?(\d{3,7})"
)

BILLING = (
    r"(?i)insufficient[_ ](?:user_)?(?:quota|balance|credit|fund)|balance is (?:insufficient|too low)|exceeded your current quota(?![\s\S]*retry in \d)"
    r"|Arrearage|good standing|credit balance|payment required|out of credits|billing (?:hard )?limit|billing_not_active"
    r"|\(1008\)|can only afford|quota (?:is )?(?:exhausted|used up)|\u989d\u5ea6\u4e0d\u8db3|\u4f59\u989d\u4e0d\u8db3|\u6b20\u8d39"
)
OVERLOADED = (
    r"(?i)overload|at capacity|over capacity|currently unavailable|Loading model|server is busy"
)
NO_MODEL = (
    r"(?is)model.{0,80}(?:does not exist|not found|not exist|no longer available|end of life|not supported in|decommissioned)"
    r"|modelCode|model_not_found|Model Not Exist|unknown model|only supported in v1/responses|not a chat model"
    r"|unsupported_api_for_model|not accessible via the /chat/completions"
)
PERMANENT_500 = r"(?i)jinja|chat template|image input is not supported|tool call arguments as JSON|must be at the beginning"
BAD_KEY = r"(?i)API key not valid|API_KEY_INVALID|(?:invalid|incorrect|wrong) api[ _-]?key|api[ _-]?key is (?:invalid|not valid|wrong)"
SAMPLING = r"(?i)tool_use_failed|failed_generation|does not match the expected .{0,20}format"


def overflow_error(prompt, limit, estimate=0, window=0):
    """The one text by which every version of Claude Code knows that it must compact the conversation."""
    limit = limit or window or max(1000, prompt - 1 if prompt else estimate - 1)
    prompt = max(prompt or estimate, limit + 1)
    return UpstreamError(
        "prompt is too long: %d tokens > %d maximum" % (prompt, limit), 400, kind="overflow"
    )


def upstream_error(status, headers, raw):
    """An upstream's HTTP error (or an error inside a 200) as the UpstreamError that makes Claude Code do the right thing.

    Chosen by what the real client does with each status: 400 is sent up to six times and 401 for three minutes,
    so an unrecognised 400 goes out as 424 (once), and a bad key with `x-should-retry: false`; billing is 402 (once);
    429 and 5xx are retried with Retry-After; the words of a 404 it hides (see Handler.fail).
    """
    message, code, kind = error_fields(raw)
    text = " ".join((message, code, kind))
    message = message or "the provider answered HTTP %d without saying why" % status
    body = json_or_none(raw)
    for row in ERROR_ROWS:
        if row.matches(status, text, code):
            error = row.error(status, headers, message, text, body)
            error.text = text
            return error
    raise AssertionError("the last row matches everything")


def json_or_none(raw):
    """raw parsed as JSON, or None."""
    try:
        return json.loads(raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw)
    except (ValueError, RecursionError):
        return None


def retry_after(headers, body, text):
    """Seconds that the provider asks to wait, as text for the retry-after header, or ""; from the header, Gemini's
    RetryInfo, or the words "retry after N seconds"."""
    value = str(headers.get("retry-after") or "").strip()
    if re.match(r"[0-9]{1,9}(\.[0-9]+)?\Z", value):
        return str(int(float(value) + 0.999))
    found = re.search(
        r'"retryDelay"\s*:\s*"(\d{1,9})|(?:retry|try again) (?:after|in) (\d{1,9}(?:\.\d+)?) ?s',
        compact_json(body) + text,
        re.I,
    )
    return str(int(float(next(filter(None, found.groups()))) + 0.999)) if found else ""


class ErrorRow(NamedTuple):
    """One class of upstream errors. statuses: which (empty: any); pattern: in the text (empty: any);
    status: what the client gets (0: the same); sentence: shown before the provider's words."""

    kind: str
    statuses: tuple
    pattern: str
    status: int
    sentence: str
    retry: bool = False
    type: str = ""
    headers: tuple = ()

    def matches(self, status, text, code):
        if self.statuses and status not in self.statuses:
            return False
        if self.kind == "overflow":
            return is_overflow(status, text, code)
        return not self.pattern or bool(re.search(self.pattern, text))

    def error(self, status, headers, message, text, body):
        if self.kind == "overflow":
            numbers = overflow_numbers(text, body)
            error = overflow_error(numbers[0], numbers[2])
            error.numbers = numbers
            return error
        shown = (self.sentence + " " + message).strip() if self.sentence else message
        extra = dict(self.headers)
        wait = retry_after(headers, body, text) if self.retry or self.kind == "rate" else ""
        if wait:
            extra["retry-after"] = wait
        return UpstreamError(
            shown, self.status or status, self.type or None, extra, self.kind, self.retry
        )


NEVER = (("x-should-retry", "false"),)
ERROR_ROWS = (
    # First match wins. What providers send is theirs to change; what Claude Code does was seen with version 2.1.330.
    ErrorRow(
        "billing",
        (200, 400, 402, 403, 429, 500),
        BILLING,
        402,
        "The provider's account has no credit:",
        headers=NEVER,
    ),
    ErrorRow("billing", (402,), "", 402, "The provider wants payment:", headers=NEVER),
    ErrorRow("overflow", (), "", 400, ""),
    ErrorRow(
        "auth",
        (401,),
        "",
        401,
        "The provider refused the key; mend TARGET_API_KEY (-k):",
        headers=NEVER,
    ),
    ErrorRow(
        "auth",
        (400, 403),
        BAD_KEY,
        401,
        "The provider refused the key; mend TARGET_API_KEY (-k):",
        headers=NEVER,
    ),  # Gemini
    ErrorRow(
        "model",
        (400, 404, 410, 422),
        NO_MODEL,
        404,
        "The provider has no such model; mend TARGET_MODEL (-m):",
        headers=NEVER,
    ),
    ErrorRow(
        "sampling",
        (400, 422, 500),
        SAMPLING,
        500,
        "The model produced a malformed tool call:",
        retry=True,
        type="api_error",
    ),
    ErrorRow(
        "request", (404,), "No endpoints found that", 424, "The provider refused the request:"
    ),  # OpenRouter: images, tools
    ErrorRow(
        "path",
        (404, 405),
        "",
        404,
        "The provider has no such address or model; check TARGET_API_BASE (-b) and TARGET_MODEL (-m):",
        headers=NEVER,
    ),
    ErrorRow(
        "model",
        (410,),
        "",
        404,
        "The model is gone; choose another TARGET_MODEL (-m):",
        headers=NEVER,
    ),
    ErrorRow("policy", (403,), "", 403, "The provider forbids this request:", headers=NEVER),
    ErrorRow(
        "overloaded",
        (200, 429, 500, 503),
        OVERLOADED,
        529,
        "The provider is overloaded:",
        retry=True,
    ),
    ErrorRow("rate", (429,), "", 429, "", retry=True),
    ErrorRow("size", (413,), "", 413, "The provider says that the request is too large:"),
    ErrorRow("request", (500,), PERMANENT_500, 424, "The provider cannot take this request:"),
    ErrorRow("timeout", (408, 504, 522, 524), "", 504, "The provider took too long:", retry=True),
    ErrorRow("overloaded", (503, 529), "", 529, "The provider is overloaded:", retry=True),
    ErrorRow("server", tuple(range(500, 600)), "", 502, "The provider failed:", retry=True),
    ErrorRow("request", (), "", 424, "The provider refused the request:"),
)


def error_in_reply(body):
    """The UpstreamError that a reply with HTTP 200 holds, or None. body: a chunk, or a whole reply, as a dict.

    {error:..} (vLLM, OpenRouter, llama.cpp), x_groq.error, base_resp.status_code (MiniMax), {code, error:"text"} (xAI).
    """
    error = body.get("error") or as_dict(body.get("x_groq")).get("error")
    base = as_dict(body.get("base_resp"))
    if error is None and base.get("status_code") in (None, 0):
        return None
    if not error and not base.get("status_code"):
        return None
    source = {"error": error} if error else body
    if isinstance(error, str) and body.get("code"):
        source = body
    code = as_dict(error).get("code") if isinstance(error, dict) else None
    status = (
        int(code) if isinstance(code, (int, str)) and re.match(r"[45]\d\d$", str(code)) else 500
    )
    raw = compact_json(source)
    kind = str(as_dict(error).get("type", ""))
    if status == 500 and ("rate_limit" in raw or "rate limit" in raw.lower()):
        status = 429
    elif status == 500 and (is_overflow(200, raw) or kind == "invalid_request_error"):
        status = 400
    return upstream_error(status, {}, raw)


# ======================================================================================================
# 3  Settings: one row a setting; command line > environment > .env > Claude's settings > default
# ======================================================================================================


class SettingError(Exception):
    """A setting that cannot be used; the message names it, its origin and what is allowed."""


def parse_text(value):
    """Any text without line breaks."""
    if "\n" in value or "\r" in value:
        raise ValueError("one line of text")
    return value.strip()


def parse_flag(value):
    """true or false (also 1/0, yes/no, on/off)."""
    known = {
        "true": True,
        "1": True,
        "yes": True,
        "on": True,
        "false": False,
        "0": False,
        "no": False,
        "off": False,
        "": False,
    }
    if value.strip().lower() not in known:
        raise ValueError("true or false")
    return known[value.strip().lower()]


def parse_port(value):
    """A port number; 0 takes a free one."""
    if not re.match(r"\d{1,5}$", value.strip()) or int(value) > 65535:
        raise ValueError("a port number, 0 to 65535")
    return int(value)


def parse_count(value):
    """A whole number, 0 or more."""
    if not re.match(r"\d{1,12}$", value.strip()):
        raise ValueError("a whole number, 0 or more")
    return int(value)


def parse_seconds(value):
    """A number of seconds above 0."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e7:
        raise ValueError("a number of seconds above 0")
    return number


def parse_choice(*allowed):
    """A parser that takes one of the given words, in any case."""

    def parse(value):
        if value.strip().lower() not in allowed:
            raise ValueError("one of " + ", ".join(word or "(empty)" for word in allowed))
        return value.strip().lower()

    return parse


def parse_json_object(value):
    """A JSON object."""
    if not value.strip():
        return {}
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError('a JSON object, such as {"name": "value"}')
    return parsed


def parse_names(value):
    """Names separated by commas or spaces, in lower case."""
    return tuple(re.split(r"[,\s]+", value.strip().lower())) if value.strip() else ()


def parse_address(value):
    """An http or https URL; the scheme may be missing, as people paste it."""
    value = value.strip()
    if not value:
        return ""
    if "://" not in value:
        local = re.match(r"(localhost|127\.|\[|\d+\.\d+\.\d+\.\d+|[\w-]+:\d)", value)
        value = ("http://" if local else "https://") + value
    try:
        parts = urllib.parse.urlsplit(value)
        good = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and (parts.port or 1)
            and not parts.fragment
        )
    except ValueError:
        good = False
    if not good or re.search(r"[\s\x00-\x1f]", value):
        raise ValueError("an address such as https://api.example.com/v1")
    return value


def parse_base_url(value):
    """The base of an OpenAI-compatible API; a pasted /chat/completions or trailing slash is taken off.

    A host alone gets /v1, since that is where every known server has its API; a path that is there is kept.
    """
    parts = urllib.parse.urlsplit(parse_address(value))
    if not parts.netloc:
        return ""
    path = re.sub(r"(/chat/completions|/messages|/completions|/responses)?/*$", "", parts.path)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path or "/v1", parts.query, ""))


class Setting(NamedTuple):
    """A row: env is the name in the environment and .env; flags: on the command line; claude: the key under "env"
    in ~/.claude/settings.json; secret: never shown; const: the value that a flag without one sets.
    """

    env: str
    default: str
    help: str
    parse: object = parse_text
    flags: tuple = ()
    claude: str = ""
    secret: bool = False
    const: str = ""

    @property
    def name(self):
        return self.env.lower()


SETTINGS = (
    Setting(
        "TARGET_API_KEY",
        "",
        "the provider's key (not needed for a server on this machine)",
        flags=("-k", "--api-key"),
        secret=True,
    ),
    Setting(
        "TARGET_API_BASE",
        "https://api.openai.com/v1",
        "the provider's base URL",
        parse_base_url,
        ("-b", "--api-base"),
    ),
    Setting("TARGET_MODEL", "gpt-4o", "the provider's model", flags=("-m", "--model")),
    Setting(
        "TARGET_TIMEOUT",
        "300",
        "seconds without a byte from the provider before giving up",
        parse_seconds,
    ),
    Setting(
        "TARGET_RETRIES",
        "2",
        "tries again, before the first content, after connection failures and 408, 429 and 5xx",
        parse_count,
    ),
    Setting(
        "TARGET_FORMAT",
        "auto",
        "what the provider speaks: auto, openai or anthropic",
        parse_choice("auto", "openai", "anthropic"),
    ),
    Setting("TARGET_MODEL_OPUS", "", "model for Claude's opus family"),
    Setting("TARGET_API_BASE_OPUS", "", "base URL for the opus family", parse_base_url),
    Setting("TARGET_API_KEY_OPUS", "", "key for the opus family", secret=True),
    Setting("TARGET_MODEL_SONNET", "", "model for Claude's sonnet family"),
    Setting("TARGET_API_BASE_SONNET", "", "base URL for the sonnet family", parse_base_url),
    Setting("TARGET_API_KEY_SONNET", "", "key for the sonnet family", secret=True),
    Setting("TARGET_MODEL_HAIKU", "", "model for Claude's haiku family"),
    Setting("TARGET_API_BASE_HAIKU", "", "base URL for the haiku family", parse_base_url),
    Setting("TARGET_API_KEY_HAIKU", "", "key for the haiku family", secret=True),
    Setting(
        "TARGET_MODEL_FALLBACK",
        "",
        "model that takes over when the main one is down or out of quota",
    ),
    Setting("TARGET_API_BASE_FALLBACK", "", "base URL of the fallback model", parse_base_url),
    Setting("TARGET_API_KEY_FALLBACK", "", "key of the fallback model", secret=True),
    Setting(
        "TARGET_MODEL_IMAGE", "", "model for requests with images, where the main one takes none"
    ),
    Setting("TARGET_API_BASE_IMAGE", "", "base URL of the image model", parse_base_url),
    Setting("TARGET_API_KEY_IMAGE", "", "key of the image model", secret=True),
    Setting(
        "PROFILE",
        "",
        "force a provider row by name (see the provider table); empty: found by host and model",
    ),
    Setting(
        "EXTRA_BODY",
        "",
        "JSON object: fields to add to each request; null removes one",
        parse_json_object,
    ),
    Setting(
        "EXTRA_HEADERS",
        "",
        "JSON object: headers to add to each request; null removes one",
        parse_json_object,
        secret=True,
    ),
    Setting(
        "MAX_OUTPUT", "0", "the model's output limit in tokens; 0: as known or learned", parse_count
    ),
    Setting(
        "MAX_CONTEXT",
        "0",
        "the model's context window in tokens; 0: as known or learned",
        parse_count,
    ),
    Setting(
        "DISGUISE_MODEL",
        "",
        "the model name shown to Claude Code; empty: the one it asked for",
        claude="ANTHROPIC_MODEL",
    ),
    Setting(
        "DISGUISE_API_BASE",
        "https://api.anthropic.com",
        "the ANTHROPIC_BASE_URL value attached to requests",
        parse_address,
        claude="ANTHROPIC_BASE_URL",
    ),
    Setting(
        "ATTACH_FIELDS",
        "auto",
        "attach the two disguise fields to requests: auto (where unknown fields are tolerated), always, never",
        parse_choice("auto", "always", "never"),
    ),
    Setting(
        "PROXY_HOST",
        "127.0.0.1",
        "address to listen on; 0.0.0.0 opens it to the network",
        flags=("-H", "--host"),
    ),
    Setting(
        "PROXY_PORT", "8080", "port to listen on; 0 takes a free one", parse_port, ("-p", "--port")
    ),
    Setting(
        "ANTHROPIC_API_KEY",
        "",
        "the proxy's own key, which clients must send; empty: no check",
        secret=True,
    ),
    Setting(
        "ALLOWED_HOSTS",
        "",
        "further Host names to answer to when there is no proxy key, for containers",
        parse_names,
    ),
    Setting(
        "SEARCH_URL", "", "SearXNG-style JSON endpoint for Claude Code's web search", parse_address
    ),
    Setting(
        "CACHE_ENABLED",
        "false",
        "store replies and answer repeated requests from the store",
        parse_flag,
        ("--cache",),
        const="true",
    ),
    Setting("CACHE_DIR", ".cache", "folder of the cache, the lessons and the ledger"),
    Setting(
        "CACHE_KEY_MODE",
        "prefix",
        "what counts as the same request: prefix, full or none",
        parse_choice("prefix", "full", "none"),
    ),
    Setting("CACHE_TTL", "3600", "seconds for which a stored reply is good", parse_seconds),
    Setting(
        "CACHE_MAX_MB", "256", "size of the store; the least recently used go first", parse_count
    ),
    Setting("LEDGER", "false", "keep the request ledger in the cache folder", parse_flag),
    Setting(
        "PRICES",
        "",
        "JSON, or a file of it: model -> {input, output, cache_read} per million tokens",
    ),
    Setting(
        "LOG_LEVEL",
        "info",
        "debug, info, warning or error",
        parse_choice("debug", "info", "warning", "error"),
        ("--log-level",),
    ),
    Setting(
        "LOG_FILE",
        "",
        "write the log there too; a new file is begun at 10 MB",
        flags=("--log-file",),
    ),
    Setting(
        "RECORD_DIR",
        "",
        "write each exchange there as one JSON file, keys hidden",
        flags=("--record",),
    ),
    Setting(
        "CA_BUNDLE",
        "",
        "file of further certificate authorities (PEM); SSL_CERT_FILE works too",
        flags=("--ca-bundle",),
    ),
    Setting("CLIENT_CERT", "", "client certificate: cert.pem, or cert.pem,key.pem"),
    Setting(
        "INSECURE",
        "false",
        "do not verify TLS certificates: anyone on the way can read the key",
        parse_flag,
        ("--insecure",),
        const="true",
    ),
)
BY_ENV = {row.env: row for row in SETTINGS}


class Settings(object):
    """Values of all settings as attributes (lower-case names), and where each came from in `origins`.

    layers: [(origin, {ENV_NAME: text})], most important first. Raises SettingError. An empty text in the
    environment or .env counts as not set, so that `TARGET_API_KEY=` in a template means the default.
    """

    def __init__(self, layers=()):
        self.origins = {}
        for row in SETTINGS:
            origin, value = next(
                ((origin, values[row.env]) for origin, values in layers if values.get(row.env)),
                ("default", row.default),
            )
            try:
                setattr(self, row.name, row.parse(value))
            except ValueError as e:
                shown = "" if row.secret else " is %r" % without_password(value)[:100]
                raise SettingError("%s%s (from %s); allowed: %s" % (row.env, shown, origin, e))
            self.origins[row.name] = origin

    def secrets(self):
        """All secret values that are set: what must never be shown."""
        found = [getattr(self, row.name) for row in SETTINGS if row.secret]
        found += [
            part
            for extra in found
            if isinstance(extra, dict)
            for value in extra.values()
            for part in (value, str(value).split(" ")[-1])
        ]
        return sorted(
            {str(value) for value in found if value and not isinstance(value, dict)},
            key=len,
            reverse=True,
        )

    def shown(self):
        """[{name, value, origin, help}] for the status page and `check`; secrets only as set or not set."""
        rows = []
        for row in SETTINGS:
            value = getattr(self, row.name)
            if row.secret:
                value = "set" if value else "not set"
            elif isinstance(value, (dict, tuple, bool)):
                value = compact_json(value) if value or value is False else ""
            elif isinstance(value, float):
                value = "%g" % value
            rows.append(
                {
                    "name": row.env,
                    "value": without_password(str(value)),
                    "origin": self.origins[row.name],
                    "help": row.help,
                }
            )
        return rows


def without_password(url):
    """A URL (or any text) without the user and password that an address may carry."""
    # A password may hold @ and /, as people write it; and the // may be missing its colon.
    user = r"(\w+://)(?:[^\s/?#@:]*:(?!\d+/)[^\s?#]*|[^\s/?#@]+)@|\b[^\s/:@]{1,99}:[^\s/:@]{1,99}@"
    return re.sub(user, lambda found: found.group(1) or "", url)


def dotenv(source):
    """{name: value} of a .env file's text, read as people write it: export, quotes, comments, CRLF, BOM, spaces.

    Double quotes know \\n, \\", \\\\; single quotes are literal; a bare value ends at " #". Lines without "=" are skipped.
    """
    found = {}
    for line in source.lstrip("\ufeff").splitlines():
        match = re.match(r"\s*(?:export\s+|set\s+)?([A-Za-z_][\w.]*)\s*=\s*(.*?)\s*$", line)
        if not match:
            continue
        name, value = match.groups()
        quoted = re.match(r"\"((?:[^\"\\]|\\.)*)\"|'([^']*)'", value)
        if quoted and quoted.group(1) is not None:
            value = re.sub(
                r"\\(.)",
                lambda m: {"n": "\n", "t": "\t"}.get(
                    m.group(1), m.group(1) if m.group(1) in "\"\\$" else m.group(0)
                ),
                quoted.group(1),
            )
        elif quoted:
            value = quoted.group(2)
        else:
            value = re.sub(r"(^|\s)#.*$", "", value).rstrip()
        found[name] = value
    return found


def claude_layer(source):
    """The settings that ~/.claude/settings.json gives (its text), by our names; a file that is no JSON gives none."""
    env = as_dict(as_dict(json_or_none(source)).get("env"))
    return {
        row.env: env[row.claude]
        for row in SETTINGS
        if row.claude and isinstance(env.get(row.claude), str)
    }


def settings_table():
    """The README's table of settings, in Markdown."""
    lines = ["| setting | flag | default | meaning |", "| --- | --- | --- | --- |"]
    for row in SETTINGS:
        flags = " ".join("`%s`" % name for name in row.flags)
        lines.append(
            "| `%s` | %s | %s | %s |"
            % (row.env, flags, "`%s`" % row.default if row.default else "", row.help)
        )
    return "\n".join(lines)


def env_template(values=()):
    """A commented .env with every setting; values: {ENV_NAME: text} are filled in, the rest are commented out."""
    values, lines = dict(values), ["# ccfix settings; an empty value means the default", ""]
    for row in SETTINGS:
        lines += ["# " + row.help[0].upper() + row.help[1:]]
        if row.env in values:
            lines += ["%s=%s" % (row.env, quote_value(values[row.env]))]
        else:
            lines += ["#%s=%s" % (row.env, row.default)]
    return "\n".join(lines) + "\n"


def quote_value(value):
    """value as .env text that `dotenv` reads back the same."""
    if re.match(r"[\w@%+=:,./-]*$", value):
        return value
    return '"%s"' % value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# ======================================================================================================
# 4  Providers: one row a provider, showing only how it differs from the default
# ======================================================================================================


class Profile(NamedTuple):
    """How to talk to a provider. A converter asks `profile.x`, never who the provider is; a lesson replaces fields."""

    name: str = "default"
    title: str = "any other"
    hosts: tuple = ()  # ends of host names; ":11434" is a port on this machine
    models: str = ""  # pattern of model names; empty: all
    format: str = "openai"  # what it speaks: openai or anthropic
    strict: bool = False  # rejects unknown fields: nothing is attached
    max_tokens: str = "max_tokens"  # name of the output limit
    max_output: int = 0  # output limit in tokens; 0: not known
    context: int = 0  # context window in tokens; 0: not known
    density: float = 0.34  # most tokens that a byte of the client's request was seen to make
    never: tuple = ()  # fields that are never sent
    body: tuple = ()  # (field, value) sent with every request
    headers: tuple = ()  # (name, value) sent with every request
    key_header: str = "authorization"  # header of the key; authorization means "Bearer KEY"
    usage_option: bool = True  # wants stream_options.include_usage
    always_stream: bool = False  # asked as a stream even when the client wants none
    tool_choice: tuple = ("none", "required", "named")  # forms it takes besides auto
    parallel: bool = True  # knows parallel_tool_calls
    max_tools: int = 0
    tool_ids: str = (
        "short"  # short: at most 40 characters; nine: 9 letters and digits; kimi: functions.NAME:N
    )
    schema: tuple = ()  # JSON schema keywords that it rejects
    typed_schema: bool = False  # every property needs a type
    images: bool = True
    image_urls: bool = True  # fetches http(s) images itself
    files: bool = False  # takes PDF as a file part
    json_format: str = ""  # response_format it takes: json_schema, json_object or none
    system_role: bool = True  # takes a system message
    user_after_tool: bool = True  # takes a user message right after a tool message
    reasoning_field: str = ""  # field in which earlier reasoning goes back; empty: it must not
    reasoning_always: bool = False  # in every assistant turn, not only in those with tool calls
    placeholder: str = ""  # sent in place of reasoning that was not kept; empty: nothing
    reasoning: str = ""  # how thinking is asked for: a row of REASONING; empty: not at all
    efforts: tuple = ()  # effort words it takes, weakest first
    effort_with_tools: str = ""  # the only effort that it takes beside tools
    betas: tuple = ()  # anthropic-beta flags that are not passed on (Anthropic's form only)
    scope: str = ""  # whose reasoning state this is (set by profile_for): host of the base URL
    source: str = ""
    tried: bool = False  # on a real server


DEFAULT = Profile()
NO_SAMPLING = ("temperature", "top_p", "stop")
OPENAI = DEFAULT._replace(
    hosts=("api.openai.com",), strict=True, files=True, max_tools=128, json_format="json_schema"
)
OPENAI_REASONING = OPENAI._replace(
    max_tokens="max_completion_tokens",
    never=NO_SAMPLING,
    reasoning="effort",
    efforts=("low", "medium", "high"),
)
AZURE = dict(
    hosts=("openai.azure.com", "cognitiveservices.azure.com"),
    key_header="api-key",
    files=False,
    source="openai-python issue 1354",
)
KIMI_HOSTS = ("api.moonshot.ai", "api.moonshot.cn", "api.kimi.com")
LOCAL = DEFAULT._replace(json_format="json_schema", image_urls=False)
NOT_KEPT = "(the reasoning of this step was not kept)"
GEMINI_SKIP = "skip_thought_signature_validator"  # Google's own word for "there is none"

PROFILES = (
    # Order matters within a host: the first row whose model pattern fits is taken.
    OPENAI_REASONING._replace(
        name="openai-gpt5-tools",
        title="OpenAI gpt-5.4 and later",
        models=r"gpt-5\.([4-9]|\d\d)|gpt-[6-9]",
        efforts=("none", "low", "medium", "high", "xhigh"),
        effort_with_tools="none",
        source="openai-openapi issue 541, litellm PR 34569",
    ),
    OPENAI_REASONING._replace(
        name="openai-gpt5.1",
        title="OpenAI gpt-5.1 to 5.3",
        models=r"gpt-5\.[1-3]",
        efforts=("none", "low", "medium", "high"),
        source="openai-openapi openapi.json, pydantic-ai profiles/openai.py",
    ),
    OPENAI_REASONING._replace(
        name="openai-reasoning",
        title="OpenAI o-series, gpt-5",
        models=r"o\d|gpt-5",
        source="openai-openapi openapi.json, cline openai-compatible.ts",
    ),
    OPENAI._replace(
        name="openai",
        title="OpenAI, other models",
        source="openai-openapi openapi.json, langchain_dart issue 712",
    ),
    OPENAI_REASONING._replace(
        name="azure-reasoning",
        title="Azure OpenAI, o-series and gpt-5",
        models=r"o\d|gpt-5",
        **AZURE,
    ),
    OPENAI._replace(name="azure", title="Azure OpenAI", **AZURE),
    DEFAULT._replace(
        name="deepseek",
        title="DeepSeek",
        hosts=("api.deepseek.com",),
        images=False,
        json_format="json_object",
        tool_choice=("none",),
        reasoning_field="reasoning_content",
        placeholder=NOT_KEPT,
        reasoning="thinking",
        efforts=("low", "high", "max"),
        source="api-docs.deepseek.com/guides/thinking_mode",
    ),
    DEFAULT._replace(
        name="dashscope",
        title="Qwen on DashScope",
        hosts=(
            "dashscope.aliyuncs.com",
            "dashscope-intl.aliyuncs.com",
            "dashscope-us.aliyuncs.com",
        ),
        always_stream=True,
        json_format="json_object",
        reasoning="enable_thinking",
        source="langchain4j issue 3974, pydantic-ai providers/alibaba.py",
    ),
    DEFAULT._replace(
        name="kimi-k3",
        title="Kimi K3",
        hosts=KIMI_HOSTS,
        models=r"kimi-k3",
        never=("temperature", "top_p"),
        tool_choice=("none",),
        tool_ids="kimi",
        typed_schema=True,
        image_urls=False,
        reasoning_field="reasoning_content",
        reasoning_always=True,
        reasoning="effort",
        efforts=("low", "high", "max"),
        source="aihubmix guide to Kimi K3.1",
    ),
    DEFAULT._replace(
        name="kimi",
        title="Kimi (Moonshot)",
        hosts=KIMI_HOSTS,
        never=("temperature", "top_p"),
        tool_choice=("none",),
        tool_ids="kimi",
        typed_schema=True,
        image_urls=False,
        reasoning_field="reasoning_content",
        reasoning_always=True,
        reasoning="thinking",
        source="kimi-cli kosong/chat_provider/kimi.py",
    ),
    DEFAULT._replace(
        name="glm-5.3",
        title="Z.ai GLM-5.2 and later",
        hosts=("api.z.ai", "open.bigmodel.cn"),
        models=r"glm-(5\.[2-9]|[6-9])",
        body=(("tool_stream", True),),
        tool_choice=("none",),
        json_format="json_object",
        reasoning_field="reasoning_content",
        reasoning_always=True,
        reasoning="effort",
        efforts=("low", "high", "max"),
        source="pydantic-ai profiles/zai.py",
    ),
    DEFAULT._replace(
        name="zai",
        title="Z.ai GLM",
        hosts=("api.z.ai", "open.bigmodel.cn"),
        body=(("tool_stream", True),),
        tool_choice=("none",),
        json_format="json_object",
        reasoning_field="reasoning_content",
        reasoning_always=True,
        reasoning="thinking",
        source="pydantic-ai models/zai.py",
    ),
    DEFAULT._replace(
        name="minimax",
        title="MiniMax",
        hosts=("api.minimax.io", "api.minimaxi.com", "api.minimax.chat"),
        body=(("reasoning_split", True),),
        tool_choice=("none",),
        reasoning_field="reasoning_details",
        reasoning_always=True,
        reasoning="adaptive",
        source="platform.minimax.io/docs/api-reference",
    ),
    DEFAULT._replace(
        name="mistral",
        title="Mistral",
        hosts=("api.mistral.ai",),
        strict=True,
        tool_ids="nine",
        user_after_tool=False,
        usage_option=False,
        json_format="json_schema",
        source="eca issue 231, datapizza-ai issue 98, gptel issue 1203",
    ),
    DEFAULT._replace(
        name="groq-gpt-oss",
        title="Groq, gpt-oss",
        hosts=("api.groq.com",),
        models=r"openai/gpt-oss",
        strict=True,
        max_tools=128,
        max_output=65536,
        context=131072,
        images=False,
        json_format="json_schema",
        reasoning="effort",
        efforts=("low", "medium", "high"),
        source="groq-python, models.dev",
    ),
    DEFAULT._replace(
        name="groq",
        title="Groq, other models",
        hosts=("api.groq.com",),
        strict=True,
        max_tools=128,
        json_format="json_object",
        source="groq-python, llms PR 64",
    ),
    DEFAULT._replace(
        name="xai",
        title="xAI",
        hosts=("api.x.ai",),
        strict=True,
        never=("stop",),
        max_tools=200,
        json_format="json_schema",
        source="uni-api issue 105, vercel/ai xai-chat-language-model.ts",
    ),
    DEFAULT._replace(
        name="gemini",
        title="Gemini",
        hosts=("generativelanguage.googleapis.com", "aiplatform.googleapis.com"),
        strict=True,
        schema=(
            "additionalProperties",
            "const",
            "exclusiveMinimum",
            "exclusiveMaximum",
            "pattern",
            "default",
            "propertyNames",
            "patternProperties",
            "format",
            "not",
            "if",
            "then",
            "else",
            "examples",
        ),
        json_format="json_schema",
        reasoning_field="google",
        placeholder=GEMINI_SKIP,
        reasoning="effort",
        efforts=("low", "medium", "high"),
        source="zed issue 44875, opensquilla issue 225",
    ),
    DEFAULT._replace(
        name="openrouter",
        title="OpenRouter",
        hosts=("openrouter.ai",),
        files=True,
        reasoning_field="reasoning_details",
        reasoning_always=True,
        reasoning="openrouter",
        efforts=("minimal", "low", "medium", "high", "xhigh"),
        json_format="json_schema",
        headers=(("X-Title", "ccfix"),),
        source="openrouter.ai/docs/use-cases/reasoning-tokens",
    ),
    DEFAULT._replace(
        name="cerebras",
        title="Cerebras",
        hosts=("api.cerebras.ai",),
        strict=True,
        parallel=False,
        images=False,
        max_output=40960,
        context=131072,
        json_format="json_schema",
        reasoning_field="reasoning",
        source="opencode issue 6648, Empryo PR 209",
    ),
    DEFAULT._replace(
        name="nim",
        title="NVIDIA NIM",
        hosts=("integrate.api.nvidia.com",),
        strict=True,
        reasoning="kwargs",
        source="free-claude-code issue 127, CLIProxyAPI issue 4149",
    ),
    DEFAULT._replace(
        name="fireworks",
        title="Fireworks",
        hosts=("api.fireworks.ai",),
        strict=True,
        json_format="json_schema",
        reasoning="effort",
        efforts=("low", "medium", "high"),
        source="midscene issue 1322",
    ),
    DEFAULT._replace(
        name="together",
        title="Together",
        hosts=("api.together.xyz", "api.together.ai"),
        json_format="json_schema",
        source="docs.together.ai/docs/glm-5.3-quickstart",
    ),
    DEFAULT._replace(
        name="siliconflow",
        title="SiliconFlow",
        hosts=("api.siliconflow.cn", "api.siliconflow.com"),
        json_format="json_object",
        reasoning="enable_thinking",
        source="models.dev",
    ),
    DEFAULT._replace(
        name="ark",
        title="Volcengine Ark",
        hosts=("volces.com", "bytepluses.com"),
        reasoning="thinking",
        source="openclaude issue 331",
    ),
    DEFAULT._replace(
        name="mimo",
        title="Xiaomi MiMo",
        hosts=("xiaomimimo.com",),
        reasoning_field="reasoning_content",
        placeholder=NOT_KEPT,
        reasoning="thinking",
        source="cc-switch proxy/providers/claude.rs",
    ),
    DEFAULT._replace(
        name="copilot",
        title="GitHub Copilot",
        hosts=("githubcopilot.com",),
        strict=True,
        max_tools=128,
        headers=(
            ("Editor-Version", "vscode/1.104.0"),
            ("Copilot-Integration-Id", "vscode-chat"),
            ("Openai-Intent", "conversation-edits"),
            ("Copilot-Vision-Request", "true"),
        ),
        source="copilot-api api-config.ts",
    ),
    LOCAL._replace(
        name="ollama",
        title="Ollama",
        hosts=(":11434", "ollama.com"),
        tool_choice=("none",),
        reasoning_field="reasoning",
        reasoning_always=True,
        reasoning="effort",
        efforts=("none", "low", "medium", "high", "max"),
        source="ollama openai/openai.go",
    ),
    LOCAL._replace(
        name="lmstudio",
        title="LM Studio",
        hosts=(":1234",),
        source="lmstudio-ai/docs openai-compat/tools.mdx",
    ),
    LOCAL._replace(
        name="sglang",
        title="SGLang",
        hosts=(":30000",),
        reasoning="kwargs",
        source="sglang issue 20678, its error texts",
    ),
    LOCAL._replace(
        name="llamacpp",
        title="llama.cpp server",
        hosts=(":8080",),
        reasoning="kwargs",
        source="llama.cpp's server as it answered in the tests here",
        tried=True,
    ),
    LOCAL._replace(
        name="vllm",
        title="vLLM",
        hosts=(":8000",),
        reasoning="kwargs",
        source="vllm chat_completion/protocol.py",
    ),
    DEFAULT._replace(
        name="litellm",
        title="LiteLLM gateway",
        hosts=(":4000",),
        strict=True,
        source="litellm issues 32086 and 17343",
    ),
    DEFAULT._replace(name="demo", title="the embedded demo model", source="this file"),
    DEFAULT._replace(
        name="anthropic",
        title="anything that speaks Anthropic",
        format="anthropic",
        source="docs.anthropic.com/en/api/messages, llama.cpp's /v1/messages",
        tried=True,
    ),
)

# The `owned_by` of a /models answer tells a server that its address does not.
OWNERS = {
    "vllm": "vllm",
    "llamacpp": "llamacpp",
    "sglang": "sglang",
    "library": "ollama",
    "organization_owner": "lmstudio",
}
ANTHROPIC_PATHS = re.compile(
    r"/anthropic(/v1)?$|/api/(coding|compatible|plan)(/v1)?$|api\.kimi\.com/coding(/v1)?$", re.I
)
# localhost with the names under it (RFC 6761, 6.3), and what containers call the machine they run on.
LOOPBACK = re.compile(
    r"((.*\.)?localhost|127(\.\d+){3}|::1?|0\.0\.0\.0|host\.(docker|containers)\.internal)$", re.I
)


def is_loopback(base):
    """Whether a base URL is on this machine: no key is needed there, and no proxy is on the way."""
    return bool(LOOPBACK.match(urllib.parse.urlsplit(base).hostname or ""))


def profile_for(base, model, forced="", format="auto", owner=""):
    """The Profile of a base URL and model. The platform decides before the model name does.

    forced: a row's name, or a server family such as "openai" (its first fitting row); owner: `owned_by` of a
    model list. Raises SettingError for a name that no row has.
    """
    parts = urllib.parse.urlsplit(base)
    name = forced or OWNERS.get(owner, "")
    if format == "anthropic" or (format == "auto" and not forced and ANTHROPIC_PATHS.search(base)):
        name = "anthropic"
    host, port = (parts.hostname or "").lower(), parts.port
    rows = (
        [row for row in PROFILES if row.name == name]
        if name
        else [row for row in PROFILES if row.hosts and serves(row, host, port)]
    )
    if name and not rows and name != "default":
        raise SettingError(
            "PROFILE is %r; allowed: %s" % (name, ", ".join(row.name for row in PROFILES))
        )
    short = model.rsplit("/", 1)[-1]
    found = next(
        (
            row
            for row in rows
            if not row.models
            or re.match(row.models, model, re.I)
            or re.match(row.models, short, re.I)
        ),
        rows[0] if forced and rows else DEFAULT,
    )
    return found._replace(scope=host)


def serves(row, host, port):
    """Whether a row's hosts include the host, or the port on this machine."""
    return any(
        (
            (port == int(end[1:]) and LOOPBACK.match(host))
            if end[:1] == ":"
            else (host == end or host.endswith("." + end))
        )
        for end in row.hosts
    )


def profiles_table():
    """The README's table of providers, in Markdown: what differs from the default, and whether a real server was tried."""
    lines = [
        "| profile | provider | differs in | source | tried on a real server |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in PROFILES:
        if row.name == "demo":
            continue  # nobody's provider
        fields = [
            field
            for field in Profile._fields
            if getattr(row, field) != getattr(DEFAULT, field)
            and field not in ("name", "title", "hosts", "models", "source", "tried", "scope")
        ]
        lines.append(
            "| `%s` | %s | %s | %s | %s |"
            % (
                row.name,
                row.title,
                ", ".join(fields) or "nothing",
                row.source,
                "yes" if row.tried else "no",
            )
        )
    return "\n".join(lines)


def effort_fields(level, profile):
    """reasoning_effort as the provider words it."""
    word = effort_word(level, profile.efforts)
    return {"reasoning_effort": word} if word else {}


def thinking_fields(level, profile):
    """thinking: {type}, and the effort beside it unless it is off (both together are a 400 at DeepSeek)."""
    if level == "off":
        return {"thinking": {"type": "disabled"}}
    return dict(effort_fields(level, profile), thinking={"type": "enabled"})


REASONING = {
    # style: (level, profile) -> body fields. level: off, low, medium, high, xhigh, max. The rows of PROFILES name the sources.
    "effort": effort_fields,
    "thinking": thinking_fields,
    "adaptive": lambda level, profile: {
        "thinking": {"type": "disabled" if level == "off" else "adaptive"}
    },
    "enable_thinking": lambda level, profile: {"enable_thinking": level != "off"},
    "openrouter": lambda level, profile: {
        "reasoning": {"effort": "none" if level == "off" else effort_word(level, profile.efforts)}
    },
    "kwargs": lambda level, profile: {
        "chat_template_kwargs": {"enable_thinking": level != "off", "thinking": level != "off"}
    },
}
LEVELS = ("off", "none", "minimal", "low", "medium", "high", "xhigh", "max")


def effort_word(level, words):
    """The word for a level: the first that is at least as strong, else the strongest; off is "none" or nothing."""
    if level == "off" or not words:
        return "none" if "none" in words else ""
    wanted = LEVELS.index(level)
    return next(
        (word for word in words if LEVELS.index(word) >= wanted and word != "none"), words[-1]
    )


def thinking_level(body):
    """How much thinking an Anthropic request asks for: off, low ... max, or "" where it leaves it open.

    The last turn's own output_config counts before the body's; budgets by the usual steps of 4,000 and 16,000 tokens.
    """
    thinking = as_dict(body.get("thinking"))
    if thinking.get("type") == "disabled":
        return "off"
    efforts = [
        as_dict(as_dict(turn).get("output_config")).get("effort")
        for turn in as_list(body.get("messages"))
    ]
    effort = next(
        (e for e in reversed(efforts) if e in LEVELS),
        as_dict(body.get("output_config")).get("effort"),
    )
    if isinstance(effort, str) and effort in LEVELS:
        return "off" if effort == "none" else effort
    budget = thinking.get("budget_tokens")
    if thinking.get("type") == "enabled" and isinstance(budget, (int, float)):
        return "low" if budget < 4000 else "medium" if budget < 16000 else "high"
    return ""


# ======================================================================================================
# 5  Request: Anthropic body -> OpenAI body
# ======================================================================================================

NO_OUTPUT = "(no output)"
NO_RESULT = "(no result: the call was interrupted)"
BRIDGE = "I have the results of the tools."
CONTINUE = "Continue."
TOKEN_MARKER = re.compile(r"\s*<total_tokens>[^<]*</total_tokens>\s*$")
REMINDER = "<system-reminder>\n%s\n</system-reminder>"
STATE_MARK = "ccfix1."


def to_openai(body, model, profile, attach=None, recall=None, memo=None, room=0):
    """The chat-completions body for an Anthropic Messages body, a new dict; never edits body.

    attach: extra fields (the disguise), left out for strict providers by the caller; recall(tool_use_id) -> what is
    remembered of that call: {"arguments", "reasoning", "details", "google"}, any of them missing; memo: dict in which
    converted tools are kept between calls; room: output tokens that fit this time (0: not known).
    Raises BadRequest for a body that is no Messages request.
    """
    check_messages(body)
    recall = recall or (lambda call_id: {})
    tools = openai_tools(body, profile, {} if memo is None else memo)
    sent = {"model": model, "messages": openai_messages(body, profile, recall)}
    if tools:
        sent["tools"] = tools
    sent.update(choice_fields(body, profile, tools))
    sent.update(sampling_fields(body, profile, room))
    sent.update(format_fields(body, profile, sent["messages"]))
    sent.update(reasoning_fields(body, profile, tools))
    if wants_stream(body, profile):
        sent["stream"] = True
        if profile.usage_option:
            sent["stream_options"] = {"include_usage": True}
    sent.update(profile.body)
    sent.update(attach or {})
    for field in profile.never:
        sent.pop(field, None)
    return sent


def is_number(value):
    """Whether a value is a number that can be sent: 1e400 is read as infinity, which is no JSON."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12


def is_content(value):
    """Whether a value is a text, or a list of blocks."""
    return (
        isinstance(value, str)
        or isinstance(value, list)
        and all(isinstance(part, (dict, str)) for part in value)
    )


FIELD_CHECKS = (
    # field, what may stand there (nothing and null always may), in words
    ("model", lambda value: isinstance(value, str), "a text"),
    ("max_tokens", lambda value: is_number(value) and value > 0, "a number above 0"),
    ("system", is_content, "a text or a list of blocks"),
    (
        "tools",
        lambda value: isinstance(value, list) and all(isinstance(tool, dict) for tool in value),
        "a list of tools",
    ),
    ("tool_choice", lambda value: isinstance(value, dict), "an object with a type"),
    ("thinking", lambda value: isinstance(value, dict), "an object with a type"),
    ("output_config", lambda value: isinstance(value, dict), "an object"),
    ("temperature", is_number, "a number"),
    ("top_p", is_number, "a number"),
    ("stop_sequences", lambda value: isinstance(value, list), "a list of texts"),
    ("stream", lambda value: isinstance(value, bool), "true or false"),
)


def check_request(body):
    """Raises BadRequest, which names the field, for a body that is no Messages request. Unknown fields and blocks are fine."""
    for field, fits, words in FIELD_CHECKS:
        if body.get(field) is not None and not fits(body[field]):
            raise BadRequest("%s: must be %s" % (field, words))
    check_messages(body)
    for position, message in enumerate(body["messages"]):
        if not isinstance(message, dict) or message.get("role") not in (
            "user",
            "assistant",
            "system",
            "developer",
        ):
            raise BadRequest("messages.%d.role: must be user, assistant or system" % position)
        if not is_content(message.get("content")):
            raise BadRequest("messages.%d.content: must be a text or a list of blocks" % position)


def check_messages(body):
    """Raises BadRequest for a body without messages."""
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise BadRequest("messages: a list with at least one message is required")


def wants_stream(body, profile):
    """Whether the provider is asked for a stream."""
    return body.get("stream") is True or profile.always_stream


def as_blocks(content):
    """Message content of any shape as a list of block dicts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if isinstance(content, dict):
        return [content]
    return [
        {"type": "text", "text": part} if isinstance(part, str) else part
        for part in as_list(content)
        if isinstance(part, (dict, str))
    ]


def block_text(block):
    """A block's `text` as text, whatever the client put there."""
    value = block.get("text")
    return value if isinstance(value, str) else "" if value is None else str(value)


# ---- system text, and who says what ------------------------------------------------------------------


def system_text(system):
    """The system prompt as one text, without the billing line: it changes, and would cost the provider's whole prefix cache."""
    texts = [block_text(block) for block in as_blocks(system)]
    texts = [re.sub(r"\A%s[^\n]*\n?" % BILLING_LINE, "", part) for part in texts]
    return "\n\n".join(part for part in texts if part.strip())


def split_turns(messages):
    """[(role, blocks)] with roles user and assistant in turn; turns that say nothing are gone, neighbours of one role joined.

    A role:system turn becomes user text where it stands: moved to the front, each new one would rewrite the prefix.
    A message that is wholly a <total_tokens> marker is dropped, as the client prunes it from the history later.
    """
    said = []
    for message in messages:
        message = as_dict(message)
        role, blocks = message.get("role"), as_blocks(message.get("content"))
        if role in ("system", "developer"):
            text = "\n\n".join(filter(None, map(block_text, blocks)))
            blocks = (
                []
                if TOKEN_MARKER.match(text) or not text.strip()
                else [{"type": "text", "text": REMINDER % text.strip()}]
            )
        role = "assistant" if role == "assistant" else "user"
        said.append((role, [block for block in blocks if is_meant(block, role)]))
    said = join_turns(said)
    return join_turns(
        (role, blocks)
        for role, blocks in said
        if role == "user" or any(block.get("type") not in THOUGHTS for block in blocks)
    )


def join_turns(pairs):
    """[(role, blocks)] without empty turns, neighbours of one role joined."""
    joined = []
    for role, blocks in pairs:
        if joined and joined[-1][0] == role:
            joined[-1][1].extend(blocks)
        elif blocks:
            joined.append((role, list(blocks)))
    return joined


THOUGHTS = ("thinking", "redacted_thinking")


def is_meant(block, role):
    """Whether a block says anything: empty text does not, nor a token marker."""
    if block.get("type") == "text":
        text = block_text(block)
        return bool(text.strip()) and not (role == "user" and TOKEN_MARKER.match(text))
    return True


def openai_messages(body, profile, recall):
    """All messages: one leading system message, then turns; tool messages directly after their calls."""
    text, said = system_text(body.get("system")), split_turns(body["messages"])
    messages = [{"role": "system", "content": text}] if text and profile.system_role else []
    if text and not profile.system_role:
        said = join_turns([("user", [{"type": "text", "text": text}])] + said)
    ids, calls, counter = {}, [], [0]
    for role, blocks in said:
        if role == "assistant":
            messages += tool_messages(calls, {}, profile)[0]
            message, calls = assistant_message(blocks, profile, recall, ids, counter)
            messages.append(message)
        else:
            messages += user_messages(blocks, calls, profile)
            calls = []
    messages += tool_messages(calls, {}, profile)[0]
    if not messages or messages[-1]["role"] in ("system", "assistant"):
        # Few providers go on with an assistant's text, several refuse it: asking in words works everywhere.
        messages.append({"role": "user", "content": CONTINUE})
    return messages


# ---- the assistant's turns ---------------------------------------------------------------------------


class Call(NamedTuple):
    """A call that waits for its result: the client's id, the id and name sent to the provider."""

    id: str
    sent_id: str
    name: str


def assistant_message(blocks, profile, recall, ids, counter):
    """(OpenAI assistant message, [Call]) of one assistant turn."""
    texts, calls, tool_calls, notes = [], [], [], []
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            texts.append(block_text(block))
        elif kind == "tool_use":
            call = Call(
                str(block.get("id") or ""),
                sent_id(block, profile, ids, counter),
                short_name(str(block.get("name") or "tool")),
            )
            known = recall(call.id)
            notes.append(known if known.get("scope") == profile.scope else {})
            calls.append(call)
            tool_calls.append(
                {
                    "id": call.sent_id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": argument_text(block.get("input"), known.get("arguments")),
                    },
                }
            )
        elif kind not in THOUGHTS:
            texts.append(foreign_text(block))
    message = {"role": "assistant", "content": "\n\n".join(texts)}
    if profile.reasoning_field == "reasoning_details" and not calls:
        notes.append(recall(text_key(profile.scope, "".join(texts))))
    if profile.reasoning_field and (tool_calls or profile.reasoning_always):
        message.update(replayed(blocks, profile, notes, calls, tool_calls))
    if tool_calls:
        message["tool_calls"] = tool_calls
    return message, calls


def text_key(scope, text):
    """Under which name the reasoning of a turn without calls is remembered."""
    return (
        "text" + hashlib.sha1((scope + "\n" + text.strip()).encode("utf-8", "replace")).hexdigest()
    )


def sent_id(block, profile, ids, counter):
    """The tool-call id for the provider, made of the client's id alone (or, for Kimi, of name and position)."""
    given = str(block.get("id") or "call_%d" % counter[0])
    if (
        profile.tool_ids == "kimi"
    ):  # its chat template expects functions.NAME:N, counted through the conversation
        ids[given] = "functions.%s:%d" % (short_name(str(block.get("name"))), counter[0])
    elif profile.tool_ids == "nine" and not re.match(r"[A-Za-z0-9]{9}$", given):
        ids[given] = hashlib.sha1(given.encode("utf-8", "replace")).hexdigest()[:9]
    elif len(given) > 40 or not re.match(r"[A-Za-z0-9_.:-]+$", given):
        ids[given] = "call_" + hashlib.sha1(given.encode("utf-8", "replace")).hexdigest()[:24]
    counter[0] += 1
    return ids.get(given, given)


def short_name(name):
    """A tool name that OpenAI's API takes ([A-Za-z0-9_-]{1,64}): MCP names may be longer; the end is a hash of all."""
    if re.match(r"[A-Za-z0-9_-]{1,64}$", name):
        return name
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    return clean[:55] + "_" + hashlib.sha1(name.encode("utf-8", "replace")).hexdigest()[:8]


def argument_text(value, original):
    """Arguments as JSON text: the model's own bytes where they are remembered and still say the same.

    The client echoes a call with defaults added and keys in another order, which would break the provider's prefix
    cache. What the client could not parse comes back as {"__unparsedToolInput": {"raw"}} and is turned back.
    """
    value = as_dict(value)
    raw = as_dict(value.get("__unparsedToolInput")).get("raw")
    if isinstance(raw, str):
        return raw if json_or_none(raw) is not None else compact_json({"unparsed": raw})
    if isinstance(original, str):
        known = json_or_none(original)
        if isinstance(known, dict) and all(
            key in value and (value[key] == part or str(value[key]) == str(part))
            for key, part in known.items()
            if part is not None
        ):
            return original
    return compact_json(value)


def replayed(blocks, profile, notes, calls, tool_calls):
    """The fields that bring earlier reasoning back: from the thinking blocks' signatures, else by tool-call id."""
    states = [
        state
        for state in (
            read_state(block, profile.scope) for block in blocks if block.get("type") in THOUGHTS
        )
        if state is not None
    ]
    if profile.reasoning_field == "google":
        known = {
            key: value for state in states for key, value in as_dict(state.get("google")).items()
        }
        for position, (call, note) in enumerate(zip(calls, notes)):
            signature = (
                known.get(call.id)
                or note.get("google")
                or (profile.placeholder if position == 0 else "")
            )
            if signature:
                tool_calls[position]["extra_content"] = {"google": {"thought_signature": signature}}
        return {}
    if profile.reasoning_field == "reasoning_details":
        # What is remembered is whole; a signature holds what had come when its block was closed.
        details = next(
            (known["details"] for known in notes + states[::-1] if known.get("details")), None
        )
        return {"reasoning_details": details} if details else {}
    text = "".join(state.get("text", "") for state in states) or next(
        (note["reasoning"] for note in notes if note.get("reasoning")), ""
    )
    text = text or (profile.placeholder if tool_calls or profile.reasoning_always else "")
    return {profile.reasoning_field: text} if text else {}


def write_state(scope, state):
    """A thinking block's signature that carries state (a dict) for the provider `scope`, and nobody else."""
    packed = (
        base64.urlsafe_b64encode(zlib.compress(compact_json(state).encode(), 1)).decode()
        if state
        else ""
    )
    return STATE_MARK + base64.urlsafe_b64encode(scope.encode()).decode() + "." + packed


def read_state(block, scope):
    """The state in a thinking block that came from `scope`, with its text; None for any other block."""
    mark = block.get("signature") if block.get("type") == "thinking" else block.get("data")
    if not isinstance(mark, str) or not mark.startswith(write_state(scope, {})):
        return None
    state = {}
    try:
        packed = mark[len(STATE_MARK) :].split(".", 1)[1]
        if packed:
            state = as_dict(json.loads(zlib.decompress(base64.urlsafe_b64decode(packed)).decode()))
    except (ValueError, zlib.error, IndexError):
        return None
    text = block.get("thinking")
    state["text"] = text if isinstance(text, str) else ""
    return state


def foreign_text(block):
    """A block that OpenAI's API has no form for, as text the model can read."""
    kind = str(block.get("type"))
    if kind == "server_tool_use":
        return "[%s: %s]" % (block.get("name"), compact_json(as_dict(block.get("input"))))
    if kind.endswith("_tool_result"):
        found = [
            "%s - %s" % (hit.get("title"), hit.get("url"))
            for hit in as_list(block.get("content"))
            if isinstance(hit, dict)
        ]
        return "\n".join(["[%s]" % kind] + found)
    return block_text(block) or "[a block of kind %s, which this model cannot be shown]" % kind[:60]


# ---- the user's turns and tool results ---------------------------------------------------------------


def user_messages(blocks, calls, profile):
    """Tool messages in the order of the calls, then one user message with everything else of the turn."""
    results, rest, open_ids = {}, [], {call.id for call in calls}
    for block in blocks:
        answers = str(block.get("tool_use_id") or "")
        if block.get("type") != "tool_result":
            rest += parts_of(block, profile)
        elif answers in open_ids and answers not in results:
            results[answers] = block
        else:
            rest += ["[result of an earlier tool call]"] + result_parts(block, profile)
    messages, pictures = tool_messages(calls, results, profile)
    rest = pictures + rest
    if rest:
        if messages and not profile.user_after_tool:
            messages.append({"role": "assistant", "content": BRIDGE})
        messages.append({"role": "user", "content": join_parts(rest)})
    return messages


def tool_messages(calls, results, profile):
    """([tool message], [parts that tool messages cannot hold]); a call without a result gets a note instead."""
    messages, pictures = [], []
    for call in calls:
        block = results.get(call.id)
        parts = [NO_RESULT] if block is None else result_parts(block, profile)
        shown = [part for part in parts if isinstance(part, str)]
        images = [part for part in parts if not isinstance(part, str)]
        if images:
            pictures += ["[from the result of %s:]" % call.name] + images
            shown = shown or ["(see the next message)"]
        messages.append(
            {"role": "tool", "tool_call_id": call.sent_id, "content": "\n".join(shown) or NO_OUTPUT}
        )
    return messages, pictures


def result_parts(block, profile):
    """The parts of a tool_result; an error says so, and tool_reference blocks name the tools that were loaded."""
    blocks = as_blocks(block.get("content"))
    loaded = [
        short_name(str(part.get("tool_name")))
        for part in blocks
        if part.get("type") == "tool_reference"
    ]
    parts = [
        part
        for inner in blocks
        if inner.get("type") != "tool_reference"
        for part in parts_of(inner, profile)
        if part != ""
    ]
    if loaded:
        parts.append("These tools are loaded and can be called now: " + ", ".join(loaded))
    if not any(part.strip() if isinstance(part, str) else part for part in parts):
        parts = [NO_OUTPUT]
    return ["Error:"] + parts if block.get("is_error") is True else parts


def parts_of(block, profile):
    """A block as a list of parts: text as str, an image or file as OpenAI's part dict."""
    kind = block.get("type")
    if kind == "text":
        return [block_text(block)]
    if kind == "image":
        return [image_part(as_dict(block.get("source")), profile)]
    if kind == "document":
        return document_parts(block, as_dict(block.get("source")), profile)
    if kind == "search_result":
        inner = "\n".join(block_text(part) for part in as_blocks(block.get("content")))
        return ["[search result: %s - %s]\n%s" % (block.get("title"), block.get("source"), inner)]
    return [foreign_text(block)]


def image_part(source, profile):
    """An image as an image_url part, or a note where the model takes none."""
    kind, data, url = source.get("type"), source.get("data"), source.get("url")
    if not profile.images:
        return "[an image was here; this model takes no images]"
    if kind == "base64" and isinstance(data, str):
        return {
            "type": "image_url",
            "image_url": {
                "url": "data:%s;base64,%s" % (source.get("media_type") or "image/png", data)
            },
        }
    if kind == "url" and isinstance(url, str) and profile.image_urls:
        return {"type": "image_url", "image_url": {"url": url}}
    return "[an image was here that could not be passed on%s]" % (
        ": %s" % url if kind == "url" and isinstance(url, str) else ""
    )


def document_parts(block, source, profile):
    """A document: its text; a PDF as a file part where the profile takes one, else a note that says what to do."""
    title, kind, data = (
        str(block.get("title") or "document"),
        source.get("type"),
        source.get("data"),
    )
    if kind == "text":
        return ["[document: %s]\n%s" % (title, data)]
    if kind == "content":
        return ["[document: %s]" % title] + [
            part for inner in as_blocks(source.get("content")) for part in parts_of(inner, profile)
        ]
    if kind == "base64" and isinstance(data, str) and profile.files:
        name = title if title.lower().endswith(".pdf") else title + ".pdf"
        url = "data:%s;base64,%s" % (source.get("media_type") or "application/pdf", data)
        return [{"type": "file", "file": {"filename": name, "file_data": url}}]
    where = " at %s" % source["url"] if isinstance(source.get("url"), str) else ""
    return [
        "[a PDF document (%s)%s was here; this model cannot read PDF files. Convert it to text (for example with pdftotext), or read"
        " single pages as images.]" % (title, where)
    ]


def join_parts(parts):
    """Message content of parts: one plain string unless there is an image or a file in it."""
    if all(isinstance(part, str) for part in parts):
        return "\n\n".join(part for part in parts if part) or NO_OUTPUT
    content = []
    for part in parts:
        if not isinstance(part, str):
            content.append(part)
        elif content and content[-1]["type"] == "text":
            content[-1] = {"type": "text", "text": content[-1]["text"] + "\n\n" + part}
        elif part:
            content.append({"type": "text", "text": part})
    return content


# ---- tools -------------------------------------------------------------------------------------------

PLACEHOLDER_TOOL = "DeferredToolPlaceholder"


def offered_tools(body):
    """The client's function tools in an order that only ever grows at its end: those that are always there by name,
    then the deferred ones as the conversation's tool_reference blocks name them. Server tools are not functions.
    """
    tools = {}
    for tool in as_list(body.get("tools")):
        name = as_dict(tool).get("name")
        if (
            isinstance(name, str)
            and name
            and name != PLACEHOLDER_TOOL
            and ("input_schema" in tool or tool.get("type") in (None, "custom"))
        ):
            tools[name] = tool
    fixed = sorted(name for name in tools if not tools[name].get("defer_loading"))
    if len(fixed) == len(tools):
        return [tools[name] for name in fixed]
    order = {name: position for position, name in enumerate(referenced_tools(body))}
    deferred = sorted(
        (name for name in tools if tools[name].get("defer_loading")),
        key=lambda name: (order.get(name, len(order)), name),
    )
    return [tools[name] for name in fixed + deferred]


def referenced_tools(body):
    """Names in tool_reference blocks, in order of first appearance."""
    names = {}
    for message in as_list(body.get("messages")):
        for block in as_list(as_dict(message).get("content")):
            if isinstance(block, dict) and block.get("type") == "tool_result":
                for part in as_list(block.get("content")):
                    if isinstance(part, dict) and part.get("type") == "tool_reference":
                        names.setdefault(str(part.get("tool_name")))
    return list(names)


def openai_tools(body, profile, memo):
    """OpenAI's tools for the client's, at most as many as the provider takes (those at the end are the rarest)."""
    tools = offered_tools(body)
    return [openai_tool(tool, profile, memo) for tool in tools[: profile.max_tools or len(tools)]]


def openai_tool(tool, profile, memo):
    """One tool, converted; memo keeps (tool, rules, converted), as cleaning the same schemas again costs more than comparing."""
    rules = (profile.schema, profile.typed_schema)
    known = memo.get(tool["name"])
    if known and known[1] == rules and known[0] == tool:
        return known[2]
    schema = clean_schema(as_dict(tool.get("input_schema")), profile, {None: [MAX_REFS]}, 0)
    schema["type"] = "object"
    schema["properties"] = as_dict(schema.get("properties"))
    function = {
        "name": short_name(tool["name"]),
        "description": str(tool.get("description") or ""),
        "parameters": schema,
    }
    if len(memo) > 2000:
        memo.clear()
    memo[tool["name"]] = (tool, rules, {"type": "function", "function": function})
    return {
        "type": "function",
        "function": function,
    }  # not memo's: another thread may have put its own there


MAX_REFS = 200


def ref_name(schema):
    """The last part of a schema's $ref."""
    return schema["$ref"].rsplit("/", 1)[-1]


def resolve_ref(schema, defs):
    """What a schema's $ref names, with what stands beside the $ref; any object where it names nothing known (or itself)."""
    defs[None][0] -= 1
    found = as_dict(defs.get(ref_name(schema))) if defs[None][0] >= 0 else {}
    beside = {key: value for key, value in schema.items() if key != "$ref"}
    return dict(found or {"type": "object"}, **beside)


def clean_schema(schema, profile, defs, depth):
    """A JSON schema that all providers take: $schema and format:uri gone, $ref replaced by what it names, type lists split.

    defs: what a $ref may name; under None, [how many more may be replaced]: schemas that name each other grow without end.
    """
    for key in ("$defs", "definitions"):
        if key in schema:
            defs = dict(defs, **as_dict(schema[key]))
    if isinstance(schema.get("$ref"), str):
        return clean_schema(
            resolve_ref(schema, defs),
            profile,
            {name: part for name, part in defs.items() if name != ref_name(schema)},
            depth + 1,
        )
    clean = {}
    for key, value in schema.items():
        if key in ("$schema", "$defs", "definitions", "$id", "$comment") or (
            key == "format" and value == "uri"
        ):
            continue
        if key in profile.schema:
            if key == "const":
                clean["enum"] = [value]
            continue
        clean[key] = clean_part(key, value, profile, defs, depth)
    split_type(clean)
    if profile.typed_schema and depth and not {"type", "anyOf", "oneOf", "allOf"} & set(clean):
        clean["type"] = "object" if "properties" in clean else "string"
    return clean


def clean_part(key, value, profile, defs, depth):
    """The value of one schema keyword, cleaned where it holds schemas itself."""
    if depth > 40:
        return {} if isinstance(value, dict) else value
    if key in ("properties", "patternProperties") and isinstance(value, dict):
        return {
            name: clean_schema(part, profile, defs, depth + 1) if isinstance(part, dict) else part
            for name, part in value.items()
        }
    if key in ("items", "additionalProperties", "not", "propertyNames", "contains") and isinstance(
        value, dict
    ):
        return clean_schema(value, profile, defs, depth + 1)
    if key in ("anyOf", "oneOf", "allOf", "prefixItems", "items") and isinstance(value, list):
        return [
            clean_schema(part, profile, defs, depth + 1) if isinstance(part, dict) else part
            for part in value
        ]
    return value


def split_type(schema):
    """type: ["string", "null"] becomes type: "string"; several real types become anyOf."""
    if isinstance(schema.get("type"), list):
        kinds = [kind for kind in schema.pop("type") if kind != "null"]
        if len(kinds) == 1:
            schema["type"] = kinds[0]
        elif kinds and "anyOf" not in schema:
            schema["anyOf"] = [{"type": kind} for kind in kinds]


# ---- the other fields --------------------------------------------------------------------------------


def choice_fields(body, profile, tools):
    """tool_choice and parallel_tool_calls; nothing for auto, which is every provider's default."""
    choice = as_dict(body.get("tool_choice"))
    kind, fields = choice.get("type"), {}
    if not tools:
        return fields
    name = short_name(str(choice.get("name")))
    if kind == "none" and "none" in profile.tool_choice:
        fields["tool_choice"] = "none"
    elif kind == "any" and "required" in profile.tool_choice:
        fields["tool_choice"] = "required"
    elif (
        kind == "tool"
        and "named" in profile.tool_choice
        and any(tool["function"]["name"] == name for tool in tools)
    ):
        fields["tool_choice"] = {"type": "function", "function": {"name": name}}
    if choice.get("disable_parallel_tool_use") is True and profile.parallel:
        fields["parallel_tool_calls"] = False
    return fields


def sampling_fields(body, profile, room):
    """The output limit (clamped to what is known), temperature, top_p and at most four stop texts."""
    fields = {}
    wanted = body.get("max_tokens")
    if is_number(wanted):
        fields[profile.max_tokens] = min(
            [max(1, int(wanted))] + [limit for limit in (profile.max_output, room) if limit > 0]
        )
    for name in ("temperature", "top_p"):
        if is_number(body.get(name)):
            fields[name] = body[name]
    stops = [stop for stop in as_list(body.get("stop_sequences")) if isinstance(stop, str) and stop]
    if stops:
        fields["stop"] = stops[:4]  # OpenAI and vLLM take no more
    return fields


def format_fields(body, profile, messages):
    """response_format for output_config.format; where the profile has none, the wish is put in words instead."""
    wanted = as_dict(as_dict(body.get("output_config")).get("format") or body.get("output_format"))
    schema = wanted.get("schema")
    if wanted.get("type") != "json_schema" or not isinstance(schema, dict):
        return {}
    clean = clean_schema(schema, profile, {None: [MAX_REFS]}, 0)
    if profile.json_format == "json_schema":
        return {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "reply", "schema": clean},
            }
        }
    wish = (
        "Reply with one JSON object that fits this JSON schema, and nothing else:\n"
        + compact_json(clean)
    )
    if isinstance(messages[-1]["content"], str):
        messages[-1]["content"] += "\n\n" + wish
    else:
        messages[-1]["content"].append({"type": "text", "text": wish})
    return {"response_format": {"type": "json_object"}} if profile.json_format else {}


def reasoning_fields(body, profile, tools):
    """The fields that ask for thinking, in the provider's words; nothing where the request leaves it open."""
    if tools and profile.effort_with_tools:
        return {"reasoning_effort": profile.effort_with_tools}
    level = thinking_level(body)
    return REASONING[profile.reasoning](level, profile) if level and profile.reasoning else {}


def estimate_tokens(body):
    """About how many input tokens a request has: 4 ASCII characters a token, 1.5 others, 1,500 an image."""
    total, stack = 0, [body.get("system"), body.get("messages"), body.get("tools")]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            wide = len(value.encode("utf-8", "replace")) - len(value) if not is_ascii(value) else 0
            total += (len(value) - wide // 2) // 4 + wide // 3 + 1
        elif isinstance(value, dict):
            if (
                value.get("type") in ("image", "document")
                and isinstance(value.get("source"), dict)
                and value["source"].get("type") != "text"
            ):
                total += 1500
            else:
                stack.extend(value.values())
                total += len(value)
        elif isinstance(value, list):
            stack.extend(value)
        elif value is not None:
            total += 1
    return total


def is_ascii(value):
    """Whether a text is ASCII (str.isascii is new in 3.7)."""
    try:
        value.encode("ascii")
    except UnicodeEncodeError:
        return False
    return True


# ======================================================================================================
# 6  Tool text: arguments mended against the tool's schema; tool calls that a model wrote as text
# ======================================================================================================

EMPTY_MEANS_ABSENT = (
    {  # GPT models fill every optional field; never put Write.content or Edit.new_string here
        ("Read", "pages"),
        ("EnterWorktree", "name"),
        ("EnterWorktree", "path"),
    }
)
ABSENT = object()  # the value of a member that is left out
ANY = "any"  # stands among a schema's types when they are not all known
OBJECTS_IN_A_ROW = 8  # read at most; each costs one parse
LONGEST_TOKEN = 4096  # of a key or number that is still coming in, before the stream gives up on it
UNREADABLE = (ValueError, RecursionError, MemoryError)


LENIENT = json.JSONDecoder(
    strict=False, **JSON_HOOKS
)  # takes unescaped newlines and tabs in strings

# ---- repair: text -> dict ----------------------------------------------------------------------------------------------

TOKEN = re.compile(
    r"""
    (?P<double> "[^"\\]*(?:\\.[^"\\]*)*" )
  | (?P<single> '[^'\\]*(?:\\.[^'\\]*)*' )
  | (?P<space>  \s+ )
  | (?P<extra>  ,(?=\s*[}\]]) )
  | (?P<open>   [\[{] )
  | (?P<close>  [\]}] )
  | (?P<same>   [:,] | [-+.0-9][-+.0-9eE]* )
  | (?P<name>   [A-Za-z_$][\w$]*(?=\s*:) )
  | (?P<word>   [A-Za-z]+ )
""",
    re.VERBOSE | re.DOTALL,
)
QUOTING = re.compile(r'\\.|"', re.DOTALL)
REQUOTED = {"\\'": "'", '"': '\\"'}
WORDS = {
    "True": "true",
    "False": "false",
    "None": "null",
    "true": "true",
    "false": "false",
    "null": "null",
}
FENCE = re.compile(r"```\w*\s*(?=\{)")
BETWEEN = re.compile(r"[\s,;]*")


def requote(body):
    """The inside of a single-quoted string, as the inside of a double-quoted one. Only \\' means something else in JSON."""
    return QUOTING.sub(lambda found: REQUOTED.get(found.group(), found.group()), body)


REWRITES = {  # kind of token -> its JSON
    "double": lambda text: '"%s"' % requote(text[1:-1]) if "\\'" in text else text,
    "single": lambda text: '"%s"' % requote(text[1:-1]),
    "space": lambda text: " ",
    "extra": lambda text: "",
    "name": lambda text: '"%s"' % text,
    "word": WORDS.__getitem__,
}


def tolerant_object(text, start):
    """(dict, end) of the object at `start`, which may use single quotes, Python words, bare keys and trailing commas.

    ValueError or KeyError when it is not one, or not whole. Reads each character once.
    """
    written, depth, at = [], 0, start
    while depth or not written:
        token = TOKEN.match(text, at)
        if not token:  # the end of the text, an open quote, or no idea
            raise ValueError("no JSON at %d" % at)
        kind, at = token.lastgroup, token.end()
        depth += (kind == "open") - (kind == "close")
        written.append(REWRITES.get(kind, str)(token.group()))
    return LENIENT.decode("".join(written)), at


def object_at(text, start):
    """(dict, end); ValueError when no whole object begins there."""
    try:
        return LENIENT.raw_decode(text, start)
    except ValueError:
        pass
    try:
        return tolerant_object(text, start)
    except KeyError as word:
        raise ValueError("%s is not JSON" % word)


def sole_object(text):
    """The object that `text` begins with. Other text after it does not count, another object must be the same again.

    An empty one beside another is a placeholder (some servers send it first). ValueError if unclear.
    """
    found, at, first = {}, 0, ""
    for _ in range(OBJECTS_IN_A_ROW):
        if first and first.startswith(
            text[at:].rstrip()
        ):  # nothing more, or the same again and cut
            return found
        if text[at : at + 1] != "{":
            return found
        value, end = object_at(text, at)
        if found and value and value != found:
            raise ValueError("several objects")
        found, first = found or value, first if found else text[at:end]
        at = BETWEEN.match(text, end).end()
    raise ValueError("too many objects")


def required_names(schema):
    """The names of the properties that a schema requires."""
    names = schema.get("required") if isinstance(schema, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def sole_string(schema):
    """The name of the one required property if that is a string, else None."""
    names = required_names(schema)
    return (
        names[0]
        if len(names) == 1 and schema_types(property_schema(schema, names[0])) == {"string"}
        else None
    )


def bare_text(text, schema):
    """{the sole string: text} for text that is no attempt at JSON, e.g. `ls -la` for Bash; ValueError otherwise."""
    name = sole_string(schema)
    attempt = re.match(
        r"""[^\w/.~$-]|true$|false$|[^{]*"\s*:|%s["']?\s*[:=]""" % re.escape(name or ""), text, re.I
    )
    if name is None or attempt or text.endswith(("}", "]")):
        raise ValueError("not arguments")
    return {name: text}


def read_arguments(text, schema):
    """repair_arguments, raising ValueError, RecursionError or MemoryError where that returns None."""
    text = text.strip("\ufeff \t\r\n\f\v\0")
    if text in ("", "null", "None"):
        return {}
    fence = FENCE.match(text)
    if fence or text.startswith("{"):
        return sole_object(text[fence.end() :] if fence else text)
    if not text.startswith('"'):
        return bare_text(text, schema)
    inner = LENIENT.decode(text)
    if not inner.strip():
        return {}
    if inner.lstrip().startswith(
        ("{", '"{', '"\\"')
    ):  # encoded once more; each level halves the text
        return read_arguments(inner, schema)
    name = sole_string(schema)
    if name is None:
        raise ValueError("a string, not arguments")
    return {name: inner}


def fix_arguments(text, schema):
    """The arguments that `text` certainly means, as a dict, or None. Never raises; time grows with the length only.

    Mended: nothing at all, null; an object encoded as a string, fenced, written twice, or with something after it; trailing
    commas, single quotes, Python words, bare keys, unescaped newlines; a bare string for the one required (string)
    property. Never: text that was cut off, or two different objects.
    """
    if text is None or isinstance(text, dict):  # some servers send the object itself
        return text or {}
    try:
        return read_arguments(text, schema) if isinstance(text, str) else None
    except UNREADABLE:
        return None


# ---- coercion: dict -> dict that fits the schema -----------------------------------------------------------------------

TYPE_NAMES = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}
INTEGER = re.compile(r"0|-?[1-9][0-9]{0,14}")  # 15 digits are exact in a double
DECIMAL = re.compile(r"(?=.{1,16}$)-?(?:0|[1-9][0-9]*)\.[0-9]+")
BOOLEANS = {"true": True, "false": False, "True": True, "False": False}


def property_schema(schema, key):
    """The schema of one property as a dict, or None when it has none that can be read."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    found = properties.get(key) if isinstance(properties, dict) else None
    return found if isinstance(found, dict) else None


def declared_types(schema):
    """The names under `type`, as a set; {ANY} when there are none."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    names = {name for name in (kind if isinstance(kind, list) else [kind]) if isinstance(name, str)}
    return names or {ANY}


def schema_types(schema):
    """The type names a schema allows, as a set; with ANY in it when there may be others. Looks one level into anyOf."""
    types = declared_types(schema)
    if not isinstance(schema, dict):
        return types
    branches = schema.get("anyOf") or schema.get("oneOf")
    if types == {ANY} and isinstance(branches, list):
        types = set().union(*map(declared_types, branches))
    choices = schema.get("enum")
    if (
        schema.get("nullable") is True
        or ANY in types
        and isinstance(choices, list)
        and None in choices
    ):
        types = types | {"null"}
    return types


def as_integer(value):
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return int(value) if isinstance(value, str) and INTEGER.fullmatch(value) else value


def as_number(value):
    if isinstance(value, str) and DECIMAL.fullmatch(value):
        return float(value)
    return as_integer(value) if isinstance(value, str) else value


def as_boolean(value):
    return BOOLEANS.get(value, value) if isinstance(value, str) else value


def as_string(value):
    """Integers and booleans only: 1.10 has already become 1.1, and a version number would be another one."""
    return json.dumps(value) if isinstance(value, int) else value


def as_parsed(kind):
    def parsed(value):
        try:
            found = LENIENT.decode(value) if isinstance(value, str) else value
        except UNREADABLE:
            return value
        return found if isinstance(found, kind) else value

    return parsed


CASTS = {
    "integer": as_integer,
    "number": as_number,
    "boolean": as_boolean,
    "string": as_string,
    "array": as_parsed(list),
    "object": as_parsed(dict),
}


def scalar_as_declared(value, types):
    """The value in the one type that the schema allows beside null, if nothing is lost by it; else the value itself."""
    kind = TYPE_NAMES.get(type(value))
    wanted = types - {"null"}
    if kind in types or ANY in types or len(wanted) != 1 or value is None:
        return value
    (name,) = wanted
    return CASTS[name](value) if name in CASTS else value


def as_declared(value, schema):
    """scalar_as_declared, for the items of an array too. The very same object when nothing changes."""
    value = scalar_as_declared(value, schema_types(schema))
    if not isinstance(value, list) or not schema:
        return value
    types = schema_types(schema.get("items"))
    items = [scalar_as_declared(item, types) for item in value]
    return items if any(new is not old for new, old in zip(items, value)) else value


def null_means_absent(schema, key):
    """Models in strict mode write null for what they leave out; the client refuses it."""
    required = schema.get("required", []) if isinstance(schema, dict) else None
    if not isinstance(required, list) or key in required:
        return False
    properties = schema.get("properties")
    if isinstance(properties, dict) and key in properties:
        found = property_schema(schema, key)
        return found is not None and "null" not in schema_types(found)
    return schema.get("additionalProperties") is False


def coerce_member(name, key, value, schema):
    """The value that goes to the client, the very same object when nothing changes, or ABSENT."""
    if value is None and null_means_absent(schema, key):
        return ABSENT
    if value == "" and (name, key) in EMPTY_MEANS_ABSENT:
        return ABSENT
    return as_declared(value, property_schema(schema, key))


def coerce_arguments(name, arguments, schema):
    """A new dict of the arguments of tool `name` as its schema wants them, as far as that is certain and lossless."""
    pairs = [(key, coerce_member(name, key, value, schema)) for key, value in arguments.items()]
    return {key: value for key, value in pairs if value is not ABSENT}


# ---- the same, while the text comes in ---------------------------------------------------------------------------------

SPACE = re.compile(r"[ \t\r\n]*")
KEY = re.compile(r'"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"')
RUN = re.compile(r'[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*')
is_run = RUN.fullmatch
PART_OF_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
QUOTED = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
UNQUOTED = re.compile(r'[^"\[\]{}]*')
SCALAR = re.compile(r"[-+.0-9A-Za-z]*")


def write_member(name, key, text, schema):
    """The JSON of the member whose value is written `text`: that very text if it may stay, "" if the member is left out."""
    try:
        value = STRICT.decode(text)
    except ValueError:
        value, text = LENIENT.decode(text), ""
    sent = coerce_member(name, key, value, schema)
    if sent is ABSENT:
        return ""
    return text if text and sent is value else json.dumps(sent)


class ArgumentStream:
    """One call's argument text, sent on while it comes in, mended on the way.

    state    what comes next                       leads to
    START    {                                     FIRST
    FIRST    " or }                                KEY, DONE
    NEXT     , or }                                COMMA, DONE
    COMMA    " or } (a trailing comma)             KEY, DONE
    KEY      the key                               COLON
    COLON    :                                     VALUE
    VALUE    the first character of a value        STRING, QUOTED, NESTED, SCALAR
    STRING   a string that is sent as it comes     NEXT
    QUOTED   a string that is held                 NEXT, or NESTED when it stands in one
    NESTED   an array or object, held              NEXT, QUOTED
    SCALAR   a number or word, held                NEXT
    DONE     white space                           LOST
    LOST     anything; all is held until finish()
    OVER     nothing: finish() was called

    What does not fit leads to LOST. All that feed() and finish() returned, joined, is the JSON of what coerce_arguments makes
    of repair_arguments(raw): byte by byte the text that came when nothing had to change. When nothing certain can be made
    of it, it is the raw text, as far as no changed member has gone out before.

    complete: a whole object has come (after finish(): or could be made of what came).
    """

    MOVES = {
        ("START", "{"): "FIRST",
        ("FIRST", '"'): "KEY",
        ("FIRST", "}"): "DONE",
        ("NEXT", ","): "COMMA",
        ("NEXT", "}"): "DONE",
        ("COMMA", '"'): "KEY",
        ("COMMA", "}"): "DONE",
        ("COLON", ":"): "VALUE",
    }
    SPACED = {
        "START",
        "FIRST",
        "NEXT",
        "COMMA",
        "COLON",
        "VALUE",
        "DONE",
    }  # white space may come first

    def __init__(self, name, schema):
        self.name, self.schema = name, schema
        self.complete = False
        self._state = "START"
        self._pieces = []  # all that came
        self._sent = []  # all that went out
        self._out = []  # what this feed() sends
        self._begun = False  # something went out
        self._held = []  # read, not sent: since the end of the last value
        self._rest = ""  # not read: the beginning of an escape, a key or a scalar
        self._keys = set()
        self._key = ""  # of the member at hand
        self._value_at = 0  # where in _held its value begins
        self._depth = 0  # open brackets of a NESTED value

    @property
    def raw(self):
        """The whole text as it came."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def feed(self, fragment):
        """The text that may go out now, "" for nothing."""
        self._pieces.append(fragment)
        if self._state == "STRING" and not self._rest and is_run(fragment):
            self._sent.append(fragment)  # the hot path: thousands of these make a file
            return fragment
        self._read(self._rest + fragment)
        text, self._out = "".join(self._out), []
        if text:
            self._sent.append(text)
        return text

    def _read(self, text):
        at = 0
        while at < len(text):
            start, state = at, self._state
            if state in self.SPACED:
                at = SPACE.match(text, at).end()
                self._held.append(text[start:at])
            if at < len(text):
                at = self.STEPS[state](self, text, at)
            if at == start and self._state == state:  # it takes more text to go on
                break
        if len(text) - at > LONGEST_TOKEN:
            at = self._lose(text, at)
        self._rest = text[at:]

    def _emit(self, text):
        self._out.append(text)
        self._begun = True

    # Steps: each reads `text` from `at` and returns where it stopped, `at` itself when it needs more text.

    def _lose(self, text, at):
        self._held.append(text[at:])
        self._state = "LOST"
        return len(text)

    def _move(self, text, at):
        state = self.MOVES.get((self._state, text[at]))
        if state is None:
            return self._lose(text, at)
        self._state = state
        if state == "KEY":
            return at
        self._held.append(text[at])
        if state == "DONE":
            self._close()
        return at + 1

    def _close(self):
        self.complete = True
        self._held = ["".join(self._held).replace(",", "")]  # a trailing comma
        if self._begun:  # else it may be a placeholder: see sole_object
            self._emit(self._held.pop())

    def _read_key(self, text, at):
        found = KEY.match(text, at)
        if not found:
            return at
        try:
            self._key = STRICT.decode(found.group())
        except ValueError:
            return self._lose(text, at)
        if self._key in self._keys:  # the last one would count, and the first is out
            return self._lose(text, at)
        self._keys.add(self._key)
        if not self._begun:  # the members before this one were left out, and so is the comma
            self._held = ["".join(self._held).replace(",", "")]
        self._held.append(found.group())
        self._state = "COLON"
        return found.end()

    def _begin_value(self, text, at):
        self._value_at, self._depth = len(self._held), 0
        if text[at] != '"':
            self._state = "NESTED" if text[at] in "[{" else "SCALAR"
            return at
        if schema_types(property_schema(self.schema, self._key)) & {"string", ANY}:
            if at + 1 == len(text):  # an empty string may mean absent
                return at
            if text[at + 1] != '"':
                self._emit("".join(self._held) + '"')
                self._held, self._state = [], "STRING"
                return at + 1
        self._held.append('"')
        self._state = "QUOTED"
        return at + 1

    def _send_string(self, text, at):
        end = RUN.match(text, at).end()
        self._emit(text[at:end])
        if end == len(text):
            return end
        if text[end] == '"':
            self._state = "NEXT"
        if text[end] != "\\":
            self._emit(
                '"' if text[end] == '"' else json.dumps(text[end])[1:-1]
            )  # an unescaped newline or tab
            return end + 1
        if text.startswith("\\'", end):
            self._emit("'")  # as in requoted
            return end + 2
        return end if PART_OF_ESCAPE.fullmatch(text, end) else self._lose(text, end)

    def _hold_string(self, text, at):
        end = QUOTED.match(text, at).end()
        self._held.append(text[at:end])
        if text[end : end + 1] != '"':
            return end
        self._held.append('"')
        self._state = "NESTED"
        return end + 1 if self._depth else self._end_value(text, end + 1)

    def _hold_nested(self, text, at):
        end = UNQUOTED.match(text, at).end()
        self._held.append(text[at : end + 1])
        mark = text[end : end + 1]
        if mark == '"':
            self._state = "QUOTED"
        self._depth += (mark in ("[", "{")) - (mark in ("]", "}"))
        return end + len(mark) if self._depth else self._end_value(text, end + 1)

    def _hold_scalar(self, text, at):
        end = SCALAR.match(text, at).end()
        if end == len(text):
            return at
        self._held.append(text[at:end])
        return self._end_value(text, end)

    def _end_value(self, text, at):
        """Send the held member, coerced, or leave it out."""
        written = "".join(self._held[self._value_at :])
        try:
            written = write_member(self.name, self._key, written, self.schema)
        except UNREADABLE:
            return self._lose(text, at)
        if written:
            self._emit("".join(self._held[: self._value_at]) + written)
        self._held = [] if self._begun else ["{"]
        self._state = "NEXT"
        return at

    def _refuse(self, text, at):
        raise RuntimeError("feed() after finish()")

    STEPS = dict.fromkeys(("START", "FIRST", "NEXT", "COMMA", "COLON"), _move)
    STEPS.update(
        KEY=_read_key,
        VALUE=_begin_value,
        STRING=_send_string,
        QUOTED=_hold_string,
        NESTED=_hold_nested,
        SCALAR=_hold_scalar,
        DONE=_lose,
        LOST=_lose,
        OVER=_refuse,
    )

    def _missing(self, wanted, rest):
        """What makes the text that went out the object `wanted`; `rest` when nothing can."""
        if not self._begun:
            self.complete = True
            return json.dumps(wanted)
        sent = "".join(self._sent)
        have = LENIENT.decode(sent if self.complete else sent + "}")
        missing = [
            key
            for key in wanted
            if key not in have or json.dumps(have[key]) != json.dumps(wanted[key])
        ]
        if not have.keys() <= wanted.keys() or self.complete and missing:
            return rest
        if self.complete:
            return ""
        self.complete = True  # of a name that comes twice the last one counts
        return (
            "".join(", %s: %s" % (json.dumps(key), json.dumps(wanted[key])) for key in missing)
            + "}"
        )

    def finish(self, cut=False):
        """The rest of the text, once nothing more comes. cut: the model hit its token limit."""
        state, self._state = self._state, "OVER"
        if state == "OVER":
            return ""
        if state == "DONE":
            return "" if self._begun else self._held[0]
        rest = "".join(self._held) + self._rest if self._begun else self.raw
        wanted = None if cut and not self.complete else fix_arguments(self.raw, self.schema)
        if wanted is None or not self.raw:
            return rest
        try:
            return self._missing(coerce_arguments(self.name, wanted, self.schema), rest)
        except UNREADABLE:
            return rest


# ---- calls that a model wrote as plain text, because the server had no parser for its format --------------
#
# text -> tokens (white space, back-ticks, openings, prose) -> an opening that may count: held up to its closing literal
#      -> read by the family's parser -> calls; or, when that fails, the same text again, with the opening as prose

MAX_HELD = 1 << 18  # characters of one call; an opening without an end is text
MAX_LEAD_IN = (
    200  # characters after the opening by which the name, or the first bracket, must have come
)
MAX_CLOSINGS = 64  # closing literals inside one call's own values: bounds the re-reading
MAX_BLANK = 1024  # white space, or back-ticks, that wait for what follows them
STEP = 4096  # characters looked at in one go, so that no opening costs more than this again

# Where on the page we are, and where an opening counts.
START, AFTER, LINE, MIDDLE = "message start", "right after a call", "line start", "middle of a line"
ALONE, OWN_LINE, ANYWHERE = (START,), (START, AFTER, LINE), (START, AFTER, LINE, MIDDLE)


class Incomplete(ValueError):
    """The closing literal was part of a value; the call goes on."""


# ---- values


def parse_bare(value, schema):
    """A parameter that was written as bare text, as its schema (dict or None) wants it: a string stays one, to the byte."""
    types = schema_types(schema)
    if "string" in types or ANY in types and "enum" in (schema or {}):
        return value
    try:
        plain = LENIENT.decode(value.strip())
    except UNREADABLE:
        return value
    return value if ANY in types and (plain is None or isinstance(plain, str)) else plain


def strip_padding(value):
    """Without the line breaks that some families put around a value: where the first is missing, the last is the value's own."""
    if not value.startswith("\n"):
        return value
    return value[1:-1] if value.endswith("\n") and len(value) > 1 else value[1:]


def parse_object(text, schema):
    """The dict that is the JSON text, or None; for text that may have been cut off, where nothing is repaired."""
    try:
        value = LENIENT.decode(text)
    except UNREADABLE:
        return None
    return value if isinstance(value, dict) else None


def fix_object(text, schema):
    """repair_arguments, for text that came whole: Qwen sometimes forgets the last brace."""
    found = fix_arguments(text, schema)
    return fix_arguments(text + "}", schema) if found is None else found


# ---- parsers: (body, tools, loads) -> ([(name, arguments dict)], where in the body they end), or ValueError, or Incomplete


def find_tool(name, tools):
    """The offered tool that a model means by name."""
    for form in (name, re.sub(r"^functions\.", "", name)):
        if form in tools:
            return form
    raise ValueError("not an offered tool")


def json_value(body, at, stop, loads):
    """(value, end) of the JSON at `at`; broken JSON is taken up to the regex `stop` and given to loads."""
    try:
        return LENIENT.raw_decode(body, at)
    except ValueError as error:
        if "Unterminated string" in str(error):
            raise Incomplete()
    found = stop.search(body, at)
    end = found.start() if found else len(body)
    value = loads(body[at:end], {})
    if value is None:
        raise ValueError("no JSON")
    return value, end


def json_call(value, tools, loads):
    """(name, arguments) of {"name", "arguments"} in its many spellings."""
    inner = value.get("function") if isinstance(value, dict) else {}
    value = inner if isinstance(inner, dict) else value
    name = next(
        (
            value[key]
            for key in ("name", "tool_name", "function")
            if isinstance(value.get(key), str)
        ),
        "",
    )
    name = find_tool(name, tools)
    arguments = next(
        (value[key] for key in ("arguments", "parameters", "args") if key in value), {}
    )
    if isinstance(arguments, str):
        arguments = loads(arguments, tools[name]) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no object")
    return name, arguments


BODY_END = re.compile(r"\Z")


def json_calls(body, tools, loads):
    """JSON calls in a row, or lists of them."""
    calls, at = [], BETWEEN.match(body).end()
    while body.startswith(("{", "["), at):
        value, at = json_value(body, at, BODY_END, loads)
        calls += [
            json_call(one, tools, loads) for one in (value if isinstance(value, list) else [value])
        ]
        at = BETWEEN.match(body, at).end()
    return calls, at


def only_json(body, tools, loads):
    """JSON calls, and nothing behind them."""
    calls, at = json_calls(body, tools, loads)
    if at < len(body):
        raise ValueError("text behind it")
    return calls, at


def tagged_calls(start, stop, parameter=r"(?!)"):
    """A parser of calls in a row, each `start` (with a group name), then parameters (groups key, value, perhaps string) or
    a JSON object, then `stop`. The patterns are compiled when the first such call comes."""

    def calls_in(body, tools, loads):
        begins, ends = re.compile(start, re.DOTALL), re.compile(r"\s*(?:%s)" % stop, re.DOTALL)
        calls, at = [], 0
        head = begins.match(body)
        while head:
            name = find_tool(head.group("name"), tools)
            arguments, at = tagged_arguments(body, head.end(), tools[name], loads)
            end = ends.match(body, at)
            if not end:
                raise Incomplete()
            calls.append((name, arguments))
            at = end.end()
            head = begins.match(body, at) if at < len(body) else None
        return calls, at

    def tagged_arguments(body, at, schema, loads):
        if body.startswith("{", at):
            return json_value(body, at, re.compile(stop, re.DOTALL), loads)
        arguments, member = {}, re.compile(parameter, re.DOTALL)
        found = member.match(body, at)
        while found:
            groups = found.groupdict()
            key, value, verbatim = groups["key"].strip(), groups["value"], groups.get("string")
            wanted = VERBATIM.get(verbatim) or property_schema(schema, key)
            arguments[key] = parse_bare(value if verbatim else strip_padding(value), wanted)
            at = found.end()
            found = member.match(body, at)
        return arguments, at

    return calls_in


def either(*parsers):
    """The first parser that finds a call."""

    def calls_in(body, tools, loads):
        for parser in parsers:
            try:
                calls, at = parser(body, tools, loads)
            except Incomplete:
                raise
            except ValueError:
                continue
            if calls:
                return calls, at
        raise ValueError("no call")

    return calls_in


# ---- families

VERBATIM = {
    "true": {"type": "string"},
    "false": {"type": "JSON"},
}  # DeepSeek's string="..." -> the schema it stands for
DSML = r"(?:[\uff5c|]DSML[\uff5c|])?"
QWEN = tagged_calls(
    r"\s*<function=(?P<name>[^>\s]+)>\s*",
    r"</function>",
    r"\s*<parameter=(?P<key>[^>]+)>(?P<value>.*?)</parameter>(?=\s*(?:<parameter=|</function>))",
)
GLM = tagged_calls(
    r"\s*(?P<name>[\w.:-]+)\s*(?=<arg_key>|\Z)",
    r"\Z",
    r"\s*<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>(?=\s*(?:<arg_key>|\Z))",
)
INVOKE = tagged_calls(
    r'\s*<%sinvoke\s+name="(?P<name>[^"]+)"\s*>\s*' % DSML,
    r"</%sinvoke>" % DSML,
    r'\s*<%sparameter\s+name="(?P<key>[^"]+)"(?:\s+string="(?P<string>true|false)")?\s*>'
    r"(?P<value>.*?)</%sparameter>(?=\s*(?:<%sparameter\s|</%sinvoke>))" % (DSML, DSML, DSML, DSML),
)
KIMI = tagged_calls(
    r"\s*<\|tool_call_begin\|>\s*(?P<name>[^\s<]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*",
    r"<\|tool_call_end\|>",
)
DEEPSEEK = tagged_calls(
    r"\s*<\uff5ctool\u2581call\u2581begin\uff5c>(?:function<\uff5ctool\u2581sep\uff5c>)?(?P<name>[^\s<]+)"
    r"(?:<\uff5ctool\u2581sep\uff5c>)?\s*(?:```(?:json)?\s*)?",
    r"(?:```)?\s*<\uff5ctool\u2581call\u2581end\uff5c>",
)
MISTRAL = tagged_calls(
    r"\s*(?:\[TOOL_CALLS\])?(?P<name>[\w.-]+)(?:\[CALL_ID\][\w-]*)?\[ARGS\]\s*", r""
)
HARMONY = tagged_calls(r"(?P<name>[\w.-]+)[^{}]*?<\|message\|>\s*", r"\Z")

Family = collections.namedtuple("Family", "open close where head wrapped parse")
Family.__doc__ = """One way to write calls as text.

close: "" when nothing ends it but the end of the message; where: the places at which the opening counts;
head: regex that what follows the opening must match soon, or it is prose; its group, if any, is the tool's name;
wrapped: whether open and close only wrap what parse reads, or belong to it.
"""

CALL_FAMILIES = [
    Family(*row)
    for row in (
        (
            "<tool_call>",
            "</tool_call>",
            OWN_LINE,
            r"\s*(?:[{\[]|<function=|([\w.:-]+)\s*<)",
            True,
            either(json_calls, QWEN, GLM),
        ),
        ("<function=", "</function>", OWN_LINE, r"([^>\s]+)>\s*[<{]", False, QWEN),
        ("[TOOL_REQUEST]", "[END_TOOL_REQUEST]", OWN_LINE, r"\s*[{\[]", True, json_calls),
        (
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            ANYWHERE,
            r"\s*<\|tool_call_begin",
            True,
            KIMI,
        ),
        ("<|tool_call_begin|>", "<|tool_call_end|>", ANYWHERE, r"[^<>]+<", False, KIMI),
        (
            "<\uff5cDSML\uff5cfunction_calls>",
            "</\uff5cDSML\uff5cfunction_calls>",
            ANYWHERE,
            r"\s*<",
            True,
            INVOKE,
        ),
        (
            "<\uff5cDSML\uff5ctool_calls>",
            "</\uff5cDSML\uff5ctool_calls>",
            ANYWHERE,
            r"\s*<",
            True,
            INVOKE,
        ),
        (
            "<\uff5cDSML\uff5cinvoke",
            "</\uff5cDSML\uff5cinvoke>",
            ANYWHERE,
            r'\s+name="([^"]+)"',
            False,
            INVOKE,
        ),
        (
            "<\uff5ctool\u2581calls\u2581begin\uff5c>",
            "<\uff5ctool\u2581calls\u2581end\uff5c>",
            ANYWHERE,
            r"\s*<",
            True,
            DEEPSEEK,
        ),
        (
            "<\uff5ctool\u2581call\u2581begin\uff5c>",
            "<\uff5ctool\u2581call\u2581end\uff5c>",
            ANYWHERE,
            r"[^<>]+<",
            False,
            DEEPSEEK,
        ),
        (
            "<minimax:tool_call>",
            "</minimax:tool_call>",
            ANYWHERE,
            r"\s*[<{\[]",
            True,
            either(INVOKE, json_calls),
        ),
        (
            "[TOOL_CALLS]",
            "",
            ANYWHERE,
            r"\s*(?:[{\[]|([\w.-]+)\[)",
            True,
            either(json_calls, MISTRAL),
        ),
        ("<|python_tag|>", "", ANYWHERE, r"\s*[{\[]", True, json_calls),
        ("<|tool_call_start|>", "<|tool_call_end|>", ANYWHERE, r"\s*[{\[]", True, json_calls),
        ("<|START_ACTION|>", "<|END_ACTION|>", ANYWHERE, r"\s*[{\[]", True, json_calls),
        ("<|channel|>commentary to=", "<|call|>", ANYWHERE, r"([\w.-]+)[^\w.-]", True, HARMONY),
        ("<|channel|>analysis to=", "<|call|>", ANYWHERE, r"([\w.-]+)[^\w.-]", True, HARMONY),
        ("<|start|>assistant to=", "<|call|>", ANYWHERE, r"([\w.-]+)[^\w.-]", True, HARMONY),
        (
            "<|start|>assistant<|channel|>commentary to=",
            "<|call|>",
            ANYWHERE,
            r"([\w.-]+)[^\w.-]",
            True,
            HARMONY,
        ),
        (
            "{",
            "",
            ALONE,
            r'\s*"(?:name"\s*:\s*"([^"]+)"|type"\s*:\s*"function"|function"\s*:\s*\{)',
            False,
            only_json,
        ),
    )
]
OPENINGS = {family.open: family for family in CALL_FAMILIES}

# Harmony's other marks -> the kind of text behind them. They vanish; those that end a channel only once one was opened.
CHANNELS = {
    start + "<|channel|>" + name + "<|message|>": kind
    for start in ("", "<|start|>assistant")
    for name, kind in (("analysis", "thinking"), ("final", "text"), ("commentary", "text"))
}
CHANNEL_ENDS = {
    mark: "text" for mark in ("<|start|>assistant", "<|end|>", "<|return|>", "<|call|>")
}

LITERALS = sorted(list(OPENINGS) + list(CHANNELS) + list(CHANNEL_ENDS), key=len, reverse=True)
LONGEST = len(LITERALS[0])
PIECE = re.compile(
    r"(?P<blank>\s+)|(?P<ticks>`+)|(?P<literal>%s)|(?P<prose>[^\s`<\[{](?:[^\n`<\[{]*[^\s`<\[{])?|.)"
    % "|".join(map(re.escape, LITERALS))
)


class Held(object):
    """The text of a possible call while it arrives. lead: the white space before it; headed: its head has matched."""

    __slots__ = ("family", "lead", "parts", "size", "tail", "closings", "headed")

    def __init__(self, family, lead):
        self.family, self.lead, self.parts = family, lead, []
        self.size, self.tail, self.closings, self.headed = 0, "", 0, False

    def whole(self):
        self.parts = ["".join(self.parts)]
        return self.parts[0]

    def add(self, text):
        """Take more text; returns the offset behind each closing literal that it completed. Looks at no character twice."""
        close, window, start = self.family.close, self.tail + text, self.size - len(self.tail)
        self.parts.append(text)
        self.size += len(text)
        self.tail = window[1 - len(close) :] if close else ""
        return (
            [start + found.end() for found in re.finditer(re.escape(close), window)]
            if close and close in window
            else []
        )

    def plausible(self, tools):
        """Whether this can still become a call, by what follows the opening."""
        if not self.headed:
            start = len(self.family.open)
            head = re.compile(self.family.head).match(self.whole(), start, start + MAX_LEAD_IN)
            if not head:
                return self.size < start + MAX_LEAD_IN
            try:
                self.headed = not (head.re.groups and head.group(1)) or bool(
                    find_tool(head.group(1), tools)
                )
            except ValueError:
                return False
        return True

    def calls(self, end, closed, tools):
        """[(name, arguments JSON)] and where they end, of the text up to `end`; ValueError when it is no call, Incomplete
        when it may become one. Not closed: nothing is repaired, and every required argument must be there.
        """
        family, text = self.family, self.whole()[:end]
        first = len(family.open) if family.wrapped else 0
        body = text[first : end - len(family.close) if family.wrapped and closed else end]
        found, length = family.parse(body, tools, fix_object if closed else parse_object)
        if not found or family.close and body[length:].strip():
            raise ValueError("no call")
        if not closed and any(
            set(required_names(tools[name])) - set(arguments) for name, arguments in found
        ):
            raise ValueError("cut off")
        end = end if closed else first + length
        return [(name, json.dumps(arguments, allow_nan=False)) for name, arguments in found], end


class TextCalls(object):
    """Finds the tool calls in a stream of text. tools: {offered name: JSON schema}.

    feed(text) and finish() return pieces: ("text", str), ("thinking", str), ("call", (name, arguments JSON)). What is no
    call comes out as it came in; white space next to a call is dropped. A caller may keep text from feed while `held` is
    false and TRIGGER(text) finds nothing: such text stays in the middle of a line, and changes no state.
    """

    TRIGGER = staticmethod(re.compile(r"[\n<`]|\[(?:T|\Z)|\s\Z").search)

    def __init__(self, tools):
        self.tools = tools
        self.place = START  # START, AFTER, LINE or MIDDLE
        self.fences, self.inline = [], ""  # the back-ticks that opened the code we are in
        self.channel = ""  # Harmony: the kind of text that its open channel holds
        self.pending = ""  # the end of the text, while the next characters decide what it is
        self.call = None  # Held, while inside a possible call
        self.held = True

    def feed(self, text):
        return self.joined(
            piece
            for at in range(0, len(text), STEP)
            for piece in self.scan(text[at : at + STEP], False)
        )

    def finish(self):
        return self.joined(self.scan("", True))

    def joined(self, pieces):
        """The pieces, neighbours of a kind in one."""
        runs = []
        for kind, value in pieces:
            if kind == "call":
                runs.append((kind, value))
            elif runs and runs[-1][0] == kind:
                runs[-1][1].append(value)
            elif value:
                runs.append((kind, [value]))
        self.held = bool(
            self.call
            or self.pending
            or self.place != MIDDLE
            or self.inline
            or self.fences
            or self.channel
        )
        return [(kind, value if kind == "call" else "".join(value)) for kind, value in runs]

    def scan(self, text, final):
        """Prose and possible calls in turn, until the text is used up."""
        quiet = 0
        while True:
            if self.call is None:
                text = yield from self.prose(text, quiet, final)
                if self.call is None:
                    return
            held, verdict = self.call, self.verdict(text, final)
            if verdict is None:
                return
            calls, end = verdict
            self.call, whole = None, held.whole()
            if calls:
                yield from (("call", call) for call in calls)
                self.place, self.channel = AFTER, self.channel and "text"
                text, quiet = whole[end:], 0
            else:
                yield self.channel or "text", held.lead
                again = whole.rfind(
                    held.family.open, 1, end
                )  # the last opening before this end gets a try, no other:
                text, quiet = whole, again if again > 0 else end  # so the time stays linear

    def verdict(self, text, final):
        """What the held call is, with text added: None while undecided, else (calls, end); no calls: it was prose."""
        held = self.call
        ends = held.add(text)
        if not held.plausible(self.tools) or (ends or final) and not held.headed:
            return [], len(held.family.open)
        for end in ends:
            try:
                return held.calls(end, True, self.tools)
            except Incomplete:
                held.closings += 1
            except UNREADABLE:
                return [], end
            if held.closings == MAX_CLOSINGS:
                return [], end
        if held.size > MAX_HELD:
            return [], held.size
        if not final:
            return None
        try:
            return held.calls(held.size, False, self.tools)
        except UNREADABLE:
            return [], held.size

    # -- prose

    def prose(self, text, quiet, final):
        """Yield text up to an opening that counts; return the text from there on. No opening counts before `quiet`."""
        text, self.pending = self.pending + text, ""
        done = solid = at = 0  # said up to done; white space alone from solid to at
        while at < len(text):
            token = PIECE.match(text, at)
            kind, end = token.lastgroup, token.end()
            if not final and self.undecided(text, at, end):
                break
            if kind == "blank":
                self.blank(token.group())
                if self.place == AFTER:
                    done = solid = end
            elif kind == "literal" and at >= quiet and self.counts(token.group()):
                if token.group() in OPENINGS:
                    yield self.channel or "text", text[done:solid]
                    self.call = Held(OPENINGS[token.group()], text[solid:at])
                    return text[at:]
                yield self.channel or "text", text[done:at]
                self.enter(token.group())
                done = solid = end
            else:
                if kind == "ticks":
                    self.ticks(token.group(), text[end : end + 1])
                self.place, solid = MIDDLE, end
            at = end
        if final or len(text) - solid > MAX_BLANK:
            solid = len(text)
        self.pending = text[solid:]
        yield self.channel or "text", text[done:solid]

    def undecided(self, text, at, end):
        """Whether the token at the end of text may go on: back-ticks, or the beginning of a literal that would count."""
        first = text[at]
        if first == "`":
            return end == len(text) and end - at < MAX_BLANK
        if first not in "<[{" or len(text) - at >= LONGEST:
            return False
        rest = text[at:]
        return any(
            literal.startswith(rest) and literal != rest and self.counts(literal)
            for literal in LITERALS
        )

    def counts(self, literal):
        """Whether a literal means something at this place. In an open Harmony channel all of Harmony's do, in code too."""
        if (
            literal in CHANNEL_ENDS
            or self.channel
            and literal.startswith(("<|channel|>", "<|start|>"))
        ):
            return bool(self.channel)
        return (
            not self.inline
            and not self.fences
            and (literal in CHANNELS or self.place in OPENINGS[literal].where)
        )

    def enter(self, mark):
        """Go on in the channel that a Harmony mark opens."""
        self.channel = CHANNELS.get(mark) or CHANNEL_ENDS[mark]
        self.place, self.inline, self.fences = LINE, "", []

    def blank(self, space):
        """White space: a new line ends inline code, unless three or more back-ticks opened it: then it is a fence."""
        if "\n" in space:
            if len(self.inline) >= 3:
                self.fences.append(self.inline)
            self.inline = ""
            self.place = LINE if self.place == MIDDLE else self.place

    def ticks(self, run, after):
        """Back-ticks, and the character after them. In a fence, a run with a language opens one more, a bare one closes."""
        if self.inline:
            self.inline = "" if run == self.inline else self.inline
        elif not self.fences:
            self.inline = run
        elif self.place != MIDDLE and len(run) >= 3:
            if after.strip():
                self.inline = run
            elif len(run) >= len(self.fences[-1]):
                self.fences.pop()


# ======================================================================================================
# 7  Stream: SSE bytes -> chunks -> Anthropic events -> SSE bytes
# ======================================================================================================

MAX_LINE = 32 << 20  # a longer SSE line is no model's work


def sse_payloads(blocks):
    """Data strings of an SSE stream that comes in bytes, split anywhere; None after each block ("no more for now").

    Knows LF and CRLF, comments, several data lines in one event, data lines without the blank line between, a BOM,
    `event: error`, and llama.cpp's old `error: {..}` line (both come out as {"error": ..}). An event that the end of
    the stream cuts off is dropped when it is no JSON, as a browser would.
    """
    rest, data, failed = [], [], False
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if not end:
            if block:
                rest.append(block)
            if len(rest) % 64 == 63 and sum(map(len, rest)) > MAX_LINE:
                raise UpstreamError(
                    "The provider sent a line of over %d MB; that is no model's reply."
                    % (MAX_LINE >> 20),
                    kind="cut",
                )
            yield None
            continue
        lines = b"".join(rest + [block[:end]]).decode("utf-8", "replace").split("\n")
        rest = [block[end:]] if end < len(block) else []
        lines.pop()
        for line in lines:
            if line[-1:] == "\r":
                line = line[:-1]
            if line[:6] == "data: ":
                if data and is_whole_event(data[-1]):
                    yield event_payload(data, failed)
                    data = []
                data.append(line[6:])
            elif not line:
                if data:
                    yield event_payload(data, failed)
                    data, failed = [], False
            else:
                data, failed = other_line(line.lstrip("\ufeff"), data, failed)
        yield None
    last = b"".join(rest).decode("utf-8", "replace").strip()
    if last:
        data, failed = other_line(last, data, failed)
    if data and (data[-1].strip() == "[DONE]" or json_or_none("\n".join(data)) is not None):
        yield event_payload(data, failed)
        yield None


def is_whole_event(line):
    """Whether a data line is an event of its own, so that the next one needs no blank line before it."""
    return (
        line[:1] == "{" and line[-1:] == "}" and json_or_none(line) is not None or line == "[DONE]"
    )


def other_line(line, data, failed):
    """(data, failed) after a line that is neither plain data nor blank."""
    name, _, value = line.partition(":")
    if name == "data":
        return data + [value[1:] if value[:1] == " " else value], failed
    if name == "event":
        return data, value.strip() == "error"
    if name == "error":
        return data + [value.strip()], True
    return data, failed


def event_payload(data, failed):
    """An event's data string; that of a failed event is made an {"error": ..} object if it is none."""
    payload = "\n".join(data)
    if failed and "error" not in as_dict(json_or_none(payload)):
        body = json_or_none(payload)
        return compact_json({"error": body if isinstance(body, dict) else {"message": payload}})
    return payload


_decode_json = json.JSONDecoder().raw_decode


def chunk_of(payload):
    """The dict in a payload; an empty one for what is no JSON object (a broken line costs that line, not the reply)."""
    try:
        return as_dict(_decode_json(payload)[0])
    except (ValueError, RecursionError):
        body = json_or_none(payload)  # white space before it
        return as_dict(body)


# ---- reply text: leading <think>, calls written as text ----------------------------------------------


class ThinkTags(object):
    """Splits a leading <think>..</think> off a reply's text, and the line ends beside the tags.

    feed(text) -> [(kind, text)]. place: "start" (no text yet), "lead" (right after the opening tag), "inside", "after"
    (right after the closing tag); `done`: only text follows.
    """

    __slots__ = ("held", "place", "done")
    OPEN, CLOSE = "<think>", "</think>"

    def __init__(self):
        self.held, self.place, self.done = "", "start", False

    def feed(self, text):
        text, self.held = self.held + text, ""
        if self.place == "start":
            start = text.lstrip()
            if self.OPEN.startswith(start) and start != self.OPEN:
                self.held = text
                return []
            if not start.startswith(self.OPEN):
                return self.untagged(text)
            self.place, text = "lead", start[len(self.OPEN) :]
        if self.place == "lead":
            text = text.lstrip("\n")
            self.place = "inside" if text else "lead"
        if self.place in ("lead", "inside"):
            return self.thought(text)
        return self.answer(text)

    def untagged(self, text):
        """Text without an opening tag; a closing one tells that the opening one was in the prompt template."""
        self.done = True
        before, tag, after = text.partition(self.CLOSE)
        return (
            [("thinking", before), ("text", after.lstrip())]
            if tag and self.OPEN not in before
            else [("text", text)]
        )

    def thought(self, text):
        """Text inside the tags; the beginning of a closing tag, and line ends, wait for what follows."""
        before, tag, after = text.partition(self.CLOSE)
        if tag:
            self.place = "after"
            return [("thinking", before.rstrip("\n"))] + self.answer(after)
        keep = next(
            (n for n in range(len(self.CLOSE) - 1, 0, -1) if text.endswith(self.CLOSE[:n])), 0
        )
        sure = text[: len(text) - keep].rstrip("\n")
        self.held = text[len(sure) :]
        return [("thinking", sure)]

    def answer(self, text):
        """Text after the closing tag, from its first line that is not empty."""
        text = text.lstrip("\n")
        self.done = bool(text)
        return [("text", text)] if text else []

    def finish(self):
        """What was held back."""
        held, self.held = self.held, ""
        return [("text" if self.place == "start" else "thinking", held)] if held else []


# ---- the translator ----------------------------------------------------------------------------------

IDLE, OPEN, DONE, FAILED = "idle", "open", "done", "failed"
PLAIN_FRAGMENT = frozenset(("index", "function"))
REASONING_KEYS = frozenset(REASONING_FIELDS + ("reasoning_details",))
MAX_THOUGHT = 4 << 20  # characters; a longer turn's reasoning travels in its thinking block alone


class Slot(object):
    """A tool call while it arrives. key: the provider's index or id; stream: its ArgumentStream once the name is known;
    waiting: fragments that came before the name, or before its turn; google: Gemini's thought signature.
    """

    __slots__ = ("key", "id", "name", "waiting", "stream", "client_id", "google", "closed")

    def __init__(self, key, call_id):
        self.key, self.id, self.name = key, call_id, ""
        self.waiting, self.stream, self.client_id, self.google, self.closed = (
            [],
            None,
            "",
            "",
            False,
        )

    def arguments(self):
        """The argument text as the model wrote it, so far."""
        return (self.stream.raw if self.stream else "") + "".join(self.waiting)


class StreamTranslator(object):
    """OpenAI chunks in, Anthropic event dicts out.

    | state       | feed(chunk)                           | finish()                                   | fail(error)                      |
    | IDLE        | first content: message_start, OPEN    | raise UpstreamError (the status is free)   | raise it                         |
    | OPEN        | deltas, stay OPEN                     | finished: close, message_delta, _stop: DONE; | close the block, error: FAILED |
    |             |                                       | else raise UpstreamError                   | (in a tool call: raise Dropped)  |
    | DONE/FAILED | RuntimeError (our bug)                | nothing                                    | nothing                          |

    feed and finish raise UpstreamError for an error inside the reply; the caller, who knows whether a retry is still
    possible, then calls fail(error). Promises: message_start once and first; block indexes 0, 1, 2 ...; one block open
    at a time; message_delta, then message_stop, once and last; tool input is one JSON object.

    tools: {name sent to the provider: (the client's name, JSON schema)}; taken: tool ids that the conversation has
    already used; new_id() -> fresh id part; `begun`: message_start has gone out already, for an earlier try.
    After the end: `memory` {tool id: what to remember of the call}, `usage_now()`.
    """

    def __init__(
        self,
        message_id,
        model,
        profile,
        input_tokens=0,
        tools=None,
        taken=(),
        new_id=None,
        begun=False,
    ):
        self.message_id, self.model, self.profile, self.input_tokens = (
            message_id,
            model,
            profile,
            input_tokens,
        )
        self.tools, self.taken, self.new_id = (
            tools or {},
            set(taken),
            new_id or (lambda: "%d" % len(self.taken)),
        )
        self.state = OPEN if begun else IDLE
        self.content = False  # real content went out: no retry any more
        self.kind, self.index = "", -1  # the open block
        self.slots, self.late, self.memory, self.blank, self.signed = [], [], {}, "", ""
        self.tags, self.reason, self.stopped_at, self.ended = ThinkTags(), "", None, False
        schemas = {name: schema for name, (_, schema) in self.tools.items()}
        self.calls = {kind: TextCalls(schemas) for kind in ("text", "thinking")} if schemas else {}
        self.usage, self.written, self.details, self.thought, self.said = {}, 0, [], [], []

    # -- chunks in

    def feed(self, chunk):
        """Events for one chunk (dict). Raises UpstreamError for an error in it."""
        if self.state in (DONE, FAILED):
            raise RuntimeError("feed after the end")
        if "error" in chunk or "x_groq" in chunk or "base_resp" in chunk:
            error = error_in_reply(chunk)
            if error:
                raise error
        if chunk.get("usage"):
            self.usage = as_dict(chunk["usage"])
        fresh = not self.content  # MiniMax ends with the whole message again
        for choice in as_list(chunk.get("choices")):
            choice = as_dict(choice)
            delta = choice.get("delta")
            if not isinstance(delta, dict):
                delta = as_dict(choice.get("message")) if fresh and delta is None else {}
            text, only_text = delta.get("content"), len(delta) == 1 and "content" in delta
            if not only_text and not REASONING_KEYS.isdisjoint(delta):
                yield from self.shown_reasoning(delta)
            if text:
                if (
                    self.kind == "text"
                    and self.tags.done
                    and not self.slots
                    and isinstance(text, str)
                    and not self.suspicious(text)
                ):
                    self.written += len(text)
                    if self.details:
                        self.said.append(text)
                    yield {
                        "type": "content_block_delta",
                        "index": self.index,
                        "delta": {"type": "text_delta", "text": text},
                    }
                else:
                    yield from self.text(text)
            if not only_text and (
                delta.get("tool_calls") or delta.get("function_call") or delta.get("refusal")
            ):
                more = self.fragment(delta)
                yield from self.rare(delta) if more is None else self.arguments(more)
            if choice.get("finish_reason"):
                self.note_finish(choice)
            if choice.get("usage"):
                self.usage = as_dict(choice["usage"])
        if "x_groq" in chunk and as_dict(chunk["x_groq"]).get("usage"):
            self.usage = as_dict(chunk["x_groq"]["usage"])

    def suspicious(self, text):
        """Whether text may hold the start of a call written as text."""
        calls = self.calls.get("text")
        return calls is not None and (calls.held or calls.TRIGGER(text))

    def shown_reasoning(self, delta):
        """What a delta holds of reasoning."""
        field = next((field for field in REASONING_FIELDS if delta.get(field)), None)
        if field:
            yield from self.reasoning(delta[field])
        if "reasoning_details" in delta:
            yield from self.reasoning_parts(as_list(delta["reasoning_details"]), field is not None)

    def reasoning(self, text):
        """Reasoning text, from whichever field."""
        if isinstance(text, str):
            yield from self.scanned("thinking", text)

    def reasoning_parts(self, parts, known):
        """OpenRouter's reasoning_details: kept whole for the next turn; shown where no plain field has the text."""
        for part in parts:
            if isinstance(part, dict):
                keep_detail(self.details, part)
                shown = part.get("text") or part.get("summary")
                if shown and not known:
                    yield from self.reasoning(shown)

    def text(self, content):
        """Content text, or a list of parts (Mistral's thinking, Anthropic-like relays)."""
        if isinstance(content, list):
            for part in content:
                part = as_dict(part)
                inner = part.get("thinking")
                if part.get("type") == "thinking" or inner:
                    yield from self.reasoning(
                        "".join(str(as_dict(p).get("text") or "") for p in inner)
                        if isinstance(inner, list)
                        else inner
                    )
                elif isinstance(part.get("text"), str):
                    yield from self.text(part["text"])
        elif isinstance(content, str):
            pieces = [("text", content)] if self.tags.done else self.tags.feed(content)
            for kind, piece in pieces:
                yield from self.scanned(kind, piece)

    def scanned(self, kind, text):
        """Text or thinking, looked through for calls written as text."""
        yield from self.flushed(kind)
        calls = self.calls.get(kind)
        if calls is None or not (calls.held or calls.TRIGGER(text)):
            yield from self.say(kind, text)
            return
        yield from self.found(kind, calls.feed(text))

    def flushed(self, kind=""):
        """What the scanners of other kinds still hold: it came before what comes now."""
        for other, calls in self.calls.items():
            if other != kind and (calls.pending or calls.call):
                yield from self.found(other, calls.finish())

    def found(self, kind, pieces):
        """What a TextCalls scanner made of text: text of the same kind, thinking, or calls."""
        for what, value in pieces:
            if what == "call":
                slot = self.new_slot(None, "")
                slot.name, slot.waiting = value[0], [value[1]]
                yield from self.advance()
            else:
                yield from self.say("thinking" if what == "thinking" else kind, value)

    def fragment(self, delta):
        """What a delta adds to the input of the open call, where it holds nothing else; else None. The hot path of tool input."""
        slot, calls = self.slots[-1] if self.slots else None, delta.get("tool_calls")
        if (
            slot
            and slot.stream
            and not slot.closed
            and len(delta) == 1
            and isinstance(calls, list)
            and len(calls) == 1
        ):
            call = as_dict(calls[0])
            if call.get("index") == slot.key and PLAIN_FRAGMENT.issuperset(call):
                function = as_dict(call.get("function"))
                if len(function) == 1 and isinstance(function.get("arguments"), str):
                    return slot.stream.feed(function["arguments"])
        return None

    def rare(self, delta):
        """Tool calls, the old function_call, and refusals."""
        yield from self.flushed()
        for call in as_list(delta.get("tool_calls")):
            if isinstance(call, dict):
                self.tool_delta(call)
        if isinstance(delta.get("function_call"), dict):
            self.tool_delta({"index": 0, "function": delta["function_call"]})
        if self.slots:
            yield from self.advance()
        if isinstance(delta.get("refusal"), str):
            self.reason = "content_filter"
            yield from self.say("text", delta["refusal"])

    def note_finish(self, choice):
        """Remember why it ended; the stop reason waits for the end, because usage often comes after it."""
        reason = str(choice["finish_reason"])
        if reason in FINISH_ERRORS:
            kind, sentence = FINISH_ERRORS[reason]
            raise UpstreamError(
                sentence, 529 if kind == "overloaded_error" else 502, kind, retry=True
            )
        self.ended = True
        self.reason = self.reason if self.reason == "content_filter" else reason
        if isinstance(choice.get("stop_reason"), str):  # vLLM names the stop text that matched
            self.stopped_at = choice["stop_reason"]

    # -- tool calls

    def tool_delta(self, call):
        """Put one tool_calls delta into its slot."""
        function = as_dict(call.get("function"))
        name, fragment = function.get("name"), function.get("arguments")
        slot = self.slot_for(call.get("index"), call.get("id"), name, fragment)
        if isinstance(name, str) and name and not slot.name:
            slot.name = name
        if isinstance(fragment, str):
            slot.waiting.append(fragment)
        elif fragment is not None:
            slot.waiting.append(compact_json(fragment))
        if "extra_content" in call:
            signature = as_dict(as_dict(call["extra_content"]).get("google")).get(
                "thought_signature"
            )
            slot.google = signature if isinstance(signature, str) else slot.google

    def slot_for(self, index, call_id, name, fragment):
        """The slot that a delta belongs to: by index, else by id, else the last one. A different id that comes with a
        name is a new call even on a used index (Gemini and others count every call 0); without an id another name is,
        and the same name when whole arguments are followed by more."""
        call_id = call_id if isinstance(call_id, str) else ""
        last = self.slots[-1] if self.slots else None
        if isinstance(index, int):
            slot = (
                last
                if last and last.key == index
                else next((slot for slot in reversed(self.slots) if slot.key == index), None)
            )
        else:
            slot = next((slot for slot in self.slots if call_id and slot.id == call_id), None) or (
                None if call_id and name else last
            )
        if slot is None or (call_id and slot.id and call_id != slot.id and name):
            return self.new_slot(index, call_id)
        if (
            not call_id
            and name
            and slot.name
            and (
                name != slot.name
                or fragment
                and str(fragment).strip()
                and slot.arguments().strip() != "{}"
                and json_or_none(slot.arguments()) is not None
            )
        ):
            return self.new_slot(index, call_id)
        slot.id = slot.id or call_id
        return slot

    def new_slot(self, key, call_id):
        self.slots.append(Slot(key, call_id))
        return self.slots[-1]

    def advance(self, ending=False):
        """Send what can be sent of the slots, in order: the first unfinished one is live; one that is complete makes
        way for the next; at the end all are flushed."""
        cut = self.reason in ("length", "model_length", "max_tokens")
        for position, slot in enumerate(self.slots):
            if slot.closed:
                continue
            last = position == len(self.slots) - 1
            if not slot.name:
                if not ending:
                    return
                slot.closed = True  # a call without a name cannot be made
                continue
            if slot.stream is None:
                yield from self.open_tool(slot)
            for fragment in slot.waiting:
                yield from self.arguments(slot.stream.feed(fragment))
            slot.waiting = []
            if not ending and (last or json_or_none(slot.stream.raw) is None):
                return
            yield from self.arguments(slot.stream.finish(cut and ending and last))
            yield from self.close_block()
            slot.closed = True
            self.memory[slot.client_id] = {
                key: value
                for key, value in (("arguments", slot.stream.raw), ("google", slot.google))
                if value
            }

    def open_tool(self, slot):
        """Open the tool_use block of a slot whose name is known."""
        name, schema = self.offered(slot.name)
        slot.stream = ArgumentStream(name, schema)
        slot.client_id = (
            slot.id
            if re.match(r"[A-Za-z0-9_-]{1,64}$", slot.id) and slot.id not in self.taken
            else "toolu_" + self.new_id()
        )
        self.taken.add(slot.client_id)
        if slot.google or (self.unsigned() and self.kind != "thinking"):
            yield from self.carry({"google": {slot.client_id: slot.google}} if slot.google else {})
        yield from self.open_block("tool_use", id=slot.client_id, name=name)

    def offered(self, name):
        """(the client's name, schema) of a tool the model named; a wrong case is forgiven when only one tool fits."""
        if name in self.tools:
            return self.tools[name]
        fits = [tool for other, tool in self.tools.items() if other.lower() == name.lower()]
        return fits[0] if len(fits) == 1 else (name, {})

    def arguments(self, text):
        if text:
            self.written += len(text)
            yield {
                "type": "content_block_delta",
                "index": self.index,
                "delta": {"type": "input_json_delta", "partial_json": text},
            }

    # -- blocks out

    def start(self):
        """message_start, if it has not gone out: the status is decided."""
        if self.state == IDLE:
            self.state = OPEN
            usage = {
                "input_tokens": self.input_tokens,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 0,
            }
            yield {
                "type": "message_start",
                "message": {
                    "id": self.message_id,
                    "type": "message",
                    "role": "assistant",
                    "model": self.model,
                    "content": [],
                    "stop_reason": None,
                    "stop_sequence": None,
                    "usage": usage,
                },
            }

    def say(self, kind, text):
        """Text or thinking in a block of its kind. What comes while a tool call is unfinished waits until after it."""
        if not text:
            return
        if self.slots and not self.slots[-1].closed:
            if any(
                not slot.closed and (not slot.name or json_or_none(slot.arguments()) is None)
                for slot in self.slots
            ):
                self.late.append((kind, text))
                return
            yield from self.advance(ending=True)
        if self.kind != kind:
            if not text.strip():
                self.blank = text  # white space alone is no block
                return
            text, self.blank = self.blank + text, ""
            if kind == "text" and self.kind != "thinking" and self.unsigned():
                yield from self.carry({})
            yield from self.open_block(kind)
        self.written += len(text)
        if kind == "thinking":
            if self.written < MAX_THOUGHT:
                self.thought.append(text)
        elif self.details:
            self.said.append(text)
        _, delta, field = BLOCKS[kind]
        yield {
            "type": "content_block_delta",
            "index": self.index,
            "delta": {"type": delta, field: text},
        }

    def open_block(self, kind, **fields):
        """Close what is open and open a block of `kind`."""
        yield from self.start()
        yield from self.close_block()
        self.content, self.kind, self.index = True, kind, self.index + 1
        yield {
            "type": "content_block_start",
            "index": self.index,
            "content_block": dict(BLOCKS[kind][0], **fields),
        }

    def close_block(self):
        """Close the open block, if any; a thinking block is signed with what the next turn must carry back."""
        if self.kind == "thinking":
            yield self.signature({})
        if self.kind:
            self.kind = ""
            yield {"type": "content_block_stop", "index": self.index}

    def carry(self, state):
        """An empty thinking block that carries state back to us: Claude Code echoes signatures as they are."""
        yield from self.open_block("thinking")
        yield self.signature(state)
        self.kind = ""
        yield {"type": "content_block_stop", "index": self.index}

    def signature(self, state):
        """The signature_delta with state, and with the reasoning details so far."""
        if self.details:
            state, self.signed = dict(state, details=self.details), compact_json(self.details)
        return {
            "type": "content_block_delta",
            "index": self.index,
            "delta": {
                "type": "signature_delta",
                "signature": write_state(self.profile.scope, state),
            },
        }

    def unsigned(self):
        """Whether there are reasoning details that no thinking block carries yet."""
        return bool(self.details) and compact_json(self.details) != self.signed

    def idle(self):
        """Something that the client counts as life after minutes of pings: an empty delta, in a thinking block if none is open."""
        if self.kind not in ("thinking", "tool_use"):
            yield from self.open_block("thinking")
        _, delta, field = BLOCKS[self.kind]
        yield {
            "type": "content_block_delta",
            "index": self.index,
            "delta": {"type": delta, field: ""},
        }

    # -- the end

    def done(self):
        """The provider's [DONE]: the reply is whole even without a finish reason."""
        self.ended = self.ended or self.state == OPEN or bool(self.usage)

    def finish(self):
        """The last events. Raises UpstreamError when the reply is not whole, or holds nothing at all."""
        if self.state in (DONE, FAILED):
            return
        if not self.ended:
            raise UpstreamError(
                (
                    "The provider's reply was cut off before its end."
                    if self.content
                    else "The provider closed the connection without an answer."
                ),
                kind="cut",
                retry=True,
            )
        if self.reason == "model_context_window_exceeded" and not self.content:
            raise overflow_error(
                self.usage_now()["input_tokens"], self.profile.context, self.input_tokens
            )
        for kind, text in self.tags.finish():
            yield from self.scanned(kind, text)
        for kind, calls in self.calls.items():
            yield from self.found(kind, calls.finish())
        if self.slots and not self.content and not any(slot.name for slot in self.slots):
            raise UpstreamError(
                "The model made a tool call without a name.", 502, kind="sampling", retry=True
            )
        yield from self.advance(ending=True)
        late, self.late = self.late, []
        for kind, text in late:
            yield from self.say(kind, text)
        yield from self.start()  # details that came after the text are not carried: `claude -p` prints what the last block says
        yield from self.close_block()
        self.state = DONE
        self.keep_memory()
        yield {
            "type": "message_delta",
            "delta": {"stop_reason": self.stop_reason(), "stop_sequence": self.stopped_at},
            "usage": self.usage_now(),
        }
        yield {"type": "message_stop"}

    def keep_memory(self):
        """Reasoning belongs to each call of the turn: the client may drop or trim the thinking block. A turn without calls
        is known by its text."""
        if self.unsigned() and not self.memory:
            self.memory[text_key(self.profile.scope, "".join(self.said))] = {}
        for note in self.memory.values():
            note["scope"] = self.profile.scope
            if self.thought and self.written < MAX_THOUGHT:
                note["reasoning"] = "".join(self.thought)
            if self.details:
                note["details"] = self.details

    def stop_reason(self):
        cut = (
            STOP_REASONS.get(self.reason) == "max_tokens"
            or self.reason == "model_context_window_exceeded"
        )
        if any(slot.client_id for slot in self.slots) and not cut:
            self.stopped_at = None
            return "tool_use"
        if cut:
            return "max_tokens"
        return (
            "stop_sequence"
            if self.stopped_at is not None
            else STOP_REASONS.get(self.reason, "end_turn")
        )

    def fail(self, error):
        """Tell the client that the reply broke off, so that it keeps what it has: closed block, error event. In the middle
        of a tool call raise Dropped instead: the client streams again when the connection just ends. IDLE: raise error.
        """
        if self.state in (DONE, FAILED):
            return
        if self.state == IDLE:
            raise error
        self.state = FAILED
        if self.kind == "tool_use":
            raise Dropped(error)
        yield from self.close_block()
        yield dict(error.body(), request_id=self.message_id)

    def usage_now(self):
        """Anthropic's usage: input, cache read and cache write are disjoint. Estimates where the provider tells nothing:
        the client decides by these numbers when to compact."""
        u = self.usage
        details, more = as_dict(u.get("prompt_tokens_details")), as_dict(
            u.get("completion_tokens_details")
        )
        prompt = positive_int(u, "prompt_tokens", "input_tokens")
        output = positive_int(u, "completion_tokens", "output_tokens")
        read = positive_int(details, "cached_tokens") or positive_int(
            u, "prompt_cache_hit_tokens", "cached_tokens", "cache_read_input_tokens"
        )
        made = positive_int(details, "cache_write_tokens", "created_cache_tokens") or positive_int(
            u, "cache_creation_input_tokens"
        )
        thought = positive_int(more, "reasoning_tokens")
        if (
            thought and positive_int(u, "total_tokens") == prompt + output + thought
        ):  # xAI counts them apart
            output += thought
        if not prompt:
            prompt = self.input_tokens
        if not u:
            output = (self.written + 3) // 4
        rest = prompt - read - made
        return {
            "input_tokens": rest if rest >= 0 else prompt,
            "cache_creation_input_tokens": made,
            "cache_read_input_tokens": read,
            "output_tokens": output,
        }


class Dropped(Exception):
    """The connection to the client must end without a word: it then streams the same request again."""


def positive_int(values, *names):
    """The first of the named values that is a positive whole number, else 0."""
    return next(
        (values[name] for name in names if isinstance(values.get(name), int) and values[name] > 0),
        0,
    )


def keep_detail(details, part):
    """Add a reasoning detail; pieces of one entry (same type and index) are joined, as they come split over deltas."""
    last = details[-1] if details else {}
    if (
        last.get("type") != part.get("type")
        or last.get("index") != part.get("index")
        or "data" in part
    ):
        details.append(dict(part))
        return
    for key, value in part.items():
        if key in ("text", "summary") and isinstance(value, str) and isinstance(last.get(key), str):
            last[key] += value
        elif value is not None:
            last[key] = value


class RelayTranslator(object):
    """The same shape for a provider that speaks Anthropic itself: events in, the same events out, the model disguised."""

    def __init__(self, message_id, model, profile, input_tokens=0, begun=False, **_):
        self.message_id, self.model, self.profile, self.input_tokens = (
            message_id,
            model,
            profile,
            input_tokens,
        )
        self.state, self.content, self.first, self.last, self.ended = (
            (OPEN if begun else IDLE),
            False,
            None,
            None,
            False,
        )
        self.kind, self.index, self.usage, self.memory, self.written = "", -1, {}, {}, 0
        self.reason = ""

    def start(self):
        if self.state == IDLE:
            self.state = OPEN
            message = dict(
                as_dict(as_dict(self.first).get("message")), model=self.model, content=[]
            )
            for key, value in (
                ("id", self.message_id),
                ("type", "message"),
                ("role", "assistant"),
                ("stop_reason", None),
                ("stop_sequence", None),
            ):
                message.setdefault(key, value)
            message["usage"] = dict(
                {"input_tokens": self.input_tokens, "output_tokens": 0},
                **as_dict(message.get("usage")),
            )
            yield {"type": "message_start", "message": message}

    def feed(self, event):
        """Events for one event of the provider. Raises UpstreamError for its error event."""
        if self.state in (DONE, FAILED):
            raise RuntimeError("feed after the end")
        kind = event.get("type")
        if kind == "error" or "error" in event:
            raise error_in_reply(event) or UpstreamError("The provider reported an error.")
        if kind == "message":  # a whole message in answer to a stream request
            for part in unfold(event):
                yield from self.feed(part)
        elif kind == "message_start":
            self.first = event
            self.usage.update(as_dict(as_dict(event.get("message")).get("usage")))
        elif kind == "message_delta":
            self.ended, self.last = True, event
            self.reason = as_dict(event.get("delta")).get("stop_reason") or ""
            self.usage.update(as_dict(event.get("usage")))
        elif kind == "message_stop":
            self.ended = True
        elif isinstance(kind, str) and re.match(r"\w+\Z", kind) and kind != "ping":
            yield from self.block_event(kind, event)

    def block_event(self, kind, event):
        """An event about a block, numbered as ours are; what belongs to no open block is dropped."""
        block, part = event.get("content_block"), event.get("delta")
        if kind == "content_block_start" and isinstance(block, dict):
            yield from self.open_block(str(block.get("type") or "text"), block)
        elif kind == "content_block_stop":
            yield from self.close_block()
        elif kind == "content_block_delta" and self.kind and isinstance(part, dict):
            yield event if event.get("index") == self.index else dict(event, index=self.index)
        elif not kind.startswith("content_block"):
            yield from self.start()
            yield event

    def open_block(self, kind, block):
        yield from self.start()
        yield from self.close_block()
        self.content, self.kind, self.index = True, kind, self.index + 1
        yield {"type": "content_block_start", "index": self.index, "content_block": block}

    def idle(self):
        """A sign of life, as the other translator's; a thinking block of our own is signed, so that it is never sent on."""
        if not self.kind:
            yield from self.open_block("thinking", BLOCKS["thinking"][0])
            yield {
                "type": "content_block_delta",
                "index": self.index,
                "delta": {
                    "type": "signature_delta",
                    "signature": write_state(self.profile.scope, {}),
                },
            }
        _, delta, field = BLOCKS.get(self.kind, (None, "", ""))
        yield (
            {
                "type": "content_block_delta",
                "index": self.index,
                "delta": {"type": delta, field: ""},
            }
            if delta
            else PING
        )

    def done(self):
        """[DONE] means nothing in Anthropic's form."""

    def finish(self):
        if self.state in (DONE, FAILED):
            return
        if not self.ended:
            raise UpstreamError(
                "The provider's reply was cut off before its end.", kind="cut", retry=True
            )
        yield from self.start()
        yield from self.close_block()
        self.state = DONE
        if self.last:
            yield dict(self.last, delta=as_dict(self.last.get("delta")), usage=self.usage_now())
        yield {"type": "message_stop"}

    fail = StreamTranslator.fail

    def close_block(self):
        if self.kind:
            self.kind = ""
            yield {"type": "content_block_stop", "index": self.index}

    def usage_now(self):
        usage = {
            name: positive_int(self.usage, name)
            for name in (
                "input_tokens",
                "cache_creation_input_tokens",
                "cache_read_input_tokens",
                "output_tokens",
            )
        }
        if not usage["input_tokens"] + usage["cache_read_input_tokens"]:
            usage["input_tokens"] = self.input_tokens
        return usage


# ---- events out, fold and unfold ---------------------------------------------------------------------

_escape = json.dumps
DELTAS = {
    # delta type: (field, the event as sent; the hot path writes from this, with one escape of the text)
    delta: (
        field,
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":%%d,"delta":{"type":"%s","%s":%%s}}\n\n'
        % (delta, field),
    )
    for _, delta, field in BLOCKS.values()
}


def encode_event(event):
    """An event dict as SSE text; the only place that writes "event: ". ASCII only."""
    if event["type"] == "content_block_delta":
        try:
            known = DELTAS[event["delta"]["type"]]
            return known[1] % (event["index"], _escape(event["delta"][known[0]]))
        except (KeyError, TypeError):
            """Not one of the three (a signature), or odd: an Anthropic provider's events are relayed as they are."""
    return "event: %s\ndata: %s\n\n" % (event["type"], compact_json(event))


PING = {"type": "ping"}


def fold(events):
    """The finished message that events tell: the unstreamed answer. Raises UpstreamError for an error event."""
    message, blocks, inputs = {}, {}, {}
    for event in events:
        kind = event["type"]
        if kind == "message_start":
            message = dict(event["message"], usage=dict(event["message"].get("usage") or {}))
        elif kind == "content_block_start":
            blocks[event["index"]] = dict(event["content_block"])
        elif kind == "content_block_delta":
            add_delta(blocks[event["index"]], event["delta"], inputs.setdefault(event["index"], []))
        elif kind == "message_delta":
            message.update(event["delta"])
            message["usage"].update(event["usage"])
        elif kind == "error":
            raise UpstreamError(
                event["error"]["message"],
                529 if event["error"]["type"] == "overloaded_error" else 502,
                event["error"]["type"],
            )
    message["content"] = [
        finished_block(blocks[index], inputs.get(index, [])) for index in sorted(blocks)
    ]
    return message


def add_delta(block, delta, pieces):
    """Put one delta into a block (or, to be joined once, into pieces)."""
    kind = delta.get("type")
    if kind == "signature_delta":
        block["signature"] = delta["signature"]
    elif kind in DELTAS:
        pieces.append(delta[DELTAS[kind][0]])
    elif kind == "citations_delta":
        block.setdefault("citations", []).append(delta.get("citation"))


def finished_block(block, pieces):
    """A block with its pieces joined; tool input that is no JSON object is told in the client's own form for that."""
    whole = "".join(pieces)
    kind = block.get("type")
    if kind in ("text", "thinking") and pieces:
        block[kind] = block.get(kind, "") + whole
    elif pieces and "input" in block or kind in ("tool_use", "server_tool_use"):
        parsed = json_or_none(whole) if whole else block.get("input") or {}
        block["input"] = (
            parsed
            if isinstance(parsed, dict)
            else {"__unparsedToolInput": {"raw": whole, "len": len(whole)}}
        )
    return block


def unfold(message, new_id=None):
    """The events that make up a finished message; new_id() gives tool calls fresh ids (a replayed one must not repeat)."""
    started = dict(message, content=[], stop_reason=None, stop_sequence=None)
    yield {"type": "message_start", "message": started}
    for index, block in enumerate(
        block for block in as_list(message.get("content")) if isinstance(block, dict)
    ):
        kind = str(block.get("type"))
        skeleton, delta, field = BLOCKS.get(kind, (None, "", ""))
        if kind in ("tool_use", "server_tool_use"):
            call_id = "toolu_" + new_id() if new_id and kind == "tool_use" else block.get("id")
            yield {
                "type": "content_block_start",
                "index": index,
                "content_block": dict(block, id=call_id, input={}),
            }
            arguments = {
                "type": "input_json_delta",
                "partial_json": compact_json(block.get("input") or {}),
            }
            yield {"type": "content_block_delta", "index": index, "delta": arguments}
        elif skeleton is None:
            yield {"type": "content_block_start", "index": index, "content_block": block}
        else:
            yield {"type": "content_block_start", "index": index, "content_block": skeleton}
            if block.get(field):
                yield {
                    "type": "content_block_delta",
                    "index": index,
                    "delta": {"type": delta, field: block[field]},
                }
            if block.get("signature"):
                yield {
                    "type": "content_block_delta",
                    "index": index,
                    "delta": {"type": "signature_delta", "signature": block["signature"]},
                }
        yield {"type": "content_block_stop", "index": index}
    yield {
        "type": "message_delta",
        "delta": {
            "stop_reason": message.get("stop_reason"),
            "stop_sequence": message.get("stop_sequence"),
        },
        "usage": dict(as_dict(message.get("usage"))),
    }
    yield {"type": "message_stop"}


# ======================================================================================================
# 8  Learning: a provider's error -> a lesson (changes of its profile)
# ======================================================================================================

# Field names in "no such field" errors, as OpenAI, Groq and Cerebras, Gemini, NIM, Mistral, Fireworks, xAI and others word them.
FIELD_PATTERNS = (
    r"Unrecognized request arguments? supplied: ([\w, ]+)",
    r"property '(?:body\.)?([\w.]+)' is unsupported",
    r'Unknown name \\*"(\w+)\\*"',
    r"Unsupported parameter\(s\): ([\w, `']+)",
    r"""["']?loc["']?:\s*[\[(]\s*["']body["'],\s*["'](\w+)""",
    r"Extra inputs are not permitted, field: '(\w+)'",
    r"Unsupported (?:parameter|value): '([\w.\[\]]+)'",
    r"Argument not supported on this model: (\w+)",
    r"does not support (?:the )?parameters?:? \[?['`\"]?(\w+)",
    r"Unexpected fields in the request: \{([^}]+)\}",
    r"invalid (temperature|top_p): only",
    r"(?:unknown|unexpected|unrecognized|unsupported|invalid) (?:field|parameter|argument|keyword argument|property):? ['`\"]?([\w.]+)",
    r"(\w+): Extra inputs are not permitted",
)
SCHEMA_WORDS = (
    "pattern",
    "format",
    "const",
    "additionalProperties",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "default",
    "propertyNames",
    "patternProperties",
    "anyOf",
    "oneOf",
    "allOf",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "not",
    "examples",
    "title",
)
REFUSED = r"(?i)unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|extra|forbidden|invalid|unavailable"
ESSENTIAL = ("model", "messages", "tools", "stream")


def named_fields(text):
    """Names of request fields that an error text complains of, in snake case."""
    found = []
    for pattern in FIELD_PATTERNS:
        for match in re.findall(pattern, text, re.I):
            found += [
                (
                    re.sub(r"(?<=[a-z])([A-Z])", lambda m: "_" + m.group(1).lower(), name)
                    if not name.isupper()
                    else name
                )
                for name in re.findall(r"[\w.]+", match)
            ]
    return list(dict.fromkeys(found))


def learn_fields(text, profile, sent):
    """A field that the provider does not know is renamed, or not sent any more."""
    names = named_fields(text)
    changes, never = {}, list(profile.never)
    for name in names:
        last = name.rsplit(".", 1)[-1]
        if name.startswith("ANTHROPIC_"):
            changes["strict"] = True
        elif last in ("max_tokens", "max_completion_tokens") and last in sent:
            changes["max_tokens"] = (
                "max_completion_tokens" if last == "max_tokens" else "max_tokens"
            )
        elif last in ("reasoning_content", "reasoning", "reasoning_details") and last not in sent:
            changes["reasoning_field"] = ""
        elif last in SCHEMA_WORDS and last not in sent and last not in profile.schema:
            changes["schema"] = tuple(profile.schema) + (last,)
        elif last in sent and last not in ESSENTIAL:
            never.append(last)
    if len(never) > len(profile.never):
        changes["never"] = tuple(never)
    return changes


def learn_output_limit(text, profile, sent):
    found = re.match(OUTPUT_LIMIT, text)
    limit = int(found.group(1)) if found else 0
    return {"max_output": limit} if limit and limit < sent.get(profile.max_tokens, 0) else {}


def learn_choice(text, profile, sent):
    """A forced tool choice that the provider refuses becomes auto."""
    choice = sent.get("tool_choice")
    if not choice or "tool_choice" not in text and "tool choice" not in text.lower():
        return {}
    return {
        "tool_choice": tuple(
            form for form in profile.tool_choice if form == "none" and choice != "none"
        )
    }


def learn_thinking(text, profile, sent):
    """Thinking that must be off, or effort that must be none beside tools."""
    if "enable_thinking must be set to false" in text:
        if not sent.get("stream"):
            return {"always_stream": True}
        return {"body": tuple(profile.body) + (("enable_thinking", False),)}
    if re.search(r"tools with reasoning_effort are not supported", text, re.I):
        return {"effort_with_tools": "none"}
    if re.search(r"cannot be disabled when reasoning_effort", text):
        return {"never": tuple(profile.never) + ("reasoning_effort",)}
    asked = [
        field
        for field in (
            "reasoning_effort",
            "thinking",
            "enable_thinking",
            "reasoning",
            "chat_template_kwargs",
        )
        if field in sent
    ]
    named = [field for field in asked if re.search(r"\b%s\b" % field, text)]
    if (
        asked
        and re.search(REFUSED, text)
        and (
            named
            or re.search(
                r"not support (?:thinking|reasoning)|(?:thinking|reasoning) is not", text, re.I
            )
        )
    ):
        return {"reasoning": "", "effort_with_tools": ""}
    return {}


def learn_replay(text, profile, sent):
    """Reasoning that must come back with the history."""
    if "thought_signature" in text:
        return {"reasoning_field": "google", "placeholder": GEMINI_SKIP}
    if re.search(
        r"reasoning_content.{0,80}(?:passed back|missing)|missing.{0,20}reasoning_content",
        text,
        re.I,
    ):
        known = profile.reasoning_field == "reasoning_content" and profile.placeholder
        return {
            "reasoning_field": "reasoning_content",
            "placeholder": NOT_KEPT,
            "reasoning_always": bool(known) or profile.reasoning_always,
        }
    return {}


def learn_images(text, profile, sent):
    """A model that takes no images: they become notes."""
    telling = re.search(r"image|vision|multi-?modal|only supports? text", text, re.I) and re.search(
        r"not support|only supports? text|not a multimodal|unknown variant|unsupported|text.only|cannot|no endpoints found",
        text,
        re.I,
    )
    has_image = any(
        isinstance(m.get("content"), list)
        and any(p.get("type") == "image_url" for p in m["content"])
        for m in sent["messages"]
    )
    return {"images": False} if telling and has_image else {}


def learn_files(text, profile, sent):
    has_file = any(
        isinstance(m.get("content"), list) and any(p.get("type") == "file" for p in m["content"])
        for m in sent["messages"]
    )
    return (
        {"files": False}
        if has_file and re.search(r"\bfile|pdf|unknown variant|content type", text, re.I)
        else {}
    )


def learn_schema(text, profile, sent):
    """A JSON schema keyword in a tool that the provider cannot read."""
    if not sent.get("tools") or not re.search(
        r"schema|function|tools?\b|parameters|regex|grammar", text, re.I
    ):
        return {}
    if re.search(r"regex|look-?(?:ahead|behind|around)", text, re.I):
        found = ["pattern"]
    else:
        found = re.findall(r"['\"`\[]\$?(%s)['\"`\]]" % "|".join(SCHEMA_WORDS), text)
    words = tuple(word for word in dict.fromkeys(found) if word not in profile.schema)
    return {"schema": tuple(profile.schema) + words} if words else {}


def learn_format(text, profile, sent):
    """A response_format that is not there: the weaker form, then words."""
    if "response_format" not in sent or not re.search(
        r"response_format|json_schema|json_object|structured output", text, re.I
    ):
        return {}
    return {"json_format": "json_object" if profile.json_format == "json_schema" else ""}


def learn_roles(text, profile, sent):
    """What may follow what, and how calls are named."""
    if re.search(r"Unexpected role 'user' after role 'tool'", text):
        return {"user_after_tool": False}
    if re.search(r"must be a-z, A-Z, 0-9, with a length of 9", text):
        return {"tool_ids": "nine"}
    if re.search(
        r"system.{0,30}role.{0,30}(?:not supported|not enabled|unsupported)|role: system|Developer instruction is not enabled",
        text,
        re.I,
    ):
        return {"system_role": False}
    found = (
        re.search(r"maximum (?:number of items is|length) (\d+)", text) if "tools" in text else None
    )
    return (
        {"max_tools": int(found.group(1))}
        if found and len(sent.get("tools", ())) > int(found.group(1))
        else {}
    )


def learn_native(text, profile, sent):
    """What providers that speak Anthropic refuse: newer beta flags, role system in the messages, cache_control."""
    if profile.format != "anthropic":
        return {}
    found = re.search(r"value\(s\) (.+?) for the .?anthropic-beta", text)
    if found:
        return {"betas": tuple(profile.betas) + tuple(re.findall(r"[\w-]+", found.group(1)))}
    if re.search(r"messages\.\d+\.role|Unexpected role .?system", text):
        return {"system_role": False}
    if "cache_control" in text:
        return {"never": tuple(profile.never) + ("cache_control",)}
    return {}


def learn_any_field(text, profile, sent):
    """Last resort: a field of ours that the text names in quotes and calls wrong in some way."""
    if not re.search(REFUSED, text):
        return {}
    fields = [
        field
        for field in sent
        if field not in ESSENTIAL
        and field != profile.max_tokens
        and re.search(r"['\"`(\[]%s\b" % re.escape(field), text)
    ]
    return {"never": tuple(profile.never) + tuple(fields)} if fields else {}


LESSON_RULES = (
    learn_native,
    learn_thinking,
    learn_replay,
    learn_choice,
    learn_roles,
    learn_format,
    learn_images,
    learn_files,
    learn_output_limit,
    learn_fields,
    learn_schema,
    learn_any_field,
)


def learn(error, profile, sent):
    """What an UpstreamError teaches about its provider: {profile field: value}; {} when no rule fits, or nothing would change.

    sent: the request that was refused. Each rule reads the provider's own words and gives the changes it is sure of.
    """
    if error.kind not in ("request", "size", "sampling", "policy") or not error.text:
        return {}
    for rule in LESSON_RULES:
        changes = {
            field: value
            for field, value in rule(error.text, profile, sent).items()
            if getattr(profile, field) != value
        }
        if changes:
            return changes
    return {}


def room_after(error, profile, size):
    """({profile field: value}, output tokens to ask for) after "prompt and output together do not fit"; ({}, 0) when the
    prompt alone is too long. size: bytes of the client's request. Some servers (vLLM) stop counting the prompt where it
    fails to fit; what they tell is then the least it can be."""
    prompt, output, limit = error.numbers
    if error.kind != "overflow" or not (output and limit) or prompt + 1024 >= limit:
        return {}, 0
    lazy = prompt + output == limit + 1
    room = max(1024, limit - max(prompt + 64, size // 4 if lazy else 0))
    return {
        "context": limit,
        "density": round(max(profile.density, min(16.0, (prompt + 64) / max(size, 1))), 3),
    }, room


def lesson_text(field, value):
    """A lesson as a sentence for the log and the status page."""
    if field == "never":
        return "not sent: " + ", ".join(value)
    if field == "schema":
        return "left out of tool schemas: " + ", ".join(value)
    sentence = LESSON_WORDS.get(field, field + " is now %s")
    shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return sentence % (shown,) if "%s" in sentence else sentence


LESSON_WORDS = {
    "strict": "unknown fields are refused; the disguise is not attached",
    "max_tokens": "the output limit is called %s",
    "density": "counts up to %s tokens a byte",
    "max_output": "at most %s output tokens",
    "context": "the context window has %s tokens",
    "images": "takes no images",
    "files": "takes no PDF files",
    "reasoning_field": "reasoning goes back as: %s",
    "placeholder": "missing reasoning is replaced by: %s",
    "tool_choice": "tool choice beyond auto: %s",
    "always_stream": "always asked for a stream",
    "user_after_tool": "takes no user message right after a tool message",
    "tool_ids": "tool ids in the form: %s",
}


def apply_lesson(profile, changes):
    """A profile with lessons applied. changes may come from JSON: lists become tuples, unknown fields are ignored."""

    def frozen(value):
        return tuple(frozen(part) for part in value) if isinstance(value, (list, tuple)) else value

    return profile._replace(
        **{
            field: frozen(value)
            for field, value in as_dict(changes).items()
            if field in Profile._fields
        }
    )


# ==================================================================================================
# 9  Upstream: connections to the provider, kept alive
# ==================================================================================================
#
#     Upstream.open -> Line.ask -> http.client -> Line.sendall, Line.readinto -> socket
#     Reply.blocks  <- inflate <- Dechunker <- Line.file <- Line.readinto
#
# http.client writes requests and reads the heads of answers; urllib says which proxy is on the way.
# Under them is no socket but a Line, which waits through the client's `wait`: so a client that
# leaves is noticed, and pings go out, wherever http.client happens to read. Bodies are read past
# http.client: its reader of chunks takes 13 us a chunk where the Dechunker takes 5, and it accepts
# sizes such as -5, 0x5 and 1_0.
#
# The life of a Line: dial, with TLS secure, then ask -> Reply -> keep, kept, ask -> Reply -> ...
# until something is wrong with it, or it was idle for too long: drop.

READ_SIZE = 16384  # one TLS record; every waiting thread holds one
SEND_SIZE = 1 << 18
MAX_HEAD = 1 << 16  # bytes that may come before a head, interim ones included, is whole
MAX_BODY = 1 << 26  # of a reply that is read whole
BLOCK_SIZE = 1 << 16  # of decompressed output: a bomb costs time, not memory
KEPT_LINES = 128  # idle connections to one place
DRAIN_SECONDS = 0.05  # how long finish() waits for the end of a body
SLICE_SECONDS = 0.2  # between two looks at the client where the socket alone is waited for
WAY_SECONDS = 60  # how long a look-up of the system's proxy settings holds
MAX_REDIRECTS = 3

PORTS = {"http": 80, "https": 443}
# What a socket that never blocks says instead of waiting.
NOTHING_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
# "name:value" as it may go out: visible ASCII, then what RFC 9110, 5.5 allows, of latin-1.
FIELD = re.compile(r"[!-9;-~]+:[\t -~\x80-\xff]*")


class Way(NamedTuple):
    """How an origin is reached; connections are kept by it."""

    scheme: str
    host: str  # in its ASCII form
    port: int
    proxy: tuple = None  # (host, port)
    proxy_auth: str = ""  # the value of Proxy-Authorization, a secret


def host_port(host, port):
    """host:port as in a URL, where an IPv6 address has brackets."""
    return ("[%s]:%d" if ":" in host else "%s:%d") % (host, port)


def url_origin(url):
    """(scheme, host, port) of an http(s) URL; ValueError for anything else. A name with other
    letters is given in the ASCII form that DNS, TLS and the Host field take (RFC 5890)."""
    parts = urllib.parse.urlsplit(url)
    host = (parts.hostname or "").encode("idna").decode("ascii")
    if parts.scheme not in PORTS or not re.fullmatch("[!-~]+", host):
        raise ValueError("not an http(s) URL")
    return parts.scheme, host, parts.port or PORTS[parts.scheme]


def basic_auth(parts):
    """The Authorization value for the user and password of a split URL (RFC 7617)."""
    pair = [urllib.parse.unquote(each or "") for each in (parts.username, parts.password)]
    return "Basic " + base64.b64encode(":".join(pair).encode("utf-8")).decode("ascii")


def find_way(scheme, host, port):
    """The Way to an origin by HTTP(S)_PROXY, ALL_PROXY and NO_PROXY, or the settings of macOS and
    Windows."""
    proxies, bypass = urllib.request.getproxies(), urllib.request.proxy_bypass
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy or LOOPBACK.match(host) or bypass(host_port(host, port)):
        return Way(scheme, host, port)
    setting, (kind, _, place) = scheme.upper() + "_PROXY", proxy.rpartition("://")
    # The ssl module cannot run TLS with the origin inside TLS with the proxy, and to talk plainly
    # to a proxy that is written with https:// would show its password to the network.
    if kind.lower() not in ("", "http"):
        raise UpstreamError(
            "%s:// proxies are not supported: write http:// in %s if yours takes plain HTTP, as "
            "most do, or name %s in NO_PROXY" % (kind, setting, host),
            kind="connect",
        )
    try:
        address = url_origin("http://" + place)[1:]
    except ValueError:
        said = "the proxy setting for %s has no valid host and port: correct %s" % (host, setting)
        raise UpstreamError(said, kind="connect")
    parts = urllib.parse.urlsplit("http://" + place)
    return Way(scheme, host, port, address, basic_auth(parts) if parts.username else "")


def poll_socket(sock, seconds, read=True, write=False):
    """Waits until `sock` can be read (or written, as asked). True: it can; False: the seconds are
    over. Without a socket (None) it sleeps."""
    if sock is None:
        time.sleep(seconds)
        return True
    if not hasattr(select, "poll"):  # Windows
        return any(select.select([sock] * read, [sock] * write, [], seconds))
    poll = select.poll()
    poll.register(sock, select.POLLIN * read | select.POLLOUT * write)
    return bool(poll.poll(seconds * 1000))


def request_parts(way, url, headers):
    """(request target, header fields) as they go out. UpstreamError if a setting brought something
    into them that HTTP forbids: http.client's own error would quote the value, and that may be an
    API key."""
    parts = urllib.parse.urlsplit(url)
    target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
    framing = ("content-length", "transfer-encoding")  # http.client's business
    fields = {name: value for name, value in headers.items() if name.lower() not in framing}
    if parts.username and "authorization" not in map(str.lower, fields):
        fields["Authorization"] = basic_auth(parts)
    if way.proxy and way.scheme == "http":
        target = "http://" + host_port(way.host, way.port) + target
        if way.proxy_auth:
            fields["Proxy-Authorization"] = way.proxy_auth
    # http.client lets \0 and names with blanks pass.
    wrong = [
        "the header " + ascii(name)
        for name in fields
        if not FIELD.fullmatch(name + ":" + fields[name])
    ]
    if wrong or not re.fullmatch("[!-~]+", target):
        raise UpstreamError(
            "%s to the provider has a line break or another character that HTTP forbids: check the "
            "setting (an API key?) it comes from" % (wrong or ["the URL"])[0],
            500,
            kind="request",
        )
    return target, fields


class Head(http.client.HTTPResponse):
    """The head of an answer, after any interim ones: status, reason, headers, chunked, length,
    will_close. ValueError, beside http.client's own errors, where nobody can say how long the body
    is."""

    def begin(self):
        while self.headers is None or 100 <= self.status < 200 and self.status != 101:
            self.headers = None
            http.client.HTTPResponse.begin(self)
        # After a malformed line the email parser takes all others for a body, the framing with
        # them.
        if self.headers.defects:
            raise ValueError("a malformed field in its head")
        # Contradictions are errors, not something to choose from (RFC 9112, 6.3). http.client
        # itself takes the first of two lengths, "+5" for 5, and "chunked " for no coding at all.
        coding = ",".join(self.headers.get_all("Transfer-Encoding", ())).strip().lower()
        lengths = {length.strip() for length in self.headers.get_all("Content-Length", ())}
        self.chunked = coding == "chunked"
        if coding not in ("", "identity", "chunked") or self.chunked and lengths:
            raise ValueError("a Transfer-Encoding that cannot be")
        if len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,18}", length) for length in lengths):
            raise ValueError("a Content-Length that is not one number")


class Inlet(io.BufferedReader):
    """What http.client reads a Line through."""

    def close(self):
        """Nothing: http.client closes its file after each answer, and the line lives on. A real
        close could not be undone: the buffer is freed with it."""


class Line(io.RawIOBase):
    """A connection, in the form in which http.client uses a socket: sendall, makefile, close.

    The socket never blocks; all waiting goes through `wait(sock, seconds)`. It gives True when the
    socket can be read, False when the seconds are over; what it raises (ClientGone) comes through
    http.client. Whoever gets an exception from a method must end the line.
    """

    def __init__(self, sock, way):
        self.sock, self.way = sock, way
        self.peer = host_port(way.host, way.port)  # how messages name the other end
        if way.proxy:
            self.peer += " (through the proxy %s)" % host_port(*way.proxy)
        self.file = Inlet(self, READ_SIZE)
        self.since = 0.0  # monotonic time at which it became idle
        self.begin(None, 0.0)

    def begin(self, wait, timeout):
        """Starts an exchange: nothing is left of the one before."""
        self.wait = wait  # None: only what is there is read
        self.timeout = timeout  # seconds that a silence may last
        # Monotonic time by which what is read must have come to its end, within MAX_HEAD bytes.
        # None: a body, which may go on for as long as something comes.
        self.deadline = None
        self.came = 0  # bytes of the current answer, interim ones included
        self.ended = False  # the other side has closed
        self.whole = True  # all of the request could be sent

    def makefile(self, *_):
        """Always the same file: what it read too much of belongs to what comes next."""
        return self.file

    def close(self):
        """Nothing: http.client closes its socket before the body of a last answer is read."""

    def end(self):
        self.file = None  # break the reference cycle
        self.sock.close()

    def readable(self):
        return True

    def readinto(self, buffer):
        """The next bytes into `buffer` -> their number, 0 at the end of the connection, None if
        `wait` is None and nothing is there (or only a TLS session ticket)."""
        while True:
            if self.wait:
                self.await_bytes()
            try:
                size = self.sock.recv_into(buffer)
                break
            except NOTHING_YET:
                if not self.wait:
                    return None
            except OSError as error:
                raise self.cut(error.strerror or "read error")
        self.came += size
        self.ended = not size
        if self.ended and self.deadline:  # http.client would take half a head for a whole one
            raise self.cut("closed by it")
        return size

    def await_bytes(self):
        """Waits for the socket, unless TLS has already taken from it what we are waiting for."""
        seconds = self.timeout
        if self.deadline:
            if self.came > MAX_HEAD:
                raise self.garbage("a head of more than %d KB" % (MAX_HEAD >> 10))
            seconds = self.deadline - time.monotonic()
        if seconds > 0:
            if getattr(self.sock, "pending", int)() or self.wait(self.sock, seconds):
                return
        if self.deadline and self.came:
            raise self.stuck("%s sent no whole head in %g s: it is overloaded or stuck; try again")
        raise self.stuck(
            "%s has been silent for %g s: it is overloaded or stuck; try again, or raise the "
            "timeout"
        )

    def look(self):
        """What has come and is not read yet, without waiting for more; None where the connection is
        over."""
        wait, self.wait = self.wait, None
        try:
            return self.file.peek(1) or (None if self.ended else b"")
        except UpstreamError:
            return None
        finally:
            self.wait = wait

    def sendall(self, data):
        """Sends `data`, or (then it is not `whole`) as much as the other side takes before it
        closes or answers: a 413 may come before the end of the request."""
        view, moved, early = memoryview(data), time.monotonic(), b""
        while view and self.whole:
            try:
                view = view[self.sock.send(view[:SEND_SIZE]) :]
                moved = time.monotonic()
                continue
            except NOTHING_YET:
                pass
            except OSError:  # it may have answered before it hung up: who reads will see
                self.whole = False
                return
            poll_socket(self.sock, SLICE_SECONDS, read=not early, write=True)
            self.wait(self.sock, 0)  # for the client's sake
            early = self.look()
            # HTTP/1.1 1.. is an interim answer: the real one is still to come (RFC 9110, 15.2).
            self.whole = early is not None and early[9:10] in b"1"
            if time.monotonic() - moved > self.timeout:
                raise self.stuck(
                    "%s took no byte of the request for %g s: it is overloaded or stuck; try again"
                )

    def ask(self, method, target, fields, body, wait, timeout):
        """Sends a request and reads the head of the answer, which has `timeout` seconds -> Head."""
        self.begin(wait, timeout)
        # A new one for each request: the line is what is kept, and http.client's states go with the
        # answer.
        connection = http.client.HTTPConnection(self.way.host, self.way.port)
        connection.default_port = PORTS[self.way.scheme]
        connection.response_class, connection.sock = Head, self
        try:
            connection.request(method, target, body, fields)
            self.deadline = time.monotonic() + timeout
            start = self.file.peek(1)[:40]
            # http.client would wait for the end of a line, whatever it begins with.
            if not start.startswith(b"HTTP/"[: len(start)]):
                raise self.garbage("it begins with " + ascii(start)[1:], start.startswith(b"\x15"))
            head = connection.getresponse()
        except (http.client.HTTPException, ValueError) as error:
            raise self.garbage(ascii(str(error) or type(error).__name__)[1:-1][:100])
        self.deadline = None
        return head

    def handshake(self, context, seconds):
        """TLS from here on, through the proxy if there is one. OSError, ValueError
        (ssl.CertificateError on Python 3.6)."""
        end = time.monotonic() + seconds
        self.sock = context.wrap_socket(
            self.sock, server_hostname=self.way.host, do_handshake_on_connect=False
        )
        while True:
            try:
                return self.sock.do_handshake()
            except NOTHING_YET:
                if time.monotonic() > end:
                    raise socket.timeout("timed out")
                self.wait(self.sock, SLICE_SECONDS)

    # -- what can be wrong with it

    def stuck(self, said):
        """It is there, and does nothing. No retry: with the same patience, that would take as long
        again."""
        said %= self.peer, self.timeout
        return UpstreamError(said, 504, "timeout_error", kind="timeout")

    def garbage(self, seen, alert=False):
        """What came is not an answer. alert: it is one of TLS, whose records of this kind begin
        with 21 (RFC 8446, 5.1)."""
        advice = "it expects TLS; write https:// in" if alert else "check host and port of"
        said = "%s does not answer with proper HTTP (%s): %s the base URL"
        return UpstreamError(said % (self.peer, seen, advice), kind="cut")

    def cut(self, seen):
        """It is over, before the end. The words tell a busy server's restart from a lost stream."""
        when = "in the middle of its answer" if self.came else "before it answered"
        said = "the connection to %s ended %s (%s): a fault there or in the network; try again"
        return UpstreamError(said % (self.peer, when, seen), kind="cut", retry=True)


class Dechunker:
    """Undoes chunked framing (RFC 9112, 7.1), however it was split on its way.

    A size line is taken with the line break before it, which ends the chunk before; that is why it
    all begins with one. left: bytes of a chunk that are to come; tail: the unfinished line between
    two chunks (one of them is always empty), or, when it is `done`, what came after the end.
    """

    SIZE_LINE = re.compile(rb"\r?\n([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")
    TRAILERS = re.compile(rb"(?:[^\r\n][^\n]*\n)*\r?\n")

    def __init__(self):
        self.left, self.tail, self.done = 0, b"\r\n", False

    def feed(self, data):
        """The payload in `data`, however many chunks it spans, as one piece. ValueError for bad
        framing."""
        data, at = self.tail + data, self.left
        pieces, end, self.tail = [data[:at]], len(data), b""
        while at < end:
            line = self.SIZE_LINE.match(data, at)
            size = line and int(line.group(1), 16)
            if not size:
                self.stop(data, at, line)
                at = end
                break
            start = line.end()
            at = start + size
            pieces.append(data[start:at])
        self.left = at - end
        return b"".join(pieces)

    def stop(self, data, at, line):
        """Takes what begins no chunk with payload: the last chunk and its trailers, or a part of a
        line."""
        last = line and self.TRAILERS.match(data, line.end())
        self.done, self.tail = bool(last), data[last.end() if last else at :]
        if not last and (len(self.tail) > READ_SIZE or not line and b"\n" in self.tail[2:]):
            raise ValueError("a chunk of the body has no valid size")


# Neither raw deflate, which no server sends any more, nor brotli, which Python cannot read.
def inflate(pieces):
    """The decompressed `pieces` of gzip or zlib, each as soon as it is there, at most BLOCK_SIZE
    bytes at a time. zlib.error: damaged; ValueError: cut off."""
    inflater, begun = zlib.decompressobj(zlib.MAX_WBITS | 32), False
    for piece in pieces:
        begun = True
        while piece and not inflater.eof:  # what follows the end is ignored, as browsers do
            block = inflater.decompress(piece, BLOCK_SIZE)
            piece = inflater.unconsumed_tail
            if block:
                yield block
    if begun and not inflater.eof:
        raise ValueError("the compressed body is cut off")


class Reply:
    """An answer whose head has come: status, headers (get() of any case, items()) and the body, to
    be read once.

    Whoever opened it calls close(), in `finally`, whatever was raised; finish() before that if the
    rest of the body is not wanted but short.
    """

    def __init__(self, upstream, line, head):
        self.status, self.headers = head.status, head.headers
        self.upstream, self.line = upstream, line
        self.chunks = Dechunker() if head.chunked else None
        # Bytes of the body that are to come. None: that is not known, as it is in chunks or goes on
        # until the connection ends.
        self.left = head.length
        # Only a body whose end is certain leaves a connection on which the next answer begins.
        # http.client says will_close for one without a length; some servers send a body with 204
        # all the same.
        clean = head.status >= 200 and head.status not in (204, 205, 304)
        self.keep = clean and line.whole and not head.will_close

    def blocks(self):
        """Generates the body's bytes as they arrive, whatever one read brought. UpstreamError
        (timeout, cut, body), ClientGone."""
        coding, peer = self.headers.get("Content-Encoding", "").strip().lower(), self.line.peer
        if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise UpstreamError(
                "%s compresses its answer with %s although it was asked not to: only gzip and "
                "deflate can be read" % (peer, ascii(coding)),
                kind="body",
            )
        try:
            yield from (self.payload() if coding in ("", "identity") else inflate(self.payload()))
        except (zlib.error, ValueError) as error:
            said = (
                "the answer of %s is damaged (%s): a fault there or in a proxy between; try again"
            )
            raise UpstreamError(said % (peer, error), kind="cut", retry=True)

    def payload(self):
        """Generates the body without its framing, what one read brought as one piece."""
        while self.line and self.left != 0:
            most = READ_SIZE if self.left is None else min(self.left, READ_SIZE)
            data = self.line.file.read1(most)
            if not data and (self.chunks or self.left):
                raise self.line.cut("closed by it")
            if self.chunks:
                data = self.chunks.feed(data)
                self.left = 0 if self.chunks.done else None
            elif self.left or not data:  # else it ends with the connection
                self.left = (self.left or 0) - len(data)
            if data:
                yield data

    def read(self, limit=MAX_BODY):
        """The whole body. UpstreamError as in blocks(), and if it has more than `limit` bytes."""
        blocks, size = [], 0
        for block in self.blocks():
            blocks.append(block)
            size += len(block)
            if size > limit:
                raise UpstreamError(
                    "the answer of %s is longer than %d bytes: that is not a chat completion; "
                    "check the base URL" % (self.line.peer, limit),
                    kind="body",
                )
        return b"".join(blocks)

    def finish(self):
        """close(), but first throws away the end of the body if it is there or comes at once: a
        stream is done at its [DONE], and the last chunk, which comes after it, saves the
        connection."""
        if self.line and self.keep:
            self.line.begin(poll_socket, 0.0)
            self.line.deadline = time.monotonic() + DRAIN_SECONDS
            with contextlib.suppress(UpstreamError, ValueError):
                for _ in self.payload():
                    pass
        self.close()

    def close(self):
        """Keeps the connection for the next request if nothing of this answer is left on it, else
        ends it."""
        line, self.line = self.line, None
        surplus = self.chunks and self.chunks.tail
        if line and self.keep and self.left == 0 and not surplus and line.look() == b"":
            self.upstream.keep(line)
        elif line:
            self.upstream.drop(line)


def redirect_target(method, url, reply):
    """The URL that a redirect leads to, "" if it is none to follow.

    Only on the same scheme, host and port, or from http to https on their own ports: the key must
    not go anywhere else. A POST follows only the two that keep it a POST (RFC 9110, 15.4.8 and
    15.4.9).
    """
    if reply.status not in (307, 308) and not (reply.status in (301, 302) and method == "GET"):
        return ""
    target = urllib.parse.urljoin(url, reply.headers.get("Location", "")).partition("#")[0]
    try:
        old, new = url_origin(url), url_origin(target)
    except ValueError:
        return ""
    upgrade = (old, new) == (("http", old[1], 80), ("https", old[1], 443))
    return target if old == new or upgrade else ""


def connect_error(way, error):
    """Why no connection came about, as an UpstreamError."""
    place, words = host_port(way.host, way.port), str(error) or type(error).__name__
    seen = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or words
    untrusted = isinstance(error, ssl.CertificateError) or "CERTIFICATE_VERIFY_FAILED" in words
    if untrusted:
        said = (
            "%s shows a certificate that is not trusted here (%s): if a company proxy or a private "
            "CA signed it, name the CA's file in SSL_CERT_FILE or --ca-bundle (NODE_EXTRA_CA_CERTS "
            "is for Node only)"
        )
    elif isinstance(error, ssl.SSLError):
        said = "no TLS with %s (%s): if it is a plain HTTP server, write http:// in the base URL"
    elif way.proxy:
        place = host_port(*way.proxy)
        said = (
            "the proxy %s cannot be reached (%s): check HTTPS_PROXY and HTTP_PROXY, or name the "
            "host in NO_PROXY"
        )
    elif isinstance(error, (socket.gaierror, UnicodeError)):
        said = (
            "the host name of %s cannot be resolved (%s): check the base URL, the network and any "
            "proxy"
        )
    else:
        said = (
            "%s cannot be reached (%s): check that the server runs and that the base URL is right"
        )
    return UpstreamError(said % (place, seen), kind="connect", retry=not untrusted)


def proxy_refusal(way, status, reason):
    """The proxy's answer to CONNECT, or its 407 to a request, as an UpstreamError."""
    said = (
        "the proxy %s does not connect to %s (%d %s): ask who runs it, or name the host in NO_PROXY"
        % (host_port(*way.proxy), host_port(way.host, way.port), status, ascii(reason)[1:-1])
    )
    if status == 407:
        said = (
            "the proxy %s wants a name and password (407): %s_PROXY needs user:password@ before "
            "its host"
        )
        said %= host_port(*way.proxy), way.scheme.upper()
    return UpstreamError(said, kind="connect", retry=status >= 500)


class Upstream:
    """Connections to providers, kept and shared by all threads.

    ca_bundle: PEM file or folder, trusted besides the system's; client_cert: "cert.pem" or
    "cert.pem,key.pem"; timeout, connect_timeout, idle (for which an unused connection is kept):
    seconds.
    """

    def __init__(
        self,
        timeout=300.0,
        connect_timeout=15.0,
        ca_bundle="",
        client_cert="",
        insecure=False,
        idle=60.0,
    ):
        # connect_timeout is for each address of a name, for the proxy's answer and for TLS anew.
        self.timeout, self.connect_timeout, self.idle = timeout, connect_timeout, idle
        self.ca_bundle, self.client_cert, self.insecure = ca_bundle, client_cert, insecure
        self.lock = threading.Lock()  # for closed, pool and live
        self.closed = False
        self.pool = {}  # Way -> idle lines, the latest used last
        self.live = set()  # every line, idle or in use
        self.ways = {}  # (scheme, host, port) -> (monotonic time until which it holds, Way)
        self.context = None  # the SSLContext, once it was needed
        self.context_lock = threading.Lock()

    def open(self, method, url, headers, body=None, wait=None, timeout=None):
        """Sends a request (body: bytes or None) -> a Reply, once its head has come; redirects on
        one host are followed.

        wait(sock, seconds) is called for every silence: True if the socket can be read, False if
        the seconds are over; sock is None where there is no socket to look at; what it raises
        (ClientGone) ends the connection and comes through. UpstreamError kinds: connect; timeout
        (504: silence of `timeout` seconds); cut; body (cannot be decoded); request (a setting holds
        what HTTP forbids, 500).
        """
        wait, timeout = wait or poll_socket, timeout or self.timeout
        for left in range(MAX_REDIRECTS, -1, -1):
            reply = self.ask(method, url, headers, body, wait, timeout)
            target = redirect_target(method, url, reply)
            if not target or not left:
                return reply
            reply.finish()
            url = target

    def ask(self, method, url, headers, body, wait, timeout):
        """One request -> Reply, whatever its status. UpstreamError, ClientGone."""
        way = self.way_to(url)
        target, fields = request_parts(way, url, headers)
        # First on an idle connection, if there is one; without it, or once it failed, on a new one.
        for kept in (self.kept(way), None):
            line = kept or self.dial(way, wait)
            try:
                if not kept and way.scheme == "https":
                    self.secure(line, wait)
                head = line.ask(method, target, fields, body, wait, timeout)
                if head.status == 407 and way.proxy:
                    raise proxy_refusal(way, 407, "")
                return Reply(self, line, head)
            except BaseException as error:
                self.drop(line)
                # A kept connection was closed just as we took it (RFC 9112, 9.3.1): the one failure
                # after which asking again is surely right.
                if not kept or line.came or getattr(error, "kind", "") != "cut":
                    raise

    def way_to(self, url):
        """The Way to a URL; looked up once a minute, as that reads the whole environment (or the
        Windows registry)."""
        try:
            place = url_origin(url)
        except ValueError:  # its text may hold a part of the URL, and that a password
            raise UpstreamError(
                "the base URL is not one: write it like https://host:port/v1", 500, kind="request"
            )
        until, way = self.ways.get(place, (0, None))
        if until < time.monotonic():
            way = find_way(*place)
            self.ways[place] = time.monotonic() + WAY_SECONDS, way
        return way

    def kept(self, way):
        """An idle line on which the other side has neither hung up nor said anything, or None."""
        self.close_idle()
        while True:
            with self.lock:
                lines = self.pool.get(way)
                line = lines.pop() if lines else None
            if not line or line.look() == b"":
                return line
            self.drop(line)

    def close_idle(self):
        """Ends the connections that were idle too long. The server's accepting thread calls it too,
        so that they end also where no request comes any more."""
        old, before = [], time.monotonic() - self.idle
        with self.lock:
            for lines in self.pool.values():
                while lines and lines[0].since < before:
                    old.append(lines.pop(0))
        for line in old:
            self.drop(line)

    def dial(self, way, wait):
        """A new Line, to the proxy if there is one. UpstreamError of kind connect, ClientGone.

        A thread of its own connects, since to look up a name cannot be interrupted and does not
        look at the client. Whoever cannot wait for it leaves it to close what it made.
        """
        made, failed, left = [], [], []

        def connect():
            try:
                made.append(socket.create_connection(address, self.connect_timeout))
                made[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                made[0].setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                made[0].setblocking(False)
            except (OSError, ValueError) as error:  # ValueError: a host name that is none
                failed.append(error)
            if left:
                close_made()

        def close_made():
            for sock in made:
                sock.close()

        # It tries each address of the name in turn, as urllib does; that is why a name with a dead
        # IPv6 address takes connect_timeout longer.
        address = way.proxy or (way.host, way.port)
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                wait(None, 0)
                thread.join(SLICE_SECONDS)
        except BaseException:
            left.append(True)
            close_made()
            raise
        if failed:
            raise connect_error(way, failed[0])
        line = Line(made[0], way)
        with self.lock:  # either close() finds it among the live ones, or it sees that it is closed
            self.live.add(line)
            closed = self.closed
        if closed:
            self.drop(line)
            raise UpstreamError("this proxy is shutting down", 503, kind="connect")
        return line

    def secure(self, line, wait):
        """TLS with the origin, through the proxy if there is one."""
        way, peer = line.way, line.peer
        if way.proxy:
            line.peer = "the proxy " + host_port(*way.proxy)
            self.tunnel(line, wait)
        line.begin(wait, self.connect_timeout)
        try:
            line.handshake(self.tls(), self.connect_timeout)
        except (OSError, ValueError) as error:
            raise connect_error(way._replace(proxy=None), error)
        line.peer = peer

    def tunnel(self, line, wait):
        """Has the proxy at the other end of `line` connect it to the origin (RFC 9110, 9.3.6)."""
        way, target = line.way, host_port(line.way.host, line.way.port)
        fields = {"Host": target}
        if way.proxy_auth:
            fields["Proxy-Authorization"] = way.proxy_auth
        try:
            head = line.ask("CONNECT", target, fields, None, wait, self.connect_timeout)
        except UpstreamError as error:  # whatever it was, the request itself was not sent yet
            error.kind, error.retry = "connect", True
            raise
        if head.status // 100 != 2:
            raise proxy_refusal(way, head.status, head.reason)

    def tls(self):
        """The one SSLContext, made when it is first needed: loading certificates takes 25 ms, and
        up to Python 3.11 each context does it anew."""
        with self.context_lock:
            self.context = self.context or self.new_context()
            return self.context

    def new_context(self):
        """By the user's settings; their mistakes show here, and not as a fault of the provider."""
        try:
            context = ssl.create_default_context()
            # Python 3.13 turned this on; many company CAs lack the extensions that it asks for.
            context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
            if self.ca_bundle:
                folder = os.path.isdir(self.ca_bundle)
                context.load_verify_locations(**{"capath" if folder else "cafile": self.ca_bundle})
            if self.client_cert:
                context.load_cert_chain(*self.client_cert.split(",", 1))
        except OSError as error:
            raise UpstreamError(
                "the CA bundle %s or the client certificate %s cannot be loaded (%s): it must be a "
                "PEM file"
                % (ascii(self.ca_bundle), ascii(self.client_cert), error.strerror or error),
                500,
                kind="request",
            )
        if self.insecure:  # in this order: ssl refuses not to verify while names are checked
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context

    def keep(self, line):
        """Takes a line back on which nothing is under way. Its last `wait` is forgotten: it knows a
        client, which would be kept as long as the line."""
        line.wait, line.since = None, time.monotonic()
        with self.lock:
            lines = self.pool.setdefault(line.way, [])
            if not self.closed and len(lines) < KEPT_LINES:
                lines.append(line)
                return
        self.drop(line)

    def drop(self, line):
        """Ends a line, whatever its state."""
        with self.lock:
            self.live.discard(line)
        line.end()

    def close(self):
        """Ends every connection; a thread that waits for one gets an UpstreamError (cut)."""
        with self.lock:
            self.closed = True
            self.idle = -1.0  # not even for no time
            for line in self.live:
                try:
                    # Not SSLSocket's own shutdown, which is not for two threads.
                    socket.socket.shutdown(line.sock, socket.SHUT_RDWR)
                except OSError:
                    pass
        self.close_idle()


# ======================================================================================================
# 10  Cache: stored replies, memory and ledger in SQLite; records
# ======================================================================================================

KEY_VERSION = 2  # raise it when the rule below changes, so that older entries are never found again

# Fields of the converted request that do not decide what a right answer is. `stop` is not among them: it decides where
# an answer ends. The limits are, because only answers that ended by themselves are ever stored.
NOT_IN_KEY = frozenset(
    (
        "messages",
        "tools",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "service_tier",
        "store",
        "ANTHROPIC_BASE_URL",
        "ANTHROPIC_MODEL",
    )
)
SHAPE_FIELDS = (
    "thinking",
    "output_config",
    "tool_choice",
    "stop_sequences",
)  # of the client's request
SEND_HINTS = frozenset(
    ("cache_control", "eager_input_streaming")
)  # hints on how to send, on tools and blocks

TOTAL_TOKENS = re.compile(r"<total_tokens>[^<\n]{0,80}</total_tokens>")
MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}\.?"
DATE_LINE = (  # compiled when a request first needs it: most serve without a cache
    r"(?i)((?:today.s date|current date|current time|date has changed|today is)[^\n\d]{0,40}?)(?:"
    r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?(?: ?Z|[+-]\d\d:?\d\d)?)?|\d{1,2}[/.]\d{1,2}[/.]\d{2,4}|"
    r"(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]{0,6},? )?(?:"
    + MONTH
    + r" \d{1,2}(?:st|nd|rd|th)?,? \d{4}|"
    r"\d{1,2} " + MONTH + r",? \d{4}))"
)
DATE_HEADING = "# currentDate\n"
TIME_WORDS = frozenset(
    "today tomorrow yesterday tonight now current currently date dates dated day days daily week weeks weekly month "
    "months monthly year years yearly annual quarter time times timestamp timestamps hour hours clock calendar when "
    "ago since until old older age latest recent recently new newer newest next last deadline due schedule "
    "scheduled expire expires expired expiry changelog release releases released version copyright license licence "
    "morning afternoon evening night noon midnight weekday weekend season birthday anniversary holiday born past future "
    "upcoming minute minutes monday tuesday wednesday thursday friday saturday sunday january february april june july "
    "august september october november december "
    "log journal diary datum tag woche monat jahr uhr heute morgen gestern fecha dia hoy manana ayer jour aujourd "
    "demain hier giorno oggi domani ieri hoje dzis bugun".split()
)
WORD = re.compile(r"[A-Za-z]+")
NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def cache_key(body, sent, mode, model):
    """The sha256 (hex) under which an answer is kept, or None where none may be. Never raises on odd shapes.

    body: the client's Anthropic request; sent: the converted OpenAI request; model: the target (put the upstream's
    host in front where several share one cache). Both modes keep apart what changes an answer's shape: thinking,
    effort, output format, tool choice, stop sequences and every other field sent, but sampling, limits and stream.

    full    What is sent, tool-call ids numbered in order of appearance, because they are made anew in every run.
    prefix  System text, tools, model and the conversation up to and with the last user message, without what differs
            from session to session: billing line, session and call ids, cache_control, text as a string or as a
            block, order of tools and of parallel results, token counters, signatures, and the dates that the client
            itself states in its system text and reminders. The rule that makes it safe:
            1. The whole conversation counts, so "continue", "yes" or "go on" finds an answer only where every earlier
               turn, the model's own and its thinking included, was the same. The first question has no earlier turns:
               this is where another session hits.
            2. Nothing is kept or found while the last user turn has a tool result: the world answered, ask the model.
            3. Dates are set aside only where the client itself states them, not where a reminder quotes a file, and only
               while neither the user nor a CLAUDE.md speaks of time; else they count.
            What is left: an answer may state a date of up to CACHE_TTL ago that nobody asked for.
    none    None.
    """
    parts_of = {"full": full_parts, "prefix": prefix_parts}.get(mode)
    if not (parts_of and isinstance(body, dict) and isinstance(sent, dict)):
        return None
    shape = {name: body[name] for name in SHAPE_FIELDS if body.get(name) is not None}
    settings = {name: value for name, value in sent.items() if name not in NOT_IN_KEY}
    try:
        parts = parts_of(body, sent)
        material = canonical([KEY_VERSION, mode, model, shape, settings, parts])
    except RecursionError:  # nested deeper than we, or json, can follow
        return None
    return None if parts is None else hashlib.sha256(material.encode("ascii")).hexdigest()


def canonical(value):
    """One JSON text for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def call_number(call_id, numbers):
    """The call's number in order of appearance; numbers (id -> int) grows."""
    return numbers.setdefault(str(call_id), len(numbers))


def full_parts(body, sent):
    """Messages and tools as they are sent, but for the ids of tool calls."""
    numbers = {}
    return [
        [number_calls(message, numbers) for message in as_list(sent.get("messages"))],
        sent.get("tools"),
    ]


def number_calls(message, numbers):
    """An OpenAI message whose tool-call ids are numbers; a copy."""
    if not isinstance(message, dict):
        return message
    result = dict(message)
    if "tool_call_id" in result:
        result["tool_call_id"] = call_number(result["tool_call_id"], numbers)
    if result.get("tool_calls"):
        result["tool_calls"] = [
            dict(call, id=call_number(call.get("id"), numbers)) if isinstance(call, dict) else call
            for call in as_list(result["tool_calls"])
        ]
    return result


def blocks_of(content):
    """Content blocks (dicts) of a string or a list; what is neither counts as an unknown block."""
    content = [] if content is None else content if isinstance(content, list) else [content]
    return [
        (
            block
            if isinstance(block, dict)
            else (
                {"type": "text", "text": block}
                if isinstance(block, str)
                else {"type": None, "value": block}
            )
        )
        for block in content
    ]


def prefix_parts(body, sent):
    """System, tools and conversation, normalised as `cache_key` says; None where no answer may be kept."""
    messages = [message for message in as_list(body.get("messages")) if isinstance(message, dict)]
    if not ends_in_question(messages):
        return None
    texts = [
        block.get("text")
        for message in messages
        if message.get("role") == "user"
        for block in blocks_of(message.get("content"))
        if block.get("type") == "text"
    ]
    dated = any(speaks_of_time(own_text(text)) for text in texts if isinstance(text, str))
    numbers = {}
    turns = [turn_part(message, numbers, dated) for message in messages]
    system = [
        without_volatile(without_billing(str(block.get("text", block))), dated)
        for block in blocks_of(body.get("system"))
    ]
    return [
        [text for text in system if text.strip()],
        [turn for turn in turns if turn[1] or turn[2]],
        tool_parts(sent),
    ]


def ends_in_question(messages):
    """True where the conversation ends in a user turn without a tool result."""
    answered = [
        place for place, message in enumerate(messages) if message.get("role") == "assistant"
    ]
    turn = messages[answered[-1] + 1 :] if answered else messages
    kinds = [
        str(block.get("type")) for message in turn for block in blocks_of(message.get("content"))
    ]
    return any(message.get("role") == "user" for message in turn) and not any(
        kind.endswith("tool_result") for kind in kinds
    )


def tool_parts(sent):
    """The tools sent, in one order, as JSON texts: the client changes their order from request to request."""
    return sorted(
        canonical({name: value for name, value in tool.items() if name not in SEND_HINTS})
        for tool in as_list(sent.get("tools"))
        if isinstance(tool, dict)
    )


def without_billing(text):
    return text.partition("\n")[2] if text.startswith(BILLING_LINE) else text


def without_volatile(text, dated):
    """A text that the client wrote itself, without token counters and (unless dated) without today's date."""
    text = TOTAL_TOKENS.sub("", text)
    return text if dated else re.sub(DATE_LINE, r"\1<date>", text)


def reminders(text):
    """A text cut at its reminders: [(is reminder, text), ...]. By split, which stays linear on hostile input."""
    first, *rest = text.split("<system-reminder>")
    pieces = [(False, first)]
    for piece in rest:
        inside, end, after = piece.partition("</system-reminder>")
        pieces += [(bool(end), inside), (False, after)]
    return pieces


def speaks_of_time(text):
    """True where the date can matter to the answer, or the text is not ASCII, which our words cannot judge."""
    return bool(NOT_ASCII.search(text)) or not TIME_WORDS.isdisjoint(
        map(str.lower, WORD.findall(text))
    )


def own_text(text):
    """What the user wrote: the text without reminders, but with the CLAUDE.md files in them."""
    return " ".join(
        piece.partition(DATE_HEADING)[0] if is_reminder else piece
        for is_reminder, piece in reminders(text)
        if not is_reminder or "\nContents of " in piece
    )


def reminder_text(text, dated):
    """A reminder without the client's own date or counter: it comes first, or under the heading of older clients. What comes
    later may be a file that the reminder quotes, and counts to the letter."""
    if TOTAL_TOKENS.sub("", text).strip() == "":
        return ""
    before, heading, own = text.rpartition(DATE_HEADING)
    found = None if dated else re.search(DATE_LINE, own)
    if not found or own[: found.start()].strip() not in ("", "The"):
        return text
    return before + heading + re.sub(DATE_LINE, r"\1<date>", own, 1)


def user_text(text, dated):
    """A user's text, in which only reminders (and a counter standing alone) are normalised."""
    if TOTAL_TOKENS.sub("", text).strip() == "":
        return ""
    if "<system-reminder>" not in text:
        return text
    return "<system-reminder>".join(
        reminder_text(piece, dated) if is_reminder else piece
        for is_reminder, piece in reminders(text)
    )


def turn_part(message, numbers, dated):
    """[role, settings, blocks] of one Anthropic message; parallel tool results in the order of their calls."""
    clean = {"system": without_volatile, "user": user_text}.get(
        str(message.get("role")), lambda text, dated: text
    )
    blocks = [
        block_part(block, numbers, lambda text: clean(text, dated))
        for block in blocks_of(message.get("content"))
    ]
    results = sorted(
        (block for block in blocks if block[0] == "tool_result"), key=lambda block: block[1]
    )
    others = [block for block in blocks if block[0] != "tool_result" and block[1] != ""]
    return [message.get("role"), message.get("output_config"), results + others]


def block_part(block, numbers, clean):
    """[kind, what counts...] of one content block. Images and documents count by their bytes."""
    kind = block.get("type")
    if kind == "text":
        return [kind, clean(str(block.get("text")))]
    if kind == "thinking":
        return [kind, block.get("thinking") or block.get("signature")]
    if kind == "tool_use":
        return [kind, call_number(block.get("id"), numbers), block.get("name"), block.get("input")]
    if kind == "tool_result":
        inner = [block_part(part, numbers, str) for part in blocks_of(block.get("content"))]
        return [
            kind,
            call_number(block.get("tool_use_id"), numbers),
            bool(block.get("is_error")),
            inner,
        ]
    return [kind, {name: value for name, value in block.items() if name not in SEND_HINTS}]


# ---- Cache: one SQLite file; no trouble with it ever reaches a request

SCHEMA_VERSION = (
    20261  # not a small number, so that another program's database is not taken for ours
)
SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS responses
    (key TEXT PRIMARY KEY, size INTEGER, born REAL, used INTEGER, cost_ms REAL, value BLOB);
CREATE INDEX IF NOT EXISTS responses_used ON responses (used);
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER);
INSERT OR IGNORE INTO counters VALUES ('bytes', 0);
CREATE TRIGGER IF NOT EXISTS more AFTER INSERT ON responses
    BEGIN UPDATE counters SET value = value + NEW.size WHERE name = 'bytes'; END;
CREATE TRIGGER IF NOT EXISTS less AFTER DELETE ON responses
    BEGIN UPDATE counters SET value = value - OLD.size WHERE name = 'bytes'; END;
CREATE TABLE IF NOT EXISTS memory (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, value BLOB);
CREATE TABLE IF NOT EXISTS ledger (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT, value BLOB);
CREATE TABLE IF NOT EXISTS lessons (upstream TEXT, model TEXT, value TEXT, PRIMARY KEY (upstream, model));
PRAGMA user_version = %d;
COMMIT;
""" % SCHEMA_VERSION
BUSY_SECONDS = 0.25  # how long a request waits for another process's lock
SLOW_SECONDS = 0.1  # a trouble that took longer than this ...
REST_SECONDS = (
    5  # ... is not met again for so long: waiting requests must not queue up behind each other
)
ROW_BYTES = 200  # what a row costs besides its value: key, index, page slack
MEMORY_ROWS = 20000
LEDGER_ROWS = 20000


def pack(value):
    """Compressed JSON, or None for what JSON cannot hold."""
    try:
        return zlib.compress(json.dumps(value, separators=(",", ":")).encode("ascii"), 6)
    except (TypeError, ValueError, RecursionError):
        return None


def unpack(blob):
    """The value that `packed` made blob of; None for anything else."""
    try:
        return json.loads(zlib.decompress(blob).decode("ascii"))
    except (TypeError, ValueError, RecursionError, zlib.error):
        return None


def storable(text):
    """A text that SQLite can hold: a client's id may contain half a surrogate pair."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


class Cache:
    """Answers by key in `responses.db` in a folder (made 0700, the file 0600), for all threads and several processes.

    folder "" keeps everything in memory. ttl: seconds, 0 keeps nothing; max_bytes: compressed, least recently used go
    first; log(text) hears of each kind of trouble once. The file is opened at the first use. No method raises: while
    the database is locked, full, read-only or broken, everything is a miss; a broken file is moved aside.
    """

    def __init__(self, folder, ttl, max_bytes, now=time.time, log=None):
        self.path = os.path.join(folder, "responses.db") if folder else ":memory:"
        self._ttl, self._max_bytes, self._now, self._log = (
            ttl,
            max_bytes,
            now,
            log or (lambda text: None),
        )
        self._lock = threading.RLock()
        self._db = None
        self._closed = False
        self._rest_until = 0
        self._error = None
        self._told = set()
        self._counts = dict.fromkeys(("hits", "misses", "inserts", "evictions", "saved_ms"), 0)

    def get(self, key):
        """(message, cost_ms), or None. cost_ms: what the answer truly took upstream."""
        if key is None:
            return None
        row = self._run(
            lambda db: db.execute(
                "SELECT value, cost_ms FROM responses WHERE key = ? AND abs(born - ?) < ?",
                (key, self._now(), self._ttl),
            ).fetchone()
        )
        message = unpack(row[0]) if row else None
        if not isinstance(message, dict):
            return self._count(misses=1)
        self._run(
            lambda db: db.execute(
                "UPDATE responses SET used = (SELECT MAX(used) FROM responses) + 1 WHERE key = ?",
                (key,),
            )
        )
        self._count(hits=1, saved_ms=row[1])
        return message, row[1]

    def put(self, key, message, cost_ms):
        """Keep a complete answer (a dict). One too big for the whole cache is left out."""
        value = pack(message)
        if key is None or value is None or len(value) + ROW_BYTES > self._max_bytes:
            return
        row = (key, len(value) + ROW_BYTES, self._now(), float(cost_ms), value)
        evicted = self._run(lambda db: self._store(db, row))
        if evicted is not None:
            self._error = None
            self._count(inserts=1, evictions=evicted)

    def _store(self, db, row):
        """Replace the row and make room for it, as one transaction -> how many others had to go."""
        db.execute("BEGIN IMMEDIATE")
        db.execute("DELETE FROM responses WHERE key = ?", row[:1])
        excess = (
            db.execute("SELECT value FROM counters WHERE name = 'bytes'").fetchone()[0]
            + row[1]
            - self._max_bytes
        )
        gone = []
        for key, size in (
            db.execute("SELECT key, size FROM responses ORDER BY used") if excess > 0 else ()
        ):
            gone.append((key,))
            excess -= size
            if excess <= 0:
                break
        db.executemany("DELETE FROM responses WHERE key = ?", gone)
        db.execute(
            "INSERT INTO responses (key, size, born, used, cost_ms, value) VALUES "
            "(?, ?, ?, COALESCE((SELECT MAX(used) FROM responses), 0) + 1, ?, ?)",
            row,
        )
        db.execute("COMMIT")
        return len(gone)

    def stats(self):
        """Counts since the start, entries and bytes of now; error: the last trouble, None once a put went well."""
        entries, size = self._run(
            lambda db: db.execute(
                "SELECT COUNT(*), (SELECT value FROM counters WHERE name = 'bytes') FROM responses"
            ).fetchone(),
            (0, 0),
        )
        with self._lock:
            counts = dict(self._counts, saved_ms=round(self._counts["saved_ms"]))
        asked = counts["hits"] + counts["misses"]
        return dict(
            counts,
            entries=entries,
            bytes=size,
            hit_rate=round(counts["hits"] / asked, 4) if asked else 0.0,
            ttl=self._ttl,
            max_bytes=self._max_bytes,
            path=self.path,
            error=self._error,
        )

    def clear(self):
        """Forget all answers -> how many. The file shrinks, where no other process is in the way."""
        count = self._run(lambda db: db.execute("DELETE FROM responses").rowcount, 0)
        self._run(
            lambda db: (
                db.execute("VACUUM"),
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone(),
            )
        )
        return count

    def clear_expired(self):
        """Forget answers older than ttl (or from a future that a wrong clock made) -> how many."""
        return self._run(
            lambda db: db.execute(
                "DELETE FROM responses WHERE abs(born - ?) >= ?", (self._now(), self._ttl)
            ).rowcount,
            0,
        )

    def remember(self, call_id, value):
        """Keep the reasoning state (JSON value) that belongs to a tool call; the newest 20,000 stay."""
        self._append("memory", storable(call_id), value, MEMORY_ROWS)

    def recall(self, call_id):
        """What `remember` kept, or None."""
        row = self._run(
            lambda db: db.execute(
                "SELECT value FROM memory WHERE id = ?", (storable(call_id),)
            ).fetchone()
        )
        return unpack(row[0]) if row else None

    def save_row(self, row):
        """Keep a ledger row (dict); the newest 20,000 stay. Made to be a Ledger's `save`."""
        self._append("ledger", storable(row.get("id")), row, LEDGER_ROWS)

    def saved_rows(self, count=1000):
        """Saved ledger rows, newest first."""
        rows = self._run(
            lambda db: db.execute(
                "SELECT value FROM ledger ORDER BY seq DESC LIMIT ?", (count,)
            ).fetchall(),
            [],
        )
        return [row for row in (unpack(blob) for blob, in rows) if row is not None]

    def _append(self, table, row_id, value, limit):
        """Add a row to a table that keeps its newest `limit` rows."""
        blob = pack(value)
        if blob is None:
            return

        def add(db):
            db.execute("BEGIN IMMEDIATE")
            db.execute(
                "INSERT OR REPLACE INTO %s (id, value) VALUES (?, ?)" % table, (row_id, blob)
            )
            db.execute(
                "DELETE FROM %s WHERE seq <= (SELECT MAX(seq) FROM %s) - ?" % (table, table),
                (limit,),
            )
            db.execute("COMMIT")

        self._run(add)

    def lessons(self):
        """{(upstream, model): value} of all that `save_lesson` kept."""
        rows = self._run(
            lambda db: db.execute("SELECT upstream, model, value FROM lessons").fetchall(), []
        )
        return {(upstream, model): json.loads(text) for upstream, model, text in rows}

    def save_lesson(self, upstream, model, value):
        """Keep what was learned (a JSON value) about a model of an upstream; replaces the earlier."""
        row = (storable(upstream), storable(model), json.dumps(value))
        self._run(lambda db: db.execute("INSERT OR REPLACE INTO lessons VALUES (?, ?, ?)", row))

    def forget_lessons(self):
        """-> how many lessons there were."""
        return self._run(lambda db: db.execute("DELETE FROM lessons").rowcount, 0)

    def close(self):
        """Close the file; afterwards everything is a miss."""
        with self._lock:
            self._closed = True
            self._shut()

    def _count(self, **more):
        with self._lock:
            for name, value in more.items():
                self._counts[name] += value

    def _run(self, act, otherwise=None):
        """act(db), or `otherwise` where the database is in trouble: the only place that meets its errors."""
        with self._lock:
            if self._closed or 0 < self._rest_until - self._now() <= REST_SECONDS:
                return otherwise
            start, faults = time.perf_counter(), (ImportError, OSError)
            try:
                import sqlite3  # here, not above: it costs a start some 10 ms, and some Pythons are built without it

                faults += (sqlite3.Error,)
                self._db = self._db or self._opened(sqlite3)
                return act(self._db)
            except faults as error:
                self._shut()
                if time.perf_counter() - start > SLOW_SECONDS:
                    self._rest_until = self._now() + REST_SECONDS
                self._tell(str(error) or type(error).__name__)
                if (
                    type(error).__name__ == "DatabaseError"
                ):  # corrupt; "locked" and "full" are OperationalErrors
                    self._set_aside(sqlite3)
                return otherwise

    def _opened(self, sqlite3):
        """A connection to a database of ours, made where there is none."""
        if self.path != ":memory:":
            os.makedirs(os.path.dirname(self.path) or ".", mode=0o700, exist_ok=True)
            os.close(
                os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            )  # SQLite gives its side files the same mode
        db = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            # In this order: another process makes tables and version in one step, so tables that are seen are marked.
            tables = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if tables and version != SCHEMA_VERSION:
                raise sqlite3.DatabaseError("not a cache of this program or version")
            for pragma in (
                "journal_mode = WAL",
                "synchronous = NORMAL",
                "journal_size_limit = 4194304",
            ):
                db.execute("PRAGMA " + pragma).fetchone()
            if not tables:
                db.executescript(SCHEMA)
        except BaseException:
            db.close()
            raise
        return db

    def _shut(self):
        """Close the connection; what it had begun is rolled back."""
        db, self._db = self._db, None
        try:
            if db:
                db.close()
        except (
            Exception
        ) as error:  # sqlite3.Error, which has no name here; a file that cannot even be closed
            self._tell(str(error))

    def _tell(self, text):
        self._error = text
        if text not in self._told and len(self._told) < 20:
            self._told.add(text)
            self._log("cache %s: %s; requests go on without it" % (self.path, text))

    def _set_aside(self, sqlite3):
        """Move a broken file to responses.db.broken, unless another process has done so by now."""
        try:
            db = self._opened(sqlite3)
            try:
                sound = db.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
            finally:
                db.close()
        except (OSError, sqlite3.Error) as error:
            sound = type(error) is not sqlite3.DatabaseError
        for suffix in () if sound else ("", "-wal", "-shm"):
            try:
                os.replace(self.path + suffix, self.path + ".broken" + suffix)
            except OSError:
                continue  # there is no such side file; or the next opening meets the same trouble and says so


# ---- Ledger: what requests took and cost

PRICE_FIELDS = ("input", "output", "cache_read", "cache_write")
KEPT_MINUTES = 1440
KEPT_SAMPLES = 500  # first-content times kept of a minute, for its median


def prices_from(text_or_path):
    """{model: {input, output, cache_read, cache_write}}, per million tokens, of JSON or of a file that holds it.

    A model may end in "*". cache_read and cache_write cost as much as input where they are not given.
    Raises ValueError, with a sentence for the user.
    """
    text = text_or_path.strip()
    if text and not text.startswith("{"):
        try:
            with open(text, encoding="utf-8-sig") as file:
                text = file.read()
        except (OSError, ValueError) as error:
            raise ValueError(
                "PRICES: cannot read the file %r (%s); give JSON or a path" % (text, error)
            )
    try:
        table = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError("PRICES: not JSON (%s)" % error)
    if not isinstance(table, dict):
        raise ValueError(
            'PRICES: must be an object such as {"model-name": {"input": 1, "output": 2}}'
        )
    return {model: check_price(model, price) for model, price in table.items()}


def check_price(model, price):
    """A whole price row, or ValueError."""
    if "*" in model[:-1]:
        raise ValueError("PRICES: %r: a * may only stand at the end of a model's name" % model)
    if not isinstance(price, dict) or not {"input", "output"} <= set(price) <= set(PRICE_FIELDS):
        raise ValueError(
            "PRICES: %r needs input and output, and may have cache_read and cache_write" % model
        )
    for name, value in price.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
            raise ValueError(
                "PRICES: %r: %s must be a price per million tokens, not %r" % (model, name, value)
            )
    return {name: float(price.get(name, price["input"])) for name in PRICE_FIELDS}


class Sums:
    """Sums over requests; cost counts those whose model has a price."""

    __slots__ = (
        "requests",
        "errors",
        "input",
        "output",
        "cache_read",
        "cache_write",
        "cost",
        "unpriced",
        "first_ms",
    )

    def __init__(self):
        self.requests = self.errors = self.input = self.output = self.cache_read = (
            self.cache_write
        ) = self.unpriced = 0
        self.cost, self.first_ms = 0.0, []

    def add(self, failed, tokens, cost):
        """Count one request; tokens: (input, output, cache_read, cache_write)."""
        self.requests += 1
        self.errors += failed
        self.input += tokens[0]
        self.output += tokens[1]
        self.cache_read += tokens[2]
        self.cache_write += tokens[3]
        if cost is None:
            self.unpriced += 1
        else:
            self.cost += cost

    def figures(self, has_prices):
        """The sums as a dict; cost is None where no request had a price."""
        result = {name: getattr(self, name) for name in self.__slots__ if name != "first_ms"}
        priced = has_prices and (self.requests > self.unpriced or not self.requests)
        return dict(result, cost=round(self.cost, 6) if priced else None)


class Ledger:
    """The last `size` requests, and sums over all of them.

    prices: as `prices_from` gives them; save(row): called for each row, outside the lock (see Cache.save_row).
    """

    def __init__(self, size=1000, prices=None, now=time.time, save=None):
        self._prices, self._now, self.save = prices or {}, now, save
        self._lock = threading.Lock()
        self._rows = collections.deque(maxlen=size)
        self._totals = Sums()
        self._minutes = {}  # minute since the epoch -> Sums
        self._price_of = {}  # model -> its row of prices or None, as found before

    def add(self, row):
        """Keep a row, with its `cost` added (None where the model's price is unknown) -> the row kept.

        row: {time, id, session, asked, model, stream, status, input, output, cache_read, cache_write, first_ms,
        total_ms, bytes_in, bytes_out, retries, lessons, cache, error, broke}; input excludes what came from a cache.
        """
        get = row.get
        tokens = (
            get("input") or 0,
            get("output") or 0,
            get("cache_read") or 0,
            get("cache_write") or 0,
        )
        cost = self._cost(get("model"), tokens) if self._prices else None
        failed = bool(get("error")) or (get("status") or 0) >= 400
        minute = int((get("time") or self._now()) // 60)
        first_ms = get("first_ms")
        row = dict(row, cost=cost)
        with self._lock:
            self._rows.append(row)
            self._totals.add(failed, tokens, cost)
            sums = self._minutes.get(minute) or self._new_minute(minute)
            sums.add(failed, tokens, cost)
            if first_ms is not None and len(sums.first_ms) < KEPT_SAMPLES:
                sums.first_ms.append(first_ms)
        if self.save:
            self.save(row)
        return row

    def price(self, prices):
        """Count with these prices from now on."""
        self._prices, self._price_of = prices, {}

    def restore(self, rows):
        """Take in rows (newest first) that an earlier run saved, where there are none yet."""
        save, self.save = self.save, None
        if not self._rows:
            for row in reversed(rows):
                self.add(row)
        self.save = save

    def _new_minute(self, minute):
        if len(self._minutes) >= KEPT_MINUTES:
            del self._minutes[min(self._minutes)]
        return self._minutes.setdefault(minute, Sums())

    def _cost(self, model, tokens):
        """What a request cost, in the prices' currency; None where its model has no price."""
        price = self._price_of.get(model, ())
        if price == ():
            price = self._price(model)
            if len(self._price_of) < 1000:  # names come from clients
                self._price_of[model] = price
        return price and sum(map(operator.mul, tokens, price)) / 1e6

    def _price(self, model):
        """The model's own prices, else those of the longest name with a * that fits, else None; as PRICE_FIELDS."""
        fits = [
            name for name in self._prices if name.endswith("*") and str(model).startswith(name[:-1])
        ]
        found = model if model in self._prices else max(fits, key=len, default=None)
        return found and tuple(self._prices[found][name] for name in PRICE_FIELDS)

    def rows(self, count=1000):
        """The last rows, newest first."""
        with self._lock:
            rows = list(self._rows)
        return rows[::-1][:count]

    def totals(self):
        """{requests, errors, input, output, cache_read, cache_write, cost or None, unpriced} since the start."""
        with self._lock:
            return self._totals.figures(bool(self._prices))

    def series(self, minutes=60):
        """One dict a minute, oldest first, the running minute last: t (epoch seconds), first_ms (median) and sums."""
        last = int(self._now() // 60)
        with self._lock:
            found = [
                (minute, self._minutes.get(minute) or Sums())
                for minute in range(last - minutes + 1, last + 1)
            ]
            return [
                dict(
                    sums.figures(bool(self._prices)),
                    t=minute * 60,
                    first_ms=(
                        sorted(sums.first_ms)[len(sums.first_ms) // 2] if sums.first_ms else None
                    ),
                )
                for minute, sums in found
            ]


# ---- Why an upstream's prefix cache was lost

GROUPS = {"system": "system", "tool": "tools"}  # first word of a label -> group; else a message


def sections(parts):
    """{"system": [(label, crc)], "tools": [...], "messages": [...]} of [(label, bytes)], in the order sent.

    Labels: "system", "tool NAME" (one part a tool) and "message 3 (user)", counted from 1.
    """
    groups = {"system": [], "tools": [], "messages": []}
    for label, data in parts:
        groups[GROUPS.get(label.split(" ")[0], "messages")].append((label, zlib.crc32(data)))
    return groups


def crcs(listed):
    return [crc for _, crc in listed]


def common_prefix(old, new):
    """How many sections at the front are the same."""
    count = 0
    for (_, before), (_, after) in zip(old, new):
        if before != after:
            break
        count += 1
    return count


def why_broken(old, new):
    """Why `new` (sections) does not go on where `old` stopped, as a text; "" where it does or is a part of it."""
    reasons = []
    if crcs(old["system"]) != crcs(new["system"]):
        reasons.append("system text changed")
    if crcs(old["tools"]) != crcs(new["tools"]):
        reasons.append(tools_broken(old["tools"], new["tools"]))
    return "; ".join(
        reason for reason in reasons + [messages_broken(old["messages"], new["messages"])] if reason
    )


def tools_broken(old, new):
    """ "tools reordered", or "tools changed" with the names that came, went or changed."""
    if sorted(crcs(old)) == sorted(crcs(new)):
        return "tools reordered"
    before, after = dict(old), dict(new)
    changes = (
        ("added", sorted(set(after) - set(before))),
        ("removed", sorted(set(before) - set(after))),
        (
            "edited",
            sorted(name for name in before if name in after and before[name] != after[name]),
        ),
    )
    words = [
        "%s %s"
        % (
            verb,
            ", ".join(label.partition(" ")[2] or label for label in labels[:3])
            + (" and %d more" % (len(labels) - 3) if len(labels) > 3 else ""),
        )
        for verb, labels in changes
        if labels
    ]
    return "tools changed" + (" (%s)" % "; ".join(words) if words else "")


def messages_broken(old, new):
    """Which message changed, or where the history was cut; "" where one list is the front of the other."""
    same = common_prefix(old, new)
    if same in (len(old), len(new)):
        return ""
    if len(new) >= len(old):
        return "%s changed" % new[same][0]
    if not same:
        return "history was replaced (compaction)"
    return "history was cut after %s (compaction)" % new[same - 1][0].partition(" (")[0]


class Sessions:
    """The last sections of each session, least recently used forgotten.

    One session has several lines of requests (main, title, web fetch), so the last few are kept, and a request is
    compared with the one it shares most messages with. Give subagents a session of their own: session plus agent id.
    """

    LINES = 4

    def __init__(self, size=200):
        self._size = size
        self._lock = threading.Lock()
        self._lines = collections.OrderedDict()  # session -> [sections, ...], latest last

    def compare(self, session, new):
        """`why_broken` against the session's earlier request of the same line; remembers `new` (sections) in its place."""
        with self._lock:
            lines = self._lines.pop(session, [])
            related = [line for line in lines if is_related(line, new)]
            old = max(reversed(related), key=lambda line: likeness(line, new), default=None)
            lines = [line for line in lines if line is not old] + [new]
            self._lines[session] = lines[-self.LINES :]
            if len(self._lines) > self._size:
                self._lines.popitem(last=False)
        return "" if old is None else why_broken(old, new)


def is_related(old, new):
    """True where two requests can be of one line: the same first message, or a history under the same system text."""
    return common_prefix(old["messages"][:1], new["messages"][:1]) == 1 or (
        crcs(old["system"]) == crcs(new["system"]) and len(new["messages"]) > 2
    )  # up to 2: a first question


def likeness(old, new):
    """How alike two requests are: (messages shared from the front, same tools)."""
    return common_prefix(old["messages"], new["messages"]), crcs(old["tools"]) == crcs(new["tools"])


# ---- Record and replay

HIDDEN = "<hidden>"
SECRET_NAMES = frozenset(
    (
        "authorization",
        "proxy-authorization",
        "x-api-key",
        "api-key",
        "apikey",
        "api_key",
        "x-goog-api-key",
        "x-auth-token",
        "cookie",
        "set-cookie",
    )
)
SHORTEST_SECRET = 4  # "x" as a key protects nothing, and hiding it would garble every text


def redact(value, secrets=(), depth=60):
    """A copy of a JSON value without values under SECRET_NAMES (also in [name, value] pairs) and secrets in texts.

    Bytes become text. Deeper than `depth` levels a value is hidden whole.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        for secret in sorted(
            (secret for secret in secrets if len(secret or "") >= SHORTEST_SECRET), key=len
        )[::-1]:
            value = value.replace(secret, HIDDEN)
        return value
    if not depth:
        return HIDDEN
    if isinstance(value, dict):
        return {
            redact(name, secrets): redact_item(name, item, secrets, depth - 1)
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and isinstance(value[0], str):
            return [redact(value[0], secrets), redact_item(value[0], value[1], secrets, depth - 1)]
        return [redact(item, secrets, depth - 1) for item in value]
    return value


def redact_item(name, item, secrets, depth):
    """The item redacted; hidden where its name says so. A schema that describes such a field stays."""
    is_secret = str(name).lower() in SECRET_NAMES and not isinstance(item, dict)
    return HIDDEN if is_secret else redact(item, secrets, depth)


def shorten(text, limit=2000):
    """The text's front and how much was left out."""
    return (
        text
        if len(text) <= limit
        else "%s... (%d more characters)" % (text[:limit], len(text) - limit)
    )


class Recorder:
    """Writes each exchange as one JSON file (0600) in a folder (made 0700), redacted. Tells log(text) of trouble once.

    exchange: {time, id, ...anything..., replies: [{status, headers, body}, ...]}, one reply a try upstream.
    """

    def __init__(self, folder, secrets=(), log=None):
        self._folder, self._secrets, self._log, self._told = (
            folder,
            tuple(secrets),
            log or (lambda text: None),
            False,
        )

    def write(self, exchange):
        """-> True where the file is whole."""
        try:
            when = exchange.get("time") or time.time()
            stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(when)) + "-%06d" % (when % 1 * 1e6)
            name = "%s-%s" % (stamp, re.sub(r"[^A-Za-z0-9_-]", "_", str(exchange.get("id")))[:60])
            text = json.dumps(redact(exchange, self._secrets), indent=1, default=str)
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            part = os.path.join(self._folder, name + ".part")
            with open(
                os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
            ) as file:
                file.write(text)
            os.replace(part, os.path.join(self._folder, name + ".json"))
            return True
        except (OSError, TypeError, ValueError, OverflowError, RecursionError) as error:
            if not self._told:
                self._told = True
                self._log("record %s: %s; exchanges are not recorded" % (self._folder, error))
            return False


def read_recording(folder):
    """[{status, headers (dict), body (str)}] of all exchanges in a folder, in order. Raises ValueError, OSError."""
    replies = []
    for name in sorted(name for name in os.listdir(folder) if name.endswith(".json")):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                found = json.load(file)["replies"]
            replies += [
                {
                    "status": int(reply["status"]),
                    "headers": dict(reply.get("headers") or {}),
                    "body": str(reply.get("body") or ""),
                }
                for reply in found
            ]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                "replay: %s is not a recorded exchange (%s: %s)"
                % (name, type(error).__name__, error)
            )
    return replies


# ======================================================================================================
# 11  Proxy: joins the above; Anthropic body in, events out; knows no client socket
# ======================================================================================================

HOLD_SECONDS = 15  # the status waits so long for the first content; then message_start goes out
PING_SECONDS = 5  # between pings in a silence
STALLED = 10  # times TARGET_TIMEOUT without content, though bytes come: given up
SIGN_SECONDS = 240  # of nothing but pings: from now on empty deltas, since the client gives up after 600 s of pings
MENDS = 3  # lessons a request may cost
LONGEST_WAIT = (
    20  # seconds of Retry-After that are waited out here; longer ones the client waits itself
)
MEMORY_CALLS = 5000  # tool calls whose arguments and reasoning are remembered
MEMORY_BYTES = 32 << 20
SMALL_CONTEXT = 30000  # tokens; below it Claude Code is of no practical use
FALLBACK_KINDS = (
    "connect",
    "timeout",
    "cut",
    "overloaded",
    "server",
    "rate",
    "billing",
    "sampling",
)


class Plan(NamedTuple):
    """Where a request goes. family: whose settings were used ("" main, opus, ..., fallback, image)."""

    family: str
    model: str
    base: str
    key: str
    profile: Profile


def plan_request(settings, asked, has_images, profile_of):
    """The Plan for a model name that the client asked for.

    Families are told by their word in the name; a family without settings of its own takes the main ones, and so does
    any other name. profile_of(base, model) -> Profile. Requests with images go to TARGET_MODEL_IMAGE where the plan
    takes none.
    """
    family = next((word for word in FAMILIES if word in asked.lower()), "")
    plan = plan_for(settings, family, profile_of)
    if has_images and settings.target_model_image and not plan.profile.images:
        return plan_for(settings, "image", profile_of)
    return plan


def plan_for(settings, family, profile_of):
    """The Plan of a family: its own model, base and key where they are set. A base of its own never gets the main key."""

    def own(name):
        return getattr(settings, "%s_%s" % (name, family)) if family else ""

    base = own("target_api_base") or settings.target_api_base
    key = own("target_api_key") or (
        settings.target_api_key if base == settings.target_api_base else ""
    )
    model = re.sub(r"\[1m\]$", "", own("target_model") or settings.target_model)
    mine = bool(own("target_model") or own("target_api_base"))
    return Plan(family if mine else "", model, base, key, profile_of(base, model))


def endpoint(base, format, name="messages"):
    """The URL that requests go to; the query of the base (Azure's api-version) stays."""
    parts = urllib.parse.urlsplit(base)
    path = (
        re.sub(r"/v1$", "", parts.path) + "/v1/" + name
        if format == "anthropic"
        else parts.path + "/chat/completions"
    )
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def upstream_headers(plan, settings, client_headers):
    """Headers for the provider: its key in the form that it wants, its constants, and EXTRA_HEADERS."""
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
        "User-Agent": "ccfix/" + __version__,
    }
    if plan.profile.format == "anthropic":
        betas = [
            flag
            for flag in re.split(r"[,\s]+", client_headers.get("anthropic-beta") or "")
            if flag and flag not in plan.profile.betas
        ]
        headers["anthropic-version"] = client_headers.get("anthropic-version") or "2023-06-01"
        if betas:
            headers["anthropic-beta"] = ",".join(betas)
        if plan.key:
            headers["x-api-key"] = plan.key
    if plan.key and plan.profile.key_header == "authorization":
        headers["Authorization"] = "Bearer " + plan.key
    elif plan.key:
        headers[plan.profile.key_header] = plan.key
    headers.update(plan.profile.headers)
    for name, value in settings.extra_headers.items():
        headers.pop(next((known for known in headers if known.lower() == name.lower()), name), None)
        if value is not None:
            headers[name] = str(value)
    return headers


def native_body(body, plan):
    """The body for a provider that speaks Anthropic: as it came, but for the model, what describes the user's machine,
    reasoning of other providers, and what the provider was found to refuse."""
    sent = {
        key: value
        for key, value in body.items()
        if key not in ("metadata", "safeguards") and key not in plan.profile.never
    }
    sent["model"] = plan.model
    if isinstance(body.get("max_tokens"), int) and plan.profile.max_output:
        sent["max_tokens"] = min(body["max_tokens"], plan.profile.max_output)
    if isinstance(sent.get("system"), list):
        sent["system"] = [
            block
            for block in sent["system"]
            if not block_text(as_dict(block)).startswith(BILLING_LINE)
        ]
    messages = [native_message(as_dict(message), plan.profile) for message in body["messages"]]
    sent["messages"] = [
        message
        for message in messages
        if message.get("role") == "system" or message.get("content") not in ([], REMINDER % "")
    ]
    return without_keys(sent, "cache_control") if "cache_control" in plan.profile.never else sent


def native_message(message, profile):
    """A message without thinking blocks that this proxy signed for another provider; a role:system turn becomes a reminder
    where the provider knows no such role."""
    content = message.get("content")
    if message.get("role") == "system" and not profile.system_role:
        text = "\n\n".join(filter(None, map(block_text, as_blocks(content))))
        return {"role": "user", "content": REMINDER % text}
    if isinstance(content, list) and any(
        str(as_dict(block).get("signature")).startswith(STATE_MARK) for block in content
    ):
        return dict(
            message,
            content=[
                block
                for block in content
                if not str(as_dict(block).get("signature")).startswith(STATE_MARK)
            ],
        )
    return message


def with_extra_body(sent, settings):
    """The body for the provider, changed in place by EXTRA_BODY."""
    for name, value in settings.extra_body.items():
        sent.pop(name, None)
        if value is not None:
            sent[name] = value
    return sent


def without_keys(value, name):
    """A copy of a JSON value without the dict entries of one name."""
    if isinstance(value, dict):
        return {key: without_keys(part, name) for key, part in value.items() if key != name}
    return [without_keys(part, name) for part in value] if isinstance(value, list) else value


def payload_of(sent):
    """(the request's JSON bytes, [(label, bytes)] of its parts): encoded once, in pieces, so that the pieces can be compared
    with those of the session's last request."""
    messages, tools = as_list(sent.get("messages")), as_list(sent.get("tools"))
    encoded = [compact_json(message).encode() for message in messages]
    parts = [
        ("message %d (%s)" % (position, as_dict(message).get("role")), part)
        for position, (message, part) in enumerate(zip(messages, encoded))
    ]
    head = {key: value for key, value in sent.items() if key not in ("messages", "tools")}
    pieces = [compact_json(head).encode()[:-1], b',"messages":['] + join_pieces(encoded)
    if tools:
        names = [compact_json(tool).encode() for tool in tools]
        pieces += [b'],"tools":['] + join_pieces(names)
        parts = [
            (
                "tool "
                + str(
                    as_dict(as_dict(tool).get("function")).get("name") or as_dict(tool).get("name")
                ),
                part,
            )
            for tool, part in zip(tools, names)
        ] + parts
    if isinstance(sent.get("system"), (str, list)):
        parts = [("system", compact_json(sent["system"]).encode())] + parts
    elif parts and messages and as_dict(messages[0]).get("role") == "system":
        first = next(
            position for position, part in enumerate(parts) if part[0].startswith("message 0")
        )
        parts[first] = ("system", parts[first][1])
    return b"".join(pieces + [b"]}"]), parts


def join_pieces(pieces):
    """The pieces with commas between."""
    return [part for piece in pieces for part in (b",", piece)][1:]


class Memory(object):
    """What is remembered of tool calls, by tool id: a bounded dict, the least recently used go first. Thread-safe."""

    def __init__(self, store=None):
        self.notes, self.size, self.lock, self.store = (
            collections.OrderedDict(),
            0,
            threading.Lock(),
            store,
        )

    def keep(self, notes):
        with self.lock:
            for call_id, note in notes.items():
                size = 200 + sum(
                    len(part) if isinstance(part, str) else 1000 for part in note.values()
                )
                self.size -= self.notes.pop(call_id, (None, 0))[1]
                self.notes[call_id] = (note, size)
                self.size += size
            while len(self.notes) > MEMORY_CALLS or self.size > MEMORY_BYTES:
                self.size -= self.notes.popitem(last=False)[1][1]
        if self.store:
            for call_id, note in notes.items():
                self.store.remember(call_id, note)

    def recall(self, call_id):
        """The note of a call, or {}."""
        with self.lock:
            known = self.notes.get(call_id)
            if known:
                self.notes.move_to_end(call_id)
        if known or not self.store:
            return known[0] if known else {}
        return as_dict(self.store.recall(call_id))


class Flight(object):
    """A reply that several identical requests wait for."""

    __slots__ = ("landed", "message")

    def __init__(self):
        self.landed, self.message = threading.Event(), None


class Proxy(object):
    """What all requests share: settings, connections, lessons, memory, cache and ledger.

    config(): the Settings of now. log(level, text). new_id() -> a fresh hex text.
    """

    def __init__(self, config, log, new_id=lambda: "%024x" % random.getrandbits(96), now=time.time):
        self.config, self.log, self.new_id, self.now = config, log, new_id, now
        self.started, self.lock, self.active = now(), threading.Lock(), 0
        self.store, self.memory, self.recorder, self.ledger, self.sessions = (
            None,
            Memory(),
            None,
            Ledger(now=now),
            Sessions(),
        )
        self.lessons = {}  # (base, model) -> {profile field: value}
        self.found = {}  # (base, model) -> {"owner", "context"}: what the provider tells of itself
        self.flights, self.memo, self.rows, self.wires = (
            {},
            {},
            {},
            None,
        )  # rows: profile_for's answers
        self.seen = None  # the Settings that store, ledger and recorder were made from
        self.follow(config())

    def settings(self):
        """The Settings of now; store, ledger and recorder follow a change of them."""
        settings = self.config()
        if settings is not self.seen:
            try:
                self.follow(settings)
            except ValueError as e:
                self.log("warning", "PRICES cannot be used, the old ones stay: %s" % e)
        return settings

    def follow(self, settings):
        """Make anew what depends on settings that changed. Raises ValueError for prices that cannot be used."""
        with self.lock:
            old, self.seen = self.seen, settings

            def changed(*names):
                return old is None or any(
                    getattr(old, name) != getattr(settings, name) for name in names
                )

            if changed("cache_enabled", "ledger", "cache_dir", "cache_ttl", "cache_max_mb"):
                self.open_store(settings)
            if changed("record_dir"):
                self.recorder = (
                    Recorder(settings.record_dir, settings.secrets(), self.warn)
                    if settings.record_dir
                    else None
                )
            if changed("prices"):
                self.ledger.price(prices_from(settings.prices) if settings.prices else {})

    def open_store(self, settings):
        """Open the Cache in CACHE_DIR where the user asked for the cache or the ledger, or named the folder: nothing is
        written otherwise."""
        if self.store:
            self.store.close()
        wanted = (
            settings.cache_enabled or settings.ledger or settings.origins["cache_dir"] != "default"
        )
        self.store = (
            Cache(
                settings.cache_dir, settings.cache_ttl, settings.cache_max_mb << 20, log=self.warn
            )
            if wanted
            else None
        )
        self.memory.store = self.store
        self.ledger.save = self.store.save_row if self.store and settings.ledger else None
        if self.store:
            self.lessons.update(
                {tuple(key): as_dict(value) for key, value in self.store.lessons().items()}
            )
            self.ledger.restore(self.store.saved_rows() if settings.ledger else ())

    def warn(self, text):
        self.log("warning", text)

    def upstream(self, settings):
        """The shared connections; made anew when a setting about TLS changed."""
        made = (settings.ca_bundle, settings.client_cert, settings.insecure)
        with self.lock:
            if self.wires is None or self.wires[0] != made:
                self.wires = (
                    made,
                    Upstream(
                        settings.target_timeout,
                        ca_bundle=made[0],
                        client_cert=made[1],
                        insecure=made[2],
                    ),
                )
            return self.wires[1]

    def profile_of(self, settings):
        """(base, model) -> Profile, with what was found and learned, and with the user's own limits."""

        def profile(base, model):
            found = self.found.get((base, model), {})
            key = (
                base,
                model,
                settings.profile,
                settings.target_format if base == settings.target_api_base else "auto",
                found.get("owner", ""),
            )
            row = self.rows.get(key) or self.rows.setdefault(key, profile_for(*key))
            if found.get("context") and not row.context:
                row = row._replace(context=found["context"])
            row = apply_lesson(row, self.lessons.get((base, model)))
            limits = {"max_output": settings.max_output, "context": settings.max_context}
            return row._replace(**{field: value for field, value in limits.items() if value})

        return profile

    def teach(self, plan, changes):
        """Remember lessons about a plan's provider and model."""
        key = (plan.base, plan.model)
        with self.lock:
            self.lessons[key] = dict(self.lessons.get(key, {}), **changes)
        if self.store:
            self.store.save_lesson(plan.base, plan.model, self.lessons[key])
        for field, value in changes.items():
            self.log("info", "learned about %s: %s" % (plan.model, lesson_text(field, value)))

    def forget(self):
        """Forget all lessons -> how many."""
        with self.lock:
            count = sum(map(len, self.lessons.values()))
            self.lessons.clear()
        if self.store:
            self.store.forget_lessons()
        return count

    def probe(self, plan, wait=None):
        """Ask the provider once what it tells for free: who it is, and the model's context window. Never raises."""
        try:
            found = ask_provider(
                self.upstream(self.settings()),
                plan,
                upstream_headers(plan, self.settings(), {}),
                wait,
            )
            self.found[(plan.base, plan.model)] = found
            if 0 < found["context"] < SMALL_CONTEXT:
                self.log(
                    "warning",
                    "%s has a context window of %d tokens; Claude Code's first request alone has about 13,000"
                    % (plan.model, found["context"]),
                )
        except (ProxyError, ClientGone, ValueError, KeyError, TypeError) as e:
            self.log("debug", "the provider was not asked about itself: %s" % e)

    @contextlib.contextmanager
    def counted(self):
        """Counts a request as active while it lasts."""
        with self.lock:
            self.active += 1
        try:
            yield
        finally:
            with self.lock:
                self.active -= 1

    # -- the small endpoints

    def models(self, settings):
        """Anthropic's model list: the families, and the disguise or target, under names that Claude Code accepts."""
        plans = [
            (family, plan_for(settings, family, self.profile_of(settings))) for family in FAMILIES
        ]
        rows = [("claude-" + family, "%s (%s)" % (plan.model, family)) for family, plan in plans]
        shown = settings.disguise_model or settings.target_model
        rows.insert(
            0,
            (
                shown if shown.startswith(("claude", "anthropic")) else "claude-" + shown,
                settings.target_model,
            ),
        )
        data = [
            {
                "type": "model",
                "id": name,
                "display_name": title,
                "description": "through ccfix",
                "created_at": "2025-01-01T00:00:00Z",
            }
            for name, title in rows
        ]
        return {
            "data": data,
            "has_more": False,
            "first_id": data[0]["id"],
            "last_id": data[-1]["id"],
        }

    def count_tokens(self, body, headers, wait=None):
        """{"input_tokens"}: the provider's own count where it speaks Anthropic, else an estimate."""
        if not isinstance(body.get("messages"), list):
            raise BadRequest("messages: a list is required")
        settings = self.settings()
        plan = plan_request(settings, str(body.get("model")), False, self.profile_of(settings))
        if plan.profile.format == "anthropic":
            try:
                reply = self.upstream(settings).open(
                    "POST",
                    endpoint(plan.base, "anthropic", "messages/count_tokens"),
                    upstream_headers(plan, settings, headers),
                    compact_json(
                        {
                            key: value
                            for key, value in native_body(body, plan).items()
                            if key not in ("max_tokens", "stream")
                        }
                    ).encode(),
                    wait,
                    timeout=10,
                )
                try:
                    answer = as_dict(json_or_none(reply.read(1 << 20)))
                finally:
                    reply.close()
                if reply.status == 200 and isinstance(answer.get("input_tokens"), int):
                    return {"input_tokens": answer["input_tokens"]}
            except ProxyError as e:
                self.log("debug", "count_tokens of the provider failed: %s" % e)
        return {"input_tokens": estimate_tokens(body)}

    def status(self, address=""):
        """What GET /stats tells; the status page shows it."""
        settings = self.settings()
        plan = plan_for(settings, "", self.profile_of(settings))
        routes = [
            plan_for(settings, family, self.profile_of(settings))
            for family in FAMILIES + ("fallback", "image")
        ]
        shown = self.store.stats() if self.store and settings.cache_enabled else {}
        lessons = [
            {
                "upstream": urllib.parse.urlsplit(base).netloc.rpartition("@")[2],
                "model": model,
                "field": field,
                "value": value,
                "text": lesson_text(field, value),
            }
            for (base, model), changes in list(self.lessons.items())
            for field, value in changes.items()
        ]
        return {
            "name": "ccfix",
            "version": __version__,
            "time": self.now(),
            "uptime_s": round(self.now() - self.started, 1),
            "address": address,
            "proxy_key": bool(settings.anthropic_api_key),
            "demo": plan.profile.name == "demo",
            "target": {
                "model": plan.model,
                "api_base": without_password(plan.base),
                "profile": plan.profile.name,
                "format": plan.profile.format,
                "context": plan.profile.context,
                "max_output": plan.profile.max_output,
            },
            "disguise": {"model": settings.disguise_model, "api_base": settings.disguise_api_base},
            "routes": [
                {"family": row.family, "model": row.model, "api_base": without_password(row.base)}
                for row in routes
                if row.family
            ],
            "connect": dict(connect_lines(address, bool(settings.anthropic_api_key))),
            "totals": dict(self.ledger.totals(), active=self.active),
            "series": self.ledger.series(),
            "requests": self.ledger.rows(100),
            "lessons": lessons,
            "cache": dict(
                shown,
                enabled=settings.cache_enabled,
                mode=settings.cache_key_mode,
                ttl=settings.cache_ttl,
            ),
            "settings": settings.shown(),
        }


def ask_provider(upstream, plan, headers, wait=None):
    """{"owner", "context", "models"} from /models, and from /props (llama.cpp) or /api/ps (Ollama) where the owner is known."""

    def ask(url):
        reply = upstream.open("GET", url, headers, None, wait, timeout=5)
        try:
            return as_dict(json_or_none(reply.read(4 << 20))) if reply.status == 200 else {}
        finally:
            reply.close()

    rows = [
        row
        for row in as_list(ask(plan.base.partition("?")[0] + "/models").get("data"))
        if isinstance(row, dict)
    ]
    mine = next(
        (row for row in rows if row.get("id") == plan.model), rows[0] if len(rows) == 1 else {}
    )
    top = as_dict(mine.get("top_provider"))
    limits = as_dict(as_dict(mine.get("capabilities")).get("limits"))
    context = (
        positive_int(
            mine, "max_model_len", "context_length", "context_window", "max_context_length"
        )
        or positive_int(limits, "max_prompt_tokens")
        or positive_int(top, "context_length")
    )
    owner = str(mine.get("owned_by") or (rows[0].get("owned_by") if rows else "") or "")
    parts = urllib.parse.urlsplit(plan.base)
    origin = "%s://%s" % (parts.scheme, parts.netloc)
    if owner == "llamacpp":
        context = (
            positive_int(
                as_dict(ask(origin + "/props").get("default_generation_settings")), "n_ctx"
            )
            or context
        )
    elif OWNERS.get(owner) == "ollama":
        running = [as_dict(row) for row in as_list(ask(origin + "/api/ps").get("models"))]
        context = (
            next(
                (
                    positive_int(row, "context_length")
                    for row in running
                    if row.get("name") == plan.model
                ),
                0,
            )
            or context
        )
    return {"owner": owner, "context": context, "models": [str(row.get("id")) for row in rows]}


def connect_lines(address, has_key):
    """(shell, the lines to paste) that connect Claude Code to this proxy."""
    key = "YOUR_PROXY_KEY" if has_key else "ccfix"
    return (
        (
            "bash",
            [
                "export ANTHROPIC_BASE_URL=%s" % address,
                "export ANTHROPIC_AUTH_TOKEN=%s" % key,
                "claude",
            ],
        ),
        (
            "powershell",
            [
                '$env:ANTHROPIC_BASE_URL="%s"' % address,
                '$env:ANTHROPIC_AUTH_TOKEN="%s"' % key,
                "claude",
            ],
        ),
    )


class Exchange(object):
    """One client request, from the parsed body to the last event.

    batches() generates SSE text, one piece for all that one read of the provider's reply brought; message() is the
    unstreamed answer. wait(sock, seconds) waits for the client as well and writes what silence() gives meanwhile.
    """

    def __init__(self, proxy, body, headers, wait, clock=time.monotonic, settings=None, id=""):
        self.proxy, self.body, self.headers, self.wait, self.clock = (
            proxy,
            body,
            headers,
            wait,
            clock,
        )
        self.settings = settings or proxy.settings()
        self.id, self.stream = id or proxy.new_id(), body.get("stream") is True
        self.asked = re.sub(r"\[1m\]$", "", str(body.get("model") or ""))
        self.shown = self.settings.disguise_model or self.asked or self.settings.target_model
        with_images = bool(self.settings.target_model_image) and has_images(body)
        self.plan = plan_request(
            self.settings, self.asked, with_images, proxy.profile_of(self.settings)
        )
        self.translator, self.cache_state, self.flight, self.key, self.reply = (
            None,
            "off",
            None,
            None,
            None,
        )
        self.retries, self.mends, self.room, self.learned, self.replies = 0, 0, 0, [], []
        self.bytes_in = self.bytes_out = 0
        self.began = self.last_write = self.last_sign = clock()
        self.first_ms, self.broke, self.sent = None, "", None

    # -- what goes out

    def batches(self):
        """SSE text, to be written as it comes; "" where a read of the provider made none. Raises ProxyError only before the first
        batch, Dropped in the middle."""
        out = []
        for event in self.events():
            if event is not None:
                out.append(encode_event(event))
            elif out:
                self.last_write = self.last_sign = self.clock()
                if self.first_ms is None:
                    self.first_ms = (self.last_write - self.began) * 1000
                text = "".join(out)
                self.bytes_out += len(text)
                yield text
                out = []
            else:
                yield ""
        if out:
            yield "".join(out)

    def flowing(self):
        """The provider's Reply while its stream is coming and its content is going out, so that nothing is tried again; else None."""
        return None

    def message(self):
        """The whole answer as one message. Raises ProxyError."""
        try:
            events, seen = [], 0
            for event in self.events():
                if event is not None:
                    events.append(event)
                elif len(events) > seen:
                    seen, self.last_sign = len(events), self.clock()
        except Dropped as dropped:
            raise dropped.args[0]
        self.first_ms = (self.clock() - self.began) * 1000
        return fold(events)

    def silence(self):
        """SSE text to write in a silence, or "": after 15 s message_start, then pings, and after minutes a sign of life."""
        now = self.clock()
        if now - self.last_sign > STALLED * self.settings.target_timeout:
            raise UpstreamError(
                "The provider keeps the connection alive, but sent no content for %d s; try again, or raise TARGET_TIMEOUT."
                % (now - self.last_sign),
                504,
                kind="timeout",
            )
        if not self.stream or self.translator is None or self.translator.state in (DONE, FAILED):
            return ""
        if self.translator.state == IDLE:
            if now - self.began < HOLD_SECONDS:
                return ""
            events = list(self.translator.start()) + [PING]
        elif now - self.last_write < PING_SECONDS:
            return ""
        else:
            events = (
                list(self.translator.idle()) if now - self.last_sign >= SIGN_SECONDS else [PING]
            )
        self.last_write = now
        return "".join(map(encode_event, events))

    # -- where it comes from

    def events(self):
        """Event dicts, and None where all that has arrived is given: from the cache, a search, or the provider."""
        check_messages(self.body)
        if is_search(self.body) and not self.plan.profile.scope.endswith(
            "api.anthropic.com"
        ):  # which searches itself
            yield from self.replayed(search_message(self), None)
            return
        hit = self.from_cache() if self.settings.cache_enabled else None
        if hit:
            yield from self.replayed(hit, self.proxy.new_id)
        elif self.flight is None:
            yield from self.from_provider()
        else:
            yield from self.kept(self.from_provider())

    def kept(self, events):
        """The events, as they come; a complete answer is stored, and given to those who asked the same meanwhile."""
        seen = []
        try:
            for event in events:
                seen.append(event)
                yield event
            self.store_answer([event for event in seen if event is not None])
        finally:
            with self.proxy.lock:
                self.proxy.flights.pop(self.key, None)
            self.flight.landed.set()

    def replayed(self, message, new_id):
        """A finished message as events, under today's name and a fresh id, with token counts at zero."""
        zero = {
            "input_tokens": 0,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }
        events = unfold(dict(message, id="msg_" + self.id, model=self.shown, usage=zero), new_id)
        if self.translator is not None and self.translator.state == OPEN:
            next(events)  # message_start has gone out in the silence
        yield from events
        yield None

    def from_provider(self):
        """Try until an answer comes, mending, waiting and falling back as errors ask for; nothing is tried twice once content went out."""
        while True:
            try:
                yield from self.attempt()
                return
            except UpstreamError as error:
                error.message = without_secrets(
                    error.message, self.settings.secrets()
                )  # some providers quote the key
                self.error, translator = error, self.translator
                if translator.content or not self.again(error):
                    if error.status in (429, 529):
                        error.headers.setdefault(
                            "retry-after", "5"
                        )  # the provider named no time; the client waits longer each time
                    yield from translator.fail(
                        self.sized(error)
                    )  # raises the error where the status is still free
                    yield None
                    return

    error = None

    def sized(self, error):
        """An overflow error with the numbers that the provider's words left out: the client compacts by them."""
        if error.kind != "overflow" or not error.text or (error.numbers[0] and error.numbers[2]):
            return error
        return overflow_error(
            error.numbers[0], error.numbers[2], self.bytes_in // 4, self.plan.profile.context
        )

    def attempt(self):
        """One request to the provider, translated."""
        plan, proxy = self.plan, self.proxy
        begun = self.translator is not None and self.translator.state == OPEN
        native = plan.profile.format == "anthropic"
        estimate = self.bytes_in // 4
        self.translator = (RelayTranslator if native else StreamTranslator)(
            "msg_" + self.id,
            self.shown,
            plan.profile,
            estimate,
            tools=None if native else tool_names(self.body),
            taken=() if native else used_ids(self.body),
            new_id=proxy.new_id,
            begun=begun,
        )
        self.sent = sent = self.request_body()
        payload, parts = payload_of(sent)
        if not self.retries + self.mends and len(parts) > 1:
            session = "%s %s" % (
                self.headers.get("x-claude-code-session-id") or "",
                self.headers.get("x-claude-code-agent-id") or "",
            )
            self.broke = (
                proxy.sessions.compare(session + plan.model, sections(parts))
                if session.strip()
                else ""
            )
        reply = proxy.upstream(self.settings).open(
            "POST",
            endpoint(plan.base, plan.profile.format),
            upstream_headers(plan, self.settings, self.headers),
            payload,
            self.wait,
            self.settings.target_timeout,
        )
        try:
            if reply.status >= 300:
                raw = reply.read(1 << 20)
                self.note_reply(reply, raw)
                raise refusal(reply, raw, plan)
            yield from (
                self.recorded(reply) if proxy.recorder else self.translated(reply, reply.blocks())
            )
        finally:
            self.reply = None
            reply.close()
        proxy.memory.keep(self.translator.memory)

    def request_body(self):
        """The body for the provider, with EXTRA_BODY applied."""
        plan, settings = self.plan, self.settings
        if plan.profile.format == "anthropic":
            sent = native_body(self.body, plan)
        else:
            attach = None
            if settings.attach_fields == "always" or (
                settings.attach_fields == "auto" and not plan.profile.strict
            ):
                attach = {
                    "ANTHROPIC_BASE_URL": settings.disguise_api_base,
                    "ANTHROPIC_MODEL": self.shown,
                }
            sent = to_openai(
                self.body,
                plan.model,
                plan.profile,
                attach,
                self.proxy.memory.recall,
                self.proxy.memo,
                self.output_room(),
            )
        return with_extra_body(sent, settings)

    def output_room(self):
        """Output tokens that fit beside the prompt where the context window is known, else 0. The prompt is taken larger
        than it is: a third of a token a byte, or what the provider was seen to count."""
        profile = self.plan.profile
        if self.room or not profile.context:
            return self.room
        return max(1024, profile.context - int(self.bytes_in * profile.density) - 64)

    def translated(self, reply, blocks):
        """Events of a reply with a good status: SSE or JSON, whatever was asked for and whatever its content type says."""
        translator, head = self.translator, first_bytes(blocks)
        start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if start in (b"{", b"[", b"<"):
            yield from translator.feed(whole_reply(read_all(head, blocks), start, self.plan))
            translator.ended = True
        else:
            self.reply = reply
            for payload in sse_payloads(itertools.chain([head], blocks)):
                if payload is None:
                    yield None
                elif payload == "[DONE]":
                    translator.done()
                    break
                else:
                    yield from translator.feed(chunk_of(payload))
            self.reply = None
        yield from translator.finish()
        yield None
        reply.finish()

    def recorded(self, reply):
        """The same, with all that came kept for the record, also where the reply breaks off."""
        kept = []

        def blocks():
            for block in reply.blocks():
                kept.append(block)
                yield block

        try:
            yield from self.translated(reply, blocks())
        finally:
            self.note_reply(reply, b"".join(kept))

    def note_reply(self, reply, raw):
        if self.proxy.recorder:
            self.replies.append(
                {
                    "status": reply.status,
                    "headers": dict(reply.headers.items()),
                    "body": raw.decode("utf-8", "replace"),
                }
            )

    # -- again?

    def again(self, error):
        """Whether to try once more after an error before any content: a lesson was learned, a wait is worth it, or another
        model takes over."""
        if self.mends < MENDS and self.mend(error):
            self.mends += 1
            return True
        wait = str(error.headers.get("retry-after") or "0")
        wait = int(wait) if wait.isdigit() else 0
        if error.retry and self.retries < self.settings.target_retries and wait <= LONGEST_WAIT:
            self.retries += 1
            self.proxy.log(
                "info", "%s: try %d after: %s" % (self.id, self.retries + 1, error.message)
            )
            self.wait(None, max(wait, 0.4 * 2**self.retries * random.uniform(0.6, 1.2)))
            return True
        if (
            error.kind in FALLBACK_KINDS
            and self.plan.family != "fallback"
            and self.settings.target_model_fallback
        ):
            self.plan, self.room = (
                plan_for(self.settings, "fallback", self.proxy.profile_of(self.settings)),
                0,
            )
            self.proxy.log(
                "warning", "%s: %s takes over after: %s" % (self.id, self.plan.model, error.message)
            )
            self.retries = 0
            return True
        return False

    def mend(self, error):
        """Learn from an error -> whether there is something new to try."""
        changes, self.room = (
            room_after(error, self.plan.profile, self.bytes_in)
            if self.room == 0
            else ({}, self.room)
        )
        changes = changes or learn(error, self.plan.profile, self.sent or {})
        if not changes:
            return False
        self.learned += [lesson_text(field, value) for field, value in changes.items()]
        self.proxy.teach(self.plan, changes)
        self.plan = self.plan._replace(profile=apply_lesson(self.plan.profile, changes))
        if changes.get("images") is False and self.settings.target_model_image:
            self.plan = plan_for(self.settings, "image", self.proxy.profile_of(self.settings))
        return True

    # -- cache

    def from_cache(self):
        """A stored answer, or that of an identical request in flight; None: ask the provider (and let others wait for it)."""
        proxy = self.proxy
        sent = to_openai(self.body, self.plan.model, self.plan.profile, None, None, proxy.memo)
        sent = with_extra_body(sent, self.settings)
        self.key = cache_key(
            self.body,
            sent,
            self.settings.cache_key_mode,
            "%s %s" % (self.plan.base, self.plan.model),
        )
        if self.key is None:
            return None
        self.cache_state = "miss"
        hit = proxy.store.get(self.key) if proxy.store else None
        if hit:
            self.cache_state = "hit"
            return hit[0]
        with proxy.lock:
            flight = proxy.flights.get(self.key)
            if flight is None:
                self.flight = proxy.flights[self.key] = Flight()
                return None
        self.translator = StreamTranslator(
            "msg_" + self.id, self.shown, self.plan.profile, self.bytes_in // 4
        )  # for the pings
        while not flight.landed.is_set():
            self.wait(None, 0.05)
            self.last_sign = self.clock()
        if flight.message:
            self.cache_state = "hit"
        return flight.message

    def store_answer(self, events):
        """Store a complete answer; nothing that broke off, was cut by a limit, or is empty."""
        if not events or events[-1]["type"] != "message_stop":
            return
        message = fold(events)
        if (
            message.get("stop_reason") in ("end_turn", "tool_use", "stop_sequence")
            and message["content"]
        ):
            self.flight.message = message
            if (
                self.proxy.store and self.plan.family != "fallback"
            ):  # the main model's place is not taken for long
                self.proxy.store.put(self.key, message, (self.clock() - self.began) * 1000)

    # -- what is noted

    def broken_by(self):
        """What broke the answer off after it had begun, or ""."""
        return self.error.message if self.error and self.translator.state == FAILED else ""

    def close(self, status, error=""):
        """Note the exchange in the ledger, the log and the record. status: what the client got; error: its text."""
        usage = self.translator.usage_now() if self.translator and self.translator.content else {}
        row = {
            "time": self.proxy.now(),
            "id": self.id,
            "session": self.headers.get("x-claude-code-session-id") or "",
            "asked": self.asked,
            "model": self.plan.model,
            "stream": self.stream,
            "status": status,
            "input": usage.get("input_tokens", 0),
            "output": usage.get("output_tokens", 0),
            "cache_read": usage.get("cache_read_input_tokens", 0),
            "cache_write": usage.get("cache_creation_input_tokens", 0),
            "first_ms": self.first_ms and round(self.first_ms, 1),
            "total_ms": round((self.clock() - self.began) * 1000, 1),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "retries": self.retries,
            "lessons": self.learned,
            "cache": self.cache_state,
            "error": error,
            "broke": self.broke,
        }
        self.proxy.ledger.add(row)
        self.proxy.log(
            "error" if status >= 500 else "info",
            "%(id)s %(asked)s -> %(model)s stream=%(stream)s %(status)s in=%(input)s+%(cache_read)s "
            "out=%(output)s first=%(first_ms)sms total=%(total_ms)sms cache=%(cache)s" % row
            + (" retries=%d" % self.retries if self.retries else "")
            + (" prefix lost: " + self.broke if self.broke else "")
            + (" error: " + error if error else ""),
        )
        if self.settings.log_level == "debug":
            seen = {
                "headers": dict(self.headers.items()),
                "request": without_person(self.body),
                "sent": self.sent,
                "error": error,
            }
            self.proxy.log(
                "debug",
                self.id
                + " "
                + compact_json(shorten_strings(redact(seen, self.settings.secrets()))),
            )
        if self.proxy.recorder:
            self.proxy.recorder.write(
                {
                    "time": row["time"],
                    "id": self.id,
                    "row": row,
                    "request": without_person(self.body),
                    "sent": self.sent,
                    "client_headers": dict(self.headers.items()),
                    "replies": self.replies,
                }
            )


def without_secrets(text, secrets):
    """text with every secret in it hidden."""
    for secret in secrets:
        if len(secret) >= 4:
            text = text.replace(secret, "<hidden>")
    return text


def without_person(body):
    """A request for a record, without what tells who and where the user is."""
    return {
        key: "<hidden>" if key in ("metadata", "safeguards") else value
        for key, value in body.items()
    }


def shorten_strings(value, limit=500):
    """A JSON value with long texts cut, for the log."""
    if isinstance(value, str):
        return shorten(value, limit)
    if isinstance(value, dict):
        return {key: shorten_strings(part, limit) for key, part in value.items()}
    return (
        [shorten_strings(part, limit) for part in value]
        if isinstance(value, (list, tuple))
        else value
    )


def has_images(body):
    """Whether any message, or tool result in one, holds an image."""
    stack = [as_dict(message).get("content") for message in as_list(body.get("messages"))]
    while stack:
        for block in as_list(stack.pop()):
            if isinstance(block, dict):
                if block.get("type") == "image":
                    return True
                stack.append(block.get("content"))
    return False


def tool_names(body):
    """{name sent to the provider: (the client's name, schema)} of the offered tools."""
    return {
        short_name(tool["name"]): (tool["name"], as_dict(tool.get("input_schema")))
        for tool in offered_tools(body)
    }


def used_ids(body):
    """Tool ids that the conversation has already used."""
    return {
        block.get("id")
        for message in body["messages"]
        if isinstance(message, dict) and message.get("role") == "assistant"
        for block in as_list(message.get("content"))
        if isinstance(block, dict)
        and block.get("type") == "tool_use"
        and isinstance(block.get("id"), str)
    }


def first_bytes(blocks):
    """The first bytes that are not only white space (some providers send blank lines while they think)."""
    head = b""
    for block in blocks:
        head += block
        if head.strip(b"\xef\xbb\xbf \t\r\n") or len(head) > 1 << 16:
            break
    return head.lstrip(b"\xef\xbb\xbf \t\r\n") or head


def read_all(head, blocks):
    """All of a reply that is no stream. Raises UpstreamError when it is far too long."""
    pieces, size = [head], len(head)
    for block in blocks:
        pieces.append(block)
        size += len(block)
        if size > MAX_LINE:
            raise UpstreamError(
                "The provider sent JSON of over %d MB; that is no model's reply."
                % (MAX_LINE >> 20),
                kind="cut",
            )
    return b"".join(pieces)


def whole_reply(raw, start, plan):
    """A reply that is no stream, as the one chunk (or message) that it is. Raises UpstreamError for a page or broken JSON."""
    if start == b"<":
        raise UpstreamError(
            "%s answered with a web page (%s) instead of a completion; check TARGET_API_BASE (-b)."
            % (without_password(plan.base), readable_text(raw.decode("utf-8", "replace"))),
            kind="path",
        )
    body = json_or_none(raw)
    if isinstance(body, list) and body:
        body = body[0]
    if not isinstance(body, dict):
        raise UpstreamError(
            "The provider's reply was cut off or is no JSON.", kind="cut", retry=True
        )
    error = error_in_reply(body)
    if error:
        raise error
    if not body.get("choices") and body.get("type") != "message":
        raise UpstreamError(
            "%s answered with JSON that is no completion: %s"
            % (without_password(plan.base), compact_json(body)[:300]),
            kind="path",
        )
    return body


def refusal(reply, raw, plan):
    """The UpstreamError of a reply with an error status; a redirect says where the address has moved."""
    if reply.status < 400:
        place = (without_password(plan.base), reply.headers.get("location"))
        return UpstreamError(
            "%s has moved to %s; mend TARGET_API_BASE (-b)." % place, 404, kind="path"
        )
    return upstream_error(reply.status, reply.headers, raw)


# ---- web search: a server tool that no other provider has --------------------------------------------


def is_search(body):
    """Whether this is Claude Code's side request for a web search: the server tool and no other."""
    tools = as_list(body.get("tools"))
    return bool(tools) and all(
        str(as_dict(tool).get("type")).startswith("web_search_") for tool in tools
    )


def search_message(exchange):
    """The answer to a web search as a message: real results from SEARCH_URL, or a clear error block; never a model's invention."""
    texts = [
        block_text(block)
        for _, blocks in split_turns(exchange.body["messages"])[-1:]
        for block in blocks
        if block.get("type") == "text"
    ]
    query = re.sub(r"(?is)^.*?web search for the query:\s*", "", "\n".join(texts)).strip()[:400]
    call_id, code, hits = "srvtoolu_" + exchange.proxy.new_id(), "unavailable", []
    text = "Web search is not configured: set SEARCH_URL in ccfix to a SearXNG address. No search was made."
    if exchange.settings.search_url:
        try:
            hits, text = search_web(exchange, query), ""
        except (ProxyError, ValueError) as e:
            text = "The web search failed: %s" % e
    found = [
        {
            "type": "web_search_result",
            "title": hit["title"],
            "url": hit["url"],
            "encrypted_content": "",
            "page_age": None,
        }
        for hit in hits
    ]
    if not text:
        text = (
            "\n\n".join("%s\n%s\n%s" % (hit["title"], hit["url"], hit["content"]) for hit in hits)
            or "The search found nothing."
        )
        content = found
    else:
        content = {"type": "web_search_tool_result_error", "error_code": code}
    blocks = [
        {"type": "server_tool_use", "id": call_id, "name": "web_search", "input": {"query": query}},
        {"type": "web_search_tool_result", "tool_use_id": call_id, "content": content},
        {"type": "text", "text": text},
    ]
    return {
        "type": "message",
        "role": "assistant",
        "content": blocks,
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }


def search_web(exchange, query):
    """[{title, url, content}] of SEARCH_URL's JSON answer (SearXNG's form). Raises ProxyError, ValueError."""
    url = exchange.settings.search_url
    url += ("&" if "?" in url else "?") + urllib.parse.urlencode({"q": query, "format": "json"})
    reply = exchange.proxy.upstream(exchange.settings).open(
        "GET",
        url,
        {"Accept": "application/json", "User-Agent": "ccfix/" + __version__},
        None,
        exchange.wait,
        timeout=30,
    )
    try:
        raw = reply.read(4 << 20)
    finally:
        reply.close()
    rows = as_dict(json_or_none(raw)).get("results")
    if reply.status != 200 or not isinstance(rows, list):
        raise ValueError("SEARCH_URL answered HTTP %d without a list of results" % reply.status)
    return [
        {
            "title": str(row.get("title") or row["url"]),
            "url": str(row["url"]),
            "content": str(row.get("content") or ""),
        }
        for row in rows[:10]
        if isinstance(row, dict) and row.get("url")
    ]


# ======================================================================================================
# 12  HTTP: handler, routes, the one error funnel, server
# ======================================================================================================

MAX_BODY_BYTES = 64 << 20
HEAD_SECONDS = 30  # for a request's head, and between two reads of its body
BODY_SECONDS = 300  # for the whole body
IDLE_SECONDS = 300  # a kept-alive connection without a request
SEND_SECONDS = 120  # for a client that does not read
LINGER_SECONDS = 2  # at the end of a connection, for what the client still sends
LOOK_SECONDS = 1  # between two looks at whether a silence needs a ping
SETTLED = 4  # pieces of a streamed answer after which the Pump takes it
QUIET_SECONDS = 1  # a silence, after which the Pump gives it back
MOST_STREAMS = (
    200 if selectors.DefaultSelector is selectors.SelectSelector else 10000
)  # select() takes 512 descriptors
MAX_FIELDS = 200
FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
REQUEST_LINE = re.compile(rb"([!-~]+) ([!-~\x80-\xff]+) HTTP/(\d)\.(\d)\r?\n")
REASONS = http.server.BaseHTTPRequestHandler.responses


class Headers:
    """The fields of a head, by lower-case name: get() gives the first of a name, all() every one. lines: bytes without line
    breaks. strict: ValueError for a line that is no field (RFC 9112, section 5), else it is skipped.
    """

    __slots__ = ("fields",)

    def __init__(self, lines=(), strict=False):
        self.fields = fields = {}
        for line in lines:
            name, colon, value = line.decode("latin-1").partition(":")
            if colon and FIELD_NAME.fullmatch(name) and "\r" not in value and "\0" not in value:
                fields.setdefault(name.lower(), []).append(value.strip(" \t"))
            elif strict:
                raise ValueError("no header field: %s" % ascii(line[:60])[1:])

    def get(self, name, default=None):
        return self.fields.get(name.lower(), (default,))[0]

    def all(self, name):
        return self.fields.get(name, [])

    def items(self):
        return [(name, value) for name, values in self.fields.items() for value in values]

    def tokens(self, name):
        """The set of the lower-case words in a comma-separated field."""
        return {word.strip().lower() for value in self.all(name) for word in value.split(",")}


class Inbox(io.RawIOBase):
    """A client's socket, which never blocks, as a raw file with deadlines: a slow sender cannot hold a thread for ever.

    deadline: monotonic time by which what is being read must be there; None between requests.
    """

    def __init__(self, sock):
        self.sock, self.deadline = sock, None

    def readable(self):
        return True

    def readinto(self, buffer):
        while True:
            if self.deadline is None:
                self.wait(IDLE_SECONDS)
            try:
                size = self.sock.recv_into(buffer)
                self.deadline = self.deadline or time.monotonic() + HEAD_SECONDS
                return size
            except BlockingIOError:
                self.wait(min((self.deadline or time.monotonic()) - time.monotonic(), HEAD_SECONDS))

    def wait(self, seconds):
        if seconds < 0 or not poll_socket(self.sock, seconds):
            raise socket.timeout("the client sent nothing for too long")


class Watch(object):
    """Waits for the provider and the client at once: wait(sock, seconds) as `Upstream.open` wants it.

    Raises ClientGone when the client hung up. In a silence it writes what exchange.silence() gives, by `write(text)`.
    """

    def __init__(self, client, write):
        self.client, self.write, self.exchange = client, write, None
        self.client_fd, self.client_open, self.look = client.fileno(), True, 0
        self.watch(None)

    def __call__(self, sock, seconds):
        """True: sock can be read; False: the seconds are over."""
        if sock is not self.watched:
            self.watch(sock)
        end = time.monotonic() + seconds
        while True:
            ready = self.ready(max(min(seconds, LOOK_SECONDS), 0))
            now = time.monotonic()
            if ready == self.answered and now < self.look:  # the hot path: nothing but the provider
                return True
            if self.client_open and self.client_fd in ready:
                self.look_at_client()
            if now >= self.look and self.exchange is not None:
                self.look = now + LOOK_SECONDS
                self.break_silence()
            if self.watched_fd in ready:
                return True
            seconds = end - now
            if seconds <= 0:
                return False

    def watch(self, sock):
        """Look at another socket (or none) beside the client's."""
        self.watched, self.watched_fd = sock, sock and sock.fileno()
        self.answered = [self.watched_fd]
        self.places = [
            place
            for place in (self.client if self.client_open else None, sock)
            if place is not None
        ]
        self.poller = select.poll() if hasattr(select, "poll") else None  # none on Windows
        if self.poller:
            for place in self.places:
                self.poller.register(place, select.POLLIN)

    def ready(self, seconds):
        """Descriptors of the watched sockets that can be read."""
        if self.poller:
            return [fd for fd, _ in self.poller.poll(seconds * 1000)]
        if not self.places:
            time.sleep(seconds)
        return [
            place.fileno()
            for place in (select.select(self.places, [], [], seconds)[0] if self.places else ())
        ]

    def look_at_client(self):
        """The client's socket can be read: it hung up, or it sent its next request early."""
        try:
            gone = not self.client.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            raise ClientGone()
        self.client_open = False  # it is there; do not wake up for its data again
        self.watch(self.watched)

    def break_silence(self):
        text = self.exchange.silence()
        if text:
            try:
                self.write(text)
            except OSError:
                raise ClientGone()


class Stream(object):
    """A streamed answer on its way through the Pump. rest: bytes that the client did not take at once; error: what was raised;
    back: set once the stream's own thread has to go on."""

    __slots__ = (
        "handler",
        "batches",
        "exchange",
        "reply",
        "descriptors",
        "moved",
        "rest",
        "error",
        "back",
    )

    def __init__(self, handler, batches, exchange):
        self.handler, self.batches, self.exchange, self.reply = (
            handler,
            batches,
            exchange,
            exchange.flowing(),
        )
        self.descriptors = [self.reply.wire.sock.fileno()] + [
            handler.watch.client_fd
        ] * handler.watch.client_open
        self.moved, self.rest, self.error, self.back = 0, b"", None, threading.Event()

    def step(self, now):
        """Pass on what has come. False: that was all, or the stream's own thread has to go on."""
        try:
            text = next(self.batches, None)
            if text:
                self.moved = now
                data = self.handler.framed(text)
                self.rest = data[self.handler.connection.send(data) :]
            return not self.rest and self.exchange.reply is not None
        except BlockingIOError:
            self.rest = data
        except BaseException as e:
            self.error = e
        return False


class Pump(object):
    """Moves all streams that flow, in one thread. With a thread each, every chunk of a model wakes one that has long lost its
    place in the processor's caches: 200 streams then cost three times as much, and wait for each other.

    A stream comes from its own thread once its answer has begun, and goes back to it as soon as there is more to do than to
    pass data on: at its end, in a silence, when the client hangs up or reads too slowly. So nothing here ever waits.
    """

    def __init__(self, log):
        self.log, self.lock, self.coming, self.streams = (
            log,
            threading.Lock(),
            collections.deque(),
            set(),
        )
        self.selector, self.bell, self.look = None, None, 0

    def move(self, stream):
        """Returns when the stream's own thread has to go on. Raises what was raised on the way."""
        if not self.enter(stream):
            return
        stream.back.wait()
        if stream.error:
            error, stream.error = stream.error, None
            try:
                raise error
            finally:
                error = None  # else it and this frame would know each other
        stream.handler.write(stream.rest)

    def close(self):
        """Ends the thread; streams go on in their own."""
        self.enter(None)

    def enter(self, stream):
        """Have the thread take a stream; None ends it. False: there is no place."""
        with self.lock:
            if stream and self.bell is None:
                try:
                    self.selector, (self.bell, ear) = (
                        selectors.DefaultSelector(),
                        socket.socketpair(),
                    )
                except OSError:  # out of descriptors
                    return False
                self.bell.setblocking(False)
                self.selector.register(ear, selectors.EVENT_READ)
                threading.Thread(target=self.run, args=(ear,), daemon=True).start()
            if self.bell is None or stream and len(self.streams) >= MOST_STREAMS:
                return False
            self.coming.append(stream)
            with contextlib.suppress(BlockingIOError):  # it has not heard the last hundreds
                self.bell.send(b".")
            return True

    def run(self, ear):
        """The thread."""
        try:
            while self.take():
                self.work(
                    self.selector.select(QUIET_SECONDS if self.streams else None),
                    ear,
                    time.monotonic(),
                )
        except Exception:  # our bug: the streams go on in their threads
            self.log("error", "the pump failed inside ccfix:\n" + traceback.format_exc())
        finally:
            with self.lock:
                for stream in list(self.streams) + [stream for stream in self.coming if stream]:
                    self.release(stream)
                self.coming.clear()
                self.selector.close()
                self.bell.close()
                ear.close()
                self.bell = None

    def work(self, events, ear, now):
        """Do what events ask for, and give back the streams that are silent."""
        for key, _ in events:
            if key.data is None:
                ear.recv(4096)
            elif key.data in self.streams:  # an event before this one may have ended it
                self.turn(key.data, key.fd, now)
        if now >= self.look:
            self.look = now + QUIET_SECONDS / 2
            for stream in [stream for stream in self.streams if now - stream.moved > QUIET_SECONDS]:
                self.release(stream)

    def take(self):
        """Take what is coming. False: the end."""
        while self.coming:
            stream = self.coming.popleft()
            if stream is None:
                return False
            stream.moved, stream.reply.patient = time.monotonic(), False
            self.streams.add(stream)
            for number in stream.descriptors:
                self.selector.register(number, selectors.EVENT_READ, stream)
        return True

    def turn(self, stream, descriptor, now):
        """A descriptor of a stream can be read."""
        if descriptor != stream.descriptors[0] or not stream.step(now):
            self.release(stream)

    def release(self, stream):
        """Give a stream back to its thread."""
        if stream in self.streams:
            self.streams.remove(stream)
            for number in stream.descriptors:
                with contextlib.suppress(KeyError):  # it was not yet taken wholly
                    self.selector.unregister(number)
        stream.reply.patient = True
        stream.back.set()


MAY_BE_HALF = re.compile(rb"\\u[dD]")
SURROGATE = re.compile(
    rb"(\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)


def without_halves(raw):
    """JSON bytes in which half a surrogate pair is U+FFFD: strict parsers refuse it, and no UTF-8 has it."""
    if not MAY_BE_HALF.search(raw):
        return raw
    return SURROGATE.sub(lambda found: found.group(1) or b"\\ufffd", raw)


class Handler(http.server.BaseHTTPRequestHandler):
    """One client connection. Every error of a request ends in `fail`, every reply in `send`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every kept-alive reply waits 40 ms for an ACK

    ROUTES = (
        # method, pattern of the path, name of the method that answers
        ("POST", r".*/v1/messages/?", "post_messages"),
        ("POST", r".*/v1/messages/count_tokens/?", "post_count_tokens"),
        ("GET", r".*/v1/models/?", "get_models"),
        ("GET", r".*/v1/models/(.+)", "get_model"),
        ("GET", r"/health/?", "get_health"),
        ("GET", r"/api/hello", "get_health"),
        ("GET", r"/", "get_root"),
        ("GET", r"/stats/?", "get_stats"),
        ("GET", r"/cache/stats/?", "get_cache_stats"),
        ("POST", r"/cache/clear/?", "post_cache_clear"),
        ("POST", r"/cache/clear-expired/?", "post_cache_clear_expired"),
        ("POST", r"/lessons/forget/?", "post_lessons_forget"),
    )
    ROUTES = tuple((method, re.compile(pattern + r"\Z"), name) for method, pattern, name in ROUTES)

    # -- the connection

    def setup(self):
        http.server.BaseHTTPRequestHandler.setup(self)
        self.rfile.close()
        self.connection.setblocking(False)
        self.inbox = Inbox(self.connection)
        self.rfile = io.BufferedReader(self.inbox, 16384)
        self.proxy = self.server.proxy

    def handle_one_request(self):
        """One request, from its first byte to the last of its reply."""
        self.inbox.deadline, self.request_id = None, "req_" + self.proxy.new_id()
        self.command, self.path, self.request_version, self.headers = "", "", "HTTP/1.1", Headers()
        self.close_connection, self.began_reply, self.unread = True, False, False
        self.route()
        if self.close_connection and (self.unread or self.began_reply):
            self.drain()

    def drain(self):
        """Read what the client still sends, for a moment: closing before that would take the reply from it (RFC 9112, 9.6)."""
        end = time.monotonic() + LINGER_SECONDS
        try:
            self.connection.shutdown(socket.SHUT_WR)
            while poll_socket(
                self.connection, max(end - time.monotonic(), 0)
            ) and self.connection.recv(65536):
                pass
        except OSError:
            return

    def read_head(self):
        """Read a request's head. False: there is none, the client is done. Raises ProxyError.

        Strict, without folded lines, bare line breaks and lines that are no fields: in those another server between could
        see another request than we do.
        """
        line, left, lines = self.rfile.readline(MAX_HEAD), MAX_HEAD, []
        if not line.strip():
            self.close_connection = (
                not line
            )  # RFC 9112, 2.2: an empty line before a request is no fault
            return False
        self.unread = True
        found = REQUEST_LINE.fullmatch(line)
        if not found:
            is_long = len(line) == MAX_HEAD
            raise ProxyError(
                "the request line is " + ("too long" if is_long else "no HTTP"),
                414 if is_long else 400,
            )
        self.command, self.path = found.group(1).decode("ascii"), found.group(2).decode("latin-1")
        if found.group(3) != b"1":
            raise ProxyError("only HTTP/1.1 and 1.0 are served", 505)
        while line not in (b"\r\n", b"\n"):
            left -= len(line)
            if left <= 0 or len(lines) > MAX_FIELDS:
                raise ProxyError("the request has too many or too long header fields", 431)
            line = self.rfile.readline(left)
            if not line:
                raise ClientGone()
            lines.append(line[:-2] if line.endswith(b"\r\n") else line[:-1])
        try:
            self.headers = Headers(lines[:-1], strict=True)
        except ValueError as e:
            raise ProxyError("malformed HTTP: %s" % e, 400)
        options = self.headers.tokens("connection")
        self.request_version = "HTTP/1.0" if found.group(4) == b"0" else "HTTP/1.1"
        self.close_connection = (
            "close" in options or self.request_version == "HTTP/1.0" and "keep-alive" not in options
        )
        self.unread = any(length != "0" for length in self.headers.all("content-length")) or bool(
            self.headers.all("transfer-encoding")
        )
        return True

    def route(self):
        """Find who answers; every exception of a request ends here."""
        try:
            if not self.read_head():
                return
            netloc, path = re.match(r"(?i)(?:http://([^/?]*))?([^?]*)", self.path).groups()
            path = path or "/"
            self.guard(path, netloc)
            found = [(method, pattern.match(path), name) for method, pattern, name in self.ROUTES]
            found = [(method, match, name) for method, match, name in found if match]
            for method, match, name in found:
                if method == self.command or method == "GET" and self.command == "HEAD":
                    return getattr(self, name)(*match.groups())
            if found:
                allow = "GET, HEAD" if found[0][0] == "GET" else found[0][0]
                raise ProxyError(
                    "%s is not allowed here; use %s" % (self.command[:20], allow),
                    405,
                    headers={"allow": allow},
                )
            raise ProxyError("no such address: %s" % path[:200], 404)
        except ProxyError as error:
            self.fail(error)
        except (ClientGone, Dropped, OSError) as e:
            self.proxy.log("debug", "%s ended early: %s" % (self.request_id, type(e).__name__))
            self.close_connection = True
        except RecursionError:
            self.fail(BadRequest("the request is nested too deeply"))
        except Exception:  # our bug: the one bare catch-all of a request
            self.proxy.log(
                "error", "%s failed inside ccfix:\n%s" % (self.request_id, traceback.format_exc())
            )
            self.fail(ProxyError("ccfix itself failed; its log has the details", 500))

    # -- who may ask

    def guard(self, path, netloc):
        """Raise ProxyError unless the request may be served: the proxy key where there is one; else only names of this
        machine, so that a web page cannot spend the user's key (DNS rebinding, foreign origins)."""
        settings = self.settings = self.proxy.settings()
        host = self.headers.get("host", "")
        if len(self.headers.all("host")) > 1 or netloc and netloc.lower() != host.lower():
            raise self.closing(ProxyError("the request names two hosts", 400))
        origin = self.headers.get("origin")
        key = settings.anthropic_api_key
        allowed = key and self.knows(key)
        if (
            origin is not None
            and origin not in ("http://" + host, "https://" + host)
            and not (allowed and "/v1/" in path)
        ):
            raise ProxyError(
                "requests from the origin %s are not served" % ascii(origin)[:100], 403
            )
        if re.match(r"/health/?\Z", path) or (
            key and path == "/" and "text/html" in self.headers.get("accept", "")
        ):
            return  # the page itself holds nothing; it asks for the key
        if key and not allowed:
            raise ProxyError(
                "the proxy key is missing or wrong: set ANTHROPIC_AUTH_TOKEN (or ANTHROPIC_API_KEY) of Claude Code to the"
                " ANTHROPIC_API_KEY of ccfix",
                401,
                headers=dict(NEVER),
            )
        if not key and not self.server.answers_to(host, settings.allowed_hosts):
            raise ProxyError(
                "ccfix does not answer to the host name %s; add it to ALLOWED_HOSTS, or set a proxy key (ANTHROPIC_API_KEY)"
                % ascii(host)[:100],
                403,
            )

    def knows(self, key):
        """Whether the request carries the proxy key."""
        bearer = re.sub(r"(?i)\Abearer[ \t]+", "", self.headers.get("authorization", ""))
        shown = [value.encode("latin-1") for value in (self.headers.get("x-api-key", ""), bearer)]
        wanted = [
            key.encode(encoding, "backslashreplace") for encoding in ("utf-8", "latin-1")
        ]  # clients send either
        return any([hmac.compare_digest(one, other) for one in shown for other in wanted])

    # -- bodies

    def read_body(self):
        """The request's body. Raises ProxyError; the connection then closes, since nobody knows where the next request begins."""
        lengths = self.headers.all("content-length")
        if self.headers.all("transfer-encoding") or not lengths:
            raise self.closing(
                ProxyError("a Content-Length is required; chunked bodies are not taken", 411)
            )
        if len(lengths) > 1 or not re.match(r"[0-9]{1,15}\Z", lengths[0]):
            raise self.closing(ProxyError("Content-Length must be one number", 400))
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise self.closing(ProxyError("compressed request bodies are not taken", 415))
        length = int(lengths[0])
        if length > MAX_BODY_BYTES:
            raise self.closing(
                ProxyError(
                    "the request has %d bytes; the limit is %d MB" % (length, MAX_BODY_BYTES >> 20),
                    413,
                )
            )
        if (
            self.headers.get("expect", "").lower() == "100-continue"
            and self.request_version == "HTTP/1.1"
        ):
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.inbox.deadline = time.monotonic() + BODY_SECONDS
        try:
            raw = self.rfile.read(length)
        except socket.timeout:
            raise self.closing(ProxyError("the request's body did not arrive in time", 408))
        if len(raw) < length:
            raise ClientGone()
        self.unread = False
        return raw

    def closing(self, error):
        """The error, after which the connection closes."""
        self.close_connection = True
        return error

    def read_json(self):
        """(the body as a dict, its length). Raises BadRequest."""
        raw = self.read_body()
        try:
            body = STRICT.decode(without_halves(raw).decode("utf-8"))
        except RecursionError:
            raise BadRequest("the request body is nested too deeply")
        except UnicodeDecodeError:
            raise BadRequest("the request body is not UTF-8")
        except ValueError as e:
            raise BadRequest("the request body is not JSON: %s" % e)
        if not isinstance(body, dict):
            raise BadRequest("the request body must be a JSON object")
        return body, len(raw)

    # -- replies

    def write(self, data):
        """Send bytes to the client. OSError when it is gone, or takes none for SEND_SECONDS."""
        while data:
            try:
                sent = self.connection.send(data)
                if sent == len(data):
                    return
                data = memoryview(data)[sent:]
            except BlockingIOError:
                if not poll_socket(self.connection, SEND_SECONDS, read=False, write=True):
                    raise socket.timeout("the client reads nothing")

    def head(self, status, headers):
        """A reply's head as bytes."""
        lines = [
            "HTTP/1.1 %d %s" % (status, REASONS.get(status, ("Error",))[0]),
            "request-id: " + self.request_id,
        ]
        lines += [
            "%s: %s" % (name, re.sub(r"[^\t\x20-\x7e]", " ", str(value)))
            for name, value in headers.items()
        ]
        self.close_connection = self.close_connection or self.server.stopping
        if self.close_connection:
            lines.append("Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def send(self, status, data, content_type="application/json", headers=()):
        """A whole reply in one write; none of the body for HEAD."""
        headers = dict(headers, **{"Content-Type": content_type, "Content-Length": len(data)})
        self.close_connection = self.close_connection or self.unread
        self.began_reply = True
        self.write(self.head(status, headers) + (b"" if self.command == "HEAD" else data))

    def send_json(self, value, status=200, headers=()):
        self.send(status, compact_json(value).encode(), headers=headers)

    def fail(self, error):
        """Answer with an Anthropic error. After a stream has begun it is too late for a status: then the connection ends."""
        if self.began_reply:
            self.close_connection = True
            return
        error.message = without_secrets(error.message, self.proxy.settings().secrets())
        # Claude Code shows its own words for a 404, and asks twice; 424 it asks once, and shows ours.
        hidden = (
            error.status == 404
            and error.kind
            and self.headers
            and "claude-cli/" in (self.headers.get("User-Agent") or "")
        )
        try:
            self.send_json(
                error.body(self.request_id), 424 if hidden else error.status, error.headers
            )
        except OSError:
            self.close_connection = True

    def framed(self, text):
        """SSE text as one chunk of the body."""
        data = text.encode("ascii")
        return data if self.request_version == "HTTP/1.0" else b"%x\r\n%s\r\n" % (len(data), data)

    def write_events(self, text):
        """Write SSE text as one chunk, after the head if this is the first. Also called by Watch, in silences."""
        data, chunked = self.framed(text), self.request_version != "HTTP/1.0"
        if not self.began_reply:
            self.began_reply = True
            headers = {
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "x-ccfix-cache": self.watch.exchange.cache_state,
            }
            if chunked:
                headers["Transfer-Encoding"] = "chunked"
            else:
                self.close_connection = True
            data = self.head(200, headers) + data
        self.write(data)

    # -- the endpoints

    def post_messages(self):
        body, size = self.read_json()
        check_request(body)
        self.watch = Watch(self.connection, self.write_events)
        exchange = Exchange(
            self.proxy,
            body,
            self.headers,
            self.watch,
            settings=self.settings,
            id=self.request_id[4:],
        )
        self.watch.exchange, exchange.bytes_in = exchange, size
        status, error = 499, "the client hung up"
        with self.proxy.counted():
            try:
                self.answer(exchange)
                status, error = 200, exchange.broken_by()
            except Dropped as dropped:
                status, error = (
                    200,
                    dropped.args[0].message + " (in a tool call; the client asks again)",
                )
                self.close_connection = True
            except ProxyError as e:
                status, error = e.status, e.message
                self.fail(e)
            except (ClientGone, OSError):
                self.close_connection = True
            except Exception:
                status, error = 500, "ccfix itself failed"
                raise
            finally:
                exchange.close(status, error)
                self.watch.exchange = self.watch = (
                    None  # they know each other: only the collector would find them
                )

    def answer(self, exchange):
        """Write the exchange's answer, streamed or whole."""
        if not exchange.stream:
            message = exchange.message()
            data = compact_json(message).encode()
            exchange.bytes_out = len(data)
            self.send(200, data, headers={"x-ccfix-cache": exchange.cache_state})
            return
        with contextlib.closing(exchange.batches()) as batches:
            pieces = 0
            for text in batches:
                if text:
                    self.write_events(text)
                    pieces += 1
                if pieces >= SETTLED and exchange.flowing():
                    pieces = 0
                    self.server.pump.move(Stream(self, batches, exchange))
                    self.watch.look_at_client()
        if self.request_version != "HTTP/1.0":
            self.write(b"0\r\n\r\n")

    def post_count_tokens(self):
        body, _ = self.read_json()
        self.send_json(self.proxy.count_tokens(body, self.headers, Watch(self.connection, None)))

    def get_models(self):
        self.send_json(self.proxy.models(self.proxy.settings()))

    def get_model(self, name):
        """Any name is served, so any name exists."""
        name = urllib.parse.unquote(name)[:200]
        known = {row["id"]: row for row in self.proxy.models(self.proxy.settings())["data"]}
        self.send_json(
            known.get(name)
            or {
                "type": "model",
                "id": name,
                "display_name": name,
                "created_at": "2025-01-01T00:00:00Z",
            }
        )

    def get_health(self):
        self.send_json({"status": "ok", "name": "ccfix", "version": __version__})

    def get_root(self):
        """The status page for browsers, JSON for everything else."""
        if "text/html" in self.headers.get("Accept", ""):
            nonce = base64.b64encode(os.urandom(12)).decode()
            self.send(
                200,
                status_page(nonce),
                "text/html; charset=utf-8",
                {
                    "Content-Security-Policy": page_policy(nonce),
                    "X-Content-Type-Options": "nosniff",
                    "Referrer-Policy": "no-referrer",
                    "Cache-Control": "no-store",
                },
            )
        else:
            self.get_stats()

    def get_stats(self):
        self.send_json(
            self.proxy.status(self.server.address()), headers={"Cache-Control": "no-store"}
        )

    def get_cache_stats(self):
        settings, store = self.proxy.settings(), self.proxy.store
        shown = store.stats() if store else {}
        self.send_json(
            dict(
                shown,
                enabled=settings.cache_enabled,
                mode=settings.cache_key_mode,
                ttl=settings.cache_ttl,
            )
        )

    def post_cache_clear(self):
        self.send_json({"removed": self.proxy.store.clear() if self.proxy.store else 0})

    def post_cache_clear_expired(self):
        self.send_json({"removed": self.proxy.store.clear_expired() if self.proxy.store else 0})

    def post_lessons_forget(self):
        self.send_json({"removed": self.proxy.forget()})


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """The listening server: a thread a connection. address: (host, port)."""

    daemon_threads = True
    request_queue_size = (
        1024  # with 5, the default, most of 200 connections at once wait for seconds
    )
    allow_reuse_address = os.name != "nt"  # on Windows it would let two servers share the port

    stopping = False  # once true, each connection ends with its next reply

    def __init__(self, address, proxy, handler=Handler):
        self.proxy, self.pump = proxy, Pump(getattr(proxy, "log", None))
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        http.server.HTTPServer.__init__(self, address, handler)

    def server_bind(self):
        """Without HTTPServer's getfqdn: a DNS look-up at start, slow in companies."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def server_close(self):
        http.server.HTTPServer.server_close(self)
        self.pump.close()

    def address(self):
        """The URL that clients on this machine use."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.server_name, self.server_name)
        return "http://%s:%d" % (
            "[%s]" % host if ":" in host and host[0] != "[" else host,
            self.server_port,
        )

    def answers_to(self, host, more):
        """Whether a Host header names this server: an address (no web page has one that resolves elsewhere), localhost,
        the name it was bound to, or one of `more` (ALLOWED_HOSTS)."""
        name = re.sub(r":\d+\Z", "", host.strip().lower())
        if name in ("localhost", self.server_name.lower()) or name in more:
            return True
        is_address = bool(re.match(r"\d{1,3}(\.\d{1,3}){3}\Z|\[[0-9a-f:.]+\]\Z", name))
        if self.server_name in ("0.0.0.0", "::"):
            return is_address
        return (
            bool(re.match(r"127\.\d+\.\d+\.\d+\Z|\[::1\]\Z", name))
            or name.strip("[]") == self.server_name
        )

    def service_actions(self):
        """What the accepting thread does twice a second."""
        if isinstance(self.proxy, Proxy) and self.proxy.wires:
            self.proxy.wires[1].close_idle()

    def get_request(self):
        try:
            return http.server.HTTPServer.get_request(self)
        except OSError:
            time.sleep(0.05)  # out of descriptors: do not spin until one is free
            raise

    def handle_error(self, request, client_address):
        """A connection's thread failed outside of any request."""
        if isinstance(self.proxy, Proxy):
            self.proxy.log("debug", "connection failed:\n" + traceback.format_exc())


# ======================================================================================================
# 13  Status page: what a browser sees at /
# ======================================================================================================

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>ccfix</title>
<link rel="icon" href="data:,">
<style nonce="{nonce}">
:root { --page: #f5f6f7; --card: #fff; --line: #dfe3e6; --ink: #1b2126; --soft: #5b666f; --accent: #0b6b78;
        --pale: #6db1b9; --grey: #8a949c; --bad: #b3261e; --mono: ui-monospace, Menlo, Consolas, monospace; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121517; --card: #1a1f22; --line: #2e363b; --ink: #e4e8ea; --soft: #98a4ac; --accent: #5cc0cd;
          --pale: #35808a; --grey: #66727a; --bad: #ff8a80; }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
       font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
body > header, main { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
body > header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 10px; padding-top: 24px; }
h1 { margin: 0; font-size: 22px; letter-spacing: -.01em; }
h2 { margin: 32px 0 10px; font-size: 16px; }
h3 { margin: 0; font-size: 13px; font-weight: 500; color: var(--soft); }
p { margin: 0; }
small, .soft, th, dt { color: var(--soft); font-size: 13px; font-weight: 400; }
code, pre { font-family: var(--mono); font-size: 13px; }
#state { margin-left: auto; color: var(--soft); font-size: 13px; }
#state::before { content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 7px; border-radius: 50%;
                 background: var(--grey); }
#state.live::before { background: var(--accent); }
#state.lost { color: var(--bad); }
#state.lost::before { background: var(--bad); }
.card { min-width: 0; padding: 14px 16px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.grid { display: grid; gap: 12px; }
.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; }
.bar > :first-child { margin-right: auto; }
.bad { color: var(--bad); }
button, input { font: inherit; font-size: 13px; padding: 5px 12px; color: inherit; background: var(--card);
                border: 1px solid var(--line); border-radius: 6px; }
button { cursor: pointer; }
button:hover { border-color: var(--accent); color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
#key-form { display: flex; flex-wrap: wrap; gap: 10px; align-items: center; margin: 32px 0; }
#key-form input { flex: 1 1 200px; min-width: 0; }
#flow { display: grid; grid-template-columns: fit-content(45%) auto minmax(0, 1fr); gap: 28px; align-items: start;
        margin-top: 18px; }
#flow strong { display: block; font-size: 19px; font-weight: 600; line-height: 1.35; }
#flow > span { margin-top: 14px; color: var(--accent); font-size: 22px; }
ul { margin: 8px 0 0; padding: 0; list-style: none; }
ul:empty, dl:empty { display: none; }
#lessons li { margin-top: 6px; }
#tiles { grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); margin: 12px 0 0; }
#tiles dd { margin: 0; }
#tiles dt + dd { font-size: 24px; font-weight: 600; line-height: 1.3; }
#plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); margin-top: 12px; }
figure { margin: 0; }
figcaption { margin-bottom: 8px; }
svg { display: block; width: 100%; height: 72px; border-bottom: 1px solid var(--line); }
svg .a { fill: var(--accent); }
svg .b { fill: var(--pale); }
svg .c { fill: var(--grey); }
svg .hover { fill: transparent; }
svg g:hover .hover { fill: var(--accent); fill-opacity: .12; }
.axis { display: flex; justify-content: space-between; margin-top: 4px; color: var(--soft); font-size: 12px; }
.key::before { content: ""; display: inline-block; width: 9px; height: 9px; margin: 0 4px 0 9px; border-radius: 2px; }
.key.a::before { background: var(--accent); }
.key.b::before { background: var(--pale); }
.key.c::before { background: var(--grey); }
pre { margin: 8px 0 0; white-space: pre-wrap; }
.card.scroll { overflow-x: auto; padding: 2px 0; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 7px 12px; text-align: left; vertical-align: baseline; }
th { white-space: nowrap; }
tbody tr { border-top: 1px solid var(--line); }
td small, li small { display: block; }
td small.bad { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden; }
#requests-none { padding: 10px 16px; }
.n { text-align: right; white-space: nowrap; }
.name { min-width: 130px; }
#requests tr[data-id] { cursor: pointer; }
#requests tr[data-id]:hover { background: var(--page); }
#requests button { padding: 0; border: 0; background: none; font-size: 15px; white-space: nowrap; }
#requests button::before { content: "\203a"; display: inline-block; width: 14px; color: var(--soft); }
#requests button[aria-expanded=true]::before { transform: rotate(90deg) translateY(4px); }
#requests .detail, #requests .detail td { border-top: 0; padding-top: 0; }
dl.pairs { display: grid; grid-template-columns: fit-content(40%) minmax(0, 1fr); gap: 3px 16px; align-items: baseline;
           margin: 8px 0 0; }
dl.pairs div { display: contents; }
dl.pairs dd { margin: 0; white-space: pre-wrap; }
#requests dl.pairs { margin: 0; padding: 10px 12px; background: var(--page); border-radius: 6px; }
#settings .changed { color: var(--accent); font-size: 13px; }
#message { position: fixed; left: 20px; right: 20px; bottom: 20px; width: fit-content; margin: 0 auto; padding: 10px 18px;
           border-radius: 8px; background: var(--ink); color: var(--page); font-size: 14px; }
#message:empty { padding: 0; }
main { padding-bottom: 72px; }
@media (max-width: 700px) {
  body > header, main { padding-left: 12px; padding-right: 12px; }
  #flow { grid-template-columns: 1fr; gap: 2px; }
  #flow > span { margin: 4px 0; transform: rotate(90deg); justify-self: start; line-height: 1; }
  #tiles { grid-template-columns: 1fr 1fr; }
  .card { padding: 12px; }
  th, td { padding: 7px 6px; }
  .wide { display: none; }
  .name { min-width: 0; }
  dl.pairs { gap: 3px 10px; }
  #settings thead { display: none; }
  #settings tr { display: flex; flex-wrap: wrap; gap: 0 12px; justify-content: space-between; padding: 7px 6px; }
  #settings td { padding: 0; }
  #settings td:first-child { flex: 1 0 100%; }
}
@media (prefers-reduced-motion: no-preference) { #requests button::before { transition: transform .12s; } }
</style>
</head>
<body>
<header>
  <h1 id="name">ccfix</h1> <span class="soft" id="version"></span> <span id="state">connecting</span>
</header>
<main>
  <noscript>This page needs JavaScript; the same numbers are at /stats as JSON.</noscript>
  <form id="key-form" class="card" hidden>
    <label for="key">This proxy asks for its key.</label>
    <input id="key" type="password" autocomplete="off" required pattern="\s*[!-~]+\s*" title="letters, digits and signs">
    <button>Show the status</button>
  </form>
  <div id="content" hidden>
    <section class="card" id="flow" aria-label="Which model answers">
      <div><h3>Claude Code sees</h3><strong id="disguise"></strong><span class="soft" id="disguise-base"></span></div>
      <span aria-hidden="true">&rarr;</span>
      <div><h3>The answers come from</h3><strong id="target"></strong><span class="soft" id="target-base"></span>
        <ul id="routes" class="soft"></ul></div>
    </section>
    <dl id="tiles" class="grid" aria-label="Totals since the start">
      <div class="card"><dt>Requests</dt><dd id="requests-total"></dd><dd class="soft" id="active-total"></dd></div>
      <div class="card"><dt>Errors</dt><dd id="errors-total"></dd></div>
      <div class="card"><dt>Tokens in</dt><dd id="input-total"></dd></div>
      <div class="card"><dt>Tokens out</dt><dd id="output-total"></dd></div>
      <div class="card"><dt>Prompt cache read</dt><dd id="read-total"></dd><dd class="soft" id="share-total"></dd></div>
      <div class="card"><dt>Cost</dt><dd id="cost-total"></dd><dd class="soft" id="cost-hint">set PRICES to see it</dd></div>
    </dl>
    <section id="plots" class="grid" aria-label="The last hour"></section>

    <h2>Connect</h2>
    <section id="connect" class="grid two" aria-label="How to connect"></section>

    <h2>Last requests</h2>
    <section class="card scroll" aria-label="Last requests">
      <table id="requests"><thead><tr></tr></thead><tbody></tbody></table>
      <p class="soft" id="requests-none">No request yet.</p>
    </section>

    <div class="grid two">
      <section aria-labelledby="cache-title">
        <h2 id="cache-title">Response cache</h2>
        <div class="card">
          <div class="bar"><p id="cache-mode"></p><button type="button" id="cache-expired">Clear expired</button>
            <button type="button" id="cache-clear">Clear</button></div>
          <p class="bad" id="cache-error"></p><dl id="cache-text" class="pairs"></dl>
        </div>
      </section>
      <section aria-labelledby="lessons-title">
        <h2 id="lessons-title">Lessons learned</h2>
        <div class="card">
          <div class="bar"><p id="lessons-count"></p><button type="button" id="lessons-forget">Forget all</button></div>
          <ul id="lessons"></ul>
        </div>
      </section>
    </div>

    <h2>Settings</h2>
    <section class="card scroll" aria-label="Settings">
      <table id="settings">
        <thead><tr><th scope="col">Name</th><th scope="col">Value</th><th scope="col">From</th></tr></thead>
        <tbody></tbody>
      </table>
    </section>
  </div>
</main>
<p id="message" role="status" aria-live="polite"></p>
<script nonce="{nonce}">
"use strict";
// Flow: refresh() -> call("stats") -> show(stats) -> one function for each section. Text enters by textContent only.
const POLL_MS = 2000, GIVE_UP_MS = 10000, MESSAGE_MS = 10000, MINUTES = 60, KEY = "ccfix-key";
const NONE = "\u2013", DOT = " \u00b7 ";
const page = { key: recallKey(), polling: false, timer: 0, messageTimer: 0, opened: new Set(), stats: {} };

// -- DOM
const byId = id => document.getElementById(id);
const put = (id, text) => { const node = byId(id); if (node.textContent !== text) node.textContent = text; };

function fill(node, attributes, children) {
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  node.append(...children);      // append turns strings into text nodes, so markup in them stays text
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Make parent's children show items. A child whose item is as before stays as it is: it keeps focus, selection and tooltip.
function sync(parent, items, build) {
  const wanted = new Map(items.map(item => [JSON.stringify(item), item]));
  const kept = new Map();
  for (const child of Array.from(parent.children)) {
    if (wanted.has(child.key) && !kept.has(child.key)) kept.set(child.key, child);
    else child.remove();
  }
  let next = parent.firstElementChild;
  wanted.forEach((item, key) => {
    const child = kept.get(key) || build(item);
    child.key = key;
    if (child === next) next = next.nextElementSibling;
    else parent.insertBefore(child, next);
  });
}

// -- Numbers as text; null or absent is a dash
const shown = format => value => typeof value === "number" && isFinite(value) ? format(value) : NONE;
const number = shown(value => value.toLocaleString("en-US"));
const percent = shown(value => Math.round(value * 100) + " %");
const cost = shown(value => value.toFixed(value < 1 ? 4 : 2));       // no currency: PRICES does not name one
const clock = shown(time => new Date(time * 1000).toLocaleTimeString("en-GB"));
const moment = shown(time => new Date(time * 1000).toLocaleString("en-GB"));
const scaled = (step, units) => shown(value => {
  let power = 0;
  while (value >= step && power < units.length - 1) { value /= step; power += 1; }
  return (power && value < 100 ? value.toFixed(1) : Math.round(value)) + units[power];
});
const compact = scaled(1000, ["", "k", "M", "G"]);
const bytes = scaled(1024, [" bytes", " KB", " MB", " GB"]);
const duration = shown(ms => ms < 1000 ? Math.round(ms) + " ms" : ms < 60000 ? (ms / 1000).toFixed(1) + " s" : span(ms / 1000));
const span = shown(seconds => {      // the two largest units
  const units = [["d", 86400, 1e9], ["h", 3600, 24], ["min", 60, 60], ["s", 1, 60]];
  const parts = units.map(([unit, size, limit]) => [Math.floor(seconds / size) % limit, unit]);
  const first = parts.findIndex(part => part[0]);
  return first < 0 ? "0 s" : parts.slice(first, first + 2).filter(part => part[0]).map(part => part.join(" ")).join(" ");
});
const joined = (...texts) => texts.filter(Boolean).join(DOT);
const count = (amount, one, many) => number(amount) + " " + (amount === 1 ? one : many);
// "input" leaves out what was read from the cache, as in Anthropic's usage
function readShare(row) {
  const all = (row.input || 0) + (row.cache_read || 0);
  return all ? (row.cache_read || 0) / all : null;
}

// -- Talking to the proxy
function recallKey() {
  try { return sessionStorage.getItem(KEY) || ""; } catch (error) { return ""; }      // storage may be forbidden
}
function keepKey(key) {
  page.key = key;
  try { sessionStorage.setItem(KEY, key); } catch (error) { return; }
}
// The JSON of an answer; throws an Error with .status (0: no answer) and a message to show.
async function call(path, method) {
  const headers = page.key ? { "x-api-key": page.key } : {};
  let response, body;
  try {
    response = await fetch(path, { method, headers, cache: "no-store", signal: AbortSignal.timeout(GIVE_UP_MS) });
  } catch (error) { throw Object.assign(new Error("the proxy does not answer"), { status: 0 }); }
  try { body = await response.json(); } catch (error) { body = {}; }
  if (response.ok) return body;
  const message = body.error && body.error.message || "the proxy answered " + response.status;
  throw Object.assign(new Error(message), { status: response.status });
}
function tell(text) {
  put("message", text);
  clearTimeout(page.messageTimer);
  page.messageTimer = setTimeout(put, MESSAGE_MS, "message", "");
}
function setState(name, text) { byId("state").className = name; put("state", text); }

async function refresh() {
  if (page.polling || document.hidden) return;
  clearTimeout(page.timer);
  page.polling = true;
  let again = true;
  try { show(await call("stats")); }
  catch (error) {
    again = error.status !== 401;      // do not knock on with a wrong key: wait for the form
    if (!again) askForKey();
    else lose(error.message);
  }
  page.polling = false;
  if (again) page.timer = setTimeout(refresh, POLL_MS);
}
function lose(message) {
  if (byId("state").className === "live") tell("Not up to date: " + message + ".");
  setState("lost", message);
}
function askForKey() {
  if (page.key) tell("That key was not accepted.");
  keepKey("");
  byId("key-form").hidden = false;
  byId("content").hidden = true;
  setState("", "locked");
  byId("key").focus();
}
async function act(path, done) {
  try {
    const answer = await call(path, "POST");
    tell(done + (typeof answer.removed === "number" ? ": " + number(answer.removed) + " removed." : "."));
  } catch (error) { tell("Not done: " + error.message); }
  refresh();
}
async function copy(text, source) {
  try { await navigator.clipboard.writeText(text); tell("Copied."); }
  catch (error) {      // no clipboard outside https and localhost: select it for the user
    getSelection().selectAllChildren(source);
    tell("Selected: press Ctrl+C or Cmd+C.");
  }
}

// -- Sections
function show(stats) {
  page.stats = stats;
  byId("key-form").hidden = true;
  byId("content").hidden = false;
  setState("live", joined(stats.demo && "demo", "up " + span(stats.uptime_s), stats.address));
  showModels(stats);
  showTotals(stats.totals || {});
  showPlots(stats);
  sync(byId("connect"), Object.entries(stats.connect || {}), shellCard);
  showRequests();
  showCache(stats.cache || {});
  showLessons(stats.lessons || []);
  sync(byId("settings").tBodies[0], stats.settings || [], settingRow);
}
const pair = ([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text));
function showModels(stats) {
  const target = stats.target || {}, disguise = stats.disguise || {};
  document.title = (target.model ? target.model + " - " : "") + (stats.name || "ccfix");
  put("name", stats.name || "ccfix");
  put("version", stats.version || "");
  put("disguise", disguise.model || "the name it asks for");
  put("disguise-base", disguise.api_base || "");
  put("target", target.model || NONE);
  put("target-base", joined(target.api_base, target.profile && "profile " + target.profile, target.format));
  sync(byId("routes"), stats.routes || [],
       route => el("li", {}, route.family + " \u2192 " + route.model + " at " + route.api_base));
}
function showTotals(totals) {
  for (const name of ["requests", "errors", "input", "output"]) put(name + "-total", number(totals[name]));
  byId("errors-total").className = totals.errors ? "bad" : "";
  put("active-total", totals.active ? number(totals.active) + " running now" : "");
  put("read-total", number(totals.cache_read));
  put("share-total", readShare(totals) === null ? "" : percent(readShare(totals)) + " of the input");
  put("cost-total", cost(totals.cost));
  byId("cost-hint").hidden = typeof totals.cost === "number";
}
function shellCard([shell, lines]) {
  const name = shell === "powershell" ? "PowerShell" : shell, text = lines.join("\n"), code = el("code", {}, text);
  const button = el("button", { type: "button", "aria-label": "Copy the lines for " + name }, "Copy");
  button.addEventListener("click", () => copy(text, code));
  return el("div", { class: "card" }, el("div", { class: "bar" }, el("h3", {}, name), button), el("pre", {}, code));
}

// A plot stacks its parts (class, name, value of a series row) in one bar a minute.
const PLOTS = [
  { title: "Tokens a minute", format: compact,
    parts: [["a", "in", row => row.input], ["b", "cached", row => row.cache_read], ["c", "out", row => row.output]] },
  { title: "Latency to first content", format: duration, parts: [["a", "", row => row.first_ms]] },
  { title: "Cache-read share of input", format: percent, top: 1, parts: [["a", "", readShare]] },
  { title: "Cost a minute", format: cost, parts: [["a", "", row => row.cost]] },
];
function showPlots(stats) {
  const now = Math.floor(stats.time / 60), series = stats.series || [];
  const recent = series.filter(row => row.t / 60 > now - MINUTES && row.t / 60 <= now).sort((a, b) => a.t - b.t);
  const barsOf = plot => recent.map(row => bar(plot, row)).filter(one => one.sum !== null);
  const plots = PLOTS.map((plot, index) => ({ index, now, bars: barsOf(plot) }));
  sync(byId("plots"), plots.filter(plot => PLOTS[plot.index].format !== cost || plot.bars.length), plotFigure);
}
function bar(plot, row) {
  const values = plot.parts.map(part => part[2](row)), known = values.filter(value => typeof value === "number");
  return { t: row.t, values: values.map(value => value || 0), sum: known.length ? known.reduce((a, b) => a + b) : null };
}
function plotFigure({ index, now, bars }) {
  const { title, format, parts, top } = PLOTS[index];
  const peak = Math.max(0, ...bars.map(one => one.sum)), last = bars.length ? bars[bars.length - 1].sum : null;
  const summary = bars.length ? "last " + format(last) + ", peak " + format(peak) : "nothing yet";
  const drawn = svg("svg", { viewBox: "0 0 " + MINUTES + " 100", preserveAspectRatio: "none", role: "img",
                             "aria-label": title + " in the last hour: " + summary },
                    ...bars.map(one => barShape(one, parts, format, MINUTES - 1 - (now - one.t / 60), 96 / (top || peak || 1))));
  const keys = parts.filter(part => part[1]).map(part => el("span", { class: "key " + part[0] }, part[1]));
  return el("figure", { class: "card" }, el("figcaption", {}, el("h3", {}, title), el("small", {}, summary)), drawn,
            el("div", { class: "axis" }, el("span", {}, "1 h ago"), el("span", {}, ...keys), el("span", {}, "now")));
}
function barShape(one, parts, format, x, scale) {
  const texts = parts.map((part, index) => format(one.values[index]) + " " + part[1]);
  const group = svg("g", {}, svg("title", {}, clock(one.t) + DOT + texts.join(", ")),
                    svg("rect", { class: "hover", x, y: 0, width: 1, height: 100 }));
  let y = 100;
  parts.forEach((part, index) => {
    const height = one.values[index] * scale;
    y -= height;
    group.append(svg("rect", { class: part[0], x: x + 0.1, y, width: 0.8, height }));
  });
  return group;
}

// Columns of the table: title, class, cell. "wide" ones are left out on a phone, where the details have them.
const COLUMNS = [
  ["Time", "", row => el("button", { type: "button", "aria-expanded": page.opened.has(row.id) }, clock(row.time))],
  ["Model", "name", modelCell],
  ["Status", "n", row => el("span", { class: failed(row) ? "bad" : "" }, String(row.status || NONE))],
  ["In", "n wide", row => number(row.input)],
  ["Cache read", "n wide", row => number(row.cache_read)],
  ["Out", "n wide", row => number(row.output)],
  ["First", "n wide", row => duration(row.first_ms)],
  ["Total", "n", row => duration(row.total_ms)],
];
const DETAILS = [
  ["Error", row => row.error],
  ["Prefix cache lost", row => row.broke],
  ["Lessons", row => (row.lessons || []).join("\n")],
  ["Asked for", row => row.asked],
  ["Called", row => row.model],
  ["When", row => moment(row.time)],
  ["Tokens", row => joined(number(row.input) + " in", number(row.cache_read) + " cache read", number(row.output) + " out")],
  ["Latency", row => joined(duration(row.first_ms) + " to first content", duration(row.total_ms) + " in all")],
  ["Cost", row => typeof row.cost === "number" ? cost(row.cost) : ""],
  ["Bytes", row => joined(bytes(row.bytes_in) + " in", bytes(row.bytes_out) + " out")],
  ["Mode", row => joined(row.stream ? "streamed" : "whole", retries(row), row.cache && "cache " + row.cache)],
  ["Session", row => row.session],
  ["Id", row => row.id],
];
const failed = row => row.status >= 400 || Boolean(row.error);
const retries = row => row.retries && count(row.retries, "retry", "retries");
const lessons = row => row.lessons && row.lessons.length && count(row.lessons.length, "lesson", "lessons");
function modelCell(row) {
  const notes = joined(row.cache === "hit" && "answered from the cache", retries(row), lessons(row),
                       row.broke && "prefix cache lost");
  const cell = el("span", {}, row.model || row.asked || NONE);
  if (row.error) cell.append(el("small", { class: "bad" }, String(row.error)));
  if (notes) cell.append(el("small", {}, notes));
  return cell;
}
function showRequests() {
  const rows = page.stats.requests || [];
  byId("requests-none").hidden = rows.length > 0;
  byId("requests").hidden = !rows.length;
  const lines = rows.map(row => page.opened.has(row.id) ? [{ row }, { detail: row }] : [{ row }]);
  sync(byId("requests").tBodies[0], lines.flat(), line => line.row ? requestRow(line.row) : detailRow(line.detail));
}
function requestRow(row) {
  const line = el("tr", { "data-id": row.id }, ...COLUMNS.map(([, kind, cell]) => el("td", { class: kind }, cell(row))));
  line.addEventListener("click", () => {
    if (!page.opened.delete(row.id)) page.opened.add(row.id);
    line.querySelector("button").setAttribute("aria-expanded", page.opened.has(row.id));
    showRequests();
  });
  return line;
}
function detailRow(row) {
  const pairs = DETAILS.map(([name, text]) => [name, text(row)]).filter(([, text]) => text);
  const list = el("dl", { class: "pairs" }, ...pairs.map(pair));
  return el("tr", { class: "detail" }, el("td", { colspan: COLUMNS.length }, list));
}
function showCache(cache) {
  put("cache-mode", cache.enabled ? "On, key mode " + cache.mode + ", kept for " + span(cache.ttl) : "Off (CACHE_ENABLED)");
  put("cache-error", cache.error ? String(cache.error) : "");
  sync(byId("cache-text"), !cache.enabled ? [] : [
    ["Hit rate", joined(percent(cache.hit_rate), number(cache.hits) + " hits, " + number(cache.misses) + " misses")],
    ["Kept", joined(count(cache.entries, "entry", "entries"), bytes(cache.bytes))],
    ["So far", number(cache.inserts) + " stored, " + number(cache.evictions) + " evicted"],
    ["Saved", duration(cache.saved_ms) + " of waiting"],
  ], pair);
}
function showLessons(rows) {
  put("lessons-count", rows.length ? count(rows.length, "lesson", "lessons") : "Nothing had to be learned yet.");
  byId("lessons-forget").hidden = !rows.length;
  sync(byId("lessons"), rows, row => el("li", {}, row.text, el("small", {}, row.model + " at " + row.upstream)));
}
function settingRow(row) {
  const kind = row.origin && row.origin !== "default" ? "changed" : "soft", value = row.value;
  return el("tr", {}, el("td", {}, el("code", {}, row.name), el("small", { class: "wide" }, row.help || "")),
            el("td", {}, value === null || value === undefined || value === "" ? NONE : String(value)),
            el("td", { class: kind }, row.origin || NONE));
}

// -- Start
byId("requests").tHead.rows[0].append(...COLUMNS.map(([title, kind]) => el("th", { scope: "col", class: kind }, title)));
byId("cache-clear").addEventListener("click", () => act("cache/clear", "Cache cleared"));
byId("cache-expired").addEventListener("click", () => act("cache/clear-expired", "Expired entries cleared"));
byId("lessons-forget").addEventListener("click", () => act("lessons/forget", "Lessons forgotten"));
byId("key-form").addEventListener("submit", event => {
  event.preventDefault();
  keepKey(byId("key").value.trim());
  byId("key").value = "";
  refresh();
});
document.addEventListener("visibilitychange", refresh);
refresh();
</script>
</body>
</html>
"""


def status_page(nonce):
    """The status page as bytes. It holds no data: its script reads GET /stats; nonce is a fresh one for each answer."""
    return PAGE.replace("{nonce}", nonce).encode("ascii")


def page_policy(nonce):
    """Content-Security-Policy of the page: its own style and script, calls to this server, and nothing else."""
    return (
        "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ).format(nonce)


# ======================================================================================================
# 14  Demo: an embedded model, reached like any other provider
# ======================================================================================================

DEMO_HELP = (
    "I am the demo model inside ccfix: no key, no network, no intelligence. Your words: %s\n\n"
    "Say 'read FILE', 'run COMMAND' or 'think' to see tools and thinking travel through the proxy."
)


def demo_reply(body):
    """(reasoning, text, [(tool, arguments)]) of the demo model for an OpenAI request."""
    messages = [as_dict(message) for message in as_list(body.get("messages"))]
    offered = {
        as_dict(as_dict(tool).get("function")).get("name") for tool in as_list(body.get("tools"))
    }
    last = messages[-1] if messages else {}
    if last.get("role") == "tool":
        return "", "The tool answered:\n" + str(last.get("content"))[:2000], []
    said = re.sub(
        r"(?s)<system-reminder>.*?</system-reminder>", "", said_text(last.get("content"))
    ).strip()
    wants = [
        ("Read", "file_path", r"\bread\s+(\S+)"),
        ("Bash", "command", r"\brun\s+(.+)"),
        ("get_weather", "place", r"weather in (\w+)"),
    ]
    for name, field, pattern in wants:
        found = re.search(pattern, said, re.I)
        if found and name in offered:
            arguments = {field: found.group(1).strip("`'\" ")}
            return (
                "The user wants %s." % name,
                "Let me see.",
                [(name, dict(arguments, description="demo") if name == "Bash" else arguments)],
            )
    return (
        "The user said something; I say it back." if "think" in said.lower() else "",
        DEMO_HELP % said[:500],
        [],
    )


def said_text(content):
    """A message's text."""
    return (
        content
        if isinstance(content, str)
        else "\n".join(str(as_dict(part).get("text") or "") for part in as_list(content))
    )


def demo_chunks(body):
    """The deltas of the demo model's reply, word by word."""
    reasoning, text, calls = demo_reply(body)
    for word in re.findall(r"\S+\s*|\s+", reasoning):
        yield {"reasoning_content": word}, None
    for word in re.findall(r"\S+\s*|\s+", text):
        yield {"content": word}, None
    for index, (name, arguments) in enumerate(calls):
        yield {
            "tool_calls": [
                {
                    "index": index,
                    "id": "call_" + os.urandom(8).hex(),
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }
            ]
        }, None
        for piece in re.findall(r"(?s).{1,12}", json.dumps(arguments)):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}, None
    yield {}, "tool_calls" if calls else "stop"


class DemoModel(http.server.BaseHTTPRequestHandler):
    """A chat-completions server on loopback that needs no model."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format, *args):
        """Silent: the proxy's own log tells enough."""

    def do_GET(self):
        self.reply(
            compact_json(
                {"object": "list", "data": [{"id": "demo", "object": "model", "owned_by": "ccfix"}]}
            )
        )

    def do_POST(self):
        body = as_dict(json_or_none(self.rfile.read(int(self.headers.get("Content-Length") or 0))))
        usage = {
            "prompt_tokens": max(1, len(compact_json(body)) // 4),
            "completion_tokens": 0,
            "total_tokens": 0,
        }
        deltas = list(demo_chunks(body))
        usage["completion_tokens"] = len(deltas)
        usage["total_tokens"] = usage["prompt_tokens"] + len(deltas)
        if body.get("stream"):
            chunks = [
                {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
                for delta, finish in deltas
            ]
            chunks.append({"choices": [], "usage": usage})
            text = "".join(
                "data: %s\n\n"
                % compact_json(dict(chunk, id="demo", object="chat.completion.chunk", model="demo"))
                for chunk in chunks
            )
            self.reply(text + "data: [DONE]\n\n", "text/event-stream")
        else:
            reasoning, text, calls = demo_reply(body)
            message = {"role": "assistant", "content": text, "reasoning_content": reasoning}
            if calls:
                message["tool_calls"] = [
                    {
                        "id": "call_" + os.urandom(8).hex(),
                        "type": "function",
                        "function": {"name": name, "arguments": json.dumps(arguments)},
                    }
                    for name, arguments in calls
                ]
            self.reply(
                compact_json(
                    {
                        "id": "demo",
                        "object": "chat.completion",
                        "model": "demo",
                        "usage": usage,
                        "choices": [
                            {
                                "index": 0,
                                "message": message,
                                "finish_reason": "tool_calls" if calls else "stop",
                            }
                        ],
                    }
                )
            )

    def reply(self, text, content_type="application/json"):
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def start_demo():
    """Start the demo model on a free loopback port -> its base URL."""
    server = Server(("127.0.0.1", 0), None, DemoModel)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.address() + "/v1"


# ======================================================================================================
# 15  Commands: serve, run, check, init, install, uninstall, open
# ======================================================================================================


class Usage(Exception):
    """The command cannot go on as it was given; the message says what to do. Exit code 2."""


class Log(object):
    """Lines on stderr, and in a file that is begun anew at 10 MB. log(level, text); a line cannot be forged by line
    breaks in text, and secrets are hidden."""

    LEVELS = ("debug", "info", "warning", "error")
    MAX_FILE = 10 << 20

    def __init__(self, settings, out=None):
        self.lock, self.out, self.file, self.path = threading.Lock(), out or sys.stderr, None, ""
        self.configure(settings)
        if self.path:
            self.write_file("")  # OSError: better now than never

    def configure(self, settings):
        """Take level, file and secrets from (changed) settings."""
        self.least, self.secrets = self.LEVELS.index(settings.log_level), settings.secrets()
        if settings.log_file != self.path:
            self.path, self.file = settings.log_file, None

    def __call__(self, level, text):
        if self.LEVELS.index(level) < self.least:
            return
        text = without_secrets(text, self.secrets)
        safe = re.sub(
            r"[\x00-\x1f\x7f-\x9f]",
            lambda m: (
                "\n    "
                if m.group() == "\n" and level == "error" and "Traceback" in text
                else m.group().encode("unicode_escape").decode()
            ),
            text,
        )
        line = "%s %-7s %s\n" % (
            time.strftime("%Y-%m-%d %H:%M:%S"),
            level,
            safe.encode("ascii", "backslashreplace").decode(),
        )
        with self.lock:
            try:
                self.out.write(line)
                self.out.flush()
                if self.path:
                    self.write_file(line)
            except (
                OSError,
                ValueError,
            ):  # a closed terminal or a full disk must not stop a request
                return

    def write_file(self, line):
        """Append to the log file; at 10 MB it becomes NAME.1."""
        if self.file is None:
            self.file = open(
                os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600),
                "a",
                encoding="utf-8",
            )
        self.file.write(line)
        self.file.flush()
        if self.file.tell() > self.MAX_FILE:
            self.file.close()
            self.file = None
            os.replace(self.path, self.path + ".1")


class Config(object):
    """The settings of now: config() reads .env again when it has changed. A broken .env keeps the old values.

    given: {ENV_NAME: text} from the command line; environ: the environment; path: the .env file; home: the user's folder;
    alone: the command line alone says where requests go (the demo must never reach a provider); found: a server that
    was found on this machine.
    """

    def __init__(self, given, environ, path, home, alone=False):
        self.given, self.environ, self.path, self.home, self.alone, self.found = (
            given,
            environ,
            path,
            home,
            alone,
            {},
        )
        self.lock, self.log, self.mark = threading.Lock(), None, self.file_mark()
        self.settings = Settings(self.layers())

    def file_mark(self):
        """What changes when .env does."""
        try:
            info = os.stat(self.path)
        except (OSError, ValueError):
            return None
        return info.st_mtime, info.st_size, info.st_ino

    def layers(self):
        """The layers of settings, most important first. Raises SettingError for a file that cannot be read."""
        claude = os.path.join(self.home, ".claude", "settings.json")
        layers = [
            ("the environment", self.environ),
            (os.path.basename(self.path) or ".env", dotenv(file_text(self.path))),
            ("~/.claude/settings.json", claude_layer(file_text(claude))),
            ("found on this machine", self.found),
        ]
        if self.alone:
            layers = [
                (
                    name,
                    {
                        key: value
                        for key, value in values.items()
                        if not re.match("TARGET_|EXTRA_|PROFILE|MAX_", key)
                    },
                )
                for name, values in layers
            ]
        return [("the command line", self.given)] + layers

    def aim(self, found, **given):
        """Take a server that was found on this machine, and settings that count like the command line's."""
        self.found = dict(self.found, **found)
        self.given = dict(self.given, **given)
        self.settings = Settings(self.layers())

    def __call__(self):
        mark = self.file_mark()
        if mark != self.mark:
            with self.lock:
                if mark != self.mark:
                    self.mark = mark
                    self.reload()
        return self.settings

    def reload(self):
        try:
            new = Settings(self.layers())
        except SettingError as e:
            self.log(
                "warning",
                "%s was changed but cannot be used, the old settings stay: %s" % (self.path, e),
            )
            return
        old, self.settings = self.settings, new
        changed = [
            "%s" % row.env if row.secret else "%s = %s" % (row.env, getattr(new, row.name))
            for row in SETTINGS
            if getattr(old, row.name) != getattr(new, row.name)
        ]
        self.log.configure(new)
        self.log("info", "%s was changed: %s" % (self.path, "; ".join(changed) or "no setting"))


def file_text(path):
    """A small text file's content; "" where there is none, or where it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.read(1 << 20)
    except (OSError, ValueError):
        return ""


def home_folder():
    """The user's folder, also where HOME is not set."""
    home = os.path.expanduser("~")
    return home if home != "~" else os.getcwd()


def say(*lines, **kwargs):
    """Print lines for a person, in ASCII: a terminal of LC_ALL=C takes nothing else."""
    out = kwargs.get("out") or sys.stdout
    for line in lines:
        out.write(line.encode("ascii", "backslashreplace").decode() + "\n")
    out.flush()


def complain(message):
    """Say on stderr what is wrong; exit code 2."""
    say("ccfix: " + message, out=sys.stderr)
    return 2


# ---- serve -------------------------------------------------------------------------------------------


class Running(object):
    """A proxy that serves: server, proxy, log and config belong together. out: where log lines go, instead of stderr."""

    def __init__(self, config, host=None, port=None, out=None):
        settings = config()
        self.config = config
        try:
            self.log = Log(settings, out)
        except OSError as e:
            raise Usage("LOG_FILE %s cannot be written: %s" % (settings.log_file, e.strerror or e))
        config.log = self.log
        try:
            self.proxy = Proxy(config, self.log)
        except ValueError as e:
            raise Usage("PRICES cannot be used: %s" % e)
        place = (host or settings.proxy_host, settings.proxy_port if port is None else port)
        try:
            self.server = Server(place, self.proxy)
        except OSError as e:
            raise Usage(
                "cannot listen on %s port %d (%s); choose another port with -p, or end the program that has it"
                % (place + (e.strerror or e,))
            )
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def start(self, wait=0):
        """Serve, and ask the provider about itself meanwhile; wait: seconds to wait for its answer."""
        self.thread.start()
        probe = threading.Thread(target=self.proxy.probe, args=(self.plan(),), daemon=True)
        probe.start()
        probe.join(wait)
        later = threading.Timer(1, give_memory_back)
        later.daemon = True
        later.start()
        return self

    def plan(self):
        """The Plan of requests for no family."""
        settings = self.config()
        return plan_for(settings, "", self.proxy.profile_of(settings))

    def stop(self, grace=5.0):
        """End: no new requests; open replies get `grace` seconds, then a second to say that they were broken off."""
        self.server.stopping = True
        self.server.shutdown()
        self.server.server_close()
        self.wait_idle(grace)
        if self.proxy.wires:
            self.proxy.wires[1].close()
            self.wait_idle(1)
        if self.proxy.store:
            self.proxy.store.close()

    def wait_idle(self, seconds):
        """Until no request is open, at most so long."""
        end = time.monotonic() + seconds
        while self.proxy.active and time.monotonic() < end:
            time.sleep(0.02)


def give_memory_back():
    """Have glibc give the system what was needed at the start only (see main_as_hook); elsewhere free() does that itself."""
    try:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
    except (ImportError, AttributeError, OSError, TypeError, MemoryError):
        """Another C library, or no ctypes."""


def check_target(settings):
    """Raise Usage when the target cannot work: a key is missing, or a file that is named."""
    for name in ("ca_bundle", "client_cert"):
        for path in filter(None, getattr(settings, name).split(",")):
            if not os.path.exists(path):
                raise Usage("%s names %s, which is not there" % (name.upper(), path))
    if (
        not settings.target_api_key
        and not is_loopback(settings.target_api_base)
        and not settings.extra_headers
    ):
        raise Usage(
            "no key for %s: give it as TARGET_API_KEY in the environment or .env, or with -k KEY; or try --demo"
            % without_password(settings.target_api_base)
        )


INSECURE_WORDS = (
    "WARNING: TLS certificates are not verified (INSECURE): anyone on the way can read the key"
)


def banner(settings, address):
    """What is printed at the start: under 12 lines."""
    key = settings.anthropic_api_key
    lines = [
        "ccfix %s on %s" % (__version__, address),
        "  target    %s at %s"
        % (settings.target_model, without_password(settings.target_api_base)),
        "  disguise  %s" % (settings.disguise_model or "the model name that Claude Code asks for"),
        "  proxy key %s"
        % ("on, from %s" % settings.origins["anthropic_api_key"] if key else "off"),
    ]
    for shell, commands in connect_lines(address, bool(key)):
        lines.append("  %-9s %s" % (shell, "; ".join(commands)))
    if settings.proxy_host not in ("127.0.0.1", "localhost", "::1") and not key:
        lines.append("  WARNING: open to the network without a proxy key; set ANTHROPIC_API_KEY")
    return lines + ["  " + INSECURE_WORDS] * settings.insecure


def serve(config, options):
    """Serve until Ctrl-C or SIGTERM -> exit code."""
    find_target(config)
    base, port = config().target_api_base, config().proxy_port
    if (
        is_loopback(base) and url_origin(base)[2] == port
    ):  # passed through to itself, one request would become thousands
        raise Usage(
            "the target %s is ccfix's own port; give ccfix another one, say -p %d"
            % (without_password(base), port + 1)
        )
    stopped = threading.Event()
    for name in ("SIGINT", "SIGTERM"):  # before the first request can come
        signal.signal(getattr(signal, name), lambda *_: stopped.set())
    running = Running(config).start()
    say(*banner(config(), running.server.address()))
    while not stopped.wait(0.5):  # a wait without a limit would not notice signals on Windows
        pass
    running.stop()
    return 0


# ---- the target where none is configured: a server on this machine, a recording --------------------------

LOCAL_SERVERS = (
    ("Ollama", 11434),
    ("vLLM", 8000),
    ("llama.cpp", 8080),
    ("LM Studio", 1234),
    ("SGLang", 30000),
)
GLANCE_SECONDS = 0.3
NO_TARGET = """nothing is configured, and no model server was found on this machine.
Three ways to go on:
  a provider     {0} init
                 asks for address, key and model, and writes .env
  a local model  start Ollama, vLLM, llama.cpp, LM Studio or SGLang, then again
  neither        {0} --demo
                 an embedded model: no key, no network"""


def local_servers():
    """[(title, base URL, [model names])] of the model servers that answer on their usual ports of this machine."""
    upstream, found = Upstream(GLANCE_SECONDS, GLANCE_SECONDS), []
    for title, port in LOCAL_SERVERS:
        base = "http://127.0.0.1:%d/v1" % port
        try:
            answer = get_json(upstream, base + "/models", GLANCE_SECONDS)
        except ProxyError:
            continue
        if (
            answer.get("object") == "list"
        ):  # our own proxy's list, in Anthropic's form, has no such field
            found.append((title, base, model_names(answer)))
    upstream.close()
    return [row for row in found if row[2]]


def get_json(upstream, url, seconds, headers=()):
    """The JSON object at a URL; {} for anything else, and for an error status. Raises ProxyError."""
    reply = upstream.open("GET", url, dict(headers), None, patience(seconds), seconds)
    try:
        return as_dict(json_or_none(reply.read(4 << 20))) if reply.status == 200 else {}
    finally:
        reply.close()


def model_names(answer):
    """Model names of a /models answer; those that only embed texts come last."""
    found = [
        str(row["id"])
        for row in as_list(answer.get("data"))
        if isinstance(row, dict) and row.get("id")
    ]
    return sorted(found, key=lambda name: "embed" in name.lower())


def patience(limit):
    """A wait(sock, seconds) for `Upstream.open` that ends the whole exchange after `limit` seconds."""
    end = time.monotonic() + limit

    def wait(sock, seconds):
        left = end - time.monotonic()
        if left > 0 and poll_socket(sock, min(seconds, left)):
            return True
        if seconds >= left:
            raise UpstreamError(
                "no complete answer within %g s" % limit, 504, "timeout_error", kind="timeout"
            )
        return False

    return wait


def program_name():
    """What the user types to start this program."""
    name = os.path.basename(sys.argv[0] or "")
    return "python3 " + name if name.endswith(".py") else name or "ccfix"


def find_target(config):
    """Where nothing is configured, aim at a model server on this machine, and say so. Raises Usage when there is none,
    or when what is configured cannot work."""
    settings = config()
    if any(
        settings.origins[name] != "default"
        for name in ("target_api_base", "target_api_key", "extra_headers")
    ):
        check_target(settings)
        return find_model(config)
    servers, wanted = local_servers(), (
        settings.target_model if settings.origins["target_model"] != "default" else ""
    )
    if not servers:
        raise Usage(NO_TARGET.format(program_name()))
    title, base, models = next((row for row in servers if wanted in row[2]), servers[0])
    model = wanted or models[0]
    found = {"TARGET_API_BASE": base, "TARGET_MODEL": model}
    if settings.proxy_port == url_origin(base)[2] and settings.origins["proxy_port"] == "default":
        found["PROXY_PORT"] = "8081"
    config.aim(found)
    others = [name for name in models if name != model]
    say(
        "ccfix: nothing is configured; found %s at %s, using its model %s" % (title, base, model)
        + (" (-m takes another: %s)" % shorten(", ".join(others), 200) if others else ""),
        out=sys.stderr,
    )


def find_model(config):
    """Where a server on this machine is configured but no model, take one that it has, and say so."""
    settings = config()
    if settings.origins["target_model"] != "default" or not is_loopback(settings.target_api_base):
        return
    upstream = Upstream(GLANCE_SECONDS, GLANCE_SECONDS)
    try:
        models = model_names(
            get_json(
                upstream,
                settings.target_api_base.partition("?")[0] + "/models",
                GLANCE_SECONDS,
                {"Authorization": "Bearer " + settings.target_api_key},
            )
        )
    except ProxyError:
        return
    finally:
        upstream.close()
    if models and settings.target_model not in models:
        config.aim({"TARGET_MODEL": models[0]})
        say(
            "ccfix: no model is configured; using %s of %s"
            % (models[0], without_password(settings.target_api_base)),
            out=sys.stderr,
        )


class ReplayModel(DemoModel):
    """Answers each POST with the next recorded reply; server.proxy is a deque of them."""

    NOT_REPEATED = re.compile(
        r"(?i)content-length|content-encoding|transfer-encoding|connection|keep-alive|date|server|set-cookie\Z"
    )

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        over = {
            "status": 400,
            "headers": {},
            "body": '{"error":{"message":"the recording has no further reply"}}',
        }
        reply = self.server.proxy.popleft() if self.server.proxy else over
        data = reply["body"].encode("utf-8", "replace")
        self.send_response(reply["status"])
        for name, value in reply["headers"].items():
            if not self.NOT_REPEATED.match(name) and value != HIDDEN:
                self.send_header(name, re.sub(r"[^\t\x20-\x7e]", " ", str(value)))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def start_replay(folder):
    """Serve the recorded replies of a folder on a free loopback port -> settings that aim at them. Raises Usage."""
    try:
        replies = read_recording(folder)
    except (OSError, ValueError) as e:
        raise Usage("--replay cannot be used: %s" % e)
    if not replies:
        raise Usage("--replay: %s holds no recorded replies" % folder)
    server = Server(("127.0.0.1", 0), collections.deque(replies), ReplayModel)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    native = any(re.search(r'"type": ?"message(_start)?"', reply["body"]) for reply in replies)
    return {
        "TARGET_API_BASE": server.address() + "/v1",
        "TARGET_FORMAT": "anthropic" if native else "openai",
        "TARGET_RETRIES": "0",
    }


# ---- run: a proxy and Claude Code, for one session ------------------------------------------------------

CLAUDE_DEFAULTS = {
    # What a session through a proxy wants unless the user says otherwise. Measured with Claude Code 2.1.330.
    "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",  # a line in the prompt that spoils the provider's prefix cache
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",  # this session is not Anthropic's: no telemetry, no other host
    "CLAUDE_CODE_DISABLE_1M_CONTEXT": "1",  # a window that nobody knows counts as 200k, not 1M
    "CLAUDE_STREAM_IDLE_TIMEOUT_MS": "1500000",  # a local model may think for minutes before its first word
    "CLAUDE_BYTE_STREAM_IDLE_TIMEOUT_MS": "1500000",
}
FOREIGN = re.compile(
    # Variables that would lead Claude Code to another server, key or model.
    r"(?:ANTHROPIC_(?:API_KEY|AUTH_TOKEN|BASE_URL|UNIX_SOCKET|CUSTOM_HEADERS|MODEL|SMALL_FAST_MODEL|CUSTOM_MODEL_OPTION\w*|DEFAULT_\w+)"
    r"|CLAUDE_CODE_(?:OAUTH_TOKEN|USE_(?:BEDROCK|VERTEX|FOUNDRY|MANTLE|GATEWAY|ANTHROPIC_AWS|ANTHROPIC_GOOGLE_CLOUD)))\Z"
)
ASKS_FOR_MODE = (
    "--permission-mode",
    "--dangerously-skip-permissions",
    "--allow-dangerously-skip-permissions",
    "--enable-auto-mode",
)
MAIN_NAME = "ccfix-main"
WHY_NO_AUTO = (
    "ccfix: auto permission mode is off: its safety check runs on Anthropic's servers, which no proxy can stand in for"
    " (run -- --permission-mode auto asks for it all the same)"
)


def session_variables(address, key, settings, plan):
    """Variables that connect Claude Code to this proxy, with the target's real limits.

    The model's name is the target's own: Claude Code obeys CLAUDE_CODE_MAX_CONTEXT_TOKENS only for names that it does
    not know, and the proxy routes by family words; a target named like a Claude model goes by another name.
    """
    known = any(word in plan.model.lower() for word in FAMILIES + ("claude",))
    found = {
        "ANTHROPIC_BASE_URL": address,
        "ANTHROPIC_AUTH_TOKEN": key,
        "ANTHROPIC_MODEL": MAIN_NAME if known else plan.model,
        "ANTHROPIC_DEFAULT_FABLE_MODEL": MAIN_NAME if known else plan.model,
    }
    for family in FAMILIES:
        own = getattr(settings, "target_model_" + family) or plan.model
        name = "ANTHROPIC_DEFAULT_%s_MODEL" % family.upper()
        routed = own != plan.model or getattr(settings, "target_api_base_" + family)
        found.update(
            {name: "ccfix-" + family if routed else found["ANTHROPIC_MODEL"], name + "_NAME": own}
        )
    limit = plan.profile.max_output
    if plan.profile.context:
        found["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(plan.profile.context)
        # A small window must keep room for the conversation: Claude Code would reserve 20,000 tokens for its output.
        limit = limit or (plan.profile.context // 4 if plan.profile.context < 128000 else 0)
    if limit:
        found["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(limit)
    return found


def claude_environment(environ, address, key, settings, plan):
    """The environment of Claude Code for one session, from the user's own: nothing in it leads elsewhere, and it
    holds no secret of ccfix, since the model's commands can read it."""
    secret = {row.env for row in SETTINGS if row.secret}
    found = dict(CLAUDE_DEFAULTS)
    found.update(
        (name, value)
        for name, value in environ.items()
        if not FOREIGN.match(name) and name not in secret
    )
    found.update(session_variables(address, key, settings, plan))
    if any(
        name.lower() in ("http_proxy", "https_proxy", "all_proxy") and value
        for name, value in environ.items()
    ):
        for name in [name for name in found if name.lower() == "no_proxy"] or ["NO_PROXY"]:
            found[name] = ",".join(filter(None, [found.get(name), "127.0.0.1", "localhost"]))
    return found


def settings_overrides(texts, environment):
    """{variable: value} that must be set again by --settings: "env" in Claude Code's settings files (their texts) beats
    the environment. An empty value takes a variable away."""
    found = {}
    for source in texts:
        for name in as_dict(as_dict(json_or_none(source)).get("env")):
            if FOREIGN.match(name) or name in (
                "CLAUDE_CODE_MAX_CONTEXT_TOKENS",
                "CLAUDE_CODE_MAX_OUTPUT_TOKENS",
            ):
                found[name] = environment.get(name, "")
    return found


def claude_settings(arguments, overrides):
    """(settings for --settings, the other arguments): the user's own --settings are joined in; no auto mode unless the
    arguments say how to ask, or print mode, where it makes no difference."""
    rest, given = list(arguments), ""
    for at, word in enumerate(arguments):
        if word == "--settings" and at + 1 < len(arguments):
            rest, given = arguments[:at] + arguments[at + 2 :], arguments[at + 1]
        elif word.startswith("--settings="):
            rest, given = arguments[:at] + arguments[at + 1 :], word.partition("=")[2]
    found = as_dict(
        json_or_none(given if given.lstrip().startswith("{") else file_text(given) if given else "")
    )
    if overrides:
        found["env"] = dict(as_dict(found.get("env")), **overrides)
    printing = any(re.match(r"--print\Z|-[a-z]*p[a-z]*\Z", word) for word in rest)
    if not printing and not any(word.partition("=")[0] in ASKS_FOR_MODE for word in rest):
        found["permissions"] = dict(as_dict(found.get("permissions")), disableAutoMode="disable")
    return found, rest


def claude_command(path, read=file_text):
    """The command line's front for the `claude` that was found: on Windows the program behind npm's .cmd, so that no shell
    takes the arguments apart."""
    if not path.lower().endswith((".cmd", ".bat")):
        return [path]
    found = re.search(r'"%~?dp0%?\\([^"%]+\.(exe|[cm]?js))"\s+%\*', read(path))
    if not found:
        return [path]
    program = os.path.join(os.path.dirname(path), *found.group(1).split("\\"))
    return [program] if found.group(2) == "exe" else [shutil.which("node") or "node", program]


@contextlib.contextmanager
def settings_argument(settings):
    """["--settings", ...] for Claude Code. With a key in it, it is a file that only the user can read, gone afterwards:
    command lines can be read by everyone on the machine."""
    if not settings.get("env"):
        yield ["--settings", compact_json(settings)] if settings else []
        return
    import tempfile  # here, not above: serving does not need it

    number, path = tempfile.mkstemp(prefix="ccfix-", suffix=".json")
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(compact_json(settings))
        yield ["--settings", path]
    finally:
        os.remove(path)


def exit_code(child):
    """Wait for a child that shares our terminal -> its exit code, 128 + N for signal N. Ctrl-C is the child's; SIGTERM and
    SIGHUP are passed on; when it stops (Ctrl-Z), so do we, so that the shell takes over. Claude Code stops its whole
    process group: then we were stopped and continued ourselves before we are told of the child's stop.
    """

    def pass_on(number, _):  # not by Popen.send_signal: it would take the exit code first
        if child.returncode is None:
            os.kill(child.pid, number)

    before, continued = {}, []
    for name, handler in (
        ("SIGINT", lambda *_: None),
        ("SIGTERM", pass_on),
        ("SIGHUP", pass_on),
        ("SIGCONT", lambda *_: continued.append(True)),
    ):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        if not hasattr(os, "WUNTRACED"):  # Windows
            return child.wait()
        while True:
            _, status = os.waitpid(child.pid, os.WUNTRACED | os.WCONTINUED)
            if os.WIFCONTINUED(status):
                continued.clear()
            elif os.WIFSTOPPED(status):
                if not continued:
                    os.kill(os.getpid(), signal.SIGSTOP)
                os.kill(child.pid, signal.SIGCONT)
            else:
                child.returncode = (
                    128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
                )
                return child.returncode
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(config, options):
    """A proxy on a free loopback port, and Claude Code on it -> Claude Code's exit code."""
    find_target(config)
    import subprocess  # here, not above: serving does not need it

    path = shutil.which("claude")
    if not path:
        raise Usage(
            "claude is not on the PATH; install Claude Code (npm install -g @anthropic-ai/claude-code) and try again"
        )
    key = os.urandom(24).hex()
    config.aim({}, ANTHROPIC_API_KEY=key)
    port = config().proxy_port if "PROXY_PORT" in config.given else 0
    with open(
        os.devnull, "w"
    ) as nowhere:  # a log line would garble Claude Code's screen; LOG_FILE has them
        running = Running(config, "127.0.0.1", port, nowhere).start(
            wait=0 if config().max_context else 6
        )
        try:
            environment = claude_environment(
                os.environ, running.server.address(), key, config(), running.plan()
            )
            settings, rest = claude_settings(
                options.arguments, settings_overrides(claude_files(config.home), environment)
            )
            say(
                *[WHY_NO_AUTO] * ("disableAutoMode" in as_dict(settings.get("permissions")))
                + ["ccfix: " + INSECURE_WORDS] * config().insecure,
                out=sys.stderr,
            )
            with settings_argument(settings) as more:
                return exit_code(
                    subprocess.Popen(claude_command(path) + more + rest, env=environment)
                )
        except OSError as e:
            raise Usage("claude cannot be started (%s): %s" % (path, e.strerror or e))
        finally:
            running.stop(0.5)


def claude_files(home):
    """The texts of the settings files that Claude Code will read."""
    folder = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.join(home, ".claude")
    places = [os.path.join(folder, "settings.json")] + [
        os.path.join(".claude", name) for name in ("settings.json", "settings.local.json")
    ]
    return [file_text(place) for place in places]


# ---- check: what the target can do, through the code that serves ---------------------------------------

ROW_SECONDS, LONG_SECONDS = (
    60,
    180,
)  # for one question; for a long prompt, which a small machine reads slowly
ANSWER_TOKENS = 400  # enough for a model that thinks before it calls a tool
FIRST_REQUEST = 13000  # tokens of Claude Code's first request
LEAST_CONTEXT, GOOD_CONTEXT = 20000, 64000
CODE_WORD = "ZEBRA-42"

WEATHER = {
    "name": "get_weather",
    "description": "The weather of today at a place.",
    "input_schema": {
        "type": "object",
        "properties": {"place": {"type": "string", "description": "a city"}},
        "required": ["place"],
        "additionalProperties": False,
    },
}

Verdict = collections.namedtuple("Verdict", "status seen fix")
Verdict.__doc__ = """What a row of `check` found. status: ok, fail or skip; seen: in a few words; fix: what to do, or ""."""

ADVICE = {
    # kind of an UpstreamError -> what to do
    "auth": "set the right key: TARGET_API_KEY in .env or the environment, or -k KEY",
    "billing": "add credit at the provider, or choose another one",
    "policy": "ask the provider what this key may use",
    "model": "choose one of the provider's models: -m NAME, or TARGET_MODEL",
    "path": "check the base URL (-b, TARGET_API_BASE): most end in /v1",
    "overflow": "choose a model with a larger context window, or raise the server's (llama.cpp: -c, vLLM: --max-model-len)",
    "timeout": "the server is overloaded or loads its model: try again; for a slow one raise TARGET_TIMEOUT",
    "rate": "wait until the provider's limit allows more, or ask it for a higher one",
    "overloaded": "try again later, or set TARGET_MODEL_FALLBACK",
    "server": "try again later; if it stays, the server's own log has the reason",
    "cut": "try again; if it stays, look at the server's log and at proxies between",
    "sampling": "choose a model that is better at tools",
}
NO_TOOLS = {
    # profile -> what makes tools work there
    "vllm": "start vLLM with --enable-auto-tool-choice and the --tool-call-parser of the model",
    "sglang": "start SGLang with the --tool-call-parser of the model",
    "llamacpp": "start llama-server with --jinja, and take a model that was trained for tools",
    "ollama": "take a model with the mark 'tools' in Ollama's library",
    "lmstudio": "take a model with the hammer sign in LM Studio",
}


def ok(seen):
    return Verdict("ok", seen, "")


def fail(seen, fix=""):
    return Verdict("fail", seen, fix)


def brief(text):
    """A model's words in quotes, on one short line."""
    return ascii(text[:40]) + ("..." if len(text) > 40 else "")


def failure(error):
    """The Verdict of a ProxyError; where its message ends with advice, that is the fix."""
    seen, parenthesis, advice = error.message.partition("): ")
    if error.kind == "connect" and parenthesis:
        return fail(seen + ")", advice)
    return fail(error.message, ADVICE.get(error.kind, ""))


class Answer(object):
    """A finished answer: message (Anthropic's), usage (the provider's own, {} if it told none), plan, and the seconds at which
    the first content and the end came; pieces: deltas of text and thinking."""

    def __init__(self, exchange, events, seconds):
        self.message, self.plan, self.usage = fold(events), exchange.plan, exchange.translator.usage
        marks = [at for at, event in zip(seconds, events) if event["type"] == "content_block_delta"]
        self.first, self.last, self.pieces = (
            (marks[0], marks[-1], len(marks)) if marks else (0, 0, 0)
        )
        self.tokens = exchange.translator.usage_now()

    def blocks(self, kind):
        return [block for block in self.message["content"] if block["type"] == kind]

    def text(self):
        return "".join(block["text"] for block in self.blocks("text")).strip()

    def read(self):
        """Prompt tokens, however they were paid for."""
        return sum(
            self.tokens[name]
            for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
        )


class Tester(object):
    """What the rows of `check` share: a proxy that tries nothing twice, and what it was told so far.

    asked: the model name that is asked for, whose family decides where it goes. Nothing of what is set may hide or mend
    what the target does: the settings are changed for that.
    """

    def __init__(self, settings, asked="ccfix-check"):
        self.settings, self.asked, self.models, self.known = settings, asked, [], {}
        (
            settings.target_retries,
            settings.target_model_fallback,
            settings.cache_enabled,
            settings.record_dir,
        ) = (0, "", False, "")
        self.nowhere = open(os.devnull, "w")
        self.proxy = Proxy(
            lambda: settings,
            Log(settings, sys.stderr if settings.log_level == "debug" else self.nowhere),
        )

    def plan(self):
        return plan_request(self.settings, self.asked, False, self.proxy.profile_of(self.settings))

    def open(self, method, url, body=None, limit=ROW_SECONDS):
        """(status, bytes) of a plain request to the provider. Raises ProxyError."""
        data = None if body is None else compact_json(body).encode()
        reply = self.proxy.upstream(self.settings).open(
            method,
            url,
            upstream_headers(self.plan(), self.settings, {}),
            data,
            patience(limit),
            limit,
        )
        try:
            return reply.status, reply.read(4 << 20)
        finally:
            reply.close()

    def ask(self, content, limit=ROW_SECONDS, **fields):
        """The Answer to a user's content, or to a list of messages, as an Anthropic request. Raises ProxyError."""
        messages = (
            content
            if isinstance(content, list) and "role" in content[0]
            else [{"role": "user", "content": content}]
        )
        body = dict(
            {
                "model": self.asked,
                "max_tokens": ANSWER_TOKENS,
                "stream": True,
                "messages": messages,
            },
            **fields,
        )
        exchange = Exchange(self.proxy, body, {}, patience(limit))
        exchange.bytes_in = len(compact_json(body))
        events, marks, began = [], [], time.monotonic()
        try:
            for event in exchange.events():
                if event is not None:
                    events.append(event)
                    marks.append(time.monotonic() - began)
        except Dropped as dropped:
            raise dropped.args[0]
        if exchange.broken_by():
            raise exchange.error
        return Answer(exchange, events, marks)

    def once(self, name, ask):
        """ask() -> Answer, asked only once: several rows look at it. What it raised is raised again."""
        if name not in self.known:
            try:
                self.known[name] = ask()
            except ProxyError as error:
                self.known[name] = error
        if isinstance(self.known[name], ProxyError):
            raise self.known[name]
        return self.known[name]

    def plain(self):
        return self.once("plain", lambda: self.ask("Reply with the one word: pong", stream=False))

    def counting(self):
        return self.once(
            "stream",
            lambda: self.ask(
                "Count from 1 to 30 in digits, separated by blanks. Write nothing else."
            ),
        )

    def calling(self):
        return self.once(
            "tool", lambda: self.ask("What is the weather in Paris? Use the tool.", tools=[WEATHER])
        )

    def close(self):
        if self.proxy.wires:
            self.proxy.wires[1].close()
        if self.proxy.store:
            self.proxy.store.close()
        self.nowhere.close()


def models_url(plan):
    """Where a provider lists its models."""
    parts = urllib.parse.urlsplit(plan.base)
    path = (
        re.sub(r"/v1$", "", parts.path) + "/v1"
        if plan.profile.format == "anthropic"
        else parts.path
    ) + "/models"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


TLS_WORDS = {
    False: ", TLS verified",
    True: ", TLS NOT verified (INSECURE): anyone on the way can read the key",
}


def is_reachable(tester):
    """Name, network, proxy and TLS: any HTTP answer will do."""
    plan = tester.plan()
    status, raw = tester.open("GET", models_url(plan), limit=20)
    tester.models = model_names(as_dict(json_or_none(raw))) if status == 200 else []
    way = tester.proxy.upstream(tester.settings).way_to(plan.base)
    tester.proxy.probe(plan, patience(10))
    return ok(
        host_port(way.host, way.port)
        + " answers"
        + (TLS_WORDS[tester.settings.insecure] if way.scheme == "https" else "")
        + (", through the proxy " + host_port(*way.proxy) if way.proxy else "")
        + "; profile "
        + tester.plan().profile.name
    )


def takes_key(tester):
    """The key, proved by a question: many providers list their models to everyone."""
    try:
        tester.plain()
    except ProxyError as error:
        if error.kind in ("auth", "billing", "policy", "connect"):
            return failure(error)
        return Verdict("skip", "not to be told: the question failed otherwise, see below", "")
    return ok("accepted" if tester.plan().key else "none given, none needed")


def has_model(tester):
    plan, kind = tester.plan(), ""
    try:
        tester.plain()
    except ProxyError as error:
        kind = error.kind
    if not kind:
        return ok(
            plan.model
            + (
                ""
                if plan.model in tester.models or not tester.models
                else " answers, though the provider does not list it"
            )
        )
    if kind not in ("model", "path") or plan.model in tester.models:
        return Verdict(
            "skip",
            plan.model + (" is listed" if plan.model in tester.models else ": not to be told"),
            "",
        )
    import difflib

    near = difflib.get_close_matches(plan.model, tester.models, 4, 0.4)
    near += [
        name for name in tester.models if plan.model.lower() in name.lower() and name not in near
    ]
    shown = near or tester.models
    fix = "-m with one of: " + shorten(", ".join(shown[:12]), 300) if shown else ADVICE["model"]
    if kind == "path":
        return fail(
            "the provider has no such address, or no model %s" % plan.model,
            ADVICE["path"] + "; or " + fix,
        )
    return fail("the provider has no model %s" % plan.model, fix)


def answers_plainly(tester):
    answer = tester.plain()
    if answer.text():
        return ok("%s, %d tokens" % (brief(answer.text()), answer.tokens["output_tokens"]))
    if answer.blocks("thinking"):
        return ok("thinking only, within %d tokens" % ANSWER_TOKENS)
    return fail(
        "an empty answer",
        "choose another model, or look at the server's log: its chat template may not fit",
    )


def streams(tester):
    answer = tester.counting()
    if not answer.pieces:
        return fail("an empty stream", ADVICE["server"])
    if answer.pieces == 1 and answer.tokens["output_tokens"] > 8:
        return ok(
            "all in one piece: nothing is seen before the end (the server, or a proxy between, holds it back)"
        )
    return ok("%d pieces in %.1f s" % (answer.pieces, answer.last))


def tells_usage(tester):
    usage = tester.counting().usage
    prompt, output = positive_int(usage, "prompt_tokens", "input_tokens"), positive_int(
        usage, "completion_tokens", "output_tokens"
    )
    if prompt and output:
        return ok("%d in, %d out" % (prompt, output))
    return fail(
        "none: token counts are estimates, so the context shown and when it is compacted are too",
        "turn on usage in the server's streams",
    )


def calls_of(answer):
    """The answer's tool calls that fit the tool."""
    return [
        block
        for block in answer.blocks("tool_use")
        if block["name"] == "get_weather" and isinstance(block["input"].get("place"), str)
    ]


def no_call(tester, answer):
    """The Verdict where a tool call was expected."""
    said = (
        "a call that does not fit the tool: " + compact_json(answer.blocks("tool_use")[0]["input"])
        if answer.blocks("tool_use")
        else "text instead of a call: " + brief(answer.text())
    )
    return fail(
        said, NO_TOOLS.get(tester.plan().profile.name, "choose a model that was trained for tools")
    )


def calls_tool(tester):
    answer = tester.calling()
    found = calls_of(answer)
    return (
        ok("%s(%s)" % (found[0]["name"], compact_json(found[0]["input"])))
        if found
        else no_call(tester, answer)
    )


def calls_forced_tool(tester):
    answer = tester.ask(
        "Good morning! I am in Rome.",
        tools=[WEATHER],
        tool_choice={"type": "tool", "name": "get_weather"},
    )
    if calls_of(answer):
        return ok("called when told to")
    return no_call(tester, answer)._replace(
        fix="Claude Code does without it, but for --json-schema and a few side requests"
    )


def calls_in_parallel(tester):
    answer = tester.ask(
        "What is the weather in Paris, and what is it in Rome? Call the tool for both cities at once.",
        tools=[WEATHER],
    )
    found = calls_of(answer)
    return (
        ok("%d calls in one answer" % len(found))
        if len(found) > 1
        else fail("%d call in one answer: work takes more turns" % len(found))
    )


def takes_result(tester):
    """A whole tool turn: the call that it made, or one in its place, and the result."""
    question = {"role": "user", "content": "What is the weather in Paris? Use the tool."}
    try:
        content = tester.calling().message["content"] if calls_of(tester.calling()) else None
    except ProxyError:
        content = None
    content = content or [
        {
            "type": "tool_use",
            "id": "toolu_0123456789abcdef",
            "name": "get_weather",
            "input": {"place": "Paris"},
        }
    ]
    results = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": "11 degrees, heavy rain"}
        for block in content
        if block["type"] == "tool_use"
    ]
    answer = tester.ask(
        [question, {"role": "assistant", "content": content}, {"role": "user", "content": results}],
        tools=[WEATHER],
    )
    if answer.text():
        return ok(brief(answer.text()))
    if answer.blocks("tool_use"):
        return fail(
            "the model calls again instead of answering",
            "choose a model that was trained for tools",
        )
    return (
        ok("thinking only, within %d tokens" % ANSWER_TOKENS)
        if answer.blocks("thinking")
        else fail("an empty answer", ADVICE["server"])
    )


def thinks(tester):
    answer = tester.ask(
        "How many times is the letter r in strawberry? Think first.",
        max_tokens=1200,
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "low"},
    )
    thought = "".join(block["thinking"] for block in answer.blocks("thinking"))
    return (
        ok("%d characters" % len(thought))
        if thought
        else Verdict("skip", "none shown; the model or the provider does without", "")
    )


def red_square(size=64):
    """A PNG in base64."""

    def part(kind, data):
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    rows = (b"\0" + b"\xff\0\0" * size) * size
    head = size.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    png = (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", head)
        + part(b"IDAT", zlib.compress(rows))
        + part(b"IEND", b"")
    )
    return base64.b64encode(png).decode()


def sees(tester):
    mend = "for pictures name a model that sees: TARGET_MODEL_IMAGE"
    if not tester.plan().profile.images:
        return fail("the provider is known to take no images", mend)
    picture = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": red_square()},
    }
    answer = tester.ask(
        [
            picture,
            {
                "type": "text",
                "text": "Which colour is this picture? Answer with the name of the colour.",
            },
        ]
    )
    if not answer.plan.profile.images:
        return fail("the provider refused the image", mend)
    return (
        ok("it saw the colour")
        if "red" in answer.text().lower()
        else fail("it did not see a red square: " + brief(answer.text()), mend)
    )


def holds_context(tester):
    """The context window: as the provider tells it, else by one prompt of the size of Claude Code's first request."""
    if (
        tester.plan().profile.name == "ollama"
    ):  # it tells the window of loaded models only: now the model is
        tester.proxy.probe(tester.plan(), patience(10))
    window = tester.plan().profile.context
    if window:
        seen = "%d tokens" % window
        if window < LEAST_CONTEXT:
            return fail(
                seen + "; Claude Code's first request alone has %d" % FIRST_REQUEST,
                (
                    ADVICE["overflow"]
                    if tester.plan().profile.name != "ollama"
                    else "raise it: OLLAMA_CONTEXT_LENGTH=65536 ollama serve"
                ),
            )
        return ok(
            seen
            + (": small, so conversations are compacted often" if window < GOOD_CONTEXT else "")
        )
    lines = "\n".join(
        "%d. The cat sat on the mat and looked at the rain for a while." % number
        for number in range(900)
    )
    answer = tester.ask(
        "The code word is %s.\n%s\nWhat is the code word at the top?" % (CODE_WORD, lines),
        LONG_SECONDS,
    )
    if answer.usage and answer.read() < FIRST_REQUEST // 2:
        return fail(
            "the server cut the prompt to %d tokens without a word" % answer.read(),
            ADVICE["overflow"],
        )
    seen = "took a prompt of %d tokens" % answer.read() + (
        "" if CODE_WORD in answer.text() else ", but forgot its beginning"
    )
    return ok(
        seen + "; the limit is not told: set MAX_CONTEXT so that Claude Code compacts in time"
    )


def caches_prefix(tester):
    system = "You are a terse clerk. " + " ".join(
        "Rule %d: keep the file of case %d in drawer %d." % (n, n * 7, n % 13) for n in range(170)
    )
    answers = [
        tester.ask(text, LONG_SECONDS, system=system, max_tokens=16)
        for text in ("Say yes.", "Say no.")
    ]
    read = answers[1].tokens["cache_read_input_tokens"]
    return (
        ok("%d of %d tokens" % (read, answers[1].read()))
        if read
        else fail("none told: each turn may be read, and paid, anew")
    )


def is_fast(tester):
    answer = tester.counting()
    rate = (
        (answer.tokens["output_tokens"] - 1) / (answer.last - answer.first)
        if answer.last > answer.first
        else 0
    )
    return ok(
        "first content after %.2f s" % answer.first
        + (", then %.0f tokens/s" % rate if rate else "")
    )


# Rows of a server that speaks Anthropic: what it writes, byte for byte, and how it refuses.


def orders_events(tester):
    plan = tester.plan()
    body = {
        "model": plan.model,
        "max_tokens": ANSWER_TOKENS,
        "stream": True,
        "messages": [{"role": "user", "content": "Say hello."}],
    }
    status, raw = tester.open("POST", endpoint(plan.base, "anthropic"), body)
    if status != 200:
        return failure(upstream_error(status, {}, raw))
    wrong = grammar_fault(raw.decode("utf-8", "replace"))
    return (
        fail(wrong, "Claude Code needs Anthropic's event order; report it to the server's makers")
        if wrong
        else ok("as Anthropic's")
    )


def grammar_fault(text):
    """What is wrong with an Anthropic event stream, or "": its event lines, the order, the block indexes."""
    shape, index = [], -1
    for part in re.split(r"\r?\n\r?\n", text):
        data = "\n".join(re.findall(r"^data: ?(.*?)\r?$", part, re.M))
        name = re.search(r"^event: ?(.*?)\r?$", part, re.M)
        event = as_dict(json_or_none(data))
        kind = str(event.get("type") or "")
        if not data or kind == "ping" or data == "[DONE]":
            continue
        if not name or name.group(1) != kind:
            return "an event without its own name in an `event:` line: " + ascii(part[:60])
        if kind == "error":
            return "an error in the stream: " + error_fields(data)[0]
        index += kind == "content_block_start"
        if kind.startswith("content_block_") and event.get("index") != index:
            return "%s with index %s where %d was due" % (kind, ascii(event.get("index")), index)
        shape.append(kind)
    order = r"message_start (content_block_start (content_block_delta )*content_block_stop )*message_delta message_stop $"
    return (
        ""
        if re.match(order, " ".join(shape) + " ")
        else "events out of order: " + shorten(" ".join(shape) or "none", 200)
    )


def refuses_well(tester):
    plan = tester.plan()
    status, raw = tester.open(
        "POST",
        endpoint(plan.base, "anthropic"),
        {"model": plan.model, "max_tokens": 16, "messages": []},
    )
    error = as_dict(as_dict(json_or_none(raw)).get("error"))
    if 400 <= status < 500 and error.get("type") and error.get("message"):
        return ok("HTTP %d, %s" % (status, error["type"]))
    return fail(
        "a request without messages got HTTP %d and %s" % (status, ascii(raw[:60])[1:]),
        "errors must be {type: error, error: {type, message}}",
    )


CHECKS = (
    # (name, required: Claude Code cannot work without it, function(tester) -> Verdict, formats it applies to)
    ("reachable", True, is_reachable, ""),
    ("key accepted", True, takes_key, ""),
    ("model exists", True, has_model, ""),
    ("plain reply", True, answers_plainly, ""),
    ("stream", True, streams, ""),
    ("event order", True, orders_events, "anthropic"),
    ("errors", False, refuses_well, "anthropic"),
    ("usage in stream", False, tells_usage, ""),
    ("tool call", True, calls_tool, ""),
    ("forced tool choice", False, calls_forced_tool, ""),
    ("parallel tools", False, calls_in_parallel, ""),
    ("tool result turn", True, takes_result, ""),
    ("thinking", False, thinks, ""),
    ("image", False, sees, ""),
    ("long prompt", True, holds_context, ""),
    ("cached tokens", False, caches_prefix, ""),
    ("speed", False, is_fast, ""),
)
GATES = 4  # rows without which the rest would only say the same again
MARKS = {"ok": "ok", "skip": "--", "fail": "no"}


def run_checks(tester, announce=lambda name: None):
    """Try the rows of CHECKS in turn -> (name, required, Verdict, ms) as each is done; announce(name) before."""
    blocked = ""
    for number, (name, required, look, formats) in enumerate(CHECKS):
        if formats not in ("", tester.plan().profile.format):
            continue
        began = time.monotonic()
        if blocked:
            verdict = Verdict("skip", "not tried: first \"%s\" must work" % blocked, "")
        else:
            announce(name)
            try:
                verdict = look(tester)
            except ProxyError as error:
                verdict = failure(error)
        if verdict.status == "fail" and number < GATES:
            blocked = blocked or name
        secrets = tester.settings.secrets()
        yield name, required, Verdict(*[redact(part, secrets) for part in verdict]), round(
            (time.monotonic() - began) * 1000
        )


def announce(name):
    """On a terminal, show which row is under way; its own line then covers this one."""
    if sys.stdout.isatty():
        sys.stdout.write("...  %s\r" % name)
        sys.stdout.flush()


def check(config, options):
    """Try the target and print what works, with a fix for what does not -> 0 if Claude Code can work with it, else 1."""
    if not options.base_url:
        find_target(config)
    family = options.family
    tester = Tester(config(), "claude-" + family if family else "ccfix-check")
    plan, rows, failed_rows = tester.plan(), [], []
    show = (lambda *lines: None) if options.json else say
    show("%s at %s" % (plan.model, without_password(plan.base)))
    for name, required, verdict, ms in run_checks(
        tester, (lambda name: None) if options.json else announce
    ):
        rows.append(dict(verdict._asdict(), name=name, required=required, ms=ms))
        if required and verdict.status == "fail":
            failed_rows.append(name)
        show(
            "%-4s %-18s  %s"
            % (
                "FAIL" if required and verdict.status == "fail" else MARKS[verdict.status],
                name,
                verdict.seen,
            )
        )
        if verdict.fix:
            show("     %-18s  fix: %s" % ("", verdict.fix))
    lessons = [
        lesson_text(field, value)
        for changes in tester.proxy.lessons.values()
        for field, value in changes.items()
    ]
    tester.close()
    for lesson in lessons:
        show("     learned on the way: " + lesson)
    if options.json:
        say(
            json.dumps(
                {
                    "ok": not failed_rows,
                    "model": plan.model,
                    "api_base": without_password(plan.base),
                    "profile": plan.profile.name,
                    "checks": rows,
                    "lessons": lessons,
                },
                indent=1,
            )
        )
    show(
        "Claude Code cannot work with it: " + ", ".join(failed_rows)
        if failed_rows
        else "Claude Code can work with it."
    )
    return 1 if failed_rows else 0


# ---- init: a .env, and the lines for Claude Code ---------------------------------------------------------


def ask_user(question, default=""):
    """What the user types, on stderr so that stdout stays data; default for nothing. Raises Usage at the end of input."""
    say("", out=sys.stderr)
    sys.stderr.write(question + (" [%s]: " % default if default else ": "))
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise Usage(
            "init was not finished; give -b URL, -k KEY and -m MODEL where nobody can answer"
        )
    return line.strip() or default


def choose(title, rows, default=""):
    """One of rows (texts) by number, or any other text that the user types."""
    say(title, *["  %d  %s" % (number, row) for number, row in enumerate(rows, 1)], out=sys.stderr)
    said = ask_user("number, or another" if rows else "answer", default or ("1" if rows else ""))
    return (
        rows[int(said) - 1] if re.match(r"\d{1,3}\Z", said) and 0 < int(said) <= len(rows) else said
    )


def ask_target(given):
    """Ask for what the flags left open -> {ENV_NAME: text}. Raises Usage."""
    values = dict(given)
    if "TARGET_API_BASE" not in values:
        servers = local_servers()
        rows = [
            "%s (%s on this machine: %s)" % (base, title, shorten(", ".join(models), 60))
            for title, base, models in servers
        ]
        values["TARGET_API_BASE"] = choose(
            "Where is the model? A base URL%s:" % (", or one that was found" if rows else ""),
            rows,
            "" if rows else BY_ENV["TARGET_API_BASE"].default,
        ).partition(" ")[0]
    base = parse_base_url(values["TARGET_API_BASE"])
    if "TARGET_API_KEY" not in values and not is_loopback(base):
        import getpass

        values["TARGET_API_KEY"] = getpass.getpass("Key (not shown): ", sys.stderr).strip()
    if "TARGET_MODEL" not in values:
        values["TARGET_MODEL"] = choose("Which model?", list_models(values)[:30])
    return values


def list_models(values):
    """The models that a target lists; none where it does not answer."""
    settings = Settings([("init", values)])
    plan = plan_for(settings, "", lambda base, model: profile_for(base, model, settings.profile))
    upstream = Upstream(10, 10, settings.ca_bundle, settings.client_cert, settings.insecure)
    try:
        return model_names(
            get_json(upstream, models_url(plan), 10, upstream_headers(plan, settings, {}))
        )
    except ProxyError as e:
        say("ccfix: its models cannot be listed: %s" % e, out=sys.stderr)
        return []
    finally:
        upstream.close()


def detect_target(given):
    """What the flags left open, where nobody can be asked: a server found on this machine. Raises Usage."""
    values = dict(given)
    if "TARGET_API_BASE" not in values and "TARGET_API_KEY" not in values:
        servers = local_servers()
        if not servers:
            raise Usage(
                "nobody can be asked and no model server was found on this machine: give -b URL, -k KEY and -m MODEL"
            )
        values["TARGET_API_BASE"] = servers[0][1]
        say("ccfix: found %s at %s" % servers[0][:2], out=sys.stderr)
    if "TARGET_MODEL" not in values:
        models = list_models(values)
        if not models:
            raise Usage("no model was given: -m MODEL")
        values["TARGET_MODEL"] = models[0]
    return values


def init(config, options):
    """Write a commented .env, and print the lines for Claude Code's settings.json."""
    path = options.env_file
    if os.path.lexists(path) and not options.force:
        raise Usage(
            "%s is there already; --force replaces it, --env-file FILE writes another" % path
        )
    given = {name: value for name, value in config.given.items() if name in BY_ENV}
    values = (
        ask_target(given) if sys.stdin is not None and sys.stdin.isatty() else detect_target(given)
    )
    settings = Settings([("init", values)])
    try:
        write_private(path, env_template(values))
    except OSError as e:
        raise Usage("%s cannot be written: %s" % (path, e.strerror or e))
    say(
        "ccfix: wrote %s (only you can read it). Next:" % path,
        "  %s check" % program_name(),
        "  %s run" % program_name(),
        "or  %s  with this in ~/.claude/settings.json:" % program_name(),
        out=sys.stderr,
    )
    key = settings.anthropic_api_key or "ccfix"
    lines = {
        "ANTHROPIC_BASE_URL": "http://127.0.0.1:%d" % settings.proxy_port,
        "ANTHROPIC_AUTH_TOKEN": key,
    }
    plan = plan_for(
        settings,
        "",
        lambda base, model: profile_for(base, model, settings.profile)._replace(
            context=settings.max_context
        ),
    )
    wanted = session_variables(lines["ANTHROPIC_BASE_URL"], key, settings, plan)
    say(
        json.dumps(
            {"env": dict(wanted, **CLAUDE_DEFAULTS), "permissions": {"disableAutoMode": "disable"}},
            indent=2,
        )
    )
    return 0


def write_private(path, text):
    """Write a file, whole or not at all, that only the user can read. Raises OSError."""
    part = "%s.%d.part" % (path, os.getpid())
    try:
        # surrogateescape: under LC_ALL=C, Python 3.6 reads other letters of the command line as such
        with open(
            os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600),
            "w",
            encoding="utf-8",
            errors="surrogateescape",
            newline="\n",
        ) as file:
            file.write(text)
        os.replace(part, path)
    except OSError:
        if os.path.exists(part):
            os.unlink(part)
        raise


# ---- install, uninstall, open ----------------------------------------------------------------------------

OURS = "ccfix: let Claude Code use any model"  # in every file that install writes
CMD = '@rem %s\r\n@"%s" "%%~dp0ccfix.py" %s\r\n'


def install_folder(windows, environ, home):
    """Where programs of the user's own go. On Windows one that is on the PATH from the start, if it is there."""
    if not windows:
        return os.path.join(home, ".local", "bin")
    local = environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
    apps = os.path.join(local, "Microsoft", "WindowsApps")
    return (
        apps
        if apps.lower() in environ.get("PATH", "").lower().split(";")
        else os.path.join(local, "Programs", "ccfix")
    )


def installed_files(windows, source_text, python):
    """{file name: text} of an installation. `ccf` alone opens the status page."""
    if not windows:
        return {
            "ccfix": source_text,
            "ccf": '#!/bin/sh\n# %s\n[ $# -gt 0 ] || set -- open\nexec "$(dirname "$0")/ccfix" "$@"\n'
            % OURS,
        }
    opening = '%%*\r\n@goto :eof\r\n:open\r\n@"%s" "%%~dp0ccfix.py" open' % python
    return {
        "ccfix.py": source_text,
        "ccfix.cmd": CMD % (OURS, python, "%*"),
        "ccf.cmd": '@if "%~1"=="" goto open\r\n' + CMD % (OURS, python, opening),
    }


def is_ours(path):
    """Whether install wrote this file (or it is not there)."""
    return not os.path.lexists(path) or OURS in file_text(path)


def install(config, options):
    """Copy this file to a folder of the user's on the PATH, as ccfix and ccf."""
    windows = os.name == "nt"
    folder = os.path.abspath(options.dir or install_folder(windows, os.environ, config.home))
    with open(os.path.abspath(__file__), encoding="utf-8") as file:
        files = installed_files(windows, file.read(), sys.executable)
    foreign = [name for name in files if not is_ours(os.path.join(folder, name))]
    if foreign and not options.force:
        raise Usage(
            "%s is another program's; --force replaces it, --dir DIR takes another folder"
            % os.path.join(folder, foreign[0])
        )
    try:
        os.makedirs(folder, exist_ok=True)
        for name, text in files.items():
            place_program(os.path.join(folder, name), text)
    except OSError as e:
        raise Usage(
            "cannot install in %s: %s; --dir DIR takes another folder" % (folder, e.strerror or e)
        )
    say(
        "installed ccfix %s as %s"
        % (__version__, ", ".join(os.path.join(folder, name) for name in files))
    )
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        say(
            "ccfix: %s is not on your PATH; add it:" % folder,
            (
                '  setx PATH "%%PATH%%;%s"' % folder
                if windows
                else "  export PATH=\"%s:$PATH\"    (in ~/.profile or your shell's own file)"
                % folder
            ),
            out=sys.stderr,
        )
    return 0


def place_program(path, text):
    """Write an executable file at once, so that a running one is never half a file."""
    part = "%s.%d.part" % (path, os.getpid())
    with open(part, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.chmod(part, 0o755)
    os.replace(part, path)


def uninstall(config, options):
    """Remove what install wrote; nothing else."""
    windows = os.name == "nt"
    folder = os.path.abspath(options.dir or install_folder(windows, os.environ, config.home))
    paths = [os.path.join(folder, name) for name in installed_files(windows, "", "")]
    there = [path for path in paths if os.path.lexists(path)]
    foreign = [path for path in there if not is_ours(path)]
    try:
        for path in there:
            if path not in foreign:
                os.remove(path)
                say("removed " + path)
    except OSError as e:
        raise Usage("cannot remove %s: %s" % (path, e.strerror or e))
    for path in foreign:
        say("ccfix: %s is another program's and stays" % path, out=sys.stderr)
    if not there:
        say("ccfix: nothing of ccfix is in " + folder, out=sys.stderr)
    return 1 if foreign else 0


def open_page(config, options):
    """Open the status page of the running proxy in the browser; its address goes to stdout."""
    settings = config()
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.proxy_host, settings.proxy_host)
    url, upstream = "http://%s/" % host_port(host, settings.proxy_port), Upstream(3, 3)
    try:
        running = get_json(upstream, url + "health", 3).get("name") == "ccfix"
    except ProxyError:
        running = False
    finally:
        upstream.close()
    if not running:
        say(
            "ccfix: no ccfix is running at %s; start it (%s), or name its port with -p"
            % (url, program_name()),
            out=sys.stderr,
        )
        return 1
    say(url)
    import webbrowser

    if not webbrowser.open(url):
        say("ccfix: no browser was found; open the address yourself", out=sys.stderr)
    return 0


# ---- the command line --------------------------------------------------------------------------------


def settings_options(parser):
    """Add the flags of all settings; a flag that is not given leaves no trace."""
    for row in SETTINGS:
        if row.const:
            parser.add_argument(
                *row.flags,
                dest=row.env,
                action="store_const",
                const=row.const,
                default=argparse.SUPPRESS,
                help=row.help,
            )
        elif row.flags:
            parser.add_argument(
                *row.flags,
                dest=row.env,
                metavar=row.env.rsplit("_", 1)[-1],
                default=argparse.SUPPRESS,
                help=row.help,
            )
    parser.add_argument(
        "--env-file", metavar="FILE", help="read settings from FILE instead of .env"
    )


def target_options(parser):
    """What stands in for a provider."""
    parser.add_argument(
        "--demo", action="store_true", help="use the embedded demo model: no key, no network"
    )
    parser.add_argument(
        "--replay",
        metavar="DIR",
        help="answer with the replies that --record DIR wrote, in order, instead of a provider's",
    )


def run_options(parser):
    target_options(parser)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)


def check_options(parser):
    target_options(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the checklist"
    )
    parser.add_argument(
        "--family", choices=FAMILIES, help="check the target of this family of Claude models"
    )
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="check a server that speaks Anthropic, ccfix itself too, with the key from -k,"
        " ANTHROPIC_AUTH_TOKEN or ANTHROPIC_API_KEY",
    )


def init_options(parser):
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")


def install_options(parser):
    parser.add_argument(
        "--dir",
        metavar="DIR",
        help="the folder (default: ~/.local/bin; on Windows one of %%LOCALAPPDATA%%)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace another program's file of that name"
    )


class Command(NamedTuple):
    """A command: act(config, options) -> exit code; what it does in a line; more: options of its own; settings: whether
    it takes the settings' flags; example: shown under its --help."""

    act: object
    help: str
    more: object = None
    settings: bool = True
    example: str = ""


COMMANDS = {
    "serve": Command(
        serve,
        "serve; what is done without a command",
        target_options,
        example="ccfix -k KEY -b https://api.example.com/v1 -m MODEL",
    ),
    "run": Command(
        run,
        "start a proxy and Claude Code on it, for one session",
        run_options,
        example="ccfix run\nccfix run -m MODEL -- -p \"hello\"",
    ),
    "check": Command(
        check,
        "try the model, and print what works and how to mend the rest",
        check_options,
        example="ccfix check\nccfix check --base-url http://127.0.0.1:8080\nexit code: 0 if Claude Code can work with it, 1 if not",
    ),
    "init": Command(
        init,
        "ask for provider, key and model, and write .env",
        init_options,
        example="ccfix init\nccfix init -b https://api.example.com/v1 -k KEY -m MODEL",
    ),
    "install": Command(
        install,
        "put ccfix and ccf on the PATH (ccf alone opens the status page)",
        install_options,
        settings=False,
    ),
    "uninstall": Command(uninstall, "remove what install wrote", install_options, settings=False),
    "open": Command(
        open_page,
        "open the status page of the running proxy in the browser",
        example="ccfix open\nccfix open -p 9000",
    ),
}


USAGES = {"": "ccfix [COMMAND] [options]", "run": "ccfix run [options] [-- claude arguments]"}


def settings_help():
    """The settings that have no flag, for --help: two columns within 78."""
    import textwrap

    lines = [
        "settings without a flag, in the environment or .env (the command line wins, then",
        "the environment, .env, Claude Code's settings.json; keys are best kept in .env,",
        "since everyone on a machine can read command lines):",
    ]
    for row in SETTINGS:
        if not row.flags:
            lines += textwrap.wrap(
                "%-24s %s%s"
                % (
                    row.env,
                    row.help,
                    " (%s)" % row.default if row.default and row.default not in row.help else "",
                ),
                76,
                initial_indent="  ",
                subsequent_indent=" " * 27,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def parser_of(name):
    """The parser of a command; "": of ccfix without one."""
    command = COMMANDS[name or "serve"]
    epilog = []
    if not name:
        epilog.append(
            "commands (ccfix COMMAND --help tells more):\n"
            + "\n".join("  %-10s %s" % (word, row.help) for word, row in COMMANDS.items())
        )
    if command.example:
        epilog.append("examples:\n" + re.sub(r"(?m)^", "  ", command.example))
    if command.act in (serve, check):
        epilog.append(settings_help())
    elif command.settings:
        epilog.append(
            "Settings without a flag stand in the environment or .env; ccfix --help has\nthe list."
        )
    parser = argparse.ArgumentParser(
        prog=("ccfix " + name).strip(),
        usage=USAGES.get(name),
        epilog="\n\n".join(epilog),
        description=(
            command.help[0].upper() + command.help[1:] + "."
            if name
            else "Let Claude Code use any model behind an OpenAI-compatible API."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.color = False  # 3.14 colours its help
    parser.add_argument("--version", action="version", version="ccfix " + __version__)
    if command.settings:
        settings_options(parser)
    if command.more:
        command.more(parser)
    return parser


def command_line(argv):
    """(Command, its options). Raises Usage for a command that is none."""
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    if name and name not in COMMANDS:
        raise Usage(
            "there is no command %s; the commands are %s" % (ascii(name), ", ".join(COMMANDS))
        )
    words, behind = argv[1 if name else 0 :], []
    if name == "run" and "--" in words:
        at = words.index("--")
        words, behind = words[:at], words[at + 1 :]
    options = parser_of(name).parse_args(words)
    if name == "run":
        if options.arguments:
            raise Usage("%s: arguments for claude come after --" % ascii(options.arguments[0]))
        options.arguments = behind
    return COMMANDS[name or "serve"], options


def config_of(command, options):
    """The Config of a command line. Raises Usage, SettingError."""
    given = {row.env: getattr(options, row.env) for row in SETTINGS if hasattr(options, row.env)}
    alone, env_file = False, getattr(options, "env_file", None)
    if env_file and command.act is not init and not os.path.isfile(env_file):
        raise Usage("--env-file %s is not there" % env_file)
    if getattr(options, "demo", False):
        given.update(
            TARGET_API_BASE=start_demo(),
            TARGET_MODEL=given.get("TARGET_MODEL", "demo"),
            PROFILE="demo",
            TARGET_FORMAT="openai",
        )
        alone = True
    elif getattr(options, "replay", None):
        given.update(dict({"TARGET_MODEL": "replay"}, **given), **start_replay(options.replay))
        alone = True
    elif getattr(options, "base_url", None):
        key = (
            given.get("TARGET_API_KEY")
            or os.environ.get("ANTHROPIC_AUTH_TOKEN")
            or os.environ.get("ANTHROPIC_API_KEY")
            or ""
        )
        given.update(
            TARGET_API_BASE=options.base_url, TARGET_FORMAT="anthropic", TARGET_API_KEY=key
        )
        given.setdefault("TARGET_MODEL", "claude-opus-5-5")
        alone = True
    if hasattr(options, "env_file"):
        options.env_file = env_file or ".env"
    # init must also work where the .env that it replaces is broken.
    layers = {} if command.act is init else dict(os.environ)
    return Config(
        given, layers, "" if command.act is init else env_file or ".env", home_folder(), alone
    )


def main(argv=None):
    """Run the command line -> exit code: 0 good, 1 failed, 2 used wrongly."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        command, options = command_line(argv)
        config = config_of(command, options)
        profile_for(config().target_api_base, config().target_model, config().profile)
        return command.act(config, options)
    except (Usage, SettingError) as e:
        return complain(str(e))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # | head: nobody reads on; Python must not complain about it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def main_as_hook(*_):
    """main(), as the exception hook of the script. CPython holds the syntax tree of the script it was given (18 MB of this one)
    while the script runs; the hook is what it calls after that. The last line's error is for nothing else.
    """
    sys.excepthook = sys.__excepthook__
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    if sys._getframe().f_back:  # -m, a debugger, or another program runs it: they hold no tree
        sys.exit(main())
    sys.excepthook = main_as_hook
    raise SyntaxWarning("the syntax tree is no longer needed")
