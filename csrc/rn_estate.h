/* rn_estate.h - what a stage that leaves its seat in order leaves to its successor: bytes and descriptors.
 *
 * They go into one end of an AF_UNIX SOCK_SEQPACKET pair of which the supervisor holds both ends, and lie there, in the
 * kernel, until a successor takes them out of the other: host sockets that are in no process are still open. The bytes are
 * a memfd, in the first packet; descriptors follow, up to RN_ESTATE_FDS a packet. What the bytes mean is the stage's
 * business (egress_estate.c).
 */
#ifndef RN_ESTATE_H
#define RN_ESTATE_H

#include "rn_layout.h"

#include <stddef.h>

/* CFFI BEGIN */
/* Take what lies at @take, if something does, and close it: TCP connections with a reset, so that no peer takes a cut one
 * for whole. How many descriptors there were. */
uint32_t rn_estate_discard(int take);
/* CFFI END */

#define RN_ESTATE_FDS 240u /* unix(7): SCM_MAX_FD is 253 */

struct rn_estate_out { /* being written; all zero at first */
	uint8_t *data;
	size_t len, room;
	int *fd; /* the writer's own: they are duplicated by sending */
	uint32_t nfds, fds_room;
	int error; /* 0, or -ENOMEM: something is missing */
};
void rn_estate_put(struct rn_estate_out *o, const void *data, size_t len);
void rn_estate_put_fd(struct rn_estate_out *o, int fd);
/* 0, or -errno: then part of it may lie there, see rn_estate_discard(). */
int rn_estate_send(int put, const struct rn_estate_out *o);
void rn_estate_out_free(struct rn_estate_out *o);

struct rn_estate_in { /* being read */
	uint8_t *data;
	size_t len, at;
	int *fd; /* -1: taken by the reader */
	uint32_t nfds, fd_at;
};
/* 1: there was one, and all of it is in @in; 0: none lies there; else -errno, and nothing lies there any more: -EPROTO
 * it is not whole, its writer was killed; -EMFILE this process may not have so many descriptors. */
int rn_estate_receive(int take, struct rn_estate_in *in);
/* The next @len bytes, which stay where they are, or NULL: there are not so many. */
const void *rn_estate_view(struct rn_estate_in *in, size_t len);
/* The same, copied. 0 or -1. */
int rn_estate_get(struct rn_estate_in *in, void *to, size_t len);
/* The next descriptor, the caller's from here on, or -1: there is none. */
int rn_estate_get_fd(struct rn_estate_in *in);
/* 1: every byte and every descriptor was taken. */
int rn_estate_done(const struct rn_estate_in *in);
/* Closes what was not taken as rn_estate_discard() does. */
void rn_estate_in_free(struct rn_estate_in *in);

#endif
