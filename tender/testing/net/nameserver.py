"""A DNS server of a host, over UDP. dnspython reads and writes the messages."""

from __future__ import annotations

from ipaddress import ip_address

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from tender.errors import InvalidValue
from tender.testing.net.packets import Datagram

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tender.testing.net.stack import Stack

PORT = 53
TTL_S = 60
ALIASES_MAX = 8  # followed in one answer
_PLAIN_BYTES, _EDNS_BYTES = 512, 1232  # of an answer: RFC 1035; the DNS flag day of 2020


class NameServer:
    """A DNS server, from Host.dns.

    `queries` has what was asked, as "A example.com". It knows the names that it was given, and
    asks nobody else.
    """

    def __init__(self, stack: Stack, names: Mapping[str, str | Sequence[str]]) -> None:
        self.queries: list[str] = []
        self._stack = stack
        self._records: dict[dns.name.Name, list[dns.rdata.Rdata]] = {}
        if not isinstance(names, dict):
            raise InvalidValue("names", names, "a dict, as {'db.test': '10.0.0.2'}")
        for name, values in names.items():
            self.set(name, *(values if isinstance(values, (list, tuple)) else [values]))

    def set(self, name: str, *values: str) -> None:
        """Give a name these records in place of its old ones; without any, there is no such name.

        A value is an address, or a type and what follows it in a zone file: "MX 10 mail.test.".
        Raises UsageError.
        """
        records = [_record(value) for value in values]
        try:
            key = dns.name.from_text(name)
        except (dns.exception.DNSException, ValueError, TypeError, AttributeError):
            raise InvalidValue("name", name, "a name of DNS, as example.com") from None
        self._records.pop(key, None)
        if records:
            self._records[key] = records

    def __repr__(self) -> str:
        return f"<DNS server {self._stack.address}: {len(self._records)} names>"

    def put(self, mac: bytes, datagram: Datagram) -> None:
        answer = self._answer(datagram.data)
        if answer is not None:
            ends = datagram.to, PORT, datagram.sender, datagram.source
            self._stack.send_datagram(mac, Datagram(*ends, answer))

    def _answer(self, data: bytes) -> bytes | None:
        try:
            query = dns.message.from_wire(data)
            if query.flags & dns.flags.QR or len(query.question) != 1:
                return None
            response = dns.message.make_response(query, recursion_available=True)
        except dns.exception.DNSException:
            return None
        (question,) = query.question
        kind = dns.rdatatype.to_text(question.rdtype)
        self.queries.append(f"{kind} {question.name.to_text(omit_final_dot=True)}")
        if query.opcode() != dns.opcode.QUERY or question.rdclass != dns.rdataclass.IN:
            response.set_rcode(dns.rcode.NOTIMP)
        else:
            self._fill(response, question.name, question.rdtype)
        limit = min(max(query.payload, _PLAIN_BYTES), _EDNS_BYTES)
        return _to_wire(response, limit if query.edns >= 0 else _PLAIN_BYTES)

    def _fill(
        self, response: dns.message.Message, name: dns.name.Name, kind: dns.rdatatype.RdataType
    ) -> None:
        for _ in range(ALIASES_MAX):
            if name not in self._records:
                response.set_rcode(dns.rcode.NXDOMAIN)
                return
            records = self._records[name]
            found = [each for each in records if kind in (each.rdtype, dns.rdatatype.ANY)]
            aliases = [each for each in records if each.rdtype == dns.rdatatype.CNAME]
            for record in found or aliases[:1]:
                response.answer.append(dns.rrset.from_rdata(name, TTL_S, record))
            if found or not aliases:
                return
            name = dns.name.from_text(aliases[0].to_text())


def _to_wire(response: dns.message.Message, limit: int) -> bytes:
    try:
        return response.to_wire(max_size=limit)
    except dns.exception.TooBig:
        response.answer.clear()
        response.flags |= dns.flags.TC
        return response.to_wire(max_size=limit)


def _record(value: str) -> dns.rdata.Rdata:
    try:
        try:
            kind, text = ("A", "AAAA")[ip_address(value).version == 6], value
        except ValueError:
            kind, _, text = value.partition(" ")
        record = dns.rdata.from_text("IN", kind, text, dns.name.root, relativize=False)
    except (dns.exception.DNSException, ValueError, AttributeError):
        what = "an address, or a type and its value, as 'MX 10 mail.test.'"
        raise InvalidValue("value", value, what) from None
    return record
