/* stage_classify.c - every frame of the guest's: checked, then handed on, answered, or dropped with a reason.
 *
 * In:    frames of guest_tx. Out: egress (RN_ROLE_BRIDGE), services (RN_ROLE_SERVICE), and to the guest
 *        (RN_ROLE_GUEST) ARP replies and ICMP errors of its own. The rules are in rn_parse.c, arp.c and
 *        reassembly.c; here is what moves: rings, buffers, counters, the clock.
 *
 * Full outputs. egress full: the burst stops at that frame, which stays in the ring, and so does guest_tx
 * when the ring is full: TCP is not lost inside. services full: that frame is dropped and counted, because
 * DHCP and DNS clients ask again and must not stop everybody's TCP. Ring to the guest full: the ARP request
 * goes unanswered and is counted (the guest asks again), an ICMP error is withheld.
 *
 * Every frame taken is counted once in frames_in and once by its verdict (enum rn_verdict, plus
 * drop_services_full and drop_reply_full in place of to_services and arp_replies). A datagram put together
 * from fragments gets one verdict more, and so does each but the first that is cut out of a train for services:
 * frames_in + reassembled + trains_cut == the sum of the verdicts.
 *
 * ICMP errors: host unreachable for the subnet's addresses nobody has, protocol unreachable (RFC 1122
 * 3.2.2.1), reassembly time exceeded (RFC 1122 3.3.2). At most ICMP_BURST at once and one each ICMP_EVERY_NS.
 *
 * Buffers: own small ones for replies, own large ones for reassembly (topology.py: 32, of which
 * reassembly.h's RA_DATAGRAMS may be under way; the rest are datagrams on their way through egress).
 */
#include "stage_classify.h"

#include <errno.h>
#include <stdlib.h>

#include "arp.h"
#include "reassembly.h"
#include "rn_csum.h"
#include "rn_gso.h"

#define BURST 64u		  /* frames a turn: bounds the time to a cancel */
#define ICMP_BURST 32u		  /* errors */
#define ICMP_EVERY_NS 10000000ull /* 100 a second */
#define ICMP_TTL 64u
#define ICMP_TOS 0xc0u /* RFC 1812 4.3.2.5: precedence internetwork control */
#define ICMP_REASSEMBLY 1u /* RFC 792: code of time exceeded */

_Static_assert(RA_FRONT == RN_BUF_ETH_OFF, "reassembly leaves room for the buffer header");
_Static_assert(RA_BLOCK <= RN_BUF_LARGE, "a datagram fits a large buffer");
_Static_assert(RN_BUF_ETH_OFF + RN_ETH_HLEN + RN_IP4_HLEN + RN_ICMP_HLEN + 548 <= RN_BUF_SMALL, "an ICMP error fits");

struct stage_classify {
	struct classify_config cfg;
	struct reassembly *ra;
	struct ra_stat seen; /* reassembly's counts when they were last taken over */
	uint32_t tokens;     /* ICMP errors allowed now */
	uint64_t refilled;   /* ns: when tokens were last added */
	struct rn_buf *spent[BURST]; /* buffers to free once the burst is off the ring */
	uint32_t nspent;
};

static void *block_get(void *ctx)
{
	struct rn_stage *s = ctx;

	return rn_buf_alloc(&s->pool, RN_LARGE);
}

static void block_put(void *ctx, void *block)
{
	struct rn_stage *s = ctx;

	rn_buf_free(&s->pool, block);
}

/* Whom a frame is from and to, as far as it says so in the usual places; for the log, so nothing is believed. */
static struct rn_who who_of(const struct rn_view *v)
{
	struct rn_who who = { .flow = (uint32_t)RN_NO_FLOW };
	const uint8_t *type = rn_view_get(v, 12, 2), *ip = rn_view_get(v, RN_ETH_HLEN, RN_IP4_HLEN), *ports;

	if (!type || !ip || rn_get16(type) != RN_ETHERTYPE_IPV4)
		return who;
	rn_addr_from4(who.guest, ip + RN_IP4_SRC);
	rn_addr_from4(who.peer, ip + RN_IP4_DST);
	who.proto = ip[RN_IP4_PROTO];
	if ((who.proto != RN_IPPROTO_TCP && who.proto != RN_IPPROTO_UDP) || rn_get16(ip + RN_IP4_FRAG) & 0x1fff)
		return who;
	ports = rn_view_get(v, RN_ETH_HLEN + (ip[0] & 15u) * 4u, 4);
	if (ports) {
		who.guest_port = rn_get16(ports);
		who.peer_port = rn_get16(ports + 2);
	}
	return who;
}

/* Count a frame that goes no further, and note whose it was. */
static void count(struct rn_stage *s, uint32_t counter, const struct rn_view *v)
{
	struct rn_who who = { .proto = 0 };

	if (rn_stage_tells(s, counter))
		who = who_of(v);
	rn_stage_count(s, counter, &who);
}

/* A buffer and room for one frame to the guest, or NULL; never waits, so nobody is asked to wake us. */
static struct rn_buf *reply_buf(struct rn_stage *s)
{
	struct rn_buf *b = NULL;

	if (rn_stage_room(s, RN_ROLE_GUEST, 1))
		b = rn_buf_alloc(&s->pool, RN_SMALL);
	s->want_room[RN_ROLE_GUEST] = 0;
	return b;
}

static void reply_send(struct rn_stage *s, struct rn_buf *b, uint8_t *eth, uint32_t len)
{
	rn_stage_emit(s, RN_ROLE_GUEST, b, eth, len, 0);
	s->c[RN_C_frames_out]++;
	s->c[RN_C_bytes_out] += len;
}

static int icmp_allowed(struct rn_stage *s, struct stage_classify *c)
{
	uint64_t more = (s->now - c->refilled) / ICMP_EVERY_NS;

	if (more) {
		c->tokens = more + c->tokens > ICMP_BURST ? ICMP_BURST : c->tokens + (uint32_t)more;
		c->refilled += more * ICMP_EVERY_NS;
	}
	if (!c->tokens)
		return 0;
	c->tokens--;
	return 1;
}

/**
 * icmp_error() - Tell the guest why its packet went nowhere
 * @s:		Stage
 * @eth:	The packet's frame
 * @len:	Its bytes, [34, ...); an IPv4 header with its options is in them
 * @type:	RFC 792 type
 * @code:	and code
 *
 * The caller has seen that RFC 1122 3.2.2 allows one. Quotes as much as makes 576 bytes (RFC 1812 4.3.2.3).
 */
static void icmp_error(struct rn_stage *s, const uint8_t *eth, uint32_t len, uint8_t type, uint8_t code)
{
	struct stage_classify *c = s->priv;
	uint32_t quote = len - RN_ETH_HLEN;
	struct rn_buf *b = icmp_allowed(s, c) ? reply_buf(s) : NULL;
	uint8_t *out, *ip, *icmp;
	uint16_t sum;

	if (!b) {
		s->c[RN_C_icmp_errors_withheld]++;
		return;
	}
	if (quote > 576 - RN_IP4_HLEN - RN_ICMP_HLEN)
		quote = 576 - RN_IP4_HLEN - RN_ICMP_HLEN;
	out = (uint8_t *)b + RN_BUF_ETH_OFF;
	ip = out + RN_ETH_HLEN;
	icmp = ip + RN_IP4_HLEN;
	memcpy(icmp + RN_ICMP_HLEN, eth + RN_ETH_HLEN, quote);

	memcpy(out, eth + 6, 6);
	memcpy(out + 6, c->cfg.gateway_mac, 6);
	rn_put16(out + 12, RN_ETHERTYPE_IPV4);

	memset(ip, 0, RN_IP4_HLEN + RN_ICMP_HLEN);
	ip[0] = 0x45;
	ip[RN_IP4_TOS] = ICMP_TOS;
	rn_put16(ip + RN_IP4_LEN, (uint16_t)(RN_IP4_HLEN + RN_ICMP_HLEN + quote));
	rn_put16(ip + RN_IP4_FRAG, RN_IP4_DF); /* RFC 6864 4.1: then the identification may be anything */
	ip[RN_IP4_TTL] = ICMP_TTL;
	ip[RN_IP4_PROTO] = RN_IPPROTO_ICMP;
	memcpy(ip + RN_IP4_SRC, c->cfg.gateway4, 4);
	memcpy(ip + RN_IP4_DST, eth + RN_ETH_HLEN + RN_IP4_SRC, 4);
	rn_csum_ip4(ip, RN_IP4_HLEN);

	icmp[0] = type;
	icmp[1] = code;
	sum = (uint16_t)~rn_csum_fold(rn_csum_add(0, icmp, RN_ICMP_HLEN + quote));
	memcpy(icmp + 2, &sum, sizeof(sum)); /* in memory order (rn_csum.h) */
	reply_send(s, b, out, RN_ETH_HLEN + RN_IP4_HLEN + RN_ICMP_HLEN + quote);
	s->c[RN_C_icmp_errors_sent]++;
}

static void arp_answer(struct rn_stage *s, struct stage_classify *c, const struct rn_view *v)
{
	struct rn_buf *b = reply_buf(s);
	uint8_t *out;

	if (!b) {
		s->c[RN_C_drop_reply_full]++;
		return;
	}
	out = (uint8_t *)b + RN_BUF_ETH_OFF;
	arp_reply(out, v, &c->cfg);
	reply_send(s, b, out, ARP_FRAME_LEN);
	s->c[RN_C_arp_replies]++;
}

/* Hand a checked frame on; the caller has seen room. */
static void forward(struct rn_stage *s, int role, struct rn_buf *b, const uint8_t *eth, const struct rn_parsed *p,
		    uint16_t desc_flags, uint8_t meta_flags)
{
	b->meta = rn_meta_of(p, meta_flags);
	rn_stage_emit(s, role, b, eth, p->frame_len, desc_flags);
	s->c[RN_C_frames_out]++;
	s->c[RN_C_bytes_out] += p->frame_len;
}

/* A reply to the gateway: egress may have asked (inbound.c). 1: handed on; 0: it is none, or egress is behind. */
static int arp_forward(struct rn_stage *s, const struct stage_classify *c, struct rn_buf *b, const struct rn_view *v)
{
	const uint8_t *arp = rn_view_get(v, RN_ETH_HLEN, RN_ARP_LEN);
	int room;

	if (!arp || rn_get16(arp + RN_ARP_OP) != RN_ARP_REPLY || memcmp(arp + RN_ARP_TPA, c->cfg.gateway4, 4))
		return 0;
	room = rn_stage_room(s, RN_ROLE_BRIDGE, 1);
	s->want_room[RN_ROLE_BRIDGE] = 0;
	if (!room)
		return 0;
	b->meta = (struct rn_meta){ .ip_version = 0 };
	rn_stage_emit(s, RN_ROLE_BRIDGE, b, v->data, v->len, 0);
	s->c[RN_C_frames_out]++;
	s->c[RN_C_bytes_out] += v->len;
	return 1;
}

/* services is behind: its frames are dropped, everybody else's are not held up. */
static int service_room(struct rn_stage *s, const struct rn_view *v)
{
	int room = rn_stage_room(s, RN_ROLE_SERVICE, 1);

	s->want_room[RN_ROLE_SERVICE] = 0;
	if (!room)
		count(s, RN_C_drop_services_full, v);
	return room;
}

/* A train of datagrams (rn_uso.h) for services, which knows single ones: cut here. What finds no room is dropped. */
static void service_train(struct rn_stage *s, const struct rn_view *v, const struct rn_parsed *p)
{
	struct rn_gso g;
	int n = rn_gso_begin(&g, v->data - RN_VNET_HLEN, p->frame_len);

	if (n < 0)
		count(s, RN_C_drop_gso_mismatch, v);
	for (int i = 0; i < n; i++) {
		struct rn_parsed one = *p;
		uint8_t head[RN_GSO_HEAD_MAX];
		const uint8_t *payload;
		struct rn_buf *b;

		rn_gso_next(&g, head, &payload, &one.payload_len);
		one.each = 0;
		one.frame_len = g.hlen + one.payload_len;
		s->c[RN_C_trains_cut] += i > 0;
		if (!service_room(s, v))
			continue;
		b = rn_buf_alloc(&s->pool, one.frame_len <= RN_SMALL_FRAME_MAX ? RN_SMALL : RN_LARGE);
		if (!b) {
			count(s, RN_C_drop_services_full, v);
			continue;
		}
		memcpy((uint8_t *)b + RN_BUF_ETH_OFF, head, g.hlen);
		memcpy((uint8_t *)b + RN_BUF_ETH_OFF + g.hlen, payload, one.payload_len);
		s->c[RN_C_to_services]++;
		forward(s, RN_ROLE_SERVICE, b, (uint8_t *)b + RN_BUF_ETH_OFF, &one, 0, 0);
	}
}

/* Take over what reassembly counted. Differences: the stage's counters may go on from an earlier generation. */
static void count_reassembly(struct rn_stage *s, struct stage_classify *c)
{
	struct ra_stat now;

	reassembly_stat(c->ra, &now);
	s->c[RN_C_reassembled] += now.datagrams - c->seen.datagrams;
	s->c[RN_C_fragment_duplicates] += now.duplicates - c->seen.duplicates;
	s->c[RN_C_drop_fragment_bad] += now.bad - c->seen.bad;
	s->c[RN_C_drop_fragment_table] += now.table - c->seen.table;
	s->c[RN_C_drop_fragment_timeout] += now.timeout - c->seen.timeout;
	c->seen = now;
}

/* A datagram is whole: parse it as if it had come so. The caller has seen room towards egress. */
static void reassembled(struct rn_stage *s, struct stage_classify *c, const struct ra_done *done)
{
	struct rn_view v = { .data = done->eth, .len = done->len };
	struct rn_buf *b = done->block;
	enum rn_verdict verdict;
	struct rn_parsed p;

	verdict = rn_parse_frame(&v, NULL, &c->cfg, &p);
	if (verdict == RN_V_SERVICE && !service_room(s, &v)) {
		rn_buf_free(&s->pool, b);
		return;
	}
	s->c[rn_verdict_counter(verdict)]++;
	if (verdict == RN_V_BRIDGE || verdict == RN_V_SERVICE)
		forward(s, verdict == RN_V_BRIDGE ? RN_ROLE_BRIDGE : RN_ROLE_SERVICE, b, done->eth, &p, 0,
			RN_META_REASSEMBLED);
	else
		rn_buf_free(&s->pool, b);
}

/* One descriptor. 1: done with it; 0: no room towards egress, it stays in the ring. */
static int classify_one(struct rn_stage *s, struct stage_classify *c, const struct rn_desc *d)
{
	struct rn_buf *b;
	struct rn_vnet_hdr vnet;
	enum rn_verdict verdict;
	struct rn_parsed p;
	struct ra_done done;
	struct rn_view v;

	if (RN_UNLIKELY(d->flags & RN_DESC_FLOW)) /* guest_tx to egress, behind the frames before it (rn_promote.h) */
		return !rn_stage_notice(s, RN_ROLE_BRIDGE, d->flags, (uint32_t)d->off, d->len);
	b = rn_stage_buf(s, d);
	if (RN_UNLIKELY(!b)) {
		/* guest_tx, taken over, can publish anything; there is no buffer to free. */
		s->c[RN_C_frames_in]++;
		s->c[RN_C_drop_bad_descriptor]++;
		return 1;
	}
	v = (struct rn_view){ .data = s->pool.base + d->off, .len = d->len };
	/* rn_buf_of() saw to it that the 12 bytes are there. A copy: what is checked is what is used. */
	if (d->flags & RN_DESC_VNET)
		memcpy(&vnet, v.data - RN_VNET_HLEN, sizeof(vnet));
	verdict = rn_parse_frame(&v, d->flags & RN_DESC_VNET ? &vnet : NULL, &c->cfg, &p);

	/* A fragment may complete a datagram for egress, so it waits for room as well. */
	if ((verdict == RN_V_BRIDGE || verdict == RN_V_FRAGMENT) && !rn_stage_room(s, RN_ROLE_BRIDGE, 1))
		return 0;
	s->c[RN_C_frames_in]++;
	s->c[RN_C_bytes_in] += d->len;
	switch (verdict) {
	case RN_V_BRIDGE:
		s->c[RN_C_to_bridge]++;
		forward(s, RN_ROLE_BRIDGE, b, v.data, &p, d->flags & RN_DESC_VNET, 0);
		return 1;
	case RN_V_SERVICE:
		if (RN_UNLIKELY(p.each)) {
			service_train(s, &v, &p);
			break;
		}
		if (!service_room(s, &v))
			break;
		s->c[RN_C_to_services]++;
		forward(s, RN_ROLE_SERVICE, b, v.data, &p, d->flags & RN_DESC_VNET, 0);
		return 1;
	case RN_V_ARP:
		arp_answer(s, c, &v);
		break;
	case RN_V_ARP_IGNORED:
		s->c[RN_C_arp_ignored]++;
		if (arp_forward(s, c, b, &v))
			return 1;
		break;
	case RN_V_FRAGMENT:
		s->c[RN_C_fragments_in]++;
		if (reassembly_add(c->ra, s->now, &v, &p, &done) == RA_DONE)
			reassembled(s, c, &done);
		count_reassembly(s, c);
		break;
	case RN_V_NO_SUCH_HOST:
	case RN_V_IP_PROTOCOL:
		count(s, rn_verdict_counter(verdict), &v);
		if (p.may_answer)
			icmp_error(s, v.data, p.frame_len, RN_ICMP_UNREACH,
				   verdict == RN_V_IP_PROTOCOL ? RN_ICMP_UNREACH_PROTO : RN_ICMP_UNREACH_HOST);
		break;
	default:
		count(s, rn_verdict_counter(verdict), &v);
	}
	c->spent[c->nspent++] = b;
	return 1;
}

/* For a capture of the input ring. */
static void tap(struct rn_stage *s, uint32_t i, const struct rn_desc *d)
{
	if (RN_UNLIKELY(s->tapped) && rn_buf_of(&s->pool, d))
		rn_tap_frame(s, i, RN_PCAP_FROM_GUEST, s->pool.base + d->off, d->len);
}

/* Datagrams whose time is over (RFC 1122 3.3.2: tell the sender, if the first fragment came). */
static void expire(struct rn_stage *s, struct stage_classify *c)
{
	uint8_t quote[RA_QUOTE_MAX];
	uint32_t len;

	if (RN_LIKELY(s->now < reassembly_deadline(c->ra)))
		return;
	while (reassembly_expire(c->ra, s->now, quote, &len))
		/* RFC 1122 3.2.2: not about an ICMP message that may be an error itself; pings go without. */
		if (len && quote[RN_ETH_HLEN + RN_IP4_PROTO] != RN_IPPROTO_ICMP)
			icmp_error(s, quote, len, RN_ICMP_TIMEXCEED, ICMP_REASSEMBLY);
	count_reassembly(s, c);
}

static int classify_turn(struct rn_stage *s)
{
	struct stage_classify *c = s->priv;
	int did = 0;

	expire(s, c);
	for (uint32_t i = 0; i < s->nin; i++) {
		uint32_t n = (uint32_t)rn_stage_peek(s, i, BURST), k;

		for (k = 0; k < n; k++) {
			struct rn_desc d = rn_ring_at(&s->in[i], k);

			tap(s, i, &d);
			if (!classify_one(s, c, &d)) {
				rn_tap_undo(s);
				s->hold_input = 1;
				break;
			}
			rn_tap_done(s);
		}
		if (!k)
			continue;
		/* Head moves only when the burst is handed on; buffers are free only when it cannot be seen
		 * again (DESIGN 6): killed in between, a successor repeats frames or sweeps buffers. */
		rn_stage_publish(s);
		rn_ring_consume(&s->in[i], k);
		while (c->nspent)
			rn_buf_free(&s->pool, c->spent[--c->nspent]);
		did += (int)k;
	}
	return did;
}

static uint64_t classify_deadline(struct rn_stage *s)
{
	struct stage_classify *c = s->priv;

	return reassembly_deadline(c->ra);
}

static void classify_fini(struct rn_stage *s)
{
	struct stage_classify *c = s->priv;

	reassembly_free(c->ra);
	free(c);
	s->priv = NULL;
}

static const struct rn_stage_ops classify_ops = {
	.turn = classify_turn,
	.deadline = classify_deadline,
	.fini = classify_fini,
};

int stage_classify_init(struct rn_stage *s, const struct classify_config *cfg)
{
	const struct ra_memory mem = { .get = block_get, .put = block_put, .ctx = s };
	struct stage_classify *c;

	if (classify_config_check(cfg))
		return rn_fail(s, -EINVAL, "classify: gateway, subnet or MAC address is out of range");
	c = calloc(1, sizeof(*c));
	if (!c)
		return -ENOMEM;
	c->cfg = *cfg;
	c->ra = reassembly_new(&mem);
	if (!c->ra) {
		free(c);
		return -ENOMEM;
	}
	c->tokens = ICMP_BURST;
	c->refilled = rn_stage_now(s);
	s->priv = c;
	s->ops = &classify_ops;
	return 0;
}
