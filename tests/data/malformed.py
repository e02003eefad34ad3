"""About 580 files of data, most of them damaged, with the rows that can be used and those that cannot.

Row 1 and the last row of a file are good unless the case says otherwise, so that a damaged row must neither
hide the ones around it nor shift their numbers.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from random import Random
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from tests.data.rows import pair, ranked


@dataclass(frozen=True)
class DataCase:
    """A file.

    Attributes:
        name: Name of the case.
        file: Name of the file.
        content: Its bytes.
        good: Numbers of the rows that can be used; None if that is not known.
        bad: Numbers of those that cannot, 0 for the file itself; None if that is not known.
        says: Part of what must be said of the first of these.
        damaged: Whether the rest of the file cannot be read.
    """

    name: str
    file: str | bytes
    content: bytes
    good: Sequence[int] | None
    bad: Sequence[int] | None = ()
    says: str = ""
    damaged: bool = False


FIRST, LAST = pair(prompt="What is 2 + 2?"), pair(prompt="Hi")  # `split` puts them on different sides
GOOD, END = json.dumps(FIRST).encode(), json.dumps(LAST).encode()
LIMIT_MB = 1.0


# A row that is no row, in its place between two good ones.
def _wrong_fields() -> Iterator[tuple[str, dict[str, Any], str]]:
    for name in ("prompt", "reference", "chosen", "rejected"):
        texts: list[tuple[str, Any, str]] = [
            ("null", None, "is null — must be a string"),
            ("number", 7, "is the number 7"),
            ("true", True, "is true"),
            ("object", {"text": "x"}, "is an object with 'text'"),
            ("numbers", [1], "is the number 1 — must be an object"),
            ("no content", [{"role": "user"}], "content: is missing"),
            ("no role", [{"content": "x"}], "role: is missing"),
            ("number as content", [{"role": "user", "content": 1}], "[0].content: is the number 1"),
            ("half a character", "x\ud83d", "half of a surrogate pair"),
            ("half in a message", [{"role": "user", "content": "\udc00"}], "half of a surrogate pair"),
            ("ESC in a key", [{"\x1b[2J": "user", "content": ""}], "role: is missing"),
        ]
        for kind, value, says in texts:
            yield f"{name} {kind}", pair(**{name: value}), says
        yield f"{name} missing", {k: v for k, v in pair().items() if k != name}, f"{name}: is missing"
    for name, value, says in (
        ("weight", 0, "must be greater than 0"),
        ("weight", -1.5, "must be greater than 0"),
        ("weight", "1", "must be a number"),
        ("weight", float("nan"), "weight"),
        ("margin", float("inf"), "must be a finite number"),
        ("margin", "big", "must be a number"),
        ("wrapper", "chat", 'must be "sft" or "pretrain"'),
        ("id", 1.5, "must be a string or a whole number"),
        ("id", ["a"], "must be a string or a whole number"),
        ("id", "\ud83d", "half of a surrogate pair"),
        ("subset", 3, "must be a string"),
        ("references", ["4"], 'is given together with "reference"'),
        ("responses", [], "is given together with chosen and rejected"),
        ("\ud83d", 1, "half of a surrogate pair"),
    ):
        yield f"{name!a} {value!a}", pair(**{name: value}), says
    one = {"content": "x", "score": 1}
    for kind, responses, says in (
        ("none", [], "has 0 responses"),
        ("two", [one, one], "has 2 responses"),
        ("a string", "x", "must be a list"),
        ("strings", ["a", "b", "c"], "must be an object"),
        ("mixed", [one, one, {"content": "y", "rank": 1}], "some responses have a score and others a rank"),
        ("both", [one, one, one | {"rank": 1}], 'must have either "score"'),
        ("neither", [one, one, {"content": "y"}], 'must have either "score"'),
        ("no text", [one, one, {"score": 1}], 'must have either "content"'),
        ("NaN", [one, one, one | {"score": float("nan")}], "must be a finite number"),
    ):
        yield f"responses {kind}", {"prompt": "p", "responses": responses}, says
    without = {"prompt": "p", "chosen": "a", "rejected": "b"}
    yield "no references", without | {"references": []}, "is an empty list"
    yield "empty object", {}, "is missing"
    yield "nothing known", {"a": 1, "b": 2}, "prompt: is missing"
    yield "misspelt", {"promt": "x", "reference": "", "chosen": "a", "rejected": "b"}, "the row has 'promt'"


# What is good although it looks odd.
GOOD_ROWS: dict[str, dict[str, Any]] = {
    "empty texts": pair(prompt="", reference="", chosen="", rejected=""),
    "control characters": pair(prompt="\x1b[31mred\x00\x9b", id="\x1b]0;id\x07", subset="\x1b[2J"),
    "control characters in a key": pair(**{"\x1b[2Jkey\x00": 1}),
    "line separators": pair(prompt="a\u2028b\u2029c\x85d\x0be"),
    "right to left": pair(prompt="\u202egnp.exe", subset="\u2067"),
    "emoji": pair(prompt="👩‍👩‍👧 𝄞", chosen="\U0010ffff"),
    "NaN in another field": pair(note=float("nan"), more=[float("inf")]),
    "half a character in another field": pair(note="\ud83d"),
    "large number in another field": pair(note=10**30),
    "nested field": pair(note=[{"a": [None, {}]}] * 3),
    "messages": pair(prompt=[{"role": "user", "content": "Hi", "name": "x"}], chosen=[]),
    "references": {"prompt": "p", "references": ["a", "b"], "chosen": "c", "rejected": "d"},
    "ranked": ranked(3, 2, 1),
    "all tied": ranked(1, 1, 1),
    "ranks": ranked(1, 2, 3, key="rank"),
    "ranked with a reference": ranked(2, 1, reference=""),
    "ESC in a policy": {
        "prompt": "p",
        "responses": [{"content": "x", "score": n, "policy": "\x1b[2J"} for n in range(3)],
    },
    "null fields": pair(weight=None, wrapper=None, id=None, margin=None, subset=None, references=None),
    "whole number as id": pair(id=12),
    "key like markup": pair(**{"[red]": "[/bold]"}),
}

# A line that is no row, and what must be said of it.
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "word": (b"oops", "is not JSON"),
    "number": (b"7", "is a number"),
    "list": (b"[1]", "is a list"),
    "text": (b'"text"', "is a string"),
    "null": (b"null", "is null"),
    "NaN": (b"NaN", "is a number"),
    "Python": (b"{'prompt': 'x'}", "is not JSON"),
    "cut in a text": (b'{"prompt": "x', "is not JSON"),
    "cut in an object": (b'{"prompt": "x"', "is not JSON"),
    "cut in a character": ('{"prompt": "é'.encode()[:-1], "not"),
    "comma at the end": (b'{"prompt": "x",}', "is not JSON"),
    "two rows": (b"{} {}", "is not JSON"),
    "zero bytes": (b"\x00" * 50, "is not JSON"),
    "raw tab": (b'{"prompt": "a\tb"}', "is not JSON (Invalid control character"),
    "bad escape": (rb'{"prompt": "\x41"}', "is not JSON"),
    "Latin-1": ('{"prompt": "café"}'.encode("latin-1"), "not valid UTF-8 (0xe9 at byte 16"),
    "GB18030": ('{"prompt": "中文数据,请看"}'.encode("gb18030"), "not valid UTF-8"),
    "Windows-1251": ('{"prompt": "Привет мир"}'.encode("cp1251"), "not valid UTF-8"),
    "Shift-JIS": ('{"prompt": "こんにちは"}'.encode("shift_jis"), "not valid UTF-8"),
    "a byte of UTF-8": ('{"prompt": "中文\udcff数据"}'.encode(errors="surrogateescape"), "not valid UTF-8"),
    "overlong": (b'{"prompt": "\xc0\x80"}', "not valid UTF-8"),
    "surrogate as UTF-8": (b'{"prompt": "\xed\xa0\xbd"}', "not valid UTF-8"),
    "deep": (b"[" * 100_000, "is nested too deeply"),
    "deep object": (b'{"a":' * 100_000, "is nested too deeply"),
    "long number": (b'{"id": ' + b"9" * 5000 + b"}", "is not JSON (Exceeds the limit"),
    "repeated key": (GOOD[:-1] + b', "chosen": "d"}', "has the key 'chosen' twice"),
    "repeated key of a message": (b'{"prompt": [{"role": "a", "role": "b"}]}', "has the key 'role' twice"),
    "repeated ESC key": (rb'{"\u001b[2J": 1, "\u001b[2J": 2}', r"has the key '\x1b[2J' twice"),
    "ESC": (b"\x1b[31m{}", "is not JSON"),
    "YAML": (b"prompt: x", "is not JSON"),
    "comment": (b"// a comment", "is not JSON"),
    "long": (b'{"prompt": "' + b"x" * 2**21 + b'"}', "limit"),
}


def _lines(*rows: bytes) -> bytes:
    return b"".join(row + b"\n" for row in rows)


def _list(*rows: bytes) -> bytes:
    return b"[" + b",\n ".join(rows) + b"]"


def all_cases() -> list[DataCase]:
    """All files."""
    makers = (
        _rows,
        _raw_lines,
        _raw_entries,
        _cut_off,
        _no_data,
        _layouts,
        _broken_lists,
        _parquet,
        _tables,
        _names,
    )
    return [case for maker in makers for case in maker()]


def _rows() -> Iterator[DataCase]:
    for name, row, says in _wrong_fields():
        text = json.dumps(row).encode()
        yield DataCase(f"row: {name}", "a.jsonl", _lines(GOOD, text, END), [1, 3], [2], says)
        yield DataCase(f"entry: {name}", "a.json", _list(GOOD, text, END), [1, 3], [2], says)
    for name, row in GOOD_ROWS.items():
        text = json.dumps(row, ensure_ascii="half" in name).encode()
        listed = _list(GOOD, text, END)
        yield DataCase(f"good row: {name}", "a.jsonl", _lines(GOOD, text, END), [1, 2, 3])
        yield DataCase(f"good entry: {name}", "a.JSON.gz", gzip.compress(listed), [1, 2, 3])
        yield DataCase(f"good data: {name}", "a.json", b'{"data": ' + listed + b"}", [1, 2, 3])


def _raw_lines() -> Iterator[DataCase]:
    for name, (line, says) in BAD_LINES.items():
        yield DataCase(f"line 2: {name}", "a.jsonl", _lines(GOOD, line, END), [1, 3], [2], says)
        if name != "zero bytes":  # then it is no file of lines at all
            compressed = gzip.compress(_lines(line, GOOD, END))
            yield DataCase(f"line 1: {name}", "a.ndjson.gz", compressed, [2, 3], [1], says)
        last = _lines(GOOD, b"", END) + line
        yield DataCase(f"end: {name}", "a.json", last, [1, 3], [4], says, damaged=name.startswith("cut"))


def _raw_entries() -> Iterator[DataCase]:
    for name, (entry, says) in BAD_LINES.items():
        if name == "two rows":
            continue
        goes_on = name in ("number", "list", "text", "null", "NaN") or "repeated" in name or "UTF-8" in says
        yield DataCase(
            f"entry 2: {name}",
            "a.json",
            _list(GOOD, entry, END),
            [1, 3] if goes_on else [1],
            [2],
            says,
            damaged=not goes_on,
        )


def _cut_off() -> Iterator[DataCase]:
    """Files that end too early, and compressed ones in which a byte is wrong."""
    random = Random(0)
    rows = [json.dumps(pair(id=n, prompt=f"{n} {random.random()}")).encode() for n in range(1, 200)]
    for percent in range(5, 100, 8):
        for file, content in (
            ("a.jsonl", _lines(*rows)),
            ("a.json", _list(*rows)),
            ("a.jsonl.gz", gzip.compress(_lines(*rows))),
            ("a.json.gz", gzip.compress(_list(*rows))),
        ):
            cut = content[: len(content) * percent // 100]
            text = zlib.decompressobj(31).decompress(cut) if file.endswith(".gz") else cut
            # What is complete, by another way: rows of which the end is there.
            count = sum(row + b"\n" in text if "jsonl" in file else row + b"," in text for row in rows)
            count += ".json." in f"{file}." and any(text.endswith(row) for row in rows)
            good = list(range(1, count + 1))
            yield DataCase(f"{percent} % of {file}", file, cut, good, [count + 1], damaged=True)
    whole = gzip.compress(_lines(*rows))
    for place in (20, 500, len(whole) // 2, len(whole) - 300, len(whole) - 7, len(whole) - 2):
        wrong = bytearray(whole)
        wrong[place] ^= 0x55
        yield DataCase(f"wrong byte {place}", "a.jsonl.gz", bytes(wrong), None, None, damaged=True)
    yield DataCase("something after gzip", "a.jsonl.gz", whole + b"more", None, None, "damaged", damaged=True)


def _no_data() -> Iterator[DataCase]:
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    rows = _lines(GOOD, END).decode()
    for name, content, says in (
        ("LFS", lfs, 'is a Git LFS pointer, not the data — run "git lfs pull"'),
        ("HTML", b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", "is a web page"),
        ("UTF-16 with a mark", rows.encode("utf-16"), "iconv -f UTF-16 "),
        ("UTF-16BE with a mark", b"\xfe\xff" + rows.encode("utf-16-be"), "iconv -f UTF-16 "),
        ("UTF-16LE", rows.encode("utf-16-le"), "iconv -f UTF-16LE"),
        ("UTF-16BE", rows.encode("utf-16-be"), "iconv -f UTF-16BE"),
        ("UTF-32", rows.encode("utf-32"), "iconv -f UTF-32"),
        ("gzip", gzip.compress(rows.encode()), "must end in .gz"),
        ("ZIP", b"PK\x03\x04....", "ZIP"),
        ("bzip2", bz2.compress(rows.encode()), "bunzip2"),
        ("xz", lzma.compress(rows.encode()), "unxz"),
        ("zstd", b"\x28\xb5\x2f\xfd....", "unzstd"),
        ("Parquet", b"PAR1....", "must end in .parquet"),
        ("zeros", b"\x00" * 5000, "zero bytes"),
        ("CSV", b"prompt,chosen,rejected\n1,2,3\n", "looks like CSV"),
        ("CSV with a mark", b'\xef\xbb\xbf"Prompt";"answer"\n1;2\n', "looks like CSV"),
        ("TSV", b"question\tresponse\n1\t2\n", "looks like TSV"),
        ("pretty object", json.dumps(FIRST, indent=2).encode(), "jq -c '.' in.json > out.jsonl"),
        ("pretty objects", json.dumps(FIRST, indent=2).encode() * 3, "is JSON over several lines"),
        ("pretty list of a key", json.dumps({"train": [FIRST]}, indent=1).encode(), "jq -c '.train[]'"),
        ("pretty messages", b'{"prompt": [\n {"role": "user"}]}', "is JSON over several lines"),
    ):
        for file in ("a.jsonl", "a.json"):
            yield DataCase(f"{name} as {file}", file, content, [], [0], says, damaged=True)
    yield DataCase("list in lines", "a.jsonl", _list(GOOD, END), [], [1], "not one list", damaged=True)
    pretty = json.dumps([FIRST, LAST], indent=1).encode()
    yield DataCase("pretty list in lines", "a.jsonl", pretty, [], [1], "not one list", damaged=True)
    for content in (b"", b"\n \n", b"[]", b'{"data": []}'):
        yield DataCase(f"nothing: {content!a}", "a.json", content, [], [0], "has no rows")
    yield DataCase("empty gzip", "a.jsonl.gz", b"", [], [0], "compressed file never is", damaged=True)
    yield DataCase("gzip of nothing", "a.jsonl.gz", gzip.compress(b""), [], [0], "has no rows")
    yield DataCase("lines named gzip", "a.jsonl.gz", _lines(GOOD), [], [1], "is damaged", damaged=True)


def _layouts() -> Iterator[DataCase]:
    """The same two rows in every way that is right."""
    mark = b"\xef\xbb\xbf"
    both = [FIRST, LAST]
    for name, content in {
        "plain": _lines(GOOD, END),
        "no line end": GOOD + b"\n" + END,
        "Windows": GOOD + b"\r\n" + END + b"\r\n",
        "mark": mark + _lines(GOOD, END),
        "joined marks": mark + _lines(GOOD) + mark + _lines(END),
        "spaces": _lines(b"  " + GOOD + b" \t", b"\t" + END),
        "long spaces": _lines(GOOD, END + b" " * 10_000),
    }.items():
        for file in ("a.jsonl", "a.NDJSON", "a.Json"):
            yield DataCase(f"lines: {name} {file}", file, content, [1, 2])
        for level in (0, 9):
            zipped = gzip.compress(content, level)
            yield DataCase(f"lines: {name} gz {level}", "a.jsonl.GZ", zipped, [1, 2])
    yield DataCase("blank lines", "a.jsonl", _lines(b"", GOOD, b" ", b"\r", END, b""), [2, 5])
    members = gzip.compress(_lines(GOOD)) + gzip.compress(_lines(END))
    yield DataCase("gzip members", "a.jsonl.gz", members + b"\x00" * 512, [1, 2])
    for name, content in {
        "compact": json.dumps(both, separators=(",", ":")).encode(),
        "indented": json.dumps(both, indent=4).encode(),
        "tabs": json.dumps(both, indent="\t").encode().replace(b"\n", b"\r\n"),
        "mark": mark + json.dumps(both).encode(),
        "spaces": b" \n\t" + json.dumps(both).encode() + b"\n \n",
        "data": json.dumps({"data": both}).encode(),
        "data, indented": json.dumps({"data": both}, indent=2).encode(),
        "data after a version": json.dumps({"version": 1.1, "name": "x", "data": both}).encode(),
        "data before a count": json.dumps({"data": both, "count": 2, "more": {"a": [1]}}).encode(),
    }.items():
        for file, stored in (("a.json", content), ("a.json.gz", gzip.compress(content))):
            yield DataCase(f"list: {name} {file}", file, stored, [1, 2])


def _broken_lists() -> Iterator[DataCase]:
    for name, content, good, says in (
        ("no end", b"[" + GOOD, [1], "has the end of the file where a comma"),
        ("no comma", b"[" + GOOD + b" " + END + b"]", [1], "has '{' where a comma"),
        ("comma at the end", b"[" + GOOD + b",]", [1], "is not JSON"),
        ("two commas", b"[" + GOOD + b",," + END + b"]", [1], "is not JSON"),
        ("more after it", _list(GOOD, END) + b"{}", [1, 2], "continues after the end of the list"),
        ("two lists", _list(GOOD) + _list(END), [1], "continues after the end of the list"),
        ("wrong end", b"[" + GOOD + b"}", [1], "has '}' where a comma"),
        ("byte between", b"[" + GOOD + b"\xff," + END + b"]", [1], "has '\\udcff' where a comma"),
        ("data without end", b'{"data": [' + GOOD + b"]", [1], "end of the object"),
        ("data, no key", b'{"data": [' + GOOD + b"], 7}", [1], "Expecting ':'"),
        ("data, more", b'{"data": [' + GOOD + b"]} {}", [1], "continues after the end"),
        ("only a bracket", b"[", [], "is not JSON"),
    ):
        yield DataCase(f"list: {name}", "a.json", content, good, [len(good) + 1], says, damaged=True)
        zipped = gzip.compress(content)
        yield DataCase(f"list: {name}, gz", "a.json.gz", zipped, good, [len(good) + 1], says, damaged=True)


def _parquet() -> Iterator[DataCase]:
    def file(columns: dict[str, Any], **options: Any) -> bytes:
        stream = io.BytesIO()
        parquet.write_table(pa.table(columns), stream, **options)
        return stream.getvalue()

    def text(*values: bytes) -> Any:
        return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())

    texts = {"prompt": ["What is 2 + 2?", "p", "Hi"]}
    texts |= dict.fromkeys(("reference", "chosen", "rejected"), ["a"] * 3)
    whole = file(texts)
    yield DataCase("Parquet", "a.parquet", whole, [1, 2, 3])
    yield DataCase("Parquet, any case", "a.PARQUET", file(texts, compression="gzip"), [1, 2, 3])
    for percent in (0, 1, 30, 60, 90, 99):
        cut = whole[: len(whole) * percent // 100]
        yield DataCase(f"Parquet {percent} %", "a.parquet", cut, [], [0], "is not readable", damaged=True)
    yield DataCase("lines as Parquet", "a.parquet", GOOD, [], [0], "is not readable", damaged=True)
    wrong = {"prompt": text(b"What is 2 + 2?", b"caf\xe9", b"Hi")}
    yield DataCase("Parquet, Latin-1", "a.parquet", file(texts | wrong), [1, 3], [2], "0xe9 at byte 4")
    binary = {"chosen": pa.array([b"a"] * 3, pa.binary())}
    yield DataCase("Parquet, bytes", "a.parquet", file(texts | binary), [], [1, 2, 3], "must be a string")
    null = {"chosen": pa.array(["a", None, "b"])}
    yield DataCase("Parquet, null", "a.parquet", file(texts | null), [1, 3], [2], "is null")
    for name, extra in {
        "dates": pa.array([datetime(2026, 1, 1)] * 3),
        "decimals": pa.array([Decimal("1.5")] * 3),
        "bytes": pa.array([b"\xff"] * 3),
        "NaN": pa.array([float("nan")] * 3),
        "lists": pa.array([[{"a": None}]] * 3),
        "dictionary": pa.array(["x"] * 3).dictionary_encode(),
        "large": pa.array(["x"] * 3, pa.large_string()),
        "nulls": pa.nulls(3),
    }.items():
        yield DataCase(f"Parquet, {name}", "a.parquet", file(texts | {"more": extra}), [1, 2, 3])
    stream = io.BytesIO()
    twice = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["prompt", "prompt"])
    parquet.write_table(twice, stream)
    yield DataCase(
        "Parquet, a column twice", "a.parquet", stream.getvalue(), [], [0], "'prompt' twice", damaged=True
    )
    empty = file({name: pa.array([], pa.string()) for name in texts})
    yield DataCase("Parquet without rows", "a.parquet", empty, [], [0], "has no rows")


def _tables() -> Iterator[DataCase]:
    columns, first, last = b"prompt,reference,chosen,rejected", b"What is 2 + 2?,4,four,five", b"Hi,,a,b"
    for name, line, says in (
        ("few cells", b"p,r", "has 2 cells, but there are 4 columns"),
        ("many cells", b"p,r,a,b,c", "has 5 cells, but there are 4 columns"),
        ("no chosen", b"p,r,,b", "chosen: is missing"),
        ("Latin-1", b"caf\xe9,r,a,b", "0xe9 at byte 4 of the line"),
        ("control characters", b"\x1b[2J,\x07", "has 2 cells"),
    ):
        content = _lines(columns, first, line, last)
        yield DataCase(f"CSV: {name}", "a.csv", content, [2, 4], [3], says)
        yield DataCase(f"CSV, gz: {name}", "a.CSV.gz", gzip.compress(content), [2, 4], [3], says)
        yield DataCase(f"TSV: {name}", "a.tsv", content.replace(b",", b"\t"), [2, 4], [3])
    content = _lines(columns, first, last)
    yield DataCase("CSV of Windows", "a.csv", b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"), [2, 3])
    yield DataCase("CSV, semicolons", "a.csv", content.replace(b",", b";"), [2, 3])
    quoted = _lines(columns, first, b'"a ""b""\nc",r,"x,y",z', last)
    yield DataCase("CSV, quotes", "a.csv", quoted, [2, 3, 5])
    broken = _lines(columns, first, b'"a,r,x,y', last)
    yield DataCase("CSV, open quote", "a.csv", broken, [2], [3], "is not CSV", damaged=True)
    twice = _lines(b"prompt,prompt,chosen,rejected", first)
    yield DataCase("CSV, a column twice", "a.csv", twice, [], [1], "'prompt' twice", damaged=True)
    cut = gzip.compress(_lines(columns, *[first + str(n * n * 7919).encode() for n in range(2000)]))[:-3000]
    yield DataCase("CSV, gz, cut off", "a.csv.gz", cut, None, None, "cannot be read further", damaged=True)
    yield DataCase("CSV without rows", "a.csv", columns + b"\n", [], [0], "has no rows")


def _names() -> Iterator[DataCase]:
    for file in (
        b"caf\xe9.jsonl",
        b"\xff\xfe.json",
        b"\x1b[2J.jsonl",
        b"line\nend.jsonl",
        b"a:b.jsonl",
        b"[red].jsonl",
        b"{0}%s.jsonl",
        b"-x.jsonl",
        "数据 👍.jsonl".encode(),
        b".jsonl",
    ):
        yield DataCase(f"name {file!a}", file, _lines(GOOD, b"oops", END), [1, 3], [2])
