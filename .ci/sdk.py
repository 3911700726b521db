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


def client_tools():
    """Anthropic's own tools, which the client runs and describes by a type alone."""
    tools = [
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
        {"type": "memory_20250818", "name": "memory"},
        {"type": "computer_20250124", "name": "computer"},
    ]
    tools[-1].update(display_width_px=1024, display_height_px=768)
    asked = dict(QUESTION, tools=tools, betas=["computer-use-2025-01-24"])
    first = [call("bash", command="ls"), call("computer", action="left_click", coordinate=[1, 2])]
    with client(rounds(first, [say("Two files.")])) as (sdk, upstream):
        message = sdk.beta.messages.create(**asked)
        calls = [(b.name, b.input) for b in message.content if b.type == "tool_use"]
        wanted = [("bash", {"command": "ls"})]
        wanted.append(("computer", {"action": "left_click", "coordinate": [1, 2]}))
        check("calls of Anthropic's own tools", calls == wanted, message)
        offered = {t["function"]["name"]: t["function"] for t in upstream.requests[0].body["tools"]}
        check("all of them are offered", set(offered) == {t["name"] for t in tools}, offered)
        good = all(tool["parameters"]["properties"] for tool in offered.values())
        check("with their arguments", good, offered)
        results = [
            {"type": "tool_result", "tool_use_id": b.id, "content": b.name + "!"}
            for b in message.content
        ]
        history = [ASKED, {"role": "assistant", "content": message.content}]
        history.append({"role": "user", "content": results})
        with sdk.beta.messages.stream(**dict(asked, messages=history)) as stream:
            message = stream.get_final_message()
        check("the turn after them", message.content[0].text == "Two files.", message)
        results = upstream.requests[-1].results
        check("the upstream gets the results", results == ["bash!", "computer!"], results)


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


def model_pages():
    with client(rounds([say("x")])) as (sdk, _):
        ids = [m.id for m in sdk.models.list(limit=1000)]
        pages = [[m.id for m in page.data] for page in sdk.models.list(limit=2).iter_pages()]
        good = sum(pages, []) == ids and all(0 < len(page) < 3 for page in pages) and len(ids) > 2
        check("models.list, two at a time", good, (pages, ids))
        for kind, api in (("", sdk.models), ("beta ", sdk.beta.models)):
            back = [m.id for m in api.list(limit=1, before_id=ids[-1])]
            check(kind + "models.list backwards", sorted(back) == sorted(ids[:-1]), back)
            got = error_of(api.list, limit=1001)
            refused = isinstance(got, anthropic.BadRequestError)
            check(kind + "models.list with a limit of 1001: BadRequestError", refused, got)
            for name in ("no-such-model", "gpt-4o"):
                got = error_of(api.retrieve, model_id=name)
                missing = isinstance(got, anthropic.NotFoundError) and name in str(got)
                check(kind + "models.retrieve of %s: NotFoundError" % name, missing, got)
            for name in ("scripted-model", "claude-opus-4-8"):
                got = error_of(api.retrieve, model_id=name)
                check(kind + "models.retrieve of " + name, getattr(got, "id", "") == name, got)


def what_there_is_not():
    with client(rounds([say("x")])) as (sdk, upstream):
        batch = {"custom_id": "a", "params": QUESTION}
        for name, ask in (
            ("messages.batches.create", lambda: sdk.messages.batches.create(requests=[batch])),
            ("messages.batches.list", lambda: list(sdk.messages.batches.list())),
            ("beta.messages.batches.results", lambda: sdk.beta.messages.batches.retrieve("b_1")),
            ("beta.files.upload", lambda: sdk.beta.files.upload(file=("a.txt", b"x" * 200000))),
            ("beta.files.list", lambda: list(sdk.beta.files.list())),
            ("beta.files.download", lambda: sdk.beta.files.download("file_1")),
            ("beta.skills.list", lambda: list(sdk.beta.skills.list())),
        ):
            got = error_of(ask)
            good = isinstance(got, anthropic.NotFoundError) and "not supported" in str(got)
            check(name + ": NotFoundError, and what to do", good, got)
        check("and nobody was asked", not upstream.requests)


def searches():
    """The upstream is a SearXNG too, which finds two pages of zebra.example."""
    rules = (
        ({}, 2),
        ({"allowed_domains": ["zebra.example/facts"]}, 1),
        ({"blocked_domains": ["ZEBRA.example"]}, 0),
        ({"allowed_domains": ["bra.example"]}, 0),
        ({"max_uses": 1, "allowed_domains": ["example"]}, 2),
        ({"max_uses": 0}, "max_uses_exceeded"),
    )
    query = "Perform a web search for the query: zebra"
    asked = dict(QUESTION, messages=[{"role": "user", "content": query}])
    with Upstream(rounds([say("x")])) as upstream:
        place = upstream.url.rsplit("/v1", 1)[0] + "/search"
        with ccfix(upstream.url, env={"SEARCH_URL": place}) as url:
            sdk = anthropic.Anthropic(base_url=url, api_key="any", max_retries=0)
            for rule, wanted in rules:
                tool = dict({"type": "web_search_20250305", "name": "web_search"}, **rule)
                message = sdk.messages.create(tools=[tool], **asked)
                content = message.content[1].content
                error = getattr(content, "error_code", None)
                check("a search with %s" % rule, (error or len(content)) == wanted, message)


RATE = fail(429, "Rate limit reached", "requests", "rate_limit_exceeded", retry_after=60)
LONG = "This model's maximum context length is 8192 tokens. However, your messages resulted in "
LONG = fail(400, LONG + "9000 tokens.", code="context_length_exceeded")
GONE = fail(404, "The model `x` does not exist", code="model_not_found")
ERRORS = (
    # reply, class of the SDK, statuses, type
    (fail(401, "Incorrect API key provided"), "Authentication", (401,), "authentication_error"),
    (fail(402, "Insufficient Balance"), "APIStatus", (402,), "billing_error"),
    (fail(403, "Country not supported"), "PermissionDenied", (403,), "permission_error"),
    (GONE, "NotFound", (404,), "not_found_error"),
    (RATE, "RateLimit", (429,), "rate_limit_error"),
    (LONG, "BadRequest", (400,), "invalid_request_error"),
    (fail(400, "Nobody knows this error."), "BadRequest", (400,), "invalid_request_error"),
    (fail(422, "Nobody knows it either."), "BadRequest", (400,), "invalid_request_error"),
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
        client_tools,
        not_streamed,
        counting_and_models,
        model_pages,
        what_there_is_not,
        searches,
        error_classes,
        cut_streams,
        bad_questions,
        proxy_key,
    )
