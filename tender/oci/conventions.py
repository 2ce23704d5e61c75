"""How a guest is given its address, gateway and environment, by the conventions of its library OS.

Sources: the options of MirageOS's network stack (mirage-runtime); the configuration of rumprun
(doc/config.md of rumprun), with the values that urunc gives.
"""

from __future__ import annotations

import ipaddress
import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.oci.annotations import Unikernel
    from tender.oci.network import Network


def guest_args(
    unikernel: Unikernel, args: tuple[str, ...], env: tuple[str, ...], network: Network | None
) -> tuple[str, ...]:
    """The guest's command line. Only rumprun has an environment."""
    if unikernel.guest == "rumprun":
        return (_rumprun(args, env, network),)
    if network is None or not network.address or unikernel.guest == "none":
        return args
    options = [f"--ipv4={network.address}"]
    if network.gateway and unikernel.guest == "mirage":
        options.append(f"--ipv4-gateway={network.gateway}")
    return (*options, *args)


def _rumprun(args: tuple[str, ...], env: tuple[str, ...], network: Network | None) -> str:
    config: list[tuple[str, object]] = [("cmdline", " ".join(args))]
    config += [("env", each) for each in env]
    if network and network.address:
        interface = ipaddress.ip_interface(network.address)
        net = {
            "if": "ukvmif0",
            "cloner": "True",
            "type": "inet",
            "method": "static",
            "addr": str(interface.ip),
            "mask": str(interface.network.prefixlen),
            "gw": network.gateway,
        }
        config.append(("net", net))
    # Its parser takes one `env` for each variable, which a dict can't have.
    return "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in config) + "}"
