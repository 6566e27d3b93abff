/* fuzz_link.c - what comes over the guest's link, through guest_tx and classify, and out again by guest_rx.
 *
 * The three stages are the real ones, turned by hand in this process, with one arena. The link is a pair of datagram
 * sockets: a read() from one gives a datagram or its beginning, as a tap does; or of stream sockets. An input begins with one
 * byte of settings (kind of link, virtio-net headers, none, or none but what they said, frame limit); then come pieces, each with a length of two bytes:
 * datagrams, or on a stream just bytes, so that a frame may come in any number of them.
 *
 * What must hold: no sanitizer report; every descriptor that comes out names a frame in its buffer; what classify hands on
 * has offsets in the frame; frames in == frames out + drops, by the stages' own counters, so no frame vanishes without a
 * count; what guest_rx writes arrives as it was; every buffer is back at the end.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define FUZZ_NAME "link"
#include "fuzz_input.h"
#include "fuzz_main.h"
#include "rn_csum.h"
#include "rn_handle.h"
#include "rn_uso.h"
#include "stage_classify.h"
#include "stage_guest_rx.h"
#include "stage_guest_tx.h"

enum { TX, CLASSIFY, EGRESS, SERVICES, RX, ROWS };
#define SMALLS 32u
#define LARGES 4u
#define SLOTS 64u

static struct target {
	struct rn_stage *s[ROWS];
	void *session, *arena, *ring[5];
	struct rn_pool taker;
	struct rn_ring_rx to_egress, to_services;
	int link[2], bells[ROWS], vnet, stream;
	uint8_t back[1 << 18]; /* of a stream towards the guest */
	uint32_t nback;
	uint64_t inputs, sent, bridged, served, answered, trains;
} t;

static const struct classify_config config = {
	.gateway4 = { 10, 0, 2, 1 },
	.subnet4 = { 10, 0, 2, 0 },
	.prefix = 24,
	.gateway_mac = { 0x02, 0xab, 0xcd, 0, 0, 1 },
	.mtu = 1500,
};

static struct rn_stage *stage(uint32_t row)
{
	struct rn_stage *s = rn_stage_new(row, 1);

	must(s && !rn_stage_set_session(s, t.session, rn_session_size()), "stage");
	return s;
}

static void begin(uint8_t how)
{
	static const struct rn_part_spec spec[ROWS] = { { SMALLS, LARGES }, { SMALLS, LARGES }, { 0, 0 }, { 0, 0 }, { 0, 0 } };
	struct rn_link link = { .kind = how & 8 ? RN_LINK_STREAM : how & 1 ? RN_LINK_TAP : RN_LINK_DGRAM, .vnet = how >> 1 & 1,
				.frame_max = how & 4 ? RN_FRAME_MAX : 1514, .merge = how & 1,
				.unfinished = how & 16 && !(how & 2) ? config.mtu : 0, .whole = how >> 5 & 1 };
	uint64_t arena = rn_arena_size(spec, ROWS), ring = rn_ring_size(SLOTS);

	t.stream = link.kind == RN_LINK_STREAM;
	t.nback = 0;
	must(!socketpair(AF_UNIX, (t.stream ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, t.link), "link");
	for (uint32_t k = 0; k < 2; k++)
		must(!setsockopt(t.link[k], SOL_SOCKET, SO_SNDBUF, &(int){ 1 << 20 }, sizeof(int)), "buffer");
	link.fd = t.link[0];
	t.vnet = link.vnet;
	t.session = memory(rn_session_size());
	must(!rn_session_create(t.session, rn_session_size(), ROWS), "session");
	t.arena = memory(arena);
	must(!rn_arena_create(t.arena, arena, spec, ROWS), "arena");
	for (uint32_t k = 0; k < 5; k++) {
		t.ring[k] = memory(ring);
		must(!rn_ring_create(t.ring[k], ring, SLOTS), "ring");
	}
	for (uint32_t row = 0; row < ROWS; row++)
		must((t.bells[row] = rn_bell_new()) >= 0, "doorbell");
	for (uint32_t row = 0; row < ROWS; row++) {
		if (row == EGRESS || row == SERVICES) {
			t.s[row] = NULL;
			continue;
		}
		t.s[row] = stage(row);
		must(!rn_stage_set_arena(t.s[row], t.arena, arena, spec[row].nsmall != 0), "arena granted");
		for (uint32_t k = 0; k < ROWS; k++)
			must(!rn_stage_set_bell(t.s[row], k, t.bells[k]), "doorbells granted");
	}
	must(!rn_stage_add_output(t.s[TX], RN_ROLE_CLASSIFY, t.ring[0], ring, CLASSIFY), "ring 0");
	must(!rn_stage_add_input(t.s[CLASSIFY], t.ring[0], ring, TX), "ring 0");
	must(!rn_stage_add_output(t.s[CLASSIFY], RN_ROLE_BRIDGE, t.ring[1], ring, EGRESS), "ring 1");
	must(!rn_ring_rx_attach(&t.to_egress, t.ring[1], ring, t.bells[CLASSIFY]), "ring 1");
	must(!rn_stage_add_output(t.s[CLASSIFY], RN_ROLE_SERVICE, t.ring[2], ring, SERVICES), "ring 2");
	must(!rn_ring_rx_attach(&t.to_services, t.ring[2], ring, t.bells[CLASSIFY]), "ring 2");
	must(!rn_stage_add_output(t.s[CLASSIFY], RN_ROLE_GUEST, t.ring[3], ring, RX), "ring 3");
	must(!rn_stage_add_input(t.s[RX], t.ring[3], ring, CLASSIFY), "ring 3");
	must(!rn_pool_attach(&t.taker, t.arena, arena, -1, EGRESS, 0), "taker");
	must(!stage_guest_tx_init(t.s[TX], &link, -1), "guest_tx");
	must(!stage_classify_init(t.s[CLASSIFY], &config), "classify");
	must(!stage_guest_rx_init(t.s[RX], &link, -1), "guest_rx");
}

static int turn(uint32_t row)
{
	struct rn_stage *s = t.s[row];
	int r;

	if (s->ops->event)
		s->ops->event(s, RN_TAG_LINK, 0, 5 /* EPOLLIN | EPOLLOUT */);
	rn_stage_begin(s);
	r = s->ops->turn(s);
	rn_stage_end(s);
	must(r >= 0 && !s->broken, "the stage goes on");
	return r;
}

/* What classify hands to egress or services. */
static void take(struct rn_ring_rx *from, uint64_t *count)
{
	int n = rn_ring_peek(from, SLOTS);

	must(n >= 0, "ring");
	for (int k = 0; k < n; k++) {
		struct rn_desc d = rn_ring_at(from, (uint32_t)k);
		struct rn_buf *b = rn_buf_of(&t.taker, &d);

		must(b != NULL, "a descriptor of ours");
		must(d.len <= RN_FRAME_MAX && b->meta.l3_off <= d.len && b->meta.l4_off <= d.len && b->meta.payload_off <= d.len &&
			     b->meta.payload_len <= d.len - b->meta.payload_off, "offsets in the frame");
		must(!b->meta.each || (from == &t.to_egress && rn_uso_count(b->meta.payload_len, b->meta.each) - 2 <= RN_USO_DATAGRAMS_MAX - 2),
		     "a train of as many datagrams as there may be, and for egress only");
		t.trains += b->meta.each != 0;
		rn_buf_free(&t.taker, b);
		++*count;
	}
	if (n)
		rn_ring_consume(from, (uint32_t)n);
}

/* What the guest gets from a stream: whole frames behind their lengths, however they were cut on the way. */
static void take_stream(void)
{
	ssize_t got;

	while ((got = recv(t.link[1], t.back + t.nback, sizeof(t.back) - t.nback, 0)) > 0) {
		uint32_t at = 0, len;

		t.nback += (uint32_t)got;
		for (; t.nback - at >= 4 && (len = rn_get32(t.back + at)) <= t.nback - at - 4; at += 4 + len, t.answered++)
			must(len >= 14 + 12 * (uint32_t)t.vnet && len <= RN_LINK_WORD_MAX, "a whole frame for the guest");
		memmove(t.back, t.back + at, t.nback - at);
		t.nback -= at;
	}
}

static void settle(void)
{
	static uint8_t back[1 << 17];
	uint32_t n = 0;
	int did;

	do {
		did = turn(TX) + turn(CLASSIFY) + turn(RX);
		take(&t.to_egress, &t.bridged);
		take(&t.to_services, &t.served);
		if (t.stream)
			take_stream();
		for (ssize_t got; !t.stream && (got = recv(t.link[1], back, sizeof(back), 0)) >= 0; t.answered++)
			must(got >= 14 + 12 * t.vnet, "a whole frame for the guest");
		must(++n < 1000, "it comes to rest");
	} while (did);
}

static uint64_t drops(const struct rn_stage *s)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < rn_ncounters(); i++)
		if (!strncmp(rn_counter_name(i), "drop_", 5))
			sum += s->c[i];
	return sum;
}

static void end(void)
{
	settle();
	must(t.s[TX]->c[RN_C_frames_in] == t.s[TX]->c[RN_C_frames_out] + drops(t.s[TX]), "guest_tx: each frame on, or counted");
	must(!t.nback, "no frame for the guest is left half written");
	must(t.s[CLASSIFY]->c[RN_C_frames_in] == t.s[TX]->c[RN_C_frames_out], "classify got what guest_tx handed on");
	rn_stage_fini(t.s[TX]);
	rn_stage_fini(t.s[CLASSIFY]);
	rn_stage_fini(t.s[RX]);
	for (uint32_t row = 0; row <= CLASSIFY; row++)
		must(rn_pool_free(&t.s[row]->pool, RN_SMALL) == SMALLS && rn_pool_free(&t.s[row]->pool, RN_LARGE) == LARGES,
		     "every buffer is back");
	for (uint32_t row = 0; row < ROWS; row++) {
		if (t.s[row])
			rn_stage_free(t.s[row]);
		close(t.bells[row]);
	}
	rn_pool_detach(&t.taker);
	close(t.link[0]);
	close(t.link[1]);
	free(t.session);
	free(t.arena);
	for (uint32_t k = 0; k < 5; k++)
		free(t.ring[k]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	size_t at = 1;

	if (!size)
		return 0;
	t.inputs++;
	begin(data[0]);
	while (at + 2 <= size) {
		size_t n = (size_t)(data[at] | data[at + 1] << 8);

		at += 2;
		if (n > size - at)
			n = size - at;
		if (send(t.link[1], data + at, n, 0) < 0)
			must(errno == EAGAIN || errno == EMSGSIZE || errno == ENOBUFS, "send");
		else
			t.sent++;
		at += n;
		if (!(data[at - 1] & 7))
			settle();
		else
			turn(TX);
	}
	end();
	return 0;
}

/* A frame that is nearly right: ARP, UDP, TCP SYN, ping, a fragment. */
static size_t make_frame(uint8_t *f)
{
	uint32_t kind = fuzz_rnd(6), hlen = fuzz_rnd(8) ? 20 : 24, l4 = fuzz_rnd(8) ? fuzz_rnd(100) + 8 : fuzz_rnd(2000), total = hlen + l4;
	uint8_t *ip = f + 14;

	memcpy(f, fuzz_rnd(20) ? config.gateway_mac : (const uint8_t *)"\xff\xff\xff\xff\xff\xff", 6);
	memcpy(f + 6, "\x52\x54\xab\0\0\2", 6);
	if (kind == 0) {
		static const uint8_t arp[28] = { 0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0xab, 0, 0, 2, 10, 0, 2, 2, 0, 0, 0, 0, 0, 0, 10, 0, 2, 1 };

		memset(f, 0xff, 6);
		rn_put16(f + 12, RN_ETHERTYPE_ARP);
		memcpy(ip, arp, sizeof(arp));
		return 42 + fuzz_rnd(19);
	}
	rn_put16(f + 12, RN_ETHERTYPE_IPV4);
	memset(ip, 0, total);
	memset(ip + 20, 1, hlen - 20);
	ip[0] = (uint8_t)(0x40 | hlen / 4);
	rn_put16(ip + RN_IP4_LEN, (uint16_t)total);
	rn_put16(ip + RN_IP4_ID, (uint16_t)fuzz_rnd(3));
	if (kind == 5)
		rn_put16(ip + RN_IP4_FRAG, (uint16_t)(fuzz_rnd(4) | (fuzz_rnd(2) ? RN_IP4_MF : 0)));
	ip[RN_IP4_TTL] = 64;
	ip[RN_IP4_PROTO] = (uint8_t)(kind == 1 || kind == 5 ? 17 : kind == 2 ? 6 : kind == 3 ? 1 : fuzz_rnd(256));
	memcpy(ip + RN_IP4_SRC, "\x0a\0\2\2", 4);
	memcpy(ip + RN_IP4_DST, fuzz_rnd(6) ? "\x0a\0\2\1" : "\x0a\0\2\x63", 4);
	rn_csum_ip4(ip, hlen);
	if (kind == 1) { /* UDP without a checksum, to some service or none */
		rn_put16(ip + hlen, 4000);
		rn_put16(ip + hlen + 2, (uint16_t)(fuzz_rnd(2) ? 53 : fuzz_rnd(70)));
		rn_put16(ip + hlen + 4, (uint16_t)l4);
	}
	if (kind == 2 && l4 >= 20) { /* TCP, a segment in the middle of something or the beginning of it */
		rn_put16(ip + hlen + 2, 80);
		ip[hlen + RN_TCP_OFF] = (uint8_t)(fuzz_rnd(20) ? 0x50 : fuzz_rnd(256));
		ip[hlen + RN_TCP_FLAGS] = (uint8_t)(fuzz_rnd(4) ? RN_TH_ACK : fuzz_rnd(256));
	}
	if (!fuzz_rnd(2) && ((kind == 1 && l4 >= 8) || (kind == 2 && l4 >= 20))) { /* as its sender's offload leaves it */
		uint16_t sum = rn_csum_fold(rn_csum_pseudo(ip, ip[RN_IP4_PROTO], l4));

		memcpy(ip + hlen + (kind == 1 ? RN_UDP_SUM : RN_TCP_SUM), &sum, 2);
	}
	return 14 + total;
}

size_t fuzz_generate(uint8_t *buf, size_t cap)
{
	size_t n = 0;

	if (cap < 4096)
		return 0;
	buf[n++] = (uint8_t)fuzz_rnd(64);
	for (uint32_t k = 1 + fuzz_rnd(30); k && n + 2 + 12 + 4 + 2 + 2100 <= cap; k--) {
		uint32_t vnet = buf[0] >> 1 & 1 ? 12 : 0;
		uint8_t *f = buf + n + 2;
		size_t len;

		memset(f, 0, 12);
		if (vnet && !fuzz_rnd(3))
			for (uint32_t j = 0; j < 10; j++)
				f[j] = (uint8_t)(fuzz_rnd(3) ? (uint32_t[]){ 0, 1, 34, 54, 16, 255 }[fuzz_rnd(6)] : fuzz_rnd(256));
		len = vnet + make_frame(f + vnet);
		if (vnet && f[vnet + 23] == RN_IPPROTO_UDP && fuzz_rnd(2)) { /* a train of datagrams */
			struct rn_vnet_hdr v = { .flags = 1, .gso_type = RN_VNET_GSO_UDP_L4, .hdr_len = 42, .csum_start = 34,
						 .csum_offset = 6, .gso_size = (uint16_t)(1 + fuzz_rnd(60)) };

			memcpy(f, &v, sizeof(v));
			rn_put16(f + vnet + 34 + RN_UDP_SUM, 0x1234);
		}
		for (uint32_t j = fuzz_rnd(4); j && !fuzz_rnd(2); j--)
			f[fuzz_rnd((uint32_t)len)] = (uint8_t)fuzz_rnd(256);
		if (!fuzz_rnd(8))
			len = fuzz_rnd((uint32_t)len + 1);
		if (buf[0] & 8) { /* its length in front, seldom a wrong one, and cut somewhere */
			uint8_t word[4] = { 0, 0, (uint8_t)(len >> 8), (uint8_t)len };
			uint32_t piece;

			if (!fuzz_rnd(40))
				word[fuzz_rnd(4)] = (uint8_t)fuzz_rnd(256);
			memmove(f + 4, f, len);
			memcpy(f, word, 4);
			len += 4;
			piece = fuzz_rnd((uint32_t)len + 1);
			if (piece && piece < len && n + 2 + len + 2 <= cap) { /* in two pieces */
				memmove(f + piece + 2, f + piece, len - piece);
				buf[n] = (uint8_t)piece;
				buf[n + 1] = (uint8_t)(piece >> 8);
				n += 2 + piece;
				len -= piece;
			}
		}
		buf[n] = (uint8_t)len;
		buf[n + 1] = (uint8_t)(len >> 8);
		n += 2 + len;
	}
	return n;
}

void fuzz_report(void)
{
	printf("inputs %llu\nsent %llu\nbridged %llu\nserved %llu\nanswered %llu\ntrains %llu\n", (unsigned long long)t.inputs,
	       (unsigned long long)t.sent, (unsigned long long)t.bridged, (unsigned long long)t.served,
	       (unsigned long long)t.answered, (unsigned long long)t.trains);
}
