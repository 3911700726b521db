"""An upstream that dies in the middle of a reply, before the real client: its print mode, its own
screen (TUI), a subagent of it, and the Agent SDK.

python3 .ci/cuts.py [scenario ...]

The first attempt at a reply breaks somewhere, the second is whole: the whole answer must arrive,
once, and each tool must run, once. Replies are compared by their marked words.

What the client does at a cut depends on the blocks whose content_block_stop it has read (2.1.332):
after one of text or thinking the TUI ends the turn, whether or not the next block is open; print
mode asks to resume after text, and a subagent to say it again. It must have read them, though:
where the connection drops at once, what is on its way may be lost, and all is tried again.
"""

import collections
import concurrent.futures
import json
import os
import re
import tempfile
import time

import harness
import tui
from harness import Ccfix, check, claude, json_lines, run_table, stop, wait_for
from session import DANGER, read
from upstream import MessagesWriter, Upstream, call, cut, end, payload, reset, say, think, wait

AGENT_SDK = os.path.join(harness.CACHE, "agent-sdk", "node_modules", "@anthropic-ai")
AGENT_SDK = os.path.join(AGENT_SDK, "claude-agent-sdk", "sdk.mjs")
AT_ONCE = 2  # clients
NATIVE = {"TARGET_FORMAT": "anthropic"}
PROMPT = "TASK: do it."
SUBTASK = "SUBTASK: do it for me."
FIRST, SECOND, LAST, BACK = "FIRST-HALF", "SECOND-HALF", "LAST-WORDS", "MAIN-DONE"
BOTH = "The %s is here, and the %s is here." % (FIRST, SECOND)
HALF = BOTH[: BOTH.index(", and")]
THOUGHT = "First I think about it, then I think about it again."
PAUSE = wait(0.3)  # without it the client may not have read all, and is lucky
MOST = 12  # requests, when each attempt breaks
BROKEN = "connection", "broke off", "closed", "ended early"
REASON = "The accelerator fell off the bus"
FAILURE = payload(error={"message": REASON, "type": "server_error", "code": 500})
NATIVE_FAILURE = payload(type="error", error={"type": "api_error", "message": REASON})

Seen = collections.namedtuple("Seen", "code texts final told")


def step(number, upto=None):
    """A call of a tool that leaves a line in a file."""
    command = "echo ran >> %d.txt" % number
    return call("Bash", upto, command=command, description="a step of the task")


class Break(collections.namedtuple("Break", "name whole before open")):
    """A place where a reply breaks.

    whole   the steps of the whole reply
    before  the steps that come before the break; open: one more, whose block is not closed
    """

    @property
    def tools(self):
        return sum(kind == "call" for kind, _ in self.whole)

    def steps(self, native):
        """What comes before the break. Only Anthropic's format tells the end of a block."""
        if not (native and self.open):
            return self.before + [self.open] * bool(self.open)
        events = list(MessagesWriter(Nothing).step(*self.open))[:-1]
        return self.before + [payload(**dict(e, index=len(self.before))) for e in events]


class Nothing:
    raw = ""


BREAKS = (
    Break("in text", [say(BOTH)], [], say(HALF)),
    Break("after a whole text block", [say(BOTH), step(1)], [say(BOTH)], None),
    Break("in thinking", [think(THOUGHT), say(BOTH)], [], think(THOUGHT[:22])),
    Break("after thinking", [think(THOUGHT), say(BOTH)], [think(THOUGHT)], None),
    Break("in tool input", [say(BOTH), step(1)], [say(BOTH)], step(1, 20)),
    Break("between two calls", [say(BOTH), step(1), step(2)], [say(BOTH), step(1)], None),
    Break("after the last block", [say(BOTH), step(1)], [say(BOTH), step(1)], None),
)
MORE = (
    Break("after the last text", [say(BOTH)], [say(BOTH)], None),
    Break("in a lone call", [step(1), say(BOTH)], [], step(1, 20)),
    Break("after a lone call", [step(1)], [step(1)], None),
    Break("in a call after thinking", [think(THOUGHT), step(1)], [think(THOUGHT)], step(1, 20)),
    Break("between two lone calls", [step(1), step(2)], [step(1)], None),
    Break("in the second of lone calls", [step(1), step(2)], [step(1)], step(2, 20)),
    Break("after two lone calls", [step(1), step(2)], [step(1), step(2)], None),
)
THOUGHT_OUT = Break(
    "in text after thinking", [think(THOUGHT), say(BOTH)], [think(THOUGHT)], say(HALF)
)


class Script:
    """The model: the first `times` attempts at the first reply of an agent that is asked `words`
    break by `how`; the next one is whole. Asked to resume, it says what its last words left out."""

    def __init__(self, place, words=PROMPT, how=(PAUSE, cut()), times=1):
        self.place, self.words, self.how, self.left = place, words, list(how), times
        self.resumed = 0

    def __call__(self, request):
        if not request.asks(self.words):
            return self.around(request)
        if request.results:
            return [say("The %s." % LAST)]
        if self.left:
            self.left -= 1
            return self.place.steps(request.native) + self.how
        if request.round and "again from the start" not in request.raw:
            return self.rest(request.raw)
        return self.place.whole

    def rest(self, raw):
        self.resumed += 1
        if BOTH in raw:
            return [step for step in self.place.whole if step != say(BOTH)]
        words = BOTH[len(HALF) :] if HALF in raw else BOTH
        return [say(words) if step == say(BOTH) else step for step in self.place.whole]

    def around(self, request):
        """The agent that calls the one whose reply breaks, and requests on the side."""
        if not request.asks(PROMPT):
            return [say("Aside.")]
        if BOTH in request.raw or LAST in request.raw:
            return [say(BACK)]
        helper = {"description": "a small task", "prompt": SUBTASK}
        helper["subagent_type"] = "general-purpose"
        return [say("Waiting.")] if request.round else [call("Agent", **helper)]


# Ways to run the client: (url, home, work) -> Seen


def outcome(run):
    """What stream-json says: the texts of the main agent, and its result."""
    lines = [line for line in json_lines(run.out) if not line.get("parent_tool_use_id")]
    blocks = [b for m in lines if m["type"] == "assistant" for b in m["message"]["content"]]
    texts = "\n".join(block["text"] for block in blocks if block["type"] == "text")
    result = ([line for line in lines if line["type"] == "result"] or [{}])[-1]
    code = run.code or bool(result.get("is_error"))
    return Seen(
        code, texts, result.get("result") or "", "%s\n%s" % (run.out[-1500:], run.err[-500:])
    )


def in_print_mode(url, home, work, **options):
    stream = ("--output-format", "stream-json", "--verbose")
    env = {"CLAUDE_CODE_MAX_RETRIES": "10"}
    return outcome(
        claude(url, "-p", PROMPT, DANGER, *stream, home=home, cwd=work, env=env, **options)
    )


def in_the_tui(url, home, work, prompt=PROMPT):
    with tui.client(url, home, DANGER, work=work) as terminal:
        terminal.ask(prompt)
        settle(terminal)
        seen = terminal.screen()
    return Seen(0, seen, seen, seen)


def settle(terminal, seconds=60, quiet=2):
    """Wait until the turn is over: the client says for how long it went, or is calm for a while."""
    terminal.wait_for("esc to interrupt", 5)
    end, calm = time.monotonic() + seconds, time.monotonic()
    while time.monotonic() < min(end, calm + quiet):
        time.sleep(0.05)
        if terminal.on_screen("esc to interrupt"):
            calm = time.monotonic()
        elif re.search(" for [0-9]+s \u00b7 done ", terminal.screen()):
            quiet = 0.3


NODE = """
const [sdk, client, prompt] = process.argv.slice(1);
const { query } = await import(sdk);
const options = {
  pathToClaudeCodeExecutable: client, permissionMode: 'bypassPermissions',
  allowDangerouslySkipPermissions: true, env: process.env, settingSources: [],
};
for await (const message of query({ prompt, options })) console.log(JSON.stringify(message));
"""


def in_the_agent_sdk(url, home, work, prompt=PROMPT):
    tui.prepare(home, work)
    own = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": tui.KEY}
    env = tui.environment(home, ANTHROPIC_MODEL="my-own-model", **own)
    program = ["node", "--input-type=module", "-e", NODE, AGENT_SDK, tui.binary(), prompt]
    return outcome(harness.run(program, cwd=work, env=env))


PRINT = "print", in_print_mode, PROMPT
TUI = "TUI", in_the_tui, PROMPT
SUBAGENT = "subagent", in_print_mode, SUBTASK
SDK = "Agent SDK", in_the_agent_sdk, PROMPT


# Rows


class Row:
    """One break, one way to run the client, one kind of cut."""

    def __init__(self, place, way, how=(PAUSE, cut()), settings=None, note=""):
        self.place, self.settings = place, settings
        self.way, self.run, self.words = way
        self.script = Script(place, self.words, how)
        self.name = "%s: %s%s" % (self.way, place.name, note)
        self.requests, self.files = [], []

    def play(self):
        """-> (name, what is wrong, what to show)"""
        with tempfile.TemporaryDirectory() as home, Upstream(self.script) as upstream:
            work = tui.prepare(home)
            begun = time.monotonic()
            with Ccfix(upstream.url, env=self.settings) as server:
                seen = self.drive(server, upstream, home, work)
            self.seconds = time.monotonic() - begun
            self.requests = upstream.requests
            names = sorted(name for name in os.listdir(work) if name.endswith(".txt"))
            self.files = [read(work, name) for name in names]
        return self.name, self.wrong(seen), lambda: self.told(seen)

    def drive(self, server, upstream, home, work):
        return self.run(server.url, home, work)

    def wrong(self, seen):
        """What is not as it should be, in words."""
        found = []
        last = LAST if self.place.tools else SECOND
        if seen.code:
            found.append("exit code %s" % seen.code)
        if self.words == SUBTASK:
            seen = self.of_the_subagent(seen, found)
        for word in (FIRST, SECOND, LAST):
            wanted = 1 if word in BOTH and self.has_text() or word == last else 0
            times = seen.texts.count(word)
            if times != wanted:
                found.append("%s is there %d times" % (word, times))
        if last not in seen.final:
            found.append("the end does not say %s" % last)
        if self.files != ["ran\n"] * self.place.tools:
            found.append("the tools left %s" % self.files)
        asked = sum(r.asks(self.words) for r in self.requests)
        if asked > 2 + bool(self.place.tools):
            found.append("%d requests" % asked)
        return ", ".join(found)

    def has_text(self):
        return say(BOTH) in self.place.whole

    def of_the_subagent(self, seen, found):
        """What the subagent said: in its own history, and in what came back to the main agent."""
        if BACK not in seen.final:
            found.append("the main agent does not say " + BACK)
        own = [r for r in self.requests if r.asks(SUBTASK)]
        back = [r for r in self.requests if not r.asks(SUBTASK) and r.round]
        said = [m for r in own[-1:] for m in r.messages if m["role"] == "assistant"]
        texts, final = json.dumps(said), "".join(back[-1].raw if back else "")
        last = LAST if self.place.tools else BOTH
        final = last if last in final else ""
        return Seen(0, texts + final, final, "")

    def told(self, seen):
        lines = ["after %.1f s; files: %s" % (self.seconds, self.files), seen.told]
        for r in self.requests:
            kind = "streamed" if r.body.get("stream") else "not streamed"
            row = (r.number, r.at - self.requests[0].at, kind, len(r.messages))
            said = json.dumps(r.messages[-1])[:300]
            lines.append("upstream request %d (+%.1f s, %s): %d messages, last: " % row + said)
        return "\n".join(lines)


class AsAtHome(Row):
    """The client ends the turn by itself, as it does before Anthropic's own endpoint."""

    def wrong(self, seen):
        found = tui.squeezed("Connection lost") in tui.squeezed(seen.final)
        return "" if found else "the client does not say what happened"


class Restart(Row):
    """ccfix gets SIGTERM in the middle of the reply; a new one takes its place."""

    def drive(self, server, upstream, home, work):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            seen = pool.submit(self.run, server.url, home, work)
            wait_for(lambda: not self.script.left, 60, "the reply")
            time.sleep(0.5)
            stop(server.process)
            with Ccfix(upstream.url, env=self.settings, port=server.port):
                return seen.result()


class Hopeless(Row):
    """Each attempt breaks: the session ends, and the reason is told."""

    def __init__(self, place, way, how, reason, settings=None, note=""):
        super().__init__(place, way, how, settings, note)
        self.script.left, self.reason = 1000, reason

    def wrong(self, seen):
        found, told = [], tui.squeezed(seen.final)
        if not any(tui.squeezed(words) in told for words in self.reason):
            found.append("the reason is not told")
        if len(self.requests) > MOST:
            found.append("%d requests" % len(self.requests))
        if self.files:
            found.append("the tools left %s" % self.files)
        if self.way != "TUI" and not seen.code:
            found.append("exit code 0")
        return ", ".join(found)


def play(rows):
    """Play the rows, some at once; check each."""
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for name, wrong, told in pool.map(lambda row: row.play(), rows):
            check(name, not wrong, lambda: "%s\n%s" % (wrong, told()))


def print_mode():
    play([Row(place, PRINT) for place in BREAKS])


def the_tui():
    play([Row(place, TUI) for place in BREAKS])


def subagents():
    play([Row(place, SUBAGENT) for place in BREAKS])


def agent_sdk():
    play([Row(place, SDK) for place in BREAKS])


def other_places():
    rows = [Row(place, TUI) for place in MORE]
    rows += [Row(THOUGHT_OUT, way) for way in (PRINT, SUBAGENT, SDK)]
    play(rows + [AsAtHome(THOUGHT_OUT, TUI)])


def other_ends():
    """Not a connection that is closed, but one that is reset, a body that ends, or an error."""
    for note, *how in (
        (", by a reset", PAUSE, reset()),
        (", by an end", PAUSE, end()),
        (", by an error", PAUSE, FAILURE, end()),
        (", without a pause", cut()),
    ):
        places = BREAKS[0], BREAKS[4]
        play([Row(place, way, how, note=note) for place in places for way in (PRINT, TUI)])


def native_format():
    """On an upstream that speaks Anthropic's format itself, and tells the end of each block."""
    rows = [Row(place, PRINT, settings=NATIVE, note=", native") for place in BREAKS]
    rows += [Row(BREAKS[n], TUI, settings=NATIVE, note=", native") for n in (0, 1, 4)]
    failed = PAUSE, NATIVE_FAILURE, end()
    rows += [Row(BREAKS[0], w, failed, NATIVE, ", native, by an error") for w in (PRINT, TUI)]
    play(rows)


def ccfix_ends():
    how = [wait(30)]
    rows = [Restart(BREAKS[n], w, how, note=", by SIGTERM") for n in (0, 4) for w in (PRINT, TUI)]
    play(rows + [Restart(BREAKS[0], PRINT, how, NATIVE, ", native, by SIGTERM")])


def each_attempt_breaks():
    failed, native = (PAUSE, FAILURE, end()), (PAUSE, NATIVE_FAILURE, end())
    rows = [
        Hopeless(BREAKS[n], way, how, reason, note=", each time" + note)
        for note, how, reason in (("", (PAUSE, cut()), BROKEN), (", by an error", failed, [REASON]))
        for n, way in ((0, PRINT), (0, TUI), (4, PRINT), (0, SDK))
    ]
    note = ", each time, by an error, native"
    play(rows + [Hopeless(BREAKS[0], PRINT, native, [REASON], NATIVE, note)])


if __name__ == "__main__":
    run_table(
        print_mode,
        the_tui,
        subagents,
        agent_sdk,
        other_places,
        other_ends,
        native_format,
        ccfix_ends,
        each_attempt_breaks,
    )
