/* rn_errqueue.h - what a socket's error queue says (IP_RECVERR, ip(7)): errors about datagrams it sent. */
#ifndef RN_ERRQUEUE_H
#define RN_ERRQUEUE_H

#include <stdint.h>

struct rn_sock_error {
	uint8_t origin;	      /* SO_EE_ORIGIN_*: said by an ICMP message, or by the kernel here */
	uint8_t type, code;   /* of that message */
	uint8_t offender_known;
	uint8_t offender[4];  /* who sent it */
	uint8_t dst[4];	      /* where the datagram went */
	uint16_t dst_port;    /* in network order; 0 for ICMP */
	uint32_t error, info; /* errno; next-hop MTU for EMSGSIZE and "fragmentation needed" */
	uint32_t len;	      /* bytes of data: what was quoted of the datagram, from behind its UDP header or IP header */
};

int rn_errqueue_next(int fd, struct rn_sock_error *out, uint8_t *data, uint32_t size);

#endif
