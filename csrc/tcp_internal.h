/* tcp_internal.h - what the files of the TCP bridge share: tcp.c (theory of operation, life of a connection),
 * tcp_open.c (SYN and host connect), tcp_in.c (SYN to the guest), tcp_up.c (guest to host), tcp_down.c (host to guest), tcp_sack.c (selective
 * acknowledgement), tcp_out.c (segments).
 * Nobody else includes it.
 */
#ifndef RN_TCP_INTERNAL_H
#define RN_TCP_INTERNAL_H

#include "egress.h"
#include "rn_peek.h"
#include "rn_promote.h"
#include "rn_tcpseg.h"
#include "tcp_rtt.h"

#include <sys/epoll.h>

#define SEQ_LT(a, b) ((int32_t)((a) - (b)) < 0)
#define SEQ_LE(a, b) ((int32_t)((a) - (b)) <= 0)
#define SEQ_GT(a, b) ((int32_t)((a) - (b)) > 0)
#define SEQ_GE(a, b) ((int32_t)((a) - (b)) >= 0)

#define TCP_WSCALE RN_TCP_WSCALE
#define TCP_SLACK (128u << 10)	 /* bytes of window beyond the host's free space */
#define TCP_SLACK_LOW (16u << 10) /* the same when much is parked already */
#define TCP_PARK_MAX (32u << 20) /* bytes parked, all flows */
#define TCP_NODES 16384u	 /* segments parked, all flows, */
#define TCP_NODES_RESERVE 1024u	 /* of which these are for in-order segments on their way to send() */
#define TCP_FLUSH_IOV 64u	 /* segments a sendmsg() */
#define TCP_PUMP 4u		 /* frames a flow may send before the next one's turn */
#define TCP_RETRIES 12u		 /* about 6 minutes at the maximum; RFC 9293 3.8.3 R2 >= 100 s */
#define TCP_SYN_RETRIES 5u
#define TCP_BACKOFF_MAX 16u /* the timeout is doubled no further */
#define TCP_FAST_BACKOFF_MAX 10u /* nor is the wait before down is lent again */
#define TCP_RTO_SYN_LOST_US 3000000u /* RFC 6298 5.7 */
#define TCP_TIME_WAIT_NS 60000000000ull /* as Linux: some of the guest's timeouts, should our last ACKs be lost */
#define TCP_KEEPALIVE_NS (7200ull * 1000000000ull) /* RFC 9293 3.8.4 */
#define TCP_KEEPALIVE_INTERVAL_NS (75ull * 1000000000ull)
#define TCP_KEEPALIVE_PROBES 9u
#define TCP_DUPACKS 3u /* duplicate ACKs that mean a loss (RFC 5681 3.2) */
#define TCP_CHALLENGES 10u /* of these, at most, to one flow in TCP_CHALLENGE_NS (RFC 5961 7 names both figures) */
#define TCP_CHALLENGE_NS 5000000000ull
#define TCP_SCRATCH 65536u
#define TCP_EVENTS (EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLET)

/* frame layout: payload of a segment without options */
#define TCP_ETH_OFF RN_BUF_ETH_OFF
#define TCP_DATA_OFF (RN_BUF_ETH_OFF + RN_ETH_HLEN + RN_IP4_HLEN + RN_TCP_HLEN)
_Static_assert(TCP_DATA_OFF + 65535u <= RN_BUF_LARGE, "a 64 KiB segment fits");

enum { /* flow_priv.work: what there is to do */
	W_SYNACK = 1u << 0,
	W_UP = 1u << 1,
	W_DOWN = 1u << 2,
	W_ACK = 1u << 3,
	W_RST = 1u << 4,   /* tell the guest, then drop */
	W_FAIL = 1u << 5,  /* connect failed (tcp_flow.error): tell the guest, then drop */
	W_PROBE = 1u << 6, /* window probe or keepalive */
	W_REXMIT = 1u << 7, /* one segment at snd_una again */
	W_SYN = 1u << 8,    /* of a forward: SYN to the guest */
	W_BARRIER = 1u << 9 /* guest_tx waits until the segments before this are dealt with (rn_promote.h) */
};

enum { /* flow_priv.flags */
	F_READABLE = 1u << 0,  /* host socket may have bytes we have not peeked */
	F_HUP = 1u << 1,       /* host side sent FIN (or worse): read on after a short read */
	F_BLOCKED = 1u << 2,   /* send() took less than all: EPOLLOUT will come */
	F_RECOVER = 1u << 3,   /* fast recovery until p->recover is acknowledged */
	F_SLOW = 1u << 4,      /* after a timeout: cwnd counts until p->recover is acknowledged */
	F_FIN_IN = 1u << 5,    /* guest's FIN has sequence number fin_in */
	F_EOF = 1u << 6,       /* host side's end is at sequence number fin_out */
	F_WE_FIRST = 1u << 7,  /* our FIN went out before the guest's came: TIME-WAIT is ours */
	F_TIMED = 1u << 8,     /* rtt_seq/rtt_ns hold a sample under way */
	F_GUEST_WS = 1u << 9,  /* window scale agreed */
	F_PEEK_OFF = 1u << 10, /* SO_PEEK_OFF works on this socket */
	F_SACK = 1u << 11,     /* selective acknowledgement agreed */
	F_URG = 1u << 12,      /* host side sent urgent data: reads stop at its mark, a short one means nothing */
	F_SYN_OUT = 1u << 13,  /* of a forward: the guest may have seen our SYN */
	F_SYN_AGAIN = 1u << 14, /* and one was sent again because an old connection was in the way */
	F_ASKED = 1u << 15,	/* the SYN waits for the guest's MAC address */
	F_SYN_OLD = 1u << 16	/* TIME-WAIT: a SYN with an old number was answered with an ACK */
};

struct eg_parked {
	struct eg_parked *next;
	struct rn_buf *buf;  /* data lies in this frame: only within a turn, or */
	uint8_t *own;	     /* in memory of our own */
	const uint8_t *data;
	uint32_t seq, len;
};

#define TCP_SACK_BLOCKS 4u /* an option of 34 bytes: all that 40 bytes of options hold (RFC 2018 3) */
#define TCP_SACK_RANGES 64u /* kept of the guest's: holes of a window at some per cent of loss */
#define TCP_ROUND_MIN_US 8000u /* two ticks of the wheel: a round of recovery is not taken for lost earlier */
#define TCP_ROUNDS 6u /* rounds without progress, then the retransmission timeout proper */

struct tcp_range {
	uint32_t lo, hi; /* sequence numbers [lo, hi) */
};

struct tcp_flow { /* what only the TCP files need of a flow */
	uint32_t fin_in, fin_out;
	uint32_t cwnd;	  /* bytes; counts only with F_SLOW */
	uint32_t wnd_max; /* largest window the guest offered (RFC 9293 3.8.6.2.1) */
	uint32_t sack_last; /* start of the early segment that came last */
	struct tcp_range dup; /* what came once more and the guest has not been told of; empty: lo == hi */
	uint32_t dup_nxt;   /* up.rcv_nxt that ndup duplicate ACKs told */
	uint32_t edge;	    /* parked data has no hole from up.rcv_nxt to here; tcp_up_edge() */
	uint32_t rxt_nxt;   /* fast recovery: holes before this were sent again */
	struct tcp_range *sacked; /* TCP_SACK_RANGES, made at the first block; above snd_una, sorted, apart */
	uint32_t sack_high; /* highest sequence number the guest said it holds */
	uint32_t round_end; /* fast recovery: snd_max when this round of resending began */
	uint8_t nsacked;
	uint8_t rounds; /* since snd_una moved */
	uint8_t mac_heard[6]; /* source of the last segment here, */
	uint32_t mac_fast;    /* and up.fast then: what guest_tx took later came from the flow's own address */
	uint8_t ndup;	      /* counted up to TCP_DUPACKS */
	uint8_t challenges;   /* sent since challenge_ns */
	uint64_t challenge_ns;
	int32_t error;	  /* errno of a failed connect */
};

struct tcp_state {
	struct tcp_flow *flow;
	struct eg_parked *nodes, *free_nodes;
	uint32_t nfree;	 /* nodes in free_nodes */
	uint64_t parked; /* bytes in memory of our own */
	struct rn_buf *spare; /* large buffer to peek into: most reads fit a small one afterwards */
	uint8_t *scratch;
	struct rn_peek_skip skip; /* for kernels without SO_PEEK_OFF on TCP */
	int peek_off;	    /* 1 use SO_PEEK_OFF, 0 do not */
};

struct seg { /* one segment from the guest, host order */
	uint32_t seq, ack, len; /* len: payload bytes */
	uint32_t wnd;
	uint8_t flags;
	uint16_t mss; /* 0: no option */
	int wscale;   /* -1: no option */
	int sack_ok;
	const uint8_t *data;
};

static inline void set_state(struct rn_flow *f, uint8_t st)
{
	/* relaxed: only the monitor reads it from outside, and any value it sees was true a moment ago */
	atomic_store_explicit(&f->state, st, memory_order_relaxed);
}
static inline uint8_t get_state(struct rn_flow *f)
{
	return atomic_load_explicit(&f->state, memory_order_relaxed);
}
static inline uint32_t rcv_wnd(const struct rn_flow *f)
{
	return f->up.rcv_adv - f->up.rcv_nxt;
}
static inline uint64_t us(uint64_t n)
{
	return n * 1000u;
}

/* tcp.c */
void tcp_set_timer(struct egress *e, uint32_t i);
uint64_t tcp_rto_after(struct egress *e, uint32_t i);
void tcp_gone(struct egress *e, uint32_t i);
void tcp_abort_host(struct egress *e, uint32_t i);
void tcp_host_reset(struct egress *e, uint32_t i);
void tcp_maybe_closed(struct egress *e, uint32_t i);

int tcp_new_ack(struct egress *e, uint32_t i, uint32_t ack);

/* tcp_promote.c */
void tcp_promote(struct egress *e, uint32_t i);	  /* offer what is settled */
void tcp_take_up(struct egress *e, uint32_t i);	  /* the half is ours when this returns */
void tcp_take_down(struct egress *e, uint32_t i); /* likewise; the flow may be on its way out: work has W_RST */
void tcp_blocked(struct egress *e, uint32_t i);	  /* F_BLOCKED was set: EPOLLOUT must come */
/* Down is guest_rx's: is this segment's ACK one to pass on? 1: it was; 0: take down back and read it. */
int tcp_pass_ack(struct egress *e, uint32_t i, const struct seg *sg, uint32_t hlen);

/* tcp_open.c */
void tcp_open(struct egress *e, struct eg_frame *fr, struct seg *sg, const uint8_t guest[16], uint16_t gport,
	      const uint8_t peer[16], uint16_t pport);
void tcp_connect_done(struct egress *e, uint32_t i, int err);
void tcp_parse_options(struct seg *sg, const uint8_t *th, uint32_t hlen);
uint32_t tcp_isn(struct egress *e, const struct rn_flow *f);
uint16_t tcp_clamp_mss(const struct egress *e, uint16_t mss); /* what we send at most; 0: the option was absent */

/* tcp_up.c */
int tcp_park(struct egress *e, uint32_t i, struct eg_frame *fr, uint32_t seq, const uint8_t *data, uint32_t len);
void tcp_park_drop(struct egress *e, uint32_t i);
void tcp_park_rest(struct egress *e, uint32_t i);
int tcp_up_flush(struct egress *e, uint32_t i);
int tcp_update_window(struct egress *e, uint32_t i);
uint32_t tcp_up_edge(struct egress *e, uint32_t i);

/* tcp_down.c */
int tcp_discard(struct egress *e, uint32_t i, uint32_t n);
int tcp_down_pump(struct egress *e, uint32_t i);
int tcp_retransmit(struct egress *e, uint32_t i);

/* tcp_sack.c */
uint32_t tcp_sack_option(struct egress *e, uint32_t i, uint8_t *opt);
uint32_t tcp_sack_input(struct egress *e, uint32_t i, const uint8_t *th, uint32_t hlen);
void tcp_sack_round(struct egress *e, uint32_t i);
uint32_t tcp_sack_hole(struct egress *e, uint32_t i, uint32_t seq, uint32_t *end, int below);

/* tcp_out.c */
void tcp_emit(struct egress *e, struct rn_flow *f, struct rn_buf *b, uint32_t seq, uint32_t ack, uint8_t flags,
	      uint16_t wnd, const uint8_t *opt, uint32_t optlen, uint32_t len, uint32_t mss);
uint16_t tcp_window_field(const struct flow_priv *p, struct rn_flow *f);
void tcp_reply_rst(struct egress *e, const struct eg_frame *fr, const struct seg *sg);
int tcp_send_ack(struct egress *e, uint32_t i, uint32_t seq);
int tcp_send_synack(struct egress *e, uint32_t i);
int tcp_send_failure(struct egress *e, uint32_t i);

/* tcp_in.c */
int tcp_send_syn(struct egress *e, uint32_t i);
void tcp_in_settled(struct egress *e, uint32_t i);
void tcp_in_event(struct egress *e, uint32_t i, uint32_t events);
void tcp_in_timer(struct egress *e, uint32_t i);
void tcp_in_segment(struct egress *e, uint32_t i, struct eg_frame *fr, struct seg *sg);

#endif
