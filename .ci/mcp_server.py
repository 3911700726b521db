"""A stdio MCP server with two tools that have long names; each answers with its last word."""

import json
import sys

SCHEMA = {"type": "object", "properties": {"question": {"type": "string"}}}
SCHEMA["required"] = ["question"]
TOOLS = [
    {
        "name": "look_up_the_answer_in_the_big_book_of_answers_" + word,
        "description": "Opens the book of answers.",
        "inputSchema": SCHEMA,
    }
    for word in ("one", "two")
]


def answer(method, params):
    if method == "initialize":
        known = {"capabilities": {"tools": {}}, "serverInfo": {"name": "answers", "version": "1"}}
        return dict(known, protocolVersion=params["protocolVersion"])
    if method == "tools/list":
        return {"tools": TOOLS}
    if method == "tools/call":
        text = "%s answers %s" % (params["name"].rsplit("_", 1)[1], params["arguments"]["question"])
        return {"content": [{"type": "text", "text": text}]}
    return {}


for line in sys.stdin:
    request = json.loads(line)
    if "id" in request:
        result = answer(request["method"], request.get("params") or {})
        print(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}), flush=True)
