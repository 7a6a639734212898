"""Which files of the package a module is made of: what its results depend on, and what the tests of the layers read."""

import ast
import functools
from pathlib import Path

from . import files

PACKAGE = files.PACKAGE.name


@functools.cache
def imports_of(path: Path) -> frozenset[Path]:
    """The files of this package that a file imports, in functions too."""
    module = [PACKAGE, *path.relative_to(files.PACKAGE).with_suffix("").parts]
    package = module[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == PACKAGE and (file := _file(name)):
                found.add(file)
    return frozenset(found)


def made_of(*paths: Path) -> list[Path]:
    """These files of the package and all that they import, directly or not."""
    found: set[Path] = set()
    queue = list(paths)
    while queue:
        path = queue.pop()
        if path not in found:
            found.add(path)
            queue += imports_of(path)
    return sorted(found)


def _file(name: list[str]) -> Path | None:
    """The file of "llmdrop_utils.base.files", also when it is given with the name of something inside it."""
    for parts in (name[1:], name[1:-1]):
        path = files.PACKAGE.joinpath(*parts)
        if path.with_suffix(".py").is_file() and parts:
            return path.with_suffix(".py")
    return None
