/* fast_udp_up.c - promoted UDP mappings, guest to host: datagrams to one peer from the link straight to the host socket.
 *
 * The first datagram of a turn is sent at once. Those behind it that go to one peer and have one size (the last may be
 * shorter) are gathered and handed to the kernel as one (UDP_SEGMENT, udp(7)), which then walks its stack once for up to
 * BATCH of them. What the guest's kernel hands over as one (rn_uso.h) needs no gathering, and goes from where it lies.
 *
 * egress approved of the peer, and of the DF bit that the socket is set to; any other peer, DF bit or short TTL goes the
 * usual way.
 */
#include "fast_up_internal.h"

#include <errno.h>

#include "rn_uso.h"

#define BATCH 64u /* datagrams: as many as a call takes */
#define BATCH_BYTES 60000u
#define TTL_PLAIN 64u	/* as in udp.c: below it the TTL is passed on */

struct udp_batch {
	uint32_t flow, n, bytes, size; /* n: datagrams, 0: none; size: of each, the last one may have less */
	int again; /* 1: not the first datagram of this turn */
	uint8_t buf[BATCH_BYTES + 2048];
};

struct udp_batch *fast_udp_new(void)
{
	return calloc(1, sizeof(struct udp_batch));
}

static void send_train(struct fast_up *u, struct fast_flow *ff, const uint8_t *payload, uint32_t len, uint32_t size)
{
	struct msghdr m = { .msg_name = &ff->to, .msg_namelen = sizeof(ff->to) };
	struct rn_uso what;

	rn_uso_send(ff->fd, &m, payload, len, size, &what);
	u->s->c[RN_C_udp_fast_up] += what.sent;
	u->s->c[RN_C_drop_udp_fast] += what.lost;
	ff->slow |= what.err == EMSGSIZE; /* egress tells the guest the path's MTU: of this one by the error queue */
}

void fast_udp_flush(struct fast_up *u)
{
	struct udp_batch *b = u->udp;
	struct fast_flow *ff = &u->flow[b->flow];

	b->again = 0;
	if (!b->n)
		return;
	if (ff->proto == RN_IPPROTO_UDP)
		send_train(u, ff, b->buf, b->bytes, b->size);
	else
		u->s->c[RN_C_drop_udp_fast] += b->n; /* closed in between: a notice came */
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
	    df != ff->df || memcmp(eth + 6, f->guest_mac, 6) || (len > BATCH_BYTES && !p->each))
		return 0;
	if (p->each) {
		fast_udp_flush(u); /* what came before it */
		send_train(u, ff, eth + p->payload_off, len, p->each);
		goto taken;
	}
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
taken:
	f->up.bytes += len;
	f->up.packets += rn_uso_count(len, p->each);
	RN_SHOW(f->last_ns, u->s->now);
	u->s->c[RN_C_fast_frames]++;
	return 1;
}
