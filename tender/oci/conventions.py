"""How a guest is given its address, gateway and environment, by the conventions of its library OS.

Sources: the options of MirageOS's network stack (mirage-runtime); of rumprun, doc/config.md,
lib/librumprun_base/config.c and parseargs.c, and the values that urunc gives.
"""

from __future__ import annotations

import ipaddress
import json

from tender.errors import ConfigError, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.oci.annotations import Unikernel
    from tender.oci.network import Network


def guest_args(
    unikernel: Unikernel,
    args: tuple[str, ...],
    env: tuple[str, ...],
    network: Network | None,
    has_disk: bool,
) -> tuple[str, ...]:
    """The guest's command line. Only rumprun has an environment, and is told of a disk.

    Raises ConfigError for what it can't be given.
    """
    if unikernel.guest == "rumprun":
        return (_rumprun(unikernel, args, env, network, has_disk),)
    if network is None or not network.address or unikernel.guest == "none":
        return args
    options = [f"--ipv4={network.address}"]
    if network.gateway and unikernel.guest == "mirage":
        options.append(f"--ipv4-gateway={network.gateway}")
    return (*options, *args)


def _rumprun(
    unikernel: Unikernel,
    args: tuple[str, ...],
    env: tuple[str, ...],
    network: Network | None,
    has_disk: bool,
) -> str:
    """The configuration as JSON, whose parser takes a key many times and texts as values.

    `args` begin with the program's name.
    """
    config: list[tuple[str, object]] = [("cmdline", " ".join(map(_word, args)))]
    config += [("env", _verbatim(each)) for each in env]
    if network and network.address:
        config.append(("net", _rumprun_net(network)))
    if has_disk:
        block = {"source": "etfs", "path": "/dev/ld0a", "fstype": "blk"}
        config.append(("blk", {**block, "mountpoint": _verbatim(unikernel.mount_point)}))
    return "{" + ",".join(f"{_json(name)}:{_json(value)}" for name, value in config) + "}"


def _rumprun_net(network: Network) -> dict[str, str]:
    interface = ipaddress.ip_interface(network.address)
    prefix = interface.network.prefixlen
    if network.gateway and ipaddress.ip_address(network.gateway) not in interface.network:
        prefix = 1  # NetBSD takes no gateway outside of the interface's network
    net = {"if": "ukvmif0", "cloner": "True", "type": "inet", "method": "static"}
    net |= {"addr": str(interface.ip), "mask": str(prefix)}
    return net | ({"gw": network.gateway} if network.gateway else {})


def _word(text: str) -> str:
    """An argument in `cmdline`: JSON's backslash before a quote is also that of its parser."""
    if "'" in text or not text.isprintable():
        raise ConfigError(
            f"rumprun takes no argument with a single quote or a control: {shown(text)}"
        )
    return f"'{text}'" if not text or " " in text else text


def _verbatim(text: str) -> str:
    """A text that its JSON parser, which takes backslashes as they are, gets as it is."""
    if _json(text) != f'"{text}"':
        raise ConfigError(f"rumprun takes no quote, backslash or control in a value: {shown(text)}")
    return text


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
