"""Hugging Face's package `kernels` behind ours of the same name, so that those who import from it still can.

transformers imports from whichever `kernels` comes first on the path. In a checkout that is ours; submodules and names
that only the other one has are then looked for there. Copies under another name do without this file.
"""

import importlib.util
import os
import pkgutil
import sys
from importlib.machinery import PathFinder


class Namesake:
    """The next module of a package's name on the path; it runs when the first name is looked for in it, and once.

    name, path    `__name__` and `__path__` of our package
    path          what `__path__` must be, so that submodules which we lack are found in the other package
    """

    def __init__(self, name, path):
        own = os.path.realpath(path[0])
        self.name, self.directory, self.module = name, own, None
        self.path = [path[0], *(p for p in pkgutil.extend_path(path, name)[1:] if os.path.realpath(p) != own)]
        parent = sys.modules.get(name.rpartition(".")[0])
        above = sys.path if parent is None else parent.__path__
        self.search = [p for p in above if os.path.realpath(p) != os.path.dirname(own)]

    def attribute(self, name):
        """The other module's attribute of this name. Raises AttributeError."""
        # `from . import checks` asks here before it imports our own submodule
        ours = any(os.path.exists(os.path.join(self.directory, file)) for file in (name, f"{name}.py"))
        if not name.startswith("__") and not ours and hasattr(other := self._loaded(), name):
            return getattr(other, name)
        raise AttributeError(f"module {self.name!r} has no attribute {name!r}")

    def _loaded(self):
        """The module, executed; None if there is none."""
        if self.module is None:
            spec = PathFinder.find_spec(self.name, self.search)
            if spec is None or spec.origin is None:  # a directory without code
                return None
            self.module = importlib.util.module_from_spec(spec)  # before it runs: its imports may ask for names again
            try:
                spec.loader.exec_module(self.module)
            except BaseException:
                self.module = None
                raise
        return self.module
