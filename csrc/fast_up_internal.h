/* fast_up_internal.h - what fast_up.c (which flow, ACKs), fast_train.c, fast_turns.c and fast_udp_up.c share. Nobody else includes it. */
#ifndef RN_FAST_UP_INTERNAL_H
#define RN_FAST_UP_INTERNAL_H

#include "fast_up.h"
#include "rn_crowd.h"
#include "rn_promote.h"
#include "rn_tcpseg.h"

#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

#define NONE UINT32_MAX
#define FAST_TRAIN 32u /* frames held at most */

#define SEQ_LT(a, b) ((int32_t)((a) - (b)) < 0)
#define SEQ_GT(a, b) ((int32_t)((a) - (b)) > 0)

struct udp_batch; /* fast_udp_up.c */

struct fast_turn { /* of a flow: fast_turns.c */
	uint32_t rcv_nxt; /* as last seen */
	struct rn_crowd_flow crowd;
	uint32_t left, credit;	       /* bytes of an open turn that are not used: of window, and that are still to be opened */
	uint32_t prev, next, wait_next;
	uint8_t open, waits;
	uint64_t until;
};

struct fast_turns {
	uint32_t open_first, open_last; /* turns, oldest first */
	uint32_t wait_first, wait_last; /* flows that wait for one */
	uint32_t quantum, used_up;	/* bytes of window at a time, and which is too little to count */
	uint32_t open;			/* bytes, of all */
	uint32_t now;			/* the flow whose turn it is just now, or NONE */
	struct rn_crowd crowd;
};

struct fast_flow {
	int fd;		       /* our descriptor of the host socket, -1: not here */
	uint32_t gen;
	uint32_t hash_next;    /* NONE ends */
	uint32_t guest4, peer4; /* as in the packet */
	uint32_t ports;	       /* as in the packet, source first */
	uint8_t proto, scaled;
	uint8_t owed;	       /* in the list of flows with something to tell the guest */
	uint8_t tight;	       /* the host socket once did not take all */
	uint8_t asked;	       /* of an owed one: by a segment with nothing new */
	uint8_t sack;	       /* SACK was agreed */
	uint32_t dup_lo, dup_hi; /* of one that was asked: what came once more (RFC 2883 4.1); empty: equal */
	uint8_t late;	       /* in the list of ACKs that wait for an answer */
	uint8_t in_turn;       /* answers that carried an ACK, running; at most SPEAKS_IN_TURN */
	uint8_t watched;       /* 1: in epoll, 2: and waiting for room */
	uint8_t told_window;   /* of an owed one: the window moved by enough to say so */
	uint32_t owed_next, late_next;
	uint64_t late_due;     /* CLOCK_MONOTONIC ns */
	uint32_t late_seq, late_max; /* rcv_nxt and snd_max when it was put there: what was asked, and sent so far */
	struct sockaddr_in to; /* UDP: where datagrams to the peer go */
	uint8_t again;	       /* of one in the list of late ones: something newer waits */
	uint8_t slow;	       /* UDP: 1: what the host refused is egress's to explain */
	uint8_t df;	       /* UDP: what the socket does about the DF bit; other datagrams are egress's */
	uint32_t misses;       /* early segments in a row */
	uint32_t lacks_next, lacks_gen; /* of one whose socket did not come, while egress is to be told */
	uint8_t lacks;
	uint32_t held;	       /* bytes of its frames that are held */
	uint32_t sndbuf;
	struct fast_turn turn;
};

struct fast_up {
	struct rn_stage *s;
	const struct rn_link *link;
	struct rn_flows *flows;
	uint32_t nflows, n; /* n: flows here */
	struct fast_up_config cfg;
	uint32_t me, egress, rx; /* owner words */
	int way; /* output towards egress: enum rn_role */
	struct fast_flow *flow; /* same index as in the table */
	uint32_t *hash, hash_mask;
	uint64_t key; /* of the hash: the guest chooses ports */
	uint32_t owed, late, late_tail; /* lists; late: oldest first */
	uint32_t lacks;			/* likewise */
	uint32_t barrier; /* flow that asks for one, or NONE */
	uint64_t barrier_until; /* 0: none is out */
	uint16_t ip_id;
	struct fast_frame held[FAST_TRAIN]; /* as they came */
	uint32_t nheld;
	int long_train; /* 1: a flow has as much there as it may */
	struct udp_batch *udp; /* fast_udp_up.c */
	struct fast_turns turns;
	uint8_t reset; /* 1: egress is still to be told that this is a new process */
	alignas(4) uint8_t ack_buf[RN_VNET_HLEN + 4 + RN_ETH_HLEN + RN_IP4_HLEN + RN_TCP_HLEN + RN_SACK_LEN(1)];
};

/* fast_up.c */
void fast_up_owe(struct fast_up *u, uint32_t i); /* flow @i is to be told something at the end of the turn */

/* fast_train.c */
int fast_train_look(const uint8_t *eth, uint32_t len); /* flags and options of a segment that may be taken? */
int fast_train_long(uint32_t len); /* is a frame of @len bytes one to hold? */
void fast_train_hold(struct fast_up *u, uint32_t i, const struct fast_frame *h); /* until fast_up_settle() */
/* Take a segment of a flow that is here, of which none are held. 1: done with it; 0: for egress. */
int fast_train_take(struct fast_up *u, uint32_t i, uint8_t *eth, const struct rn_parsed *p);

/* fast_turns.c */
enum fast_turn_may {
	FAST_TURN_FREE,	 /* no crowd: as far as the host socket has room */
	FAST_TURN_NOW,	 /* to fast_turns.quantum at most, then fast_turns_open() */
	FAST_TURN_LATER, /* not now: enough is open, or its turn comes (fast_turns_next()) */
};
void fast_turns_init(struct fast_up *u);
void fast_turns_start(struct fast_up *u, uint32_t i, uint32_t rcv_nxt); /* flow @i is here, and has sent up to there */
/* How far may the window of flow @i be opened? It is @wnd bytes now, and @rcv_nxt what came in order. */
enum fast_turn_may fast_turns_may(struct fast_up *u, uint32_t i, uint32_t rcv_nxt, uint32_t wnd);
void fast_turns_open(struct fast_up *u, uint32_t i, uint32_t wnd, uint32_t by); /* to @wnd bytes, which are @by more */
void fast_turns_close(struct fast_up *u, uint32_t i);
uint32_t fast_turns_next(struct fast_up *u); /* the flow whose turn it is, NONE: nobody's */
void fast_turns_done(struct fast_up *u); /* with that one */
uint64_t fast_turns_deadline(const struct fast_up *u); /* CLOCK_MONOTONIC ns */

/* fast_udp_up.c */
struct udp_batch *fast_udp_new(void); /* NULL: out of memory; free() ends it */
/* Take a datagram of a flow that is here. 1: done with it; 0: for egress. */
int fast_udp_take(struct fast_up *u, uint32_t i, const uint8_t *eth, const struct rn_parsed *p);
void fast_udp_flush(struct fast_up *u); /* what was gathered goes to the kernel */

#endif
