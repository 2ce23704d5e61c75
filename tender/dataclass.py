"""A frozen dataclass without the import of `dataclasses`.

It is `dataclasses.dataclass(frozen=True)` to the reader and to the type checker, without the
import, which costs a plain run more than opening KVM does (docs/decisions/0003-imports.md). A
field may have a check, which every value of it passes through when the dataclass is made.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Generic, TypeVar, overload

    from typing_extensions import Self, dataclass_transform

    T = TypeVar("T")
    Given = TypeVar("Given", contravariant=True)
    Kept = TypeVar("Kept", covariant=True)
    Check = Callable[[str, Any], Any]

    class Converted(Generic[Given, Kept]):
        """The type of a field whose check makes a `Kept` of the `Given`."""

        @overload
        def __get__(self, instance: None, owner: Any) -> Self: ...
        @overload
        def __get__(self, instance: object, owner: Any) -> Kept: ...
        def __get__(self, instance: Any, owner: Any) -> Any: ...
        def __set__(self, instance: Any, value: Given) -> None: ...

    def field(check: Check, *, default: Any = ...) -> Any: ...

    @dataclass_transform(frozen_default=True, field_specifiers=(field,))
    def dataclass(cls: type[T]) -> type[T]: ...

else:
    _MISSING = object()

    class field:
        """A field with a check: called with its name and value, it gives what is kept, or raises.

        Without a `default`, the field must be given.
        """

        def __init__(self, check, **default):
            self.check = check
            self.default = default

    def dataclass(cls):
        """Make `cls` a value: the annotated names are its fields, in order.

        `__post_init__`, where the class has it, is called when all fields are set.
        """
        fields = tuple(cls.__annotations__)
        checks = {}
        for name in fields:
            given = cls.__dict__.get(name)
            if isinstance(given, field):
                checks[name] = given.check
                delattr(cls, name)
                for default in given.default.values():
                    setattr(cls, name, default)
        initial = {name: cls.__dict__.get(name, _MISSING) for name in fields}
        required = [name for name in fields if initial[name] is _MISSING]
        count = len(fields)
        post_init = cls.__dict__.get("__post_init__")

        def __init__(self, *args, **kwargs):
            values = self.__dict__
            values.update(initial)  # all fields, in their order
            values.update(zip(fields, args, strict=False))
            values.update(kwargs)
            if len(args) > count or len(values) > count:
                unknown = [name for name in values if name not in initial]
                what = f"no {unknown[0]!r}" if unknown else f"{len(args)} values"
                raise TypeError(f"{cls.__name__}({', '.join(fields)}): {what}")
            for name in required:
                if values[name] is _MISSING:
                    raise TypeError(f"{cls.__name__}({', '.join(fields)}): no value for {name}")
            for name, check in checks.items():
                values[name] = check(name, values[name])
            if post_init is not None:
                post_init(self)

        cls.__init__ = __init__
        cls.__setattr__ = _refuse
        cls.__delattr__ = _refuse
        cls.__repr__ = _repr
        cls.__eq__ = _eq
        cls.__hash__ = _hash
        cls.__match_args__ = fields
        cls.__signature__ = _Signature()
        return cls


class _Signature:
    """What help() and editors show of a dataclass: made when somebody looks."""

    def __get__(self, _: Any, cls: Any) -> Any:
        from inspect import Parameter, Signature

        parameters = [
            Parameter(
                name,
                Parameter.POSITIONAL_OR_KEYWORD,
                default=cls.__dict__.get(name, Parameter.empty),
                annotation=annotation,
            )
            for name, annotation in cls.__annotations__.items()
        ]
        return Signature(parameters)


def _refuse(self: Any, name: str, *_: object) -> None:
    raise AttributeError(f"{type(self).__name__} is frozen: {name}")


def _repr(self: Any) -> str:
    fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
    return f"{type(self).__name__}({fields})"


def _eq(self: Any, other: Any) -> bool:
    return bool(self.__dict__ == other.__dict__) if type(self) is type(other) else NotImplemented


def _hash(self: Any) -> int:
    return hash(tuple(self.__dict__.values()))


def replace(value: T, **changes: Any) -> T:
    """A copy of the dataclass `value` with some fields changed."""
    return type(value)(**{**value.__dict__, **changes})
