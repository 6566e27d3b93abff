/* stage_services.h - datagrams in and out for the services stage, whose loop is Python.
 *
 * DHCP and DNS are a few messages a second and mostly text and tables, so their logic is Python
 * (pipeline/services). What touches shared memory or guest bytes stays here: one call takes one datagram
 * off the ring, checked and copied into private memory; one call builds the frames of one reply.
 */
#ifndef RN_STAGE_SERVICES_H
#define RN_STAGE_SERVICES_H

#include "rn_stage.h"

/* CFFI BEGIN */
struct services_config {
	uint32_t mtu;  /* bytes of L3 towards the guest, 68..65535 */
	uint32_t seed; /* first IP identification of fragmented replies */
};

/* One UDP datagram's addressing. IPv4 is v4-mapped, ::ffff:a.b.c.d (RFC 4291 2.5.5.2); ports in host order. */
struct services_datagram {
	uint8_t src[16], dst[16];
	uint16_t src_port, dst_port;
	uint8_t src_mac[6], dst_mac[6];
	uint32_t len; /* bytes of UDP payload */
};

int stage_services_init(struct rn_stage *s, const struct services_config *cfg);
int rn_services_recv(struct rn_stage *s, struct services_datagram *out, uint8_t *buf, uint32_t cap);
int rn_services_send(struct rn_stage *s, const struct services_datagram *d, const uint8_t *payload);
void rn_services_begin(struct rn_stage *s);
int rn_services_end(struct rn_stage *s);
int rn_services_arm(struct rn_stage *s);
void rn_services_disarm(struct rn_stage *s);
int rn_services_pending(struct rn_stage *s);
int rn_services_bell(const struct rn_stage *s);
void rn_services_count(struct rn_stage *s, uint32_t counter, uint64_t n);
int rn_services_inotify(void);
int rn_services_watch(int fd, const char *path, int directory);
/* CFFI END */

#endif
