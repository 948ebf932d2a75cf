"""Curves of runs: launch/report.py and the loss.png of a run."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

from conf.errors import RequestError
from launch.report import main, read_arguments, row_of
from launch.runtime.plots import _smoothed, plot_loss, plot_runs, read_metrics


def write_run(folder: Path, steps: int = 30, speed: float = 1000.0) -> Path:
    folder.mkdir(parents=True)
    rows = [{"step": 0, "split": "held_out", "loss": 6.0, "perplexity": math.exp(6.0)}]
    for step in range(1, steps + 1):
        numbers = {"loss": 6.0 - step / steps, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": speed + step % 3}
        rows.append({"step": step, **numbers})
    rows.append({"step": steps, "split": "held_out", "loss": 5.25, "perplexity": math.exp(5.25)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_one_image_for_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "first"), write_run(tmp_path / "second", steps=400, speed=2000.0)]
    out = tmp_path / "both.png"
    assert main([*map(str, runs), f"out={out}"]) == 0
    width, height = png_size(out)
    assert width > 1000 and height > 600
    printed = capsys.readouterr().out
    assert "first" in printed and "second" in printed
    assert "5.2500" in printed and f"{math.exp(5.25):.1f}" in printed and "2,001" in printed


def test_what_a_run_counts_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images of a classifier, rows of a regression over columns, tokens of all that reads text."""
    for name, config in (
        ("images", "{task: image_classification, data: {kind: idx, features: []}}"),
        ("rows", "{task: regression, data: {kind: csv, features: [a]}}"),
        ("tokens", "{task: regression, data: {kind: csv, features: []}}"),
    ):
        run = write_run(tmp_path / name)
        (run / "config.yaml").write_text(config)
        assert read_metrics(run).unit == name
        assert row_of(read_metrics(run))[-1] == f"1,001 {name}/s"
    assert main([str(tmp_path / "images"), f"out={tmp_path / 'out.png'}"]) == 0
    assert "images/s" in capsys.readouterr().out


def test_the_loss_of_one_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert plot_loss(run) == run / "loss.png"
    assert png_size(run / "loss.png")[0] > 800


def test_runs_of_one_name_keep_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / place / "run") for place in ("a", "b")]
    labels: list[str] = []
    monkeypatch.setattr("launch.runtime.plots._loss", lambda axes, run, colour, label, *_: labels.append(label))
    plot_runs(runs, tmp_path / "out.png")
    assert labels == [str(run) for run in runs]


def test_a_line_that_is_being_written_is_not_broken(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(run).steps] == [1, 2, 3]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1.0}', '{"step": 1, "loss": "high"}', '{"step": 1}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    run = write_run(tmp_path / "run", steps=2)
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(RequestError) as error:
        read_metrics(run)
    assert f"{file}:3" in error.value.render()


def test_all_wrong_runs_are_listed(tmp_path: Path) -> None:
    write_run(tmp_path / "baseline")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "metrics.jsonl").touch()
    with pytest.raises(RequestError) as error:
        main([str(tmp_path / name) for name in ("basline", "empty", "nothing")])
    text = error.value.render()
    assert len(error.value.problems) == 3
    assert f"try: {tmp_path / 'baseline'}" in text and "no metrics.jsonl" in text and "no rows" in text


def test_arguments(tmp_path: Path) -> None:
    assert read_arguments(["runs/a", "out=x.png"]) == ([Path("runs/a")], Path("x.png"))
    for wrong in ([], ["a", "ou=x.png"], ["a", "--fast"], ["a", "out=x.pdf"], ["a", f"out={tmp_path}/no/x.png"]):
        with pytest.raises(RequestError):
            read_arguments(wrong)


def test_a_run_without_evaluation_has_dashes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert row_of(read_metrics(run)) == ("run", "1", "2.0000", "-", "-", "-")


def test_smoothing_neither_lags_nor_shifts() -> None:
    line = [float(value) for value in range(1000)]
    assert _smoothed(line) == pytest.approx(line)
