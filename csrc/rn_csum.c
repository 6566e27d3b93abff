/* rn_csum.c - Internet checksum (RFC 1071).
 *
 * The ones' complement sum does not depend on how the words are grouped (RFC 1071 2(A)) or on byte order
 * (2(B)), so the bytes are added as 32-bit words, as they lie in memory, into 64-bit lanes: two bytes more
 * room than any frame needs, and no carry to look after inside the loop (2(C)). GCC's vector type becomes
 * SSE2 or NEON.
 */
#include "rn_csum.h"

#include <string.h>

#include "rn_proto.h"

typedef uint64_t lanes __attribute__((vector_size(16)));

/* End-around carry (RFC 1071 1). */
static inline uint64_t add1(uint64_t a, uint64_t b)
{
	a += b;
	return a + (a < b);
}

static inline lanes load(const uint8_t *p)
{
	lanes v;

	memcpy(&v, p, sizeof(v));
	return v;
}

/**
 * rn_csum_add() - Add bytes to a running sum
 * @sum:	Sum so far; what it counts must have been of even length
 * @data:	Bytes, any alignment
 * @len:	How many; odd: a zero byte is understood behind the last (RFC 1071 4.1)
 *
 * Return: the new sum, for rn_csum_add() or rn_csum_fold().
 */
uint64_t rn_csum_add(uint64_t sum, const void *data, uint64_t len)
{
	const uint8_t *p = data;
	uint64_t word;

	if (len >= 128) {
		const lanes low = { 0xffffffffu, 0xffffffffu };
		lanes even = { 0 }, odd = { 0 }, even2 = { 0 }, odd2 = { 0 };

		for (; len >= 64; p += 64, len -= 64) {
			lanes a = load(p), b = load(p + 16), c = load(p + 32), d = load(p + 48);

			even += (a & low) + (b & low);
			odd += (a >> 32) + (b >> 32);
			even2 += (c & low) + (d & low);
			odd2 += (c >> 32) + (d >> 32);
		}
		/* Every lane is below 2^33 times the turns of the loop: no overflow before 2^37 bytes. */
		for (int i = 0; i < 2; i++) {
			sum = add1(add1(sum, even[i]), odd[i]);
			sum = add1(add1(sum, even2[i]), odd2[i]);
		}
	}
	for (; len >= 8; p += 8, len -= 8) {
		memcpy(&word, p, 8);
		sum = add1(sum, word);
	}
	if (len) {
		word = 0;
		memcpy(&word, p, len);
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the tail's padding is on the other side"
#endif
		sum = add1(sum, word);
	}
	return sum;
}

uint16_t rn_csum_fold(uint64_t sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}

/* RFC 9293 3.1: source, destination, zero, protocol, length. */
uint64_t rn_csum_pseudo4(const uint8_t src[4], const uint8_t dst[4], uint8_t proto, uint32_t len)
{
	uint8_t pseudo[16];

	memcpy(pseudo, src, 4);
	memcpy(pseudo + 4, dst, 4);
	memset(pseudo + 8, 0, 3);
	pseudo[11] = proto;
	pseudo[12] = (uint8_t)(len >> 24);
	pseudo[13] = (uint8_t)(len >> 16);
	pseudo[14] = (uint8_t)(len >> 8);
	pseudo[15] = (uint8_t)len;
	return rn_csum_add(0, pseudo, sizeof(pseudo));
}

/* RFC 8200 8.1: source, destination, length, zero, next header. */
uint64_t rn_csum_pseudo(const uint8_t *ip, uint8_t proto, uint32_t len)
{
	uint8_t tail[8] = { (uint8_t)(len >> 24), (uint8_t)(len >> 16), (uint8_t)(len >> 8), (uint8_t)len, 0, 0, 0, proto };

	if (ip[0] >> 4 == 4)
		return rn_csum_pseudo4(ip + RN_IP4_SRC, ip + RN_IP4_DST, proto, len);
	return rn_csum_add(rn_csum_add(0, ip + RN_IP6_SRC, 32), tail, sizeof(tail));
}

/* RFC 791 3.1: over the header with the field itself zero. */
void rn_csum_ip4(uint8_t *ip, uint32_t hlen)
{
	uint16_t sum;

	memset(ip + 10, 0, 2);
	sum = (uint16_t)~rn_csum_fold(rn_csum_add(0, ip, hlen));
	memcpy(ip + 10, &sum, 2);
}

/* As the RFC writes it: 16-bit words, high byte first, carries added back at the end. */
uint16_t rn_csum_plain(const void *data, uint64_t len)
{
	const uint8_t *p = data;
	uint8_t wire[2];
	uint64_t sum = 0;
	uint16_t out;

	for (uint64_t i = 0; i < len; i++)
		sum += i & 1 ? p[i] : (uint64_t)p[i] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	wire[0] = (uint8_t)(sum >> 8);
	wire[1] = (uint8_t)sum;
	memcpy(&out, wire, 2); /* in memory order, as rn_csum_fold() gives it */
	return out;
}
