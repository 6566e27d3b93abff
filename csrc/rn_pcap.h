/* rn_pcap.h - frames of the guest's link as a pcapng file (draft-ietf-opsawg-pcapng). */
#ifndef RN_PCAP_H
#define RN_PCAP_H

#include "rn_layout.h"

/* CFFI BEGIN */
enum rn_pcap_dir { /* epb_flags bits 0-1 */
	RN_PCAP_FROM_GUEST = 1, /* "inbound": the guest sent it, we received it */
	RN_PCAP_TO_GUEST = 2	/* "outbound" */
};

struct rn_pcap; /* one writer's end; private to a process */

/* Write the head of the file (section header, one interface). @snaplen: 0, no limit, is right for the
 * stages here, which never cut a frame. 0, or a negative errno. */
int rn_pcap_begin(int fd, const char *ifname, uint32_t snaplen);

/* A writer on @fd, opened with O_APPEND; the fd stays the caller's. @snaplen as in the head.
 * NULL if out of memory. */
struct rn_pcap *rn_pcap_new(int fd, int dir, uint32_t snaplen);
void rn_pcap_free(struct rn_pcap *p); /* flushes; NULL is allowed */

/* Add one frame, in the private batch until rn_pcap_flush(). */
void rn_pcap_frame(struct rn_pcap *p, const uint8_t *eth, uint32_t len);
/* Write the batch: once a turn, so that a frame is in the file when its turn is over. */
void rn_pcap_flush(struct rn_pcap *p);

/* Frames in the file; frames lost because it could not be written. Both since rn_pcap_new(). */
uint64_t rn_pcap_written(const struct rn_pcap *p);
uint64_t rn_pcap_lost(const struct rn_pcap *p);
/* CFFI END */
#endif
