/* rn_link.h - the guest side: read a frame, write a frame, and what the link can do for us.
 *
 *   kind    carries a frame as                               writes     virtio-net header
 *   tap     one read() or write()                            atomic     always
 *   dgram   one datagram (AF_UNIX, or SOCK_SEQPACKET)        atomic     if the config says so
 *   stream  its length as 4 bytes, high byte first, then it  not        if the config says so
 *
 * Burst contract. A caller reads until -EAGAIN and writes until -EAGAIN; in between the link moves as many frames with
 * a system call as it can: a stream reads whole buffers and gathers what it writes. What it has taken but not yet
 * given to the kernel goes out by rn_link_flush(), which a writer calls at the end of each turn.
 *
 * A link without virtio-net headers still takes frames that have them: checksums are completed and segments cut while
 * they are written (rn_gso.h); or only the former, for a peer that takes super-frames all the same. What such a peer sends gets
 * the header back that it lost (rn_unfinished.h). A frame is taken whole or not at all, whatever becomes of its segments.
 */
#ifndef RN_LINK_H
#define RN_LINK_H

#include "rn_layout.h"

/* CFFI BEGIN */
enum rn_link_kind { RN_LINK_TAP = 0, RN_LINK_DGRAM, RN_LINK_STREAM };

/* Stream: the largest length word believed. QEMU's and passt's frames are shorter (QEMU's NET_BUFSIZE). */
#define RN_LINK_WORD_MAX 69632

struct rn_link_state; /* buffers of a direction, private to the link */

struct rn_link {
	int fd;		 /* non-blocking; -1: nobody is there */
	int kind;	 /* enum rn_link_kind */
	int vnet;	 /* 1: 12-byte virtio-net header on every frame */
	int uso;	 /* second NIC: 1: UDP super-frames may come from it; asked of the guest's kernel, or of the host's */
	uint32_t frame_max; /* largest Ethernet frame either way, bytes */
	uint32_t unfinished; /* not 0: the peer's frames may lack the header that they had (rn_unfinished.h). By it they are told
			      * from frames of this MTU, bytes of IP */
	int whole;	 /* 1: such a peer takes super-frames of TCP as they are, their checksum done; 0: they are cut */
	int merge;	 /* 1: a reader may be given super-frames made of TCP segments that came together (sockets without headers) */
	struct rn_link_state *state; /* from rn_link_open(). NULL is enough for plain frames on a tap or datagram link */
};

/* Get the buffers this link needs to be read and written by this process: 0 or -ENOMEM. The descriptor stays the
 * caller's. */
int rn_link_open(struct rn_link *l);
void rn_link_close(struct rn_link *l);

/* 1: a write is one frame or nothing, so that two processes may write to the link. 0: one writer only. */
int rn_link_atomic(const struct rn_link *l);

/* Read one frame into @buf, whose first RN_VNET_HLEN bytes take the header (zeroed if the link has none).
 * @cap: bytes at @buf, more than header + limit; the limit is frame_max, on a link with headers at least
 * RN_FRAME_MAX (super-frames; the caller holds the others to frame_max), and so if segments may be merged or frames be unfinished.
 * Returns frame bytes (header not counted), 0 on EOF (socket closed by the peer), -EAGAIN, -EMSGSIZE
 * (longer than the limit; it is gone), -EBADMSG (empty, or shorter than its virtio-net header; gone), -EPROTO (stream:
 * a length no frame has, so that nobody knows where the next one begins), -ENODATA (stream: ended inside a frame), or
 * another negative errno. */
int64_t rn_link_read(const struct rn_link *l, uint8_t *vnet_then_frame, uint32_t cap);

/* Write one frame; @vnet_then_frame as above, the caller's again when this returns. 0: taken; -EAGAIN: not taken, try
 * when the descriptor is writable; -EMSGSIZE: longer than frame_max; -EINVAL: its header does not fit it; or another
 * negative errno. */
int rn_link_write(const struct rn_link *l, const uint8_t *vnet_then_frame, uint32_t len);

/* Give the kernel what was taken. 0: it has all of it; -EAGAIN: again when the descriptor is writable; else a negative
 * errno, and what was held is lost. */
int rn_link_flush(const struct rn_link *l);

/* Bytes taken and not yet in the kernel. */
uint32_t rn_link_held(const struct rn_link *l);
/* CFFI END */

/* The same for a frame of a ring, its header in front of @eth: -ENODEV if nobody is there, -EMSGSIZE if the link cannot carry it. */
int rn_link_put(const struct rn_link *l, const uint8_t *eth, uint32_t len);

/* What an error of the link says about it, for who reads and who writes: */
int rn_link_read_ended(int64_t err);			/* 1: nothing will ever come from it again */
enum rn_link_down { RN_LINK_UP = 0, RN_LINK_DOWN, RN_LINK_LEFT }; /* of the kernel's doing; the peer has left */
enum rn_link_down rn_link_write_down(int err);

#endif
