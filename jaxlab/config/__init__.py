"""The one config system: frozen dataclasses, filled from YAML files and from the command line."""

from jaxlab.config.command_line import from_mapping, is_option, resolve, take_option
from jaxlab.config.loading import Overrides, Source, build, dump, load, replace, to_dict, to_plain
from jaxlab.config.schema import (
    ABSENT,
    KIND,
    OTHERS,
    POSITIONAL,
    REPEATED,
    Field,
    describe,
    fields_of,
    groups,
    is_list,
    kind_of,
    leaves,
    members,
    suggestion,
    variants,
)
from jaxlab.config.yaml_text import dump as dump_yaml
from jaxlab.config.yaml_text import dump_line as yaml_line
from jaxlab.config.yaml_text import parse as parse_yaml

__all__ = [
    "ABSENT",
    "KIND",
    "OTHERS",
    "POSITIONAL",
    "REPEATED",
    "Field",
    "Overrides",
    "Source",
    "build",
    "describe",
    "dump",
    "dump_yaml",
    "fields_of",
    "from_mapping",
    "groups",
    "is_list",
    "is_option",
    "kind_of",
    "leaves",
    "load",
    "members",
    "parse_yaml",
    "replace",
    "resolve",
    "suggestion",
    "take_option",
    "to_dict",
    "to_plain",
    "variants",
    "yaml_line",
]
