"""Messages through the worker with a channel that does nothing, beside PgQueuer with a job that does nothing.

Both on the same PostgreSQL in the same run, one process each in turn: claimed and finished in the database.
How fast the machine is tells pgbench, which inserts bare notifications there in between. Exit code 1 when one
of the two promises is not kept; that of a number a second depends on the machine as well.
    .venv/bin/pip install -q pgqueuer && .venv/bin/python tests/bench/messages.py
"""

import asyncio
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psycopg
import run as bench
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import PsycopgDriver
from pgqueuer.queries import Queries
from psycopg.types.json import set_json_loads

import app

MESSAGES, ROUNDS = int(os.environ.get("MESSAGES", "30000")), 3
PROMISED = 30_000  # a second, on two cores
AT_ONCE = 4000
SENT = """
    SELECT count(*) FROM deliveries d JOIN outbox o ON o.user_id = d.user_id AND o.id = d.message_id
    WHERE d.status = 'sent' AND o.state = 'sent'"""
SECRET = "a secret that is only good for benches, 32 bytes or more"


async def nothing(_: app.Outgoing) -> app.Outcome:
    return app.Outcome("sent")


async def with_bellhop(url: str, home: str) -> float:
    """Seconds for the worker to claim and finish all messages, each with its look at the notification."""
    settings = app.load_settings({
        "DATABASE_URL": url, "BELLHOP_HOME": home, "BELLHOP_SECRET": SECRET, "BELLHOP_EMAIL_PER_MINUTE": "0",
        "BELLHOP_DELIVERY_CONCURRENCY": str(AT_ONCE), "BELLHOP_SMTP_URL": "smtp://127.0.0.1:1",
        "BELLHOP_MAIL_FROM": "bellhop@example.org",
    })  # fmt: skip
    await app.prepare(settings)
    service = app.Service(settings)
    await service.pool.open(wait=True)
    storing, sending = app.Loops(), app.Loops()
    storing.start({"create": service.intake.run})
    async with await app.connect(url) as connection:
        await connection.execute(
            "INSERT INTO notification_preferences (user_id, email, email_enabled)"
            f" SELECT 'user-' || n, 'a@example.org', true FROM generate_series(1, {MESSAGES}) AS n"
        )
        asked = app.NotificationCreate(event_name="bench", title="A title", body="A body", severity="warning")
        for first in range(1, MESSAGES + 1, 500):
            await service.intake.ask([app.make_item(f"user-{first + n}", asked) for n in range(500)])
        await connection.execute("ANALYZE")
        gc.collect()
        gc.freeze()  # as `bellhop serve` does
        written = app.METRICS["messages"].labels("email", "sent", "sent")
        goal = written._value.get() + MESSAGES
        worker, started = service.worker, time.perf_counter()
        service.outbound.send = nothing
        sending.start({"claim": worker.claim_turn, "finish": worker.finish_turn})
        # Counted after the COMMIT of each finish; asking the database all the time would take a core from it.
        while written._value.get() < goal:
            await asyncio.sleep(0.005)
        seconds = time.perf_counter() - started
        sent = await (await connection.execute(SENT)).fetchone()
        assert sent == (MESSAGES,), f"{sent} of {MESSAGES} sent"
    for loops in (sending, storing):
        await loops.stop()
    await service.pool.close()
    return seconds


async def with_pgqueuer(url: str) -> float:
    """Seconds for PgQueuer to claim and finish as many jobs."""
    connection = await psycopg.AsyncConnection.connect(url, autocommit=True)
    set_json_loads(json.loads, connection)  # the service reads JSON its own way
    driver = PsycopgDriver(connection)
    queries = Queries(driver)
    await queries.install()
    for _ in range(0, MESSAGES, 1000):
        await queries.enqueue(["nothing"] * 1000, [None] * 1000, [0] * 1000)
    await connection.execute("ANALYZE")
    queue, done = PgQueuer(driver), 0
    started = time.perf_counter()

    @queue.entrypoint("nothing")
    async def work(_: object) -> None:
        nonlocal done
        done += 1
        if done == MESSAGES:
            queue.shutdown.set()

    await queue.run(batch_size=1000)
    seconds = time.perf_counter() - started
    assert done == MESSAGES
    await connection.close()
    return seconds


def one_round() -> tuple[float, float, float]:
    """Messages, jobs and bare inserts a second, on a server of their own."""
    with tempfile.TemporaryDirectory(prefix="bellhop-bench-") as home:
        Path(home).chmod(0o755)
        with app.embedded_postgres(Path(home) / "data") as url:
            ours = MESSAGES / uvloop.run(with_bellhop(url, home))
            inserts = bench.pgbench(url)
            return ours, MESSAGES / uvloop.run(with_pgqueuer(url)), inserts


def main() -> None:
    report = bench.Report()
    ours, jobs, inserts = map(statistics.median, zip(*(one_round() for _ in range(ROUNDS)), strict=True))
    report.show("messages claimed, looked at and finished", ours, "/s")
    report.show("jobs of PgQueuer", jobs, "/s")
    report.show(
        "the bare insert by pgbench, 64 connections",
        inserts,
        "/s",
        f"a message is {inserts / ours:.2f} of one",
    )
    report.promise(f"at least 1.5 of PgQueuer: {ours / jobs:.2f}", ours >= 1.5 * jobs)
    report.promise(f"at least {PROMISED:,} a second: {ours:,.0f}", ours >= PROMISED)
    sys.exit(bool(report.broken))


if __name__ == "__main__":
    main()
