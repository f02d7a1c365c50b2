"""What a study has measured so far: a JSON file a run, so that a second start goes on where the first one ended."""

import json
from pathlib import Path

from model.checkpoint import replacing


class Store:
    """The files of one study, runs/NAME.json under its directory.

    about: what every run depends on beside its own fields. A file that was made with something else is an error, not
    an answer.
    """

    def __init__(self, directory: str | Path, about: dict):
        self.directory = Path(directory)
        self.about = about

    def read(self, name: str) -> dict | None:
        """What was measured under a name, or None. Raises ValueError for a file of another study or a damaged one."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            about = content["about"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged: remove it, and it is measured again") from None
        differing = [key for key in {**about, **self.about} if about.get(key) != self.about.get(key)]
        if differing:
            named = ", ".join(f"{key} {about.get(key)} and not {self.about.get(key)}" for key in differing)
            raise ValueError(f"{self.directory} holds a study with {named}: choose another --out, or remove it")
        return content["measured"]

    def write(self, name: str, measured: dict) -> None:
        """Keeps what was measured; the file is whole or not there."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as (file,):
            file.write_text(json.dumps({"about": self.about, "measured": measured}, indent=1) + "\n", encoding="utf-8")

    def _path(self, name):
        return self.directory / "runs" / f"{name}.json"
