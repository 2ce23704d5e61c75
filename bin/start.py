"""What the launcher has Python execute, as `-c`: find the package, and run its command.

It is compiled at each start, so it has only what is done before the package is found.
"""

import _signal  # type: ignore[import-not-found]  # not the enums of `signal`
import gc
import marshal
import posix
import sys
from _frozen_importlib_external import MAGIC_NUMBER

# Until there is something to clean up, Ctrl-C ends the process and prints nothing. Where the parent
# had it ignored, as for `&` in a script, it does so, too.
_signal.signal(_signal.SIGINT, _signal.SIG_DFL)
_signal.pthread_sigmask(_signal.SIG_UNBLOCK, [_signal.SIGINT])  # which launcher.c has blocked
gc.disable()  # until the guest runs: a start makes no garbage, and collecting takes 2 ms
del sys.argv[0]  # `-c`
if sys.flags.no_site:
    # Python knows only its standard library. pip puts the package into the folder that belongs to
    # this interpreter, ./quickstart and ./check link it in `checkout`, and Debian's package has it
    # in `dist-packages`; for anything else `site` is needed, which takes longer.
    home = sys.executable.rpartition("/")[0] + "/.."
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    sys.path.append(f"{home}/lib/{version}/site-packages")
    sys.path.append(f"{home}/checkout")
    sys.path.append(f"{home}/lib/python3/dist-packages")
else:
    del sys.path[0]  # the current directory

import mmap  # noqa: E402  # which is not built in, as those above are

for folder in sys.path:  # tender/cli/frozen.py has what this file is
    try:
        fd = posix.open(f"{folder}/tender/cli/frozen.{sys.implementation.cache_tag}", 0)
    except OSError:
        continue
    # To read it would copy half a megabyte. It must not stay open: its number may be that of a
    # standard stream that is closed.
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as data:
        posix.close(fd)
        if data[:4] == MAGIC_NUMBER:
            finder, entries = marshal.loads(memoryview(data)[4:])
            module = type(sys)("tender.cli.frozen")
            exec(finder, module.__dict__)
            module.use(f"{folder}/tender", entries)
    break
try:
    try:
        from tender.cli.main import command
    except ImportError:
        if not sys.flags.no_site:
            raise
        import site

        site.main()
        from tender.cli.main import command
except ImportError as error:
    sys.exit(
        f"ptender: {error}: {sys.executable or 'this Python'} does not have the package; install "
        "it there, or make a link to the installed command, not a copy"
    )
command()
