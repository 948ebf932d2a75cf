"""docs/configuration.md is what the schema, the rules and the YAML files say."""

from __future__ import annotations

from conf.overrides import CONF_DIR, groups, schema_keys
from conf.reference import ORDER, fields, legal, reference


def test_the_committed_document_is_current() -> None:
    committed = (CONF_DIR.parent / "docs" / "configuration.md").read_text()
    assert committed == reference(), "run: python -m conf.reference > docs/configuration.md"


def test_every_group_choice_and_key_is_in_it() -> None:
    text = reference()
    known = groups()
    assert set(ORDER) == set(known)
    for choice in (choice for choices in known.values() for choice in choices):
        assert f"| `{choice}` | " in text
    sections = {key.split(".")[0] for key in schema_keys() if "." in key}
    for key in set(schema_keys()) - sections:
        assert f"| `{key}` | " in text, key


def test_a_docstring_belongs_to_the_field_above_it() -> None:
    source = (
        'class Section:\n    """What."""\n    a: int = 0\n    b: str | None = None\n    """Of b\n    alone."""\n'
        "    c: list[int] = field(default_factory=list)\n"
    )
    text, bases, members = fields(source)["Section"]
    assert (text, bases) == ("What.", [])
    assert [(one.name, one.type, one.default, one.text) for one in members] == [
        ("a", "int", "0", ""),
        ("b", "str | None", "null", "Of b alone."),
        ("c", "list[int]", "[]", ""),
    ]


def test_legal_values_are_those_of_the_rules() -> None:
    assert legal("data.held_out") == "0 < value < 1"
    assert legal("optimizer.lr") == "> 0"
    assert legal("train.steps") == "≥ 1"
    assert legal("device") == "auto, cpu, cuda"
    assert legal("data.path") == ""
