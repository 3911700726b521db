"""The oracle of these scripts: whether a stream of events keeps Anthropic's grammar.

`message_start` comes once and first, blocks are numbered 0, 1, 2 ... and open one at a time, each
holds deltas of its kind alone, a tool's input is a JSON object, and `message_delta` and then
`message_stop`, or else `error`, come once and last. Pings are free. Python 3.6 or newer.
"""

import json

DELTAS = {
    "text": ("text_delta", "citations_delta"),
    "thinking": ("thinking_delta", "signature_delta"),
    "tool_use": ("input_json_delta",),
    "server_tool_use": ("input_json_delta",),
}
# event -> (the state it wants, the state after it); a block is open in the state "block" only
STATES = {
    "message_start": ("start", "open"),
    "content_block_start": ("open", "block"),
    "content_block_delta": ("block", "block"),
    "content_block_stop": ("block", "open"),
    "message_delta": ("open", "ending"),
    "message_stop": ("ending", "done"),
    "error": ("open", "error"),
}


class Broken(Exception):
    """The stream is not what Anthropic would send."""


def sse_events(raw):
    """The events of SSE text or bytes, strictly read: an event line, a data line, a blank line."""
    text, events = raw.decode("ascii") if isinstance(raw, bytes) else raw, []
    parts = text.split("\n\n")
    for part in parts[:-1]:
        name, _, data = part.partition("\ndata: ")
        try:
            event = json.loads(data)
        except ValueError:
            raise Broken("not JSON in the event %r" % part[:200])
        if name != "event: %s" % event["type"] or "\n" in data:
            raise Broken("bad framing of %r" % part[:200])
        events.append(event)
    if parts[-1]:
        raise Broken("half an event: %r" % parts[-1][:200])
    return events


def check_block(kind, pieces):
    """A tool's input, which came in pieces, is a JSON object."""
    text = "".join(pieces) or "{}"
    try:
        whole = not kind.endswith("tool_use") or isinstance(json.loads(text), dict)
    except ValueError:
        whole = False
    if not whole:
        raise Broken("the input of a %s is not a JSON object: %r" % (kind, text[:200]))


def follow(events, any_input):
    """(state, kind of the open block) at the end; Broken where an event is out of place."""
    state, index, kind, pieces = "start", -1, None, []
    for event in events:
        what = event["type"]
        if what == "ping":
            continue
        wanted, after = STATES.get(what, (None, None))
        if state != wanted:
            raise Broken("%s in the state %r" % (what, state))
        state = after
        if what == "message_start" and event["message"]["content"] != []:
            raise Broken("a message that starts with content: %r" % event)
        if what == "content_block_start":
            index, kind, pieces = index + 1, event["content_block"]["type"], []
        if what.startswith("content_block") and event["index"] != index:
            raise Broken("index %r where %d is due" % (event["index"], index))
        if what == "content_block_delta":
            delta = event["delta"]
            if delta["type"] not in DELTAS.get(kind, (delta["type"],)):
                raise Broken("%s in a block of %s" % (delta["type"], kind))
            pieces.append(delta.get("partial_json", ""))
        if what == "content_block_stop":
            if not any_input:
                check_block(kind, pieces)
            kind = None
    return state, kind


def fault(stream, cut=False, any_input=False):
    """What is wrong with a stream (SSE text, bytes, or a list of events), or "".

    It has to end with `message_stop` or `error`. One whose connection was cut has to end in a tool
    call: Claude Code then asks once more, while it would take an `error` for the last word.
    any_input: the model writes arguments that are not JSON; they are passed on as they are.
    """
    try:
        events = stream if isinstance(stream, list) else sse_events(stream)
        state, kind = follow(events, any_input)
    except Broken as error:
        return str(error)
    if cut:
        return "" if kind == "tool_use" else "cut in the state %s, block %s" % (state, kind)
    return "" if state in ("done", "error") else "ends in the state " + state


def is_whole(stream):
    """Whether a stream is one whole message: in the grammar, and not ended by an error."""
    events = stream if isinstance(stream, list) else sse_events(stream)
    return not fault(events) and events[-1]["type"] == "message_stop"
