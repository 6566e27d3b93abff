/* guest.c - a guest in user space, for the links that virtual machines use: `linkguest KIND MODE FD SECONDS MTU`.
 *
 *   KIND  stream (4 bytes of length, high byte first, then the frame) or dgram (a frame each); FD is the link, connected
 *   MODE  tcp-down, tcp-up: one connection to a server on the host, which this program forks too
 *         udp-up: datagrams of MTU size, as many as the link takes; udp-small: 18 bytes each, 60-byte frames
 *
 * Nothing of what is measured is in it: its own TCP (goes back to what is not acknowledged after three duplicate ACKs, or 200 ms
 * without progress, as Linux would), frames of zeros so that checksums cost it next to nothing. The server is at 127.0.0.1, which ringnet
 * and passt both reach by the gateway's address. Prints one line of JSON: frames and bytes that arrived, and the time.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define FRAME_MAX 65550
#define WSCALE 8
#define BUFFER (1 << 20)
#define FLIGHT (4u << 20) /* bytes under way at most */

static const uint8_t my_mac[6] = { 0x52, 0x54, 0, 0, 0, 1 }, my_ip[4] = { 10, 0, 2, 2 }, gw_ip[4] = { 10, 0, 2, 1 };

static struct {
	int fd, stream, up, udp;
	uint32_t mss, payload;
	uint8_t gw_mac[6];
	int have_mac, established;
	uint16_t port;
	uint32_t snd_una, snd_nxt, rcv_nxt, wnd, shift;
	int ack_due;
	uint32_t dups, recover; /* duplicate ACKs; no second going back before this is acknowledged */
	uint64_t bytes_down, frames_in, frames_out;
	double progress; /* when snd_una last moved */
	/* outgoing: what the link has not taken is [out_at, out_fill) */
	uint8_t *out, *in;
	uint32_t out_at, out_fill, in_fill;
} g;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint16_t get16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}
static uint32_t get32(const uint8_t *p)
{
	return (uint32_t)get16(p) << 16 | get16(p + 2);
}
static void put16(uint8_t *p, uint32_t v)
{
	p[0] = (uint8_t)(v >> 8);
	p[1] = (uint8_t)v;
}
static void put32(uint8_t *p, uint32_t v)
{
	put16(p, v >> 16);
	put16(p + 2, v);
}

static uint32_t sum(const uint8_t *p, uint32_t n, uint32_t s)
{
	for (; n > 1; p += 2, n -= 2)
		s += get16(p);
	return n ? s + (uint32_t)(p[0] << 8) : s;
}
static uint16_t fold(uint32_t s)
{
	while (s >> 16)
		s = (s & 0xffff) + (s >> 16);
	return (uint16_t)~s;
}

/* --- the link --- */

/* Give the link what it takes; records are as on a stream in both cases. */
static void flush(void)
{
	while (g.out_at < g.out_fill) {
		if (g.stream) {
			ssize_t n = send(g.fd, g.out + g.out_at, g.out_fill - g.out_at, MSG_NOSIGNAL);

			if (n < 0 && errno != EAGAIN)
				die("link");
			if (n < 0)
				return;
			g.out_at += (uint32_t)n;
		} else {
			struct mmsghdr m[BATCH];
			struct iovec iov[BATCH];
			uint32_t k = 0;
			int sent;

			memset(m, 0, sizeof(m));
			for (uint32_t at = g.out_at; at < g.out_fill && k < BATCH; k++) {
				iov[k] = (struct iovec){ g.out + at + 4, get32(g.out + at) };
				m[k].msg_hdr.msg_iov = &iov[k];
				m[k].msg_hdr.msg_iovlen = 1;
				at += 4 + (uint32_t)iov[k].iov_len;
			}
			sent = sendmmsg(g.fd, m, k, MSG_NOSIGNAL);
			if (sent < 0 && errno != EAGAIN)
				die("link");
			if (sent < 0)
				return;
			for (int i = 0; i < sent; i++)
				g.out_at += 4 + (uint32_t)iov[i].iov_len;
		}
	}
	g.out_at = g.out_fill = 0;
}

/* Room for a frame of so many bytes, or NULL. */
static uint8_t *frame(uint32_t len)
{
	uint8_t *p = g.out + g.out_fill;

	if (g.out_fill + 4 + len > BUFFER)
		return NULL;
	put32(p, len);
	g.out_fill += 4 + len;
	g.frames_out++;
	return p + 4;
}

static uint8_t *ip_frame(uint8_t proto, uint32_t l4)
{
	uint8_t *f = frame(34 + l4), *ip = f + 14;

	if (!f)
		return NULL;
	memcpy(f, g.gw_mac, 6);
	memcpy(f + 6, my_mac, 6);
	put16(f + 12, 0x0800);
	memset(ip, 0, 20);
	ip[0] = 0x45;
	put16(ip + 2, 20 + l4);
	put16(ip + 6, 0x4000);
	ip[8] = 64;
	ip[9] = proto;
	memcpy(ip + 12, my_ip, 4);
	memcpy(ip + 16, gw_ip, 4);
	put16(ip + 10, fold(sum(ip, 20, 0)));
	return ip + 20;
}

static void arp(void)
{
	static const uint8_t head[22] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1 };
	uint8_t *f = frame(42);

	memcpy(f, head, 22);
	memcpy(f + 22, my_mac, 6);
	memcpy(f + 28, my_ip, 4);
	memset(f + 32, 0, 6);
	memcpy(f + 38, gw_ip, 4);
}

/* A segment of @n bytes of zeros at snd_nxt. 0: no room. */
static int segment(uint8_t flags, uint32_t n)
{
	uint32_t hlen = flags & 2 ? 28 : 20, s;
	uint8_t *t = ip_frame(6, hlen + n), *ip = t - 20;

	if (!t)
		return 0;
	memset(t, 0, hlen);
	put16(t, 40000);
	put16(t + 2, g.port);
	put32(t + 4, g.snd_nxt);
	put32(t + 8, flags & 16 ? g.rcv_nxt : 0);
	t[12] = (uint8_t)(hlen / 4 << 4);
	t[13] = flags;
	put16(t + 14, 65535);
	if (flags & 2) {
		t[20] = 2; /* MSS, window scale */
		t[21] = 4;
		put16(t + 22, g.mss);
		t[24] = 1;
		t[25] = 3;
		t[26] = 3;
		t[27] = WSCALE;
	}
	memset(t + hlen, 0, n);
	s = sum(ip + 12, 8, 6 + hlen + n);
	put16(t + 16, fold(sum(t, hlen, s)));
	g.snd_nxt += n + !!(flags & 2);
	return 1;
}

/* --- what comes --- */

static void tcp_in(const uint8_t *t, uint32_t len)
{
	uint32_t hlen = (t[12] >> 4) * 4u, seq = get32(t + 4), ack = get32(t + 8), n;

	if (len < 20 || hlen < 20 || hlen > len || get16(t) != g.port)
		return;
	n = len - hlen;
	if (t[13] & 4) {
		fprintf(stderr, "linkguest: the connection was reset\n");
		exit(1);
	}
	if (t[13] & 2) {
		for (uint32_t i = 20; i + 2 < hlen && t[i];) {
			if (t[i] == 3)
				g.shift = t[i + 2];
			i += t[i] == 1 || !t[i + 1] ? 1 : t[i + 1];
		}
		g.rcv_nxt = seq + 1;
		g.snd_una = ack;
		g.wnd = get16(t + 14);
		g.established = g.ack_due = 1;
		return;
	}
	if ((int32_t)(ack - g.snd_una) > 0) {
		g.snd_una = ack;
		g.progress = now();
		g.dups = 0;
		if ((int32_t)(g.snd_nxt - ack) < 0)
			g.snd_nxt = ack;
	} else if (ack == g.snd_una && !n && g.snd_nxt != ack && (uint32_t)get16(t + 14) << g.shift == g.wnd && ++g.dups == 3 &&
		   (int32_t)(ack - g.recover) >= 0) {
		g.recover = g.snd_nxt;
		g.snd_nxt = ack;
		g.progress = now();
	}
	g.wnd = (uint32_t)get16(t + 14) << g.shift;
	if (!n)
		return;
	g.ack_due = 1;
	if (seq == g.rcv_nxt) {
		g.rcv_nxt += n;
		g.bytes_down += n;
	}
}

static void frame_in(const uint8_t *f, uint32_t len)
{
	g.frames_in++;
	if (len < 42)
		return;
	if (get16(f + 12) == 0x0806 && get16(f + 20) == 2) {
		memcpy(g.gw_mac, f + 22, 6);
		g.have_mac = 1;
	} else if (get16(f + 12) == 0x0806 && get16(f + 20) == 1 && !memcmp(f + 38, my_ip, 4)) {
		uint8_t *r = frame(42);

		if (!r)
			return;
		memcpy(r, f + 6, 6);
		memcpy(r + 6, my_mac, 6);
		memcpy(r + 12, f + 12, 8);
		put16(r + 20, 2);
		memcpy(r + 22, my_mac, 6);
		memcpy(r + 28, my_ip, 4);
		memcpy(r + 32, f + 22, 10);
	} else if (get16(f + 12) == 0x0800 && f[23] == 6) {
		uint32_t hlen = (f[14] & 15u) * 4, total = get16(f + 16);

		if (hlen >= 20 && total >= hlen && 14 + total <= len)
			tcp_in(f + 14 + hlen, total - hlen);
	}
}

/* Everything that waits, but not for ever. */
static void receive(void)
{
	if (g.stream) {
		ssize_t n = recv(g.fd, g.in + g.in_fill, BUFFER - g.in_fill, 0);
		uint32_t at = 0;

		if (!n || (n < 0 && errno != EAGAIN))
			die("link closed");
		if (n > 0)
			g.in_fill += (uint32_t)n;
		while (g.in_fill - at >= 4) {
			uint32_t len = get32(g.in + at);

			if (len > FRAME_MAX) {
				fprintf(stderr, "linkguest: a frame of %u bytes\n", len);
				exit(1);
			}
			if (g.in_fill - at - 4 < len)
				break;
			frame_in(g.in + at + 4, len);
			at += 4 + len;
		}
		memmove(g.in, g.in + at, g.in_fill - at);
		g.in_fill -= at;
	} else {
		static uint8_t room[BATCH][FRAME_MAX];
		struct iovec iov[BATCH];
		struct mmsghdr m[BATCH];
		int n;

		memset(m, 0, sizeof(m));
		for (int i = 0; i < BATCH; i++) {
			iov[i] = (struct iovec){ room[i], FRAME_MAX };
			m[i].msg_hdr.msg_iov = &iov[i];
			m[i].msg_hdr.msg_iovlen = 1;
		}
		n = recvmmsg(g.fd, m, BATCH, 0, NULL);
		if (n < 0 && errno != EAGAIN)
			die("link");
		for (int i = 0; i < n; i++)
			frame_in(room[i], m[i].msg_len);
	}
}

/* --- the host's side --- */

struct count {
	uint64_t frames, bytes;
};

static volatile sig_atomic_t stop;

static void on_term(int sig)
{
	(void)sig;
	stop = 1;
}

static void serve(int listening, int told)
{
	struct count c = { 0 };
	static uint8_t buf[1 << 18];
	int conn = g.udp ? listening : -1;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	sigaction(SIGTERM, &(struct sigaction){ .sa_handler = on_term }, NULL);
	if (conn < 0)
		conn = accept(listening, NULL, NULL);
	if (conn < 0)
		exit(1);
	while (!stop) {
		ssize_t n = g.udp || g.up ? recv(conn, buf, sizeof(buf), 0) : send(conn, buf, sizeof(buf), MSG_NOSIGNAL);

		if (n <= 0)
			break;
		c.frames++;
		c.bytes += (uint64_t)n;
	}
	if (write(told, &c, sizeof(c)) != sizeof(c))
		exit(1);
	exit(0);
}

static void work(void)
{
	if (!g.have_mac)
		return;
	if (g.udp) {
		for (int i = 0; i < BATCH && !g.out_at; i++) {
			uint8_t *u = ip_frame(17, 8 + g.payload);

			if (!u)
				return;
			put16(u, 40001);
			put16(u + 2, g.port);
			put16(u + 4, 8 + g.payload);
			memset(u + 6, 0, 2 + g.payload);
		}
		return;
	}
	if (!g.snd_nxt) {
		g.progress = now();
		segment(2, 0);
		return;
	}
	while (g.established && g.up && g.out_fill < BUFFER / 2) {
		uint32_t flight = g.snd_nxt - g.snd_una, most = g.wnd < FLIGHT ? g.wnd : FLIGHT;

		if (flight + g.mss > most || !segment(16 | 8, g.mss))
			break;
		g.ack_due = 0;
	}
	if (g.established && g.up && g.snd_nxt != g.snd_una && now() - g.progress > 0.2) {
		g.snd_nxt = g.snd_una;
		g.progress = now();
	}
	if (g.ack_due && segment(16, 0))
		g.ack_due = 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t alen = sizeof(a);
	struct count c = { 0 };
	int listening, told[2], size = 8 << 20;
	double begin = 0, end, seconds;
	pid_t child;

	if (argc != 6) {
		fprintf(stderr, "usage: linkguest stream|dgram tcp-down|tcp-up|udp-up|udp-small FD SECONDS MTU\n");
		return 2;
	}
	g.stream = !strcmp(argv[1], "stream");
	g.udp = !strncmp(argv[2], "udp", 3);
	g.up = strcmp(argv[2], "tcp-down") != 0;
	g.fd = atoi(argv[3]);
	seconds = atof(argv[4]);
	g.mss = (uint32_t)atoi(argv[5]) - 40;
	g.payload = strcmp(argv[2], "udp-small") ? (uint32_t)atoi(argv[5]) - 28 : 18;
	g.out = malloc(BUFFER);
	g.in = malloc(BUFFER);
	listening = socket(AF_INET, g.udp ? SOCK_DGRAM : SOCK_STREAM, 0);
	if (!g.out || !g.in || listening < 0 || bind(listening, (struct sockaddr *)&a, sizeof(a)) || (!g.udp && listen(listening, 1)) ||
	    getsockname(listening, (struct sockaddr *)&a, &alen) || pipe(told) || fcntl(g.fd, F_SETFL, O_NONBLOCK))
		die("set-up");
	if (g.udp && setsockopt(listening, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)))
		setsockopt(listening, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	g.port = ntohs(a.sin_port);
	child = fork();
	if (child < 0)
		die("fork");
	if (!child)
		serve(listening, told[1]);
	close(told[1]);
	arp();
	for (end = now() + 10.0; now() < end;) { /* 10 s to begin */
		struct pollfd p = { .fd = g.fd, .events = POLLIN };

		work();
		flush();
		if (!begin && (g.udp ? g.have_mac : g.established)) {
			begin = now();
			end = begin + seconds;
		}
		if (g.out_at < g.out_fill || (g.udp && g.have_mac))
			p.events |= POLLOUT;
		if (poll(&p, 1, 100) < 0)
			die("poll");
		if (p.revents & (POLLIN | POLLHUP | POLLERR))
			receive();
	}
	if (!begin) {
		fprintf(stderr, "linkguest: the link did not answer in 10 s\n");
		kill(child, SIGKILL);
		return 1;
	}
	end = now();
	kill(child, SIGTERM);
	if (g.up && read(told[0], &c, sizeof(c)) != sizeof(c)) {
		fprintf(stderr, "linkguest: nothing arrived\n");
		return 1;
	}
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	printf("{\"seconds\": %.4f, \"bytes\": %llu, \"datagrams\": %llu, \"frames_in\": %llu, \"frames_out\": %llu}\n", end - begin,
	       (unsigned long long)(g.up ? c.bytes : g.bytes_down), (unsigned long long)(g.udp ? c.frames : 0),
	       (unsigned long long)g.frames_in, (unsigned long long)g.frames_out);
	return 0;
}
