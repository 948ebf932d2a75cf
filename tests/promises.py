"""What is promised, how it is tested and by which command: `python tests/promises.py` writes docs/promises.md.

The number of cases is what pytest collects of the files (or tests) that a row names, as `make test` runs them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "promises.md"
PROMISES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "The gradients of one process, in every layout and for every accumulation",
        "parameter by parameter, fp32, 1e-5",
        (
            "distributed/test_parity.py",
            "distributed/test_layouts.py",
            "distributed/test_task_layouts.py",
            "distributed/test_encoders.py",
            "distributed/test_router_loss.py",
        ),
    ),
    (
        "Any family in a layout that docs/models.md allows",
        "the same, family by family",
        ("distributed/test_layout_models.py",),
    ),
    (
        "Resume at any layout, with the order of the data intact",
        "pairs of layouts; losses and weights of the unbroken run",
        ("distributed/test_resume.py", "distributed/test_resume_tasks.py", "launch/test_resume_commands.py"),
    ),
    (
        "The user's value wins for every key, in whatever form it is written",
        "random trees and forms against a short rule",
        ("conf/test_conf_changes.py",),
    ),
    (
        "Every layout reads the weights that transformers reads; nothing is made up",
        "stray files, indices, variants, lacking and misshapen tensors",
        ("recipes/models/test_weight_files.py", "recipes/models/test_build.py"),
    ),
    (
        "Quantised weights are read with their scales, or refused before the start",
        "values against the formats' definition",
        ("recipes/models/test_weight_files.py", "recipes/models/test_model_folder.py", "launch/test_quantised.py"),
    ),
    (
        "What a model's own forward adds to the loss counts, or is refused",
        "gradients of mixtures; every family's source",
        ("recipes/models/test_own_losses.py", "distributed/test_router_loss.py"),
    ),
    (
        "No row vanishes without a word",
        "every reason, first file and line, the bound",
        ("recipes/data/test_data_changes.py",),
    ),
    (
        "Chats are learned as a model would see them",
        "templates of eight kinds, spans verified by rendering again",
        ("recipes/data/test_data_chats.py",),
    ),
    (
        "Text that a model cannot read is said or refused",
        "scripts, unknown tokens, unreachable targets; false alarms",
        ("recipes/data/test_data_readable.py", "recipes/test_unreadable.py"),
    ),
    (
        "Nothing that is loaded runs code of its own",
        'hostile folders with "y" on stdin; no other call in the sources',
        ("recipes/test_hub.py",),
    ),
    (
        "The locale decides nothing; a wrong byte has its file, line and place",
        "encodings, marks, every call in the sources",
        ("recipes/data/test_data_streams.py", "test_encodings.py"),
    ),
    (
        "A closed, full or vanished terminal ends no run",
        "pipes, descriptors, SIGHUP",
        ("launch/test_standard_streams.py",),
    ),
    (
        "No home, no cache, few descriptors, odd paths: works or says what to set",
        "one run against the plain one",
        ("launch/test_surroundings.py",),
    ),
    (
        "Ranks of one machine listen on its loopback interface alone",
        "the kernel's table of sockets",
        ("distributed/test_rendezvous.py",),
    ),
    (
        "No file ends a reader in anything but a refusal, soon and within bounds",
        "a corpus of hostile files over all readers, tokenizers, configurations and chat templates",
        (
            "recipes/data/test_hostile_files.py",
            "recipes/data/test_odd_templates.py",
            "recipes/models/test_hostile_configurations.py",
        ),
    ),
    (
        "A byte that changed is noticed: checkpoints, cache, exported models",
        "each byte flipped (each thirteenth; all by `make test-all`)",
        ("faults/test_every_byte.py",),
    ),
    (
        "A write that fails leaves the earlier file, and whole lines; one module writes",
        "failures and short writes at each operation of that module; every other writer in the sources",
        ("recipes/test_durable.py", "test_writers.py"),
    ),
    (
        "Any operation on the disk may fail: the run goes on, or stops with a message, and is resumed to the same bits",
        "a dozen kinds, of two ranks, libraries included (each of 1,400 by `make test-all`); a full disk",
        ("faults/test_disk.py", "faults/test_disk_of_commands.py"),
    ),
    (
        "A loss of power loses nothing that was said to be saved",
        "a recorded run, broken off behind each operation, what was not synchronised lost, halved or reordered",
        ("faults/test_disk.py",),
    ),
    (
        "A signal in any phase loses nothing that docs/signals.md says is kept",
        "the table, executed",
        ("faults/test_signals.py", "launch/test_interruption.py"),
    ),
    (
        "Deaths of ranks lose no step that was saved, and leave no process",
        "kills in every phase, damage of checkpoints",
        ("faults/test_faults.py",),
    ),
    (
        "A supervised run goes on, and ends with its supervisor",
        "deaths of either",
        ("launch/test_supervise.py", "launch/test_supervisor.py"),
    ),
    (
        "Checkpoints of every release resume",
        "golden checkpoints",
        (
            "launch/test_versions.py",
            "golden/test_golden.py",
        ),
    ),
    (
        "A mistake is a message, at once",
        "every rule and its legal neighbour; whole commands",
        ("conf/test_conf_rules.py", "launch/test_bad_requests.py", "launch/test_odd_requests.py"),
    ),
    (
        "The plan says before the launch what a run needs",
        "memory and traffic against real runs",
        ("launch/test_planner_memory.py", "launch/test_planner_arithmetic.py", "launch/test_plan_layouts.py"),
    ),
    (
        "An export loads with transformers and gives the logits of training",
        "every kind of layout",
        ("launch/test_export.py",),
    ),
    ("A broken promise would be noticed", "each deliberate break fails its tests", ("mutations/test_mutations.py",)),
)


def files() -> list[str]:
    """Every file that a row names, once."""
    return list(dict.fromkeys(f"tests/{file}" for _, _, named in PROMISES for file in named))


def collected() -> dict[str, int]:
    """File → cases that `make test` runs of it."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files()]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    counts = dict.fromkeys(files(), 0)
    for line in said.splitlines():
        if (file := line.partition("::")[0]) in counts and "::" in line:
            counts[file] += 1
    return counts


def page(counts: dict[str, int]) -> str:
    """Markdown."""
    lines = [
        "# What is promised, and how it is tested",
        "",
        "Written by `python tests/promises.py`. The cases are those of `make test`; `make test-all` has more:",
        "[the suite](../tests/README.md), [what was proven](proof.md).",
        "",
        "| promise | how it is tested | cases | command |",
        "| --- | --- | ---: | --- |",
    ]
    for promise, how, named in PROMISES:
        paths = [f"tests/{file}" for file in named]
        command = f"`pytest {' '.join(paths)}`"
        lines.append(f"| {promise} | {how} | {sum(counts[path] for path in paths):,} | {command} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    before, now = PAGE.read_text(encoding="utf-8"), page(collected())
    PAGE.write_text(now, encoding="utf-8")
    changed = set(now.splitlines()) - set(before.splitlines())
    print(f"{PAGE.relative_to(ROOT)}: {len(changed)} of {len(PROMISES)} rows changed")
