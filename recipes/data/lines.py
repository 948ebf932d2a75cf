"""Parallel text: two files of which line n of one is the translation of line n of the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from conf.errors import Problem
from conf.schema import DataConfig
from recipes.data.readers import _lines
from recipes.data.rows import Fields, Meter, Problems, Row
from recipes.data.sources import FileSource, find_files, held_out_row
from recipes.data.streams import BrokenFileError, FileFormat, open_text

SIDES = {"path": "target_path", "eval_path": "eval_target_path"}
"""Key of the text to translate → key of its translation."""


class LinesSource(FileSource):
    """{"source": str, "target": str} of each line, without its end; the held-out split is by row.

    Folders and globs are taken file by file, in sorted order. Line ends are LF or CR LF, nothing else ends a line.
    """

    config: DataConfig

    def check(self) -> list[Problem]:
        problems = Problems()
        for names in SIDES.items():
            values = [getattr(self.config, name) for name in names]
            if names[0] == "eval_path" and values == [None, None]:
                continue
            before = len(problems.found)
            for name, value in zip(names, values, strict=True):
                if value is None:
                    key = f"{self.key}.{name}"
                    rule = "line-aligned text has two sides, the text and its translation"
                    problems.add(Problem(key, "null", rule, f"{key}=FILE"))
                else:
                    self._check_files(name, value, problems)
            if len(problems.found) == before:
                problems.found += self._unpaired(names[0])
        return problems.found

    def files(self, held_out: bool) -> list[tuple[str, Path]]:
        """The files of both sides: first those to translate, then their translations."""
        source = "eval_path" if held_out else "path"
        if held_out and self.config.eval_path is None:
            return []
        return self._side(source) + self._side(SIDES[source])

    def inputs(self, held_out: bool) -> list[Path]:
        """Those to translate: two texts may have the same translation."""
        files = super().inputs(held_out)
        return files[: len(files) // 2]

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        by_row = self.config.eval_path is None
        index = 0
        for held_out, name in enumerate(SIDES):
            if held_out and by_row:
                return
            unpaired = self._unpaired(name)
            for problem in unpaired:
                problems.add(problem)
            if unpaired:
                continue
            for (_, source), (_, target) in zip(self._side(name), self._side(SIDES[name]), strict=True):
                for number, left, right in pairs(source, target, self.form, self.fields, problems, meter):
                    aside = held_out_row(index, self.held_out) if by_row else bool(held_out)
                    yield Row(f"{source}:{number}", aside, {"source": left, "target": right})
                    index += 1

    def _side(self, name: str) -> list[tuple[str, Path]]:
        return find_files(self.config.kind, f"{self.key}.{name}", getattr(self.config, name), self.max_files)

    def _unpaired(self, name: str) -> list[Problem]:
        """Folders or globs with different numbers of files."""
        counts = [len(self._side(side)) for side in (name, SIDES[name])]
        if counts[0] == counts[1]:
            return []
        key, value = f"{self.key}.{SIDES[name]}", str(getattr(self.config, SIDES[name]))
        rule = f"{counts[1]} files, {self.key}.{name} has {counts[0]}; each file needs its translation"
        return [Problem(key, value, rule, f"{key}=FILE")]


def pairs(
    source: Path, target: Path, form: FileFormat, fields: Fields, problems: Problems, meter: Meter
) -> Iterator[tuple[int, str, str]]:
    """(line number, line of `source`, line of `target`) where both decode and neither is blank.

    Files of different length are one problem, found before the first pair: every pair after the missing line would be
    a wrong one.
    """
    left_lines, right_lines = count_lines(source, form, problems), count_lines(target, form, problems)
    if left_lines is None or right_lines is None:
        return
    start, size = meter.done, source.stat().st_size + target.stat().st_size
    if left_lines != right_lines:
        rule = f"it has {left_lines} lines, its translation {target} has {right_lines}; line n is paired with line n"
        problems.add(Problem(str(source), "", rule, "a blank line where a translation is missing"))
        return
    left_meter, right_meter = Meter(), Meter()
    right = _lines(target, form, problems, right_meter)
    at, translation = 0, ""
    for number, text in _lines(source, form, problems, left_meter):
        while at < number:
            at, translation = next(right, (sys.maxsize, ""))
        meter.done = start + left_meter.done + right_meter.done
        if at > number:  # the translation does not decode, which is a problem already
            continue
        pair = text.rstrip("\r\n"), translation.rstrip("\r\n")
        if pair[0].strip() and pair[1].strip():
            yield number, *pair
        else:
            blank = [side for side, text in enumerate(pair) if not text.strip()]
            without = ("source", "target")[blank[0]] if len(blank) == 1 else None
            fields.leave_out(f"{(source, target)[blank[0]]}:{number}", without, problems, meter)
    for _ in right:  # where the last lines of `source` do not decode, those of `target` may not either
        pass
    meter.done = start + size


def count_lines(path: Path, form: FileFormat, problems: Problems) -> int | None:
    """Lines of a file, whatever they hold, also a last one without an end; None (and a problem) for a damaged file."""
    stream, raw = open_text(path, form)
    count, last = 0, b"\n"
    with raw, stream:
        try:
            while block := stream.read(1 << 20):
                count += block.count(b"\n")
                last = block[-1:]
        except BrokenFileError as error:
            problems.add(error.problem(path))
            return None
    return count + (last != b"\n")
