"""What the steps with the real client share: tools and files, and a whole session of the client
that cache_session.py and prefix_session.py measure, 25 requests or so, always the same.

Seven runs of the client, all but the first with --continue: a tool loop (Read, Edit, Bash),
parallel calls, an image, ToolSearch for built-in and MCP tools, a subagent, bare "continue" and
"yes"; on the way a second MCP server is added and the date changes. The model is a script.
"""

import glob
import json
import os
import shutil
import struct
import sys
import zlib

from harness import HERE, claude, finish
from upstream import call, say, think

DANGER = "--dangerously-skip-permissions"
EARLY, LATE = "Etc/GMT+12", "Etc/GMT-14"  # 26 hours apart: never the same date
BOOK = "look_up_the_answer_in_the_big_book_of_answers_"
ANSWERS = "mcp__answers__" + BOOK


# Tools and files


def book_of_answers():
    """The MCP server with two tools that have long names."""
    return {"command": sys.executable, "args": [os.path.join(HERE, "mcp_server.py")]}


def bash(command):
    return call("Bash", command=command, description="a step of the task")


def write(folder, name, content):
    path = os.path.join(folder, name)
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder, name):
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        return str(error)


def png_file(width, height, rows):
    """A PNG of rows of RGB, each behind a zero."""

    def part(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = part(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def png(red, green, blue, size=8):
    """A square picture in one colour."""
    return png_file(size, size, (b"\0" + bytes((red, green, blue)) * size) * size)


def screenshot(width=1280, height=800, noisy=85):
    """A picture of a screen's size in 320 KB: some rows of noise, the others grey."""
    noise = (b"\0" + os.urandom(3 * width) for _ in range(noisy))
    grey = (b"\0" + b"\x80" * (3 * width)) * (height - noisy)
    return png_file(width, height, b"".join(noise) + grey)


# The session


def tasks(work):
    """[(prompt, [reply, ...])]: what the user says, and the model's replies from there on."""

    def look(name):
        return call("Read", file_path=os.path.join(work, name))

    def load(names):
        return call("ToolSearch", query="select:" + names, max_results=5)

    helper = {"description": "a small task", "prompt": "SUBTASK: look around."}
    helper["subagent_type"] = "general-purpose"
    notes, poem = (os.path.join(work, name) for name in ("notes.txt", "poem.txt"))
    edit = call("Edit", new_string="blue", old_string="red", file_path=notes)
    poet = call("Write", file_path=poem, content="Roses are red.\n")
    three = [bash("sleep 0.5; echo GAMMA"), look("a.txt"), look("b.txt")]
    return [
        (
            "TASK-1: In notes.txt make the colour blue, then copy it.",
            [
                [think("First the file."), say("I read it."), look("notes.txt")],
                [edit],
                [say("Now a copy."), bash("cp notes.txt copy.txt && echo copied")],
                [say("Three at once.")] + three,
                [bash("wc -l notes.txt")],
                [say("END-1: the colour is blue.")],
            ],
        ),
        ("continue", [[bash("cat copy.txt")], [say("END-2: nothing was left to do.")]]),
        (
            "TASK-3: Ask the book of answers.",
            [
                [load(ANSWERS + "two,WebFetch")],
                [call(ANSWERS + "two", question="why")],
                [load(ANSWERS + "one")],
                [call(ANSWERS + "one", question="when")],
                [say("END-3: the book has answered.")],
            ],
        ),
        (
            "TASK-4: Let a helper look around.",
            [[call("Agent", **helper)], [say("Waiting.")], [say("END-4: the helper is back.")]],
        ),
        ("yes", [[say("END-5: agreed.")]]),
        ("TASK-6: What is in dot.png?", [[look("dot.png")], [say("END-6: a red dot.")]]),
        (
            "TASK-7: Write a poem to poem.txt.",
            [[think("Short."), poet], [bash("cat poem.txt")], [say("END-7: written.")]],
        ),
    ]


def model(work):
    """The script for Upstream: the reply that the assistant turns have come to."""
    replies = [reply for prompt, replies in tasks(work) for reply in replies]
    helper = [[bash("ls")], [say("SUB-END: five files.")]]

    def script(request):
        return (helper if request.asks("SUBTASK") else replies)[request.round]

    return script


def empty(folder):
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)


def play(url, work, home, zone=EARLY, later=None):
    """The session, from fresh folders, in time zone `zone`, its last two runs in `later`
    -> [run that went wrong, as text]."""
    empty(home)
    empty(work)
    write(work, "notes.txt", "colour: red\n")
    write(work, "a.txt", "ALPHA\n")
    write(work, "b.txt", "BETA\n")
    write(work, "dot.png", png(255, 0, 0, size=1))
    wrong, book = [], book_of_answers()
    for place, (prompt, replies) in enumerate(tasks(work)):
        servers = {"answers": book, "more": book} if place >= 3 else {"answers": book}
        args = ["--mcp-config", json.dumps({"mcpServers": servers})]
        args += ["--continue"] if place else []
        env = {"TZ": later if later and place >= 5 else zone}
        run = claude(url, "-p", prompt, DANGER, *args, home=home, cwd=work, env=env)
        end = replies[-1][-1].value
        if run.code or end not in run.out:
            told = (prompt, run.code, end, run.out[-300:], run.err[-300:])
            wrong.append("%s: exit code %s, expected %r, got %r %r" % told)
    return wrong


# What came of it


def recorded(folder):
    """The exchanges that ccfix recorded there, in order of the time at which they were written."""
    found = []
    for name in sorted(glob.glob(os.path.join(folder, "*.json"))):
        with open(name, encoding="utf-8") as file:
            found.append(json.load(file))
    return found


def is_main(exchange):
    """Whether an exchange belongs to the main conversation (not to a subagent)."""
    return "x-claude-code-agent-id" not in {name.lower() for name in exchange["client_headers"]}


def table_row(name, cells):
    return "| %s | %s |" % (name, " | ".join(cells))


def publish(lines):
    """Print a Markdown table, write it to the file that was named, and end with the sum."""
    table = "\n".join(lines) + "\n"
    print("\n" + table)
    if sys.argv[1:]:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            file.write(table)
    finish()
