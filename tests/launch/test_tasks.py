"""Tasks through the real commands: what they learn, what they refuse, and that a saved model is judged the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from commands import ROOT, TRAIN, environment, launcher, rows, run
from filelock import FileLock
from safetensors.torch import load_file

EVALUATE = ROOT / "launch" / "evaluate.py"
SHARED = ROOT.parent / "shared" / "data"
TINY_BERT = (
    "model=bert_4m", "model.config.hidden_size=32", "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=2",
)  # fmt: skip


@pytest.mark.slow
def test_regression_finds_the_slope(tmp_path: Path) -> None:
    """y = 2x within 1e-3, through the launcher on two ranks; the exported model is judged as training judged it."""
    env = environment(tmp_path)
    done = run([*launcher("deepspeed", 2), TRAIN, "+recipe=line"], tmp_path, env)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "runs/line/model/model.safetensors")
    assert abs(weights["linear.weight"].item() - 2) < 1e-3 and abs(weights["linear.bias"].item()) < 1e-3
    judged = run(["python", EVALUATE, "runs/line", "+recipe=line", "out=found.jsonl"], tmp_path, env)
    assert judged.returncode == 0, judged.stderr
    summary = json.loads((tmp_path / "runs/line/summary.json").read_text())
    assert json.loads(judged.stdout.splitlines()[-1]) == pytest.approx(summary["held_out"], rel=1e-4)
    found, written = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (tmp_path / "found.jsonl", tmp_path / "runs/line/predictions.jsonl")
    )
    assert len(found) == 20 and [row["label"] for row in found] == [row["label"] for row in written]
    assert len(judged.stdout.splitlines()) == 1, "more than the metrics on standard output"
    with FileLock(tmp_path / "runs/line/.lock"):  # another run is at work there
        refusal = run(["python", TRAIN, "+recipe=line", "overwrite=true"], tmp_path, env)
    assert refusal.returncode == 2 and "another run is at work" in refusal.stderr, refusal.stderr
    refusal = run(["python", TRAIN, "+recipe=line", "overwrite=true", "task=token_classification"], tmp_path, env)
    assert refusal.returncode == 2 and (tmp_path / "runs/line/model/config.json").is_file()
    (tmp_path / "runs/line").rename(tmp_path / "runs/lr=1's")
    for model, extra, says in (
        ("runs/none", (), "MODEL=runs/none"), ("runs/lr=1's", ("model.path=x",), "MODEL is what is evaluated"),
        ("runs/lr=1's/model", ("data.held_out=0.5",), "held out 0.1, and was trained on the rest of these rows"),
    ):  # fmt: skip
        refusal = run(["python", EVALUATE, model, "+recipe=line", *extra], tmp_path, env)
        assert refusal.returncode == 2 and says in refusal.stderr, refusal.stderr
    elsewhere = run(["python", EVALUATE, "runs/lr=1's", "+recipe=line"], tmp_path, env)
    assert elsewhere.returncode == 0 and elsewhere.stdout.splitlines()[-1] == judged.stdout.splitlines()[-1]
    (tmp_path / "runs/lr=1's").rename(tmp_path / "runs/line")
    again = run(["python", EVALUATE, "runs/line", "+recipe=line", "out=found.jsonl"], tmp_path, env)
    assert again.returncode == 2 and "never overwritten" in again.stderr


@pytest.mark.slow
def test_the_kept_model_is_the_one_that_is_reported_after_a_resume(tmp_path: Path) -> None:
    """Resumed before the best evaluation, and worse from there: the model of a step that was undone is not kept."""
    env, run_dir = environment(tmp_path), tmp_path / "runs/line"
    command = [
        "python", TRAIN, "+recipe=line", "train.epochs=null", "train.steps=8", "scheduler.warmup_steps=0",
        "eval.every=2", "eval.metric=loss", "checkpoint.every=2", "checkpoint.keep=20", "optimizer.lr=0.01",
    ]  # fmt: skip
    done = run(command, tmp_path, env)
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "summary.json").read_text())["kept_at_step"] == 8
    done = run([*command, "optimizer.lr=50", f"resume={run_dir}/checkpoints/step_00000002"], tmp_path, env)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["kept_at_step"] == 2 and "(of step 2, the best)" in done.stdout
    weights = load_file(run_dir / "model/model.safetensors")
    weight, bias = weights["linear.weight"].item(), weights["linear.bias"].item()
    found = [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]
    for row in found:
        assert row["prediction"] == pytest.approx(weight * row["label"] / 2 + bias, abs=1e-4)
    mse = sum((row["prediction"] - row["label"]) ** 2 for row in found) / len(found)
    assert summary["held_out"]["mse"] == pytest.approx(mse, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_the_best_model_is_kept_and_training_stops(tmp_path: Path) -> None:
    """A learning rate of nothing: no evaluation is better than the first after training, which is kept."""
    dev = SHARED / "sst2" / "dev.tsv"
    command = [
        "python", TRAIN, "+recipe=sst2", *TINY_BERT, "model.path=null", f"data.path={dev}", f"data.eval_path={dev}",
        "data.vocab_size=400", "train.epochs=null", "train.steps=40", "eval.every=2", "eval.metric=accuracy",
        "eval.patience=2", "optimizer.lr=1e-30", "scheduler.warmup_steps=0",
    ]  # fmt: skip
    done = run(command, tmp_path, environment(tmp_path))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/sst2/summary.json").read_text())
    assert (summary["steps"], summary["kept_at_step"]) == (6, 2)
    assert len(summary["per_label"]) == 2 and sum(map(sum, summary["confusion"])) == 872
    steps = [row for row in rows(tmp_path / "runs/sst2") if "padding" in row]
    assert all(row["padding"] < 0.5 for row in steps)


def refused(tmp_path: Path, *arguments: str) -> str:
    done = run(["python", TRAIN, *arguments], tmp_path, environment(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error:") and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
    return done.stderr


JSONL = ("+recipe=classify_packages", "data=jsonl", "data.path=rows.jsonl", "data.eval_path=eval.jsonl", *TINY_BERT)
GOOD = "".join(json.dumps({"text": f"text {n}", "label": "ab"[n % 2]}) + "\n" for n in range(40))


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, held_out, arguments, said",
    [
        (GOOD, '{"text": "x", "label": "c"}\n', (), "eval.jsonl:1='c': not in the label set (a, b)"),
        (GOOD, '{"text": "x"}\n', (), "data.label=label: eval.jsonl has no such column"),
        (GOOD, GOOD, ("data.labels=[a,b,c]",), "data.labels=c: a class without an example"),
        (GOOD, GOOD, ("data.overlong=refuse", "data.seq_length=3"), "longer than data.seq_length=3"),
        (GOOD, GOOD, ("data.tokens=t",), "data.tokens=t: sequence_classification does not read it"),
        (GOOD, GOOD, ("data.label=lable",), "data.label=label"),
        (GOOD, GOOD, ("eval.metric=accurracy", "eval.every=5"), "eval.metric=accuracy"),
        (GOOD, GOOD, ("task=translation",), "data.source=source: rows.jsonl has no such column"),
        ('{"text": "x", "label": 1.5}\n', GOOD, (), "must be a name or a whole number"),
    ],
    ids=lambda value: str(value)[-40:],
)  # fmt: skip
def test_bad_rows_and_keys(tmp_path: Path, wrong: str, held_out: str, arguments: tuple, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(wrong)
    (tmp_path / "eval.jsonl").write_text(held_out)
    assert said in refused(tmp_path, *JSONL, *arguments)


@pytest.mark.slow
def test_other_formats_name_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "b.txt").write_text("eins\nzwei\n")
    lines = ("+recipe=multi30k", "data.path=a.txt", "data.target_path=b.txt", "batch.global_size=1")
    assert "3 lines" in refused(tmp_path, *lines) and "2" in refused(tmp_path, *lines)
    (tmp_path / "x.conll").write_text("cat\tO\ndog\n")
    conll = ("+recipe=tag_python", "data=conll", "data.path=x.conll", "data.max_files=null", *TINY_BERT)
    assert "x.conll:2" in refused(tmp_path, *conll)
    (tmp_path / "images.gz").write_bytes(gzip.compress(b"\x00\x00\x08\x03" + bytes(12))[:-4])
    (tmp_path / "labels").write_bytes(b"\x00\x00\x08\x01" + bytes(4))
    idx = ("+recipe=digits", "data=idx", "data.path=images.gz", "data.target_path=labels")
    assert "images.gz" in refused(tmp_path, *idx)
    (tmp_path / "numbers.csv").write_text("x,label\n1,2\ntwo,4\n")
    csv = ("+recipe=line", "data=csv", "data.path=numbers.csv", "data.features=[x]", "batch.global_size=1")
    assert "numbers.csv:3" in refused(tmp_path, *csv)


@pytest.mark.slow
def test_an_encoder_decoder_has_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\n" * 20)
    lines = ("+recipe=multi30k", "data.path=a.txt", "data.target_path=a.txt", "data.vocab_size=300")
    done = run([*launcher("deepspeed", 2), TRAIN, *lines, "parallel.pipeline=2", "batch.global_size=4",
                "batch.accumulation=2"], tmp_path, environment(tmp_path))  # fmt: skip
    assert "error: parallel.pipeline=2: texts are generated by whole models" in done.stderr + done.stdout
