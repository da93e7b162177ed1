"""Real peers for tests: a mail server, a webhook sink and a push service, each in a thread of its own.

They listen on a free port of 127.0.0.1, do what a test has scripted, and keep what they were sent. What a
script does not mention succeeds. `close()` leaves no socket, task or thread behind.
"""

import abc
import asyncio
import base64
import collections
import contextlib
import datetime
import ipaddress
import json
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import aiohttp.web
import http_ece
import jwt
import uvloop
from aiosmtpd.smtp import MISSING, SMTP, AuthResult, Envelope, LoginPassword, Session
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app import Line, Outbound, Outcome, Outgoing

MARKER = "marker-of-what-stays-inside"  # in every body and data that `post` sends
HANG = "hang"  # answer nothing, keep the connection
DROP = "drop"  # close the connection without an answer
LOSE = "lose"  # take the mail, then close the connection before saying so
ENDLESS = "endless"  # answer 500 with a body that never ends


async def hang_up_on_everybody() -> None:
    """End what a client opened in the very moment in which a loop ends: Python would tell of a leak."""
    quiet = 0
    while quiet < 3:  # again and again: one that was just accepted is known a few turns later
        quiet += 1
        for transport in list(getattr(asyncio.get_running_loop(), "_transports", {}).values()):
            quiet = quiet if transport.is_closing() else 0
            transport.abort()
        await asyncio.sleep(0.005)


async def stop_listening(server: asyncio.Server) -> None:
    """Close it once whom it accepted is known: who is not would be dropped, and Python tell of a leak."""
    for listener in server.sockets:
        asyncio.get_running_loop().remove_reader(listener.fileno())
    await asyncio.sleep(0)
    server.close()


class Peer(abc.ABC):
    """A server in a thread of its own; what it saw may be read from the test's thread."""

    def __init__(self) -> None:
        self.host, self.port = "127.0.0.1", 0
        self.scripted: dict[str, collections.deque[Any]] = collections.defaultdict(collections.deque)
        self.standing: dict[str, Any] = {}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name=type(self).__name__)
        self.thread.start()
        self.up()

    def up(self) -> None:
        """Listen, after `down()` on the same port as before."""
        self.run(self.listen())

    def down(self) -> None:
        """Hang up on everybody and refuse connections."""
        self.run(self.silence())

    def close(self) -> None:
        """Go away without a trace."""
        self.down()
        self.run(self._cancel_tasks())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do something in the peer's own thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    async def _cancel_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await hang_up_on_everybody()

    def script(self, place: str, *answers: Any) -> None:
        """Give these answers there, one each time, then go on as usual."""
        self.scripted[place].extend(answers)

    def always(self, place: str, answer: Any = None) -> None:
        """Give this answer there whenever nothing is scripted; None goes back to success."""
        self.standing[place] = answer

    def next_answer(self, place: str) -> Any:
        """What was scripted there, or None."""
        queue = self.scripted[place]
        return queue.popleft() if queue else self.standing.get(place)

    @abc.abstractmethod
    async def listen(self) -> None:
        """Begin to answer."""

    @abc.abstractmethod
    async def silence(self) -> None:
        """Stop, and hang up on everybody."""


def wait_until(condition: Callable[[], Any], seconds: float = 5) -> Any:
    """The condition's value once it holds; AssertionError when it never does."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return value


def self_signed() -> tuple[bytes, bytes]:
    """A certificate for 127.0.0.1 and localhost, and its key, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return certificate.public_bytes(serialization.Encoding.PEM), private


def server_tls(certificate: bytes, key: bytes) -> ssl.SSLContext:
    """A server's side of TLS with this certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    with tempfile.TemporaryDirectory() as folder:
        chain = Path(folder) / "chain.pem"
        chain.write_bytes(certificate + key)
        context.load_cert_chain(chain)
    return context


# ─── Mail ───


@dataclass
class Letter:
    """One mail as it arrived."""

    sender: str
    recipients: list[str]
    raw: bytes
    user: str | None  # who was signed in
    encrypted: bool
    message: EmailMessage = field(init=False)

    def __post_init__(self) -> None:
        self.message = message_from_bytes(self.raw, policy=policy.default)

    @property
    def subject(self) -> str:
        return str(self.message["Subject"])

    @property
    def text(self) -> str:
        return self._part("plain")

    @property
    def html(self) -> str:
        return self._part("html")

    def _part(self, kind: str) -> str:
        part = self.message.get_body((kind,))
        assert part is not None, f"the mail has no {kind} part"
        return part.get_content().replace("\r\n", "\n")


class MailSession(SMTP):
    """An SMTP conversation whose greeting is scripted too and whose connection is known to its mailbox."""

    event_handler: "Mailbox"
    greeted = False

    def connection_made(self, transport: Any) -> None:
        self.event_handler.open.add(transport)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.event_handler.open.discard(self.transport)
        super().connection_lost(error)

    async def push(self, status: Any) -> None:
        if not self.greeted:
            self.greeted = True
            self.event_handler.connections += 1
            status = await self.event_handler.decide(self, "GREETING", status)
        await super().push(status)


class Mailbox(Peer):
    """An SMTP server. Places to script: GREETING, EHLO, MAIL, RCPT, DATA (after the text), RSET, with
    answers such as "451 4.3.0 later" or DROP, HANG, LOSE.

    `tls="starttls"` offers STARTTLS, `tls="implicit"` is smtps; with `login` (which needs one of them)
    nothing is taken from who is not signed in. `certificate` is what a client must trust.
    """

    def __init__(self, tls: str = "", login: tuple[str, str] | None = None) -> None:
        self.messages: list[Letter] = []
        self.connections = 0
        self.open: set[Any] = set()
        self.tls, self.login = tls, login
        self.certificate, key = self_signed() if tls else (b"", b"")
        self.context = server_tls(self.certificate, key) if tls else None
        super().__init__()

    @property
    def url(self) -> str:
        """What BELLHOP_SMTP_URL has to be."""
        user = ":".join(self.login) + "@" if self.login else ""
        return f"{'smtps' if self.tls == 'implicit' else 'smtp'}://{user}{self.host}:{self.port}"

    def wait(self, count: int, seconds: float = 5) -> list[Letter]:
        """The mails, once there are so many of them."""
        wait_until(lambda: len(self.messages) >= count, seconds)
        return self.messages

    async def listen(self) -> None:
        implicit = self.context if self.tls == "implicit" else None
        self.server = await self.loop.create_server(self.session, self.host, self.port, ssl=implicit)
        self.port = self.server.sockets[0].getsockname()[1]

    async def silence(self) -> None:
        await stop_listening(self.server)
        for transport in list(self.open):
            transport.abort()
        await self.server.wait_closed()
        await asyncio.sleep(0.01)

    def session(self) -> MailSession:
        """One conversation."""
        return MailSession(
            self,
            hostname="mailbox.test",
            enable_SMTPUTF8=False,
            tls_context=self.context if self.tls == "starttls" else None,
            auth_require_tls=self.tls != "implicit",
            authenticator=self.sign_in if self.login else None,
            loop=self.loop,
        )

    def sign_in(self, server: SMTP, session: Session, envelope: Envelope, way: str, data: Any) -> AuthResult:
        """Whether the client knows the login."""
        good = isinstance(data, LoginPassword) and (data.login.decode(), data.password.decode()) == self.login
        return AuthResult(success=good, auth_data=data, handled=False)

    async def decide(self, server: SMTP, place: str, usual: Any) -> Any:
        """The answer at a place; hanging and dropping never return."""
        answer = self.next_answer(place)
        if answer in (DROP, LOSE) and server.transport:
            server.transport.abort()
        if answer in (HANG, DROP, LOSE):
            await asyncio.sleep(3600)
        return usual if answer is None else answer

    async def handle_EHLO(
        self, server: SMTP, session: Session, envelope: Envelope, name: str, answers: list[str]
    ) -> list[str]:
        session.host_name = name
        answer = await self.decide(server, "EHLO", None)
        return answers if answer is None else [answer]

    async def handle_MAIL(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> Any:
        if self.login and not session.authenticated:
            return "530 5.7.0 Authentication required"
        return await self.decide(server, "MAIL", MISSING)

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> Any:
        return await self.decide(server, "RCPT", MISSING)

    async def handle_RSET(self, server: SMTP, session: Session, envelope: Envelope) -> Any:
        return await self.decide(server, "RSET", MISSING)

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        queue = self.scripted["DATA"]
        if (queue[0] if queue else self.standing.get("DATA")) in (None, LOSE):
            raw, user = bytes(envelope.original_content or b""), session.auth_data
            signed_in = user.login.decode() if isinstance(user, LoginPassword) else None
            encrypted = session.ssl is not None or self.tls == "implicit"
            sender = envelope.mail_from or ""
            self.messages.append(Letter(sender, list(envelope.rcpt_tos), raw, signed_in, encrypted))
        return await self.decide(server, "DATA", "250 2.0.0 taken")


# ─── Webhooks ───


@dataclass
class Hit:
    """One request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Hookbox(Peer):
    """An HTTP sink. Places to script are paths, with answers such as 503, (429, {"Retry-After": "7"}),
    (500, {}, "words") or DROP, HANG, ENDLESS."""

    usual = 200

    def __init__(self, tls: bool = False) -> None:
        self.requests: list[Hit] = []
        self.connections = 0
        self.endless_bytes = 0
        self.context = server_tls(*self_signed()) if tls else None
        super().__init__()

    @property
    def url(self) -> str:
        """Where it listens; any path may follow."""
        return f"{'https' if self.context else 'http'}://{self.host}:{self.port}"

    def wait(self, count: int, seconds: float = 5) -> list[Hit]:
        """The requests, once there are so many of them."""
        wait_until(lambda: len(self.requests) >= count, seconds)
        return self.requests

    async def listen(self) -> None:
        self.web = aiohttp.web.Server(self.handle, access_log=None, handler_cancellation=True)
        self.server = await self.loop.create_server(self.web, self.host, self.port, ssl=self.context)
        self.port = self.server.sockets[0].getsockname()[1]

    async def silence(self) -> None:
        await stop_listening(self.server)
        await self.web.shutdown(0.01)

    async def handle(self, request: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        """Keep the request, answer as scripted."""
        hit = Hit(request.method, request.path_qs, request.headers.copy(), await request.read())
        self.requests.append(hit)
        answer = self.next_answer(request.path)
        if answer == DROP and request.transport:
            request.transport.abort()
        if answer in (HANG, DROP):
            await asyncio.sleep(3600)
        if answer == ENDLESS:
            return await self.drone(request)
        parts = answer if isinstance(answer, tuple) else (answer,)
        status, headers, words = (*parts, *(None, {}, "")[len(parts) :])
        status = self.judge(hit, status or self.usual)
        return aiohttp.web.Response(status=status, headers=headers, text=words)

    def judge(self, hit: Hit, status: int) -> int:
        """The status in the end; a push service looks closer."""
        return status

    async def drone(self, request: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        """Send until the client has had enough."""
        answer = aiohttp.web.StreamResponse(status=500)
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await answer.write(b"no end in sight " * 4096)
                self.endless_bytes += 65_536
        return answer


# ─── Web Push ───


@dataclass
class Subscription:
    """A browser's subscription with both halves of its keys."""

    endpoint: str
    key: ec.EllipticCurvePrivateKey
    auth: bytes
    keys: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        form = serialization.PublicFormat.UncompressedPoint
        point = self.key.public_key().public_bytes(serialization.Encoding.X962, form)
        self.keys = {"p256dh": to_base64url(point), "auth": to_base64url(self.auth)}

    def to_json(self) -> dict[str, Any]:
        """What a browser's `PushSubscription.toJSON()` gives."""
        return {"endpoint": self.endpoint, "expirationTime": None, "keys": self.keys}

    def address(self) -> dict[str, str]:
        """What a claimed message of the push channel carries."""
        return {"endpoint": self.endpoint, **self.keys}


def to_base64url(data: bytes) -> str:
    """Base64 as browsers write it."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def from_base64url(text: str) -> bytes:
    """What was written so."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Pushbox(Hookbox):
    """A push service: it refuses with 403 what RFC 8292 does not allow and decrypts what it takes.

    `messages` are the decrypted payloads, `taken` the requests they came in, `faults` why some were refused.
    """

    usual = 201

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.taken: list[Hit] = []
        self.faults: list[str] = []
        self.subscriptions: dict[str, Subscription] = {}
        super().__init__()

    def subscription(self) -> Subscription:
        """A new browser."""
        path = f"/push/{len(self.subscriptions) + 1}"
        key = ec.generate_private_key(ec.SECP256R1())
        self.subscriptions[path] = Subscription(self.url + path, key, uuid4().bytes)
        return self.subscriptions[path]

    def judge(self, hit: Hit, status: int) -> int:
        if not 200 <= status < 300:
            return status
        try:
            self.check_vapid(hit)
            message = self.decrypt(hit)
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {error}")
            return 403
        self.taken.append(hit)
        self.messages.append(message)
        return status

    def check_vapid(self, hit: Hit) -> None:
        """Who sends must sign, for this origin, and for at most a day."""
        scheme, _, parameters = hit.headers["Authorization"].partition(" ")
        assert scheme == "vapid", f"the scheme is {scheme}"
        assert " " not in parameters, "a space after the comma, which some push services refuse"
        given = dict(part.split("=", 1) for part in parameters.split(","))
        point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), from_base64url(given["k"]))
        needed = {"require": ["aud", "exp", "sub"]}
        claims = jwt.decode(given["t"], point, algorithms=["ES256"], audience=self.url, options=needed)
        assert claims["exp"] - time.time() < 86_400, "the token is good for more than a day"
        assert claims["sub"].startswith(("mailto:", "https:", "http:")), f"the contact is {claims['sub']}"

    def decrypt(self, hit: Hit) -> dict[str, Any]:
        """What the browser would see."""
        assert hit.headers["Content-Encoding"] == "aes128gcm", "not RFC 8291"
        assert int(hit.headers["TTL"]) >= 0, "a negative TTL"
        assert len(hit.body) <= 4096, "more than every push service takes"
        reader = self.subscriptions[urlsplit(hit.path).path]
        text = http_ece.decrypt(
            hit.body, private_key=reader.key, auth_secret=reader.auth, version="aes128gcm"
        )
        return json.loads(text)


# ─── What a test sends to them ───

NOON = datetime.datetime(2026, 3, 4, 12, 0, tzinfo=datetime.UTC)


def outbound_settings(home: Path, **changes: Any) -> SimpleNamespace:
    """Settings as the channels read them, with loopback allowed."""
    usual = {
        "base_url": "https://bell.example.org",
        "secret": "a secret of at least thirty-two bytes",
        "home": str(home),
        "smtp_url": "",
        "mail_from": "Bellhop <bell@example.org>",
        "vapid_subject": "mailto:bell@example.org",
        "vapid_private_key": "",
        "outbound_allow": [ipaddress.ip_network("127.0.0.0/8")],
        "channel_timeout_seconds": 5.0,
    }
    return SimpleNamespace(**(usual | changes))


def line(text: str | None = "Invoice 42 is overdue", severity: str = "warning", **changes: Any) -> Line:
    """One notification as the outside may see it."""
    usual = {"id": uuid4(), "event_name": "invoice.overdue", "created_at": NOON}
    return Line(text=text, severity=severity, **(usual | changes))


def outgoing(channel: str, address: Mapping[str, Any], *lines: Line, **changes: Any) -> Outgoing:
    """A claimed message."""
    shown = list(lines) or [line()]
    usual = {
        "id": UUID("0190a000-0000-7000-8000-000000000001"),
        "claim_seq": 1,
        "user_id": "alice",
        "channel": channel,
        "provider": channel,
        "locale": "en",
        "created_at": NOON,
        "address": dict(address),
        "lines": shown,
        "total": len(shown),
        "newest_id": max(shown, key=lambda each: each.created_at).id,
        "folded": len(shown) > 1,
        "event_name": shown[0].event_name if len(shown) == 1 else None,
    }
    return Outgoing(**(usual | changes))


def deliver(settings: Any, *messages: Outgoing, trust: bytes = b"", together: bool = False) -> list[Outcome]:
    """What becomes of the messages, one after the other or all at once, on the server's kind of loop."""

    async def work() -> list[Outcome]:
        outbound = Outbound(settings)
        await outbound.open()
        if trust:
            outbound.tls.load_verify_locations(cadata=trust.decode())
        try:
            if together:
                return await asyncio.gather(*map(outbound.send, messages))
            return [await outbound.send(message) for message in messages]
        finally:
            await outbound.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work())


@contextlib.contextmanager
def running(peer: Any) -> Iterator[Any]:
    """The peer, closed in the end; whatever a test is about, no body may have reached it."""
    try:
        yield peer
    finally:
        peer.close()
    assert MARKER not in heard(peer)


def heard(peer: Any) -> str:
    """Everything that reached a peer, as sent and as its reader sees it."""
    told = [f"{hit.path} {hit.headers} {hit.body!r}" for hit in getattr(peer, "requests", [])]
    for message in getattr(peer, "messages", []):
        if isinstance(message, Letter):
            parts = [str(part.get_content()) for part in message.message.walk() if not part.is_multipart()]
            told += [repr(message.raw), str(message.message.items()), *parts]
        else:
            told.append(json.dumps(message))
    return "\n".join(told)
