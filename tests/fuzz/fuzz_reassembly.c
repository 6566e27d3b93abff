/* fuzz_reassembly.c - fragments of a hostile guest, against an oracle that knows what may come out.
 *
 * An input is a list of operations of a few bytes: a fragment of one of eight datagrams (offset, length, more, and
 * whether its bytes are the datagram's own or altered), or time that passes. The byte at a place of a datagram is a function of its
 * identification, so whatever was put together is known byte for byte.
 *
 * What must hold: a datagram comes out only if its fragments covered it without a gap, and an overlap that contradicts
 * what is there never shows in it (RFC 5722's rule, taken for IPv4 as well: such a datagram is refused whole); the frame
 * has a right header and parses as whole; each fragment has exactly one fate; the table keeps its bound; nothing is left
 * at the end of the time.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FUZZ_NAME "reassembly"
#include "fuzz_input.h"
#include "fuzz_main.h"
#include "reassembly.h"
#include "rn_csum.h"

#define IDS 8u
#define BLOCKS 5u

static const struct classify_config config = {
	.gateway4 = { 10, 0, 2, 1 },
	.subnet4 = { 10, 0, 2, 0 },
	.prefix = 24,
	.gateway_mac = { 0x02, 0xab, 0xcd, 0, 0, 1 },
	.mtu = 4000,
};

static struct target {
	struct reassembly *ra;
	uint64_t now, added, whole, expired, inputs, refused;
	uint8_t out[RN_FRAME_MAX];
	uint8_t covered[IDS][65536]; /* bytes that some fragment had, since the datagram began */
	int altered[IDS];	     /* one with other bytes was among them */
} t;

static uint8_t byte_at(uint32_t id, uint32_t off)
{
	/* The first eight are a UDP header with no checksum, so that what comes out is a frame for egress. */
	if (off == 0 || off == 2)
		return 0x10;
	if (off < 8)
		return off == 1 ? (uint8_t)id : 0;
	return (uint8_t)((off * 2654435761u >> 20) ^ id * 41u);
}

static void forget(uint32_t id)
{
	memset(t.covered[id], 0, sizeof(t.covered[id]));
	t.altered[id] = 0;
}

static void expire(void)
{
	uint8_t quote[RA_QUOTE_MAX];
	uint32_t len = 0;

	while (reassembly_expire(t.ra, t.now, quote, &len)) {
		must(len <= RA_QUOTE_MAX, "quote bound");
		t.expired++;
	}
}

static void check_books(void)
{
	struct ra_stat st;

	reassembly_stat(t.ra, &st);
	must(t.added == st.joined + st.held + st.duplicates + st.bad + st.table + st.timeout, "one fate each");
	must(st.open <= RA_DATAGRAMS, "table bound");
}

static void fragment(uint32_t id, uint32_t off, uint32_t len, int more, int alter, uint32_t options)
{
	uint32_t hlen = 20 + options, n = RN_ETH_HLEN + hlen + len, out_len = 0;
	uint8_t *f = malloc(n), *ip = f + RN_ETH_HLEN; /* of exactly its length: a byte too many is seen */
	struct rn_parsed p;
	int r, verdict;

	must(f != NULL, "memory");
	memcpy(f, config.gateway_mac, 6);
	memcpy(f + 6, "\x52\x54\xab\0\0\2", 6);
	rn_put16(f + 12, RN_ETHERTYPE_IPV4);
	memset(ip, 0, hlen);
	ip[0] = (uint8_t)(0x40 | hlen / 4);
	memset(ip + 20, 1, options); /* NOPs */
	rn_put16(ip + RN_IP4_LEN, (uint16_t)(hlen + len));
	rn_put16(ip + RN_IP4_ID, (uint16_t)id);
	rn_put16(ip + RN_IP4_FRAG, (uint16_t)(off / 8 | (more ? RN_IP4_MF : 0)));
	ip[RN_IP4_TTL] = 64;
	ip[RN_IP4_PROTO] = RN_IPPROTO_UDP;
	memcpy(ip + RN_IP4_SRC, "\x0a\0\2\2", 4);
	memcpy(ip + RN_IP4_DST, "\x0a\0\2\1", 4);
	rn_csum_ip4(ip, hlen);
	for (uint32_t k = 0; k < len; k++)
		f[RN_ETH_HLEN + hlen + k] = byte_at(id, off + k);
	if (alter && len)
		f[RN_ETH_HLEN + hlen + len / 2] ^= 0x80;
	verdict = rn_parse_bytes(f, n, NULL, &config, &p);
	if (verdict != RN_V_FRAGMENT) { /* a whole datagram, or one that classify drops */
		free(f);
		return;
	}
	if (off + len <= 65536)
		memset(t.covered[id] + off, 1, len);
	t.altered[id] |= alter && len;
	r = reassembly_add_bytes(t.ra, t.now, f, n, &config, t.out, &out_len);
	free(f);
	t.added++;
	if (r == RA_DROPPED)
		t.refused++;
	if (r == RA_DONE) {
		struct rn_parsed q;
		uint32_t data;

		t.whole++;
		must(out_len >= 34 && out_len <= RN_FRAME_MAX, "a frame");
		verdict = rn_parse_bytes(t.out, out_len, NULL, &config, &q);
		must(verdict != RN_V_FRAGMENT, "a whole datagram is no fragment");
		must(verdict != RN_V_IP_CHECKSUM && verdict != RN_V_IP_HEADER && verdict != RN_V_IP_TRUNCATED, "the header made is right");
		data = RN_ETH_HLEN + (t.out[RN_ETH_HLEN] & 15) * 4u;
		for (uint32_t k = 0; k < out_len - data; k++) {
			must(t.covered[id][k], "every byte was in a fragment");
			must(t.altered[id] || t.out[data + k] == byte_at(id, k), "the right byte");
		}
		forget(id);
	}
	check_books();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct ra_stat st;

	t.inputs++;
	t.now = 1000000000000ull;
	t.added = 0;
	t.ra = reassembly_new_heap(BLOCKS);
	must(t.ra && !classify_config_check(&config), "begin");
	for (uint32_t id = 0; id < IDS; id++)
		forget(id);
	for (size_t at = 0; at + 4 <= size; at += 4) {
		const uint8_t *o = data + at;
		uint32_t id = o[0] & 7, off, len;

		if (o[0] >> 6 == 3 && !(o[1] & 7)) {
			t.now += (uint64_t)o[2] * 100000000u;
			expire();
			continue;
		}
		/* Small pieces near each other mostly; sometimes near the end of what a datagram can hold. */
		off = (o[0] & 0x20 ? 65535u / 8 - (o[1] & 31) : o[1] & 63) * 8;
		len = o[2] & 0x80 ? 1u + o[2] % 127 * 512u : (o[2] & 0x0f) * 8;
		if (o[3] & 1)
			len += o[3] >> 5;
		if (len > 65535 - 40)
			len = 65535 - 40;
		fragment(id, off, len, o[3] >> 1 & 1, (o[3] & 0x1c) == 0x1c, (o[0] & 0x18) == 0x18 ? 8 : 0);
	}
	t.now += 2 * (uint64_t)RA_TIMEOUT_NS;
	expire();
	reassembly_stat(t.ra, &st);
	must(!st.open && !st.held, "nothing is left after the time");
	must(reassembly_deadline(t.ra) == UINT64_MAX, "and no timer");
	check_books();
	reassembly_free(t.ra);
	return 0;
}

size_t fuzz_generate(uint8_t *buf, size_t cap)
{
	size_t n = 0;
	uint32_t ids = 1 + fuzz_rnd(IDS), span = 1u << fuzz_rnd(6);

	for (uint32_t k = 2 + fuzz_rnd(20); k; k--) {
		uint32_t pieces = fuzz_rnd(3) ? 1 + fuzz_rnd(6) : 0, id = fuzz_rnd(ids), first = fuzz_rnd(pieces + 1);

		/* A whole datagram, its pieces in some order, perhaps one of them twice or not at all ... */
		for (uint32_t j = 0; j < pieces && n + 4 <= cap; j++) {
			uint32_t piece = (first + j * (pieces == 4 || pieces == 6 ? 1 : 2)) % pieces;

			if (!fuzz_rnd(16))
				continue;
			buf[n++] = (uint8_t)id;
			buf[n++] = (uint8_t)(piece * 3);
			buf[n++] = 3;
			buf[n++] = (uint8_t)((piece + 1 < pieces ? 2 : 0) | (fuzz_rnd(40) ? 0 : 0x1c));
			if (!fuzz_rnd(16))
				j--;
		}
		/* ... and anything in between. */
		for (uint32_t j = fuzz_rnd(pieces ? 2 : 8); j && n + 4 <= cap; j--) {
			buf[n++] = (uint8_t)(fuzz_rnd(ids) | (fuzz_rnd(12) ? 0 : fuzz_rnd(32) << 3) | (fuzz_rnd(30) ? 0 : 0xc0));
			buf[n++] = (uint8_t)fuzz_rnd(span + 1);
			buf[n++] = (uint8_t)(fuzz_rnd(20) ? 1 + fuzz_rnd(fuzz_rnd(2) ? 2 : 15) : fuzz_rnd(256));
			buf[n++] = (uint8_t)(fuzz_rnd(4) ? 2 : fuzz_rnd(256));
		}
	}
	return n;
}

void fuzz_report(void)
{
	printf("inputs %llu\nwhole %llu\nexpired %llu\nrefused %llu\n", (unsigned long long)t.inputs, (unsigned long long)t.whole,
	       (unsigned long long)t.expired, (unsigned long long)t.refused);
}
