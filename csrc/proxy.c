/* proxy.c - flows of the guest through a proxy: whose turn it is, TCP by CONNECT, UDP by SOCKS5 ASSOCIATE.
 *
 * Whose turn: a server is chosen by the destination port (with --proxy auto, 80 and 443 may have one each). Then
 * what the user excepted goes directly: by network, or by name where rn_names.h knows the destination's. The
 * gateway's address (the host's loopback, services' DNS) is never for a proxy. ICMP echo always goes directly.
 *
 * TCP. The socket of the flow is connected to the proxy instead, and the state stays RN_FL_CONNECTING until the
 * proxy has said yes (proxy_handshake.c), so the guest's SYN is answered then and no earlier (I4), and a no is told
 * as if the host's connect() had failed. From the yes on the flow is like any other: the bytes behind the proxy's
 * answer are still in the socket. The target is asked for by name if the guest asked for the address by a name that
 * an upstream resolver answered, so that the proxy's own view of the name counts; else, and for names of the
 * session's hosts table, by address. Where two names have one address the last one asked for wins.
 *
 * UDP. One association (RFC 1928 7) for each guest port and server: an entry of the flow table of its own, with no
 * peer address and the server's number + 1 as peer port, which no packet of the guest can have. Its socket is
 * connected to the relay, so the kernel drops what comes from elsewhere; the TCP connection that keeps the
 * association alive is kept here. Datagrams go by address, never by name: replies must carry the address the guest
 * sent to. What comes before the relay is known waits, within bounds. Where the server cannot do it, datagrams are
 * refused with ICMP or sent directly, as cfg says, and the next attempt is made PROXY_RETRY_NS later.
 *
 * A relay is not believed: datagrams that are cut, fragmented (RFC 1928 7 lets us drop those), or say they come
 * from the gateway, from loopback, multicast or no address are dropped; a relay on the host's loopback is refused
 * unless the proxy is there too.
 *
 * Limits: 30 s until the yes; 8 datagrams wait for an association, 4 MiB for all; mappings as udp.c.
 */
#include "proxy_internal.h"
#include "rn_csum.h"
#include "rn_names.h"
#include "udp_internal.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define PROXY_WAIT_FRAMES 8u
#define PROXY_WAIT_BYTES (4u << 20)	       /* all flows */
#define PROXY_RETRY_NS (60ull * 1000000000ull) /* after "no", and */
#define PROXY_RETRY_DOWN_NS (5ull * 1000000000ull) /* after it could not be reached */
#define PROXY_RELAY_HEADER 22u /* RFC 1928 7 with an IPv6 address */
#define PROXY_SCRATCH 65536u
#define PROXY_BURST 16u

static const uint8_t mapped[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };

static int is_v4(const uint8_t addr[16])
{
	return !memcmp(addr, mapped, 12);
}

static int is_loopback(const uint8_t addr[16])
{
	static const uint8_t one[16] = { [15] = 1 };

	return is_v4(addr) ? addr[12] == 127 : !memcmp(addr, one, 16);
}

static socklen_t fill_sockaddr(struct sockaddr_storage *to, const uint8_t addr[16], uint16_t port)
{
	memset(to, 0, sizeof(*to));
	if (is_v4(addr)) {
		struct sockaddr_in *in = (struct sockaddr_in *)to;

		in->sin_family = AF_INET;
		in->sin_port = htons(port);
		memcpy(&in->sin_addr, addr + 12, 4);
		return sizeof(*in);
	}
	struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)to;

	in6->sin6_family = AF_INET6;
	in6->sin6_port = htons(port);
	memcpy(&in6->sin6_addr, addr, 16);
	return sizeof(*in6);
}

/* --- set-up --- */

int stage_egress_proxy(struct rn_stage *s, const struct proxy_config *cfg, const void *names, uint64_t names_size)
{
	struct egress *e = s->priv;
	struct proxy_state *px;
	int r = names ? rn_names_check(names, names_size) : 0;

	if (r)
		return rn_fail(s, r, "table of names: not one of this build");
	if (e->px || !cfg->nservers || cfg->nservers > PROXY_SERVERS)
		return rn_fail(s, -EINVAL, "proxy: %u servers", cfg->nservers);
	px = calloc(1, sizeof(*px));
	if (!px)
		return rn_fail(s, -ENOMEM, "proxy: out of memory");
	e->px = px;
	px->cfg = *cfg;
	px->names = names;
	px->flow = calloc(e->nflows, sizeof(struct proxy_flow *));
	px->net = calloc(PROXY_BYPASS_MAX, sizeof(*px->net));
	px->name = calloc(PROXY_BYPASS_MAX, sizeof(*px->name));
	px->scratch = malloc(PROXY_SCRATCH);
	if (!px->flow || !px->net || !px->name || !px->scratch) {
		proxy_fini(e);
		return rn_fail(s, -ENOMEM, "proxy: out of memory");
	}
	return 0;
}

int stage_egress_bypass_net(struct rn_stage *s, const uint8_t net[16], uint32_t prefix)
{
	struct proxy_state *px = ((struct egress *)s->priv)->px;

	if (!px || prefix > 128)
		return -EINVAL;
	if (px->nnets >= PROXY_BYPASS_MAX)
		return -ENOSPC;
	memcpy(px->net[px->nnets].addr, net, 16);
	px->net[px->nnets++].prefix = (uint8_t)prefix;
	return 0;
}

int stage_egress_bypass_name(struct rn_stage *s, const char *name)
{
	struct proxy_state *px = ((struct egress *)s->priv)->px;

	if (!px || !name[0] || strlen(name) > RN_NAME_MAX + 1u)
		return -EINVAL;
	if (px->nnames >= PROXY_BYPASS_MAX)
		return -ENOSPC;
	px->name[px->nnames] = strdup(name);
	if (!px->name[px->nnames])
		return -ENOMEM;
	px->nnames++;
	return 0;
}

void proxy_fini(struct egress *e)
{
	struct proxy_state *px = e->px;

	if (!px)
		return;
	for (uint32_t i = 0; px->flow && e->left && i < e->fresh; i++)
		proxy_dropped(e, i); /* our copies of what the successor has */
	for (uint32_t k = 0; k < px->nnames; k++)
		free(px->name[k]);
	free(px->name);
	free(px->net);
	free(px->flow);
	free(px->scratch);
	explicit_bzero(&px->cfg, sizeof(px->cfg));
	free(px);
	e->px = NULL;
}

/* --- whose turn --- */

static int in_net(const struct proxy_net *n, const uint8_t addr[16])
{
	uint32_t whole = n->prefix / 8, bits = n->prefix % 8;

	if (memcmp(n->addr, addr, whole))
		return 0;
	return !bits || (uint8_t)((n->addr[whole] ^ addr[whole]) >> (8 - bits)) == 0;
}

static int name_excepted(const struct proxy_state *px, const char *name, size_t len)
{
	for (uint32_t k = 0; k < px->nnames; k++) {
		const char *rule = px->name[k];
		size_t n = strlen(rule);

		if (rule[0] == '.' ? len > n && !memcmp(name + len - n, rule, n) : !strcmp(name, rule))
			return 1;
	}
	return 0;
}

/* The server for a destination, or -1: none. @t is filled for it; t->name only where the proxy shall have it. */
static int choose(struct egress *e, const uint8_t addr[16], uint16_t port, struct proxy_target *t)
{
	const struct proxy_state *px = e->px;
	uint32_t flags = 0, len = 0, k;

	if (is_v4(addr) && !memcmp(addr + 12, e->cfg.gateway4, 4))
		return -1;
	for (k = 0; k < px->cfg.nservers; k++)
		if (!px->cfg.server[k].only_port || px->cfg.server[k].only_port == port)
			break;
	if (k == px->cfg.nservers)
		return -1;
	for (uint32_t n = 0; n < px->nnets; n++)
		if (in_net(&px->net[n], addr))
			return -1;
	memcpy(t->addr, addr, 16);
	t->port = port;
	t->name[0] = 0;
	if (px->names)
		len = rn_names_find(px->names, addr, e->s->now, t->name, &flags);
	if (len && name_excepted(px, t->name, len))
		return -1;
	if (flags & RN_NAME_LOCAL)
		t->name[0] = 0; /* the user said where it is; the proxy would not know */
	return (int)k;
}

static struct proxy_flow *new_flow(struct egress *e, uint32_t i, int server, int udp, const struct proxy_target *t)
{
	struct proxy_state *px = e->px;
	struct proxy_flow *x = calloc(1, sizeof(*x));

	if (!x)
		return NULL;
	x->control = -1;
	x->server = (uint8_t)server;
	x->udp = (uint8_t)udp;
	x->wait_end = &x->wait;
	x->hs = proxy_handshake_new(&px->cfg.server[server], udp, t);
	if (!x->hs) {
		free(x);
		return NULL;
	}
	px->flow[i] = x;
	return x;
}

static void free_waiting(struct proxy_state *px, struct proxy_wait *w)
{
	while (w) {
		struct proxy_wait *next = w->next;

		px->waiting -= w->len;
		free(w);
		w = next;
	}
}

void proxy_dropped(struct egress *e, uint32_t i)
{
	struct proxy_flow *x;

	if (!e->px || !(x = e->px->flow[i]))
		return;
	e->px->flow[i] = NULL;
	proxy_handshake_free(x->hs);
	if (x->control >= 0) {
		close(x->control);
		e->nfds--;
	}
	free_waiting(e->px, x->wait);
	free(x);
}

/* --- TCP --- */

/**
 * proxy_tcp_route() - Is this new flow for a proxy?
 * @e:		Stage
 * @i:		Flow, before its socket is made
 * @to:		Where to connect; written only if the return is 1
 * @len:	Bytes of it
 *
 * Return: 1 yes, 0 no, -errno: it would be, but cannot.
 */
int proxy_tcp_route(struct egress *e, uint32_t i, struct sockaddr_storage *to, socklen_t *len)
{
	const struct rn_flow *f = eg_flow(e, i);
	struct proxy_target t;
	int k;

	if (!e->px)
		return 0;
	k = choose(e, f->peer_addr, f->peer_port, &t);
	if (k < 0)
		return 0;
	if (!new_flow(e, i, k, 0, &t))
		return -ENOMEM;
	*len = fill_sockaddr(to, e->px->cfg.server[k].addr, e->px->cfg.server[k].port);
	e->s->c[RN_C_proxy_tcp]++;
	if (t.name[0])
		e->s->c[RN_C_proxy_by_name]++;
	return 1;
}

int proxy_tcp_pending(const struct egress *e, uint32_t i)
{
	return e->px && e->px->flow[i] && !e->px->flow[i]->udp;
}

int proxy_tcp_step(struct egress *e, uint32_t i, int err)
{
	struct proxy_flow *x = e->px->flow[i];
	int r;

	if (err && !x->up) {
		r = -EHOSTUNREACH; /* whatever it is called: the way to the destination is not there */
	} else {
		struct sockaddr_storage peer;
		socklen_t len = sizeof(peer);

		if (!x->up && getpeername(e->priv[i].fd, (struct sockaddr *)&peer, &len) == 0)
			x->up = 1;
		r = proxy_handshake_step(x->hs, e->priv[i].fd);
		if (r > 0 && !err)
			return 1;
		if (r > 0) /* reset; but what it said before that was read first */
			r = -ECONNRESET;
	}
	if (!r)
		e->s->c[RN_C_proxy_accepted]++;
	else if (x->up && proxy_handshake_said_no(x->hs))
		e->s->c[RN_C_proxy_refused]++;
	else
		e->s->c[RN_C_proxy_failed]++;
	proxy_dropped(e, i);
	return r;
}

void proxy_tcp_late(struct egress *e, uint32_t i)
{
	e->s->c[RN_C_proxy_failed]++;
	proxy_dropped(e, i);
}

/* --- UDP --- */

int proxy_udp_is(const struct egress *e, uint32_t i)
{
	return e->px && e->px->flow[i] && e->px->flow[i]->udp;
}

static void refuse_udp(struct egress *e, const struct eg_frame *f)
{
	e->s->c[RN_C_drop_proxy_udp] += f->ndatagrams;
	eg_icmp_error(e, f->eth + 6, e->cfg.gateway4, f->ip, f->len - (uint32_t)(f->ip - f->eth), RN_ICMP_UNREACH,
		      RN_ICMP_UNREACH_ADMIN, 0);
}

/* Begin an association. EG_NONE: no room, or the proxy cannot be reached at once. */
static uint32_t new_association(struct egress *e, const uint8_t guest[16], uint16_t gport, const uint8_t mac[6], int k)
{
	static const uint8_t no_peer[16];
	const struct proxy_server *s = &e->px->cfg.server[k];
	const struct proxy_target any = { 0 };
	struct sockaddr_storage to;
	struct proxy_flow *x;
	socklen_t len;
	uint32_t i;
	int fd;

	udp_make_room(e, 2);
	i = eg_new(e, RN_IPPROTO_UDP, guest, gport, no_peer, (uint16_t)(k + 1), mac);
	if (i == EG_NONE)
		return EG_NONE;
	x = new_flow(e, i, k, 1, &any);
	if (!x) {
		eg_drop(e, i);
		return EG_NONE;
	}
	len = fill_sockaddr(&to, s->addr, s->port);
	fd = socket(to.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd >= 0) {
		x->control = fd;
		e->nfds++;
	}
	if (fd < 0 || (connect(fd, (struct sockaddr *)&to, len) < 0 && errno != EINPROGRESS) ||
	    rn_stage_watch(e->s, fd, PROXY_CONTROL_EVENTS, RN_EV(RN_TAG_PROXY, i)) < 0) {
		e->px->udp_retry[k] = e->s->now + PROXY_RETRY_DOWN_NS;
		e->s->c[RN_C_proxy_failed]++;
		eg_drop(e, i);
		return EG_NONE;
	}
	e->s->c[RN_C_proxy_udp]++;
	return i;
}

static void keep_waiting(struct egress *e, struct proxy_flow *x, const struct eg_frame *f)
{
	struct proxy_wait *w;

	if (x->nwait >= PROXY_WAIT_FRAMES || e->px->waiting + f->len > PROXY_WAIT_BYTES ||
	    !(w = malloc(sizeof(*w) + f->len))) {
		e->s->c[RN_C_drop_udp_send] += f->ndatagrams;
		return;
	}
	*w = (struct proxy_wait){
		.len = f->len,
		.ip_off = (uint32_t)(f->ip - f->eth),
		.l4_off = (uint32_t)(f->l4 - f->eth),
		.payload_off = (uint32_t)(f->payload - f->eth),
		.payload_len = f->payload_len,
		.each = f->each,
		.ndatagrams = f->ndatagrams,
		.ttl = f->ttl,
	};
	memcpy(w->eth, f->eth, f->len);
	e->px->waiting += w->len;
	x->nwait++;
	*x->wait_end = w;
	x->wait_end = &w->next;
}

/* The frame as it came. */
static struct eg_frame frame_of(const struct proxy_wait *w)
{
	return (struct eg_frame){
		.eth = w->eth,
		.len = w->len,
		.ip = w->eth + w->ip_off,
		.ip_hlen = w->l4_off - w->ip_off,
		.l4 = w->eth + w->l4_off,
		.l4_hlen = w->payload_off - w->l4_off,
		.payload = w->eth + w->payload_off,
		.payload_len = w->payload_len,
		.each = w->each,
		.ndatagrams = w->ndatagrams,
		.proto = RN_IPPROTO_UDP,
		.ttl = w->ttl,
	};
}

/* To the relay (RFC 1928 7). 0, or -1: the relay is gone. */
static int send_up(struct egress *e, uint32_t i, const struct eg_frame *f)
{
	uint8_t head[10] = { 0, 0, 0, 1 }; /* RSV, FRAG 0, IPv4 */
	struct iovec front = { head, sizeof(head) }; /* of each datagram of a train */
	struct msghdr m = { .msg_iov = &front, .msg_iovlen = 1 };
	struct rn_uso what;

	memcpy(head + 4, f->ip + RN_IP4_DST, 4);
	memcpy(head + 8, f->l4 + RN_UDP_DPORT, 2);
	rn_uso_send(e->priv[i].fd, &m, f->payload, f->payload_len, f->each, &what);
	(void)udp_sent(e, i, f, &what);
	return !what.sent && what.err == ECONNREFUSED ? -1 : 0;
}

int proxy_udp_input(struct egress *e, struct eg_frame *f)
{
	struct proxy_state *px = e->px;
	static const uint8_t no_peer[16];
	uint8_t guest[16], peer[16];
	uint16_t gport = rn_get16(f->l4 + RN_UDP_SPORT);
	struct proxy_target t;
	uint32_t i;
	int k;

	if (!px)
		return 0;
	rn_addr_from4(peer, f->ip + RN_IP4_DST);
	k = choose(e, peer, rn_get16(f->l4 + RN_UDP_DPORT), &t);
	if (k < 0)
		return 0;
	rn_addr_from4(guest, f->ip + RN_IP4_SRC);
	if (px->cfg.server[k].kind == PROXY_SOCKS5 && px->udp_retry[k] <= e->s->now) {
		i = eg_find(e, RN_IPPROTO_UDP, guest, gport, no_peer, (uint16_t)(k + 1));
		if (i == EG_NONE)
			i = new_association(e, guest, gport, f->eth + 6, k);
		if (i != EG_NONE) {
			memcpy(eg_flow(e, i)->guest_mac, f->eth + 6, 6);
			udp_refresh(e, i, 0);
			if (!px->flow[i]->up)
				keep_waiting(e, px->flow[i], f);
			else if (send_up(e, i, f))
				eg_drop(e, i);
			return 1;
		}
		if (px->udp_retry[k] <= e->s->now) {
			e->s->c[RN_C_drop_udp_table] += f->ndatagrams;
			return 1;
		}
	}
	if (!px->cfg.udp_block)
		return 0;
	refuse_udp(e, f);
	return 1;
}

void proxy_event(struct egress *e, uint32_t i, uint32_t events)
{
	(void)events; /* a hint that something is there: the socket says what */
	if (i < e->nflows && proxy_udp_is(e, i))
		eg_work(e, i, PXW_CONTROL);
}

void proxy_udp_event(struct egress *e, uint32_t i)
{
	eg_work(e, i, PXW_READ);
}

/* No association: what waited goes the way of UDP without one. */
static void association_failed(struct egress *e, uint32_t i, int said_no)
{
	struct proxy_state *px = e->px;
	struct proxy_flow *x = px->flow[i];
	struct proxy_wait *w = x->wait;

	e->s->c[said_no ? RN_C_proxy_refused : RN_C_proxy_failed]++;
	px->udp_retry[x->server] = e->s->now + (said_no ? PROXY_RETRY_NS : PROXY_RETRY_DOWN_NS);
	x->wait = NULL;
	eg_drop(e, i);
	for (const struct proxy_wait *at = w; at; at = at->next) {
		struct eg_frame f = frame_of(at);

		udp_input(e, &f); /* the server is marked: it cannot come back here */
	}
	free_waiting(px, w);
}

/* The proxy said yes: a socket to its relay. 0 or -errno. */
static int open_relay(struct egress *e, uint32_t i)
{
	static const int size = UDP_SOCKBUF;
	struct proxy_flow *x = e->px->flow[i];
	const struct proxy_server *s = &e->px->cfg.server[x->server];
	static const uint8_t any4[16] = { [10] = 0xff, [11] = 0xff }, any6[16];
	struct sockaddr_storage to;
	socklen_t len;
	uint8_t addr[16];
	uint16_t port;
	int r = proxy_handshake_bound(x->hs, addr, &port), fd;

	if (r)
		return r;
	/* Zeros: where the proxy itself is. RFC 1928 does not say so, but servers do. */
	if (!memcmp(addr, any4, 16) || !memcmp(addr, any6, 16))
		memcpy(addr, s->addr, 16);
	if (!port || (is_loopback(addr) && !is_loopback(s->addr)))
		return -EPROTO;
	len = fill_sockaddr(&to, addr, port);
	fd = socket(to.ss_family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	(void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	if (connect(fd, (struct sockaddr *)&to, len) < 0)
		r = -errno;
	else
		r = eg_watch(e, i, fd, EPOLLIN | EPOLLET);
	if (r < 0)
		close(fd);
	return r;
}

/* 0, or -1: the entry is gone. */
static int control_work(struct egress *e, uint32_t i)
{
	struct proxy_flow *x = e->px->flow[i];
	struct proxy_wait *w;
	int r, gone = 0;

	if (x->up) { /* it only has to stay: its end is the association's (RFC 1928 7) */
		uint8_t junk[512];
		ssize_t n = recv(x->control, junk, sizeof(junk), MSG_DONTWAIT);

		if (n > 0) {
			eg_work(e, i, PXW_CONTROL); /* it should not; there may be more, or the end behind it */
			return 0;
		}
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			return 0;
		eg_drop(e, i);
		return -1;
	}
	r = proxy_handshake_step(x->hs, x->control);
	if (r > 0)
		return 0;
	if (!r)
		r = open_relay(e, i);
	if (r) {
		association_failed(e, i, proxy_handshake_said_no(x->hs));
		return -1;
	}
	e->s->c[RN_C_proxy_accepted]++;
	x->up = 1;
	proxy_handshake_free(x->hs);
	x->hs = NULL;
	w = x->wait;
	x->wait = NULL;
	x->wait_end = &x->wait;
	for (const struct proxy_wait *at = w; at && !gone; at = at->next) {
		struct eg_frame f = frame_of(at);

		gone = send_up(e, i, &f);
	}
	free_waiting(e->px, w);
	if (gone) {
		eg_drop(e, i);
		return -1;
	}
	return 0;
}

/* A datagram of the relay, @len bytes at scratch, to the guest. */
static void deliver(struct egress *e, uint32_t i, uint32_t len)
{
	uint8_t *d = e->px->scratch, *udp;
	struct rn_flow *fl = eg_flow(e, i);
	uint32_t n = len - 10; /* payload */
	uint8_t src[4];
	uint16_t sum;

	/* FRAG 0, and an IPv4 address: that is all the guest sent to. */
	if (len < 10 || d[2] || d[3] != 1 || d[4] == 0 || d[4] == 127 || d[4] >= 224 ||
	    !memcmp(d + 4, e->cfg.gateway4, 4) || !(d[8] | d[9]) || n > UDP_PAYLOAD_MAX) {
		e->s->c[RN_C_drop_proxy_reply]++;
		return;
	}
	memcpy(src, d + 4, 4);
	udp = d + 2; /* the UDP header takes the place of the relay's, right in front of the payload */
	memmove(udp + RN_UDP_SPORT, d + 8, 2);
	rn_put16(udp + RN_UDP_DPORT, fl->guest_port);
	rn_put16(udp + RN_UDP_LEN, (uint16_t)(RN_UDP_HLEN + n));
	memset(udp + RN_UDP_SUM, 0, 2);
	sum = (uint16_t)~rn_csum_fold(rn_csum_add(
		rn_csum_pseudo4(src, fl->guest_addr + 12, RN_IPPROTO_UDP, RN_UDP_HLEN + n), udp, RN_UDP_HLEN + n));
	if (!sum)
		sum = 0xffff; /* RFC 768: zero means none */
	memcpy(udp + RN_UDP_SUM, &sum, 2);
	if (eg_send_datagram(e, fl->guest_mac, src, fl->guest_addr + 12, RN_IPPROTO_UDP, udp, RN_UDP_HLEN + n, 64)) {
		e->s->c[RN_C_drop_udp_full]++;
		return;
	}
	fl->down.bytes += n;
	fl->down.packets++;
	e->s->c[RN_C_udp_down]++;
	udp_refresh(e, i, 1);
}

int proxy_udp_work(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	if (p->work & PXW_CONTROL) {
		p->work &= ~PXW_CONTROL;
		if (control_work(e, i))
			return 0;
	}
	if (!(p->work & PXW_READ) || p->fd < 0)
		return (p->work & PXW_CONTROL) != 0;
	for (uint32_t k = 0; k < PROXY_BURST; k++) {
		ssize_t n;

		if (eg_backlog(e) || !rn_stage_room(e->s, RN_ROLE_GUEST, 1))
			return -1;
		n = recv(p->fd, e->px->scratch, PROXY_SCRATCH, MSG_DONTWAIT);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN) {
			p->work &= ~PXW_READ;
			return p->work != 0;
		}
		if (n < 0) {
			eg_drop(e, i); /* the relay is gone; the next datagram of the guest begins anew */
			return 0;
		}
		deliver(e, i, (uint32_t)n);
	}
	return 1;
}
