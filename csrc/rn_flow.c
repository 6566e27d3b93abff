/* rn_flow.c - create, check and look at the flow table (layout: rn_flow.h).
 *
 * Entries are made and changed by the stage that owns them (egress); here is only what the supervisor and
 * the monitor need. The monitor reads entries while they change: each word is whole, but an entry may be
 * half of one moment and half of the next. That is good enough to look at, and nothing is decided by it.
 */
#include "rn_flow.h"
#include "rn_promote.h"

#include <errno.h>
#include <string.h>

#define FLOWS_MAX (1u << 24) /* entries: indices are 32-bit and EG_NONE is not one of them */

uint64_t rn_flows_size(uint32_t nflows)
{
	if (!nflows || nflows > FLOWS_MAX)
		return 0;
	return sizeof(struct rn_flows) + (uint64_t)nflows * sizeof(struct rn_flow);
}

/* Format @size zeroed bytes. 0, or -EINVAL (alignment, count, size too small). */
int rn_flows_create(void *mem, uint64_t size, uint32_t nflows, uint64_t secret0, uint64_t secret1)
{
	struct rn_flows *flows = mem;
	uint64_t need = rn_flows_size(nflows);

	if (!mem || (uintptr_t)mem % RN_CACHE_LINE || !need || size < need)
		return -EINVAL;
	flows->version = RN_LAYOUT_VERSION;
	flows->nflows = nflows;
	atomic_store_explicit(&flows->crowd, 0, memory_order_relaxed); /* nobody else has it yet */
	flows->secret[0] = secret0;
	flows->secret[1] = secret1;
	flows->magic = RN_FLOWS_MAGIC;
	return 0;
}

/* Check identity and hand out the number of entries, read once. */
static int flows_identity(const void *mem, uint64_t size, uint32_t *nflows)
{
	const volatile struct rn_flows *flows = mem;
	uint64_t need;

	if (!mem || (uintptr_t)mem % RN_CACHE_LINE)
		return -EINVAL;
	if (size < sizeof(struct rn_flows))
		return -EMSGSIZE;
	if (flows->magic != RN_FLOWS_MAGIC || flows->version != RN_LAYOUT_VERSION)
		return -EPROTO;
	*nflows = flows->nflows;
	need = rn_flows_size(*nflows);
	if (!need)
		return -EPROTO;
	return size < need ? -EMSGSIZE : 0;
}

int rn_flows_check(const void *mem, uint64_t size)
{
	uint32_t nflows;

	return flows_identity(mem, size, &nflows);
}

uint32_t rn_flows_count(const void *mem)
{
	const volatile struct rn_flows *flows = mem;

	return flows->nflows;
}

uint32_t rn_flows_next(const void *mem, uint64_t size, uint32_t i)
{
	const struct rn_flows *flows = mem;
	uint32_t nflows;

	if (flows_identity(mem, size, &nflows))
		return UINT32_MAX;
	while (i < nflows && atomic_load_explicit(&flows->flow[i].state, memory_order_relaxed) == RN_FL_FREE)
		i++;
	return i;
}

int rn_flows_read(const void *mem, uint64_t size, uint32_t i, struct rn_flow_view *out)
{
	const struct rn_flow *f;
	uint32_t nflows;
	uint8_t state;
	int err = flows_identity(mem, size, &nflows);

	if (err)
		return err;
	if (i >= nflows)
		return -EINVAL;
	f = &((const struct rn_flows *)mem)->flow[i];
	state = atomic_load_explicit(&f->state, memory_order_relaxed);
	if (state == RN_FL_FREE)
		return -ENOENT;
	*out = (struct rn_flow_view){
		.guest_port = f->guest_port,
		.peer_port = f->peer_port,
		.proto = f->proto,
		.state = state,
		.up_fin = f->up.fin,
		.down_fin = f->down.fin,
		/* F2: acquire, pairs F1. */
		.up_owner = atomic_load_explicit(&f->up.owner, memory_order_acquire) & ~RN_OWNER_BUSY,
		.down_owner = atomic_load_explicit(&f->down.owner, memory_order_acquire) & ~RN_OWNER_BUSY,
		.created_ns = f->created_ns,
		.last_ns = f->last_ns,
		.up_bytes = f->up.bytes,
		.up_packets = f->up.packets,
		.down_bytes = f->down.bytes,
		.down_packets = f->down.packets,
		.rcv_nxt = f->up.rcv_nxt,
		.rcv_adv = f->up.rcv_adv,
		.snd_una = f->down.snd_una,
		.snd_nxt = f->down.snd_nxt,
		.snd_wnd = f->down.snd_wnd,
		.mss = f->down.mss,
		.srtt_us = f->down.srtt_us,
		.rto_us = f->down.rto_us,
		.retransmits = f->down.retransmits,
		.parked = f->up.parked,
		.gen = f->gen,
		.index = i,
		.up_wait = f->up.wait,
		.down_wait = f->down.wait,
		.up_wait_ns = f->up.wait_ns,
		.down_wait_ns = f->down.wait_ns,
	};
	memcpy(out->guest_addr, f->guest_addr, sizeof(out->guest_addr));
	memcpy(out->peer_addr, f->peer_addr, sizeof(out->peer_addr));
	return 0;
}

void rn_flows_redact(void *copy, uint64_t size)
{
	/* By offset: the copy lies wherever its buffer does, not on a cache line as the table. */
	if (size >= sizeof(struct rn_flows))
		memset((uint8_t *)copy + offsetof(struct rn_flows, secret), 0, sizeof(((struct rn_flows *)0)->secret));
}

uint32_t rn_flows_collect(const void *mem, uint64_t size, struct rn_flow_view *out, uint32_t max)
{
	uint32_t n = 0;

	for (uint32_t i = 0; n < max && (i = rn_flows_next(mem, size, i)) < UINT32_MAX; i++) {
		int err = rn_flows_read(mem, size, i, &out[n]);

		if (err == -EINVAL)
			break; /* past the end */
		n += !err;
	}
	return n;
}
