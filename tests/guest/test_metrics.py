"""`ptender metrics`: what Prometheus, and its own parser, make of it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tender import BlockFile, Guest
from tests.guest.conftest import PTENDER, Build, Run
from tests.guest.test_usernet import free_port
from tests.waiting import PATIENCE_S, wait_until

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
Serve = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start `ptender metrics`: its process, and where it says that it listens."""
    started = []

    def start(where: str) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [PTENDER, "metrics", f"--listen={where}"], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("metrics at ")
        return process, line.removeprefix("metrics at ").strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def two(guest: Build, tmp_path: Path) -> Iterator[list[Guest]]:
    """Two guests with one name."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    disk, name = BlockFile(image, readonly=True), f"metrics.{os.getpid()}"
    guests = [
        Guest(guest("hold"), block={"storage": disk}, mem_mib=8, cpu="soft", name=name)
        for _ in range(2)
    ]
    with guests[0], guests[1]:
        for each in guests:
            each.console.wait_for("held", PATIENCE_S)
        yield guests


def samples(text: str, pid: int | None) -> dict[tuple[str, ...], float]:
    """The values of one guest by metric, kind and device."""
    return {
        (each.name, *(each.labels[key] for key in ("kind", "device") if key in each.labels)): (
            each.value
        )
        for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        for each in family.samples
        if each.labels["pid"] == str(pid)
    }


def test_openmetrics_of_all_guests(serve: Serve, two: list[Guest]) -> None:
    process, url = serve("127.0.0.1:0")
    words = Path(f"/proc/{process.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    assert words == [b"ptender", b"metrics", b"--listen=127.0.0.1:0"]
    request = urllib.request.Request(url, headers={"Accept": OPENMETRICS})
    with urllib.request.urlopen(request) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        text = answer.read().decode()
    assert text.endswith("# EOF\n")
    assert f'name="metrics.{os.getpid()}"' in text
    for guest in two:
        found = samples(text, guest.pid)
        assert found["ptender_guest_memory_bytes",] == 8 << 20
        assert found["ptender_guest_exits_total",] > 0
        assert found["ptender_device_calls_total", "block", "storage"] == 0
        assert found["ptender_device_bytes_total", "console", ""] > 0
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url.removesuffix("metrics"))
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0


def test_a_unix_socket_is_gone_at_the_end(serve: Serve, tmp_path: Path, two: list[Guest]) -> None:
    path = tmp_path / "metrics.sock"
    killed, _ = serve(str(path))
    done = subprocess.run([PTENDER, "metrics", f"--listen={path}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1, f"ptender: --listen={path}: Address already in use\n"
    )  # fmt: skip
    killed.kill()
    killed.wait()
    process, where = serve(str(path))
    assert where == str(path)
    connection = http.client.HTTPConnection("localhost")
    with socket.socket(socket.AF_UNIX) as connection.sock:
        connection.sock.connect(str(path))
        connection.request("GET", "/metrics")
        assert f'pid="{two[0].pid}"' in connection.getresponse().read().decode()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("nowhere", "--listen=nowhere is not HOST:PORT, as in 127.0.0.1:9471, or a socket's path"),
        ("127.0.0.1:", "--listen=127.0.0.1:: '' is not a port number from 1 to 65535"),
        ("127.0.0.1:99999", "'99999' is not a port number from 1 to 65535"),
        ("/nowhere/at/all", "--listen=/nowhere/at/all: No such file or directory"),
        ("/dev/null", "--listen=/dev/null: Address already in use"),
    ],
)
def test_wrong_addresses(ptender: Run, where: str, text: str) -> None:
    done = ptender("metrics", f"--listen={where}")
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("ptender: ")
    assert done.stderr.endswith(f"{text}\n")
    assert done.stderr.count("\n") == 1


def test_prometheus_scrapes_it(serve: Serve, two: list[Guest], tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed: apt install prometheus")
    _, url = serve("127.0.0.1:0")
    config = tmp_path / "prometheus.yml"
    target = urllib.parse.urlsplit(url).netloc
    config.write_text(
        "scrape_configs:\n- job_name: ptender\n  scrape_interval: 1s\n"
        f"  static_configs:\n  - targets: ['{target}']\n"
    )
    port = free_port()
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_until(lambda: len(query(port, "ptender_guest_exits_total")) == 2)
            (up,) = query(port, "up")
            assert up["value"][1] == "1"
        finally:
            process.kill()


def query(port: int, metric: str) -> list[dict[str, Any]]:
    """The series of this test's guests, or of all without a name; none while there is no answer."""
    words = metric if metric == "up" else f'{metric}{{name="metrics.{os.getpid()}"}}'
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': words})}"
    try:
        with urllib.request.urlopen(url) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found
    except urllib.error.URLError:
        return []
