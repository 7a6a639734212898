"""Results addressed by what produced them: a finished run is instant, a killed one goes on where it stopped.

A record is one JSON file, `<measurement>/<hash of the key>.json`, holding the key, the value and where the value came
from. The key is a plain dict of everything that determines the value, so a changed input is a different record.
"""

import hashlib
import json
import sys
from pathlib import Path

from . import files


class Store:
    """Records under one folder (by default data/results/records); safe to use from several processes at once."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder or files.RESULTS / "records"

    def path(self, key: dict) -> Path:
        """Where the record of `key` is; `key["measurement"]` names the folder."""
        canonical = json.dumps(key, sort_keys=True, separators=(",", ":"))
        return self.folder / key["measurement"] / f"{hashlib.sha256(canonical.encode()).hexdigest()[:32]}.json"

    def get(self, key: dict) -> dict | None:
        """The record of `key` ("key", "value", "provenance"), or None if it was never measured."""
        path = self.path(key)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            print(f"warning: the record {path} is damaged and is measured again", file=sys.stderr)
            return None
        return record if record.get("key") == key else None

    def value(self, key: dict) -> dict:
        """The stored value of `key`. Raises KeyError if it was never measured."""
        record = self.get(key)
        if record is None:
            raise KeyError(f"nothing is stored for {key}")
        return record["value"]

    def put(self, key: dict, value: dict, provenance: dict) -> None:
        """Store one measured value atomically. Raises LLMDropError if the disk is full."""
        record = {"key": key, "value": value, "provenance": provenance}
        files.write_text(self.path(key), json.dumps(record, sort_keys=True, allow_nan=False))

    def count(self, model: str) -> dict[str, int]:
        """How many values of a model (its identity) are stored, by measurement."""
        counts: dict[str, int] = {}
        for path in sorted(self.folder.glob("*/*.json")):
            with_model = f'"model": {json.dumps(model)}'
            if with_model in path.read_text(encoding="utf-8"):
                counts[path.parent.name] = counts.get(path.parent.name, 0) + 1
        return counts
