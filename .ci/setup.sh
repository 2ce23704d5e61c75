# shellcheck shell=bash
# What ./quickstart, ./check and .ci/run have in common: Debian packages, and the project in .venv.
#
# The rule here: only what is missing is installed, it is said before it is done, and nothing is
# written outside the checkout except by apt-get. The scripts source this file with the checkout
# as their working directory and `program` set to their name.

: "${program:?is set by the script that sources this file}"

# The log keeps what apt-get and pip say: it matters only where they fail.
log=build/setup.log

say() { printf '%s: %s\n' "$program" "$*"; }

fail() {
    printf '%s: %s\n' "$program" "$*" >&2
    exit 1
}

# Run a command whose output goes to the log; where it fails, $1 says what did, and why.
logged() {
    local what=$1 begin why
    shift
    mkdir -p build
    printf '$ %s\n' "$*" >>"$log"
    begin=$(wc -l <"$log")
    "$@" </dev/null >>"$log" 2>&1 && return
    why=$(tail -n "+$begin" "$log" | reason) || true
    fail "$what failed${why:+: $why} (all of it: $PWD/$log)"
}

# Why a command failed, by its output: its last complaint that says something.
reason() {
    local text last
    text=$(cat)
    last=$(grep -E '^ *(E:|ERROR:|error:|[A-Za-z.]*Error:)|fatal error:' <<<"$text" |
        grep -v subprocess-exited-with-error | tail -n 1)
    last=${last#"${last%%[! ]*}"}
    case $last in
    *"No matching distribution"* | *"Could not find a version"*)
        if grep -qE 'connection broken by|Could not fetch URL' <<<"$text"; then
            last="pip could not reach its package index (is there a network, or a proxy?): $last"
        fi
        ;;
    esac
    echo "$last"
}

# needs_command PACKAGE COMMAND: name the package if the command is not there.
needs_command() { PATH=$PATH:/usr/sbin:/sbin command -v "$2" >/dev/null || echo "$1"; }

# needs_library PACKAGE LIBRARY: name the package if the library is not there. (grep reads all of
# it: with -q it would end at the first match, and ldconfig by SIGPIPE.)
needs_library() { PATH=$PATH:/usr/sbin:/sbin ldconfig -p | grep -F "$2" >/dev/null || echo "$1"; }

# The interpreter: $PYTHON, else python3.
find_python() {
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "no $python: install Python 3.10 or later"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" --version) is too old: ptender needs Python 3.10 or later (PYTHON=... names one)"
}

# What it takes to build the project: the names of the packages that are missing.
missing_to_build() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$python" -c 'import os, sys, sysconfig as s
sys.exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' || echo python3-dev
    needs_command gcc gcc
    needs_library libseccomp2 libseccomp.so.2
    [ -e /usr/include/linux/kvm.h ] && [ -e /usr/include/stdlib.h ] || echo libc6-dev
}

# Install the Debian packages that are named; --no-install (no_install=1) only says which.
install_packages() {
    [ $# -gt 0 ] || return 0
    local as_root=() by_hand="apt-get update && apt-get install $*"
    command -v apt-get >/dev/null ||
        fail "missing: $* (Debian's names; this machine has no apt-get: install what they hold)"
    [ -z "${no_install:-}" ] || fail "missing: $*; as root: $by_hand"
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || fail "missing: $*; there is no sudo, so as root: $by_hand"
        as_root=(sudo)
        sudo -v || fail "missing: $*; sudo was refused, so as root: $by_hand"
    fi
    say "installing Debian packages: $* (a minute or so) ..."
    logged "apt-get update" "${as_root[@]}" apt-get -q update
    logged "apt-get install" "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -q -y --no-install-recommends install "$@"
}

# The extras among the given ones that pyproject.toml declares, with commas.
declared_extras() {
    local extra list=
    for extra in "$@"; do
        if grep -qE "^$extra *= *\[" pyproject.toml; then list+=,$extra; fi
    done
    echo "${list#,}"
}

# Everything that the install depends on, beside Python code: changed, it is made again.
fingerprint() {
    { echo "$1 $PWD"; cat pyproject.toml setup.py abi/ffi_build.py bin/*; c_sources; } | sha256sum
}

# What the C modules are made from.
c_sources() {
    find abi tender -name '*.[ch]' ! -name '_*' -o -name '*.cdef' | LC_ALL=C sort | xargs cat
}

# install_project EXTRA...: the project in .venv, from this checkout.
install_project() {
    local extras wanted
    extras=$(declared_extras "$@")
    wanted=$(fingerprint "$extras")
    # A plain `pip install .` puts a copy there, which would be used and tested instead.
    if [ "$(cat ".venv/installed-$extras" 2>/dev/null)" != "$wanted" ] ||
        [ -n "$(find .venv/lib/python3*/site-packages -maxdepth 1 -name tender 2>/dev/null)" ] ||
        ! .venv/bin/ptender --version >/dev/null 2>&1; then
        make_venv
        say "installing ptender and its Python packages in .venv (a minute or so) ..."
        logged "pip install" .venv/bin/python -m pip install --no-cache-dir \
            --disable-pip-version-check -e ".[$extras]"
        echo "$wanted" >".venv/installed-$extras"
    fi
    link_checkout
}

# pip's editable install is code that finds the checkout, run at each start of Python: 10 ms, and
# mypy and editors, which run nothing, do not find it. A path does instead: that of a folder which
# has the package and no more, as `tests' or `abi' must not be found where programs import what is
# theirs. bin/start.py knows it.
link_checkout() {
    local folder
    mkdir -p .venv/checkout
    ln -sfn "$PWD/tender" .venv/checkout/tender
    for folder in .venv/lib/python3*/site-packages; do
        rm -f "$folder"/__editable__*ptender*
        echo "$PWD/.venv/checkout" >"$folder/ptender-checkout.pth"
    done
}

make_venv() {
    if [ -e .venv ] && [ ! -e .venv/pyvenv.cfg ]; then
        fail "$PWD/.venv is there and is no Python environment: move it away"
    fi
    .venv/bin/python -m pip --version >/dev/null 2>&1 && return
    say "making a Python environment in .venv ..."
    logged "python3 -m venv" "$python" -m venv --clear .venv
}
