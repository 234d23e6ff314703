"""What the reference shows of a package: what its `__init__` imports from the project; no module below."""

from typing import Any

import griffe

PACKAGES = ("jaxlab", "kernels_pallas")


class Faces(griffe.Extension):
    """The names in a package's face are its public ones: no `__all__` says them again."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self._mark(pkg)

    def _mark(self, module: griffe.Module) -> None:
        for member in module.members.values():
            if isinstance(member, griffe.Alias):
                member.public = member.target_path.startswith(PACKAGES)
            elif isinstance(member, griffe.Module):
                member.public = False
                if member.is_init_module:
                    self._mark(member)
