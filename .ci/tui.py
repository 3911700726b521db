"""A driver of programs under a pseudo-terminal, and of the real client's own screen (TUI).

    with client(url, home, "--permission-mode", "manual") as terminal:
        terminal.ask("Do the task.")
        terminal.wait_for("ALL-DONE", 30)

Any other command, `ccfix.py run` for example: `prepare(home)`, then `Terminal(command,
environment(home), work)` and `ready(terminal)`.

Programs place words by moving the cursor, so that what they write has few blanks: everything that
was ever written is in `text`, without any blank; what stands on the screen now is `screen()`.
Standard library only; Python 3.6 or newer.
"""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import threading
import time
import unicodedata

import harness
from harness import check

VERSION = os.environ.get("CLAUDE_VERSION", "2.1.332")
ROOT = os.environ.get("CLAUDE_ROOT") or os.path.join(harness.CACHE, "claude")
SIZE = (120, 40)
KEY = "placeholder"
ENTER, ESCAPE, CTRL_C, TAB = "\r", "\x1b", "\x03", "\t"
UP, DOWN = "\x1b[A", "\x1b[B"
# opens the terminal as the first one of its session, which makes it the controlling one
OPEN = 'tty=$1; shift; exec "$@" <>"$tty" >&0 2>&0'
CODES = re.compile(
    r"\x1b\[([0-9;:?<>=!]*)[ -/]*([@-~])"  # CSI
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)"  # OSC, DCS, ...
    r"|\x1b([()*+#%].|[^\[\]PX^_])"
    r"|([\r\n\b\t])"
    r"|([^\x00-\x1f\x7f]+)"
    r"|[\x00-\x1a\x1c-\x1f\x7f]"
)


def squeezed(text):
    return re.sub(r"\s", "", text)


class Screen:
    """What stands on a terminal: as much of the VT100 as programs of today need.

    rows: lists of cells; gone: lines that have left at the top
    """

    def __init__(self, columns, lines):
        self.columns, self.lines = columns, lines
        self.gone, self.saved, self.rest = [], (0, 0), ""
        self.clear()

    def clear(self):
        self.rows = [self.blank() for _ in range(self.lines)]
        self.x = self.y = 0

    def blank(self):
        return [" "] * self.columns

    def feed(self, text):
        """Take what the program wrote; half a code waits for its end."""
        text, place = self.rest + text, 0
        while place < len(text):
            found = CODES.match(text, place)
            if not found:
                break
            parameters, final, escape, control, printed = found.groups()
            if final:
                self.control_sequence(parameters, final)
            elif escape:
                self.escape(escape)
            elif control:
                self.move(control)
            elif printed:
                self.put(printed)
            place = found.end()
        self.rest = text[place:]

    def put(self, text):
        for char in text:
            if unicodedata.combining(char) or char in "\u200b\u200d\ufe0e\ufe0f":
                continue
            width = 2 if unicodedata.east_asian_width(char) in "WF" else 1
            if self.x + width > self.columns:
                self.x = 0
                self.down()
            self.rows[self.y][self.x : self.x + width] = [char, ""][:width]
            self.x += width

    def down(self):
        if self.y < self.lines - 1:
            self.y += 1
        else:
            self.gone.append(self.line(self.rows.pop(0)))
            self.rows.append(self.blank())

    def move(self, control):
        if control == "\r":
            self.x = 0
        elif control == "\n":
            self.down()
        elif control == "\b":
            self.x = max(0, self.x - 1)
        else:
            self.x = min(self.columns - 1, self.x // 8 * 8 + 8)

    def escape(self, code):
        if code == "7":
            self.saved = self.x, self.y
        elif code == "8":
            self.x, self.y = self.saved
        elif code == "M":
            self.y = max(0, self.y - 1)
        elif code == "c":
            self.clear()

    def control_sequence(self, parameters, final):
        if parameters[:1] in ("?", "<", ">", "="):
            if parameters in ("?1049", "?47") and final in "hl":
                self.clear()
            return
        numbers = [int(n) if n.isdigit() else 0 for n in parameters.split(";")]
        first, second = (numbers + [0])[:2]
        if final in "JKLMPX@":
            self.erase(final, first)
        else:
            self.place(final, first, second)

    def place(self, final, first, second):
        """Move the cursor."""
        count = max(1, first)
        steps = {"A": -count, "B": count, "e": count, "E": count, "F": -count}
        sideways = {"C": count, "D": -count, "a": count}
        if final in "Hf":
            self.y, self.x = count - 1, max(1, second) - 1
        elif final in "G`":
            self.x = count - 1
        elif final == "d":
            self.y = count - 1
        self.y += steps.get(final, 0)
        self.x = 0 if final in "EF" else self.x + sideways.get(final, 0)
        self.y = min(max(self.y, 0), self.lines - 1)
        self.x = min(max(self.x, 0), self.columns)

    def erase(self, final, number):
        x, y, row, count = self.x, self.y, self.rows[self.y], max(1, number)
        if final in "JK":
            start, end = (0 if number else x), (x + 1 if number == 1 else self.columns)
            row[start:end] = [" "] * (end - start)
            whole = {"J0": range(y + 1, self.lines), "J1": range(y), "J2": range(self.lines)}
            for number in whole.get("%s%d" % (final, number), ()):
                self.rows[number] = self.blank()
        elif final == "X":
            row[x : x + count] = [" "] * min(count, self.columns - x)
        elif final == "P":
            row[:] = (row[:x] + row[x + count :] + self.blank())[: self.columns]
        elif final == "@":
            row[:] = (row[:x] + [" "] * count + row[x:])[: self.columns]
        elif final == "L":
            new = [self.blank() for _ in range(count)]
            self.rows = (self.rows[:y] + new + self.rows[y:])[: self.lines]
        else:
            rest = self.rows[y + count :] + [self.blank() for _ in range(count)]
            self.rows = self.rows[:y] + rest[: self.lines - y]

    @staticmethod
    def line(row):
        return "".join(row).rstrip()

    def __str__(self):
        return "\n".join(map(self.line, self.rows)).rstrip("\n")


class Terminal:
    """A program under a pseudo-terminal; a thread reads what it writes.

    text   all that it has written since forget(), without codes and blanks
    """

    def __init__(self, command, env, cwd, size=SIZE):
        self.text, self.raw, self.code = "", b"", None
        self.display, self.lock = Screen(*size), threading.Lock()
        self.fd, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", OPEN, "sh", os.ttyname(slave)] + list(command),
            env=dict({"TERM": "xterm-256color", "LANG": "C.UTF-8"}, **env),
            cwd=cwd,
            start_new_session=True,
            **quiet,
        )
        self.slave = slave  # open here too: a write of ours never meets a terminal without reader
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()

    def read(self):
        while not self.ended.is_set():
            if select.select([self.fd], [], [], 0.1)[0]:
                self.take(os.read(self.fd, 65536))

    def take(self, raw):
        with self.lock:
            self.raw += raw
            try:
                text, self.raw = self.raw.decode("utf-8"), b""
            except UnicodeDecodeError as error:
                if len(self.raw) - error.start < 4:  # the rest of a character is on its way
                    text, self.raw = (
                        self.raw[: error.start].decode("utf-8"),
                        self.raw[error.start :],
                    )
                else:
                    text, self.raw = self.raw.decode("utf-8", "replace"), b""
            before = self.display.rest
            self.display.feed(text)
            written = before + text
            written = written[: len(written) - len(self.display.rest)]
            self.text += squeezed(CODES.sub(lambda found: found.group(5) or "", written))

    # What it shows

    def screen(self):
        """What stands on the screen now, and what has left it at the top, in lines."""
        with self.lock:
            return "\n".join(self.display.gone + [str(self.display)])

    def forget(self):
        """What comes from now on is `text`."""
        with self.lock:
            self.text = ""

    def shows(self, *patterns):
        """Whether all patterns (blanks in them do not count) are in `text`."""
        return all(re.search(squeezed(pattern), self.text) for pattern in patterns)

    def on_screen(self, *words):
        """Whether all these words stand on the screen now, or have left it at the top."""
        seen = squeezed(self.screen())
        return all(squeezed(word) in seen for word in words)

    def wait_for(self, words, seconds=30, still=False):
        """Wait until the words, as they are, were written (still: stand on the screen) -> bool."""
        end, words = time.monotonic() + seconds, squeezed(words)
        while True:
            seen = squeezed(self.screen()) if still else self.text
            if words in seen or time.monotonic() > end:
                return words in seen
            time.sleep(0.05)

    def see(self, name, *patterns, seconds=60):
        """Check that the patterns come to the screen."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.shows(*patterns):
            time.sleep(0.05)
        return check(name, self.shows(*patterns), self.text[-3000:])

    # What the user does

    def press(self, keys):
        """Write the keys as they are."""
        os.write(self.fd, keys.encode())

    def type(self, keys):
        """The same, and `text` begins anew."""
        self.forget()
        self.press(keys)

    def ask(self, words, seconds=30):
        """Type the words at the client's prompt, see them there, and press Enter."""
        self.type(words)
        self.wait_for(words, seconds)
        time.sleep(0.5)  # keys that come at once are taken for a paste
        self.press(ENTER)

    def wait(self, seconds=15):
        """Wait for its end -> exit code, or None."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)

    def stop(self):
        """End it, and whatever it has started in its own process group."""
        if self.process.poll() is None:
            self.process.terminate()
            if self.wait(3) is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.ended.set()
        self.thread.join()
        os.close(self.slave)
        os.close(self.fd)


# The real client


def prepare(home, work=None, **more):
    """Make a home whose owner has seen the client's first questions -> the folder to work in."""
    home = os.path.realpath(home)
    work = os.path.realpath(work or os.path.join(home, "work"))
    os.makedirs(work, exist_ok=True)
    known = {"hasCompletedOnboarding": True, "theme": "dark", "autoUpdates": False}
    known["bypassPermissionsModeAccepted"] = True
    known["customApiKeyResponses"] = {"approved": [KEY], "rejected": []}
    trusted = {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}
    trusted.update(allowedTools=[], history=[], mcpServers={})  # old clients want them
    known["projects"] = {work: trusted}
    with open(os.path.join(home, ".claude.json"), "w", encoding="utf-8") as file:
        json.dump(dict(known, **more), file)
    return work


def environment(home, **more):
    """The whole environment of a client that knows nothing of this machine's own."""
    own = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": os.path.realpath(home),
        "LANG": "C.UTF-8",
        "TERM": "xterm-256color",
        "SHELL": "/bin/bash",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "IS_SANDBOX": "1",
    }
    return dict(own, **more)


def binary(version=None):
    return os.path.join(ROOT, version or VERSION, "node_modules", ".bin", "claude")


@contextlib.contextmanager
def client(url, home, *args, version=None, env=None, work=None, model="my-own-model", seconds=30):
    """The real client before `url`, isolated, in a prepared home, its prompt on the screen.

    url    ANTHROPIC_BASE_URL, on loopback
    env    further environment; model: ANTHROPIC_MODEL (None: its default one)
    work   the current folder; without it, one in the home
    """
    work = prepare(home, work)
    own = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": KEY}
    own.update({"ANTHROPIC_MODEL": model} if model else {})
    settings = environment(home, **dict(own, **(env or {})))
    with Terminal([binary(version)] + list(args), settings, work) as terminal:
        if not ready(terminal, seconds):
            raise RuntimeError("no prompt of the client:\n" + terminal.screen()[-3000:])
        yield terminal


def ready(terminal, seconds=30):
    """Wait until the client takes keys: its prompt and the line below it are there -> bool."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and terminal.process.poll() is None:
        rows = terminal.screen().splitlines()
        if any(re.match("[\u276f>](\\s|$)", row.strip("\u2502 ")) for row in rows):
            time.sleep(0.3)
            return True
        time.sleep(0.05)
    return False
