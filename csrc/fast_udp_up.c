/* fast_udp_up.c - promoted UDP mappings, guest to host: datagrams to one peer from the link straight to the host socket.
 *
 * The first datagram of a turn is sent at once. Those behind it that go to one peer and have one size (the last may be
 * shorter) are gathered and handed to the kernel as one (UDP_SEGMENT, udp(7)), which then walks its stack once for up to BATCH of them. egress approved of the peer, and of
 * the DF bit that the socket is set to; any other peer, DF bit or short TTL goes the usual way.
 */
#include "fast_up_internal.h"

#include <errno.h>
#include <netinet/udp.h>
#include <sys/socket.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#define BATCH 64u	/* UDP_MAX_SEGMENTS of every kernel that has it */
#define BATCH_BYTES 60000u
#define TTL_PLAIN 64u	/* as in udp.c: below it the TTL is passed on */

struct udp_batch {
	uint32_t flow, n, bytes, size; /* n: datagrams, 0: none; size: of each, the last one may have less */
	int again;		       /* 1: not the first datagram of this turn */
	int no_segment;		       /* 1: the kernel refused UDP_SEGMENT once */
	uint8_t buf[BATCH_BYTES + 2048];
};

struct udp_batch *fast_udp_new(void)
{
	return calloc(1, sizeof(struct udp_batch));
}

/* One by one. */
static void send_each(struct fast_up *u, struct fast_flow *ff)
{
	struct udp_batch *b = u->udp;

	for (uint32_t at = 0; at < b->bytes || (!b->bytes && !at);) {
		uint32_t n = b->bytes - at < b->size ? b->bytes - at : b->size;
		ssize_t r = sendto(ff->fd, b->buf + at, n, MSG_DONTWAIT | MSG_NOSIGNAL, (const struct sockaddr *)&ff->to,
				   sizeof(ff->to));

		/* An ICMP error about an earlier datagram is returned by the next call, which then sent nothing (udp.c). */
		if (r < 0 && errno != EAGAIN && errno != ENOBUFS)
			r = sendto(ff->fd, b->buf + at, n, MSG_DONTWAIT | MSG_NOSIGNAL, (const struct sockaddr *)&ff->to,
				   sizeof(ff->to));
		if (r < 0) {
			u->s->c[RN_C_drop_udp_fast]++;
			ff->slow |= errno == EMSGSIZE; /* egress tells the guest the path's MTU, of the next one */
		} else
			u->s->c[RN_C_udp_fast_up]++;
		at += n ? n : 1;
	}
}

void fast_udp_flush(struct fast_up *u)
{
	struct udp_batch *b = u->udp;
	struct fast_flow *ff = &u->flow[b->flow];
	struct iovec iov = { b->buf, b->bytes };
	union {
		char raw[CMSG_SPACE(sizeof(uint16_t))];
		struct cmsghdr align;
	} control = { .raw = { 0 } };
	struct msghdr m = { .msg_name = &ff->to, .msg_namelen = sizeof(ff->to), .msg_iov = &iov, .msg_iovlen = 1,
			    .msg_control = &control, .msg_controllen = sizeof(control) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	uint16_t size = (uint16_t)b->size;

	b->again = 0;
	if (!b->n)
		return;
	if (ff->proto != RN_IPPROTO_UDP) {
		u->s->c[RN_C_drop_udp_fast] += b->n; /* closed in between: a notice came */
	} else if (b->n == 1 || b->no_segment) {
		send_each(u, ff);
	} else {
		c->cmsg_level = IPPROTO_UDP;
		c->cmsg_type = UDP_SEGMENT;
		c->cmsg_len = CMSG_LEN(sizeof(size));
		memcpy(CMSG_DATA(c), &size, sizeof(size));
		if (sendmsg(ff->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) {
			u->s->c[RN_C_udp_fast_up] += b->n;
		} else if (errno == EAGAIN || errno == ENOBUFS) {
			u->s->c[RN_C_drop_udp_fast] += b->n; /* the host's buffer is full: UDP may be lost */
		} else {
			if (errno == ENOPROTOOPT || errno == EOPNOTSUPP || errno == EIO)
				b->no_segment = 1;
			send_each(u, ff); /* EINVAL: larger than the path's MTU, so that each is to be fragmented */
		}
	}
	b->n = b->bytes = 0;
}

int fast_udp_take(struct fast_up *u, uint32_t i, const uint8_t *eth, const struct rn_parsed *p)
{
	struct fast_flow *ff = &u->flow[i];
	struct rn_flow *f = &u->flows->flow[i];
	struct udp_batch *b = u->udp;
	uint32_t len = p->payload_len;
	int df = !!(rn_get16(eth + RN_ETH_HLEN + RN_IP4_FRAG) & RN_IP4_DF);

	if (f->gen != ff->gen || ff->slow || (p->ttl < TTL_PLAIN && memcmp(eth + RN_ETH_HLEN + RN_IP4_DST, u->cfg.parse.gateway4, 4)) ||
	    df != ff->df || memcmp(eth + 6, f->guest_mac, 6) || len > BATCH_BYTES)
		return 0;
	if (b->n && (b->flow != i || len > b->size || b->bytes != b->n * b->size || b->bytes + len > BATCH_BYTES || b->n == BATCH ||
		     !len))
		fast_udp_flush(u);
	if (!b->n) {
		b->flow = i;
		b->size = len;
	}
	memcpy(b->buf + b->bytes, eth + p->payload_off, len);
	b->bytes += len;
	b->n++;
	if (!b->again) { /* at once: a lone datagram is asked for an answer, and must not wait for others that do not come */
		fast_udp_flush(u);
		b->again = 1;
	}
	f->up.bytes += len;
	f->up.packets++;
	RN_SHOW(f->last_ns, u->s->now);
	u->s->c[RN_C_fast_frames]++;
	return 1;
}
