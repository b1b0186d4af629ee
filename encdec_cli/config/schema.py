"""Dataclasses as schemas: their fields as pydantic models, the docstring under each field as its description."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Strict, TypeAdapter, create_model
from pydantic import Field as ModelField

from encdec_cli.errors import UsageError
from encdec_cli.registry import Registry


@dataclass(frozen=True)
class Component:
    """A component as a recipe names it: its name, its checked keys, its class."""

    name: str
    config: Any
    """The component itself where it has no weights; otherwise its `Config`."""
    cls: type[Any]

    def build(self, *arguments: Any) -> Any:
        """Return the component: for one with weights, `cls(config, *arguments)`."""
        return self.config if isinstance(self.config, self.cls) else self.cls(self.config, *arguments)

    def plain(self) -> dict[str, Any]:
        """Return name and keys, all defaults filled, as plain JSON types."""
        return {"name": self.name, **plain_value(self.config)}


@dataclass(frozen=True)
class Chosen:
    """Marks a section whose `name` chooses a component: `Annotated[Component, Chosen(models, "transformer")]`."""

    registry: Registry[type[Any]]
    default: str | None = None
    """The name where the recipe gives none; without it the section is required."""
    example: str | None = None
    """The name that an explained recipe shows where there is no default."""


class SectionModel(BaseModel):
    """The pydantic side of one dataclass: unknown keys refused, no text taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    schema_class: ClassVar[type[Any]]

    def written(self) -> dict[str, Any]:
        """Return the validated values of the keys that were written; the dataclass has the other defaults."""
        return {
            info.alias or name: getattr(self, name)
            for name, info in type(self).model_fields.items()
            if name in self.model_fields_set
        }


def schema_of(component: type[Any]) -> type[Any]:
    """Return the dataclass that holds a component's keys: itself, or its `Config` where it has weights."""
    if is_dataclass(component):
        return component
    nested = {name: value for base in reversed(component.__mro__) for name, value in vars(base).items()}.get("Config")
    if not (isinstance(nested, type) and is_dataclass(nested)):
        raise AttributeError(f"class {component.__qualname__} has no dataclass Config")
    return nested


def keys(schema: type[Any]) -> dict[str, Field[Any]]:
    """Return the fields of a dataclass that a recipe may set, by name."""
    return {field.name: field for field in fields(schema) if field.init}


def recipe_keys(schema: type[Any]) -> dict[str, Field[Any]]:
    """Return the sections of a recipe's dataclass; fields with the metadata `key: False` are not written in files."""
    return {name: field for name, field in keys(schema).items() if field.metadata.get("key", True)}


def required(field: Field[Any]) -> bool:
    """Tell whether a field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def default(field: Field[Any]) -> Any:
    """Return the default of a field that has one."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def types_of(schema: type[Any]) -> dict[str, Any]:
    """Return the type of every field. Raises UsageError if one names something that its module does not know."""
    try:
        return get_type_hints(schema, include_extras=True)
    except NameError as error:
        where = f"{schema.__module__}.{schema.__qualname__}"
        raise UsageError(f"{where}: the type of a field cannot be found ({error}); import it in that file.") from error


def chosen_of(hint: Any) -> Chosen | None:
    """Return the mark of a type whose values are components, or None."""
    return next((mark for mark in get_args(hint) if isinstance(mark, Chosen)), None)


def descriptions(cls: type[Any]) -> dict[str, str]:
    """Return the docstring that follows each attribute in the source of a class and of its bases, by name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue  # written in C, or in a console: there is no source to read
        if tree.body and isinstance(tree.body[0], ast.ClassDef):
            found.update(_attribute_docstrings(tree.body[0].body))
    return found


def _attribute_docstrings(body: list[ast.stmt]) -> dict[str, str]:
    found = {}
    for statement, after in pairwise(body):
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if isinstance(statement, ast.AnnAssign):
            target = statement.target
        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(target, ast.Name) and documented and isinstance(after.value.value, str):  # type: ignore[attr-defined]
            found[target.id] = inspect.cleandoc(after.value.value)  # type: ignore[attr-defined]
    return found


def model_of(schema: type[Any]) -> type[SectionModel]:
    """Return the pydantic model of a dataclass."""
    hints = types_of(schema)
    definitions: dict[str, Any] = {}
    for index, (key, field) in enumerate(keys(schema).items()):
        # Numbered, so that keys such as `copy` or `json` do not meet pydantic's own attributes.
        value = ModelField(... if required(field) else None, alias=key)
        definitions[f"field_{index}"] = (_annotation(hints[key]), value)
    model = create_model(schema.__name__, __base__=SectionModel, __module__=schema.__module__, **definitions)
    model.schema_class = schema
    return model


def adapter(hint: Any) -> TypeAdapter[Any]:
    """Return what checks a value against a model or a plain type."""
    if isinstance(hint, type) and issubclass(hint, SectionModel):
        return TypeAdapter(hint)
    return TypeAdapter(_annotation(hint), config=ConfigDict(strict=True, allow_inf_nan=False))


def _annotation(hint: Any) -> Any:
    if isinstance(hint, type) and get_origin(hint) is None:
        if is_dataclass(hint):
            return model_of(hint)
        return Annotated[hint, Strict(False)] if issubclass(hint, (Path, Enum)) else hint
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        # A component is made by `checks`, which knows where each of its keys was written.
        inner = Any if chosen_of(hint) else _annotation(arguments[0])
        return Annotated.__class_getitem__((inner, *hint.__metadata__))
    if origin in (None, Literal):
        return hint
    parts = tuple(x if x is ... else _annotation(x) for x in arguments)
    if origin in (Union, types.UnionType):
        return Union[parts]  # noqa: UP007 - made at run time
    # YAML has lists only: a tuple or a set is made from one.
    return Annotated[origin[parts], Strict(False)] if origin in (tuple, set, frozenset) else origin[parts]


def known_keys(hint: Any, parts: list[str]) -> list[str]:
    """Return the keys of the section that `parts` leads to; where alternatives are possible, the keys of all."""
    models = _models_in(hint)
    for part in parts:
        named = [model for model in models if model.__name__ == part]
        inside = [info.annotation for model in models for info in model.model_fields.values() if info.alias == part]
        models = [model for hint in inside for model in _models_in(hint)] if inside else named or models
    return [info.alias or name for model in models for name, info in model.model_fields.items()]


def _models_in(hint: Any) -> list[type[SectionModel]]:
    if isinstance(hint, type) and issubclass(hint, SectionModel):
        return [hint]
    return [model for argument in get_args(hint) for model in _models_in(argument)]


def plain_value(value: Any) -> Any:
    """Return a configured value as plain JSON types."""
    if isinstance(value, Component):
        value = value.plain()
    if is_dataclass(value) and not isinstance(value, type):
        return {key: plain_value(getattr(value, key)) for key in keys(type(value))}
    if isinstance(value, dict):
        return {str(key): plain_value(child) for key, child in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [plain_value(child) for child in value]
        return items if isinstance(value, (list, tuple)) else sorted(items)
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
