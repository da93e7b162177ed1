"""What one would write without Bellhop: a Litestar handler that runs two queries and returns dicts."""

import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from litestar import Litestar, get
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

PAGE = """SELECT id, user_id, event_name, title, body, summary, target_url, severity, data, idempotency_key,
                 batch_key, subject_key, read_at, archived_at, created_at, updated_at
          FROM notifications WHERE user_id = %s AND archived_at IS NULL ORDER BY id DESC LIMIT 30"""
COUNT = """SELECT count(*) AS unread_count
           FROM notifications WHERE user_id = %s AND read_at IS NULL AND archived_at IS NULL"""
OPTIONS = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
    os.environ["DATABASE_URL"], min_size=2, max_size=10, kwargs=OPTIONS, open=False
)


@get("/notifications/{user_id:str}")
async def list_notifications(user_id: str) -> dict[str, Any]:
    """30 rows and the count; anybody may ask for anybody's."""
    async with pool.connection() as connection:
        rows = await (await connection.execute(PAGE, [user_id])).fetchall()
        count = await (await connection.execute(COUNT, [user_id])).fetchall()
    return {"notifications": rows, **count[0]}


@contextlib.asynccontextmanager
async def lifespan(_: Litestar) -> AsyncIterator[None]:
    async with pool:
        yield


if __name__ == "__main__":
    app = Litestar([list_notifications], lifespan=[lifespan], logging_config=None, openapi_config=None)
    uvicorn.run(app, port=int(os.environ["BELLHOP_PORT"]), log_level="warning", access_log=False)
