/* reassembly.c - IPv4 reassembly (RFC 791 3.2, RFC 815), for a hostile sender and bounded memory.
 *
 * A datagram under way is known by source, destination, protocol and identification. Its payload is put
 * where it belongs in one block as fragments come, in any order. RFC 815 keeps a list of holes; here a
 * bitmap has one bit for each 8 bytes (the unit of the offset field): 1 KiB, so that 8189 tiny fragments
 * cost no more memory than two large ones, and there is no list for a sender to make long.
 *
 * Overlap: attacks on filters and stacks live on fragments that overlap (RFC 1858, RFC 3128), and no
 * honest sender makes them. A fragment whose bytes are all there already and the same is a duplicate and
 * ignored; any other overlap drops the whole datagram, and its later fragments too (the rule of RFC 5722 3
 * for IPv6, with the exception for duplicates of RFC 8200 4.5): the entry stays, without memory, until it
 * times out. The same happens to a datagram with a fragment that is empty, not a multiple of 8 bytes
 * though more follow, past 65535, or past or short of the end that another one told.
 *
 * Bounds: RA_DATAGRAMS entries, one block each at most; the oldest goes for a new one. 15 seconds from the
 * first fragment that came, not from the last (RFC 1122 3.3.2: a fixed value).
 *
 * Events: a fragment (reassembly_add()) and the clock (reassembly_expire(), due at reassembly_deadline()).
 */
#include "reassembly.h"

#include <stdlib.h>

#include "rn_csum.h"

#define UNIT 8u			     /* bytes; RFC 791 3.1 "Fragment Offset" */
#define WORDS (65536u / UNIT / 64u)  /* of the bitmap */

struct ra_entry {
	uint8_t src[4], dst[4], proto;
	uint8_t used;
	uint8_t refused; /* a fragment was bad: all are dropped until the timeout, and there is no block */
	uint8_t hlen;	 /* bytes of IP header; 0: the first fragment has not come */
	uint16_t id;
	uint64_t since;	    /* ns, first arrival */
	uint32_t total;	    /* bytes of payload, 0: the last fragment has not come */
	uint32_t have;	    /* bytes of payload that came */
	uint32_t top;	    /* end of the highest fragment that came */
	uint32_t first_len; /* bytes of payload in the first fragment */
	uint32_t nfrags;    /* frames held */
	uint8_t *block;
	uint64_t map[WORDS];
};

struct reassembly {
	struct ra_memory mem;
	struct ra_stat stat;
	uint32_t heap_free; /* reassembly_new_heap(): blocks left */
	struct ra_entry entry[RA_DATAGRAMS];
};

struct reassembly *reassembly_new(const struct ra_memory *mem)
{
	struct reassembly *r = calloc(1, sizeof(*r));

	if (r)
		r->mem = *mem;
	return r;
}

/* Let go of the block; what it held is counted in @fate. */
static void entry_empty(struct reassembly *r, struct ra_entry *e, uint64_t *fate)
{
	*fate += e->nfrags;
	r->stat.held -= e->nfrags;
	e->nfrags = 0;
	if (e->block)
		r->mem.put(r->mem.ctx, e->block);
	e->block = NULL;
}

static void entry_drop(struct reassembly *r, struct ra_entry *e, uint64_t *fate)
{
	entry_empty(r, e, fate);
	e->used = 0;
	r->stat.open--;
}

void reassembly_free(struct reassembly *r)
{
	uint64_t ignored = 0;

	if (!r)
		return;
	for (uint32_t i = 0; i < RA_DATAGRAMS; i++)
		if (r->entry[i].used)
			entry_drop(r, &r->entry[i], &ignored);
	free(r);
}

void reassembly_stat(const struct reassembly *r, struct ra_stat *out)
{
	*out = r->stat;
}

static struct ra_entry *oldest(struct reassembly *r, int with_block)
{
	struct ra_entry *found = NULL;

	for (uint32_t i = 0; i < RA_DATAGRAMS; i++) {
		struct ra_entry *e = &r->entry[i];

		if (e->used && (!with_block || e->block) && (!found || e->since < found->since))
			found = e;
	}
	return found;
}

uint64_t reassembly_deadline(const struct reassembly *r)
{
	const struct ra_entry *e = r->stat.open ? oldest((struct reassembly *)r, 0) : NULL;

	return e ? e->since + RA_TIMEOUT_NS : UINT64_MAX;
}

static struct ra_entry *find(struct reassembly *r, const uint8_t *ip)
{
	for (uint32_t i = 0; i < RA_DATAGRAMS; i++) {
		struct ra_entry *e = &r->entry[i];

		if (e->used && e->id == rn_get16(ip + RN_IP4_ID) && e->proto == ip[RN_IP4_PROTO] &&
		    !memcmp(e->src, ip + RN_IP4_SRC, 4) && !memcmp(e->dst, ip + RN_IP4_DST, 4))
			return e;
	}
	return NULL;
}

/* A new entry with a block; older datagrams go for it. NULL: no memory at all. */
static struct ra_entry *entry_new(struct reassembly *r, uint64_t now, const uint8_t *ip)
{
	struct ra_entry *e = NULL;
	uint8_t *block = r->mem.get(r->mem.ctx);

	if (!block && (e = oldest(r, 1))) {
		entry_drop(r, e, &r->stat.table);
		block = r->mem.get(r->mem.ctx);
	}
	if (!block)
		return NULL;
	if (r->stat.open == RA_DATAGRAMS)
		entry_drop(r, oldest(r, 0), &r->stat.table);
	for (e = r->entry; e->used; e++)
		;
	memset(e, 0, sizeof(*e));
	e->used = 1;
	e->id = rn_get16(ip + RN_IP4_ID);
	e->proto = ip[RN_IP4_PROTO];
	memcpy(e->src, ip + RN_IP4_SRC, 4);
	memcpy(e->dst, ip + RN_IP4_DST, 4);
	e->since = now;
	e->block = block;
	r->stat.open++;
	return e;
}

/* Bits of word @w that lie in units [@first, @end). */
static uint64_t word_mask(uint32_t w, uint32_t first, uint32_t end)
{
	uint64_t mask = UINT64_MAX;

	if (first > w * 64)
		mask &= UINT64_MAX << (first - w * 64);
	if (end < (w + 1) * 64)
		mask &= UINT64_MAX >> ((w + 1) * 64 - end);
	return mask;
}

/* How much of units [@first, @end) has come: 0 none, 1 all, -1 a part. */
static int map_look(const struct ra_entry *e, uint32_t first, uint32_t end)
{
	int any = 0, all = 1;

	for (uint32_t w = first / 64; w * 64 < end; w++) {
		uint64_t mask = word_mask(w, first, end);

		any |= !!(e->map[w] & mask);
		all &= (e->map[w] & mask) == mask;
	}
	return !any ? 0 : all ? 1 : -1;
}

static void map_set(struct ra_entry *e, uint32_t first, uint32_t end)
{
	for (uint32_t w = first / 64; w * 64 < end; w++)
		e->map[w] |= word_mask(w, first, end);
}

/* The datagram is complete: put the header of its first fragment, made new, in front of the payload. */
static enum ra_result finish(struct reassembly *r, struct ra_entry *e, struct ra_done *done)
{
	uint8_t *ip = e->block + RA_DATA_OFF - e->hlen;

	/* RFC 791 3.2: total length of the whole, fragment field cleared. */
	rn_put16(ip + RN_IP4_LEN, (uint16_t)(e->hlen + e->total));
	rn_put16(ip + RN_IP4_FRAG, 0);
	rn_csum_ip4(ip, e->hlen);
	done->block = e->block;
	done->eth = ip - RN_ETH_HLEN;
	done->len = RN_ETH_HLEN + e->hlen + e->total;
	e->block = NULL;
	r->stat.datagrams++;
	entry_drop(r, e, &r->stat.joined);
	return RA_DONE;
}

/**
 * reassembly_add() - Take one fragment
 * @r:		Reassembly state
 * @now:	CLOCK_MONOTONIC ns
 * @frame:	The fragment's frame; its bytes are copied
 * @p:		rn_parse_frame() of it, verdict RN_V_FRAGMENT: IP header and total length lie in the frame
 * @done:	Written on RA_DONE
 *
 * The L4 checksum is not looked at: the caller parses the whole datagram as if it had come so.
 *
 * Return: RA_DONE, RA_HELD (more must come, or it was a duplicate), RA_DROPPED (counted in stat.bad or .table).
 */
enum ra_result reassembly_add(struct reassembly *r, uint64_t now, const struct rn_view *frame,
			      const struct rn_parsed *p, struct ra_done *done)
{
	uint32_t hlen = p->l4_off - p->l3_off, len = p->l4_len;
	uint32_t off = p->frag_off, end = off + len; /* both below 2^16 + 2^16 */
	const uint8_t *ip = rn_view_get(frame, p->l3_off, hlen);
	const uint8_t *data = rn_view_get(frame, p->l4_off, len);
	uint32_t first = off / UNIT, last = (end + UNIT - 1) / UNIT;
	struct ra_entry *e;

	if (!ip || !data || hlen < RN_IP4_HLEN || hlen > 60) {
		r->stat.bad++;
		return RA_DROPPED;
	}
	e = find(r, ip);
	if (!e)
		e = entry_new(r, now, ip);
	if (!e) {
		r->stat.table++;
		return RA_DROPPED;
	}
	if (e->refused) {
		r->stat.bad++;
		return RA_DROPPED;
	}
	if (!len || (p->frag_more && len % UNIT) || end > 65535 - RN_IP4_HLEN || (!off && hlen + len > 65535))
		goto refuse;
	/* The end is told once, and nothing lies behind it. */
	if (e->total && (end > e->total || (!p->frag_more && end != e->total)))
		goto refuse;
	if (!p->frag_more && end < e->top)
		goto refuse;

	switch (map_look(e, first, last)) {
	case 1:
		/* The bitmap counts in units and a last fragment may end inside one; but then the end is known,
		 * and nothing past it came this far. So all these bytes have been written. */
		if (memcmp(e->block + RA_DATA_OFF + off, data, len) || (!p->frag_more && e->total != end))
			goto refuse;
		r->stat.duplicates++;
		return RA_HELD;
	case -1:
		goto refuse;
	}
	memcpy(e->block + RA_DATA_OFF + off, data, len);
	map_set(e, first, last);
	e->have += len;
	e->nfrags++;
	r->stat.held++;
	if (end > e->top)
		e->top = end;
	if (!p->frag_more)
		e->total = end;
	if (!off) {
		e->hlen = (uint8_t)hlen;
		e->first_len = len;
		memcpy(e->block + RA_DATA_OFF - hlen, ip, hlen);
		memcpy(e->block + RA_DATA_OFF - hlen - RN_ETH_HLEN, frame->data, RN_ETH_HLEN);
	}
	/* No two overlap, so as many bytes as the whole has are the whole. */
	if (!e->total || e->have != e->total)
		return RA_HELD;
	if (e->hlen + e->total > 65535) /* options in the first fragment; RFC 791 3.1 total length */
		goto refuse;
	return finish(r, e, done);

refuse:
	entry_empty(r, e, &r->stat.bad);
	e->refused = 1;
	r->stat.bad++;
	return RA_DROPPED;
}

int reassembly_expire(struct reassembly *r, uint64_t now, uint8_t *quote, uint32_t *quote_len)
{
	struct ra_entry *e = r->stat.open ? oldest(r, 0) : NULL;

	*quote_len = 0;
	if (!e || now < e->since + RA_TIMEOUT_NS)
		return 0;
	if (e->block && e->hlen) {
		uint32_t len = RN_ETH_HLEN + e->hlen + e->first_len;

		*quote_len = len < RA_QUOTE_MAX ? len : RA_QUOTE_MAX;
		memcpy(quote, e->block + RA_DATA_OFF - e->hlen - RN_ETH_HLEN, *quote_len);
	}
	entry_drop(r, e, &r->stat.timeout);
	return 1;
}

/* --- the same over plain bytes --- */

static void *heap_get(void *ctx)
{
	struct reassembly *r = ctx;
	void *block = r->heap_free ? malloc(RA_BLOCK) : NULL;

	if (block)
		r->heap_free--;
	return block;
}

static void heap_put(void *ctx, void *block)
{
	struct reassembly *r = ctx;

	r->heap_free++;
	free(block);
}

struct reassembly *reassembly_new_heap(uint32_t blocks)
{
	const struct ra_memory none = { .get = heap_get, .put = heap_put };
	struct reassembly *r = reassembly_new(&none);

	if (!r)
		return NULL;
	r->mem.ctx = r;
	r->heap_free = blocks;
	return r;
}

int reassembly_add_bytes(struct reassembly *r, uint64_t now, const uint8_t *frame, uint32_t len,
			 const struct classify_config *cfg, uint8_t *out, uint32_t *out_len)
{
	struct rn_view v = { .data = frame, .len = len };
	struct ra_done done;
	enum ra_result result;
	struct rn_parsed p;

	if (rn_parse_frame(&v, NULL, cfg, &p) != RN_V_FRAGMENT)
		return RA_DROPPED;
	result = reassembly_add(r, now, &v, &p, &done);
	if (result == RA_DONE) {
		memcpy(out, done.eth, done.len);
		*out_len = done.len;
		r->mem.put(r->mem.ctx, done.block);
	}
	return (int)result;
}

int reassembly_expire_bytes(struct reassembly *r, uint64_t now, uint8_t *out, uint32_t *out_len)
{
	return reassembly_expire(r, now, out, out_len);
}
