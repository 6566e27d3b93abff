/* policy.c - allow and deny: by the other side's network, by port and protocol, out and in.
 *
 * Asked where something new begins: a SYN of the guest, a client of a forward, a datagram or an echo request that goes a
 * way of its own. What the rules allowed once is not asked about again: the segments of a connection, the replies, the
 * datagrams of a mapping that a peer of a forward got. Without rules the question is one comparison.
 *
 * The first rule that fits decides; if none does, it is allowed. The rules are compiled into a list for each way and
 * protocol, two words to compare an entry, so that the longest walk (POLICY_RULES_MAX) takes about a microsecond. UDP and
 * ICMP ask for each datagram, therefore verdicts are remembered in a direct-mapped cache. A guest that picks addresses
 * which collide there costs itself the walk, and nothing grows.
 *
 * A refusal of a connection is told each time (eg_refused_by() has its rate), of datagrams once in POLICY_TELL_NS for a
 * destination: a program that goes on sending has said what it wants.
 *
 * Exempt: what ringnet answers itself, which is DHCP, DNS at the gateway, and ping of the gateway.
 */
#include "policy.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define POLICY_CACHE 1024u /* power of two */
#define POLICY_TELL_NS (10ull * 1000000000ull)
#define POLICY_LISTS 6u /* two ways, three protocols */
#define POLICY_NONE (-1)

struct policy_entry {
	uint64_t net[2], mask[2];
	uint16_t port_min, port_max;
	uint32_t deny;
	uint32_t name;
};

struct policy_verdict {
	uint64_t other[2];
	uint64_t told_ns; /* 0: never */
	uint16_t port;
	uint8_t list; /* its number and 1; 0: empty */
	int32_t rule; /* POLICY_NONE: allowed */
};

struct policy_state {
	struct policy_entry *list[POLICY_LISTS];
	uint32_t n[POLICY_LISTS];
	struct policy_verdict cache[POLICY_CACHE];
};

static void load(uint64_t to[2], const uint8_t addr[16])
{
	memcpy(to, addr, 16);
}

/* Number of the list for a way and a protocol, POLICY_LISTS if nothing is said of the protocol. */
static uint32_t list_of(uint32_t way, uint8_t proto)
{
	uint32_t base = way == POLICY_IN ? 3 : 0;

	switch (proto) {
	case RN_IPPROTO_TCP:
		return base;
	case RN_IPPROTO_UDP:
		return base + 1;
	case RN_IPPROTO_ICMP:
		return base + 2;
	}
	return POLICY_LISTS;
}

/* Does a rule belong into list @k? */
static int belongs(const struct policy_rule *r, uint32_t k)
{
	return (r->ways & (k < 3 ? POLICY_OUT : POLICY_IN)) && (r->protos >> (k % 3) & 1);
}
_Static_assert(POLICY_TCP == 1 && POLICY_UDP == 2 && POLICY_ICMP == 4, "bits in the order of the lists");

static void compile(struct policy_entry *to, const struct policy_rule *r)
{
	uint8_t mask[16] = { 0 };

	for (uint32_t k = 0; k < r->prefix; k++)
		mask[k / 8] |= (uint8_t)(0x80u >> (k % 8));
	load(to->mask, mask);
	load(to->net, r->net);
	for (int k = 0; k < 2; k++)
		to->net[k] &= to->mask[k];
	to->port_min = r->port_min;
	to->port_max = r->port_max;
	to->deny = r->deny;
	to->name = r->name;
}

static void policy_free(struct policy_state *ps)
{
	if (!ps)
		return;
	for (uint32_t k = 0; k < POLICY_LISTS; k++)
		free(ps->list[k]);
	free(ps);
}

void policy_fini(struct egress *e)
{
	policy_free(e->policy);
	e->policy = NULL;
}

int stage_egress_policy(struct rn_stage *s, const struct policy_rule *rule, uint32_t n)
{
	struct egress *e = s->priv;
	struct policy_state *ps = NULL;

	if (n > POLICY_RULES_MAX)
		return -E2BIG;
	for (uint32_t k = 0; k < n; k++)
		if (rule[k].prefix > 128 || rule[k].port_min > rule[k].port_max || rule[k].name > INT32_MAX ||
		    !(rule[k].ways & (POLICY_OUT | POLICY_IN)) ||
		    !(rule[k].protos & (POLICY_TCP | POLICY_UDP | POLICY_ICMP)))
			return -EINVAL;
	if (n) {
		ps = calloc(1, sizeof(*ps));
		if (!ps)
			return -ENOMEM;
	}
	for (uint32_t k = 0; n && k < POLICY_LISTS; k++) {
		ps->list[k] = calloc(n, sizeof(*ps->list[k]));
		if (!ps->list[k]) {
			policy_free(ps);
			return -ENOMEM;
		}
		for (uint32_t j = 0; j < n; j++)
			if (belongs(&rule[j], k))
				compile(&ps->list[k][ps->n[k]++], &rule[j]);
	}
	policy_fini(e);
	e->policy = ps;
	udp_policy_changed(e);
	return 0;
}

static int32_t walk(const struct policy_state *ps, uint32_t list, const uint64_t other[2], uint16_t port)
{
	const struct policy_entry *r = ps->list[list];

	for (uint32_t k = 0; k < ps->n[list]; k++, r++)
		if (!(((other[0] ^ r->net[0]) & r->mask[0]) | ((other[1] ^ r->net[1]) & r->mask[1])) &&
		    port >= r->port_min && port <= r->port_max)
			return r->deny ? (int32_t)r->name : POLICY_NONE;
	return POLICY_NONE;
}

/* The remembered verdict, looked up if need be. */
static struct policy_verdict *verdict(struct policy_state *ps, uint32_t list, const uint64_t other[2], uint16_t port)
{
	uint64_t h = (other[0] ^ other[1] ^ (uint64_t)port << 3 ^ list) * 0x9e3779b97f4a7c15ull;
	struct policy_verdict *v = &ps->cache[h >> 32 & (POLICY_CACHE - 1)];

	if (v->list == list + 1 && v->port == port && v->other[0] == other[0] && v->other[1] == other[1])
		return v;
	*v = (struct policy_verdict){
		.other = { other[0], other[1] },
		.port = port,
		.list = (uint8_t)(list + 1),
		.rule = walk(ps, list, other, port),
	};
	return v;
}

int32_t stage_egress_policy_verdict(struct rn_stage *s, uint32_t way, uint8_t proto, const uint8_t other[16],
				    uint16_t port)
{
	struct egress *e = s->priv;
	uint32_t list = list_of(way, proto);
	uint64_t words[2];

	if (!e->policy || list == POLICY_LISTS)
		return POLICY_NONE;
	load(words, other);
	return verdict(e->policy, list, words, port)->rule;
}

int policy_refuses(struct egress *e, uint32_t way, uint8_t proto, const uint8_t guest[16], uint16_t gport,
		   const uint8_t other[16], uint16_t port)
{
	uint32_t list = list_of(way, proto);
	uint16_t called = way == POLICY_IN ? gport : port;
	struct policy_verdict *v;
	uint64_t words[2];

	if (list == POLICY_LISTS)
		return 0;
	if (way == POLICY_OUT && proto == RN_IPPROTO_TCP && port == RN_PORT_DNS && e->cfg.dns_path[0] &&
	    !memcmp(other + 12, e->cfg.gateway4, 4))
		return 0; /* services' (tcp_open.c) */
	load(words, other);
	v = verdict(e->policy, list, words, called);
	if (v->rule == POLICY_NONE)
		return 0;
	e->s->c[way == POLICY_IN ? RN_C_drop_policy_in : RN_C_drop_policy_out]++;
	if (proto == RN_IPPROTO_TCP || !v->told_ns || e->s->now - v->told_ns >= POLICY_TELL_NS) {
		v->told_ns = e->s->now;
		eg_refused_by(e, proto, guest, gport, other, port, EPERM, v->rule);
	}
	return 1;
}
