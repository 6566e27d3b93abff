/* rn_link_kinds.h - what the kinds of link share; nobody but rn_link*.c includes it. */
#ifndef RN_LINK_KINDS_H
#define RN_LINK_KINDS_H

#include "rn_gso.h"
#include "rn_link.h"
#include "rn_proto.h"
#include "rn_unfinished.h"

#define RN_LINK_IN (256u * 1024) /* bytes of a stream read at once */
/* Records held: below this much a stream takes small frames without a system call, */
#define RN_LINK_HIGH (64u * 1024)
#define RN_LINK_SMALL 4096u /* ... and these are small */
/* and behind it there must be room for the largest frame, in the smallest segments. */
#define RN_LINK_OUT (512u * 1024)
#define RN_LINK_LEN 4u /* bytes of a record's length */
#define RN_LINK_BURST 64u /* datagrams a recvmmsg, where segments may be merged, */
#define RN_LINK_BURST_FRAME 9216u /* and frames are at most so long: beyond that merging saves little */
_Static_assert(RN_LINK_HIGH + RN_LINK_SMALL + RN_FRAME_MAX + RN_GSO_SEGS_MAX * (RN_LINK_LEN + 134u) <= RN_LINK_OUT,
	       "what a frame becomes always fits behind what is held");
_Static_assert(RN_LINK_IN >= 2 * (RN_LINK_LEN + RN_LINK_WORD_MAX), "a record fits, wherever it begins");

/* Records are as on a stream's wire: 4 bytes of length, then the frame (with its header if the link has one). */
struct rn_link_state {
	/* Read, and not yet handed on: bytes of a stream [in_at, in_fill); or slots [in_at, in_fill) of a burst of datagrams,
	 * whose true lengths are in in_len. */
	uint8_t *in;
	uint32_t in_at, in_fill;
	uint32_t in_len[RN_LINK_BURST];
	uint32_t skip;	  /* bytes to come that belong to a frame nobody wants */
	int skip_says;	  /* and what to say of it */
	uint8_t *out;	  /* records from out_at to out_fill are held; a packet link's out_at is where one begins */
	uint32_t out_at, out_fill;
};

/* The virtio-net header asks for something that this link's peer is not told of. */
static inline int rn_link_must_finish(const struct rn_link *l, const uint8_t *vnet_then_frame)
{
	uint16_t flags_and_type;

	memcpy(&flags_and_type, vnet_then_frame, 2);
	return !l->vnet && flags_and_type & (RN_VNET_NEEDS_CSUM | 0xff00u);
}

/* Put a record at the end of what is held, in two pieces. */
static inline void rn_link_hold(struct rn_link_state *st, const uint8_t *head, uint32_t hlen, const uint8_t *rest,
				uint32_t n)
{
	rn_put32(st->out + st->out_fill, hlen + n);
	memcpy(st->out + st->out_fill + RN_LINK_LEN, head, hlen);
	memcpy(st->out + st->out_fill + RN_LINK_LEN + hlen, rest, n);
	st->out_fill += RN_LINK_LEN + hlen + n;
}

/* How much a read may bring: frame_max, or any super-frame (virtio 1.2 5.1.6.2). */
static inline uint32_t rn_link_read_limit(const struct rn_link *l)
{
	return (l->vnet || l->merge || l->unfinished) && l->frame_max < RN_FRAME_MAX ? RN_FRAME_MAX : l->frame_max;
}

/* The header of a frame that was read without one. */
static inline void rn_link_head(const struct rn_link *l, uint8_t *vnet_then_frame, uint32_t len)
{
	if (l->unfinished)
		rn_unfinished_mark(vnet_then_frame, len, l->unfinished);
	else
		memset(vnet_then_frame, 0, RN_VNET_HLEN);
}

/* What a frame to be finished becomes on this link; as rn_gso_begin(), and -EMSGSIZE: of more than the link carries. */
static inline int rn_link_finish(const struct rn_link *l, struct rn_gso *g, const uint8_t *vnet_then_frame, uint32_t len)
{
	int segs = rn_gso_begin(g, vnet_then_frame, len);
	uint32_t max = l->frame_max;

	if (segs < 0)
		return segs;
	if (l->whole && rn_gso_whole(g)) {
		segs = 1;
		max = RN_FRAME_MAX;
	}
	return g->hlen + (g->nsegs > 1 ? g->mss : len - g->hlen) > max ? -EMSGSIZE : segs;
}

/* rn_link_burst.c: as rn_link_read(), but 0 may be an empty datagram. */
int64_t rn_link_burst_read(const struct rn_link *l, uint8_t *vnet_then_frame);

/* rn_link_segments.c: frames to be finished, on a link that takes one a system call. */
int rn_link_segments_write(const struct rn_link *l, const uint8_t *vnet_then_frame, uint32_t len);
int rn_link_segments_flush(const struct rn_link *l);

/* rn_link_stream.c */
int64_t rn_link_stream_read(const struct rn_link *l, uint8_t *vnet_then_frame);
int rn_link_stream_write(const struct rn_link *l, const uint8_t *vnet_then_frame, uint32_t len);
int rn_link_stream_flush(const struct rn_link *l);

#endif
