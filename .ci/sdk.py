"""Anthropic's Python SDK, through ccfix, on a scripted upstream. Runs in a Python that has the package `anthropic`."""

import contextlib

import anthropic

from harness import ccfix, check, run_table
from scripted_upstream import Scripted, attempts, call, cut, fail, rounds, say, think, usage

TOOLS = [
    {
        "name": name,
        "description": "Looks at the %s." % name,
        "input_schema": {
            "type": "object",
            "properties": {"place": {"type": "string"}},
            "required": ["place"],
        },
    }
    for name in ("weather", "clock")
]
QUESTION = {
    "model": "claude-opus-5-5",
    "max_tokens": 2000,
    "messages": [{"role": "user", "content": "How is it?"}],
}


@contextlib.contextmanager
def client(script, **settings):
    """-> (SDK client, scripted upstream) with ccfix between them."""
    with Scripted(script) as upstream, ccfix(upstream.url, **settings) as url:
        yield anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, timeout=60), upstream


def streamed_text():
    with client(rounds([say("It is fine, \u00fcberall \U0001f600."), usage(100, 8, 60)])) as (
        sdk,
        _,
    ):
        with sdk.messages.stream(**QUESTION) as stream:
            pieces = list(stream.text_stream)
            message = stream.get_final_message()
    check(
        "streamed text arrives in pieces",
        len(pieces) > 1 and "".join(pieces) == "It is fine, \u00fcberall \U0001f600.",
        pieces,
    )
    check(
        "its stop reason and model",
        (message.stop_reason, message.model) == ("end_turn", "claude-opus-5-5"),
        message,
    )
    told = message.usage
    check(
        "its usage",
        (told.input_tokens, told.cache_read_input_tokens, told.output_tokens) == (40, 60, 8),
        told,
    )


def thinking():
    with client(rounds([think("First I weigh it. "), say("Then I say it.")])) as (sdk, _):
        with sdk.messages.stream(
            thinking={"type": "enabled", "budget_tokens": 1024}, **QUESTION
        ) as stream:
            kinds = [event.type for event in stream]
            message = stream.get_final_message()
    blocks = message.content
    check("thinking, then text", [b.type for b in blocks] == ["thinking", "text"], message)
    check(
        "their contents",
        (blocks[0].thinking, blocks[-1].text) == ("First I weigh it. ", "Then I say it."),
        message,
    )
    check("the SDK's own thinking events", "thinking" in kinds and "text" in kinds, kinds)


def parallel_tools():
    script = rounds(
        [say("I look."), call("weather", place="Ulm"), call("clock", place="Bern")],
        [say("Sunny, at noon.")],
    )
    with client(script) as (sdk, upstream):
        with sdk.messages.stream(tools=TOOLS, **QUESTION) as stream:
            first = stream.get_final_message()
        calls = [b for b in first.content if b.type == "tool_use"]
        check(
            "two tool calls in one answer",
            [(c.name, c.input) for c in calls]
            == [("weather", {"place": "Ulm"}), ("clock", {"place": "Bern"})]
            and first.stop_reason == "tool_use",
            first,
        )
        results = [
            {"type": "tool_result", "tool_use_id": c.id, "content": c.name + "!"}
            for c in reversed(calls)
        ]
        history = QUESTION["messages"] + [
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": results},
        ]
        second = sdk.messages.create(tools=TOOLS, **dict(QUESTION, messages=history))
        check("the turn after it", second.content[0].text == "Sunny, at noon.", second)
        check(
            "the upstream gets the results in call order",
            upstream.requests[-1].results == ["weather!", "clock!"],
            upstream.requests[-1].messages,
        )


def not_streamed():
    script = rounds([think("Hm."), say("Well."), call("weather", place="Ulm"), usage(50, 5)])
    with client(script) as (sdk, upstream):
        message = sdk.messages.create(tools=TOOLS, **QUESTION)
    check(
        "without streaming: thinking, text, a call",
        [b.type for b in message.content] == ["thinking", "text", "tool_use"],
        message,
    )
    check(
        "without streaming: stop reason and usage",
        (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens)
        == ("tool_use", 50, 5),
        message,
    )


def counting_and_models():
    with client(rounds([say("x")])) as (sdk, upstream):
        short = sdk.messages.count_tokens(
            model=QUESTION["model"], messages=QUESTION["messages"]
        ).input_tokens
        long = sdk.messages.count_tokens(
            model=QUESTION["model"], messages=[{"role": "user", "content": "word " * 1000}]
        ).input_tokens
        check("count_tokens grows with the text", 0 < short < 50 < 500 < long < 3000, (short, long))
        check("and asks nobody", not upstream.requests)
        models = list(sdk.models.list())
        check(
            "models.list lists something",
            models and all(m.id and m.type == "model" for m in models),
            models,
        )
        check(
            "models.retrieve finds it", sdk.models.retrieve(models[0].id).id == models[0].id, models
        )


def error_classes():
    table = (
        (
            fail(401, "Incorrect API key provided"),
            anthropic.AuthenticationError,
            401,
            "authentication_error",
        ),
        (fail(402, "Insufficient Balance"), anthropic.APIStatusError, 402, "billing_error"),
        (
            fail(403, "Country not supported"),
            anthropic.PermissionDeniedError,
            403,
            "permission_error",
        ),
        (
            fail(404, "The model `x` does not exist", code="model_not_found"),
            anthropic.APIStatusError,
            (400, 404, 424),
            None,
        ),
        (
            fail(429, "Rate limit reached", "requests", "rate_limit_exceeded", retry_after=60),
            anthropic.RateLimitError,
            429,
            "rate_limit_error",
        ),
        (
            fail(
                400,
                "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
                code="context_length_exceeded",
            ),
            anthropic.BadRequestError,
            400,
            "invalid_request_error",
        ),
        (
            fail(400, "Nobody knows this error."),
            anthropic.APIStatusError,
            (400, 424),
            "invalid_request_error",
        ),
        (
            fail(500, "The server had an error", "server_error"),
            anthropic.InternalServerError,
            (500, 502, 503, 529),
            None,
        ),
        (
            fail(503, "Overloaded", "server_error"),
            anthropic.InternalServerError,
            (503, 529),
            "overloaded_error",
        ),
    )
    for reply, kind, status, name in table:
        with client(attempts(reply)) as (sdk, _):
            for streaming in (True, False):
                try:
                    if streaming:
                        sdk.messages.create(stream=True, **QUESTION)
                    else:
                        sdk.messages.create(**QUESTION)
                    error = None
                except anthropic.APIStatusError as caught:
                    error = caught
                statuses = status if isinstance(status, tuple) else (status,)
                told = ((error.body or {}).get("error") or {}).get("type") if error else None
                check(
                    "%s: %s %s, %s"
                    % (
                        reply[0].value[1]["error"]["message"][:40],
                        kind.__name__,
                        status,
                        "streamed" if streaming else "not streamed",
                    ),
                    isinstance(error, kind)
                    and error.status_code in statuses
                    and (not name or told == name)
                    and error.request_id,
                    lambda: "%r %r" % (error, getattr(error, "body", None)),
                )


def cut_streams():
    with client(attempts([say("Half of it, "), cut()])) as (sdk, _):
        text = ""
        try:
            with sdk.messages.stream(**QUESTION) as stream:
                for piece in stream.text_stream:
                    text += piece
            error = None
        except (anthropic.APIError, OSError) as caught:
            error = caught
    check(
        "a cut stream is an error, never a normal end",
        error is not None and text == "Half of it, ",
        (error, text),
    )


def bad_questions():
    with client(rounds([say("x")])) as (sdk, upstream):
        for name, change in (
            ("no messages", {"messages": "what"}),
            ("max_tokens as a text", {"max_tokens": "many"}),
        ):
            try:
                answer = sdk.messages.create(**dict(QUESTION, **change))
            except anthropic.BadRequestError as error:
                answer = error
            check(
                "%s: BadRequestError" % name, isinstance(answer, anthropic.BadRequestError), answer
            )


def proxy_key():
    with client(rounds([say("IN")]), env={"ANTHROPIC_API_KEY": "the-proxy-key"}) as (sdk, _):
        for key, kind in (("wrong", anthropic.AuthenticationError), ("the-proxy-key", None)):
            try:
                got = sdk.with_options(api_key=key).messages.create(**QUESTION)
            except anthropic.APIStatusError as error:
                got = error
            check(
                "a proxy key, and the client has %s one" % ("no right" if kind else "the right"),
                isinstance(got, kind) if kind else got.content[0].text == "IN",
                got,
            )


if __name__ == "__main__":
    run_table(
        [
            streamed_text,
            thinking,
            parallel_tools,
            not_streamed,
            counting_and_models,
            error_classes,
            cut_streams,
            bad_questions,
            proxy_key,
        ]
    )
