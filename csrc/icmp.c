/* icmp.c - ICMP echo: ping and traceroute from the guest.
 *
 * An echo request to the gateway is answered here. Any other goes out through one of two kinds of socket:
 *
 *   ping socket   SOCK_DGRAM, IPPROTO_ICMP: needs no rights where net.ipv4.ping_group_range holds our group. One for
 *                 each (address, identifier) of the guest; the kernel puts its own identifier on the wire and sorts
 *                 the replies, so only the guest's identifier has to be put back.
 *   raw socket    one for all, opened by the supervisor while it had the right to (cfg.raw_icmp_fd). Each
 *                 mapping has a random identifier on the wire; every ICMP message of the host arrives here, and what
 *                 belongs to no mapping is none of our business.
 *
 * Neither: the guest is told "administratively prohibited" and stderr says once how to allow it.
 *
 * The guest's TTL, less one, is passed on, and errors come back with the address of the router that sent them: that is
 * all traceroute -I needs. A mapping ends after 60 s without a request (RFC 5508 REQ-1), or earlier,
 * least recently used first, when there are 64.
 */
#include "inbound.h"
#include "policy.h"
#include "rn_csum.h"
#include "rn_errqueue.h"

#include <errno.h>
#include <fcntl.h>
#include <time.h> /* before errqueue.h, which uses struct timespec */
#include <linux/errqueue.h>
#include <linux/icmp.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define ICMP_MAPPINGS 64u
#define ICMP_TIMEOUT_NS (60ull * 1000000000ull) /* RFC 5508 3.1 REQ-1 */
#define ICMP_BURST 16u
#define ICMP_MAX (65535u - RN_IP4_HLEN) /* message bytes */
#define ICMP_QUOTE_MAX 548u

#define ICMP_W_READ 1u
#define ICMP_W_ERROR 2u

struct icmp_state {
	int no_ping; /* ping sockets are not allowed: do not ask again */
	int warned;
	uint8_t scratch[65536];
};

int icmp_init(struct egress *e)
{
	/* Bit set: type is not delivered. Echo replies and the errors traceroute lives on are. */
	const struct icmp_filter filter = {
		.data = ~(1u << RN_ICMP_ECHO_REPLY | 1u << RN_ICMP_UNREACH | 1u << RN_ICMP_TIMEXCEED),
	};
	static const int size = 1 << 20, dont = IP_PMTUDISC_DONT;
	int fd = e->cfg.raw_icmp_fd, flags, r;

	e->icmp = calloc(1, sizeof(*e->icmp));
	if (!e->icmp)
		return -ENOMEM;
	if (fd < 0)
		return 0;
	flags = fcntl(fd, F_GETFL);
	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ||
	    setsockopt(fd, SOL_RAW, ICMP_FILTER, &filter, sizeof(filter)) < 0 ||
	    setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &dont, sizeof(dont)) < 0) {
		r = -errno;
		icmp_fini(e);
		return r;
	}
	(void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size)); /* the default will do */
	r = rn_stage_watch(e->s, fd, EPOLLIN | EPOLLET, RN_EV(RN_TAG_OTHER, 0));
	if (r < 0)
		icmp_fini(e);
	return r < 0 ? r : 0;
}

void icmp_fini(struct egress *e)
{
	free(e->icmp);
	e->icmp = NULL;
}

static void put_sum(uint8_t *icmp, uint32_t len)
{
	uint16_t sum;

	memset(icmp + 2, 0, 2);
	sum = (uint16_t)~rn_csum_fold(rn_csum_add(0, icmp, len));
	memcpy(icmp + 2, &sum, 2);
}

/* --- mappings --- */

static int has_socket(const struct egress *e)
{
	return !e->icmp->no_ping || e->cfg.raw_icmp_fd >= 0;
}

static int evict(struct egress *e)
{
	if (e->icmp_lru.head == EG_NONE)
		return 0;
	eg_drop(e, e->icmp_lru.head);
	e->s->c[RN_C_icmp_evicted]++;
	return 1;
}

/* Mapping of the shared raw socket with this identifier, or EG_NONE. At most 64: a walk is enough. */
static uint32_t find_ident(const struct egress *e, uint16_t ident)
{
	uint32_t i = e->icmp_lru.tail;

	for (; i != EG_NONE; i = e->priv[i].lru_prev)
		if (e->priv[i].fd < 0 && e->priv[i].ident == ident)
			return i;
	return EG_NONE;
}

/* A ping socket, -EACCES if there can be none, or another negative errno. */
static int open_ping(struct egress *e)
{
	static const int on = 1, dont = IP_PMTUDISC_DONT, size = 1 << 20;
	int fd, err;

	if (e->icmp->no_ping)
		return -EACCES;
	if (!eg_fd_room(e))
		evict(e);
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_ICMP);
	if (fd < 0) {
		err = errno;
		if (err == EACCES || err == EPERM || err == EPROTONOSUPPORT || err == EAFNOSUPPORT) {
			e->icmp->no_ping = 1;
			return -EACCES;
		}
		return -err;
	}
	(void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size)); /* for 64 KiB pings; the default will do */
	(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	if (setsockopt(fd, IPPROTO_IP, IP_RECVERR, &on, sizeof(on)) < 0 ||
	    setsockopt(fd, IPPROTO_IP, IP_RECVTTL, &on, sizeof(on)) < 0 ||
	    setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &dont, sizeof(dont)) < 0) {
		err = -errno;
		close(fd);
		return err;
	}
	return fd;
}

static uint32_t new_mapping(struct egress *e, const uint8_t guest[16], uint16_t ident, const uint8_t mac[6])
{
	static const uint8_t no_peer[16];
	uint32_t i;
	int fd;

	while (e->icmp_lru.n >= ICMP_MAPPINGS)
		evict(e);
	if (eg_full(e))
		evict(e);
	fd = open_ping(e);
	if (fd < 0 && (fd != -EACCES || e->cfg.raw_icmp_fd < 0))
		return EG_NONE;
	i = eg_new(e, RN_IPPROTO_ICMP, guest, ident, no_peer, 0, mac);
	if (i == EG_NONE) {
		if (fd >= 0)
			close(fd);
		return EG_NONE;
	}
	if (fd >= 0) {
		if (eg_watch(e, i, fd, EPOLLIN | EPOLLET) < 0) {
			close(fd);
			eg_drop(e, i);
			return EG_NONE;
		}
	} else {
		uint16_t own;

		do
			own = (uint16_t)eg_random(e);
		while (find_ident(e, own) != EG_NONE);
		e->priv[i].ident = own;
	}
	e->s->c[RN_C_icmp_mappings]++;
	return i;
}

void icmp_timer(struct egress *e, uint32_t i)
{
	eg_drop(e, i);
}

/* --- guest to host --- */

static void complain(struct egress *e, const struct eg_frame *f, uint8_t type, uint8_t code)
{
	eg_icmp_error(e, f->eth + 6, e->cfg.gateway4, f->ip, f->len - (uint32_t)(f->ip - f->eth), type, code, 0);
}

static void answer(struct egress *e, const struct eg_frame *f, uint32_t len)
{
	uint8_t *m = e->icmp->scratch;

	memcpy(m, f->l4, len);
	m[0] = RN_ICMP_ECHO_REPLY;
	put_sum(m, len);
	if (eg_send_datagram(e, f->eth + 6, e->cfg.gateway4, f->ip + RN_IP4_SRC, RN_IPPROTO_ICMP, m, len, 64))
		e->s->c[RN_C_drop_reply_no_room]++;
	else
		e->s->c[RN_C_icmp_echo_local]++;
}

static uint32_t read_errors(struct egress *e, uint32_t i, uint32_t max);

void icmp_input(struct egress *e, struct eg_frame *f)
{
	uint32_t len = f->l4_hlen + f->payload_len, i;
	const uint8_t *gdst = f->ip + RN_IP4_DST;
	uint8_t *m = e->icmp->scratch;
	uint8_t guest[16], peer[16], no_peer[16] = { 0 }, mac[6];
	struct sockaddr_in dst = { .sin_family = AF_INET };
	struct iovec iov = { m, len };
	struct msghdr mh = { .msg_name = &dst, .msg_namelen = sizeof(dst), .msg_iov = &iov, .msg_iovlen = 1 };
	union {
		char raw[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct cmsghdr *c;
	uint16_t ident;
	ssize_t r;
	int fd, ttl = f->ttl - 1;

	if (f->l4[0] != RN_ICMP_ECHO || f->l4[1] || len > ICMP_MAX) {
		if (inbound_icmp(e, f))
			return;
		e->s->c[RN_C_drop_icmp_type]++;
		return;
	}
	if (!memcmp(gdst, e->cfg.gateway4, 4)) {
		answer(e, f, len);
		return;
	}
	if (f->ttl <= 1) { /* RFC 1812 5.3.1 */
		complain(e, f, RN_ICMP_TIMEXCEED, 0);
		return;
	}
	memcpy(mac, f->eth + 6, 6);
	rn_addr_from4(guest, f->ip + RN_IP4_SRC);
	rn_addr_from4(peer, gdst);
	ident = rn_get16(f->l4 + 4);
	if (policy_denied_out(e, RN_IPPROTO_ICMP, guest, ident, peer, 0)) {
		complain(e, f, RN_ICMP_UNREACH, RN_ICMP_UNREACH_ADMIN);
		return;
	}
	i = eg_find(e, RN_IPPROTO_ICMP, guest, ident, no_peer, 0);
	if (i == EG_NONE)
		i = new_mapping(e, guest, ident, mac);
	if (i == EG_NONE && !has_socket(e)) {
		e->s->c[RN_C_drop_icmp_unavailable]++;
		if (!e->icmp->warned)
			fprintf(stderr, "egress: the guest's pings cannot leave: no right to open an ICMP socket. As root: "
					"sysctl -w net.ipv4.ping_group_range=\"0 2147483647\"\n");
		e->icmp->warned = 1;
		complain(e, f, RN_ICMP_UNREACH, RN_ICMP_UNREACH_ADMIN);
		return;
	}
	if (i == EG_NONE) {
		e->s->c[RN_C_drop_icmp_table]++;
		return;
	}
	memcpy(eg_flow(e, i)->guest_mac, mac, 6);
	eg_flow(e, i)->last_ns = e->s->now;
	eg_lru_touch(e, i);
	eg_timer(e, i, e->s->now + ICMP_TIMEOUT_NS);

	memcpy(m, f->l4, len);
	fd = e->priv[i].fd;
	if (fd < 0) {
		fd = e->cfg.raw_icmp_fd;
		rn_put16(m + 4, e->priv[i].ident);
		put_sum(m, len); /* a ping socket does both itself */
	}
	memcpy(&dst.sin_addr, gdst, 4);
	mh.msg_control = &control;
	mh.msg_controllen = sizeof(control);
	c = CMSG_FIRSTHDR(&mh);
	c->cmsg_level = IPPROTO_IP;
	c->cmsg_type = IP_TTL;
	c->cmsg_len = CMSG_LEN(sizeof(ttl));
	memcpy(CMSG_DATA(c), &ttl, sizeof(ttl));

	r = sendmsg(fd, &mh, MSG_DONTWAIT);
	if (r < 0 && errno != EAGAIN && errno != ENOBUFS) {
		if (e->priv[i].fd >= 0)
			read_errors(e, i, ICMP_BURST); /* it may have been an earlier request's */
		r = sendmsg(fd, &mh, MSG_DONTWAIT);
		if (r < 0) {
			int err = errno;

			if (err == ENETUNREACH || err == ENETDOWN)
				complain(e, f, RN_ICMP_UNREACH, RN_ICMP_UNREACH_NET);
			else if (err == EHOSTUNREACH || err == EHOSTDOWN)
				complain(e, f, RN_ICMP_UNREACH, RN_ICMP_UNREACH_HOST);
			else if (err == EACCES || err == EPERM)
				complain(e, f, RN_ICMP_UNREACH, RN_ICMP_UNREACH_ADMIN);
		}
	}
	if (r < 0) {
		e->s->c[RN_C_drop_icmp_send]++;
		return;
	}
	eg_flow(e, i)->up.bytes += len;
	eg_flow(e, i)->up.packets++;
	e->s->c[RN_C_icmp_up]++;
}

/* --- host to guest --- */

void icmp_event(struct egress *e, uint32_t i, uint32_t events)
{
	if (i == EG_NONE)
		e->raw_ready = 1;
	else
		eg_work(e, i, ICMP_W_READ | (events & (EPOLLERR | EPOLLHUP) ? ICMP_W_ERROR : 0));
}

/* Echo reply @m (writable) of @len bytes that belongs to mapping @i. */
static void deliver(struct egress *e, uint32_t i, uint8_t *m, uint32_t len, const uint8_t host[4], uint8_t ttl)
{
	struct rn_flow *fl = eg_flow(e, i);
	uint8_t src[4];

	eg_guest_addr(e, host, src);
	rn_put16(m + 4, fl->guest_port);
	put_sum(m, len);
	if (eg_send_datagram(e, fl->guest_mac, src, fl->guest_addr + 12, RN_IPPROTO_ICMP, m, len, ttl)) {
		e->s->c[RN_C_drop_icmp_full]++;
		return;
	}
	fl->last_ns = e->s->now;
	fl->down.bytes += len;
	fl->down.packets++;
	e->s->c[RN_C_icmp_down]++;
}

/* An error about an echo request of mapping @i to @dst: @m is what was quoted of it, from the ICMP header on. */
static void tell_error(struct egress *e, uint32_t i, const uint8_t dst[4], const uint8_t *m, uint32_t len,
		       const uint8_t *offender, uint8_t type, uint8_t code, uint32_t rest)
{
	const struct rn_flow *fl = eg_flow(e, i);
	uint8_t ip[RN_IP4_HLEN + ICMP_QUOTE_MAX] = { 0x45 };
	uint8_t *q = ip + RN_IP4_HLEN;
	uint8_t src[4];
	uint32_t sum;

	if (len < RN_ICMP_HLEN || (type != RN_ICMP_UNREACH && type != RN_ICMP_TIMEXCEED))
		return;
	if (len > ICMP_QUOTE_MAX - RN_IP4_HLEN)
		len = ICMP_QUOTE_MAX - RN_IP4_HLEN;
	rn_put16(ip + RN_IP4_LEN, (uint16_t)(RN_IP4_HLEN + len));
	ip[RN_IP4_TTL] = 1;
	ip[RN_IP4_PROTO] = RN_IPPROTO_ICMP;
	memcpy(ip + RN_IP4_SRC, fl->guest_addr + 12, 4);
	eg_guest_addr(e, dst, ip + RN_IP4_DST);
	rn_csum_ip4(ip, RN_IP4_HLEN);
	memcpy(q, m, len);
	/* The quote may be cut, so its checksum cannot be computed: change it by the identifiers (RFC 1624 3). */
	sum = (uint16_t)~rn_get16(q + 2) + (uint16_t)~rn_get16(q + 4) + (uint32_t)fl->guest_port;
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	rn_put16(q + 2, (uint16_t)~sum);
	rn_put16(q + 4, fl->guest_port);

	if (offender)
		eg_guest_addr(e, offender, src);
	else
		memcpy(src, e->cfg.gateway4, 4);
	eg_icmp_error(e, fl->guest_mac, src, ip, RN_IP4_HLEN + len, type, code, rest);
}

/* Up to @max entries of a ping socket's error queue; returns how many there were. */
static uint32_t read_errors(struct egress *e, uint32_t i, uint32_t max)
{
	uint8_t data[ICMP_QUOTE_MAX];
	struct rn_sock_error err;
	uint32_t n;
	int got;

	for (n = 0; n < max && (got = rn_errqueue_next(e->priv[i].fd, &err, data, sizeof(data))); n++)
		if (got > 0 && err.origin == SO_EE_ORIGIN_ICMP)
			tell_error(e, i, err.dst, data, err.len, err.offender_known ? err.offender : NULL, err.type, err.code,
				   err.type == RN_ICMP_UNREACH && err.code == RN_ICMP_UNREACH_NEEDFRAG ? err.info & 0xffff : 0);
	return n;
}

/* One message of the shared raw socket: IP header and all. */
static void take_raw(struct egress *e, uint8_t *ip, uint32_t len)
{
	uint32_t hlen, i = EG_NONE;
	uint8_t *m;

	if (len < RN_IP4_HLEN)
		return;
	hlen = (ip[0] & 0x0fu) * 4u;
	if (hlen < RN_IP4_HLEN || len < hlen + RN_ICMP_HLEN)
		return;
	m = ip + hlen;
	len -= hlen;
	if (m[0] == RN_ICMP_ECHO_REPLY) {
		i = find_ident(e, rn_get16(m + 4));
		if (i != EG_NONE)
			deliver(e, i, m, len, ip + RN_IP4_SRC, ip[RN_IP4_TTL]);
	} else {
		const uint8_t *q = m + RN_ICMP_HLEN; /* the packet complained about */
		uint32_t qlen = len - RN_ICMP_HLEN, qh;

		if (qlen < RN_IP4_HLEN + RN_ICMP_HLEN)
			return;
		qh = (q[0] & 0x0fu) * 4u;
		if (qh < RN_IP4_HLEN || qlen < qh + RN_ICMP_HLEN)
			return;
		if (q[RN_IP4_PROTO] == RN_IPPROTO_ICMP && q[qh] == RN_ICMP_ECHO)
			i = find_ident(e, rn_get16(q + qh + 4));
		if (i != EG_NONE)
			tell_error(e, i, q + RN_IP4_DST, q + qh, qlen - qh, ip + RN_IP4_SRC, m[0], m[1],
				   m[0] == RN_ICMP_UNREACH && m[1] == RN_ICMP_UNREACH_NEEDFRAG ? rn_get32(m + 4)
											      : 0);
	}
	if (i == EG_NONE)
		e->s->c[RN_C_icmp_foreign]++;
}

/* One message of mapping @i's ping socket; 1 if there was one, 0 if not, -EINTR and the like as they come. */
static int take_ping(struct egress *e, uint32_t i)
{
	uint8_t *m = e->icmp->scratch;
	struct sockaddr_in from;
	struct iovec iov = { m, sizeof(e->icmp->scratch) };
	union {
		char raw[CMSG_SPACE(sizeof(int)) + 64];
		struct cmsghdr align;
	} control;
	struct msghdr mh = { .msg_name = &from,
			     .msg_namelen = sizeof(from),
			     .msg_iov = &iov,
			     .msg_iovlen = 1,
			     .msg_control = &control,
			     .msg_controllen = sizeof(control) };
	ssize_t len = recvmsg(e->priv[i].fd, &mh, MSG_DONTWAIT);
	uint8_t host[4];
	int ttl = 64;

	if (len < 0)
		return errno == EAGAIN ? 0 : -errno;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&mh); c; c = CMSG_NXTHDR(&mh, c))
		if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TTL && c->cmsg_len >= CMSG_LEN(sizeof(ttl)))
			memcpy(&ttl, CMSG_DATA(c), sizeof(ttl));
	if ((size_t)len < RN_ICMP_HLEN || m[0] != RN_ICMP_ECHO_REPLY)
		return 1;
	memcpy(host, &from.sin_addr, 4);
	deliver(e, i, m, (uint32_t)len, host, (uint8_t)ttl);
	return 1;
}

int icmp_work(struct egress *e, uint32_t i)
{
	struct flow_priv *p;

	if (i == EG_NONE) {
		for (uint32_t n = 0; n < ICMP_BURST; n++) {
			ssize_t len;

			if (eg_backlog(e) || !rn_stage_room(e->s, RN_ROLE_GUEST, 1))
				return -1;
			len = recv(e->cfg.raw_icmp_fd, e->icmp->scratch, sizeof(e->icmp->scratch), MSG_DONTWAIT);
			if (len < 0)
				return errno == EINTR;
			take_raw(e, e->icmp->scratch, (uint32_t)len);
		}
		return 1;
	}
	p = &e->priv[i];
	if (p->fd < 0)
		return 0;
	if (p->work & ICMP_W_ERROR) {
		if (read_errors(e, i, ICMP_BURST) == ICMP_BURST)
			return 1;
		p->work &= ~ICMP_W_ERROR;
	}
	if (!(p->work & ICMP_W_READ))
		return 0;
	for (uint32_t n = 0; n < ICMP_BURST; n++) {
		int r;

		if (eg_backlog(e) || !rn_stage_room(e->s, RN_ROLE_GUEST, 1))
			return -1;
		r = take_ping(e, i);
		if (!r) {
			p->work &= ~ICMP_W_READ;
			return 0;
		}
		if (r < 0 && r != -EINTR) { /* a pending error, now cleared; the error queue has it */
			p->work |= ICMP_W_ERROR;
			return 1;
		}
	}
	return 1;
}
