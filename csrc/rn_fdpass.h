/* rn_fdpass.h - host sockets from egress to the stages their flows are offered to: SCM_RIGHTS (unix(7)).
 *
 * One packet of an AF_UNIX SOCK_SEQPACKET pair is one socket and what its new holder must know of the flow. It is sent
 * before the notice that offers the flow, so that whoever has the notice finds the packet.
 */
#ifndef RN_FDPASS_H
#define RN_FDPASS_H

#include "rn_layout.h"

struct rn_pass {
	uint32_t index, gen; /* the flow */
	uint8_t proto;	     /* RN_IPPROTO_* */
	uint8_t peek_off;    /* TCP: SO_PEEK_OFF works on it */
	uint8_t window_scaled; /* TCP: window scaling was agreed */
	union {
		uint8_t df;   /* UDP: 1: the socket sets DF and does not fragment */
		uint8_t sack; /* TCP: SACK was agreed */
	};
	uint8_t peer4[4];    /* the peer as the guest calls it, */
	uint8_t host4[4];    /* UDP: where datagrams to it go, */
	uint16_t peer_port;  /* and its port, host order */
	uint16_t sender;     /* generation of the egress that sent it, its low bits */
};
_Static_assert(sizeof(struct rn_pass) == 24, "no padding: the bytes are a message");

/* Send @p and descriptor @fd (which stays the caller's). 0, or -errno: -EAGAIN if the other side is behind. */
int rn_fdpass_send(int sock, const struct rn_pass *p, int fd);

/* Take the next packet. Its descriptor (close-on-exec), or -errno: -EAGAIN none, -EPROTO not one of ours, -EPIPE end. */
int rn_fdpass_recv(int sock, struct rn_pass *p);

#endif
