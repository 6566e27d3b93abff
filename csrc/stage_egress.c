/* stage_egress.c - the egress stage: flow table, timers, work queue, and output to the guest.
 *
 * Frames that classify hands on become calls of host sockets, and what the sockets hold becomes frames
 * again. This file knows no protocol: tcp.c, udp.c and icmp.c do, through egress.h.
 *
 * A turn, in this order, each part bounded:
 *   1. a burst of frames from the input rings. They are always taken, also when the guest's ring is full:
 *      a protocol notes what it owes the guest as work, so ACKs and data upwards never wait for room downwards.
 *   2. datagrams that found no room earlier (the backlog), oldest first. While one is left, 3 (its
 *      datagrams) and 4 are skipped: everything they could do needs the same room.
 *   3. forwards (inbound.c): new connections and datagrams from outside.
 *   4. the work queue: flows with something to do, first in, first out; a flow that has more goes to the end,
 *      so one busy flow does not starve the others. Socket events only put flows here.
 *   5. timers that are due.
 *
 * Flow table: entries lie in shared memory (rn_flow.h); chains, timers and descriptors are private, in an
 * array of the same index. The hash is SipHash-2-4 with the session's key, because the guest chooses ports
 * and addresses and could aim at one chain otherwise.
 *
 * Timers: a hashed wheel (Varghese and Lauck 1987, scheme 6) of 1024 slots of 4 ms. An entry more than one turn of the
 * wheel away stays in its slot and is looked at again each turn. Moving a deadline back (the usual case: each
 * segment does it) only stores the new time; the entry is hung anew when its old slot comes up.
 */
#include "egress.h"
#include "inbound.h"
#include "policy.h"
#include "proxy.h"
#include "rn_csum.h"
#include "rn_tcpseg.h"
#include "rn_uso.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <unistd.h>

#define EG_BURST 64u	     /* frames a turn */
#define EG_WORK_BUDGET 64u   /* *_work calls a turn */
#define EG_TIMER_BUDGET 256u /* timers a turn */
#define EG_ICMP_RATE 100u    /* ICMP errors a second, */
#define EG_ICMP_BURST 50u    /* and at once (RFC 1812 4.3.2.8) */
#define EG_ICMP_MAX 576u     /* bytes of an error, IP header included (RFC 1812 4.3.2.3) */
#define EG_NS 1000000000ull
#define LATEST_NS (366ull * 24 * 3600 * EG_NS) /* no time that a flow waits for is farther away */

/* --- random numbers and hashing --- */

static inline uint64_t rotl(uint64_t v, int n)
{
	return v << n | v >> (64 - n);
}

static inline void sip_round(uint64_t v[4])
{
	v[0] += v[1];
	v[1] = rotl(v[1], 13) ^ v[0];
	v[0] = rotl(v[0], 32);
	v[2] += v[3];
	v[3] = rotl(v[3], 16) ^ v[2];
	v[0] += v[3];
	v[3] = rotl(v[3], 21) ^ v[0];
	v[2] += v[1];
	v[1] = rotl(v[1], 17) ^ v[2];
	v[2] = rotl(v[2], 32);
}

/**
 * stage_egress_siphash() - SipHash-2-4 (Aumasson and Bernstein 2012)
 * @key0:	Key, first half
 * @key1:	Key, second half
 * @data:	Bytes
 * @len:	How many
 *
 * Return: 64-bit hash.
 */
uint64_t stage_egress_siphash(uint64_t key0, uint64_t key1, const void *data, uint64_t len)
{
	const uint8_t *p = data;
	uint64_t v[4] = {
		key0 ^ 0x736f6d6570736575ull,
		key1 ^ 0x646f72616e646f6dull,
		key0 ^ 0x6c7967656e657261ull,
		key1 ^ 0x7465646279746573ull,
	};
	uint64_t last = len << 56, left = len;

	for (; left >= 8; left -= 8, p += 8) {
		uint64_t m;

		memcpy(&m, p, 8); /* little-endian words: asserted in rn_proto.h */
		v[3] ^= m;
		sip_round(v);
		sip_round(v);
		v[0] ^= m;
	}
	for (uint64_t k = 0; k < left; k++)
		last |= (uint64_t)p[k] << (8 * k);
	v[3] ^= last;
	sip_round(v);
	sip_round(v);
	v[0] ^= last;
	v[2] ^= 0xff;
	for (int k = 0; k < 4; k++)
		sip_round(v);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}

uint64_t eg_siphash(const struct egress *e, const void *data, size_t len)
{
	return stage_egress_siphash(e->secret[0], e->secret[1], data, len);
}

/**
 * eg_random() - Next random number
 * @e:	Stage
 *
 * Without a seed a keyed hash of a counter, which a guest cannot predict; with one, splitmix64 of the seed,
 * the same in each run.
 *
 * Return: 64 random bits.
 */
uint64_t eg_random(struct egress *e)
{
	uint64_t z = e->rng += 0x9e3779b97f4a7c15ull;

	if (!e->cfg.seed)
		return eg_siphash(e, &z, sizeof(z));
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	return z ^ z >> 31;
}

/* --- flow table --- */

static uint32_t key_bucket(const struct egress *e, uint8_t proto, const uint8_t guest[16], uint16_t gport,
			   const uint8_t peer[16], uint16_t pport)
{
	uint8_t key[37];

	memcpy(key, guest, 16);
	memcpy(key + 16, peer, 16);
	memcpy(key + 32, &gport, 2);
	memcpy(key + 34, &pport, 2);
	key[36] = proto;
	return (uint32_t)eg_siphash(e, key, sizeof(key)) & e->hash_mask;
}

uint32_t eg_find(struct egress *e, uint8_t proto, const uint8_t guest[16], uint16_t gport, const uint8_t peer[16],
		 uint16_t pport)
{
	uint32_t i = e->hash[key_bucket(e, proto, guest, gport, peer, pport)];

	for (; i != EG_NONE; i = e->priv[i].hash_next) {
		const struct rn_flow *fl = eg_flow(e, i);

		if (e->priv[i].proto == proto && fl->guest_port == gport && fl->peer_port == pport &&
		    !memcmp(fl->guest_addr, guest, 16) && !memcmp(fl->peer_addr, peer, 16))
			return i;
	}
	return EG_NONE;
}

/* --- the log --- */

static struct rn_who who_of(const struct egress *e, uint32_t i)
{
	const struct rn_flow *fl = &e->flows->flow[i];
	struct rn_who who = {
		.guest_port = fl->guest_port, .peer_port = fl->peer_port, .proto = fl->proto, .flow = i, .flow_gen = fl->gen,
	};

	memcpy(who.guest, fl->guest_addr, 16);
	memcpy(who.peer, fl->peer_addr, 16);
	return who;
}

void eg_count(struct egress *e, uint32_t i, uint32_t counter)
{
	struct rn_who who = { .proto = 0 };

	if (rn_stage_tells(e->s, counter))
		who = who_of(e, i);
	rn_stage_count(e->s, counter, &who);
}

static struct rn_who by_address(uint8_t proto, const uint8_t guest[16], uint16_t gport, const uint8_t peer[16],
				uint16_t pport)
{
	struct rn_who who = { .guest_port = gport, .peer_port = pport, .proto = proto, .flow = (uint32_t)RN_NO_FLOW };

	memcpy(who.guest, guest, 16);
	memcpy(who.peer, peer, 16);
	return who;
}

void eg_count_of(struct egress *e, uint32_t counter, uint8_t proto, const uint8_t guest[16], uint16_t gport,
		 const uint8_t peer[16], uint16_t pport)
{
	struct rn_who who = by_address(proto, guest, gport, peer, pport);

	rn_stage_count(e->s, counter, &who);
}

static void note_flow(struct egress *e, uint32_t i, enum rn_event_kind kind, uint64_t value)
{
	struct rn_who who = who_of(e, i);

	rn_stage_note(e->s, kind, &who, value);
}

uint32_t eg_new(struct egress *e, uint8_t proto, const uint8_t guest[16], uint16_t gport, const uint8_t peer[16],
		uint16_t pport, const uint8_t mac[6])
{
	uint32_t i, bucket = key_bucket(e, proto, guest, gport, peer, pport);
	struct flow_priv *p;
	struct rn_flow *fl;

	/* A flow in TIME-WAIT has no socket, no parked data and no work but an ACK: it only remembers. */
	if (eg_full(e) && e->tw_lru.head != EG_NONE)
		eg_drop(e, e->tw_lru.head);
	i = e->free_head;
	if (i == EG_NONE && e->fresh == e->nflows)
		return EG_NONE;
	if (i == EG_NONE)
		i = e->fresh++;
	else
		e->free_head = e->priv[i].hash_next;
	p = &e->priv[i];
	fl = eg_flow(e, i);
	e->used++;

	*p = (struct flow_priv){
		.fd = -1,
		.proto = proto,
		.bucket = bucket,
		.hash_next = e->hash[bucket],
		.timer_next = EG_NONE,
		.timer_prev = EG_NONE,
		.deadline = UINT64_MAX,
		.work_next = EG_NONE,
		.work_prev = EG_NONE,
		.lru_next = EG_NONE,
		.lru_prev = EG_NONE,
		.rto_at = UINT64_MAX,
		.ack_at = UINT64_MAX,
		.life_at = UINT64_MAX,
	};
	e->hash[bucket] = i;

	memset(&fl->up, 0, sizeof(fl->up));
	memset(&fl->down, 0, sizeof(fl->down));
	memcpy(fl->guest_addr, guest, 16);
	memcpy(fl->peer_addr, peer, 16);
	memcpy(fl->guest_mac, mac, 6);
	fl->guest_port = gport;
	fl->peer_port = pport;
	fl->proto = proto;
	fl->gen++;
	fl->flags = 0;
	atomic_store_explicit(&fl->acks.broke, 0, memory_order_relaxed);
	fl->created_ns = fl->last_ns = e->s->now;
	/* F1: the entry was free, so nobody else can want a half of it; release so that F2 sees the rest. */
	atomic_store_explicit(&fl->up.owner, e->s->row + 1, memory_order_release);
	atomic_store_explicit(&fl->down.owner, e->s->row + 1, memory_order_release);
	atomic_store_explicit(&fl->state, proto == RN_IPPROTO_TCP ? RN_FL_CONNECTING : RN_FL_MAPPED,
			      memory_order_relaxed);
	note_flow(e, i, RN_DID_OPEN, 0);
	return i;
}

int eg_later(const struct egress *e, uint64_t *at, uint64_t gap)
{
	if (*at == UINT64_MAX)
		return 0;
	if (*at > e->s->now + LATEST_NS)
		return -EPROTO;
	*at += gap;
	return 0;
}

int eg_adopt(struct egress *e, uint32_t i, const struct flow_priv *was, int fd, uint64_t gap)
{
	struct flow_priv *p = &e->priv[i];
	const struct rn_flow *fl = eg_flow(e, i);
	uint64_t at = was->timed ? was->deadline : UINT64_MAX;

	if (eg_later(e, &at, gap))
		return -EPROTO;
	*p = *was;
	p->fd = -1;
	p->timer_next = p->timer_prev = p->work_next = p->work_prev = p->lru_next = p->lru_prev = EG_NONE;
	p->deadline = UINT64_MAX;
	p->timed = p->queued = p->in_lru = 0;
	p->parked = NULL;
	p->nparked = 0;
	if (fd >= 0) {
		int r = eg_watch(e, i, fd, was->events);

		if (r) {
			p->proto = 0;
			return r;
		}
	}
	p->bucket = key_bucket(e, p->proto, fl->guest_addr, fl->guest_port, fl->peer_addr, fl->peer_port);
	p->hash_next = e->hash[p->bucket];
	e->hash[p->bucket] = i;
	e->used++;
	if (e->fresh <= i)
		e->fresh = i + 1;
	eg_timer(e, i, at);
	return 0;
}

void eg_adopted(struct egress *e, uint32_t fresh)
{
	if (e->fresh < fresh)
		e->fresh = fresh;
	e->free_head = EG_NONE;
	for (uint32_t i = e->fresh; i-- > 0;) {
		if (e->priv[i].proto)
			continue;
		e->priv[i].hash_next = e->free_head;
		e->priv[i].fd = -1;
		e->free_head = i;
	}
}

void eg_clear_table(struct egress *e)
{
	for (uint32_t i = 0; i < e->nflows; i++) {
		struct rn_flow *fl = eg_flow(e, i);

		atomic_store_explicit(&fl->state, RN_FL_FREE, memory_order_relaxed);
		atomic_store_explicit(&fl->up.owner, 0, memory_order_release); /* F1 */
		atomic_store_explicit(&fl->down.owner, 0, memory_order_release);
	}
	e->free_head = EG_NONE;
	e->fresh = 0;
}

static struct eg_lru *lru_of(struct egress *e, uint32_t i)
{
	switch (e->priv[i].proto) {
	case RN_IPPROTO_ICMP:
		return &e->icmp_lru;
	case RN_IPPROTO_TCP:
		return &e->tw_lru;
	}
	return e->in->flow[i].serial ? &e->in->lru : &e->udp_lru;
}

static void lru_del(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct eg_lru *l = lru_of(e, i);

	if (!p->in_lru)
		return;
	if (p->lru_prev == EG_NONE)
		l->head = p->lru_next;
	else
		e->priv[p->lru_prev].lru_next = p->lru_next;
	if (p->lru_next == EG_NONE)
		l->tail = p->lru_prev;
	else
		e->priv[p->lru_next].lru_prev = p->lru_prev;
	p->in_lru = 0;
	l->n--;
}

void eg_lru_touch(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct eg_lru *l = lru_of(e, i);

	if (p->in_lru && l->tail == i)
		return;
	lru_del(e, i);
	p->lru_prev = l->tail;
	p->lru_next = EG_NONE;
	if (l->tail == EG_NONE)
		l->head = i;
	else
		e->priv[l->tail].lru_next = i;
	l->tail = i;
	p->in_lru = 1;
	l->n++;
}

static void work_unlink(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	if (!p->queued)
		return;
	if (p->work_prev == EG_NONE)
		e->work_head = p->work_next;
	else
		e->priv[p->work_prev].work_next = p->work_next;
	if (p->work_next == EG_NONE)
		e->work_tail = p->work_prev;
	else
		e->priv[p->work_next].work_prev = p->work_prev;
	p->work_next = p->work_prev = EG_NONE;
	p->queued = 0;
}

static void work_append(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	if (p->queued)
		return;
	p->work_prev = e->work_tail;
	p->work_next = EG_NONE;
	if (e->work_tail == EG_NONE)
		e->work_head = i;
	else
		e->priv[e->work_tail].work_next = i;
	e->work_tail = i;
	p->queued = 1;
}

static void work_prepend(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	if (p->queued)
		return;
	p->work_next = e->work_head;
	p->work_prev = EG_NONE;
	if (e->work_head == EG_NONE)
		e->work_tail = i;
	else
		e->priv[e->work_head].work_prev = i;
	e->work_head = i;
	p->queued = 1;
}

void eg_work(struct egress *e, uint32_t i, uint32_t bits)
{
	e->priv[i].work |= bits;
	work_append(e, i);
}

void eg_drop(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *fl = eg_flow(e, i);
	uint32_t *link = &e->hash[p->bucket];

	eg_close_fd(e, i);
	eg_timer(e, i, UINT64_MAX);
	work_unlink(e, i);
	lru_del(e, i);
	inbound_dropped(e, i);
	proxy_dropped(e, i);
	while (*link != EG_NONE && *link != i)
		link = &e->priv[*link].hash_next;
	if (*link == i)
		*link = p->hash_next;

	note_flow(e, i, RN_DID_END, e->s->now - fl->created_ns);
	atomic_store_explicit(&fl->state, RN_FL_FREE, memory_order_relaxed);
	atomic_store_explicit(&fl->up.owner, 0, memory_order_release); /* F1 */
	atomic_store_explicit(&fl->down.owner, 0, memory_order_release);
	p->proto = 0;
	p->work = 0;
	p->hash_next = e->free_head;
	e->free_head = i;
	e->used--;
}

/**
 * stage_egress_close_flow() - End a flow because somebody says so
 * @s:		Stage after stage_egress_init()
 * @i:		Its entry
 * @gen:	The entry's generation when the flow was seen: a later flow in the same entry stays
 *
 * Return: 0, or -ENOENT if that flow is gone.
 */
int stage_egress_close_flow(struct rn_stage *s, uint32_t i, uint32_t gen)
{
	struct egress *e = s->priv;

	if (i >= e->fresh || !e->priv[i].proto || eg_flow(e, i)->gen != gen)
		return -ENOENT;
	s->now = rn_stage_now(s);
	if (e->priv[i].proto == RN_IPPROTO_TCP)
		return tcp_close_flow(e, i);
	eg_drop(e, i);
	return 0;
}

void stage_egress_notices(struct rn_stage *s, int on)
{
	struct egress *e = s->priv;

	e->notices = on != 0;
	e->nrefused = e->refused_lost = 0;
	e->refused_ns = rn_stage_now(s);
	e->refused_tokens = EG_REFUSED * EG_NS;
}

int stage_egress_refusal(struct rn_stage *s, struct egress_refusal *out)
{
	struct egress *e = s->priv;

	if (!e->nrefused)
		return 0;
	*out = e->refused[e->refused_at];
	e->refused_at = (e->refused_at + 1) % EG_REFUSED;
	e->nrefused--;
	return 1;
}

void eg_refused_by(struct egress *e, uint8_t proto, const uint8_t guest[16], uint16_t gport, const uint8_t peer[16],
		   uint16_t pport, int error, int32_t rule)
{
	struct rn_who who = by_address(proto, guest, gport, peer, pport);
	struct egress_refusal *r;

	rn_stage_note(e->s, RN_DID_REFUSE, &who, (uint64_t)error);
	if (!e->notices)
		return;
	if (e->s->now > e->refused_ns) {
		uint64_t since = e->s->now - e->refused_ns, full = EG_REFUSED * EG_NS;

		if (since > EG_NS * EG_REFUSED / EG_REFUSED_RATE)
			e->refused_tokens = full;
		else
			e->refused_tokens += since * EG_REFUSED_RATE;
		if (e->refused_tokens > full)
			e->refused_tokens = full;
		e->refused_ns = e->s->now;
	}
	if (e->nrefused == EG_REFUSED || e->refused_tokens < EG_NS) {
		e->refused_lost++;
		return;
	}
	e->refused_tokens -= EG_NS;
	r = &e->refused[(e->refused_at + e->nrefused++) % EG_REFUSED];
	*r = (struct egress_refusal){
		.guest_port = gport, .peer_port = pport, .proto = proto, .error = error, .rule = rule,
		.lost = e->refused_lost,
	};
	memcpy(r->guest, guest, 16);
	memcpy(r->peer, peer, 16);
	e->refused_lost = 0;
	e->s->notice = 1;
}

/* --- host sockets --- */

/**
 * eg_watch() - Give a flow its host socket and wait for events on it
 * @e:		Stage
 * @i:		Flow without a socket
 * @fd:		Socket; the flow's from now on if the return is 0, else still the caller's
 * @events:	epoll events
 *
 * Return: 0 or a negative errno of epoll_ctl().
 */
int eg_watch(struct egress *e, uint32_t i, int fd, uint32_t events)
{
	int r = rn_stage_watch(e->s, fd, events, RN_EV(RN_TAG_FLOW, i));

	if (r < 0)
		return r;
	e->priv[i].fd = fd;
	e->priv[i].events = events;
	e->nfds++;
	return 0;
}

int eg_rewatch(struct egress *e, uint32_t i, uint32_t events)
{
	struct epoll_event ev = { .events = events, .data.u64 = RN_EV(RN_TAG_FLOW, i) };

	e->priv[i].events = events;
	return epoll_ctl(e->s->epfd, EPOLL_CTL_MOD, e->priv[i].fd, &ev) < 0 ? -errno : 0;
}

void eg_close_fd(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	if (p->fd < 0)
		return;
	if (p->fast) { /* others hold the socket too: a close would leave it in epoll */
		(void)epoll_ctl(e->s->epfd, EPOLL_CTL_DEL, p->fd, NULL);
		promote_close(e, i);
	}
	close(p->fd); /* else the only descriptor: epoll forgets it with the close */
	p->fd = -1;
	e->nfds--;
}

/* --- timers --- */

static void wheel_unlink(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	if (!p->timed)
		return;
	if (p->timer_prev == EG_NONE)
		e->wheel[p->slot] = p->timer_next;
	else
		e->priv[p->timer_prev].timer_next = p->timer_next;
	if (p->timer_next != EG_NONE)
		e->priv[p->timer_next].timer_prev = p->timer_prev;
	if (p->slot < EG_WHEEL && e->wheel[p->slot] == EG_NONE)
		e->wheel_map[p->slot / 64] &= ~(1ull << (p->slot % 64));
	p->timed = 0;
	e->ntimers--;
}

static void wheel_link(struct egress *e, uint32_t i, uint32_t slot)
{
	struct flow_priv *p = &e->priv[i];

	p->slot = (uint16_t)slot;
	p->timer_prev = EG_NONE;
	p->timer_next = e->wheel[slot];
	if (p->timer_next != EG_NONE)
		e->priv[p->timer_next].timer_prev = i;
	e->wheel[slot] = i;
	if (slot < EG_WHEEL)
		e->wheel_map[slot / 64] |= 1ull << (slot % 64);
	p->timed = 1;
	e->ntimers++;
}

void eg_timer(struct egress *e, uint32_t i, uint64_t at)
{
	struct flow_priv *p = &e->priv[i];
	uint64_t tick;

	p->deadline = at;
	if (at == UINT64_MAX) {
		wheel_unlink(e, i);
		return;
	}
	tick = at / EG_TICK_NS + (at % EG_TICK_NS != 0); /* up: never early */
	if (tick <= e->wheel_at)
		tick = e->wheel_at + 1;
	/* Already hung early enough (or about to be looked at): the look finds the new deadline. */
	if (p->timed && (p->slot == EG_WHEEL || p->tick <= tick))
		return;
	wheel_unlink(e, i);
	p->tick = tick;
	wheel_link(e, i, (uint32_t)(tick % EG_WHEEL));
}

/* Slots whose tick has come go to the due list, in order of time but not within a slot. */
static void wheel_turn(struct egress *e, uint64_t tick)
{
	uint64_t t = e->wheel_at + 1;

	if (tick > e->wheel_at && tick - e->wheel_at > EG_WHEEL)
		t = tick - EG_WHEEL + 1; /* every slot once is enough */
	for (; t <= tick; t++) {
		uint32_t slot = (uint32_t)(t % EG_WHEEL), i;

		while ((i = e->wheel[slot]) != EG_NONE) {
			wheel_unlink(e, i);
			wheel_link(e, i, EG_WHEEL);
		}
	}
	if (tick > e->wheel_at)
		e->wheel_at = tick;
}

static int run_timers(struct egress *e)
{
	uint32_t fired = 0, i;

	if (!e->ntimers) {
		e->wheel_at = e->s->now / EG_TICK_NS;
		return 0;
	}
	if (e->wheel[EG_WHEEL] == EG_NONE)
		wheel_turn(e, e->s->now / EG_TICK_NS);
	for (uint32_t n = 0; n < EG_TIMER_BUDGET && (i = e->wheel[EG_WHEEL]) != EG_NONE; n++) {
		struct flow_priv *p = &e->priv[i];

		wheel_unlink(e, i);
		if (p->deadline > e->s->now) {
			eg_timer(e, i, p->deadline);
			continue;
		}
		p->deadline = UINT64_MAX;
		fired++;
		if (p->proto == RN_IPPROTO_TCP)
			tcp_timer(e, i);
		else if (p->proto == RN_IPPROTO_UDP)
			udp_timer(e, i);
		else
			icmp_timer(e, i);
	}
	return fired || e->wheel[EG_WHEEL] != EG_NONE;
}

static uint64_t wheel_deadline(const struct egress *e)
{
	uint32_t first = (uint32_t)((e->wheel_at + 1) % EG_WHEEL);

	if (!e->ntimers)
		return UINT64_MAX;
	if (e->wheel[EG_WHEEL] != EG_NONE)
		return e->s->now;
	/* Words of the bitmap from the next slot on, once round: the first word is looked at twice, its high
	 * part first, its low part last. */
	for (uint32_t k = 0; k <= EG_WHEEL / 64; k++) {
		uint32_t w = (first / 64 + k) % (EG_WHEEL / 64);
		uint64_t bits = e->wheel_map[w];

		if (k == 0)
			bits &= ~0ull << (first % 64);
		else if (k == EG_WHEEL / 64)
			bits &= ~(~0ull << (first % 64));
		if (bits) {
			uint32_t slot = w * 64 + (uint32_t)__builtin_ctzll(bits);

			return (e->wheel_at + 1 + ((slot - first) % EG_WHEEL)) * EG_TICK_NS;
		}
	}
	return UINT64_MAX;
}

static uint64_t egress_deadline(struct rn_stage *s)
{
	const struct egress *e = s->priv;
	uint64_t wheel = wheel_deadline(e), in = inbound_deadline(e);

	return wheel < in ? wheel : in;
}

/* --- output to the guest --- */

struct rn_buf *eg_out_buf(struct egress *e, enum rn_buf_class cls)
{
	struct rn_buf *b;

	if (!rn_stage_room(e->s, RN_ROLE_GUEST, 1))
		return NULL;
	b = rn_buf_alloc(&e->s->pool, cls);
	if (!b)
		e->s->want_buf = 1;
	return b;
}

static void put_ip4(struct egress *e, uint8_t *eth, const uint8_t mac[6], const uint8_t src[4], const uint8_t dst[4],
		    uint8_t proto, uint8_t ttl, uint16_t id, uint16_t frag, uint32_t l4_len)
{
	rn_ip4_build(eth, mac, e->cfg.gateway_mac, src, dst, proto, ttl, id, frag, l4_len);
}

void eg_ip4_header(struct egress *e, uint8_t *eth, const uint8_t mac[6], const uint8_t src[4], const uint8_t dst[4],
		   uint8_t proto, uint32_t l4_len, int df)
{
	put_ip4(e, eth, mac, src, dst, proto, 64, e->ip_id++, df ? RN_IP4_DF : 0, l4_len);
}

/* Past guest_rx, if nothing is under way there that this would overtake. It saves the wake of a process for each segment of
 * a short connection. 1: written, or refused for good, which guest_rx meets and counts with the next frame. */
static int write_direct(struct egress *e, uint8_t *eth, uint32_t len, int has_vnet)
{
	struct rn_stage *s = e->s;

	if (!rn_ring_tx_empty(&s->out[RN_ROLE_GUEST]))
		return 0;
	if (!has_vnet)
		memset(eth - RN_VNET_HLEN, 0, RN_VNET_HLEN);
	rn_tap_frame(s, RN_TAP_LINK, RN_PCAP_TO_GUEST, eth, len);
	if (rn_link_write(&e->link, eth - RN_VNET_HLEN, len) == -EAGAIN) {
		rn_tap_undo(s);
		return 0;
	}
	rn_tap_done(s);
	s->c[RN_C_direct_frames]++;
	s->busy.down_here++;
	return 1;
}

void eg_emit(struct egress *e, struct rn_buf *b, uint8_t *eth, uint32_t len, const struct rn_vnet_hdr *vnet)
{
	if (vnet)
		memcpy(eth - RN_VNET_HLEN, vnet, RN_VNET_HLEN);
	e->s->c[RN_C_frames_out]++;
	e->s->c[RN_C_bytes_out] += len;
	if (e->link.fd >= 0 && e->working && len <= RN_SMALL_FRAME_MAX && write_direct(e, eth, len, vnet != NULL)) {
		rn_buf_free(&e->s->pool, b);
		return;
	}
	rn_stage_emit(e->s, RN_ROLE_GUEST, b, eth, len, vnet ? RN_DESC_VNET : 0);
}

/* Send from *@off on, as long as there is room. 0 if all is out, else -EAGAIN. */
static int send_rest(struct egress *e, const uint8_t mac[6], const uint8_t src[4], const uint8_t dst[4], uint8_t proto,
		     uint8_t ttl, uint16_t id, const uint8_t *l4, uint32_t len, uint32_t *off)
{
	uint32_t whole = e->cfg.mtu - RN_IP4_HLEN;
	uint32_t part = whole & ~7u; /* RFC 791 3.1: offsets are in units of 8 bytes */
	int cut = len > whole;

	do {
		uint32_t n = len - *off, frame;
		uint16_t frag = (uint16_t)(*off / 8);
		struct rn_buf *b;
		uint8_t *eth;

		if (cut && n > part) {
			n = part;
			frag |= RN_IP4_MF;
		}
		frame = RN_ETH_HLEN + RN_IP4_HLEN + n;
		b = eg_out_buf(e, frame <= RN_SMALL_FRAME_MAX ? RN_SMALL : RN_LARGE);
		if (!b)
			return -EAGAIN;
		eth = eg_eth(b);
		put_ip4(e, eth, mac, src, dst, proto, ttl, id, frag, n);
		memcpy(eth + RN_ETH_HLEN + RN_IP4_HLEN, l4 + *off, n);
		eg_emit(e, b, eth, frame, NULL);
		e->s->c[RN_C_fragments_out] += (uint64_t)cut;
		*off += n;
	} while (*off < len);
	return 0;
}

int eg_backlog_add(struct egress *e, const struct eg_backlog *head, const uint8_t *l4)
{
	struct eg_backlog *k = malloc(sizeof(*k) + head->len);

	if (!k)
		return -ENOMEM;
	memcpy(k, head, sizeof(*k));
	k->next = NULL;
	memcpy(k->l4, l4, head->len);
	*e->backlog_end = k;
	e->backlog_end = &k->next;
	e->nbacklog++;
	return 0;
}

int eg_send_datagram(struct egress *e, const uint8_t mac[6], const uint8_t src[4], const uint8_t dst[4], uint8_t proto,
		     const uint8_t *l4, uint32_t l4_len, uint8_t ttl)
{
	struct eg_backlog head = { .proto = proto, .ttl = ttl, .id = e->ip_id++, .len = l4_len };

	if (!e->backlog && !send_rest(e, mac, src, dst, proto, ttl, head.id, l4, l4_len, &head.off))
		return 0;
	/* Fragments already out are worthless without the rest, so keep it even over the bound. */
	if (!head.off && e->nbacklog >= EG_BACKLOG_MAX)
		return -EAGAIN;
	memcpy(head.mac, mac, 6);
	memcpy(head.src, src, 4);
	memcpy(head.dst, dst, 4);
	return eg_backlog_add(e, &head, l4) ? -EAGAIN : 0;
}

/* The backlog, oldest first. 1: something went out; 0: nothing did. */
static int run_backlog(struct egress *e)
{
	int did = 0;

	while (e->backlog) {
		struct eg_backlog *k = e->backlog;
		uint32_t before = k->off;
		int r = send_rest(e, k->mac, k->src, k->dst, k->proto, k->ttl, k->id, k->l4, k->len, &k->off);

		did |= k->off != before;
		if (r)
			break;
		did = 1;
		e->backlog = k->next;
		if (!e->backlog)
			e->backlog_end = &e->backlog;
		e->nbacklog--;
		free(k);
	}
	return did;
}

static int icmp_token(struct egress *e)
{
	const uint64_t full = EG_ICMP_BURST * EG_NS; /* tokens are kept in 1e-9, one costs EG_NS */
	uint64_t gap = e->s->now - e->tokens_ns;

	if (gap > EG_NS) /* enough to fill it, and the product below stays small */
		gap = EG_NS;
	e->tokens += gap * EG_ICMP_RATE;
	if (e->tokens > full)
		e->tokens = full;
	e->tokens_ns = e->s->now;
	if (e->tokens < EG_NS) {
		e->s->c[RN_C_drop_icmp_rate]++;
		return 0;
	}
	e->tokens -= EG_NS;
	return 1;
}

/* May an error be sent about this packet? (RFC 1122 3.2.2, RFC 1812 4.3.2.7) */
static int may_complain(const uint8_t *ip, uint32_t ip_len, uint32_t hlen)
{
	uint8_t src = ip[RN_IP4_SRC], dst = ip[RN_IP4_DST];

	if (rn_get16(ip + RN_IP4_FRAG) & RN_IP4_OFFMASK)
		return 0; /* not the first fragment */
	if (dst >= 224 || src >= 224 || src == 0 || src == 127)
		return 0; /* multicast, broadcast; a source that is no single host */
	if (ip[RN_IP4_PROTO] == RN_IPPROTO_ICMP) {
		uint8_t type;

		if (ip_len <= hlen)
			return 0;
		type = ip[hlen];
		if (type == 3 || type == 4 || type == 5 || type == 11 || type == 12)
			return 0; /* an error about an error */
	}
	return 1;
}

int eg_icmp_error(struct egress *e, const uint8_t mac[6], const uint8_t src[4], const uint8_t *ip, uint32_t ip_len,
		  uint8_t type, uint8_t code, uint32_t rest)
{
	uint32_t hlen, quote = ip_len, l4_len;
	struct rn_buf *b;
	uint8_t *eth, *icmp;
	uint16_t sum;

	if (ip_len < RN_IP4_HLEN)
		return -EPERM;
	hlen = (ip[0] & 0x0fu) * 4u;
	if (hlen < RN_IP4_HLEN || hlen > ip_len || !may_complain(ip, ip_len, hlen))
		return -EPERM;
	if (!icmp_token(e))
		return -EBUSY;
	b = eg_out_buf(e, RN_SMALL);
	if (!b) {
		e->s->c[RN_C_drop_reply_no_room]++;
		return -EAGAIN;
	}
	if (quote > EG_ICMP_MAX - RN_IP4_HLEN - RN_ICMP_HLEN) /* RFC 1812 4.3.2.3 */
		quote = EG_ICMP_MAX - RN_IP4_HLEN - RN_ICMP_HLEN;
	l4_len = RN_ICMP_HLEN + quote;
	eth = eg_eth(b);
	icmp = eth + RN_ETH_HLEN + RN_IP4_HLEN;
	icmp[0] = type;
	icmp[1] = code;
	memset(icmp + 2, 0, 2);
	rn_put32(icmp + 4, rest);
	memcpy(icmp + RN_ICMP_HLEN, ip, quote);
	sum = (uint16_t)~rn_csum_fold(rn_csum_add(0, icmp, l4_len));
	memcpy(icmp + 2, &sum, 2);
	eg_ip4_header(e, eth, mac, src, ip + RN_IP4_SRC, RN_IPPROTO_ICMP, l4_len, 0);
	eg_emit(e, b, eth, RN_ETH_HLEN + RN_IP4_HLEN + l4_len, NULL);
	e->s->c[RN_C_icmp_errors]++;
	return 0;
}

static const uint8_t loopback4[4] = { 127, 0, 0, 1 };

int eg_host_addr(const struct egress *e, const uint8_t guest_dst[4], uint8_t host[4])
{
	if (memcmp(guest_dst, e->cfg.gateway4, 4)) {
		memcpy(host, guest_dst, 4);
		return 0;
	}
	if (!e->cfg.host_loopback)
		return -EACCES;
	memcpy(host, loopback4, 4);
	return 0;
}

void eg_guest_addr(const struct egress *e, const uint8_t host[4], uint8_t guest_src[4])
{
	memcpy(guest_src, host[0] == 127 ? e->cfg.gateway4 : host, 4);
}

/* --- the loop's calls --- */

/* Fill @f from what classify says about the frame, believing none of it. 0 or -EPROTO. */
static int check_frame(struct eg_frame *f, struct rn_buf *b, const uint8_t *eth, uint32_t len)
{
	struct rn_meta m = b->meta;
	uint32_t min;

	/* The buffer is shared memory: what was checked must be what is used, so no second read. */
	__asm__ volatile("" : "+m"(m));

	f->buf = b;
	f->eth = eth;
	f->len = len;
	f->kept = 0;
	f->proto = m.ip_proto;
	f->ttl = m.ttl;
	if (m.ip_version != 4 || m.l3_off < RN_ETH_HLEN || m.l4_off < m.l3_off + RN_IP4_HLEN ||
	    m.l4_off > m.l3_off + 60u || m.payload_off < m.l4_off || m.payload_off > len ||
	    m.payload_len > len - m.payload_off)
		return -EPROTO;
	f->ip = eth + m.l3_off;
	f->ip_hlen = (uint32_t)m.l4_off - m.l3_off;
	f->l4 = eth + m.l4_off;
	f->l4_hlen = m.payload_off - m.l4_off;
	f->payload = eth + m.payload_off;
	f->payload_len = m.payload_len;
	f->each = m.each;
	f->ndatagrams = rn_uso_count(m.payload_len, m.each);
	if (m.each && (m.ip_proto != RN_IPPROTO_UDP || f->ndatagrams < 2 || f->ndatagrams > RN_USO_DATAGRAMS_MAX))
		return -EPROTO;
	min = f->proto == RN_IPPROTO_TCP ? RN_TCP_HLEN : 8u; /* UDP and ICMP: 8 */
	if (f->l4_hlen < min || f->l4_hlen > (f->proto == RN_IPPROTO_TCP ? 60u : 8u))
		return -EPROTO;
	return 0;
}

static void take_frame(struct egress *e, uint32_t input, const struct rn_desc *d)
{
	struct rn_stage *s = e->s;
	struct rn_buf *b = rn_stage_buf(s, d);
	struct eg_frame f;

	s->c[RN_C_frames_in]++;
	s->c[RN_C_bytes_in] += d->len;
	if (!b) {
		s->c[RN_C_drop_bad_descriptor]++;
		return;
	}
	rn_tap_frame(s, input, RN_PCAP_FROM_GUEST, s->pool.base + d->off, d->len);
	if (b->meta.ip_version == 0 && d->len >= RN_ETH_HLEN + RN_ARP_LEN &&
	    rn_get16(s->pool.base + d->off + 12) == RN_ETHERTYPE_ARP) { /* stage_classify.c */
		inbound_arp(e, s->pool.base + d->off, d->len);
		rn_buf_free(&s->pool, b);
		return;
	}
	if (check_frame(&f, b, s->pool.base + d->off, d->len)) {
		s->c[RN_C_drop_bad_descriptor]++;
		rn_buf_free(&s->pool, b);
		return;
	}
	inbound_learn(e, f.ip + RN_IP4_SRC, f.eth + 6);
	switch (f.proto) {
	case RN_IPPROTO_TCP:
		tcp_input(e, &f);
		break;
	case RN_IPPROTO_UDP:
		udp_input(e, &f);
		break;
	case RN_IPPROTO_ICMP:
		icmp_input(e, &f);
		break;
	default:
		s->c[RN_C_drop_bad_descriptor]++;
	}
	if (!f.kept)
		rn_buf_free(&s->pool, b);
}

/* guest_rx gives a flow back, or guest_tx has a barrier (rn_promote.h). */
static void take_notice(struct egress *e, const struct rn_desc *d, uint32_t row)
{
	uint32_t i = rn_fn_flow(d);
	int tx = row != e->s->out_row[RN_ROLE_GUEST]; /* guest_tx's come by classify, or by a ring of its own */

	if (!e->fast || (i >= e->fresh && rn_fn_of(d) != RN_FN_RESET)) {
		e->s->c[RN_C_drop_bad_descriptor]++;
		return;
	}
	if (rn_fn_of(d) == RN_FN_RESET)
		promote_reset(e, tx);
	else if (rn_fn_of(d) == RN_FN_LACKS && e->priv[i].proto && eg_flow(e, i)->gen == d->len)
		promote_lacks(e, i, tx);
	else if (e->priv[i].proto == RN_IPPROTO_TCP && eg_flow(e, i)->gen == d->len)
		tcp_notice(e, i, rn_fn_of(d));
	else if (e->priv[i].proto == RN_IPPROTO_UDP && eg_flow(e, i)->gen == d->len)
		udp_notice(e, i, rn_fn_of(d));
	else if (rn_fn_of(d) == RN_FN_BARRIER) /* the flow is gone; whoever waits need not */
		promote_notice(e, i, RN_FN_BARRIER_OVER, 1, d->len);
}

static int run_input(struct egress *e)
{
	struct rn_stage *s = e->s;
	int did = 0;

	for (uint32_t k = 0; k < s->nin; k++) {
		int n = rn_stage_peek(s, k, EG_BURST);

		for (int j = 0; j < n; j++) {
			struct rn_desc d = rn_ring_at(&s->in[k], (uint32_t)j);

			if (d.flags & RN_DESC_FLOW)
				take_notice(e, &d, s->in_row[k]);
			else
				take_frame(e, k, &d);
			rn_tap_done(s);
		}
		if (n)
			rn_ring_consume(&s->in[k], (uint32_t)n);
		did |= n;
	}
	return did != 0;
}

static int run_work(struct egress *e)
{
	int did = 0;

	for (uint32_t n = 0; n < EG_WORK_BUDGET && e->work_head != EG_NONE && !e->backlog; n++) {
		uint32_t i = e->work_head, gen = eg_flow(e, i)->gen;
		uint8_t proto = e->priv[i].proto;
		int r;

		work_unlink(e, i);
		if (proto == RN_IPPROTO_TCP)
			r = tcp_work(e, i);
		else if (proto == RN_IPPROTO_UDP)
			r = udp_work(e, i);
		else
			r = icmp_work(e, i);
		if (!e->priv[i].proto || eg_flow(e, i)->gen != gen) {
			did = 1; /* it ended; nothing to queue */
			continue;
		}
		if (r < 0) {
			work_prepend(e, i);
			break;
		}
		did = 1;
		if (r > 0)
			work_append(e, i);
	}
	if (e->raw_ready && !e->backlog) {
		int r = icmp_work(e, EG_NONE);

		e->raw_ready = r != 0;
		did |= r >= 0;
	}
	return did;
}

static int egress_turn(struct rn_stage *s)
{
	struct egress *e = s->priv;
	int did = run_input(e);

	did |= promote_turn(e);
	did |= run_backlog(e);
	did |= inbound_turn(e);
	e->working = 1;
	did |= run_work(e);
	did |= run_timers(e);
	e->working = 0;
	return did;
}

/* Only notes: the batch the loop works through may hold events of a flow that an earlier turn dropped and
 * reused, so to the protocols an event is a hint and never a promise. */
static void egress_event(struct rn_stage *s, uint32_t tag, uint32_t index, uint32_t events)
{
	struct egress *e = s->priv;

	if (tag == RN_TAG_OTHER) {
		icmp_event(e, EG_NONE, events);
		return;
	}
	if (tag == RN_TAG_LISTEN) {
		inbound_event(e, index);
		return;
	}
	if (tag == RN_TAG_PROXY) {
		proxy_event(e, index, events);
		return;
	}
	if (tag != RN_TAG_FLOW || index >= e->fresh || e->priv[index].fd < 0)
		return;
	switch (e->priv[index].proto) {
	case RN_IPPROTO_TCP:
		tcp_event(e, index, events);
		break;
	case RN_IPPROTO_UDP:
		udp_event(e, index, events);
		break;
	case RN_IPPROTO_ICMP:
		icmp_event(e, index, events);
		break;
	}
}

static int egress_drained(struct rn_stage *s)
{
	const struct egress *e = s->priv;

	return e->work_head == EG_NONE && !e->backlog;
}

static void egress_free(struct egress *e)
{
	inbound_fini(e);
	while (e->backlog) {
		struct eg_backlog *k = e->backlog;

		e->backlog = k->next;
		free(k);
	}
	proxy_fini(e);
	policy_fini(e);
	promote_fini(e);
	free(e->hash);
	free(e->priv);
	free(e);
}

static void egress_fini(struct rn_stage *s)
{
	struct egress *e = s->priv;

	if (!e)
		return;
	s->now = rn_stage_now(s);
	tcp_fini(e);
	udp_fini(e);
	icmp_fini(e);
	for (uint32_t i = 0; i < e->fresh; i++) {
		if (!e->priv[i].proto)
			continue;
		if (!e->left)
			eg_drop(e, i);
		else if (e->priv[i].fd >= 0)
			close(e->priv[i].fd); /* the successor has it, or it waits for one */
	}
	if (!e->left)
		run_backlog(e);
	egress_free(e);
	s->priv = NULL;
}

static const struct rn_stage_ops egress_ops = {
	.turn = egress_turn,
	.event = egress_event,
	.deadline = egress_deadline,
	.drained = egress_drained,
	.fini = egress_fini,
};

static int init_tables(struct egress *e)
{
	uint32_t nhash = 1;

	while (nhash < e->nflows * 2)
		nhash *= 2;
	e->hash_mask = nhash - 1;
	e->hash = malloc(nhash * sizeof(*e->hash));
	e->priv = calloc(e->nflows, sizeof(*e->priv));
	if (!e->hash || !e->priv)
		return -ENOMEM;
	for (uint32_t k = 0; k < nhash; k++)
		e->hash[k] = EG_NONE;
	for (uint32_t k = 0; k <= EG_WHEEL; k++)
		e->wheel[k] = EG_NONE;
	e->free_head = EG_NONE;
	/* What a predecessor had has no socket any more; of the first generation the table is zero, which says free. */
	if (e->s->generation > 1 && !e->cfg.heir)
		eg_clear_table(e);
	e->work_head = e->work_tail = EG_NONE;
	e->udp_lru = e->icmp_lru = e->tw_lru = (struct eg_lru){ .head = EG_NONE, .tail = EG_NONE };
	e->backlog_end = &e->backlog;
	return 0;
}

/**
 * stage_egress_init() - Make a stage an egress
 * @s:			Stage with session, arena, rings and bells granted
 * @flows:		Flow table, mapped read-write; must outlive the stage
 * @flows_size:		Bytes of the mapping
 * @cfg:		Copied
 *
 * Return: 0, or a negative errno with rn_stage_error() set.
 */
int stage_egress_init(struct rn_stage *s, void *flows, uint64_t flows_size, const struct egress_config *cfg)
{
	struct egress *e;
	uint64_t seed[1];
	int r = rn_flows_check(flows, flows_size);

	if (r)
		return rn_fail(s, r, "flow table: not one of this build");
	if (cfg->mtu < 576 || cfg->mtu > 65520)
		return rn_fail(s, -EINVAL, "MTU %u is not in 576..65520", cfg->mtu);
	e = calloc(1, sizeof(*e));
	if (!e)
		return rn_fail(s, -ENOMEM, "out of memory");
	e->s = s;
	e->link.fd = -1;
	e->cfg = *cfg;
	e->flows = flows;
	e->nflows = e->flows->nflows;
	e->secret[0] = e->flows->secret[0];
	e->secret[1] = e->flows->secret[1];
	if (!e->nflows || rn_flows_size(e->nflows) > flows_size) {
		free(e);
		return rn_fail(s, -EMSGSIZE, "flow table is cut");
	}
	s->now = rn_stage_now(s);
	e->wheel_at = s->now / EG_TICK_NS;
	e->tokens = EG_ICMP_BURST * EG_NS;
	e->tokens_ns = s->now;
	if (getrandom(seed, sizeof(seed), 0) != (ssize_t)sizeof(seed))
		seed[0] = s->now; /* mixed with the secret key before anyone sees it */
	e->rng = cfg->seed ? cfg->seed : seed[0];
	e->ip_id = (uint16_t)eg_random(e);

	r = init_tables(e);
	if (r) {
		egress_free(e);
		return rn_fail(s, r, "no memory for the flow table");
	}
	s->priv = e;
	r = inbound_init(e);
	if (r) {
		egress_free(e);
		s->priv = NULL;
		return rn_fail(s, r, "forwards: %s", strerror(-r));
	}
	r = tcp_init(e);
	if (r) {
		egress_free(e);
		s->priv = NULL;
		return rn_fail(s, r, "TCP: %s", strerror(-r));
	}
	r = udp_init(e);
	if (r) {
		tcp_fini(e);
		egress_free(e);
		s->priv = NULL;
		return rn_fail(s, r, "UDP: %s", strerror(-r));
	}
	r = icmp_init(e);
	if (r) {
		udp_fini(e);
		tcp_fini(e);
		egress_free(e);
		s->priv = NULL;
		return rn_fail(s, r, "ICMP: %s", strerror(-r));
	}
	s->ops = &egress_ops;
	return 0;
}

int stage_egress_direct(struct rn_stage *s, const struct rn_link *link)
{
	struct egress *e = s->priv;

	if (!rn_link_atomic(link))
		return rn_fail(s, -EINVAL, "egress cannot write to a link whose writes may be torn");
	e->link = *link;
	return 0;
}

uint64_t stage_egress_due(struct rn_stage *s)
{
	return egress_deadline(s);
}

/**
 * stage_egress_step() - For tests: one turn without a loop, at a time of the caller's choice
 * @s:			Stage after stage_egress_init()
 * @timeout_ms:		Wait so long for a socket event at most, less if a timer is due before; 0: do not wait
 * @now_ns:		What the turn is to believe CLOCK_MONOTONIC says; 0: the truth
 *
 * Return: 1 if the turn did something, 0 if not, a negative errno if the stage is broken.
 */
int stage_egress_step(struct rn_stage *s, int timeout_ms, uint64_t now_ns)
{
	struct epoll_event ev[64];
	uint64_t due = egress_deadline(s), now = now_ns ? now_ns : rn_stage_now(s);
	int n, did;

	if (timeout_ms && due != UINT64_MAX) {
		uint64_t ms = due <= now ? 0 : (due - now) / 1000000 + 1;

		if (ms < (uint64_t)timeout_ms)
			timeout_ms = (int)ms;
	}
	n = epoll_wait(s->epfd, ev, 64, timeout_ms);
	for (int k = 0; k < n; k++)
		egress_event(s, (uint32_t)(ev[k].data.u64 >> 32), (uint32_t)ev[k].data.u64, ev[k].events);
	rn_stage_begin(s);
	if (now_ns)
		s->now = now_ns;
	did = egress_turn(s);
	rn_stage_end(s);
	return s->broken ? -EPROTO : did;
}
