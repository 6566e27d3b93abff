/* fast_udp_down.c - promoted UDP mappings, host to guest: datagrams from the host socket straight to the link.
 *
 * One recvmsg() a datagram into the buffer of the stage, headers in front, one write to the link. Where the link takes UDP
 * super-frames (virtio 1.2 5.1.6.2, VIRTIO_NET_HDR_GSO_UDP_L4) the kernel is asked to join datagrams of one sender and size
 * (UDP_GRO, udp(7)), and a train of them is one read and one write. What is longer than the MTU goes out as fragments.
 *
 * UDP waits for nobody: there is no window, no acknowledgement, and nothing to give back but the end of the mapping.
 */
#include "fast_down_internal.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <sys/socket.h>

#define DATAGRAMS 64u /* reads of a flow before the next one's turn */

#ifndef UDP_GRO
#define UDP_GRO 104
#endif

/* A datagram longer than the MTU, at its place in d->buf, as fragments (RFC 791 3.2). The first part lies right; each later
 * one gets its headers in front, over what was sent. A full link loses the rest, and it is counted: UDP may be lost. */
static void fragments(struct fast_down *d, const struct rn_flow *f, const uint8_t src[4], uint32_t l4_len)
{
	uint32_t part = (d->cfg.mtu - RN_IP4_HLEN) & ~7u, off = 0;
	uint16_t id = d->ip_id++;

	while (off < l4_len) {
		uint32_t n = l4_len - off > part ? part : l4_len - off;
		uint8_t *eth = d->buf + BUF_ETH + off;

		memset(eth - RN_VNET_HLEN, 0, RN_VNET_HLEN);
		rn_ip4_build(eth, f->guest_mac, d->cfg.gateway_mac, src, f->guest_addr + 12, RN_IPPROTO_UDP, 64, id,
			     (uint16_t)(off / 8 | (off + n < l4_len ? RN_IP4_MF : 0)), n);
		if (!d->out(d->s, eth, RN_ETH_HLEN + RN_IP4_HLEN + n)) {
			d->s->c[RN_C_drop_udp_fast]++;
			return;
		}
		off += n;
	}
}

static void deliver(struct fast_down *d, struct rn_flow *f, const struct sockaddr_in *from, uint32_t len, uint32_t gso)
{
	uint8_t *eth = d->buf + BUF_ETH, *udp = eth + RN_ETH_HLEN + RN_IP4_HLEN;
	uint32_t l4 = RN_UDP_HLEN + len, frame = RN_ETH_HLEN + RN_IP4_HLEN + l4;
	int super = gso && gso < len, partial = d->cfg.offload && (super || RN_IP4_HLEN + l4 <= d->cfg.mtu);
	const uint8_t *host = (const uint8_t *)&from->sin_addr, *src = host[0] == 127 ? d->cfg.gateway4 : host;
	struct rn_vnet_hdr v = { 0 };

	rn_udp_build(udp, ntohs(from->sin_port), f->guest_port, src, f->guest_addr + 12, len, partial);
	f->down.bytes += len;
	f->down.packets += super ? (len + gso - 1) / gso : 1;
	d->s->c[RN_C_udp_fast_down] += super ? (len + gso - 1) / gso : 1;
	d->s->c[RN_C_fast_frames]++;
	if (!super && RN_IP4_HLEN + l4 > d->cfg.mtu) {
		fragments(d, f, src, l4);
		return;
	}
	rn_ip4_build(eth, f->guest_mac, d->cfg.gateway_mac, src, f->guest_addr + 12, RN_IPPROTO_UDP, 64, d->ip_id++, 0, l4);
	if (partial) {
		v.flags = RN_VNET_NEEDS_CSUM;
		v.csum_start = RN_ETH_HLEN + RN_IP4_HLEN;
		v.csum_offset = RN_UDP_SUM;
	}
	if (super) {
		v.gso_type = RN_VNET_GSO_UDP_L4;
		v.gso_size = (uint16_t)gso;
		v.hdr_len = RN_ETH_HLEN + RN_IP4_HLEN + RN_UDP_HLEN;
	}
	memcpy(eth - RN_VNET_HLEN, &v, sizeof(v));
	if (!d->out(d->s, eth, frame))
		d->waiting = frame;
}

void fast_udp_begin(struct fast_down *d, struct down_flow *q)
{
	static const int on = 1;

	if (d->cfg.uso)
		(void)setsockopt(q->fd, IPPROTO_UDP, UDP_GRO, &on, sizeof(on)); /* without it: a datagram a read */
}

int fast_udp_pump(struct fast_down *d, uint32_t i)
{
	struct down_flow *q = &d->flow[i];
	struct rn_flow *f = &d->flows->flow[i];
	int r = 0;

	if (!rn_half_claim(&f->down.owner, d->me))
		return 0;
	if (f->gen != q->gen)
		goto leave;
	for (uint32_t n = 0; q->readable; n++) {
		struct sockaddr_in from;
		struct iovec iov = { d->buf + BUF_ETH + RN_ETH_HLEN + RN_IP4_HLEN + RN_UDP_HLEN, UDP_PAYLOAD_MAX };
		union {
			char raw[CMSG_SPACE(sizeof(int)) + 64];
			struct cmsghdr align;
		} control;
		struct msghdr m = { .msg_name = &from, .msg_namelen = sizeof(from), .msg_iov = &iov, .msg_iovlen = 1,
				    .msg_control = &control, .msg_controllen = sizeof(control) };
		int gso = 0;
		uint64_t began;
		ssize_t len;

		if (n == DATAGRAMS) {
			r = 1;
			break;
		}
		began = rn_stage_inline_begin(d->s);
		len = recvmsg(q->fd, &m, MSG_DONTWAIT);
		if (len < 0) {
			if (errno == EAGAIN)
				q->readable = 0;
			else if (errno != EINTR)
				continue; /* of an earlier datagram, and cleared by this read; egress tells the guest of it */
			continue;
		}
		if (m.msg_namelen < sizeof(from) || from.sin_family != AF_INET)
			continue;
		for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c))
			if (c->cmsg_level == IPPROTO_UDP && c->cmsg_type == UDP_GRO)
				memcpy(&gso, CMSG_DATA(c), sizeof(gso));
		RN_SHOW(f->last_ns, d->s->now);
		deliver(d, f, &from, (uint32_t)len, gso > 0 ? (uint32_t)gso : 0);
		if (d->waiting) {
			r = -1;
			break;
		}
		if (RN_UNLIKELY(began))
			rn_stage_inline_end(d->s, began);
	}
leave:
	rn_half_leave(&f->down.owner, d->me);
	return r;
}
