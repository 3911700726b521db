"""The status page in a real browser (Debian's chromium), while requests go through a demo ccfix."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading

from harness import HERE, ccfix, check, get, post, run_table

HOSTILE = "<img src=x onerror=alert(1)>"


def browse(url, *more):
    """Run the browser's checks on a page and count each of them."""
    shots = os.environ.get("CCFIX_SHOTS") or tempfile.mkdtemp()
    done = subprocess.run(
        [
            sys.executable,
            os.path.join(HERE, "page_check.py"),
            url,
            shutil.which("chromium"),
            shots,
            *more,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        timeout=240,
    )
    for line in done.stdout.splitlines():
        kind, _, name = line.partition(" ")
        if kind in ("ok", "FAIL"):
            check("page: " + name.strip(), kind == "ok", done.stdout[-2000:])
    check("page: the check ended well", done.returncode == 0, done.stdout[-2000:])
    for name in ("light", "dark", "phone"):
        check(
            "page: a screenshot, %s" % name,
            os.path.getsize(os.path.join(shots, name + ".png")) > 10000,
        )


def question(text, model=HOSTILE):
    return {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": text}]}


def while_requests_go_through():
    with ccfix(None, "--demo", "--cache") as url:
        for text in ("one", "two", "one", "think"):
            post(url + "/v1/messages", question(text))
        ended = threading.Event()

        def go_on():
            number = 0
            while not ended.wait(0.7):
                number += 1
                post(url + "/v1/messages", question("more %d" % number, "claude-x"))

        worker = threading.Thread(target=go_on, daemon=True)
        worker.start()
        try:
            browse(url)
        finally:
            ended.set()
            worker.join()
        stats = get(url + "/stats").body
        check("cache: the repeated question was a hit", stats["cache"]["hits"] >= 1, stats["cache"])


def with_a_proxy_key():
    with ccfix(None, "--demo", env={"ANTHROPIC_API_KEY": "page-key"}) as url:
        post(url + "/v1/messages", question("one"), {"x-api-key": "page-key"})
        check("stats need the key", get(url + "/stats").status == 401)
        browse(url, "--key", "page-key")


if __name__ == "__main__":
    run_table(while_requests_go_through, with_a_proxy_key)
