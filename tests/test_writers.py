"""All that recipes and launchers write goes through `recipes/durable.py`, or into a place that it gives."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from commands import ROOT

ROOMS = ("conf", "launch", "recipes")
OWN = "recipes/durable.py"
OF_FILES = (
    "write_text", "write_bytes", "fsync", "rename", "renames", "unlink", "rmtree", "mkdir", "makedirs", "ftruncate",
    "truncate", "pwrite", "touch", "symlink_to", "hardlink_to", "copy", "copyfile", "copytree", "copy2", "dump",
    "tofile", "savefig", "save", "save_file", "save_pretrained", "to_parquet", "to_csv", "to_json",
)  # fmt: skip
ALLOWED = {
    ("launch/notebook.py", "open"): "a log, which `durable.log` has begun",
    ("launch/runtime/export.py", "save_pretrained"): "into the scratch folder that `durable.publish` takes",
    ("launch/runtime/export.py", "copy"): "as well",
    ("launch/runtime/plots.py", "savefig"): "to the scratch file of `durable.replacing`",
    ("launch/runtime/standard_streams.py", "open"): "of the null device",
    ("launch/wheelhouse.py", "mkdir"): "in a temporary folder, which is published",
    ("recipes/causal_lm.py", "save_pretrained"): "into an export's scratch folder",
    ("recipes/data/cache.py", "save_pretrained"): "into an entry of the cache before it is published",
    ("recipes/data/image_processor.py", "save_pretrained"): "into an export's scratch folder",
    ("recipes/data/tokenizer.py", "save_pretrained"): "as well, and into a temporary folder for its digest",
    ("recipes/models/pretrained.py", "copyfile"): "into an entry of the cache before it is published",
}
"""(file, call) → where it writes."""


def writers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of the calls that write, remove or rename."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = function.value if isinstance(function, ast.Attribute) else None
        of = owner.id if isinstance(owner, ast.Name) else ""
        if of == "durable":
            continue
        writes = name in OF_FILES and not (name in ("copy", "save", "dump") and of not in ("shutil", "torch", "json"))
        if writes or (name == "open" and _for_writing(node, of)):
            yield node.lineno, name
        elif name == "replace" and owner is not None and len(node.args) == 1 + (of == "os") and not node.keywords:
            yield node.lineno, name  # of a path: a text's has two


def _for_writing(call: ast.Call, of: str) -> bool:
    words = [*call.args, *(word.value for word in call.keywords)]
    if of == "os":
        return any("O_RDWR" in ast.unparse(word) or "O_WRONLY" in ast.unparse(word) for word in words)
    modes = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
    return any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes)


def test_one_module_writes() -> None:
    found = {}
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            if name != OWN:
                for line, call in writers(ast.parse(file.read_text())):
                    found[f"{name}:{line}"] = (name, call)
    wrong = {where: call for where, (name, call) in found.items() if (name, call) not in ALLOWED}
    assert not wrong, f"not through {OWN}: {wrong}"
    assert set(found.values()) == set(ALLOWED), "what is allowed is there"


def test_it_sees_each_kind_of_writer() -> None:
    source = """
path.write_text("")
path.open("w")
path.open(mode="ab")
open(path, "x")
os.open(path, os.O_WRONLY | os.O_CREAT)
os.replace(one, two)
one.replace(two)
shutil.rmtree(folder)
rmtree(folder)
path.unlink(missing_ok=True)
json.dump(value, file)
tensors.save_pretrained(folder)
"""
    assert [line for line, _ in writers(ast.parse(source))] == list(range(2, 14))
    harmless = 'text.replace("a", "b"); path.open(); open(path, "rb"); os.open(path, os.O_RDONLY); json.dumps(1)'
    assert not list(writers(ast.parse(harmless + "; replace(problem, rule=1); values.copy(); value.to('w')")))
