"""`ptender metrics`: what all guests do, for Prometheus (OpenMetrics)."""

from __future__ import annotations

import os
import signal
import socket
import stat
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, NoReturn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from tender.checks import as_port
from tender.cli.argparser import Parser
from tender.cli.main import show
from tender.errors import ConfigError, HostError, InvalidValue, UsageError
from tender.observe.guests import RunningGuest, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric

    App = Callable[[dict[str, Any], Callable[..., Any]], Any]  # of WSGI

LISTEN = "127.0.0.1:9471"
INSTALL = "ptender metrics needs prometheus-client: pip install 'ptender[metrics]'"
TIMEOUT_S = 10.0  # for a client to send its request and take the answer
GUEST = ("name", "pid")
DEVICE = (*GUEST, "kind", "device", "direction")


def main(argv: list[str]) -> None:
    """The command: serves until a signal ends it."""
    parser = Parser("ptender metrics", "Serve the numbers of all guests to Prometheus.")
    parser.add_argument(
        "--listen", metavar="HOST:PORT|PATH", default=LISTEN,
        help=f"a TCP address, or the path of a Unix socket (default {LISTEN})",
    )  # fmt: skip
    where = parser.parse_args(argv).listen
    running()  # raises where there will never be any
    app = make_app()
    for signo in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signo, _end)
    server = open_server(where)
    server.set_app(app)
    try:
        show(f"metrics at {server.url}")
        server.serve_forever()
    except _Ended:
        pass
    finally:
        server.server_close()


class _Ended(BaseException):
    """A signal asks for the end."""


def _end(*_: object) -> NoReturn:
    raise _Ended


class Guests:
    """All guests as metrics, each time that they are asked for."""

    def collect(self) -> Iterator[Metric]:
        """The metrics; prometheus_client has the interface."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        try:
            found = running()
        except ConfigError:
            found = []  # the user has logged out
        guests = [(each, [each.name, str(each.pid)]) for each in found]
        info = InfoMetricFamily("ptender_guest", "A guest that runs.", labels=GUEST)
        for guest, labels in guests:
            info.add_metric(labels, {"cpu": guest.cpu, "state": guest.state})
        yield info
        gauges: dict[str, tuple[str, Callable[[RunningGuest], float]]] = {
            "start_time_seconds": ("When it was started.", lambda guest: round(guest.started, 3)),
            "memory_bytes": ("Guest memory.", lambda guest: guest.mem_bytes),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"ptender_guest_{name}", text, labels=GUEST)
            for guest, labels in guests:
                gauge.add_metric(labels, value(guest))
            yield gauge
        exits = CounterMetricFamily("ptender_guest_exits", "Exits from the guest.", labels=GUEST)
        times = CounterMetricFamily(
            "ptender_guest_time_seconds",
            "Time in it, and outside.",
            labels=(*GUEST, "where"),
        )
        for guest, labels in guests:
            times.add_metric([*labels, "guest"], guest.guest_s)
            if guest.is_counted:
                exits.add_metric(labels, guest.exits)
                times.add_metric([*labels, "tender"], guest.tender_s)
        yield exits
        yield times
        for name, text in (
            ("calls", "Hypercalls of a device."),
            ("bytes", "What they moved."),
            ("errors", "Failures of the host at a device."),
            ("drops", "Frames or output that the host did not take."),
            ("delays", "Operations that have waited for a rate limit."),
        ):
            counter = CounterMetricFamily(f"ptender_device_{name}", text, labels=DEVICE)
            for guest, labels in guests:
                if not guest.is_counted:
                    continue
                for row, counters in guest.statistics.rows():
                    kind, device, direction = (*row.split(":"), "", "")[:3]
                    counter.add_metric([*labels, kind, device, direction], getattr(counters, name))
            yield counter


def make_app() -> App:
    """What answers /metrics; raises ConfigError without the library."""
    try:
        from prometheus_client import CollectorRegistry, make_wsgi_app
    except ImportError:
        raise ConfigError(INSTALL) from None
    registry = CollectorRegistry()
    registry.register(Guests())
    metrics = make_wsgi_app(registry)

    def app(environment: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environment["PATH_INFO"] == "/metrics":
            return metrics(environment, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"the metrics are at /metrics\n"]

    return app


class Handler(WSGIRequestHandler):
    """A request, of which nothing is logged."""

    timeout = TIMEOUT_S

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Server(ThreadingMixIn, WSGIServer):
    """A server on a socket that is bound; `url` is where."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, sock: socket.socket, url: str, path: str = "") -> None:
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.url = url
        self._path = path
        self.server_name, self.server_port = "ptender", 0
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        """A connection; wsgiref wants an address, which those of a Unix socket have not."""
        sock, address = super().get_request()
        return sock, address or ("", 0)

    def handle_error(self, *_: object) -> None:
        """A client that goes away is none of the server's business."""

    def server_close(self) -> None:
        """Close it; a Unix socket is removed."""
        super().server_close()
        if self._path:
            os.unlink(self._path)


def open_server(where: str) -> Server:
    """A server at `HOST:PORT`, `[HOST]:PORT` or the path of a socket; raises TenderError."""
    if "/" in where:
        return _unix_server(where)
    host, _, number = where.rpartition(":")
    if not host:
        raise UsageError(f"--listen={where} is not HOST:PORT, as in {LISTEN}, or a socket's path")
    try:
        port = 0 if number == "0" else as_port("port", int(number) if number.isdigit() else number)
    except InvalidValue as error:
        raise UsageError(f"--listen={where}: {number!r} is not {error.expected}") from None
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.create_server(address[:2], family=family)
    except OSError as error:
        # create_server() puts the address into strerror; getaddrinfo() has numbers of its own.
        is_host = not isinstance(error, socket.gaierror) and error.errno
        reason = os.strerror(error.errno or 0) if is_host else error.strerror or str(error)
        raise HostError(f"--listen={where}: {reason}") from None
    return Server(sock, f"http://{host}:{sock.getsockname()[1]}/metrics")


def _unix_server(path: str) -> Server:
    sock = socket.socket(socket.AF_UNIX)
    try:
        _remove_stale(path)
        sock.bind(path)
        sock.listen()
    except OSError as error:
        sock.close()
        raise HostError(f"--listen={path}: {error.strerror or error}") from None
    return Server(sock, path, path)


def _remove_stale(path: str) -> None:
    """Remove a socket on which nobody listens: of a server that was killed."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return  # bind(2) says that it is there
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
