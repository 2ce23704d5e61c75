"""The peer of the web guest, run in the network namespace of a bench: `client.py WHAT SECONDS`.

Prints one number: frames or requests per second, or the median of a round trip in microseconds.
Nothing but the standard library's sockets, so that any Python runs it at once.
"""

from __future__ import annotations

import socket
import statistics
import sys
import time

GUEST = "10.0.0.2"
ECHO, HTTP = 7, 80
FRAME = bytes(1400)
IN_FLIGHT = 16  # frames; the guest's queue is a tap's, of 500 or more
PAUSE_S = 0.002  # so that the guest waits in POLL
LOST_S = 0.2


def frames_per_s(seconds: float) -> float:
    """Frames of UDP that come back, of which some are always under way."""
    sock = _echo()
    for _ in range(IN_FLIGHT):
        sock.send(FRAME)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        try:
            sock.recv(2000)
            count += 1
        except TimeoutError:
            pass  # what is lost is sent again
        sock.send(FRAME)
    return count / (time.perf_counter() - begin)


def round_trip_us(seconds: float) -> float:
    """A small frame to a guest that waits, until it is back."""
    sock, found = _echo(), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        time.sleep(PAUSE_S)
        begin = time.perf_counter()
        sock.send(b"x")
        sock.recv(2000)
        found.append(time.perf_counter() - begin)
    return statistics.median(found) * 1e6


def requests_per_s(seconds: float) -> float:
    """Pages over HTTP, each on a connection of its own, one after the other."""
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        with socket.create_connection((GUEST, HTTP), timeout=10) as sock:
            sock.send(b"GET / HTTP/1.0\r\n\r\n")
            page = b""
            while data := sock.recv(4096):
                page += data
        if b"200 OK" not in page:
            sys.exit(f"no page: {page!r}")
        count += 1
    return count / (time.perf_counter() - begin)


def _echo() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(LOST_S)
    sock.connect((GUEST, ECHO))
    for _ in range(50):  # ARP, and the first pages of the guest
        sock.send(b"x")
        try:
            sock.recv(2000)
        except TimeoutError:
            continue
        return sock
    sys.exit("the guest does not answer")


if __name__ == "__main__":
    print(globals()[sys.argv[1]](float(sys.argv[2])))
