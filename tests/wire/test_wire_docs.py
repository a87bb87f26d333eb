"""docs/wire-format.md says what the code does, and the sans-I/O rooms import no I/O."""

from __future__ import annotations

import ast
import itertools
import json
import re
from pathlib import Path

import pytest

from kvtransport.wire import bodies
from kvtransport.wire.frames import DEFAULT_LIMITS, NO_TRANSFER, Flag, FrameType, Limits, pack_header, unpack_header
from kvtransport.wire.ranges import RangeSet
from kvtransport.wire.state import CONNECTION_TABLE, TRANSFER_TABLE, Role, TransferRole

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "wire-format.md").read_text()


def tables(first: str) -> list[list[list[str]]]:
    """All tables whose first heading is ``first``, as rows of cells, the headings included."""
    blocks = re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.MULTILINE)
    split = [[[c.strip() for c in line.strip("|\n").split("|")] for line in b.splitlines()] for b in blocks]
    return [[rows[0], *rows[2:]] for rows in split if rows[0][0] == first]


def transitions(table: list[list[str]], role: str) -> dict[tuple[str, str, str], str]:
    states = table[0][1:]
    return {
        (role, state, row[0]): state if cell == "=" else cell
        for row in table[1:]
        for state, cell in zip(states, row[1:], strict=True)
        if cell != "-"
    }


def test_state_tables():
    dialer, acceptor, sender, receiver = tables("event")
    plain = {tuple(map(str, key)): str(to) for key, to in CONNECTION_TABLE.items()}
    assert transitions(dialer, Role.DIAL) | transitions(acceptor, Role.ACCEPT) == plain
    plain = {tuple(map(str, key)): str(to) for key, to in TRANSFER_TABLE.items()}
    assert transitions(sender, TransferRole.SENDER) | transitions(receiver, TransferRole.RECEIVER) == plain


def test_type_table():
    (table,) = tables("type")
    assert {int(r[0]): r[1] for r in table[1:]} == {int(t): t.name for t in FrameType}
    for number, _, scope, body, limit in table[1:]:
        assert DEFAULT_LIMITS.by_type[int(number)] == int(limit)
        assert body.startswith("raw") or body == "none" or hasattr(bodies, body)
        length = 1 if body.startswith("raw") else 0
        accepted = []
        for transfer in (NO_TRANSFER, b"t" * 16):
            try:
                unpack_header(pack_header(int(number), transfer=transfer, length=length))
            except Exception:  # noqa: BLE001  (which error it is, test_wire_frames says)
                continue
            accepted.append(transfer != NO_TRANSFER)
        assert accepted == {"zeros": [False], "set": [True], "either": [False, True]}[scope]


def test_flag_table():
    (table,) = tables("bit")
    assert {r[1]: 1 << int(r[0]) for r in table[1:]} == {k: v for k, v in vars(Flag).items() if k.isupper()}


def test_header_table():
    (table,) = tables("offset")
    rows = [(int(r[0]), int(r[1])) for r in table[1:]]
    assert rows[0][0] == 0
    assert all(a + size == b for (a, size), (b, _) in itertools.pairwise(rows))
    assert sum(rows[-1]) == 64


def test_body_tables_name_every_key():
    for kind in (bodies.Hello, bodies.Open):
        section = PAGE.split(f"**{kind.__name__}**")[1].split("\n**")[0]
        named = {k.strip() for row in re.findall(r"^\| (.*?) \|", section, flags=re.MULTILINE) for k in row.split(",")}
        assert set(kind.__struct_fields__) <= named
    for kind in (bodies.Accept, bodies.Ack, bodies.Seal, bodies.Cancel, bodies.Error, bodies.Call, bodies.Reply):
        section = PAGE.split(f"**{kind.__name__}**")[1].split("\n\n")[0]
        for key in kind.__struct_fields__:
            assert f"`{key}`" in section, f"{kind.__name__}.{key}"


def test_hex_example_is_the_golden_vector():
    dump = re.search(r"```\n(0000 .*?)```", PAGE, flags=re.DOTALL).group(1)
    pieces = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)", dump, flags=re.MULTILINE)
    golden = json.loads(Path(__file__).with_name("golden.json").read_text())
    assert bytes.fromhex("".join(pieces)).hex() == golden["accept"]["hex"]


def test_bounds_table():
    assert f"| {bodies.MAX_RANGES} |" in PAGE
    assert f"| levels of lists and maps in CALL and REPLY | {bodies.MAX_DEPTH} |" in PAGE
    assert f"| lists and maps in one CALL or REPLY | {bodies.MAX_CONTAINERS} |" in PAGE
    assert f"| {RangeSet().max_ranges} by default |" in PAGE
    assert bodies.MAX_OFFSET == 2**63 - 1
    assert set(Limits.__dataclass_fields__) == {
        t.name.lower() for t in FrameType if t not in (FrameType.CREDIT, FrameType.PING)
    } | {"by_type"}


@pytest.mark.parametrize("room", ["wire", "flow"])
def test_sans_io_rooms_import_no_clock_no_chance_no_sockets(room):
    files = sorted((ROOT / "kvtransport" / room).rglob("*.py"))
    assert files
    banned = {"time", "random", "secrets", "socket", "asyncio", "selectors", "threading", "datetime", "os", "uvloop"}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inside = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
                module = ".".join([*inside, *([node.module] if node.module else [])])
                names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for name in names:
                assert name.split(".")[0] not in banned, f"{path.name} imports {name}"
                assert not name.startswith(("kvtransport.io", "kvpool")), f"{path.name} imports {name}"
