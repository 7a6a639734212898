"""Ways to choose what is dropped. Importing any of them registers all."""

from . import criteria as criteria
