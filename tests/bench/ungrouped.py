"""Bellhop without its group commit: every request runs the create statement by itself, at once."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import app


async def create_alone(intake: app.Intake, items: list[app.Item]) -> list[app.Result]:
    """What Intake.create would be if requests did not share."""
    rows = await intake.db.many("create_notifications", app.Result, items=app.encode(items))
    intake.stored(rows)
    return rows


if __name__ == "__main__":
    app.Intake.create = create_alone
    app.main()
