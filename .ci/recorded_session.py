"""A session of the real Claude Code client that cache_session.py and prefix_session.py measure: 25 requests or so, always the same.

Seven runs of the client, all but the first with --continue: a tool loop (Read, Edit, Bash), parallel calls, an image, ToolSearch for
built-in and MCP tools, a subagent, bare "continue" and "yes"; on the way a second MCP server is added and the date changes. The
model is a script.
"""

import glob
import json
import os
import shutil
import struct
import sys
import zlib

from harness import HERE, claude, finish
from scripted_upstream import call, say, think

EARLY, LATE = "Etc/GMT+12", "Etc/GMT-14"  # 26 hours apart: never the same date
SERVER = {"command": sys.executable, "args": [os.path.join(HERE, "mcp_server.py")]}
BOOK = "mcp__answers__look_up_the_answer_in_the_big_book_of_answers_"


def bash(command):
    return call("Bash", command=command, description="a step of the task")


def dot():
    """A PNG of one red pixel."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0"))
        + chunk(b"IEND", b"")
    )


def tasks(work):
    """[(prompt, [reply, ...])]: what the user says, and the model's replies to it and to the results of its calls."""

    def path(name):
        return os.path.join(work, name)

    helper = {
        "description": "a small task",
        "prompt": "SUBTASK: look around.",
        "subagent_type": "general-purpose",
    }
    return [
        (
            "TASK-1: In notes.txt make the colour blue, then copy it.",
            [
                [
                    think("First the file."),
                    say("I read it."),
                    call("Read", file_path=path("notes.txt")),
                ],
                [call("Edit", new_string="blue", old_string="red", file_path=path("notes.txt"))],
                [say("Now a copy."), bash("cp notes.txt copy.txt && echo copied")],
                [
                    say("Three at once."),
                    bash("sleep 0.5; echo GAMMA"),
                    call("Read", file_path=path("a.txt")),
                    call("Read", file_path=path("b.txt")),
                ],
                [bash("wc -l notes.txt")],
                [say("END-1: the colour is blue.")],
            ],
        ),
        ("continue", [[bash("cat copy.txt")], [say("END-2: nothing was left to do.")]]),
        (
            "TASK-3: Ask the book of answers.",
            [
                [call("ToolSearch", query="select:%stwo,WebFetch" % BOOK, max_results=5)],
                [call(BOOK + "two", question="why")],
                [call("ToolSearch", query="select:%sone" % BOOK, max_results=5)],
                [call(BOOK + "one", question="when")],
                [say("END-3: the book has answered.")],
            ],
        ),
        (
            "TASK-4: Let a helper look around.",
            [[call("Agent", **helper)], [say("Waiting.")], [say("END-4: the helper is back.")]],
        ),
        ("yes", [[say("END-5: agreed.")]]),
        (
            "TASK-6: What is in dot.png?",
            [[call("Read", file_path=path("dot.png"))], [say("END-6: a red dot.")]],
        ),
        (
            "TASK-7: Write a poem to poem.txt.",
            [
                [
                    think("Short."),
                    call("Write", file_path=path("poem.txt"), content="Roses are red.\n"),
                ],
                [bash("cat poem.txt")],
                [say("END-7: written.")],
            ],
        ),
    ]


def model(work):
    """The script for Scripted: the reply that the conversation has come to, told by its assistant turns alone."""
    replies = [reply for prompt, replies in tasks(work) for reply in replies]
    helper = [[bash("ls")], [say("SUB-END: five files.")]]

    def script(request):
        return (helper if request.asks("SUBTASK") else replies)[request.round]

    return script


def fill(work):
    """An empty folder with the files of the session."""
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)
    for name, content in (
        ("notes.txt", b"colour: red\n"),
        ("a.txt", b"ALPHA\n"),
        ("b.txt", b"BETA\n"),
        ("dot.png", dot()),
    ):
        with open(os.path.join(work, name), "wb") as file:
            file.write(content)


def play(url, work, home, zone=EARLY, later=None, most=99):
    """The session, from fresh folders, in time zone `zone`, its last two runs in `later`; -> [run that went wrong, as text]."""
    fill(work)
    shutil.rmtree(home, ignore_errors=True)
    os.makedirs(home)
    wrong, listed = [], tasks(work)[:most]
    for place, (prompt, replies) in enumerate(listed):
        now = later if later and place >= 5 else zone
        servers = {
            "mcpServers": {"answers": SERVER, "more": SERVER} if place >= 3 else {"answers": SERVER}
        }
        run = claude(
            url,
            "-p",
            prompt,
            "--dangerously-skip-permissions",
            "--mcp-config",
            json.dumps(servers),
            *(["--continue"] if place else []),
            home=home,
            cwd=work,
            env={"TZ": now},
            limit=90,
        )
        end = replies[-1][-1].value
        if run.code or end not in run.out:
            wrong.append(
                "%s: exit code %s, expected %r, got %r %r"
                % (prompt, run.code, end, run.out[-300:], run.err[-300:])
            )
    return wrong


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


def publish(table):
    """Print a Markdown table, write it to the file that the command line names, and end with the sum of the checks."""
    print("\n" + table)
    if sys.argv[1:]:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            file.write(table)
    finish()
