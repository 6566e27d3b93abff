/* proxy.h - flows of the guest through a proxy: what stage_egress.c, tcp_*.c and udp.c need of it.
 *
 * What it is and how it works stands in proxy.c.
 */
#ifndef RN_PROXY_H
#define RN_PROXY_H

#include "egress.h"
#include "proxy_handshake.h"

#include <sys/socket.h>

/* CFFI BEGIN */
#define PROXY_SERVERS 3
#define PROXY_BYPASS_MAX 1024 /* networks, and as many names */

struct proxy_config {
	struct proxy_server server[PROXY_SERVERS]; /* the first that takes the port is used */
	uint32_t nservers;
	int udp_block; /* UDP that a proxy should carry and cannot: 1 refused, 0 sent directly */
};
/* After stage_egress_init(), before the loop, once: 0, or a negative errno with rn_stage_error() set. @cfg is copied;
 * @names (rn_names.h) may be NULL, else it must outlive the stage. */
int stage_egress_proxy(struct rn_stage *s, const struct proxy_config *cfg, const void *names, uint64_t names_size);
/* Then, each: flows to this network, or to this name, go directly. A name that begins with a dot means all names that
 * end so. -ENOSPC: over PROXY_BYPASS_MAX; -EINVAL; -ENOMEM. */
int stage_egress_bypass_net(struct rn_stage *s, const uint8_t net[16], uint32_t prefix);
int stage_egress_bypass_name(struct rn_stage *s, const char *name);
/* CFFI END */

#define PROXY_DEADLINE_NS (30ull * 1000000000ull) /* from the connect to the proxy to its yes */

void proxy_fini(struct egress *e);
void proxy_dropped(struct egress *e, uint32_t i); /* the entry goes */
/* proxy_estate.c: of flow @i, and of all. What waits for an association is lost, and counted. 0 or -errno. */
void proxy_keep(struct egress *e, uint32_t i, struct rn_estate_out *o);
int proxy_adopt(struct egress *e, uint32_t i, struct rn_estate_in *in);
void proxy_keep_all(const struct egress *e, struct rn_estate_out *o);
int proxy_adopt_all(struct egress *e, struct rn_estate_in *in);
void proxy_event(struct egress *e, uint32_t i, uint32_t events); /* RN_TAG_PROXY */

/* TCP. Is this new flow for a proxy? 1: connect to @to, then proxy_tcp_step(); 0: no; -errno. */
int proxy_tcp_route(struct egress *e, uint32_t i, struct sockaddr_storage *to, socklen_t *len);
/* 1: the flow is between its SYN and the proxy's yes. */
int proxy_tcp_pending(const struct egress *e, uint32_t i);
/* Something happened on its socket; @err: what became of the connect. 1 wait, 0 the tunnel is there, -errno. */
int proxy_tcp_step(struct egress *e, uint32_t i, int err);
void proxy_tcp_late(struct egress *e, uint32_t i); /* PROXY_DEADLINE_NS is over: forget it */

/* UDP. 1: the datagram was dealt with, 0: send it directly. */
int proxy_udp_input(struct egress *e, struct eg_frame *f);
int proxy_udp_is(const struct egress *e, uint32_t i); /* 1: a mapping through a proxy */
int proxy_udp_work(struct egress *e, uint32_t i);     /* as udp_work() */
void proxy_udp_event(struct egress *e, uint32_t i);

#endif
