"""A policy's text -> rules of a system call filter. Pure.

The rule here: a policy is a list of system calls; what is not in it ends the process. One entry a
line, written as the call would be in C, with its reason:

    ioctl(@vcpu, KVM_RUN)    -- let the guest run

An argument is `_` (any value), a number or a constant of the kernel's headers (several with `|`),
`!FLAG` (without these bits), `<=N`, or `@label`: one of the descriptors with that label. An entry
with a label that no descriptor has allows nothing. `<SIZE` and `<=SIZE` compare with the size in
bytes of the file that the first argument is, `BLOCK` with the size of its blocks, and
`<=SIZE-BLOCK` with the offset of its last block. Further arguments may have any value. The kernel
takes an int from the lower half of a register, so only that is compared; `0L` compares all of it.
"""

from __future__ import annotations

from tender.dataclass import dataclass
from tender.errors import TenderError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Fds = Mapping[str, Sequence[int]]  # by label
    Sizes = Mapping[int, int]  # of files in bytes, by descriptor
    Constant = Callable[[str], int]

INT = 0xFFFFFFFF
LONG = 0xFFFFFFFFFFFFFFFF
LE, MASKED_EQ = 3, 7  # enum scmp_compare of libseccomp
DIGITS = "0123456789"
OF_FILE = ("<SIZE", "<=SIZE", "BLOCK", "<=SIZE-BLOCK")


class PolicyError(TenderError):
    """A file in seccomp/ has a syntax error: a bug of ours."""


@dataclass
class Entry:
    """A line of a policy: the call, its arguments as they are written, and why it is there."""

    call: str
    arguments: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.call}({', '.join(self.arguments)})"

    @property
    def labels(self) -> list[str]:
        """The labels among the arguments."""
        return [each[1:] for each in self.arguments if each.startswith("@")]


@dataclass
class Compare:
    """One argument: `value` is what the bits in `mask` must be (MASKED_EQ), or its limit (LE)."""

    argument: int
    op: int
    mask: int
    value: int

    def holds(self, value: int) -> bool:
        """Whether a system call's argument (64 bits) matches."""
        value &= LONG
        return value <= self.value if self.op == LE else value & self.mask == self.value


@dataclass
class Rule:
    """A system call that is allowed where all of its arguments hold."""

    call: str
    compares: tuple[Compare, ...]
    entry: Entry

    def allows(self, call: str, arguments: Sequence[int]) -> bool:
        """Whether it allows a call with these arguments."""
        return call == self.call and all(
            each.holds(arguments[each.argument]) for each in self.compares
        )


def parse(text: str) -> list[Entry]:
    """The entries of one policy file."""
    return [_entry(line) for line in text.splitlines() if line.strip() and line[0] != "#"]


def _entry(line: str) -> Entry:
    call, parenthesis, rest = line.partition("(")
    arguments, end, rest = rest.partition(")")
    blank, dashes, reason = rest.partition("--")
    if not (parenthesis and end and dashes and reason.strip()) or blank.strip():
        raise PolicyError(f"policy: no CALL(ARGUMENTS) -- REASON: {line}")
    words = tuple(word.strip() for word in arguments.split(",")) if arguments.strip() else ()
    return Entry(call.strip(), words, reason.strip())


def expand(
    entries: Iterable[Entry],
    fds: Fds,
    sizes: Sizes,
    constant: Constant,
    block_sizes: Sizes | None = None,
) -> list[Rule]:
    """The rules for these descriptors; `constant` returns the value of a kernel constant."""
    rules = []
    for entry in entries:
        choices: list[tuple[Compare, ...]] = [()]
        for index, word in enumerate(entry.arguments):
            if word in OF_FILE:
                choices = [
                    (*before, _of_file(index, word, before[0].value, sizes, block_sizes or {}))
                    for before in choices
                ]
                continue
            wanted = _compares(index, word, fds, constant)
            choices = [(*before, *each) for before in choices for each in wanted]
        rules += [Rule(entry.call, compares, entry) for compares in choices]
    return rules


def _of_file(index: int, word: str, fd: int, sizes: Sizes, block_sizes: Sizes) -> Compare:
    """An argument that is compared with what is known of the file `fd`."""
    if word == "BLOCK":
        return Compare(index, MASKED_EQ, LONG, block_sizes[fd])
    if word == "<=SIZE-BLOCK":
        return _at_most(index, sizes[fd] - block_sizes[fd])
    return _at_most(index, sizes[fd] - (word == "<SIZE"))


def _compares(index: int, word: str, fds: Fds, constant: Constant) -> list[tuple[Compare, ...]]:
    """The alternatives for one argument."""
    if word == "_":
        return [()]
    if word[0] == "@":
        return [(Compare(index, MASKED_EQ, INT, fd),) for fd in fds.get(word[1:], ())]
    if word[0] == "!":
        return [(Compare(index, MASKED_EQ, _number(word[1:], constant), 0),)]
    if word[:2] == "<=":
        return [(_at_most(index, _number(word[2:], constant)),)]
    mask = LONG if word[-1] == "L" and word[0] in DIGITS else INT
    return [
        (
            Compare(
                index,
                MASKED_EQ,
                mask,
                _number(word.removesuffix("L") if mask == LONG else word, constant) & mask,
            ),
        )
    ]


def _at_most(index: int, limit: int) -> Compare:
    return Compare(index, LE, limit, limit)


def _number(text: str, constant: Constant) -> int:
    value = 0
    for name in text.split("|"):
        value |= int(name, 0) if name[0] in DIGITS or name[0] == "-" else constant(name)
    return value
