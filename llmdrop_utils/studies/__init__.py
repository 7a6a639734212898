"""What each notebook needs measured: work items over a profile -> tidy tables; and what is made of them.

Each notebook has a folder: study.py (what is measured -> tables), figures.py and verdicts.py (from the tables alone). They
register themselves (`@study`, `@section`, `@figure`, `@check`, `@advice`) when they are imported, which happens here.
"""

import importlib
import pkgutil

for _folder in pkgutil.iter_modules(__path__):
    if _folder.ispkg:
        for _part in ("study", "figures", "verdicts"):
            importlib.import_module(f"{__name__}.{_folder.name}.{_part}")
