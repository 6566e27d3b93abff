/* fuzz_egress.c - a hostile guest against the egress stage: TCP by state, with real host sockets behind it.
 *
 * The stage is the real one, with its arena, rings and flow table in private memory. The target plays classify (puts
 * frames on the ring), guest_rx (takes frames off, or leaves the ring full), the clock, and the host side: four
 * listeners, three on loopback and one abstract Unix socket (the way to services' DNS), whose accepted sockets it reads,
 * writes, shuts, closes and resets. An input is a list of operations, each a few bytes; it ends where the bytes end.
 *
 * What must hold, whatever the guest does:
 *   up     Each byte the guest sends is a function of its sequence number, so the byte at any place of the stream is known
 *          whatever segments overlap. The host side reads just these, only those that were sent, and its end of file only
 *          where a FIN of the guest's stood. It sees a reset only after something that may cause one.
 *   down   The guest sees just the bytes the host side wrote, inside a window it once offered, and the FIN behind the last.
 *   ACK    Never of a byte that was not sent, or not taken by the host socket; the window's edge never moves back.
 *   frames Checksums and lengths are right. A guest's bytes are read within the frame only: what lies behind it in its
 *          buffer, and buffers that were given back, are poisoned for AddressSanitizer.
 *   end    A connection whose guest did nothing wrong delivers everything once guest and host behave. After the stage's
 *          fini every buffer is back, every flow is free, no descriptor is left open.
 *
 * Drivers: fuzz_main.c, or libFuzzer. With -DPLANT the target lets the stage acknowledge one byte too many: the test of
 * the oracle itself.
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "egress.h"
#define FUZZ_NAME "egress"
#include "fuzz_input.h"
#include "fuzz_main.h"
#include "policy.h"
#include "rn_csum.h"
#include "rn_uso.h"

#if defined(__SANITIZE_ADDRESS__) || defined(LIBFUZZER)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

#define SLOTS 4u	     /* connections at once; the last one is the Unix socket's */
#define UNIX_SLOT (SLOTS - 1)
#define STREAM (192u << 10)  /* bytes a guest may send on one connection */
#define DOWN_MAX (256u << 10) /* and a host */
#define FINS 16u
#define MTU 1500u
#define ROW_CLASSIFY 0u
#define ROW_EGRESS 1u
#define ROW_RX 2u
#define SMALLS 96u
#define LARGES 6u
#define START_NS 1000000000000ull
#define GPORT 5000u

struct conn { /* one guest connection and its host socket */
	int live;	  /* the host side accepted it */
	int fd;		  /* accepted socket, -1: closed by the host side */
	int synack;	  /* guest saw the SYN-ACK */
	int gone;	  /* guest saw a RST that counts, or sent one */
	int may_reset;	  /* something happened that may reset the host side */
	int odd;	  /* the guest did what a correct one does not: no promise of delivery */
	uint32_t isn, irs;
	uint32_t snd_nxt; /* behind the highest byte sent */
	uint32_t rcv_nxt;
	uint32_t acked;	  /* highest acknowledgement seen */
	uint32_t edge;	  /* right edge of the window egress offered */
	int have_edge;
	uint32_t offered; /* right edge of the window the guest offered, its highest */
	uint8_t shift, our_shift; /* window scale: egress's, guest's */
	uint8_t fin_rcvd;
	uint8_t sent[STREAM / 8];
	uint32_t contig;  /* bytes from the start that were all sent */
	uint32_t fin[FINS];
	uint32_t nfin;	  /* > FINS: too many to remember */
	uint32_t fin_at;  /* the correct guest's own FIN */
	int fin_sent;
	uint32_t host_wrote, host_read;
	int host_eof, host_reset, host_shut;
};

static struct target {
	struct rn_stage *s;
	void *session, *arena, *flows, *in, *out;
	uint64_t sizes[5];
	struct rn_pool classify, rx;
	struct rn_ring_tx tx;
	struct rn_ring_rx from;
	int bells[3], listener[SLOTS], udp;
	uint16_t port[SLOTS], udp_port;
	uint64_t now;
	int stuck; /* guest_rx takes nothing */
	int trace; /* FUZZ_TRACE is set: say what goes on */
	struct conn c[SLOTS];
	uint64_t inputs, frames, conns, up, down, resets, whole, udps;
} t;

static const uint8_t gateway[4] = { 10, 0, 2, 1 }, guest[4] = { 10, 0, 2, 2 };
static const uint8_t gateway_mac[6] = { 2, 0xab, 0xcd, 0, 0, 1 }, guest_mac[6] = { 0x52, 0x54, 0xab, 0, 0, 2 };

/* abort() is what libFuzzer and the test look for. */
#define say(...)                                      \
	do {                                          \
		if (t.trace)                          \
			fprintf(stderr, __VA_ARGS__); \
	} while (0)

static int seq_lt(uint32_t a, uint32_t b)
{
	return (int32_t)(a - b) < 0;
}

static uint8_t up_byte(uint32_t slot, uint32_t seq)
{
	return (uint8_t)((seq * 2654435761u >> 21) ^ slot * 77u);
}

static uint8_t down_byte(uint32_t slot, uint32_t off)
{
	return (uint8_t)((off * 2246822519u >> 19) ^ slot * 31u);
}

/* --- set-up --- */

static int listen_on(uint32_t slot)
{
	int fd, small = 4096;

	if (slot == UNIX_SLOT) {
		struct sockaddr_un un = { .sun_family = AF_UNIX };
		int n = snprintf(un.sun_path + 1, sizeof(un.sun_path) - 1, "rn-fuzz-%d", (int)getpid());

		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
		must(fd >= 0 && !bind(fd, (struct sockaddr *)&un, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n)),
		     "abstract socket");
		t.port[slot] = RN_PORT_DNS;
	} else {
		struct sockaddr_in sin = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
		socklen_t l = sizeof(sin);

		fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
		must(fd >= 0 && !bind(fd, (struct sockaddr *)&sin, sizeof(sin)) && !getsockname(fd, (struct sockaddr *)&sin, &l),
		     "loopback socket");
		if (slot == 1) /* one whose receive buffer is soon full; inherited by what it accepts */
			(void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
		t.port[slot] = ntohs(sin.sin_port);
	}
	must(!listen(fd, 16), "listen");
	return fd;
}

static void open_udp(void)
{
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t l = sizeof(sin);

	t.udp = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	must(t.udp >= 0 && !bind(t.udp, (struct sockaddr *)&sin, sizeof(sin)) &&
		     !getsockname(t.udp, (struct sockaddr *)&sin, &l), "UDP socket");
	t.udp_port = ntohs(sin.sin_port);
}

static void begin(int discard, int offload)
{
	static const struct rn_part_spec spec[3] = { { SMALLS, LARGES }, { SMALLS, LARGES }, { 0, 0 } };
	struct egress_config cfg = {
		.mtu = MTU,
		.offload = offload,
		.host_loopback = 1,
		.peek_offset = discard ? 0 : -1,
		.raw_icmp_fd = -1,
		.nfile = 64,
		.udp_max = 4,
		.pending_max = 6,
		.seed = 1,
	};
	static const struct policy_rule policy[] = { /* low ports, where no server of ours is, are denied */
		{ .net = { [10] = 0xff, 0xff, 192, 0, 2, 1 }, .prefix = 128, .port_max = 65535, .ways = POLICY_OUT | POLICY_IN,
		  .protos = POLICY_TCP | POLICY_UDP, .name = 0 },
		{ .port_min = 1, .port_max = 1023, .ways = POLICY_OUT, .protos = POLICY_TCP | POLICY_UDP, .deny = 1,
		  .name = 1 },
	};
	struct rn_stage *s;

	memcpy(cfg.gateway4, gateway, 4);
	memcpy(cfg.gateway_mac, gateway_mac, 6);
	snprintf(cfg.dns_path, sizeof(cfg.dns_path), "rn-fuzz-%d", (int)getpid());
	t.sizes[0] = rn_session_size();
	t.session = memory(t.sizes[0]);
	must(!rn_session_create(t.session, t.sizes[0], 3), "session");
	t.sizes[1] = rn_arena_size(spec, 3);
	t.arena = memory(t.sizes[1]);
	must(!rn_arena_create(t.arena, t.sizes[1], spec, 3), "arena");
	t.sizes[2] = rn_flows_size(12);
	t.flows = memory(t.sizes[2]);
	must(!rn_flows_create(t.flows, t.sizes[2], 12, 1, 2), "flows");
	t.sizes[3] = rn_ring_size(64);
	t.in = memory(t.sizes[3]);
	must(!rn_ring_create(t.in, t.sizes[3], 64), "ring in");
	t.sizes[4] = rn_ring_size(32);
	t.out = memory(t.sizes[4]);
	must(!rn_ring_create(t.out, t.sizes[4], 32), "ring out");
	for (uint32_t i = 0; i < 3; i++)
		must((t.bells[i] = rn_bell_new()) >= 0, "doorbell");
	must(!rn_pool_attach(&t.classify, t.arena, t.sizes[1], ROW_CLASSIFY, ROW_CLASSIFY, 0), "classify's pool");
	must(!rn_pool_attach(&t.rx, t.arena, t.sizes[1], -1, ROW_RX, 0), "guest_rx's pool");
	must(!rn_ring_tx_attach(&t.tx, t.in, t.sizes[3], t.bells[ROW_EGRESS]), "producer");
	must(!rn_ring_rx_attach(&t.from, t.out, t.sizes[4], t.bells[ROW_EGRESS]), "consumer");

	t.s = s = rn_stage_new(ROW_EGRESS, 1);
	must(s && !rn_stage_set_session(s, t.session, t.sizes[0]) && !rn_stage_set_arena(s, t.arena, t.sizes[1], 1), "grants");
	for (uint32_t i = 0; i < 3; i++)
		must(!rn_stage_set_bell(s, i, t.bells[i]), "bells");
	must(!rn_stage_add_input(s, t.in, t.sizes[3], ROW_CLASSIFY), "input");
	must(!rn_stage_add_output(s, RN_ROLE_GUEST, t.out, t.sizes[4], ROW_RX), "output");
	must(!stage_egress_init(s, t.flows, t.sizes[2], &cfg), "init");
	must(!stage_egress_policy(s, policy, sizeof(policy) / sizeof(policy[0])), "policy");
	t.now = START_NS;
	t.stuck = 0;
	for (uint32_t i = 0; i < SLOTS; i++) {
		memset(&t.c[i], 0, sizeof(t.c[i]));
		t.c[i].fd = -1;
	}
}

/* Bytes of the guest's that nobody may read any more: free buffers of classify's part. */
static void poison_free(void)
{
	const struct rn_part_view *v = &t.classify.view[ROW_CLASSIFY];

	for (uint32_t i = 0; i < SMALLS + LARGES; i++) {
		uint64_t off = i < SMALLS ? v->small_off + (uint64_t)i * RN_BUF_SMALL :
					    v->large_off + (uint64_t)(i - SMALLS) * RN_BUF_LARGE;
		struct rn_buf *b = (struct rn_buf *)(t.classify.base + off);
		uint32_t h = atomic_load(&b->holder);

		if (!h || h == RN_HOLDER_RETURNED)
			ASAN_POISON_MEMORY_REGION((uint8_t *)b + RN_BUF_HLEN, (i < SMALLS ? RN_BUF_SMALL : RN_BUF_LARGE) - RN_BUF_HLEN);
	}
}

static void accept_all(void);
static void host_close(struct conn *c, int abortive);
static void take(void);

static int step(void)
{
	int r;

	t.now += 10000; /* 10 us a turn */
	r = stage_egress_step(t.s, 0, t.now);
	must(r >= 0, "the stage goes on");
	poison_free();
	accept_all();
	if (!t.stuck)
		take();
	return r;
}

static void settle(void)
{
	for (uint32_t n = 0; step(); n++)
		must(n < 20000, "it comes to rest");
}

/* --- guest to egress --- */

/* A frame of @len bytes with this meta; nothing if classify has no buffer or room. */
static int put(const uint8_t *frame, uint32_t len, const struct rn_meta *meta)
{
	enum rn_buf_class cls = len <= RN_SMALL_FRAME_MAX ? RN_SMALL : RN_LARGE;
	uint32_t cap = cls == RN_SMALL ? RN_BUF_SMALL : RN_BUF_LARGE;
	struct rn_desc d = { .len = len };
	struct rn_buf *b;

	if (rn_ring_room(&t.tx, 1) < 1 || !(b = rn_buf_alloc(&t.classify, cls)))
		return 0;
	ASAN_UNPOISON_MEMORY_REGION(b, cap);
	memset((uint8_t *)b + RN_BUF_ETH_OFF - RN_VNET_HLEN, 0, RN_VNET_HLEN);
	memcpy((uint8_t *)b + RN_BUF_ETH_OFF, frame, len);
	b->meta = *meta;
	ASAN_POISON_MEMORY_REGION((uint8_t *)b + RN_BUF_ETH_OFF + len, cap - RN_BUF_ETH_OFF - len);
	d.off = rn_buf_off(&t.classify, (uint8_t *)b + RN_BUF_ETH_OFF);
	d.gen = (uint16_t)b->gen;
	atomic_store(&b->holder, ROW_EGRESS + 1);
	rn_ring_put(&t.tx, &d);
	rn_ring_publish(&t.tx);
	t.frames++;
	return 1;
}

static uint32_t headers(uint8_t *f, uint8_t proto, uint32_t l4)
{
	memcpy(f, gateway_mac, 6);
	memcpy(f + 6, guest_mac, 6);
	rn_put16(f + 12, RN_ETHERTYPE_IPV4);
	memset(f + 14, 0, 20);
	f[14] = 0x45;
	rn_put16(f + 14 + RN_IP4_LEN, (uint16_t)(20 + l4));
	f[14 + RN_IP4_TTL] = 64;
	f[14 + RN_IP4_PROTO] = proto;
	memcpy(f + 14 + RN_IP4_SRC, guest, 4);
	memcpy(f + 14 + RN_IP4_DST, gateway, 4);
	rn_csum_ip4(f + 14, 20);
	return 34;
}

static int32_t where(const struct conn *c, uint32_t seq)
{
	return (int32_t)(seq - (c->isn + 1));
}

/* Send one segment; the payload is what the sequence numbers say. Notes what it offers and what it claims. */
static void segment(uint32_t slot, uint8_t flags, uint32_t seq, uint32_t ack, uint16_t wnd, uint32_t len, const uint8_t *opt,
		    uint32_t optlen)
{
	struct conn *c = &t.c[slot];
	static uint8_t f[70000];
	uint32_t at = headers(f, RN_IPPROTO_TCP, 20 + optlen + len);
	struct rn_meta m = { .ip_version = 4, .ip_proto = RN_IPPROTO_TCP, .ttl = 64, .l3_off = 14, .l4_off = 34,
			     .payload_off = 54 + optlen, .payload_len = len };
	uint8_t *th = f + at;
	int32_t off = where(c, seq);

	memset(th, 0, 20);
	rn_put16(th + RN_TCP_SPORT, (uint16_t)(GPORT + slot));
	rn_put16(th + RN_TCP_DPORT, t.port[slot]);
	rn_put32(th + RN_TCP_SEQ, seq);
	rn_put32(th + RN_TCP_ACK, ack);
	th[RN_TCP_OFF] = (uint8_t)((20 + optlen) / 4 << 4);
	th[RN_TCP_FLAGS] = flags;
	rn_put16(th + RN_TCP_WND, wnd);
	if (optlen)
		memcpy(th + 20, opt, optlen);
	for (uint32_t k = 0; k < len; k++)
		th[20 + optlen + k] = up_byte(slot, seq + k);
	if (!put(f, 54 + optlen + len, &m))
		return;
	say("%u > flags %02x seq %d ack %d wnd %u len %u\n", slot, flags, off, (int32_t)(ack - c->irs - 1), wnd, len);
	if (flags & RN_TH_SYN)
		return;
	if (flags & RN_TH_RST) {
		c->may_reset = 1;
		c->odd = 1;
		return;
	}
	for (uint32_t k = 0; k < len; k++)
		if (off + (int32_t)k >= 0 && off + (int32_t)k < (int32_t)STREAM)
			c->sent[(uint32_t)(off + (int32_t)k) / 8] |= (uint8_t)(1u << ((uint32_t)(off + (int32_t)k) % 8));
	if (flags & RN_TH_FIN) {
		if (c->nfin < FINS)
			c->fin[c->nfin] = seq + len;
		c->nfin++;
		if (!c->fin_sent || seq + len != c->fin_at)
			c->odd = 1;
	}
	if (len && c->fin_sent && seq_lt(c->fin_at, seq + len))
		c->odd = 1; /* data behind its own FIN */
	if (len && seq_lt(c->snd_nxt, seq + len) && off + (int32_t)len <= (int32_t)STREAM)
		c->snd_nxt = seq + len;
	if ((flags & RN_TH_ACK) && c->synack) {
		uint32_t edge = ack + ((uint32_t)wnd << c->our_shift);

		if (!seq_lt(c->rcv_nxt, ack) && seq_lt(c->offered, edge))
			c->offered = edge;
		if (seq_lt(c->rcv_nxt, ack))
			c->odd = 1; /* it claims what it never got */
	}
}

static void ack_now(uint32_t slot, uint16_t wnd)
{
	struct conn *c = &t.c[slot];
	uint32_t seq = c->fin_sent ? c->fin_at + 1 : c->snd_nxt;

	segment(slot, RN_TH_ACK, seq, c->rcv_nxt, wnd, 0, NULL, 0);
}

static void syn(uint32_t slot, uint32_t isn, uint16_t mss, int wscale, int sack)
{
	struct conn *c = &t.c[slot];
	uint8_t opt[12] = { RN_TCPOPT_MSS, 4, (uint8_t)(mss >> 8), (uint8_t)mss };
	uint32_t n = mss ? 4 : 0;

	if (wscale >= 0) {
		memcpy(opt + n, (uint8_t[]){ RN_TCPOPT_NOP, RN_TCPOPT_WSCALE, 3, (uint8_t)wscale }, 4);
		n += 4;
	}
	if (sack) { /* RFC 2018 2 */
		memcpy(opt + n, (uint8_t[]){ RN_TCPOPT_NOP, RN_TCPOPT_NOP, 4, 2 }, 4);
		n += 4;
	}

	/* What is under way of an earlier connection must not be taken for this one's. */
	t.stuck = 0;
	settle();
	if (!c->live) {
		host_close(c, 1);
		memset(c, 0, sizeof(*c));
		c->fd = -1;
	}
	if (!c->live || !c->synack) {
		c->isn = isn;
		c->snd_nxt = isn + 1;
		c->our_shift = wscale < 0 ? 0 : wscale > 14 ? 14 : (uint8_t)wscale;
	}
	c->may_reset = 1; /* a new SYN may end an old connection that was not established */
	segment(slot, RN_TH_SYN, isn, 0, 65535, 0, opt, n);
	settle();
}

/* --- host side --- */

static void host_close(struct conn *c, int abortive)
{
	struct linger lg = { .l_onoff = abortive, .l_linger = 0 };

	if (c->fd < 0)
		return;
	say("%u host closes, abortive %d\n", (unsigned)(c - t.c), abortive);
	(void)setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &lg, sizeof(lg));
	close(c->fd);
	c->fd = -1;
}

static void accept_all(void)
{
	for (uint32_t slot = 0; slot < SLOTS; slot++) {
		struct conn *c = &t.c[slot];
		int fd;

		while ((fd = accept4(t.listener[slot], NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
			struct conn fresh = { .live = 1, .fd = fd, .isn = c->isn, .snd_nxt = c->isn + 1, .our_shift = c->our_shift };

			/* The one before ended: by its RST, a new SYN, or both FINs. */
			host_close(c, 1);
			/* Nagle would wait for the other kernel's delayed ACK, in real time, which stands still here. */
			if (slot != UNIX_SLOT)
				(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){ 1 }, sizeof(int));
			*c = fresh;
			t.conns++;
			say("%u accepted\n", slot);
		}
	}
}

static int was_sent(const struct conn *c, uint32_t off)
{
	return off < STREAM && (c->sent[off / 8] >> (off % 8) & 1);
}

static void is_reset(struct conn *c)
{
	must(c->may_reset || t.s->c[RN_C_tcp_timed_out], "the host side is reset for a reason");
	c->host_reset = 1;
	t.resets++;
}

static void host_read(uint32_t slot, uint32_t max)
{
	struct conn *c = &t.c[slot];
	uint8_t buf[4096];

	while (max && c->fd >= 0 && !c->host_eof && !c->host_reset) {
		ssize_t n = read(c->fd, buf, max < sizeof(buf) ? max : sizeof(buf));

		say("%u host reads %u: %zd\n", slot, max, n < 0 ? -errno : n);
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (n < 0) {
			is_reset(c);
			return;
		}
		if (n == 0) {
			int known = c->nfin > FINS || (slot == UNIX_SLOT && (c->may_reset || t.s->c[RN_C_tcp_timed_out]));

			for (uint32_t k = 0; k < c->nfin && k < FINS; k++)
				known |= where(c, c->fin[k]) == (int32_t)c->host_read;
			must(known, "end of file where a FIN stood");
			c->host_eof = 1;
			return;
		}
		for (ssize_t k = 0; k < n; k++) {
			must(was_sent(c, c->host_read), "the host reads what was sent");
			must(buf[k] == up_byte(slot, c->isn + 1 + c->host_read), "the right byte up");
			c->host_read++;
		}
		t.up += (uint64_t)n;
		max -= (uint32_t)n;
	}
}

static void host_write(uint32_t slot, uint32_t len)
{
	struct conn *c = &t.c[slot];
	static uint8_t buf[65536];
	ssize_t n;

	if (c->fd < 0 || c->host_shut || c->host_wrote + len > DOWN_MAX)
		return;
	for (uint32_t k = 0; k < len; k++)
		buf[k] = down_byte(slot, c->host_wrote + k);
	n = send(c->fd, buf, len, MSG_NOSIGNAL);
	say("%u host writes %u: %zd\n", slot, len, n);
	if (n > 0)
		c->host_wrote += (uint32_t)n;
	else if (n < 0 && errno != EAGAIN)
		is_reset(c); /* told once: a read would show end of file */
}

static void host_shut(struct conn *c)
{
	if (c->fd < 0 || shutdown(c->fd, SHUT_WR))
		return;
	c->host_shut = 1;
	say("%u host shut\n", (unsigned)(c - t.c));
}

/* --- egress to guest --- */

static void check_tcp(uint32_t slot, const uint8_t *th, uint32_t len)
{
	struct conn *c = &t.c[slot];
	uint32_t hlen = (uint32_t)(th[RN_TCP_OFF] >> 4) * 4, seq = rn_get32(th + RN_TCP_SEQ), ack = rn_get32(th + RN_TCP_ACK), n;
	uint8_t flags = th[RN_TCP_FLAGS];
	uint32_t wnd = rn_get16(th + RN_TCP_WND), edge;
	int agreed;

	must(hlen >= 20 && hlen <= len, "TCP header fits");
	must(rn_get16(th + RN_TCP_SPORT) == t.port[slot], "from the port it was sent to");
	n = len - hlen;
	say("%u < flags %02x seq %d ack %d wnd %u len %u\n", slot, flags, (int32_t)(seq - c->irs - 1), where(c, ack), wnd << c->shift, n);
	if (flags & RN_TH_RST) {
		if (c->synack && seq == c->rcv_nxt)
			c->gone = 1;
		if (!c->synack && ack == c->isn + 1)
			c->gone = 1;
		return;
	}
	must(flags & RN_TH_ACK, "each segment but a RST acknowledges");
	if (flags & RN_TH_SYN) {
		if (!c->live || ack != c->isn + 1)
			return;
		if (!c->synack) {
			c->synack = 1;
			c->irs = seq;
			c->rcv_nxt = seq + 1;
			c->offered = seq + 1 + 65535; /* the SYN's window */
			c->acked = ack;
			agreed = 0;
			for (uint32_t at = 20; at < hlen && th[at];) {
				if (th[at] == RN_TCPOPT_NOP) {
					at++;
					continue;
				}
				must(at + 1 < hlen && th[at + 1] >= 2 && at + th[at + 1] <= hlen, "options add up");
				if (th[at] == RN_TCPOPT_WSCALE) {
					c->shift = th[at + 2];
					agreed = 1;
				}
				at += th[at + 1];
			}
			if (!agreed) /* window scale only if both offered it */
				c->our_shift = 0;
		}
		must(seq == c->irs, "one ISN a connection");
		return;
	}
	if (!c->live || !c->synack)
		return;
	/* ACK and window */
#ifdef PLANT
	ack += t.frames > 200;
#endif
	while (was_sent(c, c->contig))
		c->contig++;
	must(where(c, ack) >= 0 && (uint32_t)where(c, ack) <= c->contig + !!c->nfin, "ACK of what was sent");
	if (seq_lt(c->acked, ack))
		c->acked = ack;
	edge = ack + (wnd << c->shift);
	must(!c->have_edge || !seq_lt(edge + (1u << c->shift) - 1, c->edge), "the window's edge does not move back");
	if (!c->have_edge || seq_lt(c->edge, edge))
		c->edge = edge;
	c->have_edge = 1;
	/* data */
	for (uint32_t k = 0; k < n; k++) {
		uint32_t off = seq + k - (c->irs + 1);

		must(off < c->host_wrote, "the guest gets what was written");
		must(th[hlen + k] == down_byte(slot, off), "the right byte down");
	}
	must(!n || !seq_lt(c->offered, seq + n), "inside the guest's window");
	if (flags & RN_TH_FIN) {
		must(c->host_shut || c->fd < 0 || c->host_reset, "FIN only if the host side sent one");
		must(c->fd < 0 || seq + n - (c->irs + 1) == c->host_wrote, "FIN behind the last byte");
	}
	if (!seq_lt(c->rcv_nxt, seq) && seq_lt(c->rcv_nxt, seq + n)) {
		t.down += seq + n - c->rcv_nxt;
		c->rcv_nxt = seq + n;
	}
	if ((flags & RN_TH_FIN) && c->rcv_nxt == seq + n && !c->fin_rcvd) {
		c->rcv_nxt++;
		c->fin_rcvd = 1;
	}
}

static void check_frame(const uint8_t *f, uint32_t len, const uint8_t *vnet, int has_vnet)
{
	const uint8_t *ip = f + 14, *l4 = ip + 20;
	uint32_t total, slot, n;
	uint64_t sum;

	must(len >= 34 && !memcmp(f, guest_mac, 6) && !memcmp(f + 6, gateway_mac, 6), "Ethernet header");
	must(rn_get16(f + 12) == RN_ETHERTYPE_IPV4 && ip[0] == 0x45, "IPv4");
	total = rn_get16(ip + RN_IP4_LEN);
	say("frame of %u bytes, IP %u, protocol %u\n", len, total, ip[RN_IP4_PROTO]);
	must(total + 14 == len && total > 20, "IP total length");
	must(has_vnet || total <= MTU, "within the MTU");
	must(rn_csum_fold(rn_csum_add(0, ip, 20)) == 0xffff, "IP checksum");
	must(!memcmp(ip + RN_IP4_DST, guest, 4), "to the guest");
	if (rn_get16(ip + RN_IP4_FRAG) & (RN_IP4_MF | RN_IP4_OFFMASK))
		return;
	n = total - 20;
	sum = rn_csum_pseudo4(ip + RN_IP4_SRC, ip + RN_IP4_DST, ip[RN_IP4_PROTO], n);
	switch (ip[RN_IP4_PROTO]) {
	case RN_IPPROTO_TCP:
		must(n >= 20, "TCP header");
		if (has_vnet && (vnet[0] & RN_VNET_NEEDS_CSUM)) {
			uint16_t partial;

			memcpy(&partial, l4 + RN_TCP_SUM, 2);
			must(partial == rn_csum_fold(sum), "partial checksum");
		} else {
			must(rn_csum_fold(rn_csum_add(sum, l4, n)) == 0xffff, "TCP checksum");
		}
		slot = (uint32_t)rn_get16(l4 + RN_TCP_DPORT) - GPORT;
		if (slot < SLOTS)
			check_tcp(slot, l4, n);
		break;
	case RN_IPPROTO_UDP:
		must(rn_get16(l4 + RN_UDP_LEN) == n, "UDP length");
		must(rn_csum_fold(rn_csum_add(sum, l4, n)) == 0xffff, "UDP checksum");
		t.udps++;
		break;
	case RN_IPPROTO_ICMP:
		must(rn_csum_fold(rn_csum_add(0, l4, n)) == 0xffff, "ICMP checksum");
		break;
	default:
		must(0, "a protocol we know");
	}
}

static void take(void)
{
	int n = rn_ring_peek(&t.from, 1024);

	must(n >= 0, "ring to the guest");
	for (int k = 0; k < n; k++) {
		struct rn_desc d = rn_ring_at(&t.from, (uint32_t)k);
		struct rn_buf *b = rn_buf_of(&t.rx, &d);

		must(b != NULL, "a descriptor of ours");
		check_frame(t.rx.base + d.off, d.len, t.rx.base + d.off - RN_VNET_HLEN, d.flags & RN_DESC_VNET);
		rn_buf_free(&t.rx, b);
	}
	if (n)
		rn_ring_consume(&t.from, (uint32_t)n);
}

/* --- operations --- */

static uint32_t length(struct input *in)
{
	uint32_t k = u8(in);

	return k < 200 ? k : k < 250 ? (k - 199) * 29 : 1460u + (k - 250) * 9000u;
}

static void send_udp(struct input *in)
{
	uint8_t f[2048], what = (uint8_t)u8(in);
	uint32_t len = length(in) % 1400, at = headers(f, RN_IPPROTO_UDP, 8 + len);
	struct rn_meta m = { .ip_version = 4, .ip_proto = RN_IPPROTO_UDP, .ttl = 64, .l3_off = 14, .l4_off = 34,
			     .payload_off = 42, .payload_len = len };
	struct sockaddr_in from;
	socklen_t l = sizeof(from);
	uint8_t buf[16384] = { 0 };

	if (what >= 128) { /* a train, as classify lets it through; or one that it would not */
		uint32_t each = what & 7 ? len / (1 + what % 60) + 1 : (uint32_t)u8(in);

		m.each = (uint16_t)(rn_uso_count(len, each) > 1 || !(what & 7) ? each : 0);
	}
	memset(f + at, what, 8 + len);
	rn_put16(f + at, (uint16_t)(7000 + what % 8));
	rn_put16(f + at + 2, t.udp_port);
	rn_put16(f + at + 4, (uint16_t)(8 + len));
	put(f, 42 + len, &m);
	step();
	while (recvfrom(t.udp, buf, sizeof(buf), 0, (struct sockaddr *)&from, &l) >= 0) {
		uint32_t reply = what % 4 == 3 ? 4000u + len : len;

		if (sendto(t.udp, buf, reply, MSG_NOSIGNAL, (struct sockaddr *)&from, l) < 0)
			break;
		l = sizeof(from);
	}
}

static void send_echo(struct input *in)
{
	uint8_t f[2048];
	uint32_t len = length(in) % 1400, at = headers(f, RN_IPPROTO_ICMP, 8 + len);
	struct rn_meta m = { .ip_version = 4, .ip_proto = RN_IPPROTO_ICMP, .ttl = 64, .l3_off = 14, .l4_off = 34,
			     .payload_off = 42, .payload_len = len };

	memset(f + at, 0, 8 + len);
	f[at] = u8(in) & 1 ? 8 : (uint8_t)u8(in);
	put(f, 42 + len, &m);
	step();
}

/* Bytes and a classification that lies about them. */
static void send_lie(struct input *in)
{
	uint8_t f[256];
	uint32_t len = 14 + u8(in) % 200, at = headers(f, (uint8_t)u8(in), 40);
	struct rn_meta m = { .ip_version = u8(in) & 7 ? 4 : (uint8_t)u8(in), .ip_proto = (uint8_t)(uint32_t[]){ 6, 17, 1, 132 }[u8(in) % 4] };

	for (uint32_t k = at; k < sizeof(f); k++)
		f[k] = (uint8_t)u8(in);
	/* Not the connections the books are kept of. */
	if (rn_get16(f + at) - GPORT < SLOTS)
		f[at] = 0xff;
	m.l3_off = u8(in) & 3 ? 14 : (uint16_t)u16(in);
	m.l4_off = u8(in) & 3 ? 34 : (uint16_t)(u8(in) & 1 ? u8(in) : u16(in));
	m.payload_off = u8(in) & 3 ? (m.ip_proto == 6 ? 54 : 42) : (uint16_t)(u8(in) & 1 ? u8(in) : u16(in) << 8);
	m.each = u8(in) & 3 ? 0 : (uint16_t)u16(in);
	m.payload_len = u8(in) & 1 ? u8(in) % 60 : u8(in) & 1 ? 0xffffffffu - u8(in) : u16(in);
	if (rn_get16(f + at) - GPORT < SLOTS && m.l4_off == 34)
		return;
	put(f, len, &m);
	step();
}

/* The guest as it should be: everything unacknowledged once more, within the window. */
static void resend(uint32_t slot)
{
	struct conn *c = &t.c[slot];
	uint32_t seq = c->acked, end = c->snd_nxt, limit;

	if (!c->synack || c->gone)
		return;
	limit = c->have_edge ? c->edge : c->isn + 1 + 65535;
	for (uint32_t n = 0; seq_lt(seq, end) && n < 8; n++) {
		uint32_t len = end - seq < 1400 ? end - seq : 1400;

		if (seq_lt(limit, seq + len))
			len = seq_lt(seq, limit) ? limit - seq : 0;
		if (!len) { /* zero-window probe */
			segment(slot, RN_TH_ACK, seq, c->rcv_nxt, 65535u, 1, NULL, 0);
			step();
			break;
		}
		segment(slot, RN_TH_ACK | RN_TH_PSH, seq, c->rcv_nxt, 65535u, len, NULL, 0);
		seq += len;
		step();
	}
	if (c->fin_sent && seq == c->fin_at)
		segment(slot, RN_TH_ACK | RN_TH_FIN, c->fin_at, c->rcv_nxt, 65535u, 0, NULL, 0);
	ack_now(slot, 65535u);
	step();
}

static void operation(struct input *in)
{
	uint32_t op = u8(in), slot = op >> 6, a, b;
	struct conn *c = &t.c[slot];
	static const uint32_t isns[] = { 1000, 0xfffffff0u, 0xffff0000u, 0x7fffff00u, 0, 0x80000000u, 0xfffffffeu, 0xffffc000u };
	static const uint16_t wnds[] = { 65535, 0, 1, 2, 100, 1460, 4096, 30000 };
	static const uint16_t msss[] = { 1460, 0, 1, 64, 536, 9000, 65495, 1400 };
	static const uint8_t garbage[][8] = { { 1, 1, 1, 0 }, { 2, 4, 0, 0 }, { 3, 0, 0, 0 }, { 8, 10, 1, 2, 3, 4, 5, 6 }, { 5, 200, 1, 1 }, { 255, 1, 0, 0 } };
	uint32_t next = c->snd_nxt;

	switch (op & 31) {
	case 0:
	case 1:
		a = u8(in);
		b = u8(in);
		syn(slot, isns[a & 7] + (a >> 3), msss[b & 7], b & 8 ? (int)(b >> 4) : -1, (int)(a >> 7));
		if (t.c[slot].synack)
			ack_now(slot, wnds[u8(in) & 7]);
		break;
	case 2: /* data in order */
	case 3:
	case 4:
	case 5:
		a = length(in);
		if (c->fin_sent) {
			c->odd = 1;
			a %= 100;
		}
		if (where(c, next) + (int32_t)a <= (int32_t)STREAM)
			segment(slot, RN_TH_ACK | (a & 1 ? RN_TH_PSH : 0), next, c->rcv_nxt, wnds[op & 4 ? 0 : u8(in) & 7], a, NULL, 0);
		break;
	case 6: /* data anywhere near */
	case 7:
	case 8:
		b = u16(in);
		a = length(in);
		next += b - 32768u;
		if (where(c, next) < 0 || where(c, next) + (int32_t)a <= (int32_t)STREAM)
			segment(slot, RN_TH_ACK, next, c->rcv_nxt, 65535, a, NULL, 0);
		/* A hole is left behind: a correct guest would fill it, and does in resend(). */
		break;
	case 9: /* just over what was sent: holes and overlaps of small size */
		b = u8(in);
		a = length(in);
		next += b - 100u;
		if (where(c, next) + (int32_t)a <= (int32_t)STREAM)
			segment(slot, RN_TH_ACK, next, c->rcv_nxt, 65535, a, NULL, 0);
		break;
	case 10: /* a new window */
	case 11:
		ack_now(slot, wnds[u8(in) & 7]);
		break;
	case 12: /* any ACK */
		segment(slot, RN_TH_ACK, next, u8(in) & 1 ? c->rcv_nxt + u16(in) - 32768u : c->irs + 1 + u8(in), (uint16_t)u16(in), 0, NULL, 0);
		break;
	case 13: /* the same ACK three times and more; perhaps with SACK blocks, true or not (RFC 2018 3) */
		a = u8(in);
		for (uint32_t k = a % 6; k; k--) {
			uint8_t opt[36] = { RN_TCPOPT_NOP, RN_TCPOPT_NOP, 5 };
			uint32_t blocks = a >> 3 & 3;

			opt[3] = (uint8_t)(2 + 8 * blocks + (a >> 7));
			for (uint32_t j = 0; j < blocks; j++) {
				uint32_t lo = c->rcv_nxt + u8(in) * 20u - 100u;

				rn_put32(opt + 4 + 8 * j, lo);
				rn_put32(opt + 8 + 8 * j, lo + u8(in) * 20u - (u8(in) & 1));
			}
			segment(slot, RN_TH_ACK, c->fin_sent ? c->fin_at + 1 : next, c->rcv_nxt, 65535, 0, opt, blocks ? 4 + 8 * blocks : 0);
		}
		break;
	case 14: /* FIN, as it should be */
		if (c->live && !c->fin_sent) {
			c->fin_sent = 1;
			c->fin_at = next;
		}
		if (c->fin_sent)
			segment(slot, RN_TH_ACK | RN_TH_FIN, c->fin_at, c->rcv_nxt, 65535, 0, NULL, 0);
		break;
	case 15: /* FIN anywhere, data in it */
		if (u8(in) & 3)
			break;
		a = length(in);
		next += u8(in) - 10u;
		if (where(c, next) + (int32_t)a <= (int32_t)STREAM)
			segment(slot, RN_TH_ACK | RN_TH_FIN, next, c->rcv_nxt, 65535, a, NULL, 0);
		break;
	case 16: /* RST near the edge or anywhere */
		a = u8(in);
		if (a & 3)
			break;
		segment(slot, RN_TH_RST | (a & 4 ? RN_TH_ACK : 0), a & 8 ? c->acked + u16(in) - 32768u : c->acked + (a >> 6) - 1u, c->rcv_nxt, 0, 0,
			NULL, 0);
		break;
	case 17: /* flags as they come, but no RST, FIN or SYN: those are counted elsewhere */
		a = u8(in);
		segment(slot, (uint8_t)(a & ~(RN_TH_RST | RN_TH_SYN | RN_TH_FIN)), next, c->rcv_nxt, 65535, 0, garbage[u8(in) % 6], 8);
		break;
	case 18: /* a SYN into it; not in one turn with others, so that it is known which connection each belongs to */
		step();
		c->may_reset = 1;
		segment(slot, RN_TH_SYN | (u8(in) & 1 ? RN_TH_ACK : 0), c->live ? c->isn + u8(in) % 2 * u16(in) : 1, c->rcv_nxt, 65535, 0, NULL, 0);
		step();
		c->may_reset = 1;
		c->odd = 1;
		if (!c->synack)
			c->live = 0; /* its numbers may be another's now */
		break;
	case 19:
	case 20:
		host_write(slot, length(in) * (u8(in) % 8 + 1) % 65536u);
		break;
	case 21:
	case 22:
		host_read(slot, length(in) * 4);
		break;
	case 23:
		if (u8(in) % 4 == 0)
			host_shut(c);
		break;
	case 24:
		a = u8(in);
		if (a % 8)
			break;
		host_close(c, (int)(a >> 4 & 1));
		c->may_reset = 1;
		c->odd = 1;
		break;
	case 25: { /* time */
		static const uint64_t ms[] = { 1, 4, 200, 1000, 3000, 61000, 600000, 7300000 };

		a = u8(in) & 7;
		say("%u ms pass\n", (unsigned)ms[a]);
		t.now += ms[a] * 1000000u;
		step();
		break;
	}
	case 26:
		t.stuck = u8(in) & 1;
		break;
	case 27:
		settle();
		break;
	case 28:
		if (slot == 0)
			send_udp(in);
		else if (slot == 1)
			send_echo(in);
		else
			send_lie(in);
		break;
	case 29:
	case 30:
		resend(slot);
		break;
	default:
		step();
	}
	if (!(op & 32)) /* else a burst: the next one comes in the same turn */
		step();
}

/* Guest and host behave from now on: everything has to arrive. */
static void converge(void)
{
	t.stuck = 0;
	for (uint32_t n = 0; n < 120; n++) {
		int left = 0;

		for (uint32_t slot = 0; slot < SLOTS; slot++) {
			struct conn *c = &t.c[slot];

			if (!c->live || !c->synack || c->gone || c->odd)
				continue;
			host_read(slot, STREAM);
			ack_now(slot, 65535);
			if (c->host_read != (uint32_t)where(c, c->snd_nxt) || (c->fin_sent && !c->host_eof) ||
			    c->rcv_nxt != c->irs + 1 + c->host_wrote + (c->host_shut && c->fin_rcvd)) {
				left = 1;
				resend(slot);
			}
		}
		settle();
		if (!left)
			break;
		t.now += n < 20 ? 300000000ull : 5000000000ull;
	}
	for (uint32_t slot = 0; slot < SLOTS; slot++) {
		struct conn *c = &t.c[slot];

		if (!c->live || !c->synack)
			continue;
		/* What egress handed over may lie in its kernel queue yet: that moves in real time (window probes). */
		for (uint32_t n = 0; n < 100; n++) {
			struct pollfd pf = { .fd = c->fd, .events = POLLIN };

			host_read(slot, STREAM);
			if (c->fd < 0 || c->host_reset || c->host_eof || (int32_t)c->host_read >= where(c, c->acked) - !!c->nfin)
				break;
			poll(&pf, 1, 100);
		}
		if (!c->host_reset && c->fd >= 0)
			must((int32_t)c->host_read >= where(c, c->acked) - !!c->nfin, "what was acknowledged arrived");
		if (c->gone || c->odd || c->fd < 0)
			continue;
		say("%u: host read %u of %d, end %d; guest %u of %u\n", slot, c->host_read, where(c, c->snd_nxt), c->host_eof,
		    c->rcv_nxt - c->irs - 1, c->host_wrote);
		must(c->host_read == (uint32_t)where(c, c->snd_nxt), "everything arrived at the host");
		must(!c->fin_sent || c->host_eof, "and its end");
		must(c->rcv_nxt - c->irs - 1 - c->fin_rcvd == c->host_wrote, "everything arrived at the guest");
		t.whole++;
	}
}

static uint32_t open_descriptors(void)
{
	DIR *d = opendir("/proc/self/fd");
	uint32_t n = 0;

	must(d != NULL, "/proc");
	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

static void end(void)
{
	struct rn_flow_view v;

	for (uint32_t slot = 0; slot < SLOTS; slot++)
		host_close(&t.c[slot], 1);
	/* Frames left on the input ring are classify's to lose: here they are egress's to free. */
	for (uint32_t n = 0; n < 4; n++)
		settle();
	t.stuck = 0;
	settle();
	for (uint32_t slot = 0; slot < SLOTS; slot++)
		t.c[slot].live = 0;
	rn_stage_fini(t.s);
	take();
	accept_all();
	for (uint32_t slot = 0; slot < SLOTS; slot++)
		host_close(&t.c[slot], 1);
	for (uint32_t i = 0; i < rn_flows_count(t.flows); i++)
		must(rn_flows_read(t.flows, t.sizes[2], i, &v) == -ENOENT, "every flow is free");
	ASAN_UNPOISON_MEMORY_REGION(t.arena, t.sizes[1]);
	must(rn_pool_free(&t.classify, RN_SMALL) == SMALLS && rn_pool_free(&t.classify, RN_LARGE) == LARGES, "classify's buffers");
	must(rn_pool_free(&t.s->pool, RN_SMALL) == SMALLS && rn_pool_free(&t.s->pool, RN_LARGE) == LARGES, "egress's buffers");
	rn_stage_free(t.s);
	rn_pool_detach(&t.classify);
	rn_pool_detach(&t.rx);
	for (uint32_t i = 0; i < 3; i++)
		close(t.bells[i]);
	free(t.session);
	free(t.arena);
	free(t.flows);
	free(t.in);
	free(t.out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = { .at = data, .left = size };
	uint32_t mode = u8(&in), before;

	if (!t.inputs++) {
		t.trace = getenv("FUZZ_TRACE") != NULL;
		for (uint32_t slot = 0; slot < SLOTS; slot++)
			t.listener[slot] = listen_on(slot);
		open_udp();
	}
	before = open_descriptors();
	begin(mode & 1, mode >> 1 & 1);
	for (uint32_t n = 0; in.left && n < 2000; n++)
		operation(&in);
	converge();
	end();
	must(open_descriptors() == before, "no descriptor is left");
	return 0;
}

size_t fuzz_generate(uint8_t *buf, size_t cap)
{
	size_t n = 0;
	uint32_t ops = 5 + fuzz_rnd(fuzz_rnd(4) ? 60 : 400);

	buf[n++] = (uint8_t)fuzz_rnd(256);
	for (uint32_t k = 0; k < ops && n + 8 < cap; k++) {
		/* A few connections, mostly the same one; SYNs at the start of each. */
		uint32_t slot = fuzz_rnd(3) ? 0 : fuzz_rnd(SLOTS);
		uint32_t op = k < 2 ? 0 : fuzz_rnd(32), late = fuzz_rnd(4) == 0;

		buf[n++] = (uint8_t)(slot << 6 | late << 5 | op);
		for (uint32_t j = fuzz_rnd(4); j; j--)
			buf[n++] = (uint8_t)(fuzz_rnd(2) ? fuzz_rnd(256) : fuzz_rnd(8));
	}
	return n;
}

void fuzz_report(void)
{
	printf("frames %llu\nconnections %llu\nup_bytes %llu\ndown_bytes %llu\nresets %llu\nwhole %llu\nudp %llu\n",
	       (unsigned long long)t.frames, (unsigned long long)t.conns, (unsigned long long)t.up, (unsigned long long)t.down,
	       (unsigned long long)t.resets, (unsigned long long)t.whole, (unsigned long long)t.udps);
}
