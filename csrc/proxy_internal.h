/* proxy_internal.h - what proxy.c (flows through a proxy) and proxy_estate.c (left to a successor) share. Nobody else
 * includes it.
 */
#ifndef RN_PROXY_INTERNAL_H
#define RN_PROXY_INTERNAL_H

#include "proxy.h"

#include <sys/epoll.h>

#define PXW_READ 1u    /* relay socket may have something */
#define PXW_CONTROL 2u /* so may the association's TCP connection */
#define PROXY_CONTROL_EVENTS (EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET) /* of an association's TCP connection */

struct proxy_net {
	uint8_t addr[16];
	uint8_t prefix;
};
struct proxy_wait { /* a datagram that waits for its association */
	struct proxy_wait *next;
	uint32_t len, ip_off, l4_off, payload_off, payload_len, each, ndatagrams;
	uint8_t ttl;
	uint8_t eth[];
};
struct proxy_flow {
	struct proxy_handshake *hs; /* NULL: over */
	struct proxy_wait *wait, **wait_end;
	uint32_t nwait;
	int control; /* UDP: the TCP connection, or -1 */
	uint8_t udp, server;
	uint8_t up; /* TCP: connected to the proxy; UDP: the relay is there */
};
struct proxy_state {
	struct proxy_config cfg;
	const void *names; /* NULL: not known */
	struct proxy_net *net;
	char **name;
	uint32_t nnets, nnames;
	struct proxy_flow **flow; /* by entry; NULL: none */
	uint32_t waiting;	  /* bytes */
	uint64_t udp_retry[PROXY_SERVERS]; /* ns: until then a server is taken to carry no UDP */
	uint8_t *scratch;
};

#endif
