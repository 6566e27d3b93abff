/* udp.c - UDP: one host socket for each (address, port) of the guest.
 *
 * The mapping is endpoint-independent (RFC 4787 4.1): whatever the guest sends from one port leaves the host from
 * one port, and what any host sends to that port reaches the guest. The socket is unconnected and bound
 * to 0.0.0.0; a destination of the gateway's address goes to the host's loopback and its replies come back
 * under the gateway's address.
 *
 *   up     one frame, one sendmsg(), also of a train of datagrams (rn_uso.h). UDP may drop, so a full socket buffer is a
 *          counted drop.
 *   down   the socket's buffer is the only queue: recvmmsg() is called when the guest's ring has room, up to
 *          16 datagrams at once, straight into frame buffers with room for the headers in front. A datagram
 *          longer than the MTU is fragmented. Where datagrams did not fit a small buffer the last time,
 *          the next burst reads into large ones, and what turns out small is copied over to a small one.
 *   DF     is passed on, both as it is: with it a datagram longer than the path's MTU is not sent, and the guest is told
 *          which MTU that is (RFC 4787 REQ-13); without it the kernel fragments.
 *   errors IP_RECVERR: what the network says about a datagram is read from the error queue and told to the guest
 *          as ICMP about the packet it sent, from the address that complained. An error sendmsg() returns at
 *          once is told by the gateway.
 *
 * A mapping ends 30 s after the last datagram of the guest as long as nobody answered, then after 180 s of
 * silence both ways; earlier, least recently used first, when cfg.udp_max, the flow table or the descriptors run out.
 */
#include "inbound.h"
#include "policy.h"
#include "proxy.h"
#include "rn_csum.h"
#include "rn_errqueue.h"
#include "rn_tcpseg.h"
#include "udp_internal.h"

#include <errno.h>
#include <time.h> /* before errqueue.h, which uses struct timespec */
#include <linux/errqueue.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define UDP_UNANSWERED_NS (30ull * 1000000000ull) /* shorter than RFC 4787 4.3 asks: DNS, scans */
#define UDP_ANSWERED_NS (180ull * 1000000000ull)  /* RFC 4787 4.3: at least 2 minutes */
#define UDP_TTL_PLAIN 64u /* from here on the guest's TTL is not passed on: a common default, no traceroute */
#define UDP_QUOTE_MAX 520u /* payload of an ICMP error's quote: 548 without the IP and UDP headers */


int udp_init(struct egress *e)
{
	e->udp = calloc(1, sizeof(*e->udp));
	if (!e->udp)
		return -ENOMEM;
	e->udp->spill = malloc((size_t)UDP_BURST * UDP_SPILL);
	if (!e->udp->spill) {
		free(e->udp);
		e->udp = NULL;
		return -ENOMEM;
	}
	if (!e->cfg.udp_max)
		e->cfg.udp_max = 1;
	return 0;
}

void udp_fini(struct egress *e)
{
	if (!e->udp)
		return;
	free(e->udp->spill);
	free(e->udp);
	e->udp = NULL;
}

/* --- mappings --- */

static int evict(struct egress *e)
{
	uint32_t oldest = e->udp_lru.head;

	if (oldest == EG_NONE)
		return 0;
	/* What link stages serve does not move in the list, so there it may stand before what is older. What egress serves
	 * stands right, and nothing behind it is older than it. */
	for (uint32_t i = oldest; e->priv[i].fast && (i = e->priv[i].lru_next) != EG_NONE;)
		if (RN_LOOK(eg_flow(e, i)->last_ns) < RN_LOOK(eg_flow(e, oldest)->last_ns))
			oldest = i;
	eg_drop(e, oldest);
	e->s->c[RN_C_udp_evicted]++;
	return 1;
}

static int open_socket(struct egress *e)
{
	static const int on = 1, size = UDP_SOCKBUF, dont = IP_PMTUDISC_DONT;
	const struct sockaddr_in any = { .sin_family = AF_INET };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0 && (errno == EMFILE || errno == ENFILE) && evict(e))
		fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	/* As large as the host's rmem_max and wmem_max allow; the default will do. */
	(void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	if (setsockopt(fd, IPPROTO_IP, IP_RECVERR, &on, sizeof(on)) < 0 ||
	    /* as keep_df() for a datagram without DF */
	    setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &dont, sizeof(dont)) < 0 ||
	    bind(fd, (const struct sockaddr *)&any, sizeof(any)) < 0) {
		int err = -errno;

		close(fd);
		return err;
	}
	return fd;
}

void udp_make_room(struct egress *e, uint32_t fds)
{
	while (e->udp_lru.n >= e->cfg.udp_max)
		evict(e);
	while (e->nfds + fds - 1 + EG_FD_RESERVE >= e->cfg.nfile && evict(e))
		;
	if (eg_full(e))
		evict(e);
}

static uint32_t new_mapping(struct egress *e, const uint8_t guest[16], uint16_t gport, const uint8_t mac[6])
{
	static const uint8_t no_peer[16];
	uint32_t i;
	int fd;

	udp_make_room(e, 1);
	fd = open_socket(e);
	if (fd < 0)
		return EG_NONE;
	i = eg_new(e, RN_IPPROTO_UDP, guest, gport, no_peer, 0, mac);
	if (i == EG_NONE) {
		close(fd);
		return EG_NONE;
	}
	/* Edge-triggered: while the guest's ring is full a level would wake us for nothing. */
	if (eg_watch(e, i, fd, EPOLLIN | EPOLLET) < 0) {
		close(fd);
		eg_drop(e, i);
		return EG_NONE;
	}
	e->priv[i].df = 0;
	e->s->c[RN_C_udp_mappings]++;
	return i;
}

/* The guest's DF is the datagram's. The option is the socket's, but a guest sets DF on all it sends or on nothing. */
static void keep_df(struct egress *e, uint32_t i, const struct eg_frame *f)
{
	struct flow_priv *p = &e->priv[i];
	uint8_t df = !!(rn_get16(f->ip + RN_IP4_FRAG) & RN_IP4_DF);
	int how = df ? IP_PMTUDISC_DO : IP_PMTUDISC_DONT;

	if (RN_UNLIKELY(p->df != df))
		udp_promote_end_up(e, i); /* guest_tx knows the socket as it was */
	if (RN_UNLIKELY(p->df != df) && setsockopt(p->fd, IPPROTO_IP, IP_MTU_DISCOVER, &how, sizeof(how)) == 0)
		p->df = df;
}

void udp_refresh(struct egress *e, uint32_t i, int answer)
{
	struct flow_priv *p = &e->priv[i];

	eg_flow(e, i)->last_ns = e->s->now;
	if (answer)
		p->replied = 1;
	eg_lru_touch(e, i);
	eg_timer(e, i, e->s->now + (p->replied ? UDP_ANSWERED_NS : UDP_UNANSWERED_NS));
}

void udp_timer(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	const struct rn_flow *fl = eg_flow(e, i);
	uint64_t last = RN_LOOK(fl->last_ns);

	if (p->fast) { /* what link stages served is known by the table alone */
		uint64_t end = last + (p->replied || RN_LOOK(fl->down.packets) ? UDP_ANSWERED_NS : UDP_UNANSWERED_NS);

		if (end > e->s->now) {
			eg_timer(e, i, end);
			return;
		}
	}
	eg_drop(e, i);
}

/* --- errors --- */

/* Tell the guest what the error queue says about one of its datagrams; @data is what the error quotes of it. */
static void tell_error(struct egress *e, uint32_t i, const struct rn_sock_error *err, const uint8_t *data, uint8_t type,
		       uint8_t code)
{
	const struct rn_flow *fl = eg_flow(e, i);
	uint8_t ip[RN_IP4_HLEN + RN_UDP_HLEN + UDP_QUOTE_MAX] = { 0x45 };
	uint8_t src[4];
	uint8_t *udp = ip + RN_IP4_HLEN;
	uint32_t len = err->len, rest = 0;

	if (type != RN_ICMP_UNREACH && type != RN_ICMP_TIMEXCEED)
		return;
	if (type == RN_ICMP_UNREACH && code == RN_ICMP_UNREACH_NEEDFRAG)
		rest = err->info & 0xffff; /* next-hop MTU (RFC 1191 4) */
	if (len > UDP_QUOTE_MAX)
		len = UDP_QUOTE_MAX;
	rn_put16(ip + RN_IP4_LEN, (uint16_t)(RN_IP4_HLEN + RN_UDP_HLEN + len));
	ip[RN_IP4_TTL] = 1;
	ip[RN_IP4_PROTO] = RN_IPPROTO_UDP;
	memcpy(ip + RN_IP4_SRC, fl->guest_addr + 12, 4);
	eg_guest_addr(e, err->dst, ip + RN_IP4_DST);
	rn_csum_ip4(ip, RN_IP4_HLEN);
	rn_put16(udp + RN_UDP_SPORT, fl->guest_port);
	memcpy(udp + RN_UDP_DPORT, &err->dst_port, 2);
	rn_put16(udp + RN_UDP_LEN, (uint16_t)(RN_UDP_HLEN + len));
	memcpy(udp + RN_UDP_HLEN, data, len);

	memcpy(src, e->cfg.gateway4, 4);
	if (err->offender_known)
		eg_guest_addr(e, err->offender, src);
	eg_icmp_error(e, fl->guest_mac, src, ip, RN_IP4_HLEN + RN_UDP_HLEN + len, type, code, rest);
}

/* Up to @max entries of the error queue; returns how many there were. @mtu: set to what the kernel says is the path's, if a
 * datagram of ours was longer, which tell_unsent() is for; NULL: none is ours, guest_tx sent it, and nobody else tells. */
static uint32_t read_errors(struct egress *e, uint32_t i, uint32_t max, uint32_t *mtu)
{
	uint8_t data[UDP_QUOTE_MAX];
	struct rn_sock_error err;
	uint32_t n, told = 0;
	int got;

	for (n = 0; n < max && (got = rn_errqueue_next(e->priv[i].fd, &err, data, sizeof(data))); n++) {
		if (got < 0)
			continue;
		if (err.origin == SO_EE_ORIGIN_ICMP) {
			tell_error(e, i, &err, data, err.type, err.code);
		} else if (err.origin == SO_EE_ORIGIN_LOCAL && err.error == EMSGSIZE) {
			if (mtu) {
				*mtu = err.info;
			} else if (!told++) { /* each is tried twice (fast_udp_up.c) */
				rn_put16((uint8_t *)&err.dst_port, e->priv[i].to_port); /* the kernel leaves it out */
				tell_error(e, i, &err, data, RN_ICMP_UNREACH, RN_ICMP_UNREACH_NEEDFRAG);
			}
		}
	}
	return n;
}

/* Tell the guest why its datagram was not sent. @mtu: with EMSGSIZE. */
static void tell_unsent(struct egress *e, const struct eg_frame *f, int err, uint32_t mtu)
{
	uint8_t code;

	switch (err) {
	case ENETUNREACH:
	case ENETDOWN:
		code = RN_ICMP_UNREACH_NET;
		break;
	case EHOSTUNREACH:
	case EHOSTDOWN:
		code = RN_ICMP_UNREACH_HOST;
		break;
	case EACCES:
	case EPERM:
		code = RN_ICMP_UNREACH_ADMIN;
		break;
	case EMSGSIZE:
		code = RN_ICMP_UNREACH_NEEDFRAG;
		break;
	default:
		return;
	}
	eg_icmp_error(e, f->eth + 6, e->cfg.gateway4, f->ip, f->len - (uint32_t)(f->ip - f->eth), RN_ICMP_UNREACH, code,
		      mtu & 0xffff); /* RFC 1191 4 */
}

/* --- guest to host --- */

void udp_input(struct egress *e, struct eg_frame *f)
{
	uint8_t guest[16], peer[16], no_peer[16] = { 0 };
	const uint8_t *gdst = f->ip + RN_IP4_DST;
	uint16_t gport = rn_get16(f->l4 + RN_UDP_SPORT);
	struct sockaddr_in dst = { .sin_family = AF_INET };
	struct msghdr m = { .msg_name = &dst, .msg_namelen = sizeof(dst) };
	union {
		char raw[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct rn_uso what;
	int to_gateway = !memcmp(gdst, e->cfg.gateway4, 4);
	struct rn_flow *fl;
	uint32_t i;
	uint8_t host[4];
	int err;

	if (f->ttl <= 1 && !to_gateway) { /* RFC 1812 5.3.1: we are the router where it ends */
		eg_icmp_error(e, f->eth + 6, e->cfg.gateway4, f->ip, f->len - (uint32_t)(f->ip - f->eth),
			      RN_ICMP_TIMEXCEED, 0, 0);
		return;
	}
	rn_addr_from4(guest, f->ip + RN_IP4_SRC);
	rn_addr_from4(peer, gdst);
	if (e->in->lru.n) { /* to a peer of a forward? */
		i = eg_find(e, RN_IPPROTO_UDP, guest, gport, peer, rn_get16(f->l4 + RN_UDP_DPORT));
		if (i != EG_NONE) {
			udp_in_reply(e, i, f);
			return;
		}
	}
	if (policy_denied_out(e, RN_IPPROTO_UDP, guest, gport, peer, rn_get16(f->l4 + RN_UDP_DPORT))) {
		e->s->c[RN_C_drop_policy_out] += f->ndatagrams - 1; /* one is counted */
		tell_unsent(e, f, EPERM, 0);
		return;
	}
	err = -eg_host_addr(e, gdst, host);
	if (err) {
		e->s->c[RN_C_drop_udp_send] += f->ndatagrams;
		tell_unsent(e, f, err, 0);
		return;
	}
	if (proxy_udp_input(e, f))
		return;
	memcpy(&dst.sin_addr, host, 4);
	memcpy(&dst.sin_port, f->l4 + RN_UDP_DPORT, 2);
	if (!to_gateway && f->ttl < UDP_TTL_PLAIN) {
		struct cmsghdr *c;
		int ttl = f->ttl - 1;

		m.msg_control = &control;
		m.msg_controllen = sizeof(control);
		c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = IPPROTO_IP;
		c->cmsg_type = IP_TTL;
		c->cmsg_len = CMSG_LEN(sizeof(ttl));
		memcpy(CMSG_DATA(c), &ttl, sizeof(ttl));
	}

	i = eg_find(e, RN_IPPROTO_UDP, guest, gport, no_peer, 0);
	if (i == EG_NONE)
		i = new_mapping(e, guest, gport, f->eth + 6);
	if (i == EG_NONE) {
		e->s->c[RN_C_drop_udp_table] += f->ndatagrams;
		return;
	}
	fl = eg_flow(e, i);
	memcpy(fl->guest_mac, f->eth + 6, 6);
	udp_refresh(e, i, 0);

	keep_df(e, i, f);
	rn_uso_send(e->priv[i].fd, &m, f->payload, f->payload_len, f->each, &what);
	if (what.err) {
		uint32_t mtu = 0;

		if (what.err == EMSGSIZE) /* its entries: whoever reads next would take them for guest_tx's */
			read_errors(e, i, UDP_BURST, &mtu);
		tell_unsent(e, f, what.err, mtu);
	}
	if (udp_sent(e, i, f, &what))
		udp_promote(e, i, f, host);
}

uint32_t udp_sent(struct egress *e, uint32_t i, const struct eg_frame *f, const struct rn_uso *what)
{
	struct rn_flow *fl = eg_flow(e, i);

	fl->up.bytes += what->lost ? (uint64_t)what->sent * f->each : f->payload_len; /* the last one may have been shorter */
	fl->up.packets += what->sent;
	e->s->c[RN_C_udp_up] += what->sent;
	e->s->c[RN_C_drop_udp_send] += what->lost;
	return what->sent;
}

/* --- host to guest --- */

void udp_event(struct egress *e, uint32_t i, uint32_t events)
{
	uint32_t bits = UDP_W_READ; /* after an error too: a pending one may have cut a burst short */

	if (proxy_udp_is(e, i)) {
		proxy_udp_event(e, i);
		return;
	}
	if (e->priv[i].fast & FP_DOWN)
		bits = 0; /* guest_rx reads */
	if (events & (EPOLLERR | EPOLLHUP))
		bits |= UDP_W_ERROR;
	if (bits)
		eg_work(e, i, bits);
}

/* Fill the UDP header in front of @len bytes of payload. */
static void put_udp(const struct egress *e, uint32_t i, uint8_t *udp, uint16_t sport, const uint8_t src[4],
		    uint32_t len)
{
	const struct rn_flow *fl = eg_flow((struct egress *)e, i);

	rn_udp_build(udp, sport, fl->guest_port, src, fl->guest_addr + 12, len, 0);
}

void udp_deliver(struct egress *e, uint32_t i, uint32_t k, uint32_t len, const uint8_t src[4], uint16_t sport)
{
	struct udp_state *u = e->udp;
	struct rn_flow *fl = eg_flow(e, i);
	const uint8_t *gaddr = fl->guest_addr + 12;
	struct rn_buf *b = u->buf[k];
	uint8_t *eth = eg_eth(b), *udp = eth + RN_ETH_HLEN + RN_IP4_HLEN;
	uint32_t first = (uint32_t)u->iov[k][0].iov_len;

	if (len <= first && RN_IP4_HLEN + RN_UDP_HLEN + len <= e->cfg.mtu && !eg_backlog(e) &&
	    rn_stage_room(e->s, RN_ROLE_GUEST, 1)) {
		if (b->cls == RN_LARGE && len <= UDP_SMALL_MAX) {
			struct rn_buf *small = rn_buf_alloc(&e->s->pool, RN_SMALL);

			if (small) { /* large ones are few: not for a small datagram */
				memcpy(eg_eth(small) + UDP_HEADERS, eth + UDP_HEADERS, len);
				rn_buf_free(&e->s->pool, b);
				b = small;
				eth = eg_eth(b);
				udp = eth + RN_ETH_HLEN + RN_IP4_HLEN;
			}
		}
		put_udp(e, i, udp, sport, src, len);
		eg_ip4_header(e, eth, fl->guest_mac, src, gaddr, RN_IPPROTO_UDP, RN_UDP_HLEN + len, 0);
		eg_emit(e, b, eth, UDP_HEADERS + len, NULL);
	} else {
		int r;

		if (len > first) { /* the spill area has room for the first part in front of the rest */
			udp = u->spill + (size_t)k * UDP_SPILL;
			memcpy(udp + RN_UDP_HLEN, eth + UDP_HEADERS, first);
		}
		put_udp(e, i, udp, sport, src, len);
		r = eg_send_datagram(e, fl->guest_mac, src, gaddr, RN_IPPROTO_UDP, udp, RN_UDP_HLEN + len, 64);
		rn_buf_free(&e->s->pool, b);
		if (r) {
			e->s->c[RN_C_drop_udp_full]++;
			return;
		}
	}
	fl->down.bytes += len;
	fl->down.packets++;
	e->s->c[RN_C_udp_down]++;
}

uint32_t udp_prepare(struct egress *e, int big, uint32_t max)
{
	struct udp_state *u = e->udp;
	uint32_t n;

	for (n = 0; n < max; n++) {
		struct rn_buf *b = NULL;

		if (big)
			b = rn_buf_alloc(&e->s->pool, RN_LARGE);
		if (!b)
			b = rn_buf_alloc(&e->s->pool, RN_SMALL);
		if (!b)
			break;
		u->buf[n] = b;
		u->iov[n][0].iov_base = eg_eth(b) + UDP_HEADERS;
		if (b->cls == RN_LARGE) {
			u->iov[n][0].iov_len = UDP_PAYLOAD_MAX;
		} else {
			u->iov[n][0].iov_len = UDP_SMALL_MAX;
			u->iov[n][1].iov_base = u->spill + (size_t)n * UDP_SPILL + RN_UDP_HLEN + UDP_SMALL_MAX;
			u->iov[n][1].iov_len = UDP_PAYLOAD_MAX - UDP_SMALL_MAX;
		}
		u->msg[n].msg_hdr = (struct msghdr){
			.msg_name = &u->from[n],
			.msg_namelen = sizeof(u->from[n]),
			.msg_iov = u->iov[n],
			.msg_iovlen = b->cls == RN_LARGE ? 1 : 2,
		};
	}
	return n;
}

int udp_work(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct udp_state *u = e->udp;
	uint32_t n, room, seen_big = 0;
	int got, err;

	if (proxy_udp_is(e, i))
		return proxy_udp_work(e, i);
	if (p->work & UDP_W_ERROR) {
		if (read_errors(e, i, UDP_BURST, NULL) == UDP_BURST)
			return 1;
		p->work &= ~UDP_W_ERROR;
	}
	if (p->fast & FP_DOWN)
		p->work &= ~UDP_W_READ; /* guest_rx reads */
	if (!(p->work & UDP_W_READ))
		return 0;

	room = (uint32_t)rn_stage_room(e->s, RN_ROLE_GUEST, UDP_BURST);
	if (!room || eg_backlog(e))
		return -1;
	n = udp_prepare(e, p->big, room < UDP_BURST ? room : UDP_BURST);
	if (!n) {
		e->s->want_buf = 1;
		return -1;
	}
	got = recvmmsg(p->fd, u->msg, n, MSG_DONTWAIT, NULL);
	err = got < 0 ? errno : 0;
	if (got < 0)
		got = 0;
	for (uint32_t k = (uint32_t)got; k < n; k++)
		rn_buf_free(&e->s->pool, u->buf[k]);
	for (uint32_t k = 0; k < (uint32_t)got; k++) {
		uint32_t len = u->msg[k].msg_len;
		uint8_t host[4], src[4];

		if (len > UDP_SMALL_MAX && RN_IP4_HLEN + RN_UDP_HLEN + len <= e->cfg.mtu)
			seen_big = 1;
		memcpy(host, &u->from[k].sin_addr, 4);
		eg_guest_addr(e, host, src);
		udp_deliver(e, i, k, len, src, ntohs(u->from[k].sin_port));
	}
	if (got) {
		p->big = (uint8_t)seen_big;
		udp_refresh(e, i, 1);
		udp_promote_down(e, i, (uint32_t)got);
	}
	if (err == EAGAIN || (got && (uint32_t)got < n)) {
		p->work &= ~UDP_W_READ; /* empty; the next datagram is a new edge */
		return 0;
	}
	if (err && err != EINTR) /* the error of an earlier datagram; reading it off cleared it */
		p->work |= UDP_W_ERROR;
	return 1;
}
