/* rn_gro.h - the reverse of rn_gso.h: TCP segments that follow each other become one super-frame.
 *
 * For links whose peer sends no virtio-net headers, and so every segment by itself: behind the link one frame of 64 KiB
 * costs what one of 1460 bytes does. Merged is only what cutting it again would give back, but for IP identification and
 * PSH; checksums are verified first, and the result says "partial", as a frame of the guest's own offload would.
 */
#ifndef RN_GRO_H
#define RN_GRO_H

#include "rn_layout.h"

struct rn_gro {
	uint8_t head[RN_ETH_HLEN + 20 + 60]; /* of the first segment */
	uint32_t hlen, mss, next_seq, len;   /* len: bytes of frame so far */
	uint8_t flags;			     /* TCP's, of all */
	uint8_t closed;			     /* a segment was shorter than the first: it was the last */
};

/* Is this a segment that others may be added to? Cheap; looks at no payload. */
int rn_gro_begin(struct rn_gro *g, const uint8_t *frame, uint32_t len);
/* Is @frame the segment behind those so far, and whole? Then it counts as one of them. */
int rn_gro_follows(struct rn_gro *g, const uint8_t *frame, uint32_t len);
/* Are the checksums of a segment right? */
int rn_gro_intact(const uint8_t *frame, uint32_t len);
/* All payload lies behind the first segment, from which the headers are: make it a super-frame. */
void rn_gro_finish(const struct rn_gro *g, uint8_t *vnet_then_frame);

#endif
