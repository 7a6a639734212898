"""What each notebook needs measured: work items over a profile -> tidy tables.

Here alone do measuring functions meet profiles and the store. A study lists its work, measures what no record holds
yet (with progress and time left), and condenses the records into small tables. Figures and claims read nothing else.
"""

from collections.abc import Callable

from ..models.locate import LocatedModel, locate_available
from ..models.series import known_models
from ..report.tables import Tables
from .drop_curves import figures as _f2  # noqa: F401
from .drop_curves import verdicts as _v2  # noqa: F401
from .drop_curves.study import drop_curves
from .joint_drop import figures as _f3  # noqa: F401
from .joint_drop import verdicts as _v3  # noqa: F401
from .joint_drop.study import joint_drop
from .kv_cache import figures as _f6  # noqa: F401
from .kv_cache import verdicts as _v6  # noqa: F401
from .kv_cache.study import kv_cache
from .profile import Profile
from .similarity import figures as _f1  # noqa: F401
from .similarity import verdicts as _v1  # noqa: F401
from .similarity.study import similarity
from .speedup import figures as _f5  # noqa: F401
from .speedup import verdicts as _v5  # noqa: F401
from .speedup.study import speedup
from .training_stages import figures as _f7  # noqa: F401
from .training_stages import verdicts as _v7  # noqa: F401
from .training_stages.study import training_stages

STUDIES: dict[str, Callable[[Profile, bool], Tables]] = {  # notebook -> its study
    "01_similarity": similarity,
    "02_drop_curves": drop_curves,
    "03_joint_drop": joint_drop,
    "05_speedup": speedup,
    "06_kv_cache": kv_cache,
    "07_training_stages": training_stages,
}


def models_of(notebook: str, profile: Profile) -> tuple[list[LocatedModel], dict[str, str]]:
    """The models that a notebook's results depend on, and which cannot be had (name -> reason)."""
    return known_models(profile.stages.series) if STUDIES.get(notebook) is training_stages else locate_available(profile.models)
