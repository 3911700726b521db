"""How much of the provider's prefix cache a Claude Code session keeps through ccfix, and through a naive conversion.

    python3 .ci/prefix_session.py [FILE]      # prints a Markdown table, and writes it to FILE

1. A session of the real client (recorded_session.py) on a scripted upstream: each request that ccfix sends must extend the last one.
   A perfect prefix has every byte of the last request, in the order in which chat templates put them: system, tools, messages.
2. The main conversation of it, its long texts cut and the model's own answers put in, on a real llama.cpp server: cached tokens, by the
   server's own count, of the last request's prompt and answer. Turns in which the client loads new tools are left out there: the tools
   stand before the conversation, so no conversion can keep it.
"""

import json
import os
import signal
import sys
import tempfile
import time

from harness import ccfix, check, post
from real_server import MODEL, llama
from recorded_session import LATE, is_main, model, play, publish, recorded, tasks
from scripted_upstream import Scripted

COMMAND = "python3 .ci/prefix_session.py"
LONG = 80  # characters of a text, for the real server
ANSWER = 4  # tokens of its answers
TOOLS = (
    "Agent",
    "Bash",
    "Edit",
    "Read",
    "ToolSearch",
    "Write",
)  # kept, besides those that are loaded on the way


# What ccfix is measured against: what many proxies do


def naive(body, target):
    """A plain conversion: all system text in front, tools in the client's order, arguments as the client echoes them."""
    front, messages = [text_of(body.get("system"))], []
    for message in body["messages"]:
        content, text = message["content"], text_of(message["content"])
        kinds = (
            [block["type"] for block in content if isinstance(block, dict)]
            if isinstance(content, list)
            else []
        )
        if message["role"] == "system":
            front.append(text)
        elif message["role"] == "assistant":
            calls = (
                [
                    {
                        "id": block["id"],
                        "type": "function",
                        "function": {
                            "name": block["name"],
                            "arguments": json.dumps(block["input"]),
                        },
                    }
                    for block in content
                    if block["type"] == "tool_use"
                ]
                if kinds
                else []
            )
            messages.append(
                dict(
                    {"role": "assistant", "content": text},
                    **({"tool_calls": calls} if calls else {}),
                )
            )
        else:
            messages += (
                [
                    {
                        "role": "tool",
                        "tool_call_id": block["tool_use_id"],
                        "content": text_of(block.get("content")),
                    }
                    for block in content
                    if block["type"] == "tool_result"
                ]
                if kinds
                else []
            )
            messages += [{"role": "user", "content": text}] if text else []
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool["name"],
                "description": tool.get("description", ""),
                "parameters": tool["input_schema"],
            },
        }
        for tool in body.get("tools", [])
    ]
    return {
        "model": target,
        "messages": [{"role": "system", "content": "\n\n".join(front)}] + messages,
        "tools": tools,
    }


def text_of(content):
    """The text in a content of any shape; what is no text is shown as JSON, tool calls and their results are left out."""
    if isinstance(content, str):
        return content
    return "\n\n".join(
        block["text"] if block["type"] == "text" else json.dumps(block)
        for block in content or []
        if block["type"] not in ("tool_use", "tool_result", "thinking")
    )


# 1. Bytes


def prompt(sent):
    """(the bytes up to the end of the tools, all bytes) of a request, as chat templates order them."""
    lines = [json.dumps(part) for part in sent["messages"][:1] + sent["tools"]]
    return "\n".join(lines), "\n".join(
        lines + [json.dumps(part) for part in sent["messages"][1:]] + [""]
    )


def extends(old, new):
    return new[: len(old)] == old


def bytes_kept(requests):
    """(message lists that extend the last, tool lists that do, bytes kept, bytes that could be kept) of a conversation."""
    lists = tools = kept = possible = 0
    for old, new in zip(requests, requests[1:]):
        lists += extends(old["messages"], new["messages"])
        tools += extends(old["tools"], new["tools"])
        before, after = prompt(old), prompt(new)
        perfect = len(before[1] if len(old["tools"]) == len(new["tools"]) else before[0])
        kept, possible = (
            kept + min(perfect, len(os.path.commonprefix([before[1], after[1]]))),
            possible + perfect,
        )
    return lists, tools, kept, possible


def arguments(sent):
    return [
        call["function"]["arguments"]
        for message in sent["messages"]
        for call in message.get("tool_calls", [])
    ]


def session(work, home, records):
    """([exchange of the main conversation], [arguments that the model wrote]) of one session of the real client."""
    with Scripted(model(work)) as upstream, ccfix(upstream.url, env={"RECORD_DIR": records}) as url:
        wrong = play(url, work, home, later=LATE)
        check("the client's session goes well", not wrong, "\n".join(wrong))
    written = [
        step.value[1]
        for _, replies in tasks(work)
        for reply in replies
        for step in reply
        if step.kind == "call"
    ]
    return [exchange for exchange in recorded(records) if is_main(exchange)], written


# 2. Tokens, on a real server


def cut_down(body, answers):
    """The client's request, small enough for a small model: its own answers put in, long texts and tools cut."""
    said = iter(answers)
    return dict(
        body,
        max_tokens=ANSWER,
        stream=False,
        system=[dict(block, text=short(block["text"], LONG)) for block in body["system"]],
        tools=[
            cut_tool(tool)
            for tool in body["tools"]
            if tool["name"] in TOOLS or tool.get("defer_loading")
        ],
        messages=[
            dict(message, content=cut_content(message, said)) for message in body["messages"]
        ],
    )


def cut_content(message, answers):
    """The content of a message, cut; an assistant's text is the next answer."""
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if message["role"] == "assistant":
        answer = next(answers)
        return ([{"type": "text", "text": answer}] if answer else []) + [
            block for block in content if block["type"] == "tool_use"
        ]
    return [cut_block(block) for block in content]


def cut_block(block):
    if block["type"] == "image":
        return {"type": "text", "text": "[image]"}
    if block["type"] == "tool_result":
        inner = block["content"]
        return dict(
            block,
            content=(
                short(inner, LONG)
                if isinstance(inner, str)
                else [cut_block(part) for part in inner]
            ),
        )
    return dict(block, text=short(block["text"], LONG)) if block["type"] == "text" else block


def short(text, limit):
    """The text's two ends: what changes stands at the end of the client's texts."""
    return text if len(text) <= limit else text[: limit // 2] + " ... " + text[-limit // 2 :]


def cut_tool(tool):
    known = tool["input_schema"].get("properties", {})
    names = tool["input_schema"].get("required", [])[:1]
    schema = {
        "type": "object",
        "properties": {
            name: {"type": known[name].get("type", "string")} for name in names if name in known
        },
    }
    return dict(tool, description="", input_schema=schema)


def through_ccfix(url, body):
    """(prompt tokens, cached, answered, text) of a request through ccfix."""
    answer = post(url + "/v1/messages", body, timeout=200)
    if answer.status != 200:
        raise RuntimeError("ccfix: %s %s" % (answer.status, answer.raw[:300]))
    used, text = answer.body["usage"], "".join(
        block.get("text", "") for block in answer.body["content"]
    )
    return (
        used["input_tokens"] + used["cache_read_input_tokens"],
        used["cache_read_input_tokens"],
        used["output_tokens"],
        text,
    )


def directly(url, body):
    """The same of a request converted naively, to the server itself."""
    answer = post(
        url + "/chat/completions",
        dict(naive(body, MODEL), max_tokens=ANSWER, temperature=0),
        timeout=200,
    )
    if answer.status != 200:
        raise RuntimeError("the server: %s %s" % (answer.status, answer.raw[:300]))
    used, text = answer.body["usage"], answer.body["choices"][0]["message"].get("content") or ""
    return (
        used["prompt_tokens"],
        used["prompt_tokens_details"]["cached_tokens"],
        used["completion_tokens"],
        text,
    )


def tokens_kept(url, bodies, ask):
    """(cached tokens, those of a perfect prefix, the largest prompt, prompt tokens computed in all) of a conversation on a real server."""
    answers, last, cached, perfect, largest, computed = [], None, 0, 0, 0, 0
    for body in bodies:
        small = cut_down(body, answers)
        prompt_tokens, found, answered, text = ask(url, small)
        if last and last[1] == len(small["tools"]):
            cached, perfect = cached + min(found, last[0]), perfect + last[0]
        if os.environ.get("SHOW"):
            print(
                "   prompt %d, cached %d of %d, answer %r"
                % (prompt_tokens, found, last[0] if last else 0, text),
                flush=True,
            )
        answers.append(text)
        last, largest = (prompt_tokens + answered, len(small["tools"])), max(largest, prompt_tokens)
        computed += prompt_tokens - found
    return cached, perfect, largest, computed


def table(turns, rows, real, shares, same):
    """The Markdown table. rows, real, shares, same: ccfix, then naive."""

    def line(name, form, values):
        return "| %s | %s |" % (name, " | ".join(form % value for value in values))

    return "\n".join(
        (
            "| %d requests of one conversation | ccfix | naive conversion |" % (turns + 1),
            "| --- | ---: | ---: |",
            line(
                "message lists that extend the last request's",
                "%d of %d",
                [(row[0], turns) for row in rows],
            ),
            line(
                "tool lists that only grow at their end",
                "%d of %d",
                [(row[1], turns) for row in rows],
            ),
            line("tool arguments sent back as the model wrote them", "%d of %d", same),
            line(
                "bytes of a perfect prefix that are kept",
                "%.1f %%",
                [100.0 * row[2] / row[3] for row in rows],
            ),
            line(
                "tokens of a perfect prefix that the real server had cached", "**%.1f %%**", shares
            ),
            line("the same in tokens", "%d of %d", [row[:2] for row in real]),
            line(
                "prompt tokens that it had to compute, the turns with new tools included",
                "%d",
                [row[3] for row in real],
            ),
            "",
            "(%s, `%s`; Claude Code 2.1.330; llama.cpp with SmolLM2-135M, the conversation cut down to %d tokens for it.)"
            % (time.strftime("%Y-%m-%d", time.gmtime()), COMMAND, real[0][2]),
            "",
        )
    )


def main():
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("stopped")
    )  # so that the servers are ended too
    with tempfile.TemporaryDirectory() as scratch:
        exchanges, written = session(
            *[os.path.join(scratch, name) for name in ("work", "home", "records")]
        )
    bodies, ours = [exchange["request"] for exchange in exchanges], [
        exchange["sent"] for exchange in exchanges
    ]
    plain, turns = [naive(body, MODEL) for body in bodies], len(bodies) - 1
    check("a session of twenty requests or more", turns >= 19, turns)
    rows = [bytes_kept(ours), bytes_kept(plain)]
    same = [
        (sum(map(written.__contains__, arguments(sent[-1]))), len(written))
        for sent in (ours, plain)
    ]
    check(
        "ccfix: every request's messages and tools extend the last one's",
        rows[0][:2] == (turns, turns),
        rows,
    )
    check("ccfix: every byte of the common history is kept", rows[0][2] == rows[0][3], rows)
    check(
        "ccfix: every tool call goes back as the model wrote it",
        same[0][0] == same[0][1],
        (written, arguments(ours[-1])),
    )
    busy = os.getloadavg()[0] > os.cpu_count()
    threads = "--threads", (
        "1" if busy else str(os.cpu_count())
    )  # on a busy machine, threads wait for each other
    with llama(*threads) as upstream, ccfix(upstream, model=MODEL) as url:
        real = [tokens_kept(url, bodies, through_ccfix)]
    with llama(*threads) as upstream:
        real.append(tokens_kept(upstream, bodies, directly))
    shares = [100.0 * cached / perfect for cached, perfect, largest, computed in real]
    check(
        "ccfix: at least 95 % of a perfect prefix is cached by the real server",
        shares[0] >= 95,
        real,
    )
    check("ccfix keeps more than the naive conversion", shares[0] > shares[1], real)
    publish(table(turns, rows, real, shares, same))


if __name__ == "__main__":
    main()
