"""How often the response cache answers, and that it never answers wrongly.

    python3 .ci/cache_session.py [FILE]       # prints a Markdown table, and writes it to FILE

1. A session of the real client (session.py) is played, then twice again from fresh folders: on the
   same day, and on another. The client states the date in every conversation, so on another day
   nothing may come from the cache: the key holds the date like any other text.
2. The requests of test_ccfix.py that tempt a cache to answer with another conversation's reply,
   over HTTP; the model names the conversation in every answer.
"""

import json
import os
import re
import sys
import tempfile
import time

import oracle
from harness import TOP, ccfix, check, get, post
from session import EARLY, LATE, is_main, model, play, publish, recorded, table_row
from tui import VERSION
from upstream import Upstream, say

sys.path.append(TOP)
from test_ccfix import provoked  # noqa: E402  (found by the line above)

COMMAND = "python3 .ci/cache_session.py"
NOTE = "(%s, `%s`; Claude Code " + VERSION + ", 7 runs of it a session. The misses in words "
NOTE += "follow a background agent, whose random ids then stand in the conversation.)"
MODES = ("prefix", "full")


def cached(mode, scratch):
    """The settings of ccfix with a cache of its own, which records."""
    folders = {"CACHE_DIR": os.path.join(scratch, "cache")}
    folders["RECORD_DIR"] = os.path.join(scratch, "records")
    return dict(folders, CACHE_ENABLED="true", CACHE_KEY_MODE=mode)


def sessions(mode):
    """[[exchange, ...], ...] of the session, the same again, and on another day; and what
    /cache/stats tells at the end."""
    found, seen = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        work, home = (os.path.join(scratch, name) for name in ("work", "home"))
        env = cached(mode, scratch)
        with Upstream(model(work)) as upstream, ccfix(upstream.url, env=env) as url:
            for zone in (EARLY, EARLY, LATE):
                wrong = play(url, work, home, zone)
                name = "%s: the client's session goes well, and its answers are the right ones"
                check(name % mode, not wrong, "\n".join(wrong))
                upstream.requests.clear()
                exchanges = recorded(env["RECORD_DIR"])
                found.append(exchanges[seen:])
                seen = len(exchanges)
            return found, get(url + "/cache/stats").body


def provoke(mode):
    """([wrong answer], how many requests, how many of them from the cache) of the provoking session
    over HTTP."""
    labels, states = [], []

    def answer_of(label, body):
        labels.append(label)
        upstream.requests.clear()
        answer = post(url + "/v1/messages", body)
        states.append(answer.headers.get("x-ccfix-cache"))
        if not body["stream"]:
            return answer.body["content"][0]["text"]
        if not oracle.is_whole(answer.raw):
            return oracle.fault(answer.raw) or answer.raw
        deltas = [event.get("delta") or {} for event in oracle.sse_events(answer.raw)]
        return "".join(delta.get("text", "") for delta in deltas)

    with tempfile.TemporaryDirectory() as scratch:
        env = dict(cached(mode, scratch), TARGET_MODEL_HAIKU="small", LOG_LEVEL="error")
        with Upstream(lambda request: [say(labels[-1])]) as upstream:
            with ccfix(upstream.url, env=env) as url:
                return provoked(answer_of), len(labels), states.count("hit")


def states_of(exchanges, only_asked=False):
    """The cache states of a session's requests, or of those in which the user has the last word."""
    wanted = [e for e in exchanges if not only_asked or asks(e["request"])]
    return [exchange["row"]["cache"] for exchange in wanted]


def asks(body):
    """Whether the last turn has no tool result."""
    turns = [message["content"] for message in body["messages"] if message["role"] != "system"]
    last = turns[-1]
    return isinstance(last, str) or all(block["type"] != "tool_result" for block in last)


def is_dated(body):
    """Whether the client states the date, as it does in the first turn of a conversation."""
    return bool(re.search(r"date is \d{4}-\d\d-\d\d", json.dumps(body)))


def share(states):
    """The hits, as "5 of 24 (21 %)"."""
    hits, count = states.count("hit"), len(states)
    return "%d of %d (%.0f %%)" % (hits, count, 100.0 * hits / count)


def table(played, wrong):
    """played: {mode: sessions}; wrong: {mode: what provoke returned}."""

    def shares(place, *only_asked):
        return [share(states_of(played[mode][place], *only_asked)) for mode in MODES]

    firsts = [[played[mode][place][0]["row"]["cache"] for place in (1, 2)] for mode in MODES]
    told = "**%d** of %d (%d from the cache)"
    provoked_answers = [told % ((len(wrong[m][0]),) + wrong[m][1:]) for m in MODES]
    words = "the same, of the requests that end in words, not in a tool's result"
    first = "the same first question in a new session, same day / another day"
    return [
        "| answered from the cache | `prefix` | `full` |",
        "| --- | ---: | ---: |",
        table_row("a session of the real client again, on the same day", shares(1)),
        table_row(words, shares(1, True)),
        table_row("the session again, on another day", shares(2)),
        table_row(first, [" / ".join(pair) for pair in firsts]),
        table_row("**wrong answers in a session built to provoke them**", provoked_answers),
        "",
        NOTE % (time.strftime("%Y-%m-%d", time.gmtime()), COMMAND),
    ]


def main():
    played, wrong = {}, {}
    for mode in MODES:
        played[mode], stats = sessions(mode)
        wrong[mode] = provoke(mode)
        first, again, other = played[mode]
        hits = sum(states_of(part).count("hit") for part in played[mode])
        check("%s: /cache/stats counts the same hits" % mode, stats["hits"] == hits, (stats, hits))
        name = "%s: the session's first question is a hit when it is asked again"
        check(name % mode, states_of(again)[0] == "hit", states_of(again))
        dated = [e for e in other if e["row"]["cache"] == "hit" and is_dated(e["request"])]
        check("%s: no hit on another day where the date is told" % mode, not dated, dated[:1])
        main_ones = sum(map(is_main, first))
        name = "%s: it is main conversation and subagent that are counted"
        check(name % mode, 0 < main_ones < len(first), main_ones)
        good = not wrong[mode][0] and wrong[mode][2] > 50
        check("%s: no wrong answer, with the cache at work" % mode, good, wrong[mode])
    publish(table(played, wrong))


if __name__ == "__main__":
    main()
