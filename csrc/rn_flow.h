/* rn_flow.h - the flow table: every TCP connection, UDP mapping and ICMP echo mapping of the session.
 *
 * It lies in shared memory so that a successor of a killed stage, a stage a flow was promoted to, and the
 * monitor find it. What is only of use to one process (descriptors, timers, hash chains, parked segments)
 * is not in here: flow_priv in egress.h.
 *
 * Each flow has two halves, up (guest to host) and down (host to guest). A half is owned by one stage at
 * a time: the owner word holds stage row + 1 and is changed by compare-and-swap only; nobody else writes
 * the half's other fields (F1/F2 below order them). rn_promote.h has the rules by which halves move.
 *
 * What the guest acknowledged comes in by the owner of up and is needed by the owner of down: it crosses over in
 * struct rn_acks, which neither half is in.
 */
#ifndef RN_FLOW_H
#define RN_FLOW_H

#include "rn_layout.h"

/* CFFI BEGIN */
enum rn_flow_state { /* TCP states seen from our end towards the guest (RFC 9293 3.3.2) */
	RN_FL_FREE = 0,
	RN_FL_CONNECTING,  /* guest's SYN held back until the host side connected (I4) */
	RN_FL_SYN_RCVD,	   /* SYN-ACK sent */
	RN_FL_ESTABLISHED, /* and the half-closed states: see up.fin, down.fin */
	RN_FL_TIME_WAIT,   /* both FINs acknowledged; the host socket is closed */
	RN_FL_MAPPED,	   /* UDP and ICMP */
	RN_FL_SYN_SENT	   /* of a forward: our SYN to the guest is not answered yet */
};
enum rn_wait { /* what keeps a half from moving */
	RN_WAIT_NONE = 0,
	RN_WAIT_HOST,	/* up: the host socket's buffer is full */
	RN_WAIT_WINDOW, /* down: the guest's window is closed */
	RN_WAIT_ACK,	/* down: what is in flight fills the guest's window */
	RN_WAIT_ROOM,	/* down: no slot or buffer towards the guest */
	RN_WAIT_TURN	/* up: other senders' turn to have their window opened (fast_turns.c) */
};
#define RN_FIN_SEEN 1 /* up: guest's FIN is in order; down: host side reached its end */
#define RN_FIN_SENT 2 /* up: shutdown(SHUT_WR) done; down: FIN sent to the guest */
#define RN_FIN_ACKED 4 /* down: guest acknowledged our FIN */
/* CFFI END */

struct rn_half_up { /* guest to host; sequence numbers are the guest's */
	/* F1 acq_rel compare-and-swap by the old and the new owner, pairs F2 acquire load in whoever asks. */
	_Atomic uint32_t owner;
	uint32_t irs;	  /* initial receive sequence number */
	uint32_t rcv_nxt; /* advances by what send() took (I1) */
	uint32_t rcv_adv; /* right edge of the window advertised */
	uint8_t wscale;	  /* our shift, 0 if not agreed */
	uint8_t fin;	  /* RN_FIN_* */
	uint8_t torn;	  /* 1: its owner was killed at work on it: rcv_nxt may be behind what send() took */
	uint8_t wait;	  /* enum rn_wait, for whoever watches */
	uint32_t parked;    /* bytes kept in early or waiting segments */
	uint32_t acked;	    /* rcv_nxt as the guest was last told; whoever tells it writes it, relaxed */
	uint32_t fast;	    /* segments that guest_tx took; relaxed: egress asks whether there were any */
	uint64_t bytes, packets;
	uint64_t wait_ns; /* CLOCK_MONOTONIC since when it waits */
};
struct rn_acks { /* from the guest, to the owner of down while that is not egress; sequence numbers are ours */
	/* acknowledgment number << 32 | window, bytes. K1 release compare-and-swap by the owner of up, pairs K2 acquire load
	 * by the owner of down: what the guest sent before. */
	_Atomic uint64_t ack_wnd;
	_Atomic uint64_t at_ns; /* when it came, CLOCK_MONOTONIC; relaxed: for the round-trip time */
	/* K3 seq_cst store by the owner of down before it looks at ack_wnd once more and lets go of the flow, pairs K4
	 * seq_cst exchange by the owner of up after it wrote ack_wnd: enum rn_acks_want. */
	_Atomic uint32_t want;
	_Atomic uint32_t want_ack; /* RN_WANT_ACK: from this number on; written before want */
	/* errno that the host socket gave a stage other than egress, relaxed, 0: none. The kernel tells an error once; who asks
	 * next is told of an end of file. */
	_Atomic uint32_t broke;
};
struct rn_half_down { /* host to guest; sequence numbers are ours */
	_Atomic uint32_t owner; /* F1, F2 as above */
	uint32_t iss;
	uint32_t snd_una, snd_nxt;
	uint32_t snd_max;	  /* highest snd_nxt so far: less after going back (I2) */
	uint32_t snd_wnd;	  /* guest's window, bytes, scaled */
	uint32_t snd_wl1, snd_wl2; /* RFC 9293 3.10.7.4: segment that set snd_wnd */
	uint16_t mss;		  /* guest's, bytes of TCP payload */
	uint8_t wscale;		  /* guest's shift, 0 if not agreed */
	uint8_t fin;		  /* RN_FIN_* */
	uint32_t srtt_us, rttvar_us, rto_us; /* RFC 6298 */
	uint32_t torn; /* 1: its owner was killed at work on it: snd_una may be behind what was taken out of the socket */
	uint32_t retransmits;
	uint64_t bytes, packets;
	uint64_t wait_ns; /* as of the up half */
	uint8_t wait;	  /* enum rn_wait */
};

/* What a half waits for, by its owner; since @now, unless it did so already. */
static inline void rn_wait_set(uint8_t *wait, uint64_t *since, enum rn_wait what, uint64_t now)
{
	if (RN_UNLIKELY(*wait != (uint8_t)what)) {
		*since = now;
		*wait = (uint8_t)what;
	}
}

struct rn_flow {
	uint8_t guest_addr[16], peer_addr[16]; /* v4-mapped; peer as the guest calls it; UDP mapping: zero, */
	uint16_t guest_port, peer_port;	       /* host order; ICMP: guest_port is the echo identifier; UDP mapping: peer_port 0,
					* or which proxy carries it (proxy.c) */
	uint8_t proto;			       /* RN_IPPROTO_* */
	_Atomic uint8_t state;		       /* enum rn_flow_state; relaxed, for the monitor */
	uint8_t guest_mac[6];
	uint32_t gen; /* counts uses of this entry */
	uint32_t flags;
	uint64_t created_ns, last_ns; /* CLOCK_MONOTONIC; last_ns: last frame either way */
	alignas(RN_CACHE_LINE) struct rn_half_up up;
	alignas(RN_CACHE_LINE) struct rn_acks acks;
	alignas(RN_CACHE_LINE) struct rn_half_down down;
};
_Static_assert(sizeof(struct rn_half_up) <= RN_CACHE_LINE, "one line a half: two owners never share one");
_Static_assert(sizeof(struct rn_acks) <= RN_CACHE_LINE, "one line");
_Static_assert(sizeof(struct rn_half_down) <= 2 * RN_CACHE_LINE, "down half");
_Static_assert(sizeof(struct rn_flow) % RN_CACHE_LINE == 0, "entries start on a line");

struct rn_flows {
	uint32_t magic, version;
	uint32_t nflows;
	/* Bytes that a window is opened to at most, as many flows send at once (fast_turns.c); 0: as far as there is room.
	 * relaxed, written by guest_tx, for egress: a guess that may be late. */
	_Atomic uint32_t crowd;
	uint64_t secret[2]; /* key of the ISN and of hash tables (RFC 6528 3): random a session */
	alignas(RN_CACHE_LINE) struct rn_flow flow[];
};

/* CFFI BEGIN */
uint64_t rn_flows_size(uint32_t nflows);
int rn_flows_create(void *mem, uint64_t size, uint32_t nflows, uint64_t secret0, uint64_t secret1);
int rn_flows_check(const void *mem, uint64_t size); /* as rn_ring_check() */

struct rn_flow_view { /* one entry, for the monitor */
	uint8_t guest_addr[16], peer_addr[16];
	uint16_t guest_port, peer_port;
	uint8_t proto, state, up_fin, down_fin;
	uint32_t up_owner, down_owner;
	uint64_t created_ns, last_ns, up_bytes, up_packets, down_bytes, down_packets;
	uint32_t rcv_nxt, rcv_adv, snd_una, snd_nxt, snd_wnd, mss, srtt_us, rto_us, retransmits, parked;
	uint32_t gen; /* counts uses of the entry: with its index it names this flow and no later one */
	uint32_t index;
	uint8_t up_wait, down_wait; /* enum rn_wait */
	uint64_t up_wait_ns, down_wait_ns;
};
uint32_t rn_flows_count(const void *mem);
/* Take the secrets out of a copy that leaves the session. */
void rn_flows_redact(void *copy, uint64_t size);
/* First entry in use from @i on; rn_flows_count() or more: none. */
uint32_t rn_flows_next(const void *mem, uint64_t size, uint32_t i);
/* 0, -ENOENT if entry @i is free, -EINVAL if there is none. */
int rn_flows_read(const void *mem, uint64_t size, uint32_t i, struct rn_flow_view *out);
/* All entries in use, @max at most: how many. */
uint32_t rn_flows_collect(const void *mem, uint64_t size, struct rn_flow_view *out, uint32_t max);
/* CFFI END */

#endif
