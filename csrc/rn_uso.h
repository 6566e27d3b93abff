/* rn_uso.h - a train of datagrams, as it lies in a UDP super-frame of the guest, to a host socket.
 *
 * The guest's kernel, asked by a program (UDP_SEGMENT, udp(7)), hands over many datagrams to one peer as one frame: all of
 * one size, the last may be shorter (virtio 1.2 5.1.6.2, VIRTIO_NET_HDR_GSO_UDP_L4). The host's kernel is asked for the
 * same, so that a train is one system call in both. Where it will not do that the train goes a datagram a call.
 */
#ifndef RN_USO_H
#define RN_USO_H

#include "rn_layout.h"

#include <sys/socket.h>

/* CFFI BEGIN */
#define RN_USO_DATAGRAMS_MAX 128 /* of a train: Linux's UDP_MAX_SEGMENTS (64 before 6.9); a guest that says more lies */

struct rn_uso { /* what became of a train */
	uint32_t sent, lost; /* datagrams: the kernel took them, or not */
	int err;	     /* positive errno of the first that was lost, 0: none was */
};

/* For tests: rn_uso_send() on a connected socket, with @head_len bytes in front of each datagram. */
void rn_uso_connected(int fd, const uint8_t *head, uint32_t head_len, const uint8_t *payload, uint32_t len, uint32_t size,
		      struct rn_uso *out);
/* CFFI END */

/* Datagrams in @len bytes of payload; @size: of each, 0: it is one. */
static inline uint32_t rn_uso_count(uint32_t len, uint32_t size)
{
	return size && len > size ? (len + size - 1) / size : 1;
}

/**
 * rn_uso_send() - Send a train, or one datagram
 * @fd:		UDP socket; does not block
 * @how:	Where to: name and control messages as for sendmsg(), room for CMSG_SPACE(2) in RN_USO_CONTROL left. msg_iov:
 *		what goes in front of each datagram, one piece; msg_iovlen 0: nothing does
 * @payload:	Bytes of all datagrams
 * @len:	How many
 * @size:	Bytes of each datagram, the last may have fewer; 0: it is one datagram
 * @out:	Set to what became of it
 *
 * A full socket buffer, or a host that cannot be reached, loses what was asked for by that call. An error that the socket
 * still had from an earlier datagram (IP_RECVERR) is returned by a call that then sends nothing, so each is tried twice.
 */
void rn_uso_send(int fd, const struct msghdr *how, const uint8_t *payload, uint32_t len, uint32_t size, struct rn_uso *out);
#define RN_USO_CONTROL 128u /* bytes of control messages at most, UDP_SEGMENT's included */

#endif
