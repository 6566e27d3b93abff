/* inbound.h - connections and datagrams from outside to the guest: listeners, the guest's MAC addresses.
 *
 * stage_egress.c and the protocols use it; what it is and how it works stands in inbound.c.
 */
#ifndef RN_INBOUND_H
#define RN_INBOUND_H

#include "egress.h"

#include <netinet/in.h>

/* CFFI BEGIN */
struct egress_listener { /* a forward, its socket bound by whoever has the rights */
	int fd;		     /* TCP: listening already */
	uint8_t proto;	     /* IP protocol number: 6 or 17 */
	uint8_t guest4[4];   /* 0.0.0.0: egress_config.guest4, or whoever speaks if that one never did */
	uint16_t guest_port; /* host order, not 0 */
	uint32_t rule;	     /* what the caller calls it, for stage_egress_listener() */
};
/* Serve a listener; the socket is the stage's own from now on if the return is its slot, [0, ...). Else -errno:
 * -EMFILE no room for its flows' descriptors, -EINVAL, -ENOMEM, or of epoll_ctl(). */
int stage_egress_listen(struct rn_stage *s, const struct egress_listener *l);
/* Stop serving: the socket is closed. TCP connections live on unless @close_flows; UDP mappings end, their socket is
 * gone. Returns how many flows ended, or -ENOENT. */
int stage_egress_unlisten(struct rn_stage *s, uint32_t slot, int close_flows);
/* CFFI END */

#define IN_GUESTS 8u		 /* addresses of the guest we remember */
#define IN_ACCEPTS 16u		 /* connections taken a listener and turn */
#define IN_TURN 16u		 /* listeners served a turn */
#define IN_RETRY_NS 100000000ull /* the system had no descriptor or memory for accept(): try again then */
#define IN_ASK_NS 100000000ull	 /* ARP requests for one address: not more often */

union in_sockaddr { /* as a listener's socket has it */
	struct sockaddr any;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
};

struct in_listener {
	int fd;		 /* -1: free slot */
	uint32_t serial; /* of the rule: never used again, never 0 */
	uint32_t next;	 /* ready list, or free list; EG_NONE ends */
	uint32_t nflows; /* UDP mappings */
	uint8_t proto, ready, big;
	uint8_t guest4[4];
	uint16_t guest_port;
	uint32_t rule;
};

struct in_flow { /* per flow-table entry */
	uint32_t serial; /* rule it came by; 0: the guest opened it */
	uint32_t slot;	 /* UDP: listener */
	uint32_t hash_next;
	uint32_t bucket;
	union in_sockaddr peer; /* UDP: as the host knows it, and */
	uint8_t local[16];	/* the address it was sent to: replies leave from there */
};

struct in_guest {
	uint8_t ip[4], mac[6];
	uint8_t used;
};

struct in_ready {
	uint32_t head, tail;
};

struct inbound {
	struct in_listener *l;
	uint32_t nl, n; /* slots; in use */
	uint32_t free_slot;
	uint32_t serial;	   /* last one given */
	struct in_ready ready[2];  /* TCP, UDP: listeners whose sockets may have something, oldest first */
	struct in_flow *flow;
	uint32_t *hash; /* UDP mappings by (rule, peer, local address) */
	uint32_t hash_mask;
	struct eg_lru lru;	/* UDP mappings; head is the oldest */
	uint32_t pending;	/* TCP handshakes with the guest under way */
	uint32_t nasked;	/* of them, those that wait for the guest's MAC address */
	uint64_t retry_at;	/* UINT64_MAX: not now */
	struct in_guest guest[IN_GUESTS];
	uint32_t last, next_guest; /* guest heard last; slot to be reused next */
	uint8_t asked4[4];
	uint64_t asked_ns;
};

#define IN_SLOTS_MAX (1u << 20) /* what a predecessor may have had: no more than descriptors */

/* What a predecessor had (egress_estate.c): so many slots; then each listener, @fd its socket, the stage's own if the return
 * is 0; then inbound_adopted(); then what it knew of each flow that came by one. 0 or -errno. */
int inbound_adopt_slots(struct egress *e, uint32_t slots);
int inbound_adopt(struct egress *e, uint32_t slot, const struct in_listener *was, int fd);
void inbound_adopted(struct egress *e);
int inbound_adopt_flow(struct egress *e, uint32_t i, const struct in_flow *was);
void inbound_forget(struct egress *e); /* all listeners: whoever wants them says so again */

int inbound_init(struct egress *e);
void inbound_fini(struct egress *e);
/* Serve listeners that are ready: 1 did something, 0 nothing to do or no room. */
int inbound_turn(struct egress *e);
void inbound_event(struct egress *e, uint32_t slot);
uint64_t inbound_deadline(const struct egress *e);
/* The entry is being dropped: forget what is kept of it here. */
void inbound_dropped(struct egress *e, uint32_t i);

/* The guest speaks from this address with this MAC. */
void inbound_learn(struct egress *e, const uint8_t ip[4], const uint8_t mac[6]);
/* An ARP frame that classify handed on. */
void inbound_arp(struct egress *e, const uint8_t *eth, uint32_t len);
/* MAC of an address of the guest, or NULL. */
const uint8_t *inbound_mac(struct egress *e, const uint8_t ip[4]);
/* Ask the guest for it by ARP, if that was not done just now; -1: no room. */
int inbound_ask(struct egress *e, const uint8_t ip[4]);

/* Which of the guest's addresses a listener means. */
void inbound_guest(const struct egress *e, const struct in_listener *l, uint8_t ip[4]);
/* A client's address, IPv4 mapped, and its port. 0, or -EAFNOSUPPORT. */
int inbound_client(const union in_sockaddr *from, uint8_t client[16], uint16_t *port);
/* The address the guest is to see for a client. */
void inbound_peer(const struct egress *e, const uint8_t client[16], uint8_t peer[4]);
/* A peer port with which no live flow has this tuple: @want if it can be; 0 if none was found. */
uint16_t inbound_port(struct egress *e, uint8_t proto, const uint8_t guest[16], uint16_t gport, const uint8_t peer[16],
		      uint16_t want);
/* An ICMP error of the guest about a packet of ours. 1: it was. */
int inbound_icmp(struct egress *e, const struct eg_frame *f);

/* tcp_in.c */
void tcp_accepted(struct egress *e, uint32_t slot, int fd, const uint8_t client[16], uint16_t client_port);
/* ICMP error about the SYN with this number. 1: it is ours */
int tcp_in_refused(struct egress *e, uint32_t i, uint32_t seq);
void tcp_in_close(struct egress *e, uint32_t i); /* the rule goes, with its flows */
void tcp_in_mac(struct egress *e, uint32_t i);	 /* the guest's MAC address is known now */

/* udp_in.c */
/* Take a burst of datagrams: 1 there may be more, 0 empty, -1 no room. */
int udp_listen_work(struct egress *e, uint32_t slot);
void udp_in_reply(struct egress *e, uint32_t i, const struct eg_frame *f);
#endif
