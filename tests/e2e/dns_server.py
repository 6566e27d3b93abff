"""An upstream resolver for tests, answering from a table. dnspython reads and writes the messages."""
from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Callable

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
from netlab import Netns

Answer = Callable[[dns.message.Message], dns.message.Message | None]


class DnsServer:
    """An upstream resolver, UDP and TCP, in one thread. `asked` lists (transport, name, type)."""

    def __init__(self, ns: Netns, address: str, answer: Answer) -> None:
        self.answer, self.asked = answer, []
        self.udp = ns.socket(kind=socket.SOCK_DGRAM)
        self.udp.bind((address, 53))
        self.tcp = ns.socket()
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.tcp.bind((address, 53))
        self.tcp.listen()
        self.stop_r, self.stop_w = os.pipe()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def reply(self, transport: str, wire: bytes) -> bytes | None:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        self.asked.append((transport, question.name.to_text(), dns.rdatatype.to_text(question.rdtype)))
        answer = self.answer(query)
        if answer is None:
            return None
        # Above 512 bytes (or what EDNS allows) UDP gets TC and the client comes back by TCP.
        return answer.to_wire(max_size=65535) if transport == "tcp" else truncated(answer, max(512, query.payload))

    def serve(self) -> None:
        while True:
            ready, _, _ = select.select([self.udp, self.tcp, self.stop_r], [], [])
            if self.stop_r in ready:
                return
            if self.udp in ready:
                wire, peer = self.udp.recvfrom(65535)
                if (reply := self.reply("udp", wire)) is not None:
                    self.udp.sendto(reply, peer)
            if self.tcp in ready:
                connection, _ = self.tcp.accept()
                with connection, contextlib.suppress(ConnectionError):
                    stream = connection.makefile("rwb")
                    while len(head := stream.read(2)) == 2:
                        reply = self.reply("tcp", stream.read(struct.unpack("!H", head)[0]))
                        if reply is None:
                            break
                        stream.write(struct.pack("!H", len(reply)) + reply)
                        stream.flush()

    def close(self) -> None:
        os.close(self.stop_w)
        self.thread.join()
        os.close(self.stop_r)
        self.udp.close()
        self.tcp.close()


def truncated(answer: dns.message.Message, limit: int) -> bytes:
    wire = answer.to_wire(max_size=65535)
    if len(wire) <= limit:
        return wire
    short = dns.message.make_response(dns.message.make_query(answer.question[0].name, answer.question[0].rdtype))
    short.id = answer.id
    short.flags |= dns.flags.TC
    return short.to_wire()


def zone(records: dict[tuple[str, str], list[str]]) -> Answer:
    """Answers from a table {(name, type): rdata}; NXDOMAIN for the rest."""

    def answer(query: dns.message.Message) -> dns.message.Message:
        question = query.question[0]
        reply = dns.message.make_response(query, recursion_available=True)
        rdata = records.get((question.name.to_text(omit_final_dot=True).lower(),
                             dns.rdatatype.to_text(question.rdtype)))
        if rdata is None:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        else:
            reply.answer.append(dns.rrset.from_text_list(question.name, 300, "IN", question.rdtype, rdata))
        return reply

    return answer
