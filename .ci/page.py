"""The status page in a real browser, while requests go through a demo ccfix.

Drives headless Chromium over the DevTools protocol: the numbers shown against GET /stats, a row
opened with the keyboard, "Clear" pressed, no markup from data in the DOM, no error in the console.
With CCFIX_SHOTS, screenshots go to that folder: light.png, dark.png, phone.png.
"""

import base64
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading

from harness import ccfix, check, get, post, run_table, wait_for

PATIENCE = 40  # seconds that anything may take
PRICE = {"input": 100, "output": 500}  # any price will do
HOSTILE = "<img src=x onerror=alert(1)>"
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage "
FLAGS += "--no-first-run --disable-sync --disable-background-networking "
FLAGS += "--disable-component-update --remote-debugging-port=0"
TOTALS = {
    "Requests": "requests",
    "Errors": "errors",
    "Tokens in": "input",
    "Tokens out": "output",
}
# file, theme, width
VIEWS = (("light", "light", 1200), ("dark", "dark", 1200), ("phone", "light", 390))


class WebSocket:
    """The client half of RFC 6455, as much as DevTools needs: text messages both ways."""

    def __init__(self, port, path):
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.file = self.socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode("ascii")
        head = "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\n" % (path, port)
        head += "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        self.socket.sendall((head + "Sec-WebSocket-Key: %s\r\n\r\n" % key).encode("ascii"))
        status = self.file.readline()
        if b" 101 " not in status:
            raise OSError("not a WebSocket: %r" % status)
        while self.file.readline() not in (b"\r\n", b""):
            pass

    def send(self, text):
        content, mask = text.encode("utf-8"), os.urandom(4)
        if len(content) < 126:
            size = struct.pack("!B", 0x80 | len(content))
        elif len(content) < 65536:
            size = struct.pack("!BH", 0x80 | 126, len(content))
        else:
            size = struct.pack("!BQ", 0x80 | 127, len(content))
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(content))
        self.socket.sendall(b"\x81" + size + mask + masked)

    def receive(self):
        """The next text message; its fragments are put together, pings and pongs dropped (DevTools
        does not wait for pongs)."""
        message = b""
        while True:
            first, size = self.exactly(2)
            if size == 126:
                (size,) = struct.unpack("!H", self.exactly(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", self.exactly(8))
            content = self.exactly(size)
            if first & 15 == 8:
                raise OSError("the browser closed the connection")
            if first & 15 > 8:
                continue
            message += content
            if first & 0x80:
                return message.decode("utf-8")

    def exactly(self, size):
        content = self.file.read(size)
        if len(content) < size:
            raise OSError("the browser went away")
        return content

    def close(self):
        self.file.close()
        self.socket.close()


class Browser:
    """One headless Chromium with one tab, as a context manager. `complaints` gathers its console
    errors, CSP violations and exceptions."""

    def __init__(self):
        self.profile = tempfile.mkdtemp(prefix="page-")
        self.complaints, self.calls, self.tab = [], 0, None
        command = [shutil.which("chromium")] + FLAGS.split()
        self.process = subprocess.Popen(
            command + ["--user-data-dir=" + self.profile, "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={"PATH": os.environ["PATH"], "HOME": self.profile, "TMPDIR": self.profile},
        )

    def __enter__(self):
        try:
            port = wait_for(self.port, PATIENCE, "the DevTools port")
            path = wait_for(lambda: self.tab_path(port), PATIENCE, "the tab")
            self.tab = WebSocket(port, path)
            for domain in ("Page", "Runtime", "Log"):
                self.call(domain + ".enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def port(self):
        try:
            with open(os.path.join(self.profile, "DevToolsActivePort"), encoding="ascii") as file:
                lines = file.read().split("\n")
        except FileNotFoundError:
            return None
        return int(lines[0]) if len(lines) > 1 else None

    @staticmethod
    def tab_path(port):
        for target in get("http://127.0.0.1:%d/json/list" % port).body:
            if target["type"] == "page":
                return re.sub(r"^ws://[^/]+", "", target["webSocketDebuggerUrl"])
        return None

    def call(self, method, **params):
        """The result of one DevTools command; events that come before it are looked at."""
        self.calls += 1
        self.tab.send(json.dumps({"id": self.calls, "method": method, "params": params}))
        while True:
            message = json.loads(self.tab.receive())
            if message.get("id") == self.calls:
                break
            self.hear(message.get("method"), message.get("params", {}))
        if "error" in message:
            raise RuntimeError("%s: %s" % (method, message["error"]))
        return message["result"]

    def hear(self, method, params):
        if method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append("%(text)s %(url)s" % dict({"url": ""}, **params["entry"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))

    def run(self, script):
        """The JSON value of a JavaScript expression in the page."""
        how = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        result = self.call("Runtime.evaluate", expression=script, **how)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    def text(self, selector):
        found = "document.querySelector(%s) || {}" % json.dumps(selector)
        return self.run("(%s).textContent || ''" % found)

    def tile(self, title):
        """The figure under a title, and the hint under the figure ("": none)."""
        tiles = "[...document.querySelectorAll('#tiles .card')]"
        tiles += ".map(tile => [...tile.children].map(child => child.textContent))"
        ((_, figure, hint),) = [row for row in self.run(tiles) if row[0] == title]
        return figure, hint

    def press_enter(self):
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **key)

    def look(self, theme, width):
        """Show the page in a theme and a width (pixels), as high as it is."""
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        size = {"width": width, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", height=900, **size)
        height = min(self.run("document.documentElement.scrollHeight"), 8000)
        self.call("Emulation.setDeviceMetricsOverride", height=height, **size)

    def screenshot(self):
        """PNG bytes."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def profile_gone(self):
        shutil.rmtree(self.profile, ignore_errors=True)
        return not os.path.exists(self.profile)

    def __exit__(self, *exc):
        """End Chromium with all of its children, which otherwise live a little longer and write the
        profile anew."""
        if self.tab:
            self.tab.close()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it had ended by itself
        self.process.wait()
        wait_for(self.profile_gone, PATIENCE, "the profile to be gone")


def settled(differences):
    """None as soon as differences() finds none; else, after PATIENCE seconds, what it found."""
    try:
        wait_for(lambda: not differences(), PATIENCE, "no difference")
    except TimeoutError:
        return "; ".join(differences()) or None
    return None


class PageCheck:
    """The checks, in the order in which they run; each returns nothing or what is wrong."""

    def __init__(self, browser, base, key):
        self.browser, self.base, self.key = browser, base, key

    def stats(self):
        return get(self.base + "/stats", {"x-api-key": self.key} if self.key else {}).body

    def wait_for(self, what, script):
        return wait_for(lambda: self.browser.run(script), PATIENCE, what)

    def wait_for_text(self, selector):
        return wait_for(lambda: self.browser.text(selector), PATIENCE, selector)

    def policy_is_strict_and_its_nonce_fresh(self):
        nonces = set()
        for _ in range(2):
            answer = get(self.base + "/", {"Accept": "text/html"})
            policy = answer.headers["Content-Security-Policy"] or ""
            found = re.findall(r"script-src 'nonce-([^']+)'", policy)
            nonces.update(found)
            if "default-src 'none'" not in policy or "unsafe" in policy:
                return "policy is " + policy
            if not any('<script nonce="%s">' % nonce in answer.raw for nonce in found):
                return "the script does not carry the nonce of the policy"
            if re.search(r"(?:src|href)=[\"'](?!data:)|url\(|@import", answer.raw):
                return "the page names an outside resource"
        if len(nonces) != 2:
            return "two answers had the same nonce"

    def numbers_appear(self):
        self.browser.call("Page.navigate", url=self.base + "/")
        if self.key:
            shown = "!!document.querySelector('#key-form:not([hidden])')"
            self.wait_for("the form for the key", "location.href !== 'about:blank' && " + shown)
            fill = "document.querySelector('#key').value = %s; " % json.dumps(self.key)
            self.browser.run(fill + "document.querySelector('#key-form').requestSubmit()")
        self.wait_for_text("#tiles dd")
        self.browser.run("window.loadedOnce = true")

    def totals_are_those_of_stats(self):
        """Requests may go through meanwhile: what is shown lies between /stats before and after."""
        before = self.stats()["totals"]

        def differences():
            digits = {name: re.sub(r"\D", "", self.browser.tile(name)[0]) for name in TOTALS}
            after = self.stats()["totals"]
            rows = [(n, int(digits[n] or -1), before[key], after[key]) for n, key in TOTALS.items()]
            told = "%s: shown %s, in /stats %s to %s"
            return [told % row for row in rows if not row[2] <= row[1] <= row[3]]

        return settled(differences)

    def cost_is_a_figure_only_where_it_is_known(self):
        """Without a price there is neither a figure nor a plot; with some, it is told how many
        requests had none."""

        def differences():
            totals = self.stats()["totals"]
            known, unpriced = totals["cost"] is not None, totals["unpriced"]
            figure, hint = self.browser.tile("Cost")
            told = hint.partition(" request")[0] == (str(unpriced) if unpriced else "")
            found = {
                "a figure": bool(re.search(r"\d", figure)) == known,
                "a plot": ("Cost a minute" in self.browser.text("#plots")) == known,
                "a hint": ("PRICES" in hint) != known,
                "how many had no price": told or not known,
            }
            return ["%s: %s, %r" % (name, totals, hint) for name, fits in found.items() if not fits]

        return settled(differences)

    def every_request_has_its_row(self):
        """Here too: rows are shown that /stats had before and after, and none that it had neither
        before nor after."""
        before = {row["id"] for row in self.stats()["requests"]}
        rows = "[...document.querySelectorAll('#requests tr[data-id]')]"

        def differences():
            shown = set(self.browser.run(rows + ".map(row => row.dataset.id)"))
            after = {row["id"] for row in self.stats()["requests"]}
            return sorted((before & after) - shown) + sorted(shown - (before | after))

        return settled(differences)

    def plots_have_bars(self):
        recent = [row for row in self.stats()["series"] if row.get("input") or row.get("output")]
        if recent and not self.browser.run("document.querySelectorAll('#plots svg g').length"):
            return "series has %d rows with tokens, the plots no bar" % len(recent)

    def lessons_and_settings_are_listed(self):
        stats = self.stats()
        lessons, settings = self.browser.text("#lessons"), self.browser.text("#settings")
        missing = [row["text"] for row in stats["lessons"] if row["text"] not in lessons]
        missing += [row["name"] for row in stats["settings"] if row["name"] not in settings]
        if missing:
            return "not shown: %s" % missing

    def enter_on_a_row_opens_its_details(self):
        wanted = self.browser.run(
            "(() => { const row = document.querySelector('#requests tr[data-id]');"
            " row.querySelector('button').focus(); return row.dataset.id; })()"
        )
        self.browser.press_enter()
        if wanted not in self.wait_for_text("#requests .detail"):
            return "the details do not name " + wanted

    def it_updates_without_reloading(self):
        polls = "performance.getEntriesByType('resource')"
        polls += ".filter(entry => entry.name.endsWith('/stats')).length"
        before = self.browser.run(polls)
        self.wait_for("another poll", "%s > %d" % (polls, before))
        if not self.browser.run("window.loadedOnce === true"):
            return "the page was loaded again"

    def both_themes_and_a_phone_fit(self):
        grounds = []
        for name, theme, width in VIEWS:
            self.browser.look(theme, width)
            picture = self.browser.screenshot()
            if os.environ.get("CCFIX_SHOTS"):
                with open(os.path.join(os.environ["CCFIX_SHOTS"], name + ".png"), "wb") as file:
                    file.write(picture)
            if len(picture) < 10000:
                return "the screenshot %s is empty" % name
            if self.browser.run("document.documentElement.scrollWidth") > width:
                return "wider than the window: " + name
            grounds.append(self.browser.run("getComputedStyle(document.body).backgroundColor"))
        if grounds[0] == grounds[1]:
            return "dark and light have one background"

    def clear_tells_its_result(self):
        self.browser.run("document.querySelector('#cache-clear').click()")
        message = self.wait_for_text("#message")
        if "Not done" in message:
            return message

    def data_never_becomes_markup(self):
        kinds = "'img, iframe, object, [onerror], [style]'"
        rows = "[...document.querySelectorAll(%s)]" % kinds
        found = self.browser.run(rows + ".map(element => element.outerHTML)")
        if found:
            return str(found)
        sent = any(row["model"] == HOSTILE for row in self.stats()["requests"])
        if sent and HOSTILE not in self.browser.text("#requests"):
            return "%s is not shown as text" % HOSTILE

    def console_is_clean(self):
        """With a proxy key the browser notes the one 401 that made the page ask for it."""
        expected = "status of 401" if self.key else None
        complaints = self.browser.complaints
        return "; ".join(text for text in complaints if not (expected and expected in text))

    ORDER = (
        policy_is_strict_and_its_nonce_fresh,
        numbers_appear,
        totals_are_those_of_stats,
        cost_is_a_figure_only_where_it_is_known,
        every_request_has_its_row,
        plots_have_bars,
        lessons_and_settings_are_listed,
        enter_on_a_row_opens_its_details,
        it_updates_without_reloading,
        both_themes_and_a_phone_fit,
        clear_tells_its_result,
        data_never_becomes_markup,
        console_is_clean,
    )

    def run(self):
        for function in self.ORDER:
            wrong = function(self)
            check("page: " + function.__name__.replace("_", " "), not wrong, wrong)


def ask(url, text, model=HOSTILE, **headers):
    body = {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": text}]}
    return post(url + "/v1/messages", body, headers)


def browse(url, key=""):
    with Browser() as browser:
        PageCheck(browser, url, key).run()


def while_requests_go_through():
    """With prices, but for another model than the one that answers: no cost is known."""
    prices = json.dumps({"another": PRICE})
    with ccfix(None, "--demo", "--cache", env={"PRICES": prices}) as url:
        for text in ("one", "two", "one", "think"):
            ask(url, text)
        ended = threading.Event()

        def go_on():
            number = 0
            while not ended.wait(0.7):
                number += 1
                ask(url, "more %d" % number)

        worker = threading.Thread(target=go_on, daemon=True)
        worker.start()
        try:
            browse(url)
        finally:
            ended.set()
            worker.join()
        cache = get(url + "/stats").body["cache"]
        check("cache: the repeated question was a hit", cache["hits"] >= 1, cache)


def with_a_proxy_key():
    """Before a demo, as an Anthropic server of two models, of which one has a price."""
    key, env = {"x-api-key": "page-key"}, {"ANTHROPIC_API_KEY": "page-key"}
    env.update(TARGET_FORMAT="anthropic", TARGET_MODEL_HAIKU="no-price")
    env.update(PRICES=json.dumps({"scripted-model": PRICE}))
    with ccfix(None, "--demo") as demo, ccfix(demo + "/v1", env=env) as url:
        for model in (HOSTILE, "claude-haiku-4-5"):
            ask(url, "one", model, **key)
        rows = get(url + "/stats", key).body["requests"]
        costs = [row["cost"] is None for row in rows]
        check("cost: known for one of two requests", costs == [True, False], rows)
        check("stats need the key", get(url + "/stats").status == 401)
        browse(url, "page-key")


if __name__ == "__main__":
    run_table(while_requests_go_through, with_a_proxy_key)
