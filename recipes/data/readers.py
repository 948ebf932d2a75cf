"""Reading one file: lines, records and documents, with FILE:LINE for everything that is broken."""

from __future__ import annotations

import csv
import itertools
import json
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from conf.errors import Problem, RequestError, did_you_mean
from conf.schema import SourceConfig
from recipes.data.changes import PASSED_OVER
from recipes.data.rows import Fields, Meter, Problems, value_of
from recipes.data.streams import BrokenFileError, FileFormat, broken_utf8, open_text, refuse_expansion

PARQUET_ROWS = 256
"""Rows read at once."""
PREAMBLE = 20
"""Lines before the header of a csv file, at most."""
DELIMITER_LINE = re.compile(r'"?sep=.?"?', re.IGNORECASE)
"""What spreadsheets write before the header."""
DELIMITERS = "\t;|,"
Record = tuple[int, dict[str, Any]]
"""(line or row number counted from 1, columns)."""


def read_document(path: Path, form: FileFormat, problems: Problems) -> str | None:
    """The whole file as text; None (and a problem) when it cannot be read."""
    stream, raw = open_text(path, form)
    try:
        with raw, stream:
            data = stream.read()
    except BrokenFileError as error:
        problems.add(error.problem(path))
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.add(broken_utf8(f"{path}:{line}", error, f"byte {error.start} of the file", form))
        return None


def read_python(path: Path) -> str | None:
    """A Python source file in the encoding it declares (PEP 263); None when it cannot be decoded."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def read_records(
    path: Path, source: SourceConfig, form: FileFormat, fields: Fields, problems: Problems, meter: Meter
) -> Iterator[Record]:
    """Good rows of a jsonl, csv or parquet file as in `good_rows`; `meter` follows the position in the file."""
    if source.kind == "parquet":
        records = _parquet(path, form, fields, problems, meter)
    else:
        preamble = _preamble(path, source, form, fields) if source.kind == "csv" else 0
        records = {"jsonl": _jsonl, "csv": _csv}[source.kind](path, source, form, problems, meter, preamble)
    return good_rows(records, str(path), fields, problems, meter)


def good_rows(
    records: Iterable[Record], origin: str, fields: Fields, problems: Problems, meter: Meter
) -> Iterator[Record]:
    """(number, {name: value} of the fields) of each record that is right.

    Broken ones go to `problems` as `origin:number`, empty ones are counted in `meter`.
    """
    for number, record in records:
        where = f"{origin}:{number}"
        content, complete = {}, True
        for name, column in fields.columns.items():
            try:
                content[name] = value_of(record, column)
            except KeyError:
                complete = False
                outer, _, inner = column.partition(".")
                near = did_you_mean(column, record)
                rule = f"no column '{column}'; this row has: {', '.join(record) or 'none'}"
                if inner and isinstance(below := record.get(outer), dict):
                    near = f"{outer}.{found}" if (found := did_you_mean(inner, below)) else ""
                    rule = f"no column '{column}'; '{outer}' of this row has: {', '.join(below) or 'none'}"
                problems.add(Problem(where, "", rule, f"did you mean '{near}'?" if near else ""))
        if not complete:
            continue
        if blank := fields.blank(content):
            fields.leave_out(where, blank[0] if len(blank) < len(content) else None, problems, meter)
            continue
        broken = fields.problems(content, where)
        for problem in broken:
            problems.add(problem)
        if broken:
            continue
        if fields.is_empty(content):
            without = [
                fields.columns[name] for name, value in content.items() if str(value).strip() in ("", "[]", "None")
            ]
            fields.leave_out(where, without[0] if len(without) == 1 < len(content) else None, problems, meter)
            continue
        yield number, content | {name: record[name] for name in fields.also if name in record}


def first_columns(
    path: Path, source: SourceConfig, form: FileFormat, fields: Fields, problems: Problems
) -> list[str] | None:
    """Columns of the first row (jsonl), the header (csv) or the schema (parquet); None when the file has no row."""
    if source.kind == "parquet":
        file = _open_parquet(path, form, problems)
        return None if file is None or file.metadata.num_rows == 0 else list(file.schema_arrow.names)
    if source.kind == "csv" and source.header:
        return source.header
    if source.kind == "csv":
        before = _preamble(path, source, form, fields)
        lines = (text for number, text in _lines(path, form, problems, Meter()) if number > before)
        try:
            header = next(csv.reader(lines, delimiter=delimiter(source), quoting=quoting(source), strict=True), None)
        except csv.Error as error:
            problems.add(Problem(f"{path}:{before + 1}", "", f"not a CSV header ({error})"))
            return None
        return header
    for _, record in _jsonl(path, source, form, problems, Meter()):
        return list(record)
    return None


def _lines(path: Path, form: FileFormat, problems: Problems, meter: Meter) -> Iterator[tuple[int, str]]:
    """(line number, line with its end), decoded line by line, so that a broken one does not hide the rest."""
    stream, raw = open_text(path, form)
    start, before = meter.done, 0
    with raw, stream:
        try:
            for number, line in enumerate(stream, 1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    place = f"byte {error.start} of the line, {before + error.start} of the file"
                    problems.add(broken_utf8(f"{path}:{number}", error, place, form))
                before += len(line)
                meter.done = start + raw.tell()
        except BrokenFileError as error:
            problems.add(error.problem(path))


class _TwiceError(ValueError):
    """A key given twice, of which Python would keep the last in silence."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return record


def _jsonl(
    path: Path, source: SourceConfig, form: FileFormat, problems: Problems, meter: Meter, preamble: int = 0
) -> Iterator[Record]:
    for number, line in _lines(path, form, problems, meter):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_once)
        except _TwiceError as error:
            problems.add(Problem(f"{path}:{number}", "", f"the key '{error}' stands twice in one object"))
            continue
        except json.JSONDecodeError as error:
            problems.add(Problem(f"{path}:{number}", "", f"not valid JSON: {error.msg} at column {error.colno}"))
            continue
        except ValueError:  # Python converts no more digits than sys.get_int_max_str_digits()
            problems.add(Problem(f"{path}:{number}", "", "a number has too many digits"))
            continue
        except RecursionError:
            problems.add(Problem(f"{path}:{number}", "", "not valid JSON: nested too deeply"))
            continue
        if isinstance(record, dict):
            yield number, record
        else:
            problems.add(Problem(f"{path}:{number}", "", "a line must be a JSON object", '{"text": "…"}'))


def _preamble(path: Path, source: SourceConfig, form: FileFormat, fields: Fields) -> int:
    """Lines before the header of a csv file: `sep=;` as spreadsheets write it, comments, and blank ones between them.

    A line that begins with # is a comment where the line behind has more columns, or those that are read of it.
    """
    try:
        found = list(itertools.islice(_lines(path, form, Problems(), Meter()), PREAMBLE))
    except RequestError:  # of lines that do not decode, which is found again where they are read
        return 0
    wanted, before, comments = set(fields.columns.values()), 0, list[tuple[int, str]]()
    for number, line in found:
        text = line.strip()
        if number == 1 and DELIMITER_LINE.fullmatch(text):
            before = 1
        elif source.header is None and text.startswith("#"):
            comments.append((number, line))
        elif text:
            header = _columns(line, source)
            for place, comment in comments:
                columns = _columns(comment, source)
                other = wanted <= set(header) and not wanted <= set(columns)
                if not (other or len(columns) == 1 < max(len(line.split(sign)) for sign in DELIMITERS)):
                    break
                before = place
            return before
    return before


def _columns(line: str, source: SourceConfig) -> list[str]:
    """The columns of one line; none where it is no csv."""
    try:
        return next(csv.reader([line], delimiter=delimiter(source), quoting=quoting(source), strict=True), [])
    except csv.Error:
        return []


def _csv(
    path: Path, source: SourceConfig, form: FileFormat, problems: Problems, meter: Meter, preamble: int = 0
) -> Iterator[Record]:
    """preamble: lines at the beginning that are no rows."""
    csv.field_size_limit(2**31 - 1)  # the module's default of 128 KiB is less than a long document
    fed: list[int] = []  # numbers of the lines that make up the current row: a quoted field may span several

    def feed() -> Iterator[str]:
        for number, text in _lines(path, form, problems, meter):
            if number > preamble:
                fed.append(number)
                yield text
            else:
                meter.note(PASSED_OVER, "lines before the header", f"{path}:{number}")

    reader = csv.reader(feed(), delimiter=delimiter(source), quoting=quoting(source), strict=True)
    header = source.header
    while True:
        fed.clear()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            problems.add(Problem(f"{path}:{fed[0]}", "", f"not valid CSV: {error}"))
            continue
        if fields is None:
            return
        if header is None:
            header = fields
            if twice := sorted({name for name in fields if fields.count(name) > 1}):
                rule = f"two columns are called {', '.join(twice)}; only one of them would be read"
                problems.add(Problem(f"{path}:{fed[0]}", "", rule, "a name of its own for each column"))
                return
        elif len(header) > 1 and [name.strip("\ufeff ") for name in fields] == [name.strip() for name in header]:
            rule = "the header is repeated here, as in files that were put together"
            problems.add(Problem(f"{path}:{fed[0]}", "", rule, "a file without this line"))
        elif len(fields) == len(header):
            yield fed[0], dict(zip(header, fields, strict=True))
        elif fields:  # the csv module gives an empty list for a blank line
            rule = f"{len(fields)} columns, the header has {len(header)} ({', '.join(header)})"
            problems.add(Problem(f"{path}:{fed[0]}", "", rule, "quote fields that contain the delimiter"))


def _parquet(path: Path, form: FileFormat, fields: Fields, problems: Problems, meter: Meter) -> Iterator[Record]:
    import pyarrow

    file = _open_parquet(path, form, problems)
    if file is None:
        return
    tops = [c if c in file.schema_arrow.names else c.partition(".")[0] for c in fields.columns.values()]
    wanted = [column for column in dict.fromkeys([*tops, *fields.also]) if column in file.schema_arrow.names]
    size, start, number, content = path.stat().st_size, meter.done, 0, 0
    try:
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
            content += batch.nbytes  # a dictionary's value may stand for millions of rows, which no size in it tells
            refuse_expansion(content, size, form)
            for record in batch.to_pylist():
                number += 1
                yield number, record
            meter.done = start + size * number // max(file.metadata.num_rows, 1)
    except BrokenFileError as error:
        problems.add(error.problem(path))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        problems.add(Problem(str(path), "", f"the parquet file is damaged after row {number} ({_first_line(error)})"))


def _open_parquet(path: Path, form: FileFormat, problems: Problems) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
        refuse_expansion(sum(group.total_byte_size for group in groups), path.stat().st_size, form)
        return file
    except BrokenFileError as error:
        problems.add(error.problem(path))
        return None
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: names that are no text
        problems.add(Problem(str(path), "", f"not a readable parquet file ({_first_line(error)})"))
        return None


def delimiter(source: SourceConfig) -> str:
    r"""The delimiter, where a tab may be written as `\t`, which is what reaches us from a command line."""
    return "\t" if source.delimiter == "\\t" else source.delimiter


def quoting(source: SourceConfig) -> Literal[0, 3]:
    """csv's constant: between tabs a quotation mark is a character of the text, as of all formats of that kind."""
    quoted = source.quoting if source.quoting is not None else delimiter(source) != "\t"
    return csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
