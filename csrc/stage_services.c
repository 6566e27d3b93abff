/* stage_services.c - datagrams in and out for the services stage (DHCP, DNS), whose loop is Python.
 *
 * Data flow: classify puts whole frames with a filled struct rn_meta on our input ring. rn_services_recv()
 * takes one, checks every offset against the descriptor's length, copies the UDP payload out of shared
 * memory, and gives the buffer back to its owner. Python never sees shared bytes, so what it checks cannot
 * change under it. rn_services_send() builds Ethernet, IPv4 and UDP around a reply, in fragments where it is
 * longer than the MTU, with every checksum complete: correct on any link, and at a few hundred replies a
 * second its cost does not show.
 *
 * Backpressure: none. Every reply answers a datagram whose sender repeats it (RFC 2131 4.1, RFC 1035 4.2.1),
 * so a reply that finds no room or no buffer is dropped and counted (drop_services_reply_full), and the
 * input ring never fills because guest_rx is slow.
 *
 * Sleeping: the Python loop calls rn_services_arm() and blocks in its selector on the doorbell, the control
 * socket, the resolver sockets and its next timer. The cell says "asleep" meanwhile.
 *
 * A kill -9 between the copy and the reply loses one datagram; its sender repeats it.
 */
#include "stage_services.h"

#include "rn_csum.h"
#include "rn_proto.h"
#include "rn_view.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>

#define SERVICES_MTU_MIN 68u	/* RFC 791 3.2: what every internet module must forward */
#define SERVICES_TTL 64u	/* RFC 1700: default TTL */
#define SERVICES_FRAGMENTS_MAX 128u /* 65515 bytes at MTU 576 are 119 fragments */
#define SERVICES_UDP_MAX (65535u - RN_IP4_HLEN - RN_UDP_HLEN)

struct services {
	uint32_t mtu;
	uint16_t ip_id;			   /* identification of the next fragmented datagram (RFC 6864 4) */
	struct rn_buf *part[SERVICES_FRAGMENTS_MAX]; /* buffers of the reply being built */
};

static int services_turn(struct rn_stage *s)
{
	(void)s; /* the loop is Python's; rn_stage_run() on this stage would only sleep */
	return 0;
}

static void services_fini(struct rn_stage *s)
{
	free(s->priv);
	s->priv = NULL;
}

static const struct rn_stage_ops services_ops = {
	.turn = services_turn,
	.fini = services_fini,
};

/**
 * stage_services_init() - Make @s a services stage
 * @s:		Stage with session, arena, inputs and the guest output granted
 * @cfg:	Copied
 *
 * Return: 0; -EINVAL if the MTU is out of range or there is no output to the guest; -ENOMEM
 */
int stage_services_init(struct rn_stage *s, const struct services_config *cfg)
{
	struct services *v;

	if (cfg->mtu < SERVICES_MTU_MIN || cfg->mtu > 65535u)
		return rn_fail(s, -EINVAL, "services: MTU %u is not in %u..65535", cfg->mtu, SERVICES_MTU_MIN);
	if (!s->has_out[RN_ROLE_GUEST])
		return rn_fail(s, -EINVAL, "services: no ring to the guest was granted");
	v = calloc(1, sizeof(*v));
	if (!v)
		return rn_fail(s, -ENOMEM, "services: out of memory");
	v->mtu = cfg->mtu;
	v->ip_id = (uint16_t)cfg->seed;
	s->priv = v;
	s->ops = &services_ops;
	return 0;
}

/* Check one frame and copy what we need out of it. 0, -EPROTO if classify's offsets contradict the frame,
 * -EMSGSIZE if the payload is longer than @cap. Each length is read once, into a local, then used. */
static int services_parse(const uint8_t *frame, uint32_t len, const struct rn_meta *shared,
			  struct services_datagram *out, uint8_t *buf, uint32_t cap)
{
	const struct rn_view v = { .data = frame, .len = len };
	const struct rn_meta m = *shared; /* our copy: check it, then use it */
	const uint8_t *eth = rn_view_get(&v, 0, RN_ETH_HLEN);
	const uint8_t *ip = rn_view_get(&v, m.l3_off, RN_IP4_HLEN);
	const uint8_t *udp = rn_view_get(&v, m.l4_off, RN_UDP_HLEN);
	const uint8_t *payload = rn_view_get(&v, m.payload_off, m.payload_len);

	if (!eth || !ip || !udp || !payload || m.ip_version != 4 || m.ip_proto != RN_IPPROTO_UDP || m.each)
		return -EPROTO;
	if (m.payload_len > cap)
		return -EMSGSIZE;
	memcpy(out->dst_mac, eth, 6);
	memcpy(out->src_mac, eth + 6, 6);
	rn_addr_from4(out->src, ip + RN_IP4_SRC);
	rn_addr_from4(out->dst, ip + RN_IP4_DST);
	out->src_port = rn_get16(udp + RN_UDP_SPORT);
	out->dst_port = rn_get16(udp + RN_UDP_DPORT);
	out->len = m.payload_len;
	memcpy(buf, payload, m.payload_len);
	return 0;
}

/**
 * rn_services_recv() - Take one datagram from the guest
 * @s:		Services stage
 * @out:	Addresses, ports and length; written only if the return is 1
 * @buf:	Payload is copied here
 * @cap:	Bytes at @buf
 *
 * A frame that cannot be used is dropped and counted here, and the next one is looked at. Never blocks.
 *
 * Return: 1 with a datagram; 0 if no input has one (or a neighbour's counter is impossible: rn_services_end()
 *         tells)
 */
int rn_services_recv(struct rn_stage *s, struct services_datagram *out, uint8_t *buf, uint32_t cap)
{
	uint32_t empty = 0;

	rn_tap_done(s); /* what the caller did with the one before, drops included, is known now */
	while (empty < s->nin) {
		uint32_t i = s->next_in % s->nin;
		struct rn_ring_rx *rx = &s->in[i];
		int ready = rn_stage_peek(s, i, 1);
		struct rn_desc d;
		struct rn_buf *b;
		int err;

		s->next_in = (i + 1) % s->nin;
		if (!ready) {
			empty++;
			continue;
		}
		empty = 0;
		d = rn_ring_at(rx, 0);
		b = rn_stage_buf(s, &d);
		if (!b) { /* nothing to give back: the descriptor names no buffer */
			s->c[RN_C_drop_bad_descriptor]++;
			rn_ring_consume(rx, 1);
			continue;
		}
		rn_tap_frame(s, i, RN_PCAP_FROM_GUEST, s->pool.base + d.off, d.len);
		err = services_parse(s->pool.base + d.off, d.len, &b->meta, out, buf, cap);
		s->c[RN_C_frames_in]++;
		s->c[RN_C_bytes_in] += d.len;
		rn_buf_free(&s->pool, b);
		rn_ring_consume(rx, 1);
		if (!err)
			return 1;
		s->c[RN_C_drop_bad_meta]++;
		rn_tap_done(s);
	}
	return 0;
}

static int services_is_v4(const uint8_t a[16])
{
	static const uint8_t prefix[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };

	return !memcmp(a, prefix, sizeof(prefix));
}

/* UDP header with checksum over pseudo-header and payload (RFC 768). */
static void services_udp_header(uint8_t *udp, const struct services_datagram *d, const uint8_t *payload)
{
	uint32_t l4_len = RN_UDP_HLEN + d->len;
	uint64_t sum = rn_csum_pseudo4(d->src + 12, d->dst + 12, RN_IPPROTO_UDP, l4_len);
	uint16_t folded;

	rn_put16(udp + RN_UDP_SPORT, d->src_port);
	rn_put16(udp + RN_UDP_DPORT, d->dst_port);
	rn_put16(udp + RN_UDP_LEN, (uint16_t)l4_len);
	rn_put16(udp + RN_UDP_SUM, 0);
	sum = rn_csum_add(sum, udp, RN_UDP_HLEN);
	sum = rn_csum_add(sum, payload, d->len);
	folded = (uint16_t)~rn_csum_fold(sum);
	if (!folded)
		folded = 0xffff; /* RFC 768: 0 on the wire means "no checksum" */
	memcpy(udp + RN_UDP_SUM, &folded, 2);
}

/* One fragment (or the whole datagram) into @b; @off and @n count L4 bytes, UDP header included. */
static void services_fragment(struct services *v, struct rn_stage *s, struct rn_buf *b,
			      const struct services_datagram *d, const uint8_t *udp, const uint8_t *payload,
			      uint32_t off, uint32_t n, uint32_t l4_len)
{
	uint8_t *eth = (uint8_t *)b + RN_BUF_ETH_OFF, *ip = eth + RN_ETH_HLEN, *l4 = ip + RN_IP4_HLEN;
	uint32_t len = RN_ETH_HLEN + RN_IP4_HLEN + n, from = 0;
	uint16_t frag = (uint16_t)(off / 8);

	memset(eth - RN_VNET_HLEN, 0, RN_VNET_HLEN); /* virtio-net header: nothing to say */
	memcpy(eth, d->dst_mac, 6);
	memcpy(eth + 6, d->src_mac, 6);
	rn_put16(eth + 12, RN_ETHERTYPE_IPV4);

	if (off + n < l4_len)
		frag |= RN_IP4_MF; /* RFC 791 3.2 */
	else if (!off)
		frag = RN_IP4_DF; /* RFC 6864 4.1: an atomic datagram, its identification means nothing */
	ip[0] = 0x45;
	ip[RN_IP4_TOS] = 0;
	rn_put16(ip + RN_IP4_LEN, (uint16_t)(RN_IP4_HLEN + n));
	rn_put16(ip + RN_IP4_ID, frag & RN_IP4_DF ? 0 : v->ip_id);
	rn_put16(ip + RN_IP4_FRAG, frag);
	ip[RN_IP4_TTL] = SERVICES_TTL;
	ip[RN_IP4_PROTO] = RN_IPPROTO_UDP;
	rn_put16(ip + RN_IP4_SUM, 0);
	memcpy(ip + RN_IP4_SRC, d->src + 12, 4);
	memcpy(ip + RN_IP4_DST, d->dst + 12, 4);
	rn_csum_ip4(ip, RN_IP4_HLEN);

	if (!off) {
		memcpy(l4, udp, RN_UDP_HLEN);
		l4 += RN_UDP_HLEN;
		n -= RN_UDP_HLEN;
	} else {
		from = off - RN_UDP_HLEN;
	}
	memcpy(l4, payload + from, n);
	rn_stage_emit(s, RN_ROLE_GUEST, b, eth, len, 0);
	s->c[RN_C_frames_out]++;
	s->c[RN_C_bytes_out] += len;
}

/**
 * rn_services_send() - Send one UDP datagram to the guest
 * @s:		Services stage
 * @d:		From, to, ports, MAC addresses and length; IPv4 only
 * @payload:	@d->len bytes
 *
 * Whole if it fits the MTU, else in fragments (RFC 791 3.2). All of it goes or none. Published at once: a
 * reply ends a wait in the guest, and there is no batch to win here.
 *
 * Return: 0; -EAGAIN if ring or arena have no room (counted, drop the reply); -EMSGSIZE; -EAFNOSUPPORT if
 *         an address is not IPv4
 */
int rn_services_send(struct rn_stage *s, const struct services_datagram *d, const uint8_t *payload)
{
	struct services *v = s->priv;
	uint32_t l4_len = RN_UDP_HLEN + d->len, each, nfrags, got = 0;
	uint8_t udp[RN_UDP_HLEN];

	if (!services_is_v4(d->src) || !services_is_v4(d->dst))
		return -EAFNOSUPPORT;
	if (d->len > SERVICES_UDP_MAX)
		return -EMSGSIZE;
	if (RN_IP4_HLEN + l4_len <= v->mtu) {
		each = l4_len;
		nfrags = 1;
	} else {
		each = (v->mtu - RN_IP4_HLEN) & ~7u; /* RFC 791 3.2: offsets count units of 8 bytes */
		nfrags = (l4_len + each - 1) / each;
	}
	if (nfrags > SERVICES_FRAGMENTS_MAX)
		return -EMSGSIZE;

	if (rn_stage_room(s, RN_ROLE_GUEST, nfrags) < (int)nfrags)
		goto full;
	while (got < nfrags) {
		uint32_t n = l4_len - got * each < each ? l4_len - got * each : each;
		enum rn_buf_class cls =
			RN_ETH_HLEN + RN_IP4_HLEN + n <= RN_SMALL_FRAME_MAX ? RN_SMALL : RN_LARGE;

		v->part[got] = rn_buf_alloc(&s->pool, cls);
		if (!v->part[got])
			goto full;
		got++;
	}

	services_udp_header(udp, d, payload);
	for (uint32_t i = 0; i < nfrags; i++) {
		uint32_t off = i * each;

		services_fragment(v, s, v->part[i], d, udp, payload, off,
				  l4_len - off < each ? l4_len - off : each, l4_len);
	}
	if (nfrags > 1)
		v->ip_id++;
	rn_stage_publish(s);
	return 0;

full:
	while (got)
		rn_buf_free(&s->pool, v->part[--got]);
	s->c[RN_C_drop_services_reply_full]++;
	return -EAGAIN;
}

/**
 * rn_services_begin() - Start of a turn
 * @s:		Services stage
 */
void rn_services_begin(struct rn_stage *s)
{
	rn_stage_begin(s);
}

/**
 * rn_services_end() - End of a turn: outputs, heartbeat and counters are published
 * @s:		Services stage
 *
 * Return: 1 if the supervisor set the cell's stop word: end now; -EPROTO if a neighbour's counter was
 *         impossible, with rn_stage_error() set; else 0
 */
int rn_services_end(struct rn_stage *s)
{
	/* We drop instead of waiting: nobody shall wake us for room or buffers. */
	memset(s->want_room, 0, sizeof(s->want_room));
	s->want_buf = 0;
	rn_stage_end(s);
	if (s->broken)
		return -EPROTO;
	return rn_stage_stopped(s);
}

/**
 * rn_services_arm() - Announce sleep on every input
 * @s:		Services stage
 *
 * After a 0 the caller blocks in its selector; whatever it returns with, rn_services_disarm() is next.
 *
 * Return: 0 if it is right to block; 1 if a datagram came meanwhile (nothing is armed then); -EPROTO as
 *         rn_services_end()
 */
int rn_services_arm(struct rn_stage *s)
{
	return rn_stage_arm(s);
}

/**
 * rn_services_disarm() - Awake again: withdraw the announcement and quiet the doorbell
 * @s:		Services stage
 */
void rn_services_disarm(struct rn_stage *s)
{
	rn_stage_disarm(s);
}

/**
 * rn_services_pending() - Is there a datagram on an input, or held by a bad wire?
 * @s:		Services stage
 *
 * Return: 1 or 0
 */
int rn_services_pending(struct rn_stage *s)
{
	for (uint32_t i = 0; i < s->nin; i++)
		if (rn_stage_peek(s, i, 1) > 0)
			return 1;
	return rn_stage_impair_held(s) > 0;
}

/**
 * rn_services_bell() - Doorbell to sleep on
 * @s:		Services stage
 *
 * Return: eventfd, or -1 if none was granted
 */
int rn_services_bell(const struct rn_stage *s)
{
	return s->bells[s->row];
}

/**
 * rn_services_count() - Add to a counter
 * @s:		Services stage
 * @counter:	Index into rn_metrics.def; one out of range is ignored
 * @n:		How many
 */
void rn_services_count(struct rn_stage *s, uint32_t counter, uint64_t n)
{
	if (counter < RN_NCOUNTERS)
		s->c[counter] += n;
}

/**
 * rn_services_inotify() - A descriptor that tells of changed files (inotify(7))
 *
 * Return: non-blocking, close-on-exec descriptor, or -errno
 */
int rn_services_inotify(void)
{
	int fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

/**
 * rn_services_watch() - Watch one path for what an editor, a rename or a symlink swap does to it
 * @fd:		From rn_services_inotify()
 * @path:	Directory (names made, moved, removed or written in it) or file (written, replaced, removed)
 * @directory:	1: @path must be a directory
 *
 * The file is watched as well as its directory: a bind-mounted file (/etc/resolv.conf in a container) is
 * not written through the directory that we can see. IN_MODIFY is left out: a writer that truncates first
 * would have us read an empty file; what it leaves is told by IN_CLOSE_WRITE.
 *
 * Return: watch descriptor, or -errno
 */
int rn_services_watch(int fd, const char *path, int directory)
{
	uint32_t mask = directory ? IN_CREATE | IN_MOVED_TO | IN_MOVED_FROM | IN_DELETE | IN_CLOSE_WRITE |
					    IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
				  : IN_CLOSE_WRITE | IN_ATTRIB | IN_DELETE_SELF | IN_MOVE_SELF;
	int wd = inotify_add_watch(fd, path, mask);

	return wd < 0 ? -errno : wd;
}
