/* tcp_up.c - a segment with data from the guest through the egress stage to send() on a real TCP socket.
 *
 * The stage is the product's, with ring, arena and flow table; this file plays classify (frames with their meta data), the
 * guest (a handshake, then in-order data) and the server (a listener on loopback whose socket is emptied between the timed
 * parts). The linker puts our wrappers around the system calls (--wrap), so that their share is known: what remains is the
 * stage's own code, up_segment's way from descriptor to ACK.
 */
#include "micro.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "egress.h"

#define ROW_CLASSIFY 0u
#define ROW_EGRESS 1u
#define ROW_RX 2u
#define SPORT 5000u
#define BATCH_BYTES (128u << 10) /* a timed part; fits the receiver's buffer */

static struct {
	struct rn_stage *s;
	struct rn_pool classify, rx;
	struct rn_ring_tx tx;
	struct rn_ring_rx from;
	int listener, server;
	uint16_t port;
	uint64_t now;
	uint32_t nxt, ack; /* guest's next sequence number, and what it acknowledges */
	uint32_t acked;	   /* highest acknowledgement the guest got */
} u;

/* --- set-up --- */

static void listen_here(void)
{
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t l = sizeof(sin);
	int size = 8 << 20;

	u.listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	NEED(u.listener >= 0);
	if (setsockopt(u.listener, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)))
		setsockopt(u.listener, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	NEED(!bind(u.listener, (struct sockaddr *)&sin, sizeof(sin)) && !listen(u.listener, 4) &&
	     !getsockname(u.listener, (struct sockaddr *)&sin, &l));
	u.port = ntohs(sin.sin_port);
}

static void make_stage(void)
{
	static const struct rn_part_spec spec[3] = { { 512, 64 }, { 512, 64 }, { 0, 0 } };
	struct egress_config cfg = { .prefix = 24, .mtu = 1500, .offload = 1, .host_loopback = 1, .peek_offset = -1,
				     .raw_icmp_fd = -1, .nfile = 64, .udp_max = 4, .pending_max = 4, .seed = 1 };
	uint64_t session = rn_session_size(), arena = rn_arena_size(spec, 3), flows = rn_flows_size(16), ring = rn_ring_size(256);
	void *session_mem = micro_memory(session), *arena_mem = micro_memory(arena), *flows_mem = micro_memory(flows);
	void *in = micro_memory(ring), *out = micro_memory(ring);
	int bells[3];

	memcpy(cfg.gateway4, micro_gateway, 4);
	memcpy(cfg.guest4, micro_guest, 4);
	memcpy(cfg.gateway_mac, micro_gateway_mac, 6);
	NEED(!rn_session_create(session_mem, session, 3));
	NEED(!rn_arena_create(arena_mem, arena, spec, 3));
	NEED(!rn_flows_create(flows_mem, flows, 16, 1, 2));
	NEED(!rn_ring_create(in, ring, 256) && !rn_ring_create(out, ring, 256));
	u.s = rn_stage_new(ROW_EGRESS, 1);
	NEED(u.s && !rn_stage_set_session(u.s, session_mem, session) && !rn_stage_set_arena(u.s, arena_mem, arena, 1));
	for (uint32_t i = 0; i < 3; i++)
		NEED((bells[i] = rn_bell_new()) >= 0 && !rn_stage_set_bell(u.s, i, bells[i]));
	NEED(!rn_stage_add_input(u.s, in, ring, ROW_CLASSIFY) && !rn_stage_add_output(u.s, RN_ROLE_GUEST, out, ring, ROW_RX));
	NEED(!rn_pool_attach(&u.classify, arena_mem, arena, ROW_CLASSIFY, ROW_CLASSIFY, 0));
	NEED(!rn_pool_attach(&u.rx, arena_mem, arena, -1, ROW_RX, 0));
	NEED(!rn_ring_tx_attach(&u.tx, in, ring, bells[ROW_EGRESS]) && !rn_ring_rx_attach(&u.from, out, ring, bells[ROW_EGRESS]));
	NEED(!stage_egress_init(u.s, flows_mem, flows, &cfg));
	u.now = micro_now();
}

/* --- the guest --- */

static const uint8_t syn_options[8] = { RN_TCPOPT_MSS, 4, 1460 >> 8, 1460 & 255, RN_TCPOPT_NOP, RN_TCPOPT_WSCALE, 3, 7 };

static void put(uint8_t flags, uint32_t len)
{
	uint32_t options = flags & RN_TH_SYN ? sizeof(syn_options) : 0;
	struct rn_buf *b = rn_buf_alloc(&u.classify, len + 100 <= RN_SMALL_FRAME_MAX ? RN_SMALL : RN_LARGE);
	struct rn_desc d = { .flags = 0 };
	uint8_t *eth;

	NEED(b && rn_ring_room(&u.tx, 1) >= 1);
	eth = (uint8_t *)b + RN_BUF_ETH_OFF;
	memset(eth - RN_VNET_HLEN, 0, RN_VNET_HLEN);
	d.len = micro_frame(eth, SPORT, u.port, u.nxt, u.ack, flags, options + len, 0);
	if (options) {
		uint8_t *th = eth + RN_ETH_HLEN + RN_IP4_HLEN;

		th[RN_TCP_OFF] = (RN_TCP_HLEN + sizeof(syn_options)) / 4 << 4;
		memcpy(th + RN_TCP_HLEN, syn_options, sizeof(syn_options));
	}
	d.off = rn_buf_off(&u.classify, eth);
	d.gen = (uint16_t)b->gen;
	b->meta = (struct rn_meta){ .ip_version = 4, .ip_proto = RN_IPPROTO_TCP, .ttl = 64, .l3_off = 14, .l4_off = 34,
				    .payload_off = 54 + options, .payload_len = len };
	atomic_store(&b->holder, ROW_EGRESS + 1);
	rn_ring_put(&u.tx, &d);
	u.nxt += len + ((flags & RN_TH_SYN) != 0);
}

/* What the stage sent: only the numbers matter. */
static void take(void)
{
	int n = rn_ring_peek(&u.from, 256);

	NEED(n >= 0);
	for (int i = 0; i < n; i++) {
		struct rn_desc d = rn_ring_at(&u.from, (uint32_t)i);
		struct rn_buf *b = rn_buf_of(&u.rx, &d);
		const uint8_t *th = u.rx.base + d.off + RN_ETH_HLEN + RN_IP4_HLEN;

		NEED(b && !(th[RN_TCP_FLAGS] & RN_TH_RST));
		if (th[RN_TCP_FLAGS] & RN_TH_SYN)
			u.ack = rn_get32(th + RN_TCP_SEQ) + 1;
		u.acked = rn_get32(th + RN_TCP_ACK);
		rn_buf_free(&u.rx, b);
	}
	rn_ring_consume(&u.from, (uint32_t)n);
}

static void settle(void)
{
	do
		u.now += 10000;
	while (stage_egress_step(u.s, 0, u.now) > 0);
}

static void shake_hands(void)
{
	uint64_t end = micro_now() + 5000000000u;

	u.nxt = 1;
	put(RN_TH_SYN, 0);
	rn_ring_publish(&u.tx);
	while (!u.ack) {
		NEED(micro_now() < end);
		settle();
		take();
	}
	u.server = accept4(u.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	NEED(u.server >= 0);
	put(RN_TH_ACK, 0);
	rn_ring_publish(&u.tx);
	settle();
	take();
}

/* @n segments of @len bytes in bursts: ns in the stage. */
static uint64_t segments(void *ctx, uint32_t n)
{
	uint32_t len = *(uint32_t *)ctx, burst = BATCH_BYTES / len < 32 ? BATCH_BYTES / len : 32;
	static uint8_t sink[1 << 20];
	uint64_t spent = 0;

	micro_kernel_ns = 0;
	for (uint32_t done = 0; done < n; done += burst) {
		uint64_t t;

		for (uint32_t i = 0; i < burst; i++)
			put(RN_TH_ACK, len);
		rn_ring_publish(&u.tx);
		micro_timed = 1;
		t = micro_now();
		settle();
		spent += micro_now() - t;
		micro_timed = 0;
		take();
		NEED(u.acked == u.nxt);
		while (recv(u.server, sink, sizeof(sink), 0) > 0)
			;
		settle(); /* not timed: what the emptied buffer made possible */
		take();
	}
	return spent;
}

void micro_tcp_up(void)
{
	listen_here();
	make_stage();
	shake_hands();
	micro_split("tcp_up", "MTU 1500", 1460, 32 * 100, segments);
	micro_split("tcp_up", "super-frame", 65160, 2 * 200, segments);
	rn_stage_fini(u.s);
	rn_stage_free(u.s);
	close(u.server);
	close(u.listener);
}
