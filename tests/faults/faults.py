"""Faults found in an earlier network stack of this kind, one line each. None of them may come back.

A test that would fail on an implementation with fault N carries @pytest.mark.fault(N), or is called test_fault_N_...,
or is a rule file (tests/conformance) with "# fault: N". test_faults.py checks that each number has such a test or
stands in WAITS.
"""
from __future__ import annotations

FAULTS: dict[int, str] = {
    # TCP, guest to host
    1: "A short write to the host socket acknowledged the whole segment: the rest was lost",
    2: "An early segment was written and acknowledged as if it were next: a hole in the stream",
    3: "A partly old segment was written whole; a FIN was taken at any sequence number",
    4: "A full host socket meant no ACK at all; data for a closed one was acknowledged and lost",
    5: "The window told had nothing to do with what the host took; SACK was agreed and never sent",
    6: "A guest's FIN closed both directions: the reply was lost, or the server never saw the end",
    7: "A guest's RST looked like a clean end to the server, and was taken at any sequence number",
    8: "Keepalive probes and repeated SYNs and SYN-ACKs were not answered",
    # TCP, host to guest
    9: "The guest's ACKs, window and window scale were not read",
    10: "Nothing was ever sent again: one lost frame stalled the connection for good",
    11: "Frames were lost inside after the sequence number had moved on (full queue, full ring)",
    12: "A frame larger than its descriptor was cut and reported as sent",
    13: "The guest's MSS and the link's MTU were not kept to",
    14: "An error of the host socket was not told to the guest, which waited for ever",
    15: "No timer ended what was idle or dead: entries stayed for good",
    16: "Idle connections were polled: CPU grew with their number",
    17: "One busy connection was always served first and starved all else",
    18: "Frames that came close together delayed each other's notification to the guest",
    19: "Reads, SYN-ACKs and retransmissions waited for an unrelated event",
    # handshake
    20: "A table entry lived shorter than a slow connect, which so never succeeded, and nobody was told",
    21: "A segment of no connection was dropped without a RST",
    22: "Data in or right behind the handshake's last ACK was thrown away",
    23: "A new SYN on a known pair of ports went to the old entry",
    24: "Initial sequence numbers could be guessed; every failed connect looked like a refusal",
    25: "The guest's RST to a forwarded connection was ignored; SYNs went on for clients that had gone",
    # IP, UDP, ICMP
    26: "IPv4 only; fragments were read as whole packets; checksums were not checked",
    27: "A UDP reply over the MTU went out as one frame and never arrived",
    28: "Each forwarded datagram came from another port",
    29: "A burst of UDP changed the source port; receive-only use was cut off; tables had no bound",
    30: "A socket for each ICMP packet; the gateway did not answer pings; no TTL, no ICMP errors for UDP",
    31: "Guest MAC and IP address were fixed at first sight",
    32: "Every loopback port of the host was open to the guest, and that could not be changed",
    # DHCP, DNS
    33: "A DISCOVER alone held an address for a day; a declined address was offered again",
    34: "REQUEST ignored the server identifier; the MTU was never told",
    35: "AAAA questions got A records; ARCOUNT was copied from the query",
    36: "Names of the own domain leaked upstream; no TCP, no cache, replies from anywhere were taken",
    37: "Resolvers were read once, at the start",
    38: "Empty answers were cached; replies were cut at 512 bytes; one slow server blocked all names",
    # NIC2, timers, control
    39: "The second interface's relay lost packets when the other side was busy, and slept between reads",
    40: "The relay blocked on a descriptor that was never made non-blocking",
    41: "The timer wheel turned and nothing was in it",
    42: "No drop counters, no list of connections; a forward that could not be made was only logged",
}

WAITS: dict[int, str] = {}  # number: what is missing to test it

PARTS: dict[int, str] = {  # tested as far as it is built
    12: "chains of guest memory (virtqueues): with such a link",
    16: "the inline flows of RX injection: with such a link",
    17: "the inline flows of RX injection: with such a link",
    18: "an interrupt held back: with such a link; those there are have none, a write is the notification",
    26: "IPv6: not served yet",
}
