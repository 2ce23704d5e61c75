"""`ptender build` with the compilers that are here.

The rule here: an image is judged by its bytes, with `tender.image.elf` for the tender's view of it
and with `struct` for what the tender does not look at. Running guests is for tests/guest.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tender._native import lib
from tender.cli import build as cli
from tender.errors import BuildError, ManifestError, UsageError
from tender.image import build as building
from tender.image import elf, manifest

COMPILERS = [cc for cc in ("gcc", "clang") if shutil.which(cc)]
# A compiler and the machine that it is to make code for.
CROSS = [cc for cc in ("aarch64-linux-gnu-gcc", "clang") if shutil.which(cc)]
TARGETS = [*((cc, None) for cc in COMPILERS), *((cc, "aarch64") for cc in CROSS)]
if platform.machine() == "x86_64":
    TARGETS += [(cc, "spt") for cc in COMPILERS]
each_target = pytest.mark.parametrize(("cc", "target"), TARGETS)
SAMPLES = building.bindings_folder() / "samples"
TESTS = building.bindings_folder() / "tests"
EMPTY_MAIN = """
#include <solo5.h>
int solo5_app_main(const struct solo5_start_info *info) { return info->cmdline[0]; }
"""
PT_LOAD, PT_INTERP, PT_NOTE, PT_TLS, PT_GNU_STACK = 1, 3, 4, 7, 0x6474E551
EXECUTE, WRITE, READ = 1, 2, 4

pytestmark = pytest.mark.skipif(not COMPILERS, reason="no C compiler")
Build = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_cc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)


@pytest.fixture
def make(tmp_path: Path) -> Build:
    """Build a guest from source text."""

    def make(text: str = EMPTY_MAIN, /, **how: object) -> Path:
        source, output = tmp_path / "guest.c", tmp_path / "guest.hvt"
        source.write_text(text)
        building.build([str(source)], None, str(output), **how)  # type: ignore[arg-type]
        return output

    return make


def read_phdrs(image: Path) -> list[tuple[int, ...]]:
    """Return (type, flags, offset, vaddr, paddr, filesz, memsz, align) of each program header."""
    data = image.read_bytes()
    (phoff,) = struct.unpack_from("<Q", data, 32)
    phentsize, phnum = struct.unpack_from("<HH", data, 54)
    return [struct.unpack_from("<IIQQQQQQ", data, phoff + i * phentsize) for i in range(phnum)]


def parse_image(path: Path) -> elf.Image:
    data = path.read_bytes()
    return elf.parse(lambda offset, size: data[offset : offset + size])


def content(image: Path, phdr: tuple[int, ...]) -> bytes:
    return image.read_bytes()[phdr[2] : phdr[2] + phdr[5]]


@each_target
def test_an_image_is_what_the_tender_loads(make: Build, cc: str, target: str | None) -> None:
    image = parse_image(make(cc=cc, target=target))
    assert target in (None, "spt", elf.MACHINES[image.machine])
    wanted = lib.ABI_TARGET_SPT if target == "spt" else lib.ABI_TARGET_HVT
    assert (image.target, image.abi_version) == (wanted, 2)
    assert image.manifest == manifest.Manifest()
    assert image.entry >= lib.HVT_GUEST_MIN_BASE
    rights = [(segment.writable, segment.executable) for segment in image.segments]
    assert rights == [(False, True), (False, False), (True, False)]


@each_target
def test_segments_notes_and_interpreter(make: Build, cc: str, target: str | None) -> None:
    image = make(cc=cc, target=target)
    phdrs = read_phdrs(image)
    by_type = {kind: [p for p in phdrs if p[0] == kind] for kind in {p[0] for p in phdrs}}
    assert [p[1] for p in by_type[PT_LOAD]] == [READ | EXECUTE, READ, READ | WRITE]
    assert by_type[PT_LOAD][0][3] == lib.HVT_GUEST_MIN_BASE
    assert all(p[3] % 4096 == 0 and p[5] > 0 for p in by_type[PT_LOAD])
    assert content(image, by_type[PT_INTERP][0]) == b"/nonexistent/solo5/\0"
    assert by_type[PT_GNU_STACK][0][1] & EXECUTE == 0
    assert len(by_type[PT_TLS]) == 1
    solo5 = lib.ABI_TARGET_SPT if target == "spt" else lib.ABI_TARGET_HVT
    abi, devices, bindings = (content(image, phdr) for phdr in by_type[PT_NOTE])
    assert abi == struct.pack("<III8sIIII", 6, 16, lib.ABI1_NOTE_TYPE, b"Solo5", solo5, 2, 0, 0)
    header = struct.pack("<III8sI", 6, 4 + 8 + 104, lib.MFT1_NOTE_TYPE, b"Solo5", 0)
    assert devices == header + manifest.encode(manifest.Manifest())
    assert bindings == elf.BINDINGS_NOTE


def test_the_manifest_given_is_in_the_image(tmp_path: Path) -> None:
    output = tmp_path / "block.hvt"
    building.build([str(TESTS / "block.c")], str(TESTS / "block.json"), str(output))
    (device,) = parse_image(output).manifest.devices
    assert (device.name, device.type, device.handle) == ("storage", lib.MFT_DEV_BLOCK_BASIC, 1)


def test_the_kernel_does_not_run_it(make: Build) -> None:
    image = make()
    assert image.stat().st_mode & stat.S_IXUSR
    with pytest.raises(FileNotFoundError):
        subprocess.run([str(image)], check=False)


@each_target
@pytest.mark.parametrize("cflags", [(), ("-g",)], ids=["plain", "debug"])
def test_the_same_input_gives_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cc: str,
    target: str | None,
    cflags: tuple[str, ...],
) -> None:
    images = []
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Path("guest.c").write_text(EMPTY_MAIN)
        building.build(["guest.c"], None, "guest.hvt", cc=cc, target=target, cflags=cflags)
        images.append(Path("guest.hvt").read_bytes())
    assert images[0] == images[1]
    assert str(tmp_path).encode() not in images[0]
    assert str(building.bindings_folder()).encode() not in images[0]


@each_target
def test_a_guest_may_bring_its_own_c_library(make: Build, cc: str, target: str | None) -> None:
    """Its definitions win, without a clash and without becoming calls to themselves."""
    image = make(
        EMPTY_MAIN
        + """
        void *memset(void *to, int byte, size_t n)
        {
            for (char *at = to; n > 0; n--)
                *at++ = (char)byte;
            return to;
        }
        size_t strlen(const char *s) { size_t n = 0; while (s[n]) n++; return n; }
        int printf(const char *format, ...) { return format[0]; }
        """,
        cc=cc,
        target=target,
    )
    assert parse_image(image).segments


@each_target
def test_wide_arithmetic_is_there(make: Build, cc: str, target: str | None) -> None:
    make(
        """
        #include <solo5.h>
        int solo5_app_main(const struct solo5_start_info *info)
        {
            unsigned __int128 wide = (unsigned __int128)info->heap_size << 64;
            return (int)(wide / info->heap_start);
        }
        """,
        cc=cc,
        target=target,
    )


@each_target
def test_floating_point_has_to_be_asked_for(
    make: Build, capfd: pytest.CaptureFixture[str], cc: str, target: str | None
) -> None:
    text = EMPTY_MAIN + "double half(double of) { return of / 2; }"
    with pytest.raises(BuildError):
        make(text, cc=cc, target=target)
    assert "guest.c" in capfd.readouterr().err
    make(text, cc=cc, target=target, fp=True)


@pytest.mark.parametrize("cc", COMPILERS)
def test_no_floating_point_instruction_in_the_runtime(make: Build, cc: str) -> None:
    if not shutil.which("objdump"):
        pytest.skip("no objdump")
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(make(cc=cc))],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "<solo5_exit>" in code
    assert "%xmm" not in code
    assert "%st" not in code


@each_target
def test_the_runtime_compiles_without_a_warning(
    tmp_path: Path, cc: str, target: str | None
) -> None:
    toolchain = building.find_toolchain(cc, target)
    flags = building.runtime_flags(toolchain, tmp_path)
    for source in building.runtime_sources(toolchain):
        arguments = [*flags, "-Wall", "-Wextra", "-Werror", "-c", "-o", os.devnull, str(source)]
        toolchain.run(arguments, source.name)


@each_target
@pytest.mark.parametrize(
    "source", sorted([*SAMPLES.glob("*.c"), *TESTS.glob("*.c")]), ids=lambda path: path.stem
)
def test_every_guest_compiles_without_a_warning(
    tmp_path: Path, cc: str, target: str | None, source: Path
) -> None:
    toolchain = building.find_toolchain(cc, target)
    flags = [*building._common_flags(toolchain, tmp_path), "-Wall", "-Wextra", "-Werror"]
    # gcc finds some only when it optimises; clang finds all of them in the syntax.
    how = ["-fsyntax-only"] if cc == "clang" else ["-c", "-o", os.devnull]
    toolchain.run([*flags, *how, str(source)], source.name)


def test_several_sources_and_objects(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text(
        "#include <solo5.h>\nint part(void), other(void);\n"
        "int solo5_app_main(const struct solo5_start_info *i)\n"
        "{ return part() + other() + !i; }"
    )
    (tmp_path / "part.S").write_text(
        '.text\n.globl part\npart: ret\n.section .note.GNU-stack, "", @progbits\n'
    )
    (tmp_path / "other.c").write_text("int other(void) { return 1; }")
    compiled = str(tmp_path / "other.o")
    subprocess.run([COMPILERS[0], "-c", "-o", compiled, tmp_path / "other.c"], check=True)
    sources = [str(tmp_path / "main.c"), str(tmp_path / "part.S"), compiled]
    building.build(sources, None, str(tmp_path / "out.hvt"))
    assert parse_image(tmp_path / "out.hvt").segments


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("headers").mkdir()
    Path("headers/mine.h").write_text("#define MINE 1\n")
    Path("guest.c").write_text(
        '#include "mine.h"\n#if MINE + GIVEN != 3\n#error\n#endif\n' + EMPTY_MAIN
    )
    words = ["-v", "-O", "1", "-Iheaders", "guest.c", "-DGIVEN=2", "-g", "-o", "guest.hvt"]
    cli.main([*words, "--cc", COMPILERS[0]])
    assert "-Iheaders" in capfd.readouterr().err
    assert parse_image(Path("guest.hvt")).segments


def test_any_flag_for_the_compiler(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "guest.c"
    source.write_text(EMPTY_MAIN + "\n#if ONE + TWO != 3\n#error\n#endif\n")
    words = [str(source), "--cflag", "-DONE=1", "--cflag=-DTWO=2", "-o", f"{tmp_path}/out.hvt"]
    cli.main(words)
    with pytest.raises(BuildError, match="--no-such-flag"):
        cli.main([*words, "--cflag", "--no-such-flag"])
    with pytest.raises(UsageError, match="--cflag: expected one argument"):
        cli.main([*words, "--cflag"])


def test_warnings_are_shown_as_ever(make: Build, capfd: pytest.CaptureFixture[str]) -> None:
    make(EMPTY_MAIN + "\n#warning take care\n")
    assert "take care" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["gone.c"], "gone.c: no such file"),
        (["guest.txt"], "guest.txt: not a .c"),
        (["guest.c", "--manifest", "gone.json"], "can't read the manifest gone.json: No such"),
        (["guest.c", "--manifest", "binary.json"], "binary.json is not text"),
        (["guest.c", "-o", "nowhere/out.hvt"], "can't write nowhere/out.hvt: No such"),
        (["guest.c", "-o", "folder"], "can't write folder: Is a directory"),
        (["guest.c", "-o", "./guest.c"], "would replace a source"),
        (["guest.c", "--cc", "no-such-cc"], "no C compiler named 'no-such-cc'"),
        (["guest.c", "--cc", "gcc 'half"], "no C compiler named"),
        (["guest.c", "--cc", "false"], "false is not a C compiler"),
        (["wrong.c"], "compiling wrong.c failed: wrong.c:1:"),
        (["wrong.c"], "undeclared"),
        (["constructor.c"], "linking failed"),
        (["missing.c"], "linking failed: missing.c:(.text.startup"),
        (["part.c"], "linking failed: no source has solo5_app_main(), where a guest begins"),
        (["main.c", "--cc", COMPILERS[-1]], "begins in the place of main()"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said_and_nothing_is_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("guest.c").write_text(EMPTY_MAIN)
    Path("guest.txt").write_text(EMPTY_MAIN)
    Path("wrong.c").write_text("int solo5_app_main(void) { return nothing; }")
    Path("constructor.c").write_text(
        EMPTY_MAIN + "int set; __attribute__((constructor)) static void early(void) { set = 1; }"
    )
    Path("part.c").write_text("int part(void) { return 0; }")  # without a main function
    Path("main.c").write_text("int main(void) { return 0; }")
    Path("missing.c").write_text("int nowhere(void); int main(void) { return nowhere(); }")
    Path("binary.json").write_bytes(b"\xff\xfe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BuildError) as caught:
        cli.main(["-o", "out.hvt", *words])
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    said = capfd.readouterr().err
    if words[0] in ("wrong.c", "constructor.c", "missing.c"):
        assert said  # the compiler's own words
    if words[0] in ("part.c", "main.c"):
        assert said == ""


def test_a_bad_manifest_is_refused_before_compiling(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"type": "solo5.manifest", "version": 9, "devices": []}')
    with pytest.raises(ManifestError):
        building.build([str(SAMPLES / "hello.c")], str(bad), str(tmp_path / "out.hvt"))
    assert sorted(tmp_path.iterdir()) == [bad]


def test_a_failed_build_keeps_the_last_good_image(make: Build) -> None:
    image = make()
    before = image.read_bytes()
    with pytest.raises(BuildError):
        make("this is not C")
    assert image.read_bytes() == before


def test_nothing_is_left_after_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "_link", interrupt)
    with pytest.raises(KeyboardInterrupt):
        building.build([str(SAMPLES / "hello.c")], None, str(tmp_path / "out.hvt"))
    assert list(tmp_path.iterdir()) == []


def test_which_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{COMPILERS[-1]} -pipe")
    assert building.find_toolchain(None).command == (COMPILERS[-1], "-pipe")
    assert building.find_toolchain(COMPILERS[0]).command == (COMPILERS[0],)
    monkeypatch.delenv("CC")
    assert building.find_toolchain(None).command == (COMPILERS[0],)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C compiler found: install gcc or clang"):
        building.find_toolchain(None)


def test_no_compiler_for_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="x86_64"))
    with pytest.raises(BuildError, match="for aarch64 found: install .*package gcc-aarch64-linux"):
        building.find_toolchain(None, "aarch64")
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="aarch64"))
    with pytest.raises(BuildError, match="for x86_64 found: install .*package gcc-x86-64-linux"):
        building.find_toolchain(None, "x86_64")


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-gcc"), reason="no cross compiler")
def test_the_compiler_says_the_machine() -> None:
    assert building.find_toolchain("aarch64-linux-gnu-gcc").machine == "aarch64"
    with pytest.raises(BuildError, match="does not make code for x86_64: name one"):
        building.find_toolchain("aarch64-linux-gnu-gcc", "x86_64")


def test_a_compiler_for_another_machine(tmp_path: Path) -> None:
    other = tmp_path / "cc"
    other.write_text("#!/bin/sh\necho '#define __riscv 1'\n")
    other.chmod(0o755)
    with pytest.raises(BuildError, match="does not make code for x86_64"):
        building.find_toolchain(str(other))


# Where it is written to.


def build_to(output: object, tmp_path: Path) -> None:
    source = tmp_path / "guest.c"
    source.write_text(EMPTY_MAIN)
    building.build([str(source)], None, str(output))


@pytest.mark.skipif(os.geteuid() != 0, reason="a device node takes root")
def test_a_device_stays_a_device(tmp_path: Path) -> None:
    node = tmp_path / "null"
    try:
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no device nodes here")
    build_to(node, tmp_path)
    assert node.is_char_device()


def test_a_fifo_is_written_into(tmp_path: Path) -> None:
    fifo, received = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    build_to(fifo, tmp_path)
    reader.join()
    assert fifo.is_fifo()
    assert received[0].startswith(b"\x7fELF")


def test_a_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    for _ in range(2):
        build_to(link, tmp_path)
        assert link.is_symlink()
        assert parse_image(target).entry


def test_the_mode_is_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        build_to(tmp_path / "guest.hvt", tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "guest.hvt").stat().st_mode & 0o777 == 0o750
