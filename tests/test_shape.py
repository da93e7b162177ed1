"""The shape of the code: sizes, order, what may stand where. Each rule is shown to catch a violation."""

import ast
import fnmatch
import functools
import io
import itertools
import re
import statistics
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from conftest import app

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "app.py").read_text()
SCHEMA = (ROOT / "schema.sql").read_text()
QUERIES = {path.stem: path.read_text() for path in sorted((ROOT / "queries").glob("*.sql"))}
Faults = list[str]
Function = ast.FunctionDef | ast.AsyncFunctionDef

# The aim for the file is 1,500 lines; until it is reached, this bound may only be lowered.
FILE_LINES, FUNCTION_LINES, MEDIAN_LINES, LINE_COLUMNS = 2390, 40, 8, 110
DB_VERBS = ("one", "maybe", "many", "run")
VERBS = "create|get|list|count|update|delete|claim|finish|retry|release|prune|record"
ENTRIES = {
    "pyproject.toml", "app.py", "schema.sql", "queries", "templates", "tests", "README.md",
    "LICENSE", "CHANGELOG.md", ".gitignore", ".ci",
}  # fmt: skip
USER_TABLES = {
    "notifications", "inbox", "notification_preferences", "quiet_users", "push_subscriptions", "outbox",
    "deliveries", "rate_limits", "suppressions",
}  # fmt: skip
# Where rows of all users are meant; every other statement compares user_id wherever it touches them.
FOR_EVERYBODY = {
    ("claim_messages", "outbox"): "the worker takes what is due, whose it may be",
    ("create_push_subscription", "push_subscriptions"): "takes a browser from the reader it had before",
    ("finish_messages", "outbox"): "a provider's pause gives its faults back to all who wait for it",
    ("get_stats", "deliveries"): "counts for admins, of nobody in particular",
    ("get_stats", "outbox"): "counts for admins, of nobody in particular",
    ("list_gauges", "deliveries"): "counts for operators, of nobody in particular",
    ("list_gauges", "outbox"): "counts for operators, of nobody in particular",
    ("prune_deliveries", "deliveries"): "retention is by age",
    ("prune_messages", "outbox"): "retention is by age",
    ("prune_notifications", "notifications"): "retention is by age",
    ("prune_rate_limits", "outbox"): "looks whether anybody waits for a provider",
    ("prune_rate_limits", "rate_limits"): "retention is by age",
    ("retry_deliveries", "deliveries"): "the admin's button for all that failed",
    ("retry_delivery", "deliveries"): "the admin names a delivery, not a user",
    ("update_due_messages", "outbox"): "the worker looks at what is due, whose it may be",
    ("update_resolved_notifications", "notifications"): "a subject is settled for every user at once",
}


# ─── Rules about app.py: each takes the source and gives what is wrong with it ───


def wrong_contents(source: str) -> Faults:
    """The docstring's contents are the banners, numbered without a gap, in one form."""
    told = (ast.get_docstring(ast.parse(source)) or "").partition("Contents\n")[2]
    contents = re.findall(r"(\d+) ([A-Z][\w ]*\w)", told)
    banners = re.findall(r"^# ═══ (\d+) · (.+?) ═+$", source, re.M)
    faults = [] if contents == banners else [f"contents {contents} but banners {banners}"]
    if [int(number) for number, _ in banners] != list(range(1, len(banners) + 1)) or not banners:
        faults.append("the banners are not numbered one by one")
    odd = len(re.findall(r"^# ═", source, re.M)) - len(banners)
    return faults + ([f"{odd} banners of another form"] if odd else [])


def too_many_lines(source: str) -> Faults:
    """One file can be kept in mind only while it is short."""
    count = len(source.splitlines())
    return [f"{count} lines, at most {FILE_LINES}"] if count > FILE_LINES else []


def functions(source: str) -> Iterator[tuple[Function, int]]:
    """Every function with its number of lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            yield node, (node.end_lineno or 0) - node.lineno + 1


def long_functions(source: str) -> Faults:
    """At most FUNCTION_LINES each, and half of them at most MEDIAN_LINES."""
    sizes = [(node.name, lines) for node, lines in functions(source)]
    faults = [f"{name} has {lines} lines" for name, lines in sizes if lines > FUNCTION_LINES]
    median = statistics.median([lines for _, lines in sizes] or [0])
    return faults + ([f"the median function has {median} lines"] if median > MEDIAN_LINES else [])


def wide_lines(source: str) -> Faults:
    lines = enumerate(source.splitlines(), 1)
    return [f"line {number} has {len(line)} columns" for number, line in lines if len(line) > LINE_COLUMNS]


def joined_statements(source: str) -> Faults:
    """One statement a line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [f"line {token.start[0]} joins statements" for token in tokens if token.string == ";"]


def strings(source: str) -> Iterator[ast.Constant]:
    """Every string that is not a docstring, the parts of f-strings and byte strings included."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, *Function.__args__)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
        if is_text and id(node) not in docstrings:
            yield cast("ast.Constant", node)


def text_of(node: ast.Constant) -> str:
    return node.value.decode("latin-1") if isinstance(node.value, bytes) else str(node.value)


def sql_in_python(source: str) -> Faults:
    """SQL lives in files; the name of an HTTP method is no SQL."""
    begins = r"\b(?:SELECT|INSERT|UPDATE|DELETE)\s+\S"
    whole = r"(?i:\bselect\s.+\sfrom\s|\binsert\s+into\b|\bupdate\s+\w+\s+set\b|\bdelete\s+from\b)"
    found = [node for node in strings(source) if re.search(f"{begins}|{whole}", text_of(node), re.S)]
    return [f"line {node.lineno} holds SQL: {text_of(node)[:40]!r}" for node in found]


def unused_queries(source: str) -> Faults:
    """Every file of queries/ is named in the code, alone or in a list of words."""
    named = {word for node in strings(source) for word in text_of(node).split()}
    return [f"queries/{name}.sql is not used" for name in QUERIES if name not in named]


def parameters_of(query: str) -> set[str]:
    return set(re.findall(r"%\((\w+)\)s", query))


@functools.cache
def bound_parameters() -> set[str]:
    """What the code fills in by itself: the service's figures, and for each request who is asking."""
    settings = app.load_settings({"DATABASE_URL": "nowhere", "BELLHOP_SECRET": "s" * 32})
    bound = {"user_id", *app.create_app(settings).state.service.db.bound}
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "bind":
            bound |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return bound


def calls(source: str) -> Iterator[tuple[int, str, set[str], bool]]:
    """Line, query and keywords of every call of a Db verb, and whether it has more that cannot be read."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(ast.Attribute(attr=verb), [ast.Constant(str(name)), *_]) if verb in DB_VERBS:
                given = {keyword.arg for keyword in node.keywords}
                yield node.lineno, name, {each for each in given if each}, None in given
            case ast.Call(ast.Name("Route"), [_, path, _, ast.Call(ast.Name("sql"), [name, *_]), *rest]):
                query = ast.literal_eval(name)  # path and body are the parameters
                yield node.lineno, query, path_parameters(path) | body_parameters(query, rest), False


def path_parameters(path: ast.expr) -> set[str]:
    """What stands in braces in a path, be it written out or made of a constant."""
    told = re.sub(r"\{?\b([A-Z]+)\b\}?", lambda found: getattr(app, found[1], found[0]), ast.unparse(path))
    return set(re.findall(r"\{(\w+):", told))


def body_parameters(query: str, rest: list[ast.expr]) -> set[str]:
    """The fields of a row's body, or the whole of it where a statement merges it."""
    body = getattr(app, ast.unparse(rest[0]), None) if rest else None
    wanted = parameters_of(QUERIES.get(query, ""))
    fields = {"patch"} if body and "patch" in wanted else set(getattr(body, "__struct_fields__", ()))
    return fields | wanted & {"secret"}  # which is made for it


def wrong_parameters(source: str) -> Faults:
    """Every parameter is passed or bound, and no other: psycopg says nothing about one too many."""
    faults, bound = [], bound_parameters()
    for line, name, given, more in calls(source):
        wanted = parameters_of(QUERIES.get(name, ""))
        unknown, missing = given - wanted, set() if more else wanted - given - bound
        if name not in QUERIES or unknown or missing:
            faults.append(f"line {line}: {name} misses {sorted(missing)}, does not know {sorted(unknown)}")
    return faults


def unread_settings(source: str) -> Faults:
    """Every field of Settings is read somewhere, by name or as one of a family such as *_per_minute."""
    block = re.search(r"^class Settings\b.*?(?=^\S)", source, re.M | re.S)
    fields = re.findall(r"^    (\w+): ", block[0], re.M) if block else []
    read = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    families = [text_of(node) for node in strings(source) if text_of(node).startswith("_")]
    unread = [name for name in fields if name not in read and not name.endswith(tuple(families))]
    return [f"the setting {name} is never read" for name in unread] if fields else ["there are no settings"]


# ─── Rules about one query: its name and its text ───


def bare(sql: str) -> str:
    """SQL without its comments, its texts and its line breaks."""
    spoken = re.compile(r"--[^\n]*|'(?:[^']|'')*'")
    return re.sub(r"\s+", " ", spoken.sub(lambda found: "''" if found[0][0] == "'" else "", sql))


def wrong_name(name: str, text: str) -> Faults:
    return [] if re.fullmatch(rf"({VERBS})(_[a-z]+)+", name) else [f"{name} begins with no known verb"]


def wrong_header(name: str, text: str) -> Faults:
    """One to three lines of comment that say what it does."""
    count = len(list(itertools.takewhile(lambda line: line.startswith("-- "), text.splitlines())))
    return [] if 1 <= count <= 3 else [f"{name} has {count} header lines"]


def many_statements(name: str, text: str) -> Faults:
    return [f"{name} has a semicolon"] if ";" in bare(text) else []


def selected_star(name: str, text: str) -> Faults:
    """Columns are named, so that a new one never slips into an answer."""
    sql, inner = "", bare(text)
    while sql != inner:  # once more without the innermost parentheses, for DISTINCT ON (coalesce(a, b)) *
        sql, inner = inner, re.sub(r" ?\([^()]*\)", "", inner)
        if re.search(r"(?i)\bSELECT (?:DISTINCT (?:ON )?)?\*", sql):
            return [f"{name} selects *"]
    return []


def uncast_parameters(name: str, text: str) -> Faults:
    """NULL may arrive everywhere: PostgreSQL must not have to guess a type."""
    return [f"{name} does not cast {found}" for found in re.findall(r"%\((\w+)\)s(?!::)", text)]


def uncommented_parts(name: str, text: str) -> Faults:
    """A statement of more than 60 lines says of each of its parts what it holds."""
    begins, lines = re.compile(r"(?:WITH (?:RECURSIVE )?)?(\w+) AS (?:MATERIALIZED )?\("), text.splitlines()
    parts = [(i, found[1]) for i, line in enumerate(lines) if (found := begins.match(line))]
    silent = [part for i, part in parts if "--" not in lines[i - 1] + lines[i] + lines[i + 1]]
    return [f"{name} has no comment for {silent}"] if len(lines) > 60 and silent else []


def statements(sql: str) -> Iterator[str]:
    """Every SELECT, INSERT, UPDATE and DELETE by itself; in place of those inside it stands ()."""
    open_parts = [""]
    for piece in re.split(r"([()])", bare(sql)):
        if piece == "(":
            open_parts.append("")
        elif piece == ")":
            part = open_parts.pop()
            inner = re.match(r" ?(SELECT|INSERT|UPDATE|DELETE|WITH)\b", part)
            if inner:
                yield from re.split(r"\bUNION(?: ALL)?\b", part)
            open_parts[-1] += "()" if inner else f"({part})"
        else:
            open_parts[-1] += piece
    yield from re.split(r"\bUNION(?: ALL)?\b", open_parts[0])


def ownerless_tables(name: str, text: str) -> set[tuple[str, str]]:
    """Query and table wherever a user's rows are touched without a word about whose."""
    found = set[tuple[str, str]]()
    for statement in statements(text):
        target = re.search(r"\bINSERT INTO (\w+)(?: AS \w+)? \( ?(\w+)", statement)
        for table in re.findall(r"(?:\b(?:FROM|JOIN|UPDATE|USING|INTO)|, (?=\w+ \w+\b)) ?(\w+)", statement):
            if table not in USER_TABLES or f"DO UPDATE {table}" in statement:
                continue
            if target and target[1] == table:
                conflict = re.search(r"\bON CONFLICT \((\w+)", statement)
                owned = target[2] == "user_id" and (conflict is None or conflict[1] == "user_id")
            else:
                conditions = " ".join(re.split(r"\b(?:WHERE|ON)\b", statement)[1:])
                owned = re.search(r"\buser_id = |= \w*\.?user_id\b|\(\w*\.?user_id[^()]*\) IN", conditions)
            if not owned:
                found.add((name, table))
    return found


def ownerless(name: str, text: str) -> Faults:
    """user_id is in the WHERE, or in the join, of everything that touches a user's rows."""
    found = ownerless_tables(name, text) - FOR_EVERYBODY.keys()
    return [f"{query} does not say whose {table} it means" for query, table in sorted(found)]


# ─── Rules about schema.sql and the checkout ───


def useless_indexes(schema: str) -> Faults:
    """Every index ends with the queries it serves, and they exist."""
    faults = []
    for part in re.split(r"(?m)^CREATE (?:UNIQUE )?INDEX (?:IF NOT EXISTS )?", schema)[1:]:
        if not re.match(r"[^;]*;\s*-- serves: \w", part):
            faults.append(f"the index {part.split()[0]} does not say what it serves")
    for told in re.findall(r"-- serves: (.+)", schema):
        names = re.sub(r"\(.*?\)|\?[^,]*", "", told).split(",")
        faults += [f"{name.strip()} is no query" for name in names if name.strip() not in QUERIES]
    return faults


def stray_entries(names: set[str], ignored: str) -> Faults:
    """Nothing at the top but what the design names; what .gitignore names is not there."""
    patterns = [line.rstrip("/") for line in ignored.splitlines() if line]
    strays = {name for name in names - ENTRIES if not any(fnmatch.fnmatch(name, each) for each in patterns)}
    return [f"{name} does not belong at the top" for name in sorted(strays)]


# ─── The code keeps to the rules ───

ABOUT_SOURCE = [
    wrong_contents, too_many_lines, long_functions, wide_lines, joined_statements, sql_in_python,
    unused_queries, wrong_parameters, unread_settings,
]  # fmt: skip
ABOUT_QUERY = [
    wrong_name, wrong_header, many_statements, selected_star, uncast_parameters, uncommented_parts, ownerless,
]  # fmt: skip


@pytest.mark.parametrize("rule", ABOUT_SOURCE)
def test_app_keeps_to_the_rule(rule: Callable[[str], Faults]) -> None:
    assert rule(SOURCE) == []


@pytest.mark.parametrize("rule", ABOUT_QUERY)
def test_every_query_keeps_to_the_rule(rule: Callable[[str, str], Faults]) -> None:
    assert [fault for name, text in QUERIES.items() for fault in rule(name, text)] == []


def test_every_exception_from_the_owner_rule_is_needed() -> None:
    found = {each for name, text in QUERIES.items() for each in ownerless_tables(name, text)}
    assert FOR_EVERYBODY.keys() - found == set()


def test_every_index_serves_a_query() -> None:
    assert useless_indexes(SCHEMA) == []


def test_nothing_stands_at_the_top_that_does_not_belong_there() -> None:
    names = {path.name for path in ROOT.iterdir()} - {".git"}
    assert stray_entries(names, (ROOT / ".gitignore").read_text()) == []
    assert ENTRIES - names == set()


# ─── The rules can fail: a good source, and a violation of each ───

GOOD = '''"""A service.

Contents
1 Settings · 2 Types (of the outside)
3 Queries
"""
# ═══ 1 · Settings ═══════════
class Settings:
    port: int = 1
# ═══ 2 · Types ══════════════
def short(settings):
    """SELECT what FROM where is only said here."""
    return settings.port, "DELETE", "/api/x"
# ═══ 3 · Queries ════════════
'''
LONG = "def long():\n" + "    pass\n" * FUNCTION_LINES
MIDDLING = "".join(f"def middling{number}():\n" + "    pass\n" * MEDIAN_LINES for number in range(3))
BAD_SOURCES = [
    (wrong_contents, GOOD.replace("2 Types", "2 Kinds")),
    (wrong_contents, GOOD.replace("3 Queries\n", "")),
    (wrong_contents, GOOD.replace("1 Settings · 2 Types", "2 Types · 1 Settings")),
    (wrong_contents, GOOD.replace("3 Queries", "4 Queries").replace("3 · Queries", "4 · Queries")),
    (wrong_contents, GOOD + "# ═══ Helpers ═══\n"),
    (too_many_lines, GOOD + "\n" * FILE_LINES),
    (long_functions, GOOD + LONG),
    (long_functions, MIDDLING),
    (wide_lines, GOOD + "#" * (LINE_COLUMNS + 1)),
    (joined_statements, GOOD + "a = 1; b = 2\n"),
    (sql_in_python, GOOD + "a = 'SELECT 1'\n"),
    (sql_in_python, GOOD + "a = f'insert into {a} values (1)'\n"),
    (sql_in_python, GOOD + "a = b'with x as (select a from b) table x'\n"),
    (sql_in_python, GOOD + "a = 'UPDATE outbox'\n"),
    (unused_queries, GOOD),
    (wrong_parameters, GOOD + "db.one('get_no_such_thing')\n"),
    (wrong_parameters, GOOD + "db.one('get_notification', no_target=1, for_admin=1)\n"),
    (wrong_parameters, GOOD + "db.one('get_unread_count', nonsense=1)\n"),
    (wrong_parameters, GOOD + "ROWS = [Route('GET', '/api/n', 'user', sql('get_webhook'))]\n"),
    (
        wrong_parameters,
        GOOD + "ROWS = [Route('PATCH', '/api/n/{id:uuid}', 'user', sql('update_notification'), Subject)]\n",
    ),
    (unread_settings, GOOD.replace("settings.port", "settings")),
]
FINE = "-- Says what it does.\nSELECT read_at FROM notifications n WHERE n.user_id = %(user_id)s::text"
PART = "held AS (\nSELECT 1\n),\n"
BAD_QUERIES = [
    (wrong_name, "fetch_notification", FINE),
    (wrong_name, "get", FINE),
    (wrong_header, "get_x", FINE.replace("-- Says what it does.\n", "")),
    (wrong_header, "get_x", "-- One.\n" * 3 + FINE),
    (many_statements, "get_x", FINE + ";"),
    (many_statements, "get_x", FINE + "; SELECT 1"),
    (selected_star, "get_x", FINE.replace("read_at", "*")),
    (selected_star, "get_x", FINE.replace("read_at", "DISTINCT ON (n.id, coalesce(n.read_at, now())) *")),
    (uncast_parameters, "get_x", FINE.replace("::text", "")),
    (uncommented_parts, "get_x", FINE.replace("SELECT", f"WITH {PART * 21}x AS (\nSELECT 1\n)\nSELECT")),
    (ownerless, "get_x", FINE.replace(" WHERE n.user_id = %(user_id)s::text", "")),
    (ownerless, "get_x", FINE.replace("n.user_id = %(user_id)s::text", "id = %(id)s::uuid")),
    (ownerless, "get_x", FINE + " AND EXISTS (SELECT FROM deliveries d WHERE d.status = 'sent')"),
    (ownerless, "get_x", FINE + " UNION ALL SELECT id FROM outbox"),
    (ownerless, "get_x", FINE + " AND EXISTS (SELECT FROM notifications n, outbox o WHERE n.id = o.id)"),
    (ownerless, "get_x", "-- Joins.\nSELECT o.id FROM outbox o JOIN deliveries d ON d.message_id = o.id"),
    (ownerless, "delete_x", "-- Deletes.\nDELETE FROM outbox WHERE id = %(id)s::uuid -- user_id = 1"),
    (ownerless, "update_x", "-- Updates.\nUPDATE outbox SET user_id = '' WHERE id = %(id)s::uuid"),
    (ownerless, "create_x", "-- Adds.\nINSERT INTO outbox (id, user_id) VALUES (1, 2)"),
    (
        ownerless,
        "create_x",
        "-- Adds.\nINSERT INTO outbox (user_id, id) SELECT 1, 2 ON CONFLICT (id) DO NOTHING",
    ),
]
INDEX = "CREATE INDEX IF NOT EXISTS a ON outbox (user_id)\n    WHERE state = 'open';"
BAD_SCHEMAS = [INDEX + "\n", INDEX + "\n    -- serves: get_no_such_thing\n", INDEX + "\n-- useful\n"]


@pytest.mark.parametrize(("rule", "source"), BAD_SOURCES)
def test_a_rule_about_the_source_can_fail(rule: Callable[[str], Faults], source: str) -> None:
    assert rule is unused_queries or rule(GOOD) == []
    assert rule(source)


@pytest.mark.parametrize(("rule", "name", "text"), BAD_QUERIES)
def test_a_rule_about_queries_can_fail(rule: Callable[[str, str], Faults], name: str, text: str) -> None:
    assert rule("get_x", FINE) == []
    assert rule(name, text)


@pytest.mark.parametrize("schema", BAD_SCHEMAS)
def test_the_rule_about_indexes_can_fail(schema: str) -> None:
    assert useless_indexes(INDEX + "\n    -- serves: get_stats (counts), list_notifications?unread=1\n") == []
    assert useless_indexes(INDEX + "  -- serves: list_outbox\n" + schema)


def test_the_rule_about_the_top_can_fail() -> None:
    assert stray_entries({*ENTRIES, "build", "bellhop.egg-info"}, "build/\n*.egg-info/\n") == []
    assert stray_entries({*ENTRIES, "helpers.py"}, "build/\n") == ["helpers.py does not belong at the top"]
