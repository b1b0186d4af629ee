"""Recipes to types: every mistake at once, each as `file:line:column: key: what (did you mean 'x'?)`."""

from encdec_cli.config.component import check_name, component_of, given_keys, parse_component, with_key
from encdec_cli.config.loader import Unchecked
from encdec_cli.config.schema import Chosen, Component

__all__ = [
    "Chosen",
    "Component",
    "Unchecked",
    "check_name",
    "component_of",
    "given_keys",
    "parse_component",
    "with_key",
]
