/* udp_internal.h - what udp.c (mappings the guest made) and udp_in.c (mappings of forwards) share.
 * Nobody else includes it.
 */
#ifndef RN_UDP_INTERNAL_H
#define RN_UDP_INTERNAL_H

#include "egress.h"
#include "rn_uso.h"

#include <netinet/in.h>
#include <sys/socket.h>

#define UDP_W_READ 1u /* flow_priv.work: what there is to do */
#define UDP_W_ERROR 2u

#define UDP_BURST 16u
#define UDP_HEADERS (RN_ETH_HLEN + RN_IP4_HLEN + RN_UDP_HLEN)
#define UDP_PAYLOAD_MAX (65535u - RN_IP4_HLEN - RN_UDP_HLEN)
#define UDP_SMALL_MAX (RN_SMALL_FRAME_MAX - UDP_HEADERS) /* payload a small buffer takes */
#define UDP_SOCKBUF (4 << 20)

struct udp_state {
	struct mmsghdr msg[UDP_BURST];
	struct iovec iov[UDP_BURST][2];
	struct sockaddr_in from[UDP_BURST];
	struct rn_buf *buf[UDP_BURST];
	uint8_t *spill; /* UDP_BURST times UDP_SPILL: the part that a small buffer does not take */
};
#define UDP_SPILL (RN_UDP_HLEN + UDP_PAYLOAD_MAX + 1u)

/* Buffers for a burst of at most @max datagrams, large ones if @big; returns how many there are. */
uint32_t udp_prepare(struct egress *e, int big, uint32_t max);
/* Datagram @k of the burst, @len bytes, to the guest as from @src, @sport (host order). Its buffer is emitted or
 * freed. */
void udp_deliver(struct egress *e, uint32_t i, uint32_t k, uint32_t len, const uint8_t src[4], uint16_t sport);
/* Evict mappings until there can be one more with @fds descriptors, if possible. */
void udp_make_room(struct egress *e, uint32_t fds);
/* There was traffic; @answer: by whom the mapping was not made for. Sets the timeout. */
void udp_refresh(struct egress *e, uint32_t i, int answer);

/* A frame of flow @i's was sent to the host side, or not: counts. Returns @what->sent. */
uint32_t udp_sent(struct egress *e, uint32_t i, const struct eg_frame *f, const struct rn_uso *what);

/* udp_promote.c: a datagram was sent to @host4, which is what its destination is on the host side. */
void udp_promote(struct egress *e, uint32_t i, const struct eg_frame *f, const uint8_t host4[4]);
void udp_promote_down(struct egress *e, uint32_t i, uint32_t got); /* so many came for the guest */
void udp_promote_end_up(struct egress *e, uint32_t i); /* guest_tx sends no more of this mapping's */

#endif
