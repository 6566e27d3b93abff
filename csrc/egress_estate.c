/* egress_estate.c - egress leaves its seat in order, and its successor goes on where it stopped.
 *
 * The flow table is in shared memory. What is not: the host sockets, and of each flow what is of use to one process only
 * (struct flow_priv and what the protocols hang on it). The one that leaves writes it down between two turns of the loop,
 * and the sockets go with it (rn_estate.h); nothing is closed meanwhile, no half moves, and halves that were lent to
 * guest_tx and guest_rx are run by them all the time. The successor builds its hash, lists and timers anew from the
 * table and from what was written, and asks epoll for each socket again: what is ready is told once more.
 *
 * Written, in this order; records are as they lie in memory:
 *   struct estate_head            who can read it, and a checksum
 *   struct estate_core            what egress has but once
 *   listeners                     slot, struct in_listener; descriptor
 *   flows                         struct estate_flow, descriptor if it has one; then what the protocol adds
 *   lists                         entries in order: least recently used ones, work to do
 *   notices, datagrams            that found no room
 *   proxy                         what proxy.c has but once
 *
 * A successor of another build reads it if RN_ESTATE_LAYOUT, a hash of the declarations of all these records
 * (shm/build_dataplane.py), is the same: a changed function does not matter, a changed struct or flag does. What cannot be
 * read, or says what cannot be, is refused as a whole: then every connection of the table is reset on both sides, as if
 * it had not been left in order. Nothing of it is believed but the values of fields that lead nowhere.
 *
 * Time away. Deadlines move by it, so that a mapping does not end, nor a segment count as lost, because nobody was there to
 * see the answer.
 */
#include "egress.h"
#include "inbound.h"
#include "proxy.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#ifndef RN_ESTATE_LAYOUT
#define RN_ESTATE_LAYOUT 0 /* a build for tests, which is nobody's successor */
#endif

#define ESTATE_MAGIC 0x45736772456e72ull /* "rnEgrsE" */

struct estate_head {
	uint64_t magic, layout;
	uint64_t sum;	  /* SipHash with the session's key, of all bytes behind it */
	uint64_t left_ns; /* CLOCK_MONOTONIC */
	uint32_t table, fresh, flows, listeners;
	uint32_t listed, waiting, datagrams, reserved; /* waiting: in the work queue */
};

struct estate_core {
	uint64_t rng, tokens_ns, tokens;
	uint64_t asked_ns, retry_at;
	uint32_t serial, last, next_guest, slots;
	uint16_t ip_id;
	uint8_t raw_ready, asked4[4];
	struct in_guest guest[IN_GUESTS];
};

struct estate_flow {
	uint32_t i, gen;
	struct flow_priv priv;
	struct in_flow in;
};

struct estate_listener {
	uint32_t slot;
	struct in_listener l;
};

_Static_assert(sizeof(struct flow_priv) == 208, "a field more: does it lead somewhere? then plausible() must ask");

/* --- leaving --- */

static void keep_core(const struct egress *e, struct rn_estate_out *o)
{
	const struct inbound *in = e->in;
	struct estate_core c = {
		.rng = e->rng, .tokens_ns = e->tokens_ns, .tokens = e->tokens, .asked_ns = in->asked_ns, .retry_at = in->retry_at,
		.serial = in->serial, .last = in->last, .next_guest = in->next_guest, .slots = in->nl, .ip_id = e->ip_id,
		.raw_ready = e->raw_ready,
	};

	memcpy(c.asked4, in->asked4, 4);
	memcpy(c.guest, in->guest, sizeof(c.guest));
	rn_estate_put(o, &c, sizeof(c));
}

static void keep_listeners(const struct egress *e, struct rn_estate_out *o)
{
	const struct inbound *in = e->in;

	for (uint32_t k = 0; k < in->nl; k++) {
		struct estate_listener x = { .slot = k, .l = in->l[k] };

		if (x.l.fd < 0)
			continue;
		rn_estate_put(o, &x, sizeof(x));
		rn_estate_put_fd(o, x.l.fd);
	}
}

static void keep_flows(struct egress *e, struct rn_estate_out *o)
{
	for (uint32_t i = 0; i < e->fresh; i++) {
		struct estate_flow x = { .i = i, .gen = eg_flow(e, i)->gen, .priv = e->priv[i], .in = e->in->flow[i] };

		if (!x.priv.proto)
			continue;
		rn_estate_put(o, &x, sizeof(x));
		if (x.priv.fd >= 0)
			rn_estate_put_fd(o, x.priv.fd);
		if (x.priv.proto == RN_IPPROTO_TCP)
			tcp_keep(e, i, o);
		proxy_keep(e, i, o);
	}
}

static uint32_t keep_lists(const struct egress *e, struct rn_estate_out *o)
{
	const struct eg_lru *list[] = { &e->udp_lru, &e->icmp_lru, &e->tw_lru, &e->in->lru };
	uint32_t n = 0;

	for (uint32_t k = 0; k < sizeof(list) / sizeof(*list); k++)
		for (uint32_t i = list[k]->head; i != EG_NONE; i = e->priv[i].lru_next, n++)
			rn_estate_put(o, &i, sizeof(i));
	return n;
}

static uint32_t keep_work(const struct egress *e, struct rn_estate_out *o)
{
	uint32_t n = 0;

	for (uint32_t i = e->work_head; i != EG_NONE; i = e->priv[i].work_next, n++)
		rn_estate_put(o, &i, sizeof(i));
	return n;
}

/* All of it. */
static void write_down(struct egress *e, struct rn_estate_out *o)
{
	struct estate_head h = {
		.magic = ESTATE_MAGIC, .layout = RN_ESTATE_LAYOUT, .left_ns = e->s->now, .table = e->nflows, .fresh = e->fresh,
		.flows = e->used, .listeners = e->in->n, .datagrams = e->nbacklog,
	};
	const size_t from = offsetof(struct estate_head, left_ns);

	rn_estate_put(o, &h, sizeof(h)); /* its place */
	keep_core(e, o);
	keep_listeners(e, o);
	keep_flows(e, o);
	h.listed = keep_lists(e, o);
	h.waiting = keep_work(e, o);
	promote_keep(e, o);
	for (const struct eg_backlog *k = e->backlog; k; k = k->next) {
		rn_estate_put(o, k, sizeof(*k));
		rn_estate_put(o, k->l4, k->len);
	}
	proxy_keep_all(e, o);
	if (o->error)
		return;
	memcpy(o->data, &h, sizeof(h));
	h.sum = eg_siphash(e, o->data + from, o->len - from);
	memcpy(o->data, &h, sizeof(h));
}

int stage_egress_leave(struct rn_stage *s, int put, int take)
{
	struct egress *e = s->priv;
	struct rn_estate_out o = { 0 };
	int r;

	if (e->left)
		return rn_fail(s, -EALREADY, "it left already");
	s->now = rn_stage_now(s);
	write_down(e, &o);
	r = rn_estate_send(put, &o);
	rn_estate_out_free(&o);
	if (r) {
		(void)rn_estate_discard(take); /* what lies there in part: the sockets are ours still */
		return rn_fail(s, r, "cannot leave %u flows to a successor: %s", e->used, strerror(-r));
	}
	e->left = 1;
	s->c[RN_C_flows_left] += e->used;
	return (int)e->used;
}

/* --- taking over --- */

static int adopt_core(struct egress *e, struct rn_estate_in *in, uint32_t *slots)
{
	struct inbound *to = e->in;
	struct estate_core c;

	if (rn_estate_get(in, &c, sizeof(c)) || c.last >= IN_GUESTS || c.next_guest >= IN_GUESTS || c.slots > IN_SLOTS_MAX)
		return -EPROTO;
	*slots = c.slots;
	e->rng = c.rng;
	e->tokens_ns = c.tokens_ns;
	e->tokens = c.tokens;
	e->ip_id = c.ip_id;
	e->raw_ready = c.raw_ready && e->cfg.raw_icmp_fd >= 0;
	to->asked_ns = c.asked_ns;
	to->retry_at = c.retry_at;
	to->serial = c.serial;
	to->last = c.last;
	to->next_guest = c.next_guest;
	memcpy(to->asked4, c.asked4, 4);
	memcpy(to->guest, c.guest, sizeof(to->guest));
	return 0;
}

static int adopt_listener(struct egress *e, struct rn_estate_in *in, uint32_t slots)
{
	struct estate_listener x;
	int fd, r;

	if (rn_estate_get(in, &x, sizeof(x)) || x.slot >= slots || !x.l.serial || !x.l.guest_port ||
	    (x.l.proto != RN_IPPROTO_TCP && x.l.proto != RN_IPPROTO_UDP))
		return -EPROTO;
	fd = rn_estate_get_fd(in);
	if (fd < 0)
		return -EPROTO;
	r = inbound_adopt(e, x.slot, &x.l, fd);
	if (r)
		close(fd);
	return r;
}

/* Can an entry be so? @fl: of the table. */
static int plausible(const struct egress *e, const struct estate_flow *x, const struct rn_flow *fl, int has_fd)
{
	const struct flow_priv *p = &x->priv;
	uint8_t st = atomic_load_explicit(&fl->state, memory_order_relaxed);

	if (has_fd && !(p->events & EPOLLET)) /* all are watched so: else one that is ready would never let us rest */
		return 0;
	if (st == RN_FL_FREE || fl->proto != p->proto || fl->gen != x->gen || (p->fast && (!e->fast || !has_fd)))
		return 0;
	switch (p->proto) {
	case RN_IPPROTO_TCP:
		return tcp_plausible(e, x->i, p, has_fd);
	case RN_IPPROTO_UDP:
		return st == RN_FL_MAPPED && (!x->in.serial || !has_fd);
	case RN_IPPROTO_ICMP:
		return st == RN_FL_MAPPED && !p->fast && !x->in.serial && (has_fd || e->cfg.raw_icmp_fd >= 0);
	}
	return 0;
}

static int adopt_flow(struct egress *e, struct rn_estate_in *in, uint64_t gap)
{
	struct estate_flow x;
	int has_fd, fd = -1, r;

	if (rn_estate_get(in, &x, sizeof(x)) || x.i >= e->nflows || e->priv[x.i].proto)
		return -EPROTO;
	has_fd = x.priv.fd >= 0;
	if (!plausible(e, &x, eg_flow(e, x.i), has_fd))
		return -EPROTO;
	if (has_fd && (fd = rn_estate_get_fd(in)) < 0)
		return -EPROTO;
	r = eg_adopt(e, x.i, &x.priv, fd, gap);
	if (r) {
		if (fd >= 0)
			close(fd);
		return r;
	}
	if (x.in.serial)
		r = inbound_adopt_flow(e, x.i, &x.in);
	if (!r && x.priv.proto == RN_IPPROTO_TCP)
		r = tcp_adopt(e, x.i, in, gap);
	if (!r)
		r = proxy_adopt(e, x.i, in);
	/* Whose datagrams would nobody send? */
	if (!r && x.priv.proto == RN_IPPROTO_UDP && !has_fd && !x.in.serial && !proxy_udp_is(e, x.i))
		r = -EPROTO;
	return r;
}

static int adopt_list(struct egress *e, struct rn_estate_in *in)
{
	uint32_t i;

	if (rn_estate_get(in, &i, sizeof(i)) || i >= e->fresh || !e->priv[i].proto || e->priv[i].in_lru ||
	    (e->priv[i].proto == RN_IPPROTO_TCP &&
	     atomic_load_explicit(&eg_flow(e, i)->state, memory_order_relaxed) != RN_FL_TIME_WAIT))
		return -EPROTO;
	eg_lru_touch(e, i);
	return 0;
}

static int adopt_work(struct egress *e, struct rn_estate_in *in)
{
	uint32_t i;

	if (rn_estate_get(in, &i, sizeof(i)) || i >= e->fresh || !e->priv[i].proto || e->priv[i].queued)
		return -EPROTO;
	eg_work(e, i, 0);
	return 0;
}

static int adopt_datagram(struct egress *e, struct rn_estate_in *in)
{
	struct eg_backlog k;
	const void *l4;

	if (rn_estate_get(in, &k, sizeof(k)) || k.len > 65535u - RN_IP4_HLEN || k.off > k.len)
		return -EPROTO;
	l4 = rn_estate_view(in, k.len);
	return l4 ? eg_backlog_add(e, &k, l4) : -EPROTO;
}

/* 0, or -errno: some of it may be adopted. */
static int read_all(struct egress *e, struct rn_estate_in *in, const struct estate_head *h)
{
	uint64_t gap = e->s->now > h->left_ns ? e->s->now - h->left_ns : 0;
	uint32_t slots;
	int r = adopt_core(e, in, &slots);

	if (!r)
		r = inbound_adopt_slots(e, slots);
	for (uint32_t k = 0; !r && k < h->listeners; k++)
		r = adopt_listener(e, in, slots);
	if (!r)
		inbound_adopted(e);
	for (uint32_t k = 0; !r && k < h->flows; k++)
		r = adopt_flow(e, in, gap);
	if (r)
		return r;
	eg_adopted(e, h->fresh);
	for (uint32_t k = 0; !r && k < h->listed; k++)
		r = adopt_list(e, in);
	for (uint32_t k = 0; !r && k < h->waiting; k++)
		r = adopt_work(e, in);
	if (!r)
		r = promote_adopt(e, in);
	for (uint32_t k = 0; !r && k < h->datagrams; k++)
		r = adopt_datagram(e, in);
	if (!r)
		r = proxy_adopt_all(e, in);
	return !r && !rn_estate_done(in) ? -EPROTO : r;
}

/* Is it ours to read? 0, or -errno with rn_stage_error() set. */
static int check(struct egress *e, struct rn_estate_in *in, struct estate_head *h)
{
	const size_t from = offsetof(struct estate_head, left_ns);

	if (rn_estate_get(in, h, sizeof(*h)) || h->magic != ESTATE_MAGIC)
		return rn_fail(e->s, -EPROTO, "the last process in this seat left something that is not egress's");
	if (h->layout != RN_ESTATE_LAYOUT)
		return rn_fail(e->s, -EPROTO,
			       "the last process in this seat was of a build with other structures: it left %u flows that "
			       "this one cannot go on with", h->flows);
	if (h->table != e->nflows || h->fresh > e->nflows || h->flows > e->nflows || h->listeners > IN_SLOTS_MAX ||
	    h->sum != eg_siphash(e, in->data + from, in->len - from))
		return rn_fail(e->s, -EPROTO, "what the last process in this seat left is damaged");
	return 0;
}

/* What was adopted, and what was not, ends now; the stage begins with an empty table. */
static void end_all(struct egress *e)
{
	for (uint32_t i = 0; i < e->nflows; i++)
		e->s->c[RN_C_flows_not_inherited] +=
			atomic_load_explicit(&eg_flow(e, i)->state, memory_order_relaxed) != RN_FL_FREE;
	tcp_end_strangers(e);
	tcp_end_all(e);
	for (uint32_t i = 0; i < e->fresh; i++)
		if (e->priv[i].proto)
			eg_drop(e, i);
	inbound_forget(e);
	eg_clear_table(e);
	promote_begin(e);
}

int stage_egress_inherit(struct rn_stage *s, int take)
{
	struct egress *e = s->priv;
	struct rn_estate_in in;
	struct estate_head h;
	int r;

	s->now = rn_stage_now(s);
	r = rn_estate_receive(take, &in);
	if (!r) { /* the first in this seat, or the last one was killed */
		if (s->generation > 1) {
			eg_clear_table(e);
			promote_begin(e);
		}
		return 0;
	}
	if (r < 0) {
		rn_fail(s, r, r == -EMFILE ? "the flows that the last process in this seat left need more descriptors than this one may have"
					     " (ulimit -n)"
					   : "what the last process in this seat left is not whole: %s",
			strerror(-r));
	} else {
		r = check(e, &in, &h);
		if (!r && (r = read_all(e, &in, &h)))
			rn_fail(s, r, "what the last process in this seat left cannot be taken: %s",
				r == -EPROTO ? "it contradicts itself" : strerror(-r));
		if (r)
			end_all(e);
		rn_estate_in_free(&in);
		if (!r) {
			s->c[RN_C_flows_inherited] += e->used;
			return (int)e->used;
		}
		return r;
	}
	end_all(e);
	return r;
}
