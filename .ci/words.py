"""What the real client shows of an error: on its own screen (TUI) and in print mode, as the Agent
SDK runs it. The first words are ccfix's, never advice to log in, and nothing is asked again.

python3 .ci/words.py [scenario ...]      # all, or those named (with -)
"""

import tempfile
import time

import tui
from harness import ccfix, check, claude, json_lines, run_table
from upstream import Upstream, attempts, fail, say, rounds

KEY = "The provider refused the key; check TARGET_API_KEY (-k): "
ERRORS = (
    # reply, how our words begin
    (fail(401, "Incorrect API key provided"), KEY + "Incorrect API key"),
    (fail(401, "invalid x-api-key", "authentication_error"), KEY + "invalid API key"),
    (fail(403, "Country not supported"), "The provider forbids this request: Country"),
    (fail(402, "Insufficient Balance"), "The provider's account has no credit: Insufficient"),
    (fail(404, "The model `x` does not exist"), "The provider has no such model; check TARGET"),
    (fail(405, "Method Not Allowed"), "The provider has no such address or model; check"),
    (fail(400, "Nobody knows this error."), "The provider refused the request: Nobody knows"),
    (fail(422, "Nobody knows it either."), "The provider refused the request: Nobody knows"),
)


def errors():
    for reply, words in ERRORS:
        status, body, _ = reply[0].value
        name = "%d %s" % (status, body["error"]["message"])
        with Upstream(attempts(reply)) as upstream, ccfix(upstream.url) as url:
            seen(name, url, words)
            asked = len(upstream.requests)
            check(name + ": asked once for each try", asked == 2, asked)


def seen(name, url, words, **env):
    """Check what the screen and print mode show of an error."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as home, tui.client(url, home, env=env) as terminal:
        terminal.ask("Do the task.")
        terminal.wait_for(words, 30)
        rows = [row for row in terminal.screen().splitlines() if row.strip()]
        first = [row for row in rows if "API Error" in row or "/login" in row][:1]
        good = first and words[:20] in first[0] and terminal.on_screen(words)
        check(name + ": on the screen", good and "/login" not in terminal.screen(), rows)
    run = claude(url, "-p", "Do the task.", "--output-format", "stream-json", "--verbose", env=env)
    result = json_lines(run.out)[-1].get("result", "")
    good = result.startswith("API Error: 4") and words in result and run.code == 1
    check(name + ": in print mode", good and "authenticate" not in result, run)
    check(name + ": at once", time.monotonic() - begun < 40, time.monotonic() - begun)


def wrong_proxy_key():
    words = "the proxy key is missing or wrong: set ANTHROPIC_AUTH_TOKEN of Claude Code"
    key = {"ANTHROPIC_API_KEY": "the-proxy-key"}
    with Upstream(rounds([say("IN")])) as upstream, ccfix(upstream.url, env=key) as url:
        seen("a wrong proxy key", url, words)
        check("and the provider is not asked", not upstream.requests)


if __name__ == "__main__":
    run_table(errors, wrong_proxy_key)
