"""The README says what there is: settings, routes, codes, commands, figures; and its examples run."""

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from conftest import DEADLINE, Running, app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CHANGED_EACH_TIME = {"id", "created_at", "updated_at"}


def blocks(title: str) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks that follow a title."""
    return re.findall(r"```(\w+)\n(.*?)```", README.partition(title)[2], re.S)


def rows(title: str) -> list[list[str]]:
    """The cells of the first table that follows a title, without its head."""
    table = re.search(r"(?m)(?:^\|.*\n)+", README.partition(title)[2])
    return [re.split(r"(?<!\\)\|", line.strip("|")) for line in table[0].splitlines()[2:]] if table else []


def quoted(text: str) -> list[str]:
    """What stands between backquotes."""
    return re.findall(r"`([^`]+)`", text)


def served(service: Running) -> set[str]:
    """Every route of the service, as the README writes it."""
    return {
        f"{method} {re.sub(r':[a-z]+}', '}', route.path)}"
        for route in service.app.routes
        for method in getattr(route, "methods", ())
        if method not in ("OPTIONS", "HEAD")
    }


# ─── The first screen ───


def test_the_readme_is_short_and_begins_with_what_one_needs() -> None:
    assert len(README.splitlines()) <= 300
    places = [README.index(f"**{title}**") for title in ("Run it", "Send one", "Test it")]
    places += [README.index(f"## {title}") for title in ("Find your way", "The API", "Settings", "Figures")]
    assert places == sorted(places)
    assert len(re.findall(r"(?m)^- \*\*", README[: places[0]])) == 3, "three guarantees"


@pytest.mark.parametrize("title", ["Run it", "Test it"])
def test_each_command_is_one_line_whose_parts_are_there(title: str) -> None:
    language, text = blocks(f"**{title}**")[0]
    assert language == "sh" and text.count("\n") == 1
    steps = [shlex.split(step) for step in text.split(" && ")]
    assert steps[0] == ["python3", "-m", "venv", ".venv"]
    assert steps[1][0] == ".venv/bin/pip"
    assert steps[2][0] in (".venv/bin/bellhop", ".venv/bin/python")
    assert {"bellhop"} == {name for name in project()["scripts"] if steps[2][0].endswith((name, "python"))}


def project() -> dict[str, Any]:
    return msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["project"]


def test_the_first_block_is_the_run_command_and_it_comes_first() -> None:
    assert blocks("# Bellhop")[0] == blocks("**Run it**")[0]


def test_the_example_is_answered_as_shown(service: Running, make_key: Callable[[str], str]) -> None:
    (_, command), (language, shown) = blocks("**Send one**")[:2]
    assert language == "json" and command.count("\n") == 1
    here = command.replace("http://127.0.0.1:8000", service.url)
    environ = {"BELLHOP_API_KEY": make_key("send"), "PATH": "/usr/bin:/bin:/usr/local/bin"}
    told = subprocess.run(
        ["bash", "-c", here], env=environ, capture_output=True, timeout=DEADLINE, check=True
    )
    wanted, found = json.loads(shown), json.loads(told.stdout)
    for answer in (wanted, found):
        assert all(answer["notification"].pop(name) for name in CHANGED_EACH_TIME)
    assert found == wanted
    assert list(found["notification"]) == list(wanted["notification"])


def test_the_printed_first_curl_is_answered(service: Running, make_key: Callable[[str], str]) -> None:
    text = (ROOT / "templates" / "first_run.txt").read_text()
    printed = text.format(url=service.url, key=make_key("admin"), link="")
    [curl] = re.findall(r"(?m)^ *(curl .*)$", printed)
    told = subprocess.run(["bash", "-c", curl], capture_output=True, timeout=DEADLINE, check=True)
    assert json.loads(told.stdout)["notification"]["inserted"]


def test_the_intake_example_is_stored(service: Running, sql: Callable[..., Any]) -> None:
    from conftest import eventually

    [(_, statement)] = [block for block in blocks("### Inside your own transaction") if block[0] == "sql"]
    sql(statement.rstrip().rstrip(";"))
    [(user, title)] = eventually(lambda: sql("SELECT user_id, title FROM notifications"))
    assert (user, title) == ("me", "Your order left")
    assert sql("SELECT count(*) FROM intake") == [(0,)]


# ─── The tables ───


def test_every_setting_is_in_its_table_with_its_default() -> None:
    told = {
        name: default
        for variables, default, _ in ([cell.strip() for cell in row[1:4]] for row in padded("## Settings"))
        for name, default in zip(quoted(variables), spread(default, len(quoted(variables))), strict=True)
    }
    defaults, variables = app.Settings(), app.Settings.__struct_encode_fields__
    assert set(told) == set(variables)
    for name, variable in zip(app.Settings.__struct_fields__, variables, strict=True):
        value = getattr(defaults, name)
        if isinstance(value, bool | int | float) or name == "host":
            assert told[variable] == str(value).lower(), name


def padded(title: str) -> list[list[str]]:
    return [["", *row] for row in rows(title)]


def spread(default: str, count: int) -> list[str]:
    """One default a variable: as many as are quoted, or the same words for all."""
    found = quoted(default)
    return found if len(found) == count else [default] * count


def test_every_route_is_in_the_readme_and_no_other(service: Running) -> None:
    api = README.partition("## The API")[2].partition("### Errors")[0]
    told = set(re.findall(r"`((?:GET|POST|PUT|PATCH|DELETE) /[^`?]*)`", api))
    pages = {path for path in quoted(api.partition("**Pages**")[2].partition("\n\n")[0]) if path[0] == "/"}
    routes = served(service)
    shown = {route for route in routes if route.split()[1] in pages}
    assert told | shown == routes
    assert pages == {route.split()[1] for route in shown}


def test_every_error_code_is_in_its_table_with_its_status() -> None:
    told = {quoted(code)[0]: int(status) for code, status, _ in (row[:3] for row in rows("### Errors"))}
    assert told == {code: status for code, (status, _) in app.PROBLEMS.items()}


def test_every_command_and_option_is_in_its_table() -> None:
    told = README.partition("## Commands")[2].partition("\n## ")[0]
    for name in json.loads((ROOT / "templates" / "commands.json").read_text()):
        assert re.search(rf"`bellhop {name}\b", told), name
    usage = app.arguments().format_help()
    for name in re.findall(r"(?m)^    (\w+)  ", usage):
        assert f"bellhop {name}" in told, name
        for option in re.findall(r"--[a-z-]+", help_of(name)):
            assert option in told or option == "--help", option


def help_of(command: str) -> str:
    """The help of a command, and of those below it."""
    parser = app.arguments()
    texts = []
    for action in parser._actions:
        for name, below in (action.choices or {}).items() if isinstance(action.choices, dict) else ():
            if name == command:
                texts.append(below.format_help())
                texts += [
                    part.format_help()
                    for inner in below._actions
                    if isinstance(inner.choices, dict)
                    for part in inner.choices.values()
                ]
    return "\n".join(texts)


def test_every_top_entry_has_its_line() -> None:
    told = {name.strip("/") for row in rows("## Find your way") for name in quoted(row[0])}
    entries = {path.name for path in ROOT.iterdir()} & {
        "pyproject.toml", "app.py", "schema.sql", "queries", "templates", "tests", "LICENSE", "CHANGELOG.md", ".ci",
    }  # fmt: skip
    assert {name.split("/")[0] for name in told} == entries
    assert all((ROOT / name).exists() for name in told)


def test_every_metric_to_alert_on_exists(service: Running) -> None:
    told = set(re.findall(r"bellhop_\w+", README))
    known = set(re.findall(r"(?m)^# TYPE (\w+)", httpx.get(f"{service.url}/metrics").text))
    assert told and told <= known


def test_every_link_to_a_file_leads_somewhere_and_every_figure_is_filled_in() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    assert "FIGURE" not in README
    assert (ROOT / "tests" / "bench" / "run.py").exists() and "tests/bench/run.py" in README


def test_the_changelog_carries_the_version() -> None:
    versions = re.findall(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text())
    assert versions[0] == project()["version"]
