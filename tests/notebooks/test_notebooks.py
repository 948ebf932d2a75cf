"""Every notebook is committed without outputs and runs from top to bottom in a kernel of its own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from support import kernel, warm

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


class WarmKernels(AsyncKernelManager):
    """Kernels that are forked from the suite's server."""

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        return [sys.executable, kernel.__file__, "-f", self.connection_file]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path: Path) -> None:
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells, 1):
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, f"cell {number}: clear all outputs"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_where_a_user_starts_it(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel stands in notebooks/ of a tree that is linked to this one, so that nothing is written here."""
    for room in ("conf", "recipes", "launch"):
        (tmp_path / room).symlink_to(ROOT / room)
    (tmp_path / "notebooks").mkdir()
    shutil.copy(path, tmp_path / "notebooks")
    for variable in ("XDG_CACHE_HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH"):
        monkeypatch.delenv(variable, raising=False)
    notebook = nbformat.read(tmp_path / "notebooks" / path.name, as_version=4)
    warm.FULL.begin()
    client = NotebookClient(
        notebook,
        timeout=240,
        resources={"metadata": {"path": str(tmp_path / "notebooks")}},
        kernel_manager_class=WarmKernels,
    )
    client.execute()  # CellExecutionError, with the cell and its traceback, when one fails
    kinds = {kind for cell in notebook.cells for out in cell.get("outputs", []) for kind in out.get("data", {})}
    assert "image/png" in kinds, "no picture was shown"
    training = [cell for cell in notebook.cells if "run(request)" in cell.source or "run_ranks(" in cell.source]
    assert training
    for cell in training:
        said = {out.name: out.text for out in cell.outputs if out.output_type == "stream"}
        assert set(said) == {"stdout"} and "held-out loss" in said["stdout"], "the chatter belongs in the run's log"
