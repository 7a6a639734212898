"""What each notebook needs measured: work items over a profile -> tidy tables.

Here alone do measuring functions meet profiles and the store. A study lists its work, measures what no record holds
yet (with progress and time left), and condenses the records into small tables. Figures and claims read nothing else.
"""

from collections.abc import Callable

from ..models import LocatedModel, locate_available
from ..profiles import Profile
from ..series import known_models
from ..tables import Tables
from .efficiency import kv_cache, speedup
from .quality import drop_curves, joint_drop
from .redundancy import similarity
from .stages import training_stages

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
