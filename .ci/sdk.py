"""Anthropic's Python SDK, through ccfix, on a scripted upstream. Runs in a Python that has the
package `anthropic`."""

import contextlib

import anthropic

from harness import ccfix, check, run_table
from upstream import Upstream, attempts, call, cut, cut_at, fail, rounds, say, think, usage

SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOLS = [
    {"name": name, "description": "Looks at the %s." % name, "input_schema": SCHEMA}
    for name in ("weather", "clock")
]
ASKED = {"role": "user", "content": "How is it?"}
QUESTION = {"model": "claude-opus-5-5", "max_tokens": 2000, "messages": [ASKED]}


@contextlib.contextmanager
def client(script, **settings):
    """(SDK client, scripted upstream) with ccfix between them."""
    with Upstream(script) as upstream, ccfix(upstream.url, **settings) as url:
        yield anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, timeout=60), upstream


def streamed_text():
    text = "It is fine, \u00fcberall \U0001f600."
    with client(rounds([say(text), usage(100, 8, 60)])) as (sdk, _):
        with sdk.messages.stream(**QUESTION) as stream:
            pieces = list(stream.text_stream)
            message = stream.get_final_message()
    good = len(pieces) > 1 and "".join(pieces) == text
    check("streamed text arrives in pieces", good, pieces)
    told = message.stop_reason, message.model
    check("its stop reason and model", told == ("end_turn", "claude-opus-5-5"), message)
    used = message.usage
    told = used.input_tokens, used.cache_read_input_tokens, used.output_tokens
    check("its usage", told == (40, 60, 8), used)


def thinking():
    wanted = {"type": "enabled", "budget_tokens": 1024}
    with client(rounds([think("First I weigh it. "), say("Then I say it.")])) as (sdk, _):
        with sdk.messages.stream(thinking=wanted, **QUESTION) as stream:
            kinds = [event.type for event in stream]
            message = stream.get_final_message()
    blocks = message.content
    check("thinking, then text", [b.type for b in blocks] == ["thinking", "text"], message)
    told = blocks[0].thinking, blocks[-1].text
    check("their contents", told == ("First I weigh it. ", "Then I say it."), message)
    check("the SDK's own thinking events", "thinking" in kinds and "text" in kinds, kinds)


def parallel_tools():
    first = [say("I look."), call("weather", place="Ulm"), call("clock", place="Bern")]
    with client(rounds(first, [say("Sunny, at noon.")])) as (sdk, upstream):
        with sdk.messages.stream(tools=TOOLS, **QUESTION) as stream:
            message = stream.get_final_message()
        calls = [b for b in message.content if b.type == "tool_use"]
        told = [(c.name, c.input["place"]) for c in calls]
        good = told == [("weather", "Ulm"), ("clock", "Bern")] and message.stop_reason == "tool_use"
        check("two tool calls in one answer", good, message)
        results = [
            {"type": "tool_result", "tool_use_id": c.id, "content": c.name + "!"}
            for c in reversed(calls)
        ]
        history = [ASKED, {"role": "assistant", "content": message.content}]
        history.append({"role": "user", "content": results})
        message = sdk.messages.create(tools=TOOLS, **dict(QUESTION, messages=history))
        check("the turn after it", message.content[0].text == "Sunny, at noon.", message)
        results = upstream.requests[-1].results
        good = results == ["weather!", "clock!"]
        check("the upstream gets the results in call order", good, results)


def not_streamed():
    reply = [think("Hm."), say("Well."), call("weather", place="Ulm"), usage(50, 5)]
    with client(rounds(reply)) as (sdk, upstream):
        message = sdk.messages.create(tools=TOOLS, **QUESTION)
    kinds = [b.type for b in message.content]
    good = kinds == ["thinking", "text", "tool_use"]
    check("without streaming: thinking, text, a call", good, message)
    used = message.usage
    told = message.stop_reason, used.input_tokens, used.output_tokens
    check("without streaming: stop reason and usage", told == ("tool_use", 50, 5), message)


def counting_and_models():
    with client(rounds([say("x")])) as (sdk, upstream):

        def count(text):
            messages = [{"role": "user", "content": text}]
            counted = sdk.messages.count_tokens(model=QUESTION["model"], messages=messages)
            return counted.input_tokens

        short, long = count("How is it?"), count("word " * 1000)
        check("count_tokens grows with the text", 0 < short < 50 < 500 < long < 3000, (short, long))
        check("and asks nobody", not upstream.requests)
        models = list(sdk.models.list())
        good = models and all(m.id and m.type == "model" for m in models)
        check("models.list lists something", good, models)
        found = sdk.models.retrieve(models[0].id)
        check("models.retrieve finds it", found.id == models[0].id, models)


RATE = fail(429, "Rate limit reached", "requests", "rate_limit_exceeded", retry_after=60)
LONG = "This model's maximum context length is 8192 tokens. However, your messages resulted in "
LONG = fail(400, LONG + "9000 tokens.", code="context_length_exceeded")
GONE = fail(404, "The model `x` does not exist", code="model_not_found")
ERRORS = (
    # reply, class of the SDK, statuses, type
    (fail(401, "Incorrect API key provided"), "Authentication", (401,), "authentication_error"),
    (fail(402, "Insufficient Balance"), "APIStatus", (402,), "billing_error"),
    (fail(403, "Country not supported"), "PermissionDenied", (403,), "permission_error"),
    (GONE, "APIStatus", (400, 404, 424), None),
    (RATE, "RateLimit", (429,), "rate_limit_error"),
    (LONG, "BadRequest", (400,), "invalid_request_error"),
    (fail(400, "Nobody knows this error."), "APIStatus", (400, 424), "invalid_request_error"),
    (fail(500, "An error", "server_error"), "InternalServer", (500, 502, 503, 529), None),
    (fail(503, "Overloaded", "server_error"), "InternalServer", (503, 529), "overloaded_error"),
)


def class_of(name):
    return getattr(anthropic, name + "Error")


def error_of(ask, kinds=(anthropic.APIError, OSError), **question):
    """The error that a question raises; otherwise its answer."""
    try:
        return ask(**question)
    except kinds as error:
        return error


def error_classes():
    for reply, kind, statuses, name in ERRORS:
        with client(attempts(reply)) as (sdk, _):
            for how, streaming in (("streamed", True), ("not streamed", False)):
                error = error_of(sdk.messages.create, **dict(QUESTION, stream=streaming))
                said = reply[0].value[1]["error"]["message"][:40]
                good = isinstance(error, class_of(kind)) and error.status_code in statuses
                told = good and ((error.body or {}).get("error") or {}).get("type")
                good = good and name in (None, told) and error.request_id
                title = "%s: %s %s, %s" % (said, kind, statuses, how)
                check(title, good, lambda: "%r %r" % (error, getattr(error, "body", None)))


def cut_streams():
    """Cut anywhere, a stream is an error, never a normal end."""
    reply = [think("Hm. "), say("Half of it."), call("weather", place="Ulm")]
    places = [("at byte %d" % n, [cut_at(n)] + reply) for n in (0, 60, 150, 500, 1500, 2500)]
    for where, steps in [("after the words", reply[:2] + [cut()])] + places:
        text = []

        def read_all():
            with sdk.messages.stream(tools=TOOLS, **QUESTION) as stream:
                text.extend(stream.text_stream)
                return stream.get_final_message()

        with client(attempts(steps), env={"TARGET_RETRIES": "0"}) as (sdk, _):
            got = error_of(read_all, Exception)
        # the SDK lets its HTTP library's own error out, whose name depends on the version
        good = isinstance(got, Exception) and type(got).__module__ != "builtins"
        good = good and "Half of it.".startswith("".join(text))
        good = good and (where != "after the words" or "".join(text) == "Half of it.")
        check("cut %s: an error" % where, good, (text, got))


def bad_questions():
    with client(rounds([say("x")])) as (sdk, upstream):
        for name, change in (
            ("no messages", {"messages": "what"}),
            ("max_tokens as a string", {"max_tokens": "many"}),
        ):
            got = error_of(sdk.messages.create, **dict(QUESTION, **change))
            check("%s: BadRequestError" % name, isinstance(got, anthropic.BadRequestError), got)


def proxy_key():
    with client(rounds([say("IN")]), env={"ANTHROPIC_API_KEY": "the-proxy-key"}) as (sdk, _):
        got = error_of(sdk.with_options(api_key="wrong").messages.create, **QUESTION)
        refused = isinstance(got, anthropic.AuthenticationError)
        check("a proxy key, and the client has a wrong one", refused, got)
        got = error_of(sdk.with_options(api_key="the-proxy-key").messages.create, **QUESTION)
        check("a proxy key, and the client has it", got.content[0].text == "IN", got)


if __name__ == "__main__":
    run_table(
        streamed_text,
        thinking,
        parallel_tools,
        not_streamed,
        counting_and_models,
        error_classes,
        cut_streams,
        bad_questions,
        proxy_key,
    )
