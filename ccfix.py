#!/usr/bin/env python3
"""ccfix: let Claude Code use any model behind an OpenAI-compatible API.

One file, standard library only, Python 3.6 to 3.14. Start it, point Claude Code at it, work.

    python3 ccfix.py -k KEY -m MODEL -b https://api.example.com/v1
    python3 ccfix.py --demo                  # no key, no network: an embedded model answers

How a request travels:

    Claude Code --HTTP--> Handler -> Proxy -> normalize -> write -> Upstream --HTTP--> provider
                                       |                    |
    Claude Code <--SSE--- encode_event <- MessageWriter <- read <- sse_payloads <- blocks

`normalize` is Anthropic in, Anthropic out: what every provider needs, done once. `write` and `read`
are the two ends of a *format*, an API that providers speak; each is a row of FORMATS. One direction
in, one direction out; nothing calls backwards, but for one: whoever waits, waits through the
client's `wait`, which notices a client that hung up and writes the pings that keep a silent stream
alive. Each connection has a thread.

Words: a *block* is Anthropic content, a *chunk* an OpenAI stream object, an *event* an Anthropic
stream event, a *payload* the data string of an SSE event, a *profile* what is special about a
provider, a *lesson* a change of the profile that the provider's own errors taught us, the *target*
the model that is really called, the *disguise* the model name that Claude Code is shown.

    1 Vocabulary   tables that all sections share
    2 Errors       what went wrong, whose fault it is, and how Claude Code is told
    3 Settings     one row a setting; command line > environment > .env > Claude's settings > default
    4 Providers    one row a provider: how it differs from the default
    5 Normalize    an Anthropic request -> the Anthropic request that this provider can take
    6 Formats out  a normalized request -> what goes over the wire
    7 Tool text    arguments fixed against the tool's schema; calls that a model wrote as text
    8 Stream in    SSE bytes -> payloads -> a reader -> MessageWriter -> Anthropic events
    9 Refusals     a provider's error -> a lesson
   10 Upstream     connections to the provider, kept alive
   11 Store        stored replies, memory and ledger in SQLite; records
   12 Proxy        joins the above: body in, events out; knows no client socket
   13 HTTP         handler, routes, the one error funnel, server
   14 Page         what a browser sees at /
   15 Demo         the embedded model
   16 Commands     serve, run, check, init, install, uninstall, open

Sections 1 to 9 are pure: bytes and dicts in, bytes and dicts out; no sockets, files, clocks or
printing.
"""

import argparse
import base64
import collections
import contextlib
import email.utils
import hashlib
import hmac
import http.server
import io
import itertools
import json
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
    "normalize",
    "FORMATS",
    "sse_payloads",
    "MessageWriter",
    "encode_event",
    "fold",
    "unfold",
    "upstream_error",
    "Settings",
    "Profile",
    "Proxy",
    "Server",
]


# ==================================================================================================
# 1  Vocabulary: tables that both directions share
# ==================================================================================================

STOP_REASONS = {
    # OpenAI's finish_reason -> Anthropic's stop_reason. Any other word is a normal end
    # ("end_turn"): stop, end, eos (Together), function_call, repetition_truncation (MiMo). And any
    # tool call makes it "tool_use", whatever this says.
    "length": "max_tokens",
    "model_length": "max_tokens",  # Mistral
    "max_tokens": "max_tokens",
    "content_filter": "refusal",  # OpenAI, Azure
    "sensitive": "refusal",  # Z.ai
}

FINISH_ERRORS = {
    # A finish_reason that says that the reply failed: (HTTP status for the client, sentence).
    "insufficient_system_resource": (  # DeepSeek
        529,
        "The provider ran out of resources in the middle of the reply.",
    ),
    # OpenRouter, Mistral
    "error": (502, "The provider reported an error in the middle of the reply."),
    # Z.ai
    "network_error": (502, "The provider lost its connection in the middle of the reply."),
    "abort": (502, "The model server aborted the reply."),  # SGLang
}


class BlockKind(NamedTuple):
    """How a kind of content block is streamed, finished and counted; a new kind is a row of BLOCKS.

    A stream opens it with `empty` beside the type in content_block_start, and brings its content in
    deltas {"type": delta, piece: string}. The finished block holds the joined pieces in `field`: a
    tool's are the text of a JSON object, and `field` holds that object. Kinds without a delta, and
    those that are missing here, come whole in content_block_start.
    """

    empty: dict
    field: str = ""
    delta: str = ""
    piece: str = ""
    tokens: int = 0  # flat estimate of a block, where its source is not text; 0: by its length


BLOCKS = {
    "text": BlockKind({"text": ""}, "text", "text_delta", "text"),
    "thinking": BlockKind(
        {"thinking": "", "signature": ""}, "thinking", "thinking_delta", "thinking"
    ),
    "tool_use": BlockKind({"input": {}}, "input", "input_json_delta", "partial_json"),
    "server_tool_use": BlockKind({"input": {}}, "input", "input_json_delta", "partial_json"),
    "image": BlockKind({}, tokens=1500),  # Anthropic's limit is about 1,600 an image
    "document": BlockKind({}, tokens=1500),  # a page or two of a PDF
}

# HTTP status -> Anthropic's error type (docs.anthropic.com/en/api/errors); any other is api_error.
ERROR_TYPES = dict.fromkeys((400, 405, 411, 414, 415, 417, 422, 424, 431), "invalid_request_error")
ERROR_TYPES.update(
    {
        401: "authentication_error",
        402: "billing_error",
        403: "permission_error",
        404: "not_found_error",
        408: "timeout_error",
        413: "request_too_large",
        429: "rate_limit_error",
        504: "timeout_error",
        529: "overloaded_error",
    }
)

FAMILIES = ("opus", "sonnet", "haiku")

REASONING_FIELDS = {
    # Fields in which a model's reasoning travels: in a delta or message of a reply, and back to the
    # provider in an assistant message (Profile.reasoning_field names the one). This is the only
    # list: a provider with a new field is one row. In order of trust: of several that hold a
    # string the first counts (chutes.ai sends two with the same text). Shapes:
    #   string  the reasoning itself
    #   parts   a list of {"type", "text" | "summary" | "data", "signature", ...}, kept as it came
    #   opaque  nothing to show: tool_calls[i].extra_content.google.thought_signature
    "reasoning_content": "string",  # DeepSeek, DashScope, Kimi, Z.ai, xAI, llama.cpp, SGLang, NIM
    "reasoning": "string",  # Ollama, vLLM, Groq, Cerebras, OpenRouter, StepFun
    "reasoning_text": "string",  # GitHub Copilot
    "reasoning_details": "parts",  # OpenRouter; MiniMax with reasoning_split
    "google": "opaque",  # Gemini 3
}
REASONING_STRINGS = tuple(name for name, shape in REASONING_FIELDS.items() if shape == "string")

# First line of Claude Code's system text: it describes the user's machine, and differs between
# versions. Sent on, it would tell on the user, and cost the provider's whole prefix cache.
BILLING_LINE = "x-anthropic-billing-header:"

# What Claude Code tells the model of the tokens that are left; it takes it out of the history later.
TOKEN_MARKER = re.compile(r"\s*<total_tokens>[^<]*</total_tokens>\s*$")


def compact_json(value, _encode=json.JSONEncoder(separators=(",", ":")).encode):
    """value as JSON text without spaces; ASCII, since half a surrogate pair has no UTF-8."""
    return _encode(value)


def to_string(raw):
    """bytes as a string, U+FFFD where they are not UTF-8; a string as it is."""
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw


def json_or_none(raw):
    """raw (bytes or a string) parsed as JSON, or None: not JSON, too deep, or too long a number."""
    try:
        return json.loads(to_string(raw), parse_int=parse_integer)
    except (ValueError, RecursionError):
        return None


def without_billing(text):
    """A system string without the billing line on top."""
    return text.partition("\n")[2] if text.startswith(BILLING_LINE) else text


def as_dict(value):
    """value if it is a dict, else an empty one: for walking replies that may hold anything."""
    return value if isinstance(value, dict) else {}


def as_list(value):
    """value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


MAX_DIGITS = 300  # of a whole number; Python before 3.11 takes 20 s for a million, hours for more


def parse_integer(digits):
    """JSON's integers. Raises ValueError where there are too many digits."""
    if len(digits) > MAX_DIGITS:
        raise ValueError("a number has %d digits" % len(digits))
    return int(digits)


def parse_float(digits):
    """JSON's other numbers. Raises ValueError for 1e999, which would be written as Infinity."""
    value = float(digits)
    if abs(value) == float("inf"):
        raise ValueError("%s is too large" % digits[:20])
    return value


def refuse_constant(name):
    """NaN and Infinity, which Python reads and RFC 8259 does not know. Raises ValueError."""
    raise ValueError("%s is not a JSON number" % name)


JSON_HOOKS = dict(parse_int=parse_integer, parse_float=parse_float, parse_constant=refuse_constant)
STRICT = json.JSONDecoder(**JSON_HOOKS)  # Python's own takes NaN, 1e999 and numbers without end


# ==================================================================================================
# 2  Errors: what went wrong, whose fault it is, and how Claude Code is told
# ==================================================================================================


class ProxyError(Exception):
    """An error that the client is shown.

    status: HTTP status; type: Anthropic's error type; headers: extra reply headers; kind: what
    ccfix itself decides by ("overflow", "billing", "auth", "connect", "timeout", "cut", ...);
    retry: worth another try before any content went out.
    """

    default = 500

    def __init__(self, message, status=None, type=None, headers=(), kind="", retry=False):
        Exception.__init__(self, message)
        self.message, self.status = message, status or self.default
        self.type = type or ERROR_TYPES.get(self.status, "api_error")
        self.headers, self.kind, self.retry = dict(headers), kind, retry

    def body(self, request_id=""):
        """Anthropic's error object (docs.anthropic.com/en/api/errors)."""
        return {
            "type": "error",
            "error": {"type": self.type, "message": self.message},
            "request_id": request_id,
        }


class BadRequest(ProxyError):
    """The client's request cannot be served as it is."""

    default = 400


class UpstreamError(ProxyError):
    """The provider, or the way to it, failed.

    numbers: (prompt, output, limit) in tokens, as an overflow error told them, 0 where it did not;
    text: the provider's own words (at most MAX_WORDS characters), for learning.
    """

    default = 502
    numbers, text = (0, 0, 0), ""


class ClientGone(Exception):
    """The client hung up: nobody waits for the answer any more."""


# ---- what a provider says ------------------------------------------------------------------------

MAX_WORDS = 4000  # characters of a provider's words that are searched, and shown
TAIL = 1000  # of these are the end of longer words: numbers often stand there


def head_and_tail(text):
    """text, or the front and the end of one that is longer than MAX_WORDS characters.

    The only place that bounds what the patterns of error texts run on: a provider may send
    megabytes.
    """
    if len(text) <= MAX_WORDS:
        return text
    return text[: MAX_WORDS - TAIL - 5] + " ... " + text[-TAIL:]


def error_fields(raw):
    """(message, code, type) of an error body (bytes or a string), each of MAX_WORDS at most.

    The shapes that providers use: {error:{message,type,code}} . [{error:{..}}] (Gemini) .
    {error:"..",code} (xAI, LM Studio, NIM) . flat {message,..} (Mistral, Cerebras, SiliconFlow) .
    {base_resp:{status_msg}} (MiniMax) . {detail:..} (FastAPI) . RFC 7807 . HTML . plain text.
    """
    text = to_string(raw).strip()
    body = json_or_none(text)
    if isinstance(body, list) and body:
        body = body[0]
    if isinstance(body, dict):
        fields = error_body_fields(body)
    else:
        fields = readable_text(body if isinstance(body, str) else text), "", ""
    return tuple(head_and_tail(str(field)) for field in fields)


def error_body_fields(body):
    """(message, code, type) of an error body that is a dict; code and type may be anything."""
    error, base = body.get("error"), as_dict(body.get("base_resp"))
    if isinstance(error, dict):
        body, error = error, None
    places = error, body.get("message"), base.get("status_msg"), body.get("detail"), body.get("msg")
    words = next(filter(None, places), body)
    words = words.strip() if isinstance(words, str) else compact_json(words)
    inner = as_dict(body.get("metadata")).get("raw")  # OpenRouter: its provider's own error body
    if isinstance(inner, str) and inner.strip():
        words += ": " + error_fields(inner)[0]
    code = body.get("code") or base.get("status_code") or body.get("status") or ""
    return words, code, body.get("type") or body.get("title") or ""


def readable_text(text):
    """Plain text as it is; of an HTML page the title and the heading, without tags."""
    text = head_and_tail(text)
    if not re.match(r"(?i)<(!doctype|html|head|body|\?xml)", text):
        return text
    found = re.findall(r"(?is)<(?:title|h1)\b[^<>]{0,40}>([^<]{1,90})", text)
    parts = dict.fromkeys(" ".join(part.split()) for part in found)
    return " - ".join(filter(None, parts)) or "an HTML page"


# Patterns of error texts. They are tried in any case, and compiled when the first error comes, not
# at each start. No repetition is open: each step is bounded, so that the time is a small multiple
# of the text's length, whatever a provider sends (a test counts the steps).
def any_of(*patterns):
    """One pattern, for any case, of several."""
    return "(?is)" + "|".join(patterns)


OVERFLOW = any_of(
    r"context[_ ](?:length|window|size|limit)",  # OpenAI, vLLM, SGLang, llama.cpp, MiniMax, Ollama
    r"maximum (?:prompt|context|model)",  # xAI, Mistral
    r"prompt_tokens_exceeded",  # Copilot's code
    r"prompt.{0,40}too large",
    r"too (?:long|large for model)",  # Anthropic, Bedrock, Ollama; Mistral
    r"input token count",  # Gemini
    r"exceed.{0,45}(?:token limit|limit of \d|context|maximum|max length)",  # Kimi, Copilot, Z.ai
    r"reduce the (?:length|size) of the (?:messages|input|prompt)",  # Groq
    r"range of input length",  # DashScope
    r"tokens to keep",  # LM Studio
    r"request (?:body )?too large",  # GitHub Models
    r"tokens? exceed",  # OpenAI's gpt-5
    r"longer than the model",  # SGLang, Together
)
NO_OVERFLOW = any_of(
    # What has such words and is something else.
    r"(?:image|file) exceeds|\d ?MB\b|pixels",  # Anthropic's and others' limits of media
    r"(?:string|array) too long|tool_calls?\[|invalid 'messages",  # OpenAI's limits of ids, lists
    r"connections|retries|rate limit|too many requests|throttl|per minute",
    r"(?:took|taking|waited|waiting) too long|too long to",  # a timeout
)
# Groq, OpenAI: one request above the tokens per minute. Waiting never helps, so it is an overflow.
TOO_LARGE = r"(?s)Request too large for .{1,200}Limit \d{1,12}, Requested \d"

OVERFLOW_NUMBERS = (
    # (prompt, output, limit): patterns of each, the most telling first; # stands for the number.
    (
        r"resulted in # tokens",  # OpenAI
        r"# (?:in the messages|of text input)",  # OpenAI's older form; OpenRouter
        r"# tokens from the input",  # SGLang
        r"# (?:tokens|\+ \d{1,12}) >",  # Anthropic
        r"(?:contains|have|got) (?:at least )?# (?:input )?token",  # vLLM; xAI, Mistral
        r"(?:input|request) \(# tokens\)",  # SGLang, Together; llama.cpp
        r"token count (?:of )?\(?#",  # Copilot; Gemini
        r"first # tokens",  # LM Studio
        r"n_prompt_tokens\W{1,4}#",  # llama.cpp's field
        r"requested:? (?:about )?#",  # Kimi; tokens per minute; OpenAI's total
    ),
    (
        r"# in the (?:completion|output)",  # OpenAI's older form; OpenRouter
        r"# output tokens",  # vLLM
        r"# tokens for the completion",  # SGLang
        r"\d \+ # >",  # Anthropic
    ),
    (
        r"(?:context|prompt) length (?:is|of) (?:only )?#",  # OpenAI, vLLM; xAI; LM Studio
        r"> #",  # Anthropic
        r"context (?:length|size) \(# tokens",  # SGLang, Together; llama.cpp
        r"allowed \(?#",  # Gemini
        r"limit(?: of|:)? #",  # gpt-5, Copilot; Kimi; tokens per minute
        r"with # maximum context",  # Mistral
        r"max size: # tokens",  # GitHub Models
        r"length should be \[1, #\]",  # DashScope
        r"n_ctx\W{1,4}#",  # llama.cpp's field
    ),
)

BILLING = any_of(
    r"insufficient[_ ](?:user_)?(?:quota|balance|credit|fund)",  # OpenAI; DeepSeek, MiniMax
    r"exceeded your current quota|billing (?:hard )?limit|billing_not_active",  # OpenAI
    r"balance is (?:insufficient|too low)|credit balance",  # Anthropic
    r"Arrearage|good standing",  # DashScope
    r"payment required|out of credits|can only afford",  # OpenRouter
    r"\(1008\)|quota (?:is )?(?:exhausted|used up)",  # MiniMax
    # Chinese gateways: quota used up, balance used up, in arrears
    "\u989d\u5ea6\u4e0d\u8db3|\u4f59\u989d\u4e0d\u8db3|\u6b20\u8d39",
)
OVERLOADED = any_of(
    r"overload|at capacity|over capacity|server is busy",  # Kimi, Anthropic; Groq
    r"currently unavailable|loading model",  # xAI, inside a 200; llama.cpp at its start
)
NO_MODEL = any_of(
    r"model.{0,80}(?:(?:does )?not exist|not found|not supported in)",  # OpenAI, vLLM; Ollama
    r"model.{0,80}(?:no longer available|end of life|decommissioned)",  # NVIDIA NIM; Groq
    r"modelCode|model_not_found|unknown model",  # Z.ai; OpenAI
    r"only supported in v1/responses|not a chat model",  # OpenAI's codex and pro models
    r"unsupported_api_for_model|not accessible via the /chat/completions",  # GitHub Copilot
)
PERMANENT_500 = any_of(  # llama.cpp answers 500 where no other try can help
    r"jinja|chat template|must be at the beginning",
    r"image input is not supported|tool call arguments as JSON",
)
BAD_KEY = any_of(
    r"api key not valid|api_key_invalid",  # Gemini: a 400
    r"(?:invalid|incorrect|wrong) api[ _-]?key|api[ _-]?key is (?:invalid|not valid|wrong)",
)
SAMPLING = any_of(
    r"tool_use_failed|failed_generation",  # Groq
    r"does not match the expected .{0,20}format",  # llama.cpp
)


def overflow_numbers(text):
    """(prompt, output, limit) in tokens as an overflow error tells them; 0 where it does not."""
    return tuple(first_number(patterns, text) for patterns in OVERFLOW_NUMBERS)


def first_number(patterns, text):
    """The number of the first pattern that fits, or 0; more than 12 digits are no token count."""
    for pattern in patterns:
        found = re.search(pattern.replace("#", r"(\d{1,12})"), text, re.I)
        if found:
            return int(found.group(1))
    return 0


def is_overflow(status, text):
    """Whether an error says that the context is too small: for the prompt, or with the output.

    text: the provider's words and code. A limit of the output alone is not an overflow.
    """
    if re.search(TOO_LARGE, text):
        return True
    return (
        status in (200, 400, 413, 422, 500)
        and re.search(OVERFLOW, text)
        and not re.search(NO_OVERFLOW, text)
        and not output_limit(text)
    )


def output_limit(text):
    """The limit of output tokens that an error names, or 0.

    As in "max_tokens ... supports at most 4096" (OpenAI), "must be less than or equal to" (Groq),
    "the valid range of max_tokens is [1, 8192]" (DeepSeek), "a value <= 12288" (Ark).
    """
    names_output = re.search(r"max(?:imum)?_?(?:completion_|output_|new_)?tokens", text)
    if not names_output or re.search("context (?:length|limit)", text):
        return 0
    limit = re.search(r"(?:at most|less than or equal to|<=|\[\d{1,9},|> )\s{0,9}`?(\d{3,7})", text)
    return int(limit.group(1)) if limit else 0


# ---- what Claude Code is told --------------------------------------------------------------------


def overflow_error(prompt, limit, estimate=0, window=0):
    """The one text by which every version of Claude Code knows that it must compact.

    All in tokens, 0 where not known: prompt and limit as the provider told them, estimate and
    window as ccfix knows them. The text always says that the prompt is longer than the limit.
    """
    limit = limit or window or max(1000, (prompt or estimate) - 1)
    prompt = max(prompt or estimate, limit + 1)
    return UpstreamError(
        "prompt is too long: %d tokens > %d maximum" % (prompt, limit), 400, kind="overflow"
    )


def upstream_error(status, headers, raw):
    """The UpstreamError that makes Claude Code do the right thing about an upstream's error.

    status, headers, raw: of the upstream's reply, or of an error inside a 200. Chosen by what the
    real client does with each status: 400 is sent up to six times and 401 for three minutes, so an
    unrecognised 400 goes out as 424 (once), and a bad key with `x-should-retry: false`; billing is
    402 (once); 429 and 5xx are retried with Retry-After; the words of a 404 it hides (see
    Handler.fail).
    """
    fields = error_fields(raw)
    text = head_and_tail(" ".join(fields))
    message = fields[0] or "the provider answered HTTP %d without saying why" % status
    row = next(row for row in ERROR_ROWS if row.matches(status, text))
    # Some numbers stand in fields beside the message: llama.cpp's n_ctx, Gemini's retryDelay.
    error = row.error(headers, message, head_and_tail(text + " " + to_string(raw[-TAIL:])))
    error.text = text
    return error


def retry_after(headers, text):
    """Whole seconds that the provider asks to wait, as a string; "" where it does not ask.

    From its Retry-After, which is a number or a date (RFC 9110 10.2.3), else from its words.
    """
    value = str(headers.get("retry-after") or "").strip()
    in_seconds = re.match(r"\d{1,9}(?:\.\d{1,9})?\Z", value)
    wait = float(value) if in_seconds else seconds_between(headers.get("date"), value)
    if not wait:
        words = re.search(
            r"(?i)(?:retryDelay\W{1,5}"  # Gemini's RetryInfo
            r"|(?:retry|try again) (?:after|in) )(\d{1,9}(?:\.\d{1,9})?) ?s",  # Azure, Groq
            text,
        )
        wait = float(words.group(1)) if words else 0
    return str(int(wait + 0.999)) if wait else ""


def seconds_between(start, end):
    """Seconds from one HTTP date (RFC 9110 5.6.7) to a later one; 0 where one is not a date.

    A reply's own Date is the only clock that its other dates can be read by: ours may be wrong.
    """
    try:
        start, end = map(email.utils.parsedate_to_datetime, (start, end))
        return max(0, (end.replace(tzinfo=None) - start.replace(tzinfo=None)).total_seconds())
    except (TypeError, ValueError, IndexError):
        return 0


NEVER = {"x-should-retry": "false"}  # Claude Code would try some statuses, such as 401, for minutes


class ErrorRow(NamedTuple):
    """One class of upstream errors, and what becomes of it."""

    kind: str  # ProxyError.kind
    statuses: tuple  # of the upstream's reply; empty: any
    pattern: str  # in the error's text; empty: any
    status: int  # that the client gets
    sentence: str = ""  # shown before the provider's words

    def matches(self, status, text):
        """Whether an error of this status and text belongs to this class."""
        if self.statuses and status not in self.statuses:
            return False
        if self.kind == "overflow":
            return is_overflow(status, text)
        return not self.pattern or re.search(self.pattern, text)

    def error(self, headers, message, text):
        """The UpstreamError; text: the provider's words and what stands beside them."""
        if self.kind == "overflow":
            numbers = overflow_numbers(text)
            error = overflow_error(numbers[0], numbers[2])
            error.numbers = numbers
            return error
        extra = dict(NEVER) if 401 <= self.status <= 404 else {}
        retry = self.status == 429 or self.status >= 500
        wait = retry_after(headers, text) if retry else ""
        if wait:
            extra["retry-after"] = wait
        message = (self.sentence + " " + message).strip()
        return UpstreamError(message, self.status, None, extra, self.kind, retry)


NO_KEY = "The provider refused the key; check TARGET_API_KEY (-k):"
ERROR_ROWS = (
    # The first match counts. What providers send is theirs to change; what Claude Code does with
    # each status was seen with version 2.1.330.
    ErrorRow("rate", (429,), r"retry in \d", 429),  # Gemini: a rate limit in the words of a quota
    ErrorRow(
        "billing",
        (200, 400, 402, 403, 429, 500),
        BILLING,
        402,
        "The provider's account has no credit:",
    ),
    ErrorRow("billing", (402,), "", 402, "The provider wants payment:"),
    # One status and one text for all of them: every version of Claude Code compacts by it.
    ErrorRow("overflow", (), "", 400),
    ErrorRow("auth", (401,), "", 401, NO_KEY),
    ErrorRow("auth", (400, 403), BAD_KEY, 401, NO_KEY),  # Gemini
    ErrorRow(
        "model",
        (400, 404, 410, 422),
        NO_MODEL,
        404,
        "The provider has no such model; check TARGET_MODEL (-m):",
    ),
    # The same request may succeed the next time.
    ErrorRow(
        "sampling", (400, 422, 500), SAMPLING, 500, "The model produced a malformed tool call:"
    ),
    # OpenRouter: none of its providers takes images, or tools
    ErrorRow(
        "request", (404,), "No endpoints found that", 424, "The provider refused the request:"
    ),
    ErrorRow(
        "path",
        (404, 405),
        "",
        404,
        "The provider has no such address or model;"
        " check TARGET_API_BASE (-b) and TARGET_MODEL (-m):",
    ),
    ErrorRow("model", (410,), "", 404, "The model is gone; choose another TARGET_MODEL (-m):"),
    ErrorRow("policy", (403,), "", 403, "The provider forbids this request:"),
    ErrorRow("overloaded", (200, 429, 500, 503), OVERLOADED, 529, "The provider is overloaded:"),
    ErrorRow("rate", (429,), "", 429),
    ErrorRow("size", (413,), "", 413, "The request is too large for the provider:"),
    ErrorRow("request", (500,), PERMANENT_500, 424, "The provider cannot take this request:"),
    ErrorRow("timeout", (408, 504, 522, 524), "", 504, "The provider took too long:"),
    ErrorRow("overloaded", (503, 529), "", 529, "The provider is overloaded:"),
    ErrorRow("server", tuple(range(500, 600)), "", 502, "The provider failed:"),
    ErrorRow("request", (), "", 424, "The provider refused the request:"),
)


def error_in_reply(body):
    """The UpstreamError that a reply with HTTP 200 holds, or None. body: a chunk or a whole reply.

    {error:..} (vLLM, OpenRouter, llama.cpp), x_groq.error, base_resp.status_code (MiniMax),
    {code, error:".."} (xAI).
    """
    error = body.get("error") or as_dict(body.get("x_groq")).get("error")
    if not error and not as_dict(body.get("base_resp")).get("status_code"):
        return None
    is_whole = not error or isinstance(error, str) and body.get("code")
    raw = compact_json(body if is_whole else {"error": error})
    code = str(as_dict(error).get("code"))[:4]
    status = int(code) if re.match(r"[45]\d\d\Z", code) else 500
    if status == 500:
        words = head_and_tail(raw)
        if re.search("(?i)rate[_ ]limit", words):
            status = 429
        elif is_overflow(200, words) or as_dict(error).get("type") == "invalid_request_error":
            status = 400
    return upstream_error(status, {}, raw)


# ==================================================================================================
# 3  Settings: one row a setting; command line > environment > .env > Claude's settings > default
# ==================================================================================================


class SettingError(Exception):
    """A setting that cannot be used; the message names it, its origin and what is allowed."""


# A new setting is a row of SETTINGS: its flag, its lines in the README, in --help, in the template
# of .env and on the status page follow from it. An empty value always means the default, so a row
# whose empty value means something has "" as its default.

# ---- parsers: a string -> the value; ValueError says what is allowed -----------------------------


def parse_text(value):
    """A string without line breaks: it may become a header's value."""
    if "\n" in value or "\r" in value:
        raise ValueError("one line of text")
    return value.strip()


def parse_flag(value):
    """A bool, from true or false (also 1/0, yes/no, on/off); empty is false."""
    word = value.strip().lower()
    if word not in ("true", "1", "yes", "on", "false", "0", "no", "off", ""):
        raise ValueError("true or false")
    return word in ("true", "1", "yes", "on")


def parse_port(value):
    """A port number, 0 to 65535; 0 takes a free one."""
    if not re.match(r"\d{1,5}$", value.strip()) or int(value) > 65535:
        raise ValueError("a port number, 0 to 65535")
    return int(value)


def parse_count(value):
    """A whole number, 0 or more; at most 12 digits, which is more tokens, or MB, than there are."""
    if not re.match(r"\d{1,12}$", value.strip()):
        raise ValueError("a whole number, 0 or more")
    return int(value)


def parse_seconds(value):
    """A number of seconds above 0, as a float; a socket takes no timeout of centuries."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e7:
        raise ValueError("a number of seconds above 0")
    return number


def parse_choice(*allowed):
    """A parser that takes one of the given words, in any case, and gives it in lower case.

    An empty word may be among them; it is not told as allowed, since it means the default.
    """

    def parse(value):
        if value.strip().lower() not in allowed:
            raise ValueError("one of " + ", ".join(filter(None, allowed)))
        return value.strip().lower()

    return parse


def parse_profile(value):
    """The name of a row of PROFILES (section 4), "default", or empty for none.

    Checked here, so that a typing error in a live .env is refused as any other, and the old
    settings stay.
    """
    return parse_choice("", "default", *(row.name for row in PROFILES))(value)


def parse_json_object(value):
    """A dict, from a JSON object; empty is {}.

    A null in it is a value of its own: it takes a field or header away that ccfix would send.
    """
    parsed = json_or_none(value) if value.strip() else {}
    if not isinstance(parsed, dict):
        raise ValueError('a JSON object, such as {"name": "value"}')
    return parsed


def parse_names(value):
    """A tuple of names in lower case, from names separated by commas or spaces; empty is ()."""
    return tuple(re.split(r"[,\s]+", value.strip().lower())) if value.strip() else ()


def parse_address(value):
    """An http or https URL, or "" for an empty value.

    The scheme may be missing, as people paste it: then it is https, but http for localhost, for an
    IP address, and where a port follows a bare name. Fragments make no sense in a base URL.
    """
    value = value.strip()
    if not value:
        return ""
    if "://" not in value:
        is_local = re.match(r"(localhost|127\.|\[|\d+\.\d+\.\d+\.\d+|[\w-]+:\d)", value)
        value = ("http://" if is_local else "https://") + value
    try:
        parts = urllib.parse.urlsplit(value)
        is_good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:  # a port that is not a number, brackets that are not closed
        is_good = False
    if not is_good or parts.fragment or re.search(r"[\s\x00-\x1f]", value):
        raise ValueError("an address such as https://api.example.com/v1")
    return value


def parse_base_url(value):
    """The base of an API; a pasted /chat/completions or trailing slash is taken off.

    A host alone gets /v1, since that is where every known server has its API; a path that is there
    is kept, and so is a query (Azure's api-version).
    """
    parts = urllib.parse.urlsplit(parse_address(value))
    if not parts.netloc:
        return ""
    path = parts.path.rstrip("/")
    path = re.sub(r"/((chat/)?completions|messages|responses)$", "", path).rstrip("/")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path or "/v1", parts.query, ""))


# ---- the table -----------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A setting: a line of the README's table, an attribute of Settings, perhaps flags."""

    env: str  # name in the environment and in .env
    default: str  # as a user would write it
    help: str  # for --help, the README, the status page and the template of .env
    parse: object = parse_text  # string -> value; raises ValueError, saying what is allowed
    flags: tuple = ()  # on the command line
    claude: str = ""  # key under "env" in ~/.claude/settings.json from which it may come
    secret: bool = False  # its value is never shown
    const: str = ""  # the value that a flag sets that takes none

    @property
    def name(self):
        """The attribute of Settings."""
        return self.env.lower()


def own_target(name, model, whose):
    """The three settings of a model besides the main one, with its own base URL and key.

    name: the end of their names; model: what the model is for; whose: words after "base URL".
    """
    return (
        Setting("TARGET_MODEL_" + name, "", model),
        Setting("TARGET_API_BASE_" + name, "", "base URL " + whose, parse_base_url),
        Setting("TARGET_API_KEY_" + name, "", "key " + whose, secret=True),
    )


SETTINGS = (
    # The main target. 300 s: a local model may read a first request of 17,000 tokens for minutes
    # before its first byte. Two retries: Claude Code itself makes ten more.
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
    # auto goes by the end of the base URL's path (ANTHROPIC_PATHS).
    Setting(
        "TARGET_FORMAT",
        "auto",
        "what the provider speaks: auto, openai or anthropic",
        parse_choice("auto", "openai", "anthropic"),
    ),
    # Other targets. A base URL of its own never gets the main key; what is empty is the main
    # target's.
    *own_target("OPUS", "model for Claude's opus family", "for the opus family"),
    *own_target("SONNET", "model for Claude's sonnet family", "for the sonnet family"),
    *own_target("HAIKU", "model for Claude's haiku family", "for the haiku family"),
    *own_target(
        "FALLBACK",
        "model that takes over when the main one is down or out of quota",
        "of the fallback model",
    ),
    *own_target(
        "IMAGE",
        "model for requests with images, where the main one takes none",
        "of the image model",
    ),
    # What is special about the main target: PROFILE goes with its base URL, the limits with its
    # model.
    Setting(
        "PROFILE",
        "",
        "provider row of the main base URL (see the provider table); empty: by host and model",
        parse_profile,
    ),
    # For what nobody foresaw. Headers often hold a key, so none of them is shown.
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
        "MAX_OUTPUT",
        "0",
        "the main model's output limit in tokens; 0: as known or learned",
        parse_count,
    ),
    Setting(
        "MAX_CONTEXT",
        "0",
        "the main model's context window in tokens; 0: as known or learned",
        parse_count,
    ),
    # The disguise. Claude Code's own settings fill it, so that requests tell what its user chose.
    # Eight of the large providers answer 400 or 422 to any field that they do not know: hence auto.
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
        "attach the two disguise fields to requests: auto (where unknown fields are tolerated),"
        " always, never",
        parse_choice("auto", "always", "never"),
    ),
    # This proxy. Without a key it answers to loopback names alone: a web page must not reach it.
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
        "ANTHROPIC_API_KEY",  # the name under which the original had it
        "",
        "the proxy's own key, which clients must send; empty: no check",
        secret=True,
    ),
    # A web page may give its own name the address 127.0.0.1, but not choose the Host that is sent.
    Setting(
        "ALLOWED_HOSTS",
        "",
        "further Host names to answer to when there is no proxy key, for containers",
        parse_names,
    ),
    # Web search, a tool that Anthropic's servers run and other providers have not.
    Setting(
        "SEARCH_URL", "", "SearXNG-style JSON endpoint for Claude Code's web search", parse_address
    ),
    # What is kept on disk: nothing, unless it is asked for, and all of it in CACHE_DIR. "prefix"
    # leaves out of the key what differs between sessions alone; see the cache's own section.
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
    # Nothing is known about prices here: they change weekly, and a wrong sum is worse than none.
    Setting(
        "PRICES",
        "",
        "JSON, or a file of it: model -> {input, output, cache_read} per million tokens",
    ),
    # What is written for people. Keys are hidden in all three.
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
    # TLS to the provider, for companies whose proxy has a certificate of its own.
    Setting(
        "CA_BUNDLE",
        "",
        "file of further certificate authorities (PEM); SSL_CERT_FILE works too",
        flags=("--ca-bundle",),
    ),
    Setting("CLIENT_CERT", "", "client certificate: cert.pem, or cert.pem,key.pem"),
    # The last resort; the start warns about it.
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


class Settings:
    """The values of all settings, as attributes in lower case; `origins`: where each came from.

    Never changed once made: who holds a Settings sees the same values through a whole request, and
    a changed .env makes a new one.

    layers: [(origin, {ENV_NAME: string})], most important first. Raises SettingError. An empty
    string in the environment or .env counts as not set, so that `TARGET_API_KEY=` in a template
    means the default.
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
        """[{name, value, origin, help}], strings, for the status page and `check`.

        A secret's value is only "set" or "not set".
        """
        return [
            {
                "name": row.env,
                "value": without_password(self.shown_value(row)),
                "origin": self.origins[row.name],
                "help": row.help,
            }
            for row in SETTINGS
        ]

    def shown_value(self, row):
        """A setting's value as a user would write it, without secrets."""
        value = getattr(self, row.name)
        if row.secret:
            return "set" if value else "not set"
        if isinstance(value, (dict, tuple, bool)):
            return compact_json(value) if value or value is False else ""
        return "%g" % value if isinstance(value, float) else str(value)


def without_password(url):
    """A URL, or any string with URLs in it, without the users and passwords in them.

    "https://me:secret@host/v1" -> "https://host/v1"; also "me:secret@host" where the scheme is
    missing. A port ("http://host:8080/@x") is not a password.
    """
    # A password may hold @ and /, as people write it; and the // may be missing its colon.
    user = (
        r"(?<=://)(?:[^\s/?#@:]{0,999}:(?!\d+/)[^\s?#]{0,999}|[^\s/?#@]{1,999})@"
        r"|\b[^\s/:@]{1,99}:[^\s/:@]{1,99}@"
    )
    return re.sub(user, "", url)


# ---- .env and Claude Code's settings -------------------------------------------------------------


def dotenv(source):
    """{name: value} of a .env file's text, as people write it: export, quotes, comments, CRLF, BOM.

    Double quotes know \\n, \\t, \\", \\$ and \\\\; single quotes are literal; a bare value ends at
    " #". Lines without "=" are skipped; of two lines with a name the last counts.
    """
    found = {}
    for line in source.lstrip("\ufeff").splitlines():
        match = re.match(r"\s*(?:(?:export|set)\s+)?([A-Za-z_][\w.]*)\s*=(.*)", line)
        if match:
            found[match.group(1)] = dotenv_value(match.group(2).strip())
    return found


def dotenv_value(value):
    """What a .env line says after its "=", without quotes or comment.

    A quote that is not closed is part of the value; an escape that is not known keeps its
    backslash, as in "C:\\dir".
    """
    quoted = re.match(r'"((?:[^"\\]|\\.)*)"|\'([^\']*)\'', value)
    if not quoted:
        return re.sub(r"(^|\s)#.*", "", value).rstrip()
    if quoted.group(1) is None:
        return quoted.group(2)
    known = {"n": "\n", "t": "\t", '"': '"', "\\": "\\", "$": "$"}
    return re.sub(
        r"\\(.)", lambda escape: known.get(escape.group(1), escape.group()), quoted.group(1)
    )


def claude_layer(source):
    """{ENV_NAME: string} that the text of ~/.claude/settings.json gives.

    Values that are not strings, and a file that is not JSON, give nothing: it is not ours.
    """
    env = as_dict(as_dict(json_or_none(source)).get("env"))
    return {
        row.env: env[row.claude]
        for row in SETTINGS
        if row.claude and isinstance(env.get(row.claude), str)
    }


def env_template(values=()):
    """A commented .env with every setting, for `init`.

    values: {ENV_NAME: string} to fill in; the others are commented out, with their defaults.
    """
    values, lines = dict(values), ["# ccfix settings; an empty value means the default", ""]
    for row in SETTINGS:
        line = "#%s=%s" % (row.env, row.default)
        if row.env in values:
            line = "%s=%s" % (row.env, quote_value(values[row.env]))
        lines += ["# " + row.help[0].upper() + row.help[1:], line]
    return "\n".join(lines) + "\n"


def quote_value(value):
    """value as .env text that `dotenv` reads back the same; in quotes only where it needs them."""
    if re.match(r"[\w@%+=:,./-]*$", value):
        return value
    return '"%s"' % value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# ==================================================================================================
# 4  Providers: one row a provider, showing only how it differs from the default
# ==================================================================================================


class Profile(NamedTuple):
    """How to talk to a provider, or to some of its models.

    A converter asks `profile.x`, never who the provider is; a lesson replaces fields. The defaults
    send the least, and suit a provider that nobody knows. In brackets: who made a field necessary.
    """

    name: str = "default"  # as PROFILE and the README's table say it
    title: str = "any other"  # for people
    hosts: tuple = ()  # ends of host names; ":11434" is a port on this machine
    models: str = ""  # pattern at the start of a model's name, with or without "owner/"; "": all
    format: str = "chat"  # what it speaks: a row of FORMATS
    untouched: bool = False  # the request goes on as it came [Anthropic itself]
    native_blocks: bool = False  # takes every block of Anthropic's, and signs its own thinking
    searches: bool = False  # runs Anthropic's web search tool itself
    strict: bool = False  # refuses unknown fields, so nothing is attached [OpenAI and seven others]
    max_tokens: str = "max_tokens"  # name of the output limit [OpenAI: max_completion_tokens]
    max_output: int = 0  # output limit in tokens; 0: not known
    context: int = 0  # context window in tokens, prompt and output together; 0: not known
    density: float = 0.34  # most tokens that a byte of the client's request was seen to make
    never: tuple = ()  # fields that are never sent
    body: tuple = ()  # (field, value) sent with every request [Z.ai, MiniMax]
    headers: tuple = ()  # (name, value) sent with every request [Copilot, OpenRouter]
    key_header: str = "authorization"  # "authorization" means "Bearer KEY" [api-key: Azure]
    usage_option: bool = True  # wants stream_options.include_usage [Mistral sends usage unasked]
    always_stream: bool = False  # asked as a stream even when the client wants none [DashScope]
    tool_choice: tuple = ("none", "required", "named")  # forms it takes besides auto
    parallel: bool = True  # knows parallel_tool_calls
    max_tools: int = 0  # how many it takes; 0: any number [OpenAI, Groq: 128; xAI: 200]
    # short: at most 40 characters [OpenAI]; nine: 9 letters and digits [Mistral]; kimi:
    # functions.NAME:N
    tool_ids: str = "short"
    schema: tuple = ()  # JSON schema keywords that it rejects [Gemini]
    typed_schema: bool = False  # every property needs a type [Kimi]
    images: bool = True  # takes images
    image_urls: bool = True  # fetches http(s) images itself
    files: bool = False  # takes PDF as a file part [OpenAI, OpenRouter]
    json_format: str = ""  # response_format it takes: json_schema, json_object or none
    system_role: bool = True  # takes a system message
    user_after_tool: bool = True  # takes a user message right after a tool message [not Mistral]
    # Field (of REASONING_FIELDS) in which earlier reasoning goes back; empty: it must not. By
    # default in assistant turns with tool calls, with reasoning_always in every one [Kimi, Z.ai,
    # MiniMax].
    reasoning_field: str = ""
    reasoning_always: bool = False
    placeholder: str = (
        ""  # in place of reasoning that was not kept; empty: nothing [DeepSeek, Gemini]
    )
    reasoning: str = ""  # how thinking is asked for: a row of REASONING; empty: not at all
    efforts: tuple = ()  # effort words it takes, weakest first
    effort_with_tools: str = (
        ""  # the only effort that it takes beside tools [none: gpt-5.4 and later]
    )
    betas: tuple = ()  # anthropic-beta flags that are not passed on (Anthropic's form only)
    scope: str = ""  # whose reasoning state this is: host of the base URL (set by profile_for)
    tried: bool = False  # on a real server; all else is from documentation and reports


DEFAULT = Profile()
LOW_TO_HIGH = ("low", "medium", "high")
NOT_KEPT = "(the reasoning of this step was not kept)"
GEMINI_SKIP = "skip_thought_signature_validator"  # Google's own word for "there is none"

# openai-openapi's openapi.json. "Unrecognized request argument supplied": langchain_dart issue 712.
OPENAI = Profile(
    "openai",
    "OpenAI, other models",
    ("api.openai.com",),
    strict=True,
    files=True,
    max_tools=128,
    json_format="json_schema",
)
# cline's openai-compatible.ts: the new name of the output limit for these models alone, since older
# servers of others know only max_tokens. Temperature and stop are refused (openai-openapi).
OPENAI_REASONING = OPENAI._replace(
    name="openai-reasoning",
    title="OpenAI o-series, gpt-5",
    models=r"o\d|gpt-5",
    max_tokens="max_completion_tokens",
    never=("temperature", "top_p", "stop"),
    reasoning="effort",
    efforts=LOW_TO_HIGH,
)
# openai-python issue 1354. The key has a header of its own; PDF parts are refused on chat
# (pydantic-ai).
AZURE = dict(
    hosts=("openai.azure.com", "cognitiveservices.azure.com"), key_header="api-key", files=False
)
# kimi-cli's kosong/chat_provider/kimi.py. Sampling is fixed ("only 1 is allowed for this model"), a
# nested property without a type is refused, image URLs are not fetched (vercel/ai). Reasoning goes
# back, but no placeholder: its maker asked clients to stop that (cc-switch's claude.rs).
MOONSHOT = Profile(
    "kimi",
    "Kimi (Moonshot)",
    ("api.moonshot.ai", "api.moonshot.cn", "api.kimi.com"),
    never=("temperature", "top_p"),
    tool_choice=("none",),
    tool_ids="kimi",
    typed_schema=True,
    image_urls=False,
    reasoning_field="reasoning_content",
    reasoning_always=True,
    reasoning="thinking",
)
# pydantic-ai's models/zai.py. Without tool_stream a large call is minutes of silence (opencrabs).
ZAI = Profile(
    "zai",
    "Z.ai GLM",
    ("api.z.ai", "open.bigmodel.cn"),
    body=(("tool_stream", True),),
    tool_choice=("none",),
    json_format="json_object",
    reasoning_field="reasoning_content",
    reasoning_always=True,
    reasoning="thinking",
)
# groq-python. "property 'x' is unsupported", also in messages: musistudio/llms PR 64.
GROQ = Profile(
    "groq",
    "Groq, other models",
    ("api.groq.com",),
    strict=True,
    max_tools=128,
    json_format="json_object",
)
# Model servers on the user's own machine: JSON by grammar; images as data, since Ollama fetches
# none.
LOCAL = DEFAULT._replace(json_format="json_schema", image_urls=False)
NATIVE = DEFAULT._replace(
    format="anthropic", native_blocks=True, files=True, json_format="json_schema"
)
# docs.anthropic.com/en/api/messages
ANTHROPIC = NATIVE._replace(
    name="anthropic-api",
    title="Anthropic itself",
    hosts=("api.anthropic.com",),
    untouched=True,
    searches=True,
)

PROFILES = (
    # Order matters within a host: the first row whose model pattern fits is taken. Above each row
    # stands where its facts are from: documents and threads of 2026, hardly ever a trial.
    #
    # Tools beside any effort but none are refused, from 5.5 on even where none is sent:
    # openai-openapi issue 541, litellm PR 34569.
    OPENAI_REASONING._replace(
        name="openai-gpt5-tools",
        title="OpenAI gpt-5.4 and later",
        models=r"gpt-5\.([4-9]|\d\d)|gpt-[6-9]",
        efforts=("none", "low", "medium", "high", "xhigh"),
        effort_with_tools="none",
    ),
    # pydantic-ai's profiles/openai.py
    OPENAI_REASONING._replace(
        name="openai-gpt5.1",
        title="OpenAI gpt-5.1 to 5.3",
        models=r"gpt-5\.[1-3]",
        efforts=("none", "low", "medium", "high"),
    ),
    OPENAI_REASONING,
    OPENAI,
    OPENAI_REASONING._replace(
        name="azure-reasoning", title="Azure OpenAI, o-series and gpt-5", **AZURE
    ),
    OPENAI._replace(name="azure", title="Azure OpenAI", **AZURE),
    # api-docs.deepseek.com/guides/thinking_mode. A turn with tool calls but without its reasoning
    # is a 400, also where there was none to keep: hence the placeholder (opencode issue 24722).
    Profile(
        "deepseek",
        "DeepSeek",
        ("api.deepseek.com",),
        images=False,
        json_format="json_object",
        tool_choice=("none",),
        reasoning_field="reasoning_content",
        placeholder=NOT_KEPT,
        reasoning="thinking",
        efforts=("low", "high", "max"),
    ),
    # Thinking must be off where no stream is asked for: langchain4j issue 3974. PDF parts are
    # refused: pydantic-ai's providers/alibaba.py.
    Profile(
        "dashscope",
        "Qwen on DashScope",
        ("dashscope.aliyuncs.com", "dashscope-intl.aliyuncs.com", "dashscope-us.aliyuncs.com"),
        always_stream=True,
        json_format="json_object",
        reasoning="enable_thinking",
    ),
    # Thinking cannot be disabled, and has three strengths: aihubmix's guide to Kimi K3.1.
    MOONSHOT._replace(
        name="kimi-k3",
        title="Kimi K3",
        models=r"kimi-k3",
        reasoning="effort",
        efforts=("low", "high", "max"),
    ),
    MOONSHOT,
    # Thinking cannot be disabled: pydantic-ai's profiles/zai.py.
    ZAI._replace(
        name="glm-5.3",
        title="Z.ai GLM-5.2 and later",
        models=r"glm-(5\.[2-9]|[6-9])",
        reasoning="effort",
        efforts=("low", "high", "max"),
    ),
    ZAI,
    # platform.minimax.io/docs/api-reference. Without reasoning_split, <think> stands in the
    # content.
    Profile(
        "minimax",
        "MiniMax",
        ("api.minimax.io", "api.minimaxi.com", "api.minimax.chat"),
        body=(("reasoning_split", True),),
        tool_choice=("none",),
        reasoning_field="reasoning_details",
        reasoning_always=True,
        reasoning="adaptive",
    ),
    # Extra inputs are a 422: eca issue 231. "Unexpected role 'user' after role 'tool'":
    # datapizza-ai issue 98. Ids: gptel issue 1203. Usage comes unasked, on the finish chunk
    # (vercel/ai).
    Profile(
        "mistral",
        "Mistral",
        ("api.mistral.ai",),
        strict=True,
        tool_ids="nine",
        user_after_tool=False,
        usage_option=False,
        json_format="json_schema",
    ),
    # models.dev
    GROQ._replace(
        name="groq-gpt-oss",
        title="Groq, gpt-oss",
        models=r"openai/gpt-oss",
        max_output=65536,
        context=131072,
        images=False,
        json_format="json_schema",
        reasoning="effort",
        efforts=LOW_TO_HIGH,
    ),
    GROQ,
    # "Argument not supported on this model": uni-api issue 105. vercel/ai's
    # xai-chat-language-model.ts: no stop on chat.
    Profile(
        "xai",
        "xAI",
        ("api.x.ai",),
        strict=True,
        never=("stop",),
        max_tools=200,
        json_format="json_schema",
    ),
    # "Unknown name" for schema keywords: zed issue 44875. A call without its thought_signature is a
    # 400: opensquilla issue 225.
    Profile(
        "gemini",
        "Gemini",
        ("generativelanguage.googleapis.com", "aiplatform.googleapis.com"),
        strict=True,
        schema=tuple(
            "additionalProperties const exclusiveMinimum exclusiveMaximum pattern default format"
            " not propertyNames patternProperties if then else examples".split()
        ),
        json_format="json_schema",
        reasoning_field="google",
        placeholder=GEMINI_SKIP,
        reasoning="effort",
        efforts=LOW_TO_HIGH,
    ),
    # openrouter.ai/docs/use-cases/reasoning-tokens: the details must come back as they came, and in
    # order. An effort of max is a 400 (cc-switch), so the strongest word here is xhigh.
    Profile(
        "openrouter",
        "OpenRouter",
        ("openrouter.ai",),
        files=True,
        reasoning_field="reasoning_details",
        reasoning_always=True,
        reasoning="openrouter",
        efforts=("minimal", "low", "medium", "high", "xhigh"),
        json_format="json_schema",
        headers=(("X-Title", "ccfix"),),
    ),
    # Refuses reasoning_content, takes reasoning: opencode issue 6648, and Empryo PR 209, which
    # tried each field.
    Profile(
        "cerebras",
        "Cerebras",
        ("api.cerebras.ai",),
        strict=True,
        parallel=False,
        images=False,
        max_output=40960,
        context=131072,
        json_format="json_schema",
        reasoning_field="reasoning",
    ),
    # free-claude-code issue 127. A thinking field is a 400, chat_template_kwargs is not:
    # CLIProxyAPI issue 4149.
    Profile("nim", "NVIDIA NIM", ("integrate.api.nvidia.com",), strict=True, reasoning="kwargs"),
    # "Extra inputs are not permitted": midscene issue 1322
    Profile(
        "fireworks",
        "Fireworks",
        ("api.fireworks.ai",),
        strict=True,
        json_format="json_schema",
        reasoning="effort",
        efforts=LOW_TO_HIGH,
    ),
    # docs.together.ai/docs/glm-5.3-quickstart
    Profile(
        "together",
        "Together",
        ("api.together.xyz", "api.together.ai"),
        json_format="json_schema",
    ),
    # models.dev
    Profile(
        "siliconflow",
        "SiliconFlow",
        ("api.siliconflow.cn", "api.siliconflow.com"),
        json_format="json_object",
        reasoning="enable_thinking",
    ),
    # openclaude issue 331; cc-switch's presets
    Profile("ark", "Volcengine Ark", ("volces.com", "bytepluses.com"), reasoning="thinking"),
    # cc-switch's proxy/providers/claude.rs
    Profile(
        "mimo",
        "Xiaomi MiMo",
        ("xiaomimimo.com",),
        reasoning_field="reasoning_content",
        placeholder=NOT_KEPT,
        reasoning="thinking",
    ),
    # copilot-api's api-config.ts: the headers of Copilot's own clients
    Profile(
        "copilot",
        "GitHub Copilot",
        ("githubcopilot.com",),
        strict=True,
        max_tools=128,
        headers=(
            ("Editor-Version", "vscode/1.104.0"),
            ("Copilot-Integration-Id", "vscode-chat"),
            ("Openai-Intent", "conversation-edits"),
            ("Copilot-Vision-Request", "true"),
        ),
    ),
    # ollama's openai/openai.go: tool_choice is not read, reasoning comes back as `reasoning`
    LOCAL._replace(
        name="ollama",
        title="Ollama",
        hosts=(":11434", "ollama.com"),
        tool_choice=("none",),
        reasoning_field="reasoning",
        reasoning_always=True,
        reasoning="effort",
        efforts=("none", "low", "medium", "high", "max"),
    ),
    # lmstudio-ai/docs, openai-compat/tools.mdx
    LOCAL._replace(name="lmstudio", title="LM Studio", hosts=(":1234",)),
    # sglang issue 20678, and its error texts
    LOCAL._replace(name="sglang", title="SGLang", hosts=(":30000",), reasoning="kwargs"),
    # a real server, as it answers in the tests
    LOCAL._replace(
        name="llamacpp", title="llama.cpp server", hosts=(":8080",), reasoning="kwargs", tried=True
    ),
    # vllm's chat_completion/protocol.py
    LOCAL._replace(name="vllm", title="vLLM", hosts=(":8000",), reasoning="kwargs"),
    # litellm issues 32086 and 17343. Strict, for the sake of the providers behind it.
    Profile("litellm", "LiteLLM gateway", (":4000",), strict=True),
    # set by --demo, whose server stands in this file
    Profile("demo", "the embedded demo model"),
    ANTHROPIC,
    # Tried: llama.cpp's /v1/messages.
    NATIVE._replace(name="anthropic", title="anything else that speaks Anthropic", tried=True),
)

# `owned_by` in a /models answer -> the profile: it tells a server that its address does not, such
# as vLLM on a port of the user's choice.
OWNERS = {
    "vllm": "vllm",
    "llamacpp": "llamacpp",
    "sglang": "sglang",
    "library": "ollama",
    "organization_owner": "lmstudio",
}
# Ends of base URLs where providers speak Anthropic: DeepSeek, Kimi, Z.ai, DashScope, MiniMax; Ark;
# Kimi.
ANTHROPIC_PATHS = re.compile(
    r"(/anthropic|/api/(coding|compatible|plan)|api\.kimi\.com/coding)(/v1)?$", re.I
)
LOOPBACK = re.compile(
    r"(localhost|127\.\d+\.\d+\.\d+|::1|0\.0\.0\.0|host\.docker\.internal)$", re.I
)


def is_loopback(where):
    """Whether a URL, or a bare host name, is on this machine. The one rule for that.

    host.docker.internal is this machine as a container sees it. Used for the rows whose host is a
    port (here), for targets that need no key or whose models can be listed unasked (Commands), and
    for addresses that no proxy is on the way to (Upstream).
    """
    host = urllib.parse.urlsplit(where).hostname if "//" in where else where
    return bool(LOOPBACK.match(host or ""))


def family_of(model_name):
    """The family (opus, sonnet, haiku) that a model name says, or "".

    Its word stands alone: claude-opus-5-5, "Opus 4.8", ccfix-opus, but not my-opusculum.
    """
    words = re.split("[^a-z]+", model_name.lower())
    return next((family for family in FAMILIES if family in words), "")


def without_mark(model):
    """A model's name without [1m], Claude Code's mark of a long window: no provider knows it."""
    return re.sub(r"\[1m\]$", "", model)


def profile_for(base, model, forced="", format="auto", owner=""):
    """The Profile of a base URL and model. The platform decides before the model name does.

    forced: a row's name (PROFILE), taken whatever base and model are; format: TARGET_FORMAT; owner:
    `owned_by` of the server's model list.
    """
    parts = urllib.parse.urlsplit(base)
    host, port = (parts.hostname or "").lower(), parts.port
    name = forced or OWNERS.get(owner, "")
    if format == "anthropic" or (format == "auto" and not forced and ANTHROPIC_PATHS.search(base)):
        name = "anthropic"
    rows = [
        row
        for row in PROFILES
        if (row.name == name if name else any(serves(end, host, port) for end in row.hosts))
    ]
    if name == "anthropic":  # Anthropic itself takes more than others that speak the same
        rows = [ANTHROPIC] if serves(ANTHROPIC.hosts[0], host, port) else rows
    elif format == "openai":
        rows = [row for row in rows if row.format != "anthropic"]
    names = model, model.rpartition("/")[2]
    fitting = [row for row in rows if any(re.match(row.models, each, re.I) for each in names)]
    found = (fitting or (rows if forced else []) or [DEFAULT])[0]
    return found._replace(scope=host)


def serves(end, host, port):
    """Whether an entry of Profile.hosts means the host, or the port on this machine.

    An entry means its subdomains too, but "openrouter.ai" is not "evilopenrouter.ai".
    """
    if end[:1] == ":":
        return port == int(end[1:]) and is_loopback(host)
    return ("." + host).endswith("." + end)


# ---- how thinking is asked for -------------------------------------------------------------------


def effort_fields(level, profile):
    """reasoning_effort as the provider words it; nothing where it has no word for the level."""
    word = effort_word(level, profile.efforts)
    return {"reasoning_effort": word} if word else {}


def thinking_fields(level, profile):
    """thinking: {type}, and the effort beside it unless it is off (both are a 400 at DeepSeek)."""
    if level == "off":
        return {"thinking": {"type": "disabled"}}
    return dict(effort_fields(level, profile), thinking={"type": "enabled"})


REASONING = {
    # style: (level, profile) -> fields of the body. level: off, low, medium, high, xhigh or max.
    "effort": effort_fields,
    "thinking": thinking_fields,
    "adaptive": lambda level, profile: {
        "thinking": {"type": "disabled" if level == "off" else "adaptive"}
    },
    "enable_thinking": lambda level, profile: {"enable_thinking": level != "off"},
    "openrouter": lambda level, profile: {
        "reasoning": {"effort": "none" if level == "off" else effort_word(level, profile.efforts)}
    },
    # For chat templates: Qwen and GLM read the first, DeepSeek and Kimi the second.
    "kwargs": lambda level, profile: {
        "chat_template_kwargs": {"enable_thinking": level != "off", "thinking": level != "off"}
    },
}
LEVELS = ("off", "none", "minimal", "low", "medium", "high", "xhigh", "max")  # weakest first


def effort_word(level, words):
    """The word for a level: the first that is at least as strong, else the strongest.

    off is "none" where the provider knows that word, else "" (as if nothing had been asked).
    """
    if level == "off" or not words:
        return "none" if "none" in words else ""
    wanted = LEVELS.index(level)
    return next(
        (word for word in words if LEVELS.index(word) >= wanted and word != "none"), words[-1]
    )


def thinking_level(body):
    """How much thinking a normalized request asks for: off, low ... max, or "" where it leaves it
    open; budgets by the usual steps of 4,000 and 16,000 tokens."""
    thinking = as_dict(body.get("thinking"))
    if thinking.get("type") == "disabled":
        return "off"
    effort = as_dict(body.get("output_config")).get("effort")
    if isinstance(effort, str) and effort in LEVELS:
        return "off" if effort == "none" else effort
    budget = thinking.get("budget_tokens")
    if thinking.get("type") == "enabled" and isinstance(budget, (int, float)):
        return "low" if budget < 4000 else "medium" if budget < 16000 else "high"
    return ""


# ======================================================================================================
# 5  Normalize: an Anthropic request -> the Anthropic request that this provider can take
# ======================================================================================================

NO_OUTPUT = "(no output)"
NO_RESULT = "(no result: the call was interrupted)"
LOADED = "These tools are loaded and can be called now: "
REMINDER = "<system-reminder>\n%s\n</system-reminder>"
STATE_MARK = "ccfix1."  # begins every signature that this program writes
THOUGHTS = ("thinking", "redacted_thinking")
PLACEHOLDER_TOOL = "DeferredToolPlaceholder"  # Claude Code's; it cannot be called
PERSONAL = ("metadata", "safeguards")  # device id, home folder, git state: never passed on
MAX_REFS = 200  # $ref resolved in one schema: schemas that name each other grow without end
MAX_SCHEMA_DEPTH = 40


def normalize(body, profile, recall=None, memo=None, room=0):
    """The Messages request that a provider of this profile can take: Anthropic in, Anthropic out.

    What every provider needs is done here, once for all formats; a format only writes the result in
    its own words. A new dict; `body` is never edited, and what need not change stays the same object.

    recall(tool_use_id) -> what is remembered of a call: {"arguments", "reasoning", "details",
    "google", "scope"}, any of them missing. memo: a dict in which cleaned tools are kept between
    calls. room: output tokens that fit this time (0: not known).

    A block of the result may have a key "ccfix" for what has no place in Anthropic's form: on
    tool_use {"arguments": the model's own JSON text, "google": Gemini's thought signature}, on
    thinking {"details": opaque reasoning to be sent back as it is}. Raises BadRequest for a body
    without messages.
    """
    check_messages(body)
    clean = {key: value for key, value in body.items() if key not in PERSONAL}
    if body.get("system"):
        clean["system"] = clean_system(body["system"])
    if is_number(body.get("max_tokens")):
        limits = [limit for limit in (profile.max_output, room) if limit > 0]
        clean["max_tokens"] = min([max(1, int(body["max_tokens"]))] + limits)
    if profile.untouched:
        clean["messages"] = without_our_thinking(body["messages"])
        return clean
    turns = split_turns(body["messages"])
    if not profile.system_role and clean.get("system"):
        leading = {"type": "text", "text": system_text(clean.pop("system"))}
        turns = join_turns([("user", [leading], None)] * bool(leading["text"]) + turns)
    clean["messages"] = normalize_turns(turns, profile, recall or (lambda call_id: {}))
    effort = turn_effort(body["messages"])
    if effort:
        clean["output_config"] = dict(as_dict(body.get("output_config")), effort=effort)
    for field in ("tools", "tool_choice"):
        clean.pop(field, None)
    clean.update(normalize_tools(body, profile, {} if memo is None else memo))
    ask_for_format(clean, profile)
    return clean


# ---- what the body holds ---------------------------------------------------------------------------


def is_number(value):
    """Whether a value is a number that can be sent: 1e400 is read as infinity, which JSON lacks, and
    True is an int to Python."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) < 1e12


def is_content(value):
    """Whether a value is a string, or a list of blocks."""
    return isinstance(value, str) or is_list_of(value, (dict, str))


def is_list_of(value, kinds):
    """Whether a value is a list of nothing but values of these types."""
    return isinstance(value, list) and all(isinstance(part, kinds) for part in value)


FIELD_CHECKS = (
    # field, what may stand there: a type or a test (nothing and null always may), in words
    ("model", str, "a string"),
    ("max_tokens", lambda value: is_number(value) and value > 0, "a number above 0"),
    ("system", is_content, "a string or a list of blocks"),
    ("tools", lambda value: is_list_of(value, dict), "a list of tools"),
    ("tool_choice", dict, "an object with a type"),
    ("thinking", dict, "an object with a type"),
    ("output_config", dict, "an object"),
    ("temperature", is_number, "a number"),
    ("top_p", is_number, "a number"),
    ("stop_sequences", list, "a list of strings"),
    ("stream", bool, "true or false"),
)
ROLES = ("user", "assistant", "system", "developer")


def check_request(body):
    """Raise BadRequest, which names the field, for a body that is not a Messages request.

    Unknown fields and blocks are fine: newer clients send them.
    """
    for field, fits, wanted in FIELD_CHECKS:
        value = body.get(field)
        good = isinstance(value, fits) if isinstance(fits, type) else fits(value)
        if value is not None and not good:
            raise BadRequest("%s: must be %s" % (field, wanted))
    check_messages(body)
    for position, message in enumerate(body["messages"]):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadRequest("messages.%d.role: must be user, assistant or system" % position)
        if not is_content(message.get("content")):
            raise BadRequest("messages.%d.content: must be a string or a list of blocks" % position)


def check_messages(body):
    """Raise BadRequest for a body without messages."""
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise BadRequest("messages: a list with at least one message is required")


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
    """A block's `text` as a string, whatever the client put there."""
    value = block.get("text")
    return value if isinstance(value, str) else "" if value is None else str(value)


def text_block(text):
    """A content block of text."""
    return {"type": "text", "text": text}


def walk_blocks(messages):
    """(role, block) of every content block, those inside tool results too; outer ones first."""
    for message in as_list(messages):
        message = as_dict(message)
        stack = [message.get("content")]
        while stack:
            for block in as_list(stack.pop()):
                if isinstance(block, dict):
                    yield message.get("role"), block
                    stack.append(block.get("content"))


def has_images(body):
    """Whether any message, or tool result in one, holds an image."""
    return any(block.get("type") == "image" for _, block in walk_blocks(body.get("messages")))


def used_ids(body):
    """Tool ids that the conversation has already used."""
    return {
        block.get("id")
        for role, block in walk_blocks(body.get("messages"))
        if block.get("type") == "tool_use" and isinstance(block.get("id"), str)
    }


def turn_effort(messages):
    """The effort that the latest turn asks for by its own output_config, or "".

    Claude Code sends it on system turns, which are folded here (beta per-turn-control-2026-07-01).
    """
    found = (
        as_dict(as_dict(turn).get("output_config")).get("effort") for turn in reversed(messages)
    )
    return next((effort for effort in found if isinstance(effort, str) and effort in LEVELS), "")


def estimate_tokens(body):
    """About how many input tokens a request has: 4 ASCII characters a token, 1.5 others.

    An image or a document counts as its row of BLOCKS says, whatever its bytes in base64.
    """
    total, stack = 0, [body.get("system"), body.get("messages"), body.get("tools")]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            wide = 0 if is_ascii(value) else len(value.encode("utf-8", "replace")) - len(value)
            total += (len(value) - wide // 2) // 4 + wide // 3 + 1
        elif isinstance(value, dict):
            source = as_dict(value.get("source"))
            kind = BLOCKS.get(str(value.get("type")))
            if kind and kind.tokens and source and source.get("type") != "text":
                total += kind.tokens
                continue
            stack.extend(value.values())
            total += len(value)
        elif isinstance(value, list):
            stack.extend(value)
        elif value is not None:
            total += 1
    return total


def is_ascii(value):
    """Whether a string is ASCII (str.isascii is new in 3.7)."""
    try:
        value.encode("ascii")
    except UnicodeEncodeError:
        return False
    return True


# ---- system text, and who says what ------------------------------------------------------------------


def clean_system(system):
    """The system prompt in its own shape, without the billing line.

    The line changes with each version and request, so it would cost the provider's whole prefix
    cache, and it describes the client.
    """
    if isinstance(system, str):
        return without_billing(system)
    kept = []
    for block in as_blocks(system):
        text = without_billing(block_text(block))
        if text.strip():
            kept.append(block if text == block.get("text") else dict(block, text=text))
    return kept


def system_text(system):
    """The system prompt as one string."""
    texts = [block_text(block) for block in as_blocks(system)]
    return "\n\n".join(text for text in texts if text.strip())


def split_turns(messages):
    """[(role, blocks, message)]: user and assistant in turn, without turns that say nothing.

    message: the client's own, where the turn is one message as it came, else None. A system turn
    becomes user text where it stands: moved to the front, each new one would rewrite the prefix. A
    turn that is wholly a <total_tokens> marker goes, as the client removes it from the history later.
    """
    turns = []
    for message in map(as_dict, messages):
        role, blocks = message.get("role"), as_blocks(message.get("content"))
        if role in ("system", "developer"):
            text = "\n\n".join(filter(None, map(block_text, blocks))).strip()
            blocks = [text_block(REMINDER % text)] if text and not TOKEN_MARKER.match(text) else []
        role = "assistant" if role == "assistant" else "user"
        said = [block for block in blocks if says_something(block, role)]
        turns.append((role, said, message if message.get("role") == role else None))
    turns = join_turns(turns)
    return join_turns(
        [
            turn
            for turn in turns
            if turn[0] == "user" or any(block.get("type") not in THOUGHTS for block in turn[1])
        ]
    )


def join_turns(turns):
    """The turns without empty ones, neighbors of one role joined."""
    joined = []
    for role, blocks, message in turns:
        if joined and joined[-1][0] == role and blocks:
            joined[-1] = (role, joined[-1][1] + blocks, None)
        elif blocks:
            joined.append((role, blocks, message))
    return joined


def says_something(block, role):
    """Whether a block says anything: empty text does not, nor a token marker."""
    if block.get("type") != "text":
        return True
    text = block_text(block)
    return bool(text.strip()) and not (role != "assistant" and TOKEN_MARKER.match(text))


def without_our_thinking(messages):
    """The messages without the thinking blocks that this program signed: the provider would refuse
    the signature. A turn that held nothing else goes."""
    kept = []
    for message in messages:
        content = as_dict(message).get("content")
        if isinstance(content, list) and any(is_our_thinking(as_dict(block)) for block in content):
            content = [block for block in content if not is_our_thinking(as_dict(block))]
            message = dict(message, content=content)
        if content != [] or as_dict(message).get("role") == "system":
            kept.append(message)
    return kept


# ---- turns -------------------------------------------------------------------------------------------


def normalize_turns(turns, profile, recall):
    """The messages of a conversation whose calls are all answered, in the order of the calls."""
    messages, calls, counter = [], [], 0
    for role, blocks, message in turns:
        if role == "assistant":
            blocks, calls = clean_assistant(blocks, profile, recall, counter)
            counter += len(calls)
        else:
            blocks, calls = answer_calls(clean_blocks(blocks, profile), calls), []
        content = message and message["content"]
        if blocks and (as_blocks(content) if isinstance(content, str) else content) == blocks:
            messages.append(message)
        elif blocks:
            messages.append({"role": role, "content": blocks})
    if calls:
        messages.append({"role": "user", "content": answer_calls([], calls)})
    return messages


def answer_calls(blocks, calls):
    """A user turn's blocks after calls [(client's id, id sent)]: results in their order, the rest.

    A call without a result gets one that says so, and a result without a call is told in words:
    OpenAI, DeepSeek, Mistral and Anthropic all answer 400 to either. Claude Code sends results in the
    order in which they were ready, and none for a call that the user interrupted.
    """
    results, rest, wanted = {}, [], {call_id for call_id, _ in calls}
    for block in blocks:
        call_id = str(block.get("tool_use_id") or "")
        if block.get("type") != "tool_result":
            rest.append(block)
        elif call_id in wanted and call_id not in results:
            results[call_id] = block
        else:
            rest += [text_block("[result of an earlier tool call]")] + result_blocks(block)
    answers = []
    for call_id, sent_id in calls:
        result = results.get(call_id) or {"type": "tool_result", "content": NO_RESULT}
        same = result.get("tool_use_id") == sent_id
        answers.append(result if same else dict(result, tool_use_id=sent_id))
    return answers + rest


def result_blocks(block):
    """The content of a tool_result in words that stand for themselves: an error says so."""
    blocks = as_blocks(block.get("content"))
    blocks = [part for part in blocks if part.get("type") != "text" or block_text(part)]
    if not any(part.get("type") != "text" or block_text(part).strip() for part in blocks):
        blocks = [text_block(NO_OUTPUT)]
    return [text_block("Error:")] + blocks if block.get("is_error") is True else blocks


def clean_assistant(blocks, profile, recall, counter):
    """(blocks, [(client's id, id sent)]) of an assistant turn. counter: calls so far."""
    said, calls, notes, thoughts = [], [], [], []
    for block in blocks:
        kind = block.get("type")
        if kind == "tool_use":
            note = as_dict(recall(str(block.get("id") or ""))) if not profile.native_blocks else {}
            call = clean_call(block, profile, note.get("arguments"), counter + len(calls))
            calls.append((str(block.get("id") or ""), call["id"]))
            notes.append(note if note.get("scope") == profile.scope else {})
            said.append(call)
        elif kind not in THOUGHTS:
            said += clean_blocks([block], profile)
        elif not profile.native_blocks:
            thoughts.append(block)
        elif not is_our_thinking(block):
            said.append(block)
    if profile.reasoning_field and (calls or profile.reasoning_always):
        if REASONING_FIELDS.get(profile.reasoning_field) == "parts" and not calls:
            text = "".join(block_text(block) for block in said)
            notes = [as_dict(recall(text_key(profile.scope, text)))]
        said = bring_back(said, thoughts, profile, notes, [call_id for call_id, _ in calls])
    return said, calls


def bring_back(said, thoughts, profile, notes, call_ids):
    """An assistant turn with its earlier reasoning, which some providers insist on: from the
    signatures of its thinking blocks, else from what is remembered of its calls.

    said, thoughts: its other blocks, its thinking blocks; notes: what is remembered, one a call.
    DeepSeek and MiMo answer 400 without it ("must be passed back"), Gemini to a call without its
    signature; OpenRouter and MiniMax want it back unmodified, once a turn. Groq, Mistral and Cerebras
    refuse a field that they do not know, so nothing goes back unless the profile names a field.
    """
    states = [state for state in (read_state(block, profile.scope) for block in thoughts) if state]
    shape = REASONING_FIELDS.get(profile.reasoning_field)
    if shape == "opaque":
        known = {}
        for state in states:
            known.update(as_dict(state.get("google")))
        found = [known.get(i) or note.get("google") for i, note in zip(call_ids, notes)]
        found[:1] = [found[0] or profile.placeholder] if found else []  # Gemini checks the first
        signatures = iter(found)
        return [
            add_note(block, google=next(signatures)) if block.get("type") == "tool_use" else block
            for block in said
        ]
    if shape == "parts":
        # What is remembered is whole; a signature holds what had come when its block was closed.
        kept = (note["details"] for note in notes + states[::-1] if note.get("details"))
        details = next(kept, None)
        thinking = dict(thinking_block(""), ccfix={"details": details}) if details else None
    else:
        text = "".join(state["text"] for state in states)
        text = text or next((note["reasoning"] for note in notes if note.get("reasoning")), "")
        thinking = thinking_block(text or profile.placeholder)
    return [thinking] + said if thinking and (thinking["thinking"] or "ccfix" in thinking) else said


def thinking_block(text):
    """A thinking block without a signature: only a format's writer sees it."""
    return {"type": "thinking", "thinking": text, "signature": ""}


def add_note(block, **note):
    """The block with what only a format can write, see normalize; the same block for nothing."""
    note = {key: value for key, value in note.items() if value}
    return dict(block, ccfix=dict(block.get("ccfix", ()), **note)) if note else block


def clean_call(block, profile, original, number):
    """A tool_use block with an id and a name that the provider takes, and an object as input.

    original: the arguments as the model wrote them. The client echoes a call with defaults added and
    keys in another order, which would break the provider's prefix cache. What the client could not
    parse comes back as {"__unparsedToolInput": {"raw"}} and is turned back; what is not an object
    goes up inside one, as servers parse it (Ollama: "invalid tool call arguments").
    """
    value = as_dict(block.get("input"))
    raw = as_dict(value.get("__unparsedToolInput")).get("raw")
    if isinstance(raw, str):
        parsed = json_or_none(raw)
        value = parsed if isinstance(parsed, dict) else {"unparsed": raw}
    name = short_name(str(block.get("name") or "tool"))
    wanted = {"id": sent_id(block, name, profile.tool_ids, number), "name": name, "input": value}
    if any(block.get(key) != part for key, part in wanted.items()):
        block = dict(block, **wanted)
    return add_note(block, arguments=original if says_the_same(original, value) else "")


def says_the_same(original, value):
    """Whether JSON text holds the same arguments as the client's echo, which adds defaults, makes
    numbers of strings and drops null."""
    known = json_or_none(original) if isinstance(original, str) else None
    return isinstance(known, dict) and all(
        part is None or key in value and (value[key] == part or str(value[key]) == str(part))
        for key, part in known.items()
    )


def sent_id(block, name, form, number):
    """The tool-call id for the provider, made of the client's id alone (for Kimi: of name and number).

    form: see Profile.tool_ids. number: calls before this one in the conversation. The same id must
    come out in every later turn, or the provider's prefix cache is lost. OpenAI takes at most 40
    characters, Mistral exactly nine letters and digits.
    """
    given = str(block.get("id") or "call_%d" % number)
    if form == "kimi":  # its chat template expects functions.NAME:N
        return "functions.%s:%d" % (name, number)
    if form == "nine":
        return given if re.match(r"[A-Za-z0-9]{9}\Z", given) else short_hash(given, 9)
    if len(given) > 40 or not re.match(r"[A-Za-z0-9_.:-]+\Z", given):
        return "call_" + short_hash(given, 24)
    return given


def short_hash(text, length):
    """The first hex digits of a string's SHA-1: for names, not for secrets."""
    return hashlib.sha1(text.encode("utf-8", "replace")).hexdigest()[:length]


def short_name(name):
    """A tool name that every API takes ([A-Za-z0-9_-]{1,64}, OpenAI's rule).

    MCP names may be longer (mcp__SERVER__TOOL, 113 characters were seen), and the client maps other
    characters itself; the end is then a hash of the whole, so that two long names stay two.
    """
    if re.match(r"[A-Za-z0-9_-]{1,64}\Z", name):
        return name
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:55] + "_" + short_hash(name, 8)


# ---- reasoning state in signatures: Claude Code echoes a signature as it is ----------------------------


def text_key(scope, text):
    """Under which name the reasoning of a turn without calls is remembered."""
    return "text_" + short_hash(scope + "\n" + text.strip(), 40)


def write_state(scope, state):
    """A thinking block's signature that carries state (a dict) for the provider `scope` alone.

    The form: mark, scope in base64, a dot, zlib of the state's JSON in base64 ("" for none).
    """
    packed = zlib.compress(compact_json(state).encode(), 1) if state else b""
    parts = [base64.urlsafe_b64encode(part).decode() for part in (scope.encode(), packed)]
    return STATE_MARK + ".".join(parts)


def read_state(block, scope):
    """The state in a thinking block that came from `scope`, with its text; None for any other block."""
    mark = block.get("signature") if block.get("type") == "thinking" else block.get("data")
    if not isinstance(mark, str) or not mark.startswith(write_state(scope, {})):
        return None
    try:
        packed = mark[len(STATE_MARK) :].split(".", 1)[1]
        data = zlib.decompress(base64.urlsafe_b64decode(packed)) if packed else b"{}"
        state = as_dict(json.loads(data.decode()))
    except (ValueError, zlib.error):
        return None
    text = block.get("thinking")
    return dict(state, text=text if isinstance(text, str) else "")


def is_our_thinking(block):
    """Whether this program signed a block of reasoning."""
    return str(block.get("signature") or block.get("data")).startswith(STATE_MARK)


# ---- content blocks ------------------------------------------------------------------------------------


def clean_blocks(blocks, profile):
    """The blocks with what the provider has no form for in words; unchanged ones are the same objects."""
    return [part for block in blocks for part in clean_block(block, profile)]


def clean_block(block, profile):
    """One block as a list of blocks that the provider takes.

    Kinds seen from the client: text, image, document, tool_use, tool_result, thinking,
    redacted_thinking, tool_reference; the others stand in the documentation, or come one day.
    """
    kind, source = block.get("type"), as_dict(block.get("source"))
    if kind == "text":
        return [block]
    if kind == "tool_result":
        return [clean_result(block, profile)]
    if kind == "image":
        note = image_note(source, profile)
        return [text_block(note)] if note else [block]
    if kind == "document" and source.get("type") in ("base64", "url", "file"):
        takes = profile.files and (source["type"] == "base64" or profile.native_blocks)
        return [block if takes else text_block(document_note(block, source))]
    if profile.native_blocks:
        return [block]
    if kind == "document":
        return document_blocks(block, source, profile)
    return [text_block(foreign_text(block))]


def clean_result(block, profile):
    """A tool_result with clean blocks; tool_reference blocks become the names of the loaded tools."""
    if not isinstance(block.get("content"), (list, dict)):
        return block
    blocks = as_blocks(block["content"])
    loaded = [part for part in blocks if part.get("type") == "tool_reference"]
    content = clean_blocks([part for part in blocks if part not in loaded], profile)
    if loaded:
        names = [short_name(str(part.get("tool_name"))) for part in loaded]
        content.append(text_block(LOADED + ", ".join(names)))
    return block if content == block["content"] else dict(block, content=content)


def image_note(source, profile):
    """What is said in place of an image that cannot be passed on; "" where it can.

    Text-only models answer 400 ("Model only support text input"); Ollama and Moonshot fetch no URLs.
    """
    kind, url = source.get("type"), source.get("url")
    if not profile.images:
        return "[an image was here; this model takes no images]"
    if kind == "base64" and isinstance(source.get("data"), str):
        return ""
    is_url = kind == "url" and isinstance(url, str)
    if is_url and profile.image_urls or kind == "file" and profile.native_blocks:
        return ""
    return "[an image was here that could not be passed on%s]" % (": " + url if is_url else "")


def document_note(block, source):
    """What is said in place of a PDF, with what the model can do about it: a coding agent has a
    shell, and Claude Code's Read tool renders single pages."""
    where = " at %s" % source["url"] if isinstance(source.get("url"), str) else ""
    return (
        "[a PDF document (%s)%s was here; this model cannot read PDF files. Convert it to text (for"
        " example with pdftotext), or read single pages as images.]" % (title_of(block), where)
    )


def document_blocks(block, source, profile):
    """A document that is text, under its title."""
    if source.get("type") == "text":
        return [text_block("[document: %s]\n%s" % (title_of(block), source.get("data")))]
    if source.get("type") == "content":
        inner = clean_blocks(as_blocks(source.get("content")), profile)
        return [text_block("[document: %s]" % title_of(block))] + inner
    return [text_block(document_note(block, source))]


def title_of(document):
    """A document's title, or a word in its place."""
    return str(document.get("title") or "document")


def foreign_text(block):
    """A block that only Anthropic's API has a form for, as text that the model can read."""
    kind = str(block.get("type"))
    if kind == "search_result":
        inner = "\n".join(block_text(part) for part in as_blocks(block.get("content")))
        return "[search result: %s - %s]\n%s" % (block.get("title"), block.get("source"), inner)
    if kind == "server_tool_use":
        return "[%s: %s]" % (block.get("name"), compact_json(as_dict(block.get("input"))))
    if kind.endswith("_tool_result"):
        hits = [hit for hit in as_list(block.get("content")) if isinstance(hit, dict)]
        found = ["%s - %s" % (hit.get("title"), hit.get("url")) for hit in hits]
        return "\n".join(["[%s]" % kind] + found)
    return block_text(block) or (
        "[a block of kind %s, which this model cannot be shown]" % kind[:60]
    )


# ---- tools ---------------------------------------------------------------------------------------------


def is_function(tool):
    """Whether a tool is run by the client; the others are run by Anthropic's servers (web_search_*)."""
    return "input_schema" in tool or tool.get("type") in (None, "custom")


def offered_tools(body):
    """The client's function tools in an order that only ever grows at its end: those that are always
    there by name, then the deferred ones as the conversation's tool_reference blocks name them.

    The client itself sends them in another order with each request (seen with 2.1.330), which costs
    a provider's whole prefix cache: tools stand before the conversation in every chat template.
    """
    tools = {}
    for tool in as_list(body.get("tools")):
        name = as_dict(tool).get("name")
        if isinstance(name, str) and name and name != PLACEHOLDER_TOOL and is_function(tool):
            tools[name] = tool
    fixed = sorted(name for name in tools if not tools[name].get("defer_loading"))
    if len(fixed) == len(tools):
        return [tools[name] for name in fixed]
    named = [
        str(block.get("tool_name"))
        for _, block in walk_blocks(body.get("messages"))
        if block.get("type") == "tool_reference"
    ]
    order = {name: -place for place, name in enumerate(reversed(named))}  # its first appearance
    deferred = sorted(set(tools) - set(fixed), key=lambda name: (order.get(name, 1), name))
    return [tools[name] for name in fixed + deferred]


def tool_names(body):
    """{name sent to the provider: (the client's name, schema)} of the offered tools."""
    return {
        short_name(tool["name"]): (tool["name"], as_dict(tool.get("input_schema")))
        for tool in offered_tools(body)
    }


def normalize_tools(body, profile, memo):
    """{"tools", "tool_choice"} as the provider takes them, at most as many as it takes: those at the
    end are the rarest. {} where there are none."""
    tools = offered_tools(body)
    tools = [clean_tool(tool, profile, memo) for tool in tools[: profile.max_tools or len(tools)]]
    if profile.native_blocks:
        tools += [tool for tool in as_list(body.get("tools")) if not is_function(as_dict(tool))]
    if not tools:
        return {}
    choice, names = as_dict(body.get("tool_choice")), {tool.get("name") for tool in tools}
    kind, name = choice.get("type"), short_name(str(choice.get("name")))
    form = {"none": "none", "any": "required", "tool": "named"}.get(str(kind))
    if form and (form not in profile.tool_choice or form == "named" and name not in names):
        choice = {key: value for key, value in choice.items() if key not in ("type", "name")}
        choice["type"] = "auto"
    elif form == "named":
        choice = dict(choice, name=name)
    return dict({"tools": tools}, **{"tool_choice": choice} if choice else {})


def clean_tool(tool, profile, memo):
    """One tool with a schema that the provider takes. memo keeps (tool, rules, clean tool) by name,
    as cleaning the same schemas again costs more than comparing them."""
    rules = (profile.schema, profile.typed_schema)
    known = memo.get(tool["name"])
    if known and known[1] == rules and known[0] == tool:
        return known[2]
    schema = clean_schema(as_dict(tool.get("input_schema")), profile)
    schema["type"] = "object"
    schema["properties"] = as_dict(schema.get("properties"))
    clean = {key: value for key, value in tool.items() if key != "defer_loading"}
    clean.update(name=short_name(tool["name"]), input_schema=schema)
    if len(memo) > 2000:
        memo.clear()
    memo[tool["name"]] = (tool, rules, clean)
    return clean  # not the memo's: another thread may have put its own there


def clean_schema(schema, profile, defs=None, depth=0):
    """A JSON schema that all providers take: $schema and format:uri gone, $ref replaced by what it
    names, type lists split, without the keywords in profile.schema.

    defs: what a $ref may name; under None, [how many more may be resolved]. Kimi writes nonsense with
    $schema in a tool, Gemini and several others refuse format:uri and $ref, and most know no list of
    types; none of it changes what a model writes.
    """
    defs = {None: [MAX_REFS]} if defs is None else defs
    for key in ("$defs", "definitions"):
        if key in schema:
            defs = dict(defs, **as_dict(schema[key]))
    if isinstance(schema.get("$ref"), str):
        name = schema["$ref"].rsplit("/", 1)[-1]
        inner = {key: part for key, part in defs.items() if key != name}
        return clean_schema(resolve_ref(schema, name, defs), profile, inner, depth + 1)
    clean = {}
    for key, value in schema.items():
        if key in DROPPED_KEYWORDS or (key == "format" and value == "uri"):
            continue
        if key not in profile.schema:
            clean[key] = clean_part(key, value, profile, defs, depth)
        elif key == "const":
            clean["enum"] = [value]
    split_type(clean)
    if profile.typed_schema and depth and not {"type", "anyOf", "oneOf", "allOf"} & set(clean):
        clean["type"] = "object" if "properties" in clean else "string"
    return clean


DROPPED_KEYWORDS = ("$schema", "$defs", "definitions", "$id", "$comment")
SCHEMA_MAPS = ("properties", "patternProperties")
SUBSCHEMAS = ("items", "additionalProperties", "not", "propertyNames", "contains")
SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")


def resolve_ref(schema, name, defs):
    """What a schema's $ref names, with what stands beside the $ref; any object where it names
    nothing known, or itself."""
    defs[None][0] -= 1
    found = as_dict(defs.get(name)) if defs[None][0] >= 0 else {}
    beside = {key: value for key, value in schema.items() if key != "$ref"}
    return dict(found or {"type": "object"}, **beside)


def clean_part(key, value, profile, defs, depth):
    """The value of one schema keyword, cleaned where it holds schemas itself."""

    def clean(part):
        return clean_schema(part, profile, defs, depth + 1) if isinstance(part, dict) else part

    if depth > MAX_SCHEMA_DEPTH:
        return {} if isinstance(value, dict) else value
    if key in SCHEMA_MAPS and isinstance(value, dict):
        return {name: clean(part) for name, part in value.items()}
    if key in SUBSCHEMAS and isinstance(value, dict):
        return clean(value)
    if key in SCHEMA_LISTS and isinstance(value, list):
        return [clean(part) for part in value]
    return value


def split_type(schema):
    """type: ["string", "null"] becomes type: "string"; several real types become anyOf."""
    if isinstance(schema.get("type"), list):
        kinds = [kind for kind in schema.pop("type") if kind != "null"]
        if len(kinds) == 1:
            schema["type"] = kinds[0]
        elif kinds and "anyOf" not in schema:
            schema["anyOf"] = [{"type": kind} for kind in kinds]


# ---- the form of the reply -----------------------------------------------------------------------------


def wanted_schema(body):
    """The JSON schema that the reply must fit (output_config.format, or the older output_format),
    or None."""
    wanted = as_dict(as_dict(body.get("output_config")).get("format") or body.get("output_format"))
    schema = wanted.get("schema")
    is_schema = wanted.get("type") == "json_schema" and isinstance(schema, dict)
    return schema if is_schema else None


def ask_for_format(body, profile):
    """Clean the schema of the reply in `body`; where the provider knows no such schema, ask for it
    in words at the end of the last turn (Claude Code asks so for a session's title)."""
    schema = wanted_schema(body)
    if schema is None:
        return
    schema = clean_schema(schema, profile)
    wanted = {"type": "json_schema", "schema": schema}
    body["output_config"] = dict(as_dict(body.get("output_config")), format=wanted)
    if profile.json_format == "json_schema":
        return
    wish = "Reply with one JSON object that fits this JSON schema, and nothing else:\n"
    wish = text_block(wish + compact_json(schema))
    messages, last = body["messages"], as_dict(body["messages"][-1:] and body["messages"][-1])
    if last.get("role") == "user":
        messages[-1] = dict(last, content=as_blocks(last["content"]) + [wish])
    else:
        messages.append({"role": "user", "content": [wish]})


# ======================================================================================================
# 6  Formats out: a normalized request -> what goes over the wire
# ======================================================================================================

BRIDGE = "I have the results of the tools."
CONTINUE = "Continue."
MAX_STOPS = 4  # stop sequences; OpenAI and vLLM take no more


class Format(NamedTuple):
    """An API that providers speak; a row of FORMATS. Nothing else knows which format is in use.

    write(normalized body, model, profile, attach) -> request body, a new dict; attach: the two
    disguise fields or {}. reader(writer, profile) -> reader of the reply (section 8). headers(key,
    profile, client_headers) -> headers of the format's own. path, models_path, count_path: behind the
    base URL; "/v1/..." stands in place of a base's own /v1; "": the format has no such endpoint.
    relays: the provider's own events reach the client, so that their order matters (see `check`).
    """

    name: str
    path: str
    models_path: str
    count_path: str
    headers: object
    write: object
    reader: object
    relays: bool = False


def endpoint(base, path):
    """The URL of a format's path at a base URL; the base's query (Azure's api-version) stays."""
    parts = urllib.parse.urlsplit(base)
    start = re.sub(r"/v1\Z", "", parts.path) if path.startswith("/v1/") else parts.path
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, start + path, parts.query, ""))


# ---- chat: OpenAI's chat completions -------------------------------------------------------------------


def chat_headers(key, profile, client_headers):
    """The key in the header that the provider wants it in."""
    if not key:
        return {}
    bearer = profile.key_header == "authorization"
    return {"Authorization": "Bearer " + key} if bearer else {profile.key_header: key}


def write_chat(body, model, profile, attach=()):
    """The chat-completions request for a normalized body
    (https://platform.openai.com/docs/api-reference/chat/create)."""
    sent = {"model": model, "messages": chat_messages(body, profile)}
    tools = [chat_tool(tool) for tool in as_list(body.get("tools")) if is_function(tool)]
    if tools:
        sent["tools"] = tools
        sent.update(choice_fields(as_dict(body.get("tool_choice")), profile))
    sent.update(sampling_fields(body, profile))
    schema = wanted_schema(body)
    if schema is not None and profile.json_format:
        sent["response_format"] = {"type": profile.json_format}
        if profile.json_format == "json_schema":
            sent["response_format"]["json_schema"] = {"name": "reply", "schema": schema}
    level = thinking_level(body)
    if tools and profile.effort_with_tools:
        sent["reasoning_effort"] = profile.effort_with_tools
    elif level and profile.reasoning:
        sent.update(REASONING[profile.reasoning](level, profile))
    if body.get("stream") is True or profile.always_stream:
        sent["stream"] = True
        if profile.usage_option:
            sent["stream_options"] = {"include_usage": True}
    sent.update(profile.body)
    sent.update(attach)
    for field in profile.never:
        sent.pop(field, None)
    return sent


def chat_messages(body, profile):
    """One leading system message, then turns; tool messages directly after their calls.

    Content is a plain string wherever it can be: Groq refuses lists in system messages, Ollama loses
    the tool_call_id of a tool message whose content is a list. Several system messages, or one that
    is not the first, are refused by MiniMax (2013) and by most chat templates.
    """
    text = system_text(body.get("system"))
    messages, names = [{"role": "system", "content": text}] if text else [], {}
    for message in body["messages"]:
        blocks = as_blocks(message["content"])
        if message["role"] == "assistant":
            messages.append(assistant_message(blocks, profile))
            names = {block["id"]: block["name"] for block in blocks if block["type"] == "tool_use"}
        else:
            messages += user_messages(blocks, names, profile)
    if not messages or messages[-1]["role"] in ("system", "assistant"):
        # Few providers go on with an assistant's text, several refuse it: words work everywhere.
        messages.append({"role": "user", "content": CONTINUE})
    return messages


def assistant_message(blocks, profile):
    """An assistant turn; its thinking goes back in the provider's own field.

    Content is "" beside calls, not null: "some gateways reject null" (DeepSeek's own client).
    """
    texts = [block_text(block) for block in blocks if block["type"] == "text"]
    message = {"role": "assistant", "content": "\n\n".join(texts)}
    for block in blocks:
        if block["type"] == "thinking":
            details = as_dict(block.get("ccfix")).get("details")
            message[profile.reasoning_field] = details or block["thinking"]
    calls = [chat_call(block) for block in blocks if block["type"] == "tool_use"]
    return dict(message, tool_calls=calls) if calls else message


def chat_call(block):
    """A tool_use block as a tool call; the model's own argument text where it is remembered."""
    note = block.get("ccfix", {})
    arguments = note.get("arguments") or compact_json(block["input"])
    function = {"name": block["name"], "arguments": arguments}
    call = {"id": block["id"], "type": "function", "function": function}
    if note.get("google"):
        call["extra_content"] = {"google": {"thought_signature": note["google"]}}
    return call


def user_messages(blocks, names, profile):
    """Tool messages, then one user message with everything else of the turn. names: {call id: tool}.

    A tool message holds text only: images and files of a result follow in the user message.
    """
    messages, media, rest = [], [], []
    for block in blocks:
        if block["type"] != "tool_result":
            rest.append(chat_part(block))
            continue
        parts = [chat_part(part) for part in result_blocks(block)]
        texts = [part for part in parts if isinstance(part, str)]
        others = [part for part in parts if not isinstance(part, str)]
        if others:
            media += ["[from the result of %s:]" % names.get(block["tool_use_id"])] + others
            texts = texts or ["(see the next message)"]
        content = "\n".join(texts)
        messages.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": content})
    if media or rest:
        if messages and not profile.user_after_tool:
            messages.append({"role": "assistant", "content": BRIDGE})
        messages.append({"role": "user", "content": join_parts(media + rest)})
    return messages


def chat_part(block):
    """A block as a part of a message: text as str, an image or a file as OpenAI's dict."""
    source = as_dict(block.get("source"))
    if block["type"] == "image":
        url = source.get("url") if source.get("type") == "url" else data_url(source, "image/png")
        return {"type": "image_url", "image_url": {"url": url}}
    if block["type"] == "document":
        name = title_of(block)
        name = name if name.lower().endswith(".pdf") else name + ".pdf"
        file = {"filename": name, "file_data": data_url(source, "application/pdf")}
        return {"type": "file", "file": file}
    return block_text(block)


def data_url(source, media_type):
    """A base64 source as a data: URL; media_type where it names none."""
    return "data:%s;base64,%s" % (source.get("media_type") or media_type, source["data"])


def join_parts(parts):
    """Message content of parts: one plain string unless there is an image or a file among them."""
    if all(isinstance(part, str) for part in parts):
        return "\n\n".join(part for part in parts if part) or NO_OUTPUT
    content = []
    for part in parts:
        if not isinstance(part, str):
            content.append(part)
        elif content and content[-1]["type"] == "text":
            content[-1] = text_block(content[-1]["text"] + "\n\n" + part)
        elif part:
            content.append(text_block(part))
    return content


def chat_tool(tool):
    """A tool as OpenAI writes it. MiniMax answers 2013 to a function without parameters, so
    normalize gave each an object schema."""
    function = {"name": tool["name"], "description": str(tool.get("description") or "")}
    return {"type": "function", "function": dict(function, parameters=tool["input_schema"])}


def choice_fields(choice, profile):
    """tool_choice and parallel_tool_calls; nothing for auto, which is every provider's default.

    What the provider does not take became auto in normalize.
    """
    kind, fields = choice.get("type"), {}
    if kind in ("none", "any"):
        fields["tool_choice"] = "required" if kind == "any" else "none"
    elif kind == "tool":
        fields["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
    if choice.get("disable_parallel_tool_use") is True and profile.parallel:
        fields["parallel_tool_calls"] = False
    return fields


def sampling_fields(body, profile):
    """The output limit, temperature, top_p and stop sequences."""
    fields = {}
    if is_number(body.get("max_tokens")):
        fields[profile.max_tokens] = body["max_tokens"]
    for name in ("temperature", "top_p"):
        if is_number(body.get(name)):
            fields[name] = body[name]
    stops = [stop for stop in as_list(body.get("stop_sequences")) if stop and isinstance(stop, str)]
    if stops:
        fields["stop"] = stops[:MAX_STOPS]
    return fields


# ---- anthropic: Anthropic's Messages -------------------------------------------------------------------


def anthropic_headers(key, profile, client_headers):
    """The client's version and beta flags, and the key in both forms that such providers take: some
    look at x-api-key, some at Authorization, and none refuses the other."""
    betas = re.split(r"[,\s]+", client_headers.get("anthropic-beta") or "")
    betas = [flag for flag in betas if flag and flag not in profile.betas]
    headers = {"anthropic-version": client_headers.get("anthropic-version") or "2023-06-01"}
    if betas:
        headers["anthropic-beta"] = ",".join(betas)
    if key:
        headers["x-api-key"] = key
    return dict(headers, **chat_headers(key, profile, client_headers))


def write_anthropic(body, model, profile, attach=()):
    """The Messages request for a normalized body: itself, but for the model's name and what the
    provider was found to refuse."""
    sent = {key: value for key, value in body.items() if key not in profile.never}
    sent["model"] = model
    return without_keys(sent, "cache_control") if "cache_control" in profile.never else sent


def without_keys(value, name):
    """A copy of a JSON value without the dict entries of one name."""
    if isinstance(value, dict):
        return {key: without_keys(part, name) for key, part in value.items() if key != name}
    return [without_keys(part, name) for part in value] if isinstance(value, list) else value


# ======================================================================================================
# 7  Tool text: arguments mended against the tool's schema; tool calls that a model wrote as text
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
# 8  Stream in: SSE bytes -> payloads -> a reader -> MessageWriter -> Anthropic events -> SSE bytes
# ======================================================================================================

MAX_LINE = 32 << 20  # a longer SSE line is not a model's work


def sse_payloads(blocks):
    """Data strings of an SSE stream that comes in bytes, split anywhere; None after each block ("no
    more for now").

    Knows LF and CRLF, comments, several data lines in one event, data lines without the blank line
    between, a BOM, `event: error`, and llama.cpp's older `error: {..}` line (both come out as
    {"error": ..}). An event that the end of the stream cuts off is dropped when it is not valid JSON,
    as a browser would (https://html.spec.whatwg.org/multipage/server-sent-events.html).
    """
    rest, data, failed = [], [], False
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if not end:
            if block:
                rest.append(block)
            if len(rest) % 64 == 63 and sum(map(len, rest)) > MAX_LINE:
                raise too_long("a line")
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
            elif line:
                failed = read_other_line(line.lstrip("\ufeff"), data, failed)
            elif data:
                yield event_payload(data, failed)
                data, failed = [], False
        yield None
    last = b"".join(rest).decode("utf-8", "replace").strip()
    if last:
        failed = read_other_line(last, data, failed)
    if data and (data[-1].strip() == "[DONE]" or json_or_none("\n".join(data)) is not None):
        yield event_payload(data, failed)
        yield None


def too_long(what):
    """The UpstreamError of a reply that no model makes."""
    message = "The provider sent %s of over %d MB; that is not a model's reply."
    return UpstreamError(message % (what, MAX_LINE >> 20), kind="cut")


def is_whole_event(line):
    """Whether a data line is an event of its own, so that the next one needs no blank line before."""
    is_object = line[:1] == "{" and line[-1:] == "}" and json_or_none(line) is not None
    return is_object or line == "[DONE]"


def read_other_line(line, data, failed):
    """Put a line that is neither plain data nor blank into data -> whether the event is an error."""
    name, _, value = line.partition(":")
    if name == "event":
        return value.strip() == "error"
    if name == "data":
        data.append(value[1:] if value[:1] == " " else value)
    elif name == "error":
        data.append(value.strip())
        return True
    return failed


def event_payload(data, failed):
    """An event's data string; that of a failed event is made an {"error": ..} object if it is none."""
    payload = "\n".join(data)
    body = json_or_none(payload) if failed else None
    if failed and "error" not in as_dict(body):
        return compact_json({"error": body if isinstance(body, dict) else {"message": payload}})
    return payload


_decode_json = json.JSONDecoder().raw_decode


def parse_payload(payload):
    """The dict in a payload; an empty one for what is not a JSON object: a broken line costs that
    line, not the reply. What stands behind the object is ignored, as some servers pad there."""
    try:
        return as_dict(_decode_json(payload)[0])
    except (ValueError, RecursionError):
        return as_dict(json_or_none(payload))  # there is white space before it


# ---- reply text: leading <think>, calls written as text ----------------------------------------------


class ThinkTags:
    """Splits a leading <think>..</think> off a reply's text, and the line ends beside the tags.

    feed(text) -> [(kind, text)]. place: "start" (no text yet), "lead" (right after the opening tag),
    "inside", "after" (right after the closing tag); `done`: only text follows.
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
        """Text without an opening tag; a closing one tells that the prompt template held the opening."""
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


# ---- the writer: calls in, Anthropic events out --------------------------------------------------------

IDLE, OPEN, DONE, FAILED = "idle", "open", "done", "failed"
ENDED = (DONE, FAILED)
MAX_THOUGHT = 4 << 20  # characters; a longer turn's reasoning travels in its thinking block alone
PING = {"type": "ping"}


def start_event(index, block):
    """content_block_start."""
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta_event(index, kind, text):
    """A delta of a block of `kind`, a key of BLOCKS."""
    row = BLOCKS[kind]
    delta = {"type": row.delta, row.piece: text}
    return {"type": "content_block_delta", "index": index, "delta": delta}


def signature_event(index, signature):
    """The delta with which a thinking block is signed, its last."""
    delta = {"type": "signature_delta", "signature": signature}
    return {"type": "content_block_delta", "index": index, "delta": delta}


def stop_event(index):
    """content_block_stop."""
    return {"type": "content_block_stop", "index": index}


def empty_block(kind, **fields):
    """The content_block with which a block of `kind`, a key of BLOCKS, starts."""
    return dict(BLOCKS[kind].empty, type=kind, **fields)


def zero_usage(input_tokens=0):
    """Anthropic's usage before anything is known: all four fields, as the client expects."""
    return {
        "input_tokens": input_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 0,
    }


class Dropped(Exception):
    """The connection to the client must end without a word: it then streams the same request again."""


class ToolCall:
    """A tool call while it arrives; see MessageWriter.advance.

    Providers send its parts in any order: arguments before the name, an id that comes later or never,
    two calls interleaved. A call becomes a block once its name is known and those before it are whole.
    """

    __slots__ = (
        "key",
        "id",
        "name",
        "fields",
        "waiting",
        "stream",
        "client_id",
        "google",
        "closed",
    )

    def __init__(self, key, call_id, name="", fields=()):
        self.key = key  # the provider's index, or id, or None
        self.id = call_id  # the provider's id, "" until it comes
        self.name = name  # the name sent by the provider, "" until it comes
        self.fields = fields  # further fields of the block, from a provider that speaks Anthropic
        self.waiting = []  # argument fragments that came before the name, or before its turn
        self.stream = None  # its ArgumentStream, once its block is open
        self.client_id = ""  # the id that the client is shown
        self.google = ""  # Gemini's thought signature
        self.closed = False  # its block is closed

    def arguments(self):
        """The argument text as the model wrote it, so far."""
        return (self.stream.raw if self.stream else "") + "".join(self.waiting)

    def is_whole(self):
        """Whether the arguments so far are whole JSON."""
        if self.stream and self.stream.complete and not self.waiting:
            return True
        return json_or_none(self.arguments()) is not None


class MessageWriter:
    """Anthropic's side of every stream: a reader calls, event dicts come out.

    | state | a block or a delta    | finish()                                | fail(error)              |
    | ----- | --------------------- | --------------------------------------- | ------------------------ |
    | IDLE  | message_start: OPEN   | message_start, then as OPEN             | raise it: the HTTP status |
    |       |                       |                                         | is still free            |
    | OPEN  | stays OPEN            | closes the block, message_delta,        | closes the block, error  |
    |       |                       | message_stop: DONE                      | event: FAILED; in a tool |
    |       |                       |                                         | call raise Dropped       |
    | DONE, FAILED | RuntimeError   | nothing                                 | nothing                  |

    Promises: message_start once and first; block indexes 0, 1, 2 ...; one block open at a time;
    message_delta, then message_stop, once and last; the input of a tool is one JSON object.
    """

    def __init__(
        self, message_id, model, scope="", input_tokens=0, tools=(), taken=(), new_id=None
    ):
        self.message_id = message_id  # also the request_id of an error event
        self.model = model  # the name that the client is shown
        self.scope = scope  # whose reasoning it is: Profile.scope
        self.input_tokens = input_tokens  # an estimate, until the provider tells
        self.tools = dict(tools)  # {name sent to the provider: (the client's name, JSON schema)}
        self.taken = set(taken)  # tool ids that the conversation has used
        self.new_id = new_id or (lambda: "%d" % len(self.taken))  # -> a fresh part of an id
        self.head = {}  # fields of message_start that the provider sent itself
        self.state = IDLE
        self.content = False  # real content went out: nothing is tried again
        self.kind = ""  # of the open block, "" for none
        self.index = -1  # of the block that was opened last
        self.signing = False  # the open block is thinking that we sign
        self.calls = []  # ToolCalls in the order in which they began
        self.cut = False  # the model hit its output limit: the last arguments may be half
        self.late = []  # (kind, text) that came while a tool call was unfinished
        self.blank = ""  # white space that waits for text: alone it is no block
        self.written = 0  # characters of content
        self.thought = []  # thinking text, for memory
        self.said = []  # text while there are details, for memory
        self.details = []  # opaque reasoning that must go back: OpenRouter's reasoning_details
        self.signed = ""  # JSON of the details that the last signature carried
        self.memory = {}  # {tool id, or text_key: what to remember}, see normalize; after finish()

    def start(self):
        """message_start, if it has not gone out: the HTTP status is decided."""
        if self.state != IDLE:
            return
        self.state = OPEN
        message = {"id": self.message_id, "type": "message", "role": "assistant"}
        message.update({"stop_reason": None, "stop_sequence": None}, **self.head)
        usage = as_dict(self.head.get("usage"))
        counted = dict({"input_tokens": self.input_tokens, "output_tokens": 0}, **usage)
        message.update(
            model=self.model, content=[], usage=counted if usage else zero_usage(self.input_tokens)
        )
        yield {"type": "message_start", "message": message}

    def open_block(self, block, signing=False):
        """Close what is open and open a block. signing: it is thinking, and its end is signed."""
        if self.state in ENDED:
            raise RuntimeError("a block after the end")
        yield from self.start()
        yield from self.close_block()
        self.kind, self.index, self.signing = str(block["type"]), self.index + 1, signing
        yield start_event(self.index, block)

    def close_block(self):
        """Close the open block, if any; thinking is signed with what the next turn must bring back:
        Claude Code echoes a signature as it is, and nothing else that it does not know."""
        if self.signing:
            yield self.sign({})
        if self.kind:
            self.kind = ""
            yield stop_event(self.index)

    def sign(self, state):
        """The signature_delta with state, and with the opaque reasoning so far."""
        self.signing = False
        if self.details:
            state, self.signed = dict(state, details=self.details), compact_json(self.details)
        return signature_event(self.index, write_state(self.scope, state))

    def has_unsigned(self):
        """Whether there is opaque reasoning that no signature carries yet."""
        return bool(self.details) and compact_json(self.details) != self.signed

    def carry(self, state):
        """An empty thinking block whose signature carries state: the client echoes it as it is."""
        yield from self.open_block(empty_block("thinking"))
        yield self.sign(state)
        yield from self.close_block()

    def say(self, kind, text):
        """Text or thinking, in a block of its kind; what comes while a tool call is unfinished waits
        until after it."""
        if not text:
            return
        if self.calls and not self.calls[-1].closed:
            if not all(call.closed or call.name and call.is_whole() for call in self.calls):
                self.late.append((kind, text))
                return
            yield from self.advance(ending=True)
        if self.kind != kind:
            if not text.strip():
                self.blank += text
                return
            text, self.blank = self.blank + text, ""
            if kind == "text" and self.kind != "thinking" and self.has_unsigned():
                yield from self.carry({})
            yield from self.open_block(empty_block(kind), signing=kind == "thinking")
        self.content = True
        self.written += len(text)
        if kind == "text" and self.details:
            self.said.append(text)
        elif kind == "thinking" and self.written < MAX_THOUGHT:
            self.thought.append(text)
        yield delta_event(self.index, kind, text)

    def idle(self):
        """Something that the client counts as life after minutes of pings: an empty delta, in a
        thinking block of our own if none is open (it gives up after 600 s of pings alone)."""
        if self.kind not in ("thinking", "tool_use"):
            yield from self.open_block(empty_block("thinking"), signing=True)
        yield delta_event(self.index, self.kind, "")

    def fresh(self):
        """A writer for another try, which goes on where this one's message stands: message_start, and
        perhaps a sign of life, have gone out in the silence."""
        new = MessageWriter(self.message_id, self.model, self.scope, self.input_tokens, self.tools)
        for name in ("taken", "new_id", "state", "kind", "index", "signing"):
            setattr(new, name, getattr(self, name))
        return new

    # -- tool calls

    def add_call(self, key, call_id, name="", fields=()):
        """A ToolCall that begins now; its arguments go to `waiting`, then `advance` is due."""
        self.calls.append(ToolCall(key, call_id, name, fields))
        return self.calls[-1]

    def advance(self, ending=False):
        """Send what can be sent of the calls, in order: the first unfinished one is live; one that is
        whole makes way for the next; at the end all are flushed.

        Only the last call of a reply that was cut may be half: its input then stays as it came.
        """
        for call in self.calls:
            if call.closed:
                continue
            last = call is self.calls[-1]
            if not call.name and not ending:
                return
            if not call.name:
                call.closed = True  # a call without a name cannot be made
                continue
            if call.stream is None:
                yield from self.open_call(call)
            waiting, call.waiting = call.waiting, []
            for fragment in waiting:
                yield from self.arguments(call.stream.feed(fragment))
            if not ending and (last or not call.is_whole()):
                return
            yield from self.arguments(call.stream.finish(self.cut and ending and last))
            yield from self.close_block()
            call.closed = True
            note = {"arguments": call.stream.raw, "google": call.google}
            self.memory[call.client_id] = {key: value for key, value in note.items() if value}

    def open_call(self, call):
        """Open the block of a call whose name is known, under an id that the conversation lacks: some
        providers count from call_0 in each reply, and the client takes equal ids for one call."""
        name, schema = self.offered_tool(call.name)
        call.stream = ArgumentStream(name, schema)
        good = re.match(r"[A-Za-z0-9_-]{1,64}\Z", call.id) and call.id not in self.taken
        call.client_id = call.id if good else "toolu_" + self.new_id()
        self.taken.add(call.client_id)
        if call.google or (self.has_unsigned() and self.kind != "thinking"):
            google = {"google": {call.client_id: call.google}} if call.google else {}
            yield from self.carry(google)
        block = dict(call.fields, **empty_block("tool_use", id=call.client_id, name=name))
        self.content = True
        yield from self.open_block(block)

    def offered_tool(self, name):
        """(the client's name, schema) of a tool that the model named; a wrong case is forgiven where
        only one tool fits."""
        if name in self.tools:
            return self.tools[name]
        fits = [tool for other, tool in self.tools.items() if other.lower() == name.lower()]
        return fits[0] if len(fits) == 1 else (name, {})

    def arguments(self, text):
        """A piece of the open call's input."""
        if text:
            self.written += len(text)
            yield delta_event(self.index, "tool_use", text)

    # -- the end

    def finish(self, stop_reason, stop_sequence, usage, event=()):
        """The last events. event: a provider's own message_delta, whose other fields go along."""
        if self.state in ENDED:
            return
        yield from self.advance(ending=True)
        late, self.late = self.late, []
        for kind, text in late:
            yield from self.say(kind, text)
        yield from self.start()
        yield from self.close_block()
        self.state = DONE
        self.keep_memory()
        event = dict({"type": "message_delta"}, **dict(event))
        ends = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        yield dict(event, delta=dict(as_dict(event.get("delta")), **ends), usage=usage)
        yield {"type": "message_stop"}

    def keep_memory(self):
        """Reasoning belongs to each call of the turn: the client may drop or trim the thinking block.
        A turn without calls is known by its text."""
        if self.has_unsigned() and not self.memory:
            # Not carried in a block after the text: `claude -p` prints what the last block says.
            self.memory[text_key(self.scope, "".join(self.said))] = {}
        for note in self.memory.values():
            note["scope"] = self.scope
            if self.thought and self.written < MAX_THOUGHT:
                note["reasoning"] = "".join(self.thought)
            if self.details:
                note["details"] = self.details

    def fail(self, error):
        """Tell the client that the reply broke off, so that it keeps what it has. Raises Dropped in
        the middle of a tool call: the client asks again when the connection just ends; and the
        error itself where the HTTP status is still free."""
        if self.state in ENDED:
            return
        if self.state == IDLE:
            raise error
        self.state = FAILED
        if self.kind == "tool_use":
            raise Dropped(error)
        yield from self.close_block()
        yield dict(error.body(), request_id=self.message_id)


# ---- readers: payloads in, calls on a MessageWriter ----------------------------------------------------


class ChatReader:
    """Reads the chunks of a chat-completions stream; a whole reply is one chunk.

    feed and finish give events, and raise UpstreamError for an error inside the reply; the caller,
    who knows whether another try is possible, then calls writer.fail(error).

    A chunk: {"choices": [{"index", "delta": {"content", "reasoning_content", "tool_calls": [{"index",
    "id", "function": {"name", "arguments"}}]}, "finish_reason"}], "usage"}; any of it may be missing,
    null, or of another type (https://platform.openai.com/docs/api-reference/chat/streaming).
    """

    def __init__(self, writer, profile):
        self.writer, self.profile = writer, profile
        self.raw_usage = {}  # the provider's own usage, as last told
        self.reason = ""  # finish_reason
        self.stopped_at = None  # the stop sequence that matched
        self.ended = False  # the reply is whole
        self.heard = False  # something of an answer came
        self.tags = ThinkTags()
        schemas = {name: schema for name, (_, schema) in writer.tools.items()}
        kinds = ("text", "thinking") if schemas else ()
        self.scanners = {kind: TextCalls(schemas) for kind in kinds}  # for calls written as text

    def feed(self, chunk):
        """Events for one chunk (dict). Raises UpstreamError for an error in it.

        All choices count: Copilot puts the text of Claude models in the first and calls in the second.
        """
        if self.writer.state in ENDED:
            raise RuntimeError("feed after the end")
        if "error" in chunk or "x_groq" in chunk or "base_resp" in chunk:
            error = error_in_reply(chunk)
            if error:
                raise error
        fresh = not self.writer.content  # MiniMax ends with the whole message again
        for choice in as_list(chunk.get("choices")):
            choice = as_dict(choice)
            delta = choice.get("delta")
            if not isinstance(delta, dict):
                delta = as_dict(choice.get("message")) if fresh and delta is None else {}
            yield from self.feed_delta(delta)
            if choice.get("finish_reason"):
                self.note_finish(choice)
            if choice.get("usage"):
                self.raw_usage = as_dict(choice["usage"])
        usage = chunk.get("usage") or as_dict(chunk.get("x_groq")).get("usage")
        if usage:
            self.raw_usage = as_dict(usage)

    def feed_delta(self, delta):
        """Reasoning, then text, then calls: the order in which they belong together."""
        text, writer = delta.get("content"), self.writer
        if (
            len(delta) == 1 and isinstance(text, str) and self.is_plain(text)
        ):  # the hot path of text
            writer.written += len(text)
            if writer.details:
                writer.said.append(text)
            yield delta_event(writer.index, "text", text)
            return
        if not REASONING_FIELDS.keys().isdisjoint(delta):
            yield from self.feed_reasoning(delta)
        if text:
            yield from self.feed_text(text)
        if delta.get("tool_calls") or delta.get("function_call") or delta.get("refusal"):
            piece = self.plain_fragment(delta)
            yield from self.feed_rare(delta) if piece is None else writer.arguments(piece)

    def is_plain(self, text):
        """Whether text goes on in the open block without a look at what it says."""
        writer = self.writer
        if not text or writer.kind != "text" or writer.calls or not self.tags.done:
            return False
        scanner = self.scanners.get("text")
        return scanner is None or not (scanner.held or scanner.TRIGGER(text))

    def plain_fragment(self, delta):
        """What a delta adds to the input of the open call, where it holds nothing else; else None.
        The hot path of tool input."""
        fragments, calls = delta.get("tool_calls"), self.writer.calls
        if not calls or len(delta) != 1 or not isinstance(fragments, list) or len(fragments) != 1:
            return None
        fragment, call = as_dict(fragments[0]), calls[-1]
        function = as_dict(fragment.get("function"))
        known = call.stream and not call.closed and fragment.get("index") == call.key
        alone = PLAIN_FRAGMENT.issuperset(fragment) and len(function) == 1
        if known and alone and isinstance(function.get("arguments"), str):
            return call.stream.feed(function["arguments"])
        return None

    def feed_reasoning(self, delta):
        """Reasoning from the first field that holds any (chutes.ai sends the same in two); opaque
        details are kept for the next turn and shown where no plain field has the text."""
        shown = False
        for field, shape in REASONING_FIELDS.items():
            value = delta.get(field)
            if shape == "string" and value and not shown:
                yield from self.scan("thinking", value)
                shown = True
            for part in as_list(value) if shape == "parts" else ():
                if isinstance(part, dict):
                    keep_detail(self.writer.details, part)
                    if not shown:
                        yield from self.scan("thinking", part.get("text") or part.get("summary"))

    def feed_text(self, content):
        """Content text, or a list of parts (Mistral's thinking, Anthropic-like relays)."""
        if isinstance(content, str):
            for kind, piece in ([("text", content)] if self.tags.done else self.tags.feed(content)):
                yield from self.scan(kind, piece)
        for part in map(as_dict, as_list(content)):
            inner = part.get("thinking")
            if isinstance(inner, list):
                inner = "".join(str(as_dict(piece).get("text") or "") for piece in inner)
            if inner or part.get("type") == "thinking":
                yield from self.scan("thinking", inner)
            elif isinstance(part.get("text"), str):
                yield from self.feed_text(part["text"])

    def scan(self, kind, text):
        """Text or thinking, looked through for calls written as text."""
        if not text or not isinstance(text, str):
            return
        self.heard = self.heard or bool(text.strip())
        yield from self.flush_scanners(kind)
        scanner = self.scanners.get(kind)
        if scanner is None or not (scanner.held or scanner.TRIGGER(text)):
            yield from self.writer.say(kind, text)
        else:
            yield from self.tell_found(kind, scanner.feed(text))

    def flush_scanners(self, kind=""):
        """What the scanners of other kinds still hold: it came before what comes now."""
        for other, scanner in self.scanners.items():
            if other != kind and (scanner.pending or scanner.call):
                yield from self.tell_found(other, scanner.finish())

    def tell_found(self, kind, pieces):
        """What a TextCalls scanner made of text: text of the same kind, thinking, or calls."""
        for what, value in pieces:
            if what == "call":
                self.writer.add_call(None, "", value[0]).waiting.append(value[1])
                yield from self.writer.advance()
            else:
                yield from self.writer.say("thinking" if what == "thinking" else kind, value)

    def feed_rare(self, delta):
        """Tool calls, the older function_call, and refusals (OpenAI's own field for them: shown as
        text, and the stop reason says so)."""
        yield from self.flush_scanners()
        self.heard = True
        for call in as_list(delta.get("tool_calls")):
            if isinstance(call, dict):
                self.feed_call(call)
        if isinstance(delta.get("function_call"), dict):
            self.feed_call({"index": 0, "function": delta["function_call"]})
        if self.writer.calls:
            yield from self.writer.advance()
        if isinstance(delta.get("refusal"), str):
            self.reason = "content_filter"
            yield from self.writer.say("text", delta["refusal"])

    def feed_call(self, delta):
        """Put one tool_calls delta into its call. Arguments may be an object (some relays), a
        continuation may repeat the name or hold an empty one (DashScope, Mistral's GLM)."""
        function = as_dict(delta.get("function"))
        name, fragment = function.get("name"), function.get("arguments")
        call = self.call_for(delta.get("index"), delta.get("id"), name, fragment)
        if isinstance(name, str) and not call.name:
            call.name = name
        if fragment is not None:
            call.waiting.append(fragment if isinstance(fragment, str) else compact_json(fragment))
        google = as_dict(as_dict(delta.get("extra_content")).get("google"))
        if isinstance(google.get("thought_signature"), str):
            call.google = google["thought_signature"]

    def call_for(self, index, call_id, name, fragment):
        """The ToolCall that a delta belongs to: by index, else by id, else the last one.

        A different id that comes with a name is a new call even on a used index (Gemini and others
        count every call 0); without an id another name is, and the same name when whole arguments
        are followed by more. Gemini and Mistral send no index at all, relays of Claude begin with 1.
        """
        call_id, calls = call_id if isinstance(call_id, str) else "", self.writer.calls
        if isinstance(index, int):
            found = next((call for call in reversed(calls) if call.key == index), None)
        else:
            found = next((call for call in calls if call_id and call.id == call_id), None)
            found = found or (calls[-1] if calls and not (call_id and name) else None)
        if found is None or name and self.is_another(found, call_id, name, fragment):
            return self.writer.add_call(index, call_id)
        found.id = found.id or call_id
        return found

    @staticmethod
    def is_another(call, call_id, name, fragment):
        """Whether a delta with a name begins a call of its own, though it points at `call`."""
        if call_id:
            return bool(call.id) and call_id != call.id
        if not call.name or name != call.name:
            return bool(call.name)
        more = fragment and str(fragment).strip()
        return bool(more) and call.arguments().strip() != "{}" and call.is_whole()

    def note_finish(self, choice):
        """Remember why it ended; the stop reason waits for the end, as usage often comes after it,
        and some (kimi on OpenRouter) send the finish twice. Raises what is not a finish but a failure.
        """
        reason = str(choice["finish_reason"])
        if reason in FINISH_ERRORS:
            status, sentence = FINISH_ERRORS[reason]
            raise UpstreamError(sentence, status, retry=True)
        self.ended = True
        self.reason = self.reason if self.reason == "content_filter" else reason
        self.writer.cut = STOP_REASONS.get(self.reason) == "max_tokens"
        if isinstance(choice.get("stop_reason"), str):  # vLLM names the stop sequence that matched
            self.stopped_at = choice["stop_reason"]

    def idle(self):
        return self.writer.idle()

    def done(self):
        """The provider's [DONE]: what came is whole even without a finish reason. By itself it is no
        answer: vLLM ends a stream with it that broke before its first word."""
        self.ended = self.ended or self.heard or bool(self.raw_usage)

    def finish(self):
        """The last events. Raises UpstreamError when the reply is not whole, or is nothing at all."""
        if self.writer.state in ENDED:
            return
        if not self.ended:
            raise cut_error(self.writer.content)
        if self.reason == FULL_WINDOW and not self.writer.content:
            usage = self.usage()
            raise overflow_error(
                usage["input_tokens"], self.profile.context, self.writer.input_tokens
            )
        for kind, text in self.tags.finish():
            yield from self.scan(kind, text)
        yield from self.flush_scanners()
        calls = self.writer.calls
        if calls and not self.writer.content and not any(call.name for call in calls):
            raise UpstreamError(
                "The model made a tool call without a name.", 502, kind="sampling", retry=True
            )
        yield from self.writer.advance(ending=True)
        reason = self.stop_reason()
        stopped_at = self.stopped_at if reason in ("stop_sequence", "max_tokens") else None
        yield from self.writer.finish(reason, stopped_at, self.usage())

    def stop_reason(self):
        """Anthropic's stop reason. Any call makes it tool_use, whatever the provider says (Gemini and
        older Ollama say "stop"), unless the reply was cut: then its input may be half."""
        if self.writer.cut or self.reason == FULL_WINDOW:
            return "max_tokens"
        if any(call.client_id for call in self.writer.calls):
            return "tool_use"
        if self.stopped_at is not None:
            return "stop_sequence"
        return STOP_REASONS.get(self.reason, "end_turn")

    def usage(self):
        """Anthropic's usage: input, cache read and cache write are disjoint, while OpenAI's prompt
        tokens hold all three. Estimates where the provider tells nothing: the client decides by these
        numbers when to compact. Names: DeepSeek has prompt_cache_hit_tokens, Moonshot cached_tokens,
        DashScope created_cache_tokens; relays of Claude use Anthropic's own."""
        told, writer = self.raw_usage, self.writer
        details = as_dict(told.get("prompt_tokens_details"))
        prompt = positive_int(told, "prompt_tokens", "input_tokens")
        output = positive_int(told, "completion_tokens", "output_tokens")
        read = positive_int(details, "cached_tokens") or positive_int(
            told, "prompt_cache_hit_tokens", "cached_tokens", "cache_read_input_tokens"
        )
        made = positive_int(details, "cache_write_tokens", "created_cache_tokens")
        made = made or positive_int(told, "cache_creation_input_tokens")
        thought = positive_int(as_dict(told.get("completion_tokens_details")), "reasoning_tokens")
        if thought and positive_int(told, "total_tokens") == prompt + output + thought:
            output += thought  # xAI counts them apart
        prompt = prompt or writer.input_tokens
        output = output if told else (writer.written + 3) // 4
        rest = prompt - read - made
        return dict(
            zero_usage(rest if rest >= 0 else prompt),
            cache_creation_input_tokens=made,
            cache_read_input_tokens=read,
            output_tokens=output,
        )


FULL_WINDOW = "model_context_window_exceeded"  # a finish_reason of relays of Anthropic's models
PLAIN_FRAGMENT = frozenset(("index", "function"))


def cut_error(has_content):
    """The UpstreamError of a reply without an end."""
    return UpstreamError(
        (
            "The provider's reply was cut off before its end."
            if has_content
            else "The provider closed the connection without an answer."
        ),
        kind="cut",
        retry=True,
    )


def positive_int(values, *names):
    """The first of the named values that is a positive whole number, else 0."""
    found = (values.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 0)


def keep_detail(details, part):
    """Add a reasoning detail; pieces of one entry (same type and index) are joined, as they come
    split over deltas (https://openrouter.ai/docs/use-cases/reasoning-tokens)."""
    last = details[-1] if details else {}
    same = last.get("type") == part.get("type") and last.get("index") == part.get("index")
    if not details or not same or "data" in part:
        details.append(dict(part))
        return
    for key, value in part.items():
        if key in ("text", "summary") and isinstance(value, str) and isinstance(last.get(key), str):
            last[key] += value
        elif value is not None:
            last[key] = value


class MessagesReader:
    """Reads the events of a provider that speaks Anthropic itself: they go on as they came, under our
    indexes, with the model's name disguised and the input of tools fixed.

    Events, blocks and deltas of unknown kinds go on too (https://docs.anthropic.com/en/docs/build-with-claude/streaming):
    a newer client may know them.
    """

    def __init__(self, writer, profile):
        self.writer, self.profile = writer, profile
        self.raw_usage = {}  # the provider's usage, added up over its events
        self.last = {}  # its message_delta
        self.ended = False  # the reply is whole

    def feed(self, event):
        """Events for one event of the provider. Raises UpstreamError for its error event.

        Its own pings are not passed on: this program sends what the silence asks for.
        """
        if self.writer.state in ENDED:
            raise RuntimeError("feed after the end")
        kind = event.get("type")
        if kind == "error" or "error" in event:
            raise error_in_reply(event) or UpstreamError("The provider reported an error.")
        if kind == "message":  # a whole message in answer to a stream request
            for part in unfold(event):
                yield from self.feed(part)
        elif kind == "message_start":
            self.writer.head = as_dict(event.get("message"))
            self.raw_usage.update(as_dict(self.writer.head.get("usage")))
        elif kind == "message_delta":
            self.ended, self.last = True, event
            self.raw_usage.update(as_dict(event.get("usage")))
        elif kind == "message_stop":
            self.ended = True
        elif isinstance(kind, str) and re.match(r"\w+\Z", kind) and kind != "ping":
            yield from self.feed_block(kind, event)

    def feed_block(self, kind, event):
        """An event about a block; what belongs to no open block is dropped."""
        writer, block, delta = self.writer, event.get("content_block"), event.get("delta")
        if kind == "content_block_start" and isinstance(block, dict):
            yield from self.end_block()
            if block.get("type") == "tool_use":
                yield from self.begin_call(event.get("index"), block)
            else:
                writer.content = True
                yield from writer.open_block(dict(block, type=str(block.get("type") or "text")))
        elif kind == "content_block_stop":
            yield from self.end_block()
        elif kind == "content_block_delta" and writer.kind and isinstance(delta, dict):
            if writer.kind == "tool_use" and delta.get("type") == "input_json_delta":
                yield from self.feed_arguments(delta.get("partial_json"))
            else:
                same = event.get("index") == writer.index
                yield event if same else dict(event, index=writer.index)
        elif not kind.startswith("content_block"):
            yield from writer.start()
            yield event

    def begin_call(self, index, block):
        """Open a tool's block; a few servers put its whole input there."""
        call_id = block.get("id") if isinstance(block.get("id"), str) else ""
        call = self.writer.add_call(index, call_id, str(block.get("name") or "tool"), block)
        if block.get("input"):
            call.waiting.append(compact_json(block["input"]))
        yield from self.writer.advance()

    def feed_arguments(self, text):
        if isinstance(text, str):
            yield from self.writer.arguments(self.writer.calls[-1].stream.feed(text))

    def end_block(self):
        yield from self.writer.advance(ending=True)
        yield from self.writer.close_block()

    def idle(self):
        """A sign of life inside the provider's own block, as an empty delta where its kind has any."""
        row = BLOCKS.get(self.writer.kind)
        if not self.writer.kind:
            return self.writer.idle()
        return [delta_event(self.writer.index, self.writer.kind, "") if row and row.delta else PING]

    def done(self):
        """[DONE] means nothing in Anthropic's form."""

    def finish(self):
        """The last events. Raises UpstreamError when the reply is not whole."""
        if self.writer.state in ENDED:
            return
        if not self.ended:
            raise cut_error(True)
        delta = as_dict(self.last.get("delta"))
        reason = delta.get("stop_reason") or "end_turn"
        yield from self.writer.finish(reason, delta.get("stop_sequence"), self.usage(), self.last)

    def usage(self):
        """Anthropic's usage; the estimate where the provider tells no input."""
        usage = {name: positive_int(self.raw_usage, name) for name in zero_usage()}
        if not usage["input_tokens"] + usage["cache_read_input_tokens"]:
            usage["input_tokens"] = self.writer.input_tokens
        return usage


FORMATS = {
    row.name: row
    for row in (
        Format(
            "chat",
            path="/chat/completions",
            models_path="/models",
            count_path="",
            headers=chat_headers,
            write=write_chat,
            reader=ChatReader,
        ),
        Format(
            "anthropic",
            path="/v1/messages",
            models_path="/v1/models",
            count_path="/v1/messages/count_tokens",
            headers=anthropic_headers,
            write=write_anthropic,
            reader=MessagesReader,
            relays=True,
        ),
    )
}


# ---- events out, fold and unfold -----------------------------------------------------------------------

_escape = json.dumps
DELTA_TEMPLATES = {
    # delta type: (its field, the event as sent); the hot path writes from this, with one escape
    row.delta: (
        row.piece,
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":%%d,'
        '"delta":{"type":"%s","%s":%%s}}\n\n' % (row.delta, row.piece),
    )
    for row in BLOCKS.values()
    if row.delta
}


def encode_event(event):
    """An event dict as SSE text, ASCII only; the only place that writes "event: "."""
    if event["type"] == "content_block_delta":
        try:
            field, template = DELTA_TEMPLATES[event["delta"]["type"]]
            if len(event["delta"]) == 2:
                return template % (event["index"], _escape(event["delta"][field]))
        except (KeyError, TypeError):
            """Another kind (a signature), or odd: a provider's own events go on as they are."""
    return "event: %s\ndata: %s\n\n" % (event["type"], compact_json(event))


def fold(events):
    """The finished message that events tell: the unstreamed answer. Raises UpstreamError for an
    error event. fold(unfold(message)) is the message again."""
    message, blocks, pieces = {}, {}, {}
    for event in events:
        kind, index = event["type"], event.get("index")
        if kind == "message_start":
            message = dict(event["message"], usage=dict(as_dict(event["message"].get("usage"))))
        elif kind == "content_block_start":
            blocks[index], pieces[index] = dict(event["content_block"]), {}
        elif kind == "content_block_delta":
            add_delta(blocks[index], event["delta"], pieces[index])
        elif kind == "message_delta":
            message.update(event["delta"])
            message["usage"].update(event["usage"])
        elif kind == "error":
            error = event["error"]
            status = 529 if error["type"] == "overloaded_error" else 502
            raise UpstreamError(error["message"], status, error["type"])
    message["content"] = [finish_block(blocks[index], pieces[index]) for index in sorted(blocks)]
    return message


def add_delta(block, delta, pieces):
    """Put one delta into a block; strings go to pieces, {field: [str]}, to be joined once. That a
    kind of block or delta is not known makes no difference."""
    for field, value in delta.items():
        if field == "citation":
            block.setdefault("citations", []).append(value)
        elif field == "signature" or not isinstance(value, str):
            block[field] = value
        elif field != "type":
            pieces.setdefault(field, []).append(value)


def finish_block(block, pieces):
    """A block with its pieces joined; tool input that is not a JSON object is told in the client's
    own form for that."""
    for field, parts in pieces.items():
        whole = "".join(parts)
        if field != "partial_json":
            block[field] = str(block.get(field) or "") + whole
        elif whole:
            parsed = json_or_none(whole)
            unparsed = {"__unparsedToolInput": {"raw": whole, "len": len(whole)}}
            block["input"] = parsed if isinstance(parsed, dict) else unparsed
    return block


def unfold(message, new_id=None):
    """The events that make up a finished message; new_id() gives tool calls fresh ids (those of a
    stored answer must not come twice in a conversation)."""
    started = dict(message, content=[], stop_reason=None, stop_sequence=None)
    yield {"type": "message_start", "message": started}
    blocks = [block for block in as_list(message.get("content")) if isinstance(block, dict)]
    for index, block in enumerate(blocks):
        kind = str(block.get("type"))
        if new_id and kind == "tool_use":
            block = dict(block, id="toolu_" + new_id())
        row = BLOCKS.get(kind)
        if not row or not row.delta:
            yield start_event(index, block)
        else:
            yield start_event(index, dict(block, **row.empty))
            value = block.get(row.field)
            if row.piece == "partial_json":
                value = compact_json(value or {})
            if value:
                yield delta_event(index, kind, value)
            if block.get("signature"):
                yield signature_event(index, block["signature"])
        yield stop_event(index)
    ends = {name: message.get(name) for name in ("stop_reason", "stop_sequence")}
    yield {"type": "message_delta", "delta": ends, "usage": dict(as_dict(message.get("usage")))}
    yield {"type": "message_stop"}


# ======================================================================================================
# 9  Refusals: a provider's error -> a lesson (changes of its profile)
# ======================================================================================================

FIELD_PATTERNS = (
    # Field names in "no such field" errors, as the providers word them.
    r"Unrecognized request arguments? supplied: ([\w, ]+)",  # OpenAI, Azure
    r"property '(?:body\.)?([\w.]+)' is unsupported",  # Groq, Cerebras
    r'Unknown name \\*"(\w+)\\*"',  # Gemini
    r"Unsupported parameter\(s\): ([\w, `']+)",  # NVIDIA NIM
    r"""["']?loc["']?:\s*[\[(]\s*["']body["'],\s*["'](\w+)""",  # FastAPI: Mistral, NIM
    r"Extra inputs are not permitted, field: '(\w+)'",  # Fireworks
    r"Unsupported (?:parameter|value): '([\w.\[\]]+)'",  # OpenAI's reasoning models
    r"Argument not supported on this model: (\w+)",  # xAI
    r"does not support (?:the )?parameters?:? \[?['`\"]?(\w+)",  # xAI, Copilot
    r"Unexpected fields in the request: \{([^}]+)\}",
    r"invalid (temperature|top_p): only",  # Kimi
    r"(?:unknown|unexpected|unrecognized|unsupported|invalid) "
    r"(?:field|parameter|argument|keyword argument|property):? ['`\"]?([\w.]+)",
    r"(\w+): Extra inputs are not permitted",
)
SCHEMA_WORDS = (
    "pattern format const additionalProperties exclusiveMinimum exclusiveMaximum default"
    " propertyNames patternProperties anyOf oneOf allOf minLength maxLength minItems maxItems not"
    " examples title"
).split()
REFUSED = (
    r"(?i)unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed"
    r"|extra|forbidden|invalid|unavailable"
)
ESSENTIAL = ("model", "messages", "tools", "stream")  # a request without them is another request
THINKING_FIELDS = (
    "reasoning_effort",
    "thinking",
    "enable_thinking",
    "reasoning",
    "chat_template_kwargs",
)


def learn(error, profile, body, sent):
    """What an UpstreamError teaches about its provider: {profile field: value}; {} for nothing new.

    Providers refuse a request for one field of many, in words of their own, and a newer client or
    model brings new fields. So nobody keeps lists: the first refusal is read, the profile changed,
    the request written anew, and what was learned holds for that base URL and model.

    body: the normalized request; sent: the same as the format wrote it, whose field names the
    provider's words use. Each rule reads the words and gives the changes that it is sure of.
    """
    if error.kind not in ("request", "size", "sampling", "policy") or not error.text:
        return {}
    for rule in LESSON_RULES:
        changes = rule(error.text, profile, body, sent)
        changes = {key: value for key, value in changes.items() if getattr(profile, key) != value}
        if changes:
            return changes
    return {}


def named_fields(text):
    """Names of request fields that an error complains of, in snake case (Gemini's are in camel)."""
    found = []
    for pattern in FIELD_PATTERNS:
        for match in re.findall(pattern, text, re.I):
            found += re.findall(r"[\w.]+", match)
    return list(dict.fromkeys(name if name.isupper() else snake_case(name) for name in found))


def snake_case(name):
    """maxTokens as max_tokens."""
    return re.sub(r"(?<=[a-z])([A-Z])", lambda found: "_" + found.group(1).lower(), name)


TELLING_WORDS = (
    # Words that mean one thing wherever they stand: (pattern, changes of the profile).
    (r"messages\.\d+\.role|Unexpected role .?system", {"untouched": False}),  # older Claude models
    (r"tools with reasoning_effort are not supported", {"effort_with_tools": "none"}),  # gpt-5.4
    (r"thought_signature", {"reasoning_field": "google", "placeholder": GEMINI_SKIP}),
    (r"Unexpected role 'user' after role 'tool'", {"user_after_tool": False}),  # Mistral
    (r"must be a-z, A-Z, 0-9, with a length of 9", {"tool_ids": "nine"}),  # Mistral
    (r"system.{0,30}role.{0,30}(?:not supported|not enabled|unsupported)", {"system_role": False}),
    (r"role: system|Developer instruction is not enabled", {"system_role": False}),  # Gemma
)


def learn_words(text, profile, body, sent):
    """What TELLING_WORDS say that the profile does not know yet."""
    for pattern, changes in TELLING_WORDS:
        if re.search(pattern, text, re.I) and apply_lesson(profile, changes) != profile:
            return changes
    return {}


def learn_native(text, profile, body, sent):
    """What providers that speak Anthropic refuse: newer beta flags, and cache_control.

    Bedrock and its relays: "Unexpected value(s) `x`, `y` for the `anthropic-beta` header."
    """
    found = re.search(r"value\(s\) (.+?) for the .?anthropic-beta", text)
    if found:
        return {"betas": tuple(profile.betas) + tuple(re.findall(r"[\w-]+", found.group(1)))}
    if "cache_control" in text and '"cache_control"' in compact_json(sent):
        return {"never": tuple(profile.never) + ("cache_control",)}
    return {}


def learn_thinking(text, profile, body, sent):
    """Thinking that must be off, or effort words that the model lacks.

    DashScope: "parameter.enable_thinking must be set to false for non-streaming calls"; where it
    already streams, the model cannot think. DeepSeek: thinking "cannot be disabled when
    reasoning_effort" is there. Else a field that asks for thinking is named and called wrong.
    """
    if "enable_thinking must be set to false" in text:
        if not sent.get("stream"):
            return {"always_stream": True}
        return {"body": tuple(profile.body) + (("enable_thinking", False),)}
    if "cannot be disabled when reasoning_effort" in text:
        return {"never": tuple(profile.never) + ("reasoning_effort",)}
    asked = [field for field in THINKING_FIELDS if field in sent]
    named = any(re.search(r"\b%s\b" % field, text) for field in asked)
    named = named or re.search(
        r"not support (?:thinking|reasoning)|(?:thinking|reasoning) is not", text, re.I
    )
    if asked and named and re.search(REFUSED, text):
        return {"reasoning": "", "effort_with_tools": ""}
    return {}


def learn_reasoning(text, profile, body, sent):
    """Reasoning that must come back with the history.

    DeepSeek, MiMo: "The reasoning_content in the thinking mode must be passed back to the API." Asked
    for once, it goes back beside calls; asked for again, in every turn.
    """
    missing = r"reasoning_content.{0,80}(?:passed back|missing)|missing.{0,20}reasoning_content"
    if not re.search(missing, text, re.I):
        return {}
    known = profile.reasoning_field == "reasoning_content" and profile.placeholder
    return {
        "reasoning_field": "reasoning_content",
        "placeholder": NOT_KEPT,
        "reasoning_always": bool(known) or profile.reasoning_always,
    }


def learn_choice(text, profile, body, sent):
    """A forced tool choice that the provider refuses becomes auto: thinking models take no other
    (Qwen, Kimi), and vLLM without a parser takes none."""
    choice = sent.get("tool_choice")
    if not choice or "tool_choice" not in text and "tool choice" not in text.lower():
        return {}
    is_none = choice in ("none", {"type": "none"})
    forms = (form for form in profile.tool_choice if form == "none" and not is_none)
    return {"tool_choice": tuple(forms)}


def learn_max_tools(text, profile, body, sent):
    """How many tools there may be. OpenAI: "Invalid 'tools': array too long. Expected an array with
    maximum length 128"."""
    limit = r"maximum (?:number of items is|length) (\d+)"
    found = re.search(limit, text) if "tools" in text else None
    too_many = found and len(sent.get("tools", ())) > int(found.group(1))
    return {"max_tools": int(found.group(1))} if too_many else {}


def learn_format(text, profile, body, sent):
    """A response_format that the provider lacks: the weaker form (any JSON object), then words."""
    words = r"response_format|json_schema|json_object|structured output"
    if "response_format" not in sent or not re.search(words, text, re.I):
        return {}
    return {"json_format": "json_object" if profile.json_format == "json_schema" else ""}


def learn_images(text, profile, body, sent):
    """A model that takes no images: they become notes, or go to TARGET_MODEL_IMAGE. Only where the
    request holds one, as the words for it are many."""
    refused = (
        r"not support|only supports? text|not a multimodal|unknown variant|unsupported|text.only"
        r"|cannot|no endpoints found"
    )
    about = re.search(r"image|vision|multi-?modal|only supports? text", text, re.I)
    telling = about and re.search(refused, text, re.I)
    return {"images": False} if telling and has_images(body) else {}


def learn_files(text, profile, body, sent):
    """A model that takes no PDF files: they become notes."""
    kinds = {str(block.get("type")) for _, block in walk_blocks(body["messages"])}
    telling = re.search(r"\bfile|pdf|document|unknown variant|content type", text, re.I)
    return {"files": False} if telling and "document" in kinds else {}


def learn_output_limit(text, profile, body, sent):
    """The output limit that an error names. Claude Code asks for 32,000 to 128,000 tokens, and few
    models give that many."""
    limit = output_limit(text)
    return {"max_output": limit} if 0 < limit < positive_int(sent, profile.max_tokens) else {}


def learn_fields(text, profile, body, sent):
    """A field that the provider does not know is renamed, or not sent any more.

    OpenAI's reasoning models call the output limit max_completion_tokens, everyone else max_tokens.
    The disguise's two fields are the most likely to be refused; and what stands inside messages or
    schemas is told from the request's own fields by not being one of them.
    """
    changes, never = {}, list(profile.never)
    for name in named_fields(text):
        last = name.rsplit(".", 1)[-1]
        if name.startswith("ANTHROPIC_"):
            changes["strict"] = True
        elif last in ("max_tokens", "max_completion_tokens") and last in sent:
            longer = "max_completion_tokens"
            changes["max_tokens"] = longer if last == "max_tokens" else "max_tokens"
        elif last in REASONING_FIELDS and last not in sent:
            changes["reasoning_field"] = ""
        elif last in SCHEMA_WORDS and last not in sent and last not in profile.schema:
            changes["schema"] = tuple(profile.schema) + (last,)
        elif last in sent and last not in ESSENTIAL:
            never.append(last)
    return dict(changes, never=tuple(never)) if len(never) > len(profile.never) else changes


def learn_schema(text, profile, body, sent):
    """A JSON schema keyword in a tool that the provider cannot read: the schema goes without it, and
    arguments are checked by the client anyway. Servers that compile a grammar (llama.cpp, xgrammar)
    stumble over `pattern`, and say so in words about regular expressions."""
    about = r"schema|function|tools?\b|parameters|regex|grammar"
    if not sent.get("tools") or not re.search(about, text, re.I):
        return {}
    if re.search(r"regex|look-?(?:ahead|behind|around)", text, re.I):
        found = ["pattern"]
    else:
        found = re.findall(r"['\"`\[]\$?(%s)['\"`\]]" % "|".join(SCHEMA_WORDS), text)
    new = tuple(word for word in dict.fromkeys(found) if word not in profile.schema)
    return {"schema": tuple(profile.schema) + new} if new else {}


def learn_any_field(text, profile, body, sent):
    """Last resort: a field of ours that the text names in quotes and calls wrong in some way."""
    if not re.search(REFUSED, text):
        return {}
    fields = [
        field
        for field in sent
        if field not in ESSENTIAL + (profile.max_tokens,)
        and re.search(r"['\"`(\[]%s\b" % re.escape(field), text)
    ]
    return {"never": tuple(profile.never) + tuple(fields)} if fields else {}


LESSON_RULES = (
    # The first that has something to say is taken: from the surest to the vaguest.
    learn_native,
    learn_words,
    learn_thinking,
    learn_reasoning,
    learn_choice,
    learn_max_tools,
    learn_format,
    learn_images,
    learn_files,
    learn_output_limit,
    learn_fields,
    learn_schema,
    learn_any_field,
)


def room_after(error, profile, size):
    """({profile field: value}, output tokens to ask for) after "prompt and output together do not
    fit"; ({}, 0) when the prompt alone is too long. size: bytes of the client's request.

    Some servers (vLLM) stop counting the prompt where it fails to fit; what they tell is then the
    least that it can be.
    """
    prompt, output, limit = error.numbers
    if error.kind != "overflow" or not (output and limit) or prompt + 1024 >= limit:
        return {}, 0
    lazy = prompt + output == limit + 1
    room = max(1024, limit - max(prompt + 64, size // 4 if lazy else 0))
    density = max(profile.density, min(16.0, (prompt + 64) / max(size, 1)))
    return {"context": limit, "density": round(density, 3)}, room


LESSON_WORDS = {
    # profile field: its lesson as a sentence, for the log and the status page
    "never": "not sent: %s",
    "schema": "left out of tool schemas: %s",
    "strict": "unknown fields are refused; the disguise is not attached",
    "untouched": "takes no system turns",
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


def lesson_text(field, value):
    """A lesson as a sentence."""
    sentence = LESSON_WORDS.get(field, field + " is now %s")
    shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return sentence % (shown,) if "%s" in sentence else sentence


def apply_lesson(profile, changes):
    """A profile with lessons applied. changes may come from JSON: lists become tuples, unknown fields
    (of another version) are ignored."""

    def freeze(value):
        return tuple(map(freeze, value)) if isinstance(value, (list, tuple)) else value

    known = {key: freeze(value) for key, value in as_dict(changes).items() if hasattr(profile, key)}
    return profile._replace(**known)


# ======================================================================================================
# 10  Upstream: connections to the provider, kept alive
# ======================================================================================================

READ_SIZE = 16384  # one TLS record; every waiting thread holds one
SEND_SIZE = 1 << 18
MAX_HEAD = 1 << 16
MAX_FIELDS = 200
MAX_BODY = 1 << 26  # of a reply that is read whole
BLOCK_SIZE = 1 << 16  # of decompressed output: a bomb costs time, not memory
KEPT_WIRES = 128  # idle connections to one place
DRAIN_SECONDS = 0.05  # how long finish() waits for the end of a body
ROUTE_SECONDS = 60  # how long a look-up of the system's proxy settings holds
MAX_REDIRECTS = 3

PORTS = {"http": 80, "https": 443}
INFLATERS = {"gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
NOTHING_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
HEAD_END = re.compile(rb"\r?\n\r?\n")
INTERIM = re.compile(
    rb"HTTP/1\.[01] 1(?!01)\d\d[ \r\n]"
)  # 100 Continue, 103 Early Hints: the answer is still to come
HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
STATUS_LINE = re.compile(rb"HTTP/1\.(\d) +([1-9]\d\d)((?: .*)?)")
LOCAL_HOSTS = re.compile(r"(?:.*\.)?localhost|127(?:\.\d+){3}|0\.0\.0\.0|::1|::")

Route = collections.namedtuple("Route", "scheme host port proxy proxy_auth")
Route.__doc__ = """The way to an origin. proxy: (host, port) or None; proxy_auth: a Proxy-Authorization value, secret, or ""."""


def host_port(host, port):
    return ("[%s]:%d" if ":" in host else "%s:%d") % (host, port)


def url_origin(url):
    """(scheme, host, port) of an http(s) URL; ValueError for anything else."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise ValueError(url)
    return parts.scheme, parts.hostname, parts.port or PORTS[parts.scheme]


def basic_auth(parts):
    pair = "%s:%s" % (
        urllib.parse.unquote(parts.username or ""),
        urllib.parse.unquote(parts.password or ""),
    )
    return "Basic " + base64.b64encode(pair.encode("utf-8")).decode("ascii")


def route_to(scheme, host, port):
    """The Route to an origin by HTTP(S)_PROXY, ALL_PROXY and NO_PROXY, or the settings of macOS and Windows."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    if (
        not proxy
        or LOCAL_HOSTS.fullmatch(host)
        or urllib.request.proxy_bypass(host_port(host, port))
    ):
        return Route(scheme, host, port, None, "")
    try:
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else "http://" + proxy)
        address = parts.hostname, parts.port or PORTS.get(parts.scheme)
    except ValueError:
        raise UpstreamError(
            "the proxy setting for %s has no valid host and port: correct %s_PROXY"
            % (host, scheme.upper()),
            kind="connect",
        )
    # As in urllib, the way to an https:// proxy is plain too: nearly all that are written so are plain ones.
    if parts.scheme not in PORTS or not parts.hostname:
        raise UpstreamError(
            "%s:// proxies are not supported: set %s_PROXY to an http:// proxy, or name %s in NO_PROXY"
            % (parts.scheme, scheme.upper(), host),
            kind="connect",
        )
    return Route(scheme, host, port, address, basic_auth(parts) if parts.username else "")


def poll_socket(sock, seconds, read=True, write=False):
    """Waits until `sock` can be read (or written, as asked). True: it can; False: the seconds are over. None sleeps."""
    if sock is None:
        time.sleep(seconds)
        return True
    if not hasattr(select, "poll"):  # Windows
        return any(select.select([sock] if read else [], [sock] if write else [], [], seconds))
    poll = select.poll()
    poll.register(sock, (select.POLLIN if read else 0) | (select.POLLOUT if write else 0))
    return bool(poll.poll(seconds * 1000))


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


class Head:
    """The head of an answer. chunked, length: how the body is framed (length None: until the connection ends, unless it is
    chunked); last: the upstream closes the connection after it. ValueError for what is no head."""

    __slots__ = ("status", "reason", "headers", "chunked", "length", "last")

    def __init__(self, head, method):
        lines = head.replace(b"\r\n", b"\n").split(b"\n")
        status = STATUS_LINE.fullmatch(lines[0])
        if not status or len(lines) > MAX_FIELDS:
            raise ValueError("no HTTP head")
        self.status, self.reason = int(status.group(2)), status.group(3).decode("latin-1").strip()
        self.headers = Headers(lines[1:-2])
        options = self.headers.tokens("connection")
        self.last = "close" in options or status.group(1) == b"0" and "keep-alive" not in options
        self.chunked, self.length = False, 0
        if method == "HEAD" or self.status < 200 or self.status in (204, 304):
            return
        self.chunked, self.length = "chunked" in self.headers.tokens("transfer-encoding"), None
        length = self.headers.get("content-length", "")
        if not self.chunked and re.fullmatch("[0-9]{1,18}", length):
            self.length = int(length)


def ascii_host(name):
    """A host with its port as it is written in HTTP."""
    try:
        return name.encode("idna").decode("ascii")
    except UnicodeError:  # connecting will say what is wrong with it
        return name.encode("ascii", "replace").decode("ascii")


def request_bytes(route, method, url, headers, body):
    """Head and body of a request as they go out; UpstreamError if a setting got something into them that HTTP forbids."""
    parts = urllib.parse.urlsplit(url)
    target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
    names = {name.lower() for name in headers}
    fields = [("Host", ascii_host(parts.netloc.rpartition("@")[2]))] if "host" not in names else []
    fields += [("Accept-Encoding", "identity")] if "accept-encoding" not in names else []
    if body is not None:
        fields.append(("Content-Length", str(len(body))))
    if parts.username and "authorization" not in names:
        fields.append(("Authorization", basic_auth(parts)))
    if route.proxy and route.scheme == "http":
        target = "http://" + host_port(route.host, route.port) + target
        if route.proxy_auth:
            fields.append(("Proxy-Authorization", route.proxy_auth))
    fields += [
        (name, value)
        for name, value in headers.items()
        if name.lower() not in ("content-length", "transfer-encoding")
    ]
    for name, value in fields:
        if not HEADER_VALUE.fullmatch(value):
            raise UpstreamError(
                "the header %s to the provider has a line break or another character in its value that HTTP "
                "forbids: check the setting (an API key?) it comes from" % ascii(name),
                500,
                kind="request",
            )
    if not re.fullmatch("[!-~]+", target) or not all(
        FIELD_NAME.fullmatch(name) for name, _ in fields
    ):
        raise UpstreamError(
            "the base URL or a header name has a blank or another character that HTTP forbids: check the "
            "settings",
            500,
            kind="request",
        )
    lines = ["%s %s HTTP/1.1" % (method, target)] + ["%s: %s" % field for field in fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (body or b"")


class Wire:
    """One connection. The socket never blocks; all waiting goes through `wait(sock, seconds)`, which may raise ClientGone.

    rest: bytes that came and are not used yet. heard: a byte of the current answer has come. since: idle from then on.
    Whoever gets an exception from a method must drop the wire.
    """

    __slots__ = ("sock", "route", "peer", "wait", "timeout", "rest", "heard", "since", "buffer")

    def __init__(self, sock, route, peer):
        self.sock, self.route, self.peer = sock, route, peer
        self.buffer = bytearray(
            READ_SIZE
        )  # recv() would take as much anew for each chunk, and leave holes in memory
        self.begin(poll_socket, 0)

    def begin(self, wait, timeout):
        """Starts an exchange, in which every silence may last `timeout` seconds."""
        self.wait, self.timeout, self.rest, self.heard = wait, timeout, b"", False

    def ready(self, wait, seconds):
        """`wait` on the socket, unless TLS has already taken from it what we are waiting for."""
        return (
            self.route.scheme == "https"
            and getattr(self.sock, "pending", int)() > 0
            or wait(self.sock, seconds)
        )

    def now(self):
        """What has arrived: bytes, b"" at the end of the connection, None if nothing (or only a TLS session ticket)."""
        try:
            size = self.sock.recv_into(self.buffer)
            return bytes(memoryview(self.buffer)[:size])
        except NOTHING_YET:
            return None
        except OSError as error:
            raise self.cut(error.strerror or "read error")

    def receive(self, seconds=None):
        """The next bytes, b"" at the end of the connection; waits at most `timeout` for them."""
        while True:
            if not self.ready(self.wait, self.timeout if seconds is None else max(seconds, 0)):
                raise UpstreamError(
                    "%s has been silent for %g s: it is overloaded or stuck; try again, or raise the timeout"
                    % (self.peer, self.timeout),
                    504,
                    "timeout_error",
                    kind="timeout",
                )
            data = self.now()
            if data is not None:
                return data

    def send(self, data):
        """Sends `data`; False if the upstream closed or answered before it had all (the answer is then in `rest`, or comes)."""
        view, moved = memoryview(data), time.monotonic()
        while view:
            try:
                view = view[self.sock.send(view[:SEND_SIZE]) :]
                moved = time.monotonic()
                continue
            except NOTHING_YET:
                pass
            except OSError:  # it may have answered before it hung up: head() sees
                return False
            if self.wait(self.sock, 0):
                early = self.now()
                self.rest += early or b""
                self.heard = bool(self.rest)
                if early is not None and not INTERIM.match(self.rest):
                    return False
            if time.monotonic() - moved > self.timeout:
                raise UpstreamError(
                    "%s took no byte of the request for %g s: it is overloaded or stuck; try again"
                    % (self.peer, self.timeout),
                    504,
                    "timeout_error",
                    kind="timeout",
                )
            poll_socket(self.sock, 0.2, read=not self.rest, write=True)
        return True

    def head(self, method):
        """The head of the answer as an HTTPResponse that was never near the socket; the whole head within `timeout`."""
        deadline = time.monotonic() + self.timeout
        while True:
            found = HEAD_END.search(self.rest)
            if found:
                head, self.rest = self.rest[: found.end()], self.rest[found.end() :]
                if not INTERIM.match(head):
                    return self.parsed(head, method)
                continue
            if len(self.rest) > MAX_HEAD or not b"HTTP/".startswith(self.rest[:5]):
                raise self.garbage(self.rest)
            data = self.receive(deadline - time.monotonic())
            if not data:
                raise self.cut("closed by it")
            self.heard = True
            self.rest += data

    def parsed(self, head, method):
        try:
            return Head(head, method)
        except ValueError:
            raise self.garbage(head)

    def garbage(self, data):
        if data[:1] == b"\x15":  # a TLS alert
            advice = "it expects TLS; write https:// in the base URL"
        else:
            advice = "check host and port of the base URL"
        return UpstreamError(
            "%s does not answer with proper HTTP (its %d bytes begin with %s): %s"
            % (self.peer, len(data), ascii(data[:40])[1:], advice),
            kind="cut",
        )

    def cut(self, seen):
        when = "in the middle of its answer" if self.heard else "before it answered"
        return UpstreamError(
            "the connection to %s ended %s (%s): a fault there or in the network; try again"
            % (self.peer, when, seen),
            kind="cut",
            retry=True,
        )

    def close(self):
        try:
            self.sock.close()
        except OSError:
            pass


class Dechunker:
    """Undoes chunked framing. `left` bytes of a chunk are to come; `tail` is the unfinished line between two chunks.

    done: the end was seen; rest: what came after it. A size line is taken with the line break before it, which ends the
    chunk before; that is why it all begins with one.
    """

    SIZE_LINE = re.compile(rb"\r?\n([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")
    PART_OF_IT = re.compile(rb"(?:\r?\n?|\r?\n[0-9A-Fa-f]{1,15}[ \t]*(?:;[^\r\n]*)?\r?)\Z")
    TRAILERS = re.compile(rb"(?:[^\r\n][^\n]*\n)*\r?\n")
    MAX_TAIL = 16384

    def __init__(self):
        self.left, self.tail, self.done, self.rest = 0, b"\r\n", False, b""
        self.sizes = {}  # of size lines seen: chunks of a model are alike, and this halves the time

    def feed(self, data):
        """The payload in `data`, however many chunks it spans, as one piece. ValueError if it is not chunked framing."""
        if self.left >= len(data):
            self.left -= len(data)
            return data
        data = self.tail + data  # one of `tail` and `left` is always empty
        at, end, find, known = self.left, len(data), data.find, self.sizes.get
        pieces = [data[:at]]
        while at < end:
            start = find(b"\n", at + 2) + 1
            if not start and data[at:] == b"\r\n":  # nearly always, when chunks come one by one
                self.left, self.tail = 0, b"\r\n"
                return b"".join(pieces)
            size = known(data[at:start]) or self.size(data, at, start)
            if not size:
                self.stop(data, at)
                return b"".join(pieces)
            at = start + size
            pieces.append(data[start:at])
        self.left, self.tail = at - end, b""
        return b"".join(pieces)

    def size(self, data, at, start):
        line = self.SIZE_LINE.match(data, at, start)
        size = int(line.group(1), 16) if line else 0
        if start - at < 8:  # no more than 4,096 of them
            self.sizes[data[at:start]] = size
        return size

    def stop(self, data, at):
        """Takes what is not the size line of a chunk with payload: the last line and its trailers, or the part of a line."""
        line = self.SIZE_LINE.match(data, at)
        end = line and self.TRAILERS.match(data, line.end())
        self.left, self.tail = 0, data[at:]
        if end:
            self.done, self.tail, self.rest = True, b"", data[end.end() :]
        elif not (line or self.PART_OF_IT.match(self.tail)) or len(self.tail) > self.MAX_TAIL:
            raise ValueError("a chunk of the body has no valid size")


class Counter:
    """A body of `left` bytes, or, if that is None, of all until the connection ends."""

    def __init__(self, length):
        self.left, self.done, self.rest = length, length == 0, b""

    def feed(self, data):
        if self.left is None:
            return data
        block, self.rest = data[: self.left], data[self.left :]
        self.left -= len(block)
        self.done = not self.left
        return block


def inflate(pieces, wbits):
    """The decompressed `pieces`, at most BLOCK_SIZE bytes at a time. zlib.error: damaged; ValueError: cut off."""
    inflater, started = zlib.decompressobj(wbits), False
    for piece in pieces:
        if not piece:
            yield b""
            continue
        if not started and wbits == zlib.MAX_WBITS and piece[0] & 15 != 8:
            inflater = zlib.decompressobj(
                -wbits
            )  # "deflate" without the zlib header that RFC 9110 wants
        started, block = True, None
        while piece or block is None or len(block) == BLOCK_SIZE:
            block = inflater.decompress(piece, BLOCK_SIZE)
            if block:
                yield block
            piece = inflater.unconsumed_tail
    if started and not inflater.eof:
        raise ValueError("the compressed body is cut off")


class Reply:
    """An answer whose head has come: status, headers (Headers) and the body, to be read once. While it is not `patient`, blocks()
    gives b"" instead of waiting.

    Whoever opened it calls close(), in `finally`; finish() before that if the rest of the body is not wanted but short.
    """

    def __init__(self, upstream, wire, response, keep):
        self.status, self.headers, self.patient = response.status, response.headers, True
        self.upstream, self.wire, self.keep = upstream, wire, keep and not response.last
        self.framing = Dechunker() if response.chunked else Counter(response.length)

    def blocks(self):
        """Generates the body's bytes as they arrive, whatever one read brought. UpstreamError (timeout, cut, body), ClientGone."""
        coding = self.headers.get("Content-Encoding", "").strip().lower()
        try:
            if coding in ("", "identity"):
                yield from self.payload()
            elif coding in INFLATERS:
                yield from inflate(self.payload(), INFLATERS[coding])
            else:
                raise UpstreamError(
                    "%s compresses its answer with %s although it was asked not to: only gzip and deflate "
                    "can be read" % (self.wire.peer, ascii(coding)),
                    kind="body",
                )
        except (
            GeneratorExit
        ):  # the consumer has enough: finish() or close() will say what becomes of the connection
            raise
        except (zlib.error, ValueError) as error:
            peer = self.wire.peer
            self.drop()
            raise UpstreamError(
                "the answer of %s is damaged (%s): a fault there or in a proxy between; try again"
                % (peer, error),
                kind="cut",
                retry=True,
            )
        except BaseException:
            self.drop()
            raise

    def payload(self):
        wire, framing = self.wire, self.framing
        data, wire.rest = wire.rest, b""
        while True:
            block = framing.feed(data)
            if block:
                yield block
            if framing.done or self.wire is None:
                return
            data = wire.receive() if self.patient else wire.now()
            if data is None:
                yield b""
                data = b""
            elif not data:
                if framing.left is not None:
                    raise wire.cut("closed by it")
                framing.done, self.keep = True, False

    def read(self, limit=MAX_BODY):
        """The whole body. UpstreamError as in blocks(), and if it has more than `limit` bytes."""
        blocks, size = [], 0
        for block in self.blocks():
            blocks.append(block)
            size += len(block)
            if size > limit:
                peer = self.wire.peer
                self.drop()
                raise UpstreamError(
                    "the answer of %s is longer than %d bytes: that is not a chat completion; check the base URL"
                    % (peer, limit),
                    kind="body",
                )
        return b"".join(blocks)

    def finish(self):
        """close(), but first throws away the end of the body if it is there or comes at once: that saves the connection."""
        wire, deadline = self.wire, time.monotonic() + DRAIN_SECONDS
        try:
            while wire and self.keep and not self.framing.done and time.monotonic() < deadline:
                data, wire.rest = wire.rest, b""
                if not data and wire.ready(poll_socket, max(deadline - time.monotonic(), 0)):
                    data = wire.now()
                    self.keep = data != b""
                self.framing.feed(data or b"")
        except (UpstreamError, ValueError):
            self.keep = False
        self.close()

    def close(self):
        """Keeps the connection for the next request if nothing of this answer is left on it, else ends it."""
        wire = self.wire
        if wire and self.keep and self.framing.done and not self.framing.rest and not wire.rest:
            self.wire = None
            self.upstream.keep(wire)
        else:
            self.drop()

    def drop(self):
        wire, self.wire = self.wire, None
        if wire:
            self.upstream.drop(wire)


def redirect_target(method, url, reply):
    """The URL that a redirect leads to, "" if it is none to follow.

    Only on the same host, and there only to the same port or from http to https: the key must not go anywhere else.
    """
    if reply.status not in (307, 308) and not (reply.status in (301, 302) and method == "GET"):
        return ""
    target = urllib.parse.urljoin(url, reply.headers.get("Location", "")).partition("#")[0]
    try:
        old, new = url_origin(url), url_origin(target)
    except ValueError:
        return ""
    upgrade = old[1] == new[1] and (old[0], new[0]) == ("http", "https")
    return target if old == new or upgrade else ""


def connect_error(route, error):
    """Why no connection came about, as an UpstreamError."""
    peer = host_port(*(route.proxy or (route.host, route.port)))
    seen = (
        getattr(error, "verify_message", "")
        or getattr(error, "strerror", "")
        or str(error)
        or type(error).__name__
    )
    if isinstance(error, ssl.CertificateError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        said = (
            "%s shows a certificate that is not trusted here (%s): if a company proxy or a private CA signed it, name the "
            "CA's file in SSL_CERT_FILE or --ca-bundle (NODE_EXTRA_CA_CERTS is for Node only)"
            % (host_port(route.host, route.port), seen)
        )
        return UpstreamError(said, kind="connect")
    if isinstance(error, ssl.SSLError):
        said = (
            "no TLS with %s (%s): if it is a plain HTTP server, write http:// in the base URL"
            % (host_port(route.host, route.port), seen)
        )
    elif route.proxy:
        said = (
            "the proxy %s cannot be reached (%s): check HTTPS_PROXY and HTTP_PROXY, or name %s in NO_PROXY"
            % (peer, seen, route.host)
        )
    elif isinstance(error, (socket.gaierror, UnicodeError)):
        said = (
            "the host name of %s cannot be resolved (%s): check the base URL, the network and any proxy"
            % (peer, seen)
        )
    else:
        said = (
            "%s cannot be reached (%s): check that the server runs and that the base URL is right"
            % (peer, seen)
        )
    return UpstreamError(said, kind="connect", retry=True)


def proxy_refusal(route, status, reason):
    """The proxy's answer to CONNECT as an UpstreamError."""
    proxy = host_port(*route.proxy)
    if status == 407:
        said = (
            "the proxy %s wants a name and password (407): %s_PROXY needs user:password@ before its host"
            % (proxy, route.scheme.upper())
        )
    else:
        said = (
            "the proxy %s does not connect to %s (%d %s): ask who runs it, or name the host in NO_PROXY"
            % (proxy, host_port(route.host, route.port), status, ascii(reason)[1:-1])
        )
    return UpstreamError(said, kind="connect", retry=status >= 500)


class Upstream:
    """Connections to providers, kept and shared by all threads.

    ca_bundle: PEM file or folder, trusted besides the system's; client_cert: "cert.pem" or "cert.pem,key.pem"; idle: seconds
    for which an unused connection is kept. The pool: Route -> wires, the latest used last.
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
        self.timeout, self.connect_timeout, self.idle = timeout, connect_timeout, idle
        self.ca_bundle, self.client_cert, self.insecure = ca_bundle, client_cert, insecure
        self.lock, self.context_lock, self.context = threading.Lock(), threading.Lock(), None
        self.closed, self.pool, self.live, self.routes = False, {}, set(), {}

    def open(self, method, url, headers, body=None, wait=None, timeout=None):
        """Sends a request (body: bytes or None) and returns a Reply once its head has come; redirects on one host are followed.

        wait(sock, seconds) is called for every silence: True if the socket can be read, False if the seconds are over; what it
        raises (ClientGone) ends the connection and comes through. UpstreamError kinds: connect; timeout (504: silence of
        `timeout` seconds); cut; body (cannot be decoded); request (a setting holds what HTTP forbids, 500).
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
        route = self.route(url)
        data = request_bytes(route, method, url, headers, body)
        wire = self.kept(route)
        if wire:
            try:
                return self.exchange(wire, method, data, wait, timeout)
            except UpstreamError as error:
                # Closed by the upstream just as we took it: the one failure after which asking again is surely right.
                if wire.heard or error.kind != "cut":
                    raise
        return self.exchange(self.connect(route, wait), method, data, wait, timeout)

    def exchange(self, wire, method, data, wait, timeout):
        wire.begin(wait, timeout)
        try:
            sent = wire.send(data)
            response = wire.head(method)
            if response.status == 407 and wire.route.proxy:
                raise proxy_refusal(wire.route, 407, "")
        except BaseException:
            self.drop(wire)
            raise
        return Reply(self, wire, response, sent)

    def route(self, url):
        """The Route of a URL; looked up once a minute, as that reads the whole environment (or the Windows registry)."""
        try:
            place = url_origin(url)
        except ValueError:  # its text may hold a part of the URL, and that a password
            raise UpstreamError(
                "the base URL is not one: write it like https://host:port/v1", 500, kind="request"
            )
        until, route = self.routes.get(place, (0, None))
        if until < time.monotonic():
            route = route_to(*place)
            self.routes[place] = time.monotonic() + ROUTE_SECONDS, route
        return route

    def kept(self, route):
        """An idle wire to `route` on which the upstream has not hung up, or None."""
        old = []
        self.close_idle()
        with self.lock:
            if self.closed:
                raise UpstreamError("this proxy is shutting down", 503, kind="connect")
            wires = self.pool.get(route)
            found = None
            while wires and not found:
                found = wires.pop()
                if found.ready(poll_socket, 0):  # idle, yet readable: closed, or out of step
                    old.append(found)
                    found = None
        for wire in old:
            self.drop(wire)
        return found

    def close_idle(self):
        """Ends the connections that were idle too long."""
        old, before = [], time.monotonic() - self.idle
        with self.lock:
            for wires in self.pool.values():
                while wires and wires[0].since < before:
                    old.append(wires.pop(0))
        for wire in old:
            self.drop(wire)

    def connect(self, route, wait):
        """A new Wire, through the proxy if there is one, with TLS if the scheme says so. UpstreamError of kind connect."""
        address = route.proxy or (route.host, route.port)
        context = self.tls() if route.scheme == "https" else None
        try:
            sock = socket.create_connection(address, self.connect_timeout)
        except (OSError, UnicodeError) as error:
            raise connect_error(route, error)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if context:
                if route.proxy:
                    self.tunnel(sock, route, wait)
                sock = context.wrap_socket(sock, server_hostname=route.host)
            sock.settimeout(0)
        except (OSError, ValueError) as error:  # ssl.CertificateError is a ValueError on 3.6
            sock.close()
            raise connect_error(route._replace(proxy=None), error)
        except BaseException:
            sock.close()
            raise
        peer = host_port(route.host, route.port) + (
            " (through the proxy %s)" % host_port(*address) if route.proxy else ""
        )
        wire = Wire(sock, route, peer)
        with self.lock:
            self.live.add(wire)
        return wire

    def tunnel(self, sock, route, wait):
        """Has the proxy at the other end of `sock` connect it to the origin."""
        target = host_port(route.host.encode("idna").decode("ascii"), route.port)
        head = "CONNECT %s HTTP/1.1\r\nHost: %s\r\n" % (target, target)
        if route.proxy_auth:
            head += "Proxy-Authorization: %s\r\n" % route.proxy_auth
        sock.settimeout(0)
        wire = Wire(sock, route._replace(scheme="http"), "the proxy " + host_port(*route.proxy))
        wire.begin(wait, self.connect_timeout)
        try:
            wire.send(head.encode("ascii") + b"\r\n")
            response = wire.head("CONNECT")
        except UpstreamError as error:
            raise UpstreamError(error.message, kind="connect", retry=True)
        if response.status // 100 != 2:
            raise proxy_refusal(route, response.status, response.reason)
        sock.settimeout(self.connect_timeout)

    def tls(self):
        """The one SSLContext, made when it is first needed: loading the certificates takes 25 ms."""
        with self.context_lock:
            if not self.context:
                self.context = self.new_context()
            return self.context

    def new_context(self):
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
                "the CA bundle %s or the client certificate %s cannot be loaded (%s): it must be a PEM file"
                % (ascii(self.ca_bundle), ascii(self.client_cert), error.strerror or error),
                500,
                kind="request",
            )
        if self.insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context

    def keep(self, wire):
        """Takes a wire back on which nothing is under way."""
        wire.begin(poll_socket, 0)
        wire.since = time.monotonic()
        with self.lock:
            wires = self.pool.setdefault(wire.route, [])
            if not self.closed and len(wires) < KEPT_WIRES:
                wires.append(wire)
                return
        self.drop(wire)

    def drop(self, wire):
        with self.lock:
            self.live.discard(wire)
        wire.close()

    def close(self):
        """Ends every connection; a thread that waits for one gets an UpstreamError (cut)."""
        with self.lock:
            self.closed = True
            idle = [wire for wires in self.pool.values() for wire in wires]
            self.pool.clear()
            for wire in self.live:
                try:
                    socket.socket.shutdown(
                        wire.sock, socket.SHUT_RDWR
                    )  # not SSLSocket's, which is not for two threads
                except OSError:
                    pass
        for wire in idle:
            self.drop(wire)


# ==================================================================================================
# 11  Store: the cache of answers, memory and ledger in one SQLite file; records in a folder
# ==================================================================================================

HIDDEN = "<hidden>"
SECRET_NAMES = frozenset(
    "authorization proxy-authorization x-api-key api-key apikey api_key x-goog-api-key "
    "x-auth-token cookie set-cookie".split()
)
SHORTEST_SECRET = 4  # "x" as a key protects nothing, and hiding it would garble every string


def redact(value, secrets=(), longest=None, depth=60):
    """A copy of a JSON value that may be logged, recorded or shown: keys are hidden here only.

    Secrets (strings) go from every string, and so does the value of every name in SECRET_NAMES,
    also in [name, value] pairs; a dict under such a name stays, since it is a schema that
    describes the field. Bytes become strings. Strings are cut to `longest` characters, if given;
    what lies deeper than `depth` levels is hidden whole.
    """
    if isinstance(value, (bytes, str)):
        value = to_string(value)
        # The longest first: a key may be the beginning of another.
        for secret in sorted(filter(None, secrets), key=len, reverse=True):
            if len(secret) >= SHORTEST_SECRET:
                value = value.replace(secret, HIDDEN)
        return shorten(value, longest)
    if not depth:
        return HIDDEN

    def redact_part(part, name=""):
        is_secret = str(name).lower() in SECRET_NAMES and not isinstance(part, dict)
        return HIDDEN if is_secret else redact(part, secrets, longest, depth - 1)

    if isinstance(value, dict):
        return {redact_part(name): redact_part(part, name) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        name = value[0] if len(value) == 2 and isinstance(value[0], str) else ""
        return [redact_part(part, name if place else "") for place, part in enumerate(value)]
    return value


def shorten(text, limit=2000):
    """The string's front, and how much was left out; limit None: all of it."""
    if limit is None or len(text) <= limit:
        return text
    return "%s... (%d more characters)" % (text[:limit], len(text) - limit)


def write_file(path, text, mode=0o600):
    """Write a file, whole or not at all, with these permissions. Raises OSError, ValueError.

    Line ends stay as they are. surrogateescape, because under LC_ALL=C Python 3.6 reads other
    letters of the command line as halves of surrogate pairs.
    """
    part = "%s.%d.part" % (path, os.getpid())
    try:
        # O_EXCL: in a shared folder, somebody else's file or link may wait under this name.
        number = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(number, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(text)
        os.chmod(part, mode)
        os.replace(part, path)
    except (OSError, ValueError):
        if os.path.exists(part):
            os.unlink(part)
        raise


# ---- The key: which requests may share an answer

KEY_VERSION = 4  # raise it when a rule below changes, so that older entries are never found again

# Fields of the request as it is sent that do not decide what a right answer is, or that the parts
# below cover. `stop` is not among them: it decides where an answer ends. The limits are, because
# only answers that ended by themselves are ever stored.
NOT_IN_KEY = frozenset(
    "messages tools system stream stream_options temperature top_p top_k min_p seed max_tokens "
    "max_completion_tokens max_output_tokens user metadata safety_identifier prompt_cache_key "
    "service_tier store ANTHROPIC_BASE_URL ANTHROPIC_MODEL".split()
)
SHAPE_FIELDS = ("thinking", "output_config", "tool_choice", "stop_sequences")  # of `body`
REMINDER_END = "</system-reminder>"
SEND_HINTS = ("cache_control", "eager_input_streaming")  # on tools and blocks: how to send them
CALL_IDS = ("id", "tool_call_id", "tool_use_id")


def cache_key(body, sent, mode, model):
    """The sha256 (hex) under which an answer is kept, or None where none may be; never raises.

    body: the request as `normalize` gives it without `recall`; sent: the same in the provider's
    own form, OpenAI's or Anthropic's; model: the target (put the upstream's host in front where
    several share one cache). Every mode keeps apart what changes an answer's shape: thinking,
    effort, output format, tool choice, stop sequences and every other field sent, except
    sampling, limits and stream.

    full    What is sent, with tool-call ids numbered in order of appearance: they are new in
            every run.
    prefix  System text, tools, model and the conversation up to and with the last user message,
            without what still differs from session to session in a normalized request: call ids,
            cache_control, string or block form, signatures. `normalize` has taken the rest away
            (billing line, session id, token counters) and has put parallel results in order.
            What makes it safe:
            1. The whole conversation counts, so "continue", "yes" or "go on" finds an answer
               only where every earlier turn was the same, with all that the model is told of
               its own earlier thinking. The first question has no earlier turns: there, another
               session hits.
            2. Nothing is kept or found while the last user turn has a tool result, or nothing
               but reminders: the world answered, so the model is asked.
    none    None.
    """
    find_parts = {"full": full_parts, "prefix": prefix_parts}.get(mode)
    if not (find_parts and isinstance(body, dict) and isinstance(sent, dict)):
        return None
    shape = [body.get(name) for name in SHAPE_FIELDS]
    settings = {name: value for name, value in sent.items() if name not in NOT_IN_KEY}
    try:
        parts = find_parts(body, sent)
        key = json.dumps([KEY_VERSION, mode, model, shape, settings, parts], sort_keys=True)
    except RecursionError:  # nested deeper than we, or json, can follow
        return None
    return None if parts is None else hashlib.sha256(key.encode("ascii")).hexdigest()


def full_parts(body, sent):
    """System text, messages and tools as they are sent, except for the ids of tool calls."""
    numbers = {}
    messages = [key_part(message, numbers) for message in as_list(sent.get("messages"))]
    return [sent.get("system"), messages, sent.get("tools")]


def prefix_parts(body, sent):
    """System, conversation and tools as `prefix` counts them; None where no answer may be kept.

    The tools are those sent, in one order: where the request goes out as it came, the client's
    order is another each time.
    """
    turns = as_list(body.get("messages"))
    if not ends_in_question(turns):
        return None
    numbers, system = {}, {"content": body.get("system")}
    tools = [key_part(tool, {}, True) for tool in as_list(sent.get("tools"))]
    turns = [key_part(turn, numbers, True) for turn in [system] + turns]
    return [turns, sorted(tools, key=compact_json)]


def ends_in_question(turns):
    """Whether a user asks at the end: a turn without a tool result, and more than reminders."""
    last = as_dict(turns[-1]) if turns else {}
    blocks = as_blocks(last.get("content"))
    has_result = any(str(block.get("type")).endswith("tool_result") for block in blocks)
    if last.get("role") != "user" or has_result:
        return False
    return not all(block_text(block).rstrip().endswith(REMINDER_END) for block in blocks)


def key_part(item, numbers, is_loose=False):
    """What counts of a message, tool call, block or tool, in OpenAI's or Anthropic's form: a copy.

    numbers: call id -> int, in order of appearance; grows. Only the fields that hold calls are
    walked: an "id" among a call's arguments, or of a file, decides what the answer is. is_loose:
    also without what may differ though the model is told the same: of a call, the signature that
    `normalize` put beside it, which a served answer's new ids lose. A thought's signature counts
    where it is all there is of the thought; images and documents count by their bytes.
    """
    if not isinstance(item, dict):
        return item
    hidden = SEND_HINTS if is_loose else ()
    if is_loose and item.get("thinking"):
        hidden += ("signature",)
    elif is_loose and "input" in item:
        hidden += ("ccfix",)
    if is_loose and not item.get("is_error"):
        hidden += ("is_error",)
    result = {name: value for name, value in item.items() if name not in hidden}
    for name in CALL_IDS:
        if name in item and (name != "id" or "function" in item or "input" in item):
            result[name] = numbers.setdefault(str(item[name]), len(numbers))
    for name in ("content", "tool_calls"):
        parts = item.get(name)
        if is_loose and isinstance(parts, str):
            parts = as_blocks(parts)
        if isinstance(parts, list):
            result[name] = [key_part(part, numbers, is_loose) for part in parts]
    return result


# ---- Cache: one SQLite file; no trouble with it ever reaches a request

# Not a small number, so that another program's database is not taken for ours.
SCHEMA_VERSION = 20261
# `used` orders answers by their last use; size stands in its index, so that SUM(size) need not read
# the answers. `value` is what `pack` made, and the last column of each table.
SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS responses
    (key TEXT PRIMARY KEY, size INTEGER, born REAL, used INTEGER, cost_ms REAL, value BLOB);
CREATE INDEX IF NOT EXISTS responses_used ON responses (used, size);
CREATE TABLE IF NOT EXISTS memory (seq INTEGER PRIMARY KEY, id TEXT UNIQUE, value BLOB);
CREATE TABLE IF NOT EXISTS ledger (seq INTEGER PRIMARY KEY, id TEXT, value BLOB);
CREATE TABLE IF NOT EXISTS lessons
    (upstream TEXT, model TEXT, value TEXT, PRIMARY KEY (upstream, model));
PRAGMA user_version = %d;
COMMIT;
""" % SCHEMA_VERSION
ALL_BYTES = "SELECT COALESCE(SUM(size), 0) FROM responses"
NEXT_USE = "(SELECT COALESCE(MAX(used), 0) + 1 FROM responses)"
BUSY_SECONDS = 0.25  # how long a request waits for another process's lock
SLOW_SECONDS = 0.1  # a failure that took longer than this ...
REST_SECONDS = 5  # ... is not met again for so long: requests must not queue up behind each other
ROW_BYTES = 200  # what a row costs besides its value: key, index, page slack
KEPT_ROWS = 20000  # the newest, in each table but that of the answers


def pack(value):
    """Compressed JSON, or None for what JSON cannot hold."""
    try:
        return zlib.compress(compact_json(value).encode("ascii"), 6)
    except (TypeError, ValueError, RecursionError):
        return None


def unpack(blob):
    """The value that `pack` made blob of; None for anything else."""
    try:
        return json_or_none(zlib.decompress(blob))
    except (TypeError, zlib.error):
        return None


def sqlite_text(value):
    """value as a string that SQLite can hold: a client's id may contain half a surrogate pair."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


class Cache:
    """Answers by key in `responses.db` in a folder, for all threads and several processes.

    The folder is made 0700, the file 0600. Beside the answers: what is remembered of tool calls,
    ledger rows, and lessons. folder "" keeps everything in memory. The file is opened at the
    first use. No method raises: while the database is locked, full, read-only or broken,
    everything is a miss; a broken file is moved aside.
    """

    def __init__(self, folder, ttl, max_bytes, now=time.time, log=None):
        self.path = os.path.join(folder, "responses.db") if folder else ":memory:"
        self._ttl = ttl  # seconds for which an answer is good; 0 keeps none
        self._max_bytes = max_bytes  # of compressed answers; the least recently used go first
        self._now = now  # () -> seconds since the epoch
        self._log = log or (lambda text: None)  # hears of each kind of trouble once
        self._lock = threading.RLock()  # all threads share one connection
        self._db = None  # the connection, while there is one
        self._closed = False  # for good, by close()
        self._rest_until = 0  # no use of the database before; see SLOW_SECONDS
        self._faults = (ImportError, OSError)  # what `_run` meets; _open adds SQLite's own
        self._error = None  # the last failure, until a put goes well
        self._told = set()  # what the log has heard
        self._counts = collections.Counter(hits=0, misses=0, inserts=0, evictions=0, saved_ms=0)

    def get(self, key):
        """(message, cost_ms), or None. cost_ms: what the answer truly took upstream."""
        if key is None:
            return None
        fresh = "WHERE key = ? AND abs(born - ?) < ?"
        rows = self._find("responses", fresh, key, self._now(), self._ttl)
        if not rows or not isinstance(rows[0][-1], dict):
            self._count(misses=1)
            return None
        self._change("UPDATE responses SET used = %s WHERE key = ?" % NEXT_USE, key)
        cost_ms, message = rows[0][-2:]
        self._count(hits=1, saved_ms=cost_ms)
        return message, cost_ms

    def put(self, key, message, cost_ms):
        """Keep a complete answer (a dict). One too big for the whole cache is left out."""
        value = pack(message)
        if key is None or value is None or len(value) + ROW_BYTES > self._max_bytes:
            return
        row = (key, len(value) + ROW_BYTES, self._now(), float(cost_ms), value)
        evicted = self._run(lambda db: self._replace(db, row))
        if evicted is not None:
            self._error = None
            self._count(inserts=1, evictions=evicted)

    def _replace(self, db, row):
        """Put a row in and make room for it, as one transaction -> how many others had to go."""
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, %s, ?, ?)" % NEXT_USE, row)
        evicted = 0
        oldest = "(SELECT key FROM responses ORDER BY used LIMIT 1)"
        while db.execute(ALL_BYTES).fetchone()[0] > self._max_bytes:
            db.execute("DELETE FROM responses WHERE key = " + oldest)
            evicted += 1
        db.execute("COMMIT")
        return evicted

    def stats(self):
        """Counts since the start, entries and bytes of now, limits, and the last failure.

        saved_ms: what the answers took upstream that were found here; error: None once a put has
        gone well again.
        """
        figures = "SELECT COUNT(*), (%s) FROM responses" % ALL_BYTES
        entries, size = self._run(lambda db: db.execute(figures).fetchone(), (0, 0))
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
        """Forget all answers -> how many. The file shrinks if no other process is in the way."""
        count = self._change("DELETE FROM responses")
        self._change("VACUUM")
        self._change("PRAGMA wal_checkpoint(TRUNCATE)")
        return count

    def clear_expired(self):
        """Forget answers older than ttl (or from a future that a wrong clock made) -> how many."""
        old = "DELETE FROM responses WHERE abs(born - ?) >= ?"
        return self._change(old, self._now(), self._ttl)

    def remember(self, call_id, note):
        """Keep what belongs to a tool call (a JSON value: its reasoning, say) for later turns."""
        self._keep("memory", (None, sqlite_text(call_id)), note)

    def recall(self, call_id):
        """What `remember` kept, or None."""
        rows = self._find("memory", "WHERE id = ?", sqlite_text(call_id))
        return rows[0][-1] if rows else None

    def save_row(self, row):
        """Keep a ledger row (dict). Made to be a Ledger's `save`."""
        self._keep("ledger", (None, sqlite_text(row.get("id"))), row)

    def saved_rows(self, count=1000):
        """Saved ledger rows, newest first."""
        rows = self._find("ledger", "ORDER BY seq DESC LIMIT ?", count)
        return [row[-1] for row in rows if isinstance(row[-1], dict)]

    def save_lesson(self, upstream, model, lesson):
        """Keep what was learned (a dict) about a model of an upstream; replaces the earlier."""
        self._keep("lessons", (sqlite_text(upstream), sqlite_text(model)), lesson)

    def lessons(self):
        """{(upstream, model): lesson} of all that `save_lesson` kept."""
        rows = self._find("lessons")
        return {row[:-1]: row[-1] for row in rows if isinstance(row[-1], dict)}

    def forget_lessons(self):
        """-> how many lessons there were."""
        return self._change("DELETE FROM lessons")

    def close(self):
        """Close the file; afterwards everything is a miss."""
        with self._lock:
            self._closed = True
            self._shut()

    def _count(self, **more):
        with self._lock:
            self._counts.update(more)

    def _find(self, table, condition="", *values):
        """Rows of a table, as tuples with their value unpacked; a damaged value is None."""
        query = "SELECT * FROM %s %s" % (table, condition)
        rows = self._run(lambda db: db.execute(query, values).fetchall(), [])
        return [row[:-1] + (unpack(row[-1]),) for row in rows]

    def _change(self, statement, *values):
        """Run a statement -> how many rows it changed."""
        return self._run(lambda db: db.execute(statement, values).rowcount, 0)

    def _keep(self, table, ids, value):
        """Put (*ids, value) into a table that keeps its newest KEPT_ROWS.

        An id of None becomes the next `seq`. SQLite's rowid grows with each row, replaced or new.
        """
        blob = pack(value)
        if blob is not None:
            self._change("INSERT OR REPLACE INTO %s VALUES (?, ?, ?)" % table, *ids, blob)
            last = "(SELECT MAX(rowid) FROM %s)" % table
            self._change("DELETE FROM %s WHERE rowid <= %s - ?" % (table, last), KEPT_ROWS)

    def _run(self, act, otherwise=None):
        """act(db), or `otherwise` where that fails: all errors of the database end here."""
        with self._lock:
            if self._closed or 0 < self._rest_until - self._now() <= REST_SECONDS:
                return otherwise
            start = time.perf_counter()
            try:
                if not self._db:
                    self._open()
                return act(self._db)
            except self._faults as error:
                self._shut()
                if time.perf_counter() - start > SLOW_SECONDS:
                    self._rest_until = self._now() + REST_SECONDS
                self._tell(error)
                if is_corruption(error):
                    self._set_aside()
                return otherwise

    def _open(self):
        """Connect to a database of ours, made where there is none."""
        import sqlite3  # here: it costs a start some 10 ms, and some Pythons are built without it

        self._faults = (OSError, sqlite3.Error)
        if self.path != ":memory:":
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            # SQLite gives its side files the mode of this one.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        db = self._db = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        # In this order: another process makes tables and version in one step.
        tables = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if tables and version != SCHEMA_VERSION:
            raise sqlite3.DatabaseError("not a cache of this program or version")
        # WAL: reading goes on while another process writes. NORMAL: power cuts may cost answers.
        for pragma in "journal_mode = WAL", "synchronous = NORMAL", "journal_size_limit = 4194304":
            db.execute("PRAGMA " + pragma).fetchone()
        if not tables:
            db.executescript(SCHEMA)

    def _shut(self):
        """Close the connection; what it had begun is rolled back."""
        db, self._db = self._db, None
        try:
            if db:
                db.close()
        except self._faults as error:  # a file that cannot even be closed
            self._tell(error)

    def _tell(self, error):
        """Log a failure, each kind once: every request meets it until somebody fixes it."""
        self._error = str(error) or type(error).__name__
        if self._error not in self._told and len(self._told) < 20:
            self._told.add(self._error)
            self._log("cache %s: %s; requests go on without it" % (self.path, self._error))

    def _set_aside(self):
        """Move a broken file to responses.db.broken, unless another process has done so by now."""
        try:
            self._open()
            sound = self._db.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
        except self._faults as error:
            sound = not is_corruption(error)
        self._shut()
        for suffix in () if sound else ("", "-wal", "-shm"):
            # Where it fails there is no such side file; or the next opening fails as well,
            # and says so.
            with contextlib.suppress(OSError):
                os.replace(self.path + suffix, self.path + ".broken" + suffix)


def is_corruption(error):
    """Whether an error says that the file is broken: "locked" and "full" are OperationalErrors."""
    return type(error).__name__ == "DatabaseError"


# ---- Ledger: what requests took and cost
#
# Rows for the list on the status page, sums for its figures and charts. A cost is counted when the
# row comes: prices that change later do not rewrite what was spent.

PRICE_FIELDS = ("input", "output", "cache_read", "cache_write")  # tokens of a row of the ledger
COUNTED = ("requests", "errors", "unpriced", "cost") + PRICE_FIELDS
KEPT_MINUTES = 1440
KEPT_SAMPLES = 500  # first-content times kept of a minute, for its median


def prices_from(text_or_path):
    """{model: {input, output, cache_read, cache_write}} of JSON, or of a file that holds it.

    Prices are per million tokens, in the user's currency. A model may end in "*". cache_read
    and cache_write cost as much as input where they are not given. Raises ValueError, with a
    sentence for the user.
    """
    text = text_or_path.strip()
    try:
        if text and not text.startswith("{"):
            with open(text, encoding="utf-8-sig") as file:
                text = file.read()
        table = json.loads(text or "{}")
    except (OSError, ValueError) as error:
        raise ValueError("PRICES: not JSON, and not a file that holds it (%s)" % error)
    if not isinstance(table, dict):
        example = '{"model-name": {"input": 1, "output": 2}}'
        raise ValueError("PRICES: must be an object such as " + example)
    return {model: check_price(model, price) for model, price in table.items()}


def check_price(model, price):
    """A model's prices as a whole row: {field of PRICE_FIELDS: float}. Raises ValueError."""
    fields = as_dict(price)
    wrong = [field for field in fields.items() if not (is_number(field[1]) and field[1] >= 0)]
    if "*" in model[:-1]:
        words = ": a * may only stand at the end of a model's name"
    elif not {"input", "output"} <= set(fields) <= set(PRICE_FIELDS):
        words = " needs input and output, and may have cache_read and cache_write"
    elif wrong:
        words = ": %s must be a price per million tokens, not %r" % wrong[0]
    else:
        return {name: float(price.get(name, price["input"])) for name in PRICE_FIELDS}
    raise ValueError("PRICES: %r%s" % (model, words))


class Sums:
    """Sums over requests."""

    def __init__(self):
        # cost: of the requests whose model has a price; unpriced: how many others there are
        self.counts = collections.Counter(dict.fromkeys(COUNTED, 0))
        self.first_ms = []  # of the first KEPT_SAMPLES requests

    def add(self, row):
        """Count one request; row: as Ledger.add gives it."""
        failed = bool(row.get("error")) or (row.get("status") or 0) >= 400
        row = dict(row, requests=1, errors=failed, unpriced=row["cost"] is None)
        self.counts.update({name: row.get(name) or 0 for name in COUNTED})
        if row.get("first_ms") is not None and len(self.first_ms) < KEPT_SAMPLES:
            self.first_ms.append(row["first_ms"])

    def figures(self, prices):
        """The sums as a dict; cost is None where no request had a price, or could have one."""
        counts = self.counts
        is_known = counts["requests"] > counts["unpriced"] or prices and not counts["requests"]
        return dict(counts, cost=round(counts["cost"], 6) if is_known else None)

    def median_ms(self):
        """The median time to the first content, or None."""
        return sorted(self.first_ms)[len(self.first_ms) // 2] if self.first_ms else None


class Ledger:
    """The last `size` requests, and sums over all of them."""

    def __init__(self, size=1000, prices=None, now=time.time, save=None):
        self.prices = prices or {}  # as `prices_from` gives them; of the rows that come
        self._now = now  # () -> seconds since the epoch
        self.save = save  # save(row), called for each new row, outside the lock; see Cache.save_row
        self._lock = threading.Lock()
        self._rows = collections.deque(maxlen=size)  # newest last
        self._totals = Sums()
        self._minutes = {}  # minute since the epoch -> Sums

    def add(self, row):
        """Keep a row -> the row kept, with its `cost` (None where the model's price is unknown).

        row: {time, id, session, asked, model, stream, status, input, output, cache_read,
        cache_write, first_ms, total_ms, bytes_in, bytes_out, retries, lessons, cache, error,
        broke}; time: seconds since the epoch; input: tokens, without those that came from a
        provider's cache.
        """
        row = self._take(row)
        if self.save:
            self.save(row)
        return row

    def _take(self, row):
        """Count a row; a cost that it brings along stays, as prices may have changed since."""
        row = dict(row)
        if row.get("cost") is None:
            row["cost"] = self._cost(row)
        minute = int((row.get("time") or self._now()) // 60)
        with self._lock:
            self._rows.append(row)
            self._totals.add(row)
            if minute not in self._minutes and len(self._minutes) >= KEPT_MINUTES:
                del self._minutes[min(self._minutes)]
            self._minutes.setdefault(minute, Sums()).add(row)
        return row

    def _cost(self, row):
        """What a request cost, in the prices' currency; None where its model has no price.

        The model's own price counts, else that of the longest name with a * that fits.
        """
        model = str(row.get("model"))
        fits = [
            name
            for name in self.prices
            if name == model or name.endswith("*") and model.startswith(name[:-1])
        ]
        if not fits:
            return None
        price = self.prices[max(fits, key=lambda name: (name == model, len(name)))]
        return sum((row.get(name) or 0) * price[name] for name in PRICE_FIELDS) / 1e6

    def restore(self, rows):
        """Take in rows (newest first) that an earlier run saved, where there are none yet."""
        if not self._rows:
            for row in reversed(rows):
                self._take(row)

    def rows(self, count=1000):
        """The last rows, newest first."""
        with self._lock:
            return list(self._rows)[::-1][:count]

    def totals(self):
        """COUNTED and the cost (or None), of all requests since the start."""
        with self._lock:
            return self._totals.figures(self.prices)

    def series(self, minutes=60):
        """One dict a minute, the running minute last: t, first_ms (the median) and the sums.

        t: the minute's start, in seconds since the epoch.
        """
        last = int(self._now() // 60)
        result = []
        with self._lock:
            for minute in range(last - minutes + 1, last + 1):
                sums = self._minutes.get(minute) or Sums()
                figures = sums.figures(self.prices)
                result.append(dict(figures, t=minute * 60, first_ms=sums.median_ms()))
        return result


# ---- Why an upstream's prefix cache was lost
#
# Providers keep what they computed of a prompt's front, and bill it at a fraction of the price,
# while it stays the same to the byte. A client that edits its history or its tools loses that
# silently: we compare each request with the session's last one, and tell in the ledger what
# changed.


class Outline(NamedTuple):
    """Checksums of a request's parts, in the order in which a model reads them.

    system: [crc]; tools: [(name, crc)]; messages: [(role, crc)].
    """

    system: list
    tools: list
    messages: list


def common_prefix(old, new):
    """How many parts at the front are the same: what a provider's cache can still use."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new))
    return len(list(same))


def why_broken(old, new):
    """Why `new` (an Outline) does not go on where `old` stopped; "" where it does, or is a part."""
    reasons = (
        "" if old.system == new.system else "system text changed",
        tools_broken(old.tools, new.tools),
        messages_broken(old.messages, new.messages),
    )
    return "; ".join(filter(None, reasons))


def tools_broken(old, new):
    """ "tools reordered", or "tools changed" with the names that came, went or changed; or ""."""
    before, after = dict(old), dict(new)
    both = set(before) & set(after)
    changes = (
        ("added", set(after) - both),
        ("removed", set(before) - both),
        ("edited", {name for name in both if before[name] != after[name]}),
    )
    words = ["%s %s" % (verb, list_names(names)) for verb, names in changes if names]
    if words:
        return "tools changed (%s)" % "; ".join(words)
    return "" if old == new else "tools reordered"


def list_names(names):
    """At most three of the names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (" and %d more" % (len(names) - 3) if names[3:] else "")


def messages_broken(old, new):
    """Which message changed (counted from 1), or where the history was cut.

    "" where one list is the front of the other: a request that goes on, or a side request.
    """
    same = common_prefix(old, new)
    if same in (len(old), len(new)):
        return ""
    if len(new) >= len(old):
        return "message %d (%s) changed" % (same + 1, new[same][0])
    if not same:
        return "history was replaced (compaction)"
    return "history was cut after message %d (compaction)" % same


class Sessions:
    """The last outlines of each session, least recently used forgotten.

    One session has several lines of requests (main, title, web fetch), so the last few are kept,
    and a request is compared with the one it shares most messages with. Give subagents a session
    of their own: session plus agent id.
    """

    LINES = 4

    def __init__(self, size=200):
        self._size = size
        self._lock = threading.Lock()
        self._lines = collections.OrderedDict()  # session -> [Outline, ...], latest last

    def compare(self, session, new):
        """`why_broken` against the earlier request of the same line, whose place `new` takes."""

        def likeness(line):
            return common_prefix(line.messages, new.messages), line.tools == new.tools

        with self._lock:
            lines = self._lines.pop(session, [])
            related = [line for line in lines if is_related(line, new)]
            old = max(reversed(related), key=likeness, default=None)
            lines = [line for line in lines if line is not old] + [new]
            self._lines[session] = lines[-self.LINES :]
            if len(self._lines) > self._size:
                self._lines.popitem(last=False)
        return "" if old is None else why_broken(old, new)


def is_related(old, new):
    """Whether two requests can be of one line: the same first message, or the same system text.

    The latter only with a history, of more than two messages: a first question is a line of its
    own.
    """
    has_history = len(new.messages) > 2 and old.system == new.system
    return has_history or old.messages[:1] == new.messages[:1]


# ---- Records, which `--replay` serves again


class Recorder:
    """Writes each exchange as one JSON file (0600) in a folder (made 0700), redacted.

    exchange: {time, id, ...anything..., replies: [{status, headers, body}, ...]}, one reply a try
    upstream.
    """

    def __init__(self, folder, secrets=(), log=None):
        self._folder, self._secrets = folder, tuple(secrets)
        self._log = log or (lambda text: None)  # hears of trouble once
        self._told = False

    def write(self, exchange):
        """-> True where the file is whole."""
        try:
            when = exchange.get("time") or time.time()
            stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(when))
            name = re.sub(r"[^A-Za-z0-9_-]", "_", str(exchange.get("id")))[:60]
            path = "%s-%06d-%s.json" % (stamp, when % 1 * 1e6, name)
            text = json.dumps(redact(exchange, self._secrets), indent=1, default=str)
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            write_file(os.path.join(self._folder, path), text)
            return True
        except (OSError, TypeError, ValueError, OverflowError, RecursionError) as error:
            if not self._told:
                self._told = True
                self._log("record %s: %s; exchanges are not recorded" % (self._folder, error))
            return False


def read_recording(folder):
    """[{status, headers (dict), body (str)}] of all exchanges in a folder, in order of time.

    Raises ValueError, which names the file, and OSError.
    """
    replies = []
    for name in sorted(name for name in os.listdir(folder) if name.endswith(".json")):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                for reply in json.load(file)["replies"]:
                    headers, body = dict(reply.get("headers") or {}), reply.get("body") or ""
                    status = int(reply["status"])
                    replies.append({"status": status, "headers": headers, "body": str(body)})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            words = "replay: %s is not a recorded exchange (%s: %s)"
            raise ValueError(words % (name, type(error).__name__, error))
    return replies


# ==================================================================================================
# 12  Proxy: joins the above; Anthropic body in, events out; knows no client socket
# ==================================================================================================

HOLD_SECONDS = 15  # the status waits so long for the first content; then message_start goes out
PING_SECONDS = 5  # between pings in a silence
STALLED = 10  # times TARGET_TIMEOUT without content, though bytes come: given up
SIGN_SECONDS = 240  # of pings alone; then empty deltas: the client gives up after 600 s of pings
MAX_LESSONS = 3  # that one request may cost
LONGEST_WAIT = 20  # seconds of Retry-After that are waited here; longer ones the client waits
MEMORY_CALLS = 5000  # tool calls whose arguments and reasoning are remembered
MEMORY_BYTES = 32 << 20
SMALL_CONTEXT = 30000  # tokens; below it Claude Code is of no practical use
# Kinds of errors after which another model may do better.
FALLBACK_KINDS = "connect timeout cut overloaded server rate billing sampling".split()
STORE_SETTINGS = ("cache_enabled", "ledger", "cache_dir", "cache_ttl", "cache_max_mb")
TLS_SETTINGS = ("ca_bundle", "client_cert", "insecure")  # the names of Upstream's arguments, too
WHOLE_ENDS = ("end_turn", "tool_use", "stop_sequence")  # stop reasons of answers that are stored
CREATED = "2025-01-01T00:00:00Z"  # of every model; the client wants some date


class Plan(NamedTuple):
    """Where a request goes: the first stop of every decision, and what learning replaces."""

    family: str  # whose settings were used: "" the main ones, opus, ..., fallback, image
    model: str  # without [1m]
    base: str  # the base URL
    key: str  # "" for none
    profile: Profile  # with what was learned

    @property
    def format(self):
        """The Format that the provider speaks."""
        return FORMATS[self.profile.format]

    def url(self, path):
        """The URL of a path of the format."""
        return endpoint(self.base, path)


def plan_request(settings, asked, with_images, profile_of):
    """The Plan for a model name that the client asked for.

    A family without settings of its own takes the main ones, and so does a name of no family.
    profile_of(base, model) -> Profile. Requests with images go to TARGET_MODEL_IMAGE where the
    plan takes none.
    """
    plan = plan_for(settings, family_of(asked), profile_of)
    if with_images and settings.target_model_image and not plan.profile.images:
        return plan_for(settings, "image", profile_of)
    return plan


def plan_for(settings, family, profile_of):
    """The Plan of a family: its own model, base and key where they are set.

    A base of its own never gets the main key: it is another company's.
    """

    def own(name):
        return getattr(settings, "%s_%s" % (name, family)) if family else ""

    base = own("target_api_base") or settings.target_api_base
    main_key = settings.target_api_key if base == settings.target_api_base else ""
    model = without_mark(own("target_model") or settings.target_model)
    mine = bool(own("target_model") or own("target_api_base"))
    key = own("target_api_key") or main_key
    return Plan(family if mine else "", model, base, key, profile_of(base, model))


def upstream_headers(plan, settings, client_headers=()):
    """Headers for the provider: its format's, its constants, and EXTRA_HEADERS (null removes).

    client_headers: by get(); a format passes some of them on. Names match in any case (RFC 9110,
    5.1), so that EXTRA_HEADERS replaces a header however it is spelled.
    """
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
        "User-Agent": USER_AGENT,
    }
    headers.update(plan.format.headers(plan.key, plan.profile, client_headers or {}))
    headers.update(plan.profile.headers)
    for name, value in settings.extra_headers.items():
        headers = {known: headers[known] for known in headers if known.lower() != name.lower()}
        if value is not None:
            headers[name] = str(value)
    return headers


USER_AGENT = "ccfix/" + __version__


def add_extra_body(sent, settings):
    """The body for the provider, changed in place by EXTRA_BODY (null removes a field)."""
    for name, value in settings.extra_body.items():
        sent.pop(name, None)
        if value is not None:
            sent[name] = value
    return sent


def encode_request(sent):
    """(the request's JSON bytes, its Outline): each part is encoded once, for both.

    A leading system message counts as system text, as it is in OpenAI's form.
    """
    lists = {name: as_list(sent.get(name)) for name in ("messages", "tools")}
    encoded = {name: [to_json_bytes(item) for item in items] for name, items in lists.items()}
    body = to_json_bytes({name: value for name, value in sent.items() if name not in lists})[:-1]
    for name, items in encoded.items():
        if items:
            body += b',"%s":[%s]' % (name.encode(), b",".join(items))
    tools = list(zip(map(name_of, lists["tools"]), map(zlib.crc32, encoded["tools"])))
    roles = [as_dict(message).get("role") for message in lists["messages"]]
    messages = list(zip(roles, map(zlib.crc32, encoded["messages"])))
    first = 1 if roles[:1] == ["system"] else 0
    system = messages[:first] + [zlib.crc32(to_json_bytes(sent.get("system")))]
    return body + b"}", Outline(system, tools, messages[first:])


def to_json_bytes(value):
    """value as JSON in ASCII bytes."""
    return compact_json(value).encode("ascii")


def name_of(tool):
    """The name of a tool as OpenAI or Anthropic writes it."""
    tool = as_dict(tool)
    return str(as_dict(tool.get("function")).get("name") or tool.get("name"))


class Memory:
    """What is remembered of tool calls, by tool id: bounded, the least recently used go first.

    Thread-safe. store: a Cache that keeps them too, or None. The client drops what it does not
    know, and rewrites arguments; what a provider needs back byte for byte is kept here as well as
    in signatures (see `normalize` for what a note holds).
    """

    def __init__(self, store=None):
        self.notes, self.size = collections.OrderedDict(), 0  # id -> (note, size)
        self.lock, self.store = threading.Lock(), store

    def keep(self, notes):
        """Keep {id: note}."""
        with self.lock:
            for call_id, note in notes.items():
                size = 200 + len(compact_json(note))  # 200: what a row costs besides
                self.size += size - self.notes.pop(call_id, (None, 0))[1]
                self.notes[call_id] = (note, size)
            while len(self.notes) > MEMORY_CALLS or self.size > MEMORY_BYTES:
                self.size -= self.notes.popitem(last=False)[1][1]
        if self.store:
            for call_id, note in notes.items():
                self.store.remember(call_id, note)

    def recall(self, call_id):
        """The note of a call, or {}."""
        with self.lock:
            if call_id in self.notes:
                self.notes.move_to_end(call_id)
                return self.notes[call_id][0]
        return as_dict(self.store.recall(call_id)) if self.store else {}


class Proxy:
    """What all requests share: settings, connections, lessons, memory, cache and ledger.

    config() -> the Settings of now; log(level, text); new_id() -> a fresh hex string; now() ->
    seconds since the epoch. Everything here may be called by several threads at once.
    """

    def __init__(self, config, log, new_id=lambda: "%024x" % random.getrandbits(96), now=time.time):
        self.config, self.log, self.new_id, self.now = config, log, new_id, now
        self.started = now()
        self.lock = threading.Lock()  # over what follows
        self.active = 0  # requests under way
        self.store = None  # a Cache, where the user asked for one
        self.memory = Memory()
        self.recorder = None  # a Recorder, with RECORD_DIR
        self.ledger = Ledger(now=now)
        self.sessions = Sessions()  # for the explainer of lost prefixes
        self.lessons = {}  # (base, model) -> {profile field: value}
        self.found = {}  # (base, model) -> {"owner", "context"}: what the provider tells of itself
        self.memo = {}  # cleaned tools, see clean_tool
        self.rows = {}  # profile_for's answers by its arguments: each takes 30 us or more
        self.wires = None  # (the TLS settings it was made from, Upstream)
        self.seen = None  # the Settings that store, ledger and recorder were made from
        self.follow(config())

    def settings(self):
        """The Settings of now; store, ledger and recorder follow a change of them."""
        settings = self.config()
        if settings is not self.seen:
            try:
                self.follow(settings)
            except ValueError as error:
                self.log("warning", "PRICES cannot be used, the old ones stay: %s" % error)
        return settings

    def follow(self, settings):
        """Make anew what depends on settings that changed: .env is read again while serving.

        Raises ValueError for PRICES that cannot be used; all else has followed by then.
        """
        with self.lock:
            old, self.seen = self.seen, settings
            names = STORE_SETTINGS + ("prices", "record_dir")
            changed = {
                name for name in names if getattr(old, name, self) != getattr(settings, name)
            }
            try:  # prices first: rows that the store gives back are priced by them
                if "prices" in changed:
                    self.ledger.prices = prices_from(settings.prices)
            finally:
                if changed.intersection(STORE_SETTINGS):
                    self.open_store(settings)
                if "record_dir" in changed:
                    folder, secrets = settings.record_dir, settings.secrets()
                    self.recorder = Recorder(folder, secrets, self.warn) if folder else None

    def open_store(self, settings):
        """Open the Cache in CACHE_DIR, if the user asked for the cache or the ledger, or named it.

        Nothing is written otherwise. What an earlier run kept comes back.
        """
        if self.store:
            self.store.close()
        store, size = None, settings.cache_max_mb << 20
        is_named = settings.origins["cache_dir"] != "default"
        if settings.cache_enabled or settings.ledger or is_named:
            store = Cache(settings.cache_dir, settings.cache_ttl, size, log=self.warn)
            self.lessons.update(store.lessons())
        self.store = self.memory.store = store
        self.ledger.save = store.save_row if settings.ledger else None
        if settings.ledger:
            self.ledger.restore(store.saved_rows())

    def warn(self, text):
        """Log a warning."""
        self.log("warning", text)

    def upstream(self, settings):
        """The shared connections; made anew when a setting about TLS changed."""
        made = tuple(getattr(settings, name) for name in TLS_SETTINGS)
        with self.lock:
            if self.wires is None or self.wires[0] != made:
                tls = dict(zip(TLS_SETTINGS, made))
                self.wires = (made, Upstream(settings.target_timeout, **tls))
            return self.wires[1]

    def profile_of(self, settings):
        """A function (base, model) -> Profile, with what was found and learned.

        The user's own limits count most. PROFILE and TARGET_FORMAT are about the main base,
        MAX_OUTPUT and MAX_CONTEXT about the main model there; a family of its own goes elsewhere.
        """
        main = settings.target_api_base, without_mark(settings.target_model)

        def profile(base, model):
            place = base, model
            found = self.found.get(place, {})
            forced = (settings.profile, settings.target_format) if base == main[0] else ("", "auto")
            key = (base, model) + forced + (found.get("owner", ""),)
            row = self.rows.get(key) or self.rows.setdefault(key, profile_for(*key))
            if found.get("context") and not row.context:
                row = row._replace(context=found["context"])
            row = apply_lesson(row, self.lessons.get(place))
            if place != main:
                return row
            context = settings.max_context or row.context
            return row._replace(max_output=settings.max_output or row.max_output, context=context)

        return profile

    def teach(self, plan, changes):
        """Remember lessons about a plan's provider and model. changes: {profile field: value}."""
        place = (plan.base, plan.model)
        with self.lock:
            self.lessons[place] = dict(self.lessons.get(place, {}), **changes)
        if self.store:
            self.store.save_lesson(plan.base, plan.model, self.lessons[place])
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
        """Ask the provider once what it tells for free: who it is, and the context window.

        Never raises: it is asked beside the first request, and nothing depends on the answer.
        """
        try:
            headers = upstream_headers(plan, self.settings())
            found = ask_provider(self.upstream(self.settings()), plan, headers, wait)
        except (ProxyError, ClientGone, ValueError, KeyError, TypeError) as error:
            self.log("debug", "the provider was not asked about itself: %s" % error)
            return
        self.found[(plan.base, plan.model)] = found
        if 0 < found["context"] < SMALL_CONTEXT:
            self.warn(
                "%s has a context window of %d tokens; Claude Code's first request alone has about"
                " 13,000" % (plan.model, found["context"])
            )

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

    def plan_of(self, settings, family=""):
        """The Plan of a family, with what was learned."""
        return plan_for(settings, family, self.profile_of(settings))

    def models(self, settings):
        """Anthropic's model list: the families, and the disguise or target.

        Under names that Claude Code accepts: those that begin with claude or anthropic. There is
        only one page. https://docs.anthropic.com/en/api/models-list
        """
        shown = settings.disguise_model or settings.target_model
        named = shown if shown.startswith(("claude", "anthropic")) else "claude-" + shown
        data = [model_row(named, settings.target_model)]
        for family in FAMILIES:
            title = "%s (%s)" % (self.plan_of(settings, family).model, family)
            data.append(model_row("claude-" + family, title))
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
        return dict({"data": data, "has_more": False}, **ends)

    def count_tokens(self, body, headers, wait=None):
        """{"input_tokens"}: the provider's own count where its format has one, else an estimate.

        Claude Code's /context asks for some 24 counts at once; it works with any number.
        """
        if not isinstance(body.get("messages"), list):
            raise BadRequest("messages: a list is required")
        settings = self.settings()
        plan = plan_request(settings, str(body.get("model")), False, self.profile_of(settings))
        count = None
        if plan.format.count_path and body["messages"]:
            sent = normalize(body, plan.profile, memo=self.memo)
            sent = plan.format.write(sent, plan.model, plan.profile)
            sent = {name: sent[name] for name in sent if name not in ("max_tokens", "stream")}
            headers = upstream_headers(plan, settings, headers)
            url, upstream = plan.url(plan.format.count_path), self.upstream(settings)
            try:
                count = get_json(upstream, url, headers, wait, 10, sent).get("input_tokens")
            except ProxyError as error:
                self.log("debug", "count_tokens of the provider failed: %s" % error)
        return {"input_tokens": count if isinstance(count, int) else estimate_tokens(body)}

    def status(self, address=""):
        """What GET /stats tells; the status page shows it."""
        settings = self.settings()
        plan = self.plan_of(settings)
        profile, has_key = plan.profile, bool(settings.anthropic_api_key)
        plans = [self.plan_of(settings, family) for family in FAMILIES + ("fallback", "image")]
        cache = self.store.stats() if self.store and settings.cache_enabled else {}
        cache.update(
            enabled=settings.cache_enabled, mode=settings.cache_key_mode, ttl=settings.cache_ttl
        )
        return {
            "name": "ccfix",
            "version": __version__,
            "time": self.now(),
            "uptime_s": round(self.now() - self.started, 1),
            "address": address,
            "proxy_key": has_key,
            "demo": profile.name == "demo",
            "target": dict(
                place_of(plan),
                profile=profile.name,
                format=profile.format,
                context=profile.context,
                max_output=profile.max_output,
            ),
            "disguise": {"model": settings.disguise_model, "api_base": settings.disguise_api_base},
            "routes": [dict(place_of(row), family=row.family) for row in plans if row.family],
            "connect": dict(connect_lines(address, has_key)),
            "totals": dict(self.ledger.totals(), active=self.active),
            "series": self.ledger.series(),
            "requests": self.ledger.rows(100),
            "lessons": self.lesson_rows(),
            "cache": cache,
            "settings": settings.shown(),
        }

    def lesson_rows(self):
        """[{upstream, model, field, value, text}] of all lessons."""
        return [
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


def place_of(plan):
    """Where a plan goes, as the status shows it."""
    return {"model": plan.model, "api_base": without_password(plan.base)}


def model_row(name, title):
    """A model as Anthropic's list shows it."""
    row = {"type": "model", "id": name, "display_name": title, "created_at": CREATED}
    return dict(row, description="through ccfix")


def get_json(upstream, url, headers, wait=None, timeout=None, body=None):
    """The JSON object that a URL answers with (to a POST where there is a body).

    {} for anything else, and for an error status. timeout: seconds. Raises ProxyError.
    """
    return fetch_json(upstream, url, headers, wait, timeout, body)[1]


def fetch_json(upstream, url, headers, wait=None, timeout=None, body=None):
    """(HTTP status, JSON object), see `get_json`."""
    method, data = ("GET", None) if body is None else ("POST", to_json_bytes(body))
    reply = upstream.open(method, url, headers, data, wait, timeout)
    try:
        found = as_dict(json_or_none(reply.read(4 << 20))) if reply.status == 200 else {}
        return reply.status, found
    finally:
        reply.close()


# Fields in which rows of /models tell the context window, in tokens, the surest first.
CONTEXT_FIELDS = (
    "max_model_len",  # vLLM
    "context_length",  # OpenRouter
    "context_window",  # Groq
    "max_context_length",  # LM Studio
    "max_prompt_tokens",  # GitHub Copilot
)


def ask_provider(upstream, plan, headers, wait=None):
    """{"owner", "context"} from /models, and from a local server's own endpoint.

    owner: see OWNERS; context: tokens, 0 where nothing tells: OpenAI and most clouds do not.
    Raises ProxyError.
    """

    def ask(url):
        return get_json(upstream, url, headers, wait, timeout=5)

    rows = as_list(ask(plan.url(plan.format.models_path)).get("data"))
    rows = [row for row in rows if isinstance(row, dict)]
    named = [row for row in rows if row.get("id") == plan.model]
    mine = (named or (rows if len(rows) == 1 else [{}]))[0]
    owners = (row.get("owned_by") for row in named + rows)
    owner = str(next(filter(None, owners), ""))
    context = loaded_context(ask, plan, owner) or positive_int(limits_of(mine), *CONTEXT_FIELDS)
    return {"owner": owner, "context": context}


def limits_of(row):
    """The fields of a row of /models, and those that some providers put one level down."""
    limits = as_dict(as_dict(row.get("capabilities")).get("limits"))  # GitHub Copilot
    return dict(as_dict(row.get("top_provider")), **dict(limits, **row))  # OpenRouter's provider


def loaded_context(ask, plan, owner):
    """The context window with which a local server runs the model, 0 where it does not tell.

    ask(url) -> JSON object. llama.cpp's /models has the window that the model was trained with,
    /props the one that it was started with; Ollama tells it for loaded models only.
    """
    root = "%s://%s" % urllib.parse.urlsplit(plan.base)[:2]
    found = {}
    if owner == "llamacpp":
        found = as_dict(ask(root + "/props").get("default_generation_settings"))
    elif OWNERS.get(owner) == "ollama":
        running = map(as_dict, as_list(ask(root + "/api/ps").get("models")))
        found = next((row for row in running if row.get("name") == plan.model), found)
    return positive_int(found, "n_ctx", "context_length")


def connect_lines(address, has_key):
    """(shell, the lines to paste) that connect Claude Code to this proxy."""
    key = "YOUR_PROXY_KEY" if has_key else "ccfix"
    variables = (("ANTHROPIC_BASE_URL", address), ("ANTHROPIC_AUTH_TOKEN", key))
    shells = (("bash", "export %s=%s"), ("powershell", '$env:%s="%s"'))
    return [(shell, [form % pair for pair in variables] + ["claude"]) for shell, form in shells]


# Fields of a ledger row that are attributes of an Exchange.
ROW_FIELDS = ("id", "asked", "stream", "bytes_in", "bytes_out", "retries", "broke")


class Exchange:
    """One client request, from the parsed body to the last event.

    body: the client's, checked by check_request; headers: its, by get(). batches() generates the
    streamed answer, message() is the unstreamed one; one of them is called, and close() at the
    end. wait(sock, seconds) waits for the client as well, writes what silence() gives meanwhile,
    and raises ClientGone.
    """

    def __init__(self, proxy, body, headers, wait, clock=time.monotonic, settings=None, id=""):
        self.proxy, self.body, self.headers, self.wait = proxy, body, headers, wait
        self.clock = clock  # seconds, monotonic
        self.settings = settings or proxy.settings()
        self.id = id or proxy.new_id()
        self.stream = body.get("stream") is True
        self.asked = without_mark(str(body.get("model") or ""))  # the model that the client named
        self.shown = self.settings.disguise_model or self.asked or self.settings.target_model
        with_images = bool(self.settings.target_model_image) and has_images(body)
        profile_of = proxy.profile_of(self.settings)
        self.plan = plan_request(self.settings, self.asked, with_images, profile_of)
        self.writer = None  # the MessageWriter, and ...
        self.reader = None  # ... the format's reader of this try
        self.normalized = self.sent = None  # the request of this try
        self.error = None  # the last try's
        self.retries = 0  # tries again because the provider failed
        self.fixes = 0  # tries again because something was learned
        self.room = 0  # output tokens to ask for, after an overflow
        self.learned = []  # what, in sentences
        self.replies = []  # one a try, for the record
        self.store = proxy.store if self.settings.cache_enabled else None  # a Cache, or None
        self.cache_state = "off"  # or miss, hit
        self.key = None  # the cache key; None where the answer may not be stored
        self.bytes_in = self.bytes_out = 0  # of the request's JSON, and of the answer
        self.began = clock()  # when the request came ...
        self.last_write = self.began  # ... and when the client last got something
        self.last_sign = self.began  # when the provider last sent content
        self.first_ms = None  # milliseconds until the client got the first content
        self.broke = ""  # why the provider's prefix cache was lost

    # -- what goes out

    def event_batches(self):
        """Lists of events: all that one read of the provider's reply brought."""
        batch = []
        for event in self.events():
            if event is not None:
                batch.append(event)
            elif batch:
                self.last_write = self.last_sign = self.clock()
                if self.first_ms is None:
                    self.first_ms = self.spent_ms()
                yield batch
                batch = []
        if batch:
            yield batch

    def batches(self):
        """SSE text, to be written as it comes: one piece for all that one read brought.

        A burst then costs one wake-up, not fifty. Raises ProxyError only before the first piece,
        Dropped in the middle.
        """
        for batch in self.event_batches():
            text = "".join(map(encode_event, batch))
            self.bytes_out += len(text)
            yield text

    def message(self):
        """The whole answer as one message. Raises ProxyError."""
        try:
            events = [event for batch in self.event_batches() for event in batch]
        except Dropped as dropped:
            raise dropped.args[0]
        self.first_ms = self.spent_ms()  # the client sees the content only now
        return fold(events)

    def spent_ms(self):
        """Milliseconds since the request came."""
        return (self.clock() - self.began) * 1000

    def silence(self):
        """SSE text to write in a silence, or "".

        After 15 s message_start, then pings, and after minutes a sign of life: Claude Code 2.1.330
        gives up after 360 s without a head, 300 s without a byte and 600 s of pings alone. Until
        message_start goes out the HTTP status is free, and an error can be one that makes the
        client do the right thing. Raises UpstreamError when the provider only keeps the connection.
        """
        now = self.clock()
        if now - self.last_sign > STALLED * self.settings.target_timeout:
            raise UpstreamError(
                "The provider keeps the connection alive, but sent no content for %d s; try again,"
                " or raise TARGET_TIMEOUT." % (now - self.last_sign),
                504,
                kind="timeout",
            )
        if not self.stream or self.writer is None or self.writer.state in ENDED:
            return ""
        is_held = self.writer.state == IDLE
        if is_held and now - self.began < HOLD_SECONDS:
            return ""
        if not is_held and now - self.last_write < PING_SECONDS:
            return ""
        events = list(self.writer.start()) + [PING] if is_held else [PING]
        if not is_held and now - self.last_sign >= SIGN_SECONDS:
            events = self.reader.idle()
        self.last_write = now
        return "".join(map(encode_event, events))

    # -- where it comes from

    def events(self):
        """Event dicts, and None where all that has arrived is given.

        They come from the cache, a search, or the provider.
        """
        check_messages(self.body)
        if is_search(self.body) and not self.plan.profile.searches:
            return self.unfolded(search_message(self), None)
        hit = self.store and self.from_cache()
        if hit:
            return self.unfolded(hit[0], self.proxy.new_id)
        events = self.from_provider()
        return events if self.key is None else self.store_answer(events)

    def unfolded(self, message, new_id):
        """A finished message as events, under today's name and a fresh id.

        No tokens are counted, as none were used. new_id: for fresh call ids; None leaves them.
        """
        told = {"id": "msg_" + self.id, "model": self.shown, "usage": zero_usage()}
        yield from unfold(dict(message, **told), new_id)
        yield None

    def from_provider(self):
        """Try until an answer comes, learning, waiting and falling back as errors ask for.

        Nothing is tried again once content went out: the client would see it twice.
        """
        while True:
            try:
                yield from self.attempt()
                return
            except UpstreamError as error:
                error.message = redact(error.message, self.settings.secrets())
                self.error = error  # some providers quote the key in its message
                if self.writer.content or not self.again(error):
                    if error.status in (429, 529):
                        # The provider named no time; the client waits longer each time.
                        error.headers.setdefault("retry-after", "5")
                    yield from self.writer.fail(self.sized(error))  # raises it while it can
                    yield None
                    return

    def sized(self, error):
        """An overflow error with the numbers that the provider's words left out.

        The client compacts by them.
        """
        if error.kind != "overflow" or not error.text:
            return error
        prompt, _, limit = error.numbers
        return overflow_error(prompt, limit, self.bytes_in // 4, self.plan.profile.context)

    def attempt(self):
        """One request to the provider, and its reply as events. Raises UpstreamError."""
        plan, proxy = self.plan, self.proxy
        self.writer = self.writer.fresh() if self.writer else self.new_writer()
        self.writer.scope = plan.profile.scope
        self.reader = plan.format.reader(self.writer, plan.profile)
        self.sent = self.write_request(proxy.memory.recall)
        data, outline = encode_request(self.sent)
        if not self.retries + self.fixes:
            self.broke = self.explain_prefix(outline)
        headers = upstream_headers(plan, self.settings, self.headers)
        url, timeout = plan.url(plan.format.path), self.settings.target_timeout
        upstream = proxy.upstream(self.settings)
        reply = upstream.open("POST", url, headers, data, self.wait, timeout)
        kept = []  # what came, for the record
        try:
            if reply.status >= 300:
                kept.append(reply.read(1 << 20))
                raise refusal(reply, kept[0], plan)
            blocks = reply.blocks()
            yield from self.read(reply, record_blocks(blocks, kept) if proxy.recorder else blocks)
        finally:
            reply.close()
            row = {"status": reply.status, "headers": dict(reply.headers.items())}
            self.replies.append(dict(row, body=b"".join(kept)))
        proxy.memory.keep(self.writer.memory)

    def new_writer(self):
        """The MessageWriter of the first try."""
        return MessageWriter(
            "msg_" + self.id,
            self.shown,
            input_tokens=self.bytes_in // 4,
            tools=tool_names(self.body),
            taken=used_ids(self.body),
            new_id=self.proxy.new_id,
        )

    def write_request(self, recall=None):
        """The body for the provider, with the disguise attached and EXTRA_BODY applied.

        recall: see normalize; without it (for the cache key) nothing is attached, as neither
        decides what a right answer is.
        """
        plan, settings = self.plan, self.settings
        profile, memo = plan.profile, self.proxy.memo
        self.normalized = normalize(self.body, profile, recall, memo, self.output_room())
        attach = {"ANTHROPIC_BASE_URL": settings.disguise_api_base, "ANTHROPIC_MODEL": self.shown}
        is_wanted = {"always": True, "auto": not profile.strict}.get(settings.attach_fields)
        attach = attach if recall and is_wanted else ()
        sent = plan.format.write(self.normalized, plan.model, profile, attach)
        return add_extra_body(sent, settings)

    def output_room(self):
        """Output tokens that fit beside the prompt where the context window is known, else 0.

        The prompt is taken larger than it is: a third of a token a byte, or what the provider was
        seen to count.
        """
        profile = self.plan.profile
        if self.room or not profile.context:
            return self.room
        return max(1024, profile.context - int(self.bytes_in * profile.density) - 64)

    def explain_prefix(self, outline):
        """Why this request does not go on where the session's last one stopped, or ""."""
        names = ("x-claude-code-session-id", "x-claude-code-agent-id")
        session = " ".join(self.headers.get(name) or "" for name in names)
        if not session.strip():
            return ""
        return self.proxy.sessions.compare(session + self.plan.model, outline)

    def read(self, reply, blocks):
        """Events of a reply with a good status: SSE or JSON, as its first byte says.

        Neither the request nor the content type decides: xAI answers a stream request with a JSON
        error, DashScope sends SSE to all.
        """
        reader, head = self.reader, first_bytes(blocks)
        start = head.lstrip(BLANK)[:1]
        if start in (b"{", b"[", b"<"):
            yield from reader.feed(whole_reply(read_all(head, blocks), start, self.plan))
            reader.ended = True
        else:
            for payload in sse_payloads(itertools.chain([head], blocks)):
                if payload is None:
                    yield None
                elif payload == "[DONE]":
                    reader.done()
                    break
                else:
                    yield from reader.feed(parse_payload(payload))
        yield from reader.finish()
        yield None
        reply.finish()

    # -- again?

    def again(self, error):
        """Whether to try once more after an error before any content.

        That is, where a lesson was learned, a wait is worth it, or another model takes over. Waits
        where it says so; ClientGone comes through.
        """
        if self.learn_from(error):
            return True
        wait = int(error.headers.get("retry-after") or 0)  # see `retry_after`
        if error.retry and self.retries < self.settings.target_retries and wait <= LONGEST_WAIT:
            self.retries += 1
            self.log_again("info", "try %d" % (self.retries + 1), error)
            self.wait(None, max(wait, 0.4 * 2**self.retries * random.uniform(0.6, 1.2)))
            return True
        has_other = self.settings.target_model_fallback and self.plan.family != "fallback"
        if error.kind not in FALLBACK_KINDS or not has_other:
            return False
        self.plan = self.proxy.plan_of(self.settings, "fallback")
        self.room = self.retries = 0
        self.log_again("warning", self.plan.model + " takes over", error)
        return True

    def log_again(self, level, act, error):
        """Tell the log what is done after an error."""
        self.proxy.log(level, "%s: %s after: %s" % (self.id, act, error.message))

    def learn_from(self, error):
        """Learn from an error -> whether there is something new to try."""
        if self.fixes >= MAX_LESSONS:
            return False
        profile, changes = self.plan.profile, {}
        if not self.room:
            changes, self.room = room_after(error, profile, self.bytes_in)
        changes = changes or learn(error, profile, self.normalized or {}, self.sent or {})
        if not changes:
            return False
        self.fixes += 1
        self.learned += [lesson_text(field, value) for field, value in changes.items()]
        self.proxy.teach(self.plan, changes)
        self.plan = self.plan._replace(profile=apply_lesson(profile, changes))
        if changes.get("images") is False and self.settings.target_model_image:
            self.plan = self.proxy.plan_of(self.settings, "image")
        return True

    # -- cache

    def from_cache(self):
        """What Cache.get has for this request; None for nothing."""
        profile, sent = self.plan.profile, self.write_request()
        normalized = self.normalized
        if profile.untouched:  # sent as it came, with what differs from session to session
            profile = profile._replace(untouched=False)
            normalized = normalize(self.body, profile, memo=self.proxy.memo)
        place = "%s %s" % (self.plan.base, self.plan.model)
        self.key = cache_key(normalized, sent, self.settings.cache_key_mode, place)
        hit = self.store.get(self.key)
        if self.key is not None:
            self.cache_state = "hit" if hit else "miss"
        return hit

    def store_answer(self, events):
        """The events, as they come; a complete answer is stored.

        Not one that a limit cut, nor an empty one, nor the fallback's: the main model's place is
        not taken for long.
        """
        seen = []
        for event in events:
            seen.append(event)
            yield event
        seen = list(filter(None, seen))
        is_done = seen and seen[-1]["type"] == "message_stop" and self.plan.family != "fallback"
        message = fold(seen) if is_done else {}
        if message.get("stop_reason") in WHOLE_ENDS and message["content"]:
            self.store.put(self.key, message, self.spent_ms())

    # -- what is noted

    def broken_by(self):
        """What broke the answer off after it had begun, or ""."""
        return self.error.message if self.error and self.writer.state == FAILED else ""

    def close(self, status, error=""):
        """Note the exchange in the ledger, the log and the record.

        status: what the client got, 499 where it left; error: its text.
        """
        usage = self.reader.usage() if self.reader and self.writer.content else zero_usage()
        row = {name: getattr(self, name) for name in ROW_FIELDS}
        row.update(
            time=self.proxy.now(),
            session=self.headers.get("x-claude-code-session-id") or "",
            model=self.plan.model,
            status=status,
            input=usage["input_tokens"],
            output=usage["output_tokens"],
            cache_read=usage["cache_read_input_tokens"],
            cache_write=usage["cache_creation_input_tokens"],
            first_ms=self.first_ms and round(self.first_ms, 1),
            total_ms=round(self.spent_ms(), 1),
            lessons=self.learned,
            cache=self.cache_state,
            error=error,
        )
        self.proxy.ledger.add(row)
        self.proxy.log("error" if status >= 500 else "info", row_text(row))
        told = {
            "time": row["time"],
            "id": self.id,
            "row": row,
            "request": without_person(self.body),
            "sent": self.sent,
            "client_headers": dict(self.headers.items()),
        }
        if self.settings.log_level == "debug":
            shown = redact(told, self.settings.secrets(), 500)
            self.proxy.log("debug", self.id + " " + compact_json(shown))
        if self.proxy.recorder:
            self.proxy.recorder.write(dict(told, replies=self.replies))


def row_text(row):
    """A ledger row as a line of the log."""
    line = (
        "%(id)s %(asked)s -> %(model)s stream=%(stream)s %(status)s in=%(input)s+%(cache_read)s"
        " out=%(output)s first=%(first_ms)sms total=%(total_ms)sms cache=%(cache)s" % row
    )
    for name, shown in (("retries", " retries=%s"), ("broke", " prefix lost: %s")):
        line += shown % row[name] if row[name] else ""
    return line + (" error: " + row["error"] if row["error"] else "")


def without_person(body):
    """A request for a record or the log, without what tells who and where the user is."""
    return {key: HIDDEN if key in PERSONAL else value for key, value in body.items()}


def record_blocks(blocks, kept):
    """The blocks, as they come; each is put into kept too."""
    for block in blocks:
        kept.append(block)
        yield block


BLANK = b"\xef\xbb\xbf \t\r\n"  # some providers send blank lines while they think


def first_bytes(blocks):
    """The first bytes of a reply that are not only white space."""
    head = b""
    for block in blocks:
        head += block
        if head.strip(BLANK) or len(head) > 1 << 16:
            break
    return head.lstrip(BLANK) or head


def read_all(head, blocks):
    """All of a reply that is not a stream. Raises UpstreamError when it is far too long."""
    raw = bytearray(head)
    for block in blocks:
        raw += block
        if len(raw) > MAX_LINE:
            raise too_long("JSON")
    return bytes(raw)


def whole_reply(raw, start, plan):
    """A reply that is not a stream, as the one chunk (or message) that it is.

    start: its first byte. Raises UpstreamError for a web page or broken JSON. A web page comes
    from a login portal, or from a base URL without its /v1.
    """
    base = without_password(plan.base)
    if start == b"<":
        words = (
            "%s answered with a web page (%s) instead of a completion; check TARGET_API_BASE (-b)."
        )
        raise UpstreamError(words % (base, error_fields(raw)[0]), kind="path")
    body = json_or_none(raw)
    body = body[0] if isinstance(body, list) and body else body
    if not isinstance(body, dict):
        words = "The provider's reply was cut off or is not valid JSON."
        raise UpstreamError(words, kind="cut", retry=True)
    error = error_in_reply(body)
    if error:
        raise error
    if not body.get("choices") and body.get("type") != "message":
        words = "%s answered with JSON that is not a completion: %s"
        raise UpstreamError(words % (base, compact_json(body)[:300]), kind="path")
    return body


def refusal(reply, raw, plan):
    """The UpstreamError of a reply with an error status; a redirect says where it moved."""
    if reply.status < 400:
        place = (without_password(plan.base), reply.headers.get("location"))
        message = "%s has moved to %s; fix TARGET_API_BASE (-b)." % place
        return UpstreamError(message, 404, kind="path")
    return upstream_error(reply.status, reply.headers, raw)


# ---- web search: a server tool that other providers lack


def is_search(body):
    """Whether this is Claude Code's side request for a web search: the server tool and no other.

    It asks "Perform a web search for the query: ..." and reads the results from the blocks.
    """
    tools = [str(as_dict(tool).get("type")) for tool in as_list(body.get("tools"))]
    return bool(tools) and all(kind.startswith("web_search_") for kind in tools)


HIT = {"type": "web_search_result", "encrypted_content": "", "page_age": None}
SEARCH_ERROR = {"type": "web_search_tool_result_error", "error_code": "unavailable"}
NO_SEARCH = (
    "Web search is not configured: set SEARCH_URL in ccfix to a SearXNG address."
    " No search was made."
)


def search_message(exchange):
    """The answer to a web search as a message: results from SEARCH_URL, or a clear error block.

    Never a model's invention, which the client would show as results.
    """
    _, blocks, _ = (split_turns(exchange.body["messages"]) or [("", [], None)])[-1]
    text = "\n".join(block_text(block) for block in blocks if block.get("type") == "text")
    query = re.sub(r"(?is)^.*?web search for the query:\s*", "", text).strip()[:400]
    try:
        hits = search_web(exchange, query)
        content = [dict(HIT, title=title, url=url) for title, url, _ in hits]
        text = "\n\n".join(map("\n".join, hits)) or "The search found nothing."
    except (ProxyError, ValueError) as error:
        content, text = SEARCH_ERROR, str(error)
    call_id = "srvtoolu_" + exchange.proxy.new_id()
    call = {"type": "server_tool_use", "id": call_id, "name": "web_search"}
    result = {"type": "web_search_tool_result", "tool_use_id": call_id, "content": content}
    blocks = [dict(call, input={"query": query}), result, text_block(text)]
    message = {"type": "message", "role": "assistant", "content": blocks}
    return dict(message, stop_reason="end_turn", stop_sequence=None)


def search_web(exchange, query):
    """[(title, url, content)], all strings, of SEARCH_URL's JSON answer, at most ten.

    SearXNG's form: https://docs.searxng.org/dev/search_api.html. Raises ValueError with a sentence
    for the model.
    """
    url = exchange.settings.search_url
    if not url:
        raise ValueError(NO_SEARCH)
    url += ("&" if "?" in url else "?") + urllib.parse.urlencode({"q": query, "format": "json"})
    headers = {"Accept": "application/json", "User-Agent": USER_AGENT}
    upstream = exchange.proxy.upstream(exchange.settings)
    try:
        status, found = fetch_json(upstream, url, headers, exchange.wait, 30)
    except ProxyError as error:
        raise ValueError("The web search failed: %s" % error)
    if not isinstance(found.get("results"), list):
        words = "The web search failed: SEARCH_URL answered HTTP %d without a list of results"
        raise ValueError(words % status)
    rows = [row for row in found["results"][:10] if isinstance(row, dict) and row.get("url")]
    return [
        (str(row.get("title") or row["url"]), str(row["url"]), str(row.get("content") or ""))
        for row in rows
    ]


# ======================================================================================================
# 13  HTTP: handler, routes, the one error funnel, server
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
REQUEST_LINE = re.compile(rb"([!-~]+) ([!-~\x80-\xff]+) HTTP/(\d)\.(\d)\r?\n")
REASONS = http.server.BaseHTTPRequestHandler.responses


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
        error.message = redact(error.message, self.proxy.settings().secrets())
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
                if pieces >= SETTLED and getattr(exchange, "reply", None):
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


# ==================================================================================================
# 14  Status page: what a browser sees at /
# ==================================================================================================

# The page is one answer without a dependency: style and script are inside, and the policy below
# lets the browser load nothing else. It holds no data: its script polls GET /stats (Proxy.status),
# so the key that guards the API guards the figures too, and an open page survives a restart.
#
# Every string in /stats may come from somebody else: a model name from a client, an error from a
# provider. They enter the document through textContent and append() only, which never parse
# markup; a test searches PAGE for all other ways. `sync` rebuilds only what has changed, so a poll
# takes away neither the keyboard's focus nor a selection, and opened details stay open.
#
# A figure that is not known is a dash or is left out, never 0: `cost` is null as long as no request
# had a price, and where only some had one, the tile says how many had none.

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ccfix</title>
<link rel="icon" href="data:,">
<style nonce="{nonce}">
:root {
  color-scheme: light dark;
  --page: #f5f6f7; --card: #fff; --line: #dfe3e6; --ink: #1b2126; --soft: #5b666f;
  --accent: #0b6b78; --pale: #6db1b9; --grey: #8a949c; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121517; --card: #1a1f22; --line: #2e363b; --ink: #e4e8ea; --soft: #98a4ac;
    --accent: #5cc0cd; --pale: #35808a; --grey: #66727a; --bad: #ff8a80;
  }
}
* { margin: 0; }
[hidden] { display: none !important; }
body {
  max-width: 1080px; margin: 0 auto; padding: 24px 16px 72px;
  background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
h1 { font-size: 22px; }
h2 { margin: 32px 0 10px; font-size: 16px; }
button, input {
  padding: 5px 12px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); color: inherit; font: inherit;
}
button { cursor: pointer; }
button:hover { border-color: var(--accent); }
h3, th, dt, small, button, input, pre, code, .soft { font-size: 13px; font-weight: 400; }
h3, th, dt, small, .soft { color: var(--soft); }
.accent { --dot: var(--accent); }
.pale { --dot: var(--pale); }
.grey { --dot: var(--grey); }
.bad { --dot: var(--bad); color: var(--bad); }
#state::before, .key::before {
  content: ""; display: inline-block; width: 9px; height: 9px; margin: 0 4px 0 5px;
  border-radius: 3px; background: var(--dot);
}
.card {
  padding: 14px 16px; border: 1px solid var(--line);
  border-radius: 8px; background: var(--card);
}
.grid {
  display: grid; gap: 12px; margin-top: 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least, 400px)), 1fr));
}
#tiles { --least: 140px; }
#plots { --least: 250px; }
.bar {
  display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center; gap: 4px 6px;
}
#key-form { margin-top: 32px; }
#key-form input { flex: 1 1 200px; }
#flow { display: flex; flex-wrap: wrap; gap: 0 28px; margin-top: 18px; }
#flow > :last-child { flex: 1 1 300px; }
#flow strong { display: block; font-size: 19px; }
#flow > span { align-self: center; color: var(--accent); font-size: 22px; }
ul { padding: 0; list-style: none; }
li, pre, .pairs { margin-top: 6px; }
ul:empty, dl:empty { display: none; }
dt + dd { font-size: 24px; font-weight: 600; }
svg {
  display: block; width: 100%; height: 72px; margin: 8px 0 4px;
  border-bottom: 1px solid var(--line);
}
rect { fill: var(--dot, transparent); }
g:hover .hover { fill: var(--accent); fill-opacity: .12; }
pre { white-space: pre-wrap; }
.scroll { padding: 2px 0; overflow-x: auto; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 7px 12px; text-align: left; vertical-align: baseline; }
td { border-top: 1px solid var(--line); }
td small, li small { display: block; }
td small.bad { max-height: 3em; overflow: hidden; }
thead:only-child::after { content: "No request yet."; display: block; padding: 7px 12px; }
.n { text-align: right; white-space: nowrap; }
.name { width: 40%; }
[data-id] { cursor: pointer; }
[data-id]:hover { background: var(--page); }
[data-id] button { padding: 0; border: 0; background: none; font-size: 15px; white-space: nowrap; }
[data-id] button::before { content: "\25b8"; display: inline-block; width: 14px; }
[data-id] [aria-expanded=true]::before { content: "\25be"; }
.detail td { padding-top: 0; border-top: 0; }
.pairs { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: 3px 16px; }
.pairs div { display: contents; }
.pairs dd { font: inherit; white-space: pre-wrap; }
.detail .pairs { margin: 0; padding: 10px 12px; border-radius: 6px; background: var(--page); }
.changed { color: var(--accent); font-size: 13px; }
#message {
  position: fixed; inset: auto 20px 20px; width: fit-content; margin: 0 auto;
  border-radius: 8px; background: var(--ink); color: var(--page);
}
#message:not(:empty) { padding: 10px 18px; }
@media (max-width: 700px) {
  #flow > span { transform: rotate(90deg); }
  th, td { padding: 7px 6px; }
  .wide, #settings thead { display: none; }
  #settings tr { display: flex; flex-wrap: wrap; justify-content: space-between; }
  #settings td:first-child { width: 100%; }
  #settings td + td { padding-top: 0; border: 0; }
}
</style>
</head>
<body>
<header class="bar">
  <h1>ccfix <small id="version"></small></h1> <small id="state" class="grey">connecting</small>
</header>
<noscript>This page needs JavaScript; the same numbers are at /stats as JSON.</noscript>
<form id="key-form" class="card bar" hidden>
  <label for="key">This proxy asks for its key.</label>
  <input id="key" type="password" autocomplete="off" required
    pattern="\s*[!-~]+\s*" title="letters, digits and signs">
  <button>Show the status</button>
</form>
<main id="content" hidden>
  <div class="card" id="flow">
    <div>
      <h3>Claude Code sees</h3>
      <strong id="disguise"></strong><small id="disguise-base"></small>
    </div>
    <span aria-hidden="true">&rarr;</span>
    <div>
      <h3>The answers come from</h3>
      <strong id="target"></strong><small id="target-base"></small>
      <ul id="routes" class="soft"></ul>
    </div>
  </div>
  <dl id="tiles" class="grid" aria-label="Totals since the start">
    <div class="card">
      <dt>Requests</dt><dd id="requests-total"></dd><dd class="soft" id="active"></dd>
    </div>
    <div class="card"><dt>Errors</dt><dd id="errors-total"></dd></div>
    <div class="card"><dt>Tokens in</dt><dd id="input-total"></dd></div>
    <div class="card"><dt>Tokens out</dt><dd id="output-total"></dd></div>
    <div class="card">
      <dt>Prompt cache read</dt><dd id="cache_read-total"></dd><dd class="soft" id="share"></dd>
    </div>
    <div class="card">
      <dt>Cost</dt><dd id="cost-total"></dd><dd class="soft" id="cost-hint"></dd>
    </div>
  </dl>
  <section id="plots" class="grid"></section>

  <h2>Connect</h2>
  <div id="connect" class="grid"></div>

  <h2>Last requests</h2>
  <div class="card scroll"><table id="requests"></table></div>

  <div class="grid">
    <section>
      <h2>Response cache</h2>
      <div class="card">
        <div class="bar">
          <p id="cache-mode"></p>
          <span>
            <button id="cache-expired">Clear expired</button>
            <button id="cache-clear">Clear</button>
          </span>
        </div>
        <p class="bad" id="cache-error"></p>
        <dl id="cache-text" class="pairs"></dl>
      </div>
    </section>
    <section>
      <h2>Lessons learned</h2>
      <div class="card">
        <div class="bar">
          <p id="lessons-count"></p>
          <button id="lessons-forget">Forget all</button>
        </div>
        <ul id="lessons"></ul>
      </div>
    </section>
  </div>

  <h2>Settings</h2>
  <div class="card scroll">
    <table id="settings">
      <thead>
        <tr><th>Name</th><th>Value</th><th>From</th></tr>
      </thead>
      <tbody></tbody>
    </table>
  </div>
</main>
<p id="message" role="status"></p>
<script nonce="{nonce}">
"use strict";
// refresh() -> call("stats") -> show(stats) -> one function a section.
const POLL_MS = 2000, PATIENCE_MS = 10000;
const NONE = "\u2013", DOT = " \u00b7 ";
let polling = false, pollTimer, messageTimer;

// -- DOM
const byId = id => document.getElementById(id);
function put(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}
function fill(node, attributes, children) {
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  node.append(...children);
  return node;
}
const el = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Make parent's children show items; a child whose item is as before stays as it is.
function sync(parent, items, build) {
  const kept = new Map([...parent.children].map(child => [child.key, child]));
  const keys = items.map(item => JSON.stringify(item));
  kept.forEach((child, key) => keys.includes(key) || child.remove());
  keys.forEach((key, index) => {
    const child = kept.get(key) || build(items[index]), there = parent.children[index];
    child.key = key;
    if (child !== there) parent.insertBefore(child, there);
  });
}

// -- Numbers as text; what is not known (null, 0 / 0) is a dash
const orDash = format => value => Number.isFinite(value) ? format(value) : NONE;
const number = orDash(value => value.toLocaleString("en-US"));
const percent = orDash(value => Math.round(value * 100) + " %");
const money = orDash(value => value.toFixed(value < 1 ? 4 : 2));  // PRICES names no currency
const clock = orDash(time => new Date(time * 1000).toLocaleTimeString("en-GB"));
const compact = orDash(value => {
  let power = 0;
  for (; value >= 1000 && power < 3; power += 1) value /= 1000;
  const text = power && value < 100 ? value.toFixed(1) : Math.round(value);
  return text + ["", "k", "M", "G"][power];
});
const bytes = orDash(value => compact(value).replace(/[kMG]?$/, " $&B"));
const span = orDash(seconds => {  // in its two largest units
  const parts = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]].map(([unit, size]) => {
    const amount = Math.floor(seconds / size);
    seconds -= amount * size;
    return amount && amount + " " + unit;
  });
  return parts.filter(Boolean).slice(0, 2).join(" ") || "0 s";
});
const duration = orDash(ms =>
  ms < 1000 ? Math.round(ms) + " ms"
    : ms < 60000 ? (ms / 1000).toFixed(1) + " s" : span(ms / 1000));
const list = (...texts) => texts.filter(Boolean).join(DOT);
const count = (amount, one, many) => number(amount) + " " + (amount === 1 ? one : many);
// "input" leaves out what was read from the cache, as in Anthropic's usage.
const readShare = row => row.cache_read / (row.input + row.cache_read);

// -- Talking to the proxy
let memory = {};  // keeps the key: as long as the tab, or the page where storage is forbidden
try { memory = sessionStorage; } catch (error) { }

// The JSON of an answer; throws an Error with a message to show, and the status if there was one.
async function call(path, method) {
  const headers = memory.ccfixKey ? { "x-api-key": memory.ccfixKey } : {};
  const options = { method, headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) };
  const response = await fetch(path, options).catch(() => {
    throw new Error("the proxy does not answer");
  });
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const message = body.error ? body.error.message : "the proxy answered " + response.status;
  throw Object.assign(new Error(message), { status: response.status });
}
function tell(text) {
  put("message", text);
  clearTimeout(messageTimer);
  messageTimer = setTimeout(put, PATIENCE_MS, "message", "");
}
function setState(color, text) {
  byId("state").className = color;
  put("state", text);
}
async function refresh() {
  if (polling || document.hidden) return;
  clearTimeout(pollTimer);
  polling = true;
  try { show(await call("stats")); } catch (error) { lose(error); }
  polling = false;
  // Do not knock on with a wrong key: wait for the form.
  if (byId("key-form").hidden) pollTimer = setTimeout(refresh, POLL_MS);
}
function lose({ status, message }) {
  if (status === 401) return askForKey();
  if (byId("state").className === "accent") tell("Not up to date: " + message + ".");
  setState("bad", message);
}
function askForKey() {
  if (memory.ccfixKey) tell("That key was not accepted.");
  memory.ccfixKey = "";
  byId("key-form").hidden = false;
  byId("content").hidden = true;
  setState("grey", "locked");
  byId("key").focus();
}
async function copy(source) {
  try {
    await navigator.clipboard.writeText(source.textContent);
    tell("Copied.");
  } catch (error) {  // no clipboard outside https and localhost: select it for the user
    getSelection().selectAllChildren(source);
    tell("Selected: press Ctrl+C or Cmd+C.");
  }
}

// -- Sections
function show(stats) {
  byId("key-form").hidden = true;
  byId("content").hidden = false;
  setState("accent", list(stats.demo && "demo", "up " + span(stats.uptime_s), stats.address));
  put("version", stats.version);
  showModels(stats);
  showTotals(stats.totals);
  showPlots(stats);
  sync(byId("connect"), Object.entries(stats.connect), shellCard);
  sync(byId("requests"), ["head", ...stats.requests],
    row => row === "head" ? headRow() : requestRow(row));
  showCache(stats.cache);
  showLessons(stats.lessons);
  sync(byId("settings").tBodies[0], stats.settings, settingRow);
}
const pair = ([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text));
function showModels({ target, disguise, routes }) {
  document.title = target.model + " - ccfix";
  put("disguise", disguise.model || "the name it asks for");
  put("disguise-base", disguise.api_base);
  put("target", target.model);
  put("target-base", list(target.api_base, "profile " + target.profile, target.format));
  sync(byId("routes"), routes,
    row => el("li", {}, row.family + " \u2192 " + row.model + " at " + row.api_base));
}
function showTotals(totals) {
  for (const name of ["requests", "errors", "input", "output", "cache_read"])
    put(name + "-total", number(totals[name]));
  byId("errors-total").className = totals.errors ? "bad" : "";
  put("active", number(totals.active) + " running now");
  put("share", percent(readShare(totals)) + " of the input");
  put("cost-total", money(totals.cost));
  put("cost-hint", totals.cost === null ? "no price known: set PRICES" : totals.unpriced
    ? count(totals.unpriced, "request", "requests") + " without a price" : "");
}
function shellCard([shell, lines]) {
  const code = el("code", {}, lines.join("\n"));
  const button = el("button", { "aria-label": "Copy the lines for " + shell }, "Copy");
  button.addEventListener("click", () => copy(code));
  const bar = el("div", { class: "bar" }, el("h3", {}, shell), button);
  return el("div", { class: "card" }, bar, el("pre", {}, code));
}

// Plots: title, format, top of the scale (0: the highest bar), parts of the bar of a minute;
// parts: class, name, value of a row of stats.series.
const PLOTS = [
  ["Tokens a minute", compact, 0, [
    ["accent", "in", row => row.input],
    ["pale", "cached", row => row.cache_read],
    ["grey", "out", row => row.output],
  ]],
  ["Latency to first content", duration, 0, [["accent", "", row => row.first_ms]]],
  ["Cache-read share of input", percent, 1, [["accent", "", readShare]]],
  ["Cost a minute", money, 0, [["accent", "", row => row.cost]]],
];
function showPlots({ series, totals }) {
  const plots = PLOTS.map(([title, , , parts], index) => {
    const bars = series.map((row, x) => ({ x, t: row.t, values: parts.map(part => part[2](row)) }));
    return { title, index, bars: bars.filter(bar => Number.isFinite(bar.values[0])) };
  });
  const shown = totals.cost === null ? plots.slice(0, -1) : plots;
  sync(byId("plots"), shown, plot => plotFigure(plot, series.length));
}
function plotFigure({ title, index, bars }, minutes) {
  const [, format, top, parts] = PLOTS[index];
  const sums = bars.map(bar => bar.values.reduce((a, b) => a + b)), peak = Math.max(...sums);
  const summary = !bars.length ? "nothing yet"
    : "last " + format(sums.at(-1)) + ", peak " + format(peak);
  const label = title + " in the last hour: " + summary, scale = 96 / (top || peak || 1);
  const box = { viewBox: "0 0 " + minutes + " 100", preserveAspectRatio: "none" };
  const drawing = svg("svg", { ...box, role: "img", "aria-label": label },
    ...bars.map(bar => barShape(bar, parts, format, scale)));
  const keys = parts.filter(part => part[1])
    .map(([color, name]) => el("span", { class: "key " + color }, name));
  const axis = [["1 h ago"], keys, ["now"]].map(texts => el("span", {}, ...texts));
  return el("div", { class: "card" }, el("h3", {}, title), el("small", {}, summary), drawing,
    el("div", { class: "bar soft" }, ...axis));
}
function barShape({ x, t, values }, parts, format, scale) {
  const texts = parts.map((part, index) => format(values[index]) + " " + part[1]);
  const group = svg("g", {}, svg("title", {}, clock(t) + DOT + texts.join(", ")),
    svg("rect", { class: "hover", x, width: 1, height: 100 }));
  let y = 100;
  parts.forEach(([color], index) => {
    const height = values[index] * scale;
    y -= height;
    group.append(svg("rect", { class: color, x: x + 0.1, y, width: 0.8, height }));
  });
  return group;
}

// The table: title, class, cell. A phone leaves out what is "wide"; the details have it.
const COLUMNS = [
  ["Time", "", row => el("button", { "aria-expanded": false }, clock(row.time))],
  ["Model", "name", modelCell],
  ["Status", "n", ({ status, error }) =>
    el("span", { class: status >= 400 || error ? "bad" : "" }, status || NONE)],
  ["In", "n wide", row => number(row.input)],
  ["Cache read", "n wide", row => number(row.cache_read)],
  ["Out", "n wide", row => number(row.output)],
  ["First", "n wide", row => duration(row.first_ms)],
  ["Total", "n", row => duration(row.total_ms)],
];
// What a click on a row shows, where there is something to show.
const DETAILS = [
  ["Error", row => row.error],
  ["Prefix cache lost", row => row.broke],
  ["Lessons", row => row.lessons.join("\n")],
  ["Asked for", row => row.asked],
  ["Called", row => row.model],
  ["When", row => new Date(row.time * 1000).toLocaleString("en-GB")],
  ["Tokens", row => list(number(row.input) + " in", number(row.cache_read) + " cache read",
    number(row.output) + " out")],
  ["Latency", row => list(duration(row.first_ms) + " to first content",
    duration(row.total_ms) + " in all")],
  ["Cost", row => row.cost === null ? "" : money(row.cost)],
  ["Bytes", row => list(bytes(row.bytes_in) + " in", bytes(row.bytes_out) + " out")],
  ["Mode", row => list(row.stream ? "streamed" : "whole", retries(row),
    row.cache && "cache " + row.cache)],
  ["Session", row => row.session],
  ["Id", row => row.id],
];
const retries = row => row.retries && count(row.retries, "retry", "retries");
function modelCell(row) {
  const learned = row.lessons.length;
  const notes = list(row.cache === "hit" && "answered from the cache", retries(row),
    learned && count(learned, "lesson", "lessons"), row.broke && "prefix cache lost");
  const lines = [el("small", { class: "bad" }, row.error || ""), el("small", {}, notes)];
  return el("span", {}, row.model || row.asked || NONE, ...lines.filter(line => line.textContent));
}
function headRow() {
  const cells = COLUMNS.map(([title, kind]) => el("th", { class: kind }, title));
  return el("thead", {}, el("tr", {}, ...cells));
}
// A request is a tbody of its own, which takes the details in when its row is clicked.
function requestRow(row) {
  const cells = COLUMNS.map(([, kind, cell]) => el("td", { class: kind }, cell(row)));
  const line = el("tr", { "data-id": row.id }, ...cells), body = el("tbody", {}, line);
  line.addEventListener("click", () => {
    const details = line.nextElementSibling;
    if (details) details.remove();
    else body.append(detailRow(row));
    line.querySelector("button").setAttribute("aria-expanded", !details);
  });
  return body;
}
function detailRow(row) {
  const pairs = DETAILS.map(([name, text]) => [name, text(row)]).filter(([, text]) => text);
  const details = el("dl", { class: "pairs" }, ...pairs.map(pair));
  return el("tr", { class: "detail" }, el("td", { colspan: COLUMNS.length }, details));
}
function showCache(cache) {
  put("cache-mode", !cache.enabled ? "Off (CACHE_ENABLED)"
    : "On, key mode " + cache.mode + ", kept for " + span(cache.ttl));
  put("cache-error", cache.error || "");
  sync(byId("cache-text"), !cache.enabled ? [] : [
    ["Hit rate", list(percent(cache.hit_rate),
      number(cache.hits) + " hits, " + number(cache.misses) + " misses")],
    ["Kept", list(count(cache.entries, "entry", "entries"), bytes(cache.bytes))],
    ["So far", number(cache.inserts) + " stored, " + number(cache.evictions) + " evicted"],
    ["Saved", duration(cache.saved_ms) + " of waiting"],
  ], pair);
}
function showLessons(lessons) {
  const many = lessons.length;
  put("lessons-count", many ? count(many, "lesson", "lessons") : "Nothing had to be learned yet.");
  byId("lessons-forget").hidden = !many;
  sync(byId("lessons"), lessons,
    row => el("li", {}, row.text, el("small", {}, row.model + " at " + row.upstream)));
}
function settingRow({ name, help, value, origin }) {
  return el("tr", {},
    el("td", {}, el("code", {}, name), el("small", { class: "wide" }, help)),
    el("td", {}, value || NONE),
    el("td", { class: origin === "default" ? "soft" : "changed" }, origin));
}

// -- Start
function onPress(id, path, done) {
  byId(id).addEventListener("click", async () => {
    try { tell(done + ": " + number((await call(path, "POST")).removed) + " removed."); }
    catch (error) { tell("Not done: " + error.message); }
    refresh();
  });
}
onPress("cache-clear", "cache/clear", "Cache cleared");
onPress("cache-expired", "cache/clear-expired", "Expired entries cleared");
onPress("lessons-forget", "lessons/forget", "Lessons forgotten");
byId("key-form").addEventListener("submit", event => {
  event.preventDefault();
  memory.ccfixKey = byId("key").value.trim();
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
    """The status page, for GET / of a browser -> bytes.

    nonce: a fresh random string for each answer, the same as in `page_policy`.
    """
    return PAGE.replace("{nonce}", nonce).encode("ascii")


def page_policy(nonce):
    """The Content-Security-Policy of the page (https://www.w3.org/TR/CSP3/) -> string.

    It allows the page's own style and script, by their nonce, and calls to this server. img-src is
    for the empty icon alone, without which a browser asks for /favicon.ico. frame-ancestors keeps
    other sites from showing the page, and its buttons, in a frame of theirs.
    """
    return (
        "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ).format(nonce)


# ======================================================================================================
# 15  Demo: an embedded model, reached like any other provider
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
# 16  Commands: serve, run, check, init, install, uninstall, open
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
        text = redact(text, self.secrets)
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
            answer = glance_json(upstream, base + "/models", GLANCE_SECONDS)
        except ProxyError:
            continue
        if (
            answer.get("object") == "list"
        ):  # our own proxy's list, in Anthropic's form, has no such field
            found.append((title, base, model_names(answer)))
    upstream.close()
    return [row for row in found if row[2]]


def glance_json(upstream, url, seconds, headers=()):
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
            glance_json(
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
    known = family_of(plan.model) or "claude" in plan.model.lower()
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


# ---- check: what the target can do, through the code that serves ---------------------------------
#
# A row of CHECKS is a name and a function that asks one thing of the target and returns a Verdict.
# It asks through the Proxy and Exchange that serve Claude Code, so a row shows what Claude Code
# would get, with everything that ccfix does for it except second tries. A ProxyError on the way is
# a verdict as well. Each docstring says what the row proves, and what Claude Code does without it
# (seen with Claude Code 2.1.330).

ROW_SECONDS, LONG_SECONDS = 60, 180  # for one question; for a long prompt on a small machine
ANSWER_TOKENS = 400  # enough for a model that thinks before it calls a tool
FIRST_REQUEST = 13000  # tokens of Claude Code's first request, by its own count
# Tokens of a context window. Below the first, hardly a file fits in beside that request; up to the
# second, a conversation is compacted often: Claude Code keeps 33,000 tokens free.
LEAST_CONTEXT, GOOD_CONTEXT = 20000, 64000
CODE_WORD = "ZEBRA-42"

# The tool of all rows about tools, described as Claude Code describes its own.
WEATHER = {
    "name": "get_weather",
    "description": "The weather of today at a place.",
    "input_schema": {
        "type": "object",
        "properties": {"place": {"type": "string"}},
        "required": ["place"],
        "additionalProperties": False,
    },
}
# name -> arguments of Tester.ask. Several rows look at these answers, so each is asked only once.
QUESTIONS = {
    "plain": {"content": "Reply with the one word: pong", "stream": False},
    "count": {"content": "Count from 1 to 30 in digits, separated by blanks."},
    "tool": {"content": "What is the weather in Paris? Use the tool.", "tools": [WEATHER]},
}
# A PNG in base64. 64 x 64 pixels, since some vision models refuse a picture of under 28.
RED_SQUARE = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAAA1BMVEX/AAAZ4gk3AAAAD0lEQVR42mNgGAWj"
    "gHwAAAJAAAHgTR1EAAAAAElFTkSuQmCC"
)

TRAINED = "choose a model that was trained for tools"
# kind of a ProxyError -> what to do. The other kinds have no fix that helps in general.
ADVICE = {
    "auth": "set the right key: -k KEY, or TARGET_API_KEY in the environment or .env",
    "billing": "add credit at the provider, or choose another one",
    "policy": "ask the provider what this key may use",
    "model": "choose one of the provider's models: -m NAME, or TARGET_MODEL",
    "path": "check the base URL (-b, TARGET_API_BASE): most end in /v1",
    "overflow": "choose a model with a larger context window, or raise the server's "
    "(llama.cpp: -c, vLLM: --max-model-len, Ollama: OLLAMA_CONTEXT_LENGTH=65536)",
    "timeout": "try again; for a server that is always slow, raise TARGET_TIMEOUT",
    "rate": "wait until the provider's limit allows more, or ask for a higher one",
    "overloaded": "try again later, or set TARGET_MODEL_FALLBACK",
    "server": "try again later; if it persists, see the server's own log",
    "cut": "try again; if it persists, see the server's log, and look for proxies in between",
    "sampling": TRAINED,
}
# profile -> what makes tools work there, where a model trained for them is not enough
NO_TOOLS = {
    "vllm": "start vLLM with --enable-auto-tool-choice and the model's --tool-call-parser",
    "sglang": "start SGLang with the model's --tool-call-parser",
    "llamacpp": "start llama-server with --jinja, and " + TRAINED,
    "ollama": "choose a model that Ollama's library tags with 'tools'",
    "lmstudio": "choose a model that LM Studio marks with a hammer",
}

# What a row found. status: ok, fail, or skip where it cannot tell; seen: what, in a few words; fix:
# what to do about it, or "".
Verdict = collections.namedtuple("Verdict", "status seen fix")


def ok(seen):
    """The row holds."""
    return Verdict("ok", seen, "")


def skip(seen):
    """The row cannot tell, and is no reason to doubt the target."""
    return Verdict("skip", seen, "")


def fail(seen, fix=""):
    """The row does not hold; whether Claude Code can work all the same is said in CHECKS."""
    return Verdict("fail", seen, fix)


def failure(error):
    """The Verdict of a ProxyError that a request to the target ended with."""
    # A connection error brings its own advice: "... (Connection refused): check that ..."
    seen, parenthesis, advice = error.message.partition("): ")
    if error.kind == "connect" and parenthesis:
        return fail(seen + ")", advice)
    return fail(error.message, ADVICE.get(error.kind, ""))


def quote(text):
    """The beginning of a model's words, in quotes, on one line."""
    return ascii(text[:40]) + ("..." if len(text) > 40 else "")


class Answer:
    """What the target answered to one question. Raises ProxyError, like Exchange.events."""

    def __init__(self, exchange):
        events, began = [], time.monotonic()
        self.marks = []  # seconds after which each piece of text, thinking or arguments came
        for event in filter(None, exchange.events()):
            events.append(event)
            if event["type"] == "content_block_delta":
                self.marks.append(time.monotonic() - began)
        if exchange.broken_by():
            raise exchange.error
        self.message = fold(events)  # Anthropic's message (dict)
        self.plan = exchange.plan  # with the lessons learned on the way
        self.usage = exchange.reader.raw_usage  # the provider's own; {} if it told none
        self.tokens = exchange.reader.usage()  # Anthropic's usage; estimated if need be
        # Tokens of the prompt, whether they were read anew, from a cache or into one.
        names = [name for name in self.tokens if name.endswith("input_tokens")]
        self.prompt = sum(self.tokens[name] for name in names)
        self.text = "".join(block["text"] for block in self.blocks("text")).strip()

    def blocks(self, kind):
        return [block for block in self.message["content"] if block["type"] == kind]

    def calls(self):
        """The tool calls that fit WEATHER; Claude Code answers any other with an error."""
        return [
            block
            for block in self.blocks("tool_use")
            if block["name"] == WEATHER["name"] and isinstance(block["input"].get("place"), str)
        ]


def question_body(model, content):
    """The body of an Anthropic request with one user message."""
    messages = [{"role": "user", "content": content}]
    return {"model": model, "max_tokens": ANSWER_TOKENS, "stream": True, "messages": messages}


class Tester:
    """What the rows share: a Proxy that tries nothing twice, and what the target has said so far.

    settings is changed, so that nothing in it hides or repairs what the target does. asked: the
    model name that Claude Code would ask for; its family decides where requests go. models: the
    names that the provider lists, once a row has looked. To be closed.
    """

    def __init__(self, settings, asked="ccfix-check"):
        self.settings, self.asked, self.models = settings, asked, []
        self.known = {}  # name of a question -> its Answer, or the ProxyError that it ended with
        settings.target_retries, settings.target_model_fallback = 0, ""
        settings.cache_enabled, settings.record_dir = False, ""
        out = sys.stderr if settings.log_level == "debug" else io.StringIO()
        self.proxy = Proxy(lambda: settings, Log(settings, out))

    @property
    def plan(self):
        """Where requests go, and how. Each time anew: a probe or a lesson changes the profile."""
        profile_of = self.proxy.profile_of(self.settings)
        return plan_request(self.settings, self.asked, False, profile_of)

    def ask(self, content="", limit=ROW_SECONDS, **fields):
        """The Answer to a user's content (string or blocks), within `limit` seconds.

        fields: further fields of the request, or others instead. Raises ProxyError.
        """
        body = dict(question_body(self.asked, content), **fields)
        exchange = Exchange(self.proxy, body, {}, patience(limit))
        exchange.bytes_in = len(compact_json(body))
        try:
            return Answer(exchange)
        except Dropped as dropped:  # a stream that broke off: here, just another error
            raise dropped.args[0]

    def once(self, name):
        """The Answer to one of QUESTIONS. What it raised the first time it raises each time."""
        if name not in self.known:
            try:
                self.known[name] = self.ask(**QUESTIONS[name])
            except ProxyError as error:
                self.known[name] = error
        if isinstance(self.known[name], ProxyError):
            raise self.known[name]
        return self.known[name]

    def plain_error(self):
        """The ProxyError that the plain question ends with, or None."""
        try:
            self.once("plain")
        except ProxyError as error:
            return error

    def close(self):
        """Close the connections that are kept alive, and the store."""
        if self.proxy.wires:
            self.proxy.wires[1].close()
        if self.proxy.store:
            self.proxy.store.close()


def models_url(plan):
    """Where a provider lists its models."""
    return plan.url(plan.format.models_path)


# The first four rows. Where one of them fails, the rest would only say the same again.


def is_reachable(tester):
    """Name, network, proxy and TLS work: any HTTP answer will do.

    Otherwise Claude Code says "API Error" after three minutes of trying again.
    """
    plan, upstream = tester.plan, tester.proxy.upstream(tester.settings)
    headers = upstream_headers(plan, tester.settings, {})
    tester.models = model_names(get_json(upstream, models_url(plan), headers, patience(20)))
    tester.proxy.probe(plan, patience(10))  # tells a local server's kind, and so its profile
    way = upstream.route(plan.base)
    seen = host_port(way.host, way.port) + " answers"
    if way.scheme == "https":
        seen += ", TLS %s" % ("NOT verified (INSECURE)" if tester.settings.insecure else "verified")
    if way.proxy:
        seen += ", through the proxy " + host_port(*way.proxy)
    return ok("%s; profile %s" % (seen, tester.plan.profile.name))


def judge_plain(tester, kinds, seen):
    """The Verdict by the plain question: `seen` if it was answered, else whether it failed with
    one of these kinds of errors; another row tells of the others."""
    error = tester.plain_error()
    if error is None:
        return ok(seen)
    if error.kind in kinds:
        return failure(error)
    return skip("unknown: the question failed otherwise, see below")


def takes_key(tester):
    """The key holds. A question proves it, since many providers list their models to everyone.

    Otherwise every turn ends with an error about the login (401, 403) or the credit (402).
    """
    seen = "accepted" if tester.plan.key else "none given, none needed"
    return judge_plain(tester, ("auth", "billing", "policy", "connect"), seen)


def has_model(tester):
    """The provider knows the model; otherwise the fix has names from its list.

    Without it, Claude Code says that the selected model may not exist (404).
    """
    model = tester.plan.model
    kinds = () if model in tester.models else ("model", "path")
    verdict = judge_plain(tester, kinds, model)
    if verdict.status != "fail":
        return verdict
    import difflib  # nothing else needs it, and a start should not wait for it

    # At 0.3 "sonnet" is still like "anthropic/claude-sonnet-4.5".
    near = difflib.get_close_matches(model, tester.models, 12, 0.3) or tester.models[:12]
    fix = "-m with one of: " + shorten(", ".join(near), 300) if near else ADVICE["model"]
    if tester.plain_error().kind == "model":
        return fail("the provider has no model " + model, fix)
    return fail("no such address, or no model " + model, ADVICE["path"] + "; or " + fix)


def answers_plainly(tester):
    """A whole answer, without streaming: what Claude Code asks for after a stream has failed."""
    return judge_text(tester.once("plain"))


def judge_text(answer):
    """The Verdict of an answer that should be text."""
    if answer.text:
        return ok("%s, %d tokens" % (quote(answer.text), answer.tokens["output_tokens"]))
    if answer.blocks("tool_use"):
        return fail("a tool call instead of text", TRAINED)
    if answer.blocks("thinking"):
        return ok("thinking only, within %d tokens" % ANSWER_TOKENS)
    fix = "choose another model, or see the server's log: its chat template may not fit"
    return fail("an empty answer", fix)


# The stream.


def streams(tester):
    """The answer comes in pieces. In one piece it works as well, but nothing is seen for long."""
    answer = tester.once("count")
    if not answer.marks:
        return fail("an empty stream", ADVICE["server"])
    if len(answer.marks) == 1 and answer.tokens["output_tokens"] > 8:
        return ok("all in one piece, at the end: the server, or a proxy in between, holds it back")
    return ok("%d pieces in %.1f s" % (len(answer.marks), answer.marks[-1]))


def tells_usage(tester):
    """The stream tells token counts. Claude Code adds them up to know when to compact; where there
    are none, ccfix sends estimates in their place."""
    usage = tester.once("count").usage
    told = (
        positive_int(usage, "prompt_tokens", "input_tokens"),
        positive_int(usage, "completion_tokens", "output_tokens"),
    )
    if all(told):
        return ok("%d in, %d out" % told)
    seen = "none: token counts are estimates, so compaction may come early or late"
    return fail(seen, "turn on usage in the server's streams")


def is_fast(tester):
    """How long a user waits, and how fast the answer comes then; for a person to judge."""
    answer = tester.once("count")
    # The first content is at `first` already, so that one token less came in between.
    first, last = (answer.marks or [0])[0], (answer.marks or [0])[-1]
    seen = "first content after %.2f s" % first
    if last > first:
        seen += ", then %.0f tokens/s" % ((answer.tokens["output_tokens"] - 1) / (last - first))
    return ok(seen)


# Tools: without them Claude Code reads no file and runs no command, it only talks.


def calls_tool(tester):
    """The model calls a tool when it is told to."""
    return judge_call(tester, tester.once("tool"))


def judge_call(tester, answer):
    """The Verdict of an answer that should call WEATHER."""
    if answer.calls():
        return ok("get_weather(%s)" % compact_json(answer.calls()[0]["input"]))
    seen = "text instead of a call: " + quote(answer.text)
    if answer.blocks("tool_use"):
        call = answer.blocks("tool_use")[0]
        seen = "a call that does not fit the tool: " + compact_json(call["input"])
    return fail(seen, NO_TOOLS.get(tester.plan.profile.name, TRAINED))


def calls_forced_tool(tester):
    """tool_choice is obeyed; the words alone would not lead to a call."""
    choice = {"type": "tool", "name": WEATHER["name"]}
    answer = tester.ask("Good morning! I am in Rome.", tools=[WEATHER], tool_choice=choice)
    if answer.calls():
        return ok("called when told to")
    fix = "Claude Code needs it only for --json-schema and a few side requests"
    return judge_call(tester, answer)._replace(fix=fix)


def calls_in_parallel(tester):
    """One answer has two calls. Claude Code then runs both at once; otherwise, turn by turn."""
    question = "What is the weather in Paris, and what in Rome? Call the tool for both at once."
    calls = len(tester.ask(question, tools=[WEATHER]).calls())
    if calls > 1:
        return ok("%d calls in one answer" % calls)
    return fail("%d call in one answer: work takes more turns" % calls)


def takes_result(tester):
    """A whole tool turn: the model's own call, with all that came with it, and a result.

    Otherwise each piece of work ends after its first tool call. The call must be the model's own:
    some providers refuse one without the reasoning that they had sent with it.
    """
    answer = tester.once("tool")
    if not answer.calls():
        return skip("not tried: there is no call to answer")
    result = {"type": "tool_result", "content": "11 degrees, heavy rain"}
    results = [dict(result, tool_use_id=call["id"]) for call in answer.blocks("tool_use")]
    messages = [
        {"role": "user", "content": QUESTIONS["tool"]["content"]},
        {"role": "assistant", "content": answer.message["content"]},
        {"role": "user", "content": results},
    ]
    return judge_text(tester.ask(tools=[WEATHER], messages=messages))


# What not every model can do.


def thinks(tester):
    """Reasoning is shown. Claude Code shows it too, and sends it back; it works without."""
    answer = tester.ask(
        "How many times is the letter r in strawberry? Think first.",
        max_tokens=1200,
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    size = sum(len(block["thinking"]) for block in answer.blocks("thinking"))
    if size:
        return ok("%d characters" % size)
    return skip("none shown: the model does not reason, or the provider hides it")


def sees(tester):
    """The model tells the colour of a picture. Some servers drop images without a word."""
    source = {"type": "base64", "media_type": "image/png", "data": RED_SQUARE}
    question = "Which colour is this picture?"
    answer = tester.ask([{"type": "image", "source": source}, {"type": "text", "text": question}])
    if re.search(r"\bred\b", answer.text, re.I):  # and not "rendered"
        return ok("it saw the colour")
    seen = "it did not see a red square: " + quote(answer.text)
    if not answer.plan.profile.images:  # known before, or a lesson: ccfix left the picture out
        seen = "the provider is known to take no images, or refused the image"
    return fail(seen, "name a model that sees pictures: TARGET_MODEL_IMAGE")


# The context window, and what is remembered of it.


def fill_prompt(count):
    """`count` different lines of some 16 tokens."""
    line = "%d. The cat sat on the mat and looked at the rain for a while.\n"
    return "".join(line % number for number in range(count))


def holds_context(tester):
    """The context window holds Claude Code's first request and some work.

    Its size is what the provider tells; where it tells nothing, a prompt as long is tried.
    Otherwise the first turn ends with "Prompt is too long", or, where a server cuts prompts without
    a word, as Ollama did at 4,096 tokens, with an answer to another question.
    """
    if tester.plan.profile.name == "ollama":
        tester.proxy.probe(tester.plan, patience(10))  # it tells only the window of loaded models
    window = tester.plan.profile.context
    if not window:
        return takes_long_prompt(tester)
    if window < LEAST_CONTEXT:
        seen = "%d tokens; Claude Code's first request alone has %d" % (window, FIRST_REQUEST)
        return fail(seen, ADVICE["overflow"])
    small = ": small, so conversations are compacted often" if window < GOOD_CONTEXT else ""
    return ok("%d tokens%s" % (window, small))


def takes_long_prompt(tester):
    """The Verdict of `holds_context` for a window of unknown size.

    900 lines are some 14,000 tokens, as much as Claude Code's first request. The code word is at
    the top, since that is where servers cut. A provider that counts far fewer tokens has cut it.
    """
    prompt = "The code word is %s.\n%sWhat is the code word at the top?"
    answer = tester.ask(prompt % (CODE_WORD, fill_prompt(900)), LONG_SECONDS)
    size = answer.prompt
    if answer.usage and size < FIRST_REQUEST // 2:
        return fail("the server silently cut the prompt to %d tokens" % size, ADVICE["overflow"])
    memory = "" if CODE_WORD in answer.text else ", but forgot its beginning"
    limit = "the limit is unknown: set MAX_CONTEXT so that Claude Code compacts in time"
    return ok("took a prompt of %d tokens%s; %s" % (size, memory, limit))


def caches_prefix(tester):
    """Of two prompts with one beginning, the second reads it from a cache, and says so.

    Claude Code sends the whole conversation each turn, which is slow and expensive without a cache.
    """
    system = "You are a terse clerk.\n" + fill_prompt(170)  # most caches begin at 1,024 tokens
    for question in ("Say yes.", "Say no."):
        answer = tester.ask(question, LONG_SECONDS, system=system, max_tokens=16)
    cached = answer.tokens["cache_read_input_tokens"]
    if cached:
        return ok("%d of %d tokens" % (cached, answer.prompt))
    return fail("none reported: each turn may be read, and paid for, in full")


# A server that speaks Anthropic itself: what it writes, byte for byte.


def orders_events(tester):
    """The events of a stream come as Anthropic's do.

    Claude Code gives up a stream that lacks some, and asks again without streaming. Here nothing of
    ccfix is in between: an Exchange would show the events as ccfix writes them.
    """
    plan, upstream = tester.plan, tester.proxy.upstream(tester.settings)
    url, headers = plan.url(plan.format.path), upstream_headers(plan, tester.settings, {})
    data = compact_json(question_body(plan.model, "Say hello.")).encode()
    reply = upstream.open("POST", url, headers, data, patience(ROW_SECONDS))
    with contextlib.closing(reply):
        raw = reply.read(4 << 20)
    if reply.status != 200:
        return failure(upstream_error(reply.status, {}, raw))
    wrong = grammar_fault(raw.decode("utf-8", "replace"))
    fix = "Claude Code needs Anthropic's event order; report it to the server's makers"
    return fail(wrong, fix) if wrong else ok("as Anthropic's")


def grammar_fault(text):
    """What is wrong with an Anthropic event stream, or "": its events' names, order and indexes.

    What Claude Code skips is allowed: comments, pings, a `[DONE]` at the end. An event without its
    name in an `event:` line it does not see at all.
    https://docs.anthropic.com/en/docs/build-with-claude/streaming
    """
    shape, index = "", -1
    for name, data in re.findall(r"^(?:event: ?(.*?)\r?\n)?data: ?(\{.*)", text, re.M):
        event = as_dict(json_or_none(data))
        kind = str(event.get("type"))
        if name != kind:
            return "an event without its own name in an `event:` line: " + ascii(data[:60])
        if kind == "error":
            return "an error in the stream: " + error_fields(data)[0]
        index += kind == "content_block_start"
        if kind.startswith("content_block_") and event.get("index") != index:
            return "%s with index %a where %d was due" % (kind, event.get("index"), index)
        shape += kind + " " if kind != "ping" else ""
    block = "content_block_start (content_block_delta )*content_block_stop "
    if re.match("message_start (%s)*message_delta message_stop $" % block, shape):
        return ""
    return "events out of order: " + shorten(shape or "none", 200)


CHECKS = (
    # (name, required: Claude Code cannot work without it, function(tester) -> Verdict,
    # and True where it is of use only for a format whose events are relayed as they come)
    ("reachable", True, is_reachable),
    ("key accepted", True, takes_key),
    ("model exists", True, has_model),
    ("plain reply", True, answers_plainly),
    ("stream", True, streams),
    ("event order", True, orders_events, True),
    ("usage in stream", False, tells_usage),
    ("tool call", True, calls_tool),
    ("forced tool choice", False, calls_forced_tool),
    ("parallel tools", False, calls_in_parallel),
    ("tool result turn", True, takes_result),
    ("thinking", False, thinks),
    ("image", False, sees),
    ("long prompt", True, holds_context),
    ("cached tokens", False, caches_prefix),
    ("speed", False, is_fast),
)
GATES = 4  # the first rows, without which the rest is not tried
MARKS = {"ok": "ok", "skip": "--", "fail": "no"}


def run_checks(tester, progress=False):
    """Try the rows of CHECKS in turn -> (name, required, Verdict, ms) as each is done.

    progress: show on a terminal which row is under way; its own line then covers that. Secrets are
    hidden in what comes out, since a provider may repeat a key in its error.
    """
    blocked = ""
    for number, (name, required, look, *relayed) in enumerate(CHECKS):
        if relayed and not tester.plan.format.relays:
            continue
        if progress and sys.stdout.isatty():
            print("...  " + name, end="\r", flush=True)
        began = time.monotonic()
        try:
            verdict = skip('not tried: first "%s" must work' % blocked) if blocked else look(tester)
        except ProxyError as error:
            verdict = failure(error)
        if verdict.status == "fail" and number < GATES:
            blocked = blocked or name
        verdict = Verdict(*redact(verdict, tester.settings.secrets()))
        yield name, required, verdict, round((time.monotonic() - began) * 1000)


def check(config, options):
    """Try the target, print what works and a fix for what does not -> exit code.

    It is 0 where all required rows hold, so that Claude Code can work with the target, else 1. With
    --json everything is one object, at the end.
    """
    if not options.base_url:
        find_target(config)
    tester = Tester(config(), "claude-" + options.family if options.family else "ccfix-check")
    show = (lambda line: None) if options.json else say
    plan, rows, bad = tester.plan, [], []
    base = without_password(plan.base)
    show("%s at %s" % (plan.model, base))
    for name, required, verdict, ms in run_checks(tester, not options.json):
        rows.append(dict(verdict._asdict(), name=name, required=required, ms=ms))
        if required and verdict.status == "fail":
            bad.append(name)
        mark = "FAIL" if name in bad else MARKS[verdict.status]
        show("%-4s %-18s  %s" % (mark, name, verdict.seen))
        if verdict.fix:
            show("     %-18s  fix: %s" % ("", verdict.fix))
    tester.close()
    learned = tester.proxy.lessons.values()
    lessons = [lesson_text(*change) for changes in learned for change in changes.items()]
    for lesson in lessons:
        show("     learned on the way: " + lesson)
    if options.json:
        report = {"ok": not bad, "model": plan.model, "api_base": base}
        report.update(profile=plan.profile.name, checks=rows, lessons=lessons)
        say(json.dumps(report, indent=1))
    elif bad:
        say("Claude Code cannot work with it: " + ", ".join(bad))
    else:
        say("Claude Code can work with it.")
    return 1 if bad else 0


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
            glance_json(upstream, models_url(plan), 10, upstream_headers(plan, settings, {}))
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
        write_file(path, env_template(values))
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
            write_file(os.path.join(folder, name), text, 0o755)
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
        running = glance_json(upstream, url + "health", 3).get("name") == "ccfix"
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
