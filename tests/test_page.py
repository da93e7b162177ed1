"""The pages and the widget in a real browser: what people see, hear and press."""

import contextlib
import http.server
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import LINK_KEY, Running, eventually
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Locator,
    Page,
    Response,
    Route,
    Worker,
    expect,
    sync_playwright,
)

import app

Post = Callable[..., dict[str, Any]]
Sql = Callable[..., list[tuple[Any, ...]]]
Devices = Callable[..., "Device"]

# What shows by then came by the stream, or as soon as it was there again: else a page asks every 30 seconds.
BY_THE_STREAM = 15_000
BROWSER_ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
LANGUAGES = sorted(path.stem for path in (app.HERE / "templates" / "words").glob("*.json"))

# A page of somebody else's, with rules that would spoil the widget if they reached it.
SHOP = """<!doctype html><html lang="en"><title>Corner Shop</title>
<style>STYLE body { margin: 0; font-family: sans-serif } header { display: flex; padding: 12px 24px }
h1 { flex: 1 }</style><header><h1>Corner Shop</h1>BELL</header><p id="own">Ours</p></html>"""
SPOILER = """* { color: rgb(1, 2, 3) !important; text-transform: uppercase }
.badge, .panel, li { display: none !important }"""

# Said to a page before it runs: whether somebody looks at it is for the test to decide.
PLUGGABLE = """(() => {  // a browser with a push service
    const endpoint = "https://push.example.com/1", keys = { p256dh: P256DH, auth: "AAAAAAAAAAAAAAAAAAAAAA" };
    const made = {
        endpoint,
        toJSON: () => ({ endpoint, expirationTime: null, keys }),
        unsubscribe: async () => { localStorage.plugged = ""; return true; },
    };
    PushManager.prototype.subscribe = async () => { localStorage.plugged = "yes"; return made; };
    PushManager.prototype.getSubscription = async () => localStorage.plugged ? made : null;
})()"""
HIDEABLE = """(() => {
    let hidden = false;
    Object.defineProperty(Document.prototype, "hidden", { get: () => hidden });
    window.hide = (now) => {
        hidden = now;
        document.dispatchEvent(new Event("visibilitychange", { bubbles: true }));
    };
})()"""

# Chromium forgets a notification when their list is read in the very moment it is shown: nobody polls that list.
SHOWS = """() => {
    self.shows = 0;
    const show = registration.showNotification;
    registration.showNotification = async (...what) => {
        await show.apply(registration, what);
        self.shows++;
    };
}"""


# ── the stage


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, the machine's own or Playwright's; without one these tests fail."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


class Shop(http.server.ThreadingHTTPServer):
    """Somebody else's website, on an origin of its own."""

    body = ""

    class RequestHandlerClass(http.server.BaseHTTPRequestHandler):
        server: "Shop"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(self.server.body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def shop() -> Iterator[Shop]:
    with Shop() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def service(serve: Callable[..., Running], shop: Shop) -> Running:
    """The service with an e-mail channel (nothing leaves: digests wait) and a friend, the shop."""
    mail = {"smtp_url": "smtp://127.0.0.1:9?starttls=off", "mail_from": "bellhop@example.com"}
    return serve(cors_origins=shop.url, **mail)


class Wire:
    """A proxy between browser and service that can be cut, as networks are."""

    def __init__(self, url: str) -> None:
        self.target = ("127.0.0.1", urlsplit(url).port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.open, self.pairs, self.threads = True, [], []
        self.run(self.accept)

    def run(self, work: Callable[..., None], *arguments: Any) -> None:
        self.threads.append(threading.Thread(target=work, args=arguments))
        self.threads[-1].start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                if not self.open:
                    near.close()
                    continue
                far = socket.create_connection(self.target)
                self.pairs += [near, far]
                self.run(self.copy, near, far)
                self.run(self.copy, far, near)

    def copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.open = False
        for end in self.pairs:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.open = True

    def close(self) -> None:
        self.cut()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join()
        for end in self.pairs:
            end.close()


@pytest.fixture
def wire(service: Running) -> Iterator[Wire]:
    wire = Wire(service.url)
    yield wire
    wire.close()


class Device:
    """A browser of a user: pages share its cookie and storage; nothing may go wrong unseen in any of them."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context, self.url, self.seen, self.excused = context, url, [], "^$"
        context.on("page", self.watch)

    def faults(self) -> list[str]:
        return [fault for fault in self.seen if not re.search(self.excused, fault)]

    def watch(self, page: Page) -> None:
        page.on("console", lambda said: said.type == "error" and self.seen.append(said.text))
        page.on("pageerror", lambda error: self.seen.append(str(error)))
        page.on("request", self.check_origin)

    def check_origin(self, request: Any) -> None:
        if not request.url.startswith((self.url + "/", "data:", "about:")):
            self.seen.append(f"asked another origin: {request.url}")

    def open(self, path: str = "/") -> Page:
        page = self.context.new_page()
        page.goto(self.url + path)
        return page

    def open_live(self, path: str = "/") -> Page:
        page = self.open(path)
        expect(page.locator("#live")).to_have_text("Live")
        return page


@pytest.fixture
def device(browser: Browser, service: Running, sign_in: Callable[..., str]) -> Iterator[Devices]:
    """Devices of a user (None: of nobody); at the end each must have been free of faults."""
    devices: list[Device] = []

    def make(user: str | None = "alice", admin: bool = False, url: str = "", **options: Any) -> Device:
        options = {"viewport": {"width": 1280, "height": 900}, "locale": "en"} | options
        context = browser.new_context(**options)
        context.set_default_timeout(10_000)
        url = url or service.url
        if user:
            session = sign_in(user, admin=admin)
            context.add_cookies([{"name": app.COOKIE, "value": session, "url": url}])
        devices.append(Device(context, url))
        return devices[-1]

    yield make
    for one in devices:
        one.context.close()
    faults = [fault for one in devices for fault in one.faults()]
    assert not faults


def lines(page: Page) -> Locator:
    return page.locator("#list > li")


def titles(page: Page) -> list[str]:
    return page.locator("#list h2").all_inner_texts()


def shows_count(page: Page, count: int) -> None:
    """Title, heading and list agree about how many are unread."""
    expect(page).to_have_title(re.compile(rf"^\({count}\) " if count else r"^[^(]"), timeout=BY_THE_STREAM)
    expect(page.locator("h1 .count")).to_have_text(str(count or ""), timeout=BY_THE_STREAM)


def unread(client: httpx.Client) -> int:
    return client.get("/api/unread-count").json()["unread_count"]


def link_token(service: Running, user: str) -> str:
    return app.make_token(LINK_KEY, user, app.timedelta(minutes=5))


# A morning in a small team, the oldest first.
MORNING = [
    ("info", "release.notes", "What is new in November", "Digests can now collect for a day.", None),
    ("success", "invoice.paid", "Invoice 2026-1184 has been paid", "Kim & Partners, 4,320.00 EUR", "/paid/1"),
    ("info", "comment.created", "Jonas mentioned you in “Trade fair”", "It needs the logo.", "/fair"),
    ("info", "report.ready", "Weekly numbers are ready", "Visitors up 8 %, refunds down.", "/reports/47"),
    ("warning", "disk.almost_full", "db-2 has 9 % of its disk left", "At this rate full on Thursday.", None),
    ("success", "deploy.finished", "shop 2.14 is live", "412 tests passed.", "https://ci.example.com/runs/5512"),
    ("warning", "comment.created", "Mina asked you to review “Autumn pricing”",
     "I moved the volume discount to the second table, could you check the numbers for Korea before we send "
     "it out?", "/docs/pricing"),
    ("critical", "payment.failed", "Payment provider rejects every card",
     "The last 31 checkouts got a 402. Orders are kept and will be charged again once it recovers.",
     "https://status.example.com/incidents/8812"),
]  # fmt: skip


def fill_inbox(post: Post) -> list[dict[str, Any]]:
    names = ("severity", "event_name", "title", "body", "target_url")
    return [post(**dict(zip(names, one, strict=True))) for one in MORNING]


# ── how it looks


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible(device: Devices, post: Post, scheme: str, width: int) -> None:
    sent = fill_inbox(post)
    options: dict[str, Any] = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    insider, stranger = device(admin=True, **options), device(None, **options)
    stranger.excused = "404"  # of a link to unsubscribe that is none
    inside = ["/", "/?unread=1", "/?archived=1", f"/n/{sent[-1]['id']}", "/preferences", "/admin"]
    seen = [insider.open(path) for path in inside] + [
        stranger.open("/login"),
        stranger.open("/unsubscribe/nothing"),
    ]
    for page in seen:
        page.wait_for_load_state()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), page.url
        violations = Axe().run(page).response["violations"]
        assert not violations, (page.url, [(v["id"], v["nodes"][0]["html"]) for v in violations])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_opens_on_a_page_is_accessible_too(device: Devices, post: Post, scheme: str) -> None:
    fill_inbox(post)
    page = device(color_scheme=scheme).open_live()
    page.keyboard.press("j")
    page.keyboard.press("e")
    expect(page.locator("#toast")).to_contain_text("Archived")
    assert not Axe().run(page).response["violations"]
    page.get_by_role("button", name="Keyboard shortcuts").click()
    assert not Axe().run(page).response["violations"]


def test_a_missing_page_says_so_accessibly(device: Devices) -> None:
    reader = device()
    reader.excused = "404"
    page = reader.open("/n/01890000-0000-7000-8000-000000000000")
    expect(page.locator("h1")).to_have_text("Nothing at this address")
    assert not Axe().run(page).response["violations"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_overflows_the_smallest_screen(
    device: Devices, post: Post, api: httpx.Client, language: str
) -> None:
    sent = fill_inbox(post)
    api.put("/api/users/alice", json={"locale": language})
    phone = device(admin=True, viewport={"width": 320, "height": 600})
    for path in ("/", f"/n/{sent[0]['id']}", "/preferences", "/admin", "/login"):
        page = phone.open(path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        if path != "/login":
            assert page.locator("html").get_attribute("lang") == language, path
        page.close()


def test_a_wide_screen_is_used_without_getting_lost_in_it(device: Devices, post: Post) -> None:
    sent = fill_inbox(post)
    wide = device(admin=True, viewport={"width": 3840, "height": 1200})
    for path in ("/", f"/n/{sent[0]['id']}", "/preferences", "/admin"):
        page = wide.open(path)
        box = page.locator("main").bounding_box()
        assert box and 600 <= box["width"] <= 1400, path  # lines of text stay short enough to be read
        assert abs(box["x"] + box["width"] / 2 - 1920) < 20, path
        page.close()


def test_no_language_lacks_a_word_or_a_placeholder() -> None:
    words = {
        code: json.loads((app.HERE / "templates" / "words" / f"{code}.json").read_text())
        for code in LANGUAGES
    }
    assert LANGUAGES == ["de", "en", "fr", "hi", "id", "ko"]
    for code, texts in words.items():
        assert set(texts) == set(words["en"]), code
        for key, text in texts.items():
            assert text.strip(), (code, key)
            places = re.findall(r"\{\w+\}", text)
            assert sorted(places) == sorted(re.findall(r"\{\w+\}", words["en"][key])), (code, key)


def test_every_word_a_template_asks_for_exists_and_none_is_idle() -> None:
    folder = app.HERE / "templates"
    texts = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".html", ".js"))
    known = json.loads((folder / "words" / "en.json").read_text())
    mine = ("page.", "js.", "inbox.", "prefs.", "admin.", "login.", "unsubscribe.", "error.")
    quoted = set(re.findall(r"""["']([a-z]+\.[a-z_.]+[a-z])["']""", texts))
    asked = {key for key in quoted if key.startswith(mine) and not key.endswith((".js", ".css", ".html"))}
    stored = {key.removesuffix(".one").removesuffix(".other") for key in known}
    assert asked <= stored
    put_together = ("js.severity.", "js.channel.", "js.se", "js.sk", "page.status.", "page.reason.", "error.")
    put_together += ("inbox.", "prefs.", "page.language")
    assert not [key for key in stored - asked if key.startswith(mine) and not key.startswith(put_together)]


NEWS = {  # what people write: outside English a letter takes up to three bytes
    "de": ("Mina hat Seite {n} kommentiert", "Kannst du bitte noch einmal die Zahlen für Korea prüfen?"),
    "en": ("Mina commented on page {n}", "Could you please check the numbers for Korea once more?"),
    "fr": ("Mina a commenté la page {n}", "Peux-tu vérifier encore une fois les chiffres de la Corée ?"),
    "hi": ("मीना ने पृष्ठ {n} पर टिप्पणी की", "क्या आप कोरिया के आँकड़े एक बार फिर देख सकते हैं?"),
    "id": ("Mina mengomentari halaman {n}", "Bisakah kamu memeriksa sekali lagi angka untuk Korea?"),
    "ko": ("미나 님이 {n}쪽에 댓글을 남겼습니다", "한국 수치를 한 번 더 확인해 주시겠어요?"),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_whole_inbox_page_weighs_at_most_40_kilobytes(
    device: Devices, post: Post, api: httpx.Client, language: str
) -> None:
    api.put("/api/users/alice", json={"locale": language})
    title, body = NEWS[language]
    for number in range(30):
        post(title=title.format(n=number), body=body, target_url=f"/docs/{number}")
    sizes: dict[str, int] = {}
    reader = device()
    page = reader.context.new_page()

    def weigh(reply: Response) -> None:
        if reply.request.resource_type in ("document", "stylesheet", "script"):
            sizes[reply.url] = len(reply.body())

    page.on("response", weigh)
    page.goto(reader.url)
    expect(page.locator("#live:not(:empty):not(.lost)")).to_be_visible()
    assert page.locator("html").get_attribute("lang") == language
    assert len(sizes) == 3
    assert sum(sizes.values()) <= 40 * 1024, sizes


def test_assets_are_cached_for_a_year_and_no_script_is_inline(
    service: Running, alice: httpx.Client, sign_in: Callable[..., str]
) -> None:
    with httpx.Client(base_url=service.url, cookies={app.COOKIE: sign_in("alice")}) as reader:
        page = reader.get("/")
        assert "unsafe" not in page.headers["content-security-policy"]
        assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", page.text)
        for script in re.findall(r"<script[^>]*>", page.text):
            assert "src=" in script or "application/json" in script
        for path in re.findall(r'"(/assets/[^"]+)"', page.text):
            reply = reader.get(path)
            assert "max-age=31536000" in reply.headers["cache-control"], path
            assert reply.status_code == 200


def test_motion_stops_for_those_who_ask_and_paper_has_no_buttons(device: Devices, post: Post) -> None:
    fill_inbox(post)
    page = device(reduced_motion="reduce").open_live()
    post(title="Fresh")
    expect(page.locator("li.fresh")).to_have_css("animation-name", "none")
    page.emulate_media(media="print")
    expect(page.get_by_role("button", name="Mark all read")).to_be_hidden()
    expect(lines(page).first).to_be_visible()


def test_severity_is_told_by_word_and_sign_not_by_colour_alone(device: Devices, post: Post) -> None:
    for severity in ("info", "success", "warning", "critical"):
        post(severity=severity)
    page = device().open_live()
    assert page.locator("#list b").all_text_contents() == ["Critical", "Warning", "Success", "Info"]
    signs = page.eval_on_selector_all(
        "#list b", "all => all.map(b => getComputedStyle(b, '::before').maskPosition)"
    )
    assert len(set(signs)) == 4


# ── live


def test_a_new_notification_shows_on_every_tab_and_device_within_a_second(
    device: Devices, post: Post, alice: httpx.Client
) -> None:
    laptop, phone = device(), device(viewport={"width": 375, "height": 700})
    pages = [laptop.open_live(), laptop.open_live("/?unread=1"), phone.open_live()]
    took = []
    for number in range(1, 4):
        post(title=f"News {number}")
        posted = time.monotonic()
        for page in pages:
            expect(page.locator("#list h2").first).to_have_text(f"News {number}", timeout=BY_THE_STREAM)
        took.append(time.monotonic() - posted)
        for page in pages:
            shows_count(page, number)
        assert unread(alice) == number
    assert min(took) < 1, "all three pages, one after the other; a busy machine may pause, but not each time"


def test_what_is_read_in_one_place_is_read_everywhere(
    device: Devices, post: Post, alice: httpx.Client
) -> None:
    for number in range(5):
        post(title=f"News {number}")
    laptop, phone = device(), device()
    here, there, elsewhere = laptop.open_live(), laptop.open_live("/preferences"), phone.open_live()
    lines(here).nth(1).hover()
    here.get_by_role("button", name="Mark read: News 3").click()
    for page in (here, elsewhere):
        shows_count(page, 4)
        expect(lines(page).nth(1)).not_to_have_class(re.compile("new"), timeout=BY_THE_STREAM)
    expect(there.locator("header .count")).to_have_text("4", timeout=BY_THE_STREAM)
    assert unread(alice) == 4
    lines(elsewhere).nth(1).hover()
    elsewhere.get_by_role("button", name="Mark unread: News 3").click()
    shows_count(here, 5)
    alice.patch("/api/notifications", json={"all": True})
    for page in (here, elsewhere):
        shows_count(page, 0)
    assert unread(alice) == 0


def test_only_one_tab_of_a_browser_holds_a_stream(device: Devices, post: Post) -> None:
    laptop = device()
    streams: set[Any] = set()

    def ended(one: Any) -> None:
        streams.discard(one)

    laptop.context.on("request", lambda one: one.url.endswith("/api/stream") and streams.add(one))
    laptop.context.on("requestfailed", ended)
    laptop.context.on("requestfinished", ended)
    pages = [laptop.open_live() for _ in range(7)]  # one more than a browser's connections to a site
    assert len(streams) == 1
    post(title="For all")
    for page in pages:
        expect(page.locator("#list h2").first).to_have_text("For all", timeout=BY_THE_STREAM)


def test_another_tab_takes_over_when_the_one_with_the_stream_closes(device: Devices, post: Post) -> None:
    laptop = device()
    first, second = laptop.open_live(), laptop.open_live()
    second.close()
    first.wait_for_timeout(300)
    post(title="Still here")
    expect(first.locator("#list h2").first).to_have_text("Still here", timeout=BY_THE_STREAM)


def test_a_cut_connection_is_told_discreetly_and_nothing_is_missed(
    device: Devices, post: Post, wire: Wire
) -> None:
    reader = device(url=wire.url)
    reader.excused = "net::ERR"
    page = reader.open_live()
    wire.cut()
    expect(page.locator("#live")).to_have_text(re.compile("Connection lost"))
    for number in range(3):
        post(title=f"Meanwhile {number}")
    wire.mend()
    expect(page.locator("#live")).to_have_text("Live", timeout=15_000)
    expect(lines(page)).to_have_count(3)
    assert titles(page) == ["Meanwhile 2", "Meanwhile 1", "Meanwhile 0"]
    shows_count(page, 3)
    post(title="And on")
    expect(page.locator("#list h2").first).to_have_text("And on", timeout=BY_THE_STREAM)


def test_a_restarted_service_is_found_again_and_nothing_is_missed(
    device: Devices, post: Post, service: Running, serve: Callable[..., Running], wire: Wire,
    make_key: Callable[[str], str],
) -> None:  # fmt: skip
    reader = device(url=wire.url)
    reader.excused = "net::ERR"
    page = reader.open_live()
    post(title="Before")
    expect(lines(page)).to_have_count(1)
    service.stop()
    wire.cut()
    expect(page.locator("#live")).to_have_text(re.compile("Connection lost"))
    second = serve()
    wire.target = ("127.0.0.1", urlsplit(second.url).port)
    body = {"user_id": "alice", "event_name": "a", "title": "After", "body": "b"}
    with httpx.Client(
        base_url=second.url, headers={"Authorization": f"Bearer {make_key('send')}"}
    ) as program:
        assert program.post("/api/notifications", json=body).status_code == 201
    wire.mend()
    expect(page.locator("#live")).to_have_text("Live", timeout=15_000)
    expect(lines(page)).to_have_count(2)
    assert titles(page) == ["After", "Before"]
    shows_count(page, 2)


def test_without_a_stream_the_page_asks_every_30_seconds(device: Devices, post: Post) -> None:
    reader = device()
    reader.excused = "net::ERR"
    reader.context.route("**/api/stream", lambda route: route.abort())
    page = reader.context.new_page()
    page.clock.install()
    page.goto(reader.url)
    expect(page.locator("#live")).to_have_text(re.compile("Connection lost"))
    post(title="By asking")
    page.clock.run_for(31_000)
    expect(page.locator("#list h2").first).to_have_text("By asking")
    reader.context.unroute("**/api/stream")
    page.clock.run_for(60_000)
    expect(page.locator("#live")).to_have_text("Live")


def test_a_hint_whose_list_could_not_be_fetched_is_followed_a_little_later(
    device: Devices, post: Post
) -> None:
    reader = device()
    reader.excused = "net::ERR"
    page = reader.context.new_page()
    page.clock.install()
    page.goto(reader.url)
    expect(page.locator("#live")).to_have_text("Live")
    reader.context.route("**/api/notifications*", lambda route: route.abort())
    with page.expect_event("requestfailed"):
        post(title="At the second try")
    reader.context.unroute("**/api/notifications*")
    assert titles(page) == []
    page.clock.run_for(31_000)
    expect(page.locator("#list h2").first).to_have_text("At the second try")


def test_a_tab_that_slept_catches_up_when_it_wakes(device: Devices, post: Post) -> None:
    reader = device()
    reader.excused = "net::ERR"
    reader.context.add_init_script(HIDEABLE)
    page = reader.open_live()
    reader.context.route("**/api/**", lambda route: route.abort())
    page.evaluate("hide(true)")
    post(title="While asleep")
    page.wait_for_timeout(300)
    assert titles(page) == []
    reader.context.unroute("**/api/**")
    page.evaluate("hide(false)")
    expect(page.locator("#list h2").first).to_have_text("While asleep", timeout=BY_THE_STREAM)


# ── reading and tidying up


def test_mark_all_read_spares_what_the_reader_has_not_seen(
    device: Devices, post: Post, alice: httpx.Client
) -> None:
    post(title="Seen")
    reader = device()
    reader.excused = "net::ERR"
    reader.context.route("**/api/notifications?*", lambda route: route.abort())
    page = reader.open_live()  # with the list as the server drew it
    expect(lines(page)).to_have_count(1)
    unseen = post(title="Not seen yet")
    page.get_by_role("button", name="Mark all read").click()
    expect(page.locator("#toast")).to_have_text("1 notification marked read")
    left = alice.get("/api/notifications?unread=1").json()["notifications"]
    assert [n["id"] for n in left] == [unseen["id"]]


def test_archiving_can_be_undone(device: Devices, post: Post, alice: httpx.Client) -> None:
    post(title="Keep")
    page = device().open_live()
    lines(page).first.hover()
    page.get_by_role("button", name="Archive: Keep").click()
    expect(lines(page)).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()
    shows_count(page, 0)
    page.get_by_role("button", name="Undo").click()
    expect(lines(page)).to_have_count(1)
    shows_count(page, 1)
    assert unread(alice) == 1


def test_the_archive_gives_back(device: Devices, post: Post) -> None:
    post(title="Old")
    reader = device()
    page = reader.open_live()
    page.keyboard.press("j")
    page.keyboard.press("e")
    expect(page.locator("#toast")).to_contain_text("Archived")
    page = reader.open_live("/?archived=1")
    assert titles(page) == ["Old"]
    lines(page).first.hover()
    page.get_by_role("button", name="Move to inbox: Old").click()
    expect(lines(page)).to_have_count(0)
    assert titles(reader.open_live()) == ["Old"]


def test_load_more_shows_every_notification_once(device: Devices, post: Post) -> None:
    for number in range(70):
        post(title=f"News {number}")
    page = device().open_live()
    expect(lines(page)).to_have_count(30)
    post(title="News 70")
    for shown in (60, 71):
        page.get_by_role("button", name="Load more").click()
        expect(lines(page)).to_have_count(shown)
    expect(page.get_by_role("button", name="Load more")).to_be_hidden()
    assert titles(page) == [f"News {number}" for number in range(70, -1, -1)]


def test_following_a_link_marks_its_notification_read(
    device: Devices, post: Post, alice: httpx.Client
) -> None:
    post(title="To the preferences", target_url="/preferences")
    page = device().open_live()
    page.get_by_role("link", name="To the preferences").click()
    expect(page.locator("h1")).to_have_text("Preferences")
    assert eventually(lambda: unread(alice) == 0)


def test_the_outbox_strip_sends_or_skips_what_is_about_to_leave(
    device: Devices, post: Post, api: httpx.Client, alice: httpx.Client
) -> None:
    api.put("/api/users/alice", json={"email": "alice@example.com"})
    alice.patch("/api/preferences", json={"email_enabled": True, "digest_minutes": 30})
    page = device().open_live()
    for number in range(5):
        post(title=f"News {number}", severity="warning", batch_key="comments")
    strip = page.locator("#outbox li")
    expect(strip).to_contain_text("E-mail digest · 5 notifications · leaves", timeout=3_000)
    strip.get_by_role("button", name="Skip").click()
    expect(strip).to_have_count(0)
    assert alice.get("/api/outbox").json()["outbox"] == []


def test_send_now_in_the_outbox_strip_lets_a_message_leave(
    device: Devices, post: Post, api: httpx.Client, alice: httpx.Client, sql: Sql
) -> None:
    api.put("/api/users/alice", json={"email": "alice@example.com"})
    alice.patch("/api/preferences", json={"email_enabled": True, "digest_minutes": 30})
    post(severity="warning", batch_key="comments")
    page = device().open_live()
    page.locator("#outbox li").get_by_role("button", name="Send now").click()
    # Nobody listens where the mails go: that it was tried at once is proof enough.
    assert eventually(lambda: sql("SELECT attempts > 0 OR state = 'sending' FROM outbox")[0][0])


def test_time_is_an_age_with_the_exact_moment_on_hover(device: Devices, post: Post) -> None:
    post()
    page = device(timezone_id="Asia/Seoul").open_live()
    moment = page.locator("#list time")
    expect(moment).to_have_text("now")
    assert re.search(r"\w+, \w+ \d+, \d{4} at \d+:\d\d", moment.get_attribute("title") or "")


def test_the_favicon_carries_the_count(device: Devices, post: Post) -> None:
    page = device().open_live()
    post()
    icon = page.locator("link[rel=icon]")
    expect(icon).to_have_attribute("href", re.compile("^data:image/svg"), timeout=BY_THE_STREAM)


# ── keyboard


def test_everything_works_by_keyboard_alone(
    device: Devices, service: Running, post: Post, alice: httpx.Client
) -> None:
    for title in ("Third", "Second", "First"):
        post(title=title)
    page = device(None).open("/login")
    focus_by_tab(page, "#link")
    page.keyboard.type(f"{service.url}/login#token={link_token(service, 'alice')}")
    page.keyboard.press("Enter")
    expect(page.locator("#live")).to_have_text("Live")
    for key, focused in (("j", "First"), ("j", "Second"), ("j", "Third"), ("k", "Second")):
        page.keyboard.press(key)
        expect(page.locator("#list > li:focus h2")).to_have_text(focused)
    page.keyboard.press("u")
    shows_count(page, 2)
    page.keyboard.press("u")
    shows_count(page, 3)
    page.keyboard.press("e")
    expect(lines(page)).to_have_count(2)
    expect(page.locator("#list > li:focus h2")).to_have_text("Third")
    page.keyboard.press("Enter")
    expect(page.locator("article h1")).to_have_text("Third")
    assert eventually(lambda: unread(alice) == 1)
    focus_by_tab(page, "header nav a[href='/preferences']")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Preferences")
    focus_by_tab(page, "input[name=email_enabled]")
    page.keyboard.press("Space")
    expect(page.locator("#toast")).to_have_text("Saved")
    assert alice.get("/api/preferences").json()["preferences"]["email_enabled"]


def focus_by_tab(page: Page, selector: str) -> None:
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("wanted => document.activeElement.matches(wanted)", selector):
            return
    raise AssertionError(f"Tab never reaches {selector}")


def test_shortcuts_have_a_help_and_can_be_switched_off(device: Devices, post: Post) -> None:
    post()
    reader = device()
    page = reader.open_live()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("Next notification")
    page.get_by_label("Use keyboard shortcuts").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    expect(page.locator("#list > li:focus")).to_have_count(0)
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_count(1)


def test_the_first_stop_of_the_tab_key_skips_to_the_content(device: Devices) -> None:
    page = device().open_live()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()


# ── hostile text

BREAK = "document.documentElement.dataset.broken=1"  # what a script that got through would do
HOSTILE = [
    f"<script>{BREAK}</script>", f"</script><script>{BREAK}</script>", f"<img src=x onerror='{BREAK}'>",
    f'"><img src=x onerror="{BREAK}">', f"'><svg onload='{BREAK}'>", f"<svg/onload={BREAK}>",
    f"<iframe srcdoc='<script>parent.{BREAK}</script>'>", "<a href=javascript:alert(1)>x</a>",
    "javascript:alert(1)", "JaVaScRiPt:alert(1)", "java\u200bscript:alert(1)", "vbscript:msgbox(1)",
    "data:text/html,<script>alert(1)</script>", "{{ 7 * 7 }}", "{% raw %}{{ w }}{% endraw %}", "${7 * 7}",
    "#{7 * 7}", "<%= 7 * 7 %>", "{{ config.__class__.__mro__ }}", "&lt;b&gt;bold&lt;/b&gt;",
    "&#60;script&#62;", "&amp;&amp;", "<!-- comment", "--><b>out</b>", "<![CDATA[x]]>", "]]>", "<b>bold</b>",
    "</li></ol></main><h1>gone", "</title><h1>x", "<base href='//evil.example'>", "<template>x</template>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>", "<form action=//evil.example><button>x",
    "<input autofocus onfocus=alert(1)>", "<style>*{display:none}</style>", "%3Cscript%3E",
    "<link rel=stylesheet href=//evil.example>", "<math><mi xlink:href='javascript:1'>",
    "'; DROP TABLE notifications; --", "\\'; alert(1); //", "\\u003cscript\\u003e", "+ADw-script+AD4-",
    "a" * 200, "ﷺ" * 40,
    "👩‍👩‍👧‍👦" * 15, "Z" + "\u0351\u036b\u0343\u036a\u0319\u0324" * 20 + "algo",
    "\u202emoc.elpmaxe\u202c", "\u2066isolated\u2069", "مرحبا بالعالم", "שלום עולם", "  spaces   inside  ",
    "tab\tinside", "line\u2028separator\u2029paragraph", "\ufeffbom", "\u200d\u200c\u200b zero width",
    "constructor", "__proto__", "[object Object]", "undefined", "null", "NaN", "(1) Inbox", "%s %d %n",
]  # fmt: skip


def test_hostile_text_stays_text(device: Devices, post: Post, api: httpx.Client, sql: Sql) -> None:
    assert len(HOSTILE) >= 60
    sent = [post(title=text, body=text, event_name=text[:120].strip()) for text in HOSTILE]
    for text in HOSTILE:
        asked = {"user_id": "alice", "event_name": "a", "title": "b", "body": "c", "target_url": text}
        reply = api.post("/api/notifications", json=asked)
        assert (reply.status_code, reply.json()["errors"][0]["field"]) == (400, "target_url"), text
    sql("UPDATE notifications SET target_url = title")  # as if they had slipped through the door
    reader = device()
    page = reader.open_live()
    page.get_by_role("button", name="Load more").click()
    expect(lines(page)).to_have_count(60)
    page.get_by_role("button", name="Load more").click()
    expect(lines(page)).to_have_count(len(HOSTILE))
    shown = page.eval_on_selector_all("#list h2 a", "all => all.map(link => link.textContent)")
    assert shown == [n["title"] for n in reversed(sent)]
    check_nothing_broke(page)
    listed = reader.open_live()  # now as the server draws them
    assert listed.eval_on_selector_all("#list h2 a", "all => all.map(link => link.textContent)") == shown[:30]
    check_nothing_broke(listed)
    for notification in sent[::10]:
        single = reader.open_live(f"/n/{notification['id']}")
        assert single.locator("h1").text_content() == notification["title"]
        assert single.locator(".body").text_content() == notification["body"]
        expect(single.locator("article a")).to_have_count(0)
        check_nothing_broke(single)
        single.close()
    check_nothing_broke(reader.open_live("/preferences"))


def check_nothing_broke(page: Page) -> None:
    assert page.locator("html").get_attribute("data-broken") is None
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("main img, main iframe, main script, main style, main base, main meta").count() == 0
    links = page.eval_on_selector_all("a", "all => all.map(link => link.protocol)")
    assert set(links) <= {"http:", "https:"}


@pytest.mark.parametrize(
    "target",
    [
        "javascript:alert(1)", "JAVASCRIPT:alert(1)", "\tjavascript:alert(1)", "java\nscript:alert(1)",
        " javascript:alert(1)", "//evil.example", "/\\evil.example", "\\\\evil.example", "/\t/evil.example",
        "https:\\\\evil.example", "file:///etc/passwd", "data:text/html,x", "vbscript:x", "mailto:x", "x", "",
    ],
)  # fmt: skip
def test_a_bad_address_never_becomes_a_link(device: Devices, post: Post, sql: Sql, target: str) -> None:
    own = post(title="Trap", target_url="/fine")
    sql("UPDATE notifications SET target_url = %s", target)  # as if it had slipped through the door
    reader = device()
    reader.excused = "net::ERR"
    page = reader.context.new_page()
    page.route("**/*.js", lambda route: route.abort())
    page.goto(reader.url)
    assert page.locator("#list h2 a").get_attribute("href") == f"/n/{own['id']}"
    page = reader.open_live()
    expect(page.locator("#list small a")).to_have_count(1)
    assert page.locator("#list h2 a").get_attribute("href") == f"/n/{own['id']}"
    page = reader.open_live(f"/n/{own['id']}")
    expect(page.locator("article a")).to_have_count(0)


# ── one notification, signing in


def test_a_mail_link_asks_for_sign_in_then_lands_and_marks_read(
    device: Devices, service: Running, post: Post, alice: httpx.Client
) -> None:
    sent = post(title="From a mail", target_url="https://example.com/order")
    reader = device(None)
    page = reader.open(f"/n/{sent['id']}")
    expect(page.locator("h1")).to_have_text("Sign in")
    assert unread(alice) == 1
    page = reader.open(f"/login#token={link_token(service, 'alice')}")  # the link that the reader asked for
    expect(page.locator("article h1")).to_have_text("From a mail")
    assert page.url == f"{service.url}/n/{sent['id']}"
    expect(page.get_by_role("link", name="Open on example.com")).to_have_attribute(
        "href", "https://example.com/order"
    )
    assert eventually(lambda: unread(alice) == 0)


@pytest.mark.parametrize(
    "wish", ["//evil.example", "https://evil.example/", "/\\evil.example", "javascript:alert(1)", "/login"]
)
def test_signing_in_leads_nowhere_else(device: Devices, service: Running, wish: str) -> None:
    page = device(None).open(f"/login?next={wish}#token={link_token(service, 'alice')}")
    expect(page.locator("h1")).to_contain_text("Inbox")
    assert page.url == service.url + "/"


def test_the_token_does_not_stay_in_the_address_bar(device: Devices) -> None:
    reader = device(None)
    reader.excused = "401"
    page = reader.open("/login#token=worthless")
    expect(page.locator("#login-says")).to_contain_text("expired")
    assert page.url == reader.url + "/login"
    assert page.evaluate("history.length") <= 2


def test_signing_out_ends_it(device: Devices) -> None:
    reader = device()
    page = reader.open_live()
    page.get_by_role("button", name="Sign out").click()
    expect(page.locator("h1")).to_have_text("Sign in")
    expect(reader.open("/").locator("h1")).to_have_text("Sign in")


def test_one_notification_can_be_marked_unread_and_archived(
    device: Devices, post: Post, alice: httpx.Client
) -> None:
    sent = post(title="One")
    page = device().open_live(f"/n/{sent['id']}")
    page.get_by_role("button", name="Mark unread").click()
    assert eventually(lambda: unread(alice) == 1)
    page.get_by_role("button", name="Archive").click()
    expect(page.get_by_role("button", name="Move to inbox")).to_be_visible()
    assert alice.get("/api/notifications").json()["notifications"] == []


# ── preferences


def test_every_preference_is_saved_at_once(device: Devices, post: Post, alice: httpx.Client) -> None:
    post(event_name="comment.created")
    page = device().open_live("/preferences")

    def now() -> dict[str, Any]:
        return alice.get("/api/preferences").json()["preferences"]

    page.locator("input[name=in_app_enabled]").uncheck()
    assert eventually(lambda: not now()["in_app_enabled"])
    page.get_by_role("switch", name="E-mail", exact=False).first.check()
    assert eventually(lambda: now()["email_enabled"])
    page.get_by_label("Send from").select_option("critical")
    assert eventually(lambda: now()["min_severity"] == "critical")
    page.get_by_label("Collect related mails").select_option("30")
    assert eventually(lambda: now()["digest_minutes"] == 30)
    page.get_by_label("Quiet hours").check()
    assert eventually(lambda: now()["quiet_from"] == "22:00" and now()["quiet_to"] == "07:00")
    page.get_by_label("From", exact=True).fill("23:30")
    assert eventually(lambda: now()["quiet_from"] == "23:30")
    page.get_by_label("Time zone").select_option("Asia/Seoul")
    assert eventually(lambda: now()["timezone"] == "Asia/Seoul")
    page.get_by_label("comment.created: Push").uncheck()
    assert eventually(lambda: now()["events"].get("comment.created", {}).get("push") is False)
    page.get_by_label("Language", exact=True).select_option("de")
    expect(page.locator("h1")).to_have_text("Einstellungen")
    expect(page.get_by_label("comment.created: Push")).not_to_be_checked()
    expect(page.locator("input[name=quiet_from]")).to_have_value("23:30")


def test_the_language_follows_the_browser_until_one_is_chosen(
    device: Devices, post: Post, alice: httpx.Client
) -> None:
    assert device(None, locale="ko-KR").open("/login").locator("html").get_attribute("lang") == "ko"
    reader, paths = device(locale="fr-FR", admin=True), ("/", f"/n/{post()['id']}", "/preferences", "/admin")

    def spoken() -> set[str | None]:
        return {reader.open(path).locator("html").get_attribute("lang") for path in paths}

    assert spoken() == {"fr"}
    alice.patch("/api/preferences", json={"digest_minutes": 30})
    assert alice.get("/api/preferences").json()["preferences"]["locale"] == "en", "what a program is told"
    assert spoken() == {"fr"}
    page = reader.open("/preferences")
    page.locator("select[name=locale]").select_option("fr")
    assert eventually(lambda: alice.get("/api/preferences").json()["preferences"]["locale"] == "fr")
    alice.patch("/api/preferences", json={"locale": "en"})
    assert spoken() == {"en"}


def test_what_could_not_be_saved_is_shown_as_it_was(device: Devices, post: Post, alice: httpx.Client) -> None:
    post(event_name="order.paid")
    post(event_name="Order.paid")
    alice.patch("/api/preferences", json={"timezone": "Asia/Seoul"})
    reader = device()
    reader.excused = "503"
    page = reader.open_live("/preferences")
    assert sorted(page.locator("th[scope=row]").all_inner_texts()) == ["Order.paid", "order.paid"]
    page.get_by_label("Collect related mails").select_option("30")
    assert eventually(lambda: alice.get("/api/preferences").json()["preferences"]["digest_minutes"] == 30)
    before = alice.get("/api/preferences").json()
    refused = "digest_minutes|min_severity|events|in_app|quiet|timezone"

    def refuse(route: Route) -> None:
        if re.search(refused, route.request.post_data or ""):
            route.fulfill(status=503)
        else:
            route.continue_()

    reader.context.route("**/api/preferences", refuse)
    page.get_by_label("Send from").select_option("critical")
    expect(page.get_by_label("Send from")).to_have_value("warning")
    page.get_by_label("Collect related mails").select_option("60")
    expect(page.get_by_label("Collect related mails")).to_have_value("30")
    page.get_by_label("order.paid: Push", exact=True).uncheck(force=True)
    expect(page.get_by_label("order.paid: Push", exact=True)).to_be_checked()
    page.locator("input[name=in_app_enabled]").click(force=True)
    expect(page.locator("input[name=in_app_enabled]")).to_be_checked()
    page.get_by_label("Quiet hours").click(force=True)
    expect(page.get_by_label("Quiet hours")).not_to_be_checked()
    expect(page.locator("#quiet-times")).to_be_hidden()
    page.get_by_label("Time zone").select_option("UTC")
    expect(page.get_by_label("Time zone")).to_have_value("Asia/Seoul")
    assert alice.get("/api/preferences").json() == before

    # One of two that are under way at once.
    refused = "min_severity"
    page.evaluate("""() => {
        for (const [name, value] of [["min_severity", "info"], ["digest_minutes", "60"]]) {
            const select = document.querySelector(`[name=${name}]`);
            select.value = value;
            select.dispatchEvent(new Event("change", { bubbles: true }));
        }
    }""")
    expect(page.get_by_label("Send from")).to_have_value("warning")
    assert eventually(lambda: alice.get("/api/preferences").json()["preferences"]["digest_minutes"] == 60)
    expect(page.get_by_label("Collect related mails")).to_have_value("60")


# ── alerts and push


def service_worker(page: Page) -> Worker:
    """The service worker of the page's browser, which from now on counts what it shows."""
    assert eventually(lambda: page.context.service_workers or page.wait_for_timeout(50))
    worker = page.context.service_workers[0]
    page.evaluate("navigator.serviceWorker.ready")
    worker.evaluate(SHOWS)
    return worker


def test_alerts_are_asked_for_only_by_a_click_and_come_once_while_hidden(device: Devices, post: Post) -> None:
    reader = device(permissions=["notifications"])
    reader.context.add_init_script(HIDEABLE)
    pages = [reader.open_live(), reader.open_live()]
    shown = "async () => (await registration.getNotifications()).map((one) => one.title)"
    pages[0].get_by_role("button", name="Browser alerts").click()
    expect(pages[0].locator("#toast")).to_contain_text("alerts are on")
    worker = service_worker(pages[0])
    post(title="In view")
    for page in pages:
        expect(page.locator("#list h2").first).to_have_text("In view")
    pages[0].wait_for_timeout(600)
    assert worker.evaluate("shows") == 0
    for page in pages:
        page.evaluate("hide(true)")
    sent = post(title="Out of view", severity="info")
    assert eventually(lambda: worker.evaluate("shows") or pages[0].wait_for_timeout(50))
    pages[0].wait_for_timeout(600)
    assert worker.evaluate("shows") == 1
    assert worker.evaluate(shown) == ["Out of view"]
    other = device().open_live()
    lines(other).first.hover()
    other.get_by_role("button", name="Mark read: Out of view").click()
    assert eventually(lambda: worker.evaluate(shown) == [] or pages[0].wait_for_timeout(50)), sent


def test_no_page_asks_for_permission_by_itself(device: Devices, post: Post) -> None:
    reader = device(admin=True)
    reader.context.add_init_script(
        """if (location.protocol === "http:") {
            localStorage.asked ??= 0;
            Notification.requestPermission = async () => { localStorage.asked++; return "denied"; };
        }"""
    )
    for path in ("/", f"/n/{post()['id']}", "/preferences", "/admin"):
        page = reader.open_live(path)
        assert page.evaluate("localStorage.asked") == "0", path
    page = reader.open_live()
    page.get_by_role("button", name="Browser alerts").click()
    assert eventually(lambda: page.evaluate("localStorage.asked") == "1" or page.wait_for_timeout(50))


def push(page: Page, reader: Device, message: dict[str, Any]) -> None:
    """Deliver a decrypted push message to the page's service worker, as the browser would."""
    session = reader.context.new_cdp_session(page)
    workers: list[dict[str, Any]] = []
    session.on(
        "ServiceWorker.workerRegistrationUpdated", lambda event: workers.extend(event["registrations"])
    )
    session.send("ServiceWorker.enable")
    eventually(lambda: workers or page.wait_for_timeout(20))
    wanted = {
        "origin": reader.url,
        "registrationId": workers[0]["registrationId"],
        "data": json.dumps(message),
    }
    session.send("ServiceWorker.deliverPushMessage", wanted)
    session.detach()


def test_a_push_is_shown_opens_its_item_and_goes_when_read_elsewhere(
    device: Devices, post: Post, alice: httpx.Client
) -> None:
    reader = device(permissions=["notifications"])
    page = reader.open_live("/preferences")
    page.evaluate("navigator.serviceWorker.register('/sw.js').then(() => navigator.serviceWorker.ready)")
    worker = service_worker(page)
    sent = [post(title=f"Pushed {number}") for number in range(2)]
    for one in sent:
        message = {"id": one["id"], "title": one["title"], "url": f"{reader.url}/n/{one['id']}"}
        push(page, reader, message | {"tag": one["id"], "severity": "warning"})
    assert eventually(lambda: worker.evaluate("shows") == 2 or page.wait_for_timeout(50))
    shown = "async () => (await registration.getNotifications()).map((one) => one.title)"
    assert sorted(worker.evaluate(shown)) == ["Pushed 0", "Pushed 1"]
    alice.patch("/api/notifications", json={"notification_id": sent[0]["id"]})
    assert eventually(lambda: worker.evaluate(shown) == ["Pushed 1"] or page.wait_for_timeout(50))
    opened = worker.evaluate("""async () => {
        const opened = [];
        clients.openWindow = async (url) => { opened.push(url); };
        const [notification] = await registration.getNotifications();
        dispatchEvent(new NotificationEvent("notificationclick", { notification }));
        await new Promise((done) => setTimeout(done, 300));
        return [...opened, (await registration.getNotifications()).length];
    }""")
    assert opened == [f"{reader.url}/n/{sent[1]['id']}", 0]


def test_a_push_cannot_open_another_site(device: Devices) -> None:
    reader = device(permissions=["notifications"])
    reader.excused = "404"  # the worker asks whether "x" has been read
    page = reader.open_live("/preferences")
    page.evaluate("navigator.serviceWorker.register('/sw.js').then(() => navigator.serviceWorker.ready)")
    worker = service_worker(page)
    push(
        page,
        reader,
        {"id": "x", "title": "Trap", "url": "https://evil.example/", "tag": "x", "severity": "info"},
    )
    assert eventually(lambda: worker.evaluate("shows") or page.wait_for_timeout(50))
    shown = "async () => (await registration.getNotifications()).map((one) => one.data.url)"
    assert worker.evaluate(shown) == [reader.url + "/"]


def test_the_push_switch_connects_and_disconnects_this_browser(
    device: Devices, alice: httpx.Client, sql: Sql
) -> None:
    reader = device(permissions=["notifications"])
    point = json.dumps(alice.get("/api/push/key").json()["public_key"])
    reader.context.add_init_script(PLUGGABLE.replace("P256DH", point))
    page = reader.open_live("/preferences")
    page.get_by_label("Push messages").check()
    expect(page.locator("#browser")).to_contain_text("Connected: push messages arrive here.")
    assert eventually(lambda: sql("SELECT count(*) FROM push_subscriptions")[0][0] == 1)
    assert eventually(lambda: alice.get("/api/preferences").json()["preferences"]["push_enabled"])
    page.get_by_role("button", name="Disconnect").click()
    expect(page.locator("#browser")).to_contain_text("Not connected")
    assert eventually(lambda: sql("SELECT count(*) FROM push_subscriptions")[0][0] == 0)


# ── admin


def test_an_admin_makes_and_revokes_keys_and_webhooks(device: Devices, api: httpx.Client) -> None:
    page = device(admin=True).open_live("/admin")
    page.get_by_text("Add an API key").click()
    page.get_by_label("Name").fill("<b>shop</b>")
    page.locator("#api-keys ~ details").get_by_role("button", name="Add").click()
    expect(page.locator("#secret-value")).to_have_text(re.compile("^bh_"))
    page.get_by_role("button", name="Close").click()
    row = page.locator("#api-keys li", has_text="<b>shop</b>")
    row.get_by_role("button", name="Revoke").click()
    page.get_by_role("button", name="Go ahead").click()
    expect(row).to_have_count(0)
    assert "<b>shop</b>" not in [key["name"] for key in api.get("/api/keys").json()["keys"]]
    page.get_by_text("Add a webhook").click()
    page.get_by_label("Address").fill("https://hooks.example.com/in")
    page.get_by_label("Events, comma separated").fill("order.*, invoice.paid")
    page.locator("#hooks ~ details").get_by_role("button", name="Add").click()
    expect(page.locator("#secret-value")).to_have_text(re.compile("^whsec_"))
    page.get_by_role("button", name="Close").click()
    expect(page.locator("#hooks li")).to_contain_text("order.*, invoice.paid")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Cancel").click()
    assert len(api.get("/api/webhooks").json()["webhooks"]) == 1
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Go ahead").click()
    expect(page.locator("#hooks li")).to_have_count(0)
    assert api.get("/api/webhooks").json()["webhooks"] == []


def fail_a_delivery(post: Post, api: httpx.Client, sql: Sql) -> None:
    """A mail that five times found nobody."""
    api.put("/api/users/alice", json={"email": "alice@example.com"})
    api.patch("/api/users/alice/preferences", json={"email_enabled": True, "digest_minutes": 30})
    post(title="Lost", severity="warning", batch_key="lost")
    sql("UPDATE outbox SET state = 'failed', attempts = 5, finished_at = now()")
    sql("UPDATE deliveries SET status = 'failed', last_error = '451 try <again> later'")


def test_an_admin_sees_why_a_delivery_failed_and_retries_it(
    device: Devices, post: Post, api: httpx.Client, sql: Sql
) -> None:
    fail_a_delivery(post, api, sql)
    page = device(admin=True).open_live("/admin")
    expect(page.locator("#failed li")).to_contain_text("451 try <again> later")
    page.locator("#failed li").get_by_role("button", name="Retry").click()
    expect(page.locator("#toast")).to_have_text("Back in the queue")
    expect(page.locator("#failed li")).to_have_count(0)
    assert api.get("/api/deliveries?status=failed").json()["deliveries"] == []


def test_the_admin_page_draws_the_queue_and_names_the_paused_provider(
    device: Devices, post: Post, api: httpx.Client, sql: Sql
) -> None:
    fail_a_delivery(post, api, sql)
    sql(BUSY_HOUR)
    sql(THEIR_DELIVERIES)
    sql("INSERT INTO breakers (provider, faults, paused_until) VALUES ('mail', 10, now() + interval '1 minute')"
        " ON CONFLICT (provider) DO UPDATE SET faults = 10, paused_until = excluded.paused_until")  # fmt: skip
    page = device(admin=True).open_live("/admin")
    assert page.locator("#queue svg[role=img] rect.sent").count() >= 50, "a bar for each minute of the hour"
    assert page.locator("#age polyline").get_attribute("points")
    for drawing in page.locator("#queue svg").all():
        assert drawing.get_attribute("aria-label")
    expect(page.locator("#providers li.failed")).to_contain_text("mail")


def test_an_admin_tests_a_webhook_and_is_told_how_it_went(device: Devices, api: httpx.Client) -> None:
    api.post("/api/webhooks", json={"url": "https://127.0.0.1:9/in"})
    page = device(admin=True).open_live("/admin")
    with page.expect_response(re.compile("/api/webhooks/.*/test")):
        page.locator("#hooks li").get_by_role("button", name="Test", exact=False).first.click()
    expect(page.locator("#toast")).not_to_be_empty()


def test_only_admins_get_the_admin_page(device: Devices) -> None:
    reader = device()
    reader.excused = "403"
    page = reader.open("/admin")
    expect(page.locator("h1")).to_have_text("Not for this account")
    expect(page.locator("nav a[href='/admin']")).to_have_count(0)


# ── the widget


def visit_shop(reader: Device, shop: Shop, service: Running, bell: str, style: str = SPOILER) -> Page:
    """A page of the shop with our bell in it."""
    bell = bell.replace("<bellhop-bell", f'<bellhop-bell base-url="{service.url}"')
    bell += f'<script src="{service.url}/bell.js"></script>'
    shop.body = SHOP.replace("STYLE", style).replace("BELL", bell)
    reader.excused = f"another origin: ({shop.url}|{service.url})|401|404"  # a favicon the shop has not
    page = reader.context.new_page()
    page.goto(shop.url)
    return page


def bell_of(token: str) -> str:
    return f'<bellhop-bell token="{token}"></bellhop-bell>'


def test_the_widget_counts_marks_read_and_follows_live_on_another_site(
    device: Devices, shop: Shop, service: Running, post: Post, alice: httpx.Client, api: httpx.Client
) -> None:
    token = api.post("/api/users/alice/token", json={"minutes": 5}).json()["token"]
    post(title="Earlier")
    reader, asked = device(None), list[str]()
    reader.context.on("request", lambda request: asked.append(request.url))
    page = visit_shop(reader, shop, service, bell_of(token))
    bell = page.locator("bellhop-bell")
    expect(bell.locator(".badge")).to_have_text("1")
    post(title="Now")
    expect(bell.locator(".badge")).to_have_text("2", timeout=BY_THE_STREAM)
    bell.get_by_role("button", name="Notifications, 2 unread").click()
    assert bell.locator("li strong").all_inner_texts() == ["Now", "Earlier"]
    bell.get_by_role("button", name="Mark read: Earlier").click()
    expect(bell.locator(".badge")).to_have_text("1", timeout=BY_THE_STREAM)
    assert unread(alice) == 1
    bell.get_by_role("button", name="Mark all read").click()
    expect(bell.locator(".badge")).to_have_text("", timeout=BY_THE_STREAM)
    assert unread(alice) == 0
    assert not Axe().run(page, "bellhop-bell").response["violations"]
    page.keyboard.press("Escape")
    expect(bell.locator(".panel")).to_be_hidden()
    assert any(url.endswith("/api/stream") for url in asked)
    assert not [url for url in asked if token in url], "the token must not be in an address"


def test_the_widget_forgets_its_reader_with_the_token(
    device: Devices, shop: Shop, service: Running, post: Post, api: httpx.Client
) -> None:
    token = api.post("/api/users/alice/token", json={"minutes": 5}).json()["token"]
    post(title="For Alice alone")
    page = visit_shop(device(None), shop, service, bell_of(token))
    expect(page.locator("bellhop-bell .badge")).to_have_text("1")
    page.evaluate("document.querySelector('bellhop-bell').removeAttribute('token')")
    expect(page.locator("bellhop-bell .badge")).to_have_text("")
    page.locator("bellhop-bell .bell").click()
    expect(page.locator("bellhop-bell li")).to_have_count(0)


def test_the_widget_never_shows_one_reader_to_another(
    device: Devices, shop: Shop, service: Running, post: Post, api: httpx.Client
) -> None:
    """Alice's token is slow to come; by the time it is there the site has signed Bob in, and then nobody."""
    tokens = {
        user: api.post(f"/api/users/{user}/token", json={"minutes": 5}).json()["token"]
        for user in ("alice", "bob")
    }
    for user in tokens:
        post(user, title=f"For {user} alone")
    page = visit_shop(device(None), shop, service, "<bellhop-bell></bellhop-bell>")
    page.evaluate(
        """tokens => {
            const bell = document.querySelector("bellhop-bell");
            bell.getToken = () => new Promise((done) => { globalThis.late = () => done(tokens.alice); });
            bell.getToken = async () => tokens.bob;
        }""",
        tokens,
    )
    items = page.locator("bellhop-bell li strong")
    page.locator("bellhop-bell .bell").click()
    expect(items).to_have_text(["For bob alone"])
    page.evaluate("late()")
    page.evaluate(
        """tokens => {
        // Bob's click is answered 401 when Alice is there already.
        const bell = document.querySelector("bellhop-bell");
        const usual = globalThis.fetch;
        globalThis.asked = [];
        globalThis.fetch = async (url, options) => {
            if (options.method !== "PATCH") return usual(url, options);
            asked.push(options.headers.Authorization);
            bell.getToken = async () => tokens.alice;
            return new Response("", { status: 401 });
        };
        bell.shadowRoot.querySelector("li button").click();
    }""",
        tokens,
    )
    expect(items).to_have_text(["For alice alone"])
    assert page.evaluate("asked") == [f"Bearer {tokens['bob']}"], "not once more in the name of Alice"
    page.evaluate(
        "tokens => { document.querySelector('bellhop-bell').getToken = async () => tokens.bob; }", tokens
    )
    expect(items).to_have_text(["For bob alone"])
    post("bob", title="For bob as well")
    expect(items).to_have_text(["For bob as well", "For bob alone"])
    page.evaluate("document.querySelector('bellhop-bell').getToken = null")
    expect(items).to_have_count(0)
    expect(page.locator("bellhop-bell .badge")).to_have_text("")


def test_no_style_leaks_into_the_widget_or_out_of_it(
    device: Devices, shop: Shop, service: Running, post: Post, api: httpx.Client
) -> None:
    token = api.post("/api/users/alice/token", json={"minutes": 5}).json()["token"]
    post(title="Mixed Case")
    reader = device(None)
    page = visit_shop(reader, shop, service, bell_of(token))
    page.locator("bellhop-bell .bell").click()
    title = page.locator("bellhop-bell li strong")
    expect(title).to_be_visible()
    expect(title).to_have_css("text-transform", "none")
    expect(title).not_to_have_css("color", "rgb(1, 2, 3)")
    expect(page.locator("#own")).to_have_css("color", "rgb(1, 2, 3)")
    expect(page.locator("#own")).to_have_css("position", "static")
    page.evaluate("document.body.style.setProperty('--bellhop-background', 'rgb(9, 9, 9)')")
    expect(page.locator("bellhop-bell .panel")).to_have_css("background-color", "rgb(9, 9, 9)")


def test_the_widget_asks_its_site_for_a_new_token_when_one_expires(
    device: Devices, shop: Shop, service: Running, post: Post, api: httpx.Client
) -> None:
    token = api.post("/api/users/alice/token", json={"minutes": 5}).json()["token"]
    post(title="Behind a callback")
    reader = device(None)
    script = f"""<script>
        const tokens = ["worthless", {json.dumps(token)}];
        const bell = document.querySelector("bellhop-bell");
        bell.getToken = async () => tokens.length > 1 ? tokens.shift() : tokens[0];
    </script>"""
    page = visit_shop(reader, shop, service, f"<bellhop-bell></bellhop-bell>{script}")
    expect(page.locator("bellhop-bell .badge")).to_have_text("1")


def test_the_widget_keeps_hostile_text_and_addresses_harmless(
    device: Devices, shop: Shop, service: Running, post: Post, api: httpx.Client, sql: Sql
) -> None:
    token = api.post("/api/users/alice/token", json={"minutes": 5}).json()["token"]
    sent = [post(title=text, body=text) for text in HOSTILE[:10]]
    sql("UPDATE notifications SET target_url = 'javascript:alert(1)'")
    reader = device(None)
    page = visit_shop(reader, shop, service, bell_of(token))
    page.locator("bellhop-bell .bell").click()
    expect(page.locator("bellhop-bell li")).to_have_count(10)
    shown = page.eval_on_selector(
        "bellhop-bell", "bell => [...bell.shadowRoot.querySelectorAll('li strong')].map(s => s.textContent)"
    )
    assert shown == [n["title"] for n in reversed(sent)]
    links = page.eval_on_selector(
        "bellhop-bell", "bell => [...bell.shadowRoot.querySelectorAll('li a')].map(a => a.protocol)"
    )
    assert set(links) == {"http:"}
    assert page.locator("html").get_attribute("data-broken") is None


# ── pictures for the README


SHOP_STYLE = "body { background: #e9eff4 } header { background: #fff } #own { padding: 24px }"
BUSY_HOUR = """
    INSERT INTO outbox
    SELECT (jsonb_populate_record(o, jsonb_build_object('id', gen_random_uuid(), 'state', 'sent',
            'finished_at', now() - make_interval(mins => m)))).*
    FROM outbox o, generate_series(0, 59) m,
         generate_series(0, (12 + 9 * sin(m / 6.0) + mod(m * 7, 5))::int) k"""
THEIR_DELIVERIES = """
    INSERT INTO deliveries
    SELECT (jsonb_populate_record(d, jsonb_build_object('id', gen_random_uuid(), 'target', o.id, 'status', 'sent',
            'sent_at', o.finished_at, 'message_id', o.id))).*
    FROM deliveries d, outbox o WHERE o.state = 'sent'"""


def test_pictures(
    device: Devices, shop: Shop, service: Running, post: Post, api: httpx.Client, sql: Sql, tmp_path: Path
) -> None:
    folder = Path(os.environ.get("PICTURES") or tmp_path)
    fail_a_delivery(post, api, sql)
    sql(BUSY_HOUR)
    sql(THEIR_DELIVERIES)
    sql("UPDATE notifications SET archived_at = now()")
    api.patch("/api/users/alice/preferences", json={"email_enabled": False})
    sent = fill_inbox(post)
    sql("UPDATE notifications SET read_at = now() WHERE id < %s", sent[5]["id"])
    for minutes, one in zip((9000, 2900, 1500, 300, 130, 14, 6, 1), sent, strict=True):
        sql(
            "UPDATE notifications SET created_at = now() - %s * interval '1 min' WHERE id = %s",
            minutes,
            one["id"],
        )
    api.patch("/api/users/alice/preferences", json={"email_enabled": True})
    for number in range(5):
        told = post(title=f"Comment {number}", severity="warning", batch_key="comments")
        sql("UPDATE notifications SET archived_at = now() WHERE id = %s", told["id"])
    hook = {"url": "https://hooks.example.com/in", "events": ["order.*"], "min_severity": "info"}
    api.post("/api/webhooks", json=hook)
    wide, tall = {"width": 1100, "height": 860}, {"width": 390, "height": 844}
    looks: dict[str, dict[str, Any]] = {
        "inbox-light": {"viewport": wide},
        "inbox-dark": {"viewport": wide, "color_scheme": "dark"},
        "inbox-phone": {"viewport": tall, "device_scale_factor": 2},
    }
    for name, options in looks.items():
        device(**options).open_live().screenshot(path=folder / f"{name}.png")
    device(admin=True, viewport=wide).open_live("/admin").screenshot(path=folder / "admin.png")
    token = api.post("/api/users/alice/token", json={"minutes": 5}).json()["token"]
    reader = device(None, viewport={"width": 760, "height": 560})
    page = visit_shop(reader, shop, service, bell_of(token), SHOP_STYLE)
    page.locator("bellhop-bell .bell").click()
    expect(page.locator("bellhop-bell li").first).to_be_visible()
    page.wait_for_timeout(400)  # the badge has popped up
    page.screenshot(path=folder / "widget.png")
