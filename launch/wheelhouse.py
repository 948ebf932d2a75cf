"""A folder of wheels for a machine without a network: `make wheelhouse`.

    python launch/wheelhouse.py [out=wheelhouse] [python=3.12] [platform=manylinux_2_28_x86_64] [skip=torch,triton]
        [have=THERE.txt] [also=liger-kernel] [tests=false]

It is made where there is a network, for the Python and platform of the machine where there is none, from
requirements.txt and all that its packages need. Packages named by `skip` are left out. `have` is what `pip freeze` or
`pip list` printed on that machine: what is there already, in a version that serves, is left out too. `also` adds
packages that nothing here needs.
"""

from __future__ import annotations

import email.parser
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from conf.errors import Problem, RequestError
from launch.runtime.request import run_command, split_arguments
from recipes.durable import publish

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python launch/wheelhouse.py"
OWN = {"out": "wheelhouse", "python": "3.12", "platform": "manylinux_2_28_x86_64", "skip": "", "have": "", "also": "",
       "tests": "false"}  # fmt: skip
FOR_TESTS = "Notebooks, tests, checks"
"""The section of requirements.txt that training needs nothing of."""
SKIPPED = "named by skip"
MANYLINUX = re.compile(r"manylinux_2_(\d+)_(\w+)")
LEGACY = {5: "manylinux1", 12: "manylinux2010", 17: "manylinux2014"}
"""Older names of manylinux_2_N, for which pip does not know that they mean the same."""
MIB = 2**20


@dataclass(frozen=True)
class Target:
    """The machine without a network. python: "3.12". platform: a tag of pip's, "manylinux_2_28_x86_64"."""

    python: str
    platform: str

    def platforms(self) -> list[str]:
        """All tags that it can install: pip takes each by its letter."""
        found = MANYLINUX.fullmatch(self.platform)
        if not found:
            return [self.platform]
        newest, machine = int(found[1]), found[2]
        tags = [f"manylinux_2_{minor}_{machine}" for minor in range(newest, 4, -1)]
        return [*tags, *(f"{name}_{machine}" for minor, name in LEGACY.items() if minor <= newest), f"linux_{machine}"]

    def options(self) -> list[str]:
        """For `pip download`."""
        options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", self.python]
        return [*options, *(word for platform in self.platforms() for word in ("--platform", platform))]

    def environment(self) -> dict[str, str]:
        """What the markers of requirements see there."""
        system = "Darwin" if self.platform.startswith("macosx") else "Linux"
        machine = self.platform.rpartition("_")[2] if "x86_64" not in self.platform else "x86_64"
        return {
            "python_version": self.python, "python_full_version": f"{self.python}.0", "implementation_name": "cpython",
            "platform_python_implementation": "CPython", "platform_system": system, "platform_machine": machine,
            "sys_platform": "darwin" if system == "Darwin" else "linux", "os_name": "posix", "extra": "",
        }  # fmt: skip


@dataclass
class Wanted:
    """One package. specifier: what all that need it ask for. pinned: its version in requirements.txt, or as here."""

    name: str
    specifier: SpecifierSet = field(default_factory=SpecifierSet)
    extras: set[str] = field(default_factory=set)
    pinned: str = ""

    def requirement(self) -> str:
        """For pip."""
        return f"{self.name}=={self.pinned}" if self.pinned else f"{self.name}{self.specifier}"


@dataclass(frozen=True)
class Request:
    """A checked request. have: canonical name → version there, "" where it is not known."""

    out: Path
    target: Target
    skip: frozenset[str]
    have: dict[str, str]
    also: tuple[Requirement, ...]
    tests: bool


def read(argv: list[str]) -> Request:
    """Check the arguments. Raises RequestError with all problems."""
    extra, own = split_arguments(argv, OWN)
    problems = [Problem(word, "", "not understood", f"{COMMAND} out=wheelhouse") for word in extra]
    if not re.fullmatch(r"3\.\d+", own["python"]):
        problems.append(Problem("python", own["python"], "a version of CPython, major.minor", "python=3.12"))
    if not re.fullmatch(r"(manylinux|musllinux|macosx|linux)_?\w*_(x86_64|aarch64|arm64|i686|ppc64le|s390x)",
                        own["platform"]):  # fmt: skip
        rule = "a platform tag of pip's, as `pip debug --verbose` there lists them"
        problems.append(Problem("platform", own["platform"], rule, "platform=manylinux_2_28_x86_64"))
    if own["tests"] not in ("true", "false"):
        problems.append(Problem("tests", own["tests"], "true or false", "tests=false"))
    have: dict[str, str] = {}
    if own["have"]:
        try:
            have = listed(Path(own["have"]).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            rule = f"what `pip freeze` printed there: {getattr(error, 'strerror', None) or 'no text'}"
            problems.append(Problem("have", own["have"], rule, "have=THERE.txt"))
    out = Path(own["out"]).expanduser()
    if out.exists() and not (out.is_dir() and all(file.suffix == ".whl" for file in out.iterdir())):
        problems.append(Problem("out", own["out"], "is there, and holds other things than wheels", "out=wheelhouse"))
    if not out.absolute().parent.is_dir():
        problems.append(Problem("out", own["out"], "no such folder", f"out={out.name}"))
    skip = frozenset(str(canonicalize_name(name)) for name in own["skip"].split(",") if name)
    known = {str(canonicalize_name(name)) for one in metadata.distributions() if (name := one.metadata["Name"])}
    known |= {requirement.name for requirement in pins(tests=True)}
    for name in sorted(skip - known - {"triton"} - have.keys()):
        nearest = get_close_matches(name, known, 1) or ["torch"]
        problems.append(Problem("skip", name, "nothing that is needed has this name", f"skip={nearest[0]}"))
    also = []
    for word in filter(None, own["also"].split(",")):
        try:
            also.append(Requirement(word))
        except InvalidRequirement:
            problems.append(Problem("also", word, "a package, as pip takes it", "also=liger-kernel"))
    if problems:
        raise RequestError(problems)
    return Request(out, Target(own["python"], own["platform"]), skip, have, tuple(also), own["tests"] == "true")


def listed(text: str) -> dict[str, str]:
    """Canonical name → version of what `pip freeze` or `pip list` printed. Bare names, a line each, have version ""."""
    found = {}
    for line in text.splitlines():
        if not (match := re.match(r"([A-Za-z0-9][\w.-]*)(?:\s*==\s*|\s+@\s+|\s+|$)(\S*)", line.strip())):
            continue
        version = re.sub(r"[+].*", "", match[2])  # 2.11.0+cu130 serves where 2.11.0 does
        found[str(canonicalize_name(match[1]))] = version if re.match(r"\d", version) else ""
    return found


def pins(tests: bool) -> list[Requirement]:
    """The lines of requirements.txt; without `tests` not those of the section that is for tests."""
    found, section = [], ""
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        section = line.removeprefix("# ") if line.startswith("# ") else section
        words = line.partition("#")[0].strip()
        if words and (tests or section != FOR_TESTS):
            found.append(Requirement(words))
    return found


class House:
    """What belongs into the folder, found by reading the very wheels that the other machine will install."""

    def __init__(self, request: Request, folder: Path):
        self._request, self._folder = request, folder
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        allowed = map(Requirement, tomllib.loads(text)["project"]["dependencies"])
        self._ranges = {str(canonicalize_name(one.name)): one.specifier for one in allowed}
        self._here = {
            str(canonicalize_name(one.metadata["Name"])): one.version.partition("+")[0]
            for one in metadata.distributions()
        }
        self._wanted: dict[str, Wanted] = {}
        self.wheels: dict[str, Path] = {}
        self.left_out: dict[str, str] = {}
        """Name → why."""

    def fill(self) -> None:
        """Fetch all of requirements.txt and what that needs. Raises RequestError when something cannot be had."""
        todo = []
        for pin in pins(self._request.tests):
            (exact,) = pin.specifier
            name = str(canonicalize_name(pin.name))
            self._wanted[name] = Wanted(name, extras=set(pin.extras), pinned=exact.version)
            todo.append(name)
        for more in self._request.also:
            name = str(canonicalize_name(more.name))
            self._wanted.setdefault(name, Wanted(name, more.specifier, set(more.extras)))
            todo.append(name)
        while todo:
            for name in todo:  # which grows
                todo += self._take(name)
            # What was there already may not serve any more, now that all who need it are known.
            todo = [name for name, why in self.left_out.items() if why != SKIPPED and not self._serves(name)]
            for name in todo:
                del self.left_out[name]

    def _take(self, name: str) -> list[str]:
        """Fetch a package unless it is left out. Returns the names that are to be looked at because of it."""
        one = self._wanted[name]
        if name not in self.wheels:
            if name in self._request.skip:
                self.left_out[name] = SKIPPED
            elif self._serves(name):
                self.left_out[name] = f"there already {self._request.have[name]}".strip()
            if name in self.left_out:
                return []
            if not one.pinned and name in self._here and one.specifier.contains(self._here[name], True):
                one.pinned = self._here[name]  # what was tested together
            self.wheels[name] = fetch(one, self._request.target, self._folder)
        more = []
        for need in needs(self.wheels[name], one.extras, self._request.target):
            other = str(canonicalize_name(need.name))
            new = other not in self._wanted
            known = self._wanted.setdefault(other, Wanted(other))
            if new or not set(need.extras) <= known.extras:
                more.append(other)
            known.extras |= set(need.extras)
            known.specifier &= need.specifier
        return more

    def _serves(self, name: str) -> bool:
        """Whether it is there already, in a version that pyproject.toml and those who need it allow."""
        version = self._request.have.get(name)
        if not version:
            return version is not None
        known = self._ranges.get(name, SpecifierSet()), self._wanted[name].specifier
        return all(specifier.contains(version, True) for specifier in known)


def needs(wheel: Path, extras: Iterable[str], target: Target) -> list[Requirement]:
    """What a wheel needs on the other machine."""
    with zipfile.ZipFile(wheel) as archive:
        file = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        facts = email.parser.Parser().parsestr(archive.read(file).decode())
    found = []
    for line in facts.get_all("Requires-Dist") or []:
        need = Requirement(line)
        environments = [target.environment() | {"extra": extra} for extra in ("", *extras)]
        if need.marker is None or any(need.marker.evaluate(environment) for environment in environments):
            found.append(need)
    return found


def fetch(one: Wanted, target: Target, folder: Path) -> Path:
    """The wheel of a package, now in `folder`; a source archive is built. Raises RequestError when neither can be."""
    before = set(folder.iterdir())
    said = pip("download", "--no-deps", *target.options(), "-d", str(folder), one.requirement())
    built = bool(said)
    if built and (why := pip("wheel", "--no-deps", "--use-pep517", "-w", str(folder), one.requirement())):
        rule = (
            f"pip has no wheel of it for Python {target.python} on {target.platform} ({said}) and builds none ({why})"
        )
        raise RequestError(Problem(one.name, one.requirement(), rule, f"skip={one.name}"))
    (wheel,) = set(folder.iterdir()) - before
    if built and not wheel.name.endswith("-none-any.whl"):
        rule = f"there is only a source archive, and built here it is for this machine: {wheel.name}"
        raise RequestError(Problem(one.name, one.requirement(), rule, f"skip={one.name}, and build it there"))
    print(f"{wheel.stat().st_size / MIB:8.1f} MiB  {wheel.name}", flush=True)
    return wheel


def pip(*words: str) -> str:
    """Run pip. Returns "" when all went well, else the last line that tells why."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (lines or done.stderr.splitlines() or ["it ended with an error"])[-1].removeprefix("ERROR: ")


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    request = read(argv)
    try:
        scratch = tempfile.TemporaryDirectory(dir=request.out.absolute().parent, prefix=".wheelhouse_")
    except OSError as error:
        rule = f"nothing can be written beside it ({error.strerror})"
        raise RequestError(Problem("out", str(request.out), rule, "out=wheelhouse")) from None
    with scratch as folder:
        made = Path(folder) / "wheels"
        made.mkdir()
        house = House(request, made)
        house.fill()
        total = sum(file.stat().st_size for file in made.iterdir())
        publish(made, request.out)  # nothing half-made is ever there
    for name, why in sorted(house.left_out.items()):
        print(f"left out      {name}: {why}")
    print(f"{len(house.wheels)} wheels, {total / MIB:.1f} MiB, in {request.out}")
    print("on the other machine, in this repository:\n")
    print(f"  python{request.target.python} -m pip install --no-index --no-deps --target site {request.out.name}/*.whl")
    print('  export PYTHONPATH="$PWD/site" PATH="$PWD/site/bin:$PATH"')
    return 0


if __name__ == "__main__":
    run_command(main)
