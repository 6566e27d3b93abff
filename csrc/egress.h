/* egress.h - what the parts of the egress stage share: tcp.c, udp.c, icmp.c, stage_egress.c.
 *
 * egress turns frames into host sockets and back. It owns the flow table's entries, one descriptor an
 * entry at most, one timer an entry, and a queue of entries that have something to do. Everything a
 * protocol file needs from the others is here.
 */
#ifndef RN_EGRESS_H
#define RN_EGRESS_H

#include "rn_estate.h"
#include "rn_fdpass.h"
#include "rn_flow.h"
#include "rn_link.h"
#include "rn_promote.h"
#include "rn_proto.h"
#include "rn_stage.h"

/* CFFI BEGIN */
struct egress_config {
	uint8_t gateway4[4], gateway_mac[6];
	uint8_t guest4[4];	/* the guest's address, for forwards that name none */
	uint32_t prefix;	/* length of the guest subnet's, 0: only the gateway is in it */
	int as_gateway;		/* clients of forwards appear as the gateway, not as themselves */
	uint32_t mtu;		/* bytes of L3 towards the guest, 576..65520 */
	int offload;		/* partial checksums and super-frames: the guest's side, or the link, finishes them */
	int host_loopback;	/* gateway address reaches the host's 127.0.0.1 */
	int peek_offset;	/* 1: SO_PEEK_OFF (Linux >= 6.9); 0: peek past a discard buffer; -1: find out */
	int raw_icmp_fd;	/* raw ICMP socket made before rights were dropped, or -1 */
	uint32_t nfile;		/* descriptors we may have */
	uint32_t udp_max;	/* UDP mappings kept, then the least recently used goes */
	uint32_t pending_max;	/* TCP connects under way, then RST */
	char dns_path[108];	/* abstract Unix address of services' DNS-over-TCP (without the leading NUL), "": none */
	uint64_t seed;		/* 0: real clock; else ISNs and ids are repeatable */
	int heir;		/* 1: stage_egress_inherit() follows, and decides what becomes of a predecessor's flows */
};
struct egress_promote { /* promotion of settled flows to guest_tx and guest_rx (rn_promote.h) */
	int tx_fd, rx_fd;	/* SOCK_SEQPACKET to them: sockets of flows (rn_fdpass.h) */
	uint32_t after;		/* segments with data, both ways, until a flow is settled */
};
int stage_egress_init(struct rn_stage *s, void *flows, uint64_t flows_size, const struct egress_config *cfg);
/* Then, if flows are to be promoted: 0, or -ENOMEM with rn_stage_error() set. @cfg is copied; descriptors stay the caller's. */
int stage_egress_promote(struct rn_stage *s, const struct egress_promote *cfg);
/* Then, if the guest's link may be written to from here (a tap: its writes are whole frames): small frames go there
 * themselves while none is under way by guest_rx. @link is copied; its descriptor stays the caller's. */
int stage_egress_direct(struct rn_stage *s, const struct rn_link *link);
int stage_egress_step(struct rn_stage *s, int timeout_ms, uint64_t now_ns); /* for tests */
uint64_t stage_egress_due(struct rn_stage *s); /* for tests: when the loop would wake for a timer, ns */

/* A stage that leaves its seat in order, and the next one there (egress_estate.c). */
/* Between two runs of the loop: leave all flows and listeners to a successor, in the socket pair @put, @take (rn_estate.h).
 * How many flows, and nothing may follow but rn_stage_fini(), which ends none of them; or -errno with rn_stage_error() set,
 * and nothing has changed. */
int stage_egress_leave(struct rn_stage *s, int put, int take);
/* After everything else was set up, before the loop: take what a predecessor left. How many flows, 0 also if there is
 * nothing; or -errno with rn_stage_error() set: what it left cannot be taken, its connections were reset, and the stage
 * begins with none. */
int stage_egress_inherit(struct rn_stage *s, int take);
/* The @k-th listener that is served, as stage_egress_listen() was told: its slot, or -ENOENT: there are not so many. */
int stage_egress_listener(struct rn_stage *s, uint32_t k, uint32_t *rule);

/* Control, between two runs of the loop. */
/* End flow @i, if it is still of generation @gen: 0, or -ENOENT. A TCP connection is reset on both sides. */
int stage_egress_close_flow(struct rn_stage *s, uint32_t i, uint32_t gen);
struct egress_refusal { /* a flow the guest asked for and did not get */
	uint8_t guest[16], peer[16]; /* peer as the guest calls it */
	uint16_t guest_port, peer_port;
	uint8_t proto;
	int32_t error; /* errno */
	int32_t rule;  /* of the policy that denies it (policy.h), -1: it was not the policy */
	uint32_t lost; /* so many before it are not told: over the rate */
};
void stage_egress_notices(struct rn_stage *s, int on); /* keep refusals, and return RN_RUN_NOTICE for them */
int stage_egress_refusal(struct rn_stage *s, struct egress_refusal *out); /* 1: the oldest one kept; 0: none */
uint64_t stage_egress_siphash(uint64_t key0, uint64_t key1, const void *data, uint64_t len);
/* CFFI END */

#define EG_NONE UINT32_MAX

struct eg_parked; /* tcp.c: guest segments kept; a list */

struct eg_said { /* a notice to guest_tx or guest_rx (promote.c) */
	uint32_t index, gen;
	uint8_t notice, tx;
};

/* Private half of a flow, same index as in the table. */
struct flow_priv {
	int fd; /* host socket or -1 */
	uint32_t hash_next, bucket;
	uint8_t proto; /* our copy of the table's: what the entry is dispatched by */
	uint8_t in_lru;
	uint32_t timer_next, timer_prev; /* wheel list; EG_NONE ends */
	uint64_t deadline;		 /* ns; UINT64_MAX: no timer */
	uint64_t tick;			 /* wheel tick it hangs at, never after @deadline's */
	uint16_t slot;			 /* wheel slot it hangs in */
	uint8_t timed;			 /* 1: in the wheel */
	uint8_t queued;			 /* 1: in the work queue */
	uint32_t events;		 /* of the socket that epoll tells */
	uint32_t work_next, work_prev;
	uint32_t lru_next, lru_prev; /* UDP, ICMP: least recently used order */
	uint32_t work;		     /* protocol's own bits: what there is to do */
	/* TCP */
	struct eg_parked *parked;
	uint32_t nparked;
	uint8_t dupacks, backoff, probes, is_unix;
	uint32_t peeked;	/* our idea of SO_PEEK_OFF */
	uint32_t recover;	/* snd_max when loss was found (RFC 6582) */
	uint32_t rtt_seq;	/* sequence number timed, and when */
	uint64_t rtt_ns;
	uint64_t rto_at, ack_at, life_at; /* ns of each reason for the timer, UINT64_MAX none */
	uint32_t sndbuf; /* bytes the host socket's send buffer holds, as last asked */
	uint32_t flags;
	/* promotion (promote.c) */
	uint8_t fast;	     /* FP_* */
	uint8_t to4[4];	     /* UDP: destination of the last datagrams, as the guest calls it, */
	uint16_t to_port;    /* host order, */
	uint32_t run;	     /* and how many in a row */
	uint32_t got;	     /* UDP: datagrams for the guest that egress read */
	uint8_t fast_backoff; /* times down was taken back without having been of use for long */
	uint64_t fast_at;    /* ns: down is not offered before */
	/* Where the host socket and the halves stood when they were first offered: what repairs a half whose owner was killed */
	uint64_t base_sent, base_read;	/* bytes the kernel took from us, bytes taken out of the socket */
	uint32_t base_rcv, base_una;	/* rcv_nxt, snd_una */
	/* UDP, ICMP */
	uint8_t replied; /* a reply came: the long timeout holds (RFC 4787 4.3) */
	uint8_t big;	 /* UDP: read the next burst into large buffers */
	uint8_t df;	 /* UDP: what the socket sends has DF */
	uint16_t ident;	 /* raw ICMP: identifier on the wire */
};

#define EG_WHEEL 1024u		  /* slots */
#define EG_TICK_NS 4000000ull /* 4 ms: timers are late by at most this */

struct eg_lru {
	uint32_t head, tail, n;
};
struct inbound;	   /* inbound.c: forwards */

struct eg_backlog { /* a datagram for the guest that found no room */
	struct eg_backlog *next;
	uint8_t mac[6], src[4], dst[4];
	uint8_t proto, ttl;
	uint16_t id;
	uint32_t off, len; /* off: bytes of l4 sent so far */
	uint8_t l4[];
};
#define EG_BACKLOG_MAX 32u /* datagrams kept for want of room: one burst of reads and some echo replies */

#define EG_REFUSED 32u	  /* refusals kept until Python takes them; also how many at once, and */
#define EG_REFUSED_RATE 20u /* a second */
#define EG_FD_RESERVE 32u /* descriptors that are not host sockets: rings, doorbells, control, epoll */

struct egress {
	struct rn_stage *s;
	struct egress_config cfg;
	struct rn_flows *flows;
	uint32_t nflows, used;
	struct flow_priv *priv;
	uint32_t free_head; /* chain by hash_next */
	uint32_t fresh;	    /* entries from here on were never used: nothing of theirs is touched, so that idle memory is not there */
	uint32_t *hash;	    /* heads; power of two */
	uint32_t hash_mask;
	uint32_t wheel[EG_WHEEL + 1]; /* the last list: due, their handlers still to be called */
	uint64_t wheel_map[EG_WHEEL / 64]; /* slots that hold something */
	uint64_t wheel_at; /* tick looked at last */
	uint32_t ntimers;
	uint32_t work_head, work_tail; /* FIFO of flows with something to do: round robin */
	uint32_t nfds;		       /* host sockets open */
	uint32_t pending;	       /* TCP connects under way */
	struct eg_lru udp_lru, icmp_lru; /* mappings; head is the oldest */
	struct eg_lru tw_lru; /* TCP in TIME-WAIT: the oldest goes when the table is full */
	struct udp_state *udp;
	struct icmp_state *icmp;
	struct tcp_state *tcp;
	struct proxy_state *px; /* proxy.c; NULL: everything goes directly */
	struct policy_state *policy; /* policy.c; NULL: everything is allowed */
	struct promote *fast; /* promote.c; NULL: flows stay here */
	struct inbound *in;
	struct eg_backlog *backlog, **backlog_end; /* datagrams for the guest that found no room, oldest first */
	uint32_t nbacklog;
	uint64_t tokens_ns, tokens; /* ICMP errors: bucket (RFC 1812 4.3.2.8) */
	struct egress_refusal refused[EG_REFUSED]; /* kept for Python, oldest at refused_at */
	uint32_t refused_at, nrefused, refused_lost;
	uint64_t refused_ns, refused_tokens; /* rate: what a guest does must not keep Python busy */
	uint8_t notices;
	struct rn_link link; /* fd -1: not to be written to from here */
	uint8_t working;     /* 1: in the work queue: no frame of an input ring is being handled */
	uint8_t left;	     /* 1: what lives is the successor's: end nothing of it */
	uint8_t raw_ready;	    /* the shared raw ICMP socket may have something */
	uint16_t ip_id;
	uint64_t rng;
	uint64_t secret[2]; /* our copy of the session key */
};

/* One frame from the guest, checked: every offset lies in the frame. */
struct eg_frame {
	struct rn_buf *buf;
	const uint8_t *eth; /* start of frame */
	uint32_t len;
	const uint8_t *ip; /* IP header */
	uint32_t ip_hlen;
	const uint8_t *l4;
	uint32_t l4_hlen; /* header incl. options */
	const uint8_t *payload;
	uint32_t payload_len;
	uint32_t each;	     /* UDP super-frame (rn_uso.h): payload bytes of each datagram; else 0 */
	uint32_t ndatagrams; /* UDP: how many it is; else 1 */
	uint8_t proto, ttl;
	uint8_t kept; /* handler sets: buffer was kept (parked), do not free it */
};

/* --- stage_egress.c: flow table --- */
/* Index of the flow with this key, or EG_NONE. */
uint32_t eg_find(struct egress *e, uint8_t proto, const uint8_t guest[16], uint16_t gport, const uint8_t peer[16],
		 uint16_t pport);
/* New entry, in the hash, owner words set to this stage, times set; EG_NONE if the table is full (of flows that are not
 * in TIME-WAIT: the oldest of those makes room). */
uint32_t eg_new(struct egress *e, uint8_t proto, const uint8_t guest[16], uint16_t gport, const uint8_t peer[16],
		uint16_t pport, const uint8_t mac[6]);
/* A predecessor's time, CLOCK_MONOTONIC ns or UINT64_MAX (never), after @gap ns in which nobody worked: they are neither the guest's
 * doing nor the network's. 0, or -EPROTO: no flow waits that long. */
int eg_later(const struct egress *e, uint64_t *at, uint64_t gap);
/* Entry @i, free so far, goes on where a predecessor's @was stopped, with descriptor @fd or -1; times are @gap ns later.
 * What hangs on it (parked segments, lists) is still to come. 0, or -errno, of epoll_ctl() or -EPROTO, and
 * nothing was done. */
int eg_adopt(struct egress *e, uint32_t i, const struct flow_priv *was, int fd, uint64_t gap);
/* All were adopted: what is free below @fresh may be used. */
void eg_adopted(struct egress *e, uint32_t fresh);
/* Keep a datagram for the guest, as far as it was not sent. 0 or -ENOMEM. */
int eg_backlog_add(struct egress *e, const struct eg_backlog *head, const uint8_t *l4);
/* Nothing of the table's entries is alive: a predecessor's. */
void eg_clear_table(struct egress *e);
/* Out of hash, wheel, queue, LRU; host socket closed; entry free. Parked segments must be gone. */
void eg_drop(struct egress *e, uint32_t i);
/* No entry is free; one in TIME-WAIT may make room. */
static inline int eg_full(const struct egress *e)
{
	return e->free_head == EG_NONE && e->fresh == e->nflows;
}
static inline struct rn_flow *eg_flow(struct egress *e, uint32_t i)
{
	return &e->flows->flow[i];
}
/* Watch fd of flow @i (EPOLLET as the caller says); 0 or -errno. Events come to the protocol's *_event. */
int eg_watch(struct egress *e, uint32_t i, int fd, uint32_t events);
int eg_rewatch(struct egress *e, uint32_t i, uint32_t events); /* EPOLL_CTL_MOD: re-arms an edge */
void eg_close_fd(struct egress *e, uint32_t i);
/* One timer a flow: fires the protocol's *_timer at or after @at (ns); UINT64_MAX takes it away. */
void eg_timer(struct egress *e, uint32_t i, uint64_t at);
/* Count something that happened to flow @i, and note it in the log (rn_event.h). */
void eg_count(struct egress *e, uint32_t i, uint32_t counter);
/* The same where there is no flow: by the addresses. */
void eg_count_of(struct egress *e, uint32_t counter, uint8_t proto, const uint8_t guest[16], uint16_t gport,
		 const uint8_t peer[16], uint16_t pport);
/* May another host socket be opened? */
static inline int eg_fd_room(const struct egress *e)
{
	return e->nfds + EG_FD_RESERVE < e->cfg.nfile;
}
/* Least-recently-used lists of mappings, and of TCP flows in TIME-WAIT (by proto of the entry): to the young end, added
 * if it is in none. */
void eg_lru_touch(struct egress *e, uint32_t i);
/* Put flow in the work queue (once); the protocol's *_work is called with room in the guest ring. */
void eg_work(struct egress *e, uint32_t i, uint32_t bits);
uint64_t eg_random(struct egress *e);
uint64_t eg_siphash(const struct egress *e, const void *data, size_t len); /* SipHash-2-4, session key */

/* Tell whoever watches that there is no such flow; @error an errno, @rule as in struct egress_refusal. */
void eg_refused_by(struct egress *e, uint8_t proto, const uint8_t guest[16], uint16_t gport, const uint8_t peer[16],
		   uint16_t pport, int error, int32_t rule);
/* The same, where it was not the policy. */
static inline void eg_refused(struct egress *e, uint8_t proto, const uint8_t guest[16], uint16_t gport,
			      const uint8_t peer[16], uint16_t pport, int error)
{
	eg_refused_by(e, proto, guest, gport, peer, pport, error, -1);
}

/* --- promote.c --- */
enum { /* flow_priv.fast */
	FP_TX = 1u << 0,   /* guest_tx has, or is about to have, the socket */
	FP_RX = 1u << 1,   /* guest_rx likewise */
	FP_LENT = 1u << 2, /* up was handed to guest_tx; it may have come back by itself */
	FP_DOWN = 1u << 3  /* down was handed to guest_rx, likewise */
};
const struct egress_promote *promote_config(const struct egress *e); /* NULL: flows stay here */
void promote_fini(struct egress *e);
void promote_begin(struct egress *e); /* tell guest_tx and guest_rx to forget what a predecessor lent them */
void promote_keep(const struct egress *e, struct rn_estate_out *o); /* notices that found no room */
int promote_adopt(struct egress *e, struct rn_estate_in *in); /* 0 or -errno */
/* Hand the flow's socket to guest_tx (@tx) or guest_rx, and offer it. 0, or -errno: not now. */
int promote_offer(struct egress *e, uint32_t i, int tx, const struct rn_pass *p);
/* The flow ends: whoever has its socket closes it. Its halves are egress's already. */
void promote_close(struct egress *e, uint32_t i);
void promote_notice(struct egress *e, uint32_t i, enum rn_flow_notice notice, int tx, uint32_t gen);
/* A stage is a new process: it has no sockets. @tx: guest_tx, else guest_rx. */
void promote_reset(struct egress *e, int tx);
/* A stage has not got the flow's socket, though it was sent. */
void promote_lacks(struct egress *e, uint32_t i, int tx);
int promote_turn(struct egress *e); /* notices that found no room earlier; 1: some went out */

/* --- stage_egress.c: output to the guest --- */
/* The Ethernet header's place in a buffer of eg_out_buf(). */
static inline uint8_t *eg_eth(struct rn_buf *b)
{
	return (uint8_t *)b + RN_BUF_ETH_OFF;
}
/* A buffer of class @cls and room in the ring for one frame, or NULL (want_room / want_buf set). */
struct rn_buf *eg_out_buf(struct egress *e, enum rn_buf_class cls);
/* Fill Ethernet + IPv4 header at @eth for @l4_len bytes behind it: DF if @df, TTL 64. Header checksum done. */
void eg_ip4_header(struct egress *e, uint8_t *eth, const uint8_t mac[6], const uint8_t src[4], const uint8_t dst[4],
		   uint8_t proto, uint32_t l4_len, int df);
/* Send: @eth inside @b, @len bytes of frame; @vnet may be NULL (all zero: checksums are complete). */
void eg_emit(struct egress *e, struct rn_buf *b, uint8_t *eth, uint32_t len, const struct rn_vnet_hdr *vnet);
/* Send an L4 datagram (UDP or ICMP; checksum complete) of any size up to 65515: fragments if it is longer
 * than the MTU (RFC 791 3.2). What finds no room is kept and goes out before anything else does; 0, or -EAGAIN
 * with nothing sent if too much is kept already. While eg_backlog() is not 0 do not read more from the host. */
int eg_send_datagram(struct egress *e, const uint8_t mac[6], const uint8_t src[4], const uint8_t dst[4], uint8_t proto,
		     const uint8_t *l4, uint32_t l4_len, uint8_t ttl);
static inline uint32_t eg_backlog(const struct egress *e)
{
	return e->nbacklog;
}
/* ICMP error about a guest's packet (RFC 792, RFC 1812 4.3.2): quotes the IP header + up to 548 bytes. @src is
 * who says so (gateway or offender). 0, -EAGAIN no room (counted), -EPERM not allowed by RFC 1122 3.2.2,
 * -EBUSY over the rate limit. */
int eg_icmp_error(struct egress *e, const uint8_t mac[6], const uint8_t src[4], const uint8_t *ip, uint32_t ip_len,
		  uint8_t type, uint8_t code, uint32_t rest);
/* Where the guest's destination is on the host side: gateway becomes 127.0.0.1 if allowed; 0 or -EACCES. */
int eg_host_addr(const struct egress *e, const uint8_t guest_dst[4], uint8_t host[4]);
/* The reverse: address the guest knows a host-side sender by. */
void eg_guest_addr(const struct egress *e, const uint8_t host[4], uint8_t guest_src[4]);

/* --- protocols --- */
int tcp_init(struct egress *e);
void tcp_fini(struct egress *e); /* RST or FIN what lives, free parked; of a stage that left, only the latter */
void tcp_end_all(struct egress *e); /* RST to both sides of all that lives */
/* RST to the guest for each connection of the table that is not ours: nobody has its socket any more. */
void tcp_end_strangers(struct egress *e);
/* tcp_estate.c: can TCP flow @i of a predecessor be so? What follows from it is not asked again. */
int tcp_plausible(const struct egress *e, uint32_t i, const struct flow_priv *p, int has_fd);
/* tcp_estate.c: what only the TCP files have of flow @i. */
void tcp_keep(struct egress *e, uint32_t i, struct rn_estate_out *o);
int tcp_adopt(struct egress *e, uint32_t i, struct rn_estate_in *in, uint64_t gap); /* 0 or -errno */
void tcp_input(struct egress *e, struct eg_frame *f);
void tcp_event(struct egress *e, uint32_t i, uint32_t events);
void tcp_take_back(struct egress *e, uint32_t i); /* tcp_promote.c: both halves */
void tcp_notice(struct egress *e, uint32_t i, enum rn_flow_notice n); /* about a TCP flow, its generation checked */
/* Told to: both sides see a reset. 0, or -ENOENT if it is on its way out already. */
int tcp_close_flow(struct egress *e, uint32_t i);
void tcp_timer(struct egress *e, uint32_t i);
/* Do some of what is queued; returns 1 if more is left (it is queued again at the end), 0 if not, -1 if it
 * stopped for room or a buffer (it is queued again at the front). */
int tcp_work(struct egress *e, uint32_t i);

int udp_init(struct egress *e);
void udp_fini(struct egress *e);
void udp_input(struct egress *e, struct eg_frame *f);
void udp_event(struct egress *e, uint32_t i, uint32_t events);
void udp_timer(struct egress *e, uint32_t i);
void udp_notice(struct egress *e, uint32_t i, enum rn_flow_notice n); /* about a mapping, its generation checked */
void udp_policy_changed(struct egress *e); /* peers that were approved of are asked about again */
void udp_unshare(struct egress *e, uint32_t i, int tx); /* guest_tx (@tx) or guest_rx is without its socket */
int udp_work(struct egress *e, uint32_t i);

int icmp_init(struct egress *e);
void icmp_fini(struct egress *e);
void icmp_input(struct egress *e, struct eg_frame *f);
void icmp_event(struct egress *e, uint32_t i, uint32_t events); /* i == EG_NONE: the shared raw socket */
void icmp_timer(struct egress *e, uint32_t i);
int icmp_work(struct egress *e, uint32_t i); /* as icmp_event for i */

#endif
