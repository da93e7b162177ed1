"""Bellhop without its group commit: every request runs the create statement by itself, at once."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import app


async def ask_alone(shared: app.Shared, items: list[Any]) -> list[Any]:
    """What Shared.ask would be if requests did not share."""
    rows = await shared.db.many(shared.name, shared.kind, items=app.encode(items))
    shared.after(rows)
    return rows


if __name__ == "__main__":
    app.Shared.ask = ask_alone
    app.main()
