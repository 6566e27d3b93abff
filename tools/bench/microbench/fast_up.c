/* fast_up.c - a segment of a promoted flow: from the frame the link was read into to send(), and its share of the ACK.
 *
 * The product's fast_up.c on a flow table of our own, with a real TCP socket on loopback; the ACK goes to /dev/null where
 * the tap would be. System calls are timed apart by the wrappers of tcp_up.c.
 */
#include "fast_up.h"
#include "micro.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <string.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "rn_fdpass.h"
#include "rn_promote.h"
#include "rn_proto.h"

#define ROW_TX 0u
#define ROW_EGRESS 1u
#define ROW_RX 2u
#define SPORT 5000u
#define DPORT 80u
#define BURST 32u
#define FRAME 70000u
#define BATCH_BYTES (128u << 10)
#define WINDOW (1u << 30) /* never the limit here */

static struct {
	struct rn_stage *s;
	struct rn_ring_rx from;
	struct rn_pool rx;
	struct rn_flow *flow;
	struct fast_up *up;
	struct rn_link link;
	int server;
	uint8_t *frames; /* BURST of them: frames may be held until the end of a turn */
	uint32_t nxt;
} v;

static void make_flow(void *flows_mem)
{
	static const uint8_t mapped[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };
	struct rn_flow *f = v.flow = &((struct rn_flows *)flows_mem)->flow[0];

	memcpy(f->guest_addr, mapped, 12);
	memcpy(f->guest_addr + 12, micro_guest, 4);
	memcpy(f->peer_addr, mapped, 12);
	memcpy(f->peer_addr + 12, micro_gateway, 4);
	f->guest_port = SPORT;
	f->peer_port = DPORT;
	f->proto = RN_IPPROTO_TCP;
	memcpy(f->guest_mac, micro_guest_mac, 6);
	f->gen = 1;
	atomic_store(&f->state, RN_FL_ESTABLISHED);
	atomic_store(&f->up.owner, rn_owner(ROW_TX));
	atomic_store(&f->down.owner, rn_owner(ROW_RX));
	f->up.rcv_nxt = f->up.acked = v.nxt = 1;
	f->up.rcv_adv = f->up.rcv_nxt + WINDOW;
	f->down.snd_una = f->down.snd_nxt = f->down.snd_max = 1;
	f->down.mss = 1460;
	atomic_store(&f->acks.ack_wnd, (uint64_t)1 << 32 | 65535);
}

static void offer(int channel[2], int fd)
{
	struct rn_pass p = { .index = 0, .gen = 1, .proto = RN_IPPROTO_TCP, .window_scaled = 1, .peer_port = DPORT };
	struct rn_desc d = { .off = 0, .len = 1, .flags = rn_fn_flags(RN_FN_OFFER) };

	memcpy(p.peer4, micro_gateway, 4);
	NEED(!rn_fdpass_send(channel[0], &p, fd));
	fast_up_notice(v.up, &d);
}

static void make_stage(void)
{
	static const struct rn_part_spec spec[3] = { { 256, 8 }, { 8, 0 }, { 0, 0 } };
	uint64_t session = rn_session_size(), arena = rn_arena_size(spec, 3), flows = rn_flows_size(4), ring = rn_ring_size(256);
	void *session_mem = micro_memory(session), *arena_mem = micro_memory(arena), *flows_mem = micro_memory(flows);
	void *in = micro_memory(ring), *out = micro_memory(ring);
	struct fast_up_config cfg = { .offload = 1, .direct = 1 };
	int channel[2], client, bell;

	memcpy(cfg.parse.gateway4, micro_gateway, 4);
	memcpy(cfg.parse.subnet4, (uint8_t[]){ 10, 0, 2, 0 }, 4);
	memcpy(cfg.parse.gateway_mac, micro_gateway_mac, 6);
	cfg.parse.prefix = 24;
	cfg.parse.mtu = 1500;
	NEED(!rn_session_create(session_mem, session, 3) && !rn_arena_create(arena_mem, arena, spec, 3));
	NEED(!rn_flows_create(flows_mem, flows, 4, 1, 2));
	NEED(!rn_ring_create(in, ring, 256) && !rn_ring_create(out, ring, 256));
	v.s = rn_stage_new(ROW_TX, 1);
	NEED(v.s && !rn_stage_set_session(v.s, session_mem, session) && !rn_stage_set_arena(v.s, arena_mem, arena, 1));
	for (uint32_t i = 0; i < 3; i++) {
		NEED((bell = rn_bell_new()) >= 0);
		NEED(!rn_stage_set_bell(v.s, i, bell));
	}
	NEED(!rn_stage_add_input(v.s, in, ring, ROW_EGRESS) && !rn_stage_add_output(v.s, RN_ROLE_GUEST, out, ring, ROW_RX));
	NEED(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, channel));
	cfg.flows_fd = channel[1];
	v.link = (struct rn_link){ .fd = open("/dev/null", O_WRONLY | O_CLOEXEC), .kind = RN_LINK_TAP, .vnet = 1, .frame_max = 1514 };
	NEED(v.link.fd >= 0);
	make_flow(flows_mem);
	v.up = fast_up_new(v.s, &v.link, flows_mem, flows, &cfg);
	NEED(v.up);
	micro_tcp_pair(&client, &v.server);
	offer(channel, client);
	close(client);
	close(channel[0]);
}

/* @n segments of @len bytes in bursts, each a turn of guest_tx's: ns in fast_up. */
static uint64_t segments(void *ctx, uint32_t n)
{
	uint32_t len = *(uint32_t *)ctx, burst = BATCH_BYTES / len < BURST ? BATCH_BYTES / len : BURST;
	static uint8_t sink[1 << 20];
	uint64_t spent = 0;

	micro_kernel_ns = 0;
	for (uint32_t done = 0; done < n; done += burst) {
		v.s->now = micro_now();
		for (uint32_t i = 0; i < burst; i++) {
			uint8_t *eth = v.frames + i * FRAME + RN_VNET_HLEN;
			uint32_t size = micro_frame(eth, SPORT, DPORT, v.nxt, 1, RN_TH_ACK, len, 0);
			const struct fast_frame *held;
			struct rn_parsed parsed;
			enum fast_up_way way;
			uint64_t t;

			v.nxt += len;
			micro_timed = 1;
			t = micro_now();
			way = fast_up_take(v.up, eth, size, RN_DESC_VNET, 0, &parsed);
			if (i + 1 == burst || fast_up_full(v.up))
				(void)fast_up_settle(v.up, &held);
			if (i + 1 == burst)
				NEED(!fast_up_flush(v.up));
			spent += micro_now() - t;
			micro_timed = 0;
			NEED(way == FAST_UP_DONE || way == FAST_UP_HELD);
		}
		NEED(v.flow->up.rcv_nxt == v.nxt && v.flow->up.acked == v.nxt);
		for (uint32_t left = burst * len; left;) { /* all of it: what is still under way would fill the buffer by and by */
			struct pollfd wait = { .fd = v.server, .events = POLLIN };
			ssize_t got = poll(&wait, 1, 10000) == 1 ? recv(v.server, sink, sizeof(sink), MSG_DONTWAIT) : -1;

			NEED(got > 0);
			left -= (uint32_t)got;
		}
		v.flow->up.rcv_adv = v.nxt + WINDOW;
	}
	return spent;
}

static void say(const struct rn_vnet_hdr *vnet)
{
	for (uint32_t i = 0; i < BURST; i++)
		memcpy(v.frames + i * FRAME, vnet, sizeof(*vnet));
}

void micro_fast_up(void)
{
	struct rn_vnet_hdr vnet = { /* virtio 1.2 5.1.6.2 */
		.flags = RN_VNET_NEEDS_CSUM, .csum_start = RN_ETH_HLEN + RN_IP4_HLEN, .csum_offset = RN_TCP_SUM,
	};

	v.frames = micro_memory(BURST * FRAME);
	make_stage();
	say(&vnet);
	micro_split("fast_up", "MTU 1500", 1460, 32 * 100, segments);
	vnet.gso_type = RN_VNET_GSO_TCPV4;
	vnet.gso_size = 1460;
	vnet.hdr_len = RN_ETH_HLEN + RN_IP4_HLEN + RN_TCP_HLEN;
	say(&vnet);
	micro_split("fast_up", "super-frame", 65160, 2 * 200, segments);
	fast_up_free(v.up);
	rn_stage_free(v.s);
	close(v.server);
	close(v.link.fd);
}
