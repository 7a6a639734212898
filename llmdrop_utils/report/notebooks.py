"""Execute notebooks with papermill and keep rendered copies without anything that changes from run to run."""

import logging
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

from ..base import files
from ..base.errors import LLMDropError
from ..base.files import disk_error, shown, write_text
from ..models.names import label, local_path

KERNEL = "python3"  # what every source notebook names; it is always this very interpreter (see `_own_kernel`)
KERNEL_LOG = "kernel.log"
QUIET = {  # the kernel talks over local sockets; ipykernel's and the debugger's notes about that are not for the reader
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "PYTHONWARNINGS": "ignore",
    "TQDM_MININTERVAL": "10",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def choose_notebooks(numbers: str | None) -> list[Path]:
    """Notebook sources in order. Raises LLMDropError for a number that no notebook has."""
    available = {path.name[:2]: path for path in sorted(files.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    wanted = re.split(r"[\s,]+", numbers.strip()) if numbers and numbers.strip() else list(available)
    wanted = [number.zfill(2) for number in wanted]
    for number in wanted:
        if number not in available:
            have = ", ".join(path.stem for path in available.values())
            raise LLMDropError(f"There is no notebook {number!r}. There are: {have}. Give numbers, such as NOTEBOOKS=01.")
    return [available[number] for number in dict.fromkeys(wanted)]


def check_parameters(notebook: Path, parameters: dict) -> None:
    """Raise LLMDropError if a notebook does not declare one of the parameters (papermill itself only warns)."""
    import papermill

    declared = papermill.inspect_notebook(str(notebook))
    for name in parameters:
        if name not in declared:
            raise LLMDropError(f"The notebook {notebook.name} has no parameter {name!r}. It declares: {', '.join(declared)}.")


def run_notebook(source: Path, rendered: Path, parameters: dict) -> None:
    """Execute a notebook and put the executed copy at `rendered`, without anything that changes from run to run.

    Raises LLMDropError if a cell fails; what was executed is then kept beside `rendered` as *.failed.ipynb.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError

    check_parameters(source, parameters)
    failed = rendered.with_suffix(".failed.ipynb")
    rendered.parent.mkdir(parents=True, exist_ok=True)
    for path in (rendered, failed):  # no older copy may pass for this run's
        path.unlink(missing_ok=True)
    os.environ |= QUIET
    logging.getLogger("papermill").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        partial = Path(folder) / rendered.name  # of this process alone: two runs may meet
        try:
            papermill.execute_notebook(
                str(source),
                str(partial),
                parameters,
                kernel_name=KERNEL,
                kernel_manager_class=_own_kernel(Path(folder)),
                progress_bar=False,
                cwd=str(files.ROOT),
                extra_arguments=["--IPKernelApp.log_level=ERROR"],
            )
        except papermill.PapermillExecutionError as error:
            _keep(partial, failed)
            raise LLMDropError(
                f"{source.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}\n"
                f"What was executed is kept in {shown(failed)}."
            ) from None
        except (DeadKernelError, OSError) as error:
            _keep(partial, failed)
            if isinstance(error, OSError):
                raise disk_error(error, rendered) from error
            log = Path(folder) / KERNEL_LOG
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
            raise LLMDropError(
                f"The kernel of {source.name} died; the system may have stopped it because memory ran out. "
                f"{f'Its last words: {said[-1]} ' if said else ''}What was executed is kept in {shown(failed)}."
            ) from error
        page = nbformat.read(partial, as_version=4)
        _strip(page, parameters)
        write_text(rendered, nbformat.writes(page) + "\n")


def _own_kernel(folder: Path) -> type:
    """Starts this very interpreter as the kernel, whatever kernels, folders and profiles of Jupyter and IPython a user has.

    What the kernel process prints itself, as when it is interrupted, goes to a file.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class OwnKernel(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(
                argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                language="python",
                env={"IPYTHONDIR": str(folder)},
                metadata={"kernel_provisioner": {"provisioner_name": "local-provisioner"}},
            )

        async def start_kernel(self, **how) -> None:  # type: ignore[override]
            with (folder / KERNEL_LOG).open("ab") as log:
                await super().start_kernel(**how, stderr=log)

    return OwnKernel


def _keep(partial: Path, failed: Path) -> None:
    if partial.exists():
        write_text(failed, partial.read_text(encoding="utf-8"))


def _strip(page, parameters: dict) -> None:
    """Remove what differs from run to run and from machine to machine: times, papermill's notes, paths."""
    page.metadata = {"kernelspec": page.metadata["kernelspec"], "language_info": {"name": "python"}}
    for cell in page.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if tag in ("parameters", "injected-parameters")]
        cell.metadata = {"tags": tags} if tags else {}
        if "injected-parameters" in tags:
            cell.id = "injected-parameters"
            model = str(parameters.get("MODEL", ""))
            if local_path(model):
                cell.source = cell.source.replace(model, label(model))
