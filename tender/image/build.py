"""Building an image from C sources and a manifest.

The rule here: the same input gives the same bytes. Nothing of the folder, the clock or the user
gets into the image.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from tender._native import lib
from tender.dataclass import dataclass
from tender.errors import BuildError
from tender.image import manifest as manifest_notes
from tender.image.elf import BINDINGS_NOTE
from tender.image.output import put_in_place, report, signals, work_folder

SOURCE_SUFFIXES = (".c", ".S", ".s")
LINKED_SUFFIXES = (".o", ".a")
# By the macro with which a compiler names a machine: the runtime's folder for that machine.
MACHINES = {"__x86_64__": "x86_64", "__aarch64__": "aarch64"}
SPT_MACHINE = "x86_64"  # of all guests for spt

FREESTANDING = (
    "-ffreestanding",
    "-nostdinc",
    "-fno-pic",
    "-fno-common",
    "-fno-asynchronous-unwind-tables",
    "-fstack-protector-strong",
)
MACHINE_FLAGS = {
    # A guard at a plain address: the usual %fs:0x28 is not there before the guest sets up TLS.
    "x86_64": ("-mstack-protector-guard=global", "-fcf-protection=none"),
    # Outlined atomics ask a C library at its start which instructions there are.
    "aarch64": (
        "-mstack-protector-guard=global",
        "-mbranch-protection=none",
        "-mno-outline-atomics",
    ),
}
# The registers of floating point are the guest's to ask for: not every KVM can run such code.
GENERAL_REGISTERS_ONLY = "-mgeneral-regs-only"
# Without this, GCC turns the loop inside a guest's own memset into a call of memset.
GCC_ONLY = ("-fno-tree-loop-distribute-patterns",)
CLANG_ONLY = ("-Qunused-arguments",)  # a command may name a linker, which only linking uses
LINKING = (
    "-nostdlib",
    "-static",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,-z,max-page-size=4096",
)

PATIENCE_S = 2  # for a compiler that is asked to end: it has files of its own in /tmp


DISK_FULL = os.strerror(errno.ENOSPC)
NO_MAIN = (
    "no source has solo5_app_main(), where a guest begins in the place of main(): "
    "#include <solo5.h> and int solo5_app_main(const struct solo5_start_info *info)"
)


@dataclass
class Toolchain:
    """A compiler, and what follows from which one it is."""

    command: tuple[str, ...]
    machine: str
    is_clang: bool
    target: str = "hvt"
    verbose: bool = False

    def run(self, arguments: Sequence[str], doing: str) -> None:
        """Run the compiler; it explains its own failure on standard error."""
        color = ["-fdiagnostics-color=always"] if os.isatty(2) else []
        command = [*self.command, *color, *arguments]
        if self.verbose:
            report(shlex.join(command))
        status, messages = _run(command)
        why = _reason(messages) if status else ""
        if messages and why != NO_MAIN and not why.startswith(DISK_FULL):
            report(messages.removesuffix("\n"))
        if status:
            raise BuildError(
                f"{doing} failed: {why or f'{self.command[0]} ended with status {status}'}"
            )

    def file_name(self, option: str) -> str:
        """Return the compiler's answer to one of its `-print-...` options."""
        return _output_of([*self.command, option]).strip()


def _run(command: Sequence[str]) -> tuple[int, str]:
    """The compiler's status and messages; it does not outlive an error in here."""
    process = None
    signals.held = True
    try:
        # In a session of its own: all that it starts can be ended with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        signals.held = False
        signals.check()
        messages = process.communicate()[1].decode(errors="replace")
        return process.returncode, messages
    except BaseException:
        if process is not None and process.poll() is None:
            _end(process)
        raise
    finally:
        signals.held = False


def _reason(messages: str) -> str:
    """The first error of a compiler or linker; empty where none is recognised."""
    lines = re.sub(r"\x1b\[[0-9;]*[mK]", "", messages).splitlines()
    if any(DISK_FULL in line for line in lines):
        return f"{DISK_FULL}: in the output's folder or in {os.environ.get('TMPDIR', '/tmp')}"
    undefined = re.findall(r"undefined (?:reference to|symbol:) [`']?([^\s']+)", "\n".join(lines))
    if undefined and set(undefined) == {"solo5_app_main"}:
        return NO_MAIN
    complaint = "undefined (reference|symbol)" if undefined else r"\berror: "
    return next((line.strip() for line in lines if re.search(complaint, line)), "")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the compiler and all that it has started."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def build(
    sources: Sequence[str],
    manifest: str | None,
    output: str,
    *,
    target: str | None = None,
    cc: str | None = None,
    cflags: Sequence[str] = (),
    fp: bool = False,
    verbose: bool = False,
) -> None:
    """Compile and link `sources` to an image at `output`.

    `manifest` names a JSON file; None stands for a guest without devices. `target` is the machine
    of an hvt guest ("x86_64" or "aarch64"), by default what the compiler makes code for, or "spt"
    for a guest of that target. `cc` is a command, by
    default $CC, gcc or clang. `cflags` are for the guest's sources, not for the runtime's; but
    debug information is kept of both. `fp` lets the guest use floating point.
    """
    _check_sources(sources, output)
    note = _manifest_note(manifest)
    toolchain = find_toolchain(cc, target, verbose=verbose)
    with work_folder(output) as folder:
        registers = [] if fp else [GENERAL_REGISTERS_ONLY]
        debug = [flag for flag in cflags if flag.startswith("-g")]
        objects = [
            *_compile_all(toolchain, sources, folder, [*cflags, *registers]),
            *_compile_runtime(toolchain, folder, debug),
            _assemble_manifest(toolchain, folder, note),
        ]
        image = folder / "image"
        _link(toolchain, objects, image)
        put_in_place(image, output)


def bindings_folder() -> Path:
    """Return the folder of the guest's runtime."""
    return _folder_of("guest_bindings", "guest-bindings")


def headers_folder() -> Path:
    """Return the folder of the C layouts."""
    return _folder_of("abi_headers", "abi")


def _folder_of(package: str, in_checkout: str) -> Path:
    """Find files that are installed as a package, or lie beside ours in a checkout."""
    try:
        return Path(import_module(f"tender.{package}").__path__[0])
    except ImportError:
        return Path(__file__).resolve().parents[2] / in_checkout


def find_toolchain(
    cc: str | None, target: str | None = None, *, verbose: bool = False
) -> Toolchain:
    """Find a compiler and ask it which it is and what it makes code for.

    With `target` it is one for that machine: a compiler that is named must make code for it.
    """
    solo5 = "hvt"
    if target == "spt":
        solo5, target = "spt", SPT_MACHINE
    command = _find_compiler(cc, target)
    macros = _macros(command)
    if target is not None and "__clang__" in macros and not _makes(macros, target):
        command = (*command, *_cross_clang(target))
        macros = _macros(command)
    wanted = [target] if target is not None else [*MACHINES.values()]
    for machine in wanted:
        if _makes(macros, machine):
            return Toolchain(command, machine, "__clang__" in macros, solo5, verbose)
    raise BuildError(
        f"{command[0]} does not make code for {' or '.join(wanted)}: name one that does with --cc"
    )


def _macros(command: Sequence[str]) -> set[str]:
    listing = _output_of([*command, "-dM", "-E", "-xc", os.devnull])
    return {line.split()[1] for line in listing.splitlines()}


def _makes(macros: set[str], machine: str) -> bool:
    return any(macro in macros for macro, name in MACHINES.items() if name == machine)


def _cross_clang(target: str) -> list[str]:
    """Return what makes any clang one for another machine: its linker is another one, too."""
    system = f"{target}-linux-gnu"
    has_linker = shutil.which(f"{system}-ld") is not None
    return [f"--target={system}", *([] if has_linker else ["-fuse-ld=lld"])]


def _find_compiler(cc: str | None, target: str | None) -> tuple[str, ...]:
    named = cc or os.environ.get("CC")
    if not named:
        return _default_compiler(target)
    try:
        command = tuple(shlex.split(named))
    except ValueError:  # a quotation mark without its other half
        command = ()
    if not command or not shutil.which(command[0]):
        raise BuildError(f"no C compiler named {named!r}: install it, or name another with --cc")
    return command


def _default_compiler(target: str | None) -> tuple[str, ...]:
    is_foreign = target is not None and target != os.uname().machine
    for candidate in (f"{target}-linux-gnu-gcc" if is_foreign else "gcc", "clang"):
        if shutil.which(candidate):
            return (candidate,)
    if is_foreign:
        package = f"gcc-{target}-linux-gnu".replace("_", "-")
        raise BuildError(
            f"no C compiler for {target} found: install {target}-linux-gnu-gcc "
            f"(Debian's package {package}) or clang, or name one with --cc"
        )
    raise BuildError("no C compiler found: install gcc or clang, or name one with --cc")


def _output_of(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise BuildError(f"can't run {command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise BuildError(f"{command[0]} is not a C compiler: {shlex.join(command)} failed")
    return done.stdout


def _check_sources(sources: Sequence[str], output: str) -> None:
    if not sources:
        raise BuildError("no sources to build from")
    for source in sources:
        if not source.endswith((*SOURCE_SUFFIXES, *LINKED_SUFFIXES)):
            raise BuildError(f"{source}: not a .c, .S, .s, .o or .a file")
        if not os.path.isfile(source):
            raise BuildError(f"{source}: no such file")
        if os.path.exists(output) and os.path.samefile(source, output):
            raise BuildError(f"{output}: the output would replace a source")


def _manifest_note(path: str | None) -> bytes:
    """Return what stands in the MFT1 note after its padding."""
    if path is None:
        return manifest_notes.encode(manifest_notes.Manifest())
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BuildError(f"can't read the manifest {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BuildError(f"the manifest {path} is not text in UTF-8") from None
    return manifest_notes.encode(manifest_notes.parse_json(text, path))


def _working_folder() -> str:
    try:
        return os.getcwd()
    except OSError as error:
        raise BuildError(f"the working directory: {error.strerror}") from None


def _common_flags(toolchain: Toolchain, folder: Path) -> list[str]:
    bindings, headers = bindings_folder(), headers_folder()
    # The last one that fits wins, so the working directory comes first: it may hold the others.
    prefixes = {
        _working_folder(): ".",
        str(bindings): "guest-bindings",
        str(headers): "abi",
        str(folder): ".",
    }
    return [
        "-O2",
        *FREESTANDING,
        *MACHINE_FLAGS[toolchain.machine],
        *(CLANG_ONLY if toolchain.is_clang else GCC_ONLY),
        *(f"-ffile-prefix-map={old}={new}" for old, new in prefixes.items()),
        "-idirafter",
        str(bindings / "include"),
        "-idirafter",
        toolchain.file_name("-print-file-name=include"),
        "-idirafter",
        str(headers),
    ]


def _compile(
    toolchain: Toolchain, source: str, target: Path, flags: Sequence[str], name: str
) -> str:
    """Compile one source; return the object's path."""
    if not source.endswith(".c"):  # debug information of assembler keeps this host's paths
        flags = [flag for flag in flags if not flag.startswith("-g")]
    toolchain.run([*flags, "-c", "-o", str(target), source], f"compiling {name}")
    return str(target)


def _compile_all(
    toolchain: Toolchain, sources: Sequence[str], folder: Path, flags: Sequence[str]
) -> list[str]:
    """Return what to link for `sources`, in their order."""
    flags = [*_common_flags(toolchain, folder), *flags]
    objects: list[str] = []
    for number, source in enumerate(sources):
        if source.endswith(SOURCE_SUFFIXES):
            target = folder / f"guest-{number}.o"
            source = _compile(toolchain, source, target, flags, source)
        objects.append(source)
    return objects


def runtime_sources(toolchain: Toolchain) -> list[Path]:
    """Return the runtime's own sources, in a fixed order."""
    folders = (bindings_folder(), _machine_folder(toolchain))
    files = [path for folder in folders for path in sorted(folder.iterdir())]
    if toolchain.target == "spt":
        files.append(bindings_folder() / toolchain.machine / "copy.c")
    return [path for path in files if path.suffix in SOURCE_SUFFIXES]


def _machine_folder(toolchain: Toolchain) -> Path:
    """Return what the runtime has for this machine and target only."""
    folder = bindings_folder() / toolchain.machine
    return folder / "spt" if toolchain.target == "spt" else folder


def runtime_flags(toolchain: Toolchain, folder: Path) -> list[str]:
    """Return the flags for the runtime's own sources."""
    bindings = bindings_folder()
    includes = [f"-I{bindings}", f"-I{_machine_folder(toolchain)}", f"-I{headers_folder()}"]
    return [*_common_flags(toolchain, folder), *includes, "-std=c11", GENERAL_REGISTERS_ONLY]


def _compile_runtime(toolchain: Toolchain, folder: Path, flags: Sequence[str]) -> list[str]:
    flags = [*runtime_flags(toolchain, folder), *flags]
    objects = []
    for source in runtime_sources(toolchain):
        target = folder / f"runtime-{source.stem}.o"  # so no two of them may share a stem
        objects.append(_compile(toolchain, str(source), target, flags, f"the runtime's {source}"))
    return objects


def _assemble_manifest(toolchain: Toolchain, folder: Path, note: bytes) -> str:
    """Make an object of the MFT1 note and the note that marks these bindings.

    The size of the MFT1 note's descriptor counts the padding before it.
    """
    source = folder / "manifest.s"
    padding = lib.MFT1_NOTE_DESC_OFFSET - lib.ABI1_NOTE_DESC_OFFSET
    lines = [
        '.section .note.solo5.manifest, "a", @note',
        ".balign 4",
        f".long 6, {padding + len(note)}, {lib.MFT1_NOTE_TYPE}",
        '.asciz "Solo5"',
        ".balign 4",
        f".zero {padding}",
        f".byte {', '.join(map(str, note))}",
        '.section .note.ptender, "a", @note',
        ".balign 4",
        f".byte {', '.join(map(str, BINDINGS_NOTE))}",
        '.section .note.GNU-stack, "", @progbits',
        "",
    ]
    try:
        source.write_text("\n".join(lines), encoding="ascii")
    except OSError as error:
        raise BuildError(f"can't write the manifest's note: {error.strerror}") from None
    flags = CLANG_ONLY if toolchain.is_clang else ()
    return _compile(toolchain, str(source), folder / "manifest.o", flags, "the manifest")


def _link(toolchain: Toolchain, objects: Sequence[str], image: Path) -> None:
    script = bindings_folder() / "guest.lds"
    libgcc = toolchain.file_name("-print-libgcc-file-name")  # wide arithmetic calls into it
    libraries = [libgcc] if os.path.isfile(libgcc) else []
    toolchain.run([*LINKING, "-T", str(script), "-o", str(image), *objects, *libraries], "linking")
