"""How often the response cache answers, and that it never answers wrongly.

    python3 .ci/cache_session.py [FILE]       # prints a Markdown table, and writes it to FILE

1. A session of the real client (recorded_session.py) is played, then twice again from fresh folders: on the same day, and on another.
2. The requests of test_ccfix.py that tempt a cache to answer with another conversation's reply, over HTTP; the model names the
   conversation in every answer.
"""

import os
import sys
import tempfile
import time

from harness import TOP, ccfix, check, get, post, sse_events
from recorded_session import EARLY, LATE, is_main, model, play, publish, recorded
from scripted_upstream import Scripted, say

sys.path.append(TOP)
from test_ccfix import provoked  # noqa: E402  (found by the line above)

COMMAND = "python3 .ci/cache_session.py"
MODES = ("prefix", "full")


def cached(mode, scratch):
    """The settings of ccfix with a cache of its own, which records."""
    return {
        "CACHE_ENABLED": "true",
        "CACHE_KEY_MODE": mode,
        "CACHE_DIR": os.path.join(scratch, "cache"),
        "RECORD_DIR": os.path.join(scratch, "records"),
    }


def sessions(mode):
    """[[exchange, ...], ...] of the session, the same again, and on another day; and what /cache/stats tells at the end."""
    found, seen = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        work, home, env = (
            os.path.join(scratch, "work"),
            os.path.join(scratch, "home"),
            cached(mode, scratch),
        )
        with Scripted(model(work)) as upstream, ccfix(upstream.url, env=env) as url:
            for zone in (EARLY, EARLY, LATE):
                wrong = play(url, work, home, zone)
                check(
                    "%s: the client's session goes well, and its answers are the right ones" % mode,
                    not wrong,
                    "\n".join(wrong),
                )
                upstream.requests.clear()
                exchanges = recorded(env["RECORD_DIR"])
                found.append(exchanges[seen:])
                seen = len(exchanges)
            return found, get(url + "/cache/stats").body


def provoking(mode):
    """([wrong answer], how many requests, how many of them from the cache) of the provoking session over HTTP."""
    labels, states = [], []

    def answer_of(label, body):
        labels.append(label)
        upstream.requests.clear()
        answer = post(url + "/v1/messages", body)
        states.append(answer.headers.get("x-ccfix-cache"))
        if not body["stream"]:
            return answer.body["content"][0]["text"]
        return "".join(
            event["delta"]["text"]
            for event in sse_events(answer.raw)
            if event["type"] == "content_block_delta"
        )

    with tempfile.TemporaryDirectory() as scratch, Scripted(
        lambda request: [say(labels[-1])]
    ) as upstream, ccfix(
        upstream.url, env=dict(cached(mode, scratch), TARGET_MODEL_HAIKU="small", LOG_LEVEL="error")
    ) as url:
        return provoked(answer_of), len(labels), states.count("hit")


def share(states):
    """ "5 of 24 (21 %)": those that are hits."""
    return "%d of %d (%.0f %%)" % (
        states.count("hit"),
        len(states),
        100.0 * states.count("hit") / len(states),
    )


def states_of(exchanges, only_asked=False):
    """The cache states of a session's requests, or of those in which the user has the last word."""
    return [
        exchange["row"]["cache"]
        for exchange in exchanges
        if not only_asked or asks(exchange["request"])
    ]


def asks(body):
    """Whether the last turn has no tool result."""
    last = [message for message in body["messages"] if message["role"] != "system"][-1]["content"]
    return isinstance(last, str) or all(block["type"] != "tool_result" for block in last)


def table(played, provoked_):
    def line(name, cells):
        return "| %s | %s |" % (name, " | ".join(cells))

    return "\n".join(
        (
            "| answered from the cache | `prefix` | `full` |",
            "| --- | ---: | ---: |",
            line(
                "a session of the real client again, on the same day",
                [share(states_of(played[mode][1])) for mode in MODES],
            ),
            line(
                "the same, of the requests that end in words, not in a tool's result",
                [share(states_of(played[mode][1], True)) for mode in MODES],
            ),
            line(
                "the session again, on another day",
                [share(states_of(played[mode][2])) for mode in MODES],
            ),
            line(
                "the same first question in a new session, same day / another day",
                [
                    " / ".join(played[mode][place][0]["row"]["cache"] for place in (1, 2))
                    for mode in MODES
                ],
            ),
            line(
                "**wrong answers in a session built to provoke them**",
                [
                    "**%d** of %d (%d from the cache)"
                    % (len(provoked_[mode][0]), *provoked_[mode][1:])
                    for mode in MODES
                ],
            ),
            "",
            "(%s, `%s`; Claude Code 2.1.330, 7 runs of it a session. The misses in words follow a background agent, whose random ids then stand in the conversation.)"
            % (time.strftime("%Y-%m-%d", time.gmtime()), COMMAND),
            "",
        )
    )


def main():
    played, provoked_ = {}, {}
    for mode in MODES:
        played[mode], stats = sessions(mode)
        provoked_[mode] = provoking(mode)
        first, again, other = played[mode]
        hits = sum(states_of(part).count("hit") for part in played[mode])
        check("%s: /cache/stats counts the same hits" % mode, stats["hits"] == hits, (stats, hits))
        check(
            "%s: the session's first question is a hit when it is asked again" % mode,
            again[0]["row"]["cache"] == "hit",
            states_of(again),
        )
        check(
            "%s: it is main conversation and subagent that are counted" % mode,
            sum(map(is_main, first)) < len(first),
            len(first),
        )
        check(
            "%s: no wrong answer, with the cache at work" % mode,
            not provoked_[mode][0] and provoked_[mode][2] > 50,
            provoked_[mode],
        )
    check(
        "prefix: the first question is a hit on another day, too",
        played["prefix"][2][0]["row"]["cache"] == "hit",
    )
    publish(table(played, provoked_))


if __name__ == "__main__":
    main()
