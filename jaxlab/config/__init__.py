"""The one config system: frozen dataclasses, filled from YAML files and from the command line."""

from jaxlab.config.load import Overrides, Source, build, dump, load, replace, to_dict, to_plain
from jaxlab.config.schema import suggestion

__all__ = ["Overrides", "Source", "build", "dump", "load", "replace", "suggestion", "to_dict", "to_plain"]
