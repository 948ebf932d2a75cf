"""launch/wheelhouse.py: what a machine without a network needs, no more and no less."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from commands import ROOT, environment, run

from conf.errors import RequestError
from launch import wheelhouse
from launch.wheelhouse import House, Request, Target, listed, pins, read

INDEX = {
    # name: (version, what its wheel needs, its tag, behind "source" where there is only an archive to build)
    "engine": ("1.0", ("maths>=2", "old; python_version < '3.10'", "new; python_version > '3.11'"),
               "source py3-none-any"),
    "maths": ("2.5", ("words[fast]",), "cp312-cp312-manylinux2014_x86_64"),
    "words": ("0.3", ("quick; extra == 'fast'", "slow; extra == 'slow'"), "py3-none-any"),
    "new": ("7", (), "py3-none-any"),
    "quick": ("1.1", (), "py3-none-any"),
    "compiled": ("1.0", (), "source cp311-cp311-linux_x86_64"),
}  # fmt: skip


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """(pinned requirements, skip, have) → the house, filled from an index of our own."""

    def pip(verb: str, *words: str) -> str:
        name = words[-1].partition("=")[0].partition(">")[0]
        if name not in INDEX:
            return f"No matching distribution found for {words[-1]}"
        version, needs, tag = INDEX[name]
        if "source" in tag and verb == "download":
            return "No matching distribution found"
        stem = f"{name}-{version}"
        with zipfile.ZipFile(Path(words[-2]) / f"{stem}-{tag.removeprefix('source ')}.whl", "w") as archive:
            lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
            archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(["Metadata-Version: 2.1", *lines, "", "Text."]))
        return ""

    monkeypatch.setattr(wheelhouse, "pip", pip)

    def filled(*pinned: str, skip: tuple[str, ...] = (), have: str = "") -> House:
        monkeypatch.setattr(wheelhouse, "pins", lambda tests: [wheelhouse.Requirement(pin) for pin in pinned])
        target = Target("3.12", "manylinux_2_28_x86_64")
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        made = House(Request(folder, target, frozenset(skip), listed(have), (), False), folder)
        made.fill()
        return made

    return filled


def test_what_a_package_needs_comes_with_it(house) -> None:
    """Markers are those of the other machine, extras count, a source archive is built."""
    assert set(house("engine==1.0").wheels) == {"engine", "maths", "words", "new", "quick"}


def test_what_is_there_or_skipped_is_left_out_with_its_needs(house) -> None:
    made = house("engine==1.0", skip=("new",), have="maths 2.7\n")
    assert set(made.wheels) == {"engine"}
    assert made.left_out == {"new": "named by skip", "maths": "there already 2.7"}


def test_what_is_there_in_a_version_that_does_not_serve_is_taken(house) -> None:
    assert "maths" in house("engine==1.0", have="maths==1.9").wheels
    assert "torch" not in house("engine==1.0", have="torch 2.11.0+cu130").wheels
    # It is met first by its name alone, and only then by who needs a newer one.
    assert "maths" in house("maths==2.5", "engine==1.0", have="maths==1.9").wheels


def test_what_cannot_be_had_is_refused(house) -> None:
    with pytest.raises(RequestError, match="for this machine") as refused:
        house("compiled==1.0")
    assert "skip=compiled" in refused.value.render()
    with pytest.raises(RequestError, match="missing==1"):
        house("missing==1")


def test_lists_of_what_is_there() -> None:
    printed = "Package   Version\n--------- -------\ntorch     2.11.0+cu130\nPyYAML 6.0\n"
    frozen = "torch==2.11.0+cu130\ntriton @ file:///somewhere\nhuggingface_hub==1.33.0\n-e git+https://x\n"
    assert listed(printed) == {"package": "", "torch": "2.11.0", "pyyaml": "6.0"}
    assert listed(frozen) == {"torch": "2.11.0", "triton": "", "huggingface-hub": "1.33.0"}
    assert listed("einops\n") == {"einops": ""}


def test_platforms_that_serve() -> None:
    platforms = Target("3.12", "manylinux_2_17_x86_64").platforms()
    assert {"manylinux_2_17_x86_64", "manylinux_2_5_x86_64", "manylinux2014_x86_64", "linux_x86_64"} <= set(platforms)
    assert "manylinux_2_18_x86_64" not in platforms
    assert Target("3.12", "macosx_14_0_arm64").environment()["platform_machine"] == "arm64"


def test_packages_for_tests_only_are_asked_for() -> None:
    assert "pytest" in {pin.name for pin in pins(tests=True)} - {pin.name for pin in pins(tests=False)}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("python=3", "python=3.12"),
        ("platform=linux", "platform=manylinux_2_28_x86_64"),
        ("skip=torhc", "skip=torch"),
        ("have=nowhere.txt", "No such file"),
        ("out={}", "holds other things than wheels"),
        ("also==", "also=liger-kernel"),
        ("pyhton=3.12", "not understood"),
    ],
)
def test_wrong_requests(words: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(RequestError) as refused:
        read([words.format(tmp_path)])
    assert says in refused.value.render()


@pytest.mark.slow
def test_without_a_network_nothing_is_half_made(tmp_path: Path) -> None:
    """The command itself and the real pip, which has no index here: an error that names the package, and no folder."""
    env = environment(tmp_path / "cache", PIP_NO_INDEX="1")
    done = run([sys.executable, ROOT / "launch" / "wheelhouse.py", "skip=torch"], tmp_path, env, cold=True)
    assert done.returncode == 2 and "deepspeed" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] in ([], ["cache"])


def test_a_place_that_cannot_be_written_is_named() -> None:
    """Before anything is fetched or measured; /proc takes no folder, of root's neither."""
    from benchmarks import gpu
    from launch import wheelhouse

    for main, words in ((wheelhouse.main, ["out=/proc/x"]), (gpu.main, ["out=/proc/x", "device=cpu", "size=tiny"])):
        with pytest.raises(RequestError, match=r"out=/proc/x: .*written"):
            main(words)
