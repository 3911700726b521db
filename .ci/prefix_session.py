"""How much of the provider's prefix cache a Claude Code session keeps through ccfix, and through a
naive conversion.

    python3 .ci/prefix_session.py [FILE]      # prints a Markdown table, and writes it to FILE

1. A session of the real client (session.py) on a scripted upstream: each request that ccfix sends
   must extend the last one. A perfect prefix has every byte of the last request, in the order in
   which chat templates put them: system, tools, messages.
2. The main conversation of it, its long texts cut and the model's own answers put in, on a real
   llama.cpp server: cached tokens, by the server's own count, of the last request's prompt and
   answer. Turns in which the client loads new tools are left out there: the tools stand before the
   conversation, so no conversion can keep it.
"""

import collections
import json
import os
import tempfile
import time

from harness import ccfix, check, end_well, llama, post
from session import LATE, is_main, model, play, publish, recorded, table_row, tasks
from tui import VERSION
from upstream import Upstream

COMMAND = "python3 .ci/prefix_session.py"
NOTE = "(%s, `%s`; Claude Code " + VERSION + "; llama.cpp with SmolLM2-135M, the conversation cut "
NOTE += "down to %d tokens for it.)"
TARGET = "smollm2-135m"
LONG = 80  # characters of a string, for the real server
ANSWER = 4  # tokens of its answers
# kept for the real server, besides those that are loaded on the way
TOOLS = ("Agent", "Bash", "Edit", "Read", "ToolSearch", "Write")

# tokens: of the prompt, those of it from the cache, those of the answer
Answer = collections.namedtuple("Answer", "prompt cached answered text")
# of a conversation: cached tokens, those of a perfect prefix, the largest prompt, tokens computed
Kept = collections.namedtuple("Kept", "cached perfect largest computed")


# What ccfix is measured against: what many proxies do


def naive(body):
    """A plain conversion: system text in front, tools and arguments as the client sends them."""
    front, messages = [text_of(body.get("system"))], []
    for message in body["messages"]:
        text, blocks = text_of(message["content"]), message["content"]
        blocks = [] if isinstance(blocks, str) else blocks
        if message["role"] == "system":
            front.append(text)
        elif message["role"] == "assistant":
            calls = [naive_call(block) for block in blocks if block["type"] == "tool_use"]
            more = {"tool_calls": calls} if calls else {}
            messages.append(dict({"role": "assistant", "content": text}, **more))
        else:
            for block in blocks:
                if block["type"] == "tool_result":
                    result = {"role": "tool", "tool_call_id": block["tool_use_id"]}
                    messages.append(dict(result, content=text_of(block.get("content"))))
            messages += [{"role": "user", "content": text}] if text else []
    system = {"role": "system", "content": "\n\n".join(front)}
    tools = [naive_tool(tool) for tool in body.get("tools", [])]
    return {"model": TARGET, "messages": [system] + messages, "tools": tools}


def naive_call(block):
    function = {"name": block["name"], "arguments": json.dumps(block["input"])}
    return {"id": block["id"], "type": "function", "function": function}


def naive_tool(tool):
    function = {"name": tool["name"], "description": tool.get("description", "")}
    return {"type": "function", "function": dict(function, parameters=tool["input_schema"])}


def text_of(content):
    """The text in a content of any shape; other blocks as JSON, without calls and results."""
    if isinstance(content, str):
        return content
    left_out = ("tool_use", "tool_result", "thinking")
    blocks = [block for block in content or [] if block["type"] not in left_out]
    return "\n\n".join(b["text"] if b["type"] == "text" else json.dumps(b) for b in blocks)


# 1. Bytes


def prompt(sent):
    """(the bytes up to the end of the tools, all bytes) of a request, as templates order them."""
    front = [json.dumps(part) for part in sent["messages"][:1] + sent["tools"]]
    rest = [json.dumps(part) for part in sent["messages"][1:]]
    return "\n".join(front), "\n".join(front + rest + [""])


def extends(old, new):
    return new[: len(old)] == old


def bytes_kept(requests):
    """(message lists that extend the last, tool lists that do, bytes kept, bytes possible)."""
    lists = tools = kept = possible = 0
    for old, new in zip(requests, requests[1:]):
        lists += extends(old["messages"], new["messages"])
        tools += extends(old["tools"], new["tools"])
        before, after = prompt(old), prompt(new)
        perfect = len(before[1] if len(old["tools"]) == len(new["tools"]) else before[0])
        kept += min(perfect, len(os.path.commonprefix([before[1], after[1]])))
        possible += perfect
    return lists, tools, kept, possible


def arguments(sent):
    calls = [call for message in sent["messages"] for call in message.get("tool_calls", [])]
    return [call["function"]["arguments"] for call in calls]


def play_session():
    """([exchange of the main conversation], [arguments that the model wrote]) of one session."""
    with tempfile.TemporaryDirectory() as scratch:
        work, home, records = (os.path.join(scratch, name) for name in ("work", "home", "records"))
        with Upstream(model(work)) as upstream:
            with ccfix(upstream.url, env={"RECORD_DIR": records}) as url:
                wrong = play(url, work, home, later=LATE)
        check("the client's session goes well", not wrong, "\n".join(wrong))
        steps = [step for _, replies in tasks(work) for reply in replies for step in reply]
        written = [step.value[1] for step in steps if step.kind == "call"]
        return list(filter(is_main, recorded(records))), written


# 2. Tokens, on a real server


def cut_down(body, answers):
    """The client's request for a small model: its own answers put in, texts and tools cut."""
    said = iter(answers)
    kept = [t for t in body["tools"] if t["name"] in TOOLS or t.get("defer_loading")]
    system = [dict(block, text=short(block["text"])) for block in body["system"]]
    messages = [dict(message, content=cut_content(message, said)) for message in body["messages"]]
    small = dict(body, max_tokens=ANSWER, stream=False, system=system, messages=messages)
    return dict(small, tools=list(map(cut_tool, kept)))


def cut_content(message, answers):
    """The content of a message, cut; an assistant's text is the next answer."""
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if message["role"] != "assistant":
        return list(map(cut_block, content))
    answer = next(answers)
    text = [{"type": "text", "text": answer}] if answer else []
    return text + [block for block in content if block["type"] == "tool_use"]


def cut_block(block):
    if block["type"] == "image":
        return {"type": "text", "text": "[image]"}
    if block["type"] == "tool_result":
        inner = block["content"]
        cut = short(inner) if isinstance(inner, str) else list(map(cut_block, inner))
        return dict(block, content=cut)
    return dict(block, text=short(block["text"])) if block["type"] == "text" else block


def short(text):
    """The text's two ends: what changes stands at the end of the client's texts."""
    half = LONG // 2
    return text if len(text) <= LONG else text[:half] + " ... " + text[-half:]


def cut_tool(tool):
    known = tool["input_schema"].get("properties", {})
    names = [name for name in tool["input_schema"].get("required", [])[:1] if name in known]
    fields = {name: {"type": known[name].get("type", "string")} for name in names}
    return dict(tool, description="", input_schema={"type": "object", "properties": fields})


def answer_of(who, url, body):
    answer = post(url, body, timeout=200)
    if answer.status != 200:
        raise RuntimeError("%s: %s %s" % (who, answer.status, answer.raw[:300]))
    return answer.body


def through_ccfix(url, body):
    """The Answer to a request through ccfix."""
    told = answer_of("ccfix", url + "/v1/messages", body)
    used, text = told["usage"], "".join(block.get("text", "") for block in told["content"])
    cached = used["cache_read_input_tokens"]
    return Answer(used["input_tokens"] + cached, cached, used["output_tokens"], text)


def directly(url, body):
    """The Answer to a request converted naively, from the server itself."""
    body = dict(naive(body), max_tokens=ANSWER, temperature=0)
    told = answer_of("the server", url + "/chat/completions", body)
    used, text = told["usage"], told["choices"][0]["message"].get("content") or ""
    cached = used["prompt_tokens_details"]["cached_tokens"]
    return Answer(used["prompt_tokens"], cached, used["completion_tokens"], text)


def tokens_kept(url, bodies, ask):
    """The Kept of a conversation on a real server."""
    texts, last, cached, perfect, largest, computed = [], None, 0, 0, 0, 0
    for body in bodies:
        small = cut_down(body, texts)
        found, tools = ask(url, small), len(small["tools"])
        if last and last[1] == tools:
            cached, perfect = cached + min(found.cached, last[0]), perfect + last[0]
        texts.append(found.text)
        last = (found.prompt + found.answered, tools)
        largest, computed = max(largest, found.prompt), computed + found.prompt - found.cached
    return Kept(cached, perfect, largest, computed)


def measure(bodies):
    """[Kept of ccfix, Kept of the naive conversion], each on a server of its own."""
    busy = os.getloadavg()[0] > os.cpu_count()  # then threads wait for each other
    threads = "--threads", "1" if busy else str(os.cpu_count())
    with llama(*threads) as upstream, ccfix(upstream, model=TARGET) as url:
        ours = tokens_kept(url, bodies, through_ccfix)
    with llama(*threads) as upstream:
        return [ours, tokens_kept(upstream, bodies, directly)]


def share(kept):
    return 100.0 * kept.cached / kept.perfect


def table(turns, rows, real, same):
    """The Markdown table. rows, real, same: ccfix, then naive."""

    def line(name, form, values):
        return table_row(name, [form % value for value in values])

    kept = [100.0 * row[2] / row[3] for row in rows]
    cached = "tokens of a perfect prefix that the real server had cached"
    computed = "prompt tokens that it had to compute, the turns with new tools included"
    lists = [[(row[place], turns) for row in rows] for place in (0, 1)]
    return [
        "| %d requests of one conversation | ccfix | naive conversion |" % (turns + 1),
        "| --- | ---: | ---: |",
        line("message lists that extend the last request's", "%d of %d", lists[0]),
        line("tool lists that only grow at their end", "%d of %d", lists[1]),
        line("tool arguments sent back as the model wrote them", "%d of %d", same),
        line("bytes of a perfect prefix that are kept", "%.1f %%", kept),
        line(cached, "**%.1f %%**", map(share, real)),
        line("the same in tokens", "%d of %d", [kept[:2] for kept in real]),
        line(computed, "%d", [kept.computed for kept in real]),
        "",
        NOTE % (time.strftime("%Y-%m-%d", time.gmtime()), COMMAND, real[0].largest),
    ]


def main():
    end_well()
    exchanges, written = play_session()
    bodies = [exchange["request"] for exchange in exchanges]
    ours = [exchange["sent"] for exchange in exchanges]
    plain, turns = list(map(naive, bodies)), len(bodies) - 1
    check("a session of twenty requests or more", turns >= 19, turns)
    rows = [bytes_kept(ours), bytes_kept(plain)]
    sent_back = [arguments(sent[-1]) for sent in (ours, plain)]
    same = [(sum(map(written.__contains__, back)), len(written)) for back in sent_back]
    name = "ccfix: every request's messages and tools extend the last one's"
    check(name, rows[0][:2] == (turns, turns), rows)
    check("ccfix: every byte of the common history is kept", rows[0][2] == rows[0][3], rows)
    name = "ccfix: every tool call goes back as the model wrote it"
    check(name, same[0][0] == same[0][1], (written, sent_back[0]))
    real = measure(bodies)
    name = "ccfix: at least 95 % of a perfect prefix is cached by the real server"
    check(name, share(real[0]) >= 95, real)
    check("ccfix keeps more than the naive conversion", share(real[0]) > share(real[1]), real)
    publish(table(turns, rows, real, same))


if __name__ == "__main__":
    main()
