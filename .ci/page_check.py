#!/usr/bin/env python3
"""Check the status page of a running ccfix in a real browser.

    page_check.py http://127.0.0.1:8080 /usr/bin/chromium FOLDER [--key PROXY_KEY]

Drives headless Chromium over the DevTools protocol: the numbers shown against GET /stats, a row opened with the keyboard,
"Clear" pressed, no markup from data in the DOM, no error in the console. Screenshots go to FOLDER: light.png, dark.png,
phone.png. One line a check; the exit code is 0 when all hold.
"""

import argparse
import base64
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request

PATIENCE = 20  # seconds that anything may take
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --remote-debugging-port=0"
).split()
TOTALS = {
    "requests-total": "requests",
    "errors-total": "errors",
    "input-total": "input",
    "output-total": "output",
}
VIEWS = [
    ("light", "light", 1200),
    ("dark", "dark", 1200),
    ("phone", "light", 390),
]  # file, theme, width


# ---------------------------------------------------------------------------------------------------- WebSocket


class WebSocket:
    """The client half of RFC 6455, as much as DevTools needs: text messages both ways."""

    def __init__(self, port, path):
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.file = self.socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode("ascii")
        lines = [
            "GET {} HTTP/1.1".format(path),
            "Host: 127.0.0.1:{}".format(port),
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: " + key,
            "Sec-WebSocket-Version: 13",
            "",
            "",
        ]
        self.socket.sendall("\r\n".join(lines).encode("ascii"))
        status = self.file.readline()
        if b" 101 " not in status:
            raise OSError("no WebSocket: {!r}".format(status))
        while self.file.readline() not in (b"\r\n", b""):
            pass

    def send(self, text, opcode=1):
        data, mask = text.encode("utf-8"), os.urandom(4)
        if len(data) < 126:
            size = struct.pack("!B", 0x80 | len(data))
        elif len(data) < 65536:
            size = struct.pack("!BH", 0x80 | 126, len(data))
        else:
            size = struct.pack("!BQ", 0x80 | 127, len(data))
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))
        self.socket.sendall(struct.pack("!B", 0x80 | opcode) + size + mask + masked)

    def receive(self):
        """The next text message; its fragments joined, pings and pongs dropped (DevTools does not wait for pongs)."""
        message = b""
        while True:
            first, size = self._exactly(2)
            if size == 126:
                (size,) = struct.unpack("!H", self._exactly(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", self._exactly(8))
            data = self._exactly(size)
            if first & 15 == 8:
                raise OSError("the browser closed the connection")
            if first & 15 > 8:
                continue
            message += data
            if first & 0x80:
                return message.decode("utf-8")

    def _exactly(self, size):
        data = self.file.read(size)
        if len(data) < size:
            raise OSError("the browser went away")
        return data

    def close(self):
        self.file.close()
        self.socket.close()


# ---------------------------------------------------------------------------------------------------- Browser


class Browser:
    """One headless Chromium with one tab. `complaints` gathers its console errors, CSP violations and exceptions."""

    def __init__(self, program):
        self.profile = tempfile.mkdtemp(prefix="page-check-")
        self.complaints, self.calls, self.tab = [], 0, None
        self.process = subprocess.Popen(
            [program] + FLAGS + ["--user-data-dir=" + self.profile, "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=dict(os.environ, TMPDIR=self.profile),
        )
        try:
            port = wait_for("DevTools port", self._port)
            self.tab = WebSocket(port, wait_for("tab", lambda: self._tab_path(port)))
            for domain in ("Page", "Runtime", "Log"):
                self.call(domain + ".enable")
        except BaseException:
            self.close()
            raise

    def _port(self):
        try:
            with open(os.path.join(self.profile, "DevToolsActivePort"), encoding="ascii") as file:
                lines = file.read().split("\n")
        except FileNotFoundError:
            return None
        return int(lines[0]) if len(lines) > 1 else None

    @staticmethod
    def _tab_path(port):
        for target in get_json("http://127.0.0.1:{}/json/list".format(port)):
            if target["type"] == "page":
                return re.sub(r"^ws://[^/]+", "", target["webSocketDebuggerUrl"])
        return None

    def call(self, method, **params):
        """The result of one DevTools command; events that come before it are looked at on the way."""
        self.calls += 1
        self.tab.send(json.dumps({"id": self.calls, "method": method, "params": params}))
        while True:
            message = json.loads(self.tab.receive())
            if message.get("id") == self.calls:
                break
            self._hear(message)
        if "error" in message:
            raise RuntimeError("{}: {}".format(method, message["error"]))
        return message["result"]

    def _hear(self, event):
        params = event.get("params", {})
        if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append("{text} {url}".format(**dict({"url": ""}, **params["entry"])))
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in (
            "error",
            "assert",
        ):
            self.complaints.append(json.dumps(params["args"]))
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))

    def run(self, script):
        """The JSON value of a JavaScript expression in the page."""
        result = self.call(
            "Runtime.evaluate",
            expression=script,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    def text(self, selector):
        return self.run(
            "(document.querySelector({}) || {{}}).textContent || ''".format(json.dumps(selector))
        )

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                text="\r",
            )

    def look(self, theme, width):
        """Show the page in a theme and a width (pixels), as high as it is."""
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": theme}],
        )
        size = {"width": width, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", height=900, **size)
        height = self.run("document.documentElement.scrollHeight")
        self.call("Emulation.setDeviceMetricsOverride", height=min(height, 8000), **size)

    def screenshot(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _profile_gone(self):
        shutil.rmtree(self.profile, ignore_errors=True)
        return not os.path.exists(self.profile)

    def close(self):
        """End Chromium with all of its children, which otherwise live a little longer and write the profile anew."""
        if self.tab:
            self.tab.close()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it had ended by itself
        self.process.wait()
        wait_for("the profile to be gone", self._profile_gone)


def wait_for(what, look):
    """The first true value of look(), asked for every 50 ms; RuntimeError after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        value = look()
        if value:
            return value
        time.sleep(0.05)
    raise RuntimeError("waited {} s for: {}".format(PATIENCE, what))


def settled(differences):
    """None as soon as differences() finds none, at the latest after PATIENCE seconds; else what it found, as text."""
    try:
        wait_for("no difference", lambda: not differences())
    except RuntimeError:
        return "; ".join(differences()) or None
    return None


OPENER = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # the servers are near; no proxy between


def get(url, **headers):
    """(headers, bytes) of an answer."""
    request = urllib.request.Request(
        url, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    with OPENER.open(request, timeout=PATIENCE) as answer:
        return answer.headers, answer.read()


def get_json(url, **headers):
    return json.loads(get(url, **headers)[1].decode("utf-8"))


# ---------------------------------------------------------------------------------------------------- Checks


class PageCheck:
    """The checks, in the order in which they run; each returns nothing or what is wrong."""

    def __init__(self, browser, base, folder, key):
        self.browser, self.base, self.folder, self.key = browser, base, folder, key

    def stats(self):
        return get_json(self.base + "/stats", **({"x_api_key": self.key} if self.key else {}))

    def policy_is_strict_and_its_nonce_fresh(self):
        nonces = set()
        for _ in range(2):
            headers, body = get(self.base + "/", Accept="text/html")
            policy = headers["Content-Security-Policy"] or ""
            nonces.update(re.findall(r"script-src 'nonce-([^']+)'", policy))
            if "default-src 'none'" not in policy or "unsafe" in policy:
                return "policy is " + policy
            if not nonces or not any(
                '<script nonce="{}">'.format(nonce).encode() in body for nonce in nonces
            ):
                return "the script does not carry the nonce of the policy"
            if re.search(rb"(?:src|href)=[\"'](?!data:)|url\(|@import", body):
                return "the page names an outside resource"
        if len(nonces) != 2:
            return "two answers had the same nonce"

    def numbers_appear(self):
        self.browser.call("Page.navigate", url=self.base + "/")
        if self.key:
            wait_for(
                "the form for the key",
                lambda: self.browser.run(
                    "location.href !== 'about:blank' && !!document.querySelector('#key-form:not([hidden])')"
                ),
            )
            self.browser.run(
                "document.querySelector('#key').value = {}; document.querySelector('#key-form').requestSubmit()".format(
                    json.dumps(self.key)
                )
            )
        wait_for("#requests-total", lambda: self.browser.text("#requests-total"))
        self.browser.run("window.loadedOnce = true")

    def totals_are_those_of_stats(self):
        """Requests may go through meanwhile: what is shown lies between /stats before and /stats after."""
        before = self.stats()["totals"]

        def differences():
            shown = {
                name: int(re.sub(r"\D", "", self.browser.text("#" + name)) or -1) for name in TOTALS
            }
            after = self.stats()["totals"]
            return [
                "{}: shown {}, in /stats {} to {}".format(
                    name, shown[name], before[key], after[key]
                )
                for name, key in TOTALS.items()
                if not before[key] <= shown[name] <= after[key]
            ]

        return settled(differences)

    def cost_is_a_figure_only_where_it_is_known(self):
        """Without a price there is neither a figure nor a plot; with some, it is told how many had none."""

        def differences():
            totals = self.stats()["totals"]
            known, unpriced = totals["cost"] is not None, totals["unpriced"]
            hint = self.browser.text("#cost-hint")
            found = {
                "a figure": bool(re.search(r"\d", self.browser.text("#cost-total"))) == known,
                "a plot": ("Cost a minute" in self.browser.text("#plots")) == known,
                "a hint": ("PRICES" in hint) != known,
                "how many had no price": not known
                or hint.partition(" request")[0] == (str(unpriced) if unpriced else ""),
            }
            return ["%s: %s, %r" % (name, totals, hint) for name, fits in found.items() if not fits]

        return settled(differences)

    def every_request_has_its_row(self):
        """Here too: rows are shown that /stats had before and after, and none that it had neither before nor after."""
        before = {row["id"] for row in self.stats()["requests"]}

        def differences():
            shown = set(
                self.browser.run(
                    "[...document.querySelectorAll('#requests tr[data-id]')].map(row => row.dataset.id)"
                )
            )
            after = {row["id"] for row in self.stats()["requests"]}
            return sorted((before & after) - shown) + sorted(shown - (before | after))

        return settled(differences)

    def plots_have_bars(self):
        recent = [row for row in self.stats()["series"] if row.get("input") or row.get("output")]
        bars = self.browser.run("document.querySelectorAll('#plots svg g').length")
        if recent and not bars:
            return "series has {} rows with tokens, the plots no bar".format(len(recent))

    def lessons_and_settings_are_listed(self):
        stats, lessons, settings = (
            self.stats(),
            self.browser.text("#lessons"),
            self.browser.text("#settings"),
        )
        missing = [row["text"] for row in stats["lessons"] if row["text"] not in lessons]
        missing += [row["name"] for row in stats["settings"] if row["name"] not in settings]
        if missing:
            return "not shown: {}".format(missing)

    def enter_on_a_row_opens_its_details(self):
        if not self.stats()["requests"]:
            return None
        wanted = self.browser.run(
            "(() => { const row = document.querySelector('#requests tr[data-id]');"
            " row.querySelector('button').focus(); return row.dataset.id; })()"
        )
        self.browser.press("Enter", 13)
        wait_for("the details", lambda: self.browser.text("#requests .detail"))
        if wanted not in self.browser.text("#requests .detail"):
            return "the details do not name " + wanted

    def it_updates_without_reloading(self):
        polls = "performance.getEntriesByType('resource').filter(entry => entry.name.endsWith('/stats')).length"
        before = self.browser.run(polls)
        wait_for("another poll", lambda: self.browser.run(polls) > before)
        if not self.browser.run("window.loadedOnce === true"):
            return "the page was loaded again"

    def _pictures(self):
        for name, theme, width in VIEWS:
            self.browser.look(theme, width)
            self.browser.screenshot(os.path.join(self.folder, name + ".png"))
            yield (
                name,
                width,
                self.browser.run("document.documentElement.scrollWidth"),
                self.browser.run("getComputedStyle(document.body).backgroundColor"),
            )

    def both_themes_and_a_phone_fit(self):
        pictures = list(self._pictures())
        wide = [(name, inside) for name, width, inside, _ in pictures if inside > width]
        if wide:
            return "wider than the window: {}".format(wide)
        if pictures[0][3] == pictures[1][3]:
            return "dark and light have one background"

    def clear_tells_its_result(self):
        self.browser.run("document.querySelector('#cache-clear').click()")
        message = wait_for("#message", lambda: self.browser.text("#message"))
        if "Not done" in message:
            return message

    def data_never_becomes_markup(self):
        found = self.browser.run(
            "[...document.querySelectorAll('img, iframe, object, [onerror], [style]')]"
            ".map(element => element.outerHTML)"
        )
        if found:
            return "{}".format(found)
        models = [row["model"] for row in self.stats()["requests"] if "<" in str(row["model"])]
        if models and models[0] not in self.browser.text("#requests"):
            return "{!r} is not shown as text".format(models[0])

    def console_is_clean(self):
        """With a proxy key the browser notes the one 401 that made the page ask for it."""
        expected = "status of 401" if self.key else None
        bad = [text for text in self.browser.complaints if not (expected and expected in text)]
        if bad:
            return "; ".join(bad)

    ORDER = [
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
    ]

    def run(self):
        """Print one line a check; the number of those that failed."""
        failures = 0
        for check in self.ORDER:
            try:
                wrong = check(self)
            except (OSError, RuntimeError, LookupError, ValueError) as error:
                wrong = "{}: {}".format(type(error).__name__, error)
            failures += bool(wrong)
            line = "{}  {}{}".format(
                "FAIL" if wrong else "ok  ",
                check.__name__.replace("_", " "),
                ": " + wrong if wrong else "",
            )
            print(line.encode("ascii", "backslashreplace").decode("ascii"), flush=True)
        return failures


def main():
    parser = argparse.ArgumentParser(
        description="Check the status page of a running ccfix in headless Chromium."
    )
    parser.add_argument("base", help="such as http://127.0.0.1:8080")
    parser.add_argument("chromium", help="the program")
    parser.add_argument("folder", help="where the screenshots go")
    parser.add_argument("--key", default="", help="the proxy key, where the proxy asks for one")
    options = parser.parse_args()
    os.makedirs(options.folder, exist_ok=True)
    browser = Browser(options.chromium)
    try:
        return (
            1
            if PageCheck(browser, options.base.rstrip("/"), options.folder, options.key).run()
            else 0
        )
    finally:
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
